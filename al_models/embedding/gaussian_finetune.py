"""Gaussian fine-tuning: Rippel, Chavan, Lei, Merhof 2021, "Transfer Learning Gaussian Anomaly Detection by Fine-tuning
Representations", arXiv:2108.04116; on top of Rippel, Mertens, Merhof 2021, "Modeling the Distribution of Normal Data in
Pre-Trained Deep Features for Anomaly Detection", arXiv:2005.14140.

The idea: the pretrained features of good images are described by a Gaussian for each layer, with Ledoit-Wolf shrinkage
of the covariance. The anomaly score is the Mahalanobis distance, summed over the layers. The whole network is then
fine-tuned with a very small learning rate so that good images lie closer to these Gaussians, which stay fixed. If
everything comes closer, defects too, the network is forgetting. Held-out good images are therefore also judged after
augmentations that are common in training (vicinal risk minimisation), and tuning stops when the distance of the
augmented images falls faster than that of the good ones.

Known from the papers: EfficientNet-B4 and its levels, the sum over them, Ledoit-Wolf, the objective, the fixed
Gaussians, and that early stopping looks at augmented images. Only the first paper's code is public, which judges whole
images by features averaged over positions; the second paper's text could not be consulted. The rest is our reading.

Differs from the papers:
- The offline backbone and three of its layers stand for EfficientNet-B4 and its levels.
- Each position of each layer has a Gaussian of its own, as in PaDiM, so images must be aligned. One Gaussian for all
  positions of a layer did far worse.
- `epsilon` is added to the diagonal, of layers at the scale of the papers' features (`parts/patches.py`, RECTIFIED),
  for positions without any spread.
- All weights up to the last layer are tuned. Batch norms are folded, that is, fixed at their pretrained statistics.
  Nothing but the small learning rate and early stopping keeps the weights near their start.
- Early stopping watches a ratio: the mean distance of held-out good images over that of the same images with a square
  cut out (Cutout), with a square replaced by another place of the image (CutMix), or blended with their mirror image
  (Mixup).
- The image score is the maximum of the map.

Shapes: n images, p = h * w positions of a layer, c channels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from al_models.parameters import NonNegativeFloat, PositiveFloat
from al_models.parts.backbone import cached_backbone, standardised
from al_models.parts.gaussian import PositionGaussians, pack_symmetric, unpack_symmetric, whitening
from al_models.parts.maps import SIGMA
from al_models.parts.patches import on_device
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits


def ledoit_wolf(scatter: Tensor, fourth: Tensor, count: int) -> Tensor:
    """Scatters (p, c, c) of `count` vectors each, shrunk towards multiples of the identity by the share of least error.

    `scatter` is the sum of outer products about the mean, `fourth` (p,) that of the fourth powers of distances from it.
    Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", section 3.3.
    """
    identity = torch.eye(scatter.shape[1], dtype=scatter.dtype, device=scatter.device)
    spheres = scatter.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * identity
    spread = (scatter - spheres).square().sum((1, 2))
    error = torch.minimum(fourth - scatter.square().sum((1, 2)) / count, spread)
    share = torch.where(spread > 0, error / spread, torch.ones_like(spread))
    return torch.lerp(scatter, spheres, share[:, None, None])


def vicinal(x: Tensor) -> list[Tensor]:
    """Images (n, 3, h, w) with a square cut out, with a square from elsewhere, and blended with their mirror image.

    Nothing is random, so that one look at the held-out images can be compared with the next.
    """
    h, w = x.shape[2:]
    rows, columns = slice(h // 4, h - h // 4), slice(w // 4, w - w // 4)
    cut, mixed = x.clone(), x.clone()
    cut[:, :, rows, columns] = 0
    mixed[:, :, rows, columns] = x.roll((h // 3, w // 3), (2, 3))[:, :, rows, columns]
    return [cut, mixed, (x + x.flip(3)) / 2]


class Tuned(nn.Module):
    """A pretrained network whose training goes on: (n, 3, h, w), as `standardised` gives it -> its layers, in order."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()  # batch norms of a backbone that could not be folded keep their pretrained statistics
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.backbone(x))


