"""Greedy k-center coreset, exact and lazy.

Roth et al. 2022 (arXiv:2106.08265), Algorithm 1: each next centre is the point farthest from all centres so far
(Gonzalez 1985). Done plainly, every centre costs one pass over all n x d values. But distances only fall, so an old
distance is an upper bound: a point needs to be brought up to date only when its bound could make it the next centre.
Points are refreshed in blocks, by matrix products with all centres they have missed, and centres are then chosen among
the few whose true distance exceeds every bound outside the block. The centres are those of the plain algorithm, except
that distances equal up to rounding may come in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from al_models.errors import InvalidInput

_BLOCK = 16384
_CENTRES_AT_ONCE = 1024


def greedy_coreset(
    points: Tensor,
    count: int,
    *,
    first: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """Rows of `count` centres, in the order chosen: float32 or float16 (n, d) -> int64 (count,).

    Starts at row `first`. Points may lie in a file (a tensor over `numpy.memmap`): in memory are, at a time, the
    centres, a block of points and a few numbers a point. Raises InvalidInput when count is not in 1..n.
    """
    n = len(points)
    if not 1 <= count <= n:
        raise InvalidInput(f"a coreset of {count} out of {n} points was asked for; give a count from 1 to {n}")
    lazy = _Lazy(points, count)
    lazy.choose(first)
    while len(lazy.chosen) < count:
        lazy.round()
        progress(len(lazy.chosen), count)
    return torch.tensor(lazy.chosen[:count])


class _Lazy:
    """Upper bounds on each point's squared distance to the chosen centres, and how many centres each bound knows."""

    def __init__(self, points: Tensor, count: int) -> None:
        self.points, self.count = points, count
        self.norms = torch.cat([_precise(part).square().sum(1) for part in points.split(_BLOCK)])  # (n,)
        self.bounds = torch.full_like(self.norms, torch.inf)
        self.known = torch.zeros(len(points), dtype=torch.int64, device=points.device)
        self.centres = self.norms.new_empty(count, points.shape[1])
        self.chosen: list[int] = []

    def choose(self, row: int) -> None:
        self.centres[len(self.chosen)] = self.points[row]
        self.bounds[row] = -1.0  # never again, not even when all that is left are its duplicates
        self.chosen.append(row)

    def round(self) -> None:
        """Refresh the points that may come next and choose centres while the choice is certain."""
        block = min(_BLOCK, len(self.points))
        bounds, rows = torch.topk(self.bounds, block)
        outside = float(bounds[-1]) if block < len(self.points) else -torch.inf
        bounds = self._refresh(rows, bounds)
        certain = bounds >= outside
        self._choose_among(rows[certain], bounds[certain], outside)

    def _refresh(self, rows: Tensor, bounds: Tensor) -> Tensor:
        """True distances of these points, in groups that have missed about the same centres."""
        now = len(self.chosen)
        order = torch.argsort(self.known[rows])
        for part in order.tensor_split(max(1, len(order) // 2048)):
            which = rows[part]
            start = int(self.known[which[0]])
            if start == now:
                continue
            x, norms, best = _precise(self.points[which]), self.norms[which], bounds[part]
            for begin in range(start, now, _CENTRES_AT_ONCE):
                centres = self.centres[begin : min(begin + _CENTRES_AT_ONCE, now)]
                distances = torch.addmm(centres.square().sum(1), x, centres.T, alpha=-2)  # (part, centres)
                best = torch.minimum(best, distances.amin(1).add_(norms).clamp_(min=0))
            bounds[part] = best
        self.bounds[rows] = torch.where(self.bounds[rows] < 0, self.bounds[rows], bounds)
        self.known[rows] = now
        return self.bounds[rows]

    def _choose_among(self, rows: Tensor, bounds: Tensor, outside: float) -> None:
        """Plain greedy among candidates, as long as the farthest of them is farther than any bound outside."""
        x, norms = _precise(self.points[rows]), self.norms[rows]
        while len(rows) and len(self.chosen) < self.count:
            farthest, at = bounds.max(0)
            if not float(farthest) >= max(outside, 0.0):
                break
            i = int(at)
            self.choose(int(rows[i]))
            distances = torch.addmv(norms, x, x[i], alpha=-2).add_(norms[i]).clamp_(min=0)
            torch.minimum(bounds, distances, out=bounds)
            bounds[i] = -1.0
        self.bounds[rows] = bounds
        self.known[rows] = len(self.chosen)


def _precise(points: Tensor) -> Tensor:
    """Half precision is for keeping, not for computing."""
    return points.float() if points.dtype == torch.float16 else points
