"""Evaluation as ADM's suite does it (paper, Sec. 5.1): images, or a network that draws them,
against a reference.

Features come from one pass over the images and are cached by content: what was measured once is not
measured again. The images may be spread over processes by torchrun, and a generation that was
interrupted goes on where it stopped."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import dataset
import fid
import imagenet_names
import imagesets
import parallel
import runs
import sampling
import weights
from storage import VERSION, UserError, load_tensors, read_json, save_tensors, sha256

STANDARD = "Inception of 2015"
FORMAT = 1  # of what is cached
FEATURES = ("pool", "spatial", "logits")  # what an extractor gives
BYTES = 4 * (fid.POOL + fid.SPATIAL + fid.LOGITS)  # of them, per image
REFERENCE_IMAGES = (
    10_000  # whose features are kept for precision, recall and KID, as in ADM's references
)
COUNT = 50_000  # images that a published FID is made of
ORDER_SEED = (
    0  # permutes a folder's images over the Inception Score's splits, and picks the reference's
)
BATCH_SIZE = {"cuda": 128, "mps": 32, "cpu": 16}

METRICS = {
    "fid": ["fid"],
    "sfid": ["sfid"],
    "is": ["inception_score"],
    "pr": ["precision", "recall", "density", "coverage"],
    "kid": ["kid", "kid_deviation"],
}
METRICS["all"] = [key for keys in METRICS.values() for key in keys]
NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "kid": "KID",
    "kid_deviation": "KID (sd)",
}

# Published results by variant: (what, {metric: value}). Tables 5 to 7 of the paper, and the
# release's page for g2r.
PAPER = {
    "m3r": [
        ("no guidance", {"fid": 3.65, "inception_score": 42.41, "precision": 0.74, "recall": 0.59})
    ],
    "l3r": [
        ("no guidance", {"fid": 2.21, "inception_score": 55.73, "precision": 0.75, "recall": 0.60})
    ],
    "xl2r": [
        (
            "400 epochs, guidance",
            {"fid": 1.77, "inception_score": 285.7, "precision": 0.79, "recall": 0.62},
        ),
        (
            "800 epochs, guidance",
            {"fid": 1.70, "inception_score": 289.0, "precision": 0.79, "recall": 0.63},
        ),
        ("400 epochs, none", {"fid": 4.87}),
        ("800 epochs, none", {"fid": 4.50}),
    ],
    "xl3r": [
        (
            "400 epochs, guidance",
            {"fid": 3.23, "inception_score": 285.1, "precision": 0.82, "recall": 0.54},
        ),
        (
            "800 epochs, guidance",
            {"fid": 2.89, "inception_score": 289.8, "precision": 0.83, "recall": 0.55},
        ),
        ("400 epochs, none", {"fid": 8.56}),
        ("800 epochs, none", {"fid": 7.93}),
    ],
    "g2r": [("800 epochs", {"fid": 1.63})],
}


@contextlib.contextmanager
def _foreseen():
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
    path = weights.find(source)
    digest, device = sha256(path), torch.device(device)
    name = (
        STANDARD
        if digest == weights.ASSETS["inception"].sha256
        else f"Inception with OTHER weights ({digest[:8]})"
    )
    with _foreseen():
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
        order = dataset.Order(count, ORDER_SEED).permutation(0)
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
                with _foreseen():
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
        with _foreseen():
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
        weights.cache()
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
                stack.enter_context(runs.locked(work))
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


# --------------------------------------------------------------------------------------- references


def reference(
    source, res=None, exif=False, *, extractor, with_features=False, batch_size=None, quiet=False
):
    """The `Measured` that `source` stands for on rank 0, else None: ADM's `.npz` (by name or path),
    a file that `dimr eval stats` wrote, or images. `with_features`: whether pool features are
    needed too. Raises UserError."""
    path = weights.find(str(source))
    if path.suffix == ".safetensors":
        found = Measured.load(path)
        if found.identity != extractor.identity:
            raise UserError(
                f"{source} was made with {found.extractor}, not with {extractor.name}; "
                "make it anew with "
                "dimr eval stats"
            )
        return found if parallel.is_main() else None
    names = imagesets.names(path) if path.suffix == ".npz" else set()
    if {"mu", "sigma"} <= names:
        return _adm(path, names, extractor, with_features, batch_size, quiet)
    return measure(
        imagesets.open_set(path, res, exif), extractor, REFERENCE_IMAGES, batch_size, quiet
    )


def _adm(path, names, extractor, with_features, batch_size, quiet):
    """A reference under ADM's names: mu and sigma, perhaps mu_s and sigma_s, perhaps images."""
    if not extractor.standard:
        raise UserError(
            f"{path} holds statistics of the {STANDARD}, not of {extractor.name}; give "
            "images as --ref"
        )
    images = imagesets.Npz(path) if "arr_0" in names else None
    measured = (
        measure(images, extractor, REFERENCE_IMAGES, batch_size, quiet)
        if images and with_features
        else None
    )
    if not parallel.is_main():
        return None
    moments = ["mu", "sigma", *(["mu_s", "sigma_s"] if {"mu_s", "sigma_s"} <= names else [])]
    with _foreseen():
        moments = [
            torch.from_numpy(imagesets.read_array(path, name).astype(np.float64))
            for name in moments
        ]
    return Measured(
        str(path),
        sha256(path),
        images and images.size,
        None,
        extractor.name,
        extractor.identity,
        *moments,
        features=measured and measured.features,
    )