@dataclass(kw_only=True)
class GaussianFinetune(FeatureTrainedDetector):
    """Mahalanobis distances of features that were fine-tuned to be near; learned beside the network: `scale_`
    (layers,), and for each layer `mean{layer}_` (p, 1, c) and `whitening{layer}_` (p, c, c)."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, aligned_images_only=True, graph=True)
    training: ClassVar[Mapping[str, Any]] = {"optimiser": "adam"}
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 1, "batch_size": 6, "layers": (1, 2)}

    epochs: int = 10
    """Passes over the images, at most."""
    batch_size: int = 16
    learning_rate: float = 1e-6
    patience: int | None = 3
    epsilon: PositiveFloat = 0.01
    """Added to the diagonal of each covariance (PaDiM, arXiv:2011.08785, eq. 1), of features at the papers' scale."""
    sigma: NonNegativeFloat = SIGMA

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        self._learn_scales(source, rows, runtime)
        exact = {"dtype": torch.float64, "device": runtime.device}
        gaussians, fourth = {}, {}
        for layer, (c, h, w) in zip(self.layers, self._shapes(), strict=True):
            mean, scatter = torch.zeros(h * w, 1, c, **exact), torch.zeros(h * w, c, c, **exact)
            gaussians[layer] = PositionGaussians.of(0, mean, scatter)
            fourth[layer] = torch.zeros(h * w, **exact)
        # Means and scatters in a first pass, fourth moments about these means in a second.
        for batch in source.batches(rows):
            for layer, x in self._stored(batch, runtime).items():
                gaussians[layer].update(x)
        for batch in source.batches(rows):
            for layer, x in self._stored(batch, runtime).items():
                fourth[layer] += (x - gaussians[layer].mean).square().sum(2).square().sum(1)
        for layer, found in gaussians.items():
            shrunk = ledoit_wolf(found.scatter, fourth[layer], found.count)
            setattr(self, f"mean{layer}_", found.mean.float())
            # Ledoit and Wolf divide by the number of images, not by one less.
            setattr(self, f"whitening{layer}_", whitening(found.count + 1, shrunk, self.epsilon).float())

    def _stored(self, batch: ImageBatch, runtime: Runtime) -> dict[int, Tensor]:
        """The pretrained features of a batch, at the papers' scale: layer -> float64 (p, n, c)."""
        features = on_device(batch, runtime.device)
        scales = dict(zip(self.layers, self.scale_.tolist(), strict=True))
        return {layer: _by_position(features[layer].double() / scales[layer]) for layer in self.layers}

    def _network(self) -> nn.Module:
        return Tuned(copy.deepcopy(cached_backbone(self.feature_spec(), "cpu").network))

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        return self._mean_distance(network, standardised(batch.images, self.feature_spec()))

    def _held_out_loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        """The mean distance of the images over that of the images after an augmentation, mean over augmentations."""
        x = standardised(batch.images, self.feature_spec())
        good = self._mean_distance(network, x)
        return torch.stack([good / self._mean_distance(network, changed) for changed in vicinal(x)]).mean()

    def _mean_distance(self, network: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([distances.mean() for distances in self._distances(network, x)]).sum()

    def _distances(self, network: nn.Module, x: Tensor) -> list[Tensor]:
        """Each layer's Mahalanobis distances (n, h, w) of standardised images (n, 3, h, w)."""
        found, scales = [], dict(zip(self.layers, self.scale_.tolist(), strict=True))
        for layer, features in zip(sorted(set(self.layers)), network(x), strict=True):
            mean, whiten = (self._on(x.device, f"{name}{layer}_") for name in ("mean", "whitening"))
            with torch.autocast(x.device.type, enabled=False):  # half precision would lose the narrow directions
                white = torch.bmm(_by_position(features.float() / scales[layer]) - mean, whiten.mT)  # (p, n, c)
            squared = white.square().sum(2).clamp(min=1e-12)  # the root's slope at 0 is infinite
            found.append(squared.sqrt().T.reshape(-1, *features.shape[2:]))
        return found

    def _on(self, device: torch.device, name: str) -> Tensor:
        setattr(self, name, getattr(self, name).to(device))
        found: Tensor = getattr(self, name)
        return found

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        layers = self._distances(network, standardised(batch.images, self.feature_spec()))
        return with_maximum(torch.stack(self._layer_maps(layers, sorted(set(self.layers)))).sum(0))

    def state(self) -> dict[str, np.ndarray]:
        """As learned, without the zeros of the triangular whitenings: half the bytes."""
        state = super().state()
        names = [f"whitening{layer}_" for layer in self.layers]
        return state | {name: pack_symmetric(torch.from_numpy(state[name])).contiguous().numpy() for name in names}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take back what `state` gave. Raises InvalidInput when it is of another network."""
        super().load_state(state)
        for layer in self.layers:
            packed, mean = getattr(self, f"whitening{layer}_"), getattr(self, f"mean{layer}_")
            setattr(self, f"whitening{layer}_", unpack_symmetric(packed, mean.shape[2]).tril())
        return self


def _by_position(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (p, n, c)."""
    return x.flatten(2).permute(2, 0, 1).contiguous()
