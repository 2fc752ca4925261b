"""The Vision Transformer (Dosovitskiy et al., arXiv:2010.11929) under timm's weight names, and
DINOv2 (Oquab et al., arXiv:2304.07193) under its authors'. It stands alone.

    vit = from_state_dict(load_file("model.safetensors"))
    logits = vit(prepare(images, vit.side))             # images: (N, H, W, 3) uint8, square
    dino = dino_from_state_dict(torch.load("dinov2_vitl14_pretrain.pth", weights_only=True))
    features = dino.features(prepare_dino(images))      # (N, 1024)

`prepare` is the preprocessing of timm's `augreg` weights: bicubic with antialiasing to ⌊224 / 0.9⌋
= 248 pixels, centre crop to 224, [-1, 1]. `prepare_dino` is what FD-DINOv2 is defined with."""

import math

import torch
import torch.nn.functional as F
from torch import nn

HEAD = 64  # channels of an attention head
CROP = 0.9  # share of the resized image's side that the network sees
DINO_SIDE = 224  # pixels that FD-DINOv2 sees
# added to the grid's side before its ratio to the stored one is taken: a historical kludge, which
# the numbers depend on
KLUDGE = 0.1
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green, blue


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


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, hidden, scaled):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.ls1 = LayerScale(dim) if scaled else nn.Identity()
        self.ls2 = LayerScale(dim) if scaled else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class ViT(nn.Module):
    """x: (B, 3, side, side), prepared → logits (B, classes), of a network without `classes` the
    features (B, dim). `scaled`: whether what a block adds is scaled by channel (DINOv2)."""

    def __init__(self, side, patch, dim, depth, hidden, classes=None, *, scaled=False):
        super().__init__()
        self.side = side
        self.dim = dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (side // patch) ** 2, dim))
        self.blocks = nn.Sequential(*[Block(dim, hidden, scaled) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.head = nn.Linear(dim, classes) if classes else nn.Identity()

    def features(self, x):
        """The class token (B, dim) after the last norm."""
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.norm(self.blocks(x))[:, 0]

    def forward(self, x):
        return self.head(self.features(x))


def from_state_dict(tensors: dict[str, torch.Tensor]) -> ViT:
    """The classifier, in eval mode, whose tensors have timm's names; its shape is read off them.
    Raises ValueError."""
    try:
        shape = _shape(tensors)
        grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        classes = len(tensors["head.weight"])
    except (KeyError, ValueError):
        names = "patch_embed.proj, blocks.0.mlp.fc1, head …"
        raise ValueError(f"not a Vision Transformer under timm's names ({names})") from None
    return _loaded(tensors, side=grid * shape["patch"], classes=classes, **shape)


def dino_from_state_dict(tensors: dict[str, torch.Tensor]) -> ViT:
    """DINOv2 without registers, in eval mode, for images of 224 pixels, from tensors under its
    authors' names. Raises ValueError."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    try:
        shape = _shape(tensors)
        _ = tensors["blocks.0.ls1.gamma"]
        tensors["pos_embed"] = _resized(tensors["pos_embed"], DINO_SIDE // shape["patch"])
    except (KeyError, ValueError, IndexError, RuntimeError):
        names = "patch_embed.proj, pos_embed, blocks.0.ls1 …"
        raise ValueError(f"not DINOv2 under its authors' names ({names})") from None
    return _loaded(tensors, side=DINO_SIDE, scaled=True, **shape)


def _shape(tensors):
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    return {
        "dim": dim,
        "patch": patch,
        "hidden": len(tensors["blocks.0.mlp.fc1.weight"]),
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
    }


def _resized(positions, side):
    """Positions (1, 1 + side², D) of stored ones (1, 1 + n², D): the class token's as it is, the
    grid's by bicubic interpolation without antialiasing."""
    stored = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].float().unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    if stored != side:
        ratio = (side + KLUDGE) / stored
        grid = F.interpolate(grid, scale_factor=(ratio, ratio), mode="bicubic")
    return torch.cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)


def _loaded(tensors, **shape):
    with torch.device("meta"):
        network = ViT(**shape)
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


def prepare_dino(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (N, H, W, 3) as FD-DINOv2 takes them, (N, 3, 224, 224) on their device: bicubic
    with antialiasing in float, ImageNet's mean and deviation taken out."""
    x = images.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (DINO_SIDE, DINO_SIDE), mode="bicubic", antialias=True) / 255
    mean = torch.tensor(MEAN, device=x.device)[:, None, None]
    deviation = torch.tensor(DEVIATION, device=x.device)[:, None, None]
    return (x - mean) / deviation
