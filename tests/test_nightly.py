"""Nights on small data: what is promoted, what is kept, who is told, and that nothing is done twice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, eventually
from PIL import Image
from plant import NAME, Plant, listening

import flows.alerts
from flows.alerts import alert, one_at_a_time, tell
from flows.runs.runfile import DataSource, MethodRun
from storage.errors import Damaged, StoreTooNew
from storage.nights import read_decisions
from storage.store import Store
from tasks.night.gate import Gate

pytestmark = [
    pytest.mark.usefixtures("api"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return Plant(tmp_path_factory.mktemp("plant"))


# One plant's story; each test is a night, in the order of the file.


def test_the_first_night_puts_a_first_version_into_use(plant: Plant) -> None:
    decision = plant.night()
    assert (decision.outcome, decision.why) == ("promoted", "there was no champion")
    assert plant.aliases == {"champion": 1}
    assert decision.counts["new"] == 18 + 8
    assert [check.name for check in decision.checks] == ["new images", "false rejects"]
    assert decision.alarms == []


def test_a_night_without_anything_new_changes_nothing(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "draft", lambda _, key: pytest.fail(f"{key} is computed again"))
    decision = plant.night()
    assert decision.outcome == "unchanged"
    assert decision.why == "nothing has changed since version 1 was made"
    assert plant.aliases == {"champion": 1}


def test_new_images_make_a_version_that_is_proven_and_promoted(plant: Plant) -> None:
    plant.deliver(3)
    decision = plant.night()
    assert decision.outcome == "promoted"
    assert decision.counts["new"] == 3
    assert {check.name: check.passed for check in decision.checks} == {
        "quality": True, "seconds": True, "memory": True, "new images": True, "false rejects": True,
    }  # fmt: skip
    assert "on the labelled test set, difference" in decision.why
    assert plant.aliases == {"champion": 2, "previous": 1}
    reused = [meta for key in plant.store.list("features") if key.endswith("manifest.json")
              if (meta := plant.store.read_json(key)["meta"])["reused"]]  # fmt: skip
    assert len(reused) == 1
    assert reused[0]["reused"] == len(reused[0]["ids"]) - 3


def test_what_a_person_has_taken_back_stays_back(plant: Plant) -> None:
    plant.registry.rollback(NAME, who="test", why="too nervous")
    assert plant.aliases["champion"] == 1
    decision = plant.night()
    assert decision.outcome == "kept"
    assert "version 2 was in use before and is no more; only a person promotes it again" in decision.why
    assert plant.aliases["champion"] == 1
    assert decision.alarms == [f"kept: {decision.why}"]


def test_a_challenger_that_costs_too_much_is_kept_out(plant: Plant) -> None:
    plant.deliver(1)
    decision = plant.night(gate=Gate(larger=1e-9))
    assert decision.outcome == "kept"
    assert "MiB for 14 images against" in decision.why
    assert (decision.champion, decision.challenger, plant.aliases["champion"]) == (1, 3, 1)
    assert decision.metrics == plant.registry.resolve(NAME).metrics


@pytest.mark.parametrize("broken", ["tasks.night.prove.paces", "flows.nightly.rivals_of", "tasks.night.challenge.told"])
def test_a_proof_that_breaks_leaves_the_old_champion(
    broken: str, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise Damaged("version.json has changed")

    monkeypatch.setattr(broken, breaks)
    decision = plant.night()
    assert (decision.outcome, decision.why) == ("failed", "challenge: version.json has changed")
    assert decision.champion == plant.aliases["champion"] == 1


def test_data_that_may_not_be_learned_from_end_the_night_with_the_old_champion(plant: Plant) -> None:
    good = plant.data / "brick" / "train" / "good"
    shutil.move(good, plant.root / "aside")
    good.mkdir()
    (good / "000.png").write_bytes(b"no picture")
    try:
        decision = plant.night()
    finally:
        shutil.rmtree(good)
        shutil.move(plant.root / "aside", good)
    assert decision.outcome == "stopped"
    assert decision.champion == plant.aliases["champion"] == 1
    assert decision.alarms == [f"stopped: {decision.why}"]


def test_the_morning_page_tells_all_of_it(plant: Plant) -> None:
    page = Path(plant.outcome().report).read_text(encoding="utf-8")
    for said in ("in use before", "no champion", "nothing has changed", "MiB for 14 images", "What the night decided"):
        assert said in page
    assert page.count("<tr>") > 7


def test_a_run_on_other_models_leaves_these_on_the_page(plant: Plant) -> None:
    shutil.copytree(plant.root / "all" / "grass", plant.data / "grass")
    other = DataSource(dataset="mvtec_ad", root=str(plant.data), categories=["grass"])
    ended = plant.outcome(data=[other])
    assert [decision.name for decision in ended.decisions] == ["mvtec_ad/grass"]
    page = Path(ended.report).read_text(encoding="utf-8")
    assert [page.count(f">{name}</h2>") for name in (NAME, "mvtec_ad/grass")] == [1, 1]
    assert page.index(">mvtec_ad/grass<") < page.index(f">{NAME}<"), "what this night decided stands first"
    assert f">{NAME}</h2>" in Path(plant.outcome().report).read_text(encoding="utf-8")


def test_another_product_of_the_same_name_takes_no_models_place_and_a_moved_folder_is_none(plant: Plant) -> None:
    before = plant.aliases
    shutil.copytree(plant.root / "all" / "gravel", plant.root / "line_b" / "brick")
    decision = plant.night(data=[DataSource(dataset="mvtec_ad", root=str(plant.root / "line_b"))])
    assert decision.outcome == "stopped"
    assert f"{plant.root / 'line_b'} have none in common" in decision.why
    assert plant.aliases == before
    assert decision.alarms == [f"stopped: {decision.why}"]
    moved = shutil.copytree(plant.data / "brick", plant.root / "moved" / "brick").parent
    assert plant.night(data=[DataSource(dataset="mvtec_ad", root=str(moved))]).outcome != "stopped"


def test_without_labelled_images_synthetic_defects_decide(tmp_path: Path) -> None:
    plant = Plant(tmp_path, labelled=False)
    assert plant.night().outcome == "promoted"
    plant.deliver(2)
    decision = plant.night()
    assert "on synthetic defects in held-out images" in decision.checks[0].said
    assert decision.outcome in ("promoted", "kept")
    assert decision.drift == [], "two images show no change"
    assert {record.dataset for record in plant.registry.versions(NAME)} == {"mvtec_ad"}


def test_other_light_is_told_as_drift(tmp_path: Path) -> None:
    plant = Plant(tmp_path)
    assert plant.night().drift == []
    good = plant.data / "brick" / "train" / "good"
    for i, path in enumerate(sorted(good.iterdir())[:12]):
        Image.fromarray((np.asarray(Image.open(path)) * 0.6).astype(np.uint8)).save(good / f"dim-{i}.png")
    decision = plant.night()
    assert decision.counts["new"] == 12
    drifted = {one["statistic"]: one for one in decision.drift}
    assert {"score", "features", "brightness", "contrast", "sharpness", "rejected"} == set(drifted)
    assert drifted["brightness"]["changed"]
    assert drifted["brightness"]["now"] < 0.7 * drifted["brightness"]["before"]
    assert any(told.startswith("drift: brightness from ") for told in decision.alarms)
    page = (plant.root / "report" / "nights.html").read_text(encoding="utf-8")
    assert "drift: brightness" in page


# alone, and told


def test_a_second_night_on_the_same_model_leaves(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.alerts, "_WAIT_S", 1.0)
    with ExitStack() as first:
        assert one_at_a_time(first, plant.store, [NAME])
        before = len(list(read_decisions(plant.store, NAME)))
        outcome = plant.outcome()
        assert outcome.left == "another night is at work on one of these models"
        assert len(list(read_decisions(plant.store, NAME))) == before
        with ExitStack() as second:
            assert not one_at_a_time(second, plant.store, ["mvtec_ad/carpet", NAME])
            assert one_at_a_time(second, plant.store, ["mvtec_ad/carpet"]), "nights on other models stop nobody"
    with ExitStack() as third:
        assert one_at_a_time(third, plant.store, [NAME, "mvtec_ad/carpet"])


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address, and what was posted to it."""
    with listening() as place:
        yield place


