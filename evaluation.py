"""Evaluation as ADM's suite does it (paper, Sec. 5.1): images, or a network that draws them,
against a reference."""

import ours

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import containers
import dataset
import downloads
import extraction
import fid
import imagenet_names
import imagesets
import parallel
import runfolder
import sampling
import shards
import space
from extraction import Extractor, Generation, Measured
from storage import VERSION, UserError, sha256

# whose features are kept for precision, recall and KID, as in ADM's references
REFERENCE_IMAGES = 10_000
COUNT = 50_000  # images that a published FID is made of


# ------------------------------------------------------------------------------------------ metrics


@dataclasses.dataclass(frozen=True)
class Metric:
    """What `dimr eval NAME` measures; a row of METRICS is all there is to it.

    `needs` names what `compute(samples, reference)` reads of the two `Measured`: "reference" (if it
    is to have one at all), "features" (pool features image by image), "spatial" and "logits" (what
    Inception alone gives). `values` are the names for people of the numbers it returns, by their
    keys in the result."""

    help: str  # a literal, for the command line reads it without importing this module
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    needs: Sequence[str] = ()
    compute: Callable[[Measured, Measured | None], Iterable[float]] | None = None
    digits: int = 4
    counted: bool = False  # whether its name tells the number of images, as FID-50K


def frechet(samples: Measured, reference: Measured) -> tuple[float]:
    """FID."""
    distance = fid.frechet_distance(
        samples.mean, samples.covariance, reference.mean, reference.covariance
    )
    return (distance,)


def spatial_frechet(samples: Measured, reference: Measured) -> tuple[float]:
    """sFID."""
    distance = fid.frechet_distance(
        samples.spatial_mean,
        samples.spatial_covariance,
        reference.spatial_mean,
        reference.spatial_covariance,
    )
    return (distance,)


def inception_score(samples: Measured, reference: Measured | None) -> tuple[float]:
    """The score is taken while the features are."""
    return (samples.score,)


def nearness(samples: Measured, reference: Measured) -> Iterable[float]:
    """Precision, recall, density, coverage."""
    bar = functools.partial(tqdm, desc="neighbours", leave=False, disable=None)
    found = fid.manifold_metrics(reference.features, samples.features, progress=bar)
    return found.values()


def kernel(samples: Measured, reference: Measured) -> tuple[float, float]:
    """KID and its standard deviation over subsets."""
    return fid.kernel_distance(samples.features, reference.features)


