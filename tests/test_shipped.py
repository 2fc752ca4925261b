"""The network that comes with the tool: it draws at once, and as well as its record says."""

import ours

import functools
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import fashion_mnist
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DATA, dimr_command

import cli
import downloads
import runfolder
import sampling
import sweeping
from storage import UserError, load_tensors

MOST = 4_000_000  # bytes
COUNT = 100
RECORD = json.loads(ours.shipped("fashion.json").read_text())
JUDGED = RECORD["judged"]


@functools.cache
def recognised(**settings):
    """The share of images from seeds that its record knows nothing of, each class as often, that a
    classifier of real ones takes for what they should be."""
    classifier = fashion_mnist.Classifier()
    tensors, _ = load_tensors(DATA / "fashion-classifier.safetensors")
    classifier.load_state_dict(tensors)
    classes = [i % 10 for i in range(COUNT)]
    seeds = range(2 * 10**6, 2 * 10**6 + COUNT)  # beyond a sweep's, too
    images = sampling.load("fashion").images(classes, seeds, steps=16, **settings)
    return fashion_mnist.recognised(classifier.eval(), images[..., 0], np.array(classes))


@pytest.mark.slow
def test_as_many_are_recognised_as_its_record_says():
    expected = JUDGED["classifier_generated"]
    error = np.sqrt(expected * (1 - expected) * (1 / COUNT + 1 / JUDGED["samples"]))
    assert recognised() == pytest.approx(expected, abs=3 * error)


@pytest.mark.slow
def test_guidance_makes_more_of_them_recognised():
    assert recognised() > recognised(cfg=1) + 0.05


def test_it_is_small_and_says_how_it_came_to_be():
    path = ours.shipped("fashion.safetensors")
    assert path.stat().st_size <= MOST
    generator = sampling.load("fashion")
    assert generator.record["step"] == RECORD["step"]
    assert generator.config.size == 32
    assert generator.classes == [name.partition(" ")[2] for name in fashion_mnist.CLASSES]
    card = json.loads(ours.shipped("fashion.card.json").read_text())
    (measured,) = card["sets"].values()
    assert measured["made"]["weights"] == generator.hash
    assert measured["values"]["fid"]["error"] > 0


def test_its_card_makes_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = json.loads(ours.shipped("fashion.card.json").read_text())
    (measured,) = card["sets"].values()
    _, *words = shlex.split(measured["repeat"][0])
    words[words.index("--seeds") + 1] = "0-1"
    done = CliRunner().invoke(cli.main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout.splitlines()[-1])
    same = ("weights", "cfg", "cfg_interval", "solver", "grid", "steps", "ema_width", "source")
    assert {name: made[name] for name in same} == {name: measured["made"][name] for name in same}


def test_it_advises_its_guidance_and_gives_way_to_any_other():
    generator = sampling.load("fashion")
    advice = generator.record["guidance"]
    settings = generator.resolved(sampling.Settings())
    assert settings.cfg == advice["cfg"] != 1.5
    assert settings.cfg_interval == tuple(advice["cfg_interval"])
    for said in ({"cfg": 2.0}, {"cfg_interval": (0.1, 1.0)}, {"cfg_power": 2.0}):
        settings = generator.resolved(sampling.Settings(**said))
        for name in ("cfg", "cfg_interval", "cfg_power"):
            default = {"cfg": 1.5}.get(name)
            assert getattr(settings, name) == said.get(name, default)
    generator.guide = generator
    assert generator.resolved(sampling.Settings()).cfg == 1


@pytest.mark.slow
def test_without_anything_it_is_drawn_from_and_that_is_said(tmp_path):
    environment = {**os.environ, "DIMR_HOME": str(tmp_path / "cache"), "DIMR_OFFLINE": "1"}
    done = dimr_command("sample", "-n", "2", "--steps", "4", cwd=tmp_path, env=environment)
    assert "drawing from fashion, which comes with dimr" in done.stderr
    assert "dimr weights get xl2r" in done.stderr
    assert "guidance as fashion advises: cfg" in done.stderr
    (grid,) = tmp_path.glob("samples/*/grid.png")
    assert str(grid.relative_to(tmp_path)) in done.stdout
    again = dimr_command("sample", "--class", "388", cwd=tmp_path, env=environment, check=False)
    assert again.returncode == 1 and "xl2r is not in the cache" in again.stderr


