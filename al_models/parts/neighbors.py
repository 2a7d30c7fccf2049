"""Exact nearest neighbours, on any torch device: one blocked matrix product, memory bounded by the block."""

from __future__ import annotations

import torch
from torch import Tensor

from al_models.errors import InvalidInput

_BLOCK_ELEMENTS = 2**24  # 64 MiB of float32 distances at a time


def nearest(queries: Tensor, bank: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances and rows of the k nearest in the bank: float32 (m, d), (b, d) -> (m, k), (m, k), near first.

    Raises InvalidInput when the bank holds fewer than k points.
    """
    if not 1 <= k <= len(bank):
        raise InvalidInput(f"{k} neighbours were asked of a bank of {len(bank)}; ask for 1 to {len(bank)}")
    norms = bank.square().sum(1)  # (b,)
    block = max(1, _BLOCK_ELEMENTS // len(bank))
    parts = [_nearest_block(part, bank, norms, k) for part in queries.split(block)]
    return torch.cat([d for d, _ in parts]), torch.cat([rows for _, rows in parts])


def _nearest_block(queries: Tensor, bank: Tensor, norms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    squared = torch.addmm(norms, queries, bank.T, alpha=-2)  # (m, b), short of the queries' own norms
    best, rows = squared.min(1, keepdim=True) if k == 1 else squared.topk(k, dim=1, largest=False)
    # The expansion |q|^2 + |b|^2 - 2qb loses digits when q is close to b: the chosen few are measured afresh.
    best, order = (queries[:, None] - bank[rows]).square().sum(2).sqrt_().sort(dim=1)  # (m, k)
    return best, rows.gather(1, order)
