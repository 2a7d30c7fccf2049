"""Defects drawn into batches of good images by the threads of `Epochs(prepare=...)`, ahead of the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from al_models.errors import InvalidInput
from al_models.parts.defects import Defect
from al_models.types import ImageBatch

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""A good image uint8 (h, w, 3) -> another good image of the same size."""


@dataclass(frozen=True)
class Drawn:
    """Good images, and the same with a defect drawn into some; on the CPU."""

    ids: tuple[str, ...]
    """Content hashes of the good images."""
    clean: Tensor
    """uint8 (n, h, w, 3): what a method restores."""
    images: Tensor
    """uint8 (n, h, w, 3): what a method is shown; equal to `clean` where the mask is 0."""
    masks: Tensor
    """float32 (n, h, w): 1 where a defect may have changed a pixel, else 0."""
    has_defect: Tensor
    """bool (n,): whether a defect was drawn."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: str) -> Drawn:
        """The same on a device."""
        tensors = (self.clean, self.images, self.masks, self.has_defect)
        return Drawn(self.ids, *(tensor.to(device, non_blocking=True) for tensor in tensors))


class Draw:
    """Draws one of the defects into a share of the images; call it with a batch and a generator for each image.

    Options and other images are bound with `functools.partial`, for instance
    `Draw([partial(draem_composite, textures=texture_bank(64, (256, 256), seed))])`. What is drawn into an image then
    depends on its generator alone, whatever the batch.
    """

    def __init__(self, defects: Sequence[Defect], *, share: float = 0.5, augment: Augment | None = None) -> None:
        """`share` of the images get a defect, each of the `defects` with equal chance; `augment` changes every image
        before, and what it gives counts as clean. Raises InvalidInput for no defects or a share outside 0 to 1."""
        if not defects or not 0 <= share <= 1:
            raise InvalidInput(
                f"{len(defects)} defects and a share of {share}; give at least one, and a share of 0 to 1"
            )
        self.defects, self.share, self.augment = tuple(defects), share, augment

    def __call__(self, batch: ImageBatch, generators: Sequence[np.random.Generator]) -> Drawn:
        """Raises InvalidInput for a batch without images, and for images that a defect refuses."""
        if batch.images is None:
            raise InvalidInput(
                "the batch has no images to draw defects into; the method's traits must say `needs_images`"
            )
        clean = batch.images.cpu().numpy()
        if self.augment is not None:
            augment = self.augment
            clean = np.stack([augment(image, rng) for image, rng in zip(clean, generators, strict=True)])
        images, masks = clean.copy(), np.zeros(clean.shape[:3], np.float32)
        drawn = np.zeros(len(clean), bool)
        for i, rng in enumerate(generators):
            drawn[i] = rng.random() < self.share
            if drawn[i]:
                images[i], masks[i] = self.defects[int(rng.integers(len(self.defects)))](clean[i], rng)
        return Drawn(batch.ids, *(torch.from_numpy(values) for values in (clean, images, masks, drawn)))
