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

PHOTOGRAPHS = {"people": ["astronaut"], "animals": ["chelsea"], "things": ["coffee", "rocket"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in: photographs under data/imagenet/train, a random full-size VAE and
    Inception."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    root = tmp_path_factory.mktemp("chain")
    images = {
        (kind, name): getattr(data, name)() for kind, names in PHOTOGRAPHS.items() for name in names
    }
    images |= {("places", "china"): load_sample_image("china.jpg")}
    for (kind, name), image in images.items():
        folder = root / "data" / "imagenet" / "train" / kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}.jpg", quality=95)
    save_file(reference(vae.WIDTHS).state_dict(), root / "vae.safetensors")
    torch.save(weights(), root / "inception.pth")
    return root


def test_encode_train_sample_eval_each_find_the_others_output(place):
    done = dimr_command(
        "encode",
        "--res",
        "256",
        "--vae",
        "vae.safetensors",
        cwd=place,
        env={"OMP_NUM_THREADS": "2"},
    )
    assert "data/latents-256" in done.stdout
    index = json.loads((place / "data" / "latents-256" / "index.json").read_text())
    assert (
        index["classes"] == ["animals", "people", "places", "things"]
        and index["size"] == 32
        and index["kind"] == "latents"
    )
    assert Image.open(place / "data" / "latents-256" / "preview.png").width >= 512

    done = dimr_command(
        "train",
        "--variant",
        "xl2r",
        "--layers",
        "2,1",
        "--dims",
        "32,16",
        "--heads",
        "2",
        "--batch-size",
        "4",
        "--steps",
        "4",
        "--sample-every",
        "0",
        "--device",
        "cpu",
        cwd=place,
        torchrun=1,
    )
    assert "runs/xl2r: step 4 of 4" in done.stdout
    record = json.loads((place / "runs" / "xl2r" / "config.json").read_text())
    assert (
        record["config"]["num_classes"] == 4
        and record["config"]["space"] == "latent"
        and record["data"]["path"].endswith("latents-256")
    )

    done = dimr_command(
        "sample",
        "--class",
        "animals",
        "--cfg",
        "1.5",
        "-n",
        "1",
        "--steps",
        "3",
        "--device",
        "cpu",
        cwd=place,
    )
    assert "runs/xl2r" in done.stdout
    picture = place / "samples" / "xl2r-cfg1.5" / "class0000-seed000000.png"
    with Image.open(picture) as image:
        facts = json.loads(image.text["dimr"])
        assert image.size == (256, 256) and facts["class_name"] == "animals" and facts["cfg"] == 1.5
        assert np.asarray(image).std() > 0

    done = dimr_command(
        "eval",
        "fid",
        "--inception",
        "inception.pth",
        "-n",
        "4",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--json",
        cwd=place,
    )
    result = json.loads(done.stdout)
    assert (
        "runs/xl2r" in result["samples"]["source"]
        and result["samples"]["count"] == 4
        and result["fid"] > 0
    )
    assert (
        result["reference"]["source"].endswith("data/imagenet/train")
        and result["reference"]["count"] == 5
    )
