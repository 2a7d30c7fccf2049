"""A later night decodes and extracts what is new, and has what it would have had from all images at once."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from al_models.registry import create
from storage.stacks import Stack
from storage.store import Artifact, Store
from tasks.core.stored import rows_of
from tasks.demo_data import make_demo_data
from tasks.extract import extract
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.validate import validate

SPEC = create("padim", image_size=64).feature_spec()
assert SPEC is not None
NEW = 3


@dataclass(frozen=True)
class Night:
    """What a night has made."""

    store: Store
    images: Artifact
    features: Artifact

    @property
    def reused(self) -> tuple[int, int]:
        """Rows that were not decoded, and not extracted, again."""
        return self.images.meta["reused"], self.features.meta["reused"]

    @property
    def written(self) -> tuple[int, int]:
        """Rows of the arrays that it wrote itself."""
        arrays = (self.images, "images"), (self.features, f"layer{SPEC.keys[0]}")
        own = [self.store.zarr_store(f"{output.folder}/{name}") for output, name in arrays]
        return tuple(zarr.open_array(place, mode="r").shape[0] for place in own)

    def pixels(self) -> np.ndarray:
        """Of all images, in the order of the facts."""
        rows = rows_of(self.images.meta["ids"], self.facts()["id"])
        return Stack.open(self.store, self.images, "images").read(rows)

    def facts(self) -> pd.DataFrame:
        """What was seen of them."""
        return pd.read_parquet(io.BytesIO(self.store.read_bytes(f"{self.images.folder}/facts.parquet")))

    def layers(self) -> dict[int, np.ndarray]:
        """Features of all images, in the order of the facts."""
        rows = rows_of(self.features.meta["ids"], self.facts()["id"])
        return {layer: Stack.open(self.store, self.features, f"layer{layer}").read(rows) for layer in SPEC.keys}

    def equals(self, other: Night) -> bool:
        """To the bit."""
        pd.testing.assert_frame_equal(self.facts(), other.facts())
        layers = other.layers()
        return np.array_equal(self.pixels(), other.pixels()) and all(
            np.array_equal(values, layers[layer]) for layer, values in self.layers().items()
        )


def night(store: Path, data: Path) -> Night:
    """Ingest, decode, judge, extract."""
    place = Store(str(store))
    (category,) = ingest.fn(place.url, "mvtec_ad", str(data), ["brick"]).categories
    validated = validate.fn(prepare.fn(category, 64))
    return Night(place, place.get(validated.prepared.images), place.get(extract.fn(validated, SPEC, "cpu")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """21 training images, of which the last three are still to come; sizes that fill no batch."""
    make_demo_data(tmp_path / "all", train=21, validation=2, good=3, defects_per_type=1, size=64)
    for path in sorted((tmp_path / "all" / "brick" / "train" / "good").iterdir())[::8]:
        target = tmp_path / "later" / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
    assert len(list((tmp_path / "later").iterdir())) == NEW
    return tmp_path / "all"


def arrive(data: Path) -> None:
    """The new images of the night, in between the others by name."""
    for path in (data.parent / "later").iterdir():
        shutil.copy(path, data / "brick" / "train" / "good" / path.name)


def test_what_is_new_is_computed_and_the_rest_stays_where_it_is(data: Path, tmp_path: Path) -> None:
    first = night(tmp_path / "store", data)
    assert first.reused == (0, 0)
    arrive(data)
    second, fresh = night(tmp_path / "store", data), night(tmp_path / "fresh", data)
    n = len(first.images.meta["ids"])
    assert second.reused == (n, n)
    assert second.written == (NEW, NEW)
    assert len(second.images.meta["ids"]) == n + NEW
    assert second.equals(fresh)


def test_after_many_nights_all_is_in_one_piece_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.core.earlier._MOST_PARTS", 3)
    later, written = sorted((data.parent / "later").iterdir()), []
    night(tmp_path / "store", data)
    for path in later:
        shutil.copy(path, data / "brick" / "train" / "good" / path.name)
        last = night(tmp_path / "store", data)
        written.append(last.written)
    n = len(last.facts())
    assert written == [(1, 1), (1, 1), (n, n)]
    assert last.reused == (n - 1, n - 1)
    assert last.equals(night(tmp_path / "fresh", data))


def test_an_image_that_went_and_comes_back_is_there_once(data: Path, tmp_path: Path) -> None:
    night(tmp_path / "store", data)
    gone = min((data / "brick" / "train" / "good").iterdir())
    gone.rename(tmp_path / gone.name)
    night(tmp_path / "store", data)
    (tmp_path / gone.name).rename(gone)
    third = night(tmp_path / "store", data)
    assert third.equals(night(tmp_path / "fresh", data))


def test_an_image_that_went_is_not_among_them(data: Path, tmp_path: Path) -> None:
    first = night(tmp_path / "store", data)
    for path in sorted((data / "brick" / "train" / "good").iterdir())[:2]:
        path.unlink()
    second = night(tmp_path / "store", data)
    assert len(second.facts()) == len(first.facts()) - 2
    assert second.equals(night(tmp_path / "fresh", data))


def test_a_mask_that_changed_is_seen_though_the_image_is_copied(data: Path, tmp_path: Path) -> None:
    night(tmp_path / "store", data)
    mask = min((data / "brick" / "ground_truth" / "scratch").iterdir())
    mask.write_bytes(b"no picture")
    second = night(tmp_path / "store", data)
    assert second.reused[0] == len(second.images.meta["ids"])
    assert (second.facts()["mask_state"] == "unreadable").sum() == 1
    assert second.equals(night(tmp_path / "fresh", data))


@pytest.mark.parametrize("gone", ["images", "features"])
def test_what_is_gone_is_computed_again(data: Path, tmp_path: Path, gone: str) -> None:
    first = night(tmp_path / "store", data)
    arrive(data)
    first.store.delete(getattr(first, gone).folder)
    second = night(tmp_path / "store", data)
    assert second.reused[["images", "features"].index(gone)] == 0
    assert second.equals(night(tmp_path / "fresh", data))
