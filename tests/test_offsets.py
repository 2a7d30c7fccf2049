"""Maps lie where the defects do: the offsets of layers are measured, and taken back where maps are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from al_models.embedding.padim import Padim
from al_models.parts.backbone import Backbone
from al_models.parts.maps import to_maps
from al_models.parts.offsets import measured_offsets, probe_side
from al_models.types import FeatureSpec, Runtime


def clouds(n, size, seed):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((n, size, size)), (0, 2, 2), mode="wrap")
    gray = np.clip(128 + 15 * noise / noise.std(), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, 3)


def centres(change):
    places = np.arange(change.shape[-1]) + 0.5
    total = change.sum((1, 2))
    return np.stack([change.sum(2) @ places / total, change.sum(1) @ places / total], axis=1)


@pytest.mark.parametrize("side", [192, 227])
@pytest.mark.parametrize("by", [(0, 0), (5, -9)])
def test_the_offset_of_pooled_pixels_is_how_far_they_were_rolled(side, by):
    def features(images):
        pixels = images.permute(0, 3, 1, 2).float().roll(by, (2, 3))
        return {layer: F.adaptive_avg_pool2d(pixels, -(-side // stride)) for layer, stride in ((1, 4), (2, 8))}

    for found in measured_offsets(features, side).values():
        assert found == pytest.approx(by, abs=0.3)


def test_offsets_of_the_default_backbone_depend_on_how_its_images_are_padded():
    """At 256 pixels hardly any, at 227, whose halves are odd, several pixels: figures of squares in other textures."""
    even, odd = (Backbone(FeatureSpec(image_size=size)).offsets for size in (256, 227))
    assert np.array(list(even.values())) == pytest.approx(np.array([[-0.8, -1.1], [0.2, 0.0], [-1.9, -1.6]]), abs=0.6)
    assert np.array(list(odd.values())) == pytest.approx(np.array([[-0.3, -0.5], [2.7, 2.5], [4.6, 4.5]]), abs=0.9)


def test_the_small_images_that_are_probed_are_padded_as_the_large_ones_are():
    for size in (64, 227, 256, 300, 1024):
        assert probe_side(size) % 64 == size % 64


def test_an_offset_moves_a_map_back():
    scores = torch.zeros(1, 16, 16)
    scores[0, 8, 8] = 1
    plain, moved = (to_maps(scores, 64, 2.0, offset)[0] for offset in ((0.0, 0.0), (3.0, -2.0)))
    assert torch.allclose(moved[10:50, 10:50], plain[13:53, 8:48], atol=1e-6)


@pytest.mark.parametrize(("size", "most", "without"), [(192, 0.7, 1.0), (227, 2.8, 5.6)])
def test_the_map_of_a_square_is_centred_on_it(size, most, without):
    """Within half a pixel each way; less well where layers lie 7 pixels apart."""
    fitted = Padim(image_size=size).fit(clouds(24, size, 0), Runtime())
    good = clouds(48, size, 1)
    bad, rng = good.copy(), np.random.default_rng(2)
    corners = np.stack([rng.permutation(48), rng.permutation(48)], axis=1) * 2 // 3 + size // 2 - 22
    for image, (y, x) in zip(bad, corners, strict=True):
        image[y : y + 12, x : x + 12] = 255

    def off():
        change = np.square(fitted.predict(bad).maps - fitted.predict(good).maps, dtype=np.float64)
        return np.linalg.norm((centres(change) - corners - 6).mean(0))

    assert off() < most
    fitted.offsets_ = torch.zeros_like(fitted.offsets_)
    assert off() > without
