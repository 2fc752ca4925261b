"""Zips and tars, read in place: members by name, place and size, and their bytes by position.

A zip has a directory. A tar is walked once, header by header, and what was found is kept in the
cache (downloads.cache()/indexes) for this path, size and time. Members of tars in a tar are reached
as "inner.tar/member". Only members that have to do with images are kept (INDEXED); links, sparse
and encrypted members, names that lead out, and archives that are cut off are refused."""

import ours

import abc
import dataclasses
import hashlib
import json
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import downloads
import parallel
import storage
from storage import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
KNOWN = ", ".join(EXTENSIONS)
LATENTS = (".npy",)
TOLD = (".cls", ".json")  # WebDataset's, beside an image
LABELS = "dataset.json"  # EDM2's, of all images
INDEXED = (*EXTENSIONS, *LATENTS, *TOLD, ".tar")

CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
MOST_BYTES = 2**28  # of one image, packed or not; ImageNet's largest has 15 MB
MOST_TEXT = 2**20  # bytes of a long name, or of a label


class Names(Sequence):
    """Strings in one block of bytes: worker processes share it, while reading a list of strings
    would copy it page by page through the reference counts."""

    def __init__(self, names=(), block=None, ends=None):
        if block is None:
            names = [os.fsencode(name) for name in names]
            block = b"".join(names)
            ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.block = block
        self.ends = ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        index = range(len(self))[index]
        first = self.ends[index - 1] if index else 0
        return os.fsdecode(self.block[first : self.ends[index]])

    def __iter__(self):
        first = 0
        for last in self.ends.tolist():
            yield os.fsdecode(self.block[first:last])
            first = last


class File:
    """A file read by position, which may not change. Every process opens it for itself."""

    def __init__(self, path):
        self.path = Path(path)
        self.handle = None
        try:
            storage.check_file(self.path)
            found = os.stat(self.path)
        except OSError as error:
            raise self.unreadable(error) from None
        self.size = found.st_size
        self.mtime = found.st_mtime_ns

    def __getstate__(self):
        return {**vars(self), "handle": None}

    def __del__(self):
        self.close()

    def close(self):
        if getattr(self, "handle", None) is not None:
            os.close(self.handle)
            self.handle = None

    def unreadable(self, error):
        return UserError(
            f"{self.path} can't be read ({error.strerror}); has it been moved, or is the disk "
            "failing?"
        )

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, fewer at the file's end. Raises UserError."""
        try:
            if self.handle is None:
                self.handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self.handle)
            data = os.pread(self.handle, count, offset)
            while len(data) < count:  # a read may stop early
                more = os.pread(self.handle, count - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise self.unreadable(error) from None
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime):
            raise UserError(
                f"{self.path} has changed since it was opened; leave it alone and run again"
            )
        return data


class Window:
    """Small reads from a file, a block at a time."""

    def __init__(self, file, block=2**14):
        self.file = file
        self.block = block
        self.first = 0
        self.data = b""

    def read(self, offset, count):
        start = offset - self.first
        if start < 0 or start + count > len(self.data):
            self.first = offset
            self.data = self.file.read(offset, max(count, self.block))
            start = 0
        return self.data[start : start + count]


NONE = -1  # the label of a member that holds none
WRONG = -2  # of one that should, and holds something else


@dataclasses.dataclass(frozen=True)
class Archive(abc.ABC):
    """A tar or zip and those of its members that have to do with images, links and hidden ones left
    out. `offsets` and `sizes`, int64 (M,), are of members as they will be read; `values` are the
    labels that WebDataset's members hold. `others`: how many members are none of these."""

    file: File
    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    values: np.ndarray
    others: int

    @property
    def path(self):
        return self.file.path

    def __len__(self):
        return len(self.names)

    def read(self, item: int) -> bytes:
        """Member `item`. Raises ValueError, saying why, where it is not what the archive says it
        is, or more than MOST_BYTES."""
        size = int(self.sizes[item])
        if size > MOST_BYTES:
            raise ValueError(f"claims {size:,} bytes, and no image needs over {MOST_BYTES:,}")
        return self.content(item, size)

    @abc.abstractmethod
    def content(self, item: int, size: int) -> bytes:
        """As `read`, `size` being known."""


