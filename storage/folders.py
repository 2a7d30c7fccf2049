"""Folders that users name, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import InUse, NotStorable, StorageError


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
