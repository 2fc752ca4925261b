"""tools/fashion_mnist.py, on digits in Fashion-MNIST's place: the package need not be installed."""

import json
import shutil

import fashion_mnist
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, dimr_command

import sampling

pytestmark = pytest.mark.slow


def test_the_judge_recognises_real_images_and_no_noise(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "train")
    shutil.copytree(digits, tmp_path / "test")
    real = fashion_mnist.read(tmp_path / "test")
    images = np.repeat(real.images[..., None], 3, axis=3)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    shares = {}
    for name, made in (("real", images), ("noise", noise)):
        np.savez(tmp_path / f"{name}.npz", arr_0=made, arr_1=real.labels)
        found = fashion_mnist.judge(tmp_path, tmp_path / f"{name}.npz")
        shares[name] = found["accuracy_generated"]
    assert shares["real"] > 0.8
    assert shares["noise"] < 0.3


def test_the_classifier_learns_and_gives_features(digits, tmp_path, monkeypatch):
    for split in ("train", "test"):
        shutil.copytree(digits, tmp_path / split)
    monkeypatch.setattr(fashion_mnist, "EPOCHS", 40)  # of 7 steps
    done = CliRunner().invoke(fashion_mnist.main, ["learn", str(tmp_path), "--res", "8"])
    assert done.exit_code == 0, done.output
    assert float(done.stdout.split()[0]) > 0.8
    real = fashion_mnist.read(tmp_path / "test")
    images = np.repeat(real.images[..., None], 3, axis=3)
    monkeypatch.setenv("FASHION", str(tmp_path))
    found = fashion_mnist.features(torch.from_numpy(images))
    assert found.shape == (len(images), fashion_mnist.FEATURES)
    shares = {}
    for name, made in (("real", images), ("upside down", images[:, ::-1])):
        np.savez(tmp_path / f"{name}.npz", arr_0=made, arr_1=real.labels)
        judged = fashion_mnist.judge(tmp_path, tmp_path / f"{name}.npz")
        shares[name] = judged["classifier_generated"]
    assert shares["real"] == judged["classifier_real"] > shares["upside down"] + 0.2


def test_without_the_package_it_says_what_to_install(tmp_path):
    done = CliRunner().invoke(
        fashion_mnist.main, ["write", str(tmp_path / "out"), "--source", str(tmp_path)]
    )
    assert done.exit_code == 1
    assert "dataset-fashion-mnist" in done.output and "Traceback" not in done.output
    assert CliRunner().invoke(fashion_mnist.main, ["--help"]).exit_code == 0


def test_a_run_is_packed_in_half_precision_with_its_guidance_and_its_record(digits, tmp_path):
    run = tmp_path / "run"
    for number, path in enumerate(sorted(digits.rglob("*.png"))):
        target = tmp_path / ("train", "test")[number % 2] / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    words = ["--data", tmp_path / "train", "--validate", tmp_path / "test", "--out", run]
    dimr_command("train", *words, *SMALL, "--ema-profiles", "0.05,0.10", "--validate-every", 12)
    packed = tmp_path / "packed"
    words = ["pack", run, packed, "--width", 0.05, "--cfg", 4, "--cfg-interval", 0.2, 2]
    done = CliRunner().invoke(fashion_mnist.main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    ours = sampling.load(packed.with_suffix(".safetensors"))
    theirs = sampling.load(run, ema_width=0.05)
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value.half().float())
    settings = ours.resolved(sampling.Settings())
    assert (settings.cfg, settings.cfg_interval) == (4, (0.2, 2))
    record = json.loads(packed.with_suffix(".json").read_text())
    assert record["step"] == 12 and record["ema_width"] == 0.05
    assert record["held_out"][-1]["loss"] > 0
