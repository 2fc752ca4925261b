"""What neither a named variant nor the user says is in proportion to the data and the run."""

import dataclasses

import pytest

import defaults
import dimr
import recipes


class Data:
    """As dataset.open_data gives it, without any images."""

    root = "photos"
    classes = ["cat", "dog"]

    def __init__(self, size, images=5000, kind="pixels", channels=3):
        self.size = size
        self.images = images
        self.kind = kind
        self.channels = channels

    def __len__(self):
        return self.images


@pytest.mark.parametrize(
    "size, grids",
    [
        (8, (4, 8)),
        (16, (8, 16)),
        (28, (14, 28)),
        (32, (8, 16, 32)),
        (64, (16, 32, 64)),
        (128, (16, 32, 64, 128)),
        (50, (25, 50)),
        (25, (25,)),
    ],
)
def test_images_are_halved_until_attention_can_afford_them(size, grids):
    config = defaults.network(Data(size))
    assert config.grids == grids
    assert (config.size, config.channels, config.num_classes) == (size, 3, 2)


def test_latents_get_the_papers_branches():
    for variant in ("xl2r", "xl3r"):
        size = dimr.VARIANTS[variant].size
        config = defaults.network(Data(size, kind="latents", channels=4))
        assert config.grids == dimr.VARIANTS[variant].grids
        assert config.space == "latent"


def test_more_pixels_and_more_images_make_a_larger_network():
    costs = [sum(defaults.network(Data(size)).macs) for size in (8, 16, 32, 64, 128)]
    assert costs == sorted(costs)
    few = defaults.network(Data(64))
    many = defaults.network(Data(64, images=defaults.MANY))
    assert many.dims == tuple(2 * dim for dim in few.dims)


def test_what_is_given_decides_how_many_branches_there_are():
    assert len(defaults.network(Data(64), {"dims": (40, 20)}).layers) == 2
    assert len(defaults.network(Data(64), {"layers": (3, 1, 1, 1)}).dims) == 4


def test_heads_divide_the_width():
    for width in (30, 50, 64, 97, 384):
        assert width % defaults.network(Data(64), {"dims": (width,)}).heads == 0


@pytest.mark.parametrize("variant", ["demo", "m3r", "l3r", "xl2r", "xl3r", "g2r"])
def test_the_learning_rate_goes_through_the_demos_and_the_papers(variant):
    published = recipes.RECIPES[variant].lr
    found = defaults.learning_rate(dimr.VARIANTS[variant].dims[0])
    assert found == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize("steps", [1, 7, 40, 400, 5000, 100_000, 1_000_000])
def test_warm_up_and_average_are_parts_of_the_run(steps):
    config = defaults.network(Data(8))
    values = defaults.recipe(config, 1000, steps)
    recipe = recipes.Recipe(**values)
    assert recipe.steps == steps
    assert recipe.warmup <= steps / 10
    assert recipe.label_dropout > 0  # guidance is possible
    if steps > 1:
        assert list(recipes.warnings_of(recipe)) == []
    assert recipe.learning_rate(steps - 1) == recipe.lr


def test_a_long_run_has_the_papers_warm_up_and_average():
    recipe = defaults.recipe(defaults.network(Data(8)), 1000, 1_000_000)
    paper = recipes.Recipe()
    assert (recipe["warmup"], recipe["ema"]) == (paper.warmup, paper.ema)


def test_a_run_of_unsaid_length_sees_the_data_often_within_bounds():
    config = defaults.network(Data(8))
    assert defaults.recipe(config, 10)["steps"] == defaults.SHORTEST
    assert defaults.recipe(config, 10**9)["steps"] == defaults.LONGEST
    between = defaults.recipe(config, 20_000)
    assert between["steps"] * between["batch_size"] == 20_000 * defaults.PASSES


def test_a_beginning_as_long_as_the_run_is_warned_of():
    recipe = dataclasses.replace(recipes.RECIPES["xl2r"], steps=400)
    warmup, average = recipes.warnings_of(recipe)
    assert "warm-up of 5,000 steps is as long as the run of 400" in warmup
    assert "rate ends at 1.6e-05" in warmup
    assert "--warmup 20 would do" in warmup
    assert "EMA 0.9999" in average and "--ema 0.975 would do" in average
    better = dataclasses.replace(recipe, warmup=20, ema=0.975)
    assert list(recipes.warnings_of(better)) == []


@pytest.mark.parametrize("variant", recipes.RECIPES)
def test_named_variants_are_warned_of_nothing(variant):
    assert list(recipes.warnings_of(recipes.RECIPES[variant])) == []
