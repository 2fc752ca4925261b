"""Features of images, and what those of a set come to: extractors, moments, and the cache they are
kept in.

Features come from one pass over the images and are cached by content: what was measured once is not
measured again. The images may be spread over processes by torchrun, and a generation that was
interrupted goes on where it stopped."""

import ours

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import shutil
import sys

import numpy as np
import torch
from tqdm import tqdm

import dataset
import downloads
import fid
import imagesets
import parallel
import randomness
import sampling
import storage
from storage import UserError, load_tensors, save_tensors, sha256

STANDARD = "Inception of 2015"
FORMAT = 1  # of what is cached
FEATURES = ("pool", "spatial", "logits")  # what an extractor gives
BYTES = 4 * (fid.POOL + fid.SPATIAL + fid.LOGITS)  # of them, per image
# Permutes a folder's images over the Inception Score's splits, and picks the reference's.
ORDER_SEED = 0
BATCH_SIZE = {"cuda": 128, "mps": 32, "cpu": 16}


@contextlib.contextmanager
def foreseen():
    """What fid.py finds wrong with its input is the user's to put right."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


# --------------------------------------------------------------------------------------- extractors


@dataclasses.dataclass
class Extractor:
    """Images uint8 (N, H, W, 3) on `device` → (pool (N, D), spatial (N, 2023) or None, logits (N,
    1008) or None)."""

    function: object
    device: torch.device
    name: str
    identity: str  # of its features
    cached: bool  # whether the identity says all there is to know of them

    @property
    def standard(self):
        return self.name == STANDARD

    @torch.inference_mode()
    def __call__(self, images):
        with torch.backends.cudnn.flags(
            enabled=True, allow_tf32=False
        ):  # its rounding shows in a small FID
            return self.function(images.to(self.device, non_blocking=True))


def inception(source="inception", device="cpu"):
    """The Inception network of 2015 from a name or pytorch-fid's weights file. Raises UserError."""
    path = downloads.find(source)
    digest, device = sha256(path), torch.device(device)
    name = (
        STANDARD
        if digest == downloads.ASSETS["inception"].sha256
        else f"Inception with OTHER weights ({digest[:8]})"
    )
    with foreseen():
        network = fid.load(path, device)
    return Extractor(network, device, name, f"inception {digest}", True)


def custom(spec, device="cpu"):
    """An extractor from `module:function`, which maps uint8 images (N, H, W, 3) to features (N,
    D)."""
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(
            0, os.getcwd()
        )  # where a user's own module lies; the console script's path leaves it out
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--features {spec}: {error}; expected module:function, importable from here"
        ) from None

    def extract(images):
        features = function(images)
        if (
            not isinstance(features, torch.Tensor)
            or features.ndim != 2
            or len(features) != len(images)
        ):
            got, count = getattr(features, "shape", type(features).__name__), len(images)
            raise UserError(
                f"--features {spec} gave {got} for {count} images; expected a tensor ({count}, D)"
            )
        return features.float(), None, None

    return Extractor(extract, torch.device(device), f"features of {spec}", f"custom {spec}", False)


# --------------------------------------------------------------------------- what is known of a set


@dataclasses.dataclass
class Measured:
    """What the features of a set of images come to. As a file: the cache's, and that of `dimr eval
    stats`."""

    source: str
    sha256: str  # of the images, or of how they were generated
    size: int | None  # pixels
    count: int | None  # None where ADM's reference doesn't say
    extractor: str
    identity: str
    mean: torch.Tensor
    covariance: torch.Tensor
    spatial_mean: torch.Tensor | None = None
    spatial_covariance: torch.Tensor | None = None
    features: torch.Tensor | None = None  # pool features (M, D) of the images kept, in order
    score: float | None = None  # the Inception Score
    sortedness: float | None = (
        None  # how much likelier than any two images neighbours are of one class: from 0 to 1
    )

    def save(self, path):
        fields = vars(self)
        tensors = {k: v for k, v in fields.items() if isinstance(v, torch.Tensor)}
        save_tensors(
            path, tensors, {k: json.dumps(v) for k, v in fields.items() if k not in tensors}
        )

    @staticmethod
    def load(path):
        """Raises UserError for a file that holds something else."""
        tensors, about = load_tensors(path)
        try:
            return Measured(
                **tensors, **{k: json.loads(v) for k, v in about.items() if k != "format"}
            )
        except (TypeError, ValueError):
            raise UserError(
                f"{path} holds no statistics; expected a file that dimr eval stats wrote"
            ) from None


