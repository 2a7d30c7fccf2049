"""Suspect defects among the training images: those whose features are too unlike the features of all others."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pandas as pd

from al_models.parts.contamination import FEWEST, Unlikeness, layer_to_compare, unlikeness
from al_models.registry import create
from al_models.types import FeatureSpec
from storage.samples import Sample, fingerprint, to_parquet
from storage.store import Draft, Store
from storage.tables import read_table, write_table
from tasks.core.compute import device_of
from tasks.core.handles import Validated
from tasks.core.policy import DEFAULT_POLICY, Policy
from tasks.core.progress import Progress
from tasks.core.steps import code_fingerprint, run_step, step, step_key
from tasks.core.stored import StoredSource, accepted_samples
from tasks.validate import FINDINGS, CategoryStopped, findings

logger = logging.getLogger(__name__)

RULE = "suspected_defect"
COLUMNS = {
    "id": "string",
    "key": "string",
    "score": "float64",
    "deviations": "float64",
    "suspected": "bool",
    "x": "float64",
    "y": "float64",
}
"""Columns of `suspects.parquet`."""


def shared_spec(image_size: int) -> FeatureSpec:
    """The features that most methods share, which suspects are looked for in."""
    spec = create("padim", image_size=image_size).feature_spec()
    assert spec is not None
    return spec


@step("suspect", "suspect {validated.name}", gpu=True)
def suspect(
    validated: Validated, features: str, spec: FeatureSpec, policy: Policy = DEFAULT_POLICY, device: str = "auto"
) -> Validated:
    """Keep how unlike the others each accepted training image is, and set suspects aside where the policy rejects.

    `features` is the key of the spec's features of the accepted images. The output holds `suspects.parquet`, a row a
    training image (`COLUMNS`; score 1 is typical, x and y are the centre of its most unlike patch as fractions of its
    width and height), no row where the policy turns the rule off. Where it rejects, suspects get a verdict of their
    own; the features stay good for the images that are left. Raises CategoryStopped, after that verdict is kept, when
    too few are.
    """
    category, store = validated.category, Store(validated.category.store)
    key = step_key(
        "suspects",
        category.dataset,
        category.category,
        data=validated.fingerprint,
        features=features,
        spec=asdict(spec),
        severity=policy.severity(RULE),
        deviations=policy.suspect_deviations,
        code=code_fingerprint(__name__),
    )
    suspects = run_step(store, key, partial(_suspect, store, validated, features, spec, policy, device)).meta
    if policy.severity(RULE) != "reject" or not suspects["suspected"]:
        return replace(validated, suspects=key)
    return _without_suspects(store, validated, key, policy)


def _suspect(
    store: Store, validated: Validated, features: str, spec: FeatureSpec, policy: Policy, device: str, draft: Draft
) -> dict[str, Any]:
    severity = policy.severity(RULE)
    samples = [sample for sample in accepted_samples(validated) if sample.split == "train" and severity != "off"]
    table = _table(validated, features, spec, samples, policy, device)
    suspected = int(table["suspected"].sum())
    write_table(store, f"{draft.folder}/suspects.parquet", table)
    logger.info("%s: %d of %d training images suspected", validated.name, suspected, len(samples))
    return {
        "suspected": suspected,
        "compared": len(samples),
        "needed": FEWEST,
        "severity": severity,
        "limit": policy.suspect_deviations,
        "layer": _layer(store, features, spec),
    }


def _layer(store: Store, features: str, spec: FeatureSpec) -> int:
    return layer_to_compare({int(i): s for i, s in store.get(features).meta["shapes"].items()}, spec.image_size)


def _table(
    validated: Validated, features: str, spec: FeatureSpec, samples: Sequence[Sample], policy: Policy, device: str
) -> pd.DataFrame:
    if not samples:
        return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    unlikeness = compared(validated, features, spec, samples, device)
    columns = {
        "id": [sample.id for sample in samples],
        "key": [sample.key for sample in samples],
        "score": unlikeness.scores,
        "deviations": unlikeness.deviations,
        "suspected": unlikeness.deviations > policy.suspect_deviations,
        "x": unlikeness.places[:, 0],
        "y": unlikeness.places[:, 1],
    }
    return pd.DataFrame(columns).astype(COLUMNS)


def compared(
    validated: Validated, features: str, spec: FeatureSpec, samples: Sequence[Sample], device: str
) -> Unlikeness:
    """The deviation of each of these images, one at least, from the others. `features`: key of the spec's features."""
    layer = _layer(Store(validated.category.store), features, spec)
    one_layer = FeatureSpec(spec.backbone, (layer,), spec.image_size, spec.weights)  # no other is read
    ids = [sample.id for sample in samples]
    source = StoredSource(validated, ids, spec=one_layer, features=features, images=False)
    # Without a part named, an image is one; copies of a content, which a policy may let pass, are one as well.
    parts = [sample.part or sample.id for sample in samples]
    return unlikeness(source, layer, parts, device=device_of(device), progress=Progress(f"suspect {validated.name}"))