METRICS = {
    "fid": Metric(
        "Fréchet Inception distance.",
        {"fid": "FID"},
        needs=["reference"],
        compute=frechet,
        counted=True,
    ),
    "sfid": Metric(
        "Fréchet distance of spatial features, sensitive to structure.",
        {"sfid": "sFID"},
        needs=["reference", "spatial"],
        compute=spatial_frechet,
        counted=True,
    ),
    "is": Metric(
        "Inception Score: mean over splits of 5,000 in the order given (a folder's is permuted by "
        "a fixed seed). Needs no reference.",
        {"inception_score": "Inception Score"},
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
    "all": Metric("All metrics from one pass over the images."),
}


def rows(metrics: str) -> list[Metric]:
    """What METRICS[metrics] comes to: itself, or for "all" every other row."""
    if metrics == "all":
        return [METRICS[name] for name in METRICS if name != "all"]
    return [METRICS[metrics]]


def keys(metrics: str) -> list[str]:
    """Of the result of `compare`."""
    return [key for row in rows(metrics) for key in row.values]


def needed(metrics: str) -> set[str]:
    """What METRICS[metrics] needs (see Metric)."""
    return {need for row in rows(metrics) for need in row.needs}


def needing(*what: str) -> list[str]:
    """The names in METRICS of those that need any of these."""
    return [name for name in METRICS if needed(name) & set(what)]


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


def newest_balanced(root: str | Path = sampling.ROOT) -> Path | None:
    """The `.npz` under `root` that `sample --balanced` wrote last, or None."""
    found = []
    for path in Path(root).rglob("*.npz"):
        with contextlib.suppress(UserError):  # a damaged sidecar
            if imagesets.read_sidecar(path).get("balanced"):
                found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def check_extractor(metrics: str, extractor: Extractor):
    """Raise UserError if the extractor does not give what the metrics need."""
    lacking = needing("spatial", "logits")
    if extractor.cached or metrics not in lacking:
        return
    served = [name for name in METRICS if name not in lacking]
    raise UserError(
        f"{extractor.name} are no Inception's: {in_words(lacking)} need its spatial features and "
        f"logits; leave out --features, or ask for {in_words(served, 'or')}"
    )


def check_fair(images):
    """Raise UserError if the images show but one of the classes that their network knows: no fair
    set."""
    known = images.about.get("num_classes", 1)
    if known > 1 and images.labels is not None and len(np.unique(images.labels)) == 1:
        raise UserError(
            f"{images.path} holds {len(images):,} images of class {images.labels[0]} alone, and "
            f"the reference has {known:,} classes; make a fair set: "
            f"dimr sample --balanced -n {COUNT} --weights {images.about.get('source')}"
        )


def check_held(metrics: str, against: Measured):
    """Raise UserError if the reference lacks what one of the metrics needs."""
    if metrics in needing("spatial") and against.spatial_mean is None:
        raise UserError(
            f"{against.source} holds no mu_s and sigma_s, which {in_words(needing('spatial'))} "
            "need; give ADM's .npz or images"
        )
    if metrics in needing("features") and against.features is None:
        wanting = needing("features")
        enough = [name for name in needing("reference") if name not in wanting]
        raise UserError(
            f"{against.source} holds statistics alone, enough for {in_words(enough)}; "
            f"{in_words(wanting)} need ADM's .npz with images, a file that dimr eval stats wrote, "
            "or images as --ref"
        )


def compare(
    metrics: str,
    samples: Measured,
    against: Measured | None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """{key: value} of METRICS[metrics] for `samples` against the reference `against`, which is None
    where none is needed. Features are compared on `device`, if that is a GPU. Raises UserError."""
    if "features" in needed(metrics):
        samples = _near(samples, device)
        against = _near(against, device)
    result = {}
    with extraction.foreseen():
        for row in rows(metrics):
            values = row.compute(samples, against)
            result |= zip(row.values, values, strict=True)
    return result


def _near(one, device):
    """`one` with its features on `device`, if that is a GPU: others are slower or lack float64."""
    if one is None or device is None or device.type != "cuda":
        return one
    return dataclasses.replace(one, features=one.features.to(device))


def remarks(metrics: str, samples: Measured, against: Measured | None) -> list[str]:
    """What a reader of the numbers should know, a line each."""
    lines = []
    if "OTHER" in samples.extractor:
        lines.append(f"{samples.extractor}: these numbers compare with nothing published")
    if {"fid", "sfid"} & set(keys(metrics)):
        lines += _few("samples", samples)
        if against:
            lines += _few("reference images", against)
    if samples.count != COUNT:
        lines.append(f"published numbers are of {COUNT:,} samples, these of {samples.count:,}")
    if against and against.size and samples.size and against.size != samples.size:
        lines.append(
            f"samples are {samples.size}×{samples.size}, reference images "
            f"{against.size}×{against.size}"
        )
    if "inception_score" in keys(metrics) and (samples.sortedness or 0) > 0.3:
        lines.append(
            "the samples seem to be sorted by class: splits of 5,000 then hold few "
            "classes each, and this Inception Score compares with none; shuffle them"
        )
    return lines


UNEVEN = 2  # times as many images in the largest class as in the smallest: not balanced


def proportions(samples, of: Reference) -> list[str]:
    """What to know where every class has as many samples as the others and not as many images in
    the reference, a line; nothing where the reference has no labels."""
    counts = _label_counts(of)
    if not counts or max(counts.values()) < UNEVEN * min(counts.values()):
        return []
    if not isinstance(samples, Generation) and not _is_balanced(samples):
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
    if samples.labels is None:
        return False
    counts = np.unique(samples.labels, return_counts=True)[1]
    return len(counts) > 1 and counts.max() - counts.min() <= 1


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


def evaluate(
    metrics: str,
    samples,
    extractor: Extractor,
    *,
    ref: str | Path | None = None,
    res: int | None = None,
    batch_size: int | None = None,
    verify: bool = False,
    quiet: bool = False,
) -> dict | None:
    """Measure `samples`, an image set (imagesets) or a Generation, as METRICS[metrics] says against
    `ref`, whose images are cropped to `res` (None: against what fits), and if shards compared with
    their hashes where `verify` says so. Returns a dict for programs on rank 0, else None. Raises
    UserError."""
    drawn = isinstance(samples, Generation)
    check_extractor(metrics, extractor)
    if not drawn:
        check_fair(samples)
    against = None
    needs = needed(metrics)
    if "reference" in needs:
        of = Reference(ref, res) if ref else _fitting(samples)
        of = dataclasses.replace(of, verify=verify)
        with_features = "features" in needs
        against = reference(of, extractor, with_features=with_features, quiet=quiet)
        if against:
            check_held(metrics, against)
    if drawn:
        found = extraction.generate(samples, extractor, quiet=quiet)
    else:
        found = extraction.measure(samples, extractor, batch_size=batch_size, quiet=quiet)
    if not found:
        return None
    notes = remarks(metrics, found, against)
    if "reference" in needs:
        notes += proportions(samples, of)
    return {
        **compare(metrics, found, against, extractor.device),
        "label": label(found),
        "samples": describe(found),
        "reference": describe(against),
        "features": found.extractor,
        "identity": found.identity,
        **averaged(samples),
        "remarks": notes,
        "version": VERSION,
    }


def _fitting(samples):
    """The Reference that fits an image set or a Generation."""
    if isinstance(samples, Generation):
        source = samples.generator.source
        known = samples.generator.config.num_classes
        size = samples.generator.pixels
    else:
        source = samples.about.get("source")
        known = samples.about.get("num_classes")
        size = samples.size
    if not source:
        return fitting_reference(None, known, [], size=size)
    return fitting_reference(runfolder.run_of(source), known, class_names(source), size=size)


def averaged(samples):
    """{"ema_width": …} if the images are of an average made after the fact, else {}."""
    about = samples.generator.record if isinstance(samples, Generation) else samples.about
    if "ema_width" not in about:
        return {}
    return {"ema_width": about["ema_width"]}


def watch(
    run: str | Path,
    config,
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
        return {"fid": round(compare("fid", found, against)["fid"], 4), "fid_images": count}

    return measure_fid


def describe(one: Measured | None) -> dict | None:
    """Where a `Measured` came from, for programs."""
    if one is None:
        return None
    return {"source": one.source, "count": one.count, "size": one.size, "sha256": one.sha256}


def label(samples: Measured) -> str:
    """What FID and sFID are marked with: 50K, 10K, or the very number of images, and the extractor
    if it is another."""
    count = f"{samples.count // 1000}K" if samples.count % 1000 == 0 else f"{samples.count}"
    if samples.extractor == extraction.STANDARD:
        return count
    return f"{count}, {samples.extractor}"


def table(result: dict, variant: str | None = None) -> str:
    """The result for people, beside the paper's numbers for `variant`."""
    lines = []
    shown = [
        (row, key, name) for row in rows("all") for key, name in row.values.items() if key in result
    ]
    names = {key: _full_name(row, name, result["label"]) for row, key, name in shown}
    width = max(map(len, names.values()))
    for row, key, _ in shown:
        line = f"{names[key]:{width}} {result[key]:12.{row.digits}f}"
        published = [
            f"{values[key]:.2f} ({what})"
            for what, values in PAPER.get(variant, [])
            if key in values
        ]
        if published:
            line += f"   paper, {variant}: {', '.join(published)}"
        lines.append(line)
    for what in ("samples", "reference"):
        if one := result[what]:
            count = f", {one['count']:,} images" if one["count"] else ""
            lines.append(f"{what}: {one['source']}{count}")
    lines += [f"note: {line}" for line in result["remarks"]]
    return "\n".join(lines)


def _full_name(row, name, label):
    return f"{name}-{label}" if row.counted else name
