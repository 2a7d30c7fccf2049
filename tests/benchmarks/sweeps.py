"""What the machinery costs, and what more workers give: each command prints a table of one run.

    python tests/benchmarks/sweeps.py overhead [--cells 500] [--workers 2]
    python tests/benchmarks/sweeps.py extraction [--images 2048] [--workers 2]
    python tests/benchmarks/sweeps.py efficiency [--workers 2] [--kill-every SECONDS]
    python tests/benchmarks/sweeps.py peer DATA CATEGORY --peer-python ENV/bin/python

`overhead`: trivial cells (PaDiM on a dozen images of 32 px); what a cell takes beyond its steps' own seconds, and the
memory of client, scheduler and workers along the way. `extraction`: one category, in parts. `efficiency`: three
demo textures x eight methods against their bare steps, one after the other in one process; with `--kill-every` a worker
is killed all the time, and the metrics are compared. `peer`: PaDiM, PatchCore (1 %) and two flows, from the image files
to figures, against anomalib 2.7 doing the same. Runs need a Prefect server: they start it as `al` does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import compare_anomalib
import psutil

from flows.runs.runfile import DataSource, MethodRun, RunFile
from flows.where import server
from storage.records import RunRecord, read_records
from storage.store import Store
from tasks.demo_data import make_demo_data

EIGHT = (
    MethodRun(name="padim"),
    MethodRun(name="soe"),
    MethodRun(name="contrario"),
    MethodRun(name="ocsvm"),
    MethodRun(name="patchcore", params={"coreset_ratio": 0.1}),
    MethodRun(name="spade", params={"neighbours": 5}),
    MethodRun(name="stpm", params={"epochs": 3}),
    MethodRun(name="fastflow", params={"epochs": 3}),
)
OWN = ("fit", "calibrate", "predict", "evaluate")
SHARED = ("prepare", "validate", "extract")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, measure in (("overhead", overhead), ("extraction", extraction), ("efficiency", efficiency)):
        command = commands.add_parser(name)
        command.set_defaults(measure=measure)
        command.add_argument("--workers", type=int, default=2)
    commands.choices["overhead"].add_argument("--cells", type=int, default=500)
    commands.choices["extraction"].add_argument("--images", type=int, default=2048)
    commands.choices["efficiency"].add_argument("--kill-every", type=float)
    command = commands.add_parser("peer")
    command.add_argument("data", type=Path)
    command.add_argument("category")
    command.add_argument("--peer-python", type=Path, required=True)
    command.add_argument("--epochs", type=int, default=1, help="of both flows, on both sides")
    command.set_defaults(measure=peer)
    given = parser.parse_args()
    with own_server() as folder:
        given.measure(given, folder)


@contextmanager
def own_server() -> Iterator[Path]:
    """A folder that goes in the end, with a Prefect server of its own; what is still to be told is told to it first."""
    os.environ.pop("PREFECT_API_URL", None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["AL_HOME"] = str(Path(folder) / "home")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        with server.connected(port) as url:
            server.wait_for(url)
            yield Path(folder)
            sys.stdout.flush()
            from prefect.logging.handlers import APILogHandler

            APILogHandler().flush()  # what is still to be sent would find no server


def overhead(given: argparse.Namespace, folder: Path) -> None:
    """Seconds a cell and a step beyond what the steps themselves took; memory in the course of the run."""
    data = folder / "data"
    make_demo_data(data, train=6, validation=2, good=2, defects_per_type=1, size=32)
    method = MethodRun(name="padim", params={"image_size": 32, "channels": 8})
    run = run_file(folder, "overhead", data, (method,), categories=["brick"])
    run = run.model_copy(update={"seeds": list(range(given.cells)), "runner": "dask", "workers": given.workers})
    with memory_of_all() as seen:
        seconds, records = timed(run)
    own = sum(record.seconds[step] for record in records for step in OWN)
    shared = sum(records[0].seconds[step] for step in SHARED)
    beyond = seconds * given.workers - own - shared
    print(f"{len(records)} cells on {given.workers} workers: {seconds:.1f} s, {seconds / len(records):.3f} s a cell")
    print(f"the steps themselves: {own + shared:.1f} s on the workers, {own / len(records) * 1000:.0f} ms a cell")
    print(f"beyond them: {beyond / len(records):.3f} s of a worker's time a cell, ", end="")
    print(f"{beyond / len(records) / len(OWN) * 1000:.0f} ms a task; ", end="")
    print(f"by the clock {(seconds - (own + shared) / given.workers) / len(records) / len(OWN) * 1000:.0f} ms a task")
    print("\nshare of the run  " + "  ".join(f"{who:>9}" for who in ("client", "workers")) + "  (MiB)")
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        at = seen[min(len(seen) - 1, int(share * len(seen)))]
        print(f"{share:15.0%}  " + "  ".join(f"{at[who]:9.0f}" for who in ("client", "workers")))


def extraction(given: argparse.Namespace, folder: Path) -> None:
    """Images a second of `extract` on one category, by one worker and by several, each with one thread."""
    data = folder / "data"
    make_demo_data(data, train=given.images, validation=2, good=2, defects_per_type=1)
    rates: dict[int, float] = {}
    for workers in (1, given.workers):
        run = run_file(folder, f"extraction-{workers}", data, (MethodRun(name="padim"),), categories=["brick"])
        run = run.model_copy(update={"runner": "dask", "workers": workers, "threads": 1})
        seconds = span_of_features(run)
        rates[workers] = given.images / seconds
        print(f"{workers} workers: {seconds:.1f} s, {rates[workers]:.1f} images/s")
    print(f"{given.workers} workers against 1: {rates[given.workers] / rates[1]:.2f}")


def span_of_features(run: RunFile) -> float:
    """Seconds from the first part's beginning to the end of `extract`."""
    timed(run)
    store, spans = Store(run.store), []
    for path in Path(store.path("features")).rglob("manifest.json"):
        meta = store.get(str(path.parent.relative_to(store.path("")))).meta
        if "parts" not in meta:
            spans.append((path.stat().st_mtime - meta["seconds"], path.stat().st_mtime))
    return max(end for _, end in spans) - min(begin for begin, _ in spans)


