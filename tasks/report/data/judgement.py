"""What the data page says of one category: verdict, counts, findings with their pictures, charts, contact sheet."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from tasks.report.data.thumbnails import Thumbnails
from tasks.report.distributions import Distribution, Mark, Sizes, distribution, sizes

SUSPECTED = "suspected_defect"
STATES = {"usable": "usable", "remarks": "usable with remarks", "stopped": "stopped", "unknown": "not judged"}
SEVERITIES = {"stop": "category stops", "reject": "image set aside", "warn": "remark", "off": "not asked"}
"""What follows when a rule is broken, the gravest first."""

_SPLITS = ("train", "validation", "test")
ALL_TYPES = "all defect types"
_KINDS = {"good": 0, "anomalous": 2, "unknown": 3, ALL_TYPES: 4}
"""Kind -> its place in the order of the table, in which the defect types have place 1."""
MEASURES = {
    "brightness": "mean gray value, 0 to 255",
    "contrast": "standard deviation of the gray values",
    "sharpness": "variance of the Laplacian",
}
_NAMED = 3
"""Rules that the verdict names."""
_LINES = 40
"""Findings of a rule that are listed."""
_MARKS = 40
"""Outliers pointed out in a histogram."""
_LEFT_OUT = 12
"""Reasons for which files were left out, and files named with each."""


@dataclass(frozen=True)
class Budget:
    """How much a category may add to the page."""

    side: int
    """Pixels of a picture."""
    shots: int
    """Pictured findings, shared by the rules; each rule has at least two."""
    sheet: int
    """Pictures of the contact sheet."""


@dataclass(frozen=True)
class Stored:
    """What the store holds of a judged category."""

    facts: pd.DataFrame
    """What was seen of each image, in the order of the prepared images."""
    findings: pd.DataFrame
    """Texts; a finding about the category as a whole has an empty key."""
    meta: dict[str, Any] | None
    """The verdict's manifest; None where there is none."""
    suspects: pd.DataFrame | None
    """None where they were not asked for."""
    left_out: list[dict[str, Any]] | None
    """Files that the reader of the layout did not list; None where the catalogue is not known."""
    problems: list[str]
    """What could not be read."""

    @cached_property
    def rejected(self) -> set[str]:
        """Keys of the images set aside."""
        return self._keys("reject")

    @cached_property
    def remarked(self) -> set[str]:
        """Keys of the other images that have a remark."""
        return self._keys("warn") - self.rejected

    def _keys(self, severity: str) -> set[str]:
        return set(self.findings.loc[self.findings["severity"] == severity, "key"]) - {""}

    @property
    def readable(self) -> pd.DataFrame:
        """Facts of the images whose file could be read."""
        return self.facts[self.facts["readable"]]


@dataclass(frozen=True)
class Shot:
    """A finding with its picture."""

    path: str
    reason: str
    alt: str
    url: str | None
    number: int | None
    """Number of a suspect, as in the chart."""
    other_path: str | None
    """The image that the reason names, such as the one that this is a copy of."""
    other_url: str | None


@dataclass(frozen=True)
class Group:
    """All findings of a rule."""

    rule: str
    description: str
    severity: str
    count: int
    on_images: int
    """Findings that are not about the category as a whole."""
    shots: list[Shot]
    lines: list[dict[str, str]]
    """The first findings: path, where, reason."""

    @property
    def more(self) -> int:
        """Findings that are not listed."""
        return self.count - len(self.lines)


@dataclass(frozen=True)
class CountRow:
    """Images of one split and defect type."""

    split: str
    defect_type: str
    listed: int
    rejected: int
    remarked: int
    published: int | None

    @property
    def differs(self) -> bool:
        """Whether what lies there is not what was published."""
        return self.published is not None and self.published != self.listed


@dataclass(frozen=True)
class Sheet:
    """Some accepted images of one split and defect type."""

    split: str
    defect_type: str
    count: int
    pictures: list[tuple[str, str]]
    """Path and data URI."""


@dataclass(frozen=True)
class LeftOut:
    """Files that the reader did not list, for one reason."""

    reason: str
    count: int
    paths: list[str]


@dataclass(frozen=True)
class Charts:
    """How the images are distributed."""

    sizes: Sizes | None
    histograms: list[Distribution]
    notes: list[str]
    """What no chart shows."""


@dataclass(frozen=True)
class Overview:
    """A category in one line; None is not known."""

    listed: int
    accepted: int
    rejected: int
    remarked: int
    suspected: int | None
    left_out: int | None
    sizes: int


