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
import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from storage.datasets.mvtec_ad import list_tree
from storage.errors import DatasetError, MaskError, OutsideRoot
from storage.layouts import (
    ROLES,
    Layout,
    check_mask_rule,
    check_name,
    checked_layout,
    masked_roles,
    pattern_regex,
    placeholders,
    read_toml,
    texts_of,
)
from storage.listing import (
    IMAGE_SUFFIXES,
    Dataset,
    Listing,
    SetAside,
    choose,
    existing_folder,
    images_in,
    is_hidden,
    is_own_output,
    refused,
    unread,
    unread_in,
    why_outside,
)
from storage.masks import decode_mask
from storage.readers import (
    add_category,
    check_option,
    divide_beside,
    drawn,
    fold,
    is_tree,
    masks_beside,
    may_be_good,
    same_stem,
)
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
        return _list_described(dataset, root, categories, checked_layout(table))
    check_name(category)
    links = _links(root, () if links_to is None else texts_of("links_to", links_to))
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


def _links(root: Path, folders: Sequence[str]) -> list[str]:
    """Absolute paths of the folders that links may lead to, which are given relative to the root or absolute."""
    return [str(existing_folder(root / folder, "links_to")) for folder in folders]


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
    folders = (".", *_links(root, layout.links_to))
    files, strays = _walk(root, folders)
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
    claims, left_out = _without_beside(root, claims, masks)
    aside += left_out
    placed = {*(claim.path for claim in claims), *(entry.path for entry in aside), *mask_files, *masks.values()}
    strays |= _unclaimed(images, placed)
    aside += _with_categories([SetAside("", path, reason) for path, reason in sorted(strays.items())], claims)
    aside += _with_categories(_unread(files, claims, mask_files), claims)
    chosen = choose(categories, known)
    listing = Listing(root, folders, set_aside=[entry for entry in aside if entry.category in chosen])
    nothing = f"train = {', '.join(layout.train)} leaves it no image to learn from"
    for category in chosen:
        own = [claim for claim in claims if claim.category == category]
        kept, left_out = _samples(dataset, root, layout, own, masks, folders)
        add_category(listing, category, kept, left_out, nothing)
        listing.set_aside.extend(SetAside(category, what, reason) for what, reason in silent.items())
    return listing


def _walk(root: Path, allowed: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """All files, sorted, but hidden ones; and the folders that are not entered, with the reason.

    Links to folders are followed only where `allowed` says that they may lead out of the root, and each folder once.
    """
    files: list[str] = []
    closed: dict[str, str] = {}
    entered: set[str] = set()

    def refuse(error: OSError) -> None:
        closed[Path(error.filename).relative_to(root).as_posix()] = "may not be read; change the folder's permissions"

    def follows(folder: str, name: str) -> bool:
        place = os.path.join(folder, name)
        if not os.path.islink(place):
            return True
        real = os.path.realpath(place)
        again = real in entered or Path(folder).is_relative_to(real)
        entered.add(real)
        return not again and len(allowed) > 1 and why_outside(root, os.path.relpath(place, root), allowed) is None

    for folder, names, found in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder).relative_to(root)
        shown = sorted(name for name in names if not is_hidden(name))
        own = [name for name in shown if is_own_output(os.path.join(folder, name))]
        closed |= {(here / name).as_posix(): "pictures that this program made, no images" for name in own}
        shown = [name for name in shown if name not in own]
        names[:] = [name for name in shown if follows(folder, name)]
        for name in set(shown) - set(names):
            closed[(here / name).as_posix()] = "a link to a folder, which is not followed; copy the folder to its place"
        files += [(here / name).as_posix() for name in found if not is_hidden(name)]
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
                found[match.string].append(_claim(match.string, role, pattern, names, layout.good or ()))
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


def _claim(path: str, role: str, pattern: str, names: Mapping[str, str], good: Collection[str]) -> _Claim:
    split, label = ROLES[role]
    kind = names.get("defect_type") if label == "anomalous" else None
    if kind == "good" or kind in good:
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
    alike = _by_fold(files)
    masks: dict[str, str] = {}
    of_image: dict[str, _Claim] = {}
    for claim in claims:
        for path in [place for template in layout.mask if (place := _filled(template, claim)) is not None]:
            path = path if path in known or path in in_folder else alike.get(fold(path), path)
            holds_image = claim.path == path or claim.path.startswith(path + "/")
            if not holds_image and (path in known or path in in_folder):
                masks[claim.path] = path
                of_image |= {file: claim for file in ([path] if path in known else in_folder[path])}
                break
    for image, paired in masks.items():
        if masks.get(paired) == image:
            raise DatasetError(f"{image} and {paired} would be each other's masks; narrow a pattern or mask")
    return masks, of_image