def _without_suspects(store: Store, validated: Validated, suspects: str, policy: Policy) -> Validated:
    key = step_key(
        "verdicts",
        validated.category.dataset,
        validated.category.category,
        verdict=validated.verdict,
        suspects=suspects,
        policy=policy.model_dump(),
        code=code_fingerprint(__name__),
    )
    verdict = run_step(store, key, partial(_set_aside, store, validated, suspects, policy)).meta
    if verdict["stop"] is not None:
        raise CategoryStopped(f"{validated.name}: {verdict['stop']}")
    return Validated(validated.prepared, key, verdict["fingerprint"], suspects)


def _set_aside(store: Store, validated: Validated, suspects: str, policy: Policy, draft: Draft) -> dict[str, Any]:
    """The verdict that was, with the suspects rejected."""
    folder = store.get(suspects).folder
    table = read_table(store, f"{folder}/suspects.parquet")
    reasons = {row.key: _reason(row, policy) for row in table[table["suspected"]].itertuples()}
    meta = without(store, validated, RULE, reasons, policy, draft)
    expectations = [*meta["expectations"], _summary(len(reasons), policy)]
    return meta | {"rejected": meta["rejected"] + len(reasons), "expectations": expectations}


def without(
    store: Store, validated: Validated, rule: str, reasons: Mapping[str, str], policy: Policy, draft: Draft
) -> dict[str, Any]:
    """The verdict that was, without some good images that are not of the test, for a reason each (by their keys):
    its files in the draft, and its manifest, which does not count them among the rejected yet."""
    samples, before = accepted_samples(validated), store.get(validated.verdict).meta
    kept = [sample for sample in samples if sample.key not in reasons]
    rows = [_finding(sample, rule, reasons[sample.key]) for sample in samples if sample.key in reasons]
    stop = _too_few(kept, samples, rule, policy)
    if stop is not None:
        rows.append(dict.fromkeys(FINDINGS, "") | {"severity": "stop", "rule": rule, "reason": stop})

    known = findings(store, validated.verdict)
    known = known[~known["key"].isin(reasons)]  # what else is unusual about an image that is set aside is no news
    together = pd.concat([known, pd.DataFrame(rows, columns=list(FINDINGS), dtype="string")], ignore_index=True)
    store.write_bytes(f"{draft.folder}/samples.parquet", to_parquet(kept))
    write_table(store, f"{draft.folder}/findings.parquet", together)
    return before | {
        "fingerprint": fingerprint(kept),
        "counts": before["counts"] | _accepted(before["counts"], samples, reasons),
        "accepted": len(kept),
        "warned": together.loc[(together["severity"] == "warn") & (together["key"] != ""), "key"].nunique(),
        "stop": stop,
        "policy": policy.model_dump(),
    }


def _accepted(
    counts: Mapping[str, Mapping[str, int]], samples: Sequence[Sample], reasons: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """The verdict's counts of the splits that images are taken from, with how many are accepted without them."""
    gone = Counter(sample.split for sample in samples if sample.key in reasons)
    return {split: {**counts[split], "accepted": counts[split]["accepted"] - n} for split, n in gone.items()}


def _reason(row: Any, policy: Policy) -> str:
    return (
        f"{row.deviations:.1f} robust deviations more unlike the other training images than usual, where up to "
        f"{policy.suspect_deviations:g} were expected, most of all at {row.x:.0%} of its width and {row.y:.0%} of its "
        f"height; look there, and set the rule {RULE} to `warn` if images like it are good"
    )


def _finding(sample: Sample, rule: str, reason: str) -> dict[str, str]:
    told = {"severity": "reject", "rule": rule, "reason": reason}
    return {name: str(getattr(sample, name)) for name in FINDINGS if name not in told} | told


def _too_few(kept: Sequence[Sample], samples: Sequence[Sample], rule: str, policy: Policy) -> str | None:
    left, were = (sum(sample.split == "train" for sample in some) for some in (kept, samples))
    if left >= policy.min_training_images:
        return None
    fix = (
        f"look at the suspects, and raise `suspect_deviations` or set the rule {RULE} to `warn` if they are good"
        if rule == RULE
        else "look at those that are held, and release what is good (`al nights`)"
    )
    return (
        f"{left} of {were} training images are left without those suspected of a defect, at least "
        f"{policy.min_training_images} are needed; {fix}"
    )


def _summary(unexpected: int, policy: Policy) -> dict[str, Any]:
    return {
        "name": RULE,
        "description": f"training images are at most {policy.suspect_deviations:g} robust deviations more unlike the "
        "others than usual, judged by their features",
        "severity": policy.severity(RULE),
        "success": unexpected == 0,
        "unexpected": unexpected,
    }
