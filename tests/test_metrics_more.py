"""Saturated overlap, AUPIMO, groups of defects, boundaries and weighted counts, against definitions."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_definitions import (
    boundary_by_definition,
    by_scikit_learn,
    counted,
    pimo_by_definition,
    pixel_metrics_by_definition,
    pro_by_definition,
    random_pairs,
    regions_of,
    slowly,
    spro_by_definition,
    tied_pairs,
)

from al_models.errors import InvalidInput
from al_models.metrics import (
    REGION_UNITS,
    BoundaryCounts,
    Defect,
    PixelCounts,
    aupimo,
    boundary_f,
    count_image,
    pixel_metrics,
)
from al_models.metrics.keys import just_below, just_below32, keys32_of, keys_of
from al_models.metrics.pimo import pixel_worth, shared_fpr
from al_models.metrics.regions import SIZES

DTYPES = [np.float16, np.float32, np.float64]
FEW = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 3.0])


@st.composite
def images(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray]]:
    """A small map with many ties, of any type of float, and two masks of its size."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    n = shape[0] * shape[1]
    map = np.array(draw(st.lists(FEW, min_size=n, max_size=n)), draw(st.sampled_from(DTYPES))).reshape(shape)
    bools = st.lists(st.booleans(), min_size=n, max_size=n)
    return map, [np.array(draw(bools)).reshape(shape) for _ in range(2)]


# an image's counts


@slowly
@given(tied_pairs(), st.sampled_from(DTYPES))
def test_the_type_of_a_map_changes_nothing_and_counts_are_of_their_image(pairs, dtype):
    whole = counted(pairs)
    parts = [count_image(f"image {i}", map.astype(dtype), mask) for i, (map, mask) in enumerate(pairs)]
    summed = PixelCounts.of(parts)
    assert summed.metrics() == whole.metrics()
    assert summed.rows() == whole.rows()
    for (map, mask), part in zip(pairs, parts, strict=True):
        keys = keys_of(map)
        assert part.keys.tolist() == np.unique(keys).tolist()
        assert part.normal.tolist() == [int((~mask & (keys == k)).sum()) for k in part.keys]
        assert part.anomalous.tolist() == [int((mask & (keys == k)).sum()) for k in part.keys]
        shares = [sum((keys[p] == k) / len(r) for r in regions_of(mask) for p in r) for k in part.keys]
        np.testing.assert_allclose(part.overlap / REGION_UNITS, shares, rtol=0, atol=1e-11)
        assert (part.n_normal, part.n_anomalous) == (int((~mask).sum()), int(mask.sum()))


def test_counts_of_images_and_of_data_sets_cross_a_process_border():
    image = count_image("a", np.eye(4), defects=[Defect(np.eye(4, dtype=bool), 2)], defect_type="cut")
    again = PixelCounts.of([pickle.loads(pickle.dumps(image))])
    assert again.metrics() == pickle.loads(pickle.dumps(PixelCounts.of([image]))).metrics()
    assert "spro_at_0.05" in again.metrics()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 5)])
def test_a_float16_map_of_the_masks_size_is_refused_by_name_like_any_other(shape):
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        map = np.zeros(shape, np.float16)
        map[-1, -1] = bad
        with pytest.raises(InvalidInput, match="part-7"):
            count_image("part-7", map, shape=shape)
    extreme = np.full(shape, -65504, np.float16)
    assert count_image("a", extreme, shape=shape).n_normal == extreme.size
    with pytest.raises(InvalidInput, match="real numbers"):
        count_image("a", np.zeros(shape, complex), shape=shape)


@pytest.mark.parametrize(
    ("keys", "below", "dtype"), [(keys_of, just_below, np.float16), (keys32_of, just_below32, np.float32)]
)
def test_the_largest_value_below_is_the_next_key_down(keys, below, dtype):
    most = float(np.finfo(dtype).max)
    values = np.array([-most, -3.0, -1e-7, -0.0, 0.0, 1e-7, 0.1, 1.0, most]).astype(dtype)
    found = below(keys(values))
    inner = found[1:].astype(dtype)
    assert np.array_equal(keys(inner).astype(np.int64), keys(values[1:]).astype(np.int64) - 1)
    assert (found < values).all()
    assert np.isfinite(found).all()


# validity


