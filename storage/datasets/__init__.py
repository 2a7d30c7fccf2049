"""Every data-set layout by name, and what they share: listing without guessing, hashing, staying inside the root.

A layout is one module with one function `list_samples(dataset, root, categories, inspect) -> Listing`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

from storage.errors import DatasetError, OutsideRoot
from storage.samples import Sample, content_hash

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Dataset:
    """A row of the table of data sets."""

    module: str
    """Layout module below `storage.datasets`."""
    title: str
    licence: str
    source: str
    """Where to get it."""


DATASETS: dict[str, Dataset] = {
    "demo": Dataset(
        "mvtec_ad",
        "Textures of scikit-image with synthetic defects",
        "CC0",
        "made on the spot by `al demo`",
    ),
    "folder": Dataset(
        "folder",
        "Your own images",
        "yours",
        "any folder in the layout of mvtec_ad, or two plain folders: good images, images to inspect",
    ),
    "mvtec_ad": Dataset(
        "mvtec_ad",
        "MVTec Anomaly Detection (MVTec AD), 15 categories",
        "CC BY-NC-SA 4.0",
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
    ),
}


@dataclass(frozen=True)
class SetAside:
    """A file that a listing leaves out."""

    category: str
    path: str
    """Relative to the listing's root, with `/`."""
    reason: str


@dataclass(frozen=True)
class Listing:
    """What lies in a data set, in an order that depends on names alone."""

    root: Path
    """Resolved folder that all paths are relative to."""
    folders: tuple[str, ...] = (".",)
    """Folders of the root that files may lie in: the root itself, or those given one by one."""
    samples: list[Sample] = field(default_factory=list)
    """Sorted by category and path."""
    set_aside: list[SetAside] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """Category -> why nothing can be learned in it."""


def list_samples(
    dataset: str, root: str | Path, categories: Sequence[str] | None = None, inspect: str | Path | None = None
) -> Listing:
    """The images of a data set with their content hashes; all categories unless some are named.

    `inspect` is a folder of images to judge, for a plain folder of good images. Raises DatasetError for an unknown
    data set or category and for a folder in no known layout, OutsideRoot for a category name that leaves the root.
    """
    if dataset not in DATASETS:
        raise unknown("data set", dataset, DATASETS)
    layout = import_module(f"storage.datasets.{DATASETS[dataset].module}")
    listing: Listing = layout.list_samples(dataset, Path(root), categories, None if inspect is None else Path(inspect))
    return listing


def unknown(kind: str, given: str, known: Iterable[str]) -> DatasetError:
    """A DatasetError that names the nearest known names, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return DatasetError(f"unknown {kind} {given!r}; {hint}")


def choose(categories: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """The categories asked for, sorted; all when none is named. Raises DatasetError or OutsideRoot for a bad name."""
    for name in categories or ():
        if name == ".." or "/" in name or "\\" in name:
            raise OutsideRoot(f"category {name!r} leaves the root; give the name of a folder in it: {', '.join(known)}")
        if name not in known:
            raise unknown("category", name, known)
    return sorted(set(categories or known))


def existing_folder(folder: Path, what: str) -> Path:
    """The folder without links and `..`. Raises DatasetError when it is none."""
    if not folder.is_dir():
        raise DatasetError(f"{what} {str(folder)!r} is not a folder; give the folder that holds the images")
    return folder.resolve()


def inside(root: Path, path: str, folders: Sequence[str] = (".",)) -> Path:
    """The real place of a listed file. Raises OutsideRoot when a link or `..` leads out of these folders."""
    real = (root / path).resolve()
    if not any(real.is_relative_to((root / folder).resolve()) for folder in folders):
        raise OutsideRoot(f"{path} leads to {real}, outside of the data set; copy the file into it")
    return real


def read_listed(root: Path, path: str, content: str, folders: Sequence[str] = (".",)) -> bytes:
    """The bytes of a listed file, which are those that were hashed.

    Raises OutsideRoot, and DatasetError when the file has changed since: its old name would lie about its content.
    """
    data = inside(root, path, folders).read_bytes()
    if content_hash(data) != content:
        raise DatasetError(f"{path} in {root} has changed since it was listed; run again to list the data set anew")
    return data


def images_in(
    folder: Path, root: Path, category: str, folders: Sequence[str] = (".",)
) -> tuple[list[str], list[SetAside]]:
    """Paths of the image files directly in a folder, sorted, and what there is set aside; none for a missing folder.

    Hidden files and files without an image's extension count as nothing. Whether an image is one shows in decoding.
    """
    files: list[str] = []
    aside: list[SetAside] = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.name.startswith(".") or not (entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES):
            continue
        path = entry.relative_to(root).as_posix()
        reason = _why_not(root, entry, path, folders)
        if reason is None:
            files.append(path)
        else:
            aside.append(SetAside(category, path, reason))
    return files, aside


def with_hashes(root: Path, samples: Iterable[Sample]) -> tuple[list[Sample], list[SetAside]]:
    """The samples, sorted, with the content hashes of their images and masks; unreadable files are set aside."""
    found = sorted(samples, key=lambda sample: (sample.category, sample.path))
    paths = list(dict.fromkeys(path for s in found for path in (s.path, s.mask) if path is not None))
    with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter's lock
        hashes = dict(zip(paths, pool.map(lambda path: _hash(root / path), paths), strict=True))
    kept: list[Sample] = []
    aside: list[SetAside] = []
    for sample in found:
        for path in (sample.path, sample.mask):
            if path is not None and hashes[path] is None:
                aside.append(SetAside(sample.category, path, "may not be read; change the file's permissions"))
        content, mask_id = hashes[sample.path], hashes[sample.mask] if sample.mask else None
        if content is not None:
            kept.append(replace(sample, id=content, mask=sample.mask if mask_id else None, mask_id=mask_id))
    return kept, aside


def _why_not(root: Path, entry: Path, path: str, folders: Sequence[str]) -> str | None:
    if entry.is_dir():
        return "a folder where images were expected; what lies in it is not read"
    if not entry.is_file():
        return "a broken link or no regular file"
    try:
        entry.name.encode()
        inside(root, path, folders)
    except OutsideRoot as error:
        return str(error)
    except UnicodeEncodeError:
        return "its name is not valid UTF-8; rename it"
    return None


def _hash(path: Path) -> str | None:
    try:
        return content_hash(path.read_bytes())
    except PermissionError:
        return None
