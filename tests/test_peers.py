"""U-ViT, DiT and SiT against the authors' own: outputs, samplers, names, sizes, initial values."""

import dataclasses
import gzip
import json
import re

import pytest
import torch
from conftest import DATA, relative
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import peers
import solver

COUNTS = {  # parameters; the Gflops that the paper prints, Tables 1, 5, 6, 7 (DiT-B's are DiT's)
    "uvit-m4": (130_940_292, 35),
    "uvit-l4": (286_827_652, 77),
    "uvit-l2": (286_763_172, 77),
    "uvit-h2": (500_832_016, 133),
    "uvit-l4-512": (286_861_524, 77),
    "uvit-h4": (500_942_656, 133),
    "dit-b2": (130_512_416, 23),
    "dit-xl2": (675_129_632, 119),
    "dit-xl2-512": (676_014_368, 525),
    "sit-xl2": (675_129_632, 119),
    "table2-1": (130_940_292, 35),
    "table2-2": (193_095_300, 35),  # the paper prints 202.4M
}
RELEASED = {  # file: its variant, and the kind that has to be told
    "imagenet64_uvit_mid": ("uvit-m4", None),
    "imagenet64_uvit_large": ("uvit-l4", None),
    "imagenet256_uvit_large": ("uvit-l2", None),
    "imagenet256_uvit_huge": ("uvit-h2", None),
    "imagenet512_uvit_large": ("uvit-l4-512", None),
    "imagenet512_uvit_huge": ("uvit-h4", None),
    "DiT-XL-2-256x256": ("dit-xl2", "dit"),
    "DiT-XL-2-512x512": ("dit-xl2-512", "dit"),
    "SiT-XL-2-256": ("sit-xl2", "sit"),
}
SMALL = {
    name: peers.PeerConfig(
        kind=name.split("-")[0],
        size=8,
        channels=3,
        patch=2,
        width=32,
        depth=3,
        heads=2,
        num_classes=5,
        null_class=True,
        space="pixel",
        convolution=name == "uvit-convolution",
    )
    for name in ("uvit", "uvit-convolution", "dit", "sit")
}
SMALL["uvit-adaln"] = dataclasses.replace(SMALL["uvit-convolution"], kind="uvit-adaln")


def build(config):
    torch.manual_seed(0)
    return peers.NETWORKS[config.kind](config)


def random_inputs(config):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.channels, config.size, config.size, generator=generator)
    return x, config.time(torch.tensor([0.2, 0.9])).float(), torch.tensor([3, 1])


def shaken(config):
    """A network in which every trained number matters, zero at the start or not."""
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def load(name, kind=None):
    """The arrays of a parity file and the network that holds its weights."""
    arrays = load_file(DATA / f"{name}.safetensors")
    return arrays, peers.from_state_dict(weights_of(arrays), kind=kind, heads=3)


def weights_of(arrays):
    return {
        name.removeprefix("weight."): value
        for name, value in arrays.items()
        if name.startswith("weight.")
    }


@pytest.fixture(scope="module")
def dit():
    return load("dit", "dit")


@pytest.fixture(scope="module")
def sit():
    return load("sit", "sit")


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", ["uvit_pixel", "uvit_latent"])
def test_uvit_agrees_with_the_release(name):
    arrays, model = load(name)
    (prediction,) = model(arrays["x"], arrays["n"], arrays["y"])
    assert model.config.kind == "uvit" and not model.training
    assert relative(prediction, arrays["out"]) < 1e-5
    assert torch.equal(model.raw(arrays["x"], arrays["n"], arrays["y"]), prediction)


def test_dit_agrees_with_the_release(dit):
    arrays, model = dit
    out = model.raw(arrays["x"], arrays["t"], arrays["y"])
    assert relative(out, arrays["out"]) < 1e-5
    (noise,) = model(arrays["x"], arrays["t"], arrays["y"])
    assert torch.equal(noise, out[:, :4])


def test_sit_is_dit_read_as_a_velocity(sit):
    arrays, model = sit
    (velocity,) = model(arrays["x"], arrays["t"], arrays["y"])
    assert relative(velocity, arrays["velocity"]) < 1e-5


