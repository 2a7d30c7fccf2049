"""KolektorSDD2 (Božič, Tabernik, Skočaj 2021, Computers in Industry): defects of several kinds on one surface.

    <root>/train/10000.png       colour image, about 230 px wide and 630 px high; sizes vary
                 10000_GT.png    its label, which every image has: any value but 0 is the defect
           test/20000.png, 20000_GT.png

Training set 2085 images without and 246 with a defect, test set 894 and 110 (the authors' page). The split is theirs,
and supervised: one-class methods leave the 246 out, as is done here (and in SuperSimpleNet, Rolih et al. 2024). The
data do not tell which images show one physical part.

The archive also holds train/10301 (copy).png and train/10301_GT (copy).png, bit-identical to the files they are named
after, as several public readers note; they are set aside, like all files that are not named as above. Layout: the
authors' code, github.com/vicoslab/mixed-segdec-net-comind2021 (datasets/README.md, data/input_ksdd2.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from storage.listing import Dataset, Download, Listing, choose, images_in
from storage.readers import find_root, known_paths, labelled_images, listing_of, pair, stem, strays
from storage.samples import Sample, Split

CATEGORY = "surface"

TREE = """\
<root>/train/10000.png ...
<root>/train/10000_GT.png ...
<root>/test/20000.png ...
<root>/test/20000_GT.png ..."""

DATASET = Dataset(
    title="Kolektor surface-defect data set 2: defects of several kinds on one industrial surface",
    licence="CC BY-NC-SA 4.0",
    home="https://www.vicos.si/resources/kolektorsdd2/",
    citation="Bozic et al., Mixed supervision for surface-defect detection: from weakly to fully supervised learning, "
    "Computers in Industry 129, 2021",
    categories=(CATEGORY,),
    images=3335,
    tree=TREE,
    obtain="Download it from its home page and unpack it.",
    split="as published; the defective images of the training set are set aside",
    counts={CATEGORY: {"train": 2085, "test/good": 894, "test/defect": 110}},
    downloads=(
        # SHA-256 and size: two unrelated public projects that document the archive agree; the authors publish neither.
        Download(
            url="https://data.vicos.si/datasets/KSDD/KolektorSDD2.zip",
            sha256="edcdb486809b24f1d17b785e30c52fafc5999554dd5fe18ddf77b61ceb6f36a8",
            size=853_126_555,
        ),
    ),
)

_SPLITS: tuple[Split, ...] = ("train", "test")
_NUMBER = re.compile(r"\d+")


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images of KolektorSDD2. Raises DatasetError for another layout."""
    root = find_root(root, _is_root, "train/*_GT.png and test/*_GT.png", TREE)
    choose(categories, [CATEGORY])
    images: list[Sample] = []
    for split in _SPLITS:
        files = images_in(root / split, root, CATEGORY)[0]
        pairs = pair([file for file in files if _NUMBER.fullmatch(stem(file))], files, "_GT")
        images += [
            Sample("", image, dataset, CATEGORY, split, "anomalous", "defect", mask, None, "nonzero")
            for image, mask in pairs.items()
        ]
    samples, aside = labelled_images(root, images)
    why = "neither an image nor the mask of one, which are named NNNNN.png and NNNNN_GT.png in train and test"
    aside += strays(root, root, CATEGORY, known_paths(images), why, _SPLITS)
    return listing_of(root, CATEGORY, samples, aside)


def _is_root(folder: Path) -> bool:
    """Whether train and test hold labels named as published, which other layouts with such folders do not."""
    return all(any((folder / split).glob("*_GT.png")) for split in _SPLITS)
