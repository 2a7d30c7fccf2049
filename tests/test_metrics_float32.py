"""Float32 maps counted without rounding, in two passes: against definitions, and against float16 where both apply."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_definitions import (
    by_scikit_learn,
    counted,
    flat,
    pixel_metrics_by_definition,
    pro_by_definition,
    random_pairs,
    slowly,
    tied_pairs,
)

from al_models.errors import InvalidInput
from al_models.metrics import FineCounts, anomalous_values, fine, fine_counts


def test_finer_values_than_float16_has_are_told_apart():
    map = np.array([[1.0, 1.0 + 2e-7, 1.0 + 4e-7, 1.0 - 1e-7]], np.float32)
    mask = np.array([[False, True, True, False]])
    assert counted([(map, mask)]).metrics()["pixel_auroc"] == 0.5
    assert fine_counts(lambda: [("a", map, mask)]).metrics()["pixel_auroc"] == 1.0


@slowly
@given(tied_pairs(), st.sampled_from([1.0, 1e-7, 1e30]))
def test_float32_maps_have_the_metrics_of_their_definitions(pairs, scale):
    pairs = [((map * np.float32(scale)).astype(np.float32), mask) for map, mask in pairs]
    thresholds = [float(np.float32(t * scale)) for t in (0.25, 0.5)]  # between values, and one that occurs
    counts = fine_counts(lambda: ((str(i), *pair) for i, pair in enumerate(pairs)), thresholds)
    found, best = counts.metrics(), counts.best_thresholds()
    scores = np.concatenate([map.ravel() for map, _ in pairs]).astype(np.float64)
    labels = np.concatenate([mask.ravel() for _, mask in pairs])
    for threshold in thresholds:
        at, flagged = counts.at_threshold(threshold), scores > threshold
        assert at.get("fpr_at_threshold", 0) == pytest.approx(flagged[~labels].mean() if not labels.all() else 0)
        assert at.get("recall_at_threshold", 0) == pytest.approx(flagged[labels].mean() if labels.any() else 0)
    if labels.all() or not labels.any():
        assert found == best == counts.curves() == {}
        return
    expected = pixel_metrics_by_definition(scores, labels)
    expected |= {"pro": pro_by_definition(pairs, 0.3), "pro_at_0.05": pro_by_definition(pairs, 0.05)}
    assert found == pytest.approx(found | expected, abs=1e-9)
    above = scores > best["iou_max"]
    assert (above & labels).sum() / (above | labels).sum() == pytest.approx(found["iou_max"], abs=1e-12)
    assert counts.curves()["roc"][1][-1] == 1.0


@slowly
@given(tied_pairs())
def test_what_float16_holds_has_the_same_metrics_as_float32(pairs):
    found = fine_counts(lambda: ((f"image {i}", *pair) for i, pair in enumerate(pairs)))
    assert found.metrics() == pytest.approx(counted(pairs).metrics(), abs=1e-13)
    assert set(found.metrics()) == set(counted(pairs).metrics())


def test_float32_counts_of_smooth_maps_merge_in_any_order():
    pairs = random_pairs(seed=3, n=6)
    values = np.unique(np.concatenate([anomalous_values(str(i), *pair) for i, pair in enumerate(pairs)]))
    parts = [FineCounts(values) for _ in range(3)]
    for i, pair in enumerate(pairs):
        parts[i % 3].add(str(i), *pair)
    whole = fine_counts(lambda: ((str(i), *pair) for i, pair in enumerate(pairs)))
    for merged in (parts[0].merge(parts[1]).merge(parts[2]), parts[2].merge(parts[0].merge(parts[1]))):
        assert merged.metrics() == whole.metrics()
        assert merged.images == whole.images
    scores = np.concatenate([map.ravel() for map, _ in pairs])
    expected = by_scikit_learn(scores, flat(pairs)[1])
    assert {name: whole.metrics()[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    rounded = counted(pairs).metrics()
    assert whole.metrics() == pytest.approx(rounded, abs=1e-3)
    assert whole.metrics() != pytest.approx(rounded, abs=1e-9)


def test_what_float32_counting_cannot_do_is_refused():
    mask = np.eye(3, dtype=bool)
    counts = FineCounts(anomalous_values("a", np.eye(3), mask))
    counts.add("a", np.eye(3), mask)
    with pytest.raises(InvalidInput, match="image a is counted already"):
        counts.add("a", np.eye(3), mask)
    with pytest.raises(InvalidInput, match="collect them first"):
        counts.add("b", 2 * np.eye(3), mask)
    with pytest.raises(InvalidInput, match="image b holds NaN"):
        counts.add("b", np.full((3, 3), np.nan), mask)
    with pytest.raises(InvalidInput, match="image a is counted in both"):
        counts.merge(counts)
    with pytest.raises(InvalidInput, match="different values"):
        counts.merge(FineCounts(np.zeros(1, np.uint32)))
    with pytest.raises(InvalidInput, match="not counted at"):
        counts.at_threshold(0.3)
    with pytest.raises(InvalidInput, match="NaN"):
        counts.at_threshold(math.nan)
    counts.add("good", np.eye(3), None, shape=(6, 6), valid=np.eye(6, dtype=bool))
    assert int(counts.normal.sum()) == 6 + 6
    assert anomalous_values("good", np.eye(3), None).size == 0


def test_more_values_than_fit_are_refused(monkeypatch):
    monkeypatch.setattr(fine, "MOST_VALUES", 2)
    FineCounts(np.arange(2, dtype=np.uint32))
    with pytest.raises(InvalidInput, match="PixelCounts"):
        FineCounts(np.arange(3, dtype=np.uint32))
