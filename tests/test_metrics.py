"""Metrics against their definitions, written out slowly, and against scikit-learn."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metric_definitions import (
    counted,
    flat,
    pixel_metrics_by_definition,
    pro_by_definition,
    random_pairs,
    slowly,
    tied_pairs,
)
from sklearn.metrics import average_precision_score, roc_auc_score

from al_models.errors import InvalidInput
from al_models.metrics import PixelCounts, image_metrics, resize_map
from al_models.metrics.curves import REGION_UNITS, thin
from al_models.metrics.keys import N_KEYS, keys_of

PIXEL_METRICS = {"pixel_auroc", "pixel_ap", "pixel_f1_max", "iou_max", "pro", "pro_at_0.05", "pro_at_0.01"}


# a published toy case


@pytest.mark.parametrize("limit", [0.3, 0.05])
def test_scores_drawn_at_random_have_half_the_limit_as_pro(limit):
    """As in the toy example of MVTec's evaluation code: whatever the regions, their overlap is the FPR."""
    rng = np.random.default_rng(0)
    counts = PixelCounts()
    for index in range(40):
        mask = np.zeros((100, 100), bool)
        mask[10:40, 20:60] = mask[60:63, 70:73] = True
        counts.add(str(index), rng.random((100, 100)), mask)
    found = counts.metrics((limit,))
    assert found["pro" if limit == 0.3 else f"pro_at_{limit}"] == pytest.approx(limit / 2, abs=0.02)


# resizing


@pytest.mark.parametrize(
    ("given_shape", "wanted_shape"), [((16, 16), (50, 37)), ((7, 5), (7, 20)), ((1, 1), (3, 4)), ((30, 41), (11, 8))]
)
def test_resizing_is_torchs_bilinear_interpolation(given_shape, wanted_shape):
    map = np.random.default_rng(0).standard_normal(given_shape).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.tensor(map)[None, None], size=wanted_shape, mode="bilinear")
    ours = resize_map(map, wanted_shape)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs[0, 0].numpy(), rtol=0, atol=1e-5)


def test_resizing_never_leaves_the_range_and_keeps_a_constant_map_constant():
    map = np.random.default_rng(1).random((9, 9)).astype(np.float32)
    resized = resize_map(map, (301, 203))
    assert resized.max() <= map.max()
    assert resized.min() >= map.min()
    assert set(np.unique(resize_map(np.full((6, 6), 0.1, np.float32), (35, 44)))) == {np.float32(0.1)}


# keys


def test_keys_order_as_all_float16_values_do():
    values = np.arange(N_KEYS, dtype=np.uint16).view(np.float16)
    values = np.sort(values[np.isfinite(values)])
    keys = keys_of(values).astype(int)
    assert np.array_equal(np.sign(np.diff(keys)), np.sign(np.diff(values.astype(np.float64))))
    assert keys_of(np.array([-0.0, 0.0, -1e-9])).tolist() == [0x8000] * 3


# pixel metrics


@slowly
@given(tied_pairs(), st.sampled_from([0.01, 0.05, 0.25, 0.5, 1.0]))
def test_pixel_metrics_are_their_definitions(pairs, limit):
    found = counted(pairs).metrics(pro_limits=[0.3, limit])
    scores, labels = flat(pairs)
    if labels.all() or not labels.any():
        assert found == {}
        return
    expected = pixel_metrics_by_definition(scores, labels)
    expected |= {"pro": pro_by_definition(pairs, 0.3), f"pro_at_{limit:g}": pro_by_definition(pairs, limit)}
    assert found == pytest.approx(expected, abs=1e-9)


