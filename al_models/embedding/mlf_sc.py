"""MLF-SC: Incorporating Multi-Layer Features to Sparse Coding for Anomaly Detection (Imamura, Arizumi and Mori 2021,
arXiv:2104.04289).

The idea: the channels of several layers, resized to one grid, are treated as images: each is standardised and cut into
overlapping patches. For each channel a small dictionary is learned with which good patches are expressed by few atoms
(sparse coding). A patch of an anomaly is expressed badly: the map is its squared reconstruction error.

Differs from the paper:
- The authors reach the common grid by feeding VGG-16 three sizes of the image. Here stored layers are averaged or
  interpolated to it.
- The authors show the error averaged over all channels. The map here is the mean over the 5 channels with the largest
  error at the pixel (the survey's description), averaged where patches overlap.
- Dictionaries are learned by scikit-learn with its least angle regression.
- Orthogonal matching pursuit is done for all channels and patches at once; scikit-learn goes patch by patch.

Kept from the authors' code (github.com/LeapMind/MLF-SC, its configuration for MVTec AD): a grid of 32 x 32 for 256 px;
patches of 8 x 8 with stride 2; 5 atoms, of which 3 are used for a patch; 2 positions cut off at each border; a
dictionary learned from 150 patches (there 50 steps of 3 patches); an image's score from the 5 worst patches of every
channel.

Shapes: n images, c channels, g = grid without border, m patches, d = patch * patch values, k atoms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sklearn.decomposition import MiniBatchDictionaryLearning
from torch import Tensor
from torch.nn import functional as F

from al_models.detector import Detector
from al_models.parameters import Layers, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.patches import channel_counts, on_device
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

_MINIBATCH = 32
_DEPENDENT = 1e-3  # an atom of which less than this is left, beside those taken, is rounding
_VALUES_AT_ONCE = 2**23  # 32 MiB of float32 patches coded at a time


def omp_residual(signals: Tensor, dictionary: Tensor, nonzeros: int) -> Tensor:
    """The residual of orthogonal matching pursuit: signals (c, m, d), atoms (c, k, d) of norm 1 or 0 -> (c, m, d).

    Each step takes the atom nearest to the residual in angle and projects it out (Pati et al. 1993), after making it
    orthogonal to those taken before (Gram-Schmidt); an atom of which next to nothing is left then is not used. All is
    computed on the k coefficients, of which there are far fewer than values (Batch-OMP, Rubinstein et al. 2008).
    """
    gram = dictionary @ dictionary.mT  # (c, k, k)
    correlation = signals @ dictionary.mT  # (c, m, k), of the residual with the atoms
    code = torch.zeros_like(correlation)
    taken: list[tuple[Tensor, Tensor]] = []
    for _ in range(min(nonzeros, dictionary.shape[1])):
        best = correlation.abs().argmax(2, keepdim=True)
        atom = torch.zeros_like(correlation).scatter_(2, best, 1.0)  # (c, m, k), as coefficients of the dictionary
        image = atom @ gram  # its correlation with the atoms
        for before, before_image in taken:
            share = (before_image * atom).sum(2, keepdim=True)
            atom, image = atom - share * before, image - share * before_image
        # Scaled to unit length, or dropped where it is a combination of the atoms taken before.
        length = (atom * image).sum(2, keepdim=True).clamp(min=0).sqrt()
        scale = torch.where(length > _DEPENDENT, 1 / length.clamp(min=_DEPENDENT), torch.zeros_like(length))
        atom, image = atom * scale, image * scale
        step = (correlation * atom).sum(2, keepdim=True)
        code, correlation = code + step * atom, correlation - step * image
        taken.append((atom, image))
    return torch.baddbmm(signals, code, dictionary, alpha=-1)


@dataclass(kw_only=True)
class MlfSc(Detector):
    """A dictionary for every channel of a feature pyramid."""

    traits: ClassVar[Traits] = Traits()
    quick: ClassVar[Mapping[str, object]] = {"layers": (2, 3), "grid": 16, "border": 1, "channels": 8, "patches": 60}

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (1, 2, 3)
    weights: str | None = None
    channels: PositiveInt | None = None
    """Size of a random subset of channels; None takes all, as the authors do."""
    grid: PositiveInt = 32
    """Side of the grid that all layers are brought to."""
    border: NonNegativeInt = 2
    """Positions of the grid that are cut at each side, where the network saw its padding."""
    patch: PositiveInt = 8
    """Side of a patch, in positions of the grid."""
    stride: PositiveInt = 2
    """Positions from one patch to the next."""
    atoms: PositiveInt = 5
    """Size of a dictionary."""
    nonzeros: PositiveInt = 3
    """Atoms that a patch is expressed by."""
    alpha: PositiveFloat = 1.0
    """Weight of the L1 norm while a dictionary is learned."""
    patches: PositiveInt = 150
    """Patches, of all good images together, that a dictionary learns from."""
    largest: PositiveInt = 5
    """Worst patches of a channel that make the score, and worst channels at a position that make the map."""
    sigma: NonNegativeFloat = SIGMA

    def feature_spec(self) -> FeatureSpec:
        """The layers whose channels are coded."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights)

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        sample = self._sample(source, runtime).double().cpu().numpy()  # (c, m, d)
        dictionaries = []
        for done, patches in enumerate(sample, start=1):
            dictionaries.append(self._learn(patches, runtime.seed))
            runtime.progress("fit mlf_sc: dictionaries", done, len(sample))
        self.dictionary_ = torch.from_numpy(np.stack(dictionaries)).float().contiguous()  # (c, k, d)

    def _learn(self, patches: np.ndarray, seed: int) -> np.ndarray:
        """Atoms (k, d) of unit norm for the patches (m, d) of one channel."""
        learner = MiniBatchDictionaryLearning(
            n_components=self.atoms,
            alpha=self.alpha,
            fit_algorithm="lars",  # coordinate descent, half the time, would draw from the global generator
            max_iter=1,  # one pass over the sample
            batch_size=_MINIBATCH,
            random_state=seed,
        )
        atoms = learner.fit(patches).components_
        return atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-12)

    def _sample(self, source: ImageSource, runtime: Runtime) -> Tensor:
        """Random patches (c, m, d), spread over the images, at the same places in all channels."""
        generator = torch.Generator().manual_seed(runtime.seed)
        quota, parts = -(-self.patches // len(source)), []
        for done, batch in enumerate(source, start=1):
            stacked = on_device(batch, runtime.device)
            if done == 1:  # the channels there are show with the first batch
                available = sum(stacked[layer].shape[1] for layer in self.layers)
                order = torch.randperm(available, generator=generator)
                self.channels_ = order[: min(self.channels or available, available)].sort().values
            for image in self._patches(self._maps(stacked)):  # (c, m, d)
                places = torch.randperm(image.shape[1], generator=generator)[:quota]
                parts.append(image[:, places.to(image.device)])
            runtime.progress("fit mlf_sc: patches", min(done * source.batch_size, len(source)), len(source))
        sample = torch.cat(parts, dim=1)
        return sample[:, torch.randperm(sample.shape[1], generator=generator)[: self.patches].to(sample.device)]

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        for name in ("dictionary_", "channels_"):
            setattr(self, name, getattr(self, name).to(runtime.device))
        stacked = self._maps(on_device(batch, runtime.device))
        side = (self.grid - 2 * self.border - self.patch) // self.stride + 1
        values = self.dictionary_.shape[0] * side**2 * self.patch**2
        coded = [self._errors(part) for part in stacked.split(max(1, _VALUES_AT_ONCE // values))]
        errors, scores = (torch.cat(parts) for parts in zip(*coded, strict=True))
        whole = F.pad(errors, (self.border,) * 4, mode="replicate")[:, 0]  # (n, grid, grid)
        maps = to_maps(whole, self.image_size, self.sigma, self._offset(channel_counts(batch.features, self.layers)))
        return Prediction(batch.ids, maps.cpu().numpy(), scores.cpu().numpy())

    def _errors(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (n, c, g, g) -> squared errors (n, 1, g, g) and scores (n,)."""
        patches = self._patches(stacked)
        n, c, m, d = patches.shape
        signals = patches.transpose(0, 1).reshape(c, n * m, d)
        squared = omp_residual(signals, self.dictionary_, self.nonzeros).square().view(c, n, m, d)
        worst = squared.sum(3).topk(min(self.largest, m), dim=2).values  # (c, n, largest)
        over_channels = squared.topk(min(self.largest, c), dim=0).values.mean(0).mT  # (n, d, m)
        side = stacked.shape[2]
        total, cover = (
            F.fold(x, side, self.patch, stride=self.stride) for x in (over_channels, torch.ones_like(over_channels))
        )
        return total / cover, worst.mean((0, 2))

    def _maps(self, features: Mapping[int, Tensor]) -> Tensor:
        """Layers (n, c_l, h_l, w_l) -> the channels kept, each standardised over the image: (n, c, g, g)."""
        layers = [_to_grid(features[layer].float(), self.grid) for layer in self.layers]
        stacked = torch.cat(layers, dim=1)[:, self.channels_.to(layers[0].device)]
        inner = slice(self.border, self.grid - self.border)
        stacked = stacked[:, :, inner, inner]
        deviation, mean = torch.std_mean(stacked, dim=(2, 3), keepdim=True)
        return (stacked - mean) / deviation.clamp(min=1e-6)

    def _patches(self, stacked: Tensor) -> Tensor:
        """(n, c, g, g) -> (n, c, m, d), row by row."""
        windows = stacked.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)
        return windows.reshape(*stacked.shape[:2], -1, self.patch**2)

    def conflict(self) -> str | None:
        """As Detector."""
        if self.nonzeros > self.atoms:
            return f"nonzeros={self.nonzeros} of atoms={self.atoms}; give no more than there are atoms"
        inner = self.grid - 2 * self.border
        if inner < self.patch or (inner - self.patch) % self.stride:
            return (
                f"patch={self.patch} with stride={self.stride} does not cover grid={self.grid} without border="
                f"{self.border} ({inner} positions); choose them so that grid - 2 * border - patch is 0 or a multiple "
                "of the stride"
            )
        return None


def _to_grid(x: Tensor, grid: int) -> Tensor:
    """(n, c, h, w) -> (n, c, grid, grid): averaged when finer, interpolated when coarser."""
    if x.shape[2] >= grid:
        return F.adaptive_avg_pool2d(x, grid)
    return F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
