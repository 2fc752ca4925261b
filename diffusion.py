"""The diffusion around the network: noise schedules, objectives, multi-scale loss, guidance. It
stands alone.

x_t = α(t)·x_0 + σ(t)·ε and λ = log(α/σ), half the log SNR; time runs from t = 1 (noise) down
towards 0 (data). An objective says what the network predicts, and turns it into (x_0, ε); loss,
guidance and solvers know nothing else of it. Schedules work in float64 on the CPU: their values are
a handful of scalars per step."""

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------- schedules


def _float64(value):
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


class Schedule:
    """A noise schedule. Methods take times t (numbers or CPU tensors) and return float64 tensors of
    that shape.

    A subclass gives `alpha`, `sigma`, `t_of_lam` (the inverse of `lam`), `tau` (time as a network
    with TD-LN takes it) and `draw` (training times from uniform numbers in [0, 1)). Solvers run
    from `t_start` to `t_end`, between which λ is finite."""

    t_start = 1.0
    t_end: float

    def lam(self, t):
        return self.alpha(t).log() - self.sigma(t).log()

    def noised(self, x0, noise, t):
        """Forward noising: α(t)·x0 + σ(t)·ε for x0 and noise (B, C, H, W) on any device and t (B,)
        on the CPU."""

        def on_device(values):
            return values.to(x0.dtype).to(x0.device, non_blocking=True)[:, None, None, None]

        return on_device(self.alpha(t)) * x0 + on_device(self.sigma(t)) * noise


class VariancePreserving(Schedule):
    """α² + σ² = 1. A subclass gives `log_alpha` and its inverse `t_of_log_alpha`."""

    def alpha(self, t):
        return self.log_alpha(t).exp()

    def sigma(self, t):
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def lam(self, t):
        return self.log_alpha(t) - self.sigma(t).log()

    def t_of_lam(self, lam):
        return self.t_of_log_alpha(-F.softplus(-2 * _float64(lam), threshold=100) / 2)


class Linear(VariancePreserving):
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


class Discrete(VariancePreserving):
    """Steps n = 1, 2, … of given `betas`, float64 (N,), as in DDPM: log α = ½ log ᾱ_n at t = n/N,
    linear in t between these knots and along the outermost segment beyond them. τ = 2t − 1."""

    t_end = 1e-3

    def __init__(self, betas):
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


class ScaledLinear(Discrete):
    """Latent models: Stable Diffusion's 1000 steps, β_n = linspace(√0.00085, √0.012, 1000)²."""

    def __init__(self):
        super().__init__(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)


