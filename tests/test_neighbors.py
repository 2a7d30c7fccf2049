"""Nearest neighbours against brute force."""

from __future__ import annotations

import pytest
import torch

from al_models.errors import InvalidInput
from al_models.parts import neighbors
from al_models.parts.neighbors import ApproximateIndex, nearest


def cloud(n, d, seed, offset=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + offset


def brute_force(queries, bank):
    """Distances float64 (m, b) and rows, near first."""
    return torch.cdist(queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(1)


@pytest.mark.parametrize("k", [1, 2, 9, 70])
@pytest.mark.parametrize("elements", [1, 500, 2**24])
def test_equal_to_brute_force_in_blocks_of_any_size(k, elements, monkeypatch):
    monkeypatch.setattr(neighbors, "_BLOCK_ELEMENTS", elements)
    queries, bank = cloud(40, 8, seed=0), cloud(70, 8, seed=1)
    distances, rows = nearest(queries, bank, k)
    expected, order = brute_force(queries, bank)
    assert rows.tolist() == order[:, :k].tolist()
    torch.testing.assert_close(distances.double(), expected[:, :k], rtol=1e-5, atol=1e-6)
    assert distances.dtype == torch.float32


def test_distances_are_true_and_ascend_far_from_the_origin():
    """|q|^2 + |b|^2 - 2qb has lost its digits here; what is given back must not have."""
    bank = cloud(200, 16, seed=2, offset=100.0)
    queries = bank[:50] + 0.01 * cloud(50, 16, seed=3)
    distances, rows = nearest(queries, bank, 9)
    assert (distances.diff(dim=1) >= 0).all()
    assert rows[:, 0].tolist() == list(range(50))
    true = (queries[:, None].double() - bank[rows].double()).norm(dim=2)
    torch.testing.assert_close(distances.double(), true, rtol=1e-4, atol=1e-6)


def test_a_point_of_the_bank_is_at_distance_zero():
    bank = cloud(30, 4, seed=4)
    distances, rows = nearest(bank, bank)
    assert distances.eq(0).all()
    assert rows[:, 0].tolist() == list(range(30))


def test_no_query_has_no_neighbour():
    distances, rows = nearest(torch.empty(0, 4), cloud(5, 4, seed=5), 2)
    assert distances.shape == rows.shape == (0, 2)


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbours_than_the_bank_holds_are_refused(k):
    with pytest.raises(InvalidInput, match="1 to 5"):
        nearest(cloud(2, 4, seed=6), cloud(5, 4, seed=7), k)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "HNSW16", "IVF8,PQ4x4"])
def test_an_approximate_index_gives_true_distances_to_the_rows_it_finds(factory):
    bank, queries = cloud(600, 8, seed=8, offset=3.0), cloud(50, 8, seed=9, offset=3.0)
    index = ApproximateIndex(bank, factory)
    distances, rows = index.nearest(queries, 3)
    torch.testing.assert_close(distances, (queries[:, None] - bank[rows]).norm(dim=2), rtol=1e-5, atol=1e-6)
    assert (distances.diff(dim=1) >= 0).all()
    best, _ = nearest(queries, bank)
    found = float((distances[:, :1] <= best * (1 + 1e-6)).float().mean())
    assert index.recall(queries) >= 0.2
    assert found >= index.recall(queries)  # three guesses against one
    again = ApproximateIndex(bank, factory).nearest(queries, 3)
    assert torch.equal(again[1], rows)


def test_an_exact_index_has_full_recall():
    bank = cloud(300, 8, seed=10)
    assert ApproximateIndex(bank, "Flat").recall(cloud(40, 8, seed=11)) == 1.0


@pytest.mark.parametrize("factory", ["nonsense", "IVF1000,Flat", "PQ3"])
def test_an_index_that_cannot_be_is_refused_with_a_way_out(factory):
    with pytest.raises(InvalidInput, match="factory string such as"):
        ApproximateIndex(cloud(100, 8, seed=12), factory)