def test_pixel_metrics_agree_with_scikit_learn_and_the_paper_on_smooth_maps():
    pairs = random_pairs(seed=2, n=6)
    rounded = [(map.astype(np.float16), mask) for map, mask in pairs]
    scores, labels = flat(pairs)
    found = counted(pairs).metrics()
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert found["pixel_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert found["pro"] == pytest.approx(pro_by_definition(rounded, 0.3), abs=1e-9)
    assert found["pro_at_0.05"] == pytest.approx(pro_by_definition(rounded, 0.05), abs=1e-9)
    assert found["pro_at_0.01"] == pytest.approx(pro_by_definition(rounded, 0.01), abs=1e-9)
    assert set(found) == PIXEL_METRICS
    assert found["pro_at_0.01"] < found["pro_at_0.05"] < found["pro"] < found["pixel_auroc"] < 1


def test_pro_of_a_case_done_by_hand():
    # Regions of 1 and 2 pixels, 4 normal pixels. At 3: overlap (1 + 0) / 2, FPR 0. At 2: (1 + 1/2) / 2, FPR 1/4.
    # At 1: all found, FPR 1. Up to 0.25: a trapezoid from 1/2 to 3/4; up to 0.5 it goes on to 3/4 + 1/3 * 1/4.
    map = np.array([[3, 2, 1, 1, 1, 2, 1]], np.float32)
    mask = np.array([[1, 0, 0, 0, 0, 1, 1]], bool)
    counts = counted([(map, mask)])
    assert counts.n_regions == 2
    assert counts.metrics(pro_limits=[0.25])["pro_at_0.25"] == pytest.approx(0.625, abs=1e-12)
    at_half = 0.75 + 0.25 / 3
    expected = (0.25 * 0.625 + 0.25 * (0.75 + at_half) / 2) / 0.5
    assert counts.metrics(pro_limits=[0.5])["pro_at_0.5"] == pytest.approx(expected, abs=1e-12)


def test_a_small_region_weighs_as_much_as_a_large_one_and_touching_corners_join():
    mask = np.zeros((12, 12), bool)
    mask[:6, :6] = True
    mask[6, 6] = True  # joined by its corner
    mask[10, 10] = True
    counts = counted([(np.where(mask, 1.0, 0.0), mask)])
    assert counts.n_regions == 2
    map = np.zeros((12, 12), np.float32)
    map[10, 10] = 1.0  # only the one-pixel region is found, without a false pixel
    limit = 0.01
    half = counted([(map, mask)]).metrics(pro_limits=[limit])["pro_at_0.01"]
    assert half == pytest.approx(0.5 + 0.5 * limit / 2, abs=1e-9)  # then straight on to (1, 1)


def test_the_map_is_judged_at_the_size_of_the_mask():
    rng = np.random.default_rng(3)
    map, mask = rng.random((8, 8)).astype(np.float32), rng.random((31, 26)) > 0.7
    resized = counted([(resize_map(map, mask.shape), mask)])
    direct = counted([(map, mask)])
    assert np.array_equal(direct.normal, resized.normal)
    assert np.array_equal(direct.overlap, resized.overlap)
    assert int((direct.normal + direct.anomalous).sum()) == 31 * 26


def test_each_region_sums_to_one_unit_exactly():
    pairs = random_pairs(seed=4, n=4, shape=(64, 64))
    counts = counted(pairs)
    assert counts.n_regions > 4
    assert int(counts.overlap.sum()) == counts.n_regions * REGION_UNITS
    assert counts.overlap.min() >= 0


def test_a_region_too_large_to_sort_is_counted_alike():
    rng = np.random.default_rng(11)
    map, mask = rng.integers(0, 50, (200, 220)).astype(np.float32), np.ones((200, 220), bool)
    mask[100:102] = False  # two regions of 22,000 and 21,560 pixels: more than a quarter of two tables
    found = counted([(map, mask)])
    assert found.n_regions == 2
    shares = [np.bincount(map[rows].ravel().astype(int)) / map[rows].size for rows in (slice(100), slice(102, 200))]
    kept = found.overlap[keys_of(np.arange(50.0))] / REGION_UNITS
    np.testing.assert_allclose(kept, sum(shares), rtol=0, atol=1e-11)


def test_maximal_values_of_float16_are_counted_unclamped():
    map = np.array([[-65504.0, 65504.0, 6e-8, 0.0]], np.float32)
    mask = np.array([[False, True, True, False]])
    found = counted([(map, mask)])
    assert found.metrics()["pixel_auroc"] == 1.0
    assert found.best_thresholds() == {"pixel_f1_max": 0.0, "iou_max": 0.0}
    assert counted([(map, ~mask)]).best_thresholds()["iou_max"] == -65520.0


# merging


def test_merging_is_exact_in_any_order_and_grouping():
    pairs = random_pairs(seed=5, n=9)
    parts = []
    for i, (map, mask) in enumerate(pairs):
        parts.append(PixelCounts())
        parts[-1].add(f"image {i}", map, mask)
    whole = counted(pairs)
    shuffled = [parts[i] for i in np.random.default_rng(6).permutation(9)]
    in_turn = PixelCounts()
    for part in shuffled:
        in_turn = in_turn.merge(part)
    in_threes = [a.merge(b).merge(c) for a, b, c in zip(shuffled[::3], shuffled[1::3], shuffled[2::3], strict=True)]
    for merged in (in_turn, in_threes[2].merge(in_threes[0].merge(in_threes[1]))):
        assert np.array_equal(merged.overlap, whole.overlap)
        assert merged.metrics() == whole.metrics()
        assert merged.curves() == whole.curves()
        assert merged.rows() == whole.rows()
    assert parts[0].rows()[0].image_id == "image 0"  # the parts are left as they were
    assert len(parts[0].images) == 1


def test_counts_cross_a_process_border():
    counts = counted(random_pairs(seed=7, n=2))
    assert pickle.loads(pickle.dumps(counts)).metrics() == counts.metrics()


def test_an_image_is_counted_once():
    counts = counted(random_pairs(seed=7, n=2))
    with pytest.raises(InvalidInput, match="image 1 is counted already"):
        counts.add("image 1", np.zeros((4, 4)), np.zeros((4, 4), bool))
    with pytest.raises(InvalidInput, match="counted in both parts"):
        counts.merge(counted(random_pairs(seed=8, n=1)))


# thresholds


@slowly
@given(tied_pairs(), st.sampled_from([-3.0, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 3.0, 1e6, -1e6]))
def test_at_threshold_counts_what_exceeds_it(pairs, threshold):
    scores, labels = flat(pairs)
    flagged = scores > threshold
    tp, fp, fn = (flagged & labels).sum(), (flagged & ~labels).sum(), (~flagged & labels).sum()
    expected = {}
    if labels.any():
        expected |= {"iou_at_threshold": tp / (tp + fp + fn), "recall_at_threshold": tp / (tp + fn)}
    if labels.any() and flagged.any():
        expected["precision_at_threshold"] = tp / (tp + fp)
    if not labels.all():
        expected["fpr_at_threshold"] = fp / (~labels).sum()
    assert counted(pairs).at_threshold(threshold) == pytest.approx(expected, abs=1e-12)


@slowly
@given(tied_pairs())
def test_the_best_thresholds_reach_the_best_values(pairs):
    counts = counted(pairs)
    found, best = counts.metrics(), counts.best_thresholds()
    if not found:
        assert best == {}
        return
    assert counts.at_threshold(best["iou_max"])["iou_at_threshold"] == found["iou_max"]
    at = counts.at_threshold(best["pixel_f1_max"])
    precision, recall = at["precision_at_threshold"], at["recall_at_threshold"]
    assert 2 * precision * recall / (precision + recall) == pytest.approx(found["pixel_f1_max"], abs=1e-12)
    json.dumps([found, best, at], allow_nan=False)  # plain finite numbers, as a record needs


def test_a_pixel_equal_to_the_threshold_before_rounding_is_not_flagged():
    value = np.float32(0.12345)
    assert np.float16(value) > value  # rounding alone would push it over
    counts = counted([(np.full((2, 2), value), np.zeros((2, 2), bool))])
    assert counts.at_threshold(float(value)) == {"fpr_at_threshold": 0.0}


# images


def test_rows_hold_each_images_own_figures():
    pairs = random_pairs(seed=9, n=4)
    counts = counted(pairs)
    counts.add("whole", np.eye(6), np.ones((6, 6), bool))
    rows = {row.image_id: row for row in counts.rows()}
    assert list(rows) == sorted(rows)
    assert (rows["image 0"].n_anomalous, rows["image 0"].auroc, rows["image 0"].iou_max) == (0, None, None)
    assert (rows["whole"].n_normal, rows["whole"].n_regions, rows["whole"].average_precision) == (0, 1, None)
    scores, labels = flat([pairs[1]])
    assert rows["image 1"].auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert rows["image 1"].average_precision == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert rows["image 1"].iou_max == pytest.approx(pixel_metrics_by_definition(scores, labels)["iou_max"], abs=1e-12)


@slowly
@given(st.lists(st.tuples(st.sampled_from([-1.5, 0.0, 1e-12, 0.3, 7.0]), st.booleans()), max_size=30))
def test_image_metrics_are_their_definitions(rows):
    scores, labels = np.array([s for s, _ in rows]), np.array([label for _, label in rows], bool)
    found = image_metrics(scores, labels)
    if labels.all() or not labels.any():
        assert found == {}
        return
    expected = pixel_metrics_by_definition(scores, labels)
    assert found == pytest.approx(
        {
            "image_auroc": roc_auc_score(labels, scores),
            "image_ap": average_precision_score(labels, scores),
            "image_f1_max": expected["pixel_f1_max"],
        },
        abs=1e-9,
    )


def test_image_scores_are_not_rounded():
    assert image_metrics(np.array([1.0, 1.0 + 1e-15]), np.array([False, True]))["image_auroc"] == 1.0


# curves


def test_curves_are_thin_end_where_they_should_and_keep_the_area():
    counts = counted(random_pairs(seed=10, n=12, shape=(80, 80)))
    curves, found = counts.curves(), counts.metrics(pro_limits=[1.0])
    for x, y in curves.values():
        assert 100 < len(x) == len(y) <= 200
    for name in ("roc", "pro"):
        x, y = curves[name]
        assert (x[0], y[0], x[-1], y[-1]) == (0.0, 0.0, 1.0, 1.0)
        assert all(np.diff(x) >= 0)
        assert all(np.diff(y) >= 0)
    assert np.trapezoid(curves["roc"][1], curves["roc"][0]) == pytest.approx(found["pixel_auroc"], abs=1e-3)
    assert np.trapezoid(curves["pro"][1], curves["pro"][0]) == pytest.approx(found["pro_at_1"], abs=1e-3)
    n_anomalous, n_normal = counts.anomalous.sum(), counts.normal.sum()
    assert curves["pr"][0][-1] == 1.0
    assert curves["pr"][1][-1] == pytest.approx(n_anomalous / (n_anomalous + n_normal), abs=1e-12)


def test_thinning_leaves_a_short_curve_alone():
    assert thin(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.9, 1.0])) == ([0.0, 0.5, 1.0], [0.0, 0.9, 1.0])


