"""What all commands of `al` share: where they print."""

from __future__ import annotations

import errno
import getpass
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer
from rich.console import Console

_PROBE = 64 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)

console = Console(markup=False, emoji=False)  # what stands in brackets is a reason or a path, never a colour
errors = Console(stderr=True, emoji=False)

StoreOption = Annotated[str, typer.Option(help="Folder or URL (s3://...) where outputs are kept and found again.")]


def check_writable(folder: str, option: str) -> None:
    """Raises RunFileError when no file can be kept in a folder, before the work and not after it."""
    from flows.runs.runfile import RunFileError

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE))
            probe.flush()
    except OSError as error:
        reason = error.strerror or error
        raise RunFileError(f"{folder!r} cannot be written: {reason}; give a folder that can, with {option}") from error


@contextmanager
def writing(*places: str) -> Iterator[None]:
    """Raises RunFileError when the disk is full or refuses, at whatever point of the work."""
    from flows.runs.runfile import RunFileError

    try:
        yield
    except OSError as error:
        if error.errno not in (*_FULL, *_REFUSED):
            raise
        where = error.filename or " or ".join(places)
        fix = "make room there" if error.errno in _FULL else "see to the permissions there"
        raise RunFileError(
            f"{where} could not be written: {error.strerror}; {fix}, or give another folder. The same command goes on "
            "where it was"
        ) from error


def run_flow(
    entrypoint: str, run: Any, ready: Callable[[], None], runner: Callable[[], Any] | None = None
) -> tuple[Any, bool]:
    """(what the flow ended with, whether part of it failed); on the environment's Prefect server or a local one.

    `ready` raises when the run cannot begin. `runner`: where the steps run; None: where the flow says.
    """
    from flows.where import server
    from flows.where.address import check_given

    with server.connected() as url:  # starts in the background, while seconds of imports go on here
        ready()
        check_given(url)  # before the imports
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
