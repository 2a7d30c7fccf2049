"""Sweeps on a real cluster, and what is done to them: a good cell ends as if nothing had happened, a bad one as a
record with its reason."""

from __future__ import annotations

import errno
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, DaskCluster, eventually
from sweep_runs import PADIM, PATCHCORE, Ended, figures, of_step, run_file, run_flow

from storage.store import Store

pytestmark = [
    pytest.mark.usefixtures("api"),
    # Dask and Prefect leave sockets and loops to the garbage collector when a cluster or a client ends.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*was never awaited:RuntimeWarning"),
]

PRELOAD = ("--preload", str(ROOT / "tests" / "dask_faults.py"))


@pytest.fixture(scope="module")
def undisturbed(api: str, demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two methods on one category, with nothing in their way."""
    return run_flow(run_file(tmp_path_factory.mktemp("undisturbed") / "store", demo_root, PADIM, PATCHCORE))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    """A scheduler, without workers."""
    (tmp_path / "seen").mkdir()
    seen = str(tmp_path / "seen")
    with DaskCluster(tmp_path, AL_FAULTS_SEEN=seen, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1") as started:
        started.scheduler()
        yield started


def seen(cluster: DaskCluster) -> list[str]:
    """The faults that have happened."""
    return sorted(path.name for path in (cluster.folder / "seen").iterdir())


def unfinished(store: Store) -> set[str]:
    """Drafts that were left behind: the steps that were cut, and so redone."""
    manifests = [json.loads(path.read_text()) for path in Path(store.url).rglob("manifest.json")]
    drafts = {str(path.relative_to(store.url)) for path in Path(store.url).glob("*/*/*/*/*-*")}
    return drafts - {manifest["folder"] for manifest in manifests}


def same(ended: Ended, undisturbed: Ended, *methods: str) -> bool:
    """Whether these methods' figures are what they are when nothing happens."""
    return all(figures(ended.by_method[name]) == figures(undisturbed.by_method[name]) for name in methods)


@pytest.mark.faults
def test_a_worker_killed_in_each_step_costs_the_step_and_no_figure(
    cluster: DaskCluster, undisturbed: Ended, demo_root: Path, tmp_path: Path
) -> None:
    outputs = ("features", "models", "maps", "evaluations")
    cluster.worker(*PRELOAD, AL_FAULTS=",".join(f"{output}=kill" for output in outputs))
    ended = run_flow(run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE), cluster.address)
    assert seen(cluster) == sorted(outputs)
    assert ended.state.is_completed()
    assert same(ended, undisturbed, "padim", "patchcore")
    redone = {draft.split("/")[0] for draft in unfinished(ended.store)}
    assert redone == set(outputs)
    assert len(unfinished(ended.store)) == len(outputs), "more than the steps that were cut was redone"


@pytest.mark.faults
def test_a_step_that_hangs_is_ended_and_costs_its_cell(
    cluster: DaskCluster, undisturbed: Ended, demo_root: Path, tmp_path: Path
) -> None:
    cluster.worker(*PRELOAD, AL_FAULTS="models:patchcore=hang")
    run = run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE).model_copy(update={"step_minutes": 0.1})
    warm = run_file(tmp_path / "store", demo_root, PADIM)  # so that no import takes the seconds that a step has
    assert run_flow(warm, cluster.address).state.is_completed()
    ended = run_flow(run, cluster.address)
    assert len(seen(cluster)) == 1, "it was tried again"
    assert ended.by_method["patchcore"].reason == ("fit: did not end within the 0.1 minutes that `step_minutes` allows")
    assert same(ended, undisturbed, "padim")
    assert not list(Path(ended.store.url).glob("hung/**/*.json")), "the next run would not try"


