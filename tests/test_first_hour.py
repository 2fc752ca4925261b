"""What a new user meets in the first hour, as they walk: training on their own folder, going on,
starting from another run, drawing, looking."""

import dataclasses
import json
import os
import shutil
import signal
import threading

import pytest
import torch
from click.testing import CliRunner

import cli
import evaluation
import imagesets
import journal
import recipes
import runfolder
import sampling
import training
import validation
from storage import UserError, load_tensors, read_json

pytestmark = pytest.mark.slow

TINY = {"layers": (1, 1), "dims": (16, 8), "heads": 2}


def train(out, data=None, *, recipe=None, network=TINY, **options):
    """A few steps in this process."""
    return training.train(
        out,
        training.Source(data, workers=0),
        recipe=recipe,
        network=network,
        device="cpu",
        saving=training.Saving(sample_every=0, every=1000),
        **options,
    )


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def own(digits, tmp_path_factory):
    """A run of 8 steps on a folder of the user's own, with nothing said but the steps."""
    out = tmp_path_factory.mktemp("own") / "letters"
    train(out, digits, recipe={"steps": 8})
    return out


@pytest.fixture
def copied(own, tmp_path):
    """A copy of `own`, to change."""
    return shutil.copytree(own, tmp_path / "letters")


# training


def test_training_says_at_the_start_what_it_is_about_to_do(digits, tmp_path, capsys):
    train(tmp_path / "run", digits, recipe={"steps": 40, "batch_size": 6, "micro_batch": 3})
    said = capsys.readouterr().err
    for words in (
        f"data     200 images of 10 classes, 1×8×8, {digits}",
        "network  own: 1, 1 blocks of widths 16, 8; ",
        " GMAC an image",
        "recipe   chosen for this data and length: rate 0.008 after 2 steps of warm-up, EMA 0.75",
        "guidance (10% of labels dropped), no flips",
        "40 steps of batch 6 = processes 1 × passes 2 × micro-batch 3",
        "device   cpu, fp32",
        f"run      {tmp_path / 'run'}: a new run",
        " to the end, at ",
    ):
        assert words in said
    assert said.index(" to the end") > said.index("a new run")
    assert "WARNING" not in said


def test_what_was_chosen_stays_when_the_run_grows(copied, capsys):
    before = read_json(copied / "config.json")["recipe"]
    train(copied, recipe={"steps": 30}, network=None)
    after = read_json(copied / "config.json")["recipe"]
    assert before.pop("steps") == 8
    assert after.pop("steps") == 30
    assert after == before
    assert "goes on from step 8" in capsys.readouterr().err


def test_a_trial_that_becomes_a_long_run_is_told_that_its_average_stays_short(copied):
    plan = recipes.make_plan(
        copied,
        recipes.Source(),
        validation.Validation(),
        variant=None,
        recipe={"steps": 20_000},
        network=None,
        init=None,
        device=torch.device("cpu"),
    )
    (line,) = recipes.outgrown(plan)
    assert "--warmup 1,000 --ema 0.9995 (another --out)" in line
    short = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, steps=9))
    assert list(recipes.outgrown(short)) == []


def test_a_run_that_is_further_than_it_is_to_go_says_so_and_is_left_alone(copied):
    before = (copied / "config.json").read_bytes()
    with pytest.raises(UserError, match="is at step 8 already, beyond --steps 5"):
        train(copied, recipe={"steps": 5}, network=None)
    assert (copied / "config.json").read_bytes() == before


def test_layers_that_make_the_same_blocks_are_the_same_network(copied, digits, capsys):
    train(copied, recipe={"steps": 9}, network={"layers": (1, 1)})
    with pytest.raises(UserError, match=r"layers \[1, 1\], not \[3, 1\]"):
        train(copied, recipe={"steps": 10}, network={"layers": (3, 1)})
    out = copied.with_name("even")
    train(out, digits, recipe={"steps": 1}, network={**TINY, "layers": (2, 1)})
    assert "3, 1 blocks of widths 16, 8 (layers 2, 1: even ones get one more)" in (
        capsys.readouterr().err
    )
    train(out, recipe={"steps": 2}, network={"layers": (3, 1)})
    assert read_json(out / "config.json")["config"]["layers"] == [2, 1]


