"""The peers that the paper compares with: U-ViT (arXiv:2209.12152), DiT (arXiv:2212.09748) and SiT
(arXiv:2401.08740), in the order data flows: configuration, embeddings, blocks, networks, loading.
It stands alone.

All three cut the image into patches and run Transformer blocks over them. U-ViT takes class and
time as two more tokens and joins its blocks by long skips; DiT modulates every block by class and
time (adaLN-Zero). SiT is DiT's network read as a velocity. Parameters are named as in the released
files, so that these load as they are. A fourth stands between them, the second row of the paper's
Table 2: U-ViT with adaLN-Zero."""

import dataclasses
import math
import re
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

# ------------------------------------------------------------------------------------ configuration


class Reading(NamedTuple):
    """How a network's numbers are meant: what it predicts ("epsilon" or "velocity"), over which
    noise schedule, and the time it is told, rate·t + start for t from 0 (data) to 1 (noise)."""

    objective: str
    schedule: str
    rate: float
    start: float


READINGS = {
    ("uvit", "pixel"): Reading("epsilon", "linear", 999, 0),
    ("uvit", "latent"): Reading("epsilon", "scaled_linear", 1000, 0),
    ("uvit-adaln", "pixel"): Reading("epsilon", "linear", 1000, 0),
    ("uvit-adaln", "latent"): Reading("epsilon", "scaled_linear", 1000, 0),
    ("dit", "pixel"): Reading("epsilon", "ddpm", 1000, -1),
    ("dit", "latent"): Reading("epsilon", "ddpm", 1000, -1),
    ("sit", "pixel"): Reading("velocity", "straight", -1, 1),
    ("sit", "latent"): Reading("velocity", "straight", -1, 1),
}


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    """The shape of a network and the space it works in."""

    kind: str  # a key of NETWORKS
    size: int  # height and width of the input, in pixels or latent cells
    channels: int
    patch: int  # height and width of a patch
    width: int
    depth: int  # blocks; odd in a U-ViT
    heads: int
    num_classes: int  # real classes
    null_class: bool  # one more embedding, for classifier-free guidance
    space: str  # "latent" or "pixel"
    convolution: bool = False  # U-ViT ends on a 3×3 convolution
    learned_variance: bool = False  # DiT's variance channels have been trained

    def __post_init__(self):
        for fault in _faults(self):
            raise ValueError(fault)

    @property
    def objective(self):
        """What the network predicts: "epsilon" or "velocity"."""
        return READINGS[self.kind, self.space].objective

    @property
    def noise_schedule(self):
        """The name of the noise schedule it was made for."""
        return READINGS[self.kind, self.space].schedule

    def time(self, t):
        """The time that the network is told at our t from 0 (data) to 1 (noise), float64."""
        reading = READINGS[self.kind, self.space]
        return reading.rate * torch.as_tensor(t, dtype=torch.float64) + reading.start

    @property
    def grid(self):
        """Height of the grid of patches."""
        return self.size // self.patch

    @property
    def embeddings(self):
        """Rows of the class embedding; the null class is the last of them."""
        return self.num_classes + self.null_class

    @property
    def macs(self):
        """Multiply-accumulates of one forward pass of one image, as a tuple of one: what the papers
        call Gflops."""
        width, cells = self.width, self.grid**2
        pixels = cells * self.patch**2 * self.channels
        network = NETWORKS[self.kind]
        tokens = network.TOKENS + cells
        count = self.depth * tokens * (12 * width**2 + 2 * tokens * width)
        if issubclass(network, UViT):
            count += 2 * pixels * width + self.depth // 2 * tokens * 2 * width**2  # the long skips
            if self.convolution:
                count += 9 * pixels * self.channels
        else:
            count += 3 * pixels * width
        if network.MODULATED:
            count += (256 + width) * width + (6 * self.depth + 2) * width**2
        return (count,)


