"""A card: what a number was measured with, so that anybody can measure it again. For programs as
JSON, for people beside it as Markdown."""

import ours

import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

import downloads
import errors
import evaluation
import runfolder
import sampling
import space
from storage import VERSION, UserError, write_json, writing

FORMAT = 1
ROUNDING = "(x + 1) / 2 clamped to [0, 1], times 255, rounded to nearest, uint8"
# fields of sampling.Settings that are told by another, and need no option
IMPLIED = ("preset",)


def check(path: Path) -> None:
    """Raise UserError unless a card can be called so: beside X.json comes X.md."""
    if path.suffix != ".json":
        raise UserError(f"--card {path} does not end in .json; beside it comes a .md for people")


def write(path: str | Path, card: dict) -> None:
    """Write the card as JSON to `path`, and beside it as Markdown."""
    write_json(path, card)
    with writing(Path(path).with_suffix(".md"), "w") as file:
        file.write(markdown(card))


# ------------------------------------------------------------------------------------ what it holds


def card(metrics: str, result: dict, options: Mapping[str, object]) -> dict:
    """The card of what `evaluation.evaluate` or `compare_sets` found for METRICS[metrics] with the
    `options` of `dimr eval`."""
    sets = result.get("sets") or {"": result}
    first = next(iter(sets.values()))
    record = {
        "format": FORMAT,
        "metric": metrics,
        "sets": {name: _set(metrics, one, options) for name, one in sets.items()},
        "extractors": first["extractors"],
        "reference": _reference(first["reference"], options.get("ref")),
        "adm": bool(options.get("adm")),
        "errors": {
            "method": "jackknife over blocks of images, drawn by a seed, within each class where "
            "the set is balanced; KID: spread over blocks; Inception Score: over splits",
            "blocks": errors.BLOCKS,
            "seed": errors.SEED,
            "reference": "taken as fixed",
        },
        "device": first["device"],
        "versions": versions(),
        "command": shlex.join(["dimr", *sys.argv[1:]]),  # wherever it is installed
    }
    if "differences" in result:
        record["differences"] = result["differences"]
    return record


def _set(metrics, result, options):
    """What is known of one set, and its numbers."""
    keys = [key for key in result if f"{key}_error" in result]
    known = bool(result["made"].get("weights"))
    return {
        "values": {key: {"value": result[key], "error": result[f"{key}_error"]} for key in keys},
        **result["samples"],
        "made": result["made"] or None,
        "rounding": ROUNDING if known else None,
        "remarks": result["remarks"],
        "repeat": repeat(metrics, result, options),
    }


def _reference(one, ref):
    if one is None:
        return None
    asset = downloads.ASSETS.get(ref)
    return {**one, "came_from": asset.url if asset else str(Path(one["source"]).resolve())}


def versions() -> dict[str, str]:
    """Of what took part."""
    return {
        "dimr": VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


# ------------------------------------------------------------------------------- how it is repeated


def repeat(metrics: str, result: dict, options: Mapping[str, object]) -> list[str]:
    """The commands that measure a set's numbers again, every default said; of images from
    elsewhere, they have to be there."""
    made = result["made"]
    measuring = ["dimr", "eval", metrics]
    how = _options(options, ("ref", "res", "inception", "dinov2", "features", "adm"))
    # a folder and a set of an earlier version don't tell their seeds
    if not made.get("weights") or not (made.get("seeds") or made.get("drawn_here")):
        return [shlex.join([*measuring, result["samples"]["source"], *how])]
    drawing = _drawing(made)
    if made.get("drawn_here"):
        labels = ["--labels", made["labels"], "-n", str(made["n"])]
        return [shlex.join([*measuring, *drawing, *labels, *how])]
    path = result["samples"]["source"]
    labels = ["--labels", made.get("labels") or path]
    making = ["dimr", "sample", *drawing, *labels, "--seeds", made["seeds"], "--npz", "--out", path]
    return [shlex.join(making), shlex.join([*measuring, path, *how])]


def _drawing(made):
    """Options that draw the same images from the same weights."""
    source = made["source"]
    words = ["--weights", source]
    run = runfolder.run_of(Path(source))
    if run and made.get("ema_width"):  # no file holds the average
        words = ["--weights", str(run), "--ema-width", f"{made['ema_width']:g}"]
    words += settings_words(made)
    words += _options(made, ("batch_size", "precision", "device", "vae"))
    if made.get("guide_source"):
        words += ["--guide", made["guide_source"]]
    if made.get("compiled"):
        words.append("--compile")
    return words


def settings_words(settings: Mapping[str, object]) -> list[str]:
    """Options that say resolved sampling.Settings, given as a dict."""
    names = [name for name in sampling.Settings.__dataclass_fields__ if name not in IMPLIED]
    told = {name: settings.get(name) for name in names}
    if told["grid"] == space.OWN:  # a solver's, which lays its times itself
        told["grid"] = None
    return _options(told, told)


def _options(values, names):
    """Words of a command line for those of `names` that have a value."""
    words = []
    for name in names:
        value = values.get(name)
        if value is None or value is False or value == name:  # the name is its default
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list | tuple):
            words.append(",".join(f"{part:g}" for part in value))
        elif value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return words


