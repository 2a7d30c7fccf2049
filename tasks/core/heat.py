"""Heat colours, outlines and pictures inside a page: pixels in, pixels out."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Inferno-like: lightness rises evenly from black to pale yellow, so more anomalous is lighter, also in grey print.
HEAT = ((0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
        (249, 201, 50), (252, 255, 164))  # fmt: skip
OUTLINE = (0, 229, 255)
"""The annotated defect: a hue the heat colours do not have."""
FLAGGED = (255, 255, 255)
"""What the method flags: map above the pixel threshold."""


@dataclass(frozen=True)
class Scale:
    """Map values at the two ends of the heat colours; the same for all pictures of a cell."""

    low: float
    high: float
    threshold: float | None
    words: str
    """Where the two ends come from."""


def heat_colours(strength: np.ndarray) -> np.ndarray:
    """Colours of 0..1: (h, w) -> float32 (h, w, 3) in 0..255."""
    anchors = np.linspace(0.0, 1.0, len(HEAT))
    channels = [np.interp(strength, anchors, [colour[c] for colour in HEAT]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)  # (h, w, 3)


def overlay(pixels: np.ndarray, values: np.ndarray, scale: Scale) -> np.ndarray:
    """The heat-map over the grey image: uint8 (h, w, c), float (h, w) -> uint8 (h, w, 3).

    The part stays visible: the colours cover it by half where nothing is wrong and by three quarters at most.
    """
    strength = np.clip((values - scale.low) / (scale.high - scale.low), 0.0, 1.0)  # (h, w)
    grey = rgb(pixels).mean(axis=-1, keepdims=True)  # (h, w, 1)
    cover = 0.5 + 0.25 * strength[..., None]
    return np.rint((1 - cover) * grey + cover * heat_colours(strength)).astype(np.uint8)


def contour(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels just outside a mask, so that the line hides nothing of the defect: bool (h, w)."""
    inside = mask.astype(bool)
    grown = inside
    for _ in range(thickness):
        padded = np.pad(grown, 1)
        grown = grown | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~inside


def rgb(pixels: np.ndarray) -> np.ndarray:
    """A copy with three channels: uint8 (h, w, 1 or 3) -> uint8 (h, w, 3)."""
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels.copy()


def nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size, (width, height): bool."""
    resized = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(resized).astype(bool)


def shrunk(pixels: np.ndarray, side: int) -> Image.Image:
    """A picture, `side` pixels wide and high at most."""
    picture = Image.fromarray(pixels)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def data_url(picture: Image.Image, quality: int = 80) -> str:
    """A picture as a JPEG inside the page; colour is not subsampled, which would blur the thin lines."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def png(picture: Image.Image, optimize: bool = True) -> bytes:
    """The bytes of a PNG file; a photograph takes some percent more without `optimize`, and a tenth of the time."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=optimize, compress_level=1)
    return buffer.getvalue()
