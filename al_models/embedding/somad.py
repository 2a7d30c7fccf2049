"""SOMAD: Anomaly Detection via Self-organizing Map (Li, Jiang, Ma, Wei, Hong, Gong 2021, arXiv:2107.09903).

The idea: the patch features of three layers, of all good images and positions, train one self-organising map: a grid of
units in which neighbours are alike, a memory that keeps the topology of what is normal. Each unit gets the mean and
covariance of the patches that match it best. A patch is as anomalous as the smallest Mahalanobis distance to the units
nearest to it. The map is upsampled and smoothed (sigma 4); the image's score is its maximum.

The paper's text could not be consulted; this follows the authors' published code (ddzxlining/SOMAD).

Differs from that code:
- Units without patches are removed before the nearest units are searched. There they are among the nearest, and a patch
  that has no other gets the largest distance of the whole test set.
- Patches are assigned to the final units; there to the units as they were one epoch before.
- Features are upsampled with align_corners=False.
- epsilon is meant for features that vary as the papers' do and is scaled to the backbone (`parts/patches.py`,
  RECTIFIED). As in that code, it is all that regularises a unit with fewer patches than channels, and such units decide
  the image score.
- `shrink=True`, an addition, shrinks the covariances of such units.

Kept from it: training by the batch rule in two phases, rough and fine, with a Gaussian neighbourhood whose radius falls
linearly within each; units that start as the mean over images of the features at their place; the radii and numbers of
epochs; a map of 56 x 56 units (there one for each position at 224 px).

Shapes: n images, m patches, c channels kept, u units, k nearest units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from al_models.detector import Detector
from al_models.parameters import Layers, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from al_models.parts.gaussian import mahalanobis
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.neighbors import nearest
from al_models.parts.patches import (
    as_vectors,
    channel_counts,
    choose_channels,
    finest_grid,
    on_device,
    stack_layers,
    unit_of,
)
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

_GROUP = 32
_GROUPS_AT_ONCE = 512


def radii(units: tuple[int, int], epochs: tuple[int, int]) -> list[float]:
    """The neighbourhood's radius in each epoch, in units: from a third of the longer side down to 1."""
    side = max(units)
    rough, fine = max(1.0, math.ceil(side / 3)), max(1.0, side / 12)
    return [
        *torch.linspace(rough, max(1.0, rough / 6), epochs[0], dtype=torch.float64).tolist(),
        *torch.linspace(fine, max(1.0, fine / 25), epochs[1], dtype=torch.float64).tolist(),
    ]


def smooth(values: Tensor, radius: float) -> Tensor:
    """Sums over the neighbourhood of each unit, weighted by exp(-d^2 / 2 radius^2): (rows, columns, c) -> the same.

    The Gaussian of a grid distance is the product of one along the rows and one along the columns: no u x u matrix.
    """
    down, across = (_gaussian(side, radius).to(values) for side in values.shape[:2])
    return torch.einsum("ri,ijc,sj->rsc", down, values, across)


def _gaussian(side: int, radius: float) -> Tensor:
    place = torch.arange(side, dtype=torch.float64)
    return torch.exp((place[:, None] - place).square() / (-2 * radius**2))  # (side, side)


