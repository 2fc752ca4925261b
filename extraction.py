"""Features of images, and what those of a set come to: extractors, moments, and the cache they are
kept in.

Features come from one pass over the images and are cached by content: what was measured once is not
measured again. The images may be spread over processes by torchrun, and a generation that was
interrupted goes on where it stopped."""

import ours

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import averaging
import dataset
import downloads
import errors
import fid
import imagesets
import parallel
import randomness
import sampling
import schema
import storage
import vit
from schema import fields, flag, many, maybe, real, text, whole
from storage import UserError, load_tensors, save_tensors, sha256

STANDARD = "Inception of 2015"
DINO = "DINOv2 ViT-L/14"
KINDS = ("inception", "dinov2")  # of features
FORMAT = 1  # of what is cached
RECORD = fields(  # what a Measured's file says besides its tensors
    {"source": text(), "sha256": text(), "extractor": text(), "identity": text()},
    {
        "size": maybe(whole(1)),
        "count": maybe(whole(1)),
        "score": maybe(real(0)),
        "sortedness": maybe(real()),
        "drawn": maybe(text()),
        "scores": maybe(many(real(0))),
        "half": flag,
    },
)
TENSORS = {
    "mean",
    "covariance",
    "spatial_mean",
    "spatial_covariance",
    "features",
    "spatial",
    "labels",
}
LATER = {"spatial", "labels", "drawn", "scores", "half"}  # what 0.2.0 does not know in its files
CONTENT = "content"  # SHA-256 of a note's tensors, among its metadata
FEATURES = ("pool", "spatial", "logits")  # what an extractor gives
BYTES = 4 * (fid.POOL + fid.SPATIAL + fid.LOGITS)  # of them, per image
# Permutes a folder's images over the Inception Score's splits, and picks the reference's.
ORDER_SEED = 0
BATCH_SIZE = {"cuda": 128, "mps": 32, "cpu": 16}


@contextlib.contextmanager
def foreseen() -> Iterator[None]:
    """What fid.py finds wrong with its input is the user's to put right."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


# --------------------------------------------------------------------------------------- extractors


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Images uint8 (N, H, W, 3) on `device` → (pool (N, D), spatial (N, 2023) or None, logits (N,
    1008) or None)."""

    function: Callable
    device: torch.device
    name: str
    identity: str  # of its features
    cached: bool  # whether the identity says all there is to know of them
    resize: str = "its own affair"  # what it does to images first

    @property
    def record(self) -> dict:
        return {"name": self.name, "identity": self.identity, "resize": self.resize}

    @property
    def standard(self) -> bool:
        return self.name == STANDARD

    @torch.inference_mode()
    def __call__(self, images):
        # TF32's rounding shows in a small FID
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self.function(images.to(self.device, non_blocking=True))


def inception(source: str | Path = "inception", device: str | torch.device = "cpu") -> Extractor:
    """The Inception network of 2015 from a name or pytorch-fid's weights file. Raises UserError."""
    path = downloads.find(source)
    device = torch.device(device)
    digest = sha256(path)
    name = STANDARD
    if digest != downloads.ASSETS["inception"].sha256:
        name = f"Inception with OTHER weights ({digest[:8]})"
    with foreseen():
        network = fid.load(path, device)
    return Extractor(
        network,
        device,
        name,
        identity=f"inception {digest}",
        cached=True,
        resize="TensorFlow 1's bilinear to 299×299: no half-pixel centres, no antialiasing",
    )


def dinov2(source: str | Path = "dinov2", device: str | torch.device = "cpu") -> Extractor:
    """DINOv2, whose class token FD-DINOv2 is made of, from a name or its authors' file. Raises
    UserError."""
    path = downloads.find(source)
    device = torch.device(device)
    digest = sha256(path)
    with foreseen():
        network = vit.dino_from_state_dict(load_tensors(path)[0]).to(device)
    name = DINO
    if (network.dim, len(network.blocks)) != (1024, 24):
        name = f"DINOv2 of OTHER size ({digest[:8]})"

    def extract(images):
        return network.features(vit.prepare_dino(images)), None, None

    return Extractor(
        extract,
        device,
        name,
        identity=f"dinov2 {digest}",
        cached=True,
        resize="bicubic with antialiasing to 224×224, in float",
    )


EXTRACTORS = dict(zip(KINDS, (inception, dinov2), strict=True))


