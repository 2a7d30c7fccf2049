"""Pictures of a cell: which images to show, the defect's outline, the heat-map; points of the curves and histograms."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr
from PIL import Image, ImageDraw

from storage.errors import StorageError
from storage.records import RunRecord
from storage.store import Artifact, Store

# Inferno-like: lightness rises evenly from black to pale yellow, so more anomalous is lighter, also in grey print.
HEAT = ((0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
        (249, 201, 50), (252, 255, 164))  # fmt: skip
OUTLINE = (0, 229, 255)
"""The annotated defect: a hue the heat colours do not have."""
FLAGGED = (255, 255, 255)
"""What the method flags: map above the pixel threshold."""
_MEDIAN_OVER = 32
_CURVE_POINTS = 160
_BINS = 24
_INSPECTED = 50
CURVES = {"image_roc": "image ROC", "pixel_roc": "pixel ROC", "pixel_pr": "pixel precision-recall", "pro": "PRO"}


@dataclass(frozen=True)
class Scale:
    """Map values at the two ends of a cell's heat colours; the same for all its pictures."""

    low: float
    high: float
    threshold: float | None
    words: str
    """Where the two ends come from."""


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
    has_outline: bool

    @property
    def picture_url(self) -> str:
        """The image for an `src`."""
        return data_url(self.picture)

    @property
    def heat_url(self) -> str:
        """The heat-map for an `src`."""
        return data_url(self.heat)


@dataclass(frozen=True)
class Gallery:
    """The pictures of a cell, or why there are none."""

    examples: list[Example]
    scale: Scale | None
    missing: str | None = None


