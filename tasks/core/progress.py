"""Who hears how far a step has come: the log now and then, and a terminal that listens in the same process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Listener = Callable[[str, int, int | None], None]
"""(what is done, units done, of so many; None: not known)."""

_SAY_EVERY_S = 10.0
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A block in which the listener hears of all steps that run in this process, from whatever thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Progress:
    """Tells of one step's progress."""

    def __init__(self, name: str) -> None:
        """`name`: the step, for people, such as `hash mvtec_ad`."""
        self.name, self.last = name, time.monotonic()

    def __call__(self, what: str, done: int, of: int | None) -> None:
        """So much of `what` is done; `what` may be empty."""
        title = f"{self.name}: {what}" if what else self.name
        for listener in _listeners:
            listener(title, done, of)
        if time.monotonic() - self.last >= _SAY_EVERY_S:
            self.last = time.monotonic()
            logger.info("%s, %d of %s", title, done, of)
