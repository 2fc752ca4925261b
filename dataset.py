"""Images and latents for training: folders of images, finished shards, and reading ahead.

`open_data` gives an `ImageFolder` or `Shards` (shards.py), which look alike: `kind`, `size`,
`channels`, `classes`, `labels`, `fingerprint`, `len` and `batch`. `loader` reads their batches
ahead, in the order that it is given (randomness.Order)."""

import ours

import atexit
import functools
import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

import shards
from shards import Shards, flipped
from storage import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
KNOWN = ", ".join(EXTENSIONS)
FORMATS = ("JPEG", "PNG", "WEBP")  # told by content, not by extension
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}  # Pillow's, without colour
PROBED = 64  # images whose headers tell size and channels of a folder
MOST_WORKERS = 8  # reading processes, unless told otherwise
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # signals that ask to save and end


class BadImage(UserError):
    """One image can't be used: a damaged or mislabelled file, not a failing disk."""

    def __init__(self, path, reason):
        super().__init__(path, reason)

    def __str__(self):
        path, reason = self.args
        return f"{path}: {reason}"


# ------------------------------------------------------------------------------------- one image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop of a PIL image to (size, size): halved with a box filter while the short side is
    at least twice `size`, then bicubic to `size`, then the centre. Halving floors both sides, the
    offset floors."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path: str | Path, size: int, channels: int = 3, exif: bool = False) -> np.ndarray:
    """The centre crop of a JPEG, PNG or WebP file, uint8 (size, size, channels), channels 1 or 3.

    16-bit grey is divided by 257, transparency is laid on white, CMYK and palettes become RGB; an
    animation gives its first frame. EXIF rotation is ignored, as ADM does, unless `exif`. Raises
    BadImage where the file is at fault, UserError where it can't be reached or is in colour though
    `channels` is 1."""
    image = _decode(path, exif)
    if max(image.size) / min(image.size) * size**2 > Image.MAX_IMAGE_PIXELS:
        raise BadImage(path, f"is too elongated to crop ({image.width}×{image.height})")
    image = _plain(image)
    if channels == 1 and image.mode == "RGB" and not _is_grey(image):
        raise UserError(
            f"{path} is in colour but the data was taken for grey; remove it or read 3 channels"
        )
    image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(center_crop(image, size)).reshape(size, size, channels)


def _decode(path, exif):
    """The PIL image in a file. Raises as read_image."""
    try:
        with warnings.catch_warnings():
            # Pillow's remarks on harmless damage, such as odd EXIF blocks
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                if exif:
                    return ImageOps.exif_transpose(image)
                return image
    except MemoryError:
        raise
    # whatever an untrusted file makes the decoder raise, the file is at fault
    except Exception as error:
        raise _blame(path, error) from None


