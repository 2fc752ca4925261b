"""`dimr encode`: what shards hold, the same bytes however often it is killed, and what it
refuses."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dimr_command, free_port
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import dataset
import encoding
import shards
import vae
from storage import UserError, read_json

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COUNT = 45
BAD = ("b/07.jpg", "c/14.jpg")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of fifteen 80 × 60 JPEGs, two of them unreadable."""
    root = tmp_path_factory.mktemp("source") / "images"
    rng = np.random.default_rng(0)
    for name in "abc":
        (root / name).mkdir(parents=True)
        for i in range(COUNT // 3):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            coarse.resize((80, 60), Image.Resampling.BICUBIC).save(root / name / f"{i:02}.jpg")
    for name in BAD:
        (root / name).write_bytes((root / name).read_bytes()[:-300])
    return root


@pytest.fixture(scope="module")
def good(images, tmp_path_factory):
    """The same without the unreadable ones."""
    root = tmp_path_factory.mktemp("good") / "images"
    shutil.copytree(images, root)
    for name in BAD:
        (root / name).unlink()
    return root


@pytest.fixture(scope="module")
def many(images, tmp_path_factory):
    """Twelve times `images`, so that an encode takes a second: long enough to be met in the
    middle."""
    root = tmp_path_factory.mktemp("many") / "images"
    for path in sorted(images.glob("*/*")):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            os.link(path, root / path.parent.name / f"{path.stem}-{i}.jpg")
    return root


@pytest.fixture(scope="module")
def theirs():
    """A narrow KL autoencoder of diffusers' with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 32, 64, 64],
        layers_per_block=2,
        latent_channels=4,
    ).eval()


@pytest.fixture(scope="module")
def vae_file(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(theirs.state_dict(), path)
    return path


def encode(source, out, res=32, pixels=True, **options):
    usual = {"workers": 0, "shard_size": 8, "batch_size": 3, "quiet": True}
    return encoding.encode(source, out, res, pixels=pixels, **usual | options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A pixel set made in one go."""
    out = tmp_path_factory.mktemp("whole") / "pixels"
    encode(images, out, on_bad="skip")
    return out


@pytest.fixture(scope="module")
def whole_of_many(many, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "pixels"
    assert encode(many, out, on_bad="skip", shard_size=60)["shards"] == 9
    return out


COMMAND = (
    *("encode", "--res", "32", "--shard-size", "8", "--batch-size", "3"),
    *("--on-bad-image", "skip", "--device", "cpu"),
)


# what is stored


def test_pixel_shards_hold_every_crop_with_its_label(good, tmp_path):
    encode(good, tmp_path / "out", workers=2)
    data = dataset.open_data(tmp_path / "out")
    source = dataset.Images(good, 32)
    assert len(data) == len(source) == COUNT - 2
    assert data.classes == ["a", "b", "c"]
    assert (data.labels == source.labels).all()
    stored, _ = data.batch(np.arange(len(data)), np.zeros(len(data), bool))
    crops = np.stack([source.read(i) for i in range(len(source))])
    assert (stored.permute(0, 2, 3, 1).numpy() == crops).all()


def test_the_index_and_the_summary_say_what_there_is(good, tmp_path):
    summary = encode(good, tmp_path / "out")
    assert (summary["items"], summary["shards"], summary["classes"]) == (COUNT - 2, 6, 3)
    assert summary["encoded_images"] == COUNT - 2
    assert summary["skipped"] == []
    files = contents(tmp_path / "out")
    assert sorted(files) == ["index.json"] + [f"shard-{k:05}.safetensors" for k in range(6)]
    assert summary["bytes"] == sum(len(raw) for name, raw in files.items() if "shard" in name)
    index = read_json(tmp_path / "out" / "index.json")
    images = dataset.Images(good, 32)
    assert index["counts"] == [15, 14, 14]
    assert index["options"] == {"res": 32, "exif": False, "crop": "adm"}
    source = {"items": COUNT - 2, "fingerprint": images.fingerprint, "sample": images.sample}
    assert index["source"] == source


def test_shards_are_safetensors_files(whole):
    path = whole / "shard-00001.safetensors"
    data, labels = shards.map_shard(path)
    with safe_open(path, "np") as file:
        assert sorted(file.keys()) == ["data", "labels"]
        assert (file.get_tensor("data") == data).all()
        assert (file.get_tensor("labels") == labels).all()
    assert data.shape == (8, 32, 32, 3)
    assert labels.tolist() == [0] * 7 + [1]


def test_grey_images_make_grey_shards(digits, tmp_path):
    assert encode(digits, tmp_path / "out", 8, shard_size=64)["channels"] == 1
    assert encode(digits, tmp_path / "colour", 8, shard_size=64, channels=3)["channels"] == 3
    stored, _ = dataset.open_data(tmp_path / "out").batch([5], [False])
    digit = np.asarray(Image.open(sorted(digits.glob("*/*"))[5]))
    assert (stored.numpy()[0, 0] == digit).all()


def test_latent_shards_hold_diffusers_mean_and_log_variance_of_image_and_flip(
    good, theirs, vae_file, tmp_path
):
    summary = encode(good, tmp_path / "out", pixels=False, vae_weights=vae_file)
    assert (summary["kind"], summary["size"], summary["channels"]) == ("latents", 4, 4)
    data = dataset.open_data(tmp_path / "out")
    source = dataset.Images(good, 32)
    every = np.arange(len(source))
    for flip in (False, True):
        flips = np.full(len(source), flip)
        images, _ = source.batch(every, flips)
        with torch.inference_mode():
            expected = theirs.encode(images / 127.5 - 1).latent_dist
        found, labels = data.batch(every, flips)
        mean, logvar = found.float().unbind(1)
        assert labels.tolist() == source.labels.tolist()
        torch.testing.assert_close(mean, expected.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logvar, expected.logvar, rtol=1e-3, atol=1e-4)


def test_the_index_of_latents_names_their_vae(good, vae_file, tmp_path):
    encode(good, tmp_path / "out", pixels=False, vae_weights=vae_file)
    index = read_json(tmp_path / "out" / "index.json")
    assert index["vae"] == str(vae_file)
    assert index["vae_sha256"] == hashlib.sha256(vae_file.read_bytes()).hexdigest()
    assert index["scale"] == vae.SCALE
    options = {"res": 32, "exif": False, "crop": "adm"}
    assert index["options"] == options | {"precision": "fp32", "batch_size": 3, "device": "cpu"}


def test_preview_shows_images_beside_their_decoded_latents(good, theirs, vae_file, tmp_path):
    encode(good, tmp_path / "out", pixels=False, vae_weights=vae_file)
    sheet = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    data = dataset.open_data(tmp_path / "out")
    original = sheet[2:66:2, 2:66:2]  # 32 pixels, doubled, in frames of 2
    decoded = sheet[2:66:2, 70:134:2]
    assert (original == dataset.read_image(dataset.Images(good, 32).place(0), 32)).all()
    latents, _ = data.batch([0], [False])
    with torch.inference_mode():
        image = theirs.decode(latents[:, 0].float()).sample[0].clamp(-1, 1)
    expected = ((image + 1) * 127.5).permute(1, 2, 0).numpy()
    assert abs(decoded - expected).max() <= 1


def test_preview_passes_over_what_was_left_out(images, vae_file, tmp_path):
    """Its last image is the last one of the set, not of the folder."""
    encode(images, tmp_path / "out", pixels=False, vae_weights=vae_file, on_bad="skip")
    sheet = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    last = sheet[2 + 68 : 66 + 68 : 2, 2 + 2 * 68 : 66 + 2 * 68 : 2]
    assert (last == dataset.read_image(images / "c" / "13.jpg", 32)).all()


def test_on_an_accelerator_batches_keep_their_shape(vae_file, monkeypatch):
    coder = encoding.Coder(vae.load(vae_file), 4)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    expected = coder.encode(images)
    shapes = []
    encode = coder.model.encode

    def noted(x):
        shapes.append(x.shape)
        return encode(x)

    monkeypatch.setattr(coder.model, "encode", noted)
    coder.pool = None
    assert coder.encode(images).shape == (3, 2, 2, 4, 4, 4)
    found = coder.encode(images[:2])
    torch.testing.assert_close(found.float(), expected[:2].float(), rtol=2e-3, atol=1e-4)
    assert set(shapes) == {(8, 3, 32, 32)}


def test_latents_beyond_half_precision_are_an_error(good, theirs, tmp_path):
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    weights["quant_conv.bias"] += 1e6
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"beyond half precision.*a/00\.jpg"):
        encode(good, tmp_path / "out", pixels=False, vae_weights=tmp_path / "vae.safetensors")


# the same bytes


@pytest.mark.slow
def test_any_number_of_processes_threads_and_readers_gives_the_same_bytes(
    images, vae_file, tmp_path
):
    command = (*COMMAND, "--data", images, "--vae", vae_file, "--json")
    one = (*command, "--out", tmp_path / "one", "--workers", "1")
    summary = json.loads(dimr_command(*one, env={"OMP_NUM_THREADS": "2"}).stdout)
    assert summary["items"] == COUNT - 2
    assert [entry["image"] for entry in summary["skipped"]] == list(BAD)
    assert [entry["item"] for entry in summary["skipped"]] == [22, 44]
    assert "truncated" in summary["skipped"][0]["reason"]
    expected = contents(tmp_path / "one")
    assert len(expected) == 6 + 2
    for processes in (2, 3):
        done = dimr_command(*command, "--out", tmp_path / str(processes), torchrun=processes)
        assert json.loads(done.stdout)["processes"] == processes
        assert contents(tmp_path / str(processes)) == expected


def start(*arguments, torchrun=None, **options):
    """A `dimr …` that goes on while the test does."""
    launcher = []
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)]
        launcher += ["--master-port", str(free_port())]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "cli", *map(str, arguments)],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_for(happened, process):
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def many_command(many, out):
    """Nine shards of `many`, by one reading process."""
    paths = ("--data", many, "--out", out)
    return (*COMMAND, "--pixels", *paths, "--workers", "1", "--shard-size", "60")


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(
    many, whole_of_many, tmp_path
):
    out = tmp_path / "out"
    command = many_command(many, out)

    def rows():
        return len(list(out.glob(shards.ROW)))

    moments = [
        lambda: (out / "plan.json").exists(),
        lambda: any(out.glob(".shard-*.tmp")),
        lambda: rows() >= 2,
        lambda: rows() >= 5,
        lambda: (out / "index.json").exists(),
    ]
    before = 0
    for moment in moments:
        process = start(*command)
        wait_for(moment, process)
        process.kill()
        process.communicate()
        assert rows() >= before or (out / "index.json").exists()  # nothing done is lost
        before = rows()
    dimr_command(*command)
    assert contents(out) == contents(whole_of_many)


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_rest_goes_on_later(many, whole_of_many, tmp_path):
    out = tmp_path / "out"
    command = many_command(many, out)
    launched = start(*command, torchrun=2)
    wait_for(lambda: any(out.glob(shards.ROW)), launched)
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes()
        rank = re.search(rb"\0RANK=(\d)", environment)[1]
        ranks[rank] = int(child)
    os.kill(ranks[b"1"], signal.SIGKILL)
    errors = launched.communicate(timeout=120)[1]
    assert launched.returncode != 0
    assert re.search(r"rank +: 1 .*\n *exitcode +: -9", errors)
    assert json.loads(dimr_command(*command, "--json", torchrun=3).stdout)["encoded_shards"] < 9
    assert contents(out) == contents(whole_of_many)


