"""Choose parameters by synthetic defects in held-out good images, and compare the chosen on the test set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, Failed, State

from al_models.registry import create
from flows import order
from flows.benchmark import BenchmarkOutcome, compare
from flows.category import CategorySteps, Steps, Submitting, first_failure, listed
from flows.runs.runfile import DataSource, MethodRun, RunFile, RunFileError, SearchRun, to_toml
from flows.runs.search import in_words
from flows.sweep import Sweep
from flows.where.runners import ThreadsRunner, on_asked_runner
from flows.where.watch import Watch
from storage.store import Store
from storage.whole import write_whole
from tasks.core.compute import inputs_of
from tasks.core.handles import Cell
from tasks.search.hold_out import FOLDER, RULES, hold_out
from tasks.search.trials import Rung, Score, Trial, score, standings, survivors, trials_csv, winner

STORE = "search"
"""In the store: the outputs and records of the trials, so that nobody takes them for results on real defects."""


@dataclass(frozen=True)
class Searched:
    """What came of one search."""

    search: SearchRun
    scores: list[Score]

    @property
    def chosen(self) -> MethodRun | None:
        """The parameters to use; None where no trial came through."""
        best = winner(self.scores)
        return None if best is None else MethodRun(name=best.trial.method, params=best.trial.params)

    def rows(self) -> Iterator[dict[str, Any]]:
        """For people: the trials, best first."""
        last = len(self.search.ladder())
        for place, each in enumerate(standings(self.scores), start=1):
            yield {
                "place": place,
                "method": each.trial.method,
                "parameters": in_words(self.search.searched(each.trial)),
                "rung": f"{each.rung.number + 1} of {last}",
                "share": f"{each.rung.share:.0%} of {self.search.resource}",
                self.search.metric: "–" if each.mean is None else f"{100 * each.mean:.2f}",
                "spread": "–" if each.spread is None else f"{100 * each.spread:.2f}",
                "failed": "; ".join(each.failed),
            }


@dataclass(frozen=True)
class SearchOutcome:
    """What a run of searches ended with."""

    searched: list[Searched]
    table: str
    """Path of search.csv: every trial in every rung."""
    run_file: str | None
    """Path of chosen.toml; None where a search chose nothing."""
    compared: BenchmarkOutcome | None = None
    """The chosen parameters and the run's methods on the test set; None where the run names no method."""
    unusable: dict[str, str] = field(default_factory=dict)
    """data set/category -> why nothing can be held out in it."""


@flow(name="search", flow_run_name="search {run.title}", task_runner=ThreadsRunner())
def search(run: RunFile) -> State[SearchOutcome]:
    """Hold out, try, choose; and compare with the run's methods, where it names any. A failed trial stops no other."""
    run.check_search()
    run.check()
    ended = on_asked_runner(search, run)  # a deployment starts every run on threads
    if ended is not None:
        return ended
    store, unusable = Store(run.store), dict[str, str]()
    store.check_format()
    with Watch(store, "search") as watch:
        data = [_held_out(run, store, each, unusable) for each in run.search]
        watch.expect(sum(_cells(run, *each) for each in zip(run.search, data, strict=True)))
        tried = _Tried(run, watch)
        searched = [Searched(each, tried.scores(each, its)) for each, its in zip(run.search, data, strict=True)]
        outcome = _written(run, searched, unusable)
        watch.trials([row for each in searched for row in each.rows()], outcome.table)
    if outcome.run_file is None:
        return Failed(data=outcome, message=f"no trial of a search came through; see {outcome.table}")
    if run.methods:
        outcome = replace(outcome, compared=compare(_with_chosen(run, searched), store))
    failed = bool(unusable) or (outcome.compared is not None and outcome.compared.failed > 0)
    return (Failed if failed else Completed)(data=outcome, message=f"{outcome.table}, {outcome.run_file}")


