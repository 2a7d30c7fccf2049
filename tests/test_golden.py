"""Golden values: what each method gave on small seeded images, so that a change of its numbers is seen.

A new method, or a change that is meant, is written down by `python tests/test_golden.py METHOD ...`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from al_models import METHODS, Runtime
from al_models.checks import check_images, quick_detector
from al_models.registry import detector_class

GOLDEN = Path(__file__).with_name("golden.json")
QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)
TOLERANCE = 1e-3
"""Relative; processors and libraries round differently, and a training passes that on."""


def measured(method):
    """Scores of three good and two anomalous images, and quantiles of all their pixels."""
    detector = quick_detector(detector_class(method))
    images, runtime = check_images(detector.image_size), Runtime(seed=7)
    found = detector.fit(images.train, runtime).predict(images.test, runtime)
    return {
        "scores": [float(f"{score:.6g}") for score in found.scores],
        "map_quantiles": [float(f"{value:.6g}") for value in np.quantile(found.maps, QUANTILES)],
        "map_means": [float(f"{value:.6g}") for value in found.maps.mean(axis=(1, 2), dtype=np.float64)],
    }


def write(methods):
    """Measure these methods and put them into the file, beside what it holds; methods that are gone leave it."""
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    known |= {method: measured(method) for method in methods}
    kept = {method: known[method] for method in METHODS if method in known}
    GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_its_golden_values(method):
    golden = json.loads(GOLDEN.read_text())
    if method not in golden:
        pytest.fail(f"{method} has no golden values; look at its results, then: python tests/test_golden.py {method}")
    found = measured(method)
    assert found.keys() == golden[method].keys()
    for name, expected in golden[method].items():
        assert found[name] == pytest.approx(expected, rel=TOLERANCE, abs=1e-6), name


def test_no_golden_values_of_methods_that_are_gone():
    assert set(json.loads(GOLDEN.read_text())) <= set(METHODS)


if __name__ == "__main__":
    write(sys.argv[1:] or sorted(METHODS))
