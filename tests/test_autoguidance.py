"""Autoguidance (arXiv:2406.02507) and films of how images come about."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from conftest import DATA, dimr_command
from PIL import Image

import diffusion
import imagesets
import networks
import sampling
from storage import UserError

RUN = DATA / "v0.1.0" / "run"
SHAPE = (5, 2, 4, 4)
LABELS = torch.arange(5) % 3


class Gaussian:
    """The best possible network for images whose values all are normal around a mean per class, or
    around 0 for the null class: it predicts what `objective` and `schedule` ask for."""

    def __init__(self, objective="epsilon", schedule="linear", means=(1.0, -0.5, 2.0), null=True):
        self.config = types.SimpleNamespace(
            objective=objective,
            noise_schedule=schedule,
            channels=2,
            null_class=null,
            embeddings=len(means) + null,
        )
        self.means = torch.tensor([*means, 0.0], dtype=torch.float64)

    def time(self, schedule, t):
        return torch.as_tensor(t)

    def __call__(self, x, time, y):
        schedule = diffusion.SCHEDULES[self.config.noise_schedule]()
        alpha, sigma = schedule.alpha(time.double()), schedule.sigma(time.double())
        mean = self.means[y][:, None, None, None]
        x0 = mean + alpha / (alpha**2 + sigma**2) * (x - alpha * mean)
        noise = sigma / (alpha**2 + sigma**2) * (x - alpha * mean)
        return (diffusion.OBJECTIVES[self.config.objective].target(x0, noise),)


def noisy(schedule, t):
    generator = torch.Generator().manual_seed(3)
    x0 = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return schedule.alpha(t) * x0 + schedule.sigma(t) * noise


def denoised(guide=None, t=0.4, guidance=diffusion.NO_GUIDANCE, model=None):
    model = model or Gaussian()
    schedule = diffusion.SCHEDULES[model.config.noise_schedule]()
    x = noisy(schedule, t)
    return diffusion.denoiser(model, schedule, LABELS, guidance, guide=guide)(x, t)


WORSE = Gaussian(means=(0.0, 0.1, 0.2))


def test_the_noise_goes_away_from_the_guides():
    own, theirs = denoised().noise, denoised(model=WORSE).noise
    pushed = denoised(diffusion.Guide(WORSE, 2.5)).noise
    torch.testing.assert_close(pushed, own + 1.5 * (own - theirs))
    assert (pushed - own).abs().max() > 0.1


def test_both_kinds_of_guidance_add_up():
    own, theirs = denoised().noise, denoised(model=WORSE).noise
    guidance = diffusion.Guidance(3.0)
    without_class = denoised(guidance=guidance).noise
    both = denoised(diffusion.Guide(WORSE, 2.0), guidance=guidance).noise
    torch.testing.assert_close(both, without_class + (own - theirs))


def test_it_guides_networks_that_know_no_null_class():
    model = Gaussian(null=False)
    pushed = denoised(diffusion.Guide(WORSE, 2.0), model=model).noise
    torch.testing.assert_close(pushed, denoised(diffusion.Guide(WORSE, 2.0)).noise)


def test_power_and_interval_of_guidance_are_the_guides_too():
    schedule = diffusion.Linear()
    interval = diffusion.Guidance(1.0, interval=(0.3, 5.0))
    inside, outside = 0.4, 0.02
    assert 0.3 < schedule.sigma(inside) / schedule.alpha(inside) < 5
    assert schedule.sigma(outside) / schedule.alpha(outside) < 0.3
    guide = diffusion.Guide(WORSE, 2.0)
    assert torch.equal(denoised(guide, outside, interval).noise, denoised(t=outside).noise)
    full = denoised(guide, inside).noise
    assert torch.equal(denoised(guide, inside, interval).noise, full)
    power = diffusion.Guidance(1.0, power=2.0)
    scale = dataclasses.replace(power, scale=2.0).at(schedule, inside)
    expected = denoised(diffusion.Guide(WORSE, scale), inside).noise
    assert 1 < scale < 2
    torch.testing.assert_close(denoised(guide, inside, power).noise, expected)


@pytest.mark.parametrize("objective, schedule", [("epsilon", "ddpm"), ("velocity", "straight")])
@pytest.mark.parametrize("t", [0.999, 0.7, 0.2, 0.01])
def test_a_guide_may_predict_another_quantity_on_another_schedule(objective, schedule, t):
    alike = Gaussian(objective, schedule, means=(0.0, 0.1, 0.2))
    pushed = denoised(diffusion.Guide(alike, 2.0), t)
    expected = denoised(diffusion.Guide(WORSE, 2.0), t)
    # at the ends λ of one schedule is beyond the other's
    torch.testing.assert_close(pushed.noise, expected.noise, rtol=1e-3, atol=2e-2)
    if t in (0.7, 0.2):
        torch.testing.assert_close(pushed.noise, expected.noise, rtol=1e-5, atol=1e-6)


def test_a_velocity_is_guided_by_one_that_predicts_noise_from_pure_noise_on():
    model = Gaussian("velocity", "straight")
    guide = diffusion.Guide(WORSE, 2.0)
    assert denoised(guide, 1.0, model=model).noise.isfinite().all()


def test_scales_below_one_are_refused():
    with pytest.raises(ValueError, match="guide scale 0.5 is not at least 1"):
        diffusion.Guide(WORSE, 0.5)


# -------------------------------------------------------------------------------- the generator


@pytest.fixture
def raw_guided():
    """Averaged weights, and as guide the raw ones of the same run."""
    generator = sampling.load(RUN, device="cpu")
    return dataclasses.replace(generator, guide=sampling.load(RUN, ema=False, device="cpu"))


def draw(generator, **settings):
    return generator.images([1, 2, 3], [4, 5, 6], steps=6, **settings)


def test_a_guide_changes_images_and_a_scale_of_one_does_not(raw_guided):
    alone = dataclasses.replace(raw_guided, guide=None)
    unguided = draw(alone, cfg=1)
    assert np.array_equal(draw(raw_guided, cfg=1, guide_scale=1), unguided)
    assert not np.array_equal(draw(raw_guided, cfg=1, guide_scale=3), unguided)
    assert np.array_equal(draw(raw_guided), draw(raw_guided, cfg=1, guide_scale=1.5))


def test_sets_say_how_they_were_guided_and_others_are_described_as_ever(raw_guided):
    settings = raw_guided.resolved(sampling.Settings())
    about = sampling.describe(raw_guided, settings)
    assert about["guide"] == raw_guided.guide.hash and about["guide_scale"] == 1.5
    assert about["cfg"] == 1
    alone = dataclasses.replace(raw_guided, guide=None)
    settings = alone.resolved(sampling.Settings())
    assert settings.cfg == 1.5
    assert not {"guide", "guide_scale"} & sampling.describe(alone, settings).keys()
    assert "guide1.5" in sampling.folder_name(raw_guided, raw_guided.resolved(sampling.Settings()))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"size": 16}, "has size 16, and"),
        ({"num_classes": 9}, "has num_classes 9, and"),
        ({"space": "latent", "channels": 4}, "has space latent, and"),
    ],
)
def test_a_guide_of_other_images_is_refused(raw_guided, changes, words):
    small = dict(layers=(1, 1), dims=(32, 16), heads=2)
    config = dataclasses.replace(raw_guided.config, **small, **changes)
    model = networks.new(config)
    other = dataclasses.replace(raw_guided.guide, model=model, hash="other")
    with pytest.raises(UserError, match=words):
        sampling.check_guide(dataclasses.replace(raw_guided, guide=other))


def test_a_guide_of_classes_in_another_order_is_refused(raw_guided):
    names = raw_guided.classes
    other = dataclasses.replace(raw_guided.guide, classes=names[::-1])
    with pytest.raises(UserError, match="know other classes by the same numbers"):
        sampling.check_guide(dataclasses.replace(raw_guided, guide=other))


@pytest.mark.slow
def test_the_command_draws_guided_images_and_their_film(tmp_path):
    common = ["sample", "--weights", RUN, "-n", "3", "--steps", "20", "--device", "cpu", "--json"]
    guide = ["--guide", DATA / "v0.1.0" / "released.pth"]
    done = dimr_command(*common, *guide, "--film", "--out", tmp_path / "film")
    result = json.loads(done.stdout)
    assert result["guide_scale"] == 1.5 and result["cfg"] == 1
    with Image.open(result["animation"]) as animation:
        assert animation.n_frames > 3  # of 13, equal ones being one
        last = np.asarray(animation.convert("L"))
        animation.seek(animation.n_frames - 1)
        assert not np.array_equal(last, np.asarray(animation.convert("L")))
    assert len(imagesets.open_set(tmp_path / "film")) == 3  # films are no samples
    plain = json.loads(dimr_command(*common, *guide, "--out", tmp_path / "plain").stdout)
    assert "film" not in plain and not (tmp_path / "plain" / "film.png").exists()
    for image in sorted((tmp_path / "plain").glob("class*.png")):
        with Image.open(image) as one, Image.open(tmp_path / "film" / image.name) as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_film_ends_with_the_sample(raw_guided):
    settings = raw_guided.resolved(sampling.Settings(steps=10))
    frames = sampling.film_frames(raw_guided, [1, 2], [4, 5], settings, np.array([0, 4, 9]))
    assert [number for number, _ in frames] == [1, 5, 10, 10]
    images = raw_guided.images([1, 2], [4, 5], steps=10)
    assert np.array_equal(frames[-1][1], images)
    distance = [np.abs(shown.astype(float) - images).mean() for _, shown in frames]
    assert distance[0] > distance[1] > distance[2] >= distance[3] == 0
