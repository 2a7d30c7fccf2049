"""f-AnoGAN: Fast Unsupervised Anomaly Detection with Generative Adversarial Networks (Schlegl, Seeböck, Waldstein,
Langs, Schmidt-Erfurth, Medical Image Analysis 54, 2019, doi:10.1016/j.media.2019.01.010).

The idea: a generator learns to make good images out of noise, against a critic (a Wasserstein GAN with gradient
penalty). Both are then frozen, and an encoder learns to find the noise of which the generator makes a given image, so
that the image and the critic's features of it come back (izi_f). An image that no noise gives is anomalous: the score
is the mean squared residual of the image, plus kappa times that of the features.

The paper's and the authors' (code of 2019): images of 64 pixels, noise of 128 numbers, residual networks of 64 channels
at the full side and 512 at 4 x 4, with layer norms in the critic and batch norms in generator and encoder; five steps
of the critic for one of the generator, a penalty of 10, Adam at 1e-4 with betas of 0 and 0.9; then 50,000 steps of the
encoder by RMSProp at 5e-5, kappa 1.

What differs:
- Whole images of three channels are resized to `side`, as a re-implementation for MVTec AD does (A03ki/f-AnoGAN); the
  authors cut gray patches of 64 pixels out of retinal scans. The map is the absolute difference of the image and what
  comes back, the mean over its channels, upsampled to `image_size`.
- The authors' batches are of 64 patches; 50,000 of a few hundred images would be learned by heart. Each phase takes
  that re-implementation's 300 epochs of batches of 32. An epoch's batches are the critic's; each fifth is the
  generator's, too.
- The generator's averages for judging move whenever it makes images, the authors' in its own steps alone.
- RMSProp's mean of squares begins at 0, the authors' at 1, which makes their first hundred steps smaller.
- With `patience` the encoder is judged by its loss on held-out good images; the adversaries make all steps, since no
  loss of theirs measures progress. Of `max_minutes` they take two thirds.
- The generator's convolutions of a block have no bias. The batch norm behind takes it away, so that its slope is
  nothing but rounding, which Adam without a first mean makes whole steps of.
- A convolution before a halving, or after a doubling, is computed as one of 4 x 4 and a stride of 2: the same numbers.

Shapes: n images, s = side, z = latent, c channels, size = image_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveFloat, PositiveInt
from al_models.parts.epochs import Epochs
from al_models.parts.maps import to_maps
from al_models.parts.train import Draw, Phase, Turn
from al_models.trained import Generators, TrainedDetector
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

HALVINGS = 4
"""Residual blocks of each network."""
WIDER = (1, 2, 4, 8, 8)
"""Channels before, between and after the blocks of critic and encoder, in widths."""


def inputs(images: Tensor, side: int) -> Tensor:
    """Images as the networks take them: uint8 (n, size, size, 3) -> float32 (n, 3, s, s) in [-1, 1]."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def gradient_penalty(critic: nn.Module, real: Tensor, made: Tensor) -> Tensor:
    """Mean squared distance from 1 of the critic's slope, at a random place between each real image and a made one."""
    with torch.autocast(real.device.type, enabled=False):  # a slope of a rounded slope would be noise
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        between = (real + share * (made.float() - real)).requires_grad_(True)
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class ConvolutionThenHalf(nn.Conv2d):
    """3 x 3, then the mean of each 2 x 2: (n, c, h, w) -> (n, outputs, h / 2, w / 2)."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = F.avg_pool2d(self.weight, 2, stride=1, padding=1)  # (outputs, c, 4, 4)
        return F.conv2d(x, kernel, self.bias, stride=2, padding=1)


class DoubleThenConvolution(nn.Conv2d):
    """Each pixel twice as high and wide, then 3 x 3: (n, c, h, w) -> (n, outputs, 2 h, 2 w)."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = 4 * F.avg_pool2d(self.weight.flip(2, 3), 2, stride=1, padding=1)  # (outputs, c, 4, 4)
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class HalvingBlock(nn.Module):
    """A residual block of critic and encoder: (n, c, h, w) -> (n, outputs, h / 2, w / 2)."""

    def __init__(self, inputs: int, outputs: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1))
        self.residual = nn.Sequential(
            norm(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, inputs, 3, padding=1, bias=False),
            norm(inputs),
            nn.ReLU(),
            ConvolutionThenHalf(inputs, outputs, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class DoublingBlock(nn.Module):
    """A residual block of the generator: (n, c, h, w) -> (n, outputs, 2 h, 2 w)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.Upsample(scale_factor=2))
        self.residual = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            DoubleThenConvolution(inputs, outputs, 3, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


class LayerNorm(nn.GroupNorm):
    """Brings all of an image's channels and positions together to mean 0 and deviation 1: the critic may not see one
    image in the light of another."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


class Tower(nn.Module):
    """Critic and encoder: images (n, 3, s, s) -> (n, outputs), by features (n, 8 width (s / 16)^2)."""

    def __init__(self, side: int, width: int, outputs: int, norm: type[nn.Module]) -> None:
        super().__init__()
        blocks = [HalvingBlock(WIDER[i] * width, WIDER[i + 1] * width, norm) for i in range(HALVINGS)]
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, nn.Flatten())
        self.head = nn.Linear(WIDER[-1] * width * (side >> HALVINGS) ** 2, outputs)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Generator(nn.Module):
    """Noise (n, z) -> images (n, 3, s, s) in [-1, 1]."""

    def __init__(self, side: int, width: int, latent: int) -> None:
        super().__init__()
        self.start = (WIDER[-1] * width, side >> HALVINGS, side >> HALVINGS)
        self.widen = nn.Linear(latent, WIDER[-1] * width * (side >> HALVINGS) ** 2)
        blocks = [DoublingBlock(WIDER[i + 1] * width, WIDER[i] * width) for i in reversed(range(HALVINGS))]
        self.image = nn.Sequential(
            *blocks, nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1), nn.Tanh()
        )
        _initialise(self)

    def forward(self, noise: Tensor) -> Tensor:
        return self.image(self.widen(noise).unflatten(1, self.start))


