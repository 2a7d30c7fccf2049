"""Compare methods: the answer, the paired comparisons that bear it out, and the ranks over categories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage.records import RunRecord
from storage.store import Store
from tasks.compare import comparison, tables
from tasks.compare.across import Across, over_categories
from tasks.compare.answer import headline
from tasks.compare.comparison import Contest
from tasks.compare.tables import DECIDING
from tasks.compare.variants import Column


@dataclass(frozen=True)
class Compared:
    """What a comparison of methods by the replicates of their cells has found."""

    answer: str
    support: list[str]
    contests: dict[Column, list[Contest]]
    """By category, where at least two methods were tried."""
    across: list[Across]

    @property
    def overview(self) -> list[str]:
        """The contests in a sentence a metric."""
        return comparison.overview(self.contests)


def compare_methods(store: Store, records: Sequence[RunRecord]) -> Compared:
    """The answer, and what it rests on: paired comparisons in each category, and ranks over them."""
    ranking, kept = tables.ranking(records), comparison.read_kept(store, records)
    variants = [row.variant for row in ranking.rows]
    contests: dict[Column, list[Contest]] = {}
    for column in ranking.columns:
        tried = [one for metric in DECIDING if (one := comparison.contest(variants, column, metric, kept)) is not None]
        contests |= {column: with_others} if (with_others := [one for one in tried if one.against]) else {}
    ranks = [over_categories(variants, ranking.columns, metric) for metric in DECIDING]
    answer, support = headline(ranking, comparison.overall(ranking, kept))
    return Compared(answer, support, contests, [one for one in ranks if one is not None and len(variants) > 1])
