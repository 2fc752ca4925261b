"""The command line. Options and help live here; the work is done by the jobs, imported only when
run.

`dimr COMMAND` and `python -m cli COMMAND` are the same; `torchrun --nproc-per-node N -m cli
COMMAND` spreads train, encode, sample and eval over processes."""

import ours

import ctypes
import dataclasses
import difflib
import errno
import json
import math
import os
import re
import sys
import traceback
from pathlib import Path

import click
from click.core import ParameterSource

from storage import VERSION, UserError, shown

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
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
# what PyTorch says where memory ends, on GPUs and on CPUs
NO_MEMORY = ("out of memory", "can't allocate memory")
# how Python begins to say that it can write none, which PyTorch asks for
NO_ROOM = "No usable temporary directory"

LAST_SEED = 2**63 - 1  # randomness.LAST_SEED
MOST_IMAGES = 10_000_000  # of a call; sampling.MOST
RUN_AGAIN = 75  # exit status of a run that was stopped: sysexits.h's EX_TEMPFAIL
DEFAULT_VARIANT = "xl2r"
# what is taken by name, and fetched, unless another is given
INCEPTION = "inception"
DINOV2 = "dinov2"
VAE = "sd-vae-ft-ema"
JUDGE = "vit-b16"
IMAGENET = ("data/imagenet/train", "data/imagenet")  # where ImageNet is looked for


# ------------------------------------------------------------------------------------------- errors


class Group(click.Group):
    """Turns foreseen errors into one line on stderr, naming the rank if there are several, and an
    exit status: 2 for bad usage, 1 for a failed job. At the end it parts from the other processes,
    if it has joined any."""

    def main(self, *arguments, **keywords):
        try:
            super().main(*arguments, **keywords)
        except SystemExit as end:  # click's way to end, all said
            part(end.code in (0, RUN_AGAIN), end.code)
            raise
        except Exception:  # not foreseen
            if has_joined():
                traceback.print_exc()
            part(False, 1)
            raise

    def parse_args(self, context, arguments):
        context.meta["json"] = "--json" in arguments
        return super().parse_args(context, arguments)

    def invoke(self, context):
        try:
            return self.run(context)
        except click.ClickException as error:
            if context.meta["json"] and "reported" not in context.meta:
                report({"error": error.format_message()}, True, "")
            raise

    def run(self, context):
        try:
            return super().invoke(context)
        except click.exceptions.Exit:  # after --help; it is a RuntimeError too
            raise
        except UserError as error:
            message = " ".join(str(error).split())
        except MemoryError as error:
            message = out_of_memory(error)
        except OSError as error:
            if not is_refusal(error):
                raise
            place = error.filename or "output"
            advice = "free space or choose another place"
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                advice = "give another path"
            message = f"{place}: {error.strerror}; {advice}"
        except RuntimeError as error:
            import parallel

            if any(words in str(error) for words in NO_MEMORY):
                message = out_of_memory(error)
            elif str(error).startswith("Symlink loop"):  # Path.resolve's way to say so
                message = f"{error}; give another path"
            elif parallel.is_lost_peer(error):
                message = "another process ended or no longer answers; see its own message"
            else:
                raise
        raise click.ClickException(shown(speaker() + message))


def out_of_memory(error):
    reason = (str(error).strip() or "no more can be had").splitlines()[0]
    return f"out of memory ({reason}); give a smaller --batch-size, --micro-batch or --res"


def has_joined():
    """Whether this command has joined other processes: not if it hasn't even loaded PyTorch."""
    parallel = sys.modules.get("parallel")
    return parallel is not None and parallel.is_joined()


def part(well, status):
    """Part from the other processes, if any: `well`, as all do, or at once with `status`."""
    if not has_joined():
        return
    import parallel

    if not well:
        parallel.leave(status)
    parallel.stop()


def is_refusal(error):
    return error.errno in REFUSALS or str(error.strerror).startswith(NO_ROOM)


def speaker():
    """Who speaks, if there are several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ""
    return f"rank {os.environ.get('RANK')}: "


# ----------------------------------------------------------------------------------- kinds of value


class Real(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value, param, context):
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, context)
        return number


class Numbers(click.ParamType):
    """Comma-separated numbers, at least 0 and, if told, below a limit, as a tuple."""

    def __init__(self, kind, name, count=None, below=math.inf):
        self.kind = kind
        self.name = name
        self.count = count
        self.below = below

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            self.refuse(value, param, context)
        if self.count and len(numbers) != self.count:
            self.refuse(value, param, context)
        if not all(0 <= number < self.below for number in numbers):
            self.refuse(value, param, context)
        return numbers

    def refuse(self, value, param, context):
        count = self.count or "one or more"
        limit = ""
        if self.below < math.inf:
            limit = f" from 0 to below {self.below}"
        message = f"{value!r} is not {count} comma-separated numbers{limit}, like {self.name}"
        self.fail(message, param, context)


class Rows(click.ParamType):
    """Comma-separated keys of one of our tables, as a tuple."""

    def __init__(self, module, table):
        self.keys = ours.keys(module, table)
        self.name = ",".join(self.keys)

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        rows = tuple(value.split(","))
        for row in rows:
            if row not in self.keys:
                self.fail(f"{row!r} is not one of {', '.join(self.keys)}", param, context)
        return rows


class Seeds(click.ParamType):
    """Seeds as a list of numbers and ranges: 0-63 or 3,7,10-12."""

    name = "0-63|3,7"

    def convert(self, value, param, context):
        if isinstance(value, list):
            return value
        seeds = []
        for part in value.split(","):
            span = re.fullmatch(r"\s*(\d{1,30})\s*(?:-\s*(\d{1,30})\s*)?", part)
            if span is None:
                self.refuse(value, param, context)
            first = int(span[1])
            last = int(span[2] or first)
            if last < first:
                self.refuse(value, param, context)
            if last > LAST_SEED:
                self.fail(f"{last} is beyond {LAST_SEED} (2^63 - 1)", param, context)
            seeds.append(range(first, last + 1))
            if sum(map(len, seeds)) > MOST_IMAGES:
                self.fail(f"more than {MOST_IMAGES:,} images in one call", param, context)
        return [seed for span in seeds for seed in span]

    def refuse(self, value, param, context):
        expected = "expected numbers and ranges like 0-63 or 3,7,10-12"
        self.fail(f"{value!r} is not a list of seeds; {expected}", param, context)


class Guidance(click.ParamType):
    """A guidance scale of at least 1."""

    name = "scale"

    def convert(self, value, param, context):
        scale = click.FLOAT.convert(value, param, context)
        if not 1 <= scale < math.inf:
            message = (
                f"{value} is not at least 1 (1 = no guidance); U-ViT and the DiMR release write "
                "the excess over 1: their 0.4 is --cfg 1.4 here"
            )
            self.fail(message, param, context)
        return scale


def row_of(module, table):
    """A key of one of our tables."""
    return click.Choice(ours.keys(module, table))


POSITIVE = click.IntRange(min=1)
SEED = click.IntRange(0, LAST_SEED)
IMAGES = click.IntRange(1, MOST_IMAGES)
NATURAL = click.IntRange(min=0)
ABOVE_ZERO = Real(min=0, min_open=True)
SHARE = Real(0, 1, max_open=True)
VARIANT = click.Choice(ours.keys("dimr", "VARIANTS") + ours.keys("peers", "VARIANTS"))
WIDTHS = Numbers(float, "0.05,0.10")  # of averages
# what a variant's paper prints where it differs from what was built as it says
PRINTED = {"table2-2": "the paper prints 202.4M and doesn't say what else its own holds"}


# ------------------------------------------------------------------------------------------ options


class Options:
    """Options that belong together: decorates a command with them, and takes their values out of
    those that the command is given."""

    def __init__(self, *options):
        self.options = options
        self.names = [option.name for option in click.command()(self(lambda: None)).params]

    def __call__(self, command):
        for option in reversed(self.options):
            command = option(command)
        return command

    def take(self, values):
        """{name: value}, removed from `values`."""
        return {name: values.pop(name) for name in self.names}

    def given(self, values):
        """Those of `take` that the user gave."""
        return {name: value for name, value in self.take(values).items() if value is not None}


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout."
)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True
)
precision_option = click.option(
    "--precision", type=click.Choice(["fp32", "bf16"]), help="Default: bf16 on CUDA, else fp32."
)
workers_option = click.option(
    "--workers", type=NATURAL, help="Reading processes [default: by cores]."
)
exif_option = click.option(
    "--exif", is_flag=True, help="Honour EXIF rotation (ADM's preparation ignores it)."
)
on_bad_option = click.option(
    "--on-bad-image",
    "on_bad",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="Stop at an unreadable image, or leave it out and list it at the end.",
)
res_option = click.option(
    "--res", type=POSITIVE, help="Crop the images of folders to this size, as ADM does."
)
kind_option = click.option(
    "--kind",
    type=click.Choice(["dit", "sit"]),
    help="What a file under its authors' names holds, where no tensor tells.",
)
heads_option = click.option(
    "--heads",
    type=POSITIVE,
    help="Attention heads of a network whose file doesn't say [default: the published number].",
)
feature_options = Options(
    click.option(
        "--inception",
        default=INCEPTION,
        show_default=True,
        help="pytorch-fid's weights: a name or a file.",
    ),
    click.option(
        "--dinov2",
        default=DINOV2,
        show_default=True,
        help="DINOv2's weights, for fdd and kdd: a name or a file.",
    ),
    click.option(
        "--features",
        metavar="MODULE:FUNCTION",
        help="Another extractor instead: a function from uint8 images (N, H, W, 3) to "
        "features (N, D). Results are labelled with it.",
    ),
)


class Brief(click.Command):
    """A command whose --help leaves out what few need, and --help-all does not."""

    SHOWN = (
        *("ref", "against", "count", "labels", "card", "weights", "cfg", "preset", "steps"),
        "as_json",
    )

    def format_options(self, context, formatter):
        rows = []
        for option in self.get_params(context):
            row = option.get_help_record(context)
            if row and (context.meta.get("all") or option.name in (*self.SHOWN, "help", "all")):
                rows.append(row)
        with formatter.section("Options"):
            formatter.write_dl(rows)


def show_all(context, option, value):
    if value:
        context.meta["all"] = True
        click.echo(context.get_help(), color=context.color)
        context.exit()


help_all_option = click.option(
    "--help-all",
    "all",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_all,
    help="Show all options: how images are drawn, features, devices.",
)


def report(result, as_json, text):
    """On rank 0, print `result` as JSON or as a text for people."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if as_json:
        text = json.dumps(result)
    click.get_current_context().meta["reported"] = True
    click.echo("\n".join(map(shown, str(text).split("\n"))))