def test_the_modulation_of_each_block_agrees_with_the_release(dit):
    arrays, model = dit
    modulations = model.modulations(arrays["t"], arrays["y"])
    assert len(modulations) == model.config.depth
    for k, vectors in enumerate(modulations):
        assert vectors.shape == (3, 6, 48)
        assert relative(vectors.flatten(1), arrays[f"modulation.{k}"]) < 1e-5


def test_the_fixed_positions_are_those_of_the_release(dit):
    arrays, _ = dit
    assert relative(peers.grid_positions(48, 4)[None], arrays["weight.pos_embed"]) < 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_one_time_for_all_is_the_same_time_for_each(name):
    model = shaken(SMALL[name])
    x, time, y = random_inputs(model.config)
    each = model(x, time[:1].expand(2), y)[-1]
    assert relative(model(x, time[:1], y)[-1], each) < 1e-6
    assert relative(model(x, time, y)[-1], each) > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_wrong_shapes_are_refused(name):
    model = build(SMALL[name])
    x, time, y = random_inputs(model.config)
    for wrong, message in (
        ((x[:, :2], time, y), r"x is \(2, 2, 8, 8\); expected \(B, 3, 8, 8\)"),
        ((x, time[:, None], y), r"time is \(2, 1\)"),
        ((x, time.repeat(2), y), r"time is \(4,\); expected \(2,\)"),
        ((x, time, y[:1]), r"y is \(1,\)"),
        ((x, time, y.float()), "y is .* of torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*wrong)


@pytest.mark.parametrize("name", SMALL)
def test_recomputed_blocks_keep_less_and_give_the_same_gradients(name):
    model, gradients, kept = shaken(SMALL[name]), [], []
    inputs = random_inputs(model.config)
    for model.checkpoint_blocks in (False, True):
        saved = []
        model.zero_grad()

        def keep(tensor, saved=saved):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(*inputs)[-1].square().sum()
        kept.append(len(saved))
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_autocast_changes_little(name):
    model = shaken(SMALL[name])
    inputs = random_inputs(model.config)
    exact = model(*inputs)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs)[-1]
    assert 0 < relative(rough, exact) < 0.03


@pytest.mark.parametrize("name", SMALL)
def test_a_network_may_be_bfloat16_itself(name):
    model = shaken(SMALL[name])
    x, time, y = random_inputs(model.config)
    exact = model(x, time, y)[-1]
    rough = model.bfloat16()(x.bfloat16(), time, y)[-1]
    assert rough.dtype == torch.bfloat16
    assert 0 < relative(rough, exact) < 0.05


def test_dits_norms_are_exact_where_little_varies():
    x = 1e-3 * torch.randn(2, 5, 32, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    expected = 3 * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() + 1
    assert relative(peers.modulated(x, torch.ones(32), 2 * torch.ones(32)), expected) < 1e-9


@pytest.mark.parametrize("name", ["uvit", "dit"])
def test_all_but_fixed_positions_is_given_to_the_optimiser(name):
    model = build(SMALL[name])
    (group,) = model.parameter_groups(0.03)
    left = set(model.parameters()) - set(group["params"])
    assert group["weight_decay"] == 0.03
    assert left == ({model.pos_embed} if name == "dit" else set())


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("variant", COUNTS)
def test_parameters_and_gflops_are_the_papers(variant):
    parameters, gflops = COUNTS[variant]
    config = peers.VARIANTS[variant]
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(config.macs) / 1e9 == pytest.approx(gflops, abs=0.6)


def test_every_variant_is_counted():
    assert COUNTS.keys() == peers.VARIANTS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_macs_are_what_pytorch_counts(name):
    config = SMALL[name]
    model = build(config)
    x, time, y = random_inputs(config)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),  # the fused kernel goes uncounted
    ):
        model(x[:1], time[:1], y[:1])
    assert counter.get_total_flops() == 2 * sum(config.macs)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="unet"), "kind 'unet' is not one of uvit, uvit-adaln, dit, sit"),
        (dict(space="audio"), "space 'audio' is neither 'latent' nor 'pixel'"),
        (dict(heads=0), "heads 0 is not at least 1"),
        (dict(num_classes=0), "num_classes 0 is not at least 1"),
        (dict(size=9), "size 9 is not a multiple of patch 2"),
        (dict(width=30), "width 30 is not a multiple of 4"),
        (dict(heads=3), "heads 3 does not divide the width 32"),
        (dict(depth=4), "depth 4 is even: .* use 3 or 5"),
        (dict(kind="dit", convolution=True), "a final convolution is U-ViT's; dit has none"),
        (dict(learned_variance=True), "a learned variance is DiT's; uvit has none"),
        (dict(kind="uvit-adaln", depth=4), "depth 4 is even"),
    ],
)
def test_a_configuration_without_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL["uvit"], **change)


