"""STPM: Student-Teacher Feature Pyramid Matching for Anomaly Detection (Wang, Han, Ding, Huang, BMVC 2021,
arXiv:2103.04257).

The idea: a network trained on ImageNet, frozen, is the teacher; a student of the same architecture starts from random
weights and learns, on good images alone, to give the teacher's features at several layers, each position's vector
scaled to unit length. Where the student has seen nothing of the kind, the two differ. Every layer gives a map of half
the squared distances, upsampled to the image; their product is the anomaly map, so that all layers must agree.

The paper's: ResNet-18 and its first three stages, images of 256 pixels; half the squared distance, averaged over
positions and summed over layers; SGD at a rate of 0.4, momentum 0.9, weight decay 1e-4, batches of 32, 100 epochs; of
all epochs the weights that are best on held-out good images. Nothing is smoothed, and no image is augmented.

Ours: EfficientNet-Lite0, the backbone that needs no download, is teacher and student (`backbone="resnet18"` is the
paper's). The map is the product's root of the number of layers, their geometric mean: all pixels and scores keep their
order, while products of three small distances would be lost where maps are stored in half precision. 10 % of the images
are held out and judged by the loss (the authors' code: 20 %, by the mean of the map). The authors' code leaves out the
factor one half in the loss and multiplies the maps at a quarter of the image's size. Along the rim, maps are brought to
the level that good images have inside (`parts/frame.py`): on a texture, the rim would decide the score; `frame=0` is
the paper's form.

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

    Of vectors of length 0, where a direction does not exist, the distance is to 0 itself.
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
    """As in the base; as many epochs as there are, so that nothing stops early and the best weights are kept."""
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
        """(n, h, w) of each layer, from the first to the last."""
        mine = network(standardised(batch.images, self.feature_spec()))
        layers = sorted(set(self.layers))  # the order in which a backbone gives them
        return [unit_distance(batch.features[layer], x) for layer, x in zip(layers, mine, strict=True)]
