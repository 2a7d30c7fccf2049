"""Search: what is tried, who goes on, what is held out, and a whole search on small images."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import Command, ask
from hypothesis import given
from PIL import Image
from sweep_runs import manifests, record_files, run_file

from al_models.parts.images import decode
from al_models.registry import create
from flows.runs.runfile import MethodRun, RunFile, read_run_file, to_toml
from flows.runs.search import SearchRun
from flows.search import SearchOutcome, search
from flows.where.runners import runner_for
from storage.errors import DatasetError
from storage.records import RunRecord, read_records
from storage.samples import Sample, content_hash, sample_id
from storage.store import Store
from tasks.core.handles import Cell, Validated
from tasks.core.policy import Policy
from tasks.core.stored import accepted_samples
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.search.hold_out import KINDS, RULES, Reader, hold_out, split_of
from tasks.search.trials import Interval, Rung, Score, Trial, distinct, draws, grid, ladder, score, survivors, winner
from tasks.validate import validate

# Prefect leaves sockets and loops to the garbage collector when a client ends.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

sizes, etas, seeds = st.integers(1, 300), st.integers(2, 6), st.integers(0, 2**31)
SPACE = {"a": Interval(1, 9), "b": Interval(1e-4, 0.1, log=True), "c": ["x", "y"], "d": Interval(2, 500, log=True)}


def trial(number: int) -> Trial:
    return Trial(number, "padim", {"channels": number})


# who goes on


@given(sizes, etas)
def test_each_rung_has_a_share_of_the_last_and_the_last_has_all_of_the_resource(trials: int, eta: int) -> None:
    rungs = ladder(trials, eta)
    assert [rung.number for rung in rungs] == list(range(len(rungs)))
    assert rungs[0].trials == trials
    assert rungs[-1].share == 1
    assert rungs[-1].trials <= eta
    for one, following in pairwise(rungs):
        assert one.trials > eta
        assert following.trials == math.ceil(one.trials / eta)
        assert following.share == pytest.approx(one.share * eta)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), etas, st.randoms(use_true_random=False))
def test_the_best_is_chosen_where_every_rung_ranks_alike(figures: list[float], eta: int, random: Any) -> None:
    alive, found = [trial(number) for number in range(len(figures))], list[Score]()
    for rung in ladder(len(figures), eta):
        alive = survivors(found[-len(alive) :], rung.trials) if rung.number else alive
        assert len(alive) == rung.trials
        scores = [Score(each, rung, figures[each.number] * rung.share, None) for each in alive]
        random.shuffle(scores)  # as cells end
        found += scores
    best = winner(found)
    assert best is not None
    assert best.trial.number == figures.index(max(figures))  # of equals, the one named first


def test_a_failed_trial_stands_last_with_its_reason_and_does_not_go_on() -> None:
    rung = Rung(0, 3, 1.0)
    done = RunRecord("folder", "d.c", "padim", {}, 0, "x", "done", metrics={"pro": 0.1})
    failed = replace(done, status="failed", reason="fit: no memory", metrics={}, seed=1)
    scores = [
        score(trial(0), rung, [done, failed], "pro"),
        score(trial(1), rung, [done, replace(done, seed=1)], "aupimo"),
        score(trial(2), rung, [done, replace(done, seed=1)], "pro"),
    ]
    assert scores[0].failed == ("d.c seed 1: fit: no memory",)
    assert scores[1].failed == ("d.c seed 0: has no aupimo", "d.c seed 1: has no aupimo")
    assert survivors(scores, 3) == [trial(2)]
    assert winner(scores) == scores[2]
    assert winner(scores[:2]) is None
    assert winner([replace(scores[2], rung=Rung(0, 3, 0.5))]) is None, "never with the whole resource"


def test_categories_weigh_the_same_however_many_seeds_they_have() -> None:
    figures = {("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.9}
    records = [
        RunRecord("folder", category, "padim", {}, seed, "x", "done", metrics={"pro": value})
        for (category, seed), value in figures.items()
    ]
    found = score(trial(0), Rung(0, 1, 1.0), records, "pro")
    assert found.mean == pytest.approx((0.3 + 0.9) / 2)
    assert found.spread == pytest.approx(np.std([0.2, 0.4], ddof=1))


# what is tried


@given(seeds, st.integers(0, 40), st.integers(0, 40))
def test_draws_depend_on_the_seed_alone_and_more_of_them_begin_the_same(seed: int, few: int, more: int) -> None:
    found = [list(islice(draws(SPACE, seed), count)) for count in (few, few + more)]
    assert found[0] == found[1][:few]
    for params in found[1]:
        assert type(params["a"]) is int
        assert 1 <= params["a"] <= 9
        assert 1e-4 <= params["b"] <= 0.1
        assert params["c"] in ("x", "y")
        assert type(params["d"]) is int
        assert 2 <= params["d"] <= 500


def test_a_logarithmic_range_visits_every_order_of_magnitude() -> None:
    orders = [math.floor(math.log10(params["b"])) for params in islice(draws(SPACE, 0), 300)]
    assert all(orders.count(order) > 60 for order in (-4, -3, -2))


def test_what_can_be_drawn_runs_out_instead_of_repeating_itself() -> None:
    found = distinct(draws({"c": ["x", "y"]}, 0), str, 5)
    assert sorted(params["c"] for params in found) == ["x", "y"]


def test_a_grid_is_every_combination_and_equal_trials_are_tried_once() -> None:
    assert list(grid({"a": [1, 2], "b": ["x"]})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    usual = create("padim").params()["channels"]
    trials = SearchRun(method="padim", params={"channels": [5, usual, 5]}, fixed={"sigma": 2.0}).all_trials()
    assert [each.params for each in trials] == [{"sigma": 2.0, "channels": 5}, {"sigma": 2.0, "channels": usual}]


def test_a_parameter_as_the_resource_grows_to_its_full_value() -> None:
    run = SearchRun(method="dfr", params={"latent": [2, 4, 8, 16]}, fixed={"epochs": 30}, resource="epochs")
    given = [run.at(run.all_trials()[0], rung) for rung in run.ladder()]
    assert [method.params for method in given] == [{"epochs": 10, "latent": 2}, {"epochs": 30, "latent": 2}]
    assert [run.image_share(rung) for rung in run.ladder()] == [1, 1]
    images = run.model_copy(update={"resource": "images"})
    assert [images.image_share(rung) for rung in images.ladder()] == [pytest.approx(1 / 3), 1]


def test_only_a_share_of_the_images_renames_a_cell() -> None:
    cell = Cell("d", "c", "padim", {"channels": 3})
    assert cell.id == "50376c8fd4e8c8c3", "records of earlier versions keep their names"
    assert replace(cell, train_share=0.5).id != cell.id


# what is held out


def samples_of(parts: list[str]) -> list[Sample]:
    found = [
        Sample(f"{row:032x}", f"{row}.png", "d", "c", "train", "good", "good", part=part or None)
        for row, part in enumerate(parts)
    ]
    test = Sample("f" * 32, "t.png", "d", "c", "test", "good", "good")
    return [*found, test, replace(test, id="e" * 32, path="v.png", split="validation")]


@given(
    st.lists(st.sampled_from(["", *"abcdefgh"]), min_size=4, max_size=60),
    st.floats(0.01, 0.99),
    seeds,
    st.randoms(use_true_random=False),
)
def test_every_training_image_has_one_place_and_no_test_image_has_any(
    parts: list[str], share: float, seed: int, random: Any
) -> None:
    samples = samples_of(parts)
    split = split_of(samples, share, seed)
    names = split.as_names()
    assert names["calibration"] == ["e" * 32]
    assert sorted(names["learned"] + names["good"] + names["defective"]) == [s.id for s in samples[: len(parts)]]
    assert len(names["learned"]) >= 2
    assert 0 <= len(names["defective"]) - len(names["good"]) <= 1
    assert names["good"]
    random.shuffle(samples)
    assert split_of(samples, share, seed) == split


def test_images_of_one_part_are_held_out_together() -> None:
    split = split_of(samples_of([*"aabbccddeeffgghh"]), 0.25, 0)
    held_out = {sample.part for sample in (*split.good, *split.defective)}
    assert len(held_out) == 2
    assert not held_out & {sample.part for sample in split.learned}


def test_too_few_images_are_told() -> None:
    with pytest.raises(DatasetError, match="3 good training images were accepted, a search needs at least 4"):
        split_of(samples_of(["", "", ""]), 0.25, 0)


@pytest.fixture(scope="module")
def brick(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Validated:
    """A category of the demo, judged."""
    return judged(tmp_path_factory.mktemp("brick"), "mvtec_ad", demo_root, "brick")


def judged(folder: Path, dataset: str, root: Path, category: str, policy: Policy | None = None) -> Validated:
    store = Store(str(folder / "store"))
    store.check_format()
    (found,) = ingest.fn(store.url, dataset, str(root), [category]).categories
    return validate.fn(prepare.fn(found, 64), policy or Policy())


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): content_hash(path.read_bytes())
        for path in folder.rglob("*.*")
        if path.is_file()
    }


def pixels(path: Path) -> np.ndarray:
    return decode(path.read_bytes()).pixels


def test_no_test_image_is_held_out_and_nothing_changes_outside_of_a_mask(
    brick: Validated, demo_root: Path, tmp_path: Path
) -> None:
    root = Path(hold_out.fn(brick, str(tmp_path), 0.7, 1))
    files = contents(root / "mvtec_ad.brick")
    judged = {content_hash(path.read_bytes()) for path in (demo_root / "brick" / "test").rglob("*.png")}
    assert judged
    assert not judged & set(files.values())
    training = {content_hash(path.read_bytes()): path for path in (demo_root / "brick/train/good").iterdir()}
    assert sum(name.startswith("train/good/") for name in files) == len(training) - 4
    assert sum(name.startswith("test/good/") for name in files) == 2
    masks = [name for name in files if name.startswith("ground_truth/")]
    assert len(masks) == 2
    for name in masks:
        _, kind, file = name.split("/")
        assert kind in KINDS
        mask = pixels(root / "mvtec_ad.brick" / name) > 0
        image = pixels(root / "mvtec_ad.brick" / "test" / kind / file.replace("_mask", ""))
        changed = (image != pixels(training[file.removesuffix("_mask.png")])).any(axis=2)
        assert not (changed & ~mask).any()
        assert changed.sum() > 0.8 * mask.sum()  # a pixel may have the colour that it gets


def test_what_was_held_out_is_found_again_and_half_of_it_is_made_anew(brick: Validated, tmp_path: Path) -> None:
    root = Path(hold_out.fn(brick, str(tmp_path), 0.5, 0))
    before, when = contents(root), (root / "split.json").stat().st_mtime_ns
    assert hold_out.fn(brick, str(tmp_path), 0.5, 0) == str(root)
    assert (root / "split.json").stat().st_mtime_ns == when
    next(root.rglob("*_mask.png")).unlink()
    assert hold_out.fn(brick, str(tmp_path), 0.5, 0) == str(root)
    assert contents(root) == before
    shutil.rmtree(root)
    assert hold_out.fn(brick, str(tmp_path), 0.5, 0) == str(root)
    assert contents(root) == before
    assert hold_out.fn(brick, str(tmp_path), 0.5, 1) != str(root)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_gray_images_of_16_bits_stay_gray_and_are_all_judged(tmp_path: Path) -> None:
    good = tmp_path / "data" / "part" / "train" / "good"
    good.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 2**16, (48, 40), dtype=np.uint16)).save(good / f"{number}.png")
    root = hold_out.fn(judged(tmp_path, "folder", tmp_path / "data", "part"), str(tmp_path / "held"), 0.5, 0)
    (drawn,) = {path for path in Path(root).glob("folder.part/test/*/*.png") if path.parent.name == "cut_paste"}
    found = decode(drawn.read_bytes())
    assert (found.mode, found.bit_depth, found.width, found.height) == ("L", 8, 40, 48)
    accepted = accepted_samples(judged(tmp_path, "folder", Path(root), "folder.part", Policy(rules=dict(RULES))))
    assert len(accepted) == 8


def test_a_box_of_a_file_is_cut_out(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    name = sample_id(content_hash((tmp_path / "a.png").read_bytes()), "10,5,50,40")
    sample = Sample(name, "a.png", "d", "c", "train", "good", "good", box="10,5,50,40")
    file, data = Reader(tmp_path).unchanged(sample)
    assert file == f"{name}.png"
    cut = pixels[5:45, 10:60]
    assert np.array_equal(decode(data).pixels, cut)
    image, mask = Reader(tmp_path).with_defect(sample, KINDS["stain"], 0)
    assert np.array_equal(image[~mask], cut[~mask])
    small = replace(sample, box="0,0,20,20")
    small = replace(small, id=sample_id(content_hash((tmp_path / "a.png").read_bytes()), small.box))
    with pytest.raises(
        DatasetError, match=r"no synthetic defect can be drawn into a\.png\[0,0,20,20\]: .* at least 32"
    ):
        Reader(tmp_path).with_defect(small, KINDS["stain"], 0)


# bad input

PADIM = '[search]\nmethod = "padim"\n'


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "the run has no [search], so there is nothing to choose; add one, such as"),
        ('[search]\nmethod = "padin"\nparams = {channels = [1]}', "unknown method 'padin'; did you mean padim"),
        (PADIM + "params = {chanels = [1]}", "unknown option of padim 'chanels'; did you mean channels"),
        (
            PADIM + "params = {channels = [1]}\nfixed = {sigme = 1}",
            "unknown option of padim 'sigme'; did you mean sigma",
        ),
        (PADIM + "params = {}", "search.0.params: Dictionary should have at least 1 item"),
        (PADIM + "params = {channels = []}", "channels = [] was given; expected is a list of values such as [1, 2]"),
        (PADIM + "params = {channels = 3}", "channels = 3 was given; expected is a list of values such as [1, 2]"),
        (PADIM + "params = {channels = [1]}\nparms = 1", "search.0.parms: unknown key; known are eta, fixed, held_out"),
        (PADIM + "params = {channels = {low = 1, hi = 2}}", "hi: unknown key; known are high, log, low"),
        (PADIM + "params = {channels = {low = 1, high = 3}}", "a grid has no ranges, but channels is one"),
        (PADIM + "params = {channels = {low = 3, high = 1}}", "low=3 and high=1 were given; high must be above low"),
        (
            PADIM + "params = {channels = {low = 0, high = 1, log = true}}",
            "low=0 was given with log=true; give one above",
        ),
        (PADIM + 'params = {channels = [1]}\nstrategy = "random"', "needed there; say how many with trials = 9"),
        (PADIM + "params = {channels = [1]}\ntrials = 3", 'leave it out, or say strategy = "random"'),
        (PADIM + "params = {channels = [1]}\nfixed = {channels = 2}", "channels stands in params and in fixed"),
        (PADIM + 'params = {channels = [1]}\nmetric = "prow"', "unknown metric of a search 'prow'; did you mean pro"),
        (PADIM + 'params = {channels = [1]}\nresource = "epochs"', "unknown resource of padim 'epochs'; known: "),
        (PADIM + 'params = {channels = [1]}\nresource = "channels"', "channels is the resource, so it is not searched"),
        (
            '[search]\nmethod = "dfr"\nparams = {region = [1]}\nresource = "latent"',
            "the resource latent of dfr is None; expected is a number above 0",
        ),
    ],
)
def test_a_search_that_cannot_be_is_told_before_anything_starts(
    table: str, message: str, al: Command, tmp_path: Path
) -> None:
    places = f'store = "{tmp_path}/s"\nreport = "{tmp_path}/r"\n'
    (tmp_path / "run.toml").write_text(f'{places}[[data]]\ndataset = "demo"\nroot = "{tmp_path}/d"\n{table}\n')
    code, _, err = al("search", str(tmp_path / "run.toml"))
    assert code == 2
    assert message in err
    assert not (tmp_path / "s").exists()


def test_a_benchmark_says_how_to_search(al: Command, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f'[[data]]\ndataset = "demo"\nroot = "d"\n{PADIM}params = {{channels = [1]}}\n')
    code, _, err = al("benchmark", str(tmp_path / "run.toml"))
    assert code == 2
    assert "`al search RUN_FILE` chooses parameters" in err


# a whole search


@pytest.fixture(scope="module")
def run(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFile:
    """Three trials, one of which is impossible; two of them go on, and are compared with another method."""
    tried = SearchRun(
        method="patchcore",
        params={"index": ["Flat", "nonsense", "HNSW8"]},
        fixed={"image_size": 64, "coreset_ratio": 0.5},
        eta=2,
        held_out=0.5,
    )
    padim = MethodRun(name="padim", params={"image_size": 64, "channels": 5})
    return run_file(tmp_path_factory.mktemp("search") / "store", demo_root, padim).model_copy(
        update={"search": [tried], "workers": 1}
    )


def run_search(run: RunFile) -> SearchOutcome:
    state = search.with_options(task_runner=runner_for(run))(run, return_state=True)
    outcome = state.result(raise_on_failure=False)
    assert isinstance(outcome, SearchOutcome), outcome
    return outcome


@pytest.fixture(scope="module")
def ended(api: str, run: RunFile) -> SearchOutcome:
    """The search, run once."""
    return run_search(run)


def test_a_search_chooses_and_the_chosen_is_compared_on_the_test_set(ended: SearchOutcome, run: RunFile) -> None:
    (found,) = ended.searched
    assert found.chosen is not None
    assert found.chosen.params["index"] in ("Flat", "HNSW8")
    rows = list(csv.DictReader(Path(ended.table).read_text().splitlines()))
    assert [(row["trial"], row["rung"]) for row in rows] == [("0", "0"), ("1", "0"), ("2", "0"), ("0", "1"), ("2", "1")]
    assert [row["share"] for row in rows] == ["0.5"] * 3 + ["1"] * 2
    assert "faiss makes no index 'nonsense'" in rows[1]["failed"]
    (chosen,) = [row for row in rows if row["chosen"]]
    assert json.loads(chosen["params"]) == found.chosen.params
    assert float(chosen["mean"]) == max(float(row["mean"]) for row in rows[3:])
    assert list(found.rows())[-1]["failed"].startswith("mvtec_ad.brick seed 0: fit: faiss makes no index")

    assert ended.compared is not None
    assert [(record.method, record.dataset) for record in ended.compared.records] == [
        ("padim", "mvtec_ad"),
        ("patchcore", "mvtec_ad"),
    ]
    assert ended.compared.records[1].params["index"] == found.chosen.params["index"]
    assert {record.dataset for record in read_records(Store(run.store))} == {"mvtec_ad"}, "no trial among the results"
    trials = list(read_records(Store(f"{run.store}/search")))
    assert sorted(record.counts.get("train", 0) for record in trials) == [0, 2, 2, 3, 3]

    assert ended.run_file is not None
    again = read_run_file(Path(ended.run_file))
    assert again == run.model_copy(update={"search": [], "methods": [*run.methods, found.chosen]})


def test_a_second_search_computes_nothing(ended: SearchOutcome, run: RunFile, al: Command, tmp_path: Path) -> None:
    stores = [Store(run.store), Store(f"{run.store}/search")]
    before = [(manifests(store), record_files(store)) for store in stores]
    (tmp_path / "run.toml").write_text(to_toml(run))
    assert read_run_file(tmp_path / "run.toml") == run
    code, out, err = al("search", str(tmp_path / "run.toml"))
    assert code == 0, err
    assert out.count("index=") == 3
    assert "index=nonsense: mvtec_ad.brick seed 0: fit: faiss makes no index" in err
    assert f"trials: {ended.table}\nchosen: {ended.run_file}\n" in out
    assert out.endswith(f"report: {run.report}/index.html\n")

    after = [(manifests(store), record_files(store)) for store in stores]
    assert [made for made, _ in after] == [made for made, _ in before]
    for (_, records), (_, records_now) in zip(before, after, strict=True):
        tried_again = {name for name, found in records_now.items() if found != records[name]}
        assert all(b'"failed"' in records_now[name][1] for name in tried_again)


def test_the_table_is_an_artifact(ended: SearchOutcome, api: str) -> None:
    question = {"artifacts": {"key": {"any_": ["trials"]}}}
    (found,) = [each for each in ask(api, "artifacts/filter", question) if ended.table in each["description"]][:1]
    assert [row["parameters"] for row in json.loads(found["data"])] == [
        row["parameters"] for row in ended.searched[0].rows()
    ]
