"""Defects that cover a region with noise, a colour or nothing at all: what inpainting and denoising methods repair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from al_models.errors import InvalidInput
from al_models.parts.defects.canvas import (
    Fill,
    Interval,
    blob_of_area,
    checked,
    fill_in,
    inner_point,
    is_grey,
    log_uniform,
    scale,
)


def noise(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    kind: Literal["gaussian", "salt_and_pepper"] | None = None,
    area: Interval | None = (0.02, 0.15),
    sigma: Interval = (20.0, 60.0),
    density: Interval = (0.1, 0.5),
) -> tuple[np.ndarray, np.ndarray]:
    """Add Gaussian noise, or salt and pepper, to a region.

    `kind` None draws one of the two. `area` is the region's share of the image, None the whole image. `sigma` is the
    standard deviation of Gaussian noise in grey levels, `density` the share of pixels that become black or white. The
    noise is the same in all channels of a grey image, and of salt and pepper always.

    Raises InvalidInput. Source: Mei et al. 2018, multi-scale denoising auto-encoders; Nakazawa and Kulkarni 2019.
    """
    shape = checked(image).shape[:2]
    mask = np.ones(shape, bool) if area is None else blob_of_area(shape, area, 0.4, rng)
    return noisy(image, mask, kind, sigma, density, rng), mask


def noisy(
    image: np.ndarray,
    mask: np.ndarray,
    kind: Literal["gaussian", "salt_and_pepper"] | None,
    sigma: Interval,
    density: Interval,
    rng: np.random.Generator,
) -> np.ndarray:
    """A copy of the image with noise in its masked pixels. Raises InvalidInput for an unknown kind."""
    if kind is None:
        kind = ("gaussian", "salt_and_pepper")[int(rng.integers(2))]
    old = image[mask]  # (n, 3)
    if kind == "gaussian":
        noise = rng.normal(0, rng.uniform(*sigma), (len(old), 1 if is_grey(image) else 3))
        new = np.rint(np.clip(old + noise, 0, 255)).astype(np.uint8)
    elif kind == "salt_and_pepper":
        drawn, share = rng.random((len(old), 1)), rng.uniform(*density)
        new = np.where(drawn < share / 2, 0, np.where(drawn < share, 255, old)).astype(np.uint8)
    else:
        raise InvalidInput(f"the kind of noise is {kind!r}; give 'gaussian', 'salt_and_pepper', or None for either")
    result = image.copy()
    result[mask] = new
    return result


def random_erase(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    area: Interval = (0.02, 0.2),
    aspect: Interval = (0.3, 3.3),
    fill: Fill = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Erase an upright rectangle; `area` is its share of the image, `aspect` its height over width.

    Raises InvalidInput. Source: Zhong et al. 2017, Random Erasing, arXiv:1708.04896, with up to half of its area.
    """
    h, w = checked(image).shape[:2]
    pixels, ratio = rng.uniform(*area) * h * w, log_uniform(aspect, rng)
    height = int(np.clip(round(math.sqrt(pixels * ratio)), 2, h))
    width = int(np.clip(round(math.sqrt(pixels / ratio)), 2, w))
    top, left = int(rng.integers(h - height + 1)), int(rng.integers(w - width + 1))
    mask = np.zeros((h, w), bool)
    mask[top : top + height, left : left + width] = True
    return fill_in(image, mask, fill, rng), mask


