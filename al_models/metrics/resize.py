"""Bring a map to the size of its mask."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


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
    resized = rows @ (map @ columns.T)
    # A weighted mean stays in range, but its rounding may not: a constant map must stay constant, a maximum a maximum.
    return np.clip(resized, map.min(), map.max(), out=resized)


@lru_cache(maxsize=16)  # a category has few image sizes; a matrix takes 1 MB for 256 -> 1024
def _interpolation(n_in: int, n_out: int) -> np.ndarray:
    """The matrix float32 [n_out, n_in] that interpolates along one axis."""
    centre = np.clip((np.arange(n_out) + 0.5) * n_in / n_out - 0.5, 0, n_in - 1)
    left = np.floor(centre).astype(np.intp)
    right = np.minimum(left + 1, n_in - 1)
    matrix = np.zeros((n_out, n_in))
    row = np.arange(n_out)
    matrix[row, left] = 1 - (centre - left)
    matrix[row, right] += centre - left  # at the clamped edge, left is right and the weight 0
    matrix = matrix.astype(np.float32)
    matrix.flags.writeable = False  # the cache shares it
    return matrix