def _blame(path, error):
    """The UserError for what Pillow raised on opening or decoding `path`."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(
            f"{path} can't be read ({error.strerror}); has it been moved, or is the disk failing?"
        )
    if isinstance(error, UnidentifiedImageError):
        if os.path.getsize(path) == 0:
            return BadImage(path, "is empty")
        return BadImage(path, "is not a JPEG, PNG or WebP image")
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return BadImage(path, f"claims more than {Image.MAX_IMAGE_PIXELS:,} pixels")
    reason = " ".join(str(error).split())
    return BadImage(path, reason or type(error).__name__)


def _plain(image):
    """A PIL image of any mode as L or RGB, 8 bits."""
    grey = image.mode in GREY
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if grey else "RGB")


def _is_grey(image):
    red, green, blue = (band.tobytes() for band in image.split())
    return red == green == blue


# ----------------------------------------------------------------------------- a folder of images


class Paths(Sequence):
    """Paths below `root`, in one block of bytes: worker processes share it, while reading a list of
    strings would copy it page by page through the reference counts."""

    def __init__(self, root: str | Path, names: Sequence[str]):
        names = [os.fsencode(name) for name in names]
        self.root = os.fspath(root)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.block = b"".join(names)

    def __len__(self):
        return len(self.ends)

    def name(self, index: int) -> str:
        """Path relative to the root."""
        index = range(len(self))[index]
        first = self.ends[index - 1] if index else 0
        return os.fsdecode(self.block[first : self.ends[index]])

    def __getitem__(self, index):
        return os.path.join(self.root, self.name(index))


class ImageFolder:
    """One folder of images per class, numbered by sorted name, or images alone: one class.

    `size` None takes the images' own where a sample shares one square size, else `default_size`;
    `channels` None is 1 where the sample is all grey, else 3. Raises UserError for a folder that is
    neither of the two kinds, or empty."""

    kind = "pixels"

    def __init__(
        self,
        root: str | Path,
        size: int | None = None,
        channels: int | None = None,
        *,
        exif: bool = False,
        default_size: int | None = None,
    ):
        self.root = Path(root)
        self.exif = exif
        folders, images = _list(self.root)
        _check_kind(root, folders, images)
        if folders:
            self.classes = folders
            groups = [_list_class(self.root, name) for name in folders]
        else:
            self.classes = [self.root.resolve().name]
            groups = [images]
        self.labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self.paths = Paths(self.root, [name for group in groups for name in group])
        self.size = size
        self.channels = channels
        if size is None or channels is None:
            self._probe(default_size)

    def __len__(self):
        return len(self.paths)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of relative paths and file sizes, in order."""
        digest = hashlib.sha256()
        for index, path in enumerate(self.paths):
            line = f"{self.paths.name(index)}\0{os.stat(path).st_size}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _probe(self, default_size):
        """Set `size` and `channels`, where they are None, from the headers of up to PROBED images,
        evenly spaced."""
        examples = {}  # size → path of one such image
        grey = True
        failure = None
        for index in np.linspace(0, len(self) - 1, min(PROBED, len(self))).astype(int):
            path = self.paths[index]
            try:
                with Image.open(path, formats=FORMATS) as image:
                    examples[image.size] = path
                    grey &= image.mode in GREY
            # as in _decode; the file is met again, and reported, on reading
            except Exception as error:
                failure = _blame(path, error)
        if not examples:
            raise failure
        if self.channels is None:
            self.channels = 1 if grey else 3
        if self.size is None:
            self.size = self._own_size(examples, default_size)

    def _own_size(self, examples, default_size):
        """The one square size among those of `examples`, else `default_size`."""
        (width, height), *others = examples
        if width == height and not others:
            return width
        if default_size:
            return default_size
        found = [f"{path} is {w}×{h}" for (w, h), path in examples.items()]
        raise UserError(
            f"{self.root}: not of one square size ({', '.join(found[:2])}); give --res, the "
            "size to crop to"
        )

    def read(self, index: int) -> np.ndarray:
        """Image `index`, uint8 (size, size, channels). Raises as read_image."""
        return read_image(self.paths[index], self.size, self.channels, self.exif)

    def batch(
        self,
        indices: Sequence[int],
        flips: Sequence[bool],
        bad: list[str] | None = None,
        drop: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, C, H, W), mirrored where `flips` (B,) says so, and labels int64 (B,).

        An unreadable image raises BadImage; with a list `bad` its message is appended there, and
        the next readable item takes its place, or with `drop` none does: B is then smaller."""
        images = np.empty((len(indices), self.size, self.size, self.channels), np.uint8)
        items = []
        kept = []
        for index, flip in zip(indices, flips, strict=True):
            found = self._readable(int(index), bad, drop)
            if found is not None:
                item, images[len(items)] = found
                items.append(item)
                kept.append(flip)
        pixels = flipped(images[: len(items)], np.asarray(kept, bool))
        return pixels, torch.from_numpy(self.labels[items])

    def _readable(self, index, bad, drop):
        """(item, image) of `index`, or of the first one after it that can be read; None where it
        can't and is dropped."""
        tries = 1 if drop else len(self)
        for item in range(index, index + tries):
            item %= len(self)
            try:
                return item, self.read(item)
            except BadImage as error:
                if bad is None:
                    raise
                bad.append(str(error))
        if drop:
            return None
        raise UserError(
            f"{self.root}: none of the {len(self):,} images can be read; the last: {bad[-1]}"
        )


def _check_kind(root, folders, images):
    if folders and images:
        raise UserError(
            f"{root} mixes images ({images[0]}) and folders ({folders[0]}); expected one folder of "
            "images per class, or images alone"
        )
    if not folders and not images:
        raise UserError(
            f"{root} holds no images ({KNOWN}); expected one folder of them per class, or images "
            "alone"
        )