def groups(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of equal label in groups of 32: int64 (m,) -> the label of each group (g,), and its rows (g, 32).

    The last group of a label is filled up with -1. One batched product thus serves units with many rows and with few.
    """
    order = labels.argsort(stable=True)
    found, counts = labels[order].unique_consecutive(return_counts=True)
    pieces = (counts + _GROUP - 1) // _GROUP
    within = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    group = (pieces.cumsum(0) - pieces).repeat_interleave(counts) + within // _GROUP
    rows = order.new_full((int(pieces.sum()), _GROUP), -1)
    rows[group, within % _GROUP] = order
    return found.repeat_interleave(pieces), rows


def shrunk(scatter: Tensor, counts: Tensor) -> Tensor:
    """Covariances (u, c, c) of scatter about the mean (u, c, c) of n patches each (u, 1, 1), shrunk to their own scale.

    The oracle approximating shrinkage of Chen, Wiesel, Eldar and Hero 2010 (arXiv:0907.4698), as in scikit-learn's
    `oas`: towards the identity times the mean variance, the more so the fewer patches; nothing is to be tuned.
    """
    c = scatter.shape[1]
    empirical = scatter / counts
    variance = empirical.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    square = empirical.square().mean((1, 2), keepdim=True)
    spread = (counts + 1) * (square - variance**2 / c)  # 0 where the covariance is the target already
    share = torch.where(spread > 0, (square + variance**2) / spread, 1.0).clamp(max=1)
    return (1 - share) * empirical + share * variance * torch.eye(c, device=scatter.device)


class UnitGaussians:
    """Count, mean and scatter of the patches of each unit, added up batch by batch."""

    def __init__(self, units: Tensor) -> None:
        """Nothing seen yet; units float32 (u, c)."""
        u, c = units.shape
        self.units = units
        self.counts = torch.zeros(u, device=units.device)
        self.sums = torch.zeros(u, c, device=units.device, dtype=torch.float64)
        self.scatter = torch.zeros(u, c, c, device=units.device)

    def update(self, patches: Tensor) -> None:
        """Take in patches float32 (m, c), each to its nearest unit."""
        rows = nearest(patches, self.units)[1][:, 0]
        away = patches - self.units[rows]  # from a point near the mean, so that the squares do not cancel
        self.counts += torch.bincount(rows, minlength=len(self.units))
        self.sums.index_add_(0, rows, away.double())
        away = torch.cat([away, away.new_zeros(1, away.shape[1])])  # row -1, which fills up groups, adds nothing
        for labels, members in zip(*(part.split(_GROUPS_AT_ONCE) for part in groups(rows)), strict=True):
            x = away[members]  # (g, 32, c)
            self.scatter.index_add_(0, labels, x.mT @ x)

    def result(self, epsilon: float, shrink: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Units that have patches (u, c), their means (u, 1, c), and whitening (u, c, c) as in `parts/gaussian.py`."""
        held = self.counts > 0
        units, counts = self.units[held], self.counts[held]
        away = (self.sums[held] / counts[:, None]).float()  # (u, c)
        whitening = self.scatter[held]
        identity = torch.eye(units.shape[1], device=units.device)
        for w, a, n in zip(
            *(part.split(_GROUPS_AT_ONCE) for part in (whitening, away, counts[:, None, None])), strict=True
        ):
            centred = w - n * a[:, :, None] * a[:, None]
            covariance = shrunk(centred, n) if shrink else centred / (n - 1).clamp(min=1)
            factor = torch.linalg.cholesky(covariance + epsilon * identity)
            w.copy_(torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False))
        return units, (units + away)[:, None], whitening


