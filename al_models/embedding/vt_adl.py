"""VT-ADL: Mishra, Verk, Fornasier, Piciarelli, Foresti 2021, "VT-ADL: A Vision Transformer Network for Image Anomaly
Detection and Localization", ISIE, arXiv:2104.10036.

The idea: a vision transformer, trained from scratch, encodes the image's patches together with their surroundings. Two
things are learned from the codes at once. A decoder reconstructs the image from a summary of them (mean squared error
and SSIM), and a mixture density network predicts for each code the Gaussian mixture in which it should be likely. The
map is the negative log-likelihood of the patches' codes, upsampled and smoothed (sigma 4).

Differs from the paper and the authors' code:
- Images have 256 pixels and patches 32 (the paper: 512 and 64), which keeps 8 x 8 patches. Finer patches would give
  finer maps, but the codes need more channels than there are patches, or the position codes alone fill them.
- Codes have 128 channels and the feed-forward 256 (the paper: 512 and 1024).
- A mixture has 10 Gaussians, as in the code, instead of the paper's 150, which make steps much slower.
- The likelihood is that of the mixture, in nats a channel. The code averages the Gaussians' own likelihoods, which is a
  bound, and sums over patches and channels; beside that sum the reconstruction counts for nothing, and nothing about
  defects was learned.
- Position codes begin small (deviation 0.02, theirs 1).
- The authors' summary is a capsule layer; routed to a single capsule it is a linear map, which ours is.
- The decoder has their number of layers and channels, at sizes that grow evenly to any image size.
- The score is the map's maximum.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the paper's form.

Kept from the paper: 6 blocks, 8 heads; Gaussian noise of 0.2 on the codes during training; loss 5 MSE + 0.5 SSIM + NLL;
Adam at 1e-4, weight decay 1e-4, batches of 8, 400 epochs. Kept from the code: a Gaussian has a variance for each
channel, which is never below 1, and the likelihood trains the encoder, too.

Shapes: n images, t patches, d channels of a code, k Gaussians.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.frame import FRAME
from al_models.parts.losses import ssim_loss
from al_models.parts.maps import SIGMA, to_maps
from al_models.trained import Generators, TrainedDetector, with_maximum
from al_models.types import ImageBatch, Traits

_SEED = 8
"""Side and channels of the map that the decoder begins with, as in the authors' code."""
_WIDTHS = (16, 32, 32, 16, 8, 3)
"""Channels of the decoder's layers."""


def patches_of(images: Tensor, side: int) -> Tensor:
    """Images (n, c, h, w) -> their patches (n, t, c * side * side), row by row."""
    return F.unfold(images, side, stride=side).transpose(1, 2)


def mixture_nll(x: Tensor, logits: Tensor, means: Tensor, log_variances: Tensor) -> Tensor:
    """Negative log-likelihood of vectors, each in a mixture of its own, in nats a channel.

    x (..., d), logits (..., k), means and log_variances (..., k, d) -> (...). Never infinite for finite arguments: the
    densities are summed as logarithms.
    """
    squared = (x[..., None, :] - means).square() * (-log_variances).exp()
    each = -0.5 * (squared + log_variances + math.log(2 * math.pi)).sum(-1)  # (..., k)
    return -torch.logsumexp(F.log_softmax(logits, -1) + each, -1) / x.shape[-1]


