"""Pixels or latents: what a network works in, in one object each (paper, Sec. 5.1).

A space knows the data that it reads (`kind`, as dataset.py has it), how many pixels a cell of its
grid spans (`cell`), and how batches become x_0 and samples become images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

import dataset
import networks
import vae


class Pixels:
    """RGB or grey values in [-1, 1]."""

    name = "pixel"
    kind = "pixels"
    cell = 1

    def x0(self, batch: Tensor, normal: Callable) -> Tensor:
        """x_0 (B, C, H, W) of uint8 pixels (B, C, H, W). `normal(shape)` draws per sample and is
        not needed here."""
        return from_uint8(batch)

    def images(self, x: Tensor, decode: Callable) -> Tensor:
        """Images (B, 3, H, W), about in [-1, 1], of samples x in this space. `decode` is the VAE's
        and is not needed here."""
        return x


class Latents:
    """The SD-VAE's latents, scaled to about unit variance."""

    name = "latent"
    kind = "latents"
    cell = vae.DOWN

    def x0(self, batch: Tensor, normal: Callable) -> Tensor:
        """z = s·(μ + σε), drawn afresh, of float16 (B, 2, C, h, w): mean and log-variance."""
        mean, logvar = batch.float().unbind(1)
        return vae.SCALE * (mean + (logvar / 2).exp() * normal(mean.shape[1:]))

    def images(self, x: Tensor, decode: Callable) -> Tensor:
        return decode(x / vae.SCALE)


Space = Pixels | Latents
OWN = "own"  # the grid of a solver that lays its times itself
SPACES = {"pixel": Pixels(), "latent": Latents()}

# Solver, time grid and NFE by space. The paper's: Table 4 and its release; that of a peer is its
# own paper's.
PRESETS = {
    "everyday": {"latent": ("2m", "time", 25), "pixel": ("2m", "logsnr", 25)},
    "paper": {"latent": ("fast", "time", 250), "pixel": ("dpm-fast", "logsnr", 50)},
}
_U_VIT = {"latent": ("fast", "time", 50), "pixel": ("dpm-fast", "logsnr", 50)}
PEERS = {
    "uvit": _U_VIT,
    "uvit-adaln": _U_VIT,
    "dit": dict.fromkeys(("latent", "pixel"), ("ddpm", OWN, 250)),
    "sit": dict.fromkeys(("latent", "pixel"), ("sde", OWN, 250)),
}


def preset(name: str, config: networks.Config) -> tuple[str, str, int]:
    """(solver, time grid, NFE) of one of PRESETS for a network of `config`."""
    if name == "paper" and networks.kind(config) in PEERS:
        return PEERS[networks.kind(config)][config.space]
    return PRESETS[name][config.space]


def of(config: networks.Config) -> Space:
    """The space of a network's Config."""
    return SPACES[config.space]


def of_data(data: dataset.Data) -> Space:
    """The space of a dataset."""
    return next(space for space in SPACES.values() if space.kind == data.kind)


def folder(space: Space, side: int) -> Path:
    """Where encode puts data of images of `side` pixels, unless told otherwise."""
    return Path("data") / f"{space.kind}-{side}"


def from_uint8(pixels: Tensor) -> Tensor:
    """Values in [-1, 1] of uint8 ones, of any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> np.ndarray:
    """uint8 (B, H, W, C) of images in [-1, 1] (B, C, H, W): clamped, rounded to nearest."""
    unit = ((x.float() + 1) / 2).clamp(0, 1)
    return unit.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def side(config: networks.Config) -> int:
    """Height and width in pixels of a network's images."""
    return config.size * of(config).cell