def efficiency(given: argparse.Namespace, folder: Path) -> None:
    """A sweep against its bare steps; the metrics of both are equal, also where workers are killed."""
    data = folder / "data"
    make_demo_data(data, train=40, validation=10, good=15, defects_per_type=5)
    bare = run_file(folder, "bare", data, EIGHT).model_copy(update={"workers": 1, "threads": 1})
    os.environ["OMP_NUM_THREADS"] = "1"  # all processes take it over: faiss and BLAS, too, compute with one thread
    ((sum_of_steps, one_by_one),) = in_processes(bare, 1)
    run = bare.model_copy(update={"store": str(folder / "sweep"), "report": str(folder / "sweep-report")})
    run = run.model_copy(update={"runner": "dask", "workers": given.workers})
    with killing(given.kill_every) as killed:
        seconds, records = timed(run)
    failed = [record for record in records if record.status != "done"]
    equal = sum(record.metrics == one_by_one[record.cell].metrics for record in records)
    ideal = sum_of_steps / given.workers
    print(f"{len(records)} cells on {given.workers} workers: {seconds:.1f} s; bare steps {sum_of_steps:.1f} s")
    print(f"against bare steps / workers: {seconds / ideal:.2f}")
    beside = fmean(each for each, _ in in_processes(bare, given.workers))  # what the machine takes for the company
    print(f"bare steps in {given.workers} processes at once, each doing all: {beside:.1f} s each; ", end="")
    print(f"against these / workers: {seconds * given.workers / beside:.2f}")
    inside = [seconds_inside(Store(each)) for each in (f"{bare.store}-1-0", run.store)]
    print("\nstep            bare   sweep  (seconds by their own count)")
    for step in sorted({name for each in inside for name in each}):
        print(f"{step:12}" + "".join(f"{each.get(step, 0):8.1f}" for each in inside))
    print(f"{len(killed)} workers killed, {len(failed)} cells failed, {equal} with the metrics of the bare run")
    for record in failed:
        print(f"  {record.dataset}/{record.category} {record.method}: {record.reason}")


def seconds_inside(store: Store) -> dict[str, float]:
    """Of all outputs of a store, by their first folder; what was made in parts counts once."""
    found: dict[str, float] = {}
    for key in store.list(""):
        if key.endswith("/manifest.json"):
            meta, step = store.read_json(key)["meta"], key.partition("/")[0]
            found[step] = found.get(step, 0.0) + (0 if "parts" in meta else meta.get("seconds", 0))
    return found


