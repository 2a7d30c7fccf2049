"""A batch is told apart when it differs, and seldom when it does not; an image of something else is out of scope."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from al_models.calibration import conformal_threshold, rejected_p_value
from al_models.drift import FEWEST, REJECTED, Scope, changes
from al_models.errors import InvalidInput

STATISTICS = ("score", "features", "brightness", "contrast", "sharpness")


def draw(rng: np.random.Generator, n: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    """Dependent statistics of n images; the brightness is shifted."""
    common = rng.standard_normal(n)
    found = {name: 0.5 * common + rng.standard_normal(n) for name in STATISTICS}
    return found | {"brightness": found["brightness"] + shift}


def test_a_batch_that_is_drawn_alike_seldom_alarms() -> None:
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(400):
        held_out, batch = draw(rng, 30), draw(rng, 50)
        cut = conformal_threshold(held_out["score"], 0.05).value
        assert cut is not None
        found = changes(held_out, batch, rejected=int((batch["score"] > cut).sum()), rate=0.05, alpha=0.05)
        assert [one.statistic for one in found] == [*sorted(STATISTICS), REJECTED]
        alarms += any(one.changed for one in found)
    assert alarms <= stats.binom(400, 0.05).ppf(0.999)


def test_a_shift_is_found_and_named() -> None:
    rng = np.random.default_rng(1)
    found = {one.statistic: one for one in changes(draw(rng, 40), draw(rng, 60, shift=2.5))}
    assert found["brightness"].changed
    assert found["brightness"].now - found["brightness"].before == pytest.approx(2.5, abs=0.8)
    assert not found["contrast"].changed
    assert REJECTED not in found


@given(held_out=st.integers(20, 200), images=st.integers(1, 300), rate=st.sampled_from([0.05, 0.1, 0.2]))
def test_the_law_of_rejected_images_is_that_of_ranks(held_out: int, images: int, rate: float) -> None:
    values = [rejected_p_value(rejected, images, held_out, rate) for rejected in range(images + 1)]
    assert values[0] == pytest.approx(1)
    assert all(a >= b - 1e-12 for a, b in pairwise(values))
    # its mean is what conformal prediction promises: at most the rate
    expected = sum(values[1:]) / images
    assert expected <= rate + 1e-9
    assert expected > rate - 1 / (held_out + 1) - 1e-9


def test_the_law_of_rejected_images_is_seen_in_draws() -> None:
    rng, images, held_out = np.random.default_rng(2), 40, 39
    counts = []
    for _ in range(3000):
        scores = rng.standard_normal(held_out + images)
        cut = conformal_threshold(scores[:held_out], 0.1).value
        counts.append(int((scores[held_out:] > cut).sum()))
    for rejected in (2, 5, 8, 12):
        seen = np.mean([count >= rejected for count in counts])
        assert seen == pytest.approx(rejected_p_value(rejected, images, held_out, 0.1), abs=0.03)


def test_too_few_images_are_not_compared() -> None:
    rng = np.random.default_rng(3)
    assert changes(draw(rng, 30), draw(rng, FEWEST - 1)) == []
    assert rejected_p_value(3, 3, n=5, rate=0.05) == 1.0  # there is no threshold


@pytest.mark.parametrize(
    ("batch", "rejected", "said"),
    [
        ({"score": np.array([0.1, np.nan])}, None, r"score is of shape \(2,\) or not finite"),
        ({"score": np.zeros((2, 2))}, None, "give one finite number an image"),
        ({"score": np.zeros(9)}, 10, "10 of 9 images are said to be rejected"),
    ],
)
def test_bad_input_is_refused(batch: dict[str, np.ndarray], rejected: int | None, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        changes({"score": np.arange(30.0)}, batch, rejected=rejected)


@pytest.mark.parametrize("learned", [12, 300])
def test_an_image_of_something_else_is_out_of_scope(learned: int) -> None:
    rng, mixing = np.random.default_rng(4), np.random.default_rng(5).standard_normal((64, 64))

    def images(n: int) -> np.ndarray:
        return 3 + rng.standard_normal((n, 64)) @ mixing

    scope = Scope.of(images(learned), images(20))
    assert scope.outside(images(500)).mean() <= 0.01
    assert scope.outside(images(20) * 0.05 - 40).all()
    assert scope.outside(rng.standard_normal((20, 64)) * 60).all()


def test_equal_images_have_a_scope() -> None:
    scope = Scope.of(np.ones((5, 8)), np.ones((3, 8)))
    assert not scope.outside(np.ones((2, 8))).any()
    assert scope.outside(np.zeros((2, 8))).all()
    with pytest.raises(InvalidInput, match="0 learned and 3 held-out images"):
        Scope.of(np.ones((0, 8)), np.ones((3, 8)))
    assert not Scope.of(np.ones((1, 8)), np.full((1, 8), 1.1)).outside(np.full((2, 8), 1.1)).any(), "of one image, too"
