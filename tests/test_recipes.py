"""What a run is before it begins: whose recipe, which network, what it takes from other weights."""

import dataclasses
import json
import shutil

import pytest
import torch

import dataset
import imagenet_names
import networks
import recipes
import runfolder
import validation
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


def plan(out, data, **options):
    given = {"variant": None, "recipe": None, "network": None, "init": None, **options}
    source = recipes.Source(data)
    return recipes.make_plan(out, source, validation.Validation(), device=CPU, **given)


@pytest.mark.slow
def test_what_older_runs_do_not_say_was_not_so(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["data"]["exif"], config["recipe"]["deterministic"]
    (run / "config.json").write_text(json.dumps(config))
    assert plan(run, None).record["data"]["exif"] is False
    assert recipes.is_deterministic(run, None) is False
    assert recipes.is_deterministic(run, {"deterministic": True}) is True


def test_a_null_class_stays_though_no_label_is_dropped(digits, tmp_path):
    init = weights(tmp_path / "a.safetensors")
    still = {"label_dropout": 0.0}
    assert plan(tmp_path / "run", digits, init=init, recipe=still).config.null_class is True
    assert plan(tmp_path / "run", digits, variant="demo", recipe=still).config.null_class is False


def test_a_run_validates_where_it_did_unless_another_place_is_given(digits, tmp_path):
    known = {"path": str(digits), "every": 5}
    place = recipes.held_out_place(tmp_path, validation.Validation(), known)
    assert (place.path, place.every) == (str(digits), 5)
    given = validation.Validation(path=str(tmp_path), every=7)
    place = recipes.held_out_place(tmp_path, given, known)
    assert (place.path, place.every) == (str(tmp_path), 7)


@pytest.mark.parametrize("first", ["forced", "unknown sample"])
def test_what_may_differ_hides_nothing_that_may_not(first):
    before = {"variant": "demo", "config": {}, "recipe": {"lr": 1e-3, "seed": 0}}
    before["data"] = {"sample": "a", "fingerprint": "b"}
    before["validation"] = {"fingerprint": "c"}
    now = json.loads(json.dumps(before))
    if first == "forced":
        now["recipe"] |= {"lr": 2e-3, "seed": 1}
        with pytest.raises(UserError, match="was trained with seed 0, not 1"):
            recipes.check_same("run", before, now, force=True)
        now["recipe"]["seed"] = 0
        assert recipes.check_same("run", before, now, force=True) == {"lr": [1e-3, 2e-3]}
    else:
        before["data"]["sample"] = None
        now["validation"]["fingerprint"] = "d"
        with pytest.raises(UserError, match="fingerprint c, not d"):
            recipes.check_same("run", before, now, force=False)


def test_dits_recipe_is_its_papers():  # arXiv:2212.09748, Sec. 4: AdamW, a constant 1e-4, no decay
    recipe = recipes.RECIPES["dit-xl2"]
    assert (recipe.lr, recipe.batch_size, recipe.weight_decay) == (1e-4, 256, 0)
    assert recipe.betas == (0.9, 0.999) and recipe.warmup == 0
