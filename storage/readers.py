"""What readers of several layouts share: options, the root, masks by name, labels by masks, files without a place."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from storage.errors import DatasetError, MaskError
from storage.listing import (
    IMAGE_SUFFIXES,
    Listing,
    SetAside,
    entries_in,
    existing_folder,
    inside,
    is_hidden,
    subfolders,
)
from storage.masks import decode_mask
from storage.samples import Label, Sample, Split, parse_box

# Options.


def check_option(name: str, value: object, allowed: bool, expected: str) -> None:
    """Raises DatasetError, saying what was given and what is expected, for an option's value that is not allowed."""
    if not allowed:
        raise DatasetError(f"{name} was {value!r}, expected {expected}")


def check_draw(name: str, share: float, seed: int, *, zero: bool = False) -> None:
    """Raises DatasetError unless the share, an option of this name, is above 0 (`zero`: or 0) and below 1."""
    number = isinstance(share, int | float) and not isinstance(share, bool)
    expected = f"a share {'of at least' if zero else 'above'} 0 and below 1, such as 0.25"
    check_option(name, share, number and (0 < share < 1 or (zero and share == 0)), expected)
    check_option("seed", seed, type(seed) is int, "a whole number, such as 0")


def drawn(names: Iterable[str], share: float, seed: int) -> set[str]:
    """A share of the names (images, or physical parts), drawn by hash: at least one, and not all of two or more.

    Whether a name is drawn hardly depends on the others, and not at all on order, machine or library. Raises
    DatasetError for a share that is not between 0 and 1.
    """
    check_draw("share", share, seed)
    known = sorted(set(names))
    ranked = sorted(known, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    count = min(max(1, round(share * len(known))), max(1, len(known) - 1))
    return set(ranked[:count])


# Folders.


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One folder of images in a category, and what lying in it says about them."""

    path: str
    """Within the category."""
    split: Split
    label: Label
    defect_type: str
    masks: str | None = None
    """Folder of their masks, each a file or a folder named like its image, or with `_mask` after it."""
    xyz: str | None = None
    """Folder of their 3-D points, named like the images."""


def find_root(root: Path, fits: Callable[[Path], bool], what: str, tree: str) -> Path:
    """The folder if it fits, else the only one in it that does. Raises DatasetError, which says `what` was expected.

    A folder around the one given is never taken, as nobody gave it; the error names it where it fits.
    """
    root = existing_folder(root)
    if fits(root):
        return root
    within = [name for name in subfolders(root) if fits(root / name)]
    if len(within) > 1:
        raise DatasetError(f"{root} holds several data sets ({', '.join(within)}); give one of these folders as root")
    if within:
        return inside(root, within[0])
    hint = f"; {root.parent}, which it lies in, has: give it as root if it is meant" if fits(root.parent) else ""
    raise DatasetError(f"{root} has no {what}, nor has a folder in it{hint}; expected is\n{tree}")


def is_tree(folder: Path, train: str = "train/good") -> bool:
    """Whether a folder is a category, which has a folder of images to learn from, or one of its folders is."""
    return any(os.path.isdir(place / train) for place in (folder, *(folder / name for name in subfolders(folder))))


def plain(name: str) -> str:
    """A name in small letters, with `_` for blanks and hyphens."""
    return re.sub(r"[-_\s]+", "_", name.strip().lower())


def named(folder: Path, name: str) -> Path:
    """The folder in a folder that has this plain name; it may be missing. Raises DatasetError where several have it."""
    same = [known for known in subfolders(folder) if plain(known) == name]
    if len(same) > 1:
        raise DatasetError(f"{folder} holds {' and '.join(same)}, which mean the same; keep one")
    return folder / (same or [name])[0]


# Masks, and the labels that follow from them.


_SUFFIXES = frozenset(IMAGE_SUFFIXES)


def stem(path: str) -> str:
    """The name of an image without its extension; of a folder, its name."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[:dot] if dot > 0 and name[dot:].lower() in _SUFFIXES else name


def fold(name: str) -> str:
    """A name as people see it: composed Unicode (archives from a Mac have it decomposed), in small letters."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def same_stem(images: Iterable[str]) -> list[list[str]]:
    """Images that share folder and stem, such as 000.png and 000.jpg: a mask named like them may be of either."""
    images = list(images)
    if len({path[: path.rfind("/") + 1] + stem(path) for path in images}) == len(images):
        return []
    groups: dict[str, list[str]] = {}
    for image in images:
        groups.setdefault(f"{image.rpartition('/')[0]}/{stem(image)}", []).append(image)
    return [group for group in groups.values() if len(group) > 1]


def pair(images: Iterable[str], masks: Iterable[str], *endings: str) -> dict[str, str | None]:
    """Image -> the mask named like it with one of the endings, tried in order, or None; of equal names the first.

    A mask whose name differs in case or in the form of its Unicode alone is taken where no other could be meant. Two
    images of one stem have none.
    """
    images, by_stem = list(images), dict[str, str]()
    for mask in masks:
        by_stem.setdefault(stem(mask), mask)
    if not by_stem:
        return dict.fromkeys(images)
    twins = {image for group in same_stem(images) for image in group}
    mask_of = {
        image: next((by_stem[name] for name in (stem(image) + end for end in endings) if name in by_stem), None)
        for image in images
        if image not in twins
    }
    alike: dict[str, list[str]] = {}
    for name in by_stem.keys() - {stem(mask) for mask in mask_of.values() if mask is not None}:
        alike.setdefault(fold(name), []).append(by_stem[name])
    alone = Counter(fold(stem(image)) for image in images)
    for image, mask in mask_of.items():
        if mask is None and alike and alone[fold(stem(image))] == 1:
            meant = next((alike[name] for end in endings if (name := fold(stem(image) + end)) in alike), [])
            mask_of[image] = meant[0] if len(meant) == 1 else None
    return {image: mask_of.get(image) for image in images}


_MASK = "(?:defect|anomaly)?[-_. ]?(?:masks?|gt|ground[-_ ]?truths?|labels?|seg|segmentations?|annotations?|annot|anno)"
_MASK_WORD = re.compile("mask|gt|ground|label|seg|anno")
"""In each name that the next two match; to look for it takes a tenth of the time."""
_MASK_AFTER = re.compile(rf"(.+?)[-_. ]?{_MASK}[-_. ]?\d{{0,2}}")
_MASK_BEFORE = re.compile(rf"{_MASK}[-_. ]+(.+)")


def masks_beside(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Mask -> image, of the files of a folder: those named like another with `mask`, `gt` or the like before or after
    it, and, of two files of one stem, the one that is drawn in two values alone."""
    names = [fold(stem(path)) for path in files]
    stems = dict(zip(reversed(names), reversed(files), strict=True))
    image_of: dict[str, str] = {}
    for path, name in zip(files, names, strict=True):
        match = _MASK_WORD.search(name) and (_MASK_AFTER.fullmatch(name) or _MASK_BEFORE.fullmatch(name))
        if match and match[1] in stems:
            image_of[path] = stems[match[1]]
    for group in same_stem([path for path in files if path not in image_of] if len(stems) < len(files) else []):
        drawn_ones = [path for path in group if _is_drawn(root / path)]
        if len(group) == 2 and len(drawn_ones) == 1:
            image_of[drawn_ones[0]] = next(path for path in group if path != drawn_ones[0])
    return image_of


def divide_beside(
    category: str, beside: Mapping[str, str], wanted: Collection[str]
) -> tuple[dict[str, str | None], list[SetAside]]:
    """Image -> its mask, of the images `wanted` whose only mask lies beside them; and the masks that are not read."""
    count = Counter(beside.values())
    taken = {image: mask for mask, image in beside.items() if image in wanted and count[image] == 1}
    aside = []
    for mask, image in beside.items():
        if taken.get(image) != mask:
            many = f"there are {count[image]}; unite them, and say where they lie in a layout.toml"
            why = many if image in wanted else "it is good, unknown, a mask itself, or has another mask"
            aside.append(
                SetAside(category, mask, f"by its name or look a mask of {image}, and no image; not read: {why}")
            )
    return dict(taken), aside


def _is_drawn(file: Path) -> bool:
    """Whether a file holds one or two gray values, as a mask does and no photograph."""
    try:
        with Image.open(file) as image:
            return bool(np.count_nonzero(image.convert("L").histogram()) <= 2)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


GOOD_WORDS = {
    *("good", "goods", "ok", "okay", "normal", "nominal", "0", "io", "i.o.", "gut", "clean", "pass", "passed"),
    *("negative", "neg", "no_defect", "no_defects", "non_defect", "non_defective", "nondefective", "without_defect"),
    *("without_defects", "defect_free", "defectfree", "no_anomaly", "non_anomalous", "anomaly_free", "flawless"),
    *("healthy", "intact", "fine"),
}
"""Plain names of folders of images that may be good ones."""


def may_be_good(name: str) -> bool:
    """Whether a kind of test images is called so that it may mean good ones, but not `good` itself."""
    return name != "good" and plain(name) in GOOD_WORDS


def marked(root: Path, mask: str | None, rule: str) -> np.ndarray:
    """The pixels that a mask marks, bool (h, w). Raises MaskError, naming the mask, when it cannot be read."""
    if mask is None:
        raise MaskError("it has no mask")
    try:
        return decode_mask(inside(root, mask).read_bytes(), rule)
    except PermissionError as error:
        raise MaskError(f"{mask} may not be read; change the file's permissions") from error
    except MaskError as error:
        raise MaskError(f"{mask}: {error}") from error


def labelled(samples: Iterable[Sample], marks: np.ndarray) -> tuple[list[Sample], list[SetAside]]:
    """The samples, all of them listed as anomalous, each an image or a box of it: good where the image's marks (h, w)
    show nothing in it.

    What is defective, but would be learned from, is set aside.
    """
    kept: list[Sample] = []
    aside: list[SetAside] = []
    for sample in samples:
        x, y, width, height = parse_box(sample.box) if sample.box else (0, 0, marks.shape[1], marks.shape[0])
        if not marks[y : y + height, x : x + width].any():
            kept.append(replace(sample, label="good", defect_type="good", mask=None, mask_rule="auto"))
        elif sample.split == "test":
            kept.append(sample)
        else:
            reason = "a defective image of the training set; only good ones are learned from"
            aside.append(SetAside(sample.category, sample.key, reason))
    return kept, aside


def labelled_images(root: Path, samples: Iterable[Sample]) -> tuple[list[Sample], list[SetAside]]:
    """The samples, all of them listed as anomalous, labelled by their masks; one without a mask that can be read is set
    aside."""
    kept: list[Sample] = []
    aside: list[SetAside] = []
    for sample in samples:
        try:
            own, left_out = labelled([sample], marked(root, sample.mask, sample.mask_rule))
        except MaskError as error:
            own, left_out = [], [SetAside(sample.category, sample.path, f"whether it is good is unknown: {error}")]
        kept += own
        aside += left_out
    return kept, aside


def image_size(file: Path) -> tuple[int, int]:
    """Height and width. Raises DatasetError for a file that is no image."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DatasetError(f"no image that can be read ({error})") from error


# Accounting for everything.


def add_category(
    listing: Listing, category: str, samples: Sequence[Sample], aside: Sequence[SetAside], nothing: str
) -> None:
    """Adds a category to a listing: its samples or, when none of them is to be learned from, the problem `nothing`."""
    listing.set_aside.extend(aside)
    if any(sample.split == "train" for sample in samples):
        listing.samples.extend(samples)
        return
    first = f" ({len(aside)} set aside, the first: {aside[0].path}: {aside[0].reason})" if aside else ""
    listing.problems[category] = nothing + first


def listing_of(root: Path, category: str, samples: Sequence[Sample], aside: Sequence[SetAside]) -> Listing:
    """The listing of a data set that is one category."""
    listing = Listing(root)
    add_category(listing, category, samples, aside, "no good image to learn from was found")
    return listing


def known_paths(samples: Iterable[Sample], aside: Iterable[SetAside] = ()) -> set[str]:
    """Every path that a listing gives a place to."""
    used = {path for sample in samples for path in (sample.path, sample.mask, sample.xyz) if path is not None}
    return used | {entry.path for entry in aside}


def strays(
    folder: Path,
    root: Path,
    category: str,
    known: Collection[str],
    why: str | Callable[[str], str],
    opened: Iterable[str] = (),
    folders: Sequence[str] = (".",),
) -> list[SetAside]:
    """Images below a folder that have no place yet, and whole folders in which nothing has one, with the reason.

    `known` are paths with a place, and `opened` folders that are looked into even if none lies in them. Nothing else
    is entered: a row for a folder says more than one for each of its thousand images.
    """
    entered: set[str] = set()
    for path in (*known, *(f"{name}/" for name in opened)):
        while (path := path.rpartition("/")[0]) and path not in entered:
            entered.add(path)
    aside: list[SetAside] = []

    def look(place: Path) -> None:
        for path, is_folder, reason in entries_in(place, root, folders):
            if path in known:
                continue
            if is_folder and reason is None and path in entered:
                look(root / path)
                continue
            if reason is None:
                reason = why if isinstance(why, str) else why(path)
                reason += f"; what lies in it is not read (images: {_count(root / path)})" if is_folder else ""
            aside.append(SetAside(category, path, reason))

    look(folder)
    return aside


def _count(folder: Path) -> int:
    names = (name for _, _, files in os.walk(folder) for name in files)
    return sum(name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name) for name in names)