def _faults(c):
    """What makes no sense about a configuration; each check may count on those before it."""
    if c.kind not in NETWORKS:
        yield f"kind {c.kind!r} is not one of {', '.join(NETWORKS)}"
    if c.space not in ("latent", "pixel"):
        yield f"space {c.space!r} is neither 'latent' nor 'pixel'"
    for field in ("size", "channels", "patch", "width", "depth", "heads", "num_classes"):
        if getattr(c, field) < 1:
            yield f"{field} {getattr(c, field)} is not at least 1"
    if c.size % c.patch:
        yield f"size {c.size} is not a multiple of patch {c.patch}"
    if c.width % 4:
        yield f"width {c.width} is not a multiple of 4, as sines and cosines need"
    if c.width % c.heads:
        yield f"heads {c.heads} does not divide the width {c.width}"
    if issubclass(NETWORKS[c.kind], UViT) and c.depth % 2 == 0:
        yield (
            f"depth {c.depth} is even: U-ViT's long skips pair blocks around a middle one; "
            f"use {c.depth - 1} or {c.depth + 1}"
        )
    if not issubclass(NETWORKS[c.kind], UViT) and c.convolution:
        yield f"a final convolution is U-ViT's; {c.kind} has none"
    if c.kind != "dit" and c.learned_variance:
        yield f"a learned variance is DiT's; {c.kind} has none"


# --------------------------------------------------------------------------------------- embeddings


def sinusoid(time, dim):
    """(B,) → (B, dim) float32: `dim`/2 cosines, then as many sines, periods from 2π up to
    10,000·2π."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.float()[:, None] * torch.exp(-math.log(10_000) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(dim, grid):
    """DiT's fixed positions (grid², dim), row-major. Half of the numbers tell the column, half the
    row, each by `dim`/4 sines and as many cosines."""
    steps = torch.arange(dim // 4, dtype=torch.float64)
    angles = torch.arange(grid)[:, None] * 10_000 ** (-steps / (dim // 4))
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, dim/2)
    column = line[None, :].expand(grid, -1, -1)
    row = line[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()


class PatchEmbedder(nn.Module):
    """Image to patches: (B, C, H, W) → (B, cells, D)."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """DiT's: 256 sines and cosines, and an MLP. (B,) → (B, D)."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time):
        return self.mlp(sinusoid(time, 256).to(self.mlp[0].weight.dtype))


class ClassEmbedder(nn.Module):
    """DiT's table of classes, the null class last. (B,) → (B, D)."""

    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.embeddings, config.width)

    def forward(self, y):
        return self.embedding_table(y)


def unpatchify(x, channels):
    """Patches to image: (B, h·w, p·p·C), channels fastest, → (B, C, h·p, w·p)."""
    grid = math.isqrt(x.shape[1])
    patch = math.isqrt(x.shape[2] // channels)
    x = x.unflatten(2, (patch, patch, channels)).unflatten(1, (grid, grid))  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# ------------------------------------------------------------------------------------------- blocks


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, L, D)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """W₂·GELU(W₁x) with hidden width 4D; `approximate` as in `F.gelu`."""

    def __init__(self, dim, approximate):
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP; in the second half of the network, a long skip joins before
    (U-ViT, Sec. 3.1)."""

    def __init__(self, config, skip=False):
        super().__init__()
        dim = config.width
        if skip:
            self.skip_linear = nn.Linear(2 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, config.heads, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, approximate="none")

    def forward(self, x, skip=None):  # (B, 2 + cells, D)
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def modulated(x, shift, scale):
    """(1 + scale)·LN(x) + shift, LN without weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Pre-norm attention and MLP under adaLN-Zero: the condition emits shift, scale and gate of
    each. The gates begin at zero, and the block as the identity (DiT, Sec. 3.2)."""

    def __init__(self, config, bias=True, approximate="tanh"):
        super().__init__()
        dim = config.width
        self.attn = Attention(dim, config.heads, bias)
        self.mlp = MLP(dim, approximate)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def modulation(self, condition):
        """(B, D) → (B, 6, D): shift, scale and gate of attention, then of the MLP."""
        return self.adaLN_modulation(condition).unflatten(-1, (6, -1))

    def forward(self, x, condition):  # (B, tokens, D), (B, D)
        vectors = self.modulation(condition)[:, :, None]  # (B, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors.unbind(1)
        x = x + gate1 * self.attn(modulated(x, shift1, scale1))
        return x + gate2 * self.mlp(modulated(x, shift2, scale2))


class UViTZeroBlock(DiTBlock):
    """U-ViT's block under adaLN-Zero; the long skip joins before it, unmodulated."""

    def __init__(self, config, skip=False):
        super().__init__(config, bias=False, approximate="none")
        if skip:
            self.skip_linear = nn.Linear(2 * config.width, config.width)

    def forward(self, x, condition, skip=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        return super().forward(x, condition)


class ModulatedNorm(nn.Module):
    """LN without weights of its own, its shift and scale emitted by the condition."""

    def __init__(self, dim):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, condition):  # (B, tokens, D), (B, D)
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return modulated(x, shift, scale)


