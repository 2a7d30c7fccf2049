"""PatchCore: Towards Total Recall in Industrial Anomaly Detection (Roth et al. 2022, arXiv:2106.08265).

The idea: the features of middle layers, each position averaged with its neighbours, are the patches of an image. The
patches of all good images make a memory bank, which a greedy coreset reduces to a share of them. A patch is as
anomalous as its distance to the nearest patch of the bank. An image's score is that of its most distant patch, weighted
higher when the patch's nearest neighbour is itself rare in the bank (eq. 7).

Differs from the paper:
- Layers are stacked without pooling each to 1024 values, since the offline backbone has far fewer channels.
- The greedy coreset is exact (`parts/coreset.py`). The random projection that the paper needs to make it affordable is
  off unless `projection` asks for it.
- The distances in eq. 7's softmax are brought to the scale of the paper's features (`parts/patches.py`, RECTIFIED).
- The paper's centre crop of the images is left out, so that the whole image is judged.

Shapes: n images, p = h * w patches an image, c channels, m patches in the bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor

from al_models.detector import Detector
from al_models.parameters import Layers, NonNegativeFloat, PositiveInt
from al_models.parts.coreset import greedy_coreset
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.neighbors import ApproximateIndex, nearest
from al_models.parts.patches import as_vectors, channel_counts, on_device, patch_vectors, stack_layers, unit_of
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

_PATCHES_AT_ONCE = 2**16
_RECALL_QUERIES = 4096


@dataclass(kw_only=True)
class Patchcore(Detector):
    """A memory of patches, thinned to a coreset."""

    traits: ClassVar[Traits] = Traits(graph=True)
    quick: ClassVar[Mapping[str, object]] = {"coreset_ratio": 0.02}

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (2, 3)
    weights: str | None = None
    neighbourhood: PositiveInt = 3
    """Side of the square of neighbours that a patch is averaged with."""
    coreset_ratio: Annotated[float, Gt(0), Le(1)] = 0.1
    """Share of the patches that the bank keeps (the paper reports 0.25, 0.1 and 0.01)."""
    projection: PositiveInt | None = None
    """Dimensions of the random projection that the coreset is chosen in (the paper: 128 of 1024); None: none."""
    neighbours: PositiveInt = 9
    """b of eq. 7: neighbours that weigh the image's score."""
    index: str | None = None
    """faiss factory string of an approximate index, such as "IVF256,Flat"; None searches the whole bank exactly."""
    sigma: NonNegativeFloat = SIGMA

    _index = None  # follows from the bank; made at the first prediction

    def feature_spec(self) -> FeatureSpec:
        """The middle layers."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights)

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        patches = patch_vectors(source, self.layers, pool=self.neighbourhood, device=runtime.device)  # (n*p, c)
        generator = torch.Generator().manual_seed(runtime.seed)
        first = int(torch.randint(len(patches), (1,), generator=generator))
        count = max(1, round(self.coreset_ratio * len(patches)))
        rows = greedy_coreset(
            self._projected(patches, generator),
            count,
            first=first,
            progress=lambda done, of: runtime.progress("fit patchcore: coreset", done, of),
        )
        self.bank_ = patches[rows.to(patches.device)].float().to(runtime.device)  # (m, c)
        # The scale of distances (eq. 7), and each layer's share of them, which says where the map lies.
        variances = _variances(patches)
        self.unit_ = unit_of(variances).float()
        counts = channel_counts(source.read([0]).features, self.layers)
        self.shares_ = torch.stack([part.sum() for part in variances.split(list(counts.values()))])  # (layers,)
        self._index = None
        # How good the approximate index is, on patches that need not be in the bank.
        if self.index is not None:
            sample = torch.randperm(len(patches), generator=generator)[:_RECALL_QUERIES]
            self.recall_ = torch.tensor(self._approximate(self.index).recall(patches[sample.to(patches.device)]))

    def facts(self) -> dict[str, float]:
        """Patches in the bank; and with an index its recall, measured on training patches."""
        recall = {"index_recall": float(self.recall_)} if self.index is not None else {}
        return {"bank": float(len(self.bank_)), **recall}

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        self.bank_, self.unit_ = self.bank_.to(runtime.device), self.unit_.to(runtime.device)
        maps, scores = self.tensors(ImageBatch(batch.ids, features=on_device(batch, runtime.device)))
        return Prediction(batch.ids, maps.cpu().numpy(), scores.cpu().numpy())

    def tensors(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Maps (n, size, size) and re-weighted scores (n,)."""
        stacked = stack_layers(batch.features, self.layers, mode="bilinear", pool=self.neighbourhood)  # (n, c, h, w)
        n, (h, w) = stacked.shape[0], stacked.shape[2:]
        patches = as_vectors(stacked)
        search = partial(nearest, bank=self.bank_) if self.index is None else self._approximate(self.index).nearest
        distances, rows = (found.view(n, h * w) for found in search(patches))
        scores = self._image_scores(patches.view(n, h * w, -1), distances, rows)
        offset = self._offset(dict(zip(self.layers, self.shares_.tolist(), strict=True)))
        return to_maps(distances.view(n, h, w), self.image_size, self.sigma, offset), scores

    def no_graph(self) -> str | None:
        """As Detector: the exact search of the bank is a graph, an approximate index, which faiss searches, is not."""
        return super().no_graph() if self.index is None else f"searches an index of faiss (index={self.index!r})"

    def _image_scores(self, patches: Tensor, distances: Tensor, rows: Tensor) -> Tensor:
        """The farthest patch's distance, times 1 - softmax over the neighbours of its nearest neighbour (eq. 7)."""
        score, at = distances.max(1)  # (n,)
        images = torch.arange(score.shape[0], device=score.device)
        _, around = nearest(self.bank_[rows[images, at]], self.bank_, min(self.neighbours, len(self.bank_)))  # (n, b)
        spread = (patches[images, at][:, None] - self.bank_[around]).norm(dim=2)  # (n, b)
        # The softmax is of distances at the scale of the papers' features.
        return score * (1 - torch.softmax(spread / self.unit_, dim=1)[:, 0]) if spread.shape[1] > 1 else score

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take back what `state` gave."""
        self._index = None
        return super().load_state(state)

    def _approximate(self, factory: str) -> ApproximateIndex:
        if self._index is None:
            self._index = ApproximateIndex(self.bank_, factory)
        return self._index

    def _projected(self, patches: Tensor, generator: torch.Generator) -> Tensor:
        """Patches (m, c) after the random projection (Johnson and Lindenstrauss 1984), or as they are without one."""
        if self.projection is None or self.projection >= patches.shape[1]:
            return patches
        matrix = torch.randn(patches.shape[1], self.projection, generator=generator) / self.projection**0.5
        matrix = matrix.to(patches.device)
        return torch.cat([part.float() @ matrix for part in patches.split(_PATCHES_AT_ONCE)])


def _variances(patches: Tensor) -> Tensor:
    """Variance of each channel over all patches (m, c), of which there may be more than fit in memory: float64 (c,)."""
    sums = patches.new_zeros(2, patches.shape[1], dtype=torch.float64)  # of values and of squares
    for part in patches.split(_PATCHES_AT_ONCE):
        x = part.double()
        sums += torch.stack([x.sum(0), x.square().sum(0)])
    mean, squares = sums / len(patches)
    return (squares - mean.square()).clamp(min=0)
