"""Images and latents for training: folders of images, finished shards, and the order they are
visited in.

`open_data` gives an `ImageFolder` or `Shards`, which look alike: `kind`, `size`, `channels`,
`classes`, `labels`, `fingerprint`, `len` and `batch`. `Order` says which items a run visits,
`loader` reads them ahead.

A shard set is a folder of `shard-00000.safetensors`, … and `index.json`, which is written last.
Each shard holds `labels` (n,) int64 and `data`: for pixels uint8 (n, H, W, C), for latents float16
(n, 2, 2, C, h, w), whose second axis is the image and its horizontal flip, the third mean and
log-variance in the VAE's own units."""

import ours

import atexit
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from storage import UserError, read_json, sha256

FORMAT = 1  # of the shard set
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
KNOWN = ", ".join(EXTENSIONS)
FORMATS = ("JPEG", "PNG", "WEBP")  # told by content, not by extension
GREY = {
    "1",
    "L",
    "LA",
    "La",
    "I",
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
}  # Pillow's modes without colour
PROBED = 64  # images whose headers tell size and channels of a folder
DTYPES = {
    "U8": np.uint8,
    "F16": np.float16,
    "I64": np.int64,
}  # safetensors' names, as far as shards use them
DATA_DTYPE = {"pixels": "U8", "latents": "F16"}
HEADER = 512  # bytes before a shard's data


class BadImage(UserError):
    """One image can't be used: a damaged or mislabelled file, not a failing disk."""

    def __init__(self, path, reason):
        super().__init__(path, reason)

    def __str__(self):
        path, reason = self.args
        return f"{path}: {reason}"


# One image


def center_crop(image, size):
    """ADM's crop of a PIL image to (size, size): halved with a box filter while the short side is
    at least twice `size`, then bicubic to `size`, then the centre. Halving floors both sides, the
    offset floors."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size, channels=3, exif=False):
    """The centre crop of a JPEG, PNG or WebP file, uint8 (size, size, channels), channels 1 or 3.

    16-bit grey is divided by 257, transparency is laid on white, CMYK and palettes become RGB; an
    animation gives its first frame. EXIF rotation is ignored, as ADM does, unless `exif`. Raises
    BadImage where the file is at fault, UserError where it can't be reached or is in colour though
    `channels` is 1."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's remarks on harmless damage, such as odd EXIF blocks
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                if exif:
                    image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever an untrusted file makes the decoder raise, the file is at fault
        raise _blame(path, error) from None
    if max(image.size) / min(image.size) * size**2 > Image.MAX_IMAGE_PIXELS:
        raise BadImage(path, f"is too elongated to crop ({image.width}×{image.height})")
    image = _plain(image)
    if channels == 1 and image.mode == "RGB":
        red, green, blue = image.split()
        if not red.tobytes() == green.tobytes() == blue.tobytes():
            raise UserError(
                f"{path} is in colour but the data was taken for grey; remove it or read 3 channels"
            )
    image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(center_crop(image, size)).reshape(size, size, channels)


