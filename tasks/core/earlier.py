"""What was made before of images that come again: a later night takes it over, or goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import StorageError
from storage.store import Artifact, Store

_MOST_PARTS = 16
"""Parts of an output whose rows stay where they are: each part is a folder to open, and a chunk that is not full."""


@dataclass(frozen=True)
class Earlier:
    """An output whose rows are good for images of equal content."""

    output: Artifact
    rows: dict[str, int]
    """Content name of the image -> its row."""

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.rows

    @property
    def images(self) -> int:
        """The number of its rows."""
        return len(self.output.meta["ids"])

    def stays(self) -> bool:
        """Whether its rows can stay where they are, and new ones follow them; else all are copied into one piece."""
        return len(self._parts()) < _MOST_PARTS

    def followed_by(self, folder: str, ids: Sequence[str]) -> dict[str, Any]:
        """The entries of a manifest for these rows, where they are, followed by those of new images in a folder: `ids`
        of all, and the folders and numbers of rows of the `parts`. Rows of images that have gone stay, too."""
        new = [[folder, len(ids)]] if ids else []
        return {"ids": [*self.output.meta["ids"], *ids], "parts": [*self._parts(), *new]}

    def _parts(self) -> list[list[Any]]:
        return list(self.output.meta.get("parts", [[self.output.folder, self.images]]))


def latest(store: Store, series: str) -> Artifact | None:
    """The last output of a series (a key without the data in it); None where there is none, or not any more."""
    try:
        return store.get(store.read_json(_pointer(series))["key"])
    except (StorageError, OSError, KeyError, TypeError):  # then everything is computed
        return None


def earlier(store: Store, series: str) -> Earlier | None:
    """The rows of the last output of a series; None as for `latest`."""
    output = latest(store, series)
    return output and Earlier(output, {name: row for row, name in enumerate(output.meta["ids"])})


def remember(store: Store, series: str, key: str) -> None:
    """Make this output the last of its series."""
    store.write_json(_pointer(series), {"key": key})


def _pointer(series: str) -> str:
    return f"latest/{series}.json"
