"""What validation said of the images of a category, and how many there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import StorageError
from storage.records import RunRecord
from storage.store import Store
from tasks.compare.variants import Column, column_name, column_of
from tasks.validate import findings

_COUNTS = ("train", "calibration", "test_good", "test_anomalous", "test_unknown", "set_aside", "without_mask")


@dataclass(frozen=True)
class Verdict:
    """What validation said of a category."""

    stop: list[str]
    """Why nothing can be learned in it."""
    findings: dict[str, list[Mapping[str, str]]]
    """Severity (`reject`, `warn`, `stop`) -> findings."""
    expectations: list[dict[str, Any]]


@dataclass(frozen=True)
class CategoryView:
    """A category's images: how many, and what was set aside."""

    name: str
    counts: dict[str, int]
    verdict: Verdict | None
    """None: no verdict was stored."""
    data_differs: bool
    """Whether its cells were run on different images, which makes their figures not comparable."""


def category_view(
    store: Store, records: Sequence[RunRecord], column: Column, columns: Sequence[Column]
) -> CategoryView:
    """What the records of a category and the store know of its images."""
    own = [record for record in records if column_of(record) == column]
    keys = dict.fromkeys(record.keys["verdict"] for record in own if "verdict" in record.keys)
    verdicts = [verdict for key in keys if (verdict := _read_verdict(store, key)) is not None]
    data = {record.fingerprints["data"] for record in own if record.status == "done" and "data" in record.fingerprints}
    return CategoryView(
        name=column_name(column, columns),
        counts=_in_order(next((record.counts for record in own if record.counts), {})),
        verdict=merge_verdicts(verdicts) if verdicts else None,
        data_differs=len(data) > 1,
    )


def _read_verdict(store: Store, key: str) -> tuple[dict[str, Any], list[dict[str, str]]] | None:
    """Manifest and findings, or None when either is gone."""
    try:
        return store.get(key).meta, findings(store, key).to_dict("records")
    except (StorageError, OSError, KeyError, ValueError):  # Arrow's own errors are ValueErrors
        return None


def _in_order(counts: dict[str, int]) -> dict[str, int]:
    known = [name for name in _COUNTS if name in counts]
    return {name: counts[name] for name in known + sorted(counts.keys() - set(_COUNTS))}


def merge_verdicts(verdicts: Iterable[tuple[Mapping[str, Any], Iterable[Mapping[str, str]]]]) -> Verdict:
    """Several verdicts on one category (one an image size), each its manifest and its findings, without repeats."""
    stop: dict[str, None] = {}
    findings: dict[str, dict[tuple[str, str], Mapping[str, str]]] = {}
    expectations: list[dict[str, Any]] = []
    for manifest, own in verdicts:
        if manifest.get("stop"):
            stop[manifest["stop"]] = None
        for finding in own:
            findings.setdefault(finding["severity"], {})[finding["key"], finding["reason"]] = finding
        expectations += [asked for asked in manifest.get("expectations") or [] if asked not in expectations]
    return Verdict(list(stop), {severity: list(own.values()) for severity, own in findings.items()}, expectations)


def by_reason(items: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Reason -> paths, the most frequent reason first."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item["reason"], []).append(item["path"] or "the category as a whole")
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))
