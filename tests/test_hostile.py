"""Damage that random mutations found: each is told in one line, or costs nothing."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import cli
import extraction
import runfolder
import storage
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
        ("config.json", '{"config": 1, "recipe": {}, "data": {}}', "config is 1"),
        ("config.json", "{}", "config is missing"),
        ("metrics.jsonl", DEEP + "\n", "line 1 is damaged"),
        ("metrics.jsonl", '{"step": "1", "loss": 1}\n', "line 1 is damaged"),
        ("metrics.jsonl", '{"step": 1, "loss": []}\n', "line 1 is damaged"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(run, digits, name, text, words):
    (run / name).write_text(text)
    done = dimr("train", "--data", digits, "--out", run, "--steps", 13, "--workers", 0)
    refused(done, name, words)


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
