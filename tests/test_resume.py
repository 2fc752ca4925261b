"""A run that is killed, stopped, starved of disk or damaged ends as the undisturbed one does."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import cli
import dimr
import journal
import recipes
import runfolder
import training
from storage import load_tensors, save_tensors

KILLS = int(os.environ.get("DIMR_KILLS", 6))  # a third of them inside a save; more by hand
NETWORK = [
    "--variant",
    "demo",
    "--layers",
    "1,1",
    "--dims",
    "16,8",
    "--heads",
    "2",
    "--batch-size",
    "8",
    "--warmup",
    "2",
    "--workers",
    "0",
    "--sample-every",
    "0",
    "--device",
    "cpu",
]


def command_line(log, limit, arguments):
    """What a forked process does: `dimr ARGUMENTS`, its output in `log`, its files no larger than
    `limit` bytes."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    cli.main(arguments, prog_name="dimr")


@pytest.fixture(scope="module")
def dimr_process(tmp_path_factory):
    """Start `dimr ARGUMENTS` as a process forked from one that has PyTorch loaded already; `.log`
    is its output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training", "test_resume"])
    folder, started = tmp_path_factory.mktemp("logs"), []
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the server

    def start(*arguments, limit=None, wait=True):
        process = context.Process(
            target=command_line,
            args=(folder / f"{len(started)}.log", limit, list(map(str, arguments))),
        )
        process.log = folder / f"{len(started)}.log"
        started.append(process)
        process.start()
        if wait:
            process.join(120)
            assert process.exitcode is not None, "it hangs"
        return process

    start("--version")
    os.environ["OMP_NUM_THREADS"] = before or ""
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    yield start
    for process in started:
        process.kill()


def outcome(run):
    """What has to be the same to the byte: the last checkpoint's files, and the losses."""
    last = runfolder.checkpoints(run)[-1]
    losses = [
        (line["step"], line["loss"], line["loss_branches"], line["gradient_norm"])
        for line in journal.read_metrics(run)
    ]
    return {path.name: path.read_bytes() for path in last.iterdir()}, losses


def wait_for_step(run, step):
    until = time.monotonic() + 60
    while (
        not (run / "metrics.jsonl").exists()
        or (run / "metrics.jsonl").read_text().count("\n") < step
    ):
        assert time.monotonic() < until, "it does not train"
        time.sleep(0.01)


def check_steps(run, last):
    assert [line["step"] for line in journal.read_metrics(run)] == list(range(1, last + 1))


# killed


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_the_undisturbed_one(digits, tmp_path, dimr_process):
    steps, rng = 26 * KILLS, random.Random(0)
    options = ["--data", digits, *NETWORK, "--steps", steps, "--save-every", "7"]
    assert dimr_process("train", "--out", tmp_path / "calm", *options).exitcode == 0
    out, anywhere, inside = tmp_path / "killed", 0, 0

    def saving():
        return any((out / "checkpoints").glob(".step-*.tmp"))

    def newest():
        return max(map(runfolder.step_of, runfolder.checkpoints(out)), default=0)

    while anywhere + inside < KILLS:
        process, kind = (
            dimr_process("train", "--out", out, *options, wait=False),
            (anywhere + inside) % 6,
        )
        if kind < 5:  # after a few saves, or none
            until = newest() + 7 * rng.randrange(3)
            while process.is_alive() and newest() < until:
                pass
        if kind < 3:
            while process.is_alive() and not saving():
                pass
        time.sleep(rng.uniform(0, [0.002, 0.002, 0.005, 0.1, 0.1, 0.6][kind]))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.log.read_text()
        inside, anywhere = inside + saving(), anywhere + (not saving())
        for checkpoint in runfolder.checkpoints(out):
            runfolder.verify(checkpoint)
        print(f"kills: {inside} inside a save, {anywhere} elsewhere; at step {newest()}")
    assert inside >= KILLS // 3 and dimr_process("train", "--out", out, *options).exitcode == 0
    assert outcome(out) == outcome(tmp_path / "calm") and not saving()
    check_steps(out, steps)


# stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name
)
def test_a_stop_signal_saves_and_the_run_goes_on_from_there(digits, tmp_path, dimr_process, number):
    out = tmp_path / "run"
    process = dimr_process(
        "train", "--out", out, "--data", digits, *NETWORK, "--steps", "100000", wait=False
    )
    wait_for_step(out, 10)
    os.kill(process.pid, number)
    process.join(60)
    stopped = runfolder.step_of(runfolder.checkpoints(out)[-1])
    assert process.exitcode == 75 and number.name in process.log.read_text() and stopped < 100000
    check_steps(out, stopped)
    assert dimr_process("train", "--out", out, "--steps", stopped + 3).exitcode == 0
    assert (
        dimr_process(
            "train", "--out", tmp_path / "calm", "--data", digits, *NETWORK, "--steps", stopped + 3
        ).exitcode
        == 0
    )
    assert outcome(out) == outcome(tmp_path / "calm")


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_without_damage(digits, tmp_path, dimr_process):
    out = tmp_path / "run"
    options = [
        "--out",
        out,
        "--data",
        digits,
        *NETWORK,
        "--batch-size",
        "1024",
        "--micro-batch",
        "2",
        "--save-every",
        "1",
    ]  # seconds a step
    process = dimr_process("train", *options, "--steps", "1000", wait=False)
    wait_for_step(out, 1)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert (
        process.exitcode == 1
        and "Aborted" in process.log.read_text()
        and "Traceback" not in process.log.read_text()
    )
    step = runfolder.step_of(runfolder.newest_whole(out))
    check_steps(out, step)
    assert dimr_process("train", *options, "--steps", step).exitcode == 0


@pytest.mark.slow
def test_a_finished_run_says_so_again(trained, tmp_path, dimr_process):
    shutil.copytree(trained, tmp_path / "small")
    process = dimr_process("train", "--out", tmp_path / "small", "--json")
    said = process.log.read_text()
    result = json.loads(said[said.index('{"out"') :])
    assert (
        process.exitcode == 0
        and result["step"] == 12
        and result["loss"] == journal.read_metrics(trained)[-1]["loss"]
    )


# starved


@pytest.mark.slow
def test_a_full_disk_is_reported_and_costs_nothing_that_was_there(digits, tmp_path, dimr_process):
    options = ["--data", digits, *NETWORK, "--steps", "40", "--save-every", "8"]
    assert dimr_process("train", "--out", tmp_path / "calm", *options).exitcode == 0
    out = tmp_path / "full"
    starved = dimr_process(
        "train", "--out", out, *options, limit=9000
    )  # room for some metrics, not for a checkpoint
    said = starved.log.read_text()
    assert starved.exitcode == 1 and "Traceback" not in said and "File too large" in said
    assert all(
        f"checkpoint at step {step} NOT saved" in said for step in (8, 16, 24, 32)
    )  # and training went on
    assert not runfolder.checkpoints(out) and not list((out / "checkpoints").iterdir())
    written = len(journal.read_metrics(out))
    check_steps(out, written)
    assert 8 <= written < 40 and (out / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert dimr_process("train", "--out", out, *options).exitcode == 0
    assert outcome(out) == outcome(tmp_path / "calm")


@pytest.mark.slow
def test_training_outlives_a_disk_that_is_full_for_a_while(digits, tmp_path, dimr_process):
    out = tmp_path / "run"
    process = dimr_process(
        "train",
        "--out",
        out,
        "--data",
        digits,
        *NETWORK,
        "--save-every",
        "20",
        "--steps",
        "100000",
        wait=False,
    )
    wait_for_step(out, 20)
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(
        process.pid, resource.RLIMIT_FSIZE, (0, before[1])
    )  # metrics, checkpoints and the log it prints to
    saved, told = runfolder.checkpoints(out), len(journal.read_metrics(out))
    time.sleep(1)
    assert (
        process.is_alive()
        and runfolder.checkpoints(out)[:-1] in ([], saved[:-1], saved)
        and len(journal.read_metrics(out)) <= told + 10
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
    wait_for_step(out, told + 40)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 75
    check_steps(out, runfolder.step_of(runfolder.newest_whole(out)))


# damaged


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("weights.safetensors", lambda content: content[:-1], "damaged"),
        ("ema.safetensors", lambda content: b"", "damaged"),
        (
            "optimizer.safetensors",
            lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
            "damaged",
        ),
        ("state.json", lambda content: content.replace(b"12", b"13"), "damaged"),
        ("optimizer.safetensors", None, "can't be read"),
        ("manifest.json", lambda content: b"{}", "manifest.json"),
        ("manifest.json", lambda content: b"[1", "manifest.json"),
        ("manifest.json", lambda content: bytes(len(content)), "manifest.json"),
    ],
)
def test_damage_of_any_kind_is_named_and_the_checkpoint_before_used(
    trained, tmp_path, name, damage, words
):
    out, said = tmp_path / "small", []
    shutil.copytree(trained, out)
    path = out / "checkpoints" / "step-0000012" / name
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    assert runfolder.step_of(runfolder.newest_whole(out, said.append)) == 8
    assert len(said) == 1 and str(path) in said[0] and words in said[0] and "\n" not in said[0]


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    trained, tmp_path, dimr_process
):
    out = tmp_path / "small"
    shutil.copytree(trained, out)
    for checkpoint in runfolder.checkpoints(out):
        (checkpoint / "ema.safetensors").write_bytes(b"")
    before = (out / "metrics.jsonl").read_bytes()
    process = dimr_process("train", "--out", out)
    assert (
        process.exitcode == 1
        and "none of the 3 checkpoints" in process.log.read_text()
        and "Traceback" not in process.log.read_text()
    )
    assert (out / "metrics.jsonl").read_bytes() == before


