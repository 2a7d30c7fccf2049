"""Compute a FeatureSpec once for a category; every method, seed and night that asks for it reads the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import zarr
from prefect import task
from prefect.cache_policies import NO_CACHE

from al_models.detector import FLOAT16_MAX
from al_models.errors import InvalidInput
from al_models.parts.weights import weights_fingerprint
from al_models.types import FeatureSpec
from storage.store import Draft, Store
from tasks.compute import device_of
from tasks.handles import Validated
from tasks.limits import in_memory
from tasks.parts import Part, joined
from tasks.progress import Progress
from tasks.steps import GPU, code_fingerprint, retry_passing, run_step, step_key
from tasks.stored import StoredSource, accepted_samples

CHUNK = 16
SHARD = 64
"""Images written at once, so that parallel or cut writers never share a shard."""


@task(
    name="extract",
    task_run_name="extract {spec.backbone} {validated.name}",
    tags=[GPU],
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=retry_passing,
)
def extract(validated: Validated, spec: FeatureSpec, device: str = "auto", parts: Sequence[str] = ()) -> str:
    """Key of the features: a Zarr array float16 `layer<i>` (n, c, h, w) for each of `spec.keys`, a row an accepted
    image. `parts`: keys of what `extract_part` has computed of it."""
    store, key = Store(validated.category.store), _key(validated, spec)
    work = partial(_join, store, spec, parts) if parts else partial(_extract, store, validated, spec, device, None)
    run_step(store, key, work)
    return key


@task(
    name="extract part",
    task_run_name="extract {spec.backbone} {validated.name} images {part}",
    tags=[GPU],
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=retry_passing,
)
def extract_part(validated: Validated, spec: FeatureSpec, device: str, part: Part) -> str:
    """Key of the features of this part's images; none are computed where those of all are there already."""
    store = Store(validated.category.store)
    if store.find(_key(validated, spec)) is not None:
        return ""
    key = _key(validated, spec, part=asdict(part))
    run_step(store, key, partial(_extract, store, validated, spec, device, part))
    return key


def _key(validated: Validated, spec: FeatureSpec, **of_part: dict[str, int]) -> str:
    return step_key(
        "features",
        validated.category.dataset,
        validated.category.category,
        data=validated.fingerprint,
        images=validated.prepared.images,
        spec=asdict(spec) | {"weights": weights_fingerprint(spec)},
        code=code_fingerprint("tasks.extract"),
        **of_part,
    )


def _join(store: Store, spec: FeatureSpec, parts: Sequence[str], draft: Draft) -> dict[str, Any]:
    whole, first = joined(store, parts), store.get(parts[0]).meta  # the first part is never empty
    shapes = {layer: [len(whole["ids"]), *shape[1:]] for layer, shape in first["shapes"].items()}
    return whole | {"shapes": shapes, "spec": asdict(spec), "device": first["device"]}


def _extract(
    store: Store, validated: Validated, spec: FeatureSpec, device: str, part: Part | None, draft: Draft
) -> dict[str, Any]:
    from al_models.parts.backbone import cached_backbone  # timm takes seconds to import; a reused output needs none

    backbone = cached_backbone(spec, device_of(device))
    ids = [sample.id for sample in accepted_samples(validated)]
    ids = ids if part is None else list(part.of(ids))
    arrays: dict[int, zarr.Array[Any]] = {}

    def write_features(batch_size: int) -> None:
        source = StoredSource(validated, ids, spec=None, features=None, images=True, batch_size=batch_size)
        _write_all(store, draft, backbone, source, arrays, Progress(f"extract {validated.name}"))

    in_memory(write_features, CHUNK)
    shapes = {str(layer): list(array.shape) for layer, array in arrays.items()}
    return {"ids": ids, "shapes": shapes, "spec": asdict(spec), "device": str(backbone.device)}


def _write_all(
    store: Store,
    draft: Draft,
    backbone: Any,
    source: StoredSource,
    arrays: dict[int, zarr.Array[Any]],
    progress: Progress,
) -> None:
    """Fill the arrays, which are made when the first features show their shapes; the next shard is computed while one
    is written."""
    with ThreadPoolExecutor(1) as writer:  # compressing and writing release the interpreter's lock
        writing: list[Future[None]] = []
        for start, layers in _shards(backbone, source):
            for layer, values in layers.items():
                if layer not in arrays:
                    shape = (len(source), *values.shape[1:])
                    key = f"{draft.folder}/layer{layer}"
                    arrays[layer] = store.create_array(key, shape, "float16", chunk=CHUNK, shard=SHARD)
            for done in writing:
                done.result()  # one shard in flight: memory stays bounded, and a failed write is heard of
            writing = [writer.submit(_write, arrays[layer], start, values) for layer, values in layers.items()]
            progress("", min(start + SHARD, len(source)), len(source))
        for done in writing:
            done.result()


def _shards(backbone: Any, source: StoredSource) -> Iterator[tuple[int, dict[int, np.ndarray]]]:
    """(first row, layer -> float16 (m, c, h, w)) for each shard of images."""
    parts: dict[int, list[np.ndarray]] = {}
    start = done = 0
    for batch in source:
        for layer, values in backbone(batch.images).items():
            half = values.half().cpu().numpy()
            if not np.isfinite(half).all():
                raise InvalidInput(
                    f"layer {layer} of {backbone.spec.backbone} has values beyond ±{FLOAT16_MAX:.0f} or not finite, "
                    "which half precision cannot hold; choose another layer or backbone"
                )
            parts.setdefault(layer, []).append(half)
        done += len(batch)
        if done - start == SHARD or done == len(source):
            yield start, {layer: np.concatenate(values) for layer, values in parts.items()}
            parts, start = {}, done


def _write(array: zarr.Array[Any], start: int, values: np.ndarray) -> None:
    array[start : start + len(values)] = values
