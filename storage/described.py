"""The images of a folder as a layout describes them."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from storage.claims import Claim, claims_of, filled, masks_of, why_silent, without_beside, without_masks
from storage.errors import DatasetError, MaskError
from storage.layouts import Layout, masked_roles
from storage.listing import (
    IMAGE_SUFFIXES,
    Listing,
    SetAside,
    choose,
    existing_folder,
    images_in,
    is_hidden,
    is_own_output,
    refused,
    unread,
    why_outside,
)
from storage.masks import decode_mask
from storage.readers import add_category, drawn, may_be_good, same_stem
from storage.samples import Label, Sample


def list_described(dataset: str, root: Path, categories: Sequence[str] | None, layout: Layout) -> Listing:
    """The images of a folder, claimed by the patterns of a layout. Raises DatasetError for a layout that contradicts
    itself or leaves no image to learn from, and OutsideRoot for a mask that leaves the root."""
    folders = (".", *folders_of_links(root, layout.links_to))
    files, strays = _walk(root, folders)
    images = [path for path in files if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
    claims, aside, silent = claims_of(layout, images, root.name)
    if not any(claim.role == "train" for claim in claims):
        raise DatasetError(f"{root} holds no image to learn from: {why_silent('train', layout.train[0], images)}")
    masks, mask_files = masks_of(layout, claims, files)
    if layout.mask and not masks:
        silent[f"mask {layout.mask[0]!r}"] = f"names no file for any image, such as {claims[0].path}"
    known = {claim.category for claim in claims}
    claims, ambiguous = without_masks(claims, mask_files)
    aside += ambiguous
    claims, left_out = without_beside(root, claims, masks)
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


def folders_of_links(root: Path, folders: Sequence[str]) -> list[str]:
    """Absolute paths of the folders that links may lead to, which are given relative to the root or absolute."""
    return [str(existing_folder(root / folder, "links_to")) for folder in folders]


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

    for folder, names, inside in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder).relative_to(root)
        shown = sorted(name for name in names if not is_hidden(name))
        own = [name for name in shown if is_own_output(os.path.join(folder, name))]
        closed |= {(here / name).as_posix(): "pictures that this program made, no images" for name in own}
        shown = [name for name in shown if name not in own]
        names[:] = [name for name in shown if follows(folder, name)]
        for name in set(shown) - set(names):
            closed[(here / name).as_posix()] = "a link to a folder, which is not followed; copy the folder to its place"
        files += [(here / name).as_posix() for name in inside if not is_hidden(name)]
    return sorted(files), closed


def _unread(files: Sequence[str], claims: Sequence[Claim], masks: Collection[str]) -> list[SetAside]:
    """Files that are neither images nor masks but lie in a folder of images."""
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


def _with_categories(strays: Sequence[SetAside], claims: Sequence[Claim]) -> list[SetAside]:
    """The folders left out, each for the nearest categories: those with images in it or in its first parent."""
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
    claims: Sequence[Claim],
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
            label, reason = _labelled(layout, claim, [root / file for file in files] if mask else [], rule)
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


def _shared_masks(layout: Layout, claims: Sequence[Claim], masks: Mapping[str, str]) -> dict[str, str]:
    """Masks that may belong to either of two images of one stem, with the reason. A mask that names the image's
    extension is not ambiguous, and neither is a file with the outlines of all images."""
    if any("{name}" in text or "{suffix}" in text for text in layout.mask) or layout.mask_rule.startswith("coco"):
        return {}
    reasons = {}
    for group in same_stem(claim.path for claim in claims):
        own = {masks[path] for path in group if path in masks}
        if len(own) == 1:
            reason = f"the mask of {' or '.join(group)}, which share a stem: whose is not known; rename one"
            reasons[own.pop()] = reason
    return reasons


def _mask_files(
    root: Path,
    mask: str | None,
    category: str,
    not_there: Mapping[str, str],
    shared: Mapping[str, str],
    folders: Sequence[str],
) -> tuple[list[str], list[SetAside]]:
    """The files of a mask, and those that may not be read; a mask in `shared` may belong to two images and has no
    files."""
    if mask is None:
        return [], []
    if mask in shared:
        return [], [SetAside(category, mask, shared[mask])]
    if (root / mask).is_dir():
        return images_in(root / mask, root, category, folders)
    return ([], [SetAside(category, mask, not_there[mask])]) if mask in not_there else ([mask], [])


def _rule(layout: Layout, claim: Claim) -> str:
    name, _, image = layout.mask_rule.partition(":")
    return f"coco:{filled(image or '{parent}/{name}', claim)}" if name == "coco" else layout.mask_rule


def _labelled(layout: Layout, claim: Claim, mask: Sequence[Path], rule: str) -> tuple[Label, str | None]:
    """The label that follows from an image's mask, and the reason why the image cannot be used, or None."""
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
    """The samples with a share of the good parts moved to test; all images of a part move together."""
    if not layout.test_share:
        return samples
    judged = {s.part for s in samples if s.split == "test" and s.part is not None}
    names = {s.part or s.path for s in samples if s.split == "train"} - judged
    moved = judged | (drawn(names, layout.test_share, layout.seed) if names else set())
    return [replace(s, split="test") if s.split == "train" and (s.part or s.path) in moved else s for s in samples]


def _kept_apart(samples: Sequence[Sample]) -> tuple[list[Sample], list[SetAside]]:
    """The samples, each part in one split only, and those set aside: a part in several splits stays in the one furthest
    from learning."""
    order = ("train", "validation", "test")
    stands = {s.part: s.split for s in sorted(samples, key=lambda s: order.index(s.split)) if s.part is not None}
    kept = [s for s in samples if s.part is None or stands[s.part] == s.split]
    aside = [
        SetAside(s.category, s.path, f"part {s.part} also stands in {stands[s.part]}; no part may stand in two splits")
        for s in samples
        if s.part is not None and stands[s.part] != s.split
    ]
    return kept, aside
