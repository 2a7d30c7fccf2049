"""Nearest neighbours. Exact: faiss on the CPU, a blocked matrix product elsewhere; memory bounded by the block.

Approximate, where a bank is so large that exactness is too slow: any index of faiss, with its recall measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import torch
from torch import Tensor

from al_models.errors import InvalidInput

_BLOCK_ELEMENTS = 2**24  # 64 MiB of float32 distances at a time
_FAISS_QUERIES = 2**14
_BANK_BLOCK = 2**12  # with the 1024 patches of an image, 16 MiB of distances


def nearest(queries: Tensor, bank: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances and rows of the k nearest in the bank: float32 (m, d), (b, d) -> (m, k), (m, k), near first.

    Raises InvalidInput when the bank holds fewer than k points.
    """
    if not 1 <= k <= len(bank):
        raise InvalidInput(f"{k} neighbours were asked of a bank of {len(bank)}; ask for 1 to {len(bank)}")
    if torch.compiler.is_exporting():
        return _measured(queries, bank, _rows_by_blocks(queries, bank, k))
    on_cpu = bank.device.type == "cpu"
    block = _FAISS_QUERIES if on_cpu else max(1, _BLOCK_ELEMENTS // len(bank))
    rows_of = _rows_by_faiss if on_cpu else _rows_by_product
    parts = [_measured(part, bank, rows_of(part, bank, k)) for part in queries.split(block)]
    return torch.cat([d for d, _ in parts]), torch.cat([rows for _, rows in parts])


def _rows_by_faiss(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Rows (m, k) of the nearest, faster on a CPU than the product, since distances are never written to memory."""
    _, rows = faiss.knn(queries.contiguous().numpy(), bank.contiguous().numpy(), k)
    return torch.from_numpy(rows)  # (m, k)


def _rows_by_product(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    squared = torch.addmm(bank.square().sum(1), queries, bank.T, alpha=-2)  # (m, b), short of the queries' own norms
    return squared.argmin(1, keepdim=True) if k == 1 else squared.topk(k, dim=1, largest=False).indices  # (m, k)


def _rows_by_blocks(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Rows (m, k) of the nearest, for a graph, which leaves the number of queries open: blocks of the bank bound its
    memory."""
    best, rows = [], []
    for start in range(0, len(bank), _BANK_BLOCK):
        part = bank[start : start + _BANK_BLOCK]
        squared = torch.addmm(part.square().sum(1), queries, part.T, alpha=-2)  # (m, block)
        found = squared.min(1, keepdim=True) if k == 1 else squared.topk(min(k, len(part)), dim=1, largest=False)
        best.append(found[0])
        rows.append(found[1] + start)
    return torch.cat(rows, 1).gather(1, torch.cat(best, 1).topk(k, dim=1, largest=False).indices)  # (m, k)


def _measured(queries: Tensor, bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Exact distances (m, k) to the chosen rows, and the rows in their order.

    The searches expand |q|^2 + |b|^2 - 2qb, which loses digits when q is near b.
    """
    best, order = (queries[:, None] - bank[rows]).square().sum(2).sqrt_().sort(dim=1)  # (m, k)
    return best, rows.gather(1, order)


class ApproximateIndex:
    """A faiss index of a bank, by its factory string: "IVF256,Flat", "HNSW32", "IVF256,PQ19", ...

    Searched on the CPU whatever the device. Distances are true ones, also where the index knows rounded points only;
    it is the rows that may not be the nearest. Equal banks give equal indexes: faiss seeds its clustering.
    """

    def __init__(self, bank: Tensor, factory: str) -> None:
        """Train the index and fill it. Raises InvalidInput for a factory string that faiss refuses for this bank."""
        self.bank = bank.float().cpu().contiguous()
        try:
            self.index = faiss.index_factory(self.bank.shape[1], factory)
            with _one_thread():  # several add to a graph in any order
                self.index.train(self.bank.numpy())
                self.index.add(self.bank.numpy())
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InvalidInput(
                f"faiss makes no index {factory!r} of {len(bank)} points of {bank.shape[1]} values ({reason}); give a "
                "factory string such as IVF256,Flat or HNSW32 with fewer cells than points"
            ) from error

    def nearest(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """As `nearest`, of the points that the index finds; a query for which it finds fewer repeats the first."""
        x = queries.float().cpu().contiguous()
        _, rows = self.index.search(x.numpy(), k)
        found = torch.from_numpy(rows)
        found = torch.where(found < 0, found[:, :1].clamp(min=0), found)
        distances, found = _measured(x, self.bank, found)
        return distances.to(queries.device), found.to(queries.device)

    def recall(self, queries: Tensor) -> float:
        """Share of queries float32 (m, d) whose nearest neighbour the index finds (or one as near)."""
        x = queries.float().cpu()
        exact, _ = nearest(x, self.bank)
        found, _ = self.nearest(x)
        return float((found[:, 0] <= exact[:, 0] * (1 + 1e-6)).float().mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
