"""New images before anything learns from them: who is held, what a person's word does, and what the gate says."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from plant import NAME, Plant

from al_models.drift import Change
from flows.runs.runfile import MethodRun
from storage.held import HeldImage, NotHeld, meant, read_held, say, write_held
from storage.nights import Decision, write_decision
from storage.store import Store
from tasks.core.pace import paces
from tasks.night.decide import Intake, Judgement, Promise, costs, decide, new_images
from tasks.night.gate import Gate

GATE = Gate()
PROMISE = Promise(rate=0.05, held_out=22, threshold=0.5, good=20, rejected=1)
WAYS = {"false_reject_rate": 0.05, "method": MethodRun(name="padim", params={"image_size": 64, "channels": 40})}


# One plant's story; each test is a night or a morning, in the order of the file.


@pytest.fixture(scope="module")
def plant(api: str, tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return Plant(tmp_path_factory.mktemp("plant"), first=48, later=8, validation=20, smuggled=12)


@pytest.fixture(scope="module")
def smuggled() -> set[str]:
    return set()


def learned(plant: Plant) -> set[str]:
    """Names of the images that any version learned from, or was calibrated on."""
    ids = {i for one in plant.registry.versions(NAME) for i in (*one.lineage.fitted_on, *one.lineage.held_out)}
    return {path.name for path in plant.good.iterdir() if plant.content(path) in ids}


def test_good_images_make_the_first_champion_and_its_successor(plant: Plant) -> None:
    first = plant.night(**WAYS)
    assert (first.outcome, plant.aliases) == ("promoted", {"champion": 1})
    plant.deliver(4)
    assert plant.night(**WAYS).outcome == "promoted"
    assert plant.aliases == {"champion": 2, "previous": 1}


def test_defects_delivered_as_good_are_held_by_name_and_none_is_learned(plant: Plant, smuggled: set[str]) -> None:
    smuggled |= plant.smuggle()
    assert len(smuggled) == 12
    decision = plant.night(**WAYS)
    assert decision.outcome == "kept", decision.why
    assert plant.aliases["champion"] == decision.champion == 2
    assert {Path(path).name for path in decision.held.values()} >= smuggled
    assert "12 of 12 new images rejected" in decision.why
    assert not smuggled & learned(plant)
    page = (plant.root / "report" / "nights.html").read_text(encoding="utf-8")
    assert all(page.count(f"/train/good/{name}</strong>") == 1 for name in smuggled)
    assert page.count("data:image/jpeg") >= 12


def test_they_are_named_every_morning_until_a_person_decides(plant: Plant, smuggled: set[str]) -> None:
    plant.deliver(2)
    decision = plant.night(**WAYS)
    assert (decision.outcome, plant.aliases["champion"]) == ("kept", 2)
    assert "12 wait for a person since too many were rejected at once" in decision.why
    assert {Path(path).name for path in decision.held.values()} == smuggled, "later good ones are learned, not used"
    assert all(name in decision.asks[0] for name in smuggled)
    assert not smuggled & learned(plant)


def test_refused_they_are_never_learned_and_good_ones_are(plant: Plant, smuggled: set[str], al: Command) -> None:
    code, out, err = al("nights", "refuse", *sorted(smuggled), "--store", plant.store.url)
    assert (code, err) == (0, "")
    assert out.count(" is refused") == 12
    decision = plant.night(**WAYS)
    assert (decision.outcome, decision.held) == ("promoted", {}), decision.why
    assert decision.counts["new"] == 2
    assert not smuggled & learned(plant)
    assert plant.night(**WAYS).asks == []


def test_a_released_image_is_learned_and_a_refused_one_forgotten(plant: Plant, smuggled: set[str], al: Command) -> None:
    name = min(smuggled)
    assert al("nights", "release", name, "--store", plant.store.url)[0] == 0
    assert plant.night(**WAYS).counts["new"] == 1
    assert smuggled & learned(plant) == {name}
    assert al("nights", "refuse", f"train/good/{name}", "--store", plant.store.url)[0] == 0
    plant.night(**WAYS)
    newest = plant.registry.versions(NAME)[-1]
    assert plant.content(plant.good / name) not in {*newest.lineage.fitted_on, *newest.lineage.held_out}
    (image,) = meant(read_held(plant.store, NAME), [name])
    assert [one.word for one in image.said] == ["refused", "released", "refused"]


def test_no_first_champion_is_made_of_images_that_look_like_defects(api: str, tmp_path: Path) -> None:
    plant = Plant(tmp_path, first=60, validation=20, smuggled=12)
    smuggled = plant.smuggle()
    decision = plant.night(**WAYS)
    assert (decision.outcome, decision.champion, plant.aliases.get("champion")) == ("kept", None, None)
    assert "images look like defects beside the others, 5.0% may be rejected" in decision.why
    held = {Path(path).name for path in decision.held.values()}
    assert held
    assert held <= smuggled
    assert not held & learned(plant)


@pytest.mark.month
def test_what_is_rejected_is_learned_where_the_gate_says_so_but_not_put_into_use(api: str, tmp_path: Path) -> None:
    plant = Plant(tmp_path, first=40, validation=20, smuggled=12)
    ways = WAYS | {"gate": Gate(rejected="learn")}
    assert plant.night(**ways).outcome == "promoted"
    smuggled = plant.smuggle()
    decision = plant.night(**ways)
    assert (decision.outcome, decision.held, decision.champion) == ("kept", {}, 1)
    assert smuggled <= learned(plant)


# a person's word


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two models, a night each; two images held for one of them, and one of the same name for the other."""
    store = Store(str(tmp_path / "store"))
    store.check_format()
    for category in ("grid", "bottle"):
        write_decision(store, Decision("parts", category, "2026-01-01T00:00:00+00:00", "kept", "for a test"))
    image = HeldImage("parts/grid", "a" * 32, "train/good/001.png", "/data", "2026-01-01", 0.8, 0.5, 3)
    write_held(store, image)
    write_held(store, replace(image, id="b" * 32, path="train/good/002.png"))
    write_held(store, replace(image, id="c" * 32, model="parts/bottle"))
    return store


