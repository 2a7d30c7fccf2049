"""RSDDs: tiles of rails, cut from the published layout in miniature."""

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
from storage.samples import content_hash, sample_id

WIDTHS = {"type_1": 16, "type_2": 8}
FOLDERS = {"type_1": "Type-I RSDDs dataset", "type_2": "Type-II RSDDs dataset"}
RAILS = [f"rail_{number}" for number in range(1, 6)]
IMAGES, MASKS = "Rail surface images", "GroundTruth"


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def write_rail(folder: Path, rail: str, width: int, height: int) -> None:
    """A rail whose second tile has a defect, its mask as JPEG with gray around the mark."""
    rng = np.random.default_rng([width, int(rail.split("_")[1])])
    save(folder / IMAGES / f"{rail}.jpg", rng.integers(0, 255, (height, width), np.uint8))
    mask = np.full((height, width), 20, np.uint8)
    mask[width + 2 : width + 6, 2:6] = 235
    save(folder / MASKS / f"{rail}.jpg", mask)


def make(root: Path, backwards: bool = False) -> Path:
    """Rails of 3 tiles and a rest of half a tile."""
    names = [(category, rail) for category in FOLDERS for rail in RAILS]
    for category, rail in reversed(names) if backwards else names:
        width = WIDTHS[category]
        write_rail(root / FOLDERS[category], rail, width, 3 * width + width // 2)
    return root


def boxes(width: int) -> list[str]:
    starts = [0, width, 2 * width, 2 * width + width // 2]  # the last tile ends with the rail
    return [f"0,{y},{width},{width}" for y in starts]


def rows(listing: Listing, category: str) -> set[tuple[object, ...]]:
    found = [sample for sample in listing.samples if sample.category == category]
    table = {
        (s.path, s.box, s.split, s.label, s.defect_type, s.mask, s.mask_rule if s.mask else "", s.part) for s in found
    }
    assert len(table) == len(found)
    return table


@pytest.mark.parametrize("category", ["type_1", "type_2"])
def test_good_tiles_of_drawn_rails_are_learned_from_and_all_tiles_of_others_judged(
    tmp_path: Path, category: str
) -> None:
    listing = list_samples("rsdds", make(tmp_path))
    training = drawn(RAILS, 0.6, 0)
    assert len(training) == 3
    expected = set()
    set_aside = []
    for rail in RAILS:
        path, mask = (f"{FOLDERS[category]}/{folder}/{rail}.jpg" for folder in (IMAGES, MASKS))
        split = "train" if rail in training else "test"
        first, second, *others = boxes(WIDTHS[category])
        expected |= {(path, box, split, "good", "good", None, "", rail) for box in (first, *others)}
        if split == "test":
            expected.add((path, second, "test", "anomalous", "defect", mask, "above:127", rail))
        else:
            set_aside.append(f"{path}[{second}]")
    assert rows(listing, category) == expected
    assert [entry.path for entry in listing.set_aside if entry.category == category] == set_aside
    assert all("a defective image of the training set" in entry.reason for entry in listing.set_aside)
    assert listing.problems == {}


def test_tiles_are_named_by_their_rail_and_box(tmp_path: Path) -> None:
    listing = list_samples("rsdds", make(tmp_path))
    for sample in listing.samples:
        assert sample.id == sample_id(content_hash((tmp_path / sample.path).read_bytes()), sample.box)
        mask = None if sample.mask is None else content_hash((tmp_path / sample.mask).read_bytes())
        assert sample.mask_id == mask
    assert len({sample.id for sample in listing.samples}) == len(listing.samples)


def test_the_mask_is_cut_to_its_tile(tmp_path: Path) -> None:
    listing = list_samples("rsdds", make(tmp_path), ["type_1"])
    defective = [sample for sample in listing.samples if sample.label == "anomalous"]
    assert len(defective) == 2
    for sample in defective:
        mask = read_mask(listing.root, sample, listing.folders)
        assert mask.shape == (16, 16)
        assert mask[3:5, 3:5].all()  # JPEG may move the border by a pixel
        mask[1:7, 1:7] = False
        assert not mask.any()


def test_the_side_of_tiles_is_an_option(tmp_path: Path) -> None:
    write_rail(tmp_path / FOLDERS["type_1"], "rail_1", 16, 20)
    listing = list_samples("rsdds", tmp_path, options={"tile": 6})
    good = {f"{x},{y},6,6" for x in (0, 6, 10) for y in (0, 6, 12, 14)} - {"0,14,6,6"}  # the mark begins in row 18
    assert {sample.box for sample in listing.samples} == good
    assert [entry.path for entry in listing.set_aside] == [f"{FOLDERS['type_1']}/{IMAGES}/rail_1.jpg[0,14,6,6]"]
    with pytest.raises(DatasetError, match="tile was 0, expected the side of a square in px"):
        list_samples("rsdds", tmp_path, options={"tile": 0})


def test_a_tile_longer_than_the_rail_is_the_rail(tmp_path: Path) -> None:
    make(tmp_path)
    listing = list_samples("rsdds", tmp_path, ["type_2"], {"tile": 500})
    assert "type_2" in listing.problems  # no rail is good as a whole
    assert {entry.path.split("[")[1] for entry in listing.set_aside} == {"0,0,8,28]"}


def test_one_category_or_its_folder_alone(tmp_path: Path) -> None:
    make(tmp_path)
    both, alone = list_samples("rsdds", tmp_path), list_samples("rsdds", tmp_path, ["type_2"])
    assert [s for s in both.samples if s.category == "type_2"] == alone.samples
    inner = list_samples("rsdds", tmp_path / FOLDERS["type_2"])
    assert [(s.id, s.split, s.label) for s in inner.samples] == [(s.id, s.split, s.label) for s in alone.samples]
    assert inner.samples[0].path == f"{IMAGES}/rail_1.jpg"
    with pytest.raises(DatasetError, match="unknown category 'type_3'"):
        list_samples("rsdds", tmp_path, ["type_3"])


def test_folders_may_be_written_with_underscores_and_lie_deeper(tmp_path: Path) -> None:
    make(tmp_path / "a" / "RSDDs dataset")
    plain = list_samples("rsdds", tmp_path / "a")
    for folder in (tmp_path / "a" / "RSDDs dataset").iterdir():
        (folder / IMAGES).rename(folder / IMAGES.replace(" ", "_"))
        folder.rename(folder.with_name(folder.name.replace(" ", "_")))
    underscored = list_samples("rsdds", tmp_path / "a" / "RSDDs dataset")
    assert [(s.id, s.label) for s in underscored.samples] == [(s.id, s.label) for s in plain.samples]


def test_rails_without_a_usable_mask_are_set_aside(tmp_path: Path) -> None:
    folder = make(tmp_path) / FOLDERS["type_1"]
    (folder / MASKS / "rail_1.jpg").unlink()
    (folder / MASKS / "rail_2.jpg").write_bytes(b"no image")
    save(folder / MASKS / "rail_3.jpg", np.zeros((16, 16), np.uint8))
    (folder / IMAGES / "rail_4.jpg").write_bytes(b"no image")
    save(folder / MASKS / "rail_9.jpg", np.zeros((56, 16), np.uint8))
    save(folder / "preview.jpg", np.zeros((8, 8), np.uint8))
    assert "rail_5" in drawn(RAILS, 0.6, 1)
    listing = list_samples("rsdds", tmp_path, ["type_1"], {"seed": 1})
    reasons = {entry.path.removeprefix(f"{FOLDERS['type_1']}/"): entry.reason for entry in listing.set_aside}
    assert "it has no mask" in reasons[f"{IMAGES}/rail_1.jpg"]
    assert "no image that can be read" in reasons[f"{IMAGES}/rail_2.jpg"]
    assert "16x56 px, its mask 16x16 px" in reasons[f"{IMAGES}/rail_3.jpg"]
    assert "no image that can be read" in reasons[f"{IMAGES}/rail_4.jpg"]
    assert "no rail was paired with it" in reasons[f"{MASKS}/rail_9.jpg"]
    assert "lies outside of" in reasons["preview.jpg"]
    assert {sample.part for sample in listing.samples} == {"rail_5"}


def test_a_rail_some_pixels_longer_than_its_mask_is_cut_at_the_shorter(tmp_path: Path) -> None:
    folder = tmp_path / FOLDERS["type_1"]
    write_rail(folder, "rail_1", 16, 64)
    save(folder / IMAGES / "rail_1.jpg", np.full((66, 16), 90, np.uint8))
    listing = list_samples("rsdds", tmp_path)
    assert [s.box for s in listing.samples] == ["0,0,16,16", "0,32,16,16", "0,48,16,16"]


def test_the_index_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    first, second = list_samples("rsdds", make(tmp_path / "a")), list_samples("rsdds", make(tmp_path / "b", True))
    assert first.samples == second.samples
    assert first.set_aside == second.set_aside


def test_a_folder_in_another_layout_is_refused_with_the_expected_tree(tmp_path: Path) -> None:
    save(tmp_path / "train" / "good" / "000.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DatasetError, match=re.escape(about("rsdds").tree)):
        list_samples("rsdds", tmp_path)
