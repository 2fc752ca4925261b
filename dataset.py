"""Images and latents for training: how images are read wherever they lie (containers.py), finished
shards, and reading ahead.

`open_data` gives `Images` or `Shards` (shards.py), which look alike: `kind`, `size`,
`channels`, `classes`, `labels`, `flips` (whether items can be mirrored), `fingerprint`, `words`
(what it is, in a line), `len` and `batch`. `loader` reads their batches
ahead, in the order that it is given (randomness.Order)."""

import ours

import abc
import atexit
import functools
import hashlib
import io
import math
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
from tqdm import tqdm

import containers
import shards
import storage
from containers import BadImage
from shards import Shards, flipped
from storage import UserError

FORMATS = ("JPEG", "PNG", "WEBP")  # told by content, not by extension
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}  # Pillow's, without colour
PROBED = 64  # images whose headers tell size and channels of a folder
MOST_LATENT = 2**26  # bytes of a file of latents
SAMPLED = 256  # items of a folder whose contents are hashed at each start
MOST_WORKERS = 8  # reading processes, unless told otherwise
NPY = {  # by the file format's version
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # signals that ask to save and end


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


def read_image(
    file: str | Path | io.BytesIO,
    size: int,
    channels: int = 3,
    exif: bool = False,
    place: str | None = None,
) -> np.ndarray:
    """The centre crop of a JPEG, PNG or WebP file, uint8 (size, size, channels), channels 1 or 3.
    `place` is what messages call it, its path unless given.

    16-bit grey is divided by 257, transparency is laid on white, CMYK and palettes become RGB; an
    animation gives its first frame. EXIF rotation is ignored, as ADM does, unless `exif`. Raises
    BadImage where the file is at fault, UserError where it can't be reached or is in colour though
    `channels` is 1."""
    place = place or str(file)
    image = _decode(file, place, exif)
    if max(image.size) / min(image.size) * size**2 > Image.MAX_IMAGE_PIXELS:
        raise BadImage(place, f"is too elongated to crop ({image.width}×{image.height})")
    image = _plain(image)
    if channels == 1 and image.mode == "RGB" and not _is_grey(image):
        raise UserError(
            f"{place} is in colour but the data was taken for grey; remove it or read 3 channels"
        )
    image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(center_crop(image, size)).reshape(size, size, channels)


def _decode(file, place, exif):
    """The PIL image in a file. Raises as read_image."""
    try:
        if not isinstance(file, io.BytesIO):
            storage.check_file(file)
        with warnings.catch_warnings():
            # Pillow's remarks on harmless damage, such as odd EXIF blocks
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                image.load()
                if exif:
                    return ImageOps.exif_transpose(image)
                return image
    except MemoryError:
        raise
    # whatever an untrusted file makes the decoder raise, the file is at fault
    except Exception as error:
        raise _blame(file, place, error) from None


def _blame(file, place, error):
    """The UserError for what Pillow raised on opening or decoding a file."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(
            f"{place} can't be read ({error.strerror}); has it been moved, or is the disk failing?"
        )
    if isinstance(error, UnidentifiedImageError):
        if _is_empty(file):
            return BadImage(place, "is empty")
        return BadImage(place, "is not a JPEG, PNG or WebP image")
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return BadImage(place, f"claims more than {Image.MAX_IMAGE_PIXELS:,} pixels")
    reason = " ".join(str(error).split())
    return BadImage(place, reason or type(error).__name__)


def _is_empty(file):
    if isinstance(file, io.BytesIO):
        return not file.getbuffer()
    return os.path.getsize(file) == 0


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


# ----------------------------------------------------------------------------------- many of them


class Listed(abc.ABC):
    """What a listing (containers.py) names, as data: the classes, and items read one by one.

    A subclass has `kind`, `noun`, `size`, `channels`, the `shape` and `dtype` of an item, and what
    reads one; `flips` is whether items can be mirrored."""

    flips = True

    def __init__(self, listing: containers.Listing):
        self.listing = listing
        self.root = listing.root
        self.words = f"{listing.root}: {listing.words}"
        self.classes = listing.classes
        self.labels = listing.labels

    def __len__(self):
        return len(self.listing)

    @property
    def item_bytes(self) -> int:
        """Bytes of an item as it is read."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def name(self, index: int) -> str:
        """Item `index`, below the root."""
        return self.listing.members[index]

    def place(self, index: int) -> str:
        """Item `index`, as messages call it."""
        return self.listing.place(index)

    def content(self, index: int) -> bytes:
        """Item `index`'s file. Raises as `read`."""
        file = self.listing.open(index)
        if isinstance(file, io.BytesIO):
            return file.getvalue()
        try:
            storage.check_file(file)
            return Path(file).read_bytes()
        except OSError as error:
            raise _blame(file, file, error) from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of class, name and file size of all items, in order: the same for the same
        images, wherever and in whatever they lie."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.listing.names):
            line = f"{name}\0{self.listing.size(index)}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    @functools.cached_property
    def sample(self) -> str:
        """Hex SHA-256 of the contents of up to SAMPLED items, evenly spaced: most of what a file of
        another content and the same size could be told by, at once."""
        count = min(SAMPLED, len(self))
        return self._contents(np.linspace(0, len(self) - 1, count).astype(int))

    def verify(self, known: str | None = None, quiet: bool = False) -> str:
        """Hex SHA-256 of all items' contents, each of which is read. Raises UserError where that is
        not what is `known`."""
        bar = tqdm(
            range(len(self)), desc="verifying", unit=self.noun.removesuffix("s"), disable=quiet
        )
        found = self._contents(bar)
        if known not in (None, found):
            raise UserError(
                f"{self.root} holds other {self.noun} than it did (of the same names and sizes); "
                "restore them, or choose another --out"
            )
        return found

    def _contents(self, indices):
        digest = hashlib.sha256()
        for index in indices:
            try:
                content = hashlib.sha256(self.content(int(index))).hexdigest()
            except BadImage:  # told where it is read
                content = "damaged"
            digest.update(f"{index} {content}\n".encode())
        return digest.hexdigest()

    @abc.abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Item `index`. Raises BadImage where its file is at fault, UserError where that can't be
        reached."""

    def batch(
        self,
        indices: Sequence[int],
        flips: Sequence[bool],
        bad: list[str] | None = None,
        drop: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, C, H, W), mirrored where `flips` (B,) says so, or latents as they are,
        and labels int64 (B,).

        An unreadable item raises BadImage; with a list `bad` its message is appended there, and
        the next readable one takes its place, or with `drop` none does: B is then smaller."""
        found = np.empty((len(indices), *self.shape), self.dtype)
        items = []
        kept = []
        for index, flip in zip(indices, flips, strict=True):
            readable = self._readable(int(index), bad, drop)
            if readable is not None:
                item, found[len(items)] = readable
                items.append(item)
                kept.append(flip)
        data = self.joined(found[: len(items)], np.asarray(kept, bool))
        return data, torch.from_numpy(self.labels[items])

    def joined(self, found, flips):
        """What `batch` gives of these items."""
        return torch.from_numpy(found)

    def _readable(self, index, bad, drop):
        """(item, its data) of `index`, or of the first one after it that can be read; None where it
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
            f"{self.root}: none of the {len(self):,} {self.noun} can be read; the last: {bad[-1]}"
        )


class Images(Listed):
    """Images in a folder, a zip or tars, in any layout that `containers.find` knows.

    `size` None takes the images' own where a sample shares one square size, else `default_size`;
    `channels` None is 1 where the sample is all grey, else 3. `classes` takes only these. Raises
    UserError as `find` does."""

    kind = "pixels"
    noun = "images"
    dtype = np.uint8

    def __init__(
        self,
        root: str | Path,
        size: int | None = None,
        channels: int | None = None,
        *,
        exif: bool = False,
        default_size: int | None = None,
        classes: Sequence[str] | None = None,
    ):
        super().__init__(containers.find(root, classes))
        self.exif = exif
        self.size = size
        self.channels = channels
        if size is None or channels is None:
            self._probe(default_size)
        self.shape = (self.size, self.size, self.channels)

    def _probe(self, default_size):
        """Set `size` and `channels`, where they are None, from the headers of up to PROBED images,
        evenly spaced."""
        examples = {}  # size → place of one such image
        grey = True
        failure = None
        for index in np.linspace(0, len(self) - 1, min(PROBED, len(self))).astype(int):
            place = self.place(index)
            try:
                file = self.listing.open(index)
            except BadImage as error:
                failure = error
                continue
            try:
                if not isinstance(file, io.BytesIO):
                    storage.check_file(file)
                with Image.open(file, formats=FORMATS) as image:
                    examples[image.size] = place
                    grey &= image.mode in GREY
            # as in _decode; the file is met again, and reported, on reading
            except Exception as error:
                failure = _blame(file, place, error)
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
        found = [f"{place} is {w}×{h}" for (w, h), place in examples.items()]
        raise UserError(
            f"{self.root}: not of one square size ({', '.join(found[:2])}); give --res, the "
            "size to crop to"
        )

    def read(self, index: int) -> np.ndarray:
        """Image `index`, uint8 (size, size, channels). Raises as read_image."""
        file = self.listing.open(index)
        return read_image(file, self.size, self.channels, self.exif, self.place(index))

    def joined(self, found, flips):
        return flipped(found, flips)


class LatentFiles(Listed):
    """Latents in EDM2's form: files float32 (8, h, w) of means and standard deviations, which
    become means and log-variances, float16 (1, 2, 4, h, w). Raises UserError for other forms."""

    kind = "latents"
    noun = "latents"
    dtype = np.float16
    channels = 4
    flips = False

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None):
        super().__init__(containers.find(root, classes, containers.LATENTS))
        self.size = self._first_size()
        self.shape = (1, 2, self.channels, self.size, self.size)

    def _first_size(self):
        """Side of the first latent that can be read, of PROBED at most."""
        for index in range(min(PROBED, len(self))):
            try:
                return self.moments(index).shape[-1]
            except BadImage as error:
                failure = error
        raise failure

    def moments(self, index: int) -> np.ndarray:
        """Means and deviations of latent `index` as its file has them. Raises BadImage."""
        place = self.place(index)
        if self.listing.size(index) > MOST_LATENT:
            raise BadImage(place, f"has more than {MOST_LATENT:,} bytes, which is no latent")
        file = io.BytesIO(self.content(index))
        try:
            shape, fortran, dtype = NPY[np.lib.format.read_magic(file)](file)
        except Exception:  # whatever an untrusted file makes the parser raise, it is at fault
            raise BadImage(place, "is no NumPy array") from None
        if dtype != np.float32 or fortran or len(shape) != 3 or shape[0] != 2 * self.channels:
            raise BadImage(place, f"is {dtype} {shape}; expected float32 (8, h, w)")
        data = file.read()
        if len(data) != 4 * np.prod(shape, dtype=object) or shape[1] != shape[2] or not data:
            raise BadImage(place, f"is {shape} with {len(data):,} bytes; expected a square, whole")
        return np.frombuffer(data, np.float32).reshape(shape)

    def read(self, index: int) -> np.ndarray:
        """Latent `index`, float16 (1, 2, 4, h, w) of mean and log-variance."""
        mean, deviation = np.split(self.moments(index), 2)
        place = self.place(index)
        if mean.shape[-1] != self.size:
            raise BadImage(place, f"is of side {mean.shape[-1]}; the first is of {self.size}")
        if not (deviation > 0).all():
            raise BadImage(place, "has deviations that are not above 0; is it in EDM2's form?")
        with np.errstate(over="ignore"):
            found = np.stack([mean, 2 * np.log(deviation)]).astype(np.float16)[None]
        if not np.isfinite(found).all():
            raise BadImage(place, "holds numbers beyond half precision")
        return found


# ------------------------------------------------------------------------------------- what it is


def open_data(
    path: str | Path,
    size: int | None = None,
    channels: int | None = None,
    *,
    exif: bool = False,
    default_size: int | None = None,
    classes: Sequence[str] | None = None,
) -> Images | Shards:
    """The shard set at `path`, or the images there in a folder or container, which are read at
    `size`; of these classes alone unless None. Raises UserError for anything else."""
    if not shards.is_set(path):
        return Images(path, size, channels, exif=exif, default_size=default_size, classes=classes)
    found = Shards(path, classes)
    sizes = (None, found.size, found.index["options"]["res"])
    if size not in sizes or channels not in (None, found.channels):
        raise UserError(
            f"{path} holds {found.kind} of size {found.size} with {found.channels} channels, not "
            f"size {size}, channels {channels}; encode those elsewhere"
        )
    return found


# ---------------------------------------------------------------------------------- reading ahead


def loader(
    data: "Data",
    steps: Iterable,
    workers: int | None = None,
    *,
    on_bad: str = "error",
    pin: bool = False,
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


Data = Images | LatentFiles | Shards  # what a run trains on


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
