"""An audit trains a stretch again and tells what comes of it apart from what is there."""

import json
import shutil
import types

import pytest
import torch
from click.testing import CliRunner
from conftest import DATA, dimr_command

import audit
import cli
import recipes
import storage
import training
from storage import UserError, load_tensors, save_tensors, write_json

NETWORK = {"layers": (1, 1), "dims": (16, 8), "heads": 2}
RECIPE = {"batch_size": 8, "warmup": 2, "steps": 12}


def train(out, digits, recipe=RECIPE, **options):
    return training.train(
        out,
        recipes.Source(digits, workers=0),
        variant="demo",
        recipe=recipe,
        network=NETWORK,
        device="cpu",
        saving=training.Saving(every=4, keep=0, sample_every=0),
        quiet=True,
        **options,
    )


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("audited") / "run"
    train(out, digits, {**RECIPE, "ema_profiles": (0.1,)})
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def again(run, *steps, **options):
    return audit.audit(run, *steps, workers=0, device="cpu", quiet=True, **options)


def contents(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def spoil(checkpoint, file, change):
    """Change a tensor of a checkpoint, and its manifest as if nothing had happened."""
    path = checkpoint / f"{file}.safetensors"
    tensors, metadata = load_tensors(path)
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name])
    save_tensors(path, tensors, metadata)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[path.name] = storage.sha256(path)
    write_json(checkpoint / "manifest.json", manifest)
    return name


def rewrite(run, change):
    """Put each line of metrics.jsonl through `change`."""
    path = run / "metrics.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def configured(run, change):
    record = json.loads((run / "config.json").read_text())
    change(record)
    write_json(run / "config.json", record)


# ------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize(
    "steps, first, last", [((), 8, 12), ((0, 4), 0, 4), ((4,), 4, 12), ((None, 8), 4, 8)]
)
def test_a_stretch_is_trained_again_to_the_byte_and_the_run_only_read(run, steps, first, last):
    before = contents(run)
    found = again(run, *steps)
    assert found["answer"] == audit.BYTES
    assert (found["from"], found["to"]) == (first, last)
    assert found["losses"]["steps"] == last - first
    names = {each["file"] for each in found["files"]}
    assert names == {f"{n}.safetensors" for n in ("weights", "ema", "optimizer", "averages")}
    assert "equal to the byte" in audit.lines(found)
    assert contents(run) == before


def test_a_difference_that_rounding_leaves_is_told_with_its_size(copy):
    nudged = spoil(copy / "checkpoints" / "step-0000012", "weights", lambda t: t * (1 + 1e-6))
    rewrite(copy, lambda line: {**line, "loss": line["loss"] * (1 + 1e-7 * (line["step"] > 9))})
    found = again(copy)
    assert found["answer"] == audit.ROUNDING
    assert found["losses"]["differs_at"] == 10
    assert found["losses"]["parted_at"] is None
    assert found["losses"]["largest_difference"] == pytest.approx(1e-7, rel=1e-3)
    apart = {each["file"]: each for each in found["files"] if each["difference"]}
    assert apart.keys() == {"weights.safetensors"}
    assert apart["weights.safetensors"]["tensor"] == nudged
    assert apart["weights.safetensors"]["difference"] == pytest.approx(1e-6, rel=0.1)
    said = audit.lines(found)
    assert "equal to rounding" in said and nudged in said and "from step 10 on" in said


def test_a_loss_that_was_not_trained_is_found_where_it_first_stands(copy):
    rewrite(copy, lambda line: {**line, "loss": line["loss"] * (1 - 0.01 * (line["step"] >= 10))})
    found = again(copy)
    assert found["answer"] == audit.PARTED
    assert found["losses"]["parted_at"] == 10
    assert "NOT the same; they parted at step 10" in audit.lines(found)
    assert again(copy, 4, 8)["answer"] == audit.BYTES


def test_weights_that_were_not_trained_are_found(copy):
    name = spoil(copy / "checkpoints" / "step-0000012", "ema", lambda t: t + 1)
    found = again(copy)
    assert found["answer"] == audit.PARTED
    assert f"({name})" in audit.lines(found)
    spoil(copy / "checkpoints" / "step-0000012", "ema", lambda t: t * float("nan"))
    assert again(copy)["answer"] == audit.PARTED


@pytest.mark.parametrize("field, value", [("seed", 1), ("lr", 7e-3), ("label_dropout", 0.5)])
def test_another_recipe_is_not_the_run(copy, field, value):
    def change(record):
        record["recipe"][field] = value

    configured(copy, change)
    found = again(copy, 0, 12)
    assert found["answer"] == audit.PARTED
    assert found["losses"]["parted_at"] <= 8


