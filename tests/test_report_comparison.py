"""Which differences the report calls certain: paired, corrected for their number, and never silent about the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from al_models.metrics import Ranking, Replicates, compare, rank_methods
from al_models.metrics.bootstrap import image_replicates
from al_models.metrics.ranks import holm
from storage.records import RunRecord, read_records, write_record
from storage.store import Store
from tasks.compare import comparison
from tasks.compare.across import Across, layout, over_categories
from tasks.compare.answer import headline, listed
from tasks.compare.comparison import BETTER, EQUAL, UNKNOWN, WORSE, Contest, Difference, contest, overall
from tasks.compare.tables import DECIDING, ranking
from tasks.compare.variants import Variant, variants_of
from tasks.evaluate.uncertainty import write_replicates
from tasks.report.benchmark.report import report
from tasks.report.page import environment

GRID = ("mvtec_ad", "grid")
ROOM = 5.2
"""No narrower than a letter of the diagram is on average, in units of the picture."""


def record(method: str, category: str = "grid", seed: int = 0, **changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "dataset": "mvtec_ad",
        "category": category,
        "method": method,
        "params": {},
        "seed": seed,
        "cell": f"{method}-{category}-{seed}",
        "status": "done",
        "seconds": {"fit": 1.0},
    }
    return RunRecord(**{**values, **changes})


def failed(method: str, category: str = "grid") -> RunRecord:
    return record(method, category, status="failed", reason="fit: no memory")


def judged(shift: float, noise: int, images: str = "image", n: int = 40) -> Replicates:
    """Image AUROC of scores that lie `shift` deviations apart; half of the noise is that of every method."""
    shared, own = np.random.default_rng(0).normal(size=n), np.random.default_rng(noise + 1).normal(size=n)
    labels = np.arange(n) >= n // 4
    ids = [f"{images}-{place}" for place in range(n)]
    return image_replicates(ids, shared + 0.3 * own + shift * labels, labels, n=100)["image_auroc"]


class Sweep:
    """Records with the replicates that their cells left; every metric has those of image AUROC."""

    def __init__(self) -> None:
        self.records: list[RunRecord] = []
        self.kept: dict[str, dict[str, Replicates] | str] = {}

    def add(self, found: Replicates | str, method: str, category: str = "grid", seed: int = 0, **kept: float) -> None:
        value = {"pro": kept.get("pro", 0.5 if isinstance(found, str) else found.estimate)}
        one = record(method, category, seed, metrics=value)
        self.records.append(one)
        self.kept[one.cell] = found if isinstance(found, str) else {"pro": found}

    def variants(self) -> list[Variant]:
        return variants_of(self.records)

    def contest(self) -> Contest:
        found = contest(self.variants(), GRID, "pro", self.kept)
        assert found is not None
        return found

    def headline(self) -> tuple[str, list[str]]:
        found = ranking(self.records)
        return headline(found, overall(found, self.kept))


# --- Holm ---


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, no less than that
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_p_values_are_corrected_for_the_comparisons_of_one_metric_in_one_category() -> None:
    sweep = Sweep()
    for place in range(4):
        sweep.add(judged(2.0 - 0.4 * place, place), f"m{place}")
    found = sweep.contest()
    assert found.best == "m0"
    raw = [compare(judged(2.0, 0), judged(2.0 - 0.4 * place, place)).p_value or 0.0 for place in (1, 2, 3)]
    corrected = dict(zip(("m1", "m2", "m3"), holm(raw), strict=True))
    assert {one.name: one.p_value for one in found.against} == pytest.approx(corrected)
    assert {one.name: one.words for one in found.against} == {
        name: BETTER if p < 0.05 else EQUAL for name, p in corrected.items()
    }
    assert {BETTER, EQUAL} == {one.words for one in found.against}  # else this would show nothing


# --- contests ---


def test_a_difference_is_that_of_the_paired_replicates() -> None:
    sweep, best, other = Sweep(), judged(2.0, 0), judged(0.7, 1)
    sweep.add(best, "best")
    sweep.add(other, "other")
    (one,) = sweep.contest().against
    expected = compare(best, other)
    assert (one.points, one.low, one.high) == (expected.difference, expected.low, expected.high)
    assert one.points == pytest.approx(best.estimate - other.estimate)
    assert one.words == BETTER


def test_seeds_are_averaged_replicate_by_replicate() -> None:
    sweep, seeds, other = Sweep(), [judged(2.0, place) for place in range(3)], judged(1.0, 9)
    for seed, one in enumerate(seeds):
        sweep.add(one, "best", seed=seed)
    sweep.add(other, "other")
    mean = Replicates(
        float(np.mean([one.estimate for one in seeds])), np.mean([one.values for one in seeds], axis=0), other.images
    )
    (found,) = sweep.contest().against
    assert (found.points, found.low) == pytest.approx((compare(mean, other).difference, compare(mean, other).low))


def test_methods_judged_on_other_images_are_named_not_compared() -> None:
    sweep = Sweep()
    sweep.add(judged(1.0, 0), "a")
    sweep.add(judged(0.5, 1), "b")
    sweep.add(judged(9.0, 2, images="others"), "c")  # the highest figure, but on images that only it has seen
    found = sweep.contest()
    assert found.best == "a"
    assert found.named(UNKNOWN) == ["c"]
    assert [one.note for one in found.against if one.name == "c"] == ["it was judged on different images"]


def test_a_method_whose_seeds_saw_different_images_is_named() -> None:
    sweep = Sweep()
    sweep.add(judged(1.0, 0), "a")
    sweep.add(judged(0.5, 1), "b")
    sweep.add(judged(0.5, 1, images="others"), "b", seed=1)
    (one,) = sweep.contest().against
    assert (one.words, one.note) == (UNKNOWN, "its seeds were judged on different images")


def test_what_failed_or_left_nothing_is_named_with_its_reason() -> None:
    sweep = Sweep()
    sweep.add(judged(1.0, 0), "a")
    sweep.add("its replicates could not be read (broken)", "b")
    sweep.add(judged(0.5, 1), "c")
    sweep.kept["c-grid-0"] = {}
    sweep.records.append(failed("d"))
    notes = {one.name: (one.words, one.note) for one in sweep.contest().against}
    assert notes == {
        "b": (UNKNOWN, "its replicates could not be read (broken)"),
        "c": (UNKNOWN, "it left no replicates of this metric; run it again"),
        "d": (UNKNOWN, "it failed"),
    }


def test_without_replicates_there_is_no_best_one_but_all_are_named() -> None:
    sweep = Sweep()
    sweep.add("nothing", "a", pro=0.9)
    sweep.add("nothing", "b", pro=0.8)
    found = sweep.contest()
    assert found.best is None
    assert [(one.name, one.value) for one in found.against] == [("a", 0.9), ("b", 0.8)]
    assert contest(sweep.variants(), GRID, "image_auroc", sweep.kept) is None


def test_methods_that_agree_in_every_replicate_cannot_be_told_apart() -> None:
    sweep = Sweep()
    sweep.add(judged(99.0, 0), "a")
    sweep.add(judged(99.0, 1), "b")  # both perfect
    (one,) = sweep.contest().against
    assert (one.words, one.points, one.low, one.p_value) == (EQUAL, 0.0, None, 1.0)
    assert one.note is not None


def test_the_overview_counts_who_cannot_be_told_apart() -> None:
    def one(*words: str) -> list[Contest]:
        return [Contest("pro", "a", 0.9, [Difference(str(place), 0.8, word) for place, word in enumerate(words)])]

    only = comparison.overview({GRID: one(BETTER, EQUAL, UNKNOWN)})
    assert only == ["PRO: a is better than 1 of 3; 1 cannot be told apart from it; 1 not comparable."]
    several = {("d", "x"): one(BETTER, BETTER), ("d", "y"): one(EQUAL, EQUAL), ("d", "z"): one(EQUAL, UNKNOWN)}
    (line,) = comparison.overview(several)
    assert "in 1 of 3 categories the best method is better than each other one" in line
    assert "in 2 of them 1 to 2 cannot be told apart from the best" in line
    assert "1 comparisons could not be made" in line


# --- the answer ---


def test_the_answer_names_whom_the_first_cannot_be_told_apart_from() -> None:
    sweep = Sweep()
    sweep.add(judged(1.0, 0), "a")
    sweep.add(judged(0.8, 1), "b")
    answer, support = sweep.headline()
    assert answer == "First on this data: a; b cannot be told apart from a in PRO."
    assert "Best" not in answer
    (line,) = [line for line in support if "cannot be told apart" in line]
    expected = compare(judged(1.0, 0), judged(0.8, 1))
    assert f"{100 * (expected.low or 0):+.1f} to {100 * (expected.high or 0):+.1f} points of PRO" in line
    assert "Holm" not in line  # a single comparison


def test_the_answer_calls_best_what_beats_each_other() -> None:
    sweep = Sweep()
    for place, shift in enumerate((2.0, 0.5, 0.3)):
        sweep.add(judged(shift, place), f"m{place}")
    answer, support = sweep.headline()
    assert answer == "Best on this data: m0."
    assert any("m0 beats m1 by more than chance" in line and "Holm" in line for line in support)
    assert any(line.endswith("compared with it on the same images: 2 worse.") for line in support)


def test_the_answer_says_when_nothing_is_known() -> None:
    sweep = Sweep()
    sweep.add(judged(1.0, 0), "a")
    sweep.add("it left no replicates", "b")
    sweep.records.append(failed("c"))
    answer, support = sweep.headline()
    assert answer == "Best on this data: a."
    assert "Whether a and b differ by more than chance is not known: it left no replicates." in support
    assert any("2 not comparable" in line for line in support)


def test_over_categories_the_mean_of_the_replicates_decides() -> None:
    sweep = Sweep()
    pairs = [(judged(1.1, place, images=name), judged(0.9, 7 + place, images=name)) for place, name in enumerate("xyz")]
    for (first, second), category in zip(pairs, "xyz", strict=True):
        sweep.add(first, "a", category)
        sweep.add(second, "b", category)
    found = overall(ranking(sweep.records), sweep.kept)
    assert found is not None
    (one,) = found.against
    spread = np.std(np.mean([first.values - second.values for first, second in pairs], axis=0), ddof=1)
    points = np.mean([first.estimate - second.estimate for first, second in pairs])
    assert one.points == pytest.approx(points)
    assert one.high - one.low == pytest.approx(2 * 1.959964 * spread, rel=1e-4)  # type: ignore[operator]


def test_a_method_that_places_first_with_the_lower_mean_is_not_called_best() -> None:
    sweep = Sweep()
    for category in "xyz":
        low, high = judged(1.0, 0, images=category), judged(1.1, 1, images=category)
        sweep.add(high if category != "z" else judged(-1.0, 0, images=category), "a", category)
        sweep.add(low if category != "z" else judged(3.0, 1, images=category), "b", category)
    answer, support = sweep.headline()
    assert answer == "First on this data: a; b has the higher mean PRO but a lower place."
    assert any("b is the better of the two in the mean" in line for line in support)
    found = overall(ranking(sweep.records), sweep.kept)
    assert found is not None
    assert found.named(WORSE) == ["b"]


def test_many_names_are_cut() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdefg")) == "a, b, c, d and 3 more"


# --- over the categories ---


def table(values: dict[str, Sequence[float | None]]) -> list[RunRecord]:
    """A row a method, a column a category; None failed."""
    return [
        failed(method, f"c{place}") if value is None else record(method, f"c{place}", metrics={"pro": value})
        for method, row in values.items()
        for place, value in enumerate(row)
    ]


def ranked(values: dict[str, Sequence[float | None]]) -> Across | None:
    records = table(values)
    return over_categories(variants_of(records), ranking(records).columns, "pro")


def test_ranks_are_those_of_the_metric_in_each_category() -> None:
    found = ranked({"a": [0.9, 0.8, 0.7], "b": [0.8, 0.9, 0.6], "c": [0.1, 0.2, 0.3]})
    assert found is not None
    assert found.ranking.methods == ("a", "b", "c")
    assert found.ranking.average_ranks == pytest.approx((4 / 3, 5 / 3, 3.0))
    assert found.diagram is not None


def test_a_failed_category_is_left_out_and_a_method_without_any_value_too() -> None:
    found = ranked({"a": [0.9, 0.8, 0.7], "b": [0.8, None, 0.6], "c": [0.1, 0.2, 0.3], "d": [None, None, None]})
    assert found is not None
    assert (found.ranking.n_rows, found.ranking.n_left_out, found.left_out) == (2, 1, ["d"])


def test_where_failures_leave_too_few_categories_the_whole_methods_are_ranked() -> None:
    found = ranked({"a": [0.9, 0.8], "b": [0.8, 0.7], "c": [0.1, 0.2], "d": [0.5, None]})
    assert found is not None
    assert (found.ranking.methods, found.ranking.n_rows, found.left_out) == (("a", "b", "c"), 2, ["d"])
    found = ranked({"a": [0.9, 0.8], "b": [0.8, 0.7], "d": [0.5, None]})  # two are no test either
    assert found is not None
    assert found.diagram is None
    assert found.ranking.reason is not None


def test_one_category_has_no_ranks_over_categories() -> None:
    assert ranked({"a": [0.9], "b": [0.8], "c": [0.7]}) is None
    assert over_categories([], [], "pro") is None


# --- the diagram ---


def many(count: int, rows: int = 15, letters: int = 12) -> Ranking:
    rng = np.random.default_rng(count)
    values = rng.normal(size=(rows, count)) - np.linspace(0, 4, count)
    return rank_methods(values, [f"{'x' * letters}{place:03d}" for place in range(count)])


@pytest.mark.parametrize(("count", "letters"), [(4, 3), (30, 12), (50, 12), (30, 70)])
def test_names_of_a_diagram_never_overlap(count: int, letters: int) -> None:
    found = layout(many(count, letters=letters))
    svg = str(environment().get_template("charts.html.j2").module.critical_difference(found, "PRO"))  # type: ignore[attr-defined]
    names = re.findall(r'class="method" text-anchor="(\w+)" x="([\d.]+)" y="([\d.]+)">([^<]+)<title>([^<]+)', svg)
    assert len({title for *_, title in names}) == count
    width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    for anchor in ("end", "start"):
        side = sorted(float(y) for a, _, y, *_ in names if a == anchor)
        assert min(np.diff(side)) >= 13  # letters are 11 high
        assert 0 < side[0] < side[-1] <= height - 3
    for anchor, x, _, text, _ in names:
        room = float(x) if anchor == "end" else width - float(x)
        assert len(text) * ROOM <= room
        assert (float(x) < found.start) == (anchor == "end")


@pytest.mark.parametrize("count", [4, 30, 50])
def test_lines_and_bars_of_a_diagram_do_not_cross_or_touch(count: int) -> None:
    found = layout(many(count))
    lowest_bar = max((y for *_, y in found.bars), default=0.0)
    assert min(name.y for name in found.names) > lowest_bar + 3
    for a in found.names:  # the level part of a line meets no upright one that reaches below it
        for b in found.names:
            low, high = sorted((a.at, a.x))
            assert not (low < b.at < high and b.y > a.y), (a, b)
    for x0, x1, y in found.bars:
        assert sum(other_y == y and other_x0 < x1 and x0 < other_x1 for other_x0, other_x1, other_y in found.bars) == 1


def test_bars_and_ruler_are_to_scale() -> None:
    values = many(20)
    found = layout(values)
    unit = (found.end - found.start) / 19
    at = {name.title: name.at for name in found.names}
    for name, rank in zip(values.methods, values.average_ranks, strict=True):
        assert at[name] == pytest.approx(found.start + (rank - 1) * unit)
    assert values.critical_difference is not None
    assert found.ruler[1] - found.ruler[0] == pytest.approx(values.critical_difference * unit)
    assert f"{values.critical_difference:.2f}" in found.ruler[2]
    groups = sorted((at[group[0]] - 3, at[group[-1]] + 3) for group in values.groups or ())
    assert np.ravel(sorted(bar[:2] for bar in found.bars)) == pytest.approx(np.ravel(groups))
    assert len(groups) > 2


@pytest.mark.parametrize(("count", "rows"), [(3, 2), (10, 2), (50, 2)])
def test_a_ruler_longer_than_the_axis_stays_in_the_picture(count: int, rows: int) -> None:
    found = layout(many(count, rows, letters=1))
    assert found.end < found.ruler[1] < found.width


def test_ticks_are_whole_and_few() -> None:
    for count in (3, 4, 13, 14, 30, 50, 101):
        ticks = [int(text) for _, text in layout(many(count)).ticks]
        assert (ticks[0], ticks[-1]) == (1, count)
        assert len(ticks) <= 14
        assert min(np.diff(ticks)) >= math.ceil((count - 1) / 26)


# --- the page ---


def stored(store: Store, method: str, category: str, found: Replicates) -> None:
    key = f"evaluations/{category}/{method}"
    with store.draft(key) as draft:
        write_replicates(store, draft, {metric: found for metric in DECIDING})
        draft.commit({"ids": []})
    metrics = dict.fromkeys(DECIDING, found.estimate)
    write_record(store, record(method, category, metrics=metrics, keys={"evaluation": key}))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three methods on two categories; the third is far worse than the others."""
    store = Store(str(tmp_path / "store"))
    for category in ("grid", "wood"):
        for place, shift in enumerate((1.0, 0.8, -1.0)):
            stored(store, f"m{place}", category, judged(shift, place, images=category))
    return store


