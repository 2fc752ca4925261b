"""Soak: train on several processes under random faults until time is up, and compare the end with
an undisturbed run.

    python tools/soak.py --minutes 30    # prints what was injected and survived, by kind, as JSON
    python tools/soak.py --minutes 30 --processes 4

Each round trains a tiny network twice, undisturbed and under faults: any process killed, inside a
save too; all of them killed; stopped by signals; a disk that is full for a while; checkpoints
damaged; a second start in the same folder. In the end weights, EMA, optimiser state and losses have
to be the same to the byte, and metrics.jsonl has to hold each step once."""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

import journal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import runfolder  # noqa: E402
from storage import UserError  # noqa: E402

PATIENCE = 120  # seconds after which a life that neither ends nor trains counts as hung
SAVE_EVERY = 40
OPTIONS = [
    "--variant",
    "demo",
    "--layers",
    "1,1",
    "--dims",
    "16,8",
    "--heads",
    "2",
    "--micro-batch",
    "2",
    "--warmup",
    "2",
    "--workers",
    "1",
    "--sample-every",
    "0",
    "--save-every",
    str(SAVE_EVERY),
    "--keep",
    "3",
    "--device",
    "cpu",
]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def write_images(folder, count=64):
    """Small random images in four classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 4}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


@dataclasses.dataclass(frozen=True)
class Work:
    """What the processes of each life are to do."""

    data: Path
    steps: int
    processes: int


class Life:
    """One torchrun and its processes, from start to end."""

    def __init__(self, work, out, seed, restarts=0):
        self.processes = work.processes
        self.out = out
        self.lines = []
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            work.processes,
            "--max-restarts",
            restarts,
            "--monitor-interval",
            0.1,
            "--signals-to-handle",
            ",".join(s.name for s in SIGNALS),
            "-m",
            "cli",
            "train",
            "--data",
            work.data,
            "--out",
            out,
            "--steps",
            work.steps,
            "--batch-size",
            4 * work.processes,
            "--seed",
            seed,
            *OPTIONS,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.agent = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self.reader = threading.Thread(
            target=lambda: self.lines.extend(self.agent.stdout), daemon=True
        )
        self.reader.start()

    def alive(self):
        return self.agent.poll() is None

    def complete(self):
        """Whether all of its processes are there."""
        return len(self.ranks()) == self.processes

    def ranks(self):
        """Process ids by rank."""
        found = {}
        for children in Path(f"/proc/{self.agent.pid}/task").glob("*/children"):
            for pid in read(children).split():
                environment = dict(
                    entry.split("=", 1)
                    for entry in read(Path(f"/proc/{pid}/environ")).split("\0")
                    if "=" in entry
                )
                if "RANK" in environment:
                    found[int(environment["RANK"])] = int(pid)
        return found

    def end(self):
        """Wait for everything to be gone; returns what was printed."""
        try:
            self.agent.wait(PATIENCE)
            self.reader.join(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"a life did not end within {PATIENCE} s:\n{''.join(self.lines)[-3000:]}"
            ) from None
        finally:
            self.kill()
        text = "".join(self.lines)
        assert str(ROOT / "training.py") not in text, (
            f"a failure that is not foreseen:\n{text[-6000:]}"
        )
        return text

    def kill(self):
        for pid in [*self.ranks().values(), self.agent.pid] if self.alive() else []:
            send(pid, signal.SIGKILL)


def read(path):
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def send(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def trained(out):
    """Steps that metrics.jsonl tells of."""
    path = out / "metrics.jsonl"
    return read(path).count("\n") if path.exists() else 0


def saving(out):
    return any((out / "checkpoints").glob(".step-*.tmp"))


# faults, each on (life, rng): injected while the processes train


def kill_one(life, rng):
    for pid in sorted(life.ranks().values())[rng.randrange(life.processes) :][:1]:
        send(pid, signal.SIGKILL)


def kill_inside_a_save(life, rng):
    until = time.monotonic() + 5
    while not saving(life.out) and life.alive() and time.monotonic() < until:
        pass
    time.sleep(rng.uniform(0, 0.01))
    inside = saving(life.out)
    send(life.ranks().get(0, life.agent.pid), signal.SIGKILL)
    return inside


def kill_all(life, rng):
    life.kill()


def stop_all(life, rng):
    send(life.agent.pid, rng.choice(SIGNALS))


def stop_one(life, rng):
    for pid in sorted(life.ranks().values())[rng.randrange(life.processes) :][:1]:
        send(pid, rng.choice(SIGNALS))


def fill_the_disk(life, rng):
    """No file can grow beyond a few bytes for a while, as on a full disk; training has to go on."""
    pid = life.ranks().get(0, life.agent.pid)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # what it inherited
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (rng.choice([0, 3000]), before[1]))
    time.sleep(rng.uniform(1, 2))
    with contextlib.suppress(
        ProcessLookupError
    ):  # it was starting, or at its end: that fails on a full disk, and is repeated
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def start_a_second(life, rng):
    """It is refused, unless the first is no more when it asks; then it finds nothing to do."""
    owner = life.ranks().get(0)
    rival = subprocess.run(
        [sys.executable, "-m", "cli", "train", "--out", str(life.out), "--steps", "1"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    refused = rival.returncode == 1 and "in use by process" in rival.stderr
    late = rival.returncode == 1 and "beyond --steps 1" in rival.stderr
    assert refused or (late and life.ranks().get(0) != owner), rival.stderr
    return refused


FAULTS = [
    kill_one,
    kill_inside_a_save,
    kill_inside_a_save,
    kill_all,
    stop_all,
    stop_one,
    fill_the_disk,
    start_a_second,
]


def damage(out, rng):
    """Spoil the newest checkpoint, if the one before it is whole; returns (its folder, what was
    done), or None."""
    found = runfolder.checkpoints(out)
    if len(found) < 2 or not all(map(whole, found[-2:])):
        return None
    path = rng.choice(sorted(found[-1].iterdir()))
    content = path.read_bytes()
    kind = rng.choice(["a flipped bit", "cut short", "emptied", "missing"])
    if kind == "a flipped bit":
        place = rng.randrange(len(content))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
        )
    elif kind == "missing" and path.name != "manifest.json":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2 if kind == "cut short" else 0])
    return found[-1], kind


def whole(checkpoint):
    with contextlib.suppress(UserError):
        runfolder.verify(checkpoint)
        return True
    return False


def check_folder(out, spoilt):
    """Whatever happened, no checkpoint is half-written but those `spoilt` here, and no step is told
    twice."""
    assert all(
        whole(checkpoint) or checkpoint in spoilt for checkpoint in runfolder.checkpoints(out)
    )
    steps = [line["step"] for line in journal.read_metrics(out)]
    assert steps == list(range(1, len(steps) + 1)), f"steps of metrics.jsonl: {steps}"
    return max(
        (
            runfolder.step_of(checkpoint)
            for checkpoint in runfolder.checkpoints(out)
            if whole(checkpoint)
        ),
        default=0,
    )


def outcome(out):
    """What has to be the same: the last checkpoint's hashes, the losses."""
    last = runfolder.checkpoints(out)[-1]
    hashes = json.loads((last / "manifest.json").read_text())
    losses = [
        (line["step"], line["loss"], line["loss_branches"], line["gradient_norm"])
        for line in journal.read_metrics(out)
    ]
    return last.name, hashes, losses


