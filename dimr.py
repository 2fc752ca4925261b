"""DiMR: the multi-resolution network of "Alleviating Distortion in Image Generation via
Multi-Resolution Diffusion Models" (arXiv:2406.09416, Sec. 4), in the order data flows: norms, MLP,
blocks, branch, network.

R branches see the noisy image from coarse to fine. Branch 1 runs Transformer blocks on the coarsest
grid, the others ConvNeXt blocks. Each adds the upsampled features of the branch before it to its
own patchified input (the cascade), and each predicts the noise at its resolution; the last
prediction is the output.

The paper's text and its released code differ in three places, and this file follows the code, which
gives the published parameter counts and GFLOPs: the cascade carries the features of *every* block,
concatenated; the number of blocks is rounded up to odd; and the released weights' blocks use
TD-LN's scale-only sibling (`tdrms`)."""

import dataclasses
import re
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# Kinds of device where launching a kernel takes longer than a small one's work, and whose fused
# attention takes heads of a multiple of EVEN numbers and copies others
GPUS = {"cuda"}
EVEN = 8


class Condition(NamedTuple):
    """What a norm may depend on: time `tau` (B,), or (1,) when all samples share it; class indices
    `y` (B,); and what the branch's embedder makes of the time, (B, D) or (1, D), where its norms
    ask for one."""

    tau: torch.Tensor
    y: torch.Tensor
    embedding: torch.Tensor | None = None
    vectors: dict | None = None  # TimeVector → its value, where all were computed at once

    def value(self, vector):
        """Of a TimeVector, (B, D) or (1, D)."""
        if self.vectors is None:
            return vector(self.tau)
        return self.vectors[vector]


# -------------------------------------------------------------------------------------------- norms


class TimeVector(nn.Module):
    """A vector that moves with time, s·p₁ + (1 − s)·p₂ with s = σ(w·τ + b), elementwise (paper,
    eqs. 5-6).

    w is stored less 1, so that no initial value and no pull of an optimiser favours w = 0."""

    NO_DECAY = ("w_minus_1", "b")

    def __init__(self, dim, init):
        super().__init__()
        self.p1 = nn.Parameter(torch.full((dim,), float(init)))
        self.p2 = nn.Parameter(torch.full((dim,), float(init)))
        self.w_minus_1 = nn.Parameter(torch.zeros(dim))
        self.b = nn.Parameter(torch.zeros(dim))

    def forward(self, tau):  # (B,) -> (B, D), always float32
        return moved(tau, self.p1, self.p2, self.w_minus_1, self.b)


def moved(tau, p1, p2, w_minus_1, b):
    """The vectors s·p₁ + (1 − s)·p₂, float32 (B, D), at times tau (B,)."""
    s = torch.sigmoid(tau.float()[:, None] * (w_minus_1.float() + 1) + b.float())
    return torch.lerp(p2.float(), p1.float(), s)


def all_moved(vectors, tau):
    """{vector: its value (1, D)} of TimeVectors at one time tau (1,): the same numbers as each has
    by itself, in a few kernels for all instead of five for each."""
    joined = []
    for name in ("p1", "p2", "w_minus_1", "b"):
        joined.append(torch.cat([getattr(vector, name) for vector in vectors]))
    values = moved(tau, *joined).split([len(vector.b) for vector in vectors], dim=1)
    return dict(zip(vectors, values, strict=True))


class Norm(nn.Module):
    """Base of the norms: `norm(x, condition)` for x (B, tokens, D), and the pre-norm residual step.

    A norm whose own layers cost something says so in `macs`; one that begins otherwise than
    `initialise` has it sets its values in `begin`."""

    def residual(self, x, condition, function):
        return x + function(self(x, condition))

    @staticmethod
    def macs(dim):
        """Multiply-accumulates an image of the norm's own layers."""
        return 0

    def begin(self):
        pass


