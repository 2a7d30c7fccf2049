"""MVTec LOCO AD, 3D-AD and AD 2 in miniature, in their published layouts: every file accounted for, in any order."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.datasets import about, list_samples
from storage.errors import DatasetError, OutsideRoot
from storage.listing import Listing
from storage.masks import read_mask
from storage.samples import Sample, content_hash, fingerprint

SIZE = (24, 32)  # height, width
Tree = dict[str, np.ndarray]
"""Path -> pixels."""


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def marked(columns: slice, value: int = 255) -> np.ndarray:
    values = np.zeros(SIZE, np.uint8)
    values[:, columns] = value
    return values


def write(root: Path, tree: Tree, order: int | None = None) -> Path:
    """The files, created in another order for another number."""
    paths = sorted(tree)
    if order is not None:
        random.Random(order).shuffle(paths)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tree[path]).save(root / path)
    return root


def images(*paths: str) -> Tree:
    return {path: picture(sum(path.encode())) for path in paths}


def rows(listing: Listing) -> list[tuple[Any, ...]]:
    return [(s.path, s.split, s.label, s.defect_type, s.mask) for s in listing.samples]


def reasons(listing: Listing) -> dict[str, str]:
    assert len({entry.path for entry in listing.set_aside}) == len(listing.set_aside), "a file is set aside twice"
    return {entry.path: entry.reason for entry in listing.set_aside}


def mask_of(listing: Listing, path: str) -> np.ndarray:
    sample = next(sample for sample in listing.samples if sample.path == path)
    return read_mask(listing.root, sample, listing.folders)


def check_ids(listing: Listing) -> None:
    for sample in listing.samples:
        assert sample.id == content_hash((listing.root / sample.path).read_bytes())
        assert (sample.mask_id is None) == (sample.mask is None)


# MVTec LOCO AD

DEFECTS = [
    {"defect_name": "missing_pin", "pixel_value": 7, "saturation_threshold": 300, "relative_saturation": False},
    {"defect_name": "broken", "pixel_value": 254, "saturation_threshold": 1.0, "relative_saturation": True},
]


def loco_tree() -> Tree:
    tree: Tree = {}
    for category in ("pushpins", "screw_bag"):
        tree |= images(
            f"{category}/train/good/000.png",
            f"{category}/train/good/001.png",
            f"{category}/validation/good/000.png",
            f"{category}/test/good/000.png",
            f"{category}/test/logical_anomalies/000.png",
            f"{category}/test/logical_anomalies/001.png",
            f"{category}/test/structural_anomalies/000.png",
        )
        truth = f"{category}/ground_truth"
        tree[f"{truth}/logical_anomalies/001/000.png"] = marked(slice(0, 4), 7)
        tree[f"{truth}/logical_anomalies/001/001.png"] = marked(slice(10, 12), 254)
        tree[f"{truth}/structural_anomalies/000/000.png"] = marked(slice(20, 32), 254)
    return tree


def loco(root: Path, order: int | None = None) -> Path:
    write(root, loco_tree(), order)
    for category in ("pushpins", "screw_bag"):
        (root / category / "defects_config.json").write_text(json.dumps(DEFECTS))
    (root / "readme.txt").write_text("about")
    return root


def test_loco_index(tmp_path):
    listing = list_samples("mvtec_loco_ad", loco(tmp_path / "loco"))
    expected = []
    for c in ("pushpins", "screw_bag"):
        expected += [
            (f"{c}/test/good/000.png", "test", "good", "good", None),
            (f"{c}/test/logical_anomalies/000.png", "test", "anomalous", "logical_anomalies", None),
            (
                f"{c}/test/logical_anomalies/001.png",
                "test",
                "anomalous",
                "logical_anomalies",
                f"{c}/ground_truth/logical_anomalies/001",
            ),
            (
                f"{c}/test/structural_anomalies/000.png",
                "test",
                "anomalous",
                "structural_anomalies",
                f"{c}/ground_truth/structural_anomalies/000",
            ),
            (f"{c}/train/good/000.png", "train", "good", "good", None),
            (f"{c}/train/good/001.png", "train", "good", "good", None),
            (f"{c}/validation/good/000.png", "validation", "good", "good", None),
        ]
    assert rows(listing) == expected
    assert (listing.set_aside, listing.problems) == ([], {})
    assert listing.notes == {"pushpins": DEFECTS, "screw_bag": DEFECTS}
    assert {s.dataset for s in listing.samples} == {"mvtec_loco_ad"}
    assert [s.mask_state for s in listing.samples[:3]] == ["no defect", "unknown", "file"]
    check_ids(listing)


def test_loco_masks_are_united_and_mark_with_any_value_but_zero(tmp_path):
    listing = list_samples("mvtec_loco_ad", loco(tmp_path), ["pushpins"])
    expected = np.zeros(SIZE, bool)
    expected[:, 0:4] = expected[:, 10:12] = True
    np.testing.assert_array_equal(mask_of(listing, "pushpins/test/logical_anomalies/001.png"), expected)
    assert {s.mask_rule for s in listing.samples if s.mask} == {"nonzero"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "missing"),
        ("[{", "Expecting"),
        ("[]", "a list of defects was expected"),
        ('{"a": 1}', "a list of defects was expected"),
        (b"\xff\xfe\xff", "codec"),
        ("[" * 100_000, "recursion"),
        (json.dumps([*DEFECTS, DEFECTS[0]]), "pixel_value 7 stands for two"),
        (json.dumps([{**DEFECTS[0], "pixel_value": 0}]), "pixel_value of 1 to 255"),
        (json.dumps([{**DEFECTS[0], "pixel_value": True}]), "pixel_value of 1 to 255"),
        (json.dumps([{**DEFECTS[0], "defect_name": ""}]), "defect_name"),
        (json.dumps(["missing_pin"]), "defect_name"),
        (json.dumps([{**DEFECTS[0], "saturation_threshold": float("nan")}]), "saturation_threshold"),
        (json.dumps([{**DEFECTS[0], "saturation_threshold": 10**400}]), "saturation_threshold"),
        (json.dumps([{**DEFECTS[1], "saturation_threshold": 300}]), "up to 1 were expected"),
        (json.dumps([{**DEFECTS[0], "relative_saturation": 0}]), "relative_saturation"),
        (json.dumps([{k: v for k, v in DEFECTS[0].items() if k != "saturation_threshold"}]), "saturation_threshold"),
    ],
)
def test_loco_without_a_proper_configuration_is_listed_and_says_so(tmp_path, content, why):
    file = loco(tmp_path) / "screw_bag" / "defects_config.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    listing = list_samples("mvtec_loco_ad", tmp_path)
    assert len(listing.samples) == 14
    assert listing.notes == {"pushpins": DEFECTS}
    assert list(reasons(listing)) == ["screw_bag/defects_config.json"]
    assert why in reasons(listing)["screw_bag/defects_config.json"]
    assert listing.set_aside[0].category == "screw_bag"


def test_loco_masks_of_nothing_and_broken_mask_folders_are_set_aside(tmp_path):
    loco(tmp_path)
    write(
        tmp_path,
        {
            "pushpins/ground_truth/logical_anomalies/009/000.png": marked(slice(0, 1)),
            "pushpins/ground_truth/other/000/000.png": marked(slice(0, 1)),
            "pushpins/test/000.png": picture(1),
        },
    )
    folder = tmp_path / "pushpins/ground_truth/structural_anomalies/000"
    (folder / "001.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_samples("mvtec_loco_ad", tmp_path, ["pushpins"])
    found = reasons(listing)
    assert sorted(found) == [
        "pushpins/ground_truth/logical_anomalies/009/000.png",
        "pushpins/ground_truth/other/000/000.png",
        "pushpins/ground_truth/structural_anomalies/000/000.png",
        "pushpins/ground_truth/structural_anomalies/000/001.png",
        "pushpins/test/000.png",
    ]
    assert "no image of test/logical_anomalies" in found["pushpins/ground_truth/logical_anomalies/009/000.png"]
    assert "broken link" in found["pushpins/ground_truth/structural_anomalies/000/001.png"]
    assert "only train/good, validation/good" in found["pushpins/test/000.png"]
    structural = [s for s in listing.samples if s.defect_type == "structural_anomalies"]
    assert [s.mask_state for s in structural] == ["unknown"]


# MVTec 3D-AD


def spatial_tree() -> Tree:
    tree: Tree = {}
    for category in ("bagel", "tire"):
        for folder in ("train/good", "validation/good", "test/good", "test/hole"):
            tree |= images(f"{category}/{folder}/rgb/000.png", f"{category}/{folder}/rgb/001.png")
            for number in ("000", "001"):
                tree[f"{category}/{folder}/xyz/{number}.tiff"] = np.full(SIZE, len(folder), np.float32)
        tree[f"{category}/test/hole/gt/001.png"] = marked(slice(3, 9), 3)
        tree[f"{category}/test/good/gt/000.png"] = marked(slice(0, 0))
    return tree


def test_3d_index(tmp_path):
    listing = list_samples("mvtec_3d_ad", write(tmp_path, spatial_tree()), ["tire"])
    assert rows(listing) == [
        ("tire/test/good/rgb/000.png", "test", "good", "good", None),
        ("tire/test/good/rgb/001.png", "test", "good", "good", None),
        ("tire/test/hole/rgb/000.png", "test", "anomalous", "hole", None),
        ("tire/test/hole/rgb/001.png", "test", "anomalous", "hole", "tire/test/hole/gt/001.png"),
        ("tire/train/good/rgb/000.png", "train", "good", "good", None),
        ("tire/train/good/rgb/001.png", "train", "good", "good", None),
        ("tire/validation/good/rgb/000.png", "validation", "good", "good", None),
        ("tire/validation/good/rgb/001.png", "validation", "good", "good", None),
    ]
    assert [s.xyz for s in listing.samples] == [
        s.path.replace("/rgb/", "/xyz/").replace(".png", ".tiff") for s in listing.samples
    ]
    assert list(reasons(listing)) == ["tire/test/good/gt"]
    assert "masks of good images" in reasons(listing)["tire/test/good/gt"]
    assert listing.problems == {}
    check_ids(listing)
    mask = mask_of(listing, "tire/test/hole/rgb/001.png")  # marked with 3: any value but 0 counts
    np.testing.assert_array_equal(mask, marked(slice(3, 9)) > 0)


def test_3d_points_pair_by_name_and_lonely_ones_are_set_aside(tmp_path):
    write(tmp_path, spatial_tree())
    (tmp_path / "bagel/train/good/rgb/000.png").unlink()
    (tmp_path / "bagel/test/hole/xyz/000.tiff").unlink()
    (tmp_path / "bagel/test/hole/rgb/001.png").unlink()
    listing = list_samples("mvtec_3d_ad", tmp_path, ["bagel"])
    xyz = {s.path: s.xyz for s in listing.samples}
    assert xyz["bagel/train/good/rgb/001.png"] == "bagel/train/good/xyz/001.tiff"
    assert xyz["bagel/test/hole/rgb/000.png"] is None
    found = reasons(listing)
    assert "3-D points, but no image of train/good/rgb" in found["bagel/train/good/xyz/000.tiff"]
    assert "no image of test/hole/rgb was paired" in found["bagel/test/hole/gt/001.png"]
    assert sorted(found) == [
        "bagel/test/good/gt",
        "bagel/test/hole/gt/001.png",
        "bagel/test/hole/xyz/001.tiff",
        "bagel/train/good/xyz/000.tiff",
    ]


# MVTec AD 2


def ad_2_tree() -> Tree:
    tree: Tree = {}
    for category in ("can", "rice"):
        tree |= images(
            f"{category}/train/good/000_regular.png",
            f"{category}/validation/good/000_regular.png",
            f"{category}/test_public/good/000_regular.png",
            f"{category}/test_public/bad/000_regular.png",
            f"{category}/test_public/bad/000_shift_1.png",
            f"{category}/test_public/bad/001_overexposed.png",
            f"{category}/test_private/000_regular.png",
            f"{category}/test_private_mixed/000_mixed.png",
        )
        tree[f"{category}/test_public/ground_truth/bad/000_regular_mask.png"] = marked(slice(0, 2))
        tree[f"{category}/test_public/ground_truth/bad/000_shift_1_mask.png"] = marked(slice(2, 5))
    return tree


PUBLIC = [
    ("can/test_public/bad/000_regular.png", "anomalous", "test_public/bad/000"),
    ("can/test_public/bad/000_shift_1.png", "anomalous", "test_public/bad/000"),
    ("can/test_public/bad/001_overexposed.png", "anomalous", "test_public/bad/001"),
    ("can/test_public/good/000_regular.png", "good", "test_public/good/000"),
    ("can/train/good/000_regular.png", "good", None),
    ("can/validation/good/000_regular.png", "good", None),
]


def test_ad_2_index(tmp_path):
    listing = list_samples("mvtec_ad_2", write(tmp_path, ad_2_tree()), ["can"])
    assert [(s.path, s.label, s.part) for s in listing.samples] == PUBLIC
    assert [s.split for s in listing.samples] == ["test"] * 4 + ["train", "validation"]
    assert [s.defect_type for s in listing.samples] == ["bad"] * 3 + ["good"] * 3
    truth = "can/test_public/ground_truth/bad"
    assert [s.mask for s in listing.samples] == [
        f"{truth}/000_regular_mask.png",
        f"{truth}/000_shift_1_mask.png",
        *[None] * 4,
    ]
    assert listing.samples[2].mask_state == "unknown"
    np.testing.assert_array_equal(mask_of(listing, PUBLIC[1][0]), marked(slice(2, 5)) > 0)
    check_ids(listing)


def test_ad_2_private_images_are_one_row_a_folder_until_asked_for(tmp_path):
    write(tmp_path, ad_2_tree())
    closed = list_samples("mvtec_ad_2", tmp_path, ["can"])
    assert sorted(reasons(closed)) == ["can/test_private", "can/test_private_mixed"]
    assert all("private = true" in why for why in reasons(closed).values())
    listing = list_samples("mvtec_ad_2", tmp_path, ["can"], {"private": True})
    assert listing.set_aside == []
    found = {s.path: s for s in listing.samples}
    assert set(found) == {path for path, *_ in PUBLIC} | {
        "can/test_private/000_regular.png",
        "can/test_private_mixed/000_mixed.png",
    }
    private = [s for s in listing.samples if "private" in s.path]
    assert {(s.split, s.label, s.defect_type, s.mask_state, s.part) for s in private} == {
        ("test", "unknown", "unknown", "unknown", None)
    }


def test_ad_2_private_folders_are_not_opened(tmp_path, monkeypatch):
    write(tmp_path, ad_2_tree())
    opened: list[str] = []
    scan = os.scandir

    def watched(path: Any = ".") -> Any:
        opened.append(Path(path).name)
        return scan(path)

    listed = os.listdir

    def noted(path: Any = ".") -> Any:  # `Path.iterdir` of Python 3.11
        opened.append(Path(path).name)
        return listed(path)

    monkeypatch.setattr(os, "scandir", watched)
    monkeypatch.setattr(os, "listdir", noted)
    assert len(list_samples("mvtec_ad_2", tmp_path, ["can"]).samples) == 6
    assert "test_public" in opened
    assert not {"test_private", "test_private_mixed"} & set(opened)
    list_samples("mvtec_ad_2", tmp_path, ["can"], {"private": True})
    assert {"test_private", "test_private_mixed"} <= set(opened)


def test_ad_2_parts_stand_in_one_split(tmp_path):
    listing = list_samples("mvtec_ad_2", write(tmp_path, ad_2_tree()), None, {"private": True})
    splits: dict[tuple[str, str], set[str]] = {}
    for sample in listing.samples:
        if sample.part is not None:
            splits.setdefault((sample.category, sample.part), set()).add(sample.split)
    assert len(splits) == 6
    assert all(len(found) == 1 for found in splits.values())


# what all share

TREES: dict[str, Callable[[], Tree]] = {
    "mvtec_loco_ad": loco_tree,
    "mvtec_3d_ad": spatial_tree,
    "mvtec_ad_2": ad_2_tree,
}
TRAIN = {"mvtec_loco_ad": "train/good", "mvtec_3d_ad": "train/good/rgb", "mvtec_ad_2": "train/good"}
each_dataset = pytest.mark.parametrize("dataset", sorted(TREES))


def first(listing: Listing) -> str:
    return min(sample.category for sample in listing.samples)


@each_dataset
def test_index_is_the_same_in_any_order_of_files(tmp_path, dataset):
    tree = TREES[dataset]()
    tree |= images(
        *(f"{min(tree).split('/')[0]}/{place}.png" for place in ("b", "a", "c/b", "c/a", "train/a", "train/b"))
    )
    there = list_samples(dataset, write(tmp_path / "a", tree, order=1))
    here = list_samples(dataset, write(tmp_path / "b", tree, order=2))
    assert here.samples == there.samples
    assert here.set_aside == there.set_aside
    assert fingerprint(here.samples) == fingerprint(there.samples)


@each_dataset
def test_every_image_is_a_sample_or_its_companion_or_set_aside(tmp_path, dataset):
    tree = TREES[dataset]()
    category = min(tree).split("/")[0]
    strays = images(
        f"{category}/loose.png",
        f"{category}/train/loose.png",
        f"{category}/train/bad/000.png",
        f"{category}/{TRAIN[dataset]}/deeper/000.png",
    )
    write(tmp_path, tree | strays)
    (tmp_path / f"{category}/train/.hidden.png").write_bytes(b"x")
    (tmp_path / f"{category}/train/notes.txt").write_text("x")
    listing = list_samples(dataset, tmp_path)
    companions: dict[str, Sample] = {}
    for sample in listing.samples:
        companions |= {path: sample for path in (sample.mask, sample.xyz) if path is not None}
    samples = {sample.path for sample in listing.samples}
    aside = reasons(listing)
    for path in tree | strays:
        folder = path.rpartition("/")[0]
        places = [path in samples, path in companions or folder in companions, path in aside or folder in aside]
        assert sum(places) == 1, path
    for path in strays:
        assert "are read; move it into one of them" in aside.get(path, aside.get(path.rpartition("/")[0], ""))


@each_dataset
def test_category_without_training_images_is_a_problem(tmp_path, dataset):
    tree = TREES[dataset]()
    category, other = sorted({path.split("/")[0] for path in tree})
    write(tmp_path, {path: pixels for path, pixels in tree.items() if f"{category}/train" not in path})
    listing = list_samples(dataset, tmp_path)
    assert {sample.category for sample in listing.samples} == {other}
    assert list(listing.problems) == [category]
    assert f"{category}/{TRAIN[dataset]} holds no image to learn from" in listing.problems[category]


@each_dataset
def test_root_one_level_off_is_understood_where_it_is_unambiguous(tmp_path, dataset):
    root = write(tmp_path / "outer" / "archive", TREES[dataset]())
    straight = list_samples(dataset, root)
    outer = list_samples(dataset, root.parent)
    assert (outer.root, outer.samples) == (straight.root, straight.samples)
    category = first(straight)
    inner = list_samples(dataset, root / category)
    wanted = [sample for sample in straight.samples if sample.category == category]
    assert [f"{category}/{sample.path}" for sample in inner.samples] == [sample.path for sample in wanted]
    assert [sample.id for sample in inner.samples] == [sample.id for sample in wanted]
    assert [sample.part for sample in inner.samples] == [sample.part for sample in wanted]
    write(tmp_path / "outer" / "copy", TREES[dataset]())
    with pytest.raises(DatasetError, match=r"several data sets \(archive, copy\)"):
        list_samples(dataset, root.parent)


@each_dataset
def test_wrong_folder_says_what_was_expected(tmp_path, dataset):
    write(tmp_path, images("a/b/c/000.png"))
    with pytest.raises(DatasetError) as error:
        list_samples(dataset, tmp_path)
    assert about(dataset).tree in str(error.value)
    with pytest.raises(DatasetError, match="is not a folder"):
        list_samples(dataset, tmp_path / "nowhere")


@each_dataset
def test_unknown_categories_and_options_are_refused(tmp_path, dataset):
    category = first(list_samples(dataset, write(tmp_path, TREES[dataset]())))
    with pytest.raises(DatasetError, match=f"did you mean {category}"):
        list_samples(dataset, tmp_path, [category + "s"])
    with pytest.raises(OutsideRoot):
        list_samples(dataset, tmp_path, ["../x"])
    with pytest.raises(DatasetError, match=r"was given the option|unknown option"):
        list_samples(dataset, tmp_path, None, {"seeed": 1})


@each_dataset
def test_links_out_of_the_root_are_not_followed(tmp_path, dataset):
    root = write(tmp_path / "root", TREES[dataset]())
    secret = write(tmp_path / "else", images("000.png")) / "000.png"
    category = first(list_samples(dataset, root))
    train = f"{category}/{TRAIN[dataset]}"
    (root / train / "link.png").symlink_to(secret)
    (root / category / "link").symlink_to(secret.parent)
    (root / "zzz").symlink_to(tmp_path / "else")
    listing = list_samples(dataset, root)
    found = reasons(listing)
    assert "outside of the data set" in found[f"{train}/link.png"]
    assert "outside of the data set" in found[f"{category}/link"]
    assert "outside of the data set" in found["zzz"]
    assert "zzz" in listing.problems
    assert not any("link" in sample.path for sample in listing.samples)
    (root.parent / "around").mkdir()
    (root.parent / "around" / "data").symlink_to(root)
    with pytest.raises(OutsideRoot):
        list_samples(dataset, root.parent / "around")


@each_dataset
def test_a_link_within_the_root_is_entered_where_the_layout_has_a_folder(tmp_path, dataset):
    tree = TREES[dataset]()
    category, other = sorted({path.split("/")[0] for path in tree})
    root = write(tmp_path, {path: pixels for path, pixels in tree.items() if f"{category}/train" not in path})
    (root / category / "train").symlink_to(root / other / "train")
    listing = list_samples(dataset, root)
    assert listing.problems == {}
    assert {sample.category for sample in listing.samples if sample.split == "train"} == {category, other}
    assert f"{category}/train" not in reasons(listing)


@pytest.mark.parametrize(
    ("dataset", "categories", "left_out"),
    [("mvtec_loco_ad", 5, 0), ("mvtec_3d_ad", 10, 0), ("mvtec_ad_2", 8, 2 * 2045)],
)
def test_facts_are_consistent(dataset, categories, left_out):
    facts = about(dataset)
    assert len(facts.categories) == categories
    assert tuple(facts.counts) == facts.categories
    assert facts.images == left_out + sum(sum(numbers.values()) for numbers in facts.counts.values())
    assert facts.downloads == ()  # a form asks to accept the licence
