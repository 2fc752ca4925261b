"""Training (paper, Sec. 5.1 and Table 4): AdamW, constant rate after a linear warm-up, EMA,
multi-scale loss.

What a sample is made of (which image, flip, time, noise, dropped label) depends on the seed and on
the sample's position in the run, counted from 0 over all steps. So any split of the global batch
over processes and accumulation steps computes the same, and a resumed run goes on as if it had
never stopped."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dataset
import diffusion
import dimr
import extraction
import journal
import parallel
import randomness
import runfolder
import sampling
import storage
from storage import VERSION, UserError, load_tensors, read_json, write_json

CPU = torch.device("cpu")
LOG_EVERY = 10  # steps between reads of the losses from the device


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. Defaults are the paper's (Table 4) where it gives them."""

    lr: float = 2e-4
    steps: int = 1_000_000
    batch_size: int = 1024  # global: over all processes and accumulation steps
    micro_batch: int | None = (
        None  # per process and pass; None: the process's share of the batch at once
    )
    warmup: int = 5000
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.99, 0.99)
    ema: float = 0.9999
    label_dropout: float = 0.1  # above 0 the network gets a null class
    flip: bool = True  # random horizontal flips
    grad_clip: float | None = None
    target_scale: str = "unit"
    precision: str | None = None  # None: bf16 on CUDA, else fp32
    compile: bool | None = None  # None: on CUDA
    checkpoint_blocks: bool = False
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))


RECIPES = {
    "m3r": Recipe(lr=3e-4, steps=300_000, label_dropout=0),
    "l3r": Recipe(lr=3e-4, steps=300_000, label_dropout=0),
    "xl2r": Recipe(),
    "xl3r": Recipe(),
    "g2r": Recipe(),
    "demo": Recipe(
        lr=8e-3,
        steps=3800,
        batch_size=32,
        warmup=200,
        betas=(0.9, 0.98),
        ema=0.998,
        weight_decay=0.01,
        flip=False,
    ),
}


# ------------------------------------------------------------------------------------ configuration

MAY_CHANGE = {
    "steps",
    "micro_batch",
    "compile",
    "checkpoint_blocks",
}  # of a recipe, when a run is resumed


def configure(base, data, null_class, **changes):
    """The network's Config: `base` (a variant's, or the initial weights') with size, channels and
    classes from the data and the user's `changes` (`layers`, `dims`, `heads`, `norm`). Raises
    UserError."""
    space = {"pixels": "pixel", "latents": "latent"}[data.kind]
    if base.space != space:
        fitting = ", ".join(name for name, config in dimr.VARIANTS.items() if config.space == space)
        raise UserError(
            f"this network works in {base.space} space and {data.root} holds "
            f"{data.kind}; choose one of {fitting}, "
            "or other data (dimr encode)"
        )
    try:
        return dataclasses.replace(
            base,
            size=data.size,
            channels=data.channels,
            num_classes=len(data.classes),
            null_class=null_class,
            **changes,
        )
    except ValueError as error:
        raise UserError(f"this network can't be built: {error}") from None


def nearest_variant(data):
    """The variant of the data's space whose size is nearest."""
    space = {"pixels": "pixel", "latents": "latent"}[data.kind]
    fitting = [name for name, config in dimr.VARIANTS.items() if config.space == space]
    return min(fitting, key=lambda name: abs(math.log2(dimr.VARIANTS[name].size / data.size)))