def custom(spec: str, device: str | torch.device = "cpu") -> Extractor:
    """An extractor from `module:function`, which maps uint8 images (N, H, W, 3) on the device to
    features (N, D), a tensor or a NumPy array. Raises UserError."""
    function = _users_function(spec)

    def extract(images):
        return _as_features(function(images), len(images), spec), None, None

    return Extractor(
        extract,
        torch.device(device),
        name=f"features of {spec}",
        identity=f"custom {spec}",
        cached=False,
    )


def _users_function(spec):
    """What `module:function` names."""
    module, _, name = spec.partition(":")
    try:
        return getattr(ours.users_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--features {spec}: {error}; expected module:function, importable from here"
        ) from None


def _as_features(found, count, spec):
    """What a user's function gave for `count` images, as a tensor (count, D) float32."""
    features = found
    if isinstance(found, np.ndarray) and found.dtype.kind in "fiu":
        features = torch.from_numpy(found.astype(np.float32))
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != count:
        got = type(found).__name__
        if hasattr(found, "shape"):
            got += f" {tuple(found.shape)} of {found.dtype}"
        raise UserError(
            f"--features {spec} gave {got} for {count} images; expected a tensor or an array of "
            f"numbers ({count}, D)"
        )
    return features.float()


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
    spatial: torch.Tensor | None = None  # of all images, (N, 2023), where all are kept
    labels: torch.Tensor | None = None  # classes (N,), where they are known
    drawn: str | None = None  # digest of classes and seeds: equal in sets that can be paired
    score: float | None = None  # the Inception Score
    scores: list[float] | None = None  # of its splits
    half: bool = False  # whether distances between images are float16, as in ADM's suite
    # how much likelier than any two images neighbours are of one class: from 0 to 1
    sortedness: float | None = None

    @property
    def owners(self) -> np.ndarray | None:
        """Which block each image belongs to, (N,), where errors can be stated: all features are
        kept, and there are images enough."""
        whole = self.features is not None and len(self.features) == self.count
        if not whole or self.count < errors.BLOCKS:
            return None
        labels = None if self.labels is None else self.labels.numpy()
        return errors.blocks(self.count, labels)

    def save(self, path: str | Path):
        tensors = {}
        texts = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif name not in LATER or value:
                texts[name] = json.dumps(value)
        save_tensors(path, tensors, texts)

    @staticmethod
    def load(path: str | Path) -> "Measured":
        """Raises UserError for a file that holds something else."""
        tensors, texts = load_tensors(path)
        texts.pop("format", None)
        try:
            record = {name: schema.parse(value) for name, value in texts.items()}
            schema.check(record, RECORD)
            found = Measured(**{k: v for k, v in record.items() if k not in TENSORS}, **tensors)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path} holds no statistics ({error}); expected a file that dimr eval stats wrote"
            ) from None
        found.check_tensors(path)
        return found

    def check_tensors(self, path: str | Path):
        """Raise UserError where the tensors don't belong together or hold what is no number."""
        dim = self.mean.numel()
        expected = {"mean": (dim,), "covariance": (dim, dim)}
        if self.features is not None:
            expected["features"] = (self.features.shape[:1].numel(), dim)
        if self.spatial_mean is not None:
            side = self.spatial_mean.numel()
            expected |= {"spatial_mean": (side,), "spatial_covariance": (side, side)}
            if self.spatial is not None:
                expected["spatial"] = (self.count, side)
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
                raise UserError(f"{path} is damaged: its {name} is not of shape {shape}")
            if 0 in shape or not tensor.isfinite().all():
                raise UserError(f"{path} is damaged: its {name} holds values that are not finite")
        if self.labels is not None:
            whole = not self.labels.is_floating_point() and self.labels.shape == (self.count,)
            if not whole:
                raise UserError(f"{path} is damaged: its labels are not {self.count} classes")


