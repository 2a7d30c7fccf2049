"""Defects hidden among the training images: found, pointed at, told and set aside; clean images left alone."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from al_models.parts import contamination
from al_models.parts.contamination import FEWEST, layer_to_compare, robust_deviations, unlikeness
from al_models.parts.defects import cut_paste, scratch, stain
from al_models.types import FeatureSpec, ImageBatch, ImageSource
from storage.samples import fingerprint
from storage.store import Store
from tasks import suspect as suspect_module
from tasks.core.handles import Validated
from tasks.core.policy import Policy
from tasks.core.stored import StoredSource, accepted_samples
from tasks.extract import extract
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.suspect import COLUMNS, RULE, suspect
from tasks.validate import FINDINGS, CategoryStopped, findings, validate

LIMIT = 5.0
SPEC = FeatureSpec(image_size=128)


# the mathematics


class Features(ImageSource):
    """Feature maps in memory, under the name of layer 3; notes what is read."""

    def __init__(self, maps: np.ndarray, ids: list[str] | None = None) -> None:
        self.maps, self.read_rows, self.most = maps, [], 0
        self.ids = tuple(ids or (f"image {i}" for i in range(len(maps))))

    def read(self, rows):
        self.read_rows += rows
        self.most = max(self.most, len(rows))
        return ImageBatch(tuple(self.ids[row] for row in rows), None, {3: torch.from_numpy(self.maps[list(rows)])})


def features(n=40, c=12, h=8, w=10, seed=0, border=1.0):
    """Good images: each position has its own patch, with noise that is `border` times as strong along the border."""
    rng = np.random.default_rng(seed)
    noise = np.full((h, w), border)
    noise[1:-1, 1:-1] = 1
    return (3 * rng.normal(size=(c, h, w)) + noise * rng.normal(size=(n, c, h, w))).astype(np.float16)


def with_defect(maps, row, y, x, strength=8.0, seed=1):
    maps = maps.copy()
    direction = np.random.default_rng(seed).normal(size=maps.shape[1])
    maps[row, :, y, x] += (strength * direction / np.linalg.norm(direction) * np.sqrt(maps.shape[1])).astype(np.float16)
    return maps


def compared(maps, parts=None, **options):
    source = Features(maps)
    return unlikeness(source, 3, parts or list(source.ids), **options)


@pytest.mark.parametrize("seed", range(5))
def test_good_images_are_not_suspected(seed):
    assert compared(features(n=60, c=8, h=16, w=16, seed=seed)).deviations.max() < LIMIT


@pytest.mark.parametrize("c", [12, 200])
def test_a_defect_is_found_where_it_is(c):
    found = compared(with_defect(features(c=c), 7, y=2, x=6))
    assert np.flatnonzero(found.deviations > LIMIT).tolist() == [7]
    assert found.places[7].tolist() == [6.5 / 10, 2.5 / 8]


def test_one_channel_is_enough():
    found = compared(with_defect(features(c=1), 7, y=2, x=6, strength=40.0))  # else another position is near
    assert found.deviations.argmax() == 7
    assert found.places[7].tolist() == [6.5 / 10, 2.5 / 8]


def test_a_border_that_always_varies_hides_no_defect_within():
    maps = with_defect(features(border=4.0), 7, y=3, x=4, strength=3.0)
    patches = torch.from_numpy(maps).float().flatten(2).mT  # (n, p, c)
    others = torch.cdist(patches[7], torch.cat([patches[:7], patches[8:]]).flatten(0, 1)).amin(1)
    assert others.argmax() % 10 in (0, 9)  # its border is farther from all patches of the others than its defect
    found = compared(maps)
    assert np.flatnonzero(found.deviations > LIMIT).tolist() == [7]
    assert found.places[7].tolist() == [4.5 / 10, 3.5 / 8]


def test_the_noise_of_a_plain_background_is_no_defect():
    maps = features()
    maps[:, :, :, :3] = 1  # as behind a product: equal in all images up to rounding
    maps[7, :, 4, 1] += np.float16(0.001)
    assert compared(maps).deviations.max() < LIMIT


@pytest.mark.parametrize("reference", [512, 16])
def test_the_order_of_the_images_does_not_matter(reference, monkeypatch):
    monkeypatch.setattr(contamination, "_REFERENCE", reference)
    maps = with_defect(features(), 7, y=2, x=6)
    ids = [f"image {i}" for i in range(len(maps))]
    parts = [f"part {i // 2}" for i in range(len(maps))]
    order = np.random.default_rng(5).permutation(len(maps))
    first = unlikeness(Features(maps, ids), 3, parts)
    second = unlikeness(Features(maps[order], [ids[i] for i in order]), 3, [parts[i] for i in order])
    assert np.array_equal(first.deviations[order], second.deviations)
    assert np.array_equal(first.places[order], second.places)
    other = unlikeness(Features(maps, ids), 3, parts, seed=1)
    assert not np.array_equal(first.deviations, other.deviations) or reference == 512  # then all images, all patches


def test_images_of_one_part_do_not_vouch_for_each_other():
    rng = np.random.default_rng(2)
    maps = with_defect(features(), 7, y=2, x=6)
    shots = maps[7] + 0.05 * rng.normal(size=(3, *maps.shape[1:]))
    maps = np.concatenate([maps, shots.astype(np.float16)])  # the part of image 7, photographed three times more
    alone = [f"part {i}" for i in range(40)]
    named = compared(maps, [*alone, *["part 7"] * 3])
    assert np.flatnonzero(named.deviations > LIMIT).tolist() == [7, 40, 41, 42]
    unnamed = compared(maps, [f"part {i}" for i in range(43)])
    assert unnamed.deviations.max() < LIMIT


def test_many_images_are_streamed(monkeypatch):
    monkeypatch.setattr(contamination, "_REFERENCE", 32)
    monkeypatch.setattr(contamination, "_BANK", 400)
    source = Features(with_defect(with_defect(features(n=120), 7, y=2, x=6), 90, y=5, x=1))
    source.batch_size, told = 9, []
    found = unlikeness(source, 3, list(source.ids), progress=lambda what, done, of: told.append((done, of)))
    assert sorted(np.argsort(found.deviations)[-2:]) == [7, 90]
    assert found.deviations[[7, 90]].min() > LIMIT
    assert source.most <= 9
    times = np.bincount(source.read_rows)
    assert sorted(times.tolist()) == [1] * 88 + [2] * 32
    assert told == [(i, 120) for i in range(1, 121)]


@pytest.mark.parametrize("n", [1, 2, FEWEST - 1])
def test_of_few_images_nothing_is_said(n):
    found = compared(with_defect(features(n=n), 0, y=2, x=6))
    assert found.deviations.tolist() == [0] * n
    assert np.isfinite(found.scores).all()


def test_images_that_are_all_alike_are_not_suspected_and_one_among_them_is():
    maps = np.repeat(features(n=1), 20, axis=0)
    assert compared(maps).deviations.tolist() == [0] * 20
    maps[4, :, 1, 1] += 1
    assert np.flatnonzero(compared(maps).deviations > LIMIT).tolist() == [4]
    assert compared(np.zeros_like(maps)).deviations.tolist() == [0] * 20
    assert compared(maps, ["one part"] * 20).deviations.tolist() == [0] * 20


def test_deviations_are_robust():
    scores = np.concatenate([np.random.default_rng(0).normal(3, 0.5, 10_000), np.full(1000, 50.0)])
    deviations = robust_deviations(scores)
    assert np.abs(deviations[:10_000]).max() < 5
    assert deviations[:10_000].std() == pytest.approx(1, abs=0.2)
    assert deviations[10_000:].min() > 60
    assert robust_deviations(np.array([1.0] * 20 + [1.001])).max() < 1  # a hair among equals


@pytest.mark.parametrize(
    ("sides", "image_size", "layer"),
    [
        ({1: 64, 2: 32, 3: 16}, 256, 3),  # stride 16
        ({1: 64, 2: 32, 3: 16, 4: 8}, 256, 3),  # at stride 32 a small defect is a fraction of a patch
        ({1: 16, 2: 8, 3: 4}, 64, 2),  # 4 x 4 patches show no place
        ({4: 8}, 256, 4),  # nothing finer
        ({3: 14, 7: 14, 11: 14}, 224, 11),  # a transformer's blocks
        ({2: 4, 3: 2}, 32, 2),
    ],
)
def test_the_layer_compared(sides, image_size, layer):
    assert layer_to_compare({i: (5, 8, side, side) for i, side in sides.items()}, image_size) == layer


# the step


def good_image(rng):
    """A woven cloth, never in the same place twice: uint8 (128, 128, 3)."""
    y, x = np.mgrid[:128, :128] + rng.uniform(0, 16, 2)[:, None, None]
    cloth = 128 + 40 * np.sin(2 * np.pi * x / 16) * np.sin(2 * np.pi * y / 16) + rng.normal(0, 6, (128, 128))
    return np.repeat(np.clip(cloth, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


PLANTED = {"005.png": stain, "014.png": scratch, "021.png": cut_paste}


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Root of the categories `clean` and `dirty`, equal but for three defects; and the masks of these."""
    root = tmp_path_factory.mktemp("data")
    rng, found = np.random.default_rng(5), {}
    for split, count in (("train/good", 28), ("test/good", 2)):
        for i in range(count):
            image, name = good_image(rng), f"{i:03}.png"
            for category in ("clean", "dirty"):
                path = root / category / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if category == "dirty" and split == "train/good" and name in PLANTED:
                    image, found[name] = PLANTED[name](image, np.random.default_rng(i))
                Image.fromarray(image).save(path)
    return root, found


