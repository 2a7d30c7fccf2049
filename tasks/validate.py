"""Judge each image of a category before anything learns from it: accepted, or set aside with the reason.

The rules are Great Expectations' expectations about the facts that `prepare` saw. Each has one of four severities:
`reject` sets the image aside, `mask_unknown` keeps it but takes its mask for unknown, `warn` keeps it and says so, and
`stop` ends the category.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.samples import Sample, fingerprint, from_parquet, to_parquet
from storage.store import Draft, Store
from tasks.handles import Prepared, Validated
from tasks.steps import code_fingerprint, retry_passing, run_step, step_key

logger = logging.getLogger(__name__)

MIN_SIDE = 16
MIN_TRAINING_IMAGES = 2

Row = dict[str, Any]
"""The facts of one image, and what is derived from comparing it with the others."""

_GREAT_EXPECTATIONS = threading.Lock()  # its data context is global to the process


class CategoryStopped(ValueError):
    """A category that nothing can be learned from; the verdict says why."""


@dataclass(frozen=True)
class Rule:
    """What is expected of a category's images, and what follows when it does not hold."""

    name: str
    description: str
    severity: Literal["reject", "mask_unknown", "warn", "stop"]
    reason: str
    """Why an image breaks the rule, for people; filled from its row."""
    expectation: str
    """Class name in `great_expectations.expectations`."""
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a rule fared."""

    success: bool
    paths: frozenset[str]
    """Images that break it."""


@task(
    name="validate",
    task_run_name="validate {prepared.category.dataset}/{prepared.category.category}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=retry_passing,
)
def validate(prepared: Prepared) -> Validated:
    """Keep a verdict on every image: the accepted samples as Parquet, the reasons for the others in the manifest.

    Raises CategoryStopped, after the verdict is kept, for a category that nothing can be learned from.
    """
    category = prepared.category
    store = Store(category.store)
    key = step_key(
        "verdicts",
        category.dataset,
        category.category,
        images=prepared.images,
        catalogue=category.catalogue,
        code=code_fingerprint("tasks.validate"),
    )
    verdict = run_step(store, key, partial(_judge, store, prepared)).meta
    if verdict["stop"] is not None:
        raise CategoryStopped(f"{category.name}: {verdict['stop']}")
    return Validated(prepared, key, verdict["fingerprint"])


def _judge(store: Store, prepared: Prepared, draft: Draft) -> dict[str, Any]:
    catalogue = store.get(prepared.category.catalogue)
    samples = from_parquet(store.read_bytes(f"{catalogue.folder}/samples.parquet"))
    facts = store.read_bytes(f"{store.get(prepared.images).folder}/facts.parquet")
    rows = _compare(_records(pd.read_parquet(io.BytesIO(facts))))
    rules = _rules(rows)
    outcomes = _expect(rows, rules)

    rejected = _findings(rows, rules, outcomes, "reject")
    accepted = [row for row in rows if row["path"] not in rejected]
    unknown = _findings(accepted, rules, outcomes, "mask_unknown")
    noted = _findings(accepted, rules, outcomes, "warn")

    training = [row for row in accepted if row["split"] == "train"]
    outcomes |= _expect(training, [_ENOUGH])
    kept = _accepted_samples(samples, set(rejected), set(unknown))
    store.write_bytes(f"{draft.folder}/samples.parquet", to_parquet(kept))
    logger.info("%s: %d images accepted, %d rejected", prepared.category.name, len(accepted), len(rejected))
    by_path = {row["path"]: row for row in rows}
    return {
        "fingerprint": fingerprint(kept),
        "accepted": [sample.id for sample in kept],
        "rejected": [
            {"id": by_path[path]["id"], "path": path, "split": by_path[path]["split"], "reason": reason}
            for path, reason in rejected.items()
        ],
        "mask_unknown": [{"id": by_path[path]["id"], "path": path, "reason": why} for path, why in unknown.items()],
        "warnings": catalogue.meta["set_aside"]
        + _varying_sizes(rows, prepared)
        + [{"path": path, "reason": reason} for path, reason in noted.items()],
        "stop": _why_stop(rows, training, outcomes),
        "expectations": [_summary(rule, outcomes[rule.name]) for rule in (*rules, _ENOUGH)],
    }


def _rules(rows: Sequence[Row]) -> list[Rule]:
    """The rules for a category; what is usual in it is learned from its training images."""
    rules = list(_RULES)
    bits, size, channels = (_usual(rows, column) for column in ("bit_depth", "size", "n_channels"))
    if bits is not None:
        reason = f"{{bit_depth}} bits a channel, while the category's training images have {bits}; export it like them"
        rules.append(_in_set("bit_depth", f"images have {bits} bits a channel", "reject", reason, "bit_depth", bits))
    if size is not None and not _sizes_vary(rows):
        reason = f"{{size}} px, while the category's training images have {size}"
        rules.append(_in_set("usual_size", f"images have {size} px", "warn", reason, "size", size))
    if channels is not None:
        names = {1: "gray", 3: "colour"}
        reason = f"{{n_channels}} channels, while the category's training images are {names[channels]}"
        rules.append(_in_set("usual_channels", f"images are {names[channels]}", "warn", reason, "n_channels", channels))
    return rules


def _in_set(
    name: str, description: str, severity: Literal["reject", "warn"], reason: str, column: str, value: object
) -> Rule:
    arguments = {"column": column, "value_set": [value]}
    return Rule(name, description, severity, reason, "ExpectColumnValuesToBeInSet", arguments)


def _empty(
    name: str, description: str, severity: Literal["reject", "mask_unknown", "warn"], reason: str, column: str
) -> Rule:
    return Rule(name, description, severity, reason, "ExpectColumnValuesToBeNull", {"column": column})


_RULES = (
    Rule(
        "not_empty",
        "the category has images",
        "stop",
        "no image is listed; put good images into train/good",
        "ExpectTableRowCountToBeBetween",
        {"min_value": 1},
    ),
    _in_set("readable", "images can be decoded", "reject", "{problem}", "readable", True),
    Rule(
        "large_enough",
        f"images have at least {MIN_SIDE} px on each side",
        "reject",
        f"{{size}} px; at least {MIN_SIDE} on each side are needed",
        "ExpectColumnValuesToBeBetween",
        {"column": "shorter_side", "min_value": MIN_SIDE},
    ),
    _in_set(
        "not_constant",
        "images show something",
        "reject",
        "all pixels have the same value; look for a covered lens or an empty export",
        "constant",
        False,
    ),
    _empty(
        "one_label",
        "no content has two labels in test",
        "reject",
        "{label}, but {other_label} has the same content; keep the copy that is right",
        "other_label",
    ),
    _empty(
        "unique_in_split",
        "no content appears twice in a split",
        "reject",
        "same content as {copy_of}, which is kept",
        "copy_of",
    ),
    _empty(
        "unique_across_splits",
        "no content appears in two splits",
        "reject",
        "same content as {seen_in}; taken out of {split} so that the images judged stay unseen and the same",
        "seen_in",
    ),
    _in_set(
        "mask_size",
        "masks have the size of their image",
        "reject",
        "its mask has {mask_width}x{mask_height} px, the image {size}; draw the mask on the image itself",
        "mask_fits",
        True,
    ),
    _empty("mask_known", "anomalous images have a mask", "mask_unknown", "{mask_missing}", "mask_missing"),
    Rule(
        "mask_not_empty",
        "masks of anomalous images mark something",
        "mask_unknown",
        "its mask marks no pixel (no gray value above 127)",
        "ExpectColumnValuesToBeBetween",
        {"column": "mask_fraction", "min_value": 0, "strict_min": True},
    ),
    _empty("nothing_changed", "images are decoded as they are", "warn", "{note}", "note"),
)

_ENOUGH = Rule(
    "enough_training_images",
    f"at least {MIN_TRAINING_IMAGES} good training images are accepted",
    "stop",
    f"{{accepted}} of {{listed}} training images accepted, at least {MIN_TRAINING_IMAGES} are needed; add good images "
    f"to train/good, or see why they were rejected",
    "ExpectTableRowCountToBeBetween",
    {"min_value": MIN_TRAINING_IMAGES},
)


def _records(facts: pd.DataFrame) -> list[Row]:
    facts = facts.astype(object)
    rows: list[Row] = facts.where(facts.notna(), None).to_dict(orient="records")
    return rows


def _compare(rows: Sequence[Row]) -> list[Row]:
    """The rows with what the rules need beside the facts; a value of None breaks no rule."""
    copies = _copies(rows)
    return [{**row, **_derived(row), **copies.get(row["path"], _NO_COPY)} for row in rows]


def _derived(row: Row) -> Row:
    size = f"{row['width']}x{row['height']}" if row["readable"] else None
    missing = None
    if row["label"] == "anomalous" and row["mask_state"] == "unknown":
        missing = "there is no mask for it"
    elif row["mask_state"] == "unreadable":
        missing = f"its mask cannot be read: {row['mask_problem']}"
    measured = row["readable"] and row["mask_width"] is not None
    fits = (row["mask_width"], row["mask_height"]) == (row["width"], row["height"]) if measured else None
    shorter = min(row["width"], row["height"]) if row["readable"] else None
    return {"size": size, "shorter_side": shorter, "mask_missing": missing, "mask_fits": fits}


_NO_COPY: Row = {"other_label": None, "copy_of": None, "seen_in": None}
_KEPT_FIRST = {"test": 0, "validation": 1, "train": 2}


def _copies(rows: Sequence[Row]) -> dict[str, Row]:
    """Path -> which other image has the same content, for images that have copies.

    A copy stays where it is judged: in test before validation before train. Unreadable files have a reason already.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["readable"]:
            groups.setdefault(row["id"], []).append(row)
    found: dict[str, Row] = {}
    for group in groups.values():
        group = sorted(group, key=lambda row: _KEPT_FIRST[row["split"]])  # stable: by path within a split
        first = group[0]
        same_split = [row for row in group if row["split"] == first["split"]]
        others = {row["path"]: [o for o in same_split if o["label"] != row["label"]] for row in same_split}
        for row in group[1:] if not any(others.values()) else group:
            copy = dict(_NO_COPY)
            if row["split"] != first["split"]:
                copy["seen_in"] = first["path"]
            elif others[row["path"]]:
                copy["other_label"] = f"{others[row['path']][0]['path']} ({others[row['path']][0]['label']})"
            else:
                copy["copy_of"] = first["path"]
            found[row["path"]] = copy
    return found


