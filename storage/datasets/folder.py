"""Your own images: the MVTec AD layout, or a plain folder of good images and a second one to inspect.

Of plain folders only the files directly in them are read, so that the folder to inspect may lie within the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from storage.datasets import Listing, choose, existing_folder, images_in, with_hashes
from storage.datasets.mvtec_ad import LAYOUT, is_tree, list_tree
from storage.errors import DatasetError
from storage.samples import Sample

_LAYOUTS = f"understood are: {LAYOUT}; or a plain folder of good images, with a second folder given as `inspect`"


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None, inspect: Path | None) -> Listing:
    """The images of a folder. Raises DatasetError, saying which layouts are understood, for a folder in none."""
    root = existing_folder(root, "root")
    if not is_tree(root):
        return _list_plain(dataset, root, categories, inspect)
    if inspect is not None:
        raise DatasetError(
            f"{root} has train/good, so its images to judge come from test/, but {str(inspect)!r} was given to inspect"
            f"; leave it out, or give a plain folder of good images as root"
        )
    return list_tree(dataset, root, categories)


def _list_plain(dataset: str, good: Path, categories: Sequence[str] | None, inspect: Path | None) -> Listing:
    """One category named after the folder of good images; paths are relative to what both folders have in common."""
    if inspect is None:
        raise DatasetError(f"{good} has no train/good, and no folder to inspect was given; {_LAYOUTS}")
    inspect = existing_folder(inspect, "folder to inspect")
    if inspect == good:
        raise DatasetError(f"{good} was given as good images and as images to inspect; give two folders")
    choose(categories, [good.name])
    root = Path(os.path.commonpath([good, inspect]))
    samples: list[Sample] = []
    aside = []
    for folder, split, label in ((good, "train", "good"), (inspect, "test", "unknown")):
        path = folder.relative_to(root).as_posix()
        files, left_out = images_in(folder, root, good.name, [path])
        if not files:
            raise DatasetError(f"{folder} holds no image directly in it ({len(left_out)} set aside); {_LAYOUTS}")
        samples += [Sample("", file, dataset, good.name, split, label, label) for file in files]  # type: ignore[arg-type]
        aside += left_out
    given = tuple(folder.relative_to(root).as_posix() for folder in (good, inspect))
    samples, unreadable = with_hashes(root, samples)
    nested = [entry for entry in aside if entry.path not in given]  # the other folder given is no stray
    return Listing(root=root, folders=given, samples=samples, set_aside=nested + unreadable)
