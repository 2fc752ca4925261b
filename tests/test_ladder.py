"""tools/ladder.py, on digits in Fashion-MNIST's place and small enough to be climbed in a test."""

import json
import shutil
import subprocess
import sys

import fashion_mnist
import ladder
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import storage


@pytest.mark.long
@pytest.mark.slow
def test_a_row_is_climbed_once_and_said_with_its_figures(digits, tmp_path, monkeypatch):
    data = tmp_path / "data"
    for number, path in enumerate(sorted(digits.rglob("*.png"))):
        split = ("train", "test")[number % 2]
        (data / split / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, data / split / path.parent.name)
    monkeypatch.setattr(fashion_mnist, "EPOCHS", 1)
    assert CliRunner().invoke(fashion_mnist.main, ["learn", str(data), "--res", "8"]).exit_code == 0
    small = {"6": ("multi-scale loss", "--layers 1,1 --dims 8,8 --heads 1")}
    for name, value in (("RES", 8), ("RATES", (1e-3,)), ("ROWS", small)):
        monkeypatch.setattr(ladder, name, value)
    words = [data, "--out", tmp_path / "out", "--seeds", 1, "--images", 128, "--rate-images", 64]
    words = [str(word) for word in (*words, "--samples", 40)]
    done = CliRunner().invoke(ladder.main, words)
    assert done.exit_code == 0, done.output
    tried, climbed = storage.read_json(tmp_path / "out" / "ladder.json")
    assert tried["seed"] == ladder.RATE_SEED and "fid" not in tried
    assert climbed["seed"] == 0 and climbed["fid_error"] > 0
    assert climbed["seconds"] >= 0 and (tmp_path / "out" / "ladder.png").is_file()
    assert set(ladder.FIGURES) <= set(climbed)
    assert f"{climbed['fid']:.2f} ± " in done.output
    before = (tmp_path / "out" / "ladder.json").read_bytes()
    shutil.rmtree(tmp_path / "out" / "runs")
    again = CliRunner().invoke(ladder.main, words)  # nothing is left to do
    assert again.exit_code == 0 and "multi-scale loss" in again.output
    assert (tmp_path / "out" / "ladder.json").read_bytes() == before
    assert not (tmp_path / "out" / "runs").exists()


def test_a_second_call_is_refused_in_one_line_while_the_first_is_at_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load_classifier", lambda data, res: None)
    holds = (
        "import sys, time, storage\n"
        "with storage.locked(sys.argv[1]):\n"
        "    print(flush=True)\n"
        "    time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", holds, tmp_path], cwd=ladder.ROOT, stdout=subprocess.PIPE
    )
    try:
        first.stdout.readline()
        done = CliRunner().invoke(ladder.main, [str(tmp_path), "--out", str(tmp_path)])
    finally:
        first.kill()
        first.communicate()
    assert done.exit_code == 1 and len(done.output.splitlines()) == 1
    assert done.output.startswith("Error: ") and f"in use by process {first.pid}" in done.output


def test_the_rate_is_the_one_of_lowest_loss_and_none_before_all_were_tried(tmp_path):
    one = ladder.Ladder(tmp_path, tmp_path, images=200, rate_images=100, samples=10)
    for rate, loss in zip(ladder.RATES, (0.2, 0.1, 0.3), strict=True):
        assert one.best_rate("3") is None
        seed = ladder.RATE_SEED
        one.add({"row": "3", "rate": rate, "seed": seed, "images": 100, "loss": loss})
    assert one.best_rate("3") == ladder.RATES[1]
    assert one.best_rate("4") is None


def test_the_table_has_errors_over_seeds_and_differences_of_neighbours(tmp_path):
    one = ladder.Ladder(tmp_path, tmp_path, images=200, rate_images=100, samples=10)
    for row, values in (("1", (10.0, 14.0)), ("2", (5.0, 7.0))):
        for seed, value in enumerate(values):
            figures = dict.fromkeys(ladder.FIGURES, 0.5)
            figures["fid"] = value
            one.add({"row": row, "rate": 0.01, "seed": seed, "images": 200, **figures})
    lines = ladder.table(one).splitlines()
    assert "12.00 ± 1.58" in lines[1]  # variances 8 and 2, 5 on average, of two seeds
    assert "6.00 ± 1.58" in lines[2]
    assert "-6.00 ± 2.24" in lines[3]


def test_the_picture_has_a_line_of_images_for_each_row_whose_run_is_there(tmp_path):
    one = ladder.Ladder(tmp_path, tmp_path, images=200, rate_images=100, samples=10)
    ladder.draw(one)
    assert not list(tmp_path.iterdir())  # nothing to draw
    for row, grey in (("1", 50), ("4", 200)):
        one.add({"row": row, "rate": 0.01, "seed": 0, "images": 200})
        run = one.run(row, 0.01, 0, 200)
        run.mkdir(parents=True)
        lines = [{"step": step, "loss": 1, "loss_branches": [5, 0.5]} for step in range(1, 30)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        images = np.full((30, 16, 16, 3), grey, np.uint8)
        np.savez(ladder.samples_of(run), images, np.arange(30) % 10)
    one.add({"row": "6", "rate": 0.01, "seed": 0, "images": 200})  # its run was deleted
    ladder.draw(one)
    with Image.open(tmp_path / "ladder.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    lines = [set(half[half.shape[0] // 3].tolist()) for half in np.split(pixels, 2)]
    assert 50 in lines[0] and 200 not in lines[0]
    assert 200 in lines[1] and 50 not in lines[1]
    assert (tmp_path / "loss.png").is_file()


def test_every_run_has_its_samples_in_a_file_of_its_own(tmp_path):
    one = ladder.Ladder(tmp_path, tmp_path, images=200, rate_images=100, samples=10)
    assert len({ladder.samples_of(one.run("1", 0.01, seed, 200)) for seed in range(3)}) == 3
