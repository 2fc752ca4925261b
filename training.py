"""Training (paper, Sec. 5.1 and Table 4): AdamW, constant rate after a linear warm-up, EMA,
multi-scale loss.

What a sample is made of (which image, flip, time, noise, dropped label) depends on the seed and on
the sample's position in the run, counted from 0 over all steps. So any split of the global batch
over processes and accumulation steps computes the same, and a resumed run goes on as if it had
never stopped."""

import ours

import contextlib
import dataclasses
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import averages
import averaging
import background
import dataset
import diffusion
import dimr
import imagesets
import journal
import memory
import networks
import parallel
import randomness
import recipes
import runfolder
import sampling
import space
import storage
import validation
from recipes import Plan, Recipe, Source, is_deterministic, make_plan, weights_record
from storage import VERSION, UserError, open_tensors, read_json, write_json
from validation import Validation

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of AdamW, by parameter
LOG_EVERY = 10  # steps between reads of the losses from the device
GRID = {"pixel": 64, "latent": 16}  # images of a sample grid on a GPU
GRID_ON_CPU = {"pixel": 16, "latent": 4}
# how the names of tensors end that have a row per class
CLASS_EMBEDDING = ("class_token.weight", "embedding_table.weight", "label_emb.weight")
NULL_CLASS = "the null class"
STOPPING = b"\nfinishing this step and saving; Ctrl-C again ends at once\n"


@dataclasses.dataclass(frozen=True)
class Saving:
    """When to save and draw, and when to stop. None takes the default."""

    every: int | None = None  # steps between checkpoints: 5000, or a quarter of the run
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    sample_every: int | None = None  # steps between sample grids: as `every`; 0 for none
    max_time: float | None = None  # seconds after which to save and stop


@dataclasses.dataclass(frozen=True)
class Watch:
    """How FID is watched: every so many steps, of that many images, against `ref` (None: what
    fits), in the features of `inception`'s weights or of `features`, a module:function."""

    every: int
    images: int = 5000
    ref: str | None = None
    inception: str = "inception"
    features: str | None = None


@dataclasses.dataclass(frozen=True)
class Division:
    """How a global batch is divided: samples per process, and per pass."""

    share: int
    micro: int

    @property
    def passes(self):
        return self.share // self.micro

    @property
    def offset(self):
        """Of this process's samples in the batch."""
        return parallel.rank() * self.share


def divide(batch_size: int, micro_batch: int | None) -> Division:
    """Raises UserError naming the nearest sizes where the division is uneven."""
    world = parallel.world_size()
    unit = world * (micro_batch or 1)
    if batch_size % unit:
        below = batch_size // unit * unit
        near = " or ".join(str(size) for size in (below, below + unit) if size)
        passes = f" and micro-batches of {micro_batch}" if micro_batch else ""
        raise UserError(
            f"batch size {batch_size} does not split over {world} processes{passes}; use {near}"
        )
    share = batch_size // world
    return Division(share, micro_batch or share)


# ---------------------------------------------------------------------------------------- the state


def new_network(config: networks.Config, seed: int) -> networks.Network:
    """A network with fresh weights, which the seed alone decides."""
    torch.manual_seed(seed)
    return networks.new(config)


def class_rows(config, classes, initial):
    """Row of our class embedding → row of the initial network's: by name, and null to null."""
    theirs = initial.network.config
    known = {name: row for row, name in enumerate(initial.classes)}
    rows = {row: known[name] for row, name in enumerate(classes) if name in known}
    if config.null_class and theirs.null_class:
        rows[config.num_classes] = theirs.num_classes
    return rows