@pytest.fixture(scope="module")
def ready(masks, tmp_path_factory) -> dict[str, tuple[Validated, str]]:
    """Category -> validated, and the key of its features."""
    root, _ = masks
    store = str(tmp_path_factory.mktemp("store"))
    found = {}
    for category in ingest.fn(store, "mvtec_ad", str(root)).categories:
        validated = validate.fn(prepare.fn(category, SPEC.image_size))
        found[category.category] = validated, extract.fn(validated, SPEC, "cpu")
    return found


def table(validated, key):
    store = Store(validated.category.store)
    return pd.read_parquet(io.BytesIO(store.read_bytes(f"{store.get(key).folder}/suspects.parquet")))


def meta(validated, key):
    return Store(validated.category.store).get(key).meta


def policy(severity, **numbers):
    return Policy(**{"rules": {RULE: severity}, "suspect_deviations": LIMIT, **numbers})


def test_planted_defects_are_suspected_and_pointed_at(ready, masks):
    validated, features = ready["dirty"]
    found = suspect.fn(validated, features, SPEC, policy("warn"))
    assert found == replace(validated, suspects=found.suspects)  # to warn takes nothing away
    seen = table(validated, found.suspects)
    assert {name: str(kind) for name, kind in seen.dtypes.items()} == COLUMNS
    training = [sample for sample in accepted_samples(validated) if sample.split == "train"]
    assert seen["key"].tolist() == [sample.key for sample in training]
    assert seen["id"].tolist() == [sample.id for sample in training]
    suspects = seen[seen["suspected"]]
    assert [key.rsplit("/")[-1] for key in suspects["key"]] == list(PLANTED)
    assert (suspects["deviations"] > LIMIT).all()
    for row, mask in zip(suspects.itertuples(), masks[1].values(), strict=True):
        y, x = int(row.y * 128), int(row.x * 128)
        assert mask[max(0, y - 16) : y + 17, max(0, x - 16) : x + 17].any()  # within a patch
    told = meta(validated, found.suspects)
    assert (told["suspected"], told["compared"], told["severity"], told["layer"]) == (3, 28, "warn", 3)
    assert told["seconds"] >= 0


