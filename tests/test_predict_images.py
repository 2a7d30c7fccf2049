"""`al predict`: new images get what the pipeline would give them, each once, and what is foreign is not judged."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from conftest import AL, Command, eventually, stop
from PIL import Image

from al_models.calibration import p_values
from al_models.errors import InvalidInput
from al_models.outlines import regions_above
from storage.errors import Damaged, DatasetError, InUse
from storage.image_paths import image_paths, look_for_images
from storage.journal import Journal
from storage.models import Registry
from storage.records import RunRecord
from storage.settled import Settled
from storage.stacks import Stack
from storage.store import Store
from storage.whole import replaced
from tasks.calibrate import calibrate
from tasks.core.compute import detector_of
from tasks.core.handles import Cell
from tasks.evaluate import evaluate
from tasks.extract import extract
from tasks.fit import fit
from tasks.ingest import ingest
from tasks.predict import predict, read_scores
from tasks.prepare import prepare
from tasks.serve.inspect_images import JOURNAL, Inspection
from tasks.serve.register import LoadedVersion, load_version, register
from tasks.serve.summarise import Summary, summarise
from tasks.validate import validate

MODEL = "mvtec_ad/brick"
SIDE = 128
PADIM = Cell("mvtec_ad", "brick", "padim", {"image_size": SIDE, "channels": 10}, device="cpu", false_reject_rate=0.3)
AE_SSIM = Cell("mvtec_ad", "brick", "ae_ssim", {"image_size": SIDE, "patches": 8, "epochs": 1}, device="cpu")
"""Reads no features, and has too few held-out images for its rate."""


@dataclass(frozen=True)
class Known:
    """Registered versions, and what the pipeline said of the test images."""

    store: Store
    data: Path
    records: dict[str, RunRecord]
    labels: dict[str, str]

    def loaded(self, method: str = "padim") -> LoadedVersion:
        return load_version(self.store, self.labels[method])

    def scores(self, method: str) -> dict[str, float]:
        """Content name -> score, of the pipeline."""
        table = read_scores(self.store, self.store.get(self.records[method].keys["maps"]))
        return dict(zip(table["id"], table["score"], strict=True))

    def maps(self, method: str) -> dict[str, np.ndarray]:
        found = self.store.get(self.records[method].keys["maps"])
        stack = Stack.open(self.store, found, "maps")
        return dict(zip(found.meta["ids"], stack.read(range(stack.shape[0])), strict=True))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Bricks of 96 px, and of them a version that reads features and one that does not."""
    from tasks.demo_data import make_demo_data

    folder = tmp_path_factory.mktemp("known")
    make_demo_data(folder / "data", train=16, validation=8, good=3, defects_per_type=1, size=96)
    store = Store(str(folder / "store"))
    store.check_format()
    (category,) = ingest.fn(store.url, "mvtec_ad", str(folder / "data"), ["brick"]).categories
    validated = validate.fn(prepare.fn(category, SIDE))
    records, labels = {}, {}
    for cell in (PADIM, AE_SSIM):
        spec = detector_of(cell).feature_spec()
        read = None if spec is None else extract.fn(validated, spec, "cpu")
        model = fit.fn(cell, validated, read)
        calibration = calibrate.fn(cell, validated, read, model)
        maps = predict.fn(cell, validated, read, model)
        records[cell.method] = record = evaluate.fn(cell, validated, read, model, calibration, maps)
        labels[cell.method] = register.fn(store.url, record.key(), "anna", "test")
    registry = Registry(store)
    registry.promote(registry.resolve(labels["padim"]), who="anna", why="test")
    return Known(store, folder / "data", records, labels)


@pytest.fixture
def test_images(known: Known) -> list[str]:
    """The files of the test split."""
    return image_paths([str(known.data / "brick" / "test")], Path("nowhere"))


def judged(
    known: Known, out: Path, paths: list[str], method: str = "padim", batch_size: int = 4
) -> tuple[list[dict[str, Any]], Summary]:
    """The journal's lines after a run on these files."""
    with Inspection(known.loaded(method), out, "cpu", batch_size) as inspection:
        inspection.take(paths)
        summary = summarise(inspection)
        return list(inspection.journal), summary


