"""Zips and tars read in place: the index of a tar, formats, and what hostile ones can't do."""

import os
import pickle
import shutil
import struct
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
from packing import MANY, add, make_tar, make_zip, patched, png, refusal, tar_bytes

import archives
import containers
import dataset
from storage import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# the index of a tar


def index_file(cache):
    (found,) = (cache / "indexes").glob("*.safetensors")
    return found


def test_a_tar_is_walked_once(tmp_path, cache, monkeypatch):
    path = make_tar(tmp_path / "x.tar", {"n01440764.tar": tar_bytes(MANY)})
    before = dataset.Images(path, 16, 3)
    kept = index_file(cache).read_bytes()
    monkeypatch.setattr(archives, "_walk_tar", None)
    again = dataset.Images(path, 16, 3)
    assert again.fingerprint == before.fingerprint
    assert again.words == before.words
    assert (again.read(5) == before.read(5)).all()
    assert index_file(cache).read_bytes() == kept


def test_an_index_of_another_state_of_the_file_is_made_anew(tmp_path, cache):
    path = make_tar(tmp_path / "x.tar", {"a.png": png(1)})
    containers.find(path)
    make_tar(path, {"b.png": png(1)})
    os.utime(path, ns=(1, 1))
    assert list(containers.find(path).names) == ["b.png"]
    make_tar(path, {"c.png": png(1)})
    os.utime(path, ns=(2, 2))
    assert list(containers.find(path).names) == ["c.png"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_index_is_made_anew(tmp_path, cache, damage):
    path = make_tar(tmp_path / "x.tar", {"a.png": png(1), "b.cls": b"1", "c.txt": b""})
    before = archives.open_tar(path)
    kept = index_file(cache)
    data = bytearray(kept.read_bytes())
    if damage == "cut":
        kept.write_bytes(data[:-3])
    elif damage == "flipped":
        data[-1] ^= 1
        kept.write_bytes(data)
    else:
        shutil.copy(path, kept)
    again = archives.open_tar(path)
    assert list(again.names) == list(before.names)
    assert again.sizes.tolist() == before.sizes.tolist()
    assert again.values.tolist() == before.values.tolist() == [archives.NONE, 1]
    assert again.others == 1
    monkey = archives._read_index(archives.File(path), kept)
    assert monkey is not None


def test_without_a_place_for_its_index_a_tar_is_read_all_the_same(tmp_path, cache, capsys):
    cache.write_text("no folder")
    path = make_tar(tmp_path / "x.tar", {"a.png": png(1)})
    assert len(containers.find(path)) == 1
    assert "can't be kept" in capsys.readouterr().err


# hostile input


def test_names_that_lead_out_are_refused(tmp_path):
    for name in ("../a.png", "a/../../b.png", "/etc/a.png"):
        assert f"{name} leads out" in refusal(make_tar(tmp_path / "x.tar", {name: png()}))
        assert f"{name} leads out" in refusal(make_zip(tmp_path / "x.zip", {name: png()}))
    inner = tar_bytes({"../../a.png": png()})
    text = refusal(make_tar(tmp_path / "x.tar", {"n01440764.tar": inner}))
    assert "n01440764.tar: ../../a.png leads out" in text


def test_names_with_control_characters_are_refused_in_one_line(tmp_path):
    for make, name in ((make_tar, "x.tar"), (make_zip, "x.zip")):
        path = make(tmp_path / name, {"a/1.png": png(), "a/\n\x1b[2J.png": png()})
        assert r"a/\n\x1b[2J.png' has control characters" in refusal(path)
    whole = make_tar(tmp_path / "x.tar", {"a/\n.txt": bytes(1000)}).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:1000])
    assert "is cut off in a/?.txt" in refusal(tmp_path / "x.tar")


def test_two_members_of_one_name_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a/1.png", png(1))
        add(archive, "./a/1.png", png(2))
    assert "two members for a/1.png" in refusal(tmp_path / "x.tar")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", png(1))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/1.png", png(2))
    assert "two members for a/1.png" in refusal(tmp_path / "x.zip")


