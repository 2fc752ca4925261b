"""Extractors for `--features`: cheap enough for tests that are not about Inception."""

import torch


def pooled(images):
    """Means over a 4 × 4 grid: (N, 48)."""
    return (
        torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), 4).flatten(1)
        / 255
    )


def not_a_number(images):
    return pooled(images) * torch.nan


def of_another_shape(images):
    return pooled(images)[:, None]
