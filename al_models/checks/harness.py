"""What the checks share: images to check with, a source that gives only what is stated, fits that are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from al_models.detector import FLOAT16_MAX, Detector
from al_models.errors import ModelsError
from al_models.parts.sources import MemorySource
from al_models.types import ImageBatch, ImageSource, Prediction, Runtime

SIZE = 128
"""Side of the images, in pixels, unless the detector's `quick` parameters name another."""
TOLERANCE = 1e-3
"""How far apart two equal results may lie, relative to the largest value: batches are summed in another order."""

Make = Callable[[], Detector]


@dataclass(frozen=True)
class CheckImages:
    """Images to learn from and to judge, all of one texture; read-only."""

    train: np.ndarray
    """uint8 (n, h, w, 3), good."""
    good: np.ndarray
    """uint8 (n, h, w, 3), good and not among the training images."""
    anomalous: np.ndarray
    """uint8 (n, h, w, 3), each with a square of strong noise."""
    masks: np.ndarray
    """bool (n, h, w), the squares."""

    @property
    def test(self) -> np.ndarray:
        """The good images, then the anomalous ones."""
        return np.concatenate([self.good, self.anomalous])


Check = Callable[[Make, CheckImages], None]


@lru_cache(maxsize=4)
def check_images(size: int = SIZE, seed: int = 0) -> CheckImages:
    """Six training images, three good and two anomalous ones of a faint, cloudy texture."""
    rng = np.random.default_rng(seed)
    texture = textures(11, size, rng)
    anomalous, masks = texture[9:].copy(), np.zeros((2, size, size), bool)
    side = size // 4
    for image, mask, (y, x) in zip(anomalous, masks, ((side, side), (size // 2, size // 3)), strict=True):
        mask[y : y + side, x : x + side] = True
        image[mask] = rng.integers(0, 256, (side * side, 3), dtype=np.uint8)
    images = CheckImages(texture[:6], texture[6:9], anomalous, masks)
    for array in (images.train, images.good, images.anomalous, images.masks):
        array.flags.writeable = False
    return images


def quick_detector(cls: type[Detector]) -> Detector:
    """A detector that fits small images in seconds: its `quick` parameters, at the size of the check's images."""
    return cls(**{"image_size": SIZE, **cls.quick})


class StatedSource(ImageSource):
    """Hands out what a detector's traits and feature spec ask for, features in half precision, and nothing else."""

    def __init__(self, detector: Detector, images: np.ndarray, batch_size: int = 16, without: str = "") -> None:
        """Compute the features of uint8 (n, h, w, 3); `without` is "images" or "features" to withhold them."""
        batch = _read(detector, images)
        self.ids, self.batch_size, self.layers = batch.ids, batch_size, tuple(batch.features)
        self.offsets = MemorySource(images[:0], detector, Runtime()).offsets
        self.tensors: dict[str | int, torch.Tensor] = {}
        if detector.traits.needs_images and without != "images":
            self.tensors["images"] = batch.images.clone()
        if without != "features":
            self.tensors |= {layer: value.half().clone() for layer, value in batch.features.items()}

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """The images and features of these rows."""
        rows = list(rows)
        part = {name: value if rows == list(range(len(self))) else value[rows] for name, value in self.tensors.items()}
        return ImageBatch(tuple(self.ids[row] for row in rows), part.pop("images", None), part)


def source_of(detector: Detector, images: np.ndarray, batch_size: int = 16, without: str = "") -> StatedSource:
    """The images as a source for this detector."""
    return StatedSource(detector, images, batch_size, without)


def brief(make: Make) -> Make:
    """Makes detectors that train two epochs: enough for a sentence about how a fit behaves, not what it learns."""
    trained = {field.name for field in fields(make()) if field.name.endswith("epochs")}
    fewer = {name: min(2, getattr(make(), name)) for name in trained if isinstance(getattr(make(), name), int)}
    return partial(_replaced, make, fewer) if fewer else make


def _replaced(make: Make, params: dict[str, int]) -> Detector:
    return replace(make(), **params)  # type: ignore[arg-type]


def fitted_on(make: Make, images: CheckImages) -> Detector:
    """A detector fitted on the training images, the caller's own: most checks begin with one, so it is fitted once."""
    detector = make()
    key = type(detector), repr(detector), images.train.tobytes()
    if key not in _fits:
        if len(_fits) > 1:  # a method's own and its brief fit: methods come one after the other
            _fits.clear()
        _fits[key] = detector.fit(source_of(detector, images.train))
    return copy.deepcopy(_fits[key])


_fits: dict[tuple[object, ...], Detector] = {}


def _read(detector: Detector, images: np.ndarray) -> ImageBatch:
    """All of the images as this detector reads them, for reading only; the features of each set are computed once."""
    key = detector.feature_spec(), detector.image_size, images.shape, images.tobytes()
    if key not in READS:
        if len(READS) >= _READS:
            READS.clear()
        whole = MemorySource(images, detector, Runtime())
        READS[key] = whole.read(range(len(whole)))
    return READS[key]


READS: dict[tuple[object, ...], ImageBatch] = {}
"""What was read of images; to be set aside where a backbone is altered."""
_READS = 16


def predicted(detector: Detector, images: np.ndarray, runtime: Runtime = Runtime()) -> Prediction:  # noqa: B008 (frozen)
    """What it predicts for the images."""
    return detector.predict(source_of(detector, images), runtime)


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """The same values; NaN is NaN: the curve of a training may lack held-out losses."""
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def assert_stated(detector: Detector, images: np.ndarray) -> None:
    """That maps and scores are finite and of the stated shape and type."""
    found = predicted(detector, images)
    n, size = len(images), detector.image_size
    assert isinstance(found, Prediction), f"predict gave a {type(found).__name__}"
    for what, values, shape in (("maps", found.maps, (n, size, size)), ("scores", found.scores, (n,))):
        assert isinstance(values, np.ndarray), f"{what} are a {type(values).__name__}"
        assert values.dtype == np.float32, f"{what} are {values.dtype}, not float32"
        assert values.shape == shape, f"{what} are of shape {values.shape}, not {shape}"
        assert np.isfinite(values).all(), f"{what} are not all finite"
        assert np.abs(values).max() <= FLOAT16_MAX, f"{what} reach {np.abs(values).max():.4g}, beyond float16"


def assert_same(a: Prediction, b: Prediction, when: str) -> None:
    """That two predictions are of equal bits."""
    for what, x, y in (("maps", a.maps, b.maps), ("scores", a.scores, b.scores)):
        assert np.array_equal(x, y), f"{what} differ by up to {np.abs(x - y).max():.3g} {when}"


def assert_close(a: Prediction, b: Prediction, when: str, tolerance: float = TOLERANCE) -> None:
    """That two predictions are equal up to rounding."""
    for what, x, y in (("maps", a.maps, b.maps), ("scores", a.scores, b.scores)):
        apart = np.abs(x - y).max() / max(np.abs(x).max(), 1e-12)
        assert apart <= tolerance, f"{what} differ by {apart:.3g} of their largest value {when}; {tolerance} is allowed"


def textures(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Clouds of a few pixels on a warm gray: uint8 (n, size, size, 3)."""
    clouds = gaussian_filter(rng.standard_normal((n, size, size)), sigma=(0, 2, 2), mode="wrap")
    gray = 128 + 8 * clouds / clouds.std()
    return np.clip(gray[..., None] + np.array([8.0, 0.0, -8.0]), 0, 255).astype(np.uint8)


@contextmanager
def raises(expected: type[Exception], what: str) -> Iterator[None]:
    """Expects an error with a message."""
    message = None
    try:
        yield
    except expected as error:
        message = str(error)
    assert message is not None, f"{what} raised nothing; {expected.__name__} was expected"
    assert message, f"{what} raised {expected.__name__} without a message"


@contextmanager
def clear_error_allowed() -> Iterator[None]:
    """Lets an error of the mathematics pass that says what is wrong."""
    message = "none"
    try:
        yield
    except ModelsError as error:
        message = str(error)
    assert message, "the error has no message"
