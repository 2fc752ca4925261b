"""Evaluation as ADM's suite does it (paper, Sec. 5.1): images, or a network that draws them,
against a reference."""

import ours

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import containers
import dataset
import downloads
import errors
import extraction
import fid
import imagenet_names
import imagesets
import networks
import parallel
import runfolder
import sampling
import shards
import space
from errors import Estimate
from extraction import Extractor, Generation, Measured
from storage import VERSION, UserError, sha256

Samples = imagesets.ImageSet | Generation  # what is measured

# whose features are kept for precision, recall and KID, as in ADM's references
REFERENCE_IMAGES = 10_000
COUNT = 50_000  # images that a published FID is made of
INCEPTION, DINOV2 = extraction.KINDS  # of the features that metrics are made of


# ------------------------------------------------------------------------------------------ metrics


@dataclasses.dataclass(frozen=True)
class Metric:
    """What `dimr eval NAME` measures; a row of METRICS is all there is to it.

    `needs` names what `compute(samples, reference)` reads of the two `Measured`: "reference" (if it
    is to have one at all), "features" (pool features image by image), "spatial" and "logits" (what
    Inception alone gives). `values` are the names for people of the numbers it returns, by their
    keys in the result: an errors.Estimate each, or a float that has no error. With errors go by
    `samples.owners`, the blocks; where that is None, there are none."""

    help: str  # a literal, for the command line reads it without importing this module
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    needs: Sequence[str] = ()
    compute: Callable[[Measured, Measured | None], Iterable[Estimate | float]] | None = None
    digits: int = 4
    rising: bool = False  # whether more of its first number is better
    counted: bool = False  # whether its first name tells the number of images, as FID-50K
    extractor: str = INCEPTION


def bar(what: str) -> Callable:
    """Shows how far a loop is, and goes when it ends."""
    return functools.partial(tqdm, desc=what, leave=False, disable=None)


def frechet(samples: Measured, reference: Measured) -> list[Estimate]:
    """FID, and what it would be of endlessly many images."""
    to = fid.Frechet(reference.mean, reference.covariance)
    return _with_its_limit(to, samples.mean, samples.covariance, samples.features, samples.owners)


def spatial_frechet(samples: Measured, reference: Measured) -> list[Estimate]:
    """sFID, and the same."""
    to = fid.Frechet(reference.spatial_mean, reference.spatial_covariance)
    moments = samples.spatial_mean, samples.spatial_covariance
    return _with_its_limit(to, *moments, samples.spatial, samples.owners)


def _with_its_limit(to, mean, covariance, features, owners):
    value = to.distance(mean, covariance)
    if owners is None or features is None:
        return [Estimate(value), Estimate(value=None)]
    counts = len(owners) - np.bincount(owners)
    without = errors.moments_without(features, owners)
    left_out = []
    with bar("errors")(total=len(counts)) as progress:
        for count, moments in zip(counts.tolist(), without, strict=True):
            left_out.append(to.distance(*moments, count))
            progress.update()
    found = errors.jackknife(value, left_out)
    return [found, errors.freed(found)]


def inception_score(samples: Measured, reference: Measured | None) -> list[Estimate]:
    """The score is taken while the features are; its splits tell its error."""
    return [Estimate(samples.score, samples.scores or ())]


def nearness(samples: Measured, reference: Measured) -> list[Estimate]:
    """Precision, recall, density, coverage."""
    found = fid.manifold(
        reference.features,
        samples.features,
        owners=samples.owners,
        half=samples.half,
        progress=bar("neighbours"),
    )
    values = found.values()
    if samples.owners is None:
        return [Estimate(value) for value in values.values()]
    without = found.without()
    return [errors.jackknife(values[key], without[key]) for key in values]


def kernel(samples: Measured, reference: Measured) -> list[Estimate]:
    """KID and its standard deviation over subsets. Its error is that of the unbiased estimates over
    whole blocks, and of the choice of the subsets."""
    value, deviation = fid.kernel_distance(samples.features, reference.features)
    owners = samples.owners
    if owners is None or np.bincount(owners).min() < 2:
        return [Estimate(value), Estimate(deviation)]
    parts = fid.kernel_estimates(samples.features, reference.features, owners)
    noise = deviation**2 / fid.SUBSETS
    return [Estimate(value, parts, noise), Estimate(deviation)]


