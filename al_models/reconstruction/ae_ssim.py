"""SSIM auto-encoder: Bergmann, Löwe, Fauser, Sattlegger, Steger 2019, "Improving Unsupervised Defect Segmentation by
Applying Structural Similarity to Autoencoders", VISAPP, arXiv:1807.02011.

The idea: an auto-encoder whose bottleneck is too narrow for defects learns to reconstruct patches of good texture. It
is trained and judged by structural similarity (SSIM), which compares neighbourhoods in brightness, contrast and
structure: an edge that is a pixel out of place costs little, while a changed structure of the right brightness costs
much. The map is 1 - SSIM of the image and its reconstruction, averaged where patches overlap.

Differs from the paper, or fills in what it leaves open:
- Batches are of 16, drawn with replacement from the 10,000 patches.
- Initial weights are He's (see `_initialise`).
- The SSIM window is the Gaussian one of Wang et al. 2004; the paper gives its size only.
- Training ends before 200 epochs when patches of held-out good images (10 % of those given) stop improving, and the
  best weights are kept.
- A last patch at each border is added to the stride, so that every pixel is covered.
- The image score, which the paper does not define, is the maximum of the map.

Kept from the paper: gray images resized to 256, patches of 128, the network of Table 1 (latent 100 for textures), an
SSIM window of 11, Adam (learning rate 2e-4, weight decay 1e-5), at most 200 epochs of 10,000 patches; at test time
patches at a stride of 30.

Shapes: n images or patches, h = w = image_size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import nn

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.losses import ssim_loss, ssim_map
from al_models.parts.train import Phase, TrainPlan, Turn, hold_out
from al_models.trained import Generators, TrainedDetector, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

CROP = 128
"""Side of a patch, in pixels: the network of Table 1 takes no other."""


def luminance(images: torch.Tensor) -> torch.Tensor:
    """RGB to gray, as ITU-R BT.601 and PIL's "L" do: uint8 (n, h, w, 3) -> uint8 (n, 1, h, w)."""
    red, green, blue = images.to(torch.int32).unbind(-1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]


def cut_patches(source: ImageSource, rows: Sequence[int], count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random gray patches, as evenly from the images of these rows as can be: uint8 (count, 1, 128, 128).

    The images are read once, a batch at a time; memory is 16 kB a patch, whatever the number of images.
    """
    each, left = divmod(count, len(rows))
    wanted = torch.full((len(rows),), each)  # patches of each image
    wanted[torch.randperm(len(rows), generator=generator)[:left]] += 1
    used = wanted.nonzero().flatten().tolist()
    patches, done = torch.empty(count, 1, CROP, CROP, dtype=torch.uint8), 0
    times_each = iter(wanted[used].tolist())
    for batch in source.batches([rows[place] for place in used]):
        for image in luminance(batch.images):  # (1, h, w)
            places = (next(times_each), 2)
            for y, x in torch.randint(0, image.shape[-1] - CROP + 1, places, generator=generator).tolist():
                patches[done] = image[:, y : y + CROP, x : x + CROP]
                done += 1
    return patches


def patch_starts(length: int, stride: int) -> list[int]:
    """First pixels of the patches along a side: every `stride` pixels, and one at the end, so that all is covered."""
    last = length - CROP
    return sorted({*range(0, last + 1, stride), last})


class Autoencoder(nn.Module):
    """Table 1 of the paper and its mirror image: gray patches (n, 1, 128, 128) in [0, 1] -> the same shape."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            _conv(1, 32, 4, 2),  # (n, 32, 64, 64)
            _conv(32, 32, 4, 2),  # (n, 32, 32, 32)
            _conv(32, 32, 3, 1),
            _conv(32, 64, 4, 2),  # (n, 64, 16, 16)
            _conv(64, 64, 3, 1),
            _conv(64, 128, 4, 2),  # (n, 128, 8, 8)
            _conv(128, 64, 3, 1),
            _conv(64, 32, 3, 1),  # (n, 32, 8, 8)
            nn.Conv2d(32, latent, 8),  # (n, latent, 1, 1)
        )
        self.decoder = nn.Sequential(
            _leaky(nn.ConvTranspose2d(latent, 32, 8)),  # (n, 32, 8, 8)
            _conv(32, 64, 3, 1),
            _conv(64, 128, 3, 1),  # (n, 128, 8, 8)
            _deconv(128, 64),  # (n, 64, 16, 16)
            _conv(64, 64, 3, 1),
            _deconv(64, 32),  # (n, 32, 32, 32)
            _conv(32, 32, 3, 1),
            _deconv(32, 32),  # (n, 32, 64, 64)
            nn.ConvTranspose2d(32, 1, 4, 2, 1),  # (n, 1, 128, 128)
        )
        self.apply(_initialise)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(patches))


