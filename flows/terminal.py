"""What all commands of `al` share: where they print, and how they open a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from storage.store import Store

console = Console(markup=False, emoji=False)  # what stands in brackets is a reason or a path, never a colour
errors = Console(stderr=True, emoji=False)

StoreOption = Annotated[str, typer.Option(help="Folder or URL (s3://...) where outputs are kept and found again.")]


def opened(url: str) -> Store:
    """The store there. Raises NotInStore for a place that is none, StoreTooNew for one of a later version."""
    from storage.errors import NotInStore
    from storage.store import Store

    store = Store(url)
    if not store.list("store.json") and not store.list("records"):
        raise NotInStore(f"{url} is not a store; give the folder that `al benchmark --store` wrote to")
    store.check_format()
    return store


def percent(fraction: float | None) -> str:
    """A fraction as per cent, or a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"
