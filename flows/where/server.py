"""The local Prefect server: one a user, started when a command needs it, gone when the last command has ended.

Commands register a lease (a file named by their process) and share one server, whose history stays in the user's data
folder. A keeper process owns the server and stops it when no process with a lease is alive, so that not even a killed
command leaves a server behind.
"""

from __future__ import annotations

import json
import logging
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
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock
from platformdirs import user_data_path

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

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
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # an event that could not be sent would be printed as an object
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # a step called outside of a flow has nowhere to log to
    "DASK_LOGGING__DISTRIBUTED": "warning",
}
"""Set for every process of ours, unless the user has set them."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_local: set[str] = set()
"""Addresses of local servers that this process has asked for."""


class ServerError(RuntimeError):
    """No Prefect server is there for the command."""


def home() -> Path:
    """Where the history of runs lies: AL_HOME, or the user's data folder. Raises ServerError where there is no room."""
    given = os.environ.get("AL_HOME")
    folder = Path(given).expanduser() if given else user_data_path("anomaly-localization", appauthor=False)
    folder = folder.absolute()  # the keeper works elsewhere
    with _at(folder):
        (folder / "leases").mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _at(folder: Path) -> Iterator[None]:
    """Raises ServerError, which names AL_HOME, when the folder cannot be written."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter of locks
        reason = getattr(error, "strerror", None) or error
        raise ServerError(
            f"the folder of the history of runs, {folder}, cannot be written ({reason}); set AL_HOME to a folder that "
            "can, or PREFECT_API_URL to a server that runs already"
        ) from error


def unproxied() -> None:
    """Have this process, and those it starts, ask programs of this machine without a proxy.

    A proxy of the environment (http_proxy, ...) is for other machines; asked for 127.0.0.1, it looks on its own. What
    the client of Prefect and of downloads (httpx) cannot read is left out and told: it would fail for all addresses.
    """
    proxies = {name: url for name, url in os.environ.items() if name.lower() in _PROXIES and url}
    if not proxies:
        return  # a no_proxy of ours would hide the proxies that macOS and Windows have been told
    for name, url in proxies.items():
        if not _is_proxy(url):
            logger.warning("%s is left out: it is no address of a proxy, or needs pip install 'httpx[socks]'", name)
            del os.environ[name]
    given = [value for name, value in os.environ.items() if name.lower() == "no_proxy"]
    hosts = dict.fromkeys(host.strip().strip("[]") for value in given for host in value.split(","))
    unread = [host for host in hosts if not _is_host(host)]
    if unread:
        logger.warning("left out of no_proxy, since they are no names of hosts or addresses: %s", ", ".join(unread))
    kept = dict.fromkeys(host for host in [*hosts, *LOOPBACK] if host and host not in unread)
    # A star means all hosts only where it stands alone.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*" if "*" in kept else ",".join(kept)


def _is_proxy(url: str) -> bool:
    import httpx

    try:
        httpx.Client(proxy=url if "://" in url else f"http://{url}", trust_env=False).close()
    except (ImportError, ValueError, httpx.InvalidURL):
        return False
    return True


def _is_host(text: str) -> bool:
    import httpx

    with suppress(ValueError):
        return bool(ip_address(text))
    try:
        return bool(httpx.URL(f"all://*{text}"))
    except httpx.InvalidURL:
        return False


@contextmanager
def connected(port: int = PORT) -> Iterator[str]:
    """The API's URL, also in PREFECT_API_URL: that of the environment, else of the local server.

    The local server may still be starting: import what the command needs, then `wait_for` it.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    unproxied()
    given = os.environ.get("PREFECT_API_URL")
    if given:
        yield given
        return
    with _lease():
        url = start(port)
        _local.add(url)
        os.environ["PREFECT_API_URL"] = url
        try:
            yield url
        finally:
            _local.discard(url)
            del os.environ["PREFECT_API_URL"]


@contextmanager
def _lease() -> Iterator[None]:
    """The server stays while this block runs."""
    file = home() / "leases" / str(os.getpid())
    with _at(home()):
        file.write_text(str(psutil.Process().create_time()))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def start(port: int) -> str:
    """URL of the local server's API, started on this port (or a free one) if it is not running."""
    with _at(home()), FileLock(home() / "server.lock"):
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
            env=os.environ | {"AL_HOME": str(home())},
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


def is_local(url: str) -> bool:
    """Whether this process has asked for a local server, which may still be starting there."""
    return url in _local


def wait_for(url: str) -> None:
    """Return when the local server answers; another is `flows.where.address`'s business. Raises ServerError."""
    if not is_local(url):
        return
    deadline = time.monotonic() + _START_WITHIN_S
    while time.monotonic() < deadline:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        if _running() != url:
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
    ours = ["--app-dir", str(Path(__file__).resolve().parents[2]), "--factory", "flows.where.server:application"]
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