# ------------------------------------------------------------------------------------- the commands


def keep_memory():
    """On Linux, keep the memory of freed tensors for the next ones. Otherwise the C library hands
    it back, and page faults take up to a fifth of a training step on CPUs (docs/performance.md)."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: what is smaller comes from the heap
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much of the heap stays


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


# ---------------------------------------------------------------------------------------- dimr info


shape_options = Options(
    click.option("--layers", type=Numbers(int, "39,20"), help="Layers per branch, coarse to fine."),
    click.option("--dims", type=Numbers(int, "960,480"), help="Widths per branch."),
    click.option("--heads", type=POSITIVE),
    click.option(
        "--blocks",
        "kinds",
        type=Rows("dimr", "BLOCKS"),
        help="Kind of blocks, by branch [default: transformer, then convnext].",
    ),
    click.option("--norm", type=row_of("dimr", "NORMS")),
    click.option("--mlp", type=row_of("dimr", "MLPS")),
)


forecast_options = Options(
    click.option(
        "--gpus",
        type=POSITIVE,
        help="Say what training, drawing and measuring take on so many GPUs [default: 1].",
    ),
    click.option(
        "--gpu", type=row_of("forecast", "GPUS"), help="And of which kind [default: h100]."
    ),
    click.option(
        "--share",
        type=Real(0, 1, min_open=True),
        help="At this share of their peak [default: as bench.py measured, else the paper's 0.32].",
    ),
    click.option(
        "--bench",
        "measured",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False),
        help="What tools/bench.py --json printed on such a GPU [default: training.json and "
        "sampling.json, if they are here].",
    ),
)


@main.command()
@click.argument("what", required=False, metavar="[RUN|RUN@STEP|FILE|NAME]")
@click.option("--variant", type=VARIANT, help=f"[default: {DEFAULT_VARIANT}]")
@shape_options
@forecast_options
@kind_option
@click.option(
    "--micro-batch",
    type=POSITIVE,
    help="Compute as well what training with so many images per GPU and pass takes of its memory.",
)
@click.option(
    "--ema-profiles", type=WIDTHS, default=(), help="And with these averages, as dimr train."
)
@json_option
def info(what, variant, kind, micro_batch, ema_profiles, as_json, **values):
    """Size and cost of a network, branch by branch: of a variant, of one that differs from it as
    the options say, or of a run or weights. With --gpus or --gpu, a forecast: steps a second, days,
    GPU-hours, memory, disk, and the time to draw and measure 50,000 images.

    \b
    Examples:
      dimr info --variant xl2r
      dimr info --variant xl2r --micro-batch 64
      dimr info --variant m3r --layers 9,5 --dims 384,192 --heads 6
      dimr info --variant xl2r --gpus 8 --gpu h100 --micro-batch 64
      dimr info runs/mine
      dimr info runs/mine@5000
    """
    if what and variant:
        raise click.UsageError(f"{what} is a network already; leave out --variant, or {what}")
    variant = variant or DEFAULT_VARIANT
    config, known = network_of(what, variant, kind, shape_options.given(values))
    result = {"variant": what or variant, **costs(config), **known}
    lines = info_lines(result, config)
    if known:
        classes = shown(", ".join(known["classes"])) or "no names"
        lines.append(f"  step {known['step']}, classes: {classes}")
    asked = forecast_options.take(values)
    if asked["gpus"] or asked["gpu"]:
        result["forecast"], words = forecast_of(config, what, variant, micro_batch, asked)
        lines.append(words)
    elif micro_batch:
        result["memory"] = memory_costs(config, micro_batch, len(ema_profiles))
        lines += [memory_line(cost) for cost in result["memory"]]
    report(result, as_json, "\n".join(lines))


def network_of(what, variant, kind, shape):
    """(Config of weights `what`, or None of a variant, with the fields in `shape`, what the weights
    say of themselves). Raises UserError."""
    import networks
    import runfolder

    known = {}
    config = networks.VARIANTS[variant]
    if what:
        path = runfolder.find_weights(what)
        model, record = runfolder.read_weights(path, shape.get("heads"), kind)
        config = model.config
        known = {"step": record.get("step"), "classes": record.get("classes", [])}
    try:
        return networks.changed(config, shape), known
    except ValueError as error:
        raise UserError(f"this network can't be built: {error}") from None


def forecast_of(config, what, variant, micro_batch, asked):
    """`forecast.forecast` of a variant, with its paper's recipe, or of a run, with its own, and the
    same for people. Raises UserError."""
    import forecast
    import recipes
    import runfolder

    recipe = recipes.RECIPES[variant]
    if what:
        run = runfolder.run_of(runfolder.find_weights(what))
        if run is None:
            raise UserError(
                f"{what} says nothing of how long it is trained; give a run or --variant"
            )
        recipe = recipes.Recipe(**runfolder.read_config(run)["recipe"])
    measured = asked["measured"]
    if not measured:
        measured = [name for name in forecast.MEASUREMENTS if Path(name).is_file()]
    found = forecast.forecast(
        config,
        recipe,
        gpus=asked["gpus"] or 1,
        gpu=asked["gpu"] or "h100",
        variant=what or variant,
        share=asked["share"],
        micro_batch=micro_batch,
        measured=measured,
    )
    return found, forecast.lines(found)


def costs(config):
    """What `dimr info --json` says of a network."""
    branches = branch_costs(config)
    return {
        "params": sum(branch["params"] for branch in branches),
        "gmacs": round(sum(config.macs) / 1e9, 4),
        "branches": branches,
    }


def info_lines(result, config):
    """The same for people."""
    import networks

    line = (
        f"{result['variant']}: {result['params']:,} parameters, {result['gmacs']:,.4f} GMAC per "
        f"image and forward pass, {config.channels}×{config.size}×{config.size} {config.space} "
        f"input, {config.embeddings} class embeddings"
    )
    if networks.kind(config) != "dimr":
        line += f", {config.objective} on the {config.noise_schedule} schedule"
    lines = [line]
    if result["variant"] in PRINTED:
        lines[0] += f"; {PRINTED[result['variant']]}"
    return lines + [branch_line(branch) for branch in result["branches"]]


def branch_costs(config):
    """A dict per branch, coarse to fine, of which a peer has one: what it is made of, how many
    parameters it has, and what a forward pass of an image costs."""
    import networks

    model = networks.blank(config)
    if networks.kind(config) != "dimr":
        shape = (config.depth, "transformer", config.width, config.grid, model.TOKENS)
        return [branch_cost(0, *shape, config.macs[0], model)]
    rows = []
    for r, branch in enumerate(model.branches):
        shape = (config.blocks[r], config.branch_kinds[r], config.dims[r], config.grids[r])
        rows.append(branch_cost(r, *shape, branch.tokens, config.macs[r], branch))
    return rows


def branch_cost(r, blocks, kind, dim, grid, tokens, macs, module):
    """The row of branch r; `tokens` stand in front of its grid's cells."""
    return {
        "branch": r + 1,
        "blocks": blocks,
        "kind": kind,
        "dim": dim,
        "grid": grid,
        "tokens": grid**2 + tokens,
        "gmacs": round(macs / 1e9, 4),
        "params": sum(parameter.numel() for parameter in module.parameters()),
    }


