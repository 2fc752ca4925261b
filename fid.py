"""FID and its relatives, as ADM's TensorFlow suite computes them (paper, Sec. 5.1). It stands
alone.

    inception = load("pt_inception-2015-12-05-6726825d.pth")
    pool, spatial, logits = inception(images)     # images: (N, H, W, 3) uint8
    statistics = Statistics(POOL)
    statistics.add(pool)                          # batch by batch; merge() joins processes
    frechet_distance(statistics.mean, statistics.covariance, mu, sigma)

FID: Heusel et al., arXiv:1706.08500; sFID: Nash et al., arXiv:2103.03841; Inception Score: Salimans
et al., arXiv:1606.03498; KID: Bińkowski et al., arXiv:1801.01401; precision and recall:
Kynkäänniemi et al., arXiv:1904.06991; density and coverage: Naeem et al., arXiv:2002.09797."""

import dataclasses
from collections.abc import Callable
from zipfile import is_zipfile

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigvalsh
from scipy.linalg.lapack import dpstrf
from torch import nn

# ---------------------------------------------------------------------------------------- Inception

SIDE = 299  # pixels
POOL, SPATIAL, LOGITS = 2048, 17 * 17 * 7, 1008  # features per image
EPS = 1e-3  # of batch norm
NORM = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")

# The mixed blocks: a row is (name in the pytorch-fid file, what it reads, channels out, kernel).
# "x" is the block's input and "pool" a 3×3 pooling of it. A block's output joins, in this order,
# all that no row reads.


def _mixed_5(pool):
    return "avg", [
        ("branch1x1", "x", 64, (1, 1)),
        ("branch5x5_1", "x", 48, (1, 1)),
        ("branch5x5_2", "branch5x5_1", 64, (5, 5)),
        ("branch3x3dbl_1", "x", 64, (1, 1)),
        ("branch3x3dbl_2", "branch3x3dbl_1", 96, (3, 3)),
        ("branch3x3dbl_3", "branch3x3dbl_2", 96, (3, 3)),
        ("branch_pool", "pool", pool, (1, 1)),
    ]


def _mixed_6(width):
    return "avg", [
        ("branch1x1", "x", 192, (1, 1)),
        ("branch7x7_1", "x", width, (1, 1)),
        ("branch7x7_2", "branch7x7_1", width, (1, 7)),
        ("branch7x7_3", "branch7x7_2", 192, (7, 1)),
        ("branch7x7dbl_1", "x", width, (1, 1)),
        ("branch7x7dbl_2", "branch7x7dbl_1", width, (7, 1)),
        ("branch7x7dbl_3", "branch7x7dbl_2", width, (1, 7)),
        ("branch7x7dbl_4", "branch7x7dbl_3", width, (7, 1)),
        ("branch7x7dbl_5", "branch7x7dbl_4", 192, (1, 7)),
        ("branch_pool", "pool", 192, (1, 1)),
    ]


def _mixed_7(pool):
    return pool, [
        ("branch1x1", "x", 320, (1, 1)),
        ("branch3x3_1", "x", 384, (1, 1)),
        ("branch3x3_2a", "branch3x3_1", 384, (1, 3)),
        ("branch3x3_2b", "branch3x3_1", 384, (3, 1)),
        ("branch3x3dbl_1", "x", 448, (1, 1)),
        ("branch3x3dbl_2", "branch3x3dbl_1", 384, (3, 3)),
        ("branch3x3dbl_3a", "branch3x3dbl_2", 384, (1, 3)),
        ("branch3x3dbl_3b", "branch3x3dbl_2", 384, (3, 1)),
        ("branch_pool", "pool", 192, (1, 1)),
    ]