METRICS = {
    "fid": Metric(
        "Fréchet Inception distance.",
        {"fid": "FID", "fid_infinity": "FID without bias"},
        needs=["reference"],
        compute=frechet,
        counted=True,
    ),
    "sfid": Metric(
        "Fréchet distance of spatial features, sensitive to structure.",
        {"sfid": "sFID", "sfid_infinity": "sFID without bias"},
        needs=["reference", "spatial"],
        compute=spatial_frechet,
        counted=True,
    ),
    "is": Metric(
        "Inception Score: mean over splits of 5,000 in the order given (a folder's is permuted by "
        "a fixed seed). Needs no reference.",
        {"inception_score": "Inception Score"},
        rising=True,
        needs=["logits"],
        compute=inception_score,
    ),
    "pr": Metric(
        "Precision and recall (3 neighbours), density and coverage (5).",
        {
            "precision": "precision",
            "recall": "recall",
            "density": "density",
            "coverage": "coverage",
        },
        rising=True,
        needs=["reference", "features"],
        compute=nearness,
    ),
    "kid": Metric(
        "Kernel Inception distance, mean over 100 subsets of 1,000.",
        {"kid": "KID", "kid_deviation": "KID (sd)"},
        needs=["reference", "features"],
        compute=kernel,
        digits=5,
    ),
    "fdd": Metric(
        "FD-DINOv2: Fréchet distance of DINOv2's features (arXiv:2306.04675).",
        {"fdd": "FD-DINOv2", "fdd_infinity": "FD-DINOv2 without bias"},
        needs=["reference"],
        compute=frechet,
        digits=3,
        counted=True,
        extractor=DINOV2,
    ),
    "kdd": Metric(
        "Kernel distance of DINOv2's features, mean over 100 subsets of 1,000.",
        {"kdd": "KD-DINOv2", "kdd_deviation": "KD-DINOv2 (sd)"},
        needs=["reference", "features"],
        compute=kernel,
        digits=5,
        extractor=DINOV2,
    ),
    "all": Metric(
        "All metrics from one pass over the images; those of DINOv2 where its weights are there."
    ),
}


def rows(metrics: str, kind: str = INCEPTION) -> list[Metric]:
    """What METRICS[metrics] comes to: itself, or for "all" every other row of features of that
    kind."""
    if metrics == "all":
        return [row for name, row in METRICS.items() if name != "all" and row.extractor == kind]
    return [METRICS[metrics]]


def kinds(metrics: str) -> list[str]:
    """Of features that METRICS[metrics] takes: that of its row, for "all" every kind."""
    if metrics == "all":
        return list(extraction.KINDS)
    return [METRICS[metrics].extractor]


def keys(metrics: str, kind: str = INCEPTION) -> list[str]:
    """Of what `estimates` finds."""
    return [key for row in rows(metrics, kind) for key in row.values]


def names() -> dict[str, str]:
    """Key → name for people, of every number."""
    found = {}
    for row in METRICS.values():
        found |= row.values
    return found


def needed(metrics: str, kind: str = INCEPTION) -> set[str]:
    """What METRICS[metrics] needs (see Metric)."""
    return {need for row in rows(metrics, kind) for need in row.needs}


def needing(*what: str, kind: str = INCEPTION) -> list[str]:
    """The names in METRICS of those on features of that kind that need any of these."""
    of_kind = [name for name, row in METRICS.items() if name == "all" or row.extractor == kind]
    return [name for name in of_kind if needed(name, kind) & set(what)]