@slowly
@given(images())
def test_invalid_pixels_are_left_out_after_regions_are_found(image):
    map, (mask, valid) = image
    found = count_image("a", map, mask, valid=valid)
    kept = [{p for p in region if valid[p]} for region in regions_of(mask)]
    kept = [region for region in kept if region]
    assert (found.n_normal, found.n_anomalous) == (int((valid & ~mask).sum()), int((valid & mask).sum()))
    assert found.n_regions == len(kept)
    shares = [sum((keys_of(map)[p] == k) / len(r) for r in kept for p in r) for k in found.keys]
    np.testing.assert_allclose(found.overlap / REGION_UNITS, shares, rtol=0, atol=1e-11)
    scores, labels = map[valid].astype(np.float64), mask[valid]
    if labels.any() and not labels.all():
        metrics = PixelCounts.of([found]).metrics()
        assert metrics == pytest.approx(metrics | pixel_metrics_by_definition(scores, labels), abs=1e-9)
    good = count_image("a", map, shape=map.shape, valid=valid)
    assert good.n_normal == int(valid.sum())


def test_validity_that_does_not_fit_is_refused():
    with pytest.raises(InvalidInput, match="image a"):
        count_image("a", np.zeros((4, 4)), np.zeros((4, 4), bool), valid=np.ones((2, 2), bool))
    with pytest.raises(InvalidInput, match="uint8"):
        count_image("a", np.zeros((4, 4)), np.zeros((4, 4), bool), valid=np.ones((4, 4), np.uint8))


# weighted counts


@slowly
@given(tied_pairs(), st.lists(st.integers(0, 3), min_size=3, max_size=3), st.sampled_from([1.0, 0.25]))
def test_weighted_counts_give_the_metrics_of_repeated_images(pairs, weights, scale):
    parts = [count_image(str(i), map, mask) for i, (map, mask) in enumerate(pairs)]
    keys = np.unique(np.concatenate([part.keys for part in parts]))[::-1]

    def dense(values: list[np.ndarray]) -> np.ndarray:
        table = np.zeros((len(parts), len(keys)))
        for row, part, value in zip(table, parts, values, strict=True):
            row[np.searchsorted(-keys.astype(int), -part.keys.astype(int))] = value
        return table

    normal, anomalous = dense([p.normal for p in parts]), dense([p.anomalous for p in parts])
    overlap, regions = dense([p.overlap for p in parts]), np.array([p.n_regions for p in parts], float)
    weighing = scale * np.array([weights[: len(parts)], [1] * len(parts), [0] * len(parts)], float)
    found = pixel_metrics(weighing @ normal, weighing @ anomalous, weighing @ overlap, weighing @ regions)
    repeated = [pair for pair, times in zip(pairs, weights, strict=False) for _ in range(times)]
    for row, expected in enumerate([counted(repeated).metrics(), counted(pairs).metrics(), {}]):
        for name, values in found.items():
            assert values.shape == (3,)
            assert values[row] == pytest.approx(expected.get(name, math.nan), abs=1e-9, nan_ok=True)


def test_no_pixel_at_all_gives_no_number():
    nothing = np.zeros((2, 0))
    found = pixel_metrics(nothing, nothing, nothing, np.zeros(2))
    assert len(found) == 7
    assert all(np.isnan(values).all() and values.shape == (2,) for values in found.values())
    with pytest.raises(InvalidInput, match="pro_limits is 0"):
        pixel_metrics(nothing, nothing, nothing, np.zeros(2), pro_limits=[0])


# saturated overlap


