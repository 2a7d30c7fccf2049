"""Whether the traits tell the truth."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from al_models.checks.harness import (
    Check,
    CheckImages,
    Make,
    assert_close,
    brief,
    fitted_on,
    predicted,
    raises,
    source_of,
)
from al_models.errors import InvalidInput


def more_images_are_learned_as_if_given_at_once(make: Make, images: CheckImages) -> None:
    """A saved model that takes in more images is the model of all of them, or says that it cannot."""
    make = brief(make)
    half, whole = len(images.train) // 2, fitted_on(make, images)
    if not whole.traits.incremental:
        with raises(InvalidInput, "partial_fit of a method that is not incremental"):
            whole.partial_fit(source_of(whole, images.good))
        return
    first = make().fit(source_of(make(), images.train[:half]))
    more = make().load_state(first.state()).partial_fit(source_of(first, images.train[half:]))
    assert_close(predicted(whole, images.test), predicted(more, images.test), "learned in two parts")
    predicted(first, images.test)  # what a prediction has cached must not outlive what is learned
    first.partial_fit(source_of(first, images.train[half:]))
    assert_close(predicted(whole, images.test), predicted(first, images.test), "learned more after a prediction")


def traits_are_true(make: Make, images: CheckImages) -> None:
    """What is said to be read is read, training is said, and a user of synthetic defects says so."""
    make = brief(make)
    detector = make()
    with _counted_optimiser_steps() as steps:
        detector.fit(source_of(detector, images.train))  # this source gives images only where the traits ask for them
    said = detector.traits.trains
    assert bool(steps) == said, f"fit took {len(steps)} optimiser steps, but traits.trains={said}"
    with _counted_gradients() as gradients:
        predicted(detector, images.test)
    said = detector.traits.gradients_in_predict
    assert bool(gradients) == said, f"predict took {len(gradients)} gradients, but traits.gradients_in_predict={said}"
    if detector.traits.needs_images:
        assert _fails_without(make, images, "images"), "traits.needs_images, but fit and predict do without images"
    if detector.feature_spec() is not None:
        assert _fails_without(make, images, "features"), "a feature_spec, but fit and predict do without features"
    imported = {getattr(value, "__module__", None) for value in vars(sys.modules[type(detector).__module__]).values()}
    if any(str(name).startswith("al_models.parts.defects") for name in imported):
        assert detector.traits.uses_synthetic_defects, "imports al_models.parts.defects, but the trait denies it"


def _fails_without(make: Make, images: CheckImages, what: str) -> bool:
    detector = make()
    try:
        detector.fit(source_of(detector, images.train, without=what))
        detector.predict(source_of(detector, images.test, without=what))
    except Exception:
        return True
    return False


@contextmanager
def _counted_optimiser_steps() -> Iterator[list[None]]:
    steps: list[None] = []
    hook = register_optimizer_step_post_hook(lambda optimiser, inputs, options: steps.append(None))
    try:
        yield steps
    finally:
        hook.remove()


@contextmanager
def _counted_gradients() -> Iterator[list[None]]:
    """One entry for each call of `torch.autograd.grad`, the only way to a gradient that writes to nothing."""
    taken: list[None] = []
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        taken.append(None)
        return grad(*args, **kwargs)

    torch.autograd.grad = counted
    try:
        yield taken
    finally:
        torch.autograd.grad = grad


CHECKS: list[Check] = [
    more_images_are_learned_as_if_given_at_once,
    traits_are_true,
]
