"""`dimr encode`: what shards hold, the same bytes however often it is killed, and what it
refuses."""

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
import vae
from storage import UserError, read_json

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COUNT, BAD = 45, ("b/07.jpg", "c/14.jpg")


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
    return encoding.encode(
        source,
        out,
        res,
        pixels,
        quiet=True,
        **{"workers": 0, "shard_size": 8, "batch_size": 3, **options},
    )


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


COMMAND = [
    "encode",
    "--res",
    "32",
    "--shard-size",
    "8",
    "--batch-size",
    "3",
    "--on-bad-image",
    "skip",
    "--device",
    "cpu",
]


# what is stored


def test_pixel_shards_hold_every_crop_with_its_label(good, tmp_path):
    summary = encode(good, tmp_path / "out", workers=2)
    data, source = dataset.open_data(tmp_path / "out"), dataset.ImageFolder(good, 32)
    assert (
        summary["items"] == len(data) == len(source) == COUNT - 2
        and summary["shards"] == 6
        and summary["skipped"] == []
    )
    assert (
        data.classes == ["a", "b", "c"]
        and (data.labels == source.labels).all()
        and data.index["counts"] == [15, 14, 14]
    )
    stored, _ = data.batch(np.arange(len(data)), np.zeros(len(data), bool))
    assert (
        stored.permute(0, 2, 3, 1).numpy()
        == np.stack([dataset.read_image(path, 32) for path in source.paths])
    ).all()
    assert data.index["options"] == {"res": 32, "exif": False, "crop": "adm"}
    assert data.index["source"] == {"items": COUNT - 2, "fingerprint": source.fingerprint}
    assert sorted(contents(tmp_path / "out")) == ["index.json"] + [
        f"shard-{k:05}.safetensors" for k in range(6)
    ]


def test_shards_are_safetensors_files(whole):
    with safe_open(whole / "shard-00001.safetensors", "np") as file:
        assert sorted(file.keys()) == ["data", "labels"]
        data, labels = dataset.map_shard(whole / "shard-00001.safetensors")
        assert (file.get_tensor("data") == data).all() and (
            file.get_tensor("labels") == labels
        ).all()
        assert data.shape == (8, 32, 32, 3) and labels.tolist() == [0] * 7 + [1]


def test_grey_images_make_grey_shards(digits, tmp_path):
    assert encode(digits, tmp_path / "out", 8, shard_size=64)["channels"] == 1
    assert encode(digits, tmp_path / "colour", 8, shard_size=64, channels=3)["channels"] == 3
    data = dataset.open_data(tmp_path / "out")
    assert (
        data.batch([5], [False])[0].numpy()[0, 0]
        == np.asarray(Image.open(sorted(digits.glob("*/*"))[5]))
    ).all()


def test_latent_shards_hold_diffusers_mean_and_log_variance_of_image_and_flip(
    good, theirs, vae_file, tmp_path
):
    summary = encode(good, tmp_path / "out", pixels=False, vae_weights=vae_file)
    assert (summary["kind"], summary["size"], summary["channels"]) == ("latents", 4, 4)
    data, source = dataset.open_data(tmp_path / "out"), dataset.ImageFolder(good, 32)
    every = np.arange(len(source))
    for flip in (False, True):
        flips = np.full(len(source), flip)
        with torch.inference_mode():
            expected = theirs.encode(source.batch(every, flips)[0] / 127.5 - 1).latent_dist
        found, labels = data.batch(every, flips)
        assert labels.tolist() == source.labels.tolist()
        for part, want in zip(found.unbind(1), (expected.mean, expected.logvar), strict=True):
            torch.testing.assert_close(part.float(), want, rtol=1e-3, atol=1e-4)
    assert data.index["vae"] == str(vae_file) and data.index["scale"] == vae.SCALE
    assert (
        data.index["vae_sha256"]
        == subprocess.run(["sha256sum", vae_file], capture_output=True, text=True).stdout.split()[0]
    )


