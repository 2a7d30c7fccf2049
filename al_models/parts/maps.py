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
from torch.nn import functional as F

SIGMA = 4.0


def to_maps(patches: Tensor, size: int, sigma: float = SIGMA) -> Tensor:
    """Patch scores (n, h, w) -> smoothed maps float32 (n, size, size). sigma in pixels of the map, 0 for none."""
    rows = _operator(patches.shape[1], size, sigma).to(patches.device)
    columns = _operator(patches.shape[2], size, sigma).to(patches.device)
    return rows @ patches.float() @ columns.T


@lru_cache(maxsize=16)
def _operator(grid: int, size: int, sigma: float) -> Tensor:
    """(size, grid): upsample a line of patches, then smooth it."""
    upsample = F.interpolate(torch.eye(grid)[None], size=size, mode="linear", align_corners=False)[0].T
    if sigma == 0:
        return upsample.contiguous()
    return torch.from_numpy(gaussian_filter1d(upsample.double().numpy(), sigma, axis=0).astype(np.float32))