def test_links_are_refused(tmp_path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            add(archive, "a/1.png", png(1))
            add(archive, "a/2.png", b"", type=kind, linkname="a/1.png")
        assert "a/2.png is a" in refusal(tmp_path / "x.tar")
        assert "link to a/1.png" in refusal(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "y.tar", "w") as archive:
        add(archive, "n01440764.tar", b"", type=tarfile.SYMTYPE, linkname="/n.tar")
    assert "n01440764.tar is a link" in refusal(tmp_path / "y.tar")
    info = zipfile.ZipInfo("a/1.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "2.png")
    assert "a/1.png is a link" in refusal(tmp_path / "x.zip")


def test_sparse_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a/1.png", png(1), type=tarfile.GNUTYPE_SPARSE)
    assert "a/1.png is a sparse file" in refusal(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a/1.png", png(1), pax_headers={"GNU.sparse.major": "1"})
    assert "a/1.png is a sparse file" in refusal(tmp_path / "x.tar")


def test_a_tar_cut_off_anywhere_is_refused_with_how_far_it_is_whole(tmp_path):
    whole = make_tar(tmp_path / "x.tar", MANY).read_bytes()
    end = 9 * 1024  # where the closing zeros begin: each member takes a header and a block
    for length in range(0, end + 1, 100):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        text = refusal(tmp_path / "cut.tar")
        if length >= 512:
            count = (length - len(png()) + 512) // 1024  # its last bytes are padding
            done = min(1024 * count, length)
            assert "is cut off" in text
            assert f"{count} members are whole, up to byte {done:,} of {length:,}" in text
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])
    assert len(containers.find(tmp_path / "cut.tar")) == 9


def test_a_cut_tar_in_a_whole_one_is_named(tmp_path):
    inner = tar_bytes({"1.png": png(), "2.png": png()})[:1700]
    path = make_tar(tmp_path / "x.tar", {"n01440764.tar": inner})
    assert f"{path}: n01440764.tar is cut off after 2.png (2 members are whole" in refusal(path)


def test_no_damage_to_a_header_goes_unseen(tmp_path):
    """Each byte of one header changed: refused, or nothing that counts is different."""
    path = make_tar(tmp_path / "x.tar", MANY)
    whole = path.read_bytes()
    before = containers.find(path)
    seen = []
    for place in range(1024, 1536):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        os.utime(path, ns=(place, place))
        try:
            found = containers.find(path)
        except UserError as error:
            assert "damaged after a/0.png" in str(error)
        else:
            assert list(found.names) == list(before.names)
            assert (found.archives[0].offsets == before.archives[0].offsets).all()
            assert (found.archives[0].sizes == before.archives[0].sizes).all()
            seen.append(place)
    assert seen == [1024 + 155]  # the blank behind the checksum


def test_a_member_of_a_tar_that_lies_about_its_size_is_noticed(tmp_path):
    """Its data would end elsewhere, where no header is."""
    for claimed in (1, 0, 3000, 2**40):
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
            for name, data in MANY.items():
                add(archive, name, data)
        raw = bytearray((tmp_path / "x.tar").read_bytes())
        info = tarfile.TarInfo("a/4.png")
        info.size = claimed
        raw[4096:4608] = info.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "x.tar").write_bytes(raw)
        if claimed == 1:  # within the same block: what is left of it is no image
            with pytest.raises(dataset.BadImage, match="x.tar: a/4.png: is not a JPEG"):
                dataset.Images(tmp_path / "x.tar", 8, 3).read(4)
            continue
        text = refusal(tmp_path / "x.tar")
        assert "damaged after a/4.png" in text or "cut off in a/4.png" in text


def test_tars_put_together_with_cat_are_refused(tmp_path):
    first = make_tar(tmp_path / "x.tar", {"a.png": png()}).read_bytes()
    (tmp_path / "x.tar").write_bytes(first + tar_bytes({"b.png": png()}))
    assert "goes on after its end" in refusal(tmp_path / "x.tar")


