"""The paper's Table 2 on Fashion-MNIST: six networks from U-ViT to DiMR, a step apart and of about
the same compute, trained alike from several seeds and judged by real images.

    python tools/fashion_mnist.py write data/fashion             # once; see there
    python tools/fashion_mnist.py learn data/fashion --res 16
    python tools/ladder.py data/fashion --jobs 2      # hours; what is done is not done again
    python tools/ladder.py data/fashion --only-show

Each row first tries the same learning rates on fewer images, and takes the one with the lowest loss
on the test images that its output has, whatever it is trained by. Then a run from each seed, images
of it without guidance, classes in turn, and their figures. Every figure is a line of
OUT/ladder.json once it is known, so that runs may be deleted, and several machines' lines put
together. Of the runs that are there, OUT/ladder.png shows images from the same seeds, and
OUT/loss.png the losses."""

import concurrent.futures
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import fashion_mnist  # noqa: E402

import defaults  # noqa: E402
import journal  # noqa: E402
import pictures  # noqa: E402
import storage  # noqa: E402

RES = 16
BATCH = 64
UVIT = "--layers 3 --dims 56 --heads 4 --patch 2"
DIMR = "--layers 3,1 --dims 48,32 --heads 4"
NFE = 16  # of the images a run is judged by
SHOWN = 20  # of them in the picture
SMOOTH = 500  # steps
ROWS = {
    "1": ("U-ViT", UVIT),
    "2": ("adaLN-Zero", UVIT),
    "3": ("two branches", DIMR),
    "4": ("TD-LN instead of adaLN-Zero", DIMR),
    "5": ("GEGLU", DIMR),
    "6": ("multi-scale loss", DIMR),
}
RATES = (2e-3, 4e-3, 8e-3)
RATE_SEED = 1000  # none that counts
FEATURES = "tools.fashion_mnist:features"
FIGURES = {  # key -> (what it is, decimals)
    "loss": ("held-out loss", 4),
    "fid": ("Fréchet distance", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "classifier_generated": ("recognised", 3),
    "coverage": ("coverage", 3),
    "nearest_train": ("nearest", 2),
}


class Ladder:
    """What is to be done in folder `out`, with real images in `data`, and the lines that are done:
    {"row", "rate", "seed", "images", …}."""

    def __init__(
        self, data: Path, out: Path, *, images: int, rate_images: int, samples: int, device="cpu"
    ):
        self.data = data.resolve()
        self.out = out.resolve()
        self.images = images
        self.rate_images = rate_images
        self.samples = samples
        self.device = device
        self.path = self.out / "ladder.json"
        self.lock = threading.Lock()
        self.lines = storage.read_json(self.path) if self.path.exists() else []

    def find(self, **wanted) -> dict | None:
        """The line with these values."""
        for line in self.lines:
            if all(line.get(key) == value for key, value in wanted.items()):
                return line
        return None

    def add(self, line: dict):
        with self.lock:
            self.lines.append(line)
            self.lines.sort(key=lambda one: (one["images"], one["row"], one["rate"], one["seed"]))
            storage.write_json(self.path, self.lines)
        click.echo(json.dumps(line))

    def best_rate(self, row: str) -> float | None:
        """The rate with the lowest loss, once all were tried."""
        losses = {}
        for rate in RATES:
            line = self.find(row=row, rate=rate, seed=RATE_SEED, images=self.rate_images)
            if line is None:
                return None
            losses[rate] = line["loss"]
        return min(losses, key=losses.get)

    # ------------------------------------------------------------------------------ the work

    def try_rate(self, row: str, rate: float):
        if not self.find(row=row, rate=rate, seed=RATE_SEED, images=self.rate_images):
            run = self.train(row, rate, RATE_SEED, self.rate_images)
            self.add(self.line(row, rate, RATE_SEED, self.rate_images, run))
            shutil.rmtree(run)

    def climb(self, row: str, seed: int):
        """Train, draw and judge one run, at the row's best rate."""
        if self.find(row=row, seed=seed, images=self.images):
            return
        rate = self.best_rate(row)
        run = self.train(row, rate, seed, self.images)
        line = self.line(row, rate, seed, self.images, run)
        made = samples_of(run)
        dimr(
            *("sample", "--weights", run, "--balanced", "-n", self.samples, "--steps", NFE),
            *("--npz", "--out", made, "--device", self.device),
        )
        for metric in ("fid", "pr"):
            found = dimr(
                *("eval", metric, made, "--ref", self.data / "train", "--res", RES),
                *("--features", FEATURES, "--json", "--device", self.device),
                FASHION=self.data,
            )
            line |= {key: value for key, value in json.loads(found).items() if is_figure(key)}
        self.add({**line, **fashion_mnist.judge(self.data, made)})

    def train(self, row: str, rate: float, seed: int, images: int) -> Path:
        """A run folder; goes on where an earlier call was cut."""
        run = self.run(row, rate, seed, images)
        steps = math.ceil(images / BATCH)
        dimr(
            *("train", "--variant", f"table2-{row}", *ROWS[row][1].split()),
            *("--data", self.data / "train", "--res", RES, "--out", run, "--seed", seed),
            *("--steps", steps, "--batch-size", BATCH, "--lr", rate, "--grad-clip", 1, "--no-flip"),
            *("--warmup", steps // defaults.WARMUP),
            *("--ema", defaults.decay(steps / defaults.AVERAGE)),
            *("--validate", self.data / "test", "--validate-every", steps, "--sample-every", 0),
            *("--keep", 1, "--workers", 0, "--device", self.device),
        )
        return run

    def line(self, row, rate, seed, images, run) -> dict:
        loss = journal.read_metrics(run)[-1]["validation_loss_branches"][-1]
        line = {"row": row, "rate": rate, "seed": seed, "images": images, "loss": loss}
        return {**line, "seconds": fashion_mnist.seconds(run, BATCH)}

    def run(self, row: str, rate: float, seed: int, images: int) -> Path:
        return self.out / "runs" / f"row-{row}-rate-{rate:g}-seed-{seed}-{images}"


def samples_of(run):
    return run.parent / f"{run.name}.npz"  # with_suffix would cut the name at the rate's point


def is_figure(key):
    return key.removesuffix("_error") in FIGURES


def dimr(*words, **environment) -> str:
    """What a `dimr` process prints, in the checkout, on one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "cli", *map(str, words)],
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1", **os.environ, **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise click.ClickException(f"dimr {words[0]} ended with {done.returncode}: {done.stderr}")
    return done.stdout


# ----------------------------------------------------------------------------------- the judgement


def table(ladder: Ladder) -> str:
    """Means over seeds with their standard errors, and each row's difference to the one before."""
    head = [f"{'row':32}{'rate':>8}{'seeds':>7}", *(f"{name:>20}" for name, _ in FIGURES.values())]
    text = ["".join(head)]
    found = estimates(ladder)
    before = None
    for row, now in found.items():
        lines = climbed(ladder, row)
        cells = [f"{row + ' ' + ROWS[row][0]:32}{lines[0]['rate']:8g}{len(lines):7}"]
        text.append("".join([*cells, *(shown(key, now[key]) for key in FIGURES)]))
        if before:
            apart = {key: difference(before[key], now[key]) for key in FIGURES}
            cells = [f"{'  to the row before':47}"]
            text.append("".join([*cells, *(shown(key, apart[key], "+") for key in FIGURES)]))
        before = now
    return "\n".join(text)


def climbed(ladder, row):
    """The lines of a row's runs that count."""
    lines = [line for line in ladder.lines if line["row"] == row and "fid" in line]
    return [line for line in lines if line["images"] == ladder.images]


def estimates(ladder: Ladder) -> dict[str, dict]:
    """By row, each figure's (mean over seeds, standard error). Of two or three seeds alone a spread
    is hardly known: it is pooled over the rows."""
    rows = {row: climbed(ladder, row) for row in ROWS if climbed(ladder, row)}
    found = {row: {} for row in rows}
    for key in FIGURES:
        values = {row: np.array([line[key] for line in lines]) for row, lines in rows.items()}
        deviation = pooled(values.values())
        for row, of_seeds in values.items():
            found[row][key] = float(of_seeds.mean()), deviation / math.sqrt(len(of_seeds))
    return found


def pooled(groups) -> float:
    """Standard deviation within groups of numbers, NaN where none has two."""
    free = sum(len(group) - 1 for group in groups)
    if not free:
        return math.nan
    return math.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / free)


def shown(key, estimate, sign=""):
    value, error = estimate
    _, decimals = FIGURES[key]
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}".rjust(20)


