"""Exact nearest neighbours: faiss on the CPU, a blocked matrix product elsewhere; memory bounded by the block."""

from __future__ import annotations

import faiss
import torch
from torch import Tensor

from al_models.errors import InvalidInput

_BLOCK_ELEMENTS = 2**24  # 64 MiB of float32 distances at a time
_FAISS_QUERIES = 2**14


def nearest(queries: Tensor, bank: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances and rows of the k nearest in the bank: float32 (m, d), (b, d) -> (m, k), (m, k), near first.

    Raises InvalidInput when the bank holds fewer than k points.
    """
    if not 1 <= k <= len(bank):
        raise InvalidInput(f"{k} neighbours were asked of a bank of {len(bank)}; ask for 1 to {len(bank)}")
    on_cpu = bank.device.type == "cpu"
    block = _FAISS_QUERIES if on_cpu else max(1, _BLOCK_ELEMENTS // len(bank))
    rows_of = _rows_by_faiss if on_cpu else _rows_by_product
    parts = [_measured(part, bank, rows_of(part, bank, k)) for part in queries.split(block)]
    return torch.cat([d for d, _ in parts]), torch.cat([rows for _, rows in parts])


def _rows_by_faiss(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """1.4 times as fast as the product for 24,000 x 152 on two cores: it never writes the distances to memory."""
    _, rows = faiss.knn(queries.contiguous().numpy(), bank.contiguous().numpy(), k)
    return torch.from_numpy(rows)  # (m, k)


def _rows_by_product(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    squared = torch.addmm(bank.square().sum(1), queries, bank.T, alpha=-2)  # (m, b), short of the queries' own norms
    return squared.argmin(1, keepdim=True) if k == 1 else squared.topk(k, dim=1, largest=False).indices  # (m, k)


def _measured(queries: Tensor, bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distances to the chosen rows: both searches expand |q|^2 + |b|^2 - 2qb, which loses digits when q is near b."""
    best, order = (queries[:, None] - bank[rows]).square().sum(2).sqrt_().sort(dim=1)  # (m, k)
    return best, rows.gather(1, order)
