"""The SD-VAE: images to latents of an eighth of their size, and back. It stands alone.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752): a
KL autoencoder, of which the latent models (paper, Sec. 5.1) use the fine-tuned weights
`sd-vae-ft-ema`.

    vae = load("diffusion_pytorch_model.safetensors")
    mean, logvar = vae.encode(x)                                # x: (B, 3, H, W) in [-1, 1]
    z = SCALE * (mean + (logvar / 2).exp() * torch.randn_like(mean))  # what the network sees
    x = vae.decode(z / SCALE)
"""

import re
from statistics import mode
from zipfile import is_zipfile

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

SCALE = 0.18215  # brings the VAE's latents to about unit variance
DOWN = 8  # pixels per latent cell, along each side
CHANNELS = 4  # of a latent
WIDTHS = (128, 256, 512, 512)  # channels at each level, finest first
GROUPS = 32
PIXELS_AT_ONCE = {
    "cuda": 2**20,
    "cpu": 2**18,
    "mps": 2**18,
}  # the default chunk: 2**20 is 16 images of 256 × 256


def norm(width):
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        return self.conv2(F.silu(self.norm2(h), inplace=True)).add_(self.shortcut(x))


class Attention(nn.Module):
    """Every cell attends to every other: one head, as wide as the features."""

    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, H·W, D)
        h = self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + h.squeeze(1).transpose(1, 2).view_as(x)


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution unless it is the last."""

    def __init__(self, width_in, width, blocks, resample):
        super().__init__()
        self.blocks = nn.Sequential(
            *(ResidualBlock(width if i else width_in, width) for i in range(blocks))
        )
        self.resample = resample


class Downsample(nn.Conv2d):
    def __init__(self, width):
        super().__init__(width, width, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Conv2d):
    """Doubles the resolution by repeating each cell, then convolves 3 × 3. Both at once are a
    transposed convolution of stride 2, whose 4 × 4 kernel sums the 3 × 3 one over the copies of a
    cell: 16 products a cell instead of 36."""

    def __init__(self, width):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x):
        kernel = self.weight.flip(2, 3).transpose(0, 1)
        kernel = sum(F.pad(kernel, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1))
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


def middle(width):
    return nn.Sequential(ResidualBlock(width, width), Attention(width), ResidualBlock(width, width))


class Encoder(nn.Module):
    """(B, 3, H, W) → (B, 8, H/8, W/8)"""

    def __init__(self, widths):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        last = len(widths) - 1
        self.levels = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, 2, Downsample(width) if i < last else nn.Identity())
            for i, width in enumerate(widths)
        )
        self.middle = middle(widths[-1])
        self.norm_out, self.conv_out = (
            norm(widths[-1]),
            nn.Conv2d(widths[-1], 2 * CHANNELS, 3, padding=1),
        )

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.levels:
            x = level.resample(level.blocks(x))
        return self.conv_out(F.silu(self.norm_out(self.middle(x)), inplace=True))


class Decoder(nn.Module):
    """(B, 4, H/8, W/8) → (B, 3, H, W); its levels are numbered finest first too, and run from the
    last."""

    def __init__(self, widths):
        super().__init__()
        self.conv_in = nn.Conv2d(CHANNELS, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1])
        last = len(widths) - 1
        self.levels = nn.ModuleList(
            Level(widths[min(i + 1, last)], width, 3, Upsample(width) if i else nn.Identity())
            for i, width in enumerate(widths)
        )
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.middle(self.conv_in(z))
        for level in reversed(self.levels):
            x = level.resample(level.blocks(x))
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class VAE(nn.Module):
    """`source` says whose names the weights came under. Images are (B, 3, H, W) in [-1, 1], H and W
    multiples of 8; latents are (B, 4, H/8, W/8) in the VAE's own units, not multiplied by SCALE.
    Both directions take any float type, compute in that of the weights whatever autocast says, and
    return float32; `chunk`, the images at once, bounds the memory (about 2 GB by default)."""

    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.encoder, self.decoder = Encoder(widths), Decoder(widths)
        self.quant, self.post_quant = (
            nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 1),
            nn.Conv2d(CHANNELS, CHANNELS, 1),
        )
        self.source = "random"

    def encode(self, x, chunk=None):
        """Mean and log-variance (clamped to [-30, 20]) of x's latent. ValueError for another shape
        of x."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % DOWN or x.shape[3] % DOWN:
            raise ValueError(
                f"images of shape {tuple(x.shape)}: expected (B, 3, H, W), H and W "
                f"multiples of {DOWN}"
            )
        mean, logvar = self._chunked(lambda x: self.quant(self.encoder(x)), x, chunk, 1).chunk(
            2, dim=1
        )
        return mean, logvar.clamp(-30, 20)

    def decode(self, z, chunk=None):
        """Images of latents, about in [-1, 1] (not clamped). ValueError for another shape of z."""
        if z.ndim != 4 or z.shape[1] != CHANNELS:
            raise ValueError(f"latents of shape {tuple(z.shape)}: expected (B, {CHANNELS}, H, W)")
        return self._chunked(lambda z: self.decoder(self.post_quant(z)), z, chunk, DOWN**2)

    def _chunked(self, function, x, chunk, pixels):
        weight = self.quant.weight
        chunk = chunk or max(
            1, PIXELS_AT_ONCE[weight.device.type] // (x.shape[2] * x.shape[3] * pixels)
        )
        x = x.to(weight, memory_format=layout(weight.device))
        with torch.autocast(weight.device.type, enabled=False):
            return torch.cat([function(part).float() for part in x.split(chunk)])


