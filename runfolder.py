"""A run folder is the record of a training run, and the only thing `train`, `sample` and `eval`
share.

config.json                       everything to repeat the run, versions included
metrics.jsonl                     one line per step
samples/step-0001000.png          grids from fixed seeds
loss.png
checkpoints/step-0001000/         appears whole or not at all
    weights.safetensors, ema.safetensors      carry the configuration: usable alone
    averages.safetensors                      only with --ema-profiles
    optimizer.safetensors, state.json, manifest.json (SHA-256 of the others)
averages/step-0001000-0.05.safetensors        snapshots of averages, see averaging.py"""

import ours

import dataclasses
import json
import math
import os
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import averages
import diffusion
import dimr
import downloads
import networks
import peers
import schema
from schema import SHA256, anything, fields, flag, many, maybe, one_of, real, table, text, whole
from storage import (
    UserError,
    as_float32,
    load_tensors,
    read_json,
    save_tensors,
    sha256,
    sync_folder,
    write_json,
    writing,
)

ROOT = Path("runs")
RELEASED = "xl2r"  # what is drawn from where there is no run
# What our files look like (schema.py). A recipe is training.Recipe's, of which weights files have
# a part.
BELOW_1 = math.nextafter(1, 0)
RECIPE = fields(
    {},
    {
        "lr": real(0),
        "steps": whole(1),
        "batch_size": whole(1),
        "micro_batch": maybe(whole(1)),
        "warmup": whole(),
        "weight_decay": real(0),
        "betas": many(real(0, BELOW_1), 2, 2),
        "ema": real(0, BELOW_1),
        "ema_profiles": many(real(0, 1), 0, 100),
        "ema_every": maybe(whole(1)),
        "ema_precision": one_of(*averages.PRECISIONS),
        "label_dropout": real(0, BELOW_1),
        "flip": flag,
        "grad_clip": maybe(real(0)),
        "target_scale": one_of(*diffusion.TARGET_SCALES),
        "loss": one_of(*diffusion.LOSSES),
        "precision": maybe(one_of("fp32", "bf16")),
        "compile": maybe(flag),
        "checkpoint_blocks": flag,
        "deterministic": flag,
        "seed": whole(),
    },
)
DATA = fields(
    {"path": text(), "kind": text()},
    {
        "fingerprint": maybe(text()),
        "items": whole(1),
        "res": maybe(whole(1)),
        "exif": flag,
        "only": many(text()),
        "sample": maybe(text(SHA256)),
        "content": maybe(text(SHA256)),
    },
)
CONFIG_PARTS = {"variant": maybe(text()), "config": fields({}), "recipe": RECIPE, "data": DATA}
CONFIG_MAIN = tuple(CONFIG_PARTS)
CONFIG_NOTES = {
    "init": maybe(text()),
    "validation": fields({"path": text()}, {"every": maybe(whole(1))}),
    "processes": whole(1),
    "device": text(),
    "history": many(fields({"step": whole(), "changed": table(many(anything, 2, 2))})),
    "versions": fields({}),
    "command": many(text()),
}
_GUIDANCE = fields({"cfg": real(1)}, {"cfg_interval": many(real(0), 2, 2)})


def guidance(value):
    """The shape of a guidance that weights advise."""
    _GUIDANCE(value)
    low, high = value.get("cfg_interval", (0, 1))
    if low >= high:
        raise schema.Misfit(f"is from {low:g} to {high:g}, which does not rise", ".cfg_interval")


