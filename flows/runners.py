"""Where the steps run: threads of this process, processes of this machine, or a Dask cluster that is there already."""

from __future__ import annotations

import os
from typing import Any

from prefect.context import FlowRunContext
from prefect.flows import Flow
from prefect.states import Completed, Failed, State
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.runfile import IngestRun, RunFile

_CORES_PER_STEP = 4
"""Torch, BLAS and faiss use all cores within a step, so threads pay only where there are many."""


def runner_for(name: str, workers: int | None = None) -> TaskRunner[Any]:
    """`threads`, `dask` (a local cluster, one core a process) or the address of a scheduler."""
    cores = os.cpu_count() or 1
    if name == "threads":
        return ThreadPoolTaskRunner(max_workers=workers or max(1, cores // _CORES_PER_STEP))
    from prefect_dask import DaskTaskRunner

    if name != "dask":
        return DaskTaskRunner(address=name)
    processes = workers or cores
    return DaskTaskRunner(
        cluster_kwargs={
            "n_workers": processes,
            "threads_per_worker": 1,
            "dashboard_address": ":0",  # any free port: a second cluster on this machine is no trouble
            "memory_limit": "auto",
        }
    )


def on_asked_runner(flow: Flow[Any, Any], run: RunFile | IngestRun) -> State[Any] | None:
    """The end of the running flow on the runner that the run asks for; None when it is on that one already."""
    context = FlowRunContext.get()
    assert context is not None  # called from within a flow
    runner = runner_for(run.runner, run.workers)
    if runner == context.task_runner:
        return None
    inner = flow.with_options(task_runner=runner)(run, return_state=True)
    outcome = inner.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    # A state of our own: Prefect would sum up one that has a run as `All states completed`.
    return (Failed if inner.is_failed() else Completed)(data=outcome, message=inner.message)
