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

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

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


def idx(source, name, header):
    path = source / name
    if not path.is_file():
        raise click.ClickException(
            f"no {path}: expected Fashion-MNIST as Debian's package dataset-fashion-mnist has it; "
            "install that, or give the folder with --source"
        )
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


@click.group(
    help=__doc__.replace("\n\n    apt", "\n\n\b\n    apt"),
    context_settings={"max_content_width": 100},
)
def main():
    pass


@main.command("write")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), default=SOURCE, show_default=True)
def write(out, source):
    """Write 70,000 PNGs to OUT/train/CLASS and OUT/test/CLASS."""
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = idx(source, f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        labels = idx(source, f"{prefix}-labels-idx1-ubyte.gz", 8)
        for name in CLASSES:
            (out / split / name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(tqdm(images, split, unit="img")):
            Image.fromarray(image).save(out / split / CLASSES[labels[i]] / f"{i:05d}.png")
    click.echo(f"70,000 images of 10 classes -> {out}")


def read(folder):
    """All images and labels of a folder, in an order that a seed decides: the folder is sorted by
    class."""
    data = dataset.open_data(folder)
    images, labels = data.batch(range(len(data)), np.zeros(len(data), bool))
    order = np.random.default_rng(0).permutation(len(data))
    return digits_demo.Digits(images.numpy()[order], labels.numpy()[order], order)


@main.command("judge")
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("samples", type=click.Path(exists=True, path_type=Path))
def judge_command(folder, samples):
    """How good the images in SAMPLES, an .npz, are by the real ones in FOLDER, as JSON."""
    print(json.dumps(judge(folder, samples)))


def judge(out, samples):
    """The demo's figures of samples, by the real images that `write` wrote."""
    with np.load(samples) as arrays:
        made = digits_demo.Digits(arrays["arr_0"][..., 0], arrays["arr_1"], None)
    return digits_demo.judge(read(out / "test"), made, read(out / "train").images)


if __name__ == "__main__":
    main()
