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
Case counts.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from storage.datasets.mvtec_ad import list_tree
from storage.errors import DatasetError, MaskError, OutsideRoot
from storage.layouts import ROLES, Layout, checked_layout, masked_roles, pattern_regex, placeholders, read_toml
from storage.listing import (
    IMAGE_SUFFIXES,
    Dataset,
    Listing,
    SetAside,
    choose,
    existing_folder,
    images_in,
    refused,
)
from storage.masks import decode_mask
from storage.readers import add_category, check_option, drawn, is_tree
from storage.samples import Label, Sample, Split

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
        "good_by_mask": good_by_mask,
        "good_without_mask": good_without_mask,
        "test_share": test_share,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    file = root / (layout or "layout.toml")
    described = layout is not None or file.is_file()
    if described or given:
        table = {**(read_toml(file) if described else {}), **given}
        if inspect is not None:
            table["inspect"] = inspect
        return _list_described(dataset, root, categories, checked_layout(table))
    if not is_tree(root):
        return _list_plain(dataset, root, categories, None if inspect is None else Path(str(inspect)))
    if inspect is not None:
        raise DatasetError(
            f"{root} has train/good, so its images to judge come from test/, but {str(inspect)!r} was given to inspect"
            f"; leave it out, or give a plain folder of good images as root"
        )
    return list_tree(dataset, root, categories)


def _list_plain(dataset: str, good: Path, categories: Sequence[str] | None, inspect: Path | None) -> Listing:
    """One category named after the folder of good images; paths are relative to what both folders have in common."""
    if inspect is None:
        raise DatasetError(f"{good} has no train/good, and no folder to inspect was given; {_LAYOUTS}")
    inspect = existing_folder(inspect, "folder to inspect")
    if inspect == good:
        raise DatasetError(f"{good} was given as good images and as images to inspect; give two folders")
    choose(categories, [good.name])
    root = Path(os.path.commonpath([good, inspect]))
    samples: list[Sample] = []
    aside = []
    for folder, split, label in ((good, "train", "good"), (inspect, "test", "unknown")):
        path = folder.relative_to(root).as_posix()
        files, left_out = images_in(folder, root, good.name, [path])
        if not files:
            raise DatasetError(f"{folder} holds no image directly in it ({len(left_out)} set aside); {_LAYOUTS}")
        samples += [Sample("", file, dataset, good.name, split, label, label) for file in files]  # type: ignore[arg-type]
        aside += left_out
    given = tuple(folder.relative_to(root).as_posix() for folder in (good, inspect))
    nested = [entry for entry in aside if entry.path not in given]  # the other folder given is no stray
    return Listing(root=root, folders=given, samples=samples, set_aside=nested)


# The layout itself: read, and checked before any file is looked at.


@dataclass(frozen=True)
class _Claim:
    """What a pattern says of an image."""

    path: str
    split: Split
    label: Label
    category: str
    defect_type: str | None
    part: str | None
    role: str = field(compare=False)
    by: str = field(compare=False)
    """The pattern, for people."""
    names: Mapping[str, str] = field(compare=False)


