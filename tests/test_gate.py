"""How a night ends for a model, a function: what it decides of two judgements, and the laws that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from al_models.drift import Change
from al_models.metrics import Replicates
from tasks.night import prove
from tasks.night.decide import Intake, Judgement, Promise
from tasks.night.gate import Gate
from tasks.night.verdict import Rivals, Verdict, verdict

PROMISE = Promise(rate=0.05, held_out=100, threshold=0.5, good=20, rejected=1)
RIVALS = Rivals("parts/grid", champion=3, challenger=4)
DIM = Change("brightness", 1e-5, 1e-4, True, 100.0, 60.0, 12)
NOTHING_NEW = Intake()
NOISE = np.random.default_rng(0).normal(0, 0.01, (2, 200))


def judged(pro: float, model: int = 0, **more: Any) -> Judgement:
    """A model of this PRO. Its replicates spread by 0.01; so do, times the square root of two, differences between the
    two models."""
    found = {"pro": Replicates(pro, pro + NOISE[model], "images")}
    return Judgement(PROMISE, **{"where": "the test", "replicates": found, "seconds": 0.1, "memory": 1000.0, **more})


CHAMPION, CHALLENGER = judged(0.9), judged(0.9, 1)


def decided(
    intake: Intake = NOTHING_NEW,
    champion: Judgement | None = CHAMPION,
    challenger: Judgement = CHALLENGER,
    rivals: Rivals = RIVALS,
) -> Verdict:
    """What the gate says; all as usual but for what is given."""
    return verdict(Gate(), rivals, champion, challenger, intake)


IN_USE = replace(RIVALS, champion=4)
BACK = replace(RIVALS, was_champion=True)
FIRST = {"rivals": Rivals("parts/grid", None, 1), "champion": None}
REJECTS = Intake(n=12, rejected=10, promise=PROMISE)
TABLE: dict[str, tuple[dict[str, Any], str, str]] = {
    "as good": ({}, "promoted", "PRO 90.00 against 90.00 % on the test, difference +0.00 ("),
    "better": ({"challenger": judged(0.95, 1)}, "promoted", "PRO 95.00 against 90.00 %"),
    "lower, but not certainly": ({"challenger": judged(0.89, 1)}, "promoted", "PRO 89.00 against 90.00 %"),
    "certainly lower": ({"challenger": judged(0.85, 1)}, "kept", "PRO 85.00 against 90.00 %"),
    "no metric": ({"challenger": judged(0.9, replicates={})}, "kept", "none of pro, pixel_auroc, image_auroc can"),
    "slow": ({"challenger": judged(0.9, 1, seconds=0.16)}, "kept", "0.16 s against 0.1 s for the same images in turns"),
    "large": ({"challenger": judged(0.9, 1, memory=1800.0)}, "kept", "1800 MiB for 0 images against 1000 MiB"),
    "two reasons": ({"challenger": judged(0.8, 1, seconds=9.0)}, "kept", "); 9 s against 0.1 s"),
    "rejects": ({"intake": REJECTS}, "kept", "10 of 12 new images rejected"),
    "drift": ({"intake": Intake(drift=[DIM])}, "kept", "drift of brightness; if they look as they should from now on, "
              "`al models promote parts/grid@4 --why ...` puts it into use"),
    "no threshold": ({"challenger": replace(CHALLENGER, promise=Promise(0.05, 3, None, "too few"))}, "kept", "too few"),
    "first": (FIRST, "promoted", "there was no champion"),
    "first, of odd images": ({**FIRST, "intake": Intake(compared=9, suspected=1, rate=0.05)}, "kept", "1 of 9 images"),
    "taken back": ({"rivals": BACK}, "kept", "version 4 was in use before and is no more"),
    "taken back, and drift": ({"rivals": BACK, "intake": Intake(drift=[DIM])}, "kept", "models promote"),
    "nothing new": ({"rivals": IN_USE}, "unchanged", "nothing has changed since version 4 was made"),
    "nothing new but rejects": ({"rivals": IN_USE, "intake": REJECTS}, "kept", "10 of 12 new images rejected"),
    "nothing new but drift": ({"rivals": IN_USE, "intake": Intake(drift=[DIM])}, "kept", "drift of brightness"),
}  # fmt: skip
"""Case -> what is known, how it ends, and a part of the reason."""


@pytest.mark.parametrize(("known", "outcome", "why"), TABLE.values(), ids=TABLE.keys())
def test_each_case_ends_with_its_reason(known: dict[str, Any], outcome: str, why: str) -> None:
    found = decided(**known)
    assert found.outcome == outcome
    assert why in found.why
    assert (found.outcome == "kept") == any(not check.passed for check in found.checks)
    assert all(check.said in found.why for check in found.checks if not check.passed)


def test_where_the_champion_is_in_use_no_hint_promotes_it() -> None:
    assert "models promote" not in decided(rivals=IN_USE, intake=Intake(drift=[DIM])).why


# laws

shares, few = st.floats(0, 1), st.integers(0, 40)
promises = st.builds(
    Promise, rate=st.floats(0.01, 0.5), held_out=st.integers(1, 500), threshold=shares, good=few, rejected=st.just(0)
)


@st.composite
def judgements(draw: st.DrawFn) -> Judgement:
    """Any model whose threshold keeps its promise."""
    noise = np.random.default_rng(draw(st.integers(0, 99))).normal(0, draw(st.floats(1e-6, 0.1)), 50)
    pro = draw(shares)
    seconds, memory = draw(st.floats(1e-6, 1e3)), draw(st.floats(1, 1e5))
    return Judgement(draw(promises), "", {"pro": Replicates(pro, pro + noise, "images")}, 8, seconds, memory)


@st.composite
def intakes(draw: st.DrawFn) -> Intake:
    """Any new images."""
    n, fresh = draw(few), draw(few)
    rejected, fresh_rejected = draw(st.integers(0, n)), draw(st.integers(0, fresh))
    drift = draw(st.lists(st.just(DIM), max_size=1))
    return Intake(n, rejected, fresh, fresh_rejected, draw(st.integers(0, 1)), draw(promises), drift)


@given(judgements())
def test_a_challenger_equal_to_the_champion_passes(model: Judgement) -> None:
    assert decided(champion=model, challenger=model).outcome == "promoted"


@given(judgements(), st.floats(1e-3, 1), intakes())
def test_a_certainly_lower_metric_never_passes(model: Judgement, less: float, intake: Intake) -> None:
    pro = model.replicates["pro"]
    lower = replace(
        model, replicates={"pro": Replicates(pro.estimate - less, pro.values - less, "images")}, seconds=0.0
    )
    assert decided(intake, model, lower).outcome == "kept"


@given(judgements(), judgements(), intakes(), st.sampled_from([RIVALS, BACK, IN_USE]))
def test_what_is_wrong_with_the_new_images_keeps_every_champion(
    champion: Judgement, challenger: Judgement, intake: Intake, rivals: Rivals
) -> None:
    found = decided(replace(intake, many=1), champion, challenger, rivals)
    assert found.outcome == "kept"
    assert decided(replace(intake, drift=[DIM]), champion, challenger, rivals).outcome == "kept"


@given(judgements(), judgements(), intakes())
def test_a_faster_and_smaller_challenger_is_judged_no_worse(
    champion: Judgement, challenger: Judgement, intake: Intake
) -> None:
    lighter = replace(challenger, seconds=challenger.seconds / 2, memory=challenger.memory / 2)
    if decided(intake, champion, challenger).outcome == "promoted":
        assert decided(intake, champion, lighter).outcome == "promoted"


# seconds


@pytest.mark.parametrize(
    ("ratios", "measured", "said"), [([1.2], 1, 1.2), ([9.0, 1.1], 2, 1.1), ([2.0, 3.0, 1.9], 3, 1.9)]
)
def test_a_challenger_is_slow_only_if_it_is_so_each_time(
    ratios: list[float], measured: int, said: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Iterator[float] = iter(ratios)
    monkeypatch.setattr(prove, "paces", lambda *_: (1.0, next(found)))
    assert prove.unhurried(lambda: None, lambda: None, 1.5) == (1.0, said)
    assert len(list(found)) == len(ratios) - measured