MIXED = {
    "Mixed_5b": _mixed_5(32),
    "Mixed_5c": _mixed_5(64),
    "Mixed_5d": _mixed_5(64),
    "Mixed_6a": ("down", [
        ("branch3x3", "x", 384, (3, 3)),
        ("branch3x3dbl_1", "x", 64, (1, 1)),
        ("branch3x3dbl_2", "branch3x3dbl_1", 96, (3, 3)),
        ("branch3x3dbl_3", "branch3x3dbl_2", 96, (3, 3)),
    ]),
    "Mixed_6b": _mixed_6(128),
    "Mixed_6c": _mixed_6(160),
    "Mixed_6d": _mixed_6(160),
    "Mixed_6e": _mixed_6(192),
    "Mixed_7a": ("down", [
        ("branch3x3_1", "x", 192, (1, 1)),
        ("branch3x3_2", "branch3x3_1", 320, (3, 3)),
        ("branch7x7x3_1", "x", 192, (1, 1)),
        ("branch7x7x3_2", "branch7x7x3_1", 192, (1, 7)),
        ("branch7x7x3_3", "branch7x7x3_2", 192, (7, 1)),
        ("branch7x7x3_4", "branch7x7x3_3", 192, (3, 3)),
    ]),
    "Mixed_7b": _mixed_7("avg"),
    "Mixed_7c": _mixed_7("max"),  # a peculiarity of the 2015 graph
}  # fmt: skip

POOLS = {
    "avg": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "max": lambda: nn.MaxPool2d(3, 1, 1),
    "down": lambda: nn.MaxPool2d(3, 2),  # halves the grid, as do the last convolutions of its block
}


class Conv(nn.Conv2d):
    """A convolution with its batch norm folded in, and ReLU."""

    def forward(self, x):
        return F.relu_(super().forward(x))


