"""UTRAD: Chen et al. 2022, "UTRAD: Anomaly Detection and Localization with U-Transformer", Neural Networks 147, 53-62.

The idea: the stacked features of a pretrained network are a sequence of tokens, one a position, which a transformer
auto-encoder learns to reconstruct. It has the shape of a U. At each level attention stays within square windows, and
the summary of a window is one token of the next, coarser level. A narrow skip connection carries the window's tokens to
the decoder, whose learned queries attend to them and to the summary. A second head predicts how large the
reconstruction error of a position usually is. The map is the error divided by that prediction, averaged over windows of
all levels' sizes.

Differs from the authors' code, which is the source of all that the abstract leaves open:
- The network is smaller, since a step of theirs takes some 10^12 operations: 128 channels, 2 encoder and 2 decoder
  blocks a level, and at most 32 x 32 positions, to which finer layers are averaged. `dim=512, depth=4, tokens=64,
  learning_rate=1e-4` are theirs; the rate is larger here, since Adam's goes with one over the width (Yang et al. 2022,
  arXiv:2203.03466).
- The sides of windows are divisors of the grid, so that grids such as a vision transformer's 14 or 16 positions work.
- Channels are standardised on the good images. The offline backbone's deviate by 5 to 7, and at such a learning rate
  the output would take thousands of steps to reach that size.
- For the same reason the length of an error is the root of its mean square over the channels, not of the sum.
- The head that predicts the error begins at 1, the length of an untrained network's error. Begun near 0 as theirs, the
  divisor of the map is noise for thousands of steps.
- Position codes are learned, as the authors' names for them say; their code leaves them as first drawn.
- Training images are not turned by up to 10 degrees and cropped, as theirs are, since features are stored.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the authors' form.

Kept from it: the first three stages of the backbone; windows of 4 positions a side where the grid allows; 8 heads, a
feed-forward 4 times as wide as a token, dropout 0.1; mean squared error of the features plus that of the predicted
length of the error; Adam with betas 0.5 and 0.999, batches of 2, 150 epochs.

Shapes: n images, c channels of the stacked features, d of a token, g positions a side, w windows, s tokens a window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt, MultipleOf
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.frame import FRAME
from al_models.parts.maps import to_maps
from al_models.parts.patches import channel_counts, deviations_of, on_device, stack_layers
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

_WINDOW = 4
_SMALLEST = 0.01  # of the predicted error, in standard deviations of a channel


def window_sides(grid: int) -> tuple[int, ...]:
    """Sides of the windows, level by level, whose product is `grid`: 4 where it divides, else the next smaller."""
    sides, left = [], grid
    while left > 1:
        fitting = [side for side in range(2, _WINDOW + 1) if left % side == 0]
        side = max(fitting) if fitting else min(s for s in range(2, left + 1) if left % s == 0)
        sides.append(side)
        left //= side
    return tuple(sides) or (1,)


def into_windows(x: Tensor, side: int) -> Tensor:
    """Tokens (n, g, g, d) -> (n * w, side * side, d), window by window, row by row."""
    n, g, _, d = x.shape
    cut = x.view(n, g // side, side, g // side, side, d).transpose(2, 3)
    return cut.reshape(-1, side * side, d)


def out_of_windows(x: Tensor, grid: int) -> Tensor:
    """The inverse of `into_windows`: (n * w, side * side, d) -> (n, grid, grid, d)."""
    side, d = math.isqrt(x.shape[1]), x.shape[2]
    cut = x.view(-1, grid // side, grid // side, side, side, d).transpose(2, 3)
    return cut.reshape(-1, grid, grid, d)


class Level(nn.Module):
    """One level of the U: the tokens of windows to summaries on the way down, summaries to tokens on the way up."""

    def __init__(self, side: int, dim: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.side = side
        blocks = {"dim_feedforward": 4 * dim, "dropout": dropout, "activation": "gelu", "batch_first": True}
        self.place = nn.Parameter(torch.randn(side * side, dim))
        self.query = nn.Parameter(torch.randn(side * side, dim))
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(dim, heads, **blocks) for _ in range(depth)])
        self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(dim, heads, **blocks) for _ in range(depth)])
        self.encoded, self.decoded = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.skip = nn.Sequential(
            nn.Linear(dim, dim // 4), nn.LayerNorm(dim // 4), nn.GELU(), nn.Linear(dim // 4, dim), nn.LayerNorm(dim)
        )

    def down(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, g, g, d) -> summaries (n, g / side, g / side, d) and the skip's tokens (n * w, side^2, d)."""
        words = self.dropout(into_windows(x, self.side) + self.place)
        words = F.pad(words, (0, 0, 1, 0))  # a token of zeros before the others, which becomes the summary
        for block in self.encoder:
            words = block(words)
        words = self.encoded(words)
        rest = x.shape[1] // self.side
        return words[:, 0].reshape(x.shape[0], rest, rest, -1), self.skip(words[:, 1:])

    def up(self, summaries: Tensor, skipped: Tensor) -> Tensor:
        """Summaries (n, g / side, g / side, d) and the skip's tokens (n * w, side^2, d) -> tokens (n, g, g, d)."""
        memory = torch.cat([summaries.flatten(0, 2)[:, None], skipped], dim=1)  # (n * w, 1 + side^2, d)
        words = self.query.expand(memory.shape[0], -1, -1)
        for block in self.decoder:
            words = block(words, memory)
        return out_of_windows(self.decoded(words), summaries.shape[1] * self.side)


