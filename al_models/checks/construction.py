"""What a new detector is, and its parameters."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, fields

from al_models.checks.harness import Check, CheckImages, Make


def constructing_learns_nothing(make: Make, images: CheckImages) -> None:
    """A new detector holds its fields, with the values given, and nothing else."""
    detector = make()
    extra = sorted(set(vars(detector)) - {field.name for field in fields(detector)})
    assert not extra, f"construction set {extra}, which are no fields; set them in fit, ending in '_'"
    for name, value in detector.quick.items():
        found = getattr(detector, name)
        assert found == value, f"{name}={value!r} was stored as {found!r}; convert it in fit"


def fields_have_defaults_and_no_kwargs(make: Make, images: CheckImages) -> None:
    """The constructor takes keywords only, each with an immutable default, so that a misspelt one cannot pass."""
    cls = type(make())
    assert "__dataclass_fields__" in vars(cls), f"{cls.__name__} lacks @dataclass(kw_only=True): its fields are ignored"
    for field in fields(cls):
        assert field.default is not MISSING, f"{field.name} has no plain default; give the paper's value"
        hash(field.default)  # a mutable default would be shared between detectors
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{parameter} is not keyword-only"


def parameters_round_trip(make: Make, images: CheckImages) -> None:
    """`params()` survives JSON, and makes an equal detector."""
    detector = make()
    text = json.dumps(detector.params(), allow_nan=False)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()}
    again = type(detector)(**values)
    assert again == detector, f"{detector} became {again} by way of its params()"


CHECKS: list[Check] = [
    constructing_learns_nothing,
    fields_have_defaults_and_no_kwargs,
    parameters_round_trip,
]
