"""A sweep: one network measured with many settings, to find the best before 50,000 images are drawn
with them. The sampler's axes are a table.

All points draw the same classes and seeds, so they are compared block by block; the seeds are none
that a final measure uses. What was measured of a point stands in the sweep's folder, and its
features in the cache: a call that was interrupted goes on, and one that asks for more points draws
only those."""

import ours

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cards
import errors
import evaluation
import imagesets
import parallel
import pictures
import sampling
import schema
import storage
from errors import Estimate
from extraction import Extractor, Generation, Measured
from schema import fields, many, maybe, real, table
from storage import UserError, read_json, write_json

ROOT = Path("sweeps")
COUNT = 5000  # images of a point
FIRST_SEED = 1_000_000  # beyond what a final measure of up to a million draws
MOST = 1000  # points
NONE = "none"  # in place of a value: the axis is left alone


# ---------------------------------------------------------------------------------------- the axes


@dataclasses.dataclass(frozen=True)
class Axis:
    """What a sweep varies: the field of sampling.Settings that its key in AXES names, whose values
    `read` makes of a text. Raises ValueError."""

    help: str  # a literal, for the command line reads it without importing this module
    word: str  # for people
    read: Callable[[str], list]


def numbers(text: str) -> list[float]:
    """1.2:2.0:0.1 (both ends are taken), or 1,1.5,3; "none" among them."""
    values = []
    for part in text.split(","):
        if part == NONE:
            values.append(None)
            continue
        ends = [float(end) for end in part.split(":")]
        if len(ends) == 1:
            values += ends
        elif len(ends) == 3 and ends[2] > 0 and np.isfinite(ends).all():
            first, last, step = ends
            count = int(np.floor((last - first) / step + 1e-6)) + 1
            if not 1 <= count <= MOST:
                raise ValueError(f"{part} holds {max(count, 0)} values; expected 1 to {MOST}")
            values += [round(first + k * step, 10) for k in range(count)]
        else:
            raise ValueError(f"{part} is neither a number nor FIRST:LAST:STEP")
    return values


def whole_numbers(text: str) -> list[int]:
    """10:50:10, or 8,16,25."""
    values = numbers(text)
    if not all(value is not None and value == int(value) for value in values):
        raise ValueError(f"{text} holds what is no whole number")
    return [int(value) for value in values]


def interval(text: str) -> list[tuple[float, float] | None]:
    """LOW,HIGH or none."""
    if text == NONE:
        return [None]
    low, high = [float(part) for part in text.split(",")]
    return [(low, high)]


AXES = {
    "cfg": Axis("Guidance scales: 1.2:2.0:0.1 or 1,1.5,3.", "guidance", numbers),
    "cfg_interval": Axis(
        "Interval of noise levels to guide at: LOW,HIGH or none; once for each.",
        "interval",
        interval,
    ),
    "cfg_power": Axis("Exponents of the power-cosine schedule.", "power", numbers),
    "guide_scale": Axis("Scales of --guide: 1:2.5:0.25.", "guide", numbers),
    "steps": Axis("Network evaluations (NFE): 10,16,25 or 10:50:10.", "NFE", whole_numbers),
}


def read_axes(given: Mapping[str, Sequence[str]]) -> dict[str, list]:
    """Values by axis, each once and in order, of the texts that were given. Raises ValueError."""
    found = {}
    for name, texts in given.items():
        values = []
        for one in texts:
            try:
                values += [value for value in AXES[name].read(one) if value not in values]
            except ValueError as error:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} {one!r}: {error}; expected {AXES[name].help}") from None
        if values:
            found[name] = values
    return found


def text_of(value: object) -> str:
    """An axis' value for people."""
    if value is None:
        return NONE
    if isinstance(value, tuple | list):
        return " to ".join(f"{part:g}" for part in value)
    return f"{value:g}"


