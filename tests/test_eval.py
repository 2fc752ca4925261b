"""`dimr eval` from files to numbers: image sets, references, caching, generation, processes, and
what is refused."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import DATA, SMALL, dimr_command
from inception_weights import extractor, photographs, weights
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import cli
import dataset
import evaluation
import extraction
import fid
import imagenet_names
import imagesets
import sampling
import shards
import storage

ALL = evaluation.keys("all")
# of 20 images, those whose features are kept if 5 are
KEPT = [5, 14, 15, 16, 17]
PLAIN = ["--features", "plain_features:pooled", "--device", "cpu"]


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(weights(), path)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """An empty cache and an empty working folder for each test, and no network."""
    cache = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("DIMR_HOME", str(cache))
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    return cache


def run(*arguments, status=0):
    result = CliRunner().invoke(cli.main, ["eval", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    if status == 1:
        assert result.stderr.count("\n") == 1, result.stderr
    return result


def measured(*arguments):
    """The JSON that `dimr eval …` prints, which is all of its standard output."""
    return json.loads(run(*arguments, "--json").stdout)


def save_npz(path, images, compressed=False, **others):
    save = np.savez_compressed if compressed else np.savez
    save(path, arr_0=np.asarray(images), **others)
    return Path(path)


def save_folder(path, images):
    Path(path).mkdir()
    for i, image in enumerate(np.asarray(images)):
        Image.fromarray(image).save(Path(path) / f"{i:04d}.png")
    return Path(path)


# Image sets


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_is_read_in_any_order(compressed):
    images, labels = photographs(11, 16), np.arange(11)
    found = imagesets.open_set(save_npz("set.npz", images, compressed, arr_1=labels))
    assert (len(found), found.size, found.labels.tolist()) == (11, 16, labels.tolist())
    for first, last in ((0, 4), (4, 11), (2, 3), (9, 11), (0, 11)):
        assert torch.equal(found.batch(np.arange(first, last))[0], images[first:last])


@pytest.mark.slow
@pytest.mark.parametrize("save", ["np.savez", "np.savez_compressed"])
def test_reading_an_npz_takes_flat_memory(save):
    """A hundred megabytes of images, sixteen at a time."""
    write = f'import numpy as np; {save}("big.npz", arr_0=np.zeros((600, 256, 256, 3), np.uint8))'
    subprocess.run([sys.executable, "-c", write], check=True)
    code = """if True:
        import resource, numpy as np, imagesets
        images = imagesets.open_set("big.npz")
        images.batch(np.arange(16))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for first in range(16, 600, 16):
            images.batch(np.arange(first, min(first + 16, 600)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 30_000  # kilobytes


def damaged_in_the_middle(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def claims_too_much(path):
    """An .npy header of 2^60 images over a few bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**60, 8, 8, 3)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(192))


BAD_SETS = {
    "floats": (lambda p: save_npz(p, np.random.rand(4, 8, 8, 3)), "arr_0 is float64"),
    "integers beyond 255": (
        lambda p: save_npz(p, np.full((4, 8, 8, 3), 300)),
        "expected uint8 (N, H, W, 3) with values from 0 to 255",
    ),
    "grey": (lambda p: save_npz(p, np.zeros((4, 8, 8, 1), np.uint8)), "(4, 8, 8, 1)"),
    "channels first": (lambda p: save_npz(p, np.zeros((4, 3, 8, 8), np.uint8)), "(4, 3, 8, 8)"),
    "no images": (lambda p: save_npz(p, np.zeros((0, 8, 8, 3), np.uint8)), "(0, 8, 8, 3)"),
    "not square": (lambda p: save_npz(p, np.zeros((4, 8, 9, 3), np.uint8)), "9×8"),
    "other arrays": (
        lambda p: np.savez(p, images=np.zeros((4, 8, 8, 3), np.uint8)),
        "holds images and no arr_0",
    ),
    "objects": (lambda p: np.savez(p, arr_0=np.array([{}], object)), "arr_0 is object"),
    "Fortran order": (
        lambda p: save_npz(p, np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8))),
        "Fortran",
    ),
    "no zip": (lambda p: Path(p).write_bytes(b"images"), "is not a whole .npz"),
    "a header that lies": (
        lambda p: claims_too_much(Path(p)),
        "claims 1,152,921,504,606,846,976 images and holds 192 bytes",
    ),
    "a flipped bit": (
        lambda p: damaged_in_the_middle(save_npz(p, photographs(64, 32))),
        "is not a whole .npz (Bad CRC-32",
    ),
    "a flipped bit, compressed": (
        lambda p: damaged_in_the_middle(save_npz(p, photographs(64, 32), True)),
        "is not a whole .npz (Bad CRC-32",
    ),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_a_set_that_can_not_be_measured_is_refused_by_name(case):
    make, message = BAD_SETS[case]
    make("set.npz")
    save_npz("ref.npz", photographs(8, 8))
    assert message in run("fid", "set.npz", "--ref", "ref.npz", *PLAIN, status=1).stderr


def test_files_of_any_mode_are_read_as_rgb():
    colour = Image.fromarray(photographs(1, 16)[0].numpy())
    Path("set").mkdir()
    variants = {
        "rgb": colour,
        "grey": colour.convert("L"),
        "palette": colour.quantize(16),
        "cmyk": colour.convert("CMYK"),
        "rgba": colour.convert("RGBA"),
    }
    variants["rgba"].putalpha(Image.new("L", (16, 16), 0))
    for name, image in variants.items():
        image.save(f"set/{name}.{'jpg' if name == 'cmyk' else 'png'}")
    Image.new("RGB", (100, 100)).save("set/grid.png")  # what sample leaves beside its images
    images = imagesets.open_set("set")
    assert images.names == ["cmyk.jpg", "grey.png", "palette.png", "rgb.png", "rgba.png"]
    found = dict(zip(images.names, images.batch(range(5))[0].numpy(), strict=True))
    assert (found["rgb.png"] == np.asarray(colour)).all()
    assert (found["grey.png"] == np.asarray(colour.convert("L"))[..., None]).all()
    assert (found["palette.png"] == np.asarray(variants["palette"].convert("RGB"))).all()
    assert (found["rgba.png"] == 255).all()  # transparent, on white
    assert found["cmyk.jpg"].shape == (16, 16, 3)


def test_mixed_sizes_are_refused_and_cropped_on_demand():
    save_folder("set", photographs(3, 16))
    Image.fromarray(photographs(1, 24)[0, :, :20].numpy()).save("set/odd.png")
    save_npz("ref.npz", photographs(8, 12))
    assert (
        "20×24; expected square" in run("fid", "set", "--ref", "ref.npz", *PLAIN, status=1).stderr
    )
    os.remove("set/odd.png")
    save_folder("set/more", photographs(1, 24))
    assert "mixes sizes" in run("fid", "set", "--ref", "ref.npz", *PLAIN, status=1).stderr
    assert measured("fid", "set", "--ref", "ref.npz", "--res", 12, *PLAIN)["samples"]["size"] == 12


@pytest.mark.parametrize(
    "path, message",
    [
        ("missing", "does not exist"),
        ("missing.npz", "does not exist"),
        ("empty", "holds no images"),
    ],
)
def test_nothing_to_measure_is_an_error(path, message):
    Path("empty").mkdir()
    save_npz("ref.npz", photographs(8, 12))
    assert message in run("fid", path, "--ref", "ref.npz", *PLAIN, status=1).stderr


# Numbers


@pytest.fixture(scope="module")
def oracle():
    """Two sets of pictures and torch-fidelity's features of them on the same weights: (pool,
    logits), and spatial."""
    sets = {
        "samples": photographs(9, 32, seed=3),
        "reference": photographs(8, 32, seed=4) // 2 + 40,
    }
    network = extractor()
    kept = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, output: kept.append(output[:, :7])
    )
    with torch.no_grad():
        features = {name: network(images.permute(0, 3, 1, 2)) for name, images in sets.items()}
    hook.remove()
    spatial = {}
    for name, channels_first in zip(sets, kept, strict=True):
        spatial[name] = channels_first.permute(0, 2, 3, 1).flatten(1)
    return sets, features, spatial


def distance(first, second):
    statistics = [fid_features_to_statistics(f.double()) for f in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_all_metrics_are_torch_fidelitys_on_its_own_features(oracle, inception_file):
    sets, features, spatial = oracle
    save_npz("samples.npz", sets["samples"])
    save_folder("reference", sets["reference"])
    found = measured(
        "all", "samples.npz", "--ref", "reference", "--inception", inception_file, "--batch-size", 5
    )
    fake = features["samples"][0]
    real = features["reference"][0]
    nearness = prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=10, save_cpu_ram=True, verbose=False
    )
    kid = kid_features_to_metric(
        fake, real, kid_subsets=100, kid_subset_size=8, rng_seed=2020, verbose=False
    )
    assert found["fid"] == pytest.approx(distance(fake, real), rel=1e-4)
    spatial_distance = distance(spatial["samples"], spatial["reference"])
    assert found["sfid"] == pytest.approx(spatial_distance, rel=1e-4)
    score = isc_features_to_metric(features["samples"][1], splits=1, shuffle=False)
    assert found["inception_score"] == pytest.approx(score["inception_score_mean"], rel=1e-4)
    assert found["precision"] == pytest.approx(nearness["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(nearness["recall"], abs=1e-6)
    assert found["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-2)
    assert found["samples"] == {
        "source": "samples.npz",
        "count": 9,
        "size": 32,
        "sha256": storage.sha256("samples.npz"),
    }
    assert found["reference"]["count"] == 8
    assert found["version"] == storage.VERSION
    assert "OTHER weights" in found["features"]
    assert "compare with nothing published" in "\n".join(found["remarks"])


def test_each_command_reports_the_metrics_asked_for(oracle, inception_file):
    sets, _, _ = oracle
    for name in ("samples", "reference"):
        save_npz(f"{name}.npz", sets[name][:6])
    weights = {"--inception": inception_file, "--dinov2": dinov2_file()}
    for metrics, row in evaluation.METRICS.items():
        option = f"--{row.extractor}"
        found = measured(metrics, "samples.npz", "--ref", "reference.npz", option, weights[option])
        every = ALL + evaluation.keys("all", "dinov2")
        assert [key for key in every if key in found] == evaluation.keys(metrics)
        assert all(f"{key}_error" in found for key in evaluation.keys(metrics))


def test_all_takes_in_dinov2_where_its_weights_are_there(oracle, inception_file, home):
    """Named, or in the cache."""
    sets, _, _ = oracle
    for name in ("samples", "reference"):
        save_npz(f"{name}.npz", sets[name][:6])
    arguments = "all", "samples.npz", "--ref", "reference.npz", "--inception", inception_file
    named = measured(*arguments, "--dinov2", dinov2_file())
    assert "fdd" not in measured(*arguments)
    (home / "dinov2").mkdir()
    tensors, _ = storage.load_tensors(dinov2_file())
    torch.save(tensors, home / "dinov2" / "dinov2_vitl14_pretrain.pth")
    cached = measured(*arguments)
    assert cached["fdd"] == named["fdd"] > 0
    assert cached["kdd"] == named["kdd"]
    assert any("DINOv2 of OTHER size" in line for line in cached["remarks"])


@pytest.mark.slow
def test_what_two_networks_look_at_is_drawn_once(trained, digits, inception_file):
    arguments = (
        "all",
        "--weights",
        trained,
        "-n",
        6,
        "--steps",
        1,
        "--ref",
        digits,
        "--device",
        "cpu",
    )
    done = run(*arguments, "--inception", inception_file, "--dinov2", dinov2_file(), "--json")
    found = json.loads(done.stdout)
    assert "written first" in done.stderr
    assert found["samples"]["source"].endswith("balanced-6.npz") and found["fdd"] > 0


def test_statistics_of_dinov2_serve_as_reference_and_inceptions_do_not(
    oracle, inception_file, standard
):
    """Of ADM's reference, `all` measures what it can, and says what it left out."""
    sets, _, _ = oracle
    save_npz("samples.npz", sets["samples"])
    save_npz("reference.npz", sets["reference"])
    dino = "--dinov2", dinov2_file()
    inception = "--inception", inception_file
    fdd = measured("fdd", "samples.npz", "--ref", "reference.npz", *dino)["fdd"]
    run("stats", "reference.npz", "ref.safetensors", "--kind", "dinov2", *dino)
    assert measured("fdd", "samples.npz", "--ref", "ref.safetensors", *dino)["fdd"] == fdd
    message = run("fid", "samples.npz", "--ref", "ref.safetensors", *inception, status=1).stderr
    assert "was made with DINOv2" in message
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    moments |= {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    save_npz("adm.npz", sets["reference"], **moments)
    found = measured("all", "samples.npz", "--ref", "adm.npz", *inception, *dino)
    assert "fdd" not in found and found["fid"] > 0
    assert any("fdd and kdd are left out" in line for line in found["remarks"])
    message = run("fdd", "samples.npz", "--ref", "adm.npz", *dino, status=1).stderr
    assert "holds statistics of the Inception of 2015" in message


def dinov2_file():
    """A small DINOv2 with random weights, under its authors' names."""
    tensors, _ = storage.load_tensors(DATA / "dinov2.safetensors")
    path = Path("dinov2.safetensors")
    if not path.exists():
        storage.save_tensors(
            path,
            {
                name.removeprefix("weight."): tensor
                for name, tensor in tensors.items()
                if name.startswith("weight.")
            },
        )
    return path


def test_what_was_measured_once_is_not_measured_again(oracle, inception_file, monkeypatch):
    sets, _, _ = oracle
    save_npz("samples.npz", sets["samples"][:3])
    arguments = "is", "samples.npz", "--inception", inception_file
    before = measured(*arguments)["inception_score"]

    def forward(self, images):
        raise AssertionError("extracting")

    monkeypatch.setattr(fid.Inception, "forward", forward)
    assert measured(*arguments)["inception_score"] == before
    shutil.copy("samples.npz", "renamed.npz")  # content decides, not the name
    assert (
        measured("is", "renamed.npz", "--inception", inception_file)["samples"]["source"]
        == "renamed.npz"
    )
    save_npz("samples.npz", sets["samples"][1:4])
    result = CliRunner().invoke(cli.main, ["eval", *map(str, arguments)])
    assert isinstance(result.exception, AssertionError)


def test_a_damaged_cache_is_replaced_and_an_unwritable_one_costs_no_result(
    oracle, inception_file, home, monkeypatch
):
    save_npz("samples.npz", oracle[0]["samples"][:2])
    arguments = "is", "samples.npz", "--inception", inception_file
    before = measured(*arguments)["inception_score"]
    (cached,) = (home / "features").iterdir()
    content = cached.read_bytes()
    cached.write_bytes(content[: len(content) // 2])
    assert measured(*arguments)["inception_score"] == before
    assert cached.read_bytes() == content
    Path("file").touch()
    monkeypatch.setenv("DIMR_HOME", "file")  # no folder can be made there
    result = run(*arguments)
    assert f"{before:.4f}" in result.stdout
    assert "NOT written" in result.stderr


def test_statistics_made_once_serve_as_reference(oracle, inception_file):
    sets, _, _ = oracle
    save_folder("reference", sets["reference"])
    save_npz("samples.npz", sets["samples"])
    run("stats", "reference", "reference.safetensors", "--inception", inception_file)
    arguments = "all", "samples.npz", "--inception", inception_file, "--ref"
    from_statistics = measured(*arguments, "reference.safetensors")
    from_images = measured(*arguments, "reference")
    assert [from_statistics[key] for key in ALL] == [from_images[key] for key in ALL]
    assert (
        "was made with Inception"
        in run("fid", "samples.npz", "--ref", "reference.safetensors", *PLAIN, status=1).stderr
    )
    Path("broken.safetensors").write_bytes(Path("reference.safetensors").read_bytes()[:-9])
    assert "broken" in run(*arguments, "broken.safetensors", status=1).stderr


@pytest.fixture
def standard(monkeypatch, inception_file):
    """The random weights stand for the published ones."""
    published = evaluation.downloads.ASSETS["inception"]
    monkeypatch.setitem(
        evaluation.downloads.ASSETS,
        "inception",
        evaluation.downloads.Asset(
            published.address, "", "", sha256=storage.sha256(inception_file)
        ),
    )


def test_adms_reference_gives_moments_and_images(oracle, inception_file, standard):
    """Its moments are of the whole training set, its images a part: FID is of the former, precision
    of the latter."""
    sets, features, _ = oracle
    mu = np.full(2048, 0.5)
    sigma = np.eye(2048) * 0.1
    moments = {"mu": mu, "sigma": sigma, "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    save_npz("adm.npz", sets["reference"], **moments)
    save_npz("samples.npz", sets["samples"])
    found = measured("all", "samples.npz", "--ref", "adm.npz", "--inception", inception_file)
    rows = features["samples"][0].double()
    covariance = np.cov(rows.numpy(), rowvar=False)
    expected = fid.frechet_distance(rows.mean(0), covariance, mu, sigma)
    assert found["fid"] == pytest.approx(expected, rel=1e-4)
    assert found["features"] == extraction.STANDARD
    assert (found["reference"]["count"], found["reference"]["size"]) == (None, 32)
    nearness = prc_features_to_metric(
        *(features[name][0] for name in ("samples", "reference")),
        prc_neighborhood=3,
        prc_batch_size=10,
        save_cpu_ram=True,
        verbose=False,
    )
    assert found["precision"] == pytest.approx(nearness["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(nearness["recall"], abs=1e-6)

    np.savez("moments.npz", mu=mu, sigma=sigma)
    arguments = "samples.npz", "--ref", "moments.npz", "--inception", inception_file
    assert measured("fid", *arguments)["fid"] == found["fid"]
    assert "holds statistics alone" in run("pr", *arguments, status=1).stderr
    assert (
        "no mu_s and sigma_s, which sfid and all need" in run("sfid", *arguments, status=1).stderr
    )


def test_adms_reference_is_not_compared_with_other_features(oracle, inception_file):
    np.savez("adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    save_npz("samples.npz", oracle[0]["samples"])
    for other in (["--inception", inception_file], PLAIN):
        assert (
            "holds statistics of the Inception of 2015"
            in run("fid", "samples.npz", "--ref", "adm.npz", *other, status=1).stderr
        )


@pytest.mark.parametrize("count, expected", [(50_000, "50K"), (10_000, "10K"), (2_500, "2500")])
def test_the_label_says_how_many_images_a_fid_is_of(count, expected):
    moments = torch.zeros(1), torch.zeros(1, 1)
    one = extraction.Measured("", "", 256, count, extraction.STANDARD, "", *moments)
    assert evaluation.label(one) == expected
    remarks = "\n".join(evaluation.remarks("fid", one, one))
    assert ("published numbers are of 50,000" in remarks) == (count != 50_000)


def test_few_images_and_unequal_sizes_are_remarked_on():
    save_npz("samples.npz", photographs(20, 16))
    save_npz("ref.npz", photographs(30, 8))
    remarks = "\n".join(measured("fid", "samples.npz", "--ref", "ref.npz", *PLAIN)["remarks"])
    assert "20 samples are fewer than the 48 features" in remarks
    assert "30 reference images are fewer" in remarks
    assert "samples are 16×16, reference images 8×8" in remarks


@pytest.mark.parametrize("count, warned", [(2047, True), (2048, False)])
def test_fewer_images_than_inceptions_features_are_remarked_on(count, warned):
    one = extraction.Measured(
        "", "", 256, count, extraction.STANDARD, "", torch.zeros(2048), torch.zeros(1, 1)
    )
    line = (
        f"{count:,} samples are fewer than the 2,048 features: Fréchet distances are biased upwards"
    )
    assert (line in evaluation.remarks("fid", one, None)) == warned
    assert line not in evaluation.remarks("is", one, None)  # which knows no such bias


def test_the_papers_row_stands_beside():
    save_npz("samples.npz", photographs(20, 16))
    arguments = "fid", "samples.npz", "--ref", "samples.npz", "--against", "xl2r", *PLAIN
    assert "1.70 (800 epochs, guidance)" in run(*arguments).output
    assert [
        "800 epochs, guidance",
        {"fid": 1.70, "inception_score": 289.0, "precision": 0.79, "recall": 0.63},
    ] in measured(*arguments)["paper"]


# Order


def collected(logits, ordered=True):
    collector = extraction.Collector(len(logits), torch.device("cpu"), mixed=not ordered)
    collector.score.split = 100
    for first in range(0, len(logits), 64):
        part = logits[first : first + 64]
        collector.add(np.arange(first, first + len(part)), part, None, part)
    return collector.measured(
        source="", sha256="", size=1, extractor=extraction.STANDARD, identity=""
    )


def test_an_ordered_set_sorted_by_class_is_reported_and_a_folder_permuted():
    generator = torch.Generator().manual_seed(0)
    by_class = 20.0 * torch.eye(10)[torch.arange(1000) // 100]
    by_class += torch.rand(1000, 10, generator=generator)
    shuffled = by_class[torch.randperm(1000, generator=generator)]
    sets = {
        "sorted": collected(by_class),
        "shuffled": collected(shuffled),
        "folder": collected(by_class, ordered=False),
    }
    assert sets["sorted"].score < 1.1
    assert sets["shuffled"].score > 8
    assert sets["folder"].score > 8
    again = collected(by_class, ordered=False)
    assert again.score == sets["folder"].score  # the permutation is fixed
    reported = {
        name: any("sorted by class" in line for line in evaluation.remarks("is", one, None))
        for name, one in sets.items()
    }
    assert reported == {"sorted": True, "shuffled": False, "folder": False}


@pytest.mark.parametrize(
    "classes, expected",
    [
        ([0, 0, 1, 1], (2 / 3 - 1 / 2) / (1 / 2)),
        ([0, 1, 0, 1], (0 - 1 / 2) / (1 / 2)),
        ([0, 0, 0, 1], (2 / 3 - 10 / 16) / (6 / 16)),
        ([2, 2, 2], 0),
        ([2], 0),
    ],
    ids=str,
)
def test_sortedness_is_how_much_likelier_neighbours_are_of_one_class(classes, expected):
    logits = 9.0 * torch.eye(3)[classes]
    collector = extraction.Collector(len(classes), torch.device("cpu"))
    collector.add(np.arange(len(classes)), torch.rand(len(classes), 1), None, logits)
    if len(classes) > 1:
        found = collector.measured(source="", sha256="", size=1, extractor="", identity="")
        assert found.sortedness == pytest.approx(expected)
    else:
        assert extraction._sortedness(torch.tensor(classes)) == expected


def test_of_a_reference_some_features_are_kept_in_their_order():
    """Which ones is the same in every version: statistics that 0.1 wrote compare with ours."""
    rows = torch.arange(20.0)[:, None]
    collector = extraction.Collector(20, torch.device("cpu"), keep=5)
    for first in (8, 0, 16):
        numbers = np.arange(first, min(first + 8, 20))
        collector.add(numbers, rows[numbers], None, None)
    found = collector.measured(source="", sha256="", size=1, extractor="", identity="")
    assert found.features.flatten().tolist() == KEPT
    assert found.count == 20
    assert found.mean.item() == 9.5


# A metric is a row


def test_a_new_metric_is_a_row(monkeypatch):
    """Its numbers, its place in `all`, its name and digits, and what it asks of extractor and
    reference."""
    row = evaluation.Metric(
        "How far the means lie apart.",
        {"shift": "Shift"},
        needs=["reference", "features"],
        compute=lambda samples, reference: [float((samples.mean - reference.mean).norm())],
        digits=2,
        counted=True,
    )
    monkeypatch.setitem(evaluation.METRICS, "shift", row)
    moments = torch.tensor([3.0, 0.0]), torch.eye(2)
    samples = extraction.Measured("s", "", 8, 10, extraction.STANDARD, "", *moments)
    against = dataclasses.replace(samples, source="r", mean=torch.tensor([0.0, 4.0]))
    result = evaluation.compare("shift", samples, against)
    assert result == {"shift": 5.0, "shift_error": None}
    assert evaluation.keys("all")[-1] == "shift"
    about = {"label": "10", "samples": None, "reference": None, "remarks": []}
    assert evaluation.table(result | about) == "Shift-10         5.00"
    with pytest.raises(storage.UserError, match="enough for fid and sfid; pr, kid, all and shift"):
        evaluation.check_held("shift", against)
    plain = extraction.custom("plain_features:pooled")
    evaluation.check_extractor("shift", plain)
    with pytest.raises(storage.UserError, match="ask for fid, pr, kid or shift"):
        evaluation.check_extractor("all", plain)


def test_every_metric_has_a_help_text_and_all_has_every_number():
    assert all(row.help for row in evaluation.METRICS.values())
    assert evaluation.keys("all") == [
        *("fid", "fid_infinity", "sfid", "sfid_infinity", "inception_score"),
        *("precision", "recall", "density", "coverage", "kid", "kid_deviation"),
    ]
    assert evaluation.needed("all") == {"reference", "spatial", "logits", "features"}
    assert evaluation.needed("is") == {"logits"}


# Other extractors, and none


def test_another_extractor_names_itself_in_the_label():
    save_npz("samples.npz", photographs(60, 16, seed=1))
    save_npz("ref.npz", photographs(50, 16, seed=2))
    found = measured("fid", "samples.npz", "--ref", "ref.npz", *PLAIN)
    import plain_features

    samples = plain_features.pooled(photographs(60, 16, seed=1))
    reference = plain_features.pooled(photographs(50, 16, seed=2))
    assert found["fid"] == pytest.approx(distance(samples, reference), rel=1e-4)
    assert found["label"] == "60, features of plain_features:pooled"
    assert (
        "FID-60, features of plain_features:pooled"
        in run("fid", "samples.npz", "--ref", "ref.npz", *PLAIN).output
    )


@pytest.mark.parametrize("name", ["as_array", "as_double_array", "as_half"])
def test_an_extractor_may_give_numpy_arrays_and_other_precisions(name):
    save_npz("samples.npz", photographs(20, 16, seed=1))
    save_npz("ref.npz", photographs(15, 16, seed=2))
    arguments = "fid", "samples.npz", "--ref", "ref.npz", "--device", "cpu", "--features"
    expected = measured(*arguments, "plain_features:pooled")["fid"]
    assert measured(*arguments, f"plain_features:{name}")["fid"] == pytest.approx(
        expected, rel=0.01
    )


@pytest.mark.parametrize(
    "metrics, features, message",
    [
        ("fid", "plain_features:as_text", "gave ndarray (8, 2) of <U1 for 8 images"),
        ("fid", "plain_features:as_list", "gave list for 8 images"),
        ("fid", "plain_features:not_a_number", "NaN or infinity"),
        (
            "fid",
            "plain_features:of_another_shape",
            "expected a tensor or an array of numbers (8, D)",
        ),
        ("fid", "plain_features:missing", "expected module:function"),
        ("fid", "missing_module:pooled", "expected module:function"),
        ("fid", "plain_features", "expected module:function"),
        ("sfid", "plain_features:pooled", "ask for fid, pr or kid"),
        ("is", "plain_features:pooled", "ask for fid, pr or kid"),
    ],
)
def test_an_extractor_that_does_not_serve_is_an_error(metrics, features, message):
    save_npz("samples.npz", photographs(8, 16))
    arguments = (
        metrics,
        "samples.npz",
        "--ref",
        "samples.npz",
        "--features",
        features,
        "--device",
        "cpu",
    )
    assert message in run(*arguments, status=1).stderr


def test_without_inception_weights_there_is_no_number(home):
    save_npz("samples.npz", photographs(8, 16))
    result = run("fid", "samples.npz", "--ref", "samples.npz", status=1)
    assert "pt_inception-2015-12-05-6726825d.pth" in result.stderr
    assert str(home / "inception") in result.stderr
    assert not result.stdout


def test_nothing_to_compare_with_is_said_before_anything_is_measured():
    save_npz("samples.npz", photographs(8, 16))
    assert "give --ref" in run("fid", "samples.npz", *PLAIN, status=1).stderr


# Samples of a run


@pytest.mark.slow
def test_a_handful_of_one_class_is_refused_with_what_makes_a_fair_set(trained):
    generator = sampling.load(trained, device="cpu")
    sampling.sample(
        generator, [3] * 5, range(5), sampling.Settings(steps=3), out="threes", quiet=True
    )
    message = run("fid", "threes", "--ref", "threes", *PLAIN, status=1).stderr
    assert "5 images of class 3 alone" in message
    assert "dimr sample --balanced -n 50000 --weights" in message


@pytest.mark.slow
def test_with_nothing_named_the_newest_balanced_set_or_the_newest_run_is_measured(
    trained, digits, monkeypatch
):
    shutil.copytree(trained, "runs/small")
    drawn = measured("fid", "-n", 30, "--steps", 3, *PLAIN)
    assert drawn["samples"]["count"] == 30
    assert "runs/small" in drawn["samples"]["source"]
    assert drawn["reference"]["source"] == str(digits)  # what it was trained on
    assert drawn["reference"]["count"] == 200
    assert not Path("samples").exists()
    kept = measured("fid", "-n", 30, "--steps", 3, "--keep", *PLAIN)
    assert kept["samples"]["source"].endswith("balanced-30.npz")
    assert kept["fid"] == pytest.approx(drawn["fid"], rel=1e-4)
    assert measured("fid", *PLAIN)["samples"] == kept["samples"]
    monkeypatch.setattr(evaluation, "COUNT", 30)
    fresh = measured("fid", "--steps", 2, *PLAIN)  # how to draw is said, so it draws
    assert "runs/small" in fresh["samples"]["source"] and fresh["fid"] != kept["fid"]
    assert imagesets.open_set(kept["samples"]["source"]).labels.tolist() == [
        i % 10 for i in range(30)
    ]


def test_samples_and_a_network_at_once_are_bad_usage(trained):
    assert "leave out" in run("fid", "set.npz", "--weights", trained, *PLAIN, status=2).stderr


IMAGENET = [wnid for wnid, _ in imagenet_names.CLASSES]


@pytest.mark.parametrize(
    "classes, size, expected",
    [
        (IMAGENET, 256, "imagenet256"),
        ([], 64, "imagenet64"),
        (IMAGENET, 128, None),
        ([f"mine{i}" for i in range(1000)], 256, None),
    ],
)
def test_adms_reference_fits_imagenets_classes_alone(classes, size, expected):
    if expected:
        assert evaluation.fitting_reference(None, 1000, classes, size=size) == evaluation.Reference(
            expected
        )
    else:
        with pytest.raises(storage.UserError, match="give --ref"):
            evaluation.fitting_reference(None, 1000, classes, size=size)


def test_latents_are_compared_with_the_images_they_were_made_from(digits, monkeypatch):
    """Found by their fingerprint in the places where encode looks for images."""
    index = {
        "format": shards.FORMAT,
        "kind": "latents",
        "size": 1,
        "channels": 4,
        "classes": ["0"],
        "source": {"items": 200, "fingerprint": dataset.Images(digits, 8, 3).fingerprint},
        "options": {"res": 8, "exif": True},
        "shards": [{"file": "shard-00000.safetensors", "count": 200, "sha256": ""}],
    }
    storage.write_json("latents/index.json", index)
    storage.write_json(
        "run/config.json", {"data": {"kind": "latents", "path": str(Path("latents").resolve())}}
    )
    monkeypatch.setenv("DIMR_DATA", str(digits))
    assert evaluation.fitting_reference("run", 10, [], size=8) == evaluation.Reference(
        str(digits), 8, exif=True
    )
    save_folder("other", photographs(3, 8))
    monkeypatch.setenv("DIMR_DATA", "other")
    with pytest.raises(storage.UserError, match="give --ref"):
        evaluation.fitting_reference("run", 10, [], size=8)


# Several sets, and how their labels were chosen


def test_of_several_sets_each_is_compared_with_the_first():
    """Halves of one set differ by noise, and one that is darker does not."""
    images = photographs(200, 16, seed=1)
    save_npz("first.npz", images[::2])
    save_npz("second.npz", images[1::2])
    save_npz("darker.npz", images[1::2] // 2)
    save_npz("ref.npz", photographs(90, 16, seed=2))
    sets = "first.npz", "second.npz", "darker.npz"
    found = measured("fid", *sets, "--ref", "ref.npz", *PLAIN)
    assert list(found["sets"]) == ["first", "second", "darker"]
    alone = measured("fid", "darker.npz", "--ref", "ref.npz", *PLAIN)
    assert found["sets"]["darker"] == alone
    assert list(found["differences"]) == ["second", "darker"]
    second = found["differences"]["second"]["fid"]
    darker = found["differences"]["darker"]["fid"]
    assert second["within_noise"] and not darker["within_noise"]
    first = found["sets"]["first"]
    assert darker["difference"] == pytest.approx(alone["fid"] - first["fid"])
    assert darker["error"] == pytest.approx(np.hypot(alone["fid_error"], first["fid_error"]))
    assert not darker["paired"]
    text = run("fid", *sets, "--ref", "ref.npz", *PLAIN).output
    assert "second to first" in text and "within noise (95%): fid and fid_infinity" in text
    assert "within noise (95%): none; beyond it: fid and fid_infinity" in text


@pytest.mark.parametrize("count, size", [(30, 16), (40, 8)])
def test_sets_of_different_sizes_are_not_compared(count, size):
    save_npz("a.npz", photographs(40, 16))
    save_npz("b.npz", photographs(count, size))
    message = run("fid", "a.npz", "b.npz", "--ref", "a.npz", *PLAIN, status=1).stderr
    assert f"b.npz {count} of {size}" in message and "compare sets of one size" in message


@pytest.mark.slow
def test_networks_that_draw_the_same_seeds_are_compared_block_by_block(trained, digits):
    """What their sets share drops out: the first and the last of a run's checkpoints."""
    runs = f"{trained}@8", f"{trained}@12"
    options = "--ref", digits, "-n", 60, "--steps", 3, *PLAIN
    found = measured("fid", *runs, *options)
    (name,) = found["differences"]
    one = found["differences"][name]["fid"]
    errors_alone = [one["fid_error"] for one in found["sets"].values()]
    assert one["paired"] and one["error"] < np.hypot(*errors_alone) / 2
    other = measured("fid", runs[1], *options, "--labels", "random")
    assert other["labels"] == "random" and other["fid"] != found["sets"][name]["fid"]


def test_every_number_has_an_error_and_a_text_shows_it():
    save_npz("samples.npz", photographs(60, 16, seed=1))
    save_npz("ref.npz", photographs(50, 16, seed=2))
    for metrics in ("fid", "pr", "kid"):
        arguments = metrics, "samples.npz", "--ref", "ref.npz", *PLAIN
        found = measured(*arguments)
        for key in evaluation.keys(metrics):
            if key != "kid_deviation":
                assert found[f"{key}_error"] > 0
        assert "± one standard error of drawing the set anew" in run(*arguments).output
    assert found["kid_deviation_error"] is None  # it is a spread itself
    few = save_npz("few.npz", photographs(19, 16, seed=1))
    found = measured("fid", few, "--ref", "ref.npz", *PLAIN)
    assert found["fid_error"] is None and found["fid_infinity"] is None
    assert any("fewer than the 20 blocks" in line for line in found["remarks"])


def test_the_inception_scores_error_is_of_its_splits():
    logits = torch.randn(300, 30, generator=torch.Generator().manual_seed(0)) * 3
    one = collected(logits)
    (score,) = evaluation.inception_score(one, None)
    assert len(one.scores) == 3 and score.value == one.score
    assert score.error == pytest.approx(np.std(one.scores, ddof=1) / 3**0.5)
    (score,) = evaluation.inception_score(collected(logits[:100]), None)
    assert score.error is None


def test_adm_measures_in_float16_and_says_so():
    save_npz("samples.npz", photographs(60, 16, seed=1))
    save_npz("ref.npz", photographs(50, 16, seed=2))
    found = measured("pr", "samples.npz", "--ref", "ref.npz", "--adm", *PLAIN)
    assert any("float16" in line for line in found["remarks"])
    plain = measured("pr", "samples.npz", "--ref", "ref.npz", *PLAIN)
    assert found["precision"] == pytest.approx(plain["precision"], abs=0.1)


# Processes


@pytest.mark.slow
def test_files_spread_over_processes_give_one_number(inception_file, oracle):
    save_folder("samples", oracle[0]["samples"][:7])
    save_npz("ref.npz", oracle[0]["reference"][:6])
    arguments = [
        "all",
        "samples",
        "--ref",
        "ref.npz",
        "--inception",
        inception_file,
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]
    alone = measured(*arguments)
    done = dimr_command(
        "eval",
        *arguments,
        "--json",
        cwd=Path.cwd(),
        env={"DIMR_HOME": f"{Path.cwd()}/home"},
        torchrun=2,
    )
    together = json.loads(done.stdout)
    for key in ALL:
        if alone[key] is not None:  # of 7 images no limit is known
            assert together[key] == pytest.approx(alone[key], rel=1e-9)


@pytest.mark.slow
def test_an_interrupted_generation_goes_on_and_ends_with_the_same_bits(
    trained, inception_file, monkeypatch
):
    arguments = [
        "all",
        "-n",
        "12",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--ref",
        "ref.npz",
        "--json",
        "--device",
        "cpu",
    ]
    arguments += ["--weights", trained, "--inception", inception_file]
    save_npz("ref.npz", photographs(6, 8))
    whole = measured(*arguments)
    cut = f"{Path.cwd()}/cut"
    started = subprocess.Popen(
        [sys.executable, "-m", "cli", "eval", *map(str, arguments)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DIMR_HOME": cut},
    )

    def notes(folder):
        return sorted(Path(folder).rglob("*.partial/0*.safetensors"))

    deadline = time.monotonic() + 120
    while len(notes(cut)) < 2 and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert 2 <= len(notes(cut)) < 6
    shutil.copytree(cut, "changed")
    resumed = json.loads(
        dimr_command("eval", *arguments, env={"DIMR_HOME": cut}, torchrun=2, cwd=Path.cwd()).stdout
    )
    for key in ALL:
        assert resumed[key] == whole[key]
    assert not list(Path(cut).rglob("*.partial"))
    # what had been noted was used, not made again: a changed note shows
    tensors, _ = storage.load_tensors(notes("changed")[0])
    storage.save_tensors(
        notes("changed")[0], {name: tensor + 1 for name, tensor in tensors.items()}
    )
    monkeypatch.setenv("DIMR_HOME", "changed")
    assert measured(*arguments)["fid"] != whole["fid"]


@pytest.mark.slow
def test_training_watches_fid_on_any_number_of_processes(digits):
    """The last measurement is what `dimr eval fid` says of the run's end."""
    arguments = [
        "train",
        "--data",
        digits,
        *SMALL,
        "--eval-every",
        "5",
        "--eval-images",
        "20",
        *PLAIN,
    ]
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    for name, processes in (("alone", None), ("together", 2)):
        dimr_command(*arguments, "--out", name, cwd=Path.cwd(), env=environment, torchrun=processes)
    alone, together = (
        [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "together")
    )
    assert [line["step"] for line in alone] == list(range(1, 13))
    assert [line["step"] for line in alone if "fid" in line] == [5, 10, 12]
    assert all(line["fid_images"] == 20 for line in alone if "fid" in line)
    assert [line["fid"] for line in together if "fid" in line] == pytest.approx(
        [line["fid"] for line in alone if "fid" in line], abs=1e-3
    )
    found = measured("fid", "--weights", "alone", "-n", 20, "--cfg", 1, *PLAIN)["fid"]
    assert alone[-1]["fid"] == pytest.approx(found, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("every, steps", [(4, [4, 8, 12]), (7, [7, 12]), (12, [12]), (13, [12])])
def test_a_watched_run_is_measured_at_its_end_too_and_once(digits, every, steps):
    arguments = ["train", "--data", digits, *SMALL, "--eval-images", 20, *PLAIN, "--out", "run"]
    arguments += ["--eval-every", every]
    result = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "fid" in line] == steps
    assert all(np.isfinite(line["fid"]) for line in lines if "fid" in line)


@pytest.mark.slow
def test_a_run_that_is_stopped_is_not_measured_where_it_stops(digits):
    """Only at its end, which it has not reached."""
    arguments = ["train", "--data", digits, *SMALL, "--eval-images", 20, *PLAIN, "--out", "run"]
    arguments += ["--eval-every", 5, "--max-time", 1e-9]
    result = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert result.exit_code == 75, result.output
    (line,) = Path("run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
    assert "fid" not in json.loads(line)


def test_there_is_room_for_what_is_not_noted_yet(tmp_path, monkeypatch):
    generation = extraction.Generation(None, 12, batch_size=5)
    notes = extraction.Notes(tmp_path, generation)
    assert [generation.numbers(k).tolist() for k in range(generation.batches)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11],
    ]
    notes.add(generation.numbers(1), [torch.rand(5, 2)] * 3)
    assert notes.done() == {1}
    usage = shutil.disk_usage(tmp_path)._replace(free=7 * extraction.BYTES)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: usage)
    notes.check_room()
    usage = usage._replace(free=usage.free - 1)
    with pytest.raises(storage.UserError, match="features of 7 images .*DIMR_HOME"):
        notes.check_room()


def test_a_cut_note_is_a_batch_to_do_again_and_a_damaged_one_is_told(tmp_path):
    generation = extraction.Generation(None, 10, batch_size=5)
    notes = extraction.Notes(tmp_path, generation)
    for k in range(2):
        notes.add(generation.numbers(k), [torch.rand(5, 2)] * 3)
    assert len(list(notes.read(torch.device("cpu"), True))) == 2
    whole = notes.path(1).read_bytes()
    for damaged in (whole[:-9], b"", whole[:40]):
        notes.path(1).write_bytes(damaged)
        assert notes.done() == {0}
    notes.path(1).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(storage.UserError, match="is damaged and has been deleted; run the same"):
        list(notes.read(torch.device("cpu"), True))
    assert notes.done() == {0}


@pytest.mark.slow
def test_a_run_that_can_not_be_watched_does_not_start(digits):
    arguments = ["train", "--data", digits, *SMALL, "--eval-every", "5", "--out", "run"]
    done = dimr_command(*arguments, cwd=Path.cwd(), check=False)
    assert done.returncode == 1
    assert "pt_inception-2015-12-05-6726825d.pth" in done.stderr
    assert not Path("run").exists()
