"""Open the masks for the first time: metrics at their own resolution, what the threshold did, and the run record."""

from __future__ import annotations

import io
import platform
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from prefect import task
from prefect.cache_policies import NO_CACHE
from zarr.codecs import ZstdCodec

from al_models.calibration import conformal_threshold, p_values, realised
from al_models.metrics import PixelCounts, image_metrics
from al_models.parts.images import resize
from storage.masks import read_mask
from storage.records import RunRecord, read_record, write_record
from storage.samples import Sample
from storage.store import Artifact, Draft, Store
from tasks.compute import detector_of
from tasks.fit import method_code
from tasks.handles import Cell, Validated
from tasks.steps import code_fingerprint, retry_passing, run_step, step_key
from tasks.stored import accepted_samples

_MARKED = 64
"""A pixel of a shrunken mask is marked from this share (of 255) on, so that thin defects stay visible."""
_LIBRARIES = ("torch", "timm", "numpy", "scikit-learn", "faiss-cpu", "zarr", "prefect", "great-expectations")


@task(
    name="evaluate",
    task_run_name="evaluate {cell.method} {cell.dataset}/{cell.category} seed {cell.seed}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=retry_passing,
)
def evaluate(
    cell: Cell, validated: Validated, features: str | None, model: str, calibration: str, maps: str
) -> RunRecord:
    """The cell's record, written to the store. Beside it, for the report: `images.parquet`, `masks`, `curves.json` and
    `groups.json`."""
    store = Store(validated.category.store)
    key = step_key(
        "evaluations",
        cell.dataset,
        cell.category,
        maps=maps,
        calibration=calibration,
        rate=cell.false_reject_rate,
        code=code_fingerprint("tasks.evaluate"),
    )
    found = run_step(store, key, partial(_evaluate, store, cell, validated, calibration, maps))
    keys = {"catalogue": validated.category.catalogue, "images": validated.prepared.images}
    keys |= {"verdict": validated.verdict, "model": model}
    keys |= {"suspects": validated.suspects} if validated.suspects else {}
    keys |= {"calibration": calibration, "maps": maps, "evaluation": key} | ({"features": features} if features else {})
    record = _record(store, cell, validated, keys, found)
    if read_record(store, record.key()) != record:
        write_record(store, record)
    return record


