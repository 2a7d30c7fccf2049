"""The report says what the records say, asks nothing of the network and survives whatever a cell left undone."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import Page, put
from PIL import Image

from al_models.calibration import HeldOutPixels
from flows.report import pages
from storage.errors import Damaged
from storage.nights import Decision, write_decision
from storage.records import RunRecord, read_records, write_record
from storage.store import Store
from tasks.compare import costs, tables
from tasks.compare.answer import headline
from tasks.compare.variants import variants_of
from tasks.core import heat
from tasks.core.handles import Category
from tasks.core.heat import Scale
from tasks.report.benchmark import by_category, evaluation, export, pictures, thresholds, verdicts
from tasks.report.benchmark.pictures import sample_picture
from tasks.report.benchmark.report import report
from tasks.report.data.report import Judged

SIDE = 32
METRICS = {"pro": 0.9123, "pixel_auroc": 0.9766, "image_auroc": 0.8888}
REASON = 'fit: OutOfMemoryError: needed 9.1 GB <3 free> & "more"'


def line(image_id: str, label: str, score: float, quality: float | None) -> dict[str, Any]:
    defect = {"good": "good", "anomalous": "scratch"}.get(label, "unknown")
    return {
        "id": image_id,
        "path": f"test/{defect}/{image_id}.png",
        "label": label,
        "defect_type": defect,
        "score": score,
        "p_value": 0.0417,
        "decision": "reject" if score > 5 else "accept",
        "map_max": score,
        "average_precision": quality,
        "iou_best": quality,
    }


def lines(masks: bool) -> list[dict[str, Any]]:
    rows = [line(f"g{n}", "good", 1.0 + n, None) for n in range(3)]
    scores, qualities = [9.0, 3.0, 7.0, 6.0, 8.0], [0.2, 0.9, 0.5, 0.7, 0.4]
    return rows + [line(f"a{n}", "anomalous", scores[n], qualities[n] if masks else None) for n in range(5)]


def finding(path: str, severity: str, rule: str, reason: str) -> dict[str, str]:
    place = {"key": path, "path": path, "id": path, "split": "train", "label": "good", "defect_type": "good"}
    return place | {"severity": severity, "rule": rule, "reason": reason}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def outputs(store: Store, name: str, masks: bool, channels: int = 3) -> dict[str, str]:
    """Artifacts of one cell."""
    rng = np.random.default_rng(7)
    rows = lines(masks)
    ids = [row["id"] for row in rows]
    images = rng.integers(0, 255, (len(ids), SIDE, SIDE, channels), dtype=np.uint8)
    maps = rng.uniform(0, 8, (len(ids), SIDE, SIDE)).astype(np.float16)
    truth = np.zeros((len(ids), SIDE, SIDE), np.uint8)
    if masks:
        truth[3:, 8:16, 8:16] = 1
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    curves = {"image_roc": {"x": [0, 0, 1], "y": [0, 0.8, 1]}}
    if masks:
        curves["pro"] = {"x": list(np.linspace(0, 0.3, 900)), "y": list(np.linspace(0, 1, 900) ** 0.2)}
    files = {"images.parquet": table.getvalue(), "curves.json": json.dumps(curves).encode()}
    expectation = {"name": "readable", "description": "decodes whole", "severity": "reject", "success": False}
    verdict = {"accepted": len(ids), "rejected": 1, "warned": 0, "stop": None, "policy": {"rules": {}}}
    verdict["expectations"] = [{**expectation, "unexpected": 1}]
    found = finding("train/good/013.png", "reject", "readable", "cannot be read: truncated")
    return {
        "images": put(store, f"images/{name}", {"images": images}, {"ids": ids, "channels": channels}, {}),
        "verdict": put(store, f"verdicts/{name}", {}, verdict, {"findings.parquet": parquet([found])}),
        "maps": put(store, f"maps/{name}", {"maps": maps}, {"ids": ids}, {}),
        "evaluation": put(store, f"evaluation/{name}", {"masks": truth}, {"ids": ids}, files),
    }


def record(method: str, category: str, seed: int = 0, **changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "dataset": "mvtec_ad",
        "category": category,
        "method": method,
        "params": {"image_size": SIDE},
        "seed": seed,
        "cell": f"{method}-{hash_of(category)}-{seed}",
        "status": "done",
        "metrics": METRICS,
        "calibration": {
            "image": {"rate": 0.05, "value": 5.0, "n": 26, "smallest_rate": 0.037, "note": None},
            "pixel": {"rate": 0.05, "value": 6.0, "n": 26, "smallest_rate": 0.037, "note": None},
            "realised": {"false_reject_rate": 0.0952, "false_reject_interval": [0.0117, 0.3038], "miss_rate": 0.2},
        },
        "counts": {"train": 237, "calibration": 26, "test_good": 3, "test_anomalous": 5},
        "seconds": {"prepare": 2.41, "fit": 3.07},
        "peak_memory_mb": 1234.0,
        "versions": {"torch": "2.9.1"},
        "hardware": "2 cores",
        "finished": "2026-01-02T03:04:05Z",
    }
    return RunRecord(**{**values, **changes})


def hash_of(text: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(text))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two methods on two categories: one cell failed, one category has no masks and an evil name."""
    store = Store(str(tmp_path / "store"))
    evil = "<b>x"
    write_record(store, record("padim", "grid", keys=outputs(store, "grid", masks=True, channels=1)))
    better = {name: value + 0.01 for name, value in METRICS.items()}
    write_record(store, record("patchcore", "grid", metrics=better, keys=outputs(store, "grid2", masks=True)))
    bare = {"image_auroc": 0.7654}
    write_record(store, record("padim", evil, metrics=bare, keys=outputs(store, "evil", masks=False)))
    write_record(store, record("patchcore", evil, status="failed", reason=REASON, metrics={}, calibration={}))
    return store


