"""BTAD and MPDD in miniature, in their published layouts."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.datasets import about, list_samples
from storage.errors import DatasetError
from storage.listing import Listing
from storage.masks import read_mask
from storage.samples import content_hash

SIZE = (24, 32)  # height, width
Tree = dict[str, np.ndarray]
"""Path -> pixels."""


def images(*paths: str) -> Tree:
    return {
        path: np.random.default_rng(sum(path.encode())).integers(0, 256, (*SIZE, 3), dtype=np.uint8) for path in paths
    }


def marked(columns: slice) -> np.ndarray:
    values = np.zeros(SIZE, np.uint8)
    values[:, columns] = 255
    return values


def write(root: Path, tree: Tree, order: int | None = None) -> Path:
    paths = sorted(tree)
    if order is not None:
        random.Random(order).shuffle(paths)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tree[path]).save(root / path)
    return root


def btad_tree() -> Tree:
    """Images are .bmp in 01 and 03, masks in 03; 01 has a mask less than images, and they are out of step."""
    tree = images(
        *(f"01/{folder}/000{i}.bmp" for folder in ("train/ok", "test/ok", "test/ko") for i in (0, 1)),
        *(f"02/{folder}/000{i}.png" for folder in ("train/ok", "test/ok", "test/ko") for i in (0, 1)),
        *(f"03/{folder}/000{i}.bmp" for folder in ("train/ok", "test/ok", "test/ko") for i in (0, 1)),
    )
    tree["01/ground_truth/ko/0001.png"] = marked(slice(0, 5))
    for i in (0, 1):
        tree[f"02/ground_truth/ko/000{i}.png"] = marked(slice(i, i + 2))
        tree[f"03/ground_truth/ko/000{i}.bmp"] = marked(slice(i + 10, i + 13))
    return tree


def mpdd_tree() -> Tree:
    tree = images(
        "connector/train/good/000.png",
        "connector/test/good/000.png",
        "connector/test/parts_mismatch/000.png",
        "connector/test/parts_mismatch/001.png",
        "tubes/train/good/000.png",
        "tubes/test/good/000.png",
        "tubes/test/anomalous/000.png",
    )
    tree["connector/ground_truth/parts_mismatch/001_mask.png"] = marked(slice(7, 9))
    tree["tubes/ground_truth/anomalous/000_mask.png"] = marked(slice(0, 3))
    return tree


def rows(listing: Listing) -> list[tuple[str, str, str, str, str | None]]:
    return [(s.path, s.split, s.label, s.defect_type, s.mask) for s in listing.samples]


def mask_of(listing: Listing, path: str) -> np.ndarray:
    sample = next(sample for sample in listing.samples if sample.path == path)
    return read_mask(listing.root, sample, listing.folders)


def check_ids(listing: Listing) -> None:
    for sample in listing.samples:
        assert sample.id == content_hash((listing.root / sample.path).read_bytes())
        wanted = None if sample.mask is None else content_hash((listing.root / sample.mask).read_bytes())
        assert sample.mask_id == wanted


def test_btad_index(tmp_path):
    listing = list_samples("btad", write(tmp_path, btad_tree()))
    expected = []
    masks = {
        "01": [None, "01/ground_truth/ko/0001.png"],
        "02": ["02/ground_truth/ko/0000.png", "02/ground_truth/ko/0001.png"],
        "03": ["03/ground_truth/ko/0000.bmp", "03/ground_truth/ko/0001.bmp"],
    }
    for category, suffix in (("01", "bmp"), ("02", "png"), ("03", "bmp")):
        for i in (0, 1):
            path = f"{category}/test/ko/000{i}.{suffix}"
            expected.append((path, "test", "anomalous", "ko", masks[category][i]))
        expected += [(f"{category}/test/ok/000{i}.{suffix}", "test", "good", "good", None) for i in (0, 1)]
        expected += [(f"{category}/train/ok/000{i}.{suffix}", "train", "good", "good", None) for i in (0, 1)]
    assert rows(listing) == expected
    assert (listing.set_aside, listing.problems) == ([], {})
    assert listing.samples[0].mask_state == "unknown"
    check_ids(listing)
    np.testing.assert_array_equal(mask_of(listing, "01/test/ko/0001.bmp"), marked(slice(0, 5)) > 0)
    np.testing.assert_array_equal(mask_of(listing, "03/test/ko/0001.bmp"), marked(slice(11, 14)) > 0)


def test_btad_root_is_the_archive_its_folder_or_a_category(tmp_path):
    root = write(tmp_path / "BTech_Dataset_transformed", btad_tree())
    straight = list_samples("btad", root)
    assert list_samples("btad", tmp_path).samples == straight.samples
    inner = list_samples("btad", root / "03")
    assert [f"03/{s.path}" for s in inner.samples] == [s.path for s in straight.samples if s.category == "03"]
    assert {s.category for s in inner.samples} == {"03"}


def test_btad_strays_and_masks_of_nothing_are_set_aside(tmp_path):
    write(tmp_path, btad_tree())
    stray = {
        "01/ground_truth/ko/0009.png": marked(slice(0, 1)),
        "02/ground_truth/ko/0001.tif": marked(slice(0, 1)),  # a second mask for one image
        "02/ground_truth/ok/0000.png": marked(slice(0, 0)),
        "03/test/0000.bmp": marked(slice(0, 1)),
        "03/train/ko/0000.bmp": marked(slice(0, 1)),
    }
    write(tmp_path, stray)
    listing = list_samples("btad", tmp_path)
    whole = {"02/ground_truth/ok/0000.png": "02/ground_truth/ok", "03/train/ko/0000.bmp": "03/train/ko"}
    expected = [(p[:2], whole.get(p, p)) for p in sorted(stray)]
    assert [(entry.category, entry.path) for entry in listing.set_aside] == expected
    why = {entry.path: entry.reason for entry in listing.set_aside}
    assert "no image of test/ko was paired with it" in why["01/ground_truth/ko/0009.png"]
    assert "another mask came first" in why["02/ground_truth/ko/0001.tif"]
    assert "only train/ok, test/ok, test/ko are read" in why["03/train/ko"]
    assert "what lies in it is not read (images: 1)" in why["03/train/ko"]


def test_mpdd_index(tmp_path):
    listing = list_samples("mpdd", write(tmp_path, mpdd_tree()))
    mask = "connector/ground_truth/parts_mismatch/001_mask.png"
    assert rows(listing) == [
        ("connector/test/good/000.png", "test", "good", "good", None),
        ("connector/test/parts_mismatch/000.png", "test", "anomalous", "parts_mismatch", None),
        ("connector/test/parts_mismatch/001.png", "test", "anomalous", "parts_mismatch", mask),
        ("connector/train/good/000.png", "train", "good", "good", None),
        ("tubes/test/anomalous/000.png", "test", "anomalous", "anomalous", "tubes/ground_truth/anomalous/000_mask.png"),
        ("tubes/test/good/000.png", "test", "good", "good", None),
        ("tubes/train/good/000.png", "train", "good", "good", None),
    ]
    assert {s.dataset for s in listing.samples} == {"mpdd"}
    assert (listing.set_aside, listing.problems) == ([], {})
    check_ids(listing)
    np.testing.assert_array_equal(mask_of(listing, "connector/test/parts_mismatch/001.png"), marked(slice(7, 9)) > 0)


def test_mpdd_root_may_be_around_the_data_set_or_one_category(tmp_path):
    root = write(tmp_path / "MPDD", mpdd_tree())
    straight = list_samples("mpdd", root)
    assert list_samples("mpdd", tmp_path).samples == straight.samples
    assert {s.category for s in list_samples("mpdd", root / "tubes").samples} == {"tubes"}
    write(tmp_path / "MPDD (1)", mpdd_tree())
    with pytest.raises(DatasetError, match="several data sets"):
        list_samples("mpdd", tmp_path)


TREES = {"btad": btad_tree, "mpdd": mpdd_tree}
TRAIN = {"btad": "train/ok", "mpdd": "train/good"}
each_dataset = pytest.mark.parametrize("dataset", sorted(TREES))


@each_dataset
def test_index_is_the_same_in_any_order_of_files(tmp_path, dataset):
    there = list_samples(dataset, write(tmp_path / "a", TREES[dataset](), order=1))
    write(tmp_path / "b", TREES[dataset](), order=2)
    here = list_samples(dataset, tmp_path / "b")
    assert (here.samples, here.set_aside) == (there.samples, there.set_aside)


@each_dataset
def test_categories_can_be_chosen(tmp_path, dataset):
    listing = list_samples(dataset, write(tmp_path, TREES[dataset]()))
    last = max(sample.category for sample in listing.samples)
    chosen = list_samples(dataset, tmp_path, [last])
    assert chosen.samples == [sample for sample in listing.samples if sample.category == last]
    with pytest.raises(DatasetError, match="unknown category"):
        list_samples(dataset, tmp_path, ["bottle"])


@each_dataset
def test_category_without_training_images_is_a_problem(tmp_path, dataset):
    tree = TREES[dataset]()
    lost = min(tree).split("/")[0]
    write(tmp_path, {path: pixels for path, pixels in tree.items() if not path.startswith(f"{lost}/train")})
    listing = list_samples(dataset, tmp_path)
    assert list(listing.problems) == [lost]
    assert f"{lost}/{TRAIN[dataset]} holds no image to learn from" in listing.problems[lost]
    assert lost not in {sample.category for sample in listing.samples}


@each_dataset
def test_wrong_folder_says_what_was_expected(tmp_path, dataset):
    write(tmp_path, images("a/b/c/000.png"))
    with pytest.raises(DatasetError) as error:
        list_samples(dataset, tmp_path)
    assert about(dataset).tree in str(error.value)


@pytest.mark.parametrize(("dataset", "categories", "downloads"), [("btad", 3, 1), ("mpdd", 6, 0)])
def test_facts_are_consistent(dataset, categories, downloads):
    facts = about(dataset)
    assert len(facts.categories) == categories
    assert tuple(facts.counts) == facts.categories
    assert facts.images == sum(sum(numbers.values()) for numbers in facts.counts.values())
    assert len(facts.downloads) == downloads
    assert all(len(bytes.fromhex(file.sha256)) == 32 for file in facts.downloads)
