"""Compute a FeatureSpec once for a category; every method, seed and night that asks for it reads the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import zarr

from al_models.detector import FLOAT16_MAX
from al_models.errors import InvalidInput
from al_models.parts.patches import channel_means
from al_models.parts.weights import weights_fingerprint
from al_models.types import FeatureSpec
from storage.errors import NotInStore
from storage.stacks import Stack
from storage.store import Draft, Store
from tasks.core.compute import device_of
from tasks.core.earlier import Earlier, earlier, remember
from tasks.core.handles import Validated
from tasks.core.limits import in_memory
from tasks.core.parts import Part, joined
from tasks.core.progress import Progress
from tasks.core.steps import code_fingerprint, run_step, step, step_key
from tasks.core.stored import StoredSource, accepted_samples
from tasks.prepare import pixels_series

CHUNK = 16
SHARD = 64
"""Images written at once, so that parallel or cut writers never share a shard."""
_MEANS = 1024
"""Images whose means make a chunk."""
_OVERFLOW = 65520.0
"""From here on half precision rounds to infinity."""


@step("extract", "extract {spec.backbone} {validated.name}", gpu=True)
def extract(validated: Validated, spec: FeatureSpec, device: str = "auto", parts: Sequence[str] = ()) -> str:
    """Key of the features: a Zarr array float16 `layer<i>` (n, c, h, w) for each of `spec.keys`, a row an accepted
    image, and `means`, float64 (n, c of all layers), over the positions of each.

    What an earlier output has of the images is not computed again: its rows come first and stay where they are.
    `parts`: keys of what `extract_part` has computed of it.
    """
    store, key = Store(validated.category.store), _key(validated, spec)
    work = (
        partial(_join, store, validated, spec, parts)
        if parts
        else partial(_extract, store, validated, spec, device, None)
    )
    run_step(store, key, work)
    return key


@step("extract part", "extract {spec.backbone} {validated.name} images {part}", gpu=True)
def extract_part(validated: Validated, spec: FeatureSpec, device: str, part: Part) -> str:
    """Key of the features of this part's images; none are computed where those of all are there already."""
    store = Store(validated.category.store)
    if store.find(_key(validated, spec)) is not None:
        return ""
    key = _key(validated, spec, part=asdict(part))
    run_step(store, key, partial(_extract, store, validated, spec, device, part))
    return key


def _key(validated: Validated, spec: FeatureSpec, **of_part: dict[str, int]) -> str:
    data = {"data": validated.fingerprint, "images": validated.prepared.images}
    return features_series(validated, spec, **data, **of_part)


def features_series(validated: Validated, spec: FeatureSpec, **of: Any) -> str:
    """The name of the series of outputs whose rows are equal for equal images."""
    return step_key(
        "features",
        validated.category.dataset,
        validated.category.category,
        spec=asdict(spec) | {"weights": weights_fingerprint(spec)},
        pixels=pixels_series(validated.prepared),
        code=code_fingerprint(__name__),
        **of,
    )


def _join(store: Store, validated: Validated, spec: FeatureSpec, parts: Sequence[str], draft: Draft) -> dict[str, Any]:
    whole, first = joined(store, parts), store.get(parts[0]).meta  # the first part is never empty
    shapes = {layer: [len(whole["ids"]), *shape[1:]] for layer, shape in first["shapes"].items()}
    remember(store, features_series(validated, spec), draft.key)
    return whole | {"shapes": shapes, "spec": asdict(spec), "device": first["device"], "offsets": first["offsets"]}


def _extract(
    store: Store, validated: Validated, spec: FeatureSpec, device: str, part: Part | None, draft: Draft
) -> dict[str, Any]:
    ids = [sample.id for sample in accepted_samples(validated)]
    ids = ids if part is None else list(part.of(ids))
    before = _before(store, validated, spec)
    new = [name for name in ids if before is None or name not in before.known]
    base = before.known if before is not None and part is None and before.known.stays() else None
    written = ids if base is None else new
    arrays: dict[int, zarr.Array[Any]] = {}

    def write_features(batch_size: int) -> None:
        from al_models.parts.backbone import cached_backbone  # timm takes seconds to import, and not all need it

        backbone = cached_backbone(spec, device_of(device))
        source = StoredSource(validated, new, spec=None, features=None, images=True, batch_size=batch_size)
        shards = _shards(written, _computed(backbone, source), before)
        _write_all(store, draft, len(written), shards, arrays, Progress(f"extract {validated.name}"))

    if written:
        in_memory(write_features, CHUNK)
    if part is None:
        remember(store, features_series(validated, spec), draft.key)
    kept: dict[str, Any] = {"ids": ids, "reused": len(ids) - len(new), "offsets": _offsets(spec, device, before)}
    shapes = {str(layer): list(array.shape) for layer, array in arrays.items()}
    if base is not None:
        kept |= {**base.followed_by(draft.folder, new), "reused": base.images}
        shapes = {layer: [len(kept["ids"]), *shape[1:]] for layer, shape in base.output.meta["shapes"].items()}
    return {**kept, "shapes": shapes, "spec": asdict(spec), "device": device_of(device)}