def in_words(names: Sequence[str], word: str = "and") -> str:
    """a; a and b; a, b and c."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


# Published results by variant: (what, {metric: value}). Tables 1, 2 and 5 to 7 of the paper, and
# the release's page for g2r.
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
    "uvit-m4": [
        ("no guidance", {"fid": 5.85, "inception_score": 33.71, "precision": 0.69, "recall": 0.61})
    ],
    "uvit-l4": [
        ("no guidance", {"fid": 4.26, "inception_score": 40.66, "precision": 0.71, "recall": 0.62})
    ],
    "uvit-l2": [
        ("guidance", {"fid": 3.40, "inception_score": 219.9, "precision": 0.83, "recall": 0.52})
    ],
    "uvit-h2": [
        ("guidance", {"fid": 2.29, "inception_score": 263.9, "precision": 0.82, "recall": 0.57}),
        ("none", {"fid": 6.58}),
    ],
    "uvit-l4-512": [
        ("guidance", {"fid": 4.67, "inception_score": 213.3, "precision": 0.87, "recall": 0.45})
    ],
    "uvit-h4": [
        ("guidance", {"fid": 4.05, "inception_score": 263.8, "precision": 0.84, "recall": 0.48}),
        ("none", {"fid": 15.70}),
    ],
    "dit-xl2": [
        ("guidance", {"fid": 2.27, "inception_score": 278.2, "precision": 0.83, "recall": 0.57}),
        ("none", {"fid": 9.62}),
    ],
    "dit-xl2-512": [
        ("guidance", {"fid": 3.04, "inception_score": 240.8, "precision": 0.84, "recall": 0.54}),
        ("none", {"fid": 12.03}),
    ],
    "sit-xl2": [
        ("guidance", {"fid": 2.06, "inception_score": 270.3, "precision": 0.82, "recall": 0.59})
    ],
    "table2-1": [("Table 2", {"fid": 5.85})],
    "table2-2": [("Table 2", {"fid": 5.44})],
    "table2-3": [("Table 2", {"fid": 7.91})],
    "table2-4": [("Table 2", {"fid": 5.21})],
    "table2-5": [("Table 2", {"fid": 4.86})],
    "table2-6": [("Table 2", {"fid": 3.65})],
}


# --------------------------------------------------------------------------------------- references


@dataclasses.dataclass(frozen=True)
class Reference:
    """What to compare with: ADM's `.npz` (by name or path), a file that `dimr eval stats` wrote, or
    images, of which those of a folder are cropped to `res` and turned as EXIF says if `exif`, and
    only `classes` are taken unless None."""

    source: str | Path
    res: int | None = None
    exif: bool = False
    classes: Sequence[str] | None = None
    verify: bool = False  # a shard set's hashes


def reference(
    of: Reference,
    extractor: Extractor,
    *,
    with_features: bool = False,
    batch_size: int | None = None,
    quiet: bool = False,
) -> Measured | None:
    """The `Measured` that a Reference stands for on rank 0, else None. `with_features`: whether
    pool features are needed too. Raises UserError."""

    def measured(images):
        return extraction.measure(
            images, extractor, REFERENCE_IMAGES, batch_size=batch_size, quiet=quiet
        )

    path = Path(of.source)
    if not containers.is_container(path):
        path = downloads.find(str(of.source))
    if path.suffix == ".safetensors":
        found = Measured.load(path)
        if found.identity != extractor.identity:
            raise UserError(
                f"{of.source} was made with {found.extractor}, not with {extractor.name}; "
                "make it anew with dimr eval stats"
            )
        return found if parallel.is_main() else None
    names = imagesets.names(path) if path.suffix == ".npz" else set()
    if not {"mu", "sigma"} <= names:
        return measured(imagesets.open_set(path, of.res, of.exif, of.classes, verify=of.verify))
    if not extractor.standard:
        raise UserError(
            f"{path} holds statistics of the {extraction.STANDARD}, not of {extractor.name}; give "
            "images as --ref"
        )
    found = _adm(path, names, extractor) if parallel.is_main() else None
    if "arr_0" in names and with_features:
        images = measured(imagesets.Npz(path))
        if found:
            found.features = images.features
    return found


def _adm(path, names, extractor):
    """What a reference holds under ADM's names: mu and sigma, perhaps mu_s and sigma_s; the size of
    its images, if it has any."""
    moments = {"mean": "mu", "covariance": "sigma"}
    if {"mu_s", "sigma_s"} <= names:
        moments |= {"spatial_mean": "mu_s", "spatial_covariance": "sigma_s"}
    tensors = {}
    with extraction.foreseen():
        for field, name in moments.items():
            array = imagesets.read_array(path, name).astype(np.float64)
            tensors[field] = torch.from_numpy(array)
    return Measured(
        source=str(path),
        sha256=sha256(path),
        size=imagesets.Npz(path).size if "arr_0" in names else None,
        count=None,
        extractor=extractor.name,
        identity=extractor.identity,
        **tensors,
    )


def class_names(path: str | Path) -> list[str]:
    """The names that a weights file of ours carries, else []. An average that was made in memory
    has its run's."""
    run = runfolder.run_of(path)
    if run and not Path(path).exists() and runfolder.checkpoints(run):
        path = runfolder.checkpoints(run)[-1] / "ema.safetensors"
    with contextlib.suppress(OSError, SafetensorError, ValueError), safe_open(path, "pt") as file:
        return runfolder.parsed(file.metadata() or {}).get("classes", [])
    return []


