"""Taking data in: judged on one page, decoded once, an unusable category stops no other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from prefect.client.schemas.objects import State

from flows.benchmark import benchmark
from flows.ingest import IMAGE_SIZE, IngestOutcome, ingest
from flows.runs.runfile import DataSource, IngestRun, MethodRun, RunFile
from flows.where.runners import runner_for
from storage.errors import DownloadError
from storage.files import Hashes
from storage.store import Store
from tasks.core.policy import Policy
from tasks.validate import findings

pytestmark = [
    pytest.mark.usefixtures("api"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


def run_of(store: Path, data: Path, *categories: str, dataset: str = "mvtec_ad", **changes: object) -> IngestRun:
    source = DataSource(dataset=dataset, root=str(data), categories=list(categories) or None)
    return IngestRun(data=[source], store=str(store), report=f"{store}-report", **changes)  # type: ignore[arg-type]


def take_in(run: IngestRun) -> tuple[State[IngestOutcome], IngestOutcome]:
    state = ingest.with_options(task_runner=runner_for(run))(run, return_state=True)
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    return state, outcome


@pytest.fixture
def data(demo_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_root, tmp_path / "data"))


def test_every_category_is_judged_on_one_page(data: Path, tmp_path: Path) -> None:
    broken = data / "brick/train/good/000.png"
    broken.write_bytes(broken.read_bytes()[:200])
    shutil.rmtree(data / "gravel/train")
    state, outcome = take_in(run_of(tmp_path / "store", data))
    assert state.is_failed()
    assert list(outcome.unusable) == ["mvtec_ad/gravel"]
    assert "train/good holds no image" in outcome.unusable["mvtec_ad/gravel"]
    assert [judged.category.category for judged in outcome.judged] == ["brick", "grass"]
    store = Store(str(tmp_path / "store"))
    brick = findings(store, outcome.judged[0].verdict)
    assert brick.loc[brick["rule"] == "readable", "path"].tolist() == ["brick/train/good/000.png"]
    page = Path(outcome.report)
    assert "brick/train/good/000.png" in page.with_name("findings.csv").read_text(encoding="utf-8")
    assert {"brick", "grass"} <= set(re.findall(r"\w+", page.read_text(encoding="utf-8")))


def test_a_file_is_read_and_decoded_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "store", data, "brick")
    _, first = take_in(run.model_copy(update={"data_docs": True}))
    assert first.unusable == {}
    assert (Path(first.report).parent / "data_docs/mvtec_ad/brick/index.html").is_file()

    def forbidden(*_: object) -> bytes:
        raise AssertionError("was decoded again")

    monkeypatch.setattr("tasks.prepare.decode", forbidden)
    counted: list[int] = []
    count = Hashes.of

    def of(self: Hashes, root: Path, path: str) -> str | None:
        name = count(self, root, path)
        counted.append(self.hashed)
        return name

    monkeypatch.setattr(Hashes, "of", of)
    _, again = take_in(run.model_copy(update={"data_docs": False}))
    assert again.judged == first.judged
    assert "data_docs/" not in Path(again.report).read_text(encoding="utf-8")  # those that lie there are older
    changed = max(counted)
    assert changed == 0 or changed == len(counted)  # all of them were made less than two seconds before, or none


def test_a_benchmark_uses_what_was_taken_in(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    take_in(run_of(store, data, "brick"))

    def forbidden(*_: object) -> bytes:
        raise AssertionError("was decoded again")

    monkeypatch.setattr("tasks.prepare.decode", forbidden)
    source = DataSource(dataset="mvtec_ad", root=str(data), categories=["brick"])
    padim = MethodRun(name="padim", params={"image_size": IMAGE_SIZE, "channels": 10})
    run = RunFile(data=[source], methods=[padim], store=str(store), report=str(tmp_path / "report"))
    outcome = benchmark(run, return_state=True).result(raise_on_failure=False)
    assert [record.status for record in outcome.records] == ["done"]
    assert (tmp_path / "report" / "data.html").is_file()


def test_the_policy_decides_what_follows(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "brick/train/good/001.png", data / "brick/train/good/001_again.png")
    for severity, stopped in (("reject", []), ("stop", ["mvtec_ad/brick"])):
        run = run_of(tmp_path / severity, data, "brick", validation=Policy(rules={"unique_in_split": severity}))
        _, outcome = take_in(run)
        assert list(outcome.unusable) == stopped
        found = findings(Store(run.store), outcome.judged[0].verdict)
        assert (found["rule"] == "unique_in_split").any()


def test_suspects_are_set_aside_before_anything_learns_where_the_policy_says_so(data: Path, tmp_path: Path) -> None:
    for i, image in enumerate(sorted((data / "grass/train/good").glob("*.png"))):  # too few images are not compared
        shutil.copy(image, data / f"brick/train/good/1{i:02}.png")
    source = DataSource(dataset="mvtec_ad", root=str(data), categories=["brick"])
    padim = MethodRun(name="padim", params={"image_size": 64, "channels": 10})
    policy = Policy(rules={"suspected_defect": "reject"}, suspect_deviations=0.5)
    run = RunFile(
        data=[source], methods=[padim], store=str(tmp_path / "s"), report=str(tmp_path / "r"), validation=policy
    )
    outcome = benchmark(run, return_state=True).result(raise_on_failure=False)
    (record,) = outcome.records
    found = findings(Store(run.store), record.keys["verdict"])
    suspects = found.loc[found["rule"] == "suspected_defect", "severity"]
    assert set(suspects) == {"reject"}
    assert record.status == "done"
    assert record.counts["train"] == 12 - len(suspects)
    assert record.counts["set_aside"] == len(suspects)
    assert record.keys["suspects"].startswith("suspects/")


def test_a_data_set_without_an_address_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"mvtec_ad has no address .* accept the licence"):
        take_in(run_of(tmp_path / "store", tmp_path / "data", download=True))
