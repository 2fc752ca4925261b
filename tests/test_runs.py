"""Runs among others: RUN@STEP wherever weights are taken, the list of runs, room made in one."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, dimr_command

import averaging
import cli
import inventory
import journal
import runfolder
import sampling
from storage import UserError, load_tensors, locked, read_json, write_json


def invoke(*arguments):
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def weights_of(step):
    return {"x": torch.full((10,), float(step))}


def make_run(root, name, steps, losses=(), **more):
    """A run folder with checkpoints at `steps` and a line of metrics for each of `losses`."""
    run = root / name
    run.mkdir(parents=True)
    write_json(run / "config.json", {"variant": "demo", "recipe": {"steps": 12}, **more})
    lines = [{"step": i, "loss": loss, "loss_branches": []} for i, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in steps:
        files = {name: (weights_of(step), None) for name in ("weights", "ema", "optimizer")}
        runfolder.save_checkpoint(run, step, files, {"step": step}, keep=0)
    return run


def steps_of(run):
    return [runfolder.step_of(checkpoint) for checkpoint in runfolder.checkpoints(run)]


def damage(run, step):
    path = run / "checkpoints" / f"step-{step:07d}" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def tree(run):
    return {str(path): path.stat().st_mtime_ns for path in run.rglob("*")}


# RUN@STEP


def test_a_step_names_its_checkpoint(tmp_path):
    run = make_run(tmp_path, "a", [4, 8, 12])
    for step in (4, 8, 12):
        for ema, file in ((True, "ema"), (False, "weights")):
            path = runfolder.find_weights(f"{run}@{step}", ema)
            assert path == run / "checkpoints" / f"step-{step:07d}" / f"{file}.safetensors"
    assert runfolder.step_of(runfolder.find_weights(run).parent) == 12


@pytest.mark.parametrize(
    "steps, words",
    [
        ([4, 8, 12], "no checkpoint of step 7; it has 4, 8, 12"),
        (range(1, 40, 4), "no checkpoint of step 7; it has 1, 5, 9"),
        (range(1, 60, 4), "of the 15 that it has the nearest are 5 and 9"),
        ([], "it holds none at all"),
    ],
)
def test_an_unknown_step_names_those_there_are(tmp_path, steps, words):
    run = make_run(tmp_path, "a", steps)
    with pytest.raises(UserError, match=words):
        runfolder.find_weights(f"{run}@7")


def test_a_damaged_checkpoint_is_not_replaced_by_another(tmp_path):
    run = make_run(tmp_path, "a", [4, 8])
    damage(run, 8)
    with pytest.raises(UserError, match="step-0000008/ema.safetensors is damaged"):
        runfolder.find_weights(f"{run}@8")


def test_what_is_called_with_an_at_sign_is_itself(tmp_path):
    run = make_run(tmp_path, "mine@4", [4, 8])
    assert runfolder.step_of(runfolder.find_weights(run).parent) == 8
    assert runfolder.step_of(runfolder.find_weights(f"{run}@4").parent) == 4
    file = run / "checkpoints" / "step-0000004" / "ema.safetensors"
    shutil.copy(file, tmp_path / "w@9")
    assert runfolder.find_weights(tmp_path / "w@9") == tmp_path / "w@9"
    with pytest.raises(UserError, match="no file, nor known by name"):
        runfolder.find_weights(f"{tmp_path / 'w@9'}@4")


@pytest.mark.slow
def test_every_command_that_takes_weights_takes_a_step(trained, digits, tmp_path):
    """The weights in hand are the checkpoint's, told by values or by what is said."""
    at = f"{trained}@4"
    expected, _ = load_tensors(trained / "checkpoints" / "step-0000004" / "ema.safetensors")
    assert json.loads(invoke("info", at, "--json").output)["step"] == 4
    invoke("convert", at, tmp_path / "four.safetensors")
    found, about = load_tensors(tmp_path / "four.safetensors")
    assert about["step"] == "4"
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    few = ["-n", 2, "--steps", 1, "--device", "cpu"]
    drawn = invoke("sample", "--weights", at, *few, "--out", tmp_path / "s", "--json").output
    assert "step-0000004" in json.loads(drawn)["source"]
    fid = ["eval", "fid", "--features", "plain_features:pooled", "--ref", digits, "--json"]
    measured = json.loads(invoke(*fid, "--weights", at, *few).output)
    assert "step-0000004" in json.dumps(measured)
    out = ["--layers", 1, "--out", tmp_path / "analysis"]
    invoke("analyse", "time", "--weights", at, *out, "--device", "cpu")
    assert "step-0000004" in json.dumps(read_json(tmp_path / "analysis" / "time.json"))
    done = dimr_command(
        *["train", "--data", digits, "--init", at, "--out", tmp_path / "tuned", *SMALL],
        *["--steps", 1, "--save-every", 1, "--warmup", 0],
    )
    assert f"starting from {at}" in done.stderr
    assert read_json(tmp_path / "tuned" / "config.json")["init"] == at


