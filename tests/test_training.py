"""Training: randomness by position, the recipe, resume, processes, what a run folder holds."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DATA, SMALL, dimr_command, relative
from PIL import Image
from safetensors.torch import load_file

import dimr
import journal
import randomness
import recipes
import runfolder
import storage
import training
import vae
from storage import UserError, load_tensors

CONFIG = dimr.Config(
    size=8,
    channels=1,
    layers=(1, 1),
    dims=(8, 8),
    heads=1,
    num_classes=10,
    null_class=True,
    space="pixel",
)
RECIPE = dataclasses.replace(recipes.RECIPES["demo"], precision="fp32", compile=False)


def read(run):
    return [
        (line["step"], line["loss"], line["loss_branches"]) for line in journal.read_metrics(run)
    ]


def weights(run, step, name="weights"):
    return load_tensors(run / "checkpoints" / f"step-{step:07d}" / f"{name}.safetensors")[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# randomness


def test_what_a_sample_is_made_of_depends_on_its_position_alone():
    whole = randomness.normal(5, "noise", 0, 100, (2, 3))
    assert torch.equal(randomness.normal(5, "noise", 37, 71, (2, 3)), whole[37:71])
    assert torch.equal(
        randomness.uniform(5, "time", 99, 100), randomness.uniform(5, "time", 0, 100)[99:]
    )
    assert not torch.equal(randomness.normal(6, "noise", 0, 100, (2, 3)), whole)
    assert not torch.equal(
        randomness.uniform(5, "time", 0, 100), randomness.uniform(5, "label", 0, 100)
    )


def test_what_is_drawn_is_what_0_1_0_drew():
    """So that its runs go on, and a seed gives the image that it gave."""
    times = [0.8343258329715609, 0.5037377198890749, 0.24096762104591085, 0.27401587619557244]
    assert randomness.uniform(5, "time", 14, 18).tolist() == times
    noise = torch.tensor([[-0.7529266, -0.5306678], [-1.504608, 1.347067], [-1.993757, 1.44316]])
    torch.testing.assert_close(
        randomness.normal(5, "noise", 15, 18, (2,)), noise, rtol=1e-5, atol=0
    )
    start = torch.tensor([-0.1467951, 0.7861412, 0.9468216, -1.114344])
    torch.testing.assert_close(randomness.start_noise((4,), 7), start, rtol=1e-5, atol=0)
    items, flips = randomness.Order(7, 5)(5, 19)
    assert items.tolist() == [2, 3, 3, 5, 2, 1, 0, 6, 4, 5, 6, 1, 4, 2]
    assert flips.astype(int).tolist() == [1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1]


def test_noise_is_standard_normal_and_times_uniform():
    from scipy import stats

    assert (
        stats.kstest(randomness.normal(0, "noise", 0, 2000, (8,)).flatten().numpy(), "norm").pvalue
        > 0.01
    )
    assert stats.kstest(randomness.uniform(0, "time", 0, 5000).numpy(), "uniform").pvalue > 0.01


def new_state(recipe=RECIPE, config=CONFIG):
    return training.State(training.new_network(config, recipe.seed), recipe, torch.device("cpu"))


def test_losses_do_not_depend_on_how_a_batch_is_cut():
    state = new_state()
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(24) % 10

    def cut(a, b):
        return training.losses(state, images[a:b], labels[a:b], 1000 + a)[0]

    torch.testing.assert_close(torch.cat([cut(0, 5), cut(5, 24)]), cut(0, 24))


class Seen(torch.nn.Module):
    """A network that keeps what it was given and predicts it, pooled."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def time(self, schedule, t):
        return schedule.tau(t)

    def parameter_groups(self, weight_decay):
        return [{"params": list(self.parameters())}]

    def forward(self, x, tau, y):
        self.x, self.tau, self.y = x, tau, y
        return x[:, :, ::2, ::2], x


def state_of(network, recipe=RECIPE):
    return training.State(network, recipe, torch.device("cpu"))


def test_labels_are_dropped_at_the_recipes_rate():
    network = Seen(CONFIG)
    state = state_of(network, dataclasses.replace(RECIPE, label_dropout=0.3))
    images = torch.zeros(4000, 1, 8, 8, dtype=torch.uint8)
    training.losses(state, images, torch.zeros(4000, dtype=torch.long), 0)
    assert set(network.y.tolist()) == {0, 10}
    assert float((network.y == 10).float().mean()) == pytest.approx(0.3, abs=0.03)


