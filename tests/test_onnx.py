"""Exported ONNX files: the maps of `predict` at any number and size of images, or no file."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Command
from PIL import Image
from torch import Tensor, nn

from al_models import graph
from al_models.calibration import p_values
from al_models.detector import Detector
from al_models.drift import Scope
from al_models.embedding.patchcore import Patchcore
from al_models.errors import ExportFailed, InvalidInput, MissingPackage
from al_models.graph import OPSET, OUTPUTS, Graph, OnnxModel, exportable, write_onnx
from al_models.parts import neighbors
from al_models.parts.images import resize
from al_models.parts.neighbors import nearest
from al_models.parts.sources import MemorySource
from al_models.parts.weights import weights_fingerprint
from al_models.registry import METHODS, create, detector_class
from al_models.types import ImageBatch, Prediction, Runtime
from storage.models import Registry
from storage.models.versions import HELD_OUT, REFERENCE, STATE, Calibration, Features, Lineage, ModelVersion
from storage.store import Store
from tasks.core.stored import as_safetensors
from tasks.serve.export_onnx import FILE, TOLERANCE, export_onnx
from tasks.serve.reference import LIGHT, Reference

BACKBONE = "resnet10t"
LINE = "folder/line"
HELD_OUT_SCORES = np.linspace(0, 40, 20)
SMALL: Mapping[str, Mapping[str, Any]] = {
    "ae_ssim": {"image_size": 128, "patches": 8},
    "cs_flow": {"layers": (2,), "scales": (1.0, 0.5), "blocks": 1},
}
"""What a method needs beside what all are given."""
WRITTEN = ("cflow", "cs_flow", "fastflow", "padim", "patchcore", "stpm")
"""Methods whose file is written and read: one of each kind of operations."""


def textured(n: int, size: int, seed: int = 0) -> np.ndarray:
    """Colourful images, uint8 (n, size, size, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, size // 8, size // 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in coarse])


def predicted(detector: Detector, images: np.ndarray) -> Prediction:
    """Ours, by features in half precision as the store keeps them."""
    batch = MemorySource(images, detector, Runtime()).read(range(len(images)))
    half = {key: values.half() for key, values in batch.features.items()}
    return detector.predict(ImageBatch(batch.ids, batch.images if detector.traits.needs_images else None, half))


def apart(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Random ones of a small network: how a graph agrees does not depend on what it knows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("weights") / "random.pth"
        torch.save(timm.create_model(BACKBONE).state_dict(), path)
    return str(path)


def fitted(method: str, weights: str, **params: Any) -> Detector:
    """A small detector of the method."""
    known = {field.name for field in fields(detector_class(method))}
    small = {"backbone": BACKBONE, "weights": weights, "image_size": 64, "epochs": 1}
    wanted = {**detector_class(method).quick, **small, "layers": (1, 2), **SMALL.get(method, {}), **params}
    detector = create(method, **{name: value for name, value in wanted.items() if name in known})
    return detector.fit(textured(4, detector.image_size))


# the same maps


def test_methods_with_a_graph_are_those_that_say_so() -> None:
    assert {"padim", "soe", "patchcore", "stpm", "cflow", "fastflow", "cs_flow"} <= set(exportable())
    assert {"differnet", "mkd", "spade", "ocsvm"}.isdisjoint(exportable())


def check(theirs: Mapping[str, np.ndarray], detector: Detector, images: np.ndarray) -> None:
    """That these are the detector's maps, scores and p-values of the images."""
    ours, n, size = predicted(detector, images), len(images), detector.image_size
    assert {name: (values.shape, values.dtype) for name, values in theirs.items()} == {
        "map": ((n, size, size), np.float32),
        "score": ((n,), np.float32),
        "p_value": ((n,), np.float32),
    }
    assert apart(theirs["map"], ours.maps) <= TOLERANCE
    assert apart(theirs["score"], ours.scores) <= TOLERANCE
    np.testing.assert_allclose(theirs["p_value"], p_values(HELD_OUT_SCORES, theirs["score"]), rtol=1e-6)


@pytest.mark.parametrize("method", WRITTEN)
def test_an_exported_file_gives_the_maps_of_predict(method: str, weights: str, tmp_path: Path) -> None:
    detector = fitted(method, weights)
    write_onnx(detector, HELD_OUT_SCORES, tmp_path / FILE, {"method": method})
    model = OnnxModel(tmp_path / FILE, threads=1)
    assert model.metadata == {"method": method}
    images = textured(3, 2 * detector.image_size, seed=1)
    for given in (images, images[1:2], images[:, ::2, ::2].copy()):  # three, one, and of the model's own size
        check(model(given), detector, given)


@pytest.mark.parametrize("method", sorted(set(exportable()) - set(WRITTEN)))
def test_a_graph_of_any_number_of_images_gives_the_maps_of_predict(method: str, weights: str) -> None:
    """What torch makes ONNX of, in half the time."""
    detector = fitted(method, weights)
    graph = Graph(detector, HELD_OUT_SCORES).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.export.export(graph, (graph.example(),), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
        for n in (3, 1):
            images = textured(n, detector.image_size, seed=1)
            found = made.module()(torch.from_numpy(images))
            check({name: x.numpy() for name, x in zip(OUTPUTS, found, strict=True)}, detector, images)


def test_the_whole_bank_is_searched_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randn(n, 5, generator=generator) for n in (40, 67))
    monkeypatch.setattr(neighbors, "_BANK_BLOCK", 16)  # the last of the blocks has but 3
    for k in (1, 9):
        distances, rows = nearest(queries, bank, k)
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        as_graph = nearest(queries, bank, k)
        monkeypatch.undo()
        monkeypatch.setattr(neighbors, "_BANK_BLOCK", 16)
        assert torch.equal(as_graph[1], rows)
        torch.testing.assert_close(as_graph[0], distances)


class Resizing(nn.Module):
    """The first step of a graph alone."""

    def forward(self, images: Tensor) -> Tensor:
        return graph._resized(images, 48)


def test_images_are_resized_as_pillow_does(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Resizing(),
            (torch.zeros(2, 9, 9, 3, dtype=torch.uint8),),
            dynamic_shapes=({0: "n", 1: "h", 2: "w"},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    program.save(tmp_path / "r.onnx")
    session = OnnxModel(tmp_path / "r.onnx", threads=1).session
    sizes = {
        (96, 96): True,
        (192, 96): True,
        (96, 192): True,
        (48, 48): True,
        (24, 12): True,
        (100, 131): False,
        (333, 61): False,
        (96, 24): True,
    }
    for (h, w), same in sizes.items():
        images = np.random.default_rng(h).integers(0, 256, (2, h, w, 3), dtype=np.uint8)
        (found,) = session.run(None, {session.get_inputs()[0].name: images})
        levels = np.abs(found.astype(int) - np.stack([resize(image, 48) for image in images]))
        assert levels.max() <= (0 if same else 1), (h, w)
        assert (levels > 0).mean() < 0.01


# refusals


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(exportable())))
def test_a_method_without_a_graph_is_refused_with_those_that_have_one(method: str) -> None:
    with pytest.raises(InvalidInput, match=r"which no ONNX file can do; methods that can be exported: .*padim, patchc"):
        Graph(create(method), HELD_OUT_SCORES)


def test_an_approximate_index_is_refused(weights: str) -> None:
    with pytest.raises(InvalidInput, match=r"Patchcore searches an index of faiss \(index='Flat'\), which no ONNX"):
        Graph(Patchcore(weights=weights, backbone=BACKBONE, index="Flat"), HELD_OUT_SCORES)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{package} is not installed, .*'anomaly-localization\[onnx\]'"):
        OnnxModel(tmp_path) if package == "onnxruntime" else write_onnx(create("padim"), HELD_OUT_SCORES, tmp_path, {})


# versions


@dataclass(frozen=True)
class Line:
    """A registry with one version, and files of images."""

    registry: Registry
    detector: Detector
    images: Sequence[str]


@pytest.fixture(scope="module")
def line(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Line:
    """A version without the pipeline that would make it, so that its run has left nothing."""
    root = tmp_path_factory.mktemp("line")
    store = Store(str(root / "store"))
    store.check_format()
    detector = fitted("padim", weights, channels=8)
    paths = [root / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, textured(3, 96, seed=2), strict=True):
        Image.fromarray(image).save(path)
    spec = detector.feature_spec()
    assert spec is not None
    version = ModelVersion(
        "folder",
        "line",
        "padim",
        detector.params(),
        0,
        calibration=Calibration(rate=0.05, images=20, image=38.0, pixel=None),
        features=Features({}, weights_fingerprint(spec)),
        lineage=Lineage([], [], "records/none.json", {}),
        fingerprints={"data": "d1", "code": "c1"},
    )
    nothing = np.zeros(0, np.int64)
    pixels = {"pixel_keys": nothing.astype(np.uint16), "pixel_shares": nothing, "pixel_maxima": nothing}
    reference = Reference(Scope(np.zeros(3), np.eye(3)), {name: np.zeros(1) for name in LIGHT})
    files = {
        STATE: as_safetensors(detector.state()),
        HELD_OUT: as_safetensors({"scores": HELD_OUT_SCORES, **pixels}),
        REFERENCE: reference.to_bytes(),
    }
    Registry(store).add(version, files, lambda version: f"# {version.label}")
    return Line(Registry(store), detector, [str(path) for path in paths])


@pytest.fixture
def written_once(line: Line, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the line's version is written for the first test that asks, and copied for the others."""
    kept = tmp_path_factory.getbasetemp() / "written_once.onnx"

    def write(detector: Detector, held_out: np.ndarray, path: Path, metadata: Mapping[str, str]) -> None:
        if not kept.exists():
            write_onnx(detector, held_out, kept, metadata)
        shutil.copy(kept, path)

    monkeypatch.setattr("tasks.serve.export_onnx.write_onnx", write)


@pytest.mark.usefixtures("written_once")
def test_a_version_is_exported_with_all_that_its_reader_needs(line: Line, tmp_path: Path) -> None:
    done = export_onnx(line.registry, f"{LINE}@1", str(tmp_path / "out"), line.images)
    assert (done.label, done.images) == (f"{LINE}@1", 3)
    assert 0 <= done.score <= TOLERANCE
    assert 0 < done.map <= TOLERANCE  # rounding; exactly nothing would mean that nothing was compared
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FILE, "version.json", "MODEL_CARD.md"}
    assert done.size == (tmp_path / "out" / FILE).stat().st_size
    model = OnnxModel(tmp_path / "out" / FILE, threads=1)
    told = model.metadata
    assert json.loads(told["params"]) == line.detector.params()
    names = ("model", "method", "image_size", "threshold", "false_reject_rate", "held_out_images", "data", "tolerance")
    assert [told[name] for name in names] == [f"{LINE}@1", "padim", "64", "38.0", "0.05", "20", "d1", "0.001"]
    assert "pixel_threshold" not in told  # there is none
    (given,) = model.session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["n", "height", "width", 3])
    assert [out.name for out in model.session.get_outputs()] == list(OUTPUTS)


@pytest.mark.usefixtures("written_once")
@pytest.mark.parametrize(("output", "by"), [("map", 1.01), ("score", 1.01), ("map", np.nan)])
def test_a_file_that_disagrees_is_not_kept(
    output: str, by: float, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = OnnxModel.__call__

    def wrong(model: OnnxModel, images: np.ndarray) -> dict[str, np.ndarray]:
        found = usual(model, images)
        return found | {output: found[output] * np.float32(by)}

    monkeypatch.setattr(OnnxModel, "__call__", wrong)
    with pytest.raises(ExportFailed, match=f"{LINE}@1 was not exported: .*1e-03 is allowed; use `al predict`"):
        export_onnx(line.registry, f"{LINE}@1", str(tmp_path / "out"), line.images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("written_once")
def test_the_command_says_how_well_the_file_agrees(line: Line, al: Command, tmp_path: Path) -> None:
    asked = ("models", "export", f"{LINE}@1", "--format", "onnx", "--store", line.registry.store.url)
    code, _, err = al(*asked, "--to", str(tmp_path / "out"))
    assert code == 2
    assert "the images of the run that folder/line@1 comes from have gone from" in err
    assert "with --images" in err
    code, out, err = al(*asked, "--to", str(tmp_path / "out"), "--images", line.images[0])
    assert (code, err) == (0, "")
    assert out.startswith(f"{LINE}@1: {tmp_path / 'out'}\nmodel.onnx, ")
    assert "MB: on 1 images its maps differ from ours by at most" in out