def split(batch_size, micro_batch):
    """(samples per process, samples per pass). Raises UserError naming the nearest sizes where it
    is uneven."""
    world = parallel.world_size()
    unit = world * (micro_batch or 1)
    if batch_size % unit:
        near = " or ".join(
            str(n) for n in (batch_size // unit * unit, (batch_size // unit + 1) * unit) if n
        )
        raise UserError(
            f"batch size {batch_size} does not split over {world} processes"
            + (f" and micro-batches of {micro_batch}" if micro_batch else "")
            + f"; use {near}"
        )
    return batch_size // world, micro_batch or batch_size // world


# ---------------------------------------------------------------------------------------- the state


class State:
    """All that a run changes: the network, its EMA, the optimiser, the step. Saved and restored
    whole."""

    def __init__(self, config, recipe, device):
        torch.manual_seed(recipe.seed)
        self.recipe, self.device, self.step = recipe, device, 0
        self.model = dimr.DiMR(config).to(device)
        self.parameters = dict(self.model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameter_groups(recipe.weight_decay),
            lr=recipe.lr,
            betas=recipe.betas,
            fused=True,
        )

    def learning_rate(self, step):
        return learning_rate(self.recipe, step)

    def update(self):
        """One step of AdamW and EMA from the gradients, on the device alone; returns the gradient's
        norm and 1.0 where it was not finite. Then nothing changes: the fused kernel skips for
        `found_inf`, and the EMA's weight is 0."""
        recipe, gradients = self.recipe, [p.grad for p in self.parameters.values()]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        bad = 1 - norm.isfinite().float()
        if recipe.grad_clip:
            torch._foreach_mul_(gradients, (recipe.grad_clip / (norm + 1e-6)).clamp(max=1))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.optimizer.step()
        self.optimizer.zero_grad()
        weight = (1 - recipe.ema) * (1 - bad)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter, weight)
        self.step += 1
        return norm, bad

    def initialise(self, weights):
        """Start from another network's weights; returns the names of the tensors that keep their
        fresh values."""
        theirs = weights.state_dict()
        fresh = [
            name
            for name, p in self.parameters.items()
            if name not in theirs or theirs[name].shape != p.shape
        ]
        with torch.no_grad():
            for name in self.parameters.keys() - set(fresh):
                self.parameters[name].copy_(theirs[name])
                self.ema[name].copy_(theirs[name])
        return fresh

    def files(self, facts):
        """A checkpoint's files: name → (tensors, metadata)."""
        about = runfolder.metadata(self.model.config, step=self.step, **facts)
        moments = {
            f"{kind}/{name}": value
            for name, p in self.parameters.items()
            for kind, value in self.optimizer.state[p].items()
        }
        return {
            "weights": (self.parameters, about),
            "ema": (self.ema, about),
            "optimizer": (moments, None),
        }

    def load(self, checkpoint):
        """Take everything from a checkpoint folder. Raises UserError if it is another network's."""
        weights, ema, moments = (
            load_tensors(checkpoint / f"{name}.safetensors")[0]
            for name in ("weights", "ema", "optimizer")
        )
        try:
            for tensors in (weights, ema):
                dimr.check_names({name: p.shape for name, p in self.parameters.items()}, tensors)
        except ValueError as error:
            raise UserError(f"{checkpoint} is of another network: {error}") from None
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
                self.ema[name].copy_(ema[name])
        for key, value in moments.items():
            kind, name = key.split("/")
            self.optimizer.state[self.parameters[name]][kind] = value.to(self.device)
        self.step = read_json(checkpoint / "state.json")["step"]


def learning_rate(recipe, step):
    """Linear warm-up from 0, then constant."""
    return recipe.lr * min(1, step / recipe.warmup) if recipe.warmup else recipe.lr


def losses(model, config, schedule, recipe, images, labels, first):
    """Multi-scale losses of the samples at positions first, first + 1, …: weighted sum (B,), per
    branch (R, B).

    `images` on the device: uint8 pixels (B, C, H, W), or latents float16 (B, 2, C, h, w) of mean
    and log-variance, from which the scaled z = s·(μ + σε) is drawn afresh."""
    last, device = first + len(images), images.device
    shape = (config.channels, config.size, config.size)
    if config.space == "pixel":
        x0 = images.float() / 127.5 - 1
    else:
        import vae

        mean, logvar = images.float().unbind(1)
        fresh = randomness.normal(recipe.seed, "latent", first, last, shape, device)
        x0 = vae.SCALE * (mean + (logvar / 2).exp() * fresh)
    if config.null_class:
        dropped = randomness.uniform(recipe.seed, "label", first, last) < recipe.label_dropout
        labels = labels.masked_fill(dropped.to(device, non_blocking=True), config.embeddings - 1)
    t = schedule.draw(randomness.uniform(recipe.seed, "time", first, last))
    noise = randomness.normal(recipe.seed, "noise", first, last, shape, device)
    tau = schedule.tau(t).float().to(device, non_blocking=True)
    with parallel.autocast(device, recipe.precision):
        predictions = model(schedule.noised(x0, noise, t), tau, labels)
    return diffusion.multi_scale_loss(predictions, noise, recipe.target_scale)


