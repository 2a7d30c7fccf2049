"""Where random numbers come from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from al_models.checks.harness import Check, CheckImages, Make, assert_same, brief, predicted, source_of
from al_models.types import Runtime


def equal_seed_equal_result(make: Make, images: CheckImages) -> None:
    """The runtime's seed alone decides: equal seeds give equal bits whatever the global generators were left at."""
    make = brief(make)
    if not make().traits.deterministic:
        return
    results = []
    for elsewhere in (1, 2):
        with _global_generators_at(elsewhere):
            fitted = make().fit(source_of(make(), images.train), Runtime(seed=5))
            results.append(predicted(fitted, images.test, Runtime(seed=5)))
    assert_same(*results, "with the same seed")


def other_runs_leave_the_global_random_state_untouched(make: Make, images: CheckImages) -> None:
    """Fit and predict neither seed nor draw from the generators of torch, numpy and random."""
    make = brief(make)
    for _ in range(3):  # a thread of another library may draw meanwhile; it does not do so each time
        with _global_generators_at(3):
            before = _global_state()
            predicted(make().fit(source_of(make(), images.train)), images.test)
            if before == _global_state():
                return
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


CHECKS: list[Check] = [
    equal_seed_equal_result,
    other_runs_leave_the_global_random_state_untouched,
]