def test_a_file_that_changes_is_one_line(tmp_path):
    for make, name in ((make_tar, "x.tar"), (make_zip, "x.zip")):
        path = make(tmp_path / name, MANY)
        data = dataset.Images(path, 8, 3)
        data.read(0)
        os.utime(path, ns=(1, 1))
        with pytest.raises(UserError, match=f"{name} has changed since it was opened"):
            data.read(1)
        path.unlink()
        with pytest.raises(UserError, match="No such file"):
            pickle.loads(pickle.dumps(data)).read(1)


@pytest.mark.parametrize(
    "method, fields, reason",
    [
        ("deflated", {"size": 10}, "claims 10 bytes and holds more"),
        ("deflated", {"size": 999}, "claims 999 bytes and holds [0-9]+$"),
        ("deflated", {"packed": 20}, "claims .* bytes and holds"),
        ("stored", {"size": 10}, "claims 10 bytes and holds"),
        ("stored", {"crc": 1}, "does not have the checksum"),
        ("stored", {"offset": 1}, "is not where the zip's directory says"),
        ("stored", {"size": 2**31}, "claims 2,147,483,648 bytes, and no image needs over"),
        ("stored", {"packed": 2**31, "size": 90}, "takes 2,147,483,648 bytes"),
        ("stored", {"packed": 10**6, "size": 10**6}, "goes beyond the end of the zip"),
    ],
)
def test_a_member_of_a_zip_that_lies_is_a_bad_image(tmp_path, method, fields, reason):
    how = zipfile.ZIP_DEFLATED if method == "deflated" else zipfile.ZIP_STORED
    path = patched(make_zip(tmp_path / "x.zip", MANY, how), "a/4.png", **fields)
    data = dataset.Images(path, 8, 3)
    with pytest.raises(dataset.BadImage, match=f"^{path}: a/4.png: {reason}"):
        data.read(4)
    bad = []
    images, _ = data.batch(np.arange(9), np.zeros(9, bool), bad, drop=True)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert len(bad) == 1


def test_a_zip_bomb_is_not_inflated(tmp_path):
    """256 KB that would be 256 MB: no more than the directory claims is ever made."""
    path = make_zip(tmp_path / "x.zip", {"a.png": bytes(2**28 + 1)}, zipfile.ZIP_DEFLATED)
    data = dataset.Images(path, 8, 3)
    with pytest.raises(dataset.BadImage, match="claims 268,435,457 bytes"):
        data.read(0)
    patched(path, "a.png", size=1000)
    data = dataset.Images(path, 8, 3)
    with pytest.raises(dataset.BadImage, match="claims 1,000 bytes and holds more"):
        data.read(0)


def test_a_zip_that_can_not_be_read_in_place_is_refused(tmp_path):
    path = patched(make_zip(tmp_path / "x.zip", MANY), "a/4.png", flags=1)
    assert "a/4.png is encrypted" in refusal(path)
    path = make_zip(tmp_path / "x.zip", MANY, zipfile.ZIP_BZIP2)
    assert "a/0.png is packed by bzip2" in refusal(path)


