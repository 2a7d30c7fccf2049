"""One method on one data set, without the pipeline around it: quality, seconds of fit, images a second, and the losses.

    python tests/benchmarks/trained.py mvtec_ad=DATA/grid METHOD [NAME=VALUE ...] [--seed 0] [--losses]

METHOD is a name of the registry, or `module:Class` below `al_models`; NAME=VALUE are its parameters, the value as JSON.
Learned from and judged as the pipeline does: the same hold-out, features in half precision made beforehand and not
counted, the masks at their own size.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import numpy as np
import torch
from features import Category, add, extracted

from al_models import Runtime
from al_models.detector import Detector
from al_models.metrics import PixelCounts, image_metrics
from al_models.registry import METHODS, detector_class
from al_models.types import ImageBatch, ImageSource
from tasks.split import fit_and_calibration


class Stored(ImageSource):
    """Some images of a category and what was extracted of them, in memory."""

    def __init__(
        self, images: torch.Tensor | None, features: dict[int, torch.Tensor], rows: Sequence[int], names: Sequence[str]
    ) -> None:
        self.images, self.features, self.rows = images, features, list(rows)
        self.ids = tuple(names[row] for row in rows)

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """uint8 (n, h, w, 3), and float16 (n, c, h, w) a layer."""
        chosen = [self.rows[row] for row in rows]
        features = {layer: values[chosen] for layer, values in self.features.items()}
        images = None if self.images is None else self.images[chosen]
        return ImageBatch(tuple(self.ids[r] for r in rows), images, features)


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATASET=FOLDER")
    parser.add_argument("method")
    parser.add_argument("params", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", action="store_true")
    parser.add_argument("--losses", action="store_true", help="print the losses of each epoch")
    given = parser.parse_args()
    params = {name: _value(text) for name, _, text in (item.partition("=") for item in given.params)}
    detector = _class(given.method)(**params)
    dataset, _, root = given.data.partition("=")
    runtime = Runtime(seed=given.seed, mixed_precision=given.mixed_precision)
    judged(Category.of(dataset, root), given.method, detector, runtime, losses=given.losses)


def judged(category: Category, name: str, detector: Detector, runtime: Runtime, *, losses: bool) -> None:
    """Fit, predict, print."""
    spec = detector.feature_spec()
    images = category.images(spec.image_size if spec else detector.image_size)
    features = extracted(images, spec)[0] if spec else {}
    shown = images if detector.traits.needs_images else None
    names = [sample.id for sample in category.samples]
    row = {name: place for place, name in enumerate(names)}
    ids, _ = fit_and_calibration([replace(s, mask=None) for s in category.samples], runtime.seed)
    start = time.perf_counter()
    detector.fit(Stored(shown, features, [row[i] for i in ids], names), runtime)
    fitted = time.perf_counter()
    test = [place for place, sample in enumerate(category.samples) if sample.split == "test"]
    found = detector.predict(Stored(shown, features, test, names), runtime)
    predicted = time.perf_counter()
    counts = PixelCounts()
    for image, values in zip(found.ids, found.maps, strict=True):
        add(counts, category, category.samples[row[image]], values)
    labels = np.array([category.samples[place].label == "anomalous" for place in test])
    figures = image_metrics(found.scores, labels) | counts.metrics()
    if losses:
        for step, learned, held in getattr(detector, "curve_", []):
            print(f"step {step:.0f}: {learned:.5g} (held-out {held:.5g})")
    quality = " / ".join(f"{100 * figures[figure]:.1f}" for figure in ("image_auroc", "pixel_auroc", "pro"))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"{name}: image AUROC / pixel AUROC / PRO {quality}; fit {fitted - start:.1f} s, "
        f"{len(test) / (predicted - fitted):.1f} images/s, peak {memory:.0f} MiB"
    )


def _class(name: str) -> type[Detector]:
    if name in METHODS:
        return detector_class(name)
    module, _, cls = name.partition(":")
    found: type[Detector] = getattr(import_module(f"al_models.{module}"), cls)
    return found


def _value(text: str) -> object:
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
