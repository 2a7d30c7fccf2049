"""A big category is shared by workers in parts, and nobody can tell from the results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_runs import PADIM, figures, manifests, of_step, run_file, run_flow

import tasks.core.parts
from flows.runs.runfile import MethodRun
from storage.errors import NotInStore
from storage.stacks import Stack
from storage.store import Artifact, Store
from tasks.core.parts import joined, parts_of
from tasks.demo_data import make_demo_data

TRAINED = MethodRun(name="fastflow", params={"image_size": 64, "layers": [1, 2, 3], "flow_steps": 2, "epochs": 2})


@given(st.integers(0, 5000))
def test_each_image_is_in_one_part(images: int) -> None:
    rows = list(range(images))
    parts = parts_of(images)
    assert [row for part in parts for row in part.of(rows)] == (rows if parts else [])
    assert len(parts) != 1
    assert bool(parts) == (images > tasks.core.parts.PART)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, np.ndarray]:
    """A store with an array of 23 rows in one piece (`whole`) and in three (`a`, `b`, `c`)."""
    store = Store(str(tmp_path_factory.mktemp("pieces")))
    values = np.arange(23 * 6, dtype=np.float16).reshape(23, 2, 3)
    for name, rows in {"whole": values, "a": values[:8], "b": values[8:16], "c": values[16:]}.items():
        with store.draft(name) as draft:
            array = store.create_array(f"{draft.folder}/maps", rows.shape, "float16", chunk=4)
            array[:] = rows
            draft.commit(
                {"ids": [f"{name}{i}" for i in range(len(rows))], "seconds": 1.25, "peak_memory_mb": len(rows)}
            )
    with store.draft("none") as draft:
        draft.commit({"ids": [], "seconds": 1.0, "peak_memory_mb": 2.0})
    return store, values


@given(rows=st.lists(st.integers(0, 22), max_size=30))
def test_rows_are_read_alike_from_one_piece_and_from_parts(pieces: tuple[Store, np.ndarray], rows: list[int]) -> None:
    store, values = pieces
    split = Artifact("split", "nowhere", joined(store, ["a", "b", "none", "c"]))
    for found in (store.get("whole"), split):
        stack = Stack.open(store, found, "maps")
        assert stack.shape == values.shape
        assert stack.chunk == 4
        np.testing.assert_array_equal(stack.read(rows), values[rows])


def test_an_output_in_parts_says_what_all_of_them_cost(pieces: tuple[Store, np.ndarray]) -> None:
    store, _ = pieces
    found = joined(store, ["a", "b", "none", "c"])
    assert (found["seconds"], found["peak_memory_mb"]) == (4.75, 8)
    assert found["ids"] == [f"{name}{i}" for name, rows in (("a", 8), ("b", 8), ("c", 7)) for i in range(rows)]
    assert [rows for _, rows in found["parts"]] == [8, 8, 7]


def test_an_array_that_is_gone_is_named(pieces: tuple[Store, np.ndarray]) -> None:
    store, _ = pieces
    with pytest.raises(NotInStore, match=r"an array masks of whole is not in .*; delete that folder and run again"):
        Stack.open(store, store.get("whole"), "masks")


@pytest.mark.usefixtures("api")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_parts_give_the_same_bits_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    make_demo_data(data, train=34, validation=3, good=19, defects_per_type=4, size=64)
    whole = run_flow(run_file(tmp_path / "whole", data, PADIM, TRAINED))

    monkeypatch.setattr(tasks.core.parts, "PART", 16)
    split = run_flow(run_file(tmp_path / "split", data, PADIM, TRAINED), "dask", workers=2)
    assert split.state.is_completed()
    assert "Dask at http://127.0.0.1:" in capsys.readouterr().err
    assert [figures(record) for record in split.outcome.records] == [figures(r) for r in whole.outcome.records]
    assert [record.intervals for record in split.outcome.records] == [r.intervals for r in whole.outcome.records]
    images, test = sum(split.outcome.records[0].counts[name] for name in ("train", "calibration")), 19 + 16
    n_parts = -(-(images + test) // 16)
    made = {step: len(of_step(split.store, step)) for step in ("features", "maps", "counts", "suspects")}
    assert made == {"features": n_parts + 1, "maps": 8, "counts": 6, "suspects": 1}

    for ended in (whole, split):
        record = ended.by_method["padim"]
        maps = Stack.open(ended.store, ended.store.get(record.keys["maps"]), "maps")
        masks = Stack.open(ended.store, ended.store.get(record.keys["evaluation"]), "masks")
        assert maps.shape == masks.shape == (test, 64, 64)
        assert masks.read(range(test)).any(axis=(1, 2)).sum() == 16
    assert split.page.count("data:image/") == whole.page.count("data:image/") > 4

    finished = manifests(split.store)
    monkeypatch.setattr(Store, "draft", lambda _, key: pytest.fail(f"{key} is computed again"))
    again = run_flow(run_file(tmp_path / "split", data, PADIM, TRAINED))
    assert again.outcome.records == split.outcome.records
    assert manifests(split.store) == finished