def made(store: Store, tmp_path: Path, cells: list[str] | None = None) -> str:
    return Path(report.fn(store.url, str(tmp_path / "out"), cells)).read_text(encoding="utf-8")


def test_page_is_whole_and_asks_nothing_of_others(store: Store, tmp_path: Path) -> None:
    text = made(store, tmp_path)
    page = Page(text)
    assert page.open == []
    assert len(page.asked) == 25  # the icon and 3 cells x 4 examples x 2 pictures
    assert all(asked.startswith("data:") for asked in page.asked)
    assert page.links
    assert {link for link in page.links if link[1:] not in page.ids} == {"data.html"}
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(page.alts)


def test_the_page_of_the_nights_is_written_again_beside_it(store: Store, tmp_path: Path) -> None:
    assert pages(store, str(tmp_path), report.fn).nights is None
    write_decision(store, Decision("mvtec_ad", "screw", "2026-01-02T02:00:00", "kept", "pro is lower"))
    written = pages(store, str(tmp_path), report.fn)
    assert written.report == str(tmp_path / "index.html")
    assert "pro is lower" in Path(written.nights or "").read_text()


def test_names_are_escaped(store: Store, tmp_path: Path) -> None:
    text = made(store, tmp_path)
    assert "<b>x" not in text
    assert "&lt;b&gt;x" in text
    assert "<b>x" in Page(text).text
    assert "<b>x" not in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_figures_are_the_records(store: Store, tmp_path: Path) -> None:
    text = made(store, tmp_path)
    shown = Page(text).text
    for figure in ("91.2", "97.7", "88.9", "92.2", "98.7", "89.9", "76.5", "9.5 (1.2 to 30.4)", "20.0", "2.41", "3.07"):
        assert figure in shown
    assert "5.48" in shown  # total seconds
    assert "1234" in shown
    assert "2 cores" in shown
    assert "2026-01-02 03:04 UTC" in shown
    assert "train 237, calibration 26, test good 3, test anomalous 5." in shown
    assert text.count("title>fit 3.07 s<") == 3


