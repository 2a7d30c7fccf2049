"""Stored arrays with a row an image, whichever way their rows are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import NotInStore
from storage.store import Artifact, Store

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True)
class Stack:
    """A stored array with a row an image, in one piece or in parts that follow each other."""

    arrays: tuple[zarr.Array[Any], ...]
    starts: np.ndarray
    """int [p]: the first row of each."""

    @staticmethod
    def open(store: Store, output: Artifact, name: str) -> Stack:
        """An array of this output. Raises NotInStore when it is not there."""
        import zarr

        parts = output.meta.get("parts", [[output.folder, 0]])
        try:
            arrays = [zarr.open_array(store.zarr_store(f"{folder}/{name}"), mode="r") for folder, _ in parts]
        except FileNotFoundError as error:
            raise NotInStore(
                f"an array {name} of {output.key} is not in {store.url}; delete that folder and run again"
            ) from error
        return Stack(tuple(arrays), np.cumsum([0, *(rows for _, rows in parts[:-1])]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all parts together."""
        return (sum(array.shape[0] for array in self.arrays), *self.arrays[0].shape[1:])

    @property
    def chunk(self) -> int:
        """Rows that are read at once."""
        return self.arrays[0].chunks[0]

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The given rows, in order."""
        rows = np.asarray(rows)
        if len(self.arrays) == 1:
            return _read(self.arrays[0], rows)
        part = np.searchsorted(self.starts, rows, side="right") - 1
        values = np.empty((len(rows), *self.shape[1:]), self.arrays[0].dtype)
        for which in np.unique(part):
            values[part == which] = _read(self.arrays[which], rows[part == which] - self.starts[which])
        return values


def _read(array: zarr.Array[Any], rows: np.ndarray) -> np.ndarray:
    """Rows of an array. A span of which most rows are wanted is read whole, since chunks are read whole anyway."""
    if not len(rows):
        return np.asarray(array[:0])
    first, last = int(rows.min()), int(rows.max()) + 1
    if last - first <= 2 * len(rows):
        span = np.asarray(array[first:last])
        return span if np.array_equal(rows, np.arange(first, last)) else span[rows - first]
    return np.asarray(array.oindex[rows])
