"""What holds for every data set of the table: facts, signature, errors, one order, every file accounted for."""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import re
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from storage.datasets import DATASETS, about, list_samples, options_of, published_counts
from storage.errors import DatasetError, OutsideRoot
from storage.files import Hashes
from storage.listing import Dataset, Listing, images_in, refused
from storage.readers import drawn, find_root, pair, strays

HEIGHT, WIDTH = 24, 32
MVTEC = ["{c}/train/good/0.png", "{c}/test/good/0.png", "{c}/test/bent/0.png", "{c}/ground_truth/bent/0_mask.png=3"]


def mvtec(category: str) -> list[str]:
    return [path.format(c=category) for path in MVTEC]


TREES: dict[str, list[str]] = {
    "btad": ["01/train/ok/0.bmp", "01/test/ok/0.bmp", "01/test/ko/0.bmp", "01/ground_truth/ko/0.png=3"],
    "demo": mvtec("brick"),
    "fabric": ["box/normal/0.bmp", "box/normal/1.bmp", "box/Hole/Bbox_he_d1.bmp", "box/Hole_GT/Bbox_he_gt1.bmp=3"],
    "folder": mvtec("gear"),
    "kolektorsdd": [f"kos0{i}/Part{part}" for i in (1, 2, 3) for part in ("0.jpg", "0_label.bmp=0")],
    "kolektorsdd2": ["train/10.png", "train/10_GT.png=0", "test/20.png", "test/20_GT.png=3"],
    "mpdd": mvtec("tubes"),
    "mt_defect": [
        f"MT_{kind}/Imgs/exp1_num_{i}" for kind, i in (("Free", "1.jpg"), ("Fray", "2.jpg"), ("Free", "1.png=0"))
    ],
    "mvtec_3d_ad": [
        *("tire/train/good/rgb/0.png", "tire/train/good/xyz/0.tiff", "tire/test/good/gt/0.png=0"),
        *("tire/test/good/rgb/0.png", "tire/test/hole/rgb/0.png", "tire/test/hole/gt/0.png=3"),
    ],
    "mvtec_ad": mvtec("bottle"),
    "mvtec_ad_2": [
        *("can/train/good/0_regular.png", "can/test_public/good/0_regular.png", "can/test_public/bad/1_regular.png"),
        *("can/test_public/ground_truth/bad/1_regular_mask.png=3", "can/test_private/2_regular.png"),
    ],
    "mvtec_loco_ad": [*mvtec("pushpins")[:3], "pushpins/ground_truth/bent/0/0.png=3"],
    "nanotwice": ["Normal/1.tif", "Anomalous/images/2.tif", "Anomalous/gt/2_gt.png=3"],
    "real_iad": ["realiad_256/usb/OK/S1/1.jpg", "realiad_256/usb/NG/HS/S2/2.jpg", "realiad_256/usb/NG/HS/S2/2.png=3"],
    "rsdds": [
        f"Type-I RSDDs dataset/{folder}/{i}.jpg{columns}"
        for folder, columns in (("Rail surface images", ""), ("GroundTruth", "=0"))
        for i in (1, 2)
    ],
    "textured": [path.replace("bent", "defective") for path in mvtec("texture_1")],
    "visa": ["pcb1/Data/Images/Normal/0.png", "pcb1/Data/Images/Anomaly/1.png", "pcb1/Data/Masks/Anomaly/1.png=1"],
}
"""Image files of a miniature; one that is a mask says how many of its columns are marked."""

TEXTS = {
    "real_iad/realiad_jsons/realiad_jsons/usb.json": json.dumps(
        {
            "meta": {"prefix": "usb/"},
            "train": [{"anomaly_class": "OK", "image_path": "OK/S1/1.jpg"}],
            "test": [{"anomaly_class": "HS", "image_path": "NG/HS/S2/2.jpg", "mask_path": "NG/HS/S2/2.png"}],
        }
    ),
    "visa/split_csv/1cls.csv": "object,split,label,image,mask\npcb1,train,normal,pcb1/Data/Images/Normal/0.png,\n"
    "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/1.png,pcb1/Data/Masks/Anomaly/1.png\n",
}

each = pytest.mark.parametrize("name", sorted(DATASETS))


def write(root: Path, path: str) -> None:
    name, _, columns = path.partition("=")
    pixels = np.random.default_rng(list(path.encode())).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    if columns:
        pixels[:] = 0
        pixels[:, : int(columns)] = 255
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / name)


