"""What a training run is: how it is trained (paper, Table 4), which network, which data; settled
once, kept in config.json, and the same whenever the run goes on."""

import ours

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import averages
import averaging
import containers
import dataset
import defaults
import imagenet_names
import networks
import parallel
import randomness
import runfolder
import space
import validation
from storage import UserError


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
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        object.__setattr__(self, "ema_profiles", tuple(self.ema_profiles))

    def learning_rate(self, step: int) -> float:
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


HELD_OUT = "validation data's fingerprint"
AS_BEFORE = "as before"
MAY_BE_FORCED = {"lr", "grad_clip", HELD_OUT}  # with --force: they move no sample


# of a recipe, what belongs to a machine and a run, not to the weights that come of it
OF_THE_RUN = {*MAY_CHANGE, "precision", "seed", "ema_profiles", "ema_every"}


# ------------------------------------------------------------------------------------ configuration


ALWAYS = (  # of a recipe, fields that every dimr has written
    *("lr", "steps", "batch_size", "micro_batch", "warmup", "weight_decay", "betas", "ema"),
    *("label_dropout", "flip", "grad_clip", "target_scale", "precision", "compile"),
    *("checkpoint_blocks", "seed"),
)
SAMPLE = "data's contents (by a sample, names and sizes being the same)"


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
    verify: bool = False  # read everything once, and compare it with what is known of it


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
    data: dataset.Data
    initial: Initial | None
    chosen: str
    changed: dict
    held_out: validation.HeldOut | None = None


def make_plan(
    out: Path,
    source: Source,
    validate: validation.Validation,
    *,
    variant: str | None,
    recipe: dict | None,
    network: dict | None,
    init: str | Path | None,
    device: torch.device,
    kind: str | None = None,
    force: bool = False,
) -> Plan:
    """What a run in folder `out` is. Everything not given comes from the run's config.json if there
    is one, else from the weights to start from, else from the variant, else from the data
    (defaults.py). `kind` is that of `init`, where its file doesn't tell. Raises UserError where
    that is no longer the same run and can't be forced."""
    before = runfolder.read_config(out) if (out / "config.json").exists() else {}
    known = before.get("data", {})
    source = dataclasses.replace(
        source,
        path=source.path or known_place(out, known),
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
            "sample": data.sample if parallel.is_main() else None,
            "content": known.get("content"),
        },
    }
    if source.classes:
        record["data"]["only"] = data.classes
    validate = held_out_place(out, validate, before.get("validation", {}))
    held_out = None
    if validate.path:
        held_out = validation.HeldOut(validate.path, data, source.exif, source.classes)
        record["validation"] = {
            "path": str(Path(held_out.data.root).resolve()),
            "items": len(held_out),
            "every": validate.every,
            "fingerprint": held_out.fingerprint,
        }
    record = json.loads(json.dumps(record))  # as it reads back
    changed = {}
    if before and parallel.is_main():
        changed = check_same(out, before, record, force)
        if recipe.deterministic:
            check_same_sums(out, before, recipe, device)
    if "history" in before:
        record["history"] = before["history"]
    return Plan(record, config, recipe, data, initial, chosen, changed, held_out)


def known_place(out: Path, known: dict, what: str = "data", option: str = "--data") -> str | None:
    """Where the data of the run in `out` was, None if it is new. Raises UserError where it is
    gone."""
    path = known.get("path")
    if path and not (Path(path).exists() or containers.expand(path)):
        raise UserError(
            f"the {what} of {out} is no longer at {path}; if it has moved, say where to: {option}"
        )
    return path


def held_out_place(
    out: Path, validate: validation.Validation, known: dict
) -> validation.Validation:
    """What a run validates on, by what is given and what its config.json says; a path of None for
    nothing. Raises UserError."""
    every = known.get("every") if validate.every is None else validate.every
    if every == 0:
        return validation.Validation()
    path = validate.path
    if not path:
        option = "--validate, or go on without: --validate-every 0"
        path = known_place(out, known, "validation data", option)
    if every and not path:
        raise UserError(f"--validate-every {every} needs --validate, the images to validate on")
    return validation.Validation(path, every)


