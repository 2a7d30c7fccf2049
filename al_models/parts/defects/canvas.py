"""What all defects are made with: checked images, blending, fills, places and outlines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from al_models.errors import InvalidInput

Defect = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
"""`(image, rng)` -> `(image, mask)`."""
Interval = tuple[float, float]
Fill = Literal["constant", "noise", "mean"] | int | None
"""What a region is filled with: one random colour, a random colour for each pixel, the mean colour of the image, or
this grey level; None draws `constant` or `noise`, which show on every image. A grey image is filled with grey."""

MIN_SIDE = 32
VISIBLE = 0.1
"""A fainter share of the new colour is rounded away or lost in noise: such pixels stay as they were."""
_APART = 40.0


def checked(image: np.ndarray, what: str = "image") -> np.ndarray:
    """The image itself; raises InvalidInput where it is not uint8 (h, w, 3) with sides of at least MIN_SIDE."""
    given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InvalidInput(f"the {what} is {given}; a defect needs a uint8 array [h, w, 3]: convert it to 8-bit RGB")
    if min(image.shape[:2]) < MIN_SIDE:
        raise InvalidInput(f"the {what} is {given}; a defect needs sides of at least {MIN_SIDE} pixels: enlarge it")
    return image


def chosen(images: Sequence[np.ndarray] | np.ndarray | None, rng: np.random.Generator) -> np.ndarray | None:
    """One of the images, None where there are none to choose from."""
    return None if images is None or len(images) == 0 else images[int(rng.integers(len(images)))]


def scale(image: np.ndarray) -> float:
    """How many times larger the image is than the 256 pixels that lengths are meant for."""
    return min(image.shape[:2]) / 256


def is_grey(image: np.ndarray) -> bool:
    """Whether the three channels are equal."""
    few = image[::8, ::8]  # enough to tell most colourful images
    return all(bool((part[..., :1] == part[..., 1:]).all()) for part in (few, image))


def blend(image: np.ndarray, mask: np.ndarray, weight: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """A copy of the image with its masked pixels moved towards a colour: weight (n,), colour (n, 3) or (3,)."""
    old = image[mask].astype(np.float64)  # (n, 3)
    result = image.copy()
    result[mask] = np.rint(np.clip(old + weight[:, None] * (colour - old), 0, 255)).astype(np.uint8)
    return result


def recolour(
    image: np.ndarray,
    shape: np.ndarray,
    contrast: Interval,
    opacity: Interval,
    tint: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Move the pixels of a soft shape, (h, w) in 0..1, towards a colour brighter or darker than their mean."""
    weight = shape * rng.uniform(*opacity)
    mask = weight >= VISIBLE
    mean = image[mask].mean(axis=0)  # (3,)
    change = rng.uniform(*contrast) + image[mask].std()  # on a rough texture a small difference would be lost
    sign = rng.choice([-1, 1])
    room = 255 - mean.mean() if sign > 0 else mean.mean()
    sign = sign if room >= change else -sign  # white on white would be no defect
    return blend(image, mask, weight[mask], mean + sign * change + rng.uniform(-tint, tint, 3)), mask


def fill_in(image: np.ndarray, mask: np.ndarray, fill: Fill, rng: np.random.Generator) -> np.ndarray:
    """A copy of the image with its masked pixels replaced. Raises InvalidInput for an unknown fill."""
    channels = 1 if is_grey(image) else 3
    if fill is None:
        fill = ("constant", "noise")[int(rng.integers(2))]
    colour: np.ndarray | int
    if fill == "constant":  # away from the mean underneath, counting on from white to black
        mean = image[mask].mean(axis=0)[:channels]  # (1,) or (3,)
        colour = ((mean + _APART + rng.uniform(0, 256 - 2 * _APART, channels)) % 256).astype(np.uint8)
    elif fill == "noise":
        colour = rng.integers(0, 256, (int(mask.sum()), channels), dtype=np.uint8)
    elif fill == "mean":
        colour = np.rint(image.mean(axis=(0, 1))).astype(np.uint8)
    elif isinstance(fill, int) and 0 <= fill <= 255:
        colour = fill
    else:
        raise InvalidInput(f"the fill is {fill!r}; give 'constant', 'noise', 'mean', a grey level 0 to 255, or None")
    result = image.copy()
    result[mask] = colour
    return result


def colour_matrix(saturation: float, hue: float) -> np.ndarray:
    """The matrix (3, 3) that turns colours about the grey axis, by radians, and scales their distance from it."""
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return grey + saturation * (math.cos(hue) * (np.eye(3) - grey) + math.sin(hue) * cross)


def inner_point(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A place (2,) in the inner 80 % of the image: at the very edge most of a defect would be cut off."""
    return rng.uniform(0.1, 0.9, 2) * (np.array(shape) - 1)


def centre_within(length: int, room: int, rng: np.random.Generator) -> float:
    """Centre of a whole number of pixels placed at random within `room`, or in its middle when they do not fit."""
    free = room - length
    return (rng.integers(free + 1) if free > 0 else free // 2) + (length - 1) / 2


def log_uniform(bounds: Interval, rng: np.random.Generator) -> float:
    """A ratio drawn evenly in its logarithm, so that tall and wide are alike."""
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))


def blob(
    shape: tuple[int, int], centre: np.ndarray, half_axes: np.ndarray, irregularity: float, rng: np.random.Generator
) -> np.ndarray:
    """Depth (h, w) inside a wavy ellipse: 1 at the centre, 0 on the outline, negative outside."""
    turn = rng.uniform(0, math.pi)
    y, x = np.arange(shape[0])[:, None] - centre[0], np.arange(shape[1])[None, :] - centre[1]
    down = (math.cos(turn) * y - math.sin(turn) * x) / half_axes[0]
    right = (math.sin(turn) * y + math.cos(turn) * x) / half_axes[1]
    angles = np.linspace(-math.pi, math.pi, 361)
    waves = np.arange(2, 8)[:, None]
    heights, phases = rng.normal(size=waves.shape) / waves**1.5, rng.uniform(0, 2 * math.pi, waves.shape)
    outline = (heights * np.cos(waves * angles + phases)).sum(axis=0)  # (361,)
    outline = 1 + irregularity * outline / np.abs(outline).max()  # (361,)
    return 1 - np.hypot(down, right) / np.interp(np.arctan2(down, right), angles, outline)


def blob_of_area(shape: tuple[int, int], area: Interval, irregularity: float, rng: np.random.Generator) -> np.ndarray:
    """A wavy ellipse (h, w) bool that covers about this share of the image, less where it reaches over an edge."""
    radius = math.sqrt(rng.uniform(*area) * shape[0] * shape[1] / math.pi)
    ratio = math.sqrt(log_uniform((0.5, 2.0), rng))
    half_axes = np.maximum(3.0, np.array([radius * ratio, radius / ratio]))
    return blob(shape, inner_point(shape, rng), half_axes, irregularity, rng) >= 0


def smooth(values: np.ndarray) -> np.ndarray:
    """Values in 0..1, with level ends."""
    return values * values * (3 - 2 * values)
