"""What crosses the border of the mathematics: four frozen dataclasses and one way to read images.

Shape letters, used in all files: n images, h x w pixels, c channels, p positions of a feature map, k neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]
"""Function that is called with (what, done, of) as long work goes on."""

SCALE_STEP = 100
"""Step from the key of a layer's features at one scale to that at the next; no backbone has as many layers."""


@dataclass(frozen=True)
class FeatureSpec:
    """The features a detector asks for; hashable, so that equal requests are extracted once and shared."""

    backbone: str = "tf_efficientnet_lite0"
    """A timm model name."""
    layers: tuple[int, ...] = (1, 2, 3)
    """timm feature indices: stages of a CNN (1, 2, 3 = reduction 4, 8, 16), blocks of a transformer."""
    image_size: int = 256
    """Side of the square, in pixels, that images are resized to."""
    weights: str | None = None
    """Path of a .safetensors or .pth file with the weights; None: the backbone's own pretrained weights."""
    location: Literal["bottleneck", "expansion"] = "bottleneck"
    """Place in an EfficientNet's stage that is read (timm's `feature_location`): the linear outputs of its last block,
    or the next block's rectified expansion of them."""
    scales: tuple[float, ...] = (1.0,)
    """Shares of `image_size` at which the image is shown to the backbone (bilinear, antialiased). Layer l at the s-th
    of them, counted from 0, has the key l + 100 s, so that with a single scale the keys are the layers."""

    @property
    def keys(self) -> tuple[int, ...]:
        """The keys of all features: of each scale in turn, its layers as they were asked for."""
        return tuple(layer + SCALE_STEP * s for s in range(len(self.scales)) for layer in self.layers)


@dataclass(frozen=True)
class ImageBatch:
    """Images as a detector sees them, with their features, but without labels or masks."""

    ids: tuple[str, ...]
    """Content hashes, one an image."""
    images: torch.Tensor | None = None
    """uint8 (n, h, w, 3), resized, RGB; None unless the detector's traits say `needs_images`."""
    features: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Layer, or key of `FeatureSpec.keys` -> float16 or float32 (n, c, h, w); empty for a detector without a feature
    spec."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prediction:
    """Anomaly maps and scores; higher is more anomalous, always."""

    ids: tuple[str, ...]
    """Content hashes, one an image."""
    maps: np.ndarray
    """float32 (n, h, w) at the detector's image size; finite, and at most 65504 so that float16 can hold them."""
    scores: np.ndarray
    """float32 (n,), one an image."""

    @staticmethod
    def concatenate(parts: Sequence[Prediction]) -> Prediction:
        """One prediction out of several, in order."""
        return Prediction(
            ids=tuple(i for part in parts for i in part.ids),
            maps=np.concatenate([part.maps for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
        )


class Checkpoints(Protocol):
    """A place where a long fit saves its state, so that a killed one resumes."""

    def load(self) -> dict[str, np.ndarray] | None:
        """The last state saved, or None."""

    def save(self, state: dict[str, np.ndarray]) -> None:
        """Replace the saved state, whole or not at all."""


def _silent(what: str, done: int, of: int) -> None:
    pass


@dataclass(frozen=True)
class Runtime:
    """How to compute, as opposed to what: nothing here may change a result beyond rounding, except the seed."""

    device: str = "cpu"
    """A torch device."""
    seed: int = 0
    """Seed of every random choice of a fit; random choices of a prediction are seeded by the image's id."""
    mixed_precision: bool = False
    """Train in bfloat16 where torch says it is safe."""
    progress: Progress = _silent
    """Function that is told how far a long fit has come."""
    checkpoints: Checkpoints | None = None
    """Where the training loop saves its state; None: nowhere."""


class ImageSource(ABC):
    """Images and the features asked for, readable in any order and any number of times, a batch in memory at once."""

    ids: tuple[str, ...]
    batch_size: int = 16
    offsets: Mapping[int, tuple[float, float]] = MappingProxyType({})
    """Key of the features -> offset of their cells, down and right in pixels (`parts/offsets.py`); (0, 0) where a key
    is missing."""

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def read(self, rows: Sequence[int]) -> ImageBatch:
        """The images of these rows, in the order asked."""

    def batches(self, rows: Sequence[int]) -> Iterator[ImageBatch]:
        """The images of these rows in the order asked, `batch_size` at a time."""
        for start in range(0, len(rows), self.batch_size):
            yield self.read(rows[start : start + self.batch_size])

    def __iter__(self) -> Iterator[ImageBatch]:
        """All images in order, `batch_size` at a time."""
        return self.batches(range(len(self)))


@dataclass(frozen=True)
class Traits:
    """Properties of a method by which callers decide, instead of by its name."""

    needs_images: bool = False
    """Reads `ImageBatch.images`."""
    trains: bool = False
    """Fits by gradient descent: a GPU pays, and a seed matters."""
    deterministic: bool = True
    """The same seed on the same CPU gives the same bits."""
    aligned_images_only: bool = False
    """Compares positions, so the part must lie in the same place in every image."""
    uses_synthetic_defects: bool = False
    """Learns from `parts/defects.py`."""
    promises_false_alarms: bool = False
    """Its maps are -log10 of a number of false alarms an image."""
    incremental: bool = False
    """More good images can be added to a fitted model."""
    gradients_in_predict: bool = False
    """Takes gradients at test time, of a network that threads share: by `torch.autograd.grad` alone."""
    graph: bool = False
    """Its `tensors` are a graph, the same operations whatever the images: `al_models.graph` exports it."""
