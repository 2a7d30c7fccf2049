"""The main job, on each runner: equal figures, nothing done twice, and a fault costs a cell and never the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import AL, DaskCluster, eventually, stop
from sweep_runs import PADIM, PATCHCORE, Ended, figures, manifests, of_step, record_files, run_file, run_flow

from al_models.calibration import pixel_p_values
from al_models.detector import Detector
from al_models.embedding.patchcore import Patchcore
from flows.benchmark import benchmark
from flows.runs.runfile import DataSource, MethodRun, RunFile
from flows.where.runners import ThreadsRunner
from storage.records import read_records
from storage.store import Store
from tasks.calibrate import held_out_pixels

pytestmark = [
    pytest.mark.usefixtures("api"),
    # Dask and Prefect leave sockets and loops to the garbage collector when a cluster or a client ends.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

STEPS = {"ingest", "prepare", "validate", "extract", "fit", "calibrate", "predict", "evaluate"}
IMPOSSIBLE = MethodRun(name="patchcore", params={"image_size": 64, "coreset_ratio": 0.05, "index": "nonsense"})


@pytest.fixture(scope="module")
def first(api: str, demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two methods on one category in threads of this process."""
    return run_flow(run_file(tmp_path_factory.mktemp("first") / "store", demo_root, PADIM, PATCHCORE))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """A scheduler that is there already, with one worker."""
    with DaskCluster(tmp_path_factory.mktemp("dask")) as started:
        started.scheduler()
        started.worker()
        yield started


# runners


def test_two_methods_are_compared_and_pictured(first: Ended) -> None:
    assert first.state.is_completed()
    assert [record.status for record in first.outcome.records] == ["done", "done"]
    for record in first.outcome.records:
        assert {"image_auroc", "pixel_auroc", "pro", "iou_max"} <= record.metrics.keys()
        assert set(record.seconds) == STEPS
        assert record.counts["train"] == 6
        assert record.counts["calibration"] == 3
        assert record in list(read_records(first.store))
    assert first.page.count("data:image/") >= 4
    assert "Size of the defect" in first.page
    for name in ("results.csv", "data.html", "findings.csv"):
        assert Path(first.outcome.report).with_name(name).is_file()


def test_held_out_maps_are_kept_as_what_gives_other_maps_their_p_values(first: Ended) -> None:
    for record in first.outcome.records:
        held_out = first.store.get(record.keys["calibration"]).meta
        pixels = held_out_pixels(first.store, record.keys["calibration"])
        assert pixels.ids == set(held_out["ids"])
        assert pixels.maxima.sum() * 2**40 == pixels.shares.sum() == 3 * 2**40
        highest = max(held_out["map_maxima"])  # rounded as stored maps are
        beyond = np.nextafter(np.float16(highest), np.float16(np.inf))
        found = pixel_p_values(np.array([[highest, beyond]]), pixels, "image")
        assert found.tolist() == [[0.5, 0.25]]  # (1 + 1) / 4 and 1 / 4


@pytest.mark.parametrize("runner", ["dask", "tcp"])
def test_every_runner_gives_the_same_bits(
    runner: str, first: Ended, demo_root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where = request.getfixturevalue("cluster").address if runner == "tcp" else runner
    ended = run_flow(run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE), where)
    assert ended.state.is_completed()
    assert [figures(record) for record in ended.outcome.records] == [figures(r) for r in first.outcome.records]
    assert "padim" in ended.page


