"""How well maps and scores separate the anomalous from the good: exact, in one pass, in bounded memory."""

from __future__ import annotations

from al_models.metrics.boundary import BoundaryCounts, boundary_f
from al_models.metrics.counts import PixelCounts
from al_models.metrics.curves import PRO_LIMITS, REGION_UNITS, pixel_metrics
from al_models.metrics.fine import FineCounts, anomalous_values, fine_counts
from al_models.metrics.images import image_metrics
from al_models.metrics.per_image import ImageCounts, ImageRow, count_image
from al_models.metrics.pimo import Pimo, aupimo
from al_models.metrics.regions import Defect
from al_models.metrics.resize import resize_map

__all__ = [
    "PRO_LIMITS",
    "REGION_UNITS",
    "BoundaryCounts",
    "Defect",
    "FineCounts",
    "ImageCounts",
    "ImageRow",
    "Pimo",
    "PixelCounts",
    "anomalous_values",
    "aupimo",
    "boundary_f",
    "count_image",
    "fine_counts",
    "image_metrics",
    "pixel_metrics",
    "resize_map",
]
