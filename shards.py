"""A shard set: images or latents in the form that training reads, in a folder of their own.

    shard-00000.safetensors    `labels` (n,) int64 and `data`: pixels uint8 (n, H, W, C), or latents
                               float16 (n, 2, 2, C, h, w), whose second axis is the image and its
                               horizontal flip, the third mean and log-variance in the VAE's units;
                               where the index says "flips": false, of the image alone
    index.json                 the plan, what there is of each class, and a row for each shard; it
                               is written last
    plan.json                  until then: what the index will say, as far as it is known
    shard-00000.json           until then: a finished shard's row, with its hash

`Shards` reads a finished set. `write_shard` and `write_index` make one; `write_row` and `read_rows`
keep account of an unfinished one."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import containers
import schema
from schema import SHA256, fields, flag, many, maybe, one_of, real, text, whole
from storage import UserError, check_file, read_json, sha256, unreadable, write_json, writing

FORMAT = 1  # of the set
HEADER = 512  # bytes before a shard's data
LONGEST_HEADER = 2**20  # bytes that are read as a header, whoever wrote it
DTYPES = {"U8": np.uint8, "F16": np.float16, "I64": np.int64}  # safetensors' names
DATA_DTYPE = {"pixels": "U8", "latents": "F16"}
ROW = "shard-[0-9][0-9][0-9][0-9][0-9].json"
MOST_SHARDS = 10**5  # that five digits name
MOST_ITEMS = 10**10
MOST_SIDE = 2**16
NAME = re.compile(r"[^/\\\x00]+\.safetensors")

# what our files look like (schema.py)
_ROW = {"file": text(NAME), "count": whole(0, MOST_ITEMS), "sha256": text()}
_SKIPPED = many(fields({"item": whole(0, MOST_ITEMS), "image": text(), "reason": text()}))
ROW_SHAPE = fields({**_ROW, "sha256": text(SHA256), "skipped": _SKIPPED})
_SET = {  # what it takes to be read
    "format": one_of(FORMAT),
    "kind": one_of(*DATA_DTYPE),
    "size": whole(1, MOST_SIDE),
    "channels": whole(1, 64),
    "classes": many(text(), 1),
    "options": fields({"res": whole(1, MOST_SIDE)}, {"exif": flag, "crop": text(), "from": text()}),
}
_SOURCE = {  # and to be gone on with
    "source": fields(
        {"items": whole(1, MOST_ITEMS), "fingerprint": text(SHA256)}, {"sample": text(SHA256)}
    ),
    "shard_size": whole(1, MOST_ITEMS),
}
_OF_LATENTS = {"flips": flag, "vae": text(), "vae_sha256": maybe(text(SHA256)), "scale": real(0)}
_SHARDS = {"shards": many(fields(_ROW), 1, MOST_SHARDS)}
_COUNTS = {
    "items": whole(1, MOST_ITEMS),
    "counts": many(whole(0, MOST_ITEMS)),
    "skipped": _SKIPPED,
}
INDEX_SHAPE = fields({**_SET, **_SHARDS}, {**_SOURCE, **_COUNTS, **_OF_LATENTS})
ENCODED_SHAPES = {  # of what encode wrote
    "index.json": fields({**_SET, **_SOURCE, **_SHARDS, **_COUNTS}, _OF_LATENTS),
    "plan.json": fields({**_SET, **_SOURCE}, _OF_LATENTS),
}
_SPAN = fields(
    {
        "dtype": one_of(*DTYPES),
        "shape": many(whole(), 1, 8),
        "data_offsets": many(whole(), 2, 2),
    }
)
HEADER_SHAPE = fields({"data": _SPAN, "labels": _SPAN})


def item_shape(plan: dict) -> tuple[int, ...]:
    """Shape of one item's data in the set of this plan or index: (H, W, C) or (2, 2, C, h, w), of
    latents without flips (1, 2, C, h, w)."""
    size = plan["size"]
    channels = plan["channels"]
    if plan["kind"] == "pixels":
        return size, size, channels
    views = 2 if plan.get("flips", True) else 1
    return views, 2, channels, size, size


def item_bytes(plan: dict) -> int:
    """Bytes that one item takes in the set of this plan or index: its data and its label."""
    dtype = np.dtype(DTYPES[DATA_DTYPE[plan["kind"]]])
    return int(np.prod(item_shape(plan))) * dtype.itemsize + np.dtype(np.int64).itemsize


def flipped(images: np.ndarray, flips: np.ndarray) -> torch.Tensor:
    """uint8 array (B, H, W, C), changed in place → tensor (B, C, H, W), mirrored where `flips` (B,)
    says so. In NumPy: one thread never waits."""
    images[flips] = images[flips, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


# --------------------------------------------------------------------------------------- reading


class Shards:
    """A finished shard set, memory-mapped, or the items of some of its classes. `index` is its
    parsed index.json; `size` of latents is their grid's side (32 for images of 256); `flips` is
    whether items can be mirrored. Raises UserError where a file is missing, damaged or of another
    format, or a class is unknown."""

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None):
        self.root = Path(root)
        self.index = read_index(root)
        self.kind = self.index["kind"]
        self.size = self.index["size"]
        self.channels = self.index["channels"]
        self.classes = self.index["classes"]
        self.flips = self.index.get("flips", True)
        self.data = []
        labels = []
        for row in self.index["shards"]:
            data, numbers = self._map(row)
            self.data.append(data)
            labels.append(numbers)
        self.labels = np.concatenate(labels)
        self.starts = np.cumsum([0, *map(len, labels)])
        self.words = f"{root}: {len(self.labels):,} {self.kind} that encode wrote"
        self.chosen = classes
        self.items = None  # which the labels are of; None: all
        if classes is not None:
            self._choose(classes)

    def _choose(self, classes):
        """Keep the items of these classes."""
        known = self.classes
        self.classes = containers.choose(self.root, known, classes)
        numbers = np.full(len(known), -1)
        numbers[[known.index(name) for name in self.classes]] = np.arange(len(self.classes))
        labels = numbers[self.labels]
        self.items = np.flatnonzero(labels >= 0)
        self.labels = labels[self.items]
        if len(self.items) == 0:
            raise UserError(f"{self.root} holds no items of the chosen classes")

    def _map(self, row):
        """The data and labels of a row's shard, checked against the index."""
        path = self.root / row["file"]
        data, labels = map_shard(path)
        dtype = DTYPES[DATA_DTYPE[self.kind]]
        if data.dtype != dtype or data.shape != (row["count"], *item_shape(self.index)):
            raise damaged(path, f"holds {data.dtype} {data.shape}, index.json says otherwise")
        if labels.dtype != np.int64 or len(labels) != len(data):
            raise damaged(path, f"has {len(labels)} {labels.dtype} labels for {len(data)} items")
        if ((labels < 0) | (labels >= len(self.classes))).any():
            raise damaged(path, f"has labels beyond its {len(self.classes)} classes")
        return data, labels

    def __reduce__(self):  # a worker process maps the files itself
        return Shards, (self.root, self.chosen)

    def __len__(self):
        return len(self.labels)

    sample = None  # the index has the hashes of all contents

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of index.json, which holds every shard's; of that and the classes, if these
        were chosen."""
        digest = sha256(self.root / "index.json")
        if self.items is None:
            return digest
        return hashlib.sha256("\n".join([digest, *self.classes]).encode()).hexdigest()

    def verify(self, known: None = None, quiet: bool = False) -> None:
        """Read every shard and compare it with the hash in the index. Raises UserError where one
        differs."""
        found = damaged_shards(self.root, self.index, quiet)
        if found:
            raise UserError(
                f"{'; '.join(found)}. Run the encode that wrote {self.root} again: it redoes them"
            )

    def batch(
        self, indices: Sequence[int], flips: Sequence[bool], bad=None, drop=False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels uint8 (B, C, H, W), or latents float16 (B, 2, C, h, w): mean and log-variance of
        the image, or of its flip where `flips` (B,) says so and there are flips; and labels int64
        (B,). No item is bad here."""
        indices = np.asarray(indices)
        flips = np.asarray(flips, bool) & self.flips
        labels = torch.from_numpy(self.labels[indices])
        if self.items is not None:
            indices = self.items[indices]
        if self.kind == "pixels":
            return flipped(self._gather(indices), flips), labels
        return torch.from_numpy(self._gather(indices, flips.astype(int))), labels

    def _gather(self, indices, halves=None):
        """The data of these items, read shard by shard; `halves` (B,) picks from their first
        axis."""
        shape = item_shape(self.index)
        if halves is not None:
            shape = shape[1:]
        found = np.empty((len(indices), *shape), self.data[0].dtype)
        shards = np.searchsorted(self.starts, indices, "right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            where = indices[rows] - self.starts[shard]
            if halves is not None:
                where = where, halves[rows]
            found[rows] = self.data[shard][where]
        return found


def is_set(root: str | Path) -> bool:
    """Whether folder `root` holds a shard set, finished or not."""
    return (Path(root) / "index.json").is_file() or (Path(root) / "plan.json").is_file()


def read_index(root: str | Path) -> dict:
    """The parsed index.json of a finished shard set. Raises UserError where it is missing, damaged
    or of another format."""
    path = Path(root) / "index.json"
    if not path.is_file() and (path.parent / "plan.json").is_file():
        raise UserError(
            f"{root} is an unfinished encode; run the same dimr encode again, and it "
            "goes on where it was"
        )
    index = _read(path, INDEX_SHAPE)
    try:
        _check_sums(index)
    except ValueError as error:
        raise _damaged_index(path, error) from None
    return index


def read_encoded(root: str | Path, name: str = "index.json") -> dict:
    """As `read_index`, of what encode wrote and can go on with, its sums unchecked; plan.json is
    that of an unfinished set."""
    return _read(Path(root) / name, ENCODED_SHAPES[name])


def _read(path, shape):
    index = read_json(path, fields({"format": schema.anything, "kind": text()}))
    if index["format"] != FORMAT or index["kind"] not in DATA_DTYPE:
        raise UserError(
            f"{path} is not of shard format {FORMAT}; encode elsewhere, or use the dimr "
            "that wrote it"
        )
    try:
        schema.check(index, shape)
    except schema.Misfit as misfit:
        raise _damaged_index(path, misfit) from None
    return index


def _damaged_index(path, reason):
    return UserError(
        f"{path} is damaged ({reason}); restore it, or delete it and run the dimr encode that "
        "wrote it again"
    )


def _check_sums(index):
    """Raise ValueError where the parts of an index don't agree with each other."""
    rows = index.get("shards", ())
    names = {row["file"] for row in rows}
    if len(names) < len(rows):
        raise ValueError("two rows name the same shard")
    count = sum(row["count"] for row in rows)
    if count != index.get("items", count):
        raise ValueError(f"it names {index['items']:,} items and its shards have {count:,}")
    counts = index.get("counts", [count])
    if sum(counts) != count or len(counts) not in (1, len(index["classes"])):
        raise ValueError(f"its counts by class don't come to {count:,} items")


def map_shard(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Memory-mapped data (n, …) and labels (n,) of a shard, its header checked against the file's
    size. Raises UserError where they don't agree."""
    try:
        start, header, rest = _read_header(path)
        data = _span(header, "data")
        labels = _span(header, "labels")
        before, after = sorted([data, labels], key=lambda span: span.first)
        if (before.first, before.last, after.last) != (0, after.first, rest):
            raise ValueError(f"its offsets do not fit its {start + rest:,} bytes")
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise damaged(path, f"is not a whole shard ({error})") from None
    numbers = np.fromfile(path, labels.dtype, labels.shape[0], offset=start + labels.first)
    if 0 in data.shape:
        return np.empty(data.shape, data.dtype), numbers
    return np.memmap(path, data.dtype, "r", start + data.first, data.shape), numbers


def _read_header(path):
    """(where a shard's data begins, its parsed header, bytes from there to the file's end)."""
    check_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if length >= LONGEST_HEADER:
            raise ValueError(f"it claims a header of {length:,} bytes")
        header = schema.parse(file.read(length))
        schema.check(header, HEADER_SHAPE)
        return 8 + length, header, size - 8 - length


@dataclasses.dataclass(frozen=True)
class _Span:
    """One array of a shard: its bytes are first..last-1 of the data."""

    dtype: type
    shape: tuple
    first: int
    last: int


def _span(header, name):
    entry = header[name]
    if name == "labels" and len(entry["shape"]) != 1:
        raise ValueError(f"its labels have shape {entry['shape']}")
    first, last = entry["data_offsets"]
    span = _Span(DTYPES[entry["dtype"]], tuple(entry["shape"]), first, last)
    if last - first != math.prod(span.shape) * np.dtype(span.dtype).itemsize:
        raise ValueError(f"the offsets of {name} do not fit its shape")
    return span


def damaged(path: str | Path, reason: str) -> UserError:
    return UserError(
        f"{path} {reason}; run the dimr encode that wrote it again, which redoes damaged shards"
    )


# --------------------------------------------------------------------------------------- writing


def shard_path(root: str | Path, number: int) -> Path:
    """Where shard `number` of a set lies."""
    return Path(root) / f"shard-{number:05}.safetensors"


def write_shard(
    path: str | Path, plan: dict, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> dict:
    """Write pairs of data (b, …) and labels (b,) as one shard, whole or not at all.

    Of `plan`, or an index, `kind`, `size` and `channels` count. Returns the shard's row of the
    index: file, count, sha256. Raises ValueError for data of another type or shape."""
    kind = plan["kind"]
    shape = item_shape(plan)
    labels = [np.empty(0, np.int64)]
    with writing(path, "w+b") as file:
        file.write(bytes(HEADER))
        for data, numbers in batches:
            if data.dtype != DTYPES[DATA_DTYPE[kind]] or data.shape != (len(numbers), *shape):
                raise ValueError(f"{data.dtype} {data.shape} does not belong in {kind} of {shape}")
            file.write(np.ascontiguousarray(data))
            labels.append(np.asarray(numbers, np.int64))
        labels = np.concatenate(labels)
        file.write(labels)
        file.seek(0)
        file.write(_shard_header(kind, (len(labels), *shape)))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": Path(path).name, "count": len(labels), "sha256": digest}


def _shard_header(kind, shape):
    """The HEADER bytes of a shard whose data has `shape` (n, …): safetensors' header, padded with
    spaces."""
    dtype = DATA_DTYPE[kind]
    data = int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
    end = data + shape[0] * np.dtype(np.int64).itemsize
    tensors = {
        "__metadata__": {"format": f"dimr {kind} {FORMAT}"},
        "data": {"dtype": dtype, "shape": shape, "data_offsets": [0, data]},
        "labels": {"dtype": "I64", "shape": shape[:1], "data_offsets": [data, end]},
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    return (HEADER - 8).to_bytes(8, "little") + text.ljust(HEADER - 8)


def write_row(root: str | Path, number: int, row: dict) -> None:
    """Note that shard `number` of an unfinished set is finished."""
    write_json(shard_path(root, number).with_suffix(".json"), row)


def read_rows(root: str | Path) -> dict[int, dict]:
    """Rows of the set's shards, as far as they are finished, by number: file, count, sha256,
    skipped. A damaged row of an unfinished set is a shard to do again. Raises UserError for a
    damaged index."""
    found = {}
    if (Path(root) / "index.json").is_file():
        index = read_encoded(root)
        for number, row in enumerate(index["shards"]):
            found[number] = {**row, "skipped": _skipped(index, number)}
    for path in Path(root).glob(ROW):
        number = int(path.stem.removeprefix("shard-"))
        with contextlib.suppress(UserError):
            row = read_json(path, ROW_SHAPE)
            if row["file"] == shard_path("", number).name:
                found[number] = row
    return found


def _skipped(index, number):
    """What was left out of shard `number`."""
    size = index["shard_size"]
    return [entry for entry in index["skipped"] if entry["item"] // size == number]


def is_whole(root: str | Path, row: dict) -> bool:
    """Whether a row's shard is there with the hash that it had."""
    path = Path(root) / row["file"]
    return path.is_file() and sha256(path) == row["sha256"]


def make_index(root: str | Path, plan: dict, rows: Sequence[dict]) -> dict:
    """What index.json says of a finished set: `plan`, and what the rows of its shards, in order,
    say."""
    labels = [map_shard(Path(root) / row["file"])[1] for row in rows]
    skipped = []
    for row in rows:
        skipped.extend(row.get("skipped", []))
    counts = np.bincount(np.concatenate(labels), minlength=len(plan["classes"]))
    return {
        **plan,
        "items": sum(row["count"] for row in rows),
        "counts": counts.tolist(),
        "skipped": skipped,
        "shards": [{key: row[key] for key in ("file", "count", "sha256")} for row in rows],
    }


def write_index(root: str | Path, plan: dict, rows: Sequence[dict]) -> dict:
    """Finish a set with its index.json, which is returned."""
    index = make_index(root, plan, rows)
    write_json(Path(root) / "index.json", index)
    return index


def damaged_shards(root: str | Path, index: dict, quiet: bool = False) -> list[str]:
    """What of a finished set is not as its index has it, in words: every shard is read, and
    compared with its hash."""
    found = []
    for row in tqdm(index["shards"], desc="verifying", unit="shard", disable=quiet):
        path = Path(root) / row["file"]
        if not path.is_file():
            found.append(f"{path} is missing")
        elif sha256(path) != row["sha256"]:
            found.append(f"{path} does not have the recorded hash")
    return found
