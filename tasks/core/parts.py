"""A big category in parts that workers share: each part is an output of its own, and one more names them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from storage.store import Store

PART = 512
"""Images of a part: whole shards and whole batches, so parts write what one piece would."""
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Part:
    """Some images in the order of their category."""

    first: int
    end: int
    """Behind the last."""

    def __str__(self) -> str:
        return f"{self.first} to {self.end - 1}"

    def of(self, rows: Sequence[_Row]) -> Sequence[_Row]:
        """The part's rows of these; fewer or none where they end before."""
        return rows[self.first : self.end]


def parts_of(images: int) -> list[Part]:
    """The parts of so many images; none where one part would hold them all."""
    starts = range(0, images, PART) if images > PART else ()
    return [Part(first, first + PART) for first in starts]


def joined(store: Store, parts: Sequence[str]) -> dict[str, Any]:
    """The entries of a manifest that join these parts, given by their keys and in order: `ids`, the folders and numbers
    of rows of its `parts`, the seconds of all, and the largest memory of any."""
    outputs = [store.get(key) for key in parts]
    return {
        "ids": [name for part in outputs for name in part.meta["ids"]],
        "parts": [[part.folder, len(part.meta["ids"])] for part in outputs if part.meta["ids"]],
        "seconds": round(sum(part.meta["seconds"] for part in outputs), 3),
        "peak_memory_mb": max(part.meta["peak_memory_mb"] for part in outputs),
    }
