"""What a method makes of a backbone whose features are of another scale, or lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr

from al_models.checks.harness import (
    READS,
    Check,
    CheckImages,
    Make,
    brief,
    fitted_on,
    predicted,
    source_of,
    textures,
)
from al_models.detector import Detector
from al_models.parts import backbone
from al_models.parts.offsets import Offset
from al_models.types import Prediction

SAME_ORDER = 0.99999
"""Spearman's rank correlation from which on an order is the same but for rounding."""
SQUARES = 8
"""Images with a bright square each."""
BESIDE = 16
"""Pixels that cells of an altered backbone lie beside what they answer to."""
OFF = 2.0
"""Pixels that a map may lie beside its square."""


def features_at_another_scale_rank_all_the_same(make: Make, images: CheckImages) -> None:
    """Features sixteen times as large or as small, as another backbone gives them, leave pixels and images in order.

    A power of two, so that what depends on the scale shows, and rounding does not.
    """
    if "backbone" not in {field.name for field in fields(make())}:
        return
    small, large = (_at_scale(brief(make), images, factor) for factor in (1 / 16, 16.0))
    for what, x, y in (("pixels", small.maps, large.maps), ("images", small.scores, large.scores)):
        same = spearmanr(x.ravel(), y.ravel()).statistic
        assert same > SAME_ORDER, f"features 256 times as large rank the {what} otherwise (Spearman {same:.6f})"


def maps_lie_where_the_images_do(make: Make, images: CheckImages) -> None:
    """A bright square has its map where it lies, and a backbone whose cells lie further beside it hardly moves it."""
    off = _off_the_square(fitted_on(make, images))
    if "backbone" in make().params():
        with _backbones(_Beside):
            beside = make()
            off = _off_the_square(beside.fit(source_of(beside, images.train))) - off
    down, right = off.tolist()
    assert np.abs(off).max() <= OFF, f"a square's map is {down:.1f} px further down and {right:.1f} px further right"


def _at_scale(make: Make, images: CheckImages, factor: float) -> Prediction:
    """What a detector predicts that learned where the backbone gives `factor` times its features."""
    detector = make()
    train, test = (source_of(detector, part) for part in (images.train, images.test))
    for source in (train, test):
        source.tensors |= {layer: factor * source.tensors[layer].float() for layer in source.layers}
    with _backbones(partial(_Times, factor=factor)):
        return detector.fit(train).predict(test)


def _off_the_square(fitted: Detector) -> np.ndarray:
    """How far below and right of bright squares the squared change of the map has its centre, in pixels: (2,)."""
    rng, size, side = np.random.default_rng(2), fitted.image_size, fitted.image_size // 8
    good = textures(SQUARES, size, rng)
    bad, even = good.copy(), np.stack([rng.permutation(SQUARES) for _ in range(2)], axis=1)
    corners = size * 3 // 8 - side // 2 + even * (size // 4) // SQUARES  # all places within a cell alike
    for image, (y, x) in zip(bad, corners, strict=True):
        image[y : y + side, x : x + side] = 255
    change = np.square(predicted(fitted, bad).maps - predicted(fitted, good).maps, dtype=np.float64)
    places, total = np.arange(size) + 0.5, change.sum((1, 2))
    centres = np.stack([change.sum(2) @ places / total, change.sum(1) @ places / total], axis=1)
    return (centres - corners - side / 2).mean(0)


@contextmanager
def _backbones(altered: Callable[[torch.nn.Module], torch.nn.Module]) -> Iterator[None]:
    """Backbones have an altered network, also those that are built already: to build one takes a second."""
    built, reads, measure, measured = backbone.Backbone, dict(READS), vars(backbone.Backbone)["offsets"], {}

    def offsets(self: backbone.Backbone) -> Mapping[int, Offset]:
        if self.spec not in measured:
            measured[self.spec] = measure.func(self)
        return measured[self.spec]

    READS.clear()
    built.network = property(
        lambda self: altered(vars(self)["network"]), lambda self, of: vars(self).update(network=of)
    )
    built.offsets = property(offsets)
    try:
        yield
    finally:
        del built.network
        built.offsets = measure
        READS.clear()
        READS.update(reads)


class _Beside(torch.nn.Module):
    """Sees images `BESIDE` pixels further down and right; what leaves them comes in again at the other side."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(self.network(x.roll((BESIDE, BESIDE), (2, 3))))


class _Times(torch.nn.Module):
    def __init__(self, network: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.factor * y for y in self.network(x)]


CHECKS: list[Check] = [
    features_at_another_scale_rank_all_the_same,
    maps_lie_where_the_images_do,
]
