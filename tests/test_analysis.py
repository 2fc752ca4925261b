"""Principal components of adaLN-Zero's vectors, and TD-LN's over time."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.decomposition import PCA
from test_networks import dit_file, small

import analysis
import cli
import diffusion
import dimr
import pictures
import runfolder
import sampling
import solver

DIT = ("--kind", "dit", "--heads", 3)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def analyse(*arguments, status=0):
    result = CliRunner().invoke(cli.main, ["analyse", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def found(*arguments):
    return json.loads(analyse(*arguments, "--json").stdout)


def network(norm, **fields):
    """A small DiMR of this norm that has moved away from its start."""
    torch.manual_seed(0)
    config = dataclasses.replace(dimr.VARIANTS["demo"], layers=(3, 2), dims=(16, 8), heads=2)
    model = dimr.DiMR(dataclasses.replace(config, norm=norm, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# principal components


def test_shares_are_those_of_scikit_learns_pca():
    vectors = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(12)
    theirs = PCA().fit(vectors.double().numpy()).explained_variance_ratio_
    assert analysis.shares(vectors) == pytest.approx(theirs[: analysis.COMPONENTS])


def test_vectors_that_do_not_vary_have_no_components():
    assert analysis.shares(torch.full((5, 3), 0.1)) == [0.0] * analysis.COMPONENTS


def test_a_dits_vectors_over_steps_and_classes_are_what_is_analysed(place):
    dit_file("x.pt")
    result = found("pca", "--weights", "x.pt", *DIT, "--steps", 5, "-n", 4, "--layers", "2,4")
    model, _ = runfolder.read_weights(place / "x.pt", heads=3, kind="dit")
    classes = torch.tensor([0, 3, 6, 9])
    emitted = []
    with torch.no_grad():
        for t in result["times"]:
            emitted.append(model.modulations(model.config.time(t).float()[None], classes)[3])
    vectors = torch.cat(emitted)  # block 4: shift, scale and gate of attention, then of the MLP
    assert len(result["times"]) == 5 and vectors.shape == (20, 6, 48)
    assert [row["layer"] for row in result["layers"]] == [2, 4]
    explained = result["layers"][1]["explained"]
    for name, k in (("beta1", 0), ("gamma1", 1), ("beta2", 3), ("gamma2", 4)):
        theirs = PCA().fit(vectors[:, k].double().numpy()).explained_variance_ratio_
        assert explained[name] == pytest.approx(theirs[: analysis.COMPONENTS], abs=1e-5)
    assert json.loads((place / "analysis/x/pca.json").read_text()) == result
    with Image.open(result["picture"]) as picture:
        assert picture.size == (4 * pictures.BAR_CHART[0] + 20, 2 * pictures.BAR_CHART[1] + 40)


@pytest.mark.parametrize("variant", ["dit-b2", "sit-xl2", "table2-2", "table2-3"])
def test_every_kind_with_adaln_zero_can_be_analysed(place, variant):
    runfolder.write_weights(place / "x.safetensors", small(variant, null_class=True), {})
    result = found("pca", "--weights", "x.safetensors", "--steps", 4, "-n", 2)
    for row in result["layers"]:
        assert row["explained"].keys() == analysis.FAMILIES.keys()
        for shares in row["explained"].values():
            assert sum(shares) == pytest.approx(1, abs=1e-6) and shares == sorted(shares)[::-1]


def test_what_our_own_adaln_zero_emits_is_what_its_blocks_use():
    model = network("adaln")
    t = torch.tensor([0.3])
    vectors = model.modulations(t, torch.tensor([1, 2]))
    assert [tuple(v.shape) for v in vectors] == [(2, 6, 16)] * 3 + [(2, 6, 8)] * 3
    branch = model.branches[1]
    condition = dimr.Condition(t, None, branch.embedder(t))
    block = branch.blocks[2]
    x = torch.randn(1, 64, 8)
    beta, gamma, alpha = vectors[5][:1, :3].split(1, dim=1)
    expected = x + alpha * block.convolve(torch.layer_norm(x, (8,)) * (1 + gamma) + beta)
    torch.testing.assert_close(block.norm_before.residual(x, condition, block.convolve), expected)
    with pytest.raises(ValueError, match="norm tdln emits nothing"):
        network("tdln").modulations(t, torch.tensor([1]))


@pytest.mark.parametrize("name", solver.SOLVERS)
def test_the_times_are_those_at_which_the_sampler_calls_the_network(name):
    config = network("adaln").config
    settings = sampling.Settings(solver="2m", steps=6).resolved(config)
    settings = dataclasses.replace(settings, solver=name)
    schedule = diffusion.SCHEDULES["linear"]()
    times = analysis.evaluation_times(settings, config, schedule)
    assert len(times) == 6
    assert times == sorted(times, reverse=True)
    assert times[0] == (schedule.t_start if name != "ddpm" else 1)


# TD-LN


def test_td_lns_vectors_over_time_are_what_the_norms_use(place):
    model = network("tdln")
    runfolder.write_weights(place / "x.safetensors", model, {})
    result = found("time", "--weights", "x.safetensors", "--layers", "2,3")
    rows = result["vectors"]
    places = [(row["branch"], row["layer"], row["norm"], row["vector"]) for row in rows]
    assert len(places) == 2 * 2 * 2 + 2 * 2  # two layers, two norms, two vectors; then one norm
    assert places[0] == (1, 2, "norm1", "gamma") and places[-1] == (2, 3, "norm", "beta")
    vector = model.branches[1].blocks[2].norm.beta
    moving = vector(torch.tensor(result["tau"])).detach()
    assert rows[-1]["mean"] == pytest.approx(moving.mean(1).tolist(), abs=1e-6)
    assert rows[-1]["moved"] == pytest.approx(
        float((moving[-1] - moving[0]).abs().mean()), abs=1e-6
    )
    schedule = diffusion.SCHEDULES["linear"]()
    assert result["t"][0] == 1 and result["t"][-1] == schedule.t_end
    assert result["tau"] == pytest.approx(
        schedule.tau(torch.tensor(result["t"])).tolist(), abs=1e-6
    )
    assert rows[0]["explained"][0] > 0.5
    told = analyse("time", "--weights", "x.safetensors").output
    assert "branch 2, layer  3, norm  β: moves by" in told


def test_the_scale_only_norm_has_no_shift_to_show(place):
    runfolder.write_weights(place / "x.safetensors", network("tdrms"), {})
    result = found("time", "--weights", "x.safetensors")
    assert {row["vector"] for row in result["vectors"]} == {"gamma"}


def test_colours_diverge_from_white():
    found = pictures.diverging(np.array([[0, 1.0, 5], [-1, -0.5, 0]]))
    assert found.shape == (2, 3, 3) and found.dtype == np.uint8
    assert found[0, 0].tolist() == found[1, 2].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == found[0, 2].tolist() == [178, 24, 43]
    assert found[1, 0].tolist() == [33, 102, 172]
    assert found[1, 1].tolist() == [144, 178, 214]


# what can't be analysed


def test_networks_without_the_norm_and_layers_beyond_the_depth_are_refused(place):
    runfolder.write_weights(place / "td.safetensors", network("tdln"), {})
    runfolder.write_weights(place / "ada.safetensors", network("adaln"), {})
    runfolder.write_weights(place / "u.safetensors", small("uvit-m4", null_class=False), {})
    for arguments, message in (
        (("pca", "--weights", "td.safetensors"), "has no adaLN-Zero, whose vectors"),
        (("pca", "--weights", "u.safetensors"), "has no adaLN-Zero, whose vectors"),
        (("time", "--weights", "ada.safetensors"), "has no TD-LN in its blocks"),
        (("time", "--weights", "u.safetensors"), "but uvit; expected a DiMR"),
        (("pca", "--weights", "ada.safetensors", "--layers", "7"), "layer 7 is not one of 1 to 6"),
        (("pca", "--weights", "ada.safetensors", "--layers", "0"), "layer 0 is not one of 1 to 6"),
        (("time", "--weights", "td.safetensors", "--layers", "4"), "layer 4 is not one of 1 to 3"),
    ):
        error = analyse(*arguments, status=1).stderr
        assert message in error and error.count("\n") == 1
    assert not (place / "analysis").exists()
