"""Where images lie, and of which class each is: a folder, a zip, tars, in the layouts that people
have.

`find` looks at a path and gives a `Listing`: the classes, and of each image its label, its names
and what opens it. Nothing is unpacked (archives.py)."""

import ours

import abc
import collections
import dataclasses
import difflib
import glob
import io
import itertools
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import storage
from archives import (
    BLOCK,
    EXTENSIONS,
    KNOWN,
    LABELS,
    LATENTS,
    NONE,
    Archive,
    File,
    Names,
    Zip,
    is_tar,
    open_tar,
    open_zip,
)
from storage import UserError

MOST_CLASSES = 100_000  # that numbered labels may make
OPEN = 64  # archives of a listing that a process holds open
WNID = re.compile(r"n\d{8}")
KAGGLE = "ILSVRC/Data/CLS-LOC/train"

EXPECTED = (
    "expected a folder of images or of one folder per class, ImageNet's tar, a zip, WebDataset's "
    "tars, or a shard set"
)


class BadImage(UserError):
    """One image can't be used: a damaged or mislabelled file, not a failing disk."""

    def __init__(self, path, reason):
        super().__init__(path, reason)

    def __str__(self):
        path, reason = self.args
        return f"{path}: {reason}"


# -------------------------------------------------------------------------------------- a listing


@dataclasses.dataclass(frozen=True)
class Listing(abc.ABC):
    """Images somewhere, class by class, each class's by sorted name.

    `root`: the path or pattern. `words`: what it is, for people. `labels` int64 (N,). `names`: of
    each image "class/name", or its name alone where there is one class and no folder: what a
    fingerprint is made of, so that the same images have the same names however they are packed.
    `members`: where the image lies below the root. A subclass says how it is `open`ed."""

    root: Path
    words: str
    classes: list[str]
    labels: np.ndarray
    names: Names
    members: Names

    def __len__(self):
        return len(self.labels)

    @abc.abstractmethod
    def place(self, index: int) -> str:
        """What messages call image `index`."""

    @abc.abstractmethod
    def size(self, index: int) -> int:
        """Bytes of image `index`'s file. Raises UserError where there is none."""

    @abc.abstractmethod
    def open(self, index: int) -> str | io.BytesIO:
        """Path or bytes of image `index`. Raises BadImage where its member is damaged, UserError
        where its container is, or has changed."""


class Folder(Listing):
    """Files of their own."""

    def place(self, index):
        return os.path.join(self.root, self.members[index])

    def size(self, index):
        place = self.place(index)
        try:
            return os.stat(place).st_size
        except OSError as error:
            raise storage.unreadable(place, error) from None

    def open(self, index):
        return self.place(index)


@dataclasses.dataclass(frozen=True)
class Packed(Listing):
    """Members of tars or of a zip. `numbers`: which of the `archives` each is in, `items` which of
    that one's members."""

    archives: list[Archive]
    numbers: np.ndarray
    items: np.ndarray
    opened: collections.deque = dataclasses.field(
        default_factory=collections.deque, init=False, repr=False
    )

    def place(self, index):
        archive = self.archives[self.numbers[index]]
        return f"{archive.path}: {self.members[index]}"

    def size(self, index):
        return int(self.archives[self.numbers[index]].sizes[self.items[index]])

    def open(self, index):
        archive = self.archives[self.numbers[index]]
        if archive.file.handle is None:
            self.opened.append(archive.file)
            if len(self.opened) > OPEN:
                self.opened.popleft().close()
        try:
            return io.BytesIO(archive.read(self.items[index]))
        except ValueError as error:
            raise BadImage(self.place(index), str(error)) from None


