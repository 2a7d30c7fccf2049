"""How far the cells of a backbone's layers lie beside what they answer to.

A convolution of stride 2 pads one side more than the other, and its weights have learned to make up for some of it: in
images of 256 pixels, cells of EfficientNet-Lite0's layers answer to what lies 0.8, 0.2 and 1.8 pixels beside them; in
some of 227 pixels 0.4, 2.6 and 4.6. A map drawn from them lies beside the defect by as much. So the offset of each
layer is measured, by what bright, dark and noisy squares in a cloudy texture change, and maps are drawn where the
cells' images lie (`parts/maps.py`). Moving the features themselves was tried: between two cells they are blurred, and
moved by half the way only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

PROBES = 24
"""Squares that the offset is the mean of: it is then known to 0.1 pixels at stride 4, to 0.3 at stride 16."""
SQUARE = 12
"""Side of a square, in pixels."""
PERIOD = 64
"""Sides of images that differ by this are padded alike, at strides up to 32."""
_SIDE = 192
_SPREAD = 32
"""Pixels over which the squares' places are spread: the stride of the coarsest usual layer."""

Offset = tuple[float, float]
"""How far below and right of what they answer to cells lie, in pixels of the image."""


@torch.no_grad()
def measured_offsets(features: Callable[[Tensor], Mapping[int, Tensor]], side: int) -> dict[int, Offset]:
    """The offset of each layer in images of `side` pixels: where the centre of mass of the squared change lies that a
    square brings, the mean over `PROBES` squares.

    `features`: uint8 (n, side, side, 3) -> key -> (n, c, h, w).
    """
    images, centres = _probes(side)
    offsets = {}
    for key, layer in features(images.flatten(0, 1)).items():
        own = layer.cpu().double().unflatten(0, images.shape[:2])  # (textures, 1 + squares, c, h, w)
        change = (own[:, 1:] - own[:, :1]).square().sum(2).flatten(0, 1)  # (PROBES, h, w)
        places = (torch.arange(change.shape[-1], dtype=torch.float64) + 0.5) * (side / change.shape[-1])
        along = torch.stack([change.sum(2) @ places, change.sum(1) @ places], dim=1)  # (PROBES, 2)
        down, right = (along / change.sum((1, 2))[:, None] - centres).mean(0).tolist()
        offsets[key] = down, right
    return offsets


def probe_side(side: int) -> int:
    """A small side of images that are padded as those of `side` pixels are."""
    return _SIDE + side % PERIOD


def _probes(side: int) -> tuple[Tensor, Tensor]:
    """Two textures, each with copies that a square was put into, and where: uint8 (2, 1 + squares, side, side, 3), and
    float64 (2 * squares, 2), the centres in pixels."""
    rng = np.random.default_rng(0)
    clouds = sum(s * gaussian_filter(rng.standard_normal((2, side, side, 3)), (0, s, s, 0)) for s in (1, 2, 4))
    textures = np.clip(128 + 25 * clouds / clouds.std(), 0, 255).astype(np.uint8)
    squares = PROBES // 2
    images = np.repeat(textures[:, None], 1 + squares, axis=1)
    spread = np.stack([rng.permutation(squares) for _ in range(4)], axis=1).reshape(squares, 2, 2) * _SPREAD // squares
    corners = spread.transpose(1, 0, 2) + (side - _SPREAD - SQUARE) // 2  # (2, squares, 2)
    for own, where in zip(images, corners, strict=True):
        for kind, (image, (y, x)) in enumerate(zip(own[1:], where, strict=True)):
            square = image[y : y + SQUARE, x : x + SQUARE]
            square[:] = (255, 0, rng.integers(0, 256, square.shape))[kind % 3]
    return torch.from_numpy(images), torch.from_numpy(corners.reshape(-1, 2) + SQUARE / 2)
