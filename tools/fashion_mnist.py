"""Fashion-MNIST as image folders, and a judgement of what was drawn after training on them.

    apt-get install dataset-fashion-mnist             # Debian: 60,000 + 10,000 real 28 × 28 images
    python tools/fashion_mnist.py write data/fashion  # -> data/fashion/{train,test}/CLASS/*.png
    dimr train --data data/fashion/train --steps 3500
    dimr sample --balanced -n 1000 --out samples/fashion.npz
    python tools/fashion_mnist.py judge data/fashion samples/fashion.npz

Images are padded to 32 × 32. A classifier that learned from the real ones, whose features stand in
for Inception's in `dimr eval` and `dimr sweep`, started in the checkout:

    python tools/fashion_mnist.py learn data/fashion --res 16   # -> classifier-16.safetensors there
    FASHION=data/fashion dimr eval fid --features tools.fashion_mnist:features a.npz b.npz"""

import functools
import gzip
import json
import math
import os
import sys
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import averages
import averaging
import dataset
import digits_demo
import journal
import runfolder
import storage

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
    help=__doc__.replace("\n\n    ", "\n\n\b\n    "),
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


def read(folder, res=None):
    """All images (N, side, side) and labels of a folder, cropped to `res` if that is given, in an
    order that a seed decides: the folder is sorted by class."""
    data = dataset.open_data(folder, res, 1)
    images, labels = data.batch(range(len(data)), np.zeros(len(data), bool))
    order = np.random.default_rng(0).permutation(len(data))
    return digits_demo.Digits(images.numpy()[order, 0], labels.numpy()[order], order)


# -------------------------------------------------------------------------------- the classifier

WIDTHS = (32, 64, 128)
FEATURES = 64
EPOCHS = 6
BATCH = 128


class Classifier(nn.Module):
    """Three convolutions, their mean over the image, FEATURES numbers, ten logits."""

    def __init__(self):
        super().__init__()
        layers = []
        channels = 1
        for stride, width in zip((1, 2, 2), WIDTHS, strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels, FEATURES)
        self.out = nn.Linear(FEATURES, len(CLASSES))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, FEATURES) of uint8 images (N, side, side)."""
        x = images[:, None].float() / 127.5 - 1
        return functional.relu(self.hidden(self.convolutions(x).mean((2, 3))))

    def forward(self, images):
        return self.out(self.features(images))


def classifier_path(folder, res) -> Path:
    return Path(folder) / f"classifier-{res}.safetensors"


@functools.cache
def load_classifier(folder, res):
    """The classifier that `learn` wrote for images of side `res`."""
    path = classifier_path(folder, res)
    if not path.is_file():
        raise click.ClickException(
            f"no {path}; make it with: python tools/fashion_mnist.py learn {folder} --res {res}"
        )
    classifier = Classifier()
    classifier.load_state_dict(storage.load_tensors(path)[0])
    return classifier.eval()


def features(images):
    """For --features: (N, FEATURES) of images (N, side, side, 3), by the classifier in the folder
    that the environment variable FASHION names."""
    folder = os.environ.get("FASHION", "data/fashion")
    classifier = load_classifier(folder, images.shape[1]).to(images.device)
    with torch.no_grad():
        return classifier.features(images[..., 0])


def recognised(classifier, images, labels) -> float:
    """Share of images (N, side, side), uint8, that it takes for what they should be."""
    with torch.no_grad():
        found = [classifier(part).argmax(1) for part in torch.as_tensor(images).split(1000)]
    return float((torch.cat(found).numpy() == labels).mean())


@main.command("learn")
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--res", default=32, show_default=True, help="Side of the images.")
def learn(folder, res):
    """Train a classifier on FOLDER/train and say how it does on FOLDER/test."""
    torch.manual_seed(0)
    train = read(folder / "train", res)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=1e-2)
    steps = math.ceil(EPOCHS * len(train.images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draw = np.random.default_rng(0)
    for _ in tqdm(range(steps), "classifier", unit="step"):
        chosen = draw.integers(len(train.images), size=BATCH)
        images = torch.from_numpy(train.images[chosen])
        loss = functional.cross_entropy(classifier(images), torch.from_numpy(train.labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()
    storage.save_tensors(classifier_path(folder, res), classifier.state_dict(), {"res": str(res)})
    test = read(folder / "test", res)
    share = recognised(classifier, test.images, test.labels)
    click.echo(f"{share:.4f} of test images recognised -> {classifier_path(folder, res)}")


# ---------------------------------------------------------------------------- the one that ships


@main.command("pack")
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--width", type=float, required=True, help="Of the average of RUN's weights.")
@click.option("--cfg", type=float, required=True, help="Guidance that it advises.")
@click.option("--cfg-interval", type=(float, float), help="Within which noise levels.")
def pack(run, out, width, cfg, cfg_interval):
    """Write an average of RUN's weights to OUT.safetensors, in half precision, with clean class
    names and the guidance to draw with; and to OUT.json how it was trained."""
    made = averaging.rebuild(run, width)
    config = runfolder.read_config(run)
    classes = [name.partition(" ")[2] for name in made.record["classes"]]
    guidance = {"cfg": cfg}
    if cfg_interval:
        guidance["cfg_interval"] = cfg_interval
    record = {**made.record, "classes": classes, "guidance": guidance}
    tensors = averages.narrowed(made.model.state_dict(), "fp16")
    path = out.with_suffix(".safetensors")
    storage.save_tensors(path, tensors, runfolder.metadata(made.model.config, **record))
    written = {key: config[key] for key in ("config", "recipe", "device")}
    written["versions"] = {key: config["versions"][key] for key in ("dimr", "torch", "python")}
    written["images"] = {key: config["data"][key] for key in ("items", "res", "fingerprint")}
    written["step"] = record["step"]
    written["ema_width"] = width
    written["seconds"] = seconds(run, config["recipe"]["batch_size"])
    written["held_out"] = [
        {"step": line["step"], "loss": line["validation_loss"]}
        for line in journal.read_metrics(run)
        if "validation_loss" in line
    ]
    storage.write_json(out.with_suffix(".json"), written)
    click.echo(f"{path.stat().st_size:,} bytes -> {path}, {out.with_suffix('.json')}")


def seconds(run, batch):
    """That a run's steps took, of `batch` images each."""
    return round(sum(batch / line["images_per_second"] for line in journal.read_metrics(run)))


# -------------------------------------------------------------------------------------- the judge


@main.command("judge")
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("samples", type=click.Path(exists=True, path_type=Path))
@click.option("--record", type=click.Path(path_type=Path), help="Add it to what pack wrote there.")
def judge_command(folder, samples, record):
    """How good the images in SAMPLES, an .npz, are by the real ones in FOLDER, as JSON."""
    found = judge(folder, samples)
    print(json.dumps(found))
    if record:
        storage.write_json(record, {**storage.read_json(record), "judged": found})


def judge(out, samples):
    """The demo's figures of samples, by the real images that `write` wrote; and the share that the
    classifier recognises, if `learn` made one."""
    with np.load(samples) as arrays:
        made = digits_demo.Digits(arrays["arr_0"][..., 0], arrays["arr_1"], None)
    res = made.images.shape[1]
    test = read(out / "test", res)
    found = digits_demo.judge(test, made, read(out / "train", res).images)
    found["samples"] = len(made.images)
    if classifier_path(out, res).is_file():
        classifier = load_classifier(out, res)
        found["classifier_real"] = recognised(classifier, test.images, test.labels)
        found["classifier_generated"] = recognised(classifier, made.images, made.labels)
    return found


if __name__ == "__main__":
    main()
