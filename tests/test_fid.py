"""Inception against torch-fidelity's, distances against SciPy, torch-fidelity and plain brute
force."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import relative
from inception_weights import extractor, photographs, weights
from scipy.linalg import sqrtm
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import fid


@pytest.fixture(scope="module")
def inception():
    return fid.from_state_dict(weights())


def features(count, dim, seed=0, shift=0.1):
    """Correlated positive rows, as Inception's are, spectrum falling; another seed moves their mean
    by `shift`."""
    mixing = np.random.default_rng(99).standard_normal((dim, dim)) / dim**0.5
    rows = (
        np.random.default_rng(seed).standard_normal((count, dim)) / np.arange(1, dim + 1) @ mixing
    )
    return torch.from_numpy(np.abs(rows + shift * (seed > 0))).float()


# Inception


@pytest.mark.parametrize("height, width", [(32, 32), (64, 48), (299, 299), (512, 400)])
def test_resize_is_tensorflow_1s_to_the_bit(height, width):
    images = photographs(1, 512)[:, :height, :width]
    theirs = interpolate_bilinear_2d_like_tensorflow1x(
        images.permute(0, 3, 1, 2).float(), (299, 299), align_corners=False
    )
    assert torch.equal(fid.resize(images, 299), theirs)


@pytest.mark.parametrize("size", [32, 64, 256, 299, 512])
def test_features_are_torch_fidelitys_on_the_same_weights(inception, size):
    images = photographs(2, size)
    theirs = extractor()
    kept = []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    with torch.no_grad():
        pool, logits = theirs(images.permute(0, 3, 1, 2))
        ours = inception(images)
    hook.remove()
    spatial = kept[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert [f.shape[1] for f in ours] == [2048, 2023, 1008]
    for mine, oracle in zip(ours, (pool, spatial, logits), strict=True):
        assert relative(mine, oracle) < 1e-4
    # two pictures do not look alike to these weights
    assert relative(ours[0][0], ours[0][1]) > 1e-2


def test_average_pools_leave_out_padding_and_the_last_one_takes_the_maximum():
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(fid.POOLS["avg"]()(ones), ones)
    assert fid.MIXED["Mixed_7b"][0] == "avg"
    assert fid.MIXED["Mixed_7c"][0] == "max"


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(1, 64, 64, 3),
        torch.zeros(1, 64, 64, 1, dtype=torch.uint8),
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        torch.full((1, 64, 64, 3), 300),
    ],
)
def test_anything_but_uint8_rgb_is_refused(inception, images):
    with pytest.raises(ValueError, match=r"expected uint8 \(N, H, W, 3\)"):
        inception(images)


def test_a_weights_file_of_another_network_names_what_is_wrong(tmp_path):
    damaged = weights() | {
        "extra": torch.zeros(1),
        "fc.bias": torch.zeros(7),
        "Mixed_7c.branch1x1.bn.bias": torch.full((320,), torch.nan),
    }
    del damaged["Mixed_5b.branch1x1.conv.weight"]
    torch.save(damaged, tmp_path / "weights.pth")
    with pytest.raises(ValueError) as error:
        fid.load(tmp_path / "weights.pth")
    for name in (
        "extra",
        "fc.bias",
        "Mixed_5b.branch1x1.conv.weight",
        "Mixed_7c.branch1x1.bn.bias",
    ):
        assert name in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not weights", b"cos\nsystem\n(S'true'\ntR."])
def test_a_file_that_holds_no_weights_is_an_error_in_one_line(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match="can't be read as plain weights") as error:
        fid.load(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)


def test_weights_load_from_the_file_as_from_the_dict(inception, tmp_path):
    torch.save(weights(), tmp_path / "weights.pth")
    loaded = fid.load(tmp_path / "weights.pth")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), inception.parameters(), strict=True)
    )


# Statistics and FID


def accumulated(rows, sizes):
    statistics = fid.Statistics(rows.shape[1])
    for part in rows.split(sizes):
        statistics.add(part)
    return statistics


def test_statistics_are_numpys_for_any_batching():
    # a mean far from zero, where sums of squares would cancel
    rows = features(3000, 40, seed=1) + 100
    mean = rows.double().mean(0)
    covariance = torch.from_numpy(np.cov(rows.double().numpy(), rowvar=False))
    for sizes in (3000, 1, 7, 1024, [1500, 1, 1499]):
        statistics = accumulated(rows, sizes)
        assert statistics.count == 3000
        assert relative(statistics.mean, mean) < 1e-12
        assert relative(statistics.covariance, covariance) < 1e-10


@pytest.mark.parametrize("count", [2, 1023, 1024, 1025, 2049])
def test_the_last_row_counts_however_many_fill_a_block(count):
    rows = features(count, 3, seed=1).double()
    rows[-1] += 100
    covariance = torch.from_numpy(np.cov(rows.numpy(), rowvar=False))
    assert relative(accumulated(rows, 1).covariance, covariance) < 1e-10
    assert relative(accumulated(rows, 1).mean, rows.mean(0)) < 1e-12


def test_rows_that_are_changed_later_count_as_they_were():
    rows = torch.ones(3, 2)
    statistics = fid.Statistics(2)
    statistics.add(rows)
    rows.fill_(7)
    assert statistics.mean.tolist() == [1, 1]


def test_merged_statistics_are_those_of_all_rows():
    rows = features(2600, 40)
    whole = accumulated(rows, 100)
    merged, *parts = [accumulated(part, 64) for part in rows.split([1500, 0, 1, 1099])]
    for part in parts:
        merged.merge(part)
    assert merged.count == 2600
    assert relative(merged.mean, whole.mean) < 1e-12
    assert relative(merged.covariance, whole.covariance) < 1e-12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_an_error(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        fid.Statistics(3).add(torch.tensor([[1.0, bad, 2.0]]))


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        _ = accumulated(torch.rand(1, 3), 1).covariance
    two = accumulated(torch.tensor([[1.0], [4.0]]), 1)
    assert two.covariance.tolist() == [[4.5]]


@pytest.mark.parametrize(
    "n1, n2, seed", [(900, 800, 1), (100, 150, 1), (150, 900, 1), (400, 400, 0), (100, 100, 0)]
)
def test_frechet_distance_is_that_of_scipys_square_root(n1, n2, seed):
    """Full rank, both deficient, one deficient, and identical sets of either kind, at 256
    dimensions."""
    first = accumulated(features(n1, 256, 0), 64)
    second = accumulated(features(n2, 256, seed), 64)
    s1 = first.covariance.numpy()
    s2 = second.covariance.numpy()
    # SciPy's root of a singular product is unstable, so it gets a ridge too small to count
    ridge = 1e-12 * np.eye(256)
    root = sqrtm((s1 + ridge) @ (s2 + ridge)).real
    between = ((first.mean - second.mean) ** 2).sum().item()
    expected = between + np.trace(s1 + s2 - 2 * root)
    found = fid.frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert found == pytest.approx(expected, abs=1e-5 * np.trace(s1))
    assert seed or found < 1e-9


def test_frechet_distance_of_fewer_images_than_features_is_exact():
    """At Inception's 2,048 dimensions: the trace of the root is the nuclear norm of the sets' cross
    products."""
    x = features(120, 2048, 0)
    y = features(90, 2048, 1)
    step = x.double().mean(0) - y.double().mean(0)
    x_centred = (x.double() - x.double().mean(0)) / 119**0.5
    y_centred = (y.double() - y.double().mean(0)) / 89**0.5
    root = torch.linalg.svdvals(x_centred @ y_centred.T).sum()
    expected = step @ step + (x_centred**2).sum() + (y_centred**2).sum() - 2 * root
    first = accumulated(x, 50)
    second = accumulated(y, 50)
    found = fid.frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_gaussians_in_one_dimension():
    assert fid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(4 + 4 + 9 - 2 * 6)


def test_a_set_of_one_repeated_image_has_a_distance():
    found = fid.frechet_distance(np.zeros(3), np.zeros((3, 3)), np.ones(3), np.eye(3))
    assert found == pytest.approx(6)


@pytest.mark.parametrize(
    "mean, covariance, message",
    [
        (np.zeros(4), np.eye(4), "use one extractor"),
        (np.zeros(3), np.eye(4), "expected"),
        (np.zeros(3), np.full((3, 3), np.nan), "NaN"),
    ],
)
def test_statistics_that_do_not_fit_are_an_error(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        fid.frechet_distance(np.zeros(3), np.eye(3), mean, covariance)


# Inception Score


def scored(logits, sizes, split=5000):
    score = fid.InceptionScore(split)
    first = 0
    for part in logits.split(sizes):
        score.add(part, range(first, first + len(part)))
        first += len(part)
    return score


def test_inception_score_is_torch_fidelitys():
    logits = torch.randn(600, 30, generator=torch.Generator().manual_seed(0)) * 3
    expected = isc_features_to_metric(logits, splits=6, shuffle=False)["inception_score_mean"]
    for sizes in (600, 64, [150, 450]):
        assert scored(logits, sizes, split=100).value == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_processes_is_that_of_one():
    logits = torch.randn(250, 30, generator=torch.Generator().manual_seed(1)) * 3
    even = fid.InceptionScore(100)
    odd = fid.InceptionScore(100)
    even.add(logits[::2], range(0, 250, 2))
    odd.add(logits[1::2], range(1, 250, 2))
    even.merge(odd)
    assert even.value == pytest.approx(scored(logits, 250, 100).value, rel=1e-12)


@pytest.mark.parametrize("number, expected", [(4999, 2), (5000, 1)])
def test_a_split_of_the_inception_score_is_of_5000_images(number, expected):
    """Two images, each certain and of another class, score 2 in one split, and 1 apart."""
    certain = torch.tensor([[50.0, -50.0], [-50.0, 50.0]])
    score = fid.InceptionScore()
    score.add(certain, [0, number])
    assert score.value == pytest.approx(expected)


def test_the_inception_score_of_two_unequal_splits_is_their_plain_mean():
    certain = torch.full((5, 3), -50.0)
    certain[range(5), [0, 1, 2, 0, 1]] = 50
    assert scored(certain, 5, split=3).value == pytest.approx((3 + 2) / 2)


def test_a_split_sorted_by_class_cannot_pass_its_number_of_classes():
    certain = torch.full((100, 20), -50.0)
    certain[range(100), torch.arange(100) // 5] = 50
    assert scored(certain, 100, split=25).value == pytest.approx(5)
    assert scored(certain, 100, split=100).value == pytest.approx(20)


# KID, precision, recall, density, coverage


def test_kid_is_torch_fidelitys_on_the_same_subsets():
    first = features(300, 64, 0)
    second = features(260, 64, 1)
    theirs = kid_features_to_metric(
        first, second, kid_subsets=20, kid_subset_size=200, rng_seed=7, verbose=False
    )
    mean, deviation = fid.kernel_distance(first, second, subsets=20, size=200, seed=7)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)


def test_kid_is_by_default_that_of_torch_fidelitys_defaults():
    """100 subsets of 1,000."""
    first = features(1010, 8, 0)
    second = features(1003, 8, 1)
    theirs = kid_features_to_metric(
        first, second, kid_subsets=100, kid_subset_size=1000, rng_seed=2020, verbose=False
    )
    mean, deviation = fid.kernel_distance(first, second)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-2)


def plain_kid(x, y):
    """The unbiased estimate, term by term."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    pairs = len(x) * (len(x) - 1)
    among_x = (kernel(x, x).sum() - kernel(x, x).trace()) / pairs
    among_y = (kernel(y, y).sum() - kernel(y, y).trace()) / pairs
    return (among_x + among_y - 2 * kernel(x, y).mean()).item()


