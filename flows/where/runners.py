"""Where the steps run: threads of this process, processes of this machine, or a Dask cluster that is there already."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from prefect.context import FlowRunContext
from prefect.flows import Flow
from prefect.states import Completed, Failed, State
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

if TYPE_CHECKING:
    from flows.runs.runfile import Run

_CORES_PER_STEP = 4
"""Within a step torch, BLAS and faiss use several cores, so side by side pays only where there are many."""


class ThreadsRunner(ThreadPoolTaskRunner):  # type: ignore[type-arg]
    """Steps in threads of this process, which share its cores."""

    def __init__(self, workers: int | None = None, threads: int | None = None) -> None:
        """So many steps at once (few, unless `threads` says how little of the machine one takes), each on so many
        cores (an even share of all, unless the environment says otherwise)."""
        cores = os.cpu_count() or 1
        super().__init__(workers or max(1, cores // (threads or _CORES_PER_STEP)))
        self.workers, self.asked = workers, threads
        self.threads = threads or (None if "OMP_NUM_THREADS" in os.environ else max(1, cores // self._max_workers))

    def __eq__(self, other: object) -> bool:
        """Whether steps would run in the same way."""
        ways = [(runner._max_workers, runner.threads) for runner in (self, other) if isinstance(runner, ThreadsRunner)]
        return len(ways) == 2 and ways[0] == ways[1]

    def duplicate(self) -> Self:
        """The same, not started."""
        return type(self)(self.workers, self.asked)

    def steps_at_once(self) -> int:
        """Steps that can be under way."""
        return self._max_workers

    def __enter__(self) -> Self:
        """Before a step computes, torch is told how many cores are its own."""
        super().__enter__()
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return self


def runner_for(run: Run) -> TaskRunner[Any]:
    """`threads`, `dask` (processes of this machine) or the address of a scheduler, as the run asks."""
    if run.runner == "threads":
        return ThreadsRunner(run.workers, run.threads)
    from flows.where.cluster import ClusterRunner, LocalCluster, check_semaphores

    threads = run.threads or 1
    ours: dict[str, Any] = {"device": run.device, "threads": threads, "step_minutes": run.step_minutes}
    if run.runner != "dask":
        return ClusterRunner(**ours, address=run.runner)
    check_semaphores()
    gpus = _gpus(run.device)
    processes = run.workers or max(1, (os.cpu_count() or 1) // threads, gpus)
    return ClusterRunner(
        **ours,
        cluster_class=LocalCluster,
        cluster_kwargs={"processes": processes, "gpus": min(gpus, processes)},
    )


def _gpus(device: str) -> int:
    import torch

    return 0 if device == "cpu" else torch.cuda.device_count()


def running_on() -> Any:
    """What the steps of the running flow run on."""
    context = FlowRunContext.get()
    assert context is not None  # called from within a flow
    return context.task_runner


def in_processes() -> bool:
    """Whether they run in processes side by side."""
    return not isinstance(running_on(), ThreadPoolTaskRunner)


def on_asked_runner(flow: Flow[Any, Any], run: Run) -> State[Any] | None:
    """The end of the running flow on the runner that the run asks for; None when it is on that one already."""
    runner = runner_for(run)
    if runner == running_on():
        return None
    inner = flow.with_options(task_runner=runner)(run, return_state=True)
    outcome = inner.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    # A state of our own: Prefect would sum up one that has a run as `All states completed`.
    return (Failed if inner.is_failed() else Completed)(data=outcome, message=inner.message)
