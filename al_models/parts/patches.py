"""Feature maps of several layers, brought to one grid and stacked."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from al_models.types import ImageBatch, ImageSource

IN_MEMORY = 2 * 2**30
"""Bytes of patch vectors that are kept in memory."""
RECTIFIED = 0.5 - 0.5 / math.pi
"""Variance of a rectified standard normal, 0.34, which stands for that of the papers' features. Constants of the papers
(an epsilon of 0.01, a learning rate, a clamp) are meant for it. Features of other backbones are brought to it by
`unit_of` and `layer_scales`; that of EfficientNet-Lite0's linear outputs is 84, 75 and 13."""


def stack_layers(features: Mapping[int, Tensor], layers: Sequence[int], *, mode: str, pool: int = 1) -> Tensor:
    """Layers (n, c_l, h_l, w_l) -> float32 (n, sum of c_l, h, w) on the grid of the finest layer.

    `mode` is torch's interpolation ("nearest", "bilinear"); `pool` averages over pool x pool neighbours first
    (PatchCore's locally aware patches, arXiv:2106.08265, eq. 1-2).
    """
    maps = [features[layer].float() for layer in layers]
    if pool > 1:
        # Zeros outside the image count, as in the authors' code: a border patch averages fewer real values and would
        # otherwise lie farther from every other patch than many a defect.
        maps = [F.avg_pool2d(m, pool, stride=1, padding=pool // 2) for m in maps]
    grid = finest_grid(dict(enumerate(maps)))
    corners = {"align_corners": False} if mode == "bilinear" else {}
    resized = [m if m.shape[2:] == grid else F.interpolate(m, size=grid, mode=mode, **corners) for m in maps]
    return torch.cat(resized, dim=1)


def channel_counts(features: Mapping[int, Tensor], layers: Sequence[int]) -> dict[int, int]:
    """Layer -> its channels: the shares of layers (n, c_l, h_l, w_l) in a stack all of whose channels count alike."""
    return {layer: features[layer].shape[1] for layer in layers}


def finest_grid(features: Mapping[int, Tensor]) -> tuple[int, int]:
    """(h, w) of the layer with the most positions."""
    h, w = max((f.shape[2:] for f in features.values()), key=lambda shape: shape[0] * shape[1])
    return int(h), int(w)


def nearest_rows(shape: Sequence[int], grid: Sequence[int]) -> Tensor:
    """For each position of `grid`, the position of a coarser map of `shape` that torch's "nearest" copies: (p,)."""
    rows, columns = (torch.arange(g) * s // g for g, s in zip(grid, shape, strict=True))
    return (rows[:, None] * shape[1] + columns).flatten()


def as_vectors(maps: Tensor) -> Tensor:
    """(n, c, h, w) -> (n*h*w, c), image by image, row by row."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def choose_channels(features: Mapping[int, Tensor], layers: Sequence[int], count: int, seed: int) -> Tensor:
    """A random choice of the stacked layers' channels, rising: int64 (min(count, channels there are),)."""
    available = sum(features[layer].shape[1] for layer in layers)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return order[: min(count, available)].sort().values


def on_device(batch: ImageBatch, device: str) -> dict[int, Tensor]:
    """The features of a batch on the device."""
    return {layer: value.to(device, non_blocking=True) for layer, value in batch.features.items()}


def patch_vectors(
    source: ImageSource, layers: Sequence[int], *, pool: int, device: str, in_memory: int = IN_MEMORY
) -> Tensor:
    """All patch vectors of a source: float32 (n*h*w, c); filled batch by batch, so they are in memory once.

    Those that would take more than `in_memory` bytes lie in a temporary file, in half precision as features are
    stored: float16, on the CPU whatever the device, read where they are asked for.
    """
    vectors: Tensor | None = None
    done = 0
    for batch in source:
        part = as_vectors(stack_layers(on_device(batch, device), layers, mode="bilinear", pool=pool))
        if vectors is None:
            shape = len(source) * (len(part) // len(batch)), part.shape[1]
            vectors = part.new_empty(shape) if 4 * shape[0] * shape[1] <= in_memory else _in_a_file(shape)
        vectors[done : done + len(part)] = part.to(vectors.device)
        done += len(part)
    assert vectors is not None
    return vectors


def _in_a_file(shape: tuple[int, int]) -> Tensor:
    """float16 of this shape in a file without a name, which goes when the tensor does."""
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=shape))


def channel_means(layers: Iterable[Tensor]) -> np.ndarray:
    """The mean over positions of each channel, all layers side by side: (n, c, h, w) each -> float64 (n, sum of c)."""
    return np.concatenate([values.float().mean((2, 3)).double().cpu().numpy() for values in layers], axis=1)


def channel_moments(
    source: ImageSource, rows: Sequence[int], layers: Sequence[int], device: str
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over these rows, layer after layer: float32 (c of all layers,) on the CPU.

    One pass, in float64. A deviation is at least 3 % of its layer's: a channel that is nearly constant on good images
    would, divided by its own, dominate all others where a defect changes it.
    """
    means, variances = _moments(source, rows, layers, device)
    return torch.cat(means).float(), torch.cat([deviations_of(variance) for variance in variances]).float()


def deviations_of(variances: Tensor) -> Tensor:
    """The divisors (c,) that bring channels of these variances (c,) to a deviation of 1.

    At least 3 % of the root mean variance, so that a channel that is nearly constant on good images is not blown up; 1
    where none varies.
    """
    deviations = torch.maximum(variances, 1e-3 * variances.mean()).sqrt()
    return torch.where(deviations > 0, deviations, 1.0)


def layer_scales(source: ImageSource, rows: Sequence[int], layers: Sequence[int], device: str) -> Tensor:
    """The divisor of each layer that brings it to the scale of the papers' features: float32 (layers,) on the CPU.

    The variance over these rows and all positions, averaged over the channels, is `RECTIFIED` then. One pass.
    """
    _, variances = _moments(source, rows, layers, device)
    return torch.stack([unit_of(variance) for variance in variances]).float()


def unit_of(variances: Tensor) -> Tensor:
    """The divisor () of channels of these variances (c,), by which their mean becomes `RECTIFIED`; 1 if none varies."""
    scale = (variances.mean() / RECTIFIED).sqrt()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def unit_layers(features: Mapping[int, Tensor], layers: Sequence[int], scales: Tensor) -> list[Tensor]:
    """The layers (n, c_l, h_l, w_l) in float32, each divided by its own of `layer_scales`."""
    return [
        features[layer].float() / scale.to(features[layer].device) for layer, scale in zip(layers, scales, strict=True)
    ]


def _moments(
    source: ImageSource, rows: Sequence[int], layers: Sequence[int], device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of each channel over these rows and all positions: float64 (c,) a layer, on the CPU."""
    sums: list[Tensor] = []  # of each layer the means of x and x^2, added up: (2, c)
    for batch in source.batches(rows):
        maps = [batch.features[layer].to(device).double() for layer in layers]
        parts = [torch.stack([x.mean((2, 3)).sum(0), x.square().mean((2, 3)).sum(0)]).cpu() for x in maps]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
    means = [total[0] / len(rows) for total in sums]
    variances = [(total[1] / len(rows) - mean**2).clamp(min=0) for total, mean in zip(sums, means, strict=True)]
    return means, variances


def standard_layers(
    features: Mapping[int, Tensor], layers: Sequence[int], mean: Tensor, deviation: Tensor
) -> list[Tensor]:
    """The layers (n, c_l, h_l, w_l), each channel less its mean and over its deviation, as `channel_moments` gives."""
    scales = [features[layer].shape[1] for layer in layers]
    moments = zip(layers, mean.split(scales), deviation.split(scales), strict=True)
    standard = []
    for layer, centre, scale in moments:
        x = features[layer].float()
        standard.append((x - centre.to(x.device)[:, None, None]) / scale.to(x.device)[:, None, None])
    return standard
