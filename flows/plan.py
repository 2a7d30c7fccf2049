"""What a run would do, before anything is computed: its cells, what is there already, features, time and disk.

Every step is asked for its output in the order of the run, and only looks. Seconds come from the records in the store,
per image and step: of the same method where there are any. A first run has no estimate, but for a method of which one
training has begun: its checkpoint, left after seconds, tells the rate. Of a search it says what is to be tried, and
nothing of what is there: which trials go on is not known before.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from al_models.parts.backbone import feature_shapes
from al_models.parts.train import whole_seconds
from al_models.types import FeatureSpec
from flows.category import CategorySteps, all_listed, listed
from flows.runs.runfile import RunFile, SearchRun
from flows.runs.search import in_words
from storage.records import RunRecord, read_records
from storage.store import Store
from tasks.calibrate import calibrate
from tasks.core.compute import detector_of, inputs_of
from tasks.core.handles import Category, Cell, Prepared, Validated
from tasks.core.steps import NotMadeYet, only_looking
from tasks.core.stored import StoredCheckpoints
from tasks.evaluate import evaluate
from tasks.extract import extract
from tasks.fit import fit
from tasks.ingest import ingest
from tasks.predict import predict
from tasks.prepare import prepare
from tasks.validate import CategoryStopped, validate

STEPS = ("prepare", "validate", "extract", "fit", "calibrate", "predict", "evaluate")
_READS = {"fit": "train", "calibrate": "train", "predict": "test", "evaluate": "test"}
"""The images that a step's time grows with; all of them where it is not named."""
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
                looked = _Looked(run, store, category, found, rates)
                for cell in run.cells(category.dataset, category.category):
                    found.cells.append(looked.at(cell))
    return found


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
                rate = seconds / max(1, images[_READS.get(step, "all")])
                seen[step, record.method if step in _READS else None].append(rate)
        self.rates = {of: median(rates) for of, rates in seen.items()}

    def note(self, step: str, method: str, seconds: float, images: int) -> None:
        """What one that has begun takes, where no record tells."""
        self.rates.setdefault((step, method), seconds / max(1, images))

    def seconds(self, step: str, method: str | None, images: int) -> float | None:
        """The estimate for so many images; None without a record of this step (and method)."""
        rate = self.rates.get((step, method if step in _READS else None))
        return None if rate is None else rate * images


class _Looked:
    """What is there of one category."""

    def __init__(self, run: RunFile, store: Store, category: Category, plan: Plan, rates: Rates) -> None:
        self.run, self.store, self.category, self.plan, self.rates = run, store, category, plan, rates
        counts = store.get(category.catalogue).meta["counts"]
        self.images = {"train": counts.get("train", 0), "test": sum(n for k, n in counts.items() if k[:5] == "test_")}
        self.images["all"] = sum(n for name, n in counts.items() if name != "without_mask")

    def at(self, cell: Cell) -> PlannedCell:
        """The cell, its steps noted in the plan."""
        size, spec = inputs_of(cell)
        left: list[str] = []

        def look(step: str, of: Any, what: str, ask: Callable[[], Any] | None, size_of: int | None) -> Any:
            """The step's output, or None where it has to be made."""
            made, missing = None, ask is None
            try:
                made = ask() if ask else None
            except NotMadeYet as error:
                made, missing = error.key, True
            images = self.images[_READS.get(step, "all")]
            if missing:
                left.append(step)
                self._note_begun(step, cell, made, images)
            seconds = self.rates.seconds(step, cell.method, images)
            noted = PlannedStep(step, f"{self.category.name} {what}".strip(), images, not missing, size_of, seconds)
            self.plan.steps.setdefault((step, self.category.name, of), noted)
            return made

        try:
            validated = self._validated(look, size)
        except CategoryStopped as error:
            return PlannedCell(cell, (), str(error))
        features = None
        if spec is not None:
            what = f"{spec.backbone} {spec.image_size} px, layers {', '.join(map(str, spec.layers))}"
            ask = None if validated is None else lambda: extract.fn(validated, spec, self.run.device)
            features = look("extract", spec, what, ask, self._of_features(spec))
        self._of_cell(look, cell, validated, features, spec is None, size)
        return PlannedCell(cell, tuple(left))

    def _note_begun(self, step: str, cell: Cell, key: str | None, images: int) -> None:
        """The rate of a training that was begun."""
        if step != "fit" or key is None:
            return
        state = StoredCheckpoints(self.store, f"checkpoints/{key}.safetensors").load()
        if state is not None:
            minutes = detector_of(cell).params().get("max_minutes") or math.inf
            self.rates.note("fit", cell.method, min(60 * minutes, whole_seconds(state)), images)

    def _validated(self, look: Callable[..., Any], size: int) -> Validated | None:
        """The judged images; None where that is still to be done, so that nobody can name what follows."""
        prepared = look("prepare", size, f"{size} px", lambda: prepare.fn(self.category, size), self._of_images(size))
        if isinstance(prepared, str):
            prepared = Prepared(self.category, size, prepared)
        found = look("validate", size, f"{size} px", lambda: validate.fn(prepared, self.run.validation), 0)
        if not isinstance(found, Validated):
            return None
        try:
            return CategorySteps(self.category, self.run).looked_at(size)  # without suspects, where they are rejected
        except NotMadeYet:
            return None

    def _of_cell(
        self,
        look: Callable[..., Any],
        cell: Cell,
        validated: Validated | None,
        features: str | None,
        without_features: bool,
        size: int,
    ) -> None:
        """The steps that are the cell's own."""
        known = validated is not None and (without_features or features is not None)
        what = f"{cell.method} seed {cell.seed}"
        model = look("fit", cell.id, what, (lambda: fit.fn(cell, validated, features)) if known else None, None)
        ready = known and model is not None
        at = (cell, validated, features, model)
        held = look("calibrate", cell.id, what, (lambda: calibrate.fn(*at)) if ready else None, 0)
        of_maps = self.images["test"] * size * size * _HALF
        maps = look("predict", cell.id, what, (lambda: predict.fn(*at)) if ready else None, of_maps)
        look("evaluate", cell.id, what, (lambda: evaluate.fn(*at, held, maps)) if ready else None, 0)

    def _of_images(self, size: int) -> int:
        """Bytes of the decoded images, taken for colour."""
        return self.images["all"] * size * size * 3 * _BYTE

    def _of_features(self, spec: FeatureSpec) -> int:
        return self.images["all"] * sum(math.prod(shape) for shape in feature_shapes(spec).values()) * _HALF


def tables(found: Plan) -> list[RenderableType]:
    """The plan for people: cells by category and method, steps to compute, features, and the sums."""
    cells = Table("category", "method", "cells", "done", "left to do", box=None, title="cells", title_justify="left")
    for (category, method), each in _grouped(found.cells).items():
        left = Counter(step for cell in each for step in cell.left)
        stopped = next((cell.stopped for cell in each if cell.stopped), "")
        done = sum(not cell.left and not cell.stopped for cell in each)
        todo = stopped or ", ".join(f"{name} {left[name]}" for name in STEPS if left[name])
        cells.add_row(category, method, str(len(each)), str(done), todo)
    steps = Table("step", "there", "to compute", "estimate", box=None, title="steps, each once", title_justify="left")
    for name in STEPS:
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
