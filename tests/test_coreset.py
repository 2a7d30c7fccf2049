"""The lazy coreset chooses as plain greedy does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from al_models.errors import InvalidInput
from al_models.parts import coreset
from al_models.parts.coreset import greedy_coreset


def plain_greedy(points, count, first=0):
    """Gonzalez 1985, one pass over all points a centre, in float64."""
    points = points.double()
    nearest = torch.full((len(points),), torch.inf, dtype=torch.float64)
    chosen = []
    row = first
    for _ in range(count):
        chosen.append(row)
        nearest = torch.minimum(nearest, (points - points[row]).square().sum(1))
        nearest[chosen] = -1
        row = int(nearest.argmax())
    return torch.tensor(chosen)


def assert_greedy(points, rows):
    """Each centre is the farthest point from those before it, up to float32's rounding, and none is chosen twice.

    Rows cannot be compared where points are equally far: any of them is a right choice.
    """
    assert len(set(rows.tolist())) == len(rows)
    points = points.double()
    slack = 2e-6 * float(points.square().sum(1).max())  # squared distances are differences of squared norms
    nearest = (points - points[rows[0]]).square().sum(1)
    for row in rows[1:]:
        assert nearest[row] >= nearest.max() - slack
        nearest = torch.minimum(nearest, (points - points[row]).square().sum(1))


def radius(points, rows):
    """Largest distance of a point to its nearest centre."""
    return float(torch.cdist(points.double(), points[rows].double()).amin(1).max())


def random_points(n=600, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def clustered_points(n=600, d=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.randn(12, d, generator=generator)
    return centres[torch.randint(0, 12, (n,), generator=generator)] + 0.1 * torch.randn(n, d, generator=generator)


@pytest.fixture(params=[8, 64, 16384])
def block(request, monkeypatch):
    """Small blocks make the choice lazy over many rounds; the largest holds all points at once."""
    monkeypatch.setattr(coreset, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("points", [random_points(), clustered_points()], ids=["random", "clustered"])
@pytest.mark.parametrize("count", [1, 2, 60, 300])
def test_the_centres_are_those_of_plain_greedy(points, count, block):
    rows = greedy_coreset(points.double(), count, first=17)
    assert rows.tolist() == plain_greedy(points, count, first=17).tolist()
    assert_greedy(points, greedy_coreset(points, count, first=17))


def test_many_centres_at_once_are_the_same(monkeypatch):
    monkeypatch.setattr(coreset, "_BLOCK", 32)
    monkeypatch.setattr(coreset, "_CENTRES_AT_ONCE", 7)
    points = clustered_points().double()
    assert greedy_coreset(points, 100).tolist() == plain_greedy(points, 100).tolist()


def test_duplicates_are_chosen_last(block):
    distinct = random_points(40)
    points = distinct.repeat(15, 1)[torch.randperm(600, generator=torch.Generator().manual_seed(2))]
    rows = greedy_coreset(points, 40)
    assert len(points[rows].unique(dim=0)) == 40
    assert radius(points, rows) < 1e-6
    more = greedy_coreset(points, 300)
    assert len(set(more.tolist())) == 300


def test_all_points_can_be_chosen(block):
    for points in (random_points(100), torch.zeros(100, 3)):
        assert sorted(greedy_coreset(points, 100, first=99).tolist()) == list(range(100))


@pytest.mark.parametrize("count", [5, 20, 100])
def test_the_covering_radius_is_that_of_plain_greedy(count, block):
    points = clustered_points(seed=3)
    assert radius(points, greedy_coreset(points, count)) <= radius(points, plain_greedy(points, count)) * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_points_are_chosen_greedily(data):
    n = data.draw(st.integers(1, 50), label="n")
    d = data.draw(st.integers(1, 5), label="d")
    # few distinct values, so that duplicates and equal distances are common
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000), label="seed"))
    points = torch.from_numpy(
        rng.integers(-data.draw(st.integers(0, 20), label="range"), 21, (n, d)).astype(np.float32)
    )
    count, first = data.draw(st.integers(1, n), label="count"), data.draw(st.integers(0, n - 1), label="first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "_BLOCK", data.draw(st.integers(1, 60), label="block"))
        patch.setattr(coreset, "_CENTRES_AT_ONCE", data.draw(st.integers(1, 10), label="centres at once"))
        rows = greedy_coreset(points, count, first=first)
    assert rows.dtype == torch.int64
    assert rows[0] == first
    assert len(rows) == count
    assert_greedy(points, rows)


def test_the_given_points_are_not_written_to():
    points = random_points()
    before = points.clone()
    greedy_coreset(points, 50)
    assert torch.equal(points, before)


def test_progress_ends_with_all(block):
    told = []
    greedy_coreset(random_points(), 60, progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (60, 60)
    assert told == sorted(told)


@pytest.mark.parametrize("count", [0, -1, 11])
def test_a_count_that_cannot_be_is_refused(count):
    with pytest.raises(InvalidInput, match="1 to 10"):
        greedy_coreset(random_points(10), count)
