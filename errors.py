"""Standard errors of what is measured on a set of images: the block jackknife. It stands alone.

    owners = blocks(len(features), labels)               # which of 20 blocks each image belongs to
    found = jackknife(fid, [fid_of(*left) for left in moments_without(features, owners)])
    print(found, freed(found))                           # 1.77 ± 0.03, and without its bias

Every block is left out in turn; how far the value moves tells its standard error, and in which
direction, how much of it is bias (Quenouille 1956, Tukey 1958). A distance of Fréchet's falls as
1/N, so its bias is removed whole. Errors are those of drawing the set anew: what it is compared
with is taken as fixed."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.special import stdtrit

BLOCKS = 20
SEED = 0  # of the permutation that fills them
CONFIDENCE = 0.95
CHUNK = 1024  # rows that are float64 at once


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and what its standard error rests on: `parts` (K,), whose mean has the error of the
    value (the jackknife's pseudo-values, or estimates of one thing from K disjoint parts), and
    `noise`, a variance that comes on top. Without parts there is no error."""

    value: float
    parts: Sequence[float] = ()
    noise: float = 0.0

    @property
    def error(self) -> float | None:
        """One standard error."""
        if len(self.parts) < 2:
            return None
        spread = np.var(np.asarray(self.parts, np.float64), ddof=1)
        return float(np.sqrt(spread / len(self.parts) + self.noise))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the true value lies with a confidence of 95%: Student's t over the parts."""
        if self.error is None:
            return None
        reach = quantile(len(self.parts) - 1) * self.error
        return self.value - reach, self.value + reach


def quantile(freedom: float) -> float:
    """How many standard errors an interval of 95% reaches to either side."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def jackknife(value: float, without: Sequence[float]) -> Estimate:
    """An Estimate from a value of all images and those `without` each block."""
    count = len(without)
    return Estimate(value, count * value - (count - 1) * np.asarray(without, np.float64))


def freed(found: Estimate) -> Estimate:
    """What `jackknife` found, without its bias in 1/N."""
    return dataclasses.replace(found, value=float(np.mean(found.parts)))


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much larger one value is than another, and the standard error of that."""

    value: float
    error: float | None
    freedom: float  # degrees of freedom that the error has
    paired: bool

    @property
    def is_noise(self) -> bool | None:
        """Whether it can't be told from 0 with a confidence of 95%; None without an error."""
        if self.error is None:
            return None
        return abs(self.value) <= quantile(self.freedom) * self.error


def difference(first: Estimate, second: Estimate, paired: bool) -> Difference:
    """`second` − `first`. `paired`: whether part k of both is of the same classes and start noise,
    so that what both sets share drops out; otherwise their errors add up in squares (Welch)."""
    step = second.value - first.value
    if first.error is None or second.error is None:
        return Difference(step, None, 0, paired)
    if paired and len(first.parts) == len(second.parts):
        parts = np.asarray(second.parts) - np.asarray(first.parts)
        found = Estimate(step, parts, first.noise + second.noise)
        return Difference(step, found.error, len(parts) - 1, True)
    squares = [one.error**2 for one in (first, second)]
    error = sum(squares) ** 0.5
    shares = [
        square**2 / (len(one.parts) - 1)
        for square, one in zip(squares, (first, second), strict=True)
    ]
    freedom = error**4 / sum(shares) if error else len(first.parts) - 1
    return Difference(step, error, freedom, False)


# ------------------------------------------------------------------------------------------- blocks


def blocks(
    count: int, labels: np.ndarray | None = None, *, number: int = BLOCKS, seed: int = SEED
) -> np.ndarray:
    """Which of `number` blocks each of `count` images belongs to, int64 (count,), from the seed.

    Where every class has as many images as the others (`labels` (count,)), each block gets as many
    of each as it can: what a balanced set does not leave to chance is no error of it. An order of
    the images means nothing. Raises ValueError for fewer images than blocks."""
    if count < number:
        raise ValueError(f"{count} images are fewer than the {number} blocks that errors rest on")
    draw = np.random.default_rng(seed)
    order = draw.permutation(count)
    if labels is not None and is_balanced(labels):
        known, classes = np.unique(labels, return_inverse=True)
        places = draw.permutation(len(known))  # of the classes, in the dealing
        order = order[np.argsort(places[classes[order]], kind="stable")]
    owners = np.empty(count, np.int64)
    owners[order] = np.arange(count) % number
    return owners


def is_balanced(labels: np.ndarray) -> bool:
    """Whether there are several classes, each with as many images as the others, give or take
    one."""
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) > 1 and counts.max() - counts.min() <= 1


def moments_without(
    features: torch.Tensor, owners: np.ndarray
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield mean (D,) and covariance (D, D), float64, of the rows of `features` (N, D) without each
    block: the moments of all less those of the block, so that each row is seen twice and no more
    than three matrices are held."""
    everyone = torch.arange(len(features))
    mean = sum(rows.sum(0) for rows in _double(features, everyone)) / len(features)
    _, scatter = _moments_about(mean, features, everyone)
    for k in range(int(owners.max()) + 1):
        members = torch.from_numpy(np.flatnonzero(owners == k))
        total, own = _moments_about(mean, features, members)
        rest = len(features) - len(members)
        own = scatter - own
        own.addr_(total, total, alpha=-1 / rest)
        yield mean - total / rest, own / (rest - 1)


def _moments_about(mean, features, members):
    """Sum and scatter of the rows `members` less the mean."""
    total = torch.zeros_like(mean)
    scatter = torch.zeros(len(mean), len(mean), dtype=mean.dtype, device=mean.device)
    for rows in _double(features, members):
        rows -= mean
        total += rows.sum(0)
        scatter.addmm_(rows.T, rows)
    return total, scatter


def _double(features, members):
    """Yield the rows `members` in float64, CHUNK at a time."""
    for chosen in members.split(CHUNK):
        yield features[chosen.to(features.device)].double()
