"""The same bytes each time: on three processes and more, after kills, with --deterministic; and
processes that fail leave at once."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import Ranks, average, command, fail, lay_buckets, resume
from test_parallel import lines_of

import evaluation
import extraction
import journal
import parallel
import recipes
import runfolder
import training
from storage import UserError

NETWORK = {"layers": (1, 1), "dims": (8, 8), "heads": 1}


def outcome(run):
    """What has to be the same: the last checkpoint's hashes, and the losses."""
    last = runfolder.checkpoints(run)[-1]
    lines = []
    for line in journal.read_metrics(run):
        lines.append((line["step"], line["loss"], line["loss_branches"], line["gradient_norm"]))
    return last.name, json.loads((last / "manifest.json").read_text()), lines


# several processes


@pytest.mark.slow
def test_a_run_on_four_processes_ends_the_same_whenever_it_is_killed(digits, tmp_path):
    chance = random.Random(4)
    train = ["train", "--data", digits, "--variant", "demo", "--layers", "3,2", "--dims", "32,16"]
    train += ["--batch-size", 24, "--steps", 85, "--save-every", 17, "--sample-every", 0]
    train += ["--workers", 1, "--device", "cpu", "--out"]
    out = tmp_path / "stormy"
    with Ranks(4, tmp_path, command, *train, tmp_path / "calm") as calm:
        assert [status for status, _ in calm.end()] == [0] * 4, calm.said()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        until = lines_of(out / "metrics.jsonl") + chance.randrange(1, 25)
        with Ranks(4, tmp_path, command, *train, out) as ranks:
            while ranks.alive() and lines_of(out / "metrics.jsonl") < until:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.1))
            os.kill(chance.choice(ranks.processes).pid, number)  # to stop one stops all
            ranks.end()
        print(f"{number.name}: saved at {[c.name for c in runfolder.checkpoints(out)]}")
    with Ranks(4, tmp_path, command, *train, out) as ranks:
        assert [status for status, _ in ranks.end()] == [0] * 4, ranks.said()
    assert outcome(out) == outcome(tmp_path / "calm")


@pytest.mark.slow
def test_buckets_are_laid_anew_before_the_first_step_of_each_life(digits, tmp_path):
    """Should this fail with a new PyTorch, the order in which gradients are summed depends on where
    a run was resumed."""
    choices = {
        "plain": {},
        "accumulated": {"micro_batch": 4, "checkpoint_blocks": True},
        "compiled": {"compile": True},
    }
    with Ranks(3, tmp_path, lay_buckets, tmp_path, digits, choices) as ranks:
        said = ranks.end()
    assert [status for status, _ in said] == [0] * 3, said
    found = json.loads(said[0][1].splitlines()[-1])
    assert found.keys() == choices.keys()
    for name, (first, second) in found.items():
        assert [len(first), len(second)] == [3, 4], name  # the rehearsal, and 2 and 3 steps
        steps = first[1:] + second[1:]
        assert len(steps[0]) > 1, name
        assert all(step == steps[0] for step in steps), name
        assert first[0] == second[0] != steps[0], name


@pytest.mark.slow
def test_what_is_logged_of_a_step_does_not_depend_on_the_others_logged_with_it(tmp_path):
    with Ranks(4, tmp_path, average) as ranks:
        assert ranks.end() == [(0, "True\n0.0\n")] * 4


def test_one_process_rehearses_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(training.State, "rehearse", None)
    training.train(
        tmp_path / "run",
        training.Source(digits, workers=0),
        variant="demo",
        recipe={"steps": 1, "batch_size": 2},
        network=NETWORK,
        device="cpu",
        saving=training.Saving(sample_every=0),
        quiet=True,
    )


