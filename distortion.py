"""How much generated images are distorted (paper, Sec. 5.3): a classifier (ViT-B/16, vit.py) marks
the images of low fidelity, people look at those, and the distortion rate is what they say. Of
several sets at once the marked images are shuffled, and a key kept apart says whose each is."""

import ours

import csv
import dataclasses
import io
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit
from tqdm import tqdm

import dataset
import downloads
import imagenet_names
import imagesets
import parallel
import pictures
import vit
from storage import UserError, as_float32, load_tensors, read_text, sha256, writing

THRESHOLD = 0.2  # an intended class less probable than this marks low fidelity
SHEET = 64  # images on a contact sheet
COLUMNS = ("image", "person", "distorted")  # of votes
KEY = ("image", "set", "original", "class", "probability")  # columns of a key
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
        network = vit.from_state_dict(as_float32(path, load_tensors(path)[0]))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return Classifier(network.to(device), sha256(path))


def mark(
    images: imagesets.ImageSet,
    classifier: Classifier,
    out: str | Path,
    *,
    threshold: float = THRESHOLD,
    batch_size: int | None = None,
    show: "Sheets | Judging | None" = None,
    quiet: bool = False,
) -> dict:
    """Mark those of `images` (imagesets) whose intended class has a probability under `threshold`.

    Writes into folder `out` marked.csv (image, class, name, probability) and contact sheets of the
    marked ones, unless `show` takes these. Returns a dict with their `share` and a row per class.
    Raises UserError where the intended classes are not known."""
    check_classes(images, classifier.classes)
    marking = Marking(images, classifier, Path(out), threshold, show or Sheets(Path(out)))
    size = batch_size or BATCH_SIZE[classifier.device.type]
    at_once = min(size, len(images))
    parallel.check_memory(
        at_once * 3 * (images.size**2 + 4 * classifier.network.side**2),
        f"classifying {at_once:,} images at once",
        "give a smaller --batch-size",
        classifier.device,
    )
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
    own = images.record.get("num_classes", known)
    if images.labels.max() >= known or own != known:
        raise UserError(
            f"{images.path} shows class {images.labels.max()} of {own} and the classifier knows "
            f"{known}; use one of the same classes (--classifier)"
        )


class Sheets:
    """Contact sheets in folder `out`, written as they fill."""

    def __init__(self, out: Path):
        self.out = out
        self.waiting = []  # (image, caption) for the next one
        self.paths = []

    def add(self, image: np.ndarray, caption: str):
        self.waiting.append((image, caption))
        if len(self.waiting) == SHEET:
            self._write()

    def take(self, marking: "Marking", number: int, image: np.ndarray):
        """A marked image, under its probability and class."""
        self.add(image, f"{marking.probabilities[number]:.2f} {marking.class_name(number)}")

    def _write(self):
        images = [image for image, _ in self.waiting]
        captions = [caption for _, caption in self.waiting]
        path = self.out / f"sheet-{len(self.paths):04d}.png"
        pictures.save(pictures.grid(images, captions), path)
        self.paths.append(str(path))
        self.waiting.clear()

    def finish(self) -> list[str]:
        """Write what is left; returns the paths of all."""
        if self.waiting:
            self._write()
        return self.paths


class Marking:
    """Probabilities of the intended classes, and files that show the low ones."""

    def __init__(self, images, classifier, out, threshold, show):
        self.images = images
        self.labels = images.labels
        self.classifier = classifier
        self.out = out
        self.threshold = threshold
        self.show = show
        self.probabilities = np.empty(len(images))

    def add(self, numbers, pixels, probabilities):
        """Take in the probabilities (B, classes) of the images `numbers`, uint8 (B, H, W, 3)."""
        intended = probabilities[range(len(numbers)), self.labels[numbers]].numpy()
        self.probabilities[numbers] = intended
        for row in np.flatnonzero(self.probabilities[numbers] < self.threshold):
            self.show.take(self, numbers[row], pixels[row].numpy())

    def class_name(self, i):
        return name_of(self.labels[i], self.classifier.classes)

    def finish(self):
        """Write the last sheet and marked.csv; returns what `mark` does."""
        sheets = self.show.finish()
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
            "sheets": sheets,
            "classes": self._by_class(low),
        }

    def _write_csv(self, numbers):
        rows = []
        for i in numbers:
            probability = f"{self.probabilities[i]:.4f}"
            rows.append([self.images.name(i), self.labels[i], self.class_name(i), probability])
        write_rows(self.out / "marked.csv", ["image", "class", "name", "probability"], rows)

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