@pytest.mark.parametrize("line", ["eval fid -n 20", "sweep -n 20 --steps 1,2"])
def test_what_measures_it_says_its_advice_too(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(256, size=(20, 32, 32, 3), dtype=np.uint8)
    np.savez("real.npz", images)
    words = "--weights fashion --ref real.npz --features plain_features:pooled"
    done = CliRunner().invoke(cli.main, [*line.split(), *words.split()])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("guidance as fashion advises: cfg") == 1


def test_a_class_is_named(tmp_path):
    done = CliRunner().invoke(
        cli.main,
        ["sample", "--weights", "fashion", "--class", "sneaker", "-n", "1", "--steps", "2"]
        + ["--out", str(tmp_path / "out"), "--json"],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["n"] == 1
    assert list((tmp_path / "out").glob("*7*.png"))


def test_a_run_and_the_released_network_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "cache"))
    assert sampling.at_hand() == "fashion"
    checkpoint = tmp_path / "runs/mine/checkpoints/step-0000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    assert sampling.at_hand() is None
    monkeypatch.chdir(tmp_path / "runs")
    assert sampling.at_hand() == "fashion"
    released = downloads.place("xl2r")
    released.parent.mkdir(parents=True)
    released.touch()
    assert sampling.at_hand() is None


def test_it_stands_in_the_list_of_names():
    listed = {item["name"]: item for item in downloads.listing()}
    assert Path(listed["fashion"]["cached"]) == ours.shipped("fashion.safetensors")
    assert downloads.find("fashion") == ours.shipped("fashion.safetensors")
    assert "fashion" in CliRunner().invoke(cli.main, ["weights"]).stdout


def test_advice_that_makes_no_sense_is_refused_with_the_file(tmp_path):
    generator = sampling.load("fashion")
    path = tmp_path / "odd.safetensors"
    for advice in ({"cfg_interval": [0.2, 2]}, {"cfg": 0.5}, {"cfg": 2, "cfg_interval": [2, 0.2]}):
        record = {**generator.record, "guidance": advice}
        runfolder.write_weights(path, generator.model, record)
        with pytest.raises(UserError, match="odd.safetensors does not fit: guidance"):
            sampling.load(path)
    record["guidance"] = {"cfg": 4, "steps": 7, "foo": 1}  # of which only the guidance is taken
    runfolder.write_weights(path, generator.model, record)
    settings = sampling.load(path).resolved(sampling.Settings(steps=3))
    assert (settings.cfg, settings.cfg_interval, settings.steps) == (4, None, 3)


def test_a_sweep_of_guidance_takes_no_advice_and_one_of_steps_does():
    generator = sampling.load("fashion")
    advice = generator.record["guidance"]
    swept = sweeping.Sweep(generator, {"cfg_interval": [None, (0.3, 5.0)]}, sampling.Settings())
    assert [(one.cfg, one.cfg_interval) for one in swept.points()] == [
        (1.5, None),
        (1.5, (0.3, 5.0)),
    ]
    swept = sweeping.Sweep(generator, {"steps": [8, 16]}, sampling.Settings())
    assert [(one.cfg, one.steps) for one in swept.points()] == [
        (advice["cfg"], 8),
        (advice["cfg"], 16),
    ]


@pytest.mark.slow
def test_a_run_of_its_name_is_that_run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "fashion")
    for ema, name in ((True, "fashion"), (False, "fashion-raw")):
        generator = sampling.load("fashion", ema=ema)
        assert generator.name == name
        assert Path(generator.source).is_file() and generator.config.size == 8


def test_what_asks_for_a_run_or_another_network_is_not_drawn_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    for words in (["--ema-width", "0.05"], ["--vae", "nope.pt"], ["--guide", "fashion"]):
        done = CliRunner().invoke(cli.main, ["sample", *words])
        assert done.exit_code == 1 and "drawing from fashion" not in done.output
    assert not (tmp_path / "samples").exists()


def test_no_file_that_ships_names_a_place_of_ours():
    for path in (ours.HERE / "share" / "dimr").glob("fashion.*"):
        if path.suffix in (".json", ".md"):
            assert not re.findall(r"""(?:^|[\s"'`(])/\w""", path.read_text())
