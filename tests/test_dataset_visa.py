"""VisA: what its split CSVs say is what is learned from and judged, and nothing they name leaves the root."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.datasets import about, list_samples
from storage.datasets.visa import PROTOCOLS
from storage.errors import DatasetError
from storage.files import read_image
from storage.masks import read_mask
from storage.samples import Sample, content_hash

HEADER = "object,split,label,image,mask"


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path, "JPEG")


def mask(path: Path, value: int) -> None:
    values = np.zeros((24, 32), np.uint8)
    values[2:5, 3:9] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def row(category: str, split: str, kind: str, name: str) -> str:
    label = "normal" if kind == "Normal" else "anomaly"
    truth = "" if kind == "Normal" else f"{category}/Data/Masks/Anomaly/{Path(name).stem}.png"
    return f"{category},{split},{label},{category}/Data/Images/{kind}/{name},{truth}"


FILES = [
    *(("candle", "Normal", f"{i:04}.JPG") for i in range(5)),
    *(("candle", "Anomaly", f"{i:03}.JPG") for i in range(3)),
    *(("pcb1", "Normal", f"{i:04}.JPG") for i in range(2)),
    ("pcb1", "Anomaly", "000.JPG"),
]

ROWS = {
    "1cls": [
        row("candle", "train", "Normal", "0003.JPG"),
        row("candle", "train", "Normal", "0001.JPG"),
        row("candle", "test", "Normal", "0000.JPG"),
        row("candle", "test", "Anomaly", "000.JPG"),
        row("candle", "test", "Anomaly", "001.JPG"),
        row("candle", "test", "Anomaly", "002.JPG"),
        row("pcb1", "train", "Normal", "0001.JPG"),
        row("pcb1", "test", "Normal", "0000.JPG"),
        row("pcb1", "test", "Anomaly", "000.JPG"),
    ],
    "2cls_fewshot": [
        row("candle", "train", "Normal", "0001.JPG"),
        row("candle", "train", "Anomaly", "002.JPG"),
        row("candle", "test", "Normal", "0000.JPG"),
        row("candle", "test", "Anomaly", "000.JPG"),
    ],
}


def build(root: Path, files: list[tuple[str, str, str]] = FILES) -> Path:
    for category, kind, name in files:
        picture(root / f"{category}/Data/Images/{kind}/{name}", FILES.index((category, kind, name)))
        if kind == "Anomaly":
            mask(root / f"{category}/Data/Masks/Anomaly/{Path(name).stem}.png", 1 + int(Path(name).stem))
    (root / "split_csv").mkdir()
    for protocol, rows in ROWS.items():
        (root / f"split_csv/{protocol}.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (root / "candle/image_anno.csv").write_text(
        "image,label,mask\n"
        "candle/Data/Images/Normal/0000.JPG,normal,\n"
        "candle/Data/Images/Anomaly/000.JPG,extra wax in candle,candle/Data/Masks/Anomaly/000.png\n"
        'candle/Data/Images/Anomaly/001.JPG,"weird candle wick,other",candle/Data/Masks/Anomaly/001.png\n'
    )
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return build(tmp_path / "VisA")


def brief(samples: list[Sample]) -> list[tuple[str, str, str, str, str | None]]:
    return [(s.path, s.split, s.label, s.defect_type, s.mask) for s in samples]


def edit(root: Path, *rows: str) -> None:
    with (root / "split_csv/1cls.csv").open("a") as file:
        file.write("\n".join(rows) + "\n")


def test_the_index_is_the_csv(tree: Path) -> None:
    listing = list_samples("visa", tree)
    images, masks = "candle/Data/Images", "candle/Data/Masks/Anomaly"
    assert brief(listing.samples) == [
        (f"{images}/Anomaly/000.JPG", "test", "anomalous", "extra wax in candle", f"{masks}/000.png"),
        (f"{images}/Anomaly/001.JPG", "test", "anomalous", "combined", f"{masks}/001.png"),
        (f"{images}/Anomaly/002.JPG", "test", "anomalous", "anomaly", f"{masks}/002.png"),
        (f"{images}/Normal/0000.JPG", "test", "good", "good", None),
        (f"{images}/Normal/0001.JPG", "train", "good", "good", None),
        (f"{images}/Normal/0003.JPG", "train", "good", "good", None),
        ("pcb1/Data/Images/Anomaly/000.JPG", "test", "anomalous", "anomaly", "pcb1/Data/Masks/Anomaly/000.png"),
        ("pcb1/Data/Images/Normal/0000.JPG", "test", "good", "good", None),
        ("pcb1/Data/Images/Normal/0001.JPG", "train", "good", "good", None),
    ]
    assert {s.dataset for s in listing.samples} == {"visa"}
    assert listing.problems == {}
    for sample in listing.samples:
        assert sample.id == content_hash((tree / sample.path).read_bytes())
        assert read_image(listing.root, sample, listing.folders) == (tree / sample.path).read_bytes()
        if sample.mask is not None:
            assert sample.mask_id == content_hash((tree / sample.mask).read_bytes())
    assert [(entry.path, entry.reason) for entry in listing.set_aside] == [
        (f"{images}/Normal/0002.JPG", "in no row of split_csv/1cls.csv"),
        (f"{images}/Normal/0004.JPG", "in no row of split_csv/1cls.csv"),
    ]


def test_every_value_of_a_mask_but_zero_is_anomalous(tree: Path) -> None:
    listing = list_samples("visa", tree, ["candle"])
    expected = np.zeros((24, 32), bool)
    expected[2:5, 3:9] = True
    anomalous = [sample for sample in listing.samples if sample.label == "anomalous"]
    assert len(anomalous) == 3  # their masks hold 1, 2 and 3
    for sample in anomalous:
        np.testing.assert_array_equal(read_mask(listing.root, sample, listing.folders), expected)


def test_two_class_protocols_learn_from_no_defect_and_keep_their_test_set(tree: Path) -> None:
    listing = list_samples("visa", tree, ["candle"], {"protocol": "2cls_fewshot"})
    assert [(s.path[-8:], s.split) for s in listing.samples] == [
        ("/000.JPG", "test"),
        ("0000.JPG", "test"),
        ("0001.JPG", "train"),
    ]
    reasons = {entry.path: entry.reason for entry in listing.set_aside}
    assert "supervised training split" in reasons.pop("candle/Data/Images/Anomaly/002.JPG")
    assert set(reasons.values()) == {"in no row of split_csv/2cls_fewshot.csv"}
    assert "candle/Data/Masks/Anomaly/002.png" not in reasons  # its row names it
    assert "candle/Data/Masks/Anomaly/001.png" in reasons


@pytest.mark.parametrize("place", ["../secret.JPG", "candle/../../secret.JPG", "{outside}/secret.JPG", "../none.JPG"])
def test_a_row_that_leaves_the_root_is_refused(tree: Path, place: str) -> None:
    picture(tree.parent / "secret.JPG", 99)
    place = place.format(outside=tree.parent.resolve().as_posix())
    edit(tree, f"candle,train,normal,{place},")
    listing = list_samples("visa", tree, ["candle"])
    assert all("secret" not in sample.path for sample in listing.samples)
    (entry,) = [entry for entry in listing.set_aside if entry.path == place]
    assert "outside of the data set" in entry.reason


def test_a_mask_that_leaves_the_root_is_unknown(tree: Path) -> None:
    mask(tree.parent / "secret.png", 1)
    picture(tree / "candle/Data/Images/Anomaly/009.JPG", 9)
    edit(tree, "candle,test,anomaly,candle/Data/Images/Anomaly/009.JPG,../secret.png")
    listing = list_samples("visa", tree, ["candle"])
    (sample,) = [sample for sample in listing.samples if sample.path.endswith("009.JPG")]
    assert sample.mask is None
    assert sample.mask_state == "unknown"
    assert [entry.reason[:6] for entry in listing.set_aside if entry.path == "../secret.png"] == ["a mask"]


def test_a_link_out_of_the_root_is_refused(tree: Path) -> None:
    picture(tree.parent / "secret.JPG", 99)
    (tree / "candle/Data/Images/Normal/link.JPG").symlink_to(tree.parent / "secret.JPG")
    edit(tree, row("candle", "train", "Normal", "link.JPG"))
    listing = list_samples("visa", tree, ["candle"])
    (entry,) = [entry for entry in listing.set_aside if "link" in entry.path]
    assert "outside of the data set" in entry.reason
    assert len(listing.samples) == 6


def test_missing_files_and_odd_rows_are_set_aside(tree: Path) -> None:
    (tree / "candle/Data/Images/Normal/0003.JPG").unlink()
    (tree / "candle/Data/Masks/Anomaly/001.png").unlink()
    edit(tree, row("candle", "train", "Normal", "0000.JPG"), row("candle", "dev", "Normal", "0002.JPG"))
    listing = list_samples("visa", tree, ["candle"])
    split = {sample.path[-8:]: sample.split for sample in listing.samples}
    assert split["0000.JPG"] == "test"
    assert "0003.JPG" not in split
    assert {sample.path[-8:]: sample.mask for sample in listing.samples}["/001.JPG"] is None
    reasons = {entry.path.rsplit("/", 1)[-1]: entry.reason for entry in listing.set_aside}
    assert reasons["0003.JPG"].startswith("missing")
    assert reasons["001.png"].startswith("a mask, which is missing")
    assert "more than one row" in reasons["0000.JPG"]
    assert "'dev'" in reasons["0002.JPG"]


def test_a_category_without_training_images_is_a_problem(tree: Path) -> None:
    (tree / "pcb1/Data/Images/Normal/0001.JPG").unlink()
    listing = list_samples("visa", tree)
    assert list(listing.problems) == ["pcb1"]
    assert {s.category for s in listing.samples} == {"candle"}


def test_the_index_does_not_depend_on_the_order_of_files(tree: Path, tmp_path: Path) -> None:
    again = build(tmp_path / "again", FILES[::-1])
    assert [asdict(s) for s in list_samples("visa", again).samples] == [
        asdict(s) for s in list_samples("visa", tree).samples
    ]


def test_the_root_may_be_one_folder_above(tree: Path) -> None:
    assert list_samples("visa", tree.parent).root == tree.resolve()
    build(tree.parent / "copy")
    with pytest.raises(DatasetError, match=r"several data sets \(VisA, copy\)"):
        list_samples("visa", tree.parent)


def test_a_wrong_folder_names_what_is_expected(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no split_csv/1cls.csv.*give it as root"):
        list_samples("visa", tree / "candle")
    (tmp_path / "empty/deep").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"no split_csv/2cls_highshot\.csv"):
        list_samples("visa", tmp_path / "empty/deep", options={"protocol": "2cls_highshot"})
    with pytest.raises(DatasetError, match="did you mean 2cls_fewshot"):
        list_samples("visa", tree, options={"protocol": "2cls_fewshots"})
    with pytest.raises(DatasetError, match="did you mean candle"):
        list_samples("visa", tree, ["candles"])


@pytest.mark.parametrize("text", ["", "object,split\ncandle,train\n", HEADER + "\ncandle,train\n", HEADER + "\n\xff\n"])
def test_a_damaged_csv_is_an_error(tree: Path, text: str) -> None:
    (tree / "split_csv/1cls.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DatasetError, match=r"1cls\.csv"):
        list_samples("visa", tree)


def test_the_published_numbers_add_up() -> None:
    facts = about("visa")
    assert sum(sum(counts.values()) for counts in facts.counts.values()) == facts.images == 10821
    assert sum(counts["train"] + counts["test/good"] for counts in facts.counts.values()) == 9621
    assert set(facts.counts) == set(facts.categories)
    assert PROTOCOLS[0] == "1cls"
