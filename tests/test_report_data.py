"""The data page says what was found, all of it and nothing else, and no name of a data set breaks out of it."""

from __future__ import annotations

import base64
import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import Page, put
from PIL import Image

from storage.datasets import published_counts
from storage.store import Store
from tasks.core.handles import Category
from tasks.ingest import ingest
from tasks.prepare import COLUMNS, prepare
from tasks.report.data.report import Judged, data_report, write_data_page
from tasks.report.distributions import distribution, sizes, ticks
from tasks.report.page import environment
from tasks.validate import FINDINGS, CategoryStopped, validate, verdict_key

SIDE = 32
EVIL = "\"><img src=x onerror=alert(1)>'</style></title><script>"
TAGS = {
    *("html", "head", "meta", "link", "title", "style", "body", "header", "main", "nav", "section", "h1", "h2", "h3"),
    *("h4", "p", "ul", "ol", "li", "dl", "dt", "dd", "a", "b", "br", "wbr", "strong", "span", "code", "div", "table"),
    *(
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "figure",
        "figcaption",
        "img",
        "svg",
        "line",
    ),
    *("text", "rect", "path", "circle"),
}


def fact(path: str, split: str = "train", kind: str = "good", **changes: Any) -> dict[str, Any]:
    label = kind if kind in ("good", "unknown") else "anomalous"
    row = {"id": f"id of {path}", "key": path, "path": path, "split": split, "label": label, "defect_type": kind}
    row |= {"readable": True, "width": 64, "height": 48, "brightness": 100.0, "contrast": 20.0, "sharpness": 300.0}
    return row | {"mask_fraction": 0.01 if label == "anomalous" else None} | changes


def finding(row: dict[str, Any] | None, rule: str, severity: str, reason: str) -> dict[str, Any]:
    """None: about the whole category."""
    place = {name: row[name] if row else "" for name in FINDINGS[:6]}
    return place | {"severity": severity, "rule": rule, "reason": reason}


