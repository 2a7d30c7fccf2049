"""Maps against the two steps they do in one: torch's upsampling, then scipy's smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from al_models.parts.maps import SIGMA, to_maps


def patches(n, h, w, seed=0):
    return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("h", "w", "size"), [(32, 32, 128), (7, 13, 60), (1, 5, 33), (64, 64, 64)])
@pytest.mark.parametrize("sigma", [SIGMA, 1.5, 0.0])
def test_equal_to_upsampling_then_smoothing(h, w, size, sigma):
    given = patches(3, h, w)
    found = to_maps(given, size, sigma)
    upsampled = F.interpolate(given[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = [gaussian_filter(m.astype(np.float64), sigma=sigma) if sigma else m for m in upsampled]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_sigma_is_the_papers_unless_given():
    assert SIGMA == 4.0
    assert torch.equal(to_maps(patches(1, 8, 8), 64), to_maps(patches(1, 8, 8), 64, 4.0))


def test_a_constant_stays_constant_up_to_the_border():
    torch.testing.assert_close(to_maps(torch.full((1, 16, 16), 3.0), 64), torch.full((1, 64, 64), 3.0))


def test_half_precision_is_smoothed_in_single():
    given = patches(2, 16, 16).half()
    torch.testing.assert_close(to_maps(given, 64), to_maps(given.float(), 64))


def test_the_highest_patch_stays_in_its_place():
    given = torch.zeros(1, 16, 16)
    given[0, 3, 12] = 1
    row, column = np.unravel_index(int(to_maps(given, 128)[0].argmax()), (128, 128))
    assert 24 <= row < 32
    assert 96 <= column < 104
