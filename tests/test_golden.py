"""Golden values: what each method gives on small seeded images, so that a change of its numbers is seen.

Processors round differently, and each step of a training passes that on: after forty steps, results of AVX2 and of
AVX-512 lay 4 % apart. So a training is written down by its first steps, at a hundredth of its learning rate: how long
the gradient is, how far the weights move, the losses, and the maps of a network that is nearly as it was made. Kinds of
processors differ in these by a quarter of the tolerance at most; a learning rate that is changed by 5 % shows, and so
does a weight of the loss that is changed by 20 %.

A new method, or a change that is meant, is written down by `python tests/test_golden.py METHOD ...`.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from al_models import METHODS, Runtime
from al_models.checks import check_images, quick_detector
from al_models.registry import detector_class

GOLDEN = Path(__file__).with_name("golden.json")
QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)
TOLERANCE = {"scores": 1e-3, "map_quantiles": 1e-3, "map_means": 1e-3, "gradients": 2e-2, "moves": 1e-2, "losses": 1e-4}
"""Relative; kinks (ReLU) and batch norms of few images make a gradient jump."""
STEPS = 3
"""Steps of a training that are written down one by one."""
SLOWER = 0.01
"""The share of its learning rate that a method learns with here."""
SLOWEST = 1e-6
"""A learning rate below which float32 would round a step away."""
CHANGES = {("vt_adl", "ssim_weight"): 20}
"""Changes that show, where it takes more than 20 %: what an untrained decoder makes has hardly a slope of SSIM."""
RATE = "learning_rate"
"""What the names of learning rates end in, one a phase where they differ."""
LOSS_WEIGHTS = ("commitment", "compactness")
"""Parameters that weigh a part of the loss and do not end in `_weight`."""
TRAINED = [method for method in METHODS if detector_class(method).traits.trains]


def measured(method, **changed):
    """Scores of three good and two anomalous images, quantiles of all their pixels, and how a training began.

    `changed`: what is added to a parameter, as a share of it.
    """
    detector = quick_detector(detector_class(method))
    if method in TRAINED:
        names = [field.name for field in fields(detector)]
        short = {name: 2 for name in names if name.endswith("epochs")}
        slow = {name: max(SLOWER * getattr(detector, name), SLOWEST) for name in names if name.endswith(RATE)}
        detector = replace(detector, batch_size=min(3, detector.batch_size), **short, **slow)
    detector = replace(detector, **{name: getattr(detector, name) * (1 + by) for name, by in changed.items()})
    images, runtime = check_images(detector.image_size), Runtime(seed=7)
    with first_steps() as steps:
        detector.fit(images.train, runtime)
    found = detector.predict(images.test, runtime)
    values = {
        "scores": found.scores,
        "map_quantiles": np.quantile(found.maps, QUANTILES),
        "map_means": found.maps.mean(axis=(1, 2), dtype=np.float64),
    }
    if steps:
        values |= steps | {"losses": [loss for _, loss, _ in detector.curve()[:STEPS]]}
    return {name: [float(f"{value:.6g}") for value in row] for name, row in values.items()}


@contextmanager
def first_steps():
    """Lengths (L2) of the gradient, in parts, and of the weights' move in a training's first steps; empty without any.

    The very first step is taken for the training: it moves the weights at random, since some begin on a kink (a
    transformer at the identity looks between two pixels), where rounding decides the gradient.
    """
    found, before = {}, []

    def begins(optimiser, inputs, options):
        weights = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        if "gradients" not in found:
            found["gradients"] = found["moves"] = []
            scatter(weights)
        elif len(found["moves"]) < STEPS:
            found["gradients"] = [*found["gradients"], *lengths([p.grad for p in weights])]
            before[:] = [(p, p.detach().clone()) for p in weights]

    def ends(optimiser, inputs, options):
        if before:
            found["moves"] = [*found["moves"], length(p.detach() - was for p, was in before)]
            before.clear()

    hooks = [register_optimizer_step_pre_hook(begins), register_optimizer_step_post_hook(ends)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def scatter(weights):
    """Move each weight by a tenth of its tensor's spread, or a hundredth, and leave no gradient."""
    generator = torch.Generator().manual_seed(0)
    for p in weights:
        spread = float(p.std(correction=0)) or 0.1
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 * spread)
        p.grad.zero_()


def lengths(tensors):
    """Of up to eight runs of tensors, so that a part of the loss that teaches few of the weights shows, too."""
    size = -(-len(tensors) // 8)
    return [length(tensors[start : start + size]) for start in range(0, len(tensors), size)]


def length(parts):
    return float(torch.stack([part.double().square().sum() for part in parts]).sum().sqrt())


def differing(found, golden):
    """Names of the values that are not the golden ones."""
    assert found.keys() == golden.keys()
    tolerance = {name: pytest.approx(row, rel=TOLERANCE[name], abs=1e-6) for name, row in golden.items()}
    return [name for name, expected in tolerance.items() if found[name] != expected]


def write(methods):
    """Measure these methods and put them into the file, beside what it holds; methods that are gone leave it."""
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    known |= {method: measured(method) for method in methods}
    kept = {method: known[method] for method in METHODS if method in known}
    GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_its_golden_values(method):
    golden = json.loads(GOLDEN.read_text())
    if method not in golden:
        pytest.fail(f"{method} has no golden values; look at its results, then: python tests/test_golden.py {method}")
    assert differing(measured(method), golden[method]) == []


def rates_and_weights(method):
    """The learning rates of a method, and the weights of the parts of its loss."""
    names = [field.name for field in fields(detector_class(method)) if field.name != "weight_decay"]
    return [name for name in names if name.endswith((RATE, "_weight")) or name in LOSS_WEIGHTS]


@pytest.mark.parametrize(
    ("method", "parameter"),
    [pytest.param(m, name, id=f"{m}-{name}") for m in TRAINED for name in rates_and_weights(m)],
)
def test_a_changed_rate_or_weight_is_seen(method, parameter):
    by = CHANGES.get((method, parameter), 0.05 if parameter.endswith(RATE) else 0.2)
    changed = measured(method, **{parameter: by})
    assert differing(changed, json.loads(GOLDEN.read_text())[method])


def test_no_golden_values_of_methods_that_are_gone():
    assert set(json.loads(GOLDEN.read_text())) <= set(METHODS)


if __name__ == "__main__":
    write(sys.argv[1:] or sorted(METHODS))
