"""`dimr encode`: a folder of images becomes a shard set (dataset.py), of cropped pixels or of
SD-VAE latents.

    plan.json                  what is encoded, from the first moment on
    shard-00000.safetensors    a shard, and after it
    shard-00000.json           its row of the index, with its hash: a shard without is not finished
    preview.png                of latents: images beside what the VAE makes of their latents
    index.json                 all of it, last; plan and rows go then

A shard is a stretch of the folder's images, made by one process, whole or not at all. Nothing else
decides its bytes, so any number of processes, killed at any moment and started again, end with the
same set."""

import ours

import contextlib
import functools
import hashlib
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
import downloads
import parallel
import pictures
import storage
import vae
from storage import UserError, read_json, sha256, write_json, writing

# about as many as there are, unless told otherwise: a kill costs each process a part of one
SHARDS = 128
MOST_SHARDS = 512  # a reader holds one file descriptor for each
PREVIEW = 4  # images in preview.png


def encode(
    source,
    out,
    res,
    pixels=False,
    vae_weights="sd-vae-ft-ema",
    channels=None,
    exif=False,
    on_bad="error",
    batch_size=32,
    shard_size=None,
    precision=None,
    device="auto",
    workers=None,
    quiet=False,
):
    """Encode image folder `source`, cropped to `res`, into the shard set `out`, or go on with it.

    `pixels`: store the crops (`channels` 1 or 3, None to look), else the latents of image and flip
    that the VAE gives whose weights have that name or path. `on_bad` "skip" leaves unreadable
    images out. `shard_size` None makes about SHARDS. Latents depend on `batch_size` (on CUDA),
    `precision` and the kind of device, pixels on none of them. Returns a summary dict. Raises
    UserError; a disk too small or another set in `out` before anything is written."""
    begun, out = time.monotonic(), Path(out)
    device = torch.device("cpu") if pixels else parallel.pick_device(device)
    parallel.start(torch.device("cpu"), minutes=60 * 24 * 30)  # they only meet here and at the end
    with contextlib.ExitStack() as stack:
        stack.callback(
            torch.set_num_threads, torch.get_num_threads()
        )  # which Coder's threads change for all
        folder = plan = None
        if parallel.is_main():
            _check_folders(Path(source), out)
            folder = dataset.ImageFolder(source, res, channels if pixels else 3, exif)
            plan = _plan(folder, res, exif, shard_size)
            if not pixels:
                _plan_latents(plan, vae_weights, batch_size, precision, device)
            stack.enter_context(storage.locked(out))
            _begin(out, plan)
        folder, plan = parallel.broadcast((folder, plan))
        rank, world, shards = parallel.rank(), parallel.world_size(), _shards(plan)

        bar = functools.partial(
            tqdm, disable=quiet or rank > 0, mininterval=0.5 if sys.stderr.isatty() else 30
        )
        rows = sorted(_rows(out).items())[rank::world]
        whole = {
            k
            for k, row in bar(rows, desc="checking", unit="shard", leave=False)
            if _is_whole(out, row)
        }
        whole = set().union(*parallel.gather(whole))
        todo = [k for k in range(len(shards)) if k not in whole]
        if parallel.is_main():
            line = _check_space(out, plan, todo)
            if not quiet:
                tqdm.write(line, file=sys.stderr)
        parallel.barrier()

        mine = todo[rank::world]
        coder = None if pixels or not todo else Coder(_load_vae(plan, device), batch_size)
        about = f"{out.name}, process 1 of {world}" if world > 1 else out.name
        with bar(total=sum(len(shards[k]) for k in mine), unit="img", desc=about) as progress:
            _encode(out, folder, plan, mine, coder, workers, on_bad, batch_size, progress)
        parallel.barrier()
        if parallel.is_main():
            if todo or not (out / "index.json").is_file():
                _finish(
                    out, folder, plan, coder or pixels or Coder(_load_vae(plan, device), batch_size)
                )
            _remove(out, "plan.json", "shard-*.json", ".lock")
        parallel.barrier()
    index, done = read_json(out / "index.json"), sum(len(shards[k]) for k in todo)
    seconds = time.monotonic() - begun
    return {
        "out": str(out),
        "kind": index["kind"],
        "size": index["size"],
        "channels": index["channels"],
        "classes": len(index["classes"]),
        "items": index["items"],
        "shards": len(index["shards"]),
        "bytes": sum((out / row["file"]).stat().st_size for row in index["shards"]),
        "skipped": index["skipped"],
        "encoded_shards": len(todo),
        "encoded_images": done,
        "seconds": round(seconds, 2),
        "images_per_second": round(done / seconds, 2),
        "processes": world,
    }


