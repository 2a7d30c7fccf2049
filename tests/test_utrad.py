"""UTRAD: windows that lose nothing, the authors' sizes, the map written out, and features of a vision transformer."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from al_models.embedding.utrad import Utrad, UTransformer, into_windows, out_of_windows, window_sides
from al_models.types import ImageBatch, ImageSource, Runtime

SIDE = 8
SMALL = {"dim": 16, "heads": 2, "depth": 1, "epochs": 1, "image_size": 32, "layers": (1, 2), "frame": 0.0}


class Features(ImageSource):
    """Given features of two layers."""

    def __init__(self, n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.layers = {
            1: 3 * torch.randn(n, 3, SIDE, SIDE, generator=generator) + 5,
            2: torch.randn(n, 4, SIDE // 2, SIDE // 2, generator=generator),
        }
        self.ids = tuple(str(i) for i in range(n))

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {n: x[rows] for n, x in self.layers.items()})


@pytest.mark.parametrize(
    ("grid", "sides"), [(64, (4, 4, 4)), (32, (4, 4, 2)), (16, (4, 4)), (14, (2, 7)), (37, (37,)), (1, (1,))]
)
def test_windows_divide_the_grid(grid, sides):
    assert window_sides(grid) == sides


def test_windows_hold_neighbours_and_go_back_to_their_places():
    x = torch.arange(2 * 6 * 6).view(2, 6, 6, 1)
    windows = into_windows(x, 3)
    assert windows.shape == (2 * 4, 9, 1)
    for number in range(8):
        image, row, column = number // 4, number % 4 // 2, number % 2
        block = x[image, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert torch.equal(windows[number].flatten(), block.flatten())
    assert torch.equal(out_of_windows(windows, 6), x)


def test_the_authors_network_has_their_number_of_weights():
    # ResNet-18's layers 1 to 3 at 64 x 64, 512 channels, 4 + 4 blocks a level, on three levels.
    with torch.device("meta"):
        network = UTransformer(64 + 128 + 256, 64, 512, 8, 4, 0.1)
    d, c = 512, 448
    attention, layers, norm = 4 * d * d + 4 * d, 2 * d * 4 * d + 5 * d, 2 * d
    level = 4 * (attention + layers + 2 * norm) + 4 * (2 * attention + layers + 3 * norm) + 2 * norm
    level += d * d // 4 + d // 4 + 2 * d // 4 + d * d // 4 + d + 2 * d  # the narrow skip connection
    level += 2 * 16 * d  # codes and queries of 4 x 4 places
    head = d * d + d * d // 2 + d * d // 8 + d * d // 32 + d // 8 + 1 + 2 * (d + d // 2 + d // 4 + d // 8)
    assert sum(p.numel() for p in network.parameters()) == 3 * level + head + 2 * c * d + 64 * 64 * d


def test_what_is_expected_of_the_error_learns_without_changing_the_features():
    network = UTransformer(7, SIDE, 16, 2, 1, 0.0)
    found, usual = network(torch.randn(2, SIDE, SIDE, 7))
    assert found.shape == (2, SIDE, SIDE, 7)
    assert usual.shape == (2, SIDE, SIDE)
    usual.sum().backward()
    touched = {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert touched == {"usual"}


def test_an_untrained_network_expects_the_error_that_it_makes_of_standardised_features():
    torch.manual_seed(0)
    x = torch.randn(2, SIDE, SIDE, 7)
    found, usual = UTransformer(7, SIDE, 16, 2, 1, 0.0)(x)
    torch.testing.assert_close(usual, torch.ones_like(usual), rtol=0, atol=0.1)
    assert float((found - x).detach().square().mean().sqrt()) == pytest.approx(1, abs=0.2)


def test_the_loss_and_the_map_are_the_authors():
    class Fixed(nn.Module):
        def forward(self, x):
            return 0.5 * x, -1 - x[..., 0].abs()

    source = Features(3)
    detector = Utrad(**SMALL).fit(source)
    batch = source.read(range(3))
    fine, coarse = (source.layers[i].numpy() for i in (1, 2))
    x = np.concatenate([fine, coarse.repeat(2, axis=2).repeat(2, axis=3)], axis=1).transpose(0, 2, 3, 1)
    x = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    lengths, usual = np.sqrt((x**2 / 4).mean(-1)), -1 - np.abs(x[..., 0])
    loss = (x**2).mean() / 4 + ((usual - lengths) ** 2).mean()
    np.testing.assert_allclose(float(detector._loss(Fixed(), batch)), loss, rtol=1e-4)
    relative, total = torch.tensor(lengths / -usual), torch.zeros(3, SIDE, SIDE)
    for side in (1, 4, 8):  # windows of the two levels, 4 and 4 * 2
        means = relative.view(3, SIDE // side, side, SIDE // side, side).mean((2, 4))
        total += F.interpolate(means[:, None], size=SIDE, mode="bilinear", align_corners=False)[:, 0] / 3
    expected = F.interpolate(total[:, None], size=32, mode="bilinear", align_corners=False)[:, 0]
    maps, scores = detector._judge(Fixed(), batch, [])
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, maps.amax((1, 2)))


def test_finer_layers_are_averaged_to_the_tokens():
    detector = Utrad(**SMALL | {"tokens": 4}).fit(Features(2))
    fine = Features(2).layers[1]
    stacked = detector._stack(Features(2).layers)
    assert stacked.shape == (2, 4, 4, 7)
    torch.testing.assert_close(stacked[..., :3].permute(0, 3, 1, 2), F.avg_pool2d(fine, 2))
    assert detector.predict(Features(2)).maps.shape == (2, 32, 32)


def test_blocks_of_a_vision_transformer_are_learned_on(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=224)
    path = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), path)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    vit = {"backbone": "vit_tiny_patch16_224", "weights": str(path), "layers": (1, 3), "image_size": 224}
    detector = Utrad(**SMALL | vit).fit(images, Runtime(seed=1))
    assert [level.side for level in detector.network_.levels] == [2, 7]
    assert detector.mean_.shape == (2 * 192,)
    assert np.isfinite(detector.predict(images).maps).all()
