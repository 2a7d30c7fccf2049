"""Conformal thresholds: the order statistic, the promise, and what is said when it cannot be kept."""

from __future__ import annotations

import math
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from al_models.calibration import (
    Threshold,
    clopper_pearson,
    conformal_threshold,
    images_needed,
    p_values,
    realised,
)
from al_models.errors import InvalidInput

slowly = settings(max_examples=150, deadline=None, derandomize=True)
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
