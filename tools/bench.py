"""How fast each part is, and how close to what the machine can do.

    python tools/bench.py                                  # every part, on CUDA if there is one
    python tools/bench.py network train --against ../DiMR  # beside a checkout of the release
    python tools/bench.py train --variant xl2r --batch 128 --json > train.json

What is compared runs in turns, A B A B …, in one process, together with the ceiling: a large matrix
product of random numbers. Reported are medians over the rounds, with half the distance between the
quartiles (±). *Share* is operations per second over those of the ceiling in the same round. *Ratio*
is how many times as long as the line above it without one. *Peak* is the most memory held, weights
included: on CUDA the allocator's, on Linux what resident memory grew by. Needs more than the
product does for comparison with others (`pip install -e '.[bench]'`, and tests/requirements.txt);
what is not installed is left out and named."""

import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch
import torch._dynamo
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import dataset
import dimr
import fid
import networks
import parallel
import randomness
import recipes
import sampling
import shards
import training
import vae
from storage import VERSION

# The digits network of the targets.
DIGITS = dimr.Config(
    size=8,
    channels=1,
    layers=(5, 3),
    dims=(128, 64),
    heads=4,
    num_classes=10,
    null_class=True,
    space="pixel",
)


@dataclasses.dataclass
class Row:
    """A line of the table. `seconds` and `throughput` are of one call; `share`, `peak_bytes` and
    `ratio` where they apply."""

    name: str
    device: str
    precision: str
    batch: int
    seconds: float
    spread: float
    throughput: float
    unit: str
    share: float | None = None
    peak_bytes: int | None = None
    ratio: float | None = None


@dataclasses.dataclass
class Candidate:
    """Something to time: `build()` gives a function; `flops` are of one call (None: counted; 0: not
    of interest); `model` is a network that holds memory already."""

    name: str
    build: object
    flops: float | None = 0
    model: nn.Module | None = None


class Bench:
    """What was asked for, and the rows so far."""

    SIDE = {"cuda": 8192, "cpu": 4096}  # of the ceiling's matrices

    def __init__(
        self,
        device,
        seconds=20,
        against=None,
        variant=None,
        batch=None,
        compiled=False,
        presets=("everyday", "paper"),
    ):
        self.device, self.seconds, self.against, self.variant, self.batch, self.rows = (
            device,
            seconds,
            against,
            variant,
            batch,
            [],
        )
        self.compiled = compiled
        self.presets = presets
        self.cuda = device.type == "cuda"

    @property
    def precisions(self):
        return ("bf16",) if self.cuda else ("fp32", "bf16")

    def ceiling(self, precision):
        """A function that multiplies two large random matrices, and its operations."""
        n, dtype = (
            self.SIDE[self.device.type],
            {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
        )
        a, b, out = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(3))
        return lambda: torch.mm(a, b, out=out), 2 * n**3

    def timed(self, function):
        """Seconds of one call, the device's work included."""
        self.wait()
        begun = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - begun

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def free(self):
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def memory(self, peak=False):
        """Bytes in use; with `peak`, the most since the last call without."""
        if self.cuda:
            if not peak:
                torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        with contextlib.suppress(OSError, StopIteration):  # not everywhere told
            if not peak:
                gc.collect()
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            field = "VmHWM:" if peak else "VmRSS:"
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(entry.split()[1]) * 1024 for entry in lines if entry.startswith(field))
        return 0

    def compare(
        self, part, candidates, precision="fp32", batch=1, items=None, unit="img/s", rounds=3
    ):
        """Time candidates in turns, the ceiling between them, and add a row for each. `items` of
        one call: `batch`."""
        functions, peaks = [], []
        for candidate in list(candidates):
            before = self.memory()
            try:
                function = candidate.build()
                if candidate.flops is None:
                    with FlopCounterMode(display=False) as counter:
                        function()
                    candidate.flops = counter.get_total_flops()
                if self.timed(function) < 10:  # warm: compilation, the allocator, caches
                    self.timed(function)
            except torch.cuda.OutOfMemoryError:
                click.echo(
                    f"left out, for it takes too much memory: {part}, {candidate.name}", err=True
                )
                candidates.remove(candidate)
                function = candidate = None  # what they hold
                self.free()
                continue
            held = (
                sum(p.numel() * p.element_size() for p in candidate.model.parameters())
                if candidate.model
                else 0
            )
            functions.append(function)
            peaks.append(max(self.memory(peak=True) - before, 0) + held)
        top, top_flops = (
            self.ceiling(precision) if any(c.flops for c in candidates) else (lambda: None, 0)
        )
        top()
        times, tops, begun = [[] for _ in functions], [], time.perf_counter()
        while len(tops) < rounds or time.perf_counter() - begun < self.seconds:
            tops.append(self.timed(top))
            for spent, function in zip(times, functions, strict=True):
                spent.append(self.timed(function))
        for candidate, spent, peak in zip(candidates, times, peaks, strict=True):
            share = (
                statistics.median(
                    candidate.flops / s / (top_flops / t) for s, t in zip(spent, tops, strict=True)
                )
                if candidate.flops
                else None
            )
            ratio = (
                statistics.median(s / first for s, first in zip(spent, times[0], strict=True))
                if spent is not times[0]
                else None
            )
            seconds = statistics.median(spent)
            self.add(
                Row(
                    f"{part}, {candidate.name}",
                    self.device.type,
                    precision,
                    batch,
                    seconds,
                    spread(spent),
                    (items or batch) / seconds,
                    unit,
                    share,
                    peak or None,
                    ratio,
                )
            )

    def add(self, row):
        self.rows.append(row)
        click.echo(line(row), err=True)