def test_an_image_is_named_by_path_its_end_or_its_content(store: Store) -> None:
    images = read_held(store)
    for name in ("002.png", "good/002.png", "train/good/002.png", "/data/train/good/002.png", "b" * 8):
        assert [one.id for one in meant(images, [name])] == ["b" * 32]
    assert [one.path for one in meant(images[1:], ["good/*.png"])] == ["train/good/001.png", "train/good/002.png"]
    for name in ("02.png", "bbbb", "", "png"):
        with pytest.raises(NotHeld, match="is held; those that are: "):
            meant(images, [name])


def test_a_word_is_kept_with_who_and_when_and_said_once(store: Store) -> None:
    (image,) = say(store, meant(read_held(store), ["002.png"]), "refused", "a person")
    assert [(one.word, one.who) for one in image.said] == [("refused", "a person")]
    assert say(store, [image], "refused", "another") == [image]
    assert [one.state for one in read_held(store, "parts/grid")] == ["held", "refused"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["release", "009.png"], "no image '009.png' is held; those that are: train/good/001.png, train/good/001.png"),
        (["refuse", "001.png"], "images named '001.png' are held for parts/bottle and parts/grid; say which with"),
        (["refuse", "002.png", "--model", "parts/gird"], "no night was about a model 'parts/gird' in "),
        (["release", "002.png", "009.png"], "no image '009.png' is held"),
        (
            ["release", "*.png"],
            "images of parts/bottle and parts/grid match '*.png'; say which with --model parts/bottle",
        ),
        (["release", "*.tif"], "no held image matches '*.tif'; those that are: "),
        (["list", "--store", "nowhere"], "nowhere is not a store; give the folder that"),
    ],
)
def test_a_wrong_name_is_one_sentence_and_changes_nothing(
    arguments: list[str], said: str, store: Store, al: Command
) -> None:
    place = [] if "--store" in arguments else ["--store", store.url]
    code, _, err = al("nights", *arguments, *place)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert said in err
    assert all(one.state == "held" for one in read_held(store))


def test_a_store_without_nights_says_so(tmp_path: Path, al: Command) -> None:
    Store(str(tmp_path)).check_format()
    code, _, err = al("nights", "release", "001.png", "--store", str(tmp_path))
    assert code == 2
    assert f"no night has been in {tmp_path}, so it holds no image; `al nightly RUN_FILE" in err


def test_held_images_are_listed_with_folder_and_reason(
    store: Store, al: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    say(store, meant(read_held(store), ["002.png"]), "released", "a person")
    code, out, _ = al("nights", "list", "--store", store.url)
    assert code == 0
    assert "002.png" not in out
    assert out.count("train/good/001.png") == 2
    assert "score 0.8, above the threshold 0.5 of version 3" in out
    assert "released by a person" in al("nights", "list", "--all", "--store", store.url)[1]


# the gate, a function


def passed(intake: Intake) -> bool:
    return new_images(GATE, intake).passed


def test_a_false_reject_in_a_delivery_is_chance_and_a_delivery_of_rejects_is_not() -> None:
    assert passed(Intake())
    assert passed(Intake(n=1, rejected=1, promise=PROMISE))
    assert passed(Intake(n=24, rejected=2, promise=PROMISE))
    assert not passed(Intake(n=12, rejected=10, promise=PROMISE))
    assert not passed(Intake(n=3, rejected=3, promise=PROMISE))


def test_good_images_of_earlier_nights_do_not_hide_a_delivery_of_rejects() -> None:
    many = Intake(n=212, rejected=10, fresh=12, fresh_rejected=10, promise=PROMISE)
    assert passed(replace(many, fresh=0, fresh_rejected=0))
    assert not passed(many)
    assert not passed(Intake(n=200, promise=PROMISE, many=1)), "as long as a person has not decided"


def test_without_a_champion_the_promised_share_may_look_like_defects() -> None:
    assert passed(Intake(compared=100, suspected=5, rate=0.05))
    assert not passed(Intake(compared=100, suspected=6, rate=0.05))


def test_drift_and_a_promotion_never_go_together() -> None:
    change = Change("brightness", 1e-5, 1e-4, True, 100.0, 60.0, 12)
    checks = decide(GATE, None, Judgement(PROMISE), Intake(n=12, promise=PROMISE, drift=[change]))
    assert [(check.name, check.passed) for check in checks] == [("new images", False), ("false rejects", True)]
    assert "drift of brightness" in checks[0].said


def test_costs_are_ratios() -> None:
    champion = Judgement(PROMISE, seconds=0.1, memory=1000.0)
    assert [one.passed for one in costs(GATE, champion, replace(champion, seconds=0.14, memory=1700.0))] == [True, True]
    assert [one.passed for one in costs(GATE, champion, replace(champion, seconds=0.16, memory=1800.0))] == [
        False,
        False,
    ]


def test_what_else_the_machine_does_slows_both_that_are_timed() -> None:
    busy = np.random.default_rng(0).choice([0.0, 0.05], 1000, p=[0.8, 0.2])  # now and then
    load = iter(busy)

    def work() -> None:
        time.sleep(0.02 + next(load))

    first, second = paces(work, work)
    assert 0.6 < first / second < 1.6
    first, second = paces(work, lambda: time.sleep(0.1))
    assert second / first > 1.6
