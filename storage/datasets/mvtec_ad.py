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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from storage.listing import Dataset, Listing, SetAside, choose, counts_of, images_in, subfolders, why_outside
from storage.readers import Folder, add_category, find_root, is_tree, known_paths, pair, strays
from storage.samples import Sample

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


_CLOSED = {"ground_truth/good": "masks of good images, which have no anomalous pixel; what lies in it is not read"}


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images of MVTec AD, or of one of its categories. Raises DatasetError for another layout."""
    return list_tree(dataset, root, categories)


def _folders(category: Path) -> list[Folder]:
    kinds = {*subfolders(category / "test"), *subfolders(category / "ground_truth")} - {"good"}
    return [
        Folder(path="train/good", split="train", label="good", defect_type="good"),
        Folder(path="validation/good", split="validation", label="good", defect_type="good"),
        Folder(path="test/good", split="test", label="good", defect_type="good"),
        *(
            Folder(path=f"test/{kind}", split="test", label="anomalous", defect_type=kind, masks=f"ground_truth/{kind}")
            for kind in sorted(kinds)
        ),
    ]


def list_tree(
    dataset: str,
    root: Path,
    categories: Sequence[str] | None,
    *,
    tree: str = TREE,
    train: str = "train/good",
    folders_of: Callable[[Path], Sequence[Folder]] = _folders,
    closed: Mapping[str, str] = _CLOSED,
    mask_rule: str = "auto",
) -> Listing:
    """The images of a data set whose categories hold the folders that `folders_of` names; the root may be a category.

    `train` is the folder that every category learns from; `closed` are folders in a category that are not read, with
    the reason. Any other image in a category is set aside. Raises DatasetError, showing the `tree`, for another layout.
    """
    root = find_root(root, lambda folder: is_tree(folder, train), train, tree)
    known = {root.name: root} if os.path.isdir(root / train) else {name: root / name for name in subfolders(root)}
    listing = Listing(root)
    for name in choose(categories, known):
        samples, aside = _list_category(dataset, name, known[name], root, folders_of(known[name]), closed, mask_rule)
        path = (known[name] / train).relative_to(root).as_posix()
        add_category(listing, name, samples, aside, f"{path} holds no image to learn from; put good images there")
    return listing


def _list_category(
    dataset: str,
    category: str,
    place: Path,
    root: Path,
    folders: Sequence[Folder],
    closed: Mapping[str, str],
    mask_rule: str,
) -> tuple[list[Sample], list[SetAside]]:
    def at(name: str) -> str:
        return (place / name).relative_to(root).as_posix()

    if (reason := why_outside(root, at("."))) is not None:
        return [], [SetAside(category, at("."), reason)]
    samples: list[Sample] = []
    opened: list[str] = []
    for folder in folders:
        images = images_in(place / folder.path, root, category)[0]
        masks = [] if folder.masks is None else _masks_in(place / folder.masks, root, category)
        points = [] if folder.xyz is None else images_in(place / folder.xyz, root, category)[0]
        mask_of, xyz_of = pair(images, masks, "_mask", ""), pair(images, points, "")
        said = (dataset, category, folder.split, folder.label, folder.defect_type)
        for image in images:
            mask, xyz = mask_of[image], xyz_of[image]
            samples.append(Sample("", image, *said, mask, mask_rule=mask_rule if mask else "auto", xyz=xyz))
        opened += [at(name) for name in (folder.path, folder.masks, folder.xyz) if name is not None]
        if folder.masks is not None:
            opened += [at(f"{folder.masks}/{name}") for name in subfolders(place / folder.masks)]
    aside = [SetAside(category, at(name), why) for name, why in closed.items() if os.path.isdir(place / name)]

    def why(path: str) -> str:
        return _why_left(place, (root / path).relative_to(place).as_posix(), folders)

    return samples, aside + strays(place, root, category, known_paths(samples, aside), why, opened)


def _masks_in(folder: Path, root: Path, category: str) -> list[str]:
    """Paths of masks in a folder: images, and folders of nothing but images."""
    masks = images_in(folder, root, category)[0]
    for name in subfolders(folder):
        files, refused = images_in(folder / name, root, category)
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
