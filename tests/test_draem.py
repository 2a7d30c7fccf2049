"""DRAEM: its networks against the authors' layers, its loss, what is drawn, and the score of an image."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from al_models.parts.draw import Drawn
from al_models.parts.losses import ssim_loss
from al_models.registry import create
from al_models.self_supervised.draem import (
    Discrimination,
    Draem,
    Networks,
    Reconstruction,
    focal_loss,
    turned_at_random,
)
from al_models.types import ImageBatch, Runtime

SIZE = 64


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def quick(**params):
    return Draem(**{**Draem.quick, "epochs": 1, **params})


def shapes(network):
    """(inputs, outputs) of the convolutions in the order in which they run."""
    return [(m.in_channels, m.out_channels) for m in network.modules() if isinstance(m, nn.Conv2d)]


def test_the_networks_are_the_authors():
    down = [(3, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 8), (8, 8)]
    once = [(8, 8), (4, 4), (2, 2), (1, 1)]
    twice = [(8, 8), (8, 4), (4, 4), (4, 2), (2, 2), (2, 1), (1, 1), (1, 1)]
    assert shapes(Reconstruction(1)) == [*down, *once, *twice, (1, 3)]
    down = [(6, 1), *down[1:], (8, 8), (8, 8)]
    once = [(8, 8), (8, 4), (4, 2), (2, 1), (1, 1)]
    twice = [(16, 8), (8, 8), (12, 4), (4, 4), (6, 2), (2, 2), (3, 1), (1, 1), (2, 1), (1, 1)]
    assert shapes(Discrimination(1)) == [*down, *once, *twice, (1, 2)]


@pytest.mark.parametrize("size", [64, 70, 97])
def test_images_of_any_size_are_restored_and_judged_at_it(size):
    restored, logits = Networks(2, 2).eval()(torch.rand(2, 3, size, size))
    assert restored.shape == (2, 3, size, size)
    assert logits.shape == (2, 2, size, size)


def test_the_focal_loss_is_that_of_lin():
    logits = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(1)).round()
    p = logits.softmax(1).numpy()
    right = np.where(masks.numpy() == 1, p[:, 1], p[:, 0])
    expected = (-((1 - right) ** 2) * np.log(right)).mean()
    assert float(focal_loss(logits, masks, 2.0)) == pytest.approx(expected, rel=1e-5)
    sure = torch.tensor([[[[1000.0]], [[0.0]]]])
    assert float(focal_loss(sure, torch.zeros(1, 1, 1), 2.0)) == 0
    assert float(focal_loss(sure, torch.ones(1, 1, 1), 2.0)) == pytest.approx(1000)


def test_the_loss_restores_what_is_shown_to_the_clean_image():
    detector = quick()
    network = detector._network().eval()
    clean, shown = torch.from_numpy(noise(2)), torch.from_numpy(noise(2, seed=1))
    masks = torch.zeros(2, SIZE, SIZE)
    masks[0, 10:20] = 1
    drawn = Drawn(("a", "b"), clean, shown, masks, torch.tensor([True, False]))
    wanted = clean.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        restored, logits = network(shown.permute(0, 3, 1, 2) / 255)
        expected = (restored - wanted).square().mean() + ssim_loss(restored, wanted) + focal_loss(logits, masks, 2.0)
        torch.testing.assert_close(detector._loss(network, drawn), expected)


def prepared(detector, n=40, seed=0):
    images = torch.from_numpy(noise(n, seed))
    prepare = detector._prepare(None, [], Runtime())
    return prepare(ImageBatch(tuple(map(str, range(n))), images), [np.random.default_rng(i) for i in range(n)]), images


def test_half_of_the_images_get_a_defect_and_three_in_ten_are_turned():
    drawn, images = prepared(quick(defective=Draem.defective, turned=Draem.turned), n=200)
    assert 70 < int(drawn.has_defect.sum()) < 130
    assert torch.equal(drawn.has_defect, drawn.masks.flatten(1).any(1))
    turned = (drawn.clean != images).flatten(1).any(1)
    assert 40 < int(turned.sum()) < 80
    outside = drawn.masks[..., None] == 0
    assert torch.equal(drawn.images * outside, drawn.clean * outside)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 40)])
def test_shares_of_none_and_all_are_taken_at_their_word(share, expected):
    drawn, images = prepared(quick(defective=share, turned=share))
    assert int(drawn.has_defect.sum()) == expected
    assert int((drawn.clean != images).flatten(1).any(1).sum()) == expected


def test_a_turned_image_has_black_corners_and_its_middle():
    white = np.full((65, 65, 3), 255, np.uint8)
    found = [partial(turned_at_random, share=1.0)(white, np.random.default_rng(i)) for i in range(20)]
    assert all(image[32, 32].tolist() == [255] * 3 for image in found)
    assert sum(image[0, 0].tolist() == [0] * 3 for image in found) > 10


def test_the_map_is_the_probability_and_the_score_its_highest_average():
    detector = quick(reach=2).fit(noise(3))
    found = detector.predict(noise(2, seed=5))
    with torch.no_grad():
        _, logits = detector.network_(torch.from_numpy(noise(2, seed=5)).permute(0, 3, 1, 2) / 255)
    np.testing.assert_allclose(found.maps, logits.softmax(1)[:, 1].numpy(), rtol=1e-5)
    kernel = torch.full((1, 1, 5, 5), 1 / 25)
    average = F.conv2d(torch.from_numpy(found.maps)[:, None], kernel, padding=2)
    np.testing.assert_allclose(found.scores, average.flatten(1).amax(1), rtol=1e-5)


def test_held_out_images_are_judged_by_defects():
    detector = quick(patience=5, epochs=2, defective=1.0).fit(noise(6))
    assert np.isfinite(detector.curve_[:, 2]).all()


def test_the_rate_falls_to_a_fifth_twice():
    plan = create("draem")._plan(10)
    assert (plan.schedule, plan.milestones, plan.drop) == ("milestones", (0.8, 0.9), 0.2)
    assert (plan.steps, plan.learning_rate, plan.optimiser) == (7000, 1e-4, "adam")
