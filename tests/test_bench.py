"""The benchmark script: its rows, its ceilings, and the comparison with a checkout of the release."""

import json

import pytest
import torch
from click.testing import CliRunner

import bench
import dimr
import sampling


def run(*arguments):
    return CliRunner().invoke(bench.main, [*map(str, arguments), "--device", "cpu", "--variant", "demo", "--seconds", "0"])


def test_rows_say_what_was_measured(monkeypatch):
    monkeypatch.setitem(bench.Bench.SIDE, "cpu", 1024)
    done = run("train", "sample", "--batch", 8, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == ["training step demo, dimr", "sampling demo, 2m 25 NFE, dimr", "sampling demo, dpm-fast 50 NFE, dimr"]
    for row in rows:
        assert {"name", "device", "precision", "batch", "seconds", "throughput", "share", "peak_bytes", "ratio"} <= row.keys()
        assert row["device"] == "cpu" and row["batch"] == 8 and row["ratio"] is None and 0 < row["share"] < 1.5
        assert row["throughput"] == pytest.approx(8 / row["seconds"]) and row["name"] in done.stderr


def test_a_share_is_of_the_ceiling_and_a_ratio_of_the_first(monkeypatch):
    monkeypatch.setitem(bench.Bench.SIDE, "cpu", 1024)
    measured = bench.Bench(torch.device("cpu"), seconds=0.2)
    top, flops = measured.ceiling("fp32")

    def twice():
        top()
        top()

    measured.compare("product", [bench.Candidate("once", lambda: top, flops), bench.Candidate("twice", lambda: twice, flops)])
    once, doubled = measured.rows
    assert once.ratio is None and 0.7 < once.share < 1.4 and 0.35 < doubled.share < 0.7 and 1.5 < doubled.ratio < 2.7


def test_anything_but_a_checkout_is_refused_in_one_line(tmp_path):
    done = run("train", "--against", tmp_path)
    assert done.exit_code == 1 and "expected a checkout of the authors' release" in done.stderr.strip().splitlines()[-1]


def test_weights_rounded_once_give_what_autocast_rounds_every_time():
    torch.manual_seed(0)
    model = dimr.DiMR(dimr.VARIANTS["demo"]).eval()
    x, tau, y = bench.inputs(model.config, 4, torch.device("cpu"))
    with torch.inference_mode(), sampling.autocast(torch.device("cpu"), "bf16"):
        expected = model(x, tau, y)
        found = sampling.for_inference(model, "bf16")(x, tau, y)
    assert model.branches[0].out.weight.dtype == torch.bfloat16 and model.branches[0].blocks[0].norm1.gamma.p1.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
