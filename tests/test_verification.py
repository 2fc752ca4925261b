"""`dimr eval verify` says that this machine computes what ours did, and if not, in which stage."""

import ours

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cli
import dataset
import errors
import fid
import verification
from storage import read_json


@pytest.fixture(scope="module")
def stages():
    return list(verification.stages())


@pytest.fixture(autouse=True)
def once(stages, monkeypatch, request):
    """Computed once, but for what a test says."""
    if "whole" not in request.node.name:
        monkeypatch.setattr(verification, "stages", lambda device: iter(stages))


def test_the_whole_path_computes_what_ours_did():
    result = CliRunner().invoke(cli.main, ["eval", "verify", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["same"] and len(found["stages"]) == 13
    exact = {row["stage"] for row in found["stages"] if row["verdict"] == "bit-equal"}
    assert {"reading images", "weights"} <= exact


@pytest.mark.parametrize("name", ["reading images", "weights", "pool features", "dimr eval fid"])
def test_a_stage_that_differs_is_named(stages, monkeypatch, name):
    changed = []
    for stage in stages:
        values = stage.values
        if stage.name == name:
            values = values.copy()
            values.flat[0] += values.dtype.type(1)
        changed.append(verification.Stage(stage.name, values, stage.tolerance))
    monkeypatch.setattr(verification, "stages", lambda device: iter(changed))
    found = verification.verify("cpu")
    assert not found["same"] and found["first_different"] == name
    result = CliRunner().invoke(cli.main, ["eval", "verify", "--device", "cpu"])
    assert result.exit_code == 1 and f"from {name!r} on" in result.stderr
    assert f"{name}" in result.stdout and "DIFFERENT" in result.stdout


def test_what_differs_in_its_last_bits_is_told_from_what_is_equal(stages, monkeypatch):
    changed = [
        verification.Stage(s.name, s.values * np.float32(1 + 1e-6), s.tolerance)
        if s.name == "pool features"
        else s
        for s in stages
    ]
    monkeypatch.setattr(verification, "stages", lambda device: iter(changed))
    found = {row["stage"]: row["verdict"] for row in verification.verify("cpu")["stages"]}
    assert found["pool features"] == "to rounding"


def half_pixels(images, side):
    x = images.permute(0, 3, 1, 2).float()
    return torch.nn.functional.interpolate(x, (side, side), mode="bilinear")


def plainly_resized(image, size):
    return image.resize((size, size))


def of_all_images(self, *_):
    return self._scatter / self._count


SLIPS = [
    (fid, "resize", half_pixels, "resizing as TensorFlow 1 does"),
    (dataset, "center_crop", plainly_resized, "cropping as ADM does"),
    (fid.Statistics, "covariance", property(of_all_images), "mean and covariance"),
    (errors, "freed", lambda found: found, "dimr eval fid"),
    (fid, "_kernel", lambda x, y: (x @ y.T).double(), "dimr eval kid"),
]


@pytest.mark.parametrize("owner, name, other, stage", SLIPS)
def test_a_slip_shows_in_its_stage_whole(monkeypatch, owner, name, other, stage):
    """As often made: other pixel centres, no crop, N for N − 1, a bias left in, another kernel."""
    monkeypatch.setattr(owner, name, other)
    early = ("resizing", "cropping")
    run = verification.stages if stage.startswith(early) else verification.numbers
    expected = {row["stage"]: row for row in read_json(ours.shipped("verify.json"))["stages"]}
    for found in run(torch.device("cpu")):
        verdict, _ = verification.judge(found, expected[found.name])
        if found.name == stage:
            assert verdict == "DIFFERENT"
            return
        assert verdict != "DIFFERENT"
