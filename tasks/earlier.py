"""What was made before of images that come again: a later night copies it, or goes on from it, and makes the rest."""

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
    """This output is the last of its series."""
    store.write_json(_pointer(series), {"key": key})


def _pointer(series: str) -> str:
    return f"latest/{series}.json"
