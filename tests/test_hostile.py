"""Damage that random mutations found: each is told in one line, or costs nothing."""

import io
import json
import os
import resource
import shlex
import shutil
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import cli
import extraction
import imagesets
import runfolder
import storage
import training
from storage import UserError

TINY = shlex.split("""
    --variant demo --layers 1,1 --dims 8,8 --heads 1 --batch-size 4 --warmup 0 --workers 0
    --device cpu --sample-every 0
""")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DIMR_OFFLINE", "1")


def dimr(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def refused(done, *words):
    """Whether a command ended with one clear line, which holds these words."""
    assert isinstance(done.exception, SystemExit), done.output
    assert done.exit_code in (1, 2), done.output
    line = done.stderr[done.stderr.index("Error:") :].strip()
    assert "\n" not in line and "Traceback" not in done.output, done.output
    assert all(word in line for word in words), line
    return True


@pytest.fixture
def pictures(tmp_path):
    """Twelve grey images in two classes."""
    for i in range(12):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


# what a run's data are


def replace_one(folder, name="a/04.png"):
    """Another image under the same name, of the same size in bytes."""
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # in the checksum of the last chunk but one, which readers check
    path.write_bytes(data)


def train(out, data, steps, *more):
    return dimr("train", "--data", data, "--out", out, "--steps", steps, *TINY, *more)


def test_a_run_notices_an_image_of_the_same_name_and_size(pictures, tmp_path):
    assert train(tmp_path / "run", pictures, 1).exit_code == 0
    replace_one(pictures)
    refused(train(tmp_path / "run", pictures, 2), "data's contents", "choose another --out")


def test_a_run_of_0_1_goes_on_and_notes_the_contents(pictures, tmp_path):
    out = tmp_path / "run"
    assert train(out, pictures, 1).exit_code == 0
    record = json.loads((out / "config.json").read_text())
    for name in ("sample", "content"):
        del record["data"][name]
    (out / "config.json").write_text(json.dumps(record))
    assert train(out, pictures, 2).exit_code == 0
    assert json.loads((out / "config.json").read_text())["data"]["sample"]


def test_verify_data_notes_all_contents_and_compares_with_them(pictures, tmp_path, monkeypatch):
    import dataset

    monkeypatch.setattr(dataset, "SAMPLED", 1)  # the first alone
    out = tmp_path / "run"
    first = train(out, pictures, 1, "--verify-data")
    assert first.exit_code == 0 and "contents of all data noted" in first.stderr
    again = train(out, pictures, 2, "--verify-data")
    assert again.exit_code == 0 and "contents of all data are as they were" in again.stderr
    replace_one(pictures)
    assert train(out, pictures, 2).exit_code == 0  # a sample is a sample
    refused(train(out, pictures, 2, "--verify-data"), "other images than it did", "restore")


def test_verify_data_compares_shards_with_their_index(pictures, tmp_path):
    out = tmp_path / "shards"
    encode = ("encode", "--data", pictures, "--out", out, "--pixels", "--res", 8, "--workers", 0)
    assert dimr(*encode).exit_code == 0
    path = out / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[600] ^= 8
    path.write_bytes(data)
    assert train(tmp_path / "plain", out, 1).exit_code == 0
    refused(train(tmp_path / "run", out, 1, "--verify-data"), "recorded hash", "encode")
    features = ("--features", "plain_features:pooled", "--device", "cpu")
    refused(dimr("eval", "fid", out, "--ref", pictures, *features, "--verify-data"), "hash")
    refused(dimr("eval", "fid", pictures, "--ref", out, *features, "--verify-data"), "hash")
    stats = ("eval", "stats", out, tmp_path / "s.safetensors")
    refused(dimr(*stats, *features, "--verify-data"), "hash")


# weights


def ema_of(run):
    return runfolder.checkpoints(run)[-1] / "ema.safetensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32_and_it_is_said(run, tmp_path, dtype, capsys):
    tensors, about = storage.load_tensors(ema_of(run))
    path = tmp_path / "other.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path, about)
    model, _ = runfolder.read_weights(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert f"weights in {str(dtype)[6:]}, which become float32" in capsys.readouterr().err
    drawn = dimr("sample", "--weights", path, "-n", 2, "--steps", 2, "--device", "cpu")
    assert drawn.exit_code == 0


NO_WEIGHTS = {
    "int32": lambda tensor: tensor.to(torch.int32),
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "a sparse tensor": lambda tensor: tensor.to_sparse(),
    "without values": lambda tensor: tensor.to("meta"),
    "a nested tensor": lambda tensor: torch.nested.nested_tensor([tensor]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_what_can_be_no_weights_is_refused(run, tmp_path, what):
    tensors, _ = storage.load_tensors(ema_of(run))
    name = next(iter(tensors))
    tensors[name] = NO_WEIGHTS[what](tensors[name])
    path = tmp_path / "strange.pth"
    torch.save(tensors, path)
    with pytest.raises(UserError, match=what):
        runfolder.read_weights(path)
    with pytest.raises(UserError):
        extraction.inception(path)


def with_record(run, **changes):
    """The run's weights, which say otherwise of themselves."""
    path = ema_of(run)
    tensors, about = storage.load_tensors(path)
    changed = run.parent / "changed.safetensors"
    storage.save_tensors(changed, tensors, {**about, **changes})
    return changed


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": DEEP}, "nested deeper"),
        ({"config": "3"}, "config is 3"),
        ({"classes": '["a"]'}, "names 1 classes and has 10"),
        ({"classes": "[1]"}, "classes[0] is 1"),
        ({"step": '"x"'}, "step is"),
        ({"recipe": "[]"}, "recipe is a list"),
        ({"recipe": '{"lr": "x"}'}, "recipe.lr is"),
        ({"vae_sha256": '"x"'}, "vae_sha256 is"),
    ],
    ids=["deep", "config", "classes", "names", "step", "recipe", "rate", "hash"],
)
def test_what_weights_say_of_themselves_is_checked(run, changes, words):
    with pytest.raises(UserError) as error:
        runfolder.read_weights(with_record(run, **changes))
    assert words in str(error.value)


@pytest.mark.parametrize("layers", [[10**6, 2], [1000, 1000], [2, "2"], [2.0, 2]], ids=str)
def test_a_network_that_no_file_can_hold_is_refused_at_once(run, layers):
    _, about = storage.load_tensors(ema_of(run))
    config = {**json.loads(about["config"]), "layers": layers}
    with pytest.raises(UserError, match="does not fit"):
        runfolder.read_weights(with_record(run, config=json.dumps(config)))


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("config.json", DEEP, "nested deeper"),
        ("config.json", "[]", "is a list of 0"),
        ("config.json", '{"variant": null, "config": 1, "recipe": {}, "data": {}}', "config is 1"),
        ("config.json", "{}", "variant is missing"),
        ("metrics.jsonl", DEEP + "\n", "line 1 is damaged"),
        ("metrics.jsonl", '{"step": "1", "loss": 1}\n', "line 1 is damaged"),
        ("metrics.jsonl", '{"step": 1, "loss": []}\n', "line 1 is damaged"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(run, digits, name, text, words):
    (run / name).write_text(text)
    done = dimr("train", "--data", digits, "--out", run, "--steps", 13, "--workers", 0)
    refused(done, name, words)


def test_a_config_of_another_network_takes_no_memory_for_it(run, digits, monkeypatch):
    record = json.loads((run / "config.json").read_text())
    record["config"]["dims"] = [64, *record["config"]["dims"][1:]]
    (run / "config.json").write_text(json.dumps(record))
    monkeypatch.setattr(training, "new_network", None)
    with pytest.raises(UserError, match="is of another network"):
        training.train(run, training.Source(digits, workers=0), device="cpu", quiet=True)


def test_a_recipe_that_lacks_something_is_not_filled_up(run, digits):
    record = json.loads((run / "config.json").read_text())
    steps = record["recipe"].pop("steps")
    (run / "config.json").write_text(json.dumps(record))
    refused(dimr("train", "--data", digits, "--out", run), "recipe.steps is missing")
    assert steps == 12


def test_a_damaged_manifest_costs_its_checkpoint_alone(run, capsys):
    newest = runfolder.checkpoints(run)[-1]
    for text in (DEEP, "[]", '{"../../config.json": "x"}', "{}"):
        (newest / "manifest.json").write_text(text)
        assert runfolder.newest_whole(run) == runfolder.checkpoints(run)[-2]
        assert "checkpoint refused" in capsys.readouterr().err


def test_statistics_are_checked(tmp_path):
    mean = torch.zeros(3, dtype=torch.float64)
    good = {"mean": mean, "covariance": torch.eye(3, dtype=torch.float64)}
    facts = {name: '"x"' for name in ("source", "sha256", "extractor", "identity")}
    facts |= {"size": "8", "count": "4"}
    path = tmp_path / "s.safetensors"
    storage.save_tensors(path, good, facts)
    assert extraction.Measured.load(path).count == 4
    for tensors, about in (
        ({**good, "mean": mean[:2]}, facts),
        ({**good, "mean": mean * float("nan")}, facts),
        ({**good, "mean": mean.long()}, facts),
        ({"covariance": good["covariance"]}, {**facts, "mean": "null"}),
        (good, {**facts, "count": '"four"'}),
        (good, {**facts, "source": DEEP}),
    ):
        storage.save_tensors(path, tensors, about)
        with pytest.raises(UserError, match="s.safetensors"):
            extraction.Measured.load(path)


# what only draws or tells


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a\nb", "tab\tand\x1b[31mred", "\udcff", "e\u0301\u202e"])
def test_odd_names_of_classes_are_shown_escaped_and_end_nothing(pictures, tmp_path, name):
    os.rename(pictures / "a", os.path.join(pictures, name))
    words = TINY[:-1] + ["1"]  # --sample-every
    out = tmp_path / "run"
    done = dimr("train", "--data", pictures, "--out", out, "--steps", 4, *words)
    assert done.exit_code == 0, done.output
    assert "WARNING" not in done.stderr.replace("WARNING: the average", "")
    assert len(list((out / "samples").glob("step-*.png"))) == 4
    for command in (
        ("info", out),
        ("sample", "--weights", out, "-n", 2, "--steps", 1, "--out", tmp_path / "drawn"),
        ("sample", "--weights", out, "-n", 2, "--steps", 1, "--class", "no such"),
        ("train", "--data", pictures, "--init", out, "--out", tmp_path / "two", *TINY),
    ):
        done = dimr(*command, *(("--steps", 1) if command[0] == "train" else ()))
        assert done.exit_code == (1 if "no such" in command else 0), done.output
        assert "\x1b" not in done.output and "\u2028" not in done.output


@pytest.mark.slow
def test_what_draws_may_raise_anything_and_it_is_said_once(pictures, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("in a picture")

    monkeypatch.setattr("pictures.grid", fails)
    monkeypatch.setattr("pictures.curves", fails)
    words = TINY[:-1] + ["1"]  # --sample-every
    done = dimr("train", "--data", pictures, "--out", tmp_path / "run", "--steps", 3, *words)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("ZeroDivisionError: in a picture") == 1
    assert runfolder.step_of(runfolder.checkpoints(tmp_path / "run")[-1]) == 3


# the run folder


def moving(monkeypatch, at, what):
    """Do something to the run's folder once step `at` is done."""
    import training

    step = training.train_step

    def train_step(state, *arguments):
        found = step(state, *arguments)
        if state.step == at:
            what()
        return found

    monkeypatch.setattr(training, "train_step", train_step)


def test_a_run_that_is_moved_while_it_trains_goes_on_where_it_is(pictures, tmp_path, monkeypatch):
    there = tmp_path / "elsewhere" / "moved"
    there.parent.mkdir()
    moving(monkeypatch, 2, lambda: (tmp_path / "run").rename(there))
    done = train(tmp_path / "run", pictures, 4, "--save-every", 1)
    assert done.exit_code == 0 and f"has been moved to {there}" in done.stderr, done.output
    assert runfolder.step_of(runfolder.checkpoints(there)[-1]) == 4
    steps = [json.loads(line)["step"] for line in (there / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4]
    assert not (tmp_path / "run").exists()


def test_a_run_whose_folder_is_deleted_keeps_what_it_has_in_memory(pictures, tmp_path, monkeypatch):
    out = tmp_path / "run"
    moving(monkeypatch, 2, lambda: shutil.rmtree(out))
    done = train(out, pictures, 4, "--save-every", 2)
    assert done.exit_code == 0 and "is gone; it is made again" in done.stderr, done.output
    assert runfolder.step_of(runfolder.checkpoints(out)[-1]) == 4
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train(out, pictures, 5).exit_code == 0


def test_a_link_among_temporary_files_is_removed_and_not_followed(pictures, run, tmp_path):
    (run / ".x.tmp").symlink_to(pictures)
    (run / ".y.tmp").symlink_to(tmp_path / "nowhere")
    with storage.locked(run):
        pass
    assert not list(run.glob(".*.tmp")) and len(list(pictures.glob("*/*"))) == 12


# numbers that are too large


TOO_MUCH = [
    ("sample -n 1000000000", 2, "--count|-n"),
    ("sample -n 2 --seeds 0-1000000000000", 2, "10,000,000 images"),
    ("sample -n 2 --seed 9223372036854775808", 2, "9223372036854775807"),
    ("sample -n 2 --seed 9223372036854775807", 1, "seed 9223372036854775808 is not from 0"),
    ("sample --seeds 18446744073709551616", 2, "9223372036854775807"),
    ("sample -n 2 --batch-size 1000000000", 1, "smaller --batch-size"),
    ("train --data {data} --seed 18446744073709551616", 2, "9223372036854775807"),
    ("train --data {data} --batch-size 1000000000", 1, "smaller --micro-batch"),
    ("train --data {data} --dims 131072,65536 --layers 99,99 --heads 8", 1, "smaller network"),
    ("demo --seed 9223372036854775808", 2, "9223372036854775807"),
    ("encode --pixels --data {data} --res 100000 --out {out}", 1, "--batch-size|free some space"),
]


@pytest.mark.parametrize("line, status, words", TOO_MUCH, ids=[row[0] for row in TOO_MUCH])
def test_what_is_too_much_is_refused_before_any_work(run, pictures, tmp_path, line, status, words):
    line = line.format(data=pictures, out=tmp_path / "out")
    if line.startswith("sample"):
        line += f" --weights {run} --device cpu --steps 1"
    if line.startswith("train"):
        line += f" --out {tmp_path / 'new'} --steps 1 --workers 0 --device cpu"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = dimr(*line.split())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert done.exit_code == status, done.output
    assert any(word in done.stderr for word in words.split("|")), done.stderr


def test_the_largest_seed_is_one(run, tmp_path):
    last = 2**63 - 1
    for out in (tmp_path / "png", tmp_path / "set.npz"):
        words = ("--weights", run, "-n", 1, "--seed", last, "--steps", 1, "--device", "cpu")
        npz = ("--npz",) if out.suffix else ()
        assert dimr("sample", *words, "--out", out, *npz).exit_code == 0


# paths


@pytest.mark.slow
def test_long_paths_and_links_in_a_circle_are_one_line(run, pictures, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for place in ("x" * 300, f"{'y' * 300}/z", tmp_path / "circle"):
        for line in (
            ("train", "--data", place, "--out", tmp_path / "new", "--steps", 1),
            ("train", "--data", pictures, "--out", place, "--steps", 1, *TINY),
            ("sample", "--weights", place),
            ("sample", "--weights", run, "-n", 1, "--steps", 1, "--out", place),
            ("sample", "--weights", run, "-n", 1, "--steps", 1, "--npz", "--out", f"{place}.npz"),
            ("encode", "--pixels", "--res", 8, "--data", place, "--out", tmp_path / "new"),
            ("encode", "--pixels", "--res", 8, "--data", pictures, "--out", place),
            ("eval", "distortion", place),
            ("convert", run, f"{place}.safetensors"),
            ("info", place),
            ("curves", place),
            ("ema", place, "--width", 0.1),
        ):
            done = dimr(*line)
            if done.exit_code == 0 and "circle." in " ".join(map(str, line)):
                continue  # circle.npz is a file like any other
            refused(done)


def test_links_in_a_circle_among_images_are_named_and_around_them_passed_over(pictures, tmp_path):
    features = ("--features", "plain_features:pooled", "--device", "cpu")
    measure = ("eval", "fid", pictures, "--ref", pictures, *features)
    (pictures / "a" / "around").symlink_to(pictures)
    assert train(tmp_path / "run", pictures, 1).exit_code == 0
    assert dimr(*measure).exit_code == 0
    (pictures / "a" / "loop.png").symlink_to(pictures / "a" / "loop.png")
    refused(train(tmp_path / "other", pictures, 1), "loop.png", "symbolic links")
    refused(dimr(*measure), "loop.png")


# sets of images


def sets_command(run, out, *more):
    return dimr("sample", "--weights", run, "-n", 4, "--steps", 1, "--npz", "--out", out, *more)


def test_a_set_leaves_others_files_beside_it_alone(run, tmp_path):
    config = (run / "config.json").read_bytes()
    refused(sets_command(run, run / "config.npz"), "config.json", "another's file")
    assert (run / "config.json").read_bytes() == config
    Image.new("RGB", (8, 8)).save(tmp_path / "notes.png")
    mine = (tmp_path / "notes.png").read_bytes()
    refused(sets_command(run, tmp_path / "notes.npz"), "notes.png", "another's file")
    assert (tmp_path / "notes.png").read_bytes() == mine
    assert sets_command(run, tmp_path / "set.npz").exit_code == 0
    (tmp_path / "set.npz").unlink()
    assert sets_command(run, tmp_path / "set.npz").exit_code == 0  # its own may be replaced


def test_a_damaged_sidecar_is_told_and_another_s_is_not_looked_at(run, tmp_path):
    assert sets_command(run, tmp_path / "set.npz").exit_code == 0
    features = ("--features", "plain_features:pooled", "--device", "cpu")
    measure = ("eval", "fid", tmp_path / "set.npz", "--ref", tmp_path / "set.npz", *features)
    about = json.loads((tmp_path / "set.json").read_text())
    (tmp_path / "set.json").write_text(json.dumps({**about, "num_classes": "ten"}))
    refused(dimr(*measure), "set.json is damaged", "num_classes")
    (tmp_path / "set.json").write_text('{"source": 3, "mine": true}')
    done = dimr(*measure)
    assert "set.json" not in done.output


def test_damaged_images_of_an_unfinished_set_are_one_line(run, tmp_path):
    assert sets_command(run, tmp_path / "set.npz").exit_code == 0
    work = tmp_path / "set.npz.partial"
    work.mkdir()
    plan = json.loads((tmp_path / "set.json").read_text())["plan"]
    (work / "plan.json").write_text(json.dumps(plan))
    for name in ("set.npz", "set.json", "set.png"):
        (tmp_path / name).unlink()
    head = b"\x93NUMPY\x01\x00\x76\x00"
    for content in (b"", head + b"{'descr': (", head + b"{", b"x" * 500):
        (work / "images.npy").write_bytes(content)
        refused(sets_command(run, tmp_path / "set.npz"), "images.npy is damaged; delete")


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)


def npy(array, shape=None):
    file = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, {**header, "shape": shape or array.shape})
    file.write(array.tobytes())
    return file.getvalue()


def damaged_sets(tmp_path):
    """(name, path of a damaged .npz)."""
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    good = tmp_path / "good.npz"
    np.savez(good, arr_0=images)
    data = good.read_bytes()
    path = tmp_path / "no-npy.npz"
    zipped(path, arr_0=images.tobytes())
    yield path
    path = tmp_path / "huge.npz"
    zipped(path, arr_0__npy=npy(images, (10**9, 8, 8, 3)))
    yield path
    path = tmp_path / "negative.npz"
    zipped(path, arr_0__npy=npy(images, (-8, 8, 8, 3)))
    yield path
    path = tmp_path / "text.npz"
    zipped(path, arr_0__npy=b"\x93NUMPY\x01\x00\x76\x00{'descr': 'x'}")
    yield path
    for name, place, value in (
        ("encrypted", data.find(b"PK\1\2") + 8, 1),
        ("method", data.find(b"PK\1\2") + 10, 99),
        ("offset", data.find(b"PK\1\2") + 44, 255),
        ("version", data.find(b"PK\1\2") + 6, 255),
    ):
        spoiled = bytearray(data)
        spoiled[place] = value
        path = tmp_path / f"{name}.npz"
        path.write_bytes(spoiled)
        yield path


def test_damaged_sets_of_images_are_one_line(tmp_path):
    features = ("--features", "plain_features:pooled", "--device", "cpu")
    good = tmp_path / "good.npz"
    for path in damaged_sets(tmp_path):
        refused(dimr("eval", "fid", path, "--ref", good, *features), path.name)
        refused(dimr("eval", "fid", good, "--ref", path, *features), path.name)


def test_statistics_of_another_size_than_they_claim_are_one_line(tmp_path):
    path = tmp_path / "ref.npz"
    mean = np.zeros(4)
    zipped(path, mu__npy=npy(mean, (10**11,)), sigma__npy=npy(mean))
    with pytest.raises(UserError, match="mu claims to be float64"):
        imagesets.read_array(path, "mu")
    zipped(path, mu__npy=npy(mean), sigma__npy=npy(mean))
    assert (imagesets.read_array(path, "mu") == mean).all()


@pytest.mark.parametrize("place", range(8, 60, 3))
def test_a_damaged_first_image_of_a_folder_is_one_line_or_no_matter(pictures, tmp_path, place):
    path = pictures / "a" / "00.png"
    info = imagesets.png_info({"dimr": json.dumps({"num_classes": 2})})
    with Image.open(path) as image:
        image.save(path, pnginfo=info)
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    features = ("--features", "plain_features:pooled", "--device", "cpu")
    done = dimr("eval", "fid", pictures, "--ref", pictures / "b", *features)
    assert isinstance(done.exception, SystemExit | None), done.output


def test_a_png_s_own_text_may_hold_anything(run, tmp_path):
    for words in (DEEP, "[]", "{", '{"num_classes": []}', '{"source": 3}'):
        out = tmp_path / "drawn"
        out.mkdir(exist_ok=True)
        info = imagesets.png_info({"dimr": words})
        Image.new("L", (8, 8)).save(out / "class0000-seed000001.png", pnginfo=info)
        assert imagesets.read_record(out / "class0000-seed000001.png") == {}
    drawn = dimr("sample", "--weights", run, "-n", 2, "--steps", 1, "--out", out)
    assert drawn.exit_code == 0, drawn.output


@pytest.mark.slow
def test_a_pipe_in_a_file_s_place_is_not_waited_for(run, pictures, tmp_path):
    out = tmp_path / "shards"
    encode = ("encode", "--data", pictures, "--out", out, "--pixels", "--res", 8, "--workers", 0)
    assert dimr(*encode).exit_code == 0
    assert sets_command(run, tmp_path / "set.npz").exit_code == 0
    features = ("--features", "plain_features:pooled", "--device", "cpu")
    for path, command in (
        (out / "shard-00000.safetensors", train_words(out, tmp_path / "new")),
        (out / "shard-00000.safetensors", ("encode", "--verify", "--out", out)),
        (out / "index.json", train_words(out, tmp_path / "new")),
        (pictures / "a" / "00.png", ("eval", "fid", pictures, "--ref", pictures, *features)),
        (tmp_path / "set.npz", ("eval", "fid", tmp_path / "set.npz", "--ref", out, *features)),
        (run / "config.json", ("train", "--out", run)),
    ):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refused(dimr(*command))
        path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["votes.csv", "key.csv"])
def test_tables_of_votes_may_be_anything(tmp_path, name):
    (tmp_path / "votes.csv").write_text("image,person,distorted\ni0,Ann,1\n")
    (tmp_path / "key.csv").write_text("image,set\ni0,a\n")
    path = tmp_path / name
    for make in (
        lambda: path.symlink_to("/proc/self/mem"),
        lambda: os.mkfifo(path),
        lambda: path.mkdir(),
        lambda: path.touch() or os.truncate(path, 2**28),
        lambda: path.write_bytes(b"\0\0\xff"),
    ):
        path.unlink() if path.is_symlink() or not path.is_dir() else path.rmdir()
        make()
        words = ("eval", "distortion", tmp_path / "votes.csv", "--key", tmp_path / "key.csv")
        refused(dimr(*words), name)


def train_words(data, out):
    return ("train", "--data", data, "--out", out, "--steps", 1, *TINY)