def fitting_reference(
    run: str | Path | None, num_classes: int, classes: Sequence[str], *, size: int
) -> Reference:
    """For images of `size` pixels from a network of run folder `run` (or None): ADM's name if it
    knows ImageNet's 1000 classes, by number alone or by identifier, else the images that the run
    was trained on. Raises UserError."""
    identifiers = [wnid for wnid, _ in imagenet_names.CLASSES]
    of_imagenet = num_classes == 1000 and list(classes) in ([], identifiers)
    if of_imagenet and f"imagenet{size}" in downloads.ASSETS:
        downloads.ask(f"imagenet{size}")
        return Reference(f"imagenet{size}")
    record = runfolder.read_config(run, ()).get("data", {}) if run else {}
    if record.get("kind") == "pixels" and _is_there(record["path"]):
        return Reference(record["path"], size, record.get("exif", False), record.get("only"))
    if record.get("kind") == "latents" and (Path(record["path"]) / "index.json").is_file():
        index = shards.read_index(record["path"])
        for folder in (os.environ.get("DIMR_DATA"), "data/imagenet/train", "data/imagenet"):
            if folder and _is_source(folder, index, size):
                return Reference(folder, size, index["options"].get("exif", False))
    raise UserError(
        "nothing says what to compare with; give --ref: the training images (with --res), a file "
        "that dimr eval stats wrote from them, ADM's .npz, or imagenet64, imagenet256, imagenet512"
    )


def _is_there(path):
    return Path(path).exists() or containers.is_container(path)


def _is_source(folder, index, size):
    """Whether the latents of this index were encoded from the images in `folder`."""
    if not _is_there(folder):
        return False
    images = dataset.Images(folder, size, 3)
    source = index.get("source", {})
    if images.fingerprint != source.get("fingerprint"):
        return False
    return source.get("sample") in (None, images.sample)


# --------------------------------------------------------------------------------------- the report


def newest_fair(root: str | Path = sampling.ROOT) -> Path | None:
    """The `.npz` under `root` that `sample --labels` or `--balanced` wrote last, or None."""
    found = []
    for path in Path(root).rglob("*.npz"):
        with contextlib.suppress(UserError):  # a damaged sidecar
            if imagesets.labels_of(imagesets.read_sidecar(path)):
                found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def check_extractor(metrics: str, extractor: Extractor):
    """Raise UserError if the extractor does not give what the metrics need."""
    lacking = needing("spatial", "logits")
    if extractor.cached or metrics not in lacking:
        return
    served = [
        name for name, row in METRICS.items() if name not in lacking and row.extractor == INCEPTION
    ]
    raise UserError(
        f"{extractor.name} are no Inception's: {in_words(lacking)} need its spatial features and "
        f"logits; leave out --features, or ask for {in_words(served, 'or')}"
    )


def check_fair(images):
    """Raise UserError if the images show but one of the classes that their network knows: no fair
    set."""
    known = images.record.get("num_classes", 1)
    if known > 1 and images.labels is not None and len(np.unique(images.labels)) == 1:
        raise UserError(
            f"{images.path} holds {len(images):,} images of class {images.labels[0]} alone, and "
            f"the reference has {known:,} classes; make a fair set: "
            f"dimr sample --balanced -n {COUNT} --weights {images.record.get('source')}"
        )


def check_held(metrics: str, against: Measured, kind: str = INCEPTION):
    """Raise UserError if the reference lacks what one of the metrics needs."""
    if "spatial" in needed(metrics, kind) and against.spatial_mean is None:
        raise UserError(
            f"{against.source} holds no mu_s and sigma_s, which {in_words(needing('spatial'))} "
            "need; give ADM's .npz or images"
        )
    if "features" in needed(metrics, kind) and against.features is None:
        wanting = needing("features", kind=kind)
        enough = [name for name in needing("reference", kind=kind) if name not in wanting]
        raise UserError(
            f"{against.source} holds statistics alone, enough for {in_words(enough)}; "
            f"{in_words(wanting)} need ADM's .npz with images, a file that dimr eval stats wrote, "
            "or images as --ref"
        )


def estimates(
    metrics: str,
    samples: Measured,
    against: Measured | None,
    device: torch.device | None = None,
    kind: str = INCEPTION,
) -> dict[str, Estimate]:
    """{key: Estimate} of METRICS[metrics] for `samples` against the reference `against`, which is
    None where none is needed. Features are compared on `device`, if that is a GPU. Raises
    UserError."""
    if "features" in needed(metrics, kind):
        samples = _near(samples, device)
        against = _near(against, device)
    result = {}
    with extraction.foreseen():
        for row in rows(metrics, kind):
            for key, found in zip(row.values, row.compute(samples, against), strict=True):
                result[key] = found if isinstance(found, Estimate) else Estimate(found)
    return result


def compare(
    metrics: str,
    samples: Measured,
    against: Measured | None,
    device: torch.device | None = None,
    kind: str = INCEPTION,
) -> dict[str, float | None]:
    """The `estimates` for programs: each key k, and k_error."""
    return flat(estimates(metrics, samples, against, device, kind))


