"""What in a mask counts as anomalous: the truth about pixels in the forms in which data sets publish it.

A `Sample.mask_rule` is one of

    auto            above half of the range (gray value > 127 of 255), or above 0 where the largest value is 1; a mask
                    that leaves open what it marks is refused: areas of darker gray, an alpha layer of another shape
    nonzero         any value but 0, of a palette its index
    above:N         values above N, in the file's own range
    below:N         values below N, likewise: an inverted mask
    values:N,M,...  these values, of a palette its index
    alpha           as auto, of the alpha layer
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
from scipy import ndimage

from storage.errors import DatasetError, MaskError
from storage.files import MAX_PIXELS, mask_files
from storage.polygons import draw_polygons
from storage.samples import Sample, parse_box

RULES = ("auto", "nonzero", "above:N", "below:N", "values:N,M", "alpha", "labelme", "coco:NAME")
_SHADES = 8
"""With more darker grays than these, a mask is one with soft edges or of lossy compression, and no drawing in grays."""
_NOISE = 32
"""Gray values of such a mask up to which it shows compression, as does all within a block of 8 pixels of a mark."""
_SMOOTH = 8
"""Gray values that differ by no more between neighbours are an area, and no edge."""
_FEW = 4
"""Pixels that make an area."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def read_mask(root: Path, sample: Sample, folders: Sequence[str] = (".",)) -> np.ndarray:
    """The anomalous pixels of a sample with a mask, bool (h, w): the union where its mask is a folder, cut to its box.

    Raises MaskError for a mask that cannot be read, DatasetError when a file has changed since it was listed, and
    OutsideRoot when its path leaves the root.
    """
    return read_turned_mask(root, sample, folders)[0]


def read_turned_mask(root: Path, sample: Sample, folders: Sequence[str] = (".",)) -> tuple[np.ndarray, int]:
    """The pixels as `read_mask` gives them, and the EXIF orientation of the files, which is not applied: 1 for none."""
    files = list(mask_files(root, sample, folders))
    masks = [decode_mask(data, sample.mask_rule) for data in files]
    _check_sizes(sample, masks)
    turned = {1} if sample.mask_rule.startswith(("labelme", "coco")) else {_orientation(data) for data in files}
    if len(turned) > 1:
        raise MaskError(f"the masks in {sample.mask} have different EXIF orientations; save each upright, without one")
    return _cut(np.logical_or.reduce(masks), sample), turned.pop()


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged metadata says nothing about the pixels
        return 1


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
        return draw_polygons(data, name, argument)
    if name in ("auto", "alpha"):
        image = _opened(data)
        return _auto(image) if name == "auto" else _marked(_alpha(image))
    values = _raw(data)
    try:
        if name == "nonzero":
            return values != 0
        if name == "above":
            return (values * np.uint8(255) if values.dtype == bool else values) > float(argument)
        if name == "below":
            return (values * np.uint8(255) if values.dtype == bool else values) < float(argument)
        if name == "values":
            return np.isin(values, [int(number) for number in argument.split(",")])
    except ValueError as error:
        raise DatasetError(f"mask rule {rule!r}: {error}; give numbers, such as above:127 or values:1,2") from error
    raise DatasetError(f"unknown mask rule {rule!r}; known: {', '.join(RULES)}")


def _auto(image: Image.Image) -> np.ndarray:
    """The marked pixels of a mask whose rule is `auto`. Raises MaskError where it can be read in two ways."""
    if not image.has_transparency_data:
        return _marked(_gray(image), lossy=image.format in ("JPEG", "WEBP"))
    image = image.convert("RGBA")  # a palette with transparency converts cleanly by this way only
    alpha = _alpha(image)
    marked = _marked(_gray(image.convert("RGB")))
    if alpha.min() < 255 and not np.array_equal(marked, _marked(alpha)):
        raise MaskError(
            f"its alpha layer shows another shape ({(alpha > 127).mean():.1%} of the pixels) than its colours "
            f"({marked.mean():.1%}); say mask_rule = alpha where the layer marks the defect, above:127 where colours do"
        )
    return marked


def _marked(values: np.ndarray, *, lossy: bool = False) -> np.ndarray:
    """Values above half of the range, or above 0 where the largest is 1. Raises MaskError for areas of darker gray."""
    if values.max() == 1:
        return values > 0
    marked = values > (32767 if values.dtype.itemsize > 1 else 127)
    darker = (values > 0) & ~marked
    grays = _areas(values, marked, darker, lossy) if darker.any() else []
    if grays:
        few = f"{', '.join(map(str, grays[:4]))}{' and others' if len(grays) > 4 else ''}"
        raise MaskError(
            f"it has areas of gray {few}, neither black nor white, so that what it marks is not known; say mask_rule = "
            f"nonzero where every gray marks a defect, values:N,M where some do, above:127 where only the lighter do"
        )
    return marked


def _areas(values: np.ndarray, marked: np.ndarray, darker: np.ndarray, lossy: bool) -> list[int]:
    """Gray values of darker pixels that are no soft edge of what is marked: flat areas, and areas on their own."""
    near, rough = marked, 0
    if lossy or len(np.unique(values[darker])) > _SHADES:
        unit = 257 if values.dtype.itemsize > 1 else 1
        darker, rough = darker & (values > _NOISE * unit), _SMOOTH * unit
        near = ndimage.binary_dilation(marked, iterations=8)
    span = ndimage.maximum_filter(values, 3).astype(np.int64) - ndimage.minimum_filter(values, 3)
    flat = darker & (span <= rough)
    parts, _ = ndimage.label(marked | darker, np.ones((3, 3)))
    sizes = np.bincount(parts[darker], minlength=parts.max() + 1)
    sizes[np.unique(parts[near])] = 0
    alone = darker & (sizes >= _FEW)[parts]
    if rough and alone.sum() < marked.sum() / 100:
        alone[:] = False  # specks of a mask that was made smaller
    return [int(gray) for gray in np.unique(values[flat | alone])]


def _gray(image: Image.Image) -> np.ndarray:
    """Gray values: uint8, or as they are in 16-bit files."""
    return np.asarray(image if image.mode.startswith("I") else image.convert("L"))


def _alpha(image: Image.Image) -> np.ndarray:
    if not image.has_transparency_data:
        raise MaskError("it has no alpha layer; leave mask_rule = alpha out")
    return np.asarray(image.convert("RGBA").getchannel("A"))


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
