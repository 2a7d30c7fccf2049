"""Fetching a data set: resumed where it stopped, verified before it is opened, moved into place when it is whole.

    <root>/.download/<name>/part, part.json   what has come so far, and what the server said of it
                            unpacking/        an archive being unpacked; thrown away by the next run
                            unpacked/         whole and verified, waiting for the other files of the data set
    <root>/.download/moving                   files are being moved into the root (`unfinished`)
    <root>/.downloaded.json                   the checksums of what lies in place

Nothing appears beside these until every file has been fetched, verified and unpacked; then it is moved by renaming.
Archives are pinned by checksum, and are still not trusted: all that they hold is a regular file or a folder inside of
the target, within limits.
"""

from __future__ import annotations

import email.utils
import functools
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import httpx
from filelock import FileLock, Timeout

from storage.errors import DownloadError
from storage.listing import Download
from storage.whole import write_whole

Progress = Callable[[str, int, int | None], None]
"""(what is being done, bytes done, bytes in all where known)."""

_WORK = ".download"
_MARKER = ".downloaded.json"
_MOVING = "moving"
_CHUNK = 1 << 20
_ADVANCE = 1 << 20
"""New bytes that make a broken-off try count as a step forward, not as a failure."""
_SMALL = 64 << 20
"""Bytes up to which an archive may expand whatever its own size: blank masks compress without end."""
_NAME_BYTES, _PATH_BYTES = 255, 1024
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    RuntimeError,  # an encrypted zip, an unknown compression, headers nested without end
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where a download gives up."""

    tries: int = 6
    """Failures in a row, without a step forward, before the error is shown."""
    backoff_s: float = 1.0
    """Pause after the first failure; it doubles with each."""
    wait_s: float = 120.0
    """Longest pause, also if the server asks for a longer one."""
    timeout_s: float = 60.0
    """Longest silence of a server."""
    download_bytes: int = 1 << 40
    """Largest file fetched."""
    files: int = 2_000_000
    """Members of an archive."""
    file_bytes: int = 64 << 30
    """Largest member."""
    unpacked_bytes: int = 2 << 40
    """All members together."""
    ratio: int = 100
    """Unpacked to packed bytes; images hardly shrink, a bomb does."""


LIMITS = Limits()


class _Passing(RuntimeError):
    """A fault that may be gone at the next try."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def download_dataset(
    downloads: Sequence[Download], root: Path, progress: Progress | None = None, *, limits: Limits = LIMITS
) -> None:
    """Fetch the files of a data set, verify and unpack them, and move them into the root; done once, nothing happens.

    Existing files are replaced only by files of the same size. Raises DownloadError; what has been fetched by then is
    kept in a hidden folder of the root, and the next run goes on from there.
    """
    for download in downloads:
        _check(download)
    if all(_is_placed(download, root) for download in downloads):
        return
    root = root.resolve()  # the root itself may be a link; nothing in it may
    report = progress or (lambda what, done, total: None)
    with _only_one(root), httpx.Client(follow_redirects=True, timeout=limits.timeout_s) as client:
        missing = [download for download in downloads if not _is_placed(download, root)]
        ready = [_make_ready(client, download, root, limits, report) for download in missing]
        for folder in ready:
            _refuse_clash(folder, root)
        (root / _WORK / _MOVING).touch()
        for download, folder in zip(missing, ready, strict=True):
            _place(download, folder, root)
    shutil.rmtree(root / _WORK, ignore_errors=True)


def unfinished(root: Path) -> bool:
    """Whether a download was killed while it moved its files into this folder: some may be missing."""
    return (root / _WORK / _MOVING).exists()


