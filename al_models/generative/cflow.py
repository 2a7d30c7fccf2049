"""CFLOW-AD: Real-Time Unsupervised Anomaly Detection with Localization via Conditional Normalizing Flows (Gudovskiy,
Ishizaka and Kozuka 2022, WACV, arXiv:2107.12571).

The idea: a normalizing flow for each layer of a frozen backbone maps the feature vector of a position to a standard
normal, so that good features get a high likelihood. Every coupling is conditioned on the position's place in the image,
given as a vector of sines and cosines, so that one flow learns what is usual where. A layer's score is how far a
position's likelihood stays below the highest one of good images. The scores of all layers are upsampled and summed to
the map, whose maximum is the image's score.

Differs from the paper:
- Layers are brought to the scale of the papers' features (`parts/patches.py`, RECTIFIED).
- A step takes 8 positions of all 32 images instead of 256 vectors drawn from anywhere in them. The product of the
  hidden layer with the position vector, most of its input, is then computed once a position instead of once a vector,
  which takes a fourth of the work.
- The likelihood that counts as fully good is the highest of the training images. The authors take that of the test
  images, which a production line does not have.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the paper's form.

Kept from the paper and the authors' code: layers of stride 8, 16 and 32; 8 coupling blocks a layer, each an affine half
coupling (log-scale clamped at 1.9), a learned scale of each channel and a random rotation; subnets of one hidden layer,
twice as wide as their input; 128 numbers for the position; the loss -log sigmoid of the log-likelihood a channel; Adam
at 2e-4, batches of 32 images, 2 meta-epochs of warm-up, then a cosine, over 25 meta-epochs of 8 epochs.

Shapes: n images, p = h * w positions, c channels, d numbers of the position vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.errors import InvalidInput
from al_models.parameters import Layers, NonNegativeFloat, PositiveFloat, PositiveInt
from al_models.parts.coupling import Flow, HalfCoupling, Rotation, Scale, log_likelihood
from al_models.parts.epochs import Epochs, moved
from al_models.parts.frame import FRAME
from al_models.parts.patches import unit_layers
from al_models.parts.train import Draw, TrainPlan
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

WARM_UP = 16
"""Epochs: 2 meta-epochs."""


def position_vectors(h: int, w: int, d: int) -> Tensor:
    """Sines and cosines of a position's column (first half of d) and row (second half): float32 (h * w, d).

    Wavelengths from 2 pi to 20,000 pi (Vaswani et al. 2017, section 3.5, in two dimensions). Raises InvalidInput when
    d is no multiple of 4.
    """
    if d % 4:
        raise InvalidInput(f"condition = {d}; a position is d / 4 sines and cosines of each axis: give a multiple of 4")
    rates = torch.exp(torch.arange(0, d // 2, 2) * -(math.log(10_000) / (d // 2)))  # (d / 4,)

    def waves(length: int) -> Tensor:
        angles = torch.arange(length)[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # (length, d / 2)

    columns, rows = waves(w).expand(h, w, d // 2), waves(h)[:, None].expand(h, w, d // 2)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


class PositionedSubnet(nn.Module):
    """One hidden layer over a vector and its position; each position belongs to n / m neighbouring vectors.

    Its parameters are those of a perceptron on the two joined; only the product with the position is shared.
    """

    def __init__(self, inputs: int, outputs: int, d: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.hidden = nn.Linear(inputs + d, 2 * (inputs + d))
        self.out = nn.Linear(2 * (inputs + d), outputs)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (n, c), positions (m, d) with m a divisor of n -> (n, outputs)."""
        weight = self.hidden.weight
        placed = F.linear(positions, weight[:, self.inputs :], self.hidden.bias)  # (m, hidden)
        hidden = F.linear(x, weight[:, : self.inputs]).unflatten(0, (len(positions), -1)) + placed[:, None]
        return self.out(F.relu(hidden.flatten(0, 1)))