def flat(found: dict[str, Estimate]) -> dict[str, float | None]:
    """{k: value, k_error: its standard error or None, …}."""
    result = {}
    for key, one in found.items():
        result[key] = one.value
        result[f"{key}_error"] = one.error
    return result


def _near(one, device):
    """`one` with its features on `device`, if that is a GPU: others are slower or lack float64."""
    if one is None or device is None or device.type != "cuda":
        return one
    return dataclasses.replace(one, features=one.features.to(device))


def remarks(
    metrics: str, samples: Measured, against: Measured | None, kind: str = INCEPTION
) -> list[str]:
    """What a reader of the numbers should know, a line each."""
    lines = []
    if "OTHER" in samples.extractor:
        lines.append(f"{samples.extractor}: these numbers compare with nothing published")
    if {"fid", "sfid", "fdd"} & set(keys(metrics, kind)):
        lines += _few("samples", samples)
        if against:
            lines += _few("reference images", against)
    if samples.count != COUNT:
        lines.append(f"published numbers are of {COUNT:,} samples, these of {samples.count:,}")
    if samples.count < errors.BLOCKS:
        lines.append(
            f"{samples.count:,} images are fewer than the {errors.BLOCKS} blocks that errors rest "
            "on: none are stated"
        )
    if against and against.size and samples.size and against.size != samples.size:
        lines.append(
            f"samples are {samples.size}×{samples.size}, reference images "
            f"{against.size}×{against.size}"
        )
    if "inception_score" in keys(metrics, kind):
        lines += _about_splits(samples)
    return lines


def _about_splits(samples):
    """What to know of the Inception Score's splits."""
    if (samples.sortedness or 0) > 0.3:
        yield (
            "the samples seem to be sorted by class: splits of 5,000 then hold few "
            "classes each, and this Inception Score compares with none; shuffle them"
        )
    if samples.scores and len(samples.scores) < 2:
        yield "one split of 5,000 or fewer images: the Inception Score has no error"


UNEVEN = 2  # times as many images in the largest class as in the smallest: not balanced


def proportions(samples: Samples, of: Reference) -> list[str]:
    """What to know where every class has as many samples as the others and not as many images in
    the reference, a line; nothing where the reference has no labels."""
    counts = _label_counts(of)
    if not counts or max(counts.values()) < UNEVEN * min(counts.values()):
        return []
    if isinstance(samples, Generation):
        if samples.labels != sampling.BALANCED:
            return []
    elif not _is_balanced(samples):
        return []
    least = min(counts, key=counts.get)
    most = max(counts, key=counts.get)
    return [
        f"the samples show every class alike and the reference from {counts[least]:,} ({least}) to "
        f"{counts[most]:,} ({most}) images a class, which alone makes them differ; a fair set has "
        "the reference's labels: of "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    ]


def _is_balanced(samples):
    return samples.labels is not None and errors.is_balanced(samples.labels)


def _label_counts(of):
    """Class → number of images of a reference that is a folder of images or a shard set, else
    {}."""
    if not Path(of.source).is_dir():
        return {}
    images = imagesets.open_set(of.source, of.res, of.exif)
    if images.labels is None:
        return {}
    names = _names_of(images)
    numbers, counts = np.unique(images.labels, return_counts=True)
    return {names.get(n, str(n)): int(c) for n, c in zip(numbers.tolist(), counts, strict=True)}


def _names_of(images):
    """Label → name, where an image set has names for its classes."""
    if isinstance(images, imagesets.Shards):
        return dict(enumerate(images.shards.classes))
    folders = {name.split("/")[0] for name in images.names if "/" in name}
    return dict(enumerate(sorted(folders)))


def _few(what, one):
    if one.count and one.count < len(one.mean):
        yield (
            f"{one.count:,} {what} are fewer than the {len(one.mean):,} features: "
            "Fréchet distances are biased upwards"
        )


@dataclasses.dataclass(frozen=True)
class How:
    """How sets are measured: against `ref`, whose images are cropped to `res` (None: what fits the
    first set), and if shards compared with their hashes where `verify` says so; with `adm`,
    distances of images are float16 as in ADM's suite."""

    ref: str | Path | None = None
    res: int | None = None
    batch_size: int | None = None
    adm: bool = False
    verify: bool = False
    quiet: bool = False


@dataclasses.dataclass
class Evaluated:
    """A set's numbers: a dict for programs, and what they rest on by key."""

    result: dict
    estimates: dict[str, Estimate]
    drawn: str | None


