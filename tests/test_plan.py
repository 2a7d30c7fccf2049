"""What a run would do: told before, from what the store holds, and true afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from sweep_runs import PADIM, PATCHCORE, manifests, run_file, run_flow

from al_models.parts.backbone import Backbone, feature_shapes
from al_models.types import FeatureSpec
from flows.plan import Rates, plan
from flows.runs.runfile import DataSource, MethodRun, RunFile, SearchRun, to_toml
from storage.records import RunRecord
from storage.store import Store
from tasks.core.stored import StoredCheckpoints

ALL = ("prepare", "validate", "extract", "fit", "calibrate", "predict", "evaluate")
LIMITS: tuple[dict[str, float], ...] = ({}, {"max_minutes": 10})
OWN = ("fit", "calibrate", "predict", "evaluate")


def test_a_plan_says_what_a_run_then_does(api: str, demo_root: Path, tmp_path: Path) -> None:
    run = run_file(tmp_path / "store", demo_root, PADIM, PATCHCORE)
    before = plan(run)
    assert [cell.left for cell in before.cells] == [ALL, ALL]
    assert [step.done for step in before.steps.values()] == [False] * len(before.steps)
    assert all(step.seconds is None for step in before.to_do())
    assert not list((tmp_path / "store").glob("models/**/manifest.json")), "a plan computes nothing"

    run_flow(run_file(tmp_path / "store", demo_root, PADIM))
    between = plan(run)
    assert [cell.left for cell in between.cells] == [(), ("extract", *OWN)]  # other layers than padim's
    outputs = manifests(Store(run.store))
    written = sum(step.bytes or 0 for step in between.steps.values() if step.name == "extract" and step.done)
    (features,) = [path for path in outputs if "/features/" in path]
    meta = Store(run.store).get(str(Path(features).parent.relative_to(run.store))).meta
    assert written == 2 * sum(n * c * h * w for n, c, h, w in meta["shapes"].values())

    run_flow(run)
    after = plan(run)
    assert [cell.left for cell in after.cells] == [(), ()]
    assert after.to_do() == []
    assert after.bytes() == 0


def test_a_training_that_was_begun_tells_how_long_it_takes(
    api: str, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_file(tmp_path / "store", demo_root, PADIM)
    run_flow(run)  # so that what a training reads is there, and its name known
    long = [MethodRun(name="dfr", params={"image_size": PADIM.params["image_size"], **more}) for more in LIMITS]
    half_way = {"plan": np.frombuffer(b'{"steps": 1000}', np.uint8), "counters": np.array([100, 0, 0])}
    for method, seconds in zip(long, (3000, 600), strict=True):
        found = plan(run.model_copy(update={"methods": [method]}))
        (fit,) = (step for step in found.to_do() if step.name == "fit")
        assert fit.seconds is None
        with monkeypatch.context() as patched:
            patched.setattr(StoredCheckpoints, "load", lambda self: half_way | {"elapsed_s": np.array(300.0)})
            found = plan(run.model_copy(update={"methods": [method]}))
        (fit,) = (step for step in found.to_do() if step.name == "fit")
        assert fit.seconds == pytest.approx(seconds)


def test_a_shared_step_is_planned_once(demo_root: Path, tmp_path: Path) -> None:
    run = run_file(tmp_path / "store", demo_root, PADIM).model_copy(update={"seeds": [0, 1, 2]})
    found = plan(run)
    names = [step.name for step in found.steps.values()]
    assert len(found.cells) == 3
    assert [names.count(name) for name in ALL] == [1, 1, 1, 3, 3, 3, 3]


def test_a_category_that_cannot_be_used_is_told_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "data" / "void" / "train" / "good").mkdir(parents=True)
    source = DataSource(dataset="mvtec_ad", root=str(tmp_path / "data"))
    (cell,) = plan(RunFile(data=[source], methods=[PADIM], store=str(tmp_path / "s"), report="")).cells
    assert cell.stopped
    assert cell.left == ()


def test_estimates_grow_with_the_images_and_are_of_the_same_method() -> None:
    counts = {"train": 90, "calibration": 10, "test_good": 40, "test_anomalous": 10}
    seconds = {"extract": 15.0, "fit": 9.0, "predict": 5.0}
    rates = Rates([RunRecord("d", "c", "padim", {}, 0, "x", "done", counts=counts, seconds=seconds)])
    assert rates.seconds("extract", "spade", 300) == pytest.approx(30)
    assert rates.seconds("fit", "padim", 180) == pytest.approx(18)
    assert rates.seconds("predict", "padim", 100) == pytest.approx(10)
    assert rates.seconds("fit", "spade", 180) is None


@pytest.mark.parametrize(
    "spec",
    [
        FeatureSpec(image_size=96),
        FeatureSpec(layers=(3, 1), image_size=64, location="expansion"),
        FeatureSpec(layers=(2,), image_size=64, scales=(1.0, 0.5)),
    ],
)
def test_shapes_are_known_without_weights(spec: FeatureSpec) -> None:
    import torch

    images = torch.zeros(1, spec.image_size, spec.image_size, 3, dtype=torch.uint8)
    assert feature_shapes(spec) == {key: tuple(x.shape[1:]) for key, x in Backbone(spec)(images).items()}


def test_the_command_prints_it_and_starts_nothing(al: Command, demo_root: Path, tmp_path: Path) -> None:
    code, out, err = al(
        "benchmark", "--data", f"mvtec_ad={demo_root}", "--category", "brick", "--method", "padim",
        "--store", str(tmp_path / "s"), "--report", str(tmp_path / "r"), "--plan",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "prepare 1, validate 1, extract 1, fit 1" in " ".join(out.split())
    assert "features" in out
    assert "to write:" in out


def test_a_planned_search_says_its_rungs_and_trials_and_computes_nothing(
    al: Command, demo_root: Path, tmp_path: Path
) -> None:
    tried = SearchRun(method="padim", params={"channels": list(range(5, 19))}, fixed={"image_size": 64}, eta=4)
    run = run_file(tmp_path / "store", demo_root, categories=("brick", "grass"))
    for methods in ([], [PADIM]):
        run = run.model_copy(update={"search": [tried], "seeds": [0, 1, 2], "methods": methods})
        (tmp_path / "run.toml").write_text(to_toml(run))
        code, out, err = al("search", str(tmp_path / "run.toml"), "--plan")
        assert (code, err) == (0, "")
        said = " ".join(out.split())
        assert "1 of 2 14 25% of images 84 2 of 2 4 100% of images 24" in said
        assert "all trials have image_size=64" in said
        assert "0 channels=5" in said
        assert "11 channels=16 and 2 more" in said
        assert ("on the test set: 6 cells of what will be chosen" in said) == bool(methods)
        assert ("mvtec_ad/grass padim 3 0 " in said) == bool(methods)
    assert {key.split("/")[0] for key in Store(run.store).list("")} == {"catalogues", "hashes", "store.json"}
    assert list(Path(run.report).iterdir()) == []
