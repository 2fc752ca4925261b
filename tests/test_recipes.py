"""What a run is before it begins: whose recipe, which network, what it takes from other weights."""

import dataclasses
import json

import pytest
import torch

import dataset
import imagenet_names
import networks
import recipes
import runfolder
from storage import UserError

CPU = torch.device("cpu")
SMALL = networks.config_of(
    dict(size=8, channels=1, layers=[1, 1], dims=[8, 8], heads=1, space="pixel")
    | dict(num_classes=10, null_class=True)
)


@pytest.mark.parametrize("device, default", [("cpu", "fp32"), ("cuda", "bf16")])
def test_precision_is_the_devices_unless_it_is_said(device, default):
    device = torch.device(device)
    assert recipes.settle({}, {}, device).precision == default
    for said in ("fp32", "bf16"):
        assert recipes.settle({}, {"precision": said}, device).precision == said
        assert recipes.settle({"precision": said}, {}, device).precision == said


def test_it_is_compiled_on_gpus_alone_and_not_where_it_is_to_be_deterministic():
    gpu = torch.device("cuda")
    assert recipes.settle({}, {}, gpu).compile is True
    assert recipes.settle({}, {"deterministic": True, "precision": "fp32"}, CPU).compile is False
    assert recipes.settle({}, {}, CPU).compile is False
    assert recipes.settle({}, {"compile": True}, CPU).compile is True


def test_snapshots_are_spread_over_the_run_and_never_less_than_a_step_apart():
    for steps, every in ((640, 10), (64, 1), (10, 1)):
        recipe = recipes.settle({}, {"ema_profiles": (0.05, 0.1), "steps": steps}, CPU)
        assert recipe.ema_every == every


def weights(path, **record):
    runfolder.write_weights(path, networks.new(record.pop("config", SMALL)), record)
    return str(path)


def test_weights_hand_on_their_recipe_but_not_what_belonged_to_their_run(tmp_path):
    recipe = dataclasses.asdict(recipes.Recipe(lr=1e-3, seed=7, steps=12, precision="fp32"))
    initial = recipes.read_initial(weights(tmp_path / "a.safetensors", recipe=recipe), None, None)
    assert initial.recipe["lr"] == 1e-3 and initial.recipe["betas"] == [0.99, 0.99]
    assert not recipes.OF_THE_RUN & initial.recipe.keys()
    assert initial.recipe.keys() | recipes.OF_THE_RUN == recipe.keys()


def test_weights_say_what_lasts_of_a_recipe_and_no_more(digits):
    data = dataset.open_data(digits)
    record = recipes.weights_record(data, recipes.Recipe())
    assert record["classes"] == data.classes
    assert record["recipe"].keys().isdisjoint(recipes.OF_THE_RUN)
    names = {field.name for field in dataclasses.fields(recipes.Recipe)}
    assert record["recipe"].keys() | recipes.OF_THE_RUN == names


def test_only_weights_without_names_that_know_1000_classes_know_imagenets(tmp_path):
    many = dataclasses.replace(SMALL, num_classes=1000)
    nameless = recipes.read_initial(weights(tmp_path / "a.safetensors", config=many), None, None)
    assert nameless.classes == [identifier for identifier, _ in imagenet_names.CLASSES]
    names = [f"c{i}" for i in range(1000)]
    path = weights(tmp_path / "b.safetensors", config=many, classes=names)
    assert recipes.read_initial(path, None, None).classes == names
    assert recipes.read_initial(weights(tmp_path / "c.safetensors"), None, None).classes == []


@pytest.mark.parametrize("change", [{"heads": 3}, {"dims": (8, 8, 8)}])
def test_a_network_that_can_not_be_is_one_line(digits, change):
    data = dataset.open_data(digits)
    with pytest.raises(UserError, match="this network can't be built: "):
        recipes.configure(SMALL, data, True, **change)
    with pytest.raises(UserError, match="this network can't be built: "):
        recipes.first_config(None, None, None, data, change | {"layers": (1,)})


@pytest.mark.parametrize("damage", [{"dims": [8]}, {"heads": "two"}, {"more": 1}, {"size": None}])
def test_a_damaged_configuration_is_one_line(damage):
    config = json.loads(json.dumps(dataclasses.asdict(SMALL)))
    assert recipes.first_config({"config": config}, None, None, None, {}) == SMALL
    with pytest.raises(UserError, match=r"the run's config.json is damaged \(config: "):
        recipes.first_config({"config": config | damage}, None, None, None, {})
    del config["layers"]
    with pytest.raises(UserError, match=r"the run's config.json is damaged \(config: "):
        recipes.first_config({"config": config}, None, None, None, {})
