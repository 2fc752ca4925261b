"""Shard sets: what a reader gets, what a writer makes, and what is refused."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import DATA
from safetensors.numpy import load_file, save_file

import dataset
import shards
from storage import UserError, read_json


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_set(root, kind, arrays, labels, size):
    """A shard set of two classes made by the safetensors library and json alone."""
    root.mkdir()
    rows = []
    for k, (data, numbers) in enumerate(zip(arrays, labels, strict=True)):
        save_file({"data": data, "labels": np.asarray(numbers)}, root / f"{k}.safetensors")
        rows.append({"file": f"{k}.safetensors", "count": len(data), "sha256": ""})
    index = {
        "format": 1,
        "kind": kind,
        "size": size,
        "channels": 4 if kind == "latents" else 3,
        "classes": ["c0", "c1"],
        "shards": rows,
        "options": {"res": 8 * size if kind == "latents" else size},
    }
    (root / "index.json").write_text(json.dumps(index))


@pytest.fixture
def pixels(tmp_path):
    """(a set of 4 and 3 images of 5 × 5, those images): 75 bytes an item, so nothing is aligned."""
    arrays = [noise(count * 5, 5).reshape(count, 5, 5, 3) for count in (4, 3)]
    write_set(tmp_path / "pixels", "pixels", arrays, [[0, 1, 0, 1], [1, 1, 0]], size=5)
    return tmp_path / "pixels", np.concatenate(arrays)


@pytest.fixture
def latents(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 2, 2, 4, 8, 8)).astype(np.float16) for n in (3, 2)]
    write_set(tmp_path / "latents", "latents", arrays, [[0, 1, 0], [1, 1]], size=8)
    return tmp_path / "latents", np.concatenate(arrays)


# reading


def test_pixel_shards_give_items_and_mirrored_items(pixels):
    root, expected = pixels
    data = dataset.open_data(root)
    assert (data.kind, data.size, data.channels) == ("pixels", 5, 3)
    assert data.classes == ["c0", "c1"]
    assert len(data) == 7
    assert data.labels.tolist() == [0, 1, 0, 1, 1, 1, 0]
    assert data.labels.dtype == np.int64
    indices = np.array([6, 0, 3, 4, 0])
    flips = np.array([0, 1, 0, 1, 0], bool)
    ((images, labels, bad),) = dataset.loader(data, [(indices, flips)])
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1, 0]
    assert bad == []
    found = images.permute(0, 2, 3, 1).numpy()
    for row, (index, flip) in enumerate(zip(indices, flips, strict=True)):
        want = expected[index]
        if flip:
            want = want[:, ::-1]
        assert (found[row] == want).all()


def test_every_item_of_every_shard_is_read(pixels):
    root, expected = pixels
    images, _ = shards.Shards(root).batch(range(7), [False] * 7)
    assert (images.permute(0, 2, 3, 1).numpy() == expected).all()


def test_latent_shards_give_the_latents_of_image_or_flip(latents):
    root, expected = latents
    data = dataset.open_data(root)
    assert (data.kind, data.size, data.channels) == ("latents", 8, 4)
    found, labels = data.batch(np.array([4, 0, 1, 3]), np.array([True, False, True, False]))
    assert labels.tolist() == [1, 0, 1, 1]
    assert found.dtype == torch.float16
    assert found.shape == (4, 2, 4, 8, 8)
    want = np.stack([expected[4, 1], expected[0, 0], expected[1, 1], expected[3, 0]])
    assert (found.numpy() == want).all()


def test_a_set_is_of_its_own_size_and_channels(latents, pixels):
    root = latents[0]
    for size in (None, 64, 8):  # of the images, and of the grid
        assert dataset.open_data(root, size=size).size == 8
    with pytest.raises(UserError, match="holds latents of size 8 with 4 channels, not size 32"):
        dataset.open_data(root, size=32)
    assert dataset.open_data(pixels[0], 5, 3).channels == 3
    with pytest.raises(UserError, match="with 3 channels, not size None, channels 1"):
        dataset.open_data(pixels[0], channels=1)


def test_the_fingerprint_is_the_indexs_hash(pixels):
    raw = (pixels[0] / "index.json").read_bytes()
    assert shards.Shards(pixels[0]).fingerprint == hashlib.sha256(raw).hexdigest()


def test_shards_reach_worker_processes_as_a_path(pixels):
    data = shards.Shards(pixels[0])
    expected, _ = data.batch([5], [True])
    assert len(pickle.dumps(data)) < 500
    again, _ = pickle.loads(pickle.dumps(data)).batch([5], [True])
    assert torch.equal(again, expected)
    ((images, _, _),) = dataset.loader(data, [(np.array([5]), np.array([True]))], 1)
    assert torch.equal(images, expected)


# what is refused


def header_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path, header, rest):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def change_header(change):
    """What damages a shard by `change(header)`, its data left as they are."""

    def damage(path):
        header, rest = header_of(path)
        change(header)
        write_header(path, header, rest)

    return damage


def change_bytes(change):
    """What replaces a shard's bytes by `change(bytes)`."""

    def damage(path):
        path.write_bytes(change(path.read_bytes()))

    return damage


