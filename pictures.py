"""Pictures to look at: grids of images, curves, bars and colours, drawn with Pillow alone."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from storage import writing

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f", "#c98b1b", "#3d3d3d")
TILE = 64  # pixels that an image of a grid has at least
FRAME = 2  # pixels of white around each
CAPTION = 14  # pixels of height


def to_image(array: np.ndarray) -> Image.Image:
    """PIL image of a uint8 array (H, W, C) with 1 or 3 channels."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def grid(
    images: Iterable[np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    tile: int | None = None,
) -> Image.Image:
    """One PIL image of uint8 `images` (N, H, W, C), row by row, each enlarged by a whole factor to
    about `tile` pixels (default: at least TILE) with its caption underneath."""
    images = list(images)
    height, width = images[0].shape[:2]
    factor = max(1, round((tile or max(TILE, height)) / height))
    height *= factor
    width *= factor
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    cell_width = width + 2 * FRAME
    cell_height = height + 2 * FRAME
    if captions:
        cell_height += CAPTION
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, image in enumerate(images):
        x = i % columns * cell_width + FRAME
        y = i // columns * cell_height + FRAME
        sheet.paste(to_image(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if captions:
            text = captions[i]
            while len(text) > 1 and draw.textlength(text, font) > cell_width - FRAME:
                text = text[:-2] + "…"
            draw.text((x, y + height), text, "black", font)
    return sheet


@dataclasses.dataclass(frozen=True)
class _Chart:
    """Where the points of a chart of `width` by `height` pixels lie: steps from 0 to `last`,
    heights from 10^low to 10^high."""

    last: float
    low: float
    high: float
    width: int = 900
    height: int = 480
    left: int = 70
    right: int = 190
    top: int = 40
    bottom: int = 40

    def x(self, step):
        return self.left + (self.width - self.left - self.right) * step / self.last

    def y(self, value):
        below = self.high - math.log10(value)
        return self.top + (self.height - self.top - self.bottom) * below / (self.high - self.low)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, smooth: int = 50
) -> Image.Image:
    """A PIL line chart with logarithmic heights. `series`: name → (steps, values); a running mean
    over `smooth` values is drawn, and where it ends is written beside the name."""
    lines = {}
    for name, (steps, values) in series.items():
        steps, values = _smoothed(steps, values, smooth)
        if len(steps):
            lines[name] = steps, values
    picture = Image.new("RGB", (_Chart.width, _Chart.height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    draw.text((_Chart.left, 12), title, "black", font)
    if not lines:
        return picture
    chart = _Chart(
        last=max(1, *(steps[-1] for steps, _ in lines.values())),
        low=math.log10(min(values.min() for _, values in lines.values())) - 0.02,
        high=math.log10(max(values.max() for _, values in lines.values())) + 0.02,
    )
    _draw_axes(draw, font, chart)
    for i, (name, (steps, values)) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [(chart.x(s), chart.y(v)) for s, v in zip(steps, values, strict=True)]
        if len(points) == 1:
            points = points * 2  # a line of one point is not drawn
        draw.line(points, colour, 2)
        place = (chart.width - chart.right + 8, chart.top + 18 * i)
        draw.text(place, f"{name} {values[-1]:.4g}", colour, font)
    return picture


def _smoothed(steps, values, window):
    """Steps and running means of the values that have a logarithm."""
    steps = np.asarray(steps)
    values = np.asarray(values, float)
    keep = np.isfinite(values) & (values > 0)
    window = min(window, keep.sum())
    if window == 0:
        return steps[:0], values[:0]
    means = np.convolve(values[keep], np.ones(window) / window, "valid")
    return steps[keep][window - 1 :], means


def _draw_axes(draw, font, chart):
    for power in np.linspace(chart.low, chart.high, 6):
        y = chart.y(10**power)
        draw.line((chart.left, y, chart.width - chart.right, y), "#dddddd")
        draw.text((6, y - 8), f"{10**power:.4g}", "black", font)
    for step in np.linspace(0, chart.last, 5):
        y = chart.height - chart.bottom + 8
        draw.text((chart.x(step) - 10, y), f"{step:,.0f}", "black", font)


BAR_CHART = (220, 150)  # pixels of each chart of `bars`, its texts included


def bars(charts: Sequence[Sequence[tuple[str, Sequence[float]]]], title: str) -> Image.Image:
    """A PIL picture of rows of bar charts: (title, heights between 0 and 1) each, the bars numbered
    from 1, the first two with their heights in per cent."""
    width, height = BAR_CHART
    columns = max(len(row) for row in charts)
    picture = Image.new("RGB", (columns * width + 20, len(charts) * height + 40), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 10), title, "black", ImageFont.load_default(14))
    for i, row in enumerate(charts):
        for j, (name, heights) in enumerate(row):
            _draw_bars(draw, (10 + j * width, 36 + i * height), name, heights)
    return picture


def _draw_bars(draw, corner, name, heights):
    left, top = corner
    font = ImageFont.load_default(11)
    first, last = left + 30, left + BAR_CHART[0] - 12
    ceiling, floor = top + 32, top + BAR_CHART[1] - 22

    def y(share):
        return floor - (floor - ceiling) * share

    draw.text((first, top), name, "black", ImageFont.load_default(12))
    for share in (0, 0.5, 1):
        draw.line((first, y(share), last, y(share)), "#dddddd")
        draw.text((left, y(share) - 7), f"{share:g}", "black", font)
    step = (last - first) / max(1, len(heights))
    for k, share in enumerate(heights):
        x = first + k * step
        draw.rectangle((x + 3, min(y(share), floor - 1), x + step - 3, floor), COLOURS[0])
        draw.text((x + step / 2 - 3, floor + 3), str(k + 1), "black", font)
        if k < 2:
            draw.text((x + 2, y(share) - 13), f"{100 * share:.0f}%", "black", font)


def diverging(values: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of values (H, W): white at 0, red at 1 and above, blue at −1 and below."""
    strength = np.clip(np.abs(values), 0, 1)[..., None]
    end = np.where(values[..., None] > 0, (178, 24, 43), (33, 102, 172))
    return np.round(255 + (end - 255) * strength).astype(np.uint8)


def titled(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The picture under some lines of text, widened if need be."""
    font = ImageFont.load_default(13)
    measure = ImageDraw.Draw(picture)
    width = max(picture.width, *(math.ceil(measure.textlength(line, font)) + 20 for line in lines))
    above = 10 + 18 * len(lines)
    sheet = Image.new("RGB", (width, picture.height + above), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((10, 4 + 18 * i), line, "black", font)
    sheet.paste(picture, (0, above))
    return sheet


def save(picture: Image.Image, path: str | Path, **options) -> None:
    """Write a PIL image as PNG, whole or not at all."""
    with writing(path) as file:
        picture.save(file, "PNG", **options)
