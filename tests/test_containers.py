"""Images as people have them: what is at a path, the same bytes whatever holds them, and what is
refused."""

import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import dimr_command
from packing import MANY, add, make_tar, make_zip, png, refusal, tar_bytes

import containers
import dataset
import encoding
import evaluation
import imagesets
from storage import UserError, read_json

CLASSES = {  # by WordNet id, as ImageNet's: real photographs that packages come with
    "n01440764": ["china.jpg", "rocket.jpg"],
    "n01443537": ["flower.jpg", "coffee.png", "camera.png"],
    "n02123045": ["chelsea.png"],
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of one folder per class, with what a container has to leave out."""
    import skimage
    import sklearn.datasets

    places = [
        Path(sklearn.datasets.__file__).parent / "images",
        Path(skimage.__file__).parent / "data",
    ]
    root = tmp_path_factory.mktemp("photographs") / "train"
    for name, files in CLASSES.items():
        (root / name).mkdir(parents=True)
        for file in files:
            place = next(place for place in places if (place / file).is_file())
            shutil.copy(place / file, root / name / file)
        (root / name / "._hidden.jpg").write_bytes(b"AppleDouble")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def files_of(root):
    """Every file below `root`, in an order that is nobody's."""
    return sorted(
        (path for path in root.rglob("*") if path.is_file()),
        key=lambda p: zlib.crc32(p.name.encode()),
    )


def images_of(root):
    return [path for path in files_of(root) if not path.name.startswith(".")]


def label_of(path):
    return sorted(CLASSES).index(path.parent.name)


# the same images in everything


def by_class(photographs, prefix=""):
    """Members as they come: "prefix/class/name" → bytes."""
    members = {}
    for path in files_of(photographs):
        members[f"{prefix}{path.parent.name}/{path.name}"] = path.read_bytes()
    return members


def folder(photographs, tmp):
    return photographs


def zipped(photographs, tmp):
    return make_zip(tmp / "a.zip", by_class(photographs))


def deflated(photographs, tmp):
    members = {"__MACOSX/n01440764/._china.jpg": b"x", "photos/": b"", "photos/notes.txt": b"x"}
    members |= by_class(photographs, "photos/")
    return make_zip(tmp / "a.zip", members, zipfile.ZIP_DEFLATED)


def tar(photographs, tmp):
    return make_tar(tmp / "a.tar", by_class(photographs), format=tarfile.GNU_FORMAT)


def tar_of_a_folder(photographs, tmp):
    """As tar -cf a.tar . writes it, with the folders themselves."""
    with tarfile.open(tmp / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(photographs, "./train")
    return tmp / "a.tar"


def tar_with_long_names(photographs, tmp, kind=tarfile.GNU_FORMAT):
    return make_tar(tmp / "a.tar", by_class(photographs, "é" + "x" * 200 + "/"), format=kind)


def tar_with_long_pax_names(photographs, tmp):
    return tar_with_long_names(photographs, tmp, tarfile.PAX_FORMAT)


def class_tars(photographs):
    for name in sorted(CLASSES, reverse=True):
        inner = {path.name: path.read_bytes() for path in files_of(photographs / name)}
        yield f"{name}.tar", tar_bytes(inner)


def tar_of_tars(photographs, tmp):
    return make_tar(tmp / "ILSVRC2012_img_train.tar", class_tars(photographs))


def folder_of_class_tars(photographs, tmp):
    (tmp / "tars").mkdir()
    for name, data in class_tars(photographs):
        (tmp / "tars" / name).write_bytes(data)
    return tmp / "tars"


def kaggles_zip(photographs, tmp):
    members = {"ILSVRC/Data/CLS-LOC/val/x.JPEG": b"x", "LOC_synset_mapping.txt": b"x"}
    members |= by_class(photographs, "ILSVRC/Data/CLS-LOC/train/")
    return make_zip(tmp / "imagenet.zip", members)


def kaggles_folder(photographs, tmp):
    shutil.copytree(photographs, tmp / "ILSVRC/Data/CLS-LOC/train")
    (tmp / "ILSVRC/Data/CLS-LOC/val").mkdir()
    return tmp / "ILSVRC"


def edm2s(photographs):
    """EDM2's names keep the images' order within their class."""
    members = {}
    labels = []
    for number, path in enumerate(sorted(images_of(photographs))):
        name = f"00000/img{number:08}{path.suffix}"
        members[name] = path.read_bytes()
        labels.append([name, label_of(path)])
    return {"dataset.json": json.dumps({"labels": labels[::-1]}), **members}


def edm2s_zip(photographs, tmp):
    return make_zip(tmp / "edm2.zip", edm2s(photographs))


def edm2s_folder(photographs, tmp):
    for name, data in edm2s(photographs).items():
        path = tmp / "edm2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return tmp / "edm2"


def webdataset(photographs, tmp, told):
    """Two tars, whose members `told(key, label)` say the label."""
    (tmp / "wds").mkdir()
    for number in range(2):
        members = {}
        for path in images_of(photographs)[number::2]:
            key = f"{path.parent.name}/{path.stem}"
            members[f"{key}{path.suffix}"] = path.read_bytes()
            members[f"{key}.txt"] = b"a caption"
            members |= told(key, label_of(path))
        make_tar(tmp / "wds" / f"shard-{number:06}.tar", members)
    return tmp / "wds"


def webdataset_cls(photographs, tmp):
    return webdataset(photographs, tmp, lambda key, label: {f"{key}.cls": f"{label}\n".encode()})


def webdataset_json(photographs, tmp):
    place = webdataset(
        photographs,
        tmp,
        lambda key, label: {f"{key}.json": json.dumps({"cls": label, "url": "…"}).encode()},
    )
    return place / "shard-{000000..000001}.tar"


def webdataset_both(photographs, tmp):
    place = webdataset(
        photographs,
        tmp,
        lambda key, label: {f"{key}.json": b'{"text": "x"}', f"{key}.cls": f"{label}".encode()},
    )
    return place / "shard-*.tar"


NAMED = {  # what says its classes by name → how it is called
    folder: "a folder of images: 3 classes, 6 images",
    zipped: "a zip: 3 classes, 6 images",
    deflated: "a zip: 3 classes, 6 images; 1 other member left out",
    tar: "a tar: 3 classes, 6 images",
    tar_of_a_folder: "a tar: 3 classes, 6 images",
    tar_with_long_names: "a tar: 3 classes, 6 images",
    tar_with_long_pax_names: "a tar: 3 classes, 6 images",
    tar_of_tars: "ImageNet's official tar: 3 classes, 6 images",
    folder_of_class_tars: "ImageNet's tars, one per class: 3 classes, 6 images",
    kaggles_zip: "ImageNet in Kaggle's layout: 3 classes, 6 images; 2 other members left out",
    kaggles_folder: "ImageNet in Kaggle's folders: 3 classes, 6 images",
}
NUMBERED = {
    edm2s_zip: "EDM2's zip of images: 3 classes, 6 images",
    edm2s_folder: "EDM2's folder of images: 3 classes, 6 images",
    webdataset_cls: "WebDataset's 2 tars: 3 classes, 6 images; 6 other members left out",
    webdataset_json: "WebDataset's 2 tars: 3 classes, 6 images; 6 other members left out",
    webdataset_both: "WebDataset's 2 tars: 3 classes, 6 images; 6 other members left out",
}


def encoded(source, out, **options):
    encoding.encode(
        source, out, 32, pixels=True, shard_size=4, batch_size=2, workers=0, quiet=True, **options
    )
    return {path.name: path.read_bytes() for path in out.glob("shard-*.safetensors")}


@pytest.fixture(scope="module")
def expected(photographs, tmp_path_factory):
    """The shards of the folder, and its index."""
    out = tmp_path_factory.mktemp("expected") / "out"
    return encoded(photographs, out), read_json(out / "index.json")


@pytest.mark.parametrize("container", [*NAMED, *NUMBERED], ids=lambda f: f.__name__)
def test_the_same_images_give_the_same_shards_whatever_holds_them(
    photographs, expected, tmp_path, container
):
    shards, index = expected
    path = container(photographs, tmp_path)
    assert len(shards) == 2
    assert encoded(path, tmp_path / "out") == shards
    found = read_json(tmp_path / "out" / "index.json")
    if container in NAMED:
        assert found == index
    else:
        assert found["classes"] == ["0", "1", "2"]
        assert found["counts"] == index["counts"]


@pytest.mark.parametrize("container", [*NAMED, *NUMBERED], ids=lambda f: f.__name__)
def test_what_is_there_is_told_by_looking(photographs, tmp_path, container):
    path = container(photographs, tmp_path)
    assert containers.find(path).words == (NAMED | NUMBERED)[container]


def test_a_folders_fingerprint_is_0_1_0s(photographs):
    """SHA-256 of relative paths and sizes, in the order of classes and names."""
    digest = hashlib.sha256()
    for path in sorted(images_of(photographs)):
        line = f"{path.parent.name}/{path.name}\0{path.stat().st_size}\n"
        digest.update(line.encode())
    assert dataset.Images(photographs, 32, 3).fingerprint == digest.hexdigest()


def test_labels_count_in_a_fingerprint(photographs, tmp_path):
    path = edm2s_zip(photographs, tmp_path)
    members = edm2s(photographs)
    labels = json.loads(members["dataset.json"])["labels"]
    labels[0][1] = 0
    before = dataset.Images(path, 32, 3).fingerprint
    make_zip(path, {**members, "dataset.json": json.dumps({"labels": labels})})
    assert dataset.Images(path, 32, 3).fingerprint != before


def test_images_alone_are_one_class(tmp_path):
    members = {"b.png": png(1), "a.png": png(2)}
    for make, name in ((make_tar, "x.tar"), (make_zip, "x.zip")):
        found = containers.find(make(tmp_path / name, members))
        assert found.classes == ["x"]
        assert list(found.names) == ["a.png", "b.png"]
        assert found.labels.tolist() == [0, 0]


def test_webdatasets_tars_without_labels_are_one_class(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(2):
        make_tar(tmp_path / "set" / f"a-{i}.tar", {"x/0.png": png(i), "x/1.png": png(2)})
    found = containers.find(tmp_path / "set")
    assert found.words == "WebDataset's 2 tars without labels: 1 class, 4 images"
    assert found.classes == ["set"]
    assert list(found.names) == ["x/0.png", "x/0.png", "x/1.png", "x/1.png"]
    assert [found.place(i) for i in range(2)] == [
        f"{tmp_path}/set/a-0.tar: x/0.png",
        f"{tmp_path}/set/a-1.tar: x/0.png",
    ]
    assert containers.find(tmp_path / "set" / "a-*.tar").classes == ["a"]


def test_edm2s_null_labels_are_one_class(tmp_path):
    members = {"dataset.json": '{"labels": null}', "00000/a.png": png(), "00001/b.png": png()}
    found = containers.find(make_zip(tmp_path / "x.zip", members))
    assert found.classes == ["x"]
    assert list(found.names) == ["00000/a.png", "00001/b.png"]


def test_edm2s_layout_may_lie_in_a_folder_of_the_zip(photographs, tmp_path):
    members = {f"imagenet/{name}": data for name, data in edm2s(photographs).items()}
    path = make_zip(tmp_path / "x.zip", {**members, "other.png": png()})
    found = containers.find(path)
    assert found.words == "EDM2's zip of images: 3 classes, 6 images; 1 other member left out"
    (tmp_path / "y").mkdir()
    plain = containers.find(edm2s_zip(photographs, tmp_path / "y"))
    assert list(found.names) == list(plain.names)
    both = {**members, "b/dataset.json": '{"labels": null}', "b/1.png": png()}
    text = refusal(make_zip(path, both))
    assert "several data sets (imagenet/dataset.json, b/dataset.json)" in text


def test_another_dataset_json_is_a_member_like_others(tmp_path):
    members = {"dataset.json": '{"name": "x"}', "a/1.png": png(), "b/1.png": png()}
    assert containers.find(make_zip(tmp_path / "x.zip", members)).classes == ["a", "b"]


def test_numbered_classes_keep_their_numbers(tmp_path):
    members = {"1.jpg": png(), "1.cls": b"4", "2.mask.png": png(), "2.png": png(), "2.cls": b" 2\n"}
    found = containers.find(make_tar(tmp_path / "x.tar", members))
    assert found.classes == ["0", "1", "2", "3", "4"]
    assert found.labels.tolist() == [2, 4]
    assert found.words == (
        "WebDataset's tar: 5 classes, 2 images; 3 classes have none; 1 other member left out"
    )


def test_a_folder_with_one_tar_is_that_tar(tmp_path):
    make_tar(tmp_path / "x.tar", {"a/1.png": png(), "b/1.png": png()})
    assert containers.find(tmp_path).classes == ["a", "b"]


def test_classes_are_chosen_in_every_container(photographs, tmp_path):
    chosen = ["n02123045 tabby, tabby cat", "n01440764"]
    expected = dataset.Images(photographs, 32, 3, classes=chosen)
    assert expected.classes == ["n01440764", "n02123045"]
    assert expected.labels.tolist() == [0, 0, 1]
    for container in (zipped, tar_of_tars):
        found = dataset.Images(container(photographs, tmp_path), 32, 3, classes=chosen)
        assert found.classes == expected.classes
        assert found.fingerprint == expected.fingerprint
        assert found.labels.tolist() == [0, 0, 1]
    numbered = containers.find(edm2s_zip(photographs, tmp_path), ["2", "0"])
    assert numbered.classes == ["0", "2"]
    assert numbered.labels.tolist() == [0, 0, 1]


def test_classes_are_chosen_in_shards(photographs, expected, tmp_path):
    encoded(photographs, tmp_path / "all")
    chosen = dataset.open_data(tmp_path / "all", classes=["n01443537"])
    every = dataset.open_data(tmp_path / "all")
    assert chosen.classes == ["n01443537"]
    assert chosen.labels.tolist() == [0, 0, 0]
    assert chosen.fingerprint != every.fingerprint
    images, labels = pickle.loads(pickle.dumps(chosen)).batch([2, 0], [False, True])
    theirs, _ = every.batch([4, 2], [False, True])
    assert (images == theirs).all()
    assert labels.tolist() == [0, 0]


def test_an_unknown_class_is_refused_with_the_nearest(photographs):
    with pytest.raises(UserError, match="no class 'n0144.*did you mean n01440764?"):
        containers.find(photographs, ["n0144076"])


# reading


def test_workers_read_members_by_position(photographs, tmp_path):
    """In processes that were forked and in those that were not."""
    path = tar_of_tars(photographs, tmp_path)
    data = dataset.Images(path, 16, 3)
    indices = np.arange(len(data))
    steps = [(indices, indices % 2 == 0)] * 3
    expected, _ = data.batch(*steps[0])
    for images, labels, bad in dataset.loader(data, steps, workers=2):
        assert (images == expected).all()
        assert labels.tolist() == data.labels.tolist()
        assert bad == []
    copy = pickle.loads(pickle.dumps(data))
    assert (copy.batch(*steps[0])[0] == expected).all()


def test_a_listing_holds_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "OPEN", 3)
    for i in range(8):
        make_tar(tmp_path / f"a-{i}.tar", {f"{i}.png": png(10 * i)})
    data = dataset.Images(tmp_path / "a-*.tar", 8, 3)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        images, _ = data.batch(np.arange(8), np.zeros(8, bool))
        assert images[:, 0, 0, 0].tolist() == [10 * i for i in range(8)]
        assert len(os.listdir("/proc/self/fd")) == before + 3


# what is refused


@pytest.mark.parametrize(
    "head, words",
    [
        (b"\x1f\x8b\x08", "gzip -dk"),
        (b"\xfd7zXZ\0", "xz -dk"),
        (b"\x28\xb5\x2f\xfd", "zstd -d"),
        (b"BZh9", "bzip2 -dk"),
        (b"PAR1", "two lines write"),
        (bytes(16) + b"\xde\xc0\xef\xbe", "two lines write"),
        (b"hello", "not a folder, tar or zip"),
        (b"", "not a folder, tar or zip"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path, head, words):
    path = tmp_path / "file"
    path.write_bytes(head + bytes(1000) * bool(head))
    assert words in refusal(path)


def test_databases_are_refused_with_two_lines_that_write_a_tar(tmp_path):
    for name in ("data/0.parquet", "lmdb/data.mdb"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    assert "webdataset.TarWriter" in refusal(tmp_path / "lmdb")
    assert "webdataset.TarWriter" in refusal(tmp_path / "data")
    shutil.rmtree(tmp_path / "lmdb")
    assert "webdataset.TarWriter" in refusal(tmp_path)


class TarWriter:
    """What two lines of ours need of webdataset.TarWriter, where that is not installed: a member
    for each field of a sample, numbers as text."""

    def __init__(self, path):
        self.tar = tarfile.open(path, "w")  # noqa: SIM115 (closed on leaving)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tar.close()

    def write(self, sample):
        key = sample.pop("__key__")
        for field, value in sample.items():
            add(self.tar, f"{key}.{field}", value if type(value) is bytes else b"%d" % value)


def test_the_two_lines_that_write_a_tar_do(tmp_path, monkeypatch):
    (tmp_path / "0.parquet").write_bytes(b"PAR1")
    lines = refusal(tmp_path / "0.parquet").partition("that is read: ")[2].split(" | ")
    if not importlib.util.find_spec("webdataset"):
        monkeypatch.setitem(sys.modules, "webdataset", SimpleNamespace(TarWriter=TarWriter))
    monkeypatch.chdir(tmp_path)
    rows = [(png(value), value % 3) for value in range(5)]
    exec("import webdataset\n" + "\n    ".join(lines), {"rows": rows})
    found = dataset.Images("images.tar")
    assert found.words.endswith("WebDataset's tar: 3 classes, 5 images")
    assert found.classes == ["0", "1", "2"]
    images, labels = found.batch(range(5), [False] * 5)
    assert labels.tolist() == [0, 0, 1, 1, 2]
    assert images[:, 0, 0, 0].tolist() == [0, 3, 1, 4, 2]


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_a_compressed_tar_is_refused_with_a_command_that_unpacks_it(tmp_path, kind):
    folder = tmp_path / "my data"
    folder.mkdir()
    with tarfile.open(folder / f"a b.tar.{kind}", f"w:{kind}") as tar:
        for name, data in MANY.items():
            add(tar, name, data)
    for place in (folder, folder / f"a b.tar.{kind}"):
        said = refusal(place)
        assert "is compressed" in said
    subprocess.run(said.partition("unpack it: ")[2], shell=True, check=True)
    assert len(containers.find(folder / "a b.tar")) == len(MANY)


@pytest.mark.parametrize(
    "members, words",
    [
        ({"train/a/1.png": b"", "val/a/1.png": b""}, "holds train/a/1.png and val/a/1.png"),
        ({"1.png": b"", "a/1.png": b""}, "holds 1.png and a/1.png"),
        ({"n01440764.tar": tar_bytes({"1.png": b""}), "a.png": b""}, "mixes tars and images"),
        ({"1.png": b"", "1.cls": b"x"}, "1.cls holds no class number"),
        ({"1.png": b"", "1.cls": b"-1"}, "1.cls holds no class number"),
        ({"1.png": b"", "1.cls": b"100000"}, "1.cls holds no class number"),
        ({"1.png": b"", "1.json": b'{"label": "cat"}'}, "1.json holds no class number"),
        ({"1.png": b"", "1.json": b'{"label": true}'}, "1.json holds no class number"),
        ({"1.png": b"", "1.json": b"{" + bytes(2**20)}, "1.json holds no class number"),
        ({"1.png": b"", "1.cls": b"1", "2.png": b""}, "2.png has no label though others have"),
        ({"1.png": b"", "1.cls": b"1", "1.jpg": b""}, "1 has two images"),
        ({"1.png": b"", "1.cls": b"1", "1.json": b'{"cls": 2}'}, "1 has two labels, 1 and 2"),
        ({"a.txt": b""}, "holds no images"),
        ({"a.npy": b""}, "dimr encode --from-latents"),
        ({"a.png": b"", "dataset.json": b"{"}, "dataset.json is not valid JSON"),
        ({"a.png": b"", "dataset.json": b'{"labels": [["a.png", 1.5]]}'}, "label of a.png is 1.5"),
        ({"a.png": b"", "dataset.json": b'{"labels": [["a.png", [0, 1]]]}'}, "label of a.png is"),
        ({"a.png": b"", "dataset.json": b'{"labels": {"a": 1}}'}, "not pairs"),
        ({"a.png": b"", "dataset.json": b'{"labels": [["b.png", 1]]}'}, "a.png has no label"),
        (
            {"a.png": b"", "dataset.json": b'{"labels": [["a.png", 1], ["b.png", 1]]}'},
            "2 labels for 1 files; b.png is missing",
        ),
        (
            {"a.png": b"", "dataset.json": b'{"labels": [["a.png", 1], ["a.png", 1]]}'},
            "gives an image two labels",
        ),
    ],
)
def test_layouts_that_say_no_class_are_refused(tmp_path, members, words):
    assert words in refusal(make_tar(tmp_path / "x.tar", members))


def test_patterns_that_fit_nothing_are_refused(tmp_path):
    make_tar(tmp_path / "a-0.tar", {"1.png": png()})
    assert "fits no file" in refusal(tmp_path / "b-*.tar")
    assert "a-1.tar does not exist" in refusal(tmp_path / "a-{0..2}.tar")
    assert "is not a folder or file" in refusal(tmp_path / "b.tar")
    make_zip(tmp_path / "a-1.tar", {"1.png": png()})
    with pytest.raises(UserError, match="a-1.tar is a zip"):
        containers.find(tmp_path / "a-?.tar")


def test_braces_are_expanded_with_their_zeros(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-x", "b-y"):
        (tmp_path / f"{name}.tar").write_bytes(b"")
    found = containers.expand(f"{tmp_path}/a-{{08..10}}.tar")
    assert [path.name for path in found] == ["a-08.tar", "a-09.tar", "a-10.tar"]
    found = containers.expand(f"{tmp_path}/{{b-{{y,x}},a-*}}.tar")
    assert sorted(path.stem for path in found) == ["a-08", "a-09", "a-10", "b-x", "b-y"]
    assert containers.expand("a.tar") is None


def test_the_official_tar_beside_others_is_to_be_given_alone(photographs, tmp_path):
    tar_of_tars(photographs, tmp_path)
    make_tar(tmp_path / "ILSVRC2012_img_val.tar", {"1.JPEG": png()})
    assert "ILSVRC2012_img_train.tar is a tar of tars; give it alone" in refusal(tmp_path)


# the jobs


def test_a_bad_member_is_named_by_container_and_member(tmp_path):
    members = {**MANY, "a/4.png": png(4)[:50]}
    for make, name in ((make_tar, "x.tar"), (make_zip, "x.zip")):
        path = make(tmp_path / name, members)
        out = tmp_path / f"{name}-out"
        with pytest.raises(UserError, match=f"^{path}: a/4.png: "):
            encoded(path, out)
        encoded(path, out, on_bad="skip")
        index = read_json(out / "index.json")
        (skipped,) = index["skipped"]
        assert (skipped["item"], skipped["image"]) == (4, "a/4.png")
        assert index["items"] == 8


def test_an_encode_goes_on_from_a_repacked_set(photographs, expected, tmp_path):
    """The folder was zipped meanwhile: the same images, and so the same set."""
    shards, index = expected
    out = tmp_path / "out"
    encoded(photographs, out)
    (out / "shard-00001.safetensors").write_bytes(b"")
    assert encoded(zipped(photographs, tmp_path), out) == shards
    assert read_json(out / "index.json") == index
    with pytest.raises(UserError, match="begun with other images"):
        encoded(photographs, out, classes=["n01440764"])


def test_containers_are_sets_to_measure(photographs, tmp_path):
    path = zipped(photographs, tmp_path)
    found = imagesets.open_set(path, 16)
    images, _ = found.batch([0, 5])
    theirs = dataset.Images(photographs, 16, 3)
    assert (images[1].numpy() == theirs.read(5)).all()
    assert found.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert found.digest == imagesets.open_set(tar(photographs, tmp_path), 16).digest
    assert len(imagesets.open_set(photographs, 16, classes=["n02123045"])) == 1
    with pytest.raises(UserError, match="give --res"):
        imagesets.open_set(path)
    run = tmp_path / "run"
    run.mkdir()
    data = {"kind": "pixels", "path": str(path), "exif": False, "only": ["n02123045"]}
    (run / "config.json").write_text(json.dumps({"data": data}))
    reference = evaluation.fitting_reference(run, 1, [], size=16)
    assert (reference.source, reference.classes) == (str(path), ["n02123045"])


@pytest.mark.slow
def test_the_command_line_takes_a_container(photographs, expected, tmp_path):
    shards, _ = expected
    path = tar_of_tars(photographs, tmp_path)
    options = ["--res", 32, "--pixels", "--shard-size", 4, "--workers", 1]
    done = dimr_command("encode", "--data", path, *options, "--out", tmp_path / "out")
    assert f"{path}: ImageNet's official tar: 3 classes, 6 images" in done.stderr
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")}
    assert found == shards
    (tmp_path / "names.txt").write_text("n02123045 tabby\nn01440764 tench, Tinca tinca\n")
    few = [*options, "--classes", tmp_path / "names.txt", "--out", tmp_path / "few"]
    dimr_command("encode", "--data", path, *few)
    assert read_json(tmp_path / "few" / "index.json")["classes"] == ["n01440764", "n02123045"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "container",
    [
        tar_of_tars,
        *(pytest.param(one, marks=pytest.mark.long) for one in (deflated, webdataset_cls)),
    ],
)
def test_a_killed_encode_goes_on_from_its_container(photographs, tmp_path, container):
    for path in images_of(photographs):
        place = tmp_path / "many" / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        for i in range(12):
            shutil.copy(path, place / f"{i}-{path.name}")
    source = container(tmp_path / "many", tmp_path)
    whole = encoded(source, tmp_path / "whole")
    out = tmp_path / "out"
    command = ["encode", "--data", source, "--res", 32, "--pixels", "--shard-size", 4]
    command += ["--batch-size", 2, "--workers", 2, "--out", out]
    for rows in (1, 8):
        process = subprocess.Popen([sys.executable, "-m", "cli", *map(str, command)], cwd=tmp_path)
        while process.poll() is None and len(list(out.glob("shard-*.json"))) < rows:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.wait()
    dimr_command(*command, torchrun=2)
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == whole
    assert read_json(out / "index.json") == read_json(tmp_path / "whole" / "index.json")


@pytest.mark.slow
def test_the_script_of_the_figures_runs(monkeypatch, tmp_path, capsys):
    import containers_speed

    monkeypatch.setattr(containers_speed, "IMAGES", 16)
    monkeypatch.setattr(containers_speed, "ROUNDS", 1)
    monkeypatch.setattr(containers_speed, "CLASSES", 3)
    containers_speed.throughput()
    containers_speed.index(50)
    said = capsys.readouterr().out
    assert said.count("of the folder's") == 6
    assert said.count("ImageNet's official tar: 3 classes, 50 images") == 2


TINY = [
    *["--variant", "demo", "--layers", "2,2", "--dims", "16,8", "--heads", "2", "--warmup", "2"],
    *["--batch-size", "4", "--sample-every", "0", "--workers", "1", "--device", "cpu"],
]


@pytest.mark.slow
def test_a_run_goes_on_where_its_data_have_moved(photographs, tmp_path):
    """From a folder to a tar, to the byte as if they had not; the chosen classes are remembered."""
    out = tmp_path / "run"
    chosen = ["--classes", "n01440764,n01443537"]
    train = ["train", *TINY, "--res", 16, "--save-every", 2, "--ema", 0.9]
    undisturbed = [*train, "--out", tmp_path / "undisturbed"]
    dimr_command(*undisturbed, "--data", photographs, *chosen, "--steps", 4)
    train += ["--out", out]
    dimr_command(*train, "--data", photographs, *chosen, "--steps", 2)
    path = tar(photographs, tmp_path)
    done = dimr_command(*train, "--data", path, "--steps", 4)
    assert f"{path}: a tar: 2 classes, 5 images" in done.stderr
    assert "going on from" in done.stderr
    last = "checkpoints/step-0000004"
    for file in (tmp_path / "undisturbed" / last).iterdir():
        assert (out / last / file.name).read_bytes() == file.read_bytes()
    record = read_json(out / "config.json")["data"]
    assert (record["path"], record["items"]) == (str(path), 5)
    assert record["only"] == ["n01440764", "n01443537"]
    done = dimr_command(*train, "--classes", "n02123045", "--steps", 6, check=False)
    assert done.returncode == 1
    assert "not" in done.stderr
    path.rename(tmp_path / "b.tar")
    done = dimr_command(*train, "--steps", 6, check=False)
    assert done.returncode == 1
    assert f"is no longer at {path}; if it has moved, say where to: --data" in done.stderr
