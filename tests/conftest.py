"""What every test shares: the checkout on the path, `dimr` as a process, digits, a trained run."""

import functools
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# before PyTorch: sums depend on the number of threads in their last bits
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
# what tests start runs what is installed, as a user's does
os.environ.pop("PYTHONPATH", None)

# torchvision (imported by torch-fidelity, pytorch-fid and timm, our oracles) registers fake kernels
# for two of its compiled operators on import; beside a CPU build of torch they don't exist, so
# define their names.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# options of a network and a run that take seconds
SMALL = shlex.split("""
    --variant demo --layers 3,2 --dims 16,8 --heads 2 --batch-size 16 --steps 12 --warmup 2
    --save-every 4 --keep 0 --sample-every 0 --workers 0 --device cpu
""")


def relative(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖."""
    ours = ours.detach().double()
    theirs = theirs.detach().double()
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
        pixels = np.round(data.images[i] * 15.9).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory):
    """A run folder of a small network after 12 steps, checkpoints at 4, 8 and 12."""
    out = tmp_path_factory.mktemp("trained") / "small"
    dimr_command("train", "--data", digits, "--out", out, *SMALL)
    return out


def dimr_command(*arguments, cwd=None, env=None, check=True, torchrun=None, timeout=300):
    """Run `dimr …` as a process of its own, under torchrun with that many processes if asked."""
    refuse_another_installation()
    command = [sys.executable, "-m"]
    if torchrun:
        command += ["torch.distributed.run", "--nproc-per-node", torchrun]
        command += ["--master-port", free_port(), "-m"]
    command += ["cli", *arguments]
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd or tempfile.gettempdir(),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@functools.cache
def refuse_another_installation():
    """Processes run what is installed: that has to be this checkout."""
    code = "import ours; print(ours.HERE)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tempfile.gettempdir(), capture_output=True, text=True
    )
    if done.stdout.strip() != str(ROOT):
        pytest.exit(f"these tests start processes: pip install -e '{ROOT}[demo,test]' first", 1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
