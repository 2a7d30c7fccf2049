"""Which good images a detector learns from, and which are held out to calibrate it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

from storage.samples import Sample

HELD_OUT = 0.1


def fit_and_calibration(samples: Sequence[Sample], seed: int, train_share: float = 1.0) -> tuple[list[str], list[str]]:
    """Ids to fit on and ids to calibrate on: disjoint, good, never of the test split.

    The data set's own validation split calibrates where it has one; else 10 % of the training images, at least one,
    drawn by hash. Where the data set tells physical parts, 10 % of the parts are drawn with all their images: a
    threshold set on a part that was learned from would promise too much for a new one.

    With a `train_share` below 1, so many of the ids to fit on are drawn, two at least: a smaller share's are among
    those of a larger one. What calibrates stays the same.
    """
    fitted, held_out = _whole(samples, seed)
    if train_share == 1:
        return fitted, held_out
    ranked = sorted(fitted, key=lambda name: hashlib.sha256(f"{seed}:share:{name}".encode()).digest())
    drawn = set(ranked[: max(2, math.ceil(train_share * len(ranked)))])
    return [name for name in fitted if name in drawn], held_out


def with_new_images(
    samples: Sequence[Sample], seed: int, fitted: Collection[str], held_out: Collection[str]
) -> tuple[list[str], list[str]]:
    """Ids as `fit_and_calibration` gives them, where some were fitted on and held out before: those stay what they are,
    and of what is new so much is held out that it is 10 % of all again. A draw from all would move fitted images to
    those held out most nights, and a fit that goes on from an earlier one cannot forget them.

    Where parts were divided otherwise before, or nothing is left to hold out, the draw is from all.
    """
    part = _parts(samples)
    if part is None:
        return _whole(samples, seed)
    learned, kept = ({part[name] for name in names if name in part} for names in (fitted, held_out))
    new = [one for one in _ranked(part, seed) if one not in learned | kept]
    kept |= set(new[: max(0, _held_out_of(part) - len(kept))])
    return _whole(samples, seed) if learned & kept or not kept else _divided(samples, part, kept)


def _whole(samples: Sequence[Sample], seed: int) -> tuple[list[str], list[str]]:
    """All ids to fit on, and those to calibrate on."""
    part = _parts(samples)
    if part is None:
        own = [sample.id for sample in samples if sample.split == "validation" and sample.label == "good"]
        return [sample.id for sample in samples if sample.split == "train"], own
    return _divided(samples, part, set(_ranked(part, seed)[: _held_out_of(part)]))


def _parts(samples: Sequence[Sample]) -> dict[str, str] | None:
    """Training image -> the part it shows, where the data set tells any, or itself; None where the data set has a
    validation split of its own."""
    if any(sample.split == "validation" and sample.label == "good" for sample in samples):
        return None
    train = [sample for sample in samples if sample.split == "train"]
    part = {sample.id: sample.part or sample.id for sample in train}
    if len(set(part.values())) == 1:
        return {name: name for name in part}  # of a single part, nothing would be left to learn from
    return part


def _ranked(part: Mapping[str, str], seed: int) -> list[str]:
    return sorted(set(part.values()), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def _held_out_of(part: Mapping[str, str]) -> int:
    """How many parts are held out."""
    return max(1, round(HELD_OUT * len(set(part.values()))))


def _divided(
    samples: Sequence[Sample], part: Mapping[str, str], held_out: Collection[str]
) -> tuple[list[str], list[str]]:
    ids = [sample.id for sample in samples if sample.split == "train"]
    return [name for name in ids if part[name] not in held_out], [name for name in ids if part[name] in held_out]
