"""A night's fit goes on from the night before's, and is what a fit of all images at once would be."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from flows.runs.runfile import DataSource, NightlyRun
from storage.store import Artifact, Store
from tasks.core.compute import detector_of, inputs_of
from tasks.core.handles import Cell, Validated
from tasks.core.stored import StoredSource
from tasks.demo_data import make_demo_data
from tasks.extract import extract
from tasks.fit import fit, load_model
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.validate import validate

PADIM = Cell("mvtec_ad", "brick", "padim", {"image_size": 64, "channels": 10}, device="cpu", update=True)
SOE = Cell("mvtec_ad", "brick", "soe", {"image_size": 64, "dimensions": 10}, device="cpu", update=True)
SPADE = Cell("mvtec_ad", "brick", "spade", {"image_size": 64, "neighbours": 2}, device="cpu", update=True)
STATE = 1e-5
"""Largest difference allowed, as a share of an array's largest value."""
SCORES = 1e-3
"""As a share of the score."""


@dataclass(frozen=True)
class Night:
    """What a night's fit is made of, and has made."""

    store: Store
    cell: Cell
    validated: Validated
    features: str

    def fit(self, **changes: object) -> Artifact:
        """The model."""
        return self.store.get(fit.fn(replace(self.cell, **changes), self.validated, self.features))

    def state(self, model: Artifact) -> dict[str, np.ndarray]:
        """What it has learned."""
        return safetensors.numpy.load(self.store.read_bytes(f"{model.folder}/state.safetensors"))

    def scores(self, model: Artifact) -> np.ndarray:
        """Of all images."""
        ids, spec = self.store.get(self.features).meta["ids"], inputs_of(self.cell)[1]
        source = StoredSource(self.validated, ids, spec=spec, features=self.features, images=False)
        return load_model(self.store, model.key, self.cell).predict(source).scores


@dataclass(frozen=True)
class Plant:
    """15 good images, and 12 that are still to come."""

    root: Path

    @property
    def good(self) -> Path:
        """Those that are there."""
        return self.root / "data" / "brick" / "train" / "good"

    def deliver(self, images: int) -> None:
        """New ones, in between the others by name."""
        for path in sorted((self.root / "later").iterdir())[:images]:
            shutil.move(path, self.good)

    def night(self, cell: Cell) -> Night:
        """All before the fit."""
        store = Store(str(self.root / "store"))
        (category,) = ingest.fn(store.url, "mvtec_ad", str(self.root / "data"), ["brick"]).categories
        validated = validate.fn(prepare.fn(category, 64))
        spec = inputs_of(cell)[1]
        assert spec is not None
        return Night(store, cell, validated, extract.fn(validated, spec, "cpu"))


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    make_demo_data(tmp_path / "data", train=27, validation=3, good=2, defects_per_type=1, size=64)
    plant = Plant(tmp_path)
    (tmp_path / "later").mkdir()
    for path in sorted(plant.good.iterdir())[::2][:12]:
        shutil.move(path, tmp_path / "later")
    return plant


def assert_equal(night: Night, updated: Artifact, whole: Artifact) -> None:
    """Up to rounding."""
    found, expected = night.state(updated), night.state(whole)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= STATE * np.abs(values).max(), name
    np.testing.assert_allclose(night.scores(updated), night.scores(whole), rtol=SCORES)


@pytest.mark.parametrize("cell", [PADIM, SOE], ids=["padim", "soe"])
def test_new_images_are_learned_on_top_and_give_what_all_at_once_would(plant: Plant, cell: Cell) -> None:
    base = plant.night(cell).fit()
    assert base.meta["updated_from"] is None
    for images in (1, 4, 7):
        plant.deliver(images)
        night = plant.night(cell)
        model = night.fit()
        assert model.meta["updated_from"] == base.key
        assert len(model.meta["fitted_on"]) == len(base.meta["fitted_on"]) + images
        base = model
    whole = night.fit(update=False)
    assert whole.meta["updated_from"] is None
    assert whole.meta["fitted_on"] == model.meta["fitted_on"]
    assert whole.key != model.key, "they differ in their last bits"
    assert_equal(night, model, whole)


def test_the_first_night_and_a_benchmark_share_their_fit(plant: Plant) -> None:
    night = plant.night(PADIM)
    whole = night.fit(update=False)
    assert night.fit() == whole
    plant.deliver(2)
    night = plant.night(PADIM)
    whole = night.fit(update=False)
    assert night.fit() == whole, "what is there already costs nothing"


