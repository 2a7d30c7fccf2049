"""One Gaussian for every position of a feature map, fitted in one pass without storing the features."""

from __future__ import annotations

import torch
from torch import Tensor

_POSITIONS_AT_ONCE = 512


class PositionGaussians:
    """Mean and scatter per position, updated batch by batch (Chan, Golub and LeVeque 1983: no cancellation)."""

    def __init__(self, positions: int, channels: int, device: str = "cpu") -> None:
        """Nothing seen yet."""
        self.count = 0
        self.mean = torch.zeros(positions, 1, channels, device=device)  # (p, 1, c)
        self.scatter = torch.zeros(positions, channels, channels, device=device)  # (p, c, c)

    def update(self, x: Tensor) -> None:
        """Take in float32 (p, n, c)."""
        n, total = x.shape[1], self.count + x.shape[1]
        mean = x.mean(1, keepdim=True)
        shift = mean - self.mean
        # The move of the mean is one more deviation, of weight count * n / total: one product does it all.
        rows = torch.cat([x - mean, shift * (self.count * n / total) ** 0.5], dim=1)  # (p, n + 1, c)
        self.scatter.baddbmm_(rows.mT, rows)
        self.mean += shift * (n / total)
        self.count = total

    def whitening(self, epsilon: float) -> Tensor:
        """(p, c, c) lower triangular W with W W^T-metric: |W (x - mean)| is the Mahalanobis distance.

        The covariance is regularised by epsilon on its diagonal (PaDiM, arXiv:2011.08785, eq. 1), so that fewer
        images than channels are no trouble. Consumes the scatter: W takes its memory.
        """
        identity = torch.eye(self.scatter.shape[1], device=self.scatter.device)
        for part in self.scatter.split(_POSITIONS_AT_ONCE):
            factor = torch.linalg.cholesky(part / max(1, self.count - 1) + epsilon * identity)
            part.copy_(torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False))
        return self.scatter


def mahalanobis(x: Tensor, mean: Tensor, whitening: Tensor) -> Tensor:
    """Distances (p, n) of float32 (p, n, c) to the Gaussian of each position."""
    return torch.bmm(x - mean, whitening.mT).square_().sum(2).sqrt_()
