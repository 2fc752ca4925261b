"""The record of a training run as it goes: metrics.jsonl, a line per step, loss.png, its picture,
and a hook through which others are told the same."""

import collections
import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import parallel
import pictures
import runfolder
import schema
from schema import fields, many, maybe, real, whole
from storage import UserError, shown, unreadable, writing

SMOOTH = 50  # steps that a point of loss.png is the mean of
LONGEST = 2**20  # bytes of a line of metrics.jsonl
LINE = fields(  # what it looks like
    {"step": whole(1), "loss": maybe(real())},
    {
        "loss_branches": many(maybe(real())),
        "lr": real(),
        "images_per_second": real(0),
        "fid": maybe(real()),
        "validation_loss": maybe(real()),
        "validation_loss_branches": many(maybe(real())),
        "validation_loss_levels": many(maybe(real())),
    },
)
BAD_STEPS = 50  # consecutive non-finite steps that end training


class Sink:
    """Somewhere else that a run is told of, on rank 0: subclass it and give an object to `Journal`.
    metrics.jsonl stays the record: whatever a sink raises is said once, it is told no more, and
    training goes on."""

    name = "a sink"
    place = ""  # where to look, for people

    def begin(self, out: Path, step: int) -> int:
        """The run in `out`, whose config.json is written, goes on after `step`. Returns the last
        step whose line is kept from before: those after it, up to `step`, are told again."""
        return step

    def line(self, line: dict) -> None:
        """A step, as it stands in metrics.jsonl."""

    def picture(self, step: int, path: Path) -> None:
        """A sample grid that was written."""

    def flush(self) -> None:
        """metrics.jsonl is about to be written: nothing told so far may be lost by a kill."""

    def close(self) -> None:
        """The run ends, for now."""


class Audience:
    """The sinks of a run, told in the order of its steps."""

    def __init__(self, sinks, say):
        self.sinks = list(sinks)
        self.say = say
        self.pictures = []  # (step, path) of steps that are not told yet

    def begin(self, out, step):
        """Start the sinks, and tell each what it lacks of the steps so far."""
        for sink in list(self.sinks):
            held = self._try(sink, "begin", out, step)
            if sink not in self.sinks:
                continue
            self.say(f"log      {sink.name}: {sink.place}")
            if held < step:
                self.say(f"         which is told of steps {held + 1:,} to {step:,} now")
                for line, _ in metrics(out):
                    if held < line["step"] <= step:
                        self._try(sink, "line", line)
                self._try(sink, "flush")

    def line(self, line):
        self.tell("line", line)
        while self.pictures and self.pictures[0][0] <= line["step"]:
            self.tell("picture", *self.pictures.pop(0))

    def picture(self, step, path, told):
        """A grid of `step`, when the steps up to `told` were."""
        if step <= told:
            self.tell("picture", step, path)
        else:
            self.pictures.append((step, path))

    def tell(self, what, *arguments):
        for sink in list(self.sinks):
            self._try(sink, what, *arguments)

    def _try(self, sink, what, *arguments):
        if sink not in self.sinks:
            return None
        try:
            return getattr(sink, what)(*arguments)
        # whatever a package of others' raises, it is no reason to end training
        except Exception as error:
            self.sinks.remove(sink)
            reason = " ".join(str(error).split()) or type(error).__name__
            self.say(
                f"WARNING: {sink.name} failed ({reason}) and is told no more; training goes on, "
                "and metrics.jsonl has everything"
            )
            return None


