"""What a machine may bring: proxies, servers that are gone, folders that take no files. One line each, soon."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import AL, Command, alone, eventually, free_port, stop

from flows.where import server
from flows.where.address import problem

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
NOBODY = "http://127.0.0.1:9"


def error_of(err: str) -> str:
    """The only line that is said."""
    (line,) = err.strip().splitlines()
    return line.removeprefix("error: ")


# proxies


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any."""
    for name in list(os.environ):
        if name.lower() in PROXIES:
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("kept", "intranet", "world"),
    [
        ({}, False, False),
        ({"no_proxy": "intranet"}, True, False),
        ({"NO_PROXY": " other , intranet,[::1],::1/128", "no_proxy": ""}, True, False),
        ({"no_proxy": "*"}, True, True),
    ],
    ids=["none", "lower case", "upper case, and what httpx cannot read", "all"],
)
def test_programs_of_this_machine_are_asked_without_a_proxy(
    name: str, kept: dict[str, str], intranet: bool, world: bool, no_proxies: pytest.MonkeyPatch
) -> None:
    for variable, value in {name: NOBODY, **kept}.items():
        no_proxies.setenv(variable, value)
    server.unproxied()
    with httpx.Client() as client:  # as Prefect's
        direct = client._transport
        for host in ("127.0.0.1", "localhost", "[::1]"):
            for scheme in ("http", "https"):
                assert client._transport_for_url(httpx.URL(f"{scheme}://{host}:4200")) is direct
    for host in ("127.0.0.1", "localhost", "::1"):  # as websockets asks
        assert urllib.request.proxy_bypass(f"{host}:4200")
    assert bool(urllib.request.proxy_bypass("intranet")) == intranet
    assert bool(urllib.request.proxy_bypass("example.org")) == world
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]


