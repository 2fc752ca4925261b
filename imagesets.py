"""Sets of images to judge: an `.npz` as ADM's suite reads it, a folder of image files, pixel shards that encode wrote.

`open_set` gives one of three classes that look alike: `len`, `size` (side in pixels), `labels` (N,) or None, `about` (what
`sample` noted of how they were made, else {}), `digest` (of the content), `ordered` (whether their order was somebody's
choice), and `batch`, which dataset.loader reads ahead."""

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
    """The images at `path`; those of a folder are cropped to `res` as ADM does if it is given, turned as EXIF says if `exif`.
    Raises UserError."""
    path = Path(path)
    if path.is_dir():
        images = Shards(path) if (path / "index.json").is_file() else Folder(path, res, exif)
    elif path.is_file():
        images = Npz(path)
    else:
        raise UserError(f"{path} does not exist; expected an .npz with arr_0, or a folder of images")
    if res not in (None, images.size):
        raise UserError(f"{path} holds images of {images.size}×{images.size} and can't be cropped to --res {res}; leave it out")
    return images


class Npz:
    """Images uint8 (N, H, W, 3) under `arr_0`, streamed: stored or compressed, memory stays flat. `arr_1` may be classes."""

    ordered = True

    def __init__(self, path):
        self.path, self.stream, self.position = Path(path), None, 0
        with self._archive() as archive:
            self.keys = {name.removesuffix(".npy") for name in archive.namelist()}
            if "arr_0" not in self.keys:
                held = ", ".join(sorted(self.keys)[:6]) or "nothing"
                raise UserError(f"{path} holds {held} and no arr_0; expected images, uint8 (N, H, W, 3), under that name")
            with archive.open("arr_0.npy") as file:
                shape, dtype = self._header(file)
                self.start, held = file.tell(), archive.getinfo("arr_0.npy").file_size - file.tell()
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise UserError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3) with values from 0 to 255")
            self.item = int(np.prod(shape[1:]))
            if held != shape[0] * self.item:
                raise UserError(f"{path}: arr_0 claims {shape[0]:,} images and holds {held:,} bytes of them; make it anew")
            self.shape, self.size = shape, shape[1]
            if shape[1] != shape[2]:
                raise UserError(f"{path}: images are {shape[2]}×{shape[1]}; expected square ones")

    def __len__(self):
        return self.shape[0]

    def _archive(self):
        try:
            return zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{self.path} is not a whole .npz ({error}); expected images, uint8 (N, H, W, 3), under arr_0") from None

    def _header(self, file):
        """Shape and dtype from the head of an .npy file."""
        try:
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[np.lib.format.read_magic(file)](file)
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.path}: arr_0 is no NumPy array ({error})") from None
        if fortran:
            raise UserError(f"{self.path}: arr_0 is in Fortran order; save it with np.ascontiguousarray")
        return shape, dtype

    @cached_property
    def labels(self):
        labels = read_array(self.path, "arr_1") if "arr_1" in self.keys else None
        fits = labels is not None and labels.shape == self.shape[:1] and np.issubdtype(labels.dtype, np.integer)
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
            self.stream = self._archive().open("arr_0.npy")
        try:
            self.stream.seek(self.start + first * self.item)
            data = bytearray(self.stream.read(count * self.item))
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{self.path} is damaged ({error}); fetch or make it anew") from None
        if len(data) != count * self.item:
            raise UserError(f"{self.path} is damaged: image {first + len(data) // self.item} is cut off; fetch or make it anew")
        self.position = first + count
        return torch.frombuffer(data, dtype=torch.uint8).view(count, *self.shape[1:]), None


def read_sidecar(path):
    """What `sample` noted beside an `.npz` of how it was made, else {}."""
    sidecar = Path(path).with_suffix(".json")
    about = read_json(sidecar) if sidecar.is_file() else {}
    return about if isinstance(about, dict) else {}


def read_array(path, name):
    """An array of an `.npz`. Raises UserError if it is not there, damaged or needs pickle."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: {name} can't be read ({error})") from None


class Folder:
    """Image files under a folder, at any depth, by sorted path. `res` None demands that all be square and of one size."""

    ordered = False

    def __init__(self, root, res=None, exif=False):
        self.path, self.res, self.exif = Path(root), res, exif
        found = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.name != GRID)
        self.names = sorted(n for n in found if n.lower().endswith(dataset.EXTENSIONS) and not re.search(r"(^|/)\.", n))
        if not self.names:
            raise UserError(f"{root} holds no images ({dataset.KNOWN}); expected a folder of them, or an .npz with arr_0")
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
                raise UserError(f"{self.path / self.names[index]} is {image.width}×{image.height}; expected square images, or give --res")
            return image.width

    def batch(self, indices, *_):
        """Images (B, size, size, 3) uint8, and None."""
        images = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        for row, index in enumerate(map(int, indices)):
            if not self.res and (side := self._side(index)) != self.size:
                raise UserError(f"{self.path} mixes sizes ({self.names[0]} is {self.size}×{self.size}, {self.names[index]} {side}×{side}), "
                                "which no distance should compare; give --res to crop all to one")
            images[row] = torch.from_numpy(dataset.read_image(self.path / self.names[index], self.size, exif=self.exif).copy())
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
            raise UserError(f"{root} holds latents; expected images: a folder, an .npz with arr_0, or pixel shards")
        self.size, self.labels, self.digest = self.shards.size, self.shards.labels, self.shards.fingerprint

    def __len__(self):
        return len(self.shards)

    def name(self, index):
        return f"{index:07d}"

    def batch(self, indices, *_):
        images, _ = self.shards.batch(indices, np.zeros(len(indices), bool))
        return images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3), None
