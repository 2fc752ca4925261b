"""The few distributed functions the jobs need. With one process they do nothing.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process of rank 0."""

import contextlib
import datetime
import functools
import os
import resource
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  (see below)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from storage import UserError, size_text

T = TypeVar("T")

JOIN = 1800  # seconds for all processes to come
DAY = 24 * 60  # minutes to wait for the slowest, where work is not in step

# cuBLAS's workspaces with which its products are the same each time, by PyTorch's manual
WORKSPACES = (":4096:8", ":16:8")

# Functions in torch.distributed.nn keep, as defaults, the process group that exists when they are
# imported, and DistributedDataParallel imports them: after start(), if not above. The group's
# threads then outlive stop(), and now and then abort Python's exit.


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def pick_device(name: str = "auto") -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `mps`; on CUDA the one of this process's local
    rank, or the only one that it is shown. From then on float32 means float32 there. Raises
    UserError."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(
            f"--device {name}: this PyTorch ({torch.__version__}) finds no such device; "
            "use --device auto"
        )
    no_tf32()
    if name != "cuda":
        return torch.device(name)
    local = local_gpu(torch.cuda.device_count())
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def local_gpu(count: int) -> int:
    """Which of the `count` GPUs that this process sees is its own. Raises UserError."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    # SLURM can show each task its own GPU alone, which is then number 0 to all of them. torchrun
    # shows the same GPUs to all.
    if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    if local >= count:
        raise UserError(
            f"local rank {local} has no GPU: this machine has {count}; start at most "
            f"{count} processes"
        )
    return local


def no_tf32() -> None:
    """Switch off TF32, which keeps 10 bits of float32's 23: PyTorch has it on for convolutions, and
    some containers' environment (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) for products.

    Through the older flags: PyTorch 2.5 has no others, and where there is `fp32_precision` it
    neither undoes what the environment set, nor lets `cudnn.flags` be used beside it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """A context in which the same work on the same hardware gives the same bytes, on CUDA too.

    Raises UserError where that can't be: at once if cuBLAS, which decides when it starts, has been
    told otherwise or may have started; later at an operator without a deterministic kernel."""
    settle_workspaces()
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic = True
    cudnn.benchmark = False  # it would choose kernels by their time
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operator = str(error).split()[0]
        raise UserError(
            f"--deterministic: PyTorch {torch.__version__} has no deterministic kernel for "
            f"{operator} on this device; leave the option out"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic = before[1]
        cudnn.benchmark = before[2]


@contextlib.contextmanager
def measured_kernels() -> Iterator[None]:
    """A context in which cuDNN tries its convolutions on each new shape and takes the fastest,
    which may sum in another order each time."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def settle_workspaces() -> None:
    """Give cuBLAS workspaces of fixed size, without which its products may differ from time to
    time. Raises UserError where it is too late."""
    given = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if given in WORKSPACES:
        return
    if given is not None:
        raise UserError(
            f"--deterministic: CUBLAS_WORKSPACE_CONFIG is {given}, with which products may differ "
            f"from time to time; set it to {' or '.join(WORKSPACES)}, or not at all"
        )
    if torch.cuda.is_initialized():
        raise UserError(
            "--deterministic: CUDA has started without CUBLAS_WORKSPACE_CONFIG, which it reads "
            f"once; set it to {WORKSPACES[0]} before"
        )
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACES[0]


def start(device: torch.device, minutes: float = 30) -> None:
    """Join the other processes (NCCL on GPUs, gloo on CPUs), which have to come within JOIN. Later
    a lost peer is an error after `minutes` at most."""
    if world_size() > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN)))
        store, timeout = _fresh(store), datetime.timedelta(minutes=minutes)
        store.set_timeout(timeout)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout
        )


def _fresh(store):
    """A part of the store that is new to all processes. torchrun keeps one store over its restarts:
    processes would find, and try to reach, those that came before them (pytorch issue 135712).

    Each process leaves a word that was never used before; rank 0 answers each with its own until
    that is confirmed."""
    word, deadline = uuid.uuid4().hex, time.monotonic() + JOIN
    store.set(f"word/{rank()}", word)
    if not is_main():
        common = store.get(word).decode()
        store.set(common + word, "")
        return dist.PrefixStore(common, store)
    for other in range(1, world_size()):
        while not store.check([word + (theirs := store.get(f"word/{other}").decode())]):
            store.set(theirs, word)  # it may be the last start's word, which its own replaces
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {other} did not join within {JOIN // 60} minutes; see its own message"
                )
            time.sleep(0.005)
    return dist.PrefixStore(word, store)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a RuntimeError says that another process can't be reached."""
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
    )


def is_joined() -> bool:
    """Whether `start` has joined other processes."""
    return dist.is_initialized()


