"""From patch scores to an anomaly map at image size: bilinear upsampling and Gaussian smoothing as one product.

Both are linear and separable, so the two together are one matrix A of (size, grid): map = A @ patches @ A.T. It is
exact, borders included: the smoothing is scipy's `gaussian_filter` (mode `reflect`), which PaDiM, SPADE and PatchCore
published with (sigma 4), and the upsampling is torch's `interpolate` (bilinear, align_corners=False).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from al_models.parts.offsets import Offset

SIGMA = 4.0


def to_maps(patches: Tensor, size: int, sigma: float = SIGMA, offset: Offset = (0.0, 0.0)) -> Tensor:
    """Patch scores (n, h, w) -> smoothed maps float32 (n, size, size).

    Both in pixels of the map: `sigma` of the smoothing, 0 for none; `offset` (`parts/offsets.py`), how far below and
    right of the image content that they respond to the patches lie, which is undone.
    """
    rows = _operator(patches.shape[1], size, sigma, offset[0]).to(patches.device)
    columns = _operator(patches.shape[2], size, sigma, offset[1]).to(patches.device)
    return rows @ patches.float() @ columns.T


@lru_cache(maxsize=64)
def _operator(grid: int, size: int, sigma: float, offset: float) -> Tensor:
    """The matrix (size, grid) that upsamples a line of patches, moves it back by its offset, and smooths it."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5 + offset) * grid / size - 0.5
    distance = place.clamp(0, grid - 1)[:, None] - torch.arange(grid)
    upsample = (1 - distance.abs()).clamp(min=0).float()
    if sigma == 0:
        return upsample.contiguous()
    return torch.from_numpy(gaussian_filter1d(upsample.double().numpy(), sigma, axis=0).astype(np.float32))
