"""Our own JSON, and what it has to look like. It stands alone.

    POINT = fields({"x": real(), "y": real()}, {"name": maybe(text())})
    value = parse('{"x": 1, "y": "2"}')
    check(value, POINT)                # Misfit: y is "2", which is not a number

`parse` bounds length and depth before anything else looks at a value. A shape is a function that
raises Misfit for what does not have it; what it does not name may be there, for a later version."""

import json
import math
import re
from collections.abc import Callable, Mapping

LONGEST = 2**26  # bytes of a text
DEEPEST = 32  # brackets in brackets; ours have fewer than 10
LAST = 2**63 - 1  # what 64 bits hold
WORDS = 2**20  # characters of a string
SHA256 = re.compile("[0-9a-f]{64}")

Shape = Callable[[object], None]


class Misfit(ValueError):
    """A value that does not look as it should: `reason`, and `place` in what was checked."""

    def __init__(self, reason: str, place: str = ""):
        super().__init__(reason, place)
        self.reason = reason
        self.place = place

    def __str__(self):
        return f"{self.place.lstrip('.')} {self.reason}" if self.place else f"it {self.reason}"

    def within(self, place: str) -> "Misfit":
        return Misfit(self.reason, place + self.place)


# ------------------------------------------------------------------------------------------- texts


def parse(text: str | bytes, longest: int = LONGEST, deepest: int = DEEPEST) -> object:
    """The value that a JSON text stands for. Raises ValueError for a text that is none, is longer
    than `longest` or nested deeper than `deepest`."""
    if len(text) > longest:
        raise ValueError(f"{len(text):,} bytes, of which {longest:,} would be read")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {deepest} brackets") from None
    if depth(value, deepest) > deepest:
        raise ValueError(f"nested deeper than {deepest} brackets")
    return value


def depth(value: object, enough: float = math.inf) -> int:
    """How deep the lists and dicts of a value are nested, or `enough` + 1 where it is more."""
    level = [value]
    found = 0
    while True:
        inside = []
        for one in level:
            if isinstance(one, dict):
                inside.extend(one.values())
            elif isinstance(one, list):
                inside.extend(one)
        nested = any(isinstance(one, dict | list) for one in level)
        if not nested or found > enough:
            return found
        found += 1
        level = inside


# ------------------------------------------------------------------------------------------ shapes


def check(value: object, shape: Shape) -> None:
    """Raise Misfit, which names the place, unless `value` has this shape."""
    shape(value)


def anything(value: object) -> None:
    """Any value at all."""


def whole(low: int = 0, high: int = LAST) -> Shape:
    """A whole number from `low` to `high`."""

    def shape(value):
        if type(value) is not int or not low <= value <= high:
            raise Misfit(f"is {brief(value)}, which is not a whole number from {low} to {high}")

    return shape


def real(low: float = -math.inf, high: float = math.inf, finite: bool = True) -> Shape:
    """A number from `low` to `high`; `finite`: neither infinite nor NaN."""

    def shape(value):
        if type(value) not in (int, float):
            raise Misfit(f"is {brief(value)}, which is not a number")
        if finite and not -LARGEST <= value <= LARGEST:
            raise Misfit(f"is {brief(value)}, which is not a finite number")
        if value < low or value > high:
            raise Misfit(f"is {brief(value)}, which is not from {low:g} to {high:g}")

    return shape


LARGEST = 1.7e308


def text(pattern: re.Pattern | None = None, most: int = WORDS) -> Shape:
    """A string of up to `most` characters, all of which `pattern` fits."""

    def shape(value):
        if not isinstance(value, str) or len(value) > most:
            raise Misfit(f"is {brief(value)}, which is not a string of up to {most:,} characters")
        if pattern and not pattern.fullmatch(value):
            raise Misfit(f"is {brief(value)}, which does not have the form {pattern.pattern}")

    return shape


def flag(value: object) -> None:
    """True or false."""
    if type(value) is not bool:
        raise Misfit(f"is {brief(value)}, which is neither true nor false")


def one_of(*values: object) -> Shape:
    """One of these values."""

    def shape(value):
        if not any(type(value) is type(one) and value == one for one in values):
            expected = ", ".join(map(brief, values))
            raise Misfit(f"is {brief(value)}, which is not one of {expected}")

    return shape


def maybe(shape: Shape) -> Shape:
    """Null, or what has `shape`."""

    def nullable(value):
        if value is not None:
            shape(value)

    return nullable


def many(each: Shape, least: int = 0, most: int = LAST) -> Shape:
    """A list of `least` to `most` values of which each has that shape."""

    def shape(value):
        if not isinstance(value, list):
            raise Misfit(f"is {brief(value)}, which is not a list")
        if not least <= len(value) <= most:
            raise Misfit(f"holds {len(value):,} values, which are not {least:,} to {most:,}")
        for number, one in enumerate(value):
            _check_inside(one, each, f"[{number}]")

    return shape


def table(each: Shape) -> Shape:
    """A dict of any names whose values each have that shape."""

    def shape(value):
        _check_dict(value)
        for name, one in value.items():
            _check_inside(one, each, f".{_name(name)}")

    return shape


def fields(required: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    """A dict in which what is `required` is there, and that and what is `optional` has its shape.
    Others may be there."""

    def shape(value):
        _check_dict(value)
        for name in required:
            if name not in value:
                raise Misfit("is missing", f".{name}")
        for name, one in {**required, **(optional or {})}.items():
            if name in value:
                _check_inside(value[name], one, f".{name}")

    return shape


def _check_inside(value, shape, place):
    try:
        shape(value)
    except Misfit as misfit:
        raise misfit.within(place) from None


def _check_dict(value):
    if not isinstance(value, dict):
        raise Misfit(f"is {brief(value)}, which is not a table of names and values")


def _name(name):
    return brief(name).strip('"')


def brief(value: object) -> str:
    """A value as a line may hold it."""
    if isinstance(value, dict | list):
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value):,}"
    if isinstance(value, str) and len(value) > 60:
        return json.dumps(value[:60])[:-1] + '…"'
    if type(value) is int and abs(value) > 10**60:
        return "a number of many digits"
    return json.dumps(value, default=repr)