def without_noise(state):
    """The network is given α·x_0 alone, and α is 1."""
    state.schedule.alpha = torch.ones_like
    state.schedule.sigma = torch.zeros_like


def test_pixels_are_scaled_to_minus_one_to_one():
    network = Seen(CONFIG)
    state = state_of(network)
    without_noise(state)
    images = torch.tensor([0, 51, 127, 255], dtype=torch.uint8)[:, None, None, None]
    training.losses(state, images.expand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), 0)
    expected = torch.tensor([-1.0, -0.6, -1 / 255, 1.0])
    torch.testing.assert_close(network.x[:, 0, 0, 0], expected)


def test_latents_are_sampled_from_their_mean_and_deviation():
    network = Seen(dataclasses.replace(CONFIG, space="latent", channels=4))
    state = state_of(network)
    without_noise(state)
    mean = torch.full((2000, 4, 8, 8), 3.0)
    logvar = torch.full((2000, 4, 8, 8), -1.0)
    stored = torch.stack([mean, logvar], 1).half()
    training.losses(state, stored, torch.zeros(2000, dtype=torch.long), 0)
    z = network.x / vae.SCALE
    assert float(z.mean()) == pytest.approx(3, abs=0.01)
    assert float(z.std()) == pytest.approx(np.exp(-0.5), rel=0.01)


def test_the_loss_is_of_what_the_objective_asks_for():
    """Against SiT's own path, target and loss, of the same data, noise and times."""
    arrays = load_file(DATA / "sit_training.safetensors")
    config = dataclasses.replace(
        CONFIG, space="latent", channels=4, dims=(8,), layers=(1,), objective="velocity"
    )
    state = new_state(config=config)
    t = 1 - arrays["train_t"].double()
    xt = state.schedule.noised(arrays["train_data"], arrays["train_noise"], t)
    assert relative(xt, arrays["train_xt"]) < 1e-6
    target = state.objective.target(arrays["train_data"], arrays["train_noise"])
    assert relative(target, arrays["train_target"]) < 1e-6
    x0, noise = state.objective.split(
        target,
        xt,
        state.schedule.alpha(t).float()[:, None, None, None],
        state.schedule.sigma(t).float()[:, None, None, None],
    )
    assert relative(x0, arrays["train_data"]) < 1e-6
    assert relative(noise, arrays["train_noise"]) < 1e-6


def test_velocity_is_trained_on_the_straight_path(monkeypatch):
    """x_t and loss that training makes of an image, from the noise and the time that it drew."""
    config = dataclasses.replace(CONFIG, objective="velocity")
    network = Seen(config)
    state = state_of(network)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    sums, branches = training.losses(state, images, torch.zeros(6, dtype=torch.long), 40)
    noise = randomness.normal(RECIPE.seed, "noise", 40, 46, (1, 8, 8))
    t = randomness.uniform(RECIPE.seed, "time", 40, 46).float()
    x0 = images / 127.5 - 1
    x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
    torch.testing.assert_close(network.x, x)
    torch.testing.assert_close(network.tau, 2 * t - 1)
    fine = (x0 - noise - x).square().mean((1, 2, 3))
    pooled = 2 * torch.nn.functional.avg_pool2d(x0 - noise, 2)
    coarse = (pooled - x[:, :, ::2, ::2]).square().mean((1, 2, 3))
    torch.testing.assert_close(branches, torch.stack([coarse, fine]))
    torch.testing.assert_close(sums, coarse / 4 + fine)


# one step


def gradients(state, value=None):
    torch.manual_seed(1)
    for parameter in state.parameters.values():
        parameter.grad = (
            torch.randn_like(parameter) if value is None else torch.full_like(parameter, value)
        )


