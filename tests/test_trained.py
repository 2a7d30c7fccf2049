"""What trained detectors share: held-out images, budgets, resumption, and the network's way to disk."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from al_models.checks import check_images
from al_models.errors import InvalidInput
from al_models.generative.fastflow import Fastflow
from al_models.types import Runtime

IMAGES = check_images(128)


def quick(**changes):
    return Fastflow(**{"image_size": 128, **Fastflow.quick, "epochs": 4, "batch_size": 2, **changes})


def test_nothing_is_held_out_unless_patience_asks_for_it():
    assert np.isnan(quick().fit(IMAGES.train).curve_[:, 2]).all()
    assert np.isfinite(quick(patience=3).fit(IMAGES.train).curve_[:, 2]).all()


def test_a_look_is_taken_each_epoch():
    assert [step for step, _, _ in quick().fit(IMAGES.train).curve()] == [3, 6, 9, 12]
    assert Fastflow().curve() == []


def test_a_limit_of_time_ends_the_fit():
    detector = quick(epochs=10_000, max_minutes=0.01).fit(IMAGES.train)
    assert 0 < detector.curve_[-1, 0] < 3000
    assert np.isfinite(detector.predict(IMAGES.test).maps).all()


def test_a_state_of_another_network_is_refused():
    state = quick().fit(IMAGES.train).state()
    with pytest.raises(InvalidInput, match="flow_steps = 3"):
        quick(flow_steps=3).load_state(copy.deepcopy(state))


def test_mixed_precision_learns_about_the_same():
    exact, mixed = (quick().fit(IMAGES.train, Runtime(mixed_precision=on)).curve_[:, 1] for on in (False, True))
    assert mixed == pytest.approx(exact, rel=0.05)
    assert all(p.dtype == torch.float32 for p in quick().fit(IMAGES.train).network_.parameters())
