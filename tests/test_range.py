"""Images with more than 8 bits a channel: one range from the training images to new ones, nights and ONNX files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from storage.models.versions import ModelVersion
from storage.nights import Decision
from storage.store import Store
from tasks.core.handles import Prepared
from tasks.ingest import ingest
from tasks.prepare import pixels_series, prepare, white_of
from tasks.serve.judge import open_image
from tasks.validate import findings, validate

pytestmark = pytest.mark.usefixtures("api")


def part(path: Path, seed: int, factor: int = 16, most: int = 4095) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (32, 32)) * factor
    values[0, 0] = 255 * factor
    Image.fromarray(np.minimum(values, most).astype(np.uint16)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(6):
        part(tmp_path / f"data/train/good/{i}.png", i)
    part(tmp_path / "data/test/good/0.png", 10)
    part(tmp_path / "data/test/dent/bright.png", 11, 20, 65535)  # some of its values lie above
    part(tmp_path / "data/test/dent/shifted.png", 12, 256, 65535)  # another export
    return tmp_path / "data"


def prepared(root: Path, store: str, **options: float) -> tuple[Prepared, pd.DataFrame]:
    (category,) = ingest.fn(store, "folder", str(root)).categories
    found = prepare.fn(category, 32, **options)
    place = Store(store).get(found.images).folder
    return found, pd.read_parquet(Path(store) / place / "facts.parquet").set_index("path")


def test_the_range_is_learned_kept_and_told(root: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    found, facts = prepared(root, store)
    assert white_of(Store(store), found.images) == 4095
    assert set(facts["white"]) == {4095.0}
    small = np.random.default_rng(10).integers(0, 256, (32, 32))
    assert abs(facts.loc["test/good/0.png", "brightness"] - small.mean()) < 1
    verdict = validate.fn(found)
    told = findings(Store(store), verdict.verdict).set_index("rule")
    assert told.loc["usual_range", "path"] == "test/dent/shifted.png"
    assert told.loc["in_range", "path"] == "test/dent/bright.png"
    assert (
        "above 0 to 4095, the range learned from the good training images, the largest is 5100"
        in (told.loc["in_range", "reason"])
    )
    page = Store(store).get(verdict.verdict).meta["expectations"]
    assert any("0 to 4095, the range learned" in asked["description"] for asked in page)


def test_a_wider_delivery_is_decoded_anew_and_a_version_sees_its_own_range(root: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    first, before = prepared(root, store)
    part(root / "train/good/wide.png", 20, 40, 65535)
    second, after = prepared(root, store)
    assert white_of(Store(store), second.images) == 16383
    assert Store(store).get(second.images).meta["reused"] == 0
    assert pixels_series(first) != pixels_series(second), "features and fits of one range serve no other"
    path = "test/good/0.png"
    assert abs(before.loc[path, "brightness"] - 4 * after.loc[path, "brightness"]) < 2
    third, seen = prepared(root, store, white=4095.0)
    assert seen.loc[path, "brightness"] == before.loc[path, "brightness"]
    assert third.images not in (first.images, second.images)
    assert pixels_series(third) == pixels_series(first)


def test_eight_bits_have_no_range(tmp_path: Path) -> None:
    for i in range(3):
        path = tmp_path / f"data/train/good/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    found, facts = prepared(tmp_path / "data", str(tmp_path / "store"))
    assert white_of(Store(str(tmp_path / "store")), found.images) is None
    assert facts["white"].isna().all()


def test_new_images_are_read_in_the_range_of_the_version(tmp_path: Path) -> None:
    part(tmp_path / "a.png", 1)
    part(tmp_path / "b.png", 1, 32, 65535)
    inside, beyond = (open_image(str(tmp_path / f"{name}.png"), 32, lambda _: False, 4095.0) for name in "ab")
    assert inside is not None
    assert beyond is not None
    small = np.random.default_rng(1).integers(0, 256, (32, 32))
    assert abs(inside.light["brightness"] - small.mean()) < 1
    assert (inside.beyond, beyond.beyond) == (False, True)
    assert "of the values lie beyond it" in (beyond.note or "")


def test_a_night_tells_of_another_range() -> None:
    from tasks.night.told import another_range

    class Version(ModelVersion):
        def __init__(self, number: int, white: float | None) -> None:
            object.__setattr__(self, "number", number)
            object.__setattr__(self, "white", white)

    said = another_range(Version(3, 4095.0), Version(4, 16383.0))
    assert said == "tonight's good images have the range of values 0 to 16383, and version 3 has 0 to 4095"
    assert another_range(Version(3, None), Version(4, None)) == ""
    decision = replace(Decision("d", "c", "n", "promoted", "why"), range=said)
    assert decision.alarms == [f"range: {said}"]
