"""Defects cut from an image and pasted into another place."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import map_coordinates

from al_models.parts.defects.canvas import Interval, blend, centre_within, checked, colour_matrix, log_uniform, scale


def cut_paste(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    donor: np.ndarray | None = None,
    area: Interval = (0.02, 0.15),
    aspect: Interval = (0.3, 3.3),
    rotation: float = 45.0,
    jitter: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Paste a rectangle cut elsewhere, turned and recoloured.

    `donor` is the image to cut from (uint8, any size), else the image itself. `area` is the patch's share of the image,
    `aspect` its height over width, drawn evenly in its logarithm so that tall and wide are alike. `rotation` is the
    largest turn to either side in degrees, `jitter` the largest relative change of brightness, contrast and saturation
    and, as a share of the colour circle, of hue. With `rotation=0, jitter=0` the patch is an unchanged copy.

    Raises InvalidInput. Source: Li et al. 2021, CutPaste, arXiv:2104.04015.
    """
    h, w = checked(image).shape[:2]
    pixels = rng.uniform(*area) * h * w
    ratio = log_uniform(aspect, rng)
    sides = (math.sqrt(pixels * ratio), math.sqrt(pixels / ratio))
    return _paste(image, image if donor is None else donor, sides, rotation, jitter, rng)


def scar(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    donor: np.ndarray | None = None,
    width: Interval = (2.0, 16.0),
    length: Interval = (10.0, 25.0),
    rotation: float = 45.0,
    jitter: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Paste a thin rectangle cut elsewhere, turned and recoloured; `width` and `length` in pixels.

    Raises InvalidInput. Source: CutPaste-Scar of Li et al. 2021, arXiv:2104.04015.
    """
    grown = scale(checked(image))
    sides = (rng.uniform(*length) * grown, rng.uniform(*width) * grown)
    return _paste(image, image if donor is None else donor, sides, rotation, jitter, rng)


def _paste(
    image: np.ndarray,
    donor: np.ndarray,
    sides: tuple[float, float],
    rotation: float,
    jitter: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Fill a turned rectangle with pixels that were cut upright; each is looked up, so no corner stays empty."""
    (h, w), room = image.shape[:2], checked(donor, "donor").shape[:2]
    height, width = (int(np.clip(round(side), 2, min(room[i], image.shape[i]))) for i, side in enumerate(sides))
    angle = math.radians(rng.uniform(-rotation, rotation))
    cos, sin = math.cos(angle), math.sin(angle)
    cy = centre_within(math.ceil(height * abs(cos) + width * abs(sin)), h, rng)
    cx = centre_within(math.ceil(height * abs(sin) + width * abs(cos)), w, rng)
    y, x = np.arange(h)[:, None] - cy, np.arange(w)[None, :] - cx
    down, right = cos * y - sin * x, sin * y + cos * x  # (h, w): the patch's own axes, from its centre
    mask = (np.abs(down) <= height / 2) & (np.abs(right) <= width / 2)
    source = [centre_within(height, room[0], rng) + down[mask], centre_within(width, room[1], rng) + right[mask]]
    patch = np.stack([map_coordinates(donor[..., c], source, float, order=1, mode="nearest") for c in range(3)], -1)
    return blend(image, mask, np.ones(len(patch)), _jittered(patch, jitter, rng)), mask


def _jittered(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Colours (n, 3) with another brightness, contrast, saturation and hue; grey stays grey."""
    brightness, contrast, saturation = 1 + rng.uniform(-amount, amount, 3)
    hue = 2 * math.pi * rng.uniform(-amount, amount)
    turn = colour_matrix(saturation, hue)
    bright = np.clip(pixels * brightness, 0, 255)
    return (bright.mean() + contrast * (bright - bright.mean())) @ turn.T
