"""PaDiM: a Patch Distribution Modeling Framework (Defard, Setkov, Loesch, Audigier 2020, arXiv:2011.08785).

The idea: feature maps of three layers are stacked to one embedding per position; a random subset of its channels is
kept; every position gets a Gaussian over the good images; the map is the Mahalanobis distance to it, upsampled and
smoothed (sigma 4), and the image's score is the map's maximum. Images must be aligned, since positions are compared.

Differs from the paper: nothing in the mathematics. The Gaussians are accumulated in one pass (`parts/gaussian.py`)
instead of from stored embeddings, and the distance is taken by Cholesky factors instead of inverses.

Shapes: n images, p = h * w positions, c channels kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from al_models.detector import Detector
from al_models.parts.gaussian import PositionGaussians, mahalanobis
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.patches import finest_grid, nearest_rows, on_device
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits


@dataclass(kw_only=True)
class Padim(Detector):
    """A Gaussian per position of the image."""

    traits: ClassVar[Traits] = Traits(aligned_images_only=True)
    quick: ClassVar[Mapping[str, object]] = {"channels": 20}

    backbone: str = "tf_efficientnet_lite0"
    layers: tuple[int, ...] = (1, 2, 3)
    weights: str | None = None
    channels: int = 100
    """Size of the random subset of channels: 100 for ResNet-18, 550 for Wide-ResNet-50-2 in the paper."""
    epsilon: float = 0.01
    """Added to the diagonal of each covariance (eq. 1)."""
    sigma: float = SIGMA

    def feature_spec(self) -> FeatureSpec:
        """The layers that are stacked."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights)

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        gaussians: PositionGaussians | None = None
        for done, batch in enumerate(source, start=1):
            features = on_device(batch, runtime.device)
            if gaussians is None:
                self.kept_ = self._choose_channels(sum(f.shape[1] for f in features.values()), runtime)
                positions = max(f[0, 0].numel() for f in features.values())
                gaussians = PositionGaussians(positions, len(self.kept_), runtime.device)
            gaussians.update(self._positions(features))
            runtime.progress("fit padim", min(done * source.batch_size, len(source)), len(source))
        assert gaussians is not None  # fit refuses an empty source
        self.mean_ = gaussians.mean
        self.whitening_ = gaussians.whitening(self.epsilon)

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        features = on_device(batch, runtime.device)
        for name in ("mean_", "whitening_"):
            setattr(self, name, getattr(self, name).to(runtime.device))
        distances = mahalanobis(self._positions(features), self.mean_, self.whitening_)  # (p, n)
        grid = finest_grid(features)
        maps = to_maps(distances.T.reshape(-1, *grid), self.image_size, self.sigma)
        return Prediction(batch.ids, maps.cpu().numpy(), maps.amax((1, 2)).cpu().numpy())

    def state(self) -> dict[str, np.ndarray]:
        """As learned, with the triangular matrices packed: half the bytes."""
        state = super().state()
        rows, columns = np.tril_indices(state["whitening_"].shape[1])
        packed = state["whitening_"][:, rows, columns]  # (p, c * (c + 1) / 2), which numpy lays out column first
        return {**state, "whitening_": np.ascontiguousarray(packed)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Padim:
        """Take back what `state` gave."""
        super().load_state(state)
        packed, c = self.whitening_, self.mean_.shape[2]
        rows, columns = torch.tril_indices(c, c)
        self.whitening_ = packed.new_zeros(len(packed), c, c)
        self.whitening_[:, rows, columns] = packed
        return self

    def _choose_channels(self, available: int, runtime: Runtime) -> Tensor:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(runtime.seed))
        return order[: min(self.channels, available)].sort().values

    def _positions(self, features: Mapping[int, Tensor]) -> Tensor:
        """Layers (n, c_l, h_l, w_l) -> the kept channels, position first: (p, n, c).

        Equal to stacking the layers at the finest grid and choosing channels, at a fraction of the memory traffic:
        channels are chosen first, and the nearest-neighbour upsampling copies rows of n * c_l values.
        """
        grid = finest_grid(features)
        n = len(features[self.layers[0]])
        out = torch.empty(grid[0] * grid[1], n, len(self.kept_), device=features[self.layers[0]].device)
        start = column = 0
        for layer in self.layers:
            x = features[layer]
            mine = self.kept_[(self.kept_ >= start) & (self.kept_ < start + x.shape[1])] - start
            vectors = x[:, mine.to(x.device)].float().flatten(2).permute(2, 0, 1).contiguous()  # (h_l * w_l, n, c_l)
            out[..., column : column + len(mine)] = vectors[nearest_rows(x.shape[2:], grid).to(x.device)]
            start, column = start + x.shape[1], column + len(mine)
        return out
