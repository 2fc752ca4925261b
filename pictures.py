"""Pictures to look at: grids of images, curves, bars and colours, drawn with Pillow alone."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from storage import shown, writing

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f", "#c98b1b", "#3d3d3d")
TILE = 64  # pixels that an image of a grid has at least
FRAME = 2  # pixels of white around each
CAPTION = 14  # pixels of height
PALE = 235  # mean grey of an edge from which an image gets a hairline around it
HAIRLINE = "#bbbbbb"
HIGHEST = 1e200  # of a value that is drawn
FEW = 20  # points of a curve, up to which each is marked


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
        tile_image = to_image(image)
        sheet.paste(tile_image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        if is_pale(tile_image):
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=HAIRLINE)
        if captions:
            text = fitted(captions[i], cell_width - FRAME, draw, font)
            draw.text((x, y + height), text, "black", font)
    return sheet


def fitted(text: str, width: float, draw: ImageDraw.ImageDraw, font) -> str:
    """`text` cut to `width` pixels: what stands before its last " · ", if there is one, so that the
    seed after it stays."""
    head, dot, tail = shown(text).rpartition(" · ")
    if not dot:
        head, tail = tail, ""
    whole = head
    while head and draw.textlength(_short(head, whole) + dot + tail, font) > width:
        head = head[:-1]
    return _short(head, whole) + dot + tail


def _short(head, whole):
    return head if head == whole else head + "…"


def is_pale(image: Image.Image) -> bool:
    """Whether the edge of an image can't be told from white paper."""
    values = np.asarray(image.convert("L"))
    edge = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    return edge.mean() > PALE


