"""How much generated images are distorted (paper, Sec. 5.3): a classifier (ViT-B/16, vit.py) marks
the images of low fidelity, people look at those, and the distortion rate is what they say."""

import ours

import csv
import dataclasses
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
COLUMNS = ("image", "person", "distorted")  # of votes
CONFIDENCE = 0.95
TRUTHS = {"1": True, "0": False, "yes": True, "no": False, "true": True, "false": False}
BATCH_SIZE = {"cuda": 256, "mps": 32, "cpu": 16}


# ------------------------------------------------------------------------------------- low fidelity


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network and what tells it apart."""

    network: vit.ViT
    sha256: str  # of its file

    @property
    def classes(self) -> int:
        return self.network.head.out_features

    @property
    def device(self) -> torch.device:
        return self.network.head.weight.device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, classes) on the CPU of images uint8 (N, H, W, 3) there."""
        x = vit.prepare(images, self.network.side).to(self.device)
        return self.network(x).softmax(1).cpu()


def load(source: str | Path = "vit-b16", device: str | torch.device = "cpu") -> Classifier:
    """The classifier from a name or a path. Raises UserError."""
    path = downloads.find(source)
    try:
        network = vit.from_state_dict(load_tensors(path)[0])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return Classifier(network.to(device), sha256(path))


def mark(
    images,
    classifier: Classifier,
    out: str | Path,
    *,
    threshold: float = THRESHOLD,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict:
    """Mark those of `images` (imagesets) whose intended class has a probability under `threshold`.

    Writes into folder `out` marked.csv (image, class, name, probability) and contact sheets of the
    marked ones. Returns a dict with their `share` and a row per class. Raises UserError where the
    intended classes are not known."""
    check_classes(images, classifier.classes)
    marking = Marking(images, classifier, Path(out), threshold)
    size = batch_size or BATCH_SIZE[classifier.device.type]
    firsts = range(0, len(images), size)
    stretches = [np.arange(first, min(first + size, len(images))) for first in firsts]
    workers = imagesets.workers(images, size)
    batches = dataset.loader(images, ((stretch, None) for stretch in stretches), workers)
    bar = tqdm(total=len(images), desc="classifying", unit="img", disable=quiet or None)
    with torch.inference_mode(), bar:
        for stretch, (pixels, *_) in zip(stretches, batches, strict=True):
            marking.add(stretch, pixels, classifier(pixels))
            bar.update(len(stretch))
    return marking.finish()


def check_classes(images, known: int):
    """Raise UserError unless it is said which of a classifier's `known` classes each image was
    meant to show."""
    if images.labels is None:
        raise UserError(
            f"{images.path} doesn't say which class each image was meant to show; expected what "
            "sample wrote, an .npz with arr_1, or one folder per class"
        )
    own = images.about.get("num_classes", known)
    if images.labels.max() >= known or own != known:
        raise UserError(
            f"{images.path} shows class {images.labels.max()} of {own} and the classifier knows "
            f"{known}; use one of the same classes (--classifier)"
        )


class Marking:
    """Probabilities of the intended classes, and files that show the low ones."""

    def __init__(self, images, classifier, out, threshold):
        self.images = images
        self.labels = images.labels
        self.classifier = classifier
        self.out = out
        self.threshold = threshold
        self.probabilities = np.empty(len(images))
        self.waiting = []  # (number, image) for the next sheet
        self.sheets = []  # paths

    def add(self, numbers, pixels, probabilities):
        """Take in the probabilities (B, classes) of the images `numbers`, uint8 (B, H, W, 3)."""
        intended = probabilities[range(len(numbers)), self.labels[numbers]].numpy()
        self.probabilities[numbers] = intended
        for row in np.flatnonzero(self.probabilities[numbers] < self.threshold):
            self.waiting.append((numbers[row], pixels[row].numpy()))
            if len(self.waiting) == SHEET:
                self._write_sheet()

    def _write_sheet(self):
        captions = [f"{self.probabilities[i]:.2f} {self._name(i)}" for i, _ in self.waiting]
        path = self.out / f"sheet-{len(self.sheets):04d}.png"
        pictures.save(pictures.grid([image for _, image in self.waiting], captions), path)
        self.sheets.append(str(path))
        self.waiting.clear()

    def _name(self, i):
        return name_of(self.labels[i], self.classifier.classes)

    def finish(self):
        """Write the last sheet and marked.csv; returns what `mark` does."""
        if self.waiting:
            self._write_sheet()
        low = self.probabilities < self.threshold
        self._write_csv(np.flatnonzero(low))
        return {
            "share": float(low.mean()),
            "marked": int(low.sum()),
            "images": len(self.images),
            "threshold": self.threshold,
            "source": str(self.images.path),
            "classifier_sha256": self.classifier.sha256,
            "out": str(self.out),
            "sheets": self.sheets,
            "classes": self._by_class(low),
        }

    def _write_csv(self, numbers):
        with writing(self.out / "marked.csv", "w") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["image", "class", "name", "probability"])
            for i in numbers:
                probability = f"{self.probabilities[i]:.4f}"
                rows.writerow([self.images.name(i), self.labels[i], self._name(i), probability])

    def _by_class(self, low):
        counts = np.bincount(self.labels)
        marked = np.bincount(self.labels, weights=low)
        return [
            {
                "class": int(c),
                "name": name_of(c, self.classifier.classes),
                "images": int(counts[c]),
                "marked": int(marked[c]),
                "share": float(marked[c] / counts[c]),
            }
            for c in np.flatnonzero(counts)
        ]


