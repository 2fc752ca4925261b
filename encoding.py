"""`dimr encode`: images in a folder or container become a shard set (shards.py), of cropped pixels
or of SD-VAE latents, whose preview.png shows images beside what the VAE makes of their latents.

A shard is a stretch of the folder's images, made by one process, whole or not at all. Nothing else
decides its bytes, so any number of processes, killed at any moment and started again, end with the
same set."""

import ours

import contextlib
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Sequence
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
import shards
import space
import storage
import vae
from storage import UserError, sha256, write_json

SHARDS = 128  # about as many, unless told otherwise: a kill costs each process a part of one
MOST_SHARDS = 512  # a reader holds one file descriptor for each
PREVIEW = 4  # images in preview.png
OURS = re.compile(r"shard-\d{5}\.(safetensors|json)|preview\.png")  # what lies in a set's folder
FOREVER = 60 * 24 * 30  # minutes: processes only meet at the start and at the end
SAMPLED = 256  # latents that others made whose statistics are looked at
# of sd-vae-ft-mse's latents of ImageNet, by channel: as IMM's im256_generate_images.yaml
# (arXiv:2503.07565) has them, and EDM2's training/encoders.py, where pixels are in [0, 1]
MEANS = np.asarray([0.86, -0.28, 0.22, 0.37])
MEANS_OF_EDM2 = np.asarray([5.81, 3.25, 0.12, -2.15])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Job:
    """One encode, the same for all its processes. `plan` is what index.json will say, as far as it
    is known before the start."""

    out: Path
    folder: dataset.Listed
    plan: dict
    batch_size: int
    on_bad: str
    workers: int | None

    @functools.cached_property
    def stretches(self):
        """The folder's images that each shard holds, as ranges."""
        items = self.plan["source"]["items"]
        size = self.plan["shard_size"]
        return [range(first, min(first + size, items)) for first in range(0, items, size)]

    def batches(self, number):
        """The images of shard `number` in ranges of up to `batch_size`."""
        stretch = self.stretches[number]
        return [stretch[i : i + self.batch_size] for i in range(0, len(stretch), self.batch_size)]

    def images(self, numbers):
        """How many images the shards of these numbers hold."""
        return sum(len(self.stretches[number]) for number in numbers)


def encode(
    source: str | Path,
    out: str | Path,
    res: int | None = None,
    *,
    pixels: bool = False,
    from_latents: bool = False,
    classes: Sequence[str] | None = None,
    vae_weights: str | Path = "sd-vae-ft-ema",
    channels: int | None = None,
    exif: bool = False,
    on_bad: str = "error",
    batch_size: int = 32,
    shard_size: int | None = None,
    precision: str = "fp32",
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
) -> dict:
    """Encode the images in `source`, of these `classes` alone unless None, cropped to `res`, into
    the shard set `out`, or go on with it.

    `from_latents`: take latents in EDM2's form, of images of `res` if that is given. `pixels`:
    store the crops (`channels` 1 or 3, None to look). Else make the latents of image and flip, with
    the VAE whose weights have that name or path. `on_bad` "skip" leaves unreadable images out.
    `shard_size` None makes about SHARDS. Latents depend on `batch_size` (on CUDA), `precision` and
    the kind of device, pixels on none of them. Returns a summary dict. Raises UserError; a disk too
    small or another set in `out` before anything is written."""
    begun = time.monotonic()
    out = Path(out)
    makes_latents = not (pixels or from_latents)
    device = parallel.pick_device(device) if makes_latents else torch.device("cpu")
    parallel.start(torch.device("cpu"), minutes=FOREVER)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())  # Coder changes it
        job = None
        if parallel.is_main():
            _check_folders(Path(source), out)
            if from_latents:
                folder = _take_latents(source, classes, on_bad, quiet)
            else:
                channels = channels if pixels else 3
                folder = dataset.Images(source, res, channels, exif=exif, classes=classes)
            plan = _plan(folder, shard_size)
            if from_latents:
                plan = _taken_plan(plan, res, vae_weights)
            elif makes_latents:
                how = {"precision": precision, "batch_size": batch_size, "device": device.type}
                plan = _latent_plan(plan, vae_weights, how)
            job = Job(out, folder, plan, batch_size, on_bad, workers)
            stack.enter_context(storage.locked(out))
            _begin(out, plan)
        job = parallel.broadcast(job)

        todo, mine = parallel.divide(len(job.stretches), lambda: _finished(job, quiet))
        if parallel.is_main():
            _check_room(job, todo, quiet)
        parallel.barrier()  # nobody writes before that
        unfinished = bool(todo) or not _has_index(job)
        coder = None
        if unfinished and makes_latents:
            coder = Coder(_load_vae(job.plan, device), batch_size)
        _write_shards(job, mine, coder, quiet)
        parallel.barrier()

        if parallel.is_main():
            if unfinished:
                _finish(job, coder, quiet)
            _remove(out, "plan.json", shards.ROW, ".lock")
        parallel.barrier()
    return _summary(job, todo, time.monotonic() - begun)


