"""Maps against masks, at the masks' own size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from al_models.calibration import false_alarms
from al_models.metrics import ImageCounts, PixelCounts, boundary_f
from al_models.parts.images import resize
from storage.samples import Sample
from storage.stacks import Stack
from storage.store import Artifact, Draft, Store
from tasks.evaluate.truth import Truths

_MARKED = 64
"""A pixel of a shrunken mask is marked from this share (of 255) on, so that thin defects stay visible."""


@dataclass(eq=False)
class CountedPixels:
    """The counts of the test images' pixels."""

    counts: PixelCounts
    """Over all images whose truth is known."""
    images: list[ImageCounts]
    """The counts by image, for the bootstrap: at most 0.4 MB an image, 15 kB as seen with maps of 256 x 256."""
    maxima: np.ndarray
    """float64 [n]: the largest value of each map, also where the truth is unknown."""
    alarms: dict[float, list[int]]
    """False alarms promised an image -> those seen in each good image; empty where the method promises none."""

    @staticmethod
    def nothing(promised: Sequence[float]) -> CountedPixels:
        """The counts before the first image."""
        return CountedPixels(PixelCounts(), [], np.zeros(0), {rate: [] for rate in promised})


def count_pixels(
    store: Store,
    truths: Truths,
    predicted: Artifact,
    samples: Sequence[Sample],
    promised: Sequence[float],
    draft: Draft,
    first: int = 0,
) -> CountedPixels:
    """The counts of one pass over masks and maps, whose rows begin with `first`; leaves the masks, at the maps' size,
    in `masks` of the draft for the report."""
    counted = CountedPixels.nothing(promised)
    if not samples:
        return counted
    maps = Stack.open(store, predicted, "maps")
    counted.maxima = np.zeros(len(samples))
    kept = store.create_array(f"{draft.folder}/masks", (len(samples), *maps.shape[1:]), "uint8", chunk=maps.chunk)
    masks = np.zeros((maps.chunk, *maps.shape[1:]), dtype=np.uint8)  # (n, h, w) of a chunk
    for row, (sample, scored) in enumerate(_with_maps(samples, maps, first)):
        place = row % maps.chunk
        masks[place] = 0
        counted.maxima[row] = scored.max()
        if sample.label == "good":
            for rate, seen in counted.alarms.items():
                seen.append(false_alarms(scored, rate))
        truth = truths.of(sample)
        if truth is None:
            counted.counts.exclude(sample.id)
        else:
            if truth.mask is not None:
                masks[place] = resize(truth.mask.astype(np.uint8) * 255, maps.shape[1]) >= _MARKED
            image = counted.counts.add(sample.id, scored, **truth.counted(), defect_type=sample.defect_type)
            counted.images.append(image)
        if place == maps.chunk - 1 or row == len(samples) - 1:
            kept[row - place : row + 1] = masks[: place + 1]
    return counted


def boundaries_at(
    thresholds: Mapping[str, float], store: Store, truths: Truths, predicted: Artifact, samples: Sequence[Sample]
) -> dict[str, dict[str, float]]:
    """Metric -> image id -> boundary F at the metric's threshold: a second pass, since the best threshold had to be
    known.

    Of images with a mask; one whose defect has no outline, since it covers the whole image, has none.
    """
    boundaries: dict[str, dict[str, float]] = {metric: {} for metric in thresholds}
    if not thresholds or not any(sample.mask for sample in samples):
        return boundaries
    maps = Stack.open(store, predicted, "maps")
    for sample, scored in _with_maps(samples, maps):
        truth = None if sample.mask is None else truths.of(sample)
        if truth is None or truth.mask is None:
            continue
        counted = boundary_f(sample.id, scored, truth.mask, list(thresholds.values()), valid=truth.valid)
        for metric, one in zip(thresholds, counted, strict=True):
            if one.true:
                boundaries[metric][sample.id] = one.metrics()["boundary_f"]
    return boundaries


def _with_maps(samples: Sequence[Sample], maps: Stack, first: int = 0) -> Iterator[tuple[Sample, np.ndarray]]:
    """Each sample with its map float16 (h, w), a chunk in memory at a time."""
    for start in range(0, len(samples), maps.chunk):
        chosen = samples[start : start + maps.chunk]
        yield from zip(chosen, maps.read(range(first + start, first + start + len(chosen))), strict=True)