# ---------------------------------------------------------------------------------------- layouts


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is looked for: files with these endings, of these classes alone unless None."""

    extensions: tuple[str, ...] = EXTENSIONS
    classes: Sequence[str] | None = None

    def fits(self, name):
        return name.lower().endswith(self.extensions)

    @property
    def noun(self):
        return "latents" if self.extensions == LATENTS else "images"


@dataclasses.dataclass
class Gathered:
    """Images by class as they are come upon: of each its name, archive, item there and member.
    `numbered`: classes are numbers and not names."""

    what: str
    groups: dict
    numbered: bool = False
    others: int = 0

    def add(self, group, *image):
        if group in self.groups:
            self.groups[group].append(image)
        else:
            self.groups[group] = [image]


def find(
    path: str | Path,
    classes: Sequence[str] | None = None,
    extensions: tuple[str, ...] = EXTENSIONS,
) -> Listing:
    """What lies at `path`, told by looking: a folder, an archive, or tars by a pattern with * ? []
    {a,b} {000..146}. `classes` takes only these. Raises UserError for anything else, naming what
    can't be read in place and what to do."""
    wanted = Wanted(extensions, classes)
    path = Path(path)
    if path.is_dir():
        return _in_folder(path, wanted)
    if path.is_file():
        return _in_file(path, wanted)
    tars = expand(str(path))
    if tars is None:
        raise UserError(f"{path} is not a folder or file; {EXPECTED}")
    if not tars:
        raise UserError(f"{path} fits no file; {EXPECTED}")
    if extensions == LATENTS:
        raise _no_labels(path)
    return _in_tars(path, tars, wanted)


def is_container(path: str | Path) -> bool:
    """Whether images at `path` are packed: a zip, a tar, a folder of tars alone, a pattern."""
    path = Path(path)
    if path.is_file():
        return path.suffix in (".zip", ".tar")
    if path.is_dir():
        return bool(_tars_alone(path))
    return bool(expand(str(path)))


def expand(pattern: str) -> list[Path] | None:
    """The files that a pattern names, sorted; None if it is no pattern. Raises UserError where one
    of a brace's is missing."""
    alternatives = [pattern]
    while any(re.search(r"\{[^{}]*\}", one) for one in alternatives):
        alternatives = [each for one in alternatives for each in _braces(one)]
        if len(alternatives) > MOST_CLASSES:
            raise UserError(f"{pattern} names more than {MOST_CLASSES:,} files")
    found = []
    for one in alternatives:
        if re.search(r"[*?\[]", one):
            found += sorted(Path(place) for place in glob.glob(one))
        elif len(alternatives) == 1:
            return None
        elif not Path(one).is_file():
            raise UserError(f"{pattern}: {one} does not exist; fetch it, or leave it out")
        else:
            found.append(Path(one))
    return list(dict.fromkeys(found))