def test_clean_images_are_not_suspected(ready):
    validated, features = ready["clean"]
    found = suspect.fn(validated, features, SPEC, policy("reject"))
    assert found == replace(validated, suspects=found.suspects)  # nothing to reject, so nothing downstream is made anew
    assert meta(validated, found.suspects)["suspected"] == 0


def test_rejected_suspects_are_set_aside_with_the_reason(ready):
    validated, features = ready["dirty"]
    found = suspect.fn(validated, features, SPEC, policy("reject"))
    assert found.prepared == validated.prepared
    assert found.fingerprint != validated.fingerprint
    assert found.verdict != validated.verdict
    kept = accepted_samples(found)
    planted = {f"dirty/train/good/{name}" for name in PLANTED}
    assert kept == [sample for sample in accepted_samples(validated) if sample.key not in planted]
    assert found.fingerprint == fingerprint(kept)

    store = Store(validated.category.store)
    told = findings(store, found.verdict)
    assert tuple(told.columns) == FINDINGS
    rejected = told[told["rule"] == RULE]
    assert set(rejected["key"]) == planted
    assert set(rejected["severity"]) == {"reject"}
    row = (
        table(validated, suspect.fn(validated, features, SPEC, policy("warn")).suspects)
        .set_index("key")
        .loc["dirty/train/good/005.png"]
    )
    reason = rejected.set_index("key").loc["dirty/train/good/005.png", "reason"]
    assert reason.startswith(f"{row['deviations']:.1f} robust deviations more unlike the other training images")
    assert f"{row['x']:.0%} of its width and {row['y']:.0%} of its height" in reason

    before, after = meta(validated, validated.verdict), meta(validated, found.verdict)
    assert (after["accepted"], after["rejected"]) == (before["accepted"] - 3, before["rejected"] + 3)
    assert after["counts"]["train"] == {"listed": 28, "accepted": 25}
    assert after["counts"]["test/good"] == before["counts"]["test/good"]
    assert after["expectations"][:-1] == before["expectations"]
    assert (after["expectations"][-1]["name"], after["expectations"][-1]["unexpected"]) == (RULE, 3)
    assert set(after) == set(before)
    assert findings(store, validated.verdict)["rule"].ne(RULE).all()  # the first verdict stays as it was


