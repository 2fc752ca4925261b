"""Averages of the weights after the fact (arXiv:2312.02696, Sec. 3): the snapshots that a training
run leaves in its folder, and the average of any width that is made of them.

averages/step-0001000-0.05.safetensors      the average of width 0.05 at step 1000; appears whole or
                                            not at all, and says itself what it is
averages/ema-0.075-step-0001000.safetensors what `dimr ema` made of them, if not told where"""

import ours

import dataclasses
import functools
import hashlib
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

import averages
import networks
import parallel
import runfolder
from storage import UserError, load_tensors, save_tensors

NAME = re.compile(r"step-(\d{7,})-(\d[\d.]*(?:e-\d+)?)\.safetensors")
COUNT = 64  # snapshots that a run holds of each width, about, if not told otherwise
NEGLIGIBLE = 1e-9  # a share, of the largest, that no float32 weight can feel: its file is not read
LOUD = 1.5  # growth of fp16's rounding that is warned of: widths between the profiles stay below 1
ROUNDING = 1.9e-4  # of fp16, root mean square, as a share of the weights (docs/guidance.md)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The average of a `width` after a `step`."""

    path: Path
    step: int
    width: float

    @property
    def exponent(self):
        return averages.exponent(self.width)


class Outside(UserError):
    """A width that the snapshots do not span."""


class Damaged(Exception):
    """A snapshot that is not what training wrote."""

    def __init__(self, snapshot, reason):
        super().__init__(f"{snapshot.path} {reason}")
        self.snapshot = snapshot


# -------------------------------------------------------------------------------------- in training


def folder(run: str | Path) -> Path:
    return Path(run) / "averages"


def snapshot_at(run, step: int, width: float) -> Snapshot:
    return Snapshot(folder(run) / f"step-{step:07d}-{width}.safetensors", step, width)


def snapshots(run: str | Path) -> list[Snapshot]:
    """A run's snapshots by step, then width."""
    found = []
    for path in folder(run).glob("step-*.safetensors"):
        parts = NAME.fullmatch(path.name)
        if parts is None:
            continue
        snapshot = Snapshot(path, int(parts[1]), float(parts[2]))
        if snapshot.step > 0 and 0 < snapshot.width < averages.WIDEST:
            found.append(snapshot)
    return sorted(found, key=lambda one: (one.step, one.width))


def some_snapshots(run: str | Path) -> list[Snapshot]:
    """The same, one at least. Raises UserError."""
    found = snapshots(run)
    if not found:
        raise UserError(
            f"{run} holds no snapshots of averages; dimr train keeps them with "
            "--ema-profiles 0.05,0.10"
        )
    return found


def save(
    run: str | Path,
    held: averages.Averages,
    *,
    config: networks.Config,
    step: int,
    precision: str,
    record: dict,
) -> None:
    """Write a snapshot of each average that is not there yet. `record`: what weights files say of
    the run. Raises OSError; UserError for a value that `precision` can't hold."""
    for width in held.exponents:
        snapshot = snapshot_at(run, step, width)
        if snapshot.path.exists():
            continue
        try:
            tensors = averages.narrowed(held[width], precision)
        except ValueError as error:
            raise UserError(f"{error}; keep fp32 with --ema-precision fp32") from None
        metadata = runfolder.metadata(
            config, step=step, width=width, dtype=precision, content=digest(tensors), **record
        )
        save_tensors(snapshot.path, tensors, metadata)


def cut(run: str | Path, step: int) -> list[Snapshot]:
    """Delete the snapshots beyond `step`, from which a run goes on, and return them: it writes them
    anew."""
    beyond = [one for one in snapshots(run) if one.step > step]
    for snapshot in beyond:
        snapshot.path.unlink()
    return beyond


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 of CPU tensors' names and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        found.update(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


