"""A Dask cluster as our steps need it: the same code everywhere, GPU steps where GPUs are, cores shared out."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import ssl
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import dask
import torch
from distributed import Client, Nanny, Scheduler, SpecCluster, Worker, WorkerPlugin, get_worker
from distributed.system import MEMORY_LIMIT
from prefect.client import orchestration
from prefect.context import SettingsContext, get_settings_context
from prefect_dask import DaskTaskRunner
from prefect_dask.task_runners import PrefectDaskFuture

from flows.where.errors import ClusterError
from flows.where.server import unproxied
from tasks.core.limits import allow
from tasks.core.steps import GPU
from tasks.evaluate import versions

logger = logging.getLogger(__name__)

_PACKAGES = ("al_models", "flows", "storage", "tasks")
_LOOK_EVERY_S = 10.0
_FIRST_WORKER_S = 120.0
_LOST_S = 600.0
# Whoever reaches a scheduler or a worker can run code on it.
_LOOPBACK = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}

# Dask keeps the last 1,000 messages to the scheduler and to each worker for its developers to read. A step is one to
# each, with all that Prefect sends along: 0.7 MB a cell. A length that the user has set stays.
dask.config.update_defaults({"distributed": {"admin": {"low-level-log-length": 20}}})


class ClusterRunner(DaskTaskRunner):
    """Prefect tasks on Dask workers that run the code of this process."""

    def __init__(
        self, *, device: str = "auto", threads: int = 1, step_minutes: float | None = None, **of_dask: Any
    ) -> None:
        """`threads`: cores that a step computes with; `step_minutes`: after which it is taken for hung. Steps with the
        tag `gpu` take a GPU slot, unless `device` is `cpu` or no worker offers one."""
        super().__init__(**of_dask)
        self.device, self.threads, self.step_minutes = device, threads, step_minutes
        self._looked = -_LOOK_EVERY_S
        self._workers: list[dict[str, Any]] = []

    def __eq__(self, other: object) -> bool:
        """Whether it is the same cluster, used in the same way."""
        return isinstance(other, ClusterRunner) and self._ours() == other._ours() and super().__eq__(other)

    def _ours(self) -> dict[str, Any]:
        return {"device": self.device, "threads": self.threads, "step_minutes": self.step_minutes}

    def duplicate(self) -> Self:
        """The same, not started."""
        return type(self)(
            **self._ours(),
            address=self.address,
            cluster_class=self.cluster_class,
            cluster_kwargs=self.cluster_kwargs,
            client_kwargs=self.client_kwargs,
        )

    def __enter__(self) -> Self:
        """Start or join the cluster. Raises ClusterError when a worker runs other code than this process.

        Around each step Prefect enters a copy on the worker, too: there it stays as it is, since steps submit nothing.
        """
        super().__enter__()
        if _in_step():
            return self
        try:
            join(self._connected(), self.threads, self.step_minutes)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _connected(self) -> Client:
        try:
            return self.client
        except (OSError, RuntimeError) as error:
            if self.address is None:
                raise ClusterError(
                    f"the processes of the runner dask did not start ({error.__cause__ or error}); see to what this "
                    "machine allows (memory, processes, open files), or use the runner threads"
                ) from error
            if not isinstance(error, OSError):
                raise
            raise ClusterError(
                f"no Dask scheduler answers at {self.address} ({error}); start one with `dask scheduler` and its "
                "workers with `dask worker`, or use the runner dask, which starts its own"
            ) from error

    def rejoin(self) -> None:
        """Go on after the scheduler was lost: wait for it and for a worker. Raises ClusterError when none comes."""
        logger.warning("the scheduler %s was lost; waiting for it", self.address)
        deadline = time.monotonic() + _LOST_S
        while self.client.status != "running":
            if time.monotonic() > deadline:
                raise ClusterError(f"the scheduler {self.address} was lost and did not come back in {_LOST_S:.0f} s")
            if self.client.status == "closed":  # Dask has given up
                self._client = None
            with suppress(ClusterError):
                self._connected()
            time.sleep(1)
        self._looked = -_LOOK_EVERY_S
        join(self.client, self.threads, self.step_minutes)

    def submit(self, task: Any, parameters: Any, wait_for: Any = None, dependencies: Any = None) -> Any:
        """Like Prefect's, with a GPU slot where the step wants one."""
        with _SettingsAsTheyAre(**dict(get_settings_context())):
            future = self.client.submit(
                task,
                parameters=self._optimize_futures(parameters),
                wait_for=self._optimize_futures(wait_for) if wait_for else None,
                dependencies=dependencies,
                return_type="state",
                key=f"{task.name}-{uuid4()}",  # else Dask hashes all arguments, and its pages have one name for all
                resources={"GPU": 1} if GPU in task.tags and self.device != "cpu" and self._has_gpus() else None,
            )
        return PrefectDaskFuture(wrapped_future=future, task_run_id=future.task_run_id)

    @property
    def dashboard(self) -> str:
        """Address of Dask's own pages."""
        return str(self.client.dashboard_link)

    def steps_at_once(self) -> int:
        """Steps that can be under way on the workers that are there now; at least one, since more may come."""
        return max(1, sum(worker["nthreads"] for worker in self._seen()))

    def _has_gpus(self) -> bool:
        return any(worker["resources"].get("GPU") for worker in self._seen())

    def _seen(self) -> list[dict[str, Any]]:
        """The workers, as of a few seconds ago: to ask for each step would take longer than to submit it."""
        if time.monotonic() - self._looked > _LOOK_EVERY_S:
            self._workers = list(self.client.scheduler_info()["workers"].values())
            self._looked = time.monotonic()
        return self._workers


