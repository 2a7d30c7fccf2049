"""Bytes, arrays and finished outputs under keys, on any fsspec URL (local folder, s3://, memory://).

An output is written under a draft folder of its own, and becomes visible by one atomic write of its manifest, which
names that folder. So on every file system, with or without rename, a reader sees a whole output or none; a second
writer of the same key does no harm; and what a killed process leaves is never read.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import Damaged, NotInStore, StoreTooNew

FORMAT = 1
ABANDONED_AFTER_S = 24 * 3600
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
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to fsspec (endpoint, credentials). Credentials are better given by the environment."""

    @property
    def _fs(self) -> Any:
        return fsspec.core.url_to_fs(self.url, **self.options)[0]

    @property
    def _root(self) -> str:
        return str(fsspec.core.url_to_fs(self.url, **self.options)[1]).rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether keys are files of this machine."""
        return isinstance(self._fs, LocalFileSystem)

    def path(self, key: str) -> str:
        """The file system's own path of a key. Raises NotInStore for one that leaves the store."""
        if key.startswith("/") or ".." in key.split("/"):
            raise NotInStore(f"{key!r} is not a key: keys are relative and hold no '..'")
        return f"{self._root}/{key}"

    def check_format(self) -> None:
        """Mark a new store with our format; raise StoreTooNew for one that a newer version wrote."""
        try:
            found = self.read_json("store.json").get("format")
        except NotInStore:
            self.write_json("store.json", {"format": FORMAT})
            return
        if not isinstance(found, int) or found > FORMAT:
            raise StoreTooNew(f"{self.url} is a store of format {found}, this version reads up to {FORMAT}; {_FIX_NEWER}")

    def read_bytes(self, key: str) -> bytes:
        """Raises NotInStore."""
        try:
            return bytes(self._fs.cat_file(self.path(key)))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotInStore(f"{key} is not in {self.url}") from error

    def write_bytes(self, key: str, data: bytes) -> None:
        """Replace the key's bytes, whole or not at all."""
        path = self.path(key)
        if not self.is_local:
            self._fs.pipe_file(path, data)  # an object store's PUT is atomic
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        aside = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise

    def read_json(self, key: str) -> Any:
        """Raises NotInStore, or Damaged when the bytes are not JSON."""
        try:
            return json.loads(self.read_bytes(key))
        except json.JSONDecodeError as error:
            raise Damaged(f"{key} in {self.url} is not JSON ({error}); delete it and run again") from error

    def write_json(self, key: str, value: Any) -> None:
        """Replace the key's value, whole or not at all."""
        self.write_bytes(key, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode())

    def list(self, prefix: str) -> list[str]:
        """Keys below a prefix, sorted; files being written are not among them."""
        self._fs.invalidate_cache()
        root = self._root
        try:
            found = self._fs.find(self.path(prefix))
        except FileNotFoundError:
            return []
        return sorted(str(path)[len(root) + 1 :] for path in found if not str(path).endswith(".partial"))

    def delete(self, prefix: str) -> None:
        """Remove everything below a prefix; nothing there is no error."""
        with suppress(FileNotFoundError):
            self._fs.rm(self.path(prefix), recursive=True)

    def find(self, key: str) -> Artifact | None:
        """The finished output under this key, or None."""
        try:
            manifest = self.read_json(f"{key}/manifest.json")
        except NotInStore:
            return None
        return Artifact(key, manifest["folder"], manifest["meta"])

    def get(self, key: str) -> Artifact:
        """The finished output under this key. Raises NotInStore."""
        found = self.find(key)
        if found is None:
            raise NotInStore(f"{key} is not complete in {self.url}; run the step that makes it")
        return found

    @contextmanager
    def draft(self, key: str) -> Iterator[Draft]:
        """A folder to write an output in; removed when the block ends without `commit`."""
        self._sweep(key)
        draft = Draft(self, key, f"{key}/{int(time.time())}-{uuid.uuid4().hex[:8]}")
        try:
            yield draft
        finally:
            if draft.committed is None:
                with suppress(OSError):
                    self.delete(draft.folder)

    def zarr_store(self, key: str) -> Any:
        """A zarr store rooted at a key."""
        from zarr.storage import FsspecStore, LocalStore

        if self.is_local:
            return LocalStore(Path(self.path(key)))
        protocol = self.url.split("://")[0]
        return FsspecStore.from_url(f"{protocol}://{self.path(key).lstrip('/')}", storage_options=dict(self.options))

    def _sweep(self, key: str) -> None:
        """Remove what writers that died a day ago left under a key."""
        self._fs.invalidate_cache()
        try:
            names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self.path(key), detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return
        kept = self.find(key)
        for name in names:
            started, _, rest = name.partition("-")
            old = rest and started.isdigit() and time.time() - int(started) > ABANDONED_AFTER_S
            if old and (kept is None or kept.folder != f"{key}/{name}"):
                self.delete(f"{key}/{name}")
