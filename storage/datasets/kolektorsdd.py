"""KolektorSDD (Tabernik, Šela, Skvarč, Skočaj 2020, Journal of Intelligent Manufacturing): cracks in commutators.

    <root>/kos01/Part0.jpg         one of up to eight surfaces of a commutator, gray, 500 px wide, 1240 to 1270 px high
                 Part0_label.bmp   its label, which every image has: any value but 0 is the defect
           kos02/ ... kos50/

399 images, 52 of them with a defect: 48 commutators show theirs in one image and two in two (the authors' page). Two
archives share this layout and differ in their labels: outlines of the cracks (the paper's; `downloads` names this one)
and boxes around them. Layout: the authors' code, github.com/vicoslab/mixed-segdec-net-comind2021 (datasets/README.md,
data/input_ksdd.py), and anomalib 2.7 (data/datasets/image/kolektor.py).

Split. The authors cross-validate in three folds with each commutator in one fold, so they learn from 33 and judge 17,
but with the defects (supervised). For methods that learn from good images no split is established: anomalib draws 80 %
of the good images one by one, which puts surfaces of one commutator on both sides. Here two thirds of the commutators
are drawn, as many as in the authors' folds: their good images are learned from, their defective ones are set aside, and
all images of the others are judged. Not confirmed: which commutators are in which fold of the authors (a pickle file).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from storage.listing import Dataset, Download, Listing, choose, images_in, subfolders
from storage.readers import check_draw, drawn, find_root, known_paths, labelled_images, listing_of, pair, stem, strays
from storage.samples import Sample, Split

CATEGORY = "commutator"

TREE = """\
<root>/kos01/Part0.jpg ...
<root>/kos01/Part0_label.bmp ...
<root>/kos02/ ... kos50/"""

DATASET = Dataset(
    title="Kolektor surface-defect data set: cracks in the plastic of electrical commutators",
    licence="CC BY-NC-SA 4.0",
    home="https://www.vicos.si/resources/kolektorsdd/",
    citation="Tabernik et al., Segmentation-based deep-learning approach for surface-defect detection, "
    "Journal of Intelligent Manufacturing 31, 2020",
    categories=(CATEGORY,),
    images=399,
    tree=TREE,
    obtain="Download it from its home page (the archive with fine annotations) and unpack it.",
    split="drawn (option `seed`) by commutator: the good images of two thirds of them (option `train_share`) are "
    "learned from, all images of the others judged; the authors' three folds hold as many",
    downloads=(
        # SHA-256: anomalib 2.7, data/datamodules/image/kolektor.py; several public projects name it with this size.
        Download(
            url="https://data.vicos.si/datasets/KSDD/KolektorSDD.zip",
            sha256="65dc621693418585de9c4467d1340ea7958a6181816f0dc2883a1e8b61f9d4dc",
            size=101_831_129,
        ),
    ),
)

_COMMUTATOR = re.compile(r"kos\d+")
_SURFACE = re.compile(r"Part\d+")


def list_samples(
    dataset: str, root: Path, categories: Sequence[str] | None, *, train_share: float = 2 / 3, seed: int = 0
) -> Listing:
    """The images of KolektorSDD. Raises DatasetError for another layout."""
    check_draw("train_share", train_share, seed)
    root = find_root(root, lambda folder: bool(_commutators(folder)), "folders kos01, kos02, ...", TREE)
    choose(categories, [CATEGORY])
    commutators = _commutators(root)
    training = drawn(commutators, train_share, seed)
    images: list[Sample] = []
    for name in commutators:
        split: Split = "train" if name in training else "test"
        files = images_in(root / name, root, CATEGORY)[0]
        pairs = pair([file for file in files if _SURFACE.fullmatch(stem(file))], files, "_label")
        images += [
            Sample("", image, dataset, CATEGORY, split, "anomalous", "defect", mask, None, "nonzero", part=name)
            for image, mask in pairs.items()
        ]
    samples, aside = labelled_images(root, images)
    why = "neither an image nor the mask of one, which are named PartN.jpg and PartN_label.bmp in folders kos01, ..."
    aside += strays(root, root, CATEGORY, known_paths(images), why, commutators)
    return listing_of(root, CATEGORY, samples, aside)


def _commutators(folder: Path) -> list[str]:
    return [name for name in subfolders(folder) if _COMMUTATOR.fullmatch(name)]
