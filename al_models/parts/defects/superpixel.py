"""Defects with the outlines of what is in the image: superpixels recoloured, replaced or made noisy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.ndimage import uniform_filter

from al_models.errors import InvalidInput
from al_models.parts.defects.canvas import Interval, checked, chosen, inner_point, is_grey, recolour
from al_models.parts.defects.regions import noisy
from al_models.parts.defects.textures import flipped_and_shifted

Change = Literal["recolour", "replace", "noise"]
_SHOWS = 8.0
"""Mean difference in grey levels from which a replaced superpixel is seen."""


def superpixel(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    donors: Sequence[np.ndarray] | np.ndarray | None = None,
    across: int = 10,
    count: tuple[int, int] = (1, 4),
    change: Change | None = None,
    contrast: Interval = (30.0, 90.0),
    opacity: Interval = (0.5, 0.9),
    sigma: Interval = (20.0, 60.0),
    density: Interval = (0.1, 0.5),
) -> tuple[np.ndarray, np.ndarray]:
    """Change a few neighbouring superpixels.

    `across` superpixels fit along the shorter side, the least and largest `count` of them are changed. `change` None
    draws one of three: move their colour by `contrast` grey levels with this `opacity`, replace them by what lies at
    their place in one of the `donors` (uint8, as large as the image; without them, the image itself flipped and
    shifted), or add noise as `noise` does. Where a drawn replacement would not be seen, the colour is moved instead.

    Raises InvalidInput. Source: superpixels of Achanta et al. 2012, SLIC; here in RGB.
    """
    shape = checked(image).shape[:2]
    labels, centres = superpixels(image, across)  # (h, w), (k, 2)
    row, column = np.rint(inner_point(shape, rng)).astype(int)
    first = centres[labels[row, column]]
    nearest = np.argsort(np.square(centres - first).sum(axis=1), kind="stable")
    mask = np.isin(labels, nearest[: int(rng.integers(count[0], count[1] + 1))])
    drawn = change or ("recolour", "replace", "noise")[int(rng.integers(3))]
    if drawn == "noise":
        return noisy(image, mask, None, sigma, density, rng), mask
    if drawn == "replace":
        result = image.copy()
        result[mask] = _other(image, donors, rng)[mask]
        if change or np.abs(result[mask].astype(int) - image[mask]).mean() >= _SHOWS:
            return result, mask
        drawn = "recolour"
    if drawn == "recolour":
        tint = 0.0 if is_grey(image) else 20.0
        return recolour(image, mask.astype(float), contrast, opacity, tint, rng)
    raise InvalidInput(f"the change is {change!r}; give 'recolour', 'replace', 'noise', or None for any")


def _other(image: np.ndarray, donors: Sequence[np.ndarray] | np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    donor = chosen(donors, rng)
    other = flipped_and_shifted(image, rng) if donor is None else checked(donor, "donor")
    if other.shape != image.shape:
        raise InvalidInput(f"the donor is {list(other.shape)} and the image {list(image.shape)}; resize the donor")
    return other


def superpixels(
    image: np.ndarray, across: int, *, rounds: int = 4, compactness: float = 20.0
) -> tuple[np.ndarray, np.ndarray]:
    """Number (h, w) of each pixel's superpixel, and the place (k, 2) of each: row and column.

    k-means over colour and place, from a grid of squares: a pixel is compared with the superpixels that grow from its
    own square and the eight around it, so that all pixels of a square are compared in one matrix product. `compactness`
    is the difference of colour, in grey levels, that counts as much as one side of a square. The means are found on a
    part of the pixels where squares are large; then each pixel goes to the nearest.
    """
    h, w = image.shape[:2]
    side = max(2, round(min(h, w) / across))
    step = max(1, side // 8)
    side -= side % step
    calm = uniform_filter(image, (3, 3, 1))  # a grainy surface would make ragged outlines
    padded = np.pad(calm, [(0, -h % side), (0, -w % side), (0, 0)], mode="edge")
    places = np.mgrid[: padded.shape[0], : padded.shape[1]].astype(np.float32) / side
    points = np.dstack([padded / np.float32(compactness), *places])  # (rows * side, columns * side, 5)
    few = _squares(points[::step, ::step], side // step)
    means = few.mean(axis=3)  # (rows, columns, 5)
    for _ in range(rounds):
        means = _means(few, _nearest(few, means), means)
    rows, columns = means.shape[:2]
    labels = _nearest(_squares(points, side), means).reshape(rows, columns, side, side).swapaxes(1, 2)
    return labels.reshape(padded.shape[:2])[:h, :w], means.reshape(-1, 5)[:, 3:].astype(np.float64) * side


def _squares(points: np.ndarray, side: int) -> np.ndarray:
    """The points (rows * side, columns * side, 5) of each square, (rows, columns, 5, side * side)."""
    rows, columns = points.shape[0] // side, points.shape[1] // side
    cut = points.reshape(rows, side, columns, side, 5).transpose(0, 2, 4, 1, 3)
    return cut.reshape(rows, columns, 5, side * side)


def _nearest(squares: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Number (rows, columns, n) of the nearest of the means (rows, columns, 5) for each point of the squares."""
    near, numbers = _around(means), _around(np.arange(means[..., 0].size).reshape(*means.shape[:2], 1))
    # |point - mean|^2 without |point|^2, which is the same for all means
    away = np.square(near).sum(axis=3)[..., None] - 2 * (near @ squares)  # (rows, columns, 9, n)
    return np.take_along_axis(numbers[..., 0], away.argmin(axis=2), axis=2)


def _around(values: np.ndarray) -> np.ndarray:
    """What stands in each square (rows, columns, c) and the eight around it: (rows, columns, 9, c)."""
    rows, columns = values.shape[:2]
    padded = np.pad(values, [(1, 1), (1, 1), (0, 0)], mode="edge")
    return np.stack([padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=2)


def _means(squares: np.ndarray, labels: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The mean (rows, columns, 5) of the points of each label; as before where it has none."""
    flat, k = labels.ravel(), before[..., 0].size
    counts = np.bincount(flat, minlength=k)[:, None]
    sums = np.stack([np.bincount(flat, squares[:, :, c].ravel(), k) for c in range(5)], -1)  # (k, 5)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), before.reshape(k, 5))
    return means.astype(np.float32).reshape(before.shape)
