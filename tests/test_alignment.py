"""Aligned parts, parts that move or turn, and textures are told apart; the figure is the intraclass correlation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from al_models.errors import InvalidInput
from al_models.parts.alignment import ENOUGH_AGREEMENT, Alignment, _agreement, alignment
from al_models.parts.backbone import cached_backbone
from al_models.types import FeatureSpec


def part(rng: np.random.Generator, *, moved: float = 0, turned: float = 0, size: int = 128) -> np.ndarray:
    """A bright plate with a hole and a slot before a dark ground, both grainy: uint8 (size, size, 3)."""
    (up, left), angle = rng.uniform(-moved, moved, 2), np.deg2rad(rng.uniform(-turned, turned))
    y, x = np.mgrid[:size, :size] / size - 0.5
    y, x = y - up, x - left
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    plate = (abs(u) < 0.42) & (abs(v) < 0.25) & (np.hypot(u - 0.2, v) > 0.1) & ~((abs(u + 0.2) < 0.1) & (abs(v) < 0.05))
    gray = np.where(plate, 150, 60) + 10 * rng.standard_normal() + grain(rng, size) * np.where(plate, 12, 4)
    return np.clip(np.repeat(gray[..., None], 3, axis=2), 0, 255).astype(np.uint8)


def grain(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    cloud = gaussian_filter(rng.standard_normal((size, size)), 1.5, mode="wrap")
    return cloud / cloud.std()


def parts(n: int = 16, seed: int = 0, **how: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([part(rng, **how) for _ in range(n)])


def texture(n: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    gray = np.stack([120 + 20 * grain(rng) for _ in range(n)])
    return np.clip(np.repeat(gray[..., None], 3, axis=3), 0, 255).astype(np.uint8)


def grating(n: int = 16, seed: int = 0) -> np.ndarray:
    """A woven grid whose phase is another in every image."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:128, :128]
    phases = rng.uniform(0, 2 * np.pi, (n, 2, 1, 1))
    gray = 120 + 40 * np.sin(x / 1.6 + phases[:, 0]) * np.sin(y / 1.6 + phases[:, 1]) + rng.normal(0, 5, (n, 128, 128))
    return np.clip(np.repeat(gray[..., None], 3, axis=3), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("images", "verdict"),
    [
        (parts(), "aligned"),
        (parts(moved=0.01, turned=2), "aligned"),
        (parts(moved=0.2), "not aligned"),
        (parts(turned=180), "not aligned"),
        (texture(), "texture"),
        (grating(), "texture"),
    ],
    ids=["in place", "hardly moved", "moved", "turned", "texture", "grating"],
)
def test_images_get_the_right_verdict(images: np.ndarray, verdict: str) -> None:
    found = alignment(images)
    assert found.verdict == verdict, found
    assert found.warn == (verdict == "not aligned")


def test_features_get_the_right_verdict_as_far_as_they_can() -> None:
    """A texture agrees as little as a part that moves; only images show that nothing could move."""
    backbone = cached_backbone(FeatureSpec(layers=(3,), image_size=256))

    def features(images: np.ndarray) -> torch.Tensor:
        large = images.repeat(2, axis=1).repeat(2, axis=2)
        return backbone(torch.from_numpy(large))[3].half()  # as the feature store keeps them

    found = [alignment(features(images)) for images in (parts(), parts(moved=0.2), parts(turned=180), texture())]
    assert [one.verdict for one in found] == ["aligned", "not aligned", "not aligned", "not aligned"], found
    assert all(one.layout is None for one in found)


def test_layout_is_the_share_of_variance_between_areas() -> None:
    """Areas of 8 x 8 pixels: their own value, and one that changes from pixel to pixel, of stated variances."""
    rng = np.random.default_rng(0)
    areas = np.kron(rng.permutation(64).reshape(8, 8), np.ones((8, 8)))
    fine = np.where(np.indices((64, 64)).sum(0) % 2, 20, -20)
    image = np.repeat((100 + areas + fine)[..., None], 3, axis=2).astype(np.uint8)
    expected = areas.var() / (areas.var() + 20**2)
    assert alignment(np.stack([image, image])).layout == pytest.approx(expected, rel=1e-4)


