"""The fault table: for every command and each fault that can reach it, one clear line, the right
exit status, nothing half-written and nothing lost. Faults that need processes of their own are in
test_resume, test_parallel and soak."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA
from PIL import Image
from safetensors.torch import save_file

import cli
import dataset
import networks
import runfolder
import training
from storage import load_tensors, save_tensors

NETWORK = (
    "--variant demo --layers 1,1 --dims 8,8 --heads 1 --batch-size 4 --steps 2 "
    "--warmup 0 --workers 0 --device cpu --sample-every 0"
)
DEFAULTS = {  # what every row of a command has besides what it says
    "train": f"{NETWORK} --out {{out}}",
    "sample": "-n 2 --steps 2 --device cpu --out {out}",
    "encode": "--pixels --res 8 --workers 0 --device cpu --out {out}",
    "convert": "",
    "info": "",
    "analyse": "",
    "curves": "",
    "ema": "",
    "runs": "",
    "demo": "",
    "weights": "",
    "eval": "",
    "sweep": "-n 20 --features plain_features:pooled --device cpu --out {out}",
}


class Code:
    """A pickle of it runs code when it is read: it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def png_that_claims(width, height):
    def chunk(kind, data):
        length, check = len(data), zlib.crc32(kind + data)
        return struct.pack(">I", length) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def digest(folder):
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock" and not path.is_symlink()
    }


def peer_files(w):
    """Files of others: a small DiT, whose kind and heads no tensor tells; one without its last
    layer; a training checkpoint that holds what none should; a U-ViT of ours; a key and votes."""
    arrays = load_tensors(DATA / "dit.safetensors")[0]
    tensors = {}
    for name, value in arrays.items():
        if name.startswith("weight."):
            tensors[name.removeprefix("weight.")] = value
    torch.save(tensors, w / "dit.pt")
    headless = {name: value for name, value in tensors.items() if "final_layer" not in name}
    torch.save(headless, w / "headless.pt")
    torch.save({"ema": tensors, "args": Code(str(w / "ran"))}, w / "checkpoint.pt")
    config = dataclasses.replace(
        networks.VARIANTS["uvit-m4"], size=8, channels=1, width=8, depth=1, heads=1, num_classes=2
    )
    runfolder.write_weights(w / "uvit.safetensors", networks.new(config), {})
    (w / "key.csv").write_text("image,set\ni00000,a\n")
    (w / "votes.csv").write_text("image,person,distorted\ni00007,Ann,1\n")


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """Everything that the table's rows name, good and bad. It has to be as it was in the end."""
    w = tmp_path_factory.mktemp("world")
    for i in range(12):
        path = w / "good" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(path)
    whole = (w / "good" / "a" / "0.png").read_bytes()
    bad = {
        "cut": whole[:60],
        "zero": b"",
        "fake": b"not an image at all",
        "bomb": png_that_claims(60000, 60000),
    }
    for name, content in bad.items():
        for folder in (name, "spoiled"):
            shutil.copytree(w / "good", w / folder, dirs_exist_ok=True)
            (w / folder / "b" / f"{name}.png").write_bytes(content)
    shutil.copytree(w / "good" / "a", w / "oneclass" / "a")
    shutil.copytree(w / "good", w / "hollow")
    (w / "hollow" / "c").mkdir()
    (w / "one" / "a").mkdir(parents=True)
    shutil.copy(w / "good" / "a" / "0.png", w / "one" / "a")
    (w / "empty").mkdir()
    shutil.copytree(w / "good", w / "unreadable")
    (w / "badmetrics").mkdir()
    (w / "badmetrics" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5, "loss_branches": []}\n{"step": 2, "los\n'
    )
    for name in ("unreadable/b/io.png", "io.safetensors", "io.pth"):
        (w / name).symlink_to(
            "/proc/self/mem"
        )  # a file that can be opened, and reading it fails as on a broken disk
    (w / "text").write_text("hello")
    for name, damage in {
        "shards": None,
        "cutshard": "cut",
        "lostshard": "lost",
        "badindex": "index",
    }.items():
        invoke("encode --data {good}", dict(good=w / "good", out=w / name))
        shard = sorted((w / name).glob("shard-*.safetensors"))[0]
        if damage == "cut":
            shard.write_bytes(shard.read_bytes()[:-5])
        elif damage == "lost":
            shard.unlink()
        elif damage == "index":
            (w / name / "index.json").write_text("{")
    shutil.copytree(trained, w / "run")
    ema = w / "run" / "checkpoints" / "step-0000012" / "ema.safetensors"
    tensors, about = load_tensors(ema)
    content = ema.read_bytes()
    (w / "cut.safetensors").write_bytes(content[:-9])
    (w / "zero.safetensors").write_bytes(b"")
    (w / "text.safetensors").write_text("hello")
    save_tensors(
        w / "nan.safetensors",
        {**tensors, "branches.0.position": tensors["branches.0.position"] * float("nan")},
        about,
    )
    peer_files(w)
    config = json.loads(about["config"])
    save_tensors(
        w / "other.safetensors",
        tensors,
        {**about, "config": json.dumps({**config, "dims": [32, 8]})},
    )
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}
    ).encode()
    (w / "huge.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    torch.save({"a": torch.zeros(2), "b": Code(str(w / "ran"))}, w / "code.pth")
    torch.save(tensors, w / "cut.pth")
    (w / "cut.pth").write_bytes((w / "cut.pth").read_bytes()[:-99])
    save_file({"a": torch.zeros(3)}, w / "else.safetensors")
    np.savez(
        w / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    )
    np.savez(w / "threes.npz", arr_0=np.zeros((7, 8, 8, 3), np.uint8), arr_1=np.full(7, 3))
    (w / "threes.json").write_text('{"num_classes": 10}')
    np.save(w / "three.npy", [1, 2, 3])
    for name, text in (("oddsweep", '{"plan": {}, "points": 3}'), ("cutsweep", '{"plan"')):
        (w / name).mkdir()
        (w / name / "sweep.json").write_text(text)
    np.save(w / "wide.npy", [1, 10])
    (w / "cut.npz").write_bytes((w / "images.npz").read_bytes()[:500])
    before = digest(w)
    yield {path.name: path for path in w.iterdir()} | {
        "missing": w / "missing",
        "ema": ema,
        "readonly": Path("/sys/dimr"),
    }
    assert digest(w) == before  # nothing lost; and no code of a pickle was run


def invoke(line, places):
    command, _, rest = line.partition(" ")
    line = re.sub(
        r"{([^}]+)}", lambda name: str(places[name[1]]), f"{command} {DEFAULTS[command]} {rest}"
    )
    return CliRunner().invoke(cli.main, line.split())


def check(result, status, words, tmp_path):
    assert result.exit_code == status, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit | None) and "Traceback" not in result.output
    assert all(word in result.output for word in words.split("|")), result.output
    if status:
        message = result.stderr[result.stderr.index("Error:") :]
        assert status == 2 or message.strip().count("\n") == 0, message
    assert not list(tmp_path.rglob(".*.tmp")), "half-written"