class Collector:
    """Turns features, batch by batch and on several processes, into `Measured`.

    `keep`: how many images' features are kept, chosen by a seed where that isn't all. `mixed`:
    whether a seed permutes the images over the Inception Score's splits, because their order means
    nothing."""

    def __init__(self, count, device, keep=None, mixed=False):
        order = randomness.Order(count, ORDER_SEED).permutation(0)
        self.count, self.kept = count, np.isin(np.arange(count), order[:keep])
        self.position = np.argsort(order) if mixed else np.arange(count)
        self.device = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64
        self.statistics, self.score, self.features, self.predicted = (
            {},
            fid.InceptionScore(),
            {},
            {},
        )

    def add(self, numbers, pool, spatial, logits):
        """Take in the features of images `numbers`, which are consecutive."""
        first = int(numbers[0])
        for name, rows in (("", pool), ("spatial_", spatial)):
            if rows is not None:
                if name not in self.statistics:
                    self.statistics[name] = fid.Statistics(rows.shape[1], self.device)
                with foreseen():
                    self.statistics[name].add(rows)
        if logits is not None:
            self.score.add(logits, self.position[numbers])
            self.predicted[first] = logits.argmax(1).cpu()
        self.features[first] = pool[torch.from_numpy(self.kept[numbers])].cpu()

    def merge(self, other):
        """Take in what another process collected, if anything; this one has."""
        for name, theirs in other.statistics.items():
            self.statistics[name].merge(theirs)
        self.score.merge(other.score)
        self.features |= other.features
        self.predicted |= other.predicted

    def to_cpu(self):
        for statistics in self.statistics.values():
            statistics.to("cpu")
        return self

    def measured(self, **about):
        with foreseen():
            moments = {
                name + part: getattr(statistics, part).cpu()
                for name, statistics in self.statistics.items()
                for part in ("mean", "covariance")
            }
        features, predicted = (
            torch.cat([v for _, v in sorted(parts.items())]) if parts else None
            for parts in (self.features, self.predicted)
        )
        scored = {}
        if predicted is not None:
            scored = {
                "score": self.score.value,
                "sortedness": _sortedness(predicted[np.argsort(self.position)]),
            }
        return Measured(count=self.count, features=features, **moments, **scored, **about)