# ----------------------------------------------------------------------------- several sets at once


class Judging:
    """Marked images of several sets on their way to one shuffled set of contact sheets. They wait
    in a file without a name, since a model's 80,000 can have gigabytes of them."""

    def __init__(self, folder: Path, size: int):
        self.shape = (size, size, 3)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        self.rows = []  # of the key, without the first column
        self.captions = []
        self.set = None  # the name of the one that is being marked

    def take(self, marking: Marking, number: int, image: np.ndarray):
        name = marking.images.name(number)
        probability = f"{marking.probabilities[number]:.4f}"
        self.file.write(image.tobytes())
        self.rows.append((self.set, name, marking.labels[number], probability))
        self.captions.append(marking.class_name(number))

    def finish(self) -> list[str]:
        """A set's sheets: none of its own."""
        return []

    def image(self, k: int) -> np.ndarray:
        size = int(np.prod(self.shape))
        self.file.seek(k * size)
        return np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape)

    def shuffled(self, sheets: Sheets, key: Path, seed: int = 0) -> list[str]:
        """Write the sheets in an order that the seed decides, each image under its number and class
        and nothing else, and the key to whose it is. Returns the sheets' paths."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        rows = []
        for place, k in enumerate(order):
            label = f"i{place:05d}"  # a spreadsheet would cut a bare number's zeros
            sheets.add(self.image(k), f"{label} {self.captions[k]}")
            rows.append((label, *self.rows[k]))
        write_rows(key, KEY, rows)
        return sheets.finish()


def write_rows(path: Path, header, rows):
    """Write a CSV, whole or not at all."""
    with writing(path, "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def compare(
    sets: list,
    classifier: Classifier,
    out: str | Path | None = None,
    *,
    threshold: float = THRESHOLD,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict:
    """`mark` several sets (imagesets), and show all their marked images as the paper's judges saw
    them: in one shuffled set of contact sheets that names classes and not models.

    Writes into folder `out` marked.csv of each set, in a folder of its own, and the sheets; beside
    `out`, OUT-key.csv, which belongs to whoever counts the votes. Returns a dict with what `mark`
    returns of each. Raises UserError."""
    names = set_names([images.path for images in sets])
    sizes = {images.size for images in sets}
    if len(sizes) > 1:
        raise UserError(
            f"the sets hold images of {' and '.join(map(str, sorted(sizes)))} pixels, which would "
            "tell them apart; compare sets of one size"
        )
    for images in sets:
        check_classes(images, classifier.classes)
    out = Path(out or f"marked-{'-'.join(names)}")
    key = out.with_name(f"{out.name}-key.csv")
    out.mkdir(parents=True, exist_ok=True)
    judging = Judging(out, sizes.pop())
    marked = {}
    for name, images in zip(names, sets, strict=True):
        judging.set = name
        marked[name] = mark(
            images,
            classifier,
            out / name,
            threshold=threshold,
            batch_size=batch_size,
            show=judging,
            quiet=quiet,
        )
    sheets = judging.shuffled(Sheets(out), key)
    return {"sets": marked, "out": str(out), "sheets": sheets, "key": str(key)}


def set_names(paths: list) -> list[str]:
    """A short name for each path: its last part, or as many as it takes to tell all apart."""
    if len(set(paths)) < len(paths):
        raise UserError(
            f"{', '.join(map(str, paths))}: the same set is given twice; compare others"
        )
    parts = [Path(path).resolve().with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{', '.join(map(str, paths))} have the same name but for the ending; move one")


def comparison_table(result: dict) -> str:
    """The result of `compare` for people."""
    lines = [f"{'set':30} {'low fidelity':>12} {'of':>8} {'share':>7}"]
    for name, one in result["sets"].items():
        row = f"{name[:30]:30} {one['marked']:12,} {one['images']:8,} {one['share']:7.1%}"
        lines.append(row)
    lines.append(
        f"for the judges: {len(result['sheets'])} contact sheets in {result['out']}, shuffled; "
        f"keep {result['key']} from them until dimr eval distortion VOTES --key {result['key']}"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- distortion rate


def distortion(path: str | Path, key: str | Path | None = None) -> dict:
    """The distortion rate that people's votes give: the mean over people of the share of images
    they call distorted; with a `key` that `compare` wrote, of each set by itself under `sets`.

    `path`: CSV with the columns image, person, distorted (1/0, yes/no, true/false). The interval is
    Student's t over people, who are few; None for one person. Returns a dict. Raises UserError
    naming the line at fault."""
    votes = read_votes(path)
    found = rate_of(votes)
    if key is None:
        return found
    owners = read_key(key)
    strange = sorted(set().union(*votes.values()) - owners.keys())
    if strange:
        raise UserError(
            f"{path} judges {strange[0]}, which {key} doesn't know ({len(strange)} such images); "
            "give the key that was written with the contact sheets"
        )
    found["sets"] = {}
    for name in dict.fromkeys(owners.values()):
        own = {}
        for person, judged in votes.items():
            theirs = {image: vote for image, vote in judged.items() if owners[image] == name}
            if theirs:
                own[person] = theirs
        found["sets"][name] = rate_of(own) if own else None
    return found


def rate_of(votes: dict[str, dict[str, float]]) -> dict:
    """The distortion rate of votes, person → image → 1.0 or 0.0, with its interval."""
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


def read_key(path: str | Path) -> dict[str, str]:
    """Image → set, of a key that `compare` wrote. Raises UserError."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except (UserError, csv.Error) as error:
        raise UserError(f"{path} can't be read as a key ({error})") from None
    if not rows or not {"image", "set"} <= rows[0].keys():
        raise UserError(
            f"{path} is no key: expected a CSV with the columns {', '.join(KEY)}, which dimr eval "
            "fidelity writes for several sets"
        )
    return {row["image"]: row["set"] for row in rows}