def _check(download: Download) -> None:
    """Refuse what no server is needed to refuse."""
    try:
        url = httpx.URL(download.url)
    except httpx.InvalidURL as error:
        raise DownloadError(f"{download.url!r} is no address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise DownloadError(f"{download.url!r} is no http or https address; nothing else is fetched")
    if not re.fullmatch("[0-9a-f]{64}", download.sha256):
        raise DownloadError(f"SHA-256 {download.sha256!r} of {download.url}; expected 64 hex digits in lower case")
    _parts(download.unpack_to)


def _make_ready(client: httpx.Client, download: Download, root: Path, limits: Limits, report: Progress) -> Path:
    """The folder with the unpacked content of a download, as it will lie in the root."""
    work = root / _WORK / _key(download)
    unpacked = work / "unpacked"
    if unpacked.exists():
        return unpacked
    work.mkdir(parents=True, exist_ok=True)
    partial = _Partial(work / "part", work / "part.json")
    try:
        _fetch(client, download, partial, limits, report)
        _verify(download, partial, report)
        _unpack(download, partial.file, work / "unpacking", limits, report)
        os.replace(work / "unpacking", unpacked)
        partial.clear()
    except OSError as error:
        raise DownloadError(f"{download.url} could not be stored in {work}: {error}; run again to go on") from error
    return unpacked


# ---- fetching


@dataclass(frozen=True)
class _Partial:
    """A file of which some bytes have come, and what is needed to ask for the others."""

    file: Path
    about: Path

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def stated(self, what: Literal["total", "validator"]) -> Any:
        """The bytes in all, or the strong ETag or date of this version, as the server stated; None where it did not."""
        return _read_json(self.about).get(what)

    def clear(self) -> None:
        """Forget it all; the file first, or a kill in between would leave bytes under another version's name."""
        self.file.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)

    def begin(self, answer: httpx.Response) -> None:
        """Start anew with the version of this answer."""
        self.clear()
        length = answer.headers.get("content-length")
        stated = {"validator": _validator(answer), "total": None if length is None else int(length)}
        write_whole(self.about, json.dumps(stated, indent=1))

    def is_continued_by(self, answer: httpx.Response) -> bool:
        """Whether a partial answer goes on exactly where these bytes end, in the same version."""
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("content-range", ""))
        return (
            part is not None
            and int(part[1]) == self.size
            and (part[2] == "*" or self.stated("total") in (None, int(part[2])))
            and _validator(answer) in (None, self.stated("validator"))
        )


def _validator(answer: httpx.Response) -> str | None:
    """The strong ETag of an answer, else its date. RFC 9110, 13.1.5: a weak ETag does not say that the bytes are the
    same."""
    etag: str | None = answer.headers.get("etag")
    date: str | None = answer.headers.get("last-modified")
    return etag if etag and not etag.startswith("W/") else date


def _fetch(client: httpx.Client, download: Download, partial: _Partial, limits: Limits, report: Progress) -> None:
    """Bring the partial file to its full length, through passing faults."""
    failures, best = 0, partial.size
    while not _is_complete(download, partial):
        try:
            return _receive(client, download, partial, limits, report)
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
            raise DownloadError(f"{download.url} leads to no file at an http or https address: {error}") from error
        except httpx.TransportError as error:
            fault = _Passing(f"{type(error).__name__}: {error}")
        except _Passing as error:
            fault = error
        if partial.size >= best + _ADVANCE:  # more than ever before: a server that always starts anew is not endless
            failures, best = 0, partial.size
        failures += 1
        if failures >= limits.tries:
            kept = f"{partial.size} bytes are kept, run again to go on"
            raise DownloadError(f"{download.url} failed {failures} times in a row, at last: {fault}; {kept}") from fault
        if fault.wait_s > limits.wait_s:
            raise DownloadError(f"{download.url} {fault} and asks to wait {fault.wait_s:.0f} s; run again after that")
        time.sleep(max(fault.wait_s, min(limits.wait_s, limits.backoff_s * 2 ** (failures - 1))))


def _is_complete(download: Download, partial: _Partial) -> bool:
    return partial.size == (partial.stated("total") if download.size is None else download.size)


def _receive(client: httpx.Client, download: Download, partial: _Partial, limits: Limits, report: Progress) -> None:
    """One request: the rest of the file where the server still has that version, else all of it."""
    asked = {"Accept-Encoding": "identity"}  # lengths and ranges are those of the file
    if partial.size and (version := partial.stated("validator")):
        asked |= {"Range": f"bytes={partial.size}-", "If-Range": version}
    with client.stream("GET", download.url, headers=asked) as answer:
        _accept(answer, partial)
        if answer.status_code == httpx.codes.OK:
            partial.begin(answer)
        have, expected = partial.size, _expected_length(download, partial, limits)
        bound = limits.download_bytes if expected is None else expected
        with partial.file.open("ab") as file:
            for chunk in answer.iter_raw():
                have += len(chunk)
                if have > bound:
                    break
                file.write(chunk)
                file.flush()  # what is reported outlives a kill
                report(_file_name(download), have, expected)
    if have > bound:
        partial.clear()
        raise DownloadError(f"{download.url} sends more than the {bound} bytes expected; it was broken off and deleted")
    if expected is not None and have < expected:
        raise _Passing(f"ended after {have} of {expected} bytes")


def _accept(answer: httpx.Response, partial: _Partial) -> None:
    """Raise _Passing for what may pass, DownloadError for what will not; a part that does not fit is forgotten."""
    status, said = answer.status_code, f"answered {answer.status_code} {answer.reason_phrase}"
    if status == httpx.codes.OK or (status == httpx.codes.PARTIAL_CONTENT and partial.is_continued_by(answer)):
        return
    if status in (httpx.codes.PARTIAL_CONTENT, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE):
        partial.clear()
        raise _Passing(f"{said}, not the part asked for")
    if status in (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS) or status >= 500:
        raise _Passing(said, _retry_after(answer.headers.get("retry-after", "")))
    raise DownloadError(f"{answer.url} {said}; expected the file. Has it moved? Its home page says how to get it")