def spread(values):
    """Half the distance between the quartiles, as a share of the median."""
    if len(values) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


def line(row):
    cells = [
        f"{row.name:<58} {row.precision:<5} {row.batch:>6} {row.seconds * 1e3:>11,.2f} "
        f"ms ±{row.spread:>4.0%} "
        f"{row.throughput:>11,.4g} {row.unit:<7}",
        f"{row.share:6.3f}" if row.share else " " * 6,
        f"{row.peak_bytes / 1e9:8.2f} GB" if row.peak_bytes else " " * 11,
        f"× {row.ratio:.2f}" if row.ratio else "",
    ]
    return " ".join(cells).rstrip()


TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def other(name, attribute):
    """Something to compare with, or None where it is not installed, which is said."""
    torchvision()
    try:
        return getattr(importlib.import_module(name), attribute)
    except (ImportError, RuntimeError) as error:
        click.echo(f"not compared with {name.split('.')[0]}: {error}", err=True)
        return None


def torchvision():
    """Import torchvision, if it is there. It expects two compiled operators, which one beside a CPU
    build of PyTorch does not have."""
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("torchvision")
    except RuntimeError:
        for operator in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                TORCHVISION.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


# ----------------------------------------------------------------------------- the authors' release


class Release(nn.Module):
    """The network in a checkout of the authors' release, called as ours is. `tuned`: without its
    recomputation in the backward pass and its warnings."""

    def __init__(self, checkout, config, tuned):
        super().__init__()
        blocks = self.module(checkout)
        stages = [
            types.SimpleNamespace(
                block_type="ConvNeXtBlock" if r else "TransformerBlock",
                dim=dim,
                hidden_dim=2 * dim,
                num_attention_heads=config.heads,
                kernel_size=7,
                num_blocks=layers,
                max_height=grid,
                max_width=grid,
                image_input_ratio=1,
                input_feature_ratio=config.size // grid,
                final_kernel_size=3,
                dropout_prob=0,
            )
            for r, (dim, layers, grid) in enumerate(
                zip(config.dims, config.layers, config.grids, strict=True)
            )
        ]
        norm = {"tdln": "LN", "tdrms": "TDRMSN"}[config.norm]
        self.net = blocks.MRModel(
            types.SimpleNamespace(
                channels=config.channels,
                num_classes=config.embeddings,
                norm_type=norm,
                block_grad_to_lowres=False,
                stage_configs=stages,
            )
        )
        self.config = config
        self.tuned = tuned
        self.guided = False  # whether conditional and unconditional come as one batch
        if tuned:
            for block in (b for stage in self.net.stages for b in stage.blocks):
                block.forward = block._forward

    @staticmethod
    def module(checkout):
        """Its module of blocks; stand-ins for what that imports of others."""
        layers = types.ModuleType("timm.models.layers")
        layers.trunc_normal_ = nn.init.trunc_normal_
        strangers = {name: types.ModuleType(name) for name in ("timm", "timm.models", "einops")} | {
            layers.__name__: layers
        }
        absent = {name: module for name, module in strangers.items() if name not in sys.modules}
        sys.modules.update(absent)
        try:
            with (
                mock.patch.object(sys, "path", [str(checkout), *sys.path]),
                torch._dynamo.config.patch(suppress_errors=False),
            ):  # it sets that
                return importlib.import_module("libs.core.blocks")
        except ImportError as error:
            raise click.ClickException(
                f"--against {checkout}: {error}; expected a checkout of the authors' release"
            ) from None
        finally:
            for name in absent:
                del sys.modules[name]

    def forward(self, x, tau, y):
        shown = contextlib.redirect_stderr(io.StringIO())
        with warnings.catch_warnings(), shown:
            warnings.simplefilter("ignore" if self.tuned else "default")
            if not self.guided:
                return self.once(x, tau, y)
            halves = zip(x.chunk(2), y.chunk(2), strict=True)
            outputs = [self.once(part, tau, labels) for part, labels in halves]
            return tuple(torch.cat(pair) for pair in zip(*outputs, strict=True))

    def once(self, x, tau, y):
        return tuple(self.net(x, log_snr=4 * tau.expand(len(x)), y=y))

    def time(self, schedule, t):
        return schedule.tau(t)

    def parameter_groups(self, weight_decay):
        return [{"params": list(self.parameters()), "weight_decay": weight_decay}]


