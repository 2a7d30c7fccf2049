"""What a run would do, before anything is computed: its cells, what is there already, features, time and disk.

Every step is asked for its output in the order of the run, and only looks. Seconds come from the records in the store,
per image and step: of the same method where there are any. A first run has no estimate, but for a method of which one
training has begun: its checkpoint, left after seconds, tells the rate. Of a search it says what is to be tried, and
nothing of what is there: which trials go on is not known before.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from statistics import median
from typing import Any, get_type_hints

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from al_models.parts.backbone import feature_shapes
from al_models.parts.train import whole_seconds
from al_models.types import FeatureSpec
from flows import order
from flows.category import all_listed, listed
from flows.runs.runfile import DataSource, RunFile, SearchRun
from flows.runs.search import in_words
from storage.errors import NotInStore
from storage.records import RunRecord, read_records
from storage.store import Store
from tasks.core.compute import detector_of, inputs_of
from tasks.core.handles import Category, Cell, Prepared
from tasks.core.steps import NotMadeYet, only_looking
from tasks.core.stored import StoredCheckpoints
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.validate import CategoryStopped

_HALF, _BYTE = 2, 1
_TRIALS = 12
"""Trials of a search that are shown with their parameters."""


@dataclass(frozen=True)
class PlannedStep:
    """A step of the run, which several cells may share."""

    name: str
    what: str
    """Data set and category, and the method or features where there are any."""
    images: int
    done: bool
    bytes: int | None = None
    """What it will write; None where only a fit could tell."""
    seconds: float | None = None
    """Its estimate; None without an earlier record."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell and what is left of it."""

    cell: Cell
    left: tuple[str, ...]
    """Its steps that are still to be computed, those it shares among them; empty when it is done."""
    stopped: str = ""
    """Why nothing can be learned from its category."""


@dataclass
class Plan:
    """All of a run."""

    cells: list[PlannedCell] = field(default_factory=list)
    steps: dict[Any, PlannedStep] = field(default_factory=dict)
    """Each once, however many cells share it."""

    def to_do(self) -> list[PlannedStep]:
        """The steps that will be computed."""
        return [step for step in self.steps.values() if not step.done]

    def bytes(self) -> int:
        """Images, features and maps that will be written; models are not among them."""
        return sum(step.bytes or 0 for step in self.to_do())


def plan(run: RunFile) -> Plan:
    """Look at everything the run would do. Files are listed, and hashed where the store does not know them yet."""
    run.check()
    store, found = Store(run.store), Plan()
    rates = Rates(read_records(store))
    with only_looking():
        for source, ingested in all_listed(store, run, ingest.fn):
            for name, reason in ingested.problems.items():
                found.cells += [PlannedCell(cell, (), reason) for cell in run.cells(source.dataset, name)]
            for category in ingested.categories:
                for cell in run.cells(category.dataset, category.category):
                    found.cells.append(_planned(run, category, cell, _Planned(store, category, cell, found, rates)))
    return found


def _planned(run: RunFile, category: Category, cell: Cell, do: _Planned) -> PlannedCell:
    try:
        order.record_of_cell(do, run, category, cell)
    except CategoryStopped as error:
        return PlannedCell(cell, (), str(error))
    return PlannedCell(cell, tuple(do.left))


class _Names(dict[str, str], order.Doing):
    """Takes down each step and the images that its time grows with."""

    def __call__(self, of: order.Of, step: Any, *args: Any) -> Any:
        self[step.name] = of if of in order.OWN else "all"


@cache
def _steps() -> dict[str, str]:
    """Those of any cell with features, in their order."""
    names, run = _Names(), RunFile(data=[DataSource(dataset="", root="")])
    order.record_of_cell(names, run, Category(*[""] * 6), Cell("", "", "padim"))
    return names