def _braces(text):
    """`text` with its first innermost brace replaced by each of its values."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        if int(last) - int(first) > MOST_CLASSES:
            raise UserError(f"{text} names more than {MOST_CLASSES:,} files")
        values = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    else:
        values = match[1].split(",")
    return [text[: match.start()] + value + text[match.end() :] for value in values]


# what a folder is


def _in_folder(path, wanted):
    for place in (KAGGLE, KAGGLE.removeprefix("ILSVRC/")):
        if (path / place).is_dir():
            return _class_folders(path / place, wanted, "ImageNet in Kaggle's folders")
    labels = read_labels(path / LABELS) if (path / LABELS).is_file() else MISSING
    if labels is not MISSING:
        return _labelled_folder(path, labels, wanted)
    if wanted.extensions == LATENTS:
        raise _no_labels(path)
    folders, images = _list(path)
    if not images and folders in ([], ["data"]):
        for pattern, kind in DATABASES.items():
            if any(path.glob(pattern)):
                raise _database(path, kind)
        for place in sorted(path.glob("*.tar.*")) + sorted(path.glob("*.tgz")):
            return _in_file(place, wanted)  # which says how to unpack it
    tars = _tars_alone(path)
    if not tars:
        return _class_folders(path, wanted, "a folder of images")
    if len(tars) == 1:
        return _in_file(tars[0], wanted)
    return _in_tars(path, tars, wanted)


DATABASES = {"*.parquet": "parquet", "data/*.parquet": "parquet", "data.mdb": "LMDB"}


def _database(path, kind):
    return UserError(
        f"{path} holds {kind}, which takes packages that are not here; where they are, two lines "
        "write a tar that is read: with webdataset.TarWriter('images.tar') as tar: | for i, (jpg, "
        "label) in enumerate(rows): tar.write({'__key__': f'{i:08}', 'jpg': jpg, 'cls': label})"
    )


def _tars_alone(path):
    """The tars in a folder, sorted; none if there are images or folders beside them."""
    tars = sorted(place for place in path.glob("*.tar") if not place.name.startswith("."))
    if tars and any(_list(path)):
        return []
    return tars


def _class_folders(root, wanted, what):
    """A Folder of one folder of images per class, or of images alone."""
    folders, images = _list(root)
    if folders and images:
        raise UserError(
            f"{root} mixes images ({images[0]}) and folders ({folders[0]}); expected one folder of "
            "images per class, or images alone"
        )
    if not folders and not images:
        raise UserError(
            f"{root} holds no images ({KNOWN}); expected one folder of them per class, or images "
            "alone"
        )
    classes = choose(root, folders or [root.resolve().name], wanted.classes)
    groups = [images]
    if folders:
        groups = [_list_class(root, folder) for folder in classes]
    names = Names([name for group in groups for name in group])
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    return Folder(root, _words(what, classes, len(labels)), classes, labels, names, names)


def _list(folder):
    """Sorted names of the folders and of the images in `folder`, hidden ones left out."""
    folders = []
    images = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                images.append(entry.name)
    return sorted(folders), sorted(images)


def _list_class(root, name):
    """Relative paths of the images of class folder `name`, sorted."""
    folders, images = _list(root / name)
    if not images:
        advice = f"choose one of the folders in {root}" if folders else "fill or remove it"
        raise UserError(
            f"{root / name} holds no images ({KNOWN}) though its place makes it a class; {advice}"
        )
    return [os.path.join(name, image) for image in images]


def _labelled_folder(path, labels, wanted):
    """A Folder in EDM2's layout."""
    names = []
    for folder, inside, files in os.walk(path):
        inside[:] = [name for name in inside if not name.startswith(".")]
        for name in files:
            if wanted.fits(name) and not name.startswith("."):
                names.append(os.path.relpath(os.path.join(folder, name), path))
    gathered = Gathered(f"EDM2's folder of {wanted.noun}", {}, numbered=labels is not None)
    items = [(0, name, name) for name in names]
    _gather_labelled(gathered, path, items, labels)
    classes, groups = _in_order(path, gathered, wanted)
    return Folder(**_columns(path, gathered, classes, groups, wanted))


# what a file is


def _in_file(path, wanted):
    file = File(path)
    head = file.read(0, BLOCK)
    file.close()
    for magic, command in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(
                f"{path} is compressed, so that no image in it can be reached alone; unpack it: "
                f"{command} {shlex.quote(str(path))}"
            )
    if head.startswith(b"PAR1"):
        raise _database(path, "parquet")
    if head[16:20] == b"\xde\xc0\xef\xbe":
        raise _database(path, "LMDB")
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _in_archive(path, open_zip(path), wanted)
    if is_tar(head):
        return _in_archive(path, open_tar(path), wanted)
    raise UserError(f"{path} is not a folder, tar or zip; {EXPECTED}")


COMPRESSED = {
    b"\x1f\x8b": "gzip -dk",
    b"\xfd7zXZ\0": "xz -dk",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"BZh": "bzip2 -dk",
}