def strip(
    sheets: Sequence[tuple[str, Image.Image]],
    captions: Sequence[str],
    count: int,
) -> Image.Image:
    """One PIL image of how pictures change: a column for each (name, sheet) of `sheets`, which
    `grid` made of `count` images each, and a row for each of the first ones, as many as there are
    `captions`."""
    columns = math.ceil(count**0.5)
    first = sheets[0][1]
    cell = first.width // columns
    height = first.height // math.ceil(count / columns)
    font = ImageFont.load_default(11)
    measure = ImageDraw.Draw(first).textlength
    captions = [shown(text) for text in captions]
    left = math.ceil(max(measure(text, font) for text in captions)) + 8
    side = cell - 2 * FRAME
    picture = Image.new(
        "RGB", (left + len(sheets) * cell, CAPTION + 4 + len(captions) * cell), "white"
    )
    draw = ImageDraw.Draw(picture)
    for column, (name, sheet) in enumerate(sheets):
        x = left + column * cell
        draw.text((x + FRAME, 2), name, "black", font)
        for row in range(len(captions)):
            corner = (row % columns * cell, row // columns * height)
            # the hairline of pale images too
            box = (corner[0], corner[1], corner[0] + cell, corner[1] + side + 2 * FRAME - 1)
            picture.paste(sheet.crop(box), (x, CAPTION + 4 + row * cell))
    for row, text in enumerate(captions):
        draw.text((2, CAPTION + 4 + row * cell + side // 2 - 6), text, "black", font)
    return picture


@dataclasses.dataclass(frozen=True)
class _Chart:
    """Where the points of a chart of `width` by `height` pixels lie: steps from 0 to `last`,
    logarithms of values from `low` to `high`."""

    last: float
    low: float
    high: float
    width: int = 900
    height: int = 480
    left: int = 84
    right: int = 190
    top: int = 44
    bottom: int = 52

    def x(self, step):
        return self.left + (self.width - self.left - self.right) * step / self.last

    def y(self, value):
        below = self.high - math.log10(value)
        return self.top + (self.height - self.top - self.bottom) * below / (self.high - self.low)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    smooth: int = 50,
    axes: tuple[str, str] = ("step", "loss"),
    first_colour: int = 0,
) -> Image.Image:
    """A PIL line chart with logarithmic heights, which it says. `series`: name → (steps, values); a
    running mean over the last `smooth` values is drawn (over fewer at the start), and where it ends
    is written beside the name."""
    lines = {}
    for name, (steps, values) in series.items():
        window = 1 if len(values) <= FEW else smooth  # few are measurements of their own
        steps, values = _smoothed(steps, values, window)
        if len(steps):
            lines[name] = steps, values
    picture = Image.new("RGB", (_Chart.width, _Chart.height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    draw.text((_Chart.left, 10), shown(title), "black", font)
    if not lines:
        return picture
    chart = _Chart(
        last=max(1, *(steps[-1] for steps, _ in lines.values())),
        low=math.log10(min(values.min() for _, values in lines.values())) - 0.02,
        high=math.log10(max(values.max() for _, values in lines.values())) + 0.02,
    )
    _draw_axes(draw, font, chart, axes)
    for i, (name, (steps, values)) in enumerate(lines.items(), first_colour):
        colour = COLOURS[i % len(COLOURS)]
        points = [(chart.x(s), chart.y(v)) for s, v in zip(steps, values, strict=True)]
        draw.line(points, colour, 2)
        if len(points) <= FEW:
            for x, y in points:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        row = i - first_colour
        place = (chart.width - chart.right + 8, chart.top + 18 * row)
        draw.text(place, f"{name} {values[-1]:.4g}", colour, font)
    return picture


def stacked(charts: Sequence[Image.Image]) -> Image.Image:
    """Pictures, one below the other."""
    width = max(chart.width for chart in charts)
    picture = Image.new("RGB", (width, sum(chart.height for chart in charts)), "white")
    y = 0
    for chart in charts:
        picture.paste(chart, (0, y))
        y += chart.height
    return picture


def _smoothed(steps, values, window):
    """Steps and running means of the values that have a logarithm."""
    steps = np.asarray(steps)
    values = np.asarray(values, float)
    keep = (values > 0) & (values < HIGHEST)
    steps = steps[keep]
    values = values[keep]
    sums = np.zeros(len(values))
    for back in range(min(window, len(values))):  # differences of one sum would lose small values
        sums[back:] += values[: len(values) - back]
    return steps, sums / np.minimum(np.arange(1, len(values) + 1), window)


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, `most` of them at most."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    while math.floor(high / step) - math.ceil(low / step) + 1 > most:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round heights between `low` and `high` for a logarithmic axis."""
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            if low <= digit * 10.0**power <= high:
                found.append(digit * 10.0**power)
    if len(found) < 3:
        return [tick for tick in round_ticks(low, high) if tick > 0]
    if len(found) > 9:  # powers of ten alone
        return [tick for tick in found if f"{tick:e}"[0] == "1"]
    return found


def _draw_axes(draw, font, chart, axes):
    right = chart.width - chart.right
    base = chart.height - chart.bottom
    for value in log_ticks(10**chart.low, 10**chart.high):
        y = chart.y(value)
        draw.line((chart.left, y, right, y), "#dddddd")
        text = f"{value:.4g}"
        draw.text((chart.left - 8 - draw.textlength(text, font), y - 8), text, "black", font)
    for step in round_ticks(0, chart.last):
        x = chart.x(step)
        draw.line((x, base, x, base + 4), "black")
        text = f"{step:,.0f}"
        draw.text((x - draw.textlength(text, font) / 2, base + 6), text, "black", font)
    draw.line((chart.left, base, right, base), "black")
    across, up = axes
    middle = (chart.left + right - draw.textlength(across, font)) / 2
    draw.text((middle, base + 26), across, "black", font)
    draw.text((6, chart.top - 16), f"{up} (logarithmic)", "black", font)


BAR_CHART = (220, 150)  # pixels of each chart of `bars`, its texts included


def bars(charts: Sequence[Sequence[tuple[str, Sequence[float]]]], title: str) -> Image.Image:
    """A PIL picture of rows of bar charts: (title, heights between 0 and 1) each, the bars numbered
    from 1, the first two with their heights in per cent."""
    width, height = BAR_CHART
    columns = max(len(row) for row in charts)
    picture = Image.new("RGB", (columns * width + 20, len(charts) * height + 40), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 10), shown(title), "black", ImageFont.load_default(14))
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


def error_bars(
    names: Sequence[str],
    estimates: Sequence[tuple[float, float | None]],
    title: str,
    axes: tuple[str, str],
    marked: Sequence[int] = (),
) -> Image.Image:
    """A PIL chart of (value, error) by name, evenly spaced: a curve with bars of one error to each
    side. Those whose numbers are `marked` are filled, others hollow."""
    low = min(value - (error or 0) for value, error in estimates)
    high = max(value + (error or 0) for value, error in estimates)
    margin = 0.06 * (high - low) or 1.0
    chart = _Plane(low - margin, high + margin, len(names))
    picture = Image.new("RGB", (chart.width, chart.height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    draw.text((chart.left, 10), title, "black", font)
    for tick in round_ticks(chart.low, chart.high):
        draw.line((chart.left, chart.y(tick), chart.width - 20, chart.y(tick)), "#dddddd")
        text = f"{tick:.4g}"
        corner = (chart.left - 8 - draw.textlength(text, font), chart.y(tick) - 8)
        draw.text(corner, text, "black", font)
    points = [(chart.x(k), chart.y(value)) for k, (value, _) in enumerate(estimates)]
    draw.line(points, COLOURS[0], 2)
    for k, (value, error) in enumerate(estimates):
        x, y = points[k]
        draw.line((x, chart.y(value - (error or 0)), x, chart.y(value + (error or 0))), COLOURS[0])
        fill = COLOURS[1] if k in marked else "white"
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill, COLOURS[0])
        text = fitted(names[k], chart.step - 4, draw, font)
        draw.text((x - draw.textlength(text, font) / 2, chart.bottom + 6), text, "black", font)
    across, up = axes
    middle = (chart.left + chart.width - draw.textlength(across, font)) / 2
    draw.text((middle, chart.bottom + 24), across, "black", font)
    draw.text((6, 28), up, "black", font)
    return picture


@dataclasses.dataclass(frozen=True)
class _Plane:
    """Where the points of a chart lie: `count` of them evenly across, values from low to high."""

    low: float
    high: float
    count: int
    width: int = 900
    height: int = 420
    left: int = 84
    top: int = 48

    @property
    def bottom(self):
        return self.height - 48

    @property
    def step(self):
        return (self.width - self.left - 20) / self.count

    def x(self, k):
        return self.left + (k + 0.5) * self.step

    def y(self, value):
        share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * share


CELL = (104, 44)  # pixels of a heat map's


def heat_map(
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Mapping[tuple[int, int], tuple[float, str]],
    title: str,
    axes: tuple[str, str],
    marked: Sequence[tuple[int, int]] = (),
    span: tuple[float, float] | None = None,
) -> Image.Image:
    """A PIL table of coloured cells (row, column) → (value, text), the lowest dark, by the lowest
    and highest of these, or of all charts, their `span`. Those `marked` have a frame; where a cell
    is missing, paper shows."""
    values = [value for value, _ in cells.values()]
    low, highest = span or (min(values), max(values))
    reach = (highest - low) or 1.0
    font = ImageFont.load_default(13)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    left = math.ceil(max(measure(text, font) for text in [*rows, axes[1]])) + 20
    wide, high = CELL
    width = max(left + len(columns) * wide + 10, math.ceil(measure(title, font)) + 20)
    picture = Image.new("RGB", (width, 76 + len(rows) * high), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((10, 8), title, "black", font)
    draw.text((10, 50), axes[1], "black", font)
    draw.text((left, 30), axes[0], "black", font)
    for j, name in enumerate(columns):
        draw.text((left + j * wide + 4, 50), fitted(name, wide - 8, draw, font), "black", font)
    for i, name in enumerate(rows):
        draw.text((10, 70 + i * high + high // 2 - 8), name, "black", font)
    for (i, j), (value, text) in cells.items():
        box = (left + j * wide, 70 + i * high, left + (j + 1) * wide - 2, 70 + (i + 1) * high - 2)
        share = (value - low) / reach
        dark, pale = (33, 102, 172), (247, 247, 247)
        colour = tuple(round(a + (b - a) * share) for a, b in zip(dark, pale, strict=True))
        draw.rectangle(box, colour)
        if (i, j) in marked:
            draw.rectangle(box, outline=COLOURS[1], width=3)
        ink = "black" if share > 0.45 else "white"
        draw.text((box[0] + 6, box[1] + high // 2 - 9), text, ink, font)
    return picture


def diverging(values: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of values (H, W): white at 0, red at 1 and above, blue at −1 and below."""
    strength = np.clip(np.abs(values), 0, 1)[..., None]
    end = np.where(values[..., None] > 0, (178, 24, 43), (33, 102, 172))
    return np.round(255 + (end - 255) * strength).astype(np.uint8)


def titled(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The picture under some lines of text, widened if need be."""
    font = ImageFont.load_default(13)
    lines = [shown(line) for line in lines]
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
