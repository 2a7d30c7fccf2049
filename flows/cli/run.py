"""Commands that run a flow: demo, benchmark, search, nightly, ingest, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from flows.cli.options import checked, methods_of, policy, reader_options, source
from flows.cli.outcomes import show, show_search, tell
from flows.cli.terminal import StoreOption, check_writable, console, errors, run_flow, writing
from flows.where.store import opened

if TYPE_CHECKING:
    from flows.runs.runfile import IngestRun, Run, RunFile

ReportOption = Annotated[str, typer.Option(help="Folder the report is written to.")]

# Options that a run file has, too: left out, the file's value counts, and without one the default that is shown.
StoreInFile = Annotated[str | None, typer.Option(help="Folder or URL of the outputs.", show_default="al-store")]
ReportInFile = Annotated[str | None, typer.Option(help="Folder of the report.", show_default="al-report")]
DeviceInFile = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto")]
RunnerInFile = Annotated[str | None, typer.Option(help="threads, dask or tcp://SCHEDULER.", show_default="threads")]
WorkersInFile = Annotated[int | None, typer.Option(help="Steps at once, or Dask processes.")]
ThreadsInFile = Annotated[int | None, typer.Option(help="Cores that a step computes with.")]
RehashInFile = Annotated[bool | None, typer.Option("--rehash", help="Read every file again, changed or not.")]
CategoryOption = Annotated[list[str] | None, typer.Option(help="Only this category; may be repeated.")]
InspectOption = Annotated[str | None, typer.Option(help="Images to judge, for a plain folder of good images.")]
ReaderOption = Annotated[list[str] | None, typer.Option(help="NAME=VALUE, of the data set's reader.")]
RuleOption = Annotated[list[str] | None, typer.Option(help="RULE=SEVERITY: reject, warn, stop or off.")]


def demo(store: StoreOption = "al-demo/store", report: ReportOption = "al-demo/report") -> None:
    """Run the main job on a small data set made on the spot: textures with synthetic defects. About two minutes."""
    from flows.demo import demo_run

    _benchmark(demo_run(store=store, report=report))


def benchmark(
    run_file: Annotated[Path | None, typer.Argument(help="Run file (TOML); options given beside it win.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="DATASET=FOLDER, such as mvtec_ad=data/mvtec; folder:NAME=FOLDER names it.")
    ] = None,
    category: CategoryOption = None,
    inspect: InspectOption = None,
    option: ReaderOption = None,
    rule: RuleOption = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    param: Annotated[list[str] | None, typer.Option(help="METHOD.OPTION=VALUE, the value as JSON.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated; spread is reported.")] = None,
    store: StoreInFile = None,
    report: ReportInFile = None,
    device: DeviceInFile = None,
    false_reject_rate: Annotated[
        float | None, typer.Option(help="Share of good parts that the threshold may reject.", show_default="0.05")
    ] = None,
    runner: RunnerInFile = None,
    workers: WorkersInFile = None,
    threads: ThreadsInFile = None,
    rehash: RehashInFile = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be computed, and end.")] = False,
) -> None:
    """Compare methods on data sets: every method on every category, unless some are named."""
    from flows.runs.runfile import RunFile, read_run_file

    values = read_run_file(run_file).model_dump() if run_file else {}
    given = {
        "store": store,
        "report": report,
        "device": device,
        "false_reject_rate": false_reject_rate,
        "runner": runner,
        "workers": workers,
        "threads": threads,
        "rehash": rehash,
        "seeds": seed,
        "data": [source(text, category, reader_options(option, inspect)) for text in data] if data else None,
        "validation": policy(rule, values.get("validation")),
        "methods": methods_of(method, param, values.get("methods")),
    }
    values.update({name: value for name, value in given.items() if value is not None})
    if category and not data:
        values["data"] = [source | {"categories": category} for source in values.get("data", [])]
    run = checked(RunFile, values)
    run.check_no_search()
    if plan:
        _plan(run)
    else:
        _benchmark(run)


def search(
    run_file: Annotated[Path, typer.Argument(help="Run file (TOML) with a `search`; options given beside it win.")],
    store: StoreInFile = None,
    report: ReportInFile = None,
    device: DeviceInFile = None,
    runner: RunnerInFile = None,
    workers: WorkersInFile = None,
    threads: ThreadsInFile = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be tried, and end.")] = False,
) -> None:
    """Choose parameters of methods by synthetic defects in held-out good images; the test set chooses nothing."""
    from flows.runs.runfile import RunFile, read_run_file

    given = {"store": store, "report": report, "device": device, "runner": runner}
    given |= {"workers": workers, "threads": threads}
    values = read_run_file(run_file).model_dump()
    values.update({name: value for name, value in given.items() if value is not None})
    run = checked(RunFile, values)
    run.check_search()
    if plan:
        _plan(run)
        return
    outcome, failed = _run_flow("flows.search:search", run)
    show_search(outcome)
    if failed:
        sys.exit(1)


def nightly(
    run_file: Annotated[Path, typer.Argument(help="Run file (TOML) of a night; options given beside it win.")],
    store: StoreInFile = None,
    report: ReportInFile = None,
    device: DeviceInFile = None,
    runner: RunnerInFile = None,
    rehash: RehashInFile = None,
) -> None:
    """Refit each model on what is new and not rejected, prove it against the one in use, and promote it or not."""
    from flows.runs.runfile import NightlyRun, read_run_file

    given = {"store": store, "report": report, "device": device, "runner": runner, "rehash": rehash}
    values = read_run_file(run_file, NightlyRun).model_dump()
    values.update({name: value for name, value in given.items() if value is not None})
    outcome, failed = _run_flow("flows.nightly:nightly", checked(NightlyRun, values))
    if outcome.left is not None:
        console.print(outcome.left, highlight=False)
        return
    for decision in outcome.decisions:
        console.print(f"{decision.name}: {decision.outcome}, {decision.why}", soft_wrap=True, highlight=False)
        for told in decision.alarms:
            errors.print("[yellow]look at it:[/yellow]", escape(told), soft_wrap=True, highlight=False)
        for asked in decision.asks:
            errors.print("[yellow]decide:[/yellow]", escape(asked), soft_wrap=True, highlight=False)
    console.print(f"page: {outcome.report}", soft_wrap=True, highlight=False)
    if failed:
        sys.exit(1)


def ingest(
    name: Annotated[str, typer.Argument(help="Data set (see `al datasets`), or a run file (TOML).")],
    root: Annotated[str | None, typer.Option(help="Its folder.")] = None,
    category: CategoryOption = None,
    inspect: InspectOption = None,
    option: ReaderOption = None,
    rule: RuleOption = None,
    download: Annotated[bool | None, typer.Option("--download", help="Fetch it first, where that is offered.")] = None,
    data_docs: Annotated[
        bool | None, typer.Option(help="Build Great Expectations' own pages, too.", show_default="yes")
    ] = None,
    store: StoreInFile = None,
    report: ReportInFile = None,
    device: DeviceInFile = None,
    runner: RunnerInFile = None,
    rehash: RehashInFile = None,
) -> None:
    """Take a data set in and judge it: what is usable, what is wrong and why, on one page."""
    from flows.runs.runfile import IngestRun, RunFileError, read_run_file

    if name.endswith(".toml"):
        if root or option or inspect:
            raise RunFileError(
                f"{name} says where the data lie and how they are read; leave out --root, --option, --inspect"
            )
        values = read_run_file(Path(name), IngestRun).model_dump()
        if category:
            values["data"] = [source | {"categories": category} for source in values["data"]]
    elif root is None:
        raise RunFileError(f"where {name} lies was not given; use --root FOLDER")
    else:
        values = {"data": [source(f"{name}={root}", category, reader_options(option, inspect))]}
    given = {
        "store": store,
        "report": report,
        "device": device,
        "runner": runner,
        "rehash": rehash,
        "download": download,
        "data_docs": data_docs,
        "validation": policy(rule, values.get("validation")),
    }
    values.update({key: value for key, value in given.items() if value is not None})
    _ingest(checked(IngestRun, values))


def report_command(store: StoreOption = "al-store", report: ReportOption = "al-report") -> None:
    """Write the report of everything in a store, and the page of its nights; no Prefect server is needed."""
    from flows.report import pages
    from tasks.report.benchmark.report import report as write

    found = opened(store)
    check_writable(report, "--report")
    with writing(report):
        written = pages(found, report, write.fn)
    for name, path in (("report", written.report), ("nights", written.nights)):
        if path is not None:
            console.print(f"{name}: {path}", soft_wrap=True, highlight=False)


def _benchmark(run: RunFile) -> None:
    """Compare; exit 1 when a cell failed."""
    outcome, failed = _run_flow("flows.benchmark:benchmark", run)
    show(outcome)
    if failed:
        sys.exit(1)


def _plan(run: RunFile) -> None:
    """Print what a run would do; nothing is computed, and no server is needed."""
    run.check()
    _check_writable(run)
    from flows.plan import plan, search_tables, tables

    for table in search_tables(run) if run.search else ():
        console.print(table)
    for table in tables(plan(run)) if run.methods or not run.search else ():
        console.print(table)


def _ingest(run: IngestRun) -> None:
    """Take in and judge; exit 1 when a category cannot be used."""
    outcome, failed = _run_flow("flows.ingest:ingest", run)
    for name, reason in outcome.unusable.items():
        errors.print("[red]cannot be used:[/red]", escape(f"{name}: {reason}"), highlight=False, soft_wrap=True)
    tell(outcome.told)
    for name, reason in outcome.remarks.items():
        errors.print("[yellow]not searched for suspects:[/yellow]", escape(f"{name}: {reason}"), highlight=False)
    console.print(f"report: {outcome.report}", soft_wrap=True, highlight=False)
    if failed:
        sys.exit(1)


def _run_flow(entrypoint: str, run: Run) -> tuple[Any, bool]:
    """(what the flow ended with, whether part of it failed), on the runner that the run asks for."""

    def ready() -> None:
        run.check()
        run.check_device()
        _check_writable(run)

    def runner() -> Any:
        from flows.where.runners import runner_for

        return runner_for(run)

    with writing(run.store, run.report):
        return run_flow(entrypoint, run, ready, runner)


def _check_writable(run: Run) -> None:
    """Raises RunFileError or StoreTooNew before hours of work would be lost for want of a place to keep them."""
    from flows.runs.runfile import RunFileError
    from storage.store import Store

    try:
        Store(run.store).check_format()
    except OSError as error:
        raise RunFileError(f"{run.store!r} cannot be written: {error}; give a store that can, with --store") from error
    check_writable(run.report, "--report")
