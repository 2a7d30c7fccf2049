"""CS-Flow: Fully Convolutional Cross-Scale-Flows for Image-based Defect Detection (Rudolph, Wehrbein, Rosenhahn and
Wandt 2022, arXiv:2110.02855).

The idea: a frozen network sees the image at full, half and quarter size. One normalizing flow maps the three feature
maps jointly to three maps of standard normal z. The subnets of its couplings are convolutions, so that z keeps its
place in the image, and each scale also receives the hidden channels of its neighbouring scales. Unlikely features have
a large z: the map is the mean square of z at each position of the finest scale, and the image's score is half the mean
square over all scales.

Differs from the paper:
- Images have 256 px and features are the stage at stride 16 of EfficientNet-Lite0 (112 channels, 16 x 16 positions at
  full size), instead of 768 px and EfficientNet-B5 (304 channels at stride 32, 24 x 24 positions).
- Smaller copies of the image are antialiased; the authors take every second pixel.
- Features are standardised on the good images, since their scale differs between backbones. Couplings begin as the
  identity, so that training would otherwise first have to learn to divide by the features' deviation.
- z is not cut off at a million.
- Along the rim, the map is brought to the level that good images have inside (`parts/frame.py`), and the image's score
  is the map's maximum. At 256 px z is much larger at the rim than inside, which would decide the paper's score;
  `frame=0` is the paper's form.

Kept from the paper and the authors' code (github.com/marco-rudolph/cs-flow): 4 blocks of a random permutation and a
coupling, whose subnets have 1024 hidden channels and convolutions of 3 x 3, 5 x 5 in the last block; log-scales within
±3; Adam at 2e-4 (eps 1e-4, weight decay 1e-5) with gradients clipped to norm 1, 240 epochs of batches of 16; a map of
the finest scale alone, upsampled without smoothing.

Shapes: n images, c channels, h x w positions, s scales from the finest to the coarsest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import MaxLen, MinLen
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.detector import FLOAT16_MAX
from al_models.parameters import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from al_models.parts.coupling import CrossScaleCoupling, Permutation, log_likelihood
from al_models.parts.frame import FRAME
from al_models.trained import FeatureTrainedDetector, Generators
from al_models.types import SCALE_STEP, FeatureSpec, ImageBatch, ImageSource, Runtime, Traits


class CrossConvolutions(nn.Module):
    """Maps of s scales -> as many of the same sizes, each made of its own and its neighbours' hidden channels."""

    def __init__(self, inputs: int, outputs: int, scales: int, *, hidden: int, kernel: int) -> None:
        super().__init__()

        def convolutions(count: int, channels: int, stride: int = 1) -> nn.ModuleList:
            made = [nn.Conv2d(channels, outputs, kernel, stride, kernel // 2) for _ in range(count)]
            return nn.ModuleList(made)

        self.enter = nn.ModuleList([nn.Conv2d(inputs, hidden, kernel, padding=kernel // 2) for _ in range(scales)])
        self.stay = convolutions(scales, hidden)
        self.up = convolutions(scales - 1, hidden)  # from the next coarser scale
        self.down = convolutions(scales - 1, hidden, stride=2)  # to it
        self.weight = nn.Parameter(torch.zeros(scales))  # of each scale's outcome: the coupling begins as the identity

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        hidden = [F.leaky_relu(enter(x), 0.1) for enter, x in zip(self.enter, maps, strict=True)]
        found = [stay(y) for stay, y in zip(self.stay, hidden, strict=True)]
        for s, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            found[s] = found[s] + up(_at_size(hidden[s + 1], hidden[s]))
            found[s + 1] = found[s + 1] + _at_size(down(hidden[s]), hidden[s + 1])
        return [weight * y for weight, y in zip(self.weight, found, strict=True)]


def _at_size(x: Tensor, like: Tensor) -> Tensor:
    size = like.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class CrossScaleFlow(nn.Module):
    """Maps of s scales, each (n, c, h_s, w_s) -> (their z, log-determinant (n,)); standardised first by a mean and a
    spread (s, c)."""

    def __init__(self, mean: Tensor, spread: Tensor, *, hidden: int, kernels: Sequence[int], clamp: float) -> None:
        super().__init__()
        scales, channels = mean.shape
        self.register_buffer("mean", mean[:, :, None, None])
        self.register_buffer("spread", spread[:, :, None, None])
        self.orders = nn.ModuleList([nn.ModuleList([Permutation(channels) for _ in range(scales)]) for _ in kernels])

        def coupling(kernel: int) -> CrossScaleCoupling:
            def subnet(inputs: int, outputs: int) -> nn.Module:
                return CrossConvolutions(inputs, outputs, scales, hidden=hidden, kernel=kernel)

            return CrossScaleCoupling(channels, subnet, clamp=clamp)

        self.couplings = nn.ModuleList([coupling(kernel) for kernel in kernels])

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        z = [(x - mean) / spread for x, mean, spread in zip(maps, self.mean, self.spread, strict=True)]
        # The same for all images, and so without effect but on the loss's value: that of the features' own density.
        rows = zip(maps, self.spread, strict=True)
        total = -sum(spread.log().sum() * x.shape[2] * x.shape[3] for x, spread in rows).expand(maps[0].shape[0])
        for orders, coupling in zip(self.orders, self.couplings, strict=True):
            z, logdet = coupling([order(x)[0] for order, x in zip(orders, z, strict=True)])
            total = total + logdet
        return z, total


@dataclass(kw_only=True)
class CsFlow(FeatureTrainedDetector):
    """One normalizing flow over one layer's features at several scales; learned: `network_`, `curve_`, `shapes_`, and
    the channels' `mean_` and `spread_` (s, c)."""

    traits: ClassVar[Traits] = Traits(trains=True, graph=True)
    training: ClassVar[Mapping[str, Any]] = {"eps": 1e-4, "clip": 1.0}
    quick: ClassVar[Mapping[str, Any]] = {"hidden": 16, "epochs": 8, "learning_rate": 2e-3}

    layers: Annotated[tuple[NonNegativeInt, ...], MinLen(1), MaxLen(1)] = (3,)
    """Layer whose features the flow models; exactly one."""
    scales: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (1.0, 0.5, 0.25)
    """Shares of the image's size, each half of the one before."""
    blocks: PositiveInt = 4
    """Coupling blocks, one after the other."""
    hidden: PositiveInt = 1024
    """Channels inside the subnets."""
    clamp: PositiveFloat = 3.0
    """Largest log-scale of a coupling."""
    frame: float = FRAME
    sigma: NonNegativeFloat = 0.0
    """Standard deviation of the map's smoothing, in pixels; the paper smooths nothing."""
    epochs: int = 240
    batch_size: int = 16
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5

    def feature_spec(self) -> FeatureSpec:
        """One layer, at all scales."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights, scales=tuple(self.scales))

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        # Mean and deviation of each channel at each scale.
        moments = torch.zeros(2, len(self.scales), self._shapes()[0][0], dtype=torch.float64)  # means of x and of x^2
        for part in source.batches(rows):
            for s, x in enumerate(self._maps(part)):
                x = x.to(runtime.device).double()
                found = torch.stack([x.mean((2, 3)), x.square().mean((2, 3))]).sum(1)  # (2, c)
                moments[:, s] += found.cpu() / len(rows)
        mean, square = moments  # (s, c) each
        spread = (square - mean.square()).clamp(min=0).sqrt()
        # A channel that never varied would make any change infinitely unlikely; plain gray images vary in none.
        least = 0.01 * float(spread.square().mean().sqrt())
        self.mean_, self.spread_ = mean.float(), spread.clamp(min=least or 1.0).float()

    def _network(self) -> nn.Module:
        kernels = [3] * (self.blocks - 1) + [5]
        return CrossScaleFlow(self.mean_, self.spread_, hidden=self.hidden, kernels=kernels, clamp=self.clamp)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        z, logdet = network(self._maps(batch))
        z = _vectors(z)
        return -log_likelihood(z, logdet).mean() / z.shape[1]

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        z, _ = network(self._maps(batch))
        maps = self._layer_maps([z[0].square().mean(1)], self.layers)[0]
        return maps.clamp(max=FLOAT16_MAX), (0.5 * _vectors(z).square().mean(1)).clamp(max=FLOAT16_MAX)

    def _maps(self, batch: ImageBatch) -> list[Tensor]:
        return [batch.features[self.layers[0] + SCALE_STEP * s] for s in range(len(self.scales))]


def _vectors(maps: Sequence[Tensor]) -> Tensor:
    """All scales' values of an image, one after the other: (n, sum of c h w)."""
    return torch.cat([x.flatten(1) for x in maps], dim=1)
