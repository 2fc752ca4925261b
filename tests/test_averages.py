"""Power-function averages: their arithmetic against EDM2's own numbers and against integrals done
numerically, and what training and `dimr ema` make of them."""

import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import weakref

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, SMALL, dimr_command
from PIL import Image
from scipy.integrate import quad

import averages
import averaging
import dimr
import memory
import recipes
import runfolder
import sampling
from storage import UserError, load_tensors, read_json, save_tensors, write_json

GIVEN = json.loads((DATA / "posthoc_ema.json").read_text())
PROFILES = (0.05, 0.1)
BETWEEN = (0.03, 0.075, 0.2)  # tracked directly as well, to compare with


def exponents(widths):
    return [averages.exponent(width) for width in widths]


# ----------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("width, expected", GIVEN["std_to_exp"].items())
def test_exponents_are_edm2s(width, expected):
    assert averages.exponent(float(width)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", GIVEN["beta"], ids=lambda c: f"{c['std']}-{c['t_next']}")
def test_decays_are_edm2s(case):
    exponent = averages.exponent(case["std"])
    found = averages.decay(case["t_next"], exponent, case["t_delta"])
    assert found == pytest.approx(case["beta"], rel=1e-6)


@pytest.mark.parametrize("case", GIVEN["posthoc"], ids=lambda c: f"{c['out_ofs']}-{c['out_std']}")
def test_coefficients_are_edm2s(case):
    of = exponents(case["in_std"])
    aim = averages.exponent(case["out_std"])
    found = averages.coefficients(case["in_ofs"], of, case["out_ofs"], aim)
    expected = np.array(case["coefficients"])
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("width", [1e-4, 0.005, 0.01, 0.05, 0.1, 0.25, 0.28, 0.2886])
def test_a_widths_exponent_has_that_width(width):
    assert averages.width(averages.exponent(width)) == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("width", [0, -0.1, 1 / math.sqrt(12), 0.3, math.inf, math.nan])
def test_no_exponent_has_a_width_beyond_that_of_a_plain_mean(width):
    with pytest.raises(ValueError, match="not between 0 and 0.2887"):
        averages.exponent(width)


def weighing(exponent, step):
    return lambda tau: (exponent + 1) * tau**exponent / step ** (exponent + 1) * (tau <= step)


@pytest.mark.parametrize("width", [0.05, 0.15, 0.25])
def test_the_width_is_the_weighings_standard_deviation(width):
    p = weighing(averages.exponent(width), 1)
    mean = quad(lambda tau: tau * p(tau), 0, 1)[0]
    variance = quad(lambda tau: (tau - mean) ** 2 * p(tau), 0, 1)[0]
    assert math.sqrt(variance) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize(
    "one, other", [((3, 2.0), (5, 9.0)), ((5, 2.0), (3, 9.0)), ((4, 1), (4, 7))]
)
def test_inner_products_are_the_integrals(one, other):
    first = weighing(one[1], one[0])
    second = weighing(other[1], other[0])
    expected = quad(lambda tau: first(tau) * second(tau), 0, min(one[0], other[0]))[0]
    found = averages.inner(float(one[0]), one[1], float(other[0]), other[1])
    assert float(found) == pytest.approx(expected, rel=1e-9)


def fit_of(count, widths=PROFILES):
    steps = [step for step in range(1, count + 1) for _ in widths]
    return averages.Fit(steps, exponents(widths) * count)


def test_a_snapshots_own_average_is_that_snapshot_alone():
    fit = fit_of(8)
    found = fit.coefficients(6, averages.exponent(0.1))
    expected = np.zeros(16)
    expected[11] = 1
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert fit.mismatch(6, averages.exponent(0.1)) < 1e-6


def test_mismatch_is_the_distance_of_the_weighings():
    fit = fit_of(4)
    aim = averages.exponent(0.15)
    shares = fit.coefficients(4, aim)
    terms = list(zip(shares, fit.exponents, fit.steps, strict=True))

    def difference(tau):
        mixed = sum(share * weighing(exponent, step)(tau) for share, exponent, step in terms)
        return (mixed - weighing(aim, 4)(tau)) ** 2

    distance = quad(difference, 0, 4, points=[1, 2, 3])[0]
    size = quad(lambda tau: weighing(aim, 4)(tau) ** 2, 0, 4)[0]
    assert fit.mismatch(4, aim) == pytest.approx(math.sqrt(distance / size), rel=1e-6)
    assert shares.sum() == pytest.approx(1)


def test_several_averages_at_once_are_each_alone():
    fit = fit_of(4)
    aims = exponents([0.04, 0.15])
    together = fit.coefficients(4, np.array(aims))
    for k, aim in enumerate(aims):
        np.testing.assert_allclose(together[:, k], fit.coefficients(4, aim), rtol=1e-9)


def test_more_snapshots_span_more():
    spans = [fit_of(count).span(count) for count in (1, 8, 64)]
    assert spans[0][0] > spans[1][0] > spans[2][0] == 0.01
    assert spans[0][1] < spans[1][1] < spans[2][1] < averages.WIDEST
    assert spans[0][0] < 0.05 and spans[0][1] > 0.1
    assert fit_of(8).span(30) is None  # long after the last of them


def test_coefficients_before_all_snapshots_are_refused():
    with pytest.raises(ValueError, match="no snapshot up to step 0.5"):
        fit_of(4).coefficients(0.5, 3.0)


# ----------------------------------------------------------------------------------- while training


def walk(steps, seed=0):
    """A tensor's values after each step, drifting and trembling as weights do."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, 50, generator=draw, dtype=torch.float64)
    return noise.cumsum(0) * 0.02 + noise * 0.1


def track(values, widths, every=None):
    """The Averages of `values` in the end, and copies of it after every so many steps."""
    tensor = values[0].clone()
    held = averages.Averages({"w": tensor}, widths)
    copies = []
    for step, value in enumerate(values, 1):
        tensor.copy_(value)
        held.update(step)
        if every and step % every == 0:
            copies += [(step, width, held[width]["w"].clone()) for width in widths]
    return held, copies


def test_an_average_weighs_each_step_by_what_later_steps_left_of_it():
    values = walk(40)
    held, _ = track(values, PROFILES)
    for width in PROFILES:
        exponent = averages.exponent(width)
        expected = torch.zeros(50, dtype=torch.float64)
        for step in range(1, 41):
            left = math.prod(averages.decay(later, exponent) for later in range(step + 1, 41))
            expected += (1 - averages.decay(step, exponent)) * left * values[step - 1]
        torch.testing.assert_close(held[width]["w"], expected, rtol=1e-12, atol=1e-12)


def test_the_first_step_takes_the_place_of_what_was_there():
    tensor = torch.zeros(3)
    held = averages.Averages({"w": tensor}, PROFILES)
    tensor.fill_(7)
    held.update(1)
    assert all(held[width]["w"].eq(7).all() for width in PROFILES)


def test_steps_taken_in_at_once_decay_as_one_by_one():
    exponent = averages.exponent(0.1)
    one_by_one = math.prod(averages.decay(step, exponent) for step in (11, 12, 13, 14))
    assert averages.decay(14, exponent, 4) == pytest.approx(one_by_one, rel=1e-12)
    held = averages.Averages({"w": torch.ones(1)}, [0.1])
    held.held[0.1]["w"].zero_()
    held.update(14, steps=4)
    assert held[0.1]["w"].item() == pytest.approx(1 - one_by_one, rel=1e-6)


@pytest.mark.parametrize("skipped", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_a_skipped_step_changes_nothing(skipped):
    tensor = torch.randn(5)
    held = averages.Averages({"w": tensor}, PROFILES)
    held.update(3, torch.tensor(0.0))
    before = {name: value.clone() for name, value in held.state().items()}
    tensor.add_(1)
    held.update(4, skipped)
    assert all(torch.equal(value, before[name]) for name, value in held.state().items())
    held.update(5)
    assert not any(torch.equal(value, before[name]) for name, value in held.state().items())


def test_saved_and_restored_averages_go_on_as_if_never_stopped():
    values = walk(30)
    whole, _ = track(values, PROFILES)
    half, _ = track(values[:15], PROFILES)
    tensor = values[14].clone()
    restored = averages.Averages({"w": tensor}, PROFILES)
    restored.load({name: value.clone() for name, value in half.state().items()})
    for step in range(16, 31):
        tensor.copy_(values[step - 1])
        restored.update(step)
    for name, value in whole.state().items():
        assert torch.equal(restored.state()[name], value)


@pytest.mark.parametrize(
    "state, words",
    [
        ({"0.05/w": torch.zeros(2)}, "0.1/w is held by one"),
        (
            {f"{width}/w": torch.zeros(3) for width in PROFILES},
            r"0.05/w is \(3,\), expected \(2,\)",
        ),
    ],
)
def test_averages_of_something_else_are_refused(state, words):
    with pytest.raises(ValueError, match=words):
        averages.Averages({"w": torch.zeros(2)}, PROFILES).load(state)


# --------------------------------------------------------------------------------------- afterwards


def apart(one, other):
    return float((one.double() - other.double()).norm())


@pytest.mark.parametrize("width", BETWEEN)
def test_a_rebuilt_average_is_the_one_tracked_directly(width):
    values = walk(2000)
    _, copies = track(values, PROFILES, every=31)
    tensors = [{"w": copy.float()} for _, _, copy in copies]
    shares = averages.coefficients(
        [step for step, _, _ in copies],
        exponents([of for _, of, _ in copies]),
        copies[-1][0],
        averages.exponent(width),
    )
    rebuilt = averages.combine([lambda t=t: t for t in tensors], shares)["w"]
    last = values[: copies[-1][0]]
    direct = track(last, [width])[0][width]["w"]
    assert apart(rebuilt, direct) < 0.01 * apart(direct, last[-1])


def test_snapshots_are_summed_in_float64_whatever_their_precision():
    parts = [torch.tensor([1e4, 1.0]).half(), torch.tensor([1e4, 0.1])]
    found = averages.combine([lambda p=p: {"w": p} for p in parts], [1e6, 1 - 1e6])["w"]
    expected = parts[0].double() * 1e6 + parts[1].double() * (1 - 1e6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-7, atol=0)


def test_snapshots_are_held_one_at_a_time():
    alive = weakref.WeakSet()

    class Snapshot(dict):
        __hash__ = object.__hash__

    def read():
        assert not alive
        snapshot = Snapshot(w=torch.ones(2))
        alive.add(snapshot)
        return snapshot

    assert averages.combine([read] * 4, [0.25] * 4)["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "second, words",
    [
        ({"w": torch.ones(2).bfloat16()}, "bfloat16, neither float32 nor float16"),
        ({"v": torch.ones(2)}, "don't hold the same tensors"),
    ],
)
def test_snapshots_that_do_not_add_up_are_refused(second, words):
    with pytest.raises(ValueError, match=words):
        averages.combine([lambda: {"w": torch.ones(2)}, lambda: second], [0.5, 0.5])


def test_values_beyond_half_precision_are_refused():
    assert averages.narrowed({"w": torch.tensor([65504.0])}, "fp16")["w"].isfinite().all()
    with pytest.raises(ValueError, match="w holds values beyond fp16"):
        averages.narrowed({"w": torch.tensor([1e5])}, "fp16")


# -------------------------------------------------------------------------------- in the run folder

WIDTHS = "0.03,0.05,0.075,0.10,0.2"
STEPS = 128  # a snapshot every other step
slow = pytest.mark.slow


def options(digits, *more):
    return ["--data", digits, *SMALL, "--steps", STEPS, "--save-every", "32", *more]


@pytest.fixture(scope="module")
def averaged(digits, tmp_path_factory):
    """A run that kept averages of five widths."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    done = dimr_command("train", "--out", out, *options(digits, "--ema-profiles", WIDTHS))
    parameters = parameters_of(out)
    size = f"{parameters * 4 * 64 * 5:,} bytes"
    assert "snapshots every 2 steps, 320 in all, " in done.stderr
    assert size in done.stderr or f"{parameters * 4 * 64 * 5 / 1e9:,.2f} GB" in done.stderr
    return out


def parameters_of(run):
    """How many parameters a run's network has."""
    weights = load_tensors(runfolder.checkpoints(run)[-1] / "weights.safetensors")[0]
    return sum(tensor.numel() for tensor in weights.values())


@pytest.fixture
def profiled(averaged, tmp_path):
    """A copy of its folder with the snapshots of widths 0.05 and 0.1 alone, as a run has them."""
    out = tmp_path / "run"
    shutil.copytree(averaged, out)
    for snapshot in averaging.snapshots(out):
        if snapshot.width not in PROFILES:
            snapshot.path.unlink()
    record = read_json(out / "config.json")
    record["recipe"]["ema_profiles"] = list(PROFILES)
    write_json(out / "config.json", record)
    return out


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@slow
def test_snapshots_are_weights_files_that_say_what_they_are(averaged):
    found = averaging.snapshots(averaged)
    assert [one.step for one in found] == [step for step in range(2, 129, 2) for _ in range(5)]
    assert found[7].path.name == "step-0000004-0.075.safetensors"
    model, record = runfolder.read_weights(found[7].path)
    record.pop("content")
    trained = read_json(averaged / "config.json")["recipe"]
    assert record.pop("recipe").items() <= trained.items()
    assert record == {
        "step": 4,
        "width": 0.075,
        "dtype": "fp32",
        "classes": [str(digit) for digit in range(10)],
    }
    assert dimr.Config(**read_json(averaged / "config.json")["config"]) == model.config


@slow
def test_a_checkpoint_holds_the_averages_of_its_step(averaged):
    last = runfolder.checkpoints(averaged)[-1]
    assert "averages.safetensors" in read_json(last / "manifest.json")
    held, _ = load_tensors(last / "averages.safetensors")
    snapshot, _ = load_tensors(averaging.snapshot_at(averaged, 128, 0.1).path)
    assert len(held) == 5 * len(snapshot)
    assert all(torch.equal(held[f"0.1/{name}"], tensor) for name, tensor in snapshot.items())


def distance(one, other):
    return math.sqrt(sum(apart(tensor, other[name]) ** 2 for name, tensor in one.items()))


@slow
@pytest.mark.parametrize("width", BETWEEN)
def test_a_run_s_rebuilt_average_is_the_one_tracked_beside(averaged, profiled, width):
    direct, _ = load_tensors(averaging.snapshot_at(averaged, 128, width).path)
    raw, _ = load_tensors(runfolder.checkpoints(averaged)[-1] / "weights.safetensors")
    said = []
    made = averaging.rebuild(profiled, width, say=said.append)
    assert distance(direct, made.model.state_dict()) < 0.01 * distance(direct, raw)
    assert made.record.keys() == {"step", "classes", "recipe", "ema_width"}
    assert made.record["step"] == 128 and made.record["ema_width"] == width
    assert not said and 10 < made.how["snapshots"] <= 128


@slow
def test_a_run_killed_anywhere_leaves_the_averages_of_the_undisturbed_one(
    averaged, digits, tmp_path
):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "cli", "train", "--out", out]
    command += options(digits, "--ema-profiles", WIDTHS)
    for until in (40, 90):
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                list(map(str, command)), stderr=log, stdout=log, cwd=tempfile.gettempdir()
            )
            wait_for_snapshot(out, until, process)
            process.kill()
            process.wait()
    kept = runfolder.step_of(runfolder.checkpoints(out)[-1])
    old = {one.path: one.path.stat().st_mtime_ns for one in averaging.snapshots(out)}
    done = dimr_command("train", "--out", out, *options(digits, "--ema-profiles", WIDTHS))
    beyond = sum(int(path.name[5:12]) > kept for path in old)
    if beyond:
        assert f"{beyond} snapshots of averages beyond step {kept} deleted" in done.stderr
    for path, written in old.items():
        again = int(path.name[5:12]) > kept
        assert (path.stat().st_mtime_ns == written) != again
    assert content(averaging.folder(out)) == content(averaging.folder(averaged))
    ends = [runfolder.checkpoints(run)[-1] for run in (out, averaged)]
    assert content(ends[0]) == content(ends[1])


