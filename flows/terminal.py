"""What all commands of `al` share: where they print, and how they open a store."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

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


def run_flow(
    entrypoint: str, run: Any, ready: Callable[[], None], runner: Callable[[], Any] | None = None
) -> tuple[Any, bool]:
    """(what the flow ended with, whether part of it failed); on the environment's Prefect server or a local one.

    `ready` raises when the run cannot begin. `runner`: where the steps run; None: where the flow says.
    """
    from flows import server

    with server.connected() as url:  # starts in the background, while seconds of imports go on here
        ready()
        module, name = entrypoint.split(":")
        flow = getattr(import_module(module), name)
        asked = {} if runner is None else {"task_runner": runner()}
        server.wait_for(url)
        errors.print(f"watch at {url.removesuffix('/api')}", style="dim", highlight=False)
        state = flow.with_options(**asked)(run, return_state=True)
        outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome, state.is_failed()


def who() -> str:
    """Who gives the command, for the history."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def percent(fraction: float | None) -> str:
    """A fraction as per cent, or a dash."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"
