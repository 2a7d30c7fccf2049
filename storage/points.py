"""3-D points beside images, as MVTec 3D-AD has them: which pixels were measured at all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile

from storage.errors import DatasetError
from storage.files import points_file
from storage.samples import Sample, parse_box


def measured_pixels(root: Path, sample: Sample, folders: Sequence[str] = (".",)) -> np.ndarray:
    """Pixels of a sample with points whose point was measured, bool (h, w), cut to its box.

    The file holds x, y, z of every pixel, float TIFF (h, w, 3); where the sensor saw nothing all three are 0 (Bergmann
    et al., The MVTec 3D-AD Dataset, VISAPP 2022, section 3). Raises DatasetError for a file that is none or that has
    changed since it was listed, and OutsideRoot when its path leaves the root.
    """
    try:
        points = tifffile.imread(io.BytesIO(points_file(root, sample, folders)))
    except (tifffile.TiffFileError, ValueError, OSError) as error:
        raise DatasetError(
            f"the points {sample.xyz} are no TIFF that can be read ({error}); copy them again"
        ) from error
    if points.ndim != 3 or points.shape[2] != 3:
        raise DatasetError(
            f"the points {sample.xyz} have shape {points.shape}; x, y and z of every pixel were expected"
        )
    measured = np.isfinite(points).all(axis=2) & (points != 0).any(axis=2)
    if sample.box is not None:
        x, y, width, height = parse_box(sample.box)
        measured = measured[y : y + height, x : x + width]
    return measured
