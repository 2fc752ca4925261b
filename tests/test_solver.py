"""Schedules, solvers, guidance and loss against the release's numbers, exact solutions and
diffusers."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import DATA, relative
from safetensors import safe_open
from safetensors.torch import load_file

import diffusion
import dimr
import solver

ARRAYS = load_file(DATA / "solver.safetensors")
END_TO_END = load_file(DATA / "end_to_end.safetensors")
MU, S = ARRAYS["mu"].double(), ARRAYS["s"].double()
LATENT = diffusion.ScaledLinear()
PIXEL = diffusion.Linear()
STRAIGHT = diffusion.Straight()


def gaussian(schedule):
    """The exact (x_0, ε) for data N(MU, S²)."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = alpha**2 * S**2 + sigma**2
        x0 = MU + alpha * S**2 * (x - alpha * MU) / variance
        return diffusion.Prediction(x0, sigma * (x - alpha * MU) / variance)

    return denoise


def exact(schedule, x, start, end):
    """The probability-flow ODE's solution for that data: each dimension keeps its quantile."""

    def spread(t):
        return (schedule.alpha(t) ** 2 * S**2 + schedule.sigma(t) ** 2).sqrt()

    return schedule.alpha(end) * MU + spread(end) / spread(start) * (x - schedule.alpha(start) * MU)


def network(name):
    path = DATA / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        heads = int(file.metadata()["heads"])
    return dimr.from_released(
        {
            k.removeprefix("weight."): v
            for k, v in load_file(path).items()
            if k.startswith("weight.")
        },
        heads,
    )


# schedules


def test_the_latent_schedule_is_stable_diffusions():
    given = diffusion.Discrete(ARRAYS["betas"])
    assert torch.equal(given.knots_log_alpha, LATENT.knots_log_alpha)
    assert relative(LATENT.lam(ARRAYS["discrete_t"]), ARRAYS["discrete_lambda"]) < 1e-6
    assert (
        relative(LATENT.t_of_lam(ARRAYS["discrete_lambda"]), ARRAYS["discrete_t_of_lambda"]) < 1e-6
    )


def test_the_pixel_schedule_is_the_linear_vp_sde():
    assert relative(PIXEL.lam(ARRAYS["linear_t"]), ARRAYS["linear_lambda"]) < 1e-12
    assert relative(PIXEL.t_of_lam(ARRAYS["linear_lambda"]), ARRAYS["linear_t"]) < 1e-12


@pytest.mark.parametrize("schedule", [LATENT, PIXEL], ids=["latent", "pixel"])
def test_the_papers_schedules_preserve_variance(schedule):
    t = torch.linspace(1e-4, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


@pytest.mark.parametrize("name", diffusion.SCHEDULES)
def test_alpha_sigma_and_lambda_belong_together(name):
    schedule = diffusion.SCHEDULES[name]()
    t = torch.linspace(schedule.t_end, schedule.t_start, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.lam(t), (schedule.alpha(t) / schedule.sigma(t)).log())
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-8, atol=1e-10)


def test_tau_spans_what_the_networks_were_trained_on():
    n = torch.tensor([1, 500, 1000])
    torch.testing.assert_close(LATENT.tau(n / 1000), n.double() / 500 - 1)
    assert float(PIXEL.tau(0.0)) == pytest.approx(math.log(1e6) / 4)
    assert float(PIXEL.tau(0.5)) == pytest.approx(float(2 * PIXEL.lam(0.5)) / 4)


def test_training_times_cover_the_schedule():
    uniform = torch.tensor([0.0, 0.4999, 0.9999999], dtype=torch.float64)
    assert (LATENT.draw(uniform) * 1000).round().tolist() == [1, 500, 1000]
    assert torch.equal(PIXEL.draw(uniform), uniform)
    assert torch.equal(STRAIGHT.draw(uniform), uniform)


@pytest.mark.parametrize("name", diffusion.OBJECTIVES)
@pytest.mark.parametrize("schedule", [LATENT, PIXEL, STRAIGHT], ids=["latent", "pixel", "straight"])
def test_a_right_prediction_gives_image_and_noise_back(name, schedule):
    objective = diffusion.OBJECTIVES[name]
    x0, noise = torch.randn(2, 3, 4, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.8])
    x = schedule.noised(x0[:, 0], noise[:, 0], t)
    alpha, sigma = schedule.alpha(t)[:, None, None, None], schedule.sigma(t)[:, None, None, None]
    found = objective.split(objective.target(x0[:, 0], noise[:, 0]), x, alpha, sigma)
    torch.testing.assert_close(found.x0, x0[:, 0])
    torch.testing.assert_close(found.noise, noise[:, 0])


