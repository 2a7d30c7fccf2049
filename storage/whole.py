"""Files and folders written whole or not at all: each is written aside, and takes its name by renaming."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from storage.errors import InUse, NotStorable, StorageError

_ABANDONED_AFTER_S = 3600


@contextmanager
def replaced(path: str | Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A file to write, UTF-8 text unless `binary`, which is on disk and in the place of `path` when the block ends;
    nothing is left of it when an error is raised."""
    aside = f"{path}.{uuid.uuid4().hex}.partial"
    text = {} if binary else {"encoding": "utf-8", "newline": ""}
    try:
        with open(aside, "xb" if binary else "x", **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(aside)
        raise


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Replace a file in a folder that is made where it is missing, as `replaced` does."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replaced(path, binary=isinstance(content, bytes)) as file:
        file.write(content)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written; nothing is left of it when an error is raised.

    Raises InUse for a folder that holds something, NotStorable for one that cannot be written.
    """
    target = Path(folder).absolute()
    aside = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InUse(f"{folder} is there already; give a new folder")
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, target)
    except OSError as error:
        if isinstance(error, StorageError):  # some of which are OSErrors, too
            raise
        raise NotStorable(f"{folder} cannot be written: {error}; give a folder that can") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def made_anew(root: Path, is_whole: Callable[[], bool]) -> Iterator[Path]:
    """A path for a new folder, which takes the place of `root` when the block ends, unless another process has put a
    whole one there meanwhile: the same data of it is as good as ours. Removes what killed runs left beside it."""
    root.parent.mkdir(parents=True, exist_ok=True)
    for left in root.parent.glob(f".{glob.escape(root.name)}-*.partial"):
        with suppress(FileNotFoundError):  # its owner may remove it at this moment
            if time.time() - left.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(left, ignore_errors=True)
    # The folder of tempfile is private to its owner; the one made inside it has the user's usual permissions.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", suffix=".partial", dir=root.parent) as aside:
        yield Path(aside, "new")
        if is_whole():
            return
        with suppress(FileNotFoundError):
            os.replace(root, Path(aside, "old"))
        try:
            os.replace(Path(aside, "new"), root)
        except OSError:
            if not is_whole():
                raise
