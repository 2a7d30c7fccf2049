"""Data sets listed, prepared and judged when nothing is wrong with them: layouts, pairing, rows, shards, resuming."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from PIL import Image

from storage.datasets import DATASETS, list_samples
from storage.errors import DatasetError, OutsideRoot
from storage.files import read_image
from storage.listing import Listing, inside
from storage.samples import content_hash, from_parquet
from storage.store import Store
from tasks import prepare as prepare_module
from tasks.core.handles import Prepared
from tasks.ingest import ingest
from tasks.prepare import COLUMNS, prepare
from tasks.validate import expectations, findings, validate


def picture(path: Path, seed: int, *, size: int = 32, colour: bool = False) -> Path:
    shape = (size, size, 3) if colour else (size, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def mask(path: Path, size: int = 32, columns: int = 8) -> Path:
    values = np.zeros((size, size), np.uint8)
    values[:, :columns] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two categories; `tile` is colour, has a validation split, and its masks are not in the order of its images."""
    root = tmp_path / "data"
    for i in range(3):
        picture(root / f"grid/train/good/{i:03}.png", i)
    picture(root / "grid/test/good/000.png", 10)
    picture(root / "grid/test/bent/000.png", 11)
    mask(root / "grid/ground_truth/bent/000_mask.png")
    for i in range(3):
        picture(root / f"tile/train/good/{i}.PNG", 20 + i, colour=True)
    picture(root / "tile/validation/good/0.jpg", 30, colour=True)
    for i, name in enumerate(["a.png", "b.bmp", "c.png"]):
        picture(root / f"tile/test/crack/{name}", 40 + i, colour=True)
    mask(root / "tile/ground_truth/crack/c.tif", columns=4)  # pairs by stem: the first mask is not the first image's
    mask(root / "tile/ground_truth/crack/a_mask.png", columns=16)
    (root / "readme.txt").write_text("about")
    (root / "tile/license.txt").write_text("licence")
    (root / "tile/train/good/Thumbs.db").write_text("x")
    picture(root / "tile/train/good/.hidden.png", 99)
    return root


def by_path(listing: Listing) -> dict[str, object]:
    return {sample.path: sample for sample in listing.samples}


def test_mvtec_ad_layout(tree):
    listing = list_samples("mvtec_ad", tree)
    assert listing.problems == {}
    assert listing.set_aside == []
    assert [s.path for s in listing.samples] == sorted(s.path for s in listing.samples)
    assert {s.category for s in listing.samples} == {"grid", "tile"}
    found = by_path(listing)
    assert len(found) == 12
    good = found["grid/train/good/001.png"]
    assert (good.split, good.label, good.defect_type, good.mask_state) == ("train", "good", "good", "no defect")
    assert good.id == content_hash((tree / good.path).read_bytes())
    assert found["tile/validation/good/0.jpg"].split == "validation"
    bent = found["grid/test/bent/000.png"]
    assert (bent.split, bent.label, bent.defect_type) == ("test", "anomalous", "bent")
    assert bent.mask == "grid/ground_truth/bent/000_mask.png"
    assert bent.mask_id == content_hash((tree / bent.mask).read_bytes())


def test_masks_pair_by_stem_never_by_position(tree):
    found = by_path(list_samples("mvtec_ad", tree, ["tile"]))
    assert found["tile/test/crack/a.png"].mask == "tile/ground_truth/crack/a_mask.png"
    assert found["tile/test/crack/b.bmp"].mask is None
    assert found["tile/test/crack/b.bmp"].mask_state == "unknown"
    assert found["tile/test/crack/c.png"].mask == "tile/ground_truth/crack/c.tif"