def class_names(path):
    """The names that a weights file of ours carries, else []."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("classes", "[]"))
    return []


def fitting_reference(run, num_classes, classes, size):
    """(REF, res, exif) for images of `size` pixels from a network of run folder `run` (or None):
    ADM's name if it knows ImageNet's 1000 classes, by number alone or by identifier, else the
    images that the run was trained on. Raises UserError."""
    of_imagenet = num_classes == 1000 and list(classes) in (
        [],
        [wnid for wnid, _ in imagenet_names.CLASSES],
    )
    if of_imagenet and f"imagenet{size}" in weights.ASSETS:
        return f"imagenet{size}", None, False
    record = read_json(Path(run) / "config.json").get("data", {}) if run else {}
    if record.get("kind") == "pixels" and Path(record["path"]).exists():
        return record["path"], size, record["exif"]
    if record.get("kind") == "latents" and (Path(record["path"]) / "index.json").is_file():
        index = dataset.read_index(record["path"])
        for folder in filter(
            None, (os.environ.get("DIMR_DATA"), "data/imagenet/train", "data/imagenet")
        ):
            if Path(folder).is_dir():
                images = dataset.ImageFolder(folder, size, 3)
                if images.fingerprint == index["source"]["fingerprint"]:
                    return folder, size, index["options"]["exif"]
    raise UserError(
        "nothing says what to compare with; give --ref: the training images (with "
        "--res), a file that dimr "
        "eval stats wrote from them, ADM's .npz, or imagenet64, imagenet256, imagenet512"
    )


# --------------------------------------------------------------------------------------- the report


def newest_balanced(root=sampling.ROOT):
    """The `.npz` under `root` that `sample --balanced` wrote last, or None."""
    found = [
        path for path in Path(root).rglob("*.npz") if imagesets.read_sidecar(path).get("balanced")
    ]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def check_fair(images):
    """Raise UserError if the images show but one of the classes that their network knows: no fair
    set."""
    known, weights_file = images.about.get("num_classes", 1), images.about.get("source")
    if known > 1 and images.labels is not None and len(np.unique(images.labels)) == 1:
        found = f"{len(images):,} images of class {images.labels[0]} alone"
        raise UserError(
            f"{images.path} holds {found}, and the reference has {known:,} classes; make "
            "a fair set: "
            f"dimr sample --balanced -n {COUNT} --weights {weights_file}"
        )


def check_held(keys, reference):
    """Raise UserError if the reference lacks what one of the metrics needs."""
    if "sfid" in keys and reference.spatial_mean is None:
        raise UserError(
            f"{reference.source} holds no mu_s and sigma_s, which sfid needs; give ADM's "
            ".npz or images"
        )
    if keys & {"kid", "precision"} and reference.features is None:
        raise UserError(
            f"{reference.source} holds statistics alone, enough for fid and sfid; "
            "precision, recall and "
            "kid need ADM's .npz, a file that dimr eval stats wrote, or images as --ref"
        )


def compare(metrics, samples, against):
    """{key: value} of METRICS[metrics] for `samples` against the reference `against`, two
    `Measured`. The latter is None where only the Inception Score is asked for."""
    keys, result = METRICS[metrics], {}
    with _foreseen():
        if "fid" in keys:
            result["fid"] = fid.frechet_distance(
                samples.mean, samples.covariance, against.mean, against.covariance
            )
        if "sfid" in keys:
            spatial = ((one.spatial_mean, one.spatial_covariance) for one in (samples, against))
            result["sfid"] = fid.frechet_distance(*itertools.chain(*spatial))
        if "inception_score" in keys:
            result["inception_score"] = samples.score
        if "kid" in keys or "precision" in keys:
            device = parallel.pick_device() if torch.cuda.is_available() else torch.device("cpu")
            real, fake = against.features.to(device), samples.features.to(device)
            if "precision" in keys:
                bar = functools.partial(tqdm, desc="neighbours", leave=False, disable=None)
                result |= fid.manifold_metrics(real, fake, progress=bar)
            if "kid" in keys:
                result["kid"], result["kid_deviation"] = fid.kernel_distance(fake, real)
    return {key: result[key] for key in keys}


def remarks(metrics, samples, against):
    """What a reader of the numbers should know, a line each."""
    keys, lines = METRICS[metrics], []
    if "OTHER" in samples.extractor:
        lines.append(f"{samples.extractor}: these numbers compare with nothing published")
    for what, one in (("samples", samples), ("reference images", against)):
        if one and one.count and one.count < len(one.mean) and keys != ["inception_score"]:
            lines.append(
                f"{one.count:,} {what} are fewer than the {len(one.mean):,} features: "
                "distances are biased upwards"
            )
    if samples.count != COUNT:
        lines.append(f"published numbers are of {COUNT:,} samples, these of {samples.count:,}")
    if against and against.size and samples.size and against.size != samples.size:
        lines.append(
            f"samples are {samples.size}×{samples.size}, reference images "
            f"{against.size}×{against.size}"
        )
    if "inception_score" in keys and (samples.sortedness or 0) > 0.3:
        lines.append(
            "the samples seem to be sorted by class: splits of 5,000 then hold few "
            "classes each, and this "
            "Inception Score compares with none; shuffle them"
        )
    return lines


def evaluate(
    metrics,
    samples,
    extractor,
    ref=None,
    res=None,
    batch_size=None,
    generator=None,
    count=COUNT,
    settings=None,
    quiet=False,
):
    """Measure the image set `samples` (imagesets), or what `generator` draws, as METRICS[metrics]
    says, against `ref` (None: the one that fits). Returns a dict for programs on rank 0, else None.
    Raises UserError."""
    keys = set(METRICS[metrics])
    if not extractor.cached and keys & {"sfid", "inception_score"}:
        raise UserError(
            f"{extractor.name} are no Inception's: sfid, is and all need its spatial "
            "features and logits; "
            "leave out --features, or ask for fid, pr or kid"
        )
    if samples:
        check_fair(samples)
        source, known, size = (
            samples.about.get("source"),
            samples.about.get("num_classes"),
            samples.size,
        )
    else:
        source, known, size = generator.source, generator.config.num_classes, generator.pixels
    exif, against = False, None
    if metrics != "is":
        if ref is None:
            run, classes = (runs.run_of(source), class_names(source)) if source else (None, [])
            ref, res, exif = fitting_reference(run, known, classes, size)
        with_features = bool(keys & {"kid", "precision"})
        against = reference(
            ref, res, exif, extractor=extractor, with_features=with_features, quiet=quiet
        )
        if against:
            check_held(keys, against)
    if samples:
        found = measure(samples, extractor, None, batch_size, quiet)
    else:
        found = generate(generator, count, settings, extractor, batch_size, quiet=quiet)
    if not parallel.is_main():
        return None
    return {
        **compare(metrics, found, against),
        "label": label(found),
        "samples": describe(found),
        "reference": describe(against),
        "features": found.extractor,
        "identity": found.identity,
        "remarks": remarks(metrics, found, against),
        "version": VERSION,
    }


def watch(run, config, classes, extractor, count, ref=None):
    """A function from a sampling.Generator to the FID of `count` unguided images, for a training
    run in folder `run` that keeps an eye on it: {"fid": …, "fid_images": count} on rank 0, {} on
    the others. Raises UserError."""
    res, exif = None, False
    if ref is None:  # rank 0 alone knows that the run folder is written
        size = config.size * (1 if config.space == "pixel" else 8)
        fitting = (
            fitting_reference(run, config.num_classes, classes, size)
            if parallel.is_main()
            else None
        )
        ref, res, exif = parallel.broadcast(fitting)
    against = reference(ref, res, exif, extractor=extractor)

    def measure_fid(generator):
        found = generate(
            generator, count, sampling.Settings(cfg=1.0), extractor, resumable=False, quiet=True
        )
        return (
            {"fid": round(compare("fid", found, against)["fid"], 4), "fid_images": count}
            if found
            else {}
        )

    return measure_fid


def describe(one):
    """Where a `Measured` came from, for programs."""
    return one and {
        "source": one.source,
        "count": one.count,
        "size": one.size,
        "sha256": one.sha256,
    }


def label(samples):
    """What FID and sFID are marked with: 50K, 10K, or the very number of images, and the extractor
    if it is another."""
    count = f"{samples.count // 1000}K" if samples.count % 1000 == 0 else f"{samples.count}"
    return count if samples.extractor == STANDARD else f"{count}, {samples.extractor}"


def table(result, variant=None):
    """The result for people, beside the paper's numbers for `variant`."""
    lines = []
    names = {key: NAMES.get(key, key) for key in METRICS["all"] if key in result}
    names |= {key: f"{names[key]}-{result['label']}" for key in ("fid", "sfid") if key in result}
    for key, name in names.items():
        published = [
            f"{values[key]:.2f} ({what})"
            for what, values in PAPER.get(variant, [])
            if key in values
        ]
        lines.append(
            f"{name:{max(map(len, names.values()))}} "
            f"{result[key]:12.{5 if key.startswith('kid') else 4}f}"
            + (f"   paper, {variant}: {', '.join(published)}" if published else "")
        )
    for what in ("samples", "reference"):
        if one := result[what]:
            lines.append(
                f"{what}: {one['source']}" + (f", {one['count']:,} images" if one["count"] else "")
            )
    return "\n".join([*lines, *(f"note: {line}" for line in result["remarks"])])
