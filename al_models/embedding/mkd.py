"""MKD: Multiresolution Knowledge Distillation for Anomaly Detection (Salehi, Sadjadi, Baselizadeh, Rohban, Rabiee, CVPR
2021, arXiv:2011.11108).

The idea: a small network, the cloner, is trained on good images to reproduce the features of a large pretrained one,
the source, at several critical layers: their values, and the direction of each layer's whole feature vector. On an
anomaly the two disagree. The size of the disagreement is the image's score; the gradient of that loss with respect to
the image is the map.

Differs from the paper:
- EfficientNet-Lite0, with its stages at strides 4 to 16, stands for VGG-16, whose last four pooling layers go on to
  stride 32. `layers=(1, 2, 3, 4)` would, too, but the gradient of that stage is coarse and lowers pixel AUROC.
- Features are signed, so a critical convolution of the cloner has no ReLU before it is compared. It comes after the
  pooling layer instead of before it, since maxima of signed values would distort them.
- Layers are brought to the scale of the papers' features (`parts/patches.py`, RECTIFIED), which the cloner's initial
  weights produce.
- The squared difference is divided by the layer's mean square on good images, and its weight is 1. It thus begins near
  1, as 1 - cosine does. The authors weight the two so that both begin at the same scale (0.5 on the values for MVTec
  AD, 0.01 elsewhere).
- The authors' code stretches each gradient map to 0..1, between its minimum and its 99th percentile. Here maps keep
  their scale, so that images can be compared; they are multiplied by the image's side, since half precision would round
  values of 1e-5.
- The authors' opening by a disc of 3 pixels is of thresholded maps and left out.
- They show pixels in [0, 1] to both networks; here both get pixels normalised as the backbone's weights expect.
- The image score is the maximum over positions of the last layer's disagreement, since the mean over a whole image
  hides a small defect. `score="mean"` is the paper's.

Kept from the paper and the authors' code (rohban-lab/Knowledge_Distillation_AD): images of 128 px; a cloner whose
blocks are 16 channels wide up to their last convolution, with batch norm in all but that one; Adam at 1e-3, batches of
64, 601 epochs; mean squared difference plus 1 - cosine for each layer; the first critical layer counts in training
only. Of the paper's three gradients (plain, SmoothGrad, guided) this is the plain one, its absolute values summed over
the colours and smoothed (sigma 4).

Shapes: n images, c channels of a layer, h x w positions of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.backbone import cached_backbone, standardised
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.patches import layer_scales, unit_layers
from al_models.trained import FeatureTrainedDetector, Generators
from al_models.types import ImageBatch, ImageSource, Runtime, Traits


def local_disagreement(mine: Tensor, theirs: Tensor, weight: Tensor) -> Tensor:
    """Disagreement at each position of a layer (n, c, h, w), 1 - cosine plus mean squared difference times `weight`:
    (n, h, w)."""
    a, b = mine.float(), theirs.float()
    return 1 - F.cosine_similarity(a, b) + weight * (a - b).square().mean(1)


def disagreement(mine: Sequence[Tensor], theirs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Loss of each image: the layers' 1 - cosine and mean squared difference times the layer's weight, summed: (n,).

    A layer that is 0 throughout has no direction, and its cosine counts as 0.
    """
    total = torch.zeros(len(mine[0]), device=mine[0].device)
    for a, b, value_weight in zip(mine, theirs, weights, strict=True):
        a, b = a.float().flatten(1), b.float().flatten(1)  # (n, c * h * w)
        total = total + 1 - F.cosine_similarity(a, b) + value_weight * (a - b).square().mean(1)
    return total


