"""`al`: the command line. Heavy imports wait until a command needs them, so that `al --help` answers at once."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer
from rich.markup import escape
from rich.table import Column, Table

from flows.models_cli import models_app
from flows.nights_cli import nights_app
from flows.predict_cli import predict
from flows.terminal import StoreOption, check_writable, console, errors, opened, percent, run_flow, writing

if TYPE_CHECKING:
    from pydantic import BaseModel

    from flows.benchmark import Outcome
    from flows.runfile import IngestRun, Run, RunFile
    from flows.search import Outcome as Chosen

_Model = TypeVar("_Model", bound="BaseModel")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn what good looks like from good images alone; show, pixel by pixel, what is not.",
)
datasets_app = typer.Typer(add_completion=False)
app.add_typer(datasets_app, name="datasets")
app.add_typer(models_app, name="models")
app.add_typer(nights_app, name="nights")
app.command()(predict)

_SHOWN = ("image_auroc", "pixel_auroc", "pro", "iou_max")
"""Metrics of the table in the terminal; the report has all."""

ReportOption = Annotated[str, typer.Option(help="Folder the report is written to.")]


def main() -> None:
    """Run the command; what the user can mend is one line, not a traceback. Exit codes: 1 failed, 2 wrong input."""
    _give_prefect_a_home()
    try:
        with _interrupts():
            app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not _for_the_user(error):
            raise
        errors.print("[red]error:[/red]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


def _give_prefect_a_home() -> None:
    """Where the user's own folder takes no files, as in a container, what Prefect keeps lies beside the history."""
    own, given = Path("~/.prefect").expanduser(), os.environ.get("AL_HOME")
    if "PREFECT_HOME" in os.environ or os.access(own if own.exists() else own.parent, os.W_OK):
        return
    if given:
        os.environ["PREFECT_HOME"] = str(Path(given).expanduser().absolute() / "prefect")
    else:  # it warns and goes on without; what needs the folder names AL_HOME
        warnings.filterwarnings("ignore", message="Failed to create the Prefect home directory")