class Mixed(nn.Module):
    """Several small stacks of convolutions side by side, their outputs joined along the
    channels."""

    def __init__(self, channels, pool, rows):
        super().__init__()
        self.pool = POOLS[pool]()
        self.reads = {name: source for name, source, _, _ in rows}
        self.leaves = [name for name in [*self.reads, "pool"] if name not in self.reads.values()]
        widths = {"x": channels, "pool": channels}
        for name, source, width, kernel in rows:
            stride = 1
            padding = tuple(side // 2 for side in kernel)
            if pool == "down" and name in self.leaves:
                stride = 2
                padding = 0
            self.add_module(name, Conv(widths[source], width, kernel, stride, padding))
            widths[name] = width
        self.width = sum(widths[name] for name in self.leaves)

    def forward(self, x):
        values = {"x": x, "pool": self.pool(x)}
        for name, source in self.reads.items():
            values[name] = self.get_submodule(name)(values[source])
        return torch.cat([values[name] for name in self.leaves], 1)


class Inception(nn.Module):
    """The Inception network of 2015 that FID is defined by, with the TensorFlow graph's resize and
    pools.

    `inception(images)`: images (N, H, W, 3) uint8 → pool features (N, 2048); spatial ones (N,
    2023), the first 7 channels of Mixed_6d, channel last; and logits (N, 1008) without their bias,
    as the Inception Score takes them."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        channels = 192
        for name, (pool, rows) in MIXED.items():
            self.add_module(name, Mixed(channels, pool, rows))
            channels = self.get_submodule(name).width
        self.fc = nn.Linear(POOL, LOGITS, bias=False)

    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            shape = tuple(images.shape)
            raise ValueError(
                f"images are {images.dtype} {shape}; expected uint8 (N, H, W, 3), values 0 to 255"
            )
        x = (resize(images, SIDE) - 128) / 128
        x = x.contiguous(memory_format=layout(images.device))
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in MIXED:
            x = self.get_submodule(name)(x)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        return pool, spatial, self.fc(pool)


def layout(device: torch.device) -> torch.memory_format:
    """How images lie in memory there: channels last on CPUs, where that is faster, and not on GPUs,
    where it is slower in float32 (docs/performance.md)."""
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last


def resize(images: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of images (N, H, W, C) to float32 (N, C, side, side), channels
    last in memory.

    Output pixel i lies at i · H / side of the input: no half-pixel centres, no antialiasing."""
    for axis in (2, 1):
        size = images.shape[axis]
        at = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        low = at.long()
        high = (low + 1).clamp(max=size - 1)
        first = images.index_select(axis, low).float()
        second = images.index_select(axis, high).float()
        images = first + (second - first) * (at - low).view(-1, *[1] * (3 - axis))
    return images.permute(0, 3, 1, 2)


def from_state_dict(state_dict: dict[str, torch.Tensor]) -> Inception:
    """The Inception network of a state dict under pytorch-fid's names, batch norms folded into
    convolutions.

    Raises ValueError naming tensors that are missing, unknown or of another shape."""
    inception = Inception()
    found = {k: v for k, v in state_dict.items() if not k.endswith(".num_batches_tracked")}
    convolutions = {
        name: module for name, module in inception.named_modules() if isinstance(module, Conv)
    }
    _check_tensors(found, convolutions)
    with torch.no_grad():
        for name, module in convolutions.items():
            weight, gain, bias, mean, variance = [
                found[f"{name}.{part}"].double() for part in ("conv.weight", *NORM)
            ]
            gain = gain / (variance + EPS).sqrt()
            module.weight.copy_(weight * gain.view(-1, 1, 1, 1))
            module.bias.copy_(bias - mean * gain)
        inception.fc.weight.copy_(found["fc.weight"])
    return inception.eval().requires_grad_(False)


def _is_plain(tensor):
    strided = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    return strided and tensor.is_floating_point()


def _check_tensors(found, convolutions):
    """Raise ValueError unless these are the tensors that the network takes, and finite."""
    shapes = {"fc.weight": (LOGITS, POOL), "fc.bias": (LOGITS,)}
    for name, module in convolutions.items():
        shapes[f"{name}.conv.weight"] = tuple(module.weight.shape)
        for part in NORM:
            shapes[f"{name}.{part}"] = (module.out_channels,)
    wrong = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unknown": sorted(found.keys() - shapes.keys()),
        "of another shape": [
            name
            for name in shapes
            if name in found and _is_plain(found[name]) and found[name].shape != shapes[name]
        ],
    }
    wrong["no plain numbers"] = [name for name in found if not _is_plain(found[name])]
    if not wrong["no plain numbers"]:
        wrong["not finite"] = [name for name in found if not found[name].isfinite().all()]
    faults = [
        f"{len(names)} {fault}: {', '.join(names[:3])}" for fault, names in wrong.items() if names
    ]
    if faults:
        raise ValueError(f"not the Inception weights of pytorch-fid ({'; '.join(faults)})")


