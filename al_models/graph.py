"""A fitted detector as one graph, from decoded images to maps, scores and p-values; and that graph as an ONNX file.

What is in it is what `al predict` computes, by the same code: the resizing, the normalisation of the backbone's
weights, the backbone, features rounded to half precision as they are stored (thresholds were set on such), the
detector, upsampling and smoothing. The number of images is open, and so is their size.

The resizing is ONNX's `Resize` on uint8, which onnxruntime computes as `parts.images.resize` does: antialiased, first
along rows, and rounded after each direction. Its scale is a float32 where Pillow's is a double. So pixels are the same
to the bit where a float32 holds the model's size over the image's (256 / 512, and images of the model's size, which are
left as they are); at other sizes about one value in a thousand is one level of 255 off. Who wants the very same maps of
such images resizes them first.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from al_models.detector import Detector
from al_models.errors import ExportFailed, InvalidInput, MissingPackage
from al_models.parts.backbone import Backbone
from al_models.registry import METHODS, detector_class
from al_models.types import ImageBatch

OPSET = 18
"""The first with an antialiased `Resize`."""
OUTPUTS = ("map", "score", "p_value")
EXTRA = "onnx"
"""The optional dependencies that this needs."""


class Graph(nn.Module):
    """A fitted detector on the CPU: uint8 (n, size, size, 3) -> maps (n, size, size), scores (n,), p-values (n,).
    Exported as ONNX, it resizes images first.

    `held_out`: scores of held-out good images, float [m], which p-values count. Raises InvalidInput for a method whose
    prediction is no graph.
    """

    def __init__(self, detector: Detector, held_out: np.ndarray) -> None:
        super().__init__()
        why = detector.no_graph()
        if why is not None:
            raise InvalidInput(
                f"{type(detector).__name__} {why}, which no ONNX file can do; methods that can be exported: "
                f"{', '.join(exportable())}"
            )
        spec = detector.feature_spec()
        self.detector, self.size = detector, spec.image_size if spec else detector.image_size
        self.backbone = Backbone(spec) if spec else None  # of its own: exporting one replaces its weights for a while
        # Held a second time, as modules, so that their weights are found and named.
        self.features = self.backbone.network if self.backbone else None
        self.network = getattr(detector, "network_", None)
        for module in self.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # else the exporter takes half a second for each to undo it
        self.register_buffer("held_out", torch.as_tensor(np.asarray(held_out, np.float32)))
        with torch.no_grad():  # what is computed once and kept must be of numbers, not of a tracing's placeholders
            self(self.example()[:1])

    def example(self) -> Tensor:
        """Two black images uint8 (2, size, size, 3), an input to trace the graph with."""
        return torch.zeros(2, self.size, self.size, 3, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if torch.onnx.is_in_onnx_export():
            images = _resized(images, self.size)
        found = self.backbone(images) if self.backbone else {}
        features = {key: layer.half().float() for key, layer in found.items()}
        batch = ImageBatch((), images if self.detector.traits.needs_images else None, features)
        maps, scores = self.detector.tensors(batch)
        as_high = (self.held_out >= scores[:, None]).sum(1)  # (n,)
        return maps, scores, (1 + as_high) / (1 + self.held_out.shape[0])


def _resized(images: Tensor, size: int) -> Tensor:
    """Images resized by ONNX's operator instead of `parts.images.resize`: uint8 (n, h, w, 3) -> (n, size, size, 3)."""
    how = {"mode": "linear", "antialias": 1, "exclude_outside": 1, "axes": [1, 2]}
    sides, shape = torch.tensor([size, size]), (images.shape[0], size, size, 3)
    return torch.onnx.ops.symbolic("Resize", (images, None, None, sides), how, dtype=torch.uint8, shape=shape)


def exportable() -> list[str]:
    """The methods whose prediction is a graph."""
    return [name for name in METHODS if detector_class(name).traits.graph]


def write_onnx(detector: Detector, held_out: np.ndarray, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a fitted detector on the CPU as an ONNX file, its weights in `path`.data beside it from 1.5 GB on.

    Its input `images` is uint8 (n, height, width, 3), RGB; its outputs are `map` float32 (n, size, size), `score` and
    `p_value` float32 (n,), as `Graph` has them. Raises InvalidInput, and MissingPackage without the extra `onnx`.
    """
    for package in ("onnx", "onnxscript"):
        _needed(package)
    graph = Graph(detector, held_out)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own parts
        try:
            program = torch.onnx.export(
                graph.eval(),
                (graph.example(),),
                input_names=["images"],
                output_names=list(OUTPUTS),
                dynamic_shapes=({0: "n", 1: "height", 2: "width"},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportFailed(f"torch makes no graph of {detector} ({error.__cause__}); use `al predict`") from error
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path)


class OnnxModel:
    """An exported file at work, by onnxruntime on the CPU."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """`threads`: 0 for all cores. Raises MissingPackage without the extra `onnx`."""
        runtime = _needed("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (n, h, w, 3), RGB -> `map` float32 (n, size, size), `score` and `p_value` float32 (n,)."""
        found = self.session.run(list(OUTPUTS), {"images": images})
        return dict(zip(OUTPUTS, found, strict=True))


def _needed(package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise MissingPackage(
            f"{package} is not installed, which ONNX files need; pip install 'anomaly-localization[{EXTRA}]'"
        ) from error