RECORD = fields(  # what a weights file says of itself
    {},
    {
        "config": fields({}),
        "step": maybe(whole()),
        "classes": many(text()),
        "recipe": RECIPE,
        "vae": maybe(text()),
        "vae_sha256": maybe(text(SHA256)),
        "ema_width": real(0, 1),
        "width": real(0, 1),
        "guidance": guidance,
        "dtype": text(),
        "content": text(SHA256),
    },
)
MANIFEST = table(text(SHA256))
STATE = fields({"step": whole()})
FILES = {"weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
MEMBER = re.compile(r"[a-z]+\.(safetensors|json)")  # a checkpoint's file
CHECKPOINT = re.compile(r"step-(\d{7,})")  # a checkpoint's folder; what is called otherwise is none
AT_STEP = re.compile(r"(.+)@(\d{1,15})")  # RUN@STEP
NAMED = 10  # steps that a line names one by one


def newest(root: Path = ROOT) -> Path | None:
    """The run folder under `root` trained last that has a checkpoint, or None."""
    found = [path for path in Path(root).glob("*") if checkpoints(path)]

    def trained(path):
        return checkpoints(path)[-1].stat().st_mtime

    return max(found, key=trained, default=None)


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoint folders, by step."""
    return [path for path in _step_folders(run) if (path / "manifest.json").is_file()]


def _step_folders(run):
    """The folders that are called as checkpoints are, by step."""
    found = []
    for path in (Path(run) / "checkpoints").glob("step-*"):
        if CHECKPOINT.fullmatch(path.name) and path.is_dir():
            found.append(path)
    return sorted(found, key=step_of)


def newest_grid(run: Path) -> Path | None:
    """A run's newest sample grid, or None."""
    found = (Path(run) / "samples").glob("step-*.png")
    return max(found, key=lambda path: (len(path.name), path.name), default=None)


def run_of(weights: Path) -> Path | None:
    """The run folder of whose checkpoints or averages the weights file is one, or None."""
    folder = Path(weights).resolve().parent
    if folder.name != "averages":
        folder = folder.parent
    if folder.name not in ("averages", "checkpoints"):
        return None
    if not (folder.parent / "config.json").is_file():
        return None
    return folder.parent


def read_config(run: str | Path, needed: Sequence[str] = CONFIG_MAIN) -> dict:
    """What a run's config.json says, in which what is `needed` is there. Raises UserError where it
    is missing or damaged."""
    shape = fields({name: CONFIG_PARTS[name] for name in needed}, {**CONFIG_PARTS, **CONFIG_NOTES})
    return read_json(Path(run) / "config.json", shape)


def step_of(checkpoint: Path) -> int:
    return int(CHECKPOINT.fullmatch(checkpoint.name)[1])


def save_checkpoint(run: Path, step: int, files: dict, state: dict, keep: int) -> None:
    """Write `files` (name → (tensors, metadata)) and `state` as a checkpoint folder, and delete all
    but the newest `keep` (0 keeps all). Everything is synced before the folder's rename. Raises
    OSError; so too where the run's folder is moved or deleted meanwhile, which is not made again.
    """
    folder = Path(run) / "checkpoints"
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{step:07d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, (tensors, metadata) in files.items():
            save_tensors(temporary / f"{name}.safetensors", tensors, metadata, parents=False)
        write_json(temporary / "state.json", state, parents=False)
        hashes = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / "manifest.json", hashes, parents=False)
        sync_folder(temporary)
        discard(final)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder)
    if keep:
        for path in [path for path in checkpoints(run) if step_of(path) <= step][:-keep]:
            discard(path)
    return final


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint if it is there: it is gone at once, not file by file."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def verify(checkpoint):
    """Raise UserError if a file of the checkpoint is missing or differs from its manifest."""
    manifest = read_json(checkpoint / "manifest.json", MANIFEST)
    strange = [name for name in manifest if not MEMBER.fullmatch(name)]
    if strange or not manifest.keys() >= FILES:
        raise UserError(
            f"{checkpoint / 'manifest.json'} is damaged; it should name {', '.join(sorted(FILES))}"
        )
    for name, expected in manifest.items():
        if sha256(checkpoint / name) != expected:
            raise UserError(f"{checkpoint / name} is damaged (its SHA-256 is not the manifest's)")


