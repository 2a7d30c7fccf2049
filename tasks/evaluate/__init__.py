"""Open the masks for the first time: metrics at their own resolution, what the threshold did, and the run record."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

from al_models.calibration import p_values
from al_models.metrics import PixelCounts, aupimo, image_metrics
from al_models.parts.frame import RIM
from storage.records import RunRecord, read_record, write_record
from storage.samples import Sample
from storage.store import Artifact, Draft, Store
from storage.tables import write_table
from tasks.core.compute import detector_of
from tasks.core.handles import Cell, Validated
from tasks.core.parts import joined
from tasks.core.steps import code_fingerprint, run_step, step, step_key
from tasks.core.stored import accepted_samples, files_left_out
from tasks.evaluate.count import counted_parts, promised_alarms
from tasks.evaluate.pixels import CountedPixels, boundaries_at, count_pixels
from tasks.evaluate.thresholds import Scored, alarms_of, asked_rates, kept_promises
from tasks.evaluate.truth import Truths
from tasks.evaluate.uncertainty import intervals_of, replicates_of, write_replicates
from tasks.fit import method_code
from tasks.predict import read_scores

_ENOUGH_PEAKS = 10
"""Held-out good images from which on it is told where they score highest."""
_LIBRARIES = ("torch", "timm", "numpy", "scikit-learn", "faiss-cpu", "zarr", "prefect", "great-expectations")


@step("evaluate", "evaluate {cell.method} {cell.dataset}/{cell.category} seed {cell.seed}")
def evaluate(
    cell: Cell,
    validated: Validated,
    features: str | None,
    model: str,
    calibration: str,
    maps: str,
    parts: Sequence[str] = (),
) -> RunRecord:
    """The cell's record, written to the store. Beside it, for the report: `images.parquet`, `masks`, `curves.json`,
    `groups.json` and `replicates.parquet`. `parts`: keys of what `count_part` has counted of it."""
    evaluation = judge(cell, validated, calibration, maps, parts)
    keys = {"catalogue": validated.category.catalogue, "images": validated.prepared.images}
    keys |= {"verdict": validated.verdict, "model": model}
    keys |= {"suspects": validated.suspects} if validated.suspects else {}
    keys |= {"calibration": calibration, "maps": maps, "evaluation": evaluation.key}
    keys |= {"features": features} if features else {}
    store = Store(validated.category.store)
    record = _record(store, cell, validated, keys, evaluation)
    if read_record(store, record.key()) != record:
        write_record(store, record)
    return record


def judge(cell: Cell, validated: Validated, calibration: str, maps: str, parts: Sequence[str] = ()) -> Artifact:
    """The stored evaluation that `evaluate` makes a record of."""
    store = Store(validated.category.store)
    key = step_key(
        "evaluations",
        cell.dataset,
        cell.category,
        catalogue=validated.category.catalogue,  # may say how defects saturate, and what was set aside
        verdict=validated.verdict,
        maps=maps,
        calibration=calibration,
        rate=cell.false_reject_rate,
        code=judging_code(),
    )
    return run_step(store, key, partial(_evaluate, store, cell, validated, calibration, maps, parts))


def judging_code() -> str:
    """Name of the code that judges maps."""
    return code_fingerprint(__name__)


def _evaluate(
    store: Store,
    cell: Cell,
    validated: Validated,
    calibration: str,
    maps: str,
    parts: Sequence[str],
    draft: Draft,
) -> dict[str, Any]:
    samples = [sample for sample in accepted_samples(validated) if sample.split == "test"]
    held_out, predicted = store.get(calibration).meta, store.get(maps)
    scores = _scores(store, predicted, samples)
    truths = Truths(store, validated)
    if parts:
        counted, of_parts = counted_parts(store, parts), joined(store, parts)
    else:
        counted, of_parts = count_pixels(store, truths, predicted, samples, promised_alarms(cell), draft), {}

    labels = np.array([sample.label == "anomalous" for sample in samples], dtype=bool)
    judged = np.array([sample.is_labelled for sample in samples], dtype=bool)
    test = Scored(scores[judged], counted.maxima[judged], labels[judged])
    promises = kept_promises(held_out, test, asked_rates(cell.false_reject_rate))
    decides = next(promise for promise in promises if promise["rate"] == cell.false_reject_rate)
    pixel_threshold = decides["pixel"]["value"]

    cuts = {
        "boundary_f": counted.counts.best_thresholds().get("pixel_f1_max"),
        "boundary_f_at_threshold": pixel_threshold,
    }
    boundaries = boundaries_at(
        {metric: cut for metric, cut in cuts.items() if cut is not None}, store, truths, predicted, samples
    )
    pimo = aupimo(counted.images)
    per_image = {"aupimo": pimo.per_image, **boundaries}
    resampled = replicates_of(counted, samples, scores, per_image, pixel_threshold)
    metrics = image_metrics(test.scores, test.labels) | counted.counts.metrics()
    metrics |= {} if pixel_threshold is None else counted.counts.at_threshold(pixel_threshold)
    metrics |= {metric: float(np.mean(list(values.values()))) for metric, values in per_image.items() if values}

    table = _image_table(samples, scores, np.asarray(held_out["scores"]), decides["image"]["value"], counted, per_image)
    write_table(store, f"{draft.folder}/images.parquet", table)
    store.write_json(f"{draft.folder}/curves.json", _curves(counted.counts, test.scores, test.labels))
    store.write_json(f"{draft.folder}/groups.json", _groups(counted.counts, samples, scores))
    write_replicates(store, draft, resampled)
    return {
        **of_parts,
        "ids": [sample.id for sample in samples],
        "metrics": metrics,
        "intervals": intervals_of(resampled, {} if pimo.reason is None else {"aupimo": pimo.reason}),
        "calibration": {
            **_deciding(decides),
            "rates": promises,
            "false_alarms": alarms_of(counted.alarms),
            "at_rim": _at_rim(held_out),
        },
        "counts": _counts(validated, samples, len(held_out["ids"])),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _deciding(promise: dict[str, Any]) -> dict[str, Any]:
    """The thresholds that decide, and what the one of images did."""
    did = {name: value for name, value in promise["image"].items() if name.startswith(("false_reject_", "miss_"))}
    return {"image": promise["image"], "pixel": promise["pixel"], "realised": did}


def _at_rim(held_out: Mapping[str, Any]) -> dict[str, float]:
    """The number of held-out good images whose highest value lies at the rim, the number of all, and the rim's share of
    the area."""
    peaks = held_out.get("at_rim", [])
    return {"peaks": sum(peaks), "images": len(peaks), "area": 1 - (1 - 2 * RIM) ** 2}


def _doubt_of_rim(at_rim: Mapping[str, float]) -> list[str]:
    """A sentence, where more than twice as many good images as the area lets expect score highest at the rim."""
    peaks, images, area = at_rim["peaks"], at_rim["images"], at_rim["area"]
    if images < _ENOUGH_PEAKS or peaks <= 2 * area * images:
        return []
    return [
        f"good images score highest at the rim: {peaks} of {images} held-out ones within a sixteenth of the side from "
        f"it, which is {area:.0%} of the area, so that image scores tell of the rim and not of the part; give the "
        "method a frame (frame = 0.125) where it has that parameter, or take another method"
    ]


def _scores(store: Store, predicted: Artifact, samples: list[Sample]) -> np.ndarray:
    table = read_scores(store, predicted).set_index("id")
    return table["score"].reindex([sample.id for sample in samples]).to_numpy(dtype=np.float64)


def _image_table(
    samples: list[Sample],
    scores: np.ndarray,
    held_out: np.ndarray,
    threshold: float | None,
    counted: CountedPixels,
    per_image: Mapping[str, Mapping[str, float]],
) -> pd.DataFrame:
    """A row an image, in the order of the maps; what is not known of an image is missing."""
    rows = counted.counts.images
    return pd.DataFrame(
        {
            "id": [sample.id for sample in samples],
            "path": [sample.key for sample in samples],  # the tiles of a file are told apart
            "label": [sample.label for sample in samples],
            "defect_type": [sample.defect_type for sample in samples],
            "score": scores,
            "p_value": p_values(held_out, scores),
            "decision": ["none" if threshold is None else "reject" if s > threshold else "accept" for s in scores],
            "map_max": counted.maxima,
            "average_precision": _numbers(rows[s.id].average_precision if s.id in rows else None for s in samples),
            "iou_best": _numbers(rows[s.id].iou_max if s.id in rows else None for s in samples),
            **{metric: _numbers(values.get(s.id) for s in samples) for metric, values in per_image.items()},
        }
    )


def _numbers(values: Iterable[float | None]) -> pd.Series[float]:
    return pd.Series(list(values), dtype="Float64")


def _groups(counts: PixelCounts, samples: list[Sample], scores: np.ndarray) -> dict[str, Any]:
    """Metrics by defect type and by size of the defect, each against all good images and all normal pixels."""
    kinds = np.array([sample.defect_type for sample in samples], dtype=object)
    labels = np.array([sample.label for sample in samples], dtype=object)
    by_type: dict[str, dict[str, float]] = {}
    for kind in sorted(set(kinds[labels == "anomalous"])):
        chosen = (labels == "good") | ((labels == "anomalous") & (kinds == kind))
        by_type[kind] = {"images": int((kinds[labels == "anomalous"] == kind).sum())}
        by_type[kind] |= image_metrics(scores[chosen], labels[chosen] == "anomalous")
    for kind, figures in counts.metrics_by_type().items():
        by_type.setdefault(kind, {}).update(figures)
    return {"defect_type": by_type, "size": counts.metrics_by_size()}


def _curves(counts: PixelCounts, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    named = {"roc": "pixel_roc", "pr": "pixel_pr", "pro": "pro"}
    curves = {named[name]: {"x": x, "y": y} for name, (x, y) in counts.curves().items()}
    if 0 < labels.sum() < len(labels):
        order = np.argsort(-scores, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # ties move together
        true, false = np.cumsum(labels[order])[ends], np.cumsum(~labels[order])[ends]
        curves["image_roc"] = {
            "x": [0.0, *(false / false[-1]).tolist()],
            "y": [0.0, *(true / true[-1]).tolist()],
        }
    return curves


def _counts(validated: Validated, samples: list[Sample], calibration: int) -> dict[str, int]:
    """Numbers of images, without those that were learned from, which the model tells."""
    store = Store(validated.category.store)
    test = Counter(f"test_{sample.label}" for sample in samples)
    verdict = store.get(validated.verdict).meta
    return {
        "calibration": calibration,
        **{name: test[name] for name in ("test_good", "test_anomalous", "test_unknown")},
        "set_aside": verdict["rejected"] + files_left_out(store.get(validated.category.catalogue).meta),
        "without_mask": sum(sample.label == "anomalous" and sample.mask is None for sample in samples),
    }


def _record(store: Store, cell: Cell, validated: Validated, keys: dict[str, str], evaluation: Artifact) -> RunRecord:
    steps = {"ingest": validated.category.catalogue, "prepare": keys["images"], "validate": keys["verdict"]}
    steps |= {"extract": keys["features"]} if "features" in keys else {}
    steps |= {"fit": keys["model"], "calibrate": keys["calibration"], "predict": keys["maps"]}
    metas = {step: store.get(key).meta for step, key in steps.items()} | {"evaluate": evaluation.meta}
    detector, model = detector_of(cell), metas["fit"]
    return RunRecord(
        dataset=cell.dataset,
        category=cell.category,
        method=cell.method,
        params=detector.params(),
        seed=cell.seed,
        cell=cell.id,
        status="done",
        root=validated.category.root,
        metrics=evaluation.meta["metrics"],
        intervals=evaluation.meta["intervals"],
        calibration=evaluation.meta["calibration"],
        counts={"train": len(model["fitted_on"]), **evaluation.meta["counts"]},
        seconds={step: meta["seconds"] for step, meta in metas.items()},
        peak_memory_mb=max(meta["peak_memory_mb"] for meta in metas.values()),
        facts=model.get("facts", {}),
        losses=model.get("losses", []),
        turns=model.get("turns", []),
        updated_from=model.get("updated_from"),
        warnings=[*model.get("warnings", []), *_doubt_of_rim(evaluation.meta["calibration"]["at_rim"])],
        fingerprints={
            "data": validated.fingerprint,
            "code": method_code(__name__, detector),
            **{step: key.rsplit("/", 1)[-1] for step, key in keys.items()},
        },
        keys=keys,
        versions=versions(),
        hardware=model.get("hardware", ""),
        finished=evaluation.meta["finished"],
    )


@cache
def versions() -> dict[str, str]:
    """Versions of Python and the libraries that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}
