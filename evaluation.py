"""Evaluation as ADM's suite does it (paper, Sec. 5.1): images, or a network that draws them,
against a reference.

Features come from one pass over the images and are cached by content: what was measured once is not
measured again. The images may be spread over processes by torchrun, and a generation that was
interrupted goes on where it stopped."""

import ours

import contextlib
import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import dataset
import downloads
import extraction
import fid
import imagenet_names
import imagesets
import parallel
import runfolder
import sampling
from storage import VERSION, UserError, read_json, sha256

# whose features are kept for precision, recall and KID, as in ADM's references
REFERENCE_IMAGES = 10_000
COUNT = 50_000  # images that a published FID is made of

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


# --------------------------------------------------------------------------------------- references


def reference(
    source, res=None, exif=False, *, extractor, with_features=False, batch_size=None, quiet=False
):
    """The `Measured` that `source` stands for on rank 0, else None: ADM's `.npz` (by name or path),
    a file that `dimr eval stats` wrote, or images. `with_features`: whether pool features are
    needed too. Raises UserError."""
    path = downloads.find(str(source))
    if path.suffix == ".safetensors":
        found = extraction.Measured.load(path)
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
    return extraction.measure(
        imagesets.open_set(path, res, exif), extractor, REFERENCE_IMAGES, batch_size, quiet
    )


def _adm(path, names, extractor, with_features, batch_size, quiet):
    """A reference under ADM's names: mu and sigma, perhaps mu_s and sigma_s, perhaps images."""
    if not extractor.standard:
        raise UserError(
            f"{path} holds statistics of the {extraction.STANDARD}, not of {extractor.name}; give "
            "images as --ref"
        )
    images = imagesets.Npz(path) if "arr_0" in names else None
    measured = (
        extraction.measure(images, extractor, REFERENCE_IMAGES, batch_size, quiet)
        if images and with_features
        else None
    )
    if not parallel.is_main():
        return None
    moments = ["mu", "sigma", *(["mu_s", "sigma_s"] if {"mu_s", "sigma_s"} <= names else [])]
    with extraction.foreseen():
        moments = [
            torch.from_numpy(imagesets.read_array(path, name).astype(np.float64))
            for name in moments
        ]
    return extraction.Measured(
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
    if of_imagenet and f"imagenet{size}" in downloads.ASSETS:
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
    with extraction.foreseen():
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
            run, classes = (runfolder.run_of(source), class_names(source)) if source else (None, [])
            ref, res, exif = fitting_reference(run, known, classes, size)
        with_features = bool(keys & {"kid", "precision"})
        against = reference(
            ref, res, exif, extractor=extractor, with_features=with_features, quiet=quiet
        )
        if against:
            check_held(keys, against)
    if samples:
        found = extraction.measure(samples, extractor, None, batch_size, quiet)
    else:
        found = extraction.generate(generator, count, settings, extractor, batch_size, quiet=quiet)
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
        found = extraction.generate(
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
    return count if samples.extractor == extraction.STANDARD else f"{count}, {samples.extractor}"


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
