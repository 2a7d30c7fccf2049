"""The lazy coreset chooses as plain greedy does."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from al_models.embedding import patchcore
from al_models.embedding.patchcore import Patchcore
from al_models.errors import InvalidInput
from al_models.parts import coreset
from al_models.parts.coreset import greedy_coreset
from al_models.parts.patches import patch_vectors
from al_models.types import ImageBatch, ImageSource


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


@settings(max_examples=60)
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


class Features(ImageSource):
    """Random features of two layers."""

    def __init__(self, n):
        self.ids, self.batch_size = tuple(str(i) for i in range(n)), 3
        rng = np.random.default_rng(0)
        self.layers = {i: torch.from_numpy(rng.standard_normal((n, 4, s, s))).half() for i, s in ((1, 6), (2, 3))}

    def read(self, rows):
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {i: x[list(rows)] for i, x in self.layers.items()})


def test_patches_beyond_the_memory_allowed_lie_in_a_file_in_half_precision():
    inside = patch_vectors(Features(7), (1, 2), pool=3, device="cpu")
    outside = patch_vectors(Features(7), (1, 2), pool=3, device="cpu", in_memory=4 * inside.numel() - 1)
    assert (inside.dtype, outside.dtype, outside.shape) == (torch.float32, torch.float16, (7 * 36, 8))
    assert torch.equal(outside, inside.half())
    assert torch.equal(greedy_coreset(outside, 40), greedy_coreset(outside.float(), 40))
    del inside
    assert outside.isfinite().all()  # the file lives as long as its tensor


def test_patchcore_learns_from_a_file_what_it_learns_in_memory(monkeypatch):
    settings = {"layers": (1, 2), "image_size": 24, "coreset_ratio": 0.2, "projection": 5}
    inside = Patchcore(**settings).fit(Features(7))
    monkeypatch.setattr(patchcore, "patch_vectors", partial(patch_vectors, in_memory=0))
    outside = Patchcore(**settings).fit(Features(7))
    assert outside.bank_.dtype == torch.float32
    torch.testing.assert_close(outside.bank_, inside.bank_, rtol=1e-3, atol=1e-3)


def test_patchcore_with_an_index_says_how_often_it_finds_the_nearest():
    settings = {"layers": (1, 2), "image_size": 24, "coreset_ratio": 1.0}
    exact, fast = Patchcore(**settings).fit(Features(7)), Patchcore(**settings, index="IVF4,Flat").fit(Features(7))
    assert exact.facts() == {"bank": 252.0}
    assert fast.facts()["bank"] == 252
    assert 0.3 < fast.facts()["index_recall"] <= 1
    again = Patchcore(**settings, index="IVF4,Flat").load_state(fast.state())
    assert again.facts() == fast.facts()
    expected, found = exact.predict(Features(7)), fast.predict(Features(7))
    assert (found.maps >= expected.maps - 1e-5).all()  # what is found is never nearer than the nearest
    np.testing.assert_array_equal(again.predict(Features(7)).maps, found.maps)