def test_without_a_proxy_nothing_is_set(no_proxies: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    server.unproxied()
    assert dict(os.environ) == before


@pytest.mark.usefixtures("api")
def test_a_command_runs_behind_a_proxy(demo_root: Path, tmp_path: Path) -> None:
    network = {"HTTP_PROXY": NOBODY, "https_proxy": NOBODY, "all_proxy": "socks://127.0.0.1:9", "no_proxy": "intranet"}
    places = ["--store", str(tmp_path / "store"), "--report", str(tmp_path / "report")]
    data = ["--root", str(demo_root), "--category", "brick", "--no-data-docs", "--rule", "suspected_defect=off"]
    command = [*AL, "ingest", "mvtec_ad", *data, *places]
    ended = subprocess.run(command, env=os.environ | network, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0, ended.stderr
    told = ended.stderr.strip().splitlines()
    assert told[0] == "all_proxy is left out: it is no address of a proxy, or needs pip install 'httpx[socks]'"
    assert any(line.startswith("watch at ") for line in told)
    assert "event" not in ended.stderr.lower(), "an event could not be sent"


# a server of the environment


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        api = self.path.startswith("/api/") or self.path == "/ill/health"
        self.send_response(503 if self.path == "/ill/health" else 200)
        self.end_headers()
        self.wfile.write(b"true" if api else b"<!doctype html>")  # as Prefect's interface does, whatever is asked

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """Address of a server that has an API below `api`, and pages elsewhere."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{it.server_port}"
        it.shutdown()


def test_an_api_that_answers_is_no_problem(page: str) -> None:
    assert problem(f"http://{page}/api", 0) is None
    assert problem(f"http://{page}/api/", 0) is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/api", "http://127.0.0.1:9/api (PREFECT_API_URL): Connection refused; start it, give"),
        ("http://me:secret@127.0.0.1:9/api", "at http://127.0.0.1:9/api (PREFECT_API_URL)"),
        ("http://none.invalid:4200/api", "at http://none.invalid:4200/api (PREFECT_API_URL): "),
        ("127.0.0.1:4200/api", "that is no address; expected is http://HOST:PORT/api"),
        ("ftp://127.0.0.1/api", "that is no address"),
        ("http://127.0.0.1:port/api", "that is no address"),
        ("https://{page}/api", "does not speak https; try http://"),
        ("http://{page}", "its path is missing; export PREFECT_API_URL=http://{page}/api"),
        ("http://{page}/", "its path is missing; export PREFECT_API_URL=http://{page}/api"),
        ("http://{page}/other/api", "what answers there is something else; give the address of a Prefect server"),
        ("http://{page}/ill", "it is answered with 503"),
    ],
)
def test_an_address_that_no_server_answers_at_is_named_with_what_is_wrong(url: str, message: str, page: str) -> None:
    told = problem(url.format(page=page), 0)
    assert told is not None
    assert message.format(page=page) in told
    assert "secret" not in told


def test_who_says_nothing_is_waited_for_a_little() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        told = problem(f"http://127.0.0.1:{silent.getsockname()[1]}/api", 0)
    assert told is not None
    assert "it says nothing" in told
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("command", ["ingest", "alarms"])
def test_a_server_that_is_gone_is_named_soon(
    command: str, al: Command, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.setattr("flows.where.address._WITHIN_S", 0)
    places = ["--store", str(tmp_path / "store"), "--report", str(tmp_path / "report")]
    options = {"ingest": ["mvtec_ad", "--root", str(demo_root), *places], "alarms": ["http://hook.example"]}
    code, _, err = al(command, *options[command])
    assert code == 2
    assert error_of(err).startswith(f"no Prefect server answers at {url} (PREFECT_API_URL): Connection refused; ")


# the history's folder


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("AL_HOME", "/proc/none"), ("AL_HOME", "{file}"), ("HOME", "/proc/none")],  # nothing is read-only to root
    ids=["AL_HOME on a system that takes no folders", "AL_HOME a file", "HOME missing"],
)
def test_a_home_that_takes_no_files_is_one_line(variable: str, folder: str, demo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = {"AL_HOME": "", variable: folder.format(file=tmp_path / "file")}
    places = ["--store", str(tmp_path / "store"), "--report", str(tmp_path / "report")]
    environment = {
        name: value for name, value in alone(tmp_path).items() if name not in ("PREFECT_HOME", "XDG_DATA_HOME")
    }
    command = [*AL, "ingest", "mvtec_ad", "--root", str(demo_root), *places]
    ended = subprocess.run(command, env=environment | home, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    told = error_of(ended.stderr)
    assert told.startswith("the folder of the history of runs, ")
    assert folder.format(file=tmp_path / "file") in told
    assert "set AL_HOME to a folder that can, or PREFECT_API_URL" in told


def test_without_a_home_the_history_lies_where_al_home_says(tmp_path: Path) -> None:
    code = "from flows.cli import _give_prefect_a_home as give; give()"
    code += "; from prefect.settings import PREFECT_HOME; print(PREFECT_HOME.value())"
    environment = {name: value for name, value in alone(tmp_path).items() if name != "PREFECT_HOME"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment | {"HOME": "/proc/none"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.stdout.strip() == str(tmp_path / "prefect"), ended.stderr


# Ctrl-C


@pytest.mark.usefixtures("api")
def test_a_second_ctrl_c_ends_the_command_on_the_spot(demo_root: Path, tmp_path: Path) -> None:
    places = ["--store", str(tmp_path / "store"), "--report", str(tmp_path / "report")]
    options = ["--method", "dfr", "--param", "dfr.image_size=64", "--param", "dfr.epochs=100000"]
    command = [*AL, "benchmark", "--data", f"mvtec_ad={demo_root}", "--category", "brick", *options, *places]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("watch at ")
        assert eventually(lambda: list(tmp_path.glob("store/images/*")), within=60)  # it is at work
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    finally:
        stop(process)
    assert process.returncode == 130, said
    assert said == ""


def test_a_second_ctrl_c_while_python_goes_down_changes_no_exit_code(tmp_path: Path) -> None:
    late = """
import os, signal, sys
from flows import cli

class Late:
    def __del__(self):  # Python's handlers are gone by then
        os.kill(os.getpid(), signal.SIGINT)

late = Late()
cli.app = lambda: os.kill(os.getpid(), signal.SIGINT)
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")


# /dev/shm


@pytest.mark.usefixtures("api")
def test_a_sealed_dev_shm_is_one_line_with_the_runner_dask(demo_root: Path, tmp_path: Path) -> None:
    sealed = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro none /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*sealed, "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    places = ["--store", str(tmp_path / "store"), "--report", str(tmp_path / "report")]
    command = [*AL, "ingest", "mvtec_ad", "--root", str(demo_root), "--runner", "dask", *places]
    ended = subprocess.run([*sealed, *command], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    told = error_of(ended.stderr)
    assert told.startswith("the runner dask cannot start processes: they need semaphores, which lie in /dev/shm (Read-")
    assert told.endswith("or use the runner threads")
