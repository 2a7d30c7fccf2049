"""Parameters of a method against what its fields declare: types and bounds, all in one place.

A field's annotation is its declaration: `int`, `float` (finite), `bool`, `str`, `tuple[int, ...]`, `Literal[...]`,
`X | None`, and bounds of annotated-types, as in `Annotated[int, Ge(1)]`. What several fields must be together, a method
says by `Detector.conflict`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from inspect import get_annotations
from itertools import pairwise
from textwrap import dedent
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, MaxLen, MinLen, MultipleOf, Predicate

from al_models.errors import InvalidInput, unknown

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def odd(value: int) -> bool:
    """Whether a number is odd."""
    return value % 2 == 1


PositiveInt = Annotated[int, Ge(1)]
OddInt = Annotated[int, Ge(1), Predicate(odd)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Layers = Annotated[tuple[NonNegativeInt, ...], MinLen(1)]
"""Layers of a backbone, counted from 0; at least one."""

SHARED = {
    "backbone": "A timm model, whose features are read.",
    "batch_size": "Images that a step learns from.",
    "learning_rate": "The highest of the schedule.",
    "layers": "Layers that are read: stages of a CNN (1, 2, 3 = every 4th, 8th, 16th pixel), blocks of a transformer.",
    "sigma": "Standard deviation of the Gaussian that smooths the map, in pixels; 0: none.",
    "weight_decay": "Added to the gradient, or taken from the weights, as the optimiser does.",
    "weights": "Path of the backbone's weights (.safetensors, .pth); none: its own pretrained ones.",
}
"""What parameters of many methods mean, where a method says no more."""

_PLAIN = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
_MANY = {int: "whole numbers", float: "finite numbers", bool: "true or false each", str: "texts"}


def checked(method: str, cls: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as the class takes them: a list is a tuple. Raises UnknownName for a name, InvalidInput for values
    of another type or out of bounds, each with its method, its name and what is expected."""
    known = {field.name: field for field in fields(cls)}
    for name in given:
        if name not in known:
            raise unknown(f"option of {method}", name, known)
    values = {name: _plain(value) for name, value in given.items()}
    wrong = [text for name, value in values.items() if (text := _problem(cls, known[name], value))]
    if wrong:
        raise InvalidInput(f"{method} was given {'; and '.join(wrong)}")
    return values


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method, as people read it."""

    name: str
    default: Any
    allowed: str
    """In words: `a whole number of at least 1`."""
    meaning: str
    """Its docstring, in one line; empty where it has none."""


def declared(cls: type[Any]) -> list[Parameter]:
    """The parameters of a method's class, its own before those of its bases."""
    meanings, annotations = dict[str, str](), _annotations(cls)
    for base in reversed(cls.__mro__[:-1]):  # the nearest class has the last word
        meanings |= _docstrings(base)
    own = get_annotations(cls)
    ordered = sorted(fields(cls), key=lambda field: field.name not in own)
    return [
        Parameter(
            field.name,
            list(field.default) if isinstance(field.default, tuple) else field.default,
            words(annotations[field.name][-1]) + (", or none" if _optional(annotations[field.name][-1]) else ""),
            meanings.get(field.name) or SHARED.get(field.name, ""),
        )
        for field in ordered
    ]


def _docstrings(cls: type[Any]) -> dict[str, str]:
    """Name of a field -> the string that follows it in the class's source, in one line."""
    (body,) = ast.parse(dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _optional(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _optional(get_args(annotation)[0])
    return get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation)


def _plain(value: Any) -> Any:
    """TOML and JSON have lists only, and a number of numpy is a number."""
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    return value.item() if isinstance(value, np.generic) else value


def _problem(cls: type[Any], field: Field[Any], value: Any) -> str | None:
    """What is wrong with a value; None for one that is right."""
    from pydantic import ValidationError

    for annotation, adapter in _judges(cls)[field.name]:
        try:
            adapter.validate_python(value)
        except ValidationError:
            shown = list(value) if isinstance(value, tuple) else value
            return f"{field.name} = {shown!r}, where {words(annotation)} is expected{_hint(field, value)}"
    return None


@cache
def _judges(cls: type[Any]) -> dict[str, list[tuple[Any, TypeAdapter[Any]]]]:
    """Field -> its annotations, and what judges by each: strict, so that a text is no number and true no 1. A class
    that declares a field anew, for another default, keeps the bounds of its base."""
    from pydantic import ConfigDict, TypeAdapter  # a tenth of a second, which the list of methods can save

    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return {
        name: [(annotation, TypeAdapter(annotation, config=config)) for annotation in annotations]
        for name, annotations in _annotations(cls).items()
    }


def _annotations(cls: type[Any]) -> dict[str, list[Any]]:
    """Field -> its annotations, that of the nearest class first."""
    names = {field.name: list[Any]() for field in fields(cls)}
    for base in cls.__mro__:
        for name in names.keys() & get_annotations(base).keys():
            names[name].append(get_type_hints(base, include_extras=True)[name])
    return names


def _hint(field: Field[Any], value: Any) -> str:
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    usual = "or leave it out" if default is None or default is MISSING else f"leave it out for {default!r}"
    quoted = isinstance(value, str) and not isinstance(default, str)
    return f" ({usual}{'; numbers stand without quotes' if quoted else ''})"


def words(annotation: Any) -> str:
    """What an annotation allows, for people: `a whole number of at least 1`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        text = words(parts[0])
        bounds = [one for bound in parts[1:] for one in (bound if isinstance(bound, GroupedMetadata) else [bound])]
        least = next((bound.min_length for bound in bounds if isinstance(bound, MinLen)), 0)
        if least:
            text = text.replace("a list of ", f"a list of {least} or more ", 1)
        return f"{text} {' and '.join(said for bound in bounds if (said := _bound(bound)))}".rstrip()
    if origin in (Union, UnionType):
        return " or ".join(words(part) for part in parts if part is not NoneType)  # which is said by leaving it out
    if origin is Literal:
        return " or ".join(repr(part) for part in parts)
    if origin is tuple and parts:
        return _list(parts)
    return _PLAIN.get(annotation, f"a {getattr(annotation, '__name__', annotation)}")


def _list(parts: tuple[Any, ...]) -> str:
    if parts[-1] is Ellipsis:
        return f"a list of {_several(parts[0])}"
    if len(set(parts)) == 1:
        return f"a list of {len(parts)} {_several(parts[0])}"
    return f"a list of {', '.join(words(part) for part in parts)}"


def _several(annotation: Any) -> str:
    """The same of many: `whole numbers of at least 1`."""
    if annotation in _MANY:
        return _MANY[annotation]
    if get_origin(annotation) is Annotated and get_args(annotation)[0] in _MANY:
        kind = get_args(annotation)[0]
        return words(annotation).replace(_PLAIN[kind], _MANY[kind], 1)
    return f"these: {words(annotation)}"


def _bound(bound: object) -> str:
    match bound:
        case Ge(ge):
            return f"of at least {ge}"
        case Gt(gt):
            return f"above {gt}"
        case Le(le):
            return f"of at most {le}"
        case Lt(lt):
            return f"below {lt}"
        case MultipleOf(step):
            return f"that {step} divides"
        case MaxLen(most):
            return f"with {most} or fewer"
        case Predicate(func):
            return f"that is {func.__name__.strip('_').replace('_', ' ')}"
    return ""