def pixels_of(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# as in the pipeline


@pytest.mark.parametrize("method", ["padim", "ae_ssim"])
def test_an_image_gets_what_the_pipeline_gave_it(
    method: str, known: Known, test_images: list[str], tmp_path: Path
) -> None:
    lines, summary = judged(known, tmp_path, test_images, method)
    assert sum(summary.decisions.values()) == len(lines) == len(test_images) == 7
    scores, maps = known.scores(method), known.maps(method)
    assert {line["id"] for line in lines} == set(scores)
    loaded = known.loaded(method)
    for line in lines:
        assert line["score"] == pytest.approx(scores[line["id"]], rel=1e-3)
        found = tifffile.imread(tmp_path / line["files"]["maps"])
        assert found.dtype == np.float16
        np.testing.assert_allclose(found.astype(float), maps[line["id"]].astype(float), rtol=2e-3, atol=2e-3)
        if line["decision"] != "out_of_scope":
            (wanted,) = p_values(loaded.scores, np.array([line["score"]]))
            assert line["p_value"] == wanted


def test_what_scores_above_the_threshold_is_rejected(known: Known, test_images: list[str], tmp_path: Path) -> None:
    lines, summary = judged(known, tmp_path, test_images)
    calibration = known.loaded().version.calibration
    assert calibration.image is not None
    assert calibration.pixel is not None
    assert {line["decision"] for line in lines} == {"accept", "reject"}
    for line in lines:
        assert (line["decision"] == "reject") == (line["score"] > calibration.image)
        mask = pixels_of(tmp_path / line["files"]["masks"])
        assert mask.shape == (96, 96)
        assert sum(region["area"] for region in line["regions"]) == (mask == 255).sum() == (mask > 0).sum()
        assert all(region["score"] > calibration.pixel for region in line["regions"])
        assert pixels_of(tmp_path / line["files"]["overlays"]).shape == (96, 96, 3)
    highest = max(lines, key=lambda line: line["score"])
    assert summary.worst[0]["path"] == highest["path"]
    assert "/test/good/" not in highest["path"]


def test_without_a_threshold_nothing_is_decided(known: Known, test_images: list[str], tmp_path: Path) -> None:
    lines, summary = judged(known, tmp_path, test_images, "ae_ssim")
    assert {line["decision"] for line in lines} <= {"undecided", "out_of_scope"}
    assert "undecided" in summary.decisions
    assert summary.note is not None
    assert "needs at least 19 held-out good images, there are 8" in summary.note
    assert all("masks" not in line["files"] and line["regions"] == [] for line in lines)


# scope and drift


@pytest.mark.parametrize("method", ["padim", "ae_ssim"])
def test_what_looks_like_something_else_is_not_judged(method: str, known: Known, tmp_path: Path) -> None:
    Image.new("L", (96, 96)).save(tmp_path / "dark.png")
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    foreign = [str(tmp_path / "dark.png"), str(tmp_path / "noise.png")]
    if method == "padim":  # light alone does not tell textures apart
        foreign += image_paths([str(known.data / "gravel" / "test" / "good")], tmp_path)[:2]
    good = image_paths([str(known.data / "brick" / "test" / "good")], tmp_path)
    lines, summary = judged(known, tmp_path / "out", [*foreign, *good], method)
    found = {line["path"]: line for line in lines}
    assert {found[path]["decision"] for path in foreign} == {"out_of_scope"}
    assert "out_of_scope" not in {found[path]["decision"] for path in good}
    for path in foreign:
        assert found[path]["p_value"] is None
        assert set(found[path]["files"]) == {"maps"}
    assert summary.decisions["out_of_scope"] == len(foreign)


def test_a_darker_batch_has_drifted_and_the_held_out_one_has_not(known: Known, tmp_path: Path) -> None:
    (tmp_path / "darker").mkdir()
    same, others = (image_paths([str(known.data / "brick" / split)], tmp_path) for split in ("validation", "train"))
    for number, path in enumerate([*same, *others]):
        darker = pixels_of(path) * 0.75
        Image.fromarray(darker.astype(np.uint8)).save(tmp_path / "darker" / f"{number}.png")
    _, summary = judged(known, tmp_path / "same", same)
    assert len(summary.drift) == 6
    assert summary.changed == []
    lines, summary = judged(known, tmp_path / "out", image_paths([str(tmp_path / "darker")], tmp_path / "out"))
    assert "out_of_scope" not in {line["decision"] for line in lines}
    assert "brightness" in {change.statistic for change in summary.changed}
    told = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert told["images"] == 24
    assert {change["statistic"] for change in told["changes"] if change["changed"]} >= {"brightness"}


# regions


def test_regions_have_exact_boxes_and_areas() -> None:
    values = np.zeros((40, 60), np.float32)
    values[10:20, 5:30] = 2
    values[12:14, 7:9] = 0  # a hole
    values[30, 50] = 3
    values[25:27, 40:42] = values[27, 42] = 1.5  # connected by a corner
    point, block, corner = regions_above(values, 1.0)
    assert (point.box, point.area, point.score) == ((50, 30, 1, 1), 1, 3)
    assert (block.box, block.area, block.score) == ((5, 10, 25, 10), 246, 2)
    assert (corner.box, corner.area, corner.score) == ((40, 25, 3, 3), 5, 1.5)
    assert block.share == 246 / 2400
    for region in (point, block, corner):
        x, y = np.array(region.polygon).T
        left, top, width, height = region.box
        assert len(region.polygon) >= 3
        assert (x.min() >= left, x.max() <= left + width) == (True, True)
        assert (y.min() >= top, y.max() <= top + height) == (True, True)
    assert _area(block.polygon) == pytest.approx(250, abs=20)
    assert regions_above(values, 5.0) == []


def _area(polygon: list[tuple[float, float]]) -> float:
    x, y = np.array(polygon).T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def test_what_was_found_is_told_to_other_programs(known: Known, test_images: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines, _ = judged(known, tmp_path / "out", [*test_images, str(tmp_path / "broken.png")])
    regions = sum(len(line["regions"]) for line in lines)
    assert regions > 0
    coco = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert set(coco) == {"images", "annotations", "categories"}
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    assert len(sizes) == len(coco["images"]) == len(test_images)
    assert {image["file_name"] for image in coco["images"]} == set(test_images)
    assert [category["id"] for category in coco["categories"]] == [1]
    assert len({one["id"] for one in coco["annotations"]}) == len(coco["annotations"]) == regions
    for one in coco["annotations"]:
        width, height = sizes[one["image_id"]]
        x, y, w, h = one["bbox"]
        assert (one["category_id"], one["iscrowd"]) == (1, 0)
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        (polygon,) = one["segmentation"]
        assert len(polygon) >= 6
        assert len(polygon) % 2 == 0
        assert 0 < one["area"] <= w * h
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert {path: row["decision"] for path, row in rows.items()} == {line["path"]: line["decision"] for line in lines}
    assert "not an image that can be read" in rows[str(tmp_path / "broken.png")]["reason"]
    with (tmp_path / "out" / "regions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == regions
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert told["images"] == lines
    assert told["model"] == known.labels["padim"]


# exactly once


def test_a_second_run_judges_what_is_new(known: Known, test_images: list[str], tmp_path: Path) -> None:
    judged(known, tmp_path, test_images[:3])
    began = {path: path.stat().st_mtime_ns for path in tmp_path.glob("maps/*")}
    lines, summary = judged(known, tmp_path, test_images[:4])
    assert [line["path"] for line in lines] == test_images[:4]
    assert sum(summary.decisions.values()) == 4
    assert began.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("maps/*")}.items()


def test_another_version_judges_again_and_its_word_counts(known: Known, test_images: list[str], tmp_path: Path) -> None:
    judged(known, tmp_path, test_images[:2])
    lines, _ = judged(known, tmp_path, test_images[:1], "ae_ssim")
    assert len(lines) == 3
    told = json.loads((tmp_path / "predictions.json").read_text())["images"]
    assert [(line["path"], line["model"]) for line in told] == [
        (test_images[1], known.labels["padim"]),
        (test_images[0], known.labels["ae_ssim"]),
    ]


def test_equal_names_do_not_collide(known: Known, test_images: list[str], tmp_path: Path) -> None:
    for folder, path in zip("ab", test_images, strict=False):
        (tmp_path / folder).mkdir()
        shutil.copy(path, tmp_path / folder / "one.png")
    shutil.copy(test_images[0], tmp_path / "copy.png")  # the content of another
    lines, _ = judged(known, tmp_path / "out", image_paths([str(tmp_path)], tmp_path / "out"))
    assert len(lines) == 3
    assert len({line["files"]["maps"] for line in lines}) == len(list((tmp_path / "out" / "maps").iterdir())) == 3


def test_a_name_that_is_no_text_is_judged(known: Known, test_images: list[str], tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/=\xff a, 'b'.png")
    shutil.copy(test_images[0], odd)
    lines, _ = judged(known, tmp_path / "out", [odd])
    assert [line["decision"] for line in lines] != ["unreadable"]
    assert "\\xff" in (tmp_path / "out" / "predictions.csv").read_text()


def test_files_that_cannot_be_judged_are_rows_with_their_reason(
    known: Known, test_images: list[str], tmp_path: Path
) -> None:
    whole = Path(test_images[0]).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    paths = [str(tmp_path / name) for name in ("cut.png", "bomb.png", "gone.png")]
    lines, summary = judged(known, tmp_path / "out", [*paths, test_images[0]])
    reasons = [line["reason"] for line in lines]
    assert [line["decision"] for line in lines[:3]] == ["unreadable"] * 3
    for reason, said in zip(
        reasons, ("damaged or cut short", "too large: Image size (100000000 pixels)", "No such file"), strict=False
    ):
        assert said in reason
    assert summary.unreadable == {line["path"]: line["reason"] for line in lines[:3]}
    shutil.copy(test_images[1], tmp_path / "gone.png")
    _, summary = judged(known, tmp_path / "out", paths)
    assert summary.decisions["unreadable"] == 2
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert Counter(line["path"] for line in told) == Counter([*paths, test_images[0]])


def test_one_image_that_a_detector_cannot_work_with_costs_no_other(
    known: Known, test_images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = known.loaded()
    usual = type(loaded.detector)._predict

    def picky(detector: Any, batch: Any, runtime: Any) -> Any:
        if batch.ids[-1].startswith(poison):
            raise InvalidInput("a map that is not finite")
        return usual(detector, batch, runtime)

    lines, _ = judged(known, tmp_path / "a", test_images[:4])
    poison = lines[-1]["id"]
    monkeypatch.setattr(type(loaded.detector), "_predict", picky)
    lines, _ = judged(known, tmp_path / "b", test_images[:4])
    assert [line["reason"] for line in lines] == [None, None, None, "a map that is not finite"]
    assert lines[-1]["decision"] == "unreadable"


def test_a_torn_line_is_dropped_and_a_bad_one_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out" / "j.jsonl"
    with Journal(path) as journal:
        journal.append([{"n": 1}, {"n": 2}])
    with path.open("ab") as file:
        file.write(b'{"n": 3, "text": "' + b"x" * 100_000)
    with Journal(path) as journal:
        assert list(journal) == [{"n": 1}, {"n": 2}]
        journal.append([{"n": 4}])
        assert list(journal) == [{"n": 1}, {"n": 2}, {"n": 4}]
    path.write_bytes(b'{"n": 1}\nwhat\n{"n": 2}\n')
    with Journal(path) as journal, pytest.raises(Damaged, match=r"line 2 of .*j.jsonl is not JSON"):
        list(journal)


def test_a_folder_of_something_else_is_refused_and_let_go_of(known: Known, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('{"n": 1}\n')
    for _ in range(2):
        with pytest.raises(Damaged, match=r"judged.jsonl has a line without 'id'; give another folder"):
            judged(known, tmp_path, [])


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl"), pytest.raises(InUse, match="another process writes to"):
        Journal(tmp_path / "j.jsonl").__enter__()
    with Journal(tmp_path / "j.jsonl") as journal:
        assert list(journal) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")

    def write() -> None:
        with replaced(tmp_path / "a") as file:
            file.write("half")
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        write()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]


def _judge_and_die(store: str, model: str, out: str, paths: list[str], at: int | None) -> None:
    """Ends by SIGKILL when it is about to sync its `at`-th file; each file and each line is synced."""
    usual, calls = os.fsync, 0

    def sync(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(file)

    loaded = load_version(Store(store), model)
    os.fsync = sync  # type: ignore[assignment]
    with Inspection(loaded, out, "cpu", 2) as inspection:
        inspection.take(paths)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_anywhere_it_leaves_no_gap_and_no_double(known: Known, test_images: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tasks.serve.inspect_images", "al_models.parts.backbone", "al_models.embedding.padim"]
    )
    arguments = (known.store.url, MODEL, str(tmp_path), test_images)
    codes, counts = [], []
    for at in (3, 7, 8, None):  # at a file, at lines that are written and not synced, at a file of a second batch
        process = context.Process(target=_judge_and_die, args=(*arguments, at))
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        counts.append(len((tmp_path / JOURNAL).read_bytes().splitlines()))
    assert codes == [-signal.SIGKILL] * 3 + [0]
    assert counts == [0, 2, 4, 7]
    with Journal(tmp_path / JOURNAL) as journal:
        lines = list(journal)
    assert Counter(line["path"] for line in lines) == Counter(test_images)
    wanted, _ = judged(known, tmp_path / "wanted", test_images, batch_size=2)
    assert [line["decision"] for line in lines] == [line["decision"] for line in wanted]
    for line in lines:
        for file in line["files"].values():
            assert (tmp_path / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()
    assert len(list(tmp_path.glob("maps/*.tiff"))) == len(test_images)


# which files


def test_files_folders_patterns_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.png", "in/deep/b.JPG", "in/.hidden.png", "in/notes.txt", "in/out/maps/c.png", "[odd]*.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("in/deep/back").symlink_to(tmp_path / "in")
    Path("list.txt").write_text("in/deep\n\n[odd]*.png\n")

    def found(*given: str) -> list[str]:
        return [os.path.relpath(path) for path in image_paths(given, Path("in/out"))]

    assert found("in") == ["in/a.png", "in/deep/b.JPG"]
    assert found("in/*.png", "in/d*/*.JPG") == ["in/a.png", "in/deep/b.JPG"]
    assert found("@list.txt") == ["in/deep/b.JPG", "in/deep/back/a.png", "[odd]*.png"]
    for encoding in ("utf-8-sig", "utf-16"):  # as editors on Windows save it
        Path("list.txt").write_text("in/deep/b.JPG\r\n", encoding=encoding)
        assert found("@list.txt") == ["in/deep/b.JPG"]
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes("Prüfung.png".encode("latin-1"))
    assert image_paths(["@empty.txt"], Path("out"), may_be_none=True) == []
    assert found("in/a.png", "in", "in/notes.txt") == ["in/a.png", "in/deep/b.JPG", "in/notes.txt"]
    for given, said in (
        ("none", "is no file and no folder"),
        ("*.jpg", "holds no image"),
        ("@no.txt", "cannot be read"),
        ("@empty.txt", "the list 'empty.txt' is empty; give a text file, a path a line"),
        ("@latin.txt", "line 1 is not in UTF-8"),
    ):
        with pytest.raises(DatasetError, match=said):
            found(given)
    assert image_paths(["*.jpg"], Path("out"), may_be_none=True) == []


def test_what_is_no_image_and_what_we_made_ourselves_is_left_out_and_told(tmp_path):
    folder = tmp_path / "new"
    for name in ("a.png", "deep/b.JPG", "c.heic", "notes.txt", "earlier/judged.jsonl", "earlier/predictions.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    for made in ("maps/a-1.tiff", "masks/a-1.png", "overlays/a-1.png"):
        (folder / "earlier" / made).parent.mkdir()
        (folder / "earlier" / made).write_bytes(b"x")
    (folder / "masks").mkdir()
    (folder / "masks/z.png").write_bytes(b"x")  # a folder of that name, with nothing of ours beside it
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "Thumbs.db").write_bytes(b"x")
    expected = {"a.png", "deep/b.JPG", "masks/z.png"}
    for given in (str(folder), f"{folder}/**/*"):
        paths, left_out = look_for_images([given], tmp_path / "out")
        assert {os.path.relpath(path, folder) for path in paths} == expected
        reasons = {os.path.relpath(path, folder): reason for path, reason in left_out.items()}
        made = {"earlier/maps", "earlier/masks", "earlier/overlays"}
        texts = {"c.heic", "notes.txt", "earlier/judged.jsonl", "earlier/predictions.csv"}
        assert reasons.keys() == made | texts | {"gone.png"}
        assert "this program made" in reasons["earlier/maps"]
        assert "a broken link" in reasons["gone.png"]
        assert "no image's extension" in reasons["c.heic"]


def test_a_file_has_settled_when_two_looks_agree(tmp_path: Path) -> None:
    path, settled = tmp_path / "a.png", Settled()
    path.write_bytes(b"1")
    assert settled.look([str(path)]) == []
    path.write_bytes(b"12")
    assert settled.look([str(path)]) == []
    assert settled.look([str(path)]) == [str(path)]
    assert settled.look([str(path), str(tmp_path / "gone")]) == []
    path.write_bytes(b"123")
    assert settled.look([str(path)]) == []
    assert settled.look([str(path)]) == [str(path)]


# as a user types it


@pytest.mark.usefixtures("api")
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_drop_folder_is_watched_until_ctrl_c(known: Known, test_images: list[str], tmp_path: Path) -> None:
    drop, out = tmp_path / "drop", tmp_path / "out"
    drop.mkdir()
    shutil.copy(test_images[0], drop / "first.png")
    options = ["--model", MODEL, "--store", known.store.url, "--out", str(out), "--watch", "0.2"]
    process = subprocess.Popen([*AL, "predict", str(drop), *options], stdout=subprocess.PIPE, text=True)
    journal = out / JOURNAL

    def lines() -> list[str]:
        return [json.loads(line)["path"] for line in journal.read_text().splitlines()] if journal.exists() else []

    try:
        assert eventually(lambda: len(lines()) == 1, within=60)
        data = Path(test_images[1]).read_bytes()
        with (drop / "second.png").open("wb") as file:
            for half in (data[:500], data[500:]):
                file.write(half)
                file.flush()
                time.sleep(0.1)
        assert eventually(lambda: len(lines()) == 2, within=30)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    finally:
        stop(process)
    assert process.returncode == 0
    assert lines() == [str(drop / "first.png"), str(drop / "second.png")]
    assert said.endswith(f"results: {out}\n")
    assert len(json.loads((out / "predictions.json").read_text())["images"]) == 2


@pytest.mark.usefixtures("api")
def test_a_folder_is_judged_and_what_cannot_be_read_is_exit_code_1(known: Known, al: Command, tmp_path: Path) -> None:
    folder = str(known.data / "brick" / "test")
    options = ["--model", MODEL, "--store", known.store.url, "--out", str(tmp_path / "out"), "--batch-size", "3"]
    code, out, err = al("predict", folder, *options)
    assert code == 0, err
    assert out.splitlines()[0].split() == ["decision", "images"]
    assert out.endswith(f"results: {tmp_path / 'out'}\n")
    (tmp_path / "bad.png").write_bytes(b"no image")
    code, _, err = al("predict", folder, str(tmp_path / "bad.png"), *options)
    assert code == 1
    assert f"unreadable: {tmp_path / 'bad.png'}: not an image that can be read" in err


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (["nowhere"], ["--model", MODEL], "'nowhere' is no file and no folder; give images, folders, patterns"),
        (["*.webp"], ["--model", MODEL], r"'\*.webp' holds no image; images end in .avif, .bmp, "),
        (
            ["."],
            ["--model", "mvtec_ad/brik"],
            "no model 'mvtec_ad/brik' in the registry of .*; did you mean mvtec_ad/bri",
        ),
        (["."], ["--model", f"{MODEL}@7"], "mvtec_ad/brick@7 is not in the registry of"),
        (["."], ["--model", MODEL, "--watch", "0"], r"watch: Input should be greater than 0 \(given: 0.0\)"),
        (
            ["."],
            ["--model", MODEL, "--out", "/dev/null/x"],
            "'/dev/null/x' cannot be written: .*; give a folder that can",
        ),
    ],
    ids=["no file", "no match", "model", "version", "watch", "out"],
)
@pytest.mark.usefixtures("api")
def test_wrong_input_is_one_line_and_exit_code_2(
    images: list[str],
    options: list[str],
    message: str,
    known: Known,
    al: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    code, out, err = al("predict", *images, "--store", known.store.url, *options)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert re.search(message, lines[0])
