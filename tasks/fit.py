"""Fit a cell's detector on good training images only: on all of them, or the new ones on top of an earlier fit."""

from __future__ import annotations

import json
import logging
import math
import threading
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import safetensors.numpy

from al_models.detector import Detector
from al_models.parts.alignment import alignment
from storage.errors import Damaged, StorageError
from storage.store import Artifact, Draft, Store
from tasks.core.compute import detector_of, hardware_of, inputs_of, runtime_of
from tasks.core.earlier import latest, remember
from tasks.core.handles import Cell, Validated
from tasks.core.limits import in_memory
from tasks.core.split import fit_and_calibration, with_new_images
from tasks.core.steps import code_fingerprint, run_step, step, step_key
from tasks.core.stored import StoredCheckpoints, StoredSource, accepted_samples, as_safetensors
from tasks.extract import features_series
from tasks.prepare import pixels_series

logger = logging.getLogger(__name__)

_ENOUGH_TO_SEE = 32
"""Images that show whether all are aligned."""
_LOOKS = 200
"""Points of a loss curve that are kept in the manifest; the model's state has them all."""
_loaded: WeakValueDictionary[tuple[str, str, str], Detector] = WeakValueDictionary()
"""(store, key, device) -> a model in use: calibration and prediction run side by side, and one copy serves both."""
_kept: list[Detector] = []
"""The model last used: calibration and prediction also follow each other. The next fit lets go of it."""
_loading = threading.Lock()


@step("fit", "fit {cell.method} {cell.dataset}/{cell.category} seed {cell.seed}", gpu=True)
def fit(cell: Cell, validated: Validated, features: str | None) -> str:
    """Key of the model: `state.safetensors` (plain arrays) and, in the manifest, what it learned from.

    A cell with `update`, of a method that is `incremental`, goes on from the last such fit with equal parameters, seed
    and code: it learns the new images on top, which gives the fit of all of them up to rounding (a thousandth of a
    score at most). The key then says from which model. When an image that was learned is not to be learned any more
    (it is gone or set aside), all are learned at once.
    """
    store = Store(validated.category.store)
    if not (cell.update and detector_of(cell).traits.incremental):
        key = _key(cell, **_of_tonight(cell, validated))
        run_step(store, key, partial(_fit, store, cell, validated, features, None))
        return key
    series = _key(cell, reads=series_read(cell, validated))
    known = latest(store, series)
    key, base = _goes_on_from(store, cell, validated, known)
    run_step(store, key, partial(_fit, store, cell, validated, features, base))
    if known is None or known.key != key:
        remember(store, series, key)
    return key


def _key(cell: Cell, **of: Any) -> str:
    detector = detector_of(cell)
    return step_key(
        "models",
        cell.dataset,
        cell.category,
        method=cell.method,
        params=detector.params(),
        seed=cell.seed,
        share=cell.train_share,
        # A training rounds as its device does, so machines of two kinds do not share what they learned.
        mixed_precision=detector.traits.trains and runtime_of(cell).mixed_precision,
        code=method_code(__name__, detector),
        **of,
    )


def _of_tonight(cell: Cell, validated: Validated) -> dict[str, str]:
    # Not the key of the features: it also names images that nothing learns from.
    return {"data": validated.fingerprint, "inputs": series_read(cell, validated)}


def series_read(cell: Cell, validated: Validated) -> str:
    """The name of the series that the fit reads: of its outputs equal images have equal values."""
    _, spec = inputs_of(cell)
    return pixels_series(validated.prepared) if spec is None else features_series(validated, spec)


def _goes_on_from(
    store: Store, cell: Cell, validated: Validated, known: Artifact | None
) -> tuple[str, Artifact | None]:
    """Key of the fit, and the model it goes on from. `known`: the last of the series."""
    tonight = _of_tonight(cell, validated)
    whole = _key(cell, **tonight)
    if known is None:
        return whole, None
    ids, held_out = _split(cell, validated, known)
    before = known.meta["fitted_on"], known.meta["held_out"]
    if before == (ids, held_out):
        return known.key, None
    if not set(before[0]) <= set(ids) or store.find(whole) is not None:
        return whole, None
    return _key(cell, **tonight, updated_from=known.key), known


def _split(cell: Cell, validated: Validated, base: Artifact | None) -> tuple[list[str], list[str]]:
    """Ids to fit on and to hold out, which with a `base` are what it had of them and a share of the new ones."""
    samples = accepted_samples(validated)
    if base is None:
        return fit_and_calibration(samples, cell.seed, cell.train_share)
    return with_new_images(samples, cell.seed, base.meta["fitted_on"], base.meta["held_out"])