class TDLN(Norm):
    """Time-dependent layer normalisation, LN(x)·γ(τ) + β(τ) (paper, Sec. 4.2, eq. 7)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = TimeVector(dim, 1)
        self.beta = TimeVector(dim, 0)

    def forward(self, x, condition):
        gamma = condition.value(self.gamma).to(x.dtype)
        beta = condition.value(self.beta).to(x.dtype)
        if gamma.shape[0] == 1:  # one time for all: the library's fused affine
            return F.layer_norm(x, x.shape[-1:], gamma[0], beta[0])
        return torch.addcmul(beta[:, None], F.layer_norm(x, x.shape[-1:]), gamma[:, None])


class TDRMS(Norm):
    """TD-LN's scale-only sibling, x / (‖x‖₂/√D + 1e-8) · γ(τ), which the released checkpoints
    use."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = TimeVector(dim, 1)

    def forward(self, x, condition):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rms = length * x.shape[-1] ** -0.5
        gamma = condition.value(self.gamma).to(x.dtype)
        return x * (1 / (rms + 1e-8)).to(x.dtype) * gamma[:, None]


class LN(Norm):
    """Layer normalisation with a fixed scale and shift, as in U-ViT: time does not reach it."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x, condition):
        return F.layer_norm(x, x.shape[-1:], self.scale.to(x.dtype), self.shift.to(x.dtype))


class AdaLNZero(Norm):
    """adaLN-Zero (Peebles and Xie, arXiv:2212.09748; paper, Sec. 3): x + α·f((1 + γ)·LN(x) + β).

    γ, β and α are linear in the embedding of time; at the start they are 0, so that every block
    begins as the identity."""

    def __init__(self, dim):
        super().__init__()
        self.modulation = nn.Linear(dim, 3 * dim)

    def begin(self):
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def vectors(self, condition):  # γ, β, α, each (B, 1, D)
        return self.modulation(F.silu(condition.embedding))[:, None].chunk(3, dim=-1)

    def forward(self, x, condition):
        gamma, beta, _ = self.vectors(condition)
        return self.modulated(x, gamma, beta)

    def residual(self, x, condition, function):
        gamma, beta, alpha = self.vectors(condition)
        return x + alpha.to(x.dtype) * function(self.modulated(x, gamma, beta))

    @staticmethod
    def modulated(x, gamma, beta):
        return F.layer_norm(x, x.shape[-1:]) * (1 + gamma).to(x.dtype) + beta.to(x.dtype)

    @staticmethod
    def macs(dim):
        return 3 * dim * dim


class TimeEmbedder(nn.Module):
    """DiT's embedding of time: 256 sinusoids of 1000·t, cosines first, periods up to 10,000, then
    Linear, SiLU, Linear to D."""

    SINUSOIDS = 256

    def __init__(self, dim):
        super().__init__()
        self.linear1 = nn.Linear(self.SINUSOIDS, dim)
        self.linear2 = nn.Linear(dim, dim)

    def forward(self, t):  # (B,) in [0, 1] -> (B, D)
        half = self.SINUSOIDS // 2
        powers = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = 1000 * t.float()[:, None] * 10_000**-powers
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(sinusoids)))

    @classmethod
    def macs(cls, dim):
        return cls.SINUSOIDS * dim + dim * dim


@dataclasses.dataclass(frozen=True)
class NormRow:
    """What a network is built from that has this norm."""

    inner: type  # in the blocks
    outer: type  # in the cascade's step and before each prediction
    embedder: type | None = None  # one a branch, whose (B, D) all its inner norms share
    mixing: bool = False  # whether one stands before a depthwise convolution too


NORMS = {
    "tdln": NormRow(TDLN, TDLN),
    "tdrms": NormRow(TDRMS, TDLN),
    "ln": NormRow(LN, LN),
    "adaln": NormRow(AdaLNZero, LN, embedder=TimeEmbedder, mixing=True),
}


# ---------------------------------------------------------------------------------------------- MLP


class GEGLU(nn.Module):
    """W₂(GELU(W₀x) ⊙ W₁x) with hidden width 2D (paper, Sec. 4.3)."""

    def __init__(self, dim):
        super().__init__()
        self.w0 = nn.Linear(dim, 2 * dim)
        self.w1 = nn.Linear(dim, 2 * dim)
        self.w2 = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.w2(F.gelu(self.w0(x)) * self.w1(x))

    @staticmethod
    def macs(dim):
        """Multiply-accumulates a token."""
        return 6 * dim * dim


class MLP(nn.Module):
    """W₂ GELU(W₁x) with hidden width 4D, as in U-ViT and DiT (paper, Table 2)."""

    def __init__(self, dim):
        super().__init__()
        self.w1 = nn.Linear(dim, 4 * dim)
        self.w2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.w2(F.gelu(self.w1(x)))

    @staticmethod
    def macs(dim):
        return 8 * dim * dim


MLPS = {"geglu": GEGLU, "mlp": MLP}


# ------------------------------------------------------------------------------------------- blocks


def attention(q, k, v):
    """softmax(q·kᵀ/√d)·v over (B, heads, L, d)."""
    if q.is_cpu and q.dtype == torch.float32 and q.shape[-2] <= 64:
        # few tokens: the fused kernel's overhead is most of its time
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):  # (B, L, D)
        lacking = -(x.shape[-1] // self.heads) % EVEN
        if lacking and x.device.type in GPUS:
            return self.padded(x, lacking)
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))

    def padded(self, x, lacking):
        """The same, with heads that are wider by so many zeros: rows of the weights that make q, k
        and v, and columns of those that meet `v`."""
        width = x.shape[-1] // self.heads
        rows = self.qkv.weight.unflatten(0, (3 * self.heads, width))
        rows = F.pad(rows, (0, 0, 0, lacking)).flatten(0, 1)
        columns = self.out.weight.unflatten(1, (self.heads, width))
        columns = F.pad(columns, (0, lacking)).flatten(1)
        split = F.linear(x, rows).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)
        return F.linear(mixed.transpose(1, 2).flatten(2), columns, self.out.bias)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP over the grid's cells, the class token in front if there is one.

    Blocks are built from a Config and the number r of their branch; x is (B, tokens, D)."""

    TAKES_CLASS = True  # whether a class token may stand in front

    def __init__(self, config, r):
        super().__init__()
        dim = config.dims[r]
        norm = NORMS[config.norm].inner
        self.norm1 = norm(dim)
        self.attention = Attention(dim, config.heads)
        self.norm2 = norm(dim)
        self.mlp = MLPS[config.mlp](dim)

    def forward(self, x, condition):
        x = self.norm1.residual(x, condition, self.attention)
        return self.norm2.residual(x, condition, self.mlp)

    @staticmethod
    def check(config, r):
        """Raise ValueError for a configuration that such a block can't have in branch r."""
        if config.dims[r] % config.heads:
            which = "the first branch" if r == 0 else f"branch {r + 1}"
            raise ValueError(
                f"heads {config.heads} does not divide {which}'s width {config.dims[r]}"
            )

    @staticmethod
    def macs(config, r):
        """Multiply-accumulates an image."""
        dim = config.dims[r]
        tokens = config.tokens[r]
        a_token = 4 * dim * dim + 2 * tokens * dim + MLPS[config.mlp].macs(dim)
        return tokens * a_token + 2 * NORMS[config.norm].inner.macs(dim)


