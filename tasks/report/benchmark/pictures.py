"""Pictures of a cell: which images to show, the defect's outline, the heat-map, and what its values mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from al_models.calibration import HeldOutPixels, log10_p_map
from storage.errors import NotInStore, StorageError
from storage.records import RunRecord
from storage.stacks import Stack
from storage.store import Artifact, Store
from tasks.core.heat import FLAGGED, OUTLINE, Scale, contour, data_url, nearest, overlay, rgb, shrunk
from tasks.report.benchmark.evaluation import artifact, pixel_threshold, read_evaluation

_MEDIAN_OVER = 32


@dataclass(frozen=True)
class Example:
    """An image chosen to be shown."""

    role: str
    """Why it was chosen, such as `worst anomalous`."""
    row: dict[str, Any]
    """Its line of `images.parquet`."""
    picture: Image.Image
    """The image, the annotated defect outlined."""
    heat: Image.Image
    """The heat-map over the image."""
    evidence: Image.Image | None
    """The map as -log10 p, whose colours mean the same in every cell; None without held-out images."""
    has_outline: bool

    @property
    def picture_url(self) -> str:
        """The image for an `src`."""
        return data_url(self.picture)

    @property
    def heat_url(self) -> str:
        """The heat-map for an `src`."""
        return data_url(self.heat)

    @property
    def evidence_url(self) -> str | None:
        """The map of -log10 p for an `src`, or None."""
        return None if self.evidence is None else data_url(self.evidence)


@dataclass(frozen=True)
class Gallery:
    """The pictures of a cell, or why there are none."""

    examples: list[Example]
    scale: Scale | None
    missing: str | None = None
    """Why there are no pictures."""
    n_held_out: int = 0
    """Held-out images behind the maps of -log10 p."""
    no_evidence: str | None = None
    """Why there are no maps of -log10 p."""


def choose(rows: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Roles and lines to show: best, median and worst anomalous image, the good image with the highest score.

    Judged by average precision within the image; by score where no mask is known. Images nobody labelled stand in
    where there are no anomalous ones.
    """
    anomalous = [row for row in rows if row["label"] == "anomalous"]
    with_mask = [row for row in anomalous if row.get("average_precision") is not None]
    if with_mask:
        picked = _spread(with_mask, "average_precision", "anomalous image, by average precision")
    elif anomalous:
        picked = _spread(anomalous, "score", "anomalous image, by score")
    else:
        unknown = [row for row in rows if row["label"] == "unknown"]
        picked = _spread(unknown, "score", "image to inspect, by score", ("Highest", "Median", "Lowest"))
    good = [row for row in rows if row["label"] == "good"]
    if good:
        picked.append(("Good image with the highest score", max(good, key=lambda row: (row["score"], row["id"]))))
    return picked


