"""The image files that a person means by files, folders, patterns and lists."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from storage.errors import DatasetError
from storage.listing import IMAGE_SUFFIXES
from storage.text import read_text


def image_paths(given: Sequence[str], leave_out: Path, *, may_be_none: bool = False) -> list[str]:
    """Absolute paths in the order given, each once; those of a folder or a pattern are sorted.

    `given`: files; folders, searched with all folders in them; patterns (`parts/**/*.png`); `@list.txt`, a path a
    line. Of a folder or a pattern only what has an image's extension counts, hidden files do not, and nothing below
    `leave_out`, the folder of the results. Links are followed. Raises DatasetError for anything that is not there,
    and, unless there `may_be_none` yet, for what holds no image.
    """
    found: dict[str, None] = {}
    results = f"{leave_out.resolve()}{os.sep}"
    for text in _with_lists(given, may_be_none):
        paths = [os.path.abspath(path) for path in _meant(text) if not os.path.realpath(path).startswith(results)]
        if not paths and not may_be_none:
            raise DatasetError(f"{text!r} holds no image; images end in {', '.join(IMAGE_SUFFIXES)}")
        found.update(dict.fromkeys(paths))
    return list(found)


def _with_lists(given: Sequence[str], may_be_none: bool) -> Iterator[str]:
    for text in given:
        if not text.startswith("@"):
            yield text
            continue
        try:
            lines = [line.strip() for line in read_text(Path(text[1:])).splitlines() if line.strip()]
        except (OSError, UnicodeError) as error:
            raise DatasetError(
                f"the list {text[1:]!r} cannot be read ({error}); give a text file, a path a line"
            ) from error
        if not lines and not may_be_none:
            raise DatasetError(f"the list {text[1:]!r} is empty; give a text file, a path a line")
        yield from lines


def _meant(text: str) -> Iterator[str]:
    if os.path.isdir(text):
        yield from _below(text, set())
    elif os.path.isfile(text):
        yield text
    elif glob.has_magic(text):
        yield from (path for path in sorted(glob.glob(text, recursive=True)) if _is_image(path))
    else:
        raise DatasetError(f"{text!r} is no file and no folder; give images, folders, patterns or @list.txt")


def _below(folder: str, seen: set[str]) -> Iterator[str]:
    """Image files in a folder and all folders in it; a link back to a folder is followed once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read ({error.strerror}); see to its permissions") from error
    for path in (os.path.join(folder, name) for name in names):
        if os.path.isdir(path):
            yield from _below(path, seen)
        elif _is_image(path):
            yield path


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path)