def _usual(rows: Sequence[Row], column: str) -> Any:
    """The most common value among the readable training images, or among all; the smaller one of a tie."""
    readable = [row for row in rows if row["readable"]]
    values = [row[column] for row in readable if row["split"] == "train"] or [row[column] for row in readable]
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default=None)


def _sizes_vary(rows: Sequence[Row]) -> bool:
    """Whether no size is usual: none is that of half the training images."""
    counts = Counter(row["size"] for row in rows if row["readable"] and row["split"] == "train")
    return bool(counts) and 2 * max(counts.values()) < sum(counts.values())


def _varying_sizes(rows: Sequence[Row], prepared: Prepared) -> list[dict[str, str]]:
    if not _sizes_vary(rows):
        return []
    sizes = len({row["size"] for row in rows if row["readable"]})
    side = prepared.image_size
    return [
        {"path": prepared.category.category, "reason": f"images have {sizes} sizes; each was resized to {side}x{side}"}
    ]


def _expect(rows: Sequence[Row], rules: Sequence[Rule]) -> dict[str, Outcome]:
    """Ask Great Expectations how each rule fares on these rows; one at a time in a process."""
    with _GREAT_EXPECTATIONS:
        gx, context = _great_expectations()
        table = pd.DataFrame(list(rows), columns=list(rows[0]) if rows else ["path"], dtype=object)
        batch = context.data_sources.pandas_default.read_dataframe(table)
        # Without rows there are no columns either, and only the rules about their number can be asked.
        asked = [rule for rule in rules if rows or "column" not in rule.arguments]
        expectations = [getattr(gx.expectations, r.expectation)(**r.arguments, meta={"rule": r.name}) for r in asked]
        suite = gx.ExpectationSuite(name="images", expectations=expectations)
        complete = {"result_format": "COMPLETE", "unexpected_index_column_names": ["path"]}
        results = batch.validate(suite, result_format=complete).results
    outcomes = {rule.name: Outcome(True, frozenset()) for rule in rules}
    return outcomes | {result.expectation_config.meta["rule"]: _outcome(result) for result in results}


