"""Your own images: folders described by patterns, whose index is exact and whose mistakes are told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.datasets import list_samples, options_of
from storage.errors import DatasetError, OutsideRoot
from storage.listing import Listing
from storage.masks import read_mask
from storage.samples import content_hash

HEIGHT, WIDTH = 24, 32


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.as_posix().encode()])
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)).save(path)
    return path


def mask(path: Path, columns: int, value: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:, :columns] = value
    Image.fromarray(values).save(path)
    return path


def text(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def outline(columns: int) -> dict[str, Any]:
    shape = {"label": "scratch", "points": [[0, 0], [columns, HEIGHT]], "shape_type": "rectangle"}
    return {"version": "5.5.0", "imageWidth": WIDTH, "imageHeight": HEIGHT, "shapes": [shape]}


def tree(root: Path, *paths: str) -> Path:
    """A picture for each path; a mask for paths such as `a_mask.png=5`, with so many columns marked."""
    for path in paths:
        name, _, columns = path.partition("=")
        if columns:
            mask(root / name, int(columns))
        else:
            picture(root / name)
    return root


def described(root: Path, categories: list[str] | None = None, **options: Any) -> Listing:
    return list_samples("folder", root, categories, options)


def index(listing: Listing) -> dict[str, tuple[str, ...]]:
    """path -> category, split, label, defect type, mask."""
    return {s.path: (s.category, s.split, s.label, s.defect_type, s.mask or "-") for s in listing.samples}


def aside(listing: Listing) -> dict[str, str]:
    return {entry.path: entry.reason for entry in listing.set_aside}


DAGM = """
train = "{category}/Train/*.PNG"
test = "{category}/Test/*.PNG"
mask = "{parent}/Label/{stem}_label.PNG"
good_without_mask = true
"""
DAGM_FILES = (
    *("Class1/Train/0001.PNG", "Class1/Train/0002.PNG", "Class1/Train/Label/0002_label.PNG=3", "Class1/Test/0001.PNG"),
    *("Class1/Test/0002.PNG", "Class1/Test/Label/0002_label.PNG=7", "Class2/Train/0001.PNG", "Class2/Test/0009.PNG"),
    "Class2/Test/Label/0009_label.PNG=2",
)


@pytest.fixture
def dagm(tmp_path: Path) -> Path:
    root = tree(tmp_path / "dagm", *DAGM_FILES)
    text(root / "layout.toml", DAGM)
    text(root / "Class1/Train/Label/Labels.txt", "1 0 0001")
    return root


def test_a_layout_in_the_root_is_used_by_itself(dagm):
    listing = list_samples("folder", dagm)
    assert index(listing) == {
        "Class1/Test/0001.PNG": ("Class1", "test", "good", "good", "-"),
        "Class1/Test/0002.PNG": ("Class1", "test", "anomalous", "unknown", "Class1/Test/Label/0002_label.PNG"),
        "Class1/Train/0001.PNG": ("Class1", "train", "good", "good", "-"),
        "Class2/Test/0009.PNG": ("Class2", "test", "anomalous", "unknown", "Class2/Test/Label/0009_label.PNG"),
        "Class2/Train/0001.PNG": ("Class2", "train", "good", "good", "-"),
    }
    assert aside(listing) == {"Class1/Train/0002.PNG": "its mask shows a defect; only good images are learned from"}
    assert listing.problems == {}
    for sample in listing.samples:
        assert sample.dataset == "folder"
        assert sample.id == content_hash((dagm / sample.path).read_bytes())
        if sample.mask is not None:
            assert sample.mask_id == content_hash((dagm / sample.mask).read_bytes())
    marked = next(s for s in listing.samples if s.path == "Class1/Test/0002.PNG")
    np.testing.assert_array_equal(read_mask(listing.root, marked), np.arange(WIDTH)[None, :].repeat(HEIGHT, 0) < 7)


def test_the_index_depends_on_names_alone(dagm, tmp_path, monkeypatch):
    strays = ("Class1/b/1.PNG", "Class1/b/2.PNG", "Class1/a/1.PNG")
    first = list_samples("folder", tree(dagm, *strays))
    assert len(first.set_aside) == 3
    again = tree(tmp_path / "again" / "dagm", *reversed(DAGM_FILES + strays))
    text(again / "rules.toml", DAGM)
    second = _index_backwards(monkeypatch, again, layout="rules.toml")
    assert [(s.key, s.split, s.label, s.mask) for s in first.samples] == [
        (s.key, s.split, s.label, s.mask) for s in second.samples
    ]
    assert first.set_aside == second.set_aside
    far = text(tmp_path / "elsewhere.toml", DAGM)
    assert index(described(again, layout=str(far))) == index(second)


def _index_backwards(monkeypatch: pytest.MonkeyPatch, root: Path, **options: Any) -> Listing:
    """The listing where the system names the files of each folder in the opposite order."""
    walk = os.walk

    def backwards(*args: Any, **kwargs: Any) -> Any:
        for folder, names, files in walk(*args, **kwargs):
            names.sort(reverse=True)
            yield folder, names, sorted(files, reverse=True)

    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", backwards)
        return described(root, **options)


def test_categories_are_chosen_by_name(dagm):
    listing = described(dagm, ["Class2"])
    assert set(index(listing)) == {"Class2/Train/0001.PNG", "Class2/Test/0009.PNG"}
    assert listing.set_aside == []
    with pytest.raises(DatasetError, match="unknown category 'Class3'; did you mean Class"):
        described(dagm, ["Class3"])
    with pytest.raises(OutsideRoot):
        described(dagm, [".."])


LABELME = """
category = "gear"
train = "good/{part}_*.jpg"
test = "bad/{defect_type}/{part}_*.jpg"
inspect = "new/*.jpg"
mask = "{parent}/{stem}.json"
mask_rule = "labelme"
test_share = 0.2
"""


def test_outlines_of_labelme_with_parts_that_stay_together(tmp_path):
    good = [f"good/{part}_{view}.jpg" for part in range(10) for view in ("left", "right")]
    root = tree(tmp_path, *good, "bad/scratch/3_top.jpg", "bad/scratch/11_top.jpg", "bad/dent/12_top.jpg", "new/x.jpg")
    text(root / "bad/scratch/3_top.json", outline(5))
    text(root / "bad/dent/12_top.json", outline(9))
    text(root / "layout.toml", LABELME)
    listing = list_samples("folder", root)
    found = index(listing)
    assert listing.set_aside == []
    assert found["bad/scratch/3_top.jpg"] == ("gear", "test", "anomalous", "scratch", "bad/scratch/3_top.json")
    assert found["bad/scratch/11_top.jpg"] == ("gear", "test", "anomalous", "scratch", "-")
    assert found["new/x.jpg"] == ("gear", "test", "unknown", "unknown", "-")
    marked = {s.path: read_mask(root, s).sum() for s in listing.samples if s.mask is not None}
    assert marked == {"bad/scratch/3_top.jpg": 5 * HEIGHT, "bad/dent/12_top.jpg": 9 * HEIGHT}
    assert [s.mask_state for s in listing.samples if s.path == "bad/scratch/11_top.jpg"] == ["unknown"]
    drawn = [_test_parts(described(root, seed=seed)) for seed in (0, 1, 2, 3, 4, 5, 0)]
    assert all(parts >= {"3", "11", "12"} for parts in drawn)  # 3 has an anomalous image
    assert all(len(parts - {"3", "11", "12"}) == 2 for parts in drawn)  # a fifth of the other nine
    assert drawn[0] == drawn[-1] == _test_parts(listing)
    assert len(set(drawn)) > 1
    moved = [s for s in listing.samples if s.path == "good/3_left.jpg"]
    assert [(s.split, s.label, s.defect_type, s.mask) for s in moved] == [("test", "good", "good", None)]


def _test_parts(listing: Listing) -> frozenset[str]:
    splits: dict[str, set[str]] = {}
    for sample in listing.samples:
        if sample.part is not None:  # the image to inspect has none
            splits.setdefault(sample.part, set()).add(sample.split)
    assert all(len(where) == 1 for where in splits.values())
    return frozenset(part for part, where in splits.items() if where == {"test"})


def test_a_name_takes_as_few_characters_as_possible(tmp_path):
    """Else `1_top_left` and `1_low_left` would be of two parts, `1_top` and `1_low`, and could be torn apart."""
    root = tree(tmp_path / "gear", "1_top_left.png", "1_low_left.png", "2.png")
    listing = described(root, train="{part}_*.png")
    assert [s.part for s in listing.samples] == ["1", "1"]
    assert aside(listing) == {".": "1 images here are claimed by no pattern, the first: 2.png"}


def test_a_part_in_two_folders_stands_in_the_split_furthest_from_learning(tmp_path):
    root = tree(tmp_path / "gear", *(f"good/{p}_{v}.png" for p in "abc" for v in "12"), "val/b_3.png", "bad/c_9.png")
    listing = described(root, train="good/{part}_*.png", validation="val/{part}_*.png", test="bad/{part}_*.png")
    assert [(s.path, s.split) for s in listing.samples] == [
        *[("bad/c_9.png", "test"), ("good/a_1.png", "train"), ("good/a_2.png", "train"), ("val/b_3.png", "validation")],
    ]
    assert aside(listing) == {
        **{f"good/b_{v}.png": "part b also stands in validation; no part may stand in two splits" for v in "12"},
        **{f"good/c_{v}.png": "part c also stands in test; no part may stand in two splits" for v in "12"},
    }


def test_without_parts_images_are_drawn_and_all_but_one_folder_may_be_missing(tmp_path):
    root = tree(tmp_path / "gear", *(f"{n}.png" for n in range(20)))
    listing = described(root, train="*.png", test_share=0.25)
    assert [s.label for s in listing.samples] == ["good"] * 20
    assert sum(s.split == "test" for s in listing.samples) == 5
    assert {s.category for s in listing.samples} == {"gear"}


def test_masks_in_a_folder_of_their_own_and_several_places_in_order(tmp_path):
    root = tree(
        *(
            tmp_path / "a",
            "nut/good/1.png",
            "nut/defects/bent/2.png",
            "nut/defects/bent/3.png",
            "nut/defects/good/4.png",
        ),
        *("masks/bent/2_mask.png=4", "nut/defects/bent/3_label.bmp=6", "nut/more/7.png", "nut/more/8.png"),
    )
    listing = described(
        root,
        train="{category}/good/*.png",
        test="{category}/defects/{defect_type}/*.png",
        mask=["masks/{defect_type}/{stem}_mask.png", "{parent}/{stem}_label.bmp"],
        mask_rule="nonzero",
    )
    assert index(listing) == {
        "nut/defects/bent/2.png": ("nut", "test", "anomalous", "bent", "masks/bent/2_mask.png"),
        "nut/defects/bent/3.png": ("nut", "test", "anomalous", "bent", "nut/defects/bent/3_label.bmp"),
        "nut/defects/good/4.png": ("nut", "test", "good", "good", "-"),
        "nut/good/1.png": ("nut", "train", "good", "good", "-"),
    }
    assert aside(listing) == {"nut/more": "2 images here are claimed by no pattern, the first: 7.png"}
    assert [s.mask_rule for s in listing.samples] == ["nonzero", "nonzero", "auto", "auto"]


def test_a_mask_may_be_a_folder_or_lie_beside_its_image_under_the_same_pattern(tmp_path):
    root = tree(
        *(tmp_path / "a", "good/g.png", "bad/a.png", "bad/a_mask.png=3", "bad/b.png", "gt/b/0.png=2", "gt/b/1.png=5"),
    )
    listing = described(root, train="good/*.png", test="bad/*.png", mask=["{parent}/{stem}_mask{suffix}", "gt/{stem}"])
    found = {s.path: s for s in listing.samples}
    assert {path: s.mask for path, s in found.items()} == {
        "bad/a.png": "bad/a_mask.png",
        "bad/b.png": "gt/b",
        "good/g.png": None,
    }
    assert listing.set_aside == []
    assert read_mask(listing.root, found["bad/b.png"]).sum() == 5 * HEIGHT


def test_names_of_masks_may_share_an_id_with_their_images(tmp_path):
    root = tree(tmp_path / "a", "g/img_1.png", "x/img_2_a.png", "x/img_3_b.png", "y/msk-2.png=1", "y/msk-3.png=2")
    listing = described(root, train="g/*.png", test="x/img_{id}_?.png", mask="{parent}/../y/msk-{id}.png")
    assert [s.mask for s in listing.samples] == [None, "y/msk-2.png", "y/msk-3.png"]
    assert listing.set_aside == []


def test_a_name_repeated_in_a_pattern_must_be_the_same(tmp_path):
    root = tree(tmp_path / "a", "nut/nut_1.png", "nut/bolt_2.png")
    listing = described(root, train="{category}/{category}_*.png")
    assert list(index(listing)) == ["nut/nut_1.png"]
    assert aside(listing) == {"nut": "1 images here are claimed by no pattern, the first: bolt_2.png"}


def test_stars_and_question_marks_stay_in_a_folder_and_two_stars_do_not(tmp_path):
    root = tree(tmp_path / "a", "g/1.png", "g/12.png", "g/x/3.png", "g/x/y/4.png", "g/[1].png", "g/a.b.png")

    def train(pattern: str) -> list[str]:
        return [path.removeprefix("g/") for path in index(described(root, train=pattern))]

    assert train("g/?.png") == ["1.png"]
    assert train("g/[1].png") == ["[1].png"]
    assert train("g/a.b.png") == ["a.b.png"]
    assert train("./g/*.png") == ["1.png", "12.png", "[1].png", "a.b.png"]
    assert train("g/**/*.png") == ["1.png", "12.png", "[1].png", "a.b.png", "x/3.png", "x/y/4.png"]
    assert train("g/*/**") == ["x/3.png", "x/y/4.png"]
    assert train("**/y/*.png") == ["x/y/4.png"]


def test_an_image_with_an_empty_mask_is_good(tmp_path):
    root = tree(
        *(tmp_path / "a", "train/1.png", "train/2.png", "train/1_GT.png=0", "train/2_GT.png=1"),
        *("test/3.png", "test/4.png", "test/5.png", "test/6.png", "test/3_GT.png=0", "test/4_GT.png=2"),
    )
    text(root / "test/6_GT.png", "no image")
    listing = described(root, train="train/*.png", test="test/*.png", mask="{parent}/{stem}_GT.png", good_by_mask=True)
    assert index(listing) == {
        "test/3.png": ("a", "test", "good", "good", "-"),
        "test/4.png": ("a", "test", "anomalous", "unknown", "test/4_GT.png"),
        "train/1.png": ("a", "train", "good", "good", "-"),
    }
    reasons = aside(listing)
    assert set(reasons) == {"train/2.png", "test/5.png", "test/6.png"}
    assert "shows a defect" in reasons["train/2.png"]
    assert "no mask to say" in reasons["test/5.png"]
    assert "cannot be read: no image" in reasons["test/6.png"]
    both = described(
        root, train="train/*.png", test="test/*.png", mask="{parent}/{stem}_GT.png", good_by_mask=True,
        good_without_mask=True,
    )  # fmt: skip
    assert index(both)["test/5.png"] == ("a", "test", "good", "good", "-")


def test_a_mask_that_leads_out_of_the_root_makes_no_image_good(tmp_path):
    root = tree(tmp_path / "a", "train/1.png", "test/2.png")
    (root / "test/2_m.png").symlink_to(mask(tmp_path / "secret.png", 3))
    options = {"train": "train/*.png", "test": "test/*.png", "mask": "{parent}/{stem}_m.png"}
    listing = described(root, **options)
    assert index(listing)["test/2.png"] == ("a", "test", "anomalous", "unknown", "-")
    assert "outside of the data set" in aside(listing)["test/2_m.png"]
    listing = described(root, **options, good_without_mask=True)
    assert list(index(listing)) == ["train/1.png"]
    assert "cannot be used: " in aside(listing)["test/2.png"]


def coco_file(path: Path, names: list[str]) -> Path:
    images = [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(names)]
    shape = [0, 0, 6, 0, 6, HEIGHT, 0, HEIGHT]
    return text(path, {"images": images, "annotations": [{"id": 5, "image_id": 0, "segmentation": [shape]}]})


@pytest.mark.parametrize(
    ("names", "rule", "rules"),
    [
        (["1.png", "2.png"], "coco", ["coco:test/1.png"]),
        (["gear/test/1.png", "gear/test/2.png"], "coco", ["coco:test/1.png"]),
        (["default/1.png", "default/2.png"], "coco:{name}", ["coco:1.png"]),
        (["default/1.png", "default/2.png"], "coco:default/{name}", ["coco:default/1.png"]),
    ],
)
def test_a_coco_file_serves_all_images(tmp_path, names, rule, rules):
    root = tree(tmp_path / "gear", "good/1.png", "test/1.png", "test/2.png")
    coco_file(root / "annotations.json", names)
    listing = described(root, train="good/*.png", test="test/*.png", mask="annotations.json", mask_rule=rule)
    assert [s.mask for s in listing.samples] == [None, "annotations.json", "annotations.json"]
    assert [read_mask(root, s).sum() for s in listing.samples if s.mask] == [6 * HEIGHT, 0]
    assert [s.mask_rule for s in listing.samples][1:2] == rules


def test_a_coco_file_says_which_images_are_good(tmp_path):
    root = tree(tmp_path / "gear", "train/3.png", "train/1.png", "test/1.png", "test/2.png", "test/9.png")
    coco_file(root / "annotations.json", ["test/1.png", "test/2.png", "train/3.png", "train/1.png"])
    listing = described(
        root, train="train/*", test="test/*", mask="annotations.json", mask_rule="coco", good_by_mask=True
    )
    assert index(listing) == {
        "test/1.png": ("gear", "test", "anomalous", "unknown", "annotations.json"),
        "test/2.png": ("gear", "test", "good", "good", "-"),
        "train/1.png": ("gear", "train", "good", "good", "-"),
        "train/3.png": ("gear", "train", "good", "good", "-"),
    }
    assert "0 images are named 'test/9.png'" in aside(listing)["test/9.png"]


def test_options_override_the_file(dagm):
    listing = described(dagm, train="Class1/Train/0001.PNG", test=[], category="one", mask=[], good_without_mask=False)
    assert index(listing) == {"Class1/Train/0001.PNG": ("one", "train", "good", "good", "-")}
    assert set(options_of("folder")) >= {"layout", "train", "test", "mask", "seed", "inspect"}


def test_images_that_two_patterns_claim_differently_are_set_aside(tmp_path):
    root = tree(tmp_path / "a", "good/1.png", "good/2.png", "new/3.png")
    listing = described(root, train=["good/*.png", "good/1.png"], inspect=["new/*", "good/2*"])
    assert list(index(listing)) == ["good/1.png", "new/3.png"]
    assert aside(listing) == {
        "good/2.png": "claimed by train 'good/*.png' and inspect 'good/2*', which differ; narrow one of them"
    }
    with pytest.raises(DatasetError, match=r"good/1.png would be both good and anomalous: .*train.*test"):
        described(root, train="good/*.png", test="*/1.png")
    same = described(root, train="good/1.png", test_good="good/2.png", test="{defect_type}/2.png")
    assert index(same)["good/2.png"] == ("a", "test", "good", "good", "-")


def test_an_image_that_is_also_a_mask_is_set_aside(tmp_path):
    root = tree(tmp_path / "a", "good/1.png", "good/2.png", "bad/2.png")
    listing = described(root, train="good/*.png", test="bad/*.png", mask="good/{name}")
    assert aside(listing) == {"good/2.png": "claimed by train 'good/*.png', but also the mask of bad/2.png"}
    with pytest.raises(DatasetError, match="each other's masks"):
        described(tree(tmp_path / "b", "g.png", "x/1.png", "x/1.jpg"), train="*.png", test="x/*",
                  mask=["{parent}/{stem}.png", "{parent}/{stem}.jpg"])  # fmt: skip


def test_patterns_that_match_nothing_are_told(tmp_path):
    root = tree(tmp_path / "a", "nut/good/1.PNG", "bolt/bad/2.PNG")
    with pytest.raises(
        DatasetError, match=r"train '\*/good/\*.png' matches none of 2 images; letters' case counts, and"
    ):
        described(root, train="*/good/*.png")
    with pytest.raises(DatasetError, match=r"a pattern names files: write nut/good/\*"):
        described(root, train="nut/good/")
    with pytest.raises(DatasetError, match=r"none of 2 images, such as bolt/bad/2\.PNG"):
        described(root, train="ok/*.PNG")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="none of 0 images"):
        described(tmp_path / "empty", train="*.gif")
    listing = described(
        root, train="{category}/good/*.PNG", test="{category}/bad/*.PNG", mask="{category}/gt/{stem}.png"
    )
    assert listing.problems == {"bolt": "train = {category}/good/*.PNG leaves it no image to learn from"}
    assert list(index(listing)) == ["nut/good/1.PNG"]
    assert {(entry.category, entry.path) for entry in listing.set_aside} == {
        ("bolt", "mask '{category}/gt/{stem}.png'"),
        ("nut", "mask '{category}/gt/{stem}.png'"),
    }
    listing = described(root, train="nut/good/*", test_good="nut/ok/*.png", inspect="nut/new/*.png")
    assert list(aside(listing)) == ["bolt/bad", "test_good 'nut/ok/*.png'", "inspect 'nut/new/*.png'"]


def test_images_that_nobody_claims_are_told_to_the_categories_near_them(tmp_path):
    root = tree(tmp_path / "a", "nut/good/1.png", "nut/x/2.png", "nut/x/3.png", "bolt/good/1.png", "y/4.png", "5.png")
    picture(root / "nut/.cache/9.png")
    text(root / "nut/good/Thumbs.db", "x")
    listing = described(root, train="{category}/good/*.png")
    assert [(e.category, e.path, e.reason) for e in listing.set_aside] == [
        ("bolt", ".", "1 images here are claimed by no pattern, the first: 5.png"),
        ("nut", ".", "1 images here are claimed by no pattern, the first: 5.png"),
        ("nut", "nut/x", "2 images here are claimed by no pattern, the first: 2.png"),
        ("bolt", "y", "1 images here are claimed by no pattern, the first: 4.png"),
        ("nut", "y", "1 images here are claimed by no pattern, the first: 4.png"),
    ]


def test_links_that_lead_out_of_the_root_are_refused(tmp_path):
    root = tree(tmp_path / "a", "good/1.png", "more/2.png")
    (root / "good/x.png").symlink_to(picture(tmp_path / "secret/x.png"))
    (root / "good/gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "good/within.png").symlink_to(root / "more/2.png")
    (root / "linked").symlink_to(tmp_path / "secret", target_is_directory=True)
    listing = described(root, train=["good/*.png", "linked/*.png"])
    assert list(index(listing)) == ["good/1.png", "good/within.png"]
    reasons = aside(listing)
    assert "outside of the data set" in reasons["good/x.png"]
    assert "broken link" in reasons["good/gone.png"]
    assert "a link to a folder, which is not followed" in reasons["linked"]


@pytest.mark.parametrize("pattern", ["/etc/*.png", "../*.png", "a/../../*.png", "C:/x/*.png"])
def test_patterns_that_leave_the_root_are_refused(tmp_path, pattern):
    root = tree(tmp_path / "a", "good/1.png")
    with pytest.raises(OutsideRoot, match="leaves the root"):
        described(root, train=pattern)


def test_masks_that_leave_the_root_are_refused(tmp_path):
    root = tree(tmp_path / "a", "good/1.png", "bad/2.png", "../2.png")
    for place in ("../{name}", "{parent}/../../{name}", "/tmp/{name}"):
        with pytest.raises(OutsideRoot, match="leaves the root"):
            described(root, train="good/*.png", test="bad/*.png", mask=place)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ('trian = "good/*.png"', "unknown key of a layout 'trian'; did you mean train"),
        ('train = "good/*.png"\ncolour = 3', "unknown key of a layout 'colour'; known: category, good, good_by_mask, "),
        ('test = "bad/*.png"', "needs the key train"),
        ("", "needs the key train"),
        ("train = []", "needs the key train"),
        ("train = 3", "train was 3, expected a text"),
        ('train = ["a", 3]', "expected a text"),
        ('train = "good\\\\*.png"', "write / between folders"),
        ('train = "{categry}/*.png"', "'categry'; did you mean category"),
        ('train = "{category/*.png"', "a brace without its other half"),
        ('train = "{a.b}/*.png"', "an odd name in braces"),
        ('train = "{}/*.png"', "unknown name"),
        ('train = "{category}/*.png"\ntest = "bad/*.png"', "'bad/\\*.png' lacks {category}"),
        ('train = "{category}/*.png"\ncategory = "x"', "leave one out"),
        ('train = "*.png"\ncategory = "../x"', "without slashes"),
        ('train = "*.png"\ncategory = 3', "expected str"),
        ('train = "*.png"\nmask = "{stem}_{defect}.png"', "'defect'; did you mean defect_type"),
        ('train = "*.png"\ntest = "x/*.png"\nmask = "{defect_type}/{name}"', "needs {defect_type}, which test 'x"),
        ('train = "*.png"\ngood_by_mask = 1', "good_by_mask was 1, expected bool"),
        ('train = "*.png"\ngood_by_mask = true', "need the key mask"),
        ('train = "*.png"\nseed = true', "seed was True, expected int"),
        ('train = "*.png"\ntest_share = 1', "test_share was 1, expected a share"),
        ('train = "*.png"\ntest_share = nan', "expected a share"),
        ('train = "*.png"\ntest_share = 0.1\ntest_good = "x/*"', "leave one of them out"),
        ('train = "*.png"\nmask_rule = "label"', "unknown mask_rule 'label'; did you mean labelme"),
        ('train = "*.png"\nmask = "{stem}.json"', "say labelme or coco"),
        ("train = ", "is no TOML file"),
        ("a = " + "[" * 5000, "is no TOML file"),
    ],
)
def test_a_layout_that_makes_no_sense_says_what_is_wrong(tmp_path, table, reason):
    root = tree(tmp_path / "a", "good/1.png")
    text(root / "layout.toml", table)
    with pytest.raises(DatasetError, match=reason):
        list_samples("folder", root)


def test_a_layout_that_is_no_file_is_told(tmp_path):
    root = tree(tmp_path / "a", "good/1.png")
    (root / "bytes.toml").write_bytes(b'train = "\xff\xfe"')
    for name, reason in (("none.toml", "cannot be read"), ("good", "cannot be read"), ("bytes.toml", "no TOML")):
        with pytest.raises(DatasetError, match=reason):
            described(root, layout=name)
    with pytest.raises(DatasetError, match="is not a folder"):
        described(tmp_path / "nowhere", train="*.png")
    with pytest.raises(DatasetError, match=r"unknown option of folder 'trian'; did you mean train"):
        described(root, trian="*.png")


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    root = tree(tmp_path / "a", "good/1.png", "shut/2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # whoever runs the tests may be allowed to read everything
    assert "may not be read" in aside(described(root, train="good/*.png"))["shut"]


def test_the_older_layouts_still_work(tmp_path):
    plain = tree(tmp_path / "gear", "1.png", "new/2.png")
    assert index(described(plain, inspect=str(plain / "new"))) == {
        "1.png": ("gear", "train", "good", "good", "-"),
        "new/2.png": ("gear", "test", "unknown", "unknown", "-"),
    }
    mvtec = tree(tmp_path / "m", "nut/train/good/1.png", "nut/test/bent/2.png", "nut/ground_truth/bent/2_mask.png=3")
    assert index(list_samples("folder", mvtec))["nut/test/bent/2.png"][-1] == "nut/ground_truth/bent/2_mask.png"
    with pytest.raises(DatasetError, match=r"understood are: .*layout\.toml"):
        list_samples("folder", plain)
