"""Downloads against a real server that breaks off, lies and serves hostile archives; and kills in the middle."""

from __future__ import annotations

import email.utils
import functools
import gzip
import hashlib
import io
import json
import os
import random
import select
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from filelock import FileLock

from storage import download as module
from storage.download import Limits, download_dataset, unfinished
from storage.errors import DownloadError
from storage.listing import Download

QUICK = Limits(tries=3, backoff_s=0.001, timeout_s=5)
NOISE = random.Random(0).randbytes(300_000)


@dataclass
class File:
    """What the server does with one path."""

    data: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    """Bytes of the body after which the first, second, ... answer is broken off."""
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Answers before the first good one."""
    stated: int | None = None
    """Content-Length of whole answers where it is a lie; -1: none is stated."""
    then: File | None = None
    """What replaces the file after the first answer."""
    stalls: bool = False
    """Instead of breaking off, say nothing more."""


class Remote:
    """A server on the loopback, what it serves and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, File] = {}
        self.asked: list[tuple[str, str | None, int, int]] = []  # path, Range, status, bytes of the body sent
        self.over = threading.Event()
        remote = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                remote.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        file, wanted = self.files[request.path], request.headers.get("Range")
        if file.statuses:
            status, headers = file.statuses.pop(0)
            self.asked.append((request.path, wanted, status, 0))
            self.send_head(request, status, {"Content-Length": "0"} | headers)
            return
        start = 0
        if wanted and file.ranges and request.headers.get("If-Range") == file.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = file.data[start:]
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body)  # as servers do, whose lengths and ranges are then not those of the file
        headers = {"Content-Length": str(len(body) if file.stated is None or start else file.stated)}
        if file.stated == -1:
            headers = {}
        if file.etag:
            headers["ETag"] = file.etag
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(file.data) - 1}/{len(file.data)}"
        sent = file.breaks.pop(0) if file.breaks else len(body)
        if file.then is not None:
            self.files[request.path] = file.then
        self.asked.append((request.path, wanted, 206 if start else 200, min(sent, len(body))))
        self.send_head(request, 206 if start else 200, headers)
        request.wfile.write(body[:sent])
        if sent < len(body) and file.stalls:
            request.wfile.flush()
            self.over.wait(10)
        request.close_connection = True

    @staticmethod
    def send_head(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()

    def offers(self, name: str, file: File, content: bytes | None = None, **options: Any) -> Download:
        """Serve a file, and what is published of it."""
        self.files[f"/{name}"] = file
        sha256 = hashlib.sha256(file.data if content is None else content).hexdigest()
        return Download(url=f"{self.url}/{name}", sha256=sha256, **options)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)  # a proxy of this machine does not see its loopback
    # Loading the certificates, which http does not need, would take a third of the time of these tests.
    monkeypatch.setattr(module.httpx, "Client", functools.partial(httpx.Client, verify=False))
    remote = Remote()
    thread = threading.Thread(target=remote.server.serve_forever, args=(0.01,))
    thread.start()
    yield remote
    remote.over.set()
    remote.server.shutdown()
    remote.server.server_close()
    thread.join(10)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Deep enough that what climbs out stays in the test's own folder."""
    return tmp_path / "a" / "b" / "root"


TREE = {"bottle/train/good/000.png": NOISE, "bottle/test/good/000.png": NOISE[:999], "license.txt": b"free"}


