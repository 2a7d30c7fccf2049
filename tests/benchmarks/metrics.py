"""Pixel metrics: seconds, peak memory and growth of ours, against scikit-learn's AUROC alone and anomalib 2.7.

    python tests/benchmarks/metrics.py [--images 160] [--peer-images 8] [--anomalib ENV/bin/python]

Maps are synthetic and seeded, 1024 x 1024 float16, every other one with a mask. Ours: AUROC, AP, F1-max, IoU-max and
PRO up to 0.3, 0.05 and 0.01 together, from maps and masks. scikit-learn (`roc_auc_score`, on `--peer-images` of the
same maps, already flattened) and anomalib (AUROC + AUPRO, at 256 and 512 px) sort all pixels, so per pixel they are
slower the more images there are: fewer images than ours favour them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 1024
PEER_SIZES = (256, 512)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--peer-images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="of which the fastest counts, for everyone alike")
    parser.add_argument("--anomalib", type=Path, help="python of an environment with anomalib 2.7")
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)  # what this script runs in that environment
    given = parser.parse_args()
    if given.judge:
        print(json.dumps(judged_by_anomalib(given.judge, given.repeats)))
        return
    per_pixel = ours(given.images, given.repeats)
    against_sklearn(given.peer_images, given.repeats, per_pixel)
    if given.anomalib:
        for size in PEER_SIZES:
            against_anomalib(given.anomalib, given.peer_images, size, given.repeats)


def image(index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Map float16 and mask bool, [size, size]; the same for the same index."""
    from al_models.metrics import resize_map

    rng = np.random.default_rng(index)
    coarse = resize_map(rng.standard_normal((size // 8, size // 8)).astype(np.float32), (size, size))
    mask = np.zeros((size, size), bool)
    for _ in range(3 * (index % 2)):
        y, x = rng.integers(0, size * 3 // 4, 2)
        h, w = rng.integers(size // 64, size // 6, 2)
        mask[y : y + h, x : x + w] = True
    return (0.2 + 0.05 * coarse + 0.05 * mask).astype(np.float16), mask


def seconds_of_ours(maps: list[np.ndarray], masks: list[np.ndarray]) -> tuple[float, dict[str, float]]:
    """Counting all and asking for the metrics."""
    from al_models.metrics import PixelCounts

    start = time.perf_counter()
    counts = PixelCounts()
    for i, (map, mask) in enumerate(zip(maps, masks, strict=True)):
        counts.add(str(i), map, mask)
    found = counts.metrics()
    return time.perf_counter() - start, found


def ours(n: int, repeats: int) -> float:
    """Seconds a pixel over n images that are read one by one; prints growth and peak memory."""
    from al_models.metrics import PixelCounts

    before = peak_mib()
    best = np.full(n + 1, np.inf)  # of each image, and of the metrics
    for _ in range(repeats):
        counts = PixelCounts()
        for i in range(n):
            map, mask = image(i, SIZE)
            start = time.perf_counter()
            counts.add(str(i), map, mask)
            best[i] = min(best[i], time.perf_counter() - start)
        start = time.perf_counter()
        found = counts.metrics()
        best[n] = min(best[n], time.perf_counter() - start)
    print(", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    for part in sorted({max(1, n // 4), max(1, n // 2), n}):
        total = best[:part].sum() + best[n]
        print(f"ours {part:5} maps of {SIZE} px: {total:7.3f} s, {1e9 * total / (part * SIZE**2):.2f} ms a megapixel")
    print(f"peak memory {peak_mib():.0f} MiB, of which {before:.0f} MiB before the first map")
    return float(best.sum() / (n * SIZE**2))


def against_sklearn(n: int, repeats: int, per_pixel: float) -> None:
    """Prints how many times longer `roc_auc_score` takes for a pixel."""
    from sklearn.metrics import roc_auc_score

    maps, masks = zip(*(image(i, SIZE) for i in range(n)), strict=True)
    scores, labels = np.concatenate(maps, axis=None).astype(np.float32), np.concatenate(masks, axis=None)
    theirs, found = np.inf, 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        found = float(roc_auc_score(labels, scores))
        theirs = min(theirs, time.perf_counter() - start)
    same, metrics = seconds_of_ours(list(maps), list(masks))
    print(f"scikit-learn's roc_auc_score alone, {n} maps: {theirs:.3f} s, ours of the same maps {same:.3f} s")
    ratio, apart = theirs / (n * SIZE**2) / per_pixel, abs(found - metrics["pixel_auroc"])
    print(f"a pixel: {ratio:.0f} times ours; AUROC apart {apart:.1e}")


def against_anomalib(python: Path, n: int, size: int, repeats: int) -> None:
    """Prints how many times longer anomalib's AUROC and AUPRO take on the same maps, in float32 as it wants them."""
    pairs = [image(i, size) for i in range(10 * n)]
    maps, masks = [map.astype(np.float32) for map, _ in pairs], [mask for _, mask in pairs]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "maps.npz"
        np.savez(file, maps=np.stack(maps), masks=np.stack(masks))
        command = [python, __file__, "--judge", file, "--repeats", str(repeats)]
        said = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
    theirs: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    seconds, found = min((seconds_of_ours(maps, masks) for _ in range(repeats)), key=lambda run: run[0])
    apart = max(abs(theirs["auroc"] - found["pixel_auroc"]), abs(theirs["aupro"] - found["pro"]))
    print(
        f"anomalib, {len(maps)} maps of {size} px: AUROC {theirs['auroc_s']:.3f} s, AUPRO {theirs['aupro_s']:.3f} s; "
        f"ours {seconds:.3f} s: {(theirs['auroc_s'] + theirs['aupro_s']) / seconds:.0f} times; apart {apart:.1e}"
    )


def judged_by_anomalib(file: Path, repeats: int) -> dict[str, float]:
    """anomalib's AUROC and AUPRO of saved maps and the seconds they took, the fastest of a few."""
    import torch
    from anomalib.metrics.aupro import _AUPRO
    from anomalib.metrics.auroc import _AUROC

    saved = np.load(file)
    maps, masks = torch.tensor(saved["maps"]), torch.tensor(saved["masks"]).int()
    found: dict[str, float] = {}
    for name, metric in (("auroc", _AUROC), ("aupro", _AUPRO)):
        best = np.inf
        for _ in range(repeats):
            start = time.perf_counter()
            judge = metric()
            judge.update(maps, masks)
            found[name] = float(judge.compute())
            best = min(best, time.perf_counter() - start)
        found[f"{name}_s"] = best
    return found


def peak_mib() -> float:
    """Most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
