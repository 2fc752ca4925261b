"""Randomness by position: whatever is drawn depends on a seed and on where it belongs, never on
what was drawn before.

In training a position is a sample's number in the run, counted from 0 over all steps: which image,
flip, time, noise and dropped label it gets. In sampling it is the image's own seed. So batch size,
processes and interruptions change nothing. It stands alone."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch

LAST_SEED = 2**63 - 1  # seeds run from 0 to it; generators and files hold 64 bits with a sign
BLOCK = 16  # positions that share one random generator


def _generator(key, device="cpu"):
    """A random generator that knows only the text `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _draw(seed, stream, first, last, sample, device="cpu"):
    """Rows first..last-1 of an endless random table: `sample(generator)` gives BLOCK rows, from a
    generator that knows only the seed, the stream's name and the block's number."""
    rows = []
    for block in range(first // BLOCK, (last - 1) // BLOCK + 1):
        rows.append(sample(_generator(f"{seed} {stream} {block}", device)))
    start = first // BLOCK * BLOCK
    return torch.cat(rows)[first - start : last - start]


def normal(
    seed: int,
    stream: str,
    first: int,
    last: int,
    shape: Sequence[int],
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Standard normal numbers (last - first, *shape) of positions first..last-1."""
    return _draw(
        seed,
        stream,
        first,
        last,
        lambda g: torch.randn(BLOCK, *shape, generator=g, device=device),
        device,
    )


def uniform(seed: int, stream: str, first: int, last: int) -> torch.Tensor:
    """Uniform float64 numbers in [0, 1), (last - first,), of positions first..last-1."""
    return _draw(
        seed, stream, first, last, lambda g: torch.rand(BLOCK, generator=g, dtype=torch.float64)
    )


class Order:
    """What a run visits: position p is item permutation(seed, p // n)[p % n], and its flip is a
    coin of seed and p. Counter-based random bits (Philox), so any stretch can be asked for at any
    time."""

    def __init__(self, n, seed):
        self.n = n
        self.seed = seed
        self.permutation = functools.lru_cache(2)(self._permutation)

    def _bits(self, stream, first, last):
        """Random uint64 of positions first..last-1 of `stream`; Philox makes four a counter
        value."""
        generator = np.random.Philox(key=(stream << 64) + self.seed % 2**64).advance(first // 4)
        return generator.random_raw(last - first // 4 * 4)[first % 4 :]

    def _permutation(self, epoch):
        return np.argsort(self._bits(epoch + 1, 0, self.n), kind="stable")

    def __call__(self, first, last):
        """Items int64 (last - first,) and flips bool of positions first..last-1."""
        epochs, indices = np.divmod(np.arange(first, last), self.n)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = self.permutation(int(epoch))[indices[epochs == epoch]]
        return indices, self._bits(0, first, last) >> np.uint64(63) == 1


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless these are whole numbers from 0 to LAST_SEED."""
    ends = seeds
    if isinstance(seeds, range):
        ends = (seeds[0], seeds[-1])
    for seed in ends:
        if not 0 <= seed <= LAST_SEED:
            raise ValueError(f"seed {seed} is not from 0 to {LAST_SEED} (2^63 - 1)")


def start_noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Start noise of the image with this seed, on the CPU, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_noise(shape: Sequence[int], seed: int, update: int) -> torch.Tensor:
    """What a stochastic solver draws for the image with this seed in its update number `update`, on
    the CPU, float32."""
    return torch.randn(*shape, generator=_generator(f"{seed} solver {update}"))


def label(seed: int, num_classes: int) -> int:
    """A class for the image with this seed, each as likely as the others."""
    return int(torch.randint(num_classes, (), generator=_generator(f"{seed} label")))
