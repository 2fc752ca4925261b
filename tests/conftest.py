"""What every test shares: the repository on the path, two torchvision operators, quiet threads."""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

# torchvision (imported by torch-fidelity, pytorch-fid and timm, our oracles) registers fake kernels for two
# of its compiled operators on import; beside a CPU build of torch they don't exist, so define their names.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def relative(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())
