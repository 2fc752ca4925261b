"""docs/reproduce.md is read, and each of its commands runs, in small, on random weights."""

import csv
import dataclasses
import re
import shlex

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from inception_weights import photographs
from PIL import Image
from safetensors.torch import save_file
from test_vae import reference

import cli
import dimr
import downloads
import evaluation
import imagenet_names
import networks
import peers
import vit

PAGE = ROOT / "docs" / "reproduce.md"
SMALL = {"dimr": "--layers 1,1,1 --dims 16,8,8 --heads 2", "peer": "--layers 1 --dims 16 --heads 2"}
TWO_BRANCHES = ("xl2r", "g2r")
UVITS = {  # files of the page's, by the variant that each holds
    "imagenet64_uvit_mid": "uvit-m4",
    "imagenet64_uvit_large": "uvit-l4",
    "imagenet256_uvit_large": "uvit-l2",
    "imagenet256_uvit_huge": "uvit-h2",
    "imagenet512_uvit_large": "uvit-l4-512",
    "imagenet512_uvit_huge": "uvit-h4",
}


def commands():
    """The page's commands, in its order: in blocks and in tables."""
    text = PAGE.read_text()
    found = []
    for block, inline in re.findall(r"^```bash\n(.*?)^```|`(dimr [^`]+)`", text, re.S | re.M):
        for line in (block or inline).splitlines():
            line = line.partition("#")[0].strip()
            if line:
                found.append(line)
    return [line for line in found if len(line.split()) > 2]  # not a mere name


def option(words, name):
    return words[words.index(name) + 1] if name in words else None


def in_small(command):
    """The words after `dimr` of a command that takes seconds. The last of two equal options
    counts."""
    program, *words = shlex.split(command)
    assert program == "dimr"
    more = "--device cpu"
    if words[0] == "encode":
        sizes = {"64": 8, "256": 32, "512": 32}
        res = option(words, "--res")
        kind = "pixels" if "--pixels" in words else "latents"
        more += f" --res {sizes[res]} --out data/{kind}-{res} --workers 0"
        if kind == "latents":
            more += " --vae autoencoder_kl.pth"
    if words[0] == "train":
        more += " --steps 1 --batch-size 2 --workers 0 --sample-every 0 " + shape(words)
    if words[0] == "sample":
        more += " -n 4 --steps 2 --batch-size 4 --vae autoencoder_kl.pth"
    if words[:2] == ["eval", "all"]:
        words[1] = "fid"  # the features of the tests' own extractor, which is small
        more += " -n 4 --steps 2 --ref images.npz --features plain_features:pooled"
        more += " --vae autoencoder_kl.pth"
    if words[:2] == ["eval", "fidelity"]:
        more += " --classifier vit.pth"
    if words[:2] == ["eval", "distortion"] or words[0] == "info":
        more = ""
    if words[:2] == ["analyse", "pca"]:
        more += " --layers 1 -n 2 --steps 2"
    if told_heads(words):
        more += " --heads 2"
    return words + shlex.split(more)


def shape(words):
    """Options of a small network in the variant's place."""
    variant = option(words, "--variant")
    if variant in peers.VARIANTS:
        return SMALL["peer"] + " --patch 2"
    if variant in TWO_BRANCHES:
        return "--layers 1,1 --dims 16,8 --heads 2"
    return SMALL["dimr"]


def told_heads(words):
    """Whether the network of a command is in a file of others', in a size that nobody published."""
    weights = option(words, "--weights") or ""
    return weights.startswith(("dit-", "SiT-", "imagenet"))