@pytest.mark.parametrize(
    "variant, objective, schedule, times",  # told at t = 0, 0.001 and 1
    [
        ("uvit-m4", "epsilon", "linear", [0, 0.999, 999]),
        ("uvit-h2", "epsilon", "scaled_linear", [0, 1, 1000]),
        ("dit-xl2", "epsilon", "ddpm", [-1, 0, 999]),
        ("sit-xl2", "velocity", "straight", [1, 0.999, 0]),
        ("table2-2", "epsilon", "linear", [0, 1, 1000]),
    ],
)
def test_each_network_is_told_its_own_time(variant, objective, schedule, times):
    config = peers.VARIANTS[variant]
    assert (config.objective, config.noise_schedule) == (objective, schedule)
    assert config.time(torch.tensor([0, 0.001, 1], dtype=torch.float64)).tolist() == pytest.approx(
        times
    )


def test_dits_steps_reach_it_as_whole_numbers():
    n = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(peers.VARIANTS["dit-xl2"].time((n + 1) / 1000).float(), n.float())


# ---------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_every_adaln_zero_block_begins_as_the_identity_and_the_network_at_zero(name):
    model = build(SMALL[name])
    inputs = random_inputs(model.config)
    x, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        assert torch.equal(block(x, condition), x)
    assert not model.raw(*inputs).any()
    assert not torch.equal(shaken(SMALL[name]).blocks[0](x, condition), x)


def test_u_vit_under_adaln_zero_takes_time_from_its_norms_alone():
    """Row 2 of Table 2: at the start the blocks add nothing and time has no part; trained, it
    has."""
    config = SMALL["uvit-adaln"]
    fresh = build(config)
    inputs = random_inputs(config)
    x, condition = torch.randn(2, 17, 32), torch.randn(2, 32)
    for block in fresh.in_blocks:
        assert torch.equal(block(x, condition), x)
    assert fresh.pos_embed.shape == (1, 17, 32)  # the class token and 16 patches
    later = (inputs[0], inputs[1] / 2, inputs[2])
    assert torch.equal(fresh(*later)[-1], fresh(*inputs)[-1])
    assert relative(shaken(config)(*later)[-1], shaken(config)(*inputs)[-1]) > 1e-3


def test_modulations_of_u_vit_are_by_block_and_depend_on_time_alone():
    config = SMALL["uvit-adaln"]
    model = shaken(config)
    _, time, y = random_inputs(config)
    vectors = model.modulations(time, y)
    assert [tuple(v.shape) for v in vectors] == [(2, 6, 32)] * 3
    assert torch.equal(vectors[0], model.modulations(time, y.flip(0))[0])
    assert relative(vectors[0][1], vectors[0][0]) > 1e-3


def test_initial_values_of_dit():
    model = build(dataclasses.replace(SMALL["dit"], width=256))
    for small in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        assert float(small.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    table = model.y_embedder.embedding_table.weight.detach()
    assert float(table.std()) == pytest.approx(0.02, rel=0.1)
    for layer, fans in (
        (model.blocks[0].mlp.fc1, 256 + 1024),
        (model.blocks[0].attn.qkv, 256 + 768),
        (model.x_embedder.proj, 3 * 4 + 256),
    ):
        bound = (6 / fans) ** 0.5
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
        assert not layer.bias.any()
    assert torch.equal(model.pos_embed[0], peers.grid_positions(256, 4))


def test_initial_values_of_uvit():
    model = build(dataclasses.replace(SMALL["uvit"], width=256))
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.05)
    block = model.out_blocks[0]
    for layer in (block.mlp.fc1, block.attn.qkv, block.skip_linear, model.decoder_pred):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert not block.mlp.fc1.bias.any() and not block.skip_linear.bias.any()
    assert float(model.label_emb.weight.detach().std()) == pytest.approx(1, rel=0.1)