def test_sampling_spans_the_whole_path_where_nothing_forbids_it():
    assert diffusion.span(STRAIGHT, "velocity", in_lam=False) == (1.0, 0.0)
    assert diffusion.span(STRAIGHT, "velocity", in_lam=True) == (0.999, 0.001)
    assert diffusion.span(STRAIGHT, "epsilon", in_lam=False) == (0.999, 0.001)
    assert diffusion.span(PIXEL, "velocity", in_lam=False) == (1.0, 1e-4)
    assert diffusion.span(LATENT, "epsilon", in_lam=True) == (1.0, 1e-3)


# parity with the release


@pytest.mark.parametrize("steps", [10, 12, 20, 50, 250])
def test_the_latent_sampler_agrees_with_the_release(steps):
    x = solver.sample(gaussian(LATENT), ARRAYS["x_T"].double(), LATENT, steps, "fast", "time")
    assert relative(x, ARRAYS[f"discrete_dpmpp_fast3_time_uniform_{steps}"]) < 1e-6


@pytest.mark.parametrize("steps", [20, 21, 50])
def test_the_pixel_sampler_agrees_with_the_release(steps):
    x = solver.sample(gaussian(PIXEL), ARRAYS["x_T"].double(), PIXEL, steps, "dpm-fast", "logsnr")
    assert relative(x, ARRAYS[f"linear_dpm_fast3_logsnr_{steps}"]) < 1e-6


@pytest.mark.parametrize(
    "name, guidance, steps",
    [
        ("plain_20", diffusion.Guidance(), 20),
        ("cfg1.5_20", diffusion.Guidance(1.5), 20),
        ("cfg2.5_power2_30", diffusion.Guidance(2.5, 2), 30),
    ],
)
def test_latent_sampling_end_to_end(name, guidance, steps):
    denoise = diffusion.denoiser(network("network_2r"), LATENT, END_TO_END["latent_y"], guidance)
    x = solver.sample(denoise, END_TO_END["latent_x_T"], LATENT, steps, "fast", "time")
    assert relative(x, END_TO_END[f"latent_x_0_{name}"]) < 1e-4


def test_pixel_sampling_end_to_end():
    denoise = diffusion.denoiser(network("network_3r_ln"), PIXEL, END_TO_END["pixel_y"])
    x = solver.sample(denoise, END_TO_END["pixel_x_T"], PIXEL, 20, "dpm-fast", "logsnr")
    assert relative(x, END_TO_END["pixel_x_0_20"]) < 1e-4


@pytest.mark.parametrize(
    "space, name, time, noised",
    [("latent", "network_2r", "n", "xn"), ("pixel", "network_3r_ln", "t", "xt")],
)
@torch.no_grad()
def test_training_loss_end_to_end(space, name, time, noised):
    schedule = {"latent": LATENT, "pixel": PIXEL}[space]

    def get(key):
        return END_TO_END[f"train_{space}_{key}"]

    t = get("n") / 1000 if time == "n" else get("t")
    x = schedule.noised(get("x0"), get("noise"), t)
    assert relative(x, get(noised)) < 1e-4
    if space == "pixel":
        assert relative(4 * schedule.tau(t), get("log_snr")) < 1e-4
    total, branches = diffusion.multi_scale_loss(
        network(name)(x, schedule.tau(t).float(), END_TO_END[f"{space}_y"]), get("noise")
    )
    assert relative(total, get("loss")) < 1e-4
    weights = torch.tensor([4.0**-k for k in reversed(range(len(branches)))])
    torch.testing.assert_close((weights[:, None] * branches).sum(0), total)


@pytest.mark.parametrize(
    "target, key", [("unit", "loss_unit_variance"), ("mean", "loss_mean_pool")]
)
def test_both_targets_of_the_multi_scale_loss(target, key):
    arrays = load_file(DATA / "loss.safetensors")
    total, _ = diffusion.multi_scale_loss(
        [arrays[f"pred_{r}"] for r in range(3)], arrays["noise"], target
    )
    assert relative(total, arrays[key]) < 1e-5


# guidance


def test_the_power_cosine_schedule_is_the_releases():
    table = json.loads((DATA / "cfg_power_cosine.json").read_text())
    for row in table["rows"]:
        guidance = diffusion.Guidance(row["cfg"], row["power"])
        assert [guidance.at(LATENT, n / 1000) for n in table["timestep"]] == pytest.approx(
            row["scale"], rel=1e-9
        )