def relabel(label):
    """What gives the first item this label."""

    def damage(path):
        header, rest = header_of(path)
        place = header["labels"]["data_offsets"][0]
        raw = np.int64(label).tobytes()
        write_header(path, header, rest[:place] + raw + rest[place + len(raw) :])

    return damage


def fewer_labels(path):
    held = load_file(path)
    save_file({"data": held["data"], "labels": held["labels"][:-1]}, path)


def short_labels(path):
    held = load_file(path)
    save_file({"data": held["data"], "labels": held["labels"].astype(np.float16)}, path)


DAMAGE = {
    "missing": (os.unlink, "is missing"),
    "cut": (change_bytes(lambda raw: raw[:-1]), "its offsets do not fit"),
    "longer": (change_bytes(lambda raw: raw + b"\0"), "its offsets do not fit"),
    "empty": (change_bytes(lambda raw: b""), "is not a whole shard"),
    "endless header": (change_bytes(lambda raw: b"\xff" * 8 + raw[8:]), "claims a header of"),
    "not json": (change_bytes(lambda raw: raw[:8] + b"x" + raw[9:]), "is not a whole shard"),
    "no data": (change_header(lambda header: header.pop("data")), "is not a whole shard"),
    "fewer items": (
        change_header(lambda header: header["data"].update(shape=[3, 5, 5, 3])),
        "offsets of data do not fit",
    ),
    "negative offsets": (
        change_header(lambda header: header["data"].update(data_offsets=[-300, 0])),
        "data.data_offsets[0] is -300",
    ),
    "overlapping": (
        change_header(lambda header: header["data"].update(data_offsets=[0, 300])),
        "its offsets do not fit",
    ),
    "other type": (
        change_header(lambda header: header["data"].update(dtype="F64")),
        "is not a whole shard",
    ),
    "type of latents": (
        change_header(lambda header: header["data"].update(dtype="F16", shape=[4, 5, 5, 3, 1])),
        "offsets of data do not fit",
    ),
    "other shape": (
        change_header(lambda header: header["data"].update(shape=[4, 5, 3, 5])),
        "index.json says otherwise",
    ),
    "fewer labels": (fewer_labels, "has 3 int64 labels for 4 items"),
    "labels of another type": (short_labels, "has 4 float16 labels for 4 items"),
    "the first label of no class": (relabel(2), "labels beyond its 2 classes"),
    "a negative label": (relabel(-1), "labels beyond its 2 classes"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_named(pixels, how):
    path = pixels[0] / "0.safetensors"
    damage, reason = DAMAGE[how]
    damage(path)
    with pytest.raises(UserError) as error:
        dataset.open_data(pixels[0])
    message = str(error.value)
    assert str(path) in message
    assert reason in message
    assert "dimr encode" in message
    assert "\n" not in message


def test_the_last_class_is_no_damage(pixels):
    relabel(1)(pixels[0] / "0.safetensors")
    assert shards.Shards(pixels[0]).labels.tolist() == [1, 1, 0, 1, 1, 1, 0]


def test_data_of_another_kind_are_damage(pixels):
    path = pixels[0] / "0.safetensors"
    save_file({"data": np.zeros((4, 5, 5, 3), np.float16), "labels": np.zeros(4, int)}, path)
    with pytest.raises(UserError, match=r"holds float16 \(4, 5, 5, 3\)"):
        dataset.open_data(pixels[0])


def test_an_unfinished_or_foreign_set_is_refused(pixels):
    root = pixels[0]
    index = json.loads((root / "index.json").read_text())
    for change in ({"format": 2}, {"kind": "sounds"}):
        (root / "index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match="not of shard format 1"):
            dataset.open_data(root)
    (root / "index.json").write_text("[]")
    with pytest.raises(UserError, match="is a list of 0"):
        dataset.open_data(root)
    (root / "index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        dataset.open_data(root)
    (root / "index.json").unlink()
    with pytest.raises(UserError, match="index.json does not exist"):
        shards.read_index(root)
    (root / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished.*again"):
        dataset.open_data(root)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"shards": [0]}, r"shards\[0\] is 0, which is not a table"),
        ({"size": "5"}, 'size is "5", which is not a whole number'),
        ({"classes": None}, "classes is null, which is not a list"),
        ({"items": 8}, "names 8 items and its shards have 7"),
        ({"counts": [1, 1]}, "counts by class don't come to 7"),
        ({"size": 10**9}, "not a whole number from 1 to 65536"),
    ],
    ids=str,
)
def test_a_damaged_index_is_named_with_the_place(pixels, change, reason):
    root = pixels[0]
    index = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(UserError, match=reason):
        dataset.open_data(root)


def test_an_index_that_names_a_shard_twice_is_damaged(pixels):
    root = pixels[0]
    index = json.loads((root / "index.json").read_text())
    index["shards"][1]["file"] = index["shards"][0]["file"]
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="two rows name the same shard"):
        dataset.open_data(root)