def _list(folder):
    """Sorted names of the folders and of the images in `folder`, hidden ones left out."""
    folders = []
    images = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                    images.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a folder; expected images, one folder per class, or a shard set"
        ) from None
    return sorted(folders), sorted(images)


def _list_class(root, name):
    """Relative paths of the images of class folder `name`, sorted."""
    folders, images = _list(root / name)
    if not images:
        advice = f"choose one of the folders in {root}" if folders else "fill or remove it"
        raise UserError(
            f"{root / name} holds no images ({KNOWN}) though its place makes it a class; {advice}"
        )
    return [os.path.join(name, image) for image in images]


# ------------------------------------------------------------------------------------- what it is


def open_data(
    path: str | Path,
    size: int | None = None,
    channels: int | None = None,
    *,
    exif: bool = False,
    default_size: int | None = None,
) -> ImageFolder | Shards:
    """The shard set or image folder at `path`, the latter read at `size`. Raises UserError for
    anything else."""
    if not shards.is_set(path):
        return ImageFolder(path, size, channels, exif=exif, default_size=default_size)
    found = Shards(path)
    sizes = (None, found.size, found.index["options"]["res"])
    if size not in sizes or channels not in (None, found.channels):
        raise UserError(
            f"{path} holds {found.kind} of size {found.size} with {found.channels} channels, not "
            f"size {size}, channels {channels}; encode those elsewhere"
        )
    return found


# ---------------------------------------------------------------------------------- reading ahead


def loader(
    data, steps: Iterable, workers: int | None = None, *, on_bad: str = "error", pin: bool = False
) -> Iterator[tuple]:
    """Yield (images, labels, bad) of `data.batch` for each (indices, flips) of the iterable
    `steps`, in order, read ahead by `workers` processes (None: this machine's share of cores, at
    most MOST_WORKERS; for shards 0).

    `on_bad`: "error" raises an unreadable image's BadImage here; "skip" puts the next readable item
    in its place and its message in the list `bad`, "drop" only the latter. A worker that dies is a
    UserError. `pin`: page-locked memory, for copies to CUDA."""
    if workers is None:
        workers = _share_of_cores(data)
    reader = torch.utils.data.DataLoader(
        _Steps(data, on_bad),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_follow,
        generator=torch.Generator(),  # its own: the global one stays untouched
    )
    batches = None
    kill = None
    try:
        batches, kill = _start(reader)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise UserError(
            f"{reason}; out of memory, perhaps: run again with fewer --workers"
        ) from None
    finally:
        batches = None  # ends the workers now, though a traceback may hold this frame
        atexit.unregister(kill)


def naming_the_way_out(batches: Iterable) -> Iterator:
    """The batches of `loader`; what is said of an image that can't be used names the option that
    leaves it out."""
    try:
        yield from batches
    except BadImage as error:
        path, reason = error.args
        advice = "replace or remove it, or leave such images out with --on-bad-image skip"
        raise BadImage(path, f"{reason}; {advice}") from None


def _share_of_cores(data):
    """How many processes read `data`, unless told otherwise."""
    if isinstance(data, Shards):
        return 0
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(MOST_WORKERS, max(1, cores // processes))


class _Steps(torch.utils.data.Dataset):
    """What a worker does for one (indices, flips). A foreseen error travels as a value: raised in a
    worker it would reach the user inside the worker's traceback."""

    def __init__(self, data, on_bad):
        self.data = data
        self.on_bad = on_bad

    def __getitem__(self, step):
        indices, flips = step
        bad = []
        try:
            if self.on_bad == "error":
                images, labels = self.data.batch(indices, flips)
            else:
                images, labels = self.data.batch(indices, flips, bad, self.on_bad == "drop")
        except UserError as error:
            return error
        return images, labels, bad


def _start(reader):
    """The running iterator of a DataLoader, and what kills its workers at Python's end, which would
    wait for ever for workers that ignore its SIGTERM."""
    handler = None
    if reader.num_workers and threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
    others = set(multiprocessing.active_children())
    # a worker that is not yet deaf to them would die of them
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        batches = iter(reader)
        kill = functools.partial(_kill, set(multiprocessing.active_children()) - others)
        atexit.register(kill)
        if handler is not None:
            # PyTorch's would raise for a dead worker wherever the main thread is, not only here
            signal.signal(signal.SIGCHLD, handler)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return batches, kill


def _kill(processes):
    for process in processes:
        process.kill()


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
