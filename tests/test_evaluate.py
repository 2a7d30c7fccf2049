"""Evaluation of maps made by hand: judged at the masks' own size, and absent where there is nothing to judge."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from PIL import Image

from al_models.metrics import compare
from storage.errors import DatasetError, MaskError
from storage.records import RunRecord, read_record
from storage.samples import Sample
from storage.store import Draft, Store
from tasks.core.handles import Cell, Validated
from tasks.core.steps import run_step
from tasks.core.stored import accepted_samples
from tasks.evaluate import evaluate
from tasks.evaluate.uncertainty import read_replicates
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.report.benchmark.report import report
from tasks.validate import validate

SIDE = 32
"""Of the maps; the images are larger."""
SHAPE = (96, 64)
ENOUGH = 19
"""Held-out images that support a false-reject rate of 5 %."""

MapOf = Callable[[Sample], np.ndarray]


@dataclass
class Bench:
    """A category of few images, and what a method is made to say of them."""

    root: Path
    store: Store
    held_out: int = ENOUGH
    at_rim: int = 0
    """Held-out images whose highest value lies at the rim."""
    dataset: str = "mvtec_ad"
    method: str = "padim"
    good: str = "good"
    """Folder of the good images within `train` and `validation`."""

    def picture(self, path: str, shape: tuple[int, int] = SHAPE) -> None:
        """Another image of noise."""
        seed = zlib.crc32(path.encode())  # equal paths, equal pixels
        self.file(path, np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))

    def mask(self, name: str, mask: np.ndarray) -> None:
        """Of the defect `dent`; bool (h, w)."""
        self.file(f"ground_truth/dent/{name}_mask.png", mask.astype(np.uint8) * 255)

    def file(self, path: str, pixels: np.ndarray) -> None:
        """An image file of these pixels."""
        target = self.root / "part" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)

    def judge(self, map_of: MapOf, rate: float = 0.05) -> RunRecord:
        """The record for these maps; an image's score is its map's maximum, held-out images score 0.01, 0.02, ..."""
        for i in range(3):
            self.picture(f"train/{self.good}/{i}.png")
        self.picture(f"validation/{self.good}/0.png")
        (category,) = ingest.fn(self.store.url, self.dataset, str(self.root)).categories
        validated = validate.fn(prepare.fn(category, SIDE))
        model = self._output("models", lambda draft: {"fitted_on": ["0", "1", "2"]})
        values = [round(0.01 * (i + 1), 2) for i in range(self.held_out)]
        ids = [f"held-out-{i}" for i in range(self.held_out)]
        at_rim = [i < self.at_rim for i in range(self.held_out)]
        held_out = {"ids": ids, "scores": values, "map_maxima": values, "at_rim": at_rim}
        calibration = self._output("calibrations", lambda d: held_out)
        maps = self._output("maps", lambda draft: self._predict(draft, validated, map_of))
        cell = Cell(self.dataset, "part", self.method, {"image_size": SIDE}, false_reject_rate=rate)
        return evaluate.fn(cell, validated, None, model, calibration, maps)

    def _output(self, step: str, work: Callable[[Draft], dict[str, Any]]) -> str:
        key = f"{step}/mvtec_ad/part/made-by-hand"
        run_step(self.store, key, work)
        return key

    def _predict(self, draft: Draft, validated: Validated, map_of: MapOf) -> dict[str, Any]:
        test = [sample for sample in accepted_samples(validated) if sample.split == "test"]
        maps = np.array([map_of(sample) for sample in test], dtype=np.float16)  # (n, h, w)
        if len(maps):  # as `predict` does: no test image, no array
            place = self.store.zarr_store(f"{draft.folder}/maps")
            zarr.create_array(store=place, data=maps, chunks=(2, SIDE, SIDE))
        scores = [float(one.max()) for one in maps]
        buffer = io.BytesIO()
        pd.DataFrame({"id": [sample.id for sample in test], "score": scores}).to_parquet(buffer, index=False)
        self.store.write_bytes(f"{draft.folder}/scores.parquet", buffer.getvalue())
        return {"ids": [sample.id for sample in test]}

    def images(self, record: RunRecord) -> pd.DataFrame:
        """The table of images, by path."""
        folder = self.store.get(record.keys["evaluation"]).folder
        return pd.read_parquet(io.BytesIO(self.store.read_bytes(f"{folder}/images.parquet"))).set_index("path")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "data", Store(str(tmp_path / "store")))


def constant(sample: Sample) -> np.ndarray:
    """Says nothing."""
    return np.full((SIDE, SIDE), 0.5)


def corner(sample: Sample) -> np.ndarray:
    """Sees every defect where `dent` draws it, and nothing on good images."""
    found = np.full((SIDE, SIDE), 0.05)
    if sample.label != "good":
        found[: SIDE // 2, : SIDE // 2] = 0.9
    return found


def dent() -> np.ndarray:
    """The upper left quarter."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[: SHAPE[0] // 2, : SHAPE[1] // 2] = True
    return mask


