"""Your own images, in one of three layouts.

1. The tree of MVTec AD.
2. A plain folder of good images as the root, and a second one as the option `inspect`. Only the files directly in them
   are read, so that the folder to inspect may lie within the other.
3. Anything else, described by patterns: as options, in the root's file `layout.toml`, or in the file that the option
   `layout` names (relative to the root, or absolute). An option overrides the file's key of the same name.

Each texture in a folder of its own, good and defective images side by side, masks of the defective ones alone (DAGM
2007; its layout as read by `data/input_dagm.py` of vicoslab/mixed-segdec-net-comind2021):

    train = "{category}/Train/*.PNG"
    test = "{category}/Test/*.PNG"
    mask = "{parent}/Label/{stem}_label.PNG"
    good_without_mask = true                # a defective image below Train is set aside: it is not learned from

One product, each part photographed several times (`good/17_left.jpg`, `bad/scratch/18_top.jpg`), outlined in LabelMe:

    category = "gear"
    train = "good/{part}_*.jpg"
    test = "bad/{defect_type}/{part}_*.jpg"
    inspect = "new/*.jpg"
    mask = "{parent}/{stem}.json"
    mask_rule = "labelme"
    test_share = 0.2                        # of the good parts, drawn; no part is both learned from and judged

Keys: `storage.layouts.Layout`. A pattern is relative to the root; in it `*` and `?` stand for characters of a name,
`**` for any folders, and {category} {defect_type} {part} {id} for the characters that they name: as few as possible,
and the same again where one is repeated ({id} is there for masks' names). A mask is a path, or several to be tried in
order, of the same names and the image's {parent} {stem} {suffix} {name}; it may be a folder whose masks are united.
Case counts, but for masks of which no other could be meant.

Of any layout: `category` names a root that is one product (a plain folder has its own name otherwise), `good` names
kinds of test images that are good beside `good` (when it is left out, images of a kind that may mean so, such as ok or
0, are unknown and counted in no figure; `good = []` makes them defective), and `links_to` folders that links may lead
to. `mask_rule` may be said of a tree, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.datasets.mvtec_ad import list_tree
from storage.described import folders_of_links, list_described
from storage.errors import DatasetError
from storage.layouts import check_mask_rule, check_name, checked_layout, read_toml, texts_of
from storage.listing import Dataset, Listing, SetAside, choose, existing_folder, images_in, unread_in
from storage.readers import check_option, divide_beside, is_tree, masks_beside
from storage.samples import Sample

_TREE = "[<category>/]train/good/*, test/<good or defect type>/*, ground_truth/<defect type>/<stem>_mask.png"
_LAYOUTS = (
    f"understood are: {_TREE}; or a plain folder of good images, with a second folder given as `inspect`; or any "
    f"folder with a layout.toml that says where its images lie"
)

DATASET = Dataset(
    title="Your own images",
    licence="yours",
    home="-",
    citation="-",
    tree=f"<root>/{_TREE}\n\nor two plain folders: good images as the root, images to judge as the option `inspect`\n\n"
    'or any tree, described in <root>/layout.toml:\ntrain = "{category}/good/*.png"\n'
    'test = "{category}/defects/{defect_type}/*.png"\nmask = "{category}/masks/{defect_type}/{stem}_mask.png"',
    obtain="Take photographs.",
    split="as the folders or patterns say; with `test_share`, good images to judge are drawn, seeded and by part",
)


def list_samples(
    dataset: str,
    root: Path,
    categories: Sequence[str] | None,
    *,
    inspect: str | Sequence[str] | None = None,
    layout: str | None = None,
    good: str | int | Sequence[str] | None = None,
    links_to: str | Sequence[str] | None = None,
    train: str | Sequence[str] | None = None,
    validation: str | Sequence[str] | None = None,
    test_good: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    mask: str | Sequence[str] | None = None,
    mask_rule: str | None = None,
    category: str | None = None,
    good_by_mask: bool | None = None,
    good_without_mask: bool | None = None,
    test_share: float | None = None,
    seed: int | None = None,
) -> Listing:
    """The images of a folder. `inspect` is a folder beside a plain folder of good images, else a pattern like the rest.

    None stands for what the layout's file says. Raises DatasetError, saying which layouts are understood, for a folder
    in none or a layout that contradicts itself, and OutsideRoot for a pattern that leaves the root.
    """
    check_option("layout", layout, layout is None or isinstance(layout, str), "the path of a TOML file")
    root = existing_folder(root)
    options = {
        "train": train,
        "validation": validation,
        "test_good": test_good,
        "test": test,
        "mask": mask,
        "mask_rule": mask_rule,
        "category": category,
        "good": good,
        "links_to": links_to,
        "good_by_mask": good_by_mask,
        "good_without_mask": good_without_mask,
        "test_share": test_share,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    file = root / (layout or "layout.toml")
    described = layout is not None or file.is_file()
    tree = is_tree(root)
    of_any = {"category", "good", "links_to"} | ({"mask_rule"} if tree else set())
    if described or given.keys() - of_any:
        table = {**(read_toml(file) if described else {}), **given}
        if inspect is not None:
            table["inspect"] = inspect
        return list_described(dataset, root, categories, checked_layout(table))
    check_name(category)
    links = folders_of_links(root, () if links_to is None else texts_of("links_to", links_to))
    if not tree:
        return _list_plain(dataset, root, categories, None if inspect is None else Path(str(inspect)), category, links)
    if inspect is not None:
        raise DatasetError(
            f"{root} has train/good, so its images to judge come from test/, but {str(inspect)!r} was given to inspect"
            f"; leave it out, or give a plain folder of good images as root"
        )
    check_mask_rule(mask_rule or "auto")
    words = None if good is None else texts_of("good", good)
    rule = mask_rule or "auto"
    return list_tree(dataset, root, categories, mask_rule=rule, good=words, called=category, links_to=links)


def name_of(root: Path, options: Mapping[str, Any]) -> str | None:
    """The name of a root that is one category whatever lies in it; None where that is still to be seen."""
    given = options.get("category")
    if isinstance(given, str):
        return given
    patterns = options.get("train") or options.get("layout") or os.path.isfile(root / "layout.toml")
    if patterns or not os.path.isdir(root) or (is_tree(root) and not os.path.isdir(root / "train/good")):
        return None
    return root.resolve().name


def _list_plain(
    dataset: str,
    good: Path,
    categories: Sequence[str] | None,
    inspect: Path | None,
    called: str | None,
    links: Sequence[str],
) -> Listing:
    """One category, named after the folder of good images unless it is `called` something else; paths are relative to
    what both folders have in common."""
    if inspect is None:
        raise DatasetError(f"{good} has no train/good, and no folder to inspect was given; {_LAYOUTS}")
    inspect = existing_folder(inspect, "folder to inspect")
    if inspect == good:
        raise DatasetError(f"{good} was given as good images and as images to inspect; give two folders")
    name = called or good.name
    choose(categories, [name])
    root = Path(os.path.commonpath([good, inspect]))
    samples: list[Sample] = []
    aside: list[SetAside] = []
    given = tuple(folder.relative_to(root).as_posix() for folder in (good, inspect))
    for folder, path, split, label in zip((good, inspect), given, ("train", "test"), ("good", "unknown"), strict=True):
        files, left_out = images_in(folder, root, name, [path, *links])
        if not files:
            raise DatasetError(f"{folder} holds no image directly in it ({len(left_out)} set aside); {_LAYOUTS}")
        beside = masks_beside(root, files)
        images = [file for file in files if file not in beside]
        samples += [Sample("", file, dataset, name, split, label, label) for file in images]  # type: ignore[arg-type]
        # The other folder given is no stray.
        aside += [entry for entry in left_out if entry.path not in given] + divide_beside(name, beside, ())[1]
        aside += unread_in(folder, root, name, [path, *links])
    return Listing(root=root, folders=(*given, *links), samples=samples, set_aside=aside)
