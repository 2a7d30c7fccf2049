"""Greedy coreset: seconds and memory of ours against a plain greedy loop and anomalib 2.7's.

    python tests/benchmarks/coreset.py [--data FOLDER] [--patches 270000] [--ratio 0.1] [--anomalib ENV/bin/python]

Patches are PatchCore's (stages 2 and 3 of EfficientNet-Lite0 at 256 px, 152 values) of the training images below
FOLDER, or clusters drawn at random without it. The plain loop is one `addmv` over all patches a centre; it and
anomalib's are timed on `--centres` centres and multiplied, since every centre costs them the same. That ours chooses
the same centres is checked on the first of them, and all the way on a smaller set.
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

import numpy as np

SMALL = 20_000
CHANNELS = 152


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/good below it")
    parser.add_argument("--patches", type=int, default=270_000)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--centres", type=int, default=100, help="timed of the others")
    parser.add_argument("--anomalib", type=Path, help="python of an environment with anomalib 2.7")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)  # what this script runs in that environment
    given = parser.parse_args()
    if given.theirs:
        print(json.dumps(by_anomalib(np.load(given.theirs), given.centres)))
        return
    compare(given)


def compare(given: argparse.Namespace) -> None:
    """Ours on all patches, the others on some centres."""
    import torch

    from al_models.parts.coreset import greedy_coreset

    points = (patches(given.data) if given.data else clusters(given.patches))[: given.patches]
    count = round(given.ratio * len(points))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    rows = greedy_coreset(points, count)
    ours = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(points)} x {points.shape[1]} to {count} on {torch.get_num_threads()} threads")
    print(f"ours     {ours:8.1f} s, {1e3 * ours / count:7.3f} ms a centre; peak {peak:.0f} MiB, {before:.0f} before")
    start = time.perf_counter()
    first = plain_greedy(points, given.centres)
    plain = (time.perf_counter() - start) / given.centres
    print(f"plain    {plain * count:8.1f} s, {1e3 * plain:7.3f} ms a centre: {plain * count / ours:.1f} times ours")
    small = points[:: max(1, len(points) // SMALL)]
    chosen, expected = (choose(small, len(small) // 10) for choose in (greedy_coreset, plain_greedy))
    shared = len(set(chosen.tolist()) & set(expected.tolist()))
    print(
        f"of {len(small)} the same {shared} of {len(expected)} centres; {leading(chosen, expected)} in the same order"
    )
    print(f"of all the first {leading(first, rows)} of {given.centres} timed ones in the same order")
    radii = [covering_radius(points, part) for part in (rows, rows[:-1])]
    print(f"covering radius {radii[0]:.4f}, without the last centre {radii[1]:.4f}")
    if given.anomalib:
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            np.save(file, points.numpy())
            file.flush()
            command = [given.anomalib, __file__, "--theirs", file.name, "--centres", str(given.centres)]
            theirs = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
        print(
            f"anomalib {theirs * count:8.1f} s, {1e3 * theirs:7.3f} ms a centre: {theirs * count / ours:.1f} times ours"
        )


def plain_greedy(points, count):
    """Gonzalez 1985, one pass over all points a centre."""
    import torch

    norms = points.square().sum(1)
    nearest, distances = torch.full_like(norms, torch.inf), torch.empty_like(norms)
    rows = [0]
    for _ in range(count - 1):
        row = rows[-1]
        torch.addmv(norms, points, points[row], alpha=-2, out=distances).add_(norms[row])
        torch.minimum(nearest, distances, out=nearest)
        nearest[row] = -1
        rows.append(int(nearest.argmax()))
    return torch.tensor(rows)


def leading(chosen, expected) -> int:
    """How many agree from the start on; equally far points may come in another order."""
    both = min(len(chosen), len(expected))
    apart = (chosen[:both] != expected[:both]).nonzero()
    return int(apart[0]) if len(apart) else both


def covering_radius(points, rows):
    """Largest distance of a point to its nearest centre."""
    from al_models.parts.neighbors import nearest

    return float(nearest(points, points[rows])[0].max())


def by_anomalib(points: np.ndarray, centres: int) -> float:
    """Seconds a centre."""
    import torch
    from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy

    sampler = KCenterGreedy(torch.from_numpy(points), centres / len(points))
    sampler.select_coreset_idxs()  # once for the projection's own set-up
    start = time.perf_counter()
    sampler.select_coreset_idxs()
    return (time.perf_counter() - start) / centres


def patches(folder: Path):
    """Of the good training images."""
    from al_models import create
    from al_models.parts.patches import patch_vectors
    from al_models.parts.sources import MemorySource
    from al_models.types import Runtime

    files = sorted(folder.rglob("train/good/*"))
    if not files:
        sys.exit(f"{folder} holds no train/good/*; give the folder of a data set or category")
    detector = create("patchcore")
    return patch_vectors(MemorySource(files, detector, Runtime()), detector.layers, pool=3, device="cpu")


def clusters(count: int):
    """Clusters of various width: float32 (count, 152)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(500, CHANNELS, generator=generator)
    which = torch.randint(0, 500, (count,), generator=generator)
    width = 0.1 + 0.4 * torch.rand(500, 1, generator=generator)
    return centres[which] + width[which] * torch.randn(count, CHANNELS, generator=generator)


if __name__ == "__main__":
    main()
