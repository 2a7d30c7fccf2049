"""MVTec AD (Bergmann, Fauser, Sattlegger, Steger 2019, CVPR), whose layout most industrial data sets follow.

    <root>/<category>/train/good/*           good images to learn from
                      validation/good/*      good images to calibrate on (optional)
                      test/good/*, test/<defect type>/*
                      ground_truth/<defect type>/<image's stem>_mask.*  or  <image's stem>.*

The root may also be one category. Masks belong to images by their stem, never by their position in a listing; an
anomalous image without one has an unknown mask. Numbers of images: Table 1 of the paper.

`list_tree` serves every data set in this layout, also under other names for its folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.errors import DatasetError
from storage.listing import Dataset, Listing, SetAside, choose, counts_of, images_in, subfolders, unread_in, why_outside
from storage.readers import (
    Folder,
    add_category,
    divide_beside,
    find_root,
    fold,
    is_tree,
    known_paths,
    masks_beside,
    may_be_good,
    pair,
    plain,
    same_stem,
    strays,
)
from storage.samples import Label, Sample

TREE = """\
<root>/<category>/train/good/000.png ...
<root>/<category>/validation/good/*           optional: good images to calibrate on
<root>/<category>/test/good/000.png ...
<root>/<category>/test/<defect type>/000.png ...
<root>/<category>/ground_truth/<defect type>/000_mask.png ..."""

_PUBLISHED = {  # train, test good, test anomalous
    "bottle": (209, 20, 63),
    "cable": (224, 58, 92),
    "capsule": (219, 23, 109),
    "carpet": (280, 28, 89),
    "grid": (264, 21, 57),
    "hazelnut": (391, 40, 70),
    "leather": (245, 32, 92),
    "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141),
    "screw": (320, 41, 119),
    "tile": (230, 33, 84),
    "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40),
    "wood": (247, 19, 60),
    "zipper": (240, 32, 119),
}

DATASET = Dataset(
    title="MVTec Anomaly Detection: 10 objects and 5 textures",
    licence="CC BY-NC-SA 4.0",
    home="https://www.mvtec.com/company/research/datasets/mvtec-ad",
    citation="Bergmann et al., MVTec AD: A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection, "
    "CVPR 2019",
    categories=tuple(_PUBLISHED),
    images=5354,
    tree=TREE,
    obtain="Download it from its home page, whose form asks you to accept the licence, and unpack the archive.",
    counts=counts_of(_PUBLISHED, "train", "test/good", "test/anomalous"),
)


_TRUTH = {"groundtruth", "ground_truth", "ground_truths", "gt", "mask", "masks"}
_CLOSED = {"ground_truth/good": "masks of good images, which have no anomalous pixel; what lies in it is not read"}


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images of MVTec AD, or of one of its categories. Raises DatasetError for another layout."""
    return list_tree(dataset, root, categories)


def _folders(category: Path, good: Collection[str] | None = None) -> list[Folder]:
    """The folders of a category. `good`: names of folders of good test images beside `good` itself; with None, images
    of a folder whose name may mean good ones are unknown, unless the folder has masks."""
    truth = _truth_of(category)
    kinds = {*subfolders(category / "test"), *subfolders(category / truth)} - {"good"}
    return [
        Folder(path="train/good", split="train", label="good", defect_type="good"),
        Folder(path="validation/good", split="validation", label="good", defect_type="good"),
        Folder(path="test/good", split="test", label="good", defect_type="good"),
        *(_of_kind(category, kind, truth, good) for kind in sorted(kinds)),
    ]


def _of_kind(category: Path, kind: str, truth: str, good: Collection[str] | None) -> Folder:
    path = f"test/{kind}"
    if kind in (good or ()):
        return Folder(path=path, split="test", label="good", defect_type="good")
    alike = [name for name in subfolders(category / truth) if fold(name) == fold(kind)]
    masks = kind if kind in alike or len(alike) != 1 or os.path.isdir(category / "test" / alike[0]) else alike[0]
    unsure = good is None and may_be_good(kind) and not alike
    label: Label = "unknown" if unsure else "anomalous"
    return Folder(path=path, split="test", label=label, defect_type=kind, masks=f"{truth}/{masks}")


def _truth_of(category: Path) -> str:
    """The folder of masks: `ground_truth`, or the only one that has another word for it."""
    names = subfolders(category)
    others = [name for name in names if plain(name) in _TRUTH]
    return others[0] if "ground_truth" not in names and len(others) == 1 else "ground_truth"


def list_tree(
    dataset: str,
    root: Path,
    categories: Sequence[str] | None,
    *,
    tree: str = TREE,
    train: str = "train/good",
    folders_of: Callable[[Path], Sequence[Folder]] | None = None,
    closed: Mapping[str, str] = _CLOSED,
    mask_rule: str = "auto",
    good: Collection[str] | None = None,
    called: str | None = None,
    links_to: Sequence[str] = (),
) -> Listing:
    """The images of a data set whose categories hold the folders that `folders_of` names; the root may be a category.

    `train` is the folder that every category learns from; `closed` are folders in a category that are not read, with
    the reason. Any other image in a category is set aside. `good`: names of folders of good test images
    beside `good`, where there is no `folders_of`; `called`: another name for a root that is one category;
    `links_to`: folders that links may lead to. Raises DatasetError, showing the `tree`, for another layout.
    """
    root = find_root(root, lambda folder: is_tree(folder, train), train, tree)
    single = os.path.isdir(root / train)
    if called is not None and not single:
        raise DatasetError(f"{root} holds several categories, so they cannot all be called {called!r}; leave it out")
    known = {called or root.name: root} if single else {name: root / name for name in subfolders(root)}
    listing = Listing(root, folders=(".", *links_to))
    for name in choose(categories, known):
        category = _Tree(dataset, name, known[name], root, listing.folders)
        samples, aside = category.listed(
            folders_of(known[name]) if folders_of else _folders(known[name], good), closed, mask_rule
        )
        path = (known[name] / train).relative_to(root).as_posix()
        add_category(listing, name, samples, aside, f"{path} holds no image to learn from; put good images there")
    return listing


@dataclass(frozen=True)
class _Tree:
    """A category that is listed."""

    dataset: str
    category: str
    place: Path
    root: Path
    folders: tuple[str, ...]

    def at(self, name: str) -> str:
        return (self.place / name).relative_to(self.root).as_posix()

    def images(self, name: str) -> list[str]:
        return images_in(self.place / name, self.root, self.category, self.folders)[0]

    def listed(
        self, folders: Sequence[Folder], closed: Mapping[str, str], mask_rule: str
    ) -> tuple[list[Sample], list[SetAside]]:
        """The samples, and what is set aside."""
        if (reason := why_outside(self.root, self.at("."), self.folders)) is not None:
            return [], [SetAside(self.category, self.at("."), reason)]
        samples: list[Sample] = []
        opened: list[str] = []
        aside = [
            SetAside(self.category, self.at(name), why)
            for name, why in closed.items()
            if os.path.isdir(self.place / name)
        ]
        for folder in folders:
            own, left_out = self._in(folder, mask_rule)
            samples += own
            aside += left_out
            read = [name for name in (folder.path, folder.masks, folder.xyz) if name is not None]
            opened += map(self.at, read)
            if folder.masks is not None:
                opened += [self.at(f"{folder.masks}/{name}") for name in subfolders(self.place / folder.masks)]
            for name in read:
                aside += unread_in(self.place / name, self.root, self.category, self.folders)

        def why(path: str) -> str:
            return _why_left(self.place, (self.root / path).relative_to(self.place).as_posix(), folders)

        known = known_paths(samples, [entry for entry in aside if entry.path not in opened])
        return samples, aside + strays(self.place, self.root, self.category, known, why, opened, self.folders)

    def _in(self, folder: Folder, mask_rule: str) -> tuple[list[Sample], list[SetAside]]:
        """The samples of a folder. Masks in it are not images; they belong to those that have no mask elsewhere."""
        files = self.images(folder.path)
        beside = masks_beside(self.root, files)
        images = [path for path in files if path not in beside]
        masks = (
            [] if folder.masks is None else _masks_in(self.place / folder.masks, self.root, self.category, self.folders)
        )
        mask_of = pair(images, masks, "_mask", "")
        aside = _ambiguous(self.category, images, masks)
        wanted = {image for image in images if folder.label == "anomalous" and mask_of[image] is None}
        taken, left_out = divide_beside(self.category, beside, wanted)
        mask_of |= taken
        aside += left_out
        xyz_of = pair(images, [] if folder.xyz is None else self.images(folder.xyz), "")
        said = (self.dataset, self.category, folder.split, folder.label, folder.defect_type)
        samples = []
        for image in images:
            mask = mask_of[image] if folder.label != "unknown" else None
            samples.append(Sample("", image, *said, mask, mask_rule=mask_rule if mask else "auto", xyz=xyz_of[image]))
        return samples, aside


def _ambiguous(category: str, images: Sequence[str], masks: Sequence[str]) -> list[SetAside]:
    """Masks that may belong to either of two images."""
    aside = []
    for group in same_stem(images) if masks else ():
        for mask in dict.fromkeys(pair([group[0]], masks, "_mask", "").values()):
            if mask is not None:
                names = " or ".join(group)
                reason = f"the mask of {names}, which share a stem: whose is not known, and they have none; rename one"
                aside.append(SetAside(category, mask, reason))
    return aside


def _masks_in(folder: Path, root: Path, category: str, folders: Sequence[str]) -> list[str]:
    """Paths of masks in a folder: images, and folders of nothing but images."""
    masks = images_in(folder, root, category, folders)[0]
    for name in subfolders(folder):
        files, refused = images_in(folder / name, root, category, folders)
        if files and not refused:
            masks.append((folder / name).relative_to(root).as_posix())
    return masks


def _why_left(place: Path, path: str, folders: Sequence[Folder]) -> str:
    """Why an image that is there is no sample, mask or cloud of points; its path is within the category."""
    for folder in folders:
        if folder.masks is not None and path.startswith(f"{folder.masks}/"):
            if not os.path.isdir(place / folder.path):
                return f"a mask, but there is no folder {folder.path}"
            return (
                f"a mask, but no image of {folder.path} was paired with it: none has its stem, another mask came "
                f"first, or a file beside it may not be read"
            )
        if folder.xyz is not None and path.startswith(f"{folder.xyz}/"):
            return f"3-D points, but no image of {folder.path} was paired with them: none has their stem"
    return f"only {', '.join(folder.path for folder in folders)} are read; move it into one of them to use it"
