"""FastFlow: the subnets in turns, the likelihood of the paper, and vision transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import timm
import torch
from torch import nn

from al_models.checks import check_images, quick_detector
from al_models.generative.fastflow import Fastflow, MapFlow
from al_models.parts.coupling import HalfCoupling
from al_models.parts.maps import to_maps
from al_models.types import Runtime


def sides(flow):
    return [block.subnet[0].kernel_size[0] for block in flow.flow.blocks if isinstance(block, HalfCoupling)]


def test_subnets_are_of_3x3_and_1x1_in_turns_or_of_3x3_only():
    assert sides(MapFlow((6, 4, 4), 4, 1.0, 2.0, only_3x3=False)) == [3, 1, 3, 1]
    assert sides(MapFlow((6, 4, 4), 3, 1.0, 2.0, only_3x3=True)) == [3, 3, 3]


def test_a_subnet_is_as_wide_as_asked():
    flow = MapFlow((100, 2, 2), 1, 0.16, 2.0, only_3x3=False)
    first, _, last = flow.flow.blocks[0].subnet
    assert (first.in_channels, first.out_channels, last.out_channels) == (50, 8, 100)


def test_the_loss_is_the_likelihood_that_autograd_finds():
    """0.5 |z|^2 - log |det dz/dx|, the normalization in front not counted, as in the paper's eq. 3."""
    flow = MapFlow((4, 2, 2), 2, 1.0, 2.0, only_3x3=False)
    with torch.no_grad():
        for parameter in flow.flow.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(1, 4, 2, 2)
    normed = flow.norm(x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda y: flow.flow(y)[0], normed).reshape(16, 16)
    z, _ = flow(x)
    expected = 0.5 * z.square().sum() - torch.linalg.slogdet(jacobian)[1]
    detector = Fastflow(layers=(2,))
    batch = type("Batch", (), {"features": {2: x}})()
    found = detector._loss(nn.ModuleList([flow]), batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_no_weight_lowers_the_loss_behind_the_likelihoods_back():
    """Eq. 3 counts the flow's log-determinant; a trained scale in front of it would be taken back there for ever."""
    flow = MapFlow((4, 2, 2), 2, 1.0, 2.0, only_3x3=False)
    counted = {id(parameter) for parameter in flow.flow.parameters()}
    assert {id(parameter) for parameter in flow.parameters()} == counted


def test_the_map_is_the_mean_over_the_layers():
    images = check_images(128)
    detector = replace(quick_detector(Fastflow), frame=0.0).fit(images.train)
    batch = detector._source(images.test, Runtime()).read(range(5))
    with torch.no_grad():
        each = []
        for layer, flow in zip(detector.layers, detector.network_, strict=True):
            z = flow(batch.features[layer])[0]
            each.append(to_maps(1 - torch.exp(-0.5 * z.square().mean(1)), 128, 0.0, detector._offset({layer: 1})))
    found = detector.predict(batch)
    np.testing.assert_allclose(found.maps, ((each[0] + each[1]) / 2).numpy(), atol=1e-5)
    assert found.maps.min() >= 0
    assert found.maps.max() <= 1


def test_it_learns_on_a_vision_transformer(tmp_path):
    name, images = "vit_tiny_patch16_224", check_images(128)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        weights = timm.create_model(name, img_size=128).state_dict()
    torch.save(weights, tmp_path / "vit.pth")
    detector = Fastflow(
        backbone=name,
        weights=str(tmp_path / "vit.pth"),
        layers=(3,),
        image_size=128,
        flow_steps=2,
        hidden_ratio=0.16,
        epochs=2,
        batch_size=6,
    )
    found = detector.fit(images.train).predict(images.test)
    assert detector.shapes_.tolist() == [[3, 192, 8, 8]]
    assert found.maps.shape == (5, 128, 128)
    assert detector.curve_[1, 1] < detector.curve_[0, 1]
