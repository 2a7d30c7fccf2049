"""Which features of which offline backbone: quality, time and store size.

    python tests/benchmarks/features.py mvtec_ad=DATA/grid mt_defect=DATA [--seeds 0 1 2] [--variant lite0 ...]
        [--method padim:123 patchcore:23]

Each variant is a backbone, where in its blocks the features are taken, and an image size; PaDiM and PatchCore (1 %
coreset) learn on each choice of layers and are judged as the pipeline judges them, with the same hold-out and the masks
at their own size. Mean over the seeds. `images/s`: extraction on this machine, of the prepared images; `kB`: an image's
features of these layers, half precision, before compression.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from al_models import Runtime, create
from al_models.metrics import PixelCounts, image_metrics
from al_models.parts.backbone import Backbone
from al_models.parts.images import decode, resize
from al_models.types import FeatureSpec, ImageBatch, ImageSource
from storage.datasets import list_samples
from storage.files import read_image
from storage.masks import read_mask
from storage.samples import Sample
from tasks.core.split import fit_and_calibration

ALL = (1, 2, 3)
VARIANTS = {
    "lite0": FeatureSpec("tf_efficientnet_lite0", ALL),
    "lite0 expansion": FeatureSpec("tf_efficientnet_lite0", ALL, location="expansion"),
    "lite0 320 px": FeatureSpec("tf_efficientnet_lite0", ALL, 320),
    "lite1": FeatureSpec("tf_efficientnet_lite1", ALL),
    "lite2": FeatureSpec("tf_efficientnet_lite2", ALL),
    "lite2 expansion": FeatureSpec("tf_efficientnet_lite2", ALL, location="expansion"),
}
METHODS = {"padim": {}, "patchcore": {"coreset_ratio": 0.01}}
CHOICES = ("padim:123", "padim:23", "patchcore:123", "patchcore:23")
"""Method and the layers it learns on."""
FIGURES = ("image_auroc", "pixel_auroc", "pro")


@dataclass
class Category:
    """Images that may be learned from or judged; copies in content are left out."""

    root: Path
    folders: Sequence[str]
    samples: list[Sample]

    @staticmethod
    def of(dataset: str, root: str) -> Category:
        """The only category below the root."""
        listing = list_samples(dataset, root)
        kept = {sample.id: sample for sample in reversed(listing.samples)}
        return Category(listing.root, listing.folders, list(reversed(kept.values())))

    def images(self, size: int) -> torch.Tensor:
        """uint8 (n, size, size, 3)."""
        small = [resize(decode(read_image(self.root, s, self.folders)).pixels, size) for s in self.samples]
        return torch.from_numpy(np.stack([np.repeat(x[..., None], 3, 2) if x.ndim == 2 else x for x in small]))


class Features(ImageSource):
    """Some images of a category, in memory."""

    def __init__(self, layers: dict[int, torch.Tensor], rows: Sequence[int], names: Sequence[str]) -> None:
        self.layers, self.rows, self.ids = layers, list(rows), tuple(names[row] for row in rows)

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """Float16 (n, c, h, w) a layer."""
        chosen = [self.rows[row] for row in rows]
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {n: x[chosen] for n, x in self.layers.items()})


def main() -> None:
    """Measure and print a line for each data set, variant, choice of layers and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="DATASET=FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--method", nargs="+", default=list(CHOICES), metavar="METHOD:LAYERS")
    given = parser.parse_args()
    print("data | features | method | layers | image AUROC | pixel AUROC | PRO | images/s | kB")
    for name, _, root in (item.partition("=") for item in given.data):
        category = Category.of(name, root)
        for variant in given.variant:
            for line in judged(category, VARIANTS[variant], given.method, given.seeds):
                print(f"{name} | {variant} | {line}", flush=True)


def judged(category: Category, spec: FeatureSpec, choices: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """The lines of one variant."""
    features, rate = extracted(category.images(spec.image_size), spec)
    for method, _, digits in (choice.partition(":") for choice in choices):
        layers = tuple(int(digit) for digit in digits)
        size = sum(features[layer][0].numel() for layer in layers) * 2 / 1000
        params = {**METHODS[method], "layers": layers}
        found = [figures(category, features, method, params, spec, seed) for seed in seeds]
        mean = " | ".join(f"{100 * np.mean([one[name] for one in found]):.1f}" for name in FIGURES)
        yield f"{method} | {layers} | {mean} | {rate:.0f} | {size:.0f}"


def extracted(images: torch.Tensor, spec: FeatureSpec, device: str = "cpu") -> tuple[dict[int, torch.Tensor], float]:
    """Layer -> float16 (n, c, h, w), and images a second."""
    backbone = Backbone(spec, device)
    backbone(images[:8])
    parts: dict[int, list[torch.Tensor]] = {key: [] for key in spec.keys}
    start = time.perf_counter()
    for batch in images.split(8):
        for layer, values in backbone(batch).items():
            parts[layer].append(values.half().contiguous().cpu())
    seconds = time.perf_counter() - start
    return {layer: torch.cat(values) for layer, values in parts.items()}, len(images) / seconds


def figures(
    category: Category,
    features: dict[int, torch.Tensor],
    method: str,
    params: dict[str, object],
    spec: FeatureSpec,
    seed: int,
) -> dict[str, float]:
    """Metrics of one method with one seed."""
    names = [sample.id for sample in category.samples]
    row = {name: place for place, name in enumerate(names)}
    ids, _ = fit_and_calibration([replace(s, mask=None) for s in category.samples], seed)
    test = [place for place, sample in enumerate(category.samples) if sample.split == "test"]
    detector = create(method, image_size=spec.image_size, **params)
    runtime = Runtime(seed=seed)
    detector.fit(Features(features, [row[i] for i in ids], names), runtime)
    counts, scores = PixelCounts(), []
    for part in detector.predict_batches(Features(features, test, names), runtime):
        scores += part.scores.tolist()
        for name, values in zip(part.ids, part.maps, strict=True):
            add(counts, category, category.samples[row[name]], values)
    labels = np.array([category.samples[place].label == "anomalous" for place in test])
    return image_metrics(np.array(scores), labels) | counts.metrics()


def add(counts: PixelCounts, category: Category, sample: Sample, values: np.ndarray) -> None:
    """Count the pixels of one image whose mask marks something."""
    if sample.mask is None:
        if sample.label == "good":
            shape = decode(read_image(category.root, sample, category.folders)).pixels.shape[:2]
            counts.add(sample.id, values, None, shape)
        return
    mask = read_mask(category.root, sample, category.folders)
    if mask.any():
        counts.add(sample.id, values, mask)


if __name__ == "__main__":
    main()