class Collector:
    """Turns features, batch by batch and on several processes, into `Measured`.

    `keep`: how many images' features are kept, chosen by a seed where that isn't all. `mixed`:
    whether a seed permutes the images over the Inception Score's splits, because their order means
    nothing."""

    def __init__(
        self, count: int, device: torch.device, keep: int | None = None, mixed: bool = False
    ):
        order = randomness.Order(count, ORDER_SEED).permutation(0)
        self.count = count
        self.whole = keep is None
        self.kept = np.isin(np.arange(count), order[:keep])
        self.position = np.argsort(order) if mixed else np.arange(count)
        self.device = device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64
        self.statistics = {}  # "" or "spatial_" → fid.Statistics
        self.score = fid.InceptionScore()
        self.features = {}  # number of a batch's first image → pool features of those kept
        self.spatial = {}  # the same → spatial features, where all are kept
        self.predicted = {}  # the same → classes (B,)

    def add(self, numbers: np.ndarray, pool, spatial, logits):
        """Take in the features of images `numbers`, which are consecutive."""
        first = int(numbers[0])
        self._add_moments("", pool)
        if spatial is not None:
            self._add_moments("spatial_", spatial)
            if self.whole:
                self.spatial[first] = spatial.cpu()
        if logits is not None:
            self.score.add(logits, self.position[numbers])
            self.predicted[first] = logits.argmax(1).cpu()
        self.features[first] = pool[torch.from_numpy(self.kept[numbers])].cpu()

    def _add_moments(self, name, rows):
        if name not in self.statistics:
            self.statistics[name] = fid.Statistics(rows.shape[1], self.device)
        with foreseen():
            self.statistics[name].add(rows)

    def merge(self, other: "Collector"):
        """Take in what another process collected, if anything; this one has."""
        for name, theirs in other.statistics.items():
            self.statistics[name].merge(theirs)
        self.score.merge(other.score)
        self.features |= other.features
        self.spatial |= other.spatial
        self.predicted |= other.predicted

    def to_cpu(self) -> "Collector":
        for statistics in self.statistics.values():
            statistics.to("cpu")
        return self

    def measured(self, **record) -> Measured:
        """What all images come to; `record`: the other fields of `Measured`."""
        moments = {}
        with foreseen():
            for name, statistics in self.statistics.items():
                moments[f"{name}mean"] = statistics.mean.cpu()
                moments[f"{name}covariance"] = statistics.covariance.cpu()
        scored = {}
        if self.predicted:
            in_order = _joined(self.predicted)[np.argsort(self.position)]
            scored = {
                "score": self.score.value,
                "scores": self.score.scores,
                "sortedness": _sortedness(in_order),
            }
        return Measured(
            count=self.count,
            features=_joined(self.features),
            spatial=_joined(self.spatial) if self.spatial else None,
            **moments,
            **scored,
            **record,
        )


def _joined(parts):
    """Tensors by the number of their first image, as one."""
    return torch.cat([parts[first] for first in sorted(parts)])


def _sortedness(classes):
    """(p − q) / (1 − q), where p is the share of neighbours of one class and q that among any two
    images."""
    share = torch.bincount(classes).double() / len(classes)
    by_chance = float((share**2).sum())
    if by_chance == 1:
        return 0.0
    neighbours = float((classes[1:] == classes[:-1]).double().mean())
    return (neighbours - by_chance) / (1 - by_chance)


def _collect(collector, items, bar, record):
    """Feed this process's `items` (numbers, features), join with the others'; `Measured` on rank 0,
    else None. `bar` counts batches as if every process had one of that size."""
    with bar:
        for numbers, features in items:
            collector.add(numbers, *features)
            bar.update(min(len(numbers) * parallel.world_size(), bar.total - bar.n))
    if parallel.world_size() > 1:
        collector.to_cpu()
    found = parallel.collect(collector)
    if not found:
        return None
    for other in found[1:]:
        collector.merge(other)
    return collector.measured(**record)


def _bar(total, what, quiet):
    silent = quiet or not parallel.is_main()
    return tqdm(total=total, desc=what, unit="img", disable=True if silent else None)


# ---------------------------------------------------------------------------------------- the cache


def _place(key):
    """Where in the cache the `Measured` of this key (a list that JSON can hold) belongs."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return downloads.cache() / "features" / f"{digest[:32]}.safetensors"


def _find(path, source, keep=None):
    """Whether the cache holds a whole `Measured` at `path`; and that, as of `source`, on rank 0,
    else None."""
    found = None
    if path.is_file() and parallel.is_main():
        with contextlib.suppress(UserError):  # a damaged one is replaced
            found = dataclasses.replace(Measured.load(path), source=source)
    if found and keep is None and found.spatial_mean is not None and found.spatial is None:
        found = None  # of dimr 0.2, which kept no spatial features
    return parallel.broadcast(found is not None), found


def _keep(found, path):
    """Write what was `found`, if anything, to the cache. What can't be written costs no result."""
    if not found:
        return
    try:
        found.save(path)
    except OSError as error:
        tqdm.write(
            f"WARNING: {path} NOT written ({error.strerror}); the next call measures again",
            file=sys.stderr,
        )


# --------------------------------------------------------------------------------- images on a disk


SIDE_BYTES = 3 * 4 * fid.SIDE**2  # of an image as the Inception network takes it


def check_batch(count, size, extractor):
    """Raise UserError if so many images of `size` pixels at once can't fit into memory."""
    each = 3 * size**2 + (SIDE_BYTES if extractor.cached else 0)
    parallel.check_memory(
        count * each,
        f"measuring {count:,} images at once",
        "give a smaller --batch-size",
        extractor.device,
    )