# ------------------------------------------------------------------------------------------ the job


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is varied, and how each point is drawn and measured."""

    generator: sampling.Generator
    axes: dict[str, list]
    settings: sampling.Settings = sampling.Settings()
    metric: str = "fid"
    count: int = COUNT
    labels: str = sampling.BALANCED
    batch_size: int | None = None

    @property
    def takes_advice(self) -> bool:
        """Whether guidance is as the weights advise: an axis of it has "none" mean none."""
        return not self.axes.keys() & set(sampling.GUIDANCE)

    def points(self) -> list[sampling.Settings]:
        """Settings of each point, resolved. Raises UserError where there are not several, or some
        can't work."""
        found = []
        for values in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, values, strict=True))
            settings = self.generator.resolved(
                dataclasses.replace(self.settings, **chosen), advice=self.takes_advice
            )
            if settings not in found:
                found.append(settings)
        if not 2 <= len(found) <= MOST:
            raise UserError(
                f"a sweep over {len(found)} point{'s' if len(found) != 1 else ''}; give --cfg "
                f"1.2:2.0:0.1 or another axis ({', '.join(AXES)}) several values, at most {MOST} "
                "points in all"
            )
        return found

    def generation(self, settings: sampling.Settings) -> Generation:
        return Generation(
            self.generator, self.count, settings, self.batch_size, self.labels, FIRST_SEED
        )

    @property
    def key(self) -> str:
        """Of the number that points are judged by."""
        return evaluation.keys(self.metric)[0]

    @property
    def row(self) -> evaluation.Metric:
        return evaluation.METRICS[self.metric]


MEASURE = real(-1e12, 1e12)  # whose square can be summed
POINT = fields(
    {"settings": table(schema.anything), "value": MEASURE, "parts": many(MEASURE)},
    {"noise": real(0, 1e12), "values": table(maybe(MEASURE))},
)
SHAPE = fields(
    {"plan": table(schema.anything), "points": table(POINT)}, {"summary": schema.anything}
)


def run(
    sweep: Sweep,
    extractor: Extractor,
    how: evaluation.How,
    out: str | Path | None = None,
    command: Mapping[str, object] | None = None,
) -> dict | None:
    """Measure every point of the sweep that its folder `out` does not hold yet, and write there
    sweep.json and sweep.png. `command`: options of `dimr eval` that the final measure takes too.
    Returns a dict for programs on rank 0, else None. Raises UserError."""
    points = sweep.points()
    out = Path(out or ROOT / sweep.generator.name)
    extractors = {sweep.row.extractor: extractor}
    of, against = evaluation.references(sweep.metric, sweep.generation(points[0]), extractors, how)
    folder = Folder(out, plan_of(sweep, extractor, against[sweep.row.extractor]))
    with folder.held():
        known = set(parallel.broadcast(folder.begin() if parallel.is_main() else None))
        for number, settings in enumerate(points, 1):
            name = name_of(settings)
            if name in known:
                continue
            known.add(name)
            say(f"point {number} of {len(points)}: {describe(sweep, settings)}")
            generation = sweep.generation(settings)
            found = evaluation.evaluated(sweep.metric, generation, extractors, against, how)
            if found:
                folder.add(name, settings, found, sweep.key)
        if not parallel.is_main():
            return None
        result = judged(sweep, points, folder)
        result["final"] = final_command(sweep, points[result["best"]], how, command or {})
        pictures.save(picture(sweep, points, result), out / "sweep.png")
        folder.finish(result)
    return {**result, "out": str(out), "picture": str(out / "sweep.png")}


def say(line):
    if parallel.is_main():
        tqdm.write(line, file=sys.stderr)


def name_of(settings: sampling.Settings) -> str:
    """What tells a point apart in its folder. Where nothing guides, it matters not when."""
    if settings.cfg == 1 and settings.guide_scale in (None, 1):
        settings = dataclasses.replace(
            settings, cfg_interval=None, cfg_power=None, cfg_channels=None
        )
    return " ".join(cards.settings_words(dataclasses.asdict(settings)))