def save(run, step, keep):
    files = {
        name: ({"a": torch.full((3,), float(step))}, {"step": str(step), "more": "x"})
        for name in ("weights", "ema", "optimizer")
    }
    run.mkdir(exist_ok=True)
    return runfolder.save_checkpoint(run, step, files, {"step": step}, keep)


def test_damaged_newer_checkpoints_do_not_push_out_whole_ones(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=0)
    (tmp_path / "checkpoints" / "step-0000030" / "ema.safetensors").write_bytes(b"")
    save(tmp_path, 25, keep=1)
    assert [runfolder.step_of(c) for c in runfolder.checkpoints(tmp_path)] == [25, 30]
    assert runfolder.step_of(runfolder.newest_whole(tmp_path)) == 25


def test_a_checkpoint_is_the_same_bytes_each_time(tmp_path):
    first, second = (
        {path.name: path.read_bytes() for path in save(tmp_path / name, 10, 0).iterdir()}
        for name in "ab"
    )
    assert first == second


def test_the_library_reads_what_is_written(tmp_path):
    from safetensors import safe_open

    tensors = {
        "matrix": torch.randn(4, 6).t(),
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "half": torch.randn(7).bfloat16(),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "truth": torch.tensor([True, False]),
        "long": torch.arange(3),
    }
    save_tensors(tmp_path / "all.safetensors", tensors, {"é": "ü"})
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata() == {"é": "ü"} and set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype and torch.equal(
                file.get_tensor(name), tensor
            )


# losses and gradients that are not finite


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(digits, tmp_path, monkeypatch):
    losses = training.losses
    calls = []

    def spoiled(*arguments):
        sums, branches = losses(*arguments)
        calls.append(len(sums))
        spoilt = {4: float("inf"), 6: float("nan")}.get(len(calls), 0)
        return sums + spoilt, branches  # the gradient is not changed by it

    monkeypatch.setattr(training, "losses", spoiled)
    result = training.train(
        tmp_path / "run",
        training.Source(digits, workers=0),
        variant="demo",
        recipe={"steps": 8, "batch_size": 4, "warmup": 0, "compile": False},
        network={"layers": (1, 1), "dims": (8, 8), "heads": 1},
        device="cpu",
        saving=training.Saving(every=1, keep=0, sample_every=0),
        quiet=True,
    )
    lines = journal.read_metrics(tmp_path / "run")
    assert (
        [line["step"] for line in lines if line["skipped"]] == [4, 6]
        and lines[3]["loss"] is None
        and result["skipped_steps"] == 2
    )
    hashes = [
        json.loads((c / "manifest.json").read_text())
        for c in runfolder.checkpoints(tmp_path / "run")
    ]
    same = [
        k + 1
        for k in range(1, 8)
        if hashes[k]["optimizer.safetensors"] == hashes[k - 1]["optimizer.safetensors"]
    ]
    assert same == [
        4,
        6,
    ]  # moments and step count; weights and EMA differ in the step they are labelled with alone
    for k in same:
        for name in ("weights", "ema"):
            before, after = (
                load_tensors(runfolder.checkpoints(tmp_path / "run")[i] / f"{name}.safetensors")[0]
                for i in (k - 2, k - 1)
            )
            assert all(torch.equal(before[key], after[key]) for key in before)