def _in_tars(path, tars, wanted):
    """Several tars: one per class if they are named as ImageNet's, else WebDataset's."""
    archives = []
    for tar in tars:
        file = File(tar)
        head = file.read(0, BLOCK)
        file.close()
        if not is_tar(head):
            _in_file(tar, wanted)  # says what it is, if it is something
            raise UserError(f"{tar} is a zip; give it alone, or tars alone")
        archives.append(open_tar(tar))
    if all(WNID.fullmatch(tar.stem) for tar in tars):
        gathered = Gathered("ImageNet's tars, one per class", {})
        for number, archive in enumerate(archives):
            group = archive.path.stem
            for item, name in enumerate(archive.names):
                if wanted.fits(name):
                    base = name.rpartition("/")[2]
                    gathered.add(group, f"{group}/{base}", number, item, name)
    else:
        for archive in archives:
            if any(".tar/" in name for name in archive.names):
                raise UserError(f"{archive.path} is a tar of tars; give it alone: --data that path")
        gathered = _webdataset(path, archives, wanted, f"WebDataset's {len(tars):,} tars")
    return _packed(path, gathered, archives, wanted)


def _in_archive(path, archive, wanted):
    names = list(archive.names)
    kind = "zip" if isinstance(archive, Zip) else "tar"
    root, labels = _find_labels(path, archive, names)
    if labels is not MISSING:
        gathered = Gathered(f"EDM2's {kind} of {wanted.noun}", {}, numbered=labels is not None)
        items = []
        for item, name in enumerate(names):
            if not wanted.fits(name):
                continue
            if name.startswith(root):
                items.append((item, name.removeprefix(root), name))
            else:
                gathered.others += 1
        _gather_labelled(gathered, path, items, labels)
        return _packed(path, gathered, [archive], wanted)
    if wanted.extensions == LATENTS:
        raise _no_labels(path)
    images = [(item, name) for item, name in enumerate(names) if wanted.fits(name)]
    if not images and any(name.endswith(LATENTS) for name in names):
        raise _only_latents(path)
    if any(".tar/" in name for _, name in images):
        gathered = _tar_of_tars(path, images)
    elif kaggle := [image for image in images if re.search(_KAGGLES, image[1])]:
        gathered = Gathered("ImageNet in Kaggle's layout", {}, others=len(images) - len(kaggle))
        for item, name in kaggle:
            group, base = re.search(_KAGGLES, name).groups()
            gathered.add(group, f"{group}/{base}", 0, item, name)
    elif (archive.values != NONE).any():
        gathered = _webdataset(path, [archive], wanted, "WebDataset's tar")
    else:
        gathered = _by_folder(path, images, f"a {kind}")
    return _packed(path, gathered, [archive], wanted)


_KAGGLES = re.compile(rf"(?:^|/){KAGGLE}/([^/]+)/([^/]+)$")


def _tar_of_tars(path, images):
    gathered = Gathered("a tar of one tar per class", {})
    for item, name in images:
        tar, inside, base = name.partition(".tar/")
        if not inside:
            raise UserError(
                f"{path} mixes tars and images ({name}); expected one tar per class, or images"
            )
        group = tar.rpartition("/")[2]
        gathered.add(group, f"{group}/{base.rpartition('/')[2]}", 0, item, name)
    if all(map(WNID.fullmatch, gathered.groups)):
        gathered.what = "ImageNet's official tar"
    return gathered


def _by_folder(path, images, what):
    """One folder per class, or images alone, perhaps under folders that all share."""
    gathered = Gathered(what, {})
    first = None
    for item, name in images:
        folder, _, base = name.rpartition("/")
        above, _, group = folder.rpartition("/")
        shape = above, bool(folder)
        if first is None:
            first = shape, name
        elif first[0] != shape:
            raise UserError(
                f"{path} holds {first[1]} and {name}; expected one folder of images per class, all "
                "in one place, or images alone"
            )
        if not folder:
            gathered.add(path.stem, base, 0, item, name)
        else:
            gathered.add(group, f"{group}/{base}", 0, item, name)
    return gathered


# EDM2's


MISSING = object()  # labels of a dataset.json that is not EDM2's


