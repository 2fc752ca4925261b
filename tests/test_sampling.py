"""Sampling: one seed one image, what files carry, sets for evaluation."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, dimr_command, relative
from PIL import Image

import diffusion
import dimr
import networks
import randomness
import sampling
import solver
import space
from storage import UserError


@pytest.fixture(scope="module")
def generator():
    return sampling.load(DATA / "v0.1.0" / "run", device="cpu")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# one seed, one image


def test_start_noise_depends_on_the_seed_alone():
    expected = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(7))
    torch.randn(5)  # what was drawn before is of no matter
    assert torch.equal(randomness.start_noise((1, 8, 8), 7), expected)


def test_images_are_byte_equal_at_one_batch_size_for_any_number(generator):
    classes, seeds = [i % 10 for i in range(11)], list(range(50, 61))
    all_of_them = generator.images(classes, seeds, batch_size=4)
    for count in (1, 3, 6):
        assert np.array_equal(
            generator.images(classes[:count], seeds[:count], batch_size=4), all_of_them[:count]
        )
    assert np.array_equal(
        generator.images(classes[5:6], seeds[5:6], batch_size=4), all_of_them[5:6]
    )


def test_images_agree_within_one_level_across_batch_sizes(generator):
    classes, seeds = [i % 10 for i in range(12)], list(range(12))
    images = [generator.images(classes, seeds, batch_size=size).astype(int) for size in (1, 5, 12)]
    assert max(np.abs(images[0] - other).max() for other in images[1:]) <= 1
    assert len({image.tobytes() for image in images[0]}) == 12


@pytest.mark.slow
def test_asking_for_a_seed_alone_gives_the_image_back(trained, tmp_path):
    dimr_command(
        "sample",
        "--weights",
        trained,
        "--class",
        "3",
        "-n",
        "4",
        "--seed",
        "10",
        "--out",
        tmp_path / "four",
        "--device",
        "cpu",
    )
    dimr_command(
        "sample",
        "--weights",
        trained,
        "--class",
        "3",
        "--seeds",
        "12",
        "--out",
        tmp_path / "one",
        "--device",
        "cpu",
    )
    names = [f"class0003-seed{seed:06d}.png" for seed in range(10, 14)] + ["grid.png"]
    assert sorted(p.name for p in (tmp_path / "four").iterdir()) == names
    one, four = (pixels(tmp_path / folder / names[2]) for folder in ("one", "four"))
    assert np.abs(one - four).max() <= 1


def test_guidance_solver_and_steps_change_the_image():
    """On samples before they are rounded: those of a network that has learned nothing saturate."""
    torch.manual_seed(0)
    model = dimr.DiMR(dimr.VARIANTS["demo"])

    def draw(**settings):
        settings = sampling.Settings(**settings).resolved(model.config)
        return sampling.solve(model, [3], [0], settings, device=torch.device("cpu"))

    plain = draw(cfg=1, steps=10)
    for other in (
        draw(cfg=4, steps=10),
        draw(cfg=1, steps=5),
        draw(cfg=1, steps=10, solver="dpm-1s"),
        draw(cfg=1, steps=10, grid="time"),
    ):
        assert relative(other, plain) > 1e-3
    assert torch.equal(draw(cfg=4, steps=10, cfg_interval=(1e6, 2e6)), plain)


def test_a_solver_says_what_it_needs_of_a_network():
    config = dimr.VARIANTS["demo"]
    for settings, message in (
        (dict(solver="ddpm"), "ddpm takes a learned variance, which this network of kind dimr"),
        (dict(solver="sde", grid="time"), "solver sde lays its times itself; leave out --grid"),
        (dict(cfg=2, cfg_channels=3), "guidance of 3 channels: this network has 1"),
    ):
        with pytest.raises(UserError, match=message):
            sampling.Settings(**settings).resolved(config)
    settings = sampling.Settings(solver="sde").resolved(config)
    assert settings.grid == "own" and settings.resolved(config) == settings


@pytest.mark.parametrize(
    "variant, expected",
    [
        ("m3r", ("dpm-fast", "logsnr", 50)),
        ("xl2r", ("fast", "time", 250)),
        ("uvit-m4", ("dpm-fast", "logsnr", 50)),
        ("uvit-h2", ("fast", "time", 50)),
        ("dit-xl2", ("ddpm", "own", 250)),
        ("sit-xl2", ("sde", "own", 250)),
    ],
)
def test_the_papers_preset_is_each_networks_own_papers(variant, expected):
    settings = sampling.Settings(preset="paper").resolved(networks.VARIANTS[variant])
    assert (settings.solver, settings.grid, settings.steps) == expected
    other = sampling.Settings(preset="paper", solver="2m", steps=9)
    assert other.resolved(networks.VARIANTS[variant]).grid in ("time", "logsnr")


FOR_ALL = [name for name, row in solver.SOLVERS.items() if not row.learned_variance]


@pytest.mark.parametrize("name", FOR_ALL)
@pytest.mark.parametrize("objective", diffusion.OBJECTIVES)
def test_every_solver_draws_an_image_from_its_seed_in_any_company(name, objective):
    torch.manual_seed(0)
    config = dataclasses.replace(dimr.VARIANTS["demo"], objective=objective)
    model = dimr.DiMR(config).eval()
    settings = sampling.Settings(cfg=2, steps=6, solver=name).resolved(config)
    cpu = torch.device("cpu")
    alone = sampling.solve(model, [3], [12], settings, device=cpu)
    among = sampling.solve(model, [1, 3, 5], [4, 12, 9], settings, device=cpu)
    assert alone.isfinite().all()
    torch.testing.assert_close(among[1:2], alone, rtol=1e-4, atol=1e-4)
    assert relative(among[0], among[1]) > 0.1


def test_what_a_stochastic_solver_draws_depends_on_seed_and_update():
    def noise(seed, update):
        return randomness.step_noise((1, 8, 8), seed, update)

    assert torch.equal(noise(3, 1), noise(3, 1))
    drawn = [noise(3, 1), noise(3, 2), noise(4, 1), randomness.start_noise((1, 8, 8), 3)]
    assert len({values.numpy().tobytes() for values in drawn}) == 4


@pytest.mark.slow
def test_raw_and_averaged_weights_differ(generator):
    raw = sampling.load(DATA / "v0.1.0" / "run", ema=False, device="cpu")
    assert raw.hash != generator.hash and raw.source.endswith("weights.safetensors")
    assert not np.array_equal(raw.images([3], [0]), generator.images([3], [0]))


def test_decoded_values_are_rounded_and_clamped():
    x = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 0.9999, 3.0]).reshape(1, 1, 2, 3)
    assert space.to_uint8(x).flatten().tolist() == [0, 0, 128, 128, 255, 255]


@pytest.mark.slow
def test_a_compiled_network_draws_the_same_and_says_so(generator, monkeypatch):
    plain = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: plain(self, backend="aot_eager", **how)
    )
    compiled = sampling.load(DATA / "v0.1.0" / "run", device="cpu", compiled=True)
    for one in (compiled, generator):
        units = [unit._compiled_call_impl is not None for unit in one.model.units()]
        assert units and set(units) == {one is compiled}
    images = [g.images([3, 5], [0, 1], cfg=2, steps=4).astype(int) for g in (compiled, generator)]
    assert np.abs(images[0] - images[1]).max() <= 1
    settings = sampling.Settings().resolved(generator.config)
    assert [sampling.describe(g, settings)["compiled"] for g in (compiled, generator)] == [
        True,
        False,
    ]


# files


@pytest.mark.slow
def test_each_png_says_what_it_is_and_how_it_was_made(trained, tmp_path):
    generator = sampling.load(trained, device="cpu")
    done = dimr_command(
        "sample",
        "--weights",
        trained,
        "--class",
        "3",
        "--class",
        "5",
        "-n",
        "3",
        "--cfg",
        "2",
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "--json",
    )
    result = json.loads(done.stdout)
    assert result["n"] == 3 and [os.path.basename(f) for f in result["files"]] == [
        "class0003-seed000000.png",
        "class0005-seed000001.png",
        "class0003-seed000002.png",
    ]
    with Image.open(result["files"][1]) as image:
        assert image.size == (8, 8) and image.mode == "L"
        facts = json.loads(image.text["dimr"])
        assert (
            "not a photograph" in image.text["Description"]
            and "--class 3 --class 5" in image.text["Command"]
        )
    assert (
        facts["class"] == 5
        and facts["seed"] == 1
        and facts["cfg"] == 2
        and facts["solver"] == "2m"
        and facts["steps"] == 25
    )
    assert facts["weights"] == generator.hash and facts["step"] == 12
    with Image.open(result["picture"]) as grid:
        assert "not a photograph" in grid.text["Description"]


def test_classes_go_by_name_where_the_weights_know_them(generator):
    named = sampling.load(generator.source, device="cpu")
    named.classes = ["zero", "Ankle boot"] + [str(i) for i in range(2, 10)]
    assert sampling.class_index("ankle BOOT", named) == 1 and sampling.class_index("7", named) == 7
    with pytest.raises(UserError, match="0 to 9"):
        sampling.class_index("10", named)
    with pytest.raises(UserError, match="Ankle boot"):
        sampling.class_index("shoe", named)


@pytest.mark.slow
def test_a_balanced_set_is_what_an_evaluator_reads(trained, tmp_path):
    generator = sampling.load(trained, device="cpu")
    out = tmp_path / "set.npz"
    result = json.loads(
        dimr_command(
            "sample",
            "--weights",
            trained,
            "--balanced",
            "-n",
            "25",
            "--batch-size",
            "8",
            "--out",
            out,
            "--device",
            "cpu",
            "--json",
        ).stdout
    )
    with np.load(out, allow_pickle=False) as arrays:
        images, classes = arrays["arr_0"], arrays["arr_1"]
    assert result["balanced"] and images.shape == (25, 8, 8, 3) and images.dtype == np.uint8
    assert classes.tolist() == [i % 10 for i in range(25)]
    expected = generator.images([i % 10 for i in range(25)], range(25), batch_size=8)
    assert np.array_equal(images, np.repeat(expected, 3, -1))
    assert json.loads(out.with_suffix(".json").read_text())["balanced"] and not list(
        tmp_path.glob("*.partial")
    )


@pytest.mark.parametrize("how", ["random", "labels.npy", "labels.npz", "labels.txt"])
def test_labels_are_what_was_asked_for(how, tmp_path, monkeypatch):
    """At random from the image's own seed, wherever it stands; or as a file has them."""
    monkeypatch.chdir(tmp_path)
    labels = np.random.default_rng(0).integers(0, 10, 30)
    np.save("labels.npy", labels.astype(np.int32))
    np.savez("labels.npz", arr_0=np.zeros((30, 8, 8, 3), np.uint8), arr_1=labels)
    Path("labels.txt").write_text("\n".join(map(str, labels)))
    config = networks.VARIANTS["demo"]
    found = sampling.choose_classes(how, range(5, 35), config)
    if how == "random":
        assert found[7:] == sampling.choose_classes(how, range(12, 35), config)
        many = sampling.choose_classes(how, range(2000), config)
        assert np.bincount(many).min() > 150 and np.bincount(many).std() > 5
    else:
        assert found == labels.tolist()


