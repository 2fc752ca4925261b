"""Sampling: load weights, draw images, save them. From Python:

    import sampling
    generator = sampling.load("runs/demo")                 # a run, a weights file or a name
    images = generator.images(classes=[3] * 16, seeds=range(16), cfg=1.5)      # uint8 (16, H, W, C)
    sampling.save_grid("threes.png", images)

An image is made of its class and its own seed. Its start noise is drawn on the CPU from that seed
alone, so neither batch size, nor number of processes, nor what else is drawn changes it."""

import ours

import dataclasses
import difflib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import averaging
import diffusion
import downloads
import imagesets
import networks
import parallel
import pictures
import randomness
import runfolder
import solver
import space
import vae
from imagesets import caption, save_grid  # noqa: F401 (for those who draw and look, see above)
from storage import VERSION, UserError, sha256

ROOT = Path("samples")
MOST = 10_000_000  # images of a call
VAE = "sd-vae-ft-ema"  # of latent models that name none
SHIPPED = "fashion"  # the network that comes with dimr
GUIDANCE = ("cfg", "cfg_power", "cfg_interval", "cfg_channels")  # fields of Settings

# also of parts of an image
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
VAE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
FILM = (12, 8)  # predictions and images that a film shows at most
FRAME = 120  # milliseconds
BATCH_SIZE = {"cuda": 64, "mps": 16, "cpu": 16}
BALANCED, RANDOM = LABELS = ("balanced", "random")  # how the classes of a set are chosen


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are drawn. None takes the default: where nothing is said of guidance, what the
    weights advise (`Generator.advised`), else 1.5 where the network has a null
    class and no guide, else 1 (none); `guide_scale` 1.5 where there is a guide; the preset's
    `solver`, `grid` and `steps` (NFE)."""

    cfg: float | None = None
    cfg_power: float | None = None
    cfg_interval: tuple[float, float] | None = None
    cfg_channels: int | None = None
    guide_scale: float | None = None
    preset: str = "everyday"
    solver: str | None = None
    grid: str | None = None
    steps: int | None = None

    def resolved(self, config: networks.Config, guided: bool = False) -> "Settings":
        """These settings with every default filled in for a network of `config`, that has a guide
        or not. Raises UserError if they can't work."""
        solver_name, grid, steps = space.preset(self.preset, config)
        if solver.SOLVERS[self.solver or solver_name].times:
            grid = space.OWN
        elif grid == space.OWN:
            grid = "time"
        default = {
            "cfg": 1.5 if config.null_class and not guided else 1.0,
            "guide_scale": 1.5 if guided else None,
            "solver": solver_name,
            "grid": grid,
            "steps": steps,
        }
        unset = {name: value for name, value in default.items() if getattr(self, name) is None}
        full = dataclasses.replace(self, **unset)
        try:
            _ = full.guidance
            if full.guide_scale is not None:
                diffusion.Guide(None, full.guide_scale)
            if full.guide_scale is not None and not guided:
                raise ValueError(
                    "a guide scale needs a guide; give --guide WEIGHTS, such as RUN@STEP of the "
                    "same run, or leave out --guide-scale"
                )
            if full.cfg > 1 and not config.null_class:
                raise ValueError(
                    f"guidance {full.cfg:g} needs a null class and this network has none; use "
                    "--cfg 1, or train with --label-dropout 0.1"
                )
            if (full.cfg_channels or 1) > config.channels:
                raise ValueError(
                    f"guidance of {full.cfg_channels} channels: this network has "
                    f"{config.channels}; give --cfg-channels 1 to {config.channels}, or none for "
                    "all"
                )
            if full.steps < 1:
                raise ValueError(f"steps {full.steps} is not at least 1")
            check_solver(full, config)
        except ValueError as error:
            raise UserError(str(error)) from None
        return full

    @property
    def guidance(self) -> diffusion.Guidance:
        """Raises ValueError for values that make no sense."""
        return diffusion.Guidance(
            self.cfg, self.cfg_power, self.cfg_interval, channels=self.cfg_channels
        )


def guidance_words(settings: Mapping) -> str:
    """The scale, and between which noise levels, of Settings as a dict."""
    words = f"cfg {settings['cfg']:g}"
    if settings.get("cfg_interval"):
        low, high = settings["cfg_interval"]
        words += f" within {low:g} to {high:g}"
    return words