def branch_line(cost):
    return (
        f"  branch {cost['branch']}: {cost['blocks']:2} {cost['kind']:11} blocks of width "
        f"{cost['dim']:4} on {cost['grid']}×{cost['grid']} ({cost['tokens']:4} tokens), "
        f"{cost['params']:13,} parameters, {cost['gmacs']:8.4f} GMAC"
    )


def memory_costs(config, micro_batch, profiles):
    """Bytes that training with so many averages kept takes, without and with
    --checkpoint-blocks."""
    import memory

    costs = []
    for recompute in (False, True):
        state, activations = memory.training_memory(
            config, micro_batch, recompute, profiles=profiles
        )
        costs.append(
            {
                "micro_batch": micro_batch,
                "checkpoint_blocks": recompute,
                "state": state,
                "activations": activations,
            }
        )
    return costs


def memory_line(cost):
    how = f"micro-batch {cost['micro_batch']}, bf16"
    if cost["checkpoint_blocks"]:
        how += ", --checkpoint-blocks"
    state = cost["state"] / 1e9
    activations = cost["activations"] / 1e9
    return (
        f"  training, {how}: {state + activations:.1f} GB per GPU ({state:.1f} GB state, "
        f"{activations:.1f} GB activations; computed, without torch.compile)"
    )


# --------------------------------------------------------------------------------------- dimr train


class ClassNames(click.ParamType):
    """Names of classes, from a file with one in each line or separated by commas, as a tuple."""

    name = "file|a,b,c"

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        if Path(value).is_file():
            try:
                lines = Path(value).read_text(errors="surrogateescape").splitlines()
            except OSError as error:
                self.fail(f"{value} can't be read ({error.strerror})", param, context)
        else:
            lines = value.split(",")
        names = tuple(line.strip() for line in lines if line.strip())
        if not names:
            self.fail(f"{value!r} names no class", param, context)
        return names


classes_option = click.option(
    "--classes",
    type=ClassNames(),
    help="Take only these classes: names, or a file with one in each line.",
)
verify_option = click.option(
    "--verify-data",
    "verify",
    is_flag=True,
    help="First read all of the data and compare them with their hashes: shards with those in "
    "their index, images with what they were at the first --verify-data.",
)
verify_shards_option = click.option(
    "--verify-data",
    "verify",
    is_flag=True,
    help="First compare shards with the hashes in their index.",
)
source_options = Options(
    classes_option,
    click.option(
        "--res",
        type=POSITIVE,
        help="Crop the images of a folder to this size [default: their own].",
    ),
    exif_option,
    on_bad_option,
    workers_option,
    verify_option,
)
ema_options = Options(
    click.option(
        "--ema-profiles",
        type=WIDTHS,
        help="Keep averages of these relative widths too, and snapshots of them, of which dimr ema "
        "makes the average of any width; 0.05,0.10 suit any run [default: none].",
    ),
    click.option(
        "--ema-every",
        type=POSITIVE,
        help="Steps between snapshots [default: about 64 in a run].",
    ),
    click.option(
        "--ema-precision",
        type=row_of("averages", "PRECISIONS"),
        help="Of the snapshots [default: fp32; fp16 halves them, and spoils widths outside the "
        "profiles].",
    ),
)
recipe_options = Options(
    click.option("--steps", type=POSITIVE, help="Optimiser steps in all."),
    click.option(
        "--batch-size", type=POSITIVE, help="Global: over all processes and accumulation steps."
    ),
    click.option(
        "--micro-batch",
        type=POSITIVE,
        help="Samples per process and pass; the rest is accumulated.",
    ),
    click.option("--lr", type=ABOVE_ZERO, help="Learning rate."),
    click.option("--warmup", type=NATURAL, help="Steps of linear warm-up."),
    click.option("--weight-decay", type=Real(min=0)),
    click.option("--betas", type=Numbers(float, "0.99,0.99", 2, below=1), help="AdamW's."),
    click.option("--ema", type=SHARE, help="Decay of the weights' moving average."),
    *ema_options.options,
    click.option(
        "--label-dropout", type=SHARE, help="Share of labels dropped; above 0 allows guidance."
    ),
    click.option(
        "--flip/--no-flip",
        default=None,
        help="Random horizontal flips [default: the variant's; off without one].",
    ),
    click.option("--grad-clip", type=ABOVE_ZERO, help="Largest gradient norm [default: off]."),
    click.option(
        "--target-scale",
        type=row_of("diffusion", "TARGET_SCALES"),
        help="Pooled noise targets: unit variance (release) or plain mean (paper).",
    ),
    click.option(
        "--loss",
        type=row_of("diffusion", "LOSSES"),
        help="Of all branches' predictions (multi), or of the last one alone (output).",
    ),
    precision_option,
    click.option("--compile/--no-compile", default=None, help="torch.compile [default: on CUDA]."),
    click.option(
        "--checkpoint-blocks/--no-checkpoint-blocks",
        default=None,
        help="Recompute activations: less memory, a third more work.",
    ),
    click.option(
        "--deterministic",
        is_flag=True,
        default=None,
        help="On CUDA too the same bytes each time, or a refusal; slower, not compiled.",
    ),
    click.option("--seed", type=SEED),
)
network_options = Options(
    *shape_options.options,
    click.option("--patch", type=POSITIVE, help="Side of a peer's patches."),
    click.option(
        "--objective",
        type=row_of("diffusion", "OBJECTIVES"),
        help="What the network predicts [default: epsilon, the noise].",
    ),
)
saving_options = Options(
    click.option(
        "--sample-every",
        type=NATURAL,
        help="Steps between sample grids, 0 for none [default: as --save-every].",
    ),
    click.option(
        "--save-every",
        type=POSITIVE,
        help="Steps between checkpoints [default: 5000, or a quarter of the run; one takes 16 "
        "bytes a parameter: 8.1 GB for xl2r].",
    ),
    click.option(
        "--keep",
        type=NATURAL,
        default=2,
        show_default=True,
        help="Newest checkpoints kept; 0 keeps all.",
    ),
    click.option(
        "--max-time",
        type=ABOVE_ZERO,
        help=f"Minutes after which to save and stop (exit status {RUN_AGAIN}).",
    ),
)
watch_options = Options(
    click.option(
        "--eval-every",
        type=POSITIVE,
        help="Steps between measurements of FID, unguided and with the averaged weights, into "
        "metrics.jsonl [default: never].",
    ),
    click.option(
        "--eval-images",
        type=click.IntRange(min=2),
        default=5000,
        show_default=True,
        help="Images drawn for each.",
    ),
    click.option(
        "--ref",
        help="What FID compares with, as in dimr eval fid [default: the name that fits, "
        "else the training images].",
    ),
    *feature_options.options,
)


log_option = click.option(
    "--log",
    "--logger",  # torchrun takes an option that others of its own begin with for one of these
    "log",
    multiple=True,
    type=row_of("loggers", "SINKS"),
    help="Tell this package too, if it is installed, of every step and sample grid; may be "
    "repeated; under torchrun it has to be spelled --logger [default: metrics.jsonl alone].",
)


validate_options = Options(
    click.option(
        "--validate",
        help="Images that are held out, as --data: the loss on them goes into metrics.jsonl and "
        "loss.png [default: none].",
    ),
    click.option(
        "--validate-every",
        type=NATURAL,
        help="Steps between, 0 for never again [default: as --save-every].",
    ),
)


@main.command()
@click.option(
    "--variant",
    type=VARIANT,
    help="Network and recipe [default: in proportion to the data and --steps; without any data: "
    f"{DEFAULT_VARIANT}].",
)
@click.option(
    "--data",
    help="Images, in any of the layouts of docs/data.md (one folder per class, ImageNet's tar, a "
    "zip, WebDataset's tars), or a folder that encode wrote [default: data/latents-SIZE or "
    "data/pixels-SIZE, then $DIMR_DATA, data/imagenet].",
)
@click.option(
    "--out",
    help="Run folder; a run that is there goes on [default: runs/VARIANT, runs/custom without].",
)
@click.option(
    "--init",
    help="Weights to start from, with their recipe: a name, a file, a run or RUN@STEP. Classes go "
    "by name.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Let a run that goes on change --lr, --grad-clip or --validate; recorded.",
)
@kind_option
@source_options
@recipe_options
@network_options
@device_option
@saving_options
@watch_options
@validate_options
@log_option
@json_option
def train(variant, data, out, as_json, **values):
    """Train a network; run the same command again to go on.

    With --variant, defaults are the paper's recipe (Table 4). Without, they are made for the data
    and the number of steps, said at the start and kept. The run folder holds config.json,
    metrics.jsonl, samples/, loss.png and checkpoints/.

    \b
    Examples:
      dimr train --data photos/ --res 64 --steps 20000
      torchrun --nproc-per-node 8 -m cli train --variant xl2r --micro-batch 64
      dimr train --data photos/ --res 64 --layers 9,5 --dims 384,192 --heads 6 --batch-size 64
      dimr train --data photos/ --res 64 --variant uvit-m4 --layers 9 --dims 384 --heads 6
      dimr train --data photos/ --res 64 --validate held-out/ --log tensorboard
    """

    goes_on = out is not None and (Path(out) / "config.json").exists()
    if data is None and variant is None and not goes_on:
        refuse_mistyped(out)
        goes_on = out is None and Path("runs/custom/config.json").exists()
        variant = None if goes_on else DEFAULT_VARIANT
    out = out or f"runs/{variant or 'custom'}"
    if data is None and not (Path(out) / "config.json").exists():
        data = training_data(variant, near=out)
    result = run_training(out, data, variant, values)
    report(result, as_json, training_line(result))
    if result["stopped"]:
        raise SystemExit(RUN_AGAIN)