def test_verifying_reads_every_shard(pixels):
    root = pixels[0]
    index = json.loads((root / "index.json").read_text())
    for row in index["shards"]:
        row["sha256"] = hashlib.sha256((root / row["file"]).read_bytes()).hexdigest()
    (root / "index.json").write_text(json.dumps(index))
    data = dataset.open_data(root)
    data.verify(quiet=True)
    path = root / index["shards"][1]["file"]
    change_bytes(lambda raw: raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:])(path)
    with pytest.raises(UserError, match=f"{path.name} does not have the recorded hash.*encode"):
        dataset.open_data(root).verify(quiet=True)


def test_a_finished_set_may_have_its_plan_left(pixels):
    """By a process killed between the two."""
    root, _ = pixels
    (root / "plan.json").write_bytes((root / "index.json").read_bytes())
    assert len(dataset.open_data(root)) == 7


# writing

PLAN = {
    "format": 1,
    "kind": "pixels",
    "size": 5,
    "channels": 3,
    "classes": ["a", "b", "c"],
    "shard_size": 8,
    "options": {"res": 5},
    "source": {"items": 9, "fingerprint": "0" * 64},
}


def batches(*labels):
    """Pairs of data and labels, one for each list of labels."""
    for seed, numbers in enumerate(labels):
        yield noise(len(numbers) * 5, 5, seed=seed).reshape(-1, 5, 5, 3), np.asarray(numbers)