def test_kid_of_sets_smaller_than_a_subset_is_the_plain_estimate():
    x = features(40, 16, 0)
    y = features(30, 16, 1)
    x30 = x[np.random.RandomState(2020).choice(40, 30, replace=False)]
    found, _ = fid.kernel_distance(x, y, subsets=1)
    assert found == pytest.approx(plain_kid(x30.double(), y.double()), rel=1e-4)


def test_kid_takes_two_images_on_either_side():
    x = torch.tensor([[1.0], [2.0]])
    y = torch.tensor([[0.0], [3.0]])
    # by hand: kernel(1, 2) = 27, kernel(0, 3) = 1, and between 1, 64, 1, 343
    expected = 27 + 1 - 2 * (1 + 64 + 1 + 343) / 4
    assert fid.kernel_distance(x, y) == pytest.approx((expected, 0))
    for one in ((x[:1], y), (x, y[:1])):
        with pytest.raises(ValueError, match="at least 2 images on either side"):
            fid.kernel_distance(*one)


def brute_force(real, fake, k=3, k_density=5):
    real = real.double().numpy()
    fake = fake.double().numpy()

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(2))

    def radius(a, n):
        return np.sort(distances(a, a), 1)[:, n]  # the zeroth is the point itself

    between = distances(real, fake)
    within_real = between <= radius(real, k)[:, None]
    within_fake = between <= radius(fake, k)
    wide = between <= radius(real, k_density)[:, None]
    return {
        "precision": within_real.any(0).mean(),
        "recall": within_fake.any(1).mean(),
        "density": wide.sum() / (k_density * len(fake)),
        "coverage": wide.any(1).mean(),
    }