def random_region(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    area: Interval = (0.01, 0.12),
    outline: Literal["polygon", "blob"] | None = None,
    fill: Fill = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fill an irregular region: a jagged polygon or a wavy blob, None draws one of them.

    `area` is the region's share of the image, about, and less where the region reaches over an edge.

    Raises InvalidInput. Source: the erased shapes of Tayeh et al. 2020 and Li et al. 2020, as the survey's Fig. 12 b.
    """
    shape = checked(image).shape[:2]
    if outline is None:
        outline = ("polygon", "blob")[int(rng.integers(2))]
    if outline == "polygon":
        mask = _polygon(shape, area, rng)
    elif outline == "blob":
        mask = blob_of_area(shape, area, 0.45, rng)
    else:
        raise InvalidInput(f"the outline is {outline!r}; give 'polygon', 'blob', or None for either")
    return fill_in(image, mask, fill, rng), mask


def _polygon(shape: tuple[int, int], area: Interval, rng: np.random.Generator) -> np.ndarray:
    """A polygon (h, w) bool of 5 to 12 corners, each seen from its centre: at random distances, one in each sector."""
    count = int(rng.integers(5, 13))
    angles = (np.arange(count) + rng.uniform(0.1, 0.9, count)) * 2 * math.pi / count - math.pi
    radii = rng.uniform(0.35, 1, count)
    corners = np.column_stack([radii * np.sin(angles), radii * np.cos(angles)])  # (k, 2)
    following = np.roll(corners, -1, axis=0)
    doubled = np.abs(np.sum(corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]))
    size = math.sqrt(rng.uniform(*area) * shape[0] * shape[1] / (doubled / 2))
    centre = np.rint(inner_point(shape, rng))  # a pixel, which then is inside
    y, x = np.arange(shape[0])[:, None] - centre[0], np.arange(shape[1])[None, :] - centre[1]
    start = np.searchsorted(angles, np.arctan2(y, x)) - 1  # (h, w): the corner before; -1 is the last one
    down, right = (size * (following - corners)).T  # (k,): along the edge that begins at each corner
    offset = size * (right * corners[:, 0] - down * corners[:, 1])
    return right[start] * y - down[start] * x >= offset[start]


def grid_mask(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    cells: Sequence[int] = (4, 8, 16, 32),
    sets: int = 3,
    fill: Fill = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cover one in `sets` of the cells of a grid, at random; `cells` are the sides to choose from, in pixels.

    Raises InvalidInput. Source: Zavrtanik et al. 2021, RIAD (Reconstruction by inpainting), the survey's Fig. 12 c.
    """
    side = round(int(rng.choice(cells)) * scale(checked(image)))
    mask = disjoint_grid_masks(image.shape[:2], max(1, min(side, min(image.shape[:2]) // 4)), sets, rng)[0]
    return fill_in(image, mask, fill, rng), mask


def disjoint_grid_masks(shape: tuple[int, int], cell: int, sets: int, rng: np.random.Generator) -> np.ndarray:
    """Masks bool (sets, h, w) that cover each pixel once, cell by cell, each with nearly the same number of cells.

    Raises InvalidInput where there are fewer cells than sets.
    """
    rows, columns = -(-shape[0] // cell), -(-shape[1] // cell)
    if not 1 <= sets <= rows * columns:
        raise InvalidInput(
            f"{sets} disjoint masks of cells of {cell} pixels, and the image of {shape[0]} x {shape[1]} has "
            f"{rows * columns} cells; give 1 to {rows * columns} sets, or smaller cells"
        )
    drawn = (rng.permutation(rows * columns) % sets).reshape(rows, columns)
    whose = drawn.repeat(cell, axis=0).repeat(cell, axis=1)[: shape[0], : shape[1]]  # (h, w)
    return whose == np.arange(sets)[:, None, None]


def strips(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    widths: Sequence[float] = (2.0, 4.0, 8.0, 16.0, 32.0),
    share: Interval = (0.05, 0.35),
    angle: Interval = (0.0, 180.0),
    fill: Fill = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cover parallel strips of one width that run across the whole image.

    The image is divided into strips; `widths` are those to choose from in pixels, `share` is the share of the strips
    that are covered, at least one, and `angle` their direction in degrees, 0 for level and 90 for upright ones.

    Raises InvalidInput. Source: the multi-scale strip mask of Yan et al. 2021, as the survey's Fig. 12 d describes it.
    """
    h, w = checked(image).shape[:2]
    width = max(1.0, float(rng.choice(widths)) * scale(image))
    direction = math.radians(rng.uniform(*angle))
    y, x = np.arange(h)[:, None], np.arange(w)[None, :]
    across = math.cos(direction) * y + math.sin(direction) * x + rng.uniform(0, width)  # (h, w), from the strip's side
    strip = np.floor(across / width).astype(int)
    strip -= strip.min()
    there = np.flatnonzero(np.bincount(strip.ravel()) >= min(h, w) * width / 4)  # no mere corner of the image
    covered = rng.permutation(there if len(there) else [strip[h // 2, w // 2]])
    covered = covered[: max(1, round(rng.uniform(*share) * len(covered)))]
    mask = np.isin(strip, covered)
    return fill_in(image, mask, fill, rng), mask
