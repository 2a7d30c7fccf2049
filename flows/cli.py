"""`al`: the command line. Heavy imports wait until a command needs them, so that `al --help` answers at once."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flows.benchmark import Outcome
    from flows.runfile import RunFile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn what good looks like from good images alone; show, pixel by pixel, what is not.",
)
console = Console(markup=False, emoji=False)  # what stands in brackets is a reason or a path, never a colour
errors = Console(stderr=True, emoji=False)

_SHOWN = ("image_auroc", "pixel_auroc", "pro", "iou_max")
"""Metrics of the table in the terminal; the report has all."""

StoreOption = Annotated[str, typer.Option(help="Folder or URL (s3://...) where outputs are kept and found again.")]
ReportOption = Annotated[str, typer.Option(help="Folder the report is written to.")]


def main() -> None:
    """Run the command; what the user can mend is one line, not a traceback. Exit codes: 1 failed, 2 wrong input."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _for_the_user(error):
            raise
        errors.print("[red]error:[/red]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


def _for_the_user(error: Exception) -> bool:
    from al_models.errors import ModelsError
    from flows.runfile import RunFileError
    from flows.server import ServerError
    from storage.errors import StorageError

    return isinstance(error, ModelsError | StorageError | RunFileError | ServerError)


@app.command()
def demo(store: StoreOption = "al-demo/store", report: ReportOption = "al-demo/report") -> None:
    """Run the main job on a small data set made on the spot: textures with synthetic defects. About two minutes."""
    from flows.demo import demo_run

    _benchmark(demo_run(store=store, report=report))


@app.command()
def benchmark(
    run_file: Annotated[Path | None, typer.Argument(help="Run file (TOML); options given beside it win.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="LAYOUT=FOLDER, such as mvtec_ad=data/mvtec.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only this category; may be repeated.")] = None,
    inspect: Annotated[str | None, typer.Option(help="Images to judge, for a plain folder of good images.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    param: Annotated[list[str] | None, typer.Option(help="METHOD.OPTION=VALUE, the value as JSON.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated; spread is reported.")] = None,
    store: Annotated[str | None, typer.Option(help="Folder or URL of the outputs.  [default: al-store]")] = None,
    report: Annotated[str | None, typer.Option(help="Folder of the report.  [default: al-report]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")] = None,
    false_reject_rate: Annotated[float | None, typer.Option(help="Asked of the threshold.  [default: 0.05]")] = None,
    runner: Annotated[str | None, typer.Option(help="threads, dask or tcp://SCHEDULER.  [default: threads]")] = None,
    workers: Annotated[int | None, typer.Option(help="Steps at once, or Dask processes.")] = None,
) -> None:
    """Compare methods on data sets: every method on every category, unless some are named."""
    from flows.runfile import read_run_file

    values = read_run_file(run_file).model_dump() if run_file else {}
    given = {
        "store": store,
        "report": report,
        "device": device,
        "false_reject_rate": false_reject_rate,
        "runner": runner,
        "workers": workers,
        "seeds": seed,
        "data": [_source(text, category, inspect) for text in data] if data else None,
        "methods": _methods(method, param, values.get("methods")),
    }
    values.update({name: value for name, value in given.items() if value is not None})
    if category and not data:
        values["data"] = [source | {"categories": category} for source in values.get("data", [])]
    _benchmark(_run_of(values))


@app.command()
def methods() -> None:
    """List the methods: family, paper."""
    from al_models.registry import METHODS

    table = Table("method", "family", "paper", box=None)
    for name, row in METHODS.items():
        table.add_row(name, row.family, row.paper)
    console.print(table)


@app.command()
def datasets() -> None:
    """List the data-set layouts: licence, where to get them."""
    from storage.datasets import DATASETS

    table = Table("data set", "what", "licence", "where from", box=None)
    for name, row in DATASETS.items():
        table.add_row(name, row.title, row.licence, row.source)
    console.print(table)


@app.command()
def records(
    store: StoreOption = "al-store",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for other tools.")] = False,
) -> None:
    """Show what ran and how it ended."""
    from storage.records import read_records

    found = list(read_records(_opened(store)))
    if as_json:
        for record in found:
            print(json.dumps(asdict(record), sort_keys=True))
        return
    table = Table("data set", "category", "method", "seed", "status", "image AUROC", "pixel AUROC", "PRO", box=None)
    for record in found:
        figures = [_percent(record.metrics.get(name)) for name in ("image_auroc", "pixel_auroc", "pro")]
        status = record.status if record.reason is None else f"{record.status}: {record.reason}"
        table.add_row(record.dataset, record.category, record.method, str(record.seed), status, *figures)
    console.print(table)


@app.command("report")
def report_command(store: StoreOption = "al-store", report: ReportOption = "al-report") -> None:
    """Write the report of everything in a store."""
    from tasks.report import report as write

    console.print(f"report: {write.fn(_opened(store).url, report)}", soft_wrap=True, highlight=False)


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Of the Prefect server and its UI.")] = 4200,
) -> None:
    """Start a Prefect server with its UI, a worker and the deployments; stop with Ctrl-C."""
    from flows.serve import serve as run

    run(port, console)


def _benchmark(run: RunFile) -> None:
    """Run the flow against the environment's Prefect server or the local one; exit 1 when a cell failed."""
    from flows import server

    with server.connected() as url:  # starts in the background, while seconds of imports go on here
        run.check()
        _check_writable(run)
        from flows.benchmark import benchmark as flow
        from flows.runners import runner_for

        server.wait_for(url)
        errors.print(f"watch at {url.removesuffix('/api')}", style="dim", highlight=False)
        state = flow.with_options(task_runner=runner_for(run.runner, run.workers))(run, return_state=True)
        outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    _show(outcome)
    if state.is_failed():
        sys.exit(1)


def _check_writable(run: RunFile) -> None:
    """Raises RunFileError or StoreTooNew before hours of work would be lost for want of a place to keep them."""
    from flows.runfile import RunFileError
    from storage.store import Store

    try:
        Store(run.store).check_format()
        Path(run.report).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"store {run.store!r} or report {run.report!r} cannot be written: {error}"
        raise RunFileError(f"{problem}; give folders that can, with --store and --report") from error


def _show(outcome: Outcome) -> None:
    from tasks.report.tables import METRICS, ranking

    found = ranking(outcome.records)
    names = [name for name in _SHOWN if name in found.metrics]
    table = Table("rank", "method", *(METRICS[name] for name in names), "seconds", "peak MB", box=None)
    for row in found.rows:
        figures = [_percent(row.values[name].mean if name in row.values else None) for name in names]
        cost = ["–" if value is None else f"{value:.0f}" for value in (row.seconds, row.peak_memory_mb)]
        table.add_row("–" if row.rank is None else f"{row.rank:.3g}", row.variant.name, *figures, *cost)
    console.print(table)
    for record in outcome.records:
        if record.status == "failed":
            cell = f"{record.method} {record.dataset}/{record.category}: {record.reason}"
            errors.print("[red]failed:[/red]", escape(cell), highlight=False, soft_wrap=True)
    console.print(f"report: {outcome.report}", soft_wrap=True, highlight=False)


def _opened(url: str) -> Any:
    from storage.errors import NotInStore
    from storage.store import Store

    store = Store(url)
    if not store.list("store.json") and not store.list("records"):
        raise NotInStore(f"{url} is not a store; give the folder that `al benchmark --store` wrote to")
    store.check_format()
    return store


def _run_of(values: dict[str, Any]) -> RunFile:
    from pydantic import ValidationError

    from flows.runfile import RunFile, RunFileError, explain

    if not values.get("data"):
        raise RunFileError("no data was given; use --data LAYOUT=FOLDER (see `al datasets`), a run file, or `al demo`")
    try:
        return RunFile.model_validate(values)
    except ValidationError as error:
        raise RunFileError(explain(error)) from error


def _source(text: str, categories: list[str] | None, inspect: str | None) -> dict[str, Any]:
    from flows.runfile import RunFileError

    dataset, equals, root = text.partition("=")
    if not equals or not root:
        raise RunFileError(f"--data {text!r} was given; expected LAYOUT=FOLDER, such as mvtec_ad=data/mvtec")
    return {"dataset": dataset, "root": root, "categories": categories, "inspect": inspect}


def _methods(
    names: list[str] | None, params: list[str] | None, in_file: list[dict[str, Any]] | None
) -> list[dict[str, Any]] | None:
    """The methods named, each with its parameters; None when neither is given."""
    from al_models.registry import METHODS
    from flows.runfile import RunFileError

    if not names and not params:
        return None
    runs = [{"name": name, "params": {}} for name in names] if names else in_file
    runs = runs or [{"name": name, "params": {}} for name in METHODS]
    for text in params or []:
        target, equals, value = text.partition("=")
        method, dot, option = target.partition(".")
        chosen = [run for run in runs if run["name"] == method]
        if not (equals and dot and chosen):
            raise RunFileError(f"--param {text!r} was given; expected METHOD.OPTION=VALUE of a method that is run")
        for run in chosen:
            run["params"][option] = _json_or_text(value)
    return runs


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}"


if __name__ == "__main__":
    main()
