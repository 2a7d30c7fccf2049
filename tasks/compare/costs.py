"""Seconds of computing: by step, and how much of it went into judging."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from storage.records import RunRecord
from tasks.compare.tables import STEPS

_OUTPUTS = {
    "ingest": "catalogue",
    "prepare": "images",
    "validate": "verdict",
    "extract": "features",
    "fit": "model",
    "calibrate": "calibration",
    "predict": "maps",
    "evaluate": "evaluation",
}
"""Step -> under which name a record keeps the key of its output."""


def steps_of(records: Iterable[RunRecord]) -> list[str]:
    """Steps that took time, in their order."""
    steps = {step for record in records for step in record.seconds}
    return [step for step in STEPS if step in steps] + sorted(steps - set(STEPS))


def evaluation_share(records: Sequence[RunRecord]) -> float | None:
    """Share of the seconds of all steps that evaluation took, in 0..1; None where nothing is known of either.

    An output that several cells share counts once.
    """
    seconds: dict[tuple[str, str], float] = {}
    for record in records:
        for step, took in record.seconds.items():
            output = record.keys.get(_OUTPUTS.get(step, ""), f"of cell {record.cell}")
            seconds[step, output] = took
    total = sum(seconds.values())
    judging = [took for (step, _), took in seconds.items() if step == "evaluate"]
    return sum(judging) / total if judging and total > 0 else None
