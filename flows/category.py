"""What happens to a category before anything learns from it; each step is submitted once, for all cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefect.futures import PrefectFuture

from al_models.types import FeatureSpec
from flows.runs.runfile import DataSource, IngestRun, RunFile, twice
from flows.where.runners import in_processes
from storage.errors import DatasetError
from storage.store import Store
from tasks.core.handles import Category, Prepared, Validated
from tasks.core.parts import Part, parts_of
from tasks.demo_data import make_demo_data
from tasks.extract import extract, extract_part
from tasks.ingest import Ingested, ingest
from tasks.prepare import prepare
from tasks.report.data.report import Judged
from tasks.suspect import shared_spec, suspect
from tasks.validate import validate, verdict_key

Steps = dict[str, PrefectFuture[Any]]
"""Step -> its future, in the order in which one waits for the other."""


def listed(
    store: Store, source: DataSource, take_in: Callable[..., Ingested] = ingest, *, rehash: bool = False
) -> Ingested:
    """The categories of a data set; the demo's is made first. `take_in`: the step, or its bare function."""
    if source.dataset == "demo":
        make_demo_data(Path(source.root))
    return take_in(store.url, source.dataset, source.root, source.categories, source.options, rehash)


def all_listed(
    store: Store, run: RunFile | IngestRun, take_in: Callable[..., Ingested] = ingest
) -> Iterator[tuple[DataSource, Ingested]]:
    """Each source of a run with its categories. Raises DatasetError for a category that two of them have: one model,
    and one row of a table, cannot stand for both."""
    roots: dict[str, str] = {}
    for source in run.data:
        found = listed(store, source, take_in, rehash=run.rehash)
        for category in (*(each.category for each in found.categories), *found.problems):
            name = f"{source.dataset}/{category}"
            if name in roots:
                raise DatasetError(twice(name, roots[name], source.root))
            roots[name] = source.root
        yield source, found


@dataclass
class CategorySteps:
    """The steps of one category that its cells share."""

    category: Category
    run: RunFile | IngestRun
    submitted: dict[Any, PrefectFuture[Any]] = field(default_factory=dict)
    listed: dict[str, int] = field(default_factory=dict)
    """Images: all, and those of the test; looked up once."""
    guilty: list[PrefectFuture[Any]] = field(default_factory=list)
    """Steps that ended their worker while no other cell was under way."""

    def inputs(self, image_size: int, spec: FeatureSpec | None) -> Steps:
        """The images of this size, judged, and the features where a spec is given: `validate` and `extract` are what
        later steps need. Suspects are taken out first where the policy says so."""
        steps = self._judged(image_size)
        if spec is not None:
            steps |= self._features(image_size, spec)
        if self.run.validation.severity("suspected_defect") == "reject":
            cleaned = self.suspects(image_size)
            # The verdict before stays among the steps: where it stops the category, it says why, and not that a later
            # step could not begin.
            steps = {"prepare": steps["prepare"], "verdict": steps["validate"], **steps}
            steps |= {"suspect": cleaned["suspect"], "validate": cleaned["suspect"]}
        return steps

    def suspects(self, image_size: int) -> Steps:
        """The images judged, and then what is suspected of them."""
        steps = self._judged(image_size) | self._features(image_size, shared_spec(image_size))
        if ("suspect", image_size) not in self.submitted:
            spec, run = shared_spec(image_size), self.run
            judged = suspect.submit(steps["validate"], steps["extract"], spec, run.validation, run.device)
            self.submitted["suspect", image_size] = judged
        return {**steps, "suspect": self.submitted["suspect", image_size]}

    def to_show(self) -> list[Steps]:
        """What was judged, by image size; with suspects where the policy wants to know them and a cell asked for the
        features anyway."""
        wanted = self.run.validation.severity("suspected_defect") != "off"
        sizes = [key[1] for key in self.submitted if isinstance(key, tuple) and key[0] == "prepare"]
        return [
            self.suspects(size) if wanted and shared_spec(size) in self.submitted else self._judged(size)
            for size in sizes
        ]

    def looked_at(self, image_size: int) -> Validated:
        """The judged images, within `only_looking`. Raises NotMadeYet or CategoryStopped."""
        validated = validate.fn(prepare.fn(self.category, image_size), self.run.validation)
        if self.run.validation.severity("suspected_defect") != "reject":
            return validated
        spec = shared_spec(image_size)
        features = extract.fn(validated, spec, self.run.device)
        return suspect.fn(validated, features, spec, self.run.validation, self.run.device)

    def forget_lost(self) -> None:
        """Steps that were lost by no fault of their own are submitted again when they are asked for."""
        kept = {key: step for key, step in self.submitted.items() if step in self.guilty or not _is_lost(step)}
        self.submitted = kept

    def _judged(self, image_size: int) -> Steps:
        if ("prepare", image_size) not in self.submitted:
            prepared = prepare.submit(self.category, image_size)
            self.submitted["prepare", image_size] = prepared
            self.submitted["validate", image_size] = validate.submit(prepared, self.run.validation)
        return {step: self.submitted[step, image_size] for step in ("prepare", "validate")}

    def _features(self, image_size: int, spec: FeatureSpec) -> Steps:
        """`extract`, after its parts where there are some."""
        judged, parts = self._judged(image_size)["validate"], self.parts("all")
        for part in parts:
            if (spec, part) not in self.submitted:
                self.submitted[spec, part] = extract_part.submit(judged, spec, self.run.device, part)
        steps = {f"extract images {part}": self.submitted[spec, part] for part in parts}
        if spec not in self.submitted:
            self.submitted[spec] = extract.submit(judged, spec, self.run.device, list(steps.values()))
        return {**steps, "extract": self.submitted[spec]}

    def parts(self, images: Literal["all", "test"]) -> list[Part]:
        """The parts that workers share of these images; none where the category is small, or in one process, where
        steps use all cores already."""
        return parts_of(self._images()[images]) if in_processes() else []

    def _images(self) -> dict[str, int]:
        """Listed; validation may set some aside."""
        if not self.listed:
            counts = Store(self.category.store).get(self.category.catalogue).meta["counts"]
            test = sum(images for name, images in counts.items() if name.startswith("test_"))
            self.listed = {"all": counts.get("train", 0) + counts.get("validation", 0) + test, "test": test}
        return self.listed


def first_failure(steps: Steps) -> tuple[str, Exception] | None:
    """Wait for these steps; the first that failed and why, or None."""
    for step, future in steps.items():
        try:
            future.result()
        # A worker that died is Dask's own error and by-passes Prefect's states: it fails these steps, not the run.
        except Exception as error:
            return step, error
    return None


def _is_lost(step: PrefectFuture[Any]) -> bool:
    """Whether a step ended by no fault of its own: with the scheduler, or with a worker that died."""
    future: Any = step
    future = future.wrapped_future
    return bool(future.cancelled()) or getattr(future, "status", "") == "error"  # Dask's; a failed step is a state


def judged_of(shared: CategorySteps, steps: Steps, failure: tuple[str, Exception] | None) -> Judged | None:
    """What the data page shows of a category, also of one that was stopped; None when it could not be decoded."""
    if failure is not None and failure[0] == "prepare":
        return None
    prepared: Prepared = steps["prepare"].result()
    if failure is None and "suspect" in steps:
        cleaned: Validated = steps["suspect"].result()
        return Judged(shared.category, prepared.images, cleaned.verdict, cleaned.suspects)
    return Judged(shared.category, prepared.images, verdict_key(prepared, shared.run.validation))
