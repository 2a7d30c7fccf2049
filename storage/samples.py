"""One image of a data set, and the tables made of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pandas as pd

from storage.errors import Damaged

Split = Literal["train", "validation", "test"]
Label = Literal["good", "anomalous", "unknown"]


@dataclass(frozen=True)
class Sample:
    """One image of a data set."""

    id: str
    """Content hash: the first 32 hex digits of the file's SHA-256."""
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
    """Relative path of the mask; None on a good image means there is no defect, else that the mask is unknown."""
    mask_id: str | None = None
    """Content hash of the mask file."""

    @property
    def mask_state(self) -> Literal["file", "no defect", "unknown"]:
        """Where the truth about the pixels stands."""
        if self.mask is not None:
            return "file"
        return "no defect" if self.label == "good" else "unknown"


def content_hash(data: bytes) -> str:
    """The id of a file's content."""
    return hashlib.sha256(data).hexdigest()[:32]


def fingerprint(samples: Iterable[Sample]) -> str:
    """The name of a data set's content: equal for equal samples in any order, wherever their root lies."""
    rows = sorted(json.dumps(asdict(sample), sort_keys=True) for sample in samples)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def to_parquet(samples: Sequence[Sample]) -> bytes:
    """The catalogue: one row a sample."""
    columns = [f.name for f in fields(Sample)]
    frame = pd.DataFrame([asdict(sample) for sample in samples], columns=columns)
    buffer = io.BytesIO()
    frame.astype("string").to_parquet(buffer, index=False)
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[Sample]:
    """What `to_parquet` wrote. Raises Damaged for other bytes."""
    try:
        frame = pd.read_parquet(io.BytesIO(data)).astype(object)
        frame = frame.where(frame.notna(), None)
        rows = frame.to_dict(orient="records")
        return [Sample(**{str(name): value for name, value in row.items()}) for row in rows]
    except (TypeError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise Damaged(f"not a catalogue of samples ({error}); delete its folder in the store and run again") from error
