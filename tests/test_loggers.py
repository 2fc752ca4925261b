"""`dimr train --log`: others are told what metrics.jsonl says, each step once though it is done
twice, and nothing that they do ends training."""

import importlib
import json
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import SMALL, dimr_command
from PIL import Image

import journal
import loggers
import parallel
import runfolder
import training
from storage import UserError

STUB = '''
"""A wandb that keeps what it is told in a file, and as the real one takes no step twice."""
import json, os, pathlib, types
HERE = pathlib.Path(os.environ["WANDB_STUB"])
Settings = Image = types.SimpleNamespace
def Image(path): return str(path)
class Run:
    url = "https://stub"
    def __init__(self, about):
        self.file = HERE / f"{about['id']}.json"
        known = {"lives": [], "rows": {}}
        if self.file.exists():
            known = json.loads(self.file.read_text())
        self.rows = {int(step): row for step, row in known["rows"].items()}
        self.lives = known["lives"] + [about]
        self.step = max(self.rows) + 1 if self.rows else 0
        self.save()
    def save(self):
        self.file.write_text(json.dumps({"lives": self.lives, "rows": self.rows}))
    def log(self, data, step):
        if os.environ.get("WANDB_FAILS") == str(step):
            raise ConnectionError("no route\\nto host")
        assert step >= self.step or step in self.rows and step == max(self.rows), (step, self.step)
        self.rows.setdefault(step, {}).update(data)
        self.step = step
        self.save()
    def finish(self):
        self.rows.setdefault(max(self.rows), {})["finished"] = 1
        self.save()
def init(settings, **about):
    if os.environ.get("WANDB_FAILS") == "init":
        raise RuntimeError("api_key not configured")
    return Run(about)
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The stub's folder; the stub is what `import wandb` gives."""
    place = tmp_path / "packages"
    (place / "wandb").mkdir(parents=True)
    (place / "wandb" / "__init__.py").write_text(STUB)
    kept = tmp_path / "server"
    kept.mkdir()
    monkeypatch.setenv("WANDB_STUB", str(kept))
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    yield kept
    sys.modules.pop("wandb", None)


def train(out, digits, names, steps=12):
    """12 steps, a checkpoint every 4, a grid every 3."""
    return training.train(
        out,
        training.Source(digits, workers=0),
        variant="demo",
        recipe={"steps": steps, "batch_size": 4, "warmup": 2},
        network={"layers": (2, 2), "dims": (16, 8), "heads": 2},
        device="cpu",
        saving=training.Saving(every=4, keep=0, sample_every=3),
        sinks=loggers.sinks(names),
    )


def go_back(out, step):
    """The run as a kill leaves it: it goes on from `step`, and has gone further."""
    for checkpoint in runfolder.checkpoints(out):
        if runfolder.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def rows_of(server):
    (file,) = server.glob("*.json")
    known = json.loads(file.read_text())
    return known["lives"], {int(step): row for step, row in known["rows"].items()}


# what is told


def test_each_number_of_a_line_has_a_name():
    line = {"step": 3, "loss": 0.5, "loss_branches": [0.25, None, 2], "skipped": True}
    line |= {"share_of_peak": None, "fid": 7, "note": "text"}
    assert dict(loggers.values(line)) == {
        "loss": 0.5,
        "loss_branches/1": 0.25,
        "loss_branches/3": 2,
        "skipped": 1.0,
        "fid": 7.0,
    }


class Listener(journal.Sink):
    """Notes what it is told; raises in the method called `fails`."""

    def __init__(self, name, fails=None, held=0):
        self.name = name
        self.fails = fails
        self.held = held
        self.told = []

    def note(self, what, *arguments):
        if self.fails == what:
            raise ValueError(f"can't {what}\nat all")
        self.told.append((what, *arguments))

    def begin(self, out, step):
        self.note("begin")
        return self.held

    def line(self, line):
        self.note("line", line["step"])

    def picture(self, step, path):
        self.note("picture", step)

    def flush(self):
        self.note("flush")

    def close(self):
        self.note("close")


@pytest.mark.parametrize("fails", ["begin", "line", "picture", "flush", "close"])
def test_a_sink_that_fails_is_said_once_and_the_others_go_on(tmp_path, fails):
    said = []
    bad, good = Listener("bad", fails), Listener("good")
    audience = journal.Audience([bad, good], said.append)
    audience.begin(tmp_path, 0)
    for step in (1, 2, 3):
        audience.line({"step": step})
        audience.picture(step, tmp_path, told=step)
        audience.tell("flush")
    audience.tell("close")
    assert len(good.told) == 1 + 3 * 3 + 1
    assert [line for line in said if "WARNING" in line] == [
        f"WARNING: bad failed (can't {fails} at all) and is told no more; training goes on, and "
        "metrics.jsonl has everything"
    ]


def test_pictures_come_after_their_step_and_before_the_next(tmp_path):
    sink = Listener("a")
    audience = journal.Audience([sink], print)
    audience.picture(3, tmp_path, told=0)
    audience.picture(4, tmp_path, told=0)
    for step in range(1, 6):
        audience.line({"step": step})
    audience.picture(5, tmp_path, told=5)
    told = [("line", 1), ("line", 2), ("line", 3), ("picture", 3)]
    told += [("line", 4), ("picture", 4), ("line", 5), ("picture", 5)]
    assert sink.told == told


def test_a_sink_is_told_what_it_lacks_of_the_steps_so_far(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    new, behind, whole = Listener("new"), Listener("behind", held=5), Listener("whole", held=8)
    said = []
    journal.Audience([new, behind, whole], said.append).begin(tmp_path, 8)
    assert new.told == [("begin",), *(("line", step) for step in range(1, 9)), ("flush",)]
    assert behind.told == [("begin",), *(("line", step) for step in range(6, 9)), ("flush",)]
    assert whole.told == [("begin",)]
    assert sum("told of steps" in line for line in said) == 2


def test_other_processes_tell_nobody(tmp_path, monkeypatch):
    class State:
        step = 0

    sink = Listener("a")
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    journal.Journal(tmp_path, State(), print, {}, [sink]).close()
    assert sink.told == []


# packages


@pytest.mark.parametrize("name", loggers.SINKS)
def test_a_missing_package_is_one_line_that_says_how_to_install_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    package = loggers.SINKS[name].package
    for there in (None, importlib.util.spec_from_loader(package, None, is_package=True)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, there=there: there)
        with pytest.raises(UserError, match=f"--log {name} needs .* pip install {package}"):
            loggers.sinks([name])


@pytest.mark.slow
def test_a_folder_of_that_name_is_no_package(tmp_path):
    """wandb leaves folders called wandb/ where people work."""
    (tmp_path / "wandb").mkdir()
    code = "import ours, loggers; loggers.sinks(['wandb'])"
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "UserError: --log wandb needs the package wandb" in done.stderr


def test_a_name_given_twice_is_told_once(wandb):
    assert len(loggers.sinks(["wandb", "wandb"])) == 1


@pytest.mark.slow
def test_a_missing_package_ends_the_command_before_anything_is_written(digits, tmp_path):
    """A package whose place is taken by nothing: its import is halted."""
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'wandb' else find(name, *a)\n"
        "import cli; sys.argv[0] = 'dimr'; cli.main()"
    )
    line = ["train", "--data", str(digits), "--out", str(tmp_path / "run"), "--log", "wandb"]
    done = subprocess.run(
        [sys.executable, "-c", code, *line], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "pip install wandb" in done.stderr
    assert not (tmp_path / "run").exists()


# wandb


@pytest.mark.slow
def test_wandb_has_each_step_once_with_its_pictures_though_a_run_goes_back(
    wandb, digits, tmp_path, monkeypatch
):
    out = tmp_path / "mine"
    train(out, digits, ["wandb"], steps=9)
    go_back(out, 4)
    train(out, digits, ["wandb"])
    (first, second), rows = rows_of(wandb)
    assert list(rows) == list(range(1, 13))
    for line in journal.read_metrics(out):
        assert rows[line["step"]]["loss"] == line["loss"]
        assert rows[line["step"]]["lr"] == line["lr"]
    drawn = [step for step, row in rows.items() if "samples" in row]
    assert drawn == [3, 6, 9, 12]
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["name"] == "mine" and first["dir"] == str(out) and first["project"] == "dimr"
    assert first["config"]["recipe"]["batch_size"] == 4
    assert "finished" in rows[12]


@pytest.mark.slow
@pytest.mark.parametrize("fails, told", [("init", 0), ("3", 2)])
def test_training_outlives_a_logger_that_fails(
    wandb, digits, tmp_path, monkeypatch, capsys, fails, told
):
    monkeypatch.setenv("WANDB_FAILS", fails)
    out = tmp_path / "mine"
    assert train(out, digits, ["wandb"])["step"] == 12
    assert capsys.readouterr().err.count("WARNING: wandb failed") == 1
    assert len(journal.read_metrics(out)) == 12
    if told:
        assert list(rows_of(wandb)[1]) == list(range(1, told + 1))
    monkeypatch.delenv("WANDB_FAILS")
    train(out, digits, ["wandb"], steps=13)
    assert list(rows_of(wandb)[1]) == list(range(1, 14))


# TensorBoard, the real one


def events(folder):
    """({name: {step: value}}, {step: image}) as TensorBoard reads them; a step that is there twice
    fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    tags = read.Tags()
    scalars = {}
    for tag in tags["scalars"]:
        found = read.Scalars(tag)
        scalars[tag] = {event.step: event.value for event in found}
        assert len(found) == len(scalars[tag]), f"{tag}: {[event.step for event in found]}"
    images = read.Images("samples") if "samples" in tags["images"] else []
    assert len(images) == len({event.step for event in images})
    return scalars, {event.step: event.encoded_image_string for event in images}


def check_events(out, steps):
    scalars, images = events(out / "tensorboard")
    for line in journal.read_metrics(out):
        for name, value in loggers.values(line):
            assert scalars[name][line["step"]] == pytest.approx(value, rel=1e-6)
    assert list(scalars["loss"]) == list(range(1, steps + 1))
    return images


@pytest.mark.slow
def test_tensorboard_has_each_step_once_with_its_pictures_though_a_run_goes_back(digits, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "mine"
    train(out, digits, ["tensorboard"], steps=9)
    go_back(out, 4)
    train(out, digits, ["tensorboard"])
    images = check_events(out, 12)
    assert sorted(images) == [3, 6, 9, 12]
    with Image.open(out / "samples" / "step-0000012.png") as picture:
        ours = np.asarray(picture.convert("RGB"))
    (tmp_path / "theirs.png").write_bytes(images[12])
    with Image.open(tmp_path / "theirs.png") as picture:
        assert (np.asarray(picture) == ours).all()


@pytest.mark.slow
def test_tensorboard_is_told_all_again_where_its_files_are_gone(digits, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "mine"
    train(out, digits, ["tensorboard"], steps=8)
    shutil.rmtree(out / "tensorboard")
    train(out, digits, ["tensorboard"], steps=10)
    check_events(out, 10)
    (out / "tensorboard" / "told").write_text("x")
    train(out, digits, ["tensorboard"])
    check_events(out, 12)


@pytest.mark.slow
def test_a_killed_run_loses_and_doubles_nothing_in_tensorboard(digits, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    line = ["train", "--data", digits, "--out", out, *SMALL, "--steps", 60, "--save-every", 10]
    line += ["--log", "tensorboard"]
    process = subprocess.Popen([sys.executable, "-m", "cli", *map(str, line)], cwd=tmp_path)
    path = out / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") > 20:
            break
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    process.kill()
    process.wait()
    done = dimr_command(*line)
    assert f"log      tensorboard: tensorboard --logdir {out}/tensorboard" in done.stderr
    assert "is told of steps" not in done.stderr  # it had all up to the checkpoint
    check_events(out, 60)
    assert len(list((out / "tensorboard").glob("events*"))) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_telling_alone(tmp_path):
    """TensorBoard's writer, a thread, dies of it; what it lacks is told in the next life."""
    pytest.importorskip("tensorboard")
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 601)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = []
    audience = journal.Audience(loggers.sinks(["tensorboard"]), said.append)
    audience.begin(tmp_path, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for line in lines[:500]:
            if line["step"] == 200:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
            audience.line(line)
            if line["step"] % 10 == 0:
                audience.tell("flush")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len([line for line in said if "WARNING: tensorboard failed" in line]) == 1
    journal.Audience(loggers.sinks(["tensorboard"]), said.append).begin(tmp_path, 600)
    assert "which is told of steps" in said[-1]
    check_events(tmp_path, 600)
