"""A file of JSON lines that grows: each line is whole, on disk before the next step, and there once.

One process writes it at a time. A process that is killed leaves at most a line that is cut short, and always the last;
the next one drops it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from filelock import FileLock, Timeout

from storage.errors import Damaged, InUse


class Journal:
    """The lines of a file; to be entered by the process that adds to them."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened yet, and the file need not be there."""
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def __enter__(self) -> Self:
        """Lock the file and drop a last line that is cut short. Raises InUse when another process has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InUse(f"another process writes to {self.path.parent}; wait for it, or give another folder") from error
        with self.path.open("ab+") as file:
            file.truncate(_whole(file))
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines; they are on disk when this returns."""
        with self.path.open("ab") as file:
            file.write("".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All lines in the order in which they were added; one in memory at a time. Raises Damaged."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield dict(json.loads(line))
                except ValueError as error:
                    raise Damaged(
                        f"line {number} of {self.path} is not JSON ({error}); remove it, and what it was about is "
                        "judged again"
                    ) from error


def _whole(file: IO[bytes]) -> int:
    """The number of bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65_536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