def read_labels(path, archive=None, item=None):
    """The labels in the dataset.json at `path`, or that is member `item` of the archive there, by
    image; None where it says that there are none, MISSING where it is not EDM2's."""
    if archive is None:
        value = storage.read_json(path)
    else:
        path = f"{path}: {LABELS}"
        try:
            value = json.loads(archive.read(item))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); make it again") from None
    if not isinstance(value, dict) or "labels" not in value:
        return MISSING
    if value["labels"] is None:
        return None
    labels = {}
    try:
        for name, label in value["labels"]:
            if type(label) is not int or not 0 <= label < MOST_CLASSES:
                raise UserError(f"{path}: the label of {name} is {label}; expected a class number")
            labels[name.replace("\\", "/")] = label
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: labels are not pairs of a name and a class number") from None
    if len(labels) != len(value["labels"]):
        raise UserError(f"{path} gives an image two labels; make it again")
    return labels


def _find_labels(path, archive, names):
    """("folder/", labels) of the EDM2's dataset.json in an archive, as `read_labels` has them."""
    found = {}
    for item, name in enumerate(names):
        if name.rpartition("/")[2] == LABELS:
            labels = read_labels(path, archive, item)
            if labels is not MISSING:
                found[name.removesuffix(LABELS)] = labels
    if len(found) > 1:
        places = ", ".join(f"{root}{LABELS}" for root in list(found)[:2])
        raise UserError(f"{path} holds several data sets ({places}); pack them one by one")
    for root, labels in found.items():
        return root, labels
    return "", MISSING


def _only_latents(path):
    return UserError(f"{path} holds latents, no images; take them by dimr encode --from-latents")


def _no_labels(path):
    return UserError(
        f"{path} has no {LABELS}; expected latents in EDM2's form: a zip or folder of .npy files "
        f'with a {LABELS}, {{"labels": [["00000/img-mean-std-00000000.npy", 3], …]}} or null'
    )


def _gather_labelled(gathered, path, items, labels):
    """Add (item, name, member) to `gathered` under the labels of these names, which have to be
    complete."""
    if not items:
        if labels and next(iter(labels)).endswith(LATENTS):
            raise _only_latents(path)
        return
    for item, name, member in items:
        if labels is None:
            gathered.add(path.resolve().stem, name, 0, item, member)
        elif name in labels:
            gathered.add(labels[name], f"{labels[name]}/{name}", 0, item, member)
        else:
            raise UserError(f"{path}: {name} has no label in {LABELS}; complete or remove it")
    if labels is not None and len(items) < len(labels):
        there = {name for _, name, _ in items}
        missing = next(name for name in labels if name not in there)
        raise UserError(
            f"{path}: {LABELS} has {len(labels):,} labels for {len(items):,} files; {missing} is "
            "missing: copy it again"
        )


# WebDataset's


def _webdataset(path, archives, wanted, what):
    """Images with the label beside them that has their key, or all of one class."""
    labelled = any((archive.values != NONE).any() for archive in archives)
    gathered = Gathered(what, {}, numbered=labelled)
    if not labelled:
        gathered.what += " without labels"
    for number, archive in enumerate(archives):
        names = list(archive.names)
        labels = _labels_by_key(archive, names)
        keys = set()
        for item, name in enumerate(names):
            if not wanted.fits(name):
                continue
            if not labelled:
                gathered.add(_stem(path), name, number, item, name)
                continue
            key, field = _key(name)
            if f".{field}".lower() not in wanted.extensions:  # key.mask.png
                gathered.others += 1
                continue
            if key in keys:
                raise UserError(f"{archive.path}: {key} has two images; keep one")
            keys.add(key)
            label = labels.get(key, NONE)
            if label == NONE:
                raise UserError(
                    f"{archive.path}: {name} has no label though others have; expected {key}.cls "
                    "or .json"
                )
            gathered.add(label, f"{label}/{name}", number, item, name)
    return gathered


def _stem(path):
    """What the one class of a pattern, folder or tar is called."""
    stem = re.split(r"[{*?\[]", path.name)[0].rstrip("-_.")
    return stem.removesuffix(".tar") or path.resolve().parent.name