@dataclass(kw_only=True)
class Somad(Detector):
    """A self-organising map of patches, with a Gaussian in each unit."""

    traits: ClassVar[Traits] = Traits()
    quick: ClassVar[Mapping[str, object]] = {"channels": 20, "units": (8, 8), "epochs": (3, 2)}

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (1, 2, 3)
    weights: str | None = None
    channels: PositiveInt = 100
    """Size of the random subset of channels: 550 of Wide-ResNet-50-2's 1792 in the authors' code; here as in PaDiM."""
    units: tuple[PositiveInt, PositiveInt] = (56, 56)
    """Rows and columns of the self-organising map."""
    epochs: tuple[NonNegativeInt, NonNegativeInt] = (20, 15)
    """Passes over the images in the rough and in the fine phase."""
    neighbours: PositiveInt = 5
    """Nearest units to whose Gaussians the distance of a patch is computed; the smallest counts."""
    epsilon: PositiveFloat = 0.01
    """Added to the diagonal of each covariance, of features at the papers' scale (`unit_of`)."""
    shrink: bool = False
    """Whether covariances are shrunk, the more so the fewer patches a unit has, which the authors' code does not."""
    sigma: NonNegativeFloat = SIGMA

    def feature_spec(self) -> FeatureSpec:
        """The layers that are stacked."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights)

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        self.kept_ = choose_channels(source.read([0]).features, self.layers, self.channels, runtime.seed)
        self.kept_ = self.kept_.to(runtime.device)
        # The map is trained first; then its units get their Gaussians, in one more pass.
        schedule = radii(self.units, self.epochs)
        units, unit = self._starting_units(source, runtime)
        for epoch, radius in enumerate(schedule):
            units = self._epoch(units, radius, source, runtime)
            runtime.progress("fit somad: epochs", epoch + 1, len(schedule))
        gaussians = UnitGaussians(units)
        for batch in source:
            gaussians.update(self._patches(batch, runtime))
        self.units_, self.mean_, self.whitening_ = gaussians.result(self.epsilon * unit**2, self.shrink)

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        for name in ("kept_", "units_", "mean_", "whitening_"):
            setattr(self, name, getattr(self, name).to(runtime.device))
        distances = self._distances(self._patches(batch, runtime))
        maps = to_maps(
            distances.view(len(batch), *finest_grid(batch.features)),
            self.image_size,
            self.sigma,
            self._offset(channel_counts(batch.features, self.layers)),
        )
        return Prediction(batch.ids, maps.cpu().numpy(), maps.amax((1, 2)).cpu().numpy())

    def _distances(self, patches: Tensor) -> Tensor:
        """The smallest Mahalanobis distance of each patch (m, c) to its k nearest units: (m,)."""
        k = min(self.neighbours, len(self.units_))
        _, near = nearest(patches, self.units_, k)  # (m, k)
        found = patches.new_empty(near.numel() + 1)  # the last is written by the -1 that fill up groups
        for labels, pairs in zip(*(part.split(_GROUPS_AT_ONCE) for part in groups(near.flatten())), strict=True):
            found[pairs] = mahalanobis(patches[pairs // k], self.mean_[labels], self.whitening_[labels])  # (g, 32)
        return found[:-1].view(-1, k).amin(1)

    def _patches(self, batch: ImageBatch, runtime: Runtime) -> Tensor:
        """The kept channels of each patch of a batch, on the grid of the finest layer: float32 (m, c)."""
        stacked = stack_layers(on_device(batch, runtime.device), self.layers, mode="bilinear")  # (n, c_all, h, w)
        return as_vectors(stacked[:, self.kept_])

    def _starting_units(self, source: ImageSource, runtime: Runtime) -> tuple[Tensor, float]:
        """The mean over images of each position's patch, resized to the grid of units (u, c); the features' scale."""
        total: Tensor | None = None
        squares = torch.zeros(len(self.kept_), dtype=torch.float64, device=runtime.device)
        for batch in source:
            patches = self._patches(batch, runtime).double().view(len(batch), -1, len(self.kept_))
            total = patches.sum(0) if total is None else total + patches.sum(0)  # (h * w, c)
            squares += patches.square().mean(1).sum(0)
            grid = finest_grid(batch.features)
        assert total is not None  # fit refuses an empty source
        mean = total / len(source)  # (h * w, c)
        variances = (squares / len(source) - mean.mean(0).square()).clamp(min=0)
        start = F.interpolate(mean.T.reshape(1, -1, *grid), tuple(self.units), mode="bilinear", align_corners=False)
        return as_vectors(start).float(), float(unit_of(variances))

    def _epoch(self, units: Tensor, radius: float, source: ImageSource, runtime: Runtime) -> Tensor:
        """The units (u, c) after a step of the batch rule, each at the mean of the patches in its neighbourhood."""
        sums = torch.zeros_like(units, dtype=torch.float64)  # in double, so that the split into batches moves nothing
        counts = sums.new_zeros(len(units), 1)
        for batch in source:
            patches = self._patches(batch, runtime)
            rows = nearest(patches, units)[1][:, 0]
            sums.index_add_(0, rows, patches.double())
            counts += torch.bincount(rows, minlength=len(units))[:, None]
        weighted = smooth(torch.cat([sums, counts], dim=1).view(*self.units, -1), radius).flatten(0, 1)  # (u, c + 1)
        moved = (weighted[:, :-1] / weighted[:, -1:]).float()
        # Far from every patch the weight underflows to nothing; such a unit stays where it is.
        return torch.where(weighted[:, -1:] > torch.finfo(torch.float64).tiny, moved, units)