@slowly
@given(
    st.lists(st.tuples(images(), st.integers(0, 2)), min_size=1, max_size=3),
    st.lists(
        st.sampled_from([(1, False), (2, False), (2.5, False), (99, False), (0.4, True), (0.1, True), (1.0, True)]),
        min_size=6,
        max_size=6,
    ),
    st.sampled_from([0.01, 0.05, 0.3, 1.0]),
)
def test_saturated_overlap_is_its_definition_even_where_defects_share_pixels(drawn, saturations, limit):
    counts, by_hand = PixelCounts(), []
    for i, ((map, masks), n) in enumerate(drawn):
        defects = [(mask, *saturations[2 * i + j]) for j, mask in enumerate(masks[:n]) if mask.any()]
        by_hand.append((map, defects))
        counts.add(str(i), map, None, shape=map.shape, defects=[Defect(*defect) for defect in defects])
    found = counts.metrics([limit])
    outside = [~np.logical_or.reduce([m for m, _, _ in d]) if d else np.ones(map.shape, bool) for map, d in by_hand]
    if not any(defects for _, defects in by_hand) or not any(o.any() for o in outside):
        assert not any(name.startswith("spro") for name in found)
        return
    assert found[f"spro_at_{limit:g}"] == pytest.approx(spro_by_definition(by_hand, limit), abs=1e-9)
    pairs = [(map, ~o) for (map, _), o in zip(by_hand, outside, strict=True)]
    assert found[f"pro_at_{limit:g}" if limit != 0.3 else "pro"] == pytest.approx(
        pro_by_definition(pairs, limit), abs=1e-9
    )


def test_a_defect_of_a_hundred_pixels_is_found_when_a_quarter_suffices():
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    map = np.zeros((20, 20), np.float32)
    map[5:15, 5:8] = 1  # 30 of 100 pixels, no false one
    for saturation in (Defect(mask, 25), Defect(mask, 0.25, True)):
        counts = PixelCounts()
        counts.add("a", map, None, defects=[saturation])
        found = counts.metrics()
        assert (found["spro_at_0.05"], found["spro_at_0.3"]) == (1.0, 1.0)
        assert found["pro_at_0.05"] == pytest.approx(0.3 + 0.7 * 0.05 / 2, abs=1e-9)


def test_merged_parts_with_and_without_defects_and_excluded_images_add_up():
    map, mask = np.arange(16.0).reshape(4, 4), np.eye(4, dtype=bool)
    with_defects, without = PixelCounts(), PixelCounts()
    with_defects.add("a", map, None, defects=[Defect(mask, 1)])
    without.add("b", map, None, shape=(4, 4))
    without.exclude("c")
    merged = with_defects.merge(without)
    assert merged.metrics() == without.merge(with_defects).metrics()
    assert (set(merged.images), merged.excluded) == ({"a", "b"}, {"c"})
    assert "spro_at_0.3" in merged.metrics()
    assert "spro_at_0.3" not in without.metrics()
    for known in ("b", "c"):
        with pytest.raises(InvalidInput, match=f"image {known} is counted already"):
            without.exclude(known)
        with pytest.raises(InvalidInput, match=f"image {known} is counted already"):
            without.add(known, map, mask)
    only_c = PixelCounts()
    only_c.exclude("c")
    with pytest.raises(InvalidInput, match="image c is counted in both"):
        merged.merge(only_c)


@pytest.mark.parametrize(
    ("mask", "defects", "message"),
    [
        (np.ones((4, 4), bool), [Defect(np.ones((4, 4), bool), 1)], "union"),
        (None, [Defect(np.ones((4, 4), bool), 1), Defect(np.ones((2, 4), bool), 1)], "one size"),
        (None, [Defect(np.ones((4, 4), np.uint8), 1)], "give bool"),
        (None, [Defect(np.ones((4, 4), bool), 0)], "above 0"),
        (None, [Defect(np.ones((4, 4), bool), 1.5, True)], "at most 1"),
    ],
)
def test_defects_that_contradict_are_refused(mask, defects, message):
    with pytest.raises(InvalidInput, match=message):
        count_image("a", np.zeros((4, 4)), mask, defects=defects)


# groups