def evaluate(
    metrics: str, samples: Samples, extractors: Mapping[str, Extractor], how: How = How()
) -> dict | None:
    """Measure `samples`, an image set (imagesets) or a Generation, as METRICS[metrics] says, on
    features by kind (extraction.KINDS). Returns a dict for programs on rank 0, else None. Raises
    UserError."""
    found = evaluate_all(metrics, [samples], extractors, how)
    return found[0].result if found else None


def evaluate_all(
    metrics: str, sets: Sequence, extractors: Mapping[str, Extractor], how: How = How()
) -> list[Evaluated] | None:
    """`evaluate` of several sets against one reference, an `Evaluated` each on rank 0."""
    for samples in sets:
        if not isinstance(samples, Generation):
            check_fair(samples)
    of, against = references(metrics, sets[0], extractors, how)
    found = [evaluated(metrics, samples, extractors, against, how) for samples in sets]
    if not parallel.is_main():
        return None
    for samples, one in zip(sets, found, strict=True):
        if of:
            one.result["remarks"] += proportions(samples, of)
    return found


def references(
    metrics: str, samples: Samples, extractors: Mapping[str, Extractor], how: How
) -> tuple[Reference | None, dict[str, Measured | None]]:
    """What METRICS[metrics] compares with, that which fits `samples` where `how` names none; and by
    kind of features what was measured of it, None where nothing is needed or on other ranks. Of
    "all", a kind that the reference can't serve is left out. Raises UserError."""
    found = {}
    of = None
    for kind, extractor in extractors.items():
        if kind == INCEPTION:
            check_extractor(metrics, extractor)
        needs = needed(metrics, kind)
        if "reference" not in needs:
            found[kind] = None
            continue
        of = of or (Reference(how.ref, how.res) if how.ref else _fitting(samples))
        of = dataclasses.replace(of, verify=how.verify)
        if metrics == "all" and kind == DINOV2 and not serves(of, extractor):
            continue
        against = reference(of, extractor, with_features="features" in needs, quiet=how.quiet)
        if against:
            check_held(metrics, against, kind)
        found[kind] = against
    return of, found


def serves(of: Reference, extractor: Extractor) -> bool:
    """Whether a reference is images, or statistics of this extractor's features."""
    path = Path(of.source)
    if not containers.is_container(path):
        path = downloads.find(str(of.source))
    if path.suffix == ".safetensors":
        return Measured.load(path).identity == extractor.identity
    return path.suffix != ".npz" or not {"mu", "sigma"} <= imagesets.names(path)


def evaluated(
    metrics: str,
    samples: Samples,
    extractors: Mapping[str, Extractor],
    against: Mapping[str, Measured | None],
    how: How,
) -> Evaluated | None:
    """What is measured of one set on the kinds of features that `references` gave something to
    compare with; on rank 0, else None."""
    left_out = [kind for kind in extractors if kind not in against]
    extractors = {kind: extractors[kind] for kind in against}
    found = {}
    for kind, extractor in extractors.items():
        if isinstance(samples, Generation):
            found[kind] = extraction.generate(samples, extractor, quiet=how.quiet)
        else:
            found[kind] = extraction.measure(
                samples, extractor, batch_size=how.batch_size, quiet=how.quiet
            )
    if not parallel.is_main():
        return None
    values = {}
    notes = []
    for kind, one in found.items():
        one.half = how.adm
        values |= estimates(metrics, one, against[kind], extractors[kind].device, kind)
        told = remarks(metrics, one, against[kind], kind)
        notes += [line for line in told if line not in notes]
    if left_out:
        notes.append(
            f"fdd and kdd are left out: the reference holds no features of {in_words(left_out)}; "
            "give images, or what dimr eval stats --kind dinov2 made of them"
        )
    if how.adm:
        notes.append("precision, recall, density and coverage from float16 distances, as ADM's")
    first = next(iter(found.values()))
    result = {
        **flat(values),
        "label": label(first),
        "samples": describe(first),
        "labels": labels_of(samples),
        "made": made(samples),
        "reference": describe(next(iter(against.values()))),
        "features": first.extractor,
        "identity": first.identity,
        "extractors": {kind: extractor.record for kind, extractor in extractors.items()},
        "device": str(next(iter(extractors.values())).device),
        **averaged(samples),
        "remarks": notes,
        "version": VERSION,
    }
    return Evaluated(result, values, first.drawn)


def labels_of(samples: Samples) -> str | None:
    """How the classes of an image set or a Generation were chosen, where that is known."""
    if isinstance(samples, Generation):
        return samples.labels
    return imagesets.labels_of(samples.record)


