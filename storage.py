"""How dimr touches the disk: a file appears whole or not at all, and nothing read is trusted."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import zipfile
from pathlib import Path

VERSION = "0.1.0"
DTYPES = {
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
}  # safetensors' names


class UserError(Exception):
    """Something the user can put right. Its text is one line: what is wrong (with the value), what
    was expected, what to do. The command line prints it without a traceback and exits with 1."""


@contextlib.contextmanager
def writing(path, mode="wb"):
    """Open a temporary file beside `path`; on leaving it is synced and renamed to `path`, or
    removed if anything was raised. The parent folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path):
    """Make a rename inside folder `path` durable."""
    if os.name == "nt":  # Windows has no handle for a folder to sync
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder):
    """Remove what a killed process left half-written in `folder` (`writing`'s temporary files)."""
    for path in Path(folder).glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path, value):
    with writing(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore or delete it") from None


def sha256(path):
    """Hex SHA-256 of a file's bytes. Raises UserError if it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); has it been moved, or is the disk failing?"
        ) from None


def load_tensors(path):
    """Tensors and metadata of a `.safetensors` file, or of a PyTorch file read with weights only.

    Returns (dict of name → CPU tensor, dict of str → str); a PyTorch file may carry metadata as an
    attribute of that name on its OrderedDict. Raises UserError for anything else."""
    import torch  # here, so that the command line answers --help at once
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected weights (.safetensors, .pth, .pt, .ckpt)")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()  # noqa: SIM118 (no dict)
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file that can be read ({error}); fetch it again"
            ) from None
    try:
        value = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (
        Exception
    ) as error:  # whatever an untrusted file makes the parser raise, the file is at fault
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} can't be read as plain weights ({reason}); nothing in it was run"
        ) from None
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]  # Lightning and CompVis wrap theirs
    tensors = (
        {k: v for k, v in value.items() if isinstance(v, torch.Tensor)}
        if isinstance(value, dict)
        else {}
    )
    if not tensors:
        raise UserError(f"{path} holds no state dict: expected names mapped to tensors")
    about = getattr(value, "metadata", None)
    return tensors, {k: v for k, v in about.items() if isinstance(v, str)} if isinstance(
        about, dict
    ) else {}


def save_tensors(path, tensors, metadata=None):
    """Write name → tensor as safetensors, whole or not at all. `metadata` maps str to str. The same
    content gives the same bytes, and no copy of it is made: the library's own writer shuffles
    metadata and holds the file in memory."""
    import torch

    tensors = dict(
        sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    )  # so that all are aligned
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def locked(run):
    """Hold a run folder for this process. A second one gets a UserError naming the owner; the lock
    ends with its owner, whose reading processes don't inherit it."""
    import fcntl

    Path(run).mkdir(parents=True, exist_ok=True)
    with open(Path(run) / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise UserError(
                f"{run} is in use by {file.read().strip() or 'another process'}; wait "
                "for it or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        sweep(run)
        sweep(Path(run) / "checkpoints")
        sweep(Path(run) / "samples")
        yield


# ------------------------------------------------------------------------------------------ room


def check_room(folder, need, what, advice="free some space or give another --out"):
    """Free bytes on the disk of `folder`, which exists. Raises UserError if `need` bytes, which
    `what` takes, are more."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"{what} takes {size_text(need)} and the disk of {folder} has {size_text(free)} free; "
            f"{advice}"
        )
    return free


def size_text(count):
    """A number of bytes for people."""
    if count < 10_000_000:
        return f"{count:,} bytes"
    return f"{count / 1e9:,.2f} GB"
