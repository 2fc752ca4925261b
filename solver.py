"""The diffusion around the network: noise schedules, multi-scale loss, guidance and DPM-Solver.

x_t = α(t)·x_0 + σ(t)·ε with α² + σ² = 1 and λ = log(α/σ), half the log SNR. The network predicts ε;
time runs from t = 1 (noise) down towards 0 (data). Steps are network evaluations (NFE), one even
when guidance runs the network on two batches. Schedules work in float64 on the CPU: their values
are a handful of scalars per step.

DPM-Solver: arXiv:2206.00927 (noise prediction). DPM-Solver++: arXiv:2211.01095 (data
prediction)."""

import dataclasses
import math

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------- schedules


def _float64(value):
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


class Schedule:
    """A noise schedule. Methods take times t (numbers or CPU tensors) and return float64 tensors of
    that shape.

    A subclass gives `log_alpha`, its inverse `t_of_log_alpha`, `tau` (the network's time), `draw`
    (training times from uniform numbers) and `t_end`, where sampling stops."""

    t_end: float

    def alpha(self, t):
        return self.log_alpha(t).exp()

    def sigma(self, t):
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def lam(self, t):
        return self.log_alpha(t) - self.sigma(t).log()

    def t_of_lam(self, lam):
        return self.t_of_log_alpha(-F.softplus(-2 * _float64(lam), threshold=100) / 2)

    def noised(self, x0, noise, t):
        """Forward noising: α(t)·x0 + σ(t)·ε for x0 and noise (B, C, H, W) on any device and t (B,)
        on the CPU."""
        alpha, sigma = (
            v.to(x0.dtype).to(x0.device, non_blocking=True)[:, None, None, None]
            for v in (self.alpha(t), self.sigma(t))
        )
        return alpha * x0 + sigma * noise


class Linear(Schedule):
    """Pixel models: the continuous VP SDE with β(t) = 0.1 + 19.9 t; τ = log SNR / 4, SNR clamped to
    [1e-12, 1e6]."""

    t_end = 1e-4

    def log_alpha(self, t):
        t = _float64(t)
        return -(0.1 * t + 9.95 * t**2) / 2

    def t_of_log_alpha(self, log_alpha):
        return -2 * log_alpha / (0.05 + (0.05**2 - 4 * 4.975 * log_alpha).sqrt())

    def tau(self, t):
        return (2 * self.lam(t)).clamp(math.log(1e-12), math.log(1e6)) / 4

    def draw(self, uniform):
        return _float64(uniform)


class ScaledLinear(Schedule):
    """Latent models: Stable Diffusion's 1000 discrete steps n, β_n = linspace(√0.00085, √0.012,
    1000)².

    log α = ½ log ᾱ_n at t = n/1000, linear in t between these knots and along the outermost segment
    beyond them. τ = n/500 − 1 = 2t − 1. `betas` may be given, float64 (1000,)."""

    t_end = 1e-3

    def __init__(self, betas=None):
        if betas is None:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.knots_t = torch.arange(1, len(betas) + 1, dtype=torch.float64) / len(betas)
        self.knots_log_alpha = torch.log1p(-_float64(betas)).cumsum(0) / 2

    def log_alpha(self, t):
        return _interpolate(_float64(t), self.knots_t, self.knots_log_alpha)

    def t_of_log_alpha(self, log_alpha):
        return _interpolate(log_alpha, self.knots_log_alpha.flip(0), self.knots_t.flip(0))

    def tau(self, t):
        return 2 * _float64(t) - 1

    def draw(self, uniform):
        n = len(self.knots_t)
        return ((_float64(uniform) * n).floor() + 1) / n


def _interpolate(x, knots_x, knots_y):
    """Piecewise linear through the knots (`knots_x` ascending), extended along the first and last
    segment."""
    i = torch.searchsorted(knots_x, x.contiguous()).clamp(1, len(knots_x) - 1)
    x0, x1, y0, y1 = knots_x[i - 1], knots_x[i], knots_y[i - 1], knots_y[i]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


SCHEDULES = {"pixel": Linear, "latent": ScaledLinear}


# --------------------------------------------------------------------------------------------- loss

TARGET_SCALES = {"unit": lambda k: float(k), "mean": lambda k: 1.0}


def multi_scale_loss(predictions, noise, target_scale="unit"):
    """The multi-scale loss (paper, Sec. 4.3, eq. 8): Σ_r α_r · mean((D_r(ε) − ε̂_r)²), α_r = 1/k²,
    k = 2^(R−r).

    `predictions`: R tensors (B, C, H/k, W/k), coarse to fine; `noise`: (B, C, H, W). D_r averages k
    × k cells; "unit" multiplies by k, so that the target keeps unit variance (the release, and the
    published numbers), "mean" is the paper's literal reading. Returns float32 per-sample losses:
    their weighted sum (B,), and each branch's own (R, B)."""
    branches, total = [], 0
    for prediction in predictions:
        k = noise.shape[-1] // prediction.shape[-1]
        target = F.avg_pool2d(noise, k) * TARGET_SCALES[target_scale](k) if k > 1 else noise
        branches.append((target.float() - prediction.float()).square().flatten(1).mean(1))
        total = total + branches[-1] / k**2
    return total, torch.stack(branches)


# ----------------------------------------------------------------------------------------- guidance


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance ε = ε_u + s·(ε_c − ε_u), s ≥ 1, 1 meaning none.

    `power` p makes s power-cosine in time, 1 + (scale − 1)·(1 − cos(π·(1 − t)^p))/2. `interval`
    (low, high) limits it to noise levels low < σ/α ≤ high (arXiv:2404.07724). Raises ValueError for
    values that make no sense."""

    scale: float = 1.0
    power: float | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        if not 1 <= self.scale < math.inf:
            raise ValueError(
                f"guidance scale {self.scale:g} is not at least 1 (1 = none); U-ViT and "
                "the DiMR release write the excess "
                f"over 1, so their 0.4 is 1.4 here"
            )
        if self.power is not None and not 0 < self.power < math.inf:
            raise ValueError(f"guidance power {self.power:g} is not above 0")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"guidance interval {self.interval} is not 0 <= low < high (values of sigma/alpha)"
            )

    def at(self, schedule, t):
        """The scale s at time t, a float."""
        if self.interval is not None:
            low, high = self.interval
            if not low < math.exp(-schedule.lam(t)) <= high:
                return 1.0
        if self.power is None:
            return self.scale
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * (1 - float(t)) ** self.power)) / 2


def denoiser(model, schedule, y, guidance=Guidance()):
    """The function (x (B, C, H, W), t) → ε that the solvers take, for class indices y (B,).

    Where guidance is on, conditional and unconditional run as one batch; where s = 1, the
    conditional alone. Raises ValueError if guidance is asked of a network without a null class."""
    if guidance.scale > 1 and not model.config.null_class:
        raise ValueError(
            "this network has no null class (it was trained without label dropout), so "
            "it can't be guided; "
            "use a guidance scale of 1"
        )
    both = torch.cat([y, torch.full_like(y, model.config.embeddings - 1)])

    def noise(x, t):
        tau = torch.full((1,), float(schedule.tau(t)), device=x.device)
        scale = guidance.at(schedule, t)
        if scale == 1:
            return model(x, tau, y)[-1].to(x.dtype)
        conditional, unconditional = model(torch.cat([x, x]), tau, both)[-1].to(x.dtype).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return noise


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
