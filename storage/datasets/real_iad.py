"""Real-IAD (Wang, Zhu, Gao et al. 2024, CVPR): 30 objects, each part seen by five cameras.

    <root>/realiad_256|512|1024|raw/<category>/OK/S0001/<category>_0001_OK_C1_<time>.jpg
                                               NG/<defect>/S0044/<category>_0044_NG_<defect>_C1_<time>.jpg, ..._mask.png
    <root>/realiad_jsons/realiad_jsons/<category>.json          the published division, all cameras
                         realiad_jsons_sv/<category>.json       one camera
                         realiad_jsons_fuiad_0.0|.../...        training images with a share of defective ones
           (or these folders directly in the root)

A JSON file holds `meta` (`prefix`: "<category>/", `normal_class`: "OK") and the lists `train` and `test` of
{`category`, `anomaly_class`, `image_path`, `mask_path` or null}, with paths relative to the prefix in the images'
folder. Each image has its own label: one of a defective part on which the defect is not to be seen is good
(`anomaly_class` OK). The folder S0001 is the physical part; it never stands in two splits, and a training image of a
part that is also judged is set aside. Only good images are learned from, so that what the fuiad files mix in is set
aside too: they differ here by their fewer good images, and their protocol of contaminated training is not reproduced.

Sources: the reader of anomalib 2.7 (data/datasets/image/realiad.py); readers in public repositories (names of files
and of JSON folders, codes of the defects); the dataset cards of AI4Manufacturing/192 on Hugging Face (30,210 parts, of
which 7,293 are learned from; 36,465 and 114,585 images; good views of defective parts). Not confirmed: the numbers by
category, and the values of a mask (any but 0 counts as anomalous).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from storage.errors import DatasetError
from storage.listing import Dataset, Listing, SetAside, choose, inside, refused, subfolders, unknown
from storage.readers import add_category, check_option, find_root, strays
from storage.samples import Sample, Split

TREE = """\
<root>/realiad_1024/<category>/OK/S0001/*.jpg ...
<root>/realiad_1024/<category>/NG/<defect>/S0044/*.jpg, *_mask.png ...
<root>/realiad_jsons/realiad_jsons/<category>.json"""

RESOLUTIONS = ("256", "512", "1024", "raw")

DEFECTS = {
    "AK": "pit",
    "BX": "deformation",
    "CH": "abrasion",
    "HS": "scratch",
    "PS": "damage",
    "QS": "missing parts",
    "YW": "foreign objects",
    "ZW": "contamination",
}

DATASET = Dataset(
    title="Real-IAD: 30 objects from five cameras",
    licence="CC BY-NC-SA 4.0",
    home="https://realiad4ad.github.io/Real-IAD",
    citation="Wang et al., Real-IAD: A Real-World Multi-View Dataset for Benchmarking Versatile Industrial Anomaly "
    "Detection, CVPR 2024",
    categories=(
        "audiojack",
        "bottle_cap",
        "button_battery",
        "end_cap",
        "eraser",
        "fire_hood",
        "mint",
        "mounts",
        "pcb",
        "phone_battery",
        "plastic_nut",
        "plastic_plug",
        "porcelain_doll",
        "regulator",
        "rolled_strip_base",
        "sim_card_set",
        "switch",
        "tape",
        "terminalblock",
        "toothbrush",
        "toy",
        "toy_brick",
        "transistor1",
        "u_block",
        "usb",
        "usb_adaptor",
        "vcpill",
        "wooden_beads",
        "woodstick",
        "zipper",
    ),
    images=151050,
    tree=TREE,
    obtain="Its authors ask who you are and to accept their terms: request access at "
    "https://huggingface.co/datasets/Real-IAD/Real-IAD, download one folder realiad_<resolution> and realiad_jsons, "
    "and unpack them into one folder.",
    split="the JSON files in realiad_jsons, or those in the folder named by `split`",
)


def list_samples(
    dataset: str, root: Path, categories: Sequence[str] | None, *, resolution: str = "", split: str = "realiad_jsons"
) -> Listing:
    """The images of Real-IAD at one resolution, divided by the JSON files of one folder.

    `resolution` is 256, 512, 1024 or raw and may be left out when only one is there; `split` names the folder of the
    JSON files. Raises DatasetError for another layout.
    """
    allowed = isinstance(split, str) and not re.search(r"[/\\\0]", split) and split not in ("", ".", "..")
    check_option("split", split, allowed, "the name of a folder of JSON files, such as realiad_jsons_sv")
    root = find_root(root, _has_images, "folder realiad_256, realiad_512, realiad_1024 or realiad_raw", TREE)
    images = _images_folder(root, str(resolution))
    files = _split_files(root, split)
    listing = Listing(root)
    for name in choose(categories, files):
        try:
            content = _read_split(root, files[name])
        except DatasetError as error:
            listing.problems[name] = str(error)
            continue
        samples, aside = _list_category(dataset, name, root, images, content, files[name])
        nothing = f"{files[name]} gives no good image to learn from that is in {images}"
        add_category(listing, name, samples, aside, nothing)
    return listing


def _has_images(folder: Path) -> bool:
    return any((folder / f"realiad_{resolution}").is_dir() for resolution in RESOLUTIONS)


def _images_folder(root: Path, resolution: str) -> str:
    there = [name for name in RESOLUTIONS if (root / f"realiad_{name}").is_dir()]
    if resolution and resolution not in there:
        raise unknown("resolution", resolution, there)
    if not resolution and len(there) > 1:
        raise DatasetError(f"{root} holds the resolutions {', '.join(there)}; name one by the option `resolution`")
    return f"realiad_{resolution or there[0]}"


def _split_files(root: Path, split: str) -> dict[str, str]:
    """Category -> path of its JSON file."""
    for folder in (f"realiad_jsons/{split}", split):
        files = sorted((root / folder).glob("*.json"), key=lambda file: file.name) if (root / folder).is_dir() else []
        if files:
            return {file.stem: f"{folder}/{file.name}" for file in files if not file.name.startswith(".")}
    known = [name for name in [*subfolders(root), *subfolders(root / "realiad_jsons")] if "json" in name]
    raise DatasetError(
        f"{root} has no JSON files in realiad_jsons/{split} or {split}; folders of JSON files there: "
        f"{', '.join(sorted(set(known))) or 'none'}; unpack realiad_jsons, or name one by the option `split`"
    )


def _read_split(root: Path, path: str) -> Mapping[str, Any]:
    try:
        content = json.loads(inside(root, path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # OutsideRoot and broken JSON are ValueErrors
        raise DatasetError(f"{path} cannot be read ({error}); unpack it again") from error
    lists = [content.get(key, []) for key in ("train", "test")] if isinstance(content, dict) else [None]
    if not all(isinstance(entries, list) for entries in lists):
        raise DatasetError(f"{path} holds no lists `train` and `test`; unpack it again")
    if not isinstance(content.setdefault("meta", {}), dict):
        raise DatasetError(f"{path} has a `meta` that is no object; unpack it again")
    return content  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Entry:
    """What a JSON file says of one image; paths relative to the root."""

    split: Split
    image: str
    mask: str | None
    kind: str
    part: str


def _list_category(
    dataset: str, category: str, root: Path, images: str, content: Mapping[str, Any], table: str
) -> tuple[list[Sample], list[SetAside]]:
    entries, aside = _entries(category, images, content, table)
    named = {path for entry in entries for path in (entry.image, entry.mask) if path is not None}
    not_there = refused(root, named)
    normal = content["meta"].get("normal_class", "OK")
    judged = {entry.part for entry in entries if entry.split == "test"}
    samples: dict[str, Sample] = {}
    for entry in entries:
        image, mask = entry.image, entry.mask
        reason = not_there.get(image) or _why_not_learned_from(entry, normal, judged)
        if reason is None and image in samples:
            reason = f"named more than once in {table}; the first counts"
        if reason is not None:
            aside.setdefault(image, reason)
            continue
        if entry.kind == normal:
            samples[image] = Sample("", image, dataset, category, entry.split, "good", "good", part=entry.part)
            continue
        if mask in not_there:
            aside[mask], mask = f"a mask, which is {not_there[mask]}", None
        word = DEFECTS.get(entry.kind, entry.kind)
        rule, part = "nonzero", entry.part
        samples[image] = Sample("", image, dataset, category, "test", "anomalous", word, mask, None, rule, part)
    left_out = [SetAside(category, path, aside[path]) for path in sorted(aside)]
    left_out += strays(root / images / category, root, category, named, f"in no list of {table}")
    return [samples[path] for path in sorted(samples)], left_out


def _why_not_learned_from(entry: _Entry, normal: str, judged: Collection[str]) -> str | None:
    if entry.split == "train" and entry.kind != normal:
        return "a defective image among those to learn from; only good images are learned from"
    if entry.split == "train" and entry.part in judged:
        return f"an image to learn from of the part {entry.part}, of which others are judged"
    return None


def _entries(category: str, images: str, content: Mapping[str, Any], table: str) -> tuple[list[_Entry], dict[str, str]]:
    """The entries of both lists, test images first; and place in the file -> why nothing is listed for it."""
    prefix = PurePosixPath(images, str(content["meta"].get("prefix", category)))
    entries: list[_Entry] = []
    aside: dict[str, str] = {}
    splits: tuple[Split, ...] = ("test", "train")
    for split in splits:
        for number, entry in enumerate(content.get(split, [])):
            if not _is_entry(entry):
                aside[f"{table}[{split}][{number}]"] = f"no anomaly_class and image_path in it: {entry!r:.100}"
                continue
            image, mask = entry["image_path"], entry.get("mask_path")
            part = PurePosixPath(image).parent.as_posix()
            mask = (prefix / mask).as_posix() if mask else None
            entries.append(_Entry(split, (prefix / image).as_posix(), mask, entry["anomaly_class"], part))
    return entries, aside


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("image_path"), str)
        and isinstance(entry.get("anomaly_class"), str)
        and isinstance(entry.get("mask_path"), str | None)
    )