def _initialise(network: nn.Module) -> None:
    """He's scale of the mean of inputs and outputs for what follows a ReLU (all of 3 x 3 but the first), else
    Glorot's."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rectified = isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels != 3
            nn.init.xavier_uniform_(module.weight, gain=2**0.5 if rectified else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@dataclass(kw_only=True)
class FAnogan(TrainedDetector):
    """Generator, critic and encoder; learned: `network_` and the losses."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, graph=True)
    training: ClassVar[Mapping[str, Any]] = {"betas": (0.0, 0.9)}
    quick: ClassVar[Mapping[str, Any]] = {
        "image_size": 64,
        "side": 32,
        "width": 4,
        "latent": 8,
        "critic_steps": 2,
        "penalty_weight": 1.0,
        "epochs": 30,
        "encoder_epochs": 30,
        "batch_size": 6,
        "learning_rate": 6e-3,
        "encoder_learning_rate": 3e-3,
    }

    side: Annotated[int, Ge(32), MultipleOf(16)] = 64
    """Side of the square, in pixels, that the networks see; the map's is `image_size`."""
    width: PositiveInt = 64
    """Channels of the networks at the full side, eight times as many at the smallest."""
    latent: PositiveInt = 128
    """Numbers of the noise that an image is made of."""
    critic_steps: PositiveInt = 5
    """Steps of the critic for one of the generator."""
    penalty_weight: NonNegativeFloat = 10.0
    """Weight of the gradient penalty in the critic's loss."""
    feature_weight: NonNegativeFloat = 1.0
    """Kappa: weight of the features' residual, in the encoder's loss and in the score."""
    epochs: int = 300
    """Of the adversaries, counted in the critic's steps."""
    encoder_epochs: PositiveInt = 300
    """Epochs of the encoder's training, on the frozen generator and critic."""
    learning_rate: float = 1e-4
    encoder_learning_rate: PositiveFloat = 5e-5
    """The learning rate of the encoder."""

    def _network(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "generator": Generator(self.side, self.width, self.latent),
                "critic": Tower(self.side, self.width, 1, LayerNorm),
                "encoder": Tower(self.side, self.width, self.latent, nn.BatchNorm2d),
            }
        )

    def _phases(
        self, network: nn.Module, source: ImageSource, learn: Sequence[int], held: Sequence[int], runtime: Runtime
    ) -> Iterator[Phase]:
        with Epochs(source, learn, self.batch_size, runtime.seed) as epochs:
            draw, plan = self._draw(epochs, runtime), self._plan(len(epochs))
            minutes = self.max_minutes and self.max_minutes / 3
            adversaries = [
                Turn(network["critic"], partial(self._critic_loss, network), "critic"),
                Turn(
                    network["generator"], partial(self._generator_loss, network), "generator", every=self.critic_steps
                ),
            ]
            yield Phase(
                "adversaries", adversaries, draw, replace(plan, patience=None, max_minutes=minutes and 2 * minutes)
            )
            for frozen in ("generator", "critic"):  # which have been left in eval mode
                network[frozen].requires_grad_(False)
            plan = replace(
                plan,
                steps=len(epochs) * self.encoder_epochs,
                learning_rate=self.encoder_learning_rate,
                optimiser="rmsprop",
                eps=1e-10,
                max_minutes=minutes,
            )
            encoder = Turn(network["encoder"], partial(self._encoder_loss, network), "encoder")
            yield Phase("encoder", [encoder], draw, plan, self._validation(network, source, held, runtime))

    def _draw(self, epochs: Epochs, runtime: Runtime) -> Draw:
        return lambda step, generator: inputs(epochs.batch(step).images.to(runtime.device), self.side)

    def _made(self, network: nn.Module, like: Tensor) -> Tensor:
        """As many images out of noise as there are in a batch."""
        return network["generator"](torch.randn(len(like), self.latent, device=like.device))

    def _critic_loss(self, network: nn.Module, x: Tensor) -> Tensor:
        """How much more made images please the critic than real ones (n, 3, s, s), and the gradient penalty."""
        critic = network["critic"]
        with torch.no_grad():
            made = self._made(network, x)
        gap = critic(made).float().mean() - critic(x).float().mean()
        return gap + self.penalty_weight * gradient_penalty(critic, x, made)

    def _generator_loss(self, network: nn.Module, x: Tensor) -> Tensor:
        """How little made images please the critic."""
        return -network["critic"](self._made(network, x)).float().mean()

    def _encoder_loss(self, network: nn.Module, x: Tensor) -> Tensor:
        """Mean score of images (n, 3, s, s)."""
        return self._returned(network, x)[1].mean()

    def _held_out_loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        return self._encoder_loss(network, inputs(batch.images, self.side))

    def _returned(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """What comes back of images (n, 3, s, s), and their scores (n,)."""
        found = network["generator"](network["encoder"](x))
        real, made = (network["critic"].features(images).float() for images in (x, found))
        residual = (x - found.float()).square().mean((1, 2, 3))
        return found.float(), residual + self.feature_weight * (real - made).square().mean(1)

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        x = inputs(batch.images, self.side)
        found, scores = self._returned(network, x)
        return to_maps((x - found).abs().mean(1), self.image_size, sigma=0.0), scores