# ------------------------------------------------------------------------------------------ the job


def plan(
    out,
    data=None,
    variant=None,
    recipe=None,
    network=None,
    init=None,
    res=None,
    exif=False,
    device=CPU,
):
    """What a run in folder `out` is: (its record for config.json, Config, Recipe, data, initial
    network or None).

    Everything not given comes from the run's config.json if there is one, else from the variant.
    Raises UserError where that is no longer the same run."""
    before = read_json(out / "config.json") if (out / "config.json").exists() else {}
    known = before.get("data", {})
    source = data or known.get("path")
    if source is None:
        raise UserError("no training data: give --data FOLDER, or run dimr encode first")
    wanted = (
        dimr.VARIANTS[variant].size if variant and dimr.VARIANTS[variant].space == "pixel" else None
    )
    data = dataset.open_data(
        source, res or known.get("res"), exif=exif or known.get("exif", False), default_size=wanted
    )
    variant, init = (
        variant or before.get("variant") or nearest_variant(data),
        init or before.get("init"),
    )
    weights = (
        runfolder.read_weights(runfolder.find_weights(init))[0]
        if init and not runfolder.checkpoints(out)
        else None
    )
    recipe = Recipe(
        **{**(before.get("recipe") or dataclasses.asdict(RECIPES[variant])), **(recipe or {})}
    )
    recipe = dataclasses.replace(
        recipe,
        precision=recipe.precision or ("bf16" if device.type == "cuda" else "fp32"),
        compile=device.type == "cuda" if recipe.compile is None else recipe.compile,
    )
    base = (
        dimr.Config(**before["config"])
        if before
        else weights.config
        if weights
        else dimr.VARIANTS[variant]
    )
    config = configure(base, data, recipe.label_dropout > 0, **(network or {}))
    record = {
        "variant": variant,
        "config": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "init": init and str(init),
        "data": {
            "path": str(Path(source).resolve()),
            "kind": data.kind,
            "items": len(data),
            "res": res or known.get("res"),
            "exif": exif or known.get("exif", False),
            "fingerprint": data.fingerprint if parallel.is_main() else None,
        },
    }
    record = json.loads(json.dumps(record))  # as it reads back
    if before and parallel.is_main():

        def fixed(r):
            return {
                "variant": r["variant"],
                **r["config"],
                **r["recipe"],
                "data's fingerprint": r["data"]["fingerprint"],
            }

        old, new = fixed(before), fixed(record)
        for name in new:
            if name not in MAY_CHANGE and old.get(name, new[name]) != new[name]:
                raise UserError(
                    f"{out} was trained with {name} {old[name]}, not {new[name]}; give "
                    "what it had, or choose another --out"
                )
    return record, config, recipe, data, weights


