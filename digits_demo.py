"""The main job on embedded data: real handwritten digits (8 × 8, 1,797 of them, scikit-learn's),
half to train on, half kept to judge by. Everything goes through the functions and files that
`encode`, `train` and `sample` use."""

import ours

import dataclasses
import shlex
import time
from pathlib import Path

import numpy as np
from PIL import Image

import encoding
import sampling
import training
from storage import UserError

SAMPLES = 1500
CLASSES = 10
# coverage counts a kept digit within the radius to its third real neighbour (Naeem et al., 2020)
NEIGHBOUR = 3


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images (N, 8, 8), uint8, what they show (N,), and their numbers among all digits (N,)."""

    images: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray


def run(out: str | Path, seed: int = 0, quiet: bool = False) -> dict:
    """Write digits, train, sample, judge, all under folder `out`. Returns the figures. Raises
    UserError."""
    begun = time.monotonic()
    halves = load()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; delete it or choose another --out")
    for half, digits in halves.items():
        write(digits, out / "digits" / half)
    encoding.encode(
        out / "digits" / "train", out / "pixels", res=8, pixels=True, workers=0, quiet=quiet
    )
    train(out, seed, quiet)
    drawn = draw(out, quiet)
    with np.load(drawn["npz"]) as arrays:
        made = Digits(arrays["arr_0"][..., 0], arrays["arr_1"], np.arange(SAMPLES))
    return {
        **judge(halves["kept"], made, halves["train"].images),
        "seconds": round(time.monotonic() - begun, 1),
        "seed": seed,
        "picture": drawn["picture"],
        "run": str(out / "run"),
        "next": next_commands(out),
    }


def next_commands(out: Path) -> list[str]:
    """What to try after the demo in folder `out`, as one types it."""
    run = shlex.quote(str(out / "run"))
    samples = shlex.quote(str(out / "samples.npz"))
    kept = shlex.quote(str(out / "digits" / "kept"))
    train = shlex.quote(str(out / "digits" / "train"))
    return [
        f"dimr sample --weights {run} --class 3",
        f"dimr sample --weights {run} -n 100 --cfg 3",
        f"dimr eval fid {samples} --ref {kept}  # fetches Inception's weights, 96 MB",
        f"dimr train --data {train} --steps 2000 --out runs/digits",
    ]


def load():
    """The two halves of the digits, {"train": Digits, "kept": Digits}. Raises UserError where
    scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        message = "the demo needs scikit-learn for its digits; pip install 'dimr[demo]'"
        raise UserError(message) from None
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    halves = {"train": order[::2], "kept": order[1::2]}
    return {
        half: Digits(pixels[numbers], digits.target[numbers], numbers)
        for half, numbers in halves.items()
    }


def write(digits, folder):
    """Write PNGs, a folder per class."""
    for image, label, number in zip(digits.images, digits.labels, digits.numbers, strict=True):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def train(out, seed, quiet):
    """Train the variant demo. Raises UserError if it was stopped."""
    result = training.train(
        out / "run",
        training.Source(out / "pixels"),
        variant="demo",
        recipe={"seed": seed},
        device="cpu",
        quiet=quiet,
    )
    if result["stopped"]:
        raise UserError(
            f"stopped by {result['stopped']} at step {result['step']}; delete {out} and start again"
        )


def draw(out: Path, quiet: bool) -> dict:
    """Draw SAMPLES images, classes in turn; what `sampling.sample` says of them."""
    return sampling.sample(
        sampling.load(out / "run", device="cpu"),
        [i % CLASSES for i in range(SAMPLES)],
        list(range(SAMPLES)),
        sampling.Settings(),
        out=out / "samples.npz",
        batch_size=100,
        npz=True,
        labels=sampling.BALANCED,
        quiet=quiet,
    )


def judge(kept: Digits, made: Digits, trained: np.ndarray) -> dict:
    """How good the digits `made` are, by real ones `kept` out of training. A nearest-neighbour
    classifier learns from every other kept image and is tested on the rest.

    `accuracy_real`, `accuracy_generated`: shares that it recognises; `coverage`: over no more kept
    images than there are samples; `nearest_train`: how far samples are from the `trained` images,
    relative to kept ones (near 1: no copies)."""
    from sklearn.neighbors import KNeighborsClassifier

    real = flat(kept.images)
    drawn = flat(made.images)
    known = flat(trained)
    classifier = KNeighborsClassifier(NEIGHBOUR).fit(real[::2], kept.labels[::2])
    from_drawn = np.median(distances(known, drawn))
    from_real = np.median(distances(known, real))
    return {
        "accuracy_real": float(classifier.score(real[1::2], kept.labels[1::2])),
        "accuracy_generated": float(classifier.score(drawn, made.labels)),
        "coverage": coverage(real[: len(drawn)], drawn),
        "nearest_train": float(from_drawn / from_real),
    }


def coverage(real: np.ndarray, drawn: np.ndarray) -> float:
    """Share of the rows of `real` that have one of `drawn` within the distance to their third
    neighbour among themselves."""
    # each is its own first neighbour
    radius = distances(real, real, NEIGHBOUR + 1)
    return float((distances(drawn, real) <= radius).mean())


def distances(among, points, rank=1):
    """From each row of `points` to its neighbour of that rank in `among`."""
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=rank).fit(among)
    return neighbours.kneighbors(points)[0][:, -1]


def flat(images):
    return images.reshape(len(images), -1).astype(np.float64)
