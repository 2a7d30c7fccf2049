"""Textures that defects are made of: out of a good image, generated, and augmented as DRAEM's authors do."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.ndimage import affine_transform, map_coordinates, uniform_filter
from scipy.spatial import cKDTree

from al_models.parts.defects.canvas import colour_matrix, is_grey
from al_models.parts.defects.perlin import perlin_noise

_TONES: tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], ...] = (
    lambda values, rng: 255 * (values / 255) ** rng.uniform(0.5, 2),  # gamma
    lambda values, rng: values * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30),  # brightness
    lambda values, rng: 128 + (values - 128) * rng.uniform(0.5, 1.5),  # contrast
    lambda values, rng: np.where(values > rng.uniform(32, 128), 255 - values, values),  # solarize
    lambda values, rng: values - values % rng.choice([16, 32, 64]),  # posterize
    lambda values, rng: 255 - values,  # invert
)


def flipped_and_shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image flipped at random and shifted around its edges; uint8 (h, w, 3)."""
    flips = tuple(slice(None, None, int(step)) for step in rng.choice([-1, 1], 2))
    shift = [int(rng.integers(side // 4, side - side // 4)) for side in image.shape[:2]]
    return np.roll(image[flips], shift, axis=(0, 1))


def made_texture(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image flipped, shifted around its edges and seen through three random changes of tone; uint8 (h, w, 3)."""
    moved = flipped_and_shifted(image, rng)
    tones = np.arange(256.0)
    for index in rng.choice(len(_TONES), 3, replace=False):
        tones = np.clip(_TONES[index](tones, rng), 0, 255)
    return np.rint(tones).astype(np.uint8)[moved]


def texture_bank(count: int, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Generated textures, uint8 (count, h, w, 3): what stands in for photographs of textures, such as those of DTD."""
    return np.stack([generated_texture(shape, np.random.default_rng([seed, i])) for i in range(count)])


def generated_texture(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Clouds, a weave, cells or grain in random colours; uint8 (h, w, 3)."""
    families = (_clouds, _weave, _cells, _grain)
    values = families[int(rng.integers(len(families)))](shape, rng)  # (h, w)
    low, high = np.quantile(values, (0.01, 0.99))
    values = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    colours = rng.uniform(0, 255, (int(rng.integers(2, 6)), 3))
    grey = colours.mean(axis=1, keepdims=True)
    colours = grey + rng.uniform(0, 1) * (colours - grey)  # as photographs: of every saturation
    stops = np.linspace(0, 1, len(colours))
    result = np.stack([np.interp(values, stops, colours[:, c]) for c in range(3)], -1)
    result += rng.normal(0, rng.uniform(0, 12), (*shape, 1))
    return np.rint(np.clip(result, 0, 255)).astype(np.uint8)


def _clouds(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Perlin noise of several scales; the larger the scale, the stronger."""
    first, gain = int(rng.integers(1, 5)), rng.uniform(0.4, 0.9)
    layers = [gain**k * perlin_noise(shape, (first * 2**k, first * 2**k), rng) for k in range(5)]
    return np.abs(sum(layers)) if rng.random() < 0.5 else np.sum(layers, axis=0)


def _weave(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """One or two sets of wavering stripes across each other."""
    y, x = np.mgrid[: shape[0], : shape[1]] / min(shape)
    waver = rng.uniform(0, 1.5) * perlin_noise(shape, (3, 3), rng)
    angle, values = rng.uniform(0, math.pi), np.zeros(shape)
    for turn in (0, rng.uniform(0.3, 0.5) * math.pi)[: int(rng.integers(1, 3))]:
        along = math.cos(angle + turn) * y + math.sin(angle + turn) * x
        values += np.sin(2 * math.pi * rng.uniform(4, 40) * along + waver)
    return values


def _cells(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Distance to the nearest of random points, or how much farther the second nearest is: bubbles, or cracked mud."""
    points = rng.uniform(0, 1, (int(rng.integers(20, 400)), 2)) * shape
    near = cKDTree(points).query(np.argwhere(np.ones(shape, bool)), k=2)[0].reshape(*shape, 2)
    return near[..., 0] if rng.random() < 0.5 else near[..., 1] - near[..., 0]


def _grain(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise whose strength falls with a power of the frequency, stretched along one direction."""
    v, u = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    angle, stretch = rng.uniform(0, math.pi), math.exp(rng.uniform(0, 2.5))
    across, along = math.cos(angle) * v - math.sin(angle) * u, math.sin(angle) * v + math.cos(angle) * u
    strength = (1e-4 + across**2 + (stretch * along) ** 2) ** (-rng.uniform(0.2, 1.0))
    return np.fft.irfft2(np.fft.rfft2(rng.normal(size=shape)) * strength, s=shape)


def turned(values: np.ndarray, degrees: float) -> np.ndarray:
    """Values (h, w) turned about the middle of the image; zero is what comes in from outside."""
    turn, middle = _turn(degrees), (np.array(values.shape) - 1) / 2
    return affine_transform(values, turn, middle - turn @ middle, order=1)


def augmented(texture: np.ndarray, mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Colours (n, 3) of a texture (h, w, 3) at the pixels of the mask, after `count` of ten random changes.

    The changes: gamma, brightness, sharpness, hue and saturation, solarize, posterize, invert, automatic contrast,
    equalized histogram, a turn by up to 45 degrees. They are applied in random order but for the turn, which is the
    last and is computed at the pixels of the mask alone. A grey texture stays grey.
    """
    pixels, turn = texture, None
    for index in rng.choice(len(_CHANGES) + 1, min(count, len(_CHANGES) + 1), replace=False):
        if index == len(_CHANGES):
            turn = _turn(rng.uniform(-45, 45))
        else:
            pixels = _CHANGES[index](pixels, rng)
    if turn is None:
        return pixels[mask]
    middle = (np.array(mask.shape) - 1) / 2
    places = turn @ (np.argwhere(mask) - middle).T + middle[:, None]  # (2, n)
    return np.stack([map_coordinates(pixels[..., c], places, float, order=1, mode="mirror") for c in range(3)], -1)


def _turn(degrees: float) -> np.ndarray:
    angle = math.radians(degrees)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""uint8 (h, w, 3) -> uint8 (h, w, 3)."""
_LEVELS = np.arange(256.0)


def _through(pixels: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Each pixel's new value by its old one: tones (256,), or (3, 256) for the channels."""
    table = np.rint(np.clip(tones, 0, 255)).astype(np.uint8)
    return np.take(table, pixels) if table.ndim == 1 else np.stack([table[c][pixels[..., c]] for c in range(3)], -1)


def _gamma(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    powers = rng.uniform(0.5, 2, 1 if is_grey(pixels) else 3)
    return _through(pixels, np.squeeze(255 * (_LEVELS / 255) ** powers[:, None]))


def _brightness(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _through(pixels, _LEVELS * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30))


def _sharpness(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soft = uniform_filter(pixels, (3, 3, 1)).astype(np.float32)
    return np.clip(soft + np.float32(rng.uniform(0.1, 1.9)) * (pixels - soft), 0, 255).astype(np.uint8)


def _hue_and_saturation(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    matrix = colour_matrix(rng.uniform(0.6, 1.4), math.radians(rng.uniform(-70, 70)))
    return np.clip(pixels.astype(np.float32) @ matrix.T.astype(np.float32) + 0.5, 0, 255).astype(np.uint8)


def _solarize(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _through(pixels, np.where(rng.uniform(32, 128) <= _LEVELS, 255 - _LEVELS, _LEVELS))


def _posterize(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _through(pixels, _LEVELS - _LEVELS % 2 ** int(rng.integers(1, 8)))


def _invert(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 255 - pixels


def _auto_contrast(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stretched over all levels but for the darkest and brightest pixels, up to 10 % each."""
    cut = rng.uniform(0, 0.1)
    shares = _shares(pixels)  # (3, 256)
    low, high = (shares > cut).argmax(axis=1), (shares >= 1 - cut).argmax(axis=1)  # (3,)
    return _through(pixels, 255 * (_LEVELS - low[:, None]) / np.maximum(high - low, 1)[:, None])


def _equalize(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _through(pixels, 255 * _shares(pixels))


def _shares(pixels: np.ndarray) -> np.ndarray:
    """Share of the pixels at or below each level, (3, 256)."""
    counts = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)])
    return counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True)


_CHANGES: tuple[Change, ...] = (
    _gamma,
    _brightness,
    _sharpness,
    _hue_and_saturation,
    _solarize,
    _posterize,
    _invert,
    _auto_contrast,
    _equalize,
)
