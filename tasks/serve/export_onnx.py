"""Write a version as an ONNX file, and prove on images that the file gives the maps that `al predict` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from al_models.errors import ExportFailed, InvalidInput
from al_models.graph import OnnxModel, write_onnx
from al_models.parts.images import WHOLE, load_images, resize
from storage.models import TEXTS, Registry
from storage.models.versions import ModelVersion
from storage.records import read_record
from storage.stacks import Stack
from storage.whole import new_folder
from tasks.serve.judge import Judge
from tasks.serve.register import LoadedVersion, load_version

FILE = "model.onnx"
TOLERANCE = 1e-3
"""How far maps and scores of the file may lie from ours, in shares of the largest of ours: both compute in float32, in
another order, and round features to half precision in between."""
_SAMPLES = 8


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how well it agrees with our own maps and scores."""

    label: str
    size: int
    """Bytes."""
    images: int
    """Images it was compared on."""
    map: float
    """The largest difference of a map value, as a share of the largest."""
    score: float
    """The largest difference of a score, as a share of the largest."""

    def said(self) -> str:
        """A sentence for the user."""
        return (
            f"{FILE}, {self.size / 1e6:.1f} MB: on {self.images} images its maps differ from ours by at most "
            f"{self.map:.1e} of the largest value, its scores by {self.score:.1e}; {TOLERANCE:.0e} is allowed"
        )


def export_onnx(registry: Registry, name: str, folder: str, images: Sequence[str] = ()) -> Exported:
    """Write the version meant by `name` as `model.onnx` into a new folder, with its card and `version.json`.

    It is compared with ours on these image files; without any, on some that its run has stored. Nothing is left behind
    when they disagree. Raises ExportFailed then, InvalidInput for a method that is no graph or images that cannot be
    read, MissingPackage without the extra `onnx`, as `load_version`, and as `new_folder`.
    """
    loaded = load_version(registry.store, name)
    version, judge = loaded.version, Judge(loaded, "cpu", _SAMPLES)
    samples = load_images(images, judge.size, version.white) if images else stored_images(registry, version)
    texts = {file: registry.read(version, file) for file in TEXTS}
    with new_folder(folder) as aside:
        file = aside / FILE
        write_onnx(loaded.detector, loaded.scores, file, metadata(loaded))
        of_maps, of_scores = differences(OnnxModel(file), judge, samples)
        size = sum(path.stat().st_size for path in aside.iterdir())
        exported = Exported(version.label, size, len(samples), of_maps, of_scores)
        if not max(of_maps, of_scores) <= TOLERANCE:  # NaN is none, either
            raise ExportFailed(f"{version.label} was not exported: {exported.said()}; use `al predict`")
        for text, data in texts.items():
            (aside / text).write_bytes(data)
    return exported


def differences(model: OnnxModel, judge: Judge, images: np.ndarray) -> tuple[float, float]:
    """The largest difference of maps and of scores from the judge's, each as a share of the largest of these.

    `images` uint8 (n, size, size, 3) go through the file all at once, and the first one once more, alone and at twice
    the size: so the resizing and another number of images are tried, too.
    """
    larger = images[:1].repeat(2, axis=1).repeat(2, axis=2)
    pairs = []
    for given, small in ((images, images), (larger, np.stack([resize(larger[0], judge.size)]))):
        ours, _ = judge.predict(tuple(map(str, range(len(small)))), small)
        theirs = model(given)
        pairs.append([_difference(theirs["map"], ours.maps), _difference(theirs["score"], ours.scores)])
    of_maps, of_scores = np.max(pairs, axis=0)  # NaN stays
    return float(of_maps), float(of_scores)


def metadata(loaded: LoadedVersion) -> dict[str, str]:
    """What a reader of the file needs to know of the version; values that are not text as JSON, none that are absent.

    A score above `threshold` means reject, that is a `p_value` of at most `false_reject_rate`; a map value above
    `pixel_threshold` marks a pixel.
    """
    version, asked = loaded.version, loaded.version.calibration
    values = {
        "model": version.label,
        "method": version.method,
        "params": version.params,
        "seed": version.seed,
        "white": version.white,
        "input": _input(version.white),
        "image_size": loaded.detector.image_size,
        "threshold": asked.image,
        "pixel_threshold": asked.pixel,
        "false_reject_rate": asked.rate,
        "held_out_images": asked.images,
        "no_threshold_because": asked.note,
        "weights": version.features and version.features.weights,
        "data": version.fingerprints.get("data"),
        "code": version.fingerprints.get("code"),
        "versions": version.versions,
        "created": version.created,
        "tolerance": TOLERANCE,
    }
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
        if value is not None
    }


def _input(white: float | None) -> str:
    """The scaling of values to those that the file takes (`al_models.parts.images.decode`)."""
    if white is None:
        return "uint8 RGB"
    if white == WHOLE:
        return "uint8 RGB: gray values v of 16 bits as round(v / 257), colour as floor(v / 256)"
    how = (
        f"round(min(v, {white:g}) * 255 / {white:g})"
        if white <= 255
        else f"floor(min(v, {white:g}) * 256 / {white + 1:g})"
    )
    return f"uint8 RGB: values v of more than 8 bits as {how}"


def _difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    apart = np.abs(theirs.astype(np.float64) - ours)
    return float(apart.max() / max(float(np.abs(ours).max()), np.finfo(np.float32).tiny))


def stored_images(registry: Registry, version: ModelVersion) -> np.ndarray:
    """Some of the images of the run that a version comes from, good and defective: uint8 (n, size, size, 3)."""
    record = read_record(registry.store, version.lineage.record)
    output = record and registry.store.find(record.keys["images"])
    if not output:
        raise InvalidInput(
            f"the images of the run that {version.label} comes from have gone from {registry.store.url}; name some "
            "with --images, on which the file is compared with our own maps"
        )
    stack = Stack.open(registry.store, output, "images")
    total = stack.shape[0]
    pixels = stack.read(np.unique(np.linspace(0, total - 1, min(_SAMPLES, total)).astype(int)))  # (n, h, w, 1 or 3)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))
