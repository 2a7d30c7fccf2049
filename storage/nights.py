"""What a night decided about a model, and why: one JSON file a night and model, never changed afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from storage.errors import Damaged
from storage.store import Store

DecisionOutcome = Literal["promoted", "kept", "unchanged", "stopped", "failed"]
"""The challenger is champion; the gate kept the champion; nothing was new; the data may not be learned from; a step
failed."""
_ROOT = "nights"
_NAMED = 30
"""Images that a sentence names, at most; the page shows more."""


@dataclass(frozen=True)
class Check:
    """One condition of the gate."""

    name: str
    passed: bool
    said: str
    """What was found, in a sentence."""


@dataclass(frozen=True)
class Looks:
    """A night's new good images beside the good images that were held out for the champion."""

    n: int
    """New images."""
    rejected: int
    """New images above the champion's threshold; 0 where it has none."""
    promised: float
    """Share of good images that the threshold may reject, in 0..1."""
    alpha: float
    """Chance of seeing drift where there is none."""
    threshold: float | None
    """Threshold of the score; None: too few images were held out."""
    before: dict[str, list[float]]
    """Statistic (score, features, brightness, contrast, sharpness) -> its quartiles among the held-out images."""
    now: dict[str, list[float]]
    """Statistic -> its quartiles among the new images."""


@dataclass(frozen=True)
class Decision:
    """What a night decided about one model."""

    dataset: str
    category: str
    night: str
    """When it began: UTC time, ISO 8601."""
    outcome: DecisionOutcome
    why: str
    """The reason of the decision, in a sentence."""
    champion: int | None = None
    """Version in use from then on; None: there is none."""
    challenger: int | None = None
    """Version that was proven; None: there was none."""
    checks: list[Check] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the version in use from then on; fractions in 0..1."""
    counts: dict[str, int] = field(default_factory=dict)
    """Images by use; `new`: good training images that the champion had not seen; `newly_set_aside`: images that
    validation rejects, beyond as many as when the champion was made; `held`: images that wait for a person's word."""
    aside: dict[str, int] = field(default_factory=dict)
    """Validation rule -> images that it sets aside, those of earlier nights included."""
    drift: list[dict[str, Any]] = field(default_factory=list)
    """Each statistic of the new images against the champion's held-out images (`al_models.drift.Change`); empty where
    there are too few to tell."""
    looks: Looks | None = None
    """None where there were no new images, or nothing to compare them with."""
    range: str = ""
    """What is to be said where the good images' values have another range than the champion's."""
    held: dict[str, str] = field(default_factory=dict)
    """New images that wait for a person's word (`storage.held`), by content name: their paths."""
    seconds: float = 0.0
    """From the night's beginning to the decision, by the clock."""

    @property
    def name(self) -> str:
        """`data set/category`."""
        return f"{self.dataset}/{self.category}"

    @property
    def alarms(self) -> list[str]:
        """What a person should look at in the morning."""
        told = [] if self.outcome in ("promoted", "unchanged") else [f"{self.outcome}: {self.why}"]
        told += [f"range: {self.range}"] if self.range else []
        if self.counts.get("newly_set_aside", 0) > 0:
            rules = ", ".join(f"{rule} {images}" for rule, images in self.aside.items())
            told.append(f"set aside: {self.counts['newly_set_aside']} more images than before (in all: {rules})")
        return told + [f"drift: {one['statistic']} {_drifted(one)}" for one in self.drift if one["changed"]]

    @property
    def asks(self) -> list[str]:
        """What a person is to decide; the same every morning until it is decided."""
        if not self.held:
            return []
        paths = sorted(self.held.values())
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        images = "1 new image is" if len(paths) == 1 else f"{len(paths)} new images are"
        which = f"{', '.join(paths[:_NAMED])}{more}"
        return [f"held: {images} not learned; say what each is, `al nights release` or `al nights refuse`: {which}"]


def _drifted(change: dict[str, Any]) -> str:
    return f"from {change['before']:.4g} to {change['now']:.4g} (adjusted p = {change['adjusted']:.2g})"


def write_decision(store: Store, decision: Decision) -> str:
    """Keep a decision; its key."""
    key = f"{_ROOT}/{decision.name}/{decision.night.replace(':', '')}.json"
    store.write_json(key, asdict(decision))
    return key


def decision_keys(store: Store) -> dict[str, list[str]]:
    """Model, by name -> where its decisions lie, the oldest first. Reads none of them."""
    keys: dict[str, list[str]] = {}
    for key in _keys(store, _ROOT):
        keys.setdefault(key.removeprefix(f"{_ROOT}/").rpartition("/")[0], []).append(key)
    return keys


def read_decision(store: Store, key: str) -> Decision:
    """The decision under a key. Raises Damaged for a file that is none."""
    known = {f.name for f in fields(Decision)}
    values = store.read_json(key)
    try:
        kept = {field: value for field, value in values.items() if field in known}
        looks = values.get("looks") and Looks(**values["looks"])
        return Decision(**kept | {"checks": [Check(**check) for check in values["checks"]], "looks": looks})
    except (AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"{key} is no decision of a night ({error}); delete the file") from error


def read_decisions(store: Store, name: str | None = None) -> Iterator[Decision]:
    """The decisions about a model, or about all, by model and night. Raises Damaged for a file that is none."""
    for key in _keys(store, _ROOT if name is None else f"{_ROOT}/{name}"):
        yield read_decision(store, key)


def _keys(store: Store, prefix: str) -> list[str]:
    return [key for key in store.list(prefix) if key.endswith(".json")]  # file managers leave files of their own
