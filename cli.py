"""The command line. Options and help live here; the work is done by the jobs, imported only when
run.

`dimr COMMAND` and `python -m cli COMMAND` are the same; `torchrun --nproc-per-node N -m cli
COMMAND` spreads train, encode, sample and eval over processes."""

import ours

import ctypes
import dataclasses
import errno
import json
import math
import os
import sys
from pathlib import Path

import click

from storage import VERSION, UserError

# What the machine refuses (full, read-only or forbidden storage) is foreseen; any other OSError is
# a bug of ours.
REFUSALS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}
# how Python begins to say that it can write none, which PyTorch asks for
NO_ROOM = "No usable temporary directory"


class Group(click.Group):
    """Turns foreseen errors into one line on stderr, naming the rank if there are several, and an
    exit status: 2 for bad usage, 1 for a failed job."""

    def invoke(self, context):
        rank = f"rank {os.environ.get('RANK')}: " * (int(os.environ.get("WORLD_SIZE", 1)) > 1)
        try:
            return super().invoke(context)
        except UserError as error:
            raise click.ClickException(rank + " ".join(str(error).split())) from None
        except OSError as error:
            if error.errno not in REFUSALS and not str(error.strerror).startswith(NO_ROOM):
                raise
            what = (
                f"{error.filename or 'output'}: {error.strerror}; free space or "
                "choose another place"
            )
            raise click.ClickException(rank + what) from None
        except RuntimeError as error:
            import parallel

            if not parallel.is_lost_peer(error):
                raise
            raise click.ClickException(
                f"{rank}another process ended or no longer answers; see its own message"
            ) from None


class Real(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value, param, context):
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, context)
        return number


class Numbers(click.ParamType):
    """Comma-separated numbers, at least 0 and, if told, below a limit, as a tuple."""

    def __init__(self, kind, name, count=None, below=None):
        self.kind, self.name, self.count, self.below = kind, name, count, below

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if (
            not numbers
            or self.count not in (None, len(numbers))
            or not all(n >= 0 and (not self.below or n < self.below) for n in numbers)
        ):
            limit = f" from 0 to below {self.below}" if self.below else ""
            self.fail(
                f"{value!r} is not {self.count or 'one or more'} comma-separated "
                f"numbers{limit}, like {self.name}",
                param,
                context,
            )
        return numbers


class Seeds(click.ParamType):
    """Seeds as a list of numbers and ranges: 0-63 or 3,7,10-12."""

    name = "0-63|3,7"

    def convert(self, value, param, context):
        try:
            spans = [[int(end) for end in part.split("-")] for part in value.split(",")]
            return [
                seed for span in spans for seed in range(span[0], span[-1] + 1) if len(span) <= 2
            ] or self.fail("")
        except (ValueError, click.BadParameter):
            self.fail(
                f"{value!r} is not a list of seeds; expected numbers and ranges like "
                "0-63 or 3,7,10-12",
                param,
                context,
            )


class Guidance(click.ParamType):
    """A guidance scale of at least 1."""

    name = "scale"

    def convert(self, value, param, context):
        scale = click.FLOAT.convert(value, param, context)
        if not 1 <= scale < float("inf"):
            self.fail(
                f"{value} is not at least 1 (1 = no guidance); U-ViT and the DiMR "
                "release write the excess over 1: "
                "their 0.4 is --cfg 1.4 here",
                param,
                context,
            )
        return scale


def shared(*options):
    """Several click options as one decorator."""

    def decorate(function):
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


POSITIVE = click.IntRange(min=1)
VARIANTS = click.Choice(["m3r", "l3r", "xl2r", "xl3r", "g2r", "demo"])
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout."
)
feature_options = shared(
    click.option(
        "--inception",
        default="inception",
        show_default=True,
        help="pytorch-fid's weights: a name or a file.",
    ),
    click.option(
        "--features",
        metavar="MODULE:FUNCTION",
        help="Another extractor instead: a function from uint8 images (N, H, W, 3) to "
        "features (N, D). Results are labelled with it.",
    ),
)
precision_option = click.option(
    "--precision", type=click.Choice(["fp32", "bf16"]), help="Default: bf16 on CUDA, else fp32."
)


def report(result, as_json, line):
    """On rank 0, print `result` as JSON or as a line for people."""
    if int(os.environ.get("RANK", 0)) == 0:
        click.echo(json.dumps(result) if as_json else line)


