"""Defects that hide among the good training images: which images have patches that no other image has.

Each patch is compared with a bank of patches of the other images, as PatchCore scores a test image; that noise shows by
its distance to the rest of the training set is the premise of SoftPatch (Jiang et al. 2022, arXiv:2403.14233). An
image's own patches do not count, nor do those of other images of the same physical part: a defect would find itself
there. The distance is divided by what is typical of its position, since features differ more along the border of an
image than at most defects. An image is as unlike as its few most unlike patches, and suspected when that is far above
the median of all images, in robust standard deviations.

The bank is a small sample on purpose: a defect that several images share is hardly in it, while normal patches are in
it many times.

Shapes: n images, r of them in the reference; feature maps (c, h, w) of p = h * w patches; b patches in the bank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from al_models.parts.patches import as_vectors
from al_models.types import ImageSource, Progress

FEWEST = 8
"""Images from which on a robust deviation means something: one of 8 is beyond 5 in 3 % of normally distributed sets."""

_REFERENCE = 512
"""Images, at most, from which the bank and the typical distances come."""
_BANK = 4096
_TOP = 0.01
"""Share of an image's patches that its score is the mean of."""
_COARSEST_STRIDE = 16
_FEWEST_A_SIDE = 8
_LEAST_TYPICAL = 0.5
"""Least usual distance of a position, as a share of the median over positions: else the noise of a plain background
would weigh as much as the product."""
_ROUNDING = 1e-3
"""Differences that half precision cannot tell, as a share of a patch's length."""
_HIGHEST = 6e4
"""Highest value of a map: half precision holds no more."""
_LEAST_SPREAD = 0.01
"""Least spread, as a share of a typical distance, for images that are all alike."""


@dataclass(frozen=True)
class Unlikeness:
    """How unlike the others each image is, in the order of the source."""

    scores: np.ndarray
    """float64 (n,): distance of its most unlike patches; 1 is typical of their positions."""
    deviations: np.ndarray
    """float64 (n,): of the scores from their median, in robust standard deviations; 0 for fewer than `FEWEST`."""
    places: np.ndarray
    """float64 (n, 2): x, y of the centre of the most unlike patch, as fractions of the image's width and height."""
    maps: np.ndarray
    """float16 (n, h, w): distance of each patch; 1 is typical of its position."""


