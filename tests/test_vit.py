"""DINOv2 against numbers of its authors' code (tests/data/dinov2.safetensors); the classifier's
tests are test_distortion's."""

import gzip
import json
import math

import pytest
import torch
from conftest import DATA, relative
from safetensors.torch import load_file

import vit


@pytest.fixture(scope="module")
def arrays():
    return load_file(DATA / "dinov2.safetensors")


def weights(arrays):
    found = {}
    for name, tensor in arrays.items():
        if name.startswith("weight."):
            found[name.removeprefix("weight.")] = tensor
    return found


def test_dinov2s_features_are_its_authors(arrays):
    images = arrays["images"].permute(0, 2, 3, 1)
    prepared = vit.prepare_dino(images)
    assert prepared.shape == (2, 3, 224, 224)
    assert relative(prepared[:, :, :8, :8], arrays["prepared_corner"]) < 1e-6
    network = vit.dino_from_state_dict(weights(arrays))
    assert relative(network.features(prepared), arrays["features"]) < 1e-5
    assert torch.equal(network(prepared), network.features(prepared))


def test_the_positions_kludge_shows_in_the_numbers(arrays, monkeypatch):
    monkeypatch.setattr(vit, "KLUDGE", 0.0)
    network = vit.dino_from_state_dict(weights(arrays))
    found = network.features(vit.prepare_dino(arrays["images"].permute(0, 2, 3, 1)))
    assert relative(found, arrays["features"]) > 1e-4


def test_the_released_file_has_the_tensors_that_a_network_of_its_size_takes():
    keys = json.loads(gzip.decompress((DATA / "peer_keys.json.gz").read_bytes()))
    shapes = {name: tuple(shape) for name, shape in keys["dinov2_vitl14_pretrain"].items()}
    with torch.device("meta"):
        network = vit.ViT(224, 14, 1024, 24, 4096, scaled=True)
    ours = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    stored = shapes.pop("pos_embed")
    assert ours.pop("pos_embed") == (1, 1 + 16**2, 1024)
    assert math.isqrt(stored[1] - 1) == 37
    assert shapes.pop("mask_token") == (1, 1024)  # of training, and not taken
    assert ours == shapes


@pytest.mark.parametrize("damage", ["no positions", "no scales", "a classifier's", "not finite"])
def test_what_is_not_dinov2_is_an_error(arrays, damage):
    tensors = weights(arrays)
    if damage == "no positions":
        del tensors["pos_embed"]
    elif damage == "no scales":
        del tensors["blocks.0.ls1.gamma"]
    elif damage == "a classifier's":
        tensors["head.weight"] = torch.zeros(10, 128)
    else:
        tensors["norm.weight"] = torch.full((128,), torch.nan)
    with pytest.raises(ValueError, match="not DINOv2|unknown head.weight|norm.weight is not"):
        vit.dino_from_state_dict(tensors)