def test_a_zip_cut_off_anywhere_is_refused(tmp_path):
    whole = make_zip(tmp_path / "x.zip", {"a.png": png(), "b.png": png()}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.zip").write_bytes(whole[:length])
        refusal(tmp_path / "cut.zip")
    (tmp_path / "cut.zip").write_bytes(b"#!" + whole)  # offsets that do not fit
    refusal(tmp_path / "cut.zip")


def test_damage_to_a_zips_directory_raises_nothing_else(tmp_path):
    """Each byte changed: refused, or read without a word that is not ours."""
    path = make_zip(tmp_path / "x.zip", {"a.png": png(), "b.png": png()})
    whole = path.read_bytes()
    refused = 0
    for place in range(whole.index(b"PK\1\2"), len(whole)):
        for mask in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            path.write_bytes(damaged)
            try:
                data = dataset.Images(path, 8, 3)
                data.batch([0], [False])
            except UserError:
                refused += 1
    assert refused > 100


SAMPLES = {
    "official": lambda tmp: make_tar(
        tmp / "x.tar", {f"n0000000{i}.tar": tar_bytes(MANY) for i in "12"}
    ),
    "pax": lambda tmp: make_tar(tmp / "x.tar", {"é" * 99 + "/1.png": png()}),
    "webdataset": lambda tmp: make_tar(tmp / "x.tar", {"1.png": png(), "1.json": b'{"cls": 3}'}),
    "edm2": lambda tmp: make_zip(
        tmp / "x.zip", {"dataset.json": b'{"labels": [["1.png", 3]]}', "1.png": png()}
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_damage_to_a_container_raises_anything_else(tmp_path, sample):
    """Bytes changed, cut and doubled, and headers changed whose checksum is right."""
    path = SAMPLES[sample](tmp_path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(200):
        damaged = bytearray(whole)
        place, other = (int(n) for n in rng.integers(0, len(whole), 2))
        kind = number % (4 if path.suffix == ".tar" else 3)
        if kind == 0:
            damaged[place] ^= int(rng.integers(1, 256))
        elif kind == 1:
            del damaged[place:]
        elif kind == 2:
            damaged[place:place] = damaged[other : other + 512]
        else:
            start = place // 512 * 512
            damaged[start + int(rng.choice([0, 124, 130, 156, 345]))] ^= 1
            header = damaged[start : start + 512]
            damaged[start + 148 : start + 156] = b"%06o\0 " % (
                sum(header) - sum(header[148:156]) + 256
            )
        path.write_bytes(damaged)
        os.utime(path, ns=(number, number))
        try:
            dataset.Images(path, 8, 3).batch([0], [False])
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_a_damaged_list_of_labels_is_named(tmp_path):
    members = {"dataset.json": b'{"labels": [["1.png", 3]]}', "1.png": png()}
    for fields, reason in (({"crc": 1}, "the checksum"), ({"size": 2**31}, "claims 2,147,483,648")):
        path = patched(make_zip(tmp_path / "x.zip", members), "dataset.json", **fields)
        assert f"{path}: dataset.json is not valid JSON" in refusal(path)
        assert reason in refusal(path)
    path = make_zip(tmp_path / "x.zip", {**members, "dataset.json": b"[" * 10**5})
    assert "dataset.json is not valid JSON" in refusal(path)


def test_large_zips_have_their_numbers_elsewhere(tmp_path):
    """zip64, as zipfile writes it where it is forced to."""
    path = tmp_path / "x.zip"
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("a.png", "w", force_zip64=True) as file,
    ):
        file.write(png(7))
    assert dataset.Images(path, 8, 3).read(0)[0, 0, 0] == 7
    raw = path.read_bytes()
    place = raw.index(b"PK\1\2")
    size, offset = len(png(7)), 0
    extra = struct.pack("<2H3Q", 1, 24, size, size, offset)
    entry = bytearray(raw[place : place + 46])
    struct.pack_into("<2L", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<L", entry, 42, 0xFFFFFFFF)
    struct.pack_into("<2H", entry, 28, 5, len(extra))
    directory = bytes(entry) + b"a.png" + extra
    end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), place)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, place + len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(raw[:place] + directory + end)
    assert zipfile.ZipFile(path).read("a.png") == png(7)
    assert dataset.Images(path, 8, 3).read(0)[0, 0, 0] == 7


# tars that other programs write


@pytest.mark.parametrize(
    "options", ["--format=gnu", "--format=ustar", "--format=pax", "--format=v7"]
)
def test_gnu_tars_formats_are_read(tmp_path, options):
    for name, data in MANY.items():
        place = tmp_path / "images" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    path = tmp_path / "x.tar"
    subprocess.run(["tar", options, "-cf", path, "-C", tmp_path, "images"], check=True)
    found = dataset.Images(path, 8, 3)
    assert found.fingerprint == dataset.Images(tmp_path / "images", 8, 3).fingerprint
    assert [found.read(i)[0, 0, 0] for i in range(9)] == list(range(9))
    assert found.listing.words == "a tar: 1 class, 9 images"


def test_sizes_beyond_octal_and_pax_sizes_are_understood():
    info = tarfile.TarInfo("a.png")
    info.size = 2**40
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert archives._member(header, 512, {}).size == 2**40
    assert archives._member(header, 512, {"size": b"77"}).size == 77
