"""Standard errors: what leaving out a block gives is what the others give by themselves, and the
intervals hold the truth as often as they say."""

import gzip
import subprocess
import sys

import intervals
import numpy as np
import pytest
import torch
from conftest import relative
from pytorch_fid.fid_score import calculate_frechet_distance
from scipy.stats import sem
from test_fid import brute_force, features

import errors
import fid


def drawn(count, seed, dim=16):
    """Rows whose numbers differ in scale."""
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return torch.from_numpy(rows / np.arange(1, dim + 1) ** 0.5 + 0.1)


def reference(dim):
    return np.zeros(dim), np.diag(1.3 / np.arange(1, dim + 1) ** 1.2)


def fid_of(rows, owners):
    """FID as dimr eval has it, by these blocks: its Estimate."""
    to = fid.Frechet(*reference(rows.shape[1]))
    statistics = fid.Statistics(rows.shape[1])
    statistics.add(rows)
    without = [to.distance(*left) for left in errors.moments_without(rows, owners)]
    return errors.jackknife(to.distance(statistics.mean, statistics.covariance), without)


# Blocks


def test_a_block_holds_as_many_of_each_class_of_a_balanced_set_as_it_can():
    labels = np.repeat(np.arange(7), 40)
    owners = errors.blocks(280, labels)
    counts = np.zeros((20, 7), int)
    np.add.at(counts, (owners, labels), 1)
    assert (counts == 2).all()
    assert (errors.blocks(280, labels) == owners).all()
    assert (errors.blocks(280, labels, seed=1) != owners).any()


def test_classes_may_have_any_numbers():
    labels = np.array([-1, 2**60] * 20)
    owners = errors.blocks(40, labels)
    assert (np.bincount(owners[labels < 0]) == 1).all()


def test_blocks_of_few_images_a_class_and_of_random_labels_are_of_one_size():
    draw = np.random.default_rng(0)
    for labels in (np.arange(1003) % 301, draw.integers(0, 7, 1003), None):
        sizes = np.bincount(errors.blocks(1003, labels), minlength=20)
        assert sizes.max() - sizes.min() <= 1


def test_fewer_images_than_blocks_are_an_error():
    with pytest.raises(ValueError, match="19 images are fewer than the 20 blocks"):
        errors.blocks(19)
    assert sorted(errors.blocks(20)) == list(range(20))


