"""SPADE: Sub-Image Anomaly Detection with Deep Pyramid Correspondences (Cohen and Hoshen 2020, arXiv:2005.02357).

The idea: the K good images nearest to an image are retrieved by globally pooled features, and their mean squared
distance is the image's score. Then every pixel of the image's feature pyramid (several layers, stacked) is compared
with all pixels of those K images; its distance to the nearest is the map.

Differs from the paper:
- Scores and maps are square roots of the paper's, which changes no order.
- The paper resizes to 256 px and crops to 224; here the whole image is seen.

Shapes: n images, p = h * w pixels of the finest layer, c channels, k neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from al_models.detector import Detector
from al_models.parameters import Layers, NonNegativeFloat, NonNegativeInt, PositiveInt
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.neighbors import nearest
from al_models.parts.patches import as_vectors, layer_scales, on_device, stack_layers
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

_SAMPLED = 32
"""Images from which each layer's share of a distance is estimated."""


@dataclass(kw_only=True)
class Spade(Detector):
    """Correspondences with the nearest good images."""

    traits: ClassVar[Traits] = Traits()
    quick: ClassVar[Mapping[str, object]] = {"layers": (2, 3), "neighbours": 3}

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (1, 2, 3)
    """Layers of the pyramid, whose pixels are compared."""
    pooled_layer: NonNegativeInt = 4
    """Layer whose average over the image retrieves its neighbours and scores it."""
    weights: str | None = None
    neighbours: PositiveInt = 50
    """K, the number of good images that an image is compared with."""
    sigma: NonNegativeFloat = SIGMA

    def feature_spec(self) -> FeatureSpec:
        """The pyramid and the pooled layer."""
        return FeatureSpec(self.backbone, (*self.layers, self.pooled_layer), self.image_size, self.weights)

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        pooled, pyramid = [], {layer: [] for layer in self.layers}
        for done, batch in enumerate(source, start=1):
            pooled.append(self._pool(batch))
            for layer, parts in pyramid.items():
                parts.append(batch.features[layer].half().cpu())  # half precision as in the feature store
            runtime.progress("fit spade", min(done * source.batch_size, len(source)), len(source))
        self.pooled_ = torch.cat(pooled)  # (n, c)
        for layer, parts in pyramid.items():
            setattr(self, f"layer{layer}_", torch.cat(parts))  # (n, c, h, w)
        units = layer_scales(source, range(min(_SAMPLED, len(source))), self.layers, runtime.device)
        self.shares_ = units.square() * torch.tensor([parts[0].shape[1] for parts in pyramid.values()])  # (layers,)

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        k = min(self.neighbours, len(self.pooled_))
        distances, rows = nearest(self._pool(batch), self.pooled_, k)  # (n, k)
        stacked = stack_layers(on_device(batch, runtime.device), self.layers, mode="bilinear")  # (n, c, h, w)
        patches = torch.stack(
            [self._pixel_distances(pixels, chosen, runtime) for pixels, chosen in zip(stacked, rows, strict=True)]
        )  # (n, h, w)
        maps = to_maps(
            patches,
            self.image_size,
            self.sigma,
            self._offset(dict(zip(self.layers, self.shares_.tolist(), strict=True))),
        )
        return Prediction(batch.ids, maps.cpu().numpy(), distances.square().mean(1).sqrt().numpy())

    def _pixel_distances(self, pixels: Tensor, chosen: Tensor, runtime: Runtime) -> Tensor:
        """Distances (h, w) of an image's pixels (c, h, w) to the nearest pixels of the chosen good images."""
        gallery = {layer: getattr(self, f"layer{layer}_")[chosen].to(runtime.device) for layer in self.layers}
        bank = as_vectors(stack_layers(gallery, self.layers, mode="bilinear"))  # (k * p, c)
        return nearest(as_vectors(pixels[None]), bank)[0].view(pixels.shape[1:])

    def _pool(self, batch: ImageBatch) -> Tensor:
        return batch.features[self.pooled_layer].float().mean((2, 3)).cpu()  # (n, c)
