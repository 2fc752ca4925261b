"""How much generated images are distorted (paper, Sec. 5.3): a classifier marks the images of low
fidelity, people look at those, and the distortion rate is what they say.

The classifier is ViT-B/16 (Dosovitskiy et al., arXiv:2010.11929) under timm's weight names. Its
preprocessing is that of timm's `augreg` weights: bicubic with antialiasing to ⌊224 / 0.9⌋ = 248
pixels, centre crop to 224, [-1, 1]."""

import ours

import csv
import statistics
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student
from tqdm import tqdm

import dataset
import downloads
import imagenet_names
import imagesets
import pictures
import vit
from storage import UserError, load_tensors, sha256, writing

THRESHOLD = 0.2  # an intended class less probable than this marks low fidelity
SHEET = 64  # images on a contact sheet
CONFIDENCE = 0.95
TRUTHS = {"1": True, "0": False, "yes": True, "no": False, "true": True, "false": False}
BATCH_SIZE = {"cuda": 256, "mps": 32, "cpu": 16}


# ------------------------------------------------------------------------------------- low fidelity


def mark(images, classifier, digest, out, threshold=THRESHOLD, batch_size=None, quiet=False):
    """Mark those of `images` (imagesets) whose intended class has a probability under `threshold`.

    Writes into folder `out` marked.csv (image, class, name, probability) and contact sheets of the
    marked ones. Returns a dict with their `share` and a row per class. Raises UserError where the
    intended classes are not known."""
    labels, known, out = images.labels, classifier.head.out_features, Path(out)
    if labels is None:
        raise UserError(
            f"{images.path} doesn't say which class each image was meant to show; "
            "expected what sample "
            "wrote, an .npz with arr_1, or one folder per class"
        )
    own = images.about.get("num_classes", known)
    if labels.max() >= known or own != known:
        raise UserError(
            f"{images.path} shows class {labels.max()} of {own} and the classifier knows {known}; "
            "use one of the same classes (--classifier)"
        )
    device = classifier.head.weight.device
    size = batch_size or BATCH_SIZE[device.type]
    stretches = [
        np.arange(first, min(first + size, len(images))) for first in range(0, len(images), size)
    ]
    probabilities, waiting, sheets = np.empty(len(images)), [], []

    def flush():
        captions = [f"{probabilities[i]:.2f} {name_of(labels[i], known)}" for i, _ in waiting]
        sheets.append(str(out / f"sheet-{len(sheets):04d}.png"))
        pictures.save(pictures.grid([image for _, image in waiting], captions), sheets[-1])
        waiting.clear()

    workers = imagesets.workers(images, size)
    batches = dataset.loader(images, ((stretch, None) for stretch in stretches), workers)
    with (
        torch.inference_mode(),
        tqdm(total=len(images), desc="classifying", unit="img", disable=quiet or None) as bar,
    ):
        for stretch, (pixels, *_) in zip(stretches, batches, strict=True):
            logits = classifier(vit.prepare(pixels, classifier.side).to(device))
            probabilities[stretch] = logits.softmax(1).cpu()[range(len(stretch)), labels[stretch]]
            for i in stretch[probabilities[stretch] < threshold]:
                waiting.append((i, pixels[i - stretch[0]].numpy()))
                if len(waiting) == SHEET:
                    flush()
            bar.update(len(stretch))
    if waiting:
        flush()
    low = probabilities < threshold
    with writing(out / "marked.csv", "w") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", "class", "name", "probability"])
        for i in np.flatnonzero(low):
            rows.writerow(
                [images.name(i), labels[i], name_of(labels[i], known), f"{probabilities[i]:.4f}"]
            )
    counts, marked = np.bincount(labels), np.bincount(labels, weights=low)
    classes = [
        {
            "class": int(c),
            "name": name_of(c, known),
            "images": int(counts[c]),
            "marked": int(marked[c]),
            "share": float(marked[c] / counts[c]),
        }
        for c in np.flatnonzero(counts)
    ]
    return {
        "share": float(low.mean()),
        "marked": int(low.sum()),
        "images": len(images),
        "threshold": threshold,
        "source": str(images.path),
        "classifier_sha256": digest,
        "out": str(out),
        "sheets": sheets,
        "classes": classes,
    }


def load(source="vit-b16", device="cpu"):
    """(classifier, SHA-256 of its file) from a name or a path. Raises UserError."""
    path = downloads.find(source)
    try:
        return vit.from_state_dict(load_tensors(path)[0]).to(device), sha256(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def name_of(index, classes):
    """The first of ImageNet's names for a class of its 1000, else the number."""
    return imagenet_names.CLASSES[index][1][0] if classes == 1000 else str(index)


def table(result, rows=20):
    """The result of `mark` for people: the share, and the classes that fare worst."""
    worst = sorted(result["classes"], key=lambda row: (-row["share"], row["class"]))
    marked = f"{result['marked']:,} of {result['images']:,} images ({result['share']:.1%})"
    lines = [
        f"{marked} have low fidelity: their class has a probability under {result['threshold']:g}",
        f"{'class':>6}  {'name':30} {'marked':>7} {'of':>6} {'share':>7}",
    ]
    lines += [
        f"{row['class']:6}  {row['name'][:30]:30} {row['marked']:7} {row['images']:6} "
        f"{row['share']:7.1%}"
        for row in worst[:rows]
    ]
    if len(worst) > rows:
        lines.append(f"        … and {len(worst) - rows} more classes; --json lists all")
    lines.append(
        f"marked images: {result['out']}/marked.csv and {len(result['sheets'])} contact "
        "sheets beside it"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- distortion rate


def distortion(path):
    """The distortion rate that people's votes give: the mean over people of the share of images
    they call distorted.

    `path`: CSV with the columns image, person, distorted (1/0, yes/no, true/false). The interval is
    Student's t over people, who are few; None for one person. Returns a dict. Raises UserError
    naming the line at fault."""
    votes = {}  # person → image → distorted
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if missing := {"image", "person", "distorted"} - set(rows.fieldnames or ()):
                missing = ", ".join(sorted(missing))
                raise UserError(
                    f"{path} lacks the column {missing}; expected image, person, distorted"
                )
            for row in rows:
                image, person, vote = (
                    (row[name] or "").strip() for name in ("image", "person", "distorted")
                )
                if not image or not person or vote.lower() not in TRUTHS:
                    found = f"image {image!r}, person {person!r}, distorted {vote!r}"
                    raise UserError(
                        f"{path}, line {rows.line_num}: {found}; expected a name, a "
                        "name, and one of "
                        f"{', '.join(TRUTHS)}"
                    )
                if image in votes.setdefault(person, {}):
                    raise UserError(
                        f"{path}, line {rows.line_num}: {person} has judged {image} "
                        "before; keep one vote"
                    )
                votes[person][image] = float(TRUTHS[vote.lower()])
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; expected a CSV with the columns image, person, distorted"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8 ({error})") from None
    if not votes:
        raise UserError(f"{path} holds no votes; expected a line per image and person")
    shares = {person: statistics.mean(judged.values()) for person, judged in votes.items()}
    rate, people, interval = statistics.mean(shares.values()), len(shares), None
    if people > 1:
        error = statistics.stdev(shares.values()) / people**0.5
        reach = float(student.ppf((1 + CONFIDENCE) / 2, people - 1)) * error
        interval = [max(0.0, rate - reach), min(1.0, rate + reach)]
    return {
        "distortion_rate": rate,
        "interval": interval,
        "confidence": CONFIDENCE,
        "people": shares,
        "images": len(set().union(*votes.values())),
        "votes": sum(map(len, votes.values())),
    }
