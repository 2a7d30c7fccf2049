"""Seconds and memory of a fit as the number of training images grows: a table, and a plot beside it.

    python tests/benchmarks/scaling.py mvtec_ad DATA grid [--plot scaling.svg]

Fits read stored features, each in a process of its own; 1/8, 1/4, 1/2 and all of the category's training images.
Memory is the process's peak beyond what it held before the fit.
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

SHARES = (8, 4, 2, 1)
METHODS = {"padim": {}, "patchcore": {"coreset_ratio": 0.1}}
COLOURS = {"padim": "#1f77b4", "patchcore": "#d62728"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("root")
    parser.add_argument("category")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--fit", help=argparse.SUPPRESS)  # what this script runs in a process of its own
    given = parser.parse_args()
    if given.fit:
        print(json.dumps(fitted(given, **json.loads(given.fit))))
        return
    found: dict[str, list[tuple[int, float, float]]] = {}
    with tempfile.TemporaryDirectory() as store:
        alone(given, store, "padim", 1)  # extracts the features, which is not to count
        for method in METHODS:
            for share in SHARES:
                images, seconds, memory = alone(given, store, method, share)
                found.setdefault(method, []).append((images, seconds, memory))
                print(f"{method:10} {images:5} images {seconds:7.2f} s {memory:7.0f} MiB", flush=True)
    if given.plot:
        given.plot.write_text(plot(found), encoding="utf-8")


def alone(given: argparse.Namespace, store: str, method: str, share: int) -> tuple[int, float, float]:
    """`fitted` in a process of its own."""
    said = json.dumps({"store": store, "method": method, "share": share})
    command = [sys.executable, __file__, given.dataset, given.root, given.category, "--fit", said]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    images, seconds, memory = json.loads(out)
    return images, seconds, memory


def fitted(given: argparse.Namespace, store: str, method: str, share: int) -> tuple[int, float, float]:
    """Images, seconds and MiB of one fit."""
    from al_models import Runtime, create
    from tasks.core.stored import StoredSource, accepted_samples
    from tasks.extract import extract
    from tasks.ingest import ingest
    from tasks.prepare import prepare
    from tasks.validate import validate

    detector = create(method, **METHODS[method])
    spec = detector.feature_spec()
    assert spec is not None
    (category,) = ingest.fn(store, given.dataset, given.root, [given.category]).categories
    validated = validate.fn(prepare.fn(category, spec.image_size))
    features = extract.fn(validated, spec, "cpu")
    ids = [sample.id for sample in accepted_samples(validated) if sample.split == "train"][::share]
    source = StoredSource(validated, ids, spec=spec, features=features, images=False)
    source.read([0])
    before, start = peak(), time.perf_counter()
    detector.fit(source, Runtime())
    return len(ids), time.perf_counter() - start, peak() - before


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plot(found: dict[str, list[tuple[int, float, float]]]) -> str:
    """Seconds and memory over images, as SVG."""
    panels = [("seconds", 1), ("MiB", 2)]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 240" font-family="sans-serif" font-size="11">']
    parts.append('<rect width="640" height="240" fill="white"/>')
    most = max(row[0] for rows in found.values() for row in rows)
    for place, (name, column) in enumerate(panels):
        left, highest = 50 + 320 * place, max(row[column] for rows in found.values() for row in rows) or 1
        parts.append(f'<path d="M{left} 20V200H{left + 240}" fill="none" stroke="black"/>')
        parts.append(f'<text x="{left}" y="14">{name}, up to {highest:.3g}</text>')
        parts.append(f'<text x="{left + 240}" y="216" text-anchor="end">images, up to {most}</text>')
        for row, (method, rows) in enumerate(found.items()):
            points = " ".join(f"{left + 240 * r[0] / most:.1f},{200 - 170 * r[column] / highest:.1f}" for r in rows)
            colour = COLOURS[method]
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<text x="{left + 8}" y="{34 + 14 * row}" fill="{colour}">{method}</text>')
    return "\n".join([*parts, "</svg>"])


if __name__ == "__main__":
    main()
