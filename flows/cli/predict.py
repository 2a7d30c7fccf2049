"""`al predict`: judge new images with a registered version of a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli.terminal import StoreOption, check_writable, console, errors, run_flow, writing
from flows.where.store import opened

if TYPE_CHECKING:
    from flows.runs.predict import PredictRun
    from tasks.serve.summarise import Summary


_SHOWN = 5
"""Files left out that are named."""


def predict(
    images: Annotated[list[str], typer.Argument(help="Files, folders, patterns in quotes, @list.txt (a path a line).")],
    model: Annotated[str, typer.Option(help="Such as mvtec_ad/grid (its champion) or mvtec_ad/grid@3.")],
    store: StoreOption = "al-store",
    out: Annotated[str, typer.Option(help="Folder for what is found; it goes on where it was.")] = "al-predictions",
    batch_size: Annotated[int, typer.Option(min=1, help="Images judged at once.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    watch: Annotated[
        float | None, typer.Option(help="Look for new images every so many seconds, until Ctrl-C.")
    ] = None,
) -> None:
    """Judge images with a version of a model: score, decision and regions of each, and which are out of its scope."""
    from pydantic import ValidationError

    from flows.runs.predict import PredictRun
    from flows.runs.runfile import RunFileError, explain

    try:
        run = PredictRun(
            model=model, images=images, store=store, out=out, batch_size=batch_size, device=device, watch=watch
        )
    except ValidationError as error:
        raise RunFileError(explain(error)) from error
    opened(store)
    with writing(run.out):
        summary, _ = run_flow("flows.predict:predict", run, lambda: _check(run))
    _show(summary)
    if summary.decisions.get("unreadable"):
        sys.exit(1)


def _check(run: PredictRun) -> None:
    """Raises what `PredictRun.check` does, InvalidInput for the device, RunFileError when nothing can be written."""
    from tasks.core.compute import device_of

    run.check()
    device_of(run.device)
    check_writable(run.out, "--out")


def _show(summary: Summary) -> None:
    from tasks.serve.judge import DECISIONS

    table = Table("decision", "images", box=None)
    for decision in DECISIONS:
        if decision in summary.decisions:
            table.add_row(decision.replace("_", " "), str(summary.decisions[decision]))
    console.print(table)
    for change in summary.changed:
        figures = f"{change.before:.4g} -> {change.now:.4g} (p {change.adjusted:.2g}, {change.n} images)"
        errors.print("[yellow]drift:[/yellow]", escape(f"{change.statistic} {figures}"), highlight=False)
    if summary.beyond:
        told = f"{summary.beyond} images have values beyond those that the version has learned; see `note` of each"
        errors.print("[yellow]out of range:[/yellow]", escape(told), highlight=False, soft_wrap=True)
    shown = list(summary.left_out.items())[:_SHOWN]
    for path, reason in shown:
        errors.print("[yellow]left out:[/yellow]", escape(f"{path}: {reason}"), highlight=False, soft_wrap=True)
    if len(summary.left_out) > len(shown):
        errors.print(f"[yellow]left out:[/yellow] {len(summary.left_out)} files and folders in all", highlight=False)
    for path, reason in summary.unreadable.items():
        errors.print("[red]unreadable:[/red]", escape(f"{path}: {reason}"), highlight=False, soft_wrap=True)
    if "undecided" in summary.decisions:
        errors.print("[yellow]undecided:[/yellow]", escape(summary.note or ""), highlight=False, soft_wrap=True)
    console.print(f"results: {summary.out}", soft_wrap=True, highlight=False)
