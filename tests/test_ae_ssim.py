"""The SSIM auto-encoder: the paper's network and patches, learning on a texture a few seconds long."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from al_models.errors import InvalidInput, NotFitted
from al_models.reconstruction.ae_ssim import AeSsim, Autoencoder, cut_patches, luminance, patch_starts
from al_models.types import ImageBatch, ImageSource, Runtime


class Arrays(ImageSource):
    """Images in memory; notes which rows were read together."""

    def __init__(self, images, batch_size=3):
        self.images, self.batch_size, self.reads = torch.as_tensor(images), batch_size, []
        self.ids = tuple(str(row) for row in range(len(images)))

    def read(self, rows):
        self.reads.append(list(rows))
        return ImageBatch(ids=tuple(self.ids[row] for row in rows), images=self.images[list(rows)])


def stripes(n, size=128, seed=0):
    """Noisy diagonal stripes of one phase: uint8 (n, size, size, 3)."""
    rng = np.random.default_rng(seed)
    wave = 128 + 80 * np.sin((np.arange(size)[:, None] + np.arange(size)) * 2 * np.pi / 32)
    gray = np.clip(wave + rng.normal(0, 4, (n, size, size)), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=3)


def quick(**changes):
    return AeSsim(**({"image_size": 128} | AeSsim.quick | changes))


@pytest.fixture(scope="module")
def learned():
    detector = quick(patches=32, epochs=12, batch_size=2, learning_rate=5e-4, patience=None)
    return detector.fit(Arrays(stripes(8)))


def test_the_loss_falls_from_plain_gray_to_the_texture(learned):
    judged = learned.curve_[:, 2]
    assert judged[0] > 0.8
    assert judged.min() < 0.2


def test_a_defect_has_the_highest_values(learned):
    images = stripes(3, seed=1)
    images[1, 40:60, 70:90] = images[1, 40:60, 70:90][:, ::-1]  # stripes the other way
    prediction = learned.predict(Arrays(images))
    assert prediction.maps.shape == (3, 128, 128)
    assert prediction.maps.dtype == prediction.scores.dtype == np.float32
    np.testing.assert_array_equal(prediction.scores, prediction.maps.max(axis=(1, 2)))
    # The corners of a patch are learned last; a training of seconds does not reach them.
    inner = prediction.maps[:, 12:-12, 12:-12]
    assert inner[1].max() > 2 * inner[[0, 2]].max()
    row, column = np.unravel_index(inner[1].argmax(), inner[1].shape)
    assert 40 <= row + 12 < 60
    assert 70 <= column + 12 < 90


def test_the_map_is_the_mean_of_its_patches(learned):
    image = stripes(1, size=140)
    found = AeSsim(image_size=140, stride=8).load_state(learned.state()).predict(Arrays(image)).maps[0]
    gray, total, times = image[0, :, :, 0] / 255, np.zeros((140, 140)), np.zeros((140, 140))
    for y in (0, 8, 12):
        for x in (0, 8, 12):
            patch = gray[y : y + 128, x : x + 128]
            with torch.no_grad():
                copy = learned.network_(torch.tensor(patch[None, None], dtype=torch.float32))[0, 0].numpy()
            _, similarity = structural_similarity(
                patch,
                copy.astype(np.float64),
                data_range=1.0,
                gaussian_weights=True,
                use_sample_covariance=False,
                full=True,
            )
            total[y : y + 128, x : x + 128] += 1 - similarity
            times[y : y + 128, x : x + 128] += 1
    np.testing.assert_allclose(found, total / times, atol=1e-4)


def test_a_state_gives_the_same_maps_back(learned):
    state = learned.state()
    assert all(isinstance(value, np.ndarray) and value.flags.c_contiguous for value in state.values())
    again = quick().load_state({name: value.copy() for name, value in state.items()})
    images = stripes(2, seed=2)
    np.testing.assert_array_equal(again.predict(Arrays(images)).maps, learned.predict(Arrays(images)).maps)
    assert again.state().keys() == state.keys()


def test_loading_a_state_leaves_the_callers_random_numbers_alone(learned):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    quick().load_state(learned.state())
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_of_another_network_is_refused(learned):
    with pytest.raises(InvalidInput, match="latent = 7"):
        quick(latent=7).load_state(learned.state())


def test_nothing_is_predicted_or_saved_before_fit():
    with pytest.raises(NotFitted):
        quick().predict(Arrays(stripes(1)))
    with pytest.raises(NotFitted):
        quick().state()


def test_a_fit_depends_on_its_seed_alone():
    states = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(global_seed)
        states.append(quick(epochs=1).fit(Arrays(stripes(5)), Runtime(seed=seed)).state())
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name])
    assert not np.array_equal(states[0]["network_.encoder.8.weight"], states[2]["network_.encoder.8.weight"])


@pytest.mark.parametrize("n", [1, 4])
def test_few_images_are_all_learned_from(n):
    detector = quick(epochs=1).fit(Arrays(stripes(n)))
    assert np.isnan(detector.curve_[:, 2]).all()
    assert np.isfinite(detector.predict(Arrays(stripes(n))).maps).all()


def test_the_network_is_table_1():
    network, shapes = Autoencoder(latent=100), []
    x = torch.zeros(1, 1, 128, 128)
    for layer in network.encoder:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [
        (32, 64, 64),
        (32, 32, 32),
        (32, 32, 32),
        (64, 16, 16),
        (64, 16, 16),
        (128, 8, 8),
        (64, 8, 8),
        (32, 8, 8),
        (100, 1, 1),
    ]
    assert network.decoder(x).shape == (1, 1, 128, 128)
    # weights + biases, layer by layer, from the paper's table
    sizes = [
        (1, 32, 16),
        (32, 32, 16),
        (32, 32, 9),
        (32, 64, 16),
        (64, 64, 9),
        (64, 128, 16),
        (128, 64, 9),
        (64, 32, 9),
    ]
    encoder = sum(i * o * k + o for i, o, k in [*sizes, (32, 100, 64)])
    decoder = sum(i * o * k + i for i, o, k in [*sizes, (32, 100, 64)])
    assert sum(p.numel() for p in network.encoder.parameters()) == encoder
    assert sum(p.numel() for p in network.decoder.parameters()) == decoder


def test_gray_is_that_of_pillow():
    rgb = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    expected = [np.asarray(Image.fromarray(image).convert("L")) for image in rgb]
    np.testing.assert_array_equal(luminance(torch.tensor(rgb))[:, 0].numpy(), expected)


def test_patches_cover_the_side():
    assert patch_starts(256, 30) == [0, 30, 60, 90, 120, 128]
    assert patch_starts(256, 32) == [0, 32, 64, 96, 128]
    assert patch_starts(128, 30) == [0]


def test_patches_come_evenly_from_the_rows_asked_for():
    images = np.zeros((6, 150, 150, 3), np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None] * 40
    images[..., 0] += np.arange(22, dtype=np.uint8).repeat(7)[:150, None]  # so that places differ
    source = Arrays(images, batch_size=2)
    rows = [0, 2, 3, 5]
    patches = cut_patches(source, rows, 10, torch.Generator().manual_seed(0))
    assert patches.shape == (10, 1, 128, 128)
    owners = [min(rows, key=lambda row: abs(row * 40 + 3 - int(patch.float().mean()))) for patch in patches]
    assert sorted(owners.count(row) for row in rows) == [2, 2, 3, 3]
    assert source.reads == [[0, 2], [3, 5]]
    assert len({patch.numpy().tobytes() for patch in patches}) > 4


def test_with_more_images_than_patches_only_some_are_read():
    source = Arrays(stripes(9))
    cut_patches(source, range(9), 4, torch.Generator().manual_seed(0))
    assert sum(len(rows) for rows in source.reads) == 4
