"""What training takes where neither a named variant nor the user says: a network in proportion to
the data, and a recipe in proportion to the network and to the length of the run.

Learning rates lie on one line with the demo's and the paper's (8e-3 at width 64, 3e-4 at 768, 2e-4
at 960); warm-up and the weights' average take parts of the run."""

import ours

import math
from collections.abc import Mapping

import dataset
import dimr
import networks
import space

OWN = "own"  # what config.json calls the variant of a run that took these

COARSEST = 16  # cells that the coarsest grid is wide, at most
MANY = 200_000  # images from which the network is twice as wide
# up to this size in pixels: layers of the coarsest branch and of the others, its width
PIXELS = {8: (3, 2, 64), 32: (5, 3, 96), 64: (9, 5, 192), math.inf: (9, 5, 256)}
LATENTS = (13, 7, 384)

SMALL = 32  # pixels up to which a batch is small
PASSES = 100  # over the data, in a run of unsaid length
SHORTEST = 5_000  # steps of such a run
LONGEST = 200_000
WARMUP = 20  # a run has so many warm-ups
AVERAGE = 10  # and so many spans of the weights' average
PAPER_WARMUP = 5000
PAPER_AVERAGE = 10_000  # steps: a decay of 0.9999


def network(data: dataset.Data, given: Mapping = {}) -> dimr.Config:  # noqa: B006 (read alone)
    """A network for `data` (as dataset.open_data gives it). Of the fields `given`, layers and dims
    say how many branches it has, and dims how wide it is. Raises ValueError for what makes none."""
    theirs = space.of_data(data)
    first, others, width = LATENTS
    if theirs.name == "pixel":
        first, others, width = next(row for side, row in PIXELS.items() if data.size <= side)
    if len(data) >= MANY:
        width *= 2
    said = given.get("dims") or given.get("layers")
    branches = len(said) if said else halvings(data.size, theirs.name) + 1
    layers = [first] + [others] * (branches - 1)
    dims = given.get("dims") or [max(8, width >> r) for r in range(branches)]
    return dimr.Config(
        size=data.size,
        channels=data.channels,
        layers=given.get("layers") or layers,
        dims=dims,
        heads=given.get("heads") or heads(dims[0]),
        num_classes=len(data.classes),
        null_class=True,
        space=theirs.name,
    )


def halvings(size: int, space_name: str) -> int:
    """How often the grid is halved: until the coarsest is COARSEST cells wide, once at least (twice
    from 32 pixels on), as long as it halves evenly."""
    wanted = max(1, math.ceil(math.log2(size / COARSEST)))
    if space_name == "pixel" and size >= SMALL:
        wanted = max(2, wanted)
    even = 0
    while even < wanted and size % 2 ** (even + 1) == 0:
        even += 1
    return even


def heads(width: int) -> int:
    """Attention heads of about 32 numbers each, four at least, that divide the width."""
    wanted = max(4, width // 32)
    return max(count for count in range(1, wanted + 1) if width % count == 0)


def recipe(config: networks.Config, images: int, steps: int | None = None) -> dict:
    """Values of recipes.Recipe for a network and a number of images; those that say how long
    something takes are parts of `steps` (None: PASSES over the data)."""
    width = config.dims[0] if networks.kind(config) == "dimr" else config.width
    batch_size = 64
    if config.space == "pixel" and config.size <= SMALL:
        batch_size = 32
    if steps is None:
        steps = min(LONGEST, max(SHORTEST, math.ceil(images * PASSES / batch_size)))
    return {
        "lr": learning_rate(width),
        "steps": steps,
        "batch_size": batch_size,
        "warmup": min(PAPER_WARMUP, steps // WARMUP),
        "weight_decay": 0.01,
        "betas": (0.9, 0.98),
        "ema": decay(min(PAPER_AVERAGE, steps / AVERAGE)),
        "label_dropout": 0.1,
        "flip": False,
        "grad_clip": 1.0,
    }


def learning_rate(width: int) -> float:
    """8e-3 · (64 / D)^(4/3), to two digits; for widths under 64 as at 64."""
    return float(f"{8e-3 * min(1, 64 / width) ** (4 / 3):.1e}")


def decay(span: float) -> float:
    """Of an average over about `span` steps."""
    return max(0.0, round(1 - 1 / max(span, 1), 4))
