"""What was made of the same images before: a later night copies those rows and computes the others."""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import StorageError
from storage.store import Artifact, Store


@dataclass(frozen=True)
class Earlier:
    """An output whose rows are good for images of equal content."""

    output: Artifact
    rows: dict[str, int]
    """Content name of the image -> its row."""

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.rows


def earlier(store: Store, series: str) -> Earlier | None:
    """The last output of a series (a key without the data in it); None where there is none, or not any more."""
    try:
        output = store.get(store.read_json(_pointer(series))["key"])
        return Earlier(output, {name: row for row, name in enumerate(output.meta["ids"])})
    except (StorageError, OSError, KeyError, TypeError):  # then everything is computed
        return None


def remember(store: Store, series: str, key: str) -> None:
    """This output is the last of its series."""
    store.write_json(_pointer(series), {"key": key})


def _pointer(series: str) -> str:
    return f"latest/{series}.json"