def test_types_and_sizes_share_the_normal_pixels_and_together_are_everything():
    rng = np.random.default_rng(0)
    counts, maps, masks = PixelCounts(), [], []
    places = [("hole", 2, 5), ("hole", 5, 5), ("cut", 5, 30), ("cut", 30, 30), (None, 0, 0)]
    for i, (kind, h, w) in enumerate(places):
        mask = np.zeros((120, 120), bool)
        mask[40 : 40 + h, 50 : 50 + w] = True
        mask[2, 3] = kind == "cut"  # a second region of one pixel
        maps.append((rng.random((120, 120)) + 0.2 * mask).astype(np.float16).astype(np.float32))
        masks.append(mask)
        counts.add(str(i), maps[-1], mask, defect_type=kind)
    by_size, by_type = counts.metrics_by_size(), counts.metrics_by_type()
    assert list(by_size) == list(SIZES)  # of 14,400 pixels: 1, 10 (0.07 %), 25 (0.2 %) and 150 (1.04 %)
    assert {name: row["n_regions"] for name, row in by_type.items()} == {"cut": 4, "hole": 2}
    assert sum(row["n_pixels"] for row in by_size.values()) == int(counts.anomalous.sum())
    everything = np.concatenate([map.ravel() for map in maps]), np.concatenate([mask.ravel() for mask in masks])
    of_type = np.repeat([kind == "cut" for kind, _, _ in places], 120 * 120)
    kept = ~everything[1] | of_type
    expected = by_scikit_learn(everything[0][kept], everything[1][kept])
    assert {name: by_type["cut"][name] for name in expected} == pytest.approx(expected, abs=1e-9)
    pairs = [(map, mask & (kind == "cut")) for map, mask, (kind, _, _) in zip(maps, masks, places, strict=True)]
    assert by_type["cut"]["pro"] == pytest.approx(_pro_without(pairs, masks, 0.3), abs=1e-9)
    json.dumps([by_size, by_type], allow_nan=False)


def _pro_without(pairs: list, masks: list[np.ndarray], limit: float) -> float:
    """PRO of the regions of `pairs`, when pixels of any of `masks` are no normal ones."""
    inside = [map[np.array(sorted(r))[:, 0], np.array(sorted(r))[:, 1]] for map, m in pairs for r in regions_of(m)]
    normal = np.sort(np.concatenate([map[~mask] for (map, _), mask in zip(pairs, masks, strict=True)]))
    values = np.unique(np.concatenate([map.ravel() for map, _ in pairs]))[::-1]
    x = 1 - np.searchsorted(normal, values) / len(normal)
    y = np.mean([1 - np.searchsorted(np.sort(r), values) / len(r) for r in inside], axis=0)
    x, y = np.append(0, x), np.append(0, y)
    last = int(np.searchsorted(x, limit, side="right"))
    ends = np.append(x[:last], limit), np.append(y[:last], np.interp(limit, x, y))
    return float(np.trapezoid(ends[1], ends[0]) / limit)


@slowly
@given(tied_pairs())
def test_sizes_add_up_to_the_regions_to_the_bit(pairs):
    counts = counted([(np.pad(map, (0, 100)), np.pad(mask, (0, 100))) for map, mask in pairs])
    for name in ("anomalous", "overlap"):
        total = sum((getattr(sums, name) for sums in counts.sizes.values()), np.zeros(2**16, np.int64))
        assert np.array_equal(total, getattr(counts, name))
    areas = [
        len(region) / (mask.shape[0] + 100) / (mask.shape[1] + 100) for _, mask in pairs for region in regions_of(mask)
    ]
    for size, low, high in zip(SIZES, (0, 1e-4, 1e-3, 1e-2), (1e-4, 1e-3, 1e-2, 2), strict=True):
        n_regions = sum(low <= area < high for area in areas)
        assert (counts.sizes[size].n_regions if size in counts.sizes else 0) == n_regions


def test_a_size_begins_at_its_bound():
    mask = np.zeros((100, 100), bool)
    mask[0, 0] = mask[2, :9] = mask[4, :10] = mask[6:16, :10] = True
    mask[18:21, :33] = True
    counts = counted([(np.zeros((4, 4)), mask)])
    areas = {size: int(sums.anomalous.sum()) for size, sums in counts.sizes.items()}
    assert areas == {"small": 1 + 9, "medium": 10 + 99, "large": 100}


def test_merging_groups_is_exact_in_any_order():
    rng = np.random.default_rng(1)
    parts = []
    for i, (map, mask) in enumerate(random_pairs(seed=2, n=8, shape=(64, 48))):
        parts.append(PixelCounts())
        defects = [Defect(mask, 30), Defect(np.roll(mask, 5), 0.2, True)] if mask.any() else []
        kind = f"type {i % 3}"
        parts[-1].add(f"image {i}", map, None, shape=mask.shape, defects=defects, defect_type=kind)
    results = []
    for _ in range(3):
        merged = PixelCounts()
        for i in rng.permutation(len(parts)):
            merged = merged.merge(parts[i])
        results.append((merged.metrics(), merged.metrics_by_size(), merged.metrics_by_type(), merged.rows()))
    assert results[0] == results[1] == results[2]
    assert len(results[0][2]) == 3


