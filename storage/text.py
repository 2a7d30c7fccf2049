"""Text files that people write by hand, with whatever editor."""

from __future__ import annotations

import codecs
from pathlib import Path

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""What editors on Windows begin a file with, and what that says of the rest."""


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or in what its byte-order mark says. Raises OSError, or UnicodeError whose message
    says how to save it."""
    data = file.read_bytes()
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in data:  # a zero in each second byte, and no mark
        raise UnicodeError("it is not in UTF-8 but perhaps in UTF-16; save the file as UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UnicodeError(f"line {line} is not in UTF-8 ({error.reason}); save the file as UTF-8") from error
