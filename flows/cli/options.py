"""What the options of the commands mean: the values of a run file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

_Model = TypeVar("_Model", bound="BaseModel")


def checked(model: type[_Model], values: dict[str, Any]) -> _Model:
    """The run that the values describe. Raises RunFileError, which says what is wrong with them."""
    from pydantic import ValidationError

    from flows.runs.runfile import RunFileError, explain

    if not values.get("data"):
        raise RunFileError("no data was given; use --data NAME=FOLDER (see `al datasets`), a run file, or `al demo`")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RunFileError(explain(error)) from error


def source(text: str, categories: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    """A data set of the run file, from NAME=FOLDER."""
    from flows.runs.runfile import RunFileError

    dataset, equals, root = text.partition("=")
    if not equals or not root:
        raise RunFileError(f"--data {text!r} was given; expected NAME=FOLDER, such as mvtec_ad=data/mvtec")
    dataset, colon, name = dataset.partition(":")
    options = options | ({"category": name} if colon else {})
    return {"dataset": dataset, "root": root, "categories": categories, "options": options}


def reader_options(texts: list[str] | None, inspect: str | None) -> dict[str, Any]:
    """Options of the reader, from KEY=VALUE."""
    from flows.runs.runfile import RunFileError

    options: dict[str, Any] = {} if inspect is None else {"inspect": inspect}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise RunFileError(f"--option {text!r} was given; expected NAME=VALUE (see `al datasets show NAME`)")
        options[name] = _json_or_text(value)
    return options


def policy(rules: list[str] | None, in_file: dict[str, Any] | None) -> dict[str, Any] | None:
    """The policy of the run file with the rules given here; None when neither is given."""
    from flows.runs.runfile import RunFileError

    if not rules:
        return in_file
    given = dict((in_file or {}).get("rules", {}))
    for text in rules:
        name, equals, severity = text.partition("=")
        if not (name and equals):
            raise RunFileError(
                f"--rule {text!r} was given; expected RULE=SEVERITY, such as near_unique_in_split=reject"
            )
        given[name] = severity
    return {**(in_file or {}), "rules": given}


def methods_of(
    names: list[str] | None, params: list[str] | None, in_file: list[dict[str, Any]] | None
) -> list[dict[str, Any]] | None:
    """The methods named, each with its parameters; None when neither is given."""
    from al_models.registry import METHODS
    from flows.runs.runfile import RunFileError

    if not names and not params:
        return None
    runs = [{"name": name, "params": {}} for name in names] if names else in_file
    runs = runs or [{"name": name, "params": {}} for name in METHODS]
    for text in params or []:
        target, equals, value = text.partition("=")
        method, dot, option = target.partition(".")
        chosen = [run for run in runs if run["name"] == method]
        if not (equals and dot and chosen):
            raise RunFileError(f"--param {text!r} was given; expected METHOD.OPTION=VALUE of a method that is run")
        for run in chosen:
            run["params"][option] = _json_or_text(value)
    return runs


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
