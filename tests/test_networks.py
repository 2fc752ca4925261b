"""All networks in one place: Table 2's ladder, the peers' training, and files of others."""

import argparse
import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from conftest import DATA
from safetensors.torch import load_file

import cli
import diffusion
import dimr
import downloads
import networks
import peers
import recipes
import runfolder
import sampling
import training
from storage import UserError, load_tensors, save_tensors

LADDER = {  # parameters of Table 2's rows
    "table2-1": 130_940_292,
    "table2-2": 193_095_300,
    "table2-3": 217_877_769,
    "table2-4": 153_953_289,
    "table2-5": 132_940_809,
    "table2-6": 132_940_809,
}
SMALL = {  # what makes a variant small, by kind
    "dimr": dict(layers=(3, 2), dims=(16, 8), heads=2),
    "uvit": dict(layers=(3,), dims=(16,), heads=2, patch=2),
    "uvit-adaln": dict(layers=(3,), dims=(16,), heads=2, patch=2),
    "dit": dict(layers=(2,), dims=(16,), heads=2, patch=2),
    "sit": dict(layers=(2,), dims=(16,), heads=2, patch=2),
}
CPU = torch.device("cpu")


def kind_of(variant):
    return networks.kind(networks.VARIANTS[variant])


def small(variant, size=8, **fields):
    """A small network of the variant's make, every trained number of which matters."""
    config = networks.in_space(networks.VARIANTS[variant], "pixel")
    config = networks.changed(
        config, SMALL[kind_of(variant)], size=size, channels=1, num_classes=10, **fields
    )
    torch.manual_seed(0)
    model = networks.new(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def train(digits, out, variant, steps, **options):
    recipe = dict(steps=steps, batch_size=8, warmup=0, seed=3)
    return training.train(
        out,
        training.Source(digits, workers=0),
        variant=variant,
        recipe=recipe,
        network=SMALL[kind_of(variant)],
        device="cpu",
        saving=training.Saving(every=2, keep=0, sample_every=0),
        quiet=True,
        **options,
    )


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


# ------------------------------------------------------------------------------------------- tables


def test_every_variant_has_a_recipe():
    assert recipes.RECIPES.keys() == networks.VARIANTS.keys()


@pytest.mark.parametrize("variant", networks.VARIANTS)
def test_a_configuration_comes_back_from_what_a_file_says(variant):
    config = networks.VARIANTS[variant]
    record = json.loads(runfolder.metadata(config)["config"])
    assert networks.config_of(record) == config


def test_table_2_has_the_papers_parameters():
    for variant, count in LADDER.items():
        with torch.device("meta"):
            model = networks.new(networks.VARIANTS[variant])
        assert sum(p.numel() for p in model.parameters()) == count, variant


def test_the_rows_of_table_2_differ_by_one_thing_each():
    def differences(a, b):
        found = set()
        for one, other in (
            (networks.VARIANTS[a], networks.VARIANTS[b]),
            (recipes.RECIPES[a], recipes.RECIPES[b]),
        ):
            values, others = dataclasses.asdict(one), dataclasses.asdict(other)
            found |= {name for name in values if values[name] != others[name]}
        return found

    assert differences("table2-1", "uvit-m4") == set()
    assert differences("table2-1", "table2-2") == {"kind"}
    assert differences("table2-3", "table2-4") == {"norm"}
    assert differences("table2-4", "table2-5") == {"mlp"}
    assert differences("table2-5", "table2-6") == {"loss"}
    assert differences("table2-6", "m3r") == set()


def test_the_peers_recipes_are_their_papers():
    for name in ("dit-xl2", "sit-xl2"):
        recipe = recipes.RECIPES[name]
        assert (recipe.lr, recipe.betas, recipe.weight_decay) == (1e-4, (0.9, 0.999), 0)
        assert (recipe.warmup, recipe.batch_size, recipe.ema) == (0, 256, 0.9999)
        assert recipe.learning_rate(0) == recipe.learning_rate(10**6) == 1e-4
        assert recipe.label_dropout == 0.1
    dropout = {name: recipes.RECIPES[name].label_dropout for name in peers.VARIANTS}
    assert [dropout[name] for name in ("uvit-m4", "uvit-l4")] == [0, 0]
    assert [dropout[name] for name in ("uvit-l2", "uvit-l4-512")] == [0.15, 0.15]
    assert [dropout[name] for name in ("uvit-h2", "uvit-h4")] == [0.1, 0.1]
    assert recipes.RECIPES["uvit-m4"] == recipes.RECIPES["m3r"]


# --------------------------------------------------------------------------------------- the shapes


def test_the_command_lines_words_become_a_peers_fields():
    config = networks.changed(peers.VARIANTS["uvit-m4"], SMALL["uvit"], size=28)
    assert (config.depth, config.width, config.heads, config.patch) == (3, 16, 2, 2)
    assert config.size == 28 and config.convolution


@pytest.mark.parametrize(
    "variant, changes, message",
    [
        ("dit-b2", dict(norm="tdln"), "--norm is not for this kind, dit; .* --layers, --dims"),
        ("m3r", dict(patch=2), "--patch is not for this kind, dimr; .* --layers, --dims, --heads"),
        ("uvit-m4", dict(layers=(3, 2)), "--layers 3,2 has 2 numbers, and this network one branch"),
        ("uvit-m4", dict(layers=(4,)), "depth 4 is even: .* use 3 or 5"),
        ("sit-xl2", dict(objective="epsilon"), "--objective is not for this kind, sit"),
    ],
)
def test_what_a_kind_does_not_have_is_refused(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        networks.changed(networks.VARIANTS[variant], changes)


def test_a_peer_follows_its_data_into_either_space_and_dimr_does_not():
    pixels = networks.in_space(peers.VARIANTS["uvit-h2"], "pixel")
    assert (pixels.space, pixels.noise_schedule) == ("pixel", "linear")
    assert networks.in_space(dimr.VARIANTS["m3r"], "latent") == dimr.VARIANTS["m3r"]


# --------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("variant", ["table2-3", "table2-4", "table2-5"])
def test_the_loss_of_the_output_alone_leaves_no_parameter_without_a_gradient(variant):
    recipe = dataclasses.replace(recipes.RECIPES[variant], precision="fp32", compile=False)
    state = training.State(small(variant, null_class=False), recipe, CPU)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    sums, branches = training.losses(state, images, torch.arange(4), 0)
    assert torch.equal(sums, branches[-1])
    assert not torch.equal(branches[0], branches[-1])
    sums.sum().backward()
    assert all(p.grad is not None for p in state.parameters.values())
    coarse = state.network.branches[0].out.weight
    assert not coarse.grad.any() and state.network.branches[1].out.weight.grad.any()


def test_the_multi_scale_loss_weighs_coarse_predictions_by_their_cells():
    target = torch.randn(2, 1, 4, 4)
    predictions = [torch.randn(2, 1, 2, 2), torch.randn(2, 1, 4, 4)]
    total, branches = diffusion.multi_scale_loss(predictions, target)
    assert torch.equal(total, branches[0] / 4 + branches[1])


# ----------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*LADDER, "uvit-m4", "dit-b2", "sit-xl2"])
def test_every_kind_trains_goes_on_and_draws(digits, tmp_path, variant):
    train(digits, tmp_path / "whole", variant, 4)
    train(digits, tmp_path / "cut", variant, 2)
    assert train(digits, tmp_path / "cut", variant, 4)["step"] == 4
    for name in ("weights", "ema", "optimizer"):
        whole, cut = (
            load_tensors(tmp_path / run / "checkpoints/step-0000004" / f"{name}.safetensors")[0]
            for run in ("whole", "cut")
        )
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    generator = sampling.load(tmp_path / "cut", device="cpu")
    assert networks.kind(generator.config) == kind_of(variant)
    images = generator.images([3, 1], [5, 6], steps=4)
    assert images.shape == (2, 8, 8, 1)
    assert (images[1:] == generator.images([1], [6], batch_size=2, steps=4)).all()
    record = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert record["recipe"]["loss"] == recipes.RECIPES[variant].loss


@pytest.mark.slow
def test_what_does_not_train_is_in_the_files_and_stays(digits, tmp_path, capsys):
    options = dict(variant="dit-b2", network=SMALL["dit"], device="cpu")
    training.train(
        tmp_path / "run",
        training.Source(digits, workers=0),
        recipe=dict(steps=2, batch_size=8),
        saving=training.Saving(sample_every=0),
        **options,
    )
    assert "DiT's learned variance is not trained here" in capsys.readouterr().err
    checkpoint = tmp_path / "run/checkpoints/step-0000002"
    for name in ("weights", "ema"):
        tensors, _ = load_tensors(checkpoint / f"{name}.safetensors")
        assert torch.equal(tensors["pos_embed"][0], peers.grid_positions(16, 4))
    moments, _ = load_tensors(checkpoint / "optimizer.safetensors")
    assert not any("pos_embed" in name for name in moments)
    assert not runfolder.read_weights(checkpoint / "ema.safetensors")[0].config.learned_variance


@pytest.mark.slow
def test_a_peer_starts_from_a_peers_weights_and_not_from_anothers(digits, tmp_path):
    model = small("sit-xl2", null_class=True)
    save_tensors(tmp_path / "sit.safetensors", model.state_dict())  # as others' files: no record
    options = dict(init=tmp_path / "sit.safetensors")
    with pytest.raises(UserError, match="--kind dit or --kind sit"):
        train(digits, tmp_path / "a", "sit-xl2", 2, **options)
    train(digits, tmp_path / "b", "sit-xl2", 1, **options, kind="sit")
    taken, _ = load_tensors(tmp_path / "b/checkpoints/step-0000001/weights.safetensors")
    assert torch.allclose(
        taken["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight, atol=3e-4
    )
    with pytest.raises(UserError, match="kind sit, and --variant m3r is of kind dimr"):
        train(digits, tmp_path / "c", "m3r", 1, init=tmp_path / "b")


def test_released_dit_draws_with_its_learned_variance_from_each_images_own_seed(tmp_path):
    dit_file(tmp_path / "x.pt")
    model, _ = runfolder.read_weights(tmp_path / "x.pt", heads=3, kind="dit")
    settings = sampling.Settings(preset="paper", steps=6, cfg=1.5, cfg_channels=3)
    settings = settings.resolved(model.config)
    assert (settings.solver, settings.grid) == ("ddpm", "own")
    alone = sampling.solve(model, [3], [12], settings, device=CPU)
    among = sampling.solve(model, [1, 3, 5], [4, 12, 9], settings, device=CPU)
    torch.testing.assert_close(among[1:2], alone, rtol=1e-4, atol=1e-4)
    trained = dataclasses.replace(model.config, learned_variance=False)
    with pytest.raises(UserError, match="ddpm takes a learned variance"):
        dataclasses.replace(settings).resolved(trained)


# -------------------------------------------------------------------------------------------- files


def dit_file(path, wrapped=None, name="dit"):
    """A file under DiT's names with the small network of the parity arrays."""
    arrays = load_file(DATA / f"{name}.safetensors")
    tensors = {}
    for key, value in arrays.items():
        if key.startswith("weight."):
            tensors[key.removeprefix("weight.")] = value
    content = tensors
    if wrapped:
        other = {key: value + 1 for key, value in tensors.items()}
        args = argparse.Namespace(model=wrapped, results_dir="results", global_seed=0)
        content = {"model": other, "ema": tensors, "opt": {"state": {}}, "args": args}
    torch.save(content, path)
    return tensors


@pytest.mark.parametrize("name, kind", [("DiT-XL/2", "dit"), ("SiT-XL/2", "sit")])
def test_training_checkpoints_say_their_kind_and_give_their_average(tmp_path, name, kind):
    tensors = dit_file(tmp_path / "0400000.pt", wrapped=name)
    model, record = runfolder.read_weights(tmp_path / "0400000.pt", heads=3)
    assert networks.kind(model.config) == kind and record == {}
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())


class Stranger:
    """What no file of weights should hold."""


def test_nothing_but_a_namespace_may_lie_beside_the_tensors(tmp_path):
    for content in (Stranger(), argparse.FileType()):
        torch.save({"ema": {"a": torch.zeros(1)}, "args": content}, tmp_path / "x.pt")
        with pytest.raises(UserError, match="nothing in it was run"):
            load_tensors(tmp_path / "x.pt")


def test_a_file_is_told_what_no_tensor_tells(tmp_path):
    dit_file(tmp_path / "x.pt")
    for options, message in (
        ({}, "say which with --kind dit or --kind sit"),
        (dict(kind="dit"), "width 48 and depth 4; give it with --heads"),
    ):
        with pytest.raises(UserError, match=message):
            runfolder.read_weights(tmp_path / "x.pt", **options)
    model, _ = runfolder.read_weights(tmp_path / "x.pt", heads=3, kind="sit")
    assert model.config.objective == "velocity"


def test_a_file_that_says_what_it_is_is_not_told_otherwise(tmp_path):
    model = small("sit-xl2", null_class=True)
    runfolder.write_weights(tmp_path / "x.safetensors", model, {})
    assert runfolder.read_weights(tmp_path / "x.safetensors", kind="sit")[0].config == model.config
    with pytest.raises(UserError, match="--kind dit: it says that it is sit"):
        runfolder.read_weights(tmp_path / "x.safetensors", kind="dit")
    with pytest.raises(UserError, match="network is of kind sit; write .*x.safetensors instead"):
        runfolder.write_weights(tmp_path / "x.pth", model, {})


def test_a_file_fetched_by_name_is_known_by_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DIMR_HOME", str(tmp_path))
    path = downloads.place("dit-xl2-256")
    path.parent.mkdir(parents=True)
    dit_file(path)
    generator = sampling.load("dit-xl2-256", device="cpu", heads=3)
    assert generator.config.kind == "dit" and generator.config.learned_variance
    assert "CC BY-NC 4.0" in downloads.ASSETS["dit-xl2-256"].licence


def test_a_peers_file_is_converted_shown_and_drawn_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dit_file(tmp_path / "x.pt", name="sit")
    told = ("--kind", "sit", "--heads", 3)
    shown = json.loads(invoke("info", "x.pt", *told, "--json").output)
    result = json.loads(invoke("convert", "x.pt", "x.safetensors", *told, "--json").output)
    assert result["config"]["kind"] == "sit" and result["params"] == shown["params"]
    again = json.loads(invoke("info", "x.safetensors", "--json").output)
    assert again["params"] == shown["params"] and again["branches"] == shown["branches"]
    ours, theirs = (
        sampling.load(name, device="cpu", **options)
        for name, options in (("x.safetensors", {}), ("x.pt", dict(kind="sit", heads=3)))
    )
    settings = sampling.Settings(steps=2).resolved(ours.config)
    drawn = [sampling.solve(g.model, [1], [7], settings, device=CPU) for g in (ours, theirs)]
    assert torch.equal(*drawn)
