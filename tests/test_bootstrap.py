"""The bootstrap over images: exact in every replicate, equal whatever the order, and honest about its coverage."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from al_models.errors import InvalidInput
from al_models.metrics import PixelCounts, bootstrap, image_metrics, pixel_metrics
from al_models.metrics.bootstrap import (
    Replicates,
    compare,
    image_replicates,
    interval,
    mean_replicates,
    pixel_replicates,
    replicates,
    threshold_replicates,
)
from al_models.metrics.per_image import ImageCounts, count_image
from al_models.metrics.regions import Defect


def random_pairs(
    seed: int, n: int, shape: tuple[int, int] = (24, 28), lift: float = 0.3
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every second image has a defect, on which the map is lifted."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        mask = ndimage.gaussian_filter(rng.standard_normal(shape), 2) > 0.15 if i % 2 else np.zeros(shape, bool)
        map = ndimage.gaussian_filter(rng.standard_normal(shape), 2) + lift * mask
        pairs.append((map.astype(np.float16), mask))
    return pairs


def counted(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[ImageCounts]:
    return [count_image(f"image {i}", map, mask) for i, (map, mask) in enumerate(pairs)]


def weights_of(images: list[ImageCounts], n: int, seed: int) -> np.ndarray:
    """The weight of each image in each replicate, [n, images]."""
    draws = bootstrap._draws_of(images, n, seed)
    return draws.weights[:, draws.group]


# pixel metrics


def test_each_replicate_is_the_metric_of_weighted_pixels():
    pairs = random_pairs(seed=0, n=8)
    images = counted(pairs)
    found, weights = pixel_replicates(images, n=5, seed=3), weights_of(images, 5, 3)
    scores = np.concatenate([map.ravel() for map, _ in pairs]).astype(np.float64)
    labels = np.concatenate([mask.ravel() for _, mask in pairs])
    for r in range(5):
        each = np.repeat(weights[r], pairs[0][0].size)
        assert found["pixel_auroc"].values[r] == pytest.approx(
            roc_auc_score(labels, scores, sample_weight=each), abs=1e-9
        )
        theirs = average_precision_score(labels, scores, sample_weight=each)
        assert found["pixel_ap"].values[r] == pytest.approx(theirs, abs=1e-9)


def test_adding_up_values_without_defects_changes_no_metric():
    images = counted(random_pairs(seed=1, n=9))
    found, weights = pixel_replicates(images, n=6, seed=1), weights_of(images, 6, 1)
    dense = np.zeros((3, len(images), 65_536))
    for row, image in enumerate(images):
        dense[0, row, image.normal_keys] = image.normal_counts
        dense[1, row, image.regions.keys] = image.regions.anomalous
        dense[2, row, image.regions.keys] = image.regions.overlap
    normal, anomalous, overlap = (weights @ part[:, ::-1] for part in dense)
    regions = weights @ np.array([image.regions.n_regions for image in images])
    expected = pixel_metrics(normal, anomalous, overlap, regions)
    assert bootstrap._columns(images)[1] < sum(len(image.normal_keys) for image in images) / 2
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].values, values, rtol=0, atol=1e-12, err_msg=name)


def test_the_estimate_is_the_metric_that_is_reported():
    images = counted(random_pairs(seed=2, n=7))
    found = pixel_replicates(images, n=2)
    assert {name: each.estimate for name, each in found.items()} == pytest.approx(
        PixelCounts.of(images).metrics(), abs=1e-12
    )
    limits = (0.5, 0.02)
    assert set(pixel_replicates(images, n=2, pro_limits=limits)) == set(PixelCounts.of(images).metrics(limits))


def test_annotated_defects_have_their_saturated_overlap():
    rng = np.random.default_rng(5)
    mask = np.zeros((12, 12), bool)
    mask[2:7, 3:8] = True
    images = [count_image(f"bad {i}", rng.random((12, 12)), defects=[Defect(mask, 9.0)]) for i in range(4)]
    images += [count_image(f"good {i}", rng.random((12, 12)), shape=(12, 12), defects=[]) for i in range(3)]
    found = pixel_replicates(images, n=50, pro_limits=(0.3,))
    assert found["spro_at_0.3"].estimate == pytest.approx(
        PixelCounts.of(images).metrics((0.3,))["spro_at_0.3"], abs=1e-12
    )
    assert found["spro_at_0.3"].values.min() > found["pro"].values.min()
    assert np.ptp(found["spro_at_0.3"].values) > 0.01


def test_rates_at_a_threshold():
    images = counted(random_pairs(seed=3, n=8))
    found = threshold_replicates(images, 0.2, n=400)
    expected = PixelCounts.of(images).at_threshold(0.2)
    assert {name: each.estimate for name, each in found.items()} == pytest.approx(expected, abs=1e-12)
    each = interval(found["recall_at_threshold"])
    assert each.low < expected["recall_at_threshold"] < each.high
    good = [image for image in images if not image.n_anomalous]
    assert set(threshold_replicates(good, 0.0)) == {"fpr_at_threshold"}
    assert "precision_at_threshold" not in threshold_replicates(images, 6e4)


# image metrics


def test_image_replicates_are_weighted_metrics_ties_included():
    rng = np.random.default_rng(6)
    scores, labels = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.4
    ids = [f"{i}" for i in range(30)]
    found, draws = image_replicates(ids, scores, labels, n=6, seed=2), bootstrap._Draws.of(ids, labels, 6, 2)
    assert {name: each.estimate for name, each in found.items()} == pytest.approx(
        image_metrics(scores, labels), abs=1e-12
    )
    for r, each in enumerate(draws.weights[:, draws.group]):
        assert found["image_auroc"].values[r] == pytest.approx(
            roc_auc_score(labels, scores, sample_weight=each), abs=1e-9
        )
        ap = average_precision_score(labels, scores, sample_weight=each)
        assert found["image_ap"].values[r] == pytest.approx(ap, abs=1e-9)
        f1 = max(
            2 * each[labels & (scores >= t)].sum() / (each[scores >= t].sum() + each[labels].sum()) for t in range(6)
        )
        assert found["image_f1_max"].values[r] == pytest.approx(f1, abs=1e-9)


def test_pixel_and_image_metrics_together():
    images = counted(random_pairs(seed=4, n=6))
    scores = {image.image_id: float(i) for i, image in enumerate(images)} | {"without a mask": 2.5}
    labels = {image.image_id: image.n_anomalous > 0 for image in images} | {"without a mask": True}
    found = replicates(images, scores, labels, n=10)
    assert {"pixel_auroc", "pro", "image_auroc", "image_f1_max"} <= set(found)
    with pytest.raises(InvalidInput, match="without a mask"):
        replicates(images, scores, {k: v for k, v in labels.items() if k != "without a mask"})


def test_the_mean_of_per_image_figures():
    ids, values = [f"{i}" for i in range(40)], np.random.default_rng(7).random(40)
    found = mean_replicates(ids, values, n=4000)
    assert found.estimate == pytest.approx(values.mean())
    assert np.std(found.values) == pytest.approx(values.std(ddof=1) / np.sqrt(40), rel=0.05)
    assert mean_replicates([], np.array([])) is None


# weights


def test_weights_are_those_of_ever():
    golden = [[2.721778784, 0.041580914, 0.236640302], [1.824136190, 0.047809311, 1.128054500]]
    assert bootstrap._weights(("a", "b", "c"), 2, 0) == pytest.approx(np.array(golden), abs=1e-8)


def test_each_kind_keeps_its_share_and_the_variance_of_a_mean_is_unbiased():
    rng = np.random.default_rng(8)
    for m in (4, 12, 60):
        weights = bootstrap._weights(tuple(f"{i}" for i in range(m)), 6_000, 1)
        assert weights.min() >= 0
        np.testing.assert_allclose(weights.mean(axis=1), 1, rtol=1e-12)
        values = rng.standard_normal(m)
        means = weights @ values / m
        assert means.mean() == pytest.approx(values.mean(), abs=5 * means.std() / np.sqrt(6_000))
        assert means.var() == pytest.approx(values.var(ddof=1) / m, rel=0.1)


def test_the_order_of_the_images_changes_no_bit():
    images = counted(random_pairs(seed=9, n=10))
    turned = [images[i] for i in np.random.default_rng(0).permutation(10)]
    one, other = pixel_replicates(images, n=20), pixel_replicates(turned, n=20)
    for name in one:
        assert np.array_equal(one[name].values, other[name].values)
        assert one[name].images == other[name].images


def test_another_seed_draws_others_and_the_global_generator_is_left_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    images = counted(random_pairs(seed=9, n=6))
    one, other = pixel_replicates(images, n=20, seed=0), pixel_replicates(images, n=20, seed=1)
    assert not np.array_equal(one["pro"].values, other["pro"].values)
    assert np.random.get_state()[1].tolist() == before


def test_many_images_share_weights_by_hash_and_the_interval_keeps_its_width(monkeypatch):
    rng = np.random.default_rng(10)
    ids, labels = [f"{i}" for i in range(1500)], np.arange(1500) % 3 == 0
    scores = rng.standard_normal(1500) + 1.2 * labels
    grouped = image_replicates(ids, scores, labels, n=600)["image_auroc"]
    assert 240 < bootstrap._Draws.of(ids, labels, 2, 0).weights.shape[1] <= 256  # a group may stay empty
    monkeypatch.setattr(bootstrap, "MOST_GROUPS", 10_000)
    each = image_replicates(ids, scores, labels, n=600)["image_auroc"]
    assert grouped.estimate == pytest.approx(each.estimate, abs=1e-12)
    assert np.std(grouped.values) == pytest.approx(np.std(each.values), rel=0.2)


def test_grouped_pixel_counts_are_whole(monkeypatch):
    images = counted(random_pairs(seed=11, n=20))
    monkeypatch.setattr(bootstrap, "MOST_GROUPS", 4)
    found = pixel_replicates(images, n=3)
    assert found["pro"].estimate == pytest.approx(PixelCounts.of(images).metrics()["pro"], abs=1e-12)


# intervals


def test_the_interval_of_auroc_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(12), []
    ids, labels = [f"{i}" for i in range(45)], np.arange(45) >= 15
    truth = norm.cdf(1.2 / np.sqrt(2))  # normal scores of equal variance, 1.2 apart
    for trial in range(300):
        scores = rng.standard_normal(45) + 1.2 * labels
        found = interval(image_replicates(ids, scores, labels, n=150, seed=trial)["image_auroc"])
        covered.append(found.low <= truth <= found.high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_the_interval_is_its_definition():
    values = np.array([0.2, 0.5, 0.8, np.nan])
    found = interval(Replicates(0.5, values, "x"), confidence=0.9)
    spread = np.std([np.log(1 / 4), 0, np.log(4)], ddof=1)
    assert found.high == pytest.approx(1 / (1 + np.exp(-1.6448536 * spread)), abs=1e-7)
    assert found.low == pytest.approx(1 - found.high)
    assert (found.used, found.undefined, found.note) == (3, 1, None)
    wider = interval(Replicates(0.5, values, "x"), confidence=0.99)
    assert wider.low < found.low < found.high < wider.high


def test_perfect_scores_have_the_exact_bound_of_disjoint_pairs():
    ids, labels = [f"{i}" for i in range(12)], np.arange(12) >= 5
    found = image_replicates(ids, np.arange(12.0), labels, n=50)
    each = interval(found["image_auroc"])
    assert (each.low, each.high) == (pytest.approx(0.025 ** (1 / 5)), 1.0)
    assert "5 pairs" in each.note
    reversed_ = interval(image_replicates(ids, -np.arange(12.0), labels, n=50)["image_auroc"])
    assert (reversed_.low, reversed_.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 5)))
    other = interval(found["image_ap"])
    assert (other.low, other.high) == (None, None)
    assert "all replicates agree" in other.note


def test_equal_scores_tell_nothing():
    ids, labels = [f"{i}" for i in range(12)], np.arange(12) >= 5
    each = interval(image_replicates(ids, np.ones(12), labels, n=50)["image_auroc"])
    assert (each.low, each.high, each.used) == (None, None, 50)
    assert "all replicates agree" in each.note


def test_one_image_of_a_kind_gives_an_estimate_but_no_interval():
    images = counted(random_pairs(seed=13, n=6))
    few = [image for image in images if not image.n_anomalous] + [images[1]]
    found = pixel_replicates(few, n=10)["pixel_auroc"]
    assert found.estimate == pytest.approx(PixelCounts.of(few).metrics()["pixel_auroc"])
    each = interval(found)
    assert (each.low, each.used, each.undefined) == (None, 0, 10)
    assert "fewer than two images" in each.note


def test_two_images_of_each_kind_are_enough_for_every_replicate():
    images = counted(random_pairs(seed=14, n=4))
    for found in pixel_replicates(images, n=500).values():
        assert np.isfinite(found.values).all()
        assert interval(found).undefined == 0


def test_no_anomalous_or_no_good_image():
    images = counted(random_pairs(seed=15, n=8))
    good, bad = [i for i in images if not i.n_anomalous], [i for i in images if i.n_anomalous]
    assert pixel_replicates(good) == {}
    assert pixel_replicates([]) == {}
    assert np.isfinite(pixel_replicates(bad, n=20)["pro"].values).all()  # normal pixels there are
    assert image_replicates(["a", "b"], np.array([1.0, 2.0]), np.array([True, True])) == {}
    assert image_replicates([], np.array([]), np.array([], bool)) == {}


# comparisons


def two_methods(seed: int, n: int, gap: float = 0.0) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and two methods' scores, which agree on which images are hard."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) >= n // 3
    hard = rng.standard_normal(n)
    one, other = (1.2 * labels + hard + 0.5 * rng.standard_normal(n) for _ in range(2))
    return [f"{i}" for i in range(n)], labels, one + gap * labels, other


def test_pairs_tell_methods_apart_that_unpaired_replicates_could_not():
    ids, labels, one, other = two_methods(seed=16, n=90, gap=0.6)
    a, b = (image_replicates(ids, s, labels, n=800)["image_auroc"] for s in (one, other))
    unpaired = image_replicates(ids, other, labels, n=800, seed=1)["image_auroc"]
    found = compare(a, b)
    assert found.difference == pytest.approx(a.estimate - b.estimate)
    assert 0 < found.low < found.difference < found.high
    assert found.p_value < 0.05
    assert found.probability > 0.97
    assert np.std(a.values - b.values) < 0.8 * np.std(a.values - unpaired.values)
    turned = compare(b, a)
    assert (turned.difference, turned.low) == pytest.approx((-found.difference, -found.high))
    assert (turned.p_value, turned.probability) == pytest.approx((found.p_value, 1 - found.probability))


def test_equal_methods_seldom_look_different():
    p_values = []
    for seed in range(250):
        ids, labels, one, other = two_methods(seed, n=36)
        a, b = (image_replicates(ids, s, labels, n=100, seed=seed)["image_auroc"] for s in (one, other))
        p_values.append(compare(a, b).p_value)
    assert np.mean(np.array(p_values) < 0.05) < 0.09
    assert 0.3 < np.mean(p_values) < 0.7


def test_a_method_does_not_differ_from_itself():
    found = pixel_replicates(counted(random_pairs(seed=17, n=6)), n=30)["pro"]
    same = compare(found, replace(found, values=found.values.copy()))
    assert (same.difference, same.probability, same.p_value) == (0.0, 0.5, 1.0)
    assert (same.low, same.high) == (None, None)


def test_undefined_pairs_are_left_out_and_counted():
    a = Replicates(0.6, np.array([0.5, np.nan, 0.7, 0.6]), "x")
    b = Replicates(0.5, np.array([0.4, 0.5, np.nan, 0.55]), "x")
    found = compare(a, b)
    assert (found.used, found.undefined, found.probability) == (2, 2, 1.0)
    nothing = compare(a, replace(b, values=np.full(4, np.nan)))
    assert (nothing.low, nothing.p_value, nothing.undefined) == (None, None, 4)


def test_only_equal_images_seeds_and_numbers_are_pairs():
    images = counted(random_pairs(seed=18, n=6))
    found = pixel_replicates(images, n=5)["pro"]
    others = [pixel_replicates(images[:5], n=5), pixel_replicates(images, n=6), pixel_replicates(images, n=5, seed=1)]
    for other in others:
        with pytest.raises(InvalidInput, match="different images"):
            compare(found, other["pro"])
    loaded = pickle.loads(pickle.dumps(found))
    assert compare(found, loaded).difference == 0.0


# errors


def test_what_makes_no_sense_is_refused():
    images = counted(random_pairs(seed=19, n=4))
    with pytest.raises(InvalidInput, match="image 1 is given twice"):
        pixel_replicates([*images, images[1]])
    with pytest.raises(InvalidInput, match="at least 2"):
        pixel_replicates(images, n=1)
    with pytest.raises(InvalidInput, match="score of image b"):
        image_replicates(["a", "b"], np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(InvalidInput, match="one score and one bool"):
        image_replicates(["a", "b"], np.zeros(2), np.zeros(2))
    with pytest.raises(InvalidInput, match="one finite number"):
        mean_replicates(["a"], np.array([np.nan]))
    with pytest.raises(InvalidInput, match="confidence"):
        interval(Replicates(0.5, np.array([0.4, 0.6]), "x"), confidence=95)
    with pytest.raises(InvalidInput, match=r"lie in 0\.\.1"):
        interval(Replicates(5.0, np.array([4.0, 6.0]), "x"))
