"""Fuzz: mutates every format that the tool reads, through its command line, and says what came of
it.

    python tools/fuzz.py --count 2000                 # mutations of each format; counts as JSON
    python tools/fuzz.py --format manifest --seed 3 --first 17 --count 1      # one of them again
    python tools/fuzz.py --seconds 60

Each mutation changes one file of a small world (bytes, structure, types, sizes, the file itself)
and gives it to a command in this process. What may come of it:

    fine        the same as without the mutation
    line        refused in one clear line
    told        something else, and a line says so (an older checkpoint, a shard redone)
    other       something else, silently: a fault where the format has a hash or checksum, and where
                it has none no more than a number that nobody can know (docs/promises.md lists them)
    traceback, hang, memory     faults

A new file format is a new row of FORMATS."""

import argparse
import collections
import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import ours  # noqa: E402, F401

import numpy as np  # noqa: E402
import torch  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from PIL import Image  # noqa: E402

import cli  # noqa: E402
import imagesets  # noqa: E402
import runfolder  # noqa: E402
import storage  # noqa: E402
import vae  # noqa: E402
import vit  # noqa: E402

PATIENCE = 10  # seconds of the processor after which a command hangs
WAIT = 60  # and by the clock, where it does nothing
MEMORY = 500 * 2**20  # bytes that a command may take beyond what any has taken before
FAULTS = ("traceback", "hang", "memory")
PLAIN = "--features fuzz:features --device cpu"
TINY = "--variant demo --layers 1,1 --dims 8,8 --heads 1 --warmup 0 --workers 0 --device cpu"


def features(images):
    """What --features takes: a few numbers of each image (N, H, W, 3)."""
    return images.flatten(1)[:, ::7].float()


# ------------------------------------------------------------------------------------ mutations


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes, damaged as disks, networks and people do."""
    if not data:
        return rng.randbytes(rng.randrange(1, 100))
    first = rng.randrange(len(data))
    last = min(len(data), first + rng.choice([1, 1, 2, 4, 8, 100, 1000]))
    kind = rng.randrange(8)
    if kind == 0:
        flipped = data[first] ^ 1 << rng.randrange(8)
        return data[:first] + bytes([flipped]) + data[first + 1 :]
    if kind == 1:
        return data[:first] + rng.randbytes(last - first) + data[last:]
    if kind == 2:
        return data[:first]
    if kind == 3:
        return data + rng.randbytes(rng.choice([1, 8, 1000]))
    if kind == 4:
        return data[:first] + data[last:]
    if kind == 5:
        return data[:last] + data[first:last] + data[last:]
    if kind == 6:
        return data[:first] + bytes(last - first) + data[last:]
    return data[:first] + bytes([rng.choice([0, 1, 127, 128, 255])]) + data[first + 1 :]


STRANGE = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        2**64,
        10**30,
        10**6,
        0.5,
        -0.0,
        1e308,
        float("nan"),
    ),
    *("", "x", "../x", "/etc/passwd", "\n", "\x1b[2J", "\ud800", "\x00", "a" * 5000, "é"),
    *([], {}, [[]], [1, 2], [None], {"x": 1}, "1", "null", "nan", [10**6, 2]),
)


def of_json(value, rng: random.Random):
    """A value with another somewhere in it, or without something, or with it twice."""
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return rng.choice(STRANGE)
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", key + "x", key.upper()])] = holder.pop(key)
    elif kind == 1:
        holder.insert(key, holder[key])
    elif kind == 2:
        elsewhere, there = rng.choice(places)
        holder[key] = json.loads(json.dumps(elsewhere[there]))
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] = rng.choice(
            [holder[key] + 1, -holder[key], holder[key] * 1000, str(holder[key])]
        )
    else:
        holder[key] = rng.choice(STRANGE)
    return value


def _places(value):
    """(holder, key) of everything in a value."""
    pairs = ()
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    for key, inside in pairs:
        yield value, key
        yield from _places(inside)


def as_text(value) -> str:
    return json.dumps(value)


def any_file(path: Path, rng: random.Random):
    path.write_bytes(of_bytes(path.read_bytes(), rng))


def json_file(path: Path, rng: random.Random):
    """A JSON file's value, or its bytes, or brackets without end."""
    kind = rng.random()
    if kind < 0.3:
        path.write_bytes(of_bytes(path.read_bytes(), rng))
    elif kind < 0.33:
        path.write_text(rng.choice(["[", '{"a":']) * rng.choice([100, 100_000]))
    else:
        path.write_text(as_text(of_json(json.loads(path.read_bytes()), rng)))


