"""The command line itself: help that teaches, figures, errors in one line."""

import ours

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import DATA, dimr_command

import cli
import diffusion
import dimr
import evaluation
import networks
import solver
import space
import storage
import training
import validation


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def commands(group=cli.main, prefix=()):
    """Names of all commands, as tuples of words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield *prefix, name


def choices(command):
    """{option: what it chooses from} of a command."""
    options = [option for option in command.params if hasattr(option.type, "choices")]
    return {option.name: list(option.type.choices) for option in options}


# help


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_every_commands_help_teaches_with_an_example(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    before_options = result.output.split("Options:")[0]
    assert " ".join(command) in before_options.split("Example", 1)[1]


def test_every_help_answers_without_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("cli", *ours.MODULES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError):
        importlib.import_module("dimr")
    fresh = importlib.import_module("cli")
    assert fresh is not cli
    for command in [(), ("eval",), ("weights",), *commands(fresh.main)]:
        result = CliRunner().invoke(fresh.main, [*command, "--help"])
        assert result.exit_code == 0
        assert "Options:" in result.output


@pytest.mark.slow
def test_drawing_and_measuring_import_nothing_that_takes_seconds(tmp_path):
    run = DATA / "v0.1.0" / "run"
    words = ["sample", "--weights", run, "-n", 2, "--steps", 1, "--device", "cpu"]
    code = f"""if True:
        import sys
        import cli
        cli.main({[str(word) for word in words]!r}, standalone_mode=False)
        import evaluation
        print({{"torch._dynamo", "scipy.stats", "sklearn"}} & set(sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_choices_are_the_tables_rows():
    train = choices(cli.train)
    assert train["variant"] == list(networks.VARIANTS)
    assert train["norm"] == list(dimr.NORMS)
    assert train["mlp"] == list(dimr.MLPS)
    assert train["objective"] == list(diffusion.OBJECTIVES)
    assert train["loss"] == list(diffusion.LOSSES)
    assert train["target_scale"] == list(diffusion.TARGET_SCALES)
    draw = choices(cli.sample)
    assert draw["solver"] == list(solver.SOLVERS)
    assert draw["grid"] == list(solver.GRIDS)
    assert draw["preset"] == list(space.PRESETS)


def test_kinds_of_blocks_are_chosen_by_branch():
    kinds = ["--blocks", "transformer,transformer"]
    plain = json.loads(invoke("info", "--variant", "demo", "--json").output)
    changed = json.loads(invoke("info", "--variant", "demo", *kinds, "--json").output)
    assert [branch["kind"] for branch in plain["branches"]] == ["transformer", "convnext"]
    assert [branch["kind"] for branch in changed["branches"]] == ["transformer"] * 2
    assert changed["gmacs"] > plain["gmacs"]


def test_every_metric_is_a_command_and_has_words():
    for name, metric in evaluation.METRICS.items():
        assert metric.help in " ".join(cli.eval_group.commands[name].help.split())


# values


@pytest.mark.parametrize(
    "text, seeds", [("0-3", [0, 1, 2, 3]), ("3,7,10-12", [3, 7, 10, 11, 12]), ("5", [5])]
)
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert cli.Seeds().convert(text, None, None) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1-2-3", "3,", "7-3"])
def test_other_seeds_are_refused(text):
    result = invoke("sample", "--seeds", text)
    assert result.exit_code == 2
    assert f"{text!r} is not a list of seeds; expected numbers and ranges" in result.output


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What `dimr train` tells the job: filled when it is invoked."""
    told = {}

    def train(out, source, **options):
        told.update(out=out, source=source, **options)
        return {"out": out, "step": 1, "steps": 2, "loss": 0.5, "seconds": 1, "stopped": None}

    monkeypatch.setattr(training, "train", train)
    monkeypatch.chdir(tmp_path)
    return told


def test_train_tells_the_job_only_what_was_given(told):
    result = invoke("train", "--data", "photos")
    assert result.output == (
        "runs/custom: step 1 of 2, loss 0.5000, 1 s; now: dimr sample --weights runs/custom\n"
    )
    assert told == {
        "out": "runs/custom",
        "source": training.Source("photos"),
        "variant": None,
        "recipe": {},
        "network": {},
        "init": None,
        "kind": None,
        "device": "auto",
        "saving": training.Saving(),
        "watch": None,
        "validate": validation.Validation(),
        "sinks": [],
        "force": False,
    }


def test_train_tells_the_job_all_that_was_given(told):
    recipe = "--lr 0.1 --betas 0.9,0.99 --no-flip --seed 0 --precision bf16 --target-scale mean"
    recipe += " --loss output"
    network = "--layers 3,2 --dims 16,8 --heads 2 --norm tdrms --mlp geglu --objective velocity"
    network += " --patch 2"
    source = "--data photos --res 32 --exif --on-bad-image skip --workers 0"
    saving = "--save-every 7 --keep 3 --sample-every 0 --max-time 2"
    watch = "--eval-every 5 --eval-images 20 --ref photos --inception i --features a:b"
    watch += " --validate other --validate-every 7"
    rest = "--variant demo --out run --init weights --kind sit --device cpu --force"
    line = f"train {recipe} {network} {source} {saving} {watch} {rest}"
    assert invoke(*line.split()).exit_code == 0
    assert told == {
        "out": "run",
        "source": training.Source("photos", res=32, exif=True, on_bad="skip", workers=0),
        "variant": "demo",
        "recipe": {
            "lr": 0.1,
            "betas": (0.9, 0.99),
            "flip": False,
            "seed": 0,
            "precision": "bf16",
            "target_scale": "mean",
            "loss": "output",
        },
        "network": {
            "layers": (3, 2),
            "dims": (16, 8),
            "heads": 2,
            "patch": 2,
            "norm": "tdrms",
            "mlp": "geglu",
            "objective": "velocity",
        },
        "init": "weights",
        "kind": "sit",
        "device": "cpu",
        "saving": training.Saving(every=7, keep=3, sample_every=0, max_time=120),
        "watch": training.Watch(5, 20, ref="photos", inception="i", features="a:b"),
        "validate": validation.Validation("other", 7),
        "sinks": [],
        "force": True,
    }


@pytest.mark.parametrize("variant, folder", [("xl2r", "latents-256"), ("m3r", "pixels-64")])
def test_train_finds_what_encode_wrote(told, tmp_path, variant, folder):
    (tmp_path / "data" / folder).mkdir(parents=True)
    assert invoke("train", "--variant", variant).exit_code == 0
    assert told["source"].path == Path("data", folder)


def test_a_pixel_model_finds_images_too(told, tmp_path, monkeypatch):
    monkeypatch.setenv("DIMR_DATA", str(tmp_path))
    assert invoke("train", "--variant", "m3r").exit_code == 0
    assert told["source"].path == tmp_path


# figures


@pytest.mark.parametrize("variant", networks.VARIANTS)
def test_info_reports_parameters_and_gmacs(variant):
    result = json.loads(invoke("info", "--variant", variant, "--json").output)
    assert result.keys() == {"variant", "params", "gmacs", "branches"}
    assert result["variant"] == variant
    assert result["params"] == sum(branch["params"] for branch in result["branches"])
    assert result["gmacs"] == pytest.approx(sum(networks.VARIANTS[variant].macs) / 1e9, abs=1e-3)
    assert len(result["branches"]) == len(networks.VARIANTS[variant].macs)
    people = invoke("info", "--variant", variant).output
    assert f"{result['params']:,}" in people
    assert people.count("branch") == len(result["branches"])


def test_info_says_both_counts_of_row_2_of_table_2():
    told = invoke("info", "--variant", "table2-2").output
    assert "193,095,300 parameters" in told and "the paper prints 202.4M" in told


def test_every_option_can_be_given_under_torchrun(capsys):
    """Which refuses what several of its own options begin with, wherever it stands in the line."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    for command in (cli.train, cli.encode, cli.sample, *cli.eval_group.commands.values()):
        for option in command.params:
            passed = False
            for name in (*option.opts, *option.secondary_opts):
                try:
                    parsed = parser.parse_args(["-m", "cli", command.name, name, "1"])
                    passed |= parsed.training_script_args == [command.name, name, "1"]
                except SystemExit:
                    capsys.readouterr()
            assert passed, f"{command.name}: {option.opts}"


# errors


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["info", "--variant", "xxl"], 2, "xl2r"),
        (["info", "--variant", "demo", "--blocks", "convnext,convnext"], 1, "see no class token"),
        (["info", "--variant", "demo", "--blocks", "mamba"], 2, "'mamba' is not one of"),
        (["info", "--variant", "uvit-m4", "--blocks", "transformer"], 1, "--blocks is not for"),
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
    assert result.exit_code == status
    assert words in result.output
    assert "Traceback" not in result.output
    message = result.output[result.output.index("Error:") :]
    assert status == 2 or message.strip().count("\n") == 0
    assert not any(files for _, _, files in os.walk(tmp_path))


@pytest.mark.parametrize(
    "variant, expected, encode",
    [
        (
            ["--variant", "m3r"],
            "m3r: expected data/pixels-64 or data/imagenet/train",
            "64 --pixels",
        ),
        (["--variant", "xl3r"], "xl3r: expected data/latents-512", "512"),
        ([], "xl2r: expected data/latents-256", "256"),
    ],
)
def test_train_without_data_says_what_was_expected_where(
    tmp_path, monkeypatch, variant, expected, encode
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIMR_DATA", raising=False)
    output = invoke("train", *variant).output
    assert output.startswith(f"Error: no training data for {expected}")
    assert output.endswith(f"; give --data FOLDER, or run dimr encode --res {encode} first\n")


@pytest.mark.slow
def test_the_command_is_a_module_too():
    assert dimr_command("--version").stdout == f"dimr, version {storage.VERSION}\n"
