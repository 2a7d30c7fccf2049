"""The frame: a strip along the rim of a map, brought to the level that good images have inside.

Along the rim a network sees its padding, and has fewer examples to learn from. On a texture, good images then have
their highest values there, and their score says nothing about the part. Good images show how much higher the mean and
the spread of a map are at each place of the frame; there the map is shifted and scaled down until both are as inside.
It is never raised, and nothing inside is changed: dividing the whole map by its usual value would raise a calm
background over the part.

Shapes: n images, s pixels a side of a map, g cells a side of what is learned.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from al_models.errors import InvalidInput

FRAME = 0.125
"""Width of the frame as a share of the side: 32 of 256 pixels, within which the padding has its effect."""
RIM = 1 / 16
"""Width of the rim as a share of the side, for counting maps that peak there: 16 of 256 pixels, 23 % of the area."""
LOOKED_AT = 128
"""Good images, at most, from which the levels are learned."""
_CELL = 4
"""Pixels of a map that share their levels."""


class FrameMoments:
    """Mean and spread over good images of each cell of a map, added up batch by batch; two of them can be merged."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.count = 0
        self.sums = torch.zeros(2, 1, 1, dtype=torch.float64)  # (2, g, g): of values and of their squares

    def update(self, maps: Tensor) -> None:
        """Take in the maps (n, s, s) of good images."""
        cells = F.adaptive_avg_pool2d(maps.double()[:, None], max(1, maps.shape[-1] // _CELL))[:, 0]  # (n, g, g)
        self.sums = self.sums.to(cells.device) + torch.stack([cells.sum(0), cells.square().sum(0)])
        self.count += len(maps)

    def merge(self, other: FrameMoments) -> None:
        """Take in all that another one has seen."""
        self.sums = self.sums + other.sums
        self.count += other.count

    def levels(self, width: float) -> Tensor:
        """The gain that each cell is multiplied by and the shift that is then added: float32 (2, g, g); `width` is a
        share of the side.

        Raises InvalidInput for a frame that leaves nothing inside.
        """
        mean, square = self.sums / max(1, self.count)
        spread = (square - mean.square()).clamp(min=0).sqrt()
        frame = in_frame(len(mean), width).to(mean.device)
        if bool(frame.all()):
            raise InvalidInput(f"frame={width} leaves nothing inside of a map of {len(mean)} cells a side; give less")
        level, usual = mean[~frame].mean(), spread[~frame].square().mean().sqrt()
        gain = torch.where(frame & (spread > usual), usual / spread, 1.0)
        shift = torch.where(frame, torch.minimum(mean, level) - gain * mean, 0.0)
        return torch.stack([gain, shift]).float()


def in_frame(side: int, width: float) -> Tensor:
    """The cells of a square within `width` of its rim, a share of the side below a half: bool (side, side)."""
    place = (torch.arange(side) + 0.5) / side
    near = torch.minimum(place, 1 - place) < width
    return near[:, None] | near


def peaks_at_rim(maps: np.ndarray) -> np.ndarray:
    """Whether each map (n, s, s) has its largest value in the rim: bool (n,)."""
    rim = in_frame(maps.shape[1], RIM).numpy().ravel()
    return rim[maps.reshape(len(maps), -1).argmax(1)]


def levelled(maps: Tensor, levels: Tensor) -> Tensor:
    """Maps (n, s, s) with their frame at the level of the inside, by the gain and shift of `FrameMoments.levels`."""
    size = maps.shape[-2:]
    gain, shift = F.interpolate(levels[None].to(maps.device), size=size, mode="bilinear", align_corners=False)[0]
    return maps * gain + shift