def check_solver(settings: Settings, config: networks.Config) -> None:
    """Raise ValueError where the solver can't take these steps, this grid or this network."""
    row = solver.SOLVERS[settings.solver]
    row.updates(settings.steps)
    if row.times and settings.grid != space.OWN:
        raise ValueError(f"solver {settings.solver} lays its times itself; leave out --grid")
    if row.learned_variance and not networks.has_variance(config):
        raise ValueError(
            f"solver {settings.solver} takes a learned variance, which this network of kind "
            f"{networks.kind(config)} does not have (the released DiT has); use another --solver, "
            "such as ancestral"
        )


def solve(
    model: networks.Network,
    classes: Sequence[int],
    seeds: Sequence[int],
    settings: Settings,
    *,
    device: torch.device,
    precision: str = "fp32",
    guide: networks.Network | None = None,
    callback: Callable | None = None,
    note: Callable | None = None,
) -> torch.Tensor:
    """Samples (B, C, H, W) in the network's space, float32, for equally long `classes` and `seeds`;
    `settings` are resolved. `guide`: a network to guide away from; `callback`: see solver.sample;
    `note(x0)` is told what each evaluation predicts."""
    config = model.config
    schedule = diffusion.SCHEDULES[config.noise_schedule]()
    row = solver.SOLVERS[settings.solver]
    in_lam = row.in_lam or settings.grid == "logsnr"
    start, end = diffusion.span(schedule, config.objective, in_lam)
    shape = (config.channels, config.size, config.size)

    def draw(update):
        return torch.stack([randomness.step_noise(shape, seed, update) for seed in seeds]).to(
            device
        )

    y = torch.tensor(classes, device=device)
    x = torch.stack([randomness.start_noise(shape, seed) for seed in seeds]).to(device)
    push = guide and diffusion.Guide(guide, settings.guide_scale)
    denoise = diffusion.denoiser(
        model, schedule, y, settings.guidance, row.learned_variance, guide=push
    )
    if note:
        denoise = noting(denoise, note)
    with torch.inference_mode(), parallel.autocast(device, precision):
        return solver.sample(
            denoise,
            x,
            schedule,
            settings.steps,
            settings.solver,
            settings.grid,
            start=start,
            end=end,
            draw=draw,
            callback=callback,
        )


def noting(denoise, note):
    """`denoise`, telling `note` the x_0 of each of its predictions."""

    def function(x, t):
        found = denoise(x, t)
        note(found[0])
        return found

    return function


