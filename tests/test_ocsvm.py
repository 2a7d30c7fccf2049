"""The one-class SVM: equal to scikit-learn's, its Nystroem form near the exact one, and the detector's contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.linear_model import SGDOneClassSVM
from sklearn.svm import OneClassSVM

from al_models.checks import check_detector
from al_models.one_class.ocsvm import AveragedDescent, Nystroem, Ocsvm, exact_machine, kernel_sum, rbf
from al_models.types import ImageBatch, ImageSource, Runtime


@dataclass(kw_only=True)
class Beyond(Ocsvm):
    """The form for many patches, on few."""

    quick: ClassVar[Mapping[str, object]] = {"exact_patches": 300, "centres": 128}


class Features(ImageSource):
    """One layer of given features."""

    def __init__(self, maps: torch.Tensor, batch_size: int = 4) -> None:
        self.maps, self.batch_size = maps, batch_size
        self.ids = tuple(map(str, range(len(maps))))

    def read(self, rows: object) -> ImageBatch:
        rows = list(rows)
        return ImageBatch(tuple(self.ids[row] for row in rows), None, {2: self.maps[rows]})


def clouds(n: int, c: int = 5, side: int = 12, seed: int = 0) -> torch.Tensor:
    """Two correlated clouds of features (n, c, side, side), far from the origin."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, side, side, c)) @ rng.standard_normal((c, c))
    x += 3.0 * rng.integers(0, 2, (n, side, side, 1)) + 10
    return torch.from_numpy(np.moveaxis(x, 3, 1).astype(np.float32))


