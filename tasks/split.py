"""Which good images a detector learns from, and which are held out to calibrate it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from storage.samples import Sample

HELD_OUT = 0.1


def fit_and_calibration(samples: Sequence[Sample], seed: int, train_share: float = 1.0) -> tuple[list[str], list[str]]:
    """Ids to fit on and ids to calibrate on: disjoint, good, never of the test split.

    The data set's own validation split calibrates where it has one; else 10 % of the training images, at least one,
    drawn by hash: the draw of an image does not depend on the others, so a new night's images move none. Where the
    data set tells physical parts, 10 % of the parts are drawn with all their images: a threshold set on a part that
    was learned from would promise too much for a new one.

    With a `train_share` below 1, so many of the ids to fit on are drawn, two at least: a smaller share's are among
    those of a larger one. What calibrates stays the same.
    """
    fitted, held_out = _whole(samples, seed)
    if train_share == 1:
        return fitted, held_out
    ranked = sorted(fitted, key=lambda name: hashlib.sha256(f"{seed}:share:{name}".encode()).digest())
    drawn = set(ranked[: max(2, math.ceil(train_share * len(ranked)))])
    return [name for name in fitted if name in drawn], held_out


def _whole(samples: Sequence[Sample], seed: int) -> tuple[list[str], list[str]]:
    """All ids to fit on, and those to calibrate on."""
    train = [sample for sample in samples if sample.split == "train"]
    own = [sample.id for sample in samples if sample.split == "validation" and sample.label == "good"]
    if own:
        return [sample.id for sample in train], own
    part = {sample.id: sample.part or sample.id for sample in train}
    if len(set(part.values())) == 1:
        part = {name: name for name in part}  # of a single part, nothing would be left to learn from
    ranked = sorted(set(part.values()), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    held_out = set(ranked[: max(1, round(HELD_OUT * len(ranked)))])
    ids = [sample.id for sample in train]
    return [name for name in ids if part[name] not in held_out], [name for name in ids if part[name] in held_out]