@dataclasses.dataclass
class Generator:
    """A loaded network and what it takes to draw images with it."""

    model: networks.Network
    device: torch.device
    precision: str
    classes: list  # names; may be empty
    source: str  # what it was loaded from
    hash: str  # SHA-256 of the weights file, or of the tensors where there is none
    record: dict  # what the weights say of how they were made
    vae: object = None  # loaded on first use
    vae_source: object = None
    compiled: bool = False
    guide: "Generator | None" = None  # whose network it is guided away from

    @property
    def config(self) -> networks.Config:
        return self.model.config

    @property
    def pixels(self) -> int:
        """Side of its images."""
        return space.side(self.config)

    @property
    def name(self) -> str:
        """A short name for folders: the run's, or the file's."""
        path = Path(self.source)
        if "ema_width" in self.record and path.parent.name == "averages":
            return f"{path.parents[1].name}-ema{self.record['ema_width']:g}"
        if path.parent.parent.name == "checkpoints":
            raw = "-raw" if path.stem == "weights" else ""
            return path.parents[2].name + raw
        return path.stem

    @property
    def vae_precision(self) -> str:
        """In which the VAE decodes: "fp16" as in the released pipeline where the network computes
        in bf16 on a GPU (bf16 has three bits less), else "fp32"."""
        if self.device.type == "cuda" and self.precision == "bf16":
            return "fp16"
        return "fp32"

    def advised(self, settings: Settings) -> dict:
        """The guidance that the weights themselves say is best, as fields of Settings: none of it
        where `settings` say anything of guidance, or where there is a guide."""
        if self.guide is not None or any(getattr(settings, name) is not None for name in GUIDANCE):
            return {}
        advice = self.record.get("guidance")
        if not advice:
            return {}
        interval = advice.get("cfg_interval")
        return {"cfg": advice["cfg"], "cfg_interval": interval and tuple(interval)}

    def resolved(self, settings: Settings, advice: bool = True) -> Settings:
        """`settings` with every default filled in, `advised` ones first, if `advice` is wanted.
        Raises UserError if they can't work."""
        if advice:
            settings = dataclasses.replace(settings, **self.advised(settings))
        return settings.resolved(self.config, guided=self.guide is not None)

    def decode(self, x: torch.Tensor) -> np.ndarray:
        """Images uint8 (B, H, W, C) of samples in the network's space."""
        with torch.inference_mode(), parallel.autocast(self.device, self.precision):
            return space.to_uint8(space.of(self.config).images(x, self._decoder))

    def _decoder(self, z):
        if self.vae is None:
            self.vae = self._load_vae()
        images = self.vae.decode(z)
        if self.vae_precision == "fp16" and not images.isfinite().all():
            raise UserError(
                "the VAE gives values beyond half precision for these latents; use --precision fp32"
            )
        return images

    def _load_vae(self):
        if not self.vae_source:
            downloads.ask(VAE)
        path = downloads.find(self.vae_source or VAE)
        expected = self.record.get("vae_sha256")
        if self.vae_source == self.record.get("vae") and expected and sha256(path) != expected:
            raise UserError(
                f"{path} is not the VAE this network was trained with; give that one with --vae"
            )
        try:
            loaded = vae.load(path, self.device, VAE_DTYPES[self.vae_precision])
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.compiled and self.device.type == "cuda":
            loaded.decoder.compile(dynamic=False)  # its norms change the layout, if not fused
        return loaded

    def batches(
        self,
        classes: Sequence[int],
        seeds: Sequence[int],
        settings: Settings,
        batch_size: int,
        chosen: Iterable[int] | None = None,
        progress: tqdm | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Yield (indices, uint8 images) for each batch of `batch_size`, the last one padded so that
        an image's bytes never depend on how many are drawn. `chosen`: which batches, by number
        (default: all)."""
        if chosen is None:
            chosen = range(math.ceil(len(seeds) / batch_size))
        for number in chosen:
            first = number * batch_size
            indices = list(range(first, min(first + batch_size, len(seeds))))
            padded = indices + indices[-1:] * (batch_size - len(indices))
            x = solve(
                self.model,
                [classes[i] for i in padded],
                [seeds[i] for i in padded],
                settings,
                device=self.device,
                precision=self.precision,
                guide=self.guide and self.guide.model,
                callback=_advance(progress, len(indices), settings.steps),
            )
            yield indices, self.decode(x)[: len(indices)]

    def images(
        self,
        classes: Iterable[int | str],
        seeds: Iterable[int],
        batch_size: int | None = None,
        **settings,
    ) -> np.ndarray:
        """uint8 (N, H, W, C) images for N classes, by index or by name, and N seeds; keywords as in
        `Settings`. Raises UserError."""
        classes = [class_index(one, self) if isinstance(one, str) else one for one in classes]
        seeds = list(seeds)
        check_classes(classes, self.config)
        check_seeds(seeds)
        if len(classes) != len(seeds):
            raise UserError(
                f"{len(classes)} classes for {len(seeds)} seeds; give one class per seed"
            )
        settings = self.resolved(Settings(**settings))
        size = batch_size or min(len(seeds), BATCH_SIZE[self.device.type])
        return np.concatenate(
            [images for _, images in self.batches(classes, seeds, settings, size)]
        )


def _advance(progress, count, steps):
    """A solver's callback that moves the bar by parts of `count` images."""
    if progress is None:
        return None
    base = progress.n

    def callback(evaluations, _):
        progress.update(base + count * evaluations / steps - progress.n)

    return callback


def check_classes(classes: Iterable[int], config: networks.Config) -> None:
    wrong = [c for c in classes if not 0 <= c < config.num_classes]
    if wrong:
        raise UserError(
            f"class {wrong[0]} is out of range; this network knows classes 0 to "
            f"{config.num_classes - 1}"
        )


def choose_classes(labels: str, seeds: Sequence[int], config: networks.Config) -> list[int]:
    """The class of each image of a set for measuring: every class in turn ("balanced"), at random
    from the image's own seed, as EDM2 and guided-diffusion draw them ("random"), or as a file says
    (imagesets.read_labels). Raises UserError."""
    if labels == BALANCED:
        return [i % config.num_classes for i in range(len(seeds))]
    if labels == RANDOM:
        return [randomness.label(seed, config.num_classes) for seed in seeds]
    classes = imagesets.read_labels(labels).tolist()
    if len(classes) != len(seeds):
        raise UserError(
            f"{labels} holds {len(classes):,} labels for {len(seeds):,} images; give -n "
            f"{len(classes)}, or a file of {len(seeds):,}"
        )
    wrong = [i for i, one in enumerate(classes) if not 0 <= one < config.num_classes]
    if wrong:
        raise UserError(
            f"{labels}: label {classes[wrong[0]]} of image {wrong[0]} is out of range; this "
            f"network knows classes 0 to {config.num_classes - 1}"
        )
    return classes


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise UserError for seeds that are out of range, or more than a call draws."""
    if not len(seeds):
        raise UserError("no seeds: nothing is to be drawn; give one seed or more")
    if len(seeds) > MOST:
        raise UserError(
            f"{len(seeds):,} images are more than one call draws ({MOST:,}); draw them in several, "
            "with --seed from where the last one ended"
        )
    try:
        randomness.check_seeds(seeds)
    except ValueError as error:
        raise UserError(f"{error}; choose others") from None


def check_batch(batch_size: int, config: networks.Config, device: torch.device) -> None:
    """Raise UserError if so many images at once can't fit into memory."""
    each = networks.least_bytes(config)
    parallel.check_memory(
        batch_size * each,
        f"drawing {batch_size:,} images at once",
        "give a smaller --batch-size",
        device,
    )


def class_index(name: str, generator: Generator) -> int:
    """The class that `name` means: an index, a name the weights carry, or an ImageNet name where
    they know 1000 classes without names. Raises UserError."""
    if name.isdecimal():
        check_classes([int(name)], generator.config)
        return int(name)
    lowered = [known.lower() for known in generator.classes]
    if name.lower() in lowered:
        return lowered.index(name.lower())
    if generator.config.num_classes == 1000:
        import imagenet_names

        return imagenet_names.find(name)
    advice = f"use an index from 0 to {generator.config.num_classes - 1}"
    near = near_names(name, generator.classes)
    if near:
        advice = f"near it: {', '.join(near)}; or {advice}"
    elif generator.classes:
        advice += f" or a name such as {', '.join(generator.classes[:10])}"
    raise UserError(f"class {name!r} is not known to {generator.source}; {advice}")


def near_names(name: str, known: Sequence[str], most: int = 5) -> list[str]:
    """Those of `known` that contain `name`, else those that are written like it."""
    lowered = {one.lower(): one for one in known}
    near = [one for one in lowered if name.lower() in one]
    near = near or difflib.get_close_matches(name.lower(), lowered, most)
    return [lowered[one] for one in near[:most]]


def at_hand() -> str | None:
    """The name of the network that comes with dimr, where there is nothing else to draw from: no
    run, and the released network not fetched. Otherwise None."""
    if runfolder.newest() or downloads.place(runfolder.RELEASED).is_file():
        return None
    return SHIPPED


def load(
    source: str | Path | None = None,
    ema: bool = True,
    device: str = "auto",
    precision: str | None = None,
    vae: str | Path | None = None,
    kind: str | None = None,
    heads: int | None = None,
    compiled: bool = False,
    ema_width: float | None = None,
    guide: str | Path | None = None,
) -> Generator:
    """A Generator from a run folder, a weights file,
    or a name; None takes the newest run under runs/, else the released xl2r. `vae`: name or path,
    for latent models. `ema_width`: the average of that width at the end of the run, which is made
    in memory of the run's snapshots (averaging.py). `kind` and `heads`: what a
    file of others' doesn't tell (runfolder.read_weights). `guide`: weights to be guided away from
    (diffusion.Guide), as `source` names them. Raises UserError."""
    device = parallel.pick_device(device)
    if ema_width is None:
        path = runfolder.find_weights(source, ema)
        model, record = runfolder.read_weights(path, heads, kind)
        content = sha256(path)
        if downloads.ships(source) and path == downloads.place(source):
            path = source  # wherever the tool lies
    else:
        made = averaging.rebuild(averaging.find_run(source), ema_width)
        path, model, record = made.place, made.model, made.record
        content = averaging.digest(model.state_dict())
    if precision is None:
        precision = "bf16" if device.type == "cuda" else "fp32"
    generator = Generator(
        parallel.for_inference(model.to(device), precision, compiled),
        device,
        precision,
        record.get("classes", []),
        str(path),
        content,
        record,
        vae_source=vae or record.get("vae"),
        compiled=compiled,
    )
    if guide is not None:
        alone = not runfolder.run_and_step(guide)[0].is_dir()  # then there are no raw ones
        generator.guide = load(
            guide, ema or alone, str(device), precision, kind=kind, heads=heads, compiled=compiled
        )
        check_guide(generator)
    return generator


def check_guide(generator: Generator) -> None:
    """Raise UserError where a Generator's guide can't guide it."""
    guide = generator.guide
    if guide.hash == generator.hash:
        raise UserError(
            f"{guide.source} would be its own guide, which changes nothing; give an earlier step "
            "(RUN@STEP) or a smaller network"
        )
    for what in ("space", "channels", "size", "num_classes"):
        own, theirs = getattr(generator.config, what), getattr(guide.config, what)
        if own != theirs:
            raise UserError(
                f"guide {guide.source} has {what} {theirs}, and {generator.source} has {own}; "
                "give a guide that draws the same images of the same classes"
            )
    if generator.classes and guide.classes and generator.classes != guide.classes:
        raise UserError(
            f"guide {guide.source} and {generator.source} know other classes by the same numbers; "
            "give a guide of the same classes in the same order"
        )


# ------------------------------------------------------------------------------------------ the job


def describe(generator: Generator, settings: Settings) -> dict:
    """What an image's metadata says of how it was made, besides its class and seed."""
    record = {
        "weights": generator.hash,
        "source": generator.source,
        "step": generator.record.get("step"),
        "num_classes": generator.config.num_classes,
        **dataclasses.asdict(settings),
        "precision": generator.precision,
        "compiled": generator.compiled,
        "device": generator.device.type,
        "dimr": VERSION,
        "torch": torch.__version__,
    }
    if generator.config.space == "latent":
        record["vae_precision"] = generator.vae_precision
    if "ema_width" in generator.record:
        record["ema_width"] = generator.record["ema_width"]
    if generator.guide is None:
        del record["guide_scale"]  # sets without a guide are described as ever
    else:
        record |= {"guide": generator.guide.hash, "guide_source": generator.guide.source}
    return record


def sample(
    generator: Generator,
    classes: Sequence[int],
    seeds: Sequence[int],
    settings: Settings,
    *,
    out: str | Path | None = None,
    batch_size: int | None = None,
    npz: bool = False,
    labels: str | None = None,
    film: bool = False,
    quiet: bool = False,
) -> dict:
    """Draw image i of class classes[i] from seeds[i] and write PNGs and a labelled grid, or with
    `npz` one `.npz` as ADM's suite reads it (`arr_0` uint8 (N, H, W, 3), `arr_1` classes), streamed
    and resumable. `labels` says how the classes were chosen, where that was not by hand.

    `film` shows the first ones as they come about (`save_film`) beside the PNGs. Spread over
    processes by batches. Returns a dict that says what was written where and how fast.
    Raises UserError."""
    begun = time.monotonic()
    check_seeds(seeds)
    check_classes(sorted(set(classes)), generator.config)
    settings = generator.resolved(settings)
    out = Path(out or ROOT / folder_name(generator, settings))
    batch_size = batch_size or min(len(seeds), BATCH_SIZE[generator.device.type])
    check_batch(batch_size, generator.config, generator.device)
    drawing = imagesets.Drawing(
        classes=classes,
        seeds=seeds,
        names=generator.classes,
        size=generator.pixels,
        batch_size=batch_size,
        record=describe(generator, settings),
        labels=labels,
    )
    with imagesets.writer(out, drawing, npz) as target, sampling_bar(len(seeds), quiet) as bar:
        missing, mine = parallel.divide(drawing.batches, target.done)
        if missing:
            bar.total = min(len(mine) * drawing.batch_size, len(seeds))
        else:
            bar.update(len(seeds))
        batches = generator.batches(classes, seeds, settings, drawing.batch_size, mine, bar)
        for indices, images in batches:
            target.add(indices, images)
        parallel.barrier()
        if parallel.is_main():
            target.finish()
        parallel.barrier()
    films = {}
    if film and parallel.is_main():
        films = save_film(out, generator, drawing, settings)
    seconds = time.monotonic() - begun
    return {
        **target.result,
        **films,
        "n": len(seeds),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(seeds) / seconds, 3),
        "batch_size": drawing.batch_size,
        **drawing.record,
    }