def zip_of(tree: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in tree.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_of(tree: dict[str, bytes], mode: Any = "w:gz", members: list[tarfile.TarInfo] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in tree.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in members or []:
            archive.addfile(info)
    return buffer.getvalue()


def visible(root: Path) -> dict[str, bytes]:
    """What a reader of the data set could find."""
    hidden = (root / ".download", root / ".downloaded.json")
    files = [p for p in root.rglob("*") if not any(p.is_relative_to(h) for h in hidden)]
    assert not any(p.is_symlink() for p in files)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files if p.is_file()}


def state(root: Path) -> set[str]:
    """Names of what is kept for the next run."""
    return {p.name for p in (root / ".download").rglob("*")} - {"lock"}


def assert_whole(root: Path, tree: dict[str, bytes] = TREE) -> None:
    assert visible(root) == tree
    assert not (root / ".download").exists()
    assert not unfinished(root)


def assert_refused(root: Path, download: Download, match: str, limits: Limits = QUICK) -> None:
    """The download raises; nothing new lies outside of the hidden folder of the root, and nothing there is whole."""
    before = set(root.parents[2].rglob("*"))
    with pytest.raises(DownloadError, match=match):
        download_dataset([download], root, limits=limits)
    new = set(root.parents[2].rglob("*")) - before
    assert {path for path in new if not path.is_relative_to(root / ".download")} <= {root, *root.parents}
    assert visible(root) == {}
    assert not state(root) & {"unpacked", "unpacking", "moving"}
    assert not (root / ".downloaded.json").exists()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_each_kind_of_archive_is_unpacked(remote: Remote, root: Path, kind: str) -> None:
    data = zip_of(TREE) if kind == "zip" else tar_of(TREE, "w:" + kind.removeprefix("tar").removeprefix("."))
    download = remote.offers(f"x.{kind}", File(data), size=len(data))
    download_dataset([download], root, limits=QUICK)
    assert_whole(root)
    assert json.loads((root / ".downloaded.json").read_text()).popitem()[1]["sha256"] == download.sha256


def test_an_archive_is_known_by_its_content_and_other_files_are_kept_as_they_are(remote: Remote, root: Path) -> None:
    data, table = zip_of(TREE), b"image,label\n"
    archive = remote.offers("files/17", File(data), unpack_to="images")
    split = remote.offers("split.csv", File(table, etag=None, stated=-1), unpack_to="split_csv")
    download_dataset([archive, split], root, limits=QUICK)
    assert_whole(root, {f"images/{name}": content for name, content in TREE.items()} | {"split_csv/split.csv": table})


def test_a_second_run_asks_nothing_and_a_lost_folder_is_fetched_again(remote: Remote, root: Path) -> None:
    download = remote.offers("x.zip", File(zip_of(TREE)))
    download_dataset([download], root, limits=QUICK)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    download_dataset([download], root, limits=QUICK)
    assert len(remote.asked) == 1
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    shutil.rmtree(root / "bottle")
    download_dataset([download], root, limits=QUICK)
    assert len(remote.asked) == 2
    assert_whole(root)


def test_progress_is_told(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    told: list[tuple[str, int, int | None]] = []
    download_dataset([remote.offers("x.zip", File(data))], root, lambda *step: told.append(step), limits=QUICK)
    fetched = [step for step in told if step[0] == "x.zip"]
    assert fetched[-1] == ("x.zip", len(data), len(data))
    assert [step[1] for step in fetched] == sorted(step[1] for step in fetched)
    assert told[-1] == ("x.zip: unpack", sum(map(len, TREE.values())), None)


# ---- breaking off


def test_a_broken_off_download_goes_on_where_it_stopped(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    download_dataset([remote.offers("x.zip", File(data, breaks=[100_000, 50_000]))], root, limits=QUICK)
    assert_whole(root)
    assert [(wanted, status, sent) for _, wanted, status, sent in remote.asked] == [
        (None, 200, 100_000),
        ("bytes=100000-", 206, 50_000),
        ("bytes=150000-", 206, len(data) - 150_000),
    ]


def test_a_server_without_range_or_without_a_version_starts_anew(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    for name, file in {"range": File(data, ranges=False), "version": File(data, etag=None)}.items():
        file.breaks = [100_000]
        download_dataset([remote.offers(f"{name}.zip", file)], root / name, limits=QUICK)
        assert_whole(root / name)
    assert [sent for *_, sent in remote.asked] == [100_000, len(data)] * 2
    assert [wanted for _, wanted, *_ in remote.asked] == [None, "bytes=100000-", None, None]


def test_a_file_that_changes_after_its_first_half_is_fetched_anew(remote: Remote, root: Path) -> None:
    new = zip_of(TREE)
    old = bytes(len(new))
    file = File(old, breaks=[100_000], then=File(new, etag='"two"'))
    download_dataset([remote.offers("x.zip", file, new)], root, limits=QUICK)
    assert_whole(root)
    assert [status for *_, status, _ in remote.asked] == [200, 200]


def test_a_part_of_another_version_is_not_appended(remote: Remote, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ignores If-Range, and sends the rest of a file that has changed."""
    new = zip_of(TREE)
    file = File(bytes(len(new)), etag='"two"', breaks=[100_000])
    download = remote.offers("x.zip", file, new)
    with pytest.raises(DownloadError, match="100000 bytes are kept"):
        download_dataset([download], root, limits=Limits(tries=1))
    about = next(root.rglob("part.json"))
    about.write_text(json.dumps({"validator": '"one"', "total": len(new)}))
    remote.files["/x.zip"] = File(new, etag='"two"')
    monkeypatch.setattr(remote.files["/x.zip"], "etag", AnyTag('"two"'))
    download_dataset([download], root, limits=QUICK)
    assert [status for *_, status, _ in remote.asked] == [200, 206, 200]
    assert_whole(root)


class AnyTag(str):
    """Equal to whatever version is asked for."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True


def test_a_silent_server_is_left_and_asked_again(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    file = File(data, breaks=[1000], stalls=True)
    download_dataset([remote.offers("x.zip", file)], root, limits=Limits(backoff_s=0.001, timeout_s=0.2))
    assert_whole(root)
    assert [sent for *_, sent in remote.asked] == [1000, len(data) - 1000]


def test_tries_are_bounded_and_what_has_come_is_kept(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    file = File(data, breaks=[1000, 1000, 1000, 1000])
    download = remote.offers("x.zip", file)
    assert_refused(root, download, "failed 3 times in a row.*3000 bytes are kept, run again")
    assert len(remote.asked) == 3
    download_dataset([download], root, limits=QUICK)
    assert remote.asked[3][1] == "bytes=3000-"
    assert_whole(root)


def test_tries_count_only_without_a_step_forward(remote: Remote, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ADVANCE", 10_000)
    data = zip_of(TREE)
    file = File(data, breaks=[20_000] * 8)
    download_dataset([remote.offers("x.zip", file)], root, limits=QUICK)
    assert len(remote.asked) == 9
    always_anew = File(data, ranges=False, breaks=[20_000] * 99)
    assert_refused(root / "two", remote.offers("y.zip", always_anew), "failed 3 times in a row")


# ---- answers


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_status_is_tried_again(remote: Remote, root: Path, status: int) -> None:
    download_dataset([remote.offers("x.zip", File(zip_of(TREE), statuses=[(status, {})]))], root, limits=QUICK)
    assert [asked[2] for asked in remote.asked] == [status, 200]
    assert_whole(root)


def test_the_server_says_how_long_to_wait(remote: Remote, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    statuses = [(429, {"Retry-After": "7"}), (503, {"Retry-After": date}), (503, {"Retry-After": "soon"}), (503, {})]
    limits = Limits(backoff_s=1)
    download_dataset([remote.offers("x.zip", File(zip_of(TREE), statuses=statuses))], root, limits=limits)
    assert slept[0] == 7
    assert 25 < slept[1] <= 30
    assert slept[2:] == [4, 8]
    patience = File(b"", statuses=[(429, {"Retry-After": "86400"})])
    assert_refused(root / "two", remote.offers("y.zip", patience), "asks to wait 86400 s; run again after that")


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_lasting_status_is_not_tried_again(remote: Remote, root: Path, status: int) -> None:
    assert_refused(root, remote.offers("x.zip", File(b"", statuses=[(status, {})])), f"answered {status}")
    assert len(remote.asked) == 1


def test_a_redirect_is_followed_to_http_only(remote: Remote, root: Path) -> None:
    remote.offers("x.zip", File(zip_of(TREE)))
    there = remote.offers("there", File(b"", statuses=[(302, {"Location": "/x.zip"})]), zip_of(TREE))
    download_dataset([there], root, limits=QUICK)
    assert_whole(root)
    away = remote.offers("away", File(b"", statuses=[(302, {"Location": "ftp://127.0.0.1/x.zip"})]))
    assert_refused(root / "two", away, "no file at an http or https address")


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1/x", "file:///etc/passwd", "/etc/passwd", "http://", "http://127.0.0.1:x/"]
)
def test_other_addresses_are_refused_before_anything_is_written(root: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="address"):
        download_dataset([Download(url=url, sha256="0" * 64)], root)
    assert not root.exists()


@pytest.mark.parametrize("bad", [{"sha256": "abc"}, {"unpack_to": "../x"}, {"unpack_to": "/x"}, {"unpack_to": "C:x"}])
def test_a_bad_description_is_refused(root: Path, bad: dict[str, str]) -> None:
    facts = {"url": "http://127.0.0.1/x.zip", "sha256": "0" * 64} | bad
    with pytest.raises(DownloadError):
        download_dataset([Download(**facts)], root)
    assert not root.exists()


def test_a_proxy_of_the_user_is_used(remote: Remote, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = zip_of(TREE)
    remote.files["http://data.invalid/x.zip"] = File(data)
    monkeypatch.setenv("http_proxy", remote.url)
    download = Download(url="http://data.invalid/x.zip", sha256=hashlib.sha256(data).hexdigest())
    download_dataset([download], root, limits=QUICK)
    assert_whole(root)


# ---- lies


def test_a_wrong_checksum_names_both_and_deletes_the_file(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    download = remote.offers("x.zip", File(data), b"something else")
    assert_refused(root, download, f"expected SHA-256 {download.sha256}, found {hashlib.sha256(data).hexdigest()}")
    assert not state(root) & {"part", "part.json"}


def test_a_length_shorter_than_what_comes_is_an_error(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    assert_refused(root, remote.offers("x.zip", File(data, stated=1000)), "found .* in 1000 bytes")
    known = remote.offers("y.zip", File(data, stated=1000), size=len(data))
    assert_refused(root, known, f"states 1000 bytes, expected {len(data)}")


def test_a_length_longer_than_what_comes_is_an_error(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    too_long = File(data, stated=len(data) + 1000, ranges=False)
    assert_refused(root, remote.offers("x.zip", too_long), f"failed 3 times.*{len(data)} bytes are kept")
    known = remote.offers("y.zip", File(data, stated=len(data) + 1000), size=len(data))
    assert_refused(root / "two", known, f"states {len(data) + 1000} bytes, expected {len(data)}")
    assert len(remote.asked) == 4


def test_another_size_than_the_published_one_is_an_error(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    assert_refused(root, remote.offers("x.zip", File(data), size=len(data) - 1), "not the published file")
    unstated = File(data, stated=-1)
    assert_refused(root, remote.offers("y.zip", unstated, size=len(data) - 1), "sends more than")
    short = remote.offers("z.zip", File(data, stated=-1), size=len(data) + 1)
    assert_refused(root, short, f"ended after {len(data)} of {len(data) + 1} bytes")


def test_a_download_without_a_length_is_bounded(remote: Remote, root: Path) -> None:
    limits = Limits(tries=3, backoff_s=0.001, download_bytes=100_000)
    endless = remote.offers("x.zip", File(bytes(50_000_000), stated=-1))
    done: list[int] = []
    with pytest.raises(DownloadError, match="sends more than the 100000 bytes"):
        download_dataset([endless], root, lambda what, n, total: done.append(n), limits=limits)
    assert max(done) <= 100_000
    assert not state(root) & {"part", "part.json"}
    stated = remote.offers("y.zip", File(bytes(10_000_000)))
    assert_refused(root, stated, "more than the 100000 allowed", limits)


def test_a_full_disk_is_known_before_bytes_come(remote: Remote, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = zip_of(TREE)
    free = [len(data) + 10]
    usage = shutil.disk_usage(root.anchor)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free[0]))
    download = remote.offers("x.zip", File(data))
    assert_refused(root, download, f"{2 * len(data)} bytes are needed .* and {len(data) + 10} are free")
    assert "part" not in state(root)
    free[0] = 2 * len(data)
    download_dataset([download], root, limits=QUICK)
    assert_whole(root)


# ---- hostile archives


def special(kind: bytes, name: str = "x", link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return tar_of({"a.png": b"a"}, members=[info])


def zip_with_mode(mode: int) -> bytes:
    info = zipfile.ZipInfo("x")
    info.create_system, info.external_attr = 3, mode << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", b"a")
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def zip_twice() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/a.png", b"a")
        archive.writestr("x/b.png", b"b")
    return buffer.getvalue().replace(b"b.png", b"a.png")


def zip_that_states(size: int) -> bytes:
    """The stated size stands in the local header and in the directory."""
    return zip_of({"x": NOISE}).replace(len(NOISE).to_bytes(4, "little"), size.to_bytes(4, "little"))


def long_header() -> bytes:
    """A name of 100 MB, which would have to be held in memory."""
    return tar_of({"a" * 100: b"a"}, members=[sized(tarfile.GNUTYPE_LONGNAME, 100_000_000)])


def sized(kind: bytes, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info


def zip_encrypted() -> bytes:
    data = bytearray(zip_of({"x": b"secret"}))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


ABSOLUTE = f"{tempfile.gettempdir()}/al-test-absolute.txt"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip up": (lambda: zip_of({"../x": b"x"}), "out of the target"),
    "zip up later": (lambda: zip_of({"a/b/../../../x": b"x"}), "out of the target"),
    "zip up as on windows": (lambda: zip_of({"..\\x": b"x"}), "out of the target"),
    "zip absolute": (lambda: zip_of({ABSOLUTE: b"x"}), "out of the target"),
    "zip drive": (lambda: zip_of({"C" + ":\\x": b"x"}), "out of the target"),
    "zip share": (lambda: zip_of({"\\\\server\\x": b"x"}), "out of the target"),
    "zip link": (lambda: zip_with_mode(stat.S_IFLNK | 0o777), "link or a device"),
    "zip device": (lambda: zip_with_mode(stat.S_IFCHR | 0o666), "link or a device"),
    "zip pipe": (lambda: zip_with_mode(stat.S_IFIFO | 0o666), "link or a device"),
    "zip twice": (zip_twice, "stands in it twice"),
    "zip file and folder": (lambda: zip_of({"x": b"x", "x/y": b"y"}), "cannot be unpacked"),
    "zip long name": (lambda: zip_of({"x" * 300: b"x"}), "longer than 255"),
    "zip long path": (lambda: zip_of({"x/" * 600 + "x": b"x"}), "1024 in all"),
    "zip control characters": (lambda: zip_of({"x\n": b"x"}), "control characters"),
    "zip states less": (lambda: zip_that_states(1000), "cannot be unpacked"),
    "zip states more": (lambda: zip_that_states(400_000), "another length"),
    "zip encrypted": (zip_encrypted, "encrypted"),
    "zip bomb": (lambda: zip_of({"x": bytes(70 << 20)}), "breaks the limits"),
    "zip of our state": (lambda: zip_of({".downloaded.json": b"{}"}), "kept for the state"),
    "tar up": (lambda: tar_of({"../x": b"x"}), "outside the destination"),
    "tar absolute": (lambda: tar_of({ABSOLUTE: b"x"}), "out of the target"),
    "tar drive": (lambda: tar_of({"C:/x": b"x"}), "out of the target"),
    "tar link out": (lambda: special(tarfile.SYMTYPE, link="../../x"), "a link, a device"),
    "tar link in": (lambda: special(tarfile.SYMTYPE, link="a.png"), "a link, a device"),
    "tar hard link out": (lambda: special(tarfile.LNKTYPE, link="../../x"), "a link, a device"),
    "tar hard link in": (lambda: special(tarfile.LNKTYPE, link="a.png"), "a link, a device"),
    "tar device": (lambda: special(tarfile.CHRTYPE), "a link, a device"),
    "tar block device": (lambda: special(tarfile.BLKTYPE), "a link, a device"),
    "tar pipe": (lambda: special(tarfile.FIFOTYPE), "a link, a device"),
    "tar unknown": (lambda: special(b"V"), "cannot be unpacked"),
    "tar twice": (lambda: tar_of({"x": b"x", "./x": b"y"}), "stands in it twice"),
    "tar long name": (lambda: tar_of({"x" * 300: b"x"}), "longer than 255"),
    "tar long header": (long_header, "a tar header of 100000000 bytes"),
    "tar bomb": (lambda: tar_of({"a": b"a", "x": bytes(70 << 20)}), "breaks the limits"),
    "tar of our state": (lambda: tar_of({"./.DOWNLOAD/x": b"x"}), "kept for the state"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_leaves_nothing(remote: Remote, root: Path, name: str) -> None:
    make, why = HOSTILE[name]
    kind = "x.zip" if name.startswith("zip") else "x.tar.gz"
    assert_refused(root, remote.offers(kind, File(make())), why)
    assert not Path(ABSOLUTE).exists()


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize(
    ("limits", "why"),
    [
        (Limits(files=3), None),
        (Limits(files=2), "more than 2 members"),
        (Limits(file_bytes=len(NOISE) - 1), "breaks the limits"),
        (Limits(unpacked_bytes=len(NOISE) + 999), "breaks the limits"),
        (Limits(unpacked_bytes=len(NOISE) + 999 + 4), None),
    ],
)
def test_limits(remote: Remote, root: Path, make: Callable[..., bytes], limits: Limits, why: str | None) -> None:
    download = remote.offers("x", File(make(TREE)))
    if why is None:
        download_dataset([download], root, limits=limits)
        assert_whole(root)
    else:
        assert_refused(root, download, why, limits)


def cut(data: bytes, at: int) -> bytes:
    assert at < len(data)
    return data[:at]


CUT: dict[str, Callable[[], bytes]] = {
    "x.zip": lambda: cut(zip_of(TREE), 200_000),
    "x.tar.gz": lambda: cut(tar_of(TREE), 200_000),
    "x.tar.xz": lambda: cut(tar_of(TREE, "w:xz"), 200_000),
    "data.tar": lambda: cut(tar_of(TREE, "w:"), 200_000),
    "header.tar": lambda: cut(tar_of({"a": b"a", "b": b"b"}, "w:"), 1024 + 100),
    "border.tar": lambda: cut(tar_of({"a": b"a", "b": b"b"}, "w:"), 1024),
    "damaged.tar": lambda: tar_of({"a": b"a", "b": b"b"}, "w:")[:1024] + b"damaged!" * 1024,
    "a page.zip": lambda: b"<html>Please accept the licence</html>",
}


@pytest.mark.parametrize("name", CUT)
def test_a_truncated_archive_leaves_nothing(remote: Remote, root: Path, name: str) -> None:
    assert_refused(root, remote.offers(name.replace(" ", "-"), File(CUT[name]())), "cannot be unpacked")


def test_one_bad_file_keeps_the_whole_data_set_out(remote: Remote, root: Path) -> None:
    good = remote.offers("x.zip", File(zip_of(TREE)))
    bad = remote.offers("y.zip", File(zip_of({"../y": b"y"})))
    with pytest.raises(DownloadError, match="out of the target"):
        download_dataset([good, bad], root, limits=QUICK)
    assert visible(root) == {}
    assert not unfinished(root)
    better = remote.offers("y.zip", File(zip_of({"y": b"y"})))
    download_dataset([good, better], root, limits=QUICK)
    assert [path for path, *_ in remote.asked] == ["/x.zip", "/y.zip", "/y.zip"]
    assert_whole(root, TREE | {"y": b"y"})


# ---- what is there already


def test_other_files_stay_and_are_never_replaced(remote: Remote, root: Path) -> None:
    first = remote.offers("first.zip", File(zip_of({"first": b"1"})))
    download = remote.offers("x.zip", File(zip_of(TREE)))
    (root / "bottle/train/good").mkdir(parents=True)
    (root / "bottle/train/good/mine.png").write_bytes(b"mine")
    (root / "license.txt").write_bytes(b"my own")
    with pytest.raises(DownloadError, match=r"license\.txt is there already"):
        download_dataset([first, download], root, limits=QUICK)
    assert visible(root) == {"bottle/train/good/mine.png": b"mine", "license.txt": b"my own"}
    (root / "license.txt").write_bytes(b"FREE")  # of the same size: a damaged copy is healed
    download_dataset([first, download], root, limits=QUICK)
    assert len(remote.asked) == 2
    assert_whole(root, TREE | {"first": b"1", "bottle/train/good/mine.png": b"mine"})


def test_nothing_is_written_through_a_link(remote: Remote, root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root.mkdir(parents=True)
    (root / "bottle").symlink_to(elsewhere)
    with pytest.raises(DownloadError, match="is a link"):
        download_dataset([remote.offers("x.zip", File(zip_of(TREE)))], root, limits=QUICK)
    assert list(elsewhere.iterdir()) == []


def test_two_processes_do_not_mix(remote: Remote, root: Path) -> None:
    download = remote.offers("x.zip", File(zip_of(TREE)))
    (root / ".download").mkdir(parents=True)
    with FileLock(root / ".download" / "lock"):
        assert_refused(root, download, "another process is downloading")
    assert remote.asked == []
    download_dataset([download], root, limits=QUICK)
    assert_whole(root)


# ---- kills

CHILD = """
import sys, time
from pathlib import Path
from storage.download import download_dataset
from storage.listing import Download

def progress(what, done, total):
    print(what, done, flush=True)
    if what.endswith(sys.argv[4]):
        time.sleep(30)

download_dataset([Download(url=sys.argv[1], sha256=sys.argv[2])], Path(sys.argv[3]), progress)
"""


def killed(download: Download, root: Path, line: str, at: str) -> None:
    """Run a download in another process and kill it when it has said `line`."""
    command = [sys.executable, "-c", CHILD, download.url, download.sha256, str(root), at]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        said, deadline = b"", time.monotonic() + 30
        while line.encode() not in said and child.poll() is None and time.monotonic() < deadline:
            if select.select([child.stdout], [], [], 0.1)[0]:
                said += os.read(child.stdout.fileno(), 1 << 16)
        ended = child.poll()
        child.kill()
    assert line.encode() in said
    assert ended is None, "it ended before the kill"


def test_a_killed_download_goes_on(remote: Remote, root: Path) -> None:
    data = zip_of(TREE)
    download = remote.offers("x.zip", File(data, breaks=[100_000], stalls=True))
    killed(download, root, "x.zip 100000\n", at="never")
    assert visible(root) == {}
    assert state(root) >= {"part", "part.json"}
    download_dataset([download], root, limits=QUICK)
    assert remote.asked[1:] == [("/x.zip", "bytes=100000-", 206, len(data) - 100_000)]
    assert_whole(root)


def test_a_killed_unpacking_begins_again_without_the_server(remote: Remote, root: Path) -> None:
    download = remote.offers("x.zip", File(zip_of(TREE)))
    killed(download, root, f"x.zip: unpack {len(NOISE)}\n", at="unpack")
    assert visible(root) == {}
    assert "unpacking" in state(root)
    assert "unpacked" not in state(root)
    download_dataset([download], root, limits=QUICK)
    assert len(remote.asked) == 1
    assert_whole(root)


def test_a_kill_between_two_moves_shows_and_is_mended(
    remote: Remote, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = remote.offers("x.zip", File(zip_of(TREE)))

    def stop(new: Path, old: Path, move: Callable[[Path, Path], None] = module._move) -> None:
        if old.name == "license.txt":
            raise KeyboardInterrupt
        move(new, old)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_move", stop)
        with pytest.raises(KeyboardInterrupt):
            download_dataset([download], root, limits=QUICK)
    assert unfinished(root)
    assert "license.txt" not in visible(root)
    assert not (root / ".downloaded.json").exists()
    download_dataset([download], root, limits=QUICK)
    assert len(remote.asked) == 1
    assert_whole(root)