def miniature(folder: Path, name: str) -> Path:
    for path in TREES[name]:
        write(folder / name, path)
    for path, text in TEXTS.items():
        if path.startswith(f"{name}/"):
            (folder / path).parent.mkdir(parents=True)
            (folder / path).write_text(text)
    return folder / name


def module(name: str) -> ModuleType:
    return import_module(DATASETS[name])


# the table


@each
def test_the_facts_are_complete(name: str) -> None:
    facts = about(name)
    assert isinstance(facts, Dataset)
    for said in (facts.title, facts.licence, facts.home, facts.citation, facts.tree, facts.obtain, facts.split):
        assert said.strip()
    assert facts.home == "-" or re.match(r"https?://\S+$", facts.home)
    assert list(facts.categories) == sorted(set(facts.categories))
    assert set(facts.counts) <= set(facts.categories)
    for numbers in facts.counts.values():
        assert all(re.fullmatch(r"train|validation|test/[a-z_]+|test/[A-Z][a-z]+", key) for key in numbers)
        assert all(type(number) is int and number > 0 for number in numbers.values())
    if facts.images is not None:
        assert sum(sum(numbers.values()) for numbers in facts.counts.values()) <= facts.images
    for file in facts.downloads:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert re.match(r"https?://\S+$", file.url)
        assert file.size is None or file.size > 0


@each
def test_the_reader_has_the_signature_of_the_contract(name: str) -> None:
    parameters = list(inspect.signature(module(name).list_samples).parameters.values())
    assert [p.name for p in parameters[:3]] == ["dataset", "root", "categories"]
    assert all(p.default is inspect.Parameter.empty for p in parameters[:3])
    for parameter in parameters[3:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
    assert module(name).list_samples.__doc__
    assert module(name).__doc__


@each
def test_a_reader_knows_no_other_reader(name: str) -> None:
    tree = ast.parse(Path(module(name).__file__ or "").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("storage.datasets"):
            assert (node.module, [alias.name for alias in node.names]) == ("storage.datasets.mvtec_ad", ["list_tree"])


# what a person gets wrong


@each
def test_another_folder_is_an_error_that_says_what_was_expected(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    expected = "understood are: " if name == "folder" else f"expected is\n{about(name).tree}"
    with pytest.raises(DatasetError, match=re.escape(expected)):
        list_samples(name, tmp_path / "empty")
    write(tmp_path, "file.png")
    with pytest.raises(DatasetError, match="is not a folder; give the folder that holds the images"):
        list_samples(name, tmp_path / "file.png")
    with pytest.raises(DatasetError, match="is not a folder"):
        list_samples(name, tmp_path / "nowhere")


@each
def test_a_category_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    root = miniature(tmp_path, name)
    for category in ("..", "../else", "/etc", "a\\b"):
        with pytest.raises(OutsideRoot, match="leaves the root"):
            list_samples(name, root, [category])
    for category in ("", ".", "zebra"):
        with pytest.raises(DatasetError, match="unknown category"):
            list_samples(name, root, [category])


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in sorted(DATASETS) for option in options_of(name)]
)
def test_an_option_of_a_wrong_type_is_refused(tmp_path: Path, name: str, option: str) -> None:
    root = miniature(tmp_path, name)
    needed = {"train": "*/train/good/*.png"} if name == "folder" and option not in ("inspect", "train") else {}
    for value in ({"a": 1}, ["a", 1]):
        with pytest.raises(DatasetError, match=option):
            list_samples(name, root, None, {**needed, option: value})


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("fabric", "test_share", 1, "test_share was 1, expected a share of at least 0 and below 1"),
        ("fabric", "seed", "a", "seed was 'a', expected a whole number"),
        ("folder", "layout", 3, "layout was 3, expected the path of a TOML file"),
        ("folder", "test_share", -0.1, "test_share was -0.1, expected a share"),
        ("kolektorsdd", "train_share", 0, "train_share was 0, expected a share above 0 and below 1"),
        ("kolektorsdd", "train_share", float("nan"), "train_share was nan"),
        ("mt_defect", "train_share", True, "train_share was True"),
        ("mt_defect", "seed", 0.5, "seed was 0.5, expected a whole number"),
        ("mvtec_ad_2", "private", "yes", "private was 'yes', expected true or false"),
        ("mvtec_ad_2", "private", 1, "private was 1, expected true or false"),
        ("nanotwice", "tile", 7, "tile was 7, expected the side of a box, 8 px or more"),
        ("real_iad", "resolution", "2048", "unknown resolution '2048'"),
        ("real_iad", "split", "../x", "split was '../x', expected the name of a folder of JSON files"),
        ("rsdds", "tile", -3, "tile was -3, expected the side of a square in px"),
        ("rsdds", "tile", "16", "tile was '16'"),
        ("visa", "protocol", "3cls", "unknown protocol '3cls'; did you mean"),
        ("visa", "protocol", 3, "unknown protocol 3; known: 1cls, "),
    ],
)
def test_an_option_of_a_wrong_value_says_what_is_expected(
    tmp_path: Path, name: str, option: str, value: Any, expected: str
) -> None:
    needed = {"train": "*/train/good/*.png"} if option == "test_share" and name == "folder" else {}
    with pytest.raises(DatasetError, match=re.escape(expected)):
        list_samples(name, miniature(tmp_path, name), None, {**needed, option: value})