def test_masks_and_images_without_a_place_are_set_aside_with_the_reason(tree):
    mask(tree / "grid/ground_truth/bent/777_mask.png")
    mask(tree / "grid/ground_truth/bent/000.png")
    mask(tree / "grid/ground_truth/rust/000_mask.png")
    picture(tree / "grid/train/other/5.png", 60)
    picture(tree / "grid/test/6.png", 61)
    (tree / "grid/test/bent/more").mkdir()
    listing = list_samples("mvtec_ad", tree, ["grid"])
    reasons = {entry.path: entry.reason for entry in listing.set_aside}
    assert set(reasons) == {
        "grid/ground_truth/bent/777_mask.png",
        "grid/ground_truth/bent/000.png",
        "grid/ground_truth/rust/000_mask.png",
        "grid/train/other",
        "grid/test/6.png",
        "grid/test/bent/more",
    }
    assert "none has its stem" in reasons["grid/ground_truth/bent/777_mask.png"]
    assert "no folder test/rust" in reasons["grid/ground_truth/rust/000_mask.png"]
    assert "only train/good" in reasons["grid/train/other"]
    assert len(listing.samples) == 5


def test_the_root_may_be_one_category(tree):
    listing = list_samples("mvtec_ad", tree / "grid")
    assert {s.category for s in listing.samples} == {"grid"}
    assert listing.samples[-1].path == "train/good/002.png"
    with pytest.raises(DatasetError, match="unknown category 'tile'; known: grid"):
        list_samples("mvtec_ad", tree / "grid", ["tile"])


def test_folder_takes_the_same_tree(tree):
    listing = list_samples("folder", tree)
    assert {s.dataset for s in listing.samples} == {"folder"}
    assert [s.id for s in listing.samples] == [s.id for s in list_samples("mvtec_ad", tree).samples]
    with pytest.raises(DatasetError, match="leave it out"):
        list_samples("folder", tree, options={"inspect": str(tree / "grid")})
    with pytest.raises(DatasetError, match="mvtec_ad was given the option 'inspect', but takes none"):
        list_samples("mvtec_ad", tree, options={"inspect": str(tree / "grid")})


@pytest.mark.parametrize("where", ["beside", "within", "far"])
def test_a_plain_folder_and_one_to_inspect(tmp_path, where):
    good = tmp_path / "parts" / "gear"
    inspect = {"beside": tmp_path / "parts/new", "within": good / "new", "far": tmp_path / "a/b/new"}[where]
    for i in range(2):
        picture(good / f"{i}.png", i)
    picture(inspect / "x.png", 5)
    listing = list_samples("folder", good, options={"inspect": str(inspect)})
    assert listing.set_aside == []
    found = {s.path.rsplit("/", 1)[-1]: s for s in listing.samples}
    assert (found["0.png"].split, found["0.png"].label) == ("train", "good")
    x = found["x.png"]
    assert (x.split, x.label, x.defect_type, x.category) == ("test", "unknown", "unknown", "gear")
    for sample in listing.samples:
        assert read_image(listing.root, sample, listing.folders)


def test_a_plain_folder_stays_within_the_two_folders_given(tmp_path):
    good, inspect = tmp_path / "parts/good", tmp_path / "parts/new"
    for i in range(2):
        picture(good / f"{i}.png", i)
    picture(inspect / "x.png", 5)
    secret = picture(tmp_path / "parts/secret/y.png", 6)  # inside the common parent, but nobody gave it
    (inspect / "y.png").symlink_to(secret)
    listing = list_samples("folder", good, options={"inspect": str(inspect)})
    assert [(e.path, "outside of the data set" in e.reason) for e in listing.set_aside] == [("new/y.png", True)]
    with pytest.raises(OutsideRoot, match="outside of the data set"):
        inside(listing.root, "new/y.png", listing.folders)


def test_plain_folders_that_make_no_sense_get_a_helpful_error(tmp_path):
    good = picture(tmp_path / "good/0.png", 0).parent
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"understood are: .*train/good.*`inspect`"):
        list_samples("folder", good)
    with pytest.raises(DatasetError, match="holds no image"):
        list_samples("folder", good, options={"inspect": str(tmp_path / "empty")})
    with pytest.raises(DatasetError, match="holds no image"):
        list_samples("folder", tmp_path / "empty", options={"inspect": str(good)})
    with pytest.raises(DatasetError, match="give two folders"):
        list_samples("folder", good, options={"inspect": str(good)})
    with pytest.raises(DatasetError, match="is not a folder"):
        list_samples("folder", good, options={"inspect": str(tmp_path / "nowhere")})
    with pytest.raises(DatasetError, match="is not a folder"):
        list_samples("mvtec_ad", tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="no train/good"):
        list_samples("mvtec_ad", tmp_path)