# ------------------------------------------------------------------------------------ afterwards


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """An average made of snapshots. `record`: what its weights file says besides the network;
    `place`: where it is written to if not told otherwise; `how`: how it was made, for
    programs."""

    model: networks.Network
    record: dict
    place: Path
    how: dict


def warn(line):
    """Say a line on stderr, on rank 0."""
    if parallel.is_main():
        print(line, file=sys.stderr)


def rebuild(
    run: str | Path, width: float, step: int | None = None, say: Callable = warn
) -> Rebuilt:
    """The average of `width` that run folder `run` had after `step`, a snapshot's (None: the one
    that RUN@STEP names, else the last).

    Snapshots that are damaged or missing are said through `say` and done without. Raises UserError
    where those that are left don't span the width."""
    run, named = runfolder.run_and_step(run)
    if step is None:
        step = named
    elif named not in (None, step):
        raise UserError(f"{run}@{named} and --step {step} name two steps; give one")
    read_run(run)
    found = some_snapshots(run)
    known = runfolder.read_config(run, ("recipe",))
    step = choose_step(run, found, step)
    missing = missing_snapshots(run, known, step)
    if missing:
        say(f"WARNING: {len(missing)} snapshots are missing: {listed(missing)}")
    usable = [one for one in found if one.step <= step]
    left_out = []
    while True:
        mix = choose(run, usable, step, width)
        try:
            model, record, precisions = read_mix(mix, known)
            break
        except Damaged as damage:
            say(f"WARNING: snapshot left out: {damage}")
            usable.remove(damage.snapshot)
            left_out.append(damage.snapshot)
    if "fp16" in precisions and mix.gain > LOUD:
        say(
            f"WARNING: width {width:g} takes differences of fp16 snapshots, by which their "
            f"rounding grows {mix.gain:.1f}-fold, to {ROUNDING * mix.gain:.2%} of the weights, and "
            "averages may differ by little more; choose a width between the snapshots', or keep "
            "fp32"
        )
    how = {
        "width": width,
        "step": step,
        "snapshots": len(mix.snapshots),
        "mismatch": round(mix.mismatch, 6),
        "rounding_gain": round(mix.gain, 4),
        "left_out": [str(one.path) for one in left_out],
        "missing": [str(one.path) for one in missing],
    }
    place = folder(run) / f"ema-{width:g}-step-{step:07d}.safetensors"
    return Rebuilt(model, {**record, "step": step, "ema_width": width}, place, how)


def find_run(source: str | Path | None = None) -> Path:
    """The run folder that `source` names, or (None) the newest that was trained under runs/. Raises
    UserError."""
    run = source or runfolder.newest()
    if run is None:
        raise UserError("no run under runs/; give a run folder that train wrote")
    return Path(run)


def read_run(run: str | Path) -> dict:
    """What a run folder's config.json says, perhaps nothing. Raises UserError if it is none."""
    if not (Path(run) / "config.json").is_file():
        raise UserError(f"{run} is no run folder; give one that dimr train wrote")
    return runfolder.read_config(run, ())


def choose_step(run, found, step):
    """`step`, or the last snapshots'. Raises UserError naming the nearest where there is none."""
    steps = sorted({one.step for one in found})
    if step is None:
        return steps[-1]
    if step not in steps:
        near = sorted(sorted(steps, key=lambda one: abs(one - step))[:2])
        names = " or ".join(str(one) for one in near)
        raise UserError(f"{run} holds no snapshot of step {step}; the nearest are of {names}")
    return step


def missing_snapshots(run, known, step):
    """Those up to `step` that the run's recipe says should be there and are not."""
    recipe = known["recipe"]
    every = recipe.get("ema_every")
    if not every:
        return []
    expected = []
    for width in recipe.get("ema_profiles", ()):
        expected += [snapshot_at(run, at, width) for at in range(every, step + 1, every)]
    return [one for one in expected if not one.path.exists()]


def listed(found):
    """The names of the first few."""
    names = [one.path.name for one in found[:3]]
    if len(found) > 3:
        names.append("…")
    return ", ".join(names)