def method_code(step: str, detector: Detector) -> str:
    """Name of the code that makes a step's output with this detector. `step`: its module."""
    method = type(detector)
    return code_fingerprint(step, f"{method.__module__}:{method.__qualname__}")


def source_for(
    detector: Detector, validated: Validated, features: str | None, ids: list[str], batch_size: int = 16
) -> StoredSource:
    """The images and features, of these ids, that this detector reads."""
    return StoredSource(
        validated,
        ids,
        spec=detector.feature_spec(),
        features=features,
        images=detector.traits.needs_images,
        batch_size=batch_size,
    )


def load_model(store: Store, key: str, cell: Cell) -> Detector:
    """The fitted detector, for reading only. Raises Damaged when its state is not what was written."""
    asked = store.url, key, cell.device  # a model moves to the device that it predicts on
    with _loading:
        detector = _loaded.get(asked)
        if detector is None:
            _loaded[asked] = detector = _load(store, key, cell)
        _kept[:] = [detector]
        return detector


def _load(store: Store, key: str, cell: Cell) -> Detector:
    model = store.get(key)
    try:
        state = safetensors.numpy.load(store.read_bytes(f"{model.folder}/state.safetensors"))
        return detector_of(cell).load_state(state)
    except (safetensors.SafetensorError, KeyError) as error:
        raise Damaged(f"the model {key} cannot be read ({error}); delete its folder and fit again") from error


def _fit(
    store: Store, cell: Cell, validated: Validated, features: str | None, base: Artifact | None, draft: Draft
) -> dict[str, Any]:
    _kept.clear()
    ids, held_out = _split(cell, validated, base)
    checkpoints = StoredCheckpoints(store, f"checkpoints/{draft.key}.safetensors")
    learned_before = set() if base is None else set(base.meta["fitted_on"])
    new = [name for name in ids if name not in learned_before]

    def learn(batch_size: int) -> Detector:
        detector = detector_of(cell) if base is None else _load(store, base.key, cell)
        source = source_for(detector, validated, features, new, batch_size=batch_size)
        if base is None:
            return detector.fit(source, runtime_of(cell, checkpoints))
        return detector.partial_fit(source, runtime_of(cell)) if new else detector

    try:
        detector = in_memory(learn, 32)
    except StorageError as error:
        if base is None:
            raise
        logger.warning("%s: all images are learned, since the earlier model is of no use (%s)", cell.name, error)
        return _fit(store, cell, validated, features, None, draft)
    store.write_bytes(f"{draft.folder}/state.safetensors", as_safetensors(detector.state()))
    store.write_bytes(f"{draft.folder}/params.json", json.dumps(detector.params(), indent=1).encode())
    checkpoints.forget()
    warnings = _doubts(detector, validated, ids)
    for warning in warnings:
        logger.warning("%s: %s", cell.name, warning)
    learned = {"method": cell.method, "params": detector.params(), "fitted_on": ids, "held_out": held_out}
    learned |= {"updated_from": base and base.key, "hardware": hardware_of(cell.device)}
    course = {"losses": _losses(detector), "turns": list(detector.turn_losses())}
    return {**learned, **course, "facts": detector.facts(), "warnings": warnings}


def _losses(detector: Detector) -> list[list[float | None]]:
    """The course of a training as JSON can hold it; every look of a short one, some hundreds of a long one."""
    curve = list(zip(*zip(*detector.curve(), strict=True), *detector.turn_losses().values(), strict=True))
    kept = curve[:: -(-len(curve) // _LOOKS)] if curve else []
    kept += curve[-1:] if curve and kept[-1] is not curve[-1] else []
    return [[step, *(loss if math.isfinite(loss) else None for loss in losses)] for step, *losses in kept]


def _doubts(detector: Detector, validated: Validated, ids: list[str]) -> list[str]:
    """Sentences that speak against this method on these images."""
    sample = ids[:: max(1, len(ids) // _ENOUGH_TO_SEE)][:_ENOUGH_TO_SEE]
    if not detector.traits.aligned_images_only or len(sample) < 2:
        return []
    source = StoredSource(validated, sample, spec=None, features=None, images=True)
    images = source.read(range(len(sample))).images
    assert images is not None
    aligned = alignment(images)
    return [aligned.sentence] if aligned.warn else []