def load(path, device: str | torch.device = "cpu") -> Inception:
    """The Inception network in pytorch-fid's weights file; nothing in it is run. Raises OSError
    where that can't be opened, ValueError for another file."""
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # whatever an untrusted file makes the parser raise is its fault
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} can't be read as plain weights ({reason})") from None
    is_dict = isinstance(state_dict, dict)
    if not is_dict or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise ValueError(f"{path} holds no state dict: expected names mapped to tensors")
    try:
        inception = from_state_dict(state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return inception.to(device, memory_format=layout(torch.device(device)))


# ---------------------------------------------------------------------------------------- FID, sFID


class Statistics:
    """Mean and covariance of feature vectors, float64, in one pass and with flat memory.

    Rows are folded in blocks of BLOCK, so the result doesn't depend on how they were batched;
    `merge` takes in what another process saw. `count` rows so far; `mean` (D,) and `covariance` (D,
    D, divided by count − 1) are tensors."""

    BLOCK = 1024

    def __init__(self, dim: int, device: str | torch.device = "cpu"):
        self._count = 0  # rows folded
        self._pending = []  # rows that are not
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @property
    def count(self) -> int:
        return self._count + sum(map(len, self._pending))

    @property
    def mean(self) -> torch.Tensor:
        self._flush(1)
        return self._mean

    @property
    def covariance(self) -> torch.Tensor:
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance; expected at least 2")
        self._flush(1)
        return self._scatter / (self._count - 1)

    def add(self, features: torch.Tensor):
        """Take in rows (N, D). Raises ValueError where one is not finite."""
        if not features.isfinite().all():
            raise ValueError(
                "features hold NaN or infinity; images, extractor or device are at fault"
            )
        self._pending.append(features.to(self._mean.device, copy=True))
        self._flush(self.BLOCK)

    def merge(self, other: "Statistics"):
        """Take in the rows of another, which keeps them."""
        self._flush(1)
        other._flush(1)
        self._join(other._count, other._mean.to(self._mean), other._scatter.to(self._mean))

    def to(self, device: str | torch.device):
        self._flush(1)
        self._mean = self._mean.to(device)
        self._scatter = self._scatter.to(device)

    def _flush(self, least):
        """Fold pending rows, BLOCK at a time, while there are at least `least` of them."""
        while sum(map(len, self._pending)) >= least:
            rows = torch.cat(self._pending)
            self._pending = [rows[self.BLOCK :]] if len(rows) > self.BLOCK else []
            rows = rows[: self.BLOCK].double()
            mean = rows.mean(0)
            rows -= mean
            self._join(len(rows), mean, rows.T @ rows)

    def _join(self, count, mean, scatter):
        """Combine with the moments of other rows (Chan, Golub, LeVeque 1983)."""
        if count == 0:
            return
        total = self._count + count
        step = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(step, step, alpha=self._count * count / total)
        self._mean += step * (count / total)
        self._count = total


def frechet_distance(mean_1, covariance_1, mean_2, covariance_2) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) of arrays or tensors (D,), (D, D), as a float. Raises
    ValueError."""
    return Frechet(mean_2, covariance_2).distance(mean_1, covariance_1)


class Frechet:
    """Fréchet distances to a normal distribution of mean (D,) and covariance (D, D), arrays or
    tensors, of which what is needed each time is computed once. Raises ValueError.

    With Σ = A Aᵀ, Σ₁ Σ has the eigenvalues of the symmetric Aᵀ Σ₁ A besides zeros. A is Cholesky's
    factor with pivoting and has as many columns as Σ has rank, so fewer images than features cost
    no accuracy, and less time."""

    def __init__(self, mean, covariance):
        self.mean, self.covariance = _moments(mean, covariance)
        self.factor = _cholesky(self.covariance)

    def distance(self, mean, covariance, count: int | None = None) -> float:
        """Of another distribution, whose moments are of `count` images if that is known: more than
        features bring full rank."""
        mean, covariance = _moments(mean, covariance)
        if mean.shape != self.mean.shape:
            counts = f"{len(mean)} and of {len(self.mean)}"
            raise ValueError(
                f"statistics of {counts} features can't be compared; use one extractor for both"
            )
        product = self._product(covariance, may_lack_rank=not count or count <= len(mean))
        eigenvalues = eigvalsh(product, driver="ev", overwrite_a=True, check_finite=False)
        root = np.sqrt(eigenvalues.clip(min=0)).sum()
        between = ((mean - self.mean) ** 2).sum()
        distance = between + covariance.trace() + self.covariance.trace() - 2 * root
        return max(float(distance), 0.0)

    def _product(self, covariance, may_lack_rank):
        """Aᵀ Σ₁ A, or what has its eigenvalues and is smaller."""
        if may_lack_rank:
            factor = _cholesky(covariance)
            if factor.shape[1] <= self.factor.shape[1]:
                return factor.T @ self.covariance @ factor
        return self.factor.T @ covariance @ self.factor


def _moments(mean, covariance):
    mean = np.asarray(torch.as_tensor(mean).cpu(), np.float64)
    covariance = np.asarray(torch.as_tensor(covariance).cpu(), np.float64)
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(
            f"statistics of shape {mean.shape} and {covariance.shape}; expected (D,) and (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("statistics hold NaN or infinity; make them anew")
    return mean, covariance


def _cholesky(covariance):
    """A (D, rank) with A Aᵀ = covariance, which is positive semidefinite."""
    lower, pivots, rank, _ = dpstrf(covariance, lower=1)
    factor = np.empty((len(covariance), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


# ---------------------------------------------------------------------------------- Inception Score


class InceptionScore:
    """exp of the mean divergence of p(class | image) from its mean over a split, averaged over
    splits.

    Image number i belongs to split i // `split` whenever it is added, so any batching and any
    number of processes (`merge`) give one score. A split that is sorted by class can't score above
    its number of classes."""

    def __init__(self, split: int = 5000):
        self.split = split
        self.splits = {}  # split → (images, sum of p (C,), sum of p log p)

    def add(self, logits: torch.Tensor, numbers):
        """Take in logits (N, C) of the images `numbers` (N,)."""
        log_p = logits.cpu().double().log_softmax(1)
        p = log_p.exp()
        entropy = (p * log_p).sum(1)
        owners = torch.as_tensor(numbers) // self.split
        for k in owners.unique().tolist():
            mine = owners == k
            self._join(k, (int(mine.sum()), p[mine].sum(0), float(entropy[mine].sum())))

    def merge(self, other: "InceptionScore"):
        """Take in the images of another."""
        for k, sums in other.splits.items():
            self._join(k, sums)

    def _join(self, k, sums):
        if k in self.splits:
            sums = tuple(a + b for a, b in zip(self.splits[k], sums, strict=True))
        self.splits[k] = sums

    @property
    def scores(self) -> list[float]:
        """Of each split."""
        scores = []
        for k in sorted(self.splits):
            count, p, entropy = self.splits[k]
            q = p / count
            scores.append(float(np.exp(entropy / count - torch.xlogy(q, q).sum().item())))
        return scores

    @property
    def value(self) -> float:
        return float(np.mean(self.scores))


# -------------------------------------------------------- KID, precision, recall, density, coverage


SUBSETS = 100  # of the images, over which KID is averaged


def kernel_distance(
    features_1: torch.Tensor,
    features_2: torch.Tensor,
    *,
    subsets: int = SUBSETS,
    size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """KID: mean and standard deviation over random subsets of the unbiased squared MMD with kernel
    (x·y / D + 1)³.

    The subsets are those that torch-fidelity draws from the same seed. Sets smaller than `size` are
    taken whole. Raises ValueError for sets of one image."""
    size = min(size, len(features_1), len(features_2))
    if size < 2:
        raise ValueError("KID needs at least 2 images on either side")
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = features_1[torch.from_numpy(draw.choice(len(features_1), size, replace=False))]
        y = features_2[torch.from_numpy(draw.choice(len(features_2), size, replace=False))]
        same = _sum_of_others(_kernel(x, x)) + _sum_of_others(_kernel(y, y))
        values.append(float(same / (size * (size - 1)) - 2 * _kernel(x, y).mean()))
    return float(np.mean(values)), float(np.std(values))


def _sum_of_others(kernel):
    """Of all pairs of two images."""
    return kernel.sum() - kernel.diagonal().sum()


def _kernel(x, y):
    return (x @ y.T).double().div_(x.shape[1]).add_(1).pow_(3)


def kernel_estimates(
    features_1: torch.Tensor, features_2: torch.Tensor, owners: np.ndarray, chunk: int = 2048
) -> list[float]:
    """The unbiased squared MMD of `kernel_distance` between each block of `features_1` (N, D) and
    all of `features_2`, by blocks `owners` (N,). Raises ValueError for blocks of one image."""
    if np.bincount(owners).min() < 2 or len(features_2) < 2:
        raise ValueError("KID needs at least 2 images on either side")

    def mean_kernel(x, y):
        return sum(float(_kernel(rows, y).sum()) for rows in x.split(chunk)) / (len(x) * len(y))

    def mean_of_others(x):
        own = float(((x * x).sum(1).double() / x.shape[1] + 1).pow(3).sum())
        return (mean_kernel(x, x) * len(x) ** 2 - own) / (len(x) * (len(x) - 1))

    constant = mean_of_others(features_2)
    found = []
    for k in range(int(owners.max()) + 1):
        x = features_1[torch.from_numpy(np.flatnonzero(owners == k)).to(features_1.device)]
        found.append(mean_of_others(x) + constant - 2 * mean_kernel(x, features_2))
    return found


@dataclasses.dataclass(frozen=True)
class Manifold:
    """Which of N real and M fake images lie in each other's balls, by blocks of fakes."""

    owners: torch.Tensor  # of the fakes, int64 (M,)
    k_density: int
    precise: torch.Tensor  # fakes in a real's ball, bool (M,)
    balls: torch.Tensor  # wide balls of reals around each fake, (M,)
    covered: torch.Tensor  # reals whose wide ball holds a fake of block k, bool (N, K)
    recalled: torch.Tensor  # reals in a ball of a fake of block k, bool (N, K)
    widened: torch.Tensor  # reals in one that grows as block k is left out, bool (N, K)

    def values(self) -> dict[str, float]:
        return {
            "precision": float(self.precise.double().mean()),
            "recall": float(self.recalled.any(1).double().mean()),
            "density": float(self.balls.double().mean()) / self.k_density,
            "coverage": float(self.covered.any(1).double().mean()),
        }

    def without(self) -> dict[str, list[float]]:
        """The same where each of the K blocks is left out in turn."""
        found = {"precision": [], "recall": [], "density": [], "coverage": []}
        for k in range(self.covered.shape[1]):
            rest = self.owners != k
            recalled = _in_others(self.recalled, k) | self.widened[:, k]
            found["precision"].append(float(self.precise[rest].double().mean()))
            found["recall"].append(float(recalled.double().mean()))
            found["density"].append(float(self.balls[rest].double().mean()) / self.k_density)
            found["coverage"].append(float(_in_others(self.covered, k).double().mean()))
        return found


