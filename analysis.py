"""What a network's norms make of time (paper, Secs. 3 and E, Figs. 3 and 6): the principal
components of what adaLN-Zero emits along sampling, and TD-LN's γ(τ) and β(τ)."""

import ours

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import diffusion
import networks
import pictures
import sampling
import solver
from storage import UserError, write_json

ROOT = Path("analysis")
COMPONENTS = 8  # bars that are drawn
DEPTHS = 4  # layers that are looked at if not told: quarters of the depth
POINTS = 64  # times, and rows of channels, of a picture of TD-LN

# Scale and shift of attention (or of what stands in its place) and of the MLP, as Fig. 3 names
# them, and where `modulations` has them.
FAMILIES = {"gamma1": 1, "gamma2": 4, "beta1": 0, "beta2": 3}
LETTERS = {"gamma": "γ", "beta": "β"}


@dataclasses.dataclass(frozen=True)
class Target:
    """What is looked at, and where the findings go."""

    generator: sampling.Generator
    layers: tuple[int, ...] | None = None  # counted from 1; of a DiMR's branches one after another
    out: Path | None = None  # a folder; None: analysis/WEIGHTS

    @property
    def folder(self) -> Path:
        return Path(self.out or ROOT / self.generator.name)

    def write(self, name: str, picture, found: dict) -> dict:
        """Write NAME.png and NAME.json; returns what the latter holds."""
        paths = {
            "picture": str(self.folder / f"{name}.png"),
            "json": str(self.folder / f"{name}.json"),
        }
        found = {"source": self.generator.source, **found, **paths}
        pictures.save(picture, paths["picture"])
        write_json(paths["json"], found)
        return found


def chosen(layers: Sequence[int] | None, depth: int) -> list[int]:
    """Layers to look at, from 1: those given that are there, else at each quarter of the
    `depth`."""
    if layers is None:
        return sorted({max(1, round(depth * k / DEPTHS)) for k in range(1, DEPTHS + 1)})
    return [layer for layer in layers if layer <= depth]


def check_layers(layers: Sequence[int] | None, depth: int):
    """Raise UserError for a layer that is not there."""
    for layer in layers or ():
        if not 1 <= layer <= depth:
            raise UserError(
                f"layer {layer} is not one of 1 to {depth}, the blocks of this network; give "
                "--layers among them"
            )


# ------------------------------------------------------------------------------ adaLN-Zero (Fig. 3)


def pca(target: Target, settings: sampling.Settings, samples: int = 32) -> dict:
    """The share of variance that each principal component explains of γ₁, γ₂, β₁ and β₂ at some
    depths, over the times at which the sampler calls the network and `samples` classes, spread
    over all.

    The vectors depend on time and class alone, so that no image is drawn. Writes pca.png and
    pca.json; returns what the latter holds. Raises UserError for a network without adaLN-Zero."""
    model = target.generator.model
    config = model.config
    if not hasattr(model, "modulations") or not modulated(config):
        raise UserError(
            f"{target.generator.source} has no adaLN-Zero, whose vectors this looks at; expected "
            "a DiT, a SiT, table2-2, or a network trained with --norm adaln"
        )
    settings = settings.resolved(config)
    schedule = diffusion.SCHEDULES[config.noise_schedule]()
    times = evaluation_times(settings, config, schedule)
    classes = np.linspace(0, config.num_classes - 1, samples).round().astype(int)
    y = torch.tensor(classes, device=target.generator.device)
    emitted = []
    with torch.inference_mode():
        for t in times:
            time = torch.full((1,), float(model.time(schedule, t)), device=y.device)
            emitted.append([vectors.float().cpu() for vectors in model.modulations(time, y)])
    check_layers(target.layers, len(emitted[0]))
    layers = chosen(target.layers, len(emitted[0]))
    rows = []
    for layer in layers:
        vectors = torch.cat([step[layer - 1] for step in emitted])  # (steps · samples, 6, D)
        explained = {name: shares(vectors[:, k]) for name, k in FAMILIES.items()}
        rows.append({"layer": layer, "explained": explained})
    found = {
        "layers": rows,
        "times": times,
        "samples": samples,
        "solver": settings.solver,
        "steps": settings.steps,
    }
    title = f"{target.generator.name}: variance explained by each principal component"
    return target.write("pca", pictures.bars(charts(rows), title), found)


def modulated(config: networks.Config) -> bool:
    """Whether the network's norms are adaLN-Zero's."""
    return getattr(config, "norm", "adaln") == "adaln"


def evaluation_times(settings, config, schedule) -> list[float]:
    """At which times t a sampler calls the network, in order."""
    row = solver.SOLVERS[settings.solver]
    in_lam = row.in_lam or settings.grid == "logsnr"
    start, end = diffusion.span(schedule, config.objective, in_lam)
    times = []

    def denoise(x, t):
        times.append(float(t))
        parts = 3 if row.learned_variance else 2
        return (x,) * parts

    x = torch.zeros(1)
    solver.sample(
        denoise,
        x,
        schedule,
        settings.steps,
        settings.solver,
        settings.grid,
        start=start,
        end=end,
        draw=lambda update: x,
    )
    return times


def shares(vectors: torch.Tensor) -> list[float]:
    """Of vectors (N, D), the share of the variance that each principal component explains, the
    largest first; at most COMPONENTS of them. All 0 where nothing varies."""
    centred = (vectors - vectors.mean(0)).double()
    variances = torch.linalg.svdvals(centred).square()
    total = float(variances.sum())
    if total <= 1e-24 * max(1.0, float(vectors.double().square().sum())):
        return [0.0] * COMPONENTS  # rounding of a mean
    return (variances / total)[:COMPONENTS].tolist()


