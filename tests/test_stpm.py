"""STPM: a student of the teacher's architecture, half the squared distance of unit vectors, the product over layers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from al_models.embedding.stpm import Stpm, unit_distance
from al_models.parts.backbone import cached_backbone, standardised
from al_models.types import ImageBatch, Runtime

SIZE = 64


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def quick(**params):
    return Stpm(**{"image_size": SIZE, **Stpm.quick, "epochs": 1, "frame": 0.0, **params})


def batch(detector, images):
    images = torch.from_numpy(images)
    features = cached_backbone(detector.feature_spec())(images)
    return ImageBatch(tuple(map(str, range(len(images)))), images, features)


@pytest.fixture(scope="module")
def learned():
    return quick().fit(noise(4))


def test_the_distance_is_one_minus_the_cosine_of_each_position():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 5, 3, 4, generator=generator) * 7 for _ in range(2))
    found = unit_distance(a, b)
    assert found.shape == (2, 3, 4)
    x, y = a[1, :, 2, 3].double(), b[1, :, 2, 3].double()
    assert float(found[1, 2, 3]) == pytest.approx(float((x / x.norm() - y / y.norm()).square().sum() / 2), rel=1e-5)
    torch.testing.assert_close(found, 1 - F.cosine_similarity(a, b))
    torch.testing.assert_close(unit_distance(a, -3 * a), torch.full((2, 3, 4), 2.0))
    torch.testing.assert_close(unit_distance(a, 3 * a), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)


def test_vectors_without_a_direction_are_borne():
    zero = torch.zeros(1, 3, 1, 1)
    assert float(unit_distance(zero, zero)) == 0
    assert float(unit_distance(zero, torch.ones(1, 3, 1, 1))) == pytest.approx(0.5)


def test_the_student_is_the_backbone_with_weights_of_its_own(learned):
    reference = timm.create_model(learned.backbone, features_only=True, out_indices=learned.layers).state_dict()
    mine = learned.network_.state_dict()
    assert {name: value.shape for name, value in mine.items()} == {name: reference[name].shape for name in mine}
    other = quick().fit(noise(4), Runtime(seed=1)).network_.state_dict()
    assert not torch.equal(mine["conv_stem.weight"], other["conv_stem.weight"])  # not the pretrained ones
    shapes = [tuple(x.shape[1:]) for x in learned.network_(torch.zeros(1, 3, SIZE, SIZE))]
    assert shapes == learned._shapes()


def test_the_loss_is_the_mean_over_positions_summed_over_layers(learned):
    of = batch(learned, noise(3, seed=1))
    with torch.no_grad():
        mine = learned.network_(standardised(of.images, learned.feature_spec()))
        found = float(learned._loss(learned.network_, of))
    expected = 0.0
    for layer, x in zip((1, 2), mine, strict=True):
        a, b = (v / v.norm(dim=1, keepdim=True) for v in (of.features[layer].double(), x.double()))
        n, _, h, w = x.shape
        expected += float((a - b).square().sum()) / 2 / (n * h * w)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_map_is_the_geometric_mean_of_the_upsampled_layers(learned):
    images, flat = noise(2, seed=2), copy.deepcopy(learned)
    flat.offsets_.zero_()
    prediction, of = flat.predict(images), batch(learned, images)
    product = torch.ones(2, SIZE, SIZE)
    with torch.no_grad():
        mine = learned.network_(standardised(of.images, learned.feature_spec()))
    for layer, x in zip((1, 2), mine, strict=True):
        distance = 1 - F.cosine_similarity(x, of.features[layer])
        product *= F.interpolate(distance[:, None], size=SIZE, mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(prediction.maps, product.sqrt().numpy(), rtol=1e-3)
    np.testing.assert_array_equal(prediction.scores, prediction.maps.max((1, 2)))


def test_layers_may_be_named_in_any_order(learned):
    other = quick(layers=(2, 1)).fit(noise(4))
    np.testing.assert_array_equal(other.predict(noise(1)).maps, learned.predict(noise(1)).maps)


def test_the_paper_s_training_is_the_default():
    plan = Stpm()._plan(per_epoch=7)
    assert (plan.optimiser, plan.learning_rate, plan.momentum, plan.weight_decay) == ("sgd", 0.4, 0.9, 1e-4)
    assert (plan.steps, Stpm().batch_size, Stpm().layers) == (700, 32, (1, 2, 3))