class Depthwise(torch.autograd.Function):
    """A depthwise convolution whose gradient by its input is one too, with the kernels turned
    round: on GPUs the library takes twice as long for that by itself (docs/performance.md)."""

    @staticmethod
    def forward(context, x, weight, bias):
        context.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(context, gradient):
        x, weight = context.saved_tensors
        padding, groups = weight.shape[-1] // 2, len(weight)
        of_x = F.conv2d(gradient, weight.flip(2, 3), padding=padding, groups=groups)
        others = torch.ops.aten.convolution_backward(
            *(gradient, x, weight, [groups], [1, 1], [padding, padding], [1, 1], False, [0, 0]),
            *(groups, [False, True, True]),
        )
        return of_x, *others[1:]


class ConvNeXtBlock(nn.Module):
    """A depthwise 7×7 convolution and a pre-norm MLP; it sees no class. No norm stands before the
    convolution but adaLN-Zero."""

    TAKES_CLASS = False

    def __init__(self, config, r):
        super().__init__()
        dim = config.dims[r]
        norm = NORMS[config.norm]
        self.grid = config.grids[r]
        if norm.mixing:
            self.norm_before = norm.inner(dim)
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = norm.inner(dim)
        self.mlp = MLPS[config.mlp](dim)
        self.mixing = norm.mixing

    def forward(self, x, condition):
        if self.mixing:
            x = self.norm_before.residual(x, condition, self.convolve)
        else:
            x = x + self.convolve(x)
        return self.norm.residual(x, condition, self.mlp)

    def convolve(self, x):  # (B, H·W, D), which the convolution sees as channels-last (B, D, H, W)
        image = x.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        if image.device.type in GPUS and torch.is_grad_enabled():
            image = self.depthwise_by_turning(image)
        else:
            image = self.depthwise(image)
        return image.permute(0, 2, 3, 1).flatten(1, 2)

    def depthwise_by_turning(self, image):
        """The same, in autocast's precision if there is one."""
        given = (image, self.depthwise.weight, self.depthwise.bias)
        kind = image.device.type
        if torch.is_autocast_enabled(kind):
            given = [tensor.to(torch.get_autocast_dtype(kind)) for tensor in given]
        return Depthwise.apply(*given)

    @staticmethod
    def check(config, r):
        pass

    @staticmethod
    def macs(config, r):
        dim = config.dims[r]
        tokens = config.tokens[r]
        norm = NORMS[config.norm]
        count = tokens * (49 * dim + MLPS[config.mlp].macs(dim)) + norm.inner.macs(dim)
        if norm.mixing:
            count += norm.inner.macs(dim)
        return count