def default_data(space, size):
    """Where training data is looked for: what encode wrote, then folders of images; None if there
    is nothing."""
    encoded = [Path("data") / (f"latents-{size * 8}" if space == "latent" else f"pixels-{size}")]
    images = (
        [
            Path(p)
            for p in (os.environ.get("DIMR_DATA"), "data/imagenet/train", "data/imagenet")
            if p
        ]
        if space == "pixel"
        else []
    )
    return next((path for path in encoded + images if path.is_dir()), None)


def keep_memory():
    """On Linux, keep the memory of freed tensors for the next ones. Otherwise the C library hands
    it back, and page faults take up to a fifth of a training step on CPUs (docs/performance.md)."""
    if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: what is smaller comes from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much of the heap stays


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(VERSION)
def main():
    """DiMR: multi-resolution diffusion for class-conditional images (arXiv:2406.09416).

    \b
    dimr demo                                  everything at once, on handwritten digits
    dimr encode --res 256                      ImageNet to latents            -> data/latents-256
    torchrun -m cli train --variant xl2r       train on them                  -> runs/xl2r
    dimr sample --class 388 --cfg 1.5          draw images from the newest run -> samples/
    dimr eval fid                              measure it
    """
    keep_memory()


@main.command()
@click.option("--variant", type=VARIANTS, default="xl2r", show_default=True)
@click.option(
    "--micro-batch",
    type=POSITIVE,
    help="Compute as well what training with so many images per GPU and pass takes of its memory.",
)
@json_option
def info(variant, micro_batch, as_json):
    """Size and cost of a network, branch by branch.

    \b
    Examples:
      dimr info --variant xl2r
      dimr info --variant xl2r --micro-batch 64
    """
    import torch

    import dimr

    config = dimr.VARIANTS[variant]
    with torch.device("meta"):
        model = dimr.DiMR(config)
    branches = [
        {
            "branch": r + 1,
            "blocks": config.blocks[r],
            "kind": "transformer" if r == 0 else "convnext",
            "dim": config.dims[r],
            "grid": config.grids[r],
            "tokens": config.grids[r] ** 2 + (r == 0),
            "gmacs": round(config.macs[r] / 1e9, 4),
            "params": sum(p.numel() for p in branch.parameters()),
        }
        for r, branch in enumerate(model.branches)
    ]
    result = {
        "variant": variant,
        "params": sum(b["params"] for b in branches),
        "gmacs": round(sum(config.macs) / 1e9, 4),
        "branches": branches,
    }
    lines = [
        f"{variant}: {result['params']:,} parameters, {result['gmacs']:,.4f} GMAC per "
        "image and forward pass, "
        f"{config.channels}×{config.size}×{config.size} {config.space} input, "
        f"{config.embeddings} class embeddings"
    ]
    lines += [
        f"  branch {b['branch']}: {b['blocks']:2} {b['kind']:11} blocks of width "
        f"{b['dim']:4} on {b['grid']}×{b['grid']} "
        f"({b['tokens']:4} tokens), {b['params']:13,} parameters, {b['gmacs']:8.4f} GMAC"
        for b in branches
    ]
    if micro_batch:
        import memory

        result["memory"] = []
        for flag in (False, True):
            state, activations = memory.training_memory(config, micro_batch, flag)
            result["memory"].append(
                {
                    "micro_batch": micro_batch,
                    "checkpoint_blocks": flag,
                    "state": state,
                    "activations": activations,
                }
            )
            lines.append(
                f"  training, micro-batch {micro_batch}, "
                f"bf16{', --checkpoint-blocks' * flag}: "
                f"{(state + activations) / 1e9:.1f} GB per GPU "
                f"({state / 1e9:.1f} GB state, {activations / 1e9:.1f} GB activations; "
                "computed, without torch.compile)"
            )
    report(result, as_json, "\n".join(lines))


