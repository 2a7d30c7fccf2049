"""Invertible blocks of normalizing flows, each with its exact log-determinant.

A block maps vectors (n, c) or feature maps (n, c, h, w) to the same shape and gives, for each of the n, the logarithm
of the absolute determinant of its Jacobian; `inverse` takes it back. Blocks in a `Flow` add theirs up. With a standard
normal density of the outcome z, log p(x) = log N(z) + log |det dz/dx| (Dinh, Sohl-Dickstein and Bengio 2017,
arXiv:1605.08803).

Written here, not taken from FrEIA: its last release is of 2022, and what the survey's methods need of it are these few
blocks. They follow the code that the papers were published with, so that their clamps and scales mean the same.

Shapes: n images or positions, c channels, h x w positions of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.errors import unknown

Subnet = Callable[[int, int], nn.Module]
"""(channels in, channels out) -> the network inside a coupling; it may be anything that keeps n, h and w. With a
condition it is called as subnet(x, condition) and joins the two itself."""

LOG_2_PI = math.log(2 * math.pi)


def soft_clamp(scale: Tensor, limit: float, curve: str) -> Tensor:
    """A log-scale kept within ±limit by a smooth curve. Raises UnknownName for another curve than these.

    `tanh`: limit tanh(scale / 10), as in FrEIA's AllInOneBlock; `atan`: limit 2/pi atan(scale / limit), as in
    DifferNet's code (FrEIA's own GLOW block does not divide by the limit).
    """
    if curve == "tanh":
        return limit * torch.tanh(0.1 * scale)
    if curve == "atan":
        return limit * (2 / math.pi) * torch.atan(scale / limit)
    raise unknown("clamp", curve, ["atan", "tanh"])


def log_likelihood(z: Tensor, logdet: Tensor) -> Tensor:
    """Natural logarithms of p(x) (n,), of z (n, ...), which is standard normal, and log-determinants (n,)."""
    return logdet - 0.5 * (z.square() + LOG_2_PI).flatten(1).sum(1)


class Block(nn.Module):
    """An invertible map with its log-determinant; the base of all blocks."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> (y of the same shape, log |det dy/dx| (n,))."""
        raise NotImplementedError

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """The x of which `forward` made y."""
        raise NotImplementedError