# --------------------------------------------------------------------------------------- for people


def markdown(card: dict) -> str:
    """The card for people."""
    lines = []
    for name, one in card["sets"].items():
        lines += [f"# {name or one['source']}", ""]
        lines += _values(one["values"])
        lines += [f"- {line}" for line in _about(one)]
        lines += [f"- note: {line}" for line in one["remarks"]]
        lines += ["", "Again:", "", "```bash", *one["repeat"], "```", ""]
    for name, found in card.get("differences", {}).items():
        lines += [f"## {name}, to the first", ""]
        lines += [f"- {key}: {_difference(value)}" for key, value in found.items()] + [""]
    lines += ["# Measured with", ""]
    for kind, extractor in card["extractors"].items():
        lines.append(f"- {kind}: {extractor['name']}, `{extractor['identity']}`")
        lines.append(f"- images to {kind}: {extractor['resize']}")
    if one := card["reference"]:
        count = f"{one['count']:,} images" if one["count"] else "statistics"
        lines.append(f"- reference, as fixed: {count}, `{one['sha256']}`, {one['came_from']}")
    lines.append(f"- errors: {card['errors']['blocks']} blocks; {card['errors']['method']}")
    if card["adm"]:
        lines.append("- distances of precision and recall in float16, as ADM's suite has them")
    told = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    lines += [f"- {told}, on {card['device']}", f"- `{card['command']}`", ""]
    return "\n".join(lines)


def _values(values):
    names = evaluation.names()
    lines = ["| | value | standard error |", "|---|---|---|"]
    for key, found in values.items():
        if found["value"] is not None:
            error = "" if found["error"] is None else f"{found['error']:.4g}"
            lines.append(f"| {names.get(key, key)} | {found['value']:.6g} | {error} |")
    return [*lines, ""]


def _about(one):
    """Where images come from and how they were made, by the line."""
    size = f"{one['size']}×{one['size']}"
    yield f"{one['count']:,} images of {size}, `{one['sha256']}`, {one['source']}"
    made = one["made"] or {}
    if not made.get("weights"):
        yield "how they were made is not known"
        return
    yield f"weights `{made['weights']}`, {made['source']}"
    told = [f"{name} {made[name]}" for name in _told() if made.get(name) is not None]
    yield ", ".join(told)
    yield f"rounding: {one['rounding']}"


def _told():
    fields = list(sampling.Settings.__dataclass_fields__)
    return [
        *fields,
        "guide_source",
        "guide",
        "labels",
        "seeds",
        "precision",
        "vae_precision",
        "device",
        "batch_size",
    ]


def _difference(found):
    error = "no error" if found["error"] is None else f"± {found['error']:.4g}"
    verdict = {True: "within noise", False: "beyond noise", None: "unknown"}[found["within_noise"]]
    how = "paired" if found["paired"] else "independent"
    return f"{found['difference']:+.4g} {error} ({how}; {verdict})"
