"""Keep a finished cell as a version of its model, and load a version to predict with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors.numpy

from al_models.calibration import HeldOutPixels
from al_models.detector import Detector
from al_models.errors import InvalidInput, WeightsUnavailable
from al_models.parts.weights import weights_fingerprint
from al_models.registry import create
from storage.errors import Damaged, NotInStore
from storage.models import Registry
from storage.models.versions import HELD_OUT, REFERENCE, STATE, Calibration, Features, Lineage, ModelVersion
from storage.records import RunRecord, read_record
from storage.store import Store
from tasks.calibrate import held_out_pixels
from tasks.core.steps import step
from tasks.core.stored import as_safetensors
from tasks.prepare import white_of
from tasks.serve.model_card import model_card
from tasks.serve.reference import Reference, reference_of

_COPIED = ("model", "calibration", "evaluation")
"""Outputs of a run that a version is made of."""


@step("register", "register {record}")
def register(store_url: str, record: str, who: str, why: str) -> str:
    """Label of the version, `mvtec_ad/grid@3`, that the cell of this record is kept as: a new one, or the one that it
    is kept as already. It becomes the challenger, unless it has ever had an alias.

    Raises NotInStore for a record, or an output of its run, that is not there, InvalidInput for a cell that failed.
    """
    store = Store(store_url)
    registry, cell = Registry(store), read_record(store, record)
    if cell is None:
        raise NotInStore(f"the record {record} is not in {store_url}; `al records` lists those that are")
    if cell.status != "done":
        raise InvalidInput(f"the cell of {record} has no model, it failed ({cell.reason}); run it again")
    version = _kept(registry, cell) or _add(registry, cell)
    if not registry.aliases(version.name).had(version.number):
        registry.challenge(version, who=who, why=why)
    return version.label


def _kept(registry: Registry, record: RunRecord) -> ModelVersion | None:
    """The version of this very run, if there is one."""
    outputs = {step: record.keys[step] for step in _COPIED}
    versions = registry.versions(f"{record.dataset}/{record.category}")
    return next((version for version in versions if version.lineage.outputs == outputs), None)


def _add(registry: Registry, record: RunRecord) -> ModelVersion:
    store, model, held_out = registry.store, *(registry.store.get(record.keys[step]) for step in _COPIED[:2])
    pixels = held_out_pixels(store, record.keys["calibration"])
    keys = np.flatnonzero(pixels.shares + pixels.maxima)
    arrays = {
        "scores": np.asarray(held_out.meta["scores"], np.float64),
        "map_maxima": np.asarray(held_out.meta["map_maxima"], np.float64),
        "pixel_keys": keys.astype(np.uint16),
        "pixel_shares": pixels.shares[keys],
        "pixel_maxima": pixels.maxima[keys],
    }
    files = {
        STATE: store.read_bytes(f"{model.folder}/state.safetensors"),
        HELD_OUT: as_safetensors(arrays),
        REFERENCE: reference_of(store, record, model.meta, arrays["scores"]).to_bytes(),
    }
    parent = registry.aliases(f"{record.dataset}/{record.category}").points.get("champion")
    version = replace(_version_of(record, model.meta, parent), white=white_of(store, record.keys["images"]))
    return registry.add(version, files, model_card)


def _version_of(record: RunRecord, model: dict[str, Any], parent: int | None) -> ModelVersion:
    """The version with all but what the registry itself adds to it. `model`: what the fit said of its output."""
    spec = create(record.method, **record.params).feature_spec()
    image, pixel = record.calibration["image"], record.calibration["pixel"]
    return ModelVersion(
        dataset=record.dataset,
        category=record.category,
        method=record.method,
        params=record.params,
        seed=record.seed,
        calibration=Calibration(
            rate=image["rate"],
            images=image["n"],
            image=image["value"],
            pixel=pixel["value"],
            note=image.get("note"),
            realised=record.calibration.get("realised", {}),
        ),
        features=spec and Features(asdict(spec), weights_fingerprint(spec)),
        lineage=Lineage(
            fitted_on=model["fitted_on"],
            held_out=model["held_out"],
            record=record.key(),
            outputs={step: record.keys[step] for step in _COPIED},
            parent=parent,
            updated_from=model.get("updated_from"),
            root=record.root,
        ),
        metrics=record.metrics,
        intervals=record.intervals,
        counts=record.counts,
        facts=record.facts,
        warnings=record.warnings,
        fingerprints=record.fingerprints,
        versions=record.versions,
        hardware=record.hardware,
    )


@dataclass(frozen=True, eq=False)
class LoadedVersion:
    """A version ready to predict."""

    version: ModelVersion
    """Its `calibration` has the thresholds; predict with its `seed`."""
    detector: Detector
    """Fitted; for reading only."""
    scores: np.ndarray
    """float64 [n]: of the held-out good images; `al_models.calibration.p_values` takes them."""
    pixels: HeldOutPixels
    """Map values of the held-out good images; `al_models.calibration.pixel_p_values` takes them."""
    reference: Reference
    """What its images look like as a whole: whether an image is in scope, and whether a batch has drifted."""


def load_version(store: Store, name: str) -> LoadedVersion:
    """The version meant by `mvtec_ad/grid` (the champion), `mvtec_ad/grid@3` or `mvtec_ad/grid@challenger`.

    Raises NotInStore for one that is not there, Damaged for one whose bytes have changed or that this version of the
    program cannot load, StoreTooNew, and WeightsUnavailable where the backbone's weights here are others.
    """
    registry = Registry(store)
    version = registry.resolve(name)
    detector = create(version.method, **version.params)
    _check_weights(version, detector)
    state, held_out = (safetensors.numpy.load(registry.read(version, file)) for file in (STATE, HELD_OUT))
    reference = Reference.from_bytes(registry.read(version, REFERENCE))
    pixels = HeldOutPixels(ids=set(version.lineage.held_out))
    pixels.shares[held_out["pixel_keys"]] = held_out["pixel_shares"]
    pixels.maxima[held_out["pixel_keys"]] = held_out["pixel_maxima"]
    try:
        return LoadedVersion(version, detector.load_state(state), held_out["scores"], pixels, reference)
    except (KeyError, RuntimeError) as error:
        raise Damaged(
            f"{version.label} does not fit this version of {version.method} ({error}); fit again, or load it with the "
            "version of the program that made it"
        ) from error


def _check_weights(version: ModelVersion, detector: Detector) -> None:
    spec = detector.feature_spec()
    if spec is None or version.features is None:
        return
    here = weights_fingerprint(spec)
    if here != version.features.weights:
        raise WeightsUnavailable(
            f"{version.label} reads features of the weights {version.features.weights}, and {spec.backbone} has "
            f"{here} here; install those it was fitted with, or fit again"
        )
