"""Training (paper, Sec. 5.1 and Table 4): AdamW, constant rate after a linear warm-up, EMA,
multi-scale loss.

What a sample is made of (which image, flip, time, noise, dropped label) depends on the seed and on
the sample's position in the run, counted from 0 over all steps. So any split of the global batch
over processes and accumulation steps computes the same, and a resumed run goes on as if it had
never stopped."""

import ours

import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import averages
import averaging
import dataset
import defaults
import diffusion
import dimr
import imagenet_names
import imagesets
import journal
import networks
import parallel
import randomness
import runfolder
import sampling
import space
import storage
from storage import VERSION, UserError, open_tensors, read_json, write_json

LOG_EVERY = 10  # steps between reads of the losses from the device
GRID = {"pixel": 64, "latent": 16}  # images of a sample grid on a GPU
# how the names of tensors end that have a row per class
CLASS_EMBEDDING = ("class_token.weight", "embedding_table.weight", "label_emb.weight")
NULL_CLASS = "the null class"
STOPPING = b"\nfinishing this step and saving; Ctrl-C again ends at once\n"
GRID_ON_CPU = {"pixel": 16, "latent": 4}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are the paper's (Table 4) where it gives them."""

    lr: float = 2e-4
    steps: int = 1_000_000
    batch_size: int = 1024  # global: over all processes and accumulation steps
    micro_batch: int | None = None  # per process and pass; None: the process's share at once
    warmup: int = 5000
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.99, 0.99)
    ema: float = 0.9999
    ema_profiles: tuple[float, ...] = ()  # widths of averages kept for afterwards (averaging.py)
    ema_every: int | None = None  # steps between their snapshots; None: averaging.COUNT in a run
    ema_precision: str = "fp32"  # of the snapshots; a key of averages.PRECISIONS
    label_dropout: float = 0.1  # above 0 the network gets a null class
    flip: bool = True  # random horizontal flips
    grad_clip: float | None = None
    target_scale: str = "unit"
    loss: str = "multi"  # or "output": of the last prediction alone (Table 2)
    precision: str | None = None  # None: bf16 on CUDA, else fp32
    compile: bool | None = None  # None: on CUDA
    checkpoint_blocks: bool = False
    deterministic: bool = False  # the same bytes each time on CUDA too, or refused
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "ema_profiles", tuple(self.ema_profiles))

    def learning_rate(self, step):
        """Linear warm-up from 0, then constant."""
        if self.warmup:
            return self.lr * min(1, step / self.warmup)
        return self.lr


_PIXELS = Recipe(lr=3e-4, steps=300_000, label_dropout=0)
_OUTPUT = dataclasses.replace(_PIXELS, loss="output")
_DIT = dict(lr=1e-4, batch_size=256, warmup=0, weight_decay=0, betas=(0.9, 0.999))
_DIGITS = dict(batch_size=32, warmup=200, betas=(0.9, 0.98), ema=0.998, weight_decay=0.01)

