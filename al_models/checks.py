"""The contract of a detector, as small checks named as sentences.

A check takes a function that makes a fresh detector and a few small images, and raises AssertionError when the sentence
is not true. The project's tests cross `CHECKS` with the registry; `check_detector` runs them all on one method, also on
a class that stands in no registry.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache, partial

import numpy as np
import safetensors.numpy
import torch
from scipy.ndimage import gaussian_filter
from torch.optim.optimizer import register_optimizer_step_post_hook

from al_models.detector import FLOAT16_MAX, Detector
from al_models.errors import InvalidInput, ModelsError, NotFitted
from al_models.parts.sources import MemorySource
from al_models.registry import detector_class
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
    texture = _texture(11, size, rng)
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


def check_detector(detector: str | type[Detector]) -> None:
    """Run all checks on a method, given by its name in the registry or by its class.

    Raises ExceptionGroup with every check that failed, each with the check's name as a note.
    """
    make = partial(quick_detector, detector_class(detector) if isinstance(detector, str) else detector)
    failed = []
    for check in CHECKS:
        try:
            check(make, check_images(make().image_size))
        except Exception as error:
            error.add_note(f"check: {check.__name__}")
            failed.append(error)
    if failed:
        raise ExceptionGroup(f"{type(make()).__name__} breaks {len(failed)} of {len(CHECKS)} checks", failed)


# --- construction and parameters ---


def constructing_learns_nothing(make: Make, images: CheckImages) -> None:
    """A new detector holds its fields, with the values given, and nothing else."""
    detector = make()
    names = {field.name for field in fields(detector)}
    extra = sorted(set(vars(detector)) - names)
    assert not extra, f"construction set {extra}, which are no fields; set them in fit, ending in '_'"
    for name, value in {"image_size": SIZE, **detector.quick}.items():
        assert getattr(detector, name) == value, f"{name}={value!r} was stored as {getattr(detector, name)!r}"


def fields_have_defaults_and_no_kwargs(make: Make, images: CheckImages) -> None:
    """The constructor takes keywords only, each with an immutable default; a misspelt one cannot pass."""
    cls = type(make())
    assert is_dataclass(cls), f"{cls.__name__} is no dataclass"
    assert "__init__" not in vars(cls) or cls.__init__.__qualname__.endswith("__create_fn__.<locals>.__init__") or (
        "__dataclass_fields__" in vars(cls)
    ), f"{cls.__name__} is not decorated as a dataclass"
    for field in fields(cls):
        assert field.default is not MISSING, f"{field.name} has no default; give the paper's"
        hash(field.default)  # a mutable default would be shared between detectors
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{parameter} is not keyword-only"
