"""A month at a plant, night by night: what the registry, the aliases, the records and the alarms say in the end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import AL, eventually, stop
from PIL import Image
from plant import NAME, Plant, listening
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from al_models.drift import FEWEST
from flows.alerts import tell
from flows.order import Doing, inputs
from flows.runs.runfile import MethodRun, to_toml
from storage.held import read_held, say
from storage.models.versions import STATE
from storage.nights import Decision, read_decisions
from storage.records import RunRecord, read_record
from tasks.core.compute import inputs_of
from tasks.core.policy import Policy
from tasks.extract import extract
from tasks.fit import fit
from tasks.ingest import ingest
from tasks.night.gate import Gate

pytestmark = [
    pytest.mark.month,
    pytest.mark.usefixtures("api"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
NIGHTS = 30
CORRUPTED, CONTAMINATED, KILLED, DIM, ROLLED_BACK = 5, 9, 14, 20, 25
"""Nights on which, or on the day before which, something happens; one new good image comes every day."""
DIM_IMAGES = 10
WAYS = {
    "validation": Policy(rules={"readable": "stop", "suspected_defect": "reject"}),
    # A few labelled images: their AUROC is certainly lower on no night, as PRO is by chance on one of forty. A fifth of
    # the good images is rejected, and nobody is there to release them. A machine that does much else decides nothing.
    "gate": Gate(metric="image_auroc", slower=3, rejected="learn"),
}


@dataclass
class Month:
    """What happened, and what was told."""

    plant: Plant
    decisions: dict[int, Decision] = field(default_factory=dict)
    """Night -> what it decided."""
    champions: dict[int, int] = field(default_factory=dict)
    """Night -> the champion in the morning after."""
    posted: list[dict[str, str]] = field(default_factory=list)
    """To the webhook."""

    def live(self) -> None:
        """Day and night, 30 times."""
        for night in range(1, NIGHTS + 1):
            self._day(night)
            if night == KILLED:
                self._killed()
            else:
                self.decisions[night] = self.plant.night(**WAYS)
            self.champions[night] = self.plant.aliases["champion"]

    def _day(self, night: int) -> None:
        good = self.plant.good
        for path in (*good.glob("corrupted-*"), *good.glob("contaminated-*")):
            path.unlink()  # somebody was told
        if night == DIM + 1:
            self.plant.registry.promote(
                self.plant.registry.resolve(f"{NAME}@challenger"), who="a person", why="the lamps are new"
            )
        some = sorted(good.iterdir())[:DIM_IMAGES]
        if night > 1:
            self.plant.deliver(1)
        if night == CORRUPTED:
            for path in some[:2]:
                (good / f"corrupted-{path.name}").write_bytes(path.read_bytes()[:200])
        elif night == CONTAMINATED:
            chart = (np.indices((64, 64)).sum(0) // 4 % 2 * 255).astype(np.uint8)
            Image.fromarray(np.stack([chart] * 3, 2)).save(good / "contaminated-chart.png")
        elif night == DIM:
            for path in some:
                Image.fromarray((np.asarray(Image.open(path)) * 0.7).astype(np.uint8)).save(good / f"dim-{path.name}")
        elif night == ROLLED_BACK:
            self.plant.registry.rollback(NAME, who="a person", why="rejects too many good parts")

    def _killed(self) -> None:
        """A night in a process of its own, killed when its model is fitted and nothing is decided."""
        path = self.plant.root / "night.toml"
        path.write_text(to_toml(self.plant.run(**WAYS)))
        before = self._fits()
        process = subprocess.Popen([*AL, "nightly", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            eventually(lambda: self._fits() != before or process.poll() is not None, within=120, every=0.005)
        finally:
            stop(process)
        assert process.returncode == -9, "it ended before it could be killed"
        with get_client(sync_client=True) as client:  # its place would be free in five minutes; a day goes by here
            for place in client.read_global_concurrency_limits():
                if place.name.startswith("al-night-"):
                    client.delete_global_concurrency_limit_by_name(place.name)

    def _fits(self) -> int:
        return len(list(Path(self.plant.store.url, "models").rglob("manifest.json")))


@pytest.fixture(scope="module")
def month(api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Month]:
    """All of it, and the morning after."""
    plant = Plant(tmp_path_factory.mktemp("month"), later=NIGHTS)
    with listening() as (url, posted):
        tell(url, silent_after=timedelta(seconds=30))
        month = Month(plant, posted=posted)
        # A flow run that tells that it lives ends up to a second late; the night in a process of its own does.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            month.live()
        eventually(lambda: len(posted) >= 4, within=60)
        yield month


def test_each_night_ends_as_the_story_says(month: Month) -> None:
    ends = {night: decision.outcome for night, decision in month.decisions.items()}
    expected = dict.fromkeys(range(1, NIGHTS + 1), "promoted") | {CORRUPTED: "stopped", DIM: "kept"}
    assert ends == {night: outcome for night, outcome in expected.items() if night != KILLED}
    assert list(read_decisions(month.plant.store, NAME)) == list(month.decisions.values())


def test_the_champion_of_each_morning_is_the_version_of_its_night(month: Month) -> None:
    version, expected = 0, {}
    for night in range(1, NIGHTS + 1):
        version += night not in (CORRUPTED, KILLED)
        expected[night] = version - (night == DIM)
    assert month.champions == expected
    assert month.plant.aliases == {"champion": version, "previous": version - 1}
    assert month.plant.registry.numbers(NAME) == list(range(version - 9, version + 1)), "ten are kept"


def test_the_history_tells_every_switch_and_who_made_it(month: Month) -> None:
    expected: list[tuple[str, str, int | None]] = []
    for night in sorted(month.decisions):
        now = month.champions[night]
        before = expected[-1][2] if expected else None
        if night == DIM + 1:
            expected.append(("promote", "a person", before := now - 1))
        if night == ROLLED_BACK:
            expected.append(("rollback", "a person", before := now - 2))
        if night == DIM:
            expected.append(("challenge", "nightly", before))
        elif night != CORRUPTED:
            expected += [("challenge", "nightly", before), ("promote", "nightly", now)]
    history = month.plant.registry.aliases(NAME).history
    assert [(one.change, one.who, one.points.get("champion")) for one in history] == expected
    assert [one.why for one in history if one.change == "rollback"] == ["rejects too many good parts"]


def test_versions_follow_each_other(month: Month) -> None:
    versions = {version.number: version for version in month.plant.registry.versions(NAME)}
    after_rollback = month.champions[ROLLED_BACK]
    for number, version in list(versions.items())[1:]:
        before = versions[number - 1]
        assert version.lineage.updated_from == before.lineage.outputs["model"]
        assert version.lineage.parent == number - (2 if number == after_rollback else 1)
        assert set(before.lineage.fitted_on) < set(version.lineage.fitted_on)
        assert version.lineage.held_out == before.lineage.held_out


def test_decisions_and_the_record_count_every_image(month: Month) -> None:
    for night, decision in month.decisions.items():
        if night == CORRUPTED:
            continue
        new = {1: 18 + 8, CORRUPTED + 1: 2, KILLED + 1: 2, DIM: 1 + DIM_IMAGES, ROLLED_BACK: 2}.get(night, 1)
        aside = 1 if night == CONTAMINATED else 0
        assert (night, decision.counts["new"], decision.counts["set_aside"]) == (night, new, aside)
        assert decision.counts["train"] == 18 + night - 1 + (DIM_IMAGES if night >= DIM else 0)
        assert decision.aside == ({"suspected_defect": 1} if aside else {})
    record = record_of(month)
    assert record.status == "done"
    assert record.counts.items() <= month.decisions[NIGHTS].counts.items()
    assert record.metrics == month.decisions[NIGHTS].metrics
    assert record.updated_from is not None


def test_alarms_are_those_of_the_story_and_no_others(month: Month) -> None:
    told = {night: decision.alarms for night, decision in month.decisions.items() if decision.alarms}
    assert sorted(told) == [CORRUPTED, CONTAMINATED, DIM]
    assert [text.split(":")[0] for text in told[CORRUPTED]] == ["stopped"]
    assert "corrupted-" in told[CORRUPTED][0]
    assert told[CONTAMINATED] == ["set aside: 1 more images than before (in all: suspected_defect 1)"]
    assert [text.split(":")[0] for text in told[DIM]] == ["kept"] + ["drift"] * (len(told[DIM]) - 1)
    assert any(text.startswith("drift: brightness from ") for text in told[DIM])
    assert [night for night, decision in month.decisions.items() if decision.drift] == [DIM], f"{FEWEST} show one"


def test_each_alarm_reached_the_webhook_once(month: Month) -> None:
    looks = [one["body"] for one in month.posted if one["subject"] == f"{NAME} needs a look"]
    alarms = [decision.alarms for decision in month.decisions.values() if decision.alarms]
    assert [body.split(" (/")[0] for body in looks] == ["; ".join(told) for told in alarms]
    broke = [one for one in month.posted if one not in [{"subject": f"{NAME} needs a look", "body": b} for b in looks]]
    assert [one["subject"] for one in broke] == ["nightly mvtec_ad/brick: padim broke"], "the night that was killed"
    assert broke[0]["body"].startswith("Crashed: not heard of for 0:00:30 (flow run prefect.flow-run.")


@pytest.mark.parametrize("output", ["images", "features"])
def test_each_image_was_decoded_and_extracted_once_in_the_month(month: Month, output: str) -> None:
    store, computed, seen = month.plant.store, 0, set()
    for key in store.list(output):
        if key.endswith(f"{key.split('/')[3]}/manifest.json"):
            meta = store.read_json(key)["meta"]
            computed += len(meta["ids"]) - meta["reused"]
            seen |= set(meta["ids"])
    assert computed == len(seen)


def test_after_a_month_of_updates_the_model_is_what_a_fit_of_all_images_gives(month: Month) -> None:
    run, store = month.plant.run(**WAYS).as_benchmark(), month.plant.store
    (cell,) = run.cells("mvtec_ad", "brick")
    (category,) = ingest.fn(store.url, "mvtec_ad", run.data[0].root, ["brick"]).categories
    validated, _ = inputs(Doing(), run, category, 64, None)
    spec = inputs_of(cell)[1]
    assert spec is not None
    whole = store.get(fit.fn(replace(cell, update=False), validated, extract.fn(validated, spec, "auto")))
    champion = month.plant.registry.resolve(NAME)
    assert whole.meta["fitted_on"] == champion.lineage.fitted_on
    expected = safetensors.numpy.load(store.read_bytes(f"{whole.folder}/state.safetensors"))
    found = safetensors.numpy.load(month.plant.registry.read(champion, STATE))
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= 1e-5 * np.abs(values).max(), name


def test_the_morning_page_shows_the_month(month: Month) -> None:
    page = (month.plant.root / "report" / "nights.html").read_text(encoding="utf-8")
    assert page.count('<th scope="row" style="white-space: nowrap">') == NIGHTS - 1
    assert "set aside" in page


def record_of(month: Month) -> RunRecord:
    """The last night's."""
    record = read_record(month.plant.store, month.plant.registry.resolve(NAME).lineage.record)
    assert record is not None
    return record


