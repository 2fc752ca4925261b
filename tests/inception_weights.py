"""Random Inception weights under pytorch-fid's names, and torch-fidelity's extractor with them:
made once per session.

Convolutions are drawn so that variance is kept; each batch norm takes the statistics of its own
input over a few noise images, so that features neither vanish nor blow up along the network's 48
layers."""

import functools
from unittest import mock

import numpy as np
import torch
from torch_fidelity import feature_extractor_inceptionv3 as theirs


@functools.cache
def extractor():
    """torch-fidelity's extractor in eval mode: uint8 (N, 3, H, W) → (pool, bias-free logits),
    random weights."""
    with (
        torch.random.fork_rng(),
        mock.patch.object(theirs, "load_state_dict_from_url", return_value={}),
        mock.patch.object(theirs.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.manual_seed(0)
        network = theirs.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.7, 1.3)
                torch.nn.init.normal_(module.bias, 0, 0.3)
                module.momentum = None  # the plain average
        torch.nn.init.normal_(network.fc.weight, 0, 0.1)
        network.train()
        with torch.no_grad():
            network(photographs(4, 299, seed=1).permute(0, 3, 1, 2))
    return network.eval().requires_grad_(False)


@functools.cache
def weights():
    return extractor().state_dict()


def photographs(count, size, seed=0):
    """Smooth random pictures, uint8 (count, size, size, 3), with all values from 0 to 255 in
    use."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.standard_normal((count, 3, 6, 6))).float()
    x = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    x = x + 0.2 * torch.from_numpy(generator.standard_normal(x.shape)).float()
    return (x * 70 + 128).clamp(0, 255).round().byte().permute(0, 2, 3, 1).contiguous()
