"""NanoTWICE, Fabric and the textures of AE-SSIM: folders in their variants, boxes, seeded splits, pairing by name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.datasets import about, list_samples, options_of
from storage.errors import DatasetError
from storage.files import read_image
from storage.listing import Listing
from storage.masks import read_mask
from storage.samples import Sample, content_hash, parse_box, sample_id


def picture(path: Path, seed: int, size: tuple[int, int] = (24, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)


def mask(path: Path, rows: slice, columns: slice, value: int = 255, size: tuple[int, int] = (24, 32)) -> None:
    values = np.zeros(size, np.uint8)
    values[rows, columns] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def brief(samples: Sequence[Sample]) -> list[tuple[str, str, str, str, str | None]]:
    return [(s.path, s.split, s.label, s.defect_type, s.mask) for s in samples]


def reasons(listing: Listing) -> dict[str, str]:
    return {entry.path: entry.reason for entry in listing.set_aside}


def same_index(one: Listing, other: Listing) -> bool:
    return [asdict(s) for s in one.samples] == [asdict(s) for s in other.samples]


# --- textured


TEXTURED = [f"texture_{n}/{place}" for n in (1, 2) for place in ("train/good/000.png", "train/good/001.png")]
DEFECTIVE = [f"texture_{n}/test/defective/{i:03}.png" for n in (1, 2) for i in range(2)]


def textured(root: Path, files: Sequence[str] = (*TEXTURED, *DEFECTIVE)) -> Path:
    for path in files:
        picture(root / path, (*TEXTURED, *DEFECTIVE).index(path))
    for path in DEFECTIVE[:-1]:  # the last one has no mask
        mask(root / path.replace("test", "ground_truth"), slice(2, 4), slice(5, 9))
    return root


def test_textured_is_read_as_published(tmp_path: Path) -> None:
    tree = textured(tmp_path / "textures")
    listing = list_samples("textured", tree)
    truth = "ground_truth/defective"
    assert brief(listing.samples) == [
        ("texture_1/test/defective/000.png", "test", "anomalous", "defective", f"texture_1/{truth}/000.png"),
        ("texture_1/test/defective/001.png", "test", "anomalous", "defective", f"texture_1/{truth}/001.png"),
        ("texture_1/train/good/000.png", "train", "good", "good", None),
        ("texture_1/train/good/001.png", "train", "good", "good", None),
        ("texture_2/test/defective/000.png", "test", "anomalous", "defective", f"texture_2/{truth}/000.png"),
        ("texture_2/test/defective/001.png", "test", "anomalous", "defective", None),
        ("texture_2/train/good/000.png", "train", "good", "good", None),
        ("texture_2/train/good/001.png", "train", "good", "good", None),
    ]
    assert listing.set_aside == []
    assert listing.problems == {}
    assert all(s.id == content_hash((tree / s.path).read_bytes()) for s in listing.samples)
    pixels = read_mask(listing.root, listing.samples[0], listing.folders)
    assert pixels.sum() == 8
    assert pixels[2:4, 5:9].all()
    assert same_index(listing, list_samples("textured", tmp_path))  # the archive's folder is found
    assert same_index(listing, list_samples("textured", textured(tmp_path / "b", [*DEFECTIVE, *TEXTURED[::-1]])))
    assert {s.category for s in list_samples("textured", tree, ["texture_2"]).samples} == {"texture_2"}


def test_textured_refuses_another_folder(tmp_path: Path) -> None:
    tree = textured(tmp_path / "textures")
    with pytest.raises(DatasetError, match=r"no train/good.*give it as root(?s:.*)texture_1/train/good"):
        list_samples("textured", tree / "texture_1/train")
    shutil.rmtree(tree / "texture_1/train/good")
    assert list(list_samples("textured", tree).problems) == ["texture_1"]


# --- nanotwice


NORMAL = [f"Normal/ITIA11{i}.tif" for i in (30, 39)]
ANOMALOUS = [f"Anomalous/images/ITIA11{i:02}.tif" for i in (1, 2, 3)]
SHAPE = (48, 64)


def nanotwice(root: Path, files: Sequence[str] = (*NORMAL, *ANOMALOUS)) -> Path:
    for path in files:
        picture(root / path, (*NORMAL, *ANOMALOUS).index(path), SHAPE)
    mask(root / "Anomalous/gt/ITIA1101_gt.png", slice(15, 18), slice(40, 44), 1, SHAPE)  # over the border of two boxes
    mask(root / "Anomalous/gt/ITIA1102_gt.png", slice(0, 2), slice(0, 2), 255, SHAPE)
    return root


def test_nanotwice_whole_images(tmp_path: Path) -> None:
    tree = nanotwice(tmp_path / "SEM_Data")
    listing = list_samples("nanotwice", tree, options={"tile": None})
    assert brief(listing.samples) == [
        (ANOMALOUS[0], "test", "anomalous", "anomalous", "Anomalous/gt/ITIA1101_gt.png"),
        (ANOMALOUS[1], "test", "anomalous", "anomalous", "Anomalous/gt/ITIA1102_gt.png"),
        (ANOMALOUS[2], "test", "anomalous", "anomalous", None),
        (NORMAL[0], "train", "good", "good", None),
        (NORMAL[1], "train", "good", "good", None),
    ]
    assert {s.box for s in listing.samples} == {None}
    assert {s.category for s in listing.samples} == {"nanofibres"}
    assert [s.id for s in listing.samples] == [content_hash((tree / s.path).read_bytes()) for s in listing.samples]
    pixels = read_mask(listing.root, listing.samples[0], listing.folders)
    assert pixels.sum() == 12
    assert pixels[15:18, 40:44].all()
    assert same_index(listing, list_samples("nanotwice", tree, ["nanofibres"], {"tile": 0}))
    assert listing.set_aside == []
    assert listing.problems == {}


def test_nanotwice_boxes_cover_each_image_once_and_take_their_label_from_the_mask(tmp_path: Path) -> None:
    tree = nanotwice(tmp_path / "data")
    listing = list_samples("nanotwice", tree, options={"tile": 16})
    assert len(listing.samples) == 5 * 3 * 4
    for path in (*NORMAL, *ANOMALOUS):
        covered = np.zeros(SHAPE, int)
        boxes = [s for s in listing.samples if s.path == path]
        for sample in boxes:
            x, y, w, h = parse_box(sample.box or "")
            covered[y : y + h, x : x + w] += 1
            assert sample.id == sample_id(content_hash((tree / path).read_bytes()), sample.box)
            assert read_image(listing.root, sample, listing.folders) == (tree / path).read_bytes()
        assert (covered == 1).all()
        assert {s.part for s in boxes} == {path}
    first = {s.box: s for s in listing.samples if s.path == ANOMALOUS[0]}
    marked = {box: s for box, s in first.items() if s.label == "anomalous"}
    assert set(marked) == {"32,0,16,16", "32,16,16,16"}
    assert [int(read_mask(listing.root, marked[b], listing.folders).sum()) for b in sorted(marked)] == [4, 8]
    good = [s for box, s in first.items() if box not in marked]
    assert {(s.split, s.label, s.defect_type, s.mask_state) for s in good} == {("test", "good", "good", "no defect")}
    assert {s.label for s in listing.samples if s.path == ANOMALOUS[2]} == {"unknown"}  # it has no mask
    assert {(s.split, s.label) for s in listing.samples if s.path in NORMAL} == {("train", "good")}
    assert len({(s.category, s.key) for s in listing.samples}) == len({s.id for s in listing.samples}) == 60


@pytest.mark.parametrize(
    ("size", "tile", "sides"), [((48, 64), 20, {(21, 24), (22, 24)}), ((30, 50), 8, {(8, 7), (9, 7), (8, 8), (9, 8)})]
)
def test_nanotwice_boxes_are_alike(
    tmp_path: Path, size: tuple[int, int], tile: int, sides: set[tuple[int, int]]
) -> None:
    for path in (NORMAL[0], ANOMALOUS[0]):
        picture(tmp_path / path, 0, size)
    listing = list_samples("nanotwice", tmp_path, options={"tile": tile})
    found = {parse_box(s.box or "")[2:] for s in listing.samples}
    assert found <= sides
    assert max(w for w, _ in found) - min(w for w, _ in found) <= 1
    area = sum(parse_box(s.box or "")[2] * parse_box(s.box or "")[3] for s in listing.samples)
    assert area == 2 * size[0] * size[1]


def test_nanotwice_default_makes_good_boxes_to_judge(tmp_path: Path) -> None:
    assert options_of("nanotwice") == {"tile": 256}
    picture(tmp_path / NORMAL[0], 0, (700, 1024))
    picture(tmp_path / ANOMALOUS[0], 1, (700, 1024))
    mask(tmp_path / "Anomalous/gt/ITIA1101_gt.png", slice(300, 310), slice(0, 9), 255, (700, 1024))
    listing = list_samples("nanotwice", tmp_path)
    labels = [(s.split, s.label) for s in listing.samples]
    assert labels.count(("train", "good")) == 12
    assert labels.count(("test", "good")) == 11
    assert labels.count(("test", "anomalous")) == 1


def test_nanotwice_broken_files_lose_nothing(tmp_path: Path) -> None:
    tree = nanotwice(tmp_path / "data")
    (tree / NORMAL[1]).write_bytes(b"no image")
    mask(tree / "Anomalous/gt/ITIA1102_gt.png", slice(0, 2), slice(0, 2))  # of another size
    (tree / "Anomalous/gt/ITIA1103_gt.png").write_bytes(b"no mask")
    mask(tree / "Anomalous/gt/ITIA1109_gt.png", slice(0, 2), slice(0, 2))
    picture(tree / "Anomalous/ITIA1104.tif", 9)
    listing = list_samples("nanotwice", tree, options={"tile": 32})
    assert [s.box for s in listing.samples if s.path == NORMAL[1]] == [None]  # decoding will say what is wrong with it
    assert {s.label for s in listing.samples if s.path in ANOMALOUS[1:]} == {"unknown"}
    found = reasons(listing)
    assert "32x24 px for an image of 64x48" in found["Anomalous/gt/ITIA1102_gt.png"]
    assert "no image that can be read" in found["Anomalous/gt/ITIA1103_gt.png"]
    assert found["Anomalous/gt/ITIA1109_gt.png"] == "a mask of no image"
    assert found["Anomalous/ITIA1104.tif"].startswith("lies outside")
    assert len(found) == 4


def test_nanotwice_variants_of_its_folders(tmp_path: Path) -> None:
    tree = nanotwice(tmp_path / "up/SEM_Data")
    expected = list_samples("nanotwice", tree)
    again = nanotwice(tmp_path / "again", [*ANOMALOUS[::-1], *NORMAL[::-1]])
    assert same_index(expected, list_samples("nanotwice", again))
    assert same_index(expected, list_samples("nanotwice", tmp_path / "up"))
    other = tmp_path / "other"
    shutil.copytree(tree / "Normal", other / "normal/ITIA11")
    shutil.copytree(tree / "Anomalous", other / "ANOMALOUS/ITIA11")
    listing = list_samples("nanotwice", other)
    assert sorted(s.id for s in listing.samples) == sorted(s.id for s in expected.samples)
    assert sorted(s.label for s in listing.samples) == sorted(s.label for s in expected.samples)
    assert listing.set_aside == []


def test_nanotwice_refuses_what_it_is_not(tmp_path: Path) -> None:
    tree = nanotwice(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"Normal/\*.tif.*give it as root"):
        list_samples("nanotwice", tree / "Normal")
    for tile in (-1, 7, True, "256"):
        with pytest.raises(DatasetError, match="tile"):
            list_samples("nanotwice", tree, options={"tile": tile})
    with pytest.raises(DatasetError, match="category"):
        list_samples("nanotwice", tree, ["fibres"])
    for path in NORMAL:
        (tree / path).unlink()
    listing = list_samples("nanotwice", tree)
    assert listing.samples == []
    assert "no good image to learn from" in listing.problems["nanofibres"]


# --- fabric


def fabric(root: Path) -> Path:
    """Two patterns as public code names their folders."""
    box, star = root / "box-patterned-fabric_with_groundtruth", root / "star-patterned_fabric_with_groundtruth"
    for i in range(5):
        picture(box / f"Reference/Bbox_p{i}.bmp", i)
    for i in range(4):
        picture(star / f"Reference/Bstar_p{i}.bmp", 50 + i)
    for i in (1, 2):
        picture(box / f"NettingMultiple/Bbox_nn_d{i}.bmp", 10 + i)
        mask(box / f"NettingMultiple_GT/Bbox_nn_gt{i}.bmp", slice(0, i), slice(0, 8))
    picture(box / "Hole/Bbox_he_d1.bmp", 20)
    mask(box / "Hole_GT/bbox_he_D1.png", slice(0, 3), slice(0, 8))
    picture(star / "all_defect/Bstar_tk_d1.bmp", 60)
    picture(star / "all_defect/Bstar_zz_d2.bmp", 61)
    mask(star / "GT/Bstar_tk_d1.bmp", slice(0, 5), slice(0, 8))
    return root


def test_fabric_is_understood_by_the_names_of_its_folders(tmp_path: Path) -> None:
    tree = fabric(tmp_path / "HongKong")
    listing = list_samples("fabric", tree)
    box, star = "box-patterned-fabric_with_groundtruth", "star-patterned_fabric_with_groundtruth"
    anomalous = [s for s in listing.samples if s.label == "anomalous"]
    assert [(s.category, s.path, s.defect_type, s.mask) for s in anomalous] == [
        ("box", f"{box}/Hole/Bbox_he_d1.bmp", "Hole", f"{box}/Hole_GT/bbox_he_D1.png"),
        (
            "box",
            f"{box}/NettingMultiple/Bbox_nn_d1.bmp",
            "NettingMultiple",
            f"{box}/NettingMultiple_GT/Bbox_nn_gt1.bmp",
        ),
        (
            "box",
            f"{box}/NettingMultiple/Bbox_nn_d2.bmp",
            "NettingMultiple",
            f"{box}/NettingMultiple_GT/Bbox_nn_gt2.bmp",
        ),
        ("star", f"{star}/all_defect/Bstar_tk_d1.bmp", "ThickBar", f"{star}/GT/Bstar_tk_d1.bmp"),
        ("star", f"{star}/all_defect/Bstar_zz_d2.bmp", "unknown", None),
    ]
    assert {s.split for s in anomalous} == {"test"}
    assert [int(read_mask(listing.root, s, listing.folders).sum()) for s in anomalous[:4]] == [24, 8, 16, 40]
    good = [s for s in listing.samples if s.label == "good"]
    assert {s.defect_type for s in good} == {"good"}
    assert {s.path.split("/")[1] for s in good} == {"Reference"}
    count = {name: sorted(s.split for s in good if s.category == name) for name in ("box", "star")}
    assert count == {"box": ["test"] * 2 + ["train"] * 3, "star": ["test"] * 2 + ["train"] * 2}
    assert listing.set_aside == []
    assert listing.problems == {}
    assert all(s.id == content_hash((tree / s.path).read_bytes()) for s in listing.samples)
    assert same_index(listing, list_samples("fabric", tmp_path))
    assert {s.category for s in list_samples("fabric", tree, ["star"]).samples} == {"star"}


def test_fabric_copy_with_normal_and_defective(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"HKU/dot/normal/{i}.bmp", i)
    for name in ("Ddot_tt_1", "Ddot_k_1", "bad_b2"):
        picture(tmp_path / f"HKU/dot/defective/{name}.bmp", 10 + len(name))
        mask(tmp_path / f"HKU/dot/defective/mask/{name}.bmp", slice(0, 2), slice(0, 2))
    listing = list_samples("fabric", tmp_path / "HKU", options={"test_share": 0})
    base = "dot/defective"
    assert brief(listing.samples) == [
        (f"{base}/Ddot_k_1.bmp", "test", "anomalous", "Knots", f"{base}/mask/Ddot_k_1.bmp"),
        (f"{base}/Ddot_tt_1.bmp", "test", "anomalous", "ThickBar", f"{base}/mask/Ddot_tt_1.bmp"),
        (f"{base}/bad_b2.bmp", "test", "anomalous", "BrokenEnd", f"{base}/mask/bad_b2.bmp"),
        *((f"dot/normal/{i}.bmp", "train", "good", "good", None) for i in range(3)),
    ]
    assert listing.set_aside == []


def test_fabric_draw_depends_on_content_and_seed_alone(tmp_path: Path) -> None:
    one, two = tmp_path / "one/box/normal", tmp_path / "two/box/normal"
    for i in range(12):
        picture(one / f"{i:02}.bmp", i // 2)  # each image lies there twice
    for i, path in enumerate(sorted(one.iterdir(), reverse=True)):
        two.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, two / f"renamed_{i}.bmp")

    def judged(root: Path, seed: int) -> list[str]:
        samples = list_samples("fabric", root, options={"seed": seed}).samples
        return sorted(s.id for s in samples if s.split == "test")

    splits: dict[str, set[str]] = {}
    for sample in list_samples("fabric", tmp_path / "one").samples:
        splits.setdefault(sample.id, set()).add(sample.split)
    assert all(len(found) == 1 for found in splits.values())  # equal files stand on one side
    assert judged(tmp_path / "one", 0) == judged(tmp_path / "two", 0)
    assert len({tuple(judged(tmp_path / "one", seed)) for seed in range(6)}) > 1


def test_fabric_pairs_no_mask_by_position_or_across_types(tmp_path: Path) -> None:
    tree = tmp_path / "data"
    for i in range(2):
        picture(tree / f"box/normal/{i}.bmp", i)
    for kind, seed in (("Hole", 10), ("ThinBar", 11)):
        picture(tree / f"box/{kind}/1.bmp", seed)
    mask(tree / "box/ThinBar_GT/1.bmp", slice(0, 2), slice(0, 2))
    picture(tree / "box/Hole/a_d7.bmp", 12)
    for name in ("a_gt7", "a_mask7"):  # which of the two cannot be told
        mask(tree / f"box/Hole_GT/{name}.bmp", slice(0, 2), slice(0, 2))
    mask(tree / "box/Normal_GT/0.bmp", slice(0, 2), slice(0, 2))
    picture(tree / "box/all_defect/1.BMP", 11)  # ThinBar/1.bmp once more
    for kind, seed in (("Knots", 15), ("OilWarp", 16)):
        picture(tree / f"box/{kind}/5.bmp", seed)
    mask(tree / "box/gt/5.bmp", slice(0, 2), slice(0, 2))  # of which of the two cannot be told either
    picture(tree / "box/loose.bmp", 13)
    picture(tree / "box/Hole/deeper/x.bmp", 14)
    listing = list_samples("fabric", tree)
    masks = {s.path: s.mask for s in listing.samples if s.label == "anomalous"}
    assert {path: mask for path, mask in masks.items() if mask} == {"box/ThinBar/1.bmp": "box/ThinBar_GT/1.bmp"}
    assert len(masks) == 5
    assert reasons(listing) == {
        "box/Hole/deeper": "in no folder that is understood; what lies in it is not read (images: 1)",
        "box/Hole_GT/a_gt7.bmp": "a mask that no image was paired with",
        "box/Hole_GT/a_mask7.bmp": "a mask that no image was paired with",
        "box/Normal_GT/0.bmp": "a mask that no image was paired with",
        "box/gt/5.bmp": "a mask that no image was paired with",
        "box/all_defect/1.BMP": "repeats an image of a folder that names its type of defect",
        "box/loose.bmp": "in no folder that is understood",
    }


def test_fabric_refuses_what_it_is_not(tmp_path: Path) -> None:
    tree = fabric(tmp_path / "HongKong")
    with pytest.raises(DatasetError, match=r"begins with box, dot or star.*give it as root"):
        list_samples("fabric", tree / "box-patterned-fabric_with_groundtruth")
    for share in (-0.1, 1, 1.5):
        with pytest.raises(DatasetError, match="test_share"):
            list_samples("fabric", tree, options={"test_share": share})
    with pytest.raises(DatasetError, match=r"known: box, star|did you mean"):
        list_samples("fabric", tree, ["dot"])
    picture(tree / "Box/normal/0.bmp", 0)
    with pytest.raises(DatasetError, match="both of the pattern box"):
        list_samples("fabric", tree)
    shutil.rmtree(tree / "Box")
    shutil.rmtree(tree / "star-patterned_fabric_with_groundtruth/Reference")
    (tree / "star-patterned_fabric_with_groundtruth/Reference").mkdir()
    assert list(list_samples("fabric", tree).problems) == ["star"]


@pytest.mark.parametrize("name", ["textured", "nanotwice", "fabric"])
def test_facts_say_what_a_person_needs(name: str) -> None:
    facts = about(name)
    assert facts.downloads == ()
    assert facts.obtain
    assert facts.tree
    assert facts.home.startswith("http")
