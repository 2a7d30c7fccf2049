"""The cells of a run, a few on the workers at a time.

Cells are started in the order data set, category, method, seed, and no more of them than keep all workers busy. So a
category is finished before the last one has begun, and a run that is cut leaves whole results behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any

from prefect.futures import PrefectFuture

from flows import order
from flows.category import CategorySteps, Steps, Submitting, all_listed, first_failure
from flows.runs.runfile import RunFile
from flows.where.runners import running_on
from flows.where.watch import Watch
from storage.records import RunRecord
from storage.store import Store
from tasks.core.failure import record_failure
from tasks.core.handles import Cell, Validated
from tasks.core.steps import only_looking

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.02
_STARTS = 4
"""Starts of a cell whose steps were lost with the scheduler, before it counts as failed."""


@dataclass
class Running:
    """A cell whose steps are on their way."""

    cell: Cell
    shared: CategorySteps
    steps: Steps
    starts: int = 1
    alone: bool = False
    """No other cell is under way."""

    @property
    def last(self) -> PrefectFuture[Any]:
        """Its last step, which gives the record."""
        return next(reversed(self.steps.values()))

    def ended(self) -> bool:
        """Whether its last step has; a step that fails ends those that wait for it."""
        return _is_done(self.last)

    def step(self) -> str:
        """The first step that has not ended."""
        return next((name for name, future in self.steps.items() if not _is_done(future)), "")


def _is_done(future: Any) -> bool:
    return bool(future.wrapped_future.done())


def _is_killed(error: Exception) -> bool:
    return type(error).__name__ == "KilledWorker"  # Dask is not imported where it does not run


def _in_words(error: Exception) -> Exception:
    """Dask names the task and the worker; the user needs to know what it means."""
    if not _is_killed(error):
        return error
    return RuntimeError(
        "each worker that ran it died, most likely for want of memory; give it more, run fewer workers, or choose "
        f"smaller parameters ({error})"
    )


class Sweep:
    """All cells of a run."""

    def __init__(self, run: RunFile, store: Store, watch: Watch) -> None:
        """List the data sets; nothing is computed yet."""
        self.run, self.store, self.watch = run, store, watch
        self.unlisted: list[tuple[Cell, str]] = []
        """Cells of categories that cannot even be listed, and why."""
        self.accused: list[Running] = []
        """Cells whose steps were on workers that died. Dask blames all that wait there with the one that did it, so
        each gets a second chance in the end, alone."""
        self.categories: list[CategorySteps] = []
        for source, found in all_listed(store, run):
            for name, reason in found.problems.items():
                self.unlisted += [(cell, reason) for cell in run.cells(source.dataset, name)]
            self.categories += [CategorySteps(each, run) for each in found.categories]
        cells = [cell for cell, _ in self.unlisted]
        cells += [cell for each in self.categories for cell in run.cells(each.category.dataset, each.category.category)]
        self.places = {cell.id: place for place, cell in enumerate(cells)}
        """Cell -> its place in the order of the run; records come as cells end."""

    def __len__(self) -> int:
        """Cells in all."""
        return len(self.places)

    def records(self) -> Iterator[RunRecord]:
        """The record of each cell, as it ends; a failed cell stops no other."""
        for cell, reason in self.unlisted:
            yield record_failure(self.store.url, cell, "ingest", ValueError(reason))
        running: list[Running] = []
        for shared in self.categories:
            for cell in self.run.cells(shared.category.dataset, shared.category.category):
                while len(running) >= self._at_once():
                    yield from self._ended(running)
                found = self._found(cell, shared)
                if found is not None:
                    yield found
                else:
                    running.append(Running(cell, shared, self._start(cell, shared)))
        while running:
            yield from self._ended(running)
        for accused in self.accused:
            running = [replace(self._again(accused), alone=True)]
            while running:
                yield from self._ended(running)
        self.watch.under_way = ()

    def _at_once(self) -> int:
        """Cells that keep every worker busy while others wait for a step they share."""
        return 2 * int(running_on().steps_at_once()) + 2

    def _found(self, cell: Cell, shared: CategorySteps) -> RunRecord | None:
        """The record of a cell whose outputs are all in the store; None for any other. To ask takes milliseconds, to
        send its steps to the workers ten times as long."""
        try:
            with only_looking():
                record = order.record_of_cell(order.Doing(), self.run, shared.category, cell)
        except Exception:  # whatever is wrong with it, its steps will meet and name
            return None
        self.inputs(cell, shared)
        shared.to_show()
        return record

    def inputs(self, cell: Cell, shared: CategorySteps) -> Validated:
        """What the cell learns from: the future of that."""
        return order.inputs_of_cell(Submitting(shared), self.run, shared.category, cell)[0]

    def _start(self, cell: Cell, shared: CategorySteps) -> Steps:
        do = Submitting(shared)
        order.record_of_cell(do, self.run, shared.category, cell)
        shared.to_show()  # what is suspected of the images is looked for meanwhile
        return do.steps

    def _ended(self, running: list[Running]) -> Iterator[RunRecord]:
        """The records of the cells that have ended since the last look, which are taken off the list."""
        self.watch.under_way = [(each.cell.name, each.step()) for each in running]
        ended = [each for each in running if each.ended()]
        if not ended:
            time.sleep(_LOOK_EVERY_S)
            return
        for each in ended:
            running.remove(each)
            failure = first_failure(each.steps)
            if failure is None:
                yield each.last.result()
            elif isinstance(failure[1], CancelledError) and each.starts < _STARTS:
                logger.warning("%s: %s was lost with the scheduler; starting again", each.cell.name, failure[0])
                running_on().rejoin()
                running.append(self._again(each))
            elif _is_killed(failure[1]) and not each.alone:
                self.accused.append(each)
            else:
                if _is_killed(failure[1]):
                    each.shared.guilty.append(each.steps[failure[0]])
                yield record_failure(self.store.url, each.cell, failure[0], _in_words(failure[1]))

    def _again(self, each: Running) -> Running:
        """The cell, started once more with what is left of the steps it shares."""
        each.shared.forget_lost()
        return replace(each, steps=self._start(each.cell, each.shared), starts=each.starts + 1)