def test_a_draw_stays_the_same_for_ever() -> None:
    """Splits of data sets without a published one rest on it: another draw would make figures incomparable."""
    assert sorted(drawn([f"part_{n}" for n in range(10)], 0.3, 0)) == ["part_4", "part_8", "part_9"]
    assert sorted(drawn([f"part_{n}" for n in range(10)], 0.3, 1)) == ["part_2", "part_6", "part_8"]


def test_numbers_published_for_one_split_are_not_asked_of_another() -> None:
    assert published_counts("visa", "candle", {})["train"] == 900
    assert published_counts("visa", "candle", {"protocol": "1cls"})["train"] == 900
    assert published_counts("visa", "candle", {"protocol": "2cls_fewshot"}) == {}
    assert published_counts("own", "part", {}) == {}


def test_a_file_is_read_again_only_when_its_size_or_time_has_changed(tmp_path: Path) -> None:
    file, hashes = tmp_path / "a.png", Hashes()
    file.write_bytes(b"one")
    first = hashes.of(tmp_path, "a.png")
    assert hashes.of(tmp_path, "a.png") == first
    assert hashes.hashed == 2  # so young a file may change again within the clock's grain
    os.utime(file, (1e9, 1e9))
    time.sleep(0.15)  # nor is so young an inode trusted
    for _ in range(3):
        assert hashes.of(tmp_path, "a.png") == first
    assert hashes.hashed == 3
    kept = Hashes.from_parquet(hashes.to_parquet())
    assert kept.of(tmp_path, "a.png") == first
    assert kept.hashed == 0
    file.write_bytes(b"two")  # as long, at another time
    os.utime(file, (2e9, 1e9 + 1))
    second = kept.of(tmp_path, "a.png")
    assert second != first
    file.write_bytes(b"three")  # longer, at the same time
    os.utime(file, (2e9, 1e9 + 1))
    assert kept.of(tmp_path, "a.png") not in (first, second)
    assert kept.hashed == 2


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_of_equal_size_and_time_is_read_again(tmp_path: Path, replaced: bool) -> None:
    """As after `rsync -a`, `cp -p`, or unpacking an archive with fixed times, into the same inode or another one."""
    file, hashes = tmp_path / "a.bmp", Hashes()
    file.write_bytes(b"one")
    os.utime(file, (1e9, 1e9))
    time.sleep(0.15)
    first = hashes.of(tmp_path, "a.bmp")
    assert hashes.known
    new = tmp_path / "new" if replaced else file
    new.write_bytes(b"two")
    os.utime(new, (1e9, 1e9))
    os.replace(new, file)
    assert Hashes.from_parquet(hashes.to_parquet()).of(tmp_path, "a.bmp") not in (None, first)


def test_a_table_of_hashes_of_an_earlier_version_is_made_anew() -> None:
    buffer = io.BytesIO()
    pd.DataFrame([("a", 1, 2, "x")], columns=["path", "size", "mtime_ns", "content"]).to_parquet(buffer)
    assert Hashes.from_parquet(buffer.getvalue()).known == {}


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, float("nan"), "0.5", True, None])
def test_a_share_to_be_drawn_lies_between_0_and_1(share: Any) -> None:
    with pytest.raises(DatasetError, match=f"share was {re.escape(repr(share))}, expected a share above 0 and below 1"):
        drawn("abc", share, 0)
    assert len(drawn("abc", 0.999, 0)) == 2
    assert len(drawn("abc", 0.001, 0)) == 1


def test_an_object_of_visa_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    root = miniature(tmp_path, "visa")
    for name in ("/etc", "../else", ".."):
        (root / "split_csv/1cls.csv").write_text(f"object,split,label,image,mask\n{name},train,normal,x.png,\n")
        with pytest.raises(DatasetError, match="is no name of a folder"):
            list_samples("visa", root)


