"""Solvers: from noise to data in few network evaluations (NFE). They stand alone.

x_t = α(t)·x_0 + σ(t)·ε, λ = log(α/σ); time runs from t = 1 (noise) down towards 0 (data). A solver
is a function

    solve(denoise, x, times, schedule, *, draw, callback) → x at the last time

where `denoise(x, t)` gives (x_0, ε) for x (B, …) at a float t, `times` is a list with the times of
each update, from its first to its last, and `schedule` knows α, σ and λ (diffusion.py). A
stochastic one draws `draw(k)`, standard normal like x, in update k. `callback(evaluations, x)`
follows each update.

DPM-Solver: arXiv:2206.00927 (noise prediction). DPM-Solver++: arXiv:2211.01095 (data prediction).
Heun's method: arXiv:2206.00364, algorithm 1. Ancestral sampling: arXiv:2006.11239, eq. 7; with a
learned variance: arXiv:2102.09672, eq. 15. The SDE: arXiv:2401.08740, Sec. 2.3."""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

# ------------------------------------------------------------------------- DPM-Solver, DPM-Solver++


class _Nodes:
    """Coefficients at times ts, as floats, for updates of the form x_t = ratio·x_s −
    weight_t·(φ₁·m₀ + …), φ₁ = e^κ − 1, where m is the model's prediction and κ = −h for data
    prediction, h for noise prediction, h = λ_t − λ_s. One form serves both DPM-Solver and
    DPM-Solver++."""

    def __init__(self, denoise, schedule, data, ts):
        self.denoise = denoise
        self.data = data
        self.ts = ts.tolist()
        self.lam = schedule.lam(ts).tolist()
        alpha, sigma = schedule.alpha(ts).tolist(), schedule.sigma(ts).tolist()
        self.carry, self.weight = (sigma, alpha) if data else (alpha, sigma)

    def predict(self, x, i):
        x0, noise = self.denoise(x, self.ts[i])
        return x0 if self.data else noise

    def kappa(self, s, t):
        h = self.lam[t] - self.lam[s]
        return -h if self.data else h

    def update(self, x, s, t, correction):
        return self.carry[t] / self.carry[s] * x - self.weight[t] * correction


def singlestep(denoise, x, times, schedule, *, data, draw=None, callback=None):
    """Each update evaluates the network at all of its times but the last; its order is their number
    (DPM-Solver, algorithms 1 and 2). `data` predicts x_0 (DPM-Solver++), else ε (DPM-Solver)."""
    evaluations = 0
    for ts in times:
        x = _singlestep_update(_Nodes(denoise, schedule, data, ts), x, order=len(ts) - 1)
        evaluations += len(ts) - 1
        if callback:
            callback(evaluations, x)
    return x


def _singlestep_update(n, x, order):
    kappa = n.kappa(0, order)
    m0 = n.predict(x, 0)
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


def multistep(denoise, x, times, schedule, *, order, data, draw=None, callback=None, history=()):
    """One evaluation per update, with differences of earlier ones (DPM-Solver++, algorithm 2, and
    its third order).

    The third order integrates the parabola through three predictions exactly; the DPM-Solver
    authors' code and those that follow it halve its curvature term, which makes theirs of order 2.

    The first updates have the order their `history` allows (predictions before the first time, as
    (λ, m) pairs, newest last), and below 15 steps the last ones fall back to lower orders too, for
    stability."""
    ts = torch.stack([*(span[0] for span in times), times[-1][-1]])
    n = _Nodes(denoise, schedule, data, ts)
    steps = len(times)
    known = list(history)
    for i in range(steps):
        m0 = n.predict(x, i)
        allowed = min(order, len(known) + 1)
        if steps < 15:
            allowed = min(allowed, steps - i)
        kappa = n.kappa(i, i + 1)
        h = n.lam[i + 1] - n.lam[i]
        correction = math.expm1(kappa) * m0
        if allowed > 1:
            lam1, m1 = known[-1]
            r0 = (n.lam[i] - lam1) / h
            d0 = (m0 - m1) / r0
        if allowed == 2:
            correction = correction + math.expm1(kappa) / 2 * d0
        if allowed == 3:
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


# --------------------------------------------------------------- in α and σ: Euler, Heun, ancestral


