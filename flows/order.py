"""The order of a category's and of a cell's steps, written once.

Who runs steps, who looks whether they are done and who plans them differ in what they do with a step (`Doing`), and in
nothing else: a step more is a line here, and is run, found again and planned like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ParamSpec, TypeVar

from prefect import Task

from al_models.types import FeatureSpec
from flows.runs.runfile import Run, RunFile
from storage.records import RunRecord
from tasks.calibrate import calibrate
from tasks.core.compute import inputs_of
from tasks.core.handles import Category, Cell, Validated
from tasks.evaluate import evaluate
from tasks.evaluate.count import count_part
from tasks.extract import extract, extract_part
from tasks.fit import fit
from tasks.night.screen import screen
from tasks.predict import predict, predict_part
from tasks.prepare import prepare
from tasks.suspect import shared_spec, suspect
from tasks.validate import validate

Of = int | FeatureSpec | str
"""What a step is of. One that is sent once, however often it is asked for: an image size, features, or a cell's id. Any
other of a cell: the images that its time grows with, `OWN`."""
OWN = ("train", "test")
P = ParamSpec("P")
R = TypeVar("R")


class Doing:
    """Looks for a step, within `only_looking`. What others do with it gives what the step gives, or stands for that."""

    def __call__(self, of: Of, step: Task[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What the step gives."""
        return step.fn(*args, **kwargs)

    def parts(self, of: Of, step: Task[..., str], *args: Any) -> Sequence[str]:
        """What it gives of each part of the images, of the test images where it is of a cell; none but on workers."""
        return ()


def judged(do: Doing, run: Run, category: Category, image_size: int) -> Validated:
    """The images of this size, with a verdict on each."""
    prepared = do(image_size, prepare, category, image_size)
    return do(image_size, validate, prepared, run.validation)


def features(do: Doing, run: Run, images: Validated, spec: FeatureSpec) -> str:
    """Key of the features of the accepted images."""
    parts = do.parts(spec, extract_part, images, spec, run.device)
    return do(spec, extract, images, spec, run.device, parts)


def compared(do: Doing, run: Run, images: Validated, image_size: int) -> Validated:
    """The images with what is suspected of them, and without it where the policy says so."""
    spec = shared_spec(image_size)
    return do(image_size, suspect, images, features(do, run, images, spec), spec, run.validation, run.device)


def inputs(
    do: Doing, run: Run, category: Category, image_size: int, spec: FeatureSpec | None
) -> tuple[Validated, str | None]:
    """What may be learned from, and the features where a spec is given: they stay good for the images that are left."""
    images = judged(do, run, category, image_size)
    extracted = None if spec is None else features(do, run, images, spec)
    if run.validation.severity("suspected_defect") == "reject":
        images = compared(do, run, images, image_size)
    return images, extracted


def inputs_of_cell(do: Doing, run: RunFile, category: Category, cell: Cell) -> tuple[Validated, str | None]:
    """What the cell begins with; a night's new images are screened first."""
    images, extracted = inputs(do, run, category, *inputs_of(cell))
    gate = run.screens()
    if gate is not None:
        images = do(cell.id, screen, cell, images, extracted, run.validation, gate)
    return images, extracted


def record_of_cell(do: Doing, run: RunFile, category: Category, cell: Cell) -> RunRecord:
    """All of the cell, from images to its record."""
    images, extracted = inputs_of_cell(do, run, category, cell)
    at = cell, images, extracted
    model = do("train", fit, *at)
    calibration = do("train", calibrate, *at, model)
    maps = do("test", predict, *at, model, do.parts("test", predict_part, *at, model))
    counts = do.parts("test", count_part, cell, images, maps)
    return do("test", evaluate, *at, model, calibration, maps, counts)