def test_the_more_a_part_moves_the_less_its_images_agree() -> None:
    found = [alignment(parts(moved=moved)).agreement for moved in (0, 0.02, 0.05, 0.1, 0.2)]
    assert found == sorted(found, reverse=True)


def test_agreement_is_the_intraclass_correlation() -> None:
    """ICC(3,1) from the mean squares of a two-way analysis of variance, written out."""
    rng = np.random.default_rng(0)
    n, p = 5, 12
    x = rng.standard_normal((n, p)) + 1.5 * rng.standard_normal(p) + 3 * rng.standard_normal((n, 1))
    between = n * ((x.mean(0) - x.mean()) ** 2).sum() / (p - 1)
    rest = ((x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()) ** 2).sum() / ((n - 1) * (p - 1))
    expected = (between - rest) / (between + (n - 1) * rest)
    assert _agreement(torch.from_numpy(x.reshape(n, 1, 3, 4))) == pytest.approx(expected)


def test_agreement_of_noise_is_zero_for_few_images_as_for_many() -> None:
    noise = torch.randn(100, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    found = {n: alignment(noise[:n]).agreement for n in (2, 5, 100)}
    assert max(found.values()) < 0.03, found


def test_agreement_of_equal_images_is_one() -> None:
    one = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    assert alignment(one.expand(4, -1, -1, -1)).agreement == pytest.approx(1)


def test_light_of_the_whole_image_says_nothing_of_places() -> None:
    maps = torch.randn(6, 8, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    lighter = maps + torch.arange(6.0).double().view(6, 1, 1, 1)
    assert _agreement(lighter) == pytest.approx(_agreement(maps))


def test_channels_count_alike_whatever_their_scale() -> None:
    maps = torch.randn(6, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    maps[:, :4] += 2 * maps[:1, :4]
    scale = torch.logspace(-3, 3, 8).view(8, 1, 1)
    assert alignment(maps * scale + 5 * scale).agreement == pytest.approx(alignment(maps).agreement, abs=1e-4)


def test_constant_images_agree_in_nothing() -> None:
    found = alignment(np.full((3, 64, 64, 3), 128, np.uint8))
    assert (found.agreement, found.layout, found.verdict) == (0.0, 0.0, "texture")


def test_a_constant_channel_changes_nothing() -> None:
    maps = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    flat = torch.cat([maps, torch.full((6, 1, 16, 16), 7.0)], dim=1)
    assert alignment(flat).agreement == pytest.approx(alignment(maps).agreement, abs=1e-9)


def test_the_sentence_states_the_figure_and_what_to_do() -> None:
    found = alignment(parts(moved=0.2))
    assert isinstance(found, Alignment)
    assert f"{100 * found.agreement:.0f} %" in found.sentence
    assert "align the images first" in found.sentence
    assert found.agreement < ENOUGH_AGREEMENT


def test_maps_need_not_be_square() -> None:
    assert alignment(torch.randn(3, 4, 24, 9, generator=torch.Generator().manual_seed(0))).agreement < 0.2


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (np.zeros((1, 64, 64, 3), np.uint8), "1 image"),
        (np.zeros((4, 64, 64), np.uint8), r"uint8 \(4, 64, 64\)"),
        (np.zeros((4, 3, 64, 64), np.uint8), "uint8"),
        (torch.zeros(4, 8, 16, 16, dtype=torch.int64), "int64"),
        (torch.zeros(4, 8, 4, 4), "4 x 4 positions"),
        (np.zeros((4, 6, 6, 3), np.uint8), "6 x 6 pixels"),
    ],
)
def test_what_cannot_be_judged_is_refused(sample: object, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        alignment(sample)
