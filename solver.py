"""DPM-Solver and DPM-Solver++: from noise to data in few network evaluations. It stands alone.

x_t = α(t)·x_0 + σ(t)·ε, λ = log(α/σ); time runs from t = 1 (noise) down towards 0 (data). Steps are
network evaluations (NFE), one even when guidance runs the network on two batches.

DPM-Solver: arXiv:2206.00927 (noise prediction). DPM-Solver++: arXiv:2211.01095 (data
prediction)."""

import dataclasses
import math

import torch

# ------------------------------------------------------------------------------------------ solvers


@dataclasses.dataclass(frozen=True)
class Solver:
    """`multistep` reuses earlier evaluations; singlestep takes `order` evaluations per step. `data`
    predicts x_0 (DPM-Solver++) instead of ε (DPM-Solver). `fast` ends a singlestep of order k on
    lower ones, to use any NFE."""

    order: int
    multistep: bool = False
    fast: bool = False
    data: bool = True


_SHAPES = {
    "1s": dict(order=1),
    "2s": dict(order=2),
    "3s": dict(order=3),
    "fast": dict(order=3, fast=True),
    "2m": dict(order=2, multistep=True),
    "3m": dict(order=3, multistep=True),
}
SOLVERS = {
    f"{prefix}{name}": Solver(**shape, data=data)
    for prefix, data in (("", True), ("dpm-", False))
    for name, shape in _SHAPES.items()
}


def _time(schedule, start, end, cells):
    return torch.linspace(start, end, cells + 1, dtype=torch.float64)


def _quadratic(schedule, start, end, cells):
    return torch.linspace(start**0.5, end**0.5, cells + 1, dtype=torch.float64) ** 2


def _logsnr(schedule, start, end, cells):
    lam = schedule.t_of_lam(
        torch.linspace(
            float(schedule.lam(start)), float(schedule.lam(end)), cells + 1, dtype=torch.float64
        )
    )
    lam[0], lam[-1] = start, end
    return lam


GRIDS = {"time": _time, "quadratic": _quadratic, "logsnr": _logsnr}


