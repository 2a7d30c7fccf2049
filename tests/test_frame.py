"""The frame of a map: at the level of the inside, never raised, the inside untouched; what is learned adds up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from al_models.checks import check_images, quick_detector
from al_models.embedding.dfr import Dfr
from al_models.errors import InvalidInput
from al_models.parts.frame import FRAME, RIM, FrameMoments, in_frame, levelled
from al_models.reconstruction.mpad import Mpad

SIDE = 128
VALUES = st.floats(-100, 100, width=32)


def maps(n, rim=1.0, offset=0.0, seed=0):
    """Values of good images that are `rim` times as high and as wild in the outer sixteen of 128 pixels."""
    values = np.random.default_rng(seed).gamma(4, 1, (n, SIDE, SIDE))
    frame = in_frame(SIDE, FRAME).numpy()
    values[:, frame] *= rim
    return torch.from_numpy(values).float() + offset


def learned(values):
    moments = FrameMoments()
    moments.update(values)
    return moments.levels(FRAME)


def test_the_frame_is_as_wide_as_asked():
    frame = in_frame(16, 0.125)
    assert frame.sum() == 16 * 16 - 12 * 12
    assert frame[:2].all()
    assert not frame[2:14, 2:14].any()


@pytest.mark.parametrize("offset", [0.0, -7.0], ids=["residuals", "likelihoods"])
def test_a_frame_that_is_higher_and_wilder_comes_down_to_the_inside(offset):
    before = maps(20, rim=3, offset=offset, seed=1)
    found = levelled(before, learned(maps(60, rim=3, offset=offset)))
    assert torch.equal(found[:, 18:-18, 18:-18], before[:, 18:-18, 18:-18])  # beyond the last cell of the frame
    frame, inside = found[:, in_frame(SIDE, FRAME - 2 / SIDE)], found[:, 18:-18, 18:-18]
    assert float(frame.mean() - offset) == pytest.approx(float(inside.mean() - offset), rel=0.05)
    assert float(frame.std()) == pytest.approx(float(inside.std()), rel=0.05)


def test_a_frame_that_is_lower_stays():
    calm = maps(200, rim=0.2)
    torch.testing.assert_close(levelled(calm[:5], learned(calm)), calm[:5])


@given(arrays.arrays(np.float32, (6, 8, 8), elements=VALUES))
def test_moments_of_parts_are_those_of_the_whole(values):
    whole, first, second = FrameMoments(), FrameMoments(), FrameMoments()
    x = torch.from_numpy(values)
    whole.update(x)
    first.update(x[:2])
    second.update(x[2:5])
    second.update(x[5:])
    first.merge(second)
    torch.testing.assert_close(first.levels(FRAME), whole.levels(FRAME), rtol=1e-4, atol=1e-3)


@given(arrays.arrays(np.float32, (5, 8, 8), elements=VALUES))
def test_the_mean_of_good_maps_is_nowhere_raised(values):
    x = torch.from_numpy(values)
    assert (levelled(x, learned(x)).mean(0) <= x.mean(0) + 1e-3).all()


def test_a_frame_that_leaves_nothing_inside_is_refused():
    with pytest.raises(InvalidInput, match=r"frame=0\.49 leaves nothing inside of a map of 32 cells a side; give less"):
        Dfr(**Dfr.quick, image_size=128, frame=0.49).fit(check_images(128).train)


def test_the_plain_form_has_neither_levels_nor_other_maps():
    images = check_images(128)
    framed = quick_detector(Dfr).fit(images.train)
    plain = Dfr(**{**framed.params(), "layers": framed.layers, "frame": 0.0}).fit(images.train)
    assert "frame_" not in plain.state()
    inside = slice(32, 96)
    np.testing.assert_array_equal(
        framed.predict(images.test).maps[:, inside, inside], plain.predict(images.test).maps[:, inside, inside]
    )


@pytest.fixture(scope="module")
def textures():
    """Good images of one kind: 24 to learn from and 96 to judge."""
    rng = np.random.default_rng(3)
    clouds = np.stack([gaussian_filter(rng.normal(size=(SIDE, SIDE)), 2, mode="wrap") for _ in range(120)])
    gray = 128 + 8 * clouds / clouds.std()
    images = np.repeat(gray[..., None].clip(0, 255).astype(np.uint8), 3, axis=3)
    return images[:24], images[24:]


def with_discs(images, *, at_rim, radius=5, contrast=30):
    """The images, each with a whole, brighter disc, whose centre lies in the rim, or inside of it."""
    rng = np.random.default_rng(4)
    whole = ~in_frame(SIDE, radius / SIDE).numpy()
    places = np.argwhere((in_frame(SIDE, RIM).numpy() == at_rim) & whole)
    y, x = np.mgrid[:SIDE, :SIDE]
    changed = images.astype(int)
    for image, (row, column) in zip(changed, rng.choice(places, len(images)), strict=True):
        image[(y - row) ** 2 + (x - column) ** 2 <= radius**2] += contrast
    return changed.clip(0, 255).astype(np.uint8)


def test_defects_at_the_rim_are_found_as_those_inside(textures):
    train, good = textures
    framed, plain = (Mpad(**{"image_size": SIDE, **Mpad.quick, "frame": share}).fit(train) for share in (FRAME, 0.0))
    inside, rim = (auroc(framed, good, with_discs(good, at_rim=at_rim)) for at_rim in (False, True))
    assert abs(inside - rim) <= 5
    assert min(inside, rim) >= 90
    without = auroc(plain, good, with_discs(good, at_rim=False))
    assert without <= inside - 10, "without the frame, the rim decides the score"


def auroc(detector, good, bad):
    """AUROC of the image scores, in per cent."""
    scores = np.concatenate([detector.predict(good).scores, detector.predict(bad).scores])
    return 100 * roc_auc_score(np.arange(len(scores)) >= len(good), scores)
