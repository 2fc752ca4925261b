"""The network against the authors' released one: outputs, gradients, names, sizes."""

import dataclasses
import functools
import gzip
import json
import math

import pytest
import torch
import torch._dynamo.testing
from conftest import DATA, relative
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import dimr
import parallel
import recipes
import sampling
import training

NETWORKS = ["network_2r", "network_3r", "network_2r_ln", "network_3r_ln"]
TABLE = {  # parameters with tdln and tdrms, GMAC
    "m3r": (132_940_809, 132_827_913, 53.53),
    "l3r": (284_379_657, 284_137_737, 110.60),
    "xl2r": (505_386_248, 505_046_408, 160.18),
    "xl3r": (525_387_372, 525_027_372, 206.07),
    "g2r": (1_056_945_032, 1_056_352_904, 331.10),
}
SMALL = dimr.Config(
    size=8,
    channels=2,
    layers=(2, 3),
    dims=(16, 8),
    heads=2,
    num_classes=5,
    null_class=True,
    space="pixel",
)


def build(config):
    """A network whose time-dependent vectors and positions are random too, so that each one
    matters."""
    torch.manual_seed(0)
    model = dimr.DiMR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def meta(config):
    with torch.device("meta"):
        return dimr.DiMR(config)


@pytest.fixture(params=NETWORKS)
def released(request):
    path = DATA / f"{request.param}.safetensors"
    arrays = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    weights = {
        name.removeprefix("weight."): value
        for name, value in arrays.items()
        if name.startswith("weight.")
    }
    return (
        arrays,
        weights,
        dimr.from_released(weights, heads=int(about["heads"])),
        json.loads(about["grad_norms"]),
    )


def test_outputs_agree_with_the_release(released):
    arrays, _, model, _ = released
    shared = torch.full((1,), 1.3 / 4)
    for kind, tau in (
        ("varied", arrays["log_snr"] / 4),
        ("same", shared.expand(len(arrays["x"]))),
        ("same", shared),
    ):
        outputs = model(arrays["x"], tau, arrays["y"])
        assert len(outputs) == len(model.config.dims)
        for r, output in enumerate(outputs):
            assert relative(output, arrays[f"out_{kind}_time.{r}"]) < 1e-5


def test_gradients_agree_with_the_release(released):
    arrays, weights, model, norms = released
    sum(
        output.square().sum() for output in model(arrays["x"], arrays["log_snr"] / 4, arrays["y"])
    ).backward()
    gradients = dict(
        zip(dimr.to_released(model), [p.grad for p in model.parameters()], strict=True)
    )
    assert gradients.keys() == norms.keys() == weights.keys()
    for name, norm in norms.items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-5), name


def test_a_released_state_dict_comes_back_bit_for_bit(released):
    _, weights, model, _ = released
    back = dimr.to_released(model)
    assert not model.training and back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("variant", ["xl2r", "g2r"])
def test_the_released_checkpoints_names_and_shapes_are_ours(variant):
    keys = dict(json.loads(gzip.decompress((DATA / "release_keys.json.gz").read_bytes()))[variant])
    state = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    model = dimr.from_released(state)
    assert {name: list(tensor.shape) for name, tensor in dimr.to_released(model).items()} == keys
    expected = dataclasses.replace(dimr.VARIANTS[variant], norm="tdrms")
    assert (
        dataclasses.replace(model.config, layers=expected.layers) == expected
        and model.config.blocks == expected.blocks
    )