@pytest.mark.slow
def test_a_set_says_how_its_labels_were_chosen(trained, tmp_path):
    from click.testing import CliRunner

    import cli

    drawing = ["sample", "--weights", trained, "-n", 30, "--steps", 2, "--device", "cpu", "--json"]
    for labels, name in (("random", "random-30.npz"), ("balanced", "balanced-30.npz")):
        arguments = [*drawing, "--labels", labels, "--out", tmp_path / "sets"]
        result = CliRunner().invoke(cli.main, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        about = json.loads((tmp_path / "sets" / name).with_suffix(".json").read_text())
        assert about["labels"] == labels
        assert about["balanced"] == (labels == "balanced")
    with np.load(tmp_path / "sets" / "random-30.npz") as arrays:
        assert arrays["arr_1"].tolist() == sampling.choose_classes(
            "random", range(30), networks.VARIANTS["demo"]
        )


@pytest.mark.slow
def test_processes_share_the_work_and_write_the_same_set(trained, tmp_path):
    for processes in (None, 2):
        dimr_command(
            "sample",
            "--weights",
            trained,
            "--balanced",
            "-n",
            "20",
            "--batch-size",
            "4",
            "--out",
            tmp_path / f"{processes}.npz",
            "--device",
            "cpu",
            torchrun=processes,
        )
    one, two = (zipfile.ZipFile(tmp_path / f"{p}.npz").read("arr_0.npy") for p in (None, 2))
    assert one == two


@pytest.mark.long
@pytest.mark.slow
def test_an_interrupted_set_goes_on_where_it_stopped(trained, tmp_path):
    command = [
        "sample",
        "--weights",
        str(trained),
        "--balanced",
        "-n",
        "200",
        "--batch-size",
        "2",
        "--steps",
        "20",
        "--device",
        "cpu",
        "--out",
    ]
    victim = subprocess.Popen(
        [sys.executable, "-m", "cli", *command, str(tmp_path / "cut.npz")],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    work = tmp_path / "cut.npz.partial"
    deadline = time.monotonic() + 120
    while len(list(work.glob("batch-*.done"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    before = sorted(work.glob("batch-*.done"))
    assert 5 <= len(before) < 100 and not (tmp_path / "cut.npz").exists()
    # a finished image is marked, to see that it is not drawn again
    kept = 2 * int(before[0].stem.removeprefix("batch-"))
    np.load(tmp_path / "cut.npz.partial" / "images.npy", mmap_mode="r+")[kept] ^= 255
    dimr_command(*command, tmp_path / "cut.npz")
    dimr_command(*command, tmp_path / "whole.npz")
    cut, whole = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("cut", "whole"))
    cut[kept] ^= 255
    assert np.array_equal(cut, whole)


@pytest.mark.slow
def test_a_set_drawn_otherwise_is_not_mixed_in(trained, tmp_path):
    out = tmp_path / "set.npz"
    base = [
        "sample",
        "--weights",
        trained,
        "--balanced",
        "-n",
        "4",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    dimr_command(*base)
    assert "set.npz" in dimr_command(*base).stdout  # the same again is there already
    done = dimr_command(*base, "--cfg", "3", check=False)
    assert done.returncode == 1 and "drawn otherwise" in done.stderr


@pytest.mark.slow
def test_the_newest_run_is_the_default(trained, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small").symlink_to(trained)
    done = dimr_command("sample", "--class", "1", "-n", "1", "--device", "cpu", cwd=tmp_path)
    assert (
        "runs/small" in done.stdout
        and (tmp_path / "samples" / "small-step12-cfg1.5-2m-25nfe" / "grid.png").exists()
    )


@pytest.mark.slow
def test_the_readmes_five_lines(trained, tmp_path):
    generator = sampling.load(trained)
    images = generator.images(classes=[3] * 4, seeds=range(4), cfg=1.5)
    sampling.save_grid(tmp_path / "threes.png", images)
    assert (
        images.shape == (4, 8, 8, 1)
        and images.dtype == np.uint8
        and Image.open(tmp_path / "threes.png").width > 100
    )


# what can't be drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["--cfg", "0.4"], 2, "1.4 here"),
        (["--class", "10"], 1, "0 to 9"),
        (["--class", "panda"], 1, "panda"),
        (["--steps", "0"], 2, "--steps"),
        (["--steps", "25", "--solver", "3s"], 1, "24 or 27"),
        (["--seeds", "1-x"], 2, "0-63"),
        (["--seeds", "1,2", "-n", "3"], 2, "one of the two"),
        (["--balanced", "--class", "1"], 2, "leave out --class"),
        (["--labels", "random", "--class", "1"], 2, "leave out --class"),
        (["--labels", "random", "--balanced"], 2, "one of the two"),
        (["--labels", "nowhere"], 1, "nowhere does not exist"),
        (["--device", "cuda"], 1, "--device auto"),
        (["--weights", "nowhere"], 1, "nowhere"),
        (["--cfg-interval", "3,1"], 1, "interval"),
        (["--cfg-interval", "3"], 2, "2 comma-separated"),
    ],
)
def test_bad_requests_are_one_clear_line(trained, tmp_path, arguments, status, words):
    from click.testing import CliRunner

    import cli

    result = CliRunner().invoke(
        cli.main, ["sample", "--weights", str(trained), "--out", str(tmp_path / "out"), *arguments]
    )
    assert (
        result.exit_code == status and words in result.output and "Traceback" not in result.output
    )
    assert not (tmp_path / "out").exists()


def test_guidance_without_a_null_class_is_refused(generator):
    import dataclasses

    with pytest.raises(UserError, match="null class"):
        sampling.Settings(cfg=2.0).resolved(dataclasses.replace(generator.config, null_class=False))
    assert (
        sampling.Settings().resolved(dataclasses.replace(generator.config, null_class=False)).cfg
        == 1
    )


def test_the_papers_preset_is_the_papers(generator):
    import dataclasses

    latent = dataclasses.replace(generator.config, space="latent")
    paper = sampling.Settings(preset="paper")
    assert dataclasses.astuple(paper.resolved(latent))[-3:] == ("fast", "time", 250)
    assert dataclasses.astuple(paper.resolved(generator.config))[-3:] == ("dpm-fast", "logsnr", 50)


@pytest.mark.slow
def test_weights_that_hold_nan_are_refused(trained, tmp_path):
    from storage import load_tensors, save_tensors

    tensors, about = load_tensors(trained / "checkpoints" / "step-0000012" / "ema.safetensors")
    tensors["branches.0.position"][0, 0] = float("nan")
    save_tensors(tmp_path / "nan.safetensors", tensors, about)
    with pytest.raises(UserError, match="branches.0.position"):
        sampling.load(tmp_path / "nan.safetensors", device="cpu")


def test_the_name_of_a_folder_tells_how_its_images_were_drawn(trained):
    generator = sampling.load(trained, device="cpu")

    def name(**settings):
        return sampling.folder_name(
            generator, sampling.Settings(**settings).resolved(generator.config)
        )

    assert name() == "small-step12-cfg1.5-2m-25nfe"
    told = {
        name(),
        name(cfg=2),
        name(cfg_power=2),
        name(cfg_interval=(0.3, 5)),
        name(solver="euler"),
        name(steps=10),
    }
    assert len(told) == 6


@pytest.mark.slow
def test_images_of_before_and_those_not_shown_are_told(trained, tmp_path):
    common = ["sample", "--weights", trained, "--steps", "2", "--out", tmp_path / "set"]
    first = dimr_command(*common, "-n", "70").stdout
    assert "(the first 64)" in first and "from before" not in first
    second = dimr_command(*common, "-n", "3", "--seed", "100", "--class", "1").stdout
    assert "the folder holds 70 more from before" in second and "the first" not in second