def test_guidance_stays_inside_its_interval():
    guidance = diffusion.Guidance(2.0, interval=(0.5, 3.0))
    for t in np.linspace(0.01, 1, 30):
        ratio = float(LATENT.sigma(t) / LATENT.alpha(t))
        assert guidance.at(LATENT, t) == (2.0 if 0.5 < ratio <= 3.0 else 1.0)


def test_the_interval_holds_its_upper_end_and_not_its_lower():
    level = math.exp(-STRAIGHT.lam(0.75))
    assert diffusion.Guidance(2.0, interval=(0.5, level)).at(STRAIGHT, 0.75) == 2.0
    assert diffusion.Guidance(2.0, interval=(level, 9.0)).at(STRAIGHT, 0.75) == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        dict(scale=0.4),
        dict(scale=math.nan),
        dict(scale=2, power=0),
        dict(scale=2, interval=(3, 1)),
        dict(scale=math.inf),
        dict(scale=2, power=math.inf),
        dict(scale=2, interval=(-1, 1)),
        dict(scale=2, interval=(1, 1)),
    ],
)
def test_senseless_guidance_is_refused(bad):
    with pytest.raises(ValueError):
        diffusion.Guidance(**bad)


def test_a_scale_below_one_explains_the_other_convention():
    with pytest.raises(ValueError, match="0.4 is 1.4 here"):
        diffusion.Guidance(0.4)


class Counting(torch.nn.Module):
    """Counts rows, and predicts by class, so that guidance shows."""

    config = dimr.Config(
        size=2,
        channels=1,
        layers=(1,),
        dims=(2,),
        heads=1,
        num_classes=2,
        null_class=True,
        space="latent",
    )

    def __init__(self):
        super().__init__()
        self.rows = []

    def time(self, schedule, t):
        return schedule.tau(t)

    def forward(self, x, tau, y):
        self.rows.append(len(x))
        return (x * 0 + y[:, None, None, None].float(),)


def test_guidance_is_one_batched_call_and_none_where_the_scale_is_one():
    model, y = Counting(), torch.tensor([0, 1, 0])
    denoise = diffusion.denoiser(model, LATENT, y, diffusion.Guidance(3.0, interval=(0.5, 100.0)))
    x = torch.zeros(3, 1, 2, 2)
    null = 2
    guided = [null + 3 * (c - null) for c in (0, 1, 0)]
    assert denoise(x, 1.0).noise[:, 0, 0, 0].tolist() == guided
    assert denoise(x, 0.01).noise[:, 0, 0, 0].tolist() == [0, 1, 0]
    assert model.rows == [6, 3]


def test_guidance_needs_a_null_class():
    model = Counting()
    model.config = dataclasses.replace(model.config, null_class=False)
    with pytest.raises(ValueError, match="no null class"):
        diffusion.denoiser(model, LATENT, torch.tensor([0]), diffusion.Guidance(1.5))


# solvers


@pytest.mark.parametrize("grid", solver.GRIDS)
@pytest.mark.parametrize("updates", [[1], [1] * 5, [2, 2], [3, 3, 2, 1]])
def test_times_run_from_start_to_end_without_a_gap(grid, updates):
    times = solver.lay_times(PIXEL, updates, grid, 0.9, 0.2)
    assert [len(span) for span in times] == [evaluations + 1 for evaluations in updates]
    assert float(times[0][0]) == pytest.approx(0.9) and float(times[-1][-1]) == pytest.approx(0.2)
    for before, after in itertools.pairwise(times):
        assert before[-1] == after[0]
    for span in times:
        assert (span.diff() < 0).all()


def test_each_grid_is_even_in_what_it_is_named_for():
    time, quadratic, logsnr = (
        torch.stack([*(s[0] for s in spans), spans[-1][-1]])
        for spans in (solver.lay_times(PIXEL, [1] * 7, grid, 0.9, 0.2) for grid in solver.GRIDS)
    )
    for even in (time, quadratic.sqrt(), PIXEL.lam(logsnr)):
        torch.testing.assert_close(even.diff(), even.diff()[:1].expand(7))


def standard_normal(update):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(update)).double()