class Block(nn.Module):
    """A transformer's block, normalised before attention and before its two layers: (n, t, d) -> the same."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5  # the authors divide by the root of all channels, not of a head's
        self.before_attention, self.before_layers = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend, self.join = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        parts = self.attend(self.before_attention(x)).view(n, t, 3, self.heads, d // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (n, heads, t, d / heads)
        seen = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        x = x + self.join(seen.transpose(1, 2).reshape(n, t, d))
        return x + self.layers(self.before_layers(x))


class Encoder(nn.Module):
    """Images (n, 3, h, w) -> codes of their patches (n, t, d)."""

    def __init__(self, patches: int, side: int, dim: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.side = side
        self.embed = nn.Linear(3 * side * side, dim)
        self.place = nn.Parameter(0.02 * torch.randn(1, 1 + patches, dim))
        self.whole = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, hidden) for _ in range(depth)])

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(patches_of(images, self.side))
        tokens = torch.cat([self.whole.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.place
        return self.blocks(tokens)[:, 1:]


class Decoder(nn.Module):
    """Codes (n, t, d) -> reconstructions (n, 3, size, size), by way of one summary vector an image."""

    def __init__(self, codes: int, size: int) -> None:
        super().__init__()
        self.summarise = nn.Linear(codes, _SEED**3, bias=False)
        steps = len(_WIDTHS)
        self.sizes = [round(_SEED * (size / _SEED) ** (step / steps)) for step in range(1, steps + 1)]
        self.layers = nn.ModuleList()
        before = _SEED
        for width in _WIDTHS:
            last = width == _WIDTHS[-1]
            after = nn.Tanh() if last else nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
            self.layers.append(nn.Sequential(nn.Conv2d(before, width, 3, padding=1), after))
            before = width

    def forward(self, codes: Tensor) -> Tensor:
        # The summary, squashed to a length below 1 as a capsule's is, is the first map; each layer enlarges it.
        summary = self.summarise(codes.flatten(1))
        length = summary.float().square().sum(1, keepdim=True)
        x = (summary * length.sqrt() / (1 + length)).view(-1, _SEED, _SEED, _SEED)  # (n, 8, 8, 8)
        for size, layer in zip(self.sizes, self.layers, strict=True):
            x = layer(F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False))
        return x


class Density(nn.Module):
    """Codes (..., d) -> logits (..., k), means and log variances (..., k, d) of a mixture for each."""

    def __init__(self, dim: int, gaussians: int) -> None:
        super().__init__()
        self.logits = nn.Linear(dim, gaussians, bias=False)
        self.means = nn.Linear(dim, gaussians * dim, bias=False)
        self.variances = nn.Linear(dim, gaussians * dim, bias=False)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = codes.relu()
        means, variances = (layer(x).unflatten(-1, (-1, codes.shape[-1])) for layer in (self.means, self.variances))
        return self.logits(x).float(), means.float(), F.softplus(variances.float())  # no variance below 1


class VisionTransformer(nn.Module):
    """Images (n, 3, h, w) in [0, 1] -> the negative log-likelihood of their patches' codes (n, t), and their
    reconstructions (n, 3, h, w)."""

    def __init__(self, encoder: Encoder, decoder: Decoder, density: Density, noise: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.density, self.noise = encoder, decoder, density, noise
        for module in [*encoder.modules(), *decoder.modules()]:
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(decoder.summarise.weight, std=0.01)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.encoder(images)
        if self.training:
            codes = codes + self.noise * torch.randn_like(codes)
        return mixture_nll(codes.float(), *self.density(codes)), self.decoder(codes)


@dataclass(kw_only=True)
class VtAdl(TrainedDetector):
    """The negative log-likelihood of each patch's code, in a Gaussian mixture that is predicted from the code."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {
        "image_size": 64,
        "patch": 8,
        "dim": 32,
        "depth": 1,
        "hidden": 64,
        "gaussians": 4,
        "epochs": 40,
        "learning_rate": 3e-3,
    }

    patch: PositiveInt = 32
    """Side of a patch, in pixels; must divide `image_size`."""
    dim: PositiveInt = 128
    """Channels of a code."""
    depth: PositiveInt = 6
    """Transformer blocks."""
    heads: PositiveInt = 8
    """Attention heads of a block."""
    hidden: PositiveInt = 256
    """Channels between the two layers of a block."""
    gaussians: PositiveInt = 10
    """Components of the mixture."""
    noise: NonNegativeFloat = 0.2
    """Standard deviation of the noise on the codes while training."""
    mse_weight: NonNegativeFloat = 5.0
    """Weight of the squared error, against 1 of the likelihood."""
    ssim_weight: NonNegativeFloat = 0.5
    """Weight of 1 - SSIM."""
    epochs: int = 400
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    frame: float = FRAME
    sigma: NonNegativeFloat = SIGMA

    def conflict(self) -> str | None:
        """As Detector."""
        if self.image_size % self.patch or self.image_size < 2 * self.patch:
            return f"patch={self.patch} does not divide image_size={self.image_size} into two or more a side"
        if self.dim % self.heads:
            return f"heads={self.heads} do not divide dim={self.dim}; give heads that do"
        return None

    def _network(self) -> nn.Module:
        patches = (self.image_size // self.patch) ** 2
        return VisionTransformer(
            Encoder(patches, self.patch, self.dim, self.depth, self.heads, self.hidden),
            Decoder(patches * self.dim, self.image_size),
            Density(self.dim, self.gaussians),
            self.noise,
        )

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        images = _unit(batch)
        nll, made = network(images)
        reconstruction = self.mse_weight * F.mse_loss(made.float(), images)
        return reconstruction + self.ssim_weight * ssim_loss(images, made) + nll.mean()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        nll, _ = network(_unit(batch))
        side = self.image_size // self.patch
        return with_maximum(to_maps(nll.view(-1, side, side), self.image_size, self.sigma))


def _unit(batch: ImageBatch) -> Tensor:
    assert batch.images is not None
    return batch.images.permute(0, 3, 1, 2).float() / 255  # (n, 3, h, w)
