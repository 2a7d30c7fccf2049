"""Judge each image of a category before anything learns from it: accepted, or set aside with the reason.

The rules (`rules.py`, `copies.py`) are Great Expectations' expectations (`expectations.py`) about the facts that
`prepare` saw; no image is opened. What follows when one is broken says the `Policy`: `reject` sets the image aside,
`warn` keeps it and says so, `stop` ends the category.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from storage.datasets import published_counts
from storage.samples import Sample, fingerprint, from_parquet, to_parquet
from storage.store import Draft, Store
from storage.tables import read_table, write_table
from tasks.core.handles import Category, Prepared, Validated
from tasks.core.policy import DEFAULT_POLICY, Policy
from tasks.core.steps import code_fingerprint, run_step, step, step_key
from tasks.validate.expectations import RuleOutcome, ask, write_docs
from tasks.validate.rules import Rule, counts_table, enough_training_images, reasons, rules_for, with_comparisons

__all__ = ["FINDINGS", "CategoryStopped", "Policy", "build_data_docs", "findings", "validate", "verdict_key"]

logger = logging.getLogger(__name__)

FINDINGS = ("key", "path", "id", "split", "label", "defect_type", "severity", "rule", "reason")
"""Columns of `findings.parquet`."""


class CategoryStopped(ValueError):
    """A category that nothing can be learned from; the verdict says why."""


@step("validate", "validate {prepared.category.dataset}/{prepared.category.category}")
def validate(prepared: Prepared, policy: Policy = DEFAULT_POLICY) -> Validated:
    """Keep a verdict on every image.

    The output holds the accepted samples (`samples.parquet`), what was found (`findings.parquet`, a row a finding, with
    the columns `FINDINGS`; key and path are empty where it is about the whole category) and a summary in the manifest:
    fingerprint, numbers of images (accepted, rejected, warned; counts: listed and accepted by kind; published), stop,
    expectations and the policy. Raises CategoryStopped, after the verdict is kept, for a category that nothing can be
    learned from.
    """
    category, key = prepared.category, verdict_key(prepared, policy)
    store = Store(category.store)
    verdict = run_step(store, key, partial(_judge, store, prepared, policy)).meta
    if verdict["stop"] is not None:
        raise CategoryStopped(f"{category.name}: {verdict['stop']}")
    return Validated(prepared, key, verdict["fingerprint"])


def verdict_key(prepared: Prepared, policy: Policy = DEFAULT_POLICY) -> str:
    """The key that the verdict has or will have."""
    category = prepared.category
    return step_key(
        "verdicts",
        category.dataset,
        category.category,
        images=prepared.images,
        catalogue=category.catalogue,
        policy=policy.model_dump(),
        published=_published(Store(category.store), category),
        code=code_fingerprint(__name__),
    )


def findings(store: Store, verdict: str) -> pd.DataFrame:
    """A table of what was found, a row a finding, texts without absent values. Raises NotInStore for a key without a
    verdict."""
    table = read_table(store, f"{store.get(verdict).folder}/findings.parquet")
    return table.astype("string").fillna("")


def build_data_docs(prepared: Prepared, folder: str | Path, policy: Policy = DEFAULT_POLICY) -> Path:
    """Write Great Expectations' own pages (Data Docs) about a prepared category to a local folder; the first page.

    They load their styles and scripts from the internet: offline they can be read, but lack styles and filters. A rule
    shows up to 20 values that break it with up to 10 images each; `findings` has all.
    """
    tables, rules = _questions(Store(prepared.category.store), prepared, policy)
    return write_docs(rules, tables, prepared.category.name, Path(folder))


def _judge(store: Store, prepared: Prepared, policy: Policy, draft: Draft) -> dict[str, Any]:
    tables, rules = _questions(store, prepared, policy)
    outcomes, images = ask(rules, tables), tables["images"]
    findings = _findings(rules, outcomes, tables)
    rejected = set(findings.loc[findings["severity"] == "reject", "key"])
    accepted = images[~images["key"].isin(rejected)]

    tables["training"] = accepted[accepted["split"] == "train"]
    enough = enough_training_images(images, tables["training"], policy)
    outcomes |= ask([enough], tables)
    findings = pd.concat([findings, _findings([enough], outcomes, tables)], ignore_index=True)
    # What else is unusual about an image that is set aside is no news.
    findings = findings[(findings["severity"] != "warn") | ~findings["key"].isin(rejected)]

    kept = _kept_samples(store, prepared.category, accepted, _unknown_masks(rules, outcomes, images))
    store.write_bytes(f"{draft.folder}/samples.parquet", to_parquet(kept))
    write_table(store, f"{draft.folder}/findings.parquet", findings)
    logger.info("%s: %d images accepted, %d rejected", prepared.category.name, len(accepted), len(rejected))
    warned = set(findings.loc[findings["severity"] == "warn", "key"]) - {""}
    return {
        "fingerprint": fingerprint(kept),
        "counts": _counts(images, accepted),
        "accepted": len(accepted),
        "rejected": len(rejected),
        "warned": len(warned),
        "stop": _why_stop(findings),
        "expectations": [_summary(rule, outcomes[rule.name]) for rule in (*rules, enough)],
        "policy": policy.model_dump(),
        "published": _published(store, prepared.category),
    }


def _questions(store: Store, prepared: Prepared, policy: Policy) -> tuple[dict[str, pd.DataFrame], list[Rule]]:
    """The tables, and what is expected of them."""
    facts = read_table(store, f"{store.get(prepared.images).folder}/facts.parquet")
    images = with_comparisons(facts, policy)
    counts = counts_table(images, _published(store, prepared.category))
    return {"images": images, "counts": counts}, rules_for(images, counts, policy, prepared.image_size)


def _published(store: Store, category: Category) -> dict[str, int]:
    """Numbers of images as published, where they are known."""
    return published_counts(category.dataset, category.category, store.get(category.catalogue).meta.get("options", {}))


def _findings(
    rules: Sequence[Rule], outcomes: Mapping[str, RuleOutcome], tables: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """A row a finding, in the order of the rules and the images."""
    parts = [pd.DataFrame(columns=list(FINDINGS))]
    for rule in rules:
        outcome = outcomes[rule.name]
        if outcome.success:
            continue
        rows = tables[rule.table].loc[outcome.rows]
        texts = list(reasons(rule, rows)) if len(rows) else [rule.reason]
        place = rows if rule.table == "images" and len(rows) else pd.DataFrame(index=range(len(texts)))
        part = place.reindex(columns=FINDINGS[:6]).assign(severity=rule.severity, rule=rule.name, reason=texts)
        parts.append(part)
    return pd.concat([part.astype("string").fillna("") for part in parts], ignore_index=True)


def _unknown_masks(rules: Sequence[Rule], outcomes: Mapping[str, RuleOutcome], images: pd.DataFrame) -> set[str]:
    """Keys of the images whose masks cannot be believed."""
    unknown = set(images.loc[images["mask_state"] == "unreadable", "key"])
    for rule in rules:
        if rule.mask_unknown:
            unknown |= set(images.loc[outcomes[rule.name].rows, "key"])
    return unknown


def _kept_samples(store: Store, category: Category, accepted: pd.DataFrame, unknown: set[str]) -> list[Sample]:
    catalogue = store.get(category.catalogue)
    samples = from_parquet(store.read_bytes(f"{catalogue.folder}/samples.parquet"))
    keys = set(accepted["key"])
    return [
        replace(sample, mask=None, mask_id=None) if sample.key in unknown else sample
        for sample in samples
        if sample.key in keys
    ]


def _counts(images: pd.DataFrame, accepted: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Images by kind, such as `train` or `test/good`: listed and accepted."""

    def by_kind(table: pd.DataFrame) -> dict[str, int]:
        kinds = table["split"].where(table["split"] != "test", "test/" + table["defect_type"])
        return {str(kind): int(count) for kind, count in kinds.value_counts().items()}

    kept = by_kind(accepted)
    return {k: {"listed": n, "accepted": kept.get(k, 0)} for k, n in sorted(by_kind(images).items())}


def _why_stop(findings: pd.DataFrame) -> str | None:
    stops = findings[findings["severity"] == "stop"]
    if stops.empty:
        return None
    first = stops.iloc[0]
    alike = int((stops["rule"] == first["rule"]).sum())
    more = f" (and {alike - 1} more with the same rule, {first['rule']})" if alike > 1 else ""
    return f"{first['path']}: {first['reason']}{more}" if first["path"] else f"{first['reason']}{more}"


def _summary(rule: Rule, outcome: RuleOutcome) -> dict[str, Any]:
    return {
        "name": rule.name,
        "description": rule.description,
        "severity": rule.severity,
        "success": outcome.success,
        "unexpected": len(outcome.rows),
    }