def test_absent_metric_is_absent_not_zero(store: Store, tmp_path: Path) -> None:
    text = made(store, tmp_path)
    start = text.index('id="cell-padim-', text.index('id="cells"'))
    cell = text[start : text.index("No pictures" if "No pictures" in text else "gallery", start)]  # `<b>x` comes first
    rows = [re.findall(r"<td[^>]*>([^<]*)<", row) for row in re.findall(r"This cell(.*?)</tr>", cell, re.DOTALL)]
    assert rows == [["–", "–"], ["76.5"]]


def test_failure_shows_its_reason(store: Store, tmp_path: Path) -> None:
    page = Page(made(store, tmp_path))
    assert REASON in page.text
    assert "1 of 4 cells failed" in page.text


def test_set_aside_images_are_listed_by_reason(store: Store, tmp_path: Path) -> None:
    shown = Page(made(store, tmp_path)).text
    assert shown.count("cannot be read: truncated (1): train/good/013.png") == 2
    assert "decodes whole" in shown


def test_verdicts_on_one_category_are_told_once() -> None:
    asked = {"name": "readable", "description": "decodes whole", "severity": "reject", "success": False}
    twice = finding("a.png", "reject", "readable", "truncated")
    given = [
        ({"stop": None, "expectations": [asked]}, [twice, finding("", "warn", "published_counts", "12 of 13")]),
        ({"stop": "no image", "expectations": [asked]}, [twice, finding("b.png", "reject", "readable", "truncated")]),
    ]
    merged = verdicts.merge_verdicts(given)
    assert (merged.stop, merged.expectations) == (["no image"], [asked])
    assert verdicts.by_reason(merged.findings["reject"]) == {"truncated": ["a.png", "b.png"]}
    assert verdicts.by_reason(merged.findings["warn"]) == {"12 of 13": ["the category as a whole"]}


def test_long_lists_of_findings_are_capped(store: Store, tmp_path: Path) -> None:
    keys = outputs(store, "many", masks=False)
    rows = [finding(f"{n}.png", "warn", "usual_size", f"reason {n % 20}") for n in range(200)]
    keys["verdict"] = put(store, "verdicts/many2", {}, {"stop": None}, {"findings.parquet": parquet(rows)})
    write_record(store, record("spade", "many", keys=keys))
    shown = Page(made(store, tmp_path)).text
    assert "Remarks: 200" in shown
    assert "and 2 more" in shown  # of the 10 images of a reason, 8 are named
    assert "For 12 more reasons see the data page" in shown


def test_the_data_page_stands_beside_it(store: Store, tmp_path: Path) -> None:
    made(store, tmp_path)
    text = (tmp_path / "out" / "data.html").read_text(encoding="utf-8")
    assert Page(text).text.count("cannot be read: truncated") >= 2  # a verdict each category
    assert "<b>x" not in text
    assert "train/good/013.png" in (tmp_path / "out" / "findings.csv").read_text(encoding="utf-8")


def test_the_data_page_shows_the_verdicts_given_and_those_of_the_cells(store: Store, tmp_path: Path) -> None:
    category = Category(store.url, "mvtec_ad", "stopped one", "", "", "")
    stop = {"stop": "no image is left", "accepted": 0, "rejected": 0}
    verdict = put(store, "verdicts/stopped", {}, stop, {"findings.parquet": parquet([finding("", "stop", "a", "b")])})
    given = [Judged(category, "images/none", verdict)]
    given.append(Judged(replace(category, category="grid"), "images/grid", "verdicts/stopped"))
    report.fn(store.url, str(tmp_path / "out"), judged=given)
    shown = Page((tmp_path / "out" / "data.html").read_text(encoding="utf-8")).text
    assert "Data: <b>x, grid, verdict stopped, grid, verdict grid2, stopped one May" in shown
    assert shown.count("Stopped: no image is left") == 4  # two categories, above and in their sections


def test_published_figures_stand_beside_ours_and_only_on_their_data(store: Store, tmp_path: Path) -> None:
    shown = Page(made(store, tmp_path)).text
    assert "padim, published, full data, other backbones" in shown
    rows = {row.variant.name: row for row in by_category.per_category([record("padim", "grid")], "pixel_auroc")}
    assert rows["padim"].published == [97.3]
    assert rows["padim"].published_all == 97.5
    (own,) = by_category.per_category([record("padim", "grid", dataset="folder")], "pixel_auroc")
    assert not own.has_published


