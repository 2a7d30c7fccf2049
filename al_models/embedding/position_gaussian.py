"""A Gaussian at each position of the image, over an embedding of the stacked layers: the base of PaDiM and SOE.

Only the embedding differs between the methods. Counts, means and scatters are kept, not only the whitening that follows
from them, so that more good images can be added to a fitted model at any time, as if they had been among the first.

Shapes: n images, p = h * w positions of the finest layer, c channels of the embedding.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from al_models.detector import Detector
from al_models.parameters import Layers, NonNegativeFloat, PositiveFloat
from al_models.parts.gaussian import (
    PositionGaussians,
    mahalanobis,
    pack_symmetric,
    total_variance,
    unpack_symmetric,
    whitening,
)
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.patches import channel_counts, finest_grid, on_device, unit_of
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

_whitening_in_turn = threading.Lock()
"""Two threads that predict with one model make its whitening once."""


@dataclass(kw_only=True)
class PositionGaussianDetector(Detector):
    """The Mahalanobis distance of each position to its Gaussian as the map, whose maximum is the image's score."""

    traits: ClassVar[Traits] = Traits(aligned_images_only=True, incremental=True, graph=True)

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (1, 2, 3)
    weights: str | None = None
    epsilon: PositiveFloat = 0.01
    """Added to the diagonal of each covariance (PaDiM, eq. 1), of features at the scale of the paper's (`unit_of`)."""
    sigma: NonNegativeFloat = SIGMA

    _whitening = None  # follows from what is learned; made at the first prediction

    def feature_spec(self) -> FeatureSpec:
        """The layers that are stacked."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights)

    @abstractmethod
    def _choose(self, features: Mapping[int, Tensor], runtime: Runtime) -> None:
        """Learn what the embedding draws at random, such as the channels it keeps, for the layers of this batch."""

    @abstractmethod
    def _embed(self, features: Mapping[int, Tensor]) -> Tensor:
        """Layers (n, c_l, h_l, w_l) -> float32 (p, n, c), position first."""

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        self._choose(on_device(source.read([0]), runtime.device), runtime)
        self._learn(source, None, runtime)

    def _update(self, source: ImageSource, runtime: Runtime) -> None:
        self._move_to(runtime.device)
        mean, scatter = self.mean_.clone(), self.scatter_.clone()
        self._learn(source, PositionGaussians.of(int(self.count_), mean, scatter), runtime)

    def _learn(self, source: ImageSource, gaussians: PositionGaussians | None, runtime: Runtime) -> None:
        for done, batch in enumerate(source, start=1):
            vectors = self._embed(on_device(batch, runtime.device))  # (p, n, c)
            if gaussians is None:
                gaussians = PositionGaussians(vectors.shape[0], vectors.shape[2], runtime.device)
            gaussians.update(vectors)
            what = f"fit {type(self).__name__.lower()}"
            runtime.progress(what, min(done * source.batch_size, len(source)), len(source))
        assert gaussians is not None  # fit refuses an empty source
        self.count_ = torch.tensor(gaussians.count)
        self.mean_, self.scatter_ = gaussians.mean, gaussians.scatter
        self._whitening = None

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        self._move_to(runtime.device)
        maps, scores = self.tensors(ImageBatch(batch.ids, features=on_device(batch, runtime.device)))
        return Prediction(batch.ids, maps.cpu().numpy(), scores.cpu().numpy())

    def tensors(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Maps (n, size, size) and their maxima (n,)."""
        with _whitening_in_turn:
            if self._whitening is None:
                count = int(self.count_)
                unit = unit_of(total_variance(count, self.mean_, self.scatter_))
                self._whitening = whitening(count, self.scatter_, self.epsilon * float(unit) ** 2)
        distances = mahalanobis(self._embed(batch.features), self.mean_, self._whitening)  # (p, n)
        maps = to_maps(
            distances.T.reshape(-1, *finest_grid(batch.features)),
            self.image_size,
            self.sigma,
            self._offset(channel_counts(batch.features, self.layers)),
        )
        return maps, maps.amax((1, 2))

    def state(self) -> dict[str, np.ndarray]:
        """As learned, with the symmetric scatters packed: half the bytes."""
        state = super().state()
        return {**state, "scatter_": pack_symmetric(torch.from_numpy(state["scatter_"])).contiguous().numpy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take back what `state` gave."""
        super().load_state(state)
        self.scatter_ = unpack_symmetric(self.scatter_, self.mean_.shape[2])
        self._whitening = None
        return self

    def _move_to(self, device: str) -> None:
        for name in self.state_names():
            if name != "count_":
                setattr(self, name, getattr(self, name).to(device))
