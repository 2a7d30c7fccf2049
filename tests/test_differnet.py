"""DifferNet: rotations and their way back, the flow of the paper, and maps that are gradients to the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from al_models.errors import InvalidInput
from al_models.generative import differnet as module
from al_models.generative.differnet import Differnet, VectorFlow, Vectors, pooled, rotated, turned
from al_models.parts.backbone import cached_backbone, standardised
from al_models.parts.coupling import Coupling, Permutation
from al_models.types import FeatureSpec, ImageBatch, ImageSource, Runtime

SIZE = 64
SPEC = FeatureSpec(layers=(2,), image_size=SIZE, location="expansion", scales=(1.0, 0.5))


class Arrays(ImageSource):
    """Images in memory."""

    def __init__(self, images, batch_size=2):
        self.images, self.batch_size = torch.as_tensor(images), batch_size
        self.ids = tuple(str(row) for row in range(len(images)))

    def read(self, rows):
        return ImageBatch(tuple(self.ids[row] for row in rows), images=self.images[list(rows)])


def pictures(n, seed=0):
    """Smooth colours with noise: uint8 (n, size, size, 3)."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(0, 400, (n, SIZE, SIZE, 3)), (0, 4, 4, 0))
    return np.clip(128 + smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def quick(**changes):
    return Differnet(**({"image_size": SIZE, "layers": (2,), "scales": (1.0, 0.5)} | Differnet.quick | changes))


@pytest.fixture(scope="module")
def learned():
    return quick(epochs=3).fit(Arrays(pictures(3)))


# --- rotations ---


def test_right_angles_only_move_pixels():
    image = torch.rand(1, 3, 9, 9)
    found = turned(image.expand(4, -1, -1, -1), torch.tensor([0.0, 90, 180, 270]))
    for quarter, one in enumerate(found):
        torch.testing.assert_close(one, image[0].rot90(quarter, (1, 2)), atol=1e-5, rtol=0)


def test_what_is_turned_comes_back_except_the_corners():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 65), torch.linspace(-1, 1, 65), indexing="ij")
    smooth = torch.exp(-8 * ((x - 0.2) ** 2 + (y + 0.3) ** 2))[None, None]
    by = torch.tensor([33.0])
    back = turned(turned(smooth, by), -by)
    inside = (x**2 + y**2 < 0.9)[None, None]
    assert (back - smooth)[inside].abs().max() < 0.02
    assert turned(torch.ones(1, 1, 65, 65), by)[0, 0, 0, 0] == 0


def test_rotations_come_in_bounded_passes_and_the_first_is_upright(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 3)
    image = torch.as_tensor(pictures(1)[0])
    parts = list(rotated(image, 8, SPEC))
    assert [len(x) for x, _ in parts] == [3, 3, 2]
    assert torch.cat([by for _, by in parts]).tolist() == [0, 45, 90, 135, 180, 225, 270, 315]
    torch.testing.assert_close(parts[0][0][:1], standardised(image[None], SPEC), atol=1e-4, rtol=0)


def test_vectors_are_means_over_positions_of_each_rotation():
    images = pictures(3)
    found = Vectors(Arrays(images), 4, SPEC, Runtime()).read([2, 0]).features[module.VECTORS]
    for vectors, row in zip(found, (2, 0), strict=True):
        for quarter, vector in enumerate(vectors):
            image = torch.as_tensor(np.rot90(images[row], quarter).copy())[None]
            features = cached_backbone(SPEC)(image)
            assert list(features) == [2, 102]
            expected = torch.cat([x.mean((2, 3))[0] for x in features.values()])
            torch.testing.assert_close(vector, expected, atol=1e-3, rtol=1e-3)


# --- the flow ---


def test_the_flow_is_the_papers():
    detector = Differnet()
    assert (detector.blocks, detector.hidden, detector.clamp, detector.rotations) == (8, 2048, 3.0, 64)
    with torch.device("meta"):
        network = VectorFlow(torch.zeros(768), torch.ones(768), blocks=8, hidden=2048, clamp=3.0)
    assert [type(block) for block in network.blocks] == [Permutation, Coupling] * 8
    subnet = 384 * 2048 + 2 * 2048 * 2048 + 2048 * 768 + 3 * 2048 + 768
    assert sum(p.numel() for p in network.parameters()) == 16 * subnet


def test_its_log_determinant_counts_the_standardisation():
    torch.manual_seed(0)
    network = VectorFlow(torch.randn(6), torch.rand(6) + 0.5, blocks=2, hidden=8, clamp=3.0).double()
    x = torch.randn(6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: network(v[None])[0][0], x)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(network(x[None])[1].double(), expected[None], atol=1e-5, rtol=1e-5)


def test_training_draws_some_of_the_rotations_and_judging_takes_all(monkeypatch):
    detector = quick(transforms=2)
    detector._set_up(Vectors(Arrays(pictures(3)), 4, SPEC, Runtime()), range(3), Runtime())
    network, seen = detector._network(), []
    batch = ImageBatch(
        ("a", "b"), features={module.VECTORS: torch.arange(8.0).view(2, 4, 1).expand(-1, -1, 480).clone()}
    )
    monkeypatch.setattr(network.blocks[0], "forward", lambda x: seen.append(x) or (x, torch.zeros(len(x))))
    detector._loss(network, batch)
    detector._held_out_loss(network, batch)
    drawn, all_of_them = ((x * network.spread + network.mean)[:, 0].round().tolist() for x in seen)
    assert len(drawn) == len(set(drawn)) == 4
    assert [value // 4 for value in drawn] == [0, 0, 1, 1]
    assert all_of_them == list(range(8))


# --- maps ---


def test_the_map_is_the_mean_absolute_smoothed_gradient_turned_back(learned):
    image = pictures(1, seed=3)
    found = learned.predict(Arrays(image))
    backbone, total, squares = cached_backbone(SPEC), np.zeros((SIZE, SIZE)), 0.0
    for quarter in range(4):
        x = standardised(torch.as_tensor(np.rot90(image[0], quarter).copy())[None], SPEC).requires_grad_()
        z, logdet = learned.network_(pooled(backbone.features(x)))
        (z.square().sum() / 2 - logdet.sum()).backward()
        for channel in x.grad[0].numpy():
            total += np.abs(gaussian_filter(np.rot90(channel, -quarter), 3.0)) / 12
        squares += z.square().mean().item() / 4
    np.testing.assert_allclose(np.expm1(found.maps[0]), total, atol=0.01 * total.max())
    assert np.expm1(found.scores[0]) == pytest.approx(squares, rel=1e-3)


def test_a_prediction_is_the_same_bits_whatever_the_batch(learned):
    images = pictures(3, seed=4)
    whole = learned.predict(Arrays(images, batch_size=3))
    for row in range(3):
        alone = learned.predict(Arrays(images[row : row + 1]))
        np.testing.assert_array_equal(alone.maps[0], whole.maps[row])
        assert alone.scores[0] == whole.scores[row]


@pytest.mark.parametrize("name", ["blocks", "rotations", "transforms"])
def test_none_of_something_is_refused(name):
    with pytest.raises(InvalidInput, match=f"{name} = 0"):
        quick(**{name: 0}).fit(Arrays(pictures(2)))
