"""`dimr train --validate`: a loss on held-out images that nothing but the weights changes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL
from PIL import Image
from ranks import Ranks, command, validate

import cli
import dataset
import dimr
import encoding
import journal
import recipes
import runfolder
import training
import validation
from storage import UserError, read_json
from validation import LEVELS, HeldOut, Validation

CONFIG = dimr.Config(
    size=8,
    channels=1,
    layers=(1, 1),
    dims=(8, 8),
    heads=1,
    num_classes=10,
    null_class=True,
    space="pixel",
)
RECIPE = dataclasses.replace(recipes.RECIPES["demo"], precision="fp32", compile=False)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Real digits that `digits` doesn't hold: 70 of its classes 2 to 9."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("others")
    data = load_digits()
    chosen = [i for i in range(300, 500) if data.target[i] >= 2][:70]
    for i in chosen:
        folder = root / str(data.target[i])
        folder.mkdir(exist_ok=True)
        pixels = np.round(data.images[i] * 15.9).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def new_state(recipe=RECIPE, seed=0):
    return training.State(training.new_network(CONFIG, seed), recipe, torch.device("cpu"))


def measured(state, held, **options):
    return validation.measure(state, held, workers=0, **options)[0]


def held_out(digits, others, **options):
    return HeldOut(others, dataset.open_data(digits), **options)


# what is measured


def test_a_network_that_predicts_nothing_has_the_losses_of_noise(digits, others):
    """Pooled to unit variance, each branch's is 1, and their sum Σ 1/k² (eq. 8) is 1 + 1/4."""
    state = new_state()
    state.network = Nothing(CONFIG)
    found = measured(state, held_out(digits, others))
    assert found["validation_loss"] == pytest.approx(1.25, abs=0.05)
    assert found["validation_loss_branches"] == pytest.approx([1, 1], abs=0.05)
    assert found["validation_loss_levels"] == pytest.approx([1.25] * LEVELS, abs=0.1)


class Nothing(torch.nn.Module):
    """Predicts 0 at both resolutions; keeps what it was given."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.seen = []

    def time(self, schedule, t):
        return dimr.DiMR.time(self, schedule, t)

    def forward(self, x, tau, labels):
        assert not torch.is_grad_enabled()
        self.seen.append((x, tau, labels))
        return x.new_zeros(len(x), 1, 4, 4), x.new_zeros(len(x), 1, 8, 8)


def test_each_level_is_a_stretch_of_the_time_and_labels_are_numbered_as_in_training(digits, others):
    """The held-out set lacks the first two of training's classes."""
    state = new_state()
    state.network = Nothing(CONFIG)
    measured(state, held_out(digits, others))
    seen = state.network.seen
    assert len(seen) == 3 * LEVELS  # 70 images in batches of 32
    edges = state.network.time(state.schedule, torch.linspace(0, 1, LEVELS + 1).double())
    for number, (_, tau, _) in enumerate(seen):
        level = number % LEVELS  # τ falls with time, from little noise to much
        assert (edges[level] + 1e-6 >= tau).all() and (tau >= edges[level + 1] - 1e-6).all()
        assert len(tau.unique()) == len(tau)
    labels = torch.cat([labels for _, _, labels in seen[::LEVELS]])[:70]
    counts = [len(list((others / name).iterdir())) for name in "23456789"]
    assert torch.bincount(labels, minlength=10).tolist() == [0, 0, *counts]


def test_the_mean_is_that_of_the_images_one_by_one(digits, others):
    state = new_state()
    held = held_out(digits, others)
    found = measured(state, held)
    data = held.data
    total = torch.zeros(LEVELS, 3, dtype=torch.float64)
    for place in range(len(data)):
        images, labels = data.batch([place], [False])
        total += validation._losses(state, place, images, held.labels(labels))[:, :, 0]
    total /= len(data)
    assert found["validation_loss"] == pytest.approx(float(total[:, 0].mean()), rel=1e-5)
    assert found["validation_loss_branches"] == pytest.approx(total[:, 1:].mean(0).tolist(), 1e-5)
    assert found["validation_loss_levels"] == pytest.approx(total[:, 0].tolist(), rel=1e-5)


def test_nothing_but_weights_and_images_changes_it(digits, others):
    """Not the run's seed, its step, what is drawn beside it; and it changes nothing of the run."""
    held = held_out(digits, others)
    first = measured(new_state(), held)
    again = new_state(dataclasses.replace(RECIPE, seed=7))
    again.step = 1000
    torch.randn(5)
    before = torch.random.get_rng_state()
    assert measured(again, held) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in again.parameters.values())
    assert again.network.training == new_state().network.training
    assert measured(new_state(seed=1), held) != first


def test_nothing_is_compiled_for_it(digits, others):
    def backend(graph, inputs):
        raise AssertionError("compiled")

    held = held_out(digits, others)
    state = new_state()
    state.network.compile(backend=backend)
    assert measured(state, held) == measured(new_state(), held)


