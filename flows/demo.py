"""What `al demo` runs: the main job on data made on the spot, sized for two cores and two minutes."""

from __future__ import annotations

from pathlib import Path

from flows.runs.runfile import DataSource, MethodRun, RunFile
from flows.runs.search import SearchRun


def demo_run(store: str, report: str) -> RunFile:
    """The demo as an ordinary run; its images are made beside its store."""
    return RunFile(
        data=[DataSource(dataset="demo", root=str(Path(store).parent / "data"))],
        methods=[
            MethodRun(name="padim"),
            MethodRun(name="patchcore", params={"coreset_ratio": 0.05}),
            MethodRun(name="spade", params={"layers": [2, 3], "neighbours": 10}),
        ],
        store=store,
        report=report,
    )


def demo_search(store: str, report: str) -> RunFile:
    """A search on one texture of the demo, for the form in the Prefect UI."""
    run = demo_run(store, report)
    tried = SearchRun(method="padim", params={"channels": [25, 50, 100], "sigma": [2.0, 4.0]})
    data = [run.data[0].model_copy(update={"categories": ["brick"]})]
    return run.model_copy(update={"data": data, "methods": [MethodRun(name="padim")], "search": [tried]})
