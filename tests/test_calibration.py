"""Conformal thresholds: the order statistic, the promise, and what is said when it cannot be kept."""

from __future__ import annotations

import math
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from al_models.calibration import (
    RATES,
    HeldOutPixels,
    Threshold,
    clopper_pearson,
    conformal_threshold,
    conformal_thresholds,
    expected_rate,
    false_alarms,
    images_needed,
    log10_p_map,
    missed,
    p_values,
    pixel_p_values,
    realised,
)
from al_models.errors import InvalidInput, UnknownName

slowly = settings(max_examples=150, derandomize=True)
rates = st.sampled_from([0.01, 0.05, 0.07, 0.1, 0.2, 1 / 3, 0.3, 0.5, 0.9, 0.99])
tied_scores = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 2.0]), max_size=40)


@slowly
@given(tied_scores, rates)
def test_the_threshold_is_the_kth_smallest_score(scores, rate):
    n = len(scores)
    found = conformal_threshold(np.array(scores), rate)
    k = math.ceil((n + 1) * (1 - Fraction(str(rate))))
    assert found.value == (sorted(scores)[k - 1] if k <= n else None)
    assert (found.rate, found.n, found.smallest_rate) == (rate, n, 1 / (n + 1))
    assert (found.value is None) == (found.shortfall is not None)


@pytest.mark.parametrize(("rate", "n", "k"), [(0.05, 19, 19), (0.1, 99, 90), (0.3, 9, 7), (0.15, 19, 17), (0.9, 9, 1)])
def test_rates_count_as_written_not_as_binary_fractions(rate, n, k):
    assert conformal_threshold(np.arange(1.0, n + 1), rate).value == k


def test_too_few_images_give_no_value_and_say_how_many_are_needed():
    found = conformal_threshold(np.arange(18.0), 0.05)
    assert found.value is None
    assert found.shortfall is not None
    assert "at least 19 held-out good images, there are 18" in found.shortfall
    assert conformal_threshold(np.arange(19.0), 0.05).value == 18.0
    assert conformal_threshold(np.array([]), 0.5).value is None


@slowly
@given(rates)
def test_images_needed_is_the_fewest_that_suffice(rate):
    needed = images_needed(rate)
    assert conformal_threshold(np.zeros(needed), rate).value == 0.0
    assert conformal_threshold(np.zeros(needed - 1), rate).value is None


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (39, 0.1), (25, 0.1), (10, 0.3)])
def test_coverage_is_as_promised_in_simulation(n, rate):
    rng = np.random.default_rng(20260)
    trials = 20_000
    held_out, new = rng.gamma(2.0, size=(trials, n)), rng.gamma(2.0, size=trials)
    rejected = np.mean([s > conformal_threshold(row, rate).value for row, s in zip(held_out, new, strict=True)])
    exact = math.floor((n + 1) * Fraction(str(rate))) / (n + 1)  # for scores without ties
    assert exact <= rate
    assert rejected == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / trials))


def test_ties_only_make_it_reject_less():
    rng = np.random.default_rng(1)
    held_out, new = rng.integers(0, 4, size=(5000, 19)), rng.integers(0, 4, size=5000)
    rejected = np.mean([s > conformal_threshold(row, 0.2).value for row, s in zip(held_out, new, strict=True)])
    assert rejected <= 0.2


@slowly
@given(tied_scores, tied_scores, rates)
def test_p_values_are_their_definition_and_agree_with_the_threshold(held_out, scores, rate):
    found = p_values(np.array(held_out), np.array(scores))
    expected = [(1 + sum(c >= s for c in held_out)) / (len(held_out) + 1) for s in scores]
    assert found.tolist() == expected
    threshold = conformal_threshold(np.array(held_out), rate)
    rejected = [threshold.value is not None and s > threshold.value for s in scores]
    assert (found <= rate).tolist() == rejected


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (1, 1), (3, 40), (199, 400)])
def test_the_interval_is_scipys_clopper_pearson(hits, n):
    theirs = binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert clopper_pearson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_realised_rates_and_their_intervals():
    threshold = conformal_threshold(np.arange(1.0, 20.0), 0.05)  # 19: a score of 19 passes
    scores = np.array([1.0, 19.0, 19.5, 3.0, 25.0, 19.0, 30.0])
    labels = np.array([False, False, False, False, True, True, True])
    found = realised(scores, labels, threshold)
    assert found["false_reject_rate"] == 1 / 4
    assert found["miss_rate"] == 1 / 3
    assert (found["false_reject_low"], found["false_reject_high"]) == pytest.approx((0.006309, 0.805880), abs=1e-6)
    assert (found["miss_low"], found["miss_high"]) == pytest.approx((0.008404, 0.905701), abs=1e-6)


