"""Sets of images to judge: an `.npz` as ADM's suite reads it, a folder of image files, pixel shards
that encode wrote.

`open_set` gives one of three classes that look alike: `path`, `len`, `size` (side in pixels),
`labels` (N,) or None, `about` (what `sample` noted of how they were made, else {}), `digest` (of
the content), `ordered` (whether their order was somebody's choice), `name(index)`, and `batch`,
which dataset.loader reads ahead."""

import ours

import hashlib
import json
import re
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dataset
from storage import UserError, read_json, sha256

SAMPLE = re.compile(r"class(\d+)-seed\d+\.png")  # how `sample` names an image
GRID = "grid.png"  # and the picture it leaves beside them


def open_set(path, res=None, exif=False):
    """The images at `path`; those of a folder are cropped to `res` as ADM does if it is given,
    turned as EXIF says if `exif`. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        images = Shards(path) if (path / "index.json").is_file() else Folder(path, res, exif)
    elif path.is_file():
        images = Npz(path)
    else:
        raise UserError(
            f"{path} does not exist; expected an .npz with arr_0, or a folder of images"
        )
    if res not in (None, images.size):
        shape = f"{images.size}×{images.size}"
        raise UserError(
            f"{path} holds images of {shape}, which --res {res} can't change; leave it out"
        )
    return images


class Npz:
    """Images uint8 (N, H, W, 3) under `arr_0`, streamed, stored or compressed; `arr_1` may be their
    classes."""

    ordered = True

    def __init__(self, path):
        self.path, self.stream, self.position = Path(path), None, 0
        if "arr_0" not in (held := names(self.path)):
            held = ", ".join(sorted(held)[:6]) or "nothing"
            raise UserError(
                f"{path} holds {held} and no arr_0; expected images, uint8 (N, H, W, 3), "
                "under that name"
            )
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            shape, dtype = self._header(file)
            self.start = file.tell()
            size = archive.getinfo("arr_0.npy").file_size - self.start
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(
                f"{path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3) with "
                "values from 0 to 255"
            )
        self.shape, self.size, self.item = shape, shape[1], int(np.prod(shape[1:]))
        if size != shape[0] * self.item:
            raise UserError(
                f"{path}: arr_0 claims {shape[0]:,} images and holds {size:,} bytes; make it anew"
            )
        if shape[1] != shape[2]:
            raise UserError(f"{path}: images are {shape[2]}×{shape[1]}; expected square ones")

    def __len__(self):
        return self.shape[0]

    def _header(self, file):
        """Shape and dtype from the head of an .npy file."""
        try:
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.path}: arr_0 is no NumPy array ({error})") from None
        if fortran:
            raise UserError(
                f"{self.path}: arr_0 is in Fortran order; save it with np.ascontiguousarray"
            )
        return shape, dtype

    @cached_property
    def labels(self):
        labels = read_array(self.path, "arr_1") if "arr_1" in names(self.path) else None
        fits = (
            labels is not None
            and labels.shape == self.shape[:1]
            and np.issubdtype(labels.dtype, np.integer)
        )
        return labels.astype(np.int64) if fits else None

    @cached_property
    def about(self):
        return read_sidecar(self.path)

    @cached_property
    def digest(self):
        return sha256(self.path)

    def name(self, index):
        return f"{index:06d}"

    def batch(self, indices, *_):
        """Images (B, H, W, 3) uint8 of consecutive `indices`, and None."""
        first, count = int(indices[0]), len(indices)
        if self.stream is None or first < self.position:
            # kept open: reading on costs no search
            self.stream = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115
        try:
            self.stream.seek(self.start + first * self.item)
            data = bytearray(self.stream.read(count * self.item))
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{self.path} is damaged ({error}); fetch or make it anew") from None
        if len(data) != count * self.item:
            raise UserError(
                f"{self.path} is cut off at image {first + len(data) // self.item}; "
                "fetch or make it anew"
            )
        self.position = first + count
        return torch.frombuffer(data, dtype=torch.uint8).view(count, *self.shape[1:]), None


def names(path):
    """The arrays in an `.npz`. Raises UserError for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a whole .npz ({error}); fetch or make it anew") from None


