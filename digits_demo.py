"""The main job on embedded data: real handwritten digits (8 × 8, 1,797 of them, scikit-learn's),
half to train on, half kept to judge by. Everything goes through the functions and files that
`encode`, `train` and `sample` use."""

import ours

import time

import numpy as np
from PIL import Image

import encoding
import sampling
import training
from storage import UserError

SAMPLES = 1500
# coverage counts a kept digit within the radius to its third real neighbour (Naeem et al., 2020)
NEIGHBOUR = 3


def run(out, seed=0, quiet=False):
    """Write digits, train, sample, judge, all under folder `out`. Returns the figures as a dict.
    Raises UserError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the demo needs scikit-learn for its digits; pip install 'dimr[demo]'"
        ) from None
    begun = time.monotonic()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; delete it or choose another --out")
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    order = np.random.default_rng(0).permutation(len(pixels))
    halves = {"train": order[::2], "kept": order[1::2]}
    for half, indices in halves.items():
        for i in indices:
            folder = out / "digits" / half / str(digits.target[i])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(folder / f"{i:04d}.png")

    encoding.encode(
        out / "digits" / "train", out / "pixels", res=8, pixels=True, workers=0, quiet=quiet
    )
    trained = training.train(
        out / "run",
        training.Source(out / "pixels"),
        variant="demo",
        recipe={"seed": seed},
        device="cpu",
        quiet=quiet,
    )
    if trained["stopped"]:
        raise UserError(
            f"stopped by {trained['stopped']} at step {trained['step']}; delete {out} "
            "and start again"
        )

    generator = sampling.load(out / "run", device="cpu")
    classes = [i % 10 for i in range(SAMPLES)]
    drawn = sampling.sample(
        generator,
        classes,
        list(range(SAMPLES)),
        sampling.Settings(),
        out / "samples.npz",
        batch_size=100,
        npz=True,
        balanced=True,
        quiet=quiet,
    )
    with np.load(drawn["npz"]) as arrays:
        generated = arrays["arr_0"][..., 0]
    return {
        **judge(
            pixels[halves["kept"]],
            digits.target[halves["kept"]],
            generated,
            classes,
            pixels[halves["train"]],
        ),
        "seconds": round(time.monotonic() - begun, 1),
        "seed": seed,
        "picture": drawn["picture"],
        "run": str(out / "run"),
    }


def judge(kept, kept_labels, made, classes, trained):
    """How good the images `made` of `classes` are, by real ones kept out of training: the shares
    that a nearest-neighbour classifier recognises, of the samples and of real images (it learns
    from every other kept image, and is tested on the rest); coverage, over no more kept images than
    there are samples; and how far samples are from the `trained` images, relative to kept ones
    (near 1: no copies)."""
    from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

    kept, made, trained = (
        images.reshape(len(images), -1).astype(np.float64) for images in (kept, made, trained)
    )
    classifier = KNeighborsClassifier(NEIGHBOUR).fit(kept[::2], kept_labels[::2])
    real = kept[: len(made)]
    radius = (
        NearestNeighbors(n_neighbors=NEIGHBOUR + 1).fit(real).kneighbors(real)[0][:, -1]
    )  # the first is itself
    nearest_made = NearestNeighbors(n_neighbors=1).fit(made).kneighbors(real)[0][:, 0]
    to_trained = NearestNeighbors(n_neighbors=1).fit(trained)
    return {
        "accuracy_real": float(classifier.score(kept[1::2], kept_labels[1::2])),
        "accuracy_generated": float(classifier.score(made, classes)),
        "coverage": float((nearest_made <= radius).mean()),
        "nearest_train": float(
            np.median(to_trained.kneighbors(made)[0]) / np.median(to_trained.kneighbors(kept)[0])
        ),
    }
