"""How well maps and scores separate the anomalous from the good: exact, in one pass, in bounded memory."""

from __future__ import annotations

from al_models.metrics.bootstrap import (
    Comparison,
    Interval,
    Replicates,
    compare,
    interval,
    mean_replicates,
    replicates,
    threshold_replicates,
)
from al_models.metrics.boundary import BoundaryCounts, boundary_f
from al_models.metrics.counts import PixelCounts
from al_models.metrics.curves import PRO_LIMITS, REGION_UNITS, pixel_metrics
from al_models.metrics.fine import FineCounts, anomalous_values, fine_counts
from al_models.metrics.images import image_metrics
from al_models.metrics.per_image import ImageCounts, ImageRow, count_image
from al_models.metrics.pimo import Pimo, aupimo
from al_models.metrics.ranks import Ranking, rank_methods
from al_models.metrics.regions import Defect, RegionCounts
from al_models.metrics.resize import resize_map

__all__ = [
    "PRO_LIMITS",
    "REGION_UNITS",
    "BoundaryCounts",
    "Comparison",
    "Defect",
    "FineCounts",
    "ImageCounts",
    "ImageRow",
    "Interval",
    "Pimo",
    "PixelCounts",
    "Ranking",
    "RegionCounts",
    "Replicates",
    "anomalous_values",
    "aupimo",
    "boundary_f",
    "compare",
    "count_image",
    "fine_counts",
    "image_metrics",
    "interval",
    "mean_replicates",
    "pixel_metrics",
    "rank_methods",
    "replicates",
    "resize_map",
    "threshold_replicates",
]