@main.command()
@click.argument("run")
@click.option(
    "--from",
    "first",
    type=NATURAL,
    help="A checkpoint's step, or 0 for the start [default: the checkpoint before --to].",
)
@click.option(
    "--to", "last", type=POSITIVE, help="A later checkpoint's step [default: the newest]."
)
@click.option("--data", help="Where the run's data are, if they have moved.")
@workers_option
@device_option
@json_option
def audit(run, first, last, as_json, **values):
    """Train a stretch of a run again, elsewhere, from its configuration, data and seed, and compare
    losses and weights with what is there. The run folder is only read.

    The answer is "equal to the byte"; "equal to rounding", with the largest difference, which other
    numbers of processes or threads and other machines leave; or that it is NOT the same, and from
    which step on. Then the exit status is 1.

    \b
    Examples:
      dimr audit runs/mine
      dimr audit runs/mine --from 0 --to 5000
      torchrun --nproc-per-node 8 -m cli audit runs/xl2r --from 95000 --to 100000
    """
    import audit

    result = audit.audit(run, first, last, **values)
    report(result, as_json, audit.lines(result))
    if result["answer"] == audit.PARTED:
        raise SystemExit(1)


def refuse_mistyped(out):
    """Raise UserError if there is no run in folder `out`, but one beside it that is called nearly
    so."""
    if out is None:
        return
    runs = runs_beside(out)
    near = difflib.get_close_matches(Path(out).name, [run.name for run in runs])
    if near:
        found = ", ".join(str(Path(out).with_name(name)) for name in near)
        raise UserError(
            f"{out} holds no run to go on with; near it: {found}. To begin a run there give --data "
            "or --variant"
        )


def runs_beside(out):
    """The runs in the folder that `out` is in."""
    return sorted(path.parent for path in Path(out).parent.glob("*/config.json"))


def run_training(out, data, variant, values):
    """`training.train` with the options of `dimr train`."""
    import loggers
    import training

    source = training.Source(data, **source_options.take(values))
    return training.train(
        out,
        source,
        variant=variant,
        recipe=recipe_options.given(values),
        network=network_options.given(values),
        init=values["init"],
        kind=values["kind"],
        device=values["device"],
        saving=saving_of(values),
        watch=watch_of(values),
        validate=validation_of(values),
        sinks=loggers.sinks(values["log"]),
        force=values["force"],
    )


def saving_of(values):
    """The training.Saving that the options of `dimr train` say."""
    import training

    options = saving_options.take(values)
    max_time = options["max_time"]
    if max_time is not None:
        max_time *= 60  # seconds
    return training.Saving(
        every=options["save_every"],
        keep=options["keep"],
        sample_every=options["sample_every"],
        max_time=max_time,
    )


def watch_of(values):
    """The training.Watch that the options of `dimr train` say, or None."""
    import training

    options = watch_options.take(values)
    if options["eval_every"] is None:
        return None
    return training.Watch(
        every=options["eval_every"],
        images=options["eval_images"],
        ref=options["ref"],
        inception=options["inception"],
        features=options["features"],
    )


def validation_of(values):
    """The validation.Validation that the options of `dimr train` say."""
    import validation

    options = validate_options.take(values)
    return validation.Validation(options["validate"], options["validate_every"])


def training_data(variant, near):
    """Where a variant's training data is: what encode wrote, then, for a pixel model, images.
    Raises UserError, which names the runs beside `near`, where none is."""
    import networks
    import space

    config = networks.VARIANTS[variant]
    side = space.side(config)
    places = [space.folder(space.of(config), side)]
    encode = f"dimr encode --res {side}"
    if config.space == "pixel":
        places += image_folders()
        encode += " --pixels"
    for place in places:
        if place.exists():
            return place
    expected = " or ".join(str(place) for place in places)
    message = (
        f"no training data for {variant}: expected {expected}; give --data FOLDER, or run {encode} "
        "first"
    )
    runs = ", ".join(map(str, runs_beside(near)))
    if runs:
        message += f". {near} is no run to go on with; there are {runs}"
    raise UserError(message)


def image_folders():
    """Where images are looked for, first to last."""
    folders = [Path(folder) for folder in IMAGENET]
    if os.environ.get("DIMR_DATA"):
        folders.insert(0, Path(os.environ["DIMR_DATA"]))
    return folders


def training_line(result):
    loss = result["loss"] or math.nan
    then = f"now: dimr sample --weights {result['out']}"
    if result["stopped"]:
        then = f"stopped by {result['stopped']}, run the same command to go on"
    return (
        f"{result['out']}: step {result['step']:,} of {result['steps']:,}, loss {loss:.4f}, "
        f"{result['seconds']:.0f} s; {then}"
    )


# -------------------------------------------------------------------------------------- dimr sample

generator_options = Options(
    click.option(
        "--weights",
        help="A run, RUN@STEP, a weights file or a name [default: the newest run under runs/, else "
        "xl2r; dimr sample alone, without xl2r in the cache: fashion, which comes with dimr].",
    ),
    click.option(
        "--ema/--raw", default=True, help="Averaged weights, or the raw ones  [default: ema]."
    ),
    click.option(
        "--ema-width",
        type=ABOVE_ZERO,
        help="The average of this relative width instead, made in memory of the snapshots that "
        "train --ema-profiles left in the run (dimr ema).",
    ),
    click.option(
        "--guide",
        metavar="WEIGHTS",
        help="Autoguidance: away from what these weights predict, an earlier step of the same run "
        "(RUN@STEP) or a smaller network; without --cfg the only guidance.",
    ),
    click.option(
        "--vae",
        help="The VAE of latent models: a name or a file [default: the run's, else sd-vae-ft-ema].",
    ),
    kind_option,
    heads_option,
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
settings_options = Options(
    click.option(
        "--cfg",
        type=Guidance(),
        help="Guidance scale, 1 for none [default: what the weights advise where nothing else "
        "is said of guidance, else 1.5 with a null class, else 1].",
    ),
    click.option(
        "--cfg-power",
        type=ABOVE_ZERO,
        help="Exponent of the power-cosine schedule [default: constant].",
    ),
    click.option(
        "--cfg-interval",
        type=Numbers(float, "0.3,5", 2),
        help="Guide only at noise levels LOW < sigma/alpha <= HIGH.",
    ),
    click.option(
        "--cfg-channels",
        type=POSITIVE,
        help="Guide only the first channels: 3 as DiT's and SiT's own code [default: all].",
    ),
    click.option(
        "--guide-scale", type=Guidance(), help="Scale of --guide, 1 for none [default: 1.5]."
    ),
    click.option(
        "--preset",
        type=row_of("space", "PRESETS"),
        default="everyday",
        show_default=True,
        help="everyday: 2m at 25 NFE. paper: fast, 250 NFE (latent) or dpm-fast, 50 NFE (pixel); "
        "for a peer its own paper's: ddpm or sde, 250 NFE (DiT, SiT).",
    ),
    click.option("--steps", type=POSITIVE, help="Network evaluations (NFE)."),
    click.option(
        "--solver",
        type=row_of("solver", "SOLVERS"),
        help="Order and kind; plain predicts data (DPM-Solver++), dpm- noise (DPM-Solver); euler, "
        "heun and ancestral are what they are called; ddpm takes DiT's learned variance, sde is "
        "SiT's. SiT's dopri5 is left out: its steps depend on the whole batch.",
    ),
    click.option("--grid", type=row_of("solver", "GRIDS"), help="Spacing of the solver's times."),
)
labels_option = click.option(
    "--labels",
    metavar="balanced|random|FILE",
    help="Classes of a fair set for dimr eval: each in turn, at random from the image's seed (as "
    "EDM2 and guided-diffusion do), or a file's: .npy, .npz with arr_1, or text, one a line.",
)
batch_option = click.option("--batch-size", type=POSITIVE, help="Images at once, per process.")


@main.command()
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Class index or name; repeat for several, taken in turn [default: all].",
)
@click.option("-n", "count", type=IMAGES, help="Images in all [default: 16].")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Image k has seed SEED + k.")
@click.option("--seeds", type=Seeds(), help="These seeds instead: 0-63 or 3,7.")
@click.option(
    "--balanced",
    is_flag=True,
    help="Image i has class i mod K: --labels balanced. Implies --npz.",
)
@labels_option
@click.option(
    "--npz",
    is_flag=True,
    help="Write one .npz (arr_0, arr_1) instead of PNGs; an interrupted call goes on.",
)
@click.option(
    "--film",
    is_flag=True,
    help="Show as well how the first images come about, as film.png and film-animated.png.",
)
@click.option(
    "--out",
    help="Folder, or with --npz a file [default: samples/WEIGHTS-STEP-cfgSCALE-SOLVER-NFE].",
)
@generator_options
@settings_options
@batch_option
@json_option
def sample(classes, count, seed, seeds, as_json, **values):
    """Draw images of given classes.

    Each image has a seed of its own: asking for that class and seed alone gives it back.

    \b
    Examples:
      dimr sample --class 388 --cfg 1.5
      dimr sample --weights fashion --class Sneaker
      dimr sample --class "giant panda" --class 207 -n 8 --seed 100
      dimr sample --weights runs/xl2r --guide runs/xl2r@500000 --film
      torchrun --nproc-per-node 8 -m cli sample --balanced -n 50000 --preset paper
      dimr sample --labels val_labels.npy -n 50000
    """

    if values.pop("balanced"):
        if values["labels"] not in (None, "balanced"):
            raise click.UsageError(
                f"--balanced takes every class in turn and --labels {values['labels']} does not; "
                "give one of the two"
            )
        values["labels"] = "balanced"
    if values["labels"] and classes:
        raise click.UsageError(
            f"--labels {values['labels']} chooses the classes; leave out --class"
        )
    if values["film"] and (values["npz"] or values["labels"]):
        raise click.UsageError("--film goes with PNGs; leave out --npz, --balanced and --labels")
    if seeds and count and len(seeds) != count:
        raise click.UsageError(
            f"--seeds names {len(seeds)} seeds and -n says {count}; give one of the two"
        )
    if not seeds:
        seeds = range(seed, seed + (count or 16))
    result = run_sampling(classes, seeds, values)
    report(result, as_json, sampling_line(result))


