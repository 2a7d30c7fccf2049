"""The store that a command or a flow is asked to look into."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.store import Store


def opened(url: str) -> Store:
    """The store there. Raises NotInStore for a place that is none, StoreTooNew for one of a later version."""
    from storage.errors import NotInStore
    from storage.store import Store

    store = Store(url)
    if not store.list("store.json") and not store.list("records"):
        raise NotInStore(f"{url} is not a store; give the folder that `al benchmark --store` wrote to")
    store.check_format()
    return store
