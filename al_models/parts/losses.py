"""SSIM, as the loss of a reconstruction and, pixel by pixel, as its map."""

from __future__ import annotations

from functools import lru_cache

import torch

from al_models.errors import InvalidInput, unknown

C1, C2 = 0.01**2, 0.03**2
"""(k1 L)^2 and (k2 L)^2 of the paper for images in [0, 1]."""


def ssim_map(a: torch.Tensor, b: torch.Tensor, *, side: int = 11, window: str = "gaussian") -> torch.Tensor:
    """Structural similarity of two images around each pixel; 1 where they are equal.

    Images float (n, c, h, w) in [0, 1]; result float32 of the same shape, in [-1, 1]. `window` is "gaussian" (sigma
    1.5) or "uniform", `side` pixels wide; variances are of the population. Beyond its border an image is mirrored.
    Source: Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment", eq. 13.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise InvalidInput(f"SSIM was given {tuple(a.shape)} and {tuple(b.shape)}; it compares two equal (n, c, h, w)")
    # A variance is a small difference of two large numbers: bfloat16 would leave noise of it.
    with torch.autocast(a.device.type, enabled=False):
        a, b = a.float(), b.float()
        h, w = a.shape[-2:]
        rows = window_matrix(h, side, window, a.device)  # (h, h)
        columns = window_matrix(w, side, window, a.device).T  # (w, w)
        # Only the sum of both variances is needed, so four planes are filtered and not five.
        planes = (a, b, a * a + b * b, a * b)
        mean_a, mean_b, squares, product = (rows @ plane @ columns for plane in planes)  # each (n, c, h, w)
        means = mean_a * mean_b
        energy = mean_a * mean_a + mean_b * mean_b
        alike = (2 * means + C1) * (2 * (product - means) + C2)
        return alike / ((energy + C1) * (squares - energy + C2))  # (n, c, h, w)


def ssim_loss(a: torch.Tensor, b: torch.Tensor, *, side: int = 11, window: str = "gaussian") -> torch.Tensor:
    """1 - mean SSIM: a scalar, 0 for equal images. Shapes and errors as in `ssim_map`."""
    return 1 - ssim_map(a, b, side=side, window=window).mean()


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept for later calls, and a training among them could not use an inference tensor
def window_matrix(length: int, side: int, window: str, device: torch.device) -> torch.Tensor:
    """The filter along one axis as a banded matrix, its mirrored border included; float32 (length, length).

    On images of a few hundred pixels two matrix products are faster than a depthwise convolution, forward and
    backward, on CPU and GPU alike.
    """
    if side % 2 == 0 or length < side:
        raise InvalidInput(f"SSIM window of {side} pixels on an image of {length}; give an odd side, at most {length}")
    reach = side // 2
    offsets = torch.arange(-reach, reach + 1)  # (side,)
    if window == "gaussian":
        weights = torch.exp(-(offsets.double() ** 2) / (2 * 1.5**2))
    elif window == "uniform":
        weights = torch.ones(side, dtype=torch.float64)
    else:
        raise unknown("SSIM window", window, ["gaussian", "uniform"])
    places = torch.arange(length)[:, None] + offsets  # (length, side)
    places = torch.where(places < 0, -1 - places, places)
    places = torch.where(places >= length, 2 * length - 1 - places, places)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    matrix.scatter_add_(1, places, (weights / weights.sum()).expand(length, side))
    return matrix.float().to(device)
