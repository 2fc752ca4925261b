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

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  (see below)
from torch.nn.parallel import DistributedDataParallel

from storage import UserError

JOIN = 1800  # seconds for all processes to come

# Functions in torch.distributed.nn keep, as defaults, the process group that exists when they are
# imported, and DistributedDataParallel imports them: after start(), if not above. The group's
# threads then outlive stop(), and now and then abort Python's exit.


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def pick_device(name="auto"):
    """The torch device for `auto`, `cpu`, `cuda` or `mps`; on CUDA the one of this process's local
    rank."""
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
    if name == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"local rank {local} has no GPU: this machine has {count}; start at most "
                f"{count} processes"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device(name)


def start(device, minutes=30):
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


def is_lost_peer(error):
    """Whether a RuntimeError says that another process can't be reached."""
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
    )


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def idle_gpus(device):
    """GPUs of this machine that no process of this job uses."""
    if device.type != "cuda":
        return 0
    return max(0, torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def wrap(model, device):
    """`model` for training: with several processes, its gradients are averaged over them."""
    if not dist.is_initialized():
        return model
    warnings.filterwarnings(
        "ignore", "Grad strides do not match bucket view strides"
    )  # of depthwise weights: a copy of 49 numbers a channel
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def no_sync(model):
    """A context in which backward passes keep their gradients to themselves."""
    return model.no_sync() if dist.is_initialized() else contextlib.nullcontext()


def mean(tensor):
    """The average of a tensor over processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


def first(reason):
    """The first process's `reason` that is not None, on every process: so that all stop at the same
    step. A tiny exchange between hosts; no GPU is waited for."""
    if not dist.is_initialized():
        return reason
    flag = torch.tensor(int(reason is not None))
    dist.all_reduce(flag)
    return next(r for r in gather(reason) if r is not None) if flag else None


def broadcast(value):
    """Rank 0's picklable `value`, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def collect(value):
    """Every process's picklable `value`, in order of rank, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    box = [None] * world_size() if is_main() else None
    dist.gather_object(value, box)
    return box


def gather(value):
    """Every process's picklable `value`, in order of rank, on every process."""
    if not dist.is_initialized():
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def divide(total, done):
    """Which of a job's pieces 0..total-1 are to be done: (all of them, those of this process).

    `done()` gives the set of pieces that an earlier call finished; every process asks it once all
    have come here, and none goes on before all have seen the same. What is left is dealt out in
    turn, so that any number of processes can go on with what any other number began."""
    barrier()
    finished = done()
    missing = [k for k in range(total) if k not in finished]
    barrier()
    return missing, missing[rank() :: world_size()]


# What a device can do

PEAK_FLOPS = {  # dense bf16, vendors' data sheets
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device):
    """Dense bf16 operations per second by the vendor's data sheet, or None where the hardware is
    not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory(device):
    """Most bytes held so far: on the GPU by tensors, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def autocast(device, precision):
    """The context that runs a network in `precision` ("fp32" or "bf16")."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if precision == "bf16"
        else contextlib.nullcontext()
    )


def for_inference(model, precision, compiled=False):
    """`model` in eval mode, compiled if asked. For "bf16" the weights that autocast would round in
    every call are kept rounded. For "fp32" on CPUs Linear layers without gradients run in oneDNN,
    which takes a tenth less time."""
    onednn = precision == "fp32" and not compiled and torch.backends.mkldnn.is_available()
    for module in model.modules():
        if precision == "bf16" and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(torch.bfloat16)
        elif onednn and isinstance(module, torch.nn.Linear) and module.weight.is_cpu:
            module.forward = functools.partial(onednn_linear, module)
    if compiled:
        model.compile()
    return model.eval()


def onednn_linear(module, x):
    if torch.is_grad_enabled():
        return torch.nn.functional.linear(x, module.weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")
