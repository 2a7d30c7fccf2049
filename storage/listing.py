"""What lies in a data set: the types of a listing, and looking into folders without guessing or leaving the root."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import DatasetError, OutsideRoot, nearest
from storage.samples import Sample

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg"),
    *(".jpx", ".jxl", ".jxr", ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff"),
    *(".wdp", ".webp"),
)
_SYSTEM = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
"""What operating systems and archivers leave behind; it counts as hidden."""
_A_FOLDER = "a folder where images were expected; what lies in it is not read"


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file of a data set at a stable address, for which its authors ask nothing."""

    url: str
    sha256: str
    size: int | None = None
    """Bytes, where the publisher says."""
    unpack_to: str = "."
    """Folder in the data set's root; archives (.zip, .tar, .tar.gz, .tar.xz) are unpacked there."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a person wants to know of a data set before getting it."""

    title: str
    licence: str
    home: str
    """Page of its authors."""
    citation: str
    """Paper to cite."""
    categories: tuple[str, ...] = ()
    """As published; empty: whatever lies there."""
    images: int | None = None
    """Number of images, as published."""
    tree: str
    """Expected folders and files, one a line."""
    obtain: str
    """How a person gets it."""
    split: str = "as published"
    """Which images are learned from and which are judged."""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Published numbers of images: category -> {`train`, `validation`, `test/good`, `test/anomalous` or
    `test/<defect type>`: n}."""
    counts_depend_on: tuple[str, ...] = ()
    """Options of the reader with which the published numbers are others than `counts`."""
    downloads: tuple[Download, ...] = ()


@dataclass(frozen=True)
class SetAside:
    """A file that a listing leaves out."""

    category: str
    path: str
    """Relative to the listing's root, with `/`."""
    reason: str
    files: int = 1
    """Files that it stands for, where the path is a folder of which files of one kind are left out."""


@dataclass(frozen=True)
class Listing:
    """What lies in a data set, in an order that depends on names alone."""

    root: Path
    """Resolved folder that all paths are relative to."""
    folders: tuple[str, ...] = (".",)
    """Folders that files may lie in: the root itself, or those in it given one by one; and those that links may lead
    to, as absolute paths."""
    samples: list[Sample] = field(default_factory=list)
    """Sorted by category and path; a reader leaves the content names (`id`, `mask_id`) empty."""
    set_aside: list[SetAside] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """Category -> why nothing can be learned in it."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Category -> what its layout says beyond the images, in JSON's types; kept with the catalogue."""


def counts_of(rows: Mapping[str, Sequence[int]], *names: str) -> dict[str, dict[str, int]]:
    """`Dataset.counts` of a table: category -> numbers of images in the order of the names."""
    return {category: dict(zip(names, numbers, strict=True)) for category, numbers in rows.items()}


def unknown(kind: str, given: object, known: Iterable[str]) -> DatasetError:
    """A DatasetError that names the nearest known names, or all of them when none is near."""
    return DatasetError(f"unknown {kind} {given!r}; {nearest(given, known)}")


