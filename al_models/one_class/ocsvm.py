"""One-class SVM: Estimating the Support of a High-Dimensional Distribution (Schölkopf et al. 2001, Neural Computation).

The idea: in the feature space of a Gaussian kernel, a hyperplane with the largest margin separates good patches from
the origin, all but a share nu of them. Its normal w is a weighted sum of few good patches, the support vectors, so that
f(x) = sum_i a_i k(z_i, x) - rho is positive where good patches are and negative elsewhere. A patch is as anomalous as
-f(x), an image as its most anomalous patch.

The exact dual (scikit-learn's libsvm) is solved on at most `exact_patches` patches, drawn at random. Where there are
more, its support vectors span a Nystroem space (Williams and Seeger 2000). There stochastic gradient descent continues
from the exact solution over all patches, with one batch of images in memory at a time: steps of 1 / (nu t) over some
256 patches of one image (Pegasos, Shalev-Shwartz et al. 2007), whose results are averaged with weights t
(Lacoste-Julien et al. 2012, arXiv:1212.2002).

Differs from the paper:
- The paper describes the machine, not its use on images. The patches are PatchCore's: two middle layers, averaged over
  3 x 3 neighbours.
- nu = 0.05 and gamma = 1 / c are our choice; for features of unit variance this gamma is scikit-learn's "scale".
- Features are whitened rather than only standardised, so that directions of little variance count, too.
- The gradient descent beyond `exact_patches` is not the paper's.

Shapes: n images, p = h * w patches an image, c channels, s patches in the exact problem, m centres.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Lt
from sklearn.svm import OneClassSVM
from torch import Tensor

from al_models.detector import Detector
from al_models.parameters import Layers, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from al_models.parts.gaussian import PositionGaussians
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.patches import as_vectors, channel_counts, on_device, stack_layers
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

_BLOCK_ELEMENTS = 2**22  # 16 MiB of float32 kernel values at a time
_PATCHES_A_STEP = 256
_SMALLEST_EIGENVALUE = 1e-5  # of the largest: below it, float32 kernels hold rounding, which 1 / sqrt would blow up


def rbf(x: Tensor, centres: Tensor, gamma: float) -> Tensor:
    """exp(-gamma |x - z|^2) of float32 (b, c) and (m, c): (b, m)."""
    squared = torch.addmm(centres.square().sum(1), x, centres.T, alpha=-2).add_(x.square().sum(1, keepdim=True))
    return squared.clamp_(min=0).mul_(-gamma).exp_()


def kernel_sum(x: Tensor, centres: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """sum_j weights_j k(z_j, x) of float32 (b, c), (m, c) and (m,): (b,), in blocks."""
    block = max(1, _BLOCK_ELEMENTS // len(centres))
    return torch.cat([rbf(part, centres, gamma) @ weights for part in x.split(block)])


def exact_machine(x: Tensor, nu: float, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Support vectors (m, c), their weights (m,) and rho (): float32, on the device of x (s, c).

    In the paper's scale, where the weights sum to 1; scikit-learn's sum to nu * s, and its f is as much larger.
    """
    machine = OneClassSVM(kernel="rbf", nu=nu, gamma=gamma)
    machine.random_state = 0  # libsvm needs none here, but scikit-learn draws one for it, from numpy's global generator
    machine.fit(x.double().cpu().numpy())
    scale = nu * len(x)
    rows = torch.from_numpy(machine.support_).long().to(x.device)
    weights = torch.from_numpy(machine.dual_coef_[0] / scale)
    rho = torch.tensor(-machine.intercept_[0] / scale)
    return x[rows], weights.to(x.device, torch.float32), rho.to(x.device, torch.float32)


class Nystroem:
    """A space in which the inner product is the kernel, exactly so for the centres: phi(x) = k(x, centres) @ root."""

    def __init__(self, centres: Tensor, gamma: float) -> None:
        """Make the space of centres float32 (m, c), with d <= m dimensions; a centre that the others span adds none."""
        self.centres, self.gamma = centres, gamma
        values, vectors = torch.linalg.eigh(self.kernels(centres).double())
        kept = values > _SMALLEST_EIGENVALUE * values[-1]
        self.root = (vectors[:, kept] * values[kept].rsqrt()).float()  # (m, d)

    def kernels(self, x: Tensor) -> Tensor:
        """Kernel values of patches with the centres: float32 (b, c) -> (b, m)."""
        return rbf(x, self.centres, self.gamma)