def _by_fold(files: Sequence[str]) -> dict[str, str]:
    """A file's path as people see it -> the path; nothing where several look the same."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in files:
        found[fold(path)].append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


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


def _without_beside(root: Path, claims: Sequence[_Claim], masks: dict[str, str]) -> tuple[list[_Claim], list[SetAside]]:
    """The claims of images that are no masks of others in their folder, whose names or looks say so; an image of `test`
    without another mask gets its own added to `masks`."""
    in_folder: dict[str, list[_Claim]] = defaultdict(list)
    for claim in claims:
        in_folder[posixpath.dirname(claim.path)].append(claim)
    images: list[_Claim] = []
    aside: list[SetAside] = []
    for own in in_folder.values():
        beside = masks_beside(root, [claim.path for claim in own])
        wanted = {c.path for c in own if c.role == "test" and c.label == "anomalous" and c.path not in masks}
        taken, left_out = divide_beside(own[0].category, beside, wanted - beside.keys())
        masks |= {image: mask for image, mask in taken.items() if mask is not None}
        aside += left_out
        images += [claim for claim in own if claim.path not in beside]
    return sorted(images, key=lambda claim: claim.path), aside


def _unread(files: Sequence[str], claims: Sequence[_Claim], masks: Collection[str]) -> list[SetAside]:
    """What is neither image nor mask, but lies in a folder of images."""
    folders = {posixpath.dirname(claim.path) for claim in claims}
    others: dict[str, list[str]] = defaultdict(list)
    for path in files:
        folder, name = posixpath.split(path)
        known = name.lower().endswith(IMAGE_SUFFIXES) or path in masks or name == "layout.toml"
        if folder in folders and not known:
            others[folder].append(name)
    return [entry for folder, names in sorted(others.items()) for entry in unread("", folder or ".", names)]


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


def _with_categories(strays: Sequence[SetAside], claims: Sequence[_Claim]) -> list[SetAside]:
    """Folders left out, each told to the categories nearest to it: those with images in it or in its first parent."""
    near: dict[str, set[str]] = defaultdict(set)
    for folder, category in {(posixpath.dirname(claim.path), claim.category) for claim in claims}:
        for place in (folder, *map(str, PurePosixPath(folder).parents)):
            near[place or "."].add(category)
    aside = []
    for stray in strays:
        path = PurePosixPath(stray.path)
        place = next((str(p) for p in (path, *path.parents) if str(p) in near), ".")
        aside += [replace(stray, category=category) for category in sorted(near[place])]
    return aside


def _samples(
    dataset: str,
    root: Path,
    layout: Layout,
    claims: Sequence[_Claim],
    masks: Mapping[str, str],
    folders: Sequence[str],
) -> tuple[list[Sample], list[SetAside]]:
    """The samples of one category, and what is set aside."""
    samples: list[Sample] = []
    aside: list[SetAside] = []
    named = {path for claim in claims for path in (claim.path, masks.get(claim.path)) if path}
    not_there = refused(root, named, folders)
    shared = _shared_masks(layout, claims, masks)
    for claim in claims:
        reason = not_there.get(claim.path)
        files, broken = _mask_files(root, masks.get(claim.path), claim.category, not_there, shared, folders)
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
        if label == "anomalous" and mask is None and layout.good is None and may_be_good(kind):
            label = "unknown"
        sample = Sample("", claim.path, dataset, claim.category, claim.split, label, kind, part=claim.part)
        samples.append(replace(sample, mask=mask, mask_rule=rule) if label == "anomalous" and mask else sample)
    kept, apart = _kept_apart(_with_test_share(samples, layout))
    return kept, [*dict.fromkeys(aside), *apart]  # one mask may serve several images


def _shared_masks(layout: Layout, claims: Sequence[_Claim], masks: Mapping[str, str]) -> dict[str, str]:
    """Masks that may be of either of two images of one stem, with the reason; one that names the image's extension, or
    a file of all outlines, is no such."""
    if any("{name}" in text or "{suffix}" in text for text in layout.mask) or layout.mask_rule.startswith("coco"):
        return {}
    found = {}
    for group in same_stem(claim.path for claim in claims):
        own = {masks[path] for path in group if path in masks}
        if len(own) == 1:
            reason = f"the mask of {' or '.join(group)}, which share a stem: whose is not known; rename one"
            found[own.pop()] = reason
    return found


def _mask_files(
    root: Path,
    mask: str | None,
    category: str,
    not_there: Mapping[str, str],
    shared: Mapping[str, str],
    folders: Sequence[str],
) -> tuple[list[str], list[SetAside]]:
    """The files of a mask, and those that may not be read; `shared` masks are those of either of two images."""
    if mask is None:
        return [], []
    if mask in shared:
        return [], [SetAside(category, mask, shared[mask])]
    if (root / mask).is_dir():
        return images_in(root / mask, root, category, folders)
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
