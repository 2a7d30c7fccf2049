"""What the gate says of a challenger: a function of what is known of two models and of the new images, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from al_models.calibration import rejected_p_value
from al_models.drift import Change
from al_models.metrics import Replicates, compare
from storage.nights import Check
from tasks.compare.tables import METRICS as NAMES
from tasks.night.gate import METRICS, Gate

_SLACK_MIB = 256.0
"""Difference that is the machine's, not the model's."""


@dataclass(frozen=True)
class Promise:
    """What a model's threshold promises of good images, and what it did on those of the test."""

    rate: float
    """Share of good images that may be rejected."""
    held_out: int
    """Good images that the threshold was set on."""
    threshold: float | None
    note: str | None = None
    """Why there is none."""
    good: int = 0
    """Good test images."""
    rejected: int | None = None
    """How many of these were rejected; None: not known."""


@dataclass(frozen=True)
class Judgement:
    """What is known of a model on the images that decide."""

    promise: Promise
    where: str = ""
    """Which images these are."""
    replicates: Mapping[str, Replicates] = field(default_factory=dict)
    """Metric -> its replicates."""
    images: int = 0
    """Whose prediction was measured."""
    seconds: float = 0.0
    """Time of this prediction; of two models, measured in turns."""
    memory: float = 0.0
    """MiB."""


@dataclass(frozen=True)
class Intake:
    """The good images that no person has decided about, before anything learns from them."""

    n: int = 0
    """New ones, judged by the champion; where there is none, by the last version."""
    rejected: int = 0
    """How many of these were rejected."""
    fresh: int = 0
    """How many of the new ones no earlier night has seen."""
    fresh_rejected: int = 0
    many: int = 0
    """Images that wait for a person since a night on which too many were rejected."""
    promise: Promise | None = None
    """What that version promised; None: there is none."""
    drift: Sequence[Change] = ()
    """What the new ones differ in from those held out for the champion."""
    compared: int = 0
    """All of them, compared with each other, where there is no champion."""
    suspected: int = 0
    """How many of these look like defects."""
    rate: float = 0.0
    """Share of good images that may be rejected."""


def decide(gate: Gate, champion: Judgement | None, challenger: Judgement, intake: Intake) -> list[Check]:
    """Each condition of the gate; the challenger goes into use when it passes all of them."""
    checks = [] if champion is None else [quality(gate, champion, challenger), *costs(gate, champion, challenger)]
    return [*checks, new_images(gate, intake), false_rejects(gate, challenger.promise)]


def quality(gate: Gate, champion: Judgement, challenger: Judgement) -> Check:
    """Whether the challenger's metric is not certainly lower on the same images."""
    asked = METRICS if gate.metric is None else (gate.metric,)
    new, old, where = challenger.replicates, champion.replicates, challenger.where
    metric = next((name for name in asked if name in new and name in old), None)
    if metric is None:
        return Check("quality", False, f"none of {', '.join(asked)} can be had on {where}; name another metric")
    found, ours, theirs = compare(new[metric], old[metric]), new[metric].estimate, old[metric].estimate
    said = f"{NAMES.get(metric, metric)} {100 * ours:.2f} against {100 * theirs:.2f} % on {where}"
    if found.low is None or found.high is None:
        return Check("quality", found.difference >= 0, f"{said}, too few images for an interval")
    said += f", difference {100 * found.difference:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
    return Check("quality", found.high >= 0, said)


def costs(gate: Gate, champion: Judgement, challenger: Judgement) -> list[Check]:
    """Whether prediction takes no more time and memory than the gate allows."""
    ratio = challenger.seconds / max(champion.seconds, 1e-9)
    said = (
        f"{challenger.seconds:.3g} s against {champion.seconds:.3g} s for the same images in turns, {ratio:.2f} times"
    )
    time = Check("seconds", ratio <= gate.slower, f"{said}; {gate.slower:g} times as much is allowed")
    ours, theirs = challenger.memory, champion.memory
    said = f"{ours:.4g} MiB for {challenger.images} images against {theirs:.4g} MiB"
    allowed = ours <= gate.larger * theirs + _SLACK_MIB
    return [time, Check("memory", allowed, f"{said}, {gate.larger:g} times as much is allowed")]


def new_images(gate: Gate, intake: Intake) -> Check:
    """Whether no more of the new images are rejected than was promised, none of their statistics has drifted, and,
    where there is no champion yet, few enough images look like defects beside the others."""
    said, drifted = list[str](), [change.statistic for change in intake.drift if change.changed]
    if intake.compared:
        most = f"{intake.rate:.1%} may be rejected"
        said.append(f"{intake.suspected} of {intake.compared} images look like defects beside the others, {most}")
    if intake.n and intake.promise is not None:
        promised = f"{intake.promise.rate:.1%} promised (p = {_p_value(intake.rejected, intake.n, intake.promise):.2g})"
        said.append(f"{intake.rejected} of {intake.n} new images rejected, {promised}")
        if 0 < intake.fresh < intake.n:
            p_value = _p_value(intake.fresh_rejected, intake.fresh, intake.promise)
            said.append(f"{intake.fresh_rejected} of the {intake.fresh} that came last (p = {p_value:.2g})")
    said += [f"{intake.many} wait for a person since too many were rejected at once"] if intake.many else []
    said += [f"drift of {', '.join(drifted)}"] if drifted else []
    # To compare images with each other has no law of chance, so there the promised share is the most.
    fails = intake.suspected > intake.rate * intake.compared or too_many(gate, intake) or bool(drifted)
    return Check("new images", not fails, "; ".join(said) or "there are none that nobody has judged yet")


def too_many(gate: Gate, intake: Intake) -> bool:
    """Whether more new images are rejected than chance lets the threshold's promise produce: tonight, or on an earlier
    night about which a person has not decided yet."""
    return bool(intake.many) or doubtful(gate, intake)


def doubtful(gate: Gate, intake: Intake) -> bool:
    """Whether that is so of the images that came last, or of all new ones where it was not so before."""
    if intake.promise is None:
        return False
    sides = [(intake.fresh_rejected, intake.fresh)] + [(intake.rejected, intake.n)] * (not intake.many)
    return any(_p_value(rejected, n, intake.promise) <= gate.alpha for rejected, n in sides)


def _p_value(rejected: int, n: int, promise: Promise) -> float:
    """Chance of so many rejects or more among good images: the upper tail of the binomial law, over how far a threshold
    of so few held-out images may be off."""
    return rejected_p_value(rejected, n, promise.held_out, promise.rate)


def false_rejects(gate: Gate, promise: Promise) -> Check:
    """Whether the threshold rejects as many good test images as it promised, or fewer, within chance."""
    name = "false rejects"
    if promise.threshold is None:
        return Check(name, False, f"there is no threshold: {promise.note}")
    if not promise.good or promise.rejected is None:
        return Check(name, True, "no good test image could show more rejects than were promised")
    p_value = rejected_p_value(promise.rejected, promise.good, promise.held_out, promise.rate)
    said = f"{promise.rejected} of {promise.good} good test images rejected"
    said += f", {promise.rate:.1%} promised (p = {p_value:.2g})"
    return Check(name, p_value > gate.alpha, said)