@main.command()
@click.option(
    "--variant", type=VARIANTS, help="Network and recipe [default: the nearest to the data]."
)
@click.option(
    "--data",
    help="Image folder (one folder per class) or a folder that encode wrote "
    "[default: data/latents-SIZE or data/pixels-SIZE, then $DIMR_DATA, data/imagenet].",
)
@click.option("--out", help="Run folder; a run that is there goes on [default: runs/VARIANT].")
@click.option("--init", help="Weights to start from: a name, a file or a run.")
@click.option(
    "--res", type=POSITIVE, help="Crop the images of a folder to this size [default: their own]."
)
@click.option("--exif", is_flag=True, help="Honour EXIF rotation (ADM's preparation ignores it).")
@click.option(
    "--on-bad-image",
    "on_bad",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
)
@click.option("--steps", type=POSITIVE, help="Optimiser steps in all.")
@click.option(
    "--batch-size", type=POSITIVE, help="Global: over all processes and accumulation steps."
)
@click.option(
    "--micro-batch", type=POSITIVE, help="Samples per process and pass; the rest is accumulated."
)
@click.option("--lr", type=Real(min=0, min_open=True), help="Learning rate.")
@click.option("--warmup", type=click.IntRange(min=0), help="Steps of linear warm-up.")
@click.option("--weight-decay", type=Real(min=0))
@click.option("--betas", type=Numbers(float, "0.99,0.99", 2, below=1), help="AdamW's.")
@click.option("--ema", type=Real(0, 1, max_open=True), help="Decay of the weights' moving average.")
@click.option(
    "--label-dropout",
    type=Real(0, 1, max_open=True),
    help="Share of labels dropped; above 0 allows guidance.",
)
@click.option(
    "--flip/--no-flip", default=None, help="Random horizontal flips [default: on; off for demo]."
)
@click.option(
    "--grad-clip", type=Real(min=0, min_open=True), help="Largest gradient norm [default: off]."
)
@click.option(
    "--target-scale",
    type=click.Choice(["unit", "mean"]),
    help="Pooled noise targets: unit variance (release) or plain mean (paper).",
)
@click.option("--layers", type=Numbers(int, "39,20"), help="Layers per branch, coarse to fine.")
@click.option("--dims", type=Numbers(int, "960,480"), help="Widths per branch.")
@click.option("--heads", type=POSITIVE)
@click.option("--norm", type=click.Choice(["tdln", "tdrms"]))
@precision_option
@click.option("--compile/--no-compile", default=None, help="torch.compile [default: on CUDA].")
@click.option(
    "--checkpoint-blocks/--no-checkpoint-blocks",
    default=None,
    help="Recompute activations: less memory, a third more work.",
)
@device_option
@click.option("--seed", type=click.IntRange(min=0))
@click.option(
    "--workers", type=click.IntRange(min=0), help="Reading processes [default: by cores]."
)
@click.option(
    "--sample-every",
    type=click.IntRange(min=0),
    help="Steps between sample grids, 0 for none [default: as --save-every].",
)
@click.option(
    "--save-every",
    type=POSITIVE,
    help="Steps between checkpoints [default: 5000, or a quarter of the run; one takes 16 bytes a "
    "parameter: 8.1 GB for xl2r].",
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Newest checkpoints kept; 0 keeps all.",
)
@click.option(
    "--max-time",
    type=Real(min=0, min_open=True),
    help="Minutes after which to save and stop (exit status 75).",
)
@click.option(
    "--eval-every",
    type=POSITIVE,
    help="Steps between measurements of FID, unguided and with the averaged weights, into "
    "metrics.jsonl [default: never].",
)
@click.option(
    "--eval-images",
    type=click.IntRange(min=2),
    default=5000,
    show_default=True,
    help="Images drawn for each.",
)
@click.option(
    "--ref",
    help="What FID compares with, as in dimr eval fid [default: the name that fits, "
    "else the training images].",
)
@feature_options
@json_option
def train(
    variant,
    data,
    out,
    init,
    res,
    exif,
    on_bad,
    device,
    workers,
    sample_every,
    save_every,
    keep,
    max_time,
    eval_every,
    eval_images,
    ref,
    inception,
    features,
    as_json,
    layers,
    dims,
    heads,
    norm,
    **recipe,
):
    """Train a network; run the same command again to go on.

    Defaults are the paper's recipe (Table 4). The run folder holds config.json, metrics.jsonl,
    samples/, loss.png and checkpoints/.

    \b
    Examples:
      dimr train --variant demo --data digits/ --out runs/digits
      torchrun --nproc-per-node 8 -m cli train --variant xl2r --micro-batch 64
      dimr train --data photos/ --res 64 --layers 9,5 --dims 384,192 --heads 6 --batch-size 64
    """
    import dimr
    import parallel
    import training

    out = out or f"runs/{variant or 'custom'}"
    if data is None and not (Path(out) / "config.json").exists():
        config = dimr.VARIANTS[variant or "xl2r"]
        data = default_data(config.space, config.size)
        if data is None:
            kind = (
                f"--res {config.size * 8}"
                if config.space == "latent"
                else f"--res {config.size} --pixels"
            )
            raise UserError(
                f"no training data for {variant or 'xl2r'}: expected "
                f"data/latents-{config.size * 8} or "
                * (config.space == "latent")
                + f"give --data FOLDER, or run dimr encode {kind} first"
            )
    given = {k: v for k, v in recipe.items() if v is not None}
    network = {
        k: v
        for k, v in dict(layers=layers, dims=dims, heads=heads, norm=norm).items()
        if v is not None
    }
    watch = None
    if eval_every:
        watch = training.Watch(eval_every, eval_images, ref, inception, features)
    source = training.Source(data, res, exif, on_bad, workers)
    saving = training.Saving(save_every, keep, sample_every, max_time and max_time * 60)
    try:
        result = training.train(
            out,
            source,
            variant=variant,
            recipe=given,
            network=network,
            init=init,
            device=device,
            saving=saving,
            watch=watch,
        )
    finally:
        parallel.stop()
    report(
        result,
        as_json,
        f"{result['out']}: step {result['step']:,} of {result['steps']:,}, loss "
        f"{result['loss'] or math.nan:.4f}, "
        f"{result['seconds']:.0f} s"
        + (
            f"; stopped by {result['stopped']}, run the same command to go on"
            if result["stopped"]
            else f"; now: dimr sample --weights {result['out']}"
        ),
    )
    if result["stopped"]:
        raise SystemExit(75)  # EX_TEMPFAIL: run me again


