"""PaDiM: a Patch Distribution Modeling Framework (Defard, Setkov, Loesch, Audigier 2020, arXiv:2011.08785).

The idea: feature maps of three layers are stacked to one embedding per position, and a random subset of its channels is
kept. At every position a multivariate Gaussian is fitted to the embeddings of the good images. The map is the
Mahalanobis distance to that Gaussian, upsampled and smoothed (sigma 4); the image's score is the map's maximum. Images
must be aligned, since each position is compared with the same position of the good images.

Differs from the paper:
- epsilon is meant for features that vary as the paper's do and is scaled to the backbone (`parts/patches.py`,
  RECTIFIED). Added as it is to the covariances of the offline backbone, whose variances are some 50, it would
  regularise nothing.
- The paper's centre crop of the images is left out, so that the whole image is judged.
- The Gaussians are accumulated in one pass (`parts/gaussian.py`) instead of from stored embeddings.
- The distance is computed with Cholesky factors instead of inverse matrices.

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