def _held_out(run: RunFile, store: Store, search: SearchRun, unusable: dict[str, str]) -> list[DataSource]:
    """What a search chooses by: a data set for each category; why there is none is told in `unusable`."""
    folder = str(Path(run.report).resolve() / FOLDER)
    size, _ = inputs_of(Cell("", "", search.method, search.all_trials()[0].params))
    started: list[tuple[str, Steps]] = []
    for source in run.data:
        found = listed(store, source)
        unusable |= {f"{source.dataset}/{name}": reason for name, reason in found.problems.items()}
        for category in found.categories:
            do = Submitting(CategorySteps(category, run))
            images, _ = order.inputs(do, run, category, size, None)
            do("train", hold_out, images, folder, search.held_out, search.seed)
            started.append((category.name, do.steps))
    data = []
    for name, steps in started:
        failure = first_failure(steps)
        if failure is None:
            root = steps[hold_out.name].result()
            data.append(DataSource(dataset="folder", root=root, categories=[name.replace("/", ".")]))
        else:
            unusable[name] = f"{failure[0]}: {failure[1]}"
    if not data:
        name, reason = next(iter(unusable.items()))
        raise RunFileError(f"no category can be searched on; the first, {name}: {reason}")
    return data


def _cells(run: RunFile, search: SearchRun, data: Sequence[DataSource]) -> int:
    """Cells of all rungs, where no trial fails."""
    return sum(rung.trials for rung in search.ladder()) * len(data) * len(run.seeds)


class _RungRun(RunFile):
    """The cells of a rung."""

    train_share: float

    def cells(self, dataset: str, category: str) -> list[Cell]:
        """As of any run, with the rung's share of the images to learn from."""
        return [replace(cell, train_share=self.train_share) for cell in super().cells(dataset, category)]


class _Tried:
    """Runs the rungs of searches, one after the other."""

    def __init__(self, run: RunFile, watch: Watch) -> None:
        """Nothing is computed yet."""
        self.run, self.watch, self.ended = run, watch, 0
        self.store = Store(Store(run.store).url.rstrip("/") + f"/{STORE}")
        self.store.check_format()

    def scores(self, search: SearchRun, data: Sequence[DataSource]) -> list[Score]:
        """Every trial's in every rung that it came to."""
        alive, scores, found = search.all_trials(), list[Score](), list[Score]()
        for rung in search.ladder():
            alive = survivors(scores, rung.trials) if rung.number else alive
            if not alive:  # a run without a method would be one of all methods
                break
            scores = self._rung(search, data, rung, alive)
            found += scores
        return found

    def _rung(self, search: SearchRun, data: Sequence[DataSource], rung: Rung, trials: Sequence[Trial]) -> list[Score]:
        """The trials' scores, from a sweep as of any benchmark."""
        methods = [search.at(trial, rung) for trial in trials]
        run = self._run(data, methods, search.image_share(rung))
        records = {}
        for record in Sweep(run, self.store, self.watch).records():
            records[record.cell] = record
            self.ended += 1
            self.watch.finished(self.ended, f"{search.method}, rung {rung.number + 1} of {len(search.ladder())}")
        found = []
        for trial, method in zip(trials, methods, strict=True):
            own = run.model_copy(update={"methods": [method]})
            cells = [cell for each in data for name in each.categories or () for cell in own.cells(each.dataset, name)]
            found.append(score(trial, rung, [records[cell.id] for cell in cells], search.metric))
        return found

    def _run(self, data: Sequence[DataSource], methods: Sequence[MethodRun], share: float) -> _RungRun:
        validation = self.run.validation.model_copy(update={"rules": dict(RULES)})
        values = dict(self.run) | {"data": list(data), "methods": list(methods), "search": []}
        return _RungRun(**values | {"store": self.store.url, "validation": validation, "train_share": share})


def _written(run: RunFile, searched: list[Searched], unusable: dict[str, str]) -> SearchOutcome:
    """The outcome, its files written."""
    folder = Path(run.report).resolve()
    table, run_file = folder / "search.csv", folder / "chosen.toml"
    write_whole(table, trials_csv([(each.search.resource, each.search.metric, each.scores) for each in searched]))
    if any(each.chosen is None for each in searched):
        run_file.unlink(missing_ok=True)  # an earlier one would be taken for the choice of this run
        return SearchOutcome(searched, str(table), None, unusable=unusable)
    write_whole(run_file, to_toml(_with_chosen(run, searched)))
    return SearchOutcome(searched, str(table), str(run_file), unusable=unusable)


def _with_chosen(run: RunFile, searched: Sequence[Searched]) -> RunFile:
    """A benchmark of the run's methods and what was chosen; of equal parameters, the first."""
    chosen = [each.chosen for each in searched if each.chosen is not None]
    methods: dict[str, MethodRun] = {}
    for method in [*run.methods, *chosen]:
        params = create(method.name, **method.params).params()
        methods.setdefault(f"{method.name} {json.dumps(params, sort_keys=True)}", method)
    return run.model_copy(update={"methods": list(methods.values()), "search": []})