sampling_options = shared(
    click.option(
        "--weights",
        help="A run, a weights file or a name [default: the newest run under runs/, else xl2r].",
    ),
    click.option(
        "--ema/--raw", default=True, help="Averaged weights, or the raw ones  [default: ema]."
    ),
    click.option(
        "--cfg",
        type=Guidance(),
        help="Guidance scale, 1 for none [default: 1.5 with a null class, else 1].",
    ),
    click.option(
        "--cfg-power",
        type=Real(min=0, min_open=True),
        help="Exponent of the power-cosine schedule [default: constant].",
    ),
    click.option(
        "--cfg-interval",
        type=Numbers(float, "0.3,5", 2),
        help="Guide only at noise levels LOW < sigma/alpha <= HIGH.",
    ),
    click.option(
        "--preset",
        type=click.Choice(["everyday", "paper"]),
        default="everyday",
        show_default=True,
        help="everyday: 2m at 25 NFE. paper: fast, 250 NFE (latent) or dpm-fast, 50 NFE (pixel).",
    ),
    click.option("--steps", type=POSITIVE, help="Network evaluations (NFE)."),
    click.option(
        "--solver",
        type=click.Choice(
            [p + n for p in ("", "dpm-") for n in ("1s", "2s", "3s", "fast", "2m", "3m")]
        ),
        help="Order and kind; plain predicts data (DPM-Solver++), dpm- noise (DPM-Solver).",
    ),
    click.option(
        "--grid",
        type=click.Choice(["time", "quadratic", "logsnr"]),
        help="Spacing of the solver's times.",
    ),
    click.option(
        "--vae",
        help="The VAE of latent models: a name or a file [default: the run's, else sd-vae-ft-ema].",
    ),
    click.option("--batch-size", type=POSITIVE, help="Images at once, per process."),
    precision_option,
    click.option(
        "--compile",
        "compiled",
        is_flag=True,
        help="torch.compile for the network: about a minute at the start, then faster; "
        "for thousands of images.",
    ),
    device_option,
)