def choose(categories: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """The categories asked for, sorted; all when none is named. Raises DatasetError or OutsideRoot for a bad name."""
    for name in categories or ():
        if name == ".." or "/" in name or "\\" in name:
            names = ", ".join(sorted(known))
            raise OutsideRoot(f"category {name!r} leaves the root; give the name of a folder in it: {names}")
        if name not in known:
            raise unknown("category", name, known)
    return sorted(set(categories or known))


def existing_folder(folder: Path, what: str = "root") -> Path:
    """The folder without links and `..`. Raises DatasetError when it is none, or may not be read."""
    if not os.path.isdir(folder):
        raise DatasetError(f"{what} {str(folder)!r} is not a folder; give the folder that holds the images")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DatasetError(f"{what} {str(folder)!r} may not be read; change the folder's permissions")
    return folder.resolve()


def inside(root: Path, path: str, folders: Sequence[str] = (".",)) -> Path:
    """The real place of a listed file. Raises OutsideRoot when a link or `..` leads out of these folders."""
    real = (root / path).resolve()
    if not any(real.is_relative_to((root / folder).resolve()) for folder in folders):
        raise OutsideRoot(
            f"{path} leads to {real}, outside of the data set; copy the file into it, or, in a data set `folder`, say "
            f"links_to = {str(real.parent)!r} (or a folder above it) where data are kept as links"
        )
    return real


def why_outside(root: Path, path: str, folders: Sequence[str] = (".",)) -> str | None:
    """The reason why a path counts as outside of these folders, or None."""
    try:
        inside(root, path, folders)
    except OutsideRoot as error:
        return str(error)
    return None


def why_not(root: Path, path: str, folders: Sequence[str] = (".",)) -> str | None:
    """The reason why a file may not be listed, or None. Whether it is an image shows when it is decoded."""
    if os.path.isdir(root / path):
        return why_outside(root, path, folders) or _A_FOLDER
    if not os.path.isfile(root / path):
        return "missing, a broken link or no regular file"
    return _bad_name(path) or why_outside(root, path, folders)


def refused(root: Path, paths: Iterable[str], folders: Sequence[str] = (".",)) -> dict[str, str]:
    """Path -> why it may not be listed, for paths that a table in the data set names, which may be anything."""
    parents: dict[str, bool] = {}
    reasons = {path: _why_refused(root, path, folders, parents) for path in paths}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def entries_in(folder: Path, root: Path, folders: Sequence[str] = (".",)) -> Iterator[tuple[str, bool, str | None]]:
    """Path, whether it is a folder, and why it may not be listed, of each image file and folder directly in a folder.

    Sorted by name; nothing for a missing folder. Hidden ones count as nothing, and so do files without an image's
    extension, of which `unread_in` tells.
    A folder that leads out of the root or may not be read is not opened: it is itself what is yielded.
    """
    here = folder.relative_to(root).as_posix()
    # Resolving is slow, so that only a folder is resolved: of what lies in it, links alone can lead elsewhere.
    reason = why_outside(root, here, folders)
    try:
        entries = [] if reason else _visible(folder)
    except PermissionError:
        entries, reason = [], "may not be read; change the folder's permissions"
    if reason:
        yield here, True, reason
    for entry in entries:
        path = entry.name if here == "." else f"{here}/{entry.name}"
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield path, True, why_outside(root, path, folders) if entry.is_symlink() else None
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            plain = entry.is_file(follow_symlinks=False)
            yield path, False, _bad_name(path) if plain else why_not(root, path, folders)


def images_in(
    folder: Path, root: Path, category: str, folders: Sequence[str] = (".",)
) -> tuple[list[str], list[SetAside]]:
    """Paths of the image files directly in a folder, sorted, and what there is set aside; none for a missing folder."""
    files: list[str] = []
    aside: list[SetAside] = []
    for path, is_folder, reason in entries_in(folder, root, folders):
        if reason is not None or is_folder:
            aside.append(SetAside(category, path, reason or _A_FOLDER))
        else:
            files.append(path)
    return files, aside


def unread_in(folder: Path, root: Path, category: str, folders: Sequence[str] = (".",)) -> list[SetAside]:
    """The files directly in a folder that have no image's extension and are not read, one entry an extension."""
    here = folder.relative_to(root).as_posix()
    try:
        entries = [] if why_outside(root, here, folders) else _visible(folder)
    except PermissionError:  # told where its images are looked for
        return []
    names = [entry.name for entry in entries if not entry.name.lower().endswith(IMAGE_SUFFIXES)]
    return unread(category, here, [name for name in names if not os.path.isdir(folder / name)])


def unread(category: str, folder: str, names: Iterable[str]) -> list[SetAside]:
    """The files of a folder that have no image's extension, one entry an extension."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(os.path.splitext(name)[1].lower(), []).append(name)
    return [SetAside(category, folder, _why_unread(kind, files), len(files)) for kind, files in sorted(kinds.items())]


def _why_unread(kind: str, names: Sequence[str]) -> str:
    what = (
        f"{len(names)} {'file' if len(names) == 1 else 'files'} {f'ending in {kind}' if kind else 'without extension'}"
    )
    return (
        f"{what} not read, the first: {min(names)!r}; images end in {', '.join(IMAGE_SUFFIXES)}: convert or rename "
        f"what is an image"
    )


def is_own_output(folder: str) -> bool:
    """Whether a folder holds pictures that this program made, which is known by what lies beside it."""
    place, name = os.path.split(os.path.abspath(folder))
    beside = {
        **dict.fromkeys(("maps", "masks", "overlays"), ("judged.jsonl",)),
        **dict.fromkeys(("data_docs", "search-data"), ("data.html", "index.html", "nights.html", "search.csv")),
    }
    return any(os.path.isfile(os.path.join(place, file)) for file in beside.get(name, ()))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is ignored."""
    return name.startswith(".") or name.lower() in _SYSTEM


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones; none for a missing or closed folder."""
    try:
        return [entry.name for entry in _visible(folder) if os.path.isdir(entry.path)]
    except PermissionError:  # told where its images are looked for
        return []


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, sorted by name alone: paths compare in another order on Windows."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not is_hidden(e.name)), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _bad_name(path: str) -> str | None:
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not valid UTF-8; rename it"
    return None


def _why_refused(root: Path, path: str, folders: Sequence[str], parents: dict[str, bool]) -> str | None:
    """The reason why a file may not be listed, or None. `parents` remembers which parents lie in the root: a regular
    file in one of them needs no closer look."""
    if not path or "\0" in path:
        return f"no path of a file: {path!r}"
    try:
        if path.startswith("/") or ".." in path.split("/"):
            return why_outside(root, path, folders) or "not written relative to the root without `..`"
        parent = path.rpartition("/")[0]
        if parent not in parents:
            parents[parent] = why_outside(root, parent, folders) is None
        file = f"{root}/{path}"
        plain = parents[parent] and os.path.isfile(file) and not os.path.islink(file)
        return _bad_name(path) if plain else why_not(root, path, folders)
    except (OSError, ValueError) as error:
        return str(error)
