"""`al nights`: the new images that nights have rejected and hold, and a person's word on them."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.terminal import StoreOption, console, who
from flows.where.store import opened

if TYPE_CHECKING:
    from storage.held import HeldImage, Word
    from storage.store import Store

nights_app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="New images that a night rejected and holds: list them, release what is good, refuse what is not.",
)

ImagesArgument = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE...", help="As the page names it: a path or its end; '*.png': all that are left."),
]
ModelOption = Annotated[str | None, typer.Option(help="Only of this model, such as mvtec_ad/grid.")]


@nights_app.command("list")
def list_held(
    model: ModelOption = None,
    every: Annotated[bool, typer.Option("--all", help="Those that were released or refused, too.")] = False,
    store: StoreOption = "al-store",
) -> None:
    """List the images that wait for a person's word."""
    shown = [image for image in _held(opened(store), model) if every or image.state == "held"]
    for image in shown:
        state = (
            image.state if not image.said else f"{image.state} by {image.said[-1].who} on {image.said[-1].when[:10]}"
        )
        told = f"{image.model}: {image.path} in {image.folder}, {state}, since {image.since[:10]}: {image.why}"
        console.print(told, soft_wrap=True, highlight=False)
    if not shown:
        console.print("no image is held", highlight=False)


@nights_app.command("release")
def release_images(images: ImagesArgument, model: ModelOption = None, store: StoreOption = "al-store") -> None:
    """Say that images are good: they are learned from the next night on."""
    _say(store, model, images, "released")


@nights_app.command("refuse")
def refuse_images(images: ImagesArgument, model: ModelOption = None, store: StoreOption = "al-store") -> None:
    """Say that images are not good: they are never learned, and never asked about again. `release` takes it back."""
    _say(store, model, images, "refused")


def _say(url: str, model: str | None, names: list[str], word: Word) -> None:
    """All of the images or, when a name is wrong, none."""
    from storage.errors import NotStorable, StorageError
    from storage.held import meant, say

    store = opened(url)
    chosen = meant(_held(store, model), names)
    try:
        said = say(store, chosen, word, who())
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise NotStorable(f"{url} cannot be written: {error}; see to its permissions and its space") from error
    for image in said:
        console.print(f"{image.model}: {image.path} is {word}", soft_wrap=True, highlight=False)


def _held(store: Store, model: str | None) -> list[HeldImage]:
    """Raises NotInStore for a store whose nights hold none, or a model that it does not know."""
    from storage.errors import NotInStore, nearest
    from storage.held import read_held
    from storage.nights import decision_keys

    nights = decision_keys(store)
    if not nights:
        run = f"al nightly RUN_FILE --store {shlex.quote(store.url)}"
        raise NotInStore(f"no night has been in {store.url}, so it holds no image; `{run}` is one, or give its --store")
    if model is not None and model not in nights:
        raise NotInStore(f"no night was about a model {model!r} in {store.url}; {nearest(model, nights)}")
    return read_held(store, model)
