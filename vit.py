"""The Vision Transformer (Dosovitskiy et al., arXiv:2010.11929) under timm's weight names. It
stands alone.

    vit = from_state_dict(load_file("model.safetensors"))
    logits = vit(prepare(images, vit.side))             # images: (N, H, W, 3) uint8, square

`prepare` is the preprocessing of timm's `augreg` weights: bicubic with antialiasing to ⌊224 / 0.9⌋
= 248 pixels, centre crop to 224, [-1, 1]."""

import math

import torch
import torch.nn.functional as F
from torch import nn

HEAD = 64  # channels of an attention head
CROP = 0.9  # share of the resized image's side that the network sees


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        # (B, heads, tokens, HEAD) each
        q, k, v = self.qkv(x).unflatten(2, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """x: (B, 3, side, side) in [-1, 1] → logits (B, classes)."""

    def __init__(self, side, patch, dim, depth, hidden, classes):
        super().__init__()
        self.side = side
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (side // patch) ** 2, dim))
        self.blocks = nn.Sequential(*[Block(dim, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def from_state_dict(tensors: dict[str, torch.Tensor]) -> ViT:
    """The classifier, in eval mode, whose tensors have timm's names; its shape is read off them.
    Raises ValueError."""
    try:
        dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        side = math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch
        hidden = len(tensors["blocks.0.mlp.fc1.weight"])
        classes = len(tensors["head.weight"])
    except (KeyError, ValueError):
        names = "patch_embed.proj, blocks.0.mlp.fc1, head …"
        raise ValueError(f"not a Vision Transformer under timm's names ({names})") from None
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    with torch.device("meta"):
        network = ViT(side, patch, dim, depth, hidden, classes)
    _check_names(network, tensors)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _is_finite(tensor):
    return tensor is None or bool(tensor.isfinite().all())


def _check_names(network, tensors):
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    faults = [f"unknown {name}" for name in tensors if name not in shapes]
    faults += [f"missing {name}" for name in shapes if name not in tensors]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults += [f"{name} is not finite" for name in shapes if not _is_finite(tensors.get(name))]
    if faults:
        raise ValueError(f"{len(faults)} of {len(shapes)} tensors don't fit: " + "; ".join(faults))


def prepare(images: torch.Tensor, side: int) -> torch.Tensor:
    """Square images uint8 (N, H, W, 3) on the CPU as the classifier takes them: (N, 3, side, side)
    in [-1, 1].

    Resizing uint8 rounds after each axis as Pillow does, which made what the weights were trained
    on."""
    resized = math.floor(side / CROP)
    x = F.interpolate(
        images.permute(0, 3, 1, 2), (resized, resized), mode="bicubic", antialias=True
    )
    start = round((resized - side) / 2)
    return x[..., start : start + side, start : start + side] / 127.5 - 1