def _list_described(dataset: str, root: Path, categories: Sequence[str] | None, layout: Layout) -> Listing:
    files, strays = _walk(root)
    images = [path for path in files if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
    claims, aside, silent = _claims(layout, images, root.name)
    if not any(claim.role == "train" for claim in claims):
        raise DatasetError(f"{root} holds no image to learn from: {_why_silent('train', layout.train[0], images)}")
    masks, mask_files = _find_masks(layout, claims, files)
    if layout.mask and not masks:
        silent[f"mask {layout.mask[0]!r}"] = f"names no file for any image, such as {claims[0].path}"
    known = {claim.category for claim in claims}
    claims, ambiguous = _without_masks(claims, mask_files)
    aside += ambiguous
    strays |= _unclaimed(images, {claim.path for claim in claims} | {entry.path for entry in aside} | set(mask_files))
    aside += _with_categories(strays, claims)
    chosen = choose(categories, known)
    listing = Listing(root, set_aside=[entry for entry in aside if entry.category in chosen])
    nothing = f"train = {', '.join(layout.train)} leaves it no image to learn from"
    for category in chosen:
        kept, left_out = _samples(dataset, root, layout, [c for c in claims if c.category == category], masks)
        add_category(listing, category, kept, left_out, nothing)
        listing.set_aside.extend(SetAside(category, what, reason) for what, reason in silent.items())
    return listing


def _walk(root: Path) -> tuple[list[str], dict[str, str]]:
    """All files, sorted, but hidden ones; and the folders that are not entered, with the reason."""
    files: list[str] = []
    closed: dict[str, str] = {}

    def refuse(error: OSError) -> None:
        closed[Path(error.filename).relative_to(root).as_posix()] = "may not be read; change the folder's permissions"

    for folder, names, found in os.walk(root, onerror=refuse):
        here = Path(folder).relative_to(root)
        shown = [name for name in names if not name.startswith(".")]
        names[:] = [name for name in shown if not os.path.islink(os.path.join(folder, name))]
        for name in set(shown) - set(names):
            closed[(here / name).as_posix()] = "a link to a folder, which is not followed; copy the folder to its place"
        files += [(here / name).as_posix() for name in found if not name.startswith(".")]
    return sorted(files), closed


def _claims(
    layout: Layout, images: Sequence[str], root_name: str
) -> tuple[list[_Claim], list[SetAside], dict[str, str]]:
    """One claim an image; the images of which patterns say different things; and the patterns that match nothing."""
    found: dict[str, list[_Claim]] = defaultdict(list)
    silent: dict[str, str] = {}
    for role in ROLES:
        for pattern in getattr(layout, role):
            matches = [match for match in map(pattern_regex(role, pattern).fullmatch, images) if match]
            for match in matches:
                names = {"category": layout.category or root_name, **match.groupdict()}
                found[match.string].append(_claim(match.string, role, pattern, names))
            if not matches:
                silent[f"{role} {pattern!r}"] = _why_silent(role, pattern, images)
    aside: list[SetAside] = []
    for path, given in found.items():
        who = " and ".join(claim.by for claim in given)
        if {"good", "anomalous"} <= {claim.label for claim in given}:
            raise DatasetError(f"{path} would be both good and anomalous: it is claimed by {who}; narrow one of them")
        if any(claim != given[0] for claim in given):
            aside.append(SetAside(given[0].category, path, f"claimed by {who}, which differ; narrow one of them"))
    apart = {entry.path for entry in aside}
    return [found[path][0] for path in sorted(found) if path not in apart], aside, silent


def _claim(path: str, role: str, pattern: str, names: Mapping[str, str]) -> _Claim:
    split, label = ROLES[role]
    kind = names.get("defect_type") if label == "anomalous" else None
    if kind == "good":
        label, kind = "good", None
    return _Claim(path, split, label, names["category"], kind, names.get("part"), role, f"{role} {pattern!r}", names)


def _why_silent(role: str, pattern: str, images: Sequence[str]) -> str:
    """What may be wrong with a pattern that matches nothing."""
    reason = f"{role} {pattern!r} matches none of {len(images)} images"
    anyway = re.compile(pattern_regex(role, pattern).pattern, re.DOTALL | re.IGNORECASE)
    near = next((path for path in images if anyway.fullmatch(path)), None)
    if near is not None:
        return f"{reason}; letters' case counts, and there is {near}"
    if any(path.startswith(pattern.rstrip("/") + "/") for path in images):
        return f"{reason}; a pattern names files: write {pattern.rstrip('/')}/*"
    return reason + (f", such as {images[0]}" if images else "")


def _find_masks(
    layout: Layout, claims: Sequence[_Claim], files: Sequence[str]
) -> tuple[dict[str, str], dict[str, _Claim]]:
    """Image path -> the path of its mask; and the path of each file of a mask -> an image that it belongs to."""
    in_folder: dict[str, list[str]] = defaultdict(list)
    for path in files:
        in_folder[posixpath.dirname(path)].append(path)
    known = set(files)
    masks: dict[str, str] = {}
    of_image: dict[str, _Claim] = {}
    for claim in claims:
        for path in [place for template in layout.mask if (place := _filled(template, claim)) is not None]:
            holds_image = claim.path == path or claim.path.startswith(path + "/")
            if not holds_image and (path in known or path in in_folder):
                masks[claim.path] = path
                of_image |= {file: claim for file in ([path] if path in known else in_folder[path])}
                break
    for image, paired in masks.items():
        if masks.get(paired) == image:
            raise DatasetError(f"{image} and {paired} would be each other's masks; narrow a pattern or mask")
    return masks, of_image


def _filled(template: str, claim: _Claim) -> str | None:
    """A mask's path for an image; None where the image lacks a name that is in it."""
    file = PurePosixPath(claim.path)
    names = {"parent": file.parent.as_posix(), "stem": file.stem, "suffix": file.suffix, "name": file.name}
    names |= claim.names
    if any(name not in names for name in placeholders("mask", template)):
        return None
    path = posixpath.normpath(re.sub(r"\{(\w+)\}", lambda match: names[match[1]], template))
    if path == ".." or path.startswith("../"):
        raise OutsideRoot(f"mask {template!r} leaves the root for {claim.path}; give a path in the root")
    return path


def _without_masks(claims: Sequence[_Claim], masks: Mapping[str, _Claim]) -> tuple[list[_Claim], list[SetAside]]:
    """The claims of images that are no masks. A pattern may well take both, such as a.png and a_mask.png."""
    images = [claim for claim in claims if claim.path not in masks]
    aside = [
        SetAside(claim.category, claim.path, f"claimed by {claim.by}, but also the mask of {masks[claim.path].path}")
        for claim in claims
        if claim.path in masks and masks[claim.path].role != claim.role
    ]
    return images, aside


def _unclaimed(images: Sequence[str], known: Collection[str]) -> dict[str, str]:
    """Folder -> how many of its images no pattern claims."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in images:
        if path not in known:
            by_folder[posixpath.dirname(path) or "."].append(path)
    return {
        folder: f"{len(paths)} images here are claimed by no pattern, the first: {posixpath.basename(paths[0])}"
        for folder, paths in by_folder.items()
    }


def _with_categories(strays: Mapping[str, str], claims: Sequence[_Claim]) -> list[SetAside]:
    """Folders left out, each told to the categories nearest to it: those with images in it or in its first parent."""
    near: dict[str, set[str]] = defaultdict(set)
    for folder, category in {(posixpath.dirname(claim.path), claim.category) for claim in claims}:
        for place in (folder, *map(str, PurePosixPath(folder).parents)):
            near[place or "."].add(category)
    aside = []
    for path, reason in sorted(strays.items()):
        place = next((str(p) for p in (PurePosixPath(path), *PurePosixPath(path).parents) if str(p) in near), ".")
        aside += [SetAside(category, path, reason) for category in sorted(near[place])]
    return aside


def _samples(
    dataset: str, root: Path, layout: Layout, claims: Sequence[_Claim], masks: Mapping[str, str]
) -> tuple[list[Sample], list[SetAside]]:
    """The samples of one category, and what is set aside."""
    samples: list[Sample] = []
    aside: list[SetAside] = []
    not_there = refused(root, {path for claim in claims for path in (claim.path, masks.get(claim.path)) if path})
    for claim in claims:
        reason = not_there.get(claim.path)
        files, broken = _mask_files(root, masks.get(claim.path), claim.category, not_there)
        mask = masks[claim.path] if files and not broken else None
        rule = _rule(layout, claim)
        label = claim.label
        if reason is None and claim.role in masked_roles(layout) and not (claim.role == "test" and label == "good"):
            label, reason = _judged(layout, claim, [root / file for file in files] if mask else [], rule)
            if broken and (layout.good_by_mask or layout.good_without_mask):
                reason = f"its mask, which says whether it is good, cannot be used: {broken[0].reason}"
        aside += broken
        if reason is not None:
            aside.append(SetAside(claim.category, claim.path, reason))
            continue
        kind = (claim.defect_type or "unknown") if label == "anomalous" else label
        sample = Sample("", claim.path, dataset, claim.category, claim.split, label, kind, part=claim.part)
        samples.append(replace(sample, mask=mask, mask_rule=rule) if label == "anomalous" and mask else sample)
    kept, apart = _kept_apart(_with_test_share(samples, layout))
    return kept, [*dict.fromkeys(aside), *apart]  # one mask may serve several images


def _mask_files(
    root: Path, mask: str | None, category: str, not_there: Mapping[str, str]
) -> tuple[list[str], list[SetAside]]:
    """The files of a mask, and those that may not be read."""
    if mask is None:
        return [], []
    if (root / mask).is_dir():
        return images_in(root / mask, root, category)
    return ([], [SetAside(category, mask, not_there[mask])]) if mask in not_there else ([mask], [])


def _rule(layout: Layout, claim: _Claim) -> str:
    name, _, image = layout.mask_rule.partition(":")
    return f"coco:{_filled(image or '{parent}/{name}', claim)}" if name == "coco" else layout.mask_rule


def _judged(layout: Layout, claim: _Claim, mask: Sequence[Path], rule: str) -> tuple[Label, str | None]:
    """The label that follows from an image's mask, and why the image is of no use with it."""
    if not mask and not layout.good_without_mask and not layout.good_by_mask:
        return claim.label, None
    if not mask and not layout.good_without_mask:
        return claim.label, "has no mask to say whether it is good; with good_without_mask = true it counts as good"
    try:
        marked = any(decode_mask(file.read_bytes(), rule).any() for file in mask) if layout.good_by_mask else bool(mask)
    except MaskError as error:
        return claim.label, f"its mask, which says whether it is good, cannot be read: {error}"
    if marked and claim.split != "test":
        return "anomalous", "its mask shows a defect; only good images are learned from"
    return "anomalous" if marked else "good", None


def _with_test_share(samples: list[Sample], layout: Layout) -> list[Sample]:
    """The samples with a share of the good parts moved to test, and with them all of a part that is judged anyway."""
    if not layout.test_share:
        return samples
    judged = {s.part for s in samples if s.split == "test" and s.part is not None}
    names = {s.part or s.path for s in samples if s.split == "train"} - judged
    moved = judged | (drawn(names, layout.test_share, layout.seed) if names else set())
    return [replace(s, split="test") if s.split == "train" and (s.part or s.path) in moved else s for s in samples]


def _kept_apart(samples: Sequence[Sample]) -> tuple[list[Sample], list[SetAside]]:
    """The samples whose part stands in one split only: where it stands in several, the one furthest from learning."""
    order = ("train", "validation", "test")
    stands = {s.part: s.split for s in sorted(samples, key=lambda s: order.index(s.split)) if s.part is not None}
    kept = [s for s in samples if s.part is None or stands[s.part] == s.split]
    aside = [
        SetAside(s.category, s.path, f"part {s.part} also stands in {stands[s.part]}; no part may stand in two splits")
        for s in samples
        if s.part is not None and stands[s.part] != s.split
    ]
    return kept, aside
