"""What trained detectors share: held-out images, budgets, resumption, and the network's way to disk."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from al_models.checks import check_images
from al_models.errors import InvalidInput
from al_models.generative.fastflow import Fastflow
from al_models.trained import TrainedDetector, with_maximum
from al_models.types import Runtime, Traits

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


# what is prepared of a batch, by the hook alone


@dataclass
class Marked:
    """Brightness of the images, and a number drawn for each."""

    brightness: torch.Tensor
    numbers: torch.Tensor

    def to(self, device):
        return Marked(self.brightness.to(device), self.numbers.to(device))


@dataclass(kw_only=True)
class Prepared(TrainedDetector):
    traits = Traits(needs_images=True, trains=True, uses_synthetic_defects=True)
    image_size: int = 128

    def __post_init__(self):
        self.learned_, self.judged_ = [], []

    def _network(self):
        return torch.nn.Linear(1, 1)

    def _prepare(self, source, rows, runtime):
        def marked(batch, generators):
            brightness = batch.images.float().mean((1, 2, 3))[:, None] / 255
            return Marked(brightness, torch.tensor([rng.random() for rng in generators]))

        return marked

    def _loss(self, network, batch):
        assert isinstance(batch, Marked)
        (self.learned_ if network.training else self.judged_).append(batch.numbers.tolist())
        return network(batch.brightness).square().mean()

    def _judge(self, network, batch, draws):
        return with_maximum(batch.images.float().mean(3))


def test_what_is_prepared_is_learned_from_and_held_out_images_are_prepared_alike_at_each_look():
    detector = Prepared(epochs=3, batch_size=2, patience=3).fit(IMAGES.train)
    assert len({number for numbers in detector.learned_ for number in numbers}) == 3 * 5  # drawn anew in each epoch
    assert len(detector.judged_) == 3
    assert detector.judged_[0] == detector.judged_[1] == detector.judged_[2]
    assert np.isfinite(detector.curve_[:, 2]).all()