def test_realised_leaves_out_what_has_no_meaning():
    threshold = Threshold(rate=0.5, value=0.0, n=1, smallest_rate=0.5)
    good_only = realised(np.array([-1.0, 1.0]), np.array([False, False]), threshold)
    assert set(good_only) == {"false_reject_rate", "false_reject_low", "false_reject_high"}
    bad_only = realised(np.array([1.0]), np.array([True]), threshold)
    assert set(bad_only) == {"miss_rate", "miss_low", "miss_high"}
    assert realised(np.array([]), np.array([]), threshold) == {}
    assert realised(np.array([1.0]), np.array([True]), conformal_threshold(np.array([]), 0.05)) == {}


def test_a_threshold_comes_back_from_its_fields():
    threshold = conformal_threshold(np.arange(30.0, dtype=np.float32), 0.1)
    assert Threshold(**asdict(threshold)) == threshold
    assert type(threshold.value) is float


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 5, float("nan")])
def test_a_rate_outside_0_and_1_is_refused(rate):
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        conformal_threshold(np.zeros(10), rate)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(InvalidInput, match="calibration scores"):
        conformal_threshold(np.array([0.0, np.nan]), 0.5)
    with pytest.raises(InvalidInput, match="finite"):
        p_values(np.zeros(3), np.array([np.inf]))
    with pytest.raises(InvalidInput, match="one bool a score"):
        realised(np.zeros(3), np.zeros(2, bool), conformal_threshold(np.zeros(3), 0.5))


# several rates, and what to expect of them


@slowly
@given(tied_scores, st.lists(rates, min_size=1, max_size=4))
def test_several_rates_are_each_its_own_threshold_and_in_order(scores, asked):
    found = conformal_thresholds(np.array(scores), asked)
    assert found == tuple(conformal_threshold(np.array(scores), rate) for rate in asked)
    values = [t.value for t in sorted(found, key=lambda t: -t.rate) if t.value is not None]
    assert values == sorted(values)


def test_rates_that_the_images_do_not_support_say_so_beside_those_they_do():
    low, middle, high = conformal_thresholds(np.arange(120.0))
    assert [t.rate for t in (low, middle, high)] == list(RATES)
    assert (low.value, middle.value, high.value) == (None, 119.0, 114.0)
    assert "at least 199 held-out good images, there are 120" in low.shortfall
    assert low.smallest_rate == 1 / 121


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (1, 0.99), (19, 0.05), (40, 0.1)])
def test_one_thresholds_rate_is_distributed_as_said(n, rate):
    rng = np.random.default_rng(7)
    true_rates = [
        1 - conformal_threshold(row, rate).value for row in rng.random((8000, n))
    ]  # uniform: P(s > t) = 1 - t
    found = expected_rate(n, rate, confidence=0.9)
    assert found.mean <= rate
    assert np.mean(true_rates) == pytest.approx(found.mean, abs=4 * np.std(true_rates) / np.sqrt(8000))
    assert np.mean(np.array(true_rates) < found.low) == pytest.approx(0.05, abs=0.011)
    assert np.mean(np.array(true_rates) > found.high) == pytest.approx(0.05, abs=0.011)


def test_the_expected_rate_of_a_thousand_images_is_the_published_beta():
    found = expected_rate(1000, 0.1)  # arXiv:2107.07511, section 3.2: coverage Beta(n + 1 - l, l), l = floor((n+1) a)
    coverage = beta(1001 - 100, 100)
    assert (found.low, found.high) == pytest.approx((1 - coverage.ppf(0.975), 1 - coverage.ppf(0.025)), abs=1e-9)


def test_the_rate_on_a_few_new_images_is_wider_and_covers():
    rng = np.random.default_rng(8)
    found = expected_rate(39, 0.05, n_new=60)
    held_out, new = rng.standard_normal((6000, 39)), rng.standard_normal((6000, 60))
    value = np.sort(held_out, axis=1)[:, 37]  # k = ceil(40 * 0.95) = 38
    shares = (new > value[:, None]).mean(axis=1)
    assert np.mean((shares >= found.low) & (shares <= found.high)) >= 0.95 - 0.01
    whole = expected_rate(39, 0.05)
    assert found.mean == whole.mean == 2 / 40
    assert found.high > whole.high