def _key(name):
    """("folder/key", "jpg") of a WebDataset member "folder/key.jpg": up to the first dot."""
    folder, slash, base = name.rpartition("/")
    key, _, field = base.partition(".")
    return folder + slash + key, field


def _labels_by_key(archive, names):
    labels = {}
    for item in np.flatnonzero(archive.values != NONE).tolist():
        value = int(archive.values[item])
        key, field = _key(names[item])
        if field not in ("cls", "json"):
            continue
        if not 0 <= value < MOST_CLASSES:
            raise UserError(
                f"{archive.path}: {names[item]} holds no class number; expected one from 0 to "
                f"{MOST_CLASSES - 1:,}"
            )
        if labels.setdefault(key, value) != value:
            raise UserError(f"{archive.path}: {key} has two labels, {labels[key]} and {value}")
    return labels


# into one listing


def choose(root: str | Path, known: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Those of the known classes that are wanted, in the known order. A wanted line may go on after
    the class: "n01440764 tench". Raises UserError for one that is not known."""
    if wanted is None:
        return list(known)
    known_set = set(known)
    chosen = set()
    for line in wanted:
        name = line.strip()
        if name not in known_set:
            name = (name.split() or [""])[0].rstrip(",:")
        if name not in known_set:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"; did you mean {near[0]}?" if near else f"; the first are {list(known)[:3]}"
            raise UserError(f"--classes: {root} has no class {line.strip()!r}{advice}")
        chosen.add(name)
    if not chosen:
        raise UserError("--classes names no class")
    return [name for name in known if name in chosen]


def _in_order(path, gathered, wanted):
    """Names of the classes, and of each its images sorted by name, which are unique in an
    archive."""
    if not gathered.groups:
        raise UserError(f"{path} ({gathered.what}) holds no {wanted.noun}; {EXPECTED}")
    if gathered.numbered:
        numbers = range(max(gathered.groups) + 1)
        groups = {str(number): gathered.groups.get(number, []) for number in numbers}
    else:
        groups = {name: gathered.groups[name] for name in sorted(gathered.groups)}
    classes = choose(path, list(groups), wanted.classes)
    images = []
    for name in classes:
        group = sorted(groups[name])
        for before, after in itertools.pairwise(group):
            if before[:2] == after[:2]:
                raise UserError(
                    f"{path} holds two members for {after[0]} ({before[-1]}, {after[-1]}); pack it "
                    "again with one"
                )
        images.append(group)
    if not any(images):
        raise UserError(f"{path} holds no {wanted.noun} of the chosen classes")
    return classes, images


def _columns(path, gathered, classes, groups, wanted):
    """What any Listing has."""
    images = [image for group in groups for image in group]
    names = Names([image[0] for image in images])
    members = Names([image[-1] for image in images])
    return {
        "root": path,
        "words": _words(gathered.what, classes, len(images), wanted.noun) + _but(groups, gathered),
        "classes": classes,
        "labels": np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        "names": names,
        "members": names if names.block == members.block else members,
    }


def _packed(path, gathered, archives, wanted):
    gathered.others += sum(archive.others for archive in archives)
    classes, groups = _in_order(path, gathered, wanted)
    images = [image for group in groups for image in group]
    return Packed(
        **_columns(path, gathered, classes, groups, wanted),
        archives=archives,
        numbers=np.asarray([image[1] for image in images], np.int32),
        items=np.asarray([image[2] for image in images], np.int32),
    )


def _words(what, classes, count, noun="images"):
    return (
        f"{what}: {_count(len(classes), 'class', 'classes')}, "
        f"{_count(count, noun.removesuffix('s'), noun)}"
    )


def _but(groups, gathered):
    """What else is to be said: classes without images, members that are none."""
    text = ""
    empty = sum(not group for group in groups)
    if empty:
        text += f"; {_count(empty, 'class has', 'classes have')} none"
    if gathered.others:
        text += f"; {_count(gathered.others, 'other member', 'other members')} left out"
    return text


def _count(number, one, many):
    return f"{number:,} {one if number == 1 else many}"
