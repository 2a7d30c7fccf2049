"""The base of all detectors that learn a network by gradient descent: the training, and saving the network.

A method defines its network, the loss of a batch, and the maps of a batch. It may first set up learned arrays (means,
principal components) from which its network is built. Where several parts of the network take turns, as an adversary
and a generator do, it defines the turns instead of the loss; where it learns in stages, the phases. The network is kept
as `network_`, the course of its losses as `curve_`.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from al_models.detector import Detector
from al_models.errors import InvalidInput
from al_models.parameters import Layers, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from al_models.parts.epochs import Epochs, Prepare, collected, moved, numpy_generators
from al_models.parts.frame import LOOKED_AT, FrameMoments, levelled
from al_models.parts.maps import to_maps
from al_models.parts.patches import layer_scales
from al_models.parts.train import Draw, Phase, TrainPlan, Turn, curve_of, hold_out, losses_of_turns, seeded, train
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Prediction, Runtime, Traits

if TYPE_CHECKING:
    from al_models.parts.sources import Images


_TURN = "_losses_"
"""End of the name of the learned attribute with a turn's losses."""

Generators = Sequence[torch.Generator]
"""A random generator for each image of a batch."""


@dataclass(kw_only=True)
class TrainedDetector(Detector):
    """Learned: `network_`, `curve_` (looks, 3: step, training loss, held-out loss), of a training with several turns
    each one's loss at each look, `TURN_losses_` (looks,), what the method sets up, and with a `frame` its levels
    `frame_` (2, g, g)."""

    traits: ClassVar[Traits] = Traits(trains=True)
    training: ClassVar[Mapping[str, Any]] = {}
    """Fields of the paper's `TrainPlan` beside those below: optimiser, schedule, clip and the like."""

    epochs: PositiveInt = 100
    """Epochs of training, at most."""
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    patience: NonNegativeInt | None = None
    """Looks at held-out good images (10 % of those given; one look an epoch) without improvement after which to stop,
    the best weights kept; None: learn from all images and for all epochs."""
    max_minutes: PositiveFloat | None = None
    """Minutes of training after which to stop; None: no limit."""
    frame: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Width, as a share of the side, of the strip along the rim in which maps are brought to the level of the inside
    (`parts/frame.py`); an image's score is then its map's maximum. 0: the method's own maps and scores."""

    @abstractmethod
    def _network(self) -> nn.Module:
        """The untrained network, built from what `_set_up` learned; random weights come from torch's own generator."""

    def _loss(self, network: nn.Module, batch: Any) -> Tensor:
        """The scalar that training lowers, of a batch from `_draw`; for a method without turns or phases of its own."""
        raise NotImplementedError

    @abstractmethod
    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        """Maps (n, size, size) and scores (n,) of a batch on the device with float32 features.

        `draws` has a random generator on the CPU for each image, so that what is drawn for one does not depend on its
        neighbours. A method with the trait `gradients_in_predict` takes gradients here by `torch.autograd.grad` alone:
        threads share the network, and `backward` would write to it.
        """

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        """Learn what the network is built from, as attributes that end in `_`."""

    def _split(self, n: int, seed: int) -> tuple[list[int], list[int]]:
        """Rows to learn from, and rows to judge by while learning: none without patience."""
        return hold_out(n, seed) if self.patience is not None else (list(range(n)), [])

    def _turns(self, network: nn.Module) -> list[Turn]:
        """The modules that learn in a step, in this order, and their losses; by default the network with its loss."""
        return [Turn(network, partial(self._loss, network))]

    def _phases(
        self, network: nn.Module, source: ImageSource, learn: Sequence[int], held: Sequence[int], runtime: Runtime
    ) -> Iterator[Phase]:
        """The stages of the training, one after the other; by default one, in which all turns learn."""
        prepare = self._prepare(source, learn, runtime)
        with Epochs(source, learn, self.batch_size, runtime.seed, prepare=prepare) as epochs:
            plan = self._plan(self._steps(len(epochs)))
            validate = self._validation(network, source, held, runtime, prepare)
            yield Phase("", self._turns(network), self._draw(epochs, runtime), plan, validate)

    def _finish(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        """Learn what follows from the trained `network_`; `rows` are those held out, or all where none are."""

    def _prepare(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> Prepare | None:
        """What is made of each batch on the CPU, by threads, ahead of the step that learns from it, and of the held-out
        images: something that `to` moves to a device. None: batches are learned from as they are. `rows`: those to
        learn from."""
        return None

    def _draw(self, epochs: Epochs, runtime: Runtime) -> Draw:
        """The function that gives the batch of a step: by default images on the device, their features in float32, or
        what `_prepare` makes of them."""
        return lambda step, generator: moved(epochs.batch(step), runtime.device)

    def _steps(self, batches: int) -> int:
        """Number of steps in an epoch of so many batches of images."""
        return batches

    def _held_out_loss(self, network: nn.Module, batch: Any) -> Tensor:
        """The scalar by which held-out good images, or what is prepared of them, are judged; by default the loss."""
        return self._loss(network, batch)

    def _validation(
        self,
        network: nn.Module,
        source: ImageSource,
        held: Sequence[int],
        runtime: Runtime,
        prepare: Prepare | None = None,
    ) -> Callable[[], float] | None:
        """A function that gives the mean held-out loss of an image; None where nothing is held out. What is prepared of
        an image is the same at each look."""
        parts = [held[i : i + self.batch_size] for i in range(0, len(held), self.batch_size)]

        def loss(part: Sequence[int]) -> float:
            batch = collected(source, part)
            made = prepare(batch, numpy_generators(batch.ids, runtime.seed)) if prepare else batch
            return float(self._held_out_loss(network, moved(made, runtime.device)))

        def validate() -> float:
            return sum(loss(part) * len(part) for part in parts) / len(held)

        return validate if held else None

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        learn, held = self._split(len(source), runtime.seed)
        self._set_up(source, learn, runtime)
        with seeded(runtime.seed, runtime.device):
            network = self._network().to(runtime.device)
        phases = self._phases(network, source, learn, held, runtime)
        histories = train(f"fit {type(self).__name__}", phases, runtime)
        self.curve_ = curve_of(histories)
        for turn, losses in losses_of_turns(histories).items():
            setattr(self, f"{turn}{_TURN}", losses)
        self.network_ = network
        self._finish(source, held or learn, runtime)

    def fit(self, images: Images | ImageSource, runtime: Runtime = Runtime()) -> Self:  # noqa: B008 (frozen)
        """Learn from good images, and then how their maps behave along the rim. Raises InvalidInput."""
        source = self._source(images, runtime)
        super().fit(source, runtime)
        if self.frame:
            self._learn_frame(source, runtime)
        return self

    def _learn_frame(self, source: ImageSource, runtime: Runtime) -> None:
        rows = range(0, len(source), -(-len(source) // LOOKED_AT))
        moments = FrameMoments()
        for batch in source.batches(rows):
            with torch.set_grad_enabled(self.traits.gradients_in_predict):
                maps, _ = self._judge(self.network_, moved(batch, runtime.device), generators_of(batch.ids))
            moments.update(maps.detach())
            runtime.progress(f"fit {type(self).__name__}: frame", moments.count, len(rows))
        self.frame_ = moments.levels(self.frame).cpu()

    def _plan(self, per_epoch: int) -> TrainPlan:
        """The plan of a training by the method's parameters; `per_epoch` is the number of steps in an epoch."""
        return TrainPlan(
            steps=per_epoch * self.epochs,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            check_every=per_epoch,
            patience=self.patience,
            max_minutes=self.max_minutes,
            **self.training,
        )

    def tensors(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Maps (n, size, size) and scores (n,), the features in float32."""
        maps, scores = self._judge(self.network_, batch, generators_of(batch.ids))
        return with_maximum(levelled(maps, self.frame_)) if self.frame else (maps, scores)

    def _predict(self, batch: ImageBatch, runtime: Runtime) -> Prediction:
        self.network_.to(runtime.device)
        with torch.set_grad_enabled(self.traits.gradients_in_predict):
            maps, scores = self.tensors(moved(batch, runtime.device))
        return Prediction(batch.ids, *(values.detach().float().cpu().numpy() for values in (maps, scores)))

    def curve(self) -> list[tuple[int, float, float]]:
        """(step, mean training loss since the last look, held-out loss or NaN) at each look."""
        return [(int(step), float(learned), float(held)) for step, learned, held in getattr(self, "curve_", ())]

    def turn_losses(self) -> dict[str, list[float]]:
        """Name of a turn -> its own mean loss since the last look, at each look of `curve`, and NaN where it had no
        step; empty for a training with one turn."""
        names = [name for name in self.state_names() if name.endswith(_TURN)]
        return {name.removesuffix(_TURN): [float(loss) for loss in getattr(self, name)] for name in names}

    def state(self) -> dict[str, np.ndarray]:
        """The learned arrays, and the network's tensors, each under its own name. Raises NotFitted."""
        network = self.__dict__.pop("network_", None)
        try:
            state = super().state()
        finally:
            if network is not None:
                self.network_ = network
        weights = {f"network_.{name}": value for name, value in self.network_.state_dict().items()}
        return state | {k: np.array(v.cpu().numpy(), order="C") for k, v in weights.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take back what `state` gave. Raises InvalidInput when it is of another network."""
        start = "network_."
        super().load_state({name: value for name, value in state.items() if not name.startswith(start)})
        try:
            with seeded(0):  # the random weights that are replaced at once must not move the caller's generator
                network = self._network().to(memory_format=torch.channels_last)
            network.load_state_dict(
                {k.removeprefix(start): torch.tensor(v) for k, v in state.items() if k.startswith(start)}
            )
        except (RuntimeError, AttributeError) as error:
            params = ", ".join(f"{name} = {value!r}" for name, value in self.params().items())
            raise InvalidInput(
                f"the state is not of {type(self).__name__} with {params} ({error}); "
                "create the detector with the parameters it was fitted with"
            ) from error
        self.network_ = network.eval()
        return self


@dataclass(kw_only=True)
class FeatureTrainedDetector(TrainedDetector):
    """Learns on the stored features of a frozen backbone; learned beside the network: `shapes_` (layers, 4: layer, c,
    h, w), in the order of `layers`."""

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (1, 2, 3)
    weights: str | None = None

    def feature_spec(self) -> FeatureSpec:
        """The layers that are learned on."""
        return FeatureSpec(self.backbone, tuple(self.layers), self.image_size, self.weights)

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        features = source.read(list(rows[:1])).features
        self.shapes_ = torch.tensor([[layer, *features[layer].shape[1:]] for layer in self.layers])

    def _learn_scales(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        """Learn `scale_` (layers,), for methods whose constants are meant for features of the papers' scale."""
        self.scale_ = layer_scales(source, rows, self.layers, runtime.device)

    def _layer_maps(self, scores: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
        """The smoothed maps (n, size, size) of scores (n, h, w), one each for these layers."""
        return [
            to_maps(values, self.image_size, self.sigma, self._offset({layer: 1}))
            for values, layer in zip(scores, layers, strict=True)
        ]

    def _shapes(self) -> list[tuple[int, int, int]]:
        """(c, h, w) of each layer."""
        return [(int(c), int(h), int(w)) for _, c, h, w in self.shapes_.tolist()]


def generators_of(ids: Sequence[str]) -> Generators:
    """A generator on the CPU for each image, seeded by its id alone, so that its map never depends on its batch."""
    return [torch.Generator().manual_seed(zlib.crc32(name.encode())) for name in ids]


def with_maximum(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (n, h, w), and as an image's score its map's maximum."""
    return maps, maps.flatten(1).amax(1)