def _initialise(module: nn.Module) -> None:
    # torch's own initial weights shrink the signal at each of the 18 layers: the output is a plain gray that does not
    # depend on the input, and thousands of steps pass before it does (He et al. 2015, arXiv:1502.01852).
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, a=0.2)
        nn.init.zeros_(module.bias)


def _conv(inputs: int, outputs: int, side: int, stride: int) -> nn.Module:
    return _leaky(nn.Conv2d(inputs, outputs, side, stride, padding=1))


def _deconv(inputs: int, outputs: int) -> nn.Module:
    return _leaky(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1))


def _leaky(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.LeakyReLU(0.2))


@dataclass(kw_only=True)
class AeSsim(TrainedDetector):
    """SSIM auto-encoder on gray patches; learned: `network_` and `curve_`."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {"patches": 12, "batch_size": 4, "epochs": 2, "stride": 64}

    image_size: Annotated[int, Ge(CROP)] = 256
    """Side of the square, in pixels; no smaller than a patch."""
    latent: PositiveInt = 100
    """Size of a patch's latent vector; the paper: 100 for textures, 500 for its nanofibres."""
    window: PositiveInt = 11
    """Side of the SSIM window, in pixels."""
    patches: PositiveInt = 10_000
    """Random patches that are cut out of the training images, and patches of an epoch."""
    epochs: int = 200
    """Epochs of training, at most."""
    batch_size: int = 16
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    stride: PositiveInt = 30
    """Pixels from one test patch to the next."""
    patience: int | None = 8
    """Checks (four an epoch) of held-out patches without improvement after which to stop; None: all epochs."""
    min_improvement: NonNegativeFloat = 0.001
    """Fall of 1 - SSIM that counts as an improvement."""

    def _split(self, n: int, seed: int) -> tuple[list[int], list[int]]:
        return hold_out(n, seed)  # its best weights are kept, with and without patience

    def _phases(
        self, network: nn.Module, source: ImageSource, learn: Sequence[int], held: Sequence[int], runtime: Runtime
    ) -> Iterator[Phase]:
        generator = torch.Generator().manual_seed(runtime.seed)
        patches = cut_patches(source, learn, self.patches, generator)
        judged = cut_patches(source, held, max(1, self.patches // 20), generator) if held else None

        def unit(patches: torch.Tensor) -> torch.Tensor:
            return patches.to(runtime.device).float() / 255

        def draw(step: int, generator: torch.Generator) -> torch.Tensor:
            return unit(patches[torch.randint(0, len(patches), (self.batch_size,), generator=generator)])

        def validate() -> float:
            parts = judged.split(self.batch_size)
            return sum(float(self._loss(network, unit(part))) * len(part) for part in parts) / len(judged)

        plan = self._plan(math.ceil(self.patches / self.batch_size))
        turn = Turn(network, partial(self._loss, network))
        yield Phase("", [turn], draw, plan, validate if held else None)

    def _network(self) -> nn.Module:
        return Autoencoder(self.latent)

    def _plan(self, per_epoch: int) -> TrainPlan:
        four_an_epoch = math.ceil(per_epoch / 4)
        return replace(super()._plan(per_epoch), check_every=four_an_epoch, min_improvement=self.min_improvement)

    def _loss(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """1 - SSIM of gray patches (n, 1, 128, 128) in [0, 1] and their reconstructions: scalar."""
        return ssim_loss(batch, network(batch), side=self.window)

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[torch.Tensor, torch.Tensor]:
        images = luminance(batch.images).float() / 255  # (n, 1, h, w)
        total, times = torch.zeros_like(images), torch.zeros_like(images[:1])
        starts = patch_starts(images.shape[-1], self.stride)
        for y, x in itertools.product(starts, starts):
            patch = images[..., y : y + CROP, x : x + CROP]  # (n, 1, 128, 128)
            total[..., y : y + CROP, x : x + CROP] += 1 - ssim_map(patch, network(patch), side=self.window)
            times[..., y : y + CROP, x : x + CROP] += 1
        return with_maximum((total / times)[:, 0])