BLOCKS = {"transformer": TransformerBlock, "convnext": ConvNeXtBlock}


# ---------------------------------------------------------------------------------- branch, network


class Skip(nn.Linear):
    """A long skip of U-ViT's: x and an earlier block's output, (B, tokens, D) each, to one. A unit,
    so that the casts of the two are compiled with it."""

    product = nn.Linear.forward  # what sampling on CPUs replaces, as the `forward` of others

    def __init__(self, dim):
        super().__init__(2 * dim, dim)

    def forward(self, x, earlier):
        return self.product(join([x, earlier], x.dtype))


class Upsample(nn.Module):
    """The cascade's step to the next resolution, of all features (B, h·w, D) of the branch before:
    TD-LN, Linear to 4·D, pixel shuffle × 2, TD-LN (or the outer norm of `NORMS`)."""

    def __init__(self, dim_in, dim, grid, norm):
        super().__init__()
        self.grid = grid  # of the input
        self.norm_in = norm(dim_in)
        self.linear = nn.Linear(dim_in, 4 * dim)
        self.norm_out = norm(dim)

    def forward(self, features, condition):  # -> (B, 2h·2w, D)
        # Under autocast the second half, which comes from the long skips' Linear layers, is in its
        # precision; so then is the whole, that is taken to it for a Linear layer anyway.
        y = self.linear(self.norm_in(join(features, features[-1].dtype), condition))
        y = y.unflatten(-1, (2, 2, -1)).unflatten(1, (self.grid, self.grid))
        # (B, h, w, row, column, D)
        return self.norm_out(y.transpose(2, 3).flatten(1, 4), condition)


def class_table(classes, dim):
    """An embedding. On the meta device without PyTorch's own start, which there imports a compiler
    first: seconds before a network is read."""
    numbers = torch.empty(classes, dim)
    if numbers.is_meta:
        return nn.Embedding.from_pretrained(numbers, freeze=False)
    return nn.Embedding(classes, dim)


