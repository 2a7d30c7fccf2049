"""`al models`: which version of each model is in use, and switching it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from flows.cli.terminal import StoreOption, console, percent, who
from flows.where.store import opened

if TYPE_CHECKING:
    from storage.models import Registry
    from storage.records import RunRecord

models_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Fitted models as numbered versions: keep one, see it, put it into use, go back, export, remove.",
)

_SWITCHES_SHOWN = 10


class Format(StrEnum):
    """What a model is exported as."""

    arrays = "arrays"
    onnx = "onnx"


VersionArgument = Annotated[
    str, typer.Argument(metavar="NAME@VERSION", help="Such as mvtec_ad/grid@3 or mvtec_ad/grid@challenger.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Such as mvtec_ad/grid (its champion), or a version: mvtec_ad/grid@3."),
]


@models_app.command("list")
def list_models(store: StoreOption = "al-store") -> None:
    """List all versions: aliases, method, metrics, when they were added."""
    registry = _registry(store)
    version_column = Column("version", no_wrap=True)  # to be copied into the next command
    heads = ("aliases", "method", "image AUROC", "pixel AUROC", "PRO", "added")
    table = Table(version_column, *heads, box=None)
    for name in registry.names():
        aliases = registry.aliases(name)
        readable = {version.number: version for version in registry.versions(name)}
        for number in registry.numbers(name):
            row = [f"{name}@{number}", ", ".join(aliases.of(number))]
            version = readable.get(number)
            if version is None:
                table.add_row(*row, "unreadable")  # `show` says why
                continue
            figures = [percent(version.metrics.get(metric)) for metric in ("image_auroc", "pixel_auroc", "pro")]
            table.add_row(*row, version.method, *figures, version.created[:10])
    console.print(table)


@models_app.command("show")
def show_model(name: ModelArgument, store: StoreOption = "al-store") -> None:
    """Show the aliases of a model, who switched them last and why, and the model card."""
    from storage.models import CARD

    registry = _registry(store)
    version = registry.resolve(name)
    aliases = registry.aliases(version.name)
    _print(f"{version.name}: {_aliases_in_words(aliases.points)}")
    for switch in aliases.history[-_SWITCHES_SHOWN:]:
        _print(
            f"{switch.when[:19]}  {switch.change} by {switch.who}: {switch.why}  ({_aliases_in_words(switch.points)})"
        )
    _print("")
    _print(registry.read(version, CARD).decode())


@models_app.command("register")
def register_model(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Data set/category.")] = None,
    method: Annotated[str | None, typer.Option(help="Only of this method.")] = None,
    record: Annotated[str | None, typer.Option(help="Only this cell: the `cell` of `al records --json`.")] = None,
    why: Annotated[str, typer.Option(help="Kept with the switch of the challenger.")] = "registered",
    store: StoreOption = "al-store",
) -> None:
    """Keep the model of a finished cell of a benchmark as a new version, the challenger."""
    from storage.records import read_records

    with _changed(store) as registry:
        chosen = _the_one(list(read_records(registry.store)), name, method, record)
        from tasks.serve.register import register

        _print(f"{register.fn(registry.store.url, chosen.key(), who(), why)} is kept; see `al models list`")


@models_app.command("promote")
def promote_model(
    name: VersionArgument,
    why: Annotated[str, typer.Option(help="Kept in the history of the switches.")],
    store: StoreOption = "al-store",
) -> None:
    """Put a version into use: it becomes the champion, and the champion the previous version, in one write."""
    with _changed(store) as registry:
        version = registry.resolve(name)
        _print(f"{version.name}: {_aliases_in_words(registry.promote(version, who=who(), why=why).points)}")


@models_app.command("rollback")
def roll_back_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Such as mvtec_ad/grid.")],
    why: Annotated[str, typer.Option(help="Kept in the history of the switches.")] = "rolled back",
    store: StoreOption = "al-store",
) -> None:
    """Put the previous version into use again; a second rollback takes the first back."""
    with _changed(store) as registry:
        _print(f"{name}: {_aliases_in_words(registry.rollback(name, who=who(), why=why).points)}")


@models_app.command("export")
def export_model(
    name: ModelArgument,
    to: Annotated[str, typer.Option(help="A new folder.")],
    format: Annotated[
        Format, typer.Option(help="arrays: safetensors. onnx: one file from images to maps, scores and p-values.")
    ] = Format.arrays,
    images: Annotated[
        list[str] | None, typer.Option(help="With onnx: an image file to check it on; may be repeated.")
    ] = None,
    store: StoreOption = "al-store",
) -> None:
    """Copy a version into a folder: its arrays or model.onnx, version.json and MODEL_CARD.md.

    An ONNX file is checked with onnxruntime against the maps of `al predict`, on images of the run or those given with
    --images, and only kept when they agree. It needs the extra `onnx` of the package.
    """
    registry = _registry(store)
    if format == Format.onnx:
        from tasks.serve.export_onnx import export_onnx

        done = export_onnx(registry, name, to, images or [])
        _print(f"{done.label}: {to}\n{done.said()}")
        return
    version = registry.resolve(name)
    registry.export(version, to)
    _print(f"{version.label}: {to}")


@models_app.command("delete")
def delete_model(name: VersionArgument, store: StoreOption = "al-store") -> None:
    """Remove a version; one that an alias points to is refused."""
    with _changed(store) as registry:
        model, number = registry.locate(name)
        registry.delete(model, number)
        _print(f"{model}@{number} is removed")


@models_app.command("collect")
def collect_models(
    keep: Annotated[int, typer.Option(min=1, help="Newest versions to keep of each model.")],
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this model.")] = None,
    store: StoreOption = "al-store",
) -> None:
    """Remove old versions: all but the newest, those with an alias, and those that a run record points to."""
    from storage.errors import NotInStore, nearest

    with _changed(store) as registry:
        names = registry.names()
        if name is not None and name not in names:
            raise NotInStore(f"no model {name!r} in the registry of {store}; {nearest(name, names)}")
        for each in names if name is None else [name]:
            done = registry.collect(each, keep)
            for number in done.removed:
                _print(f"{each}@{number} is removed")
            for number, reason in done.kept.items():
                _print(f"{each}@{number} is kept: {reason}")


def _registry(url: str) -> Registry:
    from storage.models import Registry

    return Registry(opened(url))


@contextmanager
def _changed(url: str) -> Iterator[Registry]:
    """The registry, to be written. Raises NotStorable when the store cannot be."""
    from al_models.errors import ModelsError
    from storage.errors import NotStorable, StorageError

    try:
        yield _registry(url)
    except OSError as error:
        if isinstance(error, StorageError | ModelsError):  # some of which are OSErrors, too
            raise
        raise NotStorable(f"{url} cannot be written: {error}; see to its permissions and its space") from error


def _the_one(records: Sequence[RunRecord], name: str | None, method: str | None, cell: str | None) -> RunRecord:
    """The finished cell that is meant. Raises NotInStore when there is none, or more than one."""
    from storage.errors import NotInStore

    asked = {"name": name, "--method": method, "--record": cell}
    given = ", ".join(f"{option} {value}" for option, value in asked.items() if value) or "nothing"
    done = [record for record in records if record.status == "done"]
    found = [
        record
        for record in done
        if name in (None, f"{record.dataset}/{record.category}")
        and method in (None, record.method)
        and cell in (None, record.cell)
    ]
    if len(found) == 1:
        return found[0]
    lines = [f"{r.dataset}/{r.category} --method {r.method} --record {r.cell} (seed {r.seed})" for r in found or done]
    problem = f"{len(found)} finished cells fit" if found else "no finished cell fits"
    raise NotInStore(f"{problem} ({given} was given); name one of: {'; '.join(lines[:20]) or 'none there yet'}")


def _aliases_in_words(points: dict[str, int]) -> str:
    return ", ".join(f"{alias} {number}" for alias, number in sorted(points.items())) or "no alias"


def _print(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)