def describe(sweep: Sweep, settings: sampling.Settings) -> str:
    """A point for people, by what is varied."""
    varied = [name for name, values in sweep.axes.items() if len(values) > 1]
    return ", ".join(f"{AXES[name].word} {text_of(getattr(settings, name))}" for name in varied)


def plan_of(sweep: Sweep, extractor: Extractor, against: Measured | None) -> dict:
    """What has to be equal in two sweeps whose points can be compared."""
    record = sampling.describe(sweep.generator, sweep.generator.resolved(sweep.settings))
    kept = ("weights", "guide", "precision", "ema_width")
    generation = sweep.generation(sweep.settings)
    return {
        **{name: record[name] for name in kept if name in record},
        "drawn": generation.drawn,
        "n": sweep.count,
        "metric": sweep.metric,
        "features": extractor.identity,
        "reference": against.sha256 if against else None,
        "blocks": [errors.BLOCKS, errors.SEED],
    }


class Folder:
    """The points of a sweep, in sweep.json of a folder, which one process writes at a time."""

    def __init__(self, out: Path, plan: dict):
        self.out = out
        self.path = out / "sweep.json"
        self.plan = plan
        self.points = {}

    def held(self):
        """Hold the folder against other calls, on rank 0."""
        if parallel.is_main():
            return storage.locked(self.out)
        return contextlib.nullcontext()

    def begin(self) -> list[str]:
        """Names of the points that are there. Raises UserError for a sweep of something else."""
        if not self.path.exists():
            return []
        held = read_json(self.path, SHAPE)
        for name, value in self.plan.items():
            if held["plan"].get(name) != value:
                raise UserError(
                    f"{self.out} holds a sweep with {name} {held['plan'].get(name)}, and this one "
                    f"has {value}; choose another --out"
                )
        self.points = held["points"]
        return list(self.points)

    def add(self, name: str, settings: sampling.Settings, found: evaluation.Evaluated, key: str):
        one = found.estimates[key]
        self.points[name] = {
            "settings": dataclasses.asdict(settings),
            "value": one.value,
            "parts": list(map(float, one.parts)),
            "noise": one.noise,
            "values": evaluation.flat(found.estimates),
        }
        self._write({})

    def finish(self, result: dict):
        self._write({"summary": result})

    def _write(self, more):
        write_json(self.path, {"plan": self.plan, "points": self.points, **more})

    def estimate(self, name: str) -> Estimate:
        one = self.points[name]
        return Estimate(one["value"], one["parts"], one.get("noise", 0.0))


# ------------------------------------------------------------------------------------ the judgement


def judged(sweep: Sweep, points: Sequence[sampling.Settings], folder: Folder) -> dict:
    """Each point with its error and how far it is from the best; which is best, and which can't be
    told from it."""
    estimates = [folder.estimate(name_of(settings)) for settings in points]
    values = [one.value for one in estimates]
    best = int(np.argmax(values) if sweep.row.rising else np.argmin(values))
    rows = []
    for settings, one in zip(points, estimates, strict=True):
        apart = errors.difference(estimates[best], one, paired=True)
        rows.append(
            {
                **{name: getattr(settings, name) for name in sweep.axes},
                sweep.key: one.value,
                f"{sweep.key}_error": one.error,
                "difference": apart.value,
                "difference_error": apart.error,
                "within_noise": apart.is_noise if one is not estimates[best] else None,
            }
        )
    return {
        "metric": sweep.metric,
        "key": sweep.key,
        "n": sweep.count,
        "labels": sweep.labels,
        "seeds": imagesets.seeds_text(sweep.generation(points[0]).seeds),
        "best": best,
        "within_noise": [k for k, row in enumerate(rows) if row["within_noise"]],
        "points": rows,
    }