def layer_to_compare(shapes: Mapping[int, Sequence[int]], image_size: int) -> int:
    """The deepest layer in which a small defect still fills a patch: stride 16 or less, 8 x 8 patches or more.

    `shapes` is layer -> (n, c, h, w). Where no layer is as fine, it is the finest.
    """
    side = {layer: min(shape[-2:]) for layer, shape in shapes.items()}
    fine = [layer for layer in side if side[layer] >= max(_FEWEST_A_SIDE, image_size // _COARSEST_STRIDE)]
    return max(fine) if fine else max(side, key=lambda layer: (side[layer], layer))


def unlikeness(
    source: ImageSource,
    layer: int,
    parts: Sequence[str],
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = lambda what, done, of: None,
) -> Unlikeness:
    """The unlikeness of each image, by one layer of its features; `parts` names the physical part that each shows.

    Up to 512 images, drawn by their ids, are read twice, the others once; a batch of them is in memory at a time.
    Neither the draw nor the result depends on the order of the images.
    """
    n = len(source)
    reference = sorted(sorted(range(n), key=lambda row: _hashed(source.ids[row], seed))[:_REFERENCE])
    rest = sorted(set(range(n)) - set(reference))
    bank = _Bank.gather(source, reference, layer, parts, seed, device)
    known = []
    for row, maps in _maps(source, reference, layer, device):
        known.append(bank.distances(maps, parts[row]))
        progress("compare", len(known), n)
    typical = bank.typical(torch.stack(known))  # (h, w)

    scores, places, unlike = np.zeros(n), np.zeros((n, 2)), np.zeros((n, *typical.shape), np.float16)

    def keep(row: int, relative: Tensor) -> None:
        scores[row], places[row] = _summary(relative)
        unlike[row] = relative.clamp_max(_HIGHEST).cpu().numpy()

    for row, distances in zip(reference, known, strict=True):
        keep(row, distances / typical)
    for done, (row, maps) in enumerate(_maps(source, rest, layer, device), start=len(reference) + 1):
        keep(row, bank.distances(maps, parts[row]) / typical)
        progress("compare", done, n)
    return Unlikeness(scores, robust_deviations(scores), places, unlike)


def robust_deviations(scores: np.ndarray) -> np.ndarray:
    """Distances (n,) from the median, in standard deviations as the median absolute deviation estimates them."""
    if len(scores) < FEWEST:
        return np.zeros(len(scores))
    shifts = scores - np.median(scores)
    return shifts / max(1.4826 * float(np.median(np.abs(shifts))), _LEAST_SPREAD)


@dataclass(frozen=True)
class _Bank:
    """Patches of the reference images, those of a part next to each other."""

    vectors: Tensor  # (b, c)
    squares: Tensor  # (b, 1)
    own: Mapping[str, tuple[int, int]]
    """Part -> first row of its patches, and the row after its last."""

    @staticmethod
    def gather(
        source: ImageSource, rows: Sequence[int], layer: int, parts: Sequence[str], seed: int, device: str
    ) -> _Bank:
        """Some patches of each image of these rows, drawn by its id."""
        drawn: dict[int, Tensor] = {}
        for row, maps in _maps(source, rows, layer, device):
            patches = as_vectors(maps[None])  # (p, c)
            rng = np.random.default_rng(_hashed(source.ids[row], seed))
            chosen = rng.choice(len(patches), min(len(patches), max(1, _BANK // len(rows))), replace=False)
            drawn[row] = patches[torch.from_numpy(chosen).to(device)]
        own: dict[str, tuple[int, int]] = {}
        ordered = sorted(rows, key=lambda row: (parts[row], source.ids[row]))
        end = 0
        for row in ordered:
            begin, end = end, end + len(drawn[row])
            own[parts[row]] = (own.get(parts[row], (begin, end))[0], end)
        vectors = torch.cat([drawn[row] for row in ordered])
        return _Bank(vectors, vectors.square().sum(1, keepdim=True), own)

    def distances(self, maps: Tensor, part: str) -> Tensor:
        """Distances (h, w) of an image's patches (c, h, w) to the nearest of other parts; 0 where there are none."""
        first, end = self.own.get(part, (0, 0))
        if end - first == len(self.vectors):
            return maps.new_zeros(maps.shape[1:])
        patches = maps.flatten(1)  # (c, p)
        # The bank comes first: the minimum over rows costs a twentieth of that along them. With all of an image's
        # patches at once the distances, 4 MB for 256 patches, stay in the processor's cache.
        squared = torch.addmm(self.squares, self.vectors, patches, alpha=-2)  # (b, p), short of the patches' own
        squared[first:end] = torch.inf
        return (squared.amin(0) + patches.square().sum(0)).clamp_min(0).sqrt().reshape(maps.shape[1:])

    def typical(self, distances: Tensor) -> Tensor:
        """The typical distance at each position, above 0: distances of the reference (r, h, w) -> (h, w)."""
        middle = distances.median(0).values
        rounding = _ROUNDING * max(float(self.squares.mean()) ** 0.5, _ROUNDING)
        return middle.clamp_min(max(_LEAST_TYPICAL * float(middle.median()), rounding))


def _maps(source: ImageSource, rows: Sequence[int], layer: int, device: str) -> Iterator[tuple[int, Tensor]]:
    """Row and float32 (c, h, w) of each image, read a batch at a time."""
    maps = (one for batch in source.batches(rows) for one in batch.features[layer].to(device).float())
    yield from zip(rows, maps, strict=True)


def _summary(unlike: Tensor) -> tuple[float, tuple[float, float]]:
    """Mean of the highest of an image's relative distances (h, w), and x, y of the very highest."""
    h, w = unlike.shape
    top = unlike.flatten().topk(math.ceil(_TOP * h * w))
    row, column = divmod(int(top.indices[0]), w)
    return float(top.values.mean()), ((column + 0.5) / w, (row + 0.5) / h)


def _hashed(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")