# ------------------------------------------------------------------------------------------ loading


def released_tensors(file):
    keys = dict(json.loads(gzip.decompress((DATA / "peer_keys.json.gz").read_bytes()))[file])
    return {name: torch.empty(shape, device="meta") for name, shape in keys.items()}


@pytest.mark.parametrize("file", RELEASED)
def test_the_released_files_are_recognised(file):
    variant, kind = RELEASED[file]
    tensors = released_tensors(file)
    model = peers.from_state_dict(tensors, kind=kind)
    assert model.config == peers.VARIANTS[variant]
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(state[name].shape == tensor.shape for name, tensor in tensors.items())


@pytest.mark.parametrize("name", [name for name in SMALL if name != "uvit-adaln"])
@pytest.mark.parametrize("size", [2, 8])
def test_a_shape_is_read_off_the_tensors(name, size):
    config = dataclasses.replace(SMALL[name], size=size)
    tensors = build(config).state_dict()
    told = dict(kind=config.kind, heads=2, null_class=True)
    expected = dataclasses.replace(config, learned_variance=config.kind == "dit")
    assert peers.from_state_dict(tensors, **told).config == expected


@pytest.mark.parametrize("name", SMALL)
def test_a_state_dict_comes_back_bit_for_bit(name):
    before = shaken(SMALL[name])
    after = peers.from_config(before.config, before.state_dict())
    inputs = random_inputs(before.config)
    assert torch.equal(after(*inputs)[-1], before(*inputs)[-1])
    trained = [n for n, p in before.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in after.named_parameters() if p.requires_grad]


def test_what_no_tensor_tells_may_be_said():
    arrays = weights_of(load_file(DATA / "uvit_latent.safetensors"))
    config = peers.from_state_dict(arrays, heads=4, space="pixel", null_class=True).config
    assert (config.heads, config.space, config.null_class) == (4, "pixel", True)
    assert (config.num_classes, config.embeddings, config.depth) == (10, 11, 5)


@pytest.mark.parametrize(
    "file, options, message",
    [
        ("DiT-XL-2-256x256", {}, "say which with --kind dit or --kind sit"),
        ("SiT-XL-2-256", dict(heads=16), "say which with --kind dit or --kind sit"),
        ("SiT-XL-2-256", dict(kind="uvit"), "--kind uvit: .* give --kind dit or sit"),
        ("DiT-XL-2-256x256", dict(kind="unet"), "--kind unet is not one of uvit, dit, sit"),
        ("imagenet256_uvit_huge", dict(kind="sit"), "--kind sit: these are a U-ViT's tensors"),
        ("imagenet256_uvit_huge", dict(heads=7), "heads 7 does not divide the width 1152"),
        ("dinov2_vitl14_pretrain", {}, "these are no U-ViT's, DiT's or SiT's tensors"),
    ],
)
def test_an_ambiguous_or_foreign_file_is_refused_with_the_flag_to_give(file, options, message):
    with pytest.raises(ValueError, match=message) as failure:
        peers.from_state_dict(released_tensors(file), **options)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name, kind", [("dit", "dit"), ("sit", "sit"), ("uvit_pixel", None)])
def test_heads_have_to_be_told_where_nobody_published_the_shape(name, kind):
    tensors = weights_of(load_file(DATA / f"{name}.safetensors"))
    with pytest.raises(ValueError, match=r"width 48 and depth \d; give it with --heads"):
        peers.from_state_dict(tensors, kind=kind)


def test_every_unknown_missing_and_misshapen_tensor_is_named():
    tensors = weights_of(load_file(DATA / "dit.safetensors"))
    tensors["blocks.0.extra"] = torch.zeros(1)
    del tensors["blocks.1.attn.qkv.bias"]
    tensors["blocks.2.mlp.fc1.bias"] = torch.zeros(5)
    with pytest.raises(ValueError) as failure:
        peers.from_state_dict(tensors, kind="dit", heads=3)
    assert str(failure.value) == (
        "3 of 52 tensors don't fit this dit: unknown blocks.0.extra; "
        "missing blocks.1.attn.qkv.bias; blocks.2.mlp.fc1.bias is (5,), expected (192,)"
    )


