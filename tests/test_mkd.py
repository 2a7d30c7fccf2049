"""MKD: the cloner's shapes, the loss of an image, and the gradient that is the map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from al_models.embedding.mkd import Cloner, Mkd, disagreement, local_disagreement
from al_models.parts.backbone import cached_backbone, standardised

SIZE = 64


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def quick(**params):
    return Mkd(**{"image_size": SIZE, **Mkd.quick, "epochs": 1, **params})


@pytest.fixture(scope="module")
def learned():
    return quick().fit(noise(4))


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        (64, [(24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]),
        (50, [(5, 25, 25), (6, 13, 13), (7, 7, 7)]),  # odd sides, rounded up
        (64, [(9, 4, 4), (8, 4, 4)]),  # a transformer's: all layers of one grid
        (48, [(9, 5, 3)]),
    ],
)
def test_the_cloner_gives_the_shapes_asked_for(size, shapes):
    network = Cloner(size, shapes, width=4)
    assert [tuple(x.shape[1:]) for x in network(torch.zeros(2, 3, size, size))] == shapes


def test_the_cloner_is_narrow_between_its_critical_convolutions():
    network = Cloner(64, [(128, 16, 16), (256, 8, 8)], width=16)
    sizes = [tuple(m.weight.shape[:2]) for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sorted(sizes) == sorted([(16, 3), (16, 16), (16, 16), (16, 16), (16, 128), (16, 16), (128, 16), (256, 16)])


def test_the_loss_is_that_of_the_paper_for_each_image():
    rng = np.random.default_rng(0)
    mine = [rng.standard_normal(shape) for shape in ((3, 2, 4, 4), (3, 5, 2, 2))]
    theirs = [rng.standard_normal(x.shape) for x in mine]
    weights = [0.5, 2.0]
    expected = [
        sum(
            w * ((a[i] - b[i]) ** 2).mean() + 1 - (a[i] * b[i]).sum() / np.linalg.norm(a[i]) / np.linalg.norm(b[i])
            for a, b, w in zip(mine, theirs, weights, strict=True)
        )
        for i in range(3)
    ]
    found = disagreement([torch.tensor(x) for x in mine], [torch.tensor(x) for x in theirs], torch.tensor(weights))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_both_terms_begin_at_one(learned):
    features = cached_backbone(learned.feature_spec())(torch.from_numpy(noise(4)))
    theirs = learned._unit(features)
    zeros = [torch.zeros_like(x) for x in theirs]
    # Of a cloner that says nothing each of two layers disagrees by 1 in direction and, on average, by 1 in value.
    assert float(disagreement(zeros, theirs, learned._weights(theirs[0].device)).mean()) == pytest.approx(4, rel=1e-3)


def judged(detector, x):
    """What a layer is judged by, all but the first: the cloner's, the backbone's, and its weight."""
    theirs = detector._unit(cached_backbone(detector.feature_spec()).features(x))
    return [list(part)[1:] for part in (detector.network_(x), theirs, detector._weights(x.device))]


def loss_of(detector, x):
    mine, theirs, weights = judged(detector, x)
    return disagreement(mine, theirs, torch.stack(weights))


def test_the_map_is_the_smoothed_gradient_of_each_image_alone(learned):
    images = noise(3, seed=1)
    prediction = learned.predict(images)
    paper = Mkd(**{**learned.params(), "layers": (2, 3), "score": "mean"}).load_state(learned.state()).predict(images)
    np.testing.assert_array_equal(paper.maps, prediction.maps)
    for row, image in enumerate(torch.from_numpy(images).split(1)):
        x = standardised(image, learned.feature_spec()).requires_grad_()
        loss = loss_of(learned, x).squeeze()
        loss.backward()
        saliency = x.grad.abs().sum(1)[0].numpy() * SIZE
        np.testing.assert_allclose(prediction.maps[row], gaussian_filter(saliency, 4), rtol=2e-3)
        assert paper.scores[row] == pytest.approx(loss.item(), rel=1e-4)
        last = [values[-1] for values in judged(learned, x.detach())]
        assert prediction.scores[row] == pytest.approx(local_disagreement(*last).max().item(), rel=1e-4)


def test_the_disagreement_of_a_position_is_that_of_its_vectors():
    mine, theirs = torch.randn(2, 1, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = local_disagreement(mine, theirs, torch.tensor(0.7))
    a, b = mine[0, :, 1, 2], theirs[0, :, 1, 2]
    expected = 1 - a @ b / a.norm() / b.norm() + 0.7 * (a - b).square().mean()
    torch.testing.assert_close(found[0, 1, 2], expected)


def test_the_gradient_is_that_of_finite_differences(learned):
    image = torch.from_numpy(noise(1, seed=2))
    x = standardised(image, learned.feature_spec())
    plain = Mkd(**{**learned.params(), "layers": (2, 3), "sigma": 0.0}).load_state(learned.state())
    slopes = plain.predict(image.numpy()).maps[0] / SIZE
    row, column = np.unravel_index(slopes.argmax(), slopes.shape)
    step, total = 2e-2, 0.0
    with torch.no_grad():
        for colour in range(3):
            up, down = x.clone(), x.clone()
            up[0, colour, row, column] += step
            down[0, colour, row, column] -= step
            total += abs(float(loss_of(learned, up)) - float(loss_of(learned, down))) / (2 * step)
    assert slopes[row, column] == pytest.approx(total, rel=0.2)


def test_predicting_leaves_no_gradient_behind(learned):
    learned.network_.zero_grad(set_to_none=True)
    learned.predict(noise(1))
    assert all(p.grad is None for p in learned.network_.parameters())
