"""Uninformed Students: Student-Teacher Anomaly Detection with Discriminative Latent Embeddings (Bergmann, Fauser,
Sattlegger, Steger, CVPR 2020, arXiv:1911.02357).

The idea: a teacher network describes the patch of 17, 33 or 65 pixels around every position. It is distilled from a
network trained on ImageNet, with descriptors kept uncorrelated. Several students of the same architecture learn, on
good images alone, to predict the teacher's descriptors. On what they have never seen, their mean is far from the
teacher (error) and they differ among themselves (variance). The map is the sum of both, each standardised by its
moments on good images, averaged over the patch sizes.

Differs from the paper:
- ImageNet is not available to train a teacher, so students learn to predict the backbone's features at the patch's
  centre, each channel standardised. The features are those of the first layer alone: a patch of 33 pixels does not show
  what deeper layers see, and no student could predict them, on good images either.
- `teacher="distilled"` distils a teacher from those features on the training images. It has seen nothing but good
  images, as its students have, and they follow it on anomalies, too, so that less is detected.
- Compactness is the mean squared correlation of two components; the paper adds up signed ones.
- Dense descriptors are computed by dilation, which gives the same numbers as the paper's rearrangement (Bailer et al.
  2017, BMVC).
- For a CPU, networks have a quarter of the paper's width, descriptors stand at every fourth pixel, and a step sees a
  random square of 64 pixels of an image: `width=128, stride=1, crop=None` are the paper's.
- At most 32 good images give the moments of error and variance.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the paper's form.

Kept from the paper: three patch sizes, three students, descriptors of 128 numbers for distilled teachers; for these
Adam at 2e-4, weights 1 of distillation and compactness and 0 of the metric loss (the paper's teacher takes 50,000 steps
of 64 patches to be decoded to ResNet-18's features); for students one image a step, Adam at 1e-4, weight decay 1e-5,
100 epochs; error and variance standardised by good images that were held out.

Shapes: n images, d numbers a descriptor, s patch sizes, m students, h x w positions, every `stride` pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import MinLen
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.detector import FLOAT16_MAX
from al_models.errors import InvalidInput
from al_models.parameters import Layers, NonNegativeFloat, PositiveFloat, PositiveInt
from al_models.parts.backbone import standardised
from al_models.parts.epochs import Epochs, moved
from al_models.parts.frame import FRAME
from al_models.parts.maps import to_maps
from al_models.parts.patches import channel_counts, channel_moments, stack_layers, standard_layers
from al_models.parts.train import Phase, TrainPlan, Turn, seeded
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

PATCH_NETWORKS = {
    17: ((6, 1, False), (5, 2, False), (5, 2, False), (4, 0, False)),
    33: ((5, 1, True), (5, 2, True), (2, 2, False), (4, 0, False)),
    65: ((5, 1, True), (5, 1, True), (5, 1, True), (4, 2, False), (1, 0, False)),
}
"""Patch size -> convolutions: side, channels in widths (0: the descriptor's), and whether 2 x 2 maxima follow."""
JUDGED = 32
"""Good images that give the moments of error and variance."""


class PatchNetwork(nn.Sequential):
    """Describes the patch at every `stride`-th pixel, whole patches only: (n, 3, h, w) -> (n, d, h', w').

    A pooling layer halves the grid as long as the stride allows. After that it keeps the grid, and the convolutions
    behind it are dilated instead, so that every position gets the descriptor of its own patch alone.
    """

    def __init__(self, patch: int, width: int, dimension: int, stride: int) -> None:
        layers: list[nn.Module] = []
        channels, reached, dilation = 3, 1, 1
        table = PATCH_NETWORKS[patch]
        for place, (side, widths, pooled) in enumerate(table):
            last = place == len(table) - 1
            outputs = dimension if last else widths * width
            left = stride // reached if last else 1
            layers.append(nn.Conv2d(channels, outputs, side, stride=left, dilation=dilation))
            if not last:
                layers.append(nn.LeakyReLU(0.005))
            if pooled and reached < stride:
                layers.append(nn.MaxPool2d(2))
                reached *= 2
            elif pooled:
                layers.append(nn.MaxPool2d(2, stride=1, dilation=dilation))
                dilation *= 2
            channels = outputs
        super().__init__(*layers)
        self.apply(_initialise)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


class Describers(nn.Module):
    """A patch network of each size, with every component of its descriptors standardised by `mean` and `std`."""

    def __init__(self, patches: Sequence[int], width: int, dimension: int, stride: int) -> None:
        super().__init__()
        self.patches, self.stride = tuple(patches), stride
        self.networks = nn.ModuleList(PatchNetwork(patch, width, dimension, stride) for patch in patches)
        self.register_buffer("mean", torch.zeros(len(patches), dimension, 1, 1))
        self.register_buffer("std", torch.ones(len(patches), dimension, 1, 1))

    def forward(self, x: Tensor, window: tuple[int, int, int]) -> Tensor:
        """Descriptors of `cells` x `cells` positions from (row, column) on: (n, 3, size, size) -> (n, s, d, h, w).

        Images are padded by reflection, so that a pixel at the border has a whole patch, too.
        """
        row, column, cells = window
        found = []
        for patch, network in zip(self.patches, self.networks, strict=True):
            before = patch // 2 - self.stride // 2  # a patch's centre lies in the middle of its position
            side = (positions(x.shape[-1], self.stride) - 1) * self.stride + patch
            after = side - x.shape[-1] - before
            whole = F.pad(x, (before, after, before, after), mode="reflect")
            top, left, need = row * self.stride, column * self.stride, (cells - 1) * self.stride + patch
            # Where a network's pooling leaves the last pixels of its patch out, it could describe one position more.
            found.append(network(whole[..., top : top + need, left : left + need])[..., :cells, :cells])
        return (torch.stack(found, dim=1).float() - self.mean) / self.std


def positions(size: int, stride: int) -> int:
    """Positions along a side of so many pixels."""
    return -(-size // stride)


def correlation(descriptors: Tensor) -> Tensor:
    """Mean squared correlation of two different components, over all positions: (n, d, h, w) -> scalar in [0, 1]."""
    with torch.autocast(descriptors.device.type, enabled=False):  # a product of matrices would be rounded
        x = descriptors.float().transpose(0, 1).flatten(1)  # (d, n * h * w)
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        squares = (x @ x.T / x.shape[1]).square()  # (d, d)
    d = len(squares)
    return (squares.sum() - squares.diagonal().sum()) / max(1, d * (d - 1))


def error_and_variance(teacher: Tensor, students: Sequence[Tensor]) -> Tensor:
    """Squared distance of the students' mean from the teacher, and their mean squared distance from their mean.

    Of each position: (n, s, d, h, w) each -> (n, s, 2, h, w).
    """
    guesses = torch.stack(list(students))  # (m, n, s, d, h, w)
    mean = guesses.mean(0)
    return torch.stack([(mean - teacher).square().sum(2), (guesses - mean).square().sum(3).mean(0)], dim=2)


def moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over images and positions: (n, c, h, w) many times -> (c,) each."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        x = part.double().transpose(0, 1).flatten(1)  # (c, n * h * w)
        count += x.shape[1]
        total, squares = total.to(x) + x.sum(1), squares.to(x) + x.square().sum(1)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()


@dataclass(kw_only=True)
class UninformedStudents(FeatureTrainedDetector):
    """Students of a teacher; learned: `network_`, `mean_` and `std_` (s, 2: of error and variance), `feature_mean_` and
    `feature_std_` (c,), `curve_` and `shapes_`."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True)
    quick: ClassVar[Mapping[str, Any]] = {
        "layers": (1, 2),
        "receptive_fields": (17, 33),
        "teacher": "distilled",
        "students": 2,
        "width": 4,
        "dimension": 8,
        "teacher_epochs": 4,
        "epochs": 8,
        "learning_rate": 5e-3,
    }

    layers: Layers = (1,)
    receptive_fields: Annotated[tuple[Literal[17, 33, 65], ...], MinLen(1)] = (17, 33, 65)
    """Sides of the patches, in pixels."""
    teacher: Literal["distilled", "backbone"] = "backbone"
    """Whose descriptors students learn to predict: those of the "backbone", which has seen more than good images, or of
    a teacher "distilled" from it on the good images."""
    students: PositiveInt = 3
    """Students of each patch size."""
    dimension: PositiveInt = 128
    """Numbers of a distilled teacher's descriptor; with `teacher="backbone"` it has the backbone's channels."""
    width: PositiveInt = 32
    """Channels of the networks' first convolution; the paper's is 128."""
    stride: Literal[1, 2, 4, 8] = 4
    """Pixels from one descriptor to the next; the paper's is 1."""
    crop: PositiveInt | None = 64
    """Side, in pixels, of an image's random square that a step learns from; None: the whole image (the paper's)."""
    compactness: NonNegativeFloat = 1.0
    """Weight of the descriptors' correlation, beside 1 for the distillation."""
    teacher_epochs: PositiveInt = 100
    """Passes over the images in which distilled teachers learn."""
    teacher_learning_rate: PositiveFloat = 2e-4
    """That of distilled teachers."""
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    batch_size: int = 1
    patience: int | None = 100
    """Looks at held-out images, one an epoch, without improvement after which the students stop. By default as many as
    there are epochs, so that nothing stops early."""
    max_minutes: float | None = None
    """Minutes of training after which to stop, of which teachers take a third at most; None: no limit."""
    frame: float = FRAME
    sigma: NonNegativeFloat = 0.0
    """Gaussian smoothing of the map, in pixels; the paper's is 0."""

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        self.feature_mean_, self.feature_std_ = channel_moments(source, rows, self.layers, runtime.device)

    def _phases(
        self, network: nn.Module, source: ImageSource, learn: Sequence[int], held: Sequence[int], runtime: Runtime
    ) -> Iterator[Phase]:
        if self.teacher == "distilled":
            yield from self._teaching(network["teachers"], source, learn, runtime)
            self._standardise(network["teachers"], source, learn, runtime)
        yield from super()._phases(network, source, learn, held, runtime)

    def _finish(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        judged = (moved(batch, runtime.device) for batch in source.batches(rows[:JUDGED]))
        with torch.no_grad():
            mean, std = moments(self._measured(self.network_, batch).flatten(1, 2) for batch in judged)
        self.mean_, self.std_ = (value.view(-1, 2).cpu() for value in (mean, std))

    def conflict(self) -> str | None:
        """As Detector."""
        if self.image_size < max(self.receptive_fields):
            return (
                f"image_size={self.image_size} is less than the largest of receptive_fields={self.receptive_fields}; "
                "give images no smaller than the largest patch"
            )
        return None

    def _teaching(
        self, teachers: nn.Module, source: ImageSource, rows: Sequence[int], runtime: Runtime
    ) -> Iterator[Phase]:
        """The phase in which teachers are distilled: a linear decoder of each predicts the backbone's features."""
        channels = len(self.feature_mean_)
        with seeded(runtime.seed, runtime.device):
            decoders = nn.ModuleList(nn.Conv2d(self.dimension, channels, 1) for _ in self.receptive_fields)
        school = nn.ModuleList([teachers.requires_grad_(True), decoders]).to(runtime.device)

        def loss(batch: ImageBatch) -> Tensor:
            window = self._window()
            target = self._features(batch, window)  # (n, c, h, w)
            parts = [
                (decoder(x).float() - target).square().mean() + self.compactness * correlation(x)
                for decoder, x in zip(decoders, self._described(teachers, batch.images, window).unbind(1), strict=True)
            ]
            return torch.stack(parts).mean()

        with Epochs(source, rows, self.batch_size, runtime.seed) as epochs:
            plan = replace(
                self._plan(len(epochs)),
                steps=len(epochs) * self.teacher_epochs,
                learning_rate=self.teacher_learning_rate,
                patience=None,
                max_minutes=self.max_minutes and self.max_minutes / 3,
            )
            yield Phase("teachers", [Turn(school, loss)], self._draw(epochs, runtime), plan)
        teachers.requires_grad_(False)

    def _standardise(self, teachers: nn.Module, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        """Bring the teachers' descriptors of good images to mean 0 and deviation 1, component by component."""
        with torch.no_grad(), seeded(runtime.seed, runtime.device):
            # Each image has a square of its own, so that the size of the batches read does not matter.
            batches = (moved(batch, runtime.device) for batch in source.batches(rows))
            images = (image for batch in batches for image in batch.images.split(1))
            mean, std = moments(self._described(teachers, image, self._window()).flatten(1, 2) for image in images)
        if float(std.max()) <= 1e-5 * float(mean.abs().max()):
            raise InvalidInput("the training images look alike at all positions: give images with some contrast")
        teachers.mean.copy_(mean.view_as(teachers.mean))
        teachers.std.copy_(std.view_as(teachers.std).clamp(min=1e-5))

    def _network(self) -> nn.Module:
        students = nn.ModuleList(self._describers() for _ in range(self.students))
        if self.teacher == "backbone":
            return nn.ModuleDict({"students": students})
        return nn.ModuleDict({"students": students, "teachers": self._describers().requires_grad_(False)})

    def _describers(self) -> Describers:
        dimension = self.dimension if self.teacher == "distilled" else len(self.feature_mean_)
        return Describers(self.receptive_fields, self.width, dimension, self.stride)

    def _plan(self, per_epoch: int) -> TrainPlan:
        share = 2 / 3 if self.teacher == "distilled" else 1
        return replace(super()._plan(per_epoch), max_minutes=self.max_minutes and self.max_minutes * share)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        theirs, mine = self._described_by_all(network, batch, self._window())
        return torch.stack([(x - theirs).square().sum(2).mean() for x in mine]).mean()

    def _held_out_loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        with seeded(0, batch.images.device):  # the same squares at every look: else the best weights would be luck
            return self._loss(network, batch)

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        measured = self._measured(network, batch)  # (n, s, 2, h, w)
        mean, std = (value.to(measured.device)[..., None, None] for value in (self.mean_, self.std_))
        z = (measured - mean) / std.clamp(min=1e-6)
        maps = to_maps(
            z.sum(2).mean(1), self.image_size, self.sigma, self._offset(channel_counts(batch.features, self.layers))
        )
        # Deviations of what students know well are tiny, and an anomaly may lie any number of them away.
        return with_maximum(maps.clamp(max=FLOAT16_MAX))

    def _measured(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        """Error and variance (n, s, 2, h, w) at all positions, image by image, since dense layers are large."""
        window, found = (0, 0, positions(self.image_size, self.stride)), []
        for row in range(len(batch)):
            features = {layer: values[row : row + 1] for layer, values in batch.features.items()}
            one = ImageBatch(batch.ids[row : row + 1], batch.images[row : row + 1], features)
            found.append(error_and_variance(*self._described_by_all(network, one, window)))
        return torch.cat(found)

    def _described_by_all(
        self, network: nn.Module, batch: ImageBatch, window: tuple[int, int, int]
    ) -> tuple[Tensor, list[Tensor]]:
        """The teacher's descriptors and each student's, (n, s, d, h, w) each; a backbone's have s = 1."""
        if self.teacher == "distilled":
            theirs = self._described(network["teachers"], batch.images, window)
        else:
            theirs = self._features(batch, window)[:, None]  # the same for all patch sizes
        return theirs, [self._described(student, batch.images, window) for student in network["students"]]

    def _described(self, describers: Describers, images: Tensor, window: tuple[int, int, int]) -> Tensor:
        return describers(standardised(images, self.feature_spec()), window)

    def _window(self) -> tuple[int, int, int]:
        """(row, column, cells) of a random square, in positions."""
        whole = positions(self.image_size, self.stride)
        cells = whole if self.crop is None else min(whole, positions(self.crop, self.stride))
        row, column = torch.randint(0, whole - cells + 1, (2,)).tolist()
        return row, column, cells

    def _features(self, batch: ImageBatch, window: tuple[int, int, int]) -> Tensor:
        """The backbone's features at every position, standardised by channel: (n, c, cells, cells)."""
        row, column, cells = window
        layers = standard_layers(batch.features, self.layers, self.feature_mean_, self.feature_std_)
        x = stack_layers(dict(zip(self.layers, layers, strict=True)), self.layers, mode="bilinear")
        side = positions(self.image_size, self.stride)
        x = x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="bilinear")
        return x[..., row : row + cells, column : column + cells]
