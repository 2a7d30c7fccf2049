"""What the pages of the report share: templates in which no name breaks out, and files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tasks.compare.tables import percent


@cache
def environment() -> Environment:
    """The templates of this package, compiled once; whatever they print of data is escaped."""
    found = Environment(
        loader=PackageLoader("tasks", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    found.filters.update(percent=percent)
    return found


def _visible(value: Any) -> Any:
    """Text with its invisible characters written out: a file name that holds a line break, NUL or a mark that turns
    the direction of writing must not pass for another."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value)


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
