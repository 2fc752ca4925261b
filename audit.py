"""An audit of a run: a stretch between two of its checkpoints, or from its start, is trained again
elsewhere from config.json, data and seed, and what comes of it is compared with what is there.

Nothing in the run's folder changes. Three answers: equal to the byte; equal to rounding, which is
what another number of processes, of threads, or another machine leaves; or parted, and where."""

import ours

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import torch

import journal
import parallel
import recipes
import runfolder
import storage
import training
from storage import UserError, open_tensors, read_json, write_json

# How far losses that are equal to rounding may be apart, as a share, in the first STEADY steps by
# precision. Beyond, rounding grows with the steps: one and two processes in fp32, digits, were
# apart by 1e-7 at first, 1e-6 after 100 steps and 7e-5 (gradients' norms 3e-4) after 1,000.
LOSSES = {"fp32": 1e-5, "bf16": 1e-3}
STEADY = 10
MOST = 1e-2
TENSORS = 1e-2  # ‖a − b‖ / ‖a‖ of a tensor: Adam's division makes much of rounding
WHOLLY = 1.0  # what is said of what can't be compared
BESIDE = ("history", "validation")  # of config.json, what moves no weight
COMPARED = ("loss", "loss_branches", "gradient_norm")  # of a line of metrics.jsonl
BYTES, ROUNDING, PARTED = "equal to the byte", "equal to rounding", "parted"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps after `first` up to `last`; `begin` is the checkpoint at `first`, None at the run's
    start, `end` that at `last`."""

    first: int
    last: int
    begin: Path | None
    end: Path


def audit(
    run: str | Path,
    first: int | None = None,
    last: int | None = None,
    *,
    data: str | Path | None = None,
    workers: int | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict:
    """Train the steps after `first` up to `last` of `run` again, on as many processes as there are,
    and compare. `last`: a checkpoint's step (None: the newest); `first`: one before it, or 0 for
    the start (None: the one before). `data`: where the run's data are now, if they have moved.

    Returns a dict whose `answer` is BYTES, ROUNDING or PARTED. Raises UserError."""
    run = Path(run)
    known = runfolder.read_config(run)
    stretch = choose(run, first, last)
    if data is None:
        recipes.known_place(run, known["data"])
    say = journal.speaker(quiet)
    with contextlib.ExitStack() as stack:
        if recipes.is_deterministic(run, None):
            stack.enter_context(parallel.deterministic())
        here = parallel.pick_device(device)
        parallel.start(here)
        folder = None
        if parallel.is_main():
            folder = stack.enter_context(elsewhere(run, stretch))
        folder = parallel.broadcast(folder)
        again = Path(folder) / run.name
        if parallel.is_main():
            lay_out(again, known, stretch)
        parallel.barrier()
        say(f"training steps {stretch.first + 1:,} to {stretch.last:,} of {run} again, in {again}")
        done = training.train(
            again,
            training.Source(data, workers=workers, on_bad="skip"),
            recipe={"steps": stretch.last},
            device=device,
            saving=training.Saving(every=stretch.last, keep=0, sample_every=0),
            quiet=quiet,
        )
        if done["stopped"]:
            raise UserError(f"stopped by {done['stopped']} before anything could be compared")
        found = None
        if parallel.is_main():
            found = compare(run, again, stretch)
        return {**parallel.broadcast(found), **circumstances(known, here)}


def choose(run: Path, first: int | None, last: int | None) -> Stretch:
    """The stretch that two steps, or neither, name. Raises UserError."""
    steps = [runfolder.step_of(checkpoint) for checkpoint in runfolder.checkpoints(run)]
    if not steps:
        raise UserError(f"{run} holds no checkpoint to compare with; expected a run folder")
    if last is None:
        last = steps[-1]
    if first is None:
        first = max((step for step in steps if step < last), default=0)
    if first >= last:
        raise UserError(f"--from {first} is not before --to {last}")
    end = runfolder.checkpoint_at(run, last)
    begin = runfolder.checkpoint_at(run, first) if first else None
    return Stretch(first, last, begin, end)


@contextlib.contextmanager
def elsewhere(run, stretch):
    """A temporary folder with room for a checkpoint like those of the stretch. Raises UserError."""
    need = sum(path.stat().st_size for path in stretch.end.iterdir())
    with tempfile.TemporaryDirectory(prefix="dimr-audit-") as folder:
        advice = "free some space, or set TMPDIR to a folder that has it (and all nodes see)"
        storage.check_room(folder, need, f"a checkpoint of {run}", advice)
        yield folder


def lay_out(again, known, stretch):
    """A run folder as the run's own was at the beginning of the stretch. Raises UserError."""
    (again / "checkpoints").mkdir(parents=True)
    recipe = recipe_in(known, stretch)
    record = {name: value for name, value in known.items() if name not in BESIDE}
    write_json(again / "config.json", {**record, "recipe": recipe})
    if stretch.begin:
        place = again / "checkpoints" / stretch.begin.name
        place.symlink_to(stretch.begin.resolve())


def recipe_in(known, stretch):
    """The recipe, as config.json has it, that was in force in the stretch: changes that were forced
    later are undone. Raises UserError for one in the midst of it."""
    recipe = dict(known["recipe"])
    for change in reversed(known.get("history", [])):
        if change["step"] >= stretch.last:
            recipe |= {name: before for name, (before, _) in change["changed"].items()}
        elif change["step"] > stretch.first:
            names = " and ".join(change["changed"])
            raise UserError(
                f"{names} changed at step {change['step']:,}, within steps {stretch.first:,} to "
                f"{stretch.last:,}; audit up to there with --to, or from there with --from"
            )
    return recipe


