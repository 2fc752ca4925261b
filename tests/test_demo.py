"""The demo: the main job on real digits, through the command line, with the figures it promises."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import dimr_command
from PIL import Image

import runfolder

pytestmark = pytest.mark.slow


SHORT = """
import dataclasses, cli, recipes
table = recipes.RECIPES
table["demo"] = dataclasses.replace(table["demo"], steps=60, warmup=5)
cli.main()
"""


@pytest.mark.long
def test_the_demo_draws_digits_that_a_classifier_of_other_digits_recognises(tmp_path):
    result = json.loads(dimr_command("demo", "--json", cwd=tmp_path, timeout=1200).stdout)
    assert result["accuracy_generated"] >= 0.9
    assert result["coverage"] >= 0.5
    assert 0.9 < result["nearest_train"] < 1.5
    check_what_is_left(result, tmp_path)


def test_the_demo_leaves_what_it_says_and_the_commands_it_names_work(tmp_path):
    """With noise for digits: 60 steps."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT, "demo", "--json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["accuracy_generated"] < 0.5  # it is judged, not taken for granted
    assert result["coverage"] < 0.5
    check_what_is_left(result, tmp_path)
    check_next_commands(result["next"], tmp_path)


def check_what_is_left(result, place):
    assert result["accuracy_real"] > 0.9
    assert result["seconds"] > 1
    assert len(list((place / "demo" / "digits").rglob("*.png"))) == 1797
    assert runfolder.checkpoints(place / "demo" / "run")
    assert Image.open(place / result["picture"]).width > 300


def check_next_commands(commands, cwd):
    """What the demo says to try works as it stands, Inception and patience aside."""
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "dimr"
        if arguments[0] == "eval":
            arguments += ["--features", "plain_features:pooled"]
        if arguments[0] == "train":
            arguments[arguments.index("--steps") + 1] = "2"
        environment = {"PYTHONPATH": str(Path(__file__).parent)}
        dimr_command(*arguments, cwd=cwd, env=environment, timeout=600)
    assert len(list((cwd / "samples").rglob("class0003*.png"))) >= 16


def test_the_demo_leaves_a_folder_alone_that_holds_something(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    done = dimr_command("demo", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "not empty" in done.stderr
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["mine.txt"]
