"""Soak: train on several processes under random faults until time is up, and compare the end with
an undisturbed run; kill other jobs and go on with them; start two commands at once.

    python tools/soak.py --minutes 30    # prints what was injected and survived, by kind, as JSON
    python tools/soak.py --minutes 30 --processes 4
    python tools/soak.py --kills 10      # of encode, sample --npz and eval's generation, each
    python tools/soak.py --pairs 3       # times every pair of commands that share a folder

Each round trains a tiny network twice, undisturbed and under faults: any process killed, inside a
save too; all of them killed; stopped by signals; a disk that is full for a while; checkpoints
damaged; a second start in the same folder. If time runs out before one of them has ended a life, a
process is killed. In the end weights, EMA, optimiser state and losses have to be the same to the
byte, and metrics.jsonl has to hold each step once.

A job of JOBS is killed at random moments and started again on another number of processes until it
ends: what it wrote has to be what it writes undisturbed. Of each pair of PAIRS both are started at
about the same time: each ends well or with one clear line, and what those that ended well wrote is
what one of them writes alone."""

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
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fid  # noqa: E402
import journal  # noqa: E402
import runfolder  # noqa: E402
import storage  # noqa: E402
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
    spoilt, lives = set(), 0
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
        lives += 1
        while life.alive():
            wait, far = rng.uniform(0.2, 6), rng.randint(1, max(1, steps // 8))
            due = trained(out) + far
            while life.alive() and (
                (wait > 0 and trained(out) < due)
                or not life.complete()
                or trained(out) in (start, steps)
            ):
                time.sleep(0.05)
                wait -= 0.05 * (trained(out) > 0 and life.complete())
                assert time.monotonic() - since < PATIENCE + 0.2 * steps, (
                    f"a life hangs:\n{''.join(life.lines)[-3000:]}"
                )
            in_time = time.monotonic() < deadline
            if life.alive() and (in_time or lives == 1) and life.complete():
                fault = rng.choice(FAULTS) if in_time else kill_one
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


# ---------------------------------------------------------------------------- other jobs, and pairs


@dataclasses.dataclass(frozen=True)
class Job:
    """A command on the world that `make_world` makes. `written`: patterns of what it writes that
    has to be the same each time; `begun`: of what is there once it is worth killing."""

    words: str
    written: tuple = ()
    begun: str = ""


JOBS = {
    "encode": Job(
        "encode --pixels --res 64 --shard-size 8 --batch-size 2 --workers 0 --data {w}/large "
        "--out {w}/shards",
        ("shards/*",),
        "shards/shard-*",
    ),
    "sample --npz": Job(
        "sample --weights {w}/run --npz -n 96 --batch-size 4 --steps 20 --device cpu --out "
        "{w}/set.npz",
        ("set.npz", "set.json"),
        "set.npz.partial/*.done",
    ),
    "eval": Job(
        "eval is --weights {w}/run -n 12 --batch-size 2 --steps 4 --inception {w}/inception.pth "
        "--device cpu --json",
        ("home/features/*.safetensors",),
        "home/features/*.partial/*.safetensors",
    ),
    "sample": Job(
        "sample --weights {w}/run -n 12 --batch-size 4 --steps 4 --device cpu --out {w}/drawn",
        ("drawn/class*",),
    ),
    "train": Job(
        f"train --data {{w}}/data --out {{w}}/run --steps 24 --batch-size 8 {' '.join(OPTIONS)}",
        ("run/checkpoints/step-0000024/*",),
    ),
    "curves": Job("curves {w}/run"),
    "info": Job("info {w}/run"),
    "prune": Job("runs prune {w}/run --keep-every 16"),
    "draw from the run": Job(
        "sample --weights {w}/run -n 2 --steps 1 --device cpu --out {w}/other"
    ),
    "encode --verify": Job("encode --verify --out {w}/shards"),
    "train on the shards": Job(
        "train --data {w}/shards --variant demo --layers 1,1 --dims 8,8 --heads 1 --steps 1 "
        "--batch-size 2 --workers 0 --device cpu --sample-every 0 --out {w}/on-shards"
    ),
    "measure the set": Job(
        "eval is {w}/set.npz --inception {w}/inception.pth --device cpu --batch-size 4"
    ),
    "convert": Job("convert {w}/run {w}/converted.safetensors", ("converted.safetensors",)),
}
KILLED = ("encode", "sample --npz", "eval")
OTHER_SEEDS = Job(JOBS["sample --npz"].words + " --seed 7", ("set.npz", "set.json"))
PAIRS = [
    *((name, name) for name in ("encode", "sample --npz", "eval", "sample", "train", "convert")),
    ("sample --npz", "other seeds"),
    *(("train", name) for name in ("curves", "info", "prune", "draw from the run", "convert")),
    ("encode", "encode --verify"),
    ("encode", "train on the shards"),
    ("sample --npz", "measure the set"),
]
JOBS["other seeds"] = OTHER_SEEDS


def run_job(job, world, processes=1):
    """Start a job as `processes` processes."""
    words = [sys.executable, "-m"]
    if processes > 1:
        words += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    words += ["cli", *job.words.format(w=world).split()]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1", "DIMR_HOME": str(world / "home")},
        start_new_session=True,
    )


def make_world(folder):
    """Images, a run and random Inception weights, that each round copies."""
    write_images(folder / "data")
    for i in range(48):
        path = folder / "large" / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (200, 200, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    work = JOBS["train"].words.replace("--steps 24", "--steps 16").format(w=folder)
    subprocess.run([sys.executable, "-m", "cli", *work.split()], check=True, capture_output=True)
    torch.save(random_inception(), folder / "inception.pth")
    return folder


def random_inception():
    """Tensors as pytorch-fid's file has them, drawn so that variance is about kept."""
    network = fid.Inception()
    tensors = {"fc.weight": network.fc.weight, "fc.bias": torch.zeros(fid.LOGITS)}
    generator = torch.Generator().manual_seed(0)
    for name, module in network.named_modules():
        if isinstance(module, fid.Conv):
            shape = module.weight.shape
            scale = (2 / shape[1:].numel()) ** 0.5
            tensors[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * scale
            ones = torch.ones(len(module.weight))
            for part, value in zip(fid.NORM, (ones, 0 * ones, 0 * ones, ones), strict=True):
                tensors[f"{name}.{part}"] = value
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def copied(world, folder):
    """A fresh copy at the same place each time: paths stand in what is written."""
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(world, folder)


def written(job, world):
    """Name → SHA-256 of what a job writes."""
    found = {}
    for pattern in job.written:
        for path in sorted(world.glob(pattern)):
            if path.is_file() and not path.name.startswith("."):
                found[path.name] = storage.sha256(path)
    return found


def ended(process):
    """(exit status, stderr) of a process, which has to say foreseen things alone."""
    try:
        _, stderr = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hangs: {process.args}") from None
    assert "Traceback" not in stderr, f"{process.args}: {stderr[-3000:]}"
    return process.returncode, stderr


def kills_of(name, world, place, count, rng):
    """Kill a job `count` times, each life on another number of processes, and let it end."""
    job = JOBS[name]
    copied(world, place)
    assert ended(run_job(job, place))[0] == 0
    expected = written(job, place)
    assert expected, f"{name} wrote nothing"
    copied(world, place)
    killed = 0
    while killed < count:
        before = len(list(place.glob(job.begun)))
        life = run_job(job, place, processes=1 + killed % 2)
        until = time.monotonic() + PATIENCE
        while life.poll() is None and time.monotonic() < until:
            if len(list(place.glob(job.begun))) > before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        if life.poll() is not None:  # it was faster
            ended(life)
            assert written(job, place) == expected, f"{name} after {killed} kills"
            copied(world, place)
            continue
        os.killpg(life.pid, signal.SIGKILL)
        life.communicate()
        killed += 1
    status, stderr = ended(run_job(job, place, processes=1 + killed % 2))
    assert status == 0, stderr
    assert written(job, place) == expected, f"{name} after {killed} kills: another outcome"
    return killed


def pair(names, world, place, alone, rng):
    """Start two jobs at about the same time. Returns how many of them ended well."""
    copied(world, place)
    lives = []
    for name in names:
        lives.append(run_job(JOBS[name], place))
        time.sleep(rng.uniform(0, 0.5))
    well = []
    for name, life in zip(names, lives, strict=True):
        status, stderr = ended(life)
        if status == 0:
            well.append(name)
        else:
            line = stderr[stderr.find("Error:") :].strip()
            assert line.startswith("Error:") and line.count("\n") == 0, f"{names}: {stderr}"
    outcomes = {}  # of those that write the same
    for name in names:
        outcomes.setdefault(JOBS[name].written, []).append(name)
    for group in outcomes.values():
        there = [name for name in group if name in well]
        if there and JOBS[there[0]].written:
            found = written(JOBS[there[0]], place)
            assert found in [alone[name] for name in there], f"{names}: {found}"
    return len(well)


def other_jobs(options, count, rng):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        world = make_world(folder / "world")
        place = folder / "place"
        # paths of the run stand in what is drawn from it
        for job in KILLED if options.kills else ():
            count[f"{job}: kills survived"] += kills_of(job, world, place, options.kills, rng)
            print(f"{job}: {options.kills} kills", file=sys.stderr)
        alone = {}
        for job in dict.fromkeys(sum(PAIRS, ())) if options.pairs else ():
            copied(world, place)
            if JOBS[job].written:
                assert ended(run_job(JOBS[job], place))[0] == 0
                alone[job] = written(JOBS[job], place)
        for _ in range(options.pairs):
            for names in PAIRS:
                well = pair(names, world, place, alone, rng)
                print(f"{' + '.join(names)}: {well} of 2 ended well", file=sys.stderr)
                count[f"{' + '.join(names)}: pairs"] += 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, default=2000, help="of each round")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--kills", type=int, default=0, help="of each of the other jobs, instead")
    parser.add_argument("--pairs", type=int, default=0, help="times each pair, instead")
    options = parser.parse_args()
    rng, count, deadline, number = (
        random.Random(options.seed),
        collections.Counter(),
        time.monotonic() + 60 * options.minutes,
        0,
    )
    if options.kills or options.pairs:
        other_jobs(options, count, rng)
        print(json.dumps(count, indent=2))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = Work(write_images(folder / "data"), options.steps, options.processes)
        while number == 0 or time.monotonic() < deadline:
            one_round(folder, work, number, deadline, rng, count)
            number += 1
    print(json.dumps(count, indent=2))


if __name__ == "__main__":
    main()
