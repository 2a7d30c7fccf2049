"""Hold good training images out, and draw synthetic defects into half of them: what parameters are chosen by.

The result is a data set in the layout of MVTec AD, judged like any other. No image of the test split is in it, and no
mask of the real data set is opened. Synthetic defects rank parameters; they promise no figure on real ones, and rank no
method that learns from synthetic defects against one that does not.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from al_models.errors import InvalidInput
from al_models.parts.defects import Defect, cut_paste, perlin_composite, scar, scratch, stain
from al_models.parts.images import Decoded, decode
from storage.errors import DatasetError
from storage.files import read_image
from storage.samples import Sample, parse_box
from storage.store import Store
from storage.whole import made_anew
from tasks.core.handles import Validated
from tasks.core.policy import DEFAULTS, Severity
from tasks.core.progress import Progress
from tasks.core.steps import code_fingerprint, step
from tasks.core.stored import accepted_samples
from tasks.prepare import white_of

# Smaller and fainter than what methods learn from: what every parameter finds ranks none of them.
KINDS: Mapping[str, Defect] = MappingProxyType(
    {
        "cut_paste": partial(cut_paste, area=(0.002, 0.03)),
        # A few large cells make one or two spots, as a real defect would, instead of specks all over the image.
        "perlin_composite": partial(perlin_composite, cells=(2, 4), opacity=(0.2, 0.8)),
        "scar": scar,
        "scratch": scratch,
        "stain": partial(stain, radius=(0.02, 0.08)),
    }
)
"""Folder name -> defect."""

FOLDER = "search-data"
"""In the report's folder: where such data sets lie."""
_ALWAYS = {"not_empty", "readable", "one_label", "unique_in_split", "mask_size", "enough_training_images"}
RULES: Mapping[str, Severity] = MappingProxyType({rule: "off" for rule in DEFAULTS if rule not in _ALWAYS})
"""Rules of validation: the images were accepted before, and nothing may set them aside for what was drawn into them."""
FEWEST = 4
"""Good training images: two to learn from, one that stays good, and one with a defect."""
_MARK = "split.json"


@dataclass(frozen=True)
class Split:
    """Good images by what they serve for in a search; each in one place, and in the order of their ids."""

    learned: tuple[Sample, ...]
    calibration: tuple[Sample, ...]
    """The data set's own validation split, where it has one."""
    good: tuple[Sample, ...]
    defective: tuple[Sample, ...]
    """Those that defects are drawn into."""

    def as_names(self) -> dict[str, list[str]]:
        """The ids in each place."""
        return {place: [sample.id for sample in samples] for place, samples in vars(self).items()}


def split_of(samples: Sequence[Sample], share: float, seed: int) -> Split:
    """The training images that are held out, drawn by hash, parts with all their images; and what each half serves for.

    At least two are held out and two are left to learn from. Raises DatasetError where there are not so many.
    """
    train = sorted((s for s in samples if s.split == "train" and s.label == "good"), key=lambda sample: sample.id)
    if len(train) < FEWEST:
        raise DatasetError(
            f"{len(train)} good training images were accepted, a search needs at least {FEWEST}: two to learn from, "
            "one that stays good and one to draw a defect into; add some, or name the parameters without a search"
        )
    wanted = min(max(2, round(share * len(train))), len(train) - 2)
    drawn = _drawn(train, wanted, seed, by_part=True)
    if not 2 <= len(drawn) <= len(train) - 2:  # too few parts to keep them together
        drawn = _drawn(train, wanted, seed, by_part=False)
    held_out = sorted((s for s in train if s.id in drawn), key=lambda sample: _rank(seed, "half", sample.id))
    by_id = partial(sorted, key=lambda sample: sample.id)
    return Split(
        learned=tuple(sample for sample in train if sample.id not in drawn),
        calibration=tuple(by_id(s for s in samples if s.split == "validation" and s.label == "good")),
        good=tuple(by_id(held_out[1::2])),
        defective=tuple(by_id(held_out[::2])),
    )


def split_of_held_out(samples: Sequence[Sample], fitted: Sequence[str], held_out: Sequence[str], seed: int) -> Split:
    """The split in which only images that a model did not learn from are judged; two of the others stand for those it
    learned from.

    Raises DatasetError where fewer than two are held out.
    """
    by_id = {sample.id: sample for sample in samples}
    ranked = sorted(dict.fromkeys(held_out), key=lambda name: _rank(seed, "half", name))
    if len(ranked) < 2:
        raise DatasetError(f"{len(ranked)} good images are held out; two are needed, one of them to draw a defect into")
    good, defective = (tuple(by_id[name] for name in sorted(half)) for half in (ranked[1::2], ranked[::2]))
    return Split(tuple(by_id[name] for name in sorted(fitted)[:2]), (), good, defective)