def draw(ladder: Ladder):
    """Pictures of the first seed's runs, as far as they are there."""
    runs = {}
    for row in ROWS:
        line = ladder.find(row=row, seed=0, images=ladder.images)
        if line:
            run = ladder.run(row, line["rate"], 0, ladder.images)
            if samples_of(run).is_file():
                runs[row] = run
    if not runs:
        return
    images, captions, losses = [], [], {}
    for row, run in runs.items():
        with np.load(samples_of(run)) as arrays:
            images += list(arrays["arr_0"][:SHOWN])
            labels = arrays["arr_1"][:SHOWN]
        captions += [f"{fashion_mnist.CLASSES[label][2:]} · {row}" for label in labels]
        lines = journal.read_metrics(run)
        seen = [BATCH * line["step"] for line in lines]
        losses[f"row {row}"] = seen, [line["loss_branches"][-1] for line in lines]
    sheet = pictures.grid(images, captions, columns=SHOWN, tile=64)
    pictures.save(sheet, ladder.out / "ladder.png")
    title = f"loss of the output, mean over {SMOOTH} steps, seed 0 (logarithmic)"
    curves = pictures.curves(losses, title, smooth=SMOOTH, axes=("images", "loss"))
    pictures.save(curves, ladder.out / "loss.png")
    click.echo(f"{ladder.out / 'ladder.png'}, {ladder.out / 'loss.png'}", err=True)