# what is found


class Backwards:
    """`os.scandir` of a file system that names what lies in a folder in the opposite order."""

    def __init__(self, path: Any = ".") -> None:
        with SCANDIR(path) as entries:
            self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return self.entries

    def __next__(self) -> os.DirEntry[str]:
        return next(self.entries)

    def __enter__(self) -> Backwards:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def close(self) -> None:
        return None


SCANDIR = os.scandir


def with_strays(root: Path) -> Path:
    """Images beside and below every folder of images, and a file that is no image."""
    for folder in {path.parent for path in sorted(root.rglob("*")) if path.is_file()}:
        for path in ("zz.png", "b/2.png", "b/1.png", "B/3.png"):
            write(folder, path)
        (folder / "notes.txt").write_text("x")
    return root


@each
def test_the_listing_does_not_depend_on_the_order_of_files(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_strays(miniature(tmp_path, name))
    (root / "split_csv/zz.png").unlink(missing_ok=True)
    forwards = list_samples(name, root)
    assert any(sample.split == "train" for sample in forwards.samples)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", Backwards)
        assert [path.name for path in os.scandir(root)] == sorted(os.listdir(root), reverse=True)
        backwards = list_samples(name, root)
    assert backwards == forwards


@each
def test_every_image_of_a_category_has_its_place(tmp_path: Path, name: str) -> None:
    root = with_strays(miniature(tmp_path, name))
    listing = list_samples(name, root)
    places = {path for s in listing.samples for path in (s.path, s.mask, s.xyz) if path}
    aside = [entry.path.partition("[")[0] for entry in listing.set_aside]
    inside = {sample.category: os.path.commonpath([s.path for s in listing.samples if s.category == sample.category])
              for sample in listing.samples}  # fmt: skip
    for file in root.rglob("*"):
        path = file.relative_to(listing.root).as_posix()
        if file.suffix in (".txt", ".csv", ".json") or file.is_dir() or not path.startswith(tuple(inside.values())):
            continue
        if path in places or path.rpartition("/")[0] in places or empty_mask(file):
            continue
        assert any(path == place or place == "." or path.startswith(f"{place}/") for place in aside), path


def empty_mask(file: Path) -> bool:
    """Masks of good images are read, or belong to no sample."""
    return not np.asarray(Image.open(file)).any()


@each
def test_the_miniature_is_read_whole_and_from_the_folder_around_it(tmp_path: Path, name: str) -> None:
    root = miniature(tmp_path / "around", name)
    listing = list_samples(name, root)
    assert listing.problems == {}
    assert {sample.dataset for sample in listing.samples} == {name}
    assert {sample.category for sample in listing.samples} <= set(about(name).categories or {"gear"})
    if name != "folder":  # any folder may hold a person's own images: the one that is meant must be given
        assert list_samples(name, tmp_path / "around").samples == listing.samples


# looking into folders


def make_files(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:04}.png").touch()
    return folder


def test_files_sort_by_their_names_alone(tmp_path: Path) -> None:
    for name in ("a.png", "B.png", "ä.png", "_.png", "a-1.png", "A.PNG"):
        (tmp_path / name).touch()
    assert images_in(tmp_path, tmp_path, "c")[0] == ["A.PNG", "B.png", "_.png", "a-1.png", "a.png", "ä.png"]


@pytest.mark.parametrize("how", ["images_in", "refused"])
def test_paths_are_resolved_once_a_folder_not_once_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    calls: list[Path] = []
    resolve = Path.resolve
    monkeypatch.setattr(Path, "resolve", lambda path, strict=False: calls.append(path) or resolve(path, strict))
    counts = []
    for count in (2, 50):
        folder = make_files(tmp_path / str(count), count)
        calls.clear()
        if how == "images_in":
            assert len(images_in(folder, tmp_path, "c")[0]) == count
        else:
            assert refused(tmp_path, [f"{count}/{file.name}" for file in folder.iterdir()]) == {}
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 4


def test_links_are_looked_at_one_by_one(tmp_path: Path) -> None:
    root, other = make_files(tmp_path / "root/in", 1).parent, make_files(tmp_path / "other", 1)
    (root / "in/out.png").symlink_to(other / "0000.png")
    (root / "in/loop.png").symlink_to(root / "in/loop.png")
    (root / "in/within.png").symlink_to(root / "in/0000.png")
    (root / "out").symlink_to(other)
    files, aside = images_in(root / "in", root, "c")
    assert files == ["in/0000.png", "in/within.png"]
    assert [(entry.path, entry.reason.split(",")[0]) for entry in aside] == [
        ("in/loop.png", "missing"),
        ("in/out.png", f"in/out.png leads to {other.resolve() / '0000.png'}"),
    ]
    files, aside = images_in(root / "out", root, "c")
    assert files == []
    assert [entry.path for entry in aside] == ["out"]  # it is not even opened
    paths = ["in/out.png", "in/within.png", "out/0000.png", "in/none.png", "in", "", "a\0", "../other/0000.png", "/etc"]
    assert [path for path in paths if path not in refused(root, paths)] == ["in/within.png"]


def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = miniature(tmp_path, "mvtec_ad")

    def guarded(path: Any = ".") -> Any:  # file modes do not hold for root, as whom tests may run
        if Path(path).name == "bent":
            raise PermissionError(13, "Permission denied", str(path))
        return SCANDIR(path)

    monkeypatch.setattr(os, "scandir", guarded)
    listing = list_samples("mvtec_ad", root)
    assert [(entry.path, entry.reason) for entry in listing.set_aside] == [
        (f"bottle/{place}/bent", "may not be read; change the folder's permissions")
        for place in ("ground_truth", "test")
    ]
    assert {sample.label for sample in listing.samples} == {"good"}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DatasetError, match="may not be read; change the folder's permissions"):
        list_samples("mvtec_ad", root)