def verify(out: str | Path, quiet: bool = False) -> dict:
    """Compare every shard of a finished set with its hash. Returns a dict whose `damaged` names
    what does not agree."""
    out = Path(out)
    index = shards.read_index(out)
    damaged = shards.damaged_shards(out, index, quiet)
    return {
        "out": str(out),
        "items": sum(row["count"] for row in index["shards"]),
        "shards": len(index["shards"]),
        "damaged": damaged,
    }


def _summary(job, todo, seconds):
    index = shards.read_encoded(job.out)
    done = job.images(todo)
    return {
        "out": str(job.out),
        "kind": index["kind"],
        "size": index["size"],
        "channels": index["channels"],
        "classes": len(index["classes"]),
        "items": index["items"],
        "shards": len(index["shards"]),
        "bytes": sum((job.out / row["file"]).stat().st_size for row in index["shards"]),
        "skipped": index["skipped"],
        "encoded_shards": len(todo),
        "encoded_images": done,
        "seconds": round(seconds, 2),
        "images_per_second": round(done / seconds, 2),
        "processes": parallel.world_size(),
    }


# --------------------------------------------------------------------------------------- the plan


def _check_folders(source, out):
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"--out {out} lies in the images' folder {source}; choose a folder outside it"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a new or empty folder")
    if shards.is_set(out):
        return
    there = sorted(path.name for path in out.glob("[!.]*") if not OURS.fullmatch(path.name))
    if there:
        raise UserError(f"--out {out} holds other files ({there[0]}); choose a new or empty folder")


def _plan(folder, shard_size):
    """What the index of the folder's pixels will say, as far as it is known before the start."""
    items = len(folder)
    if shard_size is None:
        shard_size = 64 * _ratio_up(items, 64 * SHARDS)
    if items > shard_size * MOST_SHARDS:
        raise UserError(
            f"--shard-size {shard_size} makes more than {MOST_SHARDS} shards of {items:,} images; "
            f"use {_ratio_up(items, MOST_SHARDS):,} or more"
        )
    return {
        "format": shards.FORMAT,
        "kind": folder.kind,
        "size": folder.size,
        "channels": folder.channels,
        "classes": folder.classes,
        "source": {
            "items": items,
            "fingerprint": folder.fingerprint,
            "sample": folder.sample,
        },
        "shard_size": shard_size,
        "options": _options(folder),
    }


def _options(folder):
    if folder.kind == "latents":
        return {"res": folder.size * vae.DOWN, "from": "latents"}
    return {"res": folder.size, "exif": folder.exif, "crop": "adm"}