def save_film(
    out: str | Path, generator: Generator, drawing: imagesets.Drawing, settings: Settings
) -> dict:
    """Show how the first images of a drawing come about: x_0 as it is predicted at evenly chosen
    evaluations of the network, then the image, as film.png (rows are images, columns evaluations)
    and film-animated.png, both in folder `out`. They are drawn once more for it. Returns the paths.
    """
    count = min(FILM[1], len(drawing.seeds))
    chosen = np.linspace(0, settings.steps - 1, min(settings.steps, FILM[0] - 1)).astype(int)
    frames = film_frames(
        generator, drawing.classes[:count], drawing.seeds[:count], settings, chosen
    )
    sheets = [(str(number), pictures.grid(images)) for number, images in frames]
    sheets[-1] = ("image", sheets[-1][1])
    strip = pictures.strip(sheets, drawing.captions(count), count)
    info = imagesets.png_info({"Description": imagesets.GENERATED})
    strip_name, animation_name = imagesets.FILM
    paths = {"film": Path(out) / strip_name, "animation": Path(out) / animation_name}
    pictures.save(strip, paths["film"], pnginfo=info)
    first, *others = [sheet for _, sheet in sheets]
    pictures.save(
        first,
        paths["animation"],
        pnginfo=info,
        save_all=True,
        append_images=[*others, *others[-1:] * 8],  # the image stays for a while
        duration=FRAME,
        loop=0,
    )
    return {name: str(path) for name, path in paths.items()}


