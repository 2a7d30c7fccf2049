"""Steps that need more memory than there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from al_models import create
from al_models.embedding.padim import Padim
from al_models.parts.backbone import Backbone
from al_models.types import ImageBatch
from storage.store import Store
from tasks.calibrate import calibrate
from tasks.core.handles import Cell
from tasks.core.limits import in_memory
from tasks.extract import extract
from tasks.fit import fit
from tasks.ingest import ingest
from tasks.predict import predict
from tasks.prepare import prepare
from tasks.validate import validate

SAID_BY_TORCH = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(SAID_BY_TORCH)]
)
def test_where_memory_runs_out_batches_are_a_quarter_once(error: Exception) -> None:
    asked: list[int] = []

    def work(batch_size: int, enough: int) -> int:
        asked.append(batch_size)
        if batch_size > enough:
            raise error
        return batch_size

    assert in_memory(lambda size: work(size, 16), 16) == 16
    assert in_memory(lambda size: work(size, 4), 16) == 4
    with pytest.raises(type(error)):
        in_memory(lambda size: work(size, 1), 16)
    assert asked == [16, 16, 4, 16, 4]


def test_another_error_is_not_tried_again() -> None:
    asked: list[int] = []

    def work(batch_size: int) -> None:
        asked.append(batch_size)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_memory(work, 16)
    assert asked == [16]


def test_a_cell_ends_as_if_there_were_room(demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, list[float]]:
        """Features, maps and scores of the held-out images."""
        store = Store(str(tmp_path / name))
        (category,) = ingest.fn(store.url, "mvtec_ad", str(demo_root), ["brick"]).categories
        validated = validate.fn(prepare.fn(category, 64))
        cell = Cell("mvtec_ad", "brick", "padim", {"image_size": 64, "channels": 10}, device="cpu")
        spec = create(cell.method, **cell.params).feature_spec()
        assert spec is not None
        features = extract.fn(validated, spec, "cpu")
        model = fit.fn(cell, validated, features)
        maps, held = predict.fn(cell, validated, features, model), calibrate.fn(cell, validated, features, model)
        folder = store.get(features).folder
        arrays = {str(key): np.asarray(opened(store, f"{folder}/layer{key}")) for key in spec.keys}
        return arrays, np.asarray(opened(store, f"{store.get(maps).folder}/maps")), store.get(held).meta["scores"]

    def opened(store: Store, key: str) -> Any:
        return zarr.open_array(store.zarr_store(key), mode="r")[:]

    roomy = outputs("roomy")
    refused: list[str] = []

    def narrow(owner: type, method: str, size: int) -> None:
        whole = getattr(owner, method)

        def narrowed(self: Any, batch: Any, *more: Any) -> Any:
            if len(batch.ids if isinstance(batch, ImageBatch) else batch) > size:
                refused.append(method)
                raise MemoryError
            return whole(self, batch, *more)

        monkeypatch.setattr(owner, method, narrowed)

    narrow(Padim, "_predict", 4)
    narrow(Backbone, "__call__", 4)
    narrow_ = outputs("narrow")
    assert set(refused) == {"_predict", "__call__"}
    for layer, values in roomy[0].items():
        assert np.allclose(values, narrow_[0][layer], rtol=2e-3, atol=2e-3)
    assert np.allclose(roomy[1], narrow_[1], rtol=1e-2)
    assert np.allclose(roomy[2], narrow_[2], rtol=1e-2)