def test_what_is_written_is_read_by_safetensors_and_by_us(tmp_path):
    path = shards.shard_path(tmp_path, 0)
    row = shards.write_shard(path, PLAN, batches([0, 2], [2]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert row == {"file": "shard-00000.safetensors", "count": 3, "sha256": digest}
    held = load_file(path)
    data = np.concatenate([data for data, _ in batches([0, 2], [2])])
    assert (held["data"] == data).all()
    assert held["labels"].tolist() == [0, 2, 2]
    mapped, labels = shards.map_shard(path)
    assert (mapped == data).all()
    assert labels.tolist() == [0, 2, 2]


def test_a_set_written_by_hand_is_a_data_set(tmp_path):
    rows = [
        shards.write_shard(shards.shard_path(tmp_path, 0), PLAN, batches([0, 2], [2])),
        shards.write_shard(shards.shard_path(tmp_path, 1), PLAN, batches()),
        shards.write_shard(shards.shard_path(tmp_path, 2), PLAN, batches([1])),
    ]
    index = shards.write_index(tmp_path, PLAN, rows)
    assert index == read_json(tmp_path / "index.json")
    assert index == {**PLAN, "items": 4, "counts": [1, 1, 2], "skipped": [], "shards": rows}
    data = dataset.open_data(tmp_path)
    assert data.labels.tolist() == [0, 2, 2, 1]
    images, labels = data.batch([3, 2], [False, False])
    expected = [next(batches([1]))[0][0], list(batches([0, 2], [2]))[1][0][0]]
    assert (images.permute(0, 2, 3, 1).numpy() == np.stack(expected)).all()
    assert labels.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_what_version_0_1_0_wrote_is_written_again_byte_for_byte(tmp_path, kind):
    frozen = DATA / "v0.1.0" / kind
    index = read_json(frozen / "index.json")
    plan = dict(index)
    for key in ("items", "counts", "skipped", "shards"):
        del plan[key]
    rows = []
    for number, row in enumerate(index["shards"]):
        data, labels = shards.map_shard(frozen / row["file"])
        half = len(data) // 2
        halves = [(data[:half], labels[:half]), (data[half:], labels[half:])]
        path = shards.shard_path(tmp_path, number)
        rows.append(shards.write_shard(path, plan, halves))
        assert path.read_bytes() == (frozen / row["file"]).read_bytes()
    shards.write_index(tmp_path, plan, rows)
    assert (tmp_path / "index.json").read_bytes() == (frozen / "index.json").read_bytes()


def test_a_set_may_be_one_shard_of_one_grey_image(tmp_path):
    plan = {**PLAN, "channels": 1}
    image = noise(5, 5, 1)[None]
    row = shards.write_shard(shards.shard_path(tmp_path, 0), plan, [(image, [2])])
    shards.write_index(tmp_path, plan, [row])
    found, labels = dataset.open_data(tmp_path).batch([0], [False])
    assert (found.numpy()[0, 0] == image[0, ..., 0]).all()
    assert labels.tolist() == [2]


def test_latents_are_as_large_as_was_said(tmp_path):
    plan = {**PLAN, "kind": "latents", "size": 4, "channels": 4}
    data = np.random.default_rng(0).normal(size=(3, 2, 2, 4, 4, 4)).astype(np.float16)
    path = shards.shard_path(tmp_path, 0)
    shards.write_shard(path, plan, [(data, np.zeros(3, int))])
    assert path.stat().st_size == shards.HEADER + 3 * shards.item_bytes(plan)
    assert (load_file(path)["data"] == data).all()


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((2, 5, 5, 3), np.float32),
        np.zeros((2, 5, 3, 5), np.uint8),
        np.zeros((3, 5, 5, 3), np.uint8),
    ],
    ids=["type", "shape", "count"],
)
def test_data_that_do_not_belong_are_not_written(tmp_path, data):
    path = shards.shard_path(tmp_path, 0)
    with pytest.raises(ValueError, match="does not belong in pixels"):
        shards.write_shard(path, PLAN, [(data, np.zeros(2, int))])
    assert list(tmp_path.iterdir()) == []


def test_rows_come_from_the_index_and_from_unfinished_shards(tmp_path):
    skipped = [{"item": item, "image": f"{item}.jpg", "reason": "is empty"} for item in (7, 8)]
    first = shards.write_shard(shards.shard_path(tmp_path, 0), PLAN, batches([0]))
    second = shards.write_shard(shards.shard_path(tmp_path, 1), PLAN, batches([1]))
    rows = [{**first, "skipped": skipped[:1]}, {**second, "skipped": skipped[1:]}]
    assert shards.read_rows(tmp_path) == {}
    shards.write_row(tmp_path, 1, rows[1])
    assert shards.read_rows(tmp_path) == {1: rows[1]}
    shards.write_index(tmp_path, PLAN, rows)
    (tmp_path / "shard-00001.json").unlink()
    assert shards.read_rows(tmp_path) == dict(enumerate(rows))
    shards.write_row(tmp_path, 0, {**rows[0], "count": 5})  # written since
    assert shards.read_rows(tmp_path)[0]["count"] == 5


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"file": "x"}'])
def test_a_damaged_row_is_no_row_and_leaves_the_others(tmp_path, text):
    rows = {}
    for number in (0, 2):
        file = shards.shard_path("", number).name
        rows[number] = {"file": file, "count": 1, "sha256": "0" * 64, "skipped": []}
        shards.write_row(tmp_path, number, rows[number])
    for number in (1, 3):
        (tmp_path / f"shard-0000{number}.json").write_text(text)
    shards.write_row(tmp_path, 4, rows[0])  # which names another's shard
    assert shards.read_rows(tmp_path) == rows


def test_a_shard_is_whole_if_it_has_its_hash(tmp_path):
    path = shards.shard_path(tmp_path, 0)
    row = shards.write_shard(path, PLAN, batches([0]))
    assert shards.is_whole(tmp_path, row)
    change_bytes(lambda raw: raw[:-1] + b"\1")(path)
    assert not shards.is_whole(tmp_path, row)
    path.unlink()
    assert not shards.is_whole(tmp_path, row)