def film_frames(generator, classes, seeds, settings, chosen):
    """(evaluations so far, uint8 images (N, H, W, C)) of the x_0 predicted at the `chosen` ones of
    a sampler's evaluations, counted from 0, and last of the sample."""
    predictions = []

    def note(x0):
        predictions.append(x0.float().cpu() if len(predictions) in chosen else None)

    x = solve(
        generator.model,
        classes,
        seeds,
        settings,
        device=generator.device,
        precision=generator.precision,
        guide=generator.guide and generator.guide.model,
        note=note,
    )
    frames = []
    for number in chosen:
        x0 = predictions[number].to(generator.device)
        frames.append((int(number) + 1, generator.decode(x0)))
    return [*frames, (settings.steps, generator.decode(x))]


def folder_name(generator: Generator, settings: Settings) -> str:
    """What tells sets apart that are drawn from the same run: the weights' step, guidance, solver
    and NFE."""
    words = [generator.name]
    if generator.record.get("step") is not None:
        words.append(f"step{generator.record['step']}")
    words.append(f"cfg{settings.cfg:g}")
    if settings.cfg_power:
        words.append(f"power{settings.cfg_power:g}")
    if settings.cfg_interval:
        low, high = settings.cfg_interval
        words.append(f"from{low:g}to{high:g}")
    if generator.guide is not None:
        words.append(f"guide{settings.guide_scale:g}")
    words += [settings.solver, f"{settings.steps}nfe"]
    return "-".join(words)


def sampling_bar(total: int, quiet: bool = False, what: str = "sampling") -> tqdm:
    """Shows how many of `total` images are drawn, parts of one counted, on rank 0."""
    silent = quiet or not parallel.is_main()
    return tqdm(
        total=total, desc=what, unit="img", bar_format=BAR, disable=True if silent else None
    )
