"""Images a second: preparation against PIL one by one, extraction and inference against the bare backbone.

    python tests/benchmarks/throughput.py mvtec_ad DATA grid [--images 64]

Preparation: the category's images as PNG of 1024 x 1024, gray and colour, decoded and resized to 256. Extraction: the
step `extract`, from stored images to stored features, against the backbone on the same batches in memory. Inference:
PaDiM from a decoded image in memory to its smoothed map and score, at batch 1 and 16. The backbone is ours (batch norms
folded, channels last, four images at once) and timm's own, cut behind the last layer. Parts that are compared take
turns, and the fastest of each counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from al_models import create
from al_models.parts.backbone import cached_backbone, standardised, untrained
from al_models.parts.images import load_images
from al_models.types import FeatureSpec
from storage.store import Store
from tasks.core.handles import Validated
from tasks.core.stored import StoredSource, accepted_samples
from tasks.extract import CHUNK, extract
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.validate import validate

SIZE, LARGE, ROUNDS = 256, 1024, 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("root", type=Path)
    parser.add_argument("category")
    parser.add_argument("--images", type=int, default=64)
    given = parser.parse_args()
    files = sorted(given.root.rglob("train/good/*"))[: given.images]
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("L", "RGB"):
            of_preparation(large_pngs(files, mode, Path(folder)), mode)
        of_extraction(Store(f"{folder}/store"), given)
    of_inference(load_images(files, 512))


def large_pngs(files: list[Path], mode: str, folder: Path) -> list[Path]:
    """The images at 1024 x 1024, with the noise of a sensor, which a PNG has to keep."""
    rng, paths = np.random.default_rng(0), []
    for file in files:
        pixels = np.asarray(Image.open(file).convert(mode).resize((LARGE, LARGE), Image.Resampling.BICUBIC), np.int16)
        noisy = (pixels + rng.integers(-2, 3, pixels.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{mode}-{file.stem}.png")
        Image.fromarray(noisy).save(paths[-1])
    return paths


def of_preparation(paths: list[Path], mode: str) -> None:
    """Decoding and resizing, ours on all cores."""

    def by_pil() -> np.ndarray:
        small = [Image.open(path).resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB") for path in paths]
        return np.stack([np.asarray(image) for image in small])

    same = np.array_equal(load_images(paths, SIZE), by_pil())
    pil, ours = fastest(by_pil, lambda: load_images(paths, SIZE))
    n = len(paths)
    print(f"prepare {mode:3}: PIL {1e3 * pil / n:.1f} ms an image, ours {1e3 * ours / n:.1f}: {pil / ours:.2f} times")
    print(f"  the same pixels: {same}")


def of_extraction(store: Store, given: argparse.Namespace) -> None:
    """The step against the backbone alone."""
    (category,) = ingest.fn(store.url, given.dataset, str(given.root), [given.category]).categories
    validated = validate.fn(prepare.fn(category, SIZE))
    spec = create("padim").feature_spec()
    assert spec is not None
    backbone, batches = cached_backbone(spec), batches_of(validated)

    def step() -> None:
        store.delete(extract.fn(validated, spec, "cpu"))
        extract.fn(validated, spec, "cpu")

    def bare() -> None:
        for batch in batches:
            backbone(batch)

    def of_timm() -> None:
        for batch in batches:
            timms_own(spec)(batch)

    extract.fn(validated, spec, "cpu")
    show("extract", sum(len(batch) for batch in batches), *fastest(step, bare, of_timm))


def batches_of(validated: Validated) -> list[torch.Tensor]:
    """The stored images, in memory."""
    ids = [sample.id for sample in accepted_samples(validated)]
    source = StoredSource(validated, ids, spec=None, features=None, images=True, batch_size=CHUNK)
    return [batch.images for batch in source if batch.images is not None]


def of_inference(images: np.ndarray) -> None:
    """One image, or 16, at a time; the images are larger than the model takes, as a camera's are."""
    detector = create("padim").fit(images)
    spec = detector.feature_spec()
    assert isinstance(spec, FeatureSpec)
    backbone = cached_backbone(spec)
    small = torch.from_numpy(np.ascontiguousarray(images[:, ::2, ::2]))
    for size in (1, 16):

        def ours(size: int = size) -> None:
            for start in range(0, len(images), size):
                detector.predict(images[start : start + size])

        def bare(size: int = size) -> None:
            for batch in small.split(size):
                backbone(batch)

        def of_timm(size: int = size) -> None:
            for batch in small.split(size):
                timms_own(spec)(batch)

        show(f"padim, batch {size}", len(images), *fastest(ours, bare, of_timm))


@cache
def timms_own(spec: FeatureSpec) -> Callable[[torch.Tensor], object]:
    """The network as timm makes it; the weights do not matter here."""
    network = untrained(spec).eval()

    @torch.no_grad()
    def run(images: torch.Tensor) -> object:
        return network(standardised(images, spec).contiguous())

    return run


def show(what: str, images: int, whole: float, ours: float, timm: float) -> None:
    """Rates, and what share of the two backbones' they are."""
    print(
        f"{what}: {images / whole:.1f} images/s; our backbone {images / ours:.1f}: {100 * ours / whole:.0f} %; ", end=""
    )
    print(f"timm's {images / timm:.1f}: {100 * timm / whole:.0f} %")


def fastest(*parts: Callable[[], object]) -> list[float]:
    """Seconds of each, in turns."""
    seconds = [float("inf")] * len(parts)
    for _ in range(ROUNDS):
        for place, part in enumerate(parts):
            start = time.perf_counter()
            part()
            seconds[place] = min(seconds[place], time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