@pytest.mark.slow
def test_a_checkpoint_is_read_by_one_process_and_a_tensor_at_a_time(trained, digits, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(trained, run)
    for step in (8, 12):
        shutil.rmtree(run / "checkpoints" / f"step-{step:07d}")
    with Ranks(2, tmp_path, resume, run, digits) as ranks:
        assert ranks.end() == [(0, "1\n"), (0, "0\n")]
    for mine, theirs in zip(journal.read_metrics(run), journal.read_metrics(trained), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


# a process that fails


@pytest.mark.slow
def test_a_process_that_fails_says_so_and_leaves_though_the_group_can_t_be_left(tmp_path):
    with Ranks(2, tmp_path, fail) as ranks:
        foreseen, unforeseen = ranks.end(60)
    assert foreseen == (1, "Error: rank 0: it is foreseen\n")
    assert unforeseen[0] == 1
    assert unforeseen[1].startswith("Traceback")
    assert unforeseen[1].count("ZeroDivisionError: division by zero") == 1


# --deterministic


@pytest.fixture
def own_flags(monkeypatch):
    """Whatever a test sets of cuBLAS's environment and PyTorch's flags is put back."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def train_deterministically(out, digits, **recipe):
    return training.train(
        out,
        training.Source(digits, workers=0),
        variant="demo",
        recipe={"batch_size": 4, "deterministic": True, **recipe},
        network=NETWORK,
        device="cpu",
        saving=training.Saving(sample_every=0),
        quiet=True,
    )


def test_a_deterministic_run_asks_for_it_and_gives_the_flags_back(digits, tmp_path, own_flags):
    seen = []
    losses = training.losses

    def noted(*arguments):
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.backends.cudnn.deterministic,
                torch.backends.cudnn.benchmark,
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )
        return losses(*arguments)

    own_flags.setattr(training, "losses", noted)
    train_deterministically(tmp_path / "run", digits, steps=2)
    train_deterministically(tmp_path / "other", digits, steps=2, deterministic=False)
    assert seen[:2] == [(True, True, False, ":4096:8")] * 2
    assert seen[2][:3] == (False, False, True)
    assert not torch.backends.cudnn.benchmark
    recipe = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert recipe["deterministic"] is True
    assert recipe["compile"] is False
    here, there = (outcome(tmp_path / name) for name in ("run", "other"))
    assert here[2] == there[2]  # losses: on a CPU all are
    same = "optimizer.safetensors"  # weights files say of their recipe that it differs
    assert here[1][same] == there[1][same]


def test_a_deterministic_run_stays_so_when_it_goes_on(digits, tmp_path, own_flags):
    train_deterministically(tmp_path / "run", digits, steps=1)
    asked = []
    whether = training.parallel.deterministic

    def counted():
        asked.append(1)
        return whether()

    own_flags.setattr(parallel, "deterministic", counted)
    source = training.Source(workers=0)
    saving = training.Saving(sample_every=0)
    training.train(
        tmp_path / "run", source, recipe={"steps": 2}, device="cpu", saving=saving, quiet=True
    )
    assert asked == [1]
    with pytest.raises(UserError, match="was trained with deterministic True, not False"):
        train_deterministically(tmp_path / "run", digits, steps=3, deterministic=False)


def test_a_run_that_does_not_say_was_not_deterministic(trained, digits, tmp_path, own_flags):
    run = tmp_path / "small"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text())
    del config["recipe"]["deterministic"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained with deterministic False, not True"):
        training.train(run, recipe={"deterministic": True}, device="cpu", quiet=True)


@pytest.mark.parametrize(
    "environment, recipe, words",
    [
        ({"WORLD_SIZE": "2"}, {}, "with processes 1, not 2"),
        ({}, {"micro_batch": 2}, "with micro-batch None, not 2"),
    ],
)
def test_a_deterministic_run_is_not_divided_otherwise(
    digits, tmp_path, own_flags, environment, recipe, words
):
    train_deterministically(tmp_path / "run", digits, steps=1)
    for name, value in environment.items():
        own_flags.setenv(name, value)
    with pytest.raises(UserError, match=words):
        train_deterministically(tmp_path / "run", digits, steps=2, **recipe)


def test_what_can_t_be_deterministic_is_refused(digits, tmp_path, own_flags):
    with pytest.raises(UserError, match="can't be compiled.*leave out --compile or"):
        train_deterministically(tmp_path / "run", digits, compile=True)
    values = dataclasses.asdict(recipes.Recipe(deterministic=True))
    with pytest.raises(UserError, match="no deterministic kernels for mps"):
        recipes.settle(values, {}, torch.device("mps"))
    assert not recipes.settle(values, {}, torch.device("cuda")).compile
    assert not (tmp_path / "run").exists()


def test_an_operator_without_a_deterministic_kernel_is_named(own_flags):
    place = torch.zeros(2, dtype=torch.long)
    with (
        pytest.raises(UserError, match=r"no deterministic kernel for put_ on this device"),
        parallel.deterministic(),
    ):
        torch.zeros(3).put_(place, torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="something else"), parallel.deterministic():
        raise RuntimeError("something else")


def test_cublas_has_to_know_before_it_starts(own_flags):
    own_flags.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="CUDA has started without CUBLAS_WORKSPACE_CONFIG"):
        parallel.settle_workspaces()
    own_flags.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is :4096:2.*:4096:8 or :16:8"):
        parallel.settle_workspaces()
    own_flags.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    parallel.settle_workspaces()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


# devices

READ_FLAGS = """
import torch, parallel
print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
parallel.pick_device("cpu")
print(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
    print(torch.get_float32_matmul_precision())
"""


@pytest.mark.slow
def test_float32_is_not_tf32_whatever_the_environment_says(tmp_path):
    (tmp_path / "flags.py").write_text(READ_FLAGS)
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run(
        [sys.executable, tmp_path / "flags.py"], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == ["True True", "False False", "highest"], done.stderr
    assert done.stderr == ""  # no warning either


@pytest.mark.parametrize(
    "local, count, torchrun, found",
    [(0, 1, False, 0), (3, 1, False, 0), (3, 8, False, 3), (0, 1, True, 0), (3, 8, True, 3)],
)
def test_a_process_takes_its_own_gpu_or_the_only_one_it_is_shown(
    monkeypatch, local, count, torchrun, found
):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert parallel.pick_device("auto") == torch.device("cuda", found)
    assert taken == [found]


@pytest.mark.parametrize("local, count, torchrun", [(1, 1, "x"), (2, 2, "x"), (2, 2, None)])
def test_a_process_without_a_gpu_is_refused(monkeypatch, local, count, torchrun):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun)
    with pytest.raises(UserError, match=f"local rank {local} has no GPU: this machine has {count}"):
        parallel.local_gpu(count)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA T4", None),
    ],
)
def test_a_gpu_s_peak_is_that_of_its_kind(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert parallel.peak_flops(torch.device("cuda", 0)) == peak


def test_features_are_compared_on_the_device_that_was_chosen(monkeypatch):
    """A GPU that is there is left alone with --device cpu."""
    chosen = []

    class Features(torch.Tensor):
        def to(self, device):
            chosen.append(device)
            return self.as_subclass(torch.Tensor)

    made = torch.randn(1200, 4, generator=torch.Generator().manual_seed(0))
    moments = [torch.zeros(4), torch.zeros(4, 4)]
    one = extraction.Measured(
        "here", "0", 8, 1200, "ours", "1", *moments, features=made.as_subclass(Features)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("cpu", "cuda"):
        evaluation.compare("pr", one, one, torch.device(name))
    assert chosen == [torch.device("cuda")] * 2
