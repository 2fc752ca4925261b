"""What training will take: arithmetic that can be done on paper, and where its share is from."""

import dataclasses
import json

import pytest
from click.testing import CliRunner
from conftest import ROOT

import cli
import dimr
import forecast
import memory
import networks
import parallel
import recipes
from storage import UserError

XL2R = dimr.VARIANTS["xl2r"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The count of memory takes seconds, and has its own tests."""
    monkeypatch.setattr(memory, "training_memory", lambda *_, accumulated: (10**10, 10**9))


def ask(**options):
    asked = {"gpus": 8, "gpu": "a100", "variant": "xl2r", **options}
    return forecast.forecast(XL2R, recipes.RECIPES["xl2r"], **asked)


def row(name, throughput, machine):
    return {"name": name, "throughput": throughput, "machine": machine}


def results(path, *rows):
    path.write_text(json.dumps(rows))
    return path


def test_the_papers_share_is_taken_where_none_is_known_and_said():
    """xl2r: 160.18 GMAC an image, 6 operations for each in a training step of 1,024 images."""
    found = ask()
    speed = 8 * 312e12 * 0.32 / (6 * 160.1764e9 * 1024)
    assert found["training"]["steps_per_second"] == pytest.approx(speed, rel=1e-4)
    assert found["training"]["days"] == pytest.approx(1e6 / speed / 86400, rel=1e-4)
    assert found["training"]["gpu_hours"] == pytest.approx(8 * 1e6 / speed / 3600, rel=1e-4)
    assert found["share"] == 0.32
    assert found["share_from"] == found["drawing_share_from"] == "the paper's own, on A100s"
    assert "32% of that (the paper's own, on A100s)" in forecast.lines(found)


@pytest.mark.parametrize("throughput", [0, 1e-300, -1])
def test_a_rate_that_is_none_is_refused(tmp_path, throughput):
    path = results(tmp_path / "b.json", row("training step xl2r, dimr", throughput, "NVIDIA A100"))
    with pytest.raises(UserError, match="b.json holds no results"):
        ask(measured=[path])


def test_drawing_counts_guidance_steps_and_the_vae():
    found = ask(gpus=1, share=1.0)["drawing"]
    network = 2 * 160.1764e9
    for preset, steps in (("everyday", 25), ("paper", 250)):
        an_image = found[preset]["hours"] * 3600 * 312e12 / 50_000
        decoding = an_image - 2 * steps * network
        # as docs/performance.md measured: seconds, share of the ceiling, the ceiling
        assert decoding == pytest.approx(2.625 * 1.05 * 196e9, rel=0.05)
        assert found[preset]["steps"] == steps
    pixels = forecast.of_drawing(dimr.VARIANTS["m3r"], 1, 312e12)["everyday"]
    assert pixels["guidance"] == 1
    assert pixels["hours"] == pytest.approx(50_000 * 25 * 2 * 53.5307e9 / 312e12 / 3600, rel=1e-3)


def test_disk_is_what_encode_and_train_write():
    """ImageNet's latents: mean and log-variance of 4×32×32, twice, in two bytes."""
    disk = ask()["disk"]
    assert disk["data_bytes"] == 1_281_167 * 2 * 2 * 4 * 32 * 32 * 2
    assert disk["checkpoint_bytes"] == 16 * 505_386_248
    assert disk["checkpoints_bytes"] == 3 * disk["checkpoint_bytes"]
    assert forecast.of_disk(dimr.VARIANTS["m3r"])["data_bytes"] == 1_281_167 * 64 * 64 * 3


def test_memory_is_that_of_the_passes_that_the_batch_takes(monkeypatch):
    seen = []

    def noted(config, micro_batch, accumulated):
        seen.append((micro_batch, accumulated))
        return 7 * 10**10, 2 * 10**10

    monkeypatch.setattr(memory, "training_memory", noted)
    found = ask(micro_batch=64)
    assert (found["memory"]["passes"], found["memory"]["bytes"]) == (2, 9 * 10**10)
    assert "does NOT fit" in forecast.lines(found)
    ask(gpus=1, micro_batch=64), ask(gpus=16), ask(gpus=8), ask(gpus=32)
    assert seen == [(64, True), (64, False), (64, False), (64, True), (32, False)]
    with pytest.raises(UserError, match="1024 does not split over 8 GPUs in micro-batches of 60"):
        ask(micro_batch=60)
    with pytest.raises(UserError, match="does not split over 7 GPUs"):
        ask(gpus=7)


def test_a_share_that_was_measured_on_such_a_gpu_is_taken(tmp_path):
    """In the same GPU's results: the same variant's first, another's else, ours alone."""
    h100, pcie = "NVIDIA H100 80GB HBM3, CUDA 12.6", "NVIDIA H100 PCIe, CUDA 12.6"
    measured = results(
        tmp_path / "training.json",
        row("training step m3r, dimr", 1000, h100),
        row("training step xl2r, release as it is", 100, h100),
        row("training step xl2r, dimr", 364, h100),
        row("sampling xl2r, 2m 25 NFE, dimr", 30, h100),
        row("training step xl2r, dimr", 999, pcie),
    )
    found = ask(gpu="h100", measured=[measured])
    assert found["share"] == round(364 * 6 * 160.1764e9 / 989e12, 4)
    assert found["training"]["images_per_second"] == pytest.approx(8 * 364, rel=1e-3)
    assert found["share_from"] == f"bench.py, training step xl2r, dimr, {h100}"
    assert found["drawing_share"] == round(30 * 50 * 2 * 160.1764e9 / 989e12, 4)
    assert "sampling xl2r" in forecast.lines(found)
    other = ask(gpu="h100", variant="g2r", measured=[measured])
    assert other["share"] == round(1000 * 6 * 53.5307e9 / 989e12, 4)
    assert ask(gpu="h100-pcie", measured=[measured])["training"][
        "images_per_second"
    ] == pytest.approx(8 * 999, rel=1e-3)
    assert ask(gpu="a100", measured=[measured])["share_from"] == "the paper's own, on A100s"
    assert ask(gpu="h100", measured=[measured], share=0.5)["share_from"] == "as given"


@pytest.mark.parametrize("content", ["{}", "[1]", '"x"'])
def test_results_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "training.json").write_text(content)
    with pytest.raises(UserError, match="expected what tools/bench.py --json printed"):
        ask(measured=[tmp_path / "training.json"])