class LinearBetas(Discrete):
    """DiT's 1000 steps, as DDPM has them: β_n from 1e-4 to 0.02."""

    def __init__(self):
        super().__init__(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


def _interpolate(x, knots_x, knots_y):
    """Piecewise linear through the knots (`knots_x` ascending), extended along the first and last
    segment."""
    i = torch.searchsorted(knots_x, x.contiguous()).clamp(1, len(knots_x) - 1)
    rise = knots_y[i] - knots_y[i - 1]
    run = knots_x[i] - knots_x[i - 1]
    return knots_y[i - 1] + (x - knots_x[i - 1]) * rise / run


class Straight(Schedule):
    """The straight path of SiT (arXiv:2401.08740) and rectified flow: α = 1 − t, σ = t; τ = 2t − 1.
    SiT's own time is 1 − t."""

    t_start = 0.999
    t_end = 0.001

    def alpha(self, t):
        return 1 - _float64(t)

    def sigma(self, t):
        return _float64(t)

    def t_of_lam(self, lam):
        return torch.sigmoid(-_float64(lam))

    def tau(self, t):
        return 2 * _float64(t) - 1

    def draw(self, uniform):
        return _float64(uniform)


SCHEDULES = {
    "linear": Linear,
    "scaled_linear": ScaledLinear,
    "ddpm": LinearBetas,
    "straight": Straight,
}


# --------------------------------------------------------------------------------------- objectives


class Prediction(NamedTuple):
    """What a network's output says of the image and of the noise in it, both like x (B, …)."""

    x0: torch.Tensor
    noise: torch.Tensor


class Epsilon:
    """The noise ε (DDPM; the paper)."""

    needs_alpha = True  # where α = 0, ε says nothing of x_0

    @staticmethod
    def target(x0, noise):
        return noise

    @staticmethod
    def split(output, x, alpha, sigma):
        return Prediction((x - sigma * output) / alpha, output)


class Velocity:
    """x_0 − ε: on the straight path the velocity towards the data, as SiT trains it."""

    needs_alpha = False

    @staticmethod
    def target(x0, noise):
        return x0 - noise

    @staticmethod
    def split(output, x, alpha, sigma):
        total = alpha + sigma  # 1 on the straight path
        return Prediction((x + sigma * output) / total, (x - alpha * output) / total)


OBJECTIVES = {"epsilon": Epsilon, "velocity": Velocity}


def span(schedule, objective, in_lam):
    """(start, end) of sampling: the whole path where the solver needs no finite λ (`in_lam` False)
    and the objective no α above 0, else from `t_start` to `t_end`."""
    whole = isinstance(schedule, Straight) and not in_lam and not OBJECTIVES[objective].needs_alpha
    return (1.0, 0.0) if whole else (schedule.t_start, schedule.t_end)


# --------------------------------------------------------------------------------------------- loss

TARGET_SCALES = {"unit": float, "mean": lambda k: 1.0}

# The weight α_r of a branch's loss by k = 2^(R−r). Where it is 0, every parameter still gets a
# gradient.
LOSSES = {"multi": lambda k: 1 / k**2, "output": lambda k: float(k == 1)}


def multi_scale_loss(predictions, target, target_scale="unit", weights="multi"):
    """The multi-scale loss (paper, Sec. 4.3, eq. 8): Σ_r α_r · mean((D_r(ε) − ε̂_r)²), α_r = 1/k²,
    k = 2^(R−r); or with `weights` "output" that of the last prediction alone (Table 2).

    `predictions`: R tensors (B, C, H/k, W/k), coarse to fine; `target`: what the objective makes of
    image and noise, ε in the paper, (B, C, H, W). D_r averages k × k cells; "unit" multiplies by k,
    so that the noise keeps unit variance (the release, and the published numbers), "mean" is the
    paper's literal reading. Returns float32 per-sample losses: their weighted sum (B,), and each
    branch's own (R, B)."""
    branches = []
    total = 0
    for prediction in predictions:
        k = target.shape[-1] // prediction.shape[-1]
        pooled = target
        if k > 1:
            pooled = F.avg_pool2d(target, k) * TARGET_SCALES[target_scale](k)
        loss = (pooled.float() - prediction.float()).square().flatten(1).mean(1)
        branches.append(loss)
        total = total + loss * LOSSES[weights](k)
    return total, torch.stack(branches)


# ----------------------------------------------------------------------------------------- guidance


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance ε = ε_u + s·(ε_c − ε_u), s ≥ 1, 1 meaning none.

    `power` p makes s power-cosine in time, 1 + (scale − 1)·(1 − cos(π·(1 − t)^p))/2. `interval`
    (low, high) limits it to noise levels low < σ/α ≤ high (arXiv:2404.07724). `channels` limits it
    to the first ones of the output, as DiT and SiT guide three of four; the others are conditional.
    Raises ValueError for values that make no sense."""

    scale: float = 1.0
    power: float | None = None
    interval: tuple[float, float] | None = None
    channels: int | None = None

    def __post_init__(self):
        if not 1 <= self.scale < math.inf:
            raise ValueError(
                f"guidance scale {self.scale:g} is not at least 1 (1 = none); U-ViT and the DiMR "
                "release write the excess over 1, so their 0.4 is 1.4 here"
            )
        if self.power is not None and not 0 < self.power < math.inf:
            raise ValueError(f"guidance power {self.power:g} is not above 0")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"guidance interval {self.interval} is not 0 <= low < high (values of sigma/alpha)"
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance of {self.channels} channels is not of at least 1")

    def at(self, schedule, t):
        """The scale s at time t, a float."""
        if self.interval is not None:
            low, high = self.interval
            if not low < math.exp(-schedule.lam(t)) <= high:
                return 1.0
        if self.power is None:
            return self.scale
        return 1 + (self.scale - 1) * (1 - math.cos(math.pi * (1 - float(t)) ** self.power)) / 2

    def mix(self, conditional, unconditional, scale):
        """The guided output (B, C', H, W) of two, C' ≥ `channels`, at scale s."""
        count = self.channels or conditional.shape[1]
        first = unconditional[:, :count]
        guided = first + scale * (conditional[:, :count] - first)
        if count == conditional.shape[1]:
            return guided
        return torch.cat([guided, conditional[:, count:]], dim=1)

    def away(self, guided, conditional, worse, scale):
        """The output (B, C', H, W) `guided` pushed on, away from a worse network's, at scale s."""
        count = self.channels or conditional.shape[1]
        push = torch.zeros_like(guided)
        push[:, :count] = (scale - 1) * (conditional[:, :count] - worse[:, :count])
        return guided + push


NO_GUIDANCE = Guidance()


@dataclasses.dataclass(frozen=True)
class Guide:
    """Autoguidance (arXiv:2406.02507, eq. 5): ε + (S − 1)·(ε − ε_guide), S ≥ 1, both conditional,
    away from what a worse network predicts: smaller, or an earlier step of the same run. It has a
    `config` and a `time` as the guided one; objective and noise schedule are its own. S follows
    the power and the interval of `Guidance`, and both may be on:
    ε + (S − 1)·(ε − ε_guide) + (s − 1)·(ε − ε_u). Raises ValueError for a scale that makes no
    sense."""

    model: object
    scale: float = 1.5

    def __post_init__(self):
        if not 1 <= self.scale < math.inf:
            raise ValueError(f"guide scale {self.scale:g} is not at least 1 (1 = none)")

    def predictor(self, schedule, y, objective):
        """The function (x, t) → what a network of `objective` would put out if it knew as much as
        the guide, for x at times t of `schedule` and class indices y."""
        config = self.model.config
        own = SCHEDULES[config.noise_schedule]()
        denoise = denoiser(self.model, own, y)

        def predict(x, t):
            if type(own) is not type(schedule):
                x, t = same_noise(x, t, schedule, own)
            return objective.target(*denoise(x, t))

        return predict


def same_noise(x, t, schedule, other):
    """(x', t') at which the schedule `other` holds the same image in the same noise as `schedule`
    does in x at t: of equal λ, or of the nearest one that it has."""
    lam = schedule.lam(t)
    nearest = lam.clamp(other.lam(other.t_start), other.lam(other.t_end))
    moved = other.t_of_lam(nearest)
    if lam < 0:  # where α may be 0
        return x * float(other.sigma(moved) / schedule.sigma(t)), moved
    return x * float(other.alpha(moved) / schedule.alpha(t)), moved


def denoiser(model, schedule, y, guidance=NO_GUIDANCE, variance=False, guide=None):
    """The function (x (B, C, H, W), t) → Prediction that the solvers take, for class indices y
    (B,); `model` is a network with a `config` and a `time` (see dimr.DiMR). With `variance` it
    gives (x_0, ε, v), v (B, C, H, W) being what a network with a learned variance puts out beside
    the noise; it is not guided. `guide`: a Guide, or None.

    Where guidance is on, conditional and unconditional run as one batch; where s = 1, the
    conditional alone. Raises ValueError if guidance is asked of a network without a null class."""
    if guidance.scale > 1 and not model.config.null_class:
        raise ValueError(
            "this network has no null class (it was trained without label dropout), so it can't "
            "be guided; use a guidance scale of 1"
        )
    objective = OBJECTIVES[model.config.objective]
    channels = model.config.channels
    if guidance.channels is None:
        guidance = dataclasses.replace(guidance, channels=channels)
    both = torch.cat([y, torch.full_like(y, model.config.embeddings - 1)])
    if guide:
        push = dataclasses.replace(guidance, scale=guide.scale)
        worse = guide.predictor(schedule, y, objective)

    def output(x, tau, y):
        if variance:
            return model(x, tau, y, whole=True)[-1]
        return model(x, tau, y)[-1]

    def predict(x, t):
        tau = torch.full((1,), float(model.time(schedule, t)), device=x.device)
        scale = guidance.at(schedule, t)
        if scale == 1:
            guided = conditional = output(x, tau, y).to(x.dtype)
        else:
            outputs = output(torch.cat([x, x]), tau, both).to(x.dtype)
            conditional, unconditional = outputs.chunk(2)
            guided = guidance.mix(conditional, unconditional, scale)
        if guide and push.at(schedule, t) > 1:
            guided = push.away(guided, conditional, worse(x, t), push.at(schedule, t))
        return guided

    def denoise(x, t):
        alpha = float(schedule.alpha(t))
        sigma = float(schedule.sigma(t))
        predicted = predict(x, t)
        found = objective.split(predicted[:, :channels], x, alpha, sigma)
        if variance:
            return *found, predicted[:, channels:]
        return found

    return denoise
