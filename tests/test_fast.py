"""What is done for GPUs, counted and checked on a CPU: the same numbers in fewer kernels."""

import contextlib
import dataclasses
import functools
import json
from collections import Counter

import pytest
import torch
from conftest import relative
from ranks import Ranks, count_graphs
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import dimr
import memory
import parallel
import sampling
import training
import vae
from recipes import Recipe

CPU = torch.device("cpu")
# what gives another look at a tensor and launches nothing on a GPU
VIEWS = ("view", "permute", "transpose", "unsqueeze", "select", "slice", "split", "expand")
VIEWS += (
    "t",
    "split_with_sizes",
    "detach",
    "unbind",
    "_unsafe_view",
    "alias",
    "squeeze",
    "chunk",
    "as_strided",
)


class Kernels(TorchDispatchMode):
    """Counts the operators that are called, by name, without views."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names[name] += 1
        return function(*arguments, **(keywords or {}))


def small(**changes):
    return dataclasses.replace(dimr.VARIANTS["demo"], **changes)


def network(config):
    """One whose vectors differ from one another, and whose time matters."""
    torch.manual_seed(0)
    model = dimr.DiMR(config)
    for vector in model.vectors:
        for parameter in vector.parameters():
            torch.nn.init.normal_(parameter)
    return model


def inputs(config, batch=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.channels, config.size, config.size, generator=generator)
    return x, torch.tensor([0.3]), torch.arange(batch) % config.num_classes


# ---------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("decay", [0.9999, 0.998, 0.9, 0.51])
def test_the_average_of_the_weights_has_lerps_bits(monkeypatch, decay):
    monkeypatch.setattr(dimr, "GPUS", {"cpu"})
    torch.manual_seed(0)
    shapes = [(1000,), (7,), (33, 65), (3, 3, 7, 7), (1,)]
    tensors = {str(shape): torch.randn(shape) for shape in shapes}
    average = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    for skipped in (0.0, 1.0):
        expected = {}
        for name, tensor in tensors.items():
            weight = (1 - decay) * (1 - torch.tensor(skipped))
            expected[name] = average[name].clone().lerp_(tensor, weight)
        before = {name: tensor.clone() for name, tensor in average.items()}
        training.approach(average, tensors, 1 - decay, skipped=torch.tensor(skipped))
        assert all(torch.equal(average[name], expected[name]) for name in expected)
        moved = any(not torch.equal(average[name], before[name]) for name in before)
        assert moved == (not skipped)


def test_a_step_outside_the_network_is_a_few_kernels(monkeypatch):
    """However many tensors there are: the average alone was one for each."""
    monkeypatch.setattr(dimr, "GPUS", {"cpu"})
    counts = []
    for layers in ((1, 1), (7, 6)):
        state = training.State(network(small(layers=layers)), Recipe(), CPU)
        for parameter in state.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        state.update()  # makes the moments
        for parameter in state.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        with Kernels() as kernels:
            state.update()
        counts.append(kernels.names)
        assert kernels.names["lerp_"] == 0
        assert kernels.names.total() < 30, kernels.names
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("norm", ["tdln", "tdrms"])
def test_vectors_made_at_once_are_those_made_one_by_one(monkeypatch, norm):
    model = network(small(norm=norm)).eval()
    found = dimr.all_moved(model.vectors, torch.tensor([0.3]))
    for vector in model.vectors:
        assert torch.equal(found[vector], vector(torch.tensor([0.3])))
    odd = network(small(norm=norm, dims=(36, 21))).eval()  # a loop's rest is computed otherwise
    for vector, value in dimr.all_moved(odd.vectors, torch.tensor([-0.7])).items():
        torch.testing.assert_close(value, vector(torch.tensor([-0.7])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", dimr.NORMS)
def test_sampling_on_a_gpu_launches_half_as_many_kernels(monkeypatch, norm):
    config = small(layers=(9, 8), norm=norm)
    model = network(config).eval()
    with torch.no_grad():
        with Kernels() as before:
            expected = model(*inputs(config))
        monkeypatch.setattr(dimr, "GPUS", {"cpu"})
        with Kernels() as after:
            found = model(*inputs(config))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    if norm in ("ln", "adaln"):  # no vectors in the blocks
        assert after.names.total() <= before.names.total()
        return
    saved = before.names.total() - after.names.total()
    assert saved == 5 * len(model.vectors) - 9  # four joined, five to compute
    assert after.names["sigmoid"] == after.names["lerp"] == 1


def test_training_and_several_times_make_each_vector_by_itself(monkeypatch):
    monkeypatch.setattr(dimr, "GPUS", {"cpu"})
    config = small()
    model = network(config)
    x, tau, y = inputs(config)
    assert model.vectors_at(tau) is None  # gradients
    with torch.no_grad():
        assert model.vectors_at(tau).keys() == set(model.vectors)
        assert model.vectors_at(tau.expand(4)) is None
        model.compiled = True
        assert model.vectors_at(tau) is None


def attention(monkeypatch, x, layer, gpus):
    """Output and gradients."""
    monkeypatch.setattr(dimr, "GPUS", gpus)
    values = [x, *layer.parameters()]
    out = layer(x)
    return [out, *torch.autograd.grad(out.sin().sum(), values)]


@pytest.mark.parametrize("width, padded", [(60, True), (64, False), (6, True), (16, False)])
def test_heads_padded_to_a_multiple_of_eight_compute_the_same(monkeypatch, width, padded):
    torch.manual_seed(0)
    layer = dimr.Attention(4 * width, 4)
    x = torch.randn(2, 70, 4 * width, requires_grad=True)
    plain = attention(monkeypatch, x, layer, set())
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, **options):
        seen.append((q.shape[-1], options))
        return fused(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    found = attention(monkeypatch, x, layer, {"cpu"})
    if padded:
        assert seen == [(-(-width // 8) * 8, {"scale": width**-0.5})]
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_depthwise_convolution_has_its_gradients_by_turned_kernels(monkeypatch, precision):
    block = network(small()).branches[1].blocks[0]
    x = torch.randn(3, block.grid**2, block.depthwise.in_channels, requires_grad=True)
    values = [x, block.depthwise.weight, block.depthwise.bias]
    found = []
    for gpus in (set(), {"cpu"}):
        monkeypatch.setattr(dimr, "GPUS", gpus)
        with parallel.autocast(CPU, precision):
            out = block.convolve(x)
        found.append([out, *torch.autograd.grad((out.float() + 1).square().sum(), values)])
    assert all(one.dtype == other.dtype for one, other in zip(*found, strict=True))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < {"fp32": 1e-6, "bf16": 1e-2}[precision]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_turned_kernels_leave_the_graph_whole(monkeypatch, precision):
    monkeypatch.setattr(dimr, "GPUS", {"cpu"})
    model = network(small())
    block = model.branches[1].blocks[0]
    x = torch.randn(3, block.grid**2, block.depthwise.in_channels, requires_grad=True)
    condition = dimr.Condition(torch.tensor([0.3]), None)
    gradients = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        with parallel.autocast(CPU, precision):
            out = run(x, condition)
        gradients.append(torch.autograd.grad(out.float().square().sum(), x)[0])
    assert relative(*gradients) < {"fp32": 1e-6, "bf16": 1e-2}[precision]


@pytest.mark.slow
def test_padded_heads_leave_the_graph_whole(monkeypatch):
    monkeypatch.setattr(dimr, "GPUS", {"cpu"})
    layer = dimr.Attention(24, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 5, 24)
    assert torch.equal(compiled(x), layer(x))
    with parallel.autocast(CPU, "bf16"):
        assert torch.equal(compiled(x), layer(x))


def test_joined_features_are_as_narrow_as_the_linear_layer_takes_them():
    config = small(layers=(9, 8), dims=(64, 32))
    model = network(config)
    x, tau, y = inputs(config, 16)
    sizes = {}

    def note(module, arguments):
        sizes[arguments[0].dtype] = arguments[0].numel()

    model.branches[1].upsample.norm_in.register_forward_pre_hook(note)
    exact = model(x, tau, y)
    errors = []
    joins = (dimr.join, lambda features, dtype: torch.cat(features, dim=-1))
    for join in joins:
        with pytest.MonkeyPatch.context() as patch, parallel.autocast(CPU, "bf16"):
            patch.setattr(dimr, "join", join)
            found = model(x, tau, y)
        errors.append(relative(found[-1].float(), exact[-1]))
    assert sizes.keys() == {torch.float32, torch.bfloat16}
    narrow, wide = errors
    assert narrow < 1.1 * wide < 0.1  # against float32, that of bf16 and no more


# --------------------------------------------------------------------------------------- compiled


@pytest.mark.long
@pytest.mark.slow
def test_processes_that_train_together_compile_a_graph_for_each_kind_of_block(tmp_path):
    """DistributedDataParallel would have the whole cut at each bucket of gradients: 21 graphs here,
    65 of xl2r."""
    with Ranks(2, tmp_path, count_graphs) as ranks:
        said = ranks.end(240)
    assert [status for status, _ in said] == [0, 0], said
    for _, text in said:
        found = json.loads(text.splitlines()[-1])
        # Transformer, ConvNeXt, skips of two widths, the cascade's step
        assert found["graphs"] == 5
        assert found["recomputing"] == 5
        assert found["difference"] < 1e-6


def test_a_unit_stays_compiled_for_more_shapes_than_pytorch_allows_for(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiling = functools.partialmethod(torch.nn.Module.compile, backend=counter)
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    model = network(small()).eval()
    parallel.compile_units(model)
    skip = model.branches[0].skips[0]
    for batch in range(2, 14):
        x = torch.randn(batch, 4, skip.out_features)
        skip(x, x)
    assert counter.frame_count == 12


@pytest.mark.parametrize("compiled", [True, False])
def test_the_vae_is_compiled_with_the_network_on_gpus(monkeypatch, compiled):
    loaded = vae.VAE((32, 32, 32, 32))
    asked = []
    monkeypatch.setattr(sampling.vae, "load", lambda *_: loaded)
    monkeypatch.setattr(sampling.downloads, "find", lambda source: source)
    monkeypatch.setattr(loaded.decoder, "compile", lambda **options: asked.append(options))
    generator = sampling.Generator(
        network(small()), torch.device("cuda"), "fp32", [], "here", "0", {}, vae_source="x"
    )
    generator.compiled = compiled
    assert generator._load_vae() is loaded
    assert asked == [{"dynamic": False}] * compiled


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_counts_norms_as_cuda_keeps_them(monkeypatch, recompute):
    """In float32 under autocast, which a CPU leaves in bf16: a fourth more of a network whose
    second half is in bf16."""
    config = small(layers=(3, 2))
    _, found = memory.training_memory(config, 8, recompute)
    monkeypatch.setattr(memory, "norms_as_on_cuda", contextlib.nullcontext)
    _, on_a_cpu = memory.training_memory(config, 8, recompute)
    assert on_a_cpu < found < 1.3 * on_a_cpu
    with memory.norms_as_on_cuda():
        pass
    assert torch.nn.functional.layer_norm(torch.ones(2, 3).bfloat16(), (3,)).dtype == torch.bfloat16


def test_memory_counts_gradients_twice_where_processes_accumulate_them():
    config = small(layers=(1, 1))
    alone, activations = memory.training_memory(config, 2)
    together, same = memory.training_memory(config, 2, accumulated=True)
    assert same == activations
    assert together * 20 == alone * 24