class UTransformer(nn.Module):
    """Standardised features (n, g, g, c) -> their reconstruction (n, g, g, c), and its usual error (n, g, g)."""

    def __init__(self, channels: int, grid: int, dim: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Linear(channels, dim, bias=False)
        self.place = nn.Parameter(torch.randn(grid, grid, dim))
        self.dropout = nn.Dropout(dropout)
        self.levels = nn.ModuleList([Level(side, dim, heads, depth, dropout) for side in window_sides(grid)])
        self.leave = nn.Linear(dim, channels, bias=False)
        widths = [dim, dim, dim // 2, dim // 4, dim // 8]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.LeakyReLU(0.2)]
        self.usual = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.ones_(self.usual[-1].bias)  # the length of an untrained network's error

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, skipped = self.dropout(self.enter(x) + self.place), []
        for level in self.levels:
            tokens, words = level.down(tokens)
            skipped.append(words)
        for level, words in zip(reversed(self.levels), reversed(skipped), strict=True):
            tokens = level.up(tokens, words)
        usual = self.usual(tokens.detach().flatten(0, 2))  # learns from the errors, and must not change them
        return self.leave(tokens), usual.view(tokens.shape[:3])


@dataclass(kw_only=True)
class Utrad(FeatureTrainedDetector):
    """A U-shaped transformer that repeats pretrained features; learned beside it: `mean_`, `scale_` (c,)."""

    traits: ClassVar[Traits] = Traits(trains=True, graph=True)
    training: ClassVar[Mapping[str, Any]] = {"betas": (0.5, 0.999)}
    quick: ClassVar[Mapping[str, Any]] = {"dim": 32, "heads": 4, "depth": 1, "tokens": 16, "epochs": 10}

    dim: Annotated[int, Ge(8), MultipleOf(8)] = 128
    """Channels of a token."""
    heads: PositiveInt = 8
    """Attention heads of a block."""
    depth: PositiveInt = 2
    """Encoder blocks, and decoder blocks, of a level."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of a block's activations that a training step leaves out."""
    tokens: Annotated[int, Ge(2)] = 32
    """Positions a side, at most; finer layers are averaged to them."""
    epochs: int = 150
    batch_size: int = 2
    learning_rate: float = 4e-4
    frame: float = FRAME
    sigma: NonNegativeFloat = 0.0
    """Standard deviation of a Gaussian that smooths the map, in pixels; the authors use none."""

    def conflict(self) -> str | None:
        """As Detector."""
        if self.dim % self.heads:
            return f"dim={self.dim} does not divide by heads={self.heads}; give a dim that 8 and heads divide"
        return None

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        total, squares, count = torch.zeros(()), torch.zeros(()), 0
        for batch in source.batches(rows):
            x = self._stack(on_device(batch, runtime.device)).double()
            total, squares = total + x.sum((0, 1, 2)).cpu(), squares + x.square().sum((0, 1, 2)).cpu()
            count += x[..., 0].numel()
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        self.mean_, self.scale_ = mean.float(), deviations_of(variance).float()

    def _network(self) -> nn.Module:
        return UTransformer(len(self.mean_), self._grid(), self.dim, self.heads, self.depth, self.dropout)

    def _grid(self) -> int:
        return min(self.tokens, max(h for _, h, _ in self._shapes()))

    def _stack(self, features: Mapping[int, Tensor]) -> Tensor:
        """The layers on one grid: (n, g, g, c)."""
        grid = self._grid()
        pooled = {n: F.adaptive_avg_pool2d(x.float(), grid) if x.shape[2] > grid else x for n, x in features.items()}
        return stack_layers(pooled, self.layers, mode="nearest").permute(0, 2, 3, 1)

    def _errors(self, network: nn.Module, batch: ImageBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Differences (n, g, g, c), their lengths, and the lengths that the network predicts, both (n, g, g).

        A length is the root of the mean square over channels.
        """
        x = self._stack(batch.features)
        mean, scale = (learned.to(x.device) for learned in (self.mean_, self.scale_))
        x = (x - mean) / scale
        found, usual = network(x)
        difference = found.float() - x
        return difference, difference.square().mean(-1).sqrt(), usual.float()

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        difference, lengths, usual = self._errors(network, batch)
        return difference.square().mean() + F.mse_loss(usual, lengths.detach())

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        _, lengths, usual = self._errors(network, batch)
        # The relative error of each position and of the windows of each level's size, averaged.
        relative = lengths / usual.abs().clamp(min=_SMALLEST)  # (n, g, g)
        grid, side = relative.shape[1], 1
        total = relative
        for step in window_sides(grid):
            side *= step
            pooled = F.avg_pool2d(relative[:, None], side)
            total = total + F.interpolate(pooled, size=(grid, grid), mode="bilinear", align_corners=False)[:, 0]
        return with_maximum(
            to_maps(
                total / (1 + len(window_sides(grid))),
                self.image_size,
                self.sigma,
                self._offset(channel_counts(batch.features, self.layers)),
            )
        )
