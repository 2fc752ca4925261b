"""What dimr 0.1.0 wrote (tests/data/v0.1.0) keeps working."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DATA, dimr_command
from PIL import Image

import dataset
import extraction
import runfolder
import sampling
import storage

FROZEN = DATA / "v0.1.0"


def losses(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return torch.tensor([[line["loss"], *line["loss_branches"]] for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize(
    "run, data, steps",
    [("run", "pixels", 12), ("latent-run", "latents", 6)],
    ids=["pixel", "latent"],
)
def test_its_runs_go_on_with_the_losses_they_would_have_had(tmp_path, run, data, steps):
    shutil.copytree(FROZEN / run, tmp_path / run)
    done = dimr_command(
        *("train", "--out", tmp_path / run, "--data", FROZEN / data, "--steps", steps),
        *("--workers", "0", "--sample-every", "0", "--device", "cpu"),
    )
    assert "going on from" in done.stderr
    expected = losses(FROZEN / f"{run}-to-{steps}.jsonl")
    torch.testing.assert_close(
        losses(tmp_path / run / "metrics.jsonl"), expected, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("weights", ["run", "released.pth"])
def test_its_weights_draw_the_pixels_they_drew(weights):
    generator = sampling.load(FROZEN / weights, device="cpu")
    with np.load(FROZEN / "set.npz") as arrays:
        expected, classes = arrays["arr_0"], arrays["arr_1"]
    images = generator.images(classes, range(20), batch_size=16, steps=10)
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert images.std() > 10  # not black


def test_its_pngs_are_read_with_class_and_settings(tmp_path):
    images = sampling.load(FROZEN / "run", device="cpu").images([3] * 3, range(5, 8), steps=10)
    for seed, image in zip(range(5, 8), images, strict=True):
        with Image.open(FROZEN / "pngs" / f"class0003-seed{seed:06d}.png") as file:
            facts = json.loads(file.text["dimr"])
            assert np.abs(np.asarray(file).astype(int) - image[..., 0]).max() <= 1
        assert (facts["class"], facts["seed"], facts["steps"], facts["dimr"]) == (
            3,
            seed,
            10,
            "0.1.0",
        )


@pytest.mark.slow
def test_a_set_of_its_own_is_the_set_asked_for(tmp_path):
    for name in ("set.npz", "set.json"):
        shutil.copy(FROZEN / name, tmp_path)
    before = (tmp_path / "set.npz").read_bytes()
    dimr_command(
        *("sample", "--weights", FROZEN / "run", "--balanced", "-n", "20", "--steps", "10"),
        *("--out", tmp_path / "set.npz", "--device", "cpu"),
    )
    assert (tmp_path / "set.npz").read_bytes() == before


def test_its_shards_are_read_and_have_the_same_fingerprint():
    for name, kind, shape in (
        ("pixels", "pixels", (1, 8, 8)),
        ("latents", "latents", (2, 4, 2, 2)),
    ):
        data = dataset.open_data(FROZEN / name)
        assert (data.kind, len(data), len(data.classes)) == (kind, 60, 10)
        items, labels = data.batch(range(60), np.zeros(60, bool))
        assert items.shape == (60, *shape) and labels.bincount().min() >= 4
        record = storage.read_json(
            FROZEN / {"pixels": "run", "latents": "latent-run"}[name] / "config.json"
        )
        assert data.fingerprint == record["data"]["fingerprint"]


def test_its_statistics_are_read():
    found = extraction.Measured.load(FROZEN / "statistics.safetensors")
    assert (found.count, found.size, found.identity) == (60, 8, "custom plain_features:pooled")
    assert found.mean.shape == (48,) and found.features.shape == (60, 48)


def test_its_checkpoints_are_whole():
    for run in ("run", "latent-run"):
        assert runfolder.newest_whole(FROZEN / run) is not None