@dataclass(frozen=True)
class CategoryView:
    """A category as the page shows it."""

    anchor: str
    name: str
    state: str
    """One of `STATES`."""
    verdict: str
    remarks: list[str]
    """On the category as a whole."""
    problems: list[str]
    """What could not be read of the store."""
    overview: Overview
    counts: list[CountRow]
    groups: list[Group]
    suspects: Distribution | None
    charts: Charts
    sheets: list[Sheet]
    more_sheets: int
    """Defect types that are not shown."""
    left_out: list[LeftOut] | None
    expectations: list[dict[str, Any]]
    policy: dict[str, Any]


def view_of(
    stored: Stored, anchor: str, name: str, published: Mapping[str, int], thumbnails: Thumbnails, budget: Budget
) -> CategoryView:
    """All that the page says of a category; `published` numbers are named as in `Dataset.counts`."""
    meta, findings = stored.meta or {}, stored.findings
    groups, overview = _groups(stored, thumbnails, budget), _overview(stored)
    state, verdict = _verdict(stored, overview, groups)
    sheets, more = _sheets(stored, thumbnails, budget)
    whole = findings[(findings["key"] == "") & (findings["severity"] != "stop")]
    return CategoryView(
        anchor=anchor,
        name=name,
        state=state,
        verdict=verdict,
        remarks=whole["reason"].tolist()[:_LINES],
        problems=stored.problems + ([f"No pictures: {thumbnails.missing}."] if thumbnails.missing else []),
        overview=overview,
        counts=_counts(stored, published),
        groups=groups,
        suspects=_suspect_chart(stored),
        charts=_charts(stored),
        sheets=sheets,
        more_sheets=more,
        left_out=None if stored.left_out is None else _left_out(stored.left_out),
        expectations=meta.get("expectations") or [],
        policy=meta.get("policy") or {},
    )


def _overview(stored: Stored) -> Overview:
    listed, meta = len(stored.facts), stored.meta or {}
    return Overview(
        listed=listed,
        accepted=meta.get("accepted", listed - len(stored.rejected)),
        rejected=meta.get("rejected", len(stored.rejected)),
        remarked=len(stored.remarked),
        suspected=None if stored.suspects is None else int(stored.suspects["suspected"].sum()),
        left_out=None if stored.left_out is None else sum(_files(entry) for entry in stored.left_out),
        sizes=len(stored.readable[["width", "height"]].drop_duplicates()),
    )


def _verdict(stored: Stored, overview: Overview, groups: Sequence[Group]) -> tuple[str, str]:
    """State and sentence. A remark on the category and a file left out are remarks too."""
    if stored.meta is None:
        return "unknown", "Not judged: no verdict is stored, so nothing says that it may be learned from."
    if stored.meta.get("stop"):
        return "stopped", f"Stopped: {stored.meta['stop']}"
    if not groups and not overview.left_out and not stored.problems:
        return "usable", f"Usable: all {overview.accepted} images are accepted without a remark."
    parts = [f"{overview.accepted} of {overview.accepted + overview.rejected} images accepted"]
    if overview.rejected:
        parts.append(f"{overview.rejected} set aside{_by_rule(groups, 'reject')}")
    if overview.remarked:
        parts.append(f"{overview.remarked} accepted with a remark{_by_rule(groups, 'warn')}")
    whole = int(((stored.findings["key"] == "") & (stored.findings["severity"] == "warn")).sum())
    if whole:
        parts.append(f"{whole} {'remark' if whole == 1 else 'remarks'} on the category as a whole")
    if overview.left_out:
        parts.append(f"{overview.left_out} {'file' if overview.left_out == 1 else 'files'} left out by the reader")
    return "remarks", f"Usable with remarks: {', '.join(parts)}."


def _by_rule(groups: Sequence[Group], severity: str) -> str:
    """The rules that brought it about, the first few."""
    broken = [group for group in groups if group.severity == severity and group.on_images]
    named = [f"{group.rule.replace('_', ' ')} {group.on_images}" for group in broken[:_NAMED]]
    rest = [f"{len(broken) - _NAMED} other rules"] if len(broken) > _NAMED else []
    return f" (rules: {', '.join(named + rest)})" if named else ""


# counts


def _counts(stored: Stored, published: Mapping[str, int]) -> list[CountRow]:
    """Images by split and defect type; a published number of all anomalous test images has a line of its own."""
    facts = stored.facts
    table = pd.DataFrame(
        {
            "listed": 1,
            "rejected": facts["key"].isin(stored.rejected).astype(int),
            "remarked": facts["key"].isin(stored.remarked).astype(int),
        }
    )
    sums = table.groupby([facts["split"], facts["defect_type"]]).sum()
    counts = {(str(split), str(kind)): row.tolist() for (split, kind), row in sums.iterrows()}
    rows = [
        CountRow(*place, listed, rejected, remarked, published.get(_slot(*place)))
        for place, (listed, rejected, remarked) in counts.items()
    ]
    shown = {_slot(*place) for place in counts}
    rows += [_missing_row(counts, slot, count) for slot, count in published.items() if slot not in shown]
    return sorted(rows, key=lambda row: _order(row.split, row.defect_type))


