"""Real-IAD: each image has its own label, a part never stands in two splits, and only good images are learned from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.datasets import about, list_samples
from storage.errors import DatasetError
from storage.masks import read_mask
from storage.samples import content_hash

TIME = "20230925164816"


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)


def mask(path: Path) -> None:
    values = np.zeros((24, 32), np.uint8)
    values[1:4, 6:20] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def view(number: int, camera: int, kind: str = "OK") -> str:
    """Path of an image below its category."""
    folder = f"OK/S{number:04}" if kind == "OK" else f"NG/{kind}/S{number:04}"
    mark = "OK" if kind == "OK" else f"NG_{kind}"
    return f"{folder}/usb_{number:04}_{mark}_C{camera}_{TIME}.jpg"


def entry(image: str, kind: str = "OK", truth: bool = False) -> dict[str, Any]:
    mask_path = image.replace(".jpg", "_mask.png") if truth else None
    return {"category": "usb", "anomaly_class": kind, "image_path": image, "mask_path": mask_path}


GOOD = [view(number, camera) for number in (1, 2, 3) for camera in (1, 2)]
BAD = [view(1, camera, "HS") for camera in (1, 2)]


def content() -> dict[str, Any]:
    return {
        "meta": {"prefix": "usb/", "normal_class": "OK", "pre_transform": False},
        "train": [entry(image) for image in GOOD[:4]],
        # the scratch of S0001 is not to be seen from the second camera
        "test": [entry(image) for image in GOOD[4:]] + [entry(BAD[0], "HS", truth=True), entry(BAD[1])],
    }


def build(root: Path, files: list[str], resolution: str = "256") -> Path:
    for image in files:
        picture(root / f"realiad_{resolution}/usb/{image}", [*GOOD, *BAD].index(image))
    mask(root / f"realiad_{resolution}/usb" / BAD[0].replace(".jpg", "_mask.png"))
    write(root / "realiad_jsons/realiad_jsons/usb.json", content())
    return root


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return build(tmp_path / "Real-IAD", [*GOOD, *BAD])


def test_the_index_is_the_json(tree: Path) -> None:
    listing = list_samples("real_iad", tree)
    base = "realiad_256/usb/"
    truth = base + BAD[0].replace(".jpg", "_mask.png")
    assert [(s.path, s.split, s.label, s.defect_type, s.mask, s.part) for s in listing.samples] == [
        (base + BAD[0], "test", "anomalous", "scratch", truth, "NG/HS/S0001"),
        (base + BAD[1], "test", "good", "good", None, "NG/HS/S0001"),
        (base + GOOD[0], "train", "good", "good", None, "OK/S0001"),
        (base + GOOD[1], "train", "good", "good", None, "OK/S0001"),
        (base + GOOD[2], "train", "good", "good", None, "OK/S0002"),
        (base + GOOD[3], "train", "good", "good", None, "OK/S0002"),
        (base + GOOD[4], "test", "good", "good", None, "OK/S0003"),
        (base + GOOD[5], "test", "good", "good", None, "OK/S0003"),
    ]
    assert listing.set_aside == []
    assert listing.problems == {}
    assert all(s.id == content_hash((tree / s.path).read_bytes()) for s in listing.samples)
    marked = listing.samples[0]
    assert marked.mask_id == content_hash((tree / truth).read_bytes())
    pixels = read_mask(listing.root, marked, listing.folders)
    assert pixels.sum() == 3 * 14
    assert pixels[1:4, 6:20].all()


def test_a_part_that_is_judged_is_not_learned_from(tree: Path) -> None:
    value = content()
    value["test"].append(entry(GOOD[1]))  # one camera of S0001
    value["train"].remove(entry(GOOD[1]))
    write(tree / "realiad_jsons/realiad_jsons/usb.json", value)
    listing = list_samples("real_iad", tree)
    splits: dict[str | None, set[str]] = {}
    for sample in listing.samples:
        splits.setdefault(sample.part, set()).add(sample.split)
    assert all(len(found) == 1 for found in splits.values())
    assert splits["OK/S0001"] == {"test"}
    assert [(e.path.rsplit("/", 1)[-1], "of the part OK/S0001" in e.reason) for e in listing.set_aside] == [
        (GOOD[0].rsplit("/", 1)[-1], True)
    ]


def test_defects_mixed_into_training_are_set_aside(tree: Path) -> None:
    value = content()
    value["train"] += [entry(BAD[0], "HS", truth=True)]
    value["test"] = [entry(image) for image in GOOD[4:]]
    write(tree / "realiad_jsons/realiad_jsons_fuiad_0.4/usb.json", value)
    listing = list_samples("real_iad", tree, options={"split": "realiad_jsons_fuiad_0.4"})
    reasons = {entry.path.rsplit("/", 1)[-1]: entry.reason for entry in listing.set_aside}
    assert reasons.pop(BAD[0].rsplit("/", 1)[-1]).startswith("a defective image")
    assert reasons == {BAD[1].rsplit("/", 1)[-1]: "in no list of realiad_jsons/realiad_jsons_fuiad_0.4/usb.json"}
    assert {sample.label for sample in listing.samples} == {"good"}


def test_json_folders_may_lie_in_the_root(tree: Path) -> None:
    value = content()
    value["train"], value["test"] = value["train"][::2], value["test"][::2]
    write(tree / "realiad_jsons_sv/usb.json", value)
    listing = list_samples("real_iad", tree, options={"split": "realiad_jsons_sv"})
    assert {sample.path.split("_")[-2] for sample in listing.samples} == {"C1"}
    assert len(listing.set_aside) == 4


def test_the_resolution_must_be_named_where_there_are_several(tree: Path) -> None:
    build(tree, [*GOOD, *BAD], "1024")
    with pytest.raises(DatasetError, match="256, 1024; name one by the option `resolution`"):
        list_samples("real_iad", tree)
    for resolution in ("1024", 1024):
        listing = list_samples("real_iad", tree, options={"resolution": resolution})
        assert {sample.path.split("/")[0] for sample in listing.samples} == {"realiad_1024"}
    with pytest.raises(DatasetError, match="resolution '512'"):
        list_samples("real_iad", tree, options={"resolution": "512"})


@pytest.mark.parametrize("place", ["../../../secret.jpg", "/secret.jpg", "a\0b.jpg", "OK/../../../../secret.jpg"])
def test_an_entry_that_leaves_the_root_is_refused(tree: Path, place: str) -> None:
    picture(tree.parent / "secret.jpg", 99)
    value = content()
    value["train"].append(entry(place))
    value["test"][2]["mask_path"] = place
    write(tree / "realiad_jsons/realiad_jsons/usb.json", value)
    listing = list_samples("real_iad", tree)
    assert len(listing.samples) == 8
    assert all("secret" not in sample.path for sample in listing.samples)
    assert listing.samples[0].mask_state == "unknown"
    assert any("secret" in e.path or "\0" in e.path for e in listing.set_aside)


def test_missing_files_and_broken_entries_are_set_aside(tree: Path) -> None:
    (tree / "realiad_256/usb" / GOOD[0]).unlink()
    value = content()
    value["test"] += [{"image_path": 3}, entry(GOOD[4])]
    write(tree / "realiad_jsons/realiad_jsons/usb.json", value)
    listing = list_samples("real_iad", tree)
    reasons = {e.path.rsplit("/", 1)[-1]: e.reason for e in listing.set_aside}
    assert len(listing.samples) == 7
    assert len(reasons) == 3
    assert reasons[GOOD[0].rsplit("/", 1)[-1]].startswith("missing")
    assert "no anomaly_class" in reasons["usb.json[test][4]"]
    assert "more than once" in reasons[GOOD[4].rsplit("/", 1)[-1]]


@pytest.mark.parametrize("text", ["", "[]", '{"train": 1}', '{"meta": 3, "train": []}', "[" * 100_000])
def test_a_damaged_json_is_a_problem_of_its_category(tree: Path, text: str) -> None:
    (tree / "realiad_jsons/realiad_jsons/zipper.json").write_text(text)
    listing = list_samples("real_iad", tree)
    assert list(listing.problems) == ["zipper"]
    assert "zipper.json" in listing.problems["zipper"]
    assert len(listing.samples) == 8


def test_a_category_without_images_is_a_problem(tree: Path) -> None:
    write(tree / "realiad_jsons/realiad_jsons/mint.json", content() | {"meta": {"prefix": "mint/"}})
    listing = list_samples("real_iad", tree)
    assert list(listing.problems) == ["mint"]
    assert "missing" in listing.problems["mint"]
    assert {sample.category for sample in listing.samples} == {"usb"}
    assert list_samples("real_iad", tree, ["usb"]).problems == {}


def test_the_index_does_not_depend_on_the_order_of_files(tree: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", [*BAD, *GOOD[::-1]])
    value = content()
    value["train"].reverse()
    write(again / "realiad_jsons/realiad_jsons/usb.json", value)
    assert [asdict(s) for s in list_samples("real_iad", again).samples] == [
        asdict(s) for s in list_samples("real_iad", tree).samples
    ]


def test_a_wrong_folder_names_what_is_expected(tree: Path) -> None:
    assert list_samples("real_iad", tree.parent).root == tree.resolve()
    with pytest.raises(DatasetError, match="has no folder realiad_256"):
        list_samples("real_iad", tree / "realiad_256/usb")
    with pytest.raises(DatasetError, match="give it as root"):
        list_samples("real_iad", tree / "realiad_256")
    with pytest.raises(DatasetError, match=r"folders of JSON files there: realiad_jsons;"):
        list_samples("real_iad", tree, options={"split": "realiad_jsons_sv"})
    with pytest.raises(DatasetError, match="expected the name of a folder"):
        list_samples("real_iad", tree, options={"split": "../elsewhere"})


def test_nothing_is_downloaded_that_must_be_asked_for() -> None:
    facts = about("real_iad")
    assert facts.downloads == ()
    assert "request access" in facts.obtain
    assert len(facts.categories) == 30
