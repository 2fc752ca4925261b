"""Others that a run is told of as it goes (`dimr train --log`), if their packages are there:
losses, rate, throughput, FID, sample grids. metrics.jsonl stays the record.

A line of it becomes a value for each number in it, so that what is new there is here too: `loss`,
`loss_branches/1`, `lr`, `images_per_second`, `fid`, …"""

import importlib.util
import os
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

import journal
import storage
from storage import UserError, read_json

PROJECT = "dimr"  # wandb's, unless WANDB_PROJECT names another


def sinks(names: Sequence[str]) -> list[journal.Sink]:
    """A sink for each of these rows of SINKS. Raises UserError for one whose package is not
    installed."""
    found = []
    for name in dict.fromkeys(names):
        sink = SINKS[name]()
        spec = importlib.util.find_spec(sink.package)
        if spec is None or spec.origin is None:  # none, or a folder that is called so
            raise UserError(
                f"--log {name} needs the package {sink.package}, which is not installed: "
                f"pip install {sink.package}, or leave --log {name} out"
            )
        found.append(sink)
    return found


def values(line: dict) -> Iterator[tuple[str, float]]:
    """(name, value) of each number in a line of metrics.jsonl but the step's; of a list one for
    each entry, counted from 1."""
    for name, value in line.items():
        if isinstance(value, list):
            for number, entry in enumerate(value, 1):
                if entry is not None:
                    yield f"{name}/{number}", entry
        elif isinstance(value, float | int) and name != "step":
            yield name, float(value)


class TensorBoard(journal.Sink):
    """Event files in the run's folder tensorboard/.

    Steps that a killed run does again take the place of what it had told of them: TensorBoard
    leaves out what was written before about steps from `purge_step` on."""

    name = "tensorboard"
    package = "tensorboard"

    def begin(self, out, step):
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self.summary = Summary
        self.folder = out / "tensorboard"
        self.place = f"tensorboard --logdir {self.folder}"
        self.step = min(self._told(), step)
        self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)
        return self.step

    def _told(self):
        """The last step that was flushed before, 0 where that is not known."""
        try:
            return int((self.folder / "told").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def line(self, line):
        rows = [self.summary.Value(tag=name, simple_value=value) for name, value in values(line)]
        # at once: an event for each takes six times as long
        self.writer.file_writer.add_summary(self.summary(value=rows), line["step"])
        self.step = line["step"]

    def picture(self, step, path):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.writer.add_image("samples", pixels, step, dataformats="HWC")

    def flush(self):
        self.writer.flush()
        (self.folder / "told").write_text(f"{self.step}\n")

    def close(self):
        self.writer.close()


class Wandb(journal.Sink):
    """A run of Weights & Biases, the same one whenever ours goes on; its files are in the run's
    folder wandb/, and its own environment variables hold (WANDB_PROJECT, WANDB_MODE, …).

    It takes each step once: what a killed run does again stays as it was told first."""

    name = "wandb"
    package = "wandb"

    def begin(self, out, step):
        import wandb

        self.package_itself = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=out.resolve().name,
            id=self._identity(out / "wandb" / "id"),
            resume="allow",
            dir=str(out),
            config=read_json(out / "config.json"),
            settings=wandb.Settings(console="off"),
        )
        self.place = self.run.url or f"offline, wandb sync {out / 'wandb'}/offline-run-*"
        self.held = max(0, self.run.step - 1)
        return self.held

    def _identity(self, path):
        """What wandb knows our run by, made once and kept at `path`."""
        if not path.is_file():
            with storage.writing(path, "w") as file:
                file.write(uuid.uuid4().hex[:16])
        return path.read_text()

    def line(self, line):
        if line["step"] > self.held:
            self.run.log(dict(values(line)), step=line["step"])

    def picture(self, step, path):
        if step > self.held:
            image = self.package_itself.Image(str(path))
            self.run.log({"samples": image}, step=step)

    def close(self):
        self.run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": Wandb}
