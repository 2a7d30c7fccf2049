"""The local Prefect server: shared, kept as long as a command needs it, gone afterwards, its history kept."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import alone, answers, ask, eventually, free_port, stop

from flows.where import server

COMMAND = """
import sys
from flows.where import server
with server.connected(int(sys.argv[1])) as url:
    server.wait_for(url)
    print(url, flush=True)
    sys.stdin.read()
"""
"""Stands for any command of ours: connects, then works until its input ends."""

NETWORK = {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "socks://127.0.0.1:9", "NO_PROXY": "intranet.example"}
"""As in a company whose machines ask others through a proxy; nobody listens at this one."""

Start = Callable[[Path, int], "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start a command that uses the server of a home, on a port if it is free."""
    with ExitStack() as stack:

        def command(home: Path, port: int) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(port)],
                env=alone(home) | NETWORK,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(stop, process)
            return process

        yield command


def url_of(command: subprocess.Popen[str]) -> str:
    """Where the command found its server, once that answers."""
    assert command.stdout is not None
    return command.stdout.readline().strip()


def finish(command: subprocess.Popen[str]) -> int:
    """End the command as it ends by itself; its exit code."""
    command.communicate("", timeout=30)
    return command.returncode


def runs_still(process: psutil.Process) -> bool:
    """Whether it is at work; in some containers nobody clears away processes whose parent has gone."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def runs(url: str) -> int:
    """How many flow runs the history holds."""
    return int(ask(url, "flow_runs/count", {}))


def status(url: str, question: dict[str, object]) -> int:
    """Of the answer to a POST; one that is refused is not asked again."""
    data = json.dumps(question).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def answers_to_many_writers(url: str) -> list[int]:
    """As when steps on several workers ask whether they may begin."""
    ask(url, "v2/concurrency_limits/", {"name": "places", "limit": 1000})
    with ThreadPoolExecutor(4) as pool:
        places = {"names": ["places"], "slots": 1}
        return list(pool.map(lambda _: status(f"{url}/v2/concurrency_limits/increment", places), range(100)))


@dataclass(frozen=True)
class Life:
    """What was seen of a server that two commands shared; the last of them was killed."""

    home: Path
    port: int
    urls: list[str]
    keepers: int
    first_left: int
    outlived_the_first: bool
    gone: bool
    port_is_free: bool
    runs: int
    answers: list[int]
    """Of many requests that read and then write, several at a time."""


@pytest.fixture(scope="module")
def life(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """Two commands at once on a new home, from the first start to the end of the last."""
    home, port = tmp_path_factory.mktemp("home"), free_port()
    commands = [start(home, port), start(home, port)]
    urls = [url_of(command) for command in commands]
    keeper = psutil.Process(json.loads((home / "server.json").read_text())["keeper"])
    owned = keeper.children()
    leases = len(list((home / "leases").iterdir()))
    flow = ask(urls[0], "flows/", {"name": "benchmark"})
    ask(urls[0], "flow_runs/", {"flow_id": flow["id"], "state": {"type": "COMPLETED"}})
    counted, answered = runs(urls[0]), answers_to_many_writers(urls[0])

    first_left = finish(commands[0])
    ended = eventually(lambda: not runs_still(keeper), within=3 * server._LOOK_EVERY_S)
    outlived = not ended and answers(urls[0])
    commands[1].send_signal(signal.SIGKILL)
    gone = eventually(lambda: not any(runs_still(process) for process in (keeper, *owned)), within=30)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free = probe.connect_ex(("127.0.0.1", port)) != 0
    return Life(home, port, urls, leases, first_left, outlived, gone, free, counted, answered)


def test_commands_share_one_server(life: Life) -> None:
    assert life.urls == [f"http://127.0.0.1:{life.port}/api"] * 2
    assert life.keepers == 2


def test_writers_wait_for_each_other_and_are_not_sent_away(life: Life) -> None:
    assert life.answers == [200] * 100


def test_it_stays_for_the_last_command_and_goes_when_that_is_killed(life: Life) -> None:
    assert life.first_left == 0
    assert life.outlived_the_first
    assert life.gone
    assert life.port_is_free
    assert not (life.home / "server.json").exists()
    assert list((life.home / "leases").iterdir()) == []


def test_history_outlives_the_server_and_a_port_taken_is_no_trouble(life: Life, start: Start) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", life.port))
        other.listen()
        command = start(life.home, life.port)
        url = url_of(command)
    assert url != life.urls[0]
    assert runs(url) == life.runs == 1
    assert finish(command) == 0
    assert eventually(lambda: not answers(url), within=30)


def test_a_server_that_cannot_start_says_where_its_log_is(start: Start, tmp_path: Path) -> None:
    (tmp_path / "prefect.db").mkdir()  # a folder where the history should be
    command = start(tmp_path, free_port())
    _, err = command.communicate(timeout=90)
    assert command.returncode == 1
    log = tmp_path / "server.log"
    assert f"ServerError: the local Prefect server ended while starting; its log is {log}" in err
    assert "unable to open database file" in log.read_text()


def test_a_server_that_is_silent_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, keeper = f"http://127.0.0.1:{free_port()}/api", psutil.Process()
    state = {"url": url, "keeper": keeper.pid, "since": keeper.create_time()}
    (tmp_path / "server.json").write_text(json.dumps(state))
    monkeypatch.setenv("AL_HOME", str(tmp_path))
    monkeypatch.setattr(server, "_local", {url})
    monkeypatch.setattr(server, "_START_WITHIN_S", 0.3)
    with pytest.raises(server.ServerError, match=r"did not answer within .* set PREFECT_API_URL to a server that runs"):
        server.wait_for(url)


def test_the_server_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AL_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example/api")
    with server.connected() as url:
        assert url == "https://prefect.example/api"
    assert list(tmp_path.iterdir()) == []