def measure(
    images: imagesets.ImageSet,
    extractor: Extractor,
    keep: int | None = None,
    *,
    batch_size: int | None = None,
    quiet: bool = False,
) -> Measured | None:
    """`Measured` of an image set (imagesets) on rank 0, else None: each process extracts its share.
    The features of `keep` images are kept (None: all). Cached by content. Raises UserError."""
    digest = parallel.broadcast(images.digest if parallel.is_main() else None)
    size = batch_size or BATCH_SIZE[extractor.device.type]
    check_batch(min(size, len(images)), images.size, extractor)
    record = {
        "source": str(images.path),
        "sha256": digest,
        "size": images.size,
        "extractor": extractor.name,
        "identity": extractor.identity,
    }
    if keep is None and images.labels is not None:
        record["labels"] = torch.as_tensor(images.labels)
    if keep is None:
        record["drawn"] = imagesets.drawn_of(images)

    path = _place(["images", FORMAT, digest, images.size, keep, extractor.identity])
    if extractor.cached:
        there, found = _find(path, record["source"], keep)
        if there:
            return found
    collector = Collector(len(images), extractor.device, keep, mixed=not images.ordered)
    bar = _bar(len(images), "features", quiet)
    found = _collect(collector, _features_of(images, extractor, size), bar, record)
    if extractor.cached:
        _keep(found, path)
    return found


def _features_of(images, extractor, size):
    """Yield (numbers, features) of this process's share of the images, which is one stretch."""
    starts = np.arange(0, len(images), size)
    mine = np.array_split(starts, parallel.world_size())[parallel.rank()]
    stretches = [np.arange(first, min(first + size, len(images))) for first in mine]
    batches = dataset.loader(
        images,
        ((stretch, None) for stretch in stretches),
        imagesets.workers(images, size),
        pin=extractor.device.type == "cuda",
    )
    for stretch, batch in zip(stretches, batches, strict=True):
        yield stretch, extractor(batch[0])


# ------------------------------------------------------------------------ images that are generated