def stop() -> None:
    """Part from the other processes, once all have done their work."""
    if is_joined():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process, which has failed and said so, at once. `stop` could wait for ever: for the
    others, which may wait for this one in an exchange. Once it is gone they notice, or torchrun
    ends them."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # full, or closed
            stream.flush()
    os._exit(status)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def idle_gpus(device: torch.device) -> int:
    """GPUs of this machine that no process of this job uses."""
    if device.type != "cuda":
        return 0
    return max(0, torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` for training: with several processes, its gradients are averaged over them."""
    if not dist.is_initialized():
        return model
    warnings.filterwarnings(
        "ignore", "Grad strides do not match bucket view strides"
    )  # of depthwise weights: a copy of 49 numbers a channel
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def no_sync(model: nn.Module) -> AbstractContextManager:
    """A context in which backward passes keep their gradients to themselves."""
    return model.no_sync() if dist.is_initialized() else contextlib.nullcontext()


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The average of a small tensor over processes, summed in order of rank: an all-reduce's order
    would follow from a number's place in the tensor, so that a line of metrics.jsonl would depend
    on which others are averaged with it."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / world_size()


def first(reason: str | None) -> str | None:
    """The first process's `reason` that is not None, on every process: so that all stop at the same
    step. A tiny exchange between hosts; no GPU is waited for."""
    if not dist.is_initialized():
        return reason
    flag = torch.tensor(int(reason is not None))
    dist.all_reduce(flag)
    return next(r for r in gather(reason) if r is not None) if flag else None


def broadcast(value: T) -> T:
    """Rank 0's picklable `value`, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_tensor(tensor: torch.Tensor) -> None:
    """Fill `tensor` on every process with rank 0's values."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


def collect(value: T) -> list[T] | None:
    """Every process's picklable `value`, in order of rank, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    box = [None] * world_size() if is_main() else None
    dist.gather_object(value, box)
    return box


def gather(value: T) -> list[T]:
    """Every process's picklable `value`, in order of rank, on every process."""
    if not dist.is_initialized():
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def divide(total: int, done: Callable[[], set[int]]) -> tuple[list[int], list[int]]:
    """Which of a job's pieces 0..total-1 are to be done: (all of them, those of this process).

    `done()` gives the set of pieces that an earlier call finished; every process asks it once all
    have come here, and none goes on before all have seen the same. What is left is dealt out in
    turn, so that any number of processes can go on with what any other number began."""
    barrier()
    finished = done()
    missing = [k for k in range(total) if k not in finished]
    barrier()
    return missing, missing[rank() :: world_size()]


def is_busy() -> bool:
    """Whether more wants to run on this machine's processor than it has cores; False where that is
    not told."""
    if not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > 1.5 * os.cpu_count()


# What a device can do

PEAK_FLOPS = {  # dense bf16, vendors' data sheets
    "A100": 312e12,
    "H100 PCIe": 756e12,  # before H100, as a part of whose name it would be found
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second by the vendor's data sheet, or None where the hardware is
    not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on the GPU by tensors, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def free_memory(device: torch.device) -> int | None:
    """Bytes of memory that this process could take there at most, or None where that is not
    known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, KeyError), open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
        kilobytes = [int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")]
        found.append(sum(kilobytes) * 1024)
    for place in LIMITS:  # of a container, if it is a number
        with contextlib.suppress(OSError, ValueError), open(place) as file:
            found.append(int(file.read()))
    return min(found, default=None)


def check_memory(need: int, what: str, advice: str, device: torch.device) -> None:
    """Raise UserError if `need` bytes, which `what` takes at least, are more than there are."""
    free = free_memory(device)
    if free is not None and need > free:
        raise UserError(
            f"{what} takes {size_text(need)} of memory at least, and there are {size_text(free)}; "
            f"{advice}"
        )


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context that runs a network in `precision` ("fp32" or "bf16")."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if precision == "bf16"
        else contextlib.nullcontext()
    )


def for_inference(model: nn.Module, precision: str, compiled: bool = False) -> nn.Module:
    """`model` in eval mode, compiled if asked. For "bf16" the weights that autocast would round in
    every call are kept rounded. For "fp32" on CPUs Linear layers without gradients run in oneDNN,
    which takes a tenth less time."""
    onednn = precision == "fp32" and not compiled and torch.backends.mkldnn.is_available()
    for module in model.modules():
        if precision == "bf16" and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(torch.bfloat16)
        elif onednn and isinstance(module, torch.nn.Linear) and module.weight.is_cpu:
            product = "product" if hasattr(module, "product") else "forward"
            setattr(module, product, functools.partial(onednn_linear, module))
    if compiled:
        compile_units(model)
    return model.eval()


GRAPHS = 64  # of one kind of unit; beyond, PyTorch would go on uncompiled without much ado


def compile_units(network: nn.Module) -> None:
    """Compile each of the network's units by itself, for the shapes that come: one graph for each
    kind and width serves all of its units. The whole would be one graph that takes minutes to
    compile, and DistributedDataParallel would have it cut at each bucket of gradients."""
    settings = torch._dynamo.config
    settings.optimize_ddp = False
    # in training and out of it, by width, and by precision, which the long skips lower
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
    setattr(settings, limit, max(GRAPHS, getattr(settings, limit)))
    for unit in network.units():
        unit.compile(dynamic=False)
    network.compiled = True


def onednn_linear(module, x):
    if torch.is_grad_enabled():
        return torch.nn.functional.linear(x, module.weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")
