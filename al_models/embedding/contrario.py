"""A contrario: A Multi-Scale A Contrario Method for Unsupervised Image Anomaly Detection (Tailanian, Musé and Pardo
2021, arXiv:2110.02407), and its extension for industrial quality inspection (2022, arXiv:2205.11611).

The idea: the features of an image are decorrelated and whitened with the image's own principal components, so that a
position's squared Mahalanobis distance says how rare it is within the image. The distances of a block of positions are
averaged. The probability p that a block of normal material looks at least as rare, times the number of tests made in
the image, is the Number of False Alarms (NFA). Over all layers and block sizes the smallest NFA counts: the map is
-log10 NFA, and the score is its maximum.

What the map promises: a good image holds on average at most e blocks with -log10 NFA >= -log10 e, for every e. A pixel
of the map is an average of blocks around it, so at most a share e of good images reaches that value anywhere. The
promise is as good as p; the evaluation counts how many false alarms there were.

`tail="chi2"` is the papers' law for p: whitened features are taken as Gaussian, so squared distances follow a
chi-square law. Deep features have heavier tails, and there are more false alarms than promised.

`tail="empirical"` takes p as the share of blocks of the good training images that are at least as rare. Beyond their
rarest 1 % an exponential continues it (excesses over a high threshold: Balkema and de Haan 1974, Pickands 1975); the
tail of a chi-square law approaches one, too. It assumes that new good images resemble the training images, and
extrapolates where p is smaller than one block of the training set.

`training_share` above 0 mixes the good images' mean and covariance into those of the image. With the papers' 0 an image
is whitened by its own statistics alone, which a large or low-contrast anomaly shapes so that it goes unseen.

Differs from the papers:
- The authors' code pads the image by reflection before the network. Features are stored without that padding, so border
  positions are cut off and the nearest inner ones repeated.
- It keeps 35 of the 256 channels of ResNet-50. The offline backbone has 24 to 112, and the components of least variance
  detect the most, so all are kept.
- It tests each principal component by itself and takes the smallest NFA. Here the squared components of a position are
  summed before the test.
- It aggregates positions by regions. The square blocks, their sizes, the averaging of their distances and the number of
  tests (one a block, over all layers and sizes) are our reading.
- `tail="empirical"` and `training_share` are additions; the defaults are the papers' setting.

Shapes: n images, p = h * w positions, c channels, k components, r rows (layer by layer, size by size), b bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt, MinLen
from torch import Tensor
from torch.nn import functional as F

from al_models.detector import Detector
from al_models.errors import InvalidInput
from al_models.parameters import Layers, NonNegativeFloat, NonNegativeInt, OddInt, PositiveInt
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.patches import on_device
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

_BINS, _LOWEST, _HIGHEST = 8192, 1e-4, 1e6  # of the histogram of statistics: each bin is 0.3 % wide
_FLATTEST = 1e-6  # components with less than this share of the largest variance are noise of half precision
_LN10 = math.log(10)


def log10_chi2_tail(x: Tensor, dof: float) -> Tensor:
    """-log10 P(chi-square of `dof` degrees > x) for float64 x of any shape, exact where the probability underflows."""
    a, x = torch.tensor(dof / 2, dtype=x.dtype, device=x.device), x / 2
    near = torch.special.gammaincc(a, x)
    far = x > 2 * a + 300  # here the probability is below 1e-60 and a few terms of the continued fraction suffice
    z = torch.where(far, x, 2 * a + 300)
    fraction = torch.zeros_like(z)
    for i in range(30, 0, -1):  # Legendre's continued fraction of the incomplete gamma function (DLMF 8.9.2), backwards
        fraction = i * (a - i) / (z + 2 * i + 1 - a + fraction)
    log = a * z.log() - z - torch.lgamma(a) - (z + 1 - a + fraction).log()
    return -torch.where(far, log / _LN10, near.clamp(min=1e-300).log10())


def image_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (n, c) and covariance (n, c, c) over the positions of each image, float64 (n, c, h, w)."""
    vectors = x.flatten(2)  # (n, c, p)
    mean = vectors.mean(2)
    centred = vectors - mean[:, :, None]
    return mean, centred @ centred.mT / vectors.shape[2]


