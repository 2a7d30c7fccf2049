"""The mathematics of anomaly localization: detectors, metrics, parts.

from al_models import create
prediction = create("patchcore", coreset_ratio=0.1).fit(good_images).predict(new_images)
"""

from al_models.registry import METHODS, create
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime

__all__ = ["METHODS", "FeatureSpec", "ImageBatch", "ImageSource", "Prediction", "Runtime", "create"]
