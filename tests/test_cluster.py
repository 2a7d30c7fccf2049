"""What a cluster has to be before our steps run on it, and where on it they run."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from conftest import ROOT, DaskCluster, eventually
from distributed import get_worker
from prefect import Flow, flow, task

from flows.runs.runfile import DataSource, RunFile
from flows.where.cluster import ClusterRunner, LocalCluster, differences
from flows.where.errors import ClusterError
from flows.where.runners import ThreadsRunner, runner_for, running_on
from tasks.core.steps import GPU

pytestmark = [
    pytest.mark.usefixtures("api"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    """A scheduler, without workers."""
    with DaskCluster(tmp_path) as started:
        started.scheduler()
        yield started


@pytest.fixture
def other_code(tmp_path: Path) -> str:
    """PYTHONPATH of a copy of our packages in which one line differs."""
    for package in ("al_models", "flows", "storage", "tasks"):
        shutil.copytree(ROOT / package, tmp_path / "other" / package, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "other" / "al_models" / "parts" / "maps.py"
    file.write_text(file.read_text().replace("SIGMA = 4.0", "SIGMA = 5.0"))
    return str(tmp_path / "other")


@task(tags=[GPU])
def on_slot(folder: str, name: int, together: int) -> tuple[bool, float, float]:
    """(whether the worker offers a slot, began, ended); ends when so many steps have begun."""
    began = time.time()
    Path(folder, str(name)).touch()
    eventually(lambda: len(list(Path(folder).iterdir())) >= together, within=30)
    time.sleep(0.3)
    return get_worker().state.total_resources.get("GPU", 0) > 0, began, time.time()


@task
def anywhere() -> bool:
    """Whether the worker offers a slot."""
    time.sleep(0.3)
    return get_worker().state.total_resources.get("GPU", 0) > 0


@task
def joined() -> bool:
    """Whether the copy of the runner that Prefect enters around a step has joined the cluster once more."""
    return running_on()._client is not None


@flow
def of_one() -> bool:
    """A step, and no more."""
    return joined.submit().result()


@flow
def of_many(steps: int) -> int:
    """Copies of this flow, one of which goes with each step, that the second half of so many steps leaves in this
    process, which holds the scheduler too."""
    held = []
    for _ in range(2):
        for _ in range(steps // 2):
            joined.submit().result()
        gc.collect()
        held.append(sum(type(each) is Flow for each in gc.get_objects()))
    return held[1] - held[0]


@flow
def of_both(
    folder: Path, slots: int, others: int, together: int = 1
) -> tuple[list[tuple[bool, float, float]], list[bool]]:
    """Steps with and without a slot, side by side."""
    folder.mkdir()
    wanting = [on_slot.submit(str(folder), name, together) for name in range(slots)]
    free = [anywhere.submit() for _ in range(others)]
    return [future.result() for future in wanting], [future.result() for future in free]


def at_once(steps: list[tuple[bool, float, float]]) -> int:
    """How many of them ran side by side at most."""
    return max(sum(other <= began < ended for _, other, ended in steps) for _, began, _ in steps)


def test_gpu_steps_run_one_at_a_time_on_each_slot_and_anywhere_where_no_gpu_is_asked_for(tmp_path: Path) -> None:
    with LocalCluster(processes=3, gpus=2) as ours:
        runners = {device: ClusterRunner(address=ours.scheduler_address, device=device) for device in ("auto", "cpu")}
        wanting, free = of_both.with_options(task_runner=runners["auto"])(tmp_path / "auto", 6, 6, together=2)
        assert all(has for has, _, _ in wanting)
        assert at_once(wanting) == 2
        assert not all(free), "what needs no slot waits for one"

        wanting, _ = of_both.with_options(task_runner=runners["cpu"])(tmp_path / "cpu", 6, 0, together=3)
        assert not all(has for has, _, _ in wanting)
        assert at_once(wanting) == 3
        assert not of_one.with_options(task_runner=runners["cpu"])(), "each step would ask all workers who they are"


def test_client_and_scheduler_do_not_keep_what_they_sent() -> None:
    runner = ClusterRunner(cluster_class=LocalCluster, cluster_kwargs={"processes": 1, "gpus": 0})
    assert of_many.with_options(task_runner=runner)(50) < 12, "Dask keeps what it was sent"


def test_a_worker_with_other_code_is_named_and_nothing_starts(cluster: DaskCluster, other_code: str) -> None:
    cluster.worker(PYTHONPATH=other_code)
    runner = ClusterRunner(address=cluster.address)
    with pytest.raises(ClusterError, match=r"do not run this code: tcp://.*: code \w+ instead of \w+\. Install"):
        of_both.with_options(task_runner=runner)(Path("never"), 1, 1)


@pytest.mark.faults
def test_a_worker_that_joins_later_with_other_code_ends(cluster: DaskCluster, other_code: str) -> None:
    cluster.worker()
    with ClusterRunner(address=cluster.address) as runner:
        runner.client.wait_for_workers(1)
        late = cluster.worker(PYTHONPATH=other_code)
        log = cluster.log("worker")
        assert eventually(lambda: "does not run the client's code: code" in log.read_text(), within=60)
        assert eventually(lambda: len(runner.client.scheduler_info()["workers"]) == 1, within=30)
        late.terminate()


def test_an_address_without_a_scheduler_is_said_to_be_one() -> None:
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1\b"),
    ):
        of_both.with_options(task_runner=ClusterRunner(address="tcp://127.0.0.1:1"))(Path("never"), 1, 1)


def test_differences_are_told_in_words() -> None:
    assert differences({"torch": "2", "code": "a"}, {"torch": "2", "code": "b"}) == "code b instead of a"
    assert differences({"torch": "2"}, {}) == "torch None instead of 2"
    assert differences({"torch": "2"}, {"torch": "2", "more": "1"}) == ""


@pytest.mark.parametrize(
    ("given", "at_once", "threads"),
    [({}, 2, 4), ({"workers": 1}, 1, 8), ({"threads": 1}, 8, 1), ({"threads": 2, "workers": 3}, 3, 2)],
)
def test_steps_in_threads_share_the_cores(
    given: dict[str, int], at_once: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    asked = RunFile(data=[DataSource(dataset="demo", root="x")], **given)
    runner = runner_for(asked)
    assert isinstance(runner, ThreadsRunner)
    assert (runner.steps_at_once(), runner.threads) == (at_once, threads)
    assert runner == runner.duplicate() == runner_for(asked)
    assert runner != ThreadsRunner(17)