def parquet(rows: list[dict[str, Any]], columns: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(rows, columns=list(columns)).astype(columns).to_parquet(buffer, index=False)
    return buffer.getvalue()


def gray_of(row: int) -> int:
    """Each image has a gray value of its own."""
    return 10 + 5 * (row % 48)


def judge(
    store: Store,
    facts: list[dict[str, Any]],
    findings: list[dict[str, Any]],
    *,
    dataset: str = "mvtec_ad",
    category: str = "grid",
    set_aside: list[dict[str, str]] | None = None,
    suspects: list[dict[str, Any]] | None = None,
    severity: str = "warn",
    **meta: Any,
) -> Judged:
    """A judged category in the form in which the steps keep it."""
    folder = f"{dataset}/{category.encode().hex()}"
    images = np.stack([np.full((SIDE, SIDE, 1), gray_of(row), np.uint8) for row in range(len(facts))])
    files = {"facts.parquet": parquet(facts, COLUMNS)}
    prepared = put(store, f"images/{folder}", {"images": images}, {"ids": [], "channels": 1}, files)
    rejected = len({row["key"] for row in findings if row["severity"] == "reject"})
    asked = {"name": "readable", "description": "images can be decoded", "severity": "reject", "success": True}
    manifest = {"accepted": len(facts) - rejected, "rejected": rejected, "warned": 0, "stop": None}
    manifest["published"] = published_counts(dataset, category, {})
    manifest |= {"expectations": [{**asked, "unexpected": 0}], "policy": {"rules": {}, "suspect_deviations": 6.0}}
    files = {"findings.parquet": parquet(findings, dict.fromkeys(FINDINGS, "string"))}
    verdict = put(store, f"verdicts/{folder}", {}, manifest | meta, files)
    catalogue = put(store, f"catalogues/{folder}", {}, {"set_aside": set_aside or []}, {})
    scores = None
    if suspects is not None:
        types = {"id": "string", "key": "string", "score": "Float64", "deviations": "Float64", "suspected": "bool"}
        files = {"suspects.parquet": parquet(suspects, types | {"x": "Float64", "y": "Float64"})}
        scores = put(store, f"suspects/{folder}", {}, {"suspected": 1, "severity": severity}, files)
    return Judged(Category(store.url, dataset, category, "", catalogue, ""), prepared, verdict, scores)


def suspect(row: dict[str, Any], deviations: float, x: float = 0.5, y: float = 0.5) -> dict[str, Any]:
    found = {"id": row["id"], "key": row["key"], "score": deviations, "deviations": deviations}
    return found | {"suspected": deviations > 6, "x": x, "y": y}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def facts() -> list[dict[str, Any]]:
    rows = [fact(f"grid/train/good/{n:03}.png", brightness=100.0 + n) for n in range(6)]
    rows += [fact(f"grid/test/good/{n:03}.png", "test") for n in range(2)]
    return rows + [fact(f"grid/test/bent/{n:03}.png", "test", "bent") for n in range(3)]


class DataPage(Page):
    """A page with its pictures and the rows of its tables."""

    def __init__(self, text: str) -> None:
        self.pictures: dict[str, Image.Image] = {}
        """By alternative text."""
        self.attributes: set[str] = set()
        self.labels: set[str | None] = set()
        self.rows: list[list[str]] = []
        super().__init__(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        given = dict(attrs)
        self.labels.add(given.get("aria-label"))
        if tag == "img":
            data = base64.b64decode((given["src"] or "").removeprefix("data:image/jpeg;base64,"))
            self.pictures[given["alt"] or ""] = Image.open(io.BytesIO(data))

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def made(store: Store, tmp_path: Path, *judged: Judged) -> DataPage:
    return DataPage(Path(write_data_page(store, tmp_path / "out", judged)).read_text(encoding="utf-8"))


def rows_of(tmp_path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((tmp_path / "out" / "findings.csv").read_text(encoding="utf-8"))))


def shade(picture: Image.Image) -> float:
    return float(np.asarray(picture.convert("L")).mean())


# the page


def test_page_is_whole_and_asks_nothing_of_others(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    found = [finding(facts[0], "usual_brightness", "warn", "brightness 100")]
    page = made(store, tmp_path, judge(store, facts, found, suspects=[suspect(facts[1], 9.0)]))
    assert page.open == []
    assert set(page.tags) <= TAGS
    assert page.asked
    assert all(asked.startswith("data:") for asked in page.asked)
    home = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    outside = {link for link in page.links if not (link.startswith("#") and link[1:] in page.ids)}
    assert outside == {"findings.csv", home}
    assert len(page.ids) == len(set(page.ids))
    assert all(page.alts)
    for words in ("CC BY-NC-SA 4.0", "Bergmann et al.", home):
        assert words in page.text


def test_no_name_breaks_out(store: Store, tmp_path: Path) -> None:
    rows = [fact(f"{EVIL}{n}", "test", EVIL) for n in range(3)] + [fact(f"{EVIL}t{n}") for n in range(3)]
    found = [finding(rows[0], EVIL, "reject", f"same content as {rows[1]['key']} {EVIL}")]
    found += [finding(rows[4], "usual_brightness", "warn", EVIL), finding(None, "published_counts", "warn", EVIL)]
    asked = [{"name": EVIL, "description": EVIL, "severity": "warn", "success": False, "unexpected": 1}]
    policy = {"rules": {EVIL: "off"}, EVIL: EVIL}
    aside = [{"path": EVIL, "reason": EVIL}]
    names = {"dataset": EVIL.replace("/", ""), "category": EVIL}
    scores = [suspect(rows[5], 7.0), suspect(rows[3], 0.0)]
    judged = judge(
        store, rows, found, set_aside=aside, suspects=scores, stop=EVIL, expectations=asked, policy=policy, **names
    )
    page = made(store, tmp_path, judged)
    assert page.open == []
    assert set(page.tags) <= TAGS
    assert not any(name.startswith("on") for name in page.attributes)
    assert page.text.count(EVIL) > 15


def test_characters_that_cannot_be_seen_are_written_out(store: Store, tmp_path: Path) -> None:
    path = "a\u202egnp.exe\nb\x00c"
    page = made(store, tmp_path, judge(store, [fact(path)], [finding(fact(path), "readable", "reject", "broken")]))
    assert r"a\u202egnp.exe\nb\x00c" in page.text
    assert not {"\u202e", "\x00"} & set(page.text)


def test_what_a_template_says_itself_is_left_as_it_is() -> None:
    template = environment().from_string("{% macro m(x) %}<b>{{ x }}</b>\n{% endmacro %}{{ m('a\n<') }}{{ 3 }}")
    assert template.render() == "<b>a\\n&lt;</b>\n3"


def test_without_categories_there_is_a_page(store: Store, tmp_path: Path) -> None:
    page = made(store, tmp_path)
    assert page.open == []
    assert "No category was judged." in page.text
    assert rows_of(tmp_path) == []


def test_the_task_writes_the_same_page(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    judged = judge(store, facts, [])
    made(store, tmp_path, judged)
    path = data_report.fn(store.url, str(tmp_path / "task"), [judged])
    assert path == str(tmp_path / "task" / "data.html")
    assert Path(path).read_bytes() == (tmp_path / "out" / "data.html").read_bytes()


# verdicts and counts


def test_verdict_is_one_plain_sentence(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    found = [finding(facts[0], "not_constant", "reject", "one value"), finding(None, "published_counts", "warn", "no")]
    found += [finding(row, "usual_contrast", "warn", "flat") for row in facts[1:3]]
    aside = [{"path": "grid/x.png", "reason": "stray"}]
    clean = judge(store, facts, [], category="clean")
    some = judge(store, facts, found, category="some", set_aside=aside)
    stopped = judge(store, facts, [finding(None, "not_empty", "stop", "none")], category="stopped", stop="no image")
    lost = judge(store, facts, [], category="lost")
    store.delete(f"{lost.verdict}/manifest.json")
    page = made(store, tmp_path, clean, some, stopped, lost)
    assert "clean✓Usable: all 11 images are accepted without a remark." in page.text
    expected = "10 of 11 images accepted, 1 set aside (rules: not constant 1), "
    expected += "2 accepted with a remark (rules: usual contrast 2), "
    expected += "1 remark on the category as a whole, 1 file left out by the reader."
    assert f"some!Usable with remarks: {expected}" in page.text
    assert "stopped✕Stopped: no image" in page.text
    assert "lost?Not judged: no verdict is stored" in page.text
    assert "1 usable, 1 usable with remarks, 1 stopped, 1 not judged" in page.text


def test_counts_stand_beside_the_published_ones(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    found = [finding(facts[-1], "mask_size", "reject", "larger"), finding(facts[0], "usual_size", "warn", "smaller")]
    rows = made(store, tmp_path, judge(store, facts, found)).rows
    assert ["Split", "Defect type", "Listed", "Published", "Accepted", "Set aside", "With a remark"] in rows
    assert ["train", "good", "6", "264 (differs)", "6", "0", "1"] in rows
    assert ["test", "good", "2", "21 (differs)", "2", "0", "0"] in rows
    assert ["test", "bent", "3", "– not published", "2", "1", "0"] in rows
    assert ["test", "all defect types", "3", "57 (differs)", "2", "1", "0"] in rows
    assert "Published" not in made(store, tmp_path, judge(store, facts, found, category="own")).text


def test_published_kinds_that_are_not_there_are_shown(store: Store, tmp_path: Path) -> None:
    rows = made(store, tmp_path, judge(store, [fact("a.png")], [])).rows
    assert ["train", "good", "1", "264 (differs)", "1", "0", "0"] in rows
    assert ["test", "anomalous", "0", "57 (differs)", "0", "0", "0"] in rows


# findings


def test_a_copy_is_shown_beside_its_original(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    tile = fact("grid/train/good/000.png", key="grid/train/good/000.png[0,0,32,32]")
    facts = [*facts, tile]
    reason = f"nearly the same picture as {tile['key']} in train (3 bits of 256 differ)"
    page = made(store, tmp_path, judge(store, facts, [finding(facts[7], "near_unique_across_splits", "warn", reason)]))
    own = page.pictures["grid/test/good/001.png, test, good"]
    other = page.pictures[f"{tile['key']}, the image it is compared with"]
    assert shade(own) == pytest.approx(gray_of(7), abs=2)
    assert shade(other) == pytest.approx(gray_of(11), abs=2)


def test_suspects_are_ringed_where_they_are_unlike(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    scores = [suspect(facts[n], float(n)) for n in range(4)]
    scores += [suspect(facts[4], 8.0, 0.25, 0.5), suspect(facts[5], 12.5, 0.75, 0.5)]
    page = made(store, tmp_path, judge(store, facts, [], suspects=scores))
    (alt,) = (alt for alt in page.pictures if alt.startswith("grid/train/good/004.png") and "ring" in alt)
    assert alt.endswith("a ring at 25% from the left and 50% from the top")
    pixels = np.asarray(page.pictures[alt]).astype(int)
    coloured = np.argwhere(pixels[..., 2] - pixels[..., 0] > 60)
    assert coloured.mean(axis=0) == pytest.approx([0.5 * SIDE, 0.25 * SIDE], abs=1.5)
    assert page.text.index("12.5 robust deviations") < page.text.index("8.0 robust deviations")
    assert "2 accepted with a remark (rules: suspected defect 2)" in page.text
    kept = [(row["severity"], row["rule"], row["path"]) for row in rows_of(tmp_path)]
    assert kept == [("warn", "suspected_defect", f"grid/train/good/00{n}.png") for n in (4, 5)]


def test_suspects_in_the_verdict_are_not_told_twice(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    found = [finding(facts[0], "suspected_defect", "reject", "9.0 deviations")]
    scores = [suspect(facts[0], 9.0)]
    page = made(store, tmp_path, judge(store, facts, found, suspects=scores, severity="reject"))
    assert len(rows_of(tmp_path)) == 1
    assert any("ring" in alt for alt in page.pictures)


def test_too_few_images_to_suspect_any_is_said(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    few = made(store, tmp_path, judge(store, facts, [], suspects=[suspect(row, 0.0) for row in facts[:6]])).text
    assert "Whether a training image shows a defect is not known" in few
    enough = made(
        store, tmp_path, judge(store, facts, [], suspects=[suspect(facts[n], n - 2.0) for n in range(6)])
    ).text
    assert "No training image is suspected of showing a defect." in enough


def test_suspects_nobody_asked_to_judge_are_no_findings(
    store: Store, tmp_path: Path, facts: list[dict[str, Any]]
) -> None:
    page = made(store, tmp_path, judge(store, facts, [], suspects=[suspect(facts[0], 9.0)], severity="off"))
    assert rows_of(tmp_path) == []
    assert "Usable: all 11" in page.text


def test_long_lists_are_capped_and_the_csv_has_all(store: Store, tmp_path: Path) -> None:
    rows = [fact(f"t/{n:03}.png") for n in range(150)]
    found = [finding(row, "usual_size", "warn", "another size") for row in rows]
    aside = [{"path": f"left/{n}.png", "reason": f"reason {n % 20}"} for n in range(400)]
    page = made(store, tmp_path, judge(store, rows, found, set_aside=aside))
    assert "The first 40 of 150 as a list" in page.text
    assert "110 more are in findings.csv" in page.text
    assert "8 more are in findings.csv" in page.text  # of the 20 files of a reason, 12 are named
    assert "for 8 other reasons (160)" in page.text
    assert len(page.pictures) <= 6 + 40
    kept = rows_of(tmp_path)
    assert len(kept) == 550
    assert {row["path"] for row in kept} == {row["path"] for row in rows} | {entry["path"] for entry in aside}


def test_csv_has_no_formula(store: Store, tmp_path: Path) -> None:
    row = fact("=cmd|' /C calc'!A0")
    made(store, tmp_path, judge(store, [row], [finding(row, "readable", "reject", '@x,\n"y"')]))
    (kept,) = rows_of(tmp_path)
    assert kept["path"] == "'=cmd|' /C calc'!A0"
    assert kept["reason"] == '\'@x,\n"y"'
    assert (kept["dataset"], kept["category"], kept["severity"]) == ("mvtec_ad", "grid", "reject")


def test_unreadable_images_have_no_picture(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    facts[0] = fact(facts[0]["path"], readable=False, width=None, height=None, brightness=None)
    page = made(store, tmp_path, judge(store, facts, [finding(facts[0], "readable", "reject", "truncated")]))
    assert not any(facts[0]["path"] in alt for alt in page.pictures)
    assert "no picture" in page.text


def test_rules_and_their_severities_are_listed(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    policy = {"rules": {"mask_size": "off"}, "min_side": 16}
    page = made(store, tmp_path, judge(store, facts, [], policy=policy))
    assert ["readable", "images can be decoded", "image set aside", "met", "0"] in page.rows
    assert "min_side=16" in page.text
    assert "mask_size not asked" in page.text


# contact sheet


def test_contact_sheet_shows_accepted_images_of_each_kind(
    store: Store, tmp_path: Path, facts: list[dict[str, Any]]
) -> None:
    page = made(store, tmp_path, judge(store, facts, [finding(facts[8], "mask_size", "reject", "larger")]))
    rejected = facts[8]["path"]
    assert {row["path"] for row in facts} - {rejected} == {alt for alt in page.pictures if "," not in alt}
    assert shade(page.pictures[facts[3]["path"]]) == pytest.approx(gray_of(3), abs=2)
    assert "test, bent (2 of 2)" in page.text


def test_contact_sheet_does_not_depend_on_the_order(store: Store, tmp_path: Path) -> None:
    rows = [fact(f"t/{n:03}.png", "test", f"kind {n % 3}") for n in range(90)]
    shown = set(made(store, tmp_path, judge(store, rows, [])).pictures)
    turned = set(made(store, tmp_path, judge(store, rows[::-1], [], category="turned")).pictures)
    assert shown == turned
    assert len(shown) == 24


def test_a_page_of_many_categories_has_smaller_and_fewer_pictures(store: Store, tmp_path: Path) -> None:
    rows = [fact(f"t/{n:03}.png", "test", f"kind {n}") for n in range(15)]
    judged = [judge(store, rows, [], category=f"c{n}") for n in range(21)]
    text = made(store, tmp_path, *judged).text
    assert text.count("3 further defect types are not shown.") == 21


# distributions


def test_outliers_are_marked_with_their_names(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    found = [finding(facts[5], "usual_brightness", "reject", "bright"), finding(facts[0], "usual_size", "warn", "wide")]
    found.append(finding(facts[1], "not_constant", "reject", "one value"))
    page = made(store, tmp_path, judge(store, facts, found))
    assert page.text.count("1 pointed out") == 1
    assert "grid/train/good/005.png: 105" in page.text
    assert "Brightness of the training images: 5 images from 100 to 105, median 103; 1 marked" in page.labels


def test_areas_that_no_chart_shows_are_counted(store: Store, tmp_path: Path, facts: list[dict[str, Any]]) -> None:
    facts[8]["mask_fraction"], facts[9]["mask_fraction"] = None, 0.0
    shown = made(store, tmp_path, judge(store, facts, [])).text
    assert "anomalous images without a mask that can be read: 1; masks that mark no pixel: 1." in shown
    assert "All images that could be read have 64 x 48 px." in shown


def test_histogram_counts_every_value_once() -> None:
    values = np.random.default_rng(3).lognormal(-4, 1.5, 500)
    for log in (False, True):
        found = distribution("area", "%", values, log=log)
        assert found is not None
        assert sum(found.counts) == 500
        assert all(found.edges[0] <= at <= found.edges[-1] for at, _ in found.x_ticks)
    found = distribution("area", "%", [0.0, 0.001, 10.0, math.nan], log=True)
    assert found is not None
    assert sum(found.counts) == 2
    assert [text for _, text in found.x_ticks] == ["0.001", "0.01", "0.1", "1", "10"]


def test_histogram_of_one_value_or_none() -> None:
    found = distribution("area", "%", [7.0, 7.0])
    assert found is not None
    assert (found.edges[0], found.edges[-1], sum(found.counts)) == (6.5, 7.5, 2)
    assert distribution("area", "%", [math.nan]) is None
    assert distribution("area", "%", [0.0], log=True) is None


def test_ticks_are_round_and_inside() -> None:
    assert [text for _, text in ticks(0, 100)] == ["0", "50", "100"]
    assert [text for _, text in ticks(0.13, 0.31)] == ["0.15", "0.2", "0.25", "0.3"]
    assert [at for at, _ in ticks(97, 203)] == [100, 150, 200]


def test_many_sizes_are_drawn_as_a_grid() -> None:
    rng = np.random.default_rng(5)
    widths, heights = rng.integers(100, 900, 2000), rng.integers(100, 900, 2000)
    found = sizes(widths, heights)
    assert found is not None
    assert found.distinct == len(set(zip(widths.tolist(), heights.tolist(), strict=True)))
    assert len(found.bubbles) <= 400
    assert sum(int(bubble.title.rsplit(": ")[1]) for bubble in found.bubbles) == 2000
    few = sizes([10, 10, 20], [30, 30, 40])
    assert few is not None
    assert few.common == [("10 x 30", 2), ("20 x 40", 1)]
    assert sizes([], []) is None


# what the store has lost


@pytest.mark.parametrize("lost", ["images", "verdicts", "catalogues", "suspects"])
def test_a_lost_output_becomes_a_sentence(store: Store, tmp_path: Path, facts: list[dict[str, Any]], lost: str) -> None:
    judged = judge(store, facts, [], suspects=[suspect(facts[0], 1.0)])
    store.delete(lost)
    page = made(store, tmp_path, judged)
    assert page.open == []
    assert "is not in the store; run the step that makes it" in page.text
    assert "Usable: all" not in page.text


@pytest.mark.parametrize("name", ["facts.parquet", "findings.parquet", "suspects.parquet", "/c/"])
def test_a_damaged_output_becomes_a_sentence(
    store: Store, tmp_path: Path, facts: list[dict[str, Any]], name: str
) -> None:
    judged = judge(store, facts, [], suspects=[suspect(facts[0], 1.0)])
    damaged = [key for key in store.list("") if name in key]
    assert damaged
    for key in damaged:
        store.write_bytes(key, b"damaged")
    page = made(store, tmp_path, judged)
    assert page.open == []
    assert "could not be read" in page.text


# the real steps


def test_a_data_set_goes_from_its_files_to_the_page(store: Store, tmp_path: Path) -> None:
    root, rng = tmp_path / "data", np.random.default_rng(11)

    def write(path: str, pixels: np.ndarray) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / path)

    for n in range(4):
        write(f"grid/train/good/{n}.png", rng.integers(0, 255, (24, 32)))
    write("grid/test/good/0.png", rng.integers(0, 255, (24, 32)))
    write("grid/test/bent/0.png", rng.integers(0, 255, (24, 32)))
    write("grid/train/good/9.png", np.full((24, 32), 7))
    (root / "grid/train/good/<i>8.png").write_bytes(b"no image")
    (root / "grid/train/good/copy.png").write_bytes((root / "grid/test/good/0.png").read_bytes())
    write("grid/ground_truth/none/0.png", np.zeros((24, 32)))
    write("wood/train/good/0.png", np.zeros((24, 32)))
    judged = []
    for category in ingest.fn(store.url, "mvtec_ad", str(root)).categories:
        prepared = prepare.fn(category, 16)
        if category.category == "wood":
            with pytest.raises(CategoryStopped):
                validate.fn(prepared)
        else:
            validate.fn(prepared)
        judged.append(Judged(category, prepared.images, verdict_key(prepared)))
    page = made(store, tmp_path, *judged)
    assert page.open == []
    assert set(page.tags) <= TAGS
    assert "6 of 9 images accepted, 3 set aside" in page.text
    assert "Stopped: 0 of 1 training images accepted" in page.text
    assert "grid/train/good/copy.png, train, good" in page.pictures
    assert "grid/test/good/0.png, the image it is compared with" in page.pictures
    rejected = {row["path"] for row in rows_of(tmp_path) if row["severity"] == "reject" and row["category"] == "grid"}
    assert rejected == {f"grid/train/good/{name}.png" for name in ("9", "<i>8", "copy")}
    assert "a mask, but there is no folder test/none" in page.text
