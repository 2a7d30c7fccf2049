"""STPM: Student-Teacher Feature Pyramid Matching for Anomaly Detection (Wang, Han, Ding, Huang, BMVC 2021,
arXiv:2103.04257).

The idea: a frozen network trained on ImageNet is the teacher. A student of the same architecture starts from random
weights and learns, on good images alone, to match the teacher's features at several layers, with each position's vector
scaled to unit length. On what the student has never seen, the two differ. Each layer gives a map of half the squared
distances, upsampled to the image; the anomaly map is their product, so that all layers must agree.

Differs from the paper:
- EfficientNet-Lite0, the backbone that needs no download, is teacher and student; `backbone="resnet18"` is the paper's.
- The map is the geometric mean of the layers' maps, a root of the paper's product. All pixels and scores keep their
  order, while products of three small distances would be lost where maps are stored in half precision.
- 10 % of the images are held out, and the best weights are those of the lowest loss on them (the authors' code: 20 %,
  by the mean of the map).
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the paper's form.

Kept from the paper: the first three stages; images of 256 pixels; half the squared distance, averaged over positions
and summed over layers, as the loss; SGD at a rate of 0.4, momentum 0.9, weight decay 1e-4, batches of 32, 100 epochs;
no smoothing and no augmentation. The authors' code differs from the paper here: it leaves out the factor one half in
the loss and multiplies the maps at a quarter of the image's size.

Shapes: n images, c channels of a layer, h x w positions of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat
from al_models.parts.backbone import standardised, untrained
from al_models.parts.frame import FRAME
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, Traits


def unit_distance(a: Tensor, b: Tensor) -> Tensor:
    """Half the squared distance of the positions' vectors, each scaled to unit length: (n, c, h, w) -> (n, h, w).

    A vector of length 0 has no direction; it counts as 0.
    """
    apart = F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)  # (n, c, h, w)
    return apart.square().sum(1) / 2  # in [0, 2]


@dataclass(kw_only=True)
class Stpm(FeatureTrainedDetector):
    """A student of the teacher's architecture; learned: `network_`, `shapes_` and `curve_`."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {"layers": (1, 2), "epochs": 6, "batch_size": 2, "learning_rate": 0.1}
    training: ClassVar[Mapping[str, Any]] = {"optimiser": "sgd", "momentum": 0.9}

    learning_rate: float = 0.4
    weight_decay: float = 1e-4
    patience: int | None = 100
    """Looks at held-out images, one an epoch, without improvement after which to stop. By default as many as there are
    epochs, so that nothing stops early and the best weights are kept."""
    frame: float = FRAME
    sigma: NonNegativeFloat = 0.0
    """Gaussian smoothing of each layer's map, in pixels; the paper's is 0."""

    def _network(self) -> nn.Module:
        return untrained(self.feature_spec())

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        return torch.stack([distance.mean() for distance in self._distances(network, batch)]).sum()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        maps = self._layer_maps(self._distances(network, batch), sorted(set(self.layers)))
        return with_maximum(torch.stack(maps).prod(0) ** (1 / len(maps)))  # (n, size, size)

    def _distances(self, network: nn.Module, batch: ImageBatch) -> list[Tensor]:
        """Distances (n, h, w) of student and teacher in each layer, from the first to the last."""
        mine = network(standardised(batch.images, self.feature_spec()))
        layers = sorted(set(self.layers))  # the order in which a backbone gives them
        return [unit_distance(batch.features[layer], x) for layer, x in zip(layers, mine, strict=True)]
