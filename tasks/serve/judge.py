"""Judge image files with a version of a model: score, p-value, decision and map, and for each file what went wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from al_models.calibration import p_values
from al_models.drift import SCOPE_LIMIT
from al_models.errors import InvalidInput
from al_models.parts.images import decode, light, resize
from al_models.parts.patches import channel_means
from al_models.types import ImageBatch, Prediction
from storage.files import MAX_BYTES
from storage.samples import content_hash
from tasks.core.compute import runtime_of
from tasks.core.handles import Cell
from tasks.core.heat import rgb, shrunk
from tasks.core.limits import in_memory
from tasks.serve.reference import LIGHT
from tasks.serve.register import LoadedVersion

Decision = Literal["accept", "reject", "undecided", "out_of_scope", "unreadable"]
"""Undecided: too few good images were held out for a threshold. Out of scope: it does not look like the images that the
model was made from at all, and so is not judged."""
DECISIONS: tuple[Decision, ...] = get_args(Decision)
_PICTURE_SIDE = 1024
"""Pixels that pictures for people have on their longer side, at most."""


@dataclass(frozen=True, eq=False)
class Opened:
    """An image file as far as it could be read."""

    path: str
    id: str = ""
    """Content name; empty when not even the bytes could be read."""
    problem: str | None = None
    """Why it has no pixels."""
    note: str | None = None
    """What decoding changed."""
    width: int = 0
    height: int = 0
    small: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """uint8 (h, w, 3), as the detector takes it."""
    picture: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    """uint8 (h, w, 3), for people."""
    light: dict[str, float] = field(default_factory=dict)
    beyond: bool = False
    """Whether values lie beyond the range that the version has learned."""


@dataclass(frozen=True, eq=False)
class JudgedImage:
    """What a version says of an image."""

    opened: Opened
    decision: Decision
    reason: str | None = None
    """Why it is unreadable."""
    score: float | None = None
    p_value: float | None = None
    """None out of scope, where it would promise nothing."""
    deviations: float | None = None
    """How far it is from the images that the model was made from: out of scope above SCOPE_LIMIT."""
    features: float | None = None
    """The distance of its features, from which `deviations` comes."""
    map: np.ndarray | None = None
    """float16 (h, w)."""


def open_image(path: str, size: int, skip: Callable[[str], bool], white: float | None = None) -> Opened | None:
    """The file, decoded as `tasks.prepare` does, with the range that ends with `white`; None when its content is one to
    `skip`. Never raises for the file."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise InvalidInput(f"larger than {MAX_BYTES} bytes; crop or tile the image")
        data = Path(path).read_bytes()
    except (OSError, InvalidInput) as error:
        return Opened(path, problem=f"cannot be read: {getattr(error, 'strerror', None) or error}")
    name = content_hash(data)
    if skip(name):
        return None
    try:
        decoded = decode(data, white)
    except InvalidInput as error:
        return Opened(path, name, str(error))
    small = resize(decoded.pixels, size)
    return Opened(
        path,
        name,
        note=decoded.note
        if not decoded.beyond
        else f"{decoded.note}; {decoded.beyond:.2%} of the values lie beyond it",
        beyond=decoded.beyond > 0,
        width=decoded.width,
        height=decoded.height,
        small=rgb(small if small.ndim == 3 else small[..., None]),
        picture=np.asarray(shrunk(decoded.pixels, _PICTURE_SIDE).convert("RGB")),
        light=light(small),
    )


class Judge:
    """A version at work on a device; a batch at a time."""

    def __init__(self, loaded: LoadedVersion, device: str, batch_size: int) -> None:
        """`device`: auto, cpu, cuda or cuda:N. Raises InvalidInput for one that is not there."""
        version = loaded.version
        self.loaded, self.batch_size = loaded, batch_size
        self.spec = loaded.detector.feature_spec()
        self.size = self.spec.image_size if self.spec else loaded.detector.image_size
        cell = Cell(version.dataset, version.category, version.method, version.params, version.seed, device)
        self.runtime = runtime_of(cell)

    def __call__(self, opened: Sequence[Opened]) -> list[JudgedImage]:
        """The judgement on each image; of one that a detector cannot work with, why."""
        readable = [one for one in opened if one.problem is None]
        judged = {one.path: JudgedImage(one, "unreadable", one.problem) for one in opened}
        judged |= {one.opened.path: one for one in in_memory(lambda size: self._all(readable, size), self.batch_size)}
        return [judged[one.path] for one in opened]

    def _all(self, opened: Sequence[Opened], batch_size: int) -> list[JudgedImage]:
        batches = [opened[start : start + batch_size] for start in range(0, len(opened), batch_size)]
        return [one for batch in batches for one in self._batch(batch)]

    def _batch(self, opened: Sequence[Opened]) -> list[JudgedImage]:
        try:
            return self._judged(opened)
        except InvalidInput as error:
            if len(opened) == 1:
                return [JudgedImage(opened[0], "unreadable", str(error))]
        return [judged for one in opened for judged in self._batch([one])]  # the others are judged

    def _judged(self, opened: Sequence[Opened]) -> list[JudgedImage]:
        images = np.stack([one.small for one in opened])
        prediction, features = self.predict(tuple(one.id for one in opened), images)
        scope = self.loaded.reference.scope
        lights = np.array([[one.light[name] for name in LIGHT] for one in opened])  # (n, 3)
        seen = channel_means(features.values()) if features else lights
        distances, deviations = scope.distance(seen), scope.deviations(seen)
        p = p_values(self.loaded.scores, prediction.scores)
        return [
            self._one(*values)
            for values in zip(opened, prediction.maps, prediction.scores, p, deviations, distances, strict=True)
        ]

    def predict(self, ids: tuple[str, ...], images: np.ndarray) -> tuple[Prediction, dict[int, torch.Tensor]]:
        """Maps, scores and features of images uint8 (n, h, w, 3), resized. Raises InvalidInput."""
        pixels, detector = torch.from_numpy(images), self.loaded.detector
        features = self._features(pixels)
        batch = ImageBatch(ids, pixels if detector.traits.needs_images else None, features)
        return detector.predict(batch, self.runtime), features

    def _features(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """The features as `tasks.extract` stores them, in half precision: thresholds were set on such. Raises
        InvalidInput as it."""
        if self.spec is None:
            return {}
        from al_models.parts.backbone import cached_backbone  # timm takes seconds to import

        features = cached_backbone(self.spec, self.runtime.device)(images)
        half = {key: features[key].half().cpu() for key in self.spec.keys}
        if not all(bool(torch.isfinite(values).all()) for values in half.values()):
            raise InvalidInput(f"its features of {self.spec.backbone} go beyond what half precision holds")
        return half

    def _one(
        self, opened: Opened, map: np.ndarray, score: float, p_value: float, deviations: float, distance: float
    ) -> JudgedImage:
        threshold = self.loaded.version.calibration.image
        decision: Decision = "undecided" if threshold is None else "reject" if score > threshold else "accept"
        inside = deviations <= SCOPE_LIMIT
        return JudgedImage(
            opened,
            decision if inside else "out_of_scope",
            score=float(score),
            p_value=float(p_value) if inside else None,
            deviations=float(deviations),
            features=float(distance),
            map=map.astype(np.float16),
        )