@pytest.mark.parametrize("chunk", [2048, 100, 37])
def test_precision_recall_density_coverage_are_brute_forces(chunk):
    real = features(230, 48, 0)
    fake = features(310, 48, 1, 0.05)
    found = fid.manifold_metrics(real, fake, chunk=chunk)
    assert found == pytest.approx(brute_force(real, fake), abs=1e-9)
    assert 0.05 < found["precision"] < 0.95  # nothing saturates
    assert 0.05 < found["recall"] < 0.95


@pytest.mark.parametrize("k, k_density", [(5, 3), (2, 2)])
def test_other_numbers_of_neighbours_are_brute_forces_too(k, k_density):
    real = features(60, 8, 0)
    fake = features(50, 8, 1, 0.05)
    found = fid.manifold_metrics(real, fake, k=k, k_density=k_density)
    assert found == pytest.approx(brute_force(real, fake, k, k_density), abs=1e-9)


def test_a_point_on_a_balls_edge_is_within():
    """On a line: the third neighbours of 0 … 5 are 3, 2, 2, 2, 2, 3 away, the fifth 5, 4, 3, 3, 4,
    5."""
    real = torch.arange(6.0)[:, None]
    fake = torch.tensor([8.0, 8, 8, 8, 10, 11])[:, None]
    found = fid.manifold_metrics(real, fake)
    # the ball of 5 reaches from 2 to 8 (precision), the widest from 0 to 10 (density)
    assert found["precision"] == 4 / 6
    assert found["density"] == 5 / (5 * 6) + 4 / (5 * 6)
    # real 5 lies 3 from the four at 8, whose balls have no width, and 5 from 10, whose has 2
    assert found["recall"] == 0
    assert found["coverage"] == 2 / 6
    # with the parts exchanged, the same ball decides on recall
    assert fid.manifold_metrics(fake, real)["recall"] == 4 / 6