def test_a_rate_changes_by_force_alone_and_the_run_remembers(copied, capsys):
    with pytest.raises(UserError, match="change it from here on with --force"):
        train(copied, recipe={"steps": 10, "lr": 1e-3}, network=None)
    train(copied, recipe={"steps": 10, "lr": 1e-3}, network=None, force=True)
    assert "lr is 0.001 from here on, it was 0.008 (--force)" in capsys.readouterr().err
    train(copied, recipe={"steps": 11, "lr": 1e-4}, network=None, force=True)
    record = read_json(copied / "config.json")
    assert record["recipe"]["lr"] == 1e-4
    assert record["history"] == [
        {"step": 8, "changed": {"lr": [0.008, 1e-3]}},
        {"step": 10, "changed": {"lr": [1e-3, 1e-4]}},
    ]
    rates = [line["lr"] for line in journal.read_metrics(copied)]
    assert rates[-3:] == [1e-3, 1e-3, 1e-4]
    train(copied, recipe={"steps": 12}, network=None)
    assert read_json(copied / "config.json")["history"] == record["history"]


def test_a_batch_size_does_not_change_and_the_way_out_is_named(copied):
    with pytest.raises(UserError, match=r"batch_size 32, not 16; .*--init .*begin anew"):
        train(copied, recipe={"batch_size": 16}, network=None, force=True)


def test_a_mistyped_run_is_told_as_that(copied, monkeypatch):
    monkeypatch.chdir(copied.parent)
    monkeypatch.delenv("DIMR_DATA", raising=False)
    near = invoke("train", "--out", "leters", "--steps", 20)
    assert near.exit_code == 1
    assert "leters holds no run to go on with; near it: letters." in near.output
    far = invoke("train", "--out", "quite-another", "--steps", 20)
    assert far.exit_code == 1
    assert "quite-another is no run to go on with; there are letters" in far.output
    assert not (copied.parent / "leters").exists()


# another run's weights


def embeddings(run, name="ema"):
    tensors, _ = load_tensors(runfolder.checkpoints(run)[-1] / f"{name}.safetensors")
    return tensors["branches.0.class_token.weight"]


STILL = {"steps": 1, "lr": 1e-12, "weight_decay": 0.0}


def test_fine_tuning_keeps_recipe_and_null_class_and_matches_classes_by_name(
    own, digits, tmp_path, capsys
):
    folder = tmp_path / "data"
    for name in ("7", "3"):
        shutil.copytree(digits / name, folder / name)
    shutil.copytree(digits / "5", folder / "another")
    train(tmp_path / "tuned", folder, recipe=STILL, network=None, init=own)
    said = capsys.readouterr().err
    assert "class embeddings: 2 taken by name and the null class; fresh: another" in said
    assert "its recipe is taken over" in said
    assert f"recipe   that of {own}: " in said
    rows = embeddings(tmp_path / "tuned")  # of 3, 7, another, null
    before = embeddings(own)
    torch.testing.assert_close(rows[[0, 1, 3]], before[[3, 7, 10]], rtol=0, atol=1e-6)
    assert not any(torch.allclose(rows[2], row, atol=1e-4) for row in before)
    record = read_json(tmp_path / "tuned" / "config.json")
    theirs = read_json(own / "config.json")["recipe"]
    kept = {name: record["recipe"][name] for name in theirs if name not in STILL}
    assert kept == {name: theirs[name] for name in kept}
    assert record["config"]["null_class"]


def test_as_many_other_classes_take_nothing(own, digits, tmp_path, capsys):
    folder = tmp_path / "data"
    for name in digits.iterdir():
        shutil.copytree(name, folder / f"letter {name.name}")
    train(tmp_path / "tuned", folder, recipe=STILL, network=None, init=own)
    said = capsys.readouterr().err
    assert "embeddings: 0 taken by name and the null class; fresh: letter 0, letter 1," in said
    rows = embeddings(tmp_path / "tuned")
    assert torch.allclose(rows[10], embeddings(own)[10], atol=1e-6)
    assert not torch.allclose(rows[:10], embeddings(own)[:10], atol=1e-3)


def test_a_weights_file_alone_brings_its_recipe(own, digits, tmp_path, capsys):
    shutil.copy(runfolder.find_weights(own), tmp_path / "mine.safetensors")
    train(
        tmp_path / "tuned",
        digits,
        recipe={"steps": 1, "batch_size": 4, "label_dropout": 0.0},
        network=None,
        init=tmp_path / "mine.safetensors",
    )
    record = read_json(tmp_path / "tuned" / "config.json")
    assert record["recipe"]["batch_size"] == 4
    assert record["recipe"]["lr"] == read_json(own / "config.json")["recipe"]["lr"]
    assert record["config"]["null_class"]  # kept, though no label is dropped
    assert "fresh: none" in capsys.readouterr().err


# stopping


def test_the_first_interrupt_is_answered_at_once(digits, tmp_path, capfd):
    """Before the step is done: the answer comes from the signal's handler itself."""
    with training.Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        assert "finishing this step and saving" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(10)