def in_processes(run: RunFile, processes: int) -> list[tuple[float, dict[str, RunRecord]]]:
    """The bare steps, all of them in each of so many processes at once, each with a store of its own."""
    runs = [run.model_copy(update={"store": f"{run.store}-{processes}-{place}"}) for place in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(bare_steps, runs, chunksize=1)


def bare_steps(run: RunFile) -> tuple[float, dict[str, RunRecord]]:
    """Seconds of the bare functions, one after the other, and their records."""
    from flows.category import listed
    from tasks.calibrate import calibrate
    from tasks.core.compute import inputs_of
    from tasks.evaluate import evaluate
    from tasks.extract import extract
    from tasks.fit import fit
    from tasks.ingest import ingest
    from tasks.predict import predict
    from tasks.prepare import prepare
    from tasks.suspect import shared_spec, suspect
    from tasks.validate import validate

    store, records = Store(run.store), {}
    begun = time.perf_counter()
    for source in run.data:
        for category in listed(store, source, ingest.fn).categories:
            for cell in run.cells(category.dataset, category.category):
                size, spec = inputs_of(cell)
                validated = validate.fn(prepare.fn(category, size), run.validation)
                features = None if spec is None else extract.fn(validated, spec, run.device)
                if spec == shared_spec(size):
                    suspect.fn(validated, features, spec, run.validation, run.device)
                model = fit.fn(cell, validated, features)
                held_out = calibrate.fn(cell, validated, features, model)
                maps = predict.fn(cell, validated, features, model)
                records[cell.id] = evaluate.fn(cell, validated, features, model, held_out, maps)
    return time.perf_counter() - begun, records


def peer(given: argparse.Namespace, folder: Path) -> None:
    """Wall seconds of our command, from an empty store to the report, and of anomalib in one process."""
    methods = ("padim", "patchcore", "cflow", "fastflow")
    (folder / "peer").mkdir()
    script = Path(__file__).with_name("peer_anomalib.py")
    command = [given.peer_python, script, given.data, given.category, *methods, "--out", folder / "peer"]
    theirs, _, text = compare_anomalib.timed([str(part) for part in [*command, "--epochs", given.epochs]])
    said = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    theirs -= sum(one["predict_seconds"] for one in said)  # ours keeps its maps in the same pass
    command = [sys.executable, "-m", "flows.cli", "benchmark", "--data", f"mvtec_ad={given.data}"]
    command += ["--category", given.category, *(word for method in methods for word in ("--method", method))]
    command += ["--param", "patchcore.coreset_ratio=0.01"]
    command += [word for flow in methods[2:] for word in ("--param", f"{flow}.epochs={given.epochs}")]
    command += ["--store", str(folder / "store"), "--report", str(folder / "report")]
    ours, _, _ = compare_anomalib.timed(command)
    by_method = {record.method: sum(record.seconds.values()) for record in read_records(Store(str(folder / "store")))}
    for method, one in zip(methods, said, strict=True):
        print(f"{method:10} anomalib fit + test {one['seconds']:7.1f} s   ours, shared steps counted in each ", end="")
        print(f"{by_method[method]:7.1f} s")
    print(f"in all: anomalib {theirs:.1f} s, ours {ours:.1f} s, {theirs / ours:.1f} times")


def run_file(
    folder: Path, name: str, data: Path, methods: tuple[MethodRun, ...], categories: list[str] | None = None
) -> RunFile:
    """Methods on demo data, in a store of its own."""
    source = DataSource(dataset="mvtec_ad", root=str(data), categories=categories)
    places = {"store": str(folder / name), "report": str(folder / f"{name}-report")}
    return RunFile(data=[source], methods=list(methods), **places)


def timed(run: RunFile) -> tuple[float, list[RunRecord]]:
    """Seconds of the flow, start of the cluster and report included, and its records."""
    from flows.benchmark import BenchmarkOutcome, benchmark  # reads the address of the server when it is imported
    from flows.where.runners import runner_for

    begun = time.perf_counter()
    state = benchmark.with_options(task_runner=runner_for(run))(run, return_state=True)
    outcome = state.result(raise_on_failure=False)
    if not isinstance(outcome, BenchmarkOutcome):
        raise outcome
    return time.perf_counter() - begun, outcome.records


@contextmanager
def memory_of_all(every: float = 1.0) -> Iterator[list[dict[str, float]]]:
    """Resident MiB of this process, which holds Dask's scheduler, and of all workers, once in a while."""
    seen: list[dict[str, float]] = []
    with repeatedly(every, lambda: seen.append(memory())):
        yield seen


def memory() -> dict[str, float]:
    """By role, now."""
    found = {"client": psutil.Process().memory_info().rss / 2**20, "workers": 0.0}
    for worker in workers():
        try:
            found["workers"] += worker.memory_info().rss / 2**20
        except psutil.Error:
            continue
    return found


def workers() -> list[psutil.Process]:
    """The processes that Dask's nannies have started here."""
    return [child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def killing(every: float | None) -> Iterator[list[int]]:
    """SIGKILL for a worker every so many seconds."""
    killed: list[int] = []
    if every is None:
        yield killed
        return
    rng = random.Random(0)

    def kill() -> None:
        alive = workers()
        if alive:
            victim = rng.choice(alive)
            victim.send_signal(signal.SIGKILL)
            killed.append(victim.pid)

    with repeatedly(every, kill):
        yield killed


@contextmanager
def repeatedly(every: float, what: Callable[[], Any]) -> Iterator[None]:
    """Do this every so many seconds meanwhile."""
    stop = threading.Event()

    def go_on() -> None:
        while not stop.wait(every):
            what()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
