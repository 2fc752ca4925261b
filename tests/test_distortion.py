"""The classifier against timm's, what it marks, and the distortion rate from votes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import relative
from inception_weights import photographs
from PIL import Image
from scipy import stats
from timm.data import create_transform, resolve_data_config

import cli
import imagesets
import sampling
import vit


@pytest.fixture(scope="module")
def theirs():
    """timm's ViT-B/16 with random weights, none of them at the zeros and ones they start from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("vit_base_patch16_224.augreg2_in21k_ft_in1k").eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return network


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A file with a small classifier of 10 classes, and an empty working folder."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = vit.ViT(32, 16, 128, 2, 256, 10)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, 0.2)
    torch.save(network.state_dict(), "small.pth")
    return tmp_path / "small.pth"


def run(*arguments, status=0):
    result = CliRunner().invoke(cli.main, ["eval", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    assert status != 1 or result.stderr.count("\n") == 1
    return result


def refused(*arguments):
    """The line that says why."""
    return run(*arguments, status=1).stderr


def marked(classifier, *options, samples="set.npz"):
    """The JSON that `dimr eval fidelity` prints."""
    done = run("fidelity", samples, "--classifier", classifier, *options, "--json")
    return json.loads(done.stdout)


# The classifier


def test_logits_are_timms_on_the_same_weights(theirs):
    ours = vit.from_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("size", [64, 224, 248, 256, 512])
def test_preprocessing_is_timms_within_two_levels(theirs, size):
    images = photographs(2, size)
    transform = create_transform(**resolve_data_config({}, model=theirs))
    expected = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    found = vit.prepare(images, 224)
    levels = (found - expected).abs() * 127.5
    assert found.shape == expected.shape
    assert levels.max() < 2.01
    assert levels.mean() < 0.3


def test_weights_that_do_not_fit_are_named(small, tmp_path):
    tensors = torch.load(small)
    del tensors["blocks.1.attn.qkv.bias"]
    torch.save(tensors, "lacking.pth")
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    np.savez("set.npz", arr_0=photographs(2, 32).numpy(), arr_1=np.arange(2))
    message = refused("fidelity", "set.npz", "--classifier", "lacking.pth")
    assert "missing blocks.1.attn.qkv.bias" in message
    message = refused("fidelity", "set.npz", "--classifier", "other.pth")
    assert "not a Vision Transformer" in message


# Marking


def test_marked_are_those_whose_intended_class_is_improbable(small):
    images = photographs(150, 32)
    labels = np.arange(150) % 10
    np.savez("set.npz", arr_0=images.numpy(), arr_1=labels)
    result = marked(small, "--batch-size", 16)

    network = vit.from_state_dict(torch.load(small))
    probabilities = network(vit.prepare(images, 32)).softmax(1)[range(150), labels].numpy()
    low = np.flatnonzero(probabilities < 0.2)
    assert 64 < len(low) < 150  # some pass, and more than one sheet is needed
    assert result["share"] == pytest.approx(len(low) / 150)
    assert (result["marked"], result["images"]) == (len(low), 150)
    by_class = [(row["class"], row["images"], row["marked"]) for row in result["classes"]]
    assert by_class == [(c, 15, int((labels[low] == c).sum())) for c in range(10)]

    rows = list(csv.DictReader(Path("set-marked/marked.csv").read_text().splitlines()))
    assert [int(row["image"]) for row in rows] == low.tolist()
    assert [int(row["class"]) for row in rows] == labels[low].tolist()
    noted = [float(row["probability"]) for row in rows]
    assert noted == pytest.approx(probabilities[low], abs=1e-4)

    assert len(result["sheets"]) == -(-len(low) // 64)
    with Image.open(result["sheets"][0]) as sheet:
        first = np.asarray(sheet)[2:66, 2:66]  # each image is enlarged to 64 pixels
    assert (first == images[low[0]].numpy().repeat(2, 0).repeat(2, 1)).all()


def test_the_threshold_decides_and_nothing_marked_leaves_no_sheet(small):
    np.savez("set.npz", arr_0=photographs(10, 32).numpy(), arr_1=np.arange(10))
    assert marked(small, "--threshold", "0")["sheets"] == []
    assert marked(small, "--threshold", "1")["share"] == 1
    told = run("fidelity", "set.npz", "--classifier", small, "--threshold", "1").output
    assert "10 of 10 images (100.0%) have low fidelity" in told


@pytest.mark.slow
def test_classes_come_from_samples_names_and_from_folders(small, trained):
    generator = sampling.load(trained, device="cpu")
    sampling.sample(
        generator,
        [i % 10 for i in range(12)],
        range(12),
        sampling.Settings(steps=2),
        out="drawn",
        quiet=True,
    )
    assert marked(small, samples="drawn")["images"] == 12
    found = imagesets.open_set("drawn")
    assert sorted(found.labels) == sorted(i % 10 for i in range(12))
    for label, name in zip(found.labels, found.names, strict=True):
        assert name.startswith(f"class{label:04d}-")
    for name in ("b", "a"):
        Path("folders", name).mkdir(parents=True)
        Image.fromarray(photographs(1, 32)[0].numpy()).save(f"folders/{name}/0.png")
    assert imagesets.open_set("folders").labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "labels, message",
    [(None, "doesn't say which class"), (np.arange(8, 12), "the classifier knows 10")],
)
def test_unknown_classes_are_an_error(small, labels, message):
    arrays = {"arr_0": photographs(4, 32).numpy()}
    if labels is not None:
        arrays["arr_1"] = labels
    np.savez("set.npz", **arrays)
    assert message in refused("fidelity", "set.npz", "--classifier", small)
    assert not Path("set-marked").exists()


def test_samples_of_another_number_of_classes_are_refused(small):
    np.savez("set.npz", arr_0=photographs(4, 32).numpy(), arr_1=np.arange(4))
    Path("set.json").write_text(json.dumps({"num_classes": 1000}))
    message = refused("fidelity", "set.npz", "--classifier", small)
    assert "of 1000 and the classifier knows 10" in message


# Several sets at once


def two_sets(counts=(80, 70), size=32):
    """Sets of photographs in folders of models, in files of the same name."""
    images = photographs(sum(counts), size).numpy()
    labels = np.arange(sum(counts)) % 10
    for name, part in (("dimr", slice(0, counts[0])), ("dit", slice(counts[0], None))):
        Path(name).mkdir()
        np.savez(f"{name}/set.npz", arr_0=images[part], arr_1=labels[part])
    return images, labels


def compared(classifier, *options):
    done = run(
        "fidelity", "dimr/set.npz", "dit/set.npz", "--classifier", classifier, *options, "--json"
    )
    return json.loads(done.stdout)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tiles(sheets):
    """The pictures on contact sheets, row by row: each was 32 pixels and is enlarged to 64."""
    for path in sheets:
        with Image.open(path) as sheet:
            pixels = np.asarray(sheet)
        rows, columns = pixels.shape[0] // 82, pixels.shape[1] // 68
        for row in range(rows):
            for column in range(columns):
                tile = pixels[row * 82 + 2 :, column * 68 + 2 :][:64:2, :64:2]
                if (tile < 255).any():  # the last row may not be full
                    yield tile


def test_several_sets_are_marked_side_by_side_and_shown_in_one_shuffled_set(small):
    images, _ = two_sets()
    result = compared(small, "--out", "judged")
    alone = [marked(small, samples=f"{name}/set.npz") for name in ("dimr", "dit")]
    assert list(result["sets"]) == ["dimr-set", "dit-set"]
    for one, own in zip(result["sets"].values(), alone, strict=True):
        assert (one["share"], one["marked"]) == (own["share"], own["marked"])
        assert Path(one["out"], "marked.csv").read_text() == (
            Path(own["out"], "marked.csv").read_text()
        )
        assert not list(Path(one["out"]).glob("*.png"))

    key = read_csv("judged-key.csv")
    assert len(key) == sum(own["marked"] for own in alone)
    assert [row["image"] for row in key] == [f"i{k:05d}" for k in range(len(key))]
    owners = [row["set"] for row in key]
    assert owners != sorted(owners) and owners != sorted(owners, reverse=True)
    offset = {"dimr-set": 0, "dit-set": 80}
    shown = list(tiles(result["sheets"]))
    assert len(shown) == len(key)
    for row, tile in zip(key, shown, strict=True):
        assert (tile == images[int(row["original"]) + offset[row["set"]]]).all()

    again = compared(small, "--out", "again")
    assert Path("again-key.csv").read_text() == Path("judged-key.csv").read_text()
    assert len(again["sheets"]) == -(-len(key) // 64)
    told = run("fidelity", "dimr/set.npz", "dit/set.npz", "--classifier", small).output
    assert "keep marked-dimr-set-dit-set-key.csv from them" in told
    assert f"{alone[0]['share']:.1%}" in told


def test_votes_with_the_key_give_each_sets_rate(small):
    two_sets(counts=(20, 20))
    compared(small, "--out", "judged", "--threshold", 1)
    key = read_csv("judged-key.csv")
    rows = []
    for person, doubtful in (("Ann", 3), ("Bob", 5)):
        seen = {"dimr-set": 0, "dit-set": 0}
        for row in key:
            seen[row["set"]] += 1
            vote = seen[row["set"]] <= doubtful * (1 + (row["set"] == "dit-set"))
            rows.append(f"{row['image']},{person},{int(vote)}")
    rows.append(f"{key[0]['image']},Cy,1")  # who saw an image of one set alone
    write_votes(rows)
    result = json.loads(run("distortion", "votes.csv", "--key", "judged-key.csv", "--json").stdout)
    shares = {"dimr-set": [3 / 20, 5 / 20], "dit-set": [6 / 20, 10 / 20]}
    shares[key[0]["set"]].append(1)
    for name, expected in shares.items():
        one = result["sets"][name]
        assert one["distortion_rate"] == pytest.approx(np.mean(expected))
        low, high = stats.t.interval(
            0.95, len(expected) - 1, loc=np.mean(expected), scale=stats.sem(expected)
        )
        assert one["interval"] == pytest.approx([max(0, low), min(1, high)])
    told = run("distortion", "votes.csv", "--key", "judged-key.csv").output.splitlines()
    assert told[0].startswith("distortion rate") and len(told) == 3


def test_sets_and_keys_that_do_not_fit_are_refused(small):
    two_sets(counts=(12, 12))
    np.savez("large.npz", arr_0=photographs(2, 64).numpy(), arr_1=np.arange(2))
    message = refused("fidelity", "dimr/set.npz", "large.npz", "--classifier", small)
    assert "the sets hold images of 32 and 64 pixels" in message
    message = refused("fidelity", "dimr/set.npz", "dimr/set.npz", "--classifier", small)
    assert "the same set is given twice" in message
    assert not Path("marked-dimr-set-large").exists()
    write_votes(["i00009,Ann,1"])
    assert "nokey.csv can't be read as a key" in refused(
        "distortion", "votes.csv", "--key", "nokey.csv"
    )
    assert "is no key" in refused("distortion", "votes.csv", "--key", "votes.csv")
    Path("key.csv").write_text("image,set,original,class,probability\ni00001,a,0,0,0.1\n")
    message = refused("distortion", "votes.csv", "--key", "key.csv")
    assert "judges i00009, which key.csv doesn't know (1 such images)" in message
    write_votes(["i00001,Ann,1"])
    Path("key.csv").write_text("image,set\ni00001,a\ni00002,b\n")
    told = run("distortion", "votes.csv", "--key", "key.csv").output
    assert "b: nobody judged an image of it" in told


# Votes


def write_votes(rows, header="image,person,distorted"):
    Path("votes.csv").write_text("\n".join([header, *rows]) + "\n")


def test_the_rate_is_the_mean_over_people_of_their_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shares = {"Ann": [1, 0, 0, 0], "Bob": [1, 1], "Cy": [0, 0, 1], "Di": [0], "Ed": [1, 0, 1, 0, 1]}
    rows = []
    for person, votes in shares.items():
        rows += [f"{i:03d}.png,{person},{vote}" for i, vote in enumerate(votes)]
    write_votes(rows)
    result = json.loads(run("distortion", "votes.csv", "--json").stdout)
    means = [np.mean(votes) for votes in shares.values()]
    # 0.437, while 7 of 15 votes are 0.467
    assert result["distortion_rate"] == pytest.approx(np.mean(means))
    low, high = stats.t.interval(0.95, 4, loc=np.mean(means), scale=stats.sem(means))
    assert result["interval"] == pytest.approx([max(0, low), min(1, high)])
    assert (result["images"], result["votes"]) == (5, 15)
    assert result["people"]["Ed"] == pytest.approx(0.6)
    assert "5 people, 5 images, 15 votes" in run("distortion", "votes.csv").output


def test_one_person_has_a_rate_and_no_interval(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_votes(["a,Ann,YES", "b,Ann,no", "c,Ann,False", "d,Ann,true"])
    result = json.loads(run("distortion", "votes.csv", "--json").stdout)
    assert result["distortion_rate"] == 0.5
    assert result["interval"] is None


@pytest.mark.parametrize(
    "rows, header, message",
    [
        (["a,Ann"], "image,person", "lacks the column distorted"),
        (
            ["a,Ann,maybe"],
            "image,person,distorted",
            "line 2: image 'a', person 'Ann', distorted 'maybe'",
        ),
        (["a,Ann,1", "a,Ann,0"], "image,person,distorted", "line 3: Ann has judged a before"),
        (["a,,1"], "image,person,distorted", "person ''"),
        (["a,Ann"], "image,person,distorted", "distorted ''"),
        ([], "image,person,distorted", "holds no votes"),
    ],
)
def test_votes_that_can_not_be_counted_are_named_by_line(
    tmp_path, monkeypatch, rows, header, message
):
    monkeypatch.chdir(tmp_path)
    write_votes(rows, header)
    assert message in run("distortion", "votes.csv", status=1).stderr


def test_no_votes_file_and_no_text_are_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in run("distortion", "votes.csv", status=1).stderr
    Path("votes.csv").write_bytes(b"\xff\xfe\x00\x81")
    assert "no text in UTF-8" in run("distortion", "votes.csv", status=1).stderr