class _Pooled:
    """Mean and covariance of the positions of all images seen (Chan, Golub and LeVeque 1983: no cancellation)."""

    def __init__(self) -> None:
        self.count, self.mean, self.covariance = 0, torch.zeros(()), torch.zeros(())

    def update(self, mean: Tensor, covariance: Tensor) -> None:
        """Take in the moments of n images of equal size."""
        centre = mean.mean(0)
        spread = mean - centre
        within = covariance.mean(0) + spread.T @ spread / len(mean)
        share, shift = len(mean) / (self.count + len(mean)), centre - self.mean
        between = shift[:, None] * shift[None] if self.count else torch.zeros_like(within)
        self.covariance = (1 - share) * self.covariance + share * within + share * (1 - share) * between
        self.mean = self.mean + share * shift
        self.count += len(mean)


@dataclass(kw_only=True)
class Contrario(Detector):
    """The number of false alarms of the rarest block around each pixel."""

    traits: ClassVar[Traits] = Traits(promises_false_alarms=True)
    quick: ClassVar[Mapping[str, object]] = {"layers": (2, 3)}

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (1, 2, 3)
    weights: str | None = None
    components: PositiveInt | None = None
    """Principal components kept, the largest; None keeps all (the authors' code: 35 of 256 channels)."""
    training_share: Annotated[float, Ge(0), Le(1)] = 0.0
    """Weight of the good images in the mean and covariance that an image is whitened with; the papers' is 0."""
    sizes: Annotated[tuple[OddInt, ...], MinLen(1)] = (1, 3)
    """Sides of the blocks, in positions of the layer; odd."""
    border: NonNegativeInt = 8
    """Pixels at each side where the network saw its padding; the nearest positions inside stand in for them."""
    tail: Literal["empirical", "chi2"] = "chi2"
    """Where p comes from: "empirical" from the good images, "chi2" from the papers' Gaussian model."""
    tail_share: Annotated[float, Gt(0), Lt(1)] = 0.01
    """Share of the rarest blocks of good images that the exponential tail is fitted to."""
    sigma: NonNegativeFloat = SIGMA

    def feature_spec(self) -> FeatureSpec:
        """The layers, each a scale."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights)

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        for name in self.state_names():  # another `tail` learns other attributes
            delattr(self, name)
        pooled = {layer: _Pooled() for layer in self.layers}
        for done, batch in enumerate(source, start=1):
            for layer, x in self._inner(batch, runtime).items():
                pooled[layer].update(*image_moments(x))
            runtime.progress("fit contrario: moments", min(done * source.batch_size, len(source)), len(source))
        for layer, moments in pooled.items():
            setattr(self, f"mean{layer}_", moments.mean)  # (c,)
            setattr(self, f"covariance{layer}_", moments.covariance)  # (c, c)
        if self.tail == "empirical":
            self._fit_tails(source, runtime)

    def _fit_tails(self, source: ImageSource, runtime: Runtime) -> None:
        """Learn the histograms of good blocks' statistics, in a second pass, and the exponential tails beyond them."""
        counts = torch.zeros(len(self.layers) * len(self.sizes), _BINS, dtype=torch.int64)
        for done, batch in enumerate(source, start=1):
            for row, statistics in enumerate(self._statistics(batch, runtime)):
                counts[row] += torch.bincount(_bin(statistics).flatten(), minlength=_BINS).cpu()
            runtime.progress("fit contrario: tails", min(done * source.batch_size, len(source)), len(source))
        # The share of good blocks at or above each bin, and the mean excess of the rarest, which fits an exponential.
        above = counts.flip(1).cumsum(1).flip(1) / counts.sum(1, keepdim=True)  # (r, b), share at or above each bin
        edges = _LOWEST * (_HIGHEST / _LOWEST) ** (torch.arange(_BINS + 1, dtype=torch.float64) / _BINS)
        start = (above >= self.tail_share).sum(1) - 1  # the last bin with enough blocks at or above it
        tail = counts * (torch.arange(_BINS) >= start[:, None])
        excess = (tail * (edges[1:] - edges[start][:, None])).sum(1) / tail.sum(1)
        # A layer without any spread in the good images would give infinite maps: a chi-square's tail is no lighter.
        channels = torch.tensor([len(getattr(self, f"mean{layer}_")) for layer in self.layers for _ in self.sizes])
        self.scale_ = torch.maximum(excess, 0.01 * channels)  # (r,) mean excess over `start_`
        self.start_ = edges[start]  # (r,)
        self.rarity_ = -above.clamp(min=1e-12).log10()  # (r, b)

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        for name in self.state_names():
            setattr(self, name, getattr(self, name).to(runtime.device))
        statistics = self._statistics(batch, runtime)
        tests = sum(values[0].numel() for values in statistics)
        # At each pixel the smallest NFA over layers and block sizes counts.
        rarest: Tensor | None = None
        for row, values in enumerate(statistics):
            log_nfa = self._rarity(row, values) - math.log10(tests)
            layer = self.layers[row // len(self.sizes)]
            inner = self._cut(batch.features[layer])
            whole = F.pad(log_nfa[:, None], (inner,) * 4, mode="replicate")[:, 0]  # (n, h, w)
            maps = to_maps(whole, self.image_size, self.sigma, self._offset({layer: 1}))
            rarest = maps if rarest is None else torch.maximum(rarest, maps)
        assert rarest is not None  # the backbone refuses a spec without layers
        return Prediction(batch.ids, rarest.cpu().numpy(), rarest.amax((1, 2)).cpu().numpy())

    def _rarity(self, row: int, statistics: Tensor) -> Tensor:
        """-log10 of the probability that a good block's statistic is as large."""
        if self.tail == "chi2":  # a block counts as one independent draw: its positions see much of the same pixels
            channels = len(getattr(self, f"mean{self.layers[row // len(self.sizes)]}_"))
            return log10_chi2_tail(statistics, min(self.components or channels, channels))
        start = self.rarity_[row][_bin(self.start_[row])]
        beyond = start + (statistics - self.start_[row]) / (self.scale_[row] * _LN10)
        return torch.where(statistics > self.start_[row], beyond, self.rarity_[row][_bin(statistics)])

    def _statistics(self, batch: ImageBatch, runtime: Runtime) -> list[Tensor]:
        """For each layer and block size, the mean squared distance over the block: (n, h, w) without the border."""
        found = []
        for layer, x in self._inner(batch, runtime).items():
            squared = self._squared_distances(x, getattr(self, f"mean{layer}_"), getattr(self, f"covariance{layer}_"))
            for size in self.sizes:
                pooled = F.avg_pool2d(squared[:, None], size, stride=1, padding=size // 2, count_include_pad=False)
                found.append(pooled[:, 0])
        return found

    def _squared_distances(self, x: Tensor, good_mean: Tensor, good_covariance: Tensor) -> Tensor:
        """Squared Mahalanobis distances (n, h, w) of float64 (n, c, h, w) over the components kept."""
        # The image's own moments, mixed with those of the good images.
        good = self.training_share
        mean, covariance = image_moments(x)
        shift = mean - good_mean.to(x.device)
        covariance = (1 - good) * covariance + good * good_covariance.to(x.device)  # (n, c, c)
        covariance = covariance + good * (1 - good) * shift[:, :, None] * shift[:, None]  # of the two means
        centre = mean - good * shift  # (n, c)
        # Whitened along the principal components that are kept.
        variances, axes = torch.linalg.eigh(covariance)  # rising
        variances, axes = (t[..., -(self.components or x.shape[1]) :] for t in (variances, axes))
        lowest = (variances[:, -1:] * _FLATTEST).clamp(min=1e-12)
        scaled = axes / torch.maximum(variances, lowest).sqrt()[:, None]  # (n, c, k)
        return (scaled.mT @ (x.flatten(2) - centre[..., None])).square().sum(1).view(len(x), *x.shape[2:])

    def _inner(self, batch: ImageBatch, runtime: Runtime) -> dict[int, Tensor]:
        """The layers in float64, (n, c, h, w) without the border."""
        features = on_device(batch, runtime.device)
        found = {}
        for layer in self.layers:
            x, cut = features[layer], self._cut(features[layer])
            h, w = x.shape[2:]
            if min(h, w) <= 2 * cut:
                raise InvalidInput(
                    f"border={self.border} px leaves nothing of layer {layer}, whose grid is {h} x {w} for images of "
                    f"{self.image_size} px; give a smaller border"
                )
            found[layer] = x[:, :, cut : h - cut, cut : w - cut].double()
        return found

    def _cut(self, x: Tensor) -> int:
        """Positions of the border at each side of a layer."""
        return math.ceil(self.border * x.shape[2] / self.image_size)


def _bin(statistics: Tensor) -> Tensor:
    """The bin of the histogram that each value falls in, int64; the outermost take what lies beyond."""
    place = (statistics.clamp(min=_LOWEST).log() - math.log(_LOWEST)) / math.log(_HIGHEST / _LOWEST) * _BINS
    return (place + 1e-6).long().clamp(max=_BINS - 1)  # an edge belongs to the bin above it, despite rounding
