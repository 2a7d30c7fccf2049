"""Where the steps run: threads of this process, processes of this machine, or a Dask cluster that is there already."""

from __future__ import annotations

import os
from typing import Any

from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

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