def orders(steps, solver):
    """Orders of a singlestep solver's updates, their sum being `steps` (NFE). Raises ValueError if
    they can't be.

    fast: ⌊steps/3⌋ + 1 updates of order 3, …, 3 ending in (2, 1), (1) or (2) for steps mod 3 = 0,
    1, 2."""
    k = solver.order
    if solver.fast:
        return [3] * (steps // 3 - (steps % 3 == 0)) + {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
    if steps % k:
        near = " or ".join(str(n) for n in (steps // k * k, (steps // k + 1) * k) if n)
        raise ValueError(
            f"{steps} steps do not divide into updates of order {k}; use {near}, or the "
            "solver 'fast'"
        )
    return [k] * (steps // k)


@torch.no_grad()
def sample(noise, x, schedule, steps, solver="2m", grid="time", start=1.0, end=None, callback=None):
    """Solve the probability-flow ODE from t = `start` to `end` (the schedule's `t_end` by default).

    `noise(x, t)` predicts ε (see `denoiser`) for x (B, …) at a float t; `steps` is the NFE;
    `solver` a key of SOLVERS, `grid` of GRIDS. Returns x at `end`: no thresholding, no final
    denoising step. `callback(evaluations, x)` follows each update. Raises ValueError for steps < 1
    or steps a fixed-order solver can't divide."""
    if steps < 1:
        raise ValueError(f"steps {steps} is not at least 1")
    method, points = SOLVERS[solver], GRIDS[grid]
    end = schedule.t_end if end is None else end
    if method.multistep:
        return _multistep(noise, x, schedule, method, points(schedule, start, end, steps), callback)
    counts = orders(steps, method)
    if (
        grid == "logsnr"
    ):  # updates uniform in λ whatever their order, inner nodes uniform within each
        outer = points(schedule, start, end, len(counts))
        spans = [
            points(schedule, float(s), float(t), k)
            for s, t, k in zip(outer[:-1], outer[1:], counts, strict=True)
        ]
    else:  # an update of order k spans k cells of one grid, whose points are its inner nodes
        fine, first = points(schedule, start, end, steps), 0
        spans = []
        for k in counts:
            spans.append(fine[first : first + k + 1])
            first += k
    evaluations = 0
    for ts in spans:
        x = _singlestep(noise, x, schedule, method, ts)
        evaluations += len(ts) - 1
        if callback:
            callback(evaluations, x)
    return x


class _Nodes:
    """Coefficients at times ts, as floats, for updates of the form x_t = ratio·x_s −
    weight_t·(φ₁·m₀ + …), φ₁ = e^κ − 1, where m is the model's prediction and κ = −h for data
    prediction, h for noise prediction, h = λ_t − λ_s. One form serves both DPM-Solver and
    DPM-Solver++."""

    def __init__(self, noise, schedule, method, ts):
        self.noise, self.data, self.ts = noise, method.data, ts.tolist()
        self.alpha, self.sigma, self.lam = (
            f(ts).tolist() for f in (schedule.alpha, schedule.sigma, schedule.lam)
        )
        self.carry, self.weight = (
            (self.sigma, self.alpha) if self.data else (self.alpha, self.sigma)
        )

    def predict(self, x, i):
        epsilon = self.noise(x, self.ts[i])
        return (x - self.sigma[i] * epsilon) / self.alpha[i] if self.data else epsilon

    def kappa(self, s, t):
        return (self.lam[s] - self.lam[t]) if self.data else (self.lam[t] - self.lam[s])

    def update(self, x, s, t, correction):
        return self.carry[t] / self.carry[s] * x - self.weight[t] * correction


def _singlestep(noise, x, schedule, method, ts):
    """One update over `ts` = s, its inner nodes, t; its order is len(ts) − 1 (DPM-Solver,
    algorithms 1 and 2)."""
    n, order = _Nodes(noise, schedule, method, ts), len(ts) - 1
    kappa, m0 = n.kappa(0, order), n.predict(x, 0)
    correction = math.expm1(kappa) * m0
    if order > 1:
        r1 = n.kappa(0, 1) / kappa
        m1 = n.predict(n.update(x, 0, 1, math.expm1(r1 * kappa) * m0), 1)
    if order == 2:
        correction = correction + math.expm1(kappa) / (2 * r1) * (m1 - m0)
    if order == 3:
        r2 = n.kappa(0, 2) / kappa
        inner = math.expm1(r2 * kappa) * m0 + r2 / r1 * _psi2(r2 * kappa) * (m1 - m0)
        m2 = n.predict(n.update(x, 0, 2, inner), 2)
        correction = correction + _psi2(kappa) / r2 * (m2 - m0)
    return n.update(x, 0, order, correction)


def _psi2(kappa):
    return math.expm1(kappa) / kappa - 1


def _multistep(noise, x, schedule, method, ts, callback=None, history=()):
    """One evaluation per update, with differences of earlier ones (DPM-Solver++, algorithm 2, and
    its third order).

    The third order integrates the parabola through three predictions exactly; the DPM-Solver
    authors' code and those that follow it halve its curvature term, which makes theirs of order 2.

    The first updates have the order their `history` allows (predictions before ts[0], as (λ, m)
    pairs, newest last), and below 15 steps the last ones fall back to lower orders too, for
    stability."""
    n, steps, known = _Nodes(noise, schedule, method, ts), len(ts) - 1, list(history)
    for i in range(steps):
        m0 = n.predict(x, i)
        order = min(method.order, len(known) + 1, steps - i if steps < 15 else method.order)
        kappa = n.kappa(i, i + 1)
        h = n.lam[i + 1] - n.lam[i]
        correction = math.expm1(kappa) * m0
        if order > 1:
            lam1, m1 = known[-1]
            r0 = (n.lam[i] - lam1) / h
            d0 = (m0 - m1) / r0
        if order == 2:
            correction = correction + math.expm1(kappa) / 2 * d0
        if order == 3:
            lam2, m2 = known[-2]
            r1 = (lam1 - lam2) / h
            d1 = (m1 - m2) / r1
            bend = (d0 - d1) / (r0 + r1)
            psi2 = _psi2(kappa)
            correction = correction + psi2 * (d0 + r0 * bend) + (2 * psi2 / kappa - 1) * bend
        x = n.update(x, i, i + 1, correction)
        known = [*known, (n.lam[i], m0)][-2:]
        if callback:
            callback(i + 1, x)
    return x