def test_a_command_says_so_and_ends_with_status_one(copy):
    arguments = ["audit", str(copy), "--workers", "0", "--device", "cpu"]
    done = CliRunner().invoke(cli.main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answer"] == audit.BYTES
    rewrite(copy, lambda line: {**line, "gradient_norm": 2 * line["gradient_norm"]})
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == 1
    assert "NOT the same; they parted at step 9" in done.stdout


# ------------------------------------------------------------------------ what the run went through


def test_a_rate_that_was_forced_later_is_undone(digits, tmp_path):
    out = tmp_path / "run"
    train(out, digits, {**RECIPE, "steps": 8})
    train(out, digits, {**RECIPE, "steps": 16, "lr": 1e-3}, force=True)
    assert [again(out, *steps)["answer"] for steps in ((0, 4), (4, 8), (8, 16))] == [
        audit.BYTES
    ] * 3
    with pytest.raises(UserError, match="lr changed at step 8, within .*--to, or from there"):
        again(out, 4, 12)


def test_a_run_that_began_from_other_weights_and_moved_data_is_found_again(run, digits, tmp_path):
    out = tmp_path / "tuned"
    moved = shutil.copytree(digits, tmp_path / "moved")
    train(out, moved, init=run)
    shutil.move(moved, tmp_path / "there")
    with pytest.raises(UserError, match=f"the data of {out} is no longer at"):
        again(out, 0, 4)
    assert again(out, 0, 4, data=tmp_path / "there")["answer"] == audit.BYTES


def test_what_0_1_0_trained_is_found_again():
    """On another machine than its own: to rounding at least."""
    found = audit.audit(
        DATA / "v0.1.0" / "run",
        data=DATA / "v0.1.0" / "pixels",
        workers=0,
        device="cpu",
        quiet=True,
    )
    assert found["answer"] in (audit.BYTES, audit.ROUNDING)


@pytest.mark.slow
def test_two_processes_audit_what_one_trained(run):
    done = dimr_command("audit", run, "--from", 0, "--workers", 0, "--device", "cpu", torchrun=2)
    assert "steps 1 to 12" in done.stdout and "equal to rounding" in done.stdout
    assert "processes: 1 there, 2 here" in done.stdout
    assert done.stdout.count("trained again") == 1


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "steps, words",
    [
        ((8, 4), "--from 8 is not before --to 4"),
        ((3, 12), "no checkpoint of step 3"),
        ((None, 5), "no checkpoint of step 5"),
    ],
)
def test_steps_that_are_not_there_are_refused(run, steps, words):
    with pytest.raises(UserError, match=words):
        again(run, *steps)


def test_what_can_not_be_audited_says_why(copy, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="config.json"):
        again(tmp_path / "nothing")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(UserError, match="set TMPDIR"):
        again(copy)
    monkeypatch.undo()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:9]))
    with pytest.raises(UserError, match="lacks 3 of the steps 9 to 12, first 10"):
        again(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint"):
        again(copy)


def test_tensors_that_can_t_be_compared_are_wholly_different():
    one = torch.ones(3)
    assert audit.tensor_difference(one, torch.ones(4)) == audit.WHOLLY
    assert audit.tensor_difference(one, one * float("nan")) == audit.WHOLLY
    assert audit.tensor_difference(torch.zeros(3), one) == audit.WHOLLY
    assert audit.tensor_difference(one, 1.5 * one) == 0.5


def test_rounding_may_grow_with_the_steps_and_not_beyond_a_hundredth(monkeypatch, tmp_path):
    def apart(step, share, precision="fp32"):
        values = {n: [1.0, 1.0, 1.0] for n in range(101, step + 1)}
        others = {**values, step: [1.0, 1.0, 1.0 + share]}
        found = iter([values, others])
        monkeypatch.setattr(audit, "lines_of", lambda *_: next(found))
        stretch = audit.Stretch(100, step, None, tmp_path)
        allowed = audit.LOSSES[precision]
        return audit.compare_losses(tmp_path, tmp_path, stretch, allowed)["parted_at"]

    assert apart(101, 0.9e-5) is None and apart(101, 1.1e-5) == 101
    assert apart(110, 0.9e-5) is None and apart(110, 1.1e-5) == 110
    assert apart(1100, 0.9e-3) is None and apart(1100, 1.1e-3) == 1100
    assert apart(30_000, 0.011) == 30_000
    assert apart(101, 0.9e-3, "bf16") is None and apart(101, 1.1e-3, "bf16") == 101