def verify(out, quiet=False):
    """Compare every shard of a finished set with its hash. Returns a dict whose `damaged` names
    what does not agree."""
    out = Path(out)
    index, damaged = dataset.read_index(out), []
    for row in tqdm(index["shards"], desc="verifying", unit="shard", disable=quiet):
        path = out / row["file"]
        if not path.is_file():
            damaged.append(f"{path} is missing")
        elif sha256(path) != row["sha256"]:
            damaged.append(f"{path} does not have the recorded hash")
    return {
        "out": str(out),
        "items": index["items"],
        "shards": len(index["shards"]),
        "damaged": damaged,
    }


# The plan


def _check_folders(source, out):
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--out {out} lies in the images' folder {source}; choose a folder outside it"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a new or empty folder")
    there = sorted(path.name for path in out.glob("[!.]*"))
    if there and not {"plan.json", "index.json"} & set(there):
        raise UserError(f"--out {out} holds other files ({there[0]}); choose a new or empty folder")


def _plan(folder, res, exif, shard_size):
    """What index.json will say, as far as it is known before the start."""
    items = len(folder)
    shard_size = shard_size or 64 * -(-items // (64 * SHARDS))
    if items > shard_size * MOST_SHARDS:
        raise UserError(
            f"--shard-size {shard_size} makes more than {MOST_SHARDS} shards of {items:,} images; "
            f"use {-(-items // MOST_SHARDS):,} or more"
        )
    return {
        "format": dataset.FORMAT,
        "kind": "pixels",
        "size": res,
        "channels": folder.channels,
        "classes": folder.classes,
        "source": {"items": items, "fingerprint": folder.fingerprint},
        "shard_size": shard_size,
        "options": {"res": res, "exif": exif, "crop": "adm"},
    }


def _plan_latents(plan, name, batch_size, precision, device):
    res = plan["size"]
    if res % vae.DOWN:
        raise UserError(
            f"--res {res}: the VAE takes multiples of {vae.DOWN}; use "
            f"{max(1, res // vae.DOWN) * vae.DOWN}"
        )
    path = downloads.find(name)
    if not path.is_file():
        raise UserError(
            f"--vae {name} is a folder; expected a file of SD-VAE weights (.safetensors, "
            ".ckpt, .pth)"
        )
    name = name if name in downloads.ASSETS else str(path.resolve())
    plan |= {"kind": "latents", "size": res // vae.DOWN, "channels": vae.CHANNELS}
    plan |= {"vae": name, "vae_sha256": sha256(path), "scale": vae.SCALE}
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    plan["options"] |= {"precision": precision, "batch_size": batch_size, "device": device.type}


def _shards(plan):
    """The stretch of the folder's images, as a range, that each shard holds."""
    items, size = plan["source"]["items"], plan["shard_size"]
    return [range(first, min(first + size, items)) for first in range(0, items, size)]


def _begin(out, plan):
    """Note the plan in `out`, or find the same one there."""
    names = (name for name in ("index.json", "plan.json") if (out / name).is_file())
    before = next((dataset.read_index(out, name) for name in names), None)

    def flat(plan):
        return {"kind": plan["kind"], **plan["options"], **plan["source"], **plan}

    if before and not _rows(out):  # nothing is lost by starting over
        _remove(out, "plan.json", "shard-*", "preview.png")
        before = None
    if before:
        old, new = flat(before), flat(plan)
        for name in new:
            if old.get(name) != new[name] and name not in (
                "options",
                "source",
                "items",
                "classes",
                "vae",
            ):
                what = (
                    "other images"
                    if name == "fingerprint"
                    else f"{name} {old.get(name)}, not {new[name]}"
                )
                raise UserError(
                    f"{out} was begun with {what}; give what it had, choose another "
                    "--out, or delete it"
                )
    else:
        write_json(out / "plan.json", plan)


def _check_space(out, plan, todo):
    """Raise UserError if what is left to write does not fit, else say in a line what there is to
    do."""
    per_item = plan["size"] ** 2 * plan["channels"] * (1 if plan["kind"] == "pixels" else 8) + 8
    shards = _shards(plan)
    need = sum(len(shards[k]) * per_item + dataset.HEADER for k in todo)
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"{out} needs {_size(need)}, its disk has {_size(free)} free; free some or "
            "give another --out"
        )
    count = f"{len(todo)} of {len(shards)}" if len(todo) < len(shards) else len(shards)
    return (
        f"{plan['source']['items']:,} images; {count} shards to write, {_size(need)}, "
        f"with {_size(free)} free"
    )


def _size(count):
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count:,} bytes"