def test_failed_category_counts_as_last_place(store: Store, tmp_path: Path) -> None:
    made(store, tmp_path)
    markdown = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    ranks = re.findall(r"^\| (\d\.\d\d) \| (\w+) \| (\d of \d)", markdown, re.MULTILINE)
    assert ranks == [("1.50", "padim", "2 of 2"), ("1.50", "patchcore", "1 of 2")]


def test_ties_share_the_mean_of_their_places() -> None:
    assert tables.ranks({"a": 0.5, "b": 0.9, "c": 0.5, "d": None}) == {"b": 1.0, "a": 2.5, "c": 2.5, "d": 4.0}


def test_means_over_fewer_categories_are_not_best() -> None:
    found = tables.ranking(
        [
            record("padim", "grid", metrics={"pro": 0.8}),
            record("padim", "wood", metrics={"pro": 0.6}),
            record("spade", "grid", metrics={"pro": 0.95}),
            record("spade", "wood", status="failed", metrics={}),
        ]
    )
    assert {row.variant.name: row.best for row in found.rows} == {"padim": frozenset({"pro"}), "spade": frozenset()}


def test_spread_is_over_seeds() -> None:
    cells = [record("ae_ssim", "grid", seed=s, metrics={"pro": p}) for s, p in enumerate((0.7, 0.8, 0.9))]
    (row,) = tables.ranking(cells).rows
    assert row.values["pro"].mean == pytest.approx(0.8)
    assert row.values["pro"].spread == pytest.approx(0.1)
    assert "80.0 ± 10.0" in export.result_table_markdown(cells)


def test_lead_within_the_spread_of_seeds_is_said_to_be_so() -> None:
    cells = [record("ae_ssim", "grid", seed=s, metrics={"pro": p}) for s, p in enumerate((0.7, 0.9))]
    cells.append(record("padim", "grid", metrics={"pro": 0.79}))
    answer, support = headline(tables.ranking(cells))
    assert answer == "Best on this data: ae_ssim."
    assert any("no more than the spread between seeds (14.1)" in line for line in support)


def test_one_method_with_two_settings_is_two_rows() -> None:
    cells = [
        record("patchcore", "grid", params={"image_size": 32, "coreset_ratio": ratio}, cell=str(ratio))
        for ratio in (0.01, 0.1)
    ]
    broken = record("patchcore", "wood", params={"coreset_ratio": 0.1}, status="failed", metrics={})
    found = {variant.name: len(variant.records) for variant in variants_of([broken, *cells])}
    assert found == {"patchcore (coreset_ratio=0.01)": 1, "patchcore (coreset_ratio=0.1)": 2}


def test_examples_are_best_median_worst_and_the_most_suspicious_good() -> None:
    assert [row["id"] for _, row in pictures.choose(lines(masks=True))] == ["a1", "a2", "a0", "g2"]
    assert [row["id"] for _, row in pictures.choose(lines(masks=False))] == ["a0", "a2", "a1", "g2"]
    assert [row["id"] for _, row in pictures.choose(lines(masks=True)[:4])] == ["a0", "g2"]
    assert pictures.choose([]) == []


def test_heat_scale_runs_from_good_to_twice_the_threshold(store: Store) -> None:
    kept = next(r for r in records_of(store) if r.method == "padim" and r.category == "grid")
    gallery = pictures.read_gallery(store, kept, evaluation.read_evaluation(store, kept).rows)
    assert gallery.scale is not None
    assert gallery.scale.low == pytest.approx(4.0, abs=0.2)  # uniform 0..8
    assert gallery.scale.high == pytest.approx(12.0 - gallery.scale.low)
    assert gallery.examples[0].has_outline
    assert not gallery.examples[3].has_outline


def records_of(store: Store) -> list[RunRecord]:
    return list(read_records(store))