def run_sampling(classes, seeds, values):
    """`sampling.sample` with the options of `dimr sample`."""
    import parallel
    import sampling

    labels = values["labels"]
    of_others = [values[name] for name in ("weights", "ema_width", "guide", "vae", "kind", "heads")]
    if not (classes or labels or any(of_others)):
        values["weights"] = sampling.at_hand()
        if values["weights"]:
            aloud(
                f"no run here: drawing from {values['weights']}, which comes with dimr; for "
                "ImageNet's classes: dimr weights get xl2r"
            )
    generator = load_generator(values)
    settings = sampling.Settings(**settings_options.take(values))
    tell_advice(generator, settings)
    if labels:
        chosen = sampling.choose_classes(labels, seeds, generator.config)
    else:
        known = [sampling.class_index(name, generator) for name in classes]
        known = known or list(range(generator.config.num_classes))
        chosen = [known[i % len(known)] for i in range(len(seeds))]
    parallel.start(generator.device, minutes=parallel.DAY)
    return sampling.sample(
        generator,
        chosen,
        seeds,
        settings,
        out=values["out"],
        batch_size=values["batch_size"],
        npz=values["npz"] or labels is not None,
        labels=labels,
        film=values["film"],
    )


def load_generator(values):
    """`sampling.load` with the options of `dimr sample` and `dimr eval`."""
    import sampling

    options = generator_options.take(values)
    if options["ema_width"] is not None and not options["ema"]:
        raise click.UsageError("--ema-width asks for an average and --raw for none; give one")
    return sampling.load(options.pop("weights"), **options)


def tell_advice(generator, settings):
    """Say which guidance the weights' own advice adds to `settings`, if it does."""
    import sampling

    advised = generator.advised(settings)
    if advised:
        aloud(f"guidance as {generator.name} advises: {sampling.guidance_words(advised)}")


def sampling_line(result):
    import sampling

    guide = ""
    if "guide" in result:
        guide = f"guide {result['guide_source']} {result['guide_scale']:g}, "
    of_all = ""
    if result.get("shown", result["n"]) < result["n"]:
        of_all = f" (the first {result['shown']})"
    if result.get("held", 0) > result["n"]:
        of_all += f"; the folder holds {result['held'] - result['n']:,} more from before"
    film = f" and {result['film']}, {result['animation']}" if "film" in result else ""
    words = sampling.guidance_words(result)
    return (
        f"{result['n']:,} images from {result['source']} ({words}, {guide}{result['solver']}, "
        f"{result['steps']} NFE) in {result['seconds']:.1f} s -> {result['out']}, to look at: "
        f"{result['picture']}{film}{of_all}"
    )


# ----------------------------------------------------------------------------------------- dimr ema


@main.command()
@click.argument("run")
@click.argument("out", required=False)
@click.option(
    "--width",
    type=ABOVE_ZERO,
    help="Relative width of the average: about 0.01 to 0.25, narrow is late and sharp.",
)
@click.option("--step", type=POSITIVE, help="A snapshot's step [default: the last].")
@click.option(
    "--plot",
    type=row_of("widths", "JUDGES"),
    help="Judge averages of many widths at several steps instead, by the loss on held-out images "
    "or by FID, and draw a table of it.",
)
@click.option(
    "--validate",
    help="Held-out images for --plot loss [default: those that the run validates on].",
)
@click.option(
    "-n",
    "images",
    type=POSITIVE,
    default=5000,
    show_default=True,
    help="Samples of each average for --plot fid.",
)
@click.option("--ref", help="Reference for --plot fid [default: as dimr eval fid].")
@click.option(
    "--inception", default=INCEPTION, show_default=True, help="Inception's weights for --plot fid."
)
@click.option("--features", help="module:function in Inception's place, for --plot fid.")
@device_option
@json_option
def ema(run, out, width, step, plot, as_json, **values):
    """Make the average of any width, after training, of a run's snapshots (arXiv:2312.02696).

    RUN was trained with --ema-profiles; RUN@STEP is RUN with that --step. OUT is a weights file
    that sample and eval take: .safetensors, or .pth under the authors' names [default: a file in
    RUN/averages, whose name is said]; with --plot a picture and its numbers. Snapshots that are
    damaged or missing are named and done without, as long as the rest spans the width.

    \b
    Examples:
      dimr train --variant xl2r --ema-profiles 0.05,0.10 --ema-precision fp16
      dimr ema runs/xl2r --width 0.075
      dimr ema runs/xl2r --width 0.12 --step 500000 wide.safetensors
      dimr ema runs/xl2r --plot fid
    """
    if plot:
        if width or step:
            raise click.UsageError("--plot takes widths and steps of its own; leave out the others")
        result = plot_widths(run, out, plot, values)
        if result is not None:  # on rank 0
            report(result, as_json, widths_line(result))
        return
    if width is None:
        raise click.UsageError("Missing option '--width' (or --plot)")
    import averaging

    if out and Path(out).suffix not in (".safetensors", ".pth"):
        raise click.BadParameter(
            f"{out} ends neither in .safetensors nor in .pth", param_hint="OUT"
        )
    result = averaging.write(run, width, step, out)
    report(result, as_json, averaging_line(result))


def plot_widths(run, out, plot, values):
    """`widths.plot` with the options of `dimr ema --plot`."""
    import extraction
    import parallel
    import widths

    device = parallel.pick_device(values["device"])
    parallel.start(device, minutes=parallel.DAY)
    extractor = None
    if plot == "fid" and values["features"]:
        extractor = extraction.custom(values["features"], device)
    elif plot == "fid":
        extractor = extraction.inception(values["inception"], device)
    judge = widths.Judge(values["validate"], extractor, values["images"], values["ref"])
    return widths.plot(run, judge, device=device.type, out=out)


def widths_line(result):
    best = result["best"]
    blank = ""
    if result["outside"]:
        blank = f" ({result['outside']} more are outside what the snapshots span: blank)"
    return (
        f"{len(result['points'])} averages of {result['run']}{blank}; the lowest "
        f"{result['judge']}, {best['value']:.4g}, at step {best['step']:,} and width "
        f"{best['width']:g} (dimr ema {result['run']} --step {best['step']} --width "
        f"{best['width']:g}) -> {result['picture']}"
    )


def averaging_line(result):
    return (
        f"width {result['width']:g} at step {result['step']:,}, of {result['snapshots']} snapshots "
        f"(mismatch {result['mismatch']:.2%}) -> {result['out']}"
    )


# ------------------------------------------------------------------------------------- dimr analyse


@main.group()
def analyse():
    """What a network's norms make of time: the paper's Figures 3 and 6, and what TD-LN learned.

    \b
    Examples:
      dimr analyse pca --weights dit-xl2-256
      dimr analyse time --weights runs/m3r
    """


analysis_options = Options(
    click.option(
        "--weights",
        help="A run, RUN@STEP, a weights file or a name [default: the newest run under runs/, else "
        "xl2r].",
    ),
    click.option(
        "--layers",
        type=Numbers(int, "7,14,21,28"),
        help="Blocks to look at, counted from 1 [default: at each quarter of the depth].",
    ),
    click.option(
        "--out", type=click.Path(path_type=Path), help="Folder [default: analysis/WEIGHTS]."
    ),
    click.option(
        "--ema/--raw", default=True, help="Averaged weights, or the raw ones  [default: ema]."
    ),
    kind_option,
    heads_option,
    device_option,
)


