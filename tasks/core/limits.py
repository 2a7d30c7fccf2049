"""Steps that fail to end, or need more memory than there is.

A library that hangs cannot be interrupted. On a Dask worker the process is ended: Dask starts another, and the step
once more, which finds the mark that the first left behind and fails for good. In threads of one process nothing of the
kind can be done.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from storage.errors import NotInStore
from storage.store import Store

logger = logging.getLogger(__name__)

_GRACE_S = 20.0
"""Between leaving a mark and ending without one, for a library that hangs with the interpreter's lock."""
_Made = TypeVar("_Made")
_allowed: list[float] = []


class StepTimedOut(TimeoutError):
    """A step that did not end in time."""


@contextmanager
def ending(store: Store, key: str) -> Iterator[None]:
    """A block that ends in the time that a step has, or the worker's process ends. Raises StepTimedOut where that has
    happened to this output before; a later run may try again."""
    seconds = time_of_a_step()
    if seconds is None or not _on_worker():
        yield
        return
    mark = f"hung/{key}.json"
    if _take_away(store, mark):
        raise StepTimedOut(f"did not end within the {seconds / 60:g} minutes that `step_minutes` allows")

    def end_process() -> None:
        logger.error("%s hangs; this worker ends", key)
        store.write_json(mark, {"process": os.getpid(), "seconds": seconds})
        os._exit(1)

    timer = threading.Timer(seconds, end_process)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + _GRACE_S, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def allow(seconds: float | None) -> None:
    """Steps of this process may take so long; None: as long as they like."""
    _allowed[:] = [] if seconds is None else [seconds]


def time_of_a_step() -> float | None:
    """Seconds that a step of this process has; None: no limit."""
    return _allowed[0] if _allowed else None


def _on_worker() -> bool:
    """Whether this is a process of a Dask cluster, which is replaced when it ends."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return False
    try:
        return bool(distributed.get_worker().nanny)
    except ValueError:
        return False


def _take_away(store: Store, mark: str) -> bool:
    try:
        store.read_bytes(mark)
    except NotInStore:
        return False
    store.delete(mark)
    return True


def in_memory(work: Callable[[int], _Made], batch_size: int) -> _Made:
    """The result of `work(batch_size)`; where memory ran out, of a second call with a quarter of it. Only reading is in
    batches here: what is learned or predicted does not depend on it but for rounding."""
    try:
        return work(batch_size)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error) or batch_size == 1:
            raise
        smaller = max(1, batch_size // 4)
        logger.warning("out of memory with batches of %d (%s); once more with %d", batch_size, error, smaller)
    _free()
    return work(smaller)


def _out_of_memory(error: Exception) -> bool:
    import torch

    said_by_cpu = "can't allocate memory" in str(error)  # torch has no class of its own for it
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or said_by_cpu


def _free() -> None:
    import gc

    import torch

    gc.collect()  # the failed attempt's tensors hang on its traceback
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
