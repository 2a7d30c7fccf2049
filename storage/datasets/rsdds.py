"""RSDDs, rail surface discrete defects (Gan, Li, Wang, Yu 2017, IEEE Sensors Journal 17): photographs of rails.

    <root>/Type-I RSDDs dataset/Rail surface images/rail_1.jpg     67 express rails, 160 px wide, 1000 to 1282 px high
                                GroundTruth/rail_1.jpg             its mask, of the same name, gray: cut at 127
           Type-II RSDDs dataset/...                               128 common or heavy haul rails, 55 px by 1250 px

Folders may also be written with _ for a space. The authors' page could not be reached; folder names, names of masks and
sizes are those that public readers of the archive agree on. Masks are JPEG files, so gray values occur around marks;
readers cut them at 127, 155 or 200, and 127 is used. Not confirmed: the names of the type II files (masks are paired by
stem, whatever it is), and the licence.

Every image shows a defect, so good samples are parts of images: the literature cuts squares as wide as the rail (the
survey gives the images as 160x160 and 55x55). Here tiles follow each other down the rail without overlap, but for the
last one, which ends where the rail ends, so that no part of a rail is left unjudged. A tile is good when the mask marks
none of its pixels.

No split is established: published ones draw tiles, or whole rails before they are cut (54 of the 67 of type I in
Materials 14, 1957; 60 % in a public reader). Here 60 % of the rails are drawn: their good tiles are learned from and
their defective tiles set aside, and all tiles of the other rails are judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from storage.errors import DatasetError, MaskError
from storage.listing import Dataset, Listing, SetAside, choose, images_in
from storage.readers import (
    add_category,
    check_draw,
    check_option,
    drawn,
    find_root,
    image_size,
    known_paths,
    labelled,
    marked,
    named,
    pair,
    plain,
    stem,
    strays,
)
from storage.samples import Sample, Split

TREE = """\
<root>/Type-I RSDDs dataset/Rail surface images/rail_1.jpg ...
<root>/Type-I RSDDs dataset/GroundTruth/rail_1.jpg ...
<root>/Type-II RSDDs dataset/Rail surface images/ ...
<root>/Type-II RSDDs dataset/GroundTruth/ ..."""

DATASET = Dataset(
    title="RSDDs: surface defects of express rails (type_1) and of common or heavy haul rails (type_2)",
    licence="none stated that could be found; ask the authors",
    home="http://icn.bjtu.edu.cn/Visint/resources/RSDDs.aspx",
    citation="Gan et al., A Hierarchical Extractor-Based Visual Rail Surface Inspection System, "
    "IEEE Sensors Journal 17(23), 2017",
    categories=("type_1", "type_2"),
    images=195,
    tree=TREE,
    obtain="Follow the download link (Baidu) on its home page and unpack the archive.",
    split="tiles of rails, which are drawn (option `seed`): the good tiles of 60 % of them (option `train_share`) are "
    "learned from, all tiles of the others judged; option `tile`: side in px, by default the width of the rail",
)

_TYPES = {"type_1": "type_i_rsdds_dataset", "type_2": "type_ii_rsdds_dataset"}
_IMAGES = "rail_surface_images"
_TOLERANCE = 8
"""Pixels by which a mask may be longer or shorter than its image; both are taken to begin at the top."""


def list_samples(
    dataset: str,
    root: Path,
    categories: Sequence[str] | None,
    *,
    tile: int | None = None,
    train_share: float = 0.6,
    seed: int = 0,
) -> Listing:
    """Tiles of the images of RSDDs, or of one of its two types. Raises DatasetError for another layout or tile."""
    check_option("tile", tile, tile is None or (type(tile) is int and tile > 0), "the side of a square in px, from 1")
    check_draw("train_share", train_share, seed)
    root = find_root(root, lambda folder: bool(_types(folder)), "Type-I or Type-II RSDDs dataset", TREE)
    known = _types(root)
    listing = Listing(root)
    for category in choose(categories, known):
        samples, aside = _list_type(dataset, root, category, known[category], tile, train_share, seed)
        nothing = f"{known[category].name} has no good tile to learn from"
        add_category(listing, category, samples, aside, nothing)
    return listing


def _types(root: Path) -> dict[str, Path]:
    """Category -> folder, for those of the two types that lie in a folder; the folder itself may be one."""
    folders = {category: root if plain(root.name) == name else named(root, name) for category, name in _TYPES.items()}
    return {category: folder for category, folder in folders.items() if named(folder, _IMAGES).is_dir()}


def _list_type(
    dataset: str, root: Path, category: str, folder: Path, tile: int | None, share: float, seed: int
) -> tuple[list[Sample], list[SetAside]]:
    images, masks = named(folder, _IMAGES), named(folder, "groundtruth")
    files, mask_files = (images_in(place, root, category)[0] for place in (images, masks))
    training = drawn(map(stem, files), share, seed)
    samples: list[Sample] = []
    aside: list[SetAside] = []
    rails: list[Sample] = []
    for file, mask in pair(files, mask_files, "").items():
        split: Split = "train" if stem(file) in training else "test"
        rails.append(
            Sample("", file, dataset, category, split, "anomalous", "defect", mask, None, "above:127", stem(file))
        )
        try:
            tiles, left_out = _tiles(root, rails[-1], tile)
        except (DatasetError, MaskError) as error:
            tiles, left_out = [], [SetAside(category, file, f"which parts of it are good is unknown: {error}")]
        samples += tiles
        aside += left_out
    known = known_paths(rails)
    unused = [mask for mask in mask_files if mask not in known]
    reason = "a mask, but no rail was paired with it: none has its name, or another mask came first"
    aside += [SetAside(category, mask, reason) for mask in unused]
    opened = [place.relative_to(root).as_posix() for place in (images, masks)]
    why = f"lies outside of {' and '.join(opened)}"
    return samples, aside + strays(folder, root, category, known.union(unused), why, opened)


def _tiles(root: Path, rail: Sample, tile: int | None) -> tuple[list[Sample], list[SetAside]]:
    """The tiles of a rail, and of a rail to learn from its defective ones, set aside under their keys."""
    marks = _on_the_rail(marked(root, rail.mask, rail.mask_rule), image_size(root / rail.path))
    boxes = _boxes(marks.shape[1], marks.shape[0], tile)
    return labelled([replace(rail, box=f"{x},{y},{width},{height}") for x, y, width, height in boxes], marks)


def _on_the_rail(marks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The marks where image and mask both have pixels: a reader of the archive met images 2 px longer than others."""
    if max(abs(marks.shape[0] - size[0]), abs(marks.shape[1] - size[1])) > _TOLERANCE:
        here, there = f"{size[1]}x{size[0]}", f"{marks.shape[1]}x{marks.shape[0]}"
        raise MaskError(f"it has {here} px, its mask {there} px; draw the mask on the image itself")
    return marks[: size[0], : size[1]]


def _boxes(width: int, height: int, tile: int | None) -> Iterator[tuple[int, int, int, int]]:
    """x, y, width and height of the tiles, from the top."""
    side = tile or width
    for y in _starts(height, side):
        for x in _starts(width, side):
            yield x, y, min(side, width), min(side, height)


def _starts(length: int, side: int) -> list[int]:
    """The first pixels of tiles along a side: one after the other, the last tile ending with the side."""
    starts = list(range(0, length - side + 1, side)) or [0]
    if starts[-1] + side < length:
        starts.append(length - side)
    return starts
