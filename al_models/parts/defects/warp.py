"""A defect that moves what is there: the image bent within a disc."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.ndimage import map_coordinates

from al_models.errors import InvalidInput
from al_models.parts.defects.canvas import Interval, checked, inner_point

_LEAST = 0.1
"""Pixels: a smaller displacement is not seen."""


def warp(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    radius: Interval = (0.08, 0.25),
    strength: Interval = (0.2, 0.5),
    kind: Literal["push", "twirl", "bulge"] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Push, twirl or bulge what is within a disc, smoothly and without a fold; None draws one of the three.

    `radius` is that of the disc as a share of the shorter side. `strength` is below 0.6: the largest shift as a share
    of the radius, the turn of the middle as a share of 180 degrees, or how much larger or smaller the middle becomes.

    Of a few places the one with the most contrast is taken: where all is even, nothing moves.

    Raises InvalidInput.
    """
    h, w = checked(image).shape[:2]
    size, amount = max(8.0, rng.uniform(*radius) * min(h, w)), rng.uniform(*strength)
    kind = ("push", "twirl", "bulge")[int(rng.integers(3))] if kind is None else kind
    centre = _busy_point(image, size, rng)
    y, x = np.arange(h)[:, None] - centre[0], np.arange(w)[None, :] - centre[1]
    bump = np.clip(1 - (y**2 + x**2) / size**2, 0, None) ** 2  # (h, w): 1 in the middle, level at the disc's edge
    if kind == "push":
        angle = rng.uniform(0, 2 * math.pi)
        dy, dx = amount * size * math.sin(angle) * bump, amount * size * math.cos(angle) * bump
    elif kind == "twirl":
        turn = amount * math.pi * rng.choice([-1, 1]) * bump
        dy, dx = (np.cos(turn) - 1) * y - np.sin(turn) * x, np.sin(turn) * y + (np.cos(turn) - 1) * x
    elif kind == "bulge":
        factor = amount * rng.choice([-1, 1]) * bump
        dy, dx = factor * y, factor * x
    else:
        raise InvalidInput(f"the kind of warp is {kind!r}; give 'push', 'twirl', 'bulge', or None for any")
    mask = np.hypot(dy, dx) >= _LEAST
    to = np.nonzero(mask)
    source = [to[0] + dy[mask], to[1] + dx[mask]]
    result = image.copy()
    for c in range(3):
        result[..., c][mask] = np.rint(map_coordinates(image[..., c], source, float, order=1, mode="mirror"))
    return result, mask


def _busy_point(image: np.ndarray, size: float, rng: np.random.Generator) -> np.ndarray:
    """Of four places the one (2,) around which the image varies most, within half of `size`."""
    points = [inner_point((image.shape[0], image.shape[1]), rng) for _ in range(4)]
    corners = [np.maximum(0, (point - size / 2).astype(int)) for point in points]
    span = max(2, int(size))
    return points[int(np.argmax([image[y : y + span, x : x + span].std(axis=(0, 1)).sum() for y, x in corners]))]
