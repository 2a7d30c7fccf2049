"""MKD: Multiresolution Knowledge Distillation for Anomaly Detection (Salehi, Sadjadi, Baselizadeh, Rohban, Rabiee, CVPR
2021, arXiv:2011.11108).

The idea: a small network, the cloner, learns on good images to give the features of a large pretrained one, the source,
at several critical layers: their values, and the direction of each layer's whole feature vector. On an anomaly the two
disagree. How much they do is the image's score; where, says the gradient of that loss with respect to the image.

The paper's, with the authors' code (rohban-lab/Knowledge_Distillation_AD): images of 128 px, VGG-16, whose last four
pooling layers are the critical ones, and a cloner whose blocks are 16 channels wide up to their last convolution, with
batch norm but before a pooling layer; ADAM at 1e-3, batches of 64, 601 epochs for MVTec AD; the loss of a layer is the
mean squared difference and 1 - the cosine, weighted so that both begin at the same scale (0.5 on the values for MVTec
AD, 0.01 elsewhere). The first critical layer counts in training only. The image's score is the loss over the whole
image, `score="mean"`. The paper compares three gradients: plain, SmoothGrad and guided; this is the plain one, its
absolute values summed over the colours and smoothed (sigma 4), as in the code.

Ours: EfficientNet-Lite0, whose stages at strides 4 to 16 stand for the pooling layers; the paper's go on to 32, which
`layers=(1, 2, 3, 4)` would be, but that stage's gradient is coarse (one network after 4 epochs of `grid`, pixel AUROC:
84 judged with it, 92 without). Features are signed, so a critical convolution of the cloner has no ReLU before it is
compared, and it comes after the pooling, which would take maxima of signed values. Layers are brought to the scale of
the papers' features (`parts/patches.py`, RECTIFIED), which the cloner's weights begin at. The squared difference is
divided by the mean square of the layer on good images: it begins near 1, as 1 - the cosine does. The authors' code
stretches each gradient map to 0..1, between its minimum and its 99th percentile; here maps keep their scale, so that
images compare (times the image's side, since half precision would round values of 1e-5). Their opening by a disc of 3
pixels is of thresholded maps and left out. They show pixels in [0, 1] to both networks; here both get them as the
backbone's weights were trained on. The mean over a whole image hides a small defect, so the image's score is the
maximum over positions of the last layer's disagreement.

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
    """1 - cosine and mean squared difference times `weight` of each position of a layer (n, c, h, w): (n, h, w)."""
    a, b = mine.float(), theirs.float()
    return 1 - F.cosine_similarity(a, b) + weight * (a - b).square().mean(1)


def disagreement(mine: Sequence[Tensor], theirs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Loss of each image: the layers' 1 - cosine and mean squared difference times the layer's weight, summed: (n,).

    Of a layer that is 0 throughout the direction does not exist, and the cosine counts as 0.
    """
    total = torch.zeros(len(mine[0]), device=mine[0].device)
    for a, b, value_weight in zip(mine, theirs, weights, strict=True):
        a, b = a.float().flatten(1), b.float().flatten(1)  # (n, c * h * w)
        total = total + 1 - F.cosine_similarity(a, b) + value_weight * (a - b).square().mean(1)
    return total


class Cloner(nn.Module):
    """A small VGG that gives the source's shapes at its critical layers: (n, 3, size, size) -> [(n, c, h, w), ...]."""

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
    """Weight of the squared difference, against 1 of the direction."""
    score: Literal["maximum", "mean"] = "maximum"
    """What scores an image: the last layer's worst position, or the paper's loss over the whole image."""
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
        """Weights of the squared differences: (layers,)."""
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