def fill(bench: Bench, good: int = 2, dents: int = 2, large: bool = False) -> None:
    """Test images of both kinds; large good ones show false-positive rates low enough for AUPIMO."""
    for i in range(good):
        bench.picture(f"test/good/{i}.png", (480, 320) if large else SHAPE)
    for i in range(dents):
        bench.picture(f"test/dent/{i}.png")
        bench.mask(str(i), dent())


# what is judged


def test_pixels_are_judged_at_the_masks_own_size(bench: Bench) -> None:
    fine = np.zeros(SHAPE, dtype=bool)
    fine[10, 20] = fine[50, 30:34] = True  # 5 pixels, which no map of 32 x 32 could hold
    large = np.zeros((200, 100), dtype=bool)
    large[0, :7] = True
    bench.picture("test/dent/a.png")
    bench.mask("a", fine)
    bench.picture("test/dent/b.png", large.shape)
    bench.mask("b", large)
    bench.picture("test/good/c.png")
    metrics = bench.judge(constant).metrics
    # The average precision of a map that says nothing is the share of defective pixels.
    assert metrics["pixel_ap"] == pytest.approx((5 + 7) / (2 * 96 * 64 + 200 * 100))
    assert metrics["pixel_auroc"] == pytest.approx(0.5)
    assert metrics["image_auroc"] == pytest.approx(0.5)


def test_a_perfect_method_has_perfect_figures(bench: Bench) -> None:
    fill(bench, good=2, dents=3)
    record = bench.judge(corner)
    assert {record.metrics[name] for name in ("image_auroc", "image_ap", "image_f1_max")} == {1.0}
    # A map of a third of the mask's size blurs the edge.
    assert record.metrics["pixel_auroc"] > 0.99
    assert record.metrics["iou_max"] > 0.9
    assert record.metrics["pro"] > 0.95
    assert record.metrics["iou_at_threshold"] > 0.85
    expected = {"train": 3, "calibration": ENOUGH, "test_good": 2, "test_anomalous": 3, "test_unknown": 0}
    assert {name: record.counts[name] for name in expected} == expected
    images = bench.images(record)
    assert images.loc["part/test/dent/0.png", "decision"] == "reject"
    assert images.loc["part/test/good/0.png", "decision"] == "accept"


def test_each_defect_type_is_judged_against_all_good_images(bench: Bench) -> None:
    fill(bench, good=2, dents=3)
    bench.picture("test/rust/0.png")  # without a mask: only its image can be judged

    def blind_to_rust(sample: Sample) -> np.ndarray:
        return constant(sample) / 10 if sample.defect_type == "rust" else corner(sample)

    record = bench.judge(blind_to_rust)
    folder = bench.store.get(record.keys["evaluation"]).folder
    groups = json.loads(bench.store.read_bytes(f"{folder}/groups.json"))
    dent, rust = groups["defect_type"]["dent"], groups["defect_type"]["rust"]
    assert (dent["images"], dent["image_auroc"], dent["pro"]) == (3, 1.0, record.metrics["pro"])
    assert (rust["images"], rust["image_auroc"]) == (1, 0.5)  # as low as the good images
    assert "pro" not in rust
    assert sum(size["n_regions"] for size in groups["size"].values()) == 3


def test_an_unknown_mask_counts_for_the_image_and_not_for_its_pixels(bench: Bench) -> None:
    fill(bench, good=1, dents=1)
    bench.picture("test/dent/unmasked.png", (50, 50))
    record = bench.judge(constant)
    assert record.counts["without_mask"] == 1
    assert record.counts["test_anomalous"] == 2
    assert record.metrics["pixel_ap"] == pytest.approx(dent().sum() / (2 * 96 * 64))
    assert record.metrics["image_ap"] == pytest.approx(2 / 3)
    assert pd.isna(bench.images(record).loc["part/test/dent/unmasked.png", "iou_best"])


