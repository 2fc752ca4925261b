"""What every test shares: the repository on the path, two torchvision operators, quiet threads."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before PyTorch: sums depend on the number of threads in their last bits

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
    os.pathsep
)

# torchvision (imported by torch-fidelity, pytorch-fid and timm, our oracles) registers fake kernels
# for two of its compiled operators on import; beside a CPU build of torch they don't exist, so
# define their names.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def relative(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Real handwritten digits as an image folder: 10 classes, 200 grey 8 × 8 PNGs."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for i in range(200):
        folder = root / str(data.target[i])
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.round(data.images[i] * 15.9).astype(np.uint8)).save(
            folder / f"{i:04d}.png"
        )
    return root


SMALL = [
    "--variant",
    "demo",
    "--layers",
    "3,2",
    "--dims",
    "16,8",
    "--heads",
    "2",
    "--batch-size",
    "16",
    "--steps",
    "12",
    "--save-every",
    "4",
    "--sample-every",
    "0",
    "--workers",
    "0",
    "--warmup",
    "2",
    "--keep",
    "0",
    "--device",
    "cpu",
]


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """A run folder of a small network after 12 steps, checkpoints at 4, 8 and 12."""
    out = tmp_path_factory.mktemp("trained") / "small"
    dimr_command("train", "--data", digits, "--out", out, *SMALL)
    return out


def dimr_command(*arguments, cwd=None, env=None, check=True, torchrun=None, timeout=300):
    """Run `dimr …` as a process of its own, under torchrun with that many processes if asked."""
    launcher = [sys.executable, "-m"]
    if torchrun:
        launcher += [
            "torch.distributed.run",
            "--nproc-per-node",
            str(torchrun),
            "--master-port",
            str(free_port()),
            "-m",
        ]
    done = subprocess.run(
        [*launcher, "cli", *map(str, arguments)],
        cwd=cwd or tempfile.gettempdir(),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