def member_name(path, name):
    """A member's name without "./", or None if it is hidden. Raises UserError for one that leads
    out of the archive."""
    parts = name.split("/")
    if "." in parts or "" in parts or ".." in parts:
        if name.startswith("/") or ".." in parts:
            raise UserError(
                f"{path}: {name} leads out of the archive; pack it again from the folder that the "
                "images are in"
            )
        parts = [part for part in parts if part not in ("", ".")]
        name = "/".join(parts)
    if CONTROLS.search(name):
        raise UserError(f"{path}: {name!r} has control characters in its name; rename it")
    if name.startswith(".") or "/." in name:
        return None
    return name


def shown(name):
    """A name as a line may hold it."""
    return CONTROLS.sub("?", name)


def is_indexed(name):
    return name.lower().endswith(INDEXED)


def label_in(name, data):
    """The label in a WebDataset member: NONE where there is none, WRONG where it is no number from
    0."""
    if name.endswith(".cls"):
        text = data.decode("ascii", "replace").strip()
        return int(text) if re.fullmatch(r"\d{1,9}", text) else WRONG
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return WRONG
    if not isinstance(value, dict):
        return NONE
    label = value.get("label", value.get("cls"))
    if label is None:
        return NONE
    if type(label) is int and 0 <= label < 10**9:
        return label
    return WRONG


# ------------------------------------------------------------------------------------------- tars

BLOCK = 512  # a tar's unit
ZEROS = bytes(BLOCK)  # its end
REGULAR = b"0\0007"  # kinds of members
EXTRA = b"xLKg"  # what says more of the member after it: pax's, GNU's long names and links
LINKS = {ord("1"): "a hard link", ord("2"): "a link"}
FORMAT = 1  # of an index
COLUMNS = ("block", "lengths", "offsets", "sizes", "values")


class Tar(Archive):
    def content(self, item, size):
        data = self.file.read(int(self.offsets[item]), size)
        if len(data) < size:
            raise UserError(f"{self.path} is cut off; fetch or copy it again")
        return data


@dataclasses.dataclass
class Member:
    """A header of a tar, with what the headers before it say of it."""

    name: str
    kind: int
    offset: int  # of its data
    size: int
    link: str
    sparse: bool


def open_tar(path: str | Path) -> Tar:
    """The tar at `path`, by its index in the cache, which is made unless there is one for this size
    and time. Raises UserError where it is cut off or damaged, or holds what can't be read in
    place."""
    file = File(path)
    kept = _index_path(file)
    found = _read_index(file, kept)
    if found is None:
        found = _walk_tar(file)
        _write_index(found, kept)
    file.close()
    return found


def is_tar(head: bytes) -> bool:
    """Whether a file that begins so, with BLOCK bytes or more, is a tar."""
    head = head[:BLOCK]
    if head[257:262] == b"ustar" or head == ZEROS:
        return True
    try:
        _member(head.ljust(BLOCK), 0, {})
    except ValueError:
        return False
    return True


def _index_path(file):
    where = file.path.resolve()
    digest = hashlib.sha256(os.fsencode(where)).hexdigest()[:16]
    return downloads.cache() / "indexes" / f"{where.stem[:60]}-{digest}.safetensors"


