"""How dimr touches the disk: a file appears whole or not at all, and nothing read is trusted."""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import schema

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

VERSION = "0.2.0"
DTYPES = {  # safetensors' names
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


class UserError(Exception):
    """Something the user can put right. Its text is one line: what is wrong (with the value), what
    was expected, what to do. The command line prints it without a traceback and exits with 1."""


@contextlib.contextmanager
def writing(path: str | Path, mode: str = "wb", parents: bool = True) -> Iterator[IO]:
    """Open a temporary file beside `path`; on leaving it is synced and renamed to `path`, or
    removed if anything was raised. The parent folder is made if need be, but for `parents`."""
    path = Path(path)
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: str | Path) -> None:
    """Make a rename inside folder `path` durable."""
    if os.name == "nt":  # Windows has no handle for a folder to sync
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: str | Path) -> None:
    """Remove what a killed process left half-written in `folder` (`writing`'s temporary files)."""
    for path in Path(folder).glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, parents: bool = True) -> None:
    """Write `value` as JSON, whole or not at all; `parents` as in `writing`."""
    with writing(path, "w", parents) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(
    path: str | Path, shape: schema.Shape = schema.anything, longest: int = schema.LONGEST
) -> Any:
    """The value in a JSON file, of that shape. Raises UserError where it is missing, no JSON, of
    another shape or of more than `longest` bytes."""
    try:
        value = schema.parse(_content(path, longest + 1), longest)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore or delete it") from None
    try:
        schema.check(value, shape)
    except schema.Misfit as misfit:
        raise UserError(f"{path} is damaged ({misfit}); restore or delete it") from None
    return value


def read_text(path: str | Path, longest: int = schema.LONGEST) -> str:
    """What a text file in UTF-8 holds, without the mark at its beginning that some editors leave.
    Raises UserError where it can't be read, or has more than `longest` bytes."""
    try:
        content = _content(path, longest + 1)
        if len(content) > longest:
            raise UserError(f"{path} has more than {longest:,} bytes, which is no such file")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error})") from None


def _content(path, most):
    """The first `most` bytes of a file. Raises OSError."""
    check_file(path)
    with open(path, "rb") as file:
        return file.read(most)


def check_file(path: str | Path) -> None:
    """Raise OSError where `path` is no plain file: a pipe would be waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a file")


def unreadable(path: str | Path, error: OSError) -> UserError:
    """What to say of a file that the machine doesn't let be read."""
    return UserError(
        f"{path} can't be read ({error.strerror or error}); has it been moved, or is the disk "
        "failing?"
    )


CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def shown(text: object) -> str:
    """A name or message as a line may hold it: what would break the line, move the cursor or is no
    character is written as in Python."""
    return CONTROLS.sub(lambda match: repr(match[0])[1:-1], str(text))


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises UserError if it can't be read."""
    try:
        check_file(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def load_tensors(path: str | Path) -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` file, or of a PyTorch file read with weights only.

    Returns (dict of name → CPU tensor, dict of str → str); a PyTorch file may carry metadata as an
    attribute of that name on its OrderedDict. Of a training checkpoint the averaged weights are
    taken, and "model" is what it calls its network. Raises UserError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected weights (.safetensors, .pth, .pt, .ckpt)")
    if path.suffix != ".safetensors":
        return _state_dict(path, _load_pickle(path))
    with open_tensors(path) as file:
        names = file.keys()  # noqa: SIM118 (no dict)
        tensors = {name: file.get_tensor(name) for name in names}
        return tensors, file.metadata() or {}


def as_float32(
    path: str | Path,
    tensors: dict[str, "torch.Tensor"],
    say: Callable = lambda line: print(line, file=sys.stderr),
) -> dict[str, "torch.Tensor"]:
    """The tensors of a weights file as float32 ones; those that had another precision are said.
    Raises UserError for what can be no weights."""
    import torch

    found = {}
    others = set()
    for name, tensor in tensors.items():
        what = not_plain(tensor)
        if what:
            raise UserError(
                f"{path} holds {name}, {what}; expected weights in fp32, fp16, bf16 or fp64"
            )
        if tensor.dtype != torch.float32:
            others.add(str(tensor.dtype).removeprefix("torch."))
        found[name] = tensor.float()
    if others and int(os.environ.get("RANK", 0)) == 0:
        say(f"{path} holds weights in {', '.join(sorted(others))}, which become float32")
    return found


def not_plain(tensor: "torch.Tensor") -> str:
    """What keeps a tensor from being weights, in words, or ""."""
    import torch

    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_meta:
        return "a tensor without values"
    if tensor.layout != torch.strided:
        return "a sparse tensor"
    if not tensor.is_floating_point():
        return f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    return ""


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator["safe_open"]:
    """A `.safetensors` file to read tensors from one at a time, as the library's `safe_open` does.
    Raises UserError, while it is read too, if it isn't whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file that can be read ({error}); fetch it again"
        ) from None


def _load_pickle(path):
    """What a PyTorch file holds, with nothing in it run and, where it can be, mapped."""
    import torch  # here, so that the command line answers --help at once

    mapped = zipfile.is_zipfile(path)
    # which DiT's and SiT's training checkpoints hold beside the tensors: it runs nothing
    settings = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with settings:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # whatever an untrusted file makes the parser raise, the file is at fault
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} can't be read as plain weights ({lines[0]}); nothing in it was run"
        ) from None


def _state_dict(path, value):
    """Tensors and metadata of what a PyTorch file holds."""
    import torch

    model = None
    if isinstance(value, dict):
        model = getattr(value.get("args"), "model", None)
        for wrapper in ("state_dict", "ema"):  # Lightning's and CompVis's; DiT's and SiT's
            if isinstance(value.get(wrapper), dict):
                value = value[wrapper]
    tensors = {}
    if isinstance(value, dict):
        tensors = {name: item for name, item in value.items() if isinstance(item, torch.Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UserError(f"{path} holds no state dict: expected names mapped to tensors")
    metadata = getattr(value, "metadata", None)
    if not isinstance(metadata, dict):
        metadata = {"model": model}
    return tensors, {name: text for name, text in metadata.items() if isinstance(text, str)}


def save_tensors(
    path: str | Path,
    tensors: dict[str, "torch.Tensor"],
    metadata: dict[str, str] | None = None,
    parents: bool = True,
) -> None:
    """Write name → tensor as safetensors, whole or not at all; `parents` as in `writing`.
    `metadata` maps str to str. The same content gives the same bytes, and no copy of it is made:
    the library's own writer shuffles metadata and holds the file in memory."""
    import torch

    def place(item):  # the widest first, so that all are aligned
        name, tensor = item
        return -tensor.element_size(), name

    tensors = dict(sorted(tensors.items(), key=place))
    header = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name, tensor in tensors.items():
        first = end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path, parents=parents) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def locked(run: str | Path) -> Iterator[None]:
    """Hold a run folder for this process. A second one gets a UserError naming the owner; the lock
    ends with its owner, whose reading processes don't inherit it."""
    import fcntl

    Path(run).mkdir(parents=True, exist_ok=True)
    with open(Path(run) / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{run} is in use by {owner}; wait for it or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        sweep(run)
        sweep(Path(run) / "checkpoints")
        sweep(Path(run) / "samples")
        sweep(Path(run) / "averages")
        yield


class Place:
    """A folder that is followed wherever it is moved on its disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.handle = os.open(path, os.O_RDONLY)

    def now(self) -> Path | None:
        """Where the folder is now, None where it is gone."""
        there = os.fstat(self.handle)
        for path in (self.path, self._moved()):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path), there):
                    self.path = path
                    return path
        return None

    def _moved(self):
        """Where Linux says that the folder is."""
        try:
            return Path(os.readlink(f"/proc/self/fd/{self.handle}"))
        except OSError:  # not on Linux
            return self.path

    def close(self) -> None:
        os.close(self.handle)


# ------------------------------------------------------------------------------------------ room


def check_room(
    folder: str | Path,
    need: int,
    what: str,
    advice: str = "free some space or give another --out",
) -> int:
    """Free bytes on the disk of `folder`, which exists. Raises UserError if `need` bytes, which
    `what` takes, are more."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{what} takes {size_text(need)} and the disk of {folder} has {size_text(free)} free; "
            f"{advice}"
        )
    return free


def size_text(count: int) -> str:
    """A number of bytes for people."""
    if count < 10_000_000:
        return f"{count:,} bytes"
    return f"{count / 1e9:,.2f} GB"