def test_a_deployment_uses_the_runner_of_its_parameters(first: Ended, demo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(first.store.url, tmp_path / "store")
    run = run_file(tmp_path / "store", demo_root, IMPOSSIBLE, PADIM).model_copy(update={"workers": 2})
    state = benchmark.with_options(task_runner=ThreadsRunner(1))(run, return_state=True)
    outcome = state.result(raise_on_failure=False)
    assert state.is_failed()
    assert state.message == f"1 of 2 cells failed; see {outcome.report}"
    assert [record.status for record in outcome.records] == ["failed", "done"]


# nothing is done twice


def test_a_second_run_computes_nothing(first: Ended, demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, records = manifests(first.store), record_files(first.store)
    monkeypatch.setattr(Store, "draft", lambda *_: pytest.fail("a step began to compute"))
    ended = run_flow(run_file(Path(first.store.url), demo_root, PADIM, PATCHCORE))
    assert ended.state.is_completed()
    assert ended.outcome.records == first.outcome.records
    assert manifests(first.store) == outputs
    assert record_files(first.store) == records


def test_another_seed_shares_what_does_not_depend_on_it(first: Ended, demo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(first.store.url, tmp_path / "store")
    run = run_file(tmp_path / "store", demo_root, PADIM).model_copy(update={"seeds": [0, 1]})
    ended = run_flow(run)
    grown = {step: len(of_step(ended.store, step)) - len(of_step(first.store, step)) for step in ("features", "models")}
    assert grown == {"features": 0, "models": 1}
    assert [record.seed for record in ended.outcome.records] == [0, 1]


# a fault costs a cell


def test_a_cell_that_fails_is_a_record_and_the_others_finish(first: Ended, demo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(first.store.url, tmp_path / "store")
    ended = run_flow(run_file(tmp_path / "store", demo_root, IMPOSSIBLE, PADIM))
    failed, done = ended.by_method["patchcore"], ended.by_method["padim"]
    reason = "fit: faiss makes no index"
    assert failed.status == "failed"
    assert failed.reason.startswith(reason)
    assert failed.params["index"] == "nonsense"
    assert done == first.by_method["padim"]
    assert ended.state.is_failed()
    assert ended.state.message == f"1 of 2 cells failed; see {ended.outcome.report}"
    assert reason in ended.page


def test_a_cell_that_failed_is_tried_again_and_nothing_else(
    first: Ended, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_file(tmp_path / "store", demo_root, PATCHCORE, PADIM)

    def out_of_memory(*_: object) -> None:
        raise MemoryError("no room for the bank")

    with monkeypatch.context() as patch:
        patch.setattr(Patchcore, "_fit", out_of_memory)
        ended = run_flow(run)
    assert ended.by_method["patchcore"].reason == "fit: no room for the bank"
    finished = manifests(ended.store)

    fitted: list[str] = []
    fit = Detector.fit

    def counted(self: Detector, *arguments: Any) -> Detector:
        fitted.append(type(self).__name__)
        return fit(self, *arguments)

    monkeypatch.setattr(Detector, "fit", counted)
    again = run_flow(run)
    assert fitted == ["Patchcore"]
    assert again.state.is_completed()
    assert {path: found for path, found in manifests(ended.store).items() if path in finished} == finished
    assert figures(again.by_method["patchcore"]) == figures(first.by_method["patchcore"])
    assert "no room" not in again.page


def test_a_category_nothing_can_be_learned_from_fails_alone(demo_root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo_root / "brick", data / "brick")
    shutil.copytree(demo_root / "grass", data / "lone")
    for path in sorted((data / "lone" / "train" / "good").iterdir())[1:]:
        path.unlink()
    (data / "void" / "train" / "good").mkdir(parents=True)
    source = DataSource(dataset="mvtec_ad", root=str(data))
    run = RunFile(data=[source], methods=[PADIM], store=str(tmp_path / "s"), report=str(tmp_path / "r"))
    ended = run_flow(run)
    reasons = {record.category: record.reason for record in ended.outcome.records}
    assert reasons["brick"] is None
    assert reasons["lone"] is not None
    assert reasons["void"] is not None
    assert reasons["lone"].startswith("validate: mvtec_ad/lone: 1 of 1 training images accepted, at least 2 are needed")
    assert reasons["void"].startswith("ingest: ")
    assert ended.state.message is not None
    assert ended.state.message.startswith("2 of 3 cells failed")
    assert reasons["lone"] in ended.page


def test_a_category_without_test_images_is_learned_all_the_same(demo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_root / "brick" / "train", tmp_path / "data" / "brick" / "train")
    ended = run_flow(run_file(tmp_path / "store", tmp_path / "data", PADIM))
    (record,) = ended.outcome.records
    assert (record.status, record.metrics) == ("done", {})
    assert (record.counts["train"], record.counts["calibration"]) == (5, 1)


def test_images_to_inspect_have_scores_and_no_metrics(demo_root: Path, tmp_path: Path) -> None:
    good, inspect = demo_root / "gravel" / "train" / "good", demo_root / "gravel" / "test" / "scratch"
    source = DataSource(dataset="folder", root=str(good), options={"inspect": str(inspect)})
    run = RunFile(data=[source], methods=[PADIM], store=str(tmp_path / "s"), report=str(tmp_path / "r"))
    ended = run_flow(run)
    (record,) = ended.outcome.records
    assert record.status == "done"
    assert record.metrics == {}
    assert (record.counts["test_unknown"], record.counts["test_good"], record.counts["test_anomalous"]) == (1, 0, 0)
    assert record.calibration["realised"] == {}
    assert "000.png" in ended.page


# killed, and side by side


def command(run: RunFile, folder: Path) -> list[str]:
    """`al benchmark` of this run, from a run file."""
    lines = [f"store = {json.dumps(run.store)}", f"report = {json.dumps(run.report)}", "workers = 1"]
    for source in run.data:
        lines += ["[[data]]", f'dataset = "{source.dataset}"', f"root = {json.dumps(source.root)}"]
        lines += [f"categories = {json.dumps(source.categories)}"]
    for method in run.methods:
        lines += ["[[methods]]", f'name = "{method.name}"', "[methods.params]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in method.params.items()]
    path = folder / f"{Path(run.report).name}.toml"
    path.write_text("\n".join(lines))
    return [*AL, "benchmark", str(path)]


def test_what_a_killed_run_finished_is_kept(first: Ended, demo_root: Path, tmp_path: Path) -> None:
    run = run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE)
    process = subprocess.Popen(command(run, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    store = Store(run.store)
    try:
        reached = eventually(lambda: process.poll() is not None or of_step(store, "features"), within=120, every=0.005)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        stop(process)
    assert reached
    assert process.returncode == -signal.SIGKILL
    finished = manifests(store)
    assert of_step(store, "features")
    assert len(finished) < len(manifests(first.store)), "it was to be killed in the middle"
    drafts = {path.parent for path in Path(run.store).glob("*/*/*/*/*-*/*")}
    committed = {Path(run.store) / folder for _, folder in finished.values()}
    assert len(drafts - committed) <= 1, "more than the step that was cut would be redone"

    ended = run_flow(run)
    assert ended.state.is_completed()
    assert {path: found for path, found in manifests(store).items() if path in finished} == finished
    assert [figures(record) for record in ended.outcome.records] == [figures(r) for r in first.outcome.records]


def test_two_commands_share_a_store(first: Ended, demo_root: Path, tmp_path: Path) -> None:
    run = run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE)
    runs = [run.model_copy(update={"report": str(tmp_path / name)}) for name in ("one", "two")]
    processes = [
        subprocess.Popen(command(each, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for each in runs
    ]
    try:
        ends = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            stop(process)
    assert [process.returncode for process in processes] == [0, 0], ends
    for each, (out, err) in zip(runs, ends, strict=True):
        assert "padim" in out
        assert f"report: {each.report}/index.html" in out
        assert "Traceback" not in err
    found = {record.method: record for record in read_records(Store(run.store))}
    assert {name: figures(record) for name, record in found.items()} == {
        name: figures(record) for name, record in first.by_method.items()
    }


def test_a_lost_worker_costs_no_figure(cluster: DaskCluster, first: Ended, demo_root: Path, tmp_path: Path) -> None:
    run = run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE)
    store, (_, nanny) = Store(run.store), cluster.processes

    def kill_when_features_are_there() -> bool:
        extracted = eventually(lambda: of_step(store, "features"), within=120, every=0.005)
        for process in psutil.Process(nanny.pid).children(recursive=True):
            if "spawn_main" in " ".join(process.cmdline()):
                process.kill()  # as the kernel does when memory is short
        return extracted

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_when_features_are_there)
        ended = run_flow(run, cluster.address)
    assert killed.result()
    assert ended.state.is_completed()
    assert [figures(record) for record in ended.outcome.records] == [figures(r) for r in first.outcome.records]
