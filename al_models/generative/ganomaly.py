"""GANomaly: Semi-Supervised Anomaly Detection via Adversarial Training (Akcay, Atapour-Abarghouei, Breckon, ACCV 2018,
arXiv:1805.06725).

The idea: a generator squeezes an image into a code, decodes it, and squeezes what it has decoded into a second code. On
good images it learns to decode the image (contextual loss), to bring the two codes together (encoder loss), and to make
images whose features in a discriminator are those of real ones (adversarial loss, feature matching); the discriminator
learns to tell the two apart. What was never learned is decoded as something good, whose code is another: the score is
the mean squared distance of the two codes.

The paper's and the authors' (isize 32, 15 epochs, batches of 64): DCGAN's blocks, weights and batch norms drawn around
0 and 1 with deviation 0.02, Adam at 2e-4 with a first beta of 0.5, weights 1, 50 and 1 of the adversarial, contextual
(L1) and encoder (L2) losses; the generator learns first in a step; a discriminator whose loss has come below 1e-5 is
initialised anew after its step, its averages and its optimiser's left as they are.

What differs:
- The paper gives a score and no map. The map is the absolute difference of the image and what is decoded, the mean over
  its channels at the network's `side`, upsampled to `image_size`.
- The authors judge with batch norms in training mode (nothing in their code says otherwise), so that a score depends on
  the images it is judged with, and bring the scores of the test set to 0 .. 1. Here the averages of the training are
  used, and scores are left as they are.
- The authors keep the epoch that is best on the test set. Here all epochs are made, or, with `patience`, those until
  the contextual and encoder losses of held-out good images stop falling: an adversary's loss measures no progress.
- The discriminator learns from what the generator makes after its step of the same batch; the authors' learns from what
  it made before.
- Batches are of nearly one size; the authors leave the last, smaller one of an epoch out.
- A `side` that is no power of two has a kernel at the bottleneck as large as what is left of it; the authors' code ends
  only for powers of two.

Some 264 images make 75 steps of 15 epochs, where the paper's data sets make thousands: `epochs` may be raised.

Shapes: n images, s = side, z = latent, size = image_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.epochs import Epochs
from al_models.parts.maps import to_maps
from al_models.parts.train import Draw, Turn
from al_models.trained import Generators, TrainedDetector
from al_models.types import ImageBatch, Runtime, Traits

CERTAIN = 1e-5
"""Loss below which a discriminator is initialised anew: it tells everything apart, and nothing is learned of it."""


def inputs(images: Tensor, side: int) -> Tensor:
    """Images as the networks take them: uint8 (n, size, size, 3) -> float32 (n, 3, s, s) in [-1, 1]."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def pyramid(side: int, width: int) -> tuple[list[int], int]:
    """Channels after each halving of the side, and the side that is left: 4 of a power of two."""
    channels, left = [width], side // 2
    while left >= 8 and left % 2 == 0:
        channels.append(2 * channels[-1])
        left //= 2
    return channels, left