def difference(one, other) -> tuple[float, float]:
    return other[0] - one[0], math.hypot(one[1], other[1])


def work(ladder: Ladder, rows, seeds: int, jobs: int):
    """All that is not done yet, `jobs` runs at once. Raises UserError where another call works."""
    with storage.locked(ladder.out), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        tries = [(row, rate) for rate in RATES for row in rows]
        list(pool.map(ladder.try_rate, *zip(*tries, strict=True)))
        runs = [(row, seed) for seed in range(seeds) for row in rows]
        list(pool.map(ladder.climb, *zip(*runs, strict=True)))


@click.command(
    help=__doc__.replace("\n\n    ", "\n\n\b\n    "), context_settings={"max_content_width": 100}
)
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/ladder"))
@click.option("--row", "rows", multiple=True, type=click.Choice(ROWS), help="[default: all]")
@click.option("--seeds", default=3, show_default=True, help="Runs of each row.")
@click.option("--images", default=400_000, show_default=True, help="That a run sees.")
@click.option("--rate-images", default=40_000, show_default=True, help="That a try of a rate sees.")
@click.option("--samples", default=3000, show_default=True, help="That a run is judged by.")
@click.option("--jobs", default=1, show_default=True, help="Runs at once, of one thread each.")
@click.option("--device", default="cpu", show_default=True, help="Of all runs, as dimr takes it.")
@click.option("--only-show", is_flag=True, help="The table, as far as it is.")
def main(data, out, rows, seeds, images, rate_images, samples, jobs, device, only_show):
    ladder = Ladder(
        data, out, images=images, rate_images=rate_images, samples=samples, device=device
    )
    rows = rows or tuple(ROWS)
    if not only_show:
        fashion_mnist.load_classifier(data, RES)  # or say how to make it
        try:
            work(ladder, rows, seeds, jobs)
        except storage.UserError as error:
            raise click.ClickException(str(error)) from None
    click.echo(table(ladder))
    draw(ladder)


if __name__ == "__main__":
    main()