@dataclasses.dataclass(frozen=True)
class Generation:
    """Images that a network is to draw for measuring: image i has seed `seed` + i and the class
    that sampling.choose_classes gives it. None is written."""

    generator: sampling.Generator
    count: int
    settings: sampling.Settings = sampling.Settings()
    batch_size: int | None = None  # of drawing; None: by device
    labels: str = sampling.BALANCED
    seed: int = 0  # of the first image

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.count)

    @cached_property
    def classes(self) -> list[int]:
        return sampling.choose_classes(self.labels, self.seeds, self.generator.config)

    def resolved(self) -> "Generation":
        """With every default filled in. Raises UserError for settings that can't work."""
        size = self.batch_size or sampling.BATCH_SIZE[self.generator.device.type]
        sampling.check_batch(min(self.count, size), self.generator.config, self.generator.device)
        return dataclasses.replace(
            self,
            settings=self.generator.resolved(self.settings),
            batch_size=min(self.count, size),
        )

    @property
    def batches(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def numbers(self, k: int) -> np.ndarray:
        """Of the images in batch k."""
        return np.arange(k * self.batch_size, min((k + 1) * self.batch_size, self.count))

    @property
    def key(self) -> str:
        """What says which images they are."""
        plan = sampling.describe(self.generator, self.settings)
        del plan["source"], plan["torch"]
        key = [self.count, self.batch_size, plan]
        if self.labels != sampling.BALANCED or self.seed:
            key.append(self.drawn)
        return json.dumps(key)

    @property
    def drawn(self) -> str:
        """Digest of classes and seeds."""
        return imagesets.digest_of(self.classes, self.seeds)

    @property
    def source(self) -> str:
        """Where they come from, for people."""
        how = self.settings
        guide = ""
        if self.generator.guide is not None:
            guide = f", guide {self.generator.guide.source} {how.guide_scale:g}"
        words = sampling.guidance_words(dataclasses.asdict(how))
        return f"{self.generator.source}, {words}{guide}, {how.solver}, {how.steps} NFE"

    def features(self, extractor: Extractor, chosen: Iterable[int], progress=None) -> Iterator:
        """Yield (numbers, features) for each of the `chosen` batches."""
        drawn = self.generator.batches(
            self.classes, self.seeds, self.settings, self.batch_size, chosen, progress
        )
        for numbers, images in drawn:
            colour = torch.from_numpy(images).expand(-1, -1, -1, 3)
            yield np.asarray(numbers), extractor(colour)


def generate(
    generation: Generation, extractor: Extractor, *, resumable: bool = True, quiet: bool = False
) -> Measured | None:
    """`Measured` of images that are drawn for it, on rank 0, else None. Raises UserError.

    `resumable` notes each batch's features in the cache folder until all are there, so an
    interrupted call goes on, on any number of processes, and ends with the same numbers to the last
    bit."""
    generation = generation.resolved()
    record = {
        "source": generation.source,
        "sha256": hashlib.sha256(generation.key.encode()).hexdigest(),
        "size": generation.generator.pixels,
        "extractor": extractor.name,
        "identity": extractor.identity,
        "labels": torch.as_tensor(generation.classes),
        "drawn": generation.drawn,
    }
    collector = Collector(generation.count, extractor.device)
    if not (resumable and extractor.cached):
        _, mine = parallel.divide(generation.batches, set)
        bar = _bar(generation.count, "generating", quiet)
        return _collect(collector, generation.features(extractor, mine), bar, record)

    path = _place(["generated", FORMAT, generation.key, extractor.identity])
    notes = Notes(path.with_suffix(".partial"), generation)
    there, found = _find(path, record["source"])
    if there:
        notes.discard()
        return found
    with contextlib.ExitStack() as stack:
        if parallel.is_main():
            stack.enter_context(storage.locked(notes.folder))
            notes.check_room()
        _note_features(notes, generation, extractor, quiet)
        if parallel.is_main():
            for numbers, features in notes.read(extractor.device, quiet):
                collector.add(numbers, *features)
            found = collector.measured(**record)
            _keep(found, path)
            notes.discard()
    return found


def _note_features(notes, generation, extractor, quiet):
    """Draw what is not noted yet, on all processes."""
    _, mine = parallel.divide(generation.batches, notes.done)
    total = min(len(mine) * generation.batch_size, generation.count)
    with sampling.sampling_bar(total, quiet, "generating") as bar:
        for numbers, features in generation.features(extractor, mine, bar):
            notes.add(numbers, features)
    parallel.barrier()


class Notes:
    """The features of each batch of a `Generation`, a file each, in a folder of the cache."""

    def __init__(self, folder: Path, generation: Generation):
        self.folder = folder
        self.generation = generation

    def path(self, k: int) -> Path:
        return self.folder / f"{k:06d}.safetensors"

    def done(self) -> set[int]:
        """The batches noted, whole."""
        there = (k for k in range(self.generation.batches) if self.path(k).is_file())
        return {k for k in there if self._is_whole(k)}

    def _is_whole(self, k):
        """Whether batch k's note is a whole file with features of that many images. The content is
        compared with its hash where it is read."""
        try:
            with storage.open_tensors(self.path(k)) as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except UserError:
            return False
        counts = [shape[:1] for shape in shapes.values()]
        return "pool" in shapes and all(c == [len(self.generation.numbers(k))] for c in counts)

    def check_room(self):
        """Raise UserError if what is missing does not fit."""
        noted = len(self.done()) * self.generation.batch_size
        count = max(self.generation.count - noted, 0)
        storage.check_room(
            self.folder,
            count * BYTES,
            f"keeping the features of {count:,} images",
            "free some space or set DIMR_HOME",
        )

    def add(self, numbers: np.ndarray, features: Iterable[torch.Tensor]):
        k = int(numbers[0]) // self.generation.batch_size
        tensors = {}
        for name, rows in zip(FEATURES, features, strict=True):
            if rows is not None:
                tensors[name] = rows.cpu()
        save_tensors(self.path(k), tensors, {CONTENT: averaging.digest(tensors)})

    def read(self, device: torch.device, quiet: bool) -> Iterator:
        """Yield (numbers, features) of all batches. Raises UserError if one is not there."""
        batches = range(self.generation.batches)
        for k in tqdm(batches, "statistics", unit="batch", disable=quiet or None, leave=False):
            if not self.path(k).is_file():
                raise UserError(
                    f"{self.path(k)} is missing: all processes must share the cache; set "
                    "DIMR_HOME to a folder that they can reach"
                )
            found, texts = load_tensors(self.path(k))
            if CONTENT in texts and averaging.digest(found) != texts[CONTENT]:
                self.path(k).unlink()
                raise UserError(
                    f"{self.path(k)} is damaged and has been deleted; run the same again, which "
                    "draws its images anew and no others"
                )
            rows = [found.get(name) for name in FEATURES]
            yield (
                self.generation.numbers(k),
                [part if part is None else part.to(device) for part in rows],
            )

    def discard(self):
        if parallel.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
