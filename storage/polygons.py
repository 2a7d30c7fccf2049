"""Masks drawn from outlines: LabelMe's JSON (one image a file) and COCO's (all images in one).

Coordinates are (x, y) in pixels from the outer upper left corner of the image, as both formats have them: pixel
(column, row) is the square from (column, row) to (column + 1, row + 1), and it is anomalous when its centre lies inside
of a shape (even-odd, for outlines that cross themselves). So a rectangle between whole numbers covers width x height
pixels, and shapes that share an edge share no pixel. Whatever the label or category: every shape marks an anomaly.

Pillow's `ImageDraw.polygon` is not used: it cuts coordinates down to whole numbers and paints the outline too, which
makes a 4x3 rectangle 5x4. LabelMe's own export does the same (wkentaro/labelme, `labelme/utils/shape.py`); COCO's
`rleFrPoly` (cocodataset/cocoapi, `common/maskApi.c`) samples pixel centres like this module, on outlines rounded to a
fifth of a pixel. A COCO run-length code counts pixels column by column, alternately without and with the object; all
shapes here become such runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from storage.errors import MaskError
from storage.files import MAX_PIXELS

_MAX_BYTES = 128 * 2**20
_MAX_VALUES = 5_000_000
"""Numbers and other values in a file: what JSON takes in memory is a multiple of its bytes."""
_MAX_RUNS = 5_000_000
"""Runs of pixels in one mask."""
_FAR = 1e9
"""A coordinate beyond it is none; below it, no computation overflows."""

Runs = tuple[np.ndarray, np.ndarray]
"""First pixels and ends of runs, int64 [n] each; pixels are counted column by column."""


def draw_polygons(data: bytes, kind: str, image: str = "") -> np.ndarray:
    """The pixels within the shapes of a `labelme` or `coco` file, bool (h, w).

    A COCO file is asked for `image`: a file name, or a path of which the file may know only the end (or the reverse);
    without annotations its mask is empty. Raises MaskError for anything that cannot be drawn exactly.
    """
    if kind == "labelme":
        document = _parsed(data)
        width, height = _size(document, "imageWidth", "imageHeight", "the file")
        return _painted(_labelme_runs(document, width, height), width, height)
    entry, annotations = _coco_entry(data, image)
    width, height = _size(entry, "width", "height", f"image {image!r}")
    return _painted(_coco_runs(annotations, width, height), width, height)


def _labelme_runs(document: Any, width: int, height: int) -> Iterator[Runs]:
    for number, shape in enumerate(_items(document, "shapes", "the file")):
        where = f"shape {number}"
        kind = shape.get("shape_type") or "polygon"  # files of old versions do not say
        points = _points(shape.get("points"), where)
        if kind == "circle" and len(points) == 2:  # centre, a point on the circle
            yield _circle(points, width, height)
        elif kind == "rectangle" and len(points) == 2:  # two opposite corners
            (x0, y0), (x1, y1) = points
            yield _polygon(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), width, height)
        elif kind in ("polygon", "rectangle") and len(points) > 2:
            yield _polygon(points, width, height)
        else:
            raise MaskError(
                f"{where} is a {str(kind)[:40]!r} of {len(points)} points; understood are polygons of 3 points or more,"
                f" rectangles and circles of 2: draw the defect's area as one of these"
            )


def _coco_runs(annotations: list[dict[str, Any]], width: int, height: int) -> Iterator[Runs]:
    for annotation in annotations:
        where = f"annotation {str(annotation.get('id'))[:40]}"
        shape = annotation.get("segmentation")
        if isinstance(shape, dict):
            yield _run_lengths(shape, width, height, where)
        elif isinstance(shape, list) and shape:
            for outline in shape:
                yield _polygon(_points(outline, where, flat=True), width, height)
        else:
            raise MaskError(f"{where} has no segmentation (a bounding box is no mask); draw polygons, or remove it")


def _coco_entry(data: bytes, image: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry of one image, and its annotations."""
    images, annotations = _coco_index(data)
    wanted = "/" + image
    entries = [
        entry
        for name, entry in images.get(image.rsplit("/", 1)[-1], [])
        if wanted.endswith("/" + name) or name.endswith(wanted)
    ]
    if len(entries) != 1:
        known = [name for group in images.values() for name, _ in group]
        raise MaskError(
            f"{len(entries)} images are named {image!r}, one was expected; the file knows {len(known)}"
            + (f", such as {known[0][:200]!r}" if known else "")
        )
    return entries[0], annotations.get(entries[0]["id"], [])


@lru_cache(maxsize=1)  # one file serves all images, and is asked once for each
def _coco_index(data: bytes) -> tuple[dict[str, list[tuple[str, dict[str, Any]]]], dict[Any, list[dict[str, Any]]]]:
    """Images by the last part of their names, and annotations by the image's id. Nobody changes what is kept here."""
    document = _parsed(data)
    images: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    ids = set()
    for number, entry in enumerate(_items(document, "images", "the file")):
        name, key = entry.get("file_name"), entry.get("id")
        if not isinstance(name, str) or not isinstance(key, int | str) or key in ids:
            raise MaskError(f"image {number} needs a file_name and an id of its own; export the file again")
        ids.add(key)
        name = name.replace("\\", "/").removeprefix("./")
        images.setdefault(name.rsplit("/", 1)[-1], []).append((name, entry))
    annotations: dict[Any, list[dict[str, Any]]] = {}
    for number, entry in enumerate(_items(document, "annotations", "the file")):
        key = entry.get("image_id")
        if not isinstance(key, int | str):
            raise MaskError(f"annotation {number} has no image_id; export the file again")
        annotations.setdefault(key, []).append(entry)
    return images, annotations