def test_without_any_mask_only_images_are_judged(bench: Bench) -> None:
    bench.picture("test/good/0.png")
    bench.picture("test/dent/0.png")
    record = bench.judge(corner)
    assert set(record.metrics) == {"image_auroc", "image_ap", "image_f1_max", "fpr_at_threshold"}
    assert "no anomalous image" in record.intervals["aupimo"]["note"]  # why a metric is absent
    assert record.counts["without_mask"] == 1


def test_good_images_alone_have_no_metrics_but_a_false_reject_rate(bench: Bench) -> None:
    fill(bench, good=2, dents=0)
    record = bench.judge(constant)
    assert record.metrics == {"fpr_at_threshold": 1.0}
    did = record.calibration["realised"]
    assert did["false_reject_rate"] == 1.0  # all score 0.5, above each held-out image
    assert "miss_rate" not in did


def test_a_category_without_test_images_is_no_fault(bench: Bench, tmp_path: Path) -> None:
    record = bench.judge(constant)
    assert record.status == "done"
    assert record.metrics == {}
    assert record.calibration["realised"] == {}
    assert [record.counts[f"test_{label}"] for label in ("good", "anomalous", "unknown")] == [0, 0, 0]
    assert len(bench.images(record)) == 0
    page = Path(report.fn(bench.store.url, str(tmp_path / "report"))).read_text()
    assert "part" in page


# the threshold


def test_too_few_held_out_images_give_no_threshold_and_say_how_many_are_needed(bench: Bench) -> None:
    bench.held_out = ENOUGH - 1
    fill(bench)
    record = bench.judge(corner)
    by_image = record.calibration["image"]
    assert by_image["value"] is None
    assert "needs at least 19 held-out good images, there are 18" in by_image["note"]
    assert record.calibration["realised"] == {}
    assert "iou_at_threshold" not in record.metrics
    assert record.metrics["image_auroc"] == 1.0
    assert set(bench.images(record)["decision"]) == {"none"}


def test_the_threshold_comes_from_held_out_images_alone(bench: Bench) -> None:
    fill(bench)
    record = bench.judge(corner)
    for kind in ("image", "pixel"):
        assert record.calibration[kind]["value"] == pytest.approx(0.19)  # the largest of 19: k = ceil(20 * 0.95)
        assert record.calibration[kind]["note"] is None
    did = record.calibration["realised"]
    assert (did["false_reject_rate"], did["miss_rate"]) == (0.0, 0.0)
    assert did["miss_interval"][0] == 0.0
    assert 0.5 < did["miss_interval"][1] < 1.0  # two images prove little
    images = bench.images(record)
    assert images.loc["part/test/dent/0.png", "p_value"] == pytest.approx(1 / 20)
    assert images.loc["part/test/good/0.png", "p_value"] == pytest.approx(16 / 20)


@pytest.mark.parametrize(("peaks", "told"), [(10, True), (9, False)])
def test_good_images_that_score_highest_at_the_rim_are_told(bench: Bench, peaks: int, told: bool) -> None:
    bench.held_out, bench.at_rim = 20, peaks  # the rim is 23 % of the area: twice that are 9.4 of 20
    record = bench.judge(lambda sample: np.zeros((SIDE, SIDE)))
    assert record.calibration["at_rim"] == {"peaks": peaks, "images": 20, "area": pytest.approx(0.234375)}
    sentences = [text for text in record.warnings if text.startswith("good images score highest at the rim: ")]
    assert [f"{peaks} of 20" in text and "frame = 0.125" in text for text in sentences] == [True] * told


def test_another_rate_is_another_evaluation_of_the_same_maps(bench: Bench) -> None:
    fill(bench)
    strict = bench.judge(corner)
    loose = bench.judge(corner, rate=0.5)
    assert strict.keys["maps"] == loose.keys["maps"]
    assert strict.keys["evaluation"] != loose.keys["evaluation"]
    assert loose.calibration["image"]["value"] == pytest.approx(0.1)


