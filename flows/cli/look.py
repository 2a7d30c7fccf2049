"""Commands that look: methods, data sets, what ran."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Column, Table

from flows.cli.terminal import StoreOption, console, percent
from flows.where.store import opened

methods_app = typer.Typer(add_completion=False)
datasets_app = typer.Typer(add_completion=False)


@methods_app.callback(invoke_without_command=True)
def methods(context: typer.Context) -> None:
    """List the methods: family, paper. `al methods show NAME` tells a method's idea and parameters."""
    from al_models.registry import METHODS

    if context.invoked_subcommand is not None:
        return
    table = Table("method", "family", "paper", box=None)
    for name, row in METHODS.items():
        table.add_row(name, row.family, row.paper)
    console.print(table)


@methods_app.command("show")
def show_method(name: Annotated[str, typer.Argument(help="Name of the method.")]) -> None:
    """Say what a method does, and list its parameters: defaults, what is allowed, what they mean."""
    from al_models.parameters import declared
    from al_models.registry import METHODS, detector_class

    cls = detector_class(name)
    about = (sys.modules[cls.__module__].__doc__ or "").strip()
    console.print(f"{name} ({METHODS[name].family})\n\n{about}\n", highlight=False, soft_wrap=True)
    wide = Column("what it is", ratio=1)
    table = Table("parameter", Column("default", overflow="fold"), "allowed", wide, box=None, pad_edge=False)
    for one in declared(cls):
        default = "none" if one.default is None else json.dumps(one.default)
        table.add_row(one.name, default, one.allowed, one.meaning)
    console.print(table)
    console.print(f"\nset one by: al benchmark ... --method {name} --param {name}.PARAMETER=VALUE", highlight=False)


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
