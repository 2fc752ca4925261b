"""Averages judged by width and step."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA, dimr_command
from PIL import Image

import averaging
import cli
import recipes
import runfolder
import training
import validation
import widths
from storage import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("widths") / "run"
    training.train(
        out,
        training.Source(digits, workers=0),
        recipe={"steps": 24, "batch_size": 16, "ema_profiles": (0.05, 0.1), "ema_every": 2},
        network={"layers": (1, 1), "dims": (32, 16), "heads": 2},
        device="cpu",
        saving=training.Saving(sample_every=0),
        quiet=True,
    )
    return out


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Two noisy images of each of the ten classes."""
    folder = tmp_path_factory.mktemp("held")
    draw = np.random.default_rng(0)
    for name in range(10):
        (folder / str(name)).mkdir()
        for k in range(2):
            values = draw.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(values).save(folder / str(name) / f"{k}.png")
    return folder


@pytest.mark.slow
def test_each_average_has_the_loss_of_the_weights_that_dimr_ema_writes(run, held, tmp_path):
    judge = widths.Judge(held)
    found = widths.plot(run, judge, widths=(0.075, 0.12, 0.9), steps=2, device="cpu", quiet=True)
    assert {(point["step"], point["width"]) for point in found["points"]} >= {
        (24, 0.075),
        (24, 0.12),
    }
    assert found["outside"] >= 2  # no width reaches to 0.9
    assert found["best"]["value"] == min(point["value"] for point in found["points"])
    made = averaging.write(run, 0.12, 24, tmp_path / "wide.safetensors")
    model, _ = runfolder.read_weights(made["out"])
    recipe = recipes.Recipe(**runfolder.read_config(run)["recipe"])
    state = training.State(model, recipe, CPU)
    data = recipes.open_data(training.Source(runfolder.read_config(run)["data"]["path"]), None)
    measured, _ = validation.measure(state, validation.HeldOut(held, data), workers=0)
    loss = {(point["step"], point["width"]): point["value"] for point in found["points"]}
    assert loss[24, 0.12] == pytest.approx(measured["validation_loss"], rel=1e-6)
    assert loss[24, 0.12] != loss[24, 0.075]
    assert json.loads((run / "averages" / "widths-loss.json").read_text()) == {
        key: found[key] for key in ("run", "judge", "points", "best", "outside")
    }
    with Image.open(found["picture"]) as picture:
        assert picture.width > 100


@pytest.mark.slow
def test_the_command_judges_by_fid_too(run, digits, tmp_path):
    weights = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    options = ["--features", "plain_features:pooled", "-n", "20", "--ref", str(digits)]
    out = ["--device", "cpu", "--json", str(tmp_path / "table.png")]
    done = CliRunner().invoke(cli.main, ["ema", str(run), "--plot", "fid", *options, *out])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["judge"] == "fid" and found["best"]["value"] > 0
    assert (tmp_path / "table.png").exists() and (tmp_path / "table.json").exists()
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == weights


@pytest.mark.slow
def test_of_several_processes_one_tells_of_it(run, held, tmp_path):
    out = tmp_path / "table.png"
    done = dimr_command("ema", run, "--plot", "loss", "--validate", held, out, torchrun=2)
    assert done.stdout.count("averages of") == 1
    assert out.exists()


@pytest.mark.slow
def test_a_run_that_was_not_validated_needs_images(run):
    with pytest.raises(UserError, match="give --validate DATA, or --plot fid"):
        widths.plot(run, widths.Judge(), device="cpu", quiet=True)


def test_a_run_without_snapshots_is_told_how_to_keep_them():
    with pytest.raises(UserError, match="--ema-profiles 0.05,0.10"):
        widths.plot(DATA / "v0.1.0" / "run", widths.Judge(), device="cpu", quiet=True)


@pytest.mark.parametrize("words", [["--plot", "loss", "--width", "0.1"], []])
def test_a_width_and_a_plot_are_two_things_and_one_is_needed(words):
    done = CliRunner().invoke(cli.main, ["ema", "somewhere", *words])
    assert done.exit_code == 2 and "--plot" in done.output