def test_every_gpu_has_a_peak():
    for gpu in forecast.GPUS.values():
        assert gpu.bf16 == parallel.PEAK_FLOPS[gpu.name] > gpu.fp32
        assert forecast.is_of(f"NVIDIA {gpu.name} 80GB, CUDA 12", gpu)


@pytest.mark.parametrize("variant", ["demo", "dit-xl2", "table2-2"])
def test_every_kind_of_network_has_a_forecast(variant):
    found = forecast.forecast(
        networks.VARIANTS[variant],
        dataclasses.replace(recipes.RECIPES[variant], batch_size=64),
        gpus=2,
        gpu="4090",
        variant=variant,
    )
    assert found["training"]["days"] > 0
    assert forecast.lines(found).count("drawing") == 2


def test_the_command_finds_results_that_lie_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["info", "--variant", "xl2r", "--gpus", "8", "--json"]
    plain = json.loads(CliRunner().invoke(cli.main, command).output)["forecast"]
    assert (plain["gpu"], plain["gpus"], plain["share"]) == ("h100", 8, 0.32)
    results(tmp_path / "training.json", row("training step xl2r, dimr", 364, "NVIDIA H100, CUDA"))
    found = json.loads(CliRunner().invoke(cli.main, command).output)["forecast"]
    assert found["share"] == pytest.approx(0.3537, abs=1e-4)
    given = CliRunner().invoke(cli.main, [*command[:-1], "--share", "0.5"]).output
    assert "at 50% of that (as given)" in given
    assert "forecast" not in json.loads(
        CliRunner().invoke(cli.main, ["info", "--variant", "demo", "--json"]).output
    )


def test_a_runs_forecast_has_its_own_recipe():
    run = ROOT / "tests" / "data" / "v0.1.0" / "run"
    recipe = json.loads((run / "config.json").read_text())["recipe"]
    done = CliRunner().invoke(cli.main, ["info", str(run), "--gpu", "4090", "--json"])
    found = json.loads(done.output)["forecast"]
    assert found["training"]["steps"] == recipe["steps"]
    assert found["training"]["batch_size"] == recipe["batch_size"]
    file = run.parent / "released.pth"
    done = CliRunner().invoke(cli.main, ["info", str(file), "--gpus", "2"])
    assert done.exit_code == 1
    assert "give a run or --variant" in done.output


def test_hours_are_told_in_the_unit_that_fits():
    assert forecast.spell(3 / 3600) == "3 seconds"
    assert forecast.spell(1) == "60 minutes"
    assert forecast.spell(30.25) == "30.2 hours"