def _parsed(data: bytes) -> Any:
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if len(data) > _MAX_BYTES or values > _MAX_VALUES:
        raise MaskError(
            f"too large: {len(data)} bytes with about {values} values, at most {_MAX_BYTES} and {_MAX_VALUES} are "
            f"accepted; split the file"
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MaskError(f"no JSON that can be read ({error}); export the annotations again") from error


def _items(thing: Any, key: str, where: str) -> list[dict[str, Any]]:
    value = thing.get(key) if isinstance(thing, dict) else None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise MaskError(f"{where} has no list of {key}; is the mask rule the right one (labelme, coco)?")
    return value


def _size(thing: Any, width_key: str, height_key: str, where: str) -> tuple[int, int]:
    width, height = (thing.get(key) if isinstance(thing, dict) else None for key in (width_key, height_key))
    if not (isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0):
        raise MaskError(f"{where} has no {width_key} and {height_key} in whole pixels above 0: export it again")
    if width > MAX_PIXELS or height > MAX_PIXELS or width * height > MAX_PIXELS:
        raise MaskError(f"{where} is too large: at most {MAX_PIXELS} pixels are accepted")
    return width, height


def _points(value: Any, where: str, *, flat: bool = False) -> np.ndarray:
    """Points, float64 (n, 2), from [[x, y], ...] or, flat, from [x, y, x, y, ...] of three points or more."""
    try:
        points = np.array(value if isinstance(value, list) else None, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise MaskError(f"{where}: its points are no numbers ({error}); draw it again") from error
    if flat and points.ndim == 1 and points.size >= 6 and points.size % 2 == 0:
        points = points.reshape(-1, 2)
    elif flat or points.ndim != 2 or points.shape[1] != 2:
        raise MaskError(f"{where}: expected points as {'[x, y, x, y, x, y, ...]' if flat else '[[x, y], ...]'}")
    if not (np.abs(points) < _FAR).all():  # false for NaN, too
        raise MaskError(f"{where}: a coordinate is no finite number, or far outside of the image; draw it again")
    return points


def _polygon(points: np.ndarray, width: int, height: int) -> Runs:
    """The runs between an outline's crossings with the middle line of each column."""
    ends = np.roll(points, -1, axis=0)
    falling = (points[:, 0] > ends[:, 0])[:, None]
    x0, y0 = np.where(falling, ends, points).T  # an edge has the same numbers whichever shape it belongs to
    x1, y1 = np.where(falling, points, ends).T
    first = _pixel(x0, width)
    count = _pixel(x1, width) - first  # columns whose middle the edge crosses
    total = _few_enough(int(count.sum()))
    edge = np.repeat(np.arange(len(points)), count)
    column = np.arange(total) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    slope = (y1 - y0)[edge] / (x1 - x0)[edge]
    row = _pixel(y0[edge] + (column + 0.5 - x0[edge]) * slope, height)
    crossings = np.sort(column * height + row)  # an even number in each column: the outline is closed
    return crossings[0::2], crossings[1::2]


def _circle(points: np.ndarray, width: int, height: int) -> Runs:
    (x, y), on = points
    radius = np.hypot(*(on - points[0]))
    column = np.arange(_pixel(x - radius, width), _pixel(x + radius, width))
    half = np.sqrt(np.maximum(0, radius**2 - (column + 0.5 - x) ** 2))
    return column * height + _pixel(y - half, height), column * height + _pixel(y + half, height)


def _run_lengths(shape: dict[str, Any], width: int, height: int, where: str) -> Runs:
    counts = shape.get("counts")
    if isinstance(counts, str):
        raise MaskError(
            f"{where} is compressed run-length code, which is not read; export it as a list of counts, or as polygons"
        )
    if not isinstance(counts, list) or not all(isinstance(n, int) and 0 <= n <= MAX_PIXELS for n in counts):
        raise MaskError(f"{where} has neither polygons nor counts of pixels; export it again")
    if shape.get("size") != [height, width] or sum(counts) != width * height:
        raise MaskError(f"{where}: its counts do not make up an image of {width}x{height} px; export it again")
    borders = np.cumsum(np.array(counts, dtype=np.int64))
    return borders[0::2][: len(counts) // 2], borders[1::2]


def _pixel(x: Any, count: int) -> Any:
    """The first of so many pixels whose centre is not before x, int64; `count` where there is none."""
    return np.clip(np.ceil(np.subtract(x, 0.5)), 0, count).astype(np.int64)


def _few_enough(runs: int) -> int:
    if runs > _MAX_RUNS:
        raise MaskError(f"its outlines cross more than {_MAX_RUNS} columns of pixels; simplify them")
    return runs


def _painted(shapes: Iterable[Runs], width: int, height: int) -> np.ndarray:
    """The union of all shapes, bool (h, w)."""
    changes = np.zeros(width * height + 1, dtype=np.int32)  # how many shapes begin at a pixel, less those that end
    total = 0
    for starts, ends in shapes:
        total = _few_enough(total + len(starts))
        np.add.at(changes, starts, 1)
        np.add.at(changes, ends, -1)
    covered = np.cumsum(changes, out=changes)[:-1] > 0
    return np.ascontiguousarray(covered.reshape(width, height).T)