def test_preview_shows_images_beside_their_decoded_latents(good, theirs, vae_file, tmp_path):
    encode(good, tmp_path / "out", pixels=False, vae_weights=vae_file)
    sheet = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    data = dataset.open_data(tmp_path / "out")
    original, decoded = (
        sheet[2:66:2, 2:66:2],
        sheet[2:66:2, 70:134:2],
    )  # 32 pixels, doubled, in frames of 2
    assert (original == dataset.read_image(dataset.ImageFolder(good, 32).paths[0], 32)).all()
    with torch.inference_mode():
        expected = theirs.decode(data.batch([0], [False])[0][:, 0].float()).sample[0].clamp(-1, 1)
    assert abs(decoded - ((expected + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1


def test_on_an_accelerator_batches_keep_their_shape(vae_file):
    coder = encoding.Coder(vae.load(vae_file), 4)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    expected, shapes, encode = coder.encode(images), [], coder.model.encode
    coder.pool, coder.model.encode = None, lambda x: (shapes.append(x.shape), encode(x))[1]
    assert coder.encode(images).shape == (3, 2, 2, 4, 4, 4)
    torch.testing.assert_close(
        coder.encode(images[:2]).float(), expected[:2].float(), rtol=2e-3, atol=1e-4
    )
    assert set(shapes) == {(8, 3, 32, 32)}


def test_latents_beyond_half_precision_are_an_error(good, theirs, tmp_path):
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    weights["quant_conv.bias"] += 1e6
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"beyond half precision.*a/00\.jpg"):
        encode(good, tmp_path / "out", pixels=False, vae_weights=tmp_path / "vae.safetensors")


# the same bytes


def test_any_number_of_processes_threads_and_readers_gives_the_same_bytes(
    images, vae_file, tmp_path
):
    command = [*COMMAND, "--data", images, "--vae", vae_file, "--json"]
    done = dimr_command(
        *command, "--out", tmp_path / "one", "--workers", "1", env={"OMP_NUM_THREADS": "2"}
    )
    summary = json.loads(done.stdout)
    assert summary["items"] == COUNT - 2 and [s["image"] for s in summary["skipped"]] == list(BAD)
    assert [s["item"] for s in summary["skipped"]] == [22, 44] and "truncated" in summary[
        "skipped"
    ][0]["reason"]
    expected = contents(tmp_path / "one")
    assert len(expected) == 6 + 2
    for processes in (2, 3):
        done = dimr_command(*command, "--out", tmp_path / str(processes), torchrun=processes)
        assert json.loads(done.stdout)["processes"] == processes
        assert contents(tmp_path / str(processes)) == expected


def start(*arguments, torchrun=None, **options):
    launcher = (
        [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(torchrun),
            "--master-port",
            str(free_port()),
        ]
        if torchrun
        else []
    )
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


def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(
    many, whole_of_many, tmp_path
):
    out = tmp_path / "out"
    command = [
        *COMMAND,
        "--pixels",
        "--data",
        many,
        "--out",
        out,
        "--workers",
        "1",
        "--shard-size",
        "60",
    ]

    def rows():
        return len(list(out.glob("shard-*.json")))

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


def test_a_killed_process_is_named_and_the_rest_goes_on_later(many, whole_of_many, tmp_path):
    out = tmp_path / "out"
    command = [
        *COMMAND,
        "--pixels",
        "--data",
        many,
        "--out",
        out,
        "--workers",
        "1",
        "--shard-size",
        "60",
    ]
    launched = start(*command, torchrun=2)
    wait_for(lambda: any(out.glob("shard-*.json")), launched)
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    ranks = {
        re.search(rb"\0RANK=(\d)", Path(f"/proc/{child}/environ").read_bytes())[1]: int(child)
        for child in children
    }
    os.kill(ranks[b"1"], signal.SIGKILL)
    errors = launched.communicate(timeout=120)[1]
    assert launched.returncode != 0 and re.search(r"rank +: 1 .*\n *exitcode +: -9", errors)
    assert json.loads(dimr_command(*command, "--json", torchrun=3).stdout)["encoded_shards"] < 9
    assert contents(out) == contents(whole_of_many)


@pytest.fixture
def small_disk(tmp_path):
    """(folder, environment, what lifts the limit): a folder on which the third shard can't be
    written."""
    place = tmp_path / "disk"
    place.mkdir()
    # the folder itself, out/, .lock, plan.json, and two shards with their rows
    if (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=8", "tmpfs", place],
            capture_output=True,
        ).returncode
        == 0
    ):
        yield (
            place,
            None,
            lambda: subprocess.run(["mount", "-o", "remount,nr_inodes=100", place], check=True),
        )
        subprocess.run(["umount", place], check=True)
    else:  # no right to mount: no file may then be larger than part of a shard
        yield (
            place,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
            lambda: None,
        )


def test_a_full_disk_is_one_line_and_loses_nothing(images, whole, small_disk):
    place, limit, lift = small_disk
    command = [*COMMAND, "--pixels", "--data", images, "--out", place / "out"]
    process = start(*command, preexec_fn=limit)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and re.search(
        r"\nError: .*(No space left|too large).*choose another place\n$", errors
    )
    assert "Traceback" not in errors and not list((place / "out").glob(".*.tmp"))
    finished = len(list((place / "out").glob("shard-*.json")))
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
    assert len(list((tmp_path / "begun").glob("shard-*.json"))) == 2
    return tmp_path / "begun"


def test_after_a_bad_image_skip_goes_on(images, whole, begun):
    summary = encode(images, begun, on_bad="skip")
    assert summary["encoded_shards"] == 4 and [
        entry["image"] for entry in summary["skipped"]
    ] == list(BAD)
    assert contents(begun) == contents(whole)


@pytest.mark.parametrize("place", [3, 20, 600, -1])  # the header's length, the header, data, labels
def test_a_damaged_shard_of_an_unfinished_set_is_redone(images, whole, begun, place):
    flip_a_bit(begun / "shard-00001.safetensors", place)
    assert encode(images, begun, on_bad="skip")["encoded_shards"] == 5
    assert contents(begun) == contents(whole)


def test_a_lost_or_damaged_row_costs_its_shard_alone(images, whole, begun):
    (begun / "shard-00000.json").write_text("{")
    (begun / "shard-00001.json").unlink()
    assert encode(images, begun, on_bad="skip")["encoded_shards"] == 6
    assert contents(begun) == contents(whole)


def test_verify_names_damage_and_encoding_again_mends_it(images, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    command = ["encode", "--res", "32", "--pixels", "--out", out, "--verify"]
    assert "6 shards of 43 items" in dimr_command(*command).stdout
    flip_a_bit(out / "shard-00002.safetensors", 700)
    (out / "shard-00004.safetensors").unlink()
    done = dimr_command(*command, "--json", check=False)
    assert done.returncode == 1 and len(json.loads(done.stdout)["damaged"]) == 2
    assert re.search(
        r"Error: .*shard-00002.*shard-00004\.safetensors is missing.*again", done.stderr
    )
    assert encode(images, out, on_bad="skip")["encoded_shards"] == 2
    assert contents(out) == contents(whole)
    assert encoding.verify(out, quiet=True)["damaged"] == []


def test_a_finished_set_is_left_as_it_is(images, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    summary = encode(images, out, on_bad="skip")
    assert (
        summary["encoded_shards"] == 0
        and summary["items"] == COUNT - 2
        and len(summary["skipped"]) == 2
    )
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


# what it refuses


def refusal(*arguments, **options):
    with pytest.raises(UserError) as error:
        encode(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_going_on_with_other_options_or_images_is_refused(images, good, begun):
    assert (
        "begun with res 32, not 16; give what it had, choose another --out, or delete it"
        in refusal(images, begun, 16)
    )
    assert "begun with exif False, not True" in refusal(images, begun, exif=True)
    assert "begun with shard_size 8, not 9" in refusal(images, begun, shard_size=9)
    assert "begun with channels 3, not 1" in refusal(images, begun, channels=1)
    assert "begun with other images" in refusal(good, begun)


def test_another_vae_is_refused_once_a_shard_is_done(images, vae_file, theirs, tmp_path):
    latents = dict(pixels=False, vae_weights=vae_file)
    refusal(images, tmp_path / "out", **latents)
    other = {name: tensor + 1e-3 for name, tensor in theirs.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    assert "begun with vae_sha256" in refusal(
        images, tmp_path / "out", pixels=False, vae_weights=tmp_path / "other.safetensors"
    )
    assert "begun with kind latents, not pixels" in refusal(images, tmp_path / "out")
    assert "begun with batch_size 3, not 4" in refusal(
        images, tmp_path / "out", batch_size=4, **latents
    )
    assert "begun with precision fp32, not bf16" in refusal(
        images, tmp_path / "out", precision="bf16", **latents
    )


def test_options_may_change_while_nothing_is_done(images, whole, tmp_path):
    refusal(
        images, tmp_path / "out", shard_size=45
    )  # one shard, and it holds the unreadable images
    assert (tmp_path / "out" / "plan.json").exists()
    encode(images, tmp_path / "out", on_bad="skip")
    assert contents(tmp_path / "out") == contents(whole)


def test_a_disk_too_small_is_told_both_sizes_before_the_start(images, tmp_path):
    message = refusal(images, tmp_path / "out", 10**7)
    need, free = (
        float(number.replace(",", "")) * 1e9 for number in re.findall(r"([\d,.]+) GB", message)
    )
    assert need == pytest.approx(COUNT * 3 * 1e14, rel=0.01) and free == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.2
    )


def test_places_that_are_not_for_shards_are_refused(images, tmp_path):
    assert "lies in the images' folder" in refusal(images, images / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    assert "holds other files (thesis.tex)" in refusal(images, tmp_path / "mine")
    assert "is a file" in refusal(images, tmp_path / "mine" / "thesis.tex")
    assert contents(tmp_path / "mine") == {"thesis.tex": b"dear"}


def test_impossible_values_are_refused(images, good, many, vae_file, tmp_path):
    assert "use 32" in refusal(images, tmp_path / "out", 36, pixels=False, vae_weights=vae_file)
    assert "known by name" in refusal(
        images, tmp_path / "out", pixels=False, vae_weights="nonesuch"
    )
    assert "is a folder" in refusal(images, tmp_path / "out", pixels=False, vae_weights=tmp_path)
    (tmp_path / "vae.safetensors").write_bytes(b"not weights")
    assert "vae.safetensors" in refusal(
        good, tmp_path / "out", pixels=False, vae_weights=tmp_path / "vae.safetensors"
    )
    assert "--shard-size 1 makes more than 512 shards of 540 images; use 2 or more" in refusal(
        many, tmp_path / "out", shard_size=1
    )


def test_images_none_of_which_can_be_read_make_no_set(images, tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.jpg").write_bytes(b"")
    assert "holds no readable image; the first: 0.jpg: is empty" in refusal(
        tmp_path / "bad", tmp_path / "out", on_bad="skip", channels=3
    )
    assert not (tmp_path / "out" / "index.json").exists()


def test_two_encodes_of_one_folder_do_not_meet(many, tmp_path):
    command = [
        *COMMAND,
        "--pixels",
        "--data",
        many,
        "--out",
        tmp_path / "out",
        "--shard-size",
        "60",
    ]
    first = start(*command)
    wait_for(lambda: (tmp_path / "out" / "plan.json").exists(), first)
    first.send_signal(signal.SIGSTOP)
    second = dimr_command(*command, check=False)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and "is in use by process" in second.stderr
    assert first.communicate(timeout=120) and first.returncode == 0


# the command


def test_an_error_on_one_of_several_processes_names_its_rank(images, tmp_path):
    command = [
        *COMMAND,
        "--pixels",
        "--data",
        images,
        "--out",
        tmp_path / "out",
        "--on-bad-image",
        "error",
    ]
    done = dimr_command(*command, torchrun=3, check=False)
    assert done.returncode != 0 and re.search(
        r"Error: rank 2: \S*/[bc]/\d\d\.jpg: .*truncated", done.stderr
    )


def test_images_and_output_have_the_places_of_the_readme(good, tmp_path):
    (tmp_path / "data" / "imagenet").mkdir(parents=True)
    (tmp_path / "data" / "imagenet" / "train").symlink_to(good)
    command = ["encode", "--res", "16", "--pixels", "--workers", "0"]
    dimr_command(*command, cwd=tmp_path)
    assert len(dataset.open_data(tmp_path / "data" / "pixels-16")) == COUNT - 2
    dimr_command(*command, "--out", "flat", cwd=tmp_path, env={"DIMR_DATA": str(good / "b")})
    assert read_json(tmp_path / "flat" / "index.json")["classes"] == ["b"]
    done = dimr_command(*command, cwd=good, check=False)
    assert done.returncode == 1 and "give --data FOLDER or set DIMR_DATA" in done.stderr