def _stamp(file, tensors, others):
    """What an index notes beside its arrays."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        digest.update(tensors[name].numpy())
    return {
        "format": str(FORMAT),
        "path": str(file.path.resolve()),
        "size": str(file.size),
        "mtime": str(file.mtime),
        "others": str(others),
        "sha256": digest.hexdigest(),
    }


def _read_index(file, kept):
    """The Tar that the index at `kept` says `file` is; None without one, or if it is of another
    state or damaged."""
    if not kept.is_file():
        return None
    try:
        tensors, stamp = storage.load_tensors(kept)
        if stamp != _stamp(file, tensors, stamp["others"]):
            return None
    except (UserError, KeyError):
        return None
    arrays = {name: tensors[name].numpy() for name in COLUMNS}
    return Tar(
        file=file,
        names=Names(
            block=arrays["block"].tobytes(), ends=np.cumsum(arrays["lengths"], dtype=np.int64)
        ),
        offsets=arrays["offsets"],
        sizes=arrays["sizes"],
        values=arrays["values"].astype(np.int64),
        others=int(stamp["others"]),
    )


def _write_index(tar, kept):
    if len(tar) == 0:
        return
    arrays = {
        "block": np.frombuffer(bytearray(tar.names.block), np.uint8),
        "lengths": np.diff(tar.names.ends, prepend=0).astype(np.int32),
        "offsets": tar.offsets,
        "sizes": tar.sizes,
        "values": tar.values.astype(np.int32),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    try:
        storage.save_tensors(kept, tensors, _stamp(tar.file, tensors, tar.others))
    except OSError as error:
        print(
            f"{tar.path}: its index can't be kept in {kept.parent} ({error.strerror}) and will be "
            "made again next time; DIMR_HOME names another place",
            file=sys.stderr,
        )


class _Found:
    """Members of a tar as they are met."""

    def __init__(self):
        self.names = []
        self.offsets = []
        self.sizes = []
        self.values = []
        self.others = 0

    def add(self, name, offset, size, value):
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.values.append(value)


def _walk_tar(file):
    """The Tar that `file` is, with the members of tars in it under their names."""
    found = _Found()
    window = Window(file)
    with tqdm(
        total=file.size,
        unit="B",
        unit_scale=True,
        desc=f"indexing {file.path.name}",
        disable=not parallel.is_main(),
        delay=2,
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        for member in _Walk(window, 0, file.size, file.path):
            _note(found, window, member, "")
            bar.update(member.offset + member.size - bar.n)
    return Tar(
        file=file,
        names=Names(found.names),
        offsets=np.asarray(found.offsets, np.int64),
        sizes=np.asarray(found.sizes, np.int64),
        values=np.asarray(found.values, np.int64),
        others=found.others,
    )


def _note(found, window, member, inside):
    """Add a member to what is found, or those of the tar that it is. `inside`: that one's name."""
    path = window.file.path
    if inside:
        path = f"{path}: {inside}"
    if member.kind == ord("5") or member.name.endswith("/"):
        return
    if not is_indexed(member.name):
        found.others += os.path.basename(member.name)[:1] != "."
        return
    name = member_name(path, member.name)
    if name is None:
        return
    if member.kind in LINKS:
        raise UserError(
            f"{path}: {name} is {LINKS[member.kind]} to {shown(member.link)}, not a file; "
            "pack it again with tar --dereference --hard-dereference"
        )
    if member.kind not in REGULAR:
        found.others += 1
        return
    if name.lower().endswith(".tar"):
        if inside:
            found.others += 1
            return
        end = member.offset + member.size
        for inner in _Walk(window, member.offset, end, f"{path}: {name}"):
            _note(found, window, inner, name)
        return
    value = NONE
    if name.endswith(TOLD) and os.path.basename(name) != LABELS:
        value = WRONG
        if member.size <= MOST_TEXT:
            value = label_in(name, window.read(member.offset, member.size))
    if inside:
        name = f"{inside}/{name}"
    found.add(name, member.offset, member.size, value)


