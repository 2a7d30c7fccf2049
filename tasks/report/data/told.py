"""What a person at a terminal is told of the data: how much is left out or doubtful, and what that does to figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from storage.store import Store
from tasks.report.data.report import Judged, read

_CHANGES_FIGURES = (
    *("label_known", "mask_known", "mask_not_empty", "mask_not_full", "mask_not_inverted", "mask_upright", "mask_size"),
    *("in_range", "usual_range"),
)
"""Rules whose findings change which images or pixels a figure is about."""
_MOST = 3
"""Reasons of a kind that are told; the page has all."""


def told(store: Store, judged: Sequence[Judged], *, all_categories: bool = False) -> list[str]:
    """Lines about each category with anything to tell, or about `all_categories`: numbers, then what matters most."""
    return [line for one in judged for line in _of(store, one, all_categories)]


def _of(store: Store, one: Judged, always: bool) -> Iterator[str]:
    stored = read(store, one)
    left_out = stored.left_out or []
    files = sum(int(entry.get("files", 1)) for entry in left_out)
    warned, aside = (stored.findings[stored.findings["severity"] == severity] for severity in ("warn", "reject"))
    if always or files or len(warned) or len(aside):
        yield (
            f"{one.category.name}: {_count(len(warned), 'warning')}{_rules(warned)}, "
            f"{_count(aside['key'].nunique(), 'image')} set aside{_rules(aside)}, {_count(files, 'file')} left out"
        )
    for entry in sorted(left_out, key=lambda entry: -int(entry.get("files", 1)))[:_MOST]:
        yield f"{one.category.name}: left out: {entry['path']}: {entry['reason']}"
    for rule, rows in stored.findings[stored.findings["rule"].isin(_CHANGES_FIGURES)].groupby("rule", sort=True):
        first = f"the first: {rows.iloc[0]['path']}: {rows.iloc[0]['reason']}"
        yield f"{one.category.name}: {rule}, {_count(len(rows), 'image')}, {first}"


def _rules(findings: pd.DataFrame) -> str:
    counts = findings["rule"].value_counts()
    return f" ({', '.join(f'{rule} {count}' for rule, count in counts.items())})" if len(counts) else ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