def _drawn(train: Sequence[Sample], wanted: int, seed: int, by_part: bool) -> set[str]:
    """Ids of at least so many images, whole parts where asked."""
    parts: dict[str, list[str]] = {}
    for sample in train:
        parts.setdefault((by_part and sample.part) or sample.id, []).append(sample.id)
    drawn: set[str] = set()
    for name in sorted(parts, key=lambda name: _rank(seed, "held out", name)):
        if len(drawn) < wanted:
            drawn |= set(parts[name])
    return drawn


def _rank(seed: int, what: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{what}:{name}".encode()).digest()


@step("hold out", "hold out {validated.name}")
def hold_out(validated: Validated, folder: str, share: float, seed: int) -> str:
    """Root of the data set, a folder of this one: made, or found again by the name of its content.

    It has one category, `<data set>.<category>`, at the images' own resolution. The folder appears whole or not at all.
    Raises DatasetError where there are too few images or where they cannot be drawn into.
    """
    return put(validated, folder, split_of(accepted_samples(validated), share, seed), seed)


def put(validated: Validated, folder: str, split: Split, seed: int) -> str:
    """The data set of a split, as `hold_out` gives it."""
    made_of = {"of": validated.name, "seed": seed, "code": code_fingerprint(__name__), **split.as_names()}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(folder) / digest
    if _is_whole(root):
        return str(root)
    with made_anew(root, partial(_is_whole, root)) as new:
        files = _write(new, validated, split, seed)
        (new / _MARK).write_text(json.dumps({**made_of, "files": files}, indent=1, sort_keys=True), encoding="utf-8")
    return str(root)


def _is_whole(root: Path) -> bool:
    """Whether nothing has gone since it was made."""
    try:
        files = json.loads((root / _MARK).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(sum(len(names) for _, _, names in os.walk(root)) >= files)


def _write(root: Path, validated: Validated, split: Split, seed: int) -> int:
    """Every file of the data set; their number, the mark included."""
    category = root / validated.name.replace("/", ".")
    images = sum(len(names) for names in split.as_names().values())
    progress, done, files = Progress(f"hold out {validated.name}"), 0, 1
    store = Store(validated.category.store)
    listed = store.get(validated.category.catalogue)
    read = Reader(Path(validated.category.root), listed.meta["folders"], white_of(store, validated.prepared.images))
    for samples, place in ((split.learned, "train"), (split.calibration, "validation"), (split.good, "test")):
        for sample in samples:
            name, data = read.unchanged(sample)
            _put(category / place / "good" / name, data)
            progress("", done := done + 1, images)
            files += 1
    for number, sample in enumerate(split.defective):
        kind = list(KINDS)[number % len(KINDS)]
        image, mask = read.with_defect(sample, KINDS[kind], seed)
        _put(category / "test" / kind / f"{sample.id}.png", _png(image))
        _put(category / "ground_truth" / kind / f"{sample.id}_mask.png", _png(mask.astype(np.uint8) * 255))
        progress("", done := done + 1, images)
        files += 2
    return files


@dataclass(frozen=True)
class Reader:
    """Images of a category as they were hashed."""

    root: Path
    folders: Sequence[str] = (".",)
    white: float | None = None
    """End of the range that values of more than 8 bits are scaled from."""

    def unchanged(self, sample: Sample) -> tuple[str, bytes]:
        """A name and the file's own bytes; of a box of a file, or one of more than 8 bits, what a method sees of it."""
        # A copy, not a link: who edits an image in place would change what the folder's name promises.
        data = read_image(self.root, sample, self.folders)
        if sample.box is None and self.white is None:
            return f"{sample.id}{Path(sample.path).suffix}", data
        return f"{sample.id}.png", _png(_pixels(decode(data, self.white), sample))

    def with_defect(self, sample: Sample, defect: Defect, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The image with a defect, and the pixels that it covers; gray stays gray, 16 bits become 8 as for a method."""
        pixels = _pixels(decode(read_image(self.root, sample, self.folders), self.white), sample)  # (h, w) or (h, w, 3)
        rng = np.random.default_rng(int.from_bytes(_rank(seed, "defect", sample.id)))
        colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
        try:
            image, mask = defect(colour, rng)
        except InvalidInput as error:
            raise DatasetError(
                f"no synthetic defect can be drawn into {sample.key}: {error}; or set such images aside (`min_side`)"
            ) from error
        if pixels.ndim == 2:  # a tint would tell the defect from all that a gray camera sees
            image = np.where(mask, np.rint(image.mean(axis=2)).astype(np.uint8), pixels)
        return image, mask


def _pixels(decoded: Decoded, sample: Sample) -> np.ndarray:
    if sample.box is None:
        return decoded.pixels
    x, y, width, height = parse_box(sample.box)
    return decoded.pixels[y : y + height, x : x + width]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)  # a third of the default's time, and hardly larger
    return buffer.getvalue()


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
