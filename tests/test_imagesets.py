"""Writing sets of images: what an interrupted `.npz` goes on from, and what it refuses."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import imagenet_names
import imagesets
import parallel
import storage
from storage import UserError


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


RECORD = {"weights": "0a", "source": "run", "cfg": 1.5, "interval": (1, 2), "dimr": "0.2.0"}


def drawing(count=10, **changes):
    """Images of 10 classes in batches of 4."""
    classes = [i % 10 for i in range(count)]
    plain = imagesets.Drawing(classes, range(count), (), 8, 4, RECORD, "balanced")
    return dataclasses.replace(plain, **changes)


def batch(wanted, k):
    """Indices and images of batch k: image i is all i + 1, in grey."""
    indices = list(range(4 * k, min(4 * k + 4, len(wanted))))
    images = np.full((len(indices), 8, 8, 1), 1, np.uint8)
    images += np.asarray(indices, np.uint8)[:, None, None, None]
    return indices, images


def write(out, wanted, stop_after=None):
    """Do what `sample` does; returns the batches that had to be drawn."""
    with imagesets.writer(out, wanted, True) as target:
        missing, mine = parallel.divide(wanted.batches, target.done)
        for k in mine[:stop_after]:
            target.add(*batch(wanted, k))
        if stop_after is not None:
            raise Killed
        target.finish()
    return missing


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def numbers(path):
    """The value of each image of an .npz, none of which has two."""
    with np.load(path) as arrays:
        images = arrays["arr_0"]
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def whole(tmp_path):
    """A set that nothing interrupted: its files."""
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole" / "set.npz", drawing())
    return contents(tmp_path / "whole")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "cut").mkdir()
    return tmp_path / "cut" / "set.npz"


# Interrupted


def test_a_set_is_three_files_and_says_how_it_was_made(whole, tmp_path):
    assert whole.keys() == {"set.npz", "set.json", "set.png"}
    assert numbers(tmp_path / "whole" / "set.npz") == list(range(1, 11))
    facts = json.loads(whole["set.json"])
    assert facts["balanced"]
    assert facts["n"] == 10
    assert facts["source"] == "run"
    assert facts["note"] == imagesets.GENERATED
    assert facts["plan"]["dimr"] == "0.2.0"
    assert facts["plan"]["interval"] == [1, 2]
    assert "source" not in facts["plan"]


@pytest.mark.parametrize("drawn", [0, 1, 2, 3])
def test_a_set_cut_between_batches_goes_on_with_those_that_are_missing(out, whole, drawn):
    with pytest.raises(Killed):
        write(out, drawing(), stop_after=drawn)
    assert not out.exists()
    assert write(out, drawing()) == list(range(drawn, 3))
    assert contents(out.parent) == whole


def stop_at(monkeypatch, where):
    """Have `finish` killed before one of its steps; the last one is half done by then."""

    def kill(*arguments, **named):
        raise Killed

    def remove_half(folder):
        next(folder.glob("*.npy")).unlink()
        raise Killed

    if where == "sidecar":
        monkeypatch.setattr(imagesets, "write_json", kill)
    elif where == "npz":
        monkeypatch.setattr(imagesets.NpzWriter, "_write_arrays", kill)
    elif where == "picture":
        monkeypatch.setattr(imagesets, "save_grid", kill)
    elif where == "end":
        monkeypatch.setattr(imagesets.Path, "unlink", kill)
    elif where == "removal":
        monkeypatch.setattr(imagesets.shutil, "rmtree", remove_half)


@pytest.mark.parametrize("where", ["sidecar", "npz", "picture", "end", "removal"])
def test_a_set_cut_while_it_is_finished_draws_nothing_again(out, whole, monkeypatch, where):
    with pytest.raises(Killed):
        write(out, drawing(), stop_after=3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, where)
        write(out, drawing())
    assert out.with_name("set.npz.partial").exists()
    assert write(out, drawing()) == []
    assert contents(out.parent) == whole
    assert write(out, drawing()) == []


def test_what_a_kill_left_half_written_goes_and_that_of_others_stays(out):
    with pytest.raises(Killed):
        write(out, drawing(), stop_after=1)
    for name in (".set.npz.17.tmp", ".set.json.17.tmp", ".set.png.17.tmp", ".set.b.npz.17.tmp"):
        (out.parent / name).touch()
    write(out, drawing())
    assert contents(out.parent).keys() == {"set.npz", "set.json", "set.png", ".set.b.npz.17.tmp"}


def test_marks_of_images_that_are_gone_are_not_believed(out, whole):
    """A folder whose removal was cut, and whose .npz the user has deleted."""
    with pytest.raises(Killed):
        write(out, drawing(), stop_after=3)
    work = out.with_name("set.npz.partial")
    (work / "plan.json").unlink()
    (work / "images.npy").unlink()
    assert write(out, drawing()) == [0, 1, 2]
    assert contents(out.parent) == whole


def test_a_set_that_lacks_batches_is_not_written(out):
    """As when another process looks at a folder of its own."""
    with imagesets.writer(out, drawing(), True) as target:
        target.add(*batch(drawing(), 0))
        with pytest.raises(UserError, match=r"lacks batch 1 \(2 in all\).*must share"):
            target.finish()
    assert not out.exists()


def test_no_room_is_said_before_anything_is_drawn(out, monkeypatch):
    usage = shutil.disk_usage(out.parent)._replace(free=2 * 10 * 8 * 8 * 3 - 1)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="takes 3,840 bytes and .* has 3,839 bytes free"):
        write(out, drawing())
    usage = usage._replace(free=usage.free + 1)
    assert write(out, drawing()) == [0, 1, 2]


# Another set


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"record": {**RECORD, "cfg": 2.0}},
        {"record": {**RECORD, "more": 1}},
        {"batch_size": 5},
        {"seeds": range(1, 11)},
        {"classes": [0] * 10},
    ],
    ids=str,
)
def test_a_set_drawn_otherwise_is_refused(out, finished, change):
    if finished:
        write(out, drawing())
    else:
        with pytest.raises(Killed):
            write(out, drawing(), stop_after=3)
    before = contents(out.parent) if finished else None
    with pytest.raises(UserError, match="drawn otherwise; delete it or choose another --out"):
        write(out, drawing(**change))
    assert not finished or contents(out.parent) == before


@pytest.mark.parametrize("facts", [None, {}, [], {"plan": 3}], ids=str)
def test_an_npz_that_does_not_say_how_it_was_made_is_refused(out, facts):
    write(out, drawing())
    out.with_suffix(".json").unlink()
    if facts is not None:
        out.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="drawn otherwise|plan is 3"):
        write(out, drawing())


def test_another_npz_is_not_replaced_by_what_is_unfinished(out):
    with pytest.raises(Killed):
        write(out, drawing(), stop_after=2)
    out.write_bytes(b"another")
    with pytest.raises(UserError, match="set.npz exists and was drawn otherwise"):
        write(out, drawing())
    assert out.read_bytes() == b"another"


@pytest.mark.parametrize("other", [2**63 + 1, 2**64 - 1])
def test_seeds_beyond_int64_are_told_apart(out, other):
    write(out, drawing(2, seeds=[0, 2**63]))
    assert write(out, drawing(2, seeds=[0, 2**63])) == []
    with pytest.raises(UserError, match="drawn otherwise"):
        write(out, drawing(2, seeds=[0, other]))


@pytest.mark.slow
def test_a_set_that_another_process_is_at_work_on_names_it(out):
    with pytest.raises(Killed):
        write(out, drawing(), stop_after=1)
    work = out.with_name("set.npz.partial")
    code = f"""if True:
        import storage
        with storage.locked({str(work)!r}):
            print("held", flush=True)
            input()"""
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"set.npz.partial is in use by process {owner.pid} on"):
        write(out, drawing())
    owner.communicate("\n")
    assert write(out, drawing()) == [1, 2]


# What dimr 0.1 left


def old_plan(wanted):
    """As 0.1 noted it."""
    digest = hashlib.sha256(np.asarray([list(wanted.classes), list(wanted.seeds)]).tobytes())
    return {**wanted.plan, "drawn": digest.hexdigest(), "dimr": "0.1.0"}


def unfinished(out, lines):
    """A folder that 0.1 left, whose images are drawn but for the last batch, with these lines."""
    with pytest.raises(Killed):
        write(out, drawing(), stop_after=2)
    work = out.with_name("set.npz.partial")
    for mark in work.glob("*.done"):
        mark.unlink()
    storage.write_json(work / "plan.json", old_plan(drawing()))
    (work / "done-0").write_text(lines)
    return work


@pytest.mark.parametrize(
    "lines, missing",
    [
        ("0\n1\n", [2]),
        ("1\n0", [0, 2]),
        ("01\n", [0, 2]),
        ("0\n\n-1\n1x\n", [1, 2]),
        ("", [0, 1, 2]),
    ],
)
def test_the_complete_lines_of_its_unfinished_sets_count(out, whole, lines, missing):
    unfinished(out, lines)
    assert write(out, drawing()) == missing
    assert contents(out.parent) == whole


@pytest.mark.parametrize("written", [["set.npz"], ["set.npz", "set.json"]], ids=str)
def test_its_sets_cut_while_they_were_finished_are_finished(out, whole, written):
    work = unfinished(out, "0\n1\n")
    images = np.load(work / "images.npy", mmap_mode="r+")
    images[8:] = batch(drawing(), 2)[1]
    images.flush()
    (work / "done-1").write_text("2\n")
    for name in written:
        (out.parent / name).write_bytes(whole[name])
    if "set.json" in written:
        facts = json.loads(whole["set.json"])
        storage.write_json(out.with_suffix(".json"), {**facts, "plan": old_plan(drawing())})
    assert write(out, drawing()) == []
    assert contents(out.parent) == whole


def test_its_finished_sets_are_the_sets_asked_for(out):
    write(out, drawing())
    facts = json.loads(out.with_suffix(".json").read_text())
    storage.write_json(out.with_suffix(".json"), {**facts, "plan": old_plan(drawing())})
    before = contents(out.parent)
    assert write(out, drawing()) == []
    assert contents(out.parent) == before
    with pytest.raises(UserError, match="drawn otherwise"):
        write(out, drawing(seeds=range(1, 11)))


def test_its_digest_is_not_taken_where_it_could_not_tell_seeds_apart(out):
    wanted = drawing(2, seeds=[0, 2**63])
    write(out, wanted)
    facts = json.loads(out.with_suffix(".json").read_text())
    storage.write_json(out.with_suffix(".json"), {**facts, "plan": old_plan(wanted)})
    with pytest.raises(UserError, match="drawn otherwise"):
        write(out, wanted)


# images of their own


NAMES = ("cat/dog", "flags", "Food & Drink: 100%", "sea", "über", "..", "a" * 200, "8", "x", "")


def write_pngs(out, wanted):
    with imagesets.writer(out, wanted, False) as target:
        for k in range(wanted.batches):
            target.add(*batch(wanted, k))
        target.finish()
        return target.result


def test_names_of_files_tell_the_class_in_words_and_are_read_again(tmp_path):
    write_pngs(tmp_path, drawing(names=NAMES))
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != "grid.png")
    assert names == [
        "class0000-cat%2Fdog-seed000000.png",
        "class0001-flags-seed000001.png",
        "class0002-Food & Drink%3A 100%25-seed000002.png",
        "class0003-sea-seed000003.png",
        "class0004-über-seed000004.png",
        "class0005-..-seed000005.png",
        f"class0006-{'a' * imagesets.LONGEST}-seed000006.png",
        "class0007-8-seed000007.png",
        "class0008-x-seed000008.png",
        "class0009-seed000009.png",
    ]
    found = imagesets.open_set(tmp_path)
    assert found.labels.tolist() == list(range(10))
    assert found.record["cfg"] == 1.5


@pytest.mark.parametrize("names", [(), [identifier for identifier, _ in imagenet_names.CLASSES]])
def test_imagenets_classes_are_told_in_words(tmp_path, names):
    record = {**RECORD, "num_classes": 1000}
    wanted = dataclasses.replace(drawing(1, names=names, record=record), classes=[388])
    write_pngs(tmp_path, wanted)
    assert (tmp_path / "class0388-giant panda-seed000000.png").exists()


def test_images_drawn_otherwise_are_left_alone(tmp_path):
    write_pngs(tmp_path, drawing(names=NAMES))
    before = contents(tmp_path)
    for change in ({"cfg": 3.0}, {"weights": "0b"}, {"interval": (1, 3)}):
        other = drawing(names=NAMES, record={**RECORD, **change})
        with pytest.raises(UserError, match="holds images drawn otherwise .*another --out"):
            write_pngs(tmp_path, other)
    assert contents(tmp_path) == before
    more = dataclasses.replace(drawing(names=NAMES), seeds=range(10, 20))
    write_pngs(tmp_path, dataclasses.replace(more, record={**RECORD, "dimr": "9", "source": "b"}))
    assert len(contents(tmp_path)) == 21


def test_an_image_that_has_its_name_of_0_1_keeps_it(tmp_path):
    write_pngs(tmp_path, drawing())
    before = set(contents(tmp_path))
    assert "class0001-seed000001.png" in before
    write_pngs(tmp_path, drawing(names=NAMES))
    assert set(contents(tmp_path)) == before
