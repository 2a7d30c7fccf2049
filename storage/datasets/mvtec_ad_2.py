"""MVTec AD 2: transparent, reflective and bulk goods under changing light (Heckler-Kram, Neudeck, Scheler, König,
Steger 2025, arXiv:2503.21622).

    <root>/<category>/train/good/000_regular.png, validation/good/000_regular.png
                      test_public/good/000_<light>.png, test_public/bad/000_<light>.png
                      test_public/ground_truth/bad/000_<light>_mask.png
                      test_private/000_regular.png, test_private_mixed/000_mixed.png    without labels or masks

A light is `regular`, `overexposed`, `underexposed` or `shift_1` and so on. In test_public the images of one number show
one scene under each light: they are one part.

The private images are judged by the authors' server (https://benchmark.mvtec.com) alone; with the option `private` they
are listed as test images with an unknown label. Whether both private folders show the same scenes, or hold identical
files, is not confirmed.

Layout: reader of anomalib 2.7 and public audits of the archive, which also agree on the numbers: 2528 training, 302
validation, 379 good and 705 anomalous public, twice 2045 private images. The numbers a category are from such an audit
and add up to these; those of the private folders a category are not confirmed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from storage.datasets.mvtec_ad import list_tree
from storage.listing import Dataset, Listing, counts_of
from storage.readers import Folder, check_option

TREE = """\
<root>/<category>/train/good/000_regular.png ...
<root>/<category>/validation/good/000_regular.png ...
<root>/<category>/test_public/good/000_regular.png, 000_overexposed.png ...
<root>/<category>/test_public/bad/000_regular.png ...
<root>/<category>/test_public/ground_truth/bad/000_regular_mask.png ...
<root>/<category>/test_private/000_regular.png ...         optional, without labels
<root>/<category>/test_private_mixed/000_mixed.png ...     optional, without labels"""

_PUBLISHED = {  # train, validation, test good, test bad
    "can": (412, 46, 72, 90),
    "fabric": (387, 43, 66, 90),
    "fruit_jelly": (263, 37, 20, 60),
    "rice": (313, 35, 42, 90),
    "sheet_metal": (137, 19, 24, 90),
    "vial": (291, 41, 35, 105),
    "wallplugs": (293, 33, 60, 90),
    "walnuts": (432, 48, 60, 90),
}

DATASET = Dataset(
    title="MVTec AD 2: 8 demanding products under changing light",
    licence="CC BY-NC-SA 4.0",
    home="https://www.mvtec.com/company/research/datasets/mvtec-ad-2",
    citation="Heckler-Kram et al., The MVTec AD 2 Dataset: Advanced Scenarios for Unsupervised Anomaly Detection, "
    "arXiv:2503.21622, 2025",
    categories=tuple(_PUBLISHED),
    images=8004,
    tree=TREE,
    obtain="Download it from its home page, whose form asks you to accept the licence, and unpack the archive.",
    split="as published; test is test_public, the private test images have no labels and are left out",
    counts=counts_of(_PUBLISHED, "train", "validation", "test/good", "test/bad"),
)

_PUBLIC = [
    Folder(path="train/good", split="train", label="good", defect_type="good"),
    Folder(path="validation/good", split="validation", label="good", defect_type="good"),
    Folder(path="test_public/good", split="test", label="good", defect_type="good"),
    Folder(
        path="test_public/bad",
        split="test",
        label="anomalous",
        defect_type="bad",
        masks="test_public/ground_truth/bad",
    ),
]
_PRIVATE = [
    Folder(path=name, split="test", label="unknown", defect_type="unknown")
    for name in ("test_private", "test_private_mixed")
]
_CLOSED = "test images whose labels the authors keep; not read, give the option private = true to list them"


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None, *, private: bool = False) -> Listing:
    """The images of MVTec AD 2, the private ones only if asked for. Raises DatasetError for another layout."""
    check_option("private", private, isinstance(private, bool), "true or false")
    folders = _PUBLIC + _PRIVATE if private else _PUBLIC
    closed = {} if private else {folder.path: _CLOSED for folder in _PRIVATE}
    listing = list_tree(dataset, root, categories, tree=TREE, folders_of=lambda category: folders, closed=closed)
    return replace(listing, samples=[replace(sample, part=_scene(sample.path)) for sample in listing.samples])


def _scene(path: str) -> str | None:
    """What the images of one public test scene have in common."""
    match = re.search(r"test_public/(?:good|bad)/\d+(?=_[^/]*$)", path)
    return None if match is None else match.group()