def test_the_same_night_again_has_the_same_model(plant: Plant) -> None:
    plant.night(PADIM).fit()
    plant.deliver(2)
    night = plant.night(PADIM)
    model = night.fit()
    assert model.meta["updated_from"] is not None
    night.fit(update=False)  # a benchmark of the same images does not change what the night has
    assert night.fit() == model
    (plant.root / "data" / "brick" / "test" / "good" / "000.png").unlink()
    assert plant.night(PADIM).fit() == model, "what it learned from is the same"


def test_other_held_out_images_are_another_model_with_the_same_state(plant: Plant) -> None:
    night = plant.night(PADIM)
    before = night.fit()
    (plant.root / "data" / "brick" / "validation" / "good" / "000.png").unlink()
    after = plant.night(PADIM).fit()
    assert after.key != before.key
    assert len(after.meta["held_out"]) == len(before.meta["held_out"]) - 1
    assert {name: value.tobytes() for name, value in night.state(after).items()} == {
        name: value.tobytes() for name, value in night.state(before).items()
    }


def test_an_image_that_is_not_to_be_learned_any_more_means_a_whole_fit(plant: Plant) -> None:
    plant.night(PADIM).fit()
    min(plant.good.iterdir()).unlink()
    plant.deliver(2)
    night = plant.night(PADIM)
    model = night.fit()
    assert model.meta["updated_from"] is None
    assert night.fit(update=False) == model


def test_of_new_images_a_share_is_held_out_and_none_that_was_learned(plant: Plant) -> None:
    shutil.rmtree(plant.root / "data" / "brick" / "validation")  # then a tenth is held out, by hash
    before = plant.night(PADIM).fit()
    assert len(before.meta["held_out"]) == 2, "of 15"
    for _ in range(6):
        plant.deliver(2)
        night = plant.night(PADIM)
        model = night.fit()
        fitted, held_out = (set(model.meta[name]) for name in ("fitted_on", "held_out"))
        assert model.meta["updated_from"] == before.key
        assert set(before.meta["fitted_on"]) <= fitted
        assert set(before.meta["held_out"]) <= held_out
        assert not fitted & held_out
        before = model
    assert len(held_out) == 3, "of 27"
    spec, ids = inputs_of(PADIM)[1], model.meta["fitted_on"]
    source = StoredSource(night.validated, ids, spec=spec, features=night.features, images=False)
    whole = detector_of(PADIM).fit(source).state()
    for name, values in night.state(model).items():
        assert np.abs(whole[name] - values).max() <= STATE * np.abs(values).max(), name


@pytest.mark.parametrize("change", ["seed", "params", "code"])
def test_another_seed_parameter_or_code_means_a_whole_fit(
    plant: Plant, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.night(PADIM).fit()
    plant.deliver(2)
    if change == "code":
        monkeypatch.setattr("tasks.fit.method_code", lambda *_: "changed")
    changes = {"seed": {"seed": 1}, "params": {"params": PADIM.params | {"epsilon": 0.02}}, "code": {}}[change]
    assert plant.night(PADIM).fit(**changes).meta["updated_from"] is None


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_an_earlier_model_that_is_of_no_use_means_a_whole_fit(plant: Plant, how: str) -> None:
    night = plant.night(PADIM)
    model = night.fit()
    if how == "gone":
        night.store.delete(model.key)
    else:
        night.store.write_bytes(f"{model.folder}/state.safetensors", b"nothing")
    plant.deliver(2)
    night = plant.night(PADIM)
    found, whole = night.fit(), night.fit(update=False)
    assert found.meta["updated_from"] is None
    assert {name: value.tobytes() for name, value in night.state(found).items()} == {
        name: value.tobytes() for name, value in night.state(whole).items()
    }


def test_a_method_that_cannot_is_fitted_on_all(plant: Plant) -> None:
    plant.night(SPADE).fit()
    plant.deliver(2)
    night = plant.night(SPADE)
    model = night.fit()
    assert model.meta["updated_from"] is None
    assert night.fit(update=False) == model


def test_only_nights_go_on_from_what_was_learned_before() -> None:
    run = NightlyRun(data=[DataSource(dataset="mvtec_ad", root="data")]).as_benchmark()
    assert [cell.update for cell in run.cells("mvtec_ad", "brick")] == [True]
    assert Cell("mvtec_ad", "brick", "padim").update is False
    assert replace(PADIM, update=False).id == PADIM.id
    assert json.loads(run.model_dump_json())["methods"][0]["name"] == "padim"
