"""Seconds that two predictions take, measured in turns in one process: what else the machine does slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

_FEWEST, _MOST = 11, 41
"""Rounds."""
_ENOUGH_S, _TOO_MUCH_S = 1.0, 60.0
"""Seconds of measuring from which on no round is added to the fewest, and none to the first."""


def paces(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of the first and of the second, which take turns in who begins; both are called once before,
    unmeasured."""
    calls, seconds = (first, second), ([], [])  # type: tuple[Callable[[], object], ...], tuple[list[float], ...]
    for call in calls:
        call()
    began = time.perf_counter()
    for done in range(_MOST):
        spent = time.perf_counter() - began
        if done and spent > (_ENOUGH_S if done >= _FEWEST else _TOO_MUCH_S):
            break
        for which in (0, 1) if done % 2 else (1, 0):
            start = time.perf_counter()
            calls[which]()
            seconds[which].append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
