"""Whether the part lies in the same place in every good image, measured on a sample of them.

Methods that compare positions (the trait `aligned_images_only`) learn what each position looks like. That helps where
a position shows the same spot of the part every time. It fails where a part moves or turns, since a position then shows
another spot, or the background, in every image. On an even texture it does no harm, since each position learns the
whole texture.

`agreement` is the share of the variance within images that lies at the same places in all of them, without bias from
few images: the intraclass correlation ICC(3,1) of Shrout and Fleiss (1979) with positions for subjects and images for
raters, which is about the mean correlation of two images, place by place. It is taken from feature maps on a grid of
16 x 16, each channel with zero mean and unit variance, without the outer eighth on each side, where the padding of a
network looks the same in every image. It falls as parts move or turn farther.

A texture agrees as little as a part that moves, so `agreement` alone cannot tell them apart. Images mostly can, by
`layout`: the share of the variance of brightness within an image that is between its 8 x 8 areas. It is small for an
even texture and large for a part, in place or not; but a texture with stains or shades passes for a part. The figures
behind both limits are in `tests/benchmarks/README.md`.

Shapes: n images, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from al_models.errors import InvalidInput

ENOUGH_AGREEMENT = 1 / 3
"""Agreement from which on images are aligned; parts that move by up to 16 of 256 pixels, the stride of the features,
are at the limit."""
LEAST_LAYOUT = 0.25
"""Layout below which images show an even texture."""

_GRID = 16
_AREAS = 8
_FEWEST_A_SIDE = 8
_SIDE_OF_GRADIENTS = 128  # at which gradients are taken: sensor noise is gone, an edge is one pixel wide

_SENTENCES = {
    "aligned": "The images are aligned: {} of what varies within an image lies at the same place in all of them. "
    "Methods that compare positions fit.",
    "texture": "The images show an even texture: only {} of what varies within an image lies at the same place in all "
    "of them, but there is no part that could move. Methods that compare positions work; each position learns the "
    "whole texture.",
    "not aligned": "The images are not aligned: only {} of what varies within an image lies at the same place in all "
    "of them. If a part moves or turns, methods that compare positions will flag good areas and miss defects: align "
    "the images first, or take a method that does not compare positions. If this is a texture, stained or shaded "
    "perhaps, there is nothing to align and no harm.",
}


@dataclass(frozen=True)
class Alignment:
    """What a sample of good images says about methods that compare positions."""

    agreement: float
    """Share of the variance within images that lies at the same places in all of them, 0..1."""
    layout: float | None
    """Share of the variance of brightness within an image that is between its areas, 0..1; None of features."""
    verdict: str
    """`aligned`, `texture` (no places to compare, and none needed) or `not aligned`."""
    sentence: str
    """The same, for people."""

    @property
    def warn(self) -> bool:
        """Whether methods that compare positions may do badly."""
        return self.verdict == "not aligned"


def alignment(sample: np.ndarray | Tensor) -> Alignment:
    """Judge uint8 images (n, h, w, 3), or float features (n, c, h, w) of one layer; 30 images are enough.

    Features tell best whether images agree; the limit was set with stride 16. Only images show that they are a texture.
    Raises InvalidInput for anything else, fewer than 2 images or fewer than 8 positions a side.
    """
    sample = torch.as_tensor(sample)
    _check(sample)
    gray = _gray(sample) if sample.dtype == torch.uint8 else None  # (n, 1, h, w)
    maps = sample.float() if gray is None else _with_gradients(gray)
    agreement, layout = _agreement(_scaled(maps)), None if gray is None else _layout(gray)
    if agreement >= ENOUGH_AGREEMENT:
        verdict = "aligned"
    elif layout is not None and layout < LEAST_LAYOUT:
        verdict = "texture"
    else:
        verdict = "not aligned"
    return Alignment(agreement, layout, verdict, _SENTENCES[verdict].format(f"{100 * agreement:.0f} %"))


def _check(sample: Tensor) -> None:
    images = sample.ndim == 4 and sample.dtype == torch.uint8 and sample.shape[3] in (1, 3)
    features = sample.ndim == 4 and sample.is_floating_point()
    if not images and not features:
        raise InvalidInput(
            f"{sample.dtype} {tuple(sample.shape)} was given to judge alignment by; give uint8 images (n, h, w, 3) or "
            "float features (n, c, h, w)"
        )
    if len(sample) < 2:
        raise InvalidInput(f"{len(sample)} image(s) were given to judge alignment by; give at least 2, better 30")
    h, w = sample.shape[1:3] if images else sample.shape[2:]
    if min(h, w) < _FEWEST_A_SIDE + 2 * images:  # gradients cost a pixel on each side
        raise InvalidInput(
            f"{h} x {w} {'pixels' if images else 'positions'} were given to judge alignment by; give larger images, or "
            f"features of an earlier layer: at least {_FEWEST_A_SIDE + 2} x {_FEWEST_A_SIDE + 2} pixels or "
            f"{_FEWEST_A_SIDE} x {_FEWEST_A_SIDE} positions"
        )


def _gray(images: Tensor) -> Tensor:
    """uint8 (n, h, w, 3) -> brightness (n, 1, h, w), at most 128 a side."""
    gray = images.float().mean(3)[:, None]
    return F.adaptive_avg_pool2d(gray, [min(_SIDE_OF_GRADIENTS, side) for side in gray.shape[2:]])


def _with_gradients(gray: Tensor) -> Tensor:
    """Brightness, strength of the gradient and its axis, by the doubled angle: (n, 1, h, w) -> (n, 4, h - 2, w - 2)."""
    dx = gray[:, :, 1:-1, 2:] - gray[:, :, 1:-1, :-2]
    dy = gray[:, :, 2:, 1:-1] - gray[:, :, :-2, 1:-1]
    strength = torch.hypot(dx, dy)
    axis = [(dx**2 - dy**2) / strength.clamp_min(1e-6), 2 * dx * dy / strength.clamp_min(1e-6)]
    return torch.cat([gray[:, :, 1:-1, 1:-1], strength, *axis], dim=1)


def _scaled(maps: Tensor) -> Tensor:
    """The inner positions of the grid as float64, each channel with zero mean and unit variance; a constant is zero."""
    maps = F.adaptive_avg_pool2d(maps, [min(_GRID, side) for side in maps.shape[2:]]).double()
    top, left = maps.shape[2] // 8, maps.shape[3] // 8
    inner = maps[:, :, top : maps.shape[2] - top, left : maps.shape[3] - left]
    rounding = 1e-5 * inner.square().mean((0, 2, 3), keepdim=True).sqrt()
    inner = inner - inner.mean((0, 2, 3), keepdim=True)
    spread = inner.square().mean((0, 2, 3), keepdim=True).sqrt()
    return torch.where(spread > rounding, inner / spread.clamp_min(1e-12), 0)


def _agreement(maps: Tensor) -> float:
    """The variance of maps (n, c, h, w) between positions as a share of that within images; 0 where nothing varies."""
    n = len(maps)
    within = maps - maps.mean((2, 3), keepdim=True)  # an image that is lighter as a whole says nothing of places
    mean = within.mean(0)
    rest = float((within - mean).square().sum()) / (n - 1)
    between = max(0.0, float(mean.square().sum()) - rest / n)  # the mean of few images varies by chance, too
    return between / (between + rest) if between + rest > 0 else 0.0


def _layout(gray: Tensor) -> float:
    """The median image's variance of brightness (n, 1, h, w) between areas, as a share of all; 0 if nothing varies."""
    within = gray - gray.mean((2, 3), keepdim=True)
    between = F.adaptive_avg_pool2d(within, _AREAS).square().mean((1, 2, 3))
    return float((between / within.square().mean((1, 2, 3)).clamp_min(1e-6)).median())
