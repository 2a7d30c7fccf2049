"""CFLOW-AD: positions told as the paper tells them, shared work that changes nothing, steps that miss no vector."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from al_models.checks import check_images, quick_detector
from al_models.generative.cflow import Cflow, PositionedSubnet, position_vectors
from al_models.parts.epochs import Epochs
from al_models.parts.maps import to_maps
from al_models.types import ImageBatch, ImageSource, Runtime


class Features(ImageSource):
    """Random features of two small layers."""

    def __init__(self, n):
        self.ids = tuple(f"image {row}" for row in range(n))
        generator = torch.Generator().manual_seed(0)
        self.features = {2: torch.rand(n, 6, 4, 4, generator=generator), 3: torch.rand(n, 8, 2, 2, generator=generator)}

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {k: v[rows] for k, v in self.features.items()})


def test_a_position_is_sines_and_cosines_of_its_column_and_row():
    found = position_vectors(5, 7, 128).view(5, 7, 128)
    for row, column, k in ((0, 0, 0), (4, 6, 3), (2, 5, 31)):
        rate = 10_000 ** (-2 * k / 64)
        expected = [math.sin(column * rate), math.cos(column * rate), math.sin(row * rate), math.cos(row * rate)]
        given = found[row, column, [2 * k, 2 * k + 1, 64 + 2 * k, 64 + 2 * k + 1]]
        assert given.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_subnet_is_a_perceptron_on_vector_and_position_joined():
    subnet = PositionedSubnet(6, 10, 8)
    assert subnet.hidden.weight.shape == (28, 14)
    x, positions = torch.randn(12, 6), torch.randn(4, 8)
    joined = torch.cat([x, positions.repeat_interleave(3, dim=0)], dim=1)
    expected = nn.Sequential(subnet.hidden, nn.ReLU(), subnet.out)(joined)
    torch.testing.assert_close(subnet(x, positions), expected, atol=1e-5, rtol=1e-5)


def test_an_epoch_learns_each_vector_once():
    detector, source = Cflow(layers=(2, 3), step_positions=3, batch_size=4), Features(10)
    detector._set_up(source, range(10), Runtime())
    with Epochs(source, range(10), 4, 0) as epochs:
        steps = detector._steps(len(epochs))
        assert steps == 3 * (6 + 2)  # three batches of images; 16 and 4 positions, three a step
        draw = detector._draw(epochs, Runtime())
        drawn = [draw(step, torch.Generator()) for step in range(steps)]
        again = draw(5, torch.Generator())
    assert torch.equal(again.x, drawn[5].x)
    for layer, name in enumerate((2, 3)):
        found = torch.cat([part.x.flatten(0, 1) for part in drawn if part.layer == layer])
        given = source.features[name] / detector.scale_[layer]
        expected = given.flatten(2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(found.sort(0).values, expected.sort(0).values)
        for part in drawn:
            if part.layer == layer:  # the vectors are those of the places named
                image = given.flatten(2)
                assert (part.x[0, 0] == image[:, :, part.places[0]]).all(1).any()


def test_the_map_is_how_far_the_likelihood_stays_below_the_highest_learned():
    images = check_images(128)
    detector = replace(quick_detector(Cflow), frame=0.0).fit(images.train)
    batch = detector._source(images.test, Runtime()).read(range(5))
    expected = torch.zeros(5, 128, 128)
    with torch.no_grad():
        for place, layer in enumerate(detector.layers):
            decoder, x = detector.network_[place], batch.features[layer].float() / detector.scale_[place]
            n, c, h, w = x.shape
            for image in range(n):
                vectors = x[image].flatten(1).T  # (p, c)
                z, logdet = decoder.flow(vectors, decoder.positions)
                likelihood = (logdet - 0.5 * (z**2).sum(1) - 0.5 * c * math.log(2 * math.pi)) / c
                share = (likelihood - detector.highest_[place]).clamp(max=0).exp().view(1, h, w)
                expected[image] += to_maps(1 - share, 128, 0.0, detector._offset({layer: 1}))[0]
    found = detector.predict(batch)
    np.testing.assert_allclose(found.maps, expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.scores, found.maps.max((1, 2)))


def test_training_raises_the_likelihood():
    detector = quick_detector(Cflow).fit(check_images(128).train)
    losses = detector.curve_[:, 1]
    assert losses[-1] < 0.95 * losses[0]
    assert (np.diff(losses) < 0).all()


def test_the_loss_is_that_of_the_paper():
    detector, source = Cflow(layers=(2, 3), batch_size=4), Features(4)
    detector._set_up(source, range(4), Runtime())
    network = detector._network()
    with Epochs(source, range(4), 4, 0) as epochs:
        part = detector._draw(epochs, Runtime())(0, torch.Generator())
    likelihood = network[0](part.x, part.places)
    assert likelihood.shape == (8, 4)
    expected = -torch.log(torch.sigmoid(likelihood)).mean()
    torch.testing.assert_close(detector._loss(network, part), expected)
    torch.testing.assert_close(F.softplus(-likelihood).mean(), expected)