@pytest.mark.parametrize("period", ["sorted by class", "classes in turn"])
def test_the_order_of_a_set_means_nothing_for_its_error(period):
    """With every twentieth image, or stretches of a set sorted by class, it would."""
    count, classes = 2000, 20
    labels = np.repeat(np.arange(classes), count // classes)
    if period == "classes in turn":
        labels = np.arange(count) % classes
    rows = (
        drawn(count, 0)
        + 3 * torch.from_numpy(np.random.default_rng(1).normal(size=(20, 16)))[labels]
    )
    balanced = fid_of(rows, errors.blocks(count, labels)).error
    shuffled = fid_of(rows, errors.blocks(count)).error
    naive = np.arange(count) % 20 if period == "classes in turn" else labels
    assert balanced < shuffled < fid_of(rows, naive).error / 5
    mixed = np.random.default_rng(2).permutation(count)
    assert fid_of(rows[mixed], errors.blocks(count, labels[mixed])).error == pytest.approx(
        balanced, rel=0.5
    )


# What is left out


def test_moments_without_a_block_are_those_of_the_other_images():
    rows = features(203, 40, seed=1) + 100
    owners = errors.blocks(203)
    found = list(errors.moments_without(rows, owners))
    assert len(found) == 20
    for k, (mean, covariance) in enumerate(found):
        rest = rows[owners != k].double().numpy()
        assert relative(mean, torch.from_numpy(rest.mean(0))) < 1e-12
        assert relative(covariance, torch.from_numpy(np.cov(rest, rowvar=False))) < 1e-9


@pytest.mark.slow
def test_moments_without_blocks_never_hold_those_of_all_blocks():
    """Twenty covariances of 1,024 features are 168 megabytes."""
    code = """if True:
        import resource, torch, errors
        rows = torch.rand(2000, 1024)
        next(errors.moments_without(rows[:40], errors.blocks(40)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for mean, covariance in errors.moments_without(rows, errors.blocks(2000)):
            pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 60_000  # kilobytes


@pytest.mark.parametrize("chunk", [2048, 9])
def test_precision_and_the_rest_without_a_block_are_those_of_the_other_images(chunk):
    real = features(60, 8, 0)
    fake = features(90, 8, 1, 0.05)
    owners = errors.blocks(90)
    found = fid.manifold(real, fake, owners=owners, chunk=chunk)
    assert found.values() == pytest.approx(brute_force(real, fake), abs=1e-9)
    for k in range(20):
        expected = brute_force(real, fake[owners != k])
        without = {name: values[k] for name, values in found.without().items()}
        assert without == pytest.approx(expected, abs=1e-9)
    assert len(set(found.without()["recall"])) > 2  # it moves


def test_kids_blocks_are_its_unbiased_estimate_each():
    x = features(60, 8, 1)
    y = features(40, 8, 0)
    owners = errors.blocks(60)

    def kernel(a, b):
        return (a.double() @ b.double().T / 8 + 1) ** 3

    found = fid.kernel_estimates(x, y, owners, chunk=7)
    for k, estimate in enumerate(found):
        own = x[owners == k]
        n = len(own)
        same = (kernel(own, own).sum() - kernel(own, own).trace()) / (n * (n - 1))
        other = (kernel(y, y).sum() - kernel(y, y).trace()) / (40 * 39)
        expected = float(same + other - 2 * kernel(own, y).mean())
        assert estimate == pytest.approx(expected, abs=1e-5)


# Errors


def test_the_error_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(0).normal(size=20)
    found = errors.jackknife(values.mean(), [np.delete(values, k).mean() for k in range(20)])
    assert found.error == pytest.approx(sem(values))
    assert errors.freed(found).value == pytest.approx(values.mean())  # a mean has no bias
    low, high = found.interval
    assert (high - low) / 2 == pytest.approx(2.093 * sem(values), rel=1e-3)


def test_the_bias_of_a_variance_goes_whole():
    values = np.random.default_rng(0).normal(size=20)
    found = errors.jackknife(values.var(), [np.delete(values, k).var() for k in range(20)])
    assert errors.freed(found).value == pytest.approx(values.var(ddof=1))


@pytest.mark.parametrize("heavy", [False, True])
def test_intervals_hold_the_truth_as_often_as_they_say_and_errors_are_the_spread(heavy):
    """80 sets of 400; tools/intervals.py does the same at length, on real images too."""
    found = intervals.study(*intervals.synthetic(400, heavy, dim=16), draws=80)
    assert 0.9 <= found["coverage"] <= 0.99
    assert found["stated"] == pytest.approx(found["spread"], rel=0.25)
    biased = found["fid"] - found["truth"]
    assert biased > 0 and abs(found["fid_infinity"] - found["truth"]) < biased / 4


def test_intervals_of_real_images_are_measured_on_the_files_debian_installs(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 100)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        classes = bytes(i % 10 for i in range(count))
        files = {"images-idx3": bytes(16) + images.tobytes(), "labels-idx1": bytes(8) + classes}
        for name, content in files.items():
            (tmp_path / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    pool, labels, to, truth = intervals.fashion(tmp_path)
    assert pool.shape == (300, intervals.DIM) and (labels == np.arange(300) % 10).all()
    mean, covariance = pool.double().mean(0).numpy(), np.cov(pool.double().numpy().T)
    theirs = calculate_frechet_distance(mean, covariance, to.mean, to.covariance)
    assert truth == pytest.approx(theirs, rel=1e-3)


def test_an_error_that_ignores_the_classes_of_balanced_sets_would_be_too_large():
    """Sets of a pool with as many of each class vary less, and blocks within classes know it."""
    labels = np.repeat(np.arange(10), 300)
    shifts = np.random.default_rng(0).normal(size=(10, 16))
    pool = drawn(3000, 0) + torch.from_numpy(shifts[labels])
    to = fid.Frechet(*reference(16))
    statistics = fid.Statistics(16)
    statistics.add(pool)
    truth = to.distance(statistics.mean, statistics.covariance)
    draw = intervals.from_pool(pool, labels, 400, balanced=True)
    known = intervals.study(draw, to, truth, draws=40)
    unknown = intervals.study(lambda k: (draw(k)[0], None), to, truth, draws=40)
    assert known["stated"] == pytest.approx(known["spread_infinity"], rel=0.4)
    assert unknown["stated"] > 1.4 * known["stated"]


def test_without_parts_or_with_one_there_is_no_error():
    assert errors.Estimate(3.0).error is None
    assert errors.Estimate(3.0, [3.0]).interval is None
    assert errors.difference(errors.Estimate(3.0), errors.Estimate(4.0), True).is_noise is None


# Differences


def test_what_two_sets_share_drops_out_of_their_difference_if_they_are_paired():
    draw = np.random.default_rng(0)
    shared = draw.normal(size=20)
    first = errors.Estimate(0.0, shared + 0.01 * draw.normal(size=20))
    second = errors.Estimate(0.1, shared + 0.1 + 0.01 * draw.normal(size=20))
    paired = errors.difference(first, second, paired=True)
    apart = errors.difference(first, second, paired=False)
    assert paired.value == apart.value == 0.1
    assert apart.error == pytest.approx(np.hypot(first.error, second.error))
    assert paired.error < apart.error / 20
    assert apart.is_noise and not paired.is_noise


@pytest.mark.parametrize("shift, told", [(0.0, 0.05), (0.5, 1.0)])
def test_a_difference_of_nothing_is_noise_and_a_large_one_is_not(shift, told):
    """Of 200 pairs: about 5% of equal ones are called different."""
    draw = np.random.default_rng(0)
    calls = []
    for _ in range(200):
        one = draw.normal(size=20)
        other = draw.normal(size=20) + 4 * shift
        both = [errors.Estimate(parts.mean(), parts) for parts in (one, other)]
        calls.append(not errors.difference(*both, paired=False).is_noise)
    assert np.mean(calls) == pytest.approx(told, abs=0.04)