def analysis_target(values):
    """The analysis.Target that the options of `dimr analyse` say."""
    import analysis
    import sampling

    options = analysis_options.take(values)
    layers, out = options.pop("layers"), options.pop("out")
    generator = sampling.load(options.pop("weights"), precision="fp32", **options)
    return analysis.Target(generator, layers, out)


@analyse.command("pca")
@analysis_options
@click.option(
    "-n",
    "samples",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Classes, spread over all.",
)
@settings_options
@json_option
def analyse_pca(samples, as_json, **values):
    """Principal components of the vectors that adaLN-Zero emits along sampling (Figs. 3, 6).

    For γ and β of attention (1) and of the MLP (2), at some depths, over the sampler's steps and
    some classes: pca.png with the share of the variance that each component explains, and pca.json.
    For DiT, SiT, and networks trained with --norm adaln.

    Example: dimr analyse pca --weights dit-xl2-256 --layers 7,14,21,28
    """
    import analysis
    import sampling

    settings = sampling.Settings(**settings_options.take(values))
    found = analysis.pca(analysis_target(values), settings, samples)
    report(found, as_json, analysis.pca_lines(found))


@analyse.command("time")
@analysis_options
@json_option
def analyse_time(as_json, **values):
    """What TD-LN's two vectors learned: γ(τ) and β(τ) over time, per branch and depth.

    time.png has a panel per vector, from noise to data, and time.json the numbers. --layers count
    within each branch.

    Example: dimr analyse time --weights runs/m3r
    """
    import analysis

    found = analysis.time_dependence(analysis_target(values))
    report(found, as_json, analysis.time_lines(found))


# -------------------------------------------------------------------------------------- dimr encode


@main.command()
@click.option(
    "--data",
    help="Images, in any of the layouts of docs/data.md: one folder per class, images alone, "
    "ImageNet's tar, a zip, WebDataset's tars [default: $DIMR_DATA, data/imagenet/train, "
    "data/imagenet].",
)
@classes_option
@click.option(
    "--from-latents",
    help="Take latents in EDM2's form instead: a zip or folder of .npy with a dataset.json.",
)
@click.option(
    "--out",
    help="Folder to write; an unfinished one goes on [default: data/latents-RES or "
    "data/pixels-RES].",
)
@click.option(
    "--res",
    type=POSITIVE,
    help="Side of the square crop, in pixels: 64, 256, 512, ... [required, but for latents].",
)
@click.option(
    "--pixels",
    is_flag=True,
    help="Store the crops themselves, for pixel models, instead of latents.",
)
@click.option(
    "--vae",
    "vae_weights",
    default=VAE,
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
@exif_option
@on_bad_option
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="In which the VAE computes; bf16 loses detail.",
)
@device_option
@workers_option
@click.option(
    "--verify", is_flag=True, help="Only compare the shards of a finished set with their hashes."
)
@json_option
def encode(data, from_latents, out, res, pixels, channels, verify, as_json, **options):
    """Turn images into shards that train reads fast: latents, or pixels.

    Crops as ADM does. Run the same command again to go on after an interruption, or to redo damaged
    shards; the bytes written depend on neither, nor on the number of processes. Latents come with
    preview.png, to look at.

    \b
    Examples:
      dimr encode --res 256                              ImageNet to latents, 42 GB
      dimr encode --res 64 --pixels --data photos/       crops for a pixel model
      dimr encode --res 256 --data ILSVRC2012_img_train.tar
      torchrun --nproc-per-node 8 -m cli encode --res 256
      dimr encode --res 256 --verify
    """
    import downloads
    import encoding

    if res is None and (out is None or not (from_latents or verify)):
        raise click.UsageError("Missing option '--res'.")
    if from_latents and (data or pixels):
        other = "--data" if data else "--pixels"
        raise click.UsageError(f"--from-latents takes no {other}")
    if out is None:
        out = encoded_folder(res, pixels)
    if verify:
        verify_shards(out, as_json)
        return
    if channels is not None:
        channels = int(channels)
    source = from_latents or data or images_to_encode()
    if not pixels and options["vae_weights"] == VAE:
        downloads.ask(VAE)
    result = encoding.encode(
        source,
        out,
        res,
        pixels=pixels,
        from_latents=from_latents is not None,
        channels=channels,
        **options,
    )
    report(result, as_json, encoding_lines(result, out))


def encoded_folder(res, pixels):
    """Where `dimr encode` writes if not told."""
    import space

    if pixels:
        return str(space.folder(space.SPACES["pixel"], res))
    return str(space.folder(space.SPACES["latent"], res))


def verify_shards(out, as_json):
    """Raises UserError if any is damaged."""
    import encoding

    result = encoding.verify(out)
    found = f"{result['shards']} shards of {result['items']:,} items in {out}"
    if as_json or not result["damaged"]:
        report(result, as_json, f"{found} are as they were written")
    if result["damaged"]:
        raise UserError(
            f"{'; '.join(result['damaged'])}. Run the encode that wrote {out} again: it redoes them"
        )


def images_to_encode():
    """The folder that DIMR_DATA names, else ImageNet's. Raises UserError."""
    if os.environ.get("DIMR_DATA"):
        return os.environ["DIMR_DATA"]
    for place in IMAGENET:
        if Path(place).is_dir():
            return place
    raise UserError(
        f"no images: expected ImageNet in {IMAGENET[0]}; give --data FOLDER or set DIMR_DATA"
    )


def encoding_lines(result, out):
    items = "images" if result["kind"] == "pixels" else result["kind"]
    line = (
        f"{result['items']:,} {items} of {result['classes']:,} classes in "
        f"{result['shards']} shards, {result['bytes'] / 1e6:,.1f} MB, "
        f"{result['encoded_images']:,} images encoded in {result['seconds']:.1f} s -> {out}"
    )
    if (Path(out) / "preview.png").is_file():
        line += f", to look at: {Path(out) / 'preview.png'}"
    lines = [line]
    for skipped in result["skipped"]:
        lines.append(shown(f"skipped {skipped['image']}: {skipped['reason']}"))
    if result["skipped"]:
        lines.append(f"{len(result['skipped'])} unreadable images skipped")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- dimr runs


@main.group("runs", invoke_without_command=True)
@click.option("--under", default="runs", show_default=True, help="Folder that the runs are in.")
@json_option
@click.pass_context
def runs_group(context, under, as_json):
    """List the runs: variant, step, loss, FID if it was watched, size on disk, newest sample grid.

    The run written to last comes first; the loss is the mean of the last 50 steps.

    \b
    Examples:
      dimr runs
      dimr runs --under /scratch/runs --json
      dimr runs prune runs/xl2r --keep-every 100000
    """
    if context.invoked_subcommand is not None:
        return
    import inventory

    found = inventory.runs(under)
    report(found, as_json, inventory.table(found))


@runs_group.command("prune")
@click.argument("run")
@click.option(
    "--keep-every",
    type=POSITIVE,
    required=True,
    help="Keep the checkpoints whose step is a multiple of this, and the newest.",
)
@click.option("--dry-run", is_flag=True, help="Delete nothing; say what would be.")
@json_option
def runs_prune(run, keep_every, dry_run, as_json):
    """Delete a run's checkpoints but for one every so many steps, and say how much that freed.

    The newest whole checkpoint always stays. A run that trains is left alone. One that goes on with
    fewer --keep than are left deletes the oldest of them: give it --keep 0.

    \b
    Examples:
      dimr runs prune runs/xl2r --keep-every 100000 --dry-run
      dimr runs prune runs/xl2r --keep-every 100000
    """
    import inventory

    result = inventory.prune(run, keep_every, dry_run)
    report(result, as_json, inventory.pruned_lines(result))


# ----------------------------------------------------------------------- dimr curves, demo, weights


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
@click.option("--seed", type=SEED, default=0, show_default=True)
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
        f"{result['accuracy_generated']:.3f}; coverage {result['coverage']:.3f}; distance to "
        f"training digits relative to real ones {result['nearest_train']:.2f}; "
        f"{result['seconds']:.0f} s\nlook at {result['picture']} and {result['run']}\n"
        + "\n".join(["next:", *(f"  {command}" for command in result["next"])]),
    )


@main.group("weights", invoke_without_command=True)
@json_option
@click.pass_context
def weights_group(context, as_json):
    """What there is by name: the network that comes with dimr, and what can be fetched, released
    weights, the VAE, Inception, ADM's references.

    Wherever a command takes weights, a VAE or a reference, these names work, and are fetched when
    first used. DIMR_HOME moves the cache; DIMR_OFFLINE=1 forbids downloads; HF_ENDPOINT and
    http(s)_proxy are honoured.

    \b
    Examples:
      dimr weights
      dimr weights get sd-vae-ft-ema
    """
    import downloads

    if context.invoked_subcommand is not None:
        return
    table = downloads.listing()
    lines = [asset_lines(asset) for asset in table]
    lines.append(f"cache: {downloads.cache()}")
    report(table, as_json, "\n".join(lines))


