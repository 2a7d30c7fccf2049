"""What storage refuses: given, expected, fix. One message each, so that every error pickles."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StorageError(Exception):
    """Anything `storage` refuses."""


class DatasetError(StorageError, ValueError):
    """A folder that is not the data set it is said to be."""


class OutsideRoot(StorageError, ValueError):
    """A path that leaves the root of its data set (a link, or `..`)."""


class StoreTooNew(StorageError, RuntimeError):
    """A store written by a newer version of this program."""


class NotInStore(StorageError, FileNotFoundError):
    """A key that is not there, or not complete."""

    def __str__(self) -> str:
        return str(self.args[0])


class HoldsPassword(StorageError, ValueError):
    """A URL with a password in it, which would be written wherever the URL is."""


class NotStorable(StorageError, ValueError):
    """A value that JSON cannot hold, such as NaN."""


class Damaged(StorageError, RuntimeError):
    """Stored bytes that do not match their checksum or schema."""


class InUse(StorageError, ValueError):
    """What may not be removed or overwritten."""


class Conflict(StorageError, RuntimeError):
    """What another process changed at the same time."""


class MaskError(StorageError, ValueError):
    """A mask that cannot be read."""


class DownloadError(StorageError, RuntimeError):
    """A file of a data set that could not be fetched, or is not what was published, or may not be unpacked."""


def nearest(given: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known names, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