def test_every_asked_rate_is_reported_with_what_it_did(bench: Bench) -> None:
    fill(bench, good=4, dents=2)
    record = bench.judge(corner, rate=0.1)
    rates = {promise["rate"]: promise for promise in record.calibration["rates"]}
    assert list(rates) == [0.005, 0.01, 0.05, 0.1]
    assert "needs at least 199 held-out good images" in rates[0.005]["image"]["note"]
    assert rates[0.05]["image"]["smallest_rate"] == 1 / 20
    assert rates[0.1]["image"] == record.calibration["image"]
    assert rates[0.1]["pixel"] == record.calibration["pixel"]
    did = rates[0.1]["image"]
    assert (did["value"], did["false_reject_rate"], did["miss_rate"]) == (pytest.approx(0.18), 0.0, 0.0)
    low, high = did["expected_interval"]
    assert low == 0.0
    assert high in (0.25, 0.5)  # of four images, one or two by bad luck


def test_labelled_defects_report_what_is_missed_and_move_no_threshold(bench: Bench) -> None:
    fill(bench, good=2, dents=2)
    without = bench.judge(constant).calibration["rates"]
    other = Bench(bench.root.parent / "more", Store(f"{bench.store.url}-more"))
    fill(other, good=2, dents=5)
    more = other.judge(lambda sample: constant(sample) / 5).calibration["rates"]
    assert [rate["image"]["value"] for rate in more] == [rate["image"]["value"] for rate in without]
    assert (without[-1]["image"]["miss_rate"], more[-1]["image"]["miss_rate"]) == (0.0, 1.0)


def test_false_alarms_seen_stand_beside_those_promised(bench: Bench, tmp_path: Path) -> None:
    fill(bench, good=2, dents=1)
    assert bench.judge(corner).calibration["false_alarms"] == []  # padim promises none
    bench = Bench(bench.root, Store(f"{bench.store.url}-other"), method="contrario")
    record = bench.judge(lambda sample: corner(sample) + 0.5 * (sample.label == "good"))  # 0.55: an NFA of 0.28
    expected = [{"promised": p, "seen": seen, "images": 2} for p, seen in ((1.0, 1.0), (0.1, 0.0), (0.01, 0.0))]
    assert record.calibration["false_alarms"] == expected
    page = Path(report.fn(bench.store.url, str(tmp_path / "report"))).read_text()
    assert "seen in the 2 good test images: 1 promised, 1.00 seen; 0.1 promised, 0.00 seen" in " ".join(page.split())


# how certain it is