@pytest.mark.parametrize("name", ["pos_embed", "x_embedder.proj.weight", "y_embedder"])
def test_a_tensor_that_tells_the_shape_is_named_alone_when_it_is_at_fault(name):
    whole = released_tensors("DiT-XL-2-256x256")
    (full,) = [key for key in whole if key.startswith(name)]
    for damaged in (None, torch.empty(7, 5, device="meta")):
        tensors = {key: tensor for key, tensor in whole.items() if key != full}
        fault = f"missing {full}"
        if damaged is not None:
            tensors[full] = damaged
            fault = f"{full} is (7, 5), expected "
        with pytest.raises(ValueError, match=re.escape(fault)) as failure:
            peers.from_state_dict(tensors, kind="dit")
        assert str(failure.value).startswith("1 of 292 tensors don't fit")


# ----------------------------------------------------------------------------------------- sampling


def guided(model, y, *, scale, channels):
    """(x, t of ours) → the network's whole output, its first channels guided."""
    null = torch.full_like(y, model.config.embeddings - 1)

    def output(x, t):
        time = model.config.time(t).float()[None]
        conditional = model.raw(x, time, y)
        if scale == 1:
            return conditional
        unconditional = model.raw(x, time, null)
        mixed = torch.lerp(unconditional, conditional, scale)
        return torch.cat([mixed[:, :channels], conditional[:, channels:]], dim=1)

    return output


@pytest.mark.parametrize(
    "name, scale", [("ddpm_plain_20", 1), ("ddpm_cfg1.5_three_channels_20", 1.5)]
)
def test_ddpm_agrees_with_dits_own_sampler(dit, name, scale):
    arrays, model = dit
    schedule = diffusion.SCHEDULES[model.config.noise_schedule]()
    guidance = diffusion.Guidance(scale, channels=3)
    told = []
    x = solver.sample(
        diffusion.denoiser(model, schedule, arrays["ddpm_y"], guidance, variance=True),
        arrays["ddpm_x_T"],
        schedule,
        20,
        "ddpm",
        draw=lambda k: arrays["ddpm_noise"][k],
        callback=lambda evaluations, x: told.append(evaluations),
    )
    assert relative(x, arrays[name]) < 1e-4
    assert told == list(range(1, 21))


def ddpm_steps(steps):
    """The n that are taken, and where the last update ends."""
    times = torch.stack(solver.ddpm_times(steps, None, None))
    assert torch.equal(times[1:, 0], times[:-1, 1]) and times[-1, 1] == 0
    return [round(1000 * t) - 1 for t in times[:, 0].tolist()]


def test_ddpm_takes_evenly_spaced_steps_from_end_to_end(dit):
    arrays, _ = dit
    assert ddpm_steps(20) == arrays["ddpm_timesteps"].flip(0).tolist()
    assert ddpm_steps(2) == [999, 0]
    assert ddpm_steps(1000) == list(range(999, -1, -1))
    steps = ddpm_steps(250)
    gaps = {a - b for a, b in zip(steps[:-1], steps[1:], strict=True)}
    assert (len(steps), steps[0], steps[-1], gaps) == (250, 999, 0, {4, 5})


@pytest.mark.parametrize("steps", [1, 1001])
def test_ddpm_refuses_a_number_of_steps_it_cannot_take(steps):
    with pytest.raises(ValueError, match=f"{steps} steps of DDPM are not between 2 and 1000"):
        solver.SOLVERS["ddpm"].updates(steps)


def test_the_variance_between_its_two_ends_is_ddpms():
    """Where v is −1 the noise has the posterior's variance, where it is 1 it has β."""
    schedule = diffusion.SCHEDULES["ddpm"]()
    unit = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def first_step(v, noise):
        answers = [(0 * unit, unit, v * unit)]
        times = solver.ddpm_times(2, None, None)
        seen = []
        solver.ddpm(
            lambda x, t: answers[0],
            0 * unit,
            times,
            schedule,
            draw=lambda k: noise * unit,
            callback=lambda n, x: seen.append(float(x)),
        )
        return seen[0]

    here, after = (float(schedule.alpha(t)) ** 2 for t in (1.0, 0.001))
    beta = 1 - here / after
    assert first_step(1, 3) == pytest.approx(3 * beta**0.5)
    assert first_step(-1, 3) == pytest.approx(3 * (beta * (1 - after) / (1 - here)) ** 0.5)


