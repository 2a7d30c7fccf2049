"""Which version of a model is the champion: all aliases of a model lie in one file, which is replaced whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from storage.errors import Conflict, Damaged, NotInStore
from storage.models.versions import FORMAT, check_format
from storage.store import Store

ALIASES = ("champion", "challenger", "previous")
"""The version in use, the one that may replace it, and the one that was in use before."""
HISTORY = 200
"""Switches that are remembered."""


@dataclass(frozen=True)
class Switch:
    """One change of the aliases."""

    revision: int
    change: str
    """`challenge`, `promote`, `rollback`, or `undo` of a switch to a version that was removed at the same time."""
    when: str
    """UTC time, ISO 8601."""
    who: str
    why: str
    points: dict[str, int]
    """Alias -> version number from then on."""


@dataclass(frozen=True)
class Aliases:
    """The aliases of a model at one time."""

    revision: int = 0
    """Counts the switches; one that was decided on an older revision is refused."""
    points: dict[str, int] = field(default_factory=dict)
    """Alias -> version number, of the aliases that are given."""
    history: list[Switch] = field(default_factory=list)
    """The last switches, oldest first."""

    def of(self, number: int) -> list[str]:
        """The aliases of a version."""
        return [alias for alias in ALIASES if self.points.get(alias) == number]

    def had(self, number: int) -> bool:
        """Whether a version ever had an alias, as far as is remembered."""
        return any(number in switch.points.values() for switch in self.history)

    def switched(self, points: Mapping[str, int], change: str, who: str, why: str) -> Aliases:
        """These aliases from now on."""
        when = datetime.now(UTC).isoformat(timespec="microseconds")
        switch = Switch(self.revision + 1, change, when, who, why, dict(points))
        return Aliases(switch.revision, switch.points, [*self.history, switch][-HISTORY:])


def crowned(points: Mapping[str, int], number: int) -> dict[str, int]:
    """The aliases when this version becomes champion: the old champion is `previous`, and a challenger that became
    champion is no challenger any more."""
    after = {alias: n for alias, n in points.items() if alias == "challenger" and n != number}
    after |= {"previous": points["champion"]} if "champion" in points else {}
    return after | {"champion": number}


def read_aliases(store: Store, key: str) -> Aliases:
    """The aliases kept under a key; none where there is no such file. Raises Damaged or StoreTooNew."""
    try:
        values = store.read_json(key)
    except NotInStore:
        return Aliases()
    try:
        check_format(values["format"], f"{key} in {store.url}")
        points = {alias: int(values["aliases"][alias]) for alias in ALIASES if alias in values["aliases"]}
        return Aliases(int(values["revision"]), points, [Switch(**switch) for switch in values["history"]])
    except (KeyError, TypeError, ValueError) as error:
        fix = "restore it from a copy, or delete it and promote a version again"
        raise Damaged(f"{key} in {store.url} is no file of aliases ({error}); {fix}") from error


def write_aliases(store: Store, key: str, before: Aliases, after: Aliases) -> None:
    """Replace the aliases in one write. Raises Conflict when they are no longer what the change was decided on.

    No file system offers a compare-and-swap through fsspec, so they are read right before and after the write: what
    remains is a second writer between the two last steps of the first, whose switch then stands.
    """
    if read_aliases(store, key).revision != before.revision:
        raise Conflict(f"{key} has been changed since revision {before.revision} was read; look again, then decide")
    history = [asdict(switch) for switch in after.history]
    value = {"format": FORMAT, "revision": after.revision, "aliases": after.points, "history": history}
    store.write_json(key, value)
    if after.history[-1] not in read_aliases(store, key).history:
        raise Conflict(f"{key} was changed by another process at the same time, whose change stands; look again")
