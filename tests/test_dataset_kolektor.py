"""KolektorSDD and KolektorSDD2: published layouts in miniature."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.datasets import about, list_samples
from storage.errors import DatasetError
from storage.listing import Listing
from storage.masks import read_mask
from storage.readers import drawn
from storage.samples import Sample, content_hash

HEIGHT, WIDTH = 32, 24
CRACK = (slice(5, 9), slice(10, 20))
COMMUTATORS = [f"kos{number:02}" for number in range(1, 7)]


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH), np.uint8)
    Image.fromarray(pixels).save(path)


def write_label(path: Path, value: int) -> None:
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    label[CRACK] = value
    Image.fromarray(label).save(path)


def one(root: Path, backwards: bool = False) -> Path:
    """Six commutators of three surfaces, the last of which has a crack."""
    names = [(name, number) for name in COMMUTATORS for number in range(3)]
    for name, number in reversed(names) if backwards else names:
        image = root / name / f"Part{number}.jpg"
        write_image(image, seed=100 * COMMUTATORS.index(name) + number)
        write_label(image.with_name(f"Part{number}_label.bmp"), 1 if number == 2 else 0)
    return root


def two(root: Path, backwards: bool = False) -> Path:
    names = [("train", n) for n in (10000, 10001, 10301, 10302)] + [("test", n) for n in (20000, 20001)]
    for split, number in reversed(names) if backwards else names:
        image = root / split / f"{number}.png"
        write_image(image, seed=number)
        write_label(image.with_name(f"{number}_GT.png"), 255 if number in (10001, 20001) else 0)
    for name in ("10301", "10301_GT"):
        (root / "train" / f"{name} (copy).png").write_bytes((root / "train" / f"{name}.png").read_bytes())
    (root / "split_weakly_0.pyb").write_bytes(b"no image")
    return root


def rows(listing: Listing) -> list[tuple[object, ...]]:
    return [(s.path, s.category, s.split, s.label, s.defect_type, s.mask, s.mask_rule, s.part) for s in listing.samples]


def assert_named_by_content(listing: Listing) -> None:
    for sample in listing.samples:
        assert sample.id == content_hash((listing.root / sample.path).read_bytes())
        mask = None if sample.mask is None else content_hash((listing.root / sample.mask).read_bytes())
        assert sample.mask_id == mask


def mask_of(listing: Listing, sample: Sample) -> np.ndarray:
    return read_mask(listing.root, sample, listing.folders)


@pytest.mark.parametrize("seed", [0, 1])
def test_surfaces_of_a_commutator_stay_on_one_side(tmp_path: Path, seed: int) -> None:
    listing = list_samples("kolektorsdd", one(tmp_path), options={"seed": seed})
    training = drawn(COMMUTATORS, 2 / 3, seed)
    assert len(training) == 4
    expected: list[tuple[object, ...]] = []
    for name in COMMUTATORS:
        split = "train" if name in training else "test"
        for number in range(2):
            row = (f"{name}/Part{number}.jpg", "commutator", split, "good", "good", None, "auto", name)
            expected.append(row)
        if split == "test":
            mask = f"{name}/Part2_label.bmp"
            expected.append((f"{name}/Part2.jpg", "commutator", "test", "anomalous", "defect", mask, "nonzero", name))
    assert rows(listing) == expected
    assert listing.problems == {}
    assert {sample.dataset for sample in listing.samples} == {"kolektorsdd"}
    assert [entry.path for entry in listing.set_aside] == [f"{name}/Part2.jpg" for name in sorted(training)]
    assert all("training set" in entry.reason for entry in listing.set_aside)
    assert_named_by_content(listing)


def test_any_value_but_zero_is_the_crack(tmp_path: Path) -> None:
    listing = list_samples("kolektorsdd", one(tmp_path))
    cracked = [sample for sample in listing.samples if sample.label == "anomalous"]
    assert len(cracked) == 2
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[CRACK] = True
    for sample in cracked:
        np.testing.assert_array_equal(mask_of(listing, sample), expected)


def test_the_share_of_training_commutators_is_an_option(tmp_path: Path) -> None:
    listing = list_samples("kolektorsdd", one(tmp_path), options={"train_share": 0.5})
    assert len({sample.part for sample in listing.samples if sample.split == "train"}) == 3


def test_every_file_is_a_sample_or_set_aside(tmp_path: Path) -> None:
    one(tmp_path)
    (tmp_path / "kos01" / "Part0_label.bmp").unlink()
    (tmp_path / "kos01" / "Part1_label.bmp").write_bytes(b"BM, cut short")
    write_image(tmp_path / "kos02" / "overview.jpg", 1)
    write_image(tmp_path / "kos03" / "Part9_label.bmp", 2)
    write_image(tmp_path / "preview.png", 3)
    write_image(tmp_path / "extra" / "Part0.jpg", 4)
    listing = list_samples("kolektorsdd", tmp_path)
    reasons = {entry.path: entry.reason for entry in listing.set_aside}
    assert "it has no mask" in reasons["kos01/Part0.jpg"]
    assert "kos01/Part1_label.bmp: no image that can be read" in reasons["kos01/Part1.jpg"]
    assert "PartN.jpg and PartN_label.bmp" in reasons["kos02/overview.jpg"]
    assert "neither an image nor the mask of one" in reasons["kos03/Part9_label.bmp"]
    assert "PartN_label.bmp in folders kos01" in reasons["preview.png"]
    assert "what lies in it is not read" in reasons["extra"]
    cracked = [f"{name}/Part2.jpg" for name in drawn(COMMUTATORS, 2 / 3, 0)]
    assert set(reasons) == {
        "kos01/Part0.jpg",
        "kos01/Part1.jpg",
        "kos02/overview.jpg",
        "kos03/Part9_label.bmp",
        "preview.png",
        "extra",
        *cracked,
    }


def test_without_a_good_training_image_nothing_can_be_learned(tmp_path: Path) -> None:
    for name in COMMUTATORS[:2]:
        write_image(tmp_path / name / "Part0.jpg", seed=len(name))
        write_label(tmp_path / name / "Part0_label.bmp", 255)
    listing = list_samples("kolektorsdd", tmp_path)
    assert listing.samples == []
    assert "no good image" in listing.problems["commutator"]


def test_two_keeps_the_published_split(tmp_path: Path) -> None:
    listing = list_samples("kolektorsdd2", two(tmp_path))
    good = ("good", "good", None, "auto", None)
    assert rows(listing) == [
        ("test/20000.png", "surface", "test", *good),
        ("test/20001.png", "surface", "test", "anomalous", "defect", "test/20001_GT.png", "nonzero", None),
        ("train/10000.png", "surface", "train", *good),
        ("train/10301.png", "surface", "train", *good),
        ("train/10302.png", "surface", "train", *good),
    ]
    assert listing.problems == {}
    reasons = {entry.path: entry.reason for entry in listing.set_aside}
    assert set(reasons) == {"train/10001.png", "train/10301 (copy).png", "train/10301_GT (copy).png"}
    assert "defective image of the training set" in reasons["train/10001.png"]
    assert "NNNNN.png and NNNNN_GT.png" in reasons["train/10301_GT (copy).png"]
    assert_named_by_content(listing)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[CRACK] = True
    np.testing.assert_array_equal(mask_of(listing, listing.samples[1]), expected)


@pytest.mark.parametrize(("name", "make"), [("kolektorsdd", one), ("kolektorsdd2", two)])
def test_the_index_does_not_depend_on_the_order_of_files(tmp_path: Path, name: str, make) -> None:
    first, second = list_samples(name, make(tmp_path / "a")), list_samples(name, make(tmp_path / "b", backwards=True))
    assert first.samples == second.samples
    assert first.set_aside == second.set_aside


@pytest.mark.parametrize(("name", "make"), [("kolektorsdd", one), ("kolektorsdd2", two)])
def test_the_folder_around_it_may_be_given_when_that_is_unambiguous(tmp_path: Path, name: str, make) -> None:
    make(tmp_path / "archive")
    assert list_samples(name, tmp_path).samples == list_samples(name, tmp_path / "archive").samples
    make(tmp_path / "second")
    with pytest.raises(DatasetError, match=r"several data sets \(archive, second\); give one of these"):
        list_samples(name, tmp_path)


@pytest.mark.parametrize("name", ["kolektorsdd", "kolektorsdd2"])
def test_a_folder_in_another_layout_is_refused_with_the_expected_tree(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "train" / "good" / "000.png", 0)
    with pytest.raises(DatasetError, match=re.escape(about(name).tree)):
        list_samples(name, tmp_path)


@pytest.mark.parametrize(("name", "make", "inner"), [("kolektorsdd", one, "kos01"), ("kolektorsdd2", two, "train")])
def test_a_folder_within_it_is_refused(tmp_path: Path, name: str, make, inner: str) -> None:
    make(tmp_path)
    with pytest.raises(DatasetError, match="which it lies in, has: give it as root"):
        list_samples(name, tmp_path / inner)


@pytest.mark.parametrize(("name", "make"), [("kolektorsdd", one), ("kolektorsdd2", two)])
def test_the_only_category_may_be_named(tmp_path: Path, name: str, make) -> None:
    make(tmp_path)
    (category,) = about(name).categories
    assert list_samples(name, tmp_path, [category]).samples == list_samples(name, tmp_path).samples
    with pytest.raises(DatasetError, match="unknown category"):
        list_samples(name, tmp_path, ["bottle"])
