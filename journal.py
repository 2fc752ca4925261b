"""The record of a training run: metrics.jsonl, a line per step, and loss.png, its picture."""

import contextlib
import errno
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

import parallel
import pictures
import runfolder
from storage import UserError, writing

BAD_STEPS = 50  # consecutive non-finite steps that end training


class Lenient:
    """A stream whose failing (a full disk, a closed terminal) loses what is said and not the
    training."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


class Log:
    """Collects losses on the device and every few steps reads them at once into metrics.jsonl, a
    line per step."""

    def __init__(self, out, state, say, last):
        self.path, self.state, self.say, self.pending, self.lines = (
            out / "metrics.jsonl",
            state,
            say,
            [],
            [],
        )
        self.last, self.bad, self.bad_run, self.remarks = last, 0, 0, {}
        self.restart_clock()

    def restart_clock(self):
        self.since = time.monotonic()

    def add(self, total, norm, bad):
        self.pending.append(torch.cat([total, norm[None], bad[None]]))

    def remark(self, measure):
        """Put what `measure()` returns, a dict, into the newest step's line; the time it takes is
        not training's. What it can't do is said and no more."""
        before = time.monotonic()
        try:
            self.remarks = measure()
        except UserError as error:
            self.say(f"WARNING: no evaluation at step {self.state.step}: {error}")
        self.since += time.monotonic() - before

    def flush(self):
        """Write what is pending; returns a few figures to show. Raises UserError after BAD_STEPS
        bad steps in a row."""
        if not self.pending:
            return {}
        state, recipe, count = self.state, self.state.recipe, len(self.pending)
        rows = parallel.mean(torch.stack(self.pending)).tolist()
        speed = count * recipe.batch_size / (time.monotonic() - self.since)
        flops = speed * 6 * sum(state.model.config.macs) / parallel.world_size()
        peak = parallel.peak_flops(state.device)
        for step, (loss, *branches, norm, bad) in enumerate(rows, state.step - count + 1):
            self.bad, self.bad_run = self.bad + int(bad), self.bad_run + 1 if bad else 0
            self.last = {
                "step": step,
                "loss": loss,
                "loss_branches": [finite(branch) for branch in branches],
                "lr": state.learning_rate(step - 1),
                "gradient_norm": norm,
                "skipped": bool(bad),
                "images_per_second": round(speed, 2),
                "share_of_peak": round(flops / peak, 4) if peak else None,
                "peak_bytes": parallel.peak_memory(state.device),
                **(self.remarks if step == state.step else {}),
            }
            self.lines.append(json.dumps({k: finite(v) for k, v in self.last.items()}))
            if self.bad_run >= BAD_STEPS:
                break
        figures = {k: f"{v:.2f}" for k, v in self.remarks.items() if k == "fid"}
        self.pending, self.remarks = [], {}
        try:
            self.write()
        except OSError as error:
            self.say(
                f"WARNING: metrics up to step {step} NOT written "
                f"({error.strerror or error}); kept for the next time"
            )
        if self.bad_run >= BAD_STEPS:
            good = runfolder.checkpoints(self.path.parent)
            raise UserError(
                f"loss or gradient was not finite for {BAD_STEPS} steps up to step "
                f"{self.last['step']} "
                f"(learning rate {self.last['lr']:g}); the last good checkpoint is "
                f"{good[-1] if good else 'none'}: "
                "go on from it with a lower --lr or --grad-clip 1 under another --out (--init)"
            )
        self.restart_clock()
        return (
            {"loss": f"{self.last['loss']:.4f}", "img/s": f"{speed:.1f}"}
            | ({"peak": f"{flops / peak:.0%}"} if peak else {})
            | ({"skipped": self.bad} if self.bad else {})
            | figures
        )

    def write(self, sync=False):
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
    """`value`, or None where it is a number that JSON can't hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_metrics(out, step):
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


def metrics(out):
    """Yield (dict, its bytes) for each step of a run's metrics; a half-written last line is left
    out. Raises UserError."""
    path = Path(out) / "metrics.jsonl"
    if path.is_file():
        with open(path, "rb") as lines:
            for number, text in enumerate(lines, 1):
                if not text.endswith(b"\n"):
                    break
                try:
                    line = json.loads(text)
                    line["step"], line["loss"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{path}: line {number} is damaged; restore it, or delete it and "
                        "those after it"
                    ) from None
                yield line, text


def read_metrics(out):
    """A run's metrics, a dict per step."""
    return [line for line, _ in metrics(out)]


def plot(out):
    """Write loss.png from metrics.jsonl; returns its path. Raises UserError if there are no
    metrics."""
    rows = np.array(
        [
            (line["step"], line["loss"], *line["loss_branches"])
            for line, _ in metrics(out)
            if line["loss"] is not None
        ]
    )
    if not len(rows):
        raise UserError(f"{out} holds no metrics yet; expected a run folder that train wrote")
    names = ["loss", *(f"branch {r + 1}" for r in range(rows.shape[1] - 2))]
    series = {name: (rows[:, 0], rows[:, k + 1]) for k, name in enumerate(names)}
    path = Path(out) / "loss.png"
    pictures.save(pictures.curves(series, f"{Path(out).name}: multi-scale loss"), path)
    return path
