"""The loss on images that training doesn't see (`dimr train --validate`): once it rises while the
training loss falls, a network learns its images by heart.

Every image is noised LEVELS times, once in each equal stretch of the time that training draws from.
Times and noise belong to the image's place in the set and to nothing else: not to the run, its seed
or its step, so that numbers compare from step to step and from run to run. No label is dropped, no
image mirrored. Batches are the same however many processes share them, and sums are made in their
order."""

import ours

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import dataset
import parallel
import randomness
import shards
import space
from storage import UserError

LEVELS = 4  # stretches of time, from little noise to much
BATCH = 64  # images at once, or what training takes at once if that is less
SEED = 0  # of times and noise


@dataclasses.dataclass(frozen=True)
class Validation:
    """What to validate on and how often. `path`: as recipes.Source's; None looks in the run's
    config.json. `every`: steps between; None: as there, else as checkpoints; 0: never."""

    path: str | Path | None = None
    every: int | None = None


class HeldOut:
    """A data set whose labels are numbered as those of the training `data`. Raises UserError where
    it is not of the kind, size, VAE or classes that a network for `data` knows."""

    def __init__(self, path: str | Path, data: dataset.Data, exif: bool = False, classes=None):
        self.data = _open(path, data, exif, classes)
        self.fingerprint = None
        if parallel.is_main():
            self.fingerprint = self.data.fingerprint
            self._check_others(path, data)
        self.rows = _rows(path, self.data, data.classes)

    def __len__(self):
        return len(self.data)

    def _check_others(self, path, data):
        if self.fingerprint == data.fingerprint:
            raise UserError(
                f"--validate {path} holds the images that are trained on; give others, held out"
            )

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels of this set as training numbers them, int64 (B,)."""
        return self.rows[labels]


def _open(path, data, exif, classes):
    if data.kind == "latents" and not shards.is_set(path):
        raise UserError(
            f"--validate {path} holds no latents, and {data.root} does; encode it as those were: "
            f"dimr encode --data {path} --out FOLDER"
        )
    size = data.size if data.kind == "pixels" else None
    channels = data.channels if data.kind == "pixels" else None
    found = dataset.open_data(path, size, channels, exif=exif, classes=classes)
    mine = (data.kind, data.size, data.channels)
    theirs = (found.kind, found.size, found.channels)
    if theirs != mine:
        raise UserError(
            f"--validate {path} holds {theirs[0]} of size {theirs[1]} with {theirs[2]} channels, "
            f"and {data.root} {mine[0]} of size {mine[1]} with {mine[2]}; encode both alike"
        )
    if data.kind == "latents" and _differ(found.index["vae_sha256"], data.index["vae_sha256"]):
        raise UserError(
            f"--validate {path} holds latents of another VAE than {data.root}; encode both alike"
        )
    return found


def _differ(one, other):
    """Whether two hashes are known and not the same: that of latents that others made is not."""
    return None not in (one, other) and one != other


def _rows(path, found, classes):
    """For each class of the data `found` its number among `classes`: by name, or the one for the
    one."""
    if len(found.classes) == len(classes) == 1:
        return torch.zeros(1, dtype=torch.int64)
    known = {name: row for row, name in enumerate(classes)}
    rows = [known.get(name, -1) for name in found.classes]
    for label in np.unique(found.labels):
        if rows[label] < 0:
            raise UserError(
                f"--validate {path} has a class {found.classes[label]!r} that is not trained on; "
                f"it has to have those of the training images, of which the first are {classes[:3]}"
            )
    return torch.tensor(rows)


def measure(
    state, held: HeldOut, *, workers: int | None = None, on_bad: str = "error"
) -> tuple[dict, set[str]]:
    """(what is noted in metrics.jsonl, what is said of images that can't be read) of a
    training.State: the multi-scale loss and each branch's, means over images and levels, and the
    multi-scale loss of each level, coarse to fine and from little noise to much. The same on every
    process. Raises UserError on all of them where one can't read an image."""
    size = min(BATCH, state.recipe.micro_batch or state.recipe.batch_size)
    parts = {}
    skipped = set()
    failure = None
    try:
        for number, batch, bad in _share(held, size, workers, on_bad, state.device):
            parts[number] = _losses(state, number * size, *batch).cpu()
            skipped.update(bad)
    except UserError as error:  # the others have to be told, who wait
        failure = str(error)
    found = parallel.gather((parts, skipped, failure))
    for _, _, failure in found:
        if failure:
            raise UserError(failure)
    everyones = {}
    for parts, bad, _ in found:
        everyones |= parts
        skipped |= bad
    table = torch.cat([everyones[number] for number in sorted(everyones)], 2)
    means = table.double().mean(2)  # (LEVELS, 1 + R)
    loss, *branches = means.mean(0).tolist()
    found = {
        "validation_loss": loss,
        "validation_loss_branches": branches,
        "validation_loss_levels": means[:, 0].tolist(),
    }
    return found, skipped


def _share(held, size, workers, on_bad, device) -> Iterator[tuple]:
    """(number, (images, labels) on the device, bad) of each of this process's batches."""
    count = -(-len(held) // size)
    numbers = range(parallel.rank(), count, parallel.world_size())

    def reads():
        for number in numbers:
            last = min((number + 1) * size, len(held))
            places = np.arange(number * size, last)
            yield places, np.zeros(len(places), bool)

    batches = dataset.loader(held.data, reads(), workers, on_bad=on_bad)
    batches = dataset.naming_the_way_out(batches)
    for number, (images, labels, bad) in zip(numbers, batches, strict=True):
        yield number, (images.to(device), held.labels(labels).to(device)), bad


@torch.no_grad()
def _losses(state, first, images, labels):
    """Losses (LEVELS, 1 + R, B) of the images at places first, first + 1, …: sum and branches. The
    network runs as it is, neither compiled, which would be for this alone, nor wrapped."""
    last = first + len(images)
    config = state.network.config
    shape = (config.channels, config.size, config.size)

    def normal(stream, shape):
        return randomness.normal(SEED, stream, first, last, shape, images.device)

    x0 = space.of(config).x0(images, lambda shape: normal("validation latent", shape))
    rows = []
    for level in range(LEVELS):
        uniform = randomness.uniform(SEED, f"validation time {level}", first, last)
        t = state.schedule.draw((level + uniform) / LEVELS)
        noise = normal(f"validation noise {level}", shape)
        total, branches = state.losses(state.network.forward, x0, t, noise, labels)
        rows.append(torch.cat([total[None], branches]))
    return torch.stack(rows)