def wait_for_snapshot(run, step, process):
    until = time.monotonic() + 120
    while not any(one.step >= step for one in averaging.snapshots(run)):
        assert time.monotonic() < until and process.poll() is None, "it does not train"
        time.sleep(0.01)


@slow
def test_a_run_that_goes_back_a_checkpoint_drops_what_lies_beyond_and_rewrites_the_same(
    averaged, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(averaged, out)
    shutil.rmtree(runfolder.checkpoints(out)[-1])
    half = averaging.snapshot_at(out, 64, 0.1).path
    half.write_bytes(b"whatever it is, it stays")
    done = dimr_command("train", "--out", out, "--device", "cpu", "--workers", "0")
    assert "80 snapshots of averages beyond step 96 deleted" in done.stderr
    now = content(averaging.folder(out))
    assert now.pop(half.name) == b"whatever it is, it stays"
    expected = content(averaging.folder(averaged))
    expected.pop(half.name)
    assert now == expected


@slow
@pytest.mark.parametrize(
    "given, words",
    [
        (["--ema-profiles", "0.05"], "was trained with ema_profiles"),
        (["--ema-every", "3"], "was trained with ema_every 2, not 3"),
        (["--ema-profiles", "0.05,0.4"], "width 0.4 is not between 0 and 0.2887"),
        (["--ema-profiles", "0.05,0.05"], "names a width twice"),
    ],
)
def test_profiles_that_a_run_can_not_have_are_one_line(averaged, given, words):
    before = content(averaging.folder(averaged))
    done = dimr_command("train", "--out", averaged, *given, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert content(averaging.folder(averaged)) == before


@slow
def test_a_run_without_averages_can_not_begin_to_keep_them(trained, tmp_path):
    frozen = DATA / "v0.1.0"
    shutil.copytree(frozen / "run", tmp_path / "old")
    before = (tmp_path / "old" / "config.json").read_bytes()
    more = ["--ema-profiles", "0.05,0.10", "--steps", "14", "--device", "cpu"]
    done = dimr_command("train", "--out", trained, *more, check=False)
    assert done.returncode == 1 and "trained with ema_profiles [], not" in done.stderr
    more += ["--data", frozen / "pixels"]
    done = dimr_command("train", "--out", tmp_path / "old", *more, check=False)
    assert done.returncode == 1 and "holds no averages of widths [0.05, 0.1]" in done.stderr
    assert (tmp_path / "old" / "config.json").read_bytes() == before


@pytest.mark.long
@slow
def test_a_snapshot_that_can_not_be_written_is_said_and_training_goes_on(digits, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "averages").write_text("in the way")
    more = ["--ema-profiles", "0.05", "--ema-every", "4", "--steps", "10"]
    done = dimr_command("train", "--out", out, *options(digits, *more))
    for step in (4, 8, 10):
        assert f"averages at step {step} NOT saved (" in done.stderr
    assert runfolder.step_of(runfolder.newest_whole(out)) == 10
    (out / "averages").unlink()
    done = dimr_command("train", "--out", out, "--steps", "12", "--device", "cpu")
    assert [one.step for one in averaging.snapshots(out)] == [12]
    done = dimr_command("ema", out, "--width", "0.05")
    assert "2 snapshots are missing: step-0000004-0.05.safetensors, step-0000008" in done.stderr


@slow
def test_a_full_disk_costs_a_snapshot_and_not_the_run(digits, tmp_path):
    out = tmp_path / "run"
    more = ["--ema-profiles", "0.05", "--ema-every", "4", "--steps", "10", "--save-every", "5"]
    command = [sys.executable, "-m", "cli", "train", "--out", out, *options(digits, *more)]
    full = subprocess.run(
        list(map(str, command)),
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
    )
    assert "averages at step 4 NOT saved (File too large); training goes on" in full.stderr
    assert "averages at step 8 NOT saved" in full.stderr and "Traceback" not in full.stderr
    assert not os.listdir(averaging.folder(out))


@pytest.mark.long
@slow
def test_half_precision_snapshots_take_half_and_are_still_weights_files(digits, tmp_path):
    out = tmp_path / "run"
    more = ["--ema-profiles", "0.05,0.10", "--ema-precision", "fp16", "--steps", "64"]
    done = dimr_command("train", "--out", out, *options(digits, *more))
    assert "snapshots every 1 steps, 128 in all" in done.stderr and "in fp16 ->" in done.stderr
    snapshot = averaging.snapshots(out)[-1]
    tensors, about = load_tensors(snapshot.path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert json.loads(about["dtype"]) == "fp16"
    images = sampling.load(snapshot.path, device="cpu").images([3], [0], steps=5)
    assert images.std() > 0
    between = dimr_command("ema", out, "--width", "0.075")
    assert "WARNING" not in between.stderr
    narrow = dimr_command("ema", out, "--width", "0.03")
    assert "fp16 snapshots, by which their rounding grows" in narrow.stderr


def test_memory_counts_each_profile():
    config = dataclasses.replace(dimr.VARIANTS["demo"], layers=(1, 1), dims=(16, 8), heads=2)
    plain, activations = memory.training_memory(config, 2)
    profiled, same = memory.training_memory(config, 2, profiles=2)
    assert activations == same and profiled / plain == 28 / 20


def test_recipes_of_before_keep_no_averages():
    recipe = recipes.settle({"lr": 1e-3}, {}, torch.device("cpu"))
    assert recipe.ema_profiles == () and recipe.ema_every is None


# ----------------------------------------------------------------------------------------- dimr ema


@pytest.mark.long
@slow
def test_dimr_ema_writes_weights_that_are_drawn_from(profiled, tmp_path):
    result = json.loads(dimr_command("ema", profiled, "--width", "0.12", "--json").stdout)
    out = averaging.folder(profiled) / "ema-0.12-step-0000128.safetensors"
    assert result["out"] == str(out) and result["step"] == 128 and result["missing"] == []
    named = dimr_command("ema", profiled, tmp_path / "wide.safetensors", "--width", "0.12")
    assert str(tmp_path / "wide.safetensors") in named.stdout and "step 128" in named.stdout
    assert out.read_bytes() == (tmp_path / "wide.safetensors").read_bytes()
    _, record = runfolder.read_weights(out)
    assert record["ema_width"] == 0.12 and record["step"] == 128 and len(record["classes"]) == 10
    assert len(averaging.snapshots(profiled)) == 128
    common = ["--device", "cpu", "--class", "3", "-n", "2", "--steps", "5"]
    file = ["--weights", out, "--out", tmp_path / "file"]
    width = ["--weights", profiled, "--ema-width", "0.12", "--out", tmp_path / "width"]
    dimr_command("sample", *common, *file)
    drawn = json.loads(dimr_command("sample", *common, *width, "--json").stdout)
    assert drawn["ema_width"] == 0.12 and drawn["source"] == str(out)
    with Image.open(tmp_path / "file" / "class0003-seed000000.png") as one:
        from_file = np.asarray(one)
    with Image.open(tmp_path / "width" / "class0003-seed000000.png") as other:
        facts = json.loads(other.text["dimr"])
        assert np.array_equal(from_file, np.asarray(other))
    assert facts["ema_width"] == 0.12 and facts["step"] == 128


@slow
def test_an_earlier_step_s_average_is_made_of_what_was_there_then(averaged, profiled):
    made = averaging.rebuild(profiled, 0.075, 64)
    direct, _ = load_tensors(averaging.snapshot_at(averaged, 64, 0.075).path)
    narrow, _ = load_tensors(averaging.snapshot_at(averaged, 64, 0.05).path)
    assert made.record["step"] == 64
    assert distance(direct, made.model.state_dict()) < 0.05 * distance(direct, narrow)


@pytest.mark.long
@slow
@pytest.mark.parametrize("keep", [(), ("--keep",)], ids=["memory", "set"])
def test_an_average_is_measured_without_a_file(profiled, tmp_path, keep):
    found = dimr_command(
        *("eval", "fid", "--weights", profiled, "--ema-width", "0.12", "-n", "20", "--steps", "3"),
        *("--features", "plain_features:pooled", "--device", "cpu", "--json", *keep),
        cwd=tmp_path,
        env={"DIMR_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT / "tests")},
    )
    result = json.loads(found.stdout)
    assert result["ema_width"] == 0.12 and result["fid"] > 0
    assert result["reference"]["count"] == 200  # the images that its run was trained on


@slow
def test_every_width_is_drawn_into_a_place_of_its_own(profiled):
    names = []
    for width in (0.07, 0.1):
        generator = sampling.load(profiled, device="cpu", ema_width=width)
        names.append(generator.name)
    assert names == ["run-ema0.07", "run-ema0.1"]


@slow
@pytest.mark.parametrize(
    "given, words",
    [
        (["--width", "0.28"], "give one from 0.0"),
        (["--width", "0.001"], "give one from 0.0"),
        (["--width", "7"], "give one from 0.0"),
        (["--width", "0.1", "--step", "63"], "no snapshot of step 63; the nearest are of 62 or 64"),
        (["--width", "0.1", "--step", "999"], "the nearest are of 126 or 128"),
    ],
)
def test_what_the_snapshots_do_not_span_is_one_line(profiled, given, words):
    done = dimr_command("ema", profiled, *given, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@slow
def test_a_folder_without_snapshots_is_said(trained, tmp_path):
    for run, words in ((trained, "holds no snapshots of averages"), (tmp_path, "is no run folder")):
        with pytest.raises(UserError, match=words):
            averaging.rebuild(run, 0.075)
    done = dimr_command("sample", "--weights", trained, "--ema-width", "0.1", check=False)
    assert done.returncode == 1 and "dimr train keeps them with --ema-profiles" in done.stderr
    done = dimr_command("sample", "--raw", "--ema-width", "0.1", check=False)
    assert done.returncode == 2 and "--raw" in done.stderr


def flip_last_bit(path):
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)


def of_another_step(path):
    tensors, about = load_tensors(path)
    save_tensors(path, tensors, {**about, "step": "4"})


def of_another_network(path):
    tensors, about = load_tensors(path)
    config = json.dumps({**json.loads(about["config"]), "heads": 4})
    save_tensors(path, tensors, {**about, "config": config})


def not_finite(path):
    tensors, about = load_tensors(path)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    content = json.dumps(averaging.digest(tensors))
    save_tensors(path, tensors, {**about, "content": content})


DAMAGE = {
    "is not a whole snapshot": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "(it is empty)": lambda path: path.write_bytes(b""),
    "its content's SHA-256": flip_last_bit,
    "not of its name's": of_another_step,
    "of another network": of_another_network,
    "values that are not finite": not_finite,
}


@slow
@pytest.mark.parametrize("words, damage", DAMAGE.items())
def test_a_damaged_snapshot_is_named_and_done_without(averaged, profiled, words, damage):
    path = averaging.snapshot_at(profiled, 126, 0.1).path
    damage(path)
    said = []
    made = averaging.rebuild(profiled, 0.075, say=said.append)
    assert len(said) == 1 and str(path) in said[0] and "\n" not in said[0]
    assert words in said[0] or words == "(it is empty)"
    assert made.how["left_out"] == [str(path)]
    direct, _ = load_tensors(averaging.snapshot_at(averaged, 128, 0.075).path)
    raw, _ = load_tensors(runfolder.checkpoints(averaged)[-1] / "weights.safetensors")
    assert distance(direct, made.model.state_dict()) < 0.01 * distance(direct, raw)


@slow
def test_what_too_few_whole_snapshots_are_left_for_is_refused(profiled):
    for width in PROFILES:
        flip_last_bit(averaging.snapshot_at(profiled, 128, width).path)
    said = []
    with pytest.raises(UserError, match="outside what 127 snapshots .* give one from 0.036 to"):
        averaging.rebuild(profiled, 0.03, say=said.append)
    assert len(said) == 1 and "step-0000128-0.05" in said[0]


@slow
def test_missing_snapshots_are_said(profiled):
    gone = [averaging.snapshot_at(profiled, step, 0.1) for step in (20, 40, 60, 80)]
    for snapshot in gone:
        snapshot.path.unlink()
    said = []
    made = averaging.rebuild(profiled, 0.075, say=said.append)
    names = "step-0000020-0.1.safetensors, step-0000040-0.1.safetensors, step-0000060-0.1"
    assert len(said) == 1 and "4 snapshots are missing: " in said[0] and names in said[0]
    assert made.how["missing"] == [str(snapshot.path) for snapshot in gone]