def circumstances(known, device):
    """What explains rounding: how the run was trained, and trained again."""
    mine = training.versions()
    theirs = known.get("versions", {})
    return {
        "processes": {"run": known.get("processes"), "audit": parallel.world_size()},
        "device": {"run": known.get("device"), "audit": str(device)},
        "torch": {"run": theirs.get("torch"), "audit": mine["torch"]},
        "platform": {"run": theirs.get("platform"), "audit": mine["platform"]},
    }


# -------------------------------------------------------------------------------------- comparing


def compare(run: Path, again: Path, stretch: Stretch) -> dict:
    """What `audit` returns of two run folders. Raises UserError."""
    precision = runfolder.read_config(again)["recipe"]["precision"]
    losses = compare_losses(run, again, stretch, LOSSES[precision])
    end = again / "checkpoints" / stretch.end.name
    files = [compare_files(stretch.end / name, end / name) for name in tensor_files(stretch.end)]
    same = losses["largest_difference"] == 0 and all(each["difference"] == 0 for each in files)
    answer = BYTES if same else ROUNDING
    if losses["parted_at"] is not None or any(each["difference"] > TENSORS for each in files):
        answer = PARTED
    return {
        "run": str(run),
        "from": stretch.first,
        "to": stretch.last,
        "answer": answer,
        "losses": losses,
        "files": files,
    }


def tensor_files(checkpoint):
    """Names of the files of a checkpoint that hold tensors."""
    return [name for name in read_json(checkpoint / "manifest.json") if name != "state.json"]


def compare_losses(run, again, stretch, allowed):
    """Where losses and gradients' norms first differ, where they first part beyond rounding (None:
    nowhere; `allowed` at first), and how far apart they are at most, as a share. Raises
    UserError."""
    mine = lines_of(again, stretch)
    theirs = lines_of(run, stretch)
    if theirs.keys() != mine.keys():
        lacking = sorted(mine.keys() - theirs.keys())
        raise UserError(
            f"{run / 'metrics.jsonl'} lacks {len(lacking)} of the steps {stretch.first + 1:,} to "
            f"{stretch.last:,}, first {lacking[0]:,}; restore it, or audit another stretch"
        )
    differs_at = None
    parted = {"parted_at": None, "run": None, "audit": None}
    largest = 0.0
    for step, values in mine.items():
        apart = max(map(difference, theirs[step], values))
        largest = max(largest, apart)
        if apart and differs_at is None:
            differs_at = step
        growth = max(1, (step - stretch.first) / STEADY)
        if apart > min(allowed * growth, MOST) and parted["parted_at"] is None:
            parted = {"parted_at": step, "run": theirs[step][0], "audit": values[0]}
    return {"steps": len(mine), "differs_at": differs_at, "largest_difference": largest, **parted}


def lines_of(run, stretch):
    """Step → the numbers of its line, loss first."""
    found = {}
    for line, _ in journal.metrics(run):
        if stretch.first < line["step"] <= stretch.last:
            loss, branches, norm = (line.get(name) for name in COMPARED)
            found[line["step"]] = [loss, *branches, norm]
    return found


def difference(one, other):
    """Of two numbers, as a share of the first; None is what was not finite."""
    if one == other:
        return 0.0
    if one is None or other is None:
        return WHOLLY
    return abs(one - other) / max(abs(one), 1e-30)


def compare_files(theirs, mine):
    """How far apart two files' tensors are: the largest ‖a − b‖ / ‖a‖, and whose it is."""
    found = {"file": theirs.name, "difference": 0.0, "tensor": None}
    if storage.sha256(theirs) == storage.sha256(mine):
        return found
    with open_tensors(theirs) as one, open_tensors(mine) as other:
        names = set(one.keys()) | set(other.keys())
        for name in sorted(names):
            if name not in one.keys() or name not in other.keys():  # noqa: SIM118 (no dict)
                return {**found, "difference": WHOLLY, "tensor": name}
            apart = tensor_difference(one.get_tensor(name), other.get_tensor(name))
            if apart > found["difference"]:
                found = {**found, "difference": apart, "tensor": name}
    return found


def tensor_difference(one, other):
    if one.shape != other.shape:
        return WHOLLY
    if torch.equal(one, other):
        return 0.0
    share = (one.double() - other.double()).norm() / one.double().norm()
    return float(share) if share.isfinite() else WHOLLY


# --------------------------------------------------------------------------------------- in words


def lines(result: dict) -> str:
    """The answer for people."""
    losses = result["losses"]
    steps = f"steps {result['from'] + 1:,} to {result['to']:,} of {result['run']}, trained again"
    head = f"{steps}: {result['answer']}"
    if result["answer"] == BYTES:
        names = ", ".join(each["file"] for each in result["files"])
        return f"{head}, {losses['steps']:,} losses and {names}"
    if result["answer"] == PARTED:
        head = f"{steps}: NOT the same"
    if losses["parted_at"] is not None:
        head += (
            f"; they parted at step {losses['parted_at']:,}, loss {losses['run']} there and "
            f"{losses['audit']} here"
        )
    found = [head]
    if losses["differs_at"] is not None:
        found.append(
            f"  losses differ from step {losses['differs_at']:,} on, by at most "
            f"{losses['largest_difference']:.1e} of themselves"
        )
    for each in result["files"]:
        if each["difference"]:
            apart = f"by at most {each['difference']:.1e} of a tensor ({each['tensor']})"
            found.append(f"  {each['file']} differs {apart}")
    for name in ("processes", "device", "torch", "platform"):
        then, now = result[name]["run"], result[name]["audit"]
        if then != now:
            found.append(f"  {name}: {then} there, {now} here")
    return "\n".join(found)