def _in_others(by_block, k):
    """Whether any block but k has it."""
    return by_block.sum(1) > by_block[:, k]


def manifold_metrics(real: torch.Tensor, fake: torch.Tensor, **options) -> dict[str, float]:
    """Precision, recall, density and coverage of `fake` against `real` features (N, D), (M, D), as
    a dict; keywords as in `manifold`."""
    return manifold(real, fake, **options).values()


def manifold(
    real: torch.Tensor,
    fake: torch.Tensor,
    *,
    k: int = 3,
    k_density: int = 5,
    chunk: int = 2048,
    owners: np.ndarray | None = None,
    half: bool = False,
    progress: Callable = iter,
) -> Manifold:
    """What precision, recall, density and coverage of `fake` against `real` features (N, D), (M, D)
    rest on, by blocks of fakes (`owners` (M,), default: one block).

    A ball reaches from each point to its k-th nearest other point of the same set (k_density for
    density and coverage, as their papers have it). Distances are Euclidean, float32, by pieces of
    at most `chunk` × `chunk`, or with `half` float16 where a piece of them is finite, as in ADM's
    TensorFlow suite. `progress` wraps the iterables over pieces. Raises ValueError for sets of k
    points or fewer."""
    most = max(k, k_density)
    if min(len(real), len(fake)) <= most:
        counts = f"{len(real)} and {len(fake)}"
        raise ValueError(
            f"precision and recall need more than {most} images on either side, not {counts}"
        )
    distances = _half_distances if half else _squared_distances
    owners = torch.as_tensor(np.zeros(len(fake), np.int64) if owners is None else owners)
    order = owners.argsort(stable=True)
    back = order.argsort()
    fake = fake[order.to(fake.device)]
    pieces = _pieces(owners.bincount().tolist(), chunk)
    rows_of = [rows for _, rows in _pieces([len(real)], chunk)]

    nearest = _nearest(real, _pieces([len(real)], chunk), most, distances, progress)[:, 0]
    balls = _Balls(_nearest(fake, pieces, k, distances, progress))
    blocks = len(balls.without)
    precise = fake.new_zeros(len(fake), dtype=torch.bool)
    around = fake.new_zeros(len(fake), dtype=torch.int64)
    covered = real.new_zeros(len(real), blocks, dtype=torch.bool)
    recalled = torch.zeros_like(covered)
    widened = torch.zeros_like(covered)
    for rows, (block, columns) in progress([(i, j) for i in rows_of for j in pieces]):
        found = distances(real[rows], fake[columns])
        within = found <= nearest[rows, k_density - 1, None]
        around[columns] += within.sum(0)
        covered[rows, block] |= within.any(1)
        precise[columns] |= (found <= nearest[rows, k - 1, None]).any(0)
        recalled[rows, block] |= (found <= balls.radius[columns]).any(1)
        for left_out, grown, radius in balls.grown(block, columns):
            widened[rows, left_out] |= (found[:, grown] <= radius).any(1)
    return Manifold(
        owners=owners,
        k_density=k_density,
        precise=precise.cpu()[back],
        balls=around.cpu()[back],
        covered=covered.cpu(),
        recalled=recalled.cpu(),
        widened=widened.cpu(),
    )