def made(samples: Samples) -> dict:
    """How the images of an image set or a Generation were made, as far as that is known."""
    if isinstance(samples, Generation):
        samples = samples.resolved()
        return {
            **sampling.describe(samples.generator, samples.settings),
            "labels": samples.labels,
            "n": samples.count,
            "seeds": imagesets.seeds_text(samples.seeds),
            "batch_size": samples.batch_size,
            **_vae_of(samples.generator),
            "drawn_here": True,
        }
    plan = samples.record.get("plan")
    batch = {"batch_size": plan.get("batch_size")} if isinstance(plan, dict) else {}
    return {k: v for k, v in samples.record.items() if k not in ("plan", "note")} | batch


def _vae_of(generator):
    """Which VAE decodes what the network draws, and its hash where the weights tell it."""
    if not generator.vae_source:
        return {}
    told = {"vae": str(generator.vae_source)}
    if generator.vae_source == generator.record.get("vae"):
        told["vae_sha256"] = generator.record.get("vae_sha256")
    return told


def _fitting(samples):
    """The Reference that fits an image set or a Generation."""
    if isinstance(samples, Generation):
        source = samples.generator.source
        known = samples.generator.config.num_classes
        size = samples.generator.pixels
    else:
        source = samples.record.get("source")
        known = samples.record.get("num_classes")
        size = samples.size
    if not source:
        return fitting_reference(None, known, [], size=size)
    return fitting_reference(runfolder.run_of(source), known, class_names(source), size=size)


# --------------------------------------------------------------------------------------- comparison


def check_comparable(sets: Sequence) -> None:
    """Raise UserError unless all sets have as many images of as many pixels: a distance falls as
    their number grows."""
    extents = [_extent(samples) for samples in sets]
    for name, count, size in extents[1:]:
        if (count, size) != extents[0][1:]:
            raise UserError(
                f"{extents[0][0]} holds {extents[0][1]:,} images of {extents[0][2]} pixels and "
                f"{name} {count:,} of {size}; metrics depend on both: compare sets of one size"
            )


def _extent(samples):
    """(name, number of images, side in pixels)."""
    if isinstance(samples, Generation):
        return samples.generator.source, samples.count, samples.generator.pixels
    return samples.path, len(samples), samples.size


def compare_sets(
    metrics: str,
    sets: Mapping[str, object],
    extractors: Mapping[str, Extractor],
    how: How = How(),
) -> dict | None:
    """Several sets by name against one reference: what `evaluate` says of each, and how far each is
    from the first. Those drawn from the same classes and seeds are compared block by block, so that
    what they share drops out. A dict on rank 0, else None. Raises UserError."""
    check_comparable(list(sets.values()))
    found = evaluate_all(metrics, list(sets.values()), extractors, how)
    if found is None:
        return None
    found = dict(zip(sets, found, strict=True))
    first = next(iter(found.values()))
    differences = {}
    for name, one in list(found.items())[1:]:
        paired = one.drawn is not None and one.drawn == first.drawn
        differences[name] = {
            key: _difference(first.estimates[key], estimate, paired)
            for key, estimate in one.estimates.items()
            if estimate.value is not None and first.estimates[key].value is not None
        }
    return {"sets": {name: one.result for name, one in found.items()}, "differences": differences}


def _difference(first, second, paired):
    found = errors.difference(first, second, paired)
    return {
        "difference": found.value,
        "error": found.error,
        "paired": found.paired,
        "within_noise": found.is_noise,
    }


def comparison_table(result: dict) -> str:
    """The result of `compare_sets` for people."""
    names = list(result["sets"])
    width = max(map(len, names))
    lines = []
    for row, key, what in _shown(result["sets"][names[0]]):
        lines.append(_full_name(row, key, what, result["sets"][names[0]]))
        for name in names:
            one = result["sets"][name]
            line = f"  {name:{width}} {_with_error(one, key, row.digits)}"
            if found := result["differences"].get(name, {}).get(key):
                line += f"   {_in_words(found, row.digits)}"
            lines.append(line)
    lines += _noise_lines(result)
    one = result["sets"][names[0]]
    lines += _source_lines("reference", one["reference"])
    notes = dict.fromkeys(note for one in result["sets"].values() for note in one["remarks"])
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def _in_words(found, digits):
    """A difference to the first set."""
    text = f"{found['difference']:+.{digits}f}"
    if found["error"] is None:
        return f"{text} (no error)"
    return f"{text} ± {found['error']:.{digits}f}"


