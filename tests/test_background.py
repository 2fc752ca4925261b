"""Checkpoints are written while training goes on: from a copy, one at a time, reported when they
fail, and the last is waited for. What kills and full disks leave of them: test_resume.py."""

import threading

import pytest
import torch

import background
import journal
import recipes
import runfolder
import training

PATIENCE = 60  # seconds; to wait so long is to fail


def train(out, digits, steps=6, every=2, **options):
    return training.train(
        out,
        recipes.Source(digits, workers=0),
        variant="demo",
        recipe={"batch_size": 4, "steps": steps, "warmup": 0},
        network={"layers": (1, 1), "dims": (8, 8), "heads": 1},
        device="cpu",
        saving=training.Saving(every=every, keep=0, sample_every=0),
        quiet=True,
        **options,
    )


def saved(out):
    return [runfolder.step_of(checkpoint) for checkpoint in runfolder.checkpoints(out)]


def hashes(out):
    return [(c / "manifest.json").read_text() for c in runfolder.checkpoints(out)]


def test_training_goes_on_while_a_checkpoint_is_written(digits, tmp_path, monkeypatch):
    """The write of step 2 ends once step 4 is being trained: training that waited would wait for
    ever. What it holds is step 2 all the same."""
    train(tmp_path / "waiting", digits)
    gone_on = threading.Event()
    write = runfolder.save_checkpoint
    losses = training.losses

    def slow(run, step, *arguments):
        if step == 2:
            assert gone_on.wait(PATIENCE)
        return write(run, step, *arguments)

    def noted(state, *arguments):
        if state.step == 3:
            assert saved(tmp_path / "run") == []
            gone_on.set()
        return losses(state, *arguments)

    monkeypatch.setattr(runfolder, "save_checkpoint", slow)
    monkeypatch.setattr(training, "losses", noted)
    train(tmp_path / "run", digits)
    assert saved(tmp_path / "run") == [2, 4, 6]
    assert hashes(tmp_path / "run") == hashes(tmp_path / "waiting")


def test_a_save_waits_for_the_one_before_it(digits, tmp_path, monkeypatch):
    write = runfolder.save_checkpoint
    at_once = []
    most = []

    def noted(*arguments):
        at_once.append(1)
        most.append(len(at_once))
        write(*arguments)
        at_once.pop()

    monkeypatch.setattr(runfolder, "save_checkpoint", noted)
    train(tmp_path / "run", digits, steps=8, every=1)
    assert most == [1] * 8
    assert saved(tmp_path / "run") == list(range(1, 9))


def test_a_save_that_fails_is_reported_and_the_next_tried(digits, tmp_path, monkeypatch, capsys):
    write = runfolder.save_checkpoint

    def failing(run, step, *arguments):
        if step == 2:
            raise OSError(28, "No space left on device")
        return write(run, step, *arguments)

    monkeypatch.setattr(runfolder, "save_checkpoint", failing)
    said = []
    monkeypatch.setattr(journal, "speaker", lambda quiet: said.append)
    train(tmp_path / "run", digits)
    words = "checkpoint at step 2 NOT saved (No space left on device); training goes on"
    assert [line for line in said if "NOT saved" in line] == [f"WARNING: {words}"]
    assert saved(tmp_path / "run") == [4, 6]


def test_the_last_save_that_fails_ends_the_run_and_keeps_what_was_being_written(
    digits, tmp_path, monkeypatch
):
    write = runfolder.save_checkpoint

    def failing(run, step, *arguments):
        if step == 6:
            raise OSError(28, "No space left on device")
        return write(run, step, *arguments)

    monkeypatch.setattr(runfolder, "save_checkpoint", failing)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path / "run", digits)
    assert saved(tmp_path / "run") == [2, 4]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_ends_otherwise_first_writes_what_it_was_writing(
    digits, tmp_path, monkeypatch, error
):
    """Its folder is not free before, and nothing half-written is left."""
    ended = threading.Event()
    write = runfolder.save_checkpoint
    losses = training.losses

    def slow(*arguments):
        assert ended.wait(PATIENCE)
        return write(*arguments)

    def failing(state, *arguments):
        if state.step == 3:
            threading.Timer(0.2, ended.set).start()
            raise error
        return losses(state, *arguments)

    monkeypatch.setattr(runfolder, "save_checkpoint", slow)
    monkeypatch.setattr(training, "losses", failing)
    with pytest.raises(error):
        train(tmp_path / "run", digits)
    assert saved(tmp_path / "run") == [2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_what_is_not_foreseen_is_raised_where_the_work_is_waited_for():
    def work():
        return 1 / 0

    with pytest.raises(ZeroDivisionError), background.Background() as working:
        working.start(work)
    working = background.Background()
    working.start(work)
    with pytest.raises(ZeroDivisionError):
        working.start(print)
    working.wait()  # raised once


def test_copies_hold_what_was_there_in_the_same_place_each_time():
    tensor = torch.arange(6.0).reshape(2, 3).t()
    copies = background.Copies()
    first = copies.of({"weights": ({"a": tensor}, {"step": "1"}), "empty": ({}, None)})
    tensor.add_(1)
    assert first["empty"] == ({}, None)
    assert first["weights"][1] == {"step": "1"}
    held = first["weights"][0]["a"]
    assert torch.equal(held, tensor - 1)
    assert held.is_contiguous()
    again = copies.of({"weights": ({"a": tensor}, None)})["weights"][0]["a"]
    assert again is held
    assert torch.equal(again, tensor)
    other = copies.of({"weights": ({"a": tensor.double()}, None)})["weights"][0]["a"]
    assert other.dtype == torch.float64


def test_without_room_for_a_copy_training_waits(digits, tmp_path, monkeypatch):
    """And nothing of the copy stays behind."""

    def full(*arguments, **keywords):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    said = []
    monkeypatch.setattr(journal, "speaker", lambda quiet: said.append)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(MemoryError, match="can't allocate"):
            background.Copies().of({"weights": ({"a": torch.ones(2)}, None)})
    monkeypatch.setattr(background, "room_for", lambda _: exec("raise MemoryError"))
    train(tmp_path / "run", digits)
    assert saved(tmp_path / "run") == [2, 4, 6]
    assert sum("no memory for a copy of step" in line for line in said) == 2