def test_precision_and_recall_are_torch_fidelitys():
    real = features(500, 32, 0)
    fake = features(400, 32, 1, 0.05)
    theirs = prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True, verbose=False
    )
    found = fid.manifold_metrics(real, fake, chunk=128)
    assert found["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


def test_a_set_against_itself_is_precise_and_covered():
    rows = features(100, 32)
    found = fid.manifold_metrics(rows, rows)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["density"] > 1


def test_half_distances_are_numpys_float16_and_float32_where_one_is_not_finite():
    """Rounded after each step, as the TensorFlow suite's on a GPU."""
    x = features(30, 48, 0) * 4
    y = features(20, 48, 1) * 4
    half = [rows.numpy().astype(np.float16) for rows in (x, y)]
    squares = [(rows.astype(np.float32) ** 2).sum(1).astype(np.float16) for rows in half]
    product = (half[0].astype(np.float32) @ half[1].astype(np.float32).T).astype(np.float16)
    expected = np.maximum(squares[0][:, None] - np.float16(2) * product + squares[1], 0)
    found = fid._half_distances(x, y)
    assert np.abs(found.numpy() - expected.astype(np.float32)).max() <= np.spacing(expected.max())
    assert not torch.equal(found, fid._squared_distances(x, y))
    assert torch.equal(fid._half_distances(50 * x, y), fid._squared_distances(50 * x, y))
    assert fid.manifold_metrics(x, y, half=True) == pytest.approx(
        fid.manifold_metrics(x, y), abs=0.1
    )


def test_too_few_images_for_neighbours_are_an_error():
    with pytest.raises(ValueError, match="more than 5 images on either side, not 5 and 9"):
        fid.manifold_metrics(torch.rand(5, 4), torch.rand(9, 4))
    with pytest.raises(ValueError, match="not 9 and 5"):
        fid.manifold_metrics(torch.rand(9, 4), torch.rand(5, 4))
    assert fid.manifold_metrics(torch.rand(6, 4), torch.rand(6, 4))


@pytest.mark.slow
def test_precision_and_recall_never_hold_all_distances():
    """12,000 samples have 576 megabytes of distances among themselves."""
    code = """if True:
        import resource, sys, torch, fid
        torch.set_num_threads(2)
        real, fake = torch.rand(2000, 8), torch.rand(12000, 8)
        fid.manifold_metrics(real[:100], fake[:100])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fid.manifold_metrics(real, fake)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 200_000  # kilobytes
