"""A card is enough to repeat the number: its own commands, run elsewhere, measure it again."""

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from inception_weights import photographs
from test_eval import PLAIN, home, run, save_npz  # noqa: F401 (home: a cache of its own)

import cli

pytestmark = pytest.mark.slow


def again(commands):
    """The numbers that a card's commands measure, the images made anew."""
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "dimr"
        if words[0] == "eval":
            words.append("--json")
        result = CliRunner().invoke(cli.main, words)
        assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def card_of(*arguments):
    run(*arguments, "--card", "card.json")
    return json.loads(Path("card.json").read_text())


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_a_card_of_a_network_repeats_its_number(trained, digits, labels):
    drawing = "-n", 40, "--cfg", 1.3, "--steps", 6, "--solver", "heun", "--batch-size", 16
    card = card_of("fid", trained, *drawing, "--labels", labels, "--ref", digits, *PLAIN)
    (one,) = card["sets"].values()
    assert one["made"]["labels"] == labels and one["made"]["seeds"] == "0-39"
    assert "--solver heun" in one["repeat"][0] and "--cfg 1.3" in one["repeat"][0]
    found = again(one["repeat"])
    for key, value in one["values"].items():
        assert found[key] == value["value"]
        assert found[f"{key}_error"] == value["error"]


def test_a_card_of_a_set_makes_the_set_again(trained, digits):
    sample = f"sample --weights {trained} --labels random --seeds 7-40,50 --steps 3 --cfg 1"
    result = CliRunner().invoke(cli.main, [*sample.split(), "--device", "cpu", "--out", "set.npz"])
    assert result.exit_code == 0, result.output
    card = card_of("fid", "set.npz", "--ref", digits, *PLAIN)
    (one,) = card["sets"].values()
    assert one["made"]["seeds"] == "7-40,50"
    for path in Path.cwd().glob("set.*"):
        path.unlink()
    assert again(one["repeat"])["fid"] == one["values"]["fid"]["value"]


def test_a_card_of_a_folder_says_how_it_was_made_and_measures_it_again(trained, digits):
    sample = f"sample --weights {trained} -n 25 --steps 3 --device cpu --out pngs"
    assert CliRunner().invoke(cli.main, sample.split()).exit_code == 0
    card = card_of("fid", "pngs", "--ref", digits, *PLAIN)
    (one,) = card["sets"].values()
    assert one["made"]["steps"] == 3 and "3" in Path("card.md").read_text()
    assert again(one["repeat"])["fid"] == one["values"]["fid"]["value"]


def test_a_card_says_for_people_what_it_says_for_programs(digits):
    save_npz("a.npz", photographs(40, 8, seed=1))
    save_npz("b.npz", photographs(40, 8, seed=2))
    card = card_of("fid", "a.npz", "b.npz", "--ref", digits, *PLAIN)
    text = Path("card.md").read_text()
    assert set(card["sets"]) == {"a", "b"}
    for one in card["sets"].values():
        assert one["sha256"] in text and f"{one['values']['fid']['value']:.6g}" in text
    assert card["reference"]["sha256"] in text and str(digits) in text
    assert card["extractors"]["inception"]["identity"] in text
    assert "how they were made is not known" in text and "b, to the first" in text
    assert card["errors"]["blocks"] == 20 and card["versions"]["torch"] in text


def test_a_card_of_another_name_is_refused_before_anything_is_measured():
    assert "does not end in .json" in run("fid", "--card", "card.txt", status=1).stderr
    assert not Path("card.txt").exists()