def final_command(
    sweep: Sweep, settings: sampling.Settings, how: evaluation.How, options: Mapping[str, object]
) -> str:
    """The command that measures a point as published numbers are: on 50,000 images of other
    seeds."""
    made = {
        **sampling.describe(sweep.generator, settings),
        "labels": sweep.labels,
        "n": evaluation.COUNT,
        "drawn_here": True,
    }
    if sweep.labels not in sampling.LABELS:  # a file of 5,000
        made["labels"] = sampling.BALANCED
    (command,) = cards.repeat(sweep.metric, {"made": made}, {**options, "ref": how.ref})
    return command


def lines(result: dict) -> str:
    """The result for people: a table, the best, and those that can't be told from it."""
    key = result["key"]
    names = [name for name in AXES if name in result["points"][0]]
    row = evaluation.METRICS[result["metric"]]
    head = "".join(f"{AXES[name].word:>10} " for name in names)
    found = [f"{head}{row.values[key]:>12}            to the best"]
    for k, point in enumerate(result["points"]):
        cells = "".join(f"{text_of(point[name]):>10} " for name in names)
        line = f"{cells}{_with(point[key], point[f'{key}_error'], row.digits, 12)}"
        if k == result["best"]:
            line += "   best"
        else:
            line += f"   {_with(point['difference'], point['difference_error'], row.digits, 9)}"
        if point["within_noise"]:
            line += "   within noise"
        found.append(line)
    count = len(result["within_noise"])
    found += [
        f"{count} of the others can't be told from the best (95%, the same seeds block by block)",
        f"{result['n']:,} images a point, labels {result['labels']}, seeds {result['seeds']}; a "
        f"best of {len(result['points'])} is flattered: measure it on seeds of its own:",
        result["final"],
        f"to look at: {result['picture']}",
    ]
    return "\n".join(found)


def _with(value, error, digits, width):
    text = f"{value:{width}.{digits}f}"
    if error is None:
        return text
    return f"{text} ± {error:.{digits}f}"


def picture(sweep: Sweep, points: Sequence[sampling.Settings], result: dict):
    """A curve with bars of its errors over one axis, or a heat map over two; of more, a heat map
    for each choice of the others."""
    varied = [name for name, values in sweep.axes.items() if len(values) > 1]
    marked = {result["best"], *result["within_noise"]}
    title = (
        f"{sweep.row.values[sweep.key]} of {sweep.count:,} images, {sweep.generator.name}; marked: "
        "the best and what can't be told from it"
    )
    rows = result["points"]
    if len(varied) == 1:
        names = [text_of(getattr(settings, varied[0])) for settings in points]
        values = [(row[sweep.key], row[f"{sweep.key}_error"]) for row in rows]
        axes = AXES[varied[0]].word, sweep.row.values[sweep.key]
        return pictures.error_bars(names, values, title, axes, marked)
    varied.sort(key=lambda name: -len(sweep.axes[name]))
    across, down, *others = varied
    span = min(row[sweep.key] for row in rows), max(row[sweep.key] for row in rows)
    charts = []
    for choice in itertools.product(*(sweep.axes[name] for name in others)):
        fixed = dict(zip(others, choice, strict=True))
        cells = {}
        frames = []
        for k, settings in enumerate(points):
            if any(getattr(settings, name) != value for name, value in fixed.items()):
                continue
            cell = tuple(sweep.axes[n].index(getattr(settings, n)) for n in (down, across))
            error = rows[k][f"{sweep.key}_error"]
            cells[cell] = rows[k][sweep.key], _with(rows[k][sweep.key], error, 3, 0)
            frames += [cell] if k in marked else []
        told = ", ".join(f"{AXES[name].word} {text_of(value)}" for name, value in fixed.items())
        charts.append(
            pictures.heat_map(
                [text_of(value) for value in sweep.axes[across]],
                [text_of(value) for value in sweep.axes[down]],
                cells,
                f"{title}; {told}" if told else title,
                (AXES[across].word, AXES[down].word),
                frames,
                span,
            )
        )
    return pictures.stacked(charts)
