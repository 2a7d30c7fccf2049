"""The local Prefect server: one a user, started when a command needs it, gone when the last command has ended.

Commands register a lease (a file named by their process) and share one server, whose history stays in the user's data
folder. A keeper process owns the server and stops it when no process with a lease is alive, so that not even a killed
command leaves a server behind.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock
from platformdirs import user_data_path

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import AsyncSession

PORT = 4200
_START_WITHIN_S = 120.0
_LOOK_EVERY_S = 1.0
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # never a second, forgetful server behind our back
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,al_models,storage",  # what our steps say is read in the UI,
    "PREFECT_LOGGING_ROOT_LEVEL": "INFO",  # from this level on (Prefect gives extra loggers handlers, but no level),
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # and not between the lines of the terminal's table
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # a step called outside of a flow has nowhere to log to
    "DASK_LOGGING__DISTRIBUTED": "warning",
}
"""Set for every process of ours, unless the user has set them."""


class ServerError(RuntimeError):
    """The local server did not start."""


def home() -> Path:
    """Where the history of runs lies: AL_HOME, or the user's data folder."""
    given = os.environ.get("AL_HOME")
    folder = Path(given) if given else user_data_path("anomaly-localization", appauthor=False)
    (folder / "leases").mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def connected(port: int = PORT) -> Iterator[str]:
    """The API's URL, also in PREFECT_API_URL: that of the environment, else of the local server.

    The local server may still be starting: import what the command needs, then `wait_for` it.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    given = os.environ.get("PREFECT_API_URL")
    if given:
        yield given
        return
    with _lease():
        url = start(port)
        os.environ["PREFECT_API_URL"] = url
        try:
            yield url
        finally:
            del os.environ["PREFECT_API_URL"]


@contextmanager
def _lease() -> Iterator[None]:
    """The server stays while this block runs."""
    file = home() / "leases" / str(os.getpid())
    file.write_text(str(psutil.Process().create_time()))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def start(port: int) -> str:
    """URL of the local server's API, started on this port (or a free one) if it is not running."""
    with FileLock(home() / "server.lock"):
        return _running() or _spawn_keeper(port)


def _running() -> str | None:
    """URL of a server whose keeper is alive."""
    with suppress(KeyError, psutil.Error):
        state = _state()
        if _lives(state["keeper"], state["since"]):
            return str(state["url"])
    return None


def _state() -> dict[str, Any]:
    """What is written of the last server: url, keeper, since; empty when it ended in order."""
    with suppress(OSError, ValueError):
        found = json.loads((home() / "server.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _spawn_keeper(wanted: int) -> str:
    port = _free_port(wanted)
    url = f"http://127.0.0.1:{port}/api"
    with (home() / "server.log").open("ab") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), str(port)],  # -P: no module of the user's folder
            cwd=home(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in the terminal ends the command, which ends the lease
        )
    since = psutil.Process(keeper.pid).create_time()
    (home() / "server.json").write_text(json.dumps({"url": url, "keeper": keeper.pid, "since": since}))
    return url


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise ServerError("no port is free on 127.0.0.1")


def wait_for(url: str) -> None:
    """Return when the API answers. Raises ServerError when it does not."""
    deadline = time.monotonic() + _START_WITHIN_S
    ours = _state().get("url") == url
    while time.monotonic() < deadline:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        if ours and _running() != url:
            raise ServerError(f"the local Prefect server ended while starting; its log is {home() / 'server.log'}")
        time.sleep(0.1)
    raise ServerError(
        f"the local Prefect server did not answer within {_START_WITHIN_S:.0f} s; its log is {home() / 'server.log'}. "
        "Or set PREFECT_API_URL to a server that runs already"
    )


def keep(port: int) -> None:
    """Own the server until no process with a lease is alive."""
    folder = home()
    environment = os.environ | {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",  # its console is server.log
    }
    # What `prefect server start` runs in the end, without the three seconds its command line takes to import.
    ours = ["--app-dir", str(Path(__file__).resolve().parent.parent), "--factory", "flows.server:application"]
    at = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", "--timeout-keep-alive", "5"]
    command = [sys.executable, "-m", "uvicorn", *ours, *at]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while server.poll() is None and _still_needed(folder):
            time.sleep(_LOOK_EVERY_S)
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()


def application() -> FastAPI:
    """Prefect's server, whose transactions on SQLite wait for their turn.

    Prefect lets a transaction read first and ask for the right to write when it comes to that. If another has written
    meanwhile, SQLite refuses at once, the API answers 503, and a client asks again after 2 s: a night waited so at its
    start, and a step of a sweep each few seconds. A transaction that asks when it begins waits for milliseconds.
    """
    from prefect.server.api.server import create_app
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    def begin_to_write(self: AioSqliteConfiguration, session: AsyncSession, with_for_update: bool = False) -> Any:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = begin_to_write  # type: ignore[method-assign]
    return create_app()


def _still_needed(folder: Path) -> bool:
    """Whether a process with a lease is alive; if not, no later command will take this server for running."""
    with FileLock(folder / "server.lock"):
        alive = [file for file in (folder / "leases").iterdir() if _alive(file)]
        if not alive:
            (folder / "server.json").unlink(missing_ok=True)
        return bool(alive)


def _alive(lease: Path) -> bool:
    with suppress(OSError, ValueError, psutil.Error):
        if _lives(int(lease.name), float(lease.read_text())):
            return True
    lease.unlink(missing_ok=True)
    return False


def _lives(number: int, since: float) -> bool:
    """Whether this very process runs; one that died stays in the table until its parent asks for its exit code."""
    process = psutil.Process(number)
    return process.create_time() == since and process.status() != psutil.STATUS_ZOMBIE


if __name__ == "__main__":
    keep(int(sys.argv[1]))
