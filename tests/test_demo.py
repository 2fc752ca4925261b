"""The demo: the main job on real digits, through the command line, with the figures it promises."""

import json
import shlex

import pytest
import torch
from conftest import dimr_command
from inception_weights import weights
from PIL import Image

import runfolder

pytestmark = pytest.mark.slow


def test_the_demo_draws_digits_that_a_classifier_of_other_digits_recognises(tmp_path):
    threads = {"OMP_NUM_THREADS": "2"}
    done = dimr_command("demo", "--json", cwd=tmp_path, env=threads, timeout=1200)
    result = json.loads(done.stdout)
    assert result["accuracy_real"] > 0.9
    assert result["accuracy_generated"] >= 0.9
    assert result["coverage"] >= 0.5
    assert 0.9 < result["nearest_train"] < 1.5
    assert result["seconds"] > 1
    assert len(list((tmp_path / "demo" / "digits").rglob("*.png"))) == 1797
    assert runfolder.checkpoints(tmp_path / "demo" / "run")
    assert Image.open(tmp_path / result["picture"]).width > 300
    check_next_commands(result["next"], tmp_path)


def check_next_commands(commands, cwd):
    """What the demo says to try works as it stands, Inception's weights and patience aside."""
    inception = cwd / "inception.pth"
    torch.save(weights(), inception)
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "dimr"
        if arguments[0] == "eval":
            arguments += ["--inception", inception]
        if arguments[0] == "train":
            arguments[-1] = "2"  # steps
        dimr_command(*arguments, cwd=cwd, timeout=1200)
    assert len(list((cwd / "samples").rglob("class0003*.png"))) >= 16


def test_the_demo_leaves_a_folder_alone_that_holds_something(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    done = dimr_command("demo", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "not empty" in done.stderr
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["mine.txt"]
