"""CS-Flow: the cross-scale coupling is exact, the network is the authors', the map is a position's mean square of z."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from al_models.generative.cs_flow import CrossConvolutions, CrossScaleFlow, CsFlow
from al_models.parts.coupling import CrossScaleCoupling
from al_models.types import ImageBatch, ImageSource, Runtime

SIZES = ((4, 4), (2, 2), (1, 1))
FULL = ((8, 8), (4, 4), (2, 2))
"""Of a layer at stride 16 of images of 128 px and their smaller copies."""


class Features(ImageSource):
    """Features in memory: three maps (n, c, h, w) under the keys 3, 103 and 203."""

    def __init__(self, maps, batch_size=2):
        self.maps, self.batch_size = dict(zip((3, 103, 203), maps, strict=True)), batch_size
        self.ids = tuple(str(row) for row in range(len(maps[0])))

    def read(self, rows):
        features = {key: x[list(rows)].half() for key, x in self.maps.items()}
        return ImageBatch(tuple(self.ids[row] for row in rows), features=features)


def maps(n=2, channels=5, sizes=SIZES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, channels, h, w, generator=generator, dtype=dtype) for h, w in sizes]


def moved_from_identity(module):
    """Weights away from a start that is the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def coupling(channels=5, hidden=6):
    def subnet(inputs, outputs):
        return CrossConvolutions(inputs, outputs, 3, hidden=hidden, kernel=3)

    return moved_from_identity(CrossScaleCoupling(channels, subnet, clamp=3.0))


def quick(**changes):
    return CsFlow(**({"image_size": 128, "frame": 0.0} | CsFlow.quick | changes))


@pytest.fixture(scope="module")
def learned():
    return quick(epochs=3).fit(Features([3 + 2 * x for x in maps(4, 6, FULL)]))


# --- the coupling ---


@pytest.mark.parametrize("channels", [4, 5])
def test_the_coupling_is_undone_by_its_inverse(channels):
    made, x = coupling(channels), maps(channels=channels)
    y, _ = made(x)
    assert max((a - b).abs().max() for a, b in zip(x, y, strict=True)) > 0.1
    for before, after in zip(x, made.inverse(y), strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [2, 3])
def test_its_log_determinant_is_that_of_autograds_jacobian_over_all_scales(channels):
    made, x = coupling(channels).double(), maps(1, channels, dtype=torch.float64)
    sizes = [part.numel() for part in x]

    def whole(vector):
        parts = [v.view(p.shape) for v, p in zip(vector.split(sizes), x, strict=True)]
        return torch.cat([y.flatten() for y in made(parts)[0]])

    jacobian = torch.autograd.functional.jacobian(whole, torch.cat([part.flatten() for part in x]))
    expected = torch.linalg.slogdet(jacobian).logabsdet
    assert abs(expected) > 0.1
    torch.testing.assert_close(made(x)[1].double(), expected[None], atol=1e-4, rtol=1e-4)


def test_scales_hear_of_their_neighbours_and_of_no_other():
    made, x = CrossConvolutions(5, 4, 3, hidden=6, kernel=3), maps()
    nn.init.ones_(made.weight)
    before = made(x)
    x[2] = x[2] + 1
    changed = [not torch.equal(a, b) for a, b in zip(before, made(x), strict=True)]
    assert changed == [False, True, True]


# --- the network ---


def test_the_subnet_is_the_authors():
    """Layer by layer as in their code: enter, stay, one up from the coarser and one strided down from the finer."""
    made, x = CrossConvolutions(5, 4, 3, hidden=6, kernel=3), maps()
    nn.init.constant_(made.weight, 0.5)
    y = [F.leaky_relu(enter(part), 0.1) for enter, part in zip(made.enter, x, strict=True)]
    doubled = [F.interpolate(part, scale_factor=2, mode="bilinear", align_corners=False) for part in y[1:]]
    expected = [
        made.stay[0](y[0]) + made.up[0](doubled[0]),
        made.stay[1](y[1]) + made.down[0](y[0]) + made.up[1](doubled[1]),
        made.stay[2](y[2]) + made.down[1](y[1]),
    ]
    for found, wanted in zip(made(x), expected, strict=True):
        torch.testing.assert_close(found, 0.5 * wanted)


def test_the_network_has_the_papers_size():
    hidden, channels = 1024, 304
    with torch.device("meta"):
        mean = torch.zeros(3, channels)
        made = CrossScaleFlow(mean, mean + 1, hidden=hidden, kernels=[3, 3, 3, 5], clamp=3.0)
    half = channels // 2
    subnets = [3 * (half * k * k + 1) * hidden + 7 * (hidden * k * k + 1) * channels + 3 for k in (3, 3, 3, 5)]
    assert sum(p.numel() for p in made.parameters()) == 2 * sum(subnets)
    detector = CsFlow()
    assert (detector.hidden, detector.blocks, detector.clamp, detector.epochs) == (1024, 4, 3.0, 240)


def test_maps_of_odd_sizes_work(learned):
    odd = maps(1, 6, ((7, 7), (4, 4), (2, 2)))
    z, logdet = learned.network_(odd)
    assert [x.shape[2] for x in z] == [7, 4, 2]
    assert torch.isfinite(logdet).all()


# --- the detector ---


def test_it_asks_for_one_layer_at_three_scales():
    assert CsFlow().feature_spec().keys == (3, 103, 203)


def test_features_are_standardised_by_channel_and_scale(learned):
    for s, x in enumerate(maps(4, 6, FULL)):
        x = (3 + 2 * x).half().double().transpose(0, 1).flatten(1)
        np.testing.assert_allclose(learned.mean_[s], x.mean(1), atol=1e-4)
        np.testing.assert_allclose(learned.spread_[s], x.std(1, correction=0), rtol=1e-4)


def test_the_loss_begins_at_the_negative_log_density_of_standardised_features():
    detector, x = quick(), [3 + 2 * part for part in maps(4, 6, FULL)]
    detector._set_up(Features(x), range(4), Runtime())
    batch = ImageBatch(("",) * 4, features=dict(zip((3, 103, 203), x, strict=True)))
    found = detector._loss(detector._network(), batch).item()
    expected = torch.zeros(4, dtype=torch.float64)
    for s, part in enumerate(x):
        normal = torch.distributions.Normal(
            detector.mean_[s].double()[:, None, None], detector.spread_[s].double()[:, None, None]
        )
        expected -= normal.log_prob(part.double()).flatten(1).sum(1)
    assert found == pytest.approx(float(expected.mean()) / (6 * (64 + 16 + 4)), rel=1e-4)


def test_the_map_is_the_mean_square_of_the_finest_z_and_the_score_half_of_all(learned):
    x = [3 + 2 * part for part in maps(2, 6, FULL, seed=5)]
    found = learned.predict(Features(x))
    with torch.no_grad():
        z, _ = learned.network_([part.half().float() for part in x])
    squares = z[0].square().mean(1, keepdim=True)
    expected = F.interpolate(squares, size=(128, 128), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(found.maps, expected, rtol=1e-4, atol=1e-4)
    every = torch.cat([part.flatten(1) for part in z], 1)
    np.testing.assert_allclose(found.scores, every.square().mean(1) / 2, rtol=1e-4)
    assert math.isfinite(found.scores.sum())
