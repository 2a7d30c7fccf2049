"""DRAEM: Zavrtanik, Kristan, Skočaj 2021, "DRAEM - A discriminatively trained reconstruction embedding for surface
anomaly detection", ICCV, arXiv:2108.07610.

The idea: parts of good images are replaced by foreign textures, of shapes that Perlin noise cuts out. One network, an
auto-encoder, learns to restore the good image (L2 and SSIM). A second one, a U-Net, sees the image beside its
restoration and learns which pixels were replaced (focal loss). It learns a boundary around how good images deviate from
their restorations, so that it need not know real defects. Its probability of an anomaly is the map; the image's score
is the maximum of the map after an average over 21 x 21 pixels.

The paper's, with the authors' code (VitjanZ/DRAEM): 700 epochs of batches of 8 at 256 px, Adam at 1e-4, a fifth of it
after 80 % and again after 90 % of the epochs; half of the images stay as they are; Perlin noise of 2^0 to 2^5 cells a
side, turned, above 0.5; three of ten augmentations of the texture, blended with a weight of the image from U(0, 0.8);
three in ten images are turned by up to 90 degrees before, black coming in; initial weights of deviation 0.02.

Ours:
- textures are generated, not the photographs of the Describable Textures Dataset.
- an epoch shows each image once; theirs draws as many with replacement.
- where the noise nowhere exceeds 0.5, its highest parts count, so that each image that should get a defect has one.
- the focal loss is computed from logits, without their smoothing by 1e-5; SSIM mirrors the image at its border.
- with `patience`, held-out images are judged by defects that are the same at each look.

Shapes: n images, h = w = image_size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, NonNegativeInt, PositiveInt
from al_models.parts.defects import draem_composite, texture_bank
from al_models.parts.defects.textures import turned
from al_models.parts.draw import Draw, Drawn
from al_models.parts.epochs import Prepare
from al_models.parts.losses import ssim_loss
from al_models.trained import Generators, TrainedDetector
from al_models.types import ImageBatch, ImageSource, Runtime, Traits


def focal_loss(logits: Tensor, masks: Tensor, focus: float) -> Tensor:
    """Mean of -(1 - p)^focus log p over pixels, p the probability of each pixel's class: a scalar, of logits (n, 2, h,
    w) and masks (n, h, w), 1 where the second class is right. Source: Lin et al. 2017, arXiv:1708.02002."""
    log_p = -F.cross_entropy(logits, masks.long(), reduction="none")  # (n, h, w)
    return -((1 - log_p.exp()).clamp(min=0) ** focus * log_p).mean()


def turned_at_random(image: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """An image uint8 (h, w, 3), with this chance turned by up to 90 degrees to either side."""
    if rng.random() >= share:
        return image
    degrees = rng.uniform(-90, 90)
    return np.stack([turned(image[..., c], degrees) for c in range(3)], axis=-1)


class Encoder(nn.Module):
    """Two convolutions a level, each level half the side of the one before: (n, c, h, w) -> one tensor a level."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_twice(a, b, b) for a, b in zip([channels, *widths[:-1]], widths, strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for level in self.levels:
            found.append(level(F.max_pool2d(found[-1], 2) if found else x))
        return found


