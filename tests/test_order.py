"""The order of a cell's steps is written once: what is run is what is looked for, and what is planned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE
from sweep_runs import PADIM, of_step, run_file, run_flow

from flows import order
from flows.plan import plan
from flows.runs.runfile import DataSource, MethodRun, NightlyRun, RunFile
from flows.sweep import Sweep
from storage.store import Store
from tasks.core.handles import Category, Cell, Validated
from tasks.core.policy import Policy
from tasks.core.steps import run_step, step_key
from tasks.demo_data import make_demo_data

REJECTS = Policy(rules={"suspected_defect": "reject"})
OWN = ["fit", "calibrate", "predict part", "predict", "count part", "evaluate"]


class Noted(order.Doing):
    """What is done with the steps is to note them; each gives its name and the number of its call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __call__(self, of: Any, step: Any, *args: Any) -> Any:
        self.calls.append((step.name, args))
        return f"{step.name} {len(self.calls)}"

    def parts(self, of: Any, step: Any, *args: Any) -> Any:
        return [self(of, step, *args)]


@pytest.mark.parametrize(
    ("method", "policy", "screened", "before"),
    [
        ("padim", Policy(), False, ["prepare", "validate", "extract part", "extract"]),
        ("ae_ssim", Policy(), False, ["prepare", "validate"]),
        ("padim", REJECTS, False, ["prepare", "validate", *2 * ["extract part", "extract"], "suspect"]),
        ("ae_ssim", REJECTS, True, ["prepare", "validate", "extract part", "extract", "suspect", "screen"]),
        ("padim", Policy(), True, ["prepare", "validate", "extract part", "extract", "screen"]),
    ],
)
def test_steps_follow_each_other_and_read_what_was_accepted_last(
    method: str, policy: Policy, screened: bool, before: list[str]
) -> None:
    data = [DataSource(dataset="parts", root="data")]
    night = NightlyRun(data=data, method=MethodRun(name=method), validation=policy).as_benchmark()
    run = night if screened else RunFile(data=data, validation=policy)
    noted = Noted()
    category = Category("store", "parts", "grid", "data", "listing", "print")
    order.record_of_cell(noted, run, category, Cell("parts", "grid", method))
    assert [name for name, _ in noted.calls] == [*before, *OWN]
    accepted = f"{before[-1]} {len(before)}" if before[-1] in ("suspect", "screen") else "validate 2"
    for name, args in noted.calls[len(before) :]:
        assert args[1] == accepted, name
    assert all(args[0] == "validate 2" for name, args in noted.calls if name in ("extract", "suspect"))


def test_what_is_done_without_suspects_is_found_again_and_planned_as_done(api: str, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "data", train=30, validation=4, good=3, defects_per_type=1, size=64)
    chart = (np.indices((64, 64)).sum(0) // 4 % 2 * 255).astype(np.uint8)
    Image.fromarray(np.stack([chart] * 3, 2)).save(tmp_path / "data" / "brick" / "train" / "good" / "chart.png")
    run = run_file(tmp_path / "store", tmp_path / "data", PADIM).model_copy(update={"validation": REJECTS})
    (before,) = plan(run).cells
    assert before.left == ("prepare", "validate", "extract", "suspect", "fit", "calibrate", "predict", "evaluate")
    (record,) = run_flow(run).outcome.records
    assert (record.status, record.counts["set_aside"]) == ("done", 1)
    (after,) = plan(run).cells
    assert after.left == ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "_start", lambda *_: pytest.fail("steps were sent for a cell that is done"))
        assert run_flow(run).outcome.records == [record]
    shutil.rmtree(tmp_path / "store" / "features")
    (gone,) = plan(run).cells
    assert gone.left == ("extract", "evaluate"), "what is gone is made again, and nothing that is there"


@task(name="weigh", cache_policy=NO_CACHE)
def weigh(cell: Cell, validated: Validated) -> str:
    """A step more."""
    key = step_key("weights", cell.dataset, cell.category, data=validated.fingerprint)
    run_step(Store(validated.category.store), key, lambda draft: {})
    return key


def test_a_step_more_is_one_edit(api: str, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, without = run_file(tmp_path / "store", demo_root, PADIM), order.record_of_cell
    run_flow(run)

    def with_one_more(do: order.Doing, run: RunFile, category: Category, cell: Cell) -> Any:
        images, _ = order.inputs_of_cell(do, run, category, cell)
        do("train", weigh, cell, images)
        return without(do, run, category, cell)

    monkeypatch.setattr(order, "record_of_cell", with_one_more)
    assert [cell.left for cell in plan(run).cells] == [("weigh",)]
    assert run_flow(run).state.is_completed()
    assert len(of_step(Store(run.store), "weights")) == 1
    assert [cell.left for cell in plan(run).cells] == [()]
