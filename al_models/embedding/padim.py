"""PaDiM: a Patch Distribution Modeling Framework (Defard, Setkov, Loesch, Audigier 2020, arXiv:2011.08785).

The idea: feature maps of three layers are stacked to one embedding per position; a random subset of its channels is
kept; every position gets a Gaussian over the good images; the map is the Mahalanobis distance to it, upsampled and
smoothed (sigma 4), and the image's score is the map's maximum. Images must be aligned, since positions are compared.

Differs from the paper: epsilon counts for features that vary as the paper's do (`parts/patches.py`, RECTIFIED). Added
to the offline backbone's, of a variance of some 50, it would regularise nothing: with 188 good images of *bottle*
held-out ones lay 1.4 times as far as those learned. The papers' centre crop of images is left out. The Gaussians are
accumulated in one pass (`parts/gaussian.py`) instead of from stored embeddings, and the distance is taken by Cholesky
factors instead of inverses.

Shapes: n images, p = h * w positions, c channels kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from al_models.embedding.position_gaussian import PositionGaussianDetector
from al_models.parameters import PositiveInt
from al_models.parts.patches import choose_channels, finest_grid, nearest_rows
from al_models.types import Runtime


@dataclass(kw_only=True)
class Padim(PositionGaussianDetector):
    """A Gaussian per position of the image, over a random choice of channels."""

    quick: ClassVar[Mapping[str, object]] = {"channels": 20}

    channels: PositiveInt = 100
    """Size of the random subset of channels: 100 for ResNet-18, 550 for Wide-ResNet-50-2 in the paper."""

    def _choose(self, features: Mapping[int, Tensor], runtime: Runtime) -> None:
        self.kept_ = choose_channels(features, self.layers, self.channels, runtime.seed)

    def _embed(self, features: Mapping[int, Tensor]) -> Tensor:
        """The kept channels of the stacked layers.

        Equal to stacking the layers at the finest grid and choosing channels, at a fraction of the memory traffic:
        channels are chosen first, and the nearest-neighbour upsampling copies rows of n * c_l values.
        """
        grid, start, kept = finest_grid(features), 0, self.kept_.tolist()
        parts = []
        for layer in self.layers:
            x = features[layer]
            mine = [channel - start for channel in kept if start <= channel < start + x.shape[1]]
            vectors = x[:, mine].float().flatten(2).permute(2, 0, 1).contiguous()  # (h_l * w_l, n, c_l)
            parts.append(vectors[nearest_rows(x.shape[2:], grid).to(x.device)])
            start += x.shape[1]
        return torch.cat(parts, dim=2)