def test_what_is_noted_at_one_step_is_noted_together(tmp_path):
    log = journal.Journal(tmp_path, new_state(), print, {})
    log.remark(lambda: {"fid": 1.0})
    log.remark(lambda: {"validation_loss": 2.0})
    assert log.remarks == {"fid": 1.0, "validation_loss": 2.0}


def test_the_size_of_a_batch_changes_only_rounding(digits, others):
    held = held_out(digits, others)
    found = []
    for micro in (5, 32):
        state = new_state(dataclasses.replace(RECIPE, micro_batch=micro))
        found.append(measured(state, held)["validation_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.slow
def test_any_number_of_processes_measures_the_same_to_the_byte(digits, others, tmp_path):
    said = set()
    for count in (1, 3):
        with Ranks(count, tmp_path, validate, digits, others) as ranks:
            for status, line in ranks.end():
                assert status == 0, line
                said.add(line)
    (line,) = said
    assert json.loads(line).keys() == {
        "validation_loss",
        "validation_loss_branches",
        "validation_loss_levels",
    }


@pytest.mark.slow
def test_an_unreadable_image_is_refused_on_every_process(digits, others, tmp_path):
    bad = shutil.copytree(others, tmp_path / "bad")
    (bad / "9" / "0000.png").write_bytes(b"")
    with Ranks(2, tmp_path, validate, digits, bad) as ranks:
        for status, line in ranks.end():
            assert status == 0
            assert "9/0000.png: is empty" in json.loads(line)["refused"]


# what it is measured on


def test_classes_go_by_name(digits, others, tmp_path):
    data = dataset.open_data(digits)
    few = dataset.open_data(digits, classes=["7", "3"])
    held = HeldOut(others, few, classes=["3", "7"])
    assert held.labels(torch.tensor([0, 1])).tolist() == [0, 1]
    assert held_out(digits, others).labels(torch.arange(8)).tolist() == list(range(2, 10))
    strange = shutil.copytree(others, tmp_path / "strange")
    (strange / "9").rename(strange / "nine")
    with pytest.raises(UserError, match="class 'nine' that is not trained on.*'0', '1', '2'"):
        HeldOut(strange, data)
    one = dataset.open_data(digits / "3")
    assert HeldOut(others / "5", one).labels(torch.tensor([0])).tolist() == [0]


def test_the_images_that_are_trained_on_are_refused(digits, tmp_path):
    copy = shutil.copytree(digits, tmp_path / "copy")
    with pytest.raises(UserError, match="copy holds the images that are trained on"):
        HeldOut(copy, dataset.open_data(digits))


def shards_of(folder, out, res=8):
    encoding.encode(folder, out, res, pixels=True, workers=0, quiet=True)
    return out


def test_other_sizes_are_refused_and_shards_taken(digits, others, tmp_path):
    data = dataset.open_data(digits)
    encoded = HeldOut(shards_of(others, tmp_path / "shards"), data)
    assert measured(new_state(), encoded) == measured(new_state(), held_out(digits, others))
    with pytest.raises(UserError, match="of size 16.*not size 8"):
        HeldOut(shards_of(others, tmp_path / "large", 16), data)


class Latents:
    """What is asked of latents that are trained on."""

    kind, size, channels, root = "latents", 8, 1, "latents"
    index = {"vae_sha256": "a"}


def test_latents_want_latents_of_the_same_vae(others, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no latents.*dimr encode --data"):
        HeldOut(others, Latents)
    with pytest.raises(UserError, match="pixels of size 8.*latents of size 8.*encode both alike"):
        HeldOut(shards_of(others, tmp_path / "shards"), Latents)

    class Others(Latents):
        index = {"vae_sha256": "b"}

    monkeypatch.setattr(dataset, "open_data", lambda *_, **__: Others)
    with pytest.raises(UserError, match="latents of another VAE"):
        HeldOut(tmp_path / "shards", Latents)
    Others.index = {"vae_sha256": None}  # of --from-latents
    Others.fingerprint, Others.classes, Others.labels = "f", ["a"], np.zeros(1, int)
    Latents.fingerprint, Latents.classes = "g", ["b"]
    HeldOut(tmp_path / "shards", Latents)


# in a run


def train(out, data, steps=12, **options):
    return training.train(
        out,
        training.Source(data, workers=0),
        variant="demo",
        recipe={"steps": steps, "batch_size": 8, "warmup": 2, "lr": 4e-3, "ema": 0.9},
        network={"layers": (2, 2), "dims": (16, 8), "heads": 2},
        device="cpu",
        saving=training.Saving(every=4, keep=0, sample_every=0),
        **options,
    )


def notes(out):
    """{step: what is noted of held-out images}."""
    found = {}
    for line in journal.read_metrics(out):
        facts = {name: value for name, value in line.items() if name.startswith("validation")}
        if facts:
            found[line["step"]] = facts
    return found


def last_files(out):
    return {path.name: path.read_bytes() for path in runfolder.checkpoints(out)[-1].iterdir()}


@pytest.mark.slow
def test_a_run_with_validation_is_the_run_without(digits, others, tmp_path, capsys):
    """The same bytes, interrupted or not; and the numbers are those of the undisturbed run."""
    validate = Validation(others, 3)
    train(tmp_path / "without", digits)
    train(tmp_path / "with", digits, validate=validate)
    assert last_files(tmp_path / "with") == last_files(tmp_path / "without")
    whole = notes(tmp_path / "with")
    assert list(whole) == [3, 6, 9, 12]
    out = shutil.copytree(tmp_path / "with", tmp_path / "resumed")
    shutil.rmtree(runfolder.checkpoints(out)[-1])
    capsys.readouterr()
    train(out, digits)  # as its config.json says
    assert f"held out 70 images, {others}" in capsys.readouterr().err
    assert last_files(out) == last_files(tmp_path / "with")
    assert notes(out) == whole
    record = read_json(out / "config.json")["validation"]
    assert (record["path"], record["items"], record["every"]) == (str(others), 70, 3)
    assert record["fingerprint"] == dataset.open_data(others).fingerprint
    assert Image.open(out / "loss.png").size == (900, 3 * 480)
    assert Image.open(tmp_path / "without" / "loss.png").size == (900, 480)


@pytest.mark.slow
def test_processes_that_train_together_validate_together(digits, others, tmp_path):
    """From the first step on, before anything stands in the bar."""
    line = ["train", "--data", digits, *SMALL, "--steps", 3]
    line += ["--validate", others, "--validate-every", 1, "--out"]
    for count in (1, 2):
        with Ranks(count, tmp_path, command, *line, tmp_path / f"run{count}") as ranks:
            assert [status for status, _ in ranks.end()] == [0] * count, ranks.said()
    alone, together = notes(tmp_path / "run1"), notes(tmp_path / "run2")
    assert list(alone) == list(together) == [1, 2, 3]
    for step, facts in alone.items():
        for name, value in facts.items():
            assert together[step][name] == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_what_is_validated_on_is_kept_and_may_be_changed(digits, others, tmp_path):
    out = tmp_path / "run"
    moved = shutil.copytree(others, tmp_path / "moved")
    fewer = shutil.copytree(others, tmp_path / "fewer")
    shutil.rmtree(fewer / "9")
    train(out, digits, steps=4)
    train(out, digits, steps=8, validate=Validation(moved))  # from here on, as often as saved
    assert list(notes(out)) == [8]
    moved.rename(tmp_path / "gone")
    with pytest.raises(
        UserError, match="validation data of .*run is no longer at .*moved.*-every 0"
    ):
        train(out, digits)
    train(out, digits, validate=Validation(tmp_path / "gone"))
    assert list(notes(out)) == [8, 12]
    with pytest.raises(UserError, match="validation data's fingerprint .* not .* --force"):
        train(out, digits, steps=16, validate=Validation(fewer))
    train(out, digits, steps=16, validate=Validation(fewer), force=True)
    history = read_json(out / "config.json")["history"]
    assert [(entry["step"], list(entry["changed"])) for entry in history] == [
        (12, ["validation data's fingerprint"])
    ]
    train(out, digits, steps=20, validate=Validation(every=0))
    train(out, digits, steps=24)
    assert list(notes(out)) == [8, 12, 16]
    assert "validation" not in read_json(out / "config.json")
    with pytest.raises(UserError, match="--validate-every 5 needs --validate"):
        train(out, digits, steps=28, validate=Validation(every=5))


@pytest.mark.slow
def test_an_image_that_can_not_be_read_costs_the_number_and_not_the_run(
    digits, others, tmp_path, capsys
):
    bad = shutil.copytree(others, tmp_path / "bad")
    (bad / "9" / "0000.png").write_bytes(b"")
    result = train(tmp_path / "run", digits, validate=Validation(bad))
    assert result["step"] == 12 and notes(tmp_path / "run") == {}
    said = capsys.readouterr().err
    assert said.count("WARNING: no evaluation at step") == 3
    assert "9/0000.png: is empty" in said


@pytest.mark.slow
def test_learning_by_heart_is_seen(digits, others, tmp_path):
    """On few images, with the options of the command line: the training loss falls below the
    held-out one, which rises again where there is little noise to hide behind."""
    few = tmp_path / "few"
    for name in "23456789":
        (few / name).mkdir(parents=True)
        path = sorted((digits / name).iterdir())[0]
        shutil.copy(path, few / name)
    out = tmp_path / "run"
    options = [*SMALL, "--dims", "32,16", "--steps", 400, "--save-every", 400, "--warmup", 10]
    options += ["--label-dropout", 0, "--validate", others, "--validate-every", 40]
    line = ["train", "--data", few, "--out", out, *options]
    result = CliRunner().invoke(cli.main, [str(word) for word in line])
    assert result.exit_code == 0, result.output
    lines = journal.read_metrics(out)
    trained = np.mean([line["loss"] for line in lines[-50:]])
    curve = [facts["validation_loss"] for facts in notes(out).values()]
    assert len(curve) == 10
    assert curve[-1] > 1.2 * trained
    assert curve[-1] > 1.05 * min(curve)