def test_alarms_reach_a_webhook(webhook: tuple[str, list[dict[str, str]]]) -> None:
    url, posted = webhook
    tell("http://127.0.0.1:9/nobody")
    tell(url)  # the address that counts

    def told() -> bool:
        alert(NAME, ["kept: pro is lower", "drift: brightness"], "report/nights.html")
        return eventually(lambda: posted, within=5)

    assert eventually(told, within=60, every=1)
    assert posted[0]["subject"] == f"{NAME} needs a look"
    assert posted[0]["body"] == "kept: pro is lower; drift: brightness (report/nights.html)"


def test_a_night_that_breaks_is_told(
    webhook: tuple[str, list[dict[str, str]]], plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, posted = webhook
    tell(url)
    Store(str(tmp_path)).write_json("store.json", {"format": 99})

    def told() -> bool:
        with pytest.raises(StoreTooNew):
            plant.outcome(store=str(tmp_path))
        return eventually(lambda: posted, within=5)

    assert eventually(told, within=60, every=1)
    assert posted[0]["subject"] == "nightly mvtec_ad/brick: padim broke"
    assert posted[0]["body"].startswith("Failed: ")
    assert "has format 99" in posted[0]["body"]


def test_a_night_whose_model_failed_is_told_once(
    webhook: tuple[str, list[dict[str, str]]], plant: Plant, tmp_path: Path
) -> None:
    url, posted = webhook
    tell(url)
    place = {
        "store": str(tmp_path / "store"),
        "method": MethodRun(name="padim", params={"image_size": 64, "layers": [9]}),
    }

    def told() -> bool:
        assert [one.outcome for one in plant.outcome(**place).decisions] == ["failed"]
        return eventually(lambda: posted, within=5)

    assert eventually(told, within=60, every=1)
    assert {one["subject"] for one in posted} == {f"{NAME} needs a look"}


def test_the_command_runs_a_night_from_a_file(plant: Plant, al: Command) -> None:
    path = plant.root / "night.toml"
    lines = [f'store = "{plant.store.url}"', f'report = "{plant.root / "report"}"', "false_reject_rate = 0.2"]
    lines += ["[[data]]", 'dataset = "mvtec_ad"', f'root = "{plant.data}"', 'categories = ["brick"]']
    lines += ["[method]", 'name = "padim"', "params = {image_size = 64, channels = 10}"]
    path.write_text("\n".join(lines))
    code, out, err = al("nightly", str(path))
    assert code == 0, err
    assert f"{NAME}: unchanged, nothing has changed since version 3 was made" in out
    assert "nights.html" in out
