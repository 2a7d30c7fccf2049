"""`al serve`: a Prefect server with its UI, a worker, and the deployments, all on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from flows import server

POOL = "local"


def serve(port: int, console: Console) -> None:
    """Serve until Ctrl-C or SIGTERM; runs in progress end with the worker. Raises ServerError."""
    signal.signal(signal.SIGTERM, _interrupt)
    with server.connected(port) as url:
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
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import EntrypointType
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    from flows.benchmark import benchmark
    from flows.demo import demo_run, demo_search
    from flows.ingest import ingest
    from flows.nightly import nightly
    from flows.predict import predict
    from flows.runfile import IngestRun, NightlyRun
    from flows.search import search

    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    common: dict[str, Any] = {
        "name": "local",
        "work_pool_name": POOL,
        "entrypoint_type": EntrypointType.MODULE_PATH,
        "job_variables": {"working_dir": str(folder)},
    }
    places = {"store": str(folder / "al-demo" / "store"), "report": str(folder / "al-demo" / "report")}
    run = demo_run(**places)
    deployments = [
        benchmark.to_deployment(
            description="Compare methods on data sets. The parameters are a run file's; the default is the demo.",
            parameters={"run": run.model_dump()},
            **common,
        ),
        search.to_deployment(
            description="Choose parameters by synthetic defects in held-out good images, and compare the chosen.",
            parameters={"run": demo_search(**places).model_dump()},
            **common,
        ),
        ingest.to_deployment(
            description="Take data sets in and judge their images, with nothing learned from them.",
            parameters={"run": IngestRun(data=run.data, store=run.store, report=run.report).model_dump()},
            **common,
        ),
        nightly.to_deployment(
            description="Refit each model on what is new, prove it against the one in use, and promote it or not.",
            parameters={"run": NightlyRun(data=run.data, store=run.store, report=run.report).model_dump()},
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
            tags=["nightly"],
            **common,
        ),
        predict.to_deployment(description="Judge images with a registered version of a model.", **common),
    ]
    for deployment in deployments:
        deployment.apply()
    return [f"{deployment.flow_name}/{deployment.name}" for deployment in deployments]


def _greet(console: Console, url: str, names: list[str]) -> None:
    console.print(f"Prefect UI: {url.removesuffix('/api')}", highlight=False)
    console.print(f"In another terminal:  export PREFECT_API_URL={url}", highlight=False, soft_wrap=True)
    for name in names:
        console.print(f"  prefect deployment run '{name}' --watch", highlight=False)
    console.print("Stop with Ctrl-C.")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