def test_overlay_grows_lighter_and_the_part_stays_visible() -> None:
    pixels = np.full((1, 5, 1), 128, np.uint8)
    pixels[0, 4] = 255
    values = np.array([[0.0, 0.5, 1.0, 9.0, 1.0]])
    shades = heat.overlay(pixels, values, Scale(0.0, 1.0, None, "")).mean(axis=-1)[0]
    assert shades[0] < shades[1] < shades[2] == shades[3] < shades[4]


def test_contour_surrounds_the_mask_and_hides_none_of_it() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[3:5, 3:5] = 1
    line_ = heat.contour(mask, 1)
    assert not (line_ & mask.astype(bool)).any()
    assert line_.sum() == 8
    assert heat.contour(np.ones((4, 4)), 2).sum() == 0


def test_curves_keep_their_corners() -> None:
    x = [0.0] * 1000 + list(np.linspace(0, 1, 1000))
    y = list(np.linspace(0, 0.9, 1000)) + [0.9] * 999 + [1.0]
    points = evaluation._thinned(x, y)
    assert len(points) <= 163
    assert points[0] == (0.0, 0.0)
    assert points[-1] == (1.0, 1.0)
    assert min(abs(a) + abs(b - 0.9) for a, b in points) < 0.02


@pytest.mark.parametrize("lost", ["images", "maps", "evaluation", "verdict"])
def test_a_lost_output_becomes_a_sentence(store: Store, tmp_path: Path, lost: str) -> None:
    manifests = [key for key in store.list("verdicts" if lost == "verdict" else f"{lost}/grid") if "manifest" in key]
    assert manifests
    for key in manifests:
        store.delete(key)
    page = Page(made(store, tmp_path))
    assert page.open == []
    sentence = "No verdict was stored" if lost == "verdict" else "No pictures: this cell left no"
    assert sentence in page.text
    assert "97.7" in page.text


def test_damaged_maps_become_a_sentence(store: Store, tmp_path: Path) -> None:
    for key in store.list("maps/grid"):
        if "/c/" in key:
            store.write_bytes(key, b"not zstd")
    assert "could not be read" in Page(made(store, tmp_path)).text


