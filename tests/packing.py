"""Zips and tars for tests."""

import io
import struct
import tarfile
import zipfile

import pytest
from PIL import Image

import containers
from storage import UserError


def add(tar, name, data, **fields):
    """Add a member to a TarFile."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(path, members, **options):
    """A tar of name → bytes, or of pairs."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in dict(members).items():
            add(tar, name, data)
    return path


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return buffer.getvalue()


def make_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in dict(members).items():
            archive.writestr(name, data)
    return path


def png(value=0, size=8):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def refusal(path, **options):
    with pytest.raises(UserError) as error:
        containers.find(path, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


MANY = {f"a/{i}.png": png(i) for i in range(9)}


def patched(path, name, **fields):
    """A zip whose directory says other things of member `name`."""
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\1\2", 0, data.rindex(name.encode()))
    offsets = {"flags": (8, "H"), "method": (10, "H"), "crc": (16, "L"), "packed": (20, "L")}
    offsets |= {"size": (24, "L"), "offset": (42, "L")}
    for field, value in fields.items():
        start, kind = offsets[field]
        struct.pack_into(f"<{kind}", data, place + start, value)
    path.write_bytes(data)
    return path