def test_every_tensor_at_fault_is_named():
    state = dimr.to_released(build(SMALL))
    del state["stages.1.skip_denses.0.bias"], state["stages.0.class_embeds.weight"]
    state["stages.0.blocks.1.block1.dense.bias"] = torch.zeros(3)
    state["stages.1.extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        dimr.from_released(state, heads=2)
    for name in (
        "stages.1.skip_denses.0.bias",
        "stages.0.class_embeds.weight",
        "stages.0.blocks.1.block1.dense.bias",
        "stages.1.extra",
    ):
        assert name in str(error.value)
    with pytest.raises(ValueError, match="no released DiMR"):
        dimr.from_released({"weight": torch.zeros(1)})


@pytest.mark.parametrize("variant", TABLE)
def test_parameters_and_gmacs_are_the_papers(variant):
    config = dimr.VARIANTS[variant]
    tdln, tdrms, gmacs = TABLE[variant]
    assert sum(p.numel() for p in meta(config).parameters()) == tdln
    assert (
        sum(p.numel() for p in meta(dataclasses.replace(config, norm="tdrms")).parameters())
        == tdrms
    )
    assert sum(config.macs) / 1e9 == pytest.approx(gmacs, abs=0.01)


def counted_flops(model):
    c = model.config
    x = torch.zeros(1, c.channels, c.size, c.size)
    # the fused attention kernel goes uncounted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [SMALL, dimr.VARIANTS["demo"]], ids=["small", "demo"])
@pytest.mark.parametrize("norm", ["tdln", "adaln"])
@pytest.mark.parametrize("mlp", dimr.MLPS)
def test_macs_are_what_pytorch_counts(config, norm, mlp):
    model = dimr.DiMR(dataclasses.replace(config, norm=norm, mlp=mlp))
    assert counted_flops(model) == 2 * sum(model.config.macs)


def test_tdln_interpolates_between_its_two_parameters():
    norm = dimr.TDLN(6)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
        (
            norm.gamma.w_minus_1.zero_(),
            norm.beta.w_minus_1.zero_(),
        )  # w = 1: late and early times pick one end
    x = torch.randn(2, 3, 6)
    plain = torch.nn.functional.layer_norm(x, (6,))
    out = norm(x, dimr.Condition(torch.tensor([60.0, -60.0]), None))
    torch.testing.assert_close(out[0], plain[0] * norm.gamma.p1 + norm.beta.p1)
    torch.testing.assert_close(out[1], plain[1] * norm.gamma.p2 + norm.beta.p2)


def test_pixel_shuffle_puts_channel_fastest():
    up = dimr.Upsample(4, 3, 2, dimr.TDLN)
    y = torch.randn(1, 4, 4)
    condition = dimr.Condition(torch.zeros(1), None)
    up.norm_out = torch.nn.Module()
    up.norm_out.forward = lambda x, condition: x
    linear = up.linear(up.norm_in(y, condition))
    out = up([y], condition).unflatten(1, (4, 4))
    for row in range(4):
        for column in range(4):
            offset = (row % 2 * 2 + column % 2) * 3
            cell = row // 2 * 2 + column // 2
            torch.testing.assert_close(out[0, row, column], linear[0, cell, offset : offset + 3])


@pytest.mark.parametrize(
    "layers, dims, size",
    [
        ((1,), (8,), 4),
        ((2,), (8,), 5),
        ((4, 1, 2), (16, 8, 24), 12),
        ((3, 2, 2, 1), (8, 8, 8, 4), 8),
    ],
)
def test_any_number_of_branches_depth_width_and_size(layers, dims, size):
    config = dimr.Config(
        size=size,
        channels=3,
        layers=layers,
        dims=dims,
        heads=2,
        num_classes=4,
        null_class=False,
        space="pixel",
    )
    outputs = dimr.DiMR(config)(torch.randn(2, 3, size, size), torch.zeros(2), torch.tensor([0, 3]))
    assert [tuple(o.shape) for o in outputs] == [
        (2, 3, size >> k, size >> k) for k in reversed(range(len(dims)))
    ]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(size=9), "does not halve"),
        (dict(heads=3), "heads 3"),
        (dict(dims=(16,)), "one entry per branch"),
        (dict(norm="batch"), "norm 'batch'"),
        (dict(mlp="?"), "mlp"),
        (dict(space="audio"), "space"),
        (dict(layers=(0, 1)), "at least 1"),
        (dict(num_classes=0), "at least 1"),
        (dict(kinds=("transformer",)), "one entry per branch"),
        (dict(kinds=("transformer", "mamba")), "kind of blocks 'mamba'"),
        (dict(kinds=("convnext", "convnext")), "see no class token"),
        (dict(kinds=("transformer", "transformer"), dims=(16, 7)), "branch 2's width 7"),
    ],
)
def test_an_impossible_configuration_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(
    "x, tau, y, words",
    [
        ((2, 2, 8, 9), (2,), (2,), "x is"),
        ((2, 2, 8), (2,), (2,), "x is"),
        ((2, 2, 8, 8, 1), (2,), (2,), "x is"),
        ((2, 2, 8, 8), (2, 1), (2,), "tau is"),
        ((2, 2, 8, 8), (), (2,), "tau is"),
        ((2, 2, 8, 8), (2,), (2, 1), "y is"),
        ((2, 2, 8, 8), (3,), (2,), "tau is"),
        ((2, 2, 8, 8), (2,), (1,), "y is"),
    ],
)
def test_wrong_shapes_are_refused(x, tau, y, words):
    with pytest.raises(ValueError, match=words):
        dimr.DiMR(SMALL)(torch.zeros(x), torch.zeros(tau), torch.zeros(y, dtype=torch.long))


