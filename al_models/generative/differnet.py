"""DifferNet: Same Same But DifferNet, Semi-Supervised Defect Detection with Normalizing Flows (Rudolph, Wandt and
Rosenhahn 2021, arXiv:2008.12577).

The idea: the features of a frozen network, averaged over the positions of the whole image at each of three image sizes,
make one vector an image. A normalizing flow learns the density of these vectors for good images turned by random
angles. At test time an image is judged at many angles, and its score is the mean square of z. The map is the gradient
of -log p with respect to the pixels: turned back, smoothed, in absolute value, and averaged over the angles.

Differs from the paper:
- The image is seen at 256, 128 and 64 px by EfficientNet-Lite0 at stride 16, instead of 448, 224 and 112 px by AlexNet.
  The features are taken where they are rectified (`location`), as AlexNet's are; with unrectified ones the gradient is
  largest where an image is smooth, not where it is unusual.
- Features are stored for upright images only, so this method reads images. Their vectors at all `rotations` angles,
  equally far apart, are made once before training, which draws 4 of them for an image and step; the authors draw any
  angle.
- Scores are of the same angles as maps.
- Vectors are standardised, since many channels hardly ever fire on good images and tell the most when they do.
- z grows so fast off the good images that maps and scores are given as log(1 + x); the authors square the map. Neither
  changes an order.

Kept from the paper and the authors' code (github.com/marco-rudolph/differnet): 8 blocks of a random permutation and a
coupling, whose subnets have three hidden layers of 2048 units; log-scales within ±3; Adam at 2e-4 (betas 0.8 and 0.8,
eps 1e-4, weight decay 1e-5), 192 epochs of batches of 24 images at 4 random angles each; 64 angles in testing;
gradients smoothed with a Gaussian of 3 pixels.

Shapes: n images, r rotations of each, m of all these that are in one pass, d numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import MinLen
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import Layers, NonNegativeFloat, PositiveFloat, PositiveInt
from al_models.parts.backbone import cached_backbone, standardised
from al_models.parts.coupling import Block, Coupling, Permutation, log_likelihood
from al_models.parts.maps import to_maps
from al_models.trained import Generators, TrainedDetector
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Runtime, Traits

AT_ONCE = 32
"""Rotations of an image in one pass of the backbone, which bounds the memory."""
LARGEST = 1e6
"""Beyond this a block's outcome is cut off, as in the authors' code: else the rarest images' squares could overflow."""
VECTORS = 0
"""Key of the vectors in a training batch."""


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Square images (m, c, h, w), turned anticlockwise about their centres, each by its own angle (m,) in degrees.

    Bilinear, and zero where the turned image does not reach.
    """
    angle = torch.deg2rad(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)  # (m, h, w, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def rotated(image: Tensor, rotations: int, spec: FeatureSpec) -> Iterator[tuple[Tensor, Tensor]]:
    """Rotations of an image, uint8 (h, w, 3), equally far apart, some at a time: pixels as the backbone takes them
    (m, 3, h, w), and the angles (m,) in degrees.

    A pass holds one image alone: the rounding of a convolution depends on how many images it is given, and where
    that turns a ReLU on or off the gradient jumps, so an image's map would depend on its neighbours.
    """
    pixels = image.permute(2, 0, 1).float()  # (3, h, w)
    for by in (torch.arange(rotations, device=image.device) * 360 / rotations).split(AT_ONCE):
        several = turned(pixels.expand(len(by), -1, -1, -1), by)  # (m, 3, h, w)
        yield standardised(several.permute(0, 2, 3, 1), spec), by


def pooled(features: Mapping[int, Tensor]) -> Tensor:
    """Each channel's mean over its positions, scale by scale and layer by layer: (m, d)."""
    return torch.cat([x.mean((2, 3)) for x in features.values()], dim=1)


class Vectors(ImageSource):
    """Images of another source as their vectors at all rotations, made once and kept: float32 (n, r, d)."""

    def __init__(self, source: ImageSource, rotations: int, spec: FeatureSpec, runtime: Runtime) -> None:
        self.ids, self.batch_size = source.ids, source.batch_size
        backbone, done = cached_backbone(spec, runtime.device), 0
        for batch in source:
            for image in batch.images.to(runtime.device):
                found = torch.cat([pooled(backbone.features(x)) for x, _ in rotated(image, rotations, spec)])  # (r, d)
                if not done:
                    self.vectors = torch.empty(len(source), *found.shape)
                self.vectors[done] = found.cpu()
                done += 1
            runtime.progress("fit DifferNet: rotations", done, len(source))

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """The vectors of these rows."""
        return ImageBatch(tuple(self.ids[row] for row in rows), features={VECTORS: self.vectors[list(rows)]})


