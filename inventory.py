"""The runs that there are, what each has come to and takes on disk (`dimr runs`), and room made in
one (`dimr runs prune`)."""

import ours

import contextlib
import os
import sys
from pathlib import Path

import averaging
import journal
import runfolder
import storage
from storage import UserError


def runs(root: str | Path = runfolder.ROOT) -> list[dict]:
    """What there is to say of each run folder in `root`, the one written to last first. Raises
    UserError where `root` is no folder; what is wrong with a single run stands under its
    `error`."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is no folder of runs; give --under FOLDER, or dimr train first")
    found = {}
    for config in root.glob("*/config.json"):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            found[config.parent] = last_written(config.parent)
    return [row(run) for run in sorted(found, key=found.get, reverse=True)]


def last_written(run):
    """When a run's record was last written to."""
    times = [os.stat(run / "config.json").st_mtime]
    with contextlib.suppress(FileNotFoundError):
        times.append(os.stat(run / "metrics.jsonl").st_mtime)
    return max(times)


def row(run: Path) -> dict:
    """A run in figures: `loss` is the mean of the newest journal.SMOOTH steps, `fid` the newest
    that was watched, `checkpoints` the steps that RUN@STEP takes; null where there is none."""
    grid = runfolder.newest_grid(run)
    found = {
        "run": str(run),
        "variant": None,
        "step": 0,
        "steps": None,
        "loss": None,
        "fid": None,
        "fid_step": None,
        "bytes": size(run),
        "samples": grid and str(grid),
        "checkpoints": [runfolder.step_of(path) for path in runfolder.checkpoints(run)],
    }
    try:
        found |= progress(run)
    except UserError as error:
        found["error"] = str(error)
    return found


def progress(run):
    """What a run's configuration and metrics say of it. Raises UserError."""
    record = runfolder.read_config(run, ("variant", "recipe"))
    found = {"variant": record["variant"], "steps": record["recipe"].get("steps")}
    lines = journal.newest(run, count=journal.SMOOTH)
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    if lines:
        found["step"] = lines[-1]["step"]
    if losses:
        found["loss"] = sum(losses) / len(losses)
    for line in journal.newest(run, "fid"):
        found |= {"fid": line.get("fid"), "fid_step": line["step"]}
    return found


def size(folder: Path) -> int:
    """Bytes of all files in a folder, which others may be writing to."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


# ------------------------------------------------------------------------------------- making room


def prune(run: str | Path, keep_every: int, dry_run: bool = False) -> dict:
    """Delete the checkpoints of a run whose step is no multiple of `keep_every`, but for the newest
    that is whole and those after it; with `dry_run` say which.

    Holds the run's lock, so that none is deleted under a run that trains. Returns a summary.
    Raises UserError, also where no checkpoint is whole."""
    run = Path(run)
    averaging.read_run(run)
    with contextlib.ExitStack() as stack:
        if not dry_run:
            stack.enter_context(storage.locked(run))
        newest = runfolder.newest_whole(run, say)
        if newest is None:
            raise UserError(f"{run} holds no checkpoint to delete")
        last = runfolder.step_of(newest)
        kept = []
        deleted = []
        freed = 0
        for checkpoint in runfolder.checkpoints(run):
            step = runfolder.step_of(checkpoint)
            if step >= last or step % keep_every == 0:
                kept.append(step)
                continue
            freed += size(checkpoint)
            deleted.append(step)
            if not dry_run:
                runfolder.discard(checkpoint)
    return {
        "run": str(run),
        "deleted": deleted,
        "kept": kept,
        "bytes": freed,
        "averages_bytes": size(averaging.folder(run)),
        "dry_run": dry_run,
    }


def say(line):
    print(line, file=sys.stderr)


# ----------------------------------------------------------------------------------------- in words


HEAD = ("run", "variant", "step", "loss", "FID", "size", "newest samples")


def table(rows: list[dict]) -> str:
    """`runs` for people."""
    cells = [HEAD, *(words(row) for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(HEAD))]
    lines = []
    for line, row in zip(cells, [{}, *rows], strict=True):
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
        if "error" in row:
            lines.append(f"  {row['error']}")
    return "\n".join(lines)


def words(row):
    """A row's cells."""
    steps = "-"
    if row["steps"] is not None:
        steps = f"{row['step']:,} of {row['steps']:,}"
    loss = "-"
    if row["loss"] is not None:
        loss = f"{row['loss']:.4f}"
    fid = "-"
    if row["fid"] is not None:
        fid = f"{row['fid']:.2f} at {row['fid_step']:,}"
    return (
        row["run"],
        row["variant"] or "-",
        steps,
        loss,
        fid,
        storage.size_text(row["bytes"]),
        row["samples"] or "-",
    )


def pruned_lines(result: dict) -> str:
    """`prune` for people."""
    done = "would be deleted" if result["dry_run"] else "deleted"
    freed = storage.size_text(result["bytes"])
    kept = ", ".join(f"{step:,}" for step in result["kept"])
    lines = [f"{result['run']}: {len(result['deleted'])} checkpoints {done}, {freed}; kept: {kept}"]
    if result["averages_bytes"]:
        size = storage.size_text(result["averages_bytes"])
        lines.append(f"averages/ takes {size} more and stays: dimr ema needs all its snapshots")
    return "\n".join(lines)
