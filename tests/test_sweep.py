"""`dimr sweep`: every point once, whatever is cut off; the same seeds for all; what is best, and
what can't be told from it."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import dimr_command
from PIL import Image

import cli
import extraction
import sweeping
from errors import Estimate

PLAIN = ["--features", "plain_features:pooled", "--device", "cpu"]


def test_axes_are_read_as_ranges_and_lists():
    found = sweeping.read_axes(
        {
            "cfg": ["1.2:2.0:0.2", "3,1.4"],
            "cfg_interval": ["none", "0.3,5"],
            "steps": ["8,16", "10:30:10"],
            "cfg_power": [],
        }
    )
    assert found == {
        "cfg": [1.2, 1.4, 1.6, 1.8, 2.0, 3.0],
        "cfg_interval": [None, (0.3, 5.0)],
        "steps": [8, 16, 10, 20, 30],
    }


def test_every_axis_is_a_field_of_the_settings_and_an_option():
    fields = sweeping.sampling.Settings.__dataclass_fields__
    options = {option.name for option in cli.main.commands["sweep"].params}
    assert set(sweeping.AXES) <= set(fields)
    assert set(sweeping.AXES) <= options
    assert set(fields) <= options  # what is no axis is said once


class Held:
    """A folder that holds the estimates of points by their guidance."""

    def __init__(self, estimates):
        self.estimates = estimates

    def estimate(self, name):
        return self.estimates[float(shlex.split(name)[1])]


@pytest.mark.parametrize("metric, best", [("fid", 1.2), ("is", 3.0)])
def test_the_best_and_what_can_not_be_told_from_it(monkeypatch, metric, best):
    """Points share what chance did to all: a difference of a tenth of their error can be told."""
    draw = np.random.default_rng(0)
    shared = draw.normal(size=20)
    values = {1.0: 2.02, 1.2: 2.0, 1.5: 2.15, 3.0: 4.0}
    if metric == "is":
        values = {1.0: 1.0, 1.2: 2.0, 1.5: 3.5, 3.0: 3.52}
    estimates = {}
    for cfg, value in values.items():
        parts = value + shared - shared.mean() + 0.1 * draw.normal(size=20)
        estimates[cfg] = Estimate(value, parts)
    settings = [sweeping.sampling.Settings(cfg=cfg) for cfg in values]
    job = sweeping.Sweep(None, {"cfg": list(values)}, metric=metric)
    monkeypatch.setattr(sweeping.Sweep, "generation", lambda self, one: Generation)
    found = sweeping.judged(job, settings, Held(estimates))
    assert found["points"][found["best"]]["cfg"] == best
    near = {found["points"][k]["cfg"] for k in found["within_noise"]}
    assert near == ({1.0} if metric == "fid" else {1.5})
    assert all(row[f"{found['key']}_error"] > 0.15 for row in found["points"])


class Generation:
    seeds = range(5)


# from weights to a picture


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DIMR_OFFLINE", "1")


def sweep(trained, digits, *arguments, status=0):
    words = ["sweep", "--weights", trained, "--ref", digits, "-n", 30, "--steps", 3, *PLAIN]
    result = CliRunner().invoke(cli.main, [*map(str, [*words, *arguments])])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def drawn(result):
    return result.stderr.count("point ")


@pytest.mark.slow
def test_a_sweep_goes_on_and_more_values_cost_only_their_points(trained, digits, work):
    first = sweep(trained, digits, "--cfg", "1,2", "--out", "a", "--json")
    assert drawn(first) == 2
    more = sweep(trained, digits, "--cfg", "1:3:0.5", "--out", "a", "--json")
    assert drawn(more) == 3
    again = sweep(trained, digits, "--cfg", "1:3:0.5", "--out", "a", "--json")
    assert drawn(again) == 0
    assert again.stdout == more.stdout
    # as if it had been killed after two points
    held = json.loads(Path("a/sweep.json").read_text())
    lost = sorted(held["points"])[2:]
    for name in lost:
        del held["points"][name]
    del held["summary"]
    Path("a/sweep.json").write_text(json.dumps(held))
    resumed = sweep(trained, digits, "--cfg", "1:3:0.5", "--out", "a", "--json")
    assert drawn(resumed) == 3 and resumed.stdout == more.stdout
    found = json.loads(more.stdout)
    assert [point["cfg"] for point in found["points"]] == [1, 1.5, 2, 2.5, 3]
    assert found["seeds"] == "1000000-1000029"
    with Image.open("a/sweep.png") as picture:
        assert picture.size[0] > 500
    held["points"] = {"cfg 1": {**next(iter(held["points"].values())), "value": 1e308}}
    Path("a/sweep.json").write_text(json.dumps(held))
    refused = sweep(trained, digits, "--cfg", "1,2", "--out", "a", status=1)
    assert "a/sweep.json" in refused.stderr and "is not from" in refused.stderr
    Path("a/sweep.json").write_text(json.dumps({**held, "points": {}}))
    refused = sweep(trained, digits, "--cfg", "1,2", "--out", "a", "--labels", "random", status=1)
    assert "a holds a sweep with drawn" in refused.stderr


@pytest.mark.slow
def test_a_point_is_what_eval_measures_and_the_final_command_runs(
    trained, digits, work, monkeypatch
):
    arguments = "--cfg", "1,1.5", "--cfg-interval", "none", "--cfg-interval", "0.3,5"
    result = sweep(trained, digits, *arguments, "--out", "a")
    assert drawn(result) == 3  # where nothing guides, it matters not when
    assert "can't be told from the best" in result.stdout and "guidance" in result.stdout
    summary = json.loads(Path("a/sweep.json").read_text())["summary"]
    assert len(summary["points"]) == 4
    (command,) = [line for line in result.stdout.splitlines() if line.startswith("dimr eval fid")]
    assert "-n 50000" in command and command == summary["final"]
    words = [*shlex.split(command)[1:], "-n", "30", "--json"]
    seeds = extraction.Generation.seeds
    monkeypatch.setattr(  # the sweep's own, for once
        extraction.Generation,
        "seeds",
        property(lambda one: range(1_000_000, 1_000_000 + one.count)),
    )
    final = CliRunner().invoke(cli.main, words)
    monkeypatch.setattr(extraction.Generation, "seeds", seeds)
    assert final.exit_code == 0, final.output
    best = summary["points"][summary["best"]]
    assert json.loads(final.stdout)["fid"] == best["fid"]
    assert json.loads(final.stdout)["fid_error"] == best["fid_error"]


@pytest.mark.slow
def test_processes_share_a_sweep_and_find_the_same(trained, digits, work):
    alone = json.loads(sweep(trained, digits, "--cfg", "1,2", "--out", "a", "--json").stdout)
    words = ["sweep", "--weights", trained, "--ref", digits, "-n", 30, "--steps", 3, *PLAIN]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    done = dimr_command(
        *words,
        *("--cfg", "1,2", "--out", "b", "--json"),
        cwd=Path.cwd(),
        env=environment,
        torchrun=2,
    )
    together = json.loads(done.stdout)
    for one, other in zip(alone["points"], together["points"], strict=True):
        assert other["fid"] == pytest.approx(one["fid"], rel=1e-6)
        assert other["fid_error"] == pytest.approx(one["fid_error"], rel=1e-4)