@pytest.fixture
def places(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    monkeypatch.delenv("DIMR_DATA", raising=False)
    return {**world, "out": tmp_path / "out"}


IMAGES = [
    ("{missing}", "missing"),
    ("{empty}", "empty|no images"),
    ("{text}", "text"),
    ("{hollow}", "hollow/c|fill or remove"),
    ("{cut}", "cut.png"),
    ("{zero}", "zero.png|is empty"),
    ("{fake}", "fake.png|is not a JPEG"),
    ("{bomb}", "bomb.png|pixels"),
    ("{unreadable}", "io.png|Input/output error"),
]
WEIGHTS = [
    ("{missing}", "missing"),
    ("{empty}", "empty"),
    ("{cut.safetensors}", "cut.safetensors|not a whole safetensors"),
    ("{zero.safetensors}", "zero.safetensors"),
    ("{text.safetensors}", "text.safetensors"),
    ("{cut.pth}", "cut.pth|nothing in it was run"),
    ("{code.pth}", "code.pth|nothing in it was run"),
    ("{huge.safetensors}", "huge.safetensors"),
    ("{io.safetensors}", "io.safetensors"),
    ("{io.pth}", "io.pth"),
]
NETWORKS = WEIGHTS + [
    ("{nan.safetensors}", "nan.safetensors|branches.0.position"),
    ("{other.safetensors}", "other.safetensors|does not fit"),
    ("{else.safetensors}", "else.safetensors|does not fit"),
]
PEERS = [  # what a file of others' needs to be told, and what can't be mended so
    ("{dit.pt}", "--kind dit or --kind sit"),
    ("{dit.pt} --kind dit", "give it with --heads"),
    ("{dit.pt} --kind dit --heads 5", "heads 5 does not divide the width 48"),
    ("{headless.pt} --kind dit --heads 3", "missing final_layer.linear.weight"),
    ("{checkpoint.pt} --kind dit --heads 3", "checkpoint.pt|nothing in it was run"),
    ("{uvit.safetensors} --kind dit", "--kind dit: it says that it is uvit"),
]
DIT = "--weights {dit.pt} --kind dit --heads 3"
PLACES = [("{readonly}", "readonly|/sys/dimr"), ("{text}/x", "text")]
EVAL = "eval {} --features plain_features:pooled --device cpu"

TABLE = [  # command line, exit status, words of the message
    *[(f"train --data {data}", 1, words) for data, words in IMAGES],
    ("train --data {spoiled} --on-bad-image skip", 0, "cut.png|zero.png|fake.png|bomb.png"),
    ("train --data {oneclass}", 0, "step 2 of 2"),
    ("train --data {one}", 0, "step 2 of 2"),
    ("train --data {one} --batch-size 64 --micro-batch 32", 0, "step 2 of 2"),
    ("train --data {cutshard}", 1, "shard-00000|redoes damaged shards"),
    ("train --data {lostshard}", 1, "shard-00000|is missing"),
    ("train --data {badindex}", 1, "index.json"),
    ("train --data {good} --variant xl2r", 1, "encode"),
    *[(f"train --data {{good}} --init {weights}", 1, words) for weights, words in NETWORKS],
    *[(f"train --data {{good}} --out {out}", 1, words) for out, words in PLACES],
    (
        "train --out {run} --dims 32,8 --layers 3,2 --heads 2",
        1,
        "dims [16, 8], not [32, 8]|choose another --out",
    ),
    ("train --out {run} --data {oneclass}", 1, "choose another --out"),
    ("train --data {good} --steps 0", 2, "--steps"),
    ("train --data {good} --batch-size 0", 2, "--batch-size"),
    ("train --data {good} --lr nan", 2, "--lr"),
    ("train --data {good} --ema 1", 2, "--ema"),
    ("train --data {good} --ema-profiles 0.05,wide", 2, "0.05,0.10"),
    ("train --data {good} --ema-profiles 0.05,0.4", 1, "width 0.4|0.2887"),
    ("train --data {good} --ema-profiles 0.05,0.05", 1, "twice"),
    ("train --data {good} --ema-profiles 0.05 --ema-every 0", 2, "--ema-every"),
    ("train --data {good} --ema-profiles 0.05 --ema-precision bf16", 2, "fp16"),
    ("train --data {good} --betas 0.9", 2, "0.99,0.99"),
    ("train --data {good} --betas 2,0.9", 2, "0.99,0.99"),
    ("train --data {good} --micro-batch 3", 1, "use 3 or 6"),
    ("train --data {good} --heads 3", 1, "heads"),
    ("train --data {good} --device cuda", 1, "--device auto"),
    ("train --data {good} --validate {missing}", 1, "missing"),
    ("train --data {good} --validate {empty}", 1, "empty|no images"),
    ("train --data {good} --validate {good}", 1, "holds the images that are trained on"),
    ("train --data {oneclass} --validate {good}", 1, "class 'b' that is not trained on"),
    ("train --data {good} --validate-every 5", 1, "needs --validate"),
    ("train --data {good} --validate {bomb}", 0, "WARNING: no evaluation|bomb.png|step 2 of 2"),
    (
        "train --data {good} --validate {spoiled} --on-bad-image skip",
        0,
        "skipped|cut.png|zero.png|fake.png|bomb.png|step 2 of 2",
    ),
    ("train --data {good} --log mlflow", 2, "tensorboard"),
    ("train", 1, "--data"),
    *[(f"sample --weights {weights}", 1, words) for weights, words in NETWORKS],
    *[
        (f"{command} {{run}}@7", 1, "no checkpoint of step 7|it has 4, 8, 12")
        for command in (
            *("sample --weights", "info", "analyse time --weights", "train --data {good} --init"),
            "eval fid --features plain_features:pooled --device cpu --weights",
        )
    ],
    ("convert {run}@7 {out}/a.safetensors", 1, "no checkpoint of step 7|it has 4, 8, 12"),
    ("ema {run}@7 --width 0.05", 1, "holds no snapshots"),
    ("runs --under {missing}", 1, "missing|is no folder of runs"),
    ("runs prune {missing} --keep-every 5", 1, "missing|is no run folder"),
    ("runs prune {good} --keep-every 5", 1, "good|is no run folder"),
    ("runs prune {run} --keep-every 0", 2, "--keep-every"),
    ("runs prune {run}", 2, "--keep-every"),
    ("sample --weights {ema} --class 10", 1, "0 to 9"),
    ("sample --weights {ema} --class cat", 1, "cat"),
    ("sample --weights {ema} --cfg 0.5", 2, "1.4"),
    ("sample --weights {ema} --cfg nan", 2, "--cfg"),
    ("sample --weights {ema} --guide {ema}", 1, "would be its own guide, which changes nothing"),
    ("sample --weights {ema} --guide nowhere", 1, "nowhere"),
    ("sample --weights {ema} --guide-scale 2", 1, "needs a guide; give --guide WEIGHTS"),
    ("sample --weights {ema} --guide {ema} --guide-scale 0.5", 2, "--guide-scale"),
    ("sample --weights {ema} --film --npz", 2, "--film goes with PNGs"),
    ("sample --weights {ema} --steps 0", 2, "--steps"),
    ("sample --weights {ema} -n 0", 2, "-n"),
    ("sample --weights {ema} --seed -1", 2, "--seed"),
    ("sample --weights {ema} --batch-size 0", 2, "--batch-size"),
    ("sample --weights {run} --ema-width 0.1", 1, "run|no snapshots|--ema-profiles"),
    ("sample --weights {ema} --ema-width 0.1", 1, "ema.safetensors|no run folder"),
    ("sample --weights {run} --ema-width 0.1 --raw", 2, "--raw"),
    ("sample --weights {run} --ema-width nan", 2, "--ema-width"),
    ("sample --weights {ema} --raw", 1, "no run folder|leave out --raw"),
    ("sample --weights {run} --raw --guide {ema} -n 1 --steps 2", 0, "1 images"),
    *[(f"sample --weights {{ema}} --out {out}", 1, words) for out, words in PLACES],
    *[(f"sample --weights {{ema}} --npz --out {out}/set.npz", 1, words) for out, words in PLACES],
    *[(f"encode --data {data}", 1, words) for data, words in IMAGES],
    (
        "encode --data {spoiled} --on-bad-image skip",
        0,
        "cut.png|zero.png|fake.png|bomb.png|12 images",
    ),
    ("encode --data {oneclass}", 0, "6 images of 1 classes"),
    ("encode --data {one} --batch-size 64", 0, "1 images of 1 classes"),
    *[(f"encode --data {{good}} --out {out}", 1, words) for out, words in PLACES],
    ("encode --data {good} --out {run}", 1, "choose a new or empty folder"),
    ("encode --data {oneclass} --out {shards}", 1, "other images"),
    ("encode --data {good} --res 0", 2, "--res"),
    ("encode --verify --out {missing}", 1, "missing"),
    ("encode --verify --out {cutshard}", 1, "shard-00000"),
    ("encode --verify --out {lostshard}", 1, "shard-00000"),
    ("encode", 1, "--data"),
    *[(f"convert {weights} {{out}}.safetensors", 1, words) for weights, words in NETWORKS],
    *[(f"convert {{ema}} {out}/a.safetensors", 1, words) for out, words in PLACES],
    ("convert {ema} {out}.bin", 1, ".safetensors"),
    ("convert xl2r {out}.safetensors", 1, "xl2r"),
    ("convert {ema}", 2, "OUT"),
    ("ema {missing} --width 0.1", 1, "missing|no run folder"),
    ("ema {text} --width 0.1", 1, "text|no run folder"),
    ("ema {run} --width 0.1", 1, "run|no snapshots|--ema-profiles"),
    ("ema {run} --width 0", 2, "--width"),
    ("ema {run}", 2, "--width"),
    ("ema {run} {out}.bin --width 0.1", 2, ".safetensors"),
    ("curves {missing}", 1, "missing"),
    ("curves {empty}", 1, "no metrics"),
    ("curves {badmetrics}", 1, "metrics.jsonl: line 2 is damaged"),
    ("curves {text}", 1, "text"),
    ("curves", 1, "no run"),
    ("info --variant xxl", 2, "xl2r"),
    *[(f"info {weights}", 1, words) for weights, words in PEERS],
    *[(f"sample --weights {weights}", 1, words) for weights, words in PEERS],
    (f"sample {DIT} --cfg-channels 5 --cfg 2", 1, "guidance of 5 channels: this network has 4"),
    (f"sample {DIT} --cfg-channels 0", 2, "--cfg-channels"),
    (f"sample {DIT} --solver ddpm --steps 1", 1, "1 steps of DDPM are not between 2 and 1000"),
    (f"sample {DIT} --solver ddpm --grid time", 1, "ddpm lays its times itself; leave out --grid"),
    ("sample --weights {ema} --solver ddpm", 1, "kind dimr does not have|such as ancestral"),
    ("sample --weights {uvit.safetensors} --cfg 2", 1, "null class"),
    ("convert {uvit.safetensors} {out}.pth", 1, "kind uvit; write|safetensors instead"),
    ("train --data {good} --variant m3r --init {uvit.safetensors}", 1, "of kind uvit|kind dimr"),
    ("train --data {good} --init {dit.pt}", 1, "--kind dit or --kind sit"),
    ("train --data {good} --variant dit-b2 --norm tdln", 1, "--norm is not for this kind, dit"),
    ("train --data {good} --variant uvit-m4", 1, "--layers 1,1 has 2 numbers"),
    ("train --data {good} --patch 2", 1, "--patch is not for this kind, dimr"),
    ("train --data {good} --loss coarse", 2, "--loss"),
    ("analyse pca --weights {ema}", 1, "has no adaLN-Zero"),
    ("analyse pca --weights {uvit.safetensors}", 1, "has no adaLN-Zero"),
    ("analyse time --weights {uvit.safetensors}", 1, "has no TD-LN"),
    (f"analyse time {DIT}", 1, "has no TD-LN"),
    (f"analyse pca {DIT} --layers 5", 1, "layer 5 is not one of 1 to 4"),
    ("analyse time --weights {ema} --layers 4", 1, "layer 4 is not one of 1 to 3"),
    (f"analyse pca {DIT} --layers a", 2, "--layers"),
    *[(f"analyse time --weights {weights}", 1, words) for weights, words in NETWORKS],
    ("weights get xxl", 2, "xl2r"),
    ("weights get xl2r", 1, "DIMR_OFFLINE"),
    *[(f"demo --out {out}", 1, words) for out, words in PLACES],
    ("demo --out {good}", 1, "not empty"),
    ("demo --seed -1", 2, "--seed"),
    *[
        (f"{EVAL.format('fid')} {samples} --ref {{images.npz}}", 1, words)
        for samples, words in [
            ("{missing}", "missing"),
            ("{empty}", "empty"),
            ("{text}", "text"),
            ("{cut.npz}", "cut.npz"),
            ("{cut}", "cut.png"),
            ("{zero}", "zero.png"),
            ("{fake}", "fake.png"),
            ("{bomb}", "bomb.png"),
            ("{cutshard}", "shard-00000"),
            ("{one}", "at least 2"),
            ("{unreadable}", "io.png"),
        ]
    ],
    *[
        (f"{EVAL.format('fid')} {{images.npz}} --ref {ref}", 1, words)
        for ref, words in [
            ("{missing}", "missing"),
            ("{empty}", "empty"),
            ("{cut.npz}", "cut.npz"),
            ("{cut.safetensors}", "cut.safetensors"),
            ("{huge.safetensors}", "huge.safetensors"),
            ("{fake}", "fake.png"),
        ]
    ],
    *[
        (f"{EVAL.format('fid')} --ref {{images.npz}} -n 4 --weights {weights}", 1, words)
        for weights, words in NETWORKS
    ],
    *[
        (
            f"eval fid {{images.npz}} --ref {{images.npz}} --inception {weights}",
            1,
            words.split("|")[0],
        )
        for weights, words in WEIGHTS + [("{nan.safetensors}", "nan")]
    ],
    *[
        (f"eval fidelity {{images.npz}} --classifier {weights}", 1, words)
        for weights, words in WEIGHTS
    ],
    *[(f"{EVAL.format('stats')} {{good}} {out}/a.safetensors", 1, words) for out, words in PLACES],
    ("eval stats {good} {out}", 2, "safetensors"),
    ("eval distortion {missing}", 1, "missing"),
    ("eval distortion {votes.csv} --key {missing}", 1, "missing|can't be read as a key"),
    ("eval distortion {votes.csv} --key {votes.csv}", 1, "votes.csv is no key"),
    ("eval distortion {votes.csv} --key {key.csv}", 1, "judges i00007, which|doesn't know"),
    ("eval fidelity {images.npz} {images.npz} --classifier {cut.pth}", 1, "cut.pth"),
    ("eval fidelity", 2, "SAMPLES"),
    ("eval distortion {text}", 1, "text"),
    ("eval fid {images.npz} -n 4", 2, "SAMPLES"),
    ("eval fid {images.npz} --cfg 2", 2, "measured as they are; leave out --cfg"),
    ("eval fid {images.npz} --raw", 2, "leave out --ema/--raw"),
    ("eval fid {images.npz} --labels random", 2, "SAMPLES"),
    (f"{EVAL.format('fid')} {{images.npz}} --ref {{images.npz}}", 0, "fewer than the 20 blocks"),
    (f"{EVAL.format('fid')} {{threes.npz}} --ref {{images.npz}}", 1, "of class 3 alone"),
    (
        f"{EVAL.format('fid')} {{images.npz}} {{threes.npz}} --ref {{images.npz}}",
        1,
        "images.npz|threes.npz|compare sets of one size",
    ),
    (f"{EVAL.format('fid')} {{images.npz}} {{images.npz}} --ref {{images.npz}}", 1, "given twice"),
    *[
        (f"{command} --labels {labels}", status, words)
        for command in ("sample --weights {run}", f"{EVAL.format('fid')} --weights {{run}} -n 2")
        for labels, status, words in (
            ("{three.npy}", 1, "three.npy holds 3 labels for 2 images"),
            ("{wide.npy}", 1, "label 10 of image 1 is out of range|0 to 9"),
            ("{images.npz}", 1, "arr_1"),
            ("{text}", 1, "text can't be read as labels"),
            ("{cut.npz}", 1, "cut.npz"),
            ("{missing}", 1, "missing does not exist"),
        )
    ],
    ("sweep --weights {run} --ref {images.npz}", 2, "a sweep over nothing|--cfg 1.2:2.0:0.1"),
    ("sweep --weights {run} --ref {images.npz} --cfg 1.5", 1, "a sweep over 1 point"),
    ("sweep --weights {run} --ref {images.npz} --cfg 2:1:0.1", 2, "holds 0 values"),
    (
        "sweep --weights {run} --ref {images.npz} --cfg 1:2",
        2,
        "neither a number nor FIRST:LAST:STEP",
    ),
    ("sweep --weights {run} --ref {images.npz} --cfg 1:3:0.001", 2, "2001 values|1 to 1000"),
    ("sweep --weights {run} --ref {images.npz} --cfg 0.5,1", 1, "0.5"),
    ("sweep --weights {run} --ref {images.npz} --cfg 1,nan", 1, "nan"),
    ("sweep --weights {run} --ref {images.npz} --steps 4,8.5", 2, "no whole number"),
    ("sweep --weights {run} --ref {images.npz} --cfg-interval 3,1 --cfg 1.5,2", 1, "interval"),
    ("sweep --weights {run} --ref {images.npz} --guide-scale 1,2", 1, "--guide"),
    ("sweep --weights {run} --cfg 1,2 --ref {missing}", 1, "missing"),
    ("sweep --weights {run} --cfg 1,2 -n 19", 2, "20"),
    *[
        (f"sweep --weights {{run}} --ref {{images.npz}} --cfg 1,2 --out {out}", 1, words)
        for out, words in [("{oddsweep}", "sweep.json"), ("{cutsweep}", "sweep.json"), *PLACES]
    ],
    *[
        (f"sweep --ref {{images.npz}} --cfg 1,2 --weights {weights}", 1, words)
        for weights, words in NETWORKS
    ],
    (f"{EVAL.format('fdd')} {{images.npz}} --ref {{images.npz}}", 2, "leave out --features"),
    *[
        (f"eval fdd {{images.npz}} --ref {{images.npz}} --dinov2 {weights}", 1, words.split("|")[0])
        for weights, words in WEIGHTS
    ],
]


@pytest.mark.parametrize("line, status, words", TABLE, ids=[row[0] for row in TABLE])
def test_one_line_the_right_status_and_nothing_left_behind(places, tmp_path, line, status, words):
    check(invoke(line, places), status, words.replace("readonly|", ""), tmp_path)


# a full disk


@contextlib.contextmanager
def full_disk(room):
    """No file grows beyond `room` bytes, as where space runs out."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = [
    "train --data {good}",
    "sample --weights {ema} -n 60",
    "sample --weights {ema} --npz --out {out}/set.npz",
    "encode --data {good}",
    "convert {ema} {out}/a.safetensors",
    "convert {ema} {out}/a.pth",
    "demo --out {out}",
    "curves {copy}",
    "eval stats {good} {out}/a.safetensors --features plain_features:pooled",
]


@pytest.mark.parametrize("room", [0, 300])
@pytest.mark.parametrize("line", FULL)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(places, tmp_path, line, room):
    if "{copy}" in line:
        places["copy"] = shutil.copytree(places["run"], tmp_path / "copy")
    with full_disk(room):
        result = invoke(line, places)
    check(result, 1, "File too large", tmp_path)
    finals = [
        path
        for suffix in ("safetensors", "pth", "npz")
        for path in places["out"].rglob(f"*.{suffix}")
    ]
    assert not finals and not runfolder.checkpoints(places["out"])


def test_no_room_for_temporary_files_is_one_line():
    """PyTorch asks for a folder for them when it first imports its compiler, unless it has one for
    that."""
    environment = {
        name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"
    }
    with full_disk(0):
        done = subprocess.run(
            [sys.executable, "-m", "cli", "info", "--variant", "demo", "--micro-batch", "4"],
            capture_output=True,
            text=True,
            cwd=Path(cli.__file__).parent,
            env=environment,
            check=False,
        )
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(
        r"Error: output: No usable temporary directory found in .*; "
        r"free space or choose another place\n",
        done.stderr,
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for 16 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("line", [line for line in FULL if "{copy}" not in line])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing_half_written(places, small_disk, line):
    places["out"] = small_disk / "out"
    if "{out}/" in line:
        places["out"].mkdir()
    check(invoke(line, places), 1, "No space left", small_disk)
    assert not [*small_disk.rglob("*.pth"), *runfolder.checkpoints(places["out"])]
    for path in small_disk.rglob(
        "*.safetensors"
    ):  # what was written before the disk was full is whole
        load_tensors(path)
    for path in small_disk.rglob("*.npz"):
        assert len(np.load(path)["arr_0"]) == 2


# what happens meanwhile


@pytest.mark.parametrize(
    "line",
    [
        "train --data {copy} --steps 4",
        "encode --data {copy}",
        "eval fid {copy} --ref {images.npz} --features plain_features:pooled",
    ],
)
def test_a_file_that_vanishes_meanwhile_is_named(places, tmp_path, monkeypatch, line):
    places["copy"] = shutil.copytree(places["good"], tmp_path / "copy")
    loader = dataset.loader

    def late(*arguments, **keywords):  # after the folder was listed, before it is read
        (tmp_path / "copy" / "b" / "1.png").unlink(missing_ok=True)
        return loader(*arguments, **keywords)

    monkeypatch.setattr(dataset, "loader", late)
    check(invoke(line, places), 1, "b/1.png", tmp_path)


@pytest.mark.parametrize("line", ["train --data {good}", "encode --data {good}"])
def test_a_reading_process_that_is_killed_is_an_error_and_no_wait(
    places, tmp_path, monkeypatch, line
):
    read = dataset.read_image

    def fatal(*arguments):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*arguments)

    monkeypatch.setattr(dataset, "read_image", fatal)
    monkeypatch.setitem(
        DEFAULTS, line.split()[0], DEFAULTS[line.split()[0]].replace("--workers 0", "--workers 1")
    )
    check(invoke(line, places), 1, "worker|fewer --workers", tmp_path)


HOLD = """
import storage, sys
with storage.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("line", ["train --data {good}", "encode --data {good}"])
def test_a_folder_in_use_names_its_owner_and_is_free_once_that_is_killed(places, tmp_path, line):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, places["out"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout.readline() == b"held\n"
    check(invoke(line, places), 1, f"in use by process {owner.pid}", tmp_path)
    owner.kill()
    owner.communicate()
    check(invoke(line, places), 0, "out", tmp_path)


def test_an_unforeseen_error_keeps_its_traceback(places, monkeypatch):
    monkeypatch.setattr(training, "losses", lambda state, *_: state.no_such_thing)
    result = invoke("train --data {good}", places)
    assert isinstance(result.exception, AttributeError) and "no_such_thing" in str(result.exception)