def test_guidance_of_some_channels_leaves_the_others_conditional(dit):
    arrays, model = dit
    schedule = diffusion.SCHEDULES[model.config.noise_schedule]()
    x, y = arrays["ddpm_x_T"], arrays["ddpm_y"]

    def noise(*guidance):
        return diffusion.denoiser(model, schedule, y, diffusion.Guidance(*guidance))(x, 0.5).noise

    conditional, everywhere = noise(1), noise(2)
    some = noise(2, None, None, 3)
    assert torch.equal(some[:, :3], everywhere[:, :3])
    assert relative(some[:, 3:], conditional[:, 3:]) < 1e-6
    assert relative(some[:, :3], conditional[:, :3]) > 1e-3


def test_the_sde_is_sits(sit):
    """Written out in SiT's own time, velocity and score: 5 steps of Euler and Maruyama from 0 to
    0.96, and a last one of 0.04 to the mean."""
    arrays, model = sit
    y = arrays["ode_y"]
    schedule = diffusion.SCHEDULES[model.config.noise_schedule]()
    noise = torch.randn(6, *arrays["ode_x_T"].shape, generator=torch.Generator().manual_seed(0))
    x = arrays["ode_x_T"]
    times = torch.linspace(0, 0.96, 6)
    with torch.no_grad():
        for k, t in enumerate(times):
            (velocity,) = model(x, t[None], y)
            sigma = 1 - t
            score = -(x - t * velocity) / sigma
            h = 0.04 if k == 5 else times[1]
            x = x + h * (velocity + sigma * score)
            if k < 5:
                x = x + (2 * sigma * h).sqrt() * noise[k]
    found = solver.sample(
        diffusion.denoiser(model, schedule, y),
        arrays["ode_x_T"],
        schedule,
        6,
        "sde",
        start=1.0,
        end=0.0,
        draw=lambda k: noise[k],
    )
    assert relative(found, x) < 1e-5


@pytest.mark.parametrize("name, scale", [("euler_10", 1), ("heun_10", 1), ("heun_cfg1.5_10", 1.5)])
def test_fixed_steps_along_sits_velocity_agree_with_the_release(sit, name, scale):
    arrays, model = sit
    output = guided(model, arrays["ode_y"], scale=scale, channels=4)
    x, h = arrays["ode_x_T"], 0.1
    with torch.no_grad():
        for k in range(10):
            first = output(x, 1 - k * h)[:, :4]
            step = first
            if name.startswith("heun"):
                step = (first + output(x + h * first, 1 - (k + 1) * h)[:, :4]) / 2
            x = x + h * step
    assert relative(x, arrays[name]) < 1e-5


@pytest.mark.parametrize("name, scale", [("euler_10", 1), ("heun_10", 1), ("heun_cfg1.5_10", 1.5)])
def test_our_solvers_drive_sit_as_its_own_do(sit, name, scale):
    arrays, model = sit
    schedule = diffusion.SCHEDULES[model.config.noise_schedule]()
    denoise = diffusion.denoiser(model, schedule, arrays["ode_y"], diffusion.Guidance(scale))
    kind = name.split("_")[0]
    steps = {"euler": 10, "heun": 20}[kind]
    x = solver.sample(denoise, arrays["ode_x_T"], schedule, steps, kind, start=1.0, end=0.0)
    assert relative(x, arrays[name]) < 1e-5


def test_sits_training_loss_agrees_with_the_release(sit):
    arrays, model = sit
    t = arrays["train_t"][:, None, None, None]
    xt = t * arrays["train_data"] + (1 - t) * arrays["train_noise"]
    target = arrays["train_data"] - arrays["train_noise"]
    (velocity,) = model(arrays["train_xt"], arrays["train_t"], arrays["train_y"])
    loss = (velocity - target).square().flatten(1).mean(1)
    assert relative(xt, arrays["train_xt"]) < 1e-5
    assert relative(target, arrays["train_target"]) < 1e-5
    assert relative(loss, arrays["train_loss"]) < 1e-5