def dense(inputs: int, outputs: int, hidden: int) -> nn.Module:
    """The network in a coupling, (m, inputs) -> (m, outputs), with three hidden layers."""
    layers: list[nn.Module] = []
    for width in (inputs, hidden, hidden):
        layers += [nn.Linear(width, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class VectorFlow(nn.Module):
    """Vectors (m, d) -> (z (m, d), log |dz / dx| (m,)), the vectors standardised first."""

    def __init__(self, mean: Tensor, spread: Tensor, *, blocks: int, hidden: int, clamp: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        size, layers = len(mean), list[Block]()

        def subnet(inputs: int, outputs: int) -> nn.Module:
            return dense(inputs, outputs, hidden)

        for _ in range(blocks):
            layers += [Permutation(size), Coupling(size, subnet, clamp=clamp)]
        self.blocks = nn.ModuleList(layers)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        z, total = (vectors - self.mean) / self.spread, -self.spread.log().sum()
        for block in self.blocks:
            z, logdet = block(z)
            z, total = z.clamp(-LARGEST, LARGEST), total + logdet
        return z, total


@dataclass(kw_only=True)
class Differnet(TrainedDetector):
    """The density of whole images, and its gradient to their pixels; learned: `network_`, `curve_`, and the vectors'
    `mean_` and `spread_` (d,)."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, gradients_in_predict=True)
    training: ClassVar[Mapping[str, Any]] = {"betas": (0.8, 0.8), "eps": 1e-4}
    quick: ClassVar[Mapping[str, Any]] = {
        "layers": (2,),
        "rotations": 4,
        "blocks": 2,
        "hidden": 32,
        "epochs": 20,
        "learning_rate": 1e-3,
    }

    backbone: str = "tf_efficientnet_lite0"
    layers: Layers = (3,)
    weights: str | None = None
    location: Literal["bottleneck", "expansion"] = "expansion"
    """As in FeatureSpec; for networks other than EfficientNets, whose features are rectified anyway: "bottleneck"."""
    scales: Annotated[tuple[PositiveFloat, ...], MinLen(1)] = (1.0, 0.5, 0.25)
    """Shares of the image's size at which the backbone sees it."""
    blocks: PositiveInt = 8
    """Coupling blocks, one after the other."""
    hidden: PositiveInt = 2048
    """Units of each hidden layer of the subnets."""
    clamp: PositiveFloat = 3.0
    """Largest log-scale of a coupling."""
    rotations: PositiveInt = 64
    """Angles an image is seen at; 1: upright only."""
    transforms: PositiveInt = 4
    """Angles that a training step draws for an image, of all `rotations`."""
    sigma: NonNegativeFloat = 3.0
    """Standard deviation of the gradients' smoothing, in pixels."""
    epochs: int = 192
    batch_size: int = 24
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5

    def _fit(self, source: ImageSource, runtime: Runtime) -> None:
        super()._fit(Vectors(source, self.rotations, self._spec(), runtime), runtime)

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        vectors = source.read(rows).features[VECTORS].flatten(0, 1).double()  # (n * r, d)
        spread = vectors.std(0, correction=0)
        # A channel that never varied would make any change infinitely unlikely; a single upright image varies in none.
        least = 0.01 * spread.square().mean().sqrt()
        self.spread_ = spread.clamp(min=float(least) or 1.0).float()
        self.mean_ = vectors.mean(0).float()

    def _network(self) -> nn.Module:
        return VectorFlow(self.mean_, self.spread_, blocks=self.blocks, hidden=self.hidden, clamp=self.clamp)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        vectors = batch.features[VECTORS]  # (n, r, d)
        if self.transforms < vectors.shape[1]:
            drawn = torch.rand(vectors.shape[:2], device=vectors.device).argsort(1)[:, : self.transforms]
            vectors = vectors.take_along_dim(drawn[..., None], dim=1)  # (n, transforms, d)
        return _nll(network, vectors)

    def _held_out_loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        return _nll(network, batch.features[VECTORS])

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        maps, scores = zip(*(self._judge_one(network, image) for image in batch.images), strict=True)
        return torch.stack(maps).log1p(), torch.stack(scores).log1p()

    def _judge_one(self, network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
        """The map (h, w) and score () of an image (h, w, 3): means over its rotations."""
        backbone = cached_backbone(self._spec(), str(image.device))
        total, squares, size = torch.zeros((), device=image.device), torch.zeros((), device=image.device), len(image)
        # The gradient of -log p at each angle, turned back, smoothed, and in absolute value.
        for x, degrees in rotated(image, self.rotations, backbone.spec):
            z, logdet = network(pooled(backbone.features(x.requires_grad_())))
            gradients = torch.autograd.grad(-log_likelihood(z, logdet).sum(), x)[0]  # (m, 3, h, w)
            upright = turned(gradients, -degrees).flatten(0, 1)  # (3 m, h, w)
            total = total + to_maps(upright, size, self.sigma).abs().sum(0)
            squares = squares + z.detach().square().mean(1).sum()
        return total / (3 * self.rotations), squares / self.rotations

    def _spec(self) -> FeatureSpec:
        place = self.backbone, tuple(self.layers), self.image_size, self.weights, self.location
        return FeatureSpec(*place, scales=tuple(self.scales))


def _nll(network: nn.Module, vectors: Tensor) -> Tensor:
    """Negative log-likelihood of vectors (n, r, d), mean over vectors, divided by d: scalar."""
    z, logdet = network(vectors.flatten(0, 1))
    return -log_likelihood(z, logdet).mean() / z.shape[1]