class _Walk:
    """The members of the tar in bytes first..last-1 of a file, which messages call `where`."""

    def __init__(self, window, first, last, where):
        self.window = window
        self.first = first
        self.last = last
        self.where = where
        self.position = first
        self.before = "its beginning"
        self.count = 0

    def __iter__(self) -> Iterator[Member]:
        """Raises UserError where the tar is cut off or damaged, with how far it is whole."""
        extra = {}
        while (member := self._next(extra)) is not None:
            if member.kind in EXTRA:
                data = self.window.read(member.offset, member.size)
                extra = {**extra, **self._understood(_more, member.kind, data)}
            else:
                extra = {}
                self.before = shown(member.name)
                self.count += 1
                yield member
            self.position = member.offset + -(-member.size // BLOCK) * BLOCK

    def _next(self, extra):
        """The member whose header is at the position, or None at the end."""
        start = self.position + BLOCK
        header = b""
        if start <= self.last:
            header = self.window.read(self.position, BLOCK)
        if len(header) < BLOCK:
            raise self._cut(f"after {self.before}")
        if header == ZEROS:
            self._check_rest(start)
            return None
        member = self._understood(_member, header, start, extra)
        if member.offset + member.size > self.last:
            raise self._cut(f"in {shown(member.name)}")
        if member.sparse:
            raise UserError(
                f"{self.where}: {shown(member.name)} is a sparse file; pack it again "
                "without --sparse"
            )
        return member

    def _understood(self, function, *arguments):
        try:
            return function(*arguments)
        except ValueError as error:
            raise UserError(
                f"{self.where} is damaged after {self.before} ({error}; {self._whole()}); fetch or "
                "make it again"
            ) from None

    def _cut(self, place):
        return UserError(
            f"{self.where} is cut off {place} ({self._whole()}); fetch or copy it again"
        )

    def _whole(self):
        size = self.last - self.first
        done = min(self.position - self.first, size)
        return f"{self.count:,} members are whole, up to byte {done:,} of {size:,}"

    def _check_rest(self, start):
        """After the end there may only be zeros: tars put together with cat would lose images."""
        while start < self.last:
            data = self.window.file.read(start, min(2**20, self.last - start))
            if not data:
                raise self._cut(f"after {self.before}")
            if data.count(0) != len(data):
                raise UserError(
                    f"{self.where} goes on after its end ({self._whole()}), as tars put together "
                    "with cat do; give them one by one, in a folder"
                )
            start += len(data)


def _member(header, offset, extra):
    """The Member with this header, `extra` being said of it before. Raises ValueError."""
    claimed = _number(header[148:156])
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != claimed:
        raise ValueError("no member begins there")
    kind = header[156]
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    size = _number(header[124:136])
    link = header[157:257].partition(b"\0")[0]
    sparse = kind == ord("S")
    if kind not in EXTRA:
        name = extra.get("path", name)
        link = extra.get("linkpath", link)
        if "size" in extra:
            size = _decimal(extra["size"])
        sparse = sparse or any(key.startswith("GNU.sparse.") for key in extra)
        if kind in b"123456":  # links, devices and folders, whatever size they claim
            size = 0
    elif size > MOST_TEXT:
        raise ValueError(f"a name of {size:,} bytes")
    return Member(os.fsdecode(name), kind, offset, size, os.fsdecode(link), sparse)


def _number(field):
    """A number as tars write them: octal, or binary if it is large."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    if not re.fullmatch(b"[0-7]*", text):
        raise ValueError(f"{field!r} is no size")
    return int(text or b"0", 8)


def _decimal(text):
    if not re.fullmatch(rb"\d{1,20}", text):
        raise ValueError(f"{text[:30]!r} is no size")
    return int(text)


def _more(kind, data):
    """What a member of EXTRA says of the one after it: bytes by pax's keywords."""
    if kind == ord("L"):
        return {"path": data.partition(b"\0")[0]}
    if kind == ord("K"):
        return {"linkpath": data.partition(b"\0")[0]}
    if kind == ord("g"):  # of all members: who made the tar
        return {}
    records = {}
    while data:
        length = _decimal(data[:21].partition(b" ")[0])
        key, equals, value = data[:length].partition(b" ")[2].partition(b"=")
        if not equals or length > len(data) or value[-1:] != b"\n":
            raise ValueError("pax records that do not fit their length")
        records[key.decode("ascii", "replace")] = value[:-1]
        data = data[length:]
    return records


# ------------------------------------------------------------------------------------------- zips

METHODS = {
    1: "shrink",
    6: "implode",
    9: "deflate64",
    12: "bzip2",
    14: "lzma",
    93: "zstd",
    98: "ppmd",
}
ENTRY = struct.Struct("<4s6H3L5H2L")  # of a zip's directory
LOCAL = struct.Struct("<4s5H3L2H")  # before a member's data
END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
FULL = 0xFFFFFFFF  # a number that stands in the extra field


@dataclasses.dataclass(frozen=True)
class Zip(Archive):
    """`offsets` are of the members' own headers. `packed`: bytes that a member takes in the file;
    `crcs`: of its content; `deflated` (M,) bool."""

    packed: np.ndarray
    crcs: np.ndarray
    deflated: np.ndarray

    def content(self, item, size):
        packed = int(self.packed[item])
        if packed > MOST_BYTES:
            raise ValueError(f"takes {packed:,} bytes, and no image needs over {MOST_BYTES:,}")
        data = self._data(int(self.offsets[item]), packed)
        if self.deflated[item]:
            data = _inflate(data, size)
        elif packed != size:
            raise ValueError(f"claims {size:,} bytes and holds {packed:,}")
        if zlib.crc32(data) != self.crcs[item]:
            raise ValueError("does not have the checksum that the zip notes")
        return data

    def _data(self, offset, packed):
        """The bytes of the member whose header is at `offset`."""
        guess = LOCAL.size + 256 + packed  # a header's names have two lengths that only it knows
        block = self.file.read(offset, guess)
        if len(block) < LOCAL.size or block[:4] != b"PK\3\4":
            raise ValueError("is not where the zip's directory says")
        *_, name, extra = LOCAL.unpack_from(block)
        start = LOCAL.size + name + extra
        if start + packed > guess:
            block = self.file.read(offset, start + packed)
        data = block[start : start + packed]
        if len(data) < packed:
            raise ValueError("goes beyond the end of the zip")
        return data


def _inflate(data, size):
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"can't be inflated ({error})") from None
    if len(found) != size or not inflater.eof:
        more = "more" if len(found) > size else f"{len(found):,}"
        raise ValueError(f"claims {size:,} bytes and holds {more}")
    return found