def read_sidecar(path):
    """What `sample` noted beside an `.npz` of how it was made, else {}."""
    sidecar = Path(path).with_suffix(".json")
    about = read_json(sidecar) if sidecar.is_file() else {}
    return about if isinstance(about, dict) else {}


def workers(images, batch_size):
    """How many processes should read `images` ahead: by cores (None) where many files are to be
    decoded, else 0."""
    return None if isinstance(images, Folder) and len(images) > 10 * batch_size else 0


def read_array(path, name):
    """An array of an `.npz`. Raises UserError if it is not there, damaged or needs pickle."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: {name} can't be read ({error})") from None


class Folder:
    """Image files under a folder, at any depth, by sorted path. `res` None demands square ones, all
    of one size."""

    ordered = False

    def __init__(self, root, res=None, exif=False):
        self.path, self.res, self.exif = Path(root), res, exif
        found = (
            path.relative_to(self.path).as_posix()
            for path in self.path.rglob("*")
            if path.name != GRID
        )
        self.names = sorted(
            n
            for n in found
            if n.lower().endswith(dataset.EXTENSIONS) and not re.search(r"(^|/)\.", n)
        )
        if not self.names:
            raise UserError(
                f"{root} holds no images ({dataset.KNOWN}); give a folder of them, or an "
                ".npz with arr_0"
            )
        self.size = res or self._side(0)

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return self.names[index]

    def _open(self, index):
        path = self.path / self.names[index]
        try:
            return Image.open(path, formats=dataset.FORMATS)
        except Exception:  # read_image meets it again and says what is wrong
            dataset.read_image(path, 1)
            raise

    def _side(self, index):
        with self._open(index) as image:
            if image.width != image.height:
                shape = f"{image.width}×{image.height}"
                raise UserError(
                    f"{self.path / self.names[index]} is {shape}; expected square "
                    "images, or give --res"
                )
            return image.width

    def batch(self, indices, *_):
        """Images (B, size, size, 3) uint8, and None."""
        images = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        for row, index in enumerate(map(int, indices)):
            if not self.res and (side := self._side(index)) != self.size:
                sizes = (
                    f"{self.names[0]} is {self.size}×{self.size}, {self.names[index]} {side}×{side}"
                )
                raise UserError(f"{self.path} mixes sizes ({sizes}); give --res to crop all to one")
            image = dataset.read_image(self.path / self.names[index], self.size, exif=self.exif)
            images[row] = torch.from_numpy(image.copy())
        return images, None

    @cached_property
    def labels(self):
        """From `sample`'s file names, else from one folder per class."""
        matches = [SAMPLE.fullmatch(Path(name).name) for name in self.names]
        if all(matches):
            return np.asarray([int(match[1]) for match in matches])
        folders = [name.split("/")[0] if name.count("/") == 1 else None for name in self.names]
        return np.unique(folders, return_inverse=True)[1] if all(folders) else None

    @cached_property
    def about(self):
        with self._open(0) as image:
            try:
                about = json.loads(getattr(image, "text", {}).get("dimr", "{}"))
            except ValueError:
                about = {}
        return about if isinstance(about, dict) else {}

    @cached_property
    def digest(self):
        digest = hashlib.sha256(b"exif" * self.exif)
        for name in self.names:
            digest.update(f"{name}\0{sha256(self.path / name)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


class Shards:
    """A pixel shard set, in RGB."""

    ordered, about = False, {}

    def __init__(self, root):
        self.path, self.shards = Path(root), dataset.open_data(root)
        if self.shards.kind != "pixels":
            raise UserError(
                f"{root} holds latents; expected images: a folder, an .npz with arr_0, "
                "or pixel shards"
            )
        self.size, self.labels, self.digest = (
            self.shards.size,
            self.shards.labels,
            self.shards.fingerprint,
        )

    def __len__(self):
        return len(self.shards)

    def name(self, index):
        return f"{index:07d}"

    def batch(self, indices, *_):
        images, _ = self.shards.batch(indices, np.zeros(len(indices), bool))
        return images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3), None