class PeerRelease(nn.Module):
    """The network in a checkout of DiT's or U-ViT's authors, called as ours is. Needs timm and
    einops, as they do."""

    PLACES = {"dit": ("models", "DiT"), "uvit": ("libs.uvit", "UViT")}

    def __init__(self, checkout, config):
        super().__init__()
        module, name = self.PLACES[config.kind]
        torchvision()  # which timm imports
        try:
            with mock.patch.object(sys, "path", [str(checkout), *sys.path]):
                network = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise click.ClickException(
                f"--against {checkout}: {error}; expected a checkout of {name}'s authors' code"
            ) from None
        self.config = config
        shape = {
            "patch_size": config.patch,
            "depth": config.depth,
            "num_heads": config.heads,
            "num_classes": config.num_classes if config.kind == "dit" else config.embeddings,
        }
        if config.kind == "dit":
            shape |= {"input_size": config.size, "in_channels": config.channels}
            shape |= {"hidden_size": config.width}
        else:
            shape |= {"img_size": config.size, "in_chans": config.channels}
            shape |= {"embed_dim": config.width, "conv": config.convolution}
        self.net = network(**shape)

    def forward(self, x, time, y):
        return (self.net(x, time.expand(len(x)), y)[:, : self.config.channels],)


def rivals(bench, config):
    """(name, network in training mode on the device): ours, and the release's with the same
    weights, checked."""
    torch.manual_seed(0)
    with bench.device:
        ours = networks.new(config)
    yield "dimr", ours
    if bench.against and networks.kind(config) == "dimr":
        released = dimr.to_released(ours)
        for name, tuned in (
            ("release as it is", False),
            ("release without recomputation, warnings", True),
        ):
            with bench.device:  # where weights are drawn sooner
                theirs = Release(bench.against, config, tuned)
            theirs = theirs.to(bench.device)  # and what it makes elsewhere
            theirs.net.load_state_dict(released)
            check_same(theirs, ours, inputs(config, 2, bench.device))
            yield name, theirs
    if bench.against and networks.kind(config) in PeerRelease.PLACES:
        theirs = PeerRelease(bench.against, config).to(bench.device)
        theirs.net.load_state_dict(ours.state_dict(), strict=False)
        check_same(theirs, ours, inputs(config, 2, bench.device))
        yield "its authors' code", theirs


