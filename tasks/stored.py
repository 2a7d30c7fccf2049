"""Stored images and features as a detector reads them, and where a long fit leaves its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import zarr

from al_models.types import FeatureSpec, ImageBatch, ImageSource
from storage.errors import NotInStore
from storage.samples import Sample, from_parquet
from storage.store import Store
from tasks.handles import Validated


class StoredSource(ImageSource):
    """Some images of a category, out of the store; the next batch is read while the last is worked on."""

    def __init__(
        self,
        validated: Validated,
        ids: Sequence[str],
        *,
        spec: FeatureSpec | None,
        features: str | None,
        images: bool,
        batch_size: int = 16,
    ) -> None:
        """Open the arrays; nothing is read yet. `features` is the key of the extracted spec; `images`: read pixels."""
        store = Store(validated.category.store)
        self.ids, self.batch_size = tuple(ids), batch_size
        self._arrays: dict[int, Array] = {}
        if spec is not None and features is not None:
            found = store.get(features)
            rows = _rows(found.meta["ids"], ids)
            self._arrays = {key: Array.open(store, f"{found.folder}/layer{key}", rows) for key in spec.keys}
        self._images: Array | None = None
        if images:
            found = store.get(validated.prepared.images)
            self._images = Array.open(store, f"{found.folder}/images", _rows(found.meta["ids"], ids))

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """The images of these rows."""
        images = None
        if self._images is not None:
            pixels = torch.from_numpy(self._images.read(rows))  # (n, h, w, c)
            images = pixels.expand(*pixels.shape[:3], 3)
        features = {layer: torch.from_numpy(array.read(rows)) for layer, array in self._arrays.items()}
        return ImageBatch(tuple(self.ids[row] for row in rows), images, features)

    def __iter__(self) -> Iterator[ImageBatch]:
        """All images in order, one batch ahead."""
        ask = [range(i, min(i + self.batch_size, len(self))) for i in range(0, len(self), self.batch_size)]
        if not ask:
            return
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self.read, ask[0])
            for following in ask[1:]:
                batch, pending = pending.result(), ahead.submit(self.read, following)
                yield batch
            yield pending.result()


@dataclass(frozen=True)
class Array:
    """Some rows of a stored array."""

    array: zarr.Array[Any]
    rows: np.ndarray
    """Row in the array of each image asked for."""

    @staticmethod
    def open(store: Store, key: str, rows: Sequence[int]) -> Array:
        """Raises NotInStore when the array is not there."""
        try:
            return Array(zarr.open_array(store.zarr_store(key), mode="r"), np.asarray(rows))
        except FileNotFoundError as error:
            raise NotInStore(f"the array {key} is not in {store.url}; delete its folder and run again") from error

    def read(self, which: Sequence[int]) -> np.ndarray:
        """The rows asked for, in order; a span that is mostly wanted is read whole, since chunks are anyway."""
        rows = self.rows[np.asarray(which)]
        first, last = int(rows.min()), int(rows.max()) + 1
        if last - first <= 2 * len(rows):
            span = np.asarray(self.array[first:last])
            return span if np.array_equal(rows, np.arange(first, last)) else span[rows - first]
        return np.asarray(self.array.oindex[rows])


@dataclass(frozen=True)
class StoredCheckpoints:
    """The state of an unfinished fit, under the key of the model it will be."""

    store: Store
    key: str

    def load(self) -> dict[str, np.ndarray] | None:
        """The last state saved, or None."""
        try:
            return safetensors.numpy.load(self.store.read_bytes(self.key))
        except NotInStore:
            return None

    def save(self, state: dict[str, np.ndarray]) -> None:
        """Replace the saved state."""
        self.store.write_bytes(self.key, as_safetensors(state))

    def forget(self) -> None:
        """The fit is finished."""
        self.store.delete(self.key)


def as_safetensors(state: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as bytes, of the same shapes."""
    # Not np.ascontiguousarray: it makes one dimension of none, and a counter would come back as a list of one.
    return safetensors.numpy.save({name: np.asarray(value, order="C") for name, value in state.items()})


def accepted_samples(validated: Validated) -> list[Sample]:
    """The samples that passed validation, in the order of the features' rows."""
    store = Store(validated.category.store)
    return from_parquet(store.read_bytes(f"{store.get(validated.verdict).folder}/samples.parquet"))


def _rows(stored: Sequence[str], ids: Sequence[str]) -> list[int]:
    at: dict[str, int] = {}
    for row, name in enumerate(stored):
        at.setdefault(name, row)  # equal content, equal pixels: any of the rows will do
    return [at[name] for name in ids]
