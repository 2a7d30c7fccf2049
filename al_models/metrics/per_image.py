"""One image's map and mask as a few sparse counts, from which every pixel metric of any set of images follows.

A map's values are rounded to float16, which has fewer than 65,536 values; everything after that rounding is exact. An
image's counts take 6 bytes for each distinct value of its normal pixels and 14 for each of its anomalous ones: about
0.2 MB for a map of 1024 x 1024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from al_models.detector import FLOAT16_MAX
from al_models.errors import InvalidInput
from al_models.metrics.curves import Sweep
from al_models.metrics.keys import HIGHEST, LOWEST, N_KEYS, keys_of
from al_models.metrics.regions import NO_REGIONS, Defect, RegionCounts, RegionPairs, box_of, label_regions, saturated
from al_models.metrics.resize import resize_map


@dataclass(frozen=True)
class ImageRow:
    """One image's own figures, for choosing which images to show."""

    image_id: str
    n_normal: int
    """Pixels outside the mask, at the mask's size."""
    n_anomalous: int
    """Pixels inside the mask."""
    n_regions: int
    """8-connected regions of the mask."""
    auroc: float | None = None
    """None, like the two below, unless the image has both normal and anomalous pixels."""
    average_precision: float | None = None
    iou_max: float | None = None


@dataclass(frozen=True, eq=False)
class ImageCounts:
    """The counts that one image adds to any metric: pixels by the key of their map value, only values that occur."""

    image_id: str
    normal_keys: np.ndarray
    """uint16 [a], rising; keys rise with values."""
    normal_counts: np.ndarray
    """int32 [a]: normal pixels of each."""
    regions: RegionCounts = NO_REGIONS
    """Anomalous pixels and overlap of the 8-connected regions of the mask."""
    by_size: dict[str, RegionCounts] = field(default_factory=dict)
    """Size (of `regions.SIZES`) -> the regions of that size; together they are `regions`."""
    defects: RegionCounts | None = None
    """Annotated defects with saturated overlap; None where the image was counted without."""
    defect_type: str | None = None
    """The data set's name for the defect of the image."""

    @property
    def n_normal(self) -> int:
        """Normal pixels."""
        return int(self.normal_counts.sum())

    @property
    def n_anomalous(self) -> int:
        """Anomalous pixels; 0 for a good image."""
        return int(self.regions.anomalous.sum())

    @property
    def n_regions(self) -> int:
        """8-connected regions of the mask."""
        return self.regions.n_regions

    @property
    def keys(self) -> np.ndarray:
        """uint16 [k], rising: all keys that occur. Made at each access, like the three below, to keep images small."""
        occurs = np.zeros(N_KEYS, bool)
        occurs[self.normal_keys] = occurs[self.regions.keys] = True
        return np.flatnonzero(occurs).astype(np.uint16)

    @property
    def normal(self) -> np.ndarray:
        """int64 [k]: normal pixels of each of `keys`."""
        return self._at_keys(self.normal_keys, self.normal_counts)

    @property
    def anomalous(self) -> np.ndarray:
        """int64 [k]: anomalous pixels of each of `keys`."""
        return self._at_keys(self.regions.keys, self.regions.anomalous)

    @property
    def overlap(self) -> np.ndarray:
        """int64 [k]: sum over the regions of the share with each of `keys`, in units of 1 / REGION_UNITS."""
        return self._at_keys(self.regions.keys, self.regions.overlap)

    def _at_keys(self, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
        by_key = np.zeros(N_KEYS, np.int64)
        by_key[keys] = counts
        return by_key[self.keys]

    def row(self) -> ImageRow:
        """The image's own figures."""
        shown = ImageRow(self.image_id, self.n_normal, self.n_anomalous, self.n_regions)
        if not (shown.n_normal and shown.n_anomalous):
            return shown
        sweep = Sweep.of_counts(self.normal[::-1], self.anomalous[::-1])
        return replace(
            shown,
            auroc=float(sweep.auroc()),
            average_precision=float(sweep.average_precision()),
            iou_max=float(sweep.iou().max()),
        )


def count_image(
    image_id: str,
    map: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    shape: tuple[int, int] | None = None,
    valid: np.ndarray | None = None,
    defects: Sequence[Defect] | None = None,
    defect_type: str | None = None,
) -> ImageCounts:
    """The counts of one image.
    The map, float [h, w] of any size, is brought to the size of the mask, bool [H, W], by bilinear interpolation. A
    good image has no mask: give the `shape` (H, W) to judge it at. With `defects` the mask is their union and is not
    given itself; a good image beside such images has none. Pixels outside `valid`, bool [H, W], are left out (3-D data
    without depth); regions are found before that, and one without a valid pixel does not count. Raises InvalidInput for
    a map that is not finite or beyond float16, for a mask that is not bool, and for shapes that contradict each other.
    """
    if defects:
        mask = _union(image_id, mask, defects)
    mask, shape = checked_mask(image_id, mask, shape)
    valid = checked_valid(image_id, valid, shape)
    keys = keys_at(image_id, map, shape)
    everything = np.bincount(keys.ravel() if valid is None else keys[valid], minlength=N_KEYS)
    of_defects = None
    if defects is not None:
        of_defects = saturated([(d, keys[d.mask if valid is None else d.mask & valid]) for d in defects])
    pixels = _marked_pixels(keys, mask, valid)
    if pixels is None:
        return ImageCounts(image_id, *_sparse(everything), defects=of_defects, defect_type=defect_type)
    pairs = RegionPairs.of(*pixels)
    overlap = pairs.overlap()
    regions = pairs.by_key(overlap)
    everything[regions.keys] -= regions.anomalous
    by_size = pairs.by_size(overlap, regions, keys.size)
    return ImageCounts(image_id, *_sparse(everything), regions, by_size, of_defects, defect_type)


def _marked_pixels(
    keys: np.ndarray, mask: np.ndarray | None, valid: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Region and key of each anomalous pixel, [m] each; None without any."""
    if mask is None or not mask.any():
        return None
    box = box_of(mask)  # labelling the defect's surroundings would cost more than all the rest
    mask = mask[box]
    regions, inside = label_regions(mask), keys[box][mask]
    if valid is not None:
        seen = valid[box][mask]
        regions, inside = regions[seen], inside[seen]
    return (regions, inside) if len(regions) else None


def _sparse(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = np.flatnonzero(counts)
    return keys.astype(np.uint16), counts[keys].astype(np.int32)


def keys_at(image_id: str, map: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint16 keys [H, W] of a map [h, w] at the given size. Raises InvalidInput for a map float16 cannot hold."""
    map = checked_map(image_id, map)
    if map.dtype == np.float16 and map.shape == shape:  # no detour by float32, which would take most of the time
        keys = keys_of(map)
        if keys.min() < LOWEST or keys.max() > HIGHEST:
            raise _unfit(image_id)
        return keys
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is refused below
        map = map.astype(np.float32, copy=False)
    if not (map.min() >= -FLOAT16_MAX and map.max() <= FLOAT16_MAX):  # a NaN fails any comparison
        raise _unfit(image_id)
    return keys_of(resize_map(map, shape))


def checked_map(image_id: str, map: np.ndarray) -> np.ndarray:
    """The map as an array. Raises InvalidInput unless it is real [h, w]."""
    map = np.asarray(map)
    if map.ndim != 2 or map.size == 0:
        raise InvalidInput(f"the map of image {image_id} has shape {map.shape}; give one map [h, w] at a time")
    if map.dtype.kind not in "fiub":
        raise InvalidInput(f"the map of image {image_id} is {map.dtype}; give real numbers")
    return map


def _unfit(image_id: str) -> InvalidInput:
    return InvalidInput(
        f"the map of image {image_id} holds NaN, inf or a value beyond ±{FLOAT16_MAX:.0f}, which float16 cannot "
        "hold; check the model that made it, or scale its maps down"
    )


def checked_mask(
    image_id: str, mask: np.ndarray | None, shape: tuple[int, int] | None
) -> tuple[np.ndarray | None, tuple[int, int]]:
    """The mask as an array and the size to judge at. Raises InvalidInput when they contradict, or say nothing."""
    if mask is None and shape is None:
        raise InvalidInput(f"image {image_id} has neither mask nor shape; give the shape (H, W) of a good image")
    mask = None if mask is None else np.asarray(mask)
    if mask is not None and (mask.dtype != bool or mask.ndim != 2):
        raise InvalidInput(f"the mask of image {image_id} is {mask.dtype} {mask.shape}; give bool [H, W]")
    if mask is not None and shape is not None and mask.shape != tuple(shape):
        raise InvalidInput(f"image {image_id} has a mask of shape {mask.shape} but shape {tuple(shape)}; give one")
    shape = tuple(shape) if mask is None else mask.shape
    if len(shape) != 2 or min(shape) < 1:
        raise InvalidInput(f"image {image_id} is to be judged at shape {shape}; give (H, W), both at least 1")
    return mask, shape


def checked_valid(image_id: str, valid: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray | None:
    """The validity mask, None where every pixel is valid. Raises InvalidInput unless it is bool [H, W]."""
    if valid is None:
        return None
    valid = np.asarray(valid)
    if valid.dtype != bool or valid.shape != shape:
        raise InvalidInput(
            f"the valid pixels of image {image_id} are {valid.dtype} {valid.shape}; give bool {shape}, as its mask"
        )
    return None if valid.all() else valid


def _union(image_id: str, mask: np.ndarray | None, defects: Sequence[Defect]) -> np.ndarray:
    if mask is not None:
        raise InvalidInput(f"image {image_id} has a mask and defects; give the defects, whose union is the mask")
    shapes = {np.shape(defect.mask) for defect in defects}
    if len(shapes) > 1 or any(np.asarray(defect.mask).dtype != bool for defect in defects):
        raise InvalidInput(f"the defects of image {image_id} have masks of shapes {shapes}; give bool [H, W], one size")
    return np.logical_or.reduce([defect.mask for defect in defects])