def asset_lines(asset):
    size = "?"
    if asset["size"]:
        size = f"{asset['size']:,}"
    cached = "-"
    if asset["cached"]:
        cached = "cached"
    if asset["url"] is None:
        cached = "ships"
    first = f"{asset['name']:14} {size:>15} bytes  {cached:7} {asset['what']}"
    return f"{first}\n{'':14} {asset['licence']}"


@weights_group.command("get")
@click.argument("name")
@json_option
def weights_get(name, as_json):
    """Fetch NAME into the cache, if it isn't there, and print where it is.

    Example: dimr weights get xl2r
    """
    import downloads

    if name not in downloads.ASSETS:
        known = ", ".join(downloads.ASSETS)
        raise click.BadParameter(f"{name!r} is not one of {known}", param_hint="NAME")
    path = downloads.fetch(name)
    report({"name": name, "path": str(path)}, as_json, path)


@main.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@kind_option
@heads_option
@json_option
def convert(source, target, kind, heads, as_json):
    """Turn released weights into ours, or ours into released ones.

    IN is a run, RUN@STEP, a file or a name (see dimr weights). OUT ends in .safetensors for our
    names, in .pth for the authors' of DiMR, which their code loads. The configuration goes with the
    weights.

    \b
    Examples:
      dimr convert xl2r xl2r.safetensors
      dimr convert runs/mine mine.pth
      dimr convert runs/mine@5000 mine-5000.safetensors
    """
    import runfolder

    model, record = runfolder.read_weights(runfolder.find_weights(source), heads, kind)
    runfolder.write_weights(target, model, record)
    count = sum(parameter.numel() for parameter in model.parameters())
    result = {"out": target, "params": count, "config": dataclasses.asdict(model.config)}
    report(result, as_json, f"{count:,} parameters -> {target}")


# ---------------------------------------------------------------------------------------- dimr eval


@main.group("eval")
def eval_group():
    """Measure samples: FID, sFID, Inception Score, precision and recall, KID, as ADM's suite does,
    with a standard error each; FD-DINOv2.

    \b
    Examples:
      dimr eval fid          the newest balanced set, else what the newest run draws
      dimr eval all samples.npz --ref imagenet256 --against xl2r
      dimr eval fid a.npz b.npz --ref imagenet256          is the difference real?
    """


METRIC_HELP = """{what}

    SAMPLES is an .npz with arr_0 (uint8, N × H × W × 3), a folder of images, or a run that draws
    --count of them, which are measured without being written. Without it: the newest fair set that
    sample wrote, else what the newest run draws. Of several, each is compared with the first, and a
    line says which differences are within noise. Published numbers are of 50,000 samples.

    ± is one standard error, from leaving out each of 20 blocks of the images in turn.

    \b
    Examples:
      dimr eval {name} samples.npz --ref imagenet256 --against xl2r
      dimr eval {name} photos/ --ref reference.safetensors --json
      dimr eval {name} ours.npz theirs.npz --ref imagenet256
      dimr eval {name} --weights runs/xl2r --labels random --card card.json
      torchrun --nproc-per-node 8 -m cli eval {name} --weights runs/xl2r --preset paper
    """
metric_options = Options(
    click.option(
        "--ref",
        help="What to compare with: imagenet64, imagenet256, imagenet512, ADM's .npz, a file "
        "that dimr eval stats wrote, or images [default: the name that fits, else the images "
        "that the run was trained on].",
    ),
    click.option(
        "--against", type=VARIANT, help="Show the paper's results for this variant beside."
    ),
    click.option(
        "-n",
        "--count",
        type=click.IntRange(2, MOST_IMAGES),
        help="Images to draw [default: 50000].",
    ),
    click.option("--keep", is_flag=True, help="Write the images drawn, as sample --labels does."),
    labels_option,
    click.option(
        "--adm",
        is_flag=True,
        help="Distances for precision and recall in float16 where they stay finite, as ADM's "
        "TensorFlow suite has them.",
    ),
    click.option(
        "--card",
        type=click.Path(path_type=Path),
        help="Write all it takes to repeat the numbers: CARD.json, and CARD.md for people.",
    ),
    *feature_options.options,
    res_option,
    verify_shards_option,
)


def metric_command(name, what):
    """Make `dimr eval NAME`, which measures `what`."""

    @eval_group.command(name, cls=Brief, help=METRIC_HELP.format(name=name, what=what))
    @click.argument("samples", nargs=-1)
    @metric_options
    @generator_options
    @settings_options
    @batch_option
    @json_option
    @help_all_option
    def command(samples, against, as_json, **values):
        import cards
        import evaluation

        refuse_contradictions(samples)
        card = values.pop("card")
        if card:
            cards.check(card)
        options = dict(values)
        result = run_evaluation(name, samples, values)
        if result is None:
            return
        if card:
            cards.write(card, cards.card(name, result, options))
        if "sets" in result:
            report(result, as_json, evaluation.comparison_table(result))
            return
        text = evaluation.table(result, against)
        if against:
            result = {**result, "paper": evaluation.PAPER.get(against, [])}
        report(result, as_json, text)

    return command


def refuse_contradictions(samples):
    """Raise UsageError where options of drawing come with sets that are there already."""
    drawing = options_of_drawing()
    if any(is_network(one) for one in samples):
        drawing = {name: words for name, words in drawing.items() if name == "weights"}
    if samples and drawing:
        words = ", ".join(drawing.values())
        raise click.UsageError(
            f"SAMPLES are measured as they are; leave out {words}, or name a run among SAMPLES"
        )


def options_of_drawing():
    """{name: as one types it} of the options the user gave that only drawing takes."""
    context = click.get_current_context()
    drawing = {*generator_options.names, *settings_options.names, "count", "keep", "labels"}
    drawing.remove("device")
    return {
        option.name: "/".join(option.opts + option.secondary_opts)
        for option in context.command.params
        if option.name in drawing
        and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    }


def is_network(source):
    """Whether one of SAMPLES is a run or weights, which are to draw, and no set of images."""
    import downloads
    import runfolder

    if source in downloads.ASSETS and not Path(source).exists():
        return not downloads.ASSETS[source].file.endswith(".npz")
    path, step = runfolder.run_and_step(source)
    return (
        step is not None
        or bool(runfolder.checkpoints(path))
        or (path.is_file() and path.suffix in (".safetensors", ".pth", ".pt"))
    )


def run_evaluation(name, samples, values):
    """`evaluation.evaluate` with the options of `dimr eval NAME`, of several sets
    `evaluation.compare_sets`: on rank 0 their result."""
    import distortion
    import evaluation
    import sampling

    extractors = extractors_of(name, values)
    if not samples and not options_of_drawing():
        samples = [path for path in [evaluation.newest_fair()] if path]
    settings = sampling.Settings(**settings_options.take(values))
    how = evaluation.How(
        ref=values["ref"],
        res=values["res"],
        batch_size=values["batch_size"],
        adm=values["adm"],
        verify=values["verify"],
    )
    keep = values["keep"] or len(extractors) > 1  # drawn once, read by each
    options = generator_options.take(values)
    sets = [set_of(one, settings, values, options, keep) for one in samples or [options["weights"]]]
    if len(sets) == 1:
        return evaluation.evaluate(name, sets[0], extractors, how)
    names = distortion.set_names(samples)
    return evaluation.compare_sets(name, dict(zip(names, sets, strict=True)), extractors, how)


def set_of(source, settings, values, options, keep):
    """One of SAMPLES: the images there, or those that a network draws; `keep` writes them first."""
    import evaluation
    import extraction
    import imagesets
    import sampling

    if source is not None and source != options["weights"] and not is_network(source):
        return imagesets.open_set(source, values["res"], verify=values["verify"])
    generator = load_generator({**options, "weights": source})
    tell_advice(generator, settings)
    labels = values["labels"] or sampling.BALANCED
    count = values["count"] or count_of(labels) or evaluation.COUNT
    generation = extraction.Generation(generator, count, settings, values["batch_size"], labels)
    if not keep:
        return generation
    if not values["keep"]:
        aloud("Inception and DINOv2 both look at the images, so they are written first")
    return imagesets.open_set(draw_set(generation), values["res"])