def _retry_after(text: str) -> float:
    """Seconds to wait, given as a number or a date; 0 for anything else."""
    if text.isdecimal():
        return float(text[:9])
    with suppress(ValueError):
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, (date.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    return 0.0


def _expected_length(download: Download, partial: _Partial, limits: Limits) -> int | None:
    """Bytes in all, if anyone says; refuses a length that is not the published one, too long or beyond the disk."""
    stated = partial.stated("total")
    if download.size is not None and stated not in (None, download.size):
        partial.clear()
        raise DownloadError(f"{download.url} states {stated} bytes, expected {download.size}: not the published file")
    expected = stated if download.size is None else download.size
    if expected is not None and expected > limits.download_bytes:
        raise DownloadError(f"{download.url} states {expected} bytes, more than the {limits.download_bytes} allowed")
    if expected is not None:  # images do not shrink: their archive needs as much again when it is unpacked
        _refuse_full_disk(partial.file.parent, 2 * expected - partial.size)
    return expected


def _verify(download: Download, partial: _Partial, report: Progress) -> None:
    """Raise DownloadError, and delete the file, when its content is not the published one."""
    digest, done, total = hashlib.sha256(), 0, partial.size
    with partial.file.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report(f"{_file_name(download)}: verify", done, total)
    if digest.hexdigest() != download.sha256:
        partial.clear()
        raise DownloadError(
            f"{download.url}: expected SHA-256 {download.sha256}, found {digest.hexdigest()} in {total} bytes; "
            "they are deleted. Run again; if it stays so, the file is not the published one any more"
        )


# ---- unpacking


@dataclass(frozen=True)
class _Member:
    """A file or folder in an archive, not yet trusted."""

    name: str
    is_folder: bool
    size: int
    open: Callable[[], IO[bytes] | None]


class _Header(tarfile.TarInfo):
    """Headers of a tar file, without two habits of tarfile: to take a damaged header for the end of the archive, and
    to read names of any length into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """One header block."""
        ends = len(buf) == tarfile.BLOCKSIZE and not any(buf)
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if ends:
                raise
            raise DownloadError(f"a damaged or cut off tar file: {error}") from error
        names = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if header.type in names + extended and header.size > _CHUNK:
            raise DownloadError(f"a tar header of {header.size} bytes; at most {_CHUNK} are read")
        return header


def _unpack(download: Download, file: Path, folder: Path, limits: Limits, report: Progress) -> None:
    """Unpack a verified file into a new folder. Raises DownloadError, leaving nothing, for what may not be unpacked."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    name = _file_name(download)
    most = min(limits.unpacked_bytes, max(_SMALL, limits.ratio * file.stat().st_size))
    count = done = 0
    try:
        with closing(_members(file, name)) as members:
            for member in members:
                count, done = count + 1, done + member.size
                if count > limits.files:
                    raise DownloadError(f"more than {limits.files} members")
                if member.size > limits.file_bytes or done > most:
                    allowed = f"{limits.file_bytes} bytes a file, {most} in all"
                    raise DownloadError(f"{member.name[:99]!r} of {member.size} bytes breaks the limits: {allowed}")
                _unpack_member(member, folder, _parts(download.unpack_to) + _parts(member.name))
                report(f"{name}: unpack", done, None)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (OSError, DownloadError, *_BROKEN)):
            why = str(error) if isinstance(error, DownloadError) else f"{type(error).__name__}: {error}"
            kept = f"nothing of it was unpacked; it is kept as {file}"
            raise DownloadError(f"{name} from {download.url} cannot be unpacked: {why}; {kept}") from error
        raise


def _unpack_member(member: _Member, folder: Path, parts: list[str]) -> None:
    if parts and parts[0].casefold() in (_WORK, _MARKER):
        raise DownloadError(f"{member.name!r} has a name that is kept for the state of the download")
    place = folder.joinpath(*parts)
    if member.is_folder:
        place.mkdir(parents=True, exist_ok=True)
        return
    _refuse_full_disk(folder, member.size)
    place.parent.mkdir(parents=True, exist_ok=True)
    stream = member.open()
    assert stream is not None, member.name
    try:
        file = place.open("xb")
    except FileExistsError as error:
        raise DownloadError(f"{member.name!r} stands in it twice") from error
    written = 0
    with stream, file:
        while chunk := stream.read(min(_CHUNK, member.size - written + 1)):
            written += len(chunk)
            if written > member.size:
                break
            file.write(chunk)
    if written != member.size:
        raise DownloadError(f"{member.name!r} has another length than the {member.size} bytes that it states")