# another plant, where defects are delivered as good


@dataclass
class Contaminated:
    """Three nights on which twelve defective images come among sixty good ones, and the mornings until they are decided
    about."""

    plant: Plant
    smuggled: set[str]
    decisions: list[Decision]
    champions: list[int]
    """In the morning after each night."""
    posted: list[dict[str, str]]


@pytest.fixture(scope="module")
def contaminated(api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contaminated]:
    """Sixty good images in two deliveries; then the defects; two quiet days; refused; a last delivery of good ones."""
    plant = Plant(tmp_path_factory.mktemp("contaminated"), first=54, later=12, validation=20, smuggled=12)
    method = MethodRun(name="padim", params={"image_size": 64, "channels": 40})
    story = Contaminated(plant, set(), [], [], [])

    def night() -> None:
        gate = Gate(metric="image_auroc", slower=3)
        story.decisions.append(plant.night(false_reject_rate=0.05, method=method, gate=gate))
        story.champions.append(plant.aliases["champion"])

    with listening() as (url, posted):
        tell(url)
        story.posted = posted
        night()
        plant.deliver(6)
        night()
        story.smuggled |= plant.smuggle()
        night()
        night()
        plant.deliver(3)
        night()
        images = [one for one in read_held(plant.store, NAME) if Path(one.path).name in story.smuggled]
        say(plant.store, images, "refused", "a person")
        say(plant.store, [one for one in read_held(plant.store) if one.state == "held"], "released", "a person")
        plant.deliver(3)
        night()
        eventually(lambda: sum(name_in(posted, name) for name in story.smuggled) >= 12, within=60)
        yield story