class AveragedDescent:
    """Averaged stochastic gradient descent of nu/2 |w|^2 - nu rho + mean of max(0, rho - w phi), the paper's primal
    times nu."""

    def __init__(self, space: Nystroem, w: Tensor, rho: Tensor, nu: float, steps: int) -> None:
        """Start from w float32 (d,) and rho () above 0, which are taken for the result of this many steps."""
        self.space, self.w, self.rho, self.nu, self.begin, self.done = space, w, rho, nu, steps, 0
        # rho is the nu-quantile of w phi, and steps towards a quantile do best at 1 / (its density t) (Robbins and
        # Monro 1951). A share nu lies below rho, so the density is about nu / rho; steps of 1 / (nu t) would overshoot.
        self.spread = rho.clone()
        self.mean_w, self.mean_rho = w.clone(), rho.clone()

    def step(self, x: Tensor) -> None:
        """Step along the subgradient of patches float32 (b, c); phi itself, the costly part, is never computed."""
        self.done += 1
        rate = 1 / (self.nu * (self.begin + self.done))
        kernels = self.space.kernels(x)  # (b, m)
        outside = (kernels @ (self.space.root @ self.w) < self.rho).float()  # (b,)
        pull = self.space.root.T @ (outside @ kernels) / len(x)  # (d,)
        self.w = self.w * (1 - rate * self.nu) + pull * rate
        self.rho = self.rho + rate * self.spread * (self.nu - outside.mean())
        self.mean_w.lerp_(self.w, 2 / (self.done + 1))
        self.mean_rho.lerp_(self.rho, 2 / (self.done + 1))

    def weights(self) -> Tensor:
        """The average w as weights of the centres: (m,)."""
        return self.space.root @ self.mean_w