def test_nothing_is_expected_of_a_threshold_that_is_not_there():
    assert expected_rate(0, 0.5) is None
    assert expected_rate(18, 0.05) is None
    assert expected_rate(19, 0.05) is not None
    with pytest.raises(InvalidInput, match="n is -1"):
        expected_rate(-1, 0.5)
    with pytest.raises(InvalidInput, match="n_new is 0"):
        expected_rate(10, 0.5, n_new=0)
    with pytest.raises(InvalidInput, match="confidence"):
        expected_rate(10, 0.5, confidence=95)


def test_labelled_defects_are_reported_on_and_move_nothing():
    threshold = conformal_threshold(np.arange(1.0, 20.0), 0.05)
    before = asdict(threshold)
    found = missed(np.array([5.0, 19.0, 19.5, 40.0, 41.0]), threshold)
    assert found["miss_rate"] == 2 / 5
    assert (found["miss_low"], found["miss_high"]) == pytest.approx(clopper_pearson(2, 5))
    assert asdict(threshold) == before
    assert missed(np.array([]), threshold) == {}
    assert missed(np.array([1.0]), conformal_threshold(np.array([]), 0.05)) == {}


# maps as p-values

map_values = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 3.0])
small_maps = st.lists(st.lists(map_values, min_size=4, max_size=4), max_size=6)


def held_out_of(maps: list) -> HeldOutPixels:
    held_out = HeldOutPixels()
    for i, map in enumerate(maps):
        held_out.add(f"image {i}", np.array(map, np.float32).reshape(2, -1))
    return held_out


@slowly
@given(small_maps, st.lists(map_values, min_size=1, max_size=9))
def test_pixel_p_values_are_their_definitions(maps, values):
    held_out, n = held_out_of(maps), len(maps)
    per_pixel = [(1 + sum(np.mean(np.array(m) >= v) for m in maps)) / (n + 1) for v in values]
    per_image = [(1 + sum(max(m) >= v for m in maps)) / (n + 1) for v in values]
    given_map = np.array(values, np.float32)[None]
    found = pixel_p_values(given_map, held_out)
    assert found.shape == given_map.shape
    assert found[0] == pytest.approx(per_pixel, abs=1e-11)
    assert pixel_p_values(given_map, held_out, per="image")[0].tolist() == per_image
    np.testing.assert_allclose(log10_p_map(given_map, held_out)[0], -np.log10(per_pixel), atol=1e-6)


@slowly
@given(small_maps, st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9]))
def test_a_pixel_is_flagged_per_image_exactly_above_the_pixel_threshold(maps, rate):
    held_out = held_out_of(maps)
    threshold = conformal_threshold(np.array([max(m) for m in maps], float), rate)
    values = np.array([-3.0, -2.0, 0.0, 0.25, 1.0, 2.0, 3.0, 5.0])
    flagged = [threshold.value is not None and v > threshold.value for v in values]
    assert (pixel_p_values(values, held_out, per="image") <= rate).tolist() == flagged


@pytest.mark.parametrize("per", ["pixel", "image"])
def test_the_order_of_pixels_stays_and_evidence_is_bounded(per):
    rng = np.random.default_rng(9)
    held_out = held_out_of(list(rng.gamma(2.0, size=(12, 300))))
    map = rng.gamma(3.0, size=(40, 40)).astype(np.float32)
    found = log10_p_map(map, held_out, per=per)
    assert (found.dtype, found.shape) == (np.float32, map.shape)
    in_order = found.ravel()[np.argsort(map.ravel())]
    assert (np.diff(in_order) >= 0).all()
    assert found.min() >= 0
    assert found.max() <= np.float32(np.log10(13))
    assert log10_p_map(np.array([[60000.0]]), held_out, per=per) == np.float32(np.log10(13))
    assert (log10_p_map(map, held_out, per="pixel") >= log10_p_map(map, held_out, per="image")).all()


def images_that_differ_as_a_whole(rng: np.random.Generator, n: int) -> np.ndarray:
    """[n, 60] pixels of good images, all of one image brighter or darker together."""
    return rng.standard_normal((n, 1)) * 2 + rng.standard_normal((n, 60)) * 0.3