def layout(device: torch.device) -> torch.memory_format:
    """How images lie in memory there: channels last on CPUs; not on GPUs, where the group norms
    would turn them round and back (docs/performance.md)."""
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last


# How others spell our tensors' names: rewritings applied in order. diffusers numbers the decoder's
# levels as they run.
_ENDS = [(r"^(post_)?quant\.", r"\1quant_conv.")]
_DIFFUSERS = _ENDS + [
    (
        r"^decoder\.levels\.(\d)",
        lambda found: f"decoder.up_blocks.{len(WIDTHS) - 1 - int(found[1])}",
    ),
    (r"levels\.", "down_blocks."),
    (r"blocks\.(\d)\.blocks", r"blocks.\1.resnets"),
    ("shortcut", "conv_shortcut"),
    (r"(down|up)(_blocks\.\d\.)resample", r"\1\2\1samplers.0.conv"),
    ("norm_out", "conv_norm_out"),
    (r"middle\.1\.norm", "middle.1.group_norm"),
    (r"middle\.1", "mid_block.attentions.0"),
    (r"middle\.0", "mid_block.resnets.0"),
    (r"middle\.2", "mid_block.resnets.1"),
]
NAMINGS = {
    "diffusers, new attention names": _DIFFUSERS
    + [(r"0\.([qkv])\.", r"0.to_\1."), (r"0\.out\.", "0.to_out.0.")],
    "diffusers, old attention names": _DIFFUSERS
    + [
        (r"0\.q\.", "0.query."),
        (r"0\.k\.", "0.key."),
        (r"0\.v\.", "0.value."),
        (r"0\.out\.", "0.proj_attn."),
    ],
    "CompVis": _ENDS
    + [
        (r"^encoder\.levels", "encoder.down"),
        (r"^decoder\.levels", "decoder.up"),
        (r"\.blocks", ".block"),
        (r"(down|up)(\.\d\.)resample", r"\1\2\1sample.conv"),
        ("shortcut", "nin_shortcut"),
        (r"middle\.1\.out", "middle.1.proj_out"),
        (r"middle\.1", "mid.attn_1"),
        (r"middle\.0", "mid.block_1"),
        (r"middle\.2", "mid.block_2"),
    ],
}
# before the VAE's names in the checkpoint of a whole latent diffusion model
_AROUND = "first_stage_model."
_BESIDE = (
    "loss.",
    "model_ema.",
)  # discriminator, perceptual loss and average in a VAE's own training checkpoint


