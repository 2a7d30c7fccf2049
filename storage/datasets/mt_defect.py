"""MT Defect, magnetic tiles (Huang, Qiu, Yuan 2020, The Visual Computer 36): gray images of many sizes.

    <root>/MT_<kind>/Imgs/exp1_num_108719.jpg     image
                          exp1_num_108719.png     its mask, gray: cut at 127; of MT_Free all zero and not read

Kinds: Blowhole 115, Break 85, Crack 57, Fray 32, Uneven 103 images, and Free 952 without defects; the masks of 4 Uneven
images are all zero. All of this, and what follows, was read off the published files: the authors' README says no more.

The physical tile. `num` counts photographs and is never repeated; `exp` is the exposure. A tile was photographed under
six of them one after the other, so six images with rising exposure show one tile, brighter and brighter (correlation of
their high-passed pixels: median 0.95, against 0.25 between such runs), each cut out and labelled on its own: some tiles
are Free under one exposure and Break or Blowhole under the next. A `part` is such a run. Where two tiles were
photographed in turns, or one again later or out of order, numbers alone do not tell; `_ONE_PART` lists what the pixels
show (correlation above 0.82, where other pairs stay below 0.79; doubtful ones were looked at), tiles photographed in
turns together. No two images are bit-identical.

Split. The literature learns from 80 % of the Free images and judges the rest and all defective ones (MSFlow, Zhou et
al. 2024, following earlier flows), drawn image by image, which puts exposures of one tile on both sides. Here tiles
with a defective image are judged, with their Free images; of the others 80 % are drawn to learn from. Which paper used
80 % first is not confirmed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from storage.listing import Dataset, Listing, choose, images_in
from storage.readers import check_draw, drawn, find_root, known_paths, listing_of, pair, stem, strays
from storage.samples import Sample

CATEGORY = "magnetic_tile"
GOOD = "Free"

_DEFECTS = {"Blowhole": 115, "Break": 85, "Crack": 57, "Fray": 32, "Uneven": 103}
_KINDS = (GOOD, *_DEFECTS)

TREE = """\
<root>/MT_Free/Imgs/exp1_num_10181.jpg ...
<root>/MT_Free/Imgs/exp1_num_10181.png ...
<root>/MT_<Blowhole, Break, Crack, Fray or Uneven>/Imgs/exp1_num_108719.jpg ...
<root>/MT_<Blowhole, Break, Crack, Fray or Uneven>/Imgs/exp1_num_108719.png ..."""

DATASET = Dataset(
    title="MT Defect: surfaces of magnetic tiles with 5 kinds of defects",
    licence="none stated; the authors welcome its use and ask to be cited",
    home="https://github.com/abin24/Magnetic-tile-defect-datasets.",  # the dot belongs to the name
    citation="Huang et al., Surface defect saliency of magnetic tile, The Visual Computer 36, 2020",
    categories=(CATEGORY,),
    images=1344,
    tree=TREE,
    obtain="Clone the repository that is its home page, or download it as a ZIP file and unpack it.",
    split="drawn (option `seed`) by tile: the images of 80 % (option `train_share`) of the tiles without a defective "
    "image are learned from, all others judged",
    counts={CATEGORY: {f"test/{kind}": count for kind, count in _DEFECTS.items()}},
)

_ONE_PART = (  # first and last `num`; several ranges: photographed again
    ((743, 1012),),
    ((3667, 3981),),
    ((5874, 5959), (13526, 13689)),
    ((6508, 6634),),
    ((8676, 9196), (10334, 10790)),
    ((36246, 36302),),
    ((37056, 37675),),
    ((53011, 53080), (65001, 65067)),
    ((54107, 54366),),
    ((85602, 88201),),
    ((108719, 108923),),
    ((116934, 117068),),
    ((262480, 262733),),
    ((304290, 304361),),
    ((317483, 317640),),
    ((320808, 320895),),
    ((355636, 355732), (358102, 358179)),
)
_NAME = re.compile(r"exp(\d+)_num_(\d+)")


def list_samples(
    dataset: str, root: Path, categories: Sequence[str] | None, *, train_share: float = 0.8, seed: int = 0
) -> Listing:
    """The images of MT Defect. Raises DatasetError for another layout."""
    check_draw("train_share", train_share, seed)
    root = find_root(root, lambda folder: (folder / f"MT_{GOOD}" / "Imgs").is_dir(), f"MT_{GOOD}/Imgs", TREE)
    choose(categories, [CATEGORY])
    images: list[Sample] = []
    masks: set[str] = set()  # those of Free images are not read, but have their place
    for kind in _KINDS:
        files = images_in(root / f"MT_{kind}" / "Imgs", root, CATEGORY)[0]
        grey = [file for file in files if file.lower().endswith(".png")]
        for image, mask in pair(sorted(set(files) - set(grey)), grey, "").items():
            sample = Sample("", image, dataset, CATEGORY, "test", "good", "good")
            if kind != GOOD:
                sample = replace(sample, label="anomalous", defect_type=kind, mask=mask, mask_rule="above:127")
            images.append(sample)
            masks |= {mask} if mask else set()
    parts = parts_of(image.path for image in images)
    defective = {parts[image.path] for image in images if image.label != "good"}
    training = drawn(set(parts.values()) - defective, train_share, seed)
    samples = [
        replace(image, part=parts[image.path], split="train" if parts[image.path] in training else "test")
        for image in images
    ]
    why = "neither an image nor the mask of one, which are named NAME.jpg and NAME.png in folders MT_<kind>/Imgs"
    folders = [f"MT_{kind}/Imgs" for kind in _KINDS]
    return listing_of(root, CATEGORY, samples, strays(root, root, CATEGORY, known_paths(samples) | masks, why, folders))


def parts_of(images: Iterable[str]) -> dict[str, str]:
    """Image path -> name of the physical tile, told from the images' names; a name unlike the others is one of its own.

    Leaving out images never tears a tile apart: of a run with rising exposure a rising run remains.
    """
    named = {image: _NAME.fullmatch(stem(image)) for image in images}
    photographs = {image: (int(match[2]), int(match[1])) for image, match in named.items() if match}
    tiles: dict[int, str] = {}
    tile, last = "", math.inf
    for number, exposure in sorted(set(photographs.values())):
        known = _known_part(number)
        if known is not None:
            tile, last = known, math.inf  # what follows is another tile
        else:
            tile = f"tile_{number}" if exposure <= last else tile
            last = exposure
        tiles[number] = tile
    return {image: tiles[photographs[image][0]] if match else stem(image) for image, match in named.items()}


def _known_part(number: int) -> str | None:
    for ranges in _ONE_PART:
        if any(first <= number <= last for first, last in ranges):
            return f"tile_{ranges[0][0]}"
    return None