def _spread(
    rows: Sequence[dict[str, Any]], by: str, what: str, words: tuple[str, str, str] = ("Best", "Median", "Worst")
) -> list[tuple[str, dict[str, Any]]]:
    ordered = sorted(rows, key=lambda row: (-row[by], row["id"]))
    last = len(ordered) - 1
    places = dict.fromkeys([0, last, (last + 1) // 2] if ordered else [])  # fewer than three images: none twice
    chosen = [(f"{word} {what}", place) for word, place in zip((words[0], words[2], words[1]), places, strict=False)]
    return [(role, ordered[place]) for role, place in sorted(chosen, key=lambda pair: pair[1])]


def evidence_scale(records: Sequence[RunRecord]) -> Scale | None:
    """The scale from 0 to log10(n + 1), n: the most held-out images of any cell; None when no cell has any."""
    held_out = [(record.calibration.get("pixel") or {}).get("n") or 0 for record in records]
    most = max(held_out, default=0)
    return Scale(0.0, math.log10(most + 1), None, f"log10({most} + 1)") if most else None


def read_gallery(
    store: Store, record: RunRecord, rows: Sequence[dict[str, Any]], side: int = 256, evidence: Scale | None = None
) -> Gallery:
    """Pictures of a cell, at most `side` pixels wide; a damaged or absent output is a sentence, never an error.

    `evidence`: colours of the maps of -log10 p; without it there are none.
    """
    try:
        images = _open(store, artifact(store, record, "images"), "images")
        maps = _open(store, artifact(store, record, "maps"), "maps")
        masks = _open(store, artifact(store, record, "evaluation"), "masks")
        absent = [name for name, output in (("images", images), ("maps", maps), ("evaluation", rows)) if not output]
        if images is None or maps is None or not rows:
            return Gallery([], None, f"No pictures: this cell left no {', no '.join(absent)}.")
        rows = [row for row in rows if row["id"] in images.position and row["id"] in maps.position]
        scale = _scale(maps, rows, pixel_threshold(record))
        held_out, problem = (None, None) if evidence is None else _held_out(store, record)
        draw = _Drawing(scale, side, evidence, held_out)
        examples = [
            draw.example(role, row, images.of(row["id"]), maps.of(row["id"]), _mask(masks, row["id"]))
            for role, row in choose(rows)
        ]
        missing = None if examples else "No pictures: no image was predicted."
        return Gallery(examples, scale, missing, len(held_out.ids) if held_out else 0, problem)
    # zarr's codecs raise RuntimeError for bytes that do not decompress
    except (StorageError, OSError, KeyError, ValueError, RuntimeError) as error:
        return Gallery([], None, f"No pictures: the stored outputs could not be read ({error}).")


def _held_out(store: Store, record: RunRecord) -> tuple[HeldOutPixels | None, str | None]:
    """The map values of the cell's held-out images, or why there are none."""
    from tasks.calibrate import held_out_pixels  # loads torch, which the data page can do without

    if "calibration" not in record.keys:
        return None, "this cell left no calibration"
    try:
        pixels = held_out_pixels(store, record.keys["calibration"])
    except (StorageError, OSError, LookupError, ValueError) as error:  # Arrow's own errors are ValueErrors
        return None, f"the calibration could not be read ({error})"
    return (pixels, None) if pixels.ids else (None, "no good image was held out")


@dataclass(frozen=True)
class _ByImage:
    """A stored array whose rows are asked for by image."""

    stack: Stack
    position: dict[str, int]

    def of(self, image_id: str) -> np.ndarray:
        return self.all_of([image_id])[0]

    def all_of(self, image_ids: Sequence[str]) -> np.ndarray:
        """The pictures of these images in one reading: a stored chunk holds several."""
        return self.stack.read([self.position[image_id] for image_id in image_ids])


def _open(store: Store, output: Artifact | None, name: str) -> _ByImage | None:
    if output is None:
        return None
    try:
        stack = Stack.open(store, output, name)
    except NotInStore:
        return None
    return _ByImage(stack, {image_id: place for place, image_id in enumerate(output.meta["ids"])})


def _mask(masks: _ByImage | None, image_id: str) -> np.ndarray | None:
    return None if masks is None or image_id not in masks.position else masks.of(image_id)


@dataclass(frozen=True)
class _Drawing:
    """What the pictures of a cell have in common."""

    scale: Scale
    side: int
    evidence: Scale | None
    held_out: HeldOutPixels | None

    def example(
        self, role: str, row: dict[str, Any], pixels: np.ndarray, values: np.ndarray, mask: np.ndarray | None
    ) -> Example:
        """The pictures of one image: uint8 (h, w, c), map and mask of any size."""
        height, width = pixels.shape[:2]
        inside = None if mask is None or not mask.any() else nearest(mask, (width, height))
        thickness = max(1, math.ceil(1.5 * max(height, width) / self.side))
        resized = _resized(values, (width, height))
        picture, heat, evidence = rgb(pixels), overlay(pixels, resized, self.scale), self._evidence(pixels, values)
        if self.scale.threshold is not None:
            heat[contour(resized > self.scale.threshold, max(1, thickness // 2))] = FLAGGED
        drawn = [one for one in (picture, heat, evidence) if one is not None]
        if inside is not None:
            for one in drawn:
                one[contour(inside, thickness)] = OUTLINE
        small = [shrunk(one, self.side) for one in drawn]
        return Example(role, row, small[0], small[1], small[2] if evidence is not None else None, inside is not None)

    def _evidence(self, pixels: np.ndarray, values: np.ndarray) -> np.ndarray | None:
        """The map as -log10 p over the image; at the map's own size, in which the held-out values were counted."""
        if self.evidence is None or self.held_out is None:
            return None
        p_map = log10_p_map(values, self.held_out, "image")
        return overlay(pixels, _resized(p_map, (pixels.shape[1], pixels.shape[0])), self.evidence)


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def _scale(maps: _ByImage, rows: Sequence[dict[str, Any]], threshold: float | None) -> Scale:
    """The scale from what good looks like to as far beyond the threshold as the threshold is beyond good."""
    if not rows:
        return Scale(0.0, 1.0, threshold, "no image")
    good = [row for row in rows if row["label"] == "good"]
    whose = "good test images" if good else "the images"
    sample = (good or rows)[:: max(1, len(good or rows) // _MEDIAN_OVER)]
    low = float(np.median(maps.all_of([row["id"] for row in sample]).astype(np.float32)))
    if threshold is not None and threshold > low:
        high = 2 * threshold - low
        words = f"from {low:.3g} (the median over {whose}) to {high:.3g} (twice as far from it as the pixel threshold"
        return Scale(low, high, threshold, f"{words}, {threshold:.3g})")
    high = float(maps.all_of([row["id"] for _, row in choose(rows)]).max())
    high = high if high > low else low + 1.0
    why = "there is no pixel threshold" if threshold is None else f"the pixel threshold, {threshold:.3g}, is lower"
    words = f"from {low:.3g} (the median over {whose}) to {high:.3g} (the largest value shown; {why})"
    return Scale(low, high, threshold, words)


def sample_picture(store: Store, record: RunRecord) -> Image.Image:
    """A cell's examples side by side, images above and heat-maps below, or a sentence when there are none."""
    gallery = read_gallery(store, record, read_evaluation(store, record).rows)
    if not gallery.examples:
        strip = Image.new("RGB", (640, 40), "white")
        ImageDraw.Draw(strip).text((8, 12), gallery.missing or "No image to show.", fill="black")
        return strip
    width = max(max(example.picture.size) for example in gallery.examples)
    label, gap = 34, 6
    strip = Image.new("RGB", (len(gallery.examples) * (width + gap) - gap, 2 * width + gap + label), "white")
    draw = ImageDraw.Draw(strip)
    for column, example in enumerate(gallery.examples):
        left = column * (width + gap)
        draw.text((left + 2, 2), example.role.split(", by")[0].split(" with the")[0], fill="black")
        words = f"{example.row['defect_type']}, score {example.row['score']:.4g}, {example.row['decision']}"
        draw.text((left + 2, 17), words, fill="black")
        strip.paste(example.picture, (left, label))
        strip.paste(example.heat, (left, label + width + gap))
    return strip