def _slot(split: str, kind: str) -> str:
    """The name of a published number."""
    return f"test/{kind}" if split == "test" else split


def _missing_row(counts: Mapping[tuple[str, str], list[int]], slot: str, published: int) -> CountRow:
    """A published number that belongs to no line: of all defect types together, or of images that are not there."""
    split, _, kind = slot.partition("/")
    own = [n for (other, defect), n in counts.items() if other == split and defect not in _KINDS]
    if kind == "anomalous" and own:
        listed, rejected, remarked = (sum(column) for column in zip(*own, strict=True))
        return CountRow(split, ALL_TYPES, listed, rejected, remarked, published)
    return CountRow(split, kind or "good", 0, 0, 0, published)


def _order(split: str, kind: str) -> tuple[int, int, str]:
    return _SPLITS.index(split) if split in _SPLITS else len(_SPLITS), _KINDS.get(kind, 1), kind


# findings


def _groups(stored: Stored, thumbnails: Thumbnails, budget: Budget) -> list[Group]:
    """The findings by rule, the gravest and then the most frequent first."""
    asked = {rule["name"]: rule.get("description", "") for rule in (stored.meta or {}).get("expectations") or []}
    parts = {(str(s), str(r)): part for (s, r), part in stored.findings.groupby(["severity", "rule"])}
    order = sorted(parts, key=lambda place: (list(SEVERITIES).index(place[0]), -len(parts[place]), place[1]))
    numbers = [len(part) for part in parts.values()]
    each = next((most for most in range(6, 2, -1) if sum(min(most, n) for n in numbers) <= budget.shots), 2)
    keys = sorted(stored.facts["key"], key=len, reverse=True)
    groups = []
    for severity, rule in order:
        part = parts[severity, rule]
        if rule == SUSPECTED and stored.suspects is not None:
            part = _most_unlike_first(part, stored.suspects)
        on_images = part[part["key"] != ""]
        pictured = on_images.head(each).to_dict("records")
        shots = [_shot(stored, row, keys, thumbnails, budget.side, n) for n, row in enumerate(pictured, start=1)]
        lines = [_line(row) for row in part.head(_LINES).to_dict("records")]
        groups.append(Group(rule, asked.get(rule, ""), severity, len(part), len(on_images), shots, lines))
    return groups


def _most_unlike_first(part: pd.DataFrame, suspects: pd.DataFrame) -> pd.DataFrame:
    deviations = suspects.drop_duplicates("key").set_index("key")["deviations"]
    order = part["key"].map(deviations).astype(float).sort_values(ascending=False, kind="stable")
    return part.loc[order.index]


def _shot(
    stored: Stored, row: Mapping[str, str], keys: Sequence[str], thumbnails: Thumbnails, side: int, number: int
) -> Shot:
    """`keys`: of all images, the longest first."""
    suspected = row["rule"] == SUSPECTED and stored.suspects is not None
    mark = _mark(stored.suspects, row["key"]) if stored.suspects is not None and suspected else None
    other = next((key for key in keys if key in row["reason"] and key != row["key"]), None)
    alt = f"{row['path']}, {row['split']}, {row['defect_type']}"
    if mark is not None:
        alt += f"; a ring at {mark[0]:.0%} from the left and {mark[1]:.0%} from the top"
    return Shot(
        path=row["path"],
        reason=row["reason"],
        alt=alt,
        url=thumbnails.of(row["key"], side, mark),
        number=number if suspected else None,
        other_path=other,
        other_url=None if other is None else thumbnails.of(other, side),
    )


def _mark(suspects: pd.DataFrame, key: str) -> tuple[float, float] | None:
    places = suspects.loc[suspects["key"] == key, ["x", "y"]].dropna()
    return None if places.empty else (float(places["x"].iloc[0]), float(places["y"].iloc[0]))


def _line(row: Mapping[str, str]) -> dict[str, str]:
    where = f"{row['split']}, {row['defect_type']}" if row["key"] else ""
    return {"path": row["path"] or "the category as a whole", "where": where, "reason": row["reason"]}


