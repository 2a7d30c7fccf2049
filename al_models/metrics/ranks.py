"""Several methods over several data sets: average ranks, whether they differ, and which cannot be told apart.

Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7, 2006, section 3.2: Friedman's test on
the ranks within each row (a data set, or a category of one), with the F statistic of Iman and Davenport, 1980; then
Nemenyi's test, in which two methods differ when their average ranks do by the critical difference.

The rows are taken as independent. Categories of one data set are photographed alike and are less than that, so that
methods are told apart a little too readily; with many categories and few data sets, give one row (the mean) a data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special, stats

from al_models.errors import InvalidInput

FEWEST_METHODS = 3
FEWEST_ROWS = 2


@dataclass(frozen=True)
class Ranking:
    """How methods rank over the rows that all of them have a value in."""

    methods: tuple[str, ...]
    """Best first; equals by name."""
    average_ranks: tuple[float, ...]
    """In the order of `methods`: 1 is best in every row; equal values share the mean of their ranks. Empty without
    a complete row."""
    n_rows: int
    """Complete rows, from which everything here comes."""
    n_left_out: int
    """Rows left out because a method has no value in them."""
    alpha: float
    """Significance level of both tests."""
    chi_square: float | None = None
    """Friedman's statistic; None, like all below, when `reason` says why."""
    f: float | None = None
    """Iman and Davenport's statistic; None also when all rows rank alike, for it is infinite then."""
    p_value: float | None = None
    """p-value of the hypothesis that the methods do not differ at all: from `f`, or exact when all rows rank alike."""
    critical_difference: float | None = None
    """Nemenyi's critical difference: methods whose average ranks are this far apart differ."""
    groups: tuple[tuple[str, ...], ...] | None = None
    """Maximal runs of two or more methods within less than the critical difference, best first: the bars of a
    critical-difference diagram. All methods when Friedman's test finds no difference, as Nemenyi's is not entered."""
    reason: str | None = None
    """Reason why there is no test; None when there is one."""


def rank_methods(
    values: np.ndarray,
    methods: Sequence[str],
    alpha: float = 0.05,
    higher_is_better: bool = True,
    correct_ties: bool = True,
) -> Ranking:
    """The ranking of the methods over the rows, and the test whether they differ.

    `values` float [rows, methods], NaN where a method has none. Ties lower the spread of ranks; `correct_ties` divides
    Friedman's statistic by what is left of it (without, as Demsar prints it, the test is too careful; Nemenyi's test
    knows no such correction and stays too careful). Fewer than 3 methods or 2 complete rows are ranked but not
    tested, and `reason` says so. Raises InvalidInput for infinite values, for shapes or names that do not fit, and for
    alpha outside (0, 1).
    """
    values = _checked(values, methods, alpha)
    complete = values[~np.isnan(values).any(axis=1)]
    n, k = complete.shape
    known = {"n_rows": n, "n_left_out": len(values) - n, "alpha": alpha}
    if n == 0:
        return Ranking(tuple(sorted(methods)), (), **known, reason=_too_few(n, k))
    ranks = stats.rankdata(-complete if higher_is_better else complete, axis=1)  # (rows, methods)
    average = ranks.mean(axis=0)
    order = sorted(range(k), key=lambda i: (average[i], methods[i]))
    names, means = tuple(methods[i] for i in order), tuple(float(average[i]) for i in order)
    if k < FEWEST_METHODS or n < FEWEST_ROWS:
        return Ranking(names, means, **known, reason=_too_few(n, k))
    chi_square = _friedman(ranks, correct_ties)
    f, p_value = _iman_davenport(ranks, chi_square)
    apart = critical_difference(k, n, alpha)
    groups = _groups(names, means, apart) if p_value < alpha else (names,)
    return Ranking(
        names, means, **known, chi_square=chi_square, f=f, p_value=p_value, critical_difference=apart, groups=groups
    )


def critical_difference(n_methods: int, n_rows: int, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of average ranks, q sqrt(k (k + 1) / (6 n)); q: studentized range over sqrt 2."""
    return _studentized_range(n_methods, alpha) / math.sqrt(2) * math.sqrt(n_methods * (n_methods + 1) / (6 * n_rows))


@lru_cache(maxsize=64)  # takes milliseconds, and a report asks for few
def _studentized_range(n_methods: int, alpha: float) -> float:
    return float(stats.studentized_range.ppf(1 - alpha, n_methods, np.inf))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected so that one below 0.05 is wrong with probability 0.05 at most, however many there are.

    Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 6, 1979: the
    smallest is multiplied by their number, the next by one less, and so on; none falls below the one before it.
    """
    given = np.asarray(p_values, np.float64)
    order = np.argsort(given, kind="stable")
    corrected = np.empty_like(given)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(np.arange(len(given), 0, -1) * given[order]))
    return [float(value) for value in corrected]


def _friedman(ranks: np.ndarray, correct_ties: bool) -> float:
    n, k = ranks.shape
    between = n * float(np.sum((ranks.mean(axis=0) - (k + 1) / 2) ** 2))
    # Without ties the ranks of each row have variance k (k + 1) / 12, with divisor k - 1; with ties less, 0 if all tie.
    spread = float(np.mean(ranks.var(axis=1, ddof=1))) if correct_ties else k * (k + 1) / 12
    return between / spread if spread > 0 else 0.0


def _iman_davenport(ranks: np.ndarray, chi_square: float) -> tuple[float | None, float]:
    n, k = ranks.shape
    left = n * (k - 1) - chi_square
    if (ranks == ranks[0]).all() and np.ptp(ranks[0]) > 0:
        # F is infinite and its p 0, though two rows agree by chance once in k! arrangements.
        _, tied = np.unique(ranks[0], return_counts=True)
        arrangements = math.factorial(k) / math.prod(math.factorial(t) for t in tied)
        return None, float(arrangements ** (1 - n))
    f = (n - 1) * chi_square / left
    return f, float(special.fdtrc(k - 1, (k - 1) * (n - 1), f))


def _groups(names: Sequence[str], ranks: Sequence[float], apart: float) -> tuple[tuple[str, ...], ...]:
    """Methods stand best first, so a group is a run; only runs that no longer one holds."""
    runs: list[tuple[int, int]] = []
    for start in range(len(names)):
        end = max(i for i in range(start, len(names)) if ranks[i] - ranks[start] < apart)
        if end > start and (not runs or end > runs[-1][1]):
            runs.append((start, end))
    return tuple(tuple(names[start : end + 1]) for start, end in runs)


def _too_few(n: int, k: int) -> str:
    if k < FEWEST_METHODS:
        return (
            f"there are {k} methods and Friedman's test needs {FEWEST_METHODS}; compare two by their paired replicates"
        )
    return f"there are {n} rows in which every method has a value and Friedman's test needs {FEWEST_ROWS}"


def _checked(values: np.ndarray, methods: Sequence[str], alpha: float) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] != len(methods) or len(set(methods)) != len(methods):
        raise InvalidInput(
            f"values of shape {values.shape} were given for methods {list(methods)}; give [rows, methods] and one "
            "name of its own a method"
        )
    if np.isinf(values).any():
        raise InvalidInput("some values are infinite; give finite values, and NaN where a method has none")
    if not 0 < alpha < 1:
        raise InvalidInput(f"alpha is {alpha}; give a share between 0 and 1, such as 0.05")
    return values
