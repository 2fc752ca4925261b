"""Power-function averages of a network's weights, and the average of any width after the fact
(Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv:2312.02696, Sec. 3 and its appendix). It stands alone.

At step t, the average of exponent γ weighs the weights that step τ left by

    p(τ) = (γ + 1) τ^γ / t^(γ + 1),    0 < τ <= t,

which looks back over the same share of the run at any time. Its width σ_rel is p's standard
deviation divided by t. Training keeps a few of them and snapshots them; a sum of snapshots weighs
by the sum of their functions, and least squares finds the sum that comes nearest to any other."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

# of exponent 0, which weighs all steps alike; a wider average would favour the first ones
WIDEST = 1 / math.sqrt(12)
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}  # of snapshots
# how far a sum of snapshots may be from the p that it stands for (`mismatch`): every width from
# 0.01 to 0.27 is nearer, given 64 snapshots of widths 0.05 and 0.10
NEAR = 0.06


# ----------------------------------------------------------------------------- widths and exponents


def width(exponent: float) -> float:
    """σ_rel of exponent γ > -1: σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)) (Sec. 3.1)."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


def exponent(width: float) -> float:
    """γ of width σ_rel: the largest root of σ_rel² (γ + 2)² (γ + 3) = γ + 1.

    Raises ValueError unless 0 < σ_rel < 0.2887, so that γ > 0."""
    if not 0 < width < WIDEST:
        raise ValueError(f"width {width:g} is not between 0 and {WIDEST:.4f}")
    square = width**2
    roots = np.roots([square, 7 * square, 16 * square - 1, 12 * square - 1])
    return float(max(roots.real))


def decay(step: float, exponent: float, steps: float = 1) -> float:
    """β_t = (1 - Δ/t)^(γ + 1): the share of itself that the average keeps at step t, counted from
    1, after Δ `steps` since it was last updated. 0 when it never was (Δ = t)."""
    return (1 - steps / step) ** (exponent + 1)


# ------------------------------------------------------------------------------------ least squares


def inner(steps, exponents, others, other_exponents):
    """∫ p q of the weighings p and q that end at `steps` and `others` (float64 arrays, broadcast).

    With t the earlier end and T the later, of exponents γ and Γ,
    ∫_0^t (γ + 1) τ^γ / t^(γ + 1) · (Γ + 1) τ^Γ / T^(Γ + 1) dτ
    = (γ + 1) (Γ + 1) / (γ + Γ + 1) · (t / T)^Γ / T."""
    earlier = np.minimum(steps, others)
    later = np.maximum(steps, others)
    of_later = np.where(steps >= others, exponents, other_exponents)
    factors = (exponents + 1) * (other_exponents + 1) / (exponents + other_exponents + 1)
    return factors * (earlier / later) ** of_later / later


class Fit:
    """Sums of snapshots that come nearest to an average's p. `steps` and `exponents`: the
    snapshots', of any order; no two alike."""

    def __init__(self, steps: Sequence[float], exponents: Sequence[float]):
        self.steps = np.asarray(steps, np.float64)
        self.exponents = np.asarray(exponents, np.float64)
        products = inner(self.steps[:, None], self.exponents[:, None], self.steps, self.exponents)
        # each p divided by its norm: products of late and early ones differ by powers of ten
        self.norms = np.sqrt(np.diag(products))
        self.cosines = products / self.norms[:, None] / self.norms

    def coefficients(self, step: float, exponents) -> np.ndarray:
        """One a snapshot, of sum 1, for the average at `step` of `exponents` (a number, or several
        for as many columns): the c of least ‖Σ c_k p_k - p‖², divided by their sum.

        Its gradient is 0 where Σ_k ∫ p_i p_k c_k = ∫ p_i p for all i, a linear system. Raises
        ValueError if no snapshot is of a step up to `step`. Not numbers where the average gives no
        weight to any step up to the last snapshot."""
        if not (self.steps <= step).any():
            raise ValueError(f"no snapshot up to step {step:g}")
        found = np.linalg.solve(self.cosines, self._aims(step, exponents))
        found = (found.T / self.norms).T
        with np.errstate(invalid="ignore"):
            return found / found.sum(0)

    def mismatch(self, step: float, exponents) -> np.ndarray:
        """‖Σ c_k p_k - p‖ / ‖p‖ of these coefficients, one for each of `exponents`; infinite where
        they are no numbers."""
        aims = self._aims(step, exponents)
        found = (self.coefficients(step, exponents).T * self.norms).T
        squares = inner(float(step), exponents, float(step), exponents)
        errors = squares - 2 * (found * aims).sum(0) + (found * (self.cosines @ found)).sum(0)
        return np.nan_to_num(np.sqrt(np.maximum(0, errors) / squares), nan=np.inf)

    def _aims(self, step, exponents):
        """∫ p_i p / ‖p_i‖: (snapshots, exponents), or (snapshots) for one."""
        products = [
            inner(self.steps, self.exponents, float(step), one) for one in np.ravel(exponents)
        ]
        aims = np.stack(products, 1) / self.norms[:, None]
        return aims.reshape(len(self.steps), *np.shape(exponents))

    def span(self, step: float) -> tuple[float, float] | None:
        """The narrowest and the widest average at `step` that are near enough (NEAR), to a
        thousandth, or None."""
        widths = np.arange(1, math.ceil(1000 * WIDEST)) / 1000
        mismatches = self.mismatch(step, np.array([exponent(one) for one in widths]))
        near = widths[mismatches <= NEAR]
        if not near.size:
            return None
        return float(near[0]), float(near[-1])