def _left_out(files: Sequence[Mapping[str, Any]]) -> list[LeftOut]:
    """The files left out by reason, the most frequent first; what is too much for the page is one line."""
    groups: dict[str, list[str]] = {}
    count: Counter[str] = Counter()
    for file in files:
        groups.setdefault(file["reason"], []).append(file["path"])
        count[file["reason"]] += _files(file)
    ordered = sorted(groups.items(), key=lambda item: (-count[item[0]], item[0]))
    shown = [LeftOut(reason, count[reason], paths[:_LEFT_OUT]) for reason, paths in ordered[:_LEFT_OUT]]
    rest = [count[reason] for reason, _ in ordered[_LEFT_OUT:]]
    return [*shown, LeftOut(f"for {len(rest)} other reasons", sum(rest), [])] if rest else shown


def _files(entry: Mapping[str, Any]) -> int:
    """The number of files that an entry of the reader's stands for."""
    return int(entry.get("files", 1))


# charts


def _suspect_chart(stored: Stored) -> Distribution | None:
    """The distribution of deviations; None where nothing was compared: of too few images all deviations are 0."""
    if stored.suspects is None or not (stored.suspects["deviations"] != 0).any():
        return None
    table = stored.suspects.sort_values("deviations", ascending=False, kind="stable")
    named = table[table["suspected"]].head(_MARKS)
    marks = [
        Mark(float(value), f"{number}: {key}, {value:.1f}", str(number) if number <= 9 else "")
        for number, (key, value) in enumerate(zip(named["key"], named["deviations"], strict=True), start=1)
    ]
    limit = ((stored.meta or {}).get("policy") or {}).get("suspect_deviations")
    return distribution(
        "Training images by how unlike the others they are",
        "robust deviations from what is usual",
        _floats(table["deviations"]),
        marks=marks,
        line=None if limit is None else (float(limit), f"{limit:g}"),
    )


def _charts(stored: Stored) -> Charts:
    facts = stored.readable
    areas = _floats(facts.loc[facts["label"] == "anomalous", "mask_fraction"])
    training = facts[facts["split"] == "train"]
    histograms = [distribution("Defect area", "% of the image, logarithmic", 100 * areas, log=True)]
    histograms += [_measured(stored, training, column, axis) for column, axis in MEASURES.items()]
    unknown, empty = int(np.isnan(areas).sum()), int((areas == 0).sum())
    notes = [f"anomalous images without a mask that can be read: {unknown}"] if unknown else []
    notes += [f"masks that mark no pixel: {empty}"] if empty else []
    drawn = [chart for chart in histograms if chart is not None]
    return Charts(sizes(facts["width"].tolist(), facts["height"].tolist()), drawn, notes)


def _measured(stored: Stored, training: pd.DataFrame, column: str, axis: str) -> Distribution | None:
    """The distribution of a measurement: of the accepted images, and of those that break the rule about it."""
    unusual = stored.findings.loc[stored.findings["rule"] == f"usual_{column}", "key"]
    training = training[training["key"].isin(unusual) | ~training["key"].isin(stored.rejected)]
    outliers = training[training["key"].isin(unusual)].head(_MARKS)
    pairs = zip(outliers["path"], _floats(outliers[column]), strict=True)
    marks = [Mark(float(value), f"{path}: {value:.4g}") for path, value in pairs]
    return distribution(f"{column.capitalize()} of the training images", axis, _floats(training[column]), marks=marks)


def _floats(column: pd.Series) -> np.ndarray:
    return column.astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)


# contact sheet


def _sheets(stored: Stored, thumbnails: Thumbnails, budget: Budget) -> tuple[list[Sheet], int]:
    """Some accepted images of each split and defect type; and how many of these are not shown."""
    facts = stored.readable
    facts = facts[~facts["key"].isin(stored.rejected)]
    if stored.meta is None or facts.empty:
        return [], 0
    kinds = {(str(s), str(k)): part for (s, k), part in facts.groupby(["split", "defect_type"])}
    order = sorted(kinds, key=lambda place: _order(*place))
    each = max(1, min(8, budget.sheet // len(order)))
    sheets = []
    for place in order[: budget.sheet]:
        part = kinds[place]
        drawn = sorted(zip(part["key"], part["path"], strict=True), key=lambda pair: _draw(pair[0]))[:each]
        pictures = [(path, url) for key, path in drawn if (url := thumbnails.of(key, budget.side)) is not None]
        sheets.append(Sheet(*place, len(part), pictures))
    return sheets, len(order) - len(sheets)


def _draw(key: str) -> bytes:
    """A place in a random order that hardly depends on what other images there are."""
    return hashlib.sha256(f"contact sheet:{key}".encode()).digest()
