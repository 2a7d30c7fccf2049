"""The contract every method keeps (checked by `al_models/checks/`).

A detector is a keyword-only dataclass: its fields are the hyperparameters with the paper's defaults, and nothing else
happens at construction. `fit` learns from good images; learned attributes end in `_`; `state` gives them as plain
arrays and `load_state` takes them back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from al_models.errors import InvalidInput, NotFitted
from al_models.parameters import PositiveInt, checked
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

if TYPE_CHECKING:
    from torch import Tensor

    from al_models.parts.offsets import Offset
    from al_models.parts.sources import Images

FLOAT16_MAX = 65504.0


@dataclass(kw_only=True)
class Detector(ABC):
    """A method of anomaly localization: learns from good images, and gives maps and scores of others."""

    traits: ClassVar[Traits] = Traits()
    quick: ClassVar[Mapping[str, Any]] = {}
    """Parameters with which a fit ends in seconds, for contract checks; never used to judge the method."""

    image_size: PositiveInt = 256
    """Side of the square, in pixels, that images are resized to."""

    def params(self) -> dict[str, Any]:
        """The hyperparameters by name, as JSON holds them: tuples are lists."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def conflict(self) -> str | None:
        """The reason why parameters that are each within their bounds cannot go together; None where they can."""
        return None

    def check(self) -> None:
        """Raises InvalidInput for a parameter out of its declared bounds, and for some that cannot go together."""
        name = type(self).__name__
        checked(name, type(self), {field.name: getattr(self, field.name) for field in fields(self)})
        why = self.conflict()
        if why is not None:
            raise InvalidInput(f"{name}: {why}")

    def feature_spec(self) -> FeatureSpec | None:
        """The features that the method reads; None for one that works on images alone."""
        return None

    def fit(self, images: Images | ImageSource, runtime: Runtime = Runtime()) -> Self:  # noqa: B008 (frozen)
        """Learn from good images: uint8 [n, h, w, 3], paths, or a source. Raises InvalidInput when there are none."""
        self.check()
        source = self._source(images, runtime)
        if len(source) == 0:
            raise InvalidInput(f"{type(self).__name__}.fit was given no image; it needs at least one good image")
        self._fit(source, runtime)
        self._learn_offsets(source)
        return self

    def partial_fit(self, images: Images | ImageSource, runtime: Runtime = Runtime()) -> Self:  # noqa: B008 (frozen)
        """Learn from more good images as if they had been among the first; the first call is `fit`.

        Raises InvalidInput when there are none, and for a method that cannot (its traits are not `incremental`).
        """
        if not self.traits.incremental:
            raise InvalidInput(f"{type(self).__name__} cannot learn more images on top; fit it on all of them")
        if not self.state_names():
            return self.fit(images, runtime)
        source = self._source(images, runtime)
        if len(source) == 0:
            raise InvalidInput(
                f"{type(self).__name__}.partial_fit was given no image; it needs at least one good image"
            )
        self._update(source, runtime)
        return self

    def predict(self, images: Images | ImageSource | ImageBatch, runtime: Runtime = Runtime()) -> Prediction:  # noqa: B008
        """Maps float32 [n, h, w] and scores float32 [n]; higher is more anomalous."""
        parts = list(self.predict_batches(images, runtime))
        if not parts:
            raise InvalidInput(f"{type(self).__name__}.predict was given no image; it needs at least one")
        return Prediction.concatenate(parts)

    def predict_batches(
        self,
        images: Images | ImageSource | ImageBatch,
        runtime: Runtime = Runtime(),  # noqa: B008 (frozen)
    ) -> Iterator[Prediction]:
        """`predict`, a batch at a time, so that memory does not grow with the number of images."""
        if not self.state_names():
            raise NotFitted(f"{type(self).__name__} has not learned yet: call fit or load_state before predict")
        batches = [images] if isinstance(images, ImageBatch) else self._source(images, runtime)
        for batch in batches:
            yield self._checked(self._predict(batch, runtime))

    def state_names(self) -> list[str]:
        """Names of the learned attributes: those that end in `_`."""
        return sorted(name for name in vars(self) if name.endswith("_") and not name.startswith("_"))

    def state(self) -> dict[str, np.ndarray]:
        """What was learned, as plain arrays. Raises NotFitted."""
        if not self.state_names():
            raise NotFitted(f"{type(self).__name__} has nothing learned to save: call fit first")
        return {name: _plain(getattr(self, name)) for name in self.state_names()}

    def facts(self) -> dict[str, float]:
        """Figures about the learned state, by name, for the record of a fit; empty unless a method has some."""
        return {}

    def curve(self) -> list[tuple[int, float, float]]:
        """The course of a training: (step, training loss, held-out loss or NaN) at each look; empty without one."""
        return []

    def turn_losses(self) -> dict[str, list[float]]:
        """Name of a turn of the training -> its own loss at each look of `curve`; empty unless several took turns."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take back what `state` gave."""
        import torch

        for name, value in state.items():
            setattr(self, name, torch.as_tensor(np.asarray(value)))
        return self

    def tensors(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Maps (n, size, size) and scores (n,) of a batch on the device of the learned attributes, without its ids.

        For methods with the trait `graph`. They take the number of images from the tensors' shapes, so that a graph
        that is exported leaves that number open.
        """
        raise NotImplementedError

    def no_graph(self) -> str | None:
        """The reason why `tensors` is no graph with these parameters; None where it is one."""
        return None if self.traits.graph else "loops over images, takes gradients or asks another library"

    @abstractmethod
    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        """Set the learned attributes."""

    def _update(self, source: ImageSource, runtime: Runtime) -> None:
        """Bring the learned attributes up to date; for methods with the trait `incremental`."""
        raise NotImplementedError

    @abstractmethod
    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        """Map and score one batch."""

    def _learn_offsets(self, source: ImageSource) -> None:
        """Learn `offsets_` (keys, 2), each layer's offset down and right in pixels (`parts/offsets.py`)."""
        import torch

        spec = self.feature_spec()
        if spec is not None:
            found = [source.offsets.get(key, (0.0, 0.0)) for key in spec.keys]
            self.offsets_ = torch.tensor(found, dtype=torch.float64)

    def _offset(self, shares: Mapping[int, float]) -> Offset:
        """The offset of scores to which features contribute by these shares, down and right in pixels: the mean of the
        features' offsets, weighted by the shares."""
        spec = self.feature_spec()
        assert spec is not None  # only scores of features have one
        offsets, whole = dict(zip(spec.keys, self.offsets_.tolist(), strict=True)), sum(shares.values())
        down, right = (sum(share * offsets[key][axis] for key, share in shares.items()) / whole for axis in (0, 1))
        return down, right

    def _source(self, images: Images | ImageSource, runtime: Runtime) -> ImageSource:
        if isinstance(images, ImageSource):
            return images
        from al_models.parts.sources import MemorySource  # needs torch and timm; a pipeline brings its own source

        return MemorySource(images, self, runtime)

    def _checked(self, prediction: Prediction) -> Prediction:
        for what, values in (("map", prediction.maps), ("score", prediction.scores)):
            good = np.isfinite(values) & (np.abs(values) <= FLOAT16_MAX)
            if not good.all():
                first = prediction.ids[int(np.argmin(good.reshape(len(prediction.ids), -1).all(axis=1)))]
                raise InvalidInput(
                    f"{type(self).__name__} gave a {what} that is not finite or beyond ±{FLOAT16_MAX:.0f} for image "
                    f"{first}; check the image for constant areas and the model for a collapsed variance"
                )
        return prediction


def _plain(value: Any) -> np.ndarray:
    # Row by row in memory: safetensors writes the bytes as they lie, and would silently shuffle any other layout.
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value, order="C")