# Shards


def _rows(out):
    """Rows of the index by shard number: file, count, sha256, skipped."""
    rows = {}
    if (out / "index.json").is_file():
        index = read_json(out / "index.json")
        for k, row in enumerate(index["shards"]):
            rows[k] = {
                **row,
                "skipped": [s for s in index["skipped"] if s["item"] // index["shard_size"] == k],
            }
    for path in out.glob("shard-*.json"):
        with contextlib.suppress(UserError):  # a damaged row is a shard to do again
            rows[int(path.stem.removeprefix("shard-"))] = read_json(path)
    return rows


def _is_whole(out, row):
    return (out / row["file"]).is_file() and sha256(out / row["file"]) == row["sha256"]


def _encode(out, folder, plan, numbers, coder, workers, on_bad, batch_size, progress):
    """Write the shards of these numbers and their rows."""
    shards = _shards(plan)

    def chunks(k):
        return (shards[k][i : i + batch_size] for i in range(0, len(shards[k]), batch_size))

    steps = (
        (np.asarray(items), np.zeros(len(items), bool)) for k in numbers for items in chunks(k)
    )
    pin = coder is not None and coder.device.type == "cuda"
    batches = dataset.loader(folder, steps, workers, "drop" if on_bad == "skip" else "error", pin)

    def contents(k):
        for items in chunks(k):
            images, labels, bad = next(batches)
            for message in bad:
                item = next(i for i in items if message.startswith(f"{folder.paths[i]}: "))
                reason = message.removeprefix(f"{folder.paths[item]}: ")
                skipped.append({"item": item, "image": folder.paths.name(item), "reason": reason})
            progress.update(len(items))
            if not len(images):
                continue
            data = coder.encode(images) if coder else images.permute(0, 2, 3, 1).contiguous()
            if coder and not data.isfinite().all():
                where = f"{folder.paths[items[0]]} … {folder.paths[items[-1]]}"
                raise UserError(
                    f"latents beyond half precision among {where}; are {plan['vae']} the "
                    "right weights?"
                )
            yield data.numpy(), labels.numpy()

    for k in numbers:
        skipped, path = [], out / f"shard-{k:05}.safetensors"
        count, digest = _write_shard(path, plan, contents(k))
        write_json(
            path.with_suffix(".json"),
            {"file": path.name, "count": count, "sha256": digest, "skipped": skipped},
        )


def _write_shard(path, plan, batches):
    """Write (data, labels) pairs as one shard. Returns its count of items and the file's hash."""
    labels = [np.empty(0, np.int64)]
    with writing(path, "w+b") as file:
        file.write(bytes(dataset.HEADER))
        for data, numbers in batches:
            file.write(data)
            labels.append(numbers)
        file.write(np.concatenate(labels))
        count = sum(map(len, labels))
        file.seek(0)
        file.write(dataset.shard_header(plan["kind"], (count, *dataset.item_shape(plan))))
        file.seek(0)
        return count, hashlib.file_digest(file, "sha256").hexdigest()


class Coder:
    """The VAE on uint8 images (B, 3, H, W). The shape that is computed never changes, nor then
    which kernels are chosen and how they round: on a CPU every image is one thread's, as many at
    once as PyTorch has threads; elsewhere a batch is filled up to `batch_size`."""

    def __init__(self, model, batch_size):
        self.model, self.batch_size = model, batch_size
        self.device = next(model.parameters()).device
        threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        self.pool = threads and ThreadPoolExecutor(
            threads, initializer=torch.set_num_threads, initargs=(1,)
        )

    def encode(self, images):
        """Latents float16 (B, 2, 2, 4, h, w): of image and flip, mean and log-variance."""
        return self._run(self._encode, images)

    def decode(self, mean):
        """Images of latent means (B, 4, h, w)."""
        return self._run(self._decode, mean)

    def _run(self, function, batch):
        if self.pool:
            return torch.cat(list(self.pool.map(torch.inference_mode(function), batch.split(1))))
        full = F.pad(batch, (0,) * 7 + (self.batch_size - len(batch),)).to(
            self.device, non_blocking=True
        )
        with (
            torch.inference_mode(),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            return function(full)[: len(batch)].cpu()

    def _encode(self, images):
        x = images.float() / 127.5 - 1
        both = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)
        return torch.stack(self.model.encode(both), 1).unflatten(0, (-1, 2)).half()

    def _decode(self, mean):
        return ((self.model.decode(mean).clamp(-1, 1) + 1) * 127.5).round().byte()


# The end


def _load_vae(plan, device):
    path = downloads.find(plan["vae"])
    if sha256(path) != plan["vae_sha256"]:
        raise UserError(
            f"{path} is not the VAE that {plan['vae']} was at the start; use one file "
            "for all processes"
        )
    try:
        model = vae.load(path, device)
    except ValueError as error:
        raise UserError(f"{error}; choose another --vae") from None
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[plan["options"]["precision"]])


