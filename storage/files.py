"""The files of a listing: hashed once, read only as what was hashed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from storage.errors import DatasetError
from storage.listing import IMAGE_SUFFIXES, Listing, SetAside, inside
from storage.samples import Sample, content_hash, sample_id
from storage.tables import table_bytes, table_of

Progress = Callable[[int, int], None]
"""(files done, files in all)."""

MAX_BYTES = 2**30
"""Larger files are not read: no image that is decoded has as many bytes, and they would fill the memory."""
MAX_PIXELS = 89_478_485
"""Larger masks are not read, as larger images are not (Pillow's own limit for a decompression bomb)."""
_COLUMNS = ["path", "size", "mtime_ns", "ctime_ns", "inode", "content"]
_RACY_NS = 2_000_000_000
"""Nanoseconds before its hashing in which a file may have been written and may change again without a new time."""
_TICK_NS = 100_000_000
"""The same for the time of an inode, which no file system keeps in whole seconds."""


@dataclass
class Hashes:
    """Content names of files by place, size, times and inode: a file is hashed again only when one has changed.

    The time of the inode's change and its number tell what was put in a file's place with its size and time (`rsync
    -a`, `cp -p`, an archive whose times are fixed).
    """

    known: dict[str, tuple[int, int, int, int, str]] = field(default_factory=dict)
    """Path -> size in bytes, times of change of content and of inode in ns, number of the inode, content name."""
    hashed: int = 0
    """Files whose content was read."""

    def of(self, root: Path, path: str) -> str | None:
        """The file's content name; None for one that may not be read, is too large, or has gone since it was listed."""
        try:
            before = os.stat(root / path)
            if before.st_size > MAX_BYTES:
                return None
            kept = self.known.get(path)
            stamp = (before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino)
            if kept is not None and kept[:4] == stamp:
                return kept[4]
            now = time.time_ns()
            name = content_hash((root / path).read_bytes())
        except (PermissionError, FileNotFoundError):
            return None
        self.hashed += 1
        if now - before.st_mtime_ns > _RACY_NS and now - before.st_ctime_ns > _TICK_NS:
            self.known[path] = (*stamp, name)
        return name

    def to_parquet(self) -> bytes:
        """The table, to be kept."""
        rows = [(path, *kept) for path, kept in sorted(self.known.items())]
        # An inode's number may have its highest bit set.
        return table_bytes(pd.DataFrame(rows, columns=_COLUMNS).astype({"inode": "uint64"}))

    @staticmethod
    def from_parquet(data: bytes) -> Hashes:
        """What was kept; nothing of a table of an earlier version, which knew less of a file."""
        frame = table_of(data)
        if {"path", "content"} <= set(frame) and "inode" not in frame:
            return Hashes()
        rows = frame[_COLUMNS].itertuples(index=False, name=None)
        return Hashes({str(path): (*map(int, stamp), str(name)) for path, *stamp, name in rows})  # type: ignore[misc]


def with_hashes(listing: Listing, hashes: Hashes, progress: Progress | None = None) -> Listing:
    """The listing, sorted, with the content names of images and masks; unreadable files are set aside."""
    samples = sorted(listing.samples, key=lambda s: (s.category, s.path, s.box or ""))
    files = {s.mask: _files_of(listing.root / s.mask, s.mask) for s in samples if s.mask is not None}
    points = [s.xyz for s in samples if s.xyz is not None and s.split == "test"]
    paths = list(dict.fromkeys([*(s.path for s in samples), *points, *(p for group in files.values() for p in group)]))
    names: dict[str, str | None] = {}
    with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter's lock
        for path, name in zip(paths, pool.map(lambda path: hashes.of(listing.root, path), paths), strict=True):
            names[path] = name
            if progress is not None:
                progress(len(names), len(paths))
    kept: list[Sample] = []
    aside: list[SetAside] = []
    for sample in samples:
        group = files[sample.mask] if sample.mask is not None else []
        xyz = sample.xyz if sample.split == "test" else None
        for path in (sample.path, *group, *([] if xyz is None else [xyz])):
            if names[path] is None:
                aside.append(SetAside(sample.category, path, _why_unread(listing.root / path)))
        content = names[sample.path]
        mask_id = None if sample.mask is None else _folder_id(sample.mask, group, names)
        if content is not None:
            mask = sample.mask if mask_id else None
            named = replace(sample, id=sample_id(content, sample.box), mask=mask, mask_id=mask_id)
            if xyz is not None:
                named = replace(named, xyz=xyz if names[xyz] else None, xyz_id=names[xyz])
            kept.append(named)
    return replace(listing, samples=kept, set_aside=listing.set_aside + list(dict.fromkeys(aside)))


def _why_unread(path: Path) -> str:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "has gone since it was listed; run again"
    except PermissionError:
        size = 0
    if size > MAX_BYTES:
        return f"has {size} bytes, which is larger than {MAX_BYTES >> 30} GiB; crop or tile it, and run again"
    return "may not be read; see to its permissions and run again"


def read_image(root: Path, sample: Sample, folders: Sequence[str] = (".",)) -> bytes:
    """The bytes of a sample's file, which are those that were hashed; its box is not cut out.

    Raises OutsideRoot, and DatasetError when the file has changed since: its old name would lie about its content.
    """
    data = inside(root, sample.path, folders).read_bytes()
    if sample_id(content_hash(data), sample.box) != sample.id:
        raise _changed(root, sample.path)
    return data


def mask_files(root: Path, sample: Sample, folders: Sequence[str] = (".",)) -> Iterator[bytes]:
    """The bytes of a sample's mask, file by file. Raises as `read_image`."""
    assert sample.mask is not None
    real = inside(root, sample.mask, folders)
    data = {path: inside(root, path, folders).read_bytes() for path in _files_of(real, sample.mask)}
    names: dict[str, str | None] = {path: content_hash(content) for path, content in data.items()}
    if not data or _folder_id(sample.mask, list(data), names) != sample.mask_id:
        raise _changed(root, sample.mask)
    yield from data.values()


def points_file(root: Path, sample: Sample, folders: Sequence[str] = (".",)) -> bytes:
    """The bytes of a test sample's 3-D points. Raises as `read_image`."""
    assert sample.xyz is not None
    data = inside(root, sample.xyz, folders).read_bytes()
    if content_hash(data) != sample.xyz_id:
        raise _changed(root, sample.xyz)
    return data


def _changed(root: Path, path: str) -> DatasetError:
    return DatasetError(f"{path} in {root} has changed since it was listed; run again to list the data set anew")


def _files_of(real: Path, path: str) -> list[str]:
    """The file itself, or the images in it, sorted, where it is a folder."""
    if not real.is_dir():
        return [path]
    names = sorted(e.name for e in real.iterdir() if e.suffix.lower() in IMAGE_SUFFIXES and not e.name.startswith("."))
    return [f"{path}/{name}" for name in names]


def _folder_id(mask: str, files: Sequence[str], names: dict[str, str | None]) -> str | None:
    """Content name of a mask; of a folder it is made of its files' names. None when any may not be read."""
    contents = [names[path] for path in files]
    if not contents or None in contents:
        return None
    if list(files) == [mask]:
        return contents[0]
    return content_hash("\n".join(f"{p.rsplit('/', 1)[-1]} {n}" for p, n in zip(files, contents, strict=True)).encode())
