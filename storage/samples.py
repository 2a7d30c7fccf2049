"""One image of a data set, and the tables made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import pandas as pd

from storage.errors import Damaged
from storage.tables import table_bytes, table_of

Split = Literal["train", "validation", "test"]
Label = Literal["good", "anomalous", "unknown"]


@dataclass(frozen=True)
class Sample:
    """One image of a data set."""

    id: str
    """Content name: the first 32 hex digits of the file's SHA-256, or of that name and the box (`sample_id`)."""
    path: str
    """Relative to the root of the data set, with `/`."""
    dataset: str
    """Name of the layout or data set, such as `mvtec_ad`."""
    category: str
    """Product or texture within the data set."""
    split: Split
    """`train` and `validation` are good images; nothing of `test` is ever used to set anything."""
    label: Label
    """`unknown`: to be inspected, counts in no metric."""
    defect_type: str
    """`good` for good images, the data set's own word for the defect, or `unknown`."""
    mask: str | None = None
    """Relative path of the mask, or of a folder whose masks are united; None on a good image means there is no defect,
    else that the mask is unknown."""
    mask_id: str | None = None
    """Content name of the mask's file or folder."""
    mask_rule: str = "auto"
    """What in the mask counts as anomalous: see `storage.masks`."""
    part: str | None = None
    """The physical part shown, where the data set tells: images of one part never stand in two splits."""
    box: str | None = None
    """`x,y,width,height` in pixels of the file where the sample is a part of it (and of its mask); None: all of it."""
    xyz: str | None = None
    """Relative path of the 3-D points that belong to the image."""
    xyz_id: str | None = None
    """Content name of that file; of test images only, since nothing is learned from points."""

    @property
    def key(self) -> str:
        """Unique in a category: the path, with the box where there is one."""
        return self.path if self.box is None else f"{self.path}[{self.box}]"

    @property
    def is_labelled(self) -> bool:
        """Whether it is known to be good or anomalous."""
        return self.label != "unknown"

    @property
    def mask_state(self) -> Literal["file", "no defect", "unknown"]:
        """Where the truth about the pixels stands."""
        if self.mask is not None:
            return "file"
        return "no defect" if self.label == "good" else "unknown"


def content_hash(data: bytes) -> str:
    """The name of a file's content."""
    return hashlib.sha256(data).hexdigest()[:32]


def sample_id(file: str, box: str | None) -> str:
    """The id of a sample, from the content name of its file and its box."""
    return file if box is None else content_hash(f"{file}[{box}]".encode())


def parse_box(box: str) -> tuple[int, int, int, int]:
    """x, y, width, height."""
    x, y, width, height = (int(number) for number in box.split(","))
    return x, y, width, height


def fingerprint(samples: Iterable[Sample]) -> str:
    """The name of a data set's content: equal for equal samples in any order, wherever their root lies.

    Fields at their defaults are left out, so that a field added to Sample later renames nothing.
    """
    usual = {f.name: f.default for f in fields(Sample)}
    rows = sorted(
        json.dumps({name: value for name, value in vars(sample).items() if value != usual[name]}, sort_keys=True)
        for sample in samples
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def to_parquet(samples: Sequence[Sample]) -> bytes:
    """The catalogue: one row a sample."""
    columns = [f.name for f in fields(Sample)]
    frame = pd.DataFrame({name: [getattr(sample, name) for sample in samples] for name in columns}, dtype="string")
    return table_bytes(frame)


def from_parquet(data: bytes) -> list[Sample]:
    """What `to_parquet` wrote. Raises Damaged for other bytes."""
    try:
        frame = table_of(data).astype(object)
        frame = frame.where(frame.notna(), None)
        names = [str(name) for name in frame.columns]
        return [Sample(**dict(zip(names, row, strict=True))) for row in frame.itertuples(index=False, name=None)]
    except (TypeError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise Damaged(f"not a catalogue of samples ({error}); delete its folder in the store and run again") from error
