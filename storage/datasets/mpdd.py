"""MPDD: metal parts in several orientations and positions (Jezek, Jonak, Burget, Dvorak, Skotak 2021, ICUMT).

    <root>/<category>/train/good/000.png, test/good/000.png, test/<defect type>/000.png
                      ground_truth/<defect type>/000_mask.png

The layout is that of MVTec AD. Numbers: two public inventories of the archive, which agree with each other and with the
888 training, 176 good and 282 defective test images that the literature names. Of the licence the authors' README says
nothing; the one given is what anomalib 2.7 states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from storage.datasets.mvtec_ad import list_tree
from storage.listing import Dataset, Listing

TREE = """\
<root>/<category>/train/good/000.png ...
<root>/<category>/test/good/000.png ...
<root>/<category>/test/<defect type>/000.png ...
<root>/<category>/ground_truth/<defect type>/000_mask.png ..."""

_PUBLISHED = {
    "bracket_black": {"train": 289, "test/good": 32, "test/hole": 12, "test/scratches": 35},
    "bracket_brown": {"train": 185, "test/good": 26, "test/bend_and_parts_mismatch": 17, "test/parts_mismatch": 34},
    "bracket_white": {"train": 110, "test/good": 30, "test/defective_painting": 13, "test/scratches": 17},
    "connector": {"train": 128, "test/good": 30, "test/parts_mismatch": 14},
    "metal_plate": {"train": 54, "test/good": 26, "test/major_rust": 14, "test/scratches": 34, "test/total_rust": 23},
    "tubes": {"train": 122, "test/good": 32, "test/anomalous": 69},
}

DATASET = Dataset(
    title="MPDD: metal parts defect detection, 6 painted or bare metal parts",
    licence="CC BY-NC-SA 4.0 (as anomalib states; not confirmed by the authors' page)",
    home="https://github.com/stepanje/MPDD",
    citation="Jezek et al., Deep learning-based defect detection of metal parts: evaluating current methods in complex "
    "conditions, ICUMT 2021",
    categories=tuple(_PUBLISHED),
    images=1346,
    tree=TREE,
    obtain="Follow the download link (OneDrive) on its home page, download all folders and keep their names.",
    counts=_PUBLISHED,
)


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images of MPDD. Raises DatasetError for another layout."""
    return list_tree(dataset, root, categories, tree=TREE)
