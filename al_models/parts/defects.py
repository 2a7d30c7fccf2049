"""Synthetic defects with exact masks, for methods that learn from them and for the demo data.

Each defect takes an image and a generator and gives `(image, mask)`: uint8 (h, w, 3) and bool (h, w). The mask is
exactly the set of pixels that may differ from the given image; it is never empty, and nothing changes outside of it.
The given image is never written to, and every random choice comes from the generator: an equal seed, an equal defect.
Lengths in pixels are meant for a shorter side of 256 and grow with the image.

Shape letters: h x w pixels of the image, n pixels of the mask, p x q cells of the noise, s samples along a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from scipy.ndimage import map_coordinates

from al_models.errors import InvalidInput

Defect = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
Interval = tuple[float, float]

MIN_SIDE = 32
_VISIBLE = 0.1  # a fainter share of the new colour is rounded away or lost in noise: such pixels stay as they were


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
    h, w = _checked(image).shape[:2]
    pixels = rng.uniform(*area) * h * w
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
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
    scale = _scale(_checked(image))
    sides = (rng.uniform(*length) * scale, rng.uniform(*width) * scale)
    return _paste(image, image if donor is None else donor, sides, rotation, jitter, rng)


def perlin_composite(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    texture: np.ndarray | None = None,
    cells: Sequence[int] = (1, 2, 4, 8, 16, 32),
    threshold: float = 0.5,
    opacity: Interval = (0.1, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Blend another texture in where Perlin noise exceeds a threshold.

    `texture` is uint8, at least as large as the image (a random crop is used); without it one is made from the image
    itself. `cells` are the numbers of noise cells a side to choose from, height and width apart; cells of less than
    four pixels are left out. `opacity` is the weight of the texture, the paper's beta. Unlike in the paper's code the
    noise is not turned, and where it stays below the threshold its highest parts count: there is always a defect.

    Raises InvalidInput. Source: Zavrtanik et al. 2021, DRAEM, arXiv:2108.07610, simulated anomaly generation.
    """
    h, w = _checked(image).shape[:2]
    source = _made_texture(image, rng) if texture is None else _crop(texture, (h, w), rng)
    usable = [n for n in cells if n * 4 <= min(h, w)] or [1]
    noise = perlin_noise((h, w), (int(rng.choice(usable)), int(rng.choice(usable))), rng)  # (h, w)
    mask = noise >= min(threshold, 0.8 * noise.max())
    return _blend(image, mask, np.full(int(mask.sum()), rng.uniform(*opacity)), source[mask]), mask


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
    h, w = _checked(image).shape[:2]
    radius = max(1.5, rng.uniform(*width) / 2 * _scale(image))
    points, strength = _curve((h, w), rng.uniform(*length) * min(h, w), bend, rng)  # (s, 2), (s,)
    return _recolour(image, _stroke((h, w), points, strength, radius), contrast, opacity, 0.0, rng)


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
    h, w = _checked(image).shape[:2]
    half_axes = np.maximum(3.0, rng.uniform(*radius, size=2) * min(h, w))
    centre = _inner_point((h, w), rng)
    depth = _blob((h, w), centre, half_axes, min(irregularity, 0.49), rng) / rng.uniform(*softness)  # (h, w)
    return _recolour(image, _smooth(np.clip(depth, 0, 1)), contrast, opacity, tint, rng)


DEFECTS: Mapping[str, Defect] = MappingProxyType(
    {"cut_paste": cut_paste, "scar": scar, "perlin_composite": perlin_composite, "scratch": scratch, "stain": stain}
)
"""Every defect by its name, callable as `(image, rng)`."""


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


def _checked(image: np.ndarray, what: str = "image") -> np.ndarray:
    given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InvalidInput(f"the {what} is {given}; a defect needs a uint8 array [h, w, 3]: convert it to 8-bit RGB")
    if min(image.shape[:2]) < MIN_SIDE:
        raise InvalidInput(f"the {what} is {given}; a defect needs sides of at least {MIN_SIDE} pixels: enlarge it")
    return image


def _scale(image: np.ndarray) -> float:
    return min(image.shape[:2]) / 256


