"""SOE: Semi-orthogonal Embedding for Efficient Unsupervised Anomaly Segmentation (Kim et al. 2021, arXiv:2105.14737).

The idea: a Gaussian per position over the channels of three layers, as in PaDiM. Where PaDiM keeps a random subset of
the channels, SOE mixes all of them by one random semi-orthogonal matrix W (c x k, W^T W = I, uniform among such
matrices). The precision matrix C^-1 is thereby approximated at rank k by W (W^T C W)^-1 W^T, so that only k x k
matrices are accumulated, inverted and kept. The map is the Mahalanobis distance, upsampled and smoothed (sigma 4); the
image's score is its maximum.

Differs from the paper:
- Covariances are divided by n - 1 instead of n, as in `padim`.
- epsilon is meant for features that vary as the paper's do and is scaled to the backbone, as in `padim`. Added to the
  diagonal of W^T C W it equals the paper's epsilon on that of C, since W^T W = I.
- The distance is computed with Cholesky factors instead of inverse matrices.
- With as many dimensions as channels W is a rotation, and the distances are those of all channels.

Shapes: n images, p = h * w positions, c channels of the layers together, k dimensions of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from al_models.embedding.position_gaussian import PositionGaussianDetector
from al_models.parameters import PositiveInt
from al_models.parts.patches import finest_grid, nearest_rows
from al_models.types import Runtime


def semi_orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix float32 (rows, columns) with orthonormal columns, uniform (Haar) among all such; columns <= rows.

    It is Q of a Gaussian matrix's QR decomposition, which is uniform only once the signs of R's diagonal, which depend
    on the algorithm, are made positive (Mezzadri 2007, arXiv:math-ph/0609050).
    """
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return torch.where(r.diagonal() < 0, -q, q).float()


@dataclass(kw_only=True)
class Soe(PositionGaussianDetector):
    """A Gaussian per position of the image, over randomly mixed channels."""

    quick: ClassVar[Mapping[str, object]] = {"dimensions": 20}

    dimensions: PositiveInt = 100
    """Dimensions k of the embedding, at most as many as channels: in the paper 100 of ResNet-18's 448, 300 of
    Wide-ResNet-50-2's 1792."""

    def _choose(self, features: Mapping[int, Tensor], runtime: Runtime) -> None:
        channels = sum(features[layer].shape[1] for layer in self.layers)
        generator = torch.Generator().manual_seed(runtime.seed)
        self.projection_ = semi_orthogonal(channels, min(self.dimensions, channels), generator).to(runtime.device)

    def _embed(self, features: Mapping[int, Tensor]) -> Tensor:
        """Layers (n, c_l, h_l, w_l) -> W^T of their stacked channels, position first: (p, n, k).

        W mixes channels and the nearest-neighbour upsampling copies positions, so the two commute: each layer is
        mixed by its own rows of W while it is small, and what is copied is k wide.
        """
        grid = finest_grid(features)
        blocks = self.projection_.split([features[layer].shape[1] for layer in self.layers])  # (c_l, k) each
        embedded: Tensor | None = None
        for layer, block in zip(self.layers, blocks, strict=True):
            x = features[layer]
            mixed = x.float().flatten(2).permute(2, 0, 1) @ block  # (h_l * w_l, n, k)
            copied = mixed if x.shape[2:] == grid else mixed[nearest_rows(x.shape[2:], grid).to(x.device)]
            embedded = copied if embedded is None else embedded.add_(copied)
        assert embedded is not None  # the backbone refuses an empty choice of layers
        return embedded