def test_features_stay_good_for_what_is_left(ready):
    validated, features = ready["dirty"]
    found = suspect.fn(validated, features, SPEC, policy("reject"))
    ids = [sample.id for sample in accepted_samples(found)]
    before = [sample.id for sample in accepted_samples(validated)]
    source, whole = (
        StoredSource(v, i, spec=SPEC, features=features, images=True) for v, i in ((found, ids), (validated, before))
    )
    rows = [before.index(name) for name in ids[:9]]
    assert torch.equal(source.read(range(9)).features[3], whole.read(rows).features[3])


def test_a_second_run_computes_nothing(ready, monkeypatch):
    validated, features = ready["dirty"]
    first = suspect.fn(validated, features, SPEC, policy("reject"))
    monkeypatch.setattr(suspect_module, "unlikeness", None)
    monkeypatch.setattr(suspect_module, "accepted_samples", None)
    assert suspect.fn(validated, features, SPEC, policy("reject")) == first
    with pytest.raises(TypeError):
        suspect.fn(validated, features, SPEC, policy("reject", suspect_deviations=4.9))  # another limit, another output


def test_turned_off_nothing_is_compared(ready, monkeypatch):
    validated, features = ready["dirty"]
    monkeypatch.setattr(suspect_module, "unlikeness", None)
    found = suspect.fn(validated, features, SPEC, policy("off"))
    assert found == replace(validated, suspects=found.suspects)
    seen = table(validated, found.suspects)
    assert {name: str(kind) for name, kind in seen.dtypes.items()} == COLUMNS
    assert len(seen) == 0
    assert meta(validated, found.suspects)["severity"] == "off"


def test_a_category_stops_when_too_few_images_are_left(ready):
    validated, features = ready["dirty"]
    strict = policy("reject", min_training_images=26)
    for _ in range(2):  # the verdict is kept, and read back
        with pytest.raises(
            CategoryStopped, match=r"dirty: 25 of 28 training images are left .* at least 26 are needed"
        ):
            suspect.fn(validated, features, SPEC, strict)
    store = Store(validated.category.store)
    keys = {key.rsplit("/", 1)[0] for key in store.list("verdicts") if key.endswith("manifest.json")}
    stopped = [key for key in keys if store.get(key).meta["stop"]]
    assert len(stopped) == 1
    told = findings(store, stopped[0])
    assert told["severity"].value_counts().to_dict() == {"reject": 3, "stop": 1}
    assert told.loc[told["severity"] == "stop", "key"].tolist() == [""]


@pytest.mark.parametrize("n", [2, 5])
def test_a_category_of_few_images_has_no_suspects(tmp_path, n):
    rng = np.random.default_rng(1)
    folder = tmp_path / "data/few/train/good"
    folder.mkdir(parents=True)
    for i in range(n):
        image = good_image(rng)
        Image.fromarray(stain(image, rng)[0] if i == 0 else image).save(folder / f"{i}.png")
    category = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tmp_path / "data")).categories[0]
    validated = validate.fn(prepare.fn(category, SPEC.image_size))
    found = suspect.fn(validated, extract.fn(validated, SPEC, "cpu"), SPEC, policy("reject"))
    assert found == replace(validated, suspects=found.suspects)
    assert table(validated, found.suspects)["deviations"].tolist() == [0] * n
