"""FYD: Zheng, Wang, Deng, Bao, Zhao, Wu 2022, "Focus Your Distribution: Coarse-to-Fine Non-Contrastive Learning for
Anomaly Detection and Localization", ICME, arXiv:2110.04538.

The idea: a Gaussian per position (PaDiM) is the narrower, the better the positions of different images correspond. They
are brought into correspondence from coarse to fine. Image-level coarse alignment (ICA): a spatial transformer warps
each image by an affine map, trained so that images agree pixel by pixel (L2 distance over pairs of images).
Feature-level coarse alignment (FCA): one more transformer follows each stage of the network, without a loss of its own.
Then features that agree across images at each position are learned as in SimSiam (arXiv:2011.10566): encoder,
predictor, stopped gradient and negative cosine similarity, without negative examples. Gaussians, Mahalanobis distances
and smoothing are PaDiM's.

The paper's text and code could not be consulted. Known from descriptions of it are the two losses, what each of them
supervises and the places of the transformers. The transformers, heads of 1 x 1 convolutions, batches of 32 and 50
epochs are those of RegAD (arXiv:2207.07361), whose code builds on the same parts; optimiser, schedule and predictor are
SimSiam's.

Differs from the paper:
- The backbone stays frozen, and its stored features are warped and learned on. In place of the backbone's own weights,
  a residual block for each layer is trained (`Adapter`), which is the identity at first.
- Gaussians are of a random choice of `channels` of the blocks' outputs, as in PaDiM.
- Layers are brought to the scale of the papers' features (`parts/patches.py`, RECTIFIED).
- Each layer has a loss of its own, at its own size.
- Pairs are all pairs of a batch for features, and neighbours in a ring for pixels.
- Pixels are compared at 64 x 64, with each image's mean and contrast normalised, since images would otherwise agree
  best by all showing an empty corner. For the same reason each entry of an affine map stays within `reach` of the
  identity's: parts that move or turn by more are not aligned.
- The map is warped back by the inverse of the finest layer's affine map.

Shapes: n images, p = h * w positions of the finest layer, c channels of a layer, k channels kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveFloat, PositiveInt
from al_models.parts.epochs import moved
from al_models.parts.gaussian import PositionGaussians, mahalanobis, pack_symmetric, unpack_symmetric, whitening
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.patches import channel_counts, choose_channels, stack_layers, unit_layers
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

SIDE = 64
"""Pixels a side at which images are aligned."""


def warp(x: Tensor, theta: Tensor, beyond: str = "reflection") -> Tensor:
    """Maps (n, c, h, w), sampled where the affine maps (n, 2, 3) send each of their positions.

    `beyond`: torch's padding mode for what lies outside of the border, "reflection" or "border".
    """
    with torch.autocast(x.device.type, enabled=False):  # half precision would move places by a position
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x.float(), grid, mode="bilinear", padding_mode=beyond, align_corners=False)


def chained(first: Tensor, second: Tensor) -> Tensor:
    """The affine map (n, 2, 3) of two `warp`s, by the first map and then by the second, (n, 2, 3) each."""
    with torch.autocast(first.device.type, enabled=False):
        both = first[:, :, :2] @ second
    return torch.cat([both[:, :, :2], both[:, :, 2:] + first[:, :, 2:]], 2)


def inverse(theta: Tensor) -> Tensor:
    """The affine map (n, 2, 3) that undoes `warp`."""
    a, b, x, c, d, y = theta.flatten(1).unbind(1)
    entries = torch.stack([d, -b, b * y - d * x, -c, a, c * x - a * y], 1)
    return (entries / (a * d - b * c)[:, None]).view(-1, 2, 3)


def standard(images: Tensor) -> Tensor:
    """Images (n, c, h, w) with zero mean and unit contrast."""
    variance, mean = torch.var_mean(images, (1, 2, 3), correction=0, keepdim=True)
    return (images - mean) / (variance + 1e-4).sqrt()


def pixel_distance(images: Tensor) -> Tensor:
    """Mean L2 distance of the pixels of each image (n, c, h, w) and the next, the last to the first."""
    apart = images - images.roll(1, 0)
    return (apart.square().sum(1) + 1e-8).sqrt().mean()  # the root's slope at 0 is infinite


def disagreement(predicted: Tensor, encoded: Tensor) -> Tensor:
    """Mean negative cosine over all positions and all pairs of two images of a batch: (n, c, h, w) each.

    A batch of one is its own pair. No gradient flows to `encoded`.
    """
    p, z = F.normalize(predicted.float(), dim=1), F.normalize(encoded.detach().float(), dim=1)
    n = len(z)
    others = (z.sum(0, keepdim=True) - z) / (n - 1) if n > 1 else z
    return -(p * others).sum(1).mean()


class Localiser(nn.Module):
    """The affine map to warp an input by: (n, c, h, w) -> (n, 2, 3), each entry within `reach` of the identity's."""

    def __init__(self, channels: int, reach: float) -> None:
        super().__init__()
        self.reach = reach
        self.look = nn.Sequential(
            *_conv(channels, 64, 3),
            nn.MaxPool2d(3, stride=2, padding=1),
            *_conv(64, 16, 3),
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
            nn.Linear(16 * 64, 128),
            nn.ReLU(),
        )
        self.entries = nn.Linear(128, 6)
        nn.init.zeros_(self.entries.weight)
        nn.init.zeros_(self.entries.bias)

    def forward(self, x: Tensor) -> Tensor:
        entries = self.reach * torch.tanh(self.entries(self.look(x)).float()).view(-1, 2, 3)
        return entries + torch.eye(2, 3, device=x.device)