def json_lines(path: Path, rng: random.Random):
    if rng.random() < 0.4:
        path.write_bytes(of_bytes(path.read_bytes(), rng))
        return
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = as_text(of_json(json.loads(lines[number]), rng))
    path.write_text("\n".join(lines) + "\n")


def tensors_file(path: Path, rng: random.Random):
    """A safetensors file: bytes, its header, or what its metadata say."""
    data = path.read_bytes()
    if rng.random() < 0.4:
        path.write_bytes(of_bytes(data, rng))
        return
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = header.get("__metadata__", {})
    told = [name for name in about if about[name][:1] in '[{"0123456789']
    if told and rng.random() < 0.6:
        name = rng.choice(told)
        text = as_text(of_json([json.loads(about[name])], rng))
        about[name] = text[1:-1] if text.startswith("[") else text
        if rng.random() < 0.05:
            about[name] = "[" * 100_000
    else:
        header = of_json(header, rng)
    text = as_text(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def zip_file(path: Path, rng: random.Random):
    """A zip: bytes, or its members: names, content, how they are packed."""
    if rng.random() < 0.5:
        path.write_bytes(of_bytes(path.read_bytes(), rng))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    kind = rng.randrange(4)
    if kind == 0:
        members[rng.choice(["x", name + "x", "../" + name, name[:-4], "\n"])] = members.pop(name)
    elif kind == 1:
        members.pop(name)
    else:
        members[name] = of_bytes(members[name][:200], rng) + members[name][200:]
    with contextlib.suppress(ValueError), zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            how = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
            archive.writestr(member, content, how)


def tar_file(path: Path, rng: random.Random):
    """A tar: bytes, more often those of a header."""
    data = path.read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(of_bytes(data, rng))
        return
    start = rng.randrange(len(data) // 512) * 512
    path.write_bytes(data[:start] + of_bytes(data[start : start + 512], rng) + data[start + 512 :])


def image_file(path: Path, rng: random.Random):
    """An image: bytes, or what a PNG says of itself."""
    if path.suffix == ".png" and rng.random() < 0.4:
        about = as_text(of_json({"num_classes": 2, "source": "x", "class": 0}, rng))
        with Image.open(path) as image:
            image.load()
        image.save(path, pnginfo=imagesets.png_info({"dimr": about}))
        return
    path.write_bytes(of_bytes(path.read_bytes(), rng))


def pickle_file(path: Path, rng: random.Random):
    """A PyTorch file: bytes, or what is in it: other types, names and shapes."""
    if rng.random() < 0.5:
        path.write_bytes(of_bytes(path.read_bytes(), rng))
        return
    state = torch.load(path, weights_only=True)
    name = rng.choice(sorted(state))
    others = [
        lambda tensor: tensor.to(torch.int64),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.half(),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor * float("nan"),
        lambda tensor: tensor[:-1] if tensor.ndim else tensor[None],
        lambda tensor: tensor.unsqueeze(0),
        lambda tensor: rng.choice([None, 3, "x", [], {"a": tensor}]),
    ]
    kind = rng.randrange(len(others) + 2)
    if kind == len(others):
        state.pop(name)
    elif kind > len(others):
        state[rng.choice([3, "x", name + "x"])] = state.pop(name)
    else:
        state[name] = others[kind](state[name])
    torch.save(state, path)


def table_file(path: Path, rng: random.Random):
    """A CSV: bytes, or a cell."""
    if rng.random() < 0.5:
        path.write_bytes(of_bytes(path.read_bytes(), rng))
        return
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(
        ["", "x", "\x00", "1e9", "-1", '"', "é\n", "a" * 200_000]
    )
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def the_file_itself(path: Path, rng: random.Random):
    """Something else where the file was."""
    content = path.read_bytes()
    path.unlink()
    kind = rng.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.touch()
    elif kind == 4:
        path.write_bytes(content)
        os.truncate(path, 2**28)  # zeros
    elif kind == 5:
        path.symlink_to(rng.choice(["/proc/self/mem", "/dev/null", "/nowhere"]))


# --------------------------------------------------------------------------------------- worlds


def dimr(*words):
    """Run a command that has to succeed."""
    done = CliRunner().invoke(cli.main, [str(word) for word in words])
    if done.exit_code:
        raise RuntimeError(f"{words}: {done.output}") from done.exception


def split(line: str) -> list[str]:
    return line.split()


def make_pictures(folder: Path, ending="png", count=8):
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def pictures(w):
    make_pictures(w / "pictures")


def jpegs(w):
    make_pictures(w / "pictures", "jpg")


def zipped(w):
    make_pictures(w / "pictures")
    with zipfile.ZipFile(w / "pictures.zip", "w") as archive:
        for path in sorted((w / "pictures").rglob("*.png")):
            archive.write(path, path.relative_to(w / "pictures"))
    shutil.rmtree(w / "pictures")


def tarred(w):
    make_pictures(w / "pictures")
    with tarfile.open(w / "pictures.tar", "w") as archive:
        for path in sorted((w / "pictures").rglob("*.png")):
            archive.add(path, path.relative_to(w / "pictures"))
    shutil.rmtree(w / "pictures")


def labelled(w):
    make_pictures(w / "pictures")
    names = sorted(p.relative_to(w / "pictures").as_posix() for p in w.rglob("*.png"))
    labels = {"labels": [[name, i % 2] for i, name in enumerate(names)]}
    (w / "pictures" / "dataset.json").write_text(as_text(labels))


def latents(w):
    (w / "latents").mkdir()
    names = [f"{i}.npy" for i in range(4)]
    for i, name in enumerate(names):
        moments = np.random.default_rng(i).random((8, 4, 4), np.float32) + 0.1
        np.save(w / "latents" / name, moments)
    labels = {"labels": [[name, i % 2] for i, name in enumerate(names)]}
    (w / "latents" / "dataset.json").write_text(as_text(labels))


def encoded(w):
    pictures(w)
    dimr(*split(ENCODE.format(w=w)), "--out", w / "set")


def unfinished(w):
    """An encode that was killed before its last shard."""
    encoded(w)
    index = json.loads((w / "set" / "index.json").read_text())
    rows = index.pop("shards")
    for key in ("items", "counts", "skipped"):
        del index[key]
    (w / "set" / "plan.json").write_text(as_text(index))
    for number, row in enumerate(rows[:-1]):
        path = w / "set" / f"shard-{number:05}.json"
        path.write_text(as_text({**row, "skipped": []}))
    (w / "set" / rows[-1]["file"]).unlink()
    (w / "set" / "index.json").unlink()


def run(w):
    pictures(w)
    options = f"--steps 4 --save-every 2 --batch-size 4 --sample-every 0 {TINY}"
    dimr(*split(f"train --data {w}/pictures --out {w}/run {options}"))


def averaged(w):
    pictures(w)
    options = (
        f"--steps 8 --batch-size 4 --sample-every 0 --ema-profiles 0.05,0.1 --ema-every 2 {TINY}"
    )
    dimr(*split(f"train --data {w}/pictures --out {w}/run {options}"))


def loose(w):
    run(w)
    shutil.copy(runfolder.checkpoints(w / "run")[-1] / "ema.safetensors", w / "loose.safetensors")
    shutil.rmtree(w / "run")


def released(w):
    loose(w)
    dimr("convert", w / "loose.safetensors", w / "loose.pth")


def drawn(w):
    run(w)
    dimr(*split(f"{DRAW.format(w=w)} --out {w}/set.npz"))


def half_drawn(w):
    """A set that was killed after its first batch."""
    drawn(w)
    work = w / "set.npz.partial"
    work.mkdir()
    plan = json.loads((w / "set.json").read_text())["plan"]
    (work / "plan.json").write_text(as_text(plan))
    with np.load(w / "set.npz") as arrays:
        images = arrays["arr_0"].copy()
    images[2:] = 0
    np.save(work / "images.npy", images)
    (work / "batch-000000.done").touch()
    for name in ("set.npz", "set.json", "set.png"):
        (w / name).unlink()


def measured(w):
    pictures(w)
    dimr(*split(f"eval stats {w}/pictures {w}/s.safetensors {PLAIN}"))


def swept(w):
    run(w)
    dimr(*split(SWEEP.format(w=w)))


def judged(w):
    rows = [("image", "person", "distorted")]
    rows += [(f"i{i:05}", person, i % 2) for i in range(6) for person in ("Ann", "Bob")]
    with open(w / "votes.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    rows = [("image", "set", "original", "class", "probability")]
    rows += [(f"i{i:05}", "ab"[i % 2], f"{i}.png", 0, 0.1) for i in range(6)]
    with open(w / "key.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def benched(w):
    rows = []
    for name in ("training step demo, dimr", "guided sampling demo, 25 NFE, dimr"):
        rows.append({"name": name, "throughput": 3.5, "machine": "NVIDIA H100 80GB HBM3"})
    (w / "results.json").write_text(as_text(rows))


def classified(w):
    pictures(w)
    torch.manual_seed(0)
    network = vit.ViT(side=16, patch=8, dim=64, depth=1, hidden=64, classes=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    torch.save(dict(network.state_dict()), w / "vit.pth")


def coded(w):
    pictures(w)
    torch.manual_seed(0)
    state = vae.VAE((32, 32, 32, 32)).state_dict()
    spelled = {vae._spell(name, "CompVis"): tensor for name, tensor in state.items()}
    torch.save(spelled, w / "vae.pth")


def named(w):
    run(w)
    (w / "labels.txt").write_text("0\n1\n1\n0\n")


# -------------------------------------------------------------------------------- what came of it


def said(done, w):
    """The JSON that a command printed, without what differs by time and place."""
    text = done.stdout.strip().splitlines()
    value = json.loads(text[-1]) if text else {}
    for key in ("seconds", "images_per_second", "peak_bytes", "encoded_shards", "encoded_images"):
        value.pop(key, None)
    for name in ("samples", "reference"):
        if isinstance(value.get(name), dict):
            value[name].pop("sha256", None)  # of what was damaged
    return as_text(value).replace(str(w), "")


def digest_of(*patterns):
    """A result: the contents of the files that fit."""

    def result(done, w):
        found = hashlib.sha256()
        for pattern in patterns:
            for path in sorted(w.glob(pattern)):
                if path.is_file():
                    found.update(f"{path.name} ".encode() + path.read_bytes())
        return found.hexdigest()

    return result


def shards_of(done, w):
    """A shard set: what its files hold, whatever the index is like as a text."""
    index = json.loads((w / "set" / "index.json").read_text())
    known = ("kind", "size", "channels", "classes", "source", "shard_size", "options", "items")
    kept = {key: index.get(key) for key in (*known, "counts", "skipped", "shards")}
    kept["source"].pop("sample", None)  # which 0.1 did not note
    return as_text(kept) + digest_of("set/*.safetensors")(done, w)


def pixels_of(done, w):
    """The images drawn, without what they say of the weights."""
    found = hashlib.sha256()
    for path in sorted((w / "drawn").glob("class*.png")):
        with Image.open(path) as image:
            found.update(np.asarray(image).tobytes())
    return found.hexdigest()


def set_of(done, w):
    with np.load(w / "set.npz") as arrays:
        return hashlib.sha256(arrays["arr_0"].tobytes() + arrays["arr_1"].tobytes()).hexdigest()


def average_of(done, w):
    tensors, _ = storage.load_tensors(w / "average.safetensors")
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors.values())).hexdigest()


ENCODE = "encode --pixels --res 8 --workers 0 --shard-size 3 --data {w}/pictures"
DRAW = "sample --weights {w}/run -n 4 --batch-size 2 --steps 1 --device cpu --npz"
SAMPLE = "sample --weights {w}/run -n 1 --steps 1 --device cpu --out {w}/drawn"
AS_JSON = f"--json {PLAIN}"
SWEEP = (
    "sweep --weights {w}/run --cfg 1,2 --steps 2 -n 20 --ref {w}/pictures --out {w}/sweep "
    f"{AS_JSON}"
)
MEASURE = f"eval fid {{w}}/pictures --ref {{w}}/pictures {AS_JSON}"
OF_SET = f"eval fid {{w}}/set.npz --ref {{w}}/pictures {AS_JSON}"
COUNTED = "eval distortion {w}/votes.csv --key {w}/key.csv --json"
ENCODED = f"{ENCODE} --out {{w}}/set"
DRAWN = f"{DRAW} --out {{w}}/set.npz"
GO_ON = "train --out {w}/run --json --workers 0 --device cpu --sample-every 0"
NEWEST = "run/checkpoints/step-0000004"


@dataclasses.dataclass(frozen=True)
class Format:
    """A format: a small world with a good file of it, how that is damaged, the command that reads
    it, and what the command gives. `seen_by`: the hash or checksum by which any damage shows, or
    "" where there is none."""

    make: Callable
    file: str  # of the world; a pattern
    mutate: Callable
    command: str
    result: Callable
    seen_by: str = ""


FORMATS = {
    "index": Format(encoded, "set/index.json", json_file, ENCODED, shards_of, seen_by="the shards"),
    "shard": Format(
        encoded, "set/shard-*.safetensors", tensors_file, ENCODED, shards_of, seen_by="index.json"
    ),
    "shard, measured": Format(
        encoded,
        "set/shard-*.safetensors",
        tensors_file,
        f"eval fid {{w}}/set --ref {{w}}/set --verify-data {AS_JSON}",
        said,
        seen_by="index.json",
    ),
    "plan": Format(
        unfinished, "set/plan.json", json_file, ENCODED, shards_of, seen_by="the images"
    ),
    "row": Format(
        unfinished, "set/shard-*.json", json_file, ENCODED, shards_of, seen_by="the shards"
    ),
    "config": Format(run, "run/config.json", json_file, GO_ON, said),
    "metrics": Format(
        run, "run/metrics.jsonl", json_lines, "curves {w}/run", digest_of("run/loss.png")
    ),
    "manifest": Format(
        run, f"{NEWEST}/manifest.json", json_file, SAMPLE, pixels_of, seen_by="the files"
    ),
    "state": Format(run, f"{NEWEST}/state.json", json_file, GO_ON, said, seen_by="manifest.json"),
    "weights": Format(
        run, f"{NEWEST}/ema.safetensors", tensors_file, SAMPLE, pixels_of, seen_by="manifest.json"
    ),
    "optimizer": Format(
        run,
        f"{NEWEST}/optimizer.safetensors",
        tensors_file,
        GO_ON,
        said,
        seen_by="manifest.json",
    ),
    "averages": Format(
        averaged,
        "run/averages/step-*.safetensors",
        tensors_file,
        "ema {w}/run {w}/average.safetensors --width 0.07",
        average_of,
        seen_by="the hash in it",
    ),
    "weights alone": Format(
        loose,
        "loose.safetensors",
        tensors_file,
        SAMPLE.replace("/run", "/loose.safetensors"),
        pixels_of,
    ),
    "released weights": Format(
        released,
        "loose.pth",
        pickle_file,
        SAMPLE.replace("/run", "/loose.pth") + " --heads 1",
        pixels_of,
    ),
    "set": Format(drawn, "set.npz", any_file, OF_SET, said, seen_by="the zip's checksums"),
    "set, packed anew": Format(drawn, "set.npz", zip_file, OF_SET, said),
    "sidecar": Format(drawn, "set.json", json_file, OF_SET, said),
    "plan of a set": Format(half_drawn, "set.npz.partial/plan.json", json_file, DRAWN, set_of),
    "images of a set": Format(half_drawn, "set.npz.partial/images.npy", any_file, DRAWN, set_of),
    "png": Format(pictures, "pictures/a/0.png", image_file, MEASURE, said),
    "jpeg": Format(jpegs, "pictures/a/0.jpg", image_file, MEASURE, said),
    "zip": Format(zipped, "pictures.zip", zip_file, f"{ENCODE}.zip --out {{w}}/set", shards_of),
    "tar": Format(tarred, "pictures.tar", tar_file, f"{ENCODE}.tar --out {{w}}/set", shards_of),
    "labels": Format(labelled, "pictures/dataset.json", json_file, ENCODED, shards_of),
    "latents": Format(
        latents,
        "latents/*.npy",
        any_file,
        "encode --from-latents {w}/latents --workers 0 --out {w}/set",
        shards_of,
    ),
    "statistics": Format(
        measured,
        "s.safetensors",
        tensors_file,
        f"eval fid {{w}}/pictures --ref {{w}}/s.safetensors {AS_JSON}",
        said,
    ),
    "sweep": Format(swept, "sweep/sweep.json", json_file, SWEEP, said),
    "votes": Format(judged, "votes.csv", table_file, COUNTED, said),
    "key": Format(judged, "key.csv", table_file, COUNTED, said),
    "results of bench.py": Format(
        benched,
        "results.json",
        json_file,
        "info --variant demo --gpus 1 --gpu h100 --bench {w}/results.json --json",
        said,
    ),
    "classifier": Format(
        classified,
        "vit.pth",
        pickle_file,
        "eval fidelity {w}/pictures --classifier {w}/vit.pth --out {w}/marked --device cpu --json",
        said,
    ),
    "vae": Format(
        coded,
        "vae.pth",
        pickle_file,
        "encode --res 16 --workers 0 --batch-size 2 --data {w}/pictures --vae {w}/vae.pth "
        "--device cpu --out {w}/set",
        shards_of,
    ),
    "list of labels": Format(
        named, "labels.txt", any_file, f"{DRAWN} --labels {{w}}/labels.txt", set_of
    ),
}


# ------------------------------------------------------------------------------------- running


class Hang(BaseException):
    """Raised in a command that takes longer than PATIENCE or WAIT."""


@contextlib.contextmanager
def patience():
    def out_of_it(*_):
        raise Hang

    clocks = {
        signal.ITIMER_PROF: (signal.SIGPROF, PATIENCE),
        signal.ITIMER_REAL: (signal.SIGALRM, WAIT),
    }
    before = {}
    for clock, (number, seconds) in clocks.items():
        before[number] = signal.signal(number, out_of_it)
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for clock, (number, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class World:
    """A format's good files, and what its command makes of them."""

    def __init__(self, row: Format, folder: Path):
        self.row = row
        self.good = folder / "good"
        self.place = folder / "world"  # of every copy: paths may stand in what is written
        self.place.mkdir()
        os.environ["DIMR_HOME"] = str(folder / "home")
        row.make(self.place)
        shutil.copytree(self.place, self.good)
        self.fresh()
        done = self.invoke()
        if done.exit_code:
            raise RuntimeError(f"without a mutation: {done.output}") from done.exception
        self.expected = row.result(done, self.place)

    def fresh(self):
        shutil.rmtree(self.place)
        shutil.copytree(self.good, self.place)

    def invoke(self):
        return CliRunner().invoke(cli.main, split(self.row.command.format(w=self.place)))

    def outcome(self, rng: random.Random) -> tuple[str, str]:
        """(what came of a mutation, what to know of it)."""
        self.fresh()
        path = rng.choice(sorted(self.place.glob(self.row.file)))
        if rng.random() < 0.03:
            the_file_itself(path, rng)
        else:
            self.row.mutate(path, rng)
        before = peak()
        try:
            with patience():
                done = self.invoke()
        except Hang:
            return "hang", ""
        if peak() - before > MEMORY:
            return "memory", f"{(peak() - before) / 2**20:,.0f} MB"
        return self.judge(done)

    def judge(self, done):
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return "traceback", repr(done.exception)[:300]
        if done.exit_code:
            line = done.stderr[done.stderr.find("Error:") :].strip()
            one = line.startswith("Error:") and (line.count("\n") == 0 or done.exit_code == 2)
            return ("line", line) if one else ("traceback", f"no clear line: {line[:300]!r}")
        if self.row.result(done, self.place) == self.expected:
            return "fine", ""
        told = "WARNING" in done.stderr or "damaged" in done.stderr
        return ("told", "") if told else ("other", "")


def fuzz(name: str, seed: int, first: int, count: int, until: float = float("inf")):
    """Yield (number, outcome, what to know) of a format's mutations."""
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)
        try:
            world = World(FORMATS[name], Path(folder).resolve())
            for number in range(first, first + count):
                if time.monotonic() > until:
                    return
                yield number, *world.outcome(random.Random(f"{seed} {name} {number}"))
        finally:
            os.chdir(here)


def is_fault(name: str, outcome: str) -> bool:
    return outcome in FAULTS or (outcome == "other" and bool(FORMATS[name].seen_by))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", action="append", choices=FORMATS, help="default: all")
    parser.add_argument("--count", type=int, default=100, help="of mutations, of each format")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="at most, of each format"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="say what came of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = {}
    faults = 0
    for name in options.format or FORMATS:
        counts[name] = collections.Counter()
        until = time.monotonic() + options.seconds
        for number, outcome, words in fuzz(name, options.seed, options.first, options.count, until):
            counts[name][outcome] += 1
            if options.all:
                print(f"{name} {number}: {outcome} {words}", file=sys.stderr)
            elif is_fault(name, outcome):
                print(f"{name} {number}: {outcome} {words}", file=sys.stderr, flush=True)
            faults += is_fault(name, outcome)
        print(f"{name}: {dict(counts[name])}", file=sys.stderr, flush=True)
    print(json.dumps(counts, indent=2))
    raise SystemExit(faults > 0)


if __name__ == "__main__":
    main()
