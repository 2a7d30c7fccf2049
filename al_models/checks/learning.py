"""What fit does and what it learns, and the state that is saved of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import safetensors.numpy
import torch

from al_models.checks.harness import (
    Check,
    CheckImages,
    Make,
    assert_same,
    assert_stated,
    brief,
    clear_error_allowed,
    equal,
    fitted_on,
    predicted,
    raises,
    source_of,
)
from al_models.errors import InvalidInput, NotFitted
from al_models.parts import train
from al_models.types import Runtime


def fit_returns_self_and_leaves_what_it_is_given(make: Make, images: CheckImages) -> None:
    """`fit` gives the detector back with its parameters, and neither fit nor predict writes to images or features."""
    detector = brief(make)()
    params, train, test = detector.params(), source_of(detector, images.train), source_of(detector, images.test)
    before = copy.deepcopy((train.tensors, test.tensors))
    assert detector.fit(train) is detector, "fit returned something other than self"
    assert detector.params() == params, f"fit changed the parameters {params} to {detector.params()}"
    detector.predict(test)
    for old, new in zip(before, (train.tensors, test.tensors), strict=True):
        for name, value in old.items():
            assert torch.equal(value, new[name]), f"the {name} given were written to"


def learned_attributes_end_in_underscore(make: Make, images: CheckImages) -> None:
    """What fit sets ends in `_`, and there is some; what begins with `_` follows from it."""
    detector = fitted_on(make, images)
    new = {name for name in vars(detector) if not name.startswith("_")} - {field.name for field in fields(detector)}
    assert detector.state_names(), "fit set no attribute that ends in '_'"
    assert new == set(detector.state_names()), f"fit set {sorted(new - set(detector.state_names()))}; end them in '_'"


def fitting_again_forgets(make: Make, images: CheckImages) -> None:
    """A second fit gives what a first one gives: nothing of the one before stays."""
    make = brief(make)
    once = fitted_on(make, images)
    twice = make()
    twice.fit(source_of(twice, images.good)).fit(source_of(twice, images.train))
    assert once.state_names() == twice.state_names()
    if once.traits.deterministic:
        assert_same(predicted(once, images.test), predicted(twice, images.test), "after a second fit")


def fitting_nothing_is_a_clear_error(make: Make, images: CheckImages) -> None:
    """No image to learn from raises InvalidInput."""
    with raises(InvalidInput, "fit without an image"):
        make().fit(images.train[:0])


def one_training_image_is_enough_or_a_clear_error(make: Make, images: CheckImages) -> None:
    """One image is learned from, or refused with a ModelsError."""
    with clear_error_allowed():
        detector = brief(make)()
        assert_stated(detector.fit(source_of(detector, images.train[:1])), images.test)


def constant_images_do_not_crash_or_give_a_clear_error(make: Make, images: CheckImages) -> None:
    """Images without any contrast are worked on, or refused with a ModelsError."""
    with clear_error_allowed():
        detector = brief(make)()
        flat = np.full_like(images.train, 128)
        assert_stated(detector.fit(source_of(detector, flat)), np.concatenate([flat[:1], images.test]))


def state_is_plain_arrays(make: Make, images: CheckImages) -> None:
    """`state()` holds numeric numpy arrays, named after learned attributes (`bank_`, `network_.conv.weight`)."""
    detector = fitted_on(make, images)
    for name, value in detector.state().items():
        assert isinstance(value, np.ndarray), f"{name} is a {type(value).__name__}"
        assert value.dtype.kind in "biuf", f"{name} is of dtype {value.dtype}, which no plain file holds"
        assert value.flags.c_contiguous, f"{name} is not C-contiguous; safetensors would shuffle it without a word"
        assert name.partition(".")[0] in detector.state_names(), f"{name} is not named after a learned attribute"


def state_round_trip_gives_equal_predictions(make: Make, images: CheckImages) -> None:
    """A fresh detector with the state, by way of safetensors bytes, predicts the same bits and has the same state."""
    fitted = fitted_on(make, images)
    state = fitted.state()
    loaded = make().load_state(safetensors.numpy.load(safetensors.numpy.save(state)))
    assert_same(predicted(fitted, images.test), predicted(loaded, images.test), "after a state round trip")
    again = loaded.state()
    assert again.keys() == state.keys(), f"the state's names changed: {sorted(again.keys() ^ state.keys())}"
    assert all(equal(value, again[name]) for name, value in state.items()), "the state's values changed"


def pickles_and_deep_copies_predict_the_same(make: Make, images: CheckImages) -> None:
    """A fitted detector crosses a process border, and a copy of it is whole."""
    fitted = fitted_on(make, images)
    expected = predicted(fitted, images.test)
    assert_same(expected, predicted(pickle.loads(pickle.dumps(fitted)), images.test), "after pickling")
    assert_same(expected, predicted(copy.deepcopy(fitted), images.test), "after a deep copy")


def predict_before_fit_raises_not_fitted(make: Make, images: CheckImages) -> None:
    """`predict` and `state` raise NotFitted before anything was learned."""
    with raises(NotFitted, "predict before fit"):
        make().predict(images.good)
    with raises(NotFitted, "state before fit"):
        make().state()


def predicting_nothing_is_a_clear_error(make: Make, images: CheckImages) -> None:
    """No image to judge raises InvalidInput."""
    fitted = fitted_on(make, images)
    with raises(InvalidInput, "predict without an image"):
        fitted.predict(images.test[:0])


def predict_changes_nothing_learned(make: Make, images: CheckImages) -> None:
    """Predicting leaves the state as it was, so that it may be saved before or after."""
    fitted = fitted_on(make, images)
    before = copy.deepcopy(fitted.state())
    predicted(fitted, images.test)
    after = fitted.state()
    assert before.keys() == after.keys(), f"predict added or removed {sorted(before.keys() ^ after.keys())}"
    changed = [name for name, value in before.items() if not equal(value, after[name])]
    assert not changed, f"predict changed {changed}"


def a_killed_fit_resumes_to_the_same_bits(make: Make, images: CheckImages) -> None:
    """A training that is killed in each of its phases, and goes on each time, has the state of one that was not."""
    make = brief(make)
    if not make().traits.trains or not make().traits.deterministic:
        return
    whole, kept, kills = fitted_on(make, images).state(), _KilledInEachPhase(), 0
    with _saved_after_each_step():
        while True:
            detector = make()
            try:
                resumed = detector.fit(source_of(detector, images.train), Runtime(checkpoints=kept)).state()
            except _Killed:
                kills += 1
            else:
                break
    assert kills, "fit saved no checkpoint; train by `parts.train.train`, which keeps them"
    assert whole.keys() == resumed.keys(), f"resumed, it learned other names: {sorted(whole.keys() ^ resumed.keys())}"
    differ = [name for name, value in whole.items() if not equal(value, resumed[name])]
    assert not differ, f"killed {kills} times and resumed, {differ} differ"


class _Killed(InterruptedError):
    pass


class _KilledInEachPhase:
    """Keeps the last checkpoint, and ends the fit at the first one of each phase."""

    def __init__(self) -> None:
        self.state: dict[str, np.ndarray] | None = None
        self.phases: set[int] = set()

    def load(self) -> dict[str, np.ndarray] | None:
        """As Checkpoints."""
        return self.state

    def save(self, state: dict[str, np.ndarray]) -> None:
        """As Checkpoints."""
        self.state, phase = state, int(state["phase"])
        if phase not in self.phases:
            self.phases.add(phase)
            raise _Killed


@contextmanager
def _saved_after_each_step() -> Iterator[None]:
    due = train._Every.due
    train._Every.due = lambda self: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        train._Every.due = due  # type: ignore[method-assign]


CHECKS: list[Check] = [
    fit_returns_self_and_leaves_what_it_is_given,
    learned_attributes_end_in_underscore,
    fitting_again_forgets,
    fitting_nothing_is_a_clear_error,
    one_training_image_is_enough_or_a_clear_error,
    constant_images_do_not_crash_or_give_a_clear_error,
    state_is_plain_arrays,
    state_round_trip_gives_equal_predictions,
    pickles_and_deep_copies_predict_the_same,
    predict_before_fit_raises_not_fitted,
    predicting_nothing_is_a_clear_error,
    predict_changes_nothing_learned,
    a_killed_fit_resumes_to_the_same_bits,
]
