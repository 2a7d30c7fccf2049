"""`al`: the command line. Heavy imports wait until a command needs them, so that `al --help` answers at once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.markup import escape

from flows.cli import look, operate, run
from flows.cli.models import models_app
from flows.cli.nights import nights_app
from flows.cli.predict import predict
from flows.cli.terminal import errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn what good looks like from good images alone; show, pixel by pixel, what is not.",
)
# Group -> its commands, in the order in which `al --help` lists them.
GROUPS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {
    "Run": {
        "demo": run.demo,
        "ingest": run.ingest,
        "benchmark": run.benchmark,
        "search": run.search,
        "report": run.report_command,
    },
    "Models in use": {"models": models_app, "predict": predict, "nightly": run.nightly, "nights": nights_app},
    "Look": {"methods": look.methods_app, "datasets": look.datasets_app, "records": look.records},
    "Operate": {"serve": operate.serve, "alarms": operate.alarms},
}
for panel, commands in GROUPS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(command)


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
    from flows.runs.runfile import RunFileError
    from flows.where.errors import ClusterError
    from flows.where.server import ServerError
    from storage.errors import StorageError

    return isinstance(error, ModelsError | StorageError | RunFileError | ServerError | ClusterError)