class Decoder(nn.Module):
    """The flow of one layer: feature vectors and their positions -> log-likelihood a channel."""

    def __init__(self, channels: int, h: int, w: int, blocks: int, clamp: float, d: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("positions", position_vectors(h, w, d), persistent=False)

        def subnet(inputs: int, outputs: int) -> nn.Module:
            return PositionedSubnet(inputs, outputs, d)

        self.flow = Flow(
            [
                block
                for _ in range(blocks)
                for block in (HalfCoupling(channels, subnet, clamp=clamp), Scale(channels), Rotation(channels))
            ]
        )

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """x (m, n, c): the vectors of n images at each of m places (m,) -> (m, n)."""
        z, logdet = self.flow(x.flatten(0, 1), self.positions[places])
        return (log_likelihood(z, logdet) / self.channels).view(x.shape[:2])


@dataclass(frozen=True)
class Vectors:
    """Some positions of one layer, of all images of a batch."""

    layer: int
    """Index into `layers`."""
    places: Tensor
    """int64 (m,), positions of the layer."""
    x: Tensor
    """float32 (m, n, c)."""


@dataclass(kw_only=True)
class Cflow(FeatureTrainedDetector):
    """A conditional flow a layer; learned beside the network: `scale_` (layers,), and `highest_` (layers,), the
    log-likelihood a channel of the likeliest training vector."""

    traits: ClassVar[Traits] = Traits(trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {"layers": (2, 3), "blocks": 2, "epochs": 4, "learning_rate": 2e-3}
    training: ClassVar[Mapping[str, Any]] = {"schedule": "cosine"}

    layers: Layers = (2, 3, 4)
    epochs: int = 200
    learning_rate: float = 2e-4
    blocks: PositiveInt = 8
    """Coupling blocks a layer."""
    condition: Annotated[int, Ge(4), MultipleOf(4)] = 128
    """Numbers that encode a position; a multiple of 4."""
    clamp: PositiveFloat = 1.9
    """Largest log-scale of a coupling."""
    step_positions: PositiveInt = 8
    """Positions learned in a step: with 32 images 256 vectors, as in the paper."""
    frame: float = FRAME
    sigma: NonNegativeFloat = 0.0
    """Gaussian smoothing of the map, in pixels; the paper has none."""

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        self._learn_scales(source, rows, runtime)

    def _network(self) -> nn.Module:
        return nn.ModuleList(Decoder(c, h, w, self.blocks, self.clamp, self.condition) for c, h, w in self._shapes())

    def _steps(self, batches: int) -> int:
        return batches * sum(self._parts())

    def _parts(self) -> list[int]:
        """Steps that a batch of images takes in each layer."""
        return [-(-h * w // self.step_positions) for _, h, w in self._shapes()]

    def _plan(self, per_epoch: int) -> TrainPlan:
        return replace(super()._plan(per_epoch), warm_up=min(WARM_UP, self.epochs // 10) * per_epoch)

    def _draw(self, epochs: Epochs, runtime: Runtime) -> Draw:
        """The vectors of a step: batch by batch and layer by layer, a few of its positions in random order."""
        layers = [(layer, part) for layer, parts in enumerate(self._parts()) for part in range(parts)]
        held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def draw(step: int, generator: torch.Generator) -> Vectors:
            batch, index = divmod(step, len(layers))
            layer, part = layers[index]
            if (batch, layer) not in held:
                held.clear()
                x = _by_position(self._unit(moved(epochs.batch(batch), runtime.device))[layer])
                # The order depends on batch and layer alone, so that a resumed training draws the same vectors.
                order = torch.Generator().manual_seed(runtime.seed + 7919 * (batch * len(self.layers) + layer))
                held[batch, layer] = x, torch.randperm(len(x), generator=order).to(x.device)
            x, shuffled = held[batch, layer]
            places = shuffled[part * self.step_positions :][: self.step_positions]
            return Vectors(layer, places, x[places])

        return draw

    def _loss(self, network: nn.Module, batch: Vectors) -> Tensor:
        decoder: Decoder = network[batch.layer]  # type: ignore[index]
        return -F.logsigmoid(decoder(batch.x, batch.places)).mean()

    def _held_out_loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        losses = [-F.logsigmoid(found).mean() for found in self._likelihoods(network, batch)]
        return torch.stack(losses).mean()

    def _finish(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        self.highest_ = torch.full((len(self.layers),), -torch.inf)
        with torch.no_grad():
            for batch in source:
                found = self._likelihoods(self.network_, moved(batch, runtime.device))
                self.highest_ = self.highest_.maximum(torch.stack([x.max() for x in found]).cpu())

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        scores = []
        for found, highest, (_, h, w) in zip(
            self._likelihoods(network, batch), self.highest_.tolist(), self._shapes(), strict=True
        ):
            lacking = 1 - (found - highest).clamp(max=0).exp()  # (p, n), 0 where as likely as the likeliest
            scores.append(lacking.T.reshape(-1, h, w))
        return with_maximum(torch.stack(self._layer_maps(scores, self.layers)).sum(0))

    def _likelihoods(self, network: nn.Module, batch: ImageBatch) -> list[Tensor]:
        """Log-likelihoods (p, n) of each layer, divided by its channels."""
        found = []
        for x, decoder in zip(map(_by_position, self._unit(batch)), network, strict=True):  # type: ignore[arg-type]
            found.append(decoder(x, torch.arange(len(x), device=x.device)))
        return found

    def _unit(self, batch: ImageBatch) -> list[Tensor]:
        """The layers at the scale of the papers' features."""
        return unit_layers(batch.features, self.layers, self.scale_)


def _by_position(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (p, n, c)."""
    return x.flatten(2).permute(2, 0, 1).contiguous()