class Reconstruction(nn.Module):
    """Images (n, 3, h, w) in [0, 1] -> the same without defects, by way of a sixteenth of the side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = Encoder(3, [width, 2 * width, 4 * width, 8 * width, 8 * width])
        way = [8 * width, 4 * width, 2 * width, width, width]  # channels on the way up
        self.after = nn.ModuleList(_once(w, w) for w in way[:-1])
        self.blocks = nn.ModuleList(_twice(a, a, b) for a, b in itertools.pairwise(way))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        *larger, x = self.encoder(images)
        for level, after, block in zip(reversed(larger), self.after, self.blocks, strict=True):
            x = block(after(_grown(x, level)))
        return self.last(x)


class Discrimination(nn.Module):
    """A U-Net: images beside their restorations (n, 6, h, w) -> logits of good and anomalous (n, 2, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
        self.encoder = Encoder(6, widths)
        way = [8 * width, 8 * width, 4 * width, 2 * width, width, width]  # channels on the way up
        self.after = nn.ModuleList(_once(a, b) for a, b in itertools.pairwise(way))
        self.blocks = nn.ModuleList(
            _twice(w + skip, w, w) for w, skip in zip(way[1:], reversed(widths[:-1]), strict=True)
        )
        self.last = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, pairs: Tensor) -> Tensor:
        *larger, x = self.encoder(pairs)
        for level, after, block in zip(reversed(larger), self.after, self.blocks, strict=True):
            x = block(torch.cat([after(_grown(x, level)), level], dim=1))
        return self.last(x)


class Networks(nn.Module):
    """Images (n, 3, h, w) in [0, 1] -> restorations of the same shape, and logits (n, 2, h, w)."""

    def __init__(self, reconstruction_width: int, discrimination_width: int) -> None:
        super().__init__()
        self.reconstruction = Reconstruction(reconstruction_width)
        self.discrimination = Discrimination(discrimination_width)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        restored = self.reconstruction(images)
        return restored.float(), self.discrimination(torch.cat([restored, images], dim=1)).float()


def _once(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _twice(inputs: int, between: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_once(inputs, between), _once(between, outputs))


def _grown(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


@dataclass(kw_only=True)
class Draem(TrainedDetector):
    """An auto-encoder that restores images, and a U-Net that sees both; learned: `network_` and `curve_`."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, uses_synthetic_defects=True, graph=True)
    training: ClassVar[Mapping[str, Any]] = {"schedule": "milestones", "milestones": (0.8, 0.9), "drop": 0.2}
    quick: ClassVar[Mapping[str, Any]] = {
        "image_size": 64,
        "reconstruction_width": 4,
        "discrimination_width": 4,
        "epochs": 60,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "defective": 1.0,
        "turned": 0.0,
        "textures": 4,
    }

    image_size: Annotated[int, Ge(64)] = 256
    epochs: int = 700
    batch_size: int = 8
    learning_rate: float = 1e-4
    reconstruction_width: PositiveInt = 128
    """Channels of the first level of the auto-encoder."""
    discrimination_width: PositiveInt = 64
    """Channels of the first level of the U-Net."""
    focus: NonNegativeFloat = 2.0
    """How much less pixels count that are judged right: the exponent gamma of the focal loss."""
    defective: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the images into which a defect is drawn."""
    turned: Annotated[float, Ge(0), Le(1)] = 0.3
    """Share of the images that are turned."""
    textures: PositiveInt = 200
    """Generated textures that defects are made of."""
    reach: NonNegativeInt = 10
    """Pixels to each side over which the map is averaged before its maximum scores the image."""

    def _network(self) -> nn.Module:
        return Networks(self.reconstruction_width, self.discrimination_width)

    def _prepare(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> Prepare:
        textures = texture_bank(self.textures, (self.image_size, self.image_size), runtime.seed)
        defect = partial(draem_composite, textures=textures)
        return Draw([defect], share=self.defective, augment=partial(turned_at_random, share=self.turned))

    def _loss(self, network: nn.Module, batch: Drawn) -> Tensor:
        clean = _pixels(batch.clean)
        restored, logits = network(_pixels(batch.images))
        loss = F.mse_loss(restored, clean) + ssim_loss(restored, clean)
        return loss + focal_loss(logits, batch.masks, self.focus)

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        _, logits = network(_pixels(batch.images))
        maps = logits.softmax(1)[:, 1]  # (n, h, w)
        smooth = F.avg_pool2d(maps[:, None], 2 * self.reach + 1, stride=1, padding=self.reach)
        return maps, smooth.flatten(1).amax(1)


def _pixels(images: Tensor) -> Tensor:
    """uint8 (n, h, w, 3) -> float32 (n, 3, h, w) in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255