def name_in(posted: list[dict[str, str]], name: str) -> bool:
    """Whether an alarm names the image."""
    return any(name in one["body"] for one in posted)


def test_twelve_defects_among_sixty_good_images_change_no_champion(contaminated: Contaminated) -> None:
    ends = [decision.outcome for decision in contaminated.decisions]
    assert ends == ["promoted", "promoted", "kept", "kept", "kept", "promoted"]
    assert contaminated.champions[1:5] == [contaminated.champions[1]] * 4
    assert all("drift" not in said and "rejected" not in said for said in contaminated.decisions[-1].alarms)


def test_none_of_them_is_ever_learned(contaminated: Contaminated) -> None:
    plant = contaminated.plant
    ids = {plant.content(plant.good / name) for name in contaminated.smuggled}
    assert len(ids) == 12
    for version in plant.registry.versions(NAME):
        assert not ids & {*version.lineage.fitted_on, *version.lineage.held_out}, version.label


def test_all_of_them_are_named_every_morning_on_the_page_and_to_the_webhook(contaminated: Contaminated) -> None:
    for decision in contaminated.decisions[2:5]:
        assert {Path(path).name for path in decision.held.values()} >= contaminated.smuggled
        assert all(name in decision.asks[0] for name in contaminated.smuggled)
    assert not contaminated.smuggled & {Path(path).name for path in contaminated.decisions[-1].held.values()}
    assert all(name_in(contaminated.posted, name) for name in contaminated.smuggled)
