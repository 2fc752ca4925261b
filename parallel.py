"""The few distributed functions the jobs need. With one process they do nothing.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process of rank 0."""

import datetime
import os

import torch
import torch.distributed as dist

from storage import UserError


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def pick_device(name="auto"):
    """The torch device for `auto`, `cpu`, `cuda` or `mps`; on CUDA the one of this process's local rank."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) finds no such device; use --device auto")
    if name == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise UserError(f"local rank {local} has no GPU: this machine has {count}; start at most {count} processes")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device(name)


def start(device):
    """Join the other processes (NCCL on GPUs, gloo on CPUs). A lost peer is an error after 30 minutes at most."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """Rank 0's picklable `value`, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value):
    """Every process's picklable `value`, in order of rank, on every process."""
    if not dist.is_initialized():
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box
