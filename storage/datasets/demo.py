"""The textures of scikit-image with synthetic defects that `al demo` makes, in the layout of MVTec AD."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from storage.datasets.mvtec_ad import list_tree
from storage.listing import Dataset, Listing

TREE = """\
<root>/<brick, grass or gravel>/train/good/*.png
<root>/<brick, grass or gravel>/test/<good or defect type>/*.png
<root>/<brick, grass or gravel>/ground_truth/<defect type>/<image's stem>_mask.png"""

DATASET = Dataset(
    title="Textures of scikit-image with synthetic defects",
    licence="CC0",
    home="https://scikit-image.org/docs/stable/api/skimage.data.html",
    citation="van der Walt et al., scikit-image: image processing in Python, PeerJ 2:e453, 2014",
    categories=("brick", "grass", "gravel"),
    tree=TREE,
    obtain="`al demo` makes it on the spot.",
    split="seeded: crops of one half of each texture are learned from, crops of the other are judged",
)


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images that `al demo` made. Raises DatasetError for another layout."""
    return list_tree(dataset, root, categories, tree=TREE)
