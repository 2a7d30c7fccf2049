"""What tests of whole runs share: two quick methods, the flow run to its end, and what it left in the store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from flows.benchmark import BenchmarkOutcome, benchmark
from flows.runs.runfile import DataSource, MethodRun, RunFile
from flows.where.runners import runner_for
from storage.records import RunRecord
from storage.store import Store

PADIM = MethodRun(name="padim", params={"image_size": 64, "channels": 10})
PATCHCORE = MethodRun(name="patchcore", params={"image_size": 64, "coreset_ratio": 0.05})


@dataclass(frozen=True)
class Ended:
    """A run of the flow and its store."""

    state: State[BenchmarkOutcome]
    outcome: BenchmarkOutcome
    store: Store

    @property
    def by_method(self) -> dict[str, RunRecord]:
        """The records of a run on one category."""
        return {record.method: record for record in self.outcome.records}

    @property
    def page(self) -> str:
        """The report."""
        return Path(self.outcome.report).read_text(encoding="utf-8")


def run_file(store: Path, data: Path, *methods: MethodRun, categories: tuple[str, ...] = ("brick",)) -> RunFile:
    """Methods on categories of the demo data."""
    source = DataSource(dataset="mvtec_ad", root=str(data), categories=list(categories))
    return RunFile(data=[source], methods=list(methods), store=str(store), report=str(store) + "-report")


def run_flow(run: RunFile, runner: str = "threads", workers: int | None = 1) -> Ended:
    """Run the flow in this process."""
    run = run.model_copy(update={"runner": runner, "workers": workers})
    state = benchmark.with_options(task_runner=runner_for(run))(run, return_state=True)
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    return Ended(state, outcome, Store(run.store))


def manifests(store: Store) -> dict[str, tuple[int, str]]:
    """Every finished output: when its manifest was written, and the folder it names."""
    paths = Path(store.path("")).rglob("manifest.json")
    return {str(path): (path.stat().st_mtime_ns, json.loads(path.read_text())["folder"]) for path in paths}


def of_step(store: Store, step: str) -> dict[str, tuple[int, str]]:
    """The finished outputs of one step."""
    return {path: found for path, found in manifests(store).items() if f"/{step}/" in path}


def record_files(store: Store) -> dict[str, tuple[int, bytes]]:
    """Every record: when it was written, and its bytes."""
    paths = Path(store.path("records")).rglob("*.json")
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def figures(record: RunRecord) -> dict[str, Any]:
    """All of a record that does not depend on the clock and the machine's load."""
    kept = ("cell", "status", "reason", "metrics", "calibration", "counts", "fingerprints", "keys", "params")
    return {name: getattr(record, name) for name in kept}
