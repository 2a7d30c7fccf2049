"""How well maps and scores separate the anomalous from the good: exact, in one pass, in bounded memory."""

from __future__ import annotations

from al_models.metrics.counts import ImageRow, PixelCounts
from al_models.metrics.images import image_metrics
from al_models.metrics.resize import resize_map

__all__ = ["ImageRow", "PixelCounts", "image_metrics", "resize_map"]