# corners


def test_without_both_kinds_of_pixel_metrics_are_absent():
    no_defect, no_normal = PixelCounts(), PixelCounts()
    no_defect.add("a", np.eye(4), None, shape=(8, 8))
    no_defect.add("b", np.eye(4), np.zeros((8, 8), bool))
    no_normal.add("a", np.eye(4), np.ones((8, 8), bool))
    for counts in (no_defect, no_normal, PixelCounts()):
        assert counts.metrics() == counts.best_thresholds() == counts.curves() == {}
    assert set(no_defect.at_threshold(0.5)) == {"fpr_at_threshold"}
    assert set(no_normal.at_threshold(2.0)) == {"iou_at_threshold", "recall_at_threshold"}
    assert PixelCounts().at_threshold(0.5) == {}
    assert int(no_defect.normal.sum()) == 128


def test_a_good_image_beside_a_wholly_anomalous_one():
    counts = counted([(np.full((4, 4), 0.2), np.zeros((4, 4), bool)), (np.full((4, 4), 0.9), np.ones((4, 4), bool))])
    assert counts.metrics() == dict.fromkeys(PIXEL_METRICS, 1.0)


def test_constant_maps_rank_nothing():
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = True
    found = counted([(np.full((5, 5), 0.1, np.float32), mask)]).metrics()
    expected = {"pixel_auroc": 0.5, "pixel_ap": 0.01, "pixel_f1_max": 2 / 101, "iou_max": 0.01}
    expected |= {"pro": 0.15, "pro_at_0.05": 0.025, "pro_at_0.01": 0.005}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65505.0, 1e300])
