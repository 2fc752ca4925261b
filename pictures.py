"""Pictures to look at: grids of images and curves of a run, drawn with Pillow alone."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from storage import writing

COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f", "#c98b1b", "#3d3d3d")


def to_image(array):
    """PIL image of a uint8 array (H, W, C) with 1 or 3 channels."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def grid(images, captions=None, columns=None, tile=None):
    """One PIL image of uint8 `images` (N, H, W, C), row by row, each enlarged by a whole factor to
    about `tile` pixels (default: at least 64) with its caption underneath."""
    images = list(images)
    height, width = images[0].shape[:2]
    factor = max(1, round((tile or max(64, height)) / height))
    columns = columns or math.ceil(len(images) ** 0.5)
    font = ImageFont.load_default(11)
    room = 14 if captions else 0
    cell_w, cell_h = width * factor + 4, height * factor + 4 + room
    sheet = Image.new("RGB", (columns * cell_w, math.ceil(len(images) / columns) * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * cell_w + 2, i // columns * cell_h + 2
        sheet.paste(
            to_image(image).resize((width * factor, height * factor), Image.Resampling.NEAREST),
            (x, y),
        )
        if captions:
            text = captions[i]
            while len(text) > 1 and draw.textlength(text, font) > cell_w - 2:
                text = text[:-2] + "…"
            draw.text((x, y + height * factor), text, "black", font)
    return sheet


def curves(series, title, smooth=50):
    """A PIL line chart with logarithmic heights. `series`: name → (steps, values); a running mean
    over `smooth` values is drawn, and where it ends is written beside the name."""
    width, height, left, top, bottom = 900, 480, 70, 40, 40
    chart = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(chart), ImageFont.load_default(13)
    draw.text((left, 12), title, "black", font)
    lines = {}
    for name, (steps, values) in series.items():
        values = np.asarray(values, float)
        keep = np.isfinite(values) & (values > 0)
        if keep.any():
            steps, values = np.asarray(steps)[keep], values[keep]
            window = min(smooth, len(values))
            mean = np.convolve(values, np.ones(window) / window, "valid")
            lines[name] = steps[window - 1 :], mean
    if lines:
        last = max(max(steps[-1] for steps, _ in lines.values()), 1)
        low = math.log10(min(v.min() for _, v in lines.values())) - 0.02
        high = math.log10(max(v.max() for _, v in lines.values())) + 0.02

        def at_x(step):
            return left + (width - left - 190) * step / last

        def at_y(value):
            return top + (height - top - bottom) * (high - math.log10(value)) / (high - low)

        for power in np.linspace(low, high, 6):
            y = at_y(10**power)
            draw.line((left, y, width - 190, y), "#dddddd")
            draw.text((6, y - 8), f"{10**power:.4g}", "black", font)
        for step in np.linspace(0, last, 5):
            draw.text((at_x(step) - 10, height - bottom + 8), f"{step:,.0f}", "black", font)
        for i, (name, (steps, values)) in enumerate(lines.items()):
            points = [(at_x(s), at_y(v)) for s, v in zip(steps, values, strict=True)]
            colour = COLOURS[i % len(COLOURS)]
            draw.line(points if len(points) > 1 else points * 2, colour, 2)
            draw.text((width - 182, top + 18 * i), f"{name} {values[-1]:.4g}", colour, font)
    return chart


def save(picture, path, **options):
    """Write a PIL image as PNG, whole or not at all."""
    with writing(path) as file:
        picture.save(file, "PNG", **options)
