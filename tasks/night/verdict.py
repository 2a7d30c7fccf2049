"""How a night ends for a model: a function of two judgements, of the new images and of the gate, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.nights import Check, DecisionOutcome
from tasks.night.decide import Intake, Judgement, decide, new_images
from tasks.night.gate import Gate


@dataclass(frozen=True)
class Rivals:
    """Two versions of one model."""

    name: str
    """`data set/category`."""
    champion: int | None
    """The version in use; None: there is none."""
    challenger: int | None
    """The version of the night's model; None: it has no number yet."""
    was_champion: bool = False
    """Whether the challenger was in use before and is no more."""

    def label(self, number: int | None) -> str | None:
        """`mvtec_ad/grid@3`."""
        return None if number is None else f"{self.name}@{number}"

    @property
    def are_compared(self) -> bool:
        """Whether there is anything to judge the challenger against."""
        return self.champion is not None and self.champion != self.challenger and not self.was_champion


@dataclass(frozen=True)
class Verdict:
    """What is decided, and why."""

    outcome: DecisionOutcome
    why: str
    checks: list[Check] = field(default_factory=list)


def verdict(gate: Gate, rivals: Rivals, champion: Judgement | None, challenger: Judgement, intake: Intake) -> Verdict:
    """Promoted when every condition of the gate is kept; `champion`: None where there is nothing to compare with."""
    is_champion = rivals.challenger == rivals.champion
    if is_champion:
        checks = [new_images(gate, intake)]
    elif rivals.was_champion:
        said = f"version {rivals.challenger} was in use before and is no more; only a person promotes it again"
        checks = [Check("not in use before", False, said)]
    else:
        checks = decide(gate, champion, challenger, intake)
    failed = [check.said for check in checks if not check.passed]
    if failed:
        return Verdict("kept", "; ".join(failed + _hint(rivals, intake)), checks)
    if is_champion:
        return Verdict("unchanged", f"nothing has changed since version {rivals.challenger} was made")
    return Verdict("promoted", "there was no champion" if rivals.champion is None else checks[0].said, checks)


def _hint(rivals: Rivals, intake: Intake) -> list[str]:
    """What a person can do where the champion is kept since the images look otherwise now."""
    if rivals.challenger == rivals.champion or not any(change.changed for change in intake.drift):
        return []
    promote = f"`al models promote {rivals.label(rivals.challenger)} --why ...` puts it into use"
    return [f"if they look as they should from now on, {promote}"]
