"""MT Defect: the published layout in miniature, with names of published files where they tell which tile is shown."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.datasets import about, list_samples
from storage.datasets.mt_defect import parts_of
from storage.errors import DatasetError
from storage.listing import Listing
from storage.masks import read_mask
from storage.readers import drawn
from storage.samples import content_hash

HEIGHT, WIDTH = 32, 24
HOLE = (slice(4, 8), slice(6, 12))

# number of the photograph, exposure, kind; a tile a line, gaps between the numbers as in the published data
TILES = [
    [(1100, 1, "Free"), (1120, 2, "Free"), (1135, 3, "Free")],
    [(2000, 1, "Free"), (2010, 2, "Free"), (2030, 3, "Free"), (2050, 4, "Free")],
    [(2100, 1, "Free"), (2120, 2, "Break"), (2140, 3, "Free")],
    [(2200, 2, "Free"), (2220, 3, "Free")],
    [(2300, 1, "Uneven"), (2320, 2, "Uneven")],
    [(2400, 1, "Free"), (2420, 2, "Free")],
    [(2500, 1, "Free"), (2520, 2, "Free")],
]
PARTS = {number: f"tile_{tile[0][0]}" for tile in TILES for number, _, _ in tile}
GOOD_PARTS = ["tile_1100", "tile_2000", "tile_2200", "tile_2400", "tile_2500"]


def write(folder: Path, stem: str, seed: int, mask: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH), np.uint8)
    Image.fromarray(pixels).save(folder / f"{stem}.jpg")
    Image.fromarray(mask).save(folder / f"{stem}.png")


def make(root: Path, backwards: bool = False) -> Path:
    photographs = [photograph for tile in TILES for photograph in tile]
    for number, exposure, kind in reversed(photographs) if backwards else photographs:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        if kind == "Break":
            mask[HOLE] = 128
            mask[0] = 127  # gray, but below the cut
        write(root / f"MT_{kind}" / "Imgs", f"exp{exposure}_num_{number}", number, mask)
    return root


def rows(listing: Listing) -> list[tuple[object, ...]]:
    return [
        (s.path, s.split, s.label, s.defect_type, s.mask, s.mask_rule if s.mask else "", s.part)
        for s in listing.samples
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exposures_of_a_tile_stay_on_one_side(tmp_path: Path, seed: int) -> None:
    listing = list_samples("mt_defect", make(tmp_path), options={"seed": seed})
    training = drawn(GOOD_PARTS, 0.8, seed)
    assert len(training) == 4
    expected: list[tuple[object, ...]] = []
    for number, exposure, kind in [photograph for tile in TILES for photograph in tile]:
        stem = f"MT_{kind}/Imgs/exp{exposure}_num_{number}"
        if kind == "Free":
            split = "train" if PARTS[number] in training else "test"
            expected.append((f"{stem}.jpg", split, "good", "good", None, "", PARTS[number]))
        else:
            expected.append((f"{stem}.jpg", "test", "anomalous", kind, f"{stem}.png", "above:127", PARTS[number]))
    assert rows(listing) == sorted(expected)
    assert listing.set_aside == []  # masks of Free images are no strays
    assert listing.problems == {}
    for sample in listing.samples:
        assert (sample.dataset, sample.category) == ("mt_defect", "magnetic_tile")
        assert sample.id == content_hash((tmp_path / sample.path).read_bytes())
        mask = None if sample.mask is None else content_hash((tmp_path / sample.mask).read_bytes())
        assert sample.mask_id == mask


def test_free_images_of_a_tile_with_a_defect_are_judged(tmp_path: Path) -> None:
    listing = list_samples("mt_defect", make(tmp_path), options={"train_share": 0.99})
    of_it = [sample for sample in listing.samples if sample.part == "tile_2100"]
    assert [(sample.split, sample.label) for sample in of_it] == [
        ("test", "anomalous"),
        ("test", "good"),
        ("test", "good"),
    ]


def test_masks_are_cut_at_127_and_empty_ones_listed_as_they_are(tmp_path: Path) -> None:
    listing = list_samples("mt_defect", make(tmp_path))
    masks = {s.defect_type: read_mask(listing.root, s, listing.folders) for s in listing.samples if s.mask}
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[HOLE] = True
    np.testing.assert_array_equal(masks["Break"], expected)
    assert not masks["Uneven"].any()


@pytest.mark.parametrize(
    ("photographs", "tiles"),
    [
        # a run of rising exposures is a tile, whatever of it is missing
        ("1:1810 3:1855 6:1965 1:2500", ["1:1810 3:1855 6:1965", "1:2500"]),
        # the same exposure twice is two tiles
        ("3:1100 3:1120", ["3:1100", "3:1120"]),
        # two tiles photographed in turns: one part, and the runs around them are others
        (
            "6:111 1:304290 1:304293 2:304305 2:304307 5:304340 6:304361 1:304500",
            ["6:111", "1:304290 1:304293 2:304305 2:304307 5:304340 6:304361", "1:304500"],
        ),
        # a tile photographed again after others
        ("5:5874 6:5892 1:5907 1:9473 1:13526 6:13689", ["5:5874 6:5892 1:5907 1:13526 6:13689", "1:9473"]),
        # exposures that rise from the end of an irregular part into the next tile
        ("1:320808 6:320864 1:320895 2:321452 3:321466", ["1:320808 6:320864 1:320895", "2:321452 3:321466"]),
        # a published number is one photograph, in whatever folder or format it lies
        ("1:100 1:100 2:120", ["1:100 2:120"]),
    ],
)
def test_the_tile_follows_from_exposures_and_numbers(photographs: str, tiles: list[str]) -> None:
    def paths(text: str, folder: str) -> list[str]:
        return [f"{folder}/exp{e}_num_{n}.jpg" for e, n in (item.split(":") for item in text.split())]

    names = [path for folder in ("MT_Free", "MT_Break") for path in paths(photographs, folder)]
    parts = parts_of(reversed(names))
    found: dict[str, set[str]] = {}
    for path, part in parts.items():
        found.setdefault(part, set()).add(path)
    expected = [{*paths(tile, "MT_Free"), *paths(tile, "MT_Break")} for tile in tiles]
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected))


def test_a_file_named_otherwise_is_a_part_of_its_own() -> None:
    assert parts_of(["a/mine.jpg", "a/exp1_num_7.jpg"]) == {"a/mine.jpg": "mine", "a/exp1_num_7.jpg": "tile_7"}


def test_a_defect_without_a_mask_is_unknown_and_a_mask_without_an_image_set_aside(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "MT_Break" / "Imgs" / "exp2_num_2120.png").unlink()
    (tmp_path / "MT_Free" / "Imgs" / "exp2_num_2520.jpg").unlink()
    write(tmp_path / "MT_Free", "loose", 1, np.zeros((HEIGHT, WIDTH), np.uint8))
    write(tmp_path / "MT_Rust" / "Imgs", "exp1_num_9", 2, np.zeros((HEIGHT, WIDTH), np.uint8))
    listing = list_samples("mt_defect", tmp_path)
    (broken,) = [sample for sample in listing.samples if sample.defect_type == "Break"]
    assert broken.mask_state == "unknown"
    reasons = {entry.path: entry.reason for entry in listing.set_aside}
    assert set(reasons) == {"MT_Free/Imgs/exp2_num_2520.png", "MT_Free/loose.jpg", "MT_Free/loose.png", "MT_Rust"}
    assert "neither an image nor the mask of one" in reasons["MT_Free/Imgs/exp2_num_2520.png"]
    assert "in folders MT_<kind>/Imgs" in reasons["MT_Free/loose.jpg"]


def test_without_a_tile_free_of_defects_nothing_can_be_learned(tmp_path: Path) -> None:
    empty = np.zeros((HEIGHT, WIDTH), np.uint8)
    write(tmp_path / "MT_Free" / "Imgs", "exp1_num_10", 1, empty)
    write(tmp_path / "MT_Crack" / "Imgs", "exp2_num_20", 2, empty)
    listing = list_samples("mt_defect", tmp_path)
    assert listing.samples == []
    assert "no good image" in listing.problems["magnetic_tile"]


def test_the_index_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    first, second = (list_samples("mt_defect", make(tmp_path / str(way), way)) for way in (False, True))
    assert first.samples == second.samples


def test_the_folder_around_it_may_be_given_when_that_is_unambiguous(tmp_path: Path) -> None:
    make(tmp_path / "Magnetic-Tile-Defect")
    inner = list_samples("mt_defect", tmp_path / "Magnetic-Tile-Defect")
    assert list_samples("mt_defect", tmp_path, ["magnetic_tile"]).samples == inner.samples
    make(tmp_path / "again")
    with pytest.raises(DatasetError, match="several data sets"):
        list_samples("mt_defect", tmp_path)


@pytest.mark.parametrize("inner", ["MT_Free", "MT_Free/Imgs"])
def test_another_folder_is_refused_with_the_expected_tree(tmp_path: Path, inner: str) -> None:
    make(tmp_path)
    with pytest.raises(DatasetError, match=re.escape(about("mt_defect").tree)):
        list_samples("mt_defect", tmp_path / inner)


def test_an_unknown_category_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="unknown category 'bottle'; known: magnetic_tile"):
        list_samples("mt_defect", make(tmp_path), ["bottle"])