@pytest.mark.faults
def test_a_worker_out_of_memory_costs_the_cell(
    cluster: DaskCluster, undisturbed: Ended, demo_root: Path, tmp_path: Path
) -> None:
    cluster.worker(*PRELOAD, "--memory-limit", "2 GiB", AL_FAULTS="models:patchcore=eat")
    ended = run_flow(run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE), cluster.address)
    reason = ended.by_method["patchcore"].reason
    assert reason is not None
    assert reason.startswith("fit: each worker that ran it died, most likely for want of memory; give it more")
    assert len(seen(cluster)) == 4  # one more than the failures that the scheduler allows; then again, alone
    assert same(ended, undisturbed, "padim")


@pytest.mark.faults
def test_a_shared_step_that_kills_its_workers_is_tried_alone_once(
    cluster: DaskCluster, demo_root: Path, tmp_path: Path
) -> None:
    cluster.worker(*PRELOAD, "--memory-limit", "2 GiB", AL_FAULTS="features=eat")
    run = run_file(tmp_path / "store", demo_root, PADIM).model_copy(update={"seeds": [0, 1, 2]})
    reasons = {record.reason for record in run_flow(run, cluster.address).outcome.records}
    assert len(reasons) == 1
    assert str(reasons.pop()).startswith("extract: each worker that ran it died, most likely for want of memory")
    assert len(seen(cluster)) == 4, "each cell has killed workers of its own"


@pytest.mark.faults
def test_a_scheduler_that_is_started_again_costs_no_figure(
    cluster: DaskCluster, undisturbed: Ended, demo_root: Path, tmp_path: Path
) -> None:
    run = run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE)
    store, worker = Store(run.store), cluster.worker()

    def restart() -> bool:
        extracted = eventually(lambda: of_step(store, "features"), within=120, every=0.005)
        cluster.processes[0].send_signal(signal.SIGKILL)
        cluster.processes[0].wait()
        worker.wait(60)  # a worker without a scheduler ends
        cluster.scheduler()
        cluster.worker()
        return extracted

    with ThreadPoolExecutor(1) as pool:
        restarted = pool.submit(restart)
        ended = run_flow(run, cluster.address)
    assert restarted.result()
    assert ended.state.is_completed()
    assert same(ended, undisturbed, "padim", "patchcore")


def test_a_store_that_fails_now_and_then_costs_no_figure(
    undisturbed: Ended, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [0], Store.write_bytes

    def failing(self: Store, key: str, data: bytes) -> None:
        written[0] += 1
        if written[0] % 20 == 0:
            raise OSError(errno.EIO, "input/output error")
        write(self, key, data)

    monkeypatch.setattr(Store, "write_bytes", failing)
    ended = run_flow(run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE))
    assert written[0] >= 20, "nothing has failed"
    assert ended.state.is_completed()
    assert same(ended, undisturbed, "padim", "patchcore")


def test_a_full_disk_costs_cells_until_there_is_room_again(
    undisturbed: Ended, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE), Store.write_bytes

    def full(self: Store, key: str, data: bytes) -> None:
        if key.startswith(("maps", "records")):
            raise OSError(errno.ENOSPC, "no space left on device")
        write(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", full)
        started = time.monotonic()
        ended = run_flow(run)
        assert time.monotonic() - started < 60, "what cannot pass was tried again"
    assert ended.state.is_failed()
    reasons = {name: record.reason for name, record in ended.by_method.items()}
    assert set(reasons) == {"padim", "patchcore"}
    assert all("no space left on device" in str(reason) for reason in reasons.values())
    assert not of_step(ended.store, "maps"), "something half-written counts as finished"

    fitted: list[str] = []
    draft = Store.draft

    def counted(self: Store, key: str) -> Any:
        fitted.append(key.split("/")[0])
        return draft(self, key)

    monkeypatch.setattr(Store, "draft", counted)
    again = run_flow(run)
    assert again.state.is_completed()
    assert same(again, undisturbed, "padim", "patchcore")
    assert "models" not in fitted, "what was finished before the disk was full is done again"
