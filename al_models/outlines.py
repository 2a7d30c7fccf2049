"""The regions of a map above a threshold: boxes and polygons that other programs draw.

Coordinates are those of pixel edges, as COCO has them: x runs right and y down, and the pixel in the upper left corner
reaches from 0 to 1 on both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours

from al_models.metrics.regions import EIGHT_CONNECTED

_TOLERANCE_PX = 0.5
"""Largest distance of a polygon from the region's edge, in pixels."""


@dataclass(frozen=True)
class Region:
    """An 8-connected region of pixels above the threshold."""

    box: tuple[int, int, int, int]
    """x, y, width, height: the smallest box around it."""
    polygon: list[tuple[float, float]]
    """Corners (x, y) of its outer edge, at least three, not closed; holes are not cut out."""
    area: int
    """Number of its pixels, without holes."""
    share: float
    """`area` as a share of the image."""
    score: float
    """The highest value of the map in it."""


def regions_above(values: np.ndarray, threshold: float) -> list[Region]:
    """The regions of a map [h, w], the highest first."""
    labels, _ = ndimage.label(values > threshold, EIGHT_CONNECTED)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == number
        area = int(inside.sum())
        found.append(
            Region(
                box=(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start),
                polygon=_polygon(inside, columns.start, rows.start),
                area=area,
                share=area / values.size,
                score=float(values[rows, columns][inside].max()),
            )
        )
    return sorted(found, key=lambda region: (-region.score, region.box))


def _polygon(inside: np.ndarray, x: int, y: int) -> list[tuple[float, float]]:
    """The outer edge of a region that touches all sides of its box, whose upper left corner is (x, y)."""
    contours = find_contours(np.pad(inside, 1).astype(np.uint8), 0.5, fully_connected="high")
    outer = min(contours, key=lambda contour: float(contour[:, 0].min()))  # holes begin below its upper edge
    corners = approximate_polygon(outer, _TOLERANCE_PX)[:-1]
    if len(corners) < 3:
        corners = outer[:-1]
    return [(round(float(c) - 0.5 + x, 2), round(float(r) - 0.5 + y, 2)) for r, c in corners]