@contextmanager
def _interrupts() -> Iterator[None]:
    """The first Ctrl-C ends the work in order, which may wait for a step; the second ends the process on the spot. It
    stays so when the first was pressed, while threads are waited for; once all is done, another changes nothing."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, second)
        raise KeyboardInterrupt

    def second(number: int, frame: FrameType | None) -> None:
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # the cursor, which a live table hides
        os._exit(130)

    def done() -> None:  # Python gives its handlers up while it takes its modules down: exit code -2 instead of 130
        if signal.getsignal(signal.SIGINT) is second:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    atexit.register(done)  # first registered, last called
    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, before)


def _for_the_user(error: Exception) -> bool:
    from al_models.errors import ModelsError
    from flows.runfile import RunFileError
    from flows.runners import ClusterError
    from flows.server import ServerError
    from storage.errors import StorageError

    return isinstance(error, ModelsError | StorageError | RunFileError | ServerError | ClusterError)


@app.command()
def demo(store: StoreOption = "al-demo/store", report: ReportOption = "al-demo/report") -> None:
    """Run the main job on a small data set made on the spot: textures with synthetic defects. About two minutes."""
    from flows.demo import demo_run

    _benchmark(demo_run(store=store, report=report))


@app.command()
def benchmark(
    run_file: Annotated[Path | None, typer.Argument(help="Run file (TOML); options given beside it win.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="DATASET=FOLDER, such as mvtec_ad=data/mvtec; folder:NAME=FOLDER names it.")
    ] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only this category; may be repeated.")] = None,
    inspect: Annotated[str | None, typer.Option(help="Images to judge, for a plain folder of good images.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, of the data set's reader.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="RULE=SEVERITY: reject, warn, stop or off.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    param: Annotated[list[str] | None, typer.Option(help="METHOD.OPTION=VALUE, the value as JSON.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated; spread is reported.")] = None,
    store: Annotated[str | None, typer.Option(help="Folder or URL of the outputs.  [default: al-store]")] = None,
    report: Annotated[str | None, typer.Option(help="Folder of the report.  [default: al-report]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")] = None,
    false_reject_rate: Annotated[float | None, typer.Option(help="Asked of the threshold.  [default: 0.05]")] = None,
    runner: Annotated[str | None, typer.Option(help="threads, dask or tcp://SCHEDULER.  [default: threads]")] = None,
    workers: Annotated[int | None, typer.Option(help="Steps at once, or Dask processes.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores that a step computes with.")] = None,
    rehash: Annotated[bool | None, typer.Option("--rehash", help="Read every file again, changed or not.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be computed, and end.")] = False,
) -> None:
    """Compare methods on data sets: every method on every category, unless some are named."""
    from flows.runfile import RunFile, read_run_file

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
        "data": [_source(text, category, _options(option, inspect)) for text in data] if data else None,
        "validation": _policy(rule, values.get("validation")),
        "methods": _methods(method, param, values.get("methods")),
    }
    values.update({name: value for name, value in given.items() if value is not None})
    if category and not data:
        values["data"] = [source | {"categories": category} for source in values.get("data", [])]
    run = _checked(RunFile, values)
    run.check_no_search()
    if plan:
        _plan(run)
    else:
        _benchmark(run)


@app.command()
def search(
    run_file: Annotated[Path, typer.Argument(help="Run file (TOML) with a [search]; options given beside it win.")],
    store: Annotated[str | None, typer.Option(help="Folder or URL of the outputs.  [default: al-store]")] = None,
    report: Annotated[str | None, typer.Option(help="Folder of what was chosen.  [default: al-report]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")] = None,
    runner: Annotated[str | None, typer.Option(help="threads, dask or tcp://SCHEDULER.  [default: threads]")] = None,
    workers: Annotated[int | None, typer.Option(help="Steps at once, or Dask processes.")] = None,
    threads: Annotated[int | None, typer.Option(help="Cores that a step computes with.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be tried, and end.")] = False,
) -> None:
    """Choose parameters of methods by synthetic defects in held-out good images; the test set chooses nothing."""
    from flows.runfile import RunFile, read_run_file

    given = {"store": store, "report": report, "device": device, "runner": runner}
    given |= {"workers": workers, "threads": threads}
    values = read_run_file(run_file).model_dump()
    values.update({name: value for name, value in given.items() if value is not None})
    run = _checked(RunFile, values)
    run.check_search()
    if plan:
        _plan(run)
        return
    outcome, failed = _run_flow("flows.search:search", run)
    _show_search(outcome)
    if failed:
        sys.exit(1)


@app.command()
def nightly(
    run_file: Annotated[Path, typer.Argument(help="Run file (TOML) of a night; options given beside it win.")],
    store: Annotated[str | None, typer.Option(help="Folder or URL of the outputs.  [default: al-store]")] = None,
    report: Annotated[str | None, typer.Option(help="Folder of the page.  [default: al-report]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")] = None,
    runner: Annotated[str | None, typer.Option(help="threads, dask or tcp://SCHEDULER.  [default: threads]")] = None,
    rehash: Annotated[bool | None, typer.Option("--rehash", help="Read every file again, changed or not.")] = None,
) -> None:
    """Refit each model on what is new and not rejected, prove it against the one in use, and promote it or not."""
    from flows.runfile import NightlyRun, read_run_file

    given = {"store": store, "report": report, "device": device, "runner": runner, "rehash": rehash}
    values = read_run_file(run_file, NightlyRun).model_dump()
    values.update({name: value for name, value in given.items() if value is not None})
    outcome, failed = _run_flow("flows.nightly:nightly", _checked(NightlyRun, values))
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


@app.command()
def alarms(
    url: Annotated[str, typer.Argument(help="Webhook that each alarm of a night is posted to, as JSON.")],
) -> None:
    """Have the Prefect server (PREFECT_API_URL) tell a webhook whenever a night needs a person, or breaks."""
    from flows import server
    from flows.address import check_given

    if not os.environ.get("PREFECT_API_URL"):
        raise server.ServerError(
            "PREFECT_API_URL is not set: a server that outlives this command tells; start `al serve`, set it"
        )
    with server.connected() as api:
        check_given(api)
        from flows.alerts import tell

        tell(url)
    console.print(f"alarms go to {urlsplit(url).hostname}", soft_wrap=True, highlight=False)  # the rest is a secret


@app.command()
def ingest(
    name: Annotated[str, typer.Argument(help="Data set (see `al datasets`), or a run file (TOML).")],
    root: Annotated[str | None, typer.Option(help="Its folder.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Only this category; may be repeated.")] = None,
    inspect: Annotated[str | None, typer.Option(help="Images to judge, for a plain folder of good images.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, of the data set's reader.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="RULE=SEVERITY: reject, warn, stop or off.")] = None,
    download: Annotated[bool | None, typer.Option("--download", help="Fetch it first, where that is offered.")] = None,
    data_docs: Annotated[
        bool | None, typer.Option(help="Build Great Expectations' own pages, too.  [default: yes]")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Folder or URL of the outputs.  [default: al-store]")] = None,
    report: Annotated[str | None, typer.Option(help="Folder of the report.  [default: al-report]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [default: auto]")] = None,
    runner: Annotated[str | None, typer.Option(help="threads, dask or tcp://SCHEDULER.  [default: threads]")] = None,
    rehash: Annotated[bool | None, typer.Option("--rehash", help="Read every file again, changed or not.")] = None,
) -> None:
    """Take a data set in and judge it: what is usable, what is wrong and why, on one page."""
    from flows.runfile import IngestRun, RunFileError, read_run_file

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
        values = {"data": [_source(f"{name}={root}", category, _options(option, inspect))]}
    given = {
        "store": store,
        "report": report,
        "device": device,
        "runner": runner,
        "rehash": rehash,
        "download": download,
        "data_docs": data_docs,
        "validation": _policy(rule, values.get("validation")),
    }
    values.update({key: value for key, value in given.items() if value is not None})
    _ingest(_checked(IngestRun, values))


@app.command()
def methods() -> None:
    """List the methods: family, paper."""
    from al_models.registry import METHODS

    table = Table("method", "family", "paper", box=None)
    for name, row in METHODS.items():
        table.add_row(name, row.family, row.paper)
    console.print(table)


@datasets_app.callback(invoke_without_command=True)
def datasets(context: typer.Context) -> None:
    """List the data sets: what they show, categories, images, licence. `al datasets show NAME` tells more."""
    from storage.datasets import DATASETS, about

    if context.invoked_subcommand is not None:
        return
    table = Table("data set", "what", "categories", "images", "licence", box=None)
    for name in DATASETS:
        facts = about(name)
        table.add_row(name, facts.title, str(len(facts.categories) or "–"), str(facts.images or "–"), facts.licence)
    console.print(table)


@datasets_app.command("show")
def show_dataset(name: Annotated[str, typer.Argument(help="Name of the data set.")]) -> None:
    """Say how to get a data set, what its folder must look like, and what its options are."""
    from storage.datasets import about, options_of

    facts = about(name)
    lines = {
        "licence": facts.licence,
        "home page": facts.home,
        "cite": facts.citation,
        "categories": ", ".join(facts.categories),
        "images": str(facts.images or ""),
        "split": facts.split,
        "to get it": facts.obtain,
        "direct": f"al ingest {name} --root DIR --download" if facts.downloads else "",
        "options": ", ".join(f"{option} = {json.dumps(value)}" for option, value in options_of(name).items()),
    }
    console.print(f"{name}: {facts.title}\n", highlight=False, soft_wrap=True)
    for title, text in lines.items():
        if text:
            console.print(f"{title:>11}  {text}", highlight=False, soft_wrap=True)
    console.print(f"\nexpected below DIR:\n{facts.tree}", highlight=False, soft_wrap=True)


@app.command()
def records(
    store: StoreOption = "al-store",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for other tools.")] = False,
) -> None:
    """Show what ran and how it ended."""
    from storage.records import read_records

    found = list(read_records(opened(store)))
    if as_json:
        for record in found:
            print(json.dumps(asdict(record), sort_keys=True))
        return
    table = Table("data set", "category", "method", "seed", "status", "image AUROC", "pixel AUROC", "PRO", box=None)
    for record in found:
        figures = [percent(record.metrics.get(name)) for name in ("image_auroc", "pixel_auroc", "pro")]
        status = record.status if record.reason is None else f"{record.status}: {record.reason}"
        table.add_row(record.dataset, record.category, record.method, str(record.seed), status, *figures)
    console.print(table)


@app.command("report")
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


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Of the Prefect server and its UI.")] = 4200,
) -> None:
    """Start a Prefect server with its UI, a worker and the deployments; stop with Ctrl-C."""
    from flows.serve import serve as run

    run(port, console)


def _benchmark(run: RunFile) -> None:
    """Compare; exit 1 when a cell failed."""
    outcome, failed = _run_flow("flows.benchmark:benchmark", run)
    _show(outcome)
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
    _tell(outcome.told)
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
        from flows.runners import runner_for

        return runner_for(run)

    with writing(run.store, run.report):
        return run_flow(entrypoint, run, ready, runner)


def _check_writable(run: Run) -> None:
    """Raises RunFileError or StoreTooNew before hours of work would be lost for want of a place to keep them."""
    from flows.runfile import RunFileError
    from storage.store import Store

    try:
        Store(run.store).check_format()
    except OSError as error:
        raise RunFileError(f"{run.store!r} cannot be written: {error}; give a store that can, with --store") from error
    check_writable(run.report, "--report")


def _show(outcome: Outcome) -> None:
    from tasks.compare.tables import METRICS, ranking

    found = ranking(outcome.records)
    names = [name for name in _SHOWN if name in found.metrics]
    figures = [Column(head, no_wrap=True) for head in (*(METRICS[name] for name in names), "seconds", "peak MB")]
    table = Table("rank", Column("method", overflow="fold"), *figures, box=None)
    for row in found.rows:
        values = [percent(row.values[name].mean if name in row.values else None) for name in names]
        cost = ["–" if value is None else f"{value:.0f}" for value in (row.seconds, row.peak_memory_mb)]
        table.add_row("–" if row.rank is None else f"{row.rank:.3g}", row.variant.name, *values, *cost)
    console.print(table)
    _tell(outcome.told)
    names_of = {record.cell: row.variant.name for row in found.rows for record in row.variant.records}
    several = len({record.seed for record in outcome.records}) > 1
    for record in outcome.records:
        if record.status == "failed":
            seed = f" seed {record.seed}" if several else ""
            cell = f"{names_of[record.cell]} {record.dataset}/{record.category}{seed}: {record.reason}"
            errors.print("[red]failed:[/red]", escape(cell), highlight=False, soft_wrap=True)
    console.print(f"report: {outcome.report}", soft_wrap=True, highlight=False)


def _tell(lines: list[str]) -> None:
    """What is doubtful or left out of the data."""
    for line in lines:
        errors.print("[yellow]data:[/yellow]", escape(line), highlight=False, soft_wrap=True)


def _show_search(outcome: Chosen) -> None:
    for searched in outcome.searched:
        rows = list(searched.rows())
        shown = [name for name in rows[0] if name != "failed"]
        table = Table(*(Column(name, overflow="fold") for name in shown), box=None)
        for row in rows:
            table.add_row(*(str(row[name]) for name in shown))
            if row["failed"]:
                errors.print(
                    "[red]failed:[/red]",
                    escape(f"{row['parameters']}: {row['failed']}"),
                    highlight=False,
                    soft_wrap=True,
                )
        console.print(table)
    for name, reason in outcome.unusable.items():
        errors.print("[red]not searched on:[/red]", escape(f"{name}: {reason}"), highlight=False, soft_wrap=True)
    console.print(f"trials: {outcome.table}", soft_wrap=True, highlight=False)
    if outcome.run_file is None:
        errors.print("[red]nothing chosen:[/red] no trial came through", highlight=False)
    else:
        console.print(f"chosen: {outcome.run_file}", soft_wrap=True, highlight=False)
    if outcome.compared is not None:
        _show(outcome.compared)
    elif outcome.run_file is not None:
        console.print(f"on the test set: al benchmark {outcome.run_file}", soft_wrap=True, highlight=False)


def _checked(model: type[_Model], values: dict[str, Any]) -> _Model:
    from pydantic import ValidationError

    from flows.runfile import RunFileError, explain

    if not values.get("data"):
        raise RunFileError("no data was given; use --data NAME=FOLDER (see `al datasets`), a run file, or `al demo`")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RunFileError(explain(error)) from error


def _source(text: str, categories: list[str] | None, options: dict[str, Any]) -> dict[str, Any]:
    from flows.runfile import RunFileError

    dataset, equals, root = text.partition("=")
    if not equals or not root:
        raise RunFileError(f"--data {text!r} was given; expected NAME=FOLDER, such as mvtec_ad=data/mvtec")
    dataset, colon, name = dataset.partition(":")
    options = options | ({"category": name} if colon else {})
    return {"dataset": dataset, "root": root, "categories": categories, "options": options}


def _options(texts: list[str] | None, inspect: str | None) -> dict[str, Any]:
    """Options of the reader, from KEY=VALUE."""
    from flows.runfile import RunFileError

    options: dict[str, Any] = {} if inspect is None else {"inspect": inspect}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise RunFileError(f"--option {text!r} was given; expected NAME=VALUE (see `al datasets show NAME`)")
        options[name] = _json_or_text(value)
    return options


def _policy(rules: list[str] | None, in_file: dict[str, Any] | None) -> dict[str, Any] | None:
    """The policy of the run file with the rules given here; None when neither is given."""
    from flows.runfile import RunFileError

    if not rules:
        return in_file
    given = dict((in_file or {}).get("rules", {}))
    for text in rules:
        name, equals, severity = text.partition("=")
        if not (name and equals):
            raise RunFileError(
                f"--rule {text!r} was given; expected RULE=SEVERITY, such as near_unique_in_split=reject"
            )
        given[name] = severity
    return {**(in_file or {}), "rules": given}


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


if __name__ == "__main__":
    main()