class _Balls:
    """Squared radii of points whose `nearest` (M, K, k) squared distances by block are known: with
    all blocks, and without each."""

    def __init__(self, nearest):
        count, blocks, k = nearest.shape
        self.radius = _kth(nearest, k)
        self.without = []
        for block in range(blocks):
            rest = [other for other in range(blocks) if other != block]
            self.without.append(_kth(nearest[:, rest], k) if rest else self.radius)

    def grown(self, own, columns):
        """Yield (block, which of the points `columns` have a larger ball without it, that ball's
        squared radius) for each block but their `own`."""
        for block, radius in enumerate(self.without):
            grown = (radius[columns] > self.radius[columns]).nonzero()[:, 0]
            if block != own and len(grown):
                yield block, grown, radius[columns][grown]


def _kth(nearest, k):
    """The k-th smallest of each row's numbers."""
    return nearest.flatten(1).kthvalue(k, 1).values


def _pieces(counts, chunk):
    """(block, slice) of stretches of at most `chunk` rows, evenly cut; block k has counts[k]
    rows."""
    found = []
    first = 0
    for block, count in enumerate(counts):
        cuts = np.linspace(first, first + count, -(-count // chunk) + 1).astype(int)
        found += [(block, slice(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
        first += count
    return found


def _nearest(points, pieces, k, distances, progress):
    """Squared distances (N, K, k), ascending, from each point to its k nearest others of each
    block. Two pieces are seen together once."""
    blocks = 1 + max(block for block, _ in pieces)
    nearest = points.new_full((len(points), blocks, k), torch.inf)

    def update(rows, block, distances):
        found = torch.cat([nearest[rows, block], distances], 1)
        nearest[rows, block] = found.topk(k, largest=False).values

    pairs = [(i, j) for i in range(len(pieces)) for j in range(i, len(pieces))]
    for i, j in progress(pairs):
        first, rows = pieces[i]
        second, columns = pieces[j]
        found = distances(points[rows], points[columns])
        if i == j:
            found.fill_diagonal_(torch.inf)
        else:
            update(columns, first, found.T)
        update(rows, second, found)
    return nearest


def _squared_distances(x, y):
    """(N, D), (M, D) → (N, M)."""
    norms = (x * x).sum(1)[:, None] + (y * y).sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_(min=0)


def _half_distances(x, y):
    """The same, every result rounded to float16, unless one of them is then not finite."""
    a = x.half().float()
    b = y.half().float()
    product = (a @ b.T).half()
    found = (a * a).sum(1).half()[:, None] - 2 * product + (b * b).sum(1).half()
    if found.isfinite().all():
        return found.float().clamp_(min=0)
    return _squared_distances(x, y)
