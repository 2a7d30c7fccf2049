"""Stored images and features as a detector reads them, and where a long fit leaves its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from al_models.types import FeatureSpec, ImageBatch, ImageSource
from storage.errors import NotInStore
from storage.samples import Sample, from_parquet
from storage.stacks import Stack
from storage.store import Store
from tasks.core.handles import Validated


def files_left_out(catalogue: Mapping[str, Any]) -> int:
    """Files that the reader of a catalogue (its manifest) left out; an entry may stand for several."""
    return sum(int(entry.get("files", 1)) for entry in catalogue["set_aside"])


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
        self._features: dict[int, Stack] = {}
        if spec is not None and features is not None:
            output = store.get(features)
            self._rows = np.asarray(rows_of(output.meta["ids"], ids), int)
            self._features = {key: Stack.open(store, output, f"layer{key}") for key in spec.keys}
            self.offsets = {key: tuple(output.meta["offsets"][str(key)]) for key in spec.keys}
        self._images: Stack | None = None
        if images:
            output = store.get(validated.prepared.images)
            self._image_rows = np.asarray(rows_of(output.meta["ids"], ids), int)
            self._images = Stack.open(store, output, "images")

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """The images of these rows."""
        images = None
        if self._images is not None:
            pixels = torch.from_numpy(self._images.read(self._image_rows[rows]))  # (n, h, w, c)
            images = pixels.expand(*pixels.shape[:3], 3)
        features = {key: torch.from_numpy(stack.read(self._rows[rows])) for key, stack in self._features.items()}
        return ImageBatch(tuple(self.ids[row] for row in rows), images, features)

    def batches(self, rows: Sequence[int]) -> Iterator[ImageBatch]:
        """The images of these rows, one batch ahead."""
        ask = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        if not ask:
            return
        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(self.read, ask[0])
            for following in ask[1:]:
                batch, pending = pending.result(), ahead.submit(self.read, following)
                yield batch
            yield pending.result()


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


def rows_of(stored: Sequence[str], ids: Sequence[str]) -> list[int]:
    """Where these images lie among the stored ones."""
    at: dict[str, int] = {}
    for row, name in enumerate(stored):
        at.setdefault(name, row)  # equal content, equal pixels: any of the rows will do
    return [at[name] for name in ids]
