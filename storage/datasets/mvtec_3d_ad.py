"""MVTec 3D-AD: scans with their colours (Bergmann, Jin, Sattlegger, Steger 2022, VISAPP); the colour images are used.

    <root>/<category>/<train or validation>/good/rgb/000.png      colour image
                                                 xyz/000.tiff     x, y and z of every pixel: kept as `Sample.xyz`
                      test/<good or defect type>/rgb, xyz, gt/000.png

Masks mark with any value but 0. Those of good images (test/good/gt) mark nothing and are not read.

Layout: reader of anomalib 2.7. Numbers: Table 1 of the paper (arXiv:2112.09045), as two public copies have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from storage.datasets.mvtec_ad import list_tree
from storage.listing import Dataset, Listing, counts_of, subfolders
from storage.readers import Folder
from storage.samples import Label, Split

TREE = """\
<root>/<category>/<train or validation>/good/rgb/000.png ...
<root>/<category>/<train or validation>/good/xyz/000.tiff ...
<root>/<category>/test/<good or defect type>/rgb/000.png ...
<root>/<category>/test/<good or defect type>/xyz/000.tiff ...
<root>/<category>/test/<defect type>/gt/000.png ..."""

_PUBLISHED = {  # train, validation, test good, test anomalous
    "bagel": (244, 22, 22, 88),
    "cable_gland": (223, 23, 21, 87),
    "carrot": (286, 29, 27, 132),
    "cookie": (210, 22, 28, 103),
    "dowel": (288, 34, 26, 104),
    "foam": (236, 27, 20, 80),
    "peach": (361, 42, 26, 106),
    "potato": (300, 33, 22, 92),
    "rope": (298, 33, 32, 69),
    "tire": (210, 29, 25, 87),
}

DATASET = Dataset(
    title="MVTec 3D-AD: 3-D scans of 10 products with colour images, of which the images are used",
    licence="CC BY-NC-SA 4.0",
    home="https://www.mvtec.com/company/research/datasets/mvtec-3d-ad",
    citation="Bergmann et al., The MVTec 3D-AD Dataset for Unsupervised 3D Anomaly Detection and Localization, "
    "VISAPP 2022",
    categories=tuple(_PUBLISHED),
    images=4147,
    tree=TREE,
    obtain="Download it from its home page, whose form asks you to accept the licence, and unpack the archive.",
    counts=counts_of(_PUBLISHED, "train", "validation", "test/good", "test/anomalous"),
)

_CLOSED = {"test/good/gt": "masks of good images, which mark nothing; what lies in it is not read"}


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The colour images of MVTec 3D-AD. Raises DatasetError for another layout."""
    return list_tree(
        dataset,
        root,
        categories,
        tree=TREE,
        train="train/good/rgb",
        folders_of=_folders,
        closed=_CLOSED,
        mask_rule="nonzero",
    )


def _folders(category: Path) -> list[Folder]:
    kinds = [kind for kind in subfolders(category / "test") if kind != "good"]
    good = [_folder(split, "good", "good", None) for split in ("train", "validation", "test")]
    return good + [_folder("test", kind, "anomalous", f"test/{kind}/gt") for kind in kinds]


def _folder(split: Split, kind: str, label: Label, masks: str | None) -> Folder:
    folder = f"{split}/{kind}"
    return Folder(path=f"{folder}/rgb", split=split, label=label, defect_type=kind, masks=masks, xyz=f"{folder}/xyz")
