"""tools/fuzz.py: a few mutations of every format, and that it can find what it is there to find."""

import random

import fuzz
import pytest

COUNT = 10  # mutations of each format; before a release 2,000 (docs/promises.md)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DIMR_OFFLINE", "1")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", fuzz.FORMATS)
def test_damage_is_one_line_or_no_matter(name):
    for number, outcome, words in fuzz.fuzz(name, seed=0, first=0, count=COUNT):
        again = f"tools/fuzz.py --format '{name}' --first {number} --count 1"
        assert not fuzz.is_fault(name, outcome), f"{outcome} {words}: {again}"


def test_a_mutation_is_the_same_each_time_and_seldom_none():
    data = bytes(range(200))
    same = 0
    for number in range(200):
        found = fuzz.of_bytes(data, random.Random(number))
        assert found == fuzz.of_bytes(data, random.Random(number))
        same += found == data
    assert same < 20


def endless():
    while True:
        pass


def test_what_came_of_a_command_is_told_apart(monkeypatch):
    """By a row whose command does what is wanted of it."""
    wanted = {
        "fine": lambda: None,
        "line": lambda: (_ for _ in ()).throw(fuzz.storage.UserError("no")),
        "traceback": lambda: [][0],
        "hang": endless,
        "memory": lambda: bytearray(fuzz.peak() + 2 * fuzz.MEMORY).find(1),
    }
    monkeypatch.setattr(fuzz, "MEMORY", 10**7)
    do = []

    def curves(run):
        do[0]()

    monkeypatch.setattr(fuzz.cli.main.commands["curves"], "callback", curves)
    row = fuzz.Format(fuzz.judged, "votes.csv", fuzz.any_file, "curves x", lambda *_: 1)
    monkeypatch.setitem(fuzz.FORMATS, "any", row)
    for outcome, what in wanted.items():
        monkeypatch.setattr(fuzz, "PATIENCE", 0.5 if outcome == "hang" else 30)
        do[:] = [lambda: None]
        for number, found, _ in fuzz.fuzz("any", 0, 0, 2):
            if number:
                assert found == outcome
            do[:] = [what]