RECIPES = {
    "m3r": _PIXELS,
    "l3r": _PIXELS,
    "xl2r": Recipe(),
    "xl3r": Recipe(),
    "g2r": Recipe(),
    "demo": Recipe(lr=8e-3, steps=3800, flip=False, **_DIGITS),
    "table2-1": _PIXELS,
    "table2-2": _PIXELS,
    "table2-3": _OUTPUT,
    "table2-4": _OUTPUT,
    "table2-5": _OUTPUT,
    "table2-6": _PIXELS,
    # U-ViT's own (arXiv:2209.12152, App. A), whose rates and steps the paper takes over
    "uvit-m4": _PIXELS,
    "uvit-l4": _PIXELS,
    "uvit-l2": Recipe(steps=300_000, label_dropout=0.15),
    "uvit-h2": Recipe(steps=500_000),
    "uvit-l4-512": Recipe(steps=500_000, label_dropout=0.15),
    "uvit-h4": Recipe(steps=500_000),
    # DiT's (arXiv:2212.09748, Sec. 4), which SiT took over: B/2 400K steps as in its comparison of
    # sizes, XL/2 as long as the released weights
    "dit-b2": Recipe(steps=400_000, **_DIT),
    "dit-xl2": Recipe(steps=7_000_000, **_DIT),
    "dit-xl2-512": Recipe(steps=3_000_000, **_DIT),
    "sit-xl2": Recipe(steps=7_000_000, **_DIT),
}
# when a run is resumed
MAY_CHANGE = {"steps", "micro_batch", "compile", "checkpoint_blocks", "ema_precision"}
MAY_BE_FORCED = {"lr", "grad_clip"}  # with --force: they move no sample
# of a recipe, what belongs to a machine and a run, not to the weights that come of it
OF_THE_RUN = {*MAY_CHANGE, "precision", "seed", "ema_profiles", "ema_every"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where training images come from. `path`: images in a folder or container, read at `res`
    pixels (None: their own size), or a shard set; None looks in the run's config.json. `classes`:
    the only ones to take."""

    path: str | Path | None = None
    res: int | None = None
    exif: bool = False
    on_bad: str = "error"  # or "skip": an unreadable image
    workers: int | None = None  # reading processes; None: by cores
    classes: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class Saving:
    """When to save and draw, and when to stop. None takes the default."""

    every: int | None = None  # steps between checkpoints: 5000, or a quarter of the run
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    sample_every: int | None = None  # steps between sample grids: as `every`; 0 for none
    max_time: float | None = None  # seconds after which to save and stop


@dataclasses.dataclass(frozen=True)
class Watch:
    """How FID is watched: every so many steps, of that many images, against `ref` (None: what
    fits), in the features of `inception`'s weights or of `features`, a module:function."""

    every: int
    images: int = 5000
    ref: str | None = None
    inception: str = "inception"
    features: str | None = None


# ------------------------------------------------------------------------------------ configuration


@dataclasses.dataclass(frozen=True)
class Initial:
    """Weights that a run starts from: their network, the names of its classes and the recipe they
    were trained with; each of these may be empty."""

    source: str
    network: networks.Network
    classes: list
    recipe: dict


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is. `record`: what config.json says of it; `initial`: what it starts from, or
    None; `chosen`: whose recipe it is, in words; `changed`: what differs from the run so far, by
    --force, as name → [before, now]."""

    record: dict
    config: networks.Config
    recipe: Recipe
    data: object
    initial: Initial | None
    chosen: str
    changed: dict


def make_plan(
    out, source, *, variant, recipe, network, init, device, kind=None, force=False
) -> Plan:
    """What a run in folder `out` is. Everything not given comes from the run's config.json if there
    is one, else from the weights to start from, else from the variant, else from the data
    (defaults.py). `kind` is that of `init`, where its file doesn't tell. Raises UserError where
    that is no longer the same run and can't be forced."""
    before = read_json(out / "config.json") if (out / "config.json").exists() else {}
    known = before.get("data", {})
    source = dataclasses.replace(
        source,
        path=source.path or known.get("path"),
        res=source.res or known.get("res"),
        exif=source.exif or known.get("exif", False),
        classes=source.classes or known.get("only"),
    )
    data = open_data(source, variant)
    recipe = recipe or {}
    network = network or {}
    init = init or before.get("init")
    initial = None
    if init and not runfolder.checkpoints(out):
        initial = read_initial(init, network.get("heads"), kind)
        check_kind(variant, init, initial.network.config)
    base = first_config(before, initial, variant, data, network)
    chosen, values = first_recipe(before, initial, variant, base, len(data), recipe)
    recipe = settle(values, recipe, device)
    if not data.flips:
        recipe = dataclasses.replace(recipe, flip=False)
    null_class = recipe.label_dropout > 0
    if before or initial:
        null_class |= base.null_class
    config = configure(base, data, null_class, **network)
    if before and networks.kind(config) == "dimr" and config.blocks == base.blocks:
        config = dataclasses.replace(config, layers=base.layers)
    record = {
        "variant": variant or before.get("variant") or defaults.OWN,
        "config": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "init": init and str(init),
        "data": {
            "path": str(Path(data.root).resolve()),
            "kind": data.kind,
            "items": len(data),
            "res": source.res,
            "exif": source.exif,
            "fingerprint": data.fingerprint if parallel.is_main() else None,
        },
    }
    if source.classes:
        record["data"]["only"] = data.classes
    record = json.loads(json.dumps(record))  # as it reads back
    changed = {}
    if before and parallel.is_main():
        changed = check_same(out, before, record, force)
        if recipe.deterministic:
            check_same_sums(out, before, recipe, device)
    if "history" in before:
        record["history"] = before["history"]
    return Plan(record, config, recipe, data, initial, chosen, changed)


def read_initial(init, heads, kind) -> Initial:
    """The weights that --init names: a run, a file or a name. Raises UserError."""
    path = runfolder.find_weights(init)
    network, record = runfolder.read_weights(path, heads, kind)
    run = runfolder.run_of(path)
    recipe = record.get("recipe", {})
    if run:
        recipe = read_json(run / "config.json")["recipe"]
    recipe = {name: value for name, value in recipe.items() if name not in OF_THE_RUN}
    classes = record.get("classes", [])
    if not classes and network.config.num_classes == len(imagenet_names.CLASSES):
        classes = [identifier for identifier, _ in imagenet_names.CLASSES]
    return Initial(str(init), network, classes, recipe)


def first_config(before, initial, variant, data, network):
    """The Config that a run's own is made from (`configure`). Raises UserError."""
    if before:
        return networks.config_of(before["config"])
    if initial:
        return initial.network.config
    if variant:
        return networks.in_space(networks.VARIANTS[variant], space.of_data(data).name)
    try:
        return defaults.network(data, network)
    except ValueError as error:
        raise UserError(f"this network can't be built: {error}") from None


def first_recipe(before, initial, variant, config, images, given):
    """(whose it is, values of Recipe) before what the user says, `given`, is put in."""
    if before:
        return "as before", before["recipe"]
    if variant:
        return f"{variant}'s", dataclasses.asdict(RECIPES[variant])
    values = dataclasses.asdict(Recipe())
    values |= defaults.recipe(config, images, given.get("steps"))
    if initial and initial.recipe:
        return f"that of {initial.source}", {**values, **initial.recipe}
    return "chosen for this data and length", values


def open_data(source, variant):
    """The dataset at `source`; images of several sizes are read at the variant's. Raises
    UserError."""
    if source.path is None:
        raise UserError("no training data: give --data FOLDER, or run dimr encode first")
    default = None
    if variant and networks.VARIANTS[variant].space == "pixel":
        default = networks.VARIANTS[variant].size
    return dataset.open_data(
        source.path,
        source.res,
        exif=source.exif,
        default_size=default,
        classes=source.classes,
    )


def settle(values, changes, device):
    """The Recipe of a run: `values` with `changes`, every choice made."""
    recipe = Recipe(**{**values, **changes})
    cuda = device.type == "cuda"
    if recipe.precision is None:
        recipe = dataclasses.replace(recipe, precision="bf16" if cuda else "fp32")
    if recipe.compile is None:
        recipe = dataclasses.replace(recipe, compile=cuda and not recipe.deterministic)
    if recipe.deterministic:
        check_can_be_deterministic(recipe, device)
    if recipe.ema_profiles and recipe.ema_every is None:
        every = max(1, round(recipe.steps / averaging.COUNT))
        recipe = dataclasses.replace(recipe, ema_every=every)
    check_profiles(recipe.ema_profiles)
    return recipe


def check_can_be_deterministic(recipe, device):
    """Raises UserError."""
    if recipe.compile:
        raise UserError(
            "a deterministic run can't be compiled: torch.compile chooses kernels by their time, "
            "anew in each life of a run; leave out --compile or --deterministic"
        )
    if device.type == "mps":
        raise UserError(
            "--deterministic: PyTorch has no deterministic kernels for mps; use --device cpu"
        )


def check_profiles(widths):
    """Raise UserError unless they are widths of averages, no two alike."""
    try:
        for width in widths:
            averages.exponent(width)
    except ValueError as error:
        raise UserError(f"--ema-profiles: {error}; 0.05,0.10 suit any run") from None
    if len(set(widths)) < len(widths):
        raise UserError(f"--ema-profiles names a width twice in {list(widths)}; give each once")


def configure(base, data, null_class, **changes):
    """The network's Config: `base` (a variant's, or the initial weights') with size, channels and
    classes from the data and the user's `changes` of its fields. Raises UserError."""
    theirs = space.of_data(data)
    if base.space != theirs.name:
        raise UserError(
            f"this network works in {base.space} space and {data.root} holds {data.kind}; choose "
            f"one of {', '.join(networks.variants(theirs.name))}, or other data (dimr encode)"
        )
    try:
        return networks.changed(
            base,
            changes,
            size=data.size,
            channels=data.channels,
            num_classes=len(data.classes),
            null_class=null_class,
        )
    except ValueError as error:
        raise UserError(f"this network can't be built: {error}") from None


def check_kind(variant, init, config):
    """Raise UserError where `init`, whose network has `config`, is of another kind than the variant
    that was asked for."""
    if variant is None:
        return
    asked = networks.kind(networks.VARIANTS[variant])
    found = networks.kind(config)
    if found != asked:
        raise UserError(
            f"{init} holds a network of kind {found}, and --variant {variant} is of kind {asked}; "
            "leave out --variant, or give --init weights of that kind"
        )


def check_same(out, before, now, force):
    """{name: [before, now]} of what differs between two records of a run and may, being forced.
    Raises UserError where the record `now` is not of the run that `before` is of."""

    def fixed(record):
        network, recipe = record["config"], record["recipe"]
        recipe = {"deterministic": False, **recipe}  # older ones don't say
        fields = {"variant": record["variant"], **network, **recipe}
        fields["data's fingerprint"] = record["data"]["fingerprint"]
        return {name: value for name, value in fields.items() if name not in MAY_CHANGE}

    old = fixed(before)
    changed = {}
    for name, value in fixed(now).items():
        if old.get(name, value) == value:
            continue
        if force and name in MAY_BE_FORCED:
            changed[name] = [old[name], value]
            continue
        advice = "give what it had"
        if name in MAY_BE_FORCED:
            advice += ", change it from here on with --force"
        raise UserError(
            f"{out} was trained with {name} {old[name]}, not {value}; {advice}, or choose another "
            f"--out (with --init {out} it starts from these weights: the steps, the optimiser and "
            "the metrics begin anew)"
        )
    return changed


def check_same_sums(out, before, recipe, device):
    """Raise UserError where a deterministic run would go on in a way that rounds differently."""
    was = {
        "processes": before["processes"],
        "micro-batch": before["recipe"]["micro_batch"],
        "device": torch.device(before["device"]).type,
    }
    now = {
        "processes": parallel.world_size(),
        "micro-batch": recipe.micro_batch,
        "device": device.type,
    }
    for name, value in now.items():
        if was[name] != value:
            raise UserError(
                f"{out} is deterministic and was trained with {name} {was[name]}, not {value}, "
                "which would round differently; give what it had, or choose another --out"
            )


@dataclasses.dataclass(frozen=True)
class Division:
    """How a global batch is divided: samples per process, and per pass."""

    share: int
    micro: int

    @property
    def passes(self):
        return self.share // self.micro

    @property
    def offset(self):
        """Of this process's samples in the batch."""
        return parallel.rank() * self.share


def divide(batch_size, micro_batch) -> Division:
    """Raises UserError naming the nearest sizes where the division is uneven."""
    world = parallel.world_size()
    unit = world * (micro_batch or 1)
    if batch_size % unit:
        below = batch_size // unit * unit
        near = " or ".join(str(size) for size in (below, below + unit) if size)
        passes = f" and micro-batches of {micro_batch}" if micro_batch else ""
        raise UserError(
            f"batch size {batch_size} does not split over {world} processes{passes}; use {near}"
        )
    share = batch_size // world
    return Division(share, micro_batch or share)


# ---------------------------------------------------------------------------------------- the state


def new_network(config, seed) -> networks.Network:
    """A network with fresh weights, which the seed alone decides."""
    torch.manual_seed(seed)
    return networks.new(config)


def class_rows(config, classes, initial):
    """Row of our class embedding → row of the initial network's: by name, and null to null."""
    theirs = initial.network.config
    known = {name: row for row, name in enumerate(initial.classes)}
    rows = {row: known[name] for row, name in enumerate(classes) if name in known}
    if config.null_class and theirs.null_class:
        rows[config.num_classes] = theirs.num_classes
    return rows


class State:
    """All that a run changes: the network, its EMA and other averages, the optimiser, the step.
    Saved and restored whole. `network` holds the weights; `model` is what runs it: the same, or
    what `parallel.wrap` puts around it."""

    def __init__(self, network, recipe, device):
        self.recipe = recipe
        self.device = device
        self.step = 0
        self.network = network.to(device)
        self.model = self.network
        self.schedule = diffusion.SCHEDULES[network.config.noise_schedule]()
        self.objective = diffusion.OBJECTIVES[network.config.objective]
        self.parameters = dict(self.network.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.averages = averages.Averages(self.parameters, recipe.ema_profiles)
        self.optimizer = torch.optim.AdamW(
            self.network.parameter_groups(recipe.weight_decay),
            lr=recipe.lr,
            betas=recipe.betas,
            fused=True,
        )

    def start(self, micro):
        """Make ready to train on `micro` samples a pass: compiled if the recipe says so, and with
        gradients averaged over processes."""
        self.network.train()
        self.network.checkpoint_blocks = self.recipe.checkpoint_blocks
        if self.recipe.compile:
            self.network.compile()
        self.model = parallel.wrap(self.network, self.device)
        if parallel.world_size() > 1:
            self.rehearse(micro)

    def rehearse(self, micro):
        """One pass, forward and backward, on `micro` blank samples; its gradients are thrown away,
        and nothing is drawn.

        Three or more gradients are summed in an order that follows from their place in a bucket,
        and DistributedDataParallel lays its buckets anew after the first backward pass that it
        averages: in the order in which gradients came, instead of that of the parameters. Without
        this pass the first step of each life of a run would be summed in another order than the
        same step of a run that was never stopped, and the two would part in the last bits. With
        it, every step of every life finds the second layout."""
        config = self.network.config
        shape = (micro, config.channels, config.size, config.size)
        blank = torch.zeros(shape, device=self.device)
        tau = torch.zeros(micro, device=self.device)
        labels = torch.zeros(micro, dtype=torch.long, device=self.device)
        with parallel.autocast(self.device, self.recipe.precision):
            predictions = self.model(blank, tau, labels)
        recipe = self.recipe
        sums, _ = diffusion.multi_scale_loss(predictions, blank, recipe.target_scale, recipe.loss)
        sums.sum().backward()
        self.optimizer.zero_grad()

    def update(self):
        """One step of AdamW and the averages from the gradients, on the device alone; returns the
        gradient's norm and 1.0 where it was not finite. Then nothing changes: the fused kernel
        skips for `found_inf`, and the averages' weight is 0."""
        recipe = self.recipe
        gradients = [p.grad for p in self.parameters.values() if p.requires_grad]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        bad = 1 - norm.isfinite().float()
        if recipe.grad_clip:
            torch._foreach_mul_(gradients, (recipe.grad_clip / (norm + 1e-6)).clamp(max=1))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        self.optimizer.grad_scale = None
        self.optimizer.found_inf = bad
        self.optimizer.step()
        self.optimizer.zero_grad()
        weight = (1 - recipe.ema) * (1 - bad)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter, weight)
        self.step += 1
        self.averages.update(self.step, bad)
        return norm, bad

    def take(self, initial, classes):
        """Start from other weights, an `Initial`; class embeddings go by the names of `classes`.
        Returns the names of the tensors and of the classes that keep their fresh values."""
        theirs = initial.network.state_dict()
        rows = class_rows(self.network.config, classes, initial)
        fresh = []
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if name not in theirs:
                    fresh.append(name)
                elif (
                    name.endswith(CLASS_EMBEDDING) and theirs[name].shape[1:] == parameter.shape[1:]
                ):
                    parameter[list(rows)] = theirs[name][list(rows.values())].to(parameter)
                    self.ema[name].copy_(parameter)
                elif theirs[name].shape != parameter.shape:
                    fresh.append(name)
                else:
                    parameter.copy_(theirs[name])
                    self.ema[name].copy_(theirs[name])
        named = [*classes, NULL_CLASS][: self.network.config.embeddings]
        return fresh, [name for row, name in enumerate(named) if row not in rows]

    def files(self, record):
        """A checkpoint's files: name → (tensors, metadata)."""
        metadata = runfolder.metadata(self.network.config, step=self.step, **record)
        moments = {}
        for name, parameter in self.parameters.items():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{kind}/{name}"] = value
        files = {
            "weights": (self.parameters, metadata),
            "ema": (self.ema, metadata),
            "optimizer": (moments, None),
        }
        if self.recipe.ema_profiles:
            files["averages"] = (self.averages.state(), None)
        return files

    def load(self, checkpoint):
        """Take everything from a checkpoint folder. Raises UserError if it is another network's."""
        expected = {name: p.shape for name, p in self.parameters.items()}
        try:
            for name in ("weights", "ema"):
                dimr.check_names(expected, blanks_of(checkpoint / f"{name}.safetensors"))
        except ValueError as error:
            raise UserError(f"{checkpoint} is of another network: {error}") from None
        fill(self.parameters, checkpoint / "weights.safetensors")
        fill(self.ema, checkpoint / "ema.safetensors")
        moments = {}
        for key, blank in blanks_of(checkpoint / "optimizer.safetensors").items():
            kind, name = key.split("/")
            moments[key] = torch.empty_like(blank, device=self.device)
            self.optimizer.state[self.parameters[name]][kind] = moments[key]
        fill(moments, checkpoint / "optimizer.safetensors")
        self.load_averages(checkpoint / "averages.safetensors")
        self.step = read_json(checkpoint / "state.json")["step"]

    def load_averages(self, path):
        """Take the power-function averages, if this run keeps any, from a checkpoint's file. Raises
        UserError."""
        widths = list(self.recipe.ema_profiles)
        if not widths:
            return
        if not path.is_file():
            raise UserError(
                f"{path.parent} holds no averages of widths {widths}, and they are kept from the "
                "first step on or not at all; leave out --ema-profiles, or choose another --out"
            )
        held = self.averages.state()
        try:
            dimr.check_names({name: t.shape for name, t in held.items()}, blanks_of(path))
        except ValueError as error:
            raise UserError(f"{path} is not of averages of widths {widths}: {error}") from None
        fill(held, path)


def blanks_of(path):
    """The tensors in a file without their values, by name, on every process. Rank 0 alone reads
    it."""
    shapes = {}
    if parallel.is_main():
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                shapes[name] = file.get_slice(name).get_shape()
    blanks = {}
    for name, shape in parallel.broadcast(shapes).items():
        blanks[name] = torch.empty(shape, device="meta")
    return blanks


def fill(tensors, path):
    """Give each of `tensors`, on every process, the values that the file holds under its name.

    Rank 0 alone reads, one at a time, and the others are sent what it has read: a machine with
    eight GPUs would hold the file eight times otherwise."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        if parallel.is_main():
            file = stack.enter_context(open_tensors(path))
        for name, tensor in tensors.items():
            if parallel.is_main():
                tensor.copy_(file.get_tensor(name))
            parallel.broadcast_tensor(tensor.detach())


# ----------------------------------------------------------------------------------------- the step


def losses(state, images, labels, first):
    """Multi-scale losses of the samples at positions first, first + 1, …: weighted sum (B,), per
    branch (R, B).

    `images` and `labels` (B,) on the device: uint8 pixels (B, C, H, W), or latents float16 (B, 2,
    C, h, w) of mean and log-variance."""
    config, schedule, recipe = state.network.config, state.schedule, state.recipe
    last, device = first + len(images), images.device

    def normal(stream, shape):
        return randomness.normal(recipe.seed, stream, first, last, shape, device)

    x0 = space.of(config).x0(images, lambda shape: normal("latent", shape))
    if config.null_class:
        dropped = randomness.uniform(recipe.seed, "label", first, last) < recipe.label_dropout
        labels = labels.masked_fill(dropped.to(device, non_blocking=True), config.embeddings - 1)
    t = schedule.draw(randomness.uniform(recipe.seed, "time", first, last))
    noise = normal("noise", (config.channels, config.size, config.size))
    tau = state.network.time(schedule, t).float().to(device, non_blocking=True)
    with parallel.autocast(device, recipe.precision):
        predictions = state.model(schedule.noised(x0, noise, t), tau, labels)
    target = state.objective.target(x0, noise)
    return diffusion.multi_scale_loss(predictions, target, recipe.target_scale, recipe.loss)


def train_step(state, batches, division):
    """One optimiser step on this process's share of the batch, in passes whose gradients are
    accumulated and, in the last, averaged over processes.

    `batches` yields (images, labels) of each pass, on the device. Returns this process's part of
    the mean losses (1 + R,), sum and branches, and what `State.update` does."""
    first = state.step * state.recipe.batch_size + division.offset
    total = 0
    for k in range(division.passes):
        images, labels = next(batches)
        last = k == division.passes - 1
        with contextlib.nullcontext() if last else parallel.no_sync(state.model):
            sums, branches = losses(state, images, labels, first + k * division.micro)
            loss = sums.sum() / division.share
            loss.backward(1 + 0 * loss.detach())  # one that is not finite makes every gradient NaN
        parts = torch.cat([sums.detach().sum()[None], branches.detach().sum(1)])
        total = total + parts / division.share
    return total, *state.update()


# ------------------------------------------------------------------------------------------ the job


def train(
    out,
    source=Source(),  # noqa: B008 (frozen)
    *,
    variant=None,
    recipe=None,
    network=None,
    init=None,
    kind=None,
    device="auto",
    saving=Saving(),  # noqa: B008 (frozen)
    watch=None,
    sinks=(),
    quiet=False,
    force=False,
) -> dict:
    """Train into the run folder `out`, or go on from its newest whole checkpoint.

    `variant`: a key of VARIANTS (None: what defaults.py makes of the data); `recipe` and `network`:
    what to change of its Recipe and Config, as dicts; `init`: weights to start from (name, path or
    run), whose recipe is taken over, of the `kind` that their file doesn't tell; `watch`: a Watch,
    or None; `sinks`: see journal.Sink; `force`: whether MAY_BE_FORCED may change. A resumed run
    takes whatever is not given from its config.json.

    Returns a summary; `stopped` names the reason if the run is not at its end. Raises UserError."""
    begun = time.monotonic()
    out = Path(out)
    say = journal.speaker(quiet)
    with contextlib.ExitStack() as stack:
        if is_deterministic(out, recipe):
            stack.enter_context(parallel.deterministic())
        device = parallel.pick_device(device)
        plan = make_plan(
            out,
            source,
            variant=variant,
            recipe=recipe,
            network=network,
            init=init,
            kind=kind,
            device=device,
            force=force,
        )
        recipe = plan.recipe
        division = divide(recipe.batch_size, recipe.micro_batch)
        extractor = feature_extractor(watch, device)
        parallel.start(device)
        if parallel.is_main():
            stack.enter_context(storage.locked(out))
        state = begin(out, plan, device, say)
        for line in introduction(out, plan, state, division):
            say(line)
        log = journal.Journal(out, state, say, record_start(out, plan, state, say), sinks)
        measure = watch and watch_fid(out, plan, extractor, watch)
        every = save_every(saving, recipe)
        draw_every = every if saving.sample_every is None else saving.sample_every
        record = weights_record(plan.data, recipe)
        state.start(division.micro)
        skipped = set()
        batches = read_ahead(plan.data, state, division, source, skipped)
        bar = stack.enter_context(progress(out, state, quiet))
        stop = stack.enter_context(Stop())
        stopped = None
        first = state.step
        estimated = False
        while state.step < recipe.steps and not stopped:
            log.add(*train_step(state, batches, division))
            bar.update()
            at_end = state.step == recipe.steps
            if not at_end:
                late = saving.max_time and time.monotonic() - begun > saving.max_time
                stopped = parallel.first(stop.reason or ("max-time" if late else None))
            save_now = at_end or stopped or state.step % every == 0
            watch_now = watch and (at_end or state.step % watch.every == 0)
            if watch_now:
                with doing(bar, "measuring FID"):
                    log.remark(lambda: measure(ema_generator(out, state, record)))
            snapshot_now = recipe.ema_profiles and (at_end or state.step % recipe.ema_every == 0)
            if save_now or watch_now or snapshot_now or state.step % LOG_EVERY == 0:
                bar.set_postfix(log.flush(), refresh=False)
                if not estimated and state.step - first >= 2 * LOG_EVERY and not at_end:
                    say(expectation(state, log))
                    estimated = True
            if snapshot_now:
                save_averages(out, state, log, record)
                log.restart_clock()
            if save_now:
                save(out, state, log, record, saving.keep, must=at_end or stopped)
                log.restart_clock()
            if draw_every and (at_end or state.step % draw_every == 0):
                with doing(bar, "drawing samples"):
                    draw_samples(out, state, log, record)
                log.restart_clock()
        skipped = sorted(set().union(*parallel.gather(skipped)))
        finish(out, skipped, say)
        return summary(out, state, log, stopped, skipped, begun)


def is_deterministic(out, changes):
    """Whether a run asks for deterministic kernels: CUDA has to know before it starts, and so
    before there is a Plan."""
    if changes and "deterministic" in changes:
        return changes["deterministic"]
    if not (out / "config.json").exists():
        return False
    recipe = read_json(out / "config.json").get("recipe", {})
    return recipe.get("deterministic", False)


def feature_extractor(watch, device):
    """What FID is to be watched with, or None. Raises UserError."""
    if not watch:
        return None
    import extraction

    if watch.features:
        return extraction.custom(watch.features, device)
    return extraction.inception(watch.inception, device)


def watch_fid(out, plan, extractor, watch):
    """A function from a Generator to what is noted of it in metrics.jsonl. Raises UserError."""
    import evaluation

    return evaluation.watch(
        out,
        plan.config,
        plan.data.classes,
        extractor=extractor,
        count=watch.images,
        ref=watch.ref,
    )


def begin(out, plan, device, say) -> State:
    """The state that a run goes on from: its newest whole checkpoint, else the initial weights,
    else fresh ones."""
    say(plan.data.about)
    if not plan.data.flips:
        say("these latents are of the images alone: training goes without flips")
    state = State(new_network(plan.config, plan.recipe.seed), plan.recipe, device)
    newest = runfolder.newest_whole(out) if parallel.is_main() else None
    checkpoint = parallel.broadcast(newest)
    if checkpoint:
        state.load(checkpoint)
        check_ahead(out, state)
        say(f"going on from {checkpoint}")
    elif plan.initial:
        fresh = state.take(plan.initial, plan.data.classes)
        for line in inheritance(state, plan, *fresh):
            say(line)
    if networks.kind(plan.config) == "dit":
        say("DiT's learned variance is not trained here: of its output the noise alone")
    idle = parallel.idle_gpus(device)
    if idle:
        say(
            f"{idle} GPUs of this machine stay idle; to use all: torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} -m cli train …"
        )
    return state


def check_ahead(out, state):
    """Raise UserError if a run has gone further than it is to go."""
    steps = state.recipe.steps
    if state.step > steps:
        raise UserError(
            f"{out} is at step {state.step:,} already, beyond --steps {steps:,}; give more, leave "
            "it as it is, or choose another --out"
        )


def inheritance(state, plan, tensors, classes):
    """Lines that say what came from the initial weights: all but `tensors` and `classes`."""
    taken = len(state.parameters) - len(tensors)
    fresh = ", ".join(tensors) or "none"
    yield f"starting from {plan.initial.source}: {taken} tensors taken; fresh: {fresh}"
    known = state.network.config.embeddings - len(classes)
    fresh = in_short(classes) or "none"
    yield f"class embeddings: {known:,} taken by name; fresh: {fresh}"
    if plan.initial.recipe:
        yield "its recipe is taken over where no option says otherwise"
    else:
        yield "its recipe is not known"


def in_short(names, most=10):
    """Comma-separated names; of many, the first and how many there are."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])}, … ({len(names):,} in all)"


def introduction(out, plan, state, division):
    """Lines that say what is about to be trained on what, where and how."""
    data = plan.data
    config = plan.config
    recipe = plan.recipe
    items = "images" if data.kind == "pixels" else data.kind
    yield (
        f"data     {len(data):,} {items} of {len(data.classes):,} classes, {config.channels}×"
        f"{config.size}×{config.size}, {plan.record['data']['path']}"
    )
    parameters = sum(p.numel() for p in state.parameters.values())
    yield (
        f"network  {plan.record['variant']}: {shape_words(config)}; {parameters:,} parameters, "
        f"{sum(config.macs) / 1e9:,.4f} GMAC an image"
    )
    yield f"recipe   {plan.chosen}: {recipe_words(recipe)}"
    yield (
        f"         {recipe.steps:,} steps of batch {recipe.batch_size:,} = processes "
        f"{parallel.world_size()} × passes {division.passes} × micro-batch {division.micro:,}"
    )
    yield from warnings_of(recipe)
    compiled = ", compiled" if recipe.compile else ""
    yield f"device   {state.device}, {recipe.precision}{compiled}"
    begun = f"goes on from step {state.step:,}" if state.step else "a new run"
    yield f"run      {out}: {begun}; config.json keeps all this"
    for name, (before, now) in plan.changed.items():
        yield f"         {name} is {now} from here on, it was {before} (--force)"


def shape_words(config):
    """A network's branches in words, coarse to fine; of a peer, its one."""
    if networks.kind(config) != "dimr":
        return f"{config.depth} blocks of width {config.width}, patches of {config.patch}"
    blocks = ", ".join(map(str, config.blocks))
    widths = ", ".join(map(str, config.dims))
    words = f"{blocks} blocks of widths {widths}"
    if config.layers != config.blocks:
        words += f" (layers {', '.join(map(str, config.layers))}: even ones get one more)"
    return words


def recipe_words(recipe):
    """Rate, average and labels in words."""
    guidance = "no guidance (no label is dropped)"
    if recipe.label_dropout:
        guidance = f"guidance ({recipe.label_dropout:.0%} of labels dropped)"
    flips = "flips" if recipe.flip else "no flips"
    if recipe.grad_clip:
        flips += f", gradients clipped at {recipe.grad_clip:g}"
    return (
        f"rate {recipe.lr:g} after {recipe.warmup:,} steps of warm-up, EMA {recipe.ema:g} (about "
        f"{average_span(recipe):,.0f} steps), {guidance}, {flips}"
    )


def average_span(recipe):
    """Steps that the average of the weights reaches back."""
    return 1 / (1 - recipe.ema)


def warnings_of(recipe):
    """Lines on a recipe whose beginning lasts as long as the run."""
    if recipe.warmup >= recipe.steps:
        yield (
            f"WARNING: the warm-up of {recipe.warmup:,} steps is as long as the run of "
            f"{recipe.steps:,}: the rate ends at {recipe.learning_rate(recipe.steps - 1):.2g}; "
            f"--warmup {recipe.steps // defaults.WARMUP} would do"
        )
    if average_span(recipe) >= recipe.steps:
        yield (
            f"WARNING: the average of the weights (EMA {recipe.ema:g}) reaches back "
            f"{average_span(recipe):,.0f} steps and the run has {recipe.steps:,}: it still holds "
            f"the start; --ema {defaults.decay(recipe.steps / defaults.AVERAGE)} would do"
        )


def expectation(state, log):
    """How long the rest of a run is likely to take."""
    left = (state.recipe.steps - state.step) * state.recipe.batch_size
    speed = log.last["images_per_second"]
    return f"about {duration(left / speed)} to the end, at {speed:,.1f} images a second"


def duration(seconds):
    """In the unit that fits."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def record_start(out, plan, state, say):
    """Write config.json and cut metrics.jsonl and the averages' snapshots back to the state's step,
    on rank 0. Returns the last line of metrics.jsonl that stays, or {}."""
    if not parallel.is_main():
        return {}
    beyond = averaging.cut(out, state.step)
    if beyond:
        say(f"{len(beyond)} snapshots of averages beyond step {state.step} deleted")
    if plan.recipe.ema_profiles:
        say(averages_line(out, state))
    start = {
        "processes": parallel.world_size(),
        "device": str(state.device),
        "versions": versions(),
        "command": sys.argv,
    }
    history = plan.record.get("history", [])
    if plan.changed:
        history = [*history, {"step": state.step, "changed": plan.changed}]
        start["history"] = history
    write_json(out / "config.json", {**plan.record, **start})
    return journal.truncate_metrics(out, state.step)


def averages_line(out, state):
    """What the snapshots of a whole run take, for people."""
    recipe = state.recipe
    count = math.ceil(recipe.steps / recipe.ema_every) * len(recipe.ema_profiles)
    value = averages.PRECISIONS[recipe.ema_precision].itemsize
    size = count * value * sum(p.numel() for p in state.parameters.values())
    widths = ", ".join(str(width) for width in recipe.ema_profiles)
    return (
        f"averages of widths {widths}: snapshots every {recipe.ema_every:,} steps, {count} in all, "
        f"{storage.size_text(size)} in {recipe.ema_precision} -> {averaging.folder(out)}"
    )


def weights_record(data, recipe):
    """What weights files say of a run besides its network."""
    lasting = {}
    for name, value in dataclasses.asdict(recipe).items():
        if name not in OF_THE_RUN:
            lasting[name] = value
    record = {"classes": list(data.classes), "recipe": lasting}
    if data.kind == "latents":
        record |= {key: data.index[key] for key in ("vae", "vae_sha256")}
    return record


def save_every(saving, recipe):
    """Steps between checkpoints."""
    return saving.every or max(1, min(5000, recipe.steps // 4))


def read_ahead(data, state, division, source, skipped):
    """Yield (images, labels) on the device for each pass from the state's step to the end. What is
    said of images left out is added to the set `skipped`."""
    recipe = state.recipe
    order = randomness.Order(len(data), recipe.seed)

    def positions():
        for step in range(state.step, recipe.steps):
            first = step * recipe.batch_size + division.offset
            for k in range(division.passes):
                yield first + k * division.micro

    def reads():
        for first in positions():
            indices, flips = order(first, first + division.micro)
            yield indices, flips & recipe.flip

    pin = state.device.type == "cuda"
    batches = dataset.loader(data, reads(), source.workers, on_bad=source.on_bad, pin=pin)
    batches = dataset.naming_the_way_out(batches)
    for images, labels, bad in batches:
        skipped.update(bad)
        yield (
            images.to(state.device, non_blocking=True),
            labels.to(state.device, non_blocking=True),
        )


def progress(out, state, quiet):
    """A progress bar over the run's steps."""
    return tqdm(
        total=state.recipe.steps,
        initial=state.step,
        unit="step",
        desc=out.name,
        disable=quiet or not parallel.is_main(),
        file=journal.Lenient(sys.stderr),
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


@contextlib.contextmanager
def doing(bar, what):
    """Say in the bar what is being done while it stands still."""
    figures = bar.postfix
    bar.set_postfix_str(what)
    yield
    bar.set_postfix_str(figures, refresh=False)


class Stop(contextlib.AbstractContextManager):
    """Remembers the first of the signals to stop as `reason`, so that the loop can finish its step
    and save. A second SIGINT ends at once."""

    def __enter__(self):
        self.reason = None
        self.interrupted = False
        self.before = {n: signal.signal(n, self.note) for n in dataset.STOPS}
        return self

    def note(self, number, frame):
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.reason is None and parallel.is_main():
            with contextlib.suppress(OSError):
                os.write(2, STOPPING)  # print might be in the middle of another line
        self.interrupted |= number == signal.SIGINT
        self.reason = self.reason or signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def save(out, state, log, record, keep, must):
    """Write a checkpoint, and before it the metrics up to it, on rank 0. One that fails is reported
    and training goes on, unless it `must` succeed: the last."""
    if not parallel.is_main():
        return
    try:
        log.write(sync=True)
        files = state.files(record)
        runfolder.save_checkpoint(out, state.step, files, {"step": state.step}, keep)
    except OSError as error:
        if must:
            raise
        reason = error.strerror or error
        log.say(f"WARNING: checkpoint at step {state.step} NOT saved ({reason}); training goes on")


def save_averages(out, state, log, record):
    """Write the averages' snapshots, on rank 0. One that fails is reported and training goes on."""
    if not parallel.is_main():
        return
    try:
        averaging.save(
            out,
            state.averages,
            config=state.network.config,
            step=state.step,
            precision=state.recipe.ema_precision,
            record=record,
        )
        return
    except OSError as error:
        reason = error.strerror or error
    except UserError as error:
        reason = error
    log.say(f"WARNING: averages at step {state.step} NOT saved ({reason}); training goes on")


def ema_generator(out, state, record):
    """Draws images with the EMA's weights as they are now."""
    model = networks.from_config(state.network.config, state.ema).requires_grad_(False)
    return sampling.Generator(
        model,
        state.device,
        state.recipe.precision,
        record["classes"],
        str(out),
        "",
        record,
        vae_source=record.get("vae"),
    )


def draw_samples(out, state, log, record):
    """A grid from fixed seeds with the EMA's weights, on rank 0. Without the VAE there is no
    picture, said and no more."""
    if not parallel.is_main():
        return
    config = state.network.config
    counts = GRID_ON_CPU if state.device.type == "cpu" else GRID
    count = counts[config.space]
    classes = [i % config.num_classes for i in range(count)]
    captions = []
    for seed, index in enumerate(classes):
        captions.append(sampling.caption(record["classes"][index], index, seed))
    path = out / "samples" / f"step-{state.step:07d}.png"
    try:
        images = ema_generator(out, state, record).images(classes, range(count))
        sampling.save_grid(path, images, captions)
        imagesets.save_strip(path.parent, captions, count)
    except (UserError, OSError) as error:
        log.say(f"WARNING: no sample grid at step {state.step}: {error}")
    else:
        log.picture(path)


def finish(out, skipped, say):
    if parallel.is_main():
        journal.plot(out)
    for message in skipped:
        say(f"skipped {message}")


def summary(out, state, log, stopped, skipped, begun):
    """What `train` returns."""
    return {
        "out": str(out),
        "step": state.step,
        "steps": state.recipe.steps,
        "stopped": stopped,
        "loss": log.last.get("loss"),
        "params": sum(p.numel() for p in state.parameters.values()),
        "seconds": round(time.monotonic() - begun, 1),
        "skipped_steps": log.bad,
        "skipped_images": len(skipped),
        "peak_bytes": parallel.peak_memory(state.device),
    }


def versions():
    return {
        "dimr": VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