def _spell(name, naming):
    for pattern, replacement in NAMINGS[naming]:
        name = re.sub(pattern, replacement, name)
    return name


def from_state_dict(state_dict):
    """A VAE in eval mode holding `state_dict`'s tensors, under any of NAMINGS; its widths are read
    off them.

    What else a full checkpoint holds (a diffusion model around the VAE, the loss it was trained
    with) is left out, and `source` counts it. Raises ValueError naming every tensor that is
    unknown, missing, misshapen or not finite."""
    given = {
        name.removeprefix(_AROUND): tensor
        for name, tensor in state_dict.items()
        if name.startswith(_AROUND)
    }
    given = {
        name: tensor
        for name, tensor in (given or state_dict).items()
        if not name.startswith(_BESIDE)
    }
    probe = "encoder.middle.1.q.weight"
    source = next((naming for naming in NAMINGS if _spell(probe, naming) in given), None)
    if source is None:
        raise ValueError(
            "not an SD-VAE: expected a tensor named "
            + " or ".join(_spell(probe, n) for n in NAMINGS)
        )

    def width(level):  # what most of five biases say, so that one damaged tensor is named alone
        blocks = [f"encoder.levels.{level}.blocks.{i}" for i in range(2)]
        blocks += [f"decoder.levels.{level}.blocks.{i}" for i in range(3)]
        names = [_spell(f"{block}.conv2.bias", source) for block in blocks]
        return mode([given[name].numel() for name in names if name in given] or [WIDTHS[level]])

    widths = [width(level) for level in range(len(WIDTHS))]
    if any(width < GROUPS or width % GROUPS for width in widths):
        raise ValueError(
            f"SD-VAE of widths {widths}: expected multiples of {GROUPS}, as its group norms need"
        )
    with torch.device("meta"):
        vae = VAE(widths)
    ours = {_spell(name, source): (name, tensor) for name, tensor in vae.state_dict().items()}
    weights, faults = {}, [f"unknown {name}" for name in given if name not in ours]
    for theirs, (name, expected) in ours.items():
        tensor = given.get(theirs)
        if tensor is None:
            faults.append(f"missing {theirs}")
        elif tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            faults.append(f"{theirs} is no plain tensor")
        elif tensor.squeeze().shape != expected.squeeze().shape or not tensor.is_floating_point():
            faults.append(
                f"{theirs} is {tensor.dtype} {tuple(tensor.shape)}, expected floats "
                f"{tuple(expected.shape)}"
            )
        elif not all(end.isfinite() for end in tensor.aminmax()):
            faults.append(f"{theirs} holds values that are not finite")
        else:  # CompVis spells the attention's linear layers as 1 × 1 convolutions
            weights[name] = tensor.reshape(expected.shape).float()
    if faults:
        raise ValueError("SD-VAE weights that don't fit: " + "; ".join(faults))
    vae.load_state_dict(weights, assign=True)
    extra = len(state_dict) - len(given)
    vae.source = source + (f"; {extra:,} other tensors left out" if extra else "")
    return vae.eval().requires_grad_(False)


def load(path, device="cpu", dtype=torch.float32):
    """The VAE in a `.safetensors`, `.ckpt` or `.pth` file (nothing in it is run), as
    `from_state_dict` takes it.

    It computes in `dtype`. The released pipeline encodes in float32 and decodes in float16;
    bfloat16 is too coarse for either: near |z| = 8 its values lie 1/16 to 1/32 apart, further than
    most posteriors are wide. Raises OSError if the file can't be opened, ValueError if it doesn't
    hold one."""
    path = str(path)
    try:
        if path.endswith(".safetensors"):
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else {}
            tensors = {
                str(name): tensor
                for name, tensor in tensors.items()
                if isinstance(tensor, torch.Tensor)
            }
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # whatever an untrusted file makes the parsers raise is its fault
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} can't be read as plain weights ({reason})") from None
    try:
        vae = from_state_dict(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return vae.to(device, dtype, memory_format=layout(torch.device(device)))