class NoReading(TorchDispatchMode):
    """Raises where a value is read from the device."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function not in {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        }, "waits for the device"
        return function(*arguments, **(keywords or {}))


def test_a_step_never_waits_for_the_device():
    config = dimr.Config(
        size=8,
        channels=1,
        layers=(1, 1),
        dims=(8, 8),
        heads=1,
        num_classes=10,
        null_class=True,
        space="pixel",
    )
    recipe = recipes.Recipe(
        grad_clip=1.0, precision="fp32", compile=False, ema_profiles=(0.05, 0.1)
    )
    state = training.State(training.new_network(config, 0), recipe, torch.device("cpu"))
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    with NoReading():
        for _ in range(2):
            sums, _ = training.losses(state, images, labels, 0)
            sums.sum().backward()
            _, bad = state.update()
        with pytest.raises(AssertionError, match="waits"):
            bool(bad)


# a month


@pytest.mark.long
@pytest.mark.slow
def test_memory_stays_flat(digits, tmp_path, dimr_process):
    steps = int(os.environ.get("DIMR_MEMORY_STEPS", 1000))
    out = tmp_path / "run"
    process = dimr_process(
        "train",
        "--out",
        out,
        "--data",
        digits,
        *NETWORK,
        "--dims",
        "8,8",
        "--heads",
        "1",
        "--batch-size",
        "2",
        "--steps",
        steps,
        "--save-every",
        "100",
    )
    peaks = [line["peak_bytes"] for line in journal.read_metrics(out)]
    print(
        f"peak after {len(peaks) // 5} steps {peaks[len(peaks) // 5] / 1e6:.1f} MB, "
        f"after {len(peaks)} {peaks[-1] / 1e6:.1f} MB"
    )
    assert process.exitcode == 0 and peaks[-1] - peaks[len(peaks) // 5] < 4e6


@pytest.mark.slow
def test_the_soak_survives_its_faults(tmp_path):
    minutes = os.environ.get("DIMR_SOAK_MINUTES", "0.3")  # the end comes on top
    tool = [sys.executable, ROOT / "tools" / "soak.py"]
    done = subprocess.run(
        [*tool, "--minutes", minutes, "--steps", "120", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    count = json.loads(done.stdout)
    assert count["rounds whose end was the undisturbed one, to the byte"] >= 1
    assert count["lives"] > 1


# names of checkpoints


def test_only_whole_names_are_checkpoints(tmp_path):
    """Copies that people make beside them are neither the newest checkpoint nor in the way."""
    for step in (1, 2):
        save(tmp_path, step, keep=0)
    newest = tmp_path / "checkpoints" / "step-0000002"
    for name in ("step-0000002-backup", "step-0000002.old", "step-3", "old step-0000009"):
        shutil.copytree(newest, newest.with_name(name))
    assert runfolder.newest_whole(tmp_path) == newest
    save(tmp_path, 3, keep=1)
    assert [c.name for c in runfolder.checkpoints(tmp_path)] == ["step-0000003"]
    assert newest.with_name("step-0000002-backup").is_dir()


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9_999_999, 10_000_000, 10_000_001):
        save(tmp_path, step, keep=2)
    assert [runfolder.step_of(c) for c in runfolder.checkpoints(tmp_path)] == [
        10_000_000,
        10_000_001,
    ]
