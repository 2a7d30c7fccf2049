"""Methods on one data set, without the pipeline around them: quality, seconds of fit, images a second, and the losses.

    python tests/benchmarks/trained.py mvtec_ad=DATA/grid METHOD[,METHOD...] [NAME=VALUE ...] [--seed 0] [--losses]
        [--device cuda]

METHOD is a name of the registry, or `module:Class` below `al_models`; NAME=VALUE are the parameters, the value as JSON,
given to each method that has one of that name. Learned from and judged as the pipeline does: the same hold-out,
features in half precision made beforehand and not counted, the masks at their own size. On a GPU also: its memory, and
how far the maps of what was learned there lie from those the CPU makes of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib import import_module

import numpy as np
import torch
from features import Category, add, extracted

from al_models import Runtime
from al_models.detector import Detector
from al_models.metrics import PixelCounts, image_metrics
from al_models.parts.backbone import cached_backbone
from al_models.registry import METHODS, detector_class
from al_models.trained import TrainedDetector
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction
from tasks.core.split import fit_and_calibration


class Stored(ImageSource):
    """Some images of a category and what was extracted of them, in memory."""

    def __init__(
        self,
        images: torch.Tensor | None,
        features: dict[int, torch.Tensor],
        rows: Sequence[int],
        names: Sequence[str],
        spec: FeatureSpec | None = None,
    ) -> None:
        self.images, self.features, self.rows = images, features, list(rows)
        self.ids = tuple(names[row] for row in rows)
        self.offsets = cached_backbone(spec).offsets if spec else {}

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """uint8 (n, h, w, 3), and float16 (n, c, h, w) a layer."""
        chosen = [self.rows[row] for row in rows]
        features = {layer: values[chosen] for layer, values in self.features.items()}
        images = None if self.images is None else self.images[chosen]
        return ImageBatch(tuple(self.ids[r] for r in rows), images, features)


def main() -> None:
    """Measure and print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATASET=FOLDER")
    parser.add_argument("methods", metavar="METHOD[,METHOD...]")
    parser.add_argument("params", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed-precision", action="store_true")
    parser.add_argument("--losses", action="store_true", help="print the losses of each epoch")
    given = parser.parse_intermixed_args()
    params = {name: value_of(text) for name, _, text in (item.partition("=") for item in given.params)}
    dataset, _, root = given.data.partition("=")
    runtime = Runtime(seed=given.seed, device=given.device, mixed_precision=given.mixed_precision)
    category = Category.of(dataset, root)
    for name in given.methods.split(","):
        cls = _class(name)
        known = {field.name for field in fields(cls)}
        detector = cls(**{key: value for key, value in params.items() if key in known})
        try:
            judged(category, name, detector, runtime, losses=given.losses)
        except Exception:  # the next may do better, and a GPU's time is short
            print(f"{name}: {traceback.format_exc()}", flush=True)


def judged(category: Category, name: str, detector: Detector, runtime: Runtime, *, losses: bool) -> None:
    """Fit, predict, print."""
    spec = detector.feature_spec()
    images = category.images(spec.image_size if spec else detector.image_size)
    features = extracted(images, spec, runtime.device)[0] if spec else {}
    shown = images if detector.traits.needs_images else None
    names = [sample.id for sample in category.samples]
    row = {name: place for place, name in enumerate(names)}
    ids, _ = fit_and_calibration([replace(s, mask=None) for s in category.samples], runtime.seed)
    with _gpu_memory(runtime.device) as peaks:
        start = time.perf_counter()
        detector.fit(Stored(shown, features, [row[i] for i in ids], names, spec), runtime)
        fitted = time.perf_counter()
    test = [place for place, sample in enumerate(category.samples) if sample.split == "test"]
    source = Stored(shown, features, test, names)
    with _gpu_memory(runtime.device) as peaks_of_prediction:
        before = time.perf_counter()
        found = detector.predict(source, runtime)
        seconds = time.perf_counter() - before
    counts = PixelCounts()
    for image, values in zip(found.ids, found.maps, strict=True):
        add(counts, category, category.samples[row[image]], values)
    labels = np.array([category.samples[place].label == "anomalous" for place in test])
    figures = image_metrics(found.scores, labels) | counts.metrics()
    if losses:
        turns = detector.turn_losses() if isinstance(detector, TrainedDetector) else {}
        for look, (step, learned, held) in enumerate(detector.curve()):
            own = "".join(f", {turn} {values[look]:.5g}" for turn, values in turns.items())
            print(f"step {step:.0f}: {learned:.5g} (held-out {held:.5g}){own}")
    quality = " / ".join(f"{100 * figures[figure]:.1f}" for figure in ("image_auroc", "pixel_auroc", "pro"))
    steps = f" ({detector.curve()[-1][0]} steps)" if detector.curve() else ""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    on_gpu = ""
    if runtime.device != "cpu":
        apart = _apart_from_cpu(detector, source, found, runtime)
        on_gpu = f", on the GPU {peaks[0]:.0f} MiB (fit) and {peaks_of_prediction[0]:.0f}, from the CPU {apart}"
    print(
        f"{name}: image AUROC / pixel AUROC / PRO {quality}; fit {fitted - start:.1f} s{steps}, "
        f"{len(test) / seconds:.1f} images/s, peak {memory:.0f} MiB{on_gpu}",
        flush=True,
    )


@contextmanager
def _gpu_memory(device: str) -> Iterator[list[float]]:
    """Its one value, at the end: the most that tensors took on the device meanwhile, in MiB."""
    peak: list[float] = []
    if device == "cpu":
        yield peak
        return
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.append(torch.cuda.max_memory_allocated(device) / 2**20)


def _apart_from_cpu(detector: Detector, source: Stored, found: Prediction, runtime: Runtime, images: int = 8) -> str:
    """The largest difference between the first maps and those of the CPU with the same state and features, and between
    the scores; each relative to the range of the CPU's."""
    rows = list(range(min(images, len(source))))
    same = type(detector)(**{f.name: getattr(detector, f.name) for f in fields(detector)}).load_state(detector.state())
    cpu = same.predict(source.read(rows), replace(runtime, device="cpu"))
    maps = np.abs(cpu.maps - found.maps[rows]).max() / np.ptp(cpu.maps)
    scores = np.abs(cpu.scores - found.scores[rows]).max() / np.ptp(cpu.scores)
    return f"{maps:.1e} (maps), {scores:.1e} (scores)"


def _class(name: str) -> type[Detector]:
    if name in METHODS:
        return detector_class(name)
    module, _, cls = name.partition(":")
    found: type[Detector] = getattr(import_module(f"al_models.{module}"), cls)
    return found


def value_of(text: str) -> object:
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
