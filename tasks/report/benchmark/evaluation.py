"""What evaluation left of a cell: lines of images, points of the curves, histograms, thresholds."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from storage.errors import StorageError
from storage.records import RunRecord
from storage.store import Artifact, Store

_CURVE_POINTS = 160
_BINS = 24
_INSPECTED = 50
CURVES = {"image_roc": "image ROC", "pixel_roc": "pixel ROC", "pixel_pr": "pixel precision-recall", "pro": "PRO"}


@dataclass(frozen=True)
class Histogram:
    """Image scores: edges of the bins, and the count in each for every label that occurs."""

    edges: list[float]
    counts: dict[str, list[int]]
    highest: int
    threshold: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` left of a cell, as far as it is there."""

    rows: list[dict[str, Any]]
    curves: dict[str, list[tuple[float, float]]]
    histogram: Histogram | None
    groups: dict[str, dict[str, dict[str, float]]]
    """`defect_type` and `size` -> group -> metrics."""


def artifact(store: Store, record: RunRecord, step: str) -> Artifact | None:
    """The output of a step of a cell, or None when the cell did not come so far or the output is gone."""
    key = record.keys.get(step)
    return None if key is None else store.find(key)


def read_evaluation(store: Store, record: RunRecord) -> Evaluation:
    """The lines, curves and histogram of a cell; what is absent is empty."""
    output = artifact(store, record, "evaluation")
    if output is None:
        return Evaluation([], {}, None, {})
    rows = _rows(store, output)
    histogram = _histogram(rows, image_threshold(record))
    return Evaluation(rows, _curves(store, output), histogram, _read_json(store, output, "groups.json"))


def image_threshold(record: RunRecord) -> float | None:
    """The calibrated score above which an image is rejected."""
    return (record.calibration.get("image") or {}).get("value")


def pixel_threshold(record: RunRecord) -> float | None:
    """The calibrated map value above which a pixel is flagged."""
    return (record.calibration.get("pixel") or {}).get("value")


def inspected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images of unknown label, the most anomalous first; at most 50."""
    unknown = [row for row in rows if row["label"] == "unknown" and row["score"] is not None]
    return sorted(unknown, key=lambda row: -row["score"])[:_INSPECTED]


def _rows(store: Store, output: Artifact) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(f"{output.folder}/images.parquet")))
    except StorageError:
        return []
    return [{name: _none_if_nan(value) for name, value in row.items()} for row in table.to_pylist()]


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _curves(store: Store, output: Artifact) -> dict[str, list[tuple[float, float]]]:
    given = _read_json(store, output, "curves.json")
    return {name: _thinned(given[name]["x"], given[name]["y"]) for name in CURVES if given.get(name, {}).get("x")}


def _read_json(store: Store, output: Artifact, name: str) -> dict[str, Any]:
    """The value under a key; empty when it is not there."""
    try:
        read: dict[str, Any] = json.loads(store.read_bytes(f"{output.folder}/{name}"))
    except StorageError:
        return {}
    return read


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """A few points of a line, evenly along its length, so that steep and flat parts are drawn equally well."""
    points = np.stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)], axis=1)  # (n, 2)
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    wanted = np.searchsorted(length, np.linspace(0.0, length[-1], _CURVE_POINTS))
    kept = np.unique(np.concatenate([[0], np.minimum(wanted, len(points) - 1), [len(points) - 1]]))
    return [(round(a, 4), round(b, 4)) for a, b in points[kept].tolist()]


def _histogram(rows: Sequence[dict[str, Any]], threshold: float | None) -> Histogram | None:
    scores = {
        label: [row["score"] for row in rows if row["label"] == label and row["score"] is not None]
        for label in ("good", "anomalous", "unknown")
    }
    every = [score for values in scores.values() for score in values]
    if not every:
        return None
    low, high = min(every), max(every)
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    counts = {label: np.histogram(values, edges)[0].tolist() for label, values in scores.items() if values}
    return Histogram(edges.tolist(), counts, max(max(c) for c in counts.values()), threshold)