def uneven(sample: Sample) -> np.ndarray:
    """Sees defects, some better than others, and something on good images too."""
    rng = np.random.default_rng(int(sample.id[:8], 16))
    found = rng.random((SIDE, SIDE)) * 0.5
    if sample.label != "good":
        found[: SIDE // 2, : SIDE // 2] += rng.random()
    return found


def test_each_metric_has_its_interval_around_it_and_its_replicates(bench: Bench) -> None:
    fill(bench, good=6, dents=8, large=True)
    record = bench.judge(uneven)
    assert set(record.intervals) == set(record.metrics)
    assert {"aupimo", "boundary_f", "boundary_f_at_threshold", "recall_at_threshold"} <= set(record.metrics)
    kept = read_replicates(bench.store, record.keys["evaluation"])
    assert set(kept) == set(record.metrics)
    for metric, value in record.metrics.items():
        assert kept[metric].estimate == pytest.approx(value, abs=1e-12), metric
        assert len(kept[metric].values) == 1000
        low, high = record.intervals[metric]["low"], record.intervals[metric]["high"]
        assert (low is None and record.intervals[metric]["note"]) or low <= value <= high, metric
    assert record.intervals["pro"]["low"] < record.intervals["pro"]["high"]


def test_two_methods_on_equal_images_are_pairs(bench: Bench) -> None:
    fill(bench, good=6, dents=8)
    one = read_replicates(bench.store, bench.judge(uneven).keys["evaluation"])
    other = Bench(bench.root, Store(f"{bench.store.url}-other"))
    two = read_replicates(other.store, other.judge(constant).keys["evaluation"])
    found = compare(one["pixel_auroc"], two["pixel_auroc"])
    assert found.difference > 0.2
    assert found.p_value is not None
    assert found.p_value < 1e-3


def test_figures_of_one_image_stand_in_its_row(bench: Bench) -> None:
    fill(bench, good=6, dents=2, large=True)
    record = bench.judge(uneven)
    rows = bench.images(record)
    assert rows.loc["part/test/dent/0.png", "boundary_f"] == pytest.approx(
        2 * record.metrics["boundary_f"] - rows.loc["part/test/dent/1.png", "boundary_f"]
    )
    assert rows["aupimo"].dropna().mean() == pytest.approx(record.metrics["aupimo"])
    assert pd.isna(rows.loc["part/test/good/0.png", "boundary_f"])


# other kinds of truth


def test_annotated_defects_saturate_as_published(bench: Bench) -> None:
    bench.dataset = "mvtec_loco_ad"
    bench.picture("test/good/0.png")
    bench.picture("test/logical_anomalies/0.png")
    rows = np.zeros(SHAPE, dtype=np.uint8)
    rows[: SHAPE[0] // 2] = 255  # the method flags its left half, which suffices
    bench.file("ground_truth/logical_anomalies/0/0.png", rows)
    entry = {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 0.4, "relative_saturation": True}
    (bench.root / "part/defects_config.json").write_text(json.dumps([entry]))
    metrics = bench.judge(corner).metrics
    assert metrics["spro_at_0.05"] > 0.95
    assert metrics["pro_at_0.05"] < 0.6


def test_another_saturation_is_another_evaluation_of_the_same_maps(bench: Bench) -> None:
    bench.dataset = "mvtec_loco_ad"
    bench.picture("test/good/0.png")
    bench.picture("test/logical_anomalies/0.png")
    bench.file("ground_truth/logical_anomalies/0/0.png", np.full(SHAPE, 255, np.uint8))
    found = []
    for saturation in (0.1, 0.9):
        entry = {"defect_name": "missing", "pixel_value": 255}
        entry |= {"saturation_threshold": saturation, "relative_saturation": True}
        (bench.root / "part/defects_config.json").write_text(json.dumps([entry]))
        found.append(bench.judge(corner).metrics["spro_at_0.05"])
    assert found[0] > found[1] + 0.3


def test_a_mark_that_is_not_configured_is_an_error_that_names_it(bench: Bench) -> None:
    bench.dataset = "mvtec_loco_ad"
    bench.picture("test/logical_anomalies/0.png")
    bench.file("ground_truth/logical_anomalies/0/0.png", np.full(SHAPE, 7, np.uint8))
    entry = {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 1, "relative_saturation": True}
    (bench.root / "part/defects_config.json").write_text(json.dumps([entry]))
    with pytest.raises(MaskError, match=r"values \[7\].* it knows \[255\]"):
        bench.judge(corner)


def test_pixels_without_depth_do_not_count(bench: Bench) -> None:
    bench.dataset, bench.good = "mvtec_3d_ad", "good/rgb"
    for name in ("good", "dent"):
        bench.picture(f"test/{name}/rgb/0.png")
        points = np.ones((*SHAPE, 3), np.float32)
        points[SHAPE[0] // 2 :] = 0  # the sensor saw nothing of the lower half
        place = bench.root / "part/test" / name / "xyz"
        place.mkdir(parents=True)
        tifffile.imwrite(place / "0.tiff", points, photometric="rgb")
    bench.file("test/dent/gt/0.png", dent().astype(np.uint8) * 255)
    metrics = bench.judge(constant).metrics
    assert metrics["pixel_ap"] == pytest.approx(dent().sum() / SHAPE[0] / SHAPE[1])  # one of two upper halves' halves


def test_points_that_cannot_be_read_are_an_error_that_names_them(bench: Bench) -> None:
    bench.dataset, bench.good = "mvtec_3d_ad", "good/rgb"
    bench.picture("test/good/rgb/0.png")
    place = bench.root / "part/test/good/xyz"
    place.mkdir(parents=True)
    (place / "0.tiff").write_bytes(b"nonsense")
    with pytest.raises(DatasetError, match=r"part/test/good/xyz/0\.tiff are no TIFF"):
        bench.judge(constant)


# the record


def test_the_record_is_kept_and_not_written_again(bench: Bench) -> None:
    fill(bench)
    record = bench.judge(corner)
    path = Path(bench.store.path(record.key()))
    assert read_record(bench.store, record.key()) == record
    written = path.stat().st_mtime_ns
    assert bench.judge(corner) == record
    assert path.stat().st_mtime_ns == written
    assert record.params["image_size"] == SIDE
    assert {"prepare", "validate", "fit", "predict", "evaluate"} <= set(record.seconds)
    assert record.peak_memory_mb > 0
    assert {"data", "code", "model", "maps"} <= set(record.fingerprints)
