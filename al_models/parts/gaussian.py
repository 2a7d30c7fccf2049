"""One Gaussian for every position of a feature map, fitted in one pass without storing the features.

Counts, means and scatters add up: batches, shards on several workers and the images of another night give what all of
them at once would, up to rounding (Chan, Golub and LeVeque 1983). Deviations are taken from a running mean before they
are squared, so that float32 loses nothing to cancellation: 1e-6 of the largest covariance for features of any offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

_POSITIONS_AT_ONCE = 512
_ROW_BY_ROW = 16
_IMAGES_THAT_PAY = 4
"""From so many images on, two products of three quarters of the matrix are a third faster than one of all of it."""


class PositionGaussians:
    """Mean and scatter per position, updated batch by batch."""

    def __init__(self, positions: int, channels: int, device: str = "cpu") -> None:
        """Nothing seen yet."""
        self.count = 0
        self.mean = torch.zeros(positions, 1, channels, device=device)  # (p, 1, c)
        self.scatter = torch.zeros(positions, channels, channels, device=device)  # (p, c, c)

    @staticmethod
    def of(count: int, mean: Tensor, scatter: Tensor) -> PositionGaussians:
        """The moments of `count` images seen before; mean (p, 1, c) and scatter (p, c, c) are updated in place."""
        found = PositionGaussians(0, 0)
        found.count, found.mean, found.scatter = count, mean, scatter
        return found

    def update(self, x: Tensor) -> None:
        """Take in float32 (p, n, c)."""
        mean = x.mean(1, keepdim=True)
        shift = mean - self.mean
        # The move of the mean is one more deviation, of weight count * n / total: one product does it all.
        self._add(x.shape[1], mean, torch.cat([x - mean, shift * self._weight(x.shape[1])], dim=1))  # (p, n + 1, c)

    def merge(self, other: PositionGaussians) -> None:
        """Take in all that another one has seen."""
        shift = other.mean - self.mean
        weight = self._weight(other.count)
        self.scatter += other.scatter
        self._add(other.count, other.mean, shift * weight)

    def _add(self, n: int, mean: Tensor, rows: Tensor) -> None:
        self.scatter.baddbmm_(rows.mT, rows)
        self.count += n
        if self.count:
            self.mean += (mean - self.mean) * (n / self.count)

    def _weight(self, n: int) -> float:
        return (self.count * n / max(1, self.count + n)) ** 0.5


def total_variance(count: int, mean: Tensor, scatter: Tensor) -> Tensor:
    """Variance of each channel over all images and positions: (p, 1, c) and (p, c, c) -> (c,)."""
    within = scatter.diagonal(dim1=1, dim2=2).mean(0) / max(1, count - 1)
    return within + mean[:, 0].var(0, correction=0)


def whitening(count: int, scatter: Tensor, epsilon: float) -> Tensor:
    """Lower triangular W (p, c, c) of each position: |W (x - mean)| is the Mahalanobis distance.

    `scatter` (p, c, c) of `count` images gives the covariance, regularised by epsilon on its diagonal (PaDiM,
    arXiv:2011.08785, eq. 1), so that fewer images than channels are no trouble.
    """
    identity = torch.eye(scatter.shape[1], device=scatter.device)
    found = torch.empty_like(scatter)
    for part, out in zip(scatter.split(_POSITIONS_AT_ONCE), found.split(_POSITIONS_AT_ONCE), strict=True):
        factor = torch.linalg.cholesky(part / max(1, count - 1) + epsilon * identity)
        out.copy_(inverse_triangular(factor))
    return found


def inverse_triangular(lower: Tensor) -> Tensor:
    """Inverses (p, c, c) of lower triangular matrices, by halves: [[A, 0], [B, C]] has -C^-1 B A^-1 below its diagonal.

    Batched products keep all threads busy; `torch.linalg.solve_triangular` starts them for each matrix, which takes
    1.3 times as long on two idle cores, and twice to ten times where several processes share them.
    """
    c = lower.shape[1]
    inverse = torch.zeros_like(lower)
    if c <= _ROW_BY_ROW:
        for i in range(c):
            scale = lower[:, i, i].reciprocal()
            inverse[:, i, i] = scale
            if i:
                inverse[:, i, :i] = -torch.bmm(lower[:, i : i + 1, :i], inverse[:, :i, :i])[:, 0] * scale[:, None]
        return inverse
    half = c // 2
    first, last = inverse_triangular(lower[:, :half, :half]), inverse_triangular(lower[:, half:, half:])
    inverse[:, :half, :half], inverse[:, half:, half:] = first, last
    inverse[:, half:, :half] = -torch.bmm(last, torch.bmm(lower[:, half:, :half], first))
    return inverse


def mahalanobis(x: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """Distances (p, n) of float32 (p, n, c) to the Gaussian of each position; whitening is lower triangular."""
    centred, half = x - mean, whitening.shape[1] // 2
    if torch.compiler.is_exporting() or x.shape[1] < _IMAGES_THAT_PAY:  # of a graph's images the number is open
        return torch.bmm(centred, whitening.mT).square_().sum(2).sqrt_()
    upper = torch.bmm(centred[..., :half], whitening[:, :half, :half].mT)  # a quarter of the matrix is zero
    lower = torch.bmm(centred, whitening[:, half:].mT)
    return upper.square_().sum(2).add_(lower.square_().sum(2)).sqrt_()


def pack_symmetric(matrices: Tensor) -> Tensor:
    """Symmetric (p, c, c) -> its lower triangles (p, c * (c + 1) / 2): half the bytes."""
    rows, columns = torch.tril_indices(matrices.shape[1], matrices.shape[1], device=matrices.device)
    return matrices[:, rows, columns]


def unpack_symmetric(packed: Tensor, channels: int) -> Tensor:
    """The symmetric matrices (p, c, c) of triangles (p, c * (c + 1) / 2) that `pack_symmetric` gave."""
    rows, columns = torch.tril_indices(channels, channels, device=packed.device)
    matrices = packed.new_empty(len(packed), channels, channels)
    matrices[:, rows, columns] = packed
    matrices[:, columns, rows] = packed
    return matrices
