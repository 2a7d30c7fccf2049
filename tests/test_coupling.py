"""Blocks of normalizing flows: invertible, with the log-determinant that autograd finds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from al_models.errors import UnknownName
from al_models.parts.coupling import (
    Coupling,
    Flow,
    HalfCoupling,
    InvertibleConvolution,
    Permutation,
    Rotation,
    Scale,
    log_likelihood,
    soft_clamp,
)


def dense(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def convolution(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, outputs, 1))


class Conditioned(nn.Module):
    """A dense subnet that joins a condition of four numbers to its input."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.dense = dense(inputs + 4, outputs)

    def forward(self, x, condition):
        return self.dense(torch.cat([x, condition], dim=1))


def block(kind, channels, subnet):
    torch.manual_seed(4)
    made = {
        "half": lambda: HalfCoupling(channels, subnet, clamp=1.9),
        "both": lambda: Coupling(channels, subnet, clamp=3.0),
        "scale": lambda: Scale(channels, 0.7),
        "permutation": lambda: Permutation(channels),
        "rotation": lambda: Rotation(channels),
        "convolution": lambda: InvertibleConvolution(channels),
        "flow": lambda: Flow(
            [
                layer
                for _ in range(3)
                for layer in (
                    InvertibleConvolution(channels),
                    Coupling(channels, subnet, clamp=3.0),
                    Scale(channels, 0.7),
                    HalfCoupling(channels, subnet, clamp=1.9),
                    Rotation(channels),
                )
            ]
        ),
    }[kind]()
    with torch.no_grad():
        for parameter in made.parameters():  # away from a start that may be the identity
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


KINDS = ["half", "both", "scale", "permutation", "rotation", "convolution", "flow"]
CASES = [(kind, shape) for kind in KINDS for shape in [(3, 6), (3, 5), (2, 6, 3, 4), (2, 5, 3, 4)]]


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_block_is_undone_by_its_inverse(kind, shape):
    made = block(kind, shape[1], dense if len(shape) == 2 else convolution)
    x = torch.randn(shape)
    y, _ = made(x)
    assert y.shape == x.shape
    torch.testing.assert_close(made.inverse(y), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_the_log_determinant_is_that_of_autograds_jacobian(kind, shape):
    made = block(kind, shape[1], dense if len(shape) == 2 else convolution).double()
    x = torch.randn(shape, dtype=torch.float64)
    _, logdet = made(x)
    assert logdet.shape == (shape[0],)
    for row, found in zip(x, logdet, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda one: made(one[None])[0][0], row)
        _, expected = torch.linalg.slogdet(jacobian.reshape(row.numel(), -1))
        assert float(found.detach()) == pytest.approx(
            float(expected.detach()), abs=1e-4
        )  # couplings compute in float32


@pytest.mark.parametrize("kind", ["half", "both", "flow"])
def test_a_condition_changes_the_map_and_the_inverse_takes_it(kind):
    made = block(kind, 6, Conditioned)
    x, condition, other = torch.randn(5, 6), torch.randn(5, 4), torch.randn(5, 4)
    y, _ = made(x, condition)
    assert not torch.allclose(y, made(x, other)[0], atol=1e-3)
    torch.testing.assert_close(made.inverse(y, condition), x, atol=1e-4, rtol=1e-4)


def test_the_likelihood_is_that_of_the_density_the_flow_describes():
    """A flow of one scale block says that x is normal with a known mean and deviation."""
    made = Scale(2, 0.5)
    with torch.no_grad():
        made.shift.copy_(torch.tensor([1.0, -2.0]))
    x = torch.randn(7, 2)
    expected = torch.distributions.Normal(torch.tensor([-2.0, 4.0]), 2.0).log_prob(x).sum(1)
    torch.testing.assert_close(log_likelihood(*made(x)), expected, atol=1e-5, rtol=1e-5)


def test_a_trained_flow_gives_samples_the_likelihood_of_their_source():
    """Of a correlated normal, the mean log-likelihood comes near minus its entropy, and never beyond."""
    torch.manual_seed(0)
    mix = torch.tensor([[1.0, 0.0], [0.9, 0.3]])
    made = Flow([layer for _ in range(3) for layer in (HalfCoupling(2, dense, clamp=1.9), Rotation(2), Scale(2))])
    optimiser = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(400):
        loss = -log_likelihood(*made(torch.randn(256, 2) @ mix.T)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    entropy = 1 + math.log(2 * math.pi) + float(torch.logdet(mix))
    with torch.no_grad():
        found = float(-log_likelihood(*made(torch.randn(20_000, 2) @ mix.T)).mean())
    assert entropy - 0.03 < found < entropy + 0.06


@pytest.mark.parametrize("curve", ["tanh", "atan"])
def test_a_clamped_scale_stays_within_its_limit_and_keeps_its_sign(curve):
    scale = torch.linspace(-1e4, 1e4, 101)
    found = soft_clamp(scale, 1.9, curve)
    assert found.abs().max() <= 1.9
    assert (found.diff() >= 0).all()
    assert float(soft_clamp(torch.zeros(1), 1.9, curve)) == 0


def test_the_curves_of_a_clamp_are_those_of_the_papers_code():
    one = torch.tensor([1.9])
    assert float(soft_clamp(one, 1.9, "atan")) == pytest.approx(0.95)  # atan 1 is a quarter of pi
    assert float(soft_clamp(10 * one, 1.9, "tanh")) == pytest.approx(1.9 * math.tanh(1.9))
    with pytest.raises(UnknownName, match="did you mean atan"):
        soft_clamp(one, 1.9, "atan2")