def _blame(path, error):
    """The UserError for what Pillow raised on opening or decoding `path`."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(
            f"{path} can't be read ({error.strerror}); has it been moved, or is the disk failing?"
        )
    if isinstance(error, UnidentifiedImageError):
        return BadImage(
            path, "is not a JPEG, PNG or WebP image" if os.path.getsize(path) else "is empty"
        )
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return BadImage(path, f"claims more than {Image.MAX_IMAGE_PIXELS:,} pixels")
    return BadImage(path, " ".join(str(error).split()) or type(error).__name__)


def _plain(image):
    """A PIL image of any mode as L or RGB, 8 bits."""
    grey = image.mode in GREY
    if image.mode.startswith("I"):
        image = Image.fromarray(
            ((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8)
        )
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


# A folder of images


class Paths(Sequence):
    """Paths below `root`, in one block of bytes: worker processes share it, while reading a list of
    strings would copy it page by page through the reference counts."""

    def __init__(self, root, names):
        names = [os.fsencode(name) for name in names]
        self.root = os.fspath(root)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.block = b"".join(names)

    def __len__(self):
        return len(self.ends)

    def name(self, index):
        """Path relative to the root."""
        index = range(len(self))[index]
        return os.fsdecode(self.block[self.ends[index - 1] if index else 0 : self.ends[index]])

    def __getitem__(self, index):
        return os.path.join(self.root, self.name(index))


class ImageFolder:
    """One folder of images per class, numbered by sorted name, or images alone: one class.

    `size` None takes the images' own where a sample shares one square size, else `default_size`;
    `channels` None is 1 where the sample is all grey, else 3. Raises UserError for a folder that is
    neither of the two kinds, or empty."""

    kind = "pixels"

    def __init__(self, root, size=None, channels=None, exif=False, default_size=None):
        self.root, self.exif = Path(root), exif
        folders, images = _list(self.root)
        if folders and images:
            mixed = f"images ({images[0]}) and folders ({folders[0]})"
            raise UserError(
                f"{root} mixes {mixed}; expected one folder of images per class, or images alone"
            )
        if not folders and not images:
            raise UserError(
                f"{root} holds no images ({KNOWN}); expected one folder of them per "
                "class, or images alone"
            )
        self.classes = folders or [self.root.resolve().name]
        groups = [_list_class(self.root, folder) for folder in folders] or [images]
        self.labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self.paths = Paths(self.root, [name for group in groups for name in group])
        self.size, self.channels = size, channels
        if size is None or channels is None:
            self._probe(default_size)

    def __len__(self):
        return len(self.paths)

    @functools.cached_property
    def fingerprint(self):
        """Hex SHA-256 of relative paths and file sizes, in order."""
        digest = hashlib.sha256()
        for index, path in enumerate(self.paths):
            digest.update(
                f"{self.paths.name(index)}\0{os.stat(path).st_size}\n".encode(
                    errors="surrogateescape"
                )
            )
        return digest.hexdigest()

    def _probe(self, default_size):
        """Set `size` and `channels` from the headers of up to PROBED images, evenly spaced."""
        sizes, grey, failure = {}, True, None
        for index in np.linspace(0, len(self) - 1, min(PROBED, len(self))).astype(int):
            try:
                with Image.open(self.paths[index], formats=FORMATS) as image:
                    sizes[image.size] = self.paths[index]
                    grey &= image.mode in GREY
            except (
                Exception
            ) as error:  # as in read_image; the file is met again, and reported, on reading
                failure = _blame(self.paths[index], error)
        if not sizes:
            raise failure
        self.channels = self.channels or (1 if grey else 3)
        if self.size is None:
            (width, height), *others = sizes
            if (others or width != height) and default_size:
                width = default_size
            elif others or width != height:
                found = ", ".join(f"{path} is {w}×{h}" for (w, h), path in list(sizes.items())[:2])
                raise UserError(
                    f"{self.root}: not of one square size ({found}); give --res, the "
                    "size to crop to"
                )
            self.size = width

    def read(self, index):
        """Image `index`, uint8 (size, size, channels). Raises as read_image."""
        return read_image(self.paths[index], self.size, self.channels, self.exif)

    def batch(self, indices, flips, bad=None, drop=False):
        """Images uint8 (B, C, H, W), mirrored where `flips` (B,) says so, and labels int64 (B,).

        An unreadable image raises BadImage; with a list `bad` its message is appended there, and
        the next readable item takes its place, or with `drop` none does: B is then smaller."""
        images = np.empty((len(indices), self.size, self.size, self.channels), np.uint8)
        items, rows = [], []
        for row, index in enumerate(indices):
            for step in range(1 if drop else len(self)):
                item = (int(index) + step) % len(self)
                try:
                    images[len(items)] = self.read(item)
                except BadImage as error:
                    if bad is None:
                        raise
                    bad.append(str(error))
                else:
                    items.append(item)
                    rows.append(row)
                    break
            else:
                if not drop:
                    raise UserError(
                        f"{self.root}: none of the {len(self):,} images can be read; the "
                        f"last: {bad[-1]}"
                    )
        return _pixels(images[: len(items)], np.asarray(flips, bool)[rows]), torch.from_numpy(
            self.labels[items]
        )


def _list(folder):
    """Sorted names of the folders and of the images in `folder`, hidden ones left out."""
    try:
        with os.scandir(folder) as entries:
            entries = [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a folder; expected images, one folder per class, or a shard set"
        ) from None
    images = sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS) and e.is_file())
    return sorted(e.name for e in entries if e.is_dir()), images


def _list_class(root, name):
    """Relative paths of the images of class folder `name`, sorted."""
    folders, images = _list(root / name)
    if not images:
        advice = f"choose one of the folders in {root}" if folders else "fill or remove it"
        raise UserError(
            f"{root / name} holds no images ({KNOWN}) though its place makes it a class; {advice}"
        )
    return [os.path.join(name, image) for image in images]


def _pixels(images, flips):
    """uint8 array (B, H, W, C) → tensor (B, C, H, W), mirrored where `flips`. In NumPy: one thread
    never waits."""
    images[flips] = images[flips, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


# Shards


class Shards:
    """A finished shard set, memory-mapped. `index` is its parsed index.json; `size` of latents is
    their grid's side (32 for images of 256). Raises UserError where a file is missing, damaged or
    of another format."""

    def __init__(self, root):
        self.root = Path(root)
        self.index = index = read_index(root)
        self.kind, self.size, self.channels, self.classes = (
            index[k] for k in ("kind", "size", "channels", "classes")
        )
        item, self.data, labels = item_shape(index), [], []
        for shard in index["shards"]:
            data, numbers = map_shard(self.root / shard["file"])
            if data.dtype != DTYPES[DATA_DTYPE[self.kind]] or data.shape != (shard["count"], *item):
                raise damaged(
                    self.root / shard["file"],
                    f"holds {data.dtype} {data.shape}, index.json says otherwise",
                )
            if ((numbers < 0) | (numbers >= len(self.classes))).any():
                raise damaged(
                    self.root / shard["file"], f"has labels beyond its {len(self.classes)} classes"
                )
            self.data.append(data)
            labels.append(numbers)
        self.labels = np.concatenate(labels)
        self.starts = np.cumsum([0, *map(len, labels)])

    def __reduce__(self):  # a worker process maps the files itself
        return Shards, (self.root,)

    def __len__(self):
        return len(self.labels)

    @functools.cached_property
    def fingerprint(self):
        """Hex SHA-256 of index.json, which holds every shard's."""
        return sha256(self.root / "index.json")

    def batch(self, indices, flips, bad=None, drop=False):
        """Pixels uint8 (B, C, H, W), or latents float16 (B, 2, C, h, w): mean and log-variance of
        the image, or of its flip where `flips` (B,) says so; and labels int64 (B,). No item is bad
        here."""
        indices, flips = np.asarray(indices), np.asarray(flips, bool)
        item = self.data[0].shape[1 if self.kind == "pixels" else 2 :]
        found = np.empty((len(indices), *item), self.data[0].dtype)
        shards = np.searchsorted(self.starts, indices, "right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            where = indices[rows] - self.starts[shard]
            if self.kind == "latents":
                where = where, flips[rows].astype(int)
            found[rows] = self.data[shard][where]
        labels = torch.from_numpy(self.labels[indices])
        return (_pixels(found, flips) if self.kind == "pixels" else torch.from_numpy(found)), labels


def read_index(root, name="index.json"):
    """The parsed index.json of a finished shard set, or plan.json of an unfinished one. Raises
    UserError where it is missing or of another format."""
    path = Path(root) / name
    if not path.is_file() and (path.parent / "plan.json").is_file():
        raise UserError(
            f"{root} is an unfinished encode; run the same dimr encode again, and it "
            "goes on where it was"
        )
    index = read_json(path)
    if (
        not isinstance(index, dict)
        or index.get("format") != FORMAT
        or index.get("kind") not in DATA_DTYPE
    ):
        raise UserError(
            f"{path} is not of shard format {FORMAT}; encode elsewhere, or use the dimr "
            "that wrote it"
        )
    return index


def item_shape(index):
    """Shape of one item's data in the set with this index."""
    size, channels = index["size"], index["channels"]
    return (size, size, channels) if index["kind"] == "pixels" else (2, 2, channels, size, size)


def shard_header(kind, shape):
    """The HEADER bytes of a shard whose data has `shape` (n, …): safetensors' header, padded with
    spaces."""
    data = int(np.prod(shape)) * np.dtype(DTYPES[DATA_DTYPE[kind]]).itemsize
    tensors = {
        "__metadata__": {"format": f"dimr {kind} {FORMAT}"},
        "data": {"dtype": DATA_DTYPE[kind], "shape": shape, "data_offsets": [0, data]},
        "labels": {"dtype": "I64", "shape": shape[:1], "data_offsets": [data, data + 8 * shape[0]]},
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


def map_shard(path):
    """Memory-mapped data (n, …) and labels (n,) of a shard, its header checked against the file's
    size."""
    try:
        with open(path, "rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            header = json.loads(file.read(length)) if length < 1 << 20 else {}
        arrays, spans = {}, []
        for name in ("data", "labels"):
            dtype, shape, (first, last) = (
                header[name][key] for key in ("dtype", "shape", "data_offsets")
            )
            if last - first != np.prod(shape, dtype=int) * np.dtype(DTYPES[dtype]).itemsize:
                raise ValueError(f"the offsets of {name} do not fit its shape")
            arrays[name] = DTYPES[dtype], tuple(shape), 8 + length + first
            spans += [first, last]
        if sorted(spans) != [0, *[min(spans[1], spans[3])] * 2, size - 8 - length]:
            raise ValueError(f"its offsets do not fit its {size:,} bytes")
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"is not a whole shard ({error})") from None
    (dtype, shape, start), (label_dtype, label_shape, label_start) = (
        arrays["data"],
        arrays["labels"],
    )
    data = np.memmap(path, dtype, "r", start, shape) if 0 not in shape else np.empty(shape, dtype)
    return data, np.fromfile(path, label_dtype, label_shape[0], offset=label_start)


def damaged(path, reason):
    return UserError(
        f"{path} {reason}; run the dimr encode that wrote it again, which redoes damaged shards"
    )


def open_data(path, size=None, channels=None, exif=False, default_size=None):
    """The shard set or image folder at `path`, the latter read at `size`. Raises UserError for
    anything else."""
    path = Path(path)
    if (path / "index.json").is_file() or (path / "plan.json").is_file():
        shards = Shards(path)
        sizes = {shards.size, shards.index["options"]["res"]}
        if size not in {None, *sizes} or channels not in {None, shards.channels}:
            held = f"{shards.kind} of size {shards.size} with {shards.channels} channels"
            raise UserError(
                f"{path} holds {held}, not size {size}, channels {channels}; encode those elsewhere"
            )
        return shards
    return ImageFolder(path, size, channels, exif, default_size)


# Order and reading ahead


class _Steps(torch.utils.data.Dataset):
    """What a worker does for one (indices, flips). A foreseen error travels as a value: raised in a
    worker it would reach the user inside the worker's traceback."""

    def __init__(self, data, on_bad):
        self.data, self.on_bad = data, on_bad

    def __getitem__(self, step):
        bad = []
        try:
            return (
                *self.data.batch(
                    *step, None if self.on_bad == "error" else bad, self.on_bad == "drop"
                ),
                bad,
            )
        except UserError as error:
            return error


STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # signals that ask to save and end


def _follow(_):
    """A worker leaves signals to stop to the main process, which may have a batch to finish, and
    ends when that does."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _kill(processes):
    for process in processes:
        process.kill()


def loader(data, steps, workers=None, on_bad="error", pin=False):
    """Yield (images, labels, bad) of `data.batch` for each (indices, flips) of the iterable
    `steps`, in order, read ahead by `workers` processes (None: this machine's share of cores, at
    most 8; for shards 0).

    `on_bad`: "error" raises an unreadable image's BadImage here; "skip" puts the next readable item
    in its place and its message in the list `bad`, "drop" only the latter. A worker that dies is a
    UserError. `pin`: page-locked memory, for copies to CUDA."""
    if workers is None:
        share = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = (
            0
            if isinstance(data, Shards)
            else min(8, max(1, share // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        )
    reader = torch.utils.data.DataLoader(
        _Steps(data, on_bad),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        # its own: the global one stays untouched
        worker_init_fn=_follow,
        generator=torch.Generator(),
    )
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if main and workers else None
    others, kill = set(multiprocessing.active_children()), None
    held = signal.pthread_sigmask(
        signal.SIG_BLOCK, STOPS
    )  # a worker that is not yet deaf to them would die of them
    try:
        try:
            batches = iter(reader)
            kill = functools.partial(_kill, set(multiprocessing.active_children()) - others)
            atexit.register(
                kill
            )  # or Python would wait for ever, at its end, for workers that ignore its SIGTERM
            if (
                handler is not None
            ):  # PyTorch's would raise for a dead worker wherever the main thread is, not only here
                signal.signal(signal.SIGCHLD, handler)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{reason.rstrip('. ')}; out of memory, perhaps: run again with fewer --workers"
        ) from None
    finally:
        batches = None  # ends the workers now, though a traceback may hold this frame
        atexit.unregister(kill)