def test_a_map_that_float16_cannot_hold_is_refused_by_name_and_not_counted(bad):
    counts = PixelCounts()
    map = np.zeros((3, 3))
    map[1, 2] = bad
    with pytest.raises(InvalidInput, match="part-7"):
        counts.add("part-7", map, np.zeros((6, 6), bool))
    assert not counts.images
    assert not counts.normal.any()


@pytest.mark.parametrize(
    ("map", "mask", "shape", "message"),
    [
        (np.zeros((2, 3, 3)), np.zeros((3, 3), bool), None, "one map"),
        (np.zeros((0, 3)), np.zeros((3, 3), bool), None, "one map"),
        (np.zeros((3, 3)), np.zeros((3, 3), np.uint8), None, "give bool"),
        (np.zeros((3, 3)), np.zeros(3, bool), None, "give bool"),
        (np.zeros((3, 3)), None, None, "neither mask nor shape"),
        (np.zeros((3, 3)), None, (0, 3), "at least 1"),
        (np.zeros((3, 3)), np.zeros((3, 3), bool), (4, 4), "give one"),
    ],
)
def test_what_cannot_be_counted_is_refused(map, mask, shape, message):
    with pytest.raises(InvalidInput, match=message):
        PixelCounts().add("a", map, mask, shape)


def test_bad_arguments_are_refused():
    for limit in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="pro_limit"):
            PixelCounts().metrics(pro_limits=[limit])
    with pytest.raises(InvalidInput, match="NaN"):
        PixelCounts().at_threshold(float("nan"))
    with pytest.raises(InvalidInput, match="score 1 is nan"):
        image_metrics(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(InvalidInput, match="give bool"):
        image_metrics(np.array([0.0, 1.0]), np.array([0, 1]))
    with pytest.raises(InvalidInput, match="one score and one label"):
        image_metrics(np.zeros(3), np.zeros(2, bool))
