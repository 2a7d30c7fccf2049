"""What the survey prints: figures of other people, on all data, with other backbones and hardware."""

from __future__ import annotations

import csv
import io
from functools import cache
from importlib.resources import files

PUBLISHED_DATASET = "mvtec_ad"


@cache
def published(metric: str) -> dict[str, dict[str, float]]:
    """Method -> category (and `mean`) -> per cent, as the survey prints them; empty for metrics it does not print."""
    if metric not in ("pixel_auroc", "pro"):
        return {}
    figures: dict[str, dict[str, float]] = {}
    for row in _survey(f"{metric}.csv"):
        skipped = ("method", "family", "title", "survey_ref")
        figures[row["method"]] = {name: float(value) for name, value in row.items() if value and name not in skipped}
    return figures


@cache
def published_speed() -> dict[str, str]:
    """Method -> images a second as the survey's Table 13 prints it, with the backbone where it names one."""
    return {r["method"]: r["fps"] + (f" with {r['backbone']}" if r["backbone"] else "") for r in _survey("speed.csv")}


@cache
def _survey(name: str) -> list[dict[str, str]]:
    text = files("tasks.report.survey").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))
