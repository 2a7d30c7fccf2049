"""The resizing of a map to the size of its mask."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import sparse


def resize_map(map: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The map at another size, by bilinear interpolation.

    float32 [h, w] -> float32 [H, W]. Half-pixel centres, edges clamped, no anti-aliasing: the same as torch's
    `interpolate(mode="bilinear", align_corners=False)` up to rounding. No output pixel leaves the range of
    the input. A map that has the shape already comes back as it is.
    """
    map = np.asarray(map, np.float32)
    if map.shape == tuple(shape):
        return map
    rows, columns = _interpolation(map.shape[0], shape[0]), _interpolation(map.shape[1], shape[1])
    widened = np.ascontiguousarray((columns @ map.T).T)  # (h, W)
    resized = rows @ widened
    # A weighted mean stays in range, but its rounding may not: a constant map must stay constant, a maximum a maximum.
    return np.clip(resized, map.min(), map.max(), out=resized)


@lru_cache(maxsize=64)
def _interpolation(n_in: int, n_out: int) -> sparse.csr_array:
    """The matrix float32 [n_out, n_in] that interpolates along one axis: two weights a row, so 12 n_out bytes or so."""
    centre = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
    left = np.floor(centre).astype(np.int32)
    right = np.minimum(left + 1, n_in - 1)
    weight = np.stack([1 - (centre - left), centre - left], axis=1)  # at the clamped edge left is right: they add up
    column = np.stack([left, right], axis=1)
    row_starts = 2 * np.arange(n_out + 1, dtype=np.int32)
    return sparse.csr_array((weight.ravel().astype(np.float32), column.ravel(), row_starts), shape=(n_out, n_in))