class Journal:
    """Collects losses on the device and every few steps reads them at once into metrics.jsonl, a
    line per step. `last` is the line that the run goes on from, or {}."""

    def __init__(self, out, state, say, last, sinks=()):
        self.path = out / "metrics.jsonl"
        self.state = state
        self.say = say
        self.last = last
        self.aside = Aside(say)
        self.audience = Audience(sinks if parallel.is_main() else (), say)
        self.audience.begin(out, state.step)
        self.pending = []  # rows on the device: loss, losses by branch, gradient's norm, bad
        self.lines = []  # what metrics.jsonl lacks
        self.remarks = {}  # on the newest step
        self.bad = 0
        self.bad_run = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.since = time.monotonic()

    def add(self, losses: torch.Tensor, norm: torch.Tensor, bad: torch.Tensor) -> None:
        """Note a step's losses (1 + R,): sum and branches, its gradient's norm and whether that was
        not finite (1.0 or 0.0)."""
        self.pending.append(torch.cat([losses, norm[None], bad[None]]))

    def remark(self, measure: Callable[[], dict]) -> None:
        """Add what `measure()` returns, a dict, to the newest step's line; the time it takes is not
        training's. What it can't do is said and no more."""
        before = time.monotonic()
        try:
            self.remarks |= measure()
        except UserError as error:
            self.say(f"WARNING: no evaluation at step {self.state.step}: {error}")
        self.since += time.monotonic() - before

    def picture(self, path: Path) -> None:
        """A sample grid was written."""
        told = self.state.step - len(self.pending)
        self.audience.picture(self.state.step, path, told)

    def close(self) -> None:
        self.audience.tell("close")

    def flush(self):
        """Write what is pending; returns a few figures to show. Raises UserError after BAD_STEPS
        bad steps in a row."""
        if not self.pending:
            return {}
        count = len(self.pending)
        rows = parallel.mean(torch.stack(self.pending)).tolist()
        speed = self._speed(count)
        for step, row in enumerate(rows, self.state.step - count + 1):
            self._note(step, row, speed)
            if self.bad_run >= BAD_STEPS:
                break
        figures = self._figures(speed)
        self.pending = []
        self.remarks = {}
        self.audience.tell("flush")
        try:
            self.write()
        except OSError as error:
            reason = error.strerror or error
            self.say(
                f"WARNING: metrics up to step {step} NOT written ({reason}); kept for the next time"
            )
        if self.bad_run >= BAD_STEPS:
            raise self._ruined()
        self.restart_clock()
        return figures

    def _speed(self, count):
        """Images a second, and the operations a second on this device as a share of its peak, or
        None where that is not known."""
        speed = count * self.state.recipe.batch_size / (time.monotonic() - self.since)
        peak = parallel.peak_flops(self.state.device)
        if peak is None:
            return speed, None
        flops = speed * 6 * sum(self.state.network.config.macs) / parallel.world_size()
        return speed, flops / peak

    def _note(self, step, row, speed):
        loss, *branches, norm, bad = row
        self.bad += int(bad)
        self.bad_run = self.bad_run + 1 if bad else 0
        images_per_second, share = speed
        line = {
            "step": step,
            "loss": loss,
            "loss_branches": branches,
            "lr": self.state.recipe.learning_rate(step - 1),
            "gradient_norm": norm,
            "skipped": bool(bad),
            "images_per_second": round(images_per_second, 2),
            "share_of_peak": share and round(share, 4),
            "peak_bytes": parallel.peak_memory(self.state.device),
        }
        if step == self.state.step:
            line |= self.remarks
        self.last = {key: finite(value) for key, value in line.items()}
        self.lines.append(json.dumps(self.last))
        self.audience.line(self.last)

    def _figures(self, speed):
        images_per_second, share = speed
        loss = self.last["loss"]
        figures = {
            "loss": "nan" if loss is None else f"{loss:.4f}",
            "img/s": f"{images_per_second:.1f}",
        }
        if share is not None:
            figures["peak"] = f"{share:.0%}"
        if self.bad:
            figures["skipped"] = self.bad
        if "fid" in self.remarks:
            figures["fid"] = f"{self.remarks['fid']:.2f}"
        if "validation_loss" in self.remarks:
            figures["held out"] = f"{self.remarks['validation_loss']:.4f}"
        return figures

    def _ruined(self):
        good = runfolder.checkpoints(self.path.parent)
        last = good[-1] if good else "none"
        return UserError(
            f"loss or gradient was not finite for {BAD_STEPS} steps up to step {self.last['step']} "
            f"(learning rate {self.last['lr']:g}); the last good checkpoint is {last}: go on from "
            "it with a lower --lr or --grad-clip 1 under another --out (--init)"
        )

    def write(self, sync: bool = False) -> None:
        """Append the lines that metrics.jsonl lacks. Raises OSError, the file being as it was and
        the lines kept."""
        if not parallel.is_main():
            return
        text = "".join(line + "\n" for line in self.lines).encode()
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        self.lines = []