def open_zip(path: str | Path) -> Zip:
    """The zip at `path`. Raises UserError where it is not whole, or holds what can't be read in
    place."""
    file = File(path)
    try:
        count, offset, size = _find_directory(file)
        directory = file.read(offset, size)
        if len(directory) < size:
            raise ValueError("its directory goes beyond its end")
        columns, names, others = _read_directory(path, directory, count)
    except (ValueError, struct.error) as error:
        raise UserError(f"{path} is not a whole zip ({error}); fetch or copy it again") from None
    file.close()
    return Zip(
        file=file,
        names=Names(names),
        values=np.full(len(names), NONE),
        others=others,
        **{name: np.asarray(column, np.int64) for name, column in columns.items()},
    )


def _find_directory(file):
    """(entries, offset, size) of a zip's directory. Raises ValueError."""
    first = max(0, file.size - END.size - 2**16)
    tail = file.read(first, file.size - first)
    place = tail.rfind(b"PK\5\6")
    if place < 0:
        raise ValueError("the directory at its end is missing")
    _, disk, _, _, count, size, offset, _ = END.unpack_from(tail, place)
    if disk not in (0, 0xFFFF):
        raise ValueError("it is one of several parts")
    locator = place - LOCATOR_64.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        where = LOCATOR_64.unpack_from(tail, locator)[2]
        block = file.read(where, END_64.size)
        if block[:4] != b"PK\6\6":
            raise ValueError("its directory's end is not where it should be")
        *_, count, size, offset = END_64.unpack(block)
        place = where - first
    if offset + size != first + place:
        raise ValueError("its directory is not where its end says")
    return count, offset, size


def _read_directory(path, directory, count):
    """Columns, names and number of others of the entries of a zip's directory. Raises UserError
    for what can't be read in place, ValueError where it is damaged."""
    columns = {name: [] for name in ("offsets", "sizes", "packed", "crcs", "deflated")}
    names = []
    others = 0
    place = 0
    for _ in range(count):
        fields = ENTRY.unpack_from(directory, place)
        if fields[0] != b"PK\1\2":
            raise ValueError(f"entry {len(names) + others:,} of its directory is damaged")
        flags, method = fields[3:5]
        crc, packed, size, length, more, comment = fields[7:13]
        mode, offset = fields[15:17]
        place += ENTRY.size
        name = _zip_name(directory[place : place + length], flags)
        extra = directory[place + length : place + length + more]
        place += length + more + comment
        if name.endswith("/"):
            continue
        if not is_indexed(name):
            others += os.path.basename(name)[:1] != "."
            continue
        name = member_name(path, name)
        if name is None:
            continue
        _check_entry(path, name, flags, method, mode)
        if FULL in (packed, size, offset):
            size, packed, offset = _from_extra(extra, [size, packed, offset])
        names.append(name)
        columns["offsets"].append(offset)
        columns["sizes"].append(size)
        columns["packed"].append(packed)
        columns["crcs"].append(crc)
        columns["deflated"].append(method == 8)
    if place != len(directory):
        raise ValueError(f"its directory holds other than {count:,} entries")
    return columns, names, others


def _zip_name(raw, flags):
    """UTF-8, whether the zip says so or not, else the code page of old; Windows' own separator is
    understood."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("cp437")
    return name.replace("\\", "/")


def _check_entry(path, name, flags, method, mode):
    if flags & 1 or method == 99:
        raise UserError(f"{path}: {name} is encrypted; unpack the zip and pack it without password")
    if method not in (0, 8):
        how = METHODS.get(method, f"method {method}")
        raise UserError(
            f"{path}: {name} is packed by {how}; read are stored and deflated members: pack it "
            "again with zip -0"
        )
    if mode >> 28 == 0o12:  # Unix's file type, in the upper half
        raise UserError(
            f"{path}: {name} is a link, not a file; pack it again without zip --symlinks"
        )


def _from_extra(extra, numbers):
    """These numbers, those that are FULL taken from a zip64 extra field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            try:
                return [next(wide) if number == FULL else number for number in numbers]
            except StopIteration:
                break
        extra = extra[4 + length :]
    raise ValueError("an entry lacks its large numbers")