def coefficients(
    steps: Sequence[float], exponents: Sequence[float], step: float, exponent: float
) -> np.ndarray:
    """`Fit.coefficients` of snapshots at `steps` of `exponents`."""
    return Fit(steps, exponents).coefficients(step, exponent)


# -------------------------------------------------------------------------------------- in training


class Averages:
    """Power-function averages of `tensors` (name → tensor, which change in place), one of each of
    `widths`, float32 or as the tensors are, on their device."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], widths: Sequence[float]):
        self.tensors = dict(tensors)
        self.exponents = {one: exponent(one) for one in widths}
        self.held = {}
        for one in self.exponents:
            self.held[one] = {name: t.detach().clone() for name, t in self.tensors.items()}

    def __getitem__(self, width: float) -> dict[str, torch.Tensor]:
        """The average of a width, name → tensor."""
        return self.held[width]

    @torch.no_grad()
    def update(self, step: int, skipped: torch.Tensor | float = 0.0, steps: int = 1):
        """Take in what the tensors hold after `step`, counted from 1, and `steps` since the last
        update. `skipped`: 1 where the step was none, a tensor on the device or a number; then
        nothing changes.

        Three kernels (or few, by the number of tensors) for each width, whose difference takes the
        room that the gradients have left."""
        for one, average in self.held.items():
            weight = (1 - decay(step, self.exponents[one], steps)) * (1 - skipped)
            values = list(average.values())
            differences = torch._foreach_sub([self.tensors[name] for name in average], values)
            torch._foreach_mul_(differences, weight)
            torch._foreach_add_(values, differences)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that changes, under the names "width/name"."""
        found = {}
        for one, average in self.held.items():
            for name, tensor in average.items():
                found[f"{one}/{name}"] = tensor
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]):
        """Take what `state` gave. Raises ValueError if it is of other widths or tensors."""
        mine = self.state()
        alone = sorted(mine.keys() ^ state.keys())
        if alone:
            raise ValueError(f"{alone[0]} is held by one of the two alone")
        for name, tensor in mine.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])


def narrowed(tensors: Mapping[str, torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
    """Tensors on the CPU in one of PRECISIONS. Raises ValueError if a value is beyond it."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.detach().to("cpu", PRECISIONS[precision])
        if tensor.isfinite().all() and not found[name].isfinite().all():
            raise ValueError(f"{name} holds values beyond {precision}")
    return found


# --------------------------------------------------------------------------------------- afterwards


@torch.no_grad()
def combine(
    snapshots: Iterable[Callable[[], Mapping[str, torch.Tensor]]], coefficients: Sequence[float]
) -> dict[str, torch.Tensor]:
    """Σ c_k · snapshot k, float32. Each of `snapshots` is a function that reads one (name → CPU
    tensor, float32 or float16). They are held one at a time and summed in float64: 8 bytes a
    parameter beside the one, whatever their number.

    Raises ValueError for snapshots of unlike names or of another precision: bfloat16's rounding is
    as large as what tells one average from the next."""
    total = {}
    for read, coefficient in zip(snapshots, coefficients, strict=True):
        _add(total, read(), float(coefficient))
    for name in total:
        total[name] = total[name].float()
    return total


def _add(total, snapshot, coefficient):
    if total and total.keys() != snapshot.keys():
        raise ValueError("these snapshots don't hold the same tensors")
    for name, tensor in snapshot.items():
        if tensor.dtype not in PRECISIONS.values():
            raise ValueError(f"{name} is {tensor.dtype}, neither float32 nor float16")
        if name not in total:
            total[name] = torch.zeros_like(tensor, dtype=torch.float64)
        total[name].add_(tensor, alpha=coefficient)
