"""What happens to a category before anything learns from it; each step is submitted once, for all cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefect.futures import PrefectFuture

from flows import order
from flows.runs.runfile import DataSource, IngestRun, RunFile, twice
from flows.where.runners import in_processes
from storage.errors import DatasetError
from storage.store import Store
from tasks.core.handles import Category, Prepared, Validated
from tasks.core.parts import Part, parts_of
from tasks.demo_data import make_demo_data
from tasks.ingest import Ingested, ingest
from tasks.prepare import prepare
from tasks.report.data.report import Judged
from tasks.suspect import shared_spec
from tasks.validate import verdict_key

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
    submitted: dict[tuple[str, order.Of, Part | None], PrefectFuture[Any]] = field(default_factory=dict)
    listed: dict[str, int] = field(default_factory=dict)
    """Images: all, and those of the test; looked up once."""
    guilty: list[PrefectFuture[Any]] = field(default_factory=list)
    """Steps that ended their worker while no other cell was under way."""

    def judged(self, image_size: int, suspects: bool) -> Steps:
        """The images judged, and then what is suspected of them where that is wanted."""
        do = Submitting(self)
        images = order.judged(do, self.run, self.category, image_size)
        if suspects:
            order.compared(do, self.run, images, image_size)
        return do.steps

    def to_show(self) -> list[Steps]:
        """What was judged, by image size; with suspects where the policy wants to know them and a cell asked for the
        features anyway."""
        wanted = self.run.validation.severity("suspected_defect") != "off"
        features = {of for _, of, _ in self.submitted}
        sizes = [of for name, of, _ in self.submitted if name == prepare.name]
        return [self.judged(size, wanted and shared_spec(size) in features) for size in sizes]

    def forget_lost(self) -> None:
        """Steps that were lost by no fault of their own are submitted again when they are asked for."""
        kept = {key: step for key, step in self.submitted.items() if step in self.guilty or not _is_lost(step)}
        self.submitted = kept

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


@dataclass
class Submitting(order.Doing):
    """Sends each step to the workers, those that cells share once; it gives the future."""

    category: CategorySteps
    steps: Steps = field(default_factory=dict)

    def __call__(self, of: Any, step: Any, *args: Any) -> Any:
        return self._sent(step.name, of, None, step, *args)

    def parts(self, of: Any, step: Any, *args: Any) -> Any:
        parts = self.category.parts("test" if of == "test" else "all")
        name = f"{step.name.removesuffix(' part')} images"
        return [self._sent(f"{name} {part}", of, part, step, *args, part) for part in parts]

    def _sent(self, name: str, of: Any, part: Part | None, step: Any, *args: Any) -> PrefectFuture[Any]:
        known = {} if of in order.OWN else self.category.submitted
        key = step.name, of, part
        if key not in known:
            known[key] = step.submit(*args)
        # The features of a cell's method come before those that suspects are looked for in, and keep the name.
        self.steps.setdefault(name, known[key])
        return known[key]


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
