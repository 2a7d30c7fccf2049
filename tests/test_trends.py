"""The charts of the morning page, from decisions alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import tasks.report.nights.report
from storage.nights import Decision, Looks, read_decisions, write_decision
from storage.store import Store
from tasks.report.nights.report import nights_report
from tasks.report.nights.trends import trends_of

METRICS = [("pro", "PRO")]
BEFORE = {"score": [1.0, 2.0, 3.0], "brightness": [99.0, 100.0, 101.0]}


def night(day: int, looks: Looks | None, p_value: float | None = None) -> Decision:
    """A night of June."""
    drift = [] if p_value is None else [{"statistic": "brightness", "adjusted": p_value, "changed": p_value <= 0.01}]
    drift = [one | {"before": 100.0, "now": 60.0} for one in drift]
    at = f"2026-06-{day:02d}T02:00:00+00:00"
    return Decision("plant", "a", at, "promoted", "why", 1, metrics={"pro": 0.9}, drift=drift, looks=looks)


def seen(n: int, rejected: int, brightness: float) -> Looks:
    """What new images look like."""
    now = {"score": [2.0, 2.5, 3.0], "brightness": [brightness - 1, brightness, brightness + 1]}
    return Looks(n, rejected, 0.05, 0.01, 4.0, BEFORE, now)


NIGHTS = [night(1, None), night(2, seen(1, 0, 100.0)), night(3, None), night(4, seen(9, 2, 60.0), 1e-4)]


def test_each_chart_shows_its_nights_beside_what_is_expected() -> None:
    charts = {chart.title: chart for chart in trends_of(NIGHTS, METRICS)}
    assert list(charts) == [
        "The model in use", "Drift", "Scores of the new images", "New good images rejected", "Their brightness",
    ]  # fmt: skip
    lines = {title: {line.name: line.points for line in chart.lines} for title, chart in charts.items()}
    assert lines["The model in use"] == {"PRO": [(at, 90.0) for at in range(4)]}
    assert lines["Drift"] == {"drift": [(3, 4.0)], "alarm": [(1, 2.0), (3, 2.0)]}
    assert lines["Scores of the new images"]["threshold"] == [(1, 4.0), (3, 4.0)]
    assert lines["New good images rejected"] == {
        "that night": [(1, 0.0), (3, 100 * 2 / 9)],
        "all nights up to it": [(1, 0.0), (3, 20.0)],
        "promised": [(1, 5.0), (3, 5.0)],
    }
    assert lines["Their brightness"] == {
        "new images": [(1, 100.0), (3, 60.0)],
        "held-out images": [(1, 100.0), (3, 100.0)],
    }
    assert charts["Their brightness"].band == [(1, 99.0, 101.0), (3, 59.0, 61.0)]
    assert charts["Their brightness"].low < 59
    assert all(chart.last == 3 for chart in charts.values())


def test_nights_without_new_images_have_no_chart_of_them() -> None:
    assert [chart.title for chart in trends_of([night(1, None)], METRICS)] == ["The model in use"]
    assert trends_of([night(1, None)], []) == []


def test_a_decision_is_read_as_it_was_written_and_its_charts_are_on_the_page(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for one in NIGHTS:
        write_decision(store, one)
    assert list(read_decisions(store, "plant/a")) == NIGHTS
    page = Path(nights_report(store.url, str(tmp_path / "report"))).read_text(encoding="utf-8")
    assert page.count('<path class="band"') == 2
    assert "Their brightness: new images 100 to 60; held-out images 100 to 100" in page


def test_the_page_has_every_model_of_the_store_the_latest_night_first(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for model, days in (("a", [1, 2]), ("b", [1, 3]), ("c", [3])):
        for day in days:
            write_decision(store, replace(night(day, None), category=model))
    store.write_json("nights/plant/c/damaged.json", [])
    page = Path(nights_report(store.url, str(tmp_path / "report"))).read_text(encoding="utf-8")
    assert re.findall(r"<h2 id=.*>(.*)</h2>", page) == ["plant/b", "plant/c", "plant/a"]
    assert re.findall("in the night of (.*) UTC<", page) == ["2026-06-02 02:00"], "b and c are of the latest"
    assert page.count("damaged.json is no decision of a night") == 1


def test_of_many_models_the_page_shows_fewer_nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.report.nights.report, "_IN_ALL", 20)
    store = Store(str(tmp_path))
    for model in ("a", "b"):
        for day in range(1, 13):
            write_decision(store, replace(night(day, None), category=model))
    page = Path(nights_report(store.url, str(tmp_path / "report"))).read_text(encoding="utf-8")
    assert sorted(set(re.findall("2026-06-([0-9]+) ", page))) == [f"{day:02d}" for day in range(3, 13)]


def test_what_validation_set_aside_is_an_alarm_once() -> None:
    told = replace(NIGHTS[0], counts={"newly_set_aside": 2}, aside={"readable": 1, "suspected_defect": 3})
    assert told.alarms == ["set aside: 2 more images than before (in all: readable 1, suspected_defect 3)"]
    assert replace(told, counts={"newly_set_aside": 0}).alarms == []
