"""`al serve` as people use it: server, worker, a deployment that runs from the UI or by the clock, and a clean end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import AL, alone, answers, ask, eventually, free_port, stop


@dataclass
class Served:
    """A running `al serve`."""

    url: str
    folder: Path
    process: subprocess.Popen[str]

    @property
    def said(self) -> str:
        """Everything the terminal shows."""
        return (self.folder / "terminal").read_text()

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Prefect's own command line, from another terminal."""
        return subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            env=alone(self.folder / "home") | {"PREFECT_API_URL": self.url, "COLUMNS": "200"},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    @cached_property
    def cron(self) -> str:
        """Id of a deployment that is due every minute (and that no worker runs)."""
        flow = ask(self.url, "flows/name/benchmark")
        schedules = [{"schedule": {"cron": "* * * * *"}, "active": True}]
        deployment = ask(self.url, "deployments/", {"name": "cron", "flow_id": flow["id"], "schedules": schedules})
        return str(deployment["id"])


def start(folder: Path) -> Served:
    """`al serve`, ready."""
    port = free_port()
    with (folder / "terminal").open("w") as terminal:
        process = subprocess.Popen(
            [*AL, "serve", "--port", str(port)],
            env=alone(folder / "home"),
            cwd=folder,
            stdout=terminal,
            stderr=terminal,
            text=True,
        )
    served = Served(f"http://127.0.0.1:{port}/api", folder, process)
    ready = eventually(lambda: process.poll() is not None or "Stop with Ctrl-C" in served.said, within=120)
    assert ready, served.said
    assert process.poll() is None, served.said
    return served


def end(served: Served, number: signal.Signals) -> tuple[int, list[psutil.Process]]:
    """Signal `al serve` and nobody else; its exit code, and what is still there of all it started."""
    keeper = psutil.Process(json.loads((served.folder / "home" / "server.json").read_text())["keeper"])
    family = psutil.Process(served.process.pid).children(recursive=True)
    family += [keeper, *keeper.children(recursive=True)]
    served.process.send_signal(number)
    code = served.process.wait(30)
    _, alive = psutil.wait_procs(family, timeout=30)
    return code, alive


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One `al serve` for the tests below, in order."""
    found = start(tmp_path_factory.mktemp("served"))
    try:
        assert found.cron  # due while the other tests run
        yield found
    finally:
        stop(found.process)


@pytest.fixture(scope="module")
def run(served: Served, demo_root: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A small benchmark asked for as a user would: the command's end, and the flow run."""
    parameters = {
        "data": [{"dataset": "mvtec_ad", "root": str(demo_root), "categories": ["brick"]}],
        "methods": [{"name": "padim", "params": {"image_size": 64, "channels": 10}}],
        "store": str(served.folder / "store"),
        "report": str(served.folder / "report"),
    }
    asked = served.prefect("deployment", "run", "benchmark/local", "-p", f"run={json.dumps(parameters)}", "--watch")
    runs = ask(served.url, "flow_runs/filter", {"flow_runs": {"deployment_id": {"is_null_": False}}})
    (found,) = [run for run in runs if not run["auto_scheduled"]]
    return asked, found


def test_the_terminal_says_what_to_do(served: Served) -> None:
    assert f"Prefect UI: {served.url.removesuffix('/api')}" in served.said
    assert f"export PREFECT_API_URL={served.url}" in served.said
    assert "prefect deployment run 'benchmark/local' --watch" in served.said


def test_deployments_are_listed(served: Served) -> None:
    listed = served.prefect("deployment", "ls")
    assert listed.returncode == 0, listed.stderr  # HTTP 422 with fastapi 0.151 and later
    assert "benchmark/local" in listed.stdout


def test_a_deployment_runs_to_its_report(
    served: Served, run: tuple[subprocess.CompletedProcess[str], dict[str, Any]]
) -> None:
    asked, flow_run = run
    assert asked.returncode == 0, asked.stdout + asked.stderr + served.said
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["name"] == "benchmark mvtec_ad/brick: padim"
    assert "padim" in (served.folder / "report" / "index.html").read_text()


def test_the_ui_shows_steps_artifacts_and_what_the_steps_say(
    served: Served, run: tuple[subprocess.CompletedProcess[str], dict[str, Any]]
) -> None:
    of_run = {"flow_runs": {"id": {"any_": [run[1]["id"]]}}}
    steps = {task["name"] for task in ask(served.url, "task_runs/filter", of_run)}
    assert {"fit padim mvtec_ad/brick seed 0", "prepare mvtec_ad/brick", "report"} <= steps
    artifacts = {item["key"]: item for item in ask(served.url, "artifacts/filter", of_run)}
    assert set(artifacts) == {"benchmark", "results", "maps-padim-mvtec-ad-brick-0", "report"}
    assert artifacts["benchmark"]["data"] == 100.0
    assert "padim" in artifacts["results"]["data"]
    assert "data:image/jpeg;base64," in artifacts["maps-padim-mvtec-ad-brick-0"]["data"]
    assert str(served.folder / "report" / "index.html") in artifacts["report"]["data"]

    logs = ask(served.url, "logs/filter", {"logs": {"flow_run_id": {"any_": [run[1]["id"]]}}})
    said = {(line["name"], line["message"]) for line in logs}
    assert ("tasks.validate", "mvtec_ad/brick: 16 images accepted, 0 rejected") in said
    assert not any(name.startswith("httpx") for name, _ in said), "only what our steps say, and Prefect"
    assert "images accepted" not in served.said, "the terminal stays quiet"


@pytest.mark.usefixtures("run")
def test_the_pages_are_written_again_by_a_deployment(served: Served) -> None:
    page = served.folder / "report" / "index.html"
    page.unlink()
    deployment = ask(served.url, "deployments/name/report/local")
    assert deployment["tags"] == ["pages"]
    places = {"store": str(served.folder / "store"), "report": str(page.parent)}
    asked = {"state": {"type": "SCHEDULED"}, "parameters": {"run": places}}
    id = ask(served.url, f"deployments/{deployment['id']}/create_flow_run", asked)["id"]
    assert eventually(lambda: ask(served.url, f"flow_runs/{id}")["state_type"] == "COMPLETED", within=90, every=0.5)
    assert "padim" in page.read_text()


def test_nobody_else_can_reach_it(served: Served) -> None:
    family = [psutil.Process(served.process.pid)]
    family += family[0].children(recursive=True)
    found = [one for process in family if process.is_running() for one in process.net_connections("inet")]
    assert {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_a_deployment_with_a_schedule_gets_its_runs_by_itself(served: Served) -> None:
    question = {"deployments": {"id": {"any_": [served.cron]}}}

    def scheduled() -> bool:
        runs = ask(served.url, "flow_runs/filter", question)
        return any(run["auto_scheduled"] and run["state_type"] == "SCHEDULED" for run in runs)

    assert eventually(scheduled, within=75, every=1), "no run was scheduled: is sqlalchemy 2.1 or later installed?"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_it_ends_whole(served: Served) -> None:
    assert end(served, signal.SIGTERM) == (0, [])
    assert not answers(served.url)
    assert "Traceback" not in served.said
    again = start(served.folder)
    try:
        assert "benchmark/local" in {f"benchmark/{d['name']}" for d in ask(again.url, "deployments/filter", {})}
        assert end(again, signal.SIGINT) == (0, [])  # while its worker is still starting
        assert "Traceback" not in again.said
    finally:
        stop(again.process)
