"""Suspect defects among the training images: those whose features are too unlike the features of all others."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE

from al_models.parts.contamination import FEWEST, layer_to_compare, unlikeness
from al_models.types import FeatureSpec
from storage.samples import Sample, fingerprint, to_parquet
from storage.store import Draft, Store
from tasks.compute import device_of
from tasks.handles import Validated
from tasks.policy import DEFAULT_POLICY, Policy
from tasks.progress import Progress
from tasks.steps import GPU, code_fingerprint, retry_passing, run_step, step_key
from tasks.stored import StoredSource, accepted_samples
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
"""Of `suspects.parquet`."""


@task(
    name="suspect",
    task_run_name="suspect {validated.name}",
    tags=[GPU],
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=retry_passing,
)
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
    found = run_step(store, key, partial(_suspect, store, validated, features, spec, policy, device)).meta
    if policy.severity(RULE) != "reject" or not found["suspected"]:
        return replace(validated, suspects=key)
    return _without_suspects(store, validated, key, policy)


def _suspect(
    store: Store, validated: Validated, features: str, spec: FeatureSpec, policy: Policy, device: str, draft: Draft
) -> dict[str, Any]:
    severity = policy.severity(RULE)
    samples = [sample for sample in accepted_samples(validated) if sample.split == "train" and severity != "off"]
    layer = layer_to_compare({int(i): s for i, s in store.get(features).meta["shapes"].items()}, spec.image_size)
    table = _compared(validated, features, spec, layer, samples, policy, device)
    suspected = int(table["suspected"].sum())
    store.write_bytes(f"{draft.folder}/suspects.parquet", _parquet(table))
    logger.info("%s: %d of %d training images suspected", validated.name, suspected, len(samples))
    return {
        "suspected": suspected,
        "compared": len(samples),
        "needed": FEWEST,
        "severity": severity,
        "limit": policy.suspect_deviations,
        "layer": layer,
    }


def _compared(
    validated: Validated,
    features: str,
    spec: FeatureSpec,
    layer: int,
    samples: Sequence[Sample],
    policy: Policy,
    device: str,
) -> pd.DataFrame:
    if not samples:
        return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    one_layer = FeatureSpec(spec.backbone, (layer,), spec.image_size, spec.weights)  # no other is read
    ids = [sample.id for sample in samples]
    source = StoredSource(validated, ids, spec=one_layer, features=features, images=False)
    # Without a part named, an image is one; copies of a content, which a policy may let pass, are one as well.
    parts = [sample.part or sample.id for sample in samples]
    progress = Progress(f"suspect {validated.name}")
    found = unlikeness(source, layer, parts, device=device_of(device), progress=progress)
    columns = {
        "id": ids,
        "key": [sample.key for sample in samples],
        "score": found.scores,
        "deviations": found.deviations,
        "suspected": found.deviations > policy.suspect_deviations,
        "x": found.places[:, 0],
        "y": found.places[:, 1],
    }
    return pd.DataFrame(columns).astype(COLUMNS)


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
    table = pd.read_parquet(io.BytesIO(store.read_bytes(f"{folder}/suspects.parquet")))
    reasons = {row.key: _reason(row, policy) for row in table[table["suspected"]].itertuples()}
    samples, before = accepted_samples(validated), store.get(validated.verdict).meta
    kept = [sample for sample in samples if sample.key not in reasons]
    rows = [_finding(sample, reasons[sample.key]) for sample in samples if sample.key in reasons]
    stop = _too_few(kept, samples, policy)
    if stop is not None:
        rows.append(dict.fromkeys(FINDINGS, "") | {"severity": "stop", "rule": RULE, "reason": stop})

    known = findings(store, validated.verdict)
    known = known[~known["key"].isin(reasons)]  # what else is unusual about an image that is set aside is no news
    together = pd.concat([known, pd.DataFrame(rows, columns=list(FINDINGS), dtype="string")], ignore_index=True)
    store.write_bytes(f"{draft.folder}/samples.parquet", to_parquet(kept))
    store.write_bytes(f"{draft.folder}/findings.parquet", _parquet(together))
    training = before["counts"]["train"]
    return before | {
        "fingerprint": fingerprint(kept),
        "counts": before["counts"] | {"train": training | {"accepted": training["accepted"] - len(reasons)}},
        "accepted": len(kept),
        "rejected": before["rejected"] + len(reasons),
        "warned": together.loc[(together["severity"] == "warn") & (together["key"] != ""), "key"].nunique(),
        "stop": stop,
        "expectations": [*before["expectations"], _summary(len(reasons), policy)],
        "policy": policy.model_dump(),
    }


def _reason(row: Any, policy: Policy) -> str:
    return (
        f"{row.deviations:.1f} robust deviations more unlike the other training images than usual, where up to "
        f"{policy.suspect_deviations:g} were expected, most of all at {row.x:.0%} of its width and {row.y:.0%} of its "
        f"height; look there, and set the rule {RULE} to `warn` if images like it are good"
    )


def _finding(sample: Sample, reason: str) -> dict[str, str]:
    told = {"severity": "reject", "rule": RULE, "reason": reason}
    return {name: str(getattr(sample, name)) for name in FINDINGS if name not in told} | told


def _too_few(kept: Sequence[Sample], samples: Sequence[Sample], policy: Policy) -> str | None:
    left, were = (sum(sample.split == "train" for sample in some) for some in (kept, samples))
    if left >= policy.min_training_images:
        return None
    return (
        f"{left} of {were} training images are left without those suspected of a defect, at least "
        f"{policy.min_training_images} are needed; look at the suspects, and raise `suspect_deviations` or set the "
        f"rule {RULE} to `warn` if they are good"
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


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