@cache
def _great_expectations() -> tuple[Any, Any]:
    """The module and a context without files; imported here because it takes seconds and a kept verdict needs none."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its own imports use a deprecated module of Python
        import great_expectations as gx
    # This module logs a temporary folder that is gone by then, at a level of its own.
    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    return gx, context


def _outcome(result: Any) -> Outcome:
    """Raises RuntimeError for an expectation that could not be evaluated, which would pass for a broken rule."""
    if not {"element_count", "observed_value"} & set(result.result):
        raise RuntimeError(
            f"Great Expectations could not evaluate {result.expectation_config}: {result.exception_info}"
        )
    paths = frozenset(entry["path"] for entry in result.result.get("unexpected_index_list") or ())
    return Outcome(bool(result.success), paths)


def _findings(
    rows: Sequence[Row], rules: Sequence[Rule], outcomes: dict[str, Outcome], severity: str
) -> dict[str, str]:
    """Path -> all reasons of one severity, for the images that have any, in order."""
    found: dict[str, str] = {}
    for row in rows:
        broken = [r for r in rules if r.severity == severity and row["path"] in outcomes[r.name].paths]
        if broken:
            found[row["path"]] = "; ".join(rule.reason.format(**row) for rule in broken)
    return found


def _accepted_samples(samples: Sequence[Sample], rejected: set[str], unknown: set[str]) -> list[Sample]:
    accepted = [sample for sample in samples if sample.path not in rejected]
    return [replace(s, mask=None, mask_id=None) if s.path in unknown else s for s in accepted]


def _why_stop(rows: Sequence[Row], training: Sequence[Row], outcomes: dict[str, Outcome]) -> str | None:
    for rule in (*_RULES, _ENOUGH):
        if rule.severity == "stop" and not outcomes[rule.name].success:
            listed = sum(row["split"] == "train" for row in rows)
            return rule.reason.format(accepted=len(training), listed=listed)
    return None


def _summary(rule: Rule, outcome: Outcome) -> dict[str, Any]:
    return {
        "name": rule.name,
        "description": rule.description,
        "severity": rule.severity,
        "success": outcome.success,
        "unexpected": len(outcome.paths),
    }