def _ratio_up(a, b):
    return -(-a // b)


def _latent_plan(plan, vae_weights, how):
    """The same for the latents of these pixels; `how` says how they are made."""
    res = plan["size"]
    if res % vae.DOWN:
        fitting = max(1, res // vae.DOWN) * vae.DOWN
        raise UserError(f"--res {res}: the VAE takes multiples of {vae.DOWN}; use {fitting}")
    path = downloads.find(vae_weights)
    if not path.is_file():
        raise UserError(
            f"--vae {vae_weights} is a folder; expected a file of SD-VAE weights (.safetensors, "
            ".ckpt, .pth)"
        )
    return {
        **plan,
        "kind": "latents",
        "size": res // vae.DOWN,
        "channels": vae.CHANNELS,
        "options": plan["options"] | how,
        "vae": vae_weights if vae_weights in downloads.ASSETS else str(path.resolve()),
        "vae_sha256": sha256(path),
        "scale": vae.SCALE,
    }


def _taken_plan(plan, res, vae_weights):
    """The same for latents that others made. `res` is what they should be of, or None."""
    found = plan["options"]["res"]
    if res not in (None, found):
        raise UserError(f"these latents are of images of {found}, not {res}; leave --res out")
    if vae_weights not in downloads.ASSETS:
        vae_weights = str(downloads.find(vae_weights).resolve())
    return {**plan, "flips": False, "vae": vae_weights, "vae_sha256": None, "scale": vae.SCALE}


def _take_latents(source, classes, on_bad, quiet):
    """The latents that others made in `source`; says the means of their channels, by a sample.
    Raises UserError if they are EDM2's, of pixels in [0, 1]."""
    folder = dataset.LatentFiles(source, classes)
    means = _channel_means(folder, on_bad)
    text = ", ".join(f"{value:.2f}" for value in means)
    usual = ", ".join(f"{value:.2f}" for value in MEANS)
    if np.abs(means - MEANS_OF_EDM2).max() < 1:
        raise UserError(
            f"{folder.root} holds latents of pixels in [0, 1], as EDM2 makes them: their channels' "
            f"means are {text}, and no model here can use them (ImageNet's in [-1, 1]: {usual}); "
            "encode the images"
        )
    line = f"means of the latents' channels: {text} (ImageNet's: {usual})"
    if np.linalg.norm(means - MEANS_OF_EDM2) < np.linalg.norm(means - MEANS):
        line += (
            "; WARNING: they are nearer to those of pixels in [0, 1], which no model here can use"
        )
    if not quiet:
        tqdm.write(line, file=sys.stderr)
    return folder


def _channel_means(folder, on_bad):
    """Means (C,) of up to SAMPLED of these latents, evenly spaced."""
    found = []
    for index in np.linspace(0, len(folder) - 1, min(SAMPLED, len(folder))).astype(int):
        try:
            means = folder.moments(index)[: folder.channels].mean((1, 2))
        except dataset.BadImage:
            if on_bad == "error":
                raise
            continue
        if np.isfinite(means).all():
            found.append(means)
    if not found:
        raise UserError(f"{folder.root}: none of {SAMPLED} latents can be read; make them again")
    return np.mean(found, 0)


def _begin(out, plan):
    """Note the plan in `out`, or find the same one there."""
    before = None
    if (out / "index.json").is_file():
        before = shards.read_encoded(out)
    elif (out / "plan.json").is_file():
        before = shards.read_encoded(out, "plan.json")
    if before and not shards.read_rows(out):  # nothing is lost by starting over
        _remove(out, "plan.json", "shard-*", "preview.png")
        before = None
    if before:
        _check_same(out, _fixed(before), _fixed(plan))
    else:
        _remove(out, shards.ROW)  # of a set whose plan is gone
        write_json(out / "plan.json", plan)


def _fixed(plan):
    """What has to be the same for an encode to go on, the most telling first. Classes and their
    images are behind the fingerprint; a VAE may lie elsewhere, its hash may not change."""
    source = plan["source"]
    images = {"fingerprint": source["fingerprint"], "sample": source.get("sample")}
    fixed = {"kind": plan["kind"], **plan["options"], **images, **plan}
    for name in ("options", "source", "classes", "vae"):
        fixed.pop(name, None)
    return fixed


def _check_same(out, old, new):
    for name, value in new.items():
        if old.get(name) == value:
            continue
        if name == "sample" and old[name] is None:  # before 0.2
            continue
        what = f"{name} {old.get(name)}, not {value}"
        if name == "fingerprint":
            what = "other images"
        if name == "sample":
            what = "other images (of the same names and sizes)"
        raise UserError(
            f"{out} was begun with {what}; give what it had, choose another --out, or delete it"
        )


def _check_room(job, todo, quiet):
    """Say in a line what there is to do. Raises UserError if it does not fit."""
    need = job.images(todo) * shards.item_bytes(job.plan) + len(todo) * shards.HEADER
    free = storage.check_room(job.out, need, f"encoding {job.images(todo):,} images")
    at_once = max(map(len, job.batches(0)), default=0)
    parallel.check_memory(
        at_once * job.folder.item_bytes,
        f"reading {at_once:,} {job.folder.noun} at once",
        "give a smaller --batch-size",
        torch.device("cpu"),
    )
    count = str(len(job.stretches))
    if len(todo) < len(job.stretches):
        count = f"{len(todo)} of {count}"
    if not quiet:
        tqdm.write(job.folder.words, file=sys.stderr)
        tqdm.write(
            f"{len(job.folder):,} {job.folder.noun}; {count} shards to write, "
            f"{storage.size_text(need)}, with {storage.size_text(free)} free",
            file=sys.stderr,
        )


# ------------------------------------------------------------------------------------- the shards


def _finished(job, quiet):
    """Numbers of the shards that are there and whole; the processes share the reading."""
    world = parallel.world_size()
    rows = sorted(shards.read_rows(job.out).items())[parallel.rank() :: world]
    whole = set()
    for number, row in _bar(quiet, iterable=rows, desc="checking", unit="shard", leave=False):
        if _is_of(job, number, row) and shards.is_whole(job.out, row):
            whole.add(number)
    return set().union(*parallel.gather(whole))


def _is_of(job, number, row):
    """Whether a shard's row tells of all the images that are to be in it."""
    if number >= len(job.stretches) or row["file"] != shards.shard_path("", number).name:
        return False
    stretch = job.stretches[number]
    skipped = [entry["item"] for entry in row["skipped"]]
    if row["count"] + len(skipped) != len(stretch) or skipped != sorted(set(skipped)):
        return False
    for entry in row["skipped"]:
        if entry["item"] not in stretch or entry["image"] != job.folder.name(entry["item"]):
            return False
    return True


def _has_index(job):
    """Whether the index of a set whose shards are whole is there. One that says anything else than
    they do is damaged, and written anew from them."""
    if not (job.out / "index.json").is_file():
        return False
    found = shards.read_encoded(job.out)
    made = shards.make_index(job.out, job.plan, _rows(job))
    derived = ("classes", "items", "counts", "skipped", "shards")
    mended = {**found, **{name: made[name] for name in derived}}
    mended["source"] = dict(made["source"])
    if found["source"].keys() == made["source"].keys() - {"sample"}:
        del mended["source"]["sample"]  # as 0.1 wrote it
    if mended != found and parallel.is_main():
        wrong = ", ".join(name for name in mended if mended[name] != found[name])
        tqdm.write(
            f"{job.out / 'index.json'} was damaged ({wrong}) and is written anew from the shards",
            file=sys.stderr,
        )
        write_json(job.out / "index.json", mended)
    return True


def _rows(job):
    """The rows of all shards, in order."""
    found = shards.read_rows(job.out)
    return [found[number] for number in range(len(job.stretches))]


def _bar(quiet, **options):
    """The first process's bar, seldom redrawn where its lines are kept."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(disable=quiet or not parallel.is_main(), mininterval=interval, **options)


def _write_shards(job, numbers, coder, quiet):
    """Write the shards of these numbers and their rows. `coder` is what makes latents of images, or
    None."""
    title = job.out.name
    if parallel.world_size() > 1:
        title += f", process 1 of {parallel.world_size()}"
    with _bar(quiet, total=job.images(numbers), unit="img", desc=title) as bar:
        read = _read(job, numbers, pin=coder is not None and coder.device.type == "cuda")

        def contents(number, skipped):
            """Yield data and labels batch by batch, and note in `skipped` what is left out."""
            for items in job.batches(number):
                images, labels, bad = next(read)
                skipped.extend(_skipped(job.folder, items, bad))
                bar.update(len(items))
                if len(images) == 0:
                    continue
                if job.plan["kind"] == "pixels":
                    data = images.permute(0, 2, 3, 1)
                elif coder is None:
                    data = images
                else:
                    data = coder.encode(images)
                    _check_finite(data, job, items)
                yield data.numpy(), labels.numpy()

        for number in numbers:
            skipped = []
            path = shards.shard_path(job.out, number)
            row = shards.write_shard(path, job.plan, contents(number, skipped))
            shards.write_row(job.out, number, {**row, "skipped": skipped})


def _read(job, numbers, pin):
    """(images, labels, bad) of one batch after another of these shards, read ahead."""

    def steps():
        for number in numbers:
            for items in job.batches(number):
                yield np.asarray(items), np.zeros(len(items), bool)

    on_bad = "drop" if job.on_bad == "skip" else "error"
    batches = dataset.loader(job.folder, steps(), job.workers, on_bad=on_bad, pin=pin)
    return dataset.naming_the_way_out(batches)


def _skipped(folder, items, bad):
    """The index's entries for messages about unreadable ones of these images, which come in the
    images' order."""
    entries = []
    items = iter(items)
    for message in bad:
        item = next(i for i in items if message.startswith(f"{folder.place(i)}: "))
        reason = message.removeprefix(f"{folder.place(item)}: ")
        entries.append({"item": item, "image": folder.name(item), "reason": reason})
    return entries


def _check_finite(data, job, items):
    if not data.isfinite().all():
        raise UserError(
            f"latents beyond half precision among {job.folder.place(items[0])} … "
            f"{job.folder.place(items[-1])}; are {job.plan['vae']} the right weights?"
        )


class Coder:
    """The VAE on uint8 images (B, 3, H, W). The shape that is computed never changes, nor then
    which kernels are chosen and how they round: on a CPU every image is one thread's, as many at
    once as PyTorch has threads; elsewhere a batch is filled up to `batch_size`."""

    def __init__(self, model: vae.VAE, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        self.pool = None
        if self.device.type == "cpu":
            self.pool = ThreadPoolExecutor(
                torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)
            )

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents float16 (B, 2, 2, 4, h, w): of image and flip, mean and log-variance."""
        return self._run(self._encode, images)

    def decode(self, mean: torch.Tensor) -> torch.Tensor:
        """Images uint8 (B, H, W, 3) of latent means (B, 4, h, w)."""
        return self._run(self._decode, mean)

    def _run(self, function, batch):
        if self.pool:
            return torch.cat(list(self.pool.map(torch.inference_mode(function), batch.split(1))))
        missing = self.batch_size - len(batch)
        full = F.pad(batch, (0, 0, 0, 0, 0, 0, 0, missing)).to(self.device, non_blocking=True)
        same = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), same:
            return function(full)[: len(batch)].cpu()

    def _encode(self, images):
        x = space.from_uint8(images)
        both = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)
        moments = torch.stack(self.model.encode(both), 1)  # (2B, 2, 4, h, w)
        return moments.unflatten(0, (-1, 2)).half()

    def _decode(self, mean):
        return torch.from_numpy(space.to_uint8(self.model.decode(mean)))


def _load_vae(plan, device):
    path = downloads.find(plan["vae"])
    if sha256(path) != plan["vae_sha256"]:
        raise UserError(
            f"{path} is not the VAE that {plan['vae']} was at the start; use one file "
            "for all processes"
        )
    return _load_weights(path, device, DTYPES[plan["options"]["precision"]])


def _load_weights(path, device, dtype):
    try:
        return vae.load(path, device, dtype)
    except ValueError as error:
        raise UserError(f"{error}; choose another --vae") from None


# ---------------------------------------------------------------------------------------- the end


def _finish(job, coder, quiet):
    """Write the preview of latents, then the index."""
    rows = _rows(job)
    skipped = [entry for row in rows for entry in row["skipped"]]
    if not any(row["count"] for row in rows):
        first = skipped[0]
        raise UserError(
            f"{job.folder.root} holds no readable image; the first: {first['image']}: "
            f"{first['reason']}"
        )
    if job.plan["kind"] == "latents":
        _write_preview(job, rows, skipped, coder or _decoder(job.plan, quiet))
    shards.write_index(job.out, job.plan, rows)


def _decoder(plan, quiet):
    """A Coder for latents that others made, if its VAE is at hand, else None."""
    path = Path(plan["vae"])
    if plan["vae"] in downloads.ASSETS:
        path = downloads.place(plan["vae"])
    if path.is_file():
        model = _load_weights(path, torch.device("cpu"), torch.float32)
        return Coder(model, batch_size=1)
    if not quiet:
        tqdm.write(
            f"no preview.png: {plan['vae']} is not here (dimr weights get {plan['vae']})",
            file=sys.stderr,
        )
    return None


def _write_preview(job, rows, skipped, coder):
    """Draw PREVIEW images, evenly spaced over the set, each followed by its decoded latent mean, or
    these alone if the images are not here. Does nothing without a coder."""
    if coder is None:
        return
    stored = np.delete(np.arange(len(job.folder)), [entry["item"] for entry in skipped])
    starts = np.cumsum([0, *(row["count"] for row in rows)])
    tiles = []
    for position in np.linspace(0, len(stored) - 1, min(PREVIEW, len(stored))).astype(int):
        shard = np.searchsorted(starts, position, "right") - 1
        data, _ = shards.map_shard(job.out / rows[shard]["file"])
        mean = torch.from_numpy(data[position - starts[shard], 0, 0].astype(np.float32))
        decoded = coder.decode(mean[None])[0]
        if job.folder.kind == "pixels":
            tiles.append(job.folder.read(stored[position]))
        tiles.append(decoded.numpy())
    pictures.save(pictures.grid(tiles, columns=4), job.out / "preview.png")


def _remove(out, *patterns):
    for pattern in patterns:
        for path in out.glob(pattern):
            path.unlink()
