"""MVTec LOCO AD: logical and structural anomalies (Bergmann, Batzner, Fauser, Sattlegger, Steger 2022, IJCV 130).

    <root>/<category>/train/good/000.png, validation/good/000.png
                      test/good/000.png, test/logical_anomalies/000.png, test/structural_anomalies/000.png
                      ground_truth/<type>/<image's stem>/000.png, 001.png ...   one file an annotated region
                      defects_config.json   [{defect_name, pixel_value, saturation_threshold, relative_saturation}, ...]

A region's pixels have the `pixel_value` of its kind of defect, which need not be 255, so any value but 0 marks. The
configurations are kept as notes: category -> list; a saturation threshold is a number of pixels, or a share of the
region where it is relative.

Layout and numbers: Table 1 of the paper, readers of anomalib 2.7 and dataset-ninja/mvtec-loco-ad. The table has 3644
images, the published archive 3651 (counted by dataset-ninja and by another public audit of the archive): 360 and 60
instead of 354 and 59 for training and validation of splicing_connectors. `counts` are those of the archive.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.datasets.mvtec_ad import list_tree
from storage.errors import DatasetError
from storage.listing import Dataset, Listing, SetAside, counts_of, why_not

TREE = """\
<root>/<category>/train/good/000.png ...
<root>/<category>/validation/good/000.png ...
<root>/<category>/test/good/000.png ...
<root>/<category>/test/logical_anomalies/000.png ...
<root>/<category>/test/structural_anomalies/000.png ...
<root>/<category>/ground_truth/<logical_anomalies or structural_anomalies>/000/000.png, 001.png ...
<root>/<category>/defects_config.json"""

_PUBLISHED = {  # train, validation, test good, logical, structural
    "breakfast_box": (351, 62, 102, 83, 90),
    "juice_bottle": (335, 54, 94, 142, 94),
    "pushpins": (372, 69, 138, 91, 81),
    "screw_bag": (360, 60, 122, 137, 82),
    "splicing_connectors": (360, 60, 119, 108, 85),
}

DATASET = Dataset(
    title="MVTec LOCO AD: violated logical constraints and structural defects of 5 products",
    licence="CC BY-NC-SA 4.0",
    home="https://www.mvtec.com/company/research/datasets/mvtec-loco",
    citation="Bergmann et al., Beyond Dents and Scratches: Logical Constraints in Unsupervised Anomaly Detection and "
    "Localization, IJCV 130, 2022",
    categories=tuple(_PUBLISHED),
    images=3651,
    tree=TREE,
    obtain="Download it from its home page, whose form asks you to accept the licence, and unpack the archive.",
    counts=counts_of(
        _PUBLISHED, "train", "validation", "test/good", "test/logical_anomalies", "test/structural_anomalies"
    ),
)

_MOST_PIXELS = 10**9
"""A saturation threshold beyond any image's size is no number of pixels."""


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None) -> Listing:
    """The images of MVTec LOCO AD. Raises DatasetError for another layout.

    A category without a proper defects_config.json is listed all the same; the file is set aside with the reason.
    """
    listing = list_tree(dataset, root, categories, tree=TREE, mask_rule="nonzero")
    one = (listing.root / "train" / "good").is_dir()  # the root is a category
    for category in sorted({sample.category for sample in listing.samples}):
        path = "defects_config.json" if one else f"{category}/defects_config.json"
        try:
            listing.notes[category] = _defects(listing.root, path)
        except (DatasetError, OSError, ValueError, RecursionError) as error:
            reason = f"no configuration of defects: {error}; copy it from the archive"
            listing.set_aside.append(SetAside(category, path, reason))
    return listing


def _defects(root: Path, path: str) -> list[dict[str, Any]]:
    """The checked content of a defects_config.json."""
    reason = why_not(root, path)
    if reason is not None:
        raise DatasetError(reason)
    content = json.loads((root / path).read_bytes())
    if not isinstance(content, list) or not content:
        raise DatasetError(f"a list of defects was expected, not {str(content)[:80]}")
    defects = [_defect(entry) for entry in content]
    values = [defect["pixel_value"] for defect in defects]
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise DatasetError(f"pixel_value {twice[0]} stands for two defects")
    return defects


def _defect(entry: Any) -> dict[str, Any]:
    """Name, pixel value and saturation of one kind of defect."""
    fields = entry if isinstance(entry, dict) else {}
    name, value = fields.get("defect_name"), fields.get("pixel_value")
    threshold, relative = fields.get("saturation_threshold", 0), fields.get("relative_saturation")
    if not (isinstance(name, str) and name and type(value) is int and 0 < value < 256):
        raise DatasetError(f"a defect_name and a pixel_value of 1 to 255 were expected in {str(entry)[:200]}")
    most = 1 if relative else _MOST_PIXELS
    if type(relative) is not bool or type(threshold) not in (int, float) or not 0 < threshold <= most:
        raise DatasetError(
            f"relative_saturation, true or false, and a saturation_threshold above 0 and up to {most} were expected in "
            f"{str(entry)[:200]}"
        )
    return {
        "defect_name": name,
        "pixel_value": value,
        "saturation_threshold": threshold,
        "relative_saturation": relative,
    }
