"""What the pages of the report share: templates in which no name breaks out."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tasks.compare.tables import percent


@cache
def environment() -> Environment:
    """The templates of this package, compiled once; whatever they print of data is escaped."""
    templates = Environment(
        loader=PackageLoader("tasks", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    templates.filters.update(percent=percent)
    return templates


def _visible(value: Any) -> Any:
    """Text with its invisible characters written out: a file name that holds a line break, NUL or a mark that turns
    the direction of writing must not pass for another."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value)
