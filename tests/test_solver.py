"""Schedules, solvers, guidance and loss against the release's numbers, exact solutions and
diffusers."""

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
LATENT, PIXEL = diffusion.ScaledLinear(), diffusion.Linear()


def gaussian(schedule):
    """The exact noise prediction for data N(MU, S²)."""

    def noise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return sigma * (x - alpha * MU) / (alpha**2 * S**2 + sigma**2)

    return noise


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
    given = diffusion.ScaledLinear(ARRAYS["betas"])
    assert torch.equal(given.knots_log_alpha, LATENT.knots_log_alpha)
    assert relative(LATENT.lam(ARRAYS["discrete_t"]), ARRAYS["discrete_lambda"]) < 1e-6
    assert (
        relative(LATENT.t_of_lam(ARRAYS["discrete_lambda"]), ARRAYS["discrete_t_of_lambda"]) < 1e-6
    )


def test_the_pixel_schedule_is_the_linear_vp_sde():
    assert relative(PIXEL.lam(ARRAYS["linear_t"]), ARRAYS["linear_lambda"]) < 1e-12
    assert relative(PIXEL.t_of_lam(ARRAYS["linear_lambda"]), ARRAYS["linear_t"]) < 1e-12


@pytest.mark.parametrize("schedule", [LATENT, PIXEL], ids=["latent", "pixel"])
def test_alpha_sigma_and_lambda_belong_together(schedule):
    t = torch.linspace(1e-4, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
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
    noise = diffusion.denoiser(network("network_2r"), LATENT, END_TO_END["latent_y"], guidance)
    x = solver.sample(noise, END_TO_END["latent_x_T"], LATENT, steps, "fast", "time")
    assert relative(x, END_TO_END[f"latent_x_0_{name}"]) < 1e-4


def test_pixel_sampling_end_to_end():
    noise = diffusion.denoiser(network("network_3r_ln"), PIXEL, END_TO_END["pixel_y"])
    x = solver.sample(noise, END_TO_END["pixel_x_T"], PIXEL, 20, "dpm-fast", "logsnr")
    assert relative(x, END_TO_END["pixel_x_0_20"]) < 1e-4


@pytest.mark.parametrize(
    "space, name, time, noised",
    [("latent", "network_2r", "n", "xn"), ("pixel", "network_3r_ln", "t", "xt")],
)
@torch.no_grad()
def test_training_loss_end_to_end(space, name, time, noised):
    schedule, get = diffusion.SCHEDULES[space](), lambda key: END_TO_END[f"train_{space}_{key}"]
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


@pytest.mark.parametrize(
    "bad",
    [dict(scale=0.4), dict(scale=math.nan), dict(scale=2, power=0), dict(scale=2, interval=(3, 1))],
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

    def forward(self, x, tau, y):
        self.rows.append(len(x))
        return (x * 0 + y[:, None, None, None].float(),)


def test_guidance_is_one_batched_call_and_none_where_the_scale_is_one():
    model, y = Counting(), torch.tensor([0, 1, 0])
    noise = diffusion.denoiser(model, LATENT, y, diffusion.Guidance(3.0, interval=(0.5, 100.0)))
    x = torch.zeros(3, 1, 2, 2)
    assert noise(x, 1.0)[:, 0, 0, 0].tolist() == [
        2 + 3 * (c - 2) for c in (0, 1, 0)
    ]  # the null class is 2
    assert noise(x, 0.01)[:, 0, 0, 0].tolist() == [0, 1, 0]
    assert model.rows == [6, 3]


# solvers


@pytest.mark.parametrize("name", solver.SOLVERS)
@pytest.mark.parametrize("grid", solver.GRIDS)
def test_every_solver_on_every_grid_reaches_the_exact_solution(name, grid):
    schedule, x = LATENT, ARRAYS["x_T"].double()
    calls = []

    def noise(x, t):
        calls.append(t)
        return gaussian(schedule)(x, t)

    found = solver.sample(noise, x, schedule, 60, name, grid, end=0.02)
    assert len(calls) == 60
    assert relative(found, exact(schedule, x, 1.0, 0.02)) < (
        0.06 if solver.SOLVERS[name].order == 1 else 0.01
    )


def order_of(name, counts, **options):
    """Observed order of accuracy on the linear schedule, log-SNR grid, between t = 0.9 and 0.3."""
    x, start, end = ARRAYS["x_T"].double(), 0.9, 0.3
    truth = exact(PIXEL, x, start, end)
    errors = [
        float(
            (solver.sample(gaussian(PIXEL), x, PIXEL, n, name, "logsnr", start, end) - truth).norm()
        )
        for n in counts
    ]
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


@pytest.mark.parametrize("name", ["3m", "dpm-3m"])
def test_third_order_multistep_has_its_order_with_exact_start_values(name):
    method, errors, x = solver.SOLVERS[name], [], ARRAYS["x_T"].double()
    for steps in (60, 120):
        lam = torch.linspace(
            float(PIXEL.lam(0.9)), float(PIXEL.lam(0.3)), steps + 1, dtype=torch.float64
        )
        ts, history = PIXEL.t_of_lam(lam), []
        for t in ts[:2].tolist():  # what a perfect solver would have seen
            at = exact(PIXEL, x, 0.9, t)
            epsilon = gaussian(PIXEL)(at, t)
            history.append(
                (
                    float(PIXEL.lam(t)),
                    (at - PIXEL.sigma(t) * epsilon) / PIXEL.alpha(t) if method.data else epsilon,
                )
            )
        found = solver._multistep(
            gaussian(PIXEL), exact(PIXEL, x, 0.9, ts[2]), PIXEL, method, ts[2:], history=history
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
    ours = solver._multistep(gaussian(LATENT), x, LATENT, solver.SOLVERS["2m"], t)
    for i, n in enumerate(theirs.timesteps):
        x = theirs.step(gaussian(LATENT)(x, float(t[i])), n, x).prev_sample
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
    assert solver.orders(steps, solver.SOLVERS["fast"]) == expected


def test_steps_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match="24 or 27"):
        solver.orders(25, solver.SOLVERS["3s"])
    with pytest.raises(ValueError, match="at least 1"):
        solver.sample(None, torch.zeros(1), PIXEL, 0)