def aloud(line):
    """Say a line on stderr, on rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        click.echo(line, err=True)


def count_of(labels):
    """How many labels a file holds, if `labels` names one, else None."""
    import imagesets
    import sampling

    if labels in sampling.LABELS:
        return None
    return len(imagesets.read_labels(labels))


def draw_set(generation):
    """Write the images of a Generation and return their path."""
    import sampling

    drawn = sampling.sample(
        generation.generator,
        generation.classes,
        generation.seeds,
        generation.settings,
        batch_size=generation.batch_size,
        npz=True,
        labels=generation.labels,
    )
    return drawn["npz"]


def extractors_of(name, values):
    """The extraction.Extractor by kind that `dimr eval NAME` needs, once the other processes have
    been joined. `all` takes DINOv2 where its weights are there or named."""
    import downloads
    import evaluation
    import extraction

    kinds = evaluation.kinds(name)
    dinov2 = values["dinov2"]
    if values["features"] and kinds == [extraction.KINDS[1]]:
        raise click.UsageError(f"{name} is made of DINOv2's features; leave out --features")
    there = dinov2 != DINOV2 or downloads.place(DINOV2).is_file()
    if len(kinds) > 1 and (values["features"] or not there):
        kinds = kinds[:1]
    found = {}
    for kind in kinds:
        found[kind] = extractor_of(kind, values)
    return found


def extractor_of(kind, values):
    """The extraction.Extractor of a kind that the options name, once the other processes have been
    joined."""
    import downloads
    import extraction
    import parallel

    device = parallel.pick_device(values["device"])
    parallel.start(device, minutes=parallel.DAY)
    if values["features"]:
        return extraction.custom(values["features"], device)
    source = values[kind]
    if source == kind:
        downloads.ask(source)
    return extraction.EXTRACTORS[kind](source, device)


for _name, _what in ours.words("evaluation", "METRICS").items():
    metric_command(_name, _what)


# --------------------------------------------------------------------------------------- dimr sweep


def axis_options(command):
    """An option for each axis of a sweep."""
    for name, words in reversed(ours.words("sweeping", "AXES").items()):
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, name, multiple=True, metavar="VALUES", help=words)(command)
    return command


fixed_options = Options(
    *[
        option
        for name, option in zip(settings_options.names, settings_options.options, strict=True)
        if name not in ours.keys("sweeping", "AXES")
    ]
)


@main.command()
@axis_options
@click.option(
    "-n",
    "--count",
    type=click.IntRange(min=20),
    default=5000,
    show_default=True,
    help="A point's images.",
)
@click.option(
    "--metric",
    type=click.Choice([key for key in ours.keys("evaluation", "METRICS") if key != "all"]),
    default="fid",
    show_default=True,
    help="Points are judged by its first number.",
)
@click.option(
    "--ref", help="As of dimr eval [default: what fits, else what the run was trained on]."
)
@click.option("--out", help="Folder of the sweep; one that is there goes on [default: sweeps/RUN].")
@labels_option
@feature_options
@res_option
@generator_options
@fixed_options
@batch_option
@json_option
def sweep(count, metric, ref, out, labels, as_json, **values):
    """Measure a network with many settings: guidance, its interval, NFE.

    Points share classes and seeds, which no final measure uses, and are compared block by block:
    a table and a picture say which is best and which can't be told from it, and the command for
    the final 50,000. Run it again to go on after an interruption, or with more values: only points
    that are new are drawn.

    \b
    Examples:
      dimr sweep --weights runs/xl2r --cfg 1.2:2.0:0.1
      dimr sweep --weights xl2r --cfg 1.4,1.6 --cfg-interval none --cfg-interval 0.3,5 --steps 25,50
      torchrun --nproc-per-node 8 -m cli sweep --weights runs/xl2r --cfg 1:3:0.25 -n 10000
    """
    import sampling
    import sweeping

    given = {name: values.pop(name) for name in sweeping.AXES}
    try:
        axes = sweeping.read_axes(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if not axes:
        raise click.UsageError(
            "a sweep over nothing; give --cfg 1.2:2.0:0.1 or another axis "
            f"({', '.join(sweeping.AXES)}) several values"
        )
    settings = sampling.Settings(**fixed_options.take(values))
    result = run_sweep(metric, axes, settings, count, labels, ref, out, values)
    if result is not None:
        report(result, as_json, sweeping.lines(result))


def run_sweep(metric, axes, settings, count, labels, ref, out, values):
    """`sweeping.run` with the options of `dimr sweep`: on rank 0 its result."""
    import evaluation
    import sampling
    import sweeping

    (kind,) = evaluation.kinds(metric)
    extractor = extractor_of(kind, values)
    how = evaluation.How(ref=ref, res=values["res"])
    generator = load_generator(dict(values))
    job = sweeping.Sweep(
        generator,
        axes,
        settings,
        metric,
        count,
        labels or sampling.BALANCED,
        values["batch_size"],
    )
    if job.takes_advice:
        tell_advice(generator, settings)
    return sweeping.run(job, extractor, how, out, values)


@eval_group.command("verify")
@device_option
@json_option
def eval_verify(device, as_json):
    """Does this machine compute what ours did? Bit-equal, to rounding, or not, and in which stage.

    The whole path of dimr eval, from reading images to every metric, on a few images that come with
    the tool and an Inception network of random weights: the first thing to ask of a strange number.
    Exit status 1 where a stage differs.

    Example: dimr eval verify --device cuda
    """
    import verification

    result = verification.verify(device)
    report(result, as_json, verification.lines(result))
    if not result["same"]:
        raise UserError(
            f"this machine does not compute what ours did, from {result['first_different']!r} on; "
            "look at the versions of what that stage uses (dimr eval verify --json)"
        )


@eval_group.command("stats")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@feature_options
@click.option(
    "--kind",
    type=click.Choice(["inception", "dinov2"]),
    default="inception",
    show_default=True,
    help="Of features: those of fdd and kdd are dinov2.",
)
@res_option
@verify_shards_option
@batch_option
@device_option
@json_option
def eval_stats(folder, out, as_json, **values):
    """Measure reference images once, for --ref: moments of all, features of 10,000.

    FOLDER holds images at any depth, or pixel shards; an .npz with arr_0 will do. OUT ends in
    .safetensors.

    Example: dimr eval stats data/imagenet/train imagenet128.safetensors --res 128
    """
    import evaluation

    if out.suffix != ".safetensors":
        raise click.BadParameter(f"{out} does not end in .safetensors", param_hint="OUT")
    found = run_measurement(folder, values)
    if found is None:
        return
    found.save(out)
    report(
        {"out": str(out), **evaluation.describe(found), "features": found.extractor},
        as_json,
        f"{found.count:,} images of {found.size}×{found.size} from {folder}, {found.extractor} -> "
        f"{out}",
    )


def run_measurement(folder, values):
    """`extraction.measure` with the options of `dimr eval stats`: on rank 0 what it found."""
    import evaluation
    import extraction
    import imagesets

    extractor = extractor_of(values["kind"], values)
    images = imagesets.open_set(folder, values["res"], verify=values["verify"])
    return extraction.measure(
        images, extractor, evaluation.REFERENCE_IMAGES, batch_size=values["batch_size"]
    )


@eval_group.command("fidelity")
@click.argument("samples", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--classifier",
    default=JUDGE,
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
    help="Folder for marked.csv and contact sheets [default: SAMPLES-marked, or of several "
    "sets marked-NAMES].",
)
@res_option
@click.option("--batch-size", type=POSITIVE, help="Images at once.")
@device_option
@json_option
def eval_fidelity(samples, classifier, threshold, out, res, batch_size, device, as_json):
    """Mark images of low fidelity: a classifier gives their class a probability under the threshold
    (paper, Sec. 5.3).

    Each of SAMPLES: what sample wrote, an .npz with classes under arr_1, or one folder per class,
    in the order of the classifier's classes (ImageNet's). Preprocessing: bicubic to 248, centre
    crop to 224, values to [-1, 1]. Not every image marked is distorted: let people judge the
    contact sheets, and give their votes to dimr eval distortion.

    Of several sets the shares stand side by side, and the marked images of all are shuffled on one
    set of sheets that doesn't say whose they are. The key lies beside the folder.

    \b
    Examples:
      dimr eval fidelity samples/xl2r-cfg1.5-fast-250nfe/balanced-50000.npz
      dimr eval fidelity dimr.npz uvit.npz dit.npz --out judged
    """
    import distortion
    import downloads
    import imagesets
    import parallel

    sets = [imagesets.open_set(path, res) for path in samples]
    if classifier == JUDGE:
        downloads.ask(classifier)
    judge = distortion.load(classifier, parallel.pick_device(device))
    options = {"threshold": threshold, "batch_size": batch_size}
    if len(sets) > 1:
        result = distortion.compare(sets, judge, out, **options)
        report(result, as_json, distortion.comparison_table(result))
        return
    out = out or samples[0].with_name(f"{samples[0].stem}-marked")
    result = distortion.mark(sets[0], judge, out, **options)
    report(result, as_json, distortion.table(result))


@eval_group.command("distortion")
@click.argument("votes", type=click.Path(path_type=Path))
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="What dimr eval fidelity wrote beside the sheets of several sets: a rate for each.",
)
@json_option
def eval_distortion(votes, key, as_json):
    """The distortion rate that people's votes give, as in the paper's Sec. 5.3.

    VOTES is a CSV with the columns image, person, distorted (1/0 or yes/no). The rate is the mean
    over people of the share of the images they judged that they call distorted; the interval is
    Student's t over people, 95%.

    \b
    Examples:
      dimr eval distortion votes.csv
      dimr eval distortion votes.csv --key judged-key.csv
    """
    import distortion

    result = distortion.distortion(votes, key)
    report(result, as_json, distortion.distortion_lines(result))


if __name__ == "__main__":
    main(prog_name="dimr")
