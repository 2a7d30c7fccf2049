"""Every method of the registry keeps the detector's contract. Adding a method needs no edit here."""

from __future__ import annotations

from functools import partial

import pytest

from al_models import METHODS
from al_models.checks import CHECKS, check_detector, check_images, quick_detector
from al_models.detector import Detector
from al_models.registry import detector_class
from al_models.types import Prediction

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("ae_ssim", "higher_is_more_anomalous"): (
        "its quick training ends long before a reconstruction has the image's brightness, so all of an image looks "
        "anomalous; test_ae_ssim.py trains for long enough"
    ),
}
"""(method, check) -> why the sentence is not true of this method; strict, so that it goes when it becomes true."""


def cell(method, check):
    reason = EXCEPTIONS.get((method, check.__name__))
    marks = [pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)] if reason else []
    return pytest.param(method, check, id=f"{method}-{check.__name__}", marks=marks)


@pytest.mark.parametrize(("method", "check"), [cell(method, check) for method in METHODS for check in CHECKS])
def test_contract(method, check):
    make = partial(quick_detector, detector_class(method))
    check(make, check_images(make().image_size))


def test_exceptions_name_methods_and_checks_that_exist():
    known = {(method, check.__name__) for method in METHODS for check in CHECKS}
    assert set(EXCEPTIONS) <= known


class Careless(Detector):
    """Breaks the contract: no dataclass of its own, learns a name without `_`, and sees good as anomalous."""

    colour: str = "red"

    def _fit(self, source, runtime):
        self.seen = len(source)
        self.level_ = next(iter(source)).images.float().mean()

    def _predict(self, batch, runtime):
        maps = -(batch.images.float() - self.level_).abs().mean(3).numpy()
        return Prediction(batch.ids, maps, maps.min((1, 2)))


def test_a_broken_detector_is_told_each_sentence_it_breaks():
    with pytest.raises(ExceptionGroup, match="Careless breaks") as caught:
        check_detector(Careless)
    broken = {note.removeprefix("check: ") for error in caught.value.exceptions for note in error.__notes__}
    assert {
        "fields_have_defaults_and_no_kwargs",
        "learned_attributes_end_in_underscore",
        "higher_is_more_anomalous",
    } <= broken