class Rates:
    """Seconds an image of each step, as earlier records have them."""

    def __init__(self, records: Iterable[RunRecord]) -> None:
        """Take the records in."""
        seen: dict[Any, list[float]] = defaultdict(list)
        for record in records:
            counts = {name: record.counts.get(name, 0) for name in ("train", "calibration")}
            test = sum(record.counts.get(f"test_{label}", 0) for label in ("good", "anomalous", "unknown"))
            images = {"train": counts["train"], "test": test, "all": sum(counts.values()) + test}
            for step, seconds in record.seconds.items():
                rate = seconds / max(1, images[_steps().get(step, "all")])
                seen[_of(step, record.method)].append(rate)
        self.rates = {of: median(rates) for of, rates in seen.items()}

    def note(self, step: str, method: str, seconds: float, images: int) -> None:
        """What one that has begun takes, where no record tells."""
        self.rates.setdefault((step, method), seconds / max(1, images))

    def seconds(self, step: str, method: str | None, images: int) -> float | None:
        """The estimate for so many images; None without a record of this step (and method)."""
        rate = self.rates.get(_of(step, method))
        return None if rate is None else rate * images


def _of(step: str, method: str | None) -> tuple[str, str | None]:
    """Whose rates count: of a step that methods share, those of all."""
    return step, None if _steps().get(step, "all") == "all" else method


_UNKNOWN = object()


def _named(step: Any, args: tuple[Any, ...], key: str | None) -> Any:
    """What stands for an output that is not made: its key, where later steps are named by nothing else of it."""
    if key is not None and step is prepare:
        return Prepared(*args, key)
    return key if key is not None and get_type_hints(step.fn)["return"] is str else _UNKNOWN


class _Planned(order.Doing):
    """Looks for each step of one cell, and notes it in the plan."""

    def __init__(self, store: Store, category: Category, cell: Cell, plan: Plan, rates: Rates) -> None:
        self.store, self.category, self.cell, self.plan, self.rates = store, category, cell, plan, rates
        self.left: list[str] = []
        counts = store.get(category.catalogue).meta["counts"]
        self.images = {"train": counts.get("train", 0), "test": sum(n for k, n in counts.items() if k[:5] == "test_")}
        self.images["all"] = sum(n for name, n in counts.items() if name != "without_mask")

    def __call__(self, of: order.Of, step: Any, *args: Any) -> Any:
        made, key, missing = None, None, True
        try:
            if _UNKNOWN not in args:
                made, missing = step.fn(*args), False
        except NotMadeYet as error:
            key = error.key
        except NotInStore:  # an output that it tells of is gone, and made again before
            pass
        images = self.images[of if of in order.OWN else "all"]
        if missing:
            made = _named(step, args, key)
            self.left += [] if step.name in self.left else [step.name]
            self._note_begun(step.name, key, images)
        seconds = self.rates.seconds(step.name, self.cell.method, images)
        what = f"{self.category.name} {self._what(of)}".strip()
        noted = PlannedStep(step.name, what, images, not missing, self._bytes(step.name, of), seconds)
        self.plan.steps.setdefault((step.name, self.category.name, self.cell.id if of in order.OWN else of), noted)
        return made

    def _what(self, of: order.Of) -> str:
        if isinstance(of, FeatureSpec):
            return f"{of.backbone} {of.image_size} px, layers {', '.join(map(str, of.layers))}"
        return f"{of} px" if isinstance(of, int) else f"{self.cell.method} seed {self.cell.seed}"

    def _bytes(self, step: str, of: order.Of) -> int | None:
        """Of the images, taken for colour; of features and maps. What only a fit could tell is not known, and what
        other steps write is small."""
        if step == "prepare":
            return self.images["all"] * int(of) ** 2 * 3 * _BYTE
        if isinstance(of, FeatureSpec):
            return self.images["all"] * sum(math.prod(shape) for shape in feature_shapes(of).values()) * _HALF
        if step == "predict":
            return self.images["test"] * inputs_of(self.cell)[0] ** 2 * _HALF
        return None if step == "fit" else 0

    def _note_begun(self, step: str, key: str | None, images: int) -> None:
        """The rate of a training that was begun."""
        if step != "fit" or key is None:
            return
        state = StoredCheckpoints(self.store, f"checkpoints/{key}.safetensors").load()
        if state is not None:
            minutes = detector_of(self.cell).params().get("max_minutes") or math.inf
            self.rates.note("fit", self.cell.method, min(60 * minutes, whole_seconds(state)), images)


