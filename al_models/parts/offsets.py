"""Offsets of a backbone's layers: how far their cells lie beside the image content that they respond to.

A convolution of stride 2 pads one side more than the other, and its weights have learned to make up for some of it. So
a cell of a layer responds most to content some pixels beside its own place, and a map drawn at the cells' places lies
beside the defect by as much. Therefore the offset of each layer is measured: bright, dark and noisy squares are put
into a cloudy texture, and the features' change is compared with the squares' places. Maps are then drawn where the
cells respond (`parts/maps.py`). Moving the features themselves would blur them between two cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

PROBES = 24
"""Squares over which an offset is averaged; it is then known to 0.1 pixels at stride 4, to 0.3 at stride 16."""
SQUARE = 12
"""Side of a square, in pixels."""
PERIOD = 64
"""Sides of images that differ by this are padded alike, at strides up to 32."""
_SIDE = 192
_SPREAD = 32
"""Pixels over which the squares' places are spread: the stride of the coarsest usual layer."""

Offset = tuple[float, float]
"""How far below and right of the content that they respond to cells lie, in pixels of the image."""


@torch.no_grad()
def measured_offsets(features: Callable[[Tensor], Mapping[int, Tensor]], side: int) -> dict[int, Offset]:
    """The offset of each layer in images of `side` pixels: from a square's centre to the centre of mass of the squared
    change that it brings to the layer, mean over `PROBES` squares.

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
    """The side of small images that are padded as images of `side` pixels are."""
    return _SIDE + side % PERIOD


def _probes(side: int) -> tuple[Tensor, Tensor]:
    """Two textures, each followed by copies with a square in them, uint8 (2, 1 + squares, side, side, 3); and the
    squares' centres in pixels, float64 (2 * squares, 2)."""
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