def charts(rows):
    """(title, heights) of each chart of the figure, row by row. Pillow's font has no Greek."""
    found = []
    for row in rows:
        line = []
        for name, explained in row["explained"].items():
            line.append((f"{name[:-1]} {name[-1]}, layer {row['layer']}", explained))
        found.append(line)
    return found


def letter(name: str) -> str:
    """ "gamma1" as the paper writes it."""
    word = name.rstrip("12")
    return LETTERS[word] + name[len(word) :]


def pca_lines(found: dict) -> str:
    """What `pca` found, for people."""
    lines = [
        f"{len(found['times'])} times of {found['solver']}, {found['samples']} classes: share of "
        "the variance that the first component explains, the first two, and the largest of the "
        "others"
    ]
    for row in found["layers"]:
        parts = []
        for name, explained in row["explained"].items():
            two = sum(explained[:2])
            rest = max(explained[2:], default=0)
            parts.append(f"{letter(name)} {explained[0]:5.1%} {two:5.1%} {rest:5.1%}")
        lines.append(f"layer {row['layer']:3}: {'   '.join(parts)}")
    lines.append(f"to look at: {found['picture']}; numbers: {found['json']}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- TD-LN


def time_dependence(target: Target) -> dict:
    """TD-LN's γ(τ) and β(τ) in the blocks, over sampling's time from noise to data, by branch and
    depth. `layers` count within each branch.

    Writes time.png, a panel per vector, its channels sorted by how they move, and time.json;
    returns what the latter holds. Raises UserError for a network without TD-LN."""
    model = target.generator.model
    config = model.config
    if networks.kind(config) != "dimr" or config.norm not in ("tdln", "tdrms"):
        norm = getattr(config, "norm", networks.kind(config))
        raise UserError(
            f"{target.generator.source} has no TD-LN in its blocks, whose vectors this looks at, "
            f"but {norm}; expected a DiMR with --norm tdln or tdrms"
        )
    check_layers(target.layers, max(config.blocks))
    schedule = diffusion.SCHEDULES[config.noise_schedule]()
    t = torch.linspace(schedule.t_start, schedule.t_end, POINTS, dtype=torch.float64)
    tau = schedule.tau(t).float()
    rows = []
    values = []
    for vector in time_vectors(model, target.layers):
        with torch.inference_mode():
            moving = vector.pop("module")(tau.to(target.generator.device)).cpu()  # (POINTS, D)
        rows.append({**vector, **movement(moving)})
        values.append(moving.numpy())
    found = {"vectors": rows, "t": t.tolist(), "tau": tau.tolist()}
    return target.write("time", time_picture(target, rows, values), found)


def time_vectors(model, layers):
    """Yield what is to be looked at: branch, layer and norm, whether γ or β, and its module."""
    for r, branch in enumerate(model.branches):
        for layer in chosen(layers, len(branch.blocks)):
            for norm, module in norms_of(branch.blocks[layer - 1]):
                for name in LETTERS:
                    if hasattr(module, name):
                        place = {"branch": r + 1, "layer": layer, "norm": norm, "vector": name}
                        yield {**place, "module": getattr(module, name)}


def norms_of(block):
    """(name, norm) of a block's time-dependent norms, in order."""
    return [(name, part) for name, part in block.named_children() if hasattr(part, "gamma")]


def movement(moving: torch.Tensor) -> dict:
    """What a vector (POINTS, D) does over time, in numbers."""
    return {
        "mean": moving.mean(1).tolist(),
        "deviation": moving.std(1, correction=0).tolist(),
        "moved": float((moving[-1] - moving[0]).abs().mean()),
        "explained": shares(moving)[:3],
    }


def time_picture(target, rows, values):
    """A panel per vector: channels from top to bottom, time from left (noise) to right (data)."""
    centres = {"gamma": 1.0, "beta": 0.0}
    reach = {}
    for name, centre in centres.items():
        away = [
            np.abs(v - centre) for row, v in zip(rows, values, strict=True) if name in row["vector"]
        ]
        reach[name] = max((float(np.quantile(a, 0.99)) for a in away), default=0.0) or 1.0
    panels = []
    captions = []
    for row, moving in zip(rows, values, strict=True):
        name = row["vector"]
        order = np.argsort(moving[-1] - moving[0], kind="stable")
        picked = order[np.linspace(0, len(order) - 1, POINTS).round().astype(int)]
        heights = (moving[:, picked].T - centres[name]) / reach[name]
        panels.append(pictures.diverging(heights))
        captions.append(f"{row['branch']}.{row['layer']} {row['norm']} {name}")
    lines = [
        f"{target.generator.name}: TD-LN over time. Each panel: branch.layer, norm, vector; "
        "channels down, sorted by how they move; noise left, data right",
        f"gamma: white 1, red 1 + {reach['gamma']:.2g}, blue 1 - {reach['gamma']:.2g}; "
        f"beta: white 0, red {reach['beta']:.2g}, blue -{reach['beta']:.2g}",
    ]
    columns = sum(row["branch"] == 1 and row["layer"] == rows[0]["layer"] for row in rows) * 2
    grid = pictures.grid(panels, captions, columns=columns, tile=2 * POINTS)
    return pictures.titled(grid, lines)


def time_lines(found: dict) -> str:
    """What `time_dependence` found, for people."""
    lines = ["how far each vector moves from noise to data, on average over channels"]
    for row in found["vectors"]:
        lines.append(
            f"branch {row['branch']}, layer {row['layer']:2}, {row['norm']:5} "
            f"{LETTERS[row['vector']]}: moves by {row['moved']:.3f}; first component explains "
            f"{row['explained'][0]:.1%}"
        )
    lines.append(f"to look at: {found['picture']}; numbers: {found['json']}")
    return "\n".join(lines)
