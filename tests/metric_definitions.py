"""Metrics of pixels by their definitions, written out slowly, and small inputs with many ties to try them on."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from al_models.metrics import PixelCounts

slowly = settings(max_examples=60, derandomize=True)


def counted(pairs: list[tuple[np.ndarray, np.ndarray]]) -> PixelCounts:
    counts = PixelCounts()
    for i, (map, mask) in enumerate(pairs):
        counts.add(f"image {i}", map, mask)
    return counts


def random_pairs(seed: int, n: int, shape: tuple[int, int] = (40, 48)) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        mask = ndimage.gaussian_filter(rng.standard_normal(shape), 3) > 0.12 if i % 2 else np.zeros(shape, bool)
        map = ndimage.gaussian_filter(rng.standard_normal(shape), 2) + 0.3 * mask
        pairs.append((map.astype(np.float32), mask))
    return pairs


@st.composite
def tied_pairs(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    """One to three small images whose values come from a handful, zeros of both signs among them."""
    values = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 0.5, 3.0])
    pairs = []
    for _ in range(draw(st.integers(1, 3))):
        h, w = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        map = draw(st.lists(values, min_size=h * w, max_size=h * w))
        mask = draw(st.lists(st.booleans(), min_size=h * w, max_size=h * w))
        pairs.append((np.array(map, np.float32).reshape(h, w), np.array(mask).reshape(h, w)))
    return pairs


def regions_of(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected regions by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        todo = [left.pop()]
        region = set(todo)
        while todo:
            y, x = todo.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            region |= near
            todo += near
        regions.append(region)
    return regions


def pro_by_definition(pairs: list[tuple[np.ndarray, np.ndarray]], limit: float) -> float:
    """MVTec AD, section 5.1, threshold by threshold; trapezoids, the last one cut where FPR reaches the limit."""
    values = sorted({float(v) for map, _ in pairs for v in map.ravel()}, reverse=True)
    regions = [(map, region) for map, mask in pairs for region in regions_of(mask)]
    n_normal = sum(int((~mask).sum()) for _, mask in pairs)
    area, last_x, last_y = 0.0, 0.0, 0.0
    for t in values:
        x = sum(int(((map >= t) & ~mask).sum()) for map, mask in pairs) / n_normal
        y = float(np.mean([sum(map[p] >= t for p in region) / len(region) for map, region in regions]))
        if x >= limit:
            y_limit = last_y + (y - last_y) * (limit - last_x) / (x - last_x)
            return (area + (limit - last_x) * (y_limit + last_y) / 2) / limit
        area += (x - last_x) * (y + last_y) / 2
        last_x, last_y = x, y
    raise AssertionError("the loosest threshold flags every pixel")


def pixel_metrics_by_definition(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """One pass of the plain formulas for each distinct threshold; AUROC as the share of pairs in order."""
    above, equal = scores[labels][:, None] > scores[~labels], scores[labels][:, None] == scores[~labels]
    f1, iou, ap, recall_before = [], [], 0.0, 0.0
    for t in sorted(set(scores.tolist()), reverse=True):
        flagged = scores >= t
        tp, fp, fn = (flagged & labels).sum(), (flagged & ~labels).sum(), (~flagged & labels).sum()
        f1.append(2 * tp / (2 * tp + fp + fn))
        iou.append(tp / (tp + fp + fn))
        recall = tp / (tp + fn)
        ap += (recall - recall_before) * tp / (tp + fp)
        recall_before = recall
    auroc = (above + 0.5 * equal).mean()
    return {"pixel_auroc": auroc, "pixel_ap": ap, "pixel_f1_max": max(f1), "iou_max": max(iou)}


def flat(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    scores = np.concatenate([map.astype(np.float16).ravel() for map, _ in pairs]).astype(np.float64)
    return scores, np.concatenate([mask.ravel() for _, mask in pairs])


def spro_by_definition(images: list[tuple[np.ndarray, list[tuple[np.ndarray, float, bool]]]], limit: float) -> float:
    """LOCO AD, section 5: defects (mask, saturation, relative) of each map; trapezoids up to the limit."""
    values = sorted({float(v) for map, _ in images for v in map.ravel()}, reverse=True)
    normal = [(map, ~np.logical_or.reduce([m for m, _, _ in d]) if d else map == map) for map, d in images]
    n_normal = sum(int(outside.sum()) for _, outside in normal)
    points = [(0.0, 0.0)]
    for t in values:
        shares = []
        for map, defects in images:
            for mask, saturation, relative in defects:
                area = int(mask.sum())
                enough = max(1, math.floor(saturation * area)) if relative else min(saturation, area)
                shares.append(min(int(((map >= t) & mask).sum()) / enough, 1.0))
        x = sum(int(((map >= t) & outside).sum()) for map, outside in normal) / n_normal
        points.append((x, sum(shares) / len(shares)))
    return area_under(points, 0.0, limit) / limit


def pimo_by_definition(maps: list[np.ndarray], masks: list[np.ndarray], low: float, high: float) -> list[float] | None:
    """AUPIMO of each anomalous image, threshold by threshold; None when no FPR above 0 is at most `low`."""
    good = [map for map, mask in zip(maps, masks, strict=True) if not mask.any()]
    values = sorted({float(v) for map in maps for v in map.ravel()}, reverse=True)
    rates = [float(np.mean([(map >= t).mean() for map in good])) for t in values]
    if min(rate for rate in rates if rate > 0) > low:
        return None
    found = []
    for map, mask in zip(maps, masks, strict=True):
        if mask.any():
            recall = [float((map[mask] >= t).mean()) for t in values]
            points = [(math.log(x), y) for x, y in zip(rates, recall, strict=True) if x > 0]
            found.append(area_under(points, math.log(low), math.log(high)) / math.log(high / low))
    return found


def area_under(points: list[tuple[float, float]], low: float, high: float) -> float:
    """Area of a polyline between two abscissae, trapezoid by trapezoid, each cut where it leaves the range."""
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        left, right = max(x0, low), min(x1, high)
        if right > left:
            slope = (y1 - y0) / (x1 - x0)
            area += (right - left) * (y0 + slope * ((left + right) / 2 - x0))
    return area


def boundary_by_definition(inside: np.ndarray) -> list[tuple[int, int]]:
    """Pixels of a set with one of their four neighbours in the image outside the set."""
    h, w = inside.shape
    found = []
    for y, x in np.argwhere(inside):
        near = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        if any(0 <= j < h and 0 <= i < w and not inside[j, i] for j, i in near):
            found.append((int(y), int(x)))
    return found


def by_scikit_learn(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUROC and AP of more pixels than the plain formulas can take."""
    return {"pixel_auroc": roc_auc_score(labels, scores), "pixel_ap": average_precision_score(labels, scores)}
