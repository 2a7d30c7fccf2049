"""What the patterns of a layout say of a folder's images: which image each claims, as what, and which mask is whose."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from storage.errors import DatasetError, OutsideRoot
from storage.layouts import ROLES, Layout, pattern_regex, placeholders
from storage.listing import SetAside
from storage.readers import divide_beside, fold, masks_beside
from storage.samples import Label, Split


@dataclass(frozen=True)
class Claim:
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


def claims_of(
    layout: Layout, images: Sequence[str], root_name: str
) -> tuple[list[Claim], list[SetAside], dict[str, str]]:
    """The claims, one an image; the images about which patterns disagree, set aside; and the patterns that match
    nothing, with the reason."""
    claims: dict[str, list[Claim]] = defaultdict(list)
    silent: dict[str, str] = {}
    for role in ROLES:
        for pattern in getattr(layout, role):
            matches = [match for match in map(pattern_regex(role, pattern).fullmatch, images) if match]
            for match in matches:
                names = {"category": layout.category or root_name, **match.groupdict()}
                claims[match.string].append(_claim(match.string, role, pattern, names, layout.good or ()))
            if not matches:
                silent[f"{role} {pattern!r}"] = why_silent(role, pattern, images)
    aside: list[SetAside] = []
    for path, given in claims.items():
        who = " and ".join(claim.by for claim in given)
        if {"good", "anomalous"} <= {claim.label for claim in given}:
            raise DatasetError(f"{path} would be both good and anomalous: it is claimed by {who}; narrow one of them")
        if any(claim != given[0] for claim in given):
            aside.append(SetAside(given[0].category, path, f"claimed by {who}, which differ; narrow one of them"))
    apart = {entry.path for entry in aside}
    return [claims[path][0] for path in sorted(claims) if path not in apart], aside, silent


def _claim(path: str, role: str, pattern: str, names: Mapping[str, str], good: Collection[str]) -> Claim:
    split, label = ROLES[role]
    kind = names.get("defect_type") if label == "anomalous" else None
    if kind == "good" or kind in good:
        label, kind = "good", None
    return Claim(path, split, label, names["category"], kind, names.get("part"), role, f"{role} {pattern!r}", names)


def why_silent(role: str, pattern: str, images: Sequence[str]) -> str:
    """The reason why a pattern may match nothing."""
    reason = f"{role} {pattern!r} matches none of {len(images)} images"
    anyway = re.compile(pattern_regex(role, pattern).pattern, re.DOTALL | re.IGNORECASE)
    near = next((path for path in images if anyway.fullmatch(path)), None)
    if near is not None:
        return f"{reason}; letters' case counts, and there is {near}"
    if any(path.startswith(pattern.rstrip("/") + "/") for path in images):
        return f"{reason}; a pattern names files: write {pattern.rstrip('/')}/*"
    return reason + (f", such as {images[0]}" if images else "")


def masks_of(layout: Layout, claims: Sequence[Claim], files: Sequence[str]) -> tuple[dict[str, str], dict[str, Claim]]:
    """Image path -> the path of its mask; and the path of each file of a mask -> an image that it belongs to."""
    in_folder: dict[str, list[str]] = defaultdict(list)
    for path in files:
        in_folder[posixpath.dirname(path)].append(path)
    known = set(files)
    alike = _by_fold(files)
    masks: dict[str, str] = {}
    of_image: dict[str, Claim] = {}
    for claim in claims:
        for path in [place for template in layout.mask if (place := filled(template, claim)) is not None]:
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
    """A file's path in composed small letters -> the path; paths that look the same are left out."""
    paths_of: dict[str, list[str]] = defaultdict(list)
    for path in files:
        paths_of[fold(path)].append(path)
    return {name: paths[0] for name, paths in paths_of.items() if len(paths) == 1}


def filled(template: str, claim: Claim) -> str | None:
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


def without_masks(claims: Sequence[Claim], masks: Mapping[str, Claim]) -> tuple[list[Claim], list[SetAside]]:
    """The claims without those of masks, and the images set aside: a pattern may take both a.png and a_mask.png."""
    images = [claim for claim in claims if claim.path not in masks]
    aside = [
        SetAside(claim.category, claim.path, f"claimed by {claim.by}, but also the mask of {masks[claim.path].path}")
        for claim in claims
        if claim.path in masks and masks[claim.path].role != claim.role
    ]
    return images, aside


def without_beside(root: Path, claims: Sequence[Claim], masks: dict[str, str]) -> tuple[list[Claim], list[SetAside]]:
    """The claims without those of masks that lie beside their images and are known by name or looks; a test image
    without another mask gets its own added to `masks`."""
    in_folder: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        in_folder[posixpath.dirname(claim.path)].append(claim)
    images: list[Claim] = []
    aside: list[SetAside] = []
    for own in in_folder.values():
        beside = masks_beside(root, [claim.path for claim in own])
        wanted = {c.path for c in own if c.role == "test" and c.label == "anomalous" and c.path not in masks}
        taken, left_out = divide_beside(own[0].category, beside, wanted - beside.keys())
        masks |= {image: mask for image, mask in taken.items() if mask is not None}
        aside += left_out
        images += [claim for claim in own if claim.path not in beside]
    return sorted(images, key=lambda claim: claim.path), aside