class FinalLayer(ModulatedNorm):
    """Modulated norm and the Linear to the pixels of a patch, twice C channels each."""

    def __init__(self, config):
        super().__init__(config.width)
        self.linear = nn.Linear(config.width, config.patch**2 * 2 * config.channels)

    def forward(self, x, condition):  # (B, cells, D), (B, D)
        return self.linear(super().forward(x, condition))


# ----------------------------------------------------------------------------------------- networks


class Peer(nn.Module):
    """What the networks share. They are called as `dimr.DiMR` is."""

    TOKENS = 0  # in front of the image's own
    MODULATED = False  # whether its norms are adaLN-Zero's

    def __init__(self, config):
        super().__init__()
        self.config = config
        # recompute each block in the backward pass instead of keeping activations
        self.checkpoint_blocks = False
        self.compiled = False  # whether its `units` are

    def units(self):
        """The modules that nearly all work is done in, which repeat: to be compiled each by
        itself."""
        return [module for module in self.modules() if isinstance(module, UViTBlock | DiTBlock)]

    def forward(self, x, time, y, whole=False):
        """x (B, C, H, W) noisy images; time (B,) as `self.time` gives it, or (1,) when all
        share it; y (B,) class indices. Returns a tuple of one: the noise, or SiT's velocity (data −
        noise), (B, C, H, W); or with `whole` all that the network puts out (`raw`).

        Raises ValueError for wrong shapes; values are the caller's to check."""
        output = self.raw(x, time, y)
        if whole:
            return (output,)
        return (output[:, : self.config.channels],)

    def raw(self, x, time, y):
        """All that the network puts out: U-ViT's noise (B, C, H, W); 2C channels of the others,
        DiT's noise and its variance's interpolation, SiT's velocity and what it leaves unused."""
        c = self.config
        if x.dim() != 4 or tuple(x.shape[1:]) != (c.channels, c.size, c.size):
            raise ValueError(
                f"x is {tuple(x.shape)}; expected (B, {c.channels}, {c.size}, {c.size})"
            )
        if time.dim() != 1 or time.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"time is {tuple(time.shape)}; expected ({x.shape[0]},), or (1,) for one for all"
            )
        if y.shape != x.shape[:1] or y.is_floating_point():
            raise ValueError(
                f"y is {tuple(y.shape)} of {y.dtype}; expected ({x.shape[0]},) class indices"
            )
        return self.network(x, time, y)

    def time(self, schedule, t):
        """What `forward` takes as `time` at times t of a noise schedule. It is a straight line in t
        (see READINGS), whatever the schedule."""
        return self.config.time(t)

    def run(self, block, *inputs):
        if self.checkpoint_blocks and self.training:
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def parameter_groups(self, weight_decay):
        """For AdamW: everything that trains decays; DiT's positions are fixed."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained, "weight_decay": weight_decay}]


class UViT(Peer):
    """U-ViT: class, time and patches all are tokens, and long skips join the first half of the
    blocks to the second, the last to the first (U-ViT, Sec. 3)."""

    TOKENS = 2
    BLOCK = UViTBlock
    NORM = nn.LayerNorm

    def __init__(self, config):
        super().__init__(config)
        width, half = config.width, config.depth // 2
        self.patch_embed = PatchEmbedder(config)
        self.label_emb = nn.Embedding(config.embeddings, width)
        self.pos_embed = nn.Parameter(torch.empty(1, self.TOKENS + config.grid**2, width))
        self.in_blocks = nn.ModuleList(self.BLOCK(config) for _ in range(half))
        self.mid_block = self.BLOCK(config)
        self.out_blocks = nn.ModuleList(self.BLOCK(config, skip=True) for _ in range(half))
        self.norm = self.NORM(width)
        if self.MODULATED:
            self.t_embedder = TimeEmbedder(width)
        self.decoder_pred = nn.Linear(width, config.patch**2 * config.channels)
        self.final_layer = nn.Identity()
        if config.convolution:
            self.final_layer = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.initialise()

    def initialise(self):
        """Positions and Linears truncated normal of deviation 0.02, biases 0; the rest as PyTorch
        does, the class embedding's unit normal included (the release)."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def conditions(self, label, time):
        """The tokens in front, each (B, 1, D), of that of the class, and what else the blocks are
        given."""
        clock = sinusoid(time, label.shape[-1])[:, None].to(label.dtype).expand_as(label)
        return [label, clock], ()

    def network(self, image, time, y):
        front, given = self.conditions(self.label_emb(y)[:, None], time)
        x = torch.cat([*front, self.patch_embed(image)], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = self.run(block, x, *given)
            skips.append(x)
        x = self.run(self.mid_block, x, *given)
        for block in self.out_blocks:
            x = self.run(block, x, *given, skips.pop())
        x = self.decoder_pred(self.norm(x[:, self.TOKENS :], *given))
        return self.final_layer(unpatchify(x, self.config.channels))


class UViTZero(UViT):
    """U-ViT with adaLN-Zero in place of LN, and time in no token; the class still is one (the
    paper, Table 2, row 2). Built as DiT's, it has 193,095,300 parameters at M/4's shape; the paper
    prints 202.4M and doesn't say what else its own holds."""

    TOKENS = 1
    MODULATED = True
    BLOCK = UViTZeroBlock
    NORM = ModulatedNorm

    def initialise(self):
        """As U-ViT's, and all of adaLN-Zero 0."""
        super().initialise()
        for block in self.blocks():
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.norm.adaLN_modulation[1].weight)

    def blocks(self):
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def conditions(self, label, time):
        return [label], (self.t_embedder(time).expand(len(label), -1),)

    def modulations(self, time, y):
        """As DiT's; here the class has no part in it either."""
        condition = self.t_embedder(time).expand(len(y), -1)
        return [block.modulation(condition) for block in self.blocks()]