class Encoder(nn.Module):
    """Images (n, 3, s, s) -> codes (n, outputs); `features` are those of the layer before."""

    def __init__(self, side: int, width: int, outputs: int) -> None:
        super().__init__()
        channels, left = pyramid(side, width)
        layers: list[nn.Module] = [_down(3, width), nn.LeakyReLU(0.2)]
        for wide, wider in pairwise(channels):
            layers += [_down(wide, wider), nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(channels[-1], outputs, left, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).flatten(1)


class Decoder(nn.Module):
    """An encoder's mirror image: codes (n, z) -> images (n, 3, s, s) in [-1, 1]."""

    def __init__(self, side: int, width: int, latent: int) -> None:
        super().__init__()
        channels, left = pyramid(side, width)
        widest = channels[-1]
        layers = [nn.ConvTranspose2d(latent, widest, left, bias=False), nn.BatchNorm2d(widest), nn.ReLU()]
        for wider, wide in pairwise(reversed(channels)):
            layers += [_up(wider, wide), nn.BatchNorm2d(wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers, _up(width, 3), nn.Tanh())

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes[..., None, None])


class Generator(nn.Module):
    """Encodes, decodes and encodes again: images (n, 3, s, s) -> decoded ones, and both codes (n, z)."""

    def __init__(self, side: int, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = Encoder(side, width, latent)
        self.decoder = Decoder(side, width, latent)
        self.encoder_again = Encoder(side, width, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.encoder(x)
        decoded = self.decoder(code)
        return decoded, code, self.encoder_again(decoded)


class Discriminator(Encoder):
    """Tells real images from decoded ones: (n, 3, s, s) -> logits (n, 1), high for real ones."""

    last_loss: Tensor

    def __init__(self, side: int, width: int) -> None:
        super().__init__(side, width, 1)
        # A buffer, so that a training that was killed knows it when it goes on.
        self.register_buffer("last_loss", torch.ones(()))

    def renew_if_certain(self) -> None:
        """Draw new weights if those there are leave nothing to learn."""
        if float(self.last_loss) < CERTAIN:
            self.apply(_initialise)


def _down(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False)


def _up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


@dataclass(kw_only=True)
class Ganomaly(TrainedDetector):
    """Encoder, decoder, encoder, and their adversary; learned: `network_` and the losses."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, graph=True)
    training: ClassVar[Mapping[str, Any]] = {"betas": (0.5, 0.999)}
    quick: ClassVar[Mapping[str, Any]] = {"image_size": 64, "width": 8, "latent": 16, "epochs": 60, "batch_size": 6}

    side: Annotated[int, Ge(16), MultipleOf(16)] = 32
    """Side of the square, in pixels, that the networks see; the map's is `image_size`."""
    width: PositiveInt = 64
    """Channels of the networks' outermost convolutions, which double with each halving of the side."""
    latent: PositiveInt = 100
    """Numbers of a code."""
    adversarial_weight: NonNegativeFloat = 1.0
    """Weight of the distance between the discriminator's features of an image and of its reconstruction."""
    contextual_weight: NonNegativeFloat = 50.0
    """Weight of the absolute difference between an image and its reconstruction."""
    encoder_weight: NonNegativeFloat = 1.0
    """Weight of the squared distance between the two codes."""
    epochs: int = 15
    batch_size: int = 64
    learning_rate: float = 2e-4

    def _network(self) -> nn.Module:
        generator = Generator(self.side, self.width, self.latent)
        parts = {"generator": generator, "discriminator": Discriminator(self.side, self.width)}
        return nn.ModuleDict(parts).apply(_initialise)

    def _draw(self, epochs: Epochs, runtime: Runtime) -> Draw:
        return lambda step, generator: inputs(epochs.batch(step).images.to(runtime.device), self.side)

    def _turns(self, network: nn.Module) -> list[Turn]:
        losses = {"generator": self._generator_loss, "discriminator": self._discriminator_loss}
        return [Turn(network[name], partial(loss, network), name) for name, loss in losses.items()]

    def _generator_loss(self, network: nn.Module, x: Tensor) -> Tensor:
        """All three losses of images (n, 3, s, s)."""
        discriminator = network["discriminator"]
        discriminator.renew_if_certain()  # of the step before; its own turn comes later
        decoded, code, again = network["generator"](x)
        with torch.no_grad():
            real = discriminator.features(x)
        adversarial = F.mse_loss(discriminator.features(decoded).float(), real.float())
        return self.adversarial_weight * adversarial + self._faithful(x, decoded, code, again)

    def _faithful(self, x: Tensor, decoded: Tensor, code: Tensor, again: Tensor) -> Tensor:
        """The contextual and the encoder loss."""
        contextual = F.l1_loss(decoded.float(), x)
        return self.contextual_weight * contextual + self.encoder_weight * F.mse_loss(again.float(), code.float())

    def _discriminator_loss(self, network: nn.Module, x: Tensor) -> Tensor:
        """Mean cross-entropy of real images (n, 3, s, s) and of what the generator makes of them."""
        discriminator = network["discriminator"]
        with torch.no_grad():
            decoded, _, _ = network["generator"](x)
        loss = 0.5 * (F.softplus(-discriminator(x).float()).mean() + F.softplus(discriminator(decoded).float()).mean())
        discriminator.last_loss.copy_(loss.detach())
        return loss

    def _held_out_loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        x = inputs(batch.images, self.side)
        return self._faithful(x, *network["generator"](x))

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        x = inputs(batch.images, self.side)
        decoded, code, again = network["generator"](x)
        maps = to_maps((x - decoded.float()).abs().mean(1), self.image_size, sigma=0.0)
        return maps, (code - again).float().square().mean(1)