def vectors(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def detector(**params: object) -> Ocsvm:
    return Ocsvm(**{"layers": (2,), "neighbourhood": 1, "image_size": 48, **params})


def test_the_form_for_many_patches_keeps_the_contract_too():
    with pytest.raises(ExceptionGroup) as broken:  # as the whole method: of six images, its map is flat
        check_detector(Beyond)
    (only,) = broken.value.exceptions
    assert only.__notes__ == ["check: maps_lie_where_the_images_do"]


@pytest.mark.parametrize("nu", [0.01, 0.2, 0.9])
@pytest.mark.parametrize("gamma", [0.02, 0.3, 3.0])
def test_decision_function_is_that_of_scikit_learn(nu: float, gamma: float) -> None:
    x = vectors(clouds(3)) - 10
    probe = vectors(clouds(2, seed=1)) - 10
    centres, weights, rho = exact_machine(x, nu, gamma)
    ours = kernel_sum(probe, centres, weights, gamma) - rho
    theirs = OneClassSVM(nu=nu, gamma=gamma).fit(x.double().numpy()).decision_function(probe.double().numpy())
    assert np.abs(ours.numpy() * nu * len(x) - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())


def test_weights_keep_the_constraints_of_the_dual() -> None:
    x, nu = vectors(clouds(3)) - 10, 0.1
    _, weights, _ = exact_machine(x, nu, 0.1)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert 0 <= float(weights.min()) <= float(weights.max()) <= 1 / (nu * len(x)) * 1.0001
    assert len(weights) >= nu * len(x)


def test_the_whole_fit_is_scikit_learn_on_whitened_patches() -> None:
    """Whitening by an independent way: any square root of the inverse covariance leaves distances alone."""
    maps = clouds(4)
    found = detector(gamma=0.3, nu=0.1).fit(Features(maps))
    x = vectors(maps).double()
    cov = torch.cov(x.T)
    cov += 0.01 * cov.diagonal().mean() * torch.eye(5)
    values, directions = torch.linalg.eigh(cov)
    white = ((x - x.mean(0)) @ directions / values.sqrt()).numpy()
    decision = OneClassSVM(nu=0.1, gamma=0.3).fit(white).decision_function(white).reshape(4, -1)
    assert found.predict(Features(maps)).scores == pytest.approx(-decision.min(1) / (0.1 * len(x)), abs=1e-5)


def test_without_whitening_channels_have_unit_variance() -> None:
    maps = clouds(4)
    fitted = detector(whiten=False, epsilon=1e-9).fit(Features(maps))
    x = (vectors(maps) - fitted.mean_) @ fitted.whitening_.T
    assert x.mean(0).numpy() == pytest.approx(np.zeros(5), abs=1e-4)
    assert x.var(0).numpy() == pytest.approx(np.ones(5), abs=1e-3)
    assert torch.equal(fitted.whitening_, torch.diag(fitted.whitening_.diagonal()))


def test_about_nu_of_the_patches_lie_outside_in_either_form() -> None:
    maps = clouds(40)
    for exact_patches in (100_000, 1000):
        fitted = detector(nu=0.1, exact_patches=exact_patches).fit(Features(maps))
        x = (vectors(maps) - fitted.mean_) @ fitted.whitening_.T
        inside = kernel_sum(x, fitted.centres_, fitted.weights_, 1 / 5) - fitted.rho_
        assert float((inside < 0).float().mean()) == pytest.approx(0.1, abs=0.015)


def test_nystroem_inner_products_are_the_kernel_where_the_centres_are() -> None:
    x = vectors(clouds(1))[:40] - 10
    space = Nystroem(torch.cat([x, x[:10]]), gamma=0.2)  # ten twice: the matrix of the kernel is singular
    assert space.root.shape[1] <= 40
    phi = space.kernels(x) @ space.root
    assert (phi @ phi.T).numpy() == pytest.approx(rbf(x, x, 0.2).numpy(), abs=1e-3)


def test_descent_reaches_a_lower_objective_than_scikit_learn() -> None:
    """Two passes against five of SGDOneClassSVM, on the paper's primal."""
    x, nu = vectors(clouds(60)) - 10, 0.1
    centres, weights, rho = exact_machine(x[:200], nu, 0.2)
    x = x[torch.from_numpy(np.random.default_rng(0).permutation(len(x)))]
    space = Nystroem(centres, 0.2)
    phi = space.kernels(x) @ space.root

    def objective(w: torch.Tensor, rho: float) -> float:
        return float(nu / 2 * w.square().sum() - nu * rho + (rho - phi @ w).clamp_min(0).mean())

    theirs = SGDOneClassSVM(nu=nu, average=True, shuffle=False, max_iter=5, tol=None).fit(phi.numpy())
    start = space.root.T @ (weights @ space.kernels(centres))
    ours = AveragedDescent(space, start, rho, nu, steps=2)
    for _ in range(2):
        for part in x.split(128):
            ours.step(part)
    found = objective(ours.mean_w, float(ours.mean_rho))
    assert found <= objective(torch.from_numpy(theirs.coef_.ravel()).float(), float(theirs.offset_[0]))
    assert found < objective(start, float(rho))


def test_beyond_the_exact_patches_maps_are_near_those_of_all() -> None:
    maps, probe = clouds(40), clouds(10, seed=2)
    probe[5:, 0, 4:7, 4:7] += 4
    whole, part = (
        detector(nu=0.1, exact_patches=most).fit(Features(maps)).predict(Features(probe)) for most in (100_000, 500)
    )
    assert np.abs(part.maps - whole.maps).mean() < 0.2 * whole.maps.std()
    assert np.corrcoef(part.maps.ravel(), whole.maps.ravel())[0, 1] > 0.98


def test_centres_are_no_more_than_asked() -> None:
    fitted = detector(nu=0.5, exact_patches=400, centres=50).fit(Features(clouds(6)))
    assert fitted.centres_.shape == (50, 5)
    assert fitted.weights_.shape == (50,)


def test_the_sample_does_not_depend_on_the_batches_but_on_the_seed() -> None:
    maps = clouds(6)
    states = [
        detector(exact_patches=50, epochs=0).fit(Features(maps, batch), Runtime(seed=seed)).state()
        for batch, seed in ((1, 0), (6, 0), (6, 1))
    ]
    assert states[0]["centres_"] == pytest.approx(states[1]["centres_"], abs=1e-3)
    assert not np.array_equal(states[1]["centres_"], states[2]["centres_"])


def test_a_constant_channel_and_equal_patches_are_no_trouble() -> None:
    maps = clouds(3)
    maps[:, 2] = 7.0
    far = maps.clone()
    far[:, 2, 3, 3] = 1e4
    fitted = detector().fit(Features(maps))
    assert (fitted.predict(Features(far)).scores > fitted.predict(Features(maps)).scores.max() - 1e-6).all()
    same = detector().fit(Features(torch.full((2, 4, 6, 6), 3.0)))
    assert np.isfinite(
        same.predict(Features(torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)))).maps
    ).all()