def _ends(schedule, span):
    """(t, α, σ) at the first and at the last time of an update, as floats."""
    return [
        (float(t), float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (span[0], span[-1])
    ]


def euler(denoise, x, times, schedule, *, draw=None, callback=None):
    """dx = x_0·dα + ε·dσ with x_0 and ε held over the update: Euler's method on the straight path,
    DDIM (arXiv:2010.02502) where α² + σ² = 1."""
    for i, span in enumerate(times):
        (s, alpha_s, sigma_s), (_, alpha_t, sigma_t) = _ends(schedule, span)
        x0, eps = denoise(x, s)
        x = x + (alpha_t - alpha_s) * x0 + (sigma_t - sigma_s) * eps
        if callback:
            callback(i + 1, x)
    return x


def heun(denoise, x, times, schedule, *, draw=None, callback=None):
    """Euler's update, then once more with the mean of both ends' x_0 and ε: order 2, two
    evaluations an update."""
    for i, span in enumerate(times):
        (s, alpha_s, sigma_s), (t, alpha_t, sigma_t) = _ends(schedule, span)
        x0, eps = denoise(x, s)
        guess = x + (alpha_t - alpha_s) * x0 + (sigma_t - sigma_s) * eps
        x0_t, eps_t = denoise(guess, t)
        x = x + (alpha_t - alpha_s) * (x0 + x0_t) / 2 + (sigma_t - sigma_s) * (eps + eps_t) / 2
        if callback:
            callback(2 * (i + 1), x)
    return x


def ancestral(denoise, x, times, schedule, *, draw, callback=None):
    """x_t drawn from the forward process' posterior given x_s and the predicted x_0: DDPM's
    sampler, with the smaller of its two variances, on any times and any schedule."""
    for i, span in enumerate(times):
        (s, alpha_s, sigma_s), (_, alpha_t, sigma_t) = _ends(schedule, span)
        x0, eps = denoise(x, s)
        ratio = alpha_s * sigma_t / (alpha_t * sigma_s)
        kept = sigma_t * ratio
        fresh = sigma_t * math.sqrt(max(0.0, 1 - ratio**2))
        x = alpha_t * x0 + kept * eps + fresh * draw(i)
        if callback:
            callback(i + 1, x)
    return x


def ddpm(denoise, x, times, schedule, *, draw, callback=None):
    """DDPM's sampler with a learned variance, which is DiT's: `denoise` gives (x_0, ε, v), where v
    (B, …) from −1 to 1 interpolates log σ² between the posterior's variance and β. The last update
    takes no noise: it returns its mean, x_0."""
    for i, span in enumerate(times):
        x0, _, v = denoise(x, float(span[0]))
        if i + 1 == len(times):
            x = x0
        else:
            here, after = (float(schedule.alpha(t)) ** 2 for t in span)
            beta = 1 - here / after
            from_x0 = after**0.5 * beta / (1 - here)
            from_x = (1 - beta) ** 0.5 * (1 - after) / (1 - here)
            low = math.log(beta * (1 - after) / (1 - here))
            log_variance = low + (v + 1) / 2 * (math.log(beta) - low)
            x = from_x0 * x0 + from_x * x + (log_variance / 2).exp() * draw(i)
        if callback:
            callback(i + 1, x)
    return x


def sde(denoise, x, times, schedule, *, draw, callback=None):
    """Euler and Maruyama's method along the reverse SDE whose diffusion coefficient is σ, SiT's
    sampler: the velocity, σ times the score −ε/σ, and noise of variance 2σ·|dσ|. The last update
    takes no noise: it returns its mean."""
    for i, span in enumerate(times):
        (s, alpha_s, sigma_s), (_, alpha_t, sigma_t) = _ends(schedule, span)
        x0, eps = denoise(x, s)
        x = x + (alpha_t - alpha_s) * x0 + 2 * (sigma_t - sigma_s) * eps
        if i + 1 < len(times):
            x = x + math.sqrt(2 * sigma_s * (sigma_s - sigma_t)) * draw(i)
        if callback:
            callback(i + 1, x)
    return x


# --------------------------------------------------------------------------------------- the tables


def repeated(order, steps):
    """Evaluations of each update of a solver that always takes `order`: steps/order times."""
    if steps % order:
        below = steps // order * order
        near = " or ".join(str(n) for n in (below, below + order) if n)
        raise ValueError(
            f"{steps} steps do not divide into updates of {order} evaluations; use {near}, or a "
            "solver that takes any number, such as 2m or fast"
        )
    return [order] * (steps // order)


def fast(steps):
    """⌊steps/3⌋ + 1 updates of order 3, …, 3 ending in (2, 1), (1) or (2) for steps mod 3 = 0, 1, 2
    (DPM-Solver, App. D.3: "fast")."""
    remainder = steps % 3
    if remainder == 0:
        return [3] * (steps // 3 - 1) + [2, 1]
    return [3] * (steps // 3) + [remainder]


def ddpm_updates(steps):
    """One evaluation each, of DDPM's 1000 steps."""
    if not 2 <= steps <= 1000:
        raise ValueError(f"{steps} steps of DDPM are not between 2 and 1000")
    return [1] * steps


def ddpm_times(steps, start, end):
    """From t = (n + 1)/1000 of n = 999 … 0, evenly spaced from end to end and rounded as DiT's
    release does, which adds up the stride; then to 0."""
    exact, ns = 0.0, []
    for _ in range(steps):
        ns.append(round(exact))
        exact += 999 / (steps - 1)
    points = torch.tensor([-1, *ns], dtype=torch.float64).flip(0) + 1
    return list((points / 1000).unfold(0, 2, 1))


LAST_STEP = 0.04  # of t, SiT's


def sde_times(steps, start, end):
    """Equal steps from `start` on, and a last one of LAST_STEP to `end`."""
    points = torch.linspace(start, end + LAST_STEP, steps, dtype=torch.float64)
    points = torch.cat([points, torch.tensor([end], dtype=torch.float64)])
    return list(points.unfold(0, 2, 1))


@dataclasses.dataclass(frozen=True)
class Solver:
    """`updates(steps)` lists the evaluations of each update, their sum being `steps` (NFE), or
    raises ValueError. `in_lam`: whether its equations need λ to be finite at both ends.
    `stochastic`: whether it draws noise. `times(steps, start, end)`: those of each update where it
    lays them itself, whatever the grid. `learned_variance`: whether it takes the network's."""

    solve: Callable
    updates: Callable[[int], list[int]]
    in_lam: bool = True
    stochastic: bool = False
    times: Callable | None = None
    learned_variance: bool = False


def _row(solve, updates, **options):
    return Solver(functools.partial(solve, **options), updates)


_ONE, _TWO, _THREE = (functools.partial(repeated, order) for order in (1, 2, 3))

SOLVERS = {
    "1s": _row(singlestep, _ONE, data=True),
    "2s": _row(singlestep, _TWO, data=True),
    "3s": _row(singlestep, _THREE, data=True),
    "fast": _row(singlestep, fast, data=True),
    "2m": _row(multistep, _ONE, order=2, data=True),
    "3m": _row(multistep, _ONE, order=3, data=True),
    "dpm-1s": _row(singlestep, _ONE, data=False),
    "dpm-2s": _row(singlestep, _TWO, data=False),
    "dpm-3s": _row(singlestep, _THREE, data=False),
    "dpm-fast": _row(singlestep, fast, data=False),
    "dpm-2m": _row(multistep, _ONE, order=2, data=False),
    "dpm-3m": _row(multistep, _ONE, order=3, data=False),
    "euler": Solver(euler, _ONE, in_lam=False),
    "heun": Solver(heun, _TWO, in_lam=False),
    "ancestral": Solver(ancestral, _ONE, stochastic=True),
    "ddpm": Solver(
        ddpm, ddpm_updates, in_lam=False, stochastic=True, times=ddpm_times, learned_variance=True
    ),
    "sde": Solver(sde, _ONE, in_lam=False, stochastic=True, times=sde_times),
}


def _time(schedule, start, end, cells):
    return torch.linspace(start, end, cells + 1, dtype=torch.float64)


def _quadratic(schedule, start, end, cells):
    return torch.linspace(start**0.5, end**0.5, cells + 1, dtype=torch.float64) ** 2


def _logsnr(schedule, start, end, cells):
    first, last = float(schedule.lam(start)), float(schedule.lam(end))
    ts = schedule.t_of_lam(torch.linspace(first, last, cells + 1, dtype=torch.float64))
    ts[0] = start
    ts[-1] = end
    return ts


GRIDS = {"time": _time, "quadratic": _quadratic, "logsnr": _logsnr}


def lay_times(schedule, updates, grid, start, end):
    """The times of each update, float64 tensors of one more than its evaluations, from `start` to
    `end`."""
    points = GRIDS[grid]
    times = []
    if grid == "logsnr":  # updates uniform in λ whatever their order, inner times uniform within
        outer = points(schedule, start, end, len(updates)).tolist()
        for s, t, cells in zip(outer[:-1], outer[1:], updates, strict=True):
            times.append(points(schedule, s, t, cells))
        return times
    # an update of k evaluations spans k cells of one grid, whose points are its inner times
    fine = points(schedule, start, end, sum(updates))
    first = 0
    for cells in updates:
        times.append(fine[first : first + cells + 1])
        first += cells
    return times


@torch.no_grad()
def sample(
    denoise,
    x,
    schedule,
    steps,
    solver="2m",
    grid="time",
    *,
    start=None,
    end=None,
    draw=None,
    callback=None,
):
    """Solve the reverse process from t = `start` to `end` (by default the schedule's `t_start` and
    `t_end`).

    `denoise(x, t)` gives (x_0, ε) (see diffusion.denoiser) for x (B, …) at a float t, and the
    learned variance where the solver takes it; `steps` is the NFE; `solver` a key of SOLVERS,
    `grid` of GRIDS; `draw(k)` what a stochastic solver draws in update k. Returns x at `end`: no
    thresholding, no final denoising step. `callback(evaluations, x)` follows each update. Raises
    ValueError for steps < 1 or steps that the solver can't divide, and for a stochastic solver
    without noise."""
    if steps < 1:
        raise ValueError(f"steps {steps} is not at least 1")
    row = SOLVERS[solver]
    if row.stochastic and draw is None:
        raise ValueError(f"solver {solver} draws noise; give `draw`")
    start = schedule.t_start if start is None else start
    end = schedule.t_end if end is None else end
    updates = row.updates(steps)
    if row.times:
        times = row.times(steps, start, end)
    else:
        times = lay_times(schedule, updates, grid, start, end)
    return row.solve(denoise, x, times, schedule, draw=draw, callback=callback)