def newest_whole(
    run: Path, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> Path | None:
    """The newest checkpoint that agrees with its manifest, or None if there are none at all;
    damaged ones are named through `say`. Raises UserError if all are damaged."""
    found = _step_folders(run)
    for checkpoint in reversed(found):
        try:
            verify(checkpoint)
            return checkpoint
        except UserError as error:
            say(f"WARNING: checkpoint refused, looking for one before it: {error}")
    if found:
        raise UserError(
            f"none of the {len(found)} checkpoints in {run} is whole; restore one, or "
            "choose another folder"
        )
    return None


# ------------------------------------------------------------------------------------ weights files


def metadata(config: networks.Config, **record) -> dict[str, str]:
    """What a weights file says of itself: the network's configuration and whatever else JSON can
    hold."""
    values = {"config": dataclasses.asdict(config), **record}
    return {name: json.dumps(value) for name, value in values.items()}


def read_weights(
    path: Path, heads: int | None = None, kind: str | None = None
) -> tuple[networks.Network, dict]:
    """(network in eval mode, record) from a weights file: ours, or one under its authors' names, a
    training checkpoint of theirs included. `kind` ("dit" or "sit") and `heads` have to be told
    where nothing in the file tells them.

    Raises UserError when it is neither, doesn't fit, or holds values that are not finite."""
    tensors, texts = load_tensors(path)
    tensors = as_float32(path, tensors)
    try:
        record = _record(texts)
        config = _config_of(record, tensors)
        if config and not any(name.startswith("stages.") for name in tensors):
            if kind not in (None, networks.kind(config)):
                raise ValueError(f"--kind {kind}: it says that it is {networks.kind(config)}")
            model = networks.from_config(config, tensors)
        else:
            kind = kind or kind_of(path, texts)
            model = networks.from_released(tensors, kind, heads, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not fit: {error}") from None
    check_finite(path, model)
    return model, record


def kind_of(path: Path, texts: dict) -> str | None:
    """What is known of the kind of a network besides its tensors: from the name that its file was
    fetched by, or from the model's name in a training checkpoint ("DiT-XL/2")."""
    asset = downloads.asset_of(path)
    if asset and asset.kind:
        return asset.kind
    family = texts.get("model", "").partition("-")[0].lower()
    return family if family in peers.RELEASED else None


def _record(texts):
    """What a weights file's metadata say, {} for a file of another tool."""
    if "config" not in texts:
        return {}
    return parsed(texts)


def parsed(texts: dict[str, str]) -> dict:
    """The values that a file of ours says of itself. Raises ValueError."""
    record = {name: schema.parse(value) for name, value in texts.items() if name != "format"}
    schema.check(record, RECORD)
    return record


def _config_of(record, tensors):
    """The Config in a record, out of which it is taken, or None. Raises ValueError or TypeError
    where it makes no network that could be of these tensors."""
    if not record:
        return None
    config = networks.config_of(record.pop("config"))
    if networks.blocks(config) > len(tensors):
        raise ValueError(
            f"it has {len(tensors):,} tensors, too few for the {networks.blocks(config):,} blocks "
            "of its configuration"
        )
    known = len(record.get("classes", []))
    if known not in (0, config.num_classes):
        raise ValueError(f"it names {known:,} classes and has {config.num_classes:,}")
    return config


def check_finite(path, model):
    """Raise UserError where one of the network's values, which `path` holds, is not finite."""
    bad = []
    for name, tensor in model.state_dict().items():
        low, high = tensor.aminmax()  # no copy, and either is not finite where any value is not
        if not (low.isfinite() and high.isfinite()):
            bad.append(name)
    if bad:
        raise UserError(
            f"{path} holds values that are not finite, first in {bad[0]} ({len(bad)} tensors); use "
            "another checkpoint"
        )


def write_weights(path: Path, model: networks.Network, record: dict) -> None:
    """Write what `read_weights` reads: `.safetensors` under our names, `.pth` under the authors'
    released ones, so that their code loads it too. Both carry the configuration and `record`.
    Raises UserError for another extension, and for a network that the release has no names for."""
    path = Path(path)
    texts = metadata(model.config, **record)
    if path.suffix == ".safetensors":
        save_tensors(path, model.state_dict(), texts)
    elif path.suffix == ".pth":
        if networks.kind(model.config) != "dimr":
            raise UserError(
                f"{path} would hold DiMR's released names, and this network is of kind "
                f"{model.config.kind}; write {path.with_suffix('.safetensors')} instead"
            )
        try:
            state = OrderedDict(dimr.to_released(model))
        except ValueError as error:
            raise UserError(f"{error}; write {path.with_suffix('.safetensors')} instead") from None
        state.metadata = texts
        with writing(path) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # what the archive makes of a full disk
                cause = error.__context__
                raise (cause if isinstance(cause, OSError) else error) from None
    else:
        raise UserError(
            f"{path} ends neither in .safetensors (our names) nor in .pth (the released "
            "ones); choose one"
        )


def run_and_step(source: str | Path) -> tuple[Path, int | None]:
    """(run, step) of RUN@STEP; of what names no step, or is there under that very name, (itself,
    None)."""
    parts = AT_STEP.fullmatch(str(source))
    if parts is None or Path(source).exists():
        return Path(source), None
    return Path(parts[1]), int(parts[2])


def checkpoint_at(run: Path, step: int) -> Path:
    """The checkpoint of `step` in a run folder, whole. Raises UserError naming the steps that there
    are."""
    found = {step_of(checkpoint): checkpoint for checkpoint in checkpoints(run)}
    if step not in found:
        raise UserError(f"{run} holds no checkpoint of step {step:,}; {steps_there(found, step)}")
    verify(found[step])
    return found[step]


def steps_there(steps, wanted):
    """The steps that there are, in words: of many, those nearest to the one that was wanted."""
    steps = sorted(steps)
    if not steps:
        return "it holds none at all"
    if len(steps) <= NAMED:
        return f"it has {', '.join(str(step) for step in steps)}"
    near = sorted(sorted(steps, key=lambda step: abs(step - wanted))[:2])
    names = " and ".join(str(step) for step in near)
    return f"of the {len(steps)} that it has the nearest are {names}"


def find_weights(source: str | Path | None = None, ema: bool = True) -> Path:
    """Path of the weights file for a run folder, a step of it (RUN@STEP), a file, a name, or (None)
    the newest run, else the released xl2r; of a run the averaged ones or, without `ema`, the raw.
    Raises UserError."""
    if source is None:
        source = newest() or RELEASED
        downloads.ask(source)
    path, step = run_and_step(source)
    if path.is_dir():
        checkpoint = path
        if step is not None:
            checkpoint = checkpoint_at(path, step)
        elif (path / "manifest.json").is_file():
            verify(path)
        else:
            checkpoint = newest_whole(path)
        if checkpoint is None:
            raise UserError(
                f"{path} holds no whole checkpoint; expected a run folder that train wrote"
            )
        return checkpoint / ("ema.safetensors" if ema else "weights.safetensors")
    if not ema:
        raise UserError(
            f"{source} is no run folder, and raw weights lie beside averaged ones in runs alone; "
            "leave out --raw, or name a run"
        )
    if path.is_file() and step is None:
        return path
    return downloads.find(str(source))
