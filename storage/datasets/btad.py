"""BTAD, beanTech Anomaly Detection (Mishra, Verk, Fornasier, Piciarelli, Foresti 2021, ISIE): 3 industrial products.

    <root>/<01, 02 or 03>/train/ok/0000.bmp, test/ok/0000.bmp, test/ko/0000.bmp
                          ground_truth/ko/0000.png or 0000.bmp

The archive holds these in a folder BTech_Dataset_transformed, which may be given as root, or the folder around it.
Images are .bmp in 01 and 03 and .png in 02, masks .png in 01 and 02 and .bmp in 03, so masks belong to images by their
stem. `ko` is the only defect type.

What is odd in the published data:
- The authors' README (github.com/pankajmishra000/VT-ADL) has 1000 training images for product 2 and 399 for product 3;
  the archive has 399 in 02 and 1000 in 03. `counts` are those of the archive, from a public benchmark of it that agrees
  with the totals of dataset-ninja/btad (1799 training, 741 test, 290 ko). Some papers speak of 2830 images; it is 2540.
- In dataset-ninja's conversion 10 of the 41 ko images of 03, and 1 of the 200 of 02, are left without a region of
  value 255 and more than 50 pixels. Why is not confirmed; empty masks show in validation.
- Training images of 02 show small scratches (the authors of SoftPatch, 2022, in their answer to reviewers).

The licence is that of the authors' README; anomalib 2.7 states CC BY-NC-SA 4.0 instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from storage.datasets.mvtec_ad import list_tree
from storage.listing import Dataset, Download, Listing, counts_of
from storage.readers import Folder

TREE = """\
<root>/<01, 02 or 03>/train/ok/0000.bmp ...
<root>/<01, 02 or 03>/test/ok/0000.bmp ...
<root>/<01, 02 or 03>/test/ko/0000.bmp ...
<root>/<01, 02 or 03>/ground_truth/ko/0000.png ...     or .bmp"""

_PUBLISHED = {  # train, test ok, test ko
    "01": (400, 21, 49),
    "02": (399, 30, 200),
    "03": (1000, 400, 41),
}

DATASET = Dataset(
    title="BTAD, beanTech Anomaly Detection: 3 industrial products",
    licence="CC BY-SA 4.0",
    home="https://github.com/pankajmishra000/VT-ADL",
    citation="Mishra et al., VT-ADL: A Vision Transformer Network for Image Anomaly Detection and Localization, "
    "ISIE 2021",
    categories=tuple(_PUBLISHED),
    images=2540,
    tree=TREE,
    obtain="Download https://avires.dimi.uniud.it/papers/btad/btad.zip, to which its home page links, and unpack it.",
    counts=counts_of(_PUBLISHED, "train", "test/good", "test/ko"),
    downloads=(
        Download(  # the checksum is the one that anomalib 2.7 requires of this address; the authors publish none
            url="https://avires.dimi.uniud.it/papers/btad/btad.zip",
            sha256="461c9387e515bfed41ecaae07c50cf6b10def647b36c9e31d239ab2736b10d2a",
        ),
    ),
)

_FOLDERS = [
    Folder(path="train/ok", split="train", label="good", defect_type="good"),
    Folder(path="test/ok", split="test", label="good", defect_type="good"),
    Folder(path="test/ko", split="test", label="anomalous", defect_type="ko", masks="ground_truth/ko"),
]


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images of BTAD. Raises DatasetError for another layout."""
    return list_tree(dataset, root, categories, tree=TREE, train="train/ok", folders_of=lambda category: _FOLDERS)
