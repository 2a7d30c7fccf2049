"""Keep a cell that failed as a record with its reason: the others go on, and the report shows it."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from storage.records import RunRecord, write_record
from storage.store import Store
from tasks.core.handles import Cell

logger = logging.getLogger(__name__)


def record_failure(store_url: str, cell: Cell, step: str, error: BaseException) -> RunRecord:
    """Write and return the failed record; the reason is `<step>: <message>`."""
    message = str(error).strip() or type(error).__name__
    record = RunRecord(
        dataset=cell.dataset,
        category=cell.category,
        method=cell.method,
        params=_params(cell),
        seed=cell.seed,
        cell=cell.id,
        status="failed",
        reason=f"{step}: {message}",
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        write_record(Store(store_url), record)
    except OSError as problem:  # a full disk costs cells, and not the run
        logger.error("%s failed (%s), and the store could not keep that: %s", cell.name, record.reason, problem)
    return record


def _params(cell: Cell) -> dict[str, object]:
    """All parameters where the detector can be made, else those that were given."""
    from tasks.core.compute import detector_of

    try:
        return detector_of(cell).params()
    except Exception:
        return dict(cell.params)