# looking and measuring


def test_info_knows_runs_files_and_networks_of_ones_own(own):
    run = json.loads(invoke("info", own, "--json").output)
    assert run["classes"] == [str(digit) for digit in range(10)]
    assert (run["step"], [branch["dim"] for branch in run["branches"]]) == (8, [16, 8])
    file = runfolder.find_weights(own)
    assert json.loads(invoke("info", file, "--json").output)["params"] == run["params"]
    assert f"{run['params']:,} parameters" in invoke("info", own).output
    network = "--variant demo --layers 1,1 --dims 16,8 --heads 2 --json"
    assert json.loads(invoke("info", *network.split()).output)["params"] == run["params"]
    both = invoke("info", own, "--variant", "demo")
    assert both.exit_code == 2 and "leave out --variant" in both.output


def test_convert_takes_a_run(own, tmp_path):
    assert invoke("convert", own, tmp_path / "mine.pth").exit_code == 0
    there, _ = runfolder.read_weights(tmp_path / "mine.pth")
    before, _ = runfolder.read_weights(runfolder.find_weights(own))
    for name, tensor in before.state_dict().items():
        assert torch.equal(there.state_dict()[name], tensor)


@pytest.mark.parametrize("arguments, status", [(["info", "no"], 1), (["info", "--dims", "a"], 2)])
def test_what_failed_is_json_too(monkeypatch, arguments, status):
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    result = invoke(*arguments, "--json")
    assert result.exit_code == status
    said = json.loads(result.stdout)["error"]
    assert said and said in result.stderr
    assert invoke(*arguments).stdout == ""


def test_bad_images_name_the_option_that_leaves_them_out(digits, tmp_path):
    folder = shutil.copytree(digits, tmp_path / "data")
    (folder / "3" / "0003.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="0003.png: is not .* --on-bad-image skip"):
        train(tmp_path / "run", folder, recipe={"steps": 20})


def test_classes_go_by_name_and_near_names_are_told(own, tmp_path, digits):
    folder = tmp_path / "data"
    for digit, name in enumerate(("Food & Drink", "Flags", "Animals")):
        shutil.copytree(digits / str(digit), folder / name)
    train(tmp_path / "named", folder, recipe={"steps": 1})
    generator = sampling.load(tmp_path / "named", device="cpu")
    by_name = generator.images(classes=["flags", "Food & Drink"], seeds=[3, 4], steps=2)
    by_number = generator.images(classes=[1, 2], seeds=[3, 4], steps=2)
    assert (by_name == by_number).all()
    with pytest.raises(UserError, match="near it: Food & Drink; or use an index from 0 to 2"):
        generator.images(classes=["food"], seeds=[0])
    with pytest.raises(UserError, match="near it: Animals"):
        generator.images(classes=["anmals"], seeds=[0])


def test_linked_class_folders_are_measured_as_they_are_trained_on(digits, tmp_path):
    for name in ("0", "1"):
        (tmp_path / name).symlink_to(digits / name)
    (tmp_path / "1b").mkdir()
    (tmp_path / "1b" / "again").symlink_to(tmp_path)  # a circle
    images = imagesets.open_set(tmp_path)
    assert len(images) == sum(len(list((digits / name).iterdir())) for name in ("0", "1"))


def test_a_balanced_set_beside_uneven_data_is_noted(digits, tmp_path):
    folder = tmp_path / "data"
    for name, count in (("cat", 12), ("dog", 3)):
        (folder / name).mkdir(parents=True)
        for k, path in enumerate(sorted((digits / "4").iterdir())[:count]):
            shutil.copy(path, folder / name / f"{k}.png")
    balanced = tmp_path / "balanced"
    for name in ("cat", "dog"):
        shutil.copytree(folder / "dog", balanced / name)
    reference = evaluation.Reference(folder, 8)
    (note,) = evaluation.proportions(imagesets.open_set(balanced), reference)
    assert "from 3 (dog) to 12 (cat) images a class" in note
    assert note.endswith("of cat 12, dog 3")
    assert evaluation.proportions(imagesets.open_set(folder), reference) == []
    even = evaluation.Reference(balanced, 8)
    assert evaluation.proportions(imagesets.open_set(balanced), even) == []


def test_the_metrics_short_help_is_a_part_of_the_long_one():
    brief = invoke("eval", "fid", "--help").output
    whole = invoke("eval", "fid", "--help-all").output
    assert len(brief.splitlines()) < 0.7 * len(whole.splitlines())
    assert "--ref" in brief and "--help-all" in brief
    for option in cli.eval_group.commands["fid"].params:
        for name in option.opts:
            assert name in whole or not name.startswith("--")
