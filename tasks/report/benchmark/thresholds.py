"""Asked against realised: what each calibrated threshold promised, and what it did to the test images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.records import RunRecord


@dataclass(frozen=True)
class Promise:
    """One threshold of a cell, for one asked rate."""

    level: Literal["image", "pixel"]
    facts: Mapping[str, Any]
    """As in the record: rate, value, n, smallest_rate, note, and rates with their intervals as far as known."""
    decides: bool
    """Whether it is the one that the cell's decisions are made with."""

    @property
    def above(self) -> bool:
        """Whether it rejected more good images than chance explains when the promise holds."""
        return above_expected(self.facts, self.facts)


def above_expected(promise: Mapping[str, Any], did: Mapping[str, Any]) -> bool:
    """Whether the realised false-reject rate lies above the interval it was expected in.

    Records of earlier versions have no such interval; there, whether the rate's own interval lies above what was asked.
    """
    rate, expected, own = (
        did.get("false_reject_rate"),
        promise.get("expected_interval"),
        did.get("false_reject_interval"),
    )
    if rate is None:
        return False
    if expected:
        return bool(rate > expected[1])
    asked = promise.get("rate")
    return bool(own and asked is not None and own[0] > asked)


def deciding(record: RunRecord) -> Promise | None:
    """The image threshold that decides, with what it did; None when the cell has no calibration."""
    image = record.calibration.get("image")
    if not image:
        return None
    return Promise("image", {**image, **(record.calibration.get("realised") or {})}, True)


def promises(record: RunRecord) -> list[Promise]:
    """All thresholds of a cell: by level, the lowest rate first. Without `rates` only those that decide."""
    calibration = record.calibration
    asked = (calibration.get("image") or {}).get("rate")
    reported = [
        Promise(level, one[level], one["rate"] == asked)
        for level in ("image", "pixel")
        for one in calibration.get("rates") or []
        if one.get(level)
    ]
    if reported:
        return reported
    pixel = calibration.get("pixel")
    return [one for one in (deciding(record), Promise("pixel", pixel, True) if pixel else None) if one is not None]