# AUPIMO


@slowly
@given(
    st.lists(images(), min_size=2, max_size=5),
    st.sampled_from([(0.05, 0.3), (0.2, 0.4), (1 / 3, 0.9), (0.5, 1.0), (1e-5, 1e-4)]),
    st.randoms(use_true_random=False),
)
def test_aupimo_is_its_definition_whatever_the_order(drawn, bounds, random):
    maps = [map for map, _ in drawn]
    masks = [masks[0] if i % 2 else np.zeros(map.shape, bool) for i, (map, masks) in enumerate(drawn)]
    parts = [count_image(f"{i}", map, mask) for i, (map, mask) in enumerate(zip(maps, masks, strict=True))]
    found = aupimo(parts, bounds)
    expected = pimo_by_definition(maps, masks, *bounds)
    ids = [str(i) for i, mask in enumerate(masks) if mask.any()]
    if expected is None or not ids:
        assert (found.per_image, found.mean) == ({}, None)
        assert found.reason
        return
    assert found.per_image == pytest.approx(dict(zip(ids, expected, strict=True)), abs=1e-9)
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-9)
    random.shuffle(parts)
    assert aupimo(parts, bounds) == found  # to the bit


def test_aupimo_by_hand_and_its_corners():
    good = count_image("good", np.arange(100_000.0)[::-1].reshape(250, 400) / 2, shape=(250, 400))
    perfect = count_image("perfect", np.full((5, 5), 60_000.0), np.eye(5, dtype=bool))
    missed = count_image("missed", np.full((5, 5), -1.0), np.eye(5, dtype=bool))
    covered = count_image("covered", np.full((5, 5), 60_000.0), np.ones((5, 5), bool))
    found = aupimo([good, perfect, missed, covered], (1e-3, 1e-2))
    assert found.per_image == {"covered": 1.0, "missed": 0.0, "perfect": 1.0}
    assert found.mean == pytest.approx(2 / 3)
    assert (found.n_good, found.reason) == (1, None)
    assert "no good image" in aupimo([perfect]).reason
    assert "no anomalous image" in aupimo([good], (1e-3, 1e-2)).reason
    few = aupimo([count_image("few", np.eye(3), shape=(300, 300)), perfect])
    assert few.reason.startswith("the smallest false positive rate")
    assert (few.mean, few.n_good) == (None, 1)
    assert few.smallest_fpr > 1e-5
    ten = count_image("ten", np.arange(10.0)[None], shape=(1, 10))
    assert aupimo([ten, perfect], (0.1, 0.2)).mean == 1.0  # a rate of just the lower bound suffices
    constant = count_image("constant", np.zeros((3, 3)), shape=(999, 999))
    assert aupimo([constant, perfect]).smallest_fpr == 1.0
    for bounds in ((0.0, 0.1), (0.1, 0.1), (0.2, 0.1), (0.5, 1.1)):
        with pytest.raises(InvalidInput, match="fpr_bounds"):
            aupimo([good], bounds)


@pytest.mark.parametrize(
    ("bounds", "covered", "best_tenth"),
    [
        ((1e-1, 1.0), (0.1 + 1) / 2, 1.0),
        ((1e-3, 1e-1), ((1e-3 + 1e-2) / 2 + (1e-2 + 1e-1) / 2) / 2, ((1e-2 + 1e-1) / 2 + (1e-1 + 1) / 2) / 2),
        ((1e-5, 1e-4), (1e-5 + 1e-4) / 2, (1e-4 + 1e-3) / 2),
    ],
)
def test_aupimo_of_the_published_toy_case(bounds, covered, best_tenth):
    """The case and its figures are those of the tests of anomalib's AUPIMO, written by the paper's first author."""
    scores = np.ones(1_000_000, np.float16)
    for count in (100_000, 10_000, 1_000, 100, 10, 1):  # each value ten times as frequent as the next higher one
        scores[:count] += 1
    scores = scores.reshape(1000, 1000)
    tenth = np.arange(1_000_000).reshape(1000, 1000) < 100_000
    good = count_image("good", scores, shape=scores.shape)
    found = aupimo([good, count_image("a", scores, np.ones_like(tenth)), count_image("b", scores, tenth)], bounds)
    assert found.per_image == pytest.approx({"a": covered, "b": best_tenth}, abs=1e-12)


