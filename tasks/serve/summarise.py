"""What an inspection found, for people and other programs: CSV, JSON, COCO, and whether the batch has drifted.

All of it is made from the journal, a line in memory at a time, and is written whole or not at all. An image counts
once, with what was said of it last. One whose content has changed under the same path is another image.
"""

from __future__ import annotations

import csv
import heapq
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import numpy as np

from al_models.drift import ALPHA, FEWEST, Change, changes
from storage.journal import Journal
from storage.whole import replaced
from tasks.serve.inspect_images import Inspection, key_of
from tasks.serve.reference import LIGHT

_SHOWN = 20
_IN_SCOPE = ("accept", "reject", "undecided")
_STATISTICS = ("score", "features", *LIGHT)
_COLUMNS = ("path", "decision", "score", "p_value", "deviations", "model", "id", "width", "height", *LIGHT, "reason",
            "note", "seconds", "judged")  # fmt: skip
_FILES = ("maps", "masks", "overlays")
_Line = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What a run ended with."""

    out: str
    decisions: dict[str, int]
    """Decision -> images of this run, with those that were judged before."""
    drift: list[Change]
    """What is unlike the good images in those of this run that are in scope; empty for too few."""
    worst: list[dict[str, Any]]
    """The rejected images with the highest scores, the highest first: path, score, p_value."""
    unreadable: dict[str, str]
    """Path -> why; the first few."""
    note: str | None
    """Why the version decides nothing, if it does not."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What lies among the images and is not judged -> why."""
    beyond: int = 0
    """Images with values beyond the range that the version has learned."""

    @property
    def changed(self) -> list[Change]:
        """The statistics that have drifted."""
        return [change for change in self.drift if change.changed]

    @property
    def drift_table(self) -> list[dict[str, Any]]:
        """The statistics that were looked at, a row each."""
        return [asdict(change) for change in self.drift]


def summarise(inspection: Inspection, newest: int | None = None) -> Summary:
    """Write `predictions.csv`, `predictions.json`, `regions.csv`, `coco.json` and `drift.json` beside the journal.

    `newest`: only so many images of this run count for the drift, the last ones.
    """
    lines, version, out = _Lines(inspection.journal), inspection.loaded.version, inspection.out
    heads = {"model": version.label, "calibration": asdict(version.calibration)}
    writers: dict[str, Callable[[IO[str]], None]] = {
        "predictions.csv": lambda file: _images_csv(file, lines),
        "regions.csv": lambda file: _regions_csv(file, lines),
        "coco.json": lambda file: _coco(file, lines),
        "predictions.json": lambda file: _json(file, heads, {"images": lines}),
    }
    for name, write in writers.items():
        with replaced(out / name) as file:
            write(file)
    decisions: Counter[str] = Counter()
    batch: deque[_Line] = deque(maxlen=newest)
    unreadable: dict[str, str] = {}
    beyond = 0
    for line in (line for line in lines if key_of(line) in inspection.asked):
        decisions[line["decision"]] += 1
        beyond += bool(line.get("beyond"))
        if line["decision"] in _IN_SCOPE:
            batch.append({name: line[name] for name in ("path", "p_value", "decision", *_STATISTICS)})
        if line["decision"] == "unreadable" and len(unreadable) < _SHOWN:
            unreadable[line["path"]] = line["reason"]
    drift = _drift(inspection, list(batch))
    with replaced(out / "drift.json") as file:
        facts = heads | {"images": len(batch), "fewest": FEWEST, "alpha": ALPHA}
        _json(file, facts, {"changes": (asdict(change) for change in drift)})
    return Summary(str(out), dict(decisions), drift, _worst(batch), unreadable, version.calibration.note, beyond=beyond)


class _Lines:
    """The lines of a journal that count, as often as one goes through them."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        last: dict[tuple[str, str], int] = {}
        for number, line in enumerate(journal):
            last[line["path"], line["id"]] = number
            if line["id"]:
                last.pop((line["path"], ""), None)  # it could not be read at first
        self.numbers = set(last.values())

    def __iter__(self) -> Iterator[_Line]:
        return (line for number, line in enumerate(self.journal) if number in self.numbers)


def _images_csv(file: IO[str], lines: Iterable[_Line]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_COLUMNS, "regions", "share", *_FILES])
    for line in lines:
        regions = line["regions"]
        row = [line.get(name) for name in _COLUMNS] + [len(regions), sum(region["share"] for region in regions)]
        writer.writerow(row + [line["files"].get(what) for what in _FILES])


def _regions_csv(file: IO[str], lines: Iterable[_Line]) -> None:
    """A row a region; the polygon as JSON."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "id", "x", "y", "width", "height", "area", "share", "score", "polygon"])
    for line in lines:
        for region in line["regions"]:
            figures = [*region["box"], region["area"], region["share"], region["score"]]
            writer.writerow([line["path"], line["id"], *figures, json.dumps(region["polygon"])])


def _coco(file: IO[str], lines: _Lines) -> None:
    """The images that were judged, and their regions as annotations with a score."""

    def judged() -> Iterator[tuple[int, _Line]]:
        return enumerate((line for line in lines if line["decision"] in _IN_SCOPE), start=1)

    images = (
        {"id": number, "file_name": line["path"]} | {name: line[name] for name in ("width", "height", "decision")}
        for number, line in judged()
    )
    regions = ((number, region) for number, line in judged() for region in line["regions"])
    annotations = (
        {
            "id": place,
            "image_id": number,
            "category_id": 1,
            "bbox": region["box"],
            "segmentation": [[end for corner in region["polygon"] for end in corner]],
            "area": region["area"],
            "iscrowd": 0,
            "score": region["score"],
        }
        for place, (number, region) in enumerate(regions, start=1)
    )
    category = {"id": 1, "name": "anomaly", "supercategory": "anomaly"}
    _json(file, {"categories": [category]}, {"images": images, "annotations": annotations})


def _json(file: IO[str], head: Mapping[str, Any], lists: Mapping[str, Iterable[Any]]) -> None:
    """One object: what stands in the head, and lists that are too long to be held."""
    file.write("{")
    for name, value in head.items():
        file.write(f"{json.dumps(name)}: {json.dumps(value)},\n")
    for place, (name, values) in enumerate(lists.items()):
        file.write(f"{',' if place else ''}\n{json.dumps(name)}: [")
        for row, value in enumerate(values):
            file.write(f"{',' if row else ''}\n{json.dumps(value)}")
        file.write("]")
    file.write("}\n")


def _drift(inspection: Inspection, batch: list[_Line]) -> list[Change]:
    calibration, held_out = inspection.loaded.version.calibration, inspection.loaded.reference.statistics
    seen = {name: np.array([line[name] for line in batch], np.float64) for name in _STATISTICS}
    rejected = sum(line["decision"] == "reject" for line in batch)
    told = calibration.image is not None and len(batch) >= FEWEST
    return changes(held_out, seen, rejected=rejected if told else None, rate=calibration.rate)


def _worst(batch: Iterable[_Line]) -> list[_Line]:
    rejected = (line for line in batch if line["decision"] == "reject")
    worst = heapq.nlargest(_SHOWN, rejected, key=lambda line: line["score"])
    return [{name: line[name] for name in ("path", "score", "p_value")} for line in worst]
