"""What the images behind a version look like as a whole: new ones are compared with it, one by one and by the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.numpy

from al_models.drift import Scope
from storage.records import RunRecord
from storage.stacks import Stack
from storage.store import Store
from storage.tables import read_table
from tasks.core.stored import as_safetensors, rows_of

LIGHT = ("brightness", "contrast", "sharpness")


@dataclass(frozen=True, eq=False)
class Reference:
    """What `al_models.drift` compares new images with."""

    scope: Scope
    """What the means of features are like; for a method that reads none, of brightness, contrast and sharpness."""
    statistics: dict[str, np.ndarray]
    """Values of held-out good images, float64 [n] each: `score`, `features` (their distance in the scope), LIGHT."""

    def to_bytes(self) -> bytes:
        """The reference as a version keeps it."""
        scope = {f"scope.{name}": np.asarray(value, np.float64) for name, value in asdict(self.scope).items()}
        return as_safetensors(scope | self.statistics)

    @staticmethod
    def from_bytes(data: bytes) -> Reference:
        """The reference that `to_bytes` wrote."""
        arrays = safetensors.numpy.load(data)
        scope = {name: arrays.pop(f"scope.{name}") for name in ("mean", "whitening", "centre", "spread")}
        ends = {name: float(scope.pop(name)) for name in ("centre", "spread")}
        return Reference(Scope(**scope, **ends), arrays)


def reference_of(store: Store, record: RunRecord, model: Mapping[str, Any], scores: np.ndarray) -> Reference:
    """The reference made from what the run stored of its images. `model`: what the fit said of its output; scores [n]
    are those of the held-out images. Raises NotInStore when an output of the run is gone."""
    learned, held_out = model["fitted_on"], model["held_out"]
    light, seen = _looks(store, record.keys["images"], record.keys.get("features"), [*learned, *held_out])
    scope = Scope.of(seen[: len(learned)], seen[len(learned) :])
    n = len(learned)
    return Reference(scope, _statistics(scope, light[n:], seen[n:], scores))


def statistics_of(
    reference: Reference,
    store: Store,
    images: str,
    features: str | None,
    ids: Sequence[str],
    scores: np.ndarray,
) -> dict[str, np.ndarray]:
    """The statistics of a reference, float64 [n] each, of other stored images. `images`, `features`: keys of the
    prepared images and of the features, if there are any; `scores` [n] by the model of the reference."""
    return _statistics(reference.scope, *_looks(store, images, features, ids), scores)


def _statistics(scope: Scope, light: np.ndarray, seen: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    statistics = {"score": np.asarray(scores, np.float64), "features": scope.distance(seen)}
    return statistics | dict(zip(LIGHT, light.T, strict=True))


def _looks(store: Store, images: str, features: str | None, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """LIGHT (n, 3) of each image, and what its scope is about (n, d)."""
    light = _light(store, images, ids)
    return light, light if features is None else _means_of(store, features, ids)


def _light(store: Store, images: str, ids: Sequence[str]) -> np.ndarray:
    facts = read_table(store, f"{store.get(images).folder}/facts.parquet")
    by_content = facts.drop_duplicates("id").set_index("id")  # equal content, equal light
    return by_content.loc[list(ids), list(LIGHT)].to_numpy(np.float64)


def _means_of(store: Store, features: str, ids: Sequence[str]) -> np.ndarray:
    output = store.get(features)
    return Stack.open(store, output, "means").read(rows_of(output.meta["ids"], ids))