def read_initial(init: str, heads: int | None, kind: str | None) -> Initial:
    """The weights that --init names: a run, a file or a name. Raises UserError."""
    path = runfolder.find_weights(init)
    network, record = runfolder.read_weights(path, heads, kind)
    run = runfolder.run_of(path)
    recipe = record.get("recipe", {})
    if run:
        recipe = runfolder.read_config(run)["recipe"]
    recipe = {name: value for name, value in recipe.items() if name not in OF_THE_RUN}
    classes = record.get("classes", [])
    if not classes and network.config.num_classes == len(imagenet_names.CLASSES):
        classes = [identifier for identifier, _ in imagenet_names.CLASSES]
    return Initial(str(init), network, classes, recipe)


def first_config(before, initial, variant, data, network):
    """The Config that a run's own is made from (`configure`). Raises UserError."""
    if before:
        try:
            return networks.config_of(before["config"])
        except (ValueError, TypeError) as error:
            raise UserError(f"the run's config.json is damaged (config: {error})") from None
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
        missing = [name for name in ALWAYS if name not in before["recipe"]]
        if missing:
            raise UserError(
                f"the run's config.json is damaged (recipe.{missing[0]} is missing); restore it, "
                "or choose another --out"
            )
        return AS_BEFORE, before["recipe"]
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


def settle(values: dict, changes: dict, device: torch.device) -> Recipe:
    """The Recipe of a run: `values` with `changes`, every choice made."""
    known = {field.name for field in dataclasses.fields(Recipe)}
    strange = sorted(values.keys() - known)
    if strange:
        raise UserError(
            f"the recipe that is to be gone on with has {strange[0]}, which this dimr does not "
            "know; use the one that wrote it"
        )
    recipe = Recipe(**{**values, **changes})
    try:
        randomness.check_seeds([recipe.seed])
    except ValueError as error:
        raise UserError(f"{error}; choose another") from None
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
        fields["data's fingerprint"] = record["data"].get("fingerprint")
        fields[SAMPLE] = record["data"].get("sample")
        if "validation" in record:
            fields[HELD_OUT] = record["validation"].get("fingerprint")
        return {name: value for name, value in fields.items() if name not in MAY_CHANGE}

    old = fixed(before)
    changed = {}
    for name, value in fixed(now).items():
        if old.get(name, value) == value:
            continue
        if name == SAMPLE and old[name] is None:  # before 0.2
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
        "processes": before.get("processes"),
        "micro-batch": before["recipe"].get("micro_batch"),
        "device": before.get("device", "").partition(":")[0],
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


def is_deterministic(out: Path, changes: dict | None) -> bool:
    """Whether a run asks for deterministic kernels: CUDA has to know before it starts, and so
    before there is a Plan."""
    if changes and "deterministic" in changes:
        return changes["deterministic"]
    if not (out / "config.json").exists():
        return False
    return runfolder.read_config(out)["recipe"].get("deterministic", False)


def weights_record(data: dataset.Data, recipe: Recipe) -> dict:
    """What weights files say of a run besides its network."""
    lasting = {}
    for name, value in dataclasses.asdict(recipe).items():
        if name not in OF_THE_RUN:
            lasting[name] = value
    record = {"classes": list(data.classes), "recipe": lasting}
    if data.kind == "latents":
        record |= {key: data.index[key] for key in ("vae", "vae_sha256")}
    return record


# ----------------------------------------------------------------------------------------- in words


def shape_words(config: networks.Config) -> str:
    """A network's branches in words, coarse to fine; of a peer, its one."""
    if networks.kind(config) != "dimr":
        return f"{config.depth} blocks of width {config.width}, patches of {config.patch}"
    blocks = ", ".join(map(str, config.blocks))
    widths = ", ".join(map(str, config.dims))
    words = f"{blocks} blocks of widths {widths}"
    if config.layers != config.blocks:
        words += f" (layers {', '.join(map(str, config.layers))}: even ones get one more)"
    return words


def recipe_words(recipe: Recipe) -> str:
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


def outgrown(plan: Plan) -> Iterator[str]:
    """A line on a run that goes on for much longer than its recipe was made for."""
    if plan.chosen != AS_BEFORE or plan.record["variant"] != defaults.OWN:
        return
    fresh = defaults.recipe(plan.config, len(plan.data), plan.recipe.steps)
    if 1 / (1 - fresh["ema"]) > 5 * average_span(plan.recipe):
        yield (
            "WARNING: warm-up and average of the weights were made for a shorter run and stay; a "
            f"new one of {plan.recipe.steps:,} steps would have --warmup {fresh['warmup']:,} --ema "
            f"{fresh['ema']:g} (another --out)"
        )


def warnings_of(recipe: Recipe) -> Iterator[str]:
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
