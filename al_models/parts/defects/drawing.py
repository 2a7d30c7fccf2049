"""Defects that are drawn: a line, a blob, a hole."""

from __future__ import annotations

import math

import numpy as np

from al_models.parts.defects.canvas import (
    VISIBLE,
    Interval,
    blend,
    blob,
    checked,
    inner_point,
    recolour,
    scale,
    smooth,
)

_DARK = 80
"""Grey level below which a dark hole would not show."""


def scratch(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    length: Interval = (0.25, 0.7),
    width: Interval = (3.0, 7.0),
    bend: float = 0.2,
    contrast: Interval = (30.0, 90.0),
    opacity: Interval = (0.6, 0.95),
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a thin curved line, brighter or darker than what it crosses, that fades to its edges and ends.

    `length` is a share of the shorter side, `width` the whole width in pixels, faint edges included, `bend` the largest
    deviation of the ends from the tangent as a share of the length, `contrast` the difference from the mean colour
    underneath in grey levels, beyond one standard deviation of what lies there.

    Raises InvalidInput.
    """
    h, w = checked(image).shape[:2]
    radius = max(1.5, rng.uniform(*width) / 2 * scale(image))
    points, strength = _curve((h, w), rng.uniform(*length) * min(h, w), bend, rng)  # (s, 2), (s,)
    return recolour(image, _stroke((h, w), points, strength, radius), contrast, opacity, 0.0, rng)


def stain(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    radius: Interval = (0.04, 0.14),
    irregularity: float = 0.45,
    softness: Interval = (0.1, 0.6),
    contrast: Interval = (30.0, 90.0),
    tint: float = 10.0,
    opacity: Interval = (0.35, 0.85),
) -> tuple[np.ndarray, np.ndarray]:
    """Darken, lighten or tint an irregular blob with a soft edge.

    `radius` bounds the half axes, as shares of the shorter side; `irregularity` is the largest deviation of the outline
    from its ellipse, as a share below 0.5; `softness` the share of the radius over which the edge fades; `contrast` the
    difference from the mean colour underneath in grey levels, beyond one standard deviation of what lies there; `tint`
    the largest further difference, drawn apart for each channel.

    Raises InvalidInput. Source: the stain noise of Collin and De Vleeschouwer 2020, arXiv:2008.12977; here with a
    soft edge, and a colour relative to the image.
    """
    h, w = checked(image).shape[:2]
    half_axes = np.maximum(3.0, rng.uniform(*radius, size=2) * min(h, w))
    centre = inner_point((h, w), rng)
    depth = blob((h, w), centre, half_axes, min(irregularity, 0.49), rng) / rng.uniform(*softness)  # (h, w)
    return recolour(image, smooth(np.clip(depth, 0, 1)), contrast, opacity, tint, rng)


def hole(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    radius: Interval = (0.02, 0.08),
    rim: Interval = (0.2, 0.45),
    depth: Interval = (0.6, 0.95),
    contrast: Interval = (30.0, 80.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Sink a round hole with a rim that is bright on one side and dark on the other, as if lit from there.

    `radius` is a share of the shorter side, `rim` the width of the rim as a share of the radius, `depth` how far the
    hole's floor goes from the mean colour underneath to black, or to white where the image is dark, and `contrast` the
    rim's largest difference from that mean in grey levels, beyond half a standard deviation of what lies there.

    Raises InvalidInput.
    """
    h, w = checked(image).shape[:2]
    size = max(4.0, rng.uniform(*radius) * min(h, w))
    half_axes, centre = size * rng.uniform(0.85, 1.15, 2), inner_point((h, w), rng)
    inward = blob((h, w), centre, half_axes, 0.06, rng)  # (h, w)
    weight = smooth(np.clip(inward * size / 2, 0, 1))  # the edge is two pixels wide
    mask = weight >= VISIBLE
    mean = image[mask].mean(axis=0)  # (3,)
    end = 0 if mean.mean() >= _DARK else 255
    floor = mean + rng.uniform(*depth) * (end - mean)
    y, x = np.nonzero(mask)
    lit = np.cos(np.arctan2(y - centre[0], x - centre[1]) - rng.uniform(0, 2 * math.pi))  # (n,)
    edge = mean + (rng.uniform(*contrast) + image[mask].std() / 2) * lit[:, None]  # (n, 3)
    sunk = smooth(np.clip((inward[mask] - rng.uniform(*rim)) * size / 2 + 0.5, 0, 1))[:, None]
    return blend(image, mask, weight[mask], edge + sunk * (floor - edge)), mask


def _curve(
    shape: tuple[int, int], length: float, bend: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points (s, 2) half a pixel apart on a wavering arc with its middle in the image, and the strength (s,) there."""
    t = np.linspace(-1, 1, 2 * math.ceil(length) + 1)  # an odd number, so that the middle itself is a point
    angle, wave, phase = rng.uniform(0, 2 * math.pi), rng.uniform(1, 3), rng.uniform(0, 2 * math.pi)
    tangent = np.array([math.sin(angle), math.cos(angle)])
    waver = 0.02 * (np.sin(math.pi * wave * t + phase) - math.sin(phase))
    across = length * (rng.uniform(-bend, bend) * t**2 + waver)
    points = inner_point(shape, rng) + t[:, None] * length / 2 * tangent
    strength = (1 - t**4) * (0.8 + 0.2 * np.cos(math.pi * rng.uniform(2, 6) * t))
    return points + across[:, None] * np.array([tangent[1], -tangent[0]]), strength


def _stroke(shape: tuple[int, int], points: np.ndarray, strength: np.ndarray, radius: float) -> np.ndarray:
    """The line through points (s, 2) as a soft shape (h, w) in 0..1 that is zero beyond `radius` pixels."""
    reach = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    nearest = np.rint(points).astype(int)
    y, x = nearest[:, 0, None, None] + reach[:, None], nearest[:, 1, None, None] + reach  # (s, r, 1), (s, 1, r)
    squared = (y - points[:, 0, None, None]) ** 2 + (x - points[:, 1, None, None]) ** 2  # (s, r, r)
    value = strength[:, None, None] * np.clip(1 - squared / radius**2, 0, None)
    inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    result = np.zeros(shape[0] * shape[1])
    np.maximum.at(result, (y * shape[1] + x)[inside], value[inside])
    return result.reshape(shape)
