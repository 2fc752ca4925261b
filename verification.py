"""Does this machine compute what ours did? The whole path of `dimr eval` on a few images that come
with the tool and an Inception network whose weights are random bits, stage by stage. The first
thing to ask of a strange number.

Everything that goes in is exact: the bits are Philox's, and each stage after the network's takes
its input from them, so that a stage answers for itself. What ours gave lies in
share/dimr/verify.json, which `expected` wrote."""

import ours

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

import dataset
import errors
import evaluation
import extraction
import fid
import imagesets
import parallel
from storage import read_json, write_json

IMAGES, EXPECTED = "verify.npz", "verify.json"  # shipped
SEED = 14
# of metrics; an image on the edge of a ball may fall to either side
TOLERANCES = {"fid": 1e-6, "sfid": 1e-6, "is": 1e-6, "pr": 0.01, "kid": 1e-4}
SHOWN = 16  # numbers of a stage that are kept to compare
EQUAL, ROUNDING, DIFFERENT = "bit-equal", "to rounding", "DIFFERENT"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage gave: an array, and how far another machine's may lie from it, relative to its
    norm."""

    name: str
    values: np.ndarray
    tolerance: float  # 0 where nothing is rounded


def bits(stream: int, count: int) -> np.ndarray:
    """`count` random integers of 24 bits, int64, the same everywhere."""
    raw = np.random.Philox(key=(SEED << 64) + stream).random_raw(count)
    return (raw >> np.uint64(40)).astype(np.int64)


def uniform(stream: int, *shape: int) -> np.ndarray:
    """Exact numbers in [0, 1), float64."""
    return bits(stream, int(np.prod(shape))).reshape(shape) / 2.0**24


def weights() -> dict[str, torch.Tensor]:
    """Inception weights under pytorch-fid's names: filters that sum to 0 and keep the variance,
    batch norms that add a small bias."""
    found = {}
    with torch.device("meta"):
        network = fid.Inception()
    convolutions = [(n, m) for n, m in network.named_modules() if isinstance(m, fid.Conv)]
    for stream, (name, module) in enumerate(convolutions):
        shape = tuple(module.weight.shape)
        count = int(np.prod(shape[1:]))
        drawn = bits(stream, int(np.prod(shape))).reshape(shape[0], count)
        drawn -= drawn.sum(1, keepdims=True) // count  # integers: exact
        scale = (24 / count) ** 0.5 / 2.0**24
        found[f"{name}.conv.weight"] = _tensor(drawn.reshape(shape) * scale)
        bias = uniform(1000 + stream, shape[0]) / 2 - 0.25
        for part, value in zip(fid.NORM, (1.0, bias, 0.0, 1.0 - fid.EPS), strict=True):
            found[f"{name}.{part}"] = _tensor(np.broadcast_to(value, shape[0]).copy())
    logits = uniform(2000, fid.LOGITS, fid.POOL) - 0.5
    found["fc.weight"] = _tensor(logits / 8)
    found["fc.bias"] = torch.zeros(fid.LOGITS)
    return found


def _tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def features(stream: int, count: int, dim: int = 64) -> torch.Tensor:
    """Rows (count, dim) float32 that look a little like features: positive, each number of its own
    scale."""
    return _tensor(uniform(stream, count, dim) ** 2 * np.linspace(0.2, 1, dim))


def stages(device: str | torch.device = "cpu") -> Iterator[Stage]:
    """What this machine makes of it, in the order of `dimr eval`."""
    device = torch.device(device)
    images = imagesets.Npz(ours.shipped(IMAGES))
    pixels = images.batch(range(len(images)))[0]
    yield Stage("reading images", pixels.numpy(), 0)
    large = Image.fromarray((bits(3000, 150 * 110 * 3) >> 16).astype(np.uint8).reshape(150, 110, 3))
    cropped = np.asarray(dataset.center_crop(large, 32))
    yield Stage("cropping as ADM does", cropped, 0.006)  # by 1 of 255, as Pillows differ
    pixels = pixels.to(device)
    yield Stage("resizing as TensorFlow 1 does", fid.resize(pixels, fid.SIDE).cpu().numpy(), 1e-6)
    random = weights()
    yield Stage("weights", np.concatenate([w.numpy().ravel() for w in random.values()]), 0)
    network = fid.from_state_dict(random).to(device)
    extractor = extraction.Extractor(network, device, "random bits", "", cached=False)
    names = ("pool features", "spatial features", "logits")
    for name, found in zip(names, extractor(pixels), strict=True):
        yield Stage(name, found.cpu().numpy(), 1e-4)
    yield from numbers(device)


def numbers(device: torch.device) -> Iterator[Stage]:
    """Statistics and metrics of exact features."""
    samples, reference = [_measured(stream) for stream in (4000, 5000)]
    moments = torch.cat([samples.mean[None], samples.covariance])
    yield Stage("mean and covariance", moments.numpy(), 1e-10)
    for name, tolerance in TOLERANCES.items():
        found = evaluation.estimates(name, samples, reference, device)
        values = [[one.value, one.error or 0.0] for one in found.values()]
        yield Stage(f"dimr eval {name}", np.array(values), tolerance)


def _measured(stream, count=200):
    """A Measured of exact features, which serve as spatial ones too; the Inception Score is of
    splits of 50."""
    rows = features(stream, count)
    statistics = fid.Statistics(rows.shape[1])
    statistics.add(rows)
    score = fid.InceptionScore(50)
    score.add(torch.from_numpy(uniform(stream + 1, count, 20) * 4), np.arange(count))
    moments = statistics.mean, statistics.covariance
    return extraction.Measured(
        source="exact",
        sha256="",
        size=None,
        count=count,
        extractor=extraction.STANDARD,
        identity="",
        mean=moments[0],
        covariance=moments[1],
        spatial_mean=moments[0],
        spatial_covariance=moments[1],
        features=rows,
        spatial=rows,
        score=score.value,
        scores=score.scores,
    )


# ------------------------------------------------------------------------------------ the judgement


def _facts(stage):
    """What is kept of a stage: its hash, its norm, and some of its numbers."""
    values = np.ascontiguousarray(stage.values)
    flat = values.ravel().astype(np.float64)
    chosen = np.linspace(0, flat.size - 1, min(SHOWN, flat.size)).astype(int)
    digest = hashlib.sha256(f"{values.dtype} {values.shape}".encode())
    digest.update(values)
    return {
        "stage": stage.name,
        "sha256": digest.hexdigest(),
        "norm": float(np.linalg.norm(flat)),
        "scale": float(np.abs(flat).max()),
        "values": flat[chosen].tolist(),
    }


def expected(path: str) -> None:
    """Write what this machine makes of it as what is to be expected."""
    machine = f"PyTorch {torch.__version__} on a CPU"
    write_json(path, {"machine": machine, "stages": [_facts(stage) for stage in stages()]})


def judge(stage: Stage, theirs: dict) -> tuple[str, float]:
    """(EQUAL, ROUNDING or DIFFERENT, relative difference) of a stage from what ours gave."""
    found = _facts(stage)
    if found["sha256"] == theirs["sha256"]:
        return EQUAL, 0.0
    if len(found["values"]) != len(theirs["values"]):
        return DIFFERENT, float("inf")
    apart = np.abs(np.subtract(found["values"], theirs["values"])).max() / theirs["scale"]
    apart = max(apart, abs(found["norm"] / theirs["norm"] - 1))
    within = np.isfinite(apart) and 0 <= apart <= stage.tolerance
    return (ROUNDING if within and stage.tolerance else DIFFERENT), float(apart)


def verify(device: str = "auto") -> dict:
    """Compare each stage with ours. A dict: `same` (whether none differs), the `stages` with
    verdict and relative difference, and the first at fault."""
    device = parallel.pick_device(device)
    theirs = read_json(ours.shipped(EXPECTED))
    rows = []
    for stage, expectation in zip(stages(device), theirs["stages"], strict=True):
        verdict, apart = judge(stage, expectation)
        rows.append({"stage": stage.name, "verdict": verdict, "difference": apart})
    wrong = [row["stage"] for row in rows if row["verdict"] == DIFFERENT]
    return {
        "same": not wrong,
        "first_different": wrong[0] if wrong else None,
        "stages": rows,
        "device": str(device),
        "blocks": errors.BLOCKS,
        "ours": theirs["machine"],
        "torch": torch.__version__,
    }


def lines(result: dict) -> str:
    """The result of `verify` for people."""
    width = max(len(row["stage"]) for row in result["stages"])
    found = []
    for row in result["stages"]:
        apart = f"  ({row['difference']:.1e})" if row["difference"] else ""
        found.append(f"{row['stage']:{width}}  {row['verdict']}{apart}")
    equal = sum(row["verdict"] == EQUAL for row in result["stages"])
    if result["same"]:
        found.append(
            f"this machine ({result['device']}, PyTorch {result['torch']}) computes what ours did "
            f"({result['ours']}): {equal} of {len(result['stages'])} stages bit-equal, the rest to "
            "rounding"
        )
    return "\n".join(found)
