"""The contract of a detector, as small checks named as sentences.

A check takes a function that makes a fresh detector and a few small images, and raises AssertionError when the sentence
is not true. The project's tests cross `CHECKS` with the registry; `check_detector` runs them all on one method, also on
a class that stands in no registry.
"""

from __future__ import annotations

from functools import partial

from al_models.checks import altered, construction, learning, predicting, randomness, traits
from al_models.checks.harness import Check, CheckImages, check_images, quick_detector
from al_models.detector import Detector
from al_models.registry import detector_class

__all__ = ["CHECKS", "Check", "CheckImages", "check_detector", "check_images", "quick_detector"]

CHECKS: list[Check] = [
    *construction.CHECKS,
    *learning.CHECKS,
    *predicting.CHECKS,
    *altered.CHECKS,
    *randomness.CHECKS,
    *traits.CHECKS,
]
"""Every check, in the order a new method is best mended in."""


def check_detector(detector: str | type[Detector]) -> None:
    """Run all checks on a method, given by its name in the registry or by its class.

    Raises ExceptionGroup with every check that failed, each with the check's name as a note.
    """
    make = partial(quick_detector, detector_class(detector) if isinstance(detector, str) else detector)
    failed = []
    for check in CHECKS:
        try:
            check(make, check_images(make().image_size))
        except Exception as error:
            error.add_note(f"check: {check.__name__}")
            failed.append(error)
    if failed:
        raise ExceptionGroup(f"{type(make()).__name__} breaks {len(failed)} of {len(CHECKS)} checks", failed)
