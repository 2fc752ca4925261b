"""The product's lines one after another, on real photographs: each finds what the one before it
wrote."""

import json

import numpy as np
import pytest
import torch
from conftest import dimr_command
from inception_weights import weights
from PIL import Image
from safetensors.torch import save_file
from test_vae import reference

import vae

pytestmark = pytest.mark.slow

PHOTOGRAPHS = {"people": ["astronaut"], "animals": ["chelsea"], "things": ["coffee", "rocket"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in: photographs under data/imagenet/train, a random full-size VAE and
    Inception."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    root = tmp_path_factory.mktemp("chain")
    images = {("places", "china"): load_sample_image("china.jpg")}
    for kind, names in PHOTOGRAPHS.items():
        for name in names:
            images[kind, name] = getattr(data, name)()
    for (kind, name), image in images.items():
        folder = root / "data" / "imagenet" / "train" / kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}.jpg", quality=95)
    save_file(reference(vae.WIDTHS).state_dict(), root / "vae.safetensors")
    torch.save(weights(), root / "inception.pth")
    return root


def run(place, line, **options):
    """What a line prints."""
    return dimr_command(*line.split(), cwd=place, **options).stdout


def test_encode_train_sample_eval_each_find_the_others_output(place):
    encode_writes_latents_and_a_preview(place)
    train_finds_the_latents(place)
    sample_finds_the_run_and_its_vae(place)
    eval_finds_the_run_and_its_photographs(place)


def encode_writes_latents_and_a_preview(place):
    line = "encode --res 256 --vae vae.safetensors"
    assert "data/latents-256" in run(place, line)
    written = place / "data" / "latents-256"
    index = json.loads((written / "index.json").read_text())
    assert index["classes"] == ["animals", "people", "places", "things"]
    assert index["size"] == 32
    assert index["kind"] == "latents"
    assert Image.open(written / "preview.png").width >= 512


def train_finds_the_latents(place):
    network = "--layers 2,1 --dims 32,16 --heads 2"
    line = f"train --variant xl2r {network} --batch-size 4 --steps 4 --sample-every 0 --device cpu"
    assert "runs/xl2r: step 4 of 4" in run(place, line, torchrun=1)
    record = json.loads((place / "runs" / "xl2r" / "config.json").read_text())
    assert record["config"]["num_classes"] == 4
    assert record["config"]["space"] == "latent"
    assert record["data"]["path"].endswith("latents-256")


def sample_finds_the_run_and_its_vae(place):
    line = "sample --class animals --cfg 1.5 -n 1 --steps 3 --device cpu"
    assert "runs/xl2r" in run(place, line)
    folder = place / "samples" / "xl2r-step4-cfg1.5-2m-3nfe"
    picture = folder / "class0000-animals-seed000000.png"
    with Image.open(picture) as image:
        facts = json.loads(image.text["dimr"])
        assert image.size == (256, 256)
        assert facts["class_name"] == "animals"
        assert facts["cfg"] == 1.5
        assert np.asarray(image).std() > 0


def eval_finds_the_run_and_its_photographs(place):
    line = "eval fid --inception inception.pth -n 4 --steps 2 --device cpu --json"
    result = json.loads(run(place, line))
    assert "runs/xl2r" in result["samples"]["source"]
    assert result["samples"]["count"] == 4
    assert result["fid"] > 0
    assert result["reference"]["source"].endswith("data/imagenet/train")
    assert result["reference"]["count"] == 5