class State:
    """All that a run changes: the network, its EMA and other averages, the optimiser, the step.
    Saved and restored whole. `network` holds the weights; `model` is what runs it: the same, or
    what `parallel.wrap` puts around it."""

    def __init__(self, network: networks.Network, recipe: Recipe, device: torch.device):
        self.recipe = recipe
        self.device = device
        self.step = 0
        self.network = network.to(device)
        self.model = self.network
        self.schedule = diffusion.SCHEDULES[network.config.noise_schedule]()
        self.objective = diffusion.OBJECTIVES[network.config.objective]
        self.parameters = dict(self.network.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.averages = averages.Averages(self.parameters, recipe.ema_profiles)
        self.optimizer = torch.optim.AdamW(
            self.network.parameter_groups(recipe.weight_decay),
            lr=recipe.lr,
            betas=recipe.betas,
            fused=True,
        )

    def start(self, micro: int) -> None:
        """Make ready to train on `micro` samples a pass: compiled if the recipe says so, and with
        gradients averaged over processes."""
        self.network.train()
        self.network.checkpoint_blocks = self.recipe.checkpoint_blocks
        if self.recipe.compile:
            parallel.compile_units(self.network)
        self.model = parallel.wrap(self.network, self.device)
        if parallel.world_size() > 1:
            self.rehearse(micro)

    def rehearse(self, micro):
        """One pass, forward and backward, on `micro` blank samples; its gradients are thrown away,
        and nothing is drawn.

        Three or more gradients are summed in an order that follows from their place in a bucket,
        and DistributedDataParallel lays its buckets anew after the first backward pass that it
        averages: in the order in which gradients came, instead of that of the parameters. Without
        this pass the first step of each life of a run would be summed in another order than the
        same step of a run that was never stopped, and the two would part in the last bits. With
        it, every step of every life finds the second layout."""
        config = self.network.config
        shape = (micro, config.channels, config.size, config.size)
        blank = torch.zeros(shape, device=self.device)
        tau = torch.zeros(micro, device=self.device)
        labels = torch.zeros(micro, dtype=torch.long, device=self.device)
        with parallel.autocast(self.device, self.recipe.precision):
            predictions = self.model(blank, tau, labels)
        recipe = self.recipe
        sums, _ = diffusion.multi_scale_loss(predictions, blank, recipe.target_scale, recipe.loss)
        sums.sum().backward()
        self.optimizer.zero_grad()

    def update(self):
        """One step of AdamW and the averages from the gradients, on the device alone; returns the
        gradient's norm and 1.0 where it was not finite. Then nothing changes: fused kernels skip
        for `found_inf`, and the other averages' weight is 0."""
        recipe = self.recipe
        gradients = [p.grad for p in self.parameters.values() if p.requires_grad]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        bad = 1 - norm.isfinite().float()
        if recipe.grad_clip:
            torch._foreach_mul_(gradients, (recipe.grad_clip / (norm + 1e-6)).clamp(max=1))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        self.optimizer.grad_scale = None
        self.optimizer.found_inf = bad
        self.optimizer.step()
        self.optimizer.zero_grad()
        approach(self.ema, self.parameters, 1 - recipe.ema, skipped=bad)
        self.step += 1
        self.averages.update(self.step, bad)
        return norm, bad

    def take(self, initial: recipes.Initial, classes: Sequence[str]) -> tuple[list[str], list[str]]:
        """Start from other weights, an `Initial`; class embeddings go by the names of `classes`.
        Returns the names of the tensors and of the classes that keep their fresh values."""
        theirs = initial.network.state_dict()
        rows = class_rows(self.network.config, classes, initial)
        fresh = []
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if name not in theirs:
                    fresh.append(name)
                elif (
                    name.endswith(CLASS_EMBEDDING) and theirs[name].shape[1:] == parameter.shape[1:]
                ):
                    parameter[list(rows)] = theirs[name][list(rows.values())].to(parameter)
                    self.ema[name].copy_(parameter)
                elif theirs[name].shape != parameter.shape:
                    fresh.append(name)
                else:
                    parameter.copy_(theirs[name])
                    self.ema[name].copy_(theirs[name])
        named = [*classes, NULL_CLASS][: self.network.config.embeddings]
        return fresh, [name for row, name in enumerate(named) if row not in rows]

    def losses(
        self,
        model: torch.nn.Module,
        x0: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Multi-scale losses, weighted sum (B,) and per branch (R, B), of what `model` makes of x0
        (B, C, H, W) noised to times t (B,), float64 on the CPU, with `noise` and `labels` (B,)."""
        device = x0.device
        tau = self.network.time(self.schedule, t).float().to(device, non_blocking=True)
        with parallel.autocast(device, self.recipe.precision):
            predictions = model(self.schedule.noised(x0, noise, t), tau, labels)
        target = self.objective.target(x0, noise)
        recipe = self.recipe
        return diffusion.multi_scale_loss(predictions, target, recipe.target_scale, recipe.loss)

    def files(self, record):
        """A checkpoint's files: name → (tensors, metadata)."""
        metadata = runfolder.metadata(self.network.config, step=self.step, **record)
        moments = {}
        for name, parameter in self.parameters.items():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{kind}/{name}"] = value
        files = {
            "weights": (self.parameters, metadata),
            "ema": (self.ema, metadata),
            "optimizer": (moments, None),
        }
        if self.recipe.ema_profiles:
            files["averages"] = (self.averages.state(), None)
        return files

    def load(self, checkpoint: Path) -> None:
        """Take everything from a checkpoint folder. Raises UserError if it is another network's."""
        check_network(self.parameters, checkpoint)
        fill(self.parameters, checkpoint / "weights.safetensors")
        fill(self.ema, checkpoint / "ema.safetensors")
        moments = {}
        for key, blank in blanks_of(checkpoint / "optimizer.safetensors").items():
            kind, _, name = key.partition("/")
            if kind not in MOMENTS or name not in self.parameters:
                raise UserError(f"{checkpoint} is of another network: its optimizer holds {key}")
            moments[key] = torch.empty_like(blank, device=self.device)
            self.optimizer.state[self.parameters[name]][kind] = moments[key]
        fill(moments, checkpoint / "optimizer.safetensors")
        self.load_averages(checkpoint / "averages.safetensors")
        self.step = read_json(checkpoint / "state.json", runfolder.STATE)["step"]

    def load_averages(self, path):
        """Take the power-function averages, if this run keeps any, from a checkpoint's file. Raises
        UserError."""
        widths = list(self.recipe.ema_profiles)
        if not widths:
            return
        if not path.is_file():
            raise UserError(
                f"{path.parent} holds no averages of widths {widths}, and they are kept from the "
                "first step on or not at all; leave out --ema-profiles, or choose another --out"
            )
        held = self.averages.state()
        try:
            dimr.check_names({name: t.shape for name, t in held.items()}, blanks_of(path))
        except ValueError as error:
            raise UserError(f"{path} is not of averages of widths {widths}: {error}") from None
        fill(held, path)


def check_network(parameters, checkpoint):
    """Raise UserError unless a checkpoint folder holds weights of these parameters' shapes."""
    expected = {name: p.shape for name, p in parameters.items()}
    try:
        for name in ("weights", "ema"):
            dimr.check_names(expected, blanks_of(checkpoint / f"{name}.safetensors"))
    except ValueError as error:
        raise UserError(f"{checkpoint} is of another network: {error}") from None


@torch.no_grad()
def approach(averages, tensors, share, skipped):
    """averages += share · (tensors − averages), both name → tensor in one order; nothing where
    `skipped`, on the device, is 1.

    On GPUs it is a step of fused SGD down (averages − tensors)² / 2, which is a few kernels for all
    instead of one for each, and has the bits of `lerp_` for shares below a half."""
    if skipped.device.type not in dimr.GPUS:
        for name, average in averages.items():
            average.lerp_(tensors[name], share * (1 - skipped))
        return
    averages = list(averages.values())
    torch._fused_sgd_(
        averages,
        torch._foreach_sub(averages, list(tensors.values())),
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=share,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=skipped,
    )


def blanks_of(path):
    """The tensors in a file without their values, by name, on every process. Rank 0 alone reads
    it."""
    shapes = {}
    if parallel.is_main():
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                shapes[name] = file.get_slice(name).get_shape()
    blanks = {}
    for name, shape in parallel.broadcast(shapes).items():
        blanks[name] = torch.empty(shape, device="meta")
    return blanks


def fill(tensors, path):
    """Give each of `tensors`, on every process, the values that the file holds under its name.

    Rank 0 alone reads, one at a time, and the others are sent what it has read: a machine with
    eight GPUs would hold the file eight times otherwise."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        if parallel.is_main():
            file = stack.enter_context(open_tensors(path))
        for name, tensor in tensors.items():
            if parallel.is_main():
                tensor.copy_(file.get_tensor(name))
            parallel.broadcast_tensor(tensor.detach())


# ----------------------------------------------------------------------------------------- the step


def losses(
    state: State, images: torch.Tensor, labels: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-scale losses of the samples at positions first, first + 1, …: weighted sum (B,), per
    branch (R, B).

    `images` and `labels` (B,) on the device: uint8 pixels (B, C, H, W), or latents float16 (B, 2,
    C, h, w) of mean and log-variance."""
    config, recipe = state.network.config, state.recipe
    last, device = first + len(images), images.device

    def normal(stream, shape):
        return randomness.normal(recipe.seed, stream, first, last, shape, device)

    x0 = space.of(config).x0(images, lambda shape: normal("latent", shape))
    if config.null_class:
        dropped = randomness.uniform(recipe.seed, "label", first, last) < recipe.label_dropout
        labels = labels.masked_fill(dropped.to(device, non_blocking=True), config.embeddings - 1)
    t = state.schedule.draw(randomness.uniform(recipe.seed, "time", first, last))
    noise = normal("noise", (config.channels, config.size, config.size))
    return state.losses(state.model, x0, t, noise, labels)


def train_step(
    state: State, batches: Iterator, division: Division
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One optimiser step on this process's share of the batch, in passes whose gradients are
    accumulated and, in the last, averaged over processes.

    `batches` yields (images, labels) of each pass, on the device. Returns this process's part of
    the mean losses (1 + R,), sum and branches, and what `State.update` does."""
    first = state.step * state.recipe.batch_size + division.offset
    total = 0
    for k in range(division.passes):
        images, labels = next(batches)
        last = k == division.passes - 1
        with contextlib.nullcontext() if last else parallel.no_sync(state.model):
            sums, branches = losses(state, images, labels, first + k * division.micro)
            loss = sums.sum() / division.share
            loss.backward(1 + 0 * loss.detach())  # one that is not finite makes every gradient NaN
        parts = torch.cat([sums.detach().sum()[None], branches.detach().sum(1)])
        total = total + parts / division.share
    return total, *state.update()


# ------------------------------------------------------------------------------------------ the run


@dataclasses.dataclass
class Run:
    """A run as it goes: what it is, what training changes, and whom that is told and shown.
    `measure`: what FID is watched with, or None; `keep`: see Saving; `record`: what its weights
    files say besides the network; `skipped`: what is said of images left out."""

    out: Path
    plan: Plan
    source: Source
    state: State
    log: journal.Journal
    measure: Callable | None
    keep: int

    def __post_init__(self):
        self.lock = contextlib.ExitStack()  # of a run folder that was made again
        self.place = None  # of the run folder, on rank 0
        if parallel.is_main():
            self.place = storage.Place(self.out)
        self.record = weights_record(self.plan.data, self.plan.recipe)
        self.first = self.state.step
        self.estimated = False
        self.skipped = set()
        self.bar = None
        self.writing = background.Background()
        self.copies = background.Copies()

    @property
    def at_end(self):
        return self.state.step == self.state.recipe.steps

    def follow(self):
        """Go where the run folder has been moved to; make it again where it is gone."""
        if not parallel.is_main():
            return
        place = self.place.now()
        if place == self.out:
            return
        if place is None:
            self.log.say(
                f"WARNING: {self.out} is gone; it is made again, without what was in it before"
            )
            self.lock.enter_context(storage.locked(self.out))
            write_json(self.out / "config.json", self.plan.record)
            self.place = storage.Place(self.out)
        else:
            self.log.say(f"WARNING: {self.out} has been moved to {place}; training goes on there")
            self.out = place
            self.log.path = place / "metrics.jsonl"

    def tell(self):
        """Read the losses from the device and write them down; once, say how long it will take."""
        self.bar.set_postfix(self.log.flush(), refresh=False)
        known = self.state.step - self.first >= 2 * LOG_EVERY
        if known and not self.estimated and not self.at_end:
            self.log.say(expectation(self.state, self.log))
            self.estimated = True

    def measure_fid(self):
        with doing(self.bar, "measuring FID"):
            self.log.remark(lambda: self.measure(self.generator()))

    def validate(self):
        with doing(self.bar, "validating"):
            self.log.remark(self._validate)

    def _validate(self):
        found, bad = validation.measure(
            self.state, self.plan.held_out, workers=self.source.workers, on_bad=self.source.on_bad
        )
        self.skipped |= bad
        return found

    def generator(self):
        """Draws images with the EMA's weights as they are now."""
        model = networks.from_config(self.plan.config, self.state.ema).requires_grad_(False)
        return sampling.Generator(
            model,
            self.state.device,
            self.state.recipe.precision,
            self.record["classes"],
            str(self.out),
            "",
            self.record,
            vae_source=self.record.get("vae"),
        )

    def save(self, must):
        """Write a checkpoint, and before it the metrics up to it, on rank 0. Training waits for a
        copy of it alone, which is written meanwhile; if that fails it is reported. The last, which
        `must` succeed, is waited for, and raises OSError."""
        if parallel.is_main():
            files = self.state.files(self.record)
            step = self.state.step
            self.writing.wait()
            if must:
                self.log.write(sync=True)
                self._write(step, files)
            else:
                self._write_meanwhile(step, files)
        self.log.restart_clock()

    def _write(self, step, files):
        runfolder.save_checkpoint(self.out, step, files, {"step": step}, self.keep)

    def _write_meanwhile(self, step, files):
        def work():
            with self.reporting(step):
                self._write(step, copies)

        with self.reporting(step):
            self.log.write(sync=True)
            try:
                copies = self.copies.of(files)
            except MemoryError:
                self.copies = background.Copies()
                self.log.say(f"no memory for a copy of step {step}: training waits for its writing")
                self._write(step, files)
            else:
                self.writing.start(work)

    @contextlib.contextmanager
    def reporting(self, step):
        """Say that a checkpoint can't be written, instead of ending the run."""
        try:
            yield
        except OSError as error:
            self.warn(f"checkpoint at step {step} NOT saved", error)

    def save_averages(self):
        """Write the averages' snapshots, on rank 0. One that fails is reported and training goes
        on."""
        step = self.state.step
        if parallel.is_main():
            try:
                averaging.save(
                    self.out,
                    self.state.averages,
                    config=self.plan.config,
                    step=step,
                    precision=self.state.recipe.ema_precision,
                    record=self.record,
                )
            except (OSError, UserError) as error:
                self.warn(f"averages at step {step} NOT saved", error)
        self.log.restart_clock()

    def warn(self, what, error):
        reason = getattr(error, "strerror", None) or error
        self.log.say(f"WARNING: {what} ({reason}); training goes on")

    def draw(self):
        """A grid from fixed seeds with the EMA's weights, on rank 0. Without the VAE there is no
        picture, said and no more."""
        with doing(self.bar, "drawing samples"):
            if parallel.is_main():
                self._draw()
        self.log.restart_clock()

    def _draw(self):
        config = self.plan.config
        counts = GRID_ON_CPU if self.state.device.type == "cpu" else GRID
        count = counts[config.space]
        classes = [i % config.num_classes for i in range(count)]
        captions = []
        for seed, index in enumerate(classes):
            captions.append(sampling.caption(self.record["classes"][index], index, seed))
        path = self.out / "samples" / f"step-{self.state.step:07d}.png"
        with self.log.aside(f"no sample grid at step {self.state.step}"):
            images = self.generator().images(classes, range(count))
            sampling.save_grid(path, images, captions)
            imagesets.save_strip(path.parent, captions, count)
            self.log.picture(path)

    def finish(self):
        """Draw the curves, and say on every process's behalf which images were left out."""
        self.skipped = sorted(set().union(*parallel.gather(self.skipped)))
        if parallel.is_main():
            with self.log.aside("no loss.png"):
                journal.plot(self.out)
        for message in self.skipped:
            self.log.say(f"skipped {message}")
        self.log.close()
        self.lock.close()

    def summary(self, stopped, begun):
        """What `train` returns."""
        state = self.state
        return {
            "out": str(self.out),
            "step": state.step,
            "steps": state.recipe.steps,
            "stopped": stopped,
            "loss": self.log.last.get("loss"),
            "params": sum(p.numel() for p in state.parameters.values()),
            "seconds": round(time.monotonic() - begun, 1),
            "skipped_steps": self.log.bad,
            "skipped_images": len(self.skipped),
            "peak_bytes": parallel.peak_memory(state.device),
        }


# ------------------------------------------------------------------------------------------ the job


def train(
    out: str | Path,
    source: Source = Source(),  # noqa: B008 (frozen)
    *,
    variant: str | None = None,
    recipe: dict | None = None,
    network: dict | None = None,
    init: str | Path | None = None,
    kind: str | None = None,
    device: str = "auto",
    saving: Saving = Saving(),  # noqa: B008 (frozen)
    watch: Watch | None = None,
    validate: Validation = Validation(),  # noqa: B008 (frozen)
    sinks: Sequence[journal.Sink] = (),
    quiet: bool = False,
    force: bool = False,
) -> dict:
    """Train into the run folder `out`, or go on from its newest whole checkpoint.

    `variant`: a key of VARIANTS (None: what defaults.py makes of the data); `recipe` and `network`:
    what to change of its Recipe and Config, as dicts; `init`: weights to start from (name, path or
    run), whose recipe is taken over, of the `kind` that their file doesn't tell; `watch`: a Watch,
    or None; `validate`: the held-out images; `sinks`: see journal.Sink; `force`: whether
    MAY_BE_FORCED may change. A resumed run takes whatever is not given from its config.json.

    Returns a summary; `stopped` names the reason if the run is not at its end. Raises UserError."""
    begun = time.monotonic()
    out = Path(out)
    say = journal.speaker(quiet)
    changes = {"recipe": recipe, "network": network, "init": init, "kind": kind, "force": force}
    with contextlib.ExitStack() as stack:
        exact = is_deterministic(out, recipe)
        stack.enter_context(parallel.deterministic() if exact else parallel.measured_kernels())
        device = parallel.pick_device(device)
        plan = make_plan(out, source, validate, variant=variant, device=device, **changes)
        division = divide(plan.recipe.batch_size, plan.recipe.micro_batch)
        check_memory(plan, division, device)
        extractor = feature_extractor(watch, device)
        parallel.start(device, minutes=parallel.DAY if source.verify else 30)
        if parallel.is_main():
            stack.enter_context(storage.locked(out))
            if source.verify:
                verify_data(plan, say, quiet)
        state = begin(out, plan, device, say)
        for line in introduction(out, plan, state, division):
            say(line)
        log = journal.Journal(out, state, say, record_start(out, plan, state, say), sinks)
        measure = watch and watch_fid(out, plan, extractor, watch)
        run = Run(out, plan, source, state, log, measure, keep=saving.keep)
        stack.enter_context(run.writing)
        state.start(division.micro)
        batches = read_ahead(run, division)
        run.bar = stack.enter_context(progress(out, state, quiet))
        stop = stack.enter_context(Stop(begun + (saving.max_time or math.inf)))
        stopped = loop(run, batches, division, timetable(saving, watch, plan), stop)
        run.finish()
        return run.summary(stopped, begun)


def check_memory(plan, division, device):
    """Raise UserError if a run can't fit into memory, by the least that it takes."""
    parameters = sum(p.numel() for p in networks.blank(plan.config).parameters())
    activations = division.micro * networks.least_bytes(plan.config, training=True)
    parallel.check_memory(
        memory.STATE * parameters + activations,
        f"training {parameters:,} parameters on {division.micro:,} images at once",
        "give a smaller --micro-batch (or --batch-size), or a smaller network",
        device,
    )


def verify_data(plan, say, quiet):
    """Read all of a run's data and compare them with what is known of their contents, which is
    noted from then on. Raises UserError where they differ."""
    known = plan.record["data"]
    before = known["content"]
    known["content"] = plan.data.verify(before, quiet)
    if known["content"] and not before:
        say("contents of all data noted: from here on --verify-data compares with these")
    else:
        say("contents of all data are as they were")


def loop(run, batches, division, times, stop):
    """Train to the end of the run, or until told to stop: returns why, or None."""
    stopped = None
    while not run.at_end and not stopped:
        run.log.add(*train_step(run.state, batches, division))
        run.bar.update()
        if not run.at_end:
            stopped = parallel.first(stop.reason)
        due = due_now(times, run, stopped)
        if due:
            run.follow()
        if "measure" in due:
            run.measure_fid()
        if "validate" in due:
            run.validate()
        if "log" in due:
            run.tell()
        if "snapshot" in due:
            run.save_averages()
        if "save" in due:
            run.save(must=run.at_end or stopped)
        if "draw" in due:
            run.draw()
    return stopped


def timetable(saving, watch, plan):
    """Steps between what is done beside training: name → steps, or None for never."""
    recipe = plan.recipe
    every = saving.every or max(1, min(5000, recipe.steps // 4))
    validate_every = None
    if plan.held_out:
        validate_every = plan.record["validation"]["every"] or every
    return {
        "measure": watch and watch.every,
        "validate": validate_every,
        "snapshot": recipe.ema_every if recipe.ema_profiles else None,
        "save": every,
        "draw": every if saving.sample_every is None else saving.sample_every,
    }


def due_now(times, run, stopped):
    """Names of what is to be done after the step that was taken; after the last step, all."""
    due = set()
    for name, every in times.items():
        if every and (run.at_end or run.state.step % every == 0):
            due.add(name)
    if stopped:
        due.add("save")
    if due - {"draw"} or run.state.step % LOG_EVERY == 0:
        due.add("log")
    return due


def feature_extractor(watch, device):
    """What FID is to be watched with, or None. Raises UserError."""
    if not watch:
        return None
    import extraction

    if watch.features:
        return extraction.custom(watch.features, device)
    return extraction.inception(watch.inception, device)


def watch_fid(out, plan, extractor, watch):
    """A function from a Generator to what is noted of it in metrics.jsonl. Raises UserError."""
    import evaluation

    return evaluation.watch(
        out,
        plan.config,
        plan.data.classes,
        extractor=extractor,
        count=watch.images,
        ref=watch.ref,
    )


def begin(out: Path, plan: Plan, device: torch.device, say: Callable) -> State:
    """The state that a run goes on from: its newest whole checkpoint, else the initial weights,
    else fresh ones."""
    say(plan.data.words)
    if not plan.data.flips:
        say("these latents are of the images alone: training goes without flips")
    newest = runfolder.newest_whole(out) if parallel.is_main() else None
    checkpoint = parallel.broadcast(newest)
    if checkpoint:  # a config.json that was changed may ask for any amount of memory
        check_network(dict(networks.blank(plan.config).named_parameters()), checkpoint)
    state = State(new_network(plan.config, plan.recipe.seed), plan.recipe, device)
    if checkpoint:
        state.load(checkpoint)
        check_ahead(out, state)
        say(f"going on from {checkpoint}")
    elif plan.initial:
        fresh = state.take(plan.initial, plan.data.classes)
        for line in inheritance(state, plan, *fresh):
            say(line)
    if networks.kind(plan.config) == "dit":
        say("DiT's learned variance is not trained here: of its output the noise alone")
    idle = parallel.idle_gpus(device)
    if idle:
        say(
            f"{idle} GPUs of this machine stay idle; to use all: torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} -m cli train …"
        )
    return state


def check_ahead(out, state):
    """Raise UserError if a run has gone further than it is to go."""
    steps = state.recipe.steps
    if state.step > steps:
        raise UserError(
            f"{out} is at step {state.step:,} already, beyond --steps {steps:,}; give more, leave "
            "it as it is, or choose another --out"
        )


def inheritance(state, plan, tensors, classes):
    """Lines that say what came from the initial weights: all but `tensors` and `classes`."""
    taken = len(state.parameters) - len(tensors)
    fresh = ", ".join(tensors) or "none"
    yield f"starting from {plan.initial.source}: {taken} tensors taken; fresh: {fresh}"
    kept = [name for name in plan.data.classes if name not in classes]
    too = ""
    if state.network.config.null_class and NULL_CLASS not in classes:
        too = " and the null class"
    fresh = in_short(classes) or "none"
    yield f"class embeddings: {len(kept):,} taken by name{too}; fresh: {fresh}"
    if plan.initial.recipe:
        yield "its recipe is taken over where no option says otherwise"
    else:
        yield "its recipe is not known"


def in_short(names, most=10):
    """Comma-separated names; of many, the first and how many there are."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])}, … ({len(names):,} in all)"


def introduction(out, plan, state, division):
    """Lines that say what is about to be trained on what, where and how."""
    data = plan.data
    config = plan.config
    recipe = plan.recipe
    items = "images" if data.kind == "pixels" else data.kind
    yield (
        f"data     {len(data):,} {items} of {len(data.classes):,} classes, {config.channels}×"
        f"{config.size}×{config.size}, {plan.record['data']['path']}"
    )
    parameters = sum(p.numel() for p in state.parameters.values())
    yield (
        f"network  {plan.record['variant']}: {recipes.shape_words(config)}; {parameters:,} "
        f"parameters, {sum(config.macs) / 1e9:,.4f} GMAC an image"
    )
    if plan.held_out:
        yield f"held out {len(plan.held_out):,} {items}, {plan.record['validation']['path']}"
    yield f"recipe   {plan.chosen}: {recipes.recipe_words(recipe)}"
    yield (
        f"         {recipe.steps:,} steps of batch {recipe.batch_size:,} = processes "
        f"{parallel.world_size()} × passes {division.passes} × micro-batch {division.micro:,}"
    )
    yield from recipes.warnings_of(recipe)
    yield from recipes.outgrown(plan)
    compiled = ", compiled" if recipe.compile else ""
    threads = ""
    if state.device.type == "cpu":
        threads = f", threads {torch.get_num_threads()}"
    yield f"device   {state.device}, {recipe.precision}{compiled}{threads}"
    if threads and parallel.is_busy():
        yield (
            "         this machine has more to do than cores: threads wait for each other, and "
            "OMP_NUM_THREADS=1 may be many times faster"
        )
    begun = f"goes on from step {state.step:,}" if state.step else "a new run"
    yield f"run      {out}: {begun}; config.json keeps all this"
    for name, (before, now) in plan.changed.items():
        yield f"         {name} is {now} from here on, it was {before} (--force)"


def expectation(state, log):
    """How long the rest of a run is likely to take."""
    left = (state.recipe.steps - state.step) * state.recipe.batch_size
    speed = log.last["images_per_second"]
    return f"about {duration(left / speed)} to the end, at {speed:,.1f} images a second"


def duration(seconds):
    """In the unit that fits."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def record_start(out, plan, state, say):
    """Write config.json and cut metrics.jsonl and the averages' snapshots back to the state's step,
    on rank 0. Returns the last line of metrics.jsonl that stays, or {}."""
    if not parallel.is_main():
        return {}
    beyond = averaging.cut(out, state.step)
    if beyond:
        say(f"{len(beyond)} snapshots of averages beyond step {state.step} deleted")
    if plan.recipe.ema_profiles:
        say(averages_line(out, state))
    start = {
        "processes": parallel.world_size(),
        "device": str(state.device),
        "versions": versions(),
        "command": sys.argv,
    }
    history = plan.record.get("history", [])
    if plan.changed:
        history = [*history, {"step": state.step, "changed": plan.changed}]
        start["history"] = history
    plan.record.update(start)
    write_json(out / "config.json", plan.record)
    return journal.truncate_metrics(out, state.step)


def averages_line(out, state):
    """What the snapshots of a whole run take, for people."""
    recipe = state.recipe
    count = math.ceil(recipe.steps / recipe.ema_every) * len(recipe.ema_profiles)
    value = averages.PRECISIONS[recipe.ema_precision].itemsize
    size = count * value * sum(p.numel() for p in state.parameters.values())
    widths = ", ".join(str(width) for width in recipe.ema_profiles)
    return (
        f"averages of widths {widths}: snapshots every {recipe.ema_every:,} steps, {count} in all, "
        f"{storage.size_text(size)} in {recipe.ema_precision} -> {averaging.folder(out)}"
    )


def read_ahead(run, division):
    """Yield (images, labels) on the device for each pass from the run's step to its end."""
    data, state, recipe = run.plan.data, run.state, run.plan.recipe
    source = run.source
    order = randomness.Order(len(data), recipe.seed)

    def positions():
        for step in range(state.step, recipe.steps):
            first = step * recipe.batch_size + division.offset
            for k in range(division.passes):
                yield first + k * division.micro

    def reads():
        for first in positions():
            indices, flips = order(first, first + division.micro)
            yield indices, flips & recipe.flip

    pin = state.device.type == "cuda"
    batches = dataset.loader(data, reads(), source.workers, on_bad=source.on_bad, pin=pin)
    batches = dataset.naming_the_way_out(batches)
    for images, labels, bad in batches:
        run.skipped.update(bad)
        yield (
            images.to(state.device, non_blocking=True),
            labels.to(state.device, non_blocking=True),
        )


def progress(out, state, quiet):
    """A progress bar over the run's steps."""
    return tqdm(
        total=state.recipe.steps,
        initial=state.step,
        unit="step",
        desc=out.name,
        disable=quiet or not parallel.is_main(),
        file=journal.Lenient(sys.stderr),
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


@contextlib.contextmanager
def doing(bar, what):
    """Say in the bar what is being done while it stands still."""
    figures = getattr(bar, "postfix", None) or ""  # a bar that isn't shown has none
    bar.set_postfix_str(what)
    yield
    bar.set_postfix_str(figures, refresh=False)


class Stop(contextlib.AbstractContextManager):
    """Remembers the first of the signals to stop as `reason`, so that the loop can finish its step
    and save; "max-time" from the time `end` of the monotonic clock on. A second SIGINT ends at
    once."""

    def __init__(self, end=math.inf):
        self.end = end
        self.signal = None
        self.interrupted = False

    def __enter__(self):
        self.before = {n: signal.signal(n, self.note) for n in dataset.STOPS}
        return self

    def note(self, number, frame):
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None and parallel.is_main():
            with contextlib.suppress(OSError):
                os.write(2, STOPPING)  # print might be in the middle of another line
        self.interrupted |= number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number).name

    @property
    def reason(self):
        if self.signal is None and time.monotonic() > self.end:
            return "max-time"
        return self.signal

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def versions():
    return {
        "dimr": VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