def test_averages_are_of_that_step(tmp_path, monkeypatch):
    run = make_run(tmp_path, "a", [4])
    for step in (4, 8):
        path = averaging.snapshot_at(run, step, 0.05).path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    chosen = []

    class Enough(Exception):
        pass

    def choose(run, usable, step, width):
        chosen.append((run, step))
        raise Enough

    monkeypatch.setattr(averaging, "choose", choose)
    for source, step in ((run, None), (f"{run}@4", None), (run, 4), (f"{run}@4", 4)):
        with pytest.raises(Enough):
            averaging.rebuild(source, 0.05, step)
    with pytest.raises(Enough):
        sampling.load(f"{run}@4", device="cpu", ema_width=0.05)
    assert chosen == [(run, 8)] + [(run, 4)] * 4
    with pytest.raises(UserError, match="@4 and --step 8 name two steps"):
        averaging.rebuild(f"{run}@4", 0.05, 8)
    with pytest.raises(UserError, match="no snapshot of step 5; the nearest are of 4 or 8"):
        averaging.rebuild(f"{run}@5", 0.05)


# the list


def test_runs_are_listed_the_newest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = make_run(tmp_path / "runs", "old", [4, 8], losses=[9.0] * 10 + [1.0, None, 3.0] * 20)
    lines = (old / "metrics.jsonl").read_text().splitlines(keepends=True)
    for index, fid in ((20, 60.5), (30, 50.25)):
        lines[index] = json.dumps({**json.loads(lines[index]), "fid": fid}) + "\n"
    (old / "metrics.jsonl").write_text("".join(lines) + '{"step": 71, "lo')
    (old / "samples").mkdir()
    for step in (4, 9_999_999, 10_000_000):
        (old / "samples" / f"step-{step:07d}.png").write_bytes(b"x" * 1000)
    make_run(tmp_path / "runs", "new", [])
    (tmp_path / "runs" / "no-run").mkdir()
    os.utime(old / "config.json", (1, 1))
    os.utime(old / "metrics.jsonl", (2, 2))
    new, old_row = json.loads(invoke("runs", "--json").output)
    assert new["run"] == "runs/new"
    assert (new["step"], new["loss"], new["fid"], new["samples"]) == (0, None, None, None)
    assert old_row == {
        "run": "runs/old",
        "variant": "demo",
        "step": 70,
        "steps": 12,
        "loss": pytest.approx((16 * 1 + 17 * 3) / 33),  # of the last 50 steps those that have one
        "fid": 50.25,
        "fid_step": 31,
        "bytes": sum(path.stat().st_size for path in old.rglob("*") if path.is_file()),
        "samples": "runs/old/samples/step-10000000.png",
        "checkpoints": [4, 8],
    }
    head, first, second = invoke("runs").output.splitlines()
    assert head.split() == ["run", "variant", "step", "loss", "FID", "size", "newest", "samples"]
    assert first.split()[:3] == ["runs/new", "demo", "0"]
    assert "70 of 12" in second and "50.25 at 31" in second and "step-10000000.png" in second


def test_a_damaged_run_does_not_hide_the_others(tmp_path):
    make_run(tmp_path, "a", [4], losses=[1.0])
    make_run(tmp_path, "b", [4], losses=[1.0])
    make_run(tmp_path, "c", [4], losses=[1.0])
    (tmp_path / "b" / "config.json").write_text("{")
    (tmp_path / "c" / "metrics.jsonl").write_text('{"step": 1, "loss"\n')
    make_run(tmp_path, "d", [])
    (tmp_path / "d" / "config.json").write_text("[1]")
    rows = {row["run"][-1]: row for row in inventory.runs(tmp_path)}
    assert "error" not in rows["a"]
    assert "b/config.json is not valid JSON" in rows["b"]["error"]
    assert "c/metrics.jsonl: line 1 is damaged" in rows["c"]["error"]
    assert "d/config.json is damaged (it is a list of 1" in rows["d"]["error"]
    assert inventory.table(inventory.runs(tmp_path)).count("\n") == 4 + 3
    with pytest.raises(UserError, match="is no folder of runs"):
        inventory.runs(tmp_path / "none")


