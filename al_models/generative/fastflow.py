"""FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows (Yu, Zheng, Wang, Li, Wu, Zhao and
Wu 2021, arXiv:2111.07677).

The idea: a normalizing flow maps the feature maps of a frozen backbone, as whole maps, to a standard normal. Its
subnets are convolutions, so that a position's likelihood also says whether it fits its neighbours. Each layer has a
flow of its own. The map is how unlikely the positions are, upsampled and averaged over the layers; the image's score is
its maximum.

Differs from the paper, or fills in what it leaves open:
- The layer normalization in front of a flow has no weights. In the implementations that reproduce the paper's figures
  it has, and its log-determinant is missing from their loss. The flow undoes weights that shrink, and its own
  log-determinant then grows without end, until the weights pass zero after some 1 / learning_rate steps and quality
  collapses.
- The authors published no code: clamp 2 and plain permutations are those of these implementations.
- A likelihood is given as exp(-mean z^2 / 2), as there, and the map is 1 minus its mean over the layers, so that 0 is
  the likeliest.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the paper's form.

Kept from the paper: 8 flow steps for CNNs, 20 for vision transformers (of these one layer: block 7 of DeiT, 40 of
CaiT); subnets of two convolutions, 3 x 3 and 1 x 1 in turns, as wide inside as their input (0.16 of it for
transformers); Adam at 1e-3, weight decay 1e-5, 500 epochs, batches of 32 images.

Shapes: n images, c channels, h x w positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from al_models.parameters import NonNegativeFloat, PositiveFloat, PositiveInt
from al_models.parts.coupling import Flow, HalfCoupling, Permutation, Scale, Subnet
from al_models.parts.frame import FRAME
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, Traits


def convolutions(side: int, ratio: float) -> Subnet:
    """Two convolutions of this side with a ReLU between them, `ratio` times as wide inside as their input."""

    def subnet(inputs: int, outputs: int) -> nn.Module:
        hidden = max(1, int(inputs * ratio))
        return nn.Sequential(
            nn.Conv2d(inputs, hidden, side, padding="same"), nn.ReLU(), nn.Conv2d(hidden, outputs, side, padding="same")
        )

    return subnet


class MapFlow(nn.Module):
    """The flow of one layer: maps (n, c, h, w) -> z of the same shape and the log-determinants (n,)."""

    def __init__(self, shape: tuple[int, int, int], steps: int, ratio: float, clamp: float, *, only_3x3: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape, elementwise_affine=False)
        blocks = []
        for step in range(steps):
            side = 1 if step % 2 and not only_3x3 else 3
            coupling = HalfCoupling(shape[0], convolutions(side, ratio), clamp=clamp)
            blocks += [coupling, Scale(shape[0]), Permutation(shape[0])]
        self.flow = Flow(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, logdet = self.flow(self.norm(x))
        return z, logdet


@dataclass(kw_only=True)
class Fastflow(FeatureTrainedDetector):
    """A convolutional flow a layer."""

    traits: ClassVar[Traits] = Traits(trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {"layers": (2, 3), "flow_steps": 2, "epochs": 20, "batch_size": 6}

    epochs: int = 500
    weight_decay: float = 1e-5
    flow_steps: PositiveInt = 8
    """Coupling steps of a layer's flow; the paper takes 8 on CNNs, 20 on transformers."""
    hidden_ratio: PositiveFloat = 1.0
    """Width of a subnet inside, as a share of its input's; the paper takes 1 on CNNs, 0.16 on transformers."""
    only_3x3: bool = False
    """Whether all subnets have 3 x 3 convolutions only, as the paper's do for small backbones such as ResNet-18."""
    clamp: PositiveFloat = 2.0
    """Largest log-scale of a coupling."""
    frame: float = FRAME
    sigma: NonNegativeFloat = 0.0
    """Gaussian smoothing of the map, in pixels; the paper has none."""

    def _network(self) -> nn.Module:
        return nn.ModuleList(
            MapFlow(shape, self.flow_steps, self.hidden_ratio, self.clamp, only_3x3=self.only_3x3)
            for shape in self._shapes()
        )

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        """Negative log-likelihood without its constant, summed over the layers (eq. 3)."""
        losses = [0.5 * z.square().flatten(1).sum(1) - logdet for z, logdet in self._mapped(network, batch)]
        return torch.stack(losses).sum(0).mean()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        unlikely = [1 - torch.exp(-0.5 * z.square().mean(1)) for z, _ in self._mapped(network, batch)]  # (n, h, w) each
        maps = self._layer_maps(unlikely, self.layers)
        return with_maximum(torch.stack(maps).mean(0))

    def _mapped(self, network: nn.Module, batch: ImageBatch) -> list[tuple[Tensor, Tensor]]:
        """z and log-determinants of each layer."""
        return [flow(batch.features[layer]) for layer, flow in zip(self.layers, network, strict=True)]  # type: ignore[arg-type]