def small_peer(variant, size):
    """A small network of the variant's kind and space for ImageNet's classes."""
    changes = dict(layers=(1,), dims=(16,), heads=2, patch=2)
    torch.manual_seed(0)
    model = networks.new(networks.changed(networks.VARIANTS[variant], changes, size=size))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small things under the names that the page has for large ones: ImageNet, a
    VAE, the released networks, a classifier."""
    root = tmp_path_factory.mktemp("reproduce")
    for k, (identifier, _) in enumerate(imagenet_names.CLASSES):
        folder = root / "data" / "imagenet" / "train" / identifier
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(k).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "0.jpg")
    (root / "photos" / "cats").mkdir(parents=True)
    for k in range(4):
        Image.fromarray(photographs(1, 16, seed=k)[0].numpy()).save(root / f"photos/cats/{k}.png")
    torch.save(reference((32, 32, 32, 32)).state_dict(), root / "autoencoder_kl.pth")
    for name, variant in UVITS.items():
        size = 8 if "64_" in name else 4
        torch.save(small_peer(variant, size).state_dict(), root / f"{name}.pth")
    torch.save(small_peer("sit-xl2", 4).state_dict(), root / "SiT-XL-2-256.pt")
    np.savez(root / "images.npz", arr_0=photographs(8, 32).numpy())
    judge_network = vit.ViT(32, 16, 64, 1, 64, 1000)
    with torch.no_grad():  # which hold whatever memory held
        judge_network.cls_token.normal_(std=0.02)
        judge_network.pos_embed.normal_(std=0.02)
    torch.save(judge_network.state_dict(), root / "vit.pth")
    return root


def fill_the_cache():
    """Small networks where the released ones would be."""
    config = dataclasses.replace(
        dimr.VARIANTS["xl2r"], layers=(1, 1), dims=(16, 8), size=4, norm="tdrms"
    )
    for name in ("xl2r", "g2r", "dit-xl2-256", "dit-xl2-512", "sd-vae-ft-ema"):
        path = downloads.place(name)
        path.parent.mkdir(parents=True)
        if name.startswith("dit"):
            torch.save(small_peer("dit-xl2", 4).state_dict(), path)
        elif name.startswith("sd"):
            save_file(reference((32, 32, 32, 32)).state_dict(), path)
        else:
            torch.manual_seed(0)
            torch.save(dimr.to_released(dimr.DiMR(config)), path)


def judge(key, votes):
    """Two people look at each image of the key, and call every third distorted."""
    with open(key, newline="") as file:
        images = [row["image"] for row in csv.DictReader(file)]
    assert len(images) == 12  # all of three sets
    with open(votes, "w") as file:
        file.write("image,person,distorted\n")
        for k, image in enumerate(images):
            for person in ("Ann", "Bob"):
                file.write(f"{image},{person},{int(k % 3 == 0)}\n")


@pytest.mark.slow
def test_every_command_of_the_page_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("DIMR_HOME", str(place / "home"))
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    monkeypatch.delenv("DIMR_DATA", raising=False)
    vae = dataclasses.replace(downloads.ASSETS["sd-vae-ft-ema"], size=None, sha256=None)
    monkeypatch.setitem(downloads.ASSETS, "sd-vae-ft-ema", vae)
    fill_the_cache()
    ran = []
    for command in commands():
        words = in_small(command)
        if words[:2] == ["eval", "distortion"]:
            judge("judged-key.csv", "votes.csv")
        result = CliRunner().invoke(cli.main, words)
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
        ran.append(" ".join(words[:2]))
    assert ran.count("eval fid") >= 18 and ran.count("train --variant") >= 15
    with Image.open("samples/figures-7-18/grid.png") as grid:
        assert grid.width >= 128
    assert (place / "analysis" / "DiT-XL-2-256x256" / "pca.png").exists()


# the numbers


def test_the_pages_numbers_are_those_that_eval_shows_beside():
    text = PAGE.read_text()
    for name, rows in evaluation.PAPER.items():
        for _, values in rows:
            for value in values.values():
                assert re.search(rf"\b{value:g}0?\b", text), f"{name}: {value}"


@pytest.mark.parametrize("row", range(1, 7))
def test_the_pages_parameters_are_what_is_built(row):
    with torch.device("meta"):
        model = networks.new(networks.VARIANTS[f"table2-{row}"])
    (line,) = re.findall(rf"^\| {row} .*", PAGE.read_text(), re.M)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in line


def test_the_pages_twelve_classes_are_those_that_it_names():
    (command,) = [line for line in commands() if "figures-7-18" in line]
    classes = [int(c) for c in re.findall(r"--class (\d+)", command)]
    assert classes == [270, 980, 250, 89, 972, 417, 291, 360, 387, 388, 973, 88]
    named = " ".join(" ".join(imagenet_names.CLASSES[c][1]) for c in classes).lower()
    for word in ("wolf", "volcano", "husky", "cockatoo", "cliff", "balloon", "lion", "otter"):
        assert word in named
