"""Run records: kept whole, replaced whole, and refused when they would not be read again."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from storage.errors import Damaged, NotStorable
from storage.records import RunRecord, read_record, read_records, write_record
from storage.store import Store

RECORD = RunRecord(
    dataset="mvtec_ad",
    category="grid",
    method="padim",
    params={"channels": 100, "layers": [1, 2, 3], "weights": None},
    seed=0,
    cell="0123456789abcdef",
    status="done",
    metrics={"image_auroc": 1 / 3, "pro": 0.9},
    calibration={"image": {"threshold": 1.5, "asked": 0.05}},
    counts={"train": 200},
    seconds={"fit": 0.25},
    peak_memory_mb=812.5,
    fingerprints={"data": "ab"},
    keys={"maps": "maps/mvtec_ad/grid/ab"},
    versions={"torch": "2.9.0"},
    hardware="2 cores",
    finished="2026-01-02T03:04:05+00:00",
)


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return Store(str(tmp_path / "store"))


def test_a_record_comes_back_as_written(store: Store) -> None:
    write_record(store, RECORD)
    assert list(read_records(store)) == [RECORD]
    assert read_record(store, RECORD.key()) == RECORD


def test_a_store_without_records_has_none(store: Store) -> None:
    assert list(read_records(store)) == []
    assert read_record(store, RECORD.key()) is None


def test_a_cell_run_again_replaces_its_record(store: Store) -> None:
    write_record(store, replace(RECORD, status="failed", reason="fit: out of memory", metrics={}))
    write_record(store, RECORD)
    assert list(read_records(store)) == [RECORD]


def test_records_come_by_data_set_category_and_method(store: Store) -> None:
    wanted = [
        replace(RECORD, dataset=dataset, category=category, method=method)
        for dataset in ("a", "b")
        for category in ("grid", "tile [2]")
        for method in ("padim", "spade")
    ]
    for record in reversed(wanted):
        write_record(store, record)
    assert list(read_records(store)) == wanted


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_no_number_is_refused_by_name(store: Store, value: float) -> None:
    write_record(store, RECORD)
    bad = replace(RECORD, metrics={"image_auroc": 0.5, "pixel_auroc": value})
    problem = rf"records/mvtec_ad/grid/padim/0123456789abcdef\.json .*: metrics\.pixel_auroc is {value}; .*leave out"
    with pytest.raises(NotStorable, match=problem):
        write_record(store, bad)
    assert list(read_records(store)) == [RECORD]


def test_an_array_in_a_record_is_refused(store: Store) -> None:
    with pytest.raises(NotStorable, match=r"padim/0123456789abcdef\.json .* ndarray is not JSON serializable"):
        write_record(store, replace(RECORD, params={"mean": np.zeros(3)}))
    assert store.list("") == []


def test_a_record_of_a_later_version_is_read_without_what_is_unknown(store: Store) -> None:
    store.write_json(RECORD.key(), asdict(RECORD) | {"carbon_g": 3.0})
    assert list(read_records(store)) == [RECORD]


def test_a_record_of_an_earlier_version_is_read_with_defaults(store: Store) -> None:
    values = {k: v for k, v in asdict(RECORD).items() if k not in ("versions", "hardware", "keys")}
    store.write_json(RECORD.key(), values)
    assert list(read_records(store)) == [replace(RECORD, versions={}, hardware="", keys={})]


@pytest.mark.parametrize("data", [b"", b'{"dataset": "a"', b'{"dataset": "a"}', b"[]", b"null", b"\xff\xfe\x00"])
def test_a_file_that_is_no_record_is_damaged_and_named(store: Store, data: bytes) -> None:
    write_record(store, RECORD)
    store.write_bytes("records/mvtec_ad/grid/spade/ab.json", data)
    with pytest.raises(Damaged, match=r"records/mvtec_ad/grid/spade/ab\.json .*; delete .* again"):
        list(read_records(store))


def test_other_files_among_the_records_are_left_alone(store: Store) -> None:
    write_record(store, RECORD)
    store.write_bytes("records/.DS_Store", b"\x00")
    store.write_bytes(f"{RECORD.key()}.0123456789abcdef.partial", b'{"data')
    assert list(read_records(store)) == [RECORD]
