"""The layout of MVTec AD (Bergmann et al. 2019), which most industrial data sets follow.

    <root>/<category>/train/good/*           good images to learn from
                      validation/good/*      good images to calibrate on (optional)
                      test/good/*, test/<defect type>/*
                      ground_truth/<defect type>/<image's stem>_mask.*  or  <image's stem>.*

The root may also be one category. Masks belong to images by their stem, never by their position in a listing; an
anomalous image without one has an unknown mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from storage.datasets import Listing, SetAside, choose, existing_folder, images_in, inside, with_hashes
from storage.errors import DatasetError, OutsideRoot
from storage.samples import Label, Sample, Split

LAYOUT = "[<category>/]train/good/*, test/<good or defect type>/*, ground_truth/<defect type>/<stem>_mask.png"


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None, inspect: Path | None) -> Listing:
    """The images of MVTec AD, or of one of its categories. Raises DatasetError for another layout."""
    if inspect is not None:
        raise DatasetError(
            f"{dataset} was given {str(inspect)!r} to inspect, but takes its images to judge from test/; use the data "
            f"set 'folder' with a plain folder of good images"
        )
    return list_tree(dataset, root, categories)


def list_tree(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images of any folder in this layout."""
    root = existing_folder(root, "root")
    if not is_tree(root):
        raise DatasetError(f"{root} holds no train/good, neither itself nor in its folders; expected {LAYOUT}")
    known = _category_folders(root)
    found: list[Sample] = []
    aside: list[SetAside] = []
    problems: dict[str, str] = {}
    for name in choose(categories, known):
        samples, left_out = _list_category(dataset, name, known[name], root)
        aside += left_out
        if any(sample.split == "train" for sample in samples):
            found += samples
        else:
            problems[name] = _why_no_training(known[name], root, left_out)
    samples, unreadable = with_hashes(root, found)
    return Listing(root=root, samples=samples, set_aside=aside + unreadable, problems=problems)


def is_tree(root: Path) -> bool:
    """Whether a folder, or one of its folders, has train/good."""
    return any((folder / "train" / "good").is_dir() for folder in _category_folders(root).values())


def _category_folders(root: Path) -> dict[str, Path]:
    if (root / "train" / "good").is_dir():
        return {root.resolve().name: root}
    return {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name[0] != "."}


def _list_category(dataset: str, category: str, folder: Path, root: Path) -> tuple[list[Sample], list[SetAside]]:
    path = folder.relative_to(root).as_posix()
    try:
        inside(root, path)
    except OutsideRoot as error:
        return [], [SetAside(category, path, str(error))]
    samples: list[Sample] = []
    aside: list[SetAside] = []

    def add(split: Split, kind: str, masks: dict[str, str]) -> None:
        files, left_out = images_in(folder / split / kind, root, category)
        label: Label = "good" if kind == "good" else "anomalous"
        samples.extend(Sample("", file, dataset, category, split, label, kind, masks.get(file)) for file in files)
        aside.extend(left_out)

    for split in ("train", "validation"):
        add(split, "good", {})
        aside += _strays(folder / split, root, category, ["good"])
    kinds = _subfolders(folder / "test")
    for kind in kinds:
        masks, left_out = _pair_masks(folder, kind, root, category)
        add("test", kind, masks)
        aside += left_out
    aside += _strays(folder / "test", root, category, kinds)
    return samples, aside + _masks_of_nothing(folder, kinds, root, category)


def _pair_masks(folder: Path, kind: str, root: Path, category: str) -> tuple[dict[str, str], list[SetAside]]:
    """Image path -> mask path for one defect type, and the masks that are no image's."""
    masks, aside = images_in(folder / "ground_truth" / kind, root, category)
    images = images_in(folder / "test" / kind, root, category)[0] if kind != "good" else []
    by_stem: dict[str, str] = {}
    for mask in masks:
        by_stem.setdefault(PurePosixPath(mask).stem, mask)
    pairs: dict[str, str] = {}
    for image in images:
        stem = PurePosixPath(image).stem
        paired = by_stem.get(f"{stem}_mask") or by_stem.get(stem)
        if paired is not None:
            pairs[image] = paired
    reason = f"a mask, but no image of test/{kind} was paired with it: none has its stem, or another mask came first"
    if kind == "good":
        reason = "a mask of a good image, which has no anomalous pixel"
    unused = sorted(set(masks) - set(pairs.values()))
    return pairs, aside + [SetAside(category, mask, reason) for mask in unused]


def _masks_of_nothing(folder: Path, kinds: Sequence[str], root: Path, category: str) -> list[SetAside]:
    """Masks whose defect type has no folder of images."""
    found: list[SetAside] = []
    for kind in _subfolders(folder / "ground_truth"):
        if kind not in kinds:
            masks, aside = images_in(folder / "ground_truth" / kind, root, category)
            found += aside + [SetAside(category, mask, f"a mask, but there is no folder test/{kind}") for mask in masks]
    return found


def _strays(folder: Path, root: Path, category: str, expected: Sequence[str]) -> list[SetAside]:
    """Images that lie where the layout has no meaning for them."""
    files, aside = images_in(folder, root, category)
    wanted = f"{folder.name}/{'good' if folder.name != 'test' else '<good or defect type>'}"
    known = {(folder / kind).relative_to(root).as_posix() for kind in expected}
    loose = [SetAside(category, path, f"lies outside of {wanted}; move it there to use it") for path in files]
    others = [entry for entry in aside if entry.path not in known]
    return loose + [SetAside(category, entry.path, f"only {wanted} is read; {entry.reason}") for entry in others]


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _why_no_training(folder: Path, root: Path, aside: Sequence[SetAside]) -> str:
    path = (folder / "train" / "good").relative_to(root).as_posix()
    reason = f"{path} holds no image to learn from; put good images there"
    if aside:
        reason += f" ({len(aside)} set aside, the first: {aside[0].path}: {aside[0].reason})"
    return reason