def test_a_step_is_adamw_with_warm_up_and_ema():
    recipe = dataclasses.replace(
        RECIPE, lr=0.1, warmup=4, ema=0.9, weight_decay=0.5, betas=(0.8, 0.95)
    )
    state = new_state(recipe)
    twin = new_state(recipe)
    plain = torch.optim.AdamW(
        twin.network.parameter_groups(0.5), lr=0.1, betas=(0.8, 0.95), fused=False, foreach=False
    )
    ema = {name: p.detach().clone() for name, p in twin.parameters.items()}
    for step in range(6):
        gradients(state), gradients(twin)
        state.update()
        for group in plain.param_groups:
            group["lr"] = 0.1 * min(1, step / 4)
        plain.step()
        for name, parameter in twin.parameters.items():
            ema[name] = 0.9 * ema[name] + 0.1 * parameter.detach()
    for name, parameter in state.parameters.items():
        torch.testing.assert_close(parameter, twin.parameters[name])
        torch.testing.assert_close(state.ema[name], ema[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    state = new_state(dataclasses.replace(RECIPE, ema_profiles=(0.05, 0.1)))
    for _ in range(2):
        gradients(state)
        state.update()

    def tensors():
        return {
            f"{part}/{name}": t.clone()
            for part, (group, _) in state.files({}).items()
            for name, t in group.items()
        }

    before = tensors()
    gradients(state)
    state.parameters["branches.0.position"].grad[0, 0] = value
    _, bad = state.update()
    assert bad == 1 and same(tensors(), before) and any("/step/" in name for name in before)
    assert any("averages/0.1/" in name for name in before)
    gradients(state)
    _, bad = state.update()
    assert bad == 0 and not same(tensors(), before)


def test_gradients_are_clipped_to_their_norm():
    steps = {}
    for clip in (None, 1.0):
        recipe = dataclasses.replace(RECIPE, grad_clip=clip, warmup=0)
        state = new_state(recipe)
        gradients(state)
        norm, _ = state.update()
        steps[clip] = (
            float(norm),
            torch.cat(
                [state.optimizer.state[p]["exp_avg"].flatten() for p in state.parameters.values()]
            ).norm(),
        )
    assert steps[None][0] == steps[1.0][0] > 1  # what is reported is the norm before
    assert float(steps[1.0][1]) == pytest.approx(float(steps[None][1]) / steps[None][0], rel=1e-3)


# the run


@pytest.mark.slow
def test_a_run_folder_is_the_record_of_the_run(trained, digits):
    record = json.loads((trained / "config.json").read_text())
    assert (
        record["config"]["dims"] == [16, 8]
        and record["config"]["num_classes"] == 10
        and record["config"]["channels"] == 1
    )
    assert (
        record["recipe"]["batch_size"] == 16
        and record["recipe"]["seed"] == 0
        and record["data"]["path"] == str(digits)
    )
    assert record["versions"]["torch"] == torch.__version__
    lines = journal.read_metrics(trained)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert (
        lines[0]["lr"] == 0
        and lines[1]["lr"] == record["recipe"]["lr"] / 2
        and lines[2]["lr"] == record["recipe"]["lr"]
    )
    assert {
        "loss",
        "loss_branches",
        "gradient_norm",
        "images_per_second",
        "share_of_peak",
        "peak_bytes",
    } <= lines[0].keys()
    assert Image.open(trained / "loss.png").size == (900, 480)
    assert [runfolder.step_of(c) for c in runfolder.checkpoints(trained)] == [4, 8, 12]
    model, facts = runfolder.read_weights(
        trained / "checkpoints" / "step-0000012" / "ema.safetensors"
    )
    assert (
        facts["step"] == 12
        and facts["classes"] == list("0123456789")
        and model.config.dims == (16, 8)
    )


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bytes(trained, digits, tmp_path):
    out = tmp_path / "small"
    shutil.copytree(trained, out)
    for step in (8, 12):
        shutil.rmtree(out / "checkpoints" / f"step-{step:07d}")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "half a li')
    done = dimr_command(
        "train",
        "--out",
        out,
        "--workers",
        "0",
        "--sample-every",
        "0",
        "--save-every",
        "4",
        "--device",
        "cpu",
    )
    assert "going on from" in done.stderr and read(out) == read(trained)
    for name in ("weights", "ema", "optimizer"):
        assert same(weights(out, 12, name), weights(trained, 12, name))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(trained, tmp_path):
    out = tmp_path / "small"
    shutil.copytree(trained, out)
    damaged = out / "checkpoints" / "step-0000012" / "ema.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    done = dimr_command(
        "train", "--out", out, "--workers", "0", "--sample-every", "0", "--device", "cpu"
    )
    assert str(damaged) in done.stderr and "step-0000008" in done.stderr
    assert same(weights(out, 12), weights(trained, 12))


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro", [(1, 4), (2, 8), (2, 2)])
def test_any_split_of_the_batch_gives_the_same_losses(trained, digits, tmp_path, processes, micro):
    dimr_command(
        "train",
        "--data",
        digits,
        "--out",
        tmp_path / "small",
        *SMALL,
        "--micro-batch",
        micro,
        torchrun=processes if processes > 1 else None,
    )
    ours, theirs = (
        np.array([loss for _, loss, _ in read(run)]) for run in (tmp_path / "small", trained)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.slow
def test_seeds_differ(trained, digits, tmp_path):
    dimr_command(
        "train",
        "--data",
        digits,
        "--out",
        tmp_path / "small",
        *SMALL,
        "--seed",
        "1",
        "--steps",
        "2",
    )
    assert read(tmp_path / "small")[0] != read(trained)[0]


@pytest.mark.slow
def test_checkpoints_beyond_keep_are_deleted(digits, tmp_path):
    dimr_command(
        "train",
        "--data",
        digits,
        "--out",
        tmp_path / "small",
        *SMALL,
        "--steps",
        "6",
        "--save-every",
        "2",
        "--keep",
        "2",
    )
    assert [runfolder.step_of(c) for c in runfolder.checkpoints(tmp_path / "small")] == [4, 6]


@pytest.mark.slow
def test_max_time_saves_and_stops_with_a_status_of_its_own(digits, tmp_path):
    out = tmp_path / "small"
    done = dimr_command(
        "train",
        "--data",
        digits,
        "--out",
        out,
        *SMALL,
        "--steps",
        "100000",
        "--max-time",
        "0.02",
        check=False,
    )
    assert done.returncode == 75 and "max-time" in done.stdout
    assert runfolder.step_of(runfolder.checkpoints(out)[-1]) == read(out)[-1][0] < 100000


@pytest.mark.slow
def test_fine_tuning_takes_what_fits_and_says_what_starts_fresh(trained, digits, tmp_path):
    three = tmp_path / "three"
    for name in "012":
        shutil.copytree(digits / name, three / name)
    done = dimr_command(
        "train",
        "--data",
        three,
        "--out",
        tmp_path / "tuned",
        "--init",
        trained,
        "--layers",
        "5,2",
        "--steps",
        "1",
        "--warmup",
        "0",
        "--lr",
        "1e-9",
        "--weight-decay",
        "0",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--sample-every",
        "0",
        "--device",
        "cpu",
    )
    assert "fresh: branches.0.blocks.3." in done.stderr
    assert "class embeddings: 3 taken by name and the null class; fresh: none" in done.stderr
    tuned, before = weights(tmp_path / "tuned", 1), weights(trained, 12, "ema")
    assert tuned["branches.0.class_token.weight"].shape == (4, 16)
    torch.testing.assert_close(
        tuned["branches.0.position"], before["branches.0.position"], rtol=0, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--lr", "5e-4", "lr"),
        ("--dims", "32,8", "dims [16, 8], not [32, 8]"),
        ("--seed", "3", "seed"),
        ("--variant", "m3r", "variant"),
    ],
)
def test_a_run_folder_of_another_configuration_is_refused(trained, option, value, words):
    done = dimr_command("train", "--out", trained, option, value, check=False)
    assert (
        done.returncode == 1
        and words in done.stderr
        and "choose another --out" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_an_uneven_split_names_the_nearest_sizes():
    with pytest.raises(UserError, match="use 96 or 104"):
        training.divide(100, 8)


@pytest.mark.slow
def test_a_run_in_use_names_its_owner(trained):
    with storage.locked(trained):
        done = dimr_command("train", "--out", trained, check=False)
    assert done.returncode == 1 and "in use by process" in done.stderr


@pytest.mark.slow
def test_training_ends_after_a_run_of_bad_steps(digits, tmp_path):
    done = dimr_command(
        "train",
        "--data",
        digits,
        "--out",
        tmp_path / "run",
        *SMALL,
        "--lr",
        "1e30",
        "--warmup",
        "0",
        "--steps",
        "500",
        check=False,
    )
    assert (
        done.returncode == 1
        and "not finite for 50 steps" in done.stderr
        and "1e+30" in done.stderr
        and "Traceback" not in done.stderr
    )
