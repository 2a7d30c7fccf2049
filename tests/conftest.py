"""What tests share: one real Prefect server a session, small data, an S3 server, and the command as a user runs it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from flows.where import server

ROOT = Path(__file__).parent.parent
_Ended = tuple[int, str, str]
"""Exit code, output, errors."""
Command = Callable[..., _Ended]
AL = [sys.executable, "-c", "from flows.cli import main; main()"]
"""The command `al`, whether or not the checkout is installed."""
SECRET = "never-to-be-repeated"
"""What credentials of tests are, so that a test can look for them."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Before torch and Prefect are imported, which read these once: tests share few cores, and never touch the user's own
# history. The server itself starts with the first test that asks for `api`.
PORT = free_port()
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # which pytest-xdist sets, and a test that wants a wide terminal could not
os.environ.update(server.QUIET)
os.environ["PREFECT_LOGGING_ROOT_LEVEL"] = "WARNING"  # else a failed test drowns in what all libraries have to say
_PREFECT_HOME = tempfile.TemporaryDirectory(prefix="al-prefect-")
os.environ["PREFECT_HOME"] = _PREFECT_HOME.name
os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{PORT}/api"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


settings.register_profile("busy", deadline=None)  # tests share their cores: how long one takes says nothing of it
settings.load_profile("busy")


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    _PREFECT_HOME.cleanup()


class Together(LoadScopeScheduling):  # type: ignore[misc]
    """Tests that share something go to one process: a method's checks share its fits, a file's tests fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        return test.partition("[")[2].partition("-")[0] if test.startswith("test_contract[") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    """Our own, since the marks of `--dist=loadgroup` are lost between pytest 9.2 and pytest-xdist 3.8."""
    return Together(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The ten methods whose contract takes longest, which is to be five seconds of a core at most."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and "::test_contract[" in report.nodeid:
                seconds[report.nodeid.partition("[")[2].partition("-")[0]] += report.duration
    if len(seconds) > 1:
        slowest = ", ".join(f"{method} {spent:.1f}" for method, spent in seconds.most_common(10))
        terminalreporter.write_line(f"contracts that take longest, in seconds: {slowest}")


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a local Prefect server that lives as long as the session; all processes of the tests report to it."""
    from prefect.logging.handlers import APILogHandler

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # The server's keeper outlives the process that starts it, on purpose.
        warnings.filterwarnings("ignore", "subprocess .* is still running", ResourceWarning)
        patch.setenv("AL_HOME", str(tmp_path_factory.mktemp("al-home")))
        url = os.environ.pop("PREFECT_API_URL")
        with server.connected(PORT) as started:
            assert started == url, "another process took the port"
            server.wait_for(url)
            yield url
            APILogHandler().flush()  # what is still to be sent would find no server
        os.environ["PREFECT_API_URL"] = url


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three categories in the layout of MVTec AD: 6 training, 3 validation, 3 good and 4 anomalous images of 64 px."""
    from tasks.demo_data import make_demo_data

    root = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(root, train=6, validation=3, good=3, defects_per_type=1, size=64)
    return root


@pytest.fixture
def al(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, which has its imports behind it."""

    from flows.cli import main

    def run(*arguments: str) -> _Ended:
        monkeypatch.setattr(sys, "argv", ["al", *arguments])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket on a local S3 server, which the environment leads to, as it would to Amazon's."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print a line a request
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("NO_PROXY", host)
        patch.delenv("AWS_PROFILE", raising=False)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        bucket = f"bucket-{port}"  # what one server holds, the next of the same process finds
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}"
        _disconnect(s3fs.S3FileSystem)
    server.stop()


def _disconnect(kind: Any) -> None:
    """Close what s3fs and zarr leave open until the process ends; else its garbage warns in some later test."""
    from zarr.core.sync import _get_loop as zarr_loop

    for fs in kind._cache.values():
        if fs._s3 is not None:
            loop = zarr_loop() if fs.asynchronous else fs.loop
            asyncio.run_coroutine_threadsafe(fs._s3.close(), loop).result(timeout=10)
    kind.clear_instance_cache()


def eventually(true: Callable[[], object], within: float, every: float = 0.05) -> bool:
    """Whether it becomes true in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(every)
    return bool(true())


def answers(url: str) -> bool:
    """Whether a Prefect server runs there."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, what: str, question: dict[str, Any] | None = None) -> Any:
    """What the Prefect server says to a GET, or to a POST of a question."""
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(f"{url}/{what}", data, {"content-type": "application/json"})
    for _ in range(20):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            problem = f"{what}: {error} {error.read().decode()}"
            if error.code != 503:  # "try again", as while another process writes to SQLite; Prefect's own client does
                break
            time.sleep(0.5)
    raise AssertionError(problem)


def alone(home: Path) -> dict[str, str]:
    """Environment of a user whose history lies in `home` and who has no server."""
    ours = ("PREFECT_API_URL", *server.QUIET)
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"AL_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}


class DaskCluster:
    """A scheduler and workers as an administrator would start them: processes that outlive the runs on them."""

    def __init__(self, folder: Path, **environment: str) -> None:
        """Nothing is started yet; `environment` is what the processes have beside that of the tests."""
        self.folder, self.environment = folder, os.environ | environment
        self.host, self.port = "127.0.0.1", str(free_port())
        self.address = f"tcp://{self.host}:{self.port}"
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(30)

    def scheduler(self) -> subprocess.Popen[str]:
        """Start it, always at the same address."""
        return self._start("scheduler", "--host", self.host, "--port", self.port)

    def worker(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Start one: the process returned is its nanny, which replaces a worker that dies."""
        limit = () if "--memory-limit" in options else ("--memory-limit", "0")
        return self._start("worker", self.address, "--nthreads", "1", *limit, *options, **environment)

    def _start(self, what: str, *options: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dask", what, *options, "--dashboard-address", "127.0.0.1:0"]
        with self.log(what).open("a") as log:
            variables = self.environment | environment
            process = subprocess.Popen(command, cwd=self.folder, env=variables, stdout=log, stderr=log, text=True)
        self.processes.append(process)
        return process

    def log(self, what: str) -> Path:
        """What the scheduler, or all workers, said."""
        return self.folder / f"{what}.log"


def stop(process: subprocess.Popen[str]) -> None:
    """Make sure that a process of a test is gone."""
    if process.poll() is None:
        process.kill()
    process.communicate()