class Flow(Block):
    """Blocks one after the other; all see the same condition."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0], dtype=torch.float32)
        for block in self.blocks:
            x, logdet = block(x, condition)
            total = total + logdet
        return x, total

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in reversed(self.blocks):
            y = block.inverse(y, condition)
        return y


class HalfCoupling(Block):
    """An affine coupling: a subnet of the first half of the channels scales and shifts the second (AllInOneBlock)."""

    def __init__(self, channels: int, subnet: Subnet, *, clamp: float) -> None:
        super().__init__()
        self.sizes = (channels - channels // 2, channels // 2)
        self.clamp = clamp
        self.subnet = subnet(self.sizes[0], 2 * self.sizes[1])

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = x.split(self.sizes, dim=1)
        scale, shift = self._affine(kept, condition)
        return torch.cat([kept, moved * scale.exp() + shift], dim=1), scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        kept, moved = y.split(self.sizes, dim=1)
        scale, shift = self._affine(kept, condition)
        return torch.cat([kept, (moved - shift) * (-scale).exp()], dim=1)

    def _affine(self, kept: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        found = _seen(self.subnet, kept, condition).float()  # a log-determinant in half precision would be noise
        scale, shift = found.chunk(2, dim=1)
        return soft_clamp(scale, self.clamp, "tanh"), 0.1 * shift


class Coupling(Block):
    """An affine coupling: each half of the channels is scaled and shifted by a subnet of the other (DifferNet's GLOW
    block)."""

    def __init__(self, channels: int, subnet: Subnet, *, clamp: float) -> None:
        super().__init__()
        self.sizes = (channels // 2, channels - channels // 2)
        self.clamp = clamp
        first, second = self.sizes
        self.from_first = subnet(first, 2 * second)
        self.from_second = subnet(second, 2 * first)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, second = x.split(self.sizes, dim=1)
        scale1, shift1 = self._affine(self.from_second, second, condition)
        first = first * scale1.exp() + shift1
        scale2, shift2 = self._affine(self.from_first, first, condition)
        second = second * scale2.exp() + shift2
        return torch.cat([first, second], dim=1), scale1.flatten(1).sum(1) + scale2.flatten(1).sum(1)

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        first, second = y.split(self.sizes, dim=1)
        scale2, shift2 = self._affine(self.from_first, first, condition)
        second = (second - shift2) * (-scale2).exp()
        scale1, shift1 = self._affine(self.from_second, second, condition)
        return torch.cat([(first - shift1) * (-scale1).exp(), second], dim=1)

    def _affine(self, subnet: nn.Module, seen: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        found = _seen(subnet, seen, condition).float()
        scale, shift = found.chunk(2, dim=1)
        return soft_clamp(scale, self.clamp, "atan"), shift


class CrossScaleCoupling(nn.Module):
    """An affine coupling of several maps at once (CS-Flow, arXiv:2110.02855, section 3.2): each half of all maps'
    channels is scaled and shifted by one subnet of the other half of all maps.

    Maps are lists of (n, c, h_s, w_s), one a scale; the subnet takes such a list and gives one of the same n, h_s, w_s.
    """

    def __init__(self, channels: int, subnet: Subnet, *, clamp: float) -> None:
        super().__init__()
        self.sizes = (channels // 2, channels - channels // 2)
        self.clamp = clamp
        first, second = self.sizes
        self.from_first = subnet(first, 2 * second)
        self.from_second = subnet(second, 2 * first)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Maps -> (maps of the same shapes, log |det| of the Jacobian over all of them (n,))."""
        first, second = self._halves(maps)
        scales1, shifts1 = self._affine(self.from_second, second)
        first = [x * scale.exp() + shift for x, scale, shift in zip(first, scales1, shifts1, strict=True)]
        scales2, shifts2 = self._affine(self.from_first, first)
        second = [x * scale.exp() + shift for x, scale, shift in zip(second, scales2, shifts2, strict=True)]
        logdet = torch.stack([scale.flatten(1).sum(1) for scale in scales1 + scales2]).sum(0)
        return _joined(first, second), logdet

    def inverse(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps of which `forward` made these."""
        first, second = self._halves(maps)
        scales2, shifts2 = self._affine(self.from_first, first)
        second = [(y - shift) * (-scale).exp() for y, scale, shift in zip(second, scales2, shifts2, strict=True)]
        scales1, shifts1 = self._affine(self.from_second, second)
        first = [(y - shift) * (-scale).exp() for y, scale, shift in zip(first, scales1, shifts1, strict=True)]
        return _joined(first, second)

    def _halves(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        halves = [x.split(self.sizes, dim=1) for x in maps]
        return [first for first, _ in halves], [second for _, second in halves]

    def _affine(self, subnet: nn.Module, seen: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [found.float().chunk(2, dim=1) for found in subnet(seen)]
        return [soft_clamp(scale, self.clamp, "atan") for scale, _ in pairs], [shift for _, shift in pairs]


class Scale(Block):
    """A learned positive scale and a shift of each channel (the global affine part of AllInOneBlock, softplus)."""

    def __init__(self, channels: int, initial: float = 1.0) -> None:
        super().__init__()
        # 0.1 * softplus(raw; beta 0.5) = 0.2 * log(1 + exp(raw / 2)) is `initial` at this value.
        self.raw = nn.Parameter(torch.full((channels,), 2 * math.log(math.expm1(5 * initial))))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self._scale()
        logdet = scale.log().sum() * _positions(x)
        return x * _broadcast(scale, x) + _broadcast(self.shift, x), logdet.expand(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return (y - _broadcast(self.shift, y)) / _broadcast(self._scale(), y)

    def _scale(self) -> Tensor:
        return 0.1 * F.softplus(self.raw, beta=0.5)


class Permutation(Block):
    """Channels in another order, drawn once from torch's own generator; its determinant is 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(x.shape[0], dtype=torch.float32)

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return y[:, self.order.argsort()]


class Rotation(Block):
    """Channels mixed by a rotation drawn once, uniform over SO(c) (a soft permutation); its determinant is 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        matrix, triangle = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        matrix = matrix * triangle.diagonal().sign()  # else it would not be uniform (Mezzadri 2007)
        matrix[:, 0] *= torch.linalg.det(matrix).sign()
        self.register_buffer("matrix", matrix.float())

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _mix(x, self.matrix), x.new_zeros(x.shape[0], dtype=torch.float32)

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return _mix(y, self.matrix.T)


class InvertibleConvolution(Block):
    """Channels mixed by a learned invertible matrix, a 1x1 convolution W = P L (U + diag s) (Kingma and Dhariwal 2018,
    arXiv:1807.03039, section 3.2): its determinant is the product of s."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        start = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(start)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(upper.diagonal().abs().log())

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._triangles()
        logdet = self.log_scale.sum() * _positions(x)
        return _mix(x, self.permutation @ lower @ upper), logdet.expand(x.shape[0])

    def inverse(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        lower, upper = self._triangles()
        vectors = y.flatten(2).transpose(1, 2).flatten(0, 1) if y.ndim > 2 else y  # (m, c)
        found = torch.linalg.solve_triangular(lower, self.permutation.T @ vectors.T, upper=False, unitriangular=True)
        found = torch.linalg.solve_triangular(upper, found, upper=True).T
        return found.view(len(y), -1, y.shape[1]).transpose(1, 2).reshape(y.shape) if y.ndim > 2 else found

    def _triangles(self) -> tuple[Tensor, Tensor]:
        lower = self.lower.tril(-1) + torch.eye(len(self.sign), device=self.sign.device)
        return lower, self.upper.triu(1) + (self.sign * self.log_scale.exp()).diag()


def _seen(subnet: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    found: Tensor = subnet(x) if condition is None else subnet(x, condition)
    return found


def _joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)]


def _mix(x: Tensor, matrix: Tensor) -> Tensor:
    """matrix (c, c) applied to the channels of (n, c) or (n, c, h, w)."""
    with torch.autocast(x.device.type, enabled=False):  # of what is mixed in half precision nothing could be undone
        matrix = matrix.to(x.dtype)
        return F.linear(x, matrix) if x.ndim == 2 else F.conv2d(x, matrix[:, :, None, None])


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


def _positions(x: Tensor) -> int:
    """Number of positions at which a channel is scaled: 1 of vectors, h * w of maps."""
    return math.prod(x.shape[2:])
