"""Pictures to look at: what their captions, frames and axes say."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import imagesets
import journal
import pictures

FONT = ImageFont.load_default(11)
DRAW = ImageDraw.Draw(Image.new("RGB", (9, 9)))


@pytest.mark.parametrize("text", ["Food & Drink and more · 123456", "giant panda · 7", "3 · 0"])
def test_a_caption_that_is_cut_keeps_its_seed(text):
    seed = text.split(" · ")[1]
    for width in (200, 90, 66):
        cut = pictures.fitted(text, width, DRAW, FONT)
        assert cut.endswith(f" · {seed}")
        assert DRAW.textlength(cut, FONT) <= width
        head = cut.removesuffix(f" · {seed}")
        assert text.startswith(head.removesuffix("…"))
    assert pictures.fitted(text, 1000, DRAW, FONT) == text


def test_a_caption_without_a_seed_is_cut_at_its_end():
    cut = pictures.fitted("0.12 class 7 of many", 60, DRAW, FONT)
    assert cut.startswith("0.12") and cut.endswith("…")
    assert DRAW.textlength(cut, FONT) <= 60


def test_white_images_have_an_edge_and_others_have_none():
    white = np.full((8, 8, 3), 255, np.uint8)
    dark = np.zeros((8, 8, 3), np.uint8)
    sheet = np.asarray(pictures.grid([white, dark], columns=2))
    left, right = np.split(sheet, 2, axis=1)
    assert (left != 255).any()
    frame = pictures.FRAME
    inside = left[frame:-frame, frame:-frame]
    assert (inside == 255).all()  # the hairline lies around the image, not on it
    around = right.copy()
    around[frame:-frame, frame:-frame] = 255
    assert (around == 255).all()


@pytest.mark.parametrize("last", [1, 7, 40, 400, 3493, 300_000, 1_000_000])
def test_ticks_are_round_few_and_within(last):
    ticks = pictures.round_ticks(0, last)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] == 0 and ticks[-1] <= last * (1 + 1e-9)
    step = ticks[1] - ticks[0]
    assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")
    assert np.allclose(np.diff(ticks), step)


@pytest.mark.parametrize("low, high", [(0.08, 1.7), (0.031, 0.033), (1e-5, 1e5), (14, 150)])
def test_heights_are_round_and_within(low, high):
    ticks = pictures.log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert low <= min(ticks) and max(ticks) <= high * (1 + 1e-9)


def test_the_mean_begins_with_the_first_step():
    steps, means = pictures._smoothed([1, 2, 3, 4, 5], [1.0, 3.0, float("nan"), 5.0, 7.0], 2)
    assert steps.tolist() == [1, 2, 4, 5]
    assert means.tolist() == [1, 2, 4, 6]


def words_of(monkeypatch):
    """What is written on pictures from now on."""
    words = []
    original = ImageDraw.ImageDraw.text

    def text(self, place, string, *arguments, **options):
        words.append(string)
        return original(self, place, string, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return words


@pytest.mark.parametrize("extras", [{}, {"fid": 30.0}, {"validation_loss": 0.25}])
def test_loss_png_says_what_it_shows(tmp_path, monkeypatch, extras):
    words = words_of(monkeypatch)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 101):
            line = {"step": step, "loss": 1 / step, "loss_branches": [2 / step, 0.5 / step]}
            if step % 50 == 0:
                line |= extras
            file.write(json.dumps(line) + "\n")
    picture = Image.open(journal.plot(tmp_path))
    assert {"step", "loss (logarithmic)", "100", "0.1"} <= set(words)
    assert ("FID (logarithmic)" in words) == ("fid" in extras)
    assert ("FID 30" in words) == ("fid" in extras)
    assert ("held out 0.25" in words) == ("validation_loss" in extras)
    assert (picture.height > 600) == bool(extras)
    blue = np.asarray(picture.convert("RGB")) == (0x1B, 0x6C, 0xA8)
    columns = np.flatnonzero(blue.all(-1)[:480, :710].any(0))
    assert columns.min() < pictures._Chart.left + 8  # the first steps are there


def test_a_strip_shows_rows_of_seeds_and_columns_of_steps(tmp_path, monkeypatch):
    captions = [f"cat · {seed}" for seed in range(9)]
    for step in (10, 500, 2000):
        images = [np.full((64, 64, 3), 20 * k + step // 100, np.uint8) for k in range(9)]
        imagesets.save_grid(tmp_path / f"step-{step:07d}.png", images, captions)
    words = words_of(monkeypatch)
    imagesets.save_strip(tmp_path, captions, 9)
    assert words == ["10", "500", "2,000", *captions[: imagesets.STRIP[1]]]
    with Image.open(tmp_path / "strip.png") as image:
        assert "not a photograph" in image.text["Description"]
        values = np.asarray(image.convert("L"))
    for row in range(imagesets.STRIP[1]):
        y = pictures.CAPTION + 4 + 68 * row + 34
        for column, step in enumerate((10, 500, 2000)):
            x = values.shape[1] - 3 * 68 + 68 * column + 34
            assert values[y, x] == 20 * row + step // 100


def test_one_grid_makes_no_strip(tmp_path):
    imagesets.save_grid(tmp_path / "step-0000001.png", [np.zeros((8, 8, 1), np.uint8)], ["a · 0"])
    imagesets.save_strip(tmp_path, ["a · 0"], 1)
    assert not (tmp_path / "strip.png").exists()


def test_curves_outlive_a_loss_that_explodes():
    """A running mean that were a difference of sums would be 0 behind it, which has no
    logarithm."""
    values = [2.0] * 30 + [1e30, 1e308, float("inf"), float("nan"), -1.0, 0.0] + [1e-3] * 200
    picture = pictures.curves({"loss": (range(len(values)), values)}, "exploded")
    assert picture.size == (900, 480)
    steps, means = pictures._smoothed(range(len(values)), values, 50)
    assert len(steps) == 231 and means[-1] == pytest.approx(1e-3)