LONG = [pytest.param(norm, marks=pytest.mark.long) for norm in ("tdrms", "ln")]


@pytest.mark.slow
@pytest.mark.parametrize("norm", [*(n for n in dimr.NORMS if n not in ("tdrms", "ln")), *LONG])
def test_one_graph_without_breaks(norm):
    model = build(dataclasses.replace(SMALL, norm=norm))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tau in (torch.randn(3), torch.randn(1)):
        args = torch.randn(3, 2, 8, 8), tau, torch.tensor([0, 1, 5])
        for ours, plain in zip(compiled(*args), model(*args), strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.slow
def test_training_and_sampling_compile_one_graph_for_each_kind_of_block(monkeypatch):
    """Other values of the same shapes, more blocks, and another learning rate or guided time,
    compile nothing anew. With a guidance interval, sampling has batches of two sizes."""
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    model = build(dataclasses.replace(SMALL, channels=1, layers=(5, 4)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    backend = functools.partialmethod(torch.nn.Module.compile, backend=counter)
    monkeypatch.setattr(torch.nn.Module, "compile", backend)
    parallel.compile_units(model)
    cpu = torch.device("cpu")
    state = training.State(model.train(), recipes.Recipe(precision="fp32"), cpu)
    for step in range(4):
        images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
        sums, _ = training.losses(state, images, torch.randint(5, (4,)), 4 * step)
        sums.sum().backward()
    assert counter.frame_count == 5  # Transformer, ConvNeXt, two widths' skips, the cascade's step
    settings = sampling.Settings(cfg=2, cfg_interval=(0.1, 2), steps=6).resolved(model.config)
    for seed in range(3):
        sampling.solve(model.eval(), [1, 2], [seed, seed + 9], settings, device=cpu)
    assert counter.frame_count == 15


@pytest.mark.parametrize("tokens", [1, 17, 64, 65])
def test_attention_is_pytorchs_for_any_number_of_tokens(tokens):
    torch.manual_seed(0)
    qkv, results = torch.randn(3, 2, 4, tokens, 12, requires_grad=True), []
    for function in (dimr.attention, torch.nn.functional.scaled_dot_product_attention):
        out = function(*qkv)
        results.append([out, *torch.autograd.grad(out.sin().sum(), qkv)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_features_lie_channels_last_throughout():
    """In the other order a depthwise convolution takes several times as long, and each norm
    copies."""
    model, strides = build(dataclasses.replace(SMALL, layers=(3, 5))), []
    for module in model.modules():
        if isinstance(module, dimr.TransformerBlock | dimr.ConvNeXtBlock):
            module.register_forward_pre_hook(
                lambda _, inputs: strides.append(inputs[0].is_contiguous())
            )
    model(torch.randn(3, 2, 8, 8), torch.randn(3), torch.tensor([0, 1, 5]))
    assert strides == [True] * 8


@pytest.mark.parametrize("norm", ["tdln", "tdrms", "ln", "adaln"])
def test_norms_keep_their_statistics_in_float32_under_bf16(norm):
    torch.manual_seed(0)
    layer = dimr.NORMS[norm].inner(512)
    x = torch.randn(2, 3, 512) * 50
    if norm != "tdrms":
        x = x + 1000  # bf16 statistics would lose the deviation
    x = x.bfloat16()
    condition = dimr.Condition(torch.tensor([0.3, -0.2]), None, torch.randn(2, 512))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, condition)
    exact = layer(x.float(), condition)
    assert relative(out.float(), exact) < 4e-3


@pytest.mark.parametrize("norm", ["tdln", "tdrms"])
def test_time_vectors_are_float32_under_bf16(norm):
    layer = dimr.NORMS[norm].inner(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.gamma(torch.tensor([0.3])).dtype == torch.float32


# the ladder's norms and MLPs (paper, Table 2)


def test_the_rows_of_table_2_that_are_dimrs_have_their_parameters():
    for change, parameters in (
        (dict(norm="adaln", mlp="mlp"), 217_877_769),
        (dict(mlp="mlp"), 153_953_289),
        ({}, 132_940_809),
    ):
        config = dataclasses.replace(dimr.VARIANTS["m3r"], **change)
        assert sum(p.numel() for p in meta(config).parameters()) == parameters


def test_adaln_zero_begins_as_the_identity_in_every_block():
    torch.manual_seed(0)
    model = dimr.DiMR(dataclasses.replace(SMALL, norm="adaln"))
    inputs = {}

    def remember(block, arguments, output):
        inputs[block] = arguments[0], output

    for branch in model.branches:
        for block in branch.blocks:
            block.register_forward_hook(remember)
    model(torch.randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 5]))
    assert len(inputs) == sum(model.config.blocks)
    for before, after in inputs.values():
        assert torch.equal(before, after)


def test_adaln_zero_scales_shifts_and_gates_by_its_embedding():
    torch.manual_seed(0)
    norm = dimr.AdaLNZero(6)
    x = torch.randn(2, 3, 6)
    embedding = torch.randn(2, 6)
    vectors = torch.nn.functional.silu(embedding) @ norm.modulation.weight.T + norm.modulation.bias
    gamma, beta, alpha = vectors[:, None].chunk(3, -1)
    modulated = torch.nn.functional.layer_norm(x, (6,)) * (1 + gamma) + beta
    condition = dimr.Condition(torch.zeros(2), None, embedding)
    torch.testing.assert_close(norm(x, condition), modulated)
    torch.testing.assert_close(norm.residual(x, condition, torch.sin), x + alpha * modulated.sin())


def test_time_is_embedded_as_in_dit():
    torch.manual_seed(0)
    embedder = dimr.TimeEmbedder(4)
    seen = []
    embedder.linear1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embedder(torch.tensor([0.25]))
    assert seen[0].shape == (1, 256)
    for k in (0, 1, 127):
        angle = 250 * 10_000 ** (-k / 128)
        assert float(seen[0][0, k]) == pytest.approx(math.cos(angle), abs=1e-4)
        assert float(seen[0][0, 128 + k]) == pytest.approx(math.sin(angle), abs=1e-4)


def test_a_network_says_which_time_it_takes():
    schedule, t = diffusion.Linear(), torch.tensor([0.3], dtype=torch.float64)
    assert torch.equal(dimr.DiMR(SMALL).time(schedule, t), schedule.tau(t))
    assert torch.equal(dimr.DiMR(dataclasses.replace(SMALL, norm="adaln")).time(schedule, t), t)


@pytest.mark.parametrize("norm", ["ln", "adaln"])
@pytest.mark.parametrize("kinds", [(), ("transformer", "transformer")])
def test_one_time_for_all_is_that_time_for_each(norm, kinds):
    model = build(dataclasses.replace(SMALL, norm=norm, mlp="mlp", kinds=kinds))
    x, y = torch.randn(3, 2, 8, 8), torch.tensor([0, 1, 5])
    for one, each in zip(
        model(x, torch.tensor([0.3]), y), model(x, torch.full((3,), 0.3), y), strict=True
    ):
        torch.testing.assert_close(one, each)


def test_recomputing_blocks_changes_nothing():
    model = build(SMALL).train()
    args = torch.randn(2, 2, 8, 8), torch.randn(2), torch.tensor([1, 2])
    gradients = []
    for model.checkpoint_blocks in (False, True):
        model.zero_grad()
        sum(o.square().sum() for o in model(*args)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_norm_an_mlp_and_a_block_join_as_rows_of_their_tables(monkeypatch):
    """Their own costs are counted and their own initial values kept; nothing else is touched."""

    class Scaled(dimr.Norm):
        def __init__(self, dim):
            super().__init__()
            self.linear = torch.nn.Linear(dim, dim)

        def begin(self):
            torch.nn.init.eye_(self.linear.weight)

        def forward(self, x, condition):
            return x * self.linear(condition.embedding)[:, None]

        @staticmethod
        def macs(dim):
            return dim * dim

    class Plain(torch.nn.Linear):
        def __init__(self, dim):
            super().__init__(dim, dim)

        @staticmethod
        def macs(dim):
            return dim * dim

    class Mixer(dimr.TransformerBlock):
        def __init__(self, config, r):
            torch.nn.Module.__init__(self)
            self.norm = dimr.NORMS[config.norm].inner(config.dims[r])
            self.mlp = dimr.MLPS[config.mlp](config.dims[r])

        def forward(self, x, condition):
            return self.norm.residual(x, condition, self.mlp)

        @staticmethod
        def macs(config, r):
            dim = config.dims[r]
            norm, mlp = dimr.NORMS[config.norm].inner, dimr.MLPS[config.mlp]
            return config.tokens[r] * mlp.macs(dim) + norm.macs(dim)

    row = dimr.NormRow(Scaled, dimr.LN, embedder=dimr.TimeEmbedder)
    monkeypatch.setitem(dimr.NORMS, "scaled", row)
    monkeypatch.setitem(dimr.MLPS, "plain", Plain)
    monkeypatch.setitem(dimr.BLOCKS, "mixer", Mixer)
    kinds = ("transformer", "mixer")
    model = dimr.DiMR(dataclasses.replace(SMALL, norm="scaled", mlp="plain", kinds=kinds))
    assert torch.equal(model.branches[1].blocks[0].norm.linear.weight, torch.eye(8))
    assert counted_flops(model) == 2 * sum(model.config.macs)
    arguments = torch.zeros(2, 2, 8, 8), torch.zeros(2), torch.tensor([0, 1])
    assert model(*arguments)[-1].shape == (2, 2, 8, 8)


def test_only_w_and_b_of_the_time_vectors_escape_weight_decay():
    model = dimr.DiMR(SMALL)
    decayed, free = model.parameter_groups(0.03)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.03, 0.0)
    vectors = [m for m in model.modules() if isinstance(m, dimr.TimeVector)]
    assert {id(p) for p in free["params"]} == {id(p) for m in vectors for p in (m.w_minus_1, m.b)}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_initial_values():
    model = dimr.DiMR(dataclasses.replace(SMALL, dims=(256, 128)))
    mlp = model.branches[0].blocks[0].mlp
    assert (
        float(mlp.w0.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
        and not mlp.w0.bias.any()
    )
    assert float(model.branches[0].position.detach().std()) == pytest.approx(0.02, rel=0.05)
    conv = torch.nn.Conv2d(128, 128, 7, padding=3, groups=128)
    assert float(model.branches[1].blocks[0].depthwise.weight.detach().std()) == pytest.approx(
        float(conv.weight.detach().std()), rel=0.05
    )
    gamma, beta = model.branches[0].out_norm.gamma, model.branches[0].out_norm.beta
    assert (
        (gamma.p1 == 1).all()
        and (gamma.p2 == 1).all()
        and not beta.p1.any()
        and not gamma.w_minus_1.any()
        and not gamma.b.any()
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(norm="adaln"),
        dict(mlp="mlp"),
        dict(kinds=("transformer",) * 2),
        dict(objective="velocity"),
    ],
)
def test_what_the_release_has_no_names_for_is_not_written_in_them(change):
    with pytest.raises(ValueError, match="the release has no names for"):
        dimr.to_released(dimr.DiMR(dataclasses.replace(SMALL, **change)))
