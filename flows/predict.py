"""Judge images with a version of a model: those that are there, or whatever comes into a folder."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, State

from flows.runs.predict import PredictRun
from flows.where.runners import ThreadsRunner
from flows.where.watch import Watch
from storage.errors import DatasetError
from storage.settled import Settled
from storage.store import Store
from tasks.serve.inspect_images import Inspection, judge_images
from tasks.serve.register import load_version
from tasks.serve.summarise import Summary, summarise

logger = logging.getLogger(__name__)

_CHUNK = 128
"""Images of a task: some seconds of work."""
_NEWEST = 1000
"""Images that the drift of an endless run is about."""
_SUMMARISE_EVERY_S = 60.0


@flow(name="predict", flow_run_name="predict {run.title}", task_runner=ThreadsRunner())
def predict(run: PredictRun) -> State[Summary]:
    """Judge every image once, however often the run is cut and begun again, and say what was found."""
    run.check()
    store = Store(run.store)
    loaded = load_version(store, run.model)
    with Inspection(loaded, run.out, run.device, run.batch_size) as inspection, Watch(store, "predict") as watch:
        work = _Work(inspection, watch)
        if run.watch is None:
            work.judge(run.paths())
            summary = work.summarise()
        else:
            summary = _until_stopped(run, run.watch, work)
    summary = replace(summary, left_out=run.left_out())
    return Completed(data=summary, message=f"{_decisions_in_words(summary.decisions)}; see {summary.out}")


class _Work:
    """The tasks of a run."""

    def __init__(self, inspection: Inspection, watch: Watch) -> None:
        self.inspection, self.watch = inspection, watch
        self.done, self.found = 0, Counter[str]()

    def judge(self, paths: Sequence[str]) -> None:
        self.watch.expect(self.done + len(paths))
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            more = f" and {len(chunk) - 1} more" if len(chunk) > 1 else ""
            self.found.update(judge_images(self.inspection, f"{Path(chunk[0]).name}{more}", chunk))
            self.done += len(chunk)
            self.watch.finished(self.done, _decisions_in_words(self.found) or "judged before")

    def summarise(self, newest: int | None = None) -> Summary:
        """Write what was found, and show it in the UI."""
        summary = summarise(self.inspection, newest)
        create_table_artifact(
            _readable(summary.worst), key="worst-images", description="rejected images, the worst first"
        )
        create_table_artifact(
            _readable(summary.drift_table), key="drift", description="the images against the held-out ones"
        )
        return summary


def _until_stopped(run: PredictRun, every: float, work: _Work) -> Summary:
    """Judge what has come and is written to its end, again and again; now and then, and at the end, sum up."""
    settled, summed_up = Settled(), (-1, time.monotonic())
    with _stopped() as stop:
        while True:
            work.judge(settled.look(_there(run)))
            done, when = summed_up
            if work.done > done and (done < 0 or time.monotonic() - when >= _SUMMARISE_EVERY_S):
                work.summarise(_NEWEST)
                summed_up = work.done, time.monotonic()
            if stop.wait(every):
                return work.summarise(_NEWEST)


def _there(run: PredictRun) -> list[str]:
    """The images that are there now; none while a folder is away, as a network drive may be."""
    try:
        return run.paths()
    except DatasetError as error:
        logger.warning("%s; it is looked for again", error)
        return []


@contextmanager
def _stopped() -> Iterator[threading.Event]:
    """Set by Ctrl-C, after which the images in hand are still judged; a second Ctrl-C interrupts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals come to the main thread alone
        return

    def stop(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _readable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For people: the files beside them have all digits."""
    return [{name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()} for row in rows]


def _decisions_in_words(decisions: dict[str, int]) -> str:
    return ", ".join(f"{count} {decision}" for decision, count in sorted(decisions.items()))