def page(store: Store, tmp_path: Path) -> str:
    return Path(report.fn(store.url, str(tmp_path / "out"))).read_text(encoding="utf-8")


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def section(text: str) -> str:
    return text[text.index('id="differences"') : text.index('id="thresholds"')]


def test_the_page_shows_the_differences_of_the_replicates(store: Store, tmp_path: Path) -> None:
    text = page(store, tmp_path)
    assert "First on this data: m0; m1 cannot be told apart from m0 in PRO." in text
    found = section(text)
    assert found.count("<details") == 2
    assert "PRO: m0, 1 of 2 cannot be told apart" in words(found)
    expected = compare(judged(1.0, 0, images="grid"), judged(-1.0, 2, images="grid"))
    row = f"m2 {100 * judged(-1.0, 2, images='grid').estimate:.1f} {100 * expected.difference:+.1f} "
    row += f"{100 * expected.low:+.1f} to {100 * expected.high:+.1f} <0.001 m0 is better"  # type: ignore[operator]
    assert row in words(found).replace("&lt;", "<")
    assert found.count('<figure class="ranks">') == 3
    assert "PRO: 3 methods over 2 categories" in found
    markdown = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| grid | PRO | m0 | m2 | m1 | – |" in markdown


def test_lost_and_damaged_replicates_become_sentences(store: Store, tmp_path: Path) -> None:
    place = "evaluations/grid/m1"
    store.write_bytes(f"{store.get(place).folder}/replicates.parquet", b"no parquet")
    for key in list(store.list("evaluations/grid/m2")):
        store.delete(key)
    found = words(section(page(store, tmp_path)))
    assert "not comparable: its replicates could not be read" in found
    assert "not comparable: it left no replicates, as cells of earlier versions; run it again" in found
    assert "2 comparisons could not be made" in found


def test_two_methods_are_told_why_there_is_no_test_over_categories(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for category in ("grid", "wood"):
        for place in range(2):
            stored(store, f"m{place}", category, judged(1.0 - 0.5 * place, place, images=category))
    found = words(section(page(store, tmp_path)))
    assert "PRO: no test, because there are 2 methods and Friedman" in found
    assert "Average ranks over 2 categories: m0 1.00, m1 2.00." in found


def test_one_method_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for category in ("grid", "wood"):
        stored(store, "m0", category, judged(1.0, 0, images=category))
    found = section(page(store, tmp_path))
    assert "Nothing to compare: no category has two methods." in found
    assert "Over all categories" not in found


def test_many_categories_are_folded(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    for category in ("grid", "wood", "tile"):
        for place in range(2):
            stored(store, f"m{place}", category, judged(1.0 - place, place, images=category))
    found = section(page(store, tmp_path))
    assert found.count("<details>") == 3
    assert len(list(read_records(store))) == 6
