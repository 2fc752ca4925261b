"""How much memory training takes on a GPU, computed on any machine: forward and backward pass run
on tensors without values, and what they would hold at once is counted. Layer norms run in float32
there, as autocast has them on CUDA and not on CPUs."""

import ours

import contextlib
import weakref

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion
import networks

STATE = 20  # bytes a parameter, fp32: weights, gradients, AdamW's two moments, EMA
PROFILE = 4  # and for each power-function average; one's update needs no more than gradients did
# and where several processes accumulate gradients over passes, which DistributedDataParallel's
# buckets then hold apart
ACCUMULATED = 4
FIXED = 8  # of one that is not trained: weights, EMA


def training_memory(
    config: networks.Config,
    micro_batch: int,
    checkpoint_blocks: bool = False,
    precision: str = "bf16",
    profiles: int = 0,
    accumulated: bool = False,
) -> tuple[int, int]:
    """(bytes of the state, most bytes of activations at once) of training with `micro_batch` images
    per GPU and pass, with so many `profiles` of averages kept for afterwards; `accumulated`: on
    several GPUs, over several passes a step.

    Without torch.compile, which fuses some of the activations away, and without the allocator's
    slack and CUDA's own context (about 1 GB together)."""
    model = networks.blank(config).train()
    model.checkpoint_blocks = checkpoint_blocks
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty(parameter.shape)
                setattr(module, name, torch.nn.Parameter(empty, parameter.requires_grad))
        peak = activations(model, config, micro_batch, precision)
    trained = STATE + PROFILE * profiles + ACCUMULATED * accumulated
    state = 0
    for parameter in model.parameters():
        state += parameter.numel() * (trained if parameter.requires_grad else FIXED)
    return state, peak


def activations(
    model: networks.Network, config: networks.Config, batch: int, precision: str
) -> int:
    """Most bytes that a forward and a backward pass hold at once besides weights and gradients."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Live() as live, norms_as_on_cuda():
        images = torch.zeros(batch, config.channels, config.size, config.size)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            predictions = model(images, torch.zeros(batch), torch.zeros(batch, dtype=torch.long))
        sums, _ = diffusion.multi_scale_loss(predictions, images)
        del predictions
        sums.sum().backward()
    return live.peak


@contextlib.contextmanager
def norms_as_on_cuda():
    """A context in which layer norms take and give float32, whatever autocast has them do."""
    plain = F.layer_norm

    def wide(*arguments, **keywords):
        arguments = [one.float() if isinstance(one, torch.Tensor) else one for one in arguments]
        with torch.autocast("cpu", enabled=False):
            return plain(*arguments, **keywords)

    F.layer_norm = wide
    try:
        yield
    finally:
        F.layer_norm = plain


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