def distortion_lines(result: dict) -> str:
    """The result of `distortion` for people."""
    lines = [_rate_line("distortion rate", result)]
    for name, one in result.get("sets", {}).items():
        lines.append(_rate_line(name, one) if one else f"{name}: nobody judged an image of it")
    return "\n".join(lines)


def _rate_line(name, result):
    interval = " (one person: no interval)"
    if result["interval"]:
        interval = " (95% interval over people {:.1%} to {:.1%})".format(*result["interval"])
    return (
        f"{name} {result['distortion_rate']:.1%}{interval}: {len(result['people'])} people, "
        f"{result['images']:,} images, {result['votes']:,} votes"
    )


def _interval(rate, shares):
    """Student's t around the mean of these shares, cut at 0 and 1."""
    if len(shares) < 2:
        return None
    error = statistics.stdev(shares) / len(shares) ** 0.5
    reach = float(stdtrit(len(shares) - 1, (1 + CONFIDENCE) / 2)) * error
    return [max(0.0, rate - reach), min(1.0, rate + reach)]


def read_votes(path: str | Path) -> dict[str, dict[str, float]]:
    """person → image → 1.0 if distorted, else 0.0. Raises UserError naming the line at fault."""
    votes = {}
    if not Path(path).exists():
        raise UserError(
            f"{path} does not exist; expected a CSV with the columns {', '.join(COLUMNS)}"
        )
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for place, image, person, vote in _votes(path, rows):
            judged = votes.setdefault(person, {})
            if image in judged:
                raise UserError(f"{place}: {person} has judged {image} before; keep one vote")
            judged[image] = float(vote)
    except csv.Error as error:
        raise UserError(f"{path} is no CSV ({error})") from None
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
