"""Training on several processes and nodes: the same run, its work divided, its failures named."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, dimr_command, free_port

import dataset
import dimr
import journal
import memory
import randomness
import runfolder
import training
from storage import UserError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def losses(run):
    return np.array([line["loss"] for line in journal.read_metrics(run)])


def start_torchrun(*arguments, **options):
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def children(pid):
    found = [
        int(child)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]
    return {
        int(re.search(rb"\0RANK=(\d+)", Path(f"/proc/{child}/environ").read_bytes())[1]): child
        for child in found
    }


def wait_for_step(run, step, process):
    while (
        not (run / "metrics.jsonl").exists()
        or (run / "metrics.jsonl").read_text().count("\n") < step
    ):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def outcome(run):
    last = runfolder.checkpoints(run)[-1]
    return {path.name: path.read_bytes() for path in last.iterdir()}, [
        line["loss"] for line in journal.read_metrics(run)
    ]


# the same run


def test_demo_has_the_same_losses_on_one_two_and_four_processes_and_two_nodes(digits, tmp_path):
    train = [
        "train",
        "--variant",
        "demo",
        "--data",
        digits,
        "--steps",
        "50",
        "--sample-every",
        "0",
        "--save-every",
        "50",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch-size",
        os.environ.get("DIMR_BATCH", 16),
    ]
    dimr_command(*train, "--out", tmp_path / "one")
    dimr_command(*train, "--out", tmp_path / "two", "--micro-batch", "4", torchrun=2)
    port = free_port()
    nodes = [
        start_torchrun(
            "--nnodes",
            2,
            "--nproc-per-node",
            2,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-id",
            "x",
            "-m",
            "cli",
            *train,
            "--out",
            tmp_path / "four",
            "--micro-batch",
            "2",
            cwd=tmp_path,
        )
        for _ in range(2)
    ]
    for node in nodes:
        _, stderr = node.communicate(timeout=240)
        assert node.returncode == 0, stderr
    one = losses(tmp_path / "one")
    assert len(one) == 50 and one[-1] < one[0]
    for other in ("two", "four"):
        difference = np.abs(losses(tmp_path / other) / one - 1).max()
        print(f"{other}: largest relative difference {difference:.1e}")
        assert difference < 1e-5


LEAVE = """
import contextlib
from pathlib import Path
import torch
import parallel
device = torch.device("cpu")
parallel.start(device)
parallel.wrap(torch.nn.Linear(2, 2), device)(torch.ones(1, 2)).sum().backward()
parallel.stop()
for task in Path("/proc/self/task").glob("*/comm"):
    with contextlib.suppress(FileNotFoundError):  # others may end meanwhile
        assert "gloo" not in task.read_text()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are read from /proc")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One that did would now and then abort Python's exit."""
    (tmp_path / "leave.py").write_text(LEAVE)
    process = start_torchrun("--standalone", "--nproc-per-node", 2, tmp_path / "leave.py")
    assert process.wait(timeout=120) == 0, process.communicate()[1]


def test_a_run_goes_on_on_another_number_of_processes(trained, digits, tmp_path):
    out = tmp_path / "small"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "checkpoints" / "step-0000012")
    shutil.rmtree(out / "checkpoints" / "step-0000008")
    dimr_command(
        "train",
        "--out",
        out,
        "--workers",
        "0",
        "--sample-every",
        "0",
        "--device",
        "cpu",
        torchrun=2,
    )
    np.testing.assert_allclose(losses(out), losses(trained), rtol=1e-5)
    assert losses(out)[:4].tolist() == losses(trained)[:4].tolist()


COUNT = """
import json, sys
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import parallel, training

calls, exchanges, losses, wrap = [], [], training.losses, parallel.wrap

def counted(*arguments):
    calls.append(arguments[1].shape[0])
    return losses(*arguments)

def watched(model, device):
    model = wrap(model, device)

    def exchange(state, bucket):
        exchanges.append(len(calls))
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, exchange)
    return model

training.losses, parallel.wrap = counted, watched
recipe = dict(batch_size=24, micro_batch=3, steps=4)
network = dict(layers=(1, 1), dims=(8, 8), heads=1)
training.train(sys.argv[1], training.Source(sys.argv[2], workers=0), variant="demo",
               recipe=recipe, network=network, device="cpu",
               saving=training.Saving(sample_every=0), quiet=True)
found = parallel.gather([calls, exchanges])
if parallel.is_main():
    print(json.dumps(found))
parallel.stop()
"""