def test_the_shared_rate_is_the_mean_over_images_not_over_pixels():
    small, large = np.zeros((2, 2)), np.zeros((10, 10))
    small[0, 0] = large[0, 0] = 1.0
    fpr = shared_fpr([count_image("s", small, shape=(2, 2)), count_image("l", large, shape=(10, 10))])
    key = int(keys_of(np.array([1.0]))[0])
    assert fpr[key] == pytest.approx((1 / 4 + 1 / 100) / 2, abs=1e-15)
    assert (fpr[0], fpr[key + 1]) == (1.0, 0.0)
    worth = pixel_worth(fpr, (0.13, 0.5))
    assert (worth[key], worth[key + 1]) == (1.0, 1.0)
    assert 0 < worth[0x8000] < 0.5  # rises along with the rate from 0.13 to 1, of which 0.5 is on the way


# boundaries


@slowly
@given(
    images(),
    st.sampled_from([0, 1, 1.5, 2, 3]),
    st.sampled_from([-9.0, -1.0, 0.0, 0.5, 9.0]),
)
def test_boundaries_match_within_a_distance(image, tolerance, threshold):
    map, (mask, _) = image
    flagged, true = boundary_by_definition(map > threshold), boundary_by_definition(mask)
    near = [[math.dist(a, b) <= tolerance for b in true] for a in flagged]
    found = boundary_f("a", map, mask, [threshold], tolerance)[0]
    expected = BoundaryCounts(
        len(flagged), sum(any(row) for row in near), len(true), sum(any(column) for column in zip(*near, strict=True))
    )
    assert found == expected


def test_several_thresholds_at_once_are_each_by_itself():
    rng = np.random.default_rng(0)
    map, mask = rng.random((20, 30)), np.zeros((40, 60), bool)
    mask[10:25, 20:50] = True
    thresholds = [0.2, 0.5, 0.9, 2.0]
    assert boundary_f("a", map, mask, thresholds) == [boundary_f("a", map, mask, [t])[0] for t in thresholds]
    assert boundary_f("a", map, mask, []) == []


def test_boundary_counts_add_up_and_say_what_they_can():
    mask = np.zeros((40, 40), bool)
    mask[10:20, 10:20] = True
    exact = boundary_f("a", mask.astype(np.float32), mask, [0.5])[0]
    shifted = boundary_f("b", np.roll(mask, 2, axis=0).astype(np.float32), mask, [0.5])[0]
    coarse = boundary_f("c", np.roll(mask, 5, axis=0).astype(np.float32), mask, [0.5])[0]
    assert exact == BoundaryCounts(36, 36, 36, 36)
    assert exact.metrics() == {"boundary_precision": 1.0, "boundary_recall": 1.0, "boundary_f": 1.0}
    assert shifted == BoundaryCounts(36, 36, 36, 36)  # within 2 px
    assert 0 < coarse.metrics()["boundary_f"] < 1
    assert (exact + coarse).true == 72
    assert sum([exact, coarse], BoundaryCounts()) == coarse + exact
    good = boundary_f("d", mask.astype(np.float32), None, [0.5], shape=(40, 40))[0]
    assert good.metrics() == {"boundary_precision": 0.0, "boundary_f": 0.0}
    assert boundary_f("e", np.zeros((4, 4)), mask, [0.5])[0].metrics() == {"boundary_recall": 0.0, "boundary_f": 0.0}
    assert boundary_f("f", np.ones((4, 4)), np.ones((9, 9), bool), [0.5])[0].metrics() == {}
    half = np.zeros((40, 40), bool)
    half[:, :15] = True
    seen = boundary_f("g", mask.astype(np.float32), mask, [0.5], valid=half)[0]
    assert (seen.flagged, seen.true, seen.true_matched) == (18, 18, 18)
    with pytest.raises(InvalidInput, match="tolerance"):
        boundary_f("a", np.zeros((4, 4)), mask, [0.5], tolerance=-1)
    with pytest.raises(InvalidInput, match="threshold is NaN"):
        boundary_f("a", np.zeros((4, 4)), mask, [math.nan])
    with pytest.raises(InvalidInput, match="image h"):
        boundary_f("h", np.full((4, 4), np.nan), mask, [0.5])