def one_round(folder, work, number, deadline, rng, count):
    """Train undisturbed and under faults, and compare."""
    steps = work.steps
    calm, out = folder / f"calm-{number}", folder / f"stormy-{number}"
    print(f"round {number}: {steps} steps undisturbed", file=sys.stderr)
    begun = time.monotonic()
    life = Life(work, calm, number)
    life.agent.wait()
    assert life.agent.returncode == 0, life.end()
    peaks = [line["peak_bytes"] for line in journal.read_metrics(calm)]
    count["memory growth of rank 0 after a fifth of the steps (MB)"] = max(
        count["memory growth of rank 0 after a fifth of the steps (MB)"],
        round((peaks[-1] - peaks[steps // 5]) / 1e6, 2),
    )
    spoilt = set()
    print(
        f"round {number}: under faults ({time.monotonic() - begun:.0f} s undisturbed)",
        file=sys.stderr,
    )
    while (
        trained(out) < steps
        or not runfolder.checkpoints(out)
        or runfolder.step_of(runfolder.checkpoints(out)[-1]) < steps
    ):
        begun_at = (
            runfolder.step_of(runfolder.checkpoints(out)[-1]) if runfolder.checkpoints(out) else 0
        )
        start, restarts = trained(out), rng.choice([0, 0, 2])
        life, since = Life(work, out, number, restarts), time.monotonic()
        count["lives"] += 1
        while life.alive():
            wait = rng.uniform(0.2, 6)
            while life.alive() and (
                wait > 0 or not life.complete() or trained(out) in (start, steps)
            ):
                time.sleep(0.05)
                wait -= 0.05 * (trained(out) > 0 and life.complete())
                assert time.monotonic() - since < PATIENCE + 0.2 * steps, (
                    f"a life hangs:\n{''.join(life.lines)[-3000:]}"
                )
            if life.alive() and time.monotonic() < deadline and life.complete():
                fault = rng.choice(FAULTS)
                print(
                    f"  step {trained(out):6}: {fault.__name__.replace('_', ' ')}", file=sys.stderr
                )
                inside = fault(life, rng)
                count[
                    fault.__name__.replace("_", " ") + (" (too late)" if inside is False else "")
                ] += 1
        text = life.end()
        count["saves that failed and were reported"] += text.count("NOT saved")
        count["restarts by torchrun itself"] += max(0, text.count("going on from") - (begun_at > 0))
        count["checkpoints refused, the one before used"] += text.count("checkpoint refused")
        told, saved = trained(out), check_folder(out, spoilt)
        count["most steps to repeat after a kill"] = max(
            count["most steps to repeat after a kill"], told - saved
        )
        spoil = time.monotonic() < deadline and saved < steps and rng.random() < 0.3
        if spoil and (damaged := damage(out, rng)):
            print(f"  {damaged[0].name}: {damaged[1]}", file=sys.stderr)
            spoilt.add(damaged[0])
            count[f"checkpoint damaged: {damaged[1]}"] += 1
    assert outcome(out) == outcome(calm), (
        f"the end under faults is not the undisturbed one: {outcome(out)[:2]} {outcome(calm)[:2]}"
    )
    for run in (calm, out):
        shutil.rmtree(run)
    count["rounds whose end was the undisturbed one, to the byte"] += 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=2000, help="of each round")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    options = parser.parse_args()
    rng, count, deadline, number = (
        random.Random(options.seed),
        collections.Counter(),
        time.monotonic() + 60 * options.minutes,
        0,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = Work(write_images(folder / "data"), options.steps, options.processes)
        while number == 0 or time.monotonic() < deadline:
            one_round(folder, work, number, deadline, rng, count)
            number += 1
    print(json.dumps(count, indent=2))


if __name__ == "__main__":
    main()