@pytest.mark.slow
def test_a_trained_run_is_listed(trained):
    (row,) = inventory.runs(trained.parent)
    last = journal.read_metrics(trained)[-1]
    assert (row["variant"], row["step"], row["steps"]) == ("demo", last["step"], 12)
    assert row["checkpoints"] == [4, 8, 12]


# making room


def test_pruning_keeps_multiples_and_the_newest_and_says_what_it_freed(tmp_path):
    run = make_run(tmp_path, "a", range(1, 12))
    before = inventory.size(run)
    dry = invoke("runs", "prune", run, "--keep-every", 4, "--dry-run", "--json").output
    assert steps_of(run) == list(range(1, 12))
    result = json.loads(invoke("runs", "prune", run, "--keep-every", 4, "--json").output)
    assert json.loads(dry) == {**result, "dry_run": True}
    assert steps_of(run) == result["kept"] == [4, 8, 11]
    assert result["deleted"] == [1, 2, 3, 5, 6, 7, 9, 10]
    lock = (run / ".lock").stat().st_size
    assert result["bytes"] == before - (inventory.size(run) - lock) > 0
    said = invoke("runs", "prune", run, "--keep-every", 4).output
    assert said == f"{run}: 0 checkpoints deleted, 0 bytes; kept: 4, 8, 11\n"


def test_pruning_never_takes_the_newest_whole_checkpoint(tmp_path, capsys):
    run = make_run(tmp_path, "a", [3, 5, 7, 9])
    damage(run, 9)
    result = inventory.prune(run, 100)
    assert result["kept"] == [7, 9] and result["deleted"] == [3, 5]
    assert "step-0000009/ema.safetensors is damaged" in capsys.readouterr().err
    damage(run, 7)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        inventory.prune(run, 100)
    assert steps_of(run) == [7, 9]


def test_a_dry_run_writes_nothing(tmp_path):
    run = make_run(tmp_path, "a", [1, 2, 3])
    before = tree(run)
    inventory.prune(run, 100, dry_run=True)
    assert tree(run) == before


def test_what_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="photos is no run folder"):
        inventory.prune(tmp_path / "photos", 5)
    with pytest.raises(UserError, match="none is no run folder"):
        inventory.prune(tmp_path / "none", 5)
    assert os.listdir(tmp_path) == ["photos"] and os.listdir(tmp_path / "photos") == []
    run = make_run(tmp_path, "a", [])
    with pytest.raises(UserError, match="holds no checkpoint"):
        inventory.prune(run, 5)


def test_averages_stay_and_are_said(tmp_path):
    run = make_run(tmp_path, "a", [1, 2])
    (run / "averages").mkdir()
    (run / "averages" / "step-0000001-0.05.safetensors").write_bytes(b"x" * 700)
    said = invoke("runs", "prune", run, "--keep-every", 5).output
    assert "averages/ takes 700 bytes more and stays" in said
    assert len(list((run / "averages").iterdir())) == 1


@pytest.mark.slow
def test_a_run_that_trains_is_not_pruned(tmp_path):
    """Another process holds the lock, as a training run does."""
    run = make_run(tmp_path, "a", [1, 2, 3])
    with locked(run):
        done = dimr_command("runs", "prune", run, "--keep-every", 5, check=False)
        dry = dimr_command("runs", "prune", run, "--keep-every", 5, "--dry-run")
    assert done.returncode == 1
    assert f"{run} is in use by process {os.getpid()}" in done.stderr
    assert "2 checkpoints would be deleted" in dry.stdout
    assert steps_of(run) == [1, 2, 3]


@pytest.mark.slow
def test_a_pruned_run_goes_on(trained, digits, tmp_path):
    out = shutil.copytree(trained, tmp_path / "small")
    inventory.prune(out, 8)
    assert steps_of(out) == [8, 12]
    more = ["--steps", 13]
    done = dimr_command("train", "--data", digits, "--out", out, *SMALL, *more)
    assert "going on from" in done.stderr
    assert steps_of(out) == [8, 12, 13]
