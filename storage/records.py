"""What ran and how it ended: one JSON file a cell, replaced whole when the cell is run again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from storage.errors import Damaged, NotInStore

if TYPE_CHECKING:
    from storage.store import Store


@dataclass(frozen=True)
class RunRecord:
    """One cell of a sweep: a method with its parameters and seed on one category."""

    dataset: str
    category: str
    method: str
    params: dict[str, Any]
    """Every hyperparameter, the defaults included."""
    seed: int
    cell: str
    """Hash of data set, category, method, params and seed: the cell's name across versions of data and code."""
    status: Literal["done", "failed"]
    reason: str | None = None
    """Why it failed: `<step>: <message>`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Fractions in 0..1; a metric that has no meaning here (no mask, no anomalous image) is absent, not zero."""
    intervals: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metric -> `low` and `high` of its 95 % interval over images, both None where they cannot tell, and a `note`;
    of an absent metric, a note why."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """Thresholds that decide (`image`, `pixel`), what they did (`realised`); the same for each of `rates`, asked and
    realised false-reject rates with their intervals, and the miss rate; `false_alarms` promised and seen, of methods
    that promise them."""
    facts: dict[str, float] = field(default_factory=dict)
    """Figures about what was learned, such as the size of a memory and the recall of its index."""
    losses: list[list[float | None]] = field(default_factory=list)
    """Course of a training: step, training loss, loss on held-out good images (None where none were held out), and of
    a training with several turns the loss of each of `turns` (None in phases without it)."""
    turns: list[str] = field(default_factory=list)
    """Who learned in turn, such as a generator and a discriminator; empty where one loss taught all."""
    updated_from: str | None = None
    """Key of the earlier model that learned the new images on top; None: all images were learned at once."""
    warnings: list[str] = field(default_factory=list)
    """What speaks against this method on these images, in sentences."""
    counts: dict[str, int] = field(default_factory=dict)
    """Images by use: train, calibration, test_good, test_anomalous, test_unknown, set_aside, without_mask."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of computing each output, by step; a shared or reused output keeps the seconds it first took."""
    peak_memory_mb: float = 0.0
    """Largest resident memory of a process while one of the steps ran."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Content names of data, code, features, model, maps."""
    keys: dict[str, str] = field(default_factory=dict)
    """Keys of the stored outputs, by step, for reading maps and pictures."""
    root: str = ""
    """Folder that its images lie in; empty in records of earlier versions."""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    """Processor, its instruction set, cores and GPU that the model was fitted on: others round otherwise."""
    finished: str = ""
    """UTC time, ISO 8601."""

    def key(self) -> str:
        """Where the record lies in a store."""
        return f"records/{self.dataset}/{self.category}/{self.method}/{self.cell}.json"


def write_record(store: Store, record: RunRecord) -> None:
    """Keep the record; an older one of the same cell is replaced."""
    store.write_json(record.key(), asdict(record))


def read_record(store: Store, key: str) -> RunRecord | None:
    """The record under a key, or None. Raises Damaged for a file that is none."""
    try:
        values = store.read_json(key)
    except NotInStore:
        return None
    known = {f.name for f in fields(RunRecord)}
    try:
        return RunRecord(**{name: value for name, value in values.items() if name in known})
    except (AttributeError, TypeError) as error:
        raise Damaged(f"{key} is not a run record ({error}); delete the file and run the cell again") from error


def read_records(store: Store) -> Iterator[RunRecord]:
    """All records of a store, by data set, category and method. Raises Damaged for a file that is none."""
    for key in store.list("records"):
        record = read_record(store, key) if key.endswith(".json") else None  # file managers leave files of their own
        if record is not None:  # else deleted since it was listed
            yield record
