"""Ranks over data sets: Demsar's worked example, ties, missing cells, and what is said when there is too little."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from al_models.errors import InvalidInput
from al_models.metrics.ranks import critical_difference, rank_methods

METHODS = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
DEMSAR_TABLE_6 = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.975, 0.9749],  # printed as 0.975 and 0.975, but ranked 2 and 3
        [0.957, 0.978, 0.946, 0.970],
    ]
)
"""AUC of four decision trees on 14 data sets: Demsar, JMLR 7, 2006, Table 6."""


def test_demsars_worked_example():
    found = rank_methods(DEMSAR_TABLE_6, METHODS, correct_ties=False)
    assert found.methods == ("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5")
    assert found.average_ranks == pytest.approx((1.964, 2.000, 2.893, 3.143), abs=5e-4)
    assert found.chi_square == pytest.approx(9.28, abs=0.005)
    assert found.f == pytest.approx(3.69, abs=0.005)
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)
    assert 0.01 < found.p_value < 0.05
    assert found.groups == (found.methods,)  # "the post-hoc test is not powerful enough" at 5 %
    assert (found.n_rows, found.n_left_out, found.reason) == (14, 0, None)


def test_demsars_groups_at_ten_percent():
    found = rank_methods(DEMSAR_TABLE_6, METHODS, alpha=0.1, correct_ties=False)
    assert found.critical_difference == pytest.approx(1.12, abs=0.005)
    assert found.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf"), ("C4.5+cf", "C4.5"))


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_critical_values_are_those_of_demsars_table_5(k, q):
    assert critical_difference(k, 24) * np.sqrt(6 * 24 / (k * (k + 1))) == pytest.approx(q, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_friedman_with_ties_is_scipys(seed):
    values = np.random.default_rng(seed).integers(0, 4, (9, 5)).astype(float)
    found = rank_methods(values, list("abcde"))
    assert found.chi_square == pytest.approx(friedmanchisquare(*values.T).statistic, abs=1e-9)
    uncorrected = rank_methods(values, list("abcde"), correct_ties=False)
    assert uncorrected.chi_square < found.chi_square
    assert uncorrected.p_value > found.p_value


def test_f_is_the_analysis_of_variance_of_the_ranks():
    rng = np.random.default_rng(3)
    values = rng.standard_normal((7, 4)) + np.arange(4)
    found = rank_methods(values, list("abcd"))
    ranks = np.argsort(np.argsort(-values, axis=1), axis=1) + 1.0
    between = 7 * np.sum((ranks.mean(axis=0) - 2.5) ** 2) / 3
    within = (np.sum((ranks - 2.5) ** 2) - 3 * between) / 18
    assert found.f == pytest.approx(between / within, rel=1e-12)


def test_only_complete_rows_count_and_the_others_are_told():
    holes = np.vstack([DEMSAR_TABLE_6, [[0.9, np.nan, 0.8, 0.7], [np.nan] * 4]])
    found = rank_methods(holes, METHODS)
    assert (found.n_rows, found.n_left_out) == (14, 2)
    assert found.average_ranks == rank_methods(DEMSAR_TABLE_6, METHODS).average_ranks


def test_lower_can_be_better():
    up, down = rank_methods(DEMSAR_TABLE_6, METHODS), rank_methods(-DEMSAR_TABLE_6, METHODS, higher_is_better=False)
    assert up == down


def test_the_order_of_rows_and_methods_changes_nothing():
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(14), rng.permutation(4)
    turned = rank_methods(DEMSAR_TABLE_6[rows][:, columns], [METHODS[i] for i in columns])
    assert turned.methods == rank_methods(DEMSAR_TABLE_6, METHODS).methods
    assert turned.p_value == pytest.approx(rank_methods(DEMSAR_TABLE_6, METHODS).p_value, rel=1e-9)


def test_groups_are_runs_that_no_longer_run_holds():
    steps = np.repeat(np.arange(6)[None], 40, axis=0) + np.random.default_rng(0).normal(0, 1.2, (40, 6))
    found = rank_methods(-steps, list("abcdef"))
    ranks = dict(zip(found.methods, found.average_ranks, strict=True))
    assert len(found.groups) >= 2
    for group in found.groups:
        assert ranks[group[-1]] - ranks[group[0]] < found.critical_difference
    together = {(a, b) for group in found.groups for a in group for b in group}
    for a, b in combinations(ranks, 2):
        assert ((a, b) in together) == (ranks[b] - ranks[a] < found.critical_difference)
    assert not any(set(a) < set(b) for a in found.groups for b in found.groups)


def test_methods_far_apart_form_no_group():
    found = rank_methods(np.arange(3.0) + np.random.default_rng(0).normal(0, 0.3, (60, 3)), list("abc"))
    assert (found.methods, found.groups) == (("c", "b", "a"), ())


def test_no_difference_leaves_all_in_one_group():
    found = rank_methods(np.ones((5, 3)), list("cab"))
    assert (found.methods, found.average_ranks) == (("a", "b", "c"), (2.0, 2.0, 2.0))
    assert (found.chi_square, found.f, found.p_value) == (0.0, 0.0, 1.0)
    assert found.groups == (("a", "b", "c"),)


def test_full_agreement_has_the_exact_probability_not_zero():
    found = rank_methods(np.tile([3.0, 2.0, 1.0], (2, 1)), list("abc"))
    assert (found.f, found.p_value) == (None, pytest.approx(1 / 6))  # the second row agrees by chance once in 3!
    assert rank_methods(np.tile([3.0, 2.0, 1.0], (4, 1)), list("abc")).p_value == pytest.approx(1 / 216)
    tied = rank_methods(np.tile([3.0, 2.0, 2.0], (3, 1)), list("abc"))
    assert (tied.average_ranks, tied.p_value) == ((1.0, 2.5, 2.5), pytest.approx(1 / 9))
    json.dumps(asdict(found), allow_nan=False)


def test_false_alarms_are_as_rare_as_asked():
    rng = np.random.default_rng(4)
    alarms = np.mean([rank_methods(rng.standard_normal((12, 5)), list("abcde")).p_value < 0.05 for _ in range(1500)])
    assert 0.03 < alarms < 0.07


@pytest.mark.parametrize(
    ("shape", "why"), [((5, 2), "2 methods"), ((1, 4), "1 rows"), ((5, 1), "1 methods"), ((0, 3), "0 rows")]
)
def test_too_little_is_ranked_but_not_tested(shape, why):
    values = np.random.default_rng(0).random(shape)
    found = rank_methods(values, list("abcd")[: shape[1]])
    assert why in found.reason
    assert (found.chi_square, found.p_value, found.critical_difference, found.groups) == (None,) * 4
    assert len(found.methods) == shape[1]
    assert len(found.average_ranks) == (shape[1] if shape[0] else 0)


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(InvalidInput, match="one name of its own"):
        rank_methods(np.ones((3, 3)), ["a", "b"])
    with pytest.raises(InvalidInput, match="one name of its own"):
        rank_methods(np.ones((3, 2)), ["a", "a"])
    with pytest.raises(InvalidInput, match="infinite"):
        rank_methods(np.full((3, 3), np.inf), list("abc"))
    with pytest.raises(InvalidInput, match="alpha is 5"):
        rank_methods(np.ones((3, 3)), list("abc"), alpha=5)
