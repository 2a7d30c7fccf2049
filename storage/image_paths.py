"""The image files that a person means by files, folders, patterns and lists."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from storage.errors import DatasetError
from storage.listing import IMAGE_SUFFIXES, is_hidden, is_own_output
from storage.text import read_text


def image_paths(given: Sequence[str], leave_out: Path, *, may_be_none: bool = False) -> list[str]:
    """Absolute paths in the order given, each once; those of a folder or a pattern are sorted.

    `given`: files; folders, searched with all folders in them; patterns (`parts/**/*.png`); `@list.txt`, a path a
    line. Of a folder or a pattern only what has an image's extension counts, hidden files do not, and nothing below
    `leave_out`, the folder of the results. Links are followed. Raises DatasetError for anything that is not there,
    and, unless there `may_be_none` yet, for what holds no image.
    """
    return look_for_images(given, leave_out, may_be_none=may_be_none)[0]


def look_for_images(
    given: Sequence[str], leave_out: Path, *, may_be_none: bool = False
) -> tuple[list[str], dict[str, str]]:
    """The paths as `image_paths` gives them, and what folders and patterns leave out: path -> the reason."""
    images: dict[str, None] = {}
    left_out: dict[str, str] = {}
    results = f"{leave_out.resolve()}{os.sep}"
    for text in _with_lists(given, may_be_none):
        places = [path for path in _meant(text) if not os.path.realpath(path).startswith(results)]
        reasons = {path: None if os.path.isfile(text) else _why_left_out(path) for path in places}
        left_out |= {os.path.abspath(path): reason for path, reason in reasons.items() if reason}
        paths = [os.path.abspath(path) for path, reason in reasons.items() if not reason]
        if not paths and not may_be_none:
            raise DatasetError(f"{text!r} holds no image; images end in {', '.join(IMAGE_SUFFIXES)}")
        images.update(dict.fromkeys(paths))
    return list(images), {path: reason for path, reason in left_out.items() if path not in images}


def _why_left_out(path: str) -> str | None:
    if os.path.isdir(path):
        return "pictures that this program made; give files in it by name if they are meant"
    if not path.lower().endswith(IMAGE_SUFFIXES):
        return f"no image's extension, which are {', '.join(IMAGE_SUFFIXES)}; convert or rename it if it is an image"
    return None if os.path.isfile(path) else "missing, a broken link or no regular file"


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
    """The files that a path or pattern means, of any kind, and the folders that are not entered."""
    if os.path.isdir(text):
        yield from _below(text, set())
    elif os.path.isfile(text):
        yield text
    elif glob.has_magic(text):
        matches = (path for path in sorted(glob.glob(text, recursive=True)) if not _is_system(path))
        for path in matches:
            own = next((str(place) for place in Path(path).parents if is_own_output(str(place))), None)
            if own or not os.path.isdir(path):
                yield own or path
    else:
        raise DatasetError(f"{text!r} is no file and no folder; give images, folders, patterns or @list.txt")


def _below(folder: str, seen: set[str]) -> Iterator[str]:
    """Files in a folder and all folders in it; a link back to a folder is followed once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read ({error.strerror}); see to its permissions") from error
    for path in (os.path.join(folder, name) for name in names):
        if os.path.isdir(path) and not is_own_output(path):
            yield from _below(path, seen)
        else:
            yield path


def _is_system(path: str) -> bool:
    name = os.path.basename(path)
    return is_hidden(name) and not name.startswith(".")