_Row = dict[int, np.ndarray]
"""Layer -> float16 (c, h, w) of an image."""


def _offsets(spec: FeatureSpec, device: str, before: _Before | None) -> dict[str, Any]:
    """Offsets of each layer, in pixels, as they were measured or from the backbone."""
    if before is not None:
        return dict(before.known.output.meta["offsets"])
    from al_models.parts.backbone import cached_backbone

    return {str(key): offset for key, offset in cached_backbone(spec, device_of(device)).offsets.items()}


class _Before:
    """Features that were computed before."""

    def __init__(self, store: Store, known: Earlier, spec: FeatureSpec) -> None:
        self.known = known
        self.stacks = {layer: Stack.open(store, known.output, f"layer{layer}") for layer in spec.keys}

    def of(self, ids: Sequence[str]) -> dict[str, _Row]:
        """Image id -> layer -> features, for those of these images that are there."""
        names = [name for name in dict.fromkeys(ids) if name in self.known]
        rows = [self.known.rows[name] for name in names]
        layers = {layer: stack.read(rows) for layer, stack in self.stacks.items()} if rows else {}
        return {name: {layer: values[i] for layer, values in layers.items()} for i, name in enumerate(names)}


def _before(store: Store, validated: Validated, spec: FeatureSpec) -> _Before | None:
    known = earlier(store, features_series(validated, spec))
    with suppress(NotInStore):  # arrays that are gone are computed again
        return known and _Before(store, known, spec)
    return None


def _computed(backbone: Any, source: StoredSource) -> Iterator[_Row]:
    """The features of each image. Batches are filled up, since a smaller one would round otherwise: an image's features
    depend on nothing but the image."""
    for batch in source:
        missing = source.batch_size - len(batch)
        images = torch.cat([batch.images, batch.images[-1:].expand(missing, -1, -1, -1)]) if missing else batch.images
        features = {key: values[: len(batch)] for key, values in backbone(images).items()}
        for layer, values in features.items():
            if not values.abs().amax() < _OVERFLOW:  # which NaN is not, either
                raise InvalidInput(
                    f"layer {layer} of {backbone.spec.backbone} has values beyond ±{FLOAT16_MAX:.0f} or not finite, "
                    "which half precision cannot hold; choose another layer or backbone"
                )
        layers = {key: features[key].half().cpu().numpy() for key in backbone.spec.keys}
        for i in range(len(batch)):
            yield {layer: half[i] for layer, half in layers.items()}


def _shards(ids: Sequence[str], computed: Iterator[_Row], before: _Before | None) -> Iterator[tuple[int, _Row]]:
    """(first row, layer -> float16 (m, c, h, w)) for each shard of images, copied or next of the computed."""
    for start in range(0, len(ids), SHARD):
        names = ids[start : start + SHARD]
        there = before.of(names) if before else {}
        rows = [there[name] if name in there else next(computed) for name in names]
        yield start, {layer: np.stack([row[layer] for row in rows]) for layer in rows[0]}


def _write_all(
    store: Store,
    draft: Draft,
    images: int,
    shards: Iterator[tuple[int, _Row]],
    arrays: dict[int, zarr.Array[Any]],
    progress: Progress,
) -> None:
    """Fill the arrays, which are made when the first features show their shapes; the next shard is computed while one
    is written."""
    means: list[np.ndarray] = []
    with ThreadPoolExecutor(1) as writer:  # compressing and writing release the interpreter's lock
        writing: list[Future[None]] = []
        for start, layers in shards:
            for layer, values in layers.items():
                if layer not in arrays:
                    key = f"{draft.folder}/layer{layer}"
                    arrays[layer] = store.create_array(
                        key, (images, *values.shape[1:]), "float16", chunk=CHUNK, shard=SHARD
                    )
            for done in writing:
                done.result()  # one shard in flight: memory stays bounded, and a failed write is heard of
            writing = [writer.submit(_write, arrays[layer], start, values) for layer, values in layers.items()]
            means.append(channel_means(map(torch.from_numpy, layers.values())))
            progress("", min(start + SHARD, images), images)
        for done in writing:
            done.result()
    whole = np.concatenate(means)
    store.create_array(f"{draft.folder}/means", whole.shape, "float64", chunk=_MEANS)[:] = whole


def _write(array: zarr.Array[Any], start: int, values: np.ndarray) -> None:
    array[start : start + len(values)] = values
