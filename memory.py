"""How much memory training takes on a GPU, computed on any machine: forward and backward pass run
on tensors without values, and what they would hold at once is counted."""

import ours

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion
import dimr

STATE = 20  # bytes a parameter, fp32: weights, gradients, AdamW's two moments, EMA
PROFILE = 4  # and for each power-function average; one's update needs no more than gradients did


def training_memory(
    config: dimr.Config,
    micro_batch: int,
    checkpoint_blocks: bool = False,
    precision: str = "bf16",
    profiles: int = 0,
) -> tuple[int, int]:
    """(bytes of the state, most bytes of activations at once) of training with `micro_batch` images
    per GPU and pass, and with so many `profiles` of averages kept for afterwards.

    Without torch.compile, which fuses some of the activations away, and without the allocator's
    slack and CUDA's own context (about 1 GB together)."""
    with torch.device("meta"):
        model = dimr.DiMR(config).train()
    model.checkpoint_blocks = checkpoint_blocks
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
        peak = activations(model, config, micro_batch, precision)
    state = STATE + PROFILE * profiles
    return state * sum(p.numel() for p in model.parameters()), peak


def activations(model: dimr.DiMR, config: dimr.Config, batch: int, precision: str) -> int:
    """Most bytes that a forward and a backward pass hold at once besides weights and gradients."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Live() as live:
        images = torch.zeros(batch, config.channels, config.size, config.size)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            predictions = model(images, torch.zeros(batch), torch.zeros(batch, dtype=torch.long))
        sums, _ = diffusion.multi_scale_loss(predictions, images)
        del predictions
        sums.sum().backward()
    return live.peak


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, for as long as each lives: `now`, and
    `peak`."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()  # storages that are alive

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.meet(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def meet(self, storage):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size