@pytest.fixture
def small_disk(tmp_path):
    """(folder, what limits the process, what lifts the limit): a folder on which the third shard
    can't be written."""
    place = tmp_path / "disk"
    place.mkdir()
    # the folder itself, out/, .lock, plan.json, and two shards with their rows
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=8", "tmpfs", place]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def limit():  # no right to mount: no file may then be larger than part of a shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    def lift():
        if mounted:
            subprocess.run(["mount", "-o", "remount,nr_inodes=100", place], check=True)

    yield place, None if mounted else limit, lift
    if mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(images, whole, small_disk):
    place, limit, lift = small_disk
    command = (*COMMAND, "--pixels", "--data", images, "--out", place / "out")
    process = start(*command, preexec_fn=limit)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert re.search(r"\nError: .*(No space left|too large).*choose another place\n$", errors)
    assert "Traceback" not in errors
    assert not list((place / "out").glob(".*.tmp"))
    finished = len(list((place / "out").glob(shards.ROW)))
    lift()
    assert json.loads(dimr_command(*command, "--json").stdout)["encoded_shards"] == 6 - finished
    assert contents(place / "out") == contents(whole)


def flip_a_bit(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def begun(images, tmp_path):
    """A set whose first two of six shards are done: the third met an unreadable image."""
    with pytest.raises(dataset.BadImage, match=r"b/07\.jpg: .*truncated"):
        encode(images, tmp_path / "begun")
    assert len(list((tmp_path / "begun").glob(shards.ROW))) == 2
    return tmp_path / "begun"


def test_after_a_bad_image_skip_goes_on(images, whole, begun):
    summary = encode(images, begun, on_bad="skip")
    assert summary["encoded_shards"] == 4
    assert [entry["image"] for entry in summary["skipped"]] == list(BAD)
    assert contents(begun) == contents(whole)


@pytest.mark.parametrize("place", [3, 20, 600, -1])  # the header's length, the header, data, labels
def test_a_damaged_shard_of_an_unfinished_set_is_redone(images, whole, begun, place):
    flip_a_bit(begun / "shard-00001.safetensors", place)
    assert encode(images, begun, on_bad="skip")["encoded_shards"] == 5
    assert contents(begun) == contents(whole)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_lost_or_damaged_row_costs_its_shard_alone(images, whole, begun, text):
    row = begun / "shard-00000.json"
    row.unlink()
    if text:
        row.write_text(text)
    assert encode(images, begun, on_bad="skip")["encoded_shards"] == 5
    assert contents(begun) == contents(whole)


@pytest.mark.slow
def test_verify_names_damage_and_encoding_again_mends_it(images, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    command = ("encode", "--res", "32", "--pixels", "--out", out, "--verify")
    assert "6 shards of 43 items" in dimr_command(*command).stdout
    flip_a_bit(out / "shard-00002.safetensors", 700)
    (out / "shard-00004.safetensors").unlink()
    done = dimr_command(*command, "--json", check=False)
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["damaged"]) == 2
    line = r"Error: .*shard-00002.*shard-00004\.safetensors is missing.*again"
    assert re.search(line, done.stderr)
    assert encode(images, out, on_bad="skip")["encoded_shards"] == 2
    assert contents(out) == contents(whole)
    assert encoding.verify(out, quiet=True)["damaged"] == []


def test_a_finished_set_is_left_as_it_is(images, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    summary = encode(images, out, on_bad="skip")
    assert summary["encoded_shards"] == 0
    assert summary["items"] == COUNT - 2
    assert len(summary["skipped"]) == 2
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def damage_index(out, change):
    index = read_json(out / "index.json")
    change(index)
    (out / "index.json").write_text(json.dumps(index))


MENDED = {
    "items": lambda index: index.update(items=12),
    "counts": lambda index: index["counts"].reverse(),
    "classes": lambda index: index.update(classes=["x", "y", "z"]),
    "a row's hash": lambda index: index["shards"][2].update(sha256="0" * 64),
    "a row's count": lambda index: index["shards"][2].update(count=3),
    "a row names another's shard": lambda index: index["shards"][2].update(
        file=index["shards"][1]["file"]
    ),
    "what was skipped": lambda index: index["skipped"].pop(),
    "a skipped image": lambda index: index["skipped"][0].update(image="a/00.jpg"),
}


@pytest.mark.parametrize("how", MENDED)
def test_a_damaged_index_is_mended_by_encoding_again(images, whole, tmp_path, how):
    out = shutil.copytree(whole, tmp_path / "out")
    damage_index(out, MENDED[how])
    encode(images, out, on_bad="skip")
    assert contents(out) == contents(whole)


def test_what_was_wrong_with_an_index_is_said(images, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "out")
    damage_index(out, MENDED["counts"])
    encode(images, out, on_bad="skip")
    assert "index.json was damaged (counts) and is written anew" in capsys.readouterr().err


def test_an_index_that_tells_nothing_is_refused_and_made_anew_once_it_is_gone(
    images, whole, tmp_path
):
    out = shutil.copytree(whole, tmp_path / "out")
    damage_index(out, lambda index: index.pop("shard_size"))
    assert "shard_size is missing" in refusal(images, out, on_bad="skip")
    (out / "index.json").unlink()
    assert encode(images, out, on_bad="skip")["encoded_shards"] == 6
    assert contents(out) == contents(whole)


def test_rows_of_a_set_without_a_plan_count_for_nothing(images, whole, begun):
    (begun / "plan.json").unlink()
    assert encode(images, begun, on_bad="skip")["encoded_shards"] == 6
    assert contents(begun) == contents(whole)


def test_an_image_replaced_by_one_of_the_same_size_is_another(images, begun, tmp_path):
    copy = shutil.copytree(images, tmp_path / "copy" / "images")
    assert encode(copy, shutil.copytree(begun, tmp_path / "same"), on_bad="skip")["items"] == 43
    flip_a_bit(copy / "a" / "03.jpg", -9)
    assert "begun with other images (of the same names" in refusal(copy, begun, on_bad="skip")


# what it refuses


def refusal(*arguments, **options):
    with pytest.raises(UserError) as error:
        encode(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_going_on_with_other_options_or_images_is_refused(images, good, begun):
    advice = "give what it had, choose another --out, or delete it"
    assert f"begun with res 32, not 16; {advice}" in refusal(images, begun, 16)
    assert "begun with exif False, not True" in refusal(images, begun, exif=True)
    assert "begun with shard_size 8, not 9" in refusal(images, begun, shard_size=9)
    assert "begun with channels 3, not 1" in refusal(images, begun, channels=1)
    assert f"begun with other images; {advice}" in refusal(good, begun)
    assert "begun with other images" in refusal(good, begun, shard_size=None)


def test_another_vae_is_refused_once_a_shard_is_done(images, vae_file, theirs, tmp_path):
    out = tmp_path / "out"
    latents = {"pixels": False, "vae_weights": vae_file}
    refusal(images, out, **latents)  # an unreadable image, after two shards
    other = {name: tensor + 1e-3 for name, tensor in theirs.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    changed = latents | {"vae_weights": tmp_path / "other.safetensors"}
    assert "begun with vae_sha256" in refusal(images, out, **changed)
    assert "begun with kind latents, not pixels" in refusal(images, out)
    assert "begun with batch_size 3, not 4" in refusal(images, out, batch_size=4, **latents)
    changed = latents | {"precision": "bf16"}
    assert "begun with precision fp32, not bf16" in refusal(images, out, **changed)


def test_the_same_vae_may_lie_elsewhere_meanwhile(images, vae_file, tmp_path):
    refusal(images, tmp_path / "out", pixels=False, vae_weights=vae_file)
    moved = shutil.copy(vae_file, tmp_path / "moved.safetensors")
    options = {"pixels": False, "vae_weights": moved, "on_bad": "skip"}
    assert encode(images, tmp_path / "out", **options)["encoded_shards"] == 4


def test_options_may_change_while_nothing_is_done(images, whole, tmp_path):
    refusal(images, tmp_path / "out", shard_size=45)  # one shard, with the unreadable images
    assert (tmp_path / "out" / "plan.json").exists()
    encode(images, tmp_path / "out", on_bad="skip")
    assert contents(tmp_path / "out") == contents(whole)


def test_a_disk_too_small_is_told_both_sizes_before_the_start(images, tmp_path):
    message = refusal(images, tmp_path / "out", 10**7)
    numbers = re.findall(r"([\d,.]+) GB", message)
    need, free = (float(number.replace(",", "")) * 1e9 for number in numbers)
    assert need == pytest.approx(COUNT * 3 * 1e14, rel=0.01)
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)


def test_what_is_left_to_do_is_said_to_the_byte(images, whole, begun, tmp_path, capsys):
    """Of six shards two are there; the rest holds 29 items."""
    need = sum((whole / f"shard-{k:05}.safetensors").stat().st_size for k in range(2, 6))
    left_out = 2 * (32 * 32 * 3 + 8)  # the plan does not know that they are unreadable
    encode(images, begun, on_bad="skip", quiet=False)
    line = f"45 images; 4 of 6 shards to write, {need + left_out:,} bytes, with "
    assert line in capsys.readouterr().err
    encode(images, tmp_path / "new", on_bad="skip", quiet=False)
    assert "45 images; 6 shards to write, " in capsys.readouterr().err


def test_places_that_are_not_for_shards_are_refused(images, tmp_path):
    assert "lies in the images' folder" in refusal(images, images / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    assert "holds other files (thesis.tex)" in refusal(images, tmp_path / "mine")
    assert "is a file" in refusal(images, tmp_path / "mine" / "thesis.tex")
    assert contents(tmp_path / "mine") == {"thesis.tex": b"dear"}


def test_impossible_values_are_refused(images, good, many, vae_file, tmp_path):
    out = tmp_path / "out"
    assert "use 32" in refusal(images, out, 36, pixels=False, vae_weights=vae_file)
    assert "use 8" in refusal(images, out, 7, pixels=False, vae_weights=vae_file)
    assert "known by name" in refusal(images, out, pixels=False, vae_weights="nonesuch")
    assert "is a folder" in refusal(images, out, pixels=False, vae_weights=tmp_path)
    broken = tmp_path / "vae.safetensors"
    broken.write_bytes(b"not weights")
    assert "vae.safetensors" in refusal(good, out, pixels=False, vae_weights=broken)
    line = "--shard-size 1 makes more than 512 shards of 540 images; use 2 or more"
    assert line in refusal(many, out, shard_size=1)


def test_shards_are_about_128_and_at_most_512(digits, tmp_path, monkeypatch):
    assert encode(digits, tmp_path / "usual", 8, shard_size=None)["shards"] == 4  # of 64
    monkeypatch.setattr(encoding, "SHARDS", 3)
    assert encode(digits, tmp_path / "few", 8, shard_size=None)["shards"] == 2  # of 128
    monkeypatch.setattr(encoding, "MOST_SHARDS", 4)
    assert encode(digits, tmp_path / "most", 8, shard_size=50)["shards"] == 4
    assert "use 50 or more" in refusal(digits, tmp_path / "more", 8, shard_size=49)


def test_images_none_of_which_can_be_read_make_no_set(tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(3):
        (bad / f"{i}.jpg").write_bytes(b"")
    message = refusal(bad, tmp_path / "out", on_bad="skip", channels=3)
    assert "holds no readable image; the first: 0.jpg: is empty" in message
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.slow
def test_two_encodes_of_one_folder_do_not_meet(many, tmp_path):
    command = many_command(many, tmp_path / "out")
    first = start(*command)
    wait_for(lambda: (tmp_path / "out" / "plan.json").exists(), first)
    first.send_signal(signal.SIGSTOP)
    second = dimr_command(*command, check=False)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert "is in use by process" in second.stderr
    first.communicate(timeout=120)
    assert first.returncode == 0


# the command


@pytest.mark.slow
def test_an_error_on_one_of_several_processes_names_its_rank(images, tmp_path):
    command = (*COMMAND, "--pixels", "--data", images, "--out", tmp_path / "out")
    done = dimr_command(*command, "--on-bad-image", "error", torchrun=3, check=False)
    assert done.returncode != 0
    assert re.search(r"Error: rank 2: \S*/[bc]/\d\d\.jpg: .*truncated", done.stderr)


@pytest.mark.slow
def test_images_and_output_have_the_places_of_the_readme(good, tmp_path):
    (tmp_path / "data" / "imagenet").mkdir(parents=True)
    (tmp_path / "data" / "imagenet" / "train").symlink_to(good)
    command = ("encode", "--res", "16", "--pixels", "--workers", "0")
    dimr_command(*command, cwd=tmp_path)
    assert len(dataset.open_data(tmp_path / "data" / "pixels-16")) == COUNT - 2
    dimr_command(*command, "--out", "flat", cwd=tmp_path, env={"DIMR_DATA": str(good / "b")})
    assert read_json(tmp_path / "flat" / "index.json")["classes"] == ["b"]
    done = dimr_command(*command, cwd=good, check=False)
    assert done.returncode == 1
    assert "give --data FOLDER or set DIMR_DATA" in done.stderr
