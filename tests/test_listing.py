"""What lies in a folder: masks beside images, names as people see them, files that are not read, links, other words."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.datasets import list_samples
from storage.errors import DatasetError
from storage.listing import Listing


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32), dtype=np.uint8)).save(path)
    return path


def mask(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((32, 32), np.uint8)
    values[4:9, 4:9] = 255
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def part(tmp_path: Path) -> Path:
    root = tmp_path / "part"
    for i in range(3):
        picture(root / f"train/good/{i:03}.png", i)
    picture(root / "test/good/000.png", 10)
    return root


def listed(root: Path, **options: Any) -> Listing:
    return list_samples("folder", root, None, options)


def of(listing: Listing, folder: str) -> dict[str, tuple[str, str | None]]:
    """Image of a folder -> label and mask."""
    return {s.path: (s.label, s.mask) for s in listing.samples if s.path.startswith(f"{folder}/")}


def aside(listing: Listing) -> dict[str, str]:
    return {entry.path: entry.reason for entry in listing.set_aside}


DESCRIBED = {
    "train": "train/good/*",
    "test": "test/{defect_type}/*",
    "mask": "ground_truth/{defect_type}/{stem}_mask.png",
}


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    "name",
    ["a_mask.png", "a-GT.bmp", "a.mask.png", "a_label.tif", "mask_a.png", "a_ground_truth.png", "a_Segmentation.png"],
)
def test_masks_beside_images_are_masks(part: Path, name: str, described: bool) -> None:
    picture(part / "test/dent/a.png", 20)
    mask(part / "test/dent" / name)
    mask(part / "test/good/000_mask.png")
    mask(part / "train/good/001_mask.png")
    options = {"train": "train/good/*", "test": "test/{defect_type}/*"} if described else {}
    found = listed(part, **options)
    assert of(found, "test/dent") == {"test/dent/a.png": ("anomalous", f"test/dent/{name}")}
    assert len(of(found, "test/good")) == 1
    assert len(of(found, "train/good")) == 3
    assert aside(found).keys() == {"test/good/000_mask.png", "train/good/001_mask.png"}
    assert all("a mask of" in reason for reason in aside(found).values())


def test_a_drawn_file_of_an_images_stem_is_its_mask_and_two_masks_are_told(part: Path) -> None:
    picture(part / "test/dent/a.jpg", 20)
    mask(part / "test/dent/a.png")
    picture(part / "test/dent/b.png", 21)
    mask(part / "test/dent/b_mask_0.png")
    mask(part / "test/dent/b_mask_1.png")
    found = listed(part)
    assert of(found, "test/dent") == {
        "test/dent/a.jpg": ("anomalous", "test/dent/a.png"),
        "test/dent/b.png": ("anomalous", None),
    }
    assert aside(found).keys() == {"test/dent/b_mask_0.png", "test/dent/b_mask_1.png"}
    assert all("there are 2; unite them" in reason for reason in aside(found).values())


def test_a_product_called_mask_is_no_mask(part: Path) -> None:
    for name in ("blue_mask.png", "red_mask.png", "label_7.png"):
        picture(part / "test/dent" / name, len(name))
    found = listed(part)
    assert len(of(found, "test/dent")) == 3
    assert found.set_aside == []


def test_a_plain_folder_leaves_masks_out_and_tells(tmp_path: Path) -> None:
    for name in ("good/a.png", "good/b.png", "new/c.png"):
        picture(tmp_path / name)
    mask(tmp_path / "new/c_mask.png")
    (tmp_path / "new/notes.txt").write_text("x")
    found = listed(tmp_path / "good", inspect=str(tmp_path / "new"))
    assert [s.path for s in found.samples] == ["good/a.png", "good/b.png", "new/c.png"]
    assert aside(found).keys() == {"new", "new/c_mask.png"}


@pytest.mark.parametrize("described", [False, True])
def test_a_mask_of_two_images_of_one_stem_is_nobodys(part: Path, described: bool) -> None:
    picture(part / "test/dent/000.png", 20)
    picture(part / "test/dent/000.jpg", 21)
    picture(part / "test/dent/001.png", 22)
    for name in ("000_mask.png", "001_mask.png"):
        mask(part / "ground_truth/dent" / name)
    found = listed(part, **(DESCRIBED if described else {}))
    assert {path: mask for path, (_, mask) in of(found, "test/dent").items()} == {
        "test/dent/000.png": None,
        "test/dent/000.jpg": None,
        "test/dent/001.png": "ground_truth/dent/001_mask.png",
    }
    assert (
        "test/dent/000.jpg or test/dent/000.png, which share a stem" in aside(found)["ground_truth/dent/000_mask.png"]
    )


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    ("image", "named"),
    [
        ("Größe_1.png", unicodedata.normalize("NFD", "Größe_1_mask.png")),
        (unicodedata.normalize("NFD", "Größe_1.png"), "Größe_1_mask.png"),
        ("a.png", "A_MASK.png"),
        ("IMG_7.png", "img_7_Mask.png"),
    ],
)
def test_masks_are_found_by_names_as_people_see_them(part: Path, image: str, named: str, described: bool) -> None:
    picture(part / "test/dent" / image, 20)
    mask(part / "ground_truth/dent" / named)
    found = listed(part, **(DESCRIBED if described else {}))
    assert of(found, "test/dent") == {f"test/dent/{image}": ("anomalous", f"ground_truth/dent/{named}")}


def test_names_that_differ_in_case_alone_are_told_apart(part: Path) -> None:
    picture(part / "test/dent/a.png", 20)
    picture(part / "test/dent/A.png", 21)
    if len(os.listdir(part / "test/dent")) < 2:
        pytest.skip("the file system does not tell them apart")
    mask(part / "ground_truth/dent/a_mask.png")
    found = of(listed(part), "test/dent")
    assert found["test/dent/a.png"][1] == "ground_truth/dent/a_mask.png"
    assert found["test/dent/A.png"][1] is None


@pytest.mark.parametrize("truth", ["masks", "Ground Truth", "gt", "ground_truth"])
def test_folders_of_masks_are_known_by_other_words(part: Path, truth: str) -> None:
    picture(part / "test/Dent/a.png", 20)
    mask(part / truth / "dent/a_mask.png")
    assert of(listed(part), "test/Dent") == {"test/Dent/a.png": ("anomalous", f"{truth}/dent/a_mask.png")}


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("word", ["ok", "OK", "Good", "normal", "0", "No-Defect"])
def test_images_of_a_kind_that_may_mean_good_are_unknown_until_somebody_says(
    part: Path, word: str, described: bool
) -> None:
    picture(part / f"test/{word}/a.png", 20)
    picture(part / "test/dent/a.png", 21)
    rule = DESCRIBED if described else {}
    assert of(listed(part, **rule), f"test/{word}") == {f"test/{word}/a.png": ("unknown", None)}
    for given in (word, [word], int(word) if word == "0" else word):
        assert of(listed(part, good=given, **rule), f"test/{word}") == {f"test/{word}/a.png": ("good", None)}
    assert of(listed(part, good=[], **rule), f"test/{word}") == {f"test/{word}/a.png": ("anomalous", None)}
    assert of(listed(part, **rule), "test/dent") == {"test/dent/a.png": ("anomalous", None)}


def test_a_kind_with_masks_is_a_defect_whatever_it_is_called(part: Path) -> None:
    picture(part / "test/0/a.png", 20)
    mask(part / "ground_truth/0/a_mask.png")
    assert of(listed(part), "test/0") == {"test/0/a.png": ("anomalous", "ground_truth/0/a_mask.png")}


@pytest.mark.parametrize("described", [False, True])
def test_files_that_are_not_read_are_counted(part: Path, described: bool) -> None:
    for i in range(3):
        (part / f"train/good/{i}.heic").write_bytes(b"x")
    (part / "train/good/7").write_bytes(b"x")
    (part / "train/good/Thumbs.db").write_bytes(b"x")
    (part / "test/good/._000.png").write_bytes(b"x")
    (part / "test/good/000.json").write_text("{}")
    (part / "README.md").write_text("about")
    found = listed(part, **({"train": "train/good/*", "test_good": "test/good/*"} if described else {}))
    told = {(entry.path, entry.files): entry.reason for entry in found.set_aside}
    assert told.keys() == {("train/good", 3), ("train/good", 1), ("test/good", 1)}
    assert "3 files ending in .heic not read, the first: '0.heic'" in told["train/good", 3]
    assert len(of(found, "train/good")) == 3


@pytest.mark.parametrize("ending", [".gif", ".pgm", ".tga", ".jp2", ".avif", ".jfif", ".JPE"])
def test_images_of_rarer_formats_are_listed(part: Path, ending: str) -> None:
    picture(part / "train/good/a.png").rename(part / f"train/good/a{ending}")
    assert f"train/good/a{ending}" in of(listed(part), "train/good")


def test_what_archivers_leave_behind_is_no_category(part: Path) -> None:
    (part.parent / "__MACOSX/part").mkdir(parents=True)
    (part.parent / "@eaDir").mkdir()
    found = list_samples("folder", part.parent)
    assert (found.problems, found.set_aside) == ({}, [])
    assert {s.category for s in found.samples} == {"part"}


@pytest.mark.parametrize("described", [False, True])
def test_links_may_lead_to_the_folders_that_are_named(part: Path, tmp_path: Path, described: bool) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    for i in range(2):
        picture(cache / f"{i}.png", 30 + i)
        os.symlink(cache / f"{i}.png", part / f"train/good/link{i}.png")
    picture(other / "2.png", 40)
    os.symlink(other / "2.png", part / "train/good/link2.png")
    os.symlink(cache, part / "test/dent")
    rule = DESCRIBED if described else {}
    strict = listed(part, **rule)
    assert len(of(strict, "train/good")) == 3
    assert "links_to = " in aside(strict)["train/good/link0.png"]
    found = listed(part, links_to="../cache", **rule)
    assert set(of(found, "train/good")) == {f"train/good/{n}.png" for n in ("000", "001", "002", "link0", "link1")}
    assert len(of(found, "test/dent")) == 2
    assert "outside of the data set" in aside(found)["train/good/link2.png"]
    assert all(s.id for s in found.samples)
    with pytest.raises(DatasetError, match="links_to"):
        listed(part, links_to="../nowhere", **rule)


def test_a_folder_can_be_given_a_name(part: Path, tmp_path: Path) -> None:
    picture(tmp_path / "new/a.png", 50)
    assert {s.category for s in listed(part, category="gear").samples} == {"gear"}
    plain = list_samples("folder", part / "train/good", None, {"inspect": str(tmp_path / "new"), "category": "line_a"})
    assert {s.category for s in plain.samples} == {"line_a"}
    with pytest.raises(DatasetError, match="several categories"):
        list_samples("folder", part.parent, None, {"category": "gear"})
    with pytest.raises(DatasetError, match="without slashes"):
        listed(part, category="a/b")


def test_a_rule_for_masks_can_be_said_of_a_tree(part: Path) -> None:
    picture(part / "test/dent/a.png", 20)
    mask(part / "ground_truth/dent/a.png")
    (found,) = [s for s in listed(part, mask_rule="values:0").samples if s.mask]
    assert found.mask_rule == "values:0"
    with pytest.raises(DatasetError, match="unknown mask_rule 'inverse'"):
        listed(part, mask_rule="inverse")
