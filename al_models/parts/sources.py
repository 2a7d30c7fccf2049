"""Images in memory or in files, and their features computed as they are read: detectors without a pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from al_models.errors import InvalidInput
from al_models.parts.images import load_images, resize
from al_models.parts.offsets import Offset
from al_models.types import ImageBatch, ImageSource, Runtime

if TYPE_CHECKING:
    from al_models.detector import Detector

Images = np.ndarray | Sequence[np.ndarray] | Sequence[str] | Sequence[Path]
"""uint8 [n, h, w, 3], a list of uint8 [h, w, 3] or [h, w] of any sizes, or paths of image files."""


class MemorySource(ImageSource):
    """Images given as arrays or paths, resized to what the detector takes; features are computed at each reading."""

    def __init__(self, images: Images, detector: Detector, runtime: Runtime) -> None:
        """Take the images. Raises InvalidInput for anything but uint8 images or paths."""
        if isinstance(images, str | Path) or (isinstance(images, np.ndarray) and images.ndim != 4):
            given = f"an array {images.dtype} {images.shape}" if isinstance(images, np.ndarray) else repr(images)
            raise InvalidInput(f"{given} was given for images; give uint8 [n, h, w, 3], or a list of arrays or paths")
        self._items = list(images)
        self._spec = detector.feature_spec()
        self._size = self._spec.image_size if self._spec else detector.image_size
        self._device = runtime.device
        with ThreadPoolExecutor() as pool:  # hashing goes on without the interpreter's lock
            self.ids = tuple(pool.map(_name, self._items))

    @property
    def offsets(self) -> Mapping[int, Offset]:  # type: ignore[override]
        """As ImageSource: the offsets of the backbone's layers, measured at the first access."""
        if self._spec is None:
            return {}
        from al_models.parts.backbone import cached_backbone

        return cached_backbone(self._spec, self._device).offsets

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """The images of these rows, resized, with the features asked for."""
        images = torch.from_numpy(np.stack(self._load_all([self._items[row] for row in rows])))  # (n, h, w, 3)
        features = {}
        if self._spec is not None:
            from al_models.parts.backbone import cached_backbone  # timm takes seconds to import

            features = cached_backbone(self._spec, self._device)(images)
        return ImageBatch(tuple(self.ids[row] for row in rows), images, features)

    def _load_all(self, items: Sequence[np.ndarray | str | Path]) -> list[np.ndarray]:
        if len(items) == 1:
            return [self._load(items[0])]
        with ThreadPoolExecutor() as pool:  # decoding and resizing go on without the interpreter's lock
            return list(pool.map(self._load, items))

    def _load(self, item: np.ndarray | str | Path) -> np.ndarray:
        if isinstance(item, np.ndarray):
            resized = resize(item, self._size)
            return np.repeat(resized[..., None], 3, axis=2) if resized.ndim == 2 else resized
        return load_images([item], self._size)[0]


def _name(item: object) -> str:
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim not in (2, 3):
            raise InvalidInput(
                f"an image was given as {item.dtype} {item.shape}; images are uint8 [h, w] or [h, w, 3], 0 to 255"
            )
        return hashlib.sha256(item.tobytes()).hexdigest()[:32]
    if isinstance(item, str | Path):
        return str(item)
    raise InvalidInput(f"an image was given as {type(item).__name__}; give uint8 arrays or paths")