def test_the_table_is_sorted_and_an_unknown_name_gets_the_nearest(tree):
    assert list(DATASETS) == sorted(DATASETS)
    with pytest.raises(DatasetError, match="did you mean mvtec_ad") as error:
        list_samples("mvtec", tree)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_ingest_names_catalogues_by_content(tree, tmp_path):
    store = Store(str(tmp_path / "store"))
    first = ingest.fn(store.url, "mvtec_ad", str(tree))
    assert first.problems == {}
    assert [c.category for c in first.categories] == ["grid", "tile"]
    moved = tmp_path / "moved"
    os.rename(tree, moved)
    again = ingest.fn(store.url, "mvtec_ad", str(moved))
    for one, other in zip(first.categories, again.categories, strict=True):
        assert (one.catalogue, one.fingerprint) == (other.catalogue, other.fingerprint)
        assert one.root != other.root
    meta = store.get(first.categories[1].catalogue).meta
    assert meta["counts"] == {"train": 3, "validation": 1, "test_anomalous": 3, "without_mask": 1}
    assert str(tmp_path) not in str(meta)
    picture(moved / "grid/train/good/000.png", 77)
    changed = ingest.fn(store.url, "mvtec_ad", str(moved), ["grid"])
    assert changed.categories[0].fingerprint != first.categories[0].fingerprint
    assert pickle.loads(pickle.dumps(changed)) == changed


def prepared_parts(prepared: Prepared) -> tuple[np.ndarray, pd.DataFrame, dict]:
    store = Store(prepared.category.store)
    artifact = store.get(prepared.images)
    images = zarr.open_array(store.zarr_store(f"{artifact.folder}/images"), mode="r")
    facts = pd.read_parquet(io.BytesIO(store.read_bytes(f"{artifact.folder}/facts.parquet")))
    return images, facts, artifact.meta


@pytest.mark.parametrize("memory", [False, True])
def test_prepare_keeps_rows_in_catalogue_order(tree, tmp_path, memory):
    url = f"memory://{tmp_path.name}" if memory else str(tmp_path / "store")
    grid, tile = ingest.fn(url, "mvtec_ad", str(tree)).categories
    for category, channels in ((grid, 1), (tile, 3)):
        images, facts, meta = prepared_parts(prepare.fn(category, 32))
        samples = from_parquet(Store(url).read_bytes(f"{Store(url).get(category.catalogue).folder}/samples.parquet"))
        assert images.shape == (len(samples), 32, 32, channels)
        assert images.dtype == np.uint8
        assert meta["channels"] == channels
        assert meta["ids"] == [s.id for s in samples] == list(facts["id"])
        assert list(facts.columns) == list(COLUMNS)
        for row, sample in enumerate(samples):
            if not sample.path.endswith(".jpg"):
                pixels = np.asarray(Image.open(tree / sample.path)).reshape(32, 32, channels)
                np.testing.assert_array_equal(images[row], pixels)  # stored at its own size: nothing to resize
                assert facts["brightness"][row] == pytest.approx(pixels.mean())
                assert facts["contrast"][row] == pytest.approx(pixels.std())
        masked = facts[facts["mask_state"] == "file"]
        assert masked["mask_fraction"].tolist() == ([0.25] if channels == 1 else [0.5, 0.125])


def test_prepare_writes_many_shards_in_order(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHUNK", 2)
    monkeypatch.setattr(prepare_module, "SHARD", 4)
    for i in range(3, 12):
        picture(tree / f"grid/train/good/{i:03}.png", i)
    (category,) = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tree), ["grid"]).categories
    images, facts, _ = prepared_parts(prepare.fn(category, 32))
    assert (images.shards, images.chunks) == ((4, 32, 32, 1), (2, 32, 32, 1))
    for row, path in enumerate(facts["path"]):
        np.testing.assert_array_equal(images[row, ..., 0], np.asarray(Image.open(tree / path)))


def test_one_colour_image_makes_the_category_colour(tree, tmp_path):
    picture(tree / "grid/test/good/900.png", 5, colour=True)
    (category,) = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tree), ["grid"]).categories
    images, facts, meta = prepared_parts(prepare.fn(category, 32))
    assert meta["channels"] == 3
    gray = images[facts["path"].tolist().index("grid/train/good/000.png")]
    assert (gray == gray[..., :1]).all()