class DiT(Peer):
    """DiT, and SiT's network: patches at fixed positions, and class and time, added, as the
    condition of every block's adaLN-Zero (DiT, Sec. 3.2)."""

    MODULATED = True

    def __init__(self, config):
        super().__init__(config)
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimeEmbedder(config.width)
        self.y_embedder = ClassEmbedder(config)
        positions = grid_positions(config.width, config.grid)[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.initialise()

    def initialise(self):
        """Linears and patches Xavier uniform, embeddings and the time MLP normal of deviation 0.02,
        all of adaLN-Zero and the last Linear 0, biases 0 (the release)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias)
        for small in (
            self.y_embedder.embedding_table,
            self.t_embedder.mlp[0],
            self.t_embedder.mlp[2],
        ):
            nn.init.normal_(small.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def condition(self, time, y):
        """(B,) or (1,), (B,) → (B, D)."""
        return self.t_embedder(time) + self.y_embedder(y)

    def modulations(self, time, y):
        """What adaLN-Zero emits, a list over blocks of (B, 6, D): shift, scale and gate of
        attention, then of the MLP, at times (B,) or (1,) as `forward` takes them. The image has no
        part in it."""
        condition = self.condition(time, y)
        return [block.modulation(condition) for block in self.blocks]

    def network(self, image, time, y):
        condition = self.condition(time, y)
        x = self.x_embedder(image) + self.pos_embed  # (B, cells, D)
        for block in self.blocks:
            x = self.run(block, x, condition)
        return unpatchify(self.final_layer(x, condition), 2 * self.config.channels)


NETWORKS = {"uvit": UViT, "uvit-adaln": UViTZero, "dit": DiT, "sit": DiT}

_PIXEL = dict(size=64, channels=3, num_classes=1000, null_class=False, space="pixel")
_LATENT = dict(size=32, channels=4, num_classes=1000, null_class=True, space="latent")
_LATENT_512 = {**_LATENT, "size": 64}
_MEDIUM = dict(kind="uvit", width=768, depth=17, heads=12, convolution=True)
_LARGE = dict(kind="uvit", width=1024, depth=21, heads=16, convolution=True)
_HUGE = dict(kind="uvit", width=1152, depth=29, heads=16)
_BASE = dict(patch=2, width=768, depth=12, heads=12)
_XLARGE = dict(patch=2, width=1152, depth=28, heads=16)
_DIT = dict(kind="dit", learned_variance=True)

VARIANTS = {  # U-ViT, Table 1; DiT, Table 1; `depth` counts U-ViT's middle block
    "uvit-m4": PeerConfig(patch=4, **_MEDIUM, **_PIXEL),
    "uvit-l4": PeerConfig(patch=4, **_LARGE, **_PIXEL),
    "uvit-l2": PeerConfig(patch=2, **_LARGE, **_LATENT),
    "uvit-h2": PeerConfig(patch=2, **_HUGE, **_LATENT),
    "uvit-l4-512": PeerConfig(patch=4, **_LARGE, **_LATENT_512),
    "uvit-h4": PeerConfig(patch=4, **_HUGE, **_LATENT_512),
    "dit-b2": PeerConfig(**_DIT, **_BASE, **_LATENT),
    "dit-xl2": PeerConfig(**_DIT, **_XLARGE, **_LATENT),
    "dit-xl2-512": PeerConfig(**_DIT, **_XLARGE, **_LATENT_512),
    "sit-xl2": PeerConfig(kind="sit", **_XLARGE, **_LATENT),
    # the paper, Table 2
    "table2-1": PeerConfig(patch=4, **_MEDIUM, **_PIXEL),
    "table2-2": PeerConfig(patch=4, **{**_MEDIUM, "kind": "uvit-adaln"}, **_PIXEL),
}


# ------------------------------------------------------------------------------------------ loading

# What is read off where: (embedding of patches, of classes), by network.
_NAMES = {
    UViT: ("patch_embed.proj.weight", "label_emb.weight"),
    DiT: ("x_embedder.proj.weight", "y_embedder.embedding_table.weight"),
}

PUBLISHED_HEADS = {  # (network, width, depth): U-ViT, Table 1; DiT, Table 1
    (UViT, 512, 13): 8,
    (UViT, 512, 17): 8,
    (UViT, 768, 17): 12,
    (UViT, 1024, 21): 16,
    (UViT, 1152, 29): 16,
    (DiT, 384, 12): 6,
    (DiT, 768, 12): 12,
    (DiT, 1024, 24): 16,
    (DiT, 1152, 28): 16,
}


def from_config(config, tensors):
    """The network of `config` holding the tensors of `tensors` themselves, in eval mode.

    Raises ValueError naming every unknown, missing or misshapen tensor."""
    with torch.device("meta"):
        model = NETWORKS[config.kind](config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    faults = _misfits(expected, tensors)
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(expected)} tensors don't fit this {config.kind}: "
            + "; ".join(faults)
        )
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _misfits(expected, tensors):
    faults = [f"unknown {name}" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name not in tensors:
            faults.append(f"missing {name}")
        elif tensors[name].shape != shape:
            faults.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}")
    return faults


def from_state_dict(tensors, kind=None, heads=None, space=None, null_class=None):
    """A network in eval mode from a released file's tensors; its shape is read off them.

    Not in the tensors: `heads`, known for the published widths and depths; `kind`, "dit" or "sit"
    (a U-ViT is known by its names); `space`, "latent" by default for 4 channels, else "pixel"; and
    whether the last class embedding is the null class, by default in all but U-ViT's pixel models.
    Raises ValueError in one line: for what has to be told, naming the flag, or naming every tensor
    at fault."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kind = _kind(shapes, kind)
    return from_config(_released_config(shapes, kind, heads, space, null_class), tensors)


RELEASED = ("uvit", "dit", "sit")  # kinds that files of the authors' own hold


def recognises(names):
    """Whether tensors of these names are a peer's."""
    return _are_uvits(names) or _are_dits(names)


def _are_uvits(names):
    return any(name.startswith(("in_blocks.", "mid_block.", "out_blocks.")) for name in names)


def _are_dits(names):
    return any(re.match(r"blocks\.\d+\.adaLN_modulation\.", name) for name in names)


def _kind(names, kind):
    """`kind` if the names allow it, or what they tell by themselves."""
    if kind is not None and kind not in RELEASED:
        raise ValueError(f"--kind {kind} is not one of {', '.join(RELEASED)}")
    if _are_uvits(names):
        if kind not in (None, "uvit"):
            raise ValueError(f"--kind {kind}: these are a U-ViT's tensors; leave --kind out")
        return "uvit"
    if not _are_dits(names):
        raise ValueError(
            "these are no U-ViT's, DiT's or SiT's tensors: no name begins with 'in_blocks.' or "
            "has the form 'blocks.0.adaLN_modulation.…'"
        )
    if kind is None:
        raise ValueError(
            "DiT's and SiT's tensors have the same names and shapes, so this file may be either; "
            "say which with --kind dit or --kind sit"
        )
    if kind == "uvit":
        raise ValueError("--kind uvit: these are DiT's or SiT's tensors; give --kind dit or sit")
    return kind


def _released_config(shapes, kind, heads, space, null_class):
    """Read a configuration off the shapes. Where a tensor that tells is missing or misshapen, a
    published value stands in, so that `from_config` names that tensor and not all the others."""
    network = NETWORKS[kind]
    patches, classes = _NAMES[network]

    def shape(name, default):
        found = shapes.get(name, ())
        if len(found) != len(default) or 0 in found:
            return default
        return found

    widths = Counter(s[0] for name, s in shapes.items() if re.search(r"attn\.proj\.bias$", name))
    width = max(widths, key=widths.get, default=1152)
    _, channels, _, patch = shape(patches, (width, 4, 2, 2))
    _, positions, _ = shape("pos_embed", (1, 256, width))
    embeddings, _ = shape(classes, (1001, width))
    depth = _blocks(shapes, "blocks")
    if kind == "uvit":
        positions -= 2
        depth = 1 + 2 * max(_blocks(shapes, "in_blocks"), _blocks(shapes, "out_blocks"))
    if heads is None:
        heads = _published_heads(network, width, depth)
    if space is None:
        space = "latent" if channels == 4 else "pixel"
    if null_class is None:
        null_class = kind != "uvit" or space == "latent"
    return PeerConfig(
        kind=kind,
        size=max(1, round(max(0, positions) ** 0.5)) * patch,
        channels=channels,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        num_classes=embeddings - null_class,
        null_class=null_class,
        space=space,
        convolution=kind == "uvit" and any(name.startswith("final_layer.") for name in shapes),
        learned_variance=kind == "dit",
    )


def _blocks(shapes, prefix):
    """How many blocks the names count, by the highest index."""
    found = [re.match(rf"{prefix}\.(\d+)\.", name) for name in shapes]
    return max((1 + int(match[1]) for match in found if match), default=0)


def _published_heads(network, width, depth):
    if (network, width, depth) not in PUBLISHED_HEADS:
        raise ValueError(
            f"no tensor tells the number of heads, and no published {network.__name__} has width "
            f"{width} and depth {depth}; give it with --heads"
        )
    return PUBLISHED_HEADS[network, width, depth]