@main.command()
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Class index or name; repeat for several, taken in turn [default: all].",
)
@click.option("-n", "count", type=POSITIVE, help="Images in all [default: 16].")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Image k has seed SEED + k.",
)
@click.option("--seeds", type=Seeds(), help="These seeds instead: 0-63 or 3,7.")
@click.option(
    "--balanced",
    is_flag=True,
    help="Image i has class i mod K: a fair set for dimr eval. Implies --npz.",
)
@click.option(
    "--npz",
    is_flag=True,
    help="Write one .npz (arr_0, arr_1) instead of PNGs; an interrupted call goes on.",
)
@click.option("--out", help="Folder, or with --npz a file [default: samples/WEIGHTS-cfgSCALE].")
@sampling_options
@json_option
def sample(
    classes,
    count,
    seed,
    seeds,
    balanced,
    npz,
    out,
    weights,
    ema,
    vae,
    batch_size,
    precision,
    compiled,
    device,
    as_json,
    **settings,
):
    """Draw images of given classes.

    Each image has a seed of its own: asking for that class and seed alone gives it back.

    \b
    Examples:
      dimr sample --class 388 --cfg 1.5
      dimr sample --class "giant panda" --class 207 -n 8 --seed 100
      torchrun --nproc-per-node 8 -m cli sample --balanced -n 50000 --preset paper
    """
    import parallel
    import sampling

    if balanced and classes:
        raise click.UsageError("--balanced takes every class in turn; leave out --class")
    if seeds and count and len(seeds) != count:
        raise click.UsageError(
            f"--seeds names {len(seeds)} seeds and -n says {count}; give one of the two"
        )
    generator = sampling.load(weights, ema, device, precision, vae, compiled=compiled)
    known = [sampling.class_index(name, generator) for name in classes] or list(
        range(generator.config.num_classes)
    )
    seeds = seeds or list(range(seed, seed + (count or 16)))
    parallel.start(generator.device)
    try:
        result = sampling.sample(
            generator,
            [known[i % len(known)] for i in range(len(seeds))],
            seeds,
            sampling.Settings(**settings),
            out,
            batch_size,
            npz or balanced,
            balanced,
        )
    finally:
        parallel.stop()
    report(
        result,
        as_json,
        f"{result['n']:,} images from {result['source']} (cfg {result['cfg']:g}, "
        f"{result['solver']}, {result['steps']} NFE) in "
        f"{result['seconds']:.1f} s -> {result['out']}, to look at: {result['picture']}",
    )


@main.command()
@click.option(
    "--data",
    help="Image folder, one folder per class or flat [default: $DIMR_DATA, "
    "data/imagenet/train, data/imagenet].",
)
@click.option(
    "--out",
    help="Folder to write; an unfinished one goes on [default: data/latents-RES or "
    "data/pixels-RES].",
)
@click.option(
    "--res",
    type=POSITIVE,
    required=True,
    help="Side of the square crop, in pixels: 64, 256, 512, ...",
)
@click.option(
    "--pixels",
    is_flag=True,
    help="Store the crops themselves, for pixel models, instead of latents.",
)
@click.option(
    "--vae",
    "vae_weights",
    default="sd-vae-ft-ema",
    show_default=True,
    help="The VAE's weights: a name or a file.",
)
@click.option(
    "--channels",
    type=click.Choice(["1", "3"]),
    help="Of pixels [default: 1 if a sample of the images is grey, else 3].",
)
@click.option(
    "--batch-size",
    type=POSITIVE,
    default=32,
    show_default=True,
    help="Images at once, per process.",
)
@click.option(
    "--shard-size",
    type=POSITIVE,
    help="Images per shard, what a kill can cost a process [default: for about 128 shards].",
)
@click.option("--exif", is_flag=True, help="Honour EXIF rotation (ADM's preparation ignores it).")
@click.option(
    "--on-bad-image",
    "on_bad",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="Stop at an unreadable image, or leave it out and list it at the end.",
)
@precision_option
@device_option
@click.option(
    "--workers", type=click.IntRange(min=0), help="Reading processes [default: by cores]."
)
@click.option(
    "--verify", is_flag=True, help="Only compare the shards of a finished set with their hashes."
)
@json_option
def encode(data, out, res, pixels, channels, verify, as_json, **options):
    """Turn a folder of images into shards that train reads fast: latents, or pixels.

    Crops as ADM does. Run the same command again to go on after an interruption, or to redo damaged
    shards; the bytes written depend on neither, nor on the number of processes. Latents come with
    preview.png, to look at.

    \b
    Examples:
      dimr encode --res 256                              ImageNet to latents, 42 GB
      dimr encode --res 64 --pixels --data photos/       crops for a pixel model
      torchrun --nproc-per-node 8 -m cli encode --res 256
      dimr encode --res 256 --verify
    """
    import encoding
    import parallel

    out = out or f"data/{'pixels' if pixels else 'latents'}-{res}"
    if verify:
        result = encoding.verify(out)
        if as_json or not result["damaged"]:
            report(
                result,
                as_json,
                f"{result['shards']} shards of {result['items']:,} items in {out} are as "
                "they were written",
            )
        if result["damaged"]:
            raise UserError(
                f"{'; '.join(result['damaged'])}. Run the encode that wrote {out} again: "
                "it redoes them"
            )
        return
    data = (
        data
        or os.environ.get("DIMR_DATA")
        or next((p for p in ("data/imagenet/train", "data/imagenet") if Path(p).is_dir()), None)
    )
    if data is None:
        raise UserError(
            "no images: expected ImageNet in data/imagenet/train; give --data FOLDER or "
            "set DIMR_DATA"
        )
    try:
        result = encoding.encode(
            data, out, res, pixels, channels=channels and int(channels), **options
        )
    finally:
        parallel.stop()
    skipped = "".join(f"\nskipped {s['image']}: {s['reason']}" for s in result["skipped"])
    skipped += f"\n{len(result['skipped'])} unreadable images skipped" if skipped else ""
    look = f", to look at: {Path(out) / 'preview.png'}" if result["kind"] == "latents" else ""
    report(
        result,
        as_json,
        f"{result['items']:,} {result['kind']} of {result['classes']:,} classes in "
        f"{result['shards']} shards, "
        f"{result['bytes'] / 1e6:,.1f} MB, {result['encoded_images']:,} images encoded "
        f"in {result['seconds']:.1f} s -> {out}{look}{skipped}",
    )