class Cloner(nn.Module):
    """A small VGG with the source's shapes at its critical layers: (n, 3, size, size) -> [(n, c, h, w), ...]."""

    def __init__(self, size: int, shapes: Sequence[tuple[int, int, int]], width: int) -> None:
        super().__init__()
        self.blocks, self.critical = nn.ModuleList(), nn.ModuleList()
        channels, side = 3, size
        for c, h, w in shapes:
            steps: list[nn.Module] = []
            halvings = round(math.log2(side / h))
            for halving in range(halvings, 0, -1):
                # Of sides that are not a power of two times h, the last pooling evens out what is left.
                grid = (h, w) if halving == 1 else (h * 2 ** (halving - 1), w * 2 ** (halving - 1))
                steps += [_narrow(channels, width), _narrow(width, width), nn.AdaptiveMaxPool2d(grid)]
                channels = width
            if halvings < 1:  # a layer of the same grid
                steps += [_narrow(channels, width), _narrow(width, width), nn.AdaptiveMaxPool2d((h, w))]
            self.blocks.append(nn.Sequential(*steps))
            self.critical.append(nn.Conv2d(width, c, 3, padding=1))
            channels, side = c, h
        self.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for block, critical in zip(self.blocks, self.critical, strict=True):
            found.append(critical(block(x)))
            x = F.relu(found[-1])
        return found


def _narrow(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)


@dataclass(kw_only=True)
class Mkd(FeatureTrainedDetector):
    """A small cloner of the backbone, whose critical layers are `layers`; learned: `network_`, `scale_` and `energy_`
    (layers,), `shapes_` and `curve_`."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, gradients_in_predict=True)
    quick: ClassVar[Mapping[str, Any]] = {
        "layers": (2, 3),
        "width": 8,
        "epochs": 20,
        "batch_size": 2,
        "learning_rate": 3e-3,
    }

    image_size: PositiveInt = 128
    epochs: int = 601
    batch_size: int = 64
    width: PositiveInt = 16
    """Channels of the cloner between its critical convolutions."""
    value_weight: NonNegativeFloat = 1.0
    """Weight of the squared difference, beside 1 for the direction."""
    score: Literal["maximum", "mean"] = "maximum"
    """Score of an image: the last layer's largest disagreement at a position, or the paper's mean, the loss over the
    whole image."""
    sigma: NonNegativeFloat = SIGMA

    def _network(self) -> nn.Module:
        shapes = dict(zip(self.layers, self._shapes(), strict=True))
        return Cloner(self.image_size, [shapes[layer] for layer in self._critical()], self.width)

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        self.scale_ = layer_scales(source, rows, self._critical(), runtime.device)
        energy = torch.zeros(len(self._critical()), dtype=torch.float64)
        for batch in source.batches(rows):
            layers = self._unit(batch.features)
            energy += torch.stack([x.double().square().mean() for x in layers]) * len(batch)
        self.energy_ = (energy / len(rows)).float()  # (layers,)

    def _critical(self) -> list[int]:
        """The layers in the order in which a backbone gives them."""
        return sorted(set(self.layers))

    def _unit(self, features: Mapping[int, Tensor]) -> list[Tensor]:
        """The critical layers at the scale of the papers' features, which the cloner's weights begin at."""
        return unit_layers(features, self._critical(), self.scale_)

    def _weights(self, device: torch.device) -> Tensor:
        """The weights of the layers' squared differences: (layers,)."""
        return self.value_weight / self.energy_.clamp(min=1e-6).to(device)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        mine = network(standardised(batch.images, self.feature_spec()))
        return disagreement(mine, self._unit(batch.features), self._weights(batch.images.device)).mean()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        spec = self.feature_spec()
        source = cached_backbone(spec, str(batch.images.device))
        x = standardised(batch.images, spec).requires_grad_()  # (n, 3, h, w)
        mine, theirs, weights = network(x), self._unit(source.features(x)), self._weights(x.device)
        judged = slice(len(mine) > 1, None)  # the first critical layer is for training
        losses = disagreement(mine[judged], theirs[judged], weights[judged])  # (n,)
        # An image's loss depends on that image alone, so the gradient of the sum holds each one's own.
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        saliency = gradient.abs().sum(1) * self.image_size  # (n, h, w)
        worst = local_disagreement(mine[-1], theirs[-1], weights[-1]).flatten(1).amax(1)
        scores = losses if self.score == "mean" else worst
        return to_maps(saliency, self.image_size, self.sigma), scores
