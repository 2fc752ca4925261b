"""How good averages of the weights are by width and step (arXiv:2312.02696, Fig. 5 and 6): made
of a run's snapshots, judged by the loss on held-out images or by FID, and drawn."""

import ours

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import averaging
import extraction
import networks
import parallel
import pictures
import recipes
import runfolder
import sampling
import training
import validation
from storage import UserError, shown, write_json

WIDTHS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
STEPS = 6  # of the snapshots', evenly chosen, the last among them


@dataclasses.dataclass(frozen=True)
class Judge:
    """What averages are judged by: the loss on the held-out images `validate` (None: those that the
    run validates on), or with an `extractor` the FID of `images` unguided samples against `ref`
    (None: what fits)."""

    validate: str | Path | None = None
    extractor: extraction.Extractor | None = None
    images: int = 5000
    ref: str | None = None

    @property
    def name(self) -> str:
        return "fid" if self.extractor else "loss"


def plot(
    run: str | Path,
    judge: Judge,
    *,
    widths: Sequence[float] = WIDTHS,
    steps: int = STEPS,
    device: str = "auto",
    out: str | Path | None = None,
    quiet: bool = False,
) -> dict | None:
    """Judge averages of each of `widths` at `steps` of a run's snapshots, and write a picture and
    its numbers, `out`.png and .json (None: widths-loss or widths-fid in RUN/averages). What the
    snapshots do not span is left blank. On rank 0 a dict for programs, else None. Raises
    UserError."""
    device = parallel.pick_device(device)
    run = Path(run)
    known = sorted({one.step for one in averaging.some_snapshots(run)})
    chosen = np.linspace(0, len(known) - 1, min(steps, len(known))).round().astype(int)
    points = [(known[k], width) for k in chosen for width in widths]
    measure = JUDGES[judge.name](run, judge, device)
    found = []
    silent = quiet or not parallel.is_main()
    for step, width in tqdm(points, "averages", unit="average", disable=silent):
        model = rebuilt(run, step, width)
        if model is not None:
            value = measure(model)
            found.append({"step": step, "width": width, "value": value})
    if not parallel.is_main():
        return None
    if not found:
        raise UserError(f"the snapshots of {run} span none of the widths {list(widths)}")
    out = Path(out or averaging.folder(run) / f"widths-{judge.name}").with_suffix("")
    best = min(found, key=lambda point: point["value"])
    result = {"run": str(run), "judge": judge.name, "points": found, "best": best}
    result["outside"] = len(points) - len(found)  # of what the snapshots span
    pictures.save(picture(found, best, judge, run), out.with_suffix(".png"))
    write_json(out.with_suffix(".json"), result)
    return {**result, "out": str(out.with_suffix(".json")), "picture": str(out.with_suffix(".png"))}


def rebuilt(run: Path, step: int, width: float) -> networks.Network | None:
    """The average, or None where the snapshots don't span it."""
    try:
        return averaging.rebuild(run, width, step).model
    except averaging.Outside:
        return None


def of_loss(run: Path, judge: Judge, device: torch.device) -> Callable[[networks.Network], float]:
    """A function from a network to its loss on held-out images."""
    plan = recipes.make_plan(
        run,
        recipes.Source(),
        validation.Validation(judge.validate),
        variant=None,
        recipe=None,
        network=None,
        init=None,
        device=device,
    )
    if plan.held_out is None:
        raise UserError(
            f"{run} was not validated while it trained, so there are no held-out images to judge "
            "by; give --validate DATA, or --plot fid"
        )
    state = training.State(networks.new(plan.config), plan.recipe, device)

    def measure(model):
        state.network.load_state_dict(model.state_dict())
        found, _ = validation.measure(state, plan.held_out, workers=0)
        return found["validation_loss"]

    return measure


def of_fid(run: Path, judge: Judge, device: torch.device) -> Callable[[networks.Network], float]:
    """A function from a network to the FID of samples; NaN on all ranks but 0."""
    import evaluation

    record = runfolder.read_config(run)
    precision = record["recipe"]["precision"]
    newest = sampling.load(run, device=str(device), precision=precision)
    watch = evaluation.watch(
        run,
        newest.config,
        newest.classes,
        extractor=judge.extractor,
        count=judge.images,
        ref=judge.ref,
    )

    def measure(model):
        ready = parallel.for_inference(model.to(device), precision)
        return watch(dataclasses.replace(newest, model=ready)).get("fid", float("nan"))

    return measure


JUDGES = {"loss": of_loss, "fid": of_fid}


def picture(found: Sequence[dict], best: dict, judge: Judge, run: Path):
    """A table of coloured cells: a row a step, a column a width."""
    steps = sorted({point["step"] for point in found})
    widths = sorted({point["width"] for point in found})
    cells = {}
    for point in found:
        place = steps.index(point["step"]), widths.index(point["width"])
        cells[place] = point["value"], f"{point['value']:.4g}"
    marked = [(steps.index(best["step"]), widths.index(best["width"]))]
    what = "loss on held-out images"
    if judge.extractor:
        what = f"FID of {judge.images:,} unguided samples"
    return pictures.heat_map(
        [f"{width:g}" for width in widths],
        [f"{step:,}" for step in steps],
        cells,
        f"{shown(run)}: {what} by width and step of the average",
        ("width", "step"),
        marked,
    )
