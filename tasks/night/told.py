"""What there is to tell of a night about a model, whatever is decided."""

from __future__ import annotations

from typing import Any

from storage.held import read_held
from storage.models.versions import ModelVersion
from storage.nights import Decision, Looks
from storage.records import RunRecord
from storage.store import Store
from tasks.core.handles import Validated
from tasks.night.screen import RULE
from tasks.validate import findings


def told(
    began: str,
    validated: Validated,
    record: RunRecord,
    champion: ModelVersion | None,
    challenger: ModelVersion,
    seen: dict[str, Any] | None,
) -> Decision:
    """A decision without its outcome. `seen`: of the new images when they were screened."""
    store = Store(validated.category.store)
    waits = set(store.get(validated.verdict).meta.get("held", []))
    held = {one.id: one.path for one in read_held(store, validated.name) if one.id in waits and one.state == "held"}
    new = _new_images(champion, challenger)
    counts = {"new": len(new), "newly_set_aside": _newly_set_aside(champion, record), "held": len(held)}
    if seen is not None:
        counts["new"] = len(new | {*seen["scores"], *seen["suspected"]})
    return Decision(
        validated.category.dataset,
        validated.category.category,
        began,
        "unchanged",
        "",
        champion=champion and champion.number,
        challenger=challenger.number,
        metrics=record.metrics,
        counts=record.counts | counts,
        aside=_aside(store, record),
        drift=seen["drift"] if seen else [],
        looks=Looks(**seen["looks"]) if seen and seen["looks"] else None,
        held=held,
        range=another_range(champion, challenger),
    )


def another_range(champion: ModelVersion | None, challenger: ModelVersion) -> str:
    """Whether the night's images have another range of values, in a sentence; empty where they have the same."""
    if champion is None or champion.white == challenger.white:
        return ""
    before, now = (f"0 to {one.white:g}" if one.white else "none (8 bits)" for one in (champion, challenger))
    return f"tonight's good images have the range of values {now}, and version {champion.number} has {before}"


def _new_images(champion: ModelVersion | None, challenger: ModelVersion) -> set[str]:
    """Good images that the champion had nothing to do with."""
    now = {*challenger.lineage.fitted_on, *challenger.lineage.held_out}
    return now if champion is None else now - {*champion.lineage.fitted_on, *champion.lineage.held_out}


def _newly_set_aside(champion: ModelVersion | None, record: RunRecord) -> int:
    before = 0 if champion is None else champion.counts.get("set_aside", 0)
    return max(0, record.counts["set_aside"] - before)


def _aside(store: Store, record: RunRecord) -> dict[str, int]:
    """Images set aside by rule, the most first; those that the listing left out already count as `listing`."""
    found = findings(store, record.keys["verdict"])
    found = found[(found["severity"] == "reject") & (found["rule"] != RULE)]  # those are told one by one
    rules = found.drop_duplicates("key")["rule"].value_counts()
    listed = record.counts["set_aside"] - int(rules.sum())
    return {str(rule): int(n) for rule, n in rules.items()} | ({"listing": listed} if listed else {})
