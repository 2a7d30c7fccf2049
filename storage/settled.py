"""Files that have been written to their end, as far as one can see."""

from __future__ import annotations

import os
from collections.abc import Sequence


class Settled:
    """Files by size and time of change: one whose two last looks agree has settled, and is given once."""

    def __init__(self) -> None:
        """Nothing has been seen yet."""
        self._seen: dict[str, tuple[int, int, bool]] = {}
        """Path -> size, time of change in ns, whether it was given."""

    def look(self, paths: Sequence[str]) -> list[str]:
        """Those of the present files that have settled since the last look; a file that changes is given again."""
        before, self._seen = self._seen, {}
        settled = []
        for path in paths:
            try:
                now = os.stat(path)
            except OSError:  # gone since it was listed
                continue
            state = (now.st_size, now.st_mtime_ns)
            *earlier, given = before.get(path, (-1, -1, False))
            same = tuple(earlier) == state
            if same and not given:
                settled.append(path)
            self._seen[path] = (*state, same)
        return settled