def _parts(name: str) -> list[str]:
    r"""The folders and the file of a relative path, the same on every system: `\` separates as `/` does."""
    parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".")]
    if re.match(r"[\\/]|[A-Za-z]:", name) or ".." in parts:
        raise DownloadError(f"{name[:99]!r} leads out of the target folder")
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise DownloadError(f"{name[:99]!r} has control characters in its name")
    if len(name.encode()) > _PATH_BYTES or any(len(part.encode()) > _NAME_BYTES for part in parts):
        raise DownloadError(f"{name[:99]!r}... is longer than {_NAME_BYTES} bytes a name, {_PATH_BYTES} in all")
    return parts


def _members(file: Path, name: str) -> Generator[_Member, None, None]:
    """What a file holds, by its content: an address need not say what it leads to. No archive: the file itself."""
    with file.open("rb") as stream:
        head = stream.read(tarfile.BLOCKSIZE)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        yield from _zip_members(file)
    elif head.startswith(b"\x1f\x8b"):
        yield from _tar_members(file, "r:gz")
    elif head.startswith(b"\xfd7zXZ\x00"):
        yield from _tar_members(file, "r:xz")
    elif head[257:262] == b"ustar" or name.lower().endswith(".tar"):
        yield from _tar_members(file, "r:")
    elif name.lower().endswith(_ARCHIVES):
        raise DownloadError("it is none of the archives that are known: .zip, .tar, .tar.gz, .tar.xz")
    else:
        yield _Member(name, False, file.stat().st_size, lambda: file.open("rb"))


def _zip_members(file: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DownloadError(f"{info.filename!r} is a link or a device")
            yield _Member(info.filename, info.is_dir(), info.file_size, functools.partial(archive.open, info))


def _tar_members(file: Path, mode: Any) -> Iterator[_Member]:
    with tarfile.open(file, mode, tarinfo=_Header) as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else each of a million headers stays in memory
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise DownloadError(f"{info.name!r} is a link, a device or a sparse file")
            tarfile.data_filter(info, str(file.parent))  # the library's own rules, besides ours
            yield _Member(info.name, info.isdir(), info.size, functools.partial(archive.extractfile, info))


# ---- moving into place


def _refuse_clash(new: Path, old: Path) -> None:
    """Raise DownloadError when moving `new` to `old` would lead through a link or replace another file."""
    if old.is_symlink():
        raise DownloadError(f"{old} is a link, and nothing is written through it; remove it and run again")
    if not old.exists():
        return
    if new.is_dir() and old.is_dir():
        for child in new.iterdir():
            _refuse_clash(child, old / child.name)
    elif new.is_dir() or old.is_dir() or new.stat().st_size != old.stat().st_size:
        raise DownloadError(f"{old} is there already and is another file than the published one; move it away")


def _place(download: Download, folder: Path, root: Path) -> None:
    """Move what is ready into the root and write down that it is there."""
    entries = sorted(child.name for child in folder.iterdir())
    try:
        _refuse_clash(folder, root)  # once more: another download may have brought a file of the same name
        for entry in entries:
            _move(folder / entry, root / entry)
        done = _read_json(root / _MARKER)
        done[_key(download)] = {"url": download.url, "sha256": download.sha256, "entries": entries}
        write_whole(root / _MARKER, json.dumps(done, indent=1))
    except OSError as error:
        raise DownloadError(f"cannot move {folder} into {root}: {error}; run again to go on") from error


def _move(new: Path, old: Path) -> None:
    """Move a file, or a folder whole where nothing of its name is there, so that a kill finds it there or not there."""
    if not (new.is_dir() and old.is_dir()):
        os.replace(new, old)
        return
    for child in sorted(new.iterdir()):
        _move(child, old / child.name)
    new.rmdir()


def _is_placed(download: Download, root: Path) -> bool:
    done = _read_json(root / _MARKER).get(_key(download))
    return done is not None and all((root / entry).exists() for entry in done["entries"])


# ---- names, state and space


def _key(download: Download) -> str:
    """Name of a download: its content and where it goes, whatever its address."""
    return hashlib.sha256(f"{download.sha256} {download.unpack_to}".encode()).hexdigest()[:16]


def _file_name(download: Download) -> str:
    return PurePosixPath(httpx.URL(download.url).path).name or "download"


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Keep a second process out: two would write into the same partial file. A killed process holds nothing."""
    try:
        (root / _WORK).mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / _WORK / "lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DownloadError(f"another process is downloading into {root}; wait for it") from error
    except OSError as error:
        raise DownloadError(f"cannot write into {root}: {error}; choose another --root") from error
    try:
        yield
    finally:
        lock.release()


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(f"{needed} bytes are needed in {folder} and {free} are free; make room or choose a root")


def _read_json(file: Path) -> dict[str, Any]:
    """What was written; nothing for a file that is missing or damaged, since all of it can be found out anew."""
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