DETERMINISTIC = [name for name, row in solver.SOLVERS.items() if not row.stochastic]
FIRST_ORDER = {"1s", "dpm-1s", "euler"}


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("grid", solver.GRIDS)
@pytest.mark.parametrize("schedule", [LATENT, STRAIGHT], ids=["latent", "straight"])
def test_every_solver_on_every_grid_reaches_the_exact_solution(name, grid, schedule):
    x = ARRAYS["x_T"].double()
    calls, told = [], []

    def denoise(x, t):
        calls.append(t)
        return gaussian(schedule)(x, t)

    def callback(evaluations, x):
        told.append(evaluations)
        assert len(calls) == evaluations  # the evaluations so far, told after each update

    start = schedule.t_start
    found = solver.sample(denoise, x, schedule, 60, name, grid, end=0.02, callback=callback)
    assert len(calls) == told[-1] == 60
    assert len(told) == len(solver.SOLVERS[name].updates(60))
    truth = exact(schedule, x, start, 0.02)
    rough = name in FIRST_ORDER or schedule is STRAIGHT  # whose λ is steep at its start
    assert relative(found, truth) < (0.1 if rough else 0.01)


def test_euler_and_heun_follow_the_whole_straight_path():
    """From pure noise to data, where λ is not finite at either end."""
    x = ARRAYS["x_T"].double()
    truth = exact(STRAIGHT, x, 1.0, 0.0)
    errors = {}
    for name in ("euler", "heun"):
        for steps in (40, 80):
            found = solver.sample(
                gaussian(STRAIGHT), x, STRAIGHT, steps, name, "time", start=1.0, end=0.0
            )
            errors[name, steps] = relative(found, truth)
    assert math.log2(errors["euler", 40] / errors["euler", 80]) == pytest.approx(1, abs=0.1)
    assert math.log2(errors["heun", 40] / errors["heun", 80]) == pytest.approx(2, abs=0.2)
    assert errors["heun", 80] < 2e-3


def test_euler_on_the_straight_path_is_eulers_method():
    x = ARRAYS["x_T"].double()
    found = solver.sample(gaussian(STRAIGHT), x, STRAIGHT, 10, "euler", "time", start=1.0, end=0.0)
    for k in range(10):
        x0, noise = gaussian(STRAIGHT)(x, 1 - k / 10)
        x = x + (x0 - noise) / 10
    torch.testing.assert_close(found, x)


def test_steps_stay_evaluations_for_heun():
    calls = []

    def denoise(x, t):
        calls.append(t)
        return gaussian(PIXEL)(x, t)

    solver.sample(denoise, ARRAYS["x_T"].double(), PIXEL, 20, "heun", "time")
    assert len(calls) == 20 and len(set(calls)) == 11
    with pytest.raises(ValueError, match="use 20 or 22"):
        solver.SOLVERS["heun"].updates(21)


@pytest.mark.parametrize("schedule", [LATENT, STRAIGHT], ids=["latent", "straight"])
def test_ancestral_sampling_ends_in_the_datas_distribution(schedule):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    alpha, sigma = schedule.alpha(schedule.t_start), schedule.sigma(schedule.t_start)
    x = alpha * MU + (alpha**2 * S**2 + sigma**2).sqrt() * x

    def draw(update):
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    found = solver.sample(gaussian(schedule), x, schedule, 200, "ancestral", "logsnr", draw=draw)
    torch.testing.assert_close(found.mean(0), MU, rtol=0, atol=0.04)
    end = schedule.t_end
    spread = (schedule.alpha(end) ** 2 * S**2 + schedule.sigma(end) ** 2).sqrt()
    torch.testing.assert_close(found.std(0), spread, rtol=0.05, atol=0)


def test_ancestral_sampling_is_ddpms_of_diffusers():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        trained_betas=ARRAYS["betas"].numpy(), variance_type="fixed_small", clip_sample=False
    )
    theirs.set_timesteps(1000)
    x = ARRAYS["x_T"].double()
    ours = x
    times = [torch.tensor([n, n - 1]).double() / 1000 for n in (700, 699, 698)]
    ours = solver.ancestral(gaussian(LATENT), x, times, LATENT, draw=standard_normal)
    for update, n in enumerate((700, 699, 698)):
        noise = gaussian(LATENT)(x, n / 1000).noise
        at = theirs.step(noise, n - 1, x).pred_original_sample
        mean = theirs.alphas_cumprod[n - 2].sqrt() * theirs.betas[n - 1] * at
        mean += theirs.alphas[n - 1].sqrt() * (1 - theirs.alphas_cumprod[n - 2]) * x
        mean /= 1 - theirs.alphas_cumprod[n - 1]
        x = mean + theirs._get_variance(n - 1) ** 0.5 * standard_normal(update)
    assert relative(ours, x) < 1e-5