def finite(value):
    """`value`, or None where it is a number that JSON can't hold; of a list likewise."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --------------------------------------------------------------------------------------- reading it


def metrics(out: Path) -> Iterator[tuple[dict, bytes]]:
    """Yield (dict, its bytes) for each step of a run's metrics; a half-written last line is left
    out. Raises UserError."""
    path = Path(out) / "metrics.jsonl"
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, text in enumerate(_lines(file), 1):
            if not text.endswith(b"\n") and len(text) <= LONGEST:
                return
            yield parsed(path, number, text), text


def _lines(file):
    """The lines of a file; one that is too long to be ours in parts. Raises UserError."""
    try:
        yield from iter(lambda: file.readline(LONGEST + 1), b"")
    except OSError as error:
        raise unreadable(file.name, error) from None


def parsed(path, number, text):
    """The dict in line `number` of metrics. Raises UserError."""
    try:
        line = schema.parse(text, LONGEST)
        schema.check(line, LINE)
    except ValueError as error:
        raise UserError(
            f"{path}: line {number} is damaged ({error}); restore it, or delete it and those after "
            "it"
        ) from None
    return line


def newest(out: Path, key: str = "loss", count: int = 1) -> list[dict]:
    """The newest `count` of the steps whose metrics have `key`, oldest first; other lines, which
    may be a million, are not parsed. Raises UserError."""
    path = Path(out) / "metrics.jsonl"
    if not path.is_file():
        return []
    mark = json.dumps(key).encode()
    found = collections.deque(maxlen=count)
    with open(path, "rb") as file:
        for number, text in enumerate(_lines(file), 1):
            if mark in text and text.endswith(b"\n"):
                found.append((number, text))
    return [parsed(path, number, text) for number, text in found]


def read_metrics(out: Path) -> list[dict]:
    """A run's metrics, a dict per step."""
    return [line for line, _ in metrics(out)]


def truncate_metrics(out: Path, step: int) -> dict:
    """Keep the lines of steps up to `step`: those after it will be trained again. Returns the last
    one, or {}."""
    last = {}
    with writing(out / "metrics.jsonl") as file:
        for line, text in metrics(out):
            if line["step"] > step:
                break
            file.write(text)
            last = line
    return last


def plot(out: Path) -> Path:
    """Write loss.png from metrics.jsonl; returns its path. Raises UserError if there are no
    metrics."""
    trained, held_out, levels, fid = [], [], [], []  # rows of (step, value, …)
    for line, _ in metrics(out):
        step = line["step"]
        if line["loss"] is not None:
            trained.append((step, line["loss"], *line.get("loss_branches", ())))
        if line.get("validation_loss") is not None:
            branches = line.get("validation_loss_branches", ())
            held_out.append((step, line["validation_loss"], *branches))
            levels.append((step, *line.get("validation_loss_levels", ())))
        if line.get("fid") is not None:
            fid.append((step, line["fid"]))
    if not trained:
        raise UserError(f"{out} holds no metrics yet; expected a run folder that train wrote")
    for rows in (trained, held_out, levels):
        if len({len(row) for row in rows}) > 1:
            raise UserError(
                f"{out}/metrics.jsonl is damaged: lines differ in how many losses they have"
            )
    name = Path(out).name
    series = _series(trained, "branch", "loss")
    charts = []
    if held_out:
        apart = _series(held_out, "branch", "held out")
        series["held out"] = apart.pop("held out")
        title = f"{name}: held-out loss by branch"
        charts.append(pictures.curves(apart, title, 1, first_colour=1))  # as in the first chart
        title = f"{name}: held-out loss by noise level, 1 the least"
        charts.append(pictures.curves(_series(levels, "level"), title, 1))
    if fid:
        charts.append(
            pictures.curves(_series(fid, "", "FID"), f"{name}: FID", 1, axes=("step", "FID"))
        )
    title = f"{name}: multi-scale loss, mean of {SMOOTH} steps"
    path = Path(out) / "loss.png"
    pictures.save(pictures.stacked([pictures.curves(series, title), *charts]), path)
    return path


def _series(rows, word, *first):
    """Name → (steps, values) of the columns of rows (step, value, …): those named `first`, then
    `word` and a number."""
    steps, *columns = np.array(rows, float).T
    names = [*first, *(f"{word} {number}" for number in range(1, len(columns) + 1))]
    return {name: (steps, column) for name, column in zip(names, columns, strict=False)}


# ------------------------------------------------------------------------------------------ talking


class Aside:
    """What only draws or tells never ends training, whatever it raises: that is said, once."""

    def __init__(self, say):
        self.say = say
        self.said = set()

    @contextlib.contextmanager
    def __call__(self, what):
        """Do something beside training; `what` could not be done is said if it fails."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split()) or "no reason"
            if not isinstance(error, UserError | OSError):
                reason = f"{type(error).__name__}: {reason}"
            if reason not in self.said:
                self.say(f"WARNING: {what} ({reason}); training goes on")
            self.said.add(reason)


class Lenient:
    """A stream whose failing (a full disk, a closed terminal) loses what is said and not the
    training."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __eq__(self, other):
        """So that tqdm knows the stream of its bar when a line is to come above it."""
        return isinstance(other, Lenient) and self.stream is other.stream

    __hash__ = None

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def speaker(quiet: bool) -> Callable[[str], None]:
    """A function that says a line on stderr, above the progress bar, on rank 0 and unless
    `quiet`."""
    stderr = Lenient(sys.stderr)

    def say(line):
        if parallel.is_main() and not quiet:
            tqdm.write(shown(line), file=stderr)

    return say