def test_each_process_does_its_share_and_exchanges_gradients_once_a_step(digits, tmp_path):
    (tmp_path / "count.py").write_text(COUNT)
    process = start_torchrun(
        "--standalone", "--nproc-per-node", 2, tmp_path / "count.py", tmp_path / "run", digits
    )
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    for calls, exchanges in json.loads(stdout):
        assert calls == [3] * (24 // 2 // 3 * 4)  # half of the samples of 4 steps
        assert sorted(set(exchanges)) == [4, 8, 12, 16]  # after the last pass of each step alone


def test_rank_0_alone_prints_and_writes(digits, tmp_path):
    done = dimr_command(
        "train", "--data", digits, "--out", tmp_path / "run", *SMALL, "--json", torchrun=2
    )
    assert len(done.stdout.strip().splitlines()) == 1 and json.loads(done.stdout)["step"] == 12
    assert done.stderr.count("12/12") >= 1 and "rank" not in done.stderr
    assert [line["step"] for line in journal.read_metrics(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.parametrize(
    "batch, micro, words", [(10, None, "use 8 or 12"), (16, 3, "use 12 or 24"), (2, None, "use 4")]
)
def test_an_uneven_split_names_the_nearest_sizes(monkeypatch, batch, micro, words):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=words):
        training.divide(batch, micro)


# failures


def test_a_failure_of_any_rank_is_named_with_it_and_ends_all(digits, tmp_path):
    data = tmp_path / "digits"
    shutil.copytree(digits, data)
    folder = dataset.open_data(data)
    read_by_rank_1 = randomness.Order(len(folder), 0)(8, 16)[0]
    Path(folder.paths[int(read_by_rank_1[0])]).write_bytes(b"not an image")
    done = dimr_command(
        "train", "--data", data, "--out", tmp_path / "run", *SMALL, torchrun=2, check=False
    )
    lines = re.findall("Error: (rank .*)", done.stderr)
    assert done.returncode == 1 and any(
        line.startswith("rank 1: ") and "not a JPEG, PNG or WebP" in line for line in lines
    )
    assert (
        all("rank 1: " in line or "another process ended" in line for line in lines)
        and str(ROOT / "training.py") not in done.stderr
    )


def test_a_killed_process_is_named_and_ends_all(digits, tmp_path):
    process = start_torchrun(
        "--standalone",
        "--nproc-per-node",
        2,
        "-m",
        "cli",
        "train",
        "--data",
        digits,
        "--out",
        tmp_path / "run",
        *SMALL,
        "--steps",
        100000,
    )
    wait_for_step(tmp_path / "run", 10, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and str(ROOT / "training.py") not in stderr
    assert re.search(r"rank\s*: 1", stderr) and "-9" in stderr


def test_sampling_names_a_killed_process_and_goes_on_from_there(trained, tmp_path):
    command = [
        "sample",
        "--weights",
        trained,
        "--balanced",
        "-n",
        "80",
        "--batch-size",
        "2",
        "--steps",
        "10",
        "--device",
        "cpu",
        "--out",
    ]
    process = start_torchrun(
        "--standalone", "--nproc-per-node", 2, "-m", "cli", *command, tmp_path / "set.npz"
    )
    noted = tmp_path / "set.npz.partial" / "batch-000003.done"  # the second of rank 1
    while not noted.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert (
        process.returncode == 1
        and re.search(r"rank\s*: 1", stderr)
        and str(ROOT / "sampling.py") not in stderr
    )
    assert not (tmp_path / "set.npz").exists() and noted.exists()
    dimr_command(*command, tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz") as arrays:
        assert len(arrays["arr_0"]) == 80 and arrays["arr_0"].reshape(80, -1).any(1).all()


def test_torchrun_picks_a_killed_run_up_by_itself(digits, tmp_path):
    options = ["-m", "cli", "train", "--data", digits, *SMALL, "--steps", 120]
    calm = start_torchrun(
        "--standalone", "--nproc-per-node", 2, *options, "--out", tmp_path / "calm"
    )
    process = start_torchrun(
        "--standalone",
        "--nproc-per-node",
        2,
        "--max-restarts",
        1,
        *options,
        "--out",
        tmp_path / "run",
    )
    wait_for_step(tmp_path / "run", 10, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    for torchrun in (calm, process):
        stdout, stderr = torchrun.communicate(timeout=120)
        assert torchrun.returncode == 0, stderr
    assert (
        "going on from" in stderr
        and "step 120 of 120" in stdout
        and outcome(tmp_path / "run") == outcome(tmp_path / "calm")
    )


def test_torchrun_hands_on_the_signals_it_is_told_to(digits, tmp_path):
    process = start_torchrun(
        "--standalone",
        "--nproc-per-node",
        2,
        "--signals-to-handle",
        "SIGTERM,SIGINT,SIGUSR1",
        "-m",
        "cli",
        "train",
        "--data",
        digits,
        "--out",
        tmp_path / "run",
        *SMALL,
        "--steps",
        100000,
    )
    wait_for_step(tmp_path / "run", 10, process)
    process.send_signal(signal.SIGUSR1)
    stdout, stderr = process.communicate(timeout=60)
    saved = runfolder.step_of(runfolder.newest_whole(tmp_path / "run"))
    assert (
        "stopped by SIGUSR1" in stdout
        and f"step {saved:,} of 100,000" in stdout
        and process.returncode != 0
    )
    assert [line["step"] for line in journal.read_metrics(tmp_path / "run")] == list(
        range(1, saved + 1)
    )


# memory


def test_memory_is_counted_without_values_as_with_them():
    config, made = dimr.VARIANTS["demo"], {}
    for flag in (False, True):
        model = dimr.DiMR(config).train()
        model.checkpoint_blocks = flag
        real = memory.activations(model, config, 8, "fp32")
        state, made[flag] = memory.training_memory(config, 8, flag, "fp32")
        assert made[flag] == pytest.approx(real, rel=0.02) and state == 20 * sum(
            p.numel() for p in model.parameters()
        )
    assert made[True] < 0.7 * made[False]
    doubled = memory.training_memory(config, 16, False, "fp32")[1]
    assert doubled == pytest.approx(2 * made[False], rel=0.2)