def _sortedness(classes):
    """(p − q) / (1 − q), where p is the share of neighbours of one class and q that among any two
    images."""
    share = torch.bincount(classes).double() / len(classes)
    by_chance = float((share**2).sum())
    neighbours = (
        float((classes[1:] == classes[:-1]).double().mean()) if len(classes) > 1 else by_chance
    )
    return (neighbours - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0


def _collect(collector, items, quiet, what, **about):
    """Feed this process's `items` (numbers, features), join with the others'; `Measured` on rank 0,
    else None."""
    with tqdm(
        total=collector.count,
        desc=what,
        unit="img",
        disable=quiet or not parallel.is_main() or None,
    ) as bar:
        for numbers, features in items:
            collector.add(numbers, *features)
            bar.update(min(len(numbers) * parallel.world_size(), bar.total - bar.n))
    found = parallel.collect(collector if parallel.world_size() == 1 else collector.to_cpu())
    if not found:
        return None
    for other in found[1:]:
        collector.merge(other)
    return collector.measured(**about)


def _place(key):
    """Where in the cache the `Measured` of this key (a list that JSON can hold) belongs."""
    return (
        downloads.cache()
        / "features"
        / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    )


def _cached(path, compute, source):
    """The `Measured` at `path` on rank 0, else None, computed and written there if it is not (path
    None: not written). A damaged file is replaced, and one that can't be written costs no
    result."""
    found = None
    if path and path.is_file() and parallel.is_main():
        with contextlib.suppress(UserError):
            found = dataclasses.replace(Measured.load(path), source=source)
    if parallel.broadcast(found is not None):
        return found
    found = compute()
    if found and path:
        try:
            found.save(path)
        except OSError as error:
            tqdm.write(
                f"WARNING: {path} NOT written ({error.strerror}); the next call measures again",
                file=sys.stderr,
            )
    return found


def measure(images, extractor, keep=None, batch_size=None, quiet=False):
    """`Measured` of an image set on rank 0, else None: each process extracts its share. Cached by
    content."""
    digest = parallel.broadcast(images.digest if parallel.is_main() else None)
    path = (
        _place(["images", FORMAT, digest, images.size, keep, extractor.identity])
        if extractor.cached
        else None
    )
    size = batch_size or BATCH_SIZE[extractor.device.type]

    def compute():
        firsts = np.array_split(np.arange(0, len(images), size), parallel.world_size())[
            parallel.rank()
        ]
        stretches = [np.arange(first, min(first + size, len(images))) for first in firsts]
        batches = dataset.loader(
            images,
            ((stretch, None) for stretch in stretches),
            imagesets.workers(images, size),
            pin=extractor.device.type == "cuda",
        )
        items = (
            (stretch, extractor(batch[0]))
            for stretch, batch in zip(stretches, batches, strict=True)
        )
        return _collect(
            Collector(len(images), extractor.device, keep, not images.ordered),
            items,
            quiet,
            "features",
            source=str(images.path),
            sha256=digest,
            size=images.size,
            extractor=extractor.name,
            identity=extractor.identity,
        )

    return _cached(path, compute, str(images.path))


def generate(generator, count, settings, extractor, batch_size=None, resumable=True, quiet=False):
    """`Measured` of `count` images that a sampling.Generator draws on rank 0, else None.

    Image i has class i mod K and seed i. None is written. `resumable` notes each batch's features
    in the cache folder until all are there, so an interrupted call goes on, on any number of
    processes, and ends with the same numbers to the last bit."""
    settings = settings.resolved(generator.config)
    batch_size = min(count, batch_size or sampling.BATCH_SIZE[generator.device.type])
    classes, total = (
        [i % generator.config.num_classes for i in range(count)],
        math.ceil(count / batch_size),
    )
    plan = {
        k: v
        for k, v in sampling.describe(generator, settings).items()
        if k not in ("source", "torch")
    }
    key = json.dumps([count, batch_size, plan])
    about = {
        "source": f"{generator.source}, cfg {settings.cfg:g}, {settings.solver}, "
        f"{settings.steps} NFE",
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "size": generator.pixels,
        "extractor": extractor.name,
        "identity": extractor.identity,
    }
    collector = Collector(count, extractor.device)

    def features(numbers, progress=None):
        for indices, images in generator.batches(
            classes, range(count), settings, batch_size, numbers, progress
        ):
            yield np.asarray(indices), extractor(torch.from_numpy(images).expand(-1, -1, -1, 3))

    if not (resumable and extractor.cached):
        mine = range(parallel.rank(), total, parallel.world_size())
        return _collect(collector, features(mine), quiet, "generating", **about)

    path = _place(["generated", FORMAT, key, extractor.identity])
    work = path.with_suffix(".partial")

    def note(k):
        return work / f"{k:06d}.safetensors"

    def compute():
        with contextlib.ExitStack() as stack:
            if parallel.is_main():
                stack.enter_context(storage.locked(work))
                _check_space(work, count)
            parallel.barrier()
            missing = [k for k in range(total) if not note(k).is_file()]
            parallel.barrier()  # everyone has seen what is there
            mine = missing[parallel.rank() :: parallel.world_size()]
            bar = stack.enter_context(
                tqdm(
                    total=min(len(mine) * batch_size, count),
                    desc="generating",
                    unit="img",
                    disable=quiet or not parallel.is_main() or None,
                    bar_format=sampling.BAR,
                )
            )
            for k, (_, found) in zip(mine, features(mine, bar), strict=True):
                save_tensors(note(k), dict(zip(FEATURES, found, strict=True)))
            parallel.barrier()
            if not parallel.is_main():
                return None
            for k in tqdm(
                range(total), desc="statistics", unit="batch", disable=quiet or None, leave=False
            ):
                if not note(k).is_file():
                    raise UserError(
                        f"{note(k)} is missing: all processes must share the cache; set "
                        "DIMR_HOME to a "
                        "folder that they can reach"
                    )
                found, _ = load_tensors(note(k))
                numbers = np.arange(k * batch_size, min((k + 1) * batch_size, count))
                collector.add(numbers, *(found[name].to(extractor.device) for name in FEATURES))
            return collector.measured(**about)

    measured = _cached(path, compute, about["source"])
    if parallel.is_main():
        shutil.rmtree(work, ignore_errors=True)
    return measured


def _check_space(folder, count):
    need, free = count * BYTES, shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"the features of {count:,} images take {need / 1e9:.1f} GB and {folder} has room for "
            f"{free / 1e9:.1f}; free space or set DIMR_HOME"
        )
