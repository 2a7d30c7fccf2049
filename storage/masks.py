"""What in a mask counts as anomalous: the truth about pixels in the forms in which data sets publish it.

A `Sample.mask_rule` is one of

    auto            above half of the range (gray value > 127 of 255), or above 0 where the largest value is 1
    nonzero         any value but 0, of a palette its index
    above:N         values above N, in the file's own range
    values:N,M,...  these values, of a palette its index
    labelme         the polygons of a LabelMe JSON file
    coco:NAME       the polygons of image NAME in a COCO JSON file
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from storage.errors import DatasetError, MaskError
from storage.files import mask_files
from storage.samples import Sample, parse_box

MAX_PIXELS = 89_478_485
"""As for images (Pillow's own limit for a decompression bomb)."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def read_mask(root: Path, sample: Sample, folders: Sequence[str] = (".",)) -> np.ndarray:
    """The anomalous pixels of a sample with a mask, bool (h, w): the union where its mask is a folder, cut to its box.

    Raises MaskError for a mask that cannot be read, DatasetError when a file has changed since it was listed, and
    OutsideRoot when its path leaves the root.
    """
    masks = [decode_mask(data, sample.mask_rule) for data in mask_files(root, sample, folders)]
    _check_sizes(sample, masks)
    return _cut(np.logical_or.reduce(masks), sample)


def read_regions(root: Path, sample: Sample, folders: Sequence[str] = (".",)) -> list[tuple[int, np.ndarray]]:
    """The annotated regions of a sample, each with the value that marks it and its pixels, bool (h, w).

    Every value but 0 of every file of its mask is a region of its own (MVTec LOCO AD: the value tells the kind of
    defect); regions may share pixels. Raises as `read_mask`.
    """
    files = [_raw(data) for data in mask_files(root, sample, folders)]
    _check_sizes(sample, files)
    return [(int(value), _cut(file == value, sample)) for file in files for value in np.unique(file) if value]


def _check_sizes(sample: Sample, masks: Sequence[np.ndarray]) -> None:
    if len({mask.shape for mask in masks}) > 1:
        raise MaskError(f"the masks in {sample.mask} have different sizes; draw each on the image itself")


def _cut(mask: np.ndarray, sample: Sample) -> np.ndarray:
    if sample.box is None:
        return mask
    x, y, width, height = parse_box(sample.box)
    return mask[y : y + height, x : x + width]


def decode_mask(data: bytes, rule: str = "auto") -> np.ndarray:
    """The anomalous pixels of a mask file, bool (h, w). Raises MaskError, and DatasetError for an unknown rule."""
    name, _, argument = rule.partition(":")
    if name in ("labelme", "coco"):
        from storage.polygons import draw_polygons

        return draw_polygons(data, name, argument)
    if name == "auto":
        values = _gray(data)
        return values > 0 if values.max() == 1 else values > (32767 if values.dtype.itemsize > 1 else 127)
    values = _raw(data)
    try:
        if name == "nonzero":
            return values != 0
        if name == "above":
            return (values * np.uint8(255) if values.dtype == bool else values) > float(argument)
        if name == "values":
            return np.isin(values, [int(number) for number in argument.split(",")])
    except ValueError as error:
        raise DatasetError(f"mask rule {rule!r}: {error}; give numbers, such as above:127 or values:1,2") from error
    raise DatasetError(f"unknown mask rule {rule!r}; known: auto, nonzero, above:N, values:N,M, labelme, coco:NAME")


def _gray(data: bytes) -> np.ndarray:
    """Gray values: uint8, or as they are in 16-bit files."""
    image = _opened(data)
    return np.asarray(image if image.mode.startswith("I") else image.convert("L"))


def _raw(data: bytes) -> np.ndarray:
    """Values as stored (h, w): a palette's indices; the largest channel of a colour."""
    image = _opened(data)
    if image.mode in ("RGBA", "LA", "PA"):  # what alpha hides is no mark, and alpha is none either
        image = image.convert("RGB")
    values = np.asarray(image)
    return values.max(axis=2) if values.ndim == 3 else values


def _opened(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise MaskError(f"too large: {image.width}x{image.height} px, at most {MAX_PIXELS} pixels are accepted")
        image.load()
    except MaskError:
        raise
    except UnidentifiedImageError as error:  # whose text names an object in memory, another one each time
        raise MaskError(f"no image that can be read ({len(data)} bytes); export the mask again") from error
    except (*_BROKEN, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MaskError(f"damaged or cut short ({error}); export the mask again") from error
    return image
