"""Perlin noise, whole images at a time."""

from __future__ import annotations

import math

import numpy as np


def perlin_noise(shape: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Perlin noise float64 (h, w) in [-1, 1], zero at the corners of the cells.

    The value at a pixel sums, over the four corners around it, weight times gradient dot offset. Weight and offset
    split into a row part and a column part, so the whole image is two matrix products.

    Source: Perlin 2002, Improving Noise, with unit gradients at random angles, times sqrt(2) to fill [-1, 1].
    """
    angles = rng.uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1))  # (p + 1, q + 1)
    rows, row_offsets = _lattice(shape[0], cells[0])  # (h, p + 1) each
    columns, column_offsets = _lattice(shape[1], cells[1])  # (w, q + 1) each
    vertical = row_offsets @ np.sin(angles) @ columns.T
    horizontal = rows @ np.cos(angles) @ column_offsets.T
    return math.sqrt(2) * (vertical + horizontal)  # (h, w)


def _lattice(length: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis, (length, cells + 1) each: weight of a corner for a pixel, and weight times offset from it."""
    position = np.arange(length) * cells / length
    offsets = position[:, None] - np.arange(cells + 1)
    away = np.clip(np.abs(offsets), 0, 1)
    weights = 1 - away**3 * (away * (6 * away - 15) + 10)
    return weights, weights * offsets
