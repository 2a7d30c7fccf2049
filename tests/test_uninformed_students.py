"""Uninformed Students: the patch networks, dense at any stride, and what teachers and students make of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from al_models.embedding.uninformed_students import (
    PATCH_NETWORKS,
    Describers,
    PatchNetwork,
    UninformedStudents,
    correlation,
    error_and_variance,
    moments,
)
from al_models.parts import train as training
from al_models.parts.backbone import cached_backbone
from al_models.parts.patches import stack_layers
from al_models.types import ImageBatch

SIZE = 64


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def quick(**params):
    small = {"image_size": SIZE, "receptive_fields": (17,), "teacher_epochs": 1, "epochs": 1, "frame": 0.0}
    return UninformedStudents(**UninformedStudents.quick | small | params)


@pytest.fixture(scope="module")
def learned():
    return quick(receptive_fields=(17, 33)).fit(noise(6))


@pytest.mark.parametrize(
    ("patch", "sizes"),
    [
        (17, [(3, 128, 6), (128, 256, 5), (256, 256, 5), (256, 128, 4)]),
        (33, [(3, 128, 5), (128, 256, 5), (256, 256, 2), (256, 128, 4)]),
        (65, [(3, 128, 5), (128, 128, 5), (128, 128, 5), (128, 256, 4), (256, 128, 1)]),
    ],
)
def test_the_networks_are_the_paper_s(patch, sizes):
    network = PatchNetwork(patch, width=128, dimension=128, stride=8)
    assert sum(p.numel() for p in network.parameters()) == sum(i * o * k * k + o for i, o, k in sizes)
    assert network(torch.zeros(1, 3, patch, patch)).shape == (1, 128, 1, 1)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("patch", PATCH_NETWORKS)
def test_dense_descriptors_are_those_of_the_patches(patch, stride):
    alone = PatchNetwork(patch, width=2, dimension=5, stride=8)  # all pooling as in the paper's table
    dense = PatchNetwork(patch, width=2, dimension=5, stride=stride)
    dense.load_state_dict(alone.state_dict())
    x = torch.randn(1, 3, patch + 16, patch + 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = dense(x)
        for row, column in ((0, 0), (1, 0), (1, 2)) if stride == 8 else ((0, 0), (1, 3), (4, 2)):
            y, x0 = row * stride, column * stride
            expected = alone(x[..., y : y + patch, x0 : x0 + patch])[0, :, 0, 0]
            torch.testing.assert_close(found[0, :, row, column], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "stride"), [(64, 4), (50, 4), (33, 1), (71, 8)])
def test_a_window_is_cut_out_of_the_whole(size, stride):
    describers = Describers((17, 33), width=2, dimension=3, stride=stride)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    cells = -(-size // stride)
    with torch.no_grad():
        whole = describers(x, (0, 0, cells))
        part = describers(x, (2, 1, 3))
    assert whole.shape == (2, 2, 3, cells, cells)
    torch.testing.assert_close(part, whole[..., 2:5, 1:4], rtol=1e-4, atol=1e-5)


def test_a_descriptor_is_of_the_pixels_around_its_position():
    describers = Describers((17,), width=2, dimension=3, stride=4)
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    describers(x, (0, 0, 16))[0, 0, :, 8, 5].sum().backward()
    rows, columns = x.grad[0].abs().sum(0).nonzero().T
    # Position (8, 5) covers the pixels 32..35 and 20..23.
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (26, 42, 14, 30)


def test_error_and_variance_are_the_paper_s():
    rng = np.random.default_rng(0)
    teacher, students = rng.standard_normal((2, 1, 4, 3, 3)), rng.standard_normal((3, 2, 1, 4, 3, 3))
    found = error_and_variance(torch.tensor(teacher), [torch.tensor(x) for x in students])
    assert found.shape == (2, 1, 2, 3, 3)
    guesses, truth = students[:, 1, 0, :, 2, 1], teacher[1, 0, :, 2, 1]
    mean = guesses.mean(0)
    variance = np.mean([guess @ guess for guess in guesses]) - mean @ mean
    np.testing.assert_allclose(found[1, 0, :, 2, 1], [(mean - truth) @ (mean - truth), variance])


def test_the_correlation_is_that_of_numpy():
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 4))
    x[:, 1] += x[:, 0]
    squares = np.corrcoef(x.transpose(1, 0, 2, 3).reshape(5, -1)) ** 2
    expected = squares[~np.eye(5, dtype=bool)].mean()
    assert float(correlation(torch.tensor(x))) == pytest.approx(expected, rel=1e-4)
    assert float(correlation(torch.ones(1, 3, 2, 2))) == 0
    assert float(correlation(torch.randn(1, 1, 2, 2))) == 0


def test_moments_do_not_depend_on_the_batches():
    x = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 3 + 5
    for parts in (x.split(1), x.split(4)):
        mean, std = moments(parts)
        torch.testing.assert_close(mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(std, x.transpose(0, 1).flatten(1).std(1, correction=0))


def test_teachers_are_standardised_and_do_not_learn_from_the_students(learned):
    first, later = (quick(epochs=epochs).fit(noise(6)) for epochs in (1, 2))
    for name, value in first.state().items():
        if name.startswith("network_.teachers"):
            np.testing.assert_array_equal(value, later.state()[name])
    assert not np.array_equal(
        first.state()["network_.students.0.networks.0.0.weight"],
        later.state()["network_.students.0.networks.0.0.weight"],
    )
    with torch.no_grad():
        whole = learned._described(learned.network_["teachers"], torch.from_numpy(noise(6)), (0, 0, 16))
    assert float(whole.mean((0, 3, 4)).abs().max()) < 0.2
    torch.testing.assert_close(whole.std((0, 3, 4)), torch.ones(2, 8), atol=0.2, rtol=0)


def test_the_map_adds_both_in_standard_deviations_of_held_out_images(learned):
    images = torch.from_numpy(noise(2, seed=1))
    values = learned._measured(learned.network_, _batch(images)).detach()
    expected = torch.zeros(2, 16, 16)
    for size in range(2):
        for what in range(2):
            expected += (values[:, size, what] - learned.mean_[size, what]) / learned.std_[size, what] / 2
    maps = torch.nn.functional.interpolate(expected[:, None], size=SIZE, mode="bilinear", align_corners=False)[:, 0]
    flat = copy.deepcopy(learned)
    flat.offsets_.zero_()
    np.testing.assert_allclose(flat.predict(images.numpy()).maps, maps.numpy(), rtol=1e-3, atol=1e-3)
    # The moments are those of the held-out image: of it alone the standardised values have mean 0 and deviation 1.
    held = training.hold_out(6, seed=0)[1]
    alone = learned._measured(learned.network_, _batch(torch.from_numpy(noise(6)[held]))).detach()
    torch.testing.assert_close(alone.mean((0, 3, 4)), learned.mean_, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(alone.flatten(3).std((0, 3), correction=0), learned.std_, rtol=1e-3, atol=1e-4)


def _batch(images):
    return ImageBatch(tuple(map(str, range(len(images)))), images)


def test_students_may_learn_the_backbone_s_own_features():
    detector = quick(teacher="backbone", receptive_fields=(17, 33)).fit(noise(6))
    images = torch.from_numpy(noise(3, seed=1))
    features = cached_backbone(detector.feature_spec())(images)
    batch = ImageBatch(("a", "b", "c"), images, features)
    with torch.no_grad():
        theirs, mine = detector._described_by_all(detector.network_, batch, (2, 1, 5))
    good = cached_backbone(detector.feature_spec())(torch.from_numpy(noise(6)[training.hold_out(6, seed=0)[0]]))
    standard = {}
    for layer, x in features.items():
        mean, std = (value[:, None, None] for value in moments([good[layer]]))
        standard[layer] = (x - mean) / std
    stacked = stack_layers(standard, (1, 2), mode="bilinear")
    torch.testing.assert_close(theirs[:, 0], stacked[..., 2:7, 1:6], rtol=1e-3, atol=1e-3)
    assert [tuple(x.shape) for x in mine] == 2 * [(3, 2, stacked.shape[1], 5, 5)]
    assert not any(name.startswith("network_.teachers") for name in detector.state())
    again = quick(teacher="backbone", receptive_fields=(17, 33)).load_state(detector.state())
    np.testing.assert_array_equal(again.predict(images.numpy()).maps, detector.predict(images.numpy()).maps)
