"""`dimr encode --from-latents`: latents in EDM2's form become shards, without flips."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import dimr_command
from packing import make_tar, make_zip
from safetensors.torch import save_file

import dataset
import downloads
import encoding
from storage import UserError, read_json

SIDE = 4  # of a latent
LABELS = [2, 0, 1, 0, 2]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def moments(seed, means=(0.9, -0.3, 0.2, 0.4)):
    """Means and deviations float32 (8, SIDE, SIDE), as an encoder gives them."""
    rng = np.random.default_rng(seed)
    mean = np.reshape(means, (4, 1, 1)) + rng.normal(0, 0.3, (4, SIDE, SIDE))
    return np.concatenate([mean, rng.uniform(0.01, 2, (4, SIDE, SIDE))]).astype(np.float32)


def members(arrays, labels=LABELS):
    """EDM2's zip as name → bytes."""
    names = [f"00000/img-mean-std-{i:08}.npy" for i in range(len(arrays))]
    pairs = labels and list(map(list, zip(names, labels, strict=True)))
    found = {name: npy(array) for name, array in zip(names, arrays, strict=True)}
    return {**found, "dataset.json": json.dumps({"labels": pairs})}


@pytest.fixture
def arrays():
    return [moments(i) for i in range(len(LABELS))]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "home"))


def take(source, out, **options):
    usual = {"shard_size": 2, "workers": 0, "quiet": True, "on_bad": "error"}
    return encoding.encode(source, out, from_latents=True, **usual | options)


def folder_of(tmp_path, found):
    for name, data in found.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return tmp_path / "folder"


def test_deviations_become_log_variances(arrays, tmp_path):
    """By class, in the order of names."""
    take(make_zip(tmp_path / "x.zip", members(arrays)), tmp_path / "out")
    found = dataset.open_data(tmp_path / "out")
    assert (found.kind, found.size, found.channels, len(found)) == ("latents", SIDE, 4, 5)
    assert found.classes == ["0", "1", "2"]
    latents, labels = found.batch(np.arange(5), np.zeros(5, bool))
    assert labels.tolist() == [0, 0, 1, 2, 2]
    assert latents.shape == (5, 2, 4, SIDE, SIDE)
    ordered = np.stack([arrays[i] for i in (1, 3, 2, 0, 4)])
    assert (latents[:, 0].numpy() == ordered[:, :4].astype(np.float16)).all()
    deviations = np.exp(latents[:, 1].numpy().astype(float) / 2)
    assert np.abs(deviations / ordered[:, 4:] - 1).max() < 1e-3


def test_zip_folder_and_tar_give_the_same_set(arrays, tmp_path):
    found = members(arrays)
    places = [make_zip(tmp_path / "x.zip", found, zipfile.ZIP_DEFLATED), folder_of(tmp_path, found)]
    packed = {
        name: data.encode() if name == "dataset.json" else data for name, data in found.items()
    }
    places.append(make_tar(tmp_path / "x.tar", packed))
    contents = []
    for number, place in enumerate(places):
        out = tmp_path / f"out-{number}"
        take(place, out)
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1] == contents[2]


def test_the_index_says_that_flips_are_absent(arrays, tmp_path):
    source = make_zip(tmp_path / "x.zip", members(arrays))
    take(source, tmp_path / "out")
    index = read_json(tmp_path / "out" / "index.json")
    assert index["flips"] is False
    assert index["options"] == {"res": 8 * SIDE, "from": "latents"}
    assert (index["vae"], index["vae_sha256"]) == ("sd-vae-ft-ema", None)
    found = dataset.open_data(tmp_path / "out")
    assert found.flips is False
    latents, _ = found.batch([0, 0], [False, True])
    assert (latents[0] == latents[1]).all()
    data = tmp_path / "out" / "shard-00000.safetensors"
    assert data.stat().st_size == 512 + 2 * (2 * 2 * 4 * SIDE * SIDE + 8)