# what readers share


def test_masks_pair_by_name_and_the_first_ending_wins() -> None:
    masks = ["m/a.png", "m/a_mask.bmp", "m/a_mask.png", "m/b.x", "m/c.d", "m/e.png"]
    assert pair(["i/a.jpg", "i/b.x.jpg", "i/c.d.jpg", "i/e.jpg", "i/f.jpg"], masks, "_mask", "") == {
        "i/a.jpg": "m/a_mask.bmp",
        "i/b.x.jpg": "m/b.x",  # a folder, whose name has no extension
        "i/c.d.jpg": "m/c.d",
        "i/e.jpg": "m/e.png",
        "i/f.jpg": None,
    }


def test_strays_are_files_and_whole_folders_without_a_place(tmp_path: Path) -> None:
    for path in (
        "in/a/1.png",
        "in/a/2.png",
        "in/b/deep/3.png",
        "in/b/4.png",
        "in/c/5.png",
        "in/.d/6.png",
        "in/e/7.png",
    ):
        write(tmp_path, path)
    (tmp_path / "in/nothing").mkdir()
    found = strays(tmp_path / "in", tmp_path, "c", {"in/a/1.png", "in/e"}, lambda path: f"why {path}", ["in/c"])
    assert [(entry.path, entry.reason) for entry in found] == [
        ("in/a/2.png", "why in/a/2.png"),
        ("in/b", "why in/b; what lies in it is not read (images: 2)"),
        ("in/c/5.png", "why in/c/5.png"),
        ("in/nothing", "why in/nothing; what lies in it is not read (images: 0)"),
    ]


def test_the_root_is_the_folder_or_the_only_one_in_it_but_never_one_around_it(tmp_path: Path) -> None:
    def find(folder: Path) -> Path:
        return find_root(folder, lambda place: (place / "mark").is_file(), "mark", "<root>/mark")

    data = make_files(tmp_path / "out/data/inner", 0).parent
    (data / "mark").touch()
    assert find(data) == find(data.parent) == data.resolve()
    with pytest.raises(DatasetError, match=rf"no mark.*{re.escape(str(data))}, which it lies in, has: give it as root"):
        find(data / "inner")
    with pytest.raises(DatasetError, match="expected is\n<root>/mark"):
        find(tmp_path)
    make_files(data.parent / "copy", 0).joinpath("mark").touch()
    with pytest.raises(DatasetError, match=r"several data sets \(copy, data\)"):
        find(data.parent)
    (tmp_path / "link").mkdir()
    (tmp_path / "link/data").symlink_to(data)
    with pytest.raises(OutsideRoot):
        find(tmp_path / "link")


def test_a_listing_says_why_nothing_can_be_learned(tmp_path: Path) -> None:
    root = miniature(tmp_path, "mvtec_ad")
    (root / "bottle/train/good/0.png").unlink()
    listing: Listing = list_samples("mvtec_ad", root)
    assert listing.samples == []
    assert listing.problems == {"bottle": "bottle/train/good holds no image to learn from; put good images there"}