class Adapter(nn.Module):
    """Features learned on top of frozen ones, at first the same: (n, c, h, w) -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.relu(self.inner(x)))


class Stage(nn.Module):
    """One layer of the backbone: its transformer, its learned features, and the two heads that they are learned by."""

    def __init__(self, channels: int, reach: float) -> None:
        super().__init__()
        self.localiser = Localiser(channels, reach)
        self.adapter = Adapter(channels)
        self.encoder = nn.Sequential(
            *_conv(channels, channels), *_conv(channels, channels), nn.Conv2d(channels, channels, 1)
        )
        hidden = max(1, channels // 4)
        self.predictor = nn.Sequential(*_conv(channels, hidden), nn.Conv2d(hidden, channels, 1))


class Focus(nn.Module):
    """Images and their features, brought into correspondence; built from the layers' shapes (c, h, w), in order."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], reach: float) -> None:
        super().__init__()
        self.localiser = Localiser(3, reach)
        self.stages = nn.ModuleList(Stage(c, reach) for c, _, _ in shapes)

    def forward(self, images: Tensor, layers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Images (n, 3, side, side) and layers (n, c, h, w) -> affine maps, of the images and after each stage, and the
        layers' features in the common frame."""
        thetas, found = [self.localiser(images)], []
        for stage, x in zip(self.stages, layers, strict=True):
            theta = chained(thetas[-1], stage.localiser(warp(x, thetas[-1])))
            found.append(stage.adapter(warp(x, theta)).float())
            thetas.append(theta)
        return thetas, found


def _conv(inputs: int, outputs: int, side: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


@dataclass(kw_only=True)
class Fyd(FeatureTrainedDetector):
    """Gaussians per position of aligned and adapted features; learned beside the network: `scale_`
    (layers,), `kept_` (k,), `mean_` (p, 1, k) and `whitening_` (p, k, k)."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, aligned_images_only=True, graph=True)
    training: ClassVar[Mapping[str, Any]] = {"optimiser": "sgd", "schedule": "cosine"}
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 2, "batch_size": 3, "channels": 20}

    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 0.05 * 32 / 256
    """SimSiam's, for batches of 32."""
    weight_decay: float = 1e-4
    reach: Annotated[float, Ge(0), Lt(0.5)] = 0.1
    """Largest difference of an affine map's entries from the identity's; as a shift, 0.1 is a twentieth of the image's
    side."""
    channels: PositiveInt = 100
    """Size of the random subset of channels: 100 for ResNet-18, 550 for Wide-ResNet-50-2 in PaDiM."""
    epsilon: PositiveFloat = 0.01
    """Added to the diagonal of each covariance (PaDiM, eq. 1), of features at the papers' scale."""
    sigma: NonNegativeFloat = SIGMA

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        self._learn_scales(source, rows, runtime)
        self.kept_ = choose_channels(source.read(rows[:1]).features, self.layers, self.channels, runtime.seed)

    def _network(self) -> nn.Module:
        return Focus(self._shapes(), self.reach)

    def _finish(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        gaussians: PositionGaussians | None = None
        for done, batch in enumerate(source, start=1):
            with torch.no_grad():
                x, _ = self._embed(self.network_, moved(batch, runtime.device))  # (p, n, k)
            if gaussians is None:
                gaussians = PositionGaussians(x.shape[0], x.shape[2], runtime.device)
            gaussians.update(x)
            runtime.progress("fit Fyd: Gaussians", min(done * source.batch_size, len(source)), len(source))
        assert gaussians is not None  # fit refuses an empty source
        self.mean_ = gaussians.mean
        self.whitening_ = whitening(gaussians.count, gaussians.scatter, self.epsilon)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        # Pixels train the first transformer; agreement of features trains the others, the adapters and the heads.
        images = self._small(batch)
        thetas, layers = network(images, unit_layers(batch.features, self.layers, self.scale_))
        loss = pixel_distance(standard(warp(images, thetas[0])))
        for stage, x in zip(network.stages, layers, strict=True):
            encoded = stage.encoder(x)
            loss = loss + disagreement(stage.predictor(encoded), encoded) / len(layers)
        return loss

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        x, theta = self._embed(network, batch)
        self.mean_, self.whitening_ = self.mean_.to(x.device), self.whitening_.to(x.device)
        distances = mahalanobis(x, self.mean_, self.whitening_).T  # (n, p)
        maps = to_maps(
            distances.reshape(-1, *self._finest()[1]),
            self.image_size,
            self.sigma,
            self._offset(channel_counts(batch.features, self.layers)),
        )
        # What the aligned frame does not show is like its border: a reflection would show a defect twice.
        return with_maximum(warp(maps[:, None], inverse(theta), "border")[:, 0])

    def _embed(self, network: nn.Module, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """The kept channels of the stacked layers (p, n, k), and the affine map (n, 2, 3) of the finest layer."""
        thetas, layers = network(self._small(batch), unit_layers(batch.features, self.layers, self.scale_))
        whole = stack_layers(dict(zip(self.layers, layers, strict=True)), self.layers, mode="nearest")
        kept = whole[:, self.kept_.to(whole.device)]
        return kept.flatten(2).permute(2, 0, 1).contiguous(), thetas[1 + self._finest()[0]]

    def _finest(self) -> tuple[int, tuple[int, int]]:
        """Place among the layers, and (h, w), of the one with the most positions."""
        sizes = [(h, w) for _, h, w in self._shapes()]
        place = max(range(len(sizes)), key=lambda i: sizes[i][0] * sizes[i][1])
        return place, sizes[place]

    def _small(self, batch: ImageBatch) -> Tensor:
        """Images as they are aligned: (n, 3, side, side), brightness in [-0.5, 0.5]."""
        return F.adaptive_avg_pool2d(batch.images.permute(0, 3, 1, 2).float() / 255 - 0.5, SIDE)

    def state(self) -> dict[str, np.ndarray]:
        """As learned, without the zeros of the triangular whitenings: half the bytes."""
        state = super().state()
        return {**state, "whitening_": pack_symmetric(torch.from_numpy(state["whitening_"])).contiguous().numpy()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take back what `state` gave. Raises InvalidInput when it is of another network."""
        super().load_state(state)
        self.whitening_ = unpack_symmetric(self.whitening_, self.mean_.shape[2]).tril()
        return self