def test_null_labels_are_one_class(arrays, tmp_path):
    take(make_zip(tmp_path / "x.zip", members(arrays, None)), tmp_path / "out")
    assert dataset.open_data(tmp_path / "out").classes == ["x"]


def test_an_interrupted_set_goes_on(arrays, tmp_path):
    source = make_zip(tmp_path / "x.zip", members(arrays))
    take(source, tmp_path / "whole")
    take(source, tmp_path / "out")
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    assert take(source, tmp_path / "out")["encoded_shards"] == 1
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_edm2s_own_latents_are_refused_with_the_reason(tmp_path, capsys):
    theirs = [moments(i, (5.81, 3.25, 0.12, -2.15)) for i in range(len(LABELS))]
    with pytest.raises(UserError, match=r"pixels in \[0, 1\].* 5\.7.*encode the images"):
        take(make_zip(tmp_path / "x.zip", members(theirs)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    near = [
        moments(i, (4.0, 2.0, 0.0, -2.0)) for i in range(len(LABELS))
    ]  # other images' in [0, 1]
    take(make_zip(tmp_path / "y.zip", members(near)), tmp_path / "near", quiet=False)
    assert "WARNING: they are nearer to those of pixels in [0, 1]" in capsys.readouterr().err


def test_means_are_said(arrays, tmp_path, capsys):
    source = make_zip(tmp_path / "x.zip", members(arrays))
    take(source, tmp_path / "out", quiet=False)
    said = capsys.readouterr().err
    assert "EDM2's zip of latents: 3 classes, 5 latents" in said
    assert "WARNING" not in said
    means = np.mean([array[:4].mean((1, 2)) for array in arrays], 0)
    assert ", ".join(f"{value:.2f}" for value in means) in said


def damaged(kind):
    array = moments(1)
    if kind == "pickled":
        return npy(np.asarray([{"a": 1}], object))
    if kind == "float64":
        return npy(array.astype(np.float64))
    if kind == "four channels":
        return npy(array[:4])
    if kind == "fortran":
        return npy(np.asfortranarray(array))
    if kind == "cut":
        return npy(array)[:-1]
    if kind == "longer":
        return npy(array) + b"x"
    if kind == "huge":
        header = npy(array).replace(b"(8, 4, 4), }", b"(8, 99999999, 99999999), }")
        return header
    if kind == "not finite":
        array[3, 0, 0] = np.nan
    if kind == "log-variance":
        array[4:] = np.log(array[4:])
    if kind == "large":
        array[0] = 1e6
    if kind == "another side":
        array = array[:, :2, :2]
    return npy(array)


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("pickled", "is object"),
        ("float64", "is float64"),
        ("four channels", r"is float32 \(4, 4, 4\)"),
        ("fortran", "expected float32"),
        ("cut", "with 511 bytes"),
        ("longer", "with 513 bytes"),
        ("huge", "is .8, 99999999, 99999999. with"),
        ("not finite", "beyond half precision"),
        ("log-variance", "not above 0"),
        ("large", "beyond half precision"),
        ("another side", "is of side 2; the first is of 4"),
    ],
)
def test_a_bad_latent_is_named_or_left_out(arrays, tmp_path, kind, reason):
    found = members(arrays)
    name = "00000/img-mean-std-00000004.npy"  # the last, wherever statistics are taken
    found[name] = damaged(kind)
    path = make_zip(tmp_path / "x.zip", found)
    with pytest.raises(UserError, match=f"x.zip: {name}: .*{reason}"):
        take(path, tmp_path / "out")
    (skipped,) = take(path, tmp_path / "skipped", on_bad="skip")["skipped"]
    assert skipped["image"] == name
    assert len(dataset.open_data(tmp_path / "skipped")) == 4


def test_a_link_to_nowhere_is_one_line(arrays, tmp_path):
    folder = folder_of(tmp_path, members(arrays))
    latent = folder / "00000" / "img-mean-std-00000002.npy"
    latent.unlink()
    latent.symlink_to("/nowhere")
    with pytest.raises(UserError, match="00000002.npy can't be read"):
        take(folder, tmp_path / "out")