@pytest.mark.parametrize("n", [1, 4, 12])
def test_p_values_hold_for_dependent_pixels_where_pooled_pixels_do_not(n):
    rng, trials, new_images = np.random.default_rng(10), 160, 60
    levels = np.array([1 / (n + 1), 0.1, 0.2, 0.5])
    pixel, image, pooled = np.zeros((3, trials, len(levels)))
    for t in range(trials):
        good, new = images_that_differ_as_a_whole(rng, n), images_that_differ_as_a_whole(rng, new_images)
        held_out = held_out_of(list(good))
        p_pixel, p_image = pixel_p_values(new, held_out), pixel_p_values(new, held_out, per="image")
        naive = (1 + good.size - np.searchsorted(np.sort(good.ravel()), new)) / (1 + good.size)
        pixel[t] = [(p_pixel <= level).mean() for level in levels]
        image[t] = [(p_image <= level).any(axis=1).mean() for level in levels]
        pooled[t] = [(naive <= level).mean() for level in levels]
    for found in (pixel, image):
        assert (found.mean(axis=0) <= levels + 4 * found.std(axis=0) / np.sqrt(trials)).all()
    if n < 12:  # counting each pixel as an observation of its own breaks the promise
        assert pooled[:, 1].mean() > 0.1 + 4 * pooled[:, 1].std() / np.sqrt(trials)


def test_few_held_out_images_give_little_evidence_and_none_gives_none():
    map = np.array([[0.0, 1.0, 2.0]])
    assert log10_p_map(map, HeldOutPixels()).tolist() == [[0.0, 0.0, 0.0]]
    one = held_out_of([[0.5, 1.5]])
    assert pixel_p_values(map, one).tolist() == [[1.0, 0.75, 0.5]]
    assert pixel_p_values(map, one, per="image").tolist() == [[1.0, 1.0, 0.5]]


def test_constant_held_out_maps_only_set_apart_what_is_higher():
    held_out = held_out_of([[1.0] * 4] * 9)
    for per in ("pixel", "image"):
        assert pixel_p_values(np.array([0.9, 1.0, 1.1]), held_out, per=per).tolist() == [1.0, 1.0, 0.1]


def test_held_out_images_weigh_the_same_whatever_their_size_and_sum_exactly():
    held_out = HeldOutPixels()
    held_out.add("small", np.array([[1.0, 2.0, 3.0]]))
    held_out.add("large", np.zeros((50, 70)))
    assert int(held_out.shares.sum()) == 2 * 2**40
    assert int(held_out.maxima.sum()) == 2
    assert pixel_p_values(np.array([[2.0]]), held_out)[0, 0] == pytest.approx((1 + 2 / 3) / 3, abs=1e-11)


def test_parts_merge_to_the_same_bits_in_any_order():
    maps = np.random.default_rng(11).random((6, 40))
    whole = held_out_of(list(maps))
    parts = [HeldOutPixels() for _ in maps]
    for i, part in enumerate(parts):
        part.add(f"image {i}", maps[i])
    merged = HeldOutPixels()
    for i in (3, 0, 5, 1, 4, 2):
        merged = merged.merge(parts[i])
    assert np.array_equal(merged.shares, whole.shares)
    assert np.array_equal(merged.maxima, whole.maxima)
    assert merged.ids == whole.ids
    with pytest.raises(InvalidInput, match="in both parts"):
        merged.merge(parts[2])
    with pytest.raises(InvalidInput, match="image 1 is held out already"):
        whole.add("image 1", maps[0])


@pytest.mark.parametrize("map", [[[np.nan]], [[np.inf]], [[-1e6]], np.zeros((0, 3))])
def test_maps_that_float16_cannot_hold_are_refused(map):
    held_out = held_out_of([[1.0, 2.0]])
    with pytest.raises(InvalidInput, match="float16"):
        held_out.add("new", np.array(map))
    with pytest.raises(InvalidInput, match="float16"):
        log10_p_map(np.array(map), held_out)
    assert held_out.ids == {"image 0"}


def test_an_unknown_kind_of_p_value_names_the_known():
    with pytest.raises(UnknownName, match="pixel"):
        log10_p_map(np.zeros((2, 2)), HeldOutPixels(), per="pixels")
    with pytest.raises(UnknownName, match="image"):
        pixel_p_values(np.zeros((2, 2)), HeldOutPixels(), per="imag")


def test_false_alarms_are_the_regions_at_the_promised_nfa():
    map = np.full((8, 8), -9.0)
    map[1, 1] = map[2, 2] = 2.0  # they touch: one region
    map[5:7, 5] = 0.0
    assert [false_alarms(map, promised) for promised in (0.001, 0.01, 1, 10)] == [0, 1, 2, 2]
    with pytest.raises(InvalidInput, match="above 0"):
        false_alarms(map, 0.0)
