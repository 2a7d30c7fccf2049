"""VisA (Zou, Jeong, Pemula, Zhang, Dabeer 2022, ECCV: SPot-the-Difference), as its authors pack it.

    <root>/split_csv/1cls.csv, 2cls_fewshot.csv, 2cls_highshot.csv      columns object,split,label,image,mask
           <category>/Data/Images/Normal/0000.JPG, Data/Images/Anomaly/000.JPG
           <category>/Data/Masks/Anomaly/000.png                        0 or the number of a defect type, 1..n
           <category>/image_anno.csv                                    columns image,label,mask

The CSV decides what is learned from and what is judged; its paths are relative to the root. `1cls` is the protocol for
learning from good images alone: nine tenths of them to learn from, a tenth and all defective ones to judge. The other
two are for two-class training: about a fifth (fewshot) or more (highshot) of the good *and* of the defective images
are to be learned from. Nothing here learns from defects, so that the defective rows of their training splits are set
aside, while their test splits stay as published: figures are then comparable on the same test images, learned from
fewer good ones.

The word for a defect is taken from `image_anno.csv`, which names one or several for an image; several are `combined`.
A copy reorganised by the authors' prepare_data.py (1cls/<category>/train/good/...) is read by `folder`.

anomalib calls the licence CC BY-NC-SA 4.0; the authors' README says CC BY 4.0, which stands here.

Sources: README, split_csv and prepare_data.py (any non-zero value is anomalous) of github.com/amazon-science/spot-diff;
image_anno.csv and its columns from readers in public repositories. Numbers of images: normal and anomalous from that
README; their division by 1cls.csv (tenths, rounded) was compared with the CSV for pipe_fryum only.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from storage.errors import DatasetError
from storage.listing import Dataset, Download, Listing, SetAside, choose, inside, refused, unknown, why_not
from storage.readers import add_category, find_root, strays
from storage.samples import Sample, Split

TREE = """\
<root>/split_csv/1cls.csv                       object,split,label,image,mask
<root>/<category>/Data/Images/Normal/0000.JPG ...
<root>/<category>/Data/Images/Anomaly/000.JPG ...
<root>/<category>/Data/Masks/Anomaly/000.png ...
<root>/<category>/image_anno.csv                optional: the words for the defects"""

PROTOCOLS = ("1cls", "2cls_fewshot", "2cls_highshot")

_PUBLISHED = {  # normal images to learn from, normal images to judge; 100 anomalous ones each
    "candle": (900, 100),
    "capsules": (542, 60),
    "cashew": (450, 50),
    "chewinggum": (453, 50),
    "fryum": (450, 50),
    "macaroni1": (900, 100),
    "macaroni2": (900, 100),
    "pcb1": (904, 100),
    "pcb2": (901, 100),
    "pcb3": (905, 101),
    "pcb4": (904, 101),
    "pipe_fryum": (450, 50),
}

DATASET = Dataset(
    title="Visual Anomaly: 12 objects, among them four circuit boards",
    licence="CC BY 4.0",
    home="https://github.com/amazon-science/spot-diff",
    citation="Zou et al., SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and Segmentation, "
    "ECCV 2022",
    categories=tuple(_PUBLISHED),
    images=10821,
    tree=TREE,
    obtain="Download VisA_20220922.tar (1.9 GB) from the address on its home page and unpack it into one folder.",
    split="split_csv/1cls.csv, or the CSV named by `protocol`",
    counts={
        name: {"train": train, "test/good": good, "test/anomalous": 100} for name, (train, good) in _PUBLISHED.items()
    },
    counts_depend_on=("protocol",),
    downloads=(
        Download(
            url="https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar",
            # anomalib 2.7, data/datamodules/image/visa.py; size and the same sum in several public repositories
            sha256="2eb8690c803ab37de0324772964100169ec8ba1fa3f7e94291c9ca673f40f362",
            size=1_929_840_640,
        ),
    ),
)

_COLUMNS = ("object", "split", "label", "image", "mask")


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None, *, protocol: str = "1cls") -> Listing:
    """The images of VisA as `split_csv/<protocol>.csv` divides them. Raises DatasetError for another layout."""
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    table = f"split_csv/{protocol}.csv"
    root = find_root(root, lambda folder: (folder / table).is_file(), table, TREE.replace("1cls", protocol))
    rows: dict[str, list[Mapping[str, str]]] = {}
    for row in _read_table(root, table, _COLUMNS):
        if row["object"] in ("", ".", "..") or re.search(r"[/\\\0]", row["object"]):
            raise DatasetError(
                f"{root / table}: object {row['object']!r} is no name of a folder; take it from the archive"
            )
        rows.setdefault(row["object"], []).append(row)
    listing = Listing(root)
    for name in choose(categories, rows):
        samples, aside = _list_category(dataset, name, root, rows[name], table)
        add_category(listing, name, samples, aside, f"{table} gives no image of {name} to learn from that is there")
    return listing


def _list_category(
    dataset: str, category: str, root: Path, rows: Sequence[Mapping[str, str]], table: str
) -> tuple[list[Sample], list[SetAside]]:
    words = _defect_words(root, category)
    named = {_plain(row[column]) for row in rows for column in ("image", "mask")}
    not_there = refused(root, named)
    samples: dict[str, Sample] = {}
    aside: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["split"] != "test"):  # what is judged first: it counts where both are
        image, mask = _plain(row["image"]), _plain(row["mask"])
        reason = _why_no_sample(row) or not_there.get(image)
        if reason is None and image in samples:
            reason = f"in more than one row of {table}; the first counts"
        if reason is not None:
            aside.setdefault(image, reason)
            continue
        split: Split = "train" if row["split"] == "train" else "test"
        if row["label"] == "normal":
            samples[image] = Sample("", image, dataset, category, split, "good", "good")
            continue
        kept = mask if mask not in not_there else None  # it may name none
        if mask and kept is None:
            aside[mask] = f"a mask, which is {not_there[mask]}"
        word = words.get(image, "anomaly")
        samples[image] = Sample("", image, dataset, category, split, "anomalous", word, kept, mask_rule="nonzero")
    left_out = [SetAside(category, path, aside[path]) for path in sorted(aside)]
    left_out += strays(root / category / "Data", root, category, named, f"in no row of {table}")
    return [samples[path] for path in sorted(samples)], left_out


def _why_no_sample(row: Mapping[str, str]) -> str | None:
    if row["split"] not in ("train", "test") or row["label"] not in ("normal", "anomaly"):
        return f"its row says split {row['split']!r}, label {row['label']!r}; expected train, test; normal, anomaly"
    if row["split"] == "train" and row["label"] == "anomaly":
        return "a defective image of a supervised training split; only good images are learned from"
    return None


def _defect_words(root: Path, category: str) -> dict[str, str]:
    """Image -> the published word for its defect, where the category has an `image_anno.csv`."""
    table = f"{category}/image_anno.csv"
    if why_not(root, table) is not None:
        return {}
    words: dict[str, str] = {}
    for row in _read_table(root, table, ("image", "label")):
        several = [word.strip() for word in row["label"].split(",") if word.strip()]
        if several:
            words[_plain(row["image"])] = several[0] if len(several) == 1 else "combined"
    return words


def _read_table(root: Path, path: str, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with inside(root, path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(f"{root / path} cannot be read ({error}); take it from the archive again") from error
    for row in rows:
        if any(row.get(column) is None for column in columns):
            raise DatasetError(f"{root / path} has no columns {','.join(columns)} in each row; got {row}")
    if not rows:
        raise DatasetError(f"{root / path} has no rows; take it from the archive again")
    return [{column: row[column].strip() for column in columns} for row in rows]


def _plain(path: str) -> str:
    """The path in one spelling, so that `./a` and `a` are equal."""
    return PurePosixPath(path).as_posix() if path else ""