def _noise_lines(result):
    """Which differences can't be told from none, and how sets were compared."""
    first = next(iter(result["sets"]))
    for name, found in result["differences"].items():
        noise = [key for key, one in found.items() if one["within_noise"]]
        real = [key for key, one in found.items() if one["within_noise"] is False]
        how = "independent draws: errors add up in squares"
        if any(one["paired"] for one in found.values()):
            how = "the same classes and seeds: compared block by block"
        yield (
            f"{name} to {first} ({how}): within noise (95%): {in_words(noise) or 'none'}; beyond "
            f"it: {in_words(real) or 'none'}"
        )


def averaged(samples):
    """{"ema_width": …} if the images are of an average made after the fact, else {}."""
    record = samples.generator.record if isinstance(samples, Generation) else samples.record
    if "ema_width" not in record:
        return {}
    return {"ema_width": record["ema_width"]}


def watch(
    run: str | Path,
    config: networks.Config,
    classes: Sequence[str],
    *,
    extractor: Extractor,
    count: int,
    ref: str | Path | None = None,
) -> Callable[[sampling.Generator], dict]:
    """A function from a sampling.Generator to the FID of `count` unguided images, for a training
    run in folder `run` that keeps an eye on it: {"fid": …, "fid_images": count} on rank 0, {} on
    the others. Raises UserError."""
    of = Reference(ref)
    if ref is None:
        if parallel.is_main():  # which alone knows that the run folder is written
            of = fitting_reference(run, config.num_classes, classes, size=space.side(config))
        of = parallel.broadcast(of)
    against = reference(of, extractor)
    unguided = sampling.Settings(cfg=1.0)

    def measure_fid(generator):
        generation = Generation(generator, count, unguided)
        found = extraction.generate(generation, extractor, resumable=False, quiet=True)
        if not found:
            return {}
        with extraction.foreseen():
            to = fid.Frechet(against.mean, against.covariance)
            distance = to.distance(found.mean, found.covariance)
        return {"fid": round(distance, 4), "fid_images": count}

    return measure_fid


def describe(one: Measured | None) -> dict | None:
    """Where a `Measured` came from, for programs."""
    if one is None:
        return None
    return {"source": one.source, "count": one.count, "size": one.size, "sha256": one.sha256}


def label(samples: Measured) -> str:
    """What FID and sFID are marked with: 50K, 10K, or the very number of images, and the extractor
    if it is another."""
    count = _count_label(samples.count)
    if samples.extractor in (extraction.STANDARD, extraction.DINO):
        return count
    return f"{count}, {samples.extractor}"


def _count_label(count):
    return f"{count // 1000}K" if count % 1000 == 0 else f"{count}"


def table(result: dict, variant: str | None = None) -> str:
    """The result for people, beside the paper's numbers for `variant`."""
    lines = []
    names = {key: _full_name(row, key, what, result) for row, key, what in _shown(result)}
    width = max(map(len, names.values()))
    for row, key, _ in _shown(result):
        line = f"{names[key]:{width}} {_with_error(result, key, row.digits)}"
        published = [
            f"{values[key]:.2f} ({what})"
            for what, values in PAPER.get(variant, [])
            if key in values
        ]
        if published:
            line += f"   paper, {variant}: {', '.join(published)}"
        lines.append(line)
    for what in ("samples", "reference"):
        lines += _source_lines(what, result[what], result.get("labels"))
    if any(result.get(f"{key}_error") is not None for key in names):
        lines.append("± one standard error of drawing the set anew, the reference taken as fixed")
    lines += [f"note: {line}" for line in result["remarks"]]
    return "\n".join(lines)


def _shown(result):
    """(row, key, name) of the numbers that a result holds."""
    found = []
    for kind in extraction.KINDS:
        for row in rows("all", kind):
            for key, name in row.values.items():
                if result.get(key) is not None:
                    found.append((row, key, name))
    return found


def _with_error(result, key, digits):
    text = f"{result[key]:12.{digits}f}"
    if result.get(f"{key}_error") is not None:
        text += f" ± {result[f'{key}_error']:.{digits}f}"
    return text


def _source_lines(what, one, labels=None):
    """Where images came from, a line."""
    if not one:
        return
    count = f", {one['count']:,} images" if one["count"] else ""
    chosen = f", labels {labels}" if labels and what == "samples" else ""
    yield f"{what}: {one['source']}{count}{chosen}"


def _full_name(row, key, name, result):
    if not row.counted or key != next(iter(row.values)):
        return name
    if row.extractor == INCEPTION:
        return f"{name}-{result['label']}"
    return f"{name}-{_count_label(result['samples']['count'])}"
