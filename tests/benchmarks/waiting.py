"""How long a training waits for the store: features in memory, and features that do not fit.

    python tests/benchmarks/waiting.py mvtec_ad DATA grid [--method fastflow] [--epochs 3]

A method learns from stored features as the step `fit` does; then again with room for a quarter of them in memory, so
that windows are read in the background while it learns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass

from al_models import Runtime, create
from al_models.parts import epochs
from tasks.core.stored import StoredSource, accepted_samples
from tasks.extract import extract
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.validate import validate


@dataclass
class Waits:
    """Every `Epochs` made while it is in place."""

    made: list[epochs.Epochs]
    in_memory: int

    def __call__(self, *args: object, **more: object) -> epochs.Epochs:
        made = epochs.Epochs(*args, in_memory=self.in_memory, **more)  # type: ignore[arg-type]
        self.made.append(made)
        return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("root")
    parser.add_argument("category")
    parser.add_argument("--method", default="fastflow")
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    detector = create(given.method, epochs=given.epochs)
    spec = detector.feature_spec()
    assert spec is not None
    with tempfile.TemporaryDirectory() as store:
        (category,) = ingest.fn(store, given.dataset, given.root, [given.category]).categories
        validated = validate.fn(prepare.fn(category, spec.image_size))
        features = extract.fn(validated, spec, "cpu")
        ids = [sample.id for sample in accepted_samples(validated) if sample.split == "train"]
        pixels = detector.traits.needs_images
        source = StoredSource(validated, ids, spec=spec, features=features, images=pixels, batch_size=32)
        size = epochs._size(source.read([0])) * len(ids)
        for what, room in (("in memory", size), ("a quarter in memory", size // 4)):
            measured(given, source, what, room)


def measured(given: argparse.Namespace, source: StoredSource, what: str, room: int) -> None:
    """One fit."""
    from al_models import trained

    waits, before = Waits([], room), trained.Epochs
    trained.Epochs = waits  # type: ignore[misc, assignment]
    start = time.perf_counter()
    create(given.method, epochs=given.epochs).fit(source, Runtime())
    seconds = time.perf_counter() - start
    trained.Epochs = before  # type: ignore[misc]
    waited = sum(one.waited_s for one in waits.made)
    share = f"{waited:.2f} s of it waiting: {100 * waited / seconds:.1f} %"
    print(f"{what} ({room / 2**20:.0f} MiB): {seconds:.1f} s, {share}")


if __name__ == "__main__":
    main()