def _evaluate(
    store: Store, cell: Cell, validated: Validated, calibration: str, maps: str, draft: Draft
) -> dict[str, Any]:
    samples = [sample for sample in accepted_samples(validated) if sample.split == "test"]
    held_out = store.get(calibration).meta
    by_score = conformal_threshold(np.asarray(held_out["scores"]), cell.false_reject_rate)
    by_pixel = conformal_threshold(np.asarray(held_out["map_maxima"]), cell.false_reject_rate)
    predicted = store.get(maps)
    scores = _scores(store, predicted, samples)

    judged = np.array([sample.label != "unknown" for sample in samples], dtype=bool)
    labels = np.array([sample.label == "anomalous" for sample in samples], dtype=bool)
    counts, maxima = _count_pixels(store, validated, predicted, samples, draft)
    metrics = image_metrics(scores[judged], labels[judged]) | counts.metrics()
    if by_pixel.value is not None and "iou_max" in metrics:
        metrics["iou_at_threshold"] = counts.at_threshold(by_pixel.value)["iou_at_threshold"]

    table = _image_table(samples, scores, maxima, np.asarray(held_out["scores"]), by_score.value, counts)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    store.write_bytes(f"{draft.folder}/images.parquet", buffer.getvalue())
    store.write_json(f"{draft.folder}/curves.json", _curves(counts, scores[judged], labels[judged]))
    store.write_json(f"{draft.folder}/groups.json", _groups(counts, samples, scores))
    did = realised(scores[judged], labels[judged], by_score)
    return {
        "ids": [sample.id for sample in samples],
        "metrics": metrics,
        "calibration": {
            "image": {**asdict(by_score), "note": by_score.shortfall},
            "pixel": {**asdict(by_pixel), "note": by_pixel.shortfall},
            "realised": _intervals(did),
        },
        "counts": _counts(validated, samples, len(held_out["ids"])),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _scores(store: Store, predicted: Artifact, samples: list[Sample]) -> np.ndarray:
    table = pd.read_parquet(io.BytesIO(store.read_bytes(f"{predicted.folder}/scores.parquet"))).set_index("id")
    return table["score"].reindex([sample.id for sample in samples]).to_numpy(dtype=np.float64)


def _count_pixels(
    store: Store, validated: Validated, predicted: Artifact, samples: list[Sample], draft: Draft
) -> tuple[PixelCounts, np.ndarray]:
    """Counts over all test images whose truth is known, each at its own size; and the largest value of each map."""
    counts, maxima = PixelCounts(), np.zeros(len(samples))
    if not samples:
        return counts, maxima
    maps = zarr.open_array(store.zarr_store(f"{predicted.folder}/maps"), mode="r")
    masks = np.zeros(maps.shape, dtype=np.uint8)  # (n, h, w)
    sizes = _native_sizes(store, validated)
    folders = store.get(validated.category.catalogue).meta["folders"]
    step = maps.chunks[0]
    for start in range(0, len(samples), step):
        block = np.asarray(maps[start : start + step], dtype=np.float32)  # (m, h, w)
        for row, (sample, scored) in enumerate(zip(samples[start : start + step], block, strict=True), start):
            maxima[row] = scored.max()
            mask = _mask(validated, sample, folders)
            if mask is not None:
                masks[row] = resize(mask.astype(np.uint8) * 255, maps.shape[1]) >= _MARKED
                counts.add(sample.id, scored, mask, defect_type=sample.defect_type)
            elif sample.label == "good":
                counts.add(sample.id, scored, None, shape=sizes[sample.id])
    zarr.create_array(
        store=store.zarr_store(f"{draft.folder}/masks"),
        data=masks,
        chunks=(step, *masks.shape[1:]),
        compressors=ZstdCodec(level=1),
    )
    return counts, maxima


def _mask(validated: Validated, sample: Sample, folders: list[str]) -> np.ndarray | None:
    if sample.mask is None:
        return None
    return read_mask(Path(validated.category.root), sample, folders)


def _native_sizes(store: Store, validated: Validated) -> dict[str, tuple[int, int]]:
    """Image id -> (height, width) of the file."""
    folder = store.get(validated.prepared.images).folder
    facts = pd.read_parquet(
        io.BytesIO(store.read_bytes(f"{folder}/facts.parquet")), columns=["id", "height", "width", "readable"]
    )
    facts = facts[facts["readable"]]
    return {row.id: (int(row.height), int(row.width)) for row in facts.itertuples()}


def _image_table(
    samples: list[Sample],
    scores: np.ndarray,
    maxima: np.ndarray,
    held_out: np.ndarray,
    threshold: float | None,
    counts: PixelCounts,
) -> pd.DataFrame:
    rows = counts.images
    return pd.DataFrame(
        {
            "id": [sample.id for sample in samples],
            "path": [sample.key for sample in samples],  # the tiles of a file are told apart
            "label": [sample.label for sample in samples],
            "defect_type": [sample.defect_type for sample in samples],
            "score": scores,
            "p_value": p_values(held_out, scores),
            "decision": ["none" if threshold is None else "reject" if s > threshold else "accept" for s in scores],
            "map_max": maxima,
            "average_precision": [rows[s.id].average_precision if s.id in rows else None for s in samples],
            "iou_best": [rows[s.id].iou_max if s.id in rows else None for s in samples],
        }
    ).astype({"average_precision": "Float64", "iou_best": "Float64"})


def _groups(counts: PixelCounts, samples: list[Sample], scores: np.ndarray) -> dict[str, Any]:
    """Metrics by defect type and by size of the defect, each against all good images and all normal pixels."""
    kinds = np.array([sample.defect_type for sample in samples], dtype=object)
    labels = np.array([sample.label for sample in samples], dtype=object)
    by_type: dict[str, dict[str, float]] = {}
    for kind in sorted(set(kinds[labels == "anomalous"])):
        chosen = (labels == "good") | ((labels == "anomalous") & (kinds == kind))
        by_type[kind] = {"images": int((kinds[labels == "anomalous"] == kind).sum())}
        by_type[kind] |= image_metrics(scores[chosen], labels[chosen] == "anomalous")
    for kind, found in counts.metrics_by_type().items():
        by_type.setdefault(kind, {}).update(found)
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


def _intervals(did: dict[str, float]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("false_reject", "miss"):
        if f"{name}_rate" in did:
            found[f"{name}_rate"] = did[f"{name}_rate"]
            found[f"{name}_interval"] = [did[f"{name}_low"], did[f"{name}_high"]]
    return found


def _counts(validated: Validated, samples: list[Sample], calibration: int) -> dict[str, int]:
    store = Store(validated.category.store)
    everything = accepted_samples(validated)
    test = Counter(f"test_{sample.label}" for sample in samples)
    verdict = store.get(validated.verdict).meta
    own = any(sample.split == "validation" for sample in everything)
    train = sum(sample.split == "train" for sample in everything)
    return {
        "train": train if own else train - calibration,
        "calibration": calibration,
        **{name: test[name] for name in ("test_good", "test_anomalous", "test_unknown")},
        "set_aside": verdict["rejected"] + len(store.get(validated.category.catalogue).meta["set_aside"]),
        "without_mask": sum(sample.label == "anomalous" and sample.mask is None for sample in samples),
    }


def _record(store: Store, cell: Cell, validated: Validated, keys: dict[str, str], found: Artifact) -> RunRecord:
    steps = {"ingest": validated.category.catalogue, "prepare": keys["images"], "validate": keys["verdict"]}
    steps |= {"extract": keys["features"]} if "features" in keys else {}
    steps |= {"fit": keys["model"], "calibrate": keys["calibration"], "predict": keys["maps"]}
    metas = {step: store.get(key).meta for step, key in steps.items()} | {"evaluate": found.meta}
    detector = detector_of(cell)
    return RunRecord(
        dataset=cell.dataset,
        category=cell.category,
        method=cell.method,
        params=detector.params(),
        seed=cell.seed,
        cell=cell.id,
        status="done",
        metrics=found.meta["metrics"],
        calibration=found.meta["calibration"],
        counts=found.meta["counts"],
        seconds={step: meta["seconds"] for step, meta in metas.items()},
        peak_memory_mb=max(meta["peak_memory_mb"] for meta in metas.values()),
        fingerprints={
            "data": validated.fingerprint,
            "code": method_code("tasks.evaluate", detector),
            **{step: key.rsplit("/", 1)[-1] for step, key in keys.items()},
        },
        keys=keys,
        versions=versions(),
        hardware=hardware(),
        finished=found.meta["finished"],
    )


@cache
def versions() -> dict[str, str]:
    """Of Python and the libraries that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


@cache
def hardware() -> str:
    """Processor, cores, and GPU where there is one."""
    import os

    import torch

    names = {line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")}
    text = f"{min(names, default=platform.machine())}, {os.cpu_count()} cores"
    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
