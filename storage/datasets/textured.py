"""The woven fabrics of AE-SSIM (Bergmann, Loewe, Fauser, Sattlegger, Steger 2019, VISAPP), "Textured" in the survey.

    <root>/texture_1/train/good/*.png                       texture_2 likewise
           texture_1/test/defective/*.png                   there is no test/good
           texture_1/ground_truth/defective/*.png           a mask has its image's name

The root may also be one texture, or hold the archive's folder `textures`. Single-channel images of 512 x 512 pixels;
per texture 100 good ones to learn from and 50 with defects (section 4.1 of the paper). Since no good image is judged,
scores of images cannot be compared; the paper judges pixels, and so is it here.

Sources: the survey, section IV-A (two textures, 512 x 512, gray); the folders' names from readers in public
repositories, of which two agree on train/good and test/defective and one names ground_truth/defective; that masks are
named as images from the code of github.com/PabloMaj/Unsupervised-Anomaly-Detection-with-SSIM-AE; the archive's name
textures.zip and that it has the layout of MVTec AD from the README of Ardelean and Weyrich 2024 (WACV). Not confirmed:
the numbers of images in the archive, the licence, and a checksum.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from storage.datasets.mvtec_ad import list_tree
from storage.listing import Dataset, Listing

TREE = """\
<root>/texture_1/train/good/*.png
<root>/texture_1/test/defective/*.png
<root>/texture_1/ground_truth/defective/*.png
<root>/texture_2/..."""

DATASET = Dataset(
    title="Two woven fabric textures (AE-SSIM)",
    licence="not stated where it is offered, as far as we know; ask its authors at MVTec",
    home="https://www.mvtec.com/company/research/publications",
    citation="Bergmann et al., Improving Unsupervised Defect Segmentation by Applying Structural Similarity to "
    "Autoencoders, VISAPP 2019",
    categories=("texture_1", "texture_2"),
    images=300,
    tree=TREE,
    obtain="On its home page, follow the link to the data set beside the paper of 2019, download textures.zip and "
    "unpack it.",
    split="as published: good images to learn from, defective ones to judge; no good image is judged",
    counts={name: {"train": 100, "test/anomalous": 50} for name in ("texture_1", "texture_2")},
)


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images of both textures, or of one. Raises DatasetError for another layout."""
    return list_tree(dataset, root, categories, tree=TREE)