def test_a_stochastic_solver_without_noise_is_refused():
    with pytest.raises(ValueError, match="give `draw`"):
        solver.sample(gaussian(PIXEL), ARRAYS["x_T"].double(), PIXEL, 5, "ancestral")


def order_of(name, counts):
    """Observed order of accuracy on the linear schedule, log-SNR grid, between t = 0.9 and 0.3."""
    x = ARRAYS["x_T"].double()
    truth = exact(PIXEL, x, 0.9, 0.3)
    errors = []
    for steps in counts:
        found = solver.sample(gaussian(PIXEL), x, PIXEL, steps, name, "logsnr", start=0.9, end=0.3)
        errors.append(float((found - truth).norm()))
    return math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])


@pytest.mark.parametrize(
    "name, counts, order",
    [
        ("1s", (60, 120), 1),
        ("2s", (60, 120), 2),
        ("3s", (60, 120), 3),
        ("2m", (60, 120), 2),
        ("dpm-1s", (60, 120), 1),
        ("dpm-2s", (60, 120), 2),
        ("dpm-3s", (60, 120), 3),
        ("dpm-2m", (60, 120), 2),
        ("euler", (60, 120), 1),
        ("heun", (60, 120), 2),
        # NFE mod 3 = 2: the one lower-order update is of order 2
        ("fast", (62, 125), 3),
        ("dpm-fast", (62, 125), 3),
    ],
)
def test_each_solver_has_its_order(name, counts, order):
    assert order_of(name, counts) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("counts, order", [((60, 120), 2), ((61, 121), 2)])
def test_fast_loses_an_order_to_its_last_update_elsewhere(counts, order):
    assert order_of("fast", counts) == pytest.approx(order, abs=0.35)


def uneven(steps):
    """Times whose steps in λ grow by half from first to last."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    first, last = float(PIXEL.lam(0.9)), float(PIXEL.lam(0.3))
    return PIXEL.t_of_lam(first + (last - first) * (0.8 * share + 0.2 * share**2))


@pytest.mark.parametrize("name", ["3m", "dpm-3m"])
def test_third_order_multistep_has_its_order_on_uneven_times(name):
    """With the start values that a perfect solver would have seen."""
    data = not name.startswith("dpm-")
    x = ARRAYS["x_T"].double()
    errors = []
    for steps in (60, 120):
        ts = uneven(steps)
        history = []
        for t in ts[:2].tolist():
            x0, noise = gaussian(PIXEL)(exact(PIXEL, x, 0.9, t), t)
            history.append((float(PIXEL.lam(t)), x0 if data else noise))
        found = solver.multistep(
            gaussian(PIXEL),
            exact(PIXEL, x, 0.9, ts[2]),
            list(ts[2:].unfold(0, 2, 1)),
            PIXEL,
            order=3,
            data=data,
            history=history,
        )
        errors.append(float((found - exact(PIXEL, x, 0.9, 0.3)).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize("steps", [5, 20])
def test_2m_agrees_with_diffusers(steps):
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        trained_betas=ARRAYS["betas"].numpy(),
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="sigma_min",
        timestep_spacing="linspace",
    )
    theirs.set_timesteps(steps)
    # their grid in our time: steps of n, and then the smallest sigma, n = 1
    t = torch.tensor([*(theirs.timesteps.double() + 1), 1.0]) / 1000
    x = ARRAYS["x_T"].double()
    times = list(t.unfold(0, 2, 1))
    ours = solver.multistep(gaussian(LATENT), x, times, LATENT, order=2, data=True)
    for i, n in enumerate(theirs.timesteps):
        x = theirs.step(gaussian(LATENT)(x, float(t[i])).noise, n, x).prev_sample
    assert relative(ours, x) < 1e-5


@pytest.mark.parametrize(
    "steps, expected",
    [
        (20, [3] * 6 + [2]),
        (21, [3] * 6 + [2, 1]),
        (22, [3] * 7 + [1]),
        (1, [1]),
        (2, [2]),
        (3, [2, 1]),
    ],
)
def test_fast_uses_every_evaluation(steps, expected):
    assert solver.fast(steps) == expected


def test_steps_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match="24 or 27"):
        solver.SOLVERS["3s"].updates(25)
    with pytest.raises(ValueError, match="at least 1"):
        solver.sample(None, torch.zeros(1), PIXEL, 0)
