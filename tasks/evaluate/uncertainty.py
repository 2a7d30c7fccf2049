"""How certain the metrics of a cell are, and the replicates that let two methods be compared on equal images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from al_models.metrics import Replicates, interval, mean_replicates, replicates, threshold_replicates
from storage.errors import Damaged, NotInStore
from storage.samples import Sample
from storage.store import Draft, Store
from storage.tables import read_table, write_table
from tasks.evaluate.pixels import CountedPixels

_FILE = "replicates.parquet"


def replicates_of(
    counted: CountedPixels,
    samples: Sequence[Sample],
    scores: np.ndarray,
    per_image: Mapping[str, Mapping[str, float]],
    pixel_threshold: float | None,
) -> dict[str, Replicates]:
    """Metric -> its replicates; `per_image` are metrics that are means over images: metric -> image id -> value."""
    judged = {s.id: (float(v), s.label == "anomalous") for s, v in zip(samples, scores, strict=True) if s.is_labelled}
    result = replicates(counted.images, {i: v for i, (v, _) in judged.items()}, {i: k for i, (_, k) in judged.items()})
    if pixel_threshold is not None:
        result |= threshold_replicates(counted.images, pixel_threshold)
    for metric, values in per_image.items():
        ids = sorted(values)
        mean = mean_replicates(ids, np.array([values[i] for i in ids]))
        result |= {} if mean is None else {metric: mean}
    return result


def intervals_of(of_metric: Mapping[str, Replicates], absent: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Metric -> `low` and `high` of its 95 % interval, None where the images cannot tell, and a `note`.

    `absent` says why a metric has no value at all, which becomes its note.
    """
    intervals = {metric: interval(one) for metric, one in of_metric.items()}
    known = {m: {"low": one.low, "high": one.high, "note": one.note} for m, one in intervals.items()}
    return known | {metric: {"low": None, "high": None, "note": reason} for metric, reason in absent.items()}


def write_replicates(store: Store, draft: Draft, of_metric: Mapping[str, Replicates]) -> None:
    """Keep the replicates in the draft, a row a metric."""
    rows = [
        {"metric": metric, "estimate": r.estimate, "images": r.images, "pairs": r.pairs, "values": r.values}
        for metric, r in of_metric.items()
    ]
    columns = ["metric", "estimate", "images", "pairs", "values"]
    table = pd.DataFrame(rows, columns=columns).astype({"pairs": "Int64"})
    write_table(store, f"{draft.folder}/{_FILE}", table, "zstd")


def read_replicates(store: Store, evaluation: str | None) -> dict[str, Replicates]:
    """Metric -> replicates of an evaluation, given by its key; empty when it is gone. Raises Damaged for a damaged
    file."""
    output = store.find(evaluation or "")
    if output is None:
        return {}
    try:
        table = read_table(store, f"{output.folder}/{_FILE}")
        return {
            row.metric: Replicates(row.estimate, row.values, row.images, None if pd.isna(row.pairs) else int(row.pairs))
            for row in table.itertuples(index=False)
        }
    except NotInStore:
        return {}
    except (AttributeError, TypeError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise Damaged(
            f"{output.folder}/{_FILE} cannot be read ({error}); delete the evaluation and run again"
        ) from error
