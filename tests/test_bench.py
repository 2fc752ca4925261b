"""The benchmark script: its rows and what it counts, and the fast paths it led to. The comparison
with the release needs a checkout and is not tested."""

import json

import bench
import pytest
import torch
from click.testing import CliRunner

import dimr
import parallel


def run(*arguments):
    return CliRunner().invoke(
        bench.main, [*map(str, arguments), "--device", "cpu", "--variant", "demo", "--seconds", "0"]
    )


def test_rows_say_what_was_measured(monkeypatch):
    monkeypatch.setitem(bench.Bench.SIDE, "cpu", 1024)
    done = run("train", "sample", "--batch", 8, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == [
        "training step demo, dimr",
        "sampling demo, 2m 25 NFE, dimr",
        "sampling demo, dpm-fast 50 NFE, dimr",
    ]
    for row in rows:
        assert {
            "name",
            "device",
            "precision",
            "batch",
            "seconds",
            "throughput",
            "share",
            "peak_bytes",
            "ratio",
        } <= row.keys()
        assert (
            row["device"] == "cpu"
            and row["batch"] == 8
            and row["ratio"] is None
            and row["share"] > 0
        )
        assert row["throughput"] == pytest.approx(8 / row["seconds"]) and row["name"] in done.stderr


def test_a_share_is_of_the_ceiling_and_a_ratio_of_the_first(monkeypatch):
    """On a clock of our own: the ceiling takes 2 seconds, the candidates 4 and 10."""
    clock = iter([4, 4, 10, *3 * [2, 4, 10]])  # both warm, the first twice; then three rounds
    monkeypatch.setattr(bench.Bench, "timed", lambda self, function: next(clock))
    monkeypatch.setattr(bench.Bench, "ceiling", lambda self, precision: (lambda: None, 600))
    measured = bench.Bench(torch.device("cpu"), seconds=0)
    measured.compare(
        "product",
        [bench.Candidate("one", lambda: print, 900), bench.Candidate("other", lambda: print, 300)],
        batch=8,
    )
    one, other = measured.rows
    assert (one.seconds, one.throughput, one.share, one.ratio, one.spread) == (
        4,
        2,
        900 / 4 / (600 / 2),
        None,
        0,
    )
    assert (other.seconds, other.share, other.ratio) == (10, 300 / 10 / (600 / 2), 2.5)


def test_anything_but_a_checkout_is_refused_in_one_line(tmp_path):
    done = run("train", "--against", tmp_path)
    assert (
        done.exit_code == 1
        and "expected a checkout of the authors' release" in done.stderr.strip().splitlines()[-1]
    )


def test_weights_rounded_once_give_what_autocast_rounds_every_time():
    torch.manual_seed(0)
    model = dimr.DiMR(dimr.VARIANTS["demo"]).eval()
    x, tau, y = bench.inputs(model.config, 4, torch.device("cpu"))
    with torch.inference_mode(), parallel.autocast(torch.device("cpu"), "bf16"):
        expected = model(x, tau, y)
        found = parallel.for_inference(model, "bf16")(x, tau, y)
    assert (
        model.branches[0].out.weight.dtype == torch.bfloat16
        and model.branches[0].blocks[0].norm1.gamma.p1.dtype == torch.float32
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_linear_layers_in_onednn_compute_the_same_and_leave_gradients_right():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    torch.manual_seed(0)
    model = dimr.DiMR(dimr.VARIANTS["demo"]).eval()
    x, tau, y = bench.inputs(model.config, 4, torch.device("cpu"))

    def passes():
        with torch.inference_mode():
            out = model(x, tau, y)
        return [
            *out,
            *torch.autograd.grad(
                model(x, tau, y)[-1].square().sum(), model.branches[0].blocks[0].mlp.w0.weight
            ),
        ]

    expected = passes()
    parallel.for_inference(model, "fp32")
    found = passes()
    assert model.branches[0].blocks[0].mlp.w0.forward.func is parallel.onednn_linear
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
