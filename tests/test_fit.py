"""What names a model, and what is said against it."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
import torch
from PIL import Image

from al_models import create
from storage.store import Store
from tasks import fit as fit_module
from tasks.core import compute
from tasks.core.handles import Category, Cell, Prepared, Validated
from tasks.core.stored import accepted_samples
from tasks.extract import extract
from tasks.fit import fit, load_model
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.validate import validate

CATEGORY = Category("memory://fit", "toy", "toy", "data", "catalogues/toy", "0")
VALIDATED = Validated(Prepared(CATEGORY, 256, "images/toy"), "verdicts/toy", "0")


@pytest.mark.parametrize(("method", "features", "equal"), [("ae_ssim", None, False), ("padim", "features/toy", True)])
def test_the_precision_of_a_training_names_its_model(
    method: str, features: str | None, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "run_step", lambda *_: None)
    names = []
    for pays in (False, True):  # a machine without and one with bfloat16 in hardware
        monkeypatch.setattr(compute, "_bfloat16_pays", lambda device, pays=pays: pays)
        names.append(fit.fn(Cell("toy", "toy", method, device="cpu"), VALIDATED, features))
    assert (names[0] == names[1]) is equal


def test_the_gpu_is_named_only_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU ({device})")
    hardware_of = compute.hardware_of.__wrapped__
    assert hardware_of("auto") == f"{hardware_of('cpu')}, a GPU (cuda)"
    assert hardware_of("cuda:1").endswith("cores, a GPU (cuda:1)")
    assert f"({torch.backends.cpu.get_cpu_capability()})" in hardware_of("cpu")


@pytest.mark.parametrize(("most", "warned"), [(0, False), (60, True)])
def test_a_method_that_compares_positions_warns_where_parts_move(most: int, warned: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.normal(60, 4, (96, 160))
        start = 10 + round(most * rng.random())
        pixels[20:76, start : start + 70] += 90  # a plate that lies, or does not lie, in the same place
        pixels[40:56, start + 10 : start + 30] -= 60
        path = tmp_path / f"data/plate/train/good/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    (category,) = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tmp_path / "data")).categories
    validated = validate.fn(prepare.fn(category, 64))
    ids = [sample.id for sample in accepted_samples(validated)]
    assert len(ids) == 12
    warnings = fit_module._doubts(create("padim"), validated, ids)
    assert [("not aligned" in warning) for warning in warnings] == [True] * warned
    assert fit_module._doubts(create("patchcore"), validated, ids) == []
    assert fit_module._doubts(create("padim"), validated, ids[:1]) == []


def test_the_model_last_used_is_in_memory_and_once(demo_root: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    (category,) = ingest.fn(store.url, "mvtec_ad", str(demo_root), ["brick"]).categories
    validated = validate.fn(prepare.fn(category, 64))
    cell = Cell("mvtec_ad", "brick", "padim", {"image_size": 64, "channels": 10}, device="cpu")
    spec = create(cell.method, **cell.params).feature_spec()
    assert spec is not None
    features = extract.fn(validated, spec, "cpu")
    key = fit.fn(cell, validated, features)
    assert store.get(key).meta["hardware"] == compute.hardware_of("cpu")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: load_model(store, key, cell), range(2))
    assert first is second
    used, key_of_other = ref(first), fit.fn(replace(cell, seed=1), validated, features)
    del first, second
    gc.collect()
    assert used() is None, "a fit is to have the memory that the last model took"

    model = load_model(store, key, cell)
    assert load_model(store, key, replace(cell, device="auto")) is not model
    kept = ref(load_model(store, key, cell))
    del model
    gc.collect()
    assert load_model(store, key, cell) is kept(), "the next step of the cell would read it again"
    load_model(store, key_of_other, cell)
    gc.collect()
    assert kept() is None, "more than the model last used is held"