def test_what_is_done_is_not_done_again(tree, tmp_path, monkeypatch):
    (category,) = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tree), ["grid"]).categories
    prepared = prepare.fn(category, 32)
    validated = validate.fn(prepared)

    def forbidden(*_: object) -> None:
        raise AssertionError("was done again")

    monkeypatch.setattr(prepare_module, "read_image", forbidden)
    monkeypatch.setattr(expectations, "_great_expectations", forbidden)  # nor is it imported
    assert prepare.fn(category, 32) == prepared
    assert validate.fn(prepared) == validated
    with pytest.raises(AssertionError, match="done again"):
        prepare.fn(category, 16)


def test_a_file_changed_since_it_was_listed_is_no_other_file(tree, tmp_path):
    store = Store(str(tmp_path / "store"))
    (category,) = ingest.fn(store.url, "mvtec_ad", str(tree), ["grid"]).categories
    picture(tree / "grid/train/good/001.png", 1234)
    with pytest.raises(DatasetError, match=r"train/good/001\.png .* has changed since it was listed"):
        prepare.fn(category, 32)
    assert store.list("images") == []


def test_a_link_out_of_the_root_is_not_followed_after_listing_either(tree, tmp_path):
    (category,) = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tree), ["grid"]).categories
    file = tree / "grid/train/good/001.png"
    file.rename(tmp_path / "outside.png")
    file.symlink_to(tmp_path / "outside.png")
    with pytest.raises(OutsideRoot, match=r"001\.png leads to"):
        prepare.fn(category, 32)


def test_clean_data_is_accepted_whole(tree, tmp_path):
    store = Store(str(tmp_path / "store"))
    for category in ingest.fn(store.url, "mvtec_ad", str(tree)).categories:
        validated = validate.fn(prepare.fn(category, 32))
        verdict = store.get(validated.verdict)
        samples = from_parquet(store.read_bytes(f"{verdict.folder}/samples.parquet"))
        listed = from_parquet(store.read_bytes(f"{store.get(category.catalogue).folder}/samples.parquet"))
        assert samples == listed
        assert validated.fingerprint == category.fingerprint == verdict.meta["fingerprint"]
        assert (verdict.meta["accepted"], verdict.meta["rejected"]) == (len(samples), 0)
        assert verdict.meta["stop"] is None
        # These names are published ones, and a miniature has fewer images; in `tile` some files are in another format.
        told = findings(store, validated.verdict).groupby("rule")["path"].agg(list).to_dict()
        tile = {"usual_format": ["tile/test/crack/b.bmp", "tile/validation/good/0.jpg"]}
        tile |= {"mask_known": ["tile/test/crack/b.bmp"]}
        assert told == {"published_counts": [""] * 3} | (tile if category.category == "tile" else {})
        assert verdict.meta["warned"] == (2 if category.category == "tile" else 0)
        failed = {e["name"]: e["unexpected"] for e in verdict.meta["expectations"] if not e["success"]}
        assert failed == {rule: len(paths) for rule, paths in told.items()}
        assert {e["severity"] for e in verdict.meta["expectations"]} == {"reject", "warn", "stop"}


def test_images_to_inspect_lack_no_mask(tmp_path):
    for i in range(3):
        picture(tmp_path / f"gear/{i}.png", i)
    picture(tmp_path / "new/x.png", 5)
    store = Store(str(tmp_path / "store"))
    (category,) = ingest.fn(
        store.url, "folder", str(tmp_path / "gear"), None, {"inspect": str(tmp_path / "new")}
    ).categories
    verdict = store.get(validate.fn(prepare.fn(category, 16)).verdict).meta
    assert (verdict["accepted"], verdict["warned"]) == (4, 0)


def test_an_image_size_that_is_none_is_refused(tree, tmp_path):
    (category,) = ingest.fn(str(tmp_path / "store"), "mvtec_ad", str(tree), ["grid"]).categories
    with pytest.raises(ValueError, match="image size 0"):
        prepare.fn(category, 0)
