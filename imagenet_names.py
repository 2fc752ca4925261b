"""The 1000 classes of ImageNet-1k: WordNet identifiers and names, in the order of their indices.

`find("giant panda")` is 388. Names and identifiers are those of WordNet 3.0 (Princeton University,
2006), whose identifiers, sorted, give the indices: also the order of sorted folder names. They lie
in share/dimr/imagenet_classes.tsv, a line per class under a line of headings."""

import ours

import csv
import difflib
import functools

from storage import UserError

TABLE = "imagenet_classes.tsv"
SHOWN = 5  # suggestions in an error


def read():
    """(identifier, names, the customary one first) of each class."""
    with open(ours.shipped(TABLE), encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return tuple((row["wnid"], tuple(row["names"].split(", "))) for row in rows)


CLASSES = read()


def find(text: str) -> int:
    """Index of the class with this name or WordNet identifier; case, spaces, hyphens and
    underscores don't matter.

    Raises UserError listing the candidates where the name is that of several classes, or near ones
    where of none."""
    found = indices().get(plain(text), ())
    if not found:
        raise UserError(f"class {text!r} is not a name in ImageNet-1k; {advice(plain(text))}")
    if len(found) > 1:
        several = " or ".join(described(index) for index in found)
        raise UserError(f"class {text!r} is {several}; give the number")
    return found[0]


def described(index):
    identifier, names = CLASSES[index]
    return f"{index} ({identifier}: {', '.join(names)})"


def advice(text):
    """What to give instead of the plain name `text`: names with the same words, else similar
    ones."""
    known = indices()
    words = set(text.split())
    near = []
    if words:
        near = [name for name in known if words <= set(name.split())]
    if not near:
        near = difflib.get_close_matches(text, known, SHOWN)
    if not near:
        return "give an index from 0 to 999"
    hints = [f"{name} ({' or '.join(map(str, known[name]))})" for name in near[:SHOWN]]
    return f"near it: {', '.join(hints)}"


def plain(text):
    """Lower case, with single spaces for hyphens, underscores and spaces."""
    return " ".join(text.lower().replace("-", " ").replace("_", " ").split())


@functools.cache
def indices():
    """Plain name or identifier → indices, most often one."""
    found = {}
    for index, (identifier, names) in enumerate(CLASSES):
        for name in dict.fromkeys(map(plain, (identifier, *names))):
            found.setdefault(name, []).append(index)
    return found