def _finish(out, folder, plan, coder):
    """Write the preview, then the index."""
    rows = [row for _, row in sorted(_rows(out).items())]
    skipped = [entry for row in rows for entry in row.pop("skipped")]
    items = sum(row["count"] for row in rows)
    if not items:
        first = f"{skipped[0]['image']}: {skipped[0]['reason']}"
        raise UserError(f"{folder.root} holds no readable image; the first: {first}")
    labels = np.concatenate([dataset.map_shard(out / row["file"])[1] for row in rows])
    index = {
        **plan,
        "items": items,
        "counts": np.bincount(labels, minlength=len(plan["classes"])).tolist(),
        "skipped": skipped,
        "shards": rows,
    }
    if plan["kind"] == "latents":
        pictures.save(_preview(out, folder, index, coder), out / "preview.png")
    write_json(out / "index.json", index)


def _preview(out, folder, index, coder):
    """A PIL image: PREVIEW images, evenly spaced over the set, each followed by its decoded latent
    mean."""
    stored = np.delete(np.arange(len(folder)), [entry["item"] for entry in index["skipped"]])
    starts = np.cumsum([0] + [row["count"] for row in index["shards"]])
    pairs = []
    for position in np.linspace(0, len(stored) - 1, min(PREVIEW, len(stored))).astype(int):
        shard = np.searchsorted(starts, position, "right") - 1
        data, _ = dataset.map_shard(out / index["shards"][shard]["file"])
        mean = torch.from_numpy(data[position - starts[shard], 0, 0].astype(np.float32))
        pairs += [
            folder.read(stored[position]),
            coder.decode(mean[None])[0].permute(1, 2, 0).numpy(),
        ]
    return pictures.grid(pairs, columns=4)


def _remove(out, *patterns):
    for pattern in patterns:
        for path in out.glob(pattern):
            path.unlink()
