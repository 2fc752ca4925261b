"""How often the intervals of `dimr eval` hold the truth, and whether its errors are the spread of
what it measures: drawn anew many times, on features whose true distance is known.

    python tools/intervals.py synthetic                   # Gaussian, heavy-tailed: 64 numbers
    apt-get install dataset-fashion-mnist
    python tools/intervals.py fashion                      # 60,000 real images, learned features
    python tools/intervals.py fashion --draws 20 --json

Synthetic features have an exact distance. Of Fashion-MNIST, the 60,000 training images, blurred a
little, are the pool that sets are drawn from; its own distance to the 10,000 test images is the
truth. The features are the 64 of the last hidden layer of a small network that was trained on the
training images for one epoch."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import fashion_mnist

import errors
import fid

DIM = 64
SIZES = (1000, 2000)


def fid_of(rows: torch.Tensor, labels: np.ndarray | None, to: fid.Frechet) -> errors.Estimate:
    """FID of rows (N, D) with its error, as dimr eval has it."""
    statistics = fid.Statistics(rows.shape[1])
    statistics.add(rows)
    owners = errors.blocks(len(rows), labels)
    without = [to.distance(*left) for left in errors.moments_without(rows, owners)]
    return errors.jackknife(to.distance(statistics.mean, statistics.covariance), without)


def study(draw: Callable, to: fid.Frechet, truth: float, draws: int, quiet: bool = True) -> dict:
    """What comes of `draws` sets: draw(k) gives the rows of number k and their labels or None."""
    found = []
    for k in tqdm(range(draws), "sets", leave=False, disable=quiet or None):
        found.append(fid_of(*draw(k), to))
    freed = [errors.freed(one) for one in found]
    held = [low <= truth <= high for low, high in (one.interval for one in freed)]
    values = np.array([one.value for one in freed])
    stated = np.sqrt(np.mean([one.error**2 for one in freed]))
    return {
        "truth": truth,
        "fid": float(np.mean([one.value for one in found])),
        "fid_infinity": float(values.mean()),
        "spread": float(np.std([one.value for one in found], ddof=1)),
        "spread_infinity": float(values.std(ddof=1)),
        "stated": float(stated),
        "coverage": float(np.mean(held)),
        "draws": draws,
    }


# ---------------------------------------------------------------------------------------- synthetic


def synthetic(count: int, heavy: bool, dim: int = DIM):
    """(draw, Frechet, truth) of sets of `count` rows, Gaussian or Student's t of 6 degrees of
    freedom, each number of its own scale."""
    scales = 1 / np.arange(1, dim + 1)

    def draw(k):
        random = np.random.default_rng(k)
        rows = random.standard_normal((count, dim))
        if heavy:
            rows /= np.sqrt(random.chisquare(6, (count, 1)) / 4)  # of variance 1
        return torch.from_numpy(rows * scales**0.5 + 0.05), None

    to = fid.Frechet(np.zeros(dim), np.diag(scales * np.linspace(0.7, 1.4, dim)))
    return draw, to, to.distance(np.full(dim, 0.05), np.diag(scales))


# ------------------------------------------------------------------------------------ Fashion-MNIST


def classifier(images: torch.Tensor, labels: torch.Tensor, batch: int = 128) -> nn.Module:
    """What turns images (N, 1, 28, 28) into features (N, DIM): trained for one epoch."""
    torch.manual_seed(0)
    features = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 36, DIM), nn.ReLU()),
    )
    network = nn.Sequential(features, nn.Linear(DIM, 10))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for chosen in tqdm(torch.randperm(len(images)).split(batch), "classifier", leave=False):
        loss = F.cross_entropy(network(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return features.eval().requires_grad_(False)


def fashion(source: Path):
    """(features of the pool, its labels, Frechet, truth)."""
    images = {}
    labels = {}
    for split in ("train", "t10k"):
        pixels = fashion_mnist.idx(source, f"{split}-images-idx3-ubyte.gz", 16)
        images[split] = torch.tensor(pixels.reshape(-1, 1, 28, 28)).float() / 255
        labels[split] = torch.tensor(fashion_mnist.idx(source, f"{split}-labels-idx1-ubyte.gz", 8))
    network = classifier(images["train"], labels["train"].long())
    blurred = F.avg_pool2d(F.pad(images["train"], (0, 1, 0, 1), "replicate"), 2, 1)
    pool = torch.cat([network(part) for part in blurred.split(1000)])
    against = moments(torch.cat([network(part) for part in images["t10k"].split(1000)]))
    to = fid.Frechet(against.mean, against.covariance)
    whole = moments(pool)
    return pool, labels["train"].numpy(), to, to.distance(whole.mean, whole.covariance)


def moments(rows):
    statistics = fid.Statistics(rows.shape[1])
    statistics.add(rows)
    return statistics


def from_pool(pool, labels, count, balanced):
    """draw(k): a set of `count` rows without repetition, at random or as many of each class."""

    def draw(k):
        random = np.random.default_rng(k)
        if not balanced:
            chosen = random.choice(len(pool), count, replace=False)
            return pool[chosen], labels[chosen]
        classes = [np.flatnonzero(labels == c) for c in range(10)]
        chosen = np.concatenate([random.choice(c, count // 10, replace=False) for c in classes])
        return pool[chosen], labels[chosen]

    return draw


# --------------------------------------------------------------------------------------- the report


def line(name, count, one):
    return (
        f"{name:22} {count:5,} {one['truth']:9.4f} {one['fid']:9.4f} {one['fid_infinity']:9.4f} "
        f"{one['spread']:9.4f} {one['spread_infinity']:9.4f} {one['stated']:9.4f} "
        f"{one['coverage']:7.1%}"
    )


@click.command()
@click.argument("what", type=click.Choice(["synthetic", "fashion"]))
@click.option("--draws", default=200, show_default=True)
@click.option("--source", type=click.Path(path_type=Path), default=fashion_mnist.SOURCE)
@click.option("--json", "as_json", is_flag=True)
def main(what, draws, source, as_json):
    """Coverage of the intervals of 95%, and errors beside the spread."""
    jobs = {}
    if what == "synthetic":
        for count in SIZES:
            jobs["Gaussian", count] = synthetic(count, heavy=False)
            jobs["heavy-tailed", count] = synthetic(count, heavy=True)
    else:
        pool, labels, to, truth = fashion(source)
        for count in SIZES:
            for name in ("random labels", "balanced labels"):
                draw = from_pool(pool, labels, count, balanced=name.startswith("balanced"))
                jobs[name, count] = draw, to, truth
    found = {key: study(*job, draws, quiet=False) for key, job in jobs.items()}
    if as_json:
        print(json.dumps([{"set": key[0], "n": key[1], **one} for key, one in found.items()]))
        return
    print(
        f"{'':22} {'N':>5} {'truth':>9} {'FID':>9} {'freed':>9} {'spread':>9} {'freed':>9} "
        f"{'stated':>9} {'covers':>7}"
    )
    for (name, count), one in found.items():
        print(line(name, count, one))


if __name__ == "__main__":
    main()