@dataclasses.dataclass(frozen=True)
class Mix:
    """Snapshots, and the share of each in an average."""

    snapshots: list[Snapshot]
    shares: list[float]
    mismatch: float  # averages.Fit.mismatch

    @property
    def gain(self):
        """By how much independent errors of the snapshots grow."""
        return math.sqrt(sum(share**2 for share in self.shares))


def choose(run, usable, step, width) -> Mix:
    """What the average of `width` at `step` is made of. Raises UserError if `usable`, the snapshots
    up to there, don't span it (Outside)."""
    if not usable:
        raise UserError(f"no snapshot of {run} up to step {step} is whole; choose a later --step")
    fit = averages.Fit([one.step for one in usable], [one.exponent for one in usable])
    mismatch = math.inf
    if 0 < width < averages.WIDEST:
        mismatch = float(fit.mismatch(step, averages.exponent(width)))
    if mismatch > averages.NEAR:
        raise Outside(
            f"width {width:g} is outside what {len(usable)} snapshots of {run} up to step {step} "
            f"span; {range_text(fit.span(step))}"
        )
    shares = fit.coefficients(step, averages.exponent(width)).tolist()
    least = NEGLIGIBLE * max(map(abs, shares))
    kept = [k for k, share in enumerate(shares) if abs(share) >= least]
    return Mix([usable[k] for k in kept], [shares[k] for k in kept], mismatch)


def range_text(span):
    if span is None:
        return "no width can be made of them there: choose another --step"
    return f"give one from {span[0]:g} to {span[1]:g}"


def read_mix(mix, known):
    """(network in eval mode, record, precisions that were read) of a Mix of the run that `known` is
    of. Raises Damaged."""
    try:
        config = networks.config_of(known.get("config"))
    except (ValueError, TypeError) as error:
        raise UserError(f"the run's config.json is damaged (config: {error})") from None
    record = {}
    precisions = set()

    def read(snapshot):
        tensors, said = read_snapshot(snapshot, config)
        precisions.add(said.pop("dtype", None))
        record.update(said)
        return tensors

    bar = tqdm(mix.snapshots, desc="averaging", unit="snapshot", leave=False, disable=None)
    reads = (functools.partial(read, snapshot) for snapshot in bar)
    tensors = averages.combine(reads, mix.shares)
    return networks.from_config(config, tensors), record, precisions


def read_snapshot(snapshot, config):
    """(tensors, what it says of itself besides network and width) of a snapshot of a network of
    `config`. Raises Damaged."""
    try:
        tensors, said = load_tensors(snapshot.path)
        said = runfolder.parsed(said)
        theirs = networks.config_of(said.pop("config"))
        content = said.pop("content")
        itself = (said.pop("step"), said.pop("width"))
    except (UserError, ValueError, TypeError, KeyError) as error:
        raise Damaged(snapshot, f"is not a whole snapshot ({error})") from None
    if theirs != config:
        raise Damaged(snapshot, "is of another network than the run")
    if itself != (snapshot.step, snapshot.width):
        raise Damaged(snapshot, f"is of step {itself[0]} and width {itself[1]}, not of its name's")
    if digest(tensors) != content:
        raise Damaged(snapshot, "is damaged (its content's SHA-256 is not the one it names)")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise Damaged(snapshot, "holds values that are not finite")
    return tensors, said


def write(
    run: str | Path,
    width: float,
    step: int | None = None,
    out: str | Path | None = None,
    say: Callable = warn,
) -> dict:
    """Make the average of `width` at `step` and write it to `out` (None: the run's averages/), a
    weights file as `runfolder.write_weights` writes it. Returns `Rebuilt.how` and `out`. Raises
    UserError."""
    made = rebuild(run, width, step, say)
    out = Path(out or made.place)
    runfolder.write_weights(out, made.model, made.record)
    return {**made.how, "out": str(out)}
