"""Training on several processes and nodes: the same run, its work divided, its failures named."""

import json
import os
import random
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

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = ["--standalone", "--nproc-per-node", 2]


def losses(run):
    return np.array([line["loss"] for line in journal.read_metrics(run)])


def start_torchrun(*arguments, **options):
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def children(process):
    """{rank: process id} of torchrun's processes."""
    found = {}
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for child in path.read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes()
            found[int(re.search(rb"\0RANK=(\d+)", environment)[1])] = int(child)
    return found


def lines_of(path):
    """How many lines are in a file, if it is there."""
    if not path.exists():
        return 0
    return path.read_text().count("\n")


def wait_for(happened, process):
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def wait_for_lines(path, count, process):
    wait_for(lambda: lines_of(path) >= count, process)


def outcome(run):
    """What a run came to: the files of its last checkpoint, and its losses."""
    last = runfolder.checkpoints(run)[-1]
    files = {path.name: path.read_bytes() for path in last.iterdir()}
    return files, losses(run).tolist()


# the same run


@pytest.mark.long
@pytest.mark.slow
def test_demo_has_the_same_losses_on_one_two_and_four_processes_and_two_nodes(digits, tmp_path):
    train = ["train", "--data", digits, "--batch-size", os.environ.get("DIMR_BATCH", 16)]
    train += ["--variant", "demo", "--steps", "50", "--save-every", "50", "--sample-every", "0"]
    train += ["--workers", "0", "--device", "cpu", "--precision", "fp32"]
    dimr_command(*train, "--out", tmp_path / "one")
    dimr_command(*train, "--out", tmp_path / "two", "--micro-batch", "4", torchrun=2)
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    meeting += ["--rdzv-id", "x", "--nnodes", 2, "--nproc-per-node", 2]
    four = ["-m", "cli", *train, "--out", tmp_path / "four", "--micro-batch", "2"]
    nodes = [start_torchrun(*meeting, *four, cwd=tmp_path) for _ in range(2)]
    for node in nodes:
        _, stderr = node.communicate(timeout=240)
        assert node.returncode == 0, stderr
    one = losses(tmp_path / "one")
    assert len(one) == 50
    assert one[-1] < one[0]
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


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are read from /proc")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One that did would now and then abort Python's exit."""
    (tmp_path / "leave.py").write_text(LEAVE)
    process = start_torchrun(*TWO, tmp_path / "leave.py")
    assert process.wait(timeout=120) == 0, process.communicate()[1]


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes(trained, digits, tmp_path):
    out = tmp_path / "small"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "checkpoints" / "step-0000012")
    shutil.rmtree(out / "checkpoints" / "step-0000008")
    options = ["--workers", "0", "--sample-every", "0", "--device", "cpu"]
    dimr_command("train", "--out", out, *options, torchrun=2)
    np.testing.assert_allclose(losses(out), losses(trained), rtol=1e-5)
    assert losses(out)[:4].tolist() == losses(trained)[:4].tolist()