def tables(found: Plan) -> list[RenderableType]:
    """The plan for people: cells by category and method, steps to compute, features, and the sums."""
    names = dict.fromkeys([*_steps(), *(step.name for step in found.steps.values())])
    cells = Table("category", "method", "cells", "done", "left to do", box=None, title="cells", title_justify="left")
    for (category, method), each in _grouped(found.cells).items():
        left = Counter(step for cell in each for step in cell.left)
        stopped = next((cell.stopped for cell in each if cell.stopped), "")
        done = sum(not cell.left and not cell.stopped for cell in each)
        todo = stopped or ", ".join(f"{name} {left[name]}" for name in names if left[name])
        cells.add_row(category, method, str(len(each)), str(done), todo)
    steps = Table("step", "there", "to compute", "estimate", box=None, title="steps, each once", title_justify="left")
    for name in names:
        mine = [step for step in found.steps.values() if step.name == name]
        todo = [step for step in mine if not step.done]
        steps.add_row(name, str(len(mine) - len(todo)), str(len(todo)), _duration([step.seconds for step in todo]))
    features = Table("features", "images", "there", "size", box=None, title="features", title_justify="left")
    for step in found.steps.values():
        if step.name == "extract":
            features.add_row(step.what, str(step.images), "yes" if step.done else "no", _size(step.bytes or 0))
    sums = f"to write: {_size(found.bytes())}, models not counted; to compute on one worker: "
    return [cells, steps, features, sums + _duration([step.seconds for step in found.to_do()])]


def search_tables(run: RunFile) -> list[RenderableType]:
    """What its searches would try, for people: the rungs and first trials of each. Files are listed, as by a plan."""
    store = Store(run.store)
    with only_looking():
        found = [listed(store, source, ingest.fn) for source in run.data]
    cells = sum(len(each.categories) for each in found) * len(run.seeds)
    shown = [table for search in run.search for table in _search(search, cells)]
    for source, each in zip(run.data, found, strict=True):
        shown += [escape(f"not searched on: {source.dataset}/{name}: {told}") for name, told in each.problems.items()]
    if run.methods:
        chosen = len(run.search) * cells
        shown.append(f"on the test set: {chosen} cells of what will be chosen, and those of the methods:")
    return shown


def _search(search: SearchRun, cells: int) -> list[RenderableType]:
    """`cells`: of a trial in a rung."""
    about = f"search of {search.method} by {search.metric} on {search.held_out:.0%} of the good training images"
    about += f"; all trials have {in_words(search.fixed)}" if search.fixed else ""
    rungs = Table("rung", "trials", "share", "cells", box=None, title="rungs", title_justify="left")
    ladder, trials = search.ladder(), search.all_trials()
    for rung in ladder:
        share = f"{rung.share:.0%} of {search.resource}"
        rungs.add_row(f"{rung.number + 1} of {len(ladder)}", str(rung.trials), share, str(rung.trials * cells))
    first = Table("trial", "parameters", box=None, title="trials", title_justify="left")
    for trial in trials[:_TRIALS]:
        first.add_row(str(trial.number), escape(in_words(search.searched(trial))))
    more = len(trials) - _TRIALS
    return [escape(about), rungs, first, *([f"and {more} more"] if more > 0 else [])]


def _grouped(cells: Iterable[PlannedCell]) -> dict[tuple[str, str], list[PlannedCell]]:
    groups: dict[tuple[str, str], list[PlannedCell]] = defaultdict(list)
    for each in cells:
        groups[f"{each.cell.dataset}/{each.cell.category}", each.cell.method].append(each)
    return groups


def _duration(seconds: Sequence[float | None]) -> str:
    known = [each for each in seconds if each is not None]
    text = str(timedelta(seconds=round(sum(known))))
    unknown = len(seconds) - len(known)
    return text if not unknown else f"{text} and {unknown} steps without an earlier record"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
