"""Bytes, arrays and finished outputs under keys, on any fsspec URL (local folder, s3://, memory://).

An output is written under a draft folder of its own, and becomes visible by one atomic write of its manifest, which
names that folder. So on every file system, with or without rename, a reader sees a whole output or none; a second
writer of the same key does no harm; and what a killed process leaves is never read.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import Damaged, HoldsPassword, NotInStore, NotStorable, StoreTooNew
from storage.whole import write_whole

if TYPE_CHECKING:
    import zarr

FORMAT = 1
ABANDONED_AFTER_S = 7 * 24 * 3600
PASSWORD = r"://[^/]*:[^/]*@"
"""In a URL: `ftp://user:password@host`."""
_DRAFT_NAME = re.compile(r"(\d+)-[0-9a-f]{8}")  # when it was begun, in seconds, and who
_FIX_VALUE = "give finite numbers, texts, lists and dicts, and leave out what has no meaning"
_FIX_NEWER = "update the program, or give another store"


@dataclass(frozen=True)
class Artifact:
    """A finished output."""

    key: str
    folder: str
    """Key of the folder that holds its files."""
    meta: dict[str, Any]
    """What the writer said of it: inputs, ids, seconds."""


@dataclass
class Draft:
    """An output being written; visible to nobody before `commit`."""

    store: Store
    key: str
    folder: str
    committed: Artifact | None = None

    def commit(self, meta: dict[str, Any]) -> Artifact:
        """Make the output visible, whole."""
        self.store.write_json(f"{self.key}/manifest.json", {"folder": self.folder, "meta": meta})
        self.committed = Artifact(self.key, self.folder, meta)
        return self.committed


@dataclass(frozen=True)
class Store:
    """A place for outputs. Pickles by its URL; safe for any number of processes at once."""

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    """Passed to fsspec (endpoint, credentials). Credentials are better given by the environment."""

    def __post_init__(self) -> None:
        """A relative folder becomes absolute here: a worker that gets the URL has its own working directory.

        Raises HoldsPassword for a URL that does.
        """
        check_url(self.url)
        if "://" not in self.url:
            object.__setattr__(self, "url", os.path.abspath(os.path.expanduser(self.url)))

    @property
    def _fs_options(self) -> dict[str, Any]:
        """Options of the file system, which other processes write to: remembered listings would hide their writes,
        ranged reads would mix them."""
        one_request = {"max_concurrency": 1} if self.url.startswith(("s3://", "s3a://")) else {}
        return {"use_listings_cache": False, **one_request, **self.options}

    @property
    def _fs(self) -> Any:
        return fsspec.core.url_to_fs(self.url, **self._fs_options)[0]

    @property
    def _root(self) -> str:
        return str(fsspec.core.url_to_fs(self.url, **self._fs_options)[1]).rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether keys are files of this machine."""
        return isinstance(self._fs, LocalFileSystem)

    def path(self, key: str) -> str:
        """The file system's own path of a key; of the store itself for "". Raises NotInStore for one that leaves it."""
        if key and not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise NotInStore(f"{key!r} is not a key; a key is names joined by '/', none of them empty, '.' or '..'")
        root = self._root
        path = f"{root}/{key}"
        if self.is_local and not f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(root).rstrip('/')}/"):
            raise NotInStore(f"{key!r} leads out of {self.url} by a link; put what it leads to in its place")
        return path

    def check_format(self) -> None:
        """Mark a new store with our format; raise StoreTooNew for one that a newer version wrote."""
        try:
            mark = self.read_json("store.json")
        except NotInStore:
            self.write_json("store.json", {"format": FORMAT})
            return
        given = mark.get("format") if isinstance(mark, dict) else mark
        if not isinstance(given, int) or given > FORMAT:
            raise StoreTooNew(f"{self.url} has format {given}, this version reads up to {FORMAT}; {_FIX_NEWER}")

    def read_bytes(self, key: str) -> bytes:
        """The bytes under a key. Raises NotInStore."""
        path = self.path(key)
        try:
            return bytes(self._fs.cat_file(path))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise NotInStore(f"{key} is not in {self.url}") from error

    def write_bytes(self, key: str, data: bytes) -> None:
        """Replace the key's bytes, whole or not at all."""
        path = self.path(key)
        if not self.is_local:
            self._fs.pipe_file(path, data)  # an object store's PUT is atomic
            return
        write_whole(path, data)

    def read_json(self, key: str) -> Any:
        """The value under a key. Raises NotInStore, or Damaged when the bytes are not JSON."""
        try:
            return json.loads(self.read_bytes(key))
        except ValueError as error:  # not JSON, or not even text
            raise Damaged(f"{key} in {self.url} is not JSON ({error}); delete it and run again") from error

    def write_json(self, key: str, value: Any) -> None:
        """Replace the key's value, whole or not at all. Raises NotStorable for a value that JSON cannot hold."""
        self.write_bytes(key, json_bytes(key, value))

    def list(self, prefix: str) -> list[str]:
        """Keys below a prefix, sorted; files being written are not among them."""
        root, path = self._root, self.path(prefix)
        try:
            paths = self._fs.find(path)
        except FileNotFoundError:
            return []
        return sorted(str(name)[len(root) + 1 :] for name in paths if not str(name).endswith(".partial"))

    def delete(self, prefix: str) -> None:
        """Remove everything below a prefix; nothing there is no error."""
        path = self.path(prefix)
        with suppress(FileNotFoundError):
            # All but the local file system take `*`, `?` and `[` for a pattern and would remove others' outputs.
            self._fs.rm(path if self.is_local else glob.escape(path), recursive=True)

    def find(self, key: str) -> Artifact | None:
        """The finished output under this key, or None. Raises Damaged for a manifest that is none."""
        try:
            manifest = self.read_json(f"{key}/manifest.json")
        except NotInStore:
            return None
        try:
            return Artifact(key, manifest["folder"], manifest["meta"])
        except (KeyError, TypeError) as error:
            raise Damaged(f"{key}/manifest.json in {self.url} is no manifest; delete it and run again") from error

    def get(self, key: str) -> Artifact:
        """The finished output under this key. Raises NotInStore."""
        output = self.find(key)
        if output is None:
            raise NotInStore(f"{key} is not complete in {self.url}; run the step that makes it")
        return output

    @contextmanager
    def draft(self, key: str) -> Iterator[Draft]:
        """A folder to write an output in; removed when the block ends without `commit`."""
        self.sweep(key)
        draft = Draft(self, key, f"{key}/{int(time.time())}-{uuid.uuid4().hex[:8]}")
        try:
            yield draft
        finally:
            if draft.committed is None:
                with suppress(Exception):  # an unreachable store must not hide why the block ended
                    self.delete(draft.folder)

    def create_array(
        self, key: str, shape: Sequence[int], dtype: str, *, chunk: int, shard: int | None = None
    ) -> zarr.Array[Any]:
        """An empty Zarr array with a row an image: `chunk` rows are compressed together, `shard` rows make a file."""
        import zarr
        from zarr.codecs import ZstdCodec

        return zarr.create_array(
            store=self.zarr_store(key),
            shape=tuple(shape),
            chunks=(chunk, *shape[1:]),
            shards=None if shard is None else (shard, *shape[1:]),
            dtype=dtype,
            compressors=ZstdCodec(level=1),
            fill_value=float("nan") if dtype.startswith("float") else 0,
            # Else each chunk is first compared with the fill value, which takes as long as compressing and writing it.
            config={"write_empty_chunks": True},
        )

    def zarr_store(self, key: str) -> Any:
        """A zarr store rooted at a key."""
        from zarr.storage import FsspecStore, LocalStore

        if self.is_local:
            return LocalStore(Path(self.path(key)))
        protocol = self.url.split("://")[0]
        return FsspecStore.from_url(f"{protocol}://{self.path(key).lstrip('/')}", storage_options=self._fs_options)

    def sweep(self, key: str) -> None:
        """Remove what writers that died a week ago left under a key; what cannot be removed harms nobody."""
        with suppress(OSError):
            kept = self.find(key)
            for path in self._fs.ls(self.path(key), detail=False):
                folder = f"{key}/{str(path).rstrip('/').rsplit('/', 1)[-1]}"
                begun = _DRAFT_NAME.fullmatch(folder.rsplit("/", 1)[-1])
                old = begun is not None and time.time() - int(begun[1]) > ABANDONED_AFTER_S
                if old and (kept is None or kept.folder != folder):
                    self.delete(folder)


def check_url(url: str) -> str:
    """The URL of a store, which records, logs and pages repeat. Raises HoldsPassword, without repeating it."""
    if re.search(PASSWORD, url):
        raise HoldsPassword(
            "the store's URL holds a password, which records, logs and pages would repeat; leave it out, and give it "
            "by the environment (AWS_SECRET_ACCESS_KEY, ...) or by fsspec's configuration file"
        )
    return url


def json_bytes(what: str, value: Any) -> bytes:
    """A value as it is stored. Raises NotStorable for one that JSON cannot hold."""
    try:
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        problem = _not_finite(value) or str(error)
        raise NotStorable(f"{what} cannot be written: {problem}; {_FIX_VALUE}") from error


def _not_finite(value: Any, *at: str) -> str | None:
    """Where the first number lies that JSON has no word for, and which one it is; None without such a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{'.'.join(at) or 'the value'} is {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    problems = (_not_finite(item, *at, str(name)) for name, item in items)
    return next((problem for problem in problems if problem), None)
