"""`al serve`: a Prefect server with its UI, a worker, and the deployments, all on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flows.where import server
from flows.where.address import check_given

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.deployments.runner import RunnerDeployment
    from pydantic import BaseModel

POOL = "local"


def serve(port: int, console: Console) -> None:
    """Serve until Ctrl-C or SIGTERM; runs in progress end with the worker. Raises ServerError."""
    signal.signal(signal.SIGTERM, _interrupt)
    with server.connected(port) as url:
        check_given(url)
        server.wait_for(url)
        names = deploy(Path.cwd())
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--name", "local"],
            env=os.environ | {"PREFECT_WORKER_QUERY_SECONDS": "2"},
        )
        try:
            _greet(console, url, names)
            worker.wait()
        except KeyboardInterrupt:
            console.print("stopping")
        finally:
            worker.terminate()  # which the worker takes for Ctrl-C once it runs, and which ends it silently before
            with suppress(subprocess.TimeoutExpired):
                worker.wait(15)
            worker.kill()


def deploy(folder: Path) -> list[str]:
    """Create or renew the work pool and the deployments, which run in `folder`; their names."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    made = deployments(folder)
    for deployment in made:
        deployment.apply()
    return [f"{deployment.flow_name}/{deployment.name}" for deployment in made]


def deployments(folder: Path) -> list[RunnerDeployment]:
    """Each flow, with the demo's images as the values its form begins with; `infra/prefect.yaml` has the same."""
    from prefect.deployments.runner import EntrypointType

    from flows.benchmark import benchmark
    from flows.demo import demo_run, demo_search
    from flows.ingest import ingest
    from flows.nightly import nightly
    from flows.predict import predict
    from flows.report import report
    from flows.runs.predict import PredictRun
    from flows.runs.runfile import IngestRun, NightlyRun, ReportRun
    from flows.search import search

    demo = folder / "al-demo"
    places = {"store": str(demo / "store"), "report": str(demo / "report")}
    data = demo_run(**places).data
    new = PredictRun(
        model="demo/brick", images=[str(demo / "data" / "brick" / "test")], store=places["store"],
        out=str(demo / "predictions"),
    )  # fmt: skip
    offered: list[tuple[Flow[Any, Any], BaseModel, list[str], str]] = [
        (benchmark, demo_run(**places), ["comparison"],
         "Compare methods on data sets. The parameters are a run file's; the default is the demo."),
        (search, demo_search(**places), ["comparison"],
         "Choose parameters by synthetic defects in held-out good images, and compare the chosen."),
        (ingest, IngestRun(data=data, **places), ["data"],
         "Take data sets in and judge their images, with nothing learned from them."),
        (nightly, NightlyRun(data=data, **places), ["production"],
         "Refit each model on what is new, prove it against the one in use, and promote it or not."),
        (predict, new, ["production"],
         "Judge new images with a registered version of a model, such as a night's."),
        (report, ReportRun(**places), ["pages"],
         "Write the pages again from what a store holds; nothing is computed."),
    ]  # fmt: skip
    return [
        flow.to_deployment(
            "local",
            parameters={"run": run.model_dump()},
            tags=tags,
            description=description,
            work_pool_name=POOL,
            job_variables={"working_dir": str(folder)},
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for flow, run, tags, description in offered
    ]


def _greet(console: Console, url: str, names: list[str]) -> None:
    console.print(f"Prefect UI: {url.removesuffix('/api')}", highlight=False)
    console.print(f"In another terminal:  export PREFECT_API_URL={url}", highlight=False, soft_wrap=True)
    for name in names:
        console.print(f"  prefect deployment run '{name}' --watch", highlight=False)
    console.print("Stop with Ctrl-C.")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