class Branch(nn.Module):
    """Branch r: patchify, add position and cascade, run the blocks with U-ViT's long skips, predict
    the noise."""

    def __init__(self, config, r):
        super().__init__()
        dim = config.dims[r]
        grid = config.grids[r]
        blocks = config.blocks[r]
        norm = NORMS[config.norm]
        patch = config.size // grid
        self.patchify = nn.Conv2d(config.channels, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(grid * grid, dim))  # row-major
        if r == 0:
            self.class_token = class_table(config.embeddings, dim)
        else:
            dim_in = (config.blocks[r - 1] + 1) * config.dims[r - 1]
            self.upsample = Upsample(dim_in, dim, config.grids[r - 1], norm.outer)
        self.embedder = norm.embedder(dim) if norm.embedder else None
        block = BLOCKS[config.branch_kinds[r]]
        self.blocks = nn.ModuleList(block(config, r) for _ in range(blocks))
        self.skips = nn.ModuleList(Skip(dim) for _ in range(blocks // 2))
        self.out_norm = norm.outer(dim)
        self.out = nn.Conv2d(dim, config.channels, 3, padding=1)
        self.grid = grid
        self.tokens = int(r == 0)  # tokens in front of the grid's own

    def forward(self, image, before, condition, run):
        """`image` (B, C, H, W), `before` the features of the branch before or None; `run(block, x,
        condition)` applies a block.

        Returns the noise at this resolution (B, C, h, w) and this branch's features, blocks + 1 of
        (B, h·w, D)."""
        if self.embedder:
            embedding = self.embedder(condition.tau)
            condition = Condition(condition.tau, condition.y, embedding, condition.vectors)
        x = self.patchify(image).flatten(2).transpose(1, 2)  # (B, h·w, D)
        x = x.contiguous() + self.position  # channels last for good
        if self.tokens:
            x = torch.cat([self.class_token(condition.y)[:, None], x], dim=1)
        else:
            x = x + self.upsample(before, condition)
        features = [x[:, self.tokens :]]
        long_skips = []
        middle = len(self.skips)
        for i, block in enumerate(self.blocks):
            if i > middle:
                x = self.skips[i - middle - 1](x, long_skips.pop())
            x = run(block, x, condition)
            if i < middle:
                long_skips.append(x)
            features.append(x[:, self.tokens :])
        last = self.out_norm(features[-1], condition).unflatten(1, (self.grid, self.grid))
        return self.out(last.permute(0, 3, 1, 2)), features


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a network, the space it works in and what it predicts there. Tuples run over
    branches, coarse to fine. Raises ValueError for what makes no network."""

    size: int  # height and width of the input, in pixels or latent cells
    channels: int
    layers: tuple[int, ...]  # N of the paper's Table 3; even ones get one block more
    dims: tuple[int, ...]
    heads: int
    num_classes: int  # real classes
    null_class: bool  # one more embedding, for classifier-free guidance
    space: str  # "latent" or "pixel"
    norm: str = "tdln"
    mlp: str = "geglu"
    kinds: tuple[str, ...] = ()  # of blocks, by branch; by default Transformer, then ConvNeXt
    objective: str = "epsilon"  # what it predicts
    schedule: str = ""  # of the noise it is trained with; by default the one that goes with these

    def __post_init__(self):
        for field in ("layers", "dims", "kinds"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        branches = len(self.dims)
        if self.space not in SPACES:
            raise ValueError(f"space {self.space!r} is neither 'latent' nor 'pixel'")
        if branches < 1 or len(self.layers) != branches:
            raise ValueError(
                f"layers {self.layers} and dims {self.dims} need one entry per branch each"
            )
        if len(self.branch_kinds) != branches:
            raise ValueError(
                f"kinds {self.kinds} of blocks and dims {self.dims} need one entry per branch each"
            )
        numbers = (self.heads, self.num_classes, self.channels, self.size)
        if min(*self.layers, *self.dims, *numbers) < 1:
            raise ValueError(
                "layers, dims, heads, num_classes, channels and size must be at least 1"
            )
        if self.size % 2 ** (branches - 1):
            raise ValueError(
                f"size {self.size} does not halve {branches - 1} times, as {branches} branches need"
            )
        for field, table in (("norm", NORMS), ("mlp", MLPS)):
            name = getattr(self, field)
            if name not in table:
                raise ValueError(f"{field} {name!r} is not one of {', '.join(table)}")
        for r, kind in enumerate(self.branch_kinds):
            if kind not in BLOCKS:
                raise ValueError(f"kind of blocks {kind!r} is not one of {', '.join(BLOCKS)}")
            if r == 0 and not BLOCKS[kind].TAKES_CLASS:
                raise ValueError(f"{kind} blocks see no class token, so branch 1 can't have them")
            BLOCKS[kind].check(self, r)

    @property
    def branch_kinds(self):
        """Which of BLOCKS each branch is made of."""
        return self.kinds or ("transformer", *["convnext"] * (len(self.dims) - 1))

    @property
    def noise_schedule(self):
        """Which of diffusion.SCHEDULES it is trained with: the paper's for its space, or the
        straight path where it predicts a velocity."""
        if self.schedule:
            return self.schedule
        return "straight" if self.objective == "velocity" else SPACES[self.space]

    @property
    def grids(self):
        """Height of each branch's grid."""
        return tuple(self.size >> r for r in reversed(range(len(self.dims))))

    @property
    def blocks(self):
        """N' = 2⌊N/2⌋ + 1 blocks, so that long skips pair up around a middle one."""
        return tuple(2 * (n // 2) + 1 for n in self.layers)

    @property
    def tokens(self):
        """Tokens of each branch: the grid's cells, and in branch 1 the class token."""
        return tuple(grid * grid + (r == 0) for r, grid in enumerate(self.grids))

    @property
    def embeddings(self):
        """Rows of the class embedding; the null class is the last of them."""
        return self.num_classes + self.null_class

    @property
    def macs(self):
        """Multiply-accumulates of one forward pass of one image, per branch: what the paper calls
        Gflops."""
        return tuple(self._macs(r) for r in range(len(self.dims)))

    def _macs(self, r):
        dim = self.dims[r]
        grid = self.grids[r]
        blocks = self.blocks[r]
        cells = grid * grid
        patch = self.size // grid
        embedder = NORMS[self.norm].embedder
        count = cells * dim * self.channels * (patch * patch + 9)  # patchify, prediction
        count += blocks * BLOCKS[self.branch_kinds[r]].macs(self, r)
        count += blocks // 2 * self.tokens[r] * 2 * dim * dim  # skips
        if r > 0:  # the cascade's Linear
            count += cells // 4 * (self.blocks[r - 1] + 1) * self.dims[r - 1] * 4 * dim
        if embedder:
            count += embedder.macs(dim)
        return count


class DiMR(nn.Module):
    """The multi-resolution network (paper, Sec. 4.1). Predicts the noise at every resolution."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # recompute each block in the backward pass instead of keeping activations
        self.checkpoint_blocks = False
        # whether its `units` are: each then makes its own vectors, fused with what takes them
        self.compiled = False
        self.branches = nn.ModuleList(Branch(config, r) for r in range(len(config.dims)))
        self.vectors = [module for module in self.modules() if isinstance(module, TimeVector)]
        self.apply(initialise)

    def forward(self, x, tau, y):
        """x (B, C, H, W) noisy images; tau (B,) time as `time` gives it, or (1,) when all share it;
        y (B,) class indices. Returns the R predictions, coarse to fine: (B, C, H/2^(R-r),
        W/2^(R-r)).

        Raises ValueError for wrong shapes; values are the caller's to check, since that would wait
        for the device."""
        c = self.config
        if x.dim() != 4 or tuple(x.shape[1:]) != (c.channels, c.size, c.size):
            raise ValueError(
                f"x is {tuple(x.shape)}; expected (B, {c.channels}, {c.size}, {c.size})"
            )
        if tau.dim() != 1 or tau.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"tau is {tuple(tau.shape)}; expected ({x.shape[0]},), or (1,) for one time for all"
            )
        if y.shape != x.shape[:1] or y.is_floating_point():
            raise ValueError(
                f"y is {tuple(y.shape)} of {y.dtype}; expected ({x.shape[0]},) class indices"
            )
        run = recomputed if self.checkpoint_blocks and self.training else applied
        condition = Condition(tau, y, vectors=self.vectors_at(tau))
        features = None
        predictions = []
        for branch in self.branches:
            prediction, features = branch(x, features, condition, run)
            predictions.append(prediction)
        return tuple(predictions)

    def vectors_at(self, tau):
        """All TimeVectors at once where that is less work: on GPUs, at one time for all, outside
        training and compiled code. Else None."""
        if tau.device.type not in GPUS or len(tau) > 1 or not self.vectors:
            return None
        if torch.is_grad_enabled() or self.compiled or torch.compiler.is_compiling():
            return None
        return all_moved(self.vectors, tau)

    def units(self):
        """The modules that nearly all work is done in, which repeat: to be compiled each by
        itself."""
        kinds = (*BLOCKS.values(), Skip, Upsample)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def time(self, schedule, t):
        """What `forward` takes as `tau` at times t of a noise schedule: the schedule's own τ, or t
        itself where it is embedded as in DiT."""
        return t if NORMS[self.config.norm].embedder else schedule.tau(t)

    def modulations(self, t, y):
        """What adaLN-Zero emits, a list over the blocks of all branches, coarse to fine, of (B, 6,
        D): shift β, scale γ and gate α of the first residual, then of the MLP, at times t (B,) or
        (1,) as `forward` takes them. The class y (B,) has no part in it. Raises ValueError for
        another norm."""
        if self.config.norm != "adaln":
            raise ValueError(f"norm {self.config.norm} emits nothing; adaln does")
        found = []
        for branch in self.branches:
            condition = Condition(t, y, branch.embedder(t))
            for block in branch.blocks:
                parts = []
                for norm in (part for part in block.children() if isinstance(part, AdaLNZero)):
                    gamma, beta, alpha = norm.vectors(condition)
                    parts += [beta, gamma, alpha]
                found.append(torch.cat(parts, dim=1).expand(len(y), -1, -1))
        return found

    def parameter_groups(self, weight_decay):
        """For AdamW: everything decays, biases and embeddings included, but TD-LN's w and b."""
        exempt = set()
        for module in self.modules():
            for name in getattr(module, "NO_DECAY", ()):
                exempt.add(getattr(module, name))
        decaying = [p for p in self.parameters() if p not in exempt]
        others = [p for p in self.parameters() if p in exempt]
        return [
            {"params": decaying, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]


def join(features, dtype):
    """(B, tokens, ΣD) of features (B, tokens, D)."""
    return torch.cat([each.to(dtype) for each in features], dim=-1)


def applied(block, x, condition):
    return block(x, condition)


def recomputed(block, x, condition):
    return torch.utils.checkpoint.checkpoint(block, x, condition, use_reentrant=False)


def initialise(module):
    """Linear layers and embeddings: truncated normal of deviation 0.02, biases 0. Convolutions as
    PyTorch does. A norm that begins otherwise comes after its own layers, and sets them."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Branch):
        nn.init.trunc_normal_(module.position, std=0.02)
    elif isinstance(module, Norm):
        module.begin()


SPACES = {"latent": "scaled_linear", "pixel": "linear"}  # and the paper's noise schedule for each

_PIXEL = dict(size=64, channels=3, heads=12, num_classes=1000, null_class=False, space="pixel")
_MEDIUM = dict(layers=(15, 8, 8), dims=(768, 384, 192), **_PIXEL)
_LATENT = dict(size=32, channels=4, heads=16, num_classes=1000, null_class=True, space="latent")
_DIGITS = dict(size=8, channels=1, heads=4, num_classes=10, null_class=True, space="pixel")

VARIANTS = {  # paper, Table 3; g2r is on the release's page only
    "m3r": Config(**_MEDIUM),
    "l3r": Config(layers=(33, 17, 17), dims=(768, 384, 192), **_PIXEL),
    "xl2r": Config(layers=(39, 20), dims=(960, 480), **_LATENT),
    "xl3r": Config(layers=(39, 20, 20), dims=(960, 480, 240), **{**_LATENT, "size": 64}),
    "g2r": Config(layers=(57, 29), dims=(1152, 576), **_LATENT),
    "demo": Config(layers=(3, 2), dims=(64, 32), **_DIGITS),
    # Table 2 from its third row on, whose last is m3r; the first two are U-ViTs, in peers.py
    "table2-3": Config(**_MEDIUM, norm="adaln", mlp="mlp"),
    "table2-4": Config(**_MEDIUM, mlp="mlp"),
    "table2-5": Config(**_MEDIUM),
    "table2-6": Config(**_MEDIUM),
}


# ------------------------------------------------------------------------- the released checkpoints

# Fragments of a parameter's name, ours and the release's, applied in this order.
_RELEASED = (
    (r"^branches", "stages"),
    (r"patchify", "input_layer.1"),
    (r"position", "input_layer.3.position_embeddings.weight"),
    (r"class_token", "class_embeds"),
    (r"norm_in", "0"),
    (r"upsample.linear", "upsample.1.kernel"),
    (r"norm_out", "2"),
    (r"skips", "skip_denses"),
    (r"out_norm", "output_layer.0"),
    (r"(\d)\.out\.", r"\1.output_layer.2."),
    (r"norm1", "block1.norm"),
    (r"norm2?(?=\.(gamma|beta))(?<!block1.norm)", "block2.norm"),
    (r"attention.qkv", "block1.query_key_value"),
    (r"attention.out", "block1.dense"),
    (r"depthwise", "block1.1"),
    (r"mlp", "block2"),
    (r"beta", "bias"),
    (r"p1$", "param0"),
    (r"p2$", "param1"),
    (r"w_minus_1$", "nodecay_weight"),
    (r"(gamma|bias|scale)\.b$", r"\1.nodecay_bias"),
)


def _released_names(model):
    """Our parameter names → the release's. The scale of `tdrms` is its `scale`, that of TD-LN its
    `weight`."""
    names = {}
    for ours in model.state_dict():
        name = ours
        for pattern, replacement in _RELEASED:
            name = re.sub(pattern, replacement, name)
        scale_only = model.config.norm == "tdrms" and ".blocks." in ours
        names[ours] = name.replace("gamma", "scale" if scale_only else "weight")
    return names


def _released_config(shapes, heads, space, null_class):
    """Read a configuration off the shapes of a released state dict, by vote where several tensors
    tell the same."""

    def vote(pattern):  # on the length of the first axis
        found = []
        for name, shape in shapes.items():
            if re.fullmatch(pattern, name) and shape:
                found.append(shape[0])
        return max(set(found), key=found.count, default=1)

    def largest(pattern):  # of the numbers that names hold, or None
        found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
        return max(found, default=None)

    last = largest(r"stages\.(\d+)\.")
    if last is None:
        raise ValueError(
            "this is no released DiMR state dict: no tensor's name begins with 'stages.'"
        )
    dims = []
    layers = []
    for r in range(last + 1):
        layers.append((largest(rf"stages\.{r}\.blocks\.(\d+)\.") or 0) + 1)
        dims.append(vote(rf"stages\.{r}\.(blocks\.\d+\.block2\.w2\.bias|input_layer\.1\.bias)"))
    channels = vote(r"stages\.\d+\.(output_layer\.2\.bias)")
    cells = vote(rf"stages\.{last}\.input_layer\.3\.position_embeddings\.weight")
    if space is None:
        space = "latent" if channels == 4 else "pixel"
    if null_class is None:
        null_class = space == "latent"
    return Config(
        size=round(cells**0.5),
        channels=channels,
        layers=layers,
        dims=dims,
        heads=heads,
        norm="tdrms" if any(".norm.scale." in name for name in shapes) else "tdln",
        space=space,
        num_classes=vote(r"stages\.0\.class_embeds\.weight") - null_class,
        null_class=null_class,
    )


def from_config(config, state_dict):
    """The network of `config` holding the tensors of `state_dict` (our names) themselves, in eval
    mode.

    Raises ValueError naming every unknown, missing or misshapen tensor."""
    with torch.device("meta"):
        model = DiMR(config)
    check_names({name: tensor.shape for name, tensor in model.state_dict().items()}, state_dict)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


def check_names(expected, tensors):
    """Raise ValueError listing the differences between `expected` (name → shape) and `tensors`
    (name → tensor)."""
    faults = [f"unknown {name}" for name in tensors if name not in expected]
    faults += [f"missing {name}" for name in expected if name not in tensors]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(expected)} tensors don't fit: " + "; ".join(faults)
        )


def from_released(state_dict, heads=16, space=None, null_class=None, config=None):
    """A network in eval mode from a state dict under the authors' released names; its shape is read
    off the tensors.

    Not in the tensors: `heads`; `space` ("latent" by default for 4 channels, else "pixel"); and
    whether the last class embedding is the null class (by default in latent space). `config`, where
    it is known, overrules all three. Raises ValueError naming every tensor at fault."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    config = config or _released_config(shapes, heads, space, null_class)
    with torch.device("meta"):
        model = DiMR(config)
    names = _released_names(model)
    ours = model.state_dict()
    check_names({names[name]: tensor.shape for name, tensor in ours.items()}, state_dict)
    return from_config(config, {name: state_dict[names[name]] for name in ours})


def to_released(model):
    """The network's tensors under the authors' released names, the inverse of `from_released`.
    Raises ValueError for a network that the release can't hold."""
    config = model.config
    theirs = config.norm in ("tdln", "tdrms") and config.mlp == "geglu" and not config.kinds
    if not theirs or config.objective != "epsilon":
        raise ValueError(
            f"the release has no names for norm {config.norm}, mlp {config.mlp}, blocks "
            f"{', '.join(config.branch_kinds)} and objective {config.objective} together"
        )
    names = _released_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict().items()}