def name_of(index: int, classes: int) -> str:
    """The first of ImageNet's names for a class of its 1000, else the number."""
    if classes == 1000:
        return imagenet_names.CLASSES[index][1][0]
    return str(index)


def table(result: dict, rows: int = 20) -> str:
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


def distortion(path: str | Path) -> dict:
    """The distortion rate that people's votes give: the mean over people of the share of images
    they call distorted.

    `path`: CSV with the columns image, person, distorted (1/0, yes/no, true/false). The interval is
    Student's t over people, who are few; None for one person. Returns a dict. Raises UserError
    naming the line at fault."""
    votes = read_votes(path)
    shares = {person: statistics.mean(judged.values()) for person, judged in votes.items()}
    rate = statistics.mean(shares.values())
    return {
        "distortion_rate": rate,
        "interval": _interval(rate, shares.values()),
        "confidence": CONFIDENCE,
        "people": shares,
        "images": len(set().union(*votes.values())),
        "votes": sum(map(len, votes.values())),
    }


def _interval(rate, shares):
    """Student's t around the mean of these shares, cut at 0 and 1."""
    if len(shares) < 2:
        return None
    error = statistics.stdev(shares) / len(shares) ** 0.5
    reach = float(student.ppf((1 + CONFIDENCE) / 2, len(shares) - 1)) * error
    return [max(0.0, rate - reach), min(1.0, rate + reach)]


def read_votes(path: str | Path) -> dict[str, dict[str, float]]:
    """person → image → 1.0 if distorted, else 0.0. Raises UserError naming the line at fault."""
    votes = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for place, image, person, vote in _votes(path, csv.DictReader(file)):
                judged = votes.setdefault(person, {})
                if image in judged:
                    raise UserError(f"{place}: {person} has judged {image} before; keep one vote")
                judged[image] = float(vote)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; expected a CSV with the columns {', '.join(COLUMNS)}"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8 ({error})") from None
    if not votes:
        raise UserError(f"{path} holds no votes; expected a line per image and person")
    return votes


def _votes(path, rows):
    """Yield (place in the file, image, person, whether distorted)."""
    lacking = sorted(set(COLUMNS) - set(rows.fieldnames or ()))
    if lacking:
        raise UserError(
            f"{path} lacks the column {', '.join(lacking)}; expected {', '.join(COLUMNS)}"
        )
    for row in rows:
        place = f"{path}, line {rows.line_num}"
        image, person, vote = [(row[name] or "").strip() for name in COLUMNS]
        if not image or not person or vote.lower() not in TRUTHS:
            raise UserError(
                f"{place}: image {image!r}, person {person!r}, distorted {vote!r}; expected a "
                f"name, a name, and one of {', '.join(TRUTHS)}"
            )
        yield place, image, person, TRUTHS[vote.lower()]