class _SettingsAsTheyAre(SettingsContext):
    """Prefect's settings, which each step brings to its worker, as they are. To take them apart for each step took half
    of the client's time, and to make them anew there, with environment and files, half of the worker's own."""

    def serialize(self, include_secrets: bool = True) -> dict[str, Any]:
        """What the worker makes a SettingsContext of."""
        return dict(self)


def _in_step() -> bool:
    """Whether this thread runs a step on a worker."""
    try:
        get_worker()
    except ValueError:
        return False
    return True


def check_semaphores() -> None:
    """Raises ClusterError where processes cannot be started side by side, as in containers with a sealed /dev/shm."""
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        raise ClusterError(
            f"the runner dask cannot start processes: they need semaphores, which lie in /dev/shm ({error.strerror}); "
            "mount it to be written (docker run --shm-size=64m, or an emptyDir in memory), or use the runner threads"
        ) from error


class LocalCluster(SpecCluster):
    """Processes of this machine: the first of them with a GPU each, as far as there are any."""

    def __init__(self, processes: int, gpus: int) -> None:
        """Start them; memory is shared out evenly, and the one that needs more than its share is ended."""
        workers = {
            place: {
                "cls": Nanny,
                "options": {
                    "nthreads": 1,
                    "memory_limit": MEMORY_LIMIT // processes,
                    **_LOOPBACK,
                    "resources": {"GPU": 1} if place < gpus else {},
                    # A process without a GPU of its own must not take memory of another's.
                    "env": {"CUDA_VISIBLE_DEVICES": str(place) if place < gpus else ""},
                },
            }
            for place in range(processes)
        }
        scheduler = {"cls": Scheduler, "options": _LOOPBACK}
        super().__init__(workers=workers, scheduler=scheduler, name="anomaly-localization", silence_logs=logging.ERROR)


class SameCode(WorkerPlugin):  # type: ignore[misc]
    """Turns a worker away that joins later with other code, and tells one that stays what a step may take."""

    name = "anomaly-localization"

    def __init__(self, asked: Mapping[str, str], threads: int, step_minutes: float | None) -> None:
        """What the client runs; cores and minutes of a step."""
        self.asked, self.threads, self.step_minutes = asked, threads, step_minutes

    def setup(self, worker: Worker) -> None:
        """Raises ClusterError, and the worker ends."""
        differs = differences(self.asked, identity())
        if differs:
            worker.loop.add_callback(worker.close, reason="other code than the client's")
            raise ClusterError(f"this worker does not run the client's code: {differs}; install the same on both")
        unproxied()  # it may have been started in a shell of its own
        orchestration.ssl = _SharedTls()
        torch.set_num_threads(self.threads)
        allow(None if self.step_minutes is None else 60 * self.step_minutes)


class _SharedTls:
    """The module `ssl` for Prefect's client, of which each step makes two, on a worker: the certificates of the world
    are read once, not for each, which took a quarter of the time of a worker with small steps."""

    create_default_context = staticmethod(cache(ssl.create_default_context))

    def __getattr__(self, name: str) -> Any:
        return getattr(ssl, name)


def join(client: Client, threads: int, step_minutes: float | None = None) -> None:
    """Make sure that all workers, now and later, run our code. Raises ClusterError."""
    try:
        client.wait_for_workers(1, timeout=_FIRST_WORKER_S)
    except TimeoutError as error:
        raise ClusterError(
            f"no worker has joined the scheduler {client.scheduler.address} within {_FIRST_WORKER_S:.0f} s; start some "
            f"with `dask worker {client.scheduler.address} --nthreads 1`"
        ) from error
    found = client.run(identity, on_error="return")
    asked = identity()
    wrong = {worker: _problem(asked, what) for worker, what in found.items()}
    said = "; ".join(f"{worker}: {problem}" for worker, problem in sorted(wrong.items()) if problem)
    if said:
        raise ClusterError(
            f"workers of {client.scheduler.address} do not run this code: {said}. Install the same packages there, "
            "start the workers again, and then this command"
        )
    client.register_plugin(SameCode(asked, threads, step_minutes))


def _problem(asked: Mapping[str, str], found: object) -> str:
    if isinstance(found, Mapping):
        return differences(asked, found)
    return f"cannot tell ({type(found).__name__}: {found})"


def differences(asked: Mapping[str, str], found: Mapping[str, str]) -> str:
    """`torch 2.1 instead of 2.2, ...`; empty when there are none."""
    names = [name for name in asked if found.get(name) != asked[name]]
    return ", ".join(f"{name} {found.get(name)} instead of {asked[name]}" for name in names)


@cache
def identity() -> dict[str, str]:
    """What results depend on and what the parts of a cluster talk with: versions, and the content of our packages."""
    talking = {name: version(name) for name in ("dask", "distributed", "prefect-dask")}
    return versions() | talking | {"code": _digest(Path(__file__).parents[2])}


def _digest(root: Path) -> str:
    files: Iterable[Path] = sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py"))
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:16]