def check_same(theirs, ours, values):
    """Raise AssertionError unless two networks in training mode compute the same."""
    with torch.no_grad():
        for a, b in zip(theirs(*values), ours(*values), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def inputs(config, batch, device):
    """Noisy images, one time for all, classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.channels, config.size, config.size, generator=generator)
    return (
        x.to(device),
        torch.full((1,), 0.3, device=device),
        (torch.arange(batch) % config.num_classes).to(device),
    )


# -------------------------------------------------------------------------------------------- parts


def ceilings(bench):
    """What the machine can do: matrix products and copies."""
    for precision in ("fp32", "bf16"):
        bench.compare(
            "ceiling",
            [Candidate("matrix product", lambda p=precision: bench.ceiling(p)[0])],
            precision,
            0,
            bench.ceiling(precision)[1] / 1e12,
            "TFLOP/s",
        )
    n = 2**30 if bench.cuda else 2**28
    source = torch.randn(n // 4, device=bench.device)
    target = torch.empty_like(source)
    bench.compare(
        "ceiling",
        [Candidate("copy, read and written", lambda: lambda: target.copy_(source))],
        "fp32",
        0,
        2 * n / 1e9,
        "GB/s",
    )


def network(bench):
    """Forward passes for inference."""
    variant, batch = bench.variant or "xl2r", bench.batch or (64 if bench.cuda else 1)
    config = networks.VARIANTS[variant]
    flops = 2 * sum(config.macs) * batch
    for precision in bench.precisions:
        candidates = []
        for name, model in list(
            rivals(bench, config)
        ):  # all have their weights before ours are rounded
            model.eval().requires_grad_(False)
            if name == "dimr":
                model = parallel.for_inference(model, precision, bench.compiled)
            candidates.append(
                Candidate(
                    name,
                    functools.partial(forward, bench, model, config, batch, precision),
                    flops,
                    model,
                )
            )
        bench.compare(f"forward {variant}", candidates, precision, batch)


def forward(bench, model, config, batch, precision):
    values = inputs(config, batch, bench.device)

    def function():
        with torch.inference_mode(), parallel.autocast(bench.device, precision):
            model(*values)

    return function


def train(bench):
    """Training steps: forward and backward pass, AdamW, EMA."""
    if bench.cuda:
        jobs = [
            (v, networks.VARIANTS[v], bench.batch or (32 if v == "xl3r" else 64), "bf16")
            for v in ([bench.variant] if bench.variant else ["xl2r", "m3r", "xl3r"])
        ]
    elif bench.variant:
        jobs = [(bench.variant, networks.VARIANTS[bench.variant], bench.batch or 1, "fp32")]
    else:
        jobs = [
            ("digits", DIGITS, bench.batch or 128, "fp32"),
            ("demo", networks.VARIANTS["demo"], bench.batch or 32, "fp32"),
        ]
    for name, config, batch, precision in jobs:
        torch._dynamo.reset()
        bench.free()
        recipe = recipes.Recipe(
            batch_size=batch, precision=precision, compile=bench.cuda or bench.compiled
        )
        flops = 6 * sum(config.macs) * batch
        candidates = [
            Candidate(who, functools.partial(steps, bench, model, recipe), flops, model)
            for who, model in rivals(bench, config)
        ]
        bench.compare(f"training step {name}", candidates, precision, batch)


def steps(bench, model, recipe):
    """A function that takes one training step."""
    config, device = model.config, bench.device
    state = training.State(model, recipe, device)
    state.network.train()
    if recipe.compile and not isinstance(model, Release):
        parallel.compile_units(state.network)
    count = recipe.batch_size
    shape = (config.channels, config.size, config.size)
    generator = torch.Generator().manual_seed(2)
    if config.space == "pixel":
        images = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    else:
        images = torch.randn(count, 2, *shape, generator=generator).half()
    labels = torch.arange(count) % config.num_classes
    batches = itertools.repeat((images.to(device), labels.to(device)))
    division = training.Division(count, count)
    return lambda: training.train_step(state, batches, division)


def sample(bench):
    """Guided sampling, without the VAE: 2M at 25 NFE and the paper's preset. The release calls its
    network twice."""
    variant, batch = bench.variant or ("xl2r" if bench.cuda else "demo"), bench.batch or 64
    config, precision = networks.VARIANTS[variant], bench.precisions[0]
    made = list(rivals(bench, config))
    for preset in bench.presets:
        settings = sampling.Settings(cfg=1.5 if config.null_class else 1, preset=preset).resolved(
            config
        )
        candidates = []
        for name, model in made:
            model.eval().requires_grad_(False)
            if name == "dimr":
                model = parallel.for_inference(model, precision, bench.compiled)
            candidates.append(
                Candidate(
                    name,
                    functools.partial(solved, bench, model, settings, batch, precision),
                    settings.steps * (1 + config.null_class) * 2 * sum(config.macs) * batch,
                    model,
                )
            )
        bench.compare(
            f"sampling {variant}, {settings.solver} {settings.steps} NFE",
            candidates,
            precision,
            batch,
            rounds=1,
        )


def solved(bench, model, settings, batch, precision):
    """A function that draws a batch."""
    classes = [i % model.config.num_classes for i in range(batch)]
    if isinstance(model, Release):
        model.guided = settings.cfg > 1
    options = {"device": bench.device, "precision": precision}
    return lambda: sampling.solve(model, classes, range(batch), settings, **options)


def autoencoder(bench):
    """The SD-VAE at 256 × 256, beside diffusers': in fp32; decoding in fp16 on CUDA, as samples."""
    batch = bench.batch or (16 if bench.cuda else 1)
    torch.manual_seed(0)
    models = {"dimr": vae.VAE()}
    if found := other("diffusers", "AutoencoderKL"):
        models["diffusers"] = found(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            layers_per_block=2,
            block_out_channels=vae.WIDTHS,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    models = {k: m.eval().requires_grad_(False).to(bench.device) for k, m in models.items()}
    models["dimr"].to(memory_format=vae.layout(bench.device))
    x = torch.randn(batch, 3, 256, 256, device=bench.device)
    z = torch.randn(batch, 4, 32, 32, device=bench.device)

    def call(model, direction, value):
        def function():
            with torch.inference_mode():
                getattr(model, direction)(value)

        return function

    for direction, value in (("encode", x), ("decode", z)):
        precision = "fp16" if bench.cuda and direction == "decode" else "fp32"
        if precision == "fp16":
            models = {k: m.half() for k, m in models.items()}
            value = value.half()
        bench.compare(
            f"VAE {direction}",
            [
                Candidate(k, functools.partial(call, m, direction, value), None, m)
                for k, m in models.items()
            ],
            precision,
            batch,
        )


def inception(bench):
    """Features for FID and its relatives, beside torch-fidelity's and pytorch-fid's, from 256 × 256
    images, fp32."""
    batch = bench.batch or (64 if bench.cuda else 8)
    images = torch.randint(256, (batch, 256, 256, 3), dtype=torch.uint8, device=bench.device)
    planes = images.permute(0, 3, 1, 2).contiguous()
    unit = planes.float() / 255
    models = {"dimr": (fid.Inception().to(memory_format=fid.layout(bench.device)), images)}
    for name, module, kind, options, value in (
        (
            "torch-fidelity",
            "torch_fidelity.feature_extractor_inceptionv3",
            "FeatureExtractorInceptionV3",
            ("random", ["2048", "logits_unbiased"]),
            planes,
        ),
        ("pytorch-fid", "pytorch_fid.inception", "InceptionV3", ([3],), unit),
    ):
        if found := other(module, kind):  # without their weights, which would be downloaded
            with (
                mock.patch(f"{module}.load_state_dict_from_url", return_value={}),
                mock.patch.object(nn.Module, "load_state_dict"),
            ):
                models[name] = (found(*options), value)
    for model, _ in models.values():
        model.eval().requires_grad_(False).to(bench.device)

    def call(model, value):
        def function():
            with torch.inference_mode():
                model(value)

        return function

    bench.compare(
        "Inception features",
        [Candidate(k, lambda m=m: call(*m), None, m[0]) for k, m in models.items()],
        "fp32",
        batch,
    )


def metrics(bench):
    """Fréchet distance at 2,048 features beside SciPy's square root; precision and recall at 50,000
    × 10,000."""
    import scipy.linalg

    generator = torch.Generator().manual_seed(0)
    moments = []
    for count in (5000, 5000):
        rows = torch.randn(
            count, fid.POOL, generator=generator, dtype=torch.float64
        ) * torch.linspace(0.1, 2, fid.POOL)
        moments += [rows.mean(0).numpy(), np.cov(rows.numpy(), rowvar=False)]

    def scipys():
        mean_1, covariance_1, mean_2, covariance_2 = moments
        root = scipy.linalg.sqrtm(covariance_1 @ covariance_2)
        return ((mean_1 - mean_2) ** 2).sum() + np.trace(
            covariance_1 + covariance_2 - 2 * root.real
        )

    ours = fid.frechet_distance(*moments)
    if not np.isclose(ours, scipys(), rtol=1e-6):
        raise click.ClickException(f"Fréchet distance {ours}, by SciPy {scipys()}")
    bench.compare(
        "Fréchet distance, 2,048 features",
        [
            Candidate("dimr", lambda: lambda: fid.frechet_distance(*moments)),
            Candidate("scipy.linalg.sqrtm", lambda: scipys),
        ],
        "fp64",
        1,
        unit="/s",
    )
    real, fake = (
        torch.randn(n, fid.POOL, generator=generator).to(bench.device) for n in (50_000, 10_000)
    )
    before = bench.memory()
    seconds = bench.timed(lambda: fid.manifold_metrics(real, fake))
    held = (real.numel() + fake.numel()) * 4
    bench.add(
        Row(
            "precision and recall, 50,000 × 10,000",
            bench.device.type,
            "fp32",
            1,
            seconds,
            0,
            60_000 / seconds,
            "img/s",
            peak_bytes=bench.memory(peak=True) - before + held,
        )
    )


def readers(bench):
    """What a training loop reads from: latents, pixels and photographs. The ceiling of none of
    these is a product."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rng = np.random.default_rng(0)
        (folder / "photographs" / "one").mkdir(parents=True)
        coarse = rng.integers(0, 256, (64, 24, 32, 3), np.uint8)
        for i, pixels in enumerate(coarse):
            Image.fromarray(pixels).resize((500, 375), Image.BICUBIC).save(
                folder / "photographs" / "one" / f"{i}.jpg", quality=90
            )
        write_shards(
            folder / "latents",
            "latents",
            rng.standard_normal((4096, 2, 2, 4, 32, 32), np.float32).astype(np.float16),
        )
        write_shards(folder / "pixels", "pixels", rng.integers(0, 256, (8192, 64, 64, 3), np.uint8))
        for name, data, batch, count in (
            ("latent shards, 256 × 256", dataset.open_data(folder / "latents"), 64, 64),
            ("pixel shards, 64 × 64", dataset.open_data(folder / "pixels"), 64, 64),
            (
                "photographs of 500 × 375, cropped to 64",
                dataset.open_data(folder / "photographs", 64),
                16,
                16,
            ),
        ):

            def read(data=data, batch=batch, count=count):
                order = randomness.Order(len(data), 0)
                for _ in dataset.loader(
                    data, (order(k * batch, (k + 1) * batch) for k in range(count))
                ):
                    pass

            bench.compare(
                "reading", [Candidate(name, lambda read=read: read)], "-", batch, batch * count
            )


def write_shards(root, kind, data):
    """A set of one shard."""
    plan = {
        "format": shards.FORMAT,
        "kind": kind,
        "size": data.shape[-1] if kind == "latents" else data.shape[1],
        "channels": 4 if kind == "latents" else 3,
        "classes": ["one"],
        "options": {"res": 256 if kind == "latents" else 64},
    }
    row = shards.write_shard(
        shards.shard_path(root, 0), plan, [(data, np.zeros(len(data), np.int64))]
    )
    shards.write_index(root, plan, [row])


PARTS = {
    part.__name__: part
    for part in (ceilings, network, train, sample, autoencoder, inception, metrics, readers)
}


def machine(device):
    """What was measured on."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    with contextlib.suppress(OSError, StopIteration):
        if device.type == "cpu":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(
                entry.split(":")[1].strip() for entry in lines if entry.startswith("model name")
            )
    threads = (
        f", {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else f", CUDA {torch.version.cuda}"
    )
    return (
        f"{name}{threads}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}, dimr {VERSION}"
    )


def help_text():
    """The text of --help: this file's, with its examples and the parts as they are."""
    examples = __doc__.replace("\n\n    python", "\n\n\b\n    python")
    parts = "\n".join(
        f"    {name:12} {part.__doc__.splitlines()[0]}" for name, part in PARTS.items()
    )
    return f"{examples}\n\n\b\nParts:\n{parts}"


@click.command(
    help=help_text(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 130},
)
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)), metavar="[PART]...")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--variant",
    type=click.Choice(list(networks.VARIANTS)),
    help="For network, train and sample [default: those of docs/performance.md].",
)
@click.option(
    "--batch", type=click.IntRange(min=1), help="Images of one call [default: by part and device]."
)
@click.option(
    "--against",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkout of the authors' release, or for a peer's --variant of DiT's or U-ViT's.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=20,
    show_default=True,
    help="For each comparison, at least.",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="torch.compile for our network (in training on CUDA always).",
)
@click.option(
    "--preset",
    "presets",
    type=click.Choice(["everyday", "paper"]),
    multiple=True,
    default=("everyday", "paper"),
    show_default=True,
    help="For sample.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON on stdout.")
def main(parts, device, variant, batch, against, seconds, compiled, presets, as_json):
    cli.keep_memory()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means it, as in the product
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = parallel.pick_device(device)
    bench = Bench(device, seconds, against, variant, batch, compiled, presets)
    click.echo(machine(bench.device), err=True)
    try:
        for part in parts or PARTS:
            PARTS[part](bench)
            bench.free()
    finally:
        if as_json:
            where = {"machine": machine(bench.device)}
            click.echo(
                json.dumps([dataclasses.asdict(row) | where for row in bench.rows], indent=1)
            )


if __name__ == "__main__":
    main()
