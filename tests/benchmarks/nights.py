"""What a night costs in which nothing, or one image in twenty, is new, against a full run of the same images.

    python tests/benchmarks/nights.py DATA CATEGORY [--method padim] [--new 0.05] [--rounds 3]

DATA is a folder in MVTec AD's layout. Each round has its own stores: a full run of all images from nothing; a night of
all but the new ones, their delivery, and the night after it; a night after that, in which nothing has changed. All are
the flow `nightly` in one process that has its imports behind it, on a local Prefect server. The night without changes
is also timed as the command `al nightly`, imports included. What is compared runs one after the other, so that a busy
machine slows all of it; processor seconds (of this process, its threads together) are less disturbed than the clock.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from sweeps import own_server

from flows.runs.runfile import DataSource, MethodRun, NightlyRun, to_toml
from storage.nights import Decision, read_decisions
from storage.records import read_record
from storage.store import Store

COMMAND = [sys.executable, "-c", "from flows.cli import main; main()"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("category")
    parser.add_argument("--method", default="padim")
    parser.add_argument("--new", type=float, default=0.05, help="share of the training images that comes later")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with own_server() as folder:
        _measure(given, folder)


def _measure(given: argparse.Namespace, folder: Path) -> None:
    later = _split(given, folder)
    print(f"{given.method} on {given.category}: {len(later)} images come later", flush=True)
    _timed(_run(given, folder, "warm", "all"))  # imports, and the backbone
    rows: list[dict[str, tuple[float, float]]] = []
    for i in range(given.rounds):
        row = {"full": _timed(_run(given, folder, f"full-{i}", "all"))}
        run = _run(given, folder, f"night-{i}", "growing")
        _timed(run)
        for path in later:
            shutil.copy2(folder / "all" / given.category / "train" / "good" / path, _good(given, folder, "growing"))
        row["new"] = _timed(run)
        row["nothing"] = _timed(run)
        row["command"] = _command(run, folder)
        _show(row)
        if not i:
            _steps(Store(f"{folder}/full-0"), Store(f"{folder}/night-0"))
        for path in later:
            (_good(given, folder, "growing") / path).unlink()
        rows.append(row)
    print("\nmedian of the rounds")
    _show({name: tuple(median(row[name][j] for row in rows) for j in (0, 1)) for name in rows[0]})  # type: ignore[misc]


def _split(given: argparse.Namespace, folder: Path) -> list[str]:
    """Copies of the data, `all` and `growing`; the names of the training images that the latter lacks."""
    for name in ("all", "growing"):
        shutil.copytree(given.data / given.category, folder / name / given.category)
    names = sorted(path.name for path in _good(given, folder, "all").iterdir())
    later = names[:: round(1 / given.new)]
    for name in later:
        (_good(given, folder, "growing") / name).unlink()
    return later


def _good(given: argparse.Namespace, folder: Path, which: str) -> Path:
    return folder / which / given.category / "train" / "good"


def _run(given: argparse.Namespace, folder: Path, store: str, data: str) -> NightlyRun:
    source = DataSource(dataset="mvtec_ad", root=str(folder / data), categories=[given.category])
    places = {"store": str(folder / store), "report": str(folder / f"{store}-report")}
    return NightlyRun(data=[source], method=MethodRun(name=given.method), **places)


def _timed(run: NightlyRun) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    from flows.nightly import nightly  # Prefect reads its settings when it is imported: the server is there by now
    from flows.where.runners import runner_for

    began, used = time.perf_counter(), time.process_time()
    state: Any = nightly.with_options(task_runner=runner_for(run))(run, return_state=True)
    seconds = time.perf_counter() - began, time.process_time() - used
    (decision,) = state.result().decisions
    assert decision.outcome in ("promoted", "kept", "unchanged"), decision.why
    print(f"{seconds[0]:9.1f} s, processor {seconds[1]:.1f} s: {decision.outcome}, {decision.why}", flush=True)
    return seconds


def _command(run: NightlyRun, folder: Path) -> tuple[float, float]:
    """The same of `al nightly` on the server that runs already."""
    path = folder / "night.toml"
    path.write_text(to_toml(run))
    before, began = os.times(), time.perf_counter()
    subprocess.run([*COMMAND, "nightly", str(path)], check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, used


def _show(row: dict[str, tuple[float, float]]) -> None:
    words = {
        "full": "all images, from nothing",
        "new": "new ones only",
        "nothing": "nothing new",
        "command": "nothing new, `al nightly`",
    }
    print(f"\n{'':28}{'clock s':>9}{'of full':>9}{'processor s':>13}{'of full':>9}")
    for name, (clock, used) in row.items():
        print(f"{words[name]:28}{clock:9.1f}{clock / row['full'][0]:9.0%}{used:13.1f}{used / row['full'][1]:9.0%}")
    sys.stdout.flush()


def _steps(full: Store, night: Store) -> None:
    """Seconds of each step, by the clock."""
    print("\nstep                full     new")
    records = [read_record(store, _last(store)) for store in (full, night)]
    for step in records[0].seconds:  # type: ignore[union-attr]
        print(f"{step:14}" + "".join(f"{record.seconds[step]:9.2f}" for record in records if record))
    decisions: list[list[Decision]] = [list(read_decisions(store)) for store in (full, night)]
    print("decided after " + "".join(f"{decision.seconds:9.2f}" for decision in (decisions[0][0], decisions[1][1])))


def _last(store: Store) -> str:
    return next(key for key in store.list("records") if key.endswith(".json"))


if __name__ == "__main__":
    main()
