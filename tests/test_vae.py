"""The SD-VAE beside diffusers' AutoencoderKL, which someone else wrote, on the same random
weights."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

import sampling
import vae
from storage import UserError


def reference(widths, seed=0):
    torch.manual_seed(seed)
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def full():
    return reference((128, 256, 512, 512))


@pytest.fixture(scope="module")
def small():
    return reference((32, 64, 64, 96))


def old_names(weights):
    pairs = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in weights.items():
        for new, old in pairs.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        renamed[name] = tensor
    return renamed


def compvis_names(weights):
    renamed = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[1] == "mid_block":
            where, number = ("block_", int(parts[3]) + 1) if parts[2] == "resnets" else ("attn_", 1)
            leaves = {
                "group_norm": "norm",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out": "proj_out",
            }
            leaf = leaves.get(parts[4], parts[4])
            parts = [parts[0], "mid", f"{where}{number}", leaf, parts[-1]]
            if where == "attn_" and leaf != "norm" and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        elif parts[1] in ("down_blocks", "up_blocks"):
            side = parts[1].removesuffix("_blocks")
            level = int(parts[2]) if side == "down" else 3 - int(parts[2])
            middle = ["block", parts[4]] if parts[3] == "resnets" else [f"{side}sample"]
            parts = [parts[0], side, str(level), *middle, *parts[5:]]
        table = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}
        renamed[".".join(table.get(part, part) for part in parts)] = tensor
    return renamed


SPELLINGS = {
    "diffusers, new attention names": dict,
    "diffusers, old attention names": old_names,
    "CompVis": compvis_names,
}


def apart(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_full_size_network_computes_what_diffusers_does(full):
    ours = vae.from_state_dict(full.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    x, z = torch.rand(1, 3, 64, 96) * 2 - 1, torch.randn(1, 4, 8, 12)
    mean, logvar = ours.encode(x)
    theirs = full.encode(x).latent_dist
    assert mean.shape == logvar.shape == (1, 4, 8, 12)
    assert max(apart(mean, theirs.mean), apart(logvar, theirs.logvar)) < 1e-5
    assert apart(ours.decode(z), full.decode(z).sample) < 1e-5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_the_full_network_gives_the_same_weights_and_is_named(full, spelling):
    expected = vae.from_state_dict(full.state_dict()).state_dict()
    found = vae.from_state_dict(SPELLINGS[spelling](full.state_dict()))
    assert found.source == spelling
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "ckpt", "old.pth"])
def test_files_of_every_kind_load(small, tmp_path, spelling, suffix):
    weights, path = SPELLINGS[spelling](small.state_dict()), tmp_path / f"vae.{suffix}"
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        value = {"state_dict": weights, "epoch": 3} if suffix == "ckpt" else weights
        torch.save(value, path, _use_new_zipfile_serialization=suffix != "old.pth")
    ours = vae.load(path)
    assert ours.source == spelling and not ours.training
    z = torch.randn(2, 4, 4, 4)
    assert apart(ours.decode(z), small.decode(z).sample) < 1e-5


def test_a_file_computes_in_the_type_that_is_asked_for(small, tmp_path):
    save_file(small.state_dict(), tmp_path / "vae.safetensors")
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = small.decode(z).sample
    errors = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ours = vae.load(tmp_path / "vae.safetensors", "cpu", dtype)
        assert {p.dtype for p in ours.parameters()} == {dtype}
        images = ours.decode(z)
        assert images.dtype == torch.float32
        errors[dtype] = apart(images, expected)
    assert next(vae.load(tmp_path / "vae.safetensors").parameters()).dtype == torch.float32
    assert errors[torch.float32] < 1e-5 < errors[torch.float16] < 0.01
    assert errors[torch.bfloat16] > 4 * errors[torch.float16]  # three bits less


def latent_generator(device, precision, **fields):
    """A sampling.Generator of latents without a network."""
    return sampling.Generator(None, torch.device(device), precision, [], "x", "0", {}, **fields)


@pytest.mark.parametrize(
    "device, precision, decoding",
    [("cpu", "fp32", "fp32"), ("cpu", "bf16", "fp32"), ("cuda", "fp32", "fp32")]
    + [("cuda", "bf16", "fp16"), ("mps", "bf16", "fp32")],
)
def test_samples_are_decoded_in_half_precision_beside_a_network_in_bf16_on_a_gpu(
    device, precision, decoding
):
    assert latent_generator(device, precision).vae_precision == decoding


@pytest.mark.parametrize("decoding, dtype", [("fp16", torch.float16), ("fp32", torch.float32)])
def test_a_generator_loads_its_vae_in_the_precision_it_records(
    small, tmp_path, monkeypatch, decoding, dtype
):
    save_file(small.state_dict(), tmp_path / "vae.safetensors")
    monkeypatch.setattr(sampling.Generator, "vae_precision", decoding)
    generator = latent_generator("cpu", "bf16", vae_source=str(tmp_path / "vae.safetensors"))
    generator._decoder(torch.zeros(1, 4, 2, 2))
    assert next(generator.vae.parameters()).dtype == dtype


def test_latents_beyond_half_precision_are_not_decoded_to_anything(small, monkeypatch):
    ours = vae.from_state_dict(small.state_dict()).half()
    generator = latent_generator("cpu", "bf16", vae=ours)
    latents = torch.full((1, 4, 2, 2), 1e5)
    monkeypatch.setattr(sampling.Generator, "vae_precision", "fp16")
    with pytest.raises(UserError, match="beyond half precision.*--precision fp32"):
        generator._decoder(latents)
    assert generator._decoder(latents / 1e5).isfinite().all()


def test_a_whole_diffusion_checkpoint_gives_up_its_vae_and_the_rest_is_counted(small):
    inside = {
        f"first_stage_model.{name}": tensor
        for name, tensor in compvis_names(small.state_dict()).items()
    }
    others = {"model.diffusion_model.out.0.weight": torch.zeros(3), "betas": torch.zeros(1000)}
    ours = vae.from_state_dict(inside | others | {"first_stage_model.loss.logvar": torch.zeros(())})
    assert ours.source == "CompVis; 3 other tensors left out"
    training = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "model_ema.decay": torch.zeros(()),
    }
    ours = vae.from_state_dict(compvis_names(small.state_dict()) | training)
    assert ours.source == "CompVis; 2 other tensors left out"


def test_every_tensor_at_fault_is_named(small):
    weights = dict(small.state_dict())
    del weights["decoder.conv_out.bias"], weights["encoder.mid_block.resnets.1.norm1.weight"]
    weights["encoder.down_blocks.0.resnets.0.conv2.bias"] = torch.zeros(7)
    weights["quant_conv.weight"] = torch.zeros(8, 8, 1, 1, dtype=torch.int64)
    weights["decoder.extra"] = torch.zeros(1)
    weights["decoder.conv_in.bias"] = weights["decoder.conv_in.bias"].clone()
    weights["decoder.conv_in.bias"][3] = float("nan")
    with pytest.raises(ValueError) as caught:
        vae.from_state_dict(weights)
    assert set(str(caught.value).partition(": ")[2].split("; ")) == {
        "decoder.conv_in.bias holds values that are not finite",
        "missing decoder.conv_out.bias",
        "missing encoder.mid_block.resnets.1.norm1.weight",
        "unknown decoder.extra",
        "encoder.down_blocks.0.resnets.0.conv2.bias is torch.float32 (7,), expected floats (32,)",
        "quant_conv.weight is torch.int64 (8, 8, 1, 1), expected floats (8, 8, 1, 1)",
    }


def test_other_weights_are_refused(small, tmp_path):
    with pytest.raises(
        ValueError, match="not an SD-VAE.*mid_block.attentions.0.to_q.*mid.attn_1.q"
    ):
        vae.from_state_dict({"conv.weight": torch.zeros(3)})
    narrow = {name: tensor[:5] for name, tensor in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"widths \[5, 5, 5, 5\].*multiples of 32"):
        vae.from_state_dict(narrow)


class Trap:
    def __reduce__(self):
        return open, ("trapped", "w")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_cut_or_hostile_files_are_refused_with_their_name(small, tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"vae.{suffix}"
    save_file(small.state_dict(), path) if suffix == "safetensors" else torch.save(
        small.state_dict(), path
    )
    for length in (100_000, 49_832):  # the latter: PyTorch looks for the zip's end before its start
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match=f"vae.{suffix} can't be read as plain weights"):
            vae.load(path)
    torch.save({"conv.weight": Trap()}, path)
    with pytest.raises(ValueError, match=f"vae.{suffix} can't be read as plain weights"):
        vae.load(path)
    assert not (tmp_path / "trapped").exists()
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: not an SD-VAE"):
        vae.load(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        vae.load(tmp_path / f"nowhere.{suffix}")


def test_log_variance_is_clamped_as_in_the_original(small):
    weights = dict(small.state_dict())
    weights["quant_conv.weight"], x = (
        weights["quant_conv.weight"] * 1e5,
        torch.rand(1, 3, 32, 32) * 2 - 1,
    )
    mean, logvar = vae.from_state_dict(weights).encode(x)
    assert (logvar.min(), logvar.max()) == (-30, 20) and mean.abs().max() > 100


def test_chunks_change_memory_and_not_the_result(small, monkeypatch):
    ours = vae.from_state_dict(small.state_dict())
    sizes, x, z = [], torch.rand(5, 3, 32, 32) * 2 - 1, torch.randn(5, 4, 4, 4)
    ours.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = ours.decode(z, chunk=5)
    assert apart(ours.decode(z, chunk=2), whole) < 1e-5 and sizes == [5, 2, 2, 1]
    assert apart(ours.encode(x, chunk=2)[0], ours.encode(x)[0]) < 1e-5
    monkeypatch.setitem(vae.PIXELS_AT_ONCE, "cpu", 3 * 32 * 32)
    ours.decode(z)
    assert sizes[4:] == [3, 2]
    monkeypatch.setitem(vae.PIXELS_AT_ONCE, "cpu", 100)  # less than one image has
    ours.decode(z)
    assert sizes[6:] == [1] * 5


def test_half_precision_weights_compute_in_their_type_and_return_float32(small):
    ours = vae.from_state_dict(
        {name: tensor.half() for name, tensor in small.state_dict().items()}
    ).to(torch.bfloat16)
    z = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.float16):  # of no effect on it
        image = ours.decode(z)
    assert torch.equal(image, ours.decode(z))
    assert image.dtype == torch.float32 and 1e-5 < apart(image, small.decode(z).sample) < 0.05


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_features_stay_laid_as_the_device_likes_them_from_end_to_end(small, monkeypatch, device):
    wanted = vae.layout(torch.device(device))
    monkeypatch.setattr(vae, "layout", lambda _: wanted)
    ours, formats = vae.from_state_dict(small.state_dict()).to(memory_format=wanted), set()

    def note(module, inputs, output):
        formats.add(output.is_contiguous(memory_format=wanted))

    for module in ours.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.GroupNorm)):
            module.register_forward_hook(note)
    ours.decode(ours.encode(torch.rand(2, 3, 32, 32))[0])
    assert formats == {True}


def test_wrong_shapes_are_explained(small):
    ours = vae.from_state_dict(small.state_dict())
    for x in (torch.zeros(1, 3, 33, 32), torch.zeros(1, 4, 32, 32), torch.zeros(3, 32, 32)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\), H and W multiples of 8"):
            ours.encode(x)
    with pytest.raises(ValueError, match=r"expected \(B, 4, H, W\)"):
        ours.decode(torch.zeros(1, 3, 4, 4))
