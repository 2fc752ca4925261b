"""The command line itself: help that teaches, figures, errors in one line."""

import json
import os

import pytest
from click.testing import CliRunner
from conftest import dimr_command

import cli
import dimr
import storage


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


def commands(group=cli.main, prefix=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield *prefix, name


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_every_commands_help_teaches_with_an_example(command):
    result = invoke(*command, "--help")
    assert (
        result.exit_code == 0
        and f"{' '.join(command)}" in result.output.split("Options:")[0].split("Example", 1)[1]
    )


def test_help_answers_without_loading_pytorch():
    import subprocess
    import sys

    code = (
        "import sys, cli; cli.main(['--help'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("variant", dimr.VARIANTS)
def test_info_reports_parameters_and_gmacs(variant):
    result = json.loads(invoke("info", "--variant", variant, "--json").output)
    assert (
        result.keys() == {"variant", "params", "gmacs", "branches"} and result["variant"] == variant
    )
    assert result["params"] == sum(b["params"] for b in result["branches"])
    assert result["gmacs"] == pytest.approx(sum(dimr.VARIANTS[variant].macs) / 1e9, abs=1e-3)
    assert len(result["branches"]) == len(dimr.VARIANTS[variant].dims)
    people = invoke("info", "--variant", variant).output
    assert f"{result['params']:,}" in people and people.count("branch") == len(result["branches"])


def test_the_commands_choices_are_the_tables_rows():
    import solver

    choices = {
        option.name: list(option.type.choices)
        for option in cli.sample.params
        if hasattr(option.type, "choices")
    }
    assert choices["solver"] == list(solver.SOLVERS) and choices["grid"] == list(solver.GRIDS)
    assert list(cli.VARIANTS.choices) == list(dimr.VARIANTS)


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["info", "--variant", "xxl"], 2, "xl2r"),
        (["train", "--variant", "xxl"], 2, "xl2r"),
        (["train", "--betas", "0.9"], 2, "0.99,0.99"),
        (["train", "--steps", "0"], 2, "--steps"),
        (["train", "--variant", "xl2r"], 1, "dimr encode --res 256"),
        (["train", "--variant", "m3r"], 1, "--res 64 --pixels"),
        (["train", "--data", "missing"], 1, "missing"),
        (["sample", "--weights", "missing/file.safetensors"], 1, "missing"),
        (["curves", "missing"], 1, "missing"),
        (["curves"], 1, "no run"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(
    tmp_path, monkeypatch, arguments, status, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIMR_DATA", raising=False)
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    result = invoke(*arguments)
    assert (
        result.exit_code == status and words in result.output and "Traceback" not in result.output
    )
    message = result.output[result.output.index("Error:") :]
    assert status == 2 or message.strip().count("\n") == 0
    assert not any(files for _, _, files in os.walk(tmp_path))


def test_the_command_is_a_module_too():
    assert dimr_command("--version").stdout == f"dimr, version {storage.VERSION}\n"