def test_what_is_not_in_edm2s_form_is_refused(arrays, tmp_path):
    found = members(arrays)
    without = {name: data for name, data in found.items() if name != "dataset.json"}
    for place in (make_zip(tmp_path / "x.zip", without), folder_of(tmp_path, without)):
        with pytest.raises(UserError, match="has no dataset.json; expected latents in EDM2's form"):
            take(place, tmp_path / "out")
    make_zip(tmp_path / "w.zip", found)
    for name in ("x.zip", "w.zip"):
        with pytest.raises(UserError, match="holds latents, no images.*--from-latents"):
            dataset.open_data(tmp_path / name)
    make_tar(tmp_path / "v-0.tar", {"1.npy": b""})
    with pytest.raises(UserError, match="has no dataset.json"):
        take(tmp_path / "v-*.tar", tmp_path / "out")
    images = make_zip(tmp_path / "y.zip", {"dataset.json": '{"labels": null}', "a.png": b"x"})
    with pytest.raises(UserError, match="holds no latents"):
        take(images, tmp_path / "out")
    source = make_zip(tmp_path / "z.zip", found)
    with pytest.raises(UserError, match="of images of 32, not 64"):
        take(source, tmp_path / "out", res=64)


def test_the_preview_shows_decoded_latents_if_a_vae_is_at_hand(arrays, tmp_path, capsys):
    from diffusers import AutoencoderKL
    from PIL import Image

    torch.manual_seed(0)
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 32, 64, 64],
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors")
    source = make_zip(tmp_path / "x.zip", members(arrays))
    take(source, tmp_path / "out", vae_weights=tmp_path / "vae.safetensors")
    picture = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    latents, _ = dataset.open_data(tmp_path / "out").batch([0], [False])
    with torch.inference_mode():
        expected = theirs.decode(latents[:, 0].float()).sample[0]
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    decoded = picture[2:66:2, 2:66:2].astype(float)  # 32 pixels, doubled, in frames of 2
    assert np.abs(decoded - expected).max() <= 1
    take(source, tmp_path / "without", quiet=False)
    assert "no preview.png: sd-vae-ft-ema is not here" in capsys.readouterr().err
    assert not (tmp_path / "without" / "preview.png").exists()
    assert not downloads.cache().exists()
    with pytest.raises(UserError, match="is no file"):
        take(source, tmp_path / "other", vae_weights=tmp_path / "none")


def test_reading_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit",)

    found = members([moments(0)], [0])
    found["00000/img-mean-std-00000000.npy"] = npy(np.asarray([Trap()], object))
    with pytest.raises(UserError, match="is object"):
        take(make_zip(tmp_path / "x.zip", found), tmp_path / "out")


@pytest.mark.slow
def test_training_goes_without_flips_and_says_so(arrays, tmp_path):
    source = make_zip(tmp_path / "x.zip", members(arrays))
    done = dimr_command("encode", "--from-latents", source, "--out", tmp_path / "latents")
    assert "5 latents of 3 classes" in done.stdout
    options = ["--variant", "xl2r", "--layers", "2,2", "--dims", "16,8", "--heads", "2"]
    options += ["--steps", "2", "--batch-size", "4", "--sample-every", "0", "--device", "cpu"]
    train = ["train", *options, "--data", tmp_path / "latents", "--out", tmp_path / "run"]
    done = dimr_command(*train)
    assert "training goes without flips" in done.stderr
    assert read_json(tmp_path / "run" / "config.json")["recipe"]["flip"] is False
    usage = ["encode", "--from-latents", source]
    for wrong in (["--data", "x", "--out", "y"], ["--pixels", "--out", "y"], []):
        done = dimr_command(*usage, *wrong, check=False)
        assert done.returncode == 2