def test_unlabelled_images_are_listed_with_their_decision(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    keys = outputs(store, "own", masks=False)
    rows = [line(f"u{n}", "unknown", float(n), None) for n in range(8)]
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    keys["evaluation"] = put(
        store, "evaluation/u", {}, {"ids": [r["id"] for r in rows]}, {"images.parquet": table.getvalue()}
    )
    write_record(store, record("padim", "own", dataset="folder", metrics={}, calibration={}, keys=keys))
    shown = Page(made(store, tmp_path)).text
    assert "cannot be ranked" in shown
    assert shown.index("test/unknown/u7.png") < shown.index("test/unknown/u0.png")


def test_unsupported_threshold_says_why(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    image = {"rate": 0.01, "value": None, "n": 26, "smallest_rate": 0.037, "note": "hold out 99 images"}
    write_record(store, record("padim", "grid", calibration={"image": image}))
    shown = Page(made(store, tmp_path)).text
    assert "No threshold: hold out 99 images" in shown


def test_what_speaks_against_a_method_stands_with_its_rank_and_its_cell(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    doubt = "The images are not aligned: only 8 % agree."
    write_record(store, record("padim", "grid", warnings=[doubt], keys=outputs(store, "grid", masks=True)))
    page = Page(made(store, tmp_path))
    assert "padim on grid: The images are not aligned." in page.text
    assert page.text.count(doubt) == 1


def test_different_data_in_one_category_is_called_out(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    write_record(store, record("padim", "grid", fingerprints={"data": "one"}))
    write_record(store, record("spade", "grid", fingerprints={"data": "two"}))
    assert "were run on different images" in Page(made(store, tmp_path)).text


def test_empty_store_gives_a_page(tmp_path: Path) -> None:
    page = Page(made(Store(str(tmp_path / "none")), tmp_path))
    assert page.open == []
    assert "No cell has been run yet" in page.text


def test_only_the_named_cells_are_shown(store: Store, tmp_path: Path) -> None:
    chosen = next(r.cell for r in records_of(store) if r.status == "failed")
    made(store, tmp_path, [chosen])
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["cell"] for row in rows] == [chosen]


def test_csv_has_a_row_a_cell(store: Store, tmp_path: Path) -> None:
    made(store, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 4
    by_cell = {(row["method"], row["category"]): row for row in rows}
    done, failed = by_cell["padim", "grid"], by_cell["patchcore", "<b>x"]
    assert float(done["pro"]) == 0.9123
    assert float(done["seconds_fit"]) == 3.07
    assert float(done["peak_memory_mb"]) == 1234.0
    assert json.loads(done["params"]) == {"image_size": SIDE}
    assert by_cell["padim", "<b>x"]["pro"] == ""
    assert failed["reason"] == REASON


def test_nothing_half_written_stays(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made(store, tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        made(store, tmp_path)
    kept = ["data.html", "findings.csv", "index.html", "results.csv", "results.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == kept
    assert (tmp_path / "out" / "index.html").read_text(encoding="utf-8") == before


# how certain a figure is


def test_intervals_stand_beside_the_figures(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    intervals = {"pro": {"low": 0.8771, "high": 0.9432, "note": None}}
    intervals["image_auroc"] = {"low": None, "high": None, "note": "all replicates agree"}
    intervals["aupimo"] = {"low": None, "high": None, "note": "too few good pixels"}  # which has no value either
    write_record(store, record("padim", "grid", intervals=intervals))
    write_record(store, record("padim", "wood", intervals=intervals))
    text = made(store, tmp_path)
    table = text[text.index("<h3>PRO</h3>") : text.index("<h3>Image AUROC</h3>")]
    assert table.count('91.2<small class="under">87.7 to 94.3</small>') == 2
    assert 'title="No interval: all replicates agree">88.9</td>' in text
    shown = Page(text).text
    assert shown.count("95 % interval87.7 to 94.3") == 2  # with each cell
    assert shown.count("Image AUROC: all replicates agree.") == 2
    assert shown.count("AUPIMO: too few good pixels.") == 2
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text(encoding="utf-8"))))
    assert (rows[0]["pro_low"], rows[0]["pro_high"], rows[0]["image_auroc_low"]) == ("0.8771", "0.9432", "")
    assert "pixel_auroc_low" not in rows[0]
    assert "91.2 (87.7 to 94.3)" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_with_several_seeds_their_spread_stands_in_place_of_an_interval() -> None:
    ends = {"pro": {"low": 0.6, "high": 0.9, "note": None}}
    cells = [record("ae_ssim", "grid", seed=s, metrics={"pro": p}, intervals=ends) for s, p in enumerate((0.7, 0.9))]
    (row,) = by_category.per_category(cells, "pro")
    assert row.intervals == [None]
    (row,) = by_category.per_category(cells[:1], "pro")
    assert row.intervals == [ends["pro"]]


def test_records_of_earlier_versions_say_what_they_lack(store: Store, tmp_path: Path) -> None:
    shown = Page(made(store, tmp_path)).text
    assert shown.count("No intervals: the cell was run by an earlier version") == 3
    assert shown.count("Other rates were not recorded") == 3
    assert shown.count("No maps of −log10 p: this cell left no calibration.") == 3
    assert "it left no replicates, as cells of earlier versions; run it again" in shown
    assert "_low" not in (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")


def test_the_ranking_shows_a_choice_and_the_cells_show_all(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    some = {"pro": 0.9, "aupimo": 0.4, "fpr_at_threshold": 0.00123, "boundary_f_at_threshold": 0.3, "home_made": 0.5}
    write_record(store, record("padim", "grid", metrics=some))
    text = made(store, tmp_path)
    ranking = text[text.index('id="ranking"') : text.index('id="categories"')]
    assert ">AUPIMO<" in ranking
    assert not re.search("FPR at threshold|home_made|Boundary F", ranking)
    cell = text[text.index('id="cell-padim') : text.index('id="time"')]
    for words in ("FPR at threshold", "Boundary F at threshold", "home_made", "0.12"):
        assert f">{words}<" in cell
    assert "0.00123" in (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")


# thresholds


def promise(rate: float, realised: float, expected: list[float] | None, value: float | None = 5.0) -> dict[str, Any]:
    own = [max(0.0, realised - 0.03), realised + 0.1]
    kept = {"false_reject_rate": realised, "false_reject_interval": own, "miss_rate": 0.25, "miss_interval": [0.1, 0.4]}
    note = None if value is not None else "a rate of 0.005 needs 199 images"
    facts = {"rate": rate, "value": value, "n": 26, "smallest_rate": 0.037, "note": note}
    return facts | {"expected_interval": expected} | (kept if value is not None else {})


@pytest.mark.parametrize(
    ("realised", "expected", "above"),
    [(0.2, [0.0, 0.19], True), (0.19, [0.0, 0.19], False), (0.07, None, False), (0.09, None, True)],
)
def test_amber_is_above_what_was_expected(realised: float, expected: list[float] | None, above: bool) -> None:
    one = thresholds.Promise("image", promise(0.05, realised, expected), True)
    assert one.above == above  # without an expected interval: the rate's own, 3 points lower, lies above 5 %


def test_all_asked_rates_stand_with_the_cell(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    image = [promise(0.005, 0.0, None, value=None), promise(0.05, 0.286, [0.0, 0.19])]
    pixel = [promise(0.005, 0.0, None, value=None), promise(0.05, 0.1, [0.0, 0.19], value=7.25)]
    rates = [{"rate": i["rate"], "image": i, "pixel": p} for i, p in zip(image, pixel, strict=True)]
    did = {name: image[1][name] for name in ("false_reject_rate", "false_reject_interval", "miss_rate")}
    calibration = {"image": image[1], "pixel": pixel[1], "realised": did, "rates": rates}
    write_record(store, record("padim", "grid", calibration=calibration))
    text = made(store, tmp_path)
    table = text[text.index("Thresholds: all asked rates") : text.index("Where it comes from")]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]
    assert [("◆" in row, "warn" in row) for row in rows] == [
        (False, False),
        (True, True),
        (False, False),
        (True, False),
    ]
    assert "28.6 (25.6 to 38.6) 0.0 to 19.0 25.0 (10.0 to 40.0)" in re.sub("</?t[dr].*?>", " ", rows[1]).replace(
        "  ", " "
    )
    assert rows[0].count("a rate of 0.005 needs 199 images") == 1
    assert "7.25" in rows[3]
    above = text[text.index('id="thresholds"') : text.index('id="cells"')]
    assert '<td class="warn">28.6 (25.6 to 38.6)</td><td>0.0 to 19.0</td>' in above
    assert Page(text).text.count("a new good image is rejected with at most that probability") == 1


# maps as evidence


def held_out(store: Store, name: str, values: np.ndarray, n: int) -> str:
    """A calibration with n held-out maps of these values."""
    pixels = HeldOutPixels()
    for place in range(n):
        pixels.add(str(place), values)
    keys = np.flatnonzero(pixels.shares)
    table, buffer = pa.table({"key": keys, "share": pixels.shares[keys], "maxima": pixels.maxima[keys]}), io.BytesIO()
    pq.write_table(table, buffer)
    return put(store, f"calibrations/{name}", {}, {"ids": sorted(pixels.ids)}, {"pixels.parquet": buffer.getvalue()})


def with_held_out(store: Store, n: int = 26) -> RunRecord:
    keys = outputs(store, "grid", masks=True)
    keys["calibration"] = held_out(store, "grid", np.linspace(0, 6, 100).astype(np.float16), n)
    write_record(store, found := record("padim", "grid", keys=keys))
    return found


def test_maps_of_evidence_stand_beside_the_others(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    with_held_out(store)
    page = Page(made(store, tmp_path))
    assert len(page.asked) == 1 + 4 * 3
    assert sum(alt.startswith("Map of minus log10 p of ") for alt in page.alts) == 4
    assert "saturates in this cell at log10(26 + 1) = 1.43" in page.text


def test_colours_of_evidence_are_those_of_the_cell_with_most_held_out_images(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    kept = with_held_out(store, n=9)
    image = {"rate": 0.05, "value": 5.0, "n": 99, "note": None}
    scale = pictures.evidence_scale([kept, record("spade", "grid", calibration={"image": image, "pixel": image})])
    assert scale is not None
    assert (scale.low, scale.high) == (0.0, 2.0)
    assert pictures.evidence_scale([record("spade", "grid", calibration={})]) is None
    rows = evaluation.read_evaluation(store, kept).rows
    few, most = (pictures.read_gallery(store, kept, rows, evidence=s) for s in (replace(scale, high=1.0), scale))
    assert few.n_held_out == 9
    light = [np.asarray(one.examples[0].evidence).astype(int).sum() for one in (few, most)]
    assert light[0] > light[1]  # 9 images show 1 at most, which is half of the common scale
    assert pictures.read_gallery(store, kept, rows).examples[0].evidence is None


def test_evidence_is_judged_by_the_held_out_values(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    kept = with_held_out(store)
    rows = evaluation.read_evaluation(store, kept).rows
    light = []
    for name, value in (("beyond all maps", 9.0), ("below all maps", -1.0)):  # maps lie in 0..8
        calibration = held_out(store, name, np.full((4, 4), value, np.float16), 26)
        own = replace(kept, keys=kept.keys | {"calibration": calibration})
        gallery = pictures.read_gallery(store, own, rows, evidence=pictures.evidence_scale([own]))
        light.append(np.asarray(gallery.examples[3].evidence, dtype=float))  # the good image: nothing is outlined
    assert (light[1] - light[0]).mean() > 80  # as rare as 26 images can show, and not rare at all


@pytest.mark.parametrize("damage", ["lost", "no table", "no parquet", "none held out"])
def test_without_held_out_maps_there_is_a_sentence(tmp_path: Path, damage: str) -> None:
    store = Store(str(tmp_path / "store"))
    kept = with_held_out(store, n=0 if damage == "none held out" else 26)
    folder = store.get(kept.keys["calibration"]).folder
    if damage == "lost":
        for key in list(store.list("calibrations")):
            store.delete(key)
    elif damage == "no table":
        store.delete(f"{folder}/pixels.parquet")
    elif damage == "no parquet":
        store.write_bytes(f"{folder}/pixels.parquet", b"nothing")
    page = Page(made(store, tmp_path))
    assert len(page.asked) == 1 + 4 * 2
    words = "no good image was held out" if damage == "none held out" else "the calibration could not be read"
    assert f"No maps of −log10 p: {words}" in page.text


# costs


def test_share_of_evaluation_counts_a_shared_output_once() -> None:
    seconds = {"prepare": 6.0, "fit": 2.0, "evaluate": 1.0}
    cells = [record("a", "grid", seconds=seconds), record("b", "grid", seconds=seconds)]
    assert costs.evaluation_share(cells) == pytest.approx(2 / 18)
    shared = [replace(cell, keys={"images": "images/one"}) for cell in cells]
    assert costs.evaluation_share(shared) == pytest.approx(2 / 12)
    assert costs.evaluation_share([record("a", "grid", seconds={"fit": 1.0})]) is None
    assert costs.evaluation_share([]) is None


def test_share_of_evaluation_is_told(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    write_record(store, record("padim", "grid", seconds={"fit": 9.79, "evaluate": 0.21}))
    page = Page(made(store, tmp_path))
    assert "Evaluation took 2.1 % of the computing" in page.text


def test_damaged_record_is_said_not_skipped(store: Store, tmp_path: Path) -> None:
    store.write_bytes("records/mvtec_ad/grid/padim/broken.json", b'{"dataset": 1}')
    with pytest.raises(Damaged, match=r"broken\.json"):
        made(store, tmp_path)


def test_sample_picture_is_drawn_even_without_pictures(store: Store) -> None:
    for kept in records_of(store):
        assert sample_picture(store, kept).width >= 4 * SIDE


def test_pictures_are_small_jpegs_without_colour_loss() -> None:
    url = heat.data_url(Image.fromarray(np.full((SIDE, SIDE, 3), heat.OUTLINE, np.uint8)))
    picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert picture.format == "JPEG"
    assert np.abs(np.asarray(picture).astype(int) - heat.OUTLINE).max() <= 4