def train(
    out,
    data=None,
    variant=None,
    recipe=None,
    network=None,
    init=None,
    res=None,
    exif=False,
    device="auto",
    workers=None,
    on_bad="error",
    sample_every=None,
    save_every=None,
    keep=2,
    max_time=None,
    evaluate=None,
    quiet=False,
):
    """Train into the run folder `out`, or go on from its newest whole checkpoint.

    `data`: an image folder (read at `res`) or a shard set; `variant`: a key of VARIANTS (None: the
    nearest); `recipe` and `network`: what to change of its Recipe and Config, as dicts; `init`:
    weights to start from (name, path or run); `max_time`: seconds after which to save and stop;
    `evaluate`: None, or how FID is watched: {"every": steps, "images": number, "ref": what to
    compare with or None, "inception": weights, "features": module:function or None}. A resumed run
    takes whatever is not given from its config.json. Returns a summary dict; `stopped` names the
    reason if the run is not at its end. Raises UserError."""
    begun, device, out, main = (
        time.monotonic(),
        parallel.pick_device(device),
        Path(out),
        parallel.is_main(),
    )
    stderr = journal.Lenient(sys.stderr)
    say = (
        (lambda line: tqdm.write(line, file=stderr)) if main and not quiet else (lambda line: None)
    )
    record, config, recipe, data, weights = plan(
        out, data, variant, recipe, network, init, res, exif, device
    )
    share, micro = split(recipe.batch_size, recipe.micro_batch)
    extractor = evaluate and feature_extractor(
        device, evaluate.get("inception", "inception"), evaluate.get("features")
    )
    parallel.start(device)
    with contextlib.ExitStack() as stack:
        if main:
            stack.enter_context(storage.locked(out))
        save_every = save_every or max(1, min(5000, recipe.steps // 4))
        sample_every = save_every if sample_every is None else sample_every

        state = State(config, recipe, device)
        checkpoint = parallel.broadcast(runfolder.newest_whole(out) if main else None)
        if checkpoint:
            state.load(checkpoint)
            say(f"going on from {checkpoint}")
        elif weights:
            fresh = state.initialise(weights)
            say(
                f"starting from {init}: {len(state.parameters) - len(fresh)} tensors taken, "
                + (f"fresh: {', '.join(fresh)}" if fresh else "none fresh")
            )
        if main:
            write_json(
                out / "config.json",
                {
                    **record,
                    "processes": parallel.world_size(),
                    "device": str(device),
                    "versions": versions(),
                    "command": sys.argv,
                },
            )
        last = journal.truncate_metrics(out, state.step) if main else {}

        idle = (
            torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            if device.type == "cuda"
            else 0
        )
        if idle > 0:
            say(
                f"{idle} GPUs of this machine stay idle; to use all: torchrun "
                f"--nproc-per-node {torch.cuda.device_count()} -m cli train …"
            )
        watch = evaluate and watch_fid(
            out, config, data.classes, extractor, evaluate["images"], evaluate.get("ref")
        )
        model = state.model.train()
        model.checkpoint_blocks = recipe.checkpoint_blocks
        if recipe.compile:
            model.compile()
        model = parallel.wrap(model, device)
        schedule = diffusion.SCHEDULES[config.space]()
        facts = {
            "classes": list(data.classes),
            **{k: data.index[k] for k in ("vae", "vae_sha256") if data.kind == "latents"},
        }
        order, offset = randomness.Order(len(data), recipe.seed), parallel.rank() * share
        passes = share // micro
        starts = (
            step * recipe.batch_size + offset + k * micro
            for step in range(state.step, recipe.steps)
            for k in range(passes)
        )
        reads = (
            (indices, flips & recipe.flip)
            for indices, flips in (order(first, first + micro) for first in starts)
        )
        batches = dataset.loader(data, reads, workers, on_bad, pin=device.type == "cuda")
        log, stopped, skipped = journal.Log(out, state, say, last), None, set()
        bar = stack.enter_context(
            tqdm(
                total=recipe.steps,
                initial=state.step,
                unit="step",
                desc=out.name,
                disable=quiet or not main,
                file=stderr,
                mininterval=0.5 if sys.stderr.isatty() else 30,
            )
        )
        stop = stack.enter_context(Stop())
        while state.step < recipe.steps and not stopped:
            first, total = state.step * recipe.batch_size + offset, 0
            for k in range(passes):
                images, labels, bad_images = next(batches)
                skipped.update(bad_images)
                images, labels = (
                    images.to(device, non_blocking=True),
                    labels.to(device, non_blocking=True),
                )
                with contextlib.nullcontext() if k == passes - 1 else parallel.no_sync(model):
                    sums, branches = losses(
                        model, config, schedule, recipe, images, labels, first + k * micro
                    )
                    loss = sums.sum() / share
                    loss.backward(
                        1 + 0 * loss.detach()
                    )  # a loss that is not finite makes every gradient NaN
                total = (
                    total + torch.cat([sums.detach().sum()[None], branches.detach().sum(1)]) / share
                )
            log.add(total, *state.update())
            bar.update()
            late = "max-time" if max_time and time.monotonic() - begun > max_time else None
            stopped = parallel.first(stop.reason or late) if state.step < recipe.steps else None
            at_end = state.step == recipe.steps or stopped
            saving = at_end or state.step % save_every == 0
            watching = watch and (state.step % evaluate["every"] == 0 or state.step == recipe.steps)
            if watching:
                log.remark(lambda: watch(ema_generator(out, state, facts)))
            if saving or watching or state.step % LOG_EVERY == 0:
                bar.set_postfix(log.flush(), refresh=False)
            if saving:
                if main:
                    save(out, state, log, facts, keep, say, must=at_end)
                log.restart_clock()
            if sample_every and (state.step % sample_every == 0 or state.step == recipe.steps):
                if main:
                    draw_samples(out, state, facts, say)
                log.restart_clock()
        skipped = sorted(set().union(*parallel.gather(skipped)))
        if main:
            journal.plot(out)
            for message in skipped:
                say(f"skipped {message}")
        return {
            "out": str(out),
            "step": state.step,
            "steps": recipe.steps,
            "stopped": stopped,
            "loss": journal.finite(log.last.get("loss")),
            "params": sum(p.numel() for p in state.parameters.values()),
            "seconds": round(time.monotonic() - begun, 1),
            "skipped_steps": log.bad,
            "skipped_images": len(skipped),
            "peak_bytes": parallel.peak_memory(device),
        }


class Stop(contextlib.AbstractContextManager):
    """Remembers the first of the signals to stop as `reason`, so that the loop can finish its step
    and save. A second SIGINT ends at once."""

    def __enter__(self):
        self.reason, self.interrupted = None, False
        self.before = {n: signal.signal(n, self.note) for n in dataset.STOPS}
        return self

    def note(self, number, frame):
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted |= number == signal.SIGINT
        self.reason = self.reason or signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def save(out, state, log, facts, keep, say, must):
    """Write a checkpoint, and before it the metrics up to it. One that fails is reported and
    training goes on, unless it `must` succeed: the last."""
    try:
        log.write(sync=True)
        runfolder.save_checkpoint(out, state.step, state.files(facts), {"step": state.step}, keep)
    except OSError as error:
        if must:
            raise
        say(
            f"WARNING: checkpoint at step {state.step} NOT saved "
            f"({error.strerror or error}); training goes on"
        )


def ema_generator(out, state, facts):
    """Draws images with the EMA's weights as they are now."""
    model = dimr.from_config(state.model.config, state.ema).requires_grad_(False)
    return sampling.Generator(
        model,
        state.device,
        state.recipe.precision,
        facts["classes"],
        str(out),
        "",
        facts,
        vae_source=facts.get("vae"),
    )


def feature_extractor(device, inception, features):
    """What FID is to be watched with. Raises UserError."""

    return (
        extraction.custom(features, device) if features else extraction.inception(inception, device)
    )


def watch_fid(out, config, classes, extractor, images, ref):
    """A function from a Generator to what is noted of it in metrics.jsonl. Raises UserError."""
    import evaluation

    return evaluation.watch(out, config, classes, extractor, images, ref)


def draw_samples(out, state, facts, say):
    """A grid from fixed seeds with the EMA's weights. Without the VAE there is no picture, said and
    no more."""
    config = state.model.config
    count = 64 if config.space == "pixel" else 16
    classes = [i % config.num_classes for i in range(count)]
    generator = ema_generator(out, state, facts)
    try:
        images = generator.images(classes, range(count))
        captions = [
            sampling.caption(facts["classes"][c], c, seed) for seed, c in enumerate(classes)
        ]
        sampling.save_grid(out / "samples" / f"step-{state.step:07d}.png", images, captions)
    except (UserError, OSError) as error:
        say(f"WARNING: no sample grid at step {state.step}: {error}")


def versions():
    return {
        "dimr": VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