@dataclass(kw_only=True)
class Ocsvm(Detector):
    """A one-class support vector machine on patch features."""

    traits: ClassVar[Traits] = Traits()
    quick: ClassVar[Mapping[str, object]] = {}

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (2, 3)
    weights: str | None = None
    neighbourhood: PositiveInt = 3
    """Side of the square of neighbours that a patch is averaged with."""
    whiten: bool = True
    """Whether features are whitened to unit variance in all directions; False: in each channel only."""
    epsilon: PositiveFloat = 0.01
    """Added to each variance, as a share of the mean variance."""
    nu: Annotated[PositiveFloat, Lt(1)] = 0.05
    """Upper bound on the share of training patches outside, lower bound on that of support vectors."""
    gamma: PositiveFloat | None = None
    """gamma of the kernel k = exp(-gamma |x - z|^2), which is the wider the smaller gamma is; None: 1 / number of
    channels."""
    exact_patches: PositiveInt = 8192
    """Patches of the exact problem, at most; drawn at random where there are more."""
    centres: PositiveInt = 1024
    """Support vectors that span the Nystroem space, at most."""
    epochs: NonNegativeInt = 1
    """Passes of the gradient descent; 0 leaves the exact machine of the sample."""
    sigma: NonNegativeFloat = SIGMA

    def feature_spec(self) -> FeatureSpec:
        """The middle layers."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights)

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        rng = np.random.default_rng(runtime.seed)
        sample, total = self._standardise(source, rng, runtime)
        vectors, weights, rho = exact_machine(sample, self.nu, self._gamma(sample))
        self.centres_, self.weights_, self.rho_ = vectors, weights, rho
        if total > len(sample) and self.epochs:
            self._descend(source, len(sample), rng, runtime)

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        for name in self.state_names():
            setattr(self, name, getattr(self, name).to(runtime.device))
        stacked = self._stack(batch, runtime)
        patches = self._whitened(as_vectors(stacked))
        inside = kernel_sum(patches, self.centres_, self.weights_, self._gamma(patches)) - self.rho_
        outside = -inside.view(len(batch), *stacked.shape[2:])  # (n, h, w)
        maps = to_maps(outside, self.image_size, self.sigma, self._offset(channel_counts(batch.features, self.layers)))
        return Prediction(batch.ids, maps.cpu().numpy(), outside.amax((1, 2)).cpu().numpy())

    def _standardise(self, source: ImageSource, rng: np.random.Generator, runtime: Runtime) -> tuple[Tensor, int]:
        """The whitened sample (s, c) of the exact problem, and the number of all patches; learns mean and whitening."""
        moments: PositionGaussians | None = None
        done, total = 0, 0
        for batch in source:
            x = as_vectors(self._stack(batch, runtime))
            if moments is None:
                moments = PositionGaussians(1, x.shape[1], runtime.device)
                total = len(source) * (len(x) // len(batch))
                rows = np.sort(rng.choice(total, min(total, self.exact_patches), replace=False))
                sample = x.new_empty(len(rows), x.shape[1])
            moments.update(x[None])
            first, last = np.searchsorted(rows, (done, done + len(x)))
            sample[first:last] = x[torch.from_numpy(rows[first:last] - done).to(x.device)]
            done += len(x)
            runtime.progress("fit ocsvm: moments", done, total)
        assert moments is not None  # fit refuses an empty source
        self.mean_ = moments.mean[0, 0].clone()  # (c,)
        self.whitening_ = self._whitening(moments)
        return self._whitened(sample), total

    def _whitening(self, moments: PositionGaussians) -> Tensor:
        """Lower triangular W (c, c): W (x - mean) has unit covariance, or unit variances."""
        covariance = moments.scatter[0].double() / max(1, moments.count - 1)
        if not self.whiten:
            covariance = torch.diag(covariance.diagonal())
        ridge = self.epsilon * float(covariance.diagonal().mean()) or 1.0  # 1 where all patches are equal
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        factor = torch.linalg.cholesky(covariance + ridge * identity)
        return torch.linalg.solve_triangular(factor, identity, upper=False).float()

    def _descend(self, source: ImageSource, sampled: int, rng: np.random.Generator, runtime: Runtime) -> None:
        """Go on from the exact machine of the sample, by gradient descent over all patches."""
        # The sample's machine, projected onto the Nystroem space of some of its support vectors, is the start.
        chosen = np.sort(rng.choice(len(self.centres_), min(len(self.centres_), self.centres), replace=False))
        space = Nystroem(self.centres_[torch.from_numpy(chosen).to(runtime.device)], self._gamma(self.centres_))
        start = space.root.T @ (self.weights_ @ space.kernels(self.centres_))
        descent = AveragedDescent(space, start, self.rho_, self.nu, steps=sampled // _PATCHES_A_STEP)
        for epoch in range(self.epochs):
            for done, x in enumerate(self._shuffled(source, rng, runtime), start=epoch * len(source) + 1):
                for part in x.tensor_split(max(1, len(x) // _PATCHES_A_STEP)):
                    descent.step(part)
                runtime.progress("fit ocsvm: descent", done, self.epochs * len(source))
        self.centres_, self.weights_, self.rho_ = space.centres, descent.weights(), descent.mean_rho

    def _shuffled(self, source: ImageSource, rng: np.random.Generator, runtime: Runtime) -> Iterator[Tensor]:
        """Whitened patches (p, c) of one image after the other, both in random order whatever the batches are."""
        for batch in source.batches(rng.permutation(len(source)).tolist()):
            for image in self._stack(batch, runtime).split(1):
                x = as_vectors(image)
                yield self._whitened(x[torch.from_numpy(rng.permutation(len(x))).to(x.device)])

    def _stack(self, batch: ImageBatch, runtime: Runtime) -> Tensor:
        features = on_device(batch, runtime.device)
        return stack_layers(features, self.layers, mode="bilinear", pool=self.neighbourhood)  # (n, c, h, w)

    def _whitened(self, x: Tensor) -> Tensor:
        return (x - self.mean_) @ self.whitening_.T  # (b, c)

    def _gamma(self, x: Tensor) -> float:
        return 1 / x.shape[1] if self.gamma is None else self.gamma
