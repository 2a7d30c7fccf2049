"""Where random numbers come from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from al_models.checks.harness import Check, CheckImages, Make, assert_same, brief, predicted, source_of
from al_models.types import Prediction, Runtime


def random_numbers_come_from_the_seed_alone(make: Make, images: CheckImages) -> None:
    """Equal seeds give equal bits whatever the global generators of torch, numpy and random were left at, and these
    are neither seeded nor drawn from."""
    make = brief(make)
    first = _at_a_seed(make, images, elsewhere=1)
    if make().traits.deterministic:
        assert_same(first, _at_a_seed(make, images, elsewhere=2), "with the same seed")


def _at_a_seed(make: Make, images: CheckImages, elsewhere: int) -> Prediction:
    """What is learned and predicted with a seed while the global generators, which must not move, are elsewhere."""
    for _ in range(3):  # a thread of another library may draw meanwhile; it does not do so each time
        with _global_generators_at(elsewhere):
            before = _global_state()
            fitted = make().fit(source_of(make(), images.train), Runtime(seed=5))
            given = predicted(fitted, images.test, Runtime(seed=5))
            if before == _global_state():
                return given
    raise AssertionError("a global generator was moved; draw from one seeded with runtime.seed")


def _global_state() -> tuple[bytes, str, object]:
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state(legacy=False)), random.getstate()


@contextmanager
def _global_generators_at(seed: int) -> Iterator[None]:
    """The generators of torch, numpy and random as this seed leaves them; as they were before, afterwards."""
    before = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
    np.random.set_state(before[0])
    random.setstate(before[1])


CHECKS: list[Check] = [random_numbers_come_from_the_seed_alone]