COUNT = """
import json, sys
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import parallel, training

calls = []
exchanges = []
losses = training.losses
wrap = parallel.wrap

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

training.losses = counted
parallel.wrap = watched
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


@pytest.mark.slow
def test_each_process_does_its_share_and_exchanges_gradients_once_a_step(digits, tmp_path):
    (tmp_path / "count.py").write_text(COUNT)
    process = start_torchrun(*TWO, tmp_path / "count.py", tmp_path / "run", digits)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    for calls, exchanges in json.loads(stdout):
        assert calls == [3] * (24 // 2 // 3 * 4)  # half of the samples of 4 steps
        # before the first step, to lay the buckets; then after the last pass of each step alone
        assert sorted(set(exchanges)) == [0, 4, 8, 12, 16]


@pytest.mark.slow
def test_rank_0_alone_prints_and_writes(digits, tmp_path):
    run = tmp_path / "run"
    done = dimr_command("train", "--data", digits, "--out", run, *SMALL, "--json", torchrun=2)
    assert len(done.stdout.strip().splitlines()) == 1
    assert json.loads(done.stdout)["step"] == 12
    assert "12/12" in done.stderr
    assert not re.search(r"\brank \d", done.stderr)
    assert done.stderr.count("a new run") == 1
    assert [line["step"] for line in journal.read_metrics(run)] == list(range(1, 13))


@pytest.mark.parametrize(
    "batch, micro, words", [(10, None, "use 8 or 12"), (16, 3, "use 12 or 24"), (2, None, "use 4")]
)
def test_an_uneven_split_names_the_nearest_sizes(monkeypatch, batch, micro, words):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=words):
        training.divide(batch, micro)


# failures


@pytest.mark.slow
def test_a_failure_of_any_rank_is_named_with_it_and_ends_all(digits, tmp_path):
    data = tmp_path / "digits"
    shutil.copytree(digits, data)
    folder = dataset.open_data(data)
    read_by_rank_1 = randomness.Order(len(folder), 0)(8, 16)[0]
    Path(folder.place(int(read_by_rank_1[0]))).write_bytes(b"not an image")
    train = ["train", "--data", data, "--out", tmp_path / "run", *SMALL]
    done = dimr_command(*train, torchrun=2, check=False)
    assert done.returncode == 1
    assert str(ROOT / "training.py") not in done.stderr
    lines = re.findall("Error: (rank .*)", done.stderr)
    own = [line for line in lines if line.startswith("rank 1: ")]
    assert any("not a JPEG, PNG or WebP" in line for line in own)
    assert all(line in own or "another process ended" in line for line in lines)


@pytest.mark.slow
def test_a_killed_process_is_named_and_ends_all(digits, tmp_path):
    run = tmp_path / "run"
    train = ["train", "--data", digits, "--out", run, *SMALL, "--steps", 100000]
    process = start_torchrun(*TWO, "-m", "cli", *train)
    wait_for_lines(run / "metrics.jsonl", 10, process)
    os.kill(children(process)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert str(ROOT / "training.py") not in stderr
    assert re.search(r"rank\s*: 1", stderr)
    assert "-9" in stderr


@pytest.mark.slow
def test_sampling_names_a_killed_process_and_goes_on_from_there(trained, tmp_path):
    out = tmp_path / "set.npz"
    sample = ["sample", "--weights", trained, "--out", out, "--balanced", "-n", 80]
    sample += ["--batch-size", "2", "--steps", "10", "--device", "cpu"]
    process = start_torchrun(*TWO, "-m", "cli", *sample)
    noted = tmp_path / "set.npz.partial" / "batch-000003.done"  # the second of rank 1
    wait_for(noted.exists, process)
    os.kill(children(process)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"rank\s*: 1", stderr)
    assert str(ROOT / "sampling.py") not in stderr
    assert not out.exists()
    assert noted.exists()
    dimr_command(*sample)
    with np.load(out) as arrays:
        images = arrays["arr_0"]
    assert len(images) == 80
    assert images.reshape(80, -1).any(1).all()


@pytest.mark.slow
def test_torchrun_picks_a_killed_run_up_by_itself(digits, tmp_path):
    run = tmp_path / "run"
    calm = tmp_path / "calm"
    train = ["-m", "cli", "train", "--data", digits, *SMALL, "--batch-size", 24, "--steps", 48]
    train += ["--workers", 1, "--out"]
    three = ["--standalone", "--nproc-per-node", 3]  # two sum the same in any order
    undisturbed = start_torchrun(*three, *train, calm)
    process = start_torchrun(*three, "--max-restarts", 1, *train, run)
    wait_for_lines(run / "metrics.jsonl", 10, process)
    os.kill(children(process)[random.randrange(3)], signal.SIGKILL)
    _, stderr = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, stderr
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "going on from" in stderr
    assert "step 48 of 48" in stdout
    assert outcome(run) == outcome(calm)


@pytest.mark.slow
def test_torchrun_hands_on_the_signals_it_is_told_to(digits, tmp_path):
    run = tmp_path / "run"
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    train = ["train", "--data", digits, "--out", run, *SMALL, "--steps", 100000]
    process = start_torchrun(*TWO, *signals, "-m", "cli", *train)
    wait_for_lines(run / "metrics.jsonl", 10, process)
    process.send_signal(signal.SIGUSR1)
    stdout, _ = process.communicate(timeout=60)
    saved = runfolder.step_of(runfolder.newest_whole(run))
    assert process.returncode != 0
    assert "stopped by SIGUSR1" in stdout
    assert f"step {saved:,} of 100,000" in stdout
    assert [line["step"] for line in journal.read_metrics(run)] == list(range(1, saved + 1))


# memory


def test_memory_is_counted_without_values_as_with_them():
    config = dimr.VARIANTS["demo"]
    counted = {}
    for recompute in (False, True):
        model = dimr.DiMR(config).train()
        model.checkpoint_blocks = recompute
        parameters = sum(parameter.numel() for parameter in model.parameters())
        real = memory.activations(model, config, 8, "fp32")
        state, counted[recompute] = memory.training_memory(config, 8, recompute, "fp32")
        assert counted[recompute] == pytest.approx(real, rel=0.02)
        assert state == 20 * parameters
    assert counted[True] < 0.7 * counted[False]
    _, doubled = memory.training_memory(config, 16, False, "fp32")
    assert doubled == pytest.approx(2 * counted[False], rel=0.2)
