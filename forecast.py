"""What training, drawing and measuring will take on so many GPUs of a kind: arithmetic on
operations, from a share of the peak that was measured (tools/bench.py --json) or the paper's
own."""

import ours

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import fid
import memory
import networks
import parallel
import recipes
import sampling
import schema
import space
import vae
from schema import anything, fields, many, real, text
from storage import UserError, read_json

# bench.py's; nothing is so slow that a run's days could not be counted
ROWS = many(fields({"name": text(), "throughput": real(1e-6)}, {"machine": anything}))
SHARE = 0.32  # of an A100's peak: the paper's own training
IMAGENET = 1_281_167
DRAWN = 50_000
KEPT = 3  # checkpoints on the disk while one is written: dimr train --keep 2
A_CHECKPOINT = 16  # bytes a parameter: weights, EMA, two moments
MEASUREMENTS = ("training.json", "sampling.json")  # where docs/performance.md has bench.py write


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU by its vendor's data sheet. `name`: a key of parallel.PEAK_FLOPS, which has its bf16
    rate; `fp32`: operations a second of its plain units, in which metrics run; `memory`: bytes."""

    name: str
    fp32: float
    memory: float

    @property
    def bf16(self):
        return parallel.PEAK_FLOPS[self.name]


GPUS = {
    "a100": Gpu("A100", 19.5e12, 80e9),
    "h100": Gpu("H100", 67e12, 80e9),
    "h100-pcie": Gpu("H100 PCIe", 51e12, 80e9),
    "h200": Gpu("H200", 67e12, 141e9),
    "b200": Gpu("B200", 80e12, 180e9),
    "l40s": Gpu("L40S", 91.6e12, 48e9),
    "4090": Gpu("4090", 82.6e12, 24e9),
    "3090": Gpu("3090", 35.6e12, 24e9),
}


@dataclasses.dataclass(frozen=True)
class Share:
    """Operations a second as a share of the peak, and where it is from."""

    value: float
    source: str


def forecast(
    config: networks.Config,
    recipe: recipes.Recipe,
    *,
    gpus: int,
    gpu: str,
    variant: str,
    share: float | None = None,
    micro_batch: int | None = None,
    measured: Sequence[str | Path] = (),
) -> dict:
    """What it takes, for `gpus` GPUs of GPUS[gpu], as a dict of numbers with their units in their
    names. `share` overrules what `measured`, results of bench.py, say. Raises UserError."""
    card = GPUS[gpu]
    rows = read_rows(measured, card)
    training = choose_share(share, rows, "training step", variant, card)
    drawing = training
    if share is None:
        drawing = choose_share(None, rows, "sampling", variant, card) or training
    training = training or Share(SHARE, "the paper's own, on A100s")
    drawing = drawing or training
    return {
        "gpus": gpus,
        "gpu": gpu,
        "peak_flops": card.bf16,
        "share": round(training.value, 4),
        "share_from": training.source,
        "training": of_training(config, recipe, gpus, card.bf16 * training.value),
        "memory": of_memory(config, recipe, gpus, card, micro_batch),
        "disk": of_disk(config),
        "drawing_share": round(drawing.value, 4),
        "drawing_share_from": drawing.source,
        "drawing": of_drawing(config, gpus, card.bf16 * drawing.value),
        "measuring_hours": of_measuring(gpus, card.fp32 * training.value),
    }


# ------------------------------------------------------------------------------------- the share


def read_rows(paths, card):
    """Rows of bench.py that were measured on such a GPU. Raises UserError."""
    found = []
    for path in paths:
        rows = read_json(path)
        try:
            schema.check(rows, ROWS)
        except schema.Misfit as misfit:
            raise UserError(
                f"{path} holds no results ({misfit}); expected what tools/bench.py --json printed"
            ) from None
        found += [row for row in rows if is_of(row.get("machine"), card)]
    return found


def is_of(machine, card):
    """Whether the name of a machine, as bench.py has it, is of such a GPU."""
    known = (part for part in parallel.PEAK_FLOPS if part in str(machine))
    return next(known, None) == card.name


def choose_share(given, rows, part, variant, card):
    """The Share of the peak of a `part` of bench.py: as given; as measured for this variant, or
    else for another; None where neither is known."""
    if given is not None:
        return Share(given, "as given")
    found = {}
    for row in rows:
        name = row["name"].removeprefix(part).split(",")[0].strip()
        mine = row["name"].startswith(part) and row["name"].endswith(", dimr")
        if mine and name in networks.VARIANTS:
            found.setdefault(name, row)
    if not found:
        return None
    name = variant if variant in found else next(iter(found))
    row = found[name]
    operations = per_image(part, row["name"], networks.VARIANTS[name])
    source = f"bench.py, {row['name']}, {row['machine']}"
    return Share(row["throughput"] * operations / card.bf16, source)


def per_image(part, name, config):
    """Operations of an image in a row of bench.py: a training step, or guided sampling."""
    if part == "training step":
        return 6 * sum(config.macs)
    found = re.search(r"(\d{1,6}) NFE", name)
    if not found:
        raise UserError(f"{name!r} is no row of bench.py's sampling; make it anew")
    evaluations = int(found[1])
    return 2 * sum(config.macs) * evaluations * (1 + config.null_class)


# ------------------------------------------------------------------------------------- the parts


def of_training(config, recipe, gpus, rate):
    """Steps a second and how long the recipe takes; a multiply-accumulate is two operations, and a
    backward pass costs two forward ones."""
    a_step = 6 * sum(config.macs) * recipe.batch_size
    speed = gpus * rate / a_step
    hours = recipe.steps / speed / 3600
    return {
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "steps_per_second": speed,
        "images_per_second": speed * recipe.batch_size,
        "days": hours / 24,
        "gpu_hours": hours * gpus,
    }


def of_memory(config, recipe, gpus, card, micro_batch):
    """Bytes a GPU with so many images a pass (None: as many as 64, or all that it has of a batch).
    Raises UserError for a batch that does not come out even."""
    share = recipe.batch_size // gpus
    if recipe.batch_size % gpus or share % (micro_batch or 1):
        raise UserError(
            f"batch size {recipe.batch_size} does not split over {gpus} GPUs in micro-batches of "
            f"{micro_batch or 'any size'}; give --gpus and --micro-batch that divide it"
        )
    micro_batch = micro_batch or math.gcd(share, 64)
    passes = share // micro_batch
    state, activations = memory.training_memory(
        config, micro_batch, accumulated=gpus > 1 and passes > 1
    )
    return {
        "micro_batch": micro_batch,
        "passes": passes,
        "bytes": state + activations,
        "of_bytes": int(card.memory),
    }


def of_disk(config, images=IMAGENET):
    """Bytes of a data set of so many images as encode writes it, and of checkpoints."""
    parameters = sum(p.numel() for p in networks.blank(config).parameters())
    cells = config.channels * config.size**2
    an_image = cells  # uint8
    if config.space == "latent":
        an_image = 2 * 2 * 2 * cells  # mean and log-variance, of it and its mirror image, fp16
    return {
        "images": images,
        "data_bytes": images * an_image,
        "checkpoint_bytes": A_CHECKPOINT * parameters,
        "checkpoints_bytes": KEPT * A_CHECKPOINT * parameters,
    }


def of_drawing(config, gpus, rate):
    """Hours in which DRAWN images are drawn, decoded too, by each preset: everyday and paper."""
    found = {}
    for preset in space.PRESETS:
        settings = sampling.Settings(preset=preset).resolved(config)
        passes = settings.steps * (2 if settings.cfg > 1 else 1)
        an_image = 2 * sum(config.macs) * passes
        if config.space == "latent":
            an_image += decoding(config)
        found[preset] = {
            "solver": settings.solver,
            "steps": settings.steps,
            "guidance": settings.cfg,
            "images": DRAWN,
            "hours": DRAWN * an_image / (gpus * rate) / 3600,
        }
    return found


def of_measuring(gpus, rate):
    """Hours in which Inception, in fp32, sees as many."""
    with torch.device("meta"):
        network = fid.Inception()
        images = torch.zeros(1, fid.SIDE, fid.SIDE, 3, dtype=torch.uint8)
    return DRAWN * counted(network, images) / (gpus * rate) / 3600


def decoding(config):
    """Operations of the VAE's decoder for an image."""
    with torch.device("meta"):
        network = vae.VAE()
        z = torch.zeros(1, config.channels, config.size, config.size)
    return counted(network.decoder, z)