@main.command()
@click.argument("run", required=False)
def curves(run):
    """Draw loss.png of a run from its metrics, finished or not [default: the newest run].

    Example: dimr curves runs/xl2r
    """
    import journal
    import runfolder

    run = run or runfolder.newest()
    if run is None:
        raise UserError("no run under runs/; give a run folder that train wrote")
    click.echo(journal.plot(run))


@main.command()
@click.option(
    "--out",
    default="demo",
    show_default=True,
    help="Folder for digits, run and samples; must be new or empty.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@json_option
def demo(out, seed, as_json):
    """The whole tool on real handwritten digits, offline, in about two minutes on two cores.

    Writes scikit-learn's digits as PNGs, trains a two-branch DiMR on half of them, draws a guided
    grid and judges it with a classifier that saw only the other half. Needs the extra `demo`
    (scikit-learn).

    Example: dimr demo
    """
    import digits_demo

    result = digits_demo.run(Path(out), seed)
    report(
        result,
        as_json,
        f"accuracy: real digits {result['accuracy_real']:.3f}, generated "
        f"{result['accuracy_generated']:.3f}; coverage "
        f"{result['coverage']:.3f}; distance to training digits relative to real ones "
        f"{result['nearest_train']:.2f}; "
        f"{result['seconds']:.0f} s\nlook at {result['picture']} and {result['run']}",
    )


@main.group("weights", invoke_without_command=True)
@json_option
@click.pass_context
def weights_group(context, as_json):
    """What can be fetched by name: released weights, the VAE, Inception, ADM's references.

    Wherever a command takes weights, a VAE or a reference, these names work, and are fetched when
    first used. DIMR_HOME moves the cache; DIMR_OFFLINE=1 forbids downloads; HF_ENDPOINT and
    http(s)_proxy are honoured.

    \b
    Examples:
      dimr weights
      dimr weights get sd-vae-ft-ema
    """
    import downloads

    if context.invoked_subcommand is None:
        table = downloads.listing()
        lines = [
            f"{item['name']:14} {item['size'] or 0:15,} bytes  "
            f"{'cached' if item['cached'] else '-':7} {item['what']}\n"
            f"{'':14} {item['licence']}".replace(" 0 bytes", " ? bytes")
            for item in table
        ]
        report(table, as_json, "\n".join([*lines, f"cache: {downloads.cache()}"]))


@weights_group.command("get")
@click.argument("name")
@json_option
def weights_get(name, as_json):
    """Fetch NAME into the cache, if it isn't there, and print where it is.

    Example: dimr weights get xl2r
    """
    import downloads

    if name not in downloads.ASSETS:
        raise click.BadParameter(
            f"{name!r} is not one of {', '.join(downloads.ASSETS)}", param_hint="NAME"
        )
    path = downloads.fetch(name)
    report({"name": name, "path": str(path)}, as_json, path)


@main.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@click.option(
    "--heads",
    type=POSITIVE,
    default=16,
    show_default=True,
    help="Attention heads of the network in IN; only for the authors' .pth, which doesn't say.",
)
@json_option
def convert(source, target, heads, as_json):
    """Turn released weights into ours, or ours into released ones.

    IN is a name (see dimr weights) or a file. OUT ends in .safetensors for our names, in .pth for
    the authors', which their code loads. The configuration goes with the weights either way.

    \b
    Examples:
      dimr convert xl2r xl2r.safetensors
      dimr convert runs/mine/checkpoints/step-0100000/ema.safetensors mine.pth
    """
    import downloads
    import runfolder

    model, record = runfolder.read_weights(downloads.find(source), heads)
    runfolder.write_weights(target, model, record)
    count = sum(p.numel() for p in model.parameters())
    report(
        {"out": target, "params": count, "config": dataclasses.asdict(model.config)},
        as_json,
        f"{count:,} parameters -> {target}",
    )


@main.group("eval")
def eval_group():
    """Measure samples: FID, sFID, Inception Score, precision and recall, KID, as ADM's suite does.

    \b
    Examples:
      dimr eval fid          the newest balanced set, else what the newest run draws
      dimr eval all samples.npz --ref imagenet256 --against xl2r
    """


res_option = click.option(
    "--res", type=POSITIVE, help="Crop the images of folders to this size, as ADM does."
)


def extractor_of(inception, features, device):
    """The extraction.Extractor that the options name, once the other processes have been joined."""
    import extraction
    import parallel

    device = parallel.pick_device(device)
    parallel.start(device, minutes=24 * 60)
    return (
        extraction.custom(features, device) if features else extraction.inception(inception, device)
    )


def metric_command(name, what):
    """Make `dimr eval NAME`, which measures `what`."""

    @eval_group.command(
        name,
        help=f"""{what}

        SAMPLES is an .npz with arr_0 (uint8, N × H × W × 3) or a folder of images. Without it: the
        newest balanced set that sample wrote, else --count images that the newest run draws, which
        are measured without being written. Published numbers are of 50,000 samples.

        \b
        Examples:
          dimr eval {name} samples.npz --ref imagenet256 --against xl2r
          dimr eval {name} photos/ --ref reference.safetensors --json
          torchrun --nproc-per-node 8 -m cli eval {name} --weights runs/xl2r --preset paper
        """,
    )
    @click.argument("samples", required=False, type=click.Path(path_type=Path))
    @click.option(
        "--ref",
        help="What to compare with: imagenet64, imagenet256, imagenet512, ADM's .npz, a "
        "file that dimr eval stats wrote, "
        "or images [default: the name that fits, else the images that the run was trained on].",
    )
    @click.option(
        "--against", type=VARIANTS, help="Show the paper's results for this variant beside."
    )
    @click.option(
        "-n", "--count", type=click.IntRange(min=2), help="Images to draw [default: 50000]."
    )
    @click.option("--keep", is_flag=True, help="Write the images drawn, as sample --balanced does.")
    @feature_options
    @res_option
    @sampling_options
    @json_option
    def command(
        samples,
        ref,
        against,
        count,
        keep,
        inception,
        features,
        res,
        weights,
        ema,
        vae,
        batch_size,
        precision,
        compiled,
        device,
        as_json,
        **settings,
    ):
        import evaluation
        import imagesets
        import parallel
        import sampling

        if samples and (weights or count or keep):
            raise click.UsageError(
                "SAMPLES are measured as they are; leave out --weights, -n and --keep, or SAMPLES"
            )
        try:
            extractor = extractor_of(inception, features, device)
            if not (samples or weights or count or keep):
                samples = evaluation.newest_balanced()
            generator, count, settings = (
                None,
                count or evaluation.COUNT,
                sampling.Settings(**settings),
            )
            if samples is None:
                generator = sampling.load(weights, ema, device, precision, vae, compiled=compiled)
            if keep:
                classes = [i % generator.config.num_classes for i in range(count)]
                samples = sampling.sample(
                    generator,
                    classes,
                    range(count),
                    settings,
                    None,
                    batch_size,
                    npz=True,
                    balanced=True,
                )["npz"]
            images = imagesets.open_set(samples, res) if samples else None
            result = evaluation.evaluate(
                name, images, extractor, ref, res, batch_size, generator, count, settings
            )
        finally:
            parallel.stop()
        if result:
            report(
                {**result, **({"paper": evaluation.PAPER.get(against, [])} if against else {})},
                as_json,
                evaluation.table(result, against),
            )

    return command


for _name, _what in {
    "fid": "Fréchet Inception distance.",
    "sfid": "Fréchet distance of spatial features, sensitive to structure.",
    "is": "Inception Score: mean over splits of 5,000 in the order given (a folder's is "
    "permuted by a fixed seed). Needs no reference.",
    "pr": "Precision and recall (3 neighbours), density and coverage (5).",
    "kid": "Kernel Inception distance, mean over 100 subsets of 1,000.",
    "all": "All metrics from one pass over the images.",
}.items():
    metric_command(_name, _what)


@eval_group.command("stats")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@feature_options
@res_option
@click.option("--batch-size", type=POSITIVE, help="Images at once, per process.")
@device_option
@json_option
def eval_stats(folder, out, inception, features, res, batch_size, device, as_json):
    """Measure reference images once, for --ref: moments of all, features of 10,000.

    FOLDER holds images at any depth, or pixel shards; an .npz with arr_0 will do. OUT ends in
    .safetensors.

    Example: dimr eval stats data/imagenet/train imagenet128.safetensors --res 128
    """
    import evaluation
    import extraction
    import imagesets
    import parallel

    if out.suffix != ".safetensors":
        raise click.BadParameter(f"{out} does not end in .safetensors", param_hint="OUT")
    try:
        extractor = extractor_of(inception, features, device)
        found = extraction.measure(
            imagesets.open_set(folder, res), extractor, evaluation.REFERENCE_IMAGES, batch_size
        )
        if found:
            found.save(out)
            report(
                {"out": str(out), **evaluation.describe(found), "features": found.extractor},
                as_json,
                f"{found.count:,} images of {found.size}×{found.size} from {folder}, "
                f"{found.extractor} -> {out}",
            )
    finally:
        parallel.stop()


@eval_group.command("fidelity")
@click.argument("samples", type=click.Path(path_type=Path))
@click.option(
    "--classifier",
    default="vit-b16",
    show_default=True,
    help="A Vision Transformer under timm's names: a name or a file.",
)
@click.option(
    "--threshold",
    type=Real(0, 1),
    default=0.2,
    show_default=True,
    help="Probability of its class under which an image is marked.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for marked.csv and contact sheets [default: SAMPLES-marked].",
)
@res_option
@click.option("--batch-size", type=POSITIVE, help="Images at once.")
@device_option
@json_option
def eval_fidelity(samples, classifier, threshold, out, res, batch_size, device, as_json):
    """Mark images of low fidelity: a classifier gives their class a probability under the threshold
    (paper, Sec. 5.3).

    SAMPLES: what sample wrote, an .npz with classes under arr_1, or one folder per class, in the
    order of the classifier's classes (ImageNet's). Preprocessing: bicubic to 248, centre crop to
    224, values to [-1, 1]. Not every image marked is distorted: let people judge the contact
    sheets, and give their votes to dimr eval distortion.

    Example: dimr eval fidelity samples/xl2r-cfg1.5/balanced-50000.npz
    """
    import distortion
    import imagesets
    import parallel

    images = imagesets.open_set(samples, res)
    network, digest = distortion.load(classifier, parallel.pick_device(device))
    out = out or samples.with_name(f"{samples.stem}-marked")
    result = distortion.mark(images, network, digest, out, threshold, batch_size)
    report(result, as_json, distortion.table(result))


@eval_group.command("distortion")
@click.argument("votes", type=click.Path(path_type=Path))
@json_option
def eval_distortion(votes, as_json):
    """The distortion rate that people's votes give, as in the paper's Sec. 5.3.

    VOTES is a CSV with the columns image, person, distorted (1/0 or yes/no). The rate is the mean
    over people of the share of the images they judged that they call distorted; the interval is
    Student's t over people, 95%.

    Example: dimr eval distortion votes.csv
    """
    import distortion

    result = distortion.distortion(votes)
    interval = " (one person: no interval)"
    if result["interval"]:
        interval = " (95% interval over people {:.1%} to {:.1%})".format(*result["interval"])
    report(
        result,
        as_json,
        f"distortion rate {result['distortion_rate']:.1%}{interval}: "
        f"{len(result['people'])} people, "
        f"{result['images']:,} images, {result['votes']:,} votes",
    )


if __name__ == "__main__":
    main(prog_name="dimr")
