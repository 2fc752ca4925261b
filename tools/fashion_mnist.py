"""Fashion-MNIST as image folders, and a judgement of what was drawn after training on them.

    apt-get install dataset-fashion-mnist             # Debian: 60,000 + 10,000 real 28 × 28 images
    python tools/fashion_mnist.py write data/fashion  # -> data/fashion/{train,test}/CLASS/*.png
    dimr train --data data/fashion/train --steps 3500
    dimr sample --balanced -n 1000 --out samples/fashion.npz
    python tools/fashion_mnist.py judge data/fashion samples/fashion.npz

Images are padded to 32 × 32."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset
import digits_demo

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = [
    "0 T-shirt",
    "1 Trouser",
    "2 Pullover",
    "3 Dress",
    "4 Coat",
    "5 Sandal",
    "6 Shirt",
    "7 Sneaker",
    "8 Bag",
    "9 Ankle boot",
]


def idx(name, header, source=SOURCE):
    return np.frombuffer(gzip.decompress((source / name).read_bytes()), np.uint8, offset=header)


def write(out):
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = np.pad(
            idx(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2))
        )
        for i, (image, label) in enumerate(
            zip(images, idx(f"{prefix}-labels-idx1-ubyte.gz", 8), strict=True)
        ):
            path = out / split / CLASSES[label] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def read(folder):
    """All images and labels of a folder, in an order that a seed decides: the folder is sorted by
    class."""
    data = dataset.open_data(folder)
    images, labels = data.batch(range(len(data)), np.zeros(len(data), bool))
    order = np.random.default_rng(0).permutation(len(data))
    return digits_demo.Digits(images.numpy()[order], labels.numpy()[order], order)


def judge(out, samples):
    with np.load(samples) as arrays:
        made = digits_demo.Digits(arrays["arr_0"][..., 0], arrays["arr_1"], None)
    figures = digits_demo.judge(read(out / "test"), made, read(out / "train").images)
    print(json.dumps(figures))


if __name__ == "__main__":
    {"write": write, "judge": judge}[sys.argv[1]](*map(Path, sys.argv[2:]))