@dataclass(frozen=True)
class Histogram:
    """Image scores: edges of the bins, and the count in each for every label that occurs."""

    edges: list[float]
    counts: dict[str, list[int]]
    highest: int
    threshold: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` left of a cell, as far as it is there."""

    rows: list[dict[str, Any]]
    curves: dict[str, list[tuple[float, float]]]
    histogram: Histogram | None
    groups: dict[str, dict[str, dict[str, float]]]
    """`defect_type` and `size` -> group -> metrics."""


def artifact(store: Store, record: RunRecord, step: str) -> Artifact | None:
    """The output of a step of a cell, or None when the cell did not come so far or the output is gone."""
    key = record.keys.get(step)
    return None if key is None else store.find(key)


def read_evaluation(store: Store, record: RunRecord) -> Evaluation:
    """Lines, curves and histogram; what is absent is empty."""
    found = artifact(store, record, "evaluation")
    if found is None:
        return Evaluation([], {}, None, {})
    rows = _rows(store, found)
    histogram = _histogram(rows, image_threshold(record))
    return Evaluation(rows, _curves(store, found), histogram, _read_json(store, found, "groups.json"))


def image_threshold(record: RunRecord) -> float | None:
    """The calibrated score above which an image is rejected."""
    return (record.calibration.get("image") or {}).get("value")


def pixel_threshold(record: RunRecord) -> float | None:
    """The calibrated map value above which a pixel is flagged."""
    return (record.calibration.get("pixel") or {}).get("value")


def inspected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images of unknown label, the most anomalous first; at most 50."""
    unknown = [row for row in rows if row["label"] == "unknown" and row["score"] is not None]
    return sorted(unknown, key=lambda row: -row["score"])[:_INSPECTED]


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


def read_gallery(store: Store, record: RunRecord, rows: Sequence[dict[str, Any]], side: int = 256) -> Gallery:
    """Pictures of a cell, at most `side` pixels wide; a damaged or absent output is a sentence, never an error."""
    try:
        images = _open(store, artifact(store, record, "images"), "images")
        maps = _open(store, artifact(store, record, "maps"), "maps")
        masks = _open(store, artifact(store, record, "evaluation"), "masks")
        absent = [name for name, found in (("images", images), ("maps", maps), ("evaluation", rows)) if not found]
        if images is None or maps is None or not rows:
            return Gallery([], None, f"No pictures: this cell left no {', no '.join(absent)}.")
        rows = [row for row in rows if row["id"] in images.position and row["id"] in maps.position]
        scale = _scale(maps, rows, pixel_threshold(record))
        examples = [
            _example(role, row, images.of(row["id"]), maps.of(row["id"]), _mask(masks, row["id"]), scale, side)
            for role, row in choose(rows)
        ]
        return Gallery(examples, scale, None if examples else "No pictures: no image was predicted.")
    # zarr's codecs raise RuntimeError for bytes that do not decompress
    except (StorageError, OSError, KeyError, ValueError, RuntimeError) as error:
        return Gallery([], None, f"No pictures: the stored outputs could not be read ({error}).")


@dataclass(frozen=True)
class _Stack:
    """A stored array with one entry an image."""

    array: Any
    position: dict[str, int]

    def of(self, image_id: str) -> np.ndarray:
        return np.asarray(self.array[self.position[image_id]])


def _open(store: Store, found: Artifact | None, name: str) -> _Stack | None:
    if found is None:
        return None
    try:
        array = zarr.open_array(store.zarr_store(f"{found.folder}/{name}"), mode="r")
    except FileNotFoundError:
        return None
    return _Stack(array, {image_id: place for place, image_id in enumerate(found.meta["ids"])})


def _mask(masks: _Stack | None, image_id: str) -> np.ndarray | None:
    return None if masks is None or image_id not in masks.position else masks.of(image_id)


def _example(
    role: str,
    row: dict[str, Any],
    pixels: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray | None,
    scale: Scale,
    side: int,
) -> Example:
    height, width = pixels.shape[:2]
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    inside = None if mask is None or not mask.any() else _nearest(mask, (width, height))
    thickness = max(1, math.ceil(1.5 * max(height, width) / side))
    picture, heat = _rgb(pixels), overlay(pixels, values, scale)
    if scale.threshold is not None:
        heat[contour(values > scale.threshold, max(1, thickness // 2))] = FLAGGED
    if inside is not None:
        picture[contour(inside, thickness)] = OUTLINE
        heat[contour(inside, thickness)] = OUTLINE
    return Example(role, row, _shrunk(picture, side), _shrunk(heat, side), inside is not None)


def _scale(maps: _Stack, rows: Sequence[dict[str, Any]], threshold: float | None) -> Scale:
    """From what good looks like to as far beyond the threshold as the threshold is beyond good."""
    if not rows:
        return Scale(0.0, 1.0, threshold, "no image")
    good = [row for row in rows if row["label"] == "good"]
    whose = "good test images" if good else "the images"
    sample = (good or rows)[:: max(1, len(good or rows) // _MEDIAN_OVER)]
    low = float(np.median(np.stack([maps.of(row["id"]).astype(np.float32) for row in sample])))
    if threshold is not None and threshold > low:
        high = 2 * threshold - low
        words = f"from {low:.3g} (the median over {whose}) to {high:.3g} (twice as far from it as the pixel threshold"
        return Scale(low, high, threshold, f"{words}, {threshold:.3g})")
    high = max(float(maps.of(row["id"]).max()) for _, row in choose(rows))
    high = high if high > low else low + 1.0
    why = "there is no pixel threshold" if threshold is None else f"the pixel threshold, {threshold:.3g}, is lower"
    words = f"from {low:.3g} (the median over {whose}) to {high:.3g} (the largest value shown; {why})"
    return Scale(low, high, threshold, words)


def heat_colours(strength: np.ndarray) -> np.ndarray:
    """Colours of 0..1: (h, w) -> float32 (h, w, 3) in 0..255."""
    anchors = np.linspace(0.0, 1.0, len(HEAT))
    channels = [np.interp(strength, anchors, [colour[c] for colour in HEAT]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)  # (h, w, 3)


def overlay(pixels: np.ndarray, values: np.ndarray, scale: Scale) -> np.ndarray:
    """The heat-map over the grey image: uint8 (h, w, c), float (h, w) -> uint8 (h, w, 3).

    The part stays visible: the colours cover it by half where nothing is wrong and by three quarters at most.
    """
    strength = np.clip((values - scale.low) / (scale.high - scale.low), 0.0, 1.0)  # (h, w)
    grey = _rgb(pixels).mean(axis=-1, keepdims=True)  # (h, w, 1)
    cover = 0.5 + 0.25 * strength[..., None]
    return np.rint((1 - cover) * grey + cover * heat_colours(strength)).astype(np.uint8)


def contour(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels just outside a mask, so that the line hides nothing of the defect: bool (h, w)."""
    inside = mask.astype(bool)
    grown = inside
    for _ in range(thickness):
        padded = np.pad(grown, 1)
        grown = grown | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~inside


def _rgb(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels.copy()


def _nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    resized = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(resized).astype(bool)


def _shrunk(pixels: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def data_url(picture: Image.Image, quality: int = 80) -> str:
    """A picture as a JPEG inside the page; colour is not subsampled, which would blur the thin lines."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def sample_picture(store: Store, record: RunRecord) -> bytes:
    """PNG of a cell's examples side by side, images above and heat-maps below, or of a sentence when there are none."""
    gallery = read_gallery(store, record, read_evaluation(store, record).rows)
    if not gallery.examples:
        strip = Image.new("RGB", (640, 40), "white")
        ImageDraw.Draw(strip).text((8, 12), gallery.missing or "No image to show.", fill="black")
        return _png(strip)
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
    return _png(strip)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _rows(store: Store, found: Artifact) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(io.BytesIO(store.read_bytes(f"{found.folder}/images.parquet")))
    except StorageError:
        return []
    return [{name: _none_if_nan(value) for name, value in row.items()} for row in table.to_pylist()]


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _curves(store: Store, found: Artifact) -> dict[str, list[tuple[float, float]]]:
    given = _read_json(store, found, "curves.json")
    return {name: _thinned(given[name]["x"], given[name]["y"]) for name in CURVES if given.get(name, {}).get("x")}


def _read_json(store: Store, found: Artifact, name: str) -> dict[str, Any]:
    """Empty when it is not there."""
    try:
        read: dict[str, Any] = json.loads(store.read_bytes(f"{found.folder}/{name}"))
    except StorageError:
        return {}
    return read


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Few points, evenly along the line's length, so that steep and flat parts are drawn equally well."""
    points = np.stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)], axis=1)  # (n, 2)
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    wanted = np.searchsorted(length, np.linspace(0.0, length[-1], _CURVE_POINTS))
    kept = np.unique(np.concatenate([[0], np.minimum(wanted, len(points) - 1), [len(points) - 1]]))
    return [(round(a, 4), round(b, 4)) for a, b in points[kept].tolist()]


def _histogram(rows: Sequence[dict[str, Any]], threshold: float | None) -> Histogram | None:
    scores = {
        label: [row["score"] for row in rows if row["label"] == label and row["score"] is not None]
        for label in ("good", "anomalous", "unknown")
    }
    every = [score for values in scores.values() for score in values]
    if not every:
        return None
    low, high = min(every), max(every)
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    counts = {label: np.histogram(values, edges)[0].tolist() for label, values in scores.items() if values}
    return Histogram(edges.tolist(), counts, max(max(c) for c in counts.values()), threshold)