def _blend(image: np.ndarray, mask: np.ndarray, weight: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """A copy of the image with its masked pixels moved towards a colour: weight (n,), colour (n, 3) or (3,)."""
    old = image[mask].astype(np.float64)  # (n, 3)
    result = image.copy()
    result[mask] = np.rint(np.clip(old + weight[:, None] * (colour - old), 0, 255)).astype(np.uint8)
    return result


def _recolour(
    image: np.ndarray,
    shape: np.ndarray,
    contrast: Interval,
    opacity: Interval,
    tint: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Move the pixels of a soft shape, (h, w) in 0..1, towards a colour brighter or darker than their mean."""
    weight = shape * rng.uniform(*opacity)
    mask = weight >= _VISIBLE
    mean = image[mask].mean(axis=0)  # (3,)
    change = rng.uniform(*contrast) + image[mask].std()  # on a rough texture a small difference would be lost
    sign = rng.choice([-1, 1])
    room = 255 - mean.mean() if sign > 0 else mean.mean()
    sign = sign if room >= change else -sign  # white on white would be no defect
    return _blend(image, mask, weight[mask], mean + sign * change + rng.uniform(-tint, tint, 3)), mask


def _paste(
    image: np.ndarray,
    donor: np.ndarray,
    sides: tuple[float, float],
    rotation: float,
    jitter: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Fill a turned rectangle with pixels that were cut upright; each is looked up, so no corner stays empty."""
    (h, w), room = image.shape[:2], _checked(donor, "donor").shape[:2]
    height, width = (int(np.clip(round(side), 2, min(room[i], image.shape[i]))) for i, side in enumerate(sides))
    angle = math.radians(rng.uniform(-rotation, rotation))
    cos, sin = math.cos(angle), math.sin(angle)
    cy = _centre(math.ceil(height * abs(cos) + width * abs(sin)), h, rng)
    cx = _centre(math.ceil(height * abs(sin) + width * abs(cos)), w, rng)
    y, x = np.arange(h)[:, None] - cy, np.arange(w)[None, :] - cx
    down, right = cos * y - sin * x, sin * y + cos * x  # (h, w): the patch's own axes, from its centre
    mask = (np.abs(down) <= height / 2) & (np.abs(right) <= width / 2)
    source = [_centre(height, room[0], rng) + down[mask], _centre(width, room[1], rng) + right[mask]]
    patch = np.stack([map_coordinates(donor[..., c], source, float, order=1, mode="nearest") for c in range(3)], -1)
    return _blend(image, mask, np.ones(len(patch)), _jittered(patch, jitter, rng)), mask


def _centre(length: int, room: int, rng: np.random.Generator) -> float:
    """Centre of a whole number of pixels placed at random within `room`, or in its middle when they do not fit."""
    free = room - length
    return (rng.integers(free + 1) if free > 0 else free // 2) + (length - 1) / 2


def _jittered(pixels: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Colours (n, 3) with another brightness, contrast, saturation and hue; grey stays grey."""
    brightness, contrast, saturation = 1 + rng.uniform(-amount, amount, 3)
    hue = 2 * math.pi * rng.uniform(-amount, amount)
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = grey + saturation * (math.cos(hue) * (np.eye(3) - grey) + math.sin(hue) * cross)  # about the grey axis
    bright = np.clip(pixels * brightness, 0, 255)
    return (bright.mean() + contrast * (bright - bright.mean())) @ turn.T


_TONES: tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], ...] = (
    lambda values, rng: 255 * (values / 255) ** rng.uniform(0.5, 2),  # gamma
    lambda values, rng: values * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30),  # brightness
    lambda values, rng: 128 + (values - 128) * rng.uniform(0.5, 1.5),  # contrast
    lambda values, rng: np.where(values > rng.uniform(32, 128), 255 - values, values),  # solarize
    lambda values, rng: values - values % rng.choice([16, 32, 64]),  # posterize
    lambda values, rng: 255 - values,  # invert
)


def _made_texture(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image flipped, shifted around its edges and seen through three random changes of tone; uint8 (h, w, 3)."""
    flips = tuple(slice(None, None, int(step)) for step in rng.choice([-1, 1], 2))
    shift = [int(rng.integers(side // 4, side - side // 4)) for side in image.shape[:2]]
    tones = np.arange(256.0)
    for index in rng.choice(len(_TONES), 3, replace=False):
        tones = np.clip(_TONES[index](tones, rng), 0, 255)
    return np.rint(tones).astype(np.uint8)[np.roll(image[flips], shift, axis=(0, 1))]


def _crop(texture: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    free = [have - need for have, need in zip(_checked(texture, "texture").shape, shape, strict=False)]
    if min(free) < 0:
        raise InvalidInput(
            f"the texture is {texture.shape[0]} x {texture.shape[1]} pixels and the image {shape[0]} x {shape[1]}; "
            "give a texture at least as large as the image, or resize it"
        )
    top, left = (int(rng.integers(room + 1)) for room in free)
    return texture[top : top + shape[0], left : left + shape[1]]


def _inner_point(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A place (2,) in the inner 80 % of the image: at the very edge most of a defect would be cut off."""
    return rng.uniform(0.1, 0.9, 2) * (np.array(shape) - 1)


def _curve(
    shape: tuple[int, int], length: float, bend: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points (s, 2) half a pixel apart on a wavering arc with its middle in the image, and the strength (s,) there."""
    t = np.linspace(-1, 1, 2 * math.ceil(length) + 1)  # an odd number, so that the middle itself is a point
    angle, wave, phase = rng.uniform(0, 2 * math.pi), rng.uniform(1, 3), rng.uniform(0, 2 * math.pi)
    tangent = np.array([math.sin(angle), math.cos(angle)])
    waver = 0.02 * (np.sin(math.pi * wave * t + phase) - math.sin(phase))
    across = length * (rng.uniform(-bend, bend) * t**2 + waver)
    points = _inner_point(shape, rng) + t[:, None] * length / 2 * tangent
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


def _blob(
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


def _smooth(values: np.ndarray) -> np.ndarray:
    """Values in 0..1, with level ends."""
    return values * values * (3 - 2 * values)
