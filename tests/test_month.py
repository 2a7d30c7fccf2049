"""A month at a plant, night by night: what the registry, the aliases, the records and the alarms say in the end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import AL, eventually, stop
from PIL import Image, ImageDraw
from plant import NAME, Plant, listening
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from al_models.drift import FEWEST
from flows.alerts import tell
from flows.runfile import to_toml
from storage.nights import Decision, read_decisions
from storage.records import RunRecord, read_record
from tasks.compute import inputs_of
from tasks.extract import extract
from tasks.fit import fit
from tasks.gate import Gate
from tasks.ingest import ingest
from tasks.policy import Policy
from tasks.prepare import prepare
from tasks.suspect import suspect
from tasks.validate import validate

pytestmark = [
    pytest.mark.usefixtures("api"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
NIGHTS = 30
CORRUPTED, CONTAMINATED, KILLED, DIM, ROLLED_BACK = 5, 9, 14, 20, 25
"""Nights on which, or on the day before which, something happens; one new good image comes every day."""
DIM_IMAGES = 10
WAYS = {
    "validation": Policy(rules={"readable": "stop", "suspected_defect": "reject"}),
    "gate": Gate(slower=50),  # a busy machine decides nothing here
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
        for path in good.glob("corrupted-*"):
            path.unlink()  # somebody was told
        some = sorted(good.iterdir())[:DIM_IMAGES]
        if night > 1:
            self.plant.deliver(1)
        if night == CORRUPTED:
            for path in some[:2]:
                (good / f"corrupted-{path.name}").write_bytes(path.read_bytes()[:200])
        elif night == CONTAMINATED:
            for path in some[:2]:
                scratched(path).save(good / f"scratched-{path.name}")
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
                if place.name.startswith("al-nightly-"):
                    client.delete_global_concurrency_limit_by_name(place.name)

    def _fits(self) -> int:
        return len(list(Path(self.plant.store.url, "models").rglob("manifest.json")))


def scratched(path: Path) -> Image.Image:
    """A good image with a defect."""
    image = Image.open(path).convert("RGB")
    ImageDraw.Draw(image).line((8, 12, 56, 50), fill=(250, 250, 250), width=5)
    return image


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
    assert ends == {n: "stopped" if n == CORRUPTED else "promoted" for n in range(1, NIGHTS + 1) if n != KILLED}