def counted(network, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------- in words


def lines(found: dict) -> str:
    """A forecast for people."""
    training, used, disk = found["training"], found["memory"], found["disk"]
    said = [
        f"  on {found['gpus']} × {found['gpu']} ({found['peak_flops'] / 1e12:,.0f} TFLOP/s each in "
        f"bf16) at {found['share']:.0%} of that ({found['share_from']}):",
        f"  training  {training['steps_per_second']:.3g} steps a second, "
        f"{training['images_per_second']:,.0f} images; {training['steps']:,} steps of "
        f"{training['batch_size']:,} in {training['days']:,.1f} days, "
        f"{training['gpu_hours']:,.0f} GPU-hours",
        f"  memory    {used['bytes'] / 1e9:.1f} of {used['of_bytes'] / 1e9:.0f} GB per GPU, "
        f"micro-batch {used['micro_batch']}, {used['passes']} passes a step (computed, without "
        "torch.compile)",
    ]
    if used["bytes"] > used["of_bytes"]:
        said.append(
            "            that does NOT fit: a smaller --micro-batch, or --checkpoint-blocks"
        )
    said.append(
        f"  disk      data {disk['data_bytes'] / 1e9:,.1f} GB ({disk['images']:,} images, as "
        f"ImageNet), checkpoints {KEPT} × {disk['checkpoint_bytes'] / 1e9:.1f} GB"
    )
    for preset, drawn in found["drawing"].items():
        guided = f"guidance {drawn['guidance']:g}" if drawn["guidance"] > 1 else "no guidance"
        how = f"--preset {preset}: {drawn['solver']}, {drawn['steps']} NFE, {guided}"
        said.append(f"  drawing   {drawn['images']:,} images in {spell(drawn['hours'])} ({how})")
    if found["drawing_share"] != found["share"]:
        where = found["drawing_share_from"]
        said.append(f"            at {found['drawing_share']:.0%} of the peak ({where})")
    said.append(
        f"  measuring {spell(found['measuring_hours'])} in Inception, fp32; reading and the "
        "metrics themselves come on top"
    )
    return "\n".join(said)


def spell(hours):
    """In the unit that fits."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} seconds"
    if hours < 2:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:.1f} hours"
