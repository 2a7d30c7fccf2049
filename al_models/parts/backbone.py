"""Frozen pretrained networks: images in, the features of the asked layers out.

Any timm model is a backbone, CNN or transformer. Weights come from a file the caller names, from the package that
carries EfficientNet-Lite0 (the offline default), or by timm's own download.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import al_models.parts.precision  # noqa: F401 (full float32 on GPUs)
from al_models.errors import InvalidInput, WeightsUnavailable, unknown
from al_models.parts.hub import asks_hub_once
from al_models.parts.offsets import Offset, measured_offsets, probe_side
from al_models.parts.weights import OFFLINE_BACKBONE, PACKAGES, packaged_weights, weights_file
from al_models.types import SCALE_STEP, FeatureSpec

_FOLD_TOLERANCE = 1e-4
_AT_ONCE = 4
"""Images that a CPU computes at once: no slower than 16, with a quarter of the memory."""


class Backbone:
    """The features of one spec on one device. Frozen: it has no parameters to train."""

    def __init__(self, spec: FeatureSpec, device: str = "cpu") -> None:
        """Build the network and load its weights. Raises UnknownName, InvalidInput or WeightsUnavailable."""
        if not timm.is_model(spec.backbone):
            raise unknown("timm model", spec.backbone, timm.list_models())
        if not spec.layers or min(spec.layers) < 0:
            raise InvalidInput(f"layers={spec.layers} was given; name at least one, counting from 0")
        _check_scales(spec)
        with torch.random.fork_rng(devices=[]):  # the random weights that are replaced at once are nobody's business
            network = _network(spec)
        self.spec, self.device = spec, torch.device(device)
        self.network = _fold_batch_norms(network, spec.image_size).to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()  # not inference_mode, whose tensors a detector could not train on
    def __call__(self, images: Tensor) -> dict[int, Tensor]:
        """uint8 (n, h, w, c) with c 1 or 3, at the spec's size -> key -> float32 (n, c, h, w)."""
        size = self.spec.image_size
        shaped = images.ndim == 4 and images.shape[1:3] == (size, size) and images.shape[3] in (1, 3)
        if images.dtype != torch.uint8 or not shaped:
            raise InvalidInput(
                f"the backbone was given {images.dtype} {tuple(images.shape)}; it takes uint8 "
                f"(n, {size}, {size}, 3 or 1): resize with al_models.parts.images.resize, or ask for another image_size"
            )
        if self.device.type != "cpu" or torch.compiler.is_exporting():  # of a graph's images the number is open
            return self.features(standardised(images.to(self.device), self.spec))
        parts = [self.features(standardised(part, self.spec)) for part in images.split(_AT_ONCE)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    @cached_property
    def offsets(self) -> dict[int, Offset]:
        """Key -> offset of the layer's cells (`parts/offsets.py`), measured at first use; (0, 0) for a transformer."""
        if _fixed_size(self.spec):
            return dict.fromkeys(self.spec.keys, (0.0, 0.0))
        # Of several scales each is padded in its own way, so their images keep their size.
        side = probe_side(self.spec.image_size) if set(self.spec.scales) == {1} else self.spec.image_size
        small = copy.copy(self)
        small.spec = replace(self.spec, image_size=side)
        return measured_offsets(small, side)

    def features(self, x: Tensor) -> dict[int, Tensor]:
        """float32 (n, 3, h, w), as `standardised` gives it -> key -> (n, c, h, w). Gradients reach x."""
        found = {}
        for s, share in enumerate(self.spec.scales):
            layers = self.network(_at_scale(x, share))
            found |= {layer + SCALE_STEP * s: y for layer, y in zip(_in_order(self.spec), layers, strict=True)}
        return found


@lru_cache(maxsize=4)
def cached_backbone(spec: FeatureSpec, device: str = "cpu") -> Backbone:
    """A backbone, built once a process."""
    return Backbone(spec, device)


def standardised(images: Tensor, spec: FeatureSpec) -> Tensor:
    """Pixels as the backbone's weights were trained on: uint8 (n, h, w, 3 or 1) -> float32 (n, 3, h, w)."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in _normalisation(spec))
    x = images.permute(0, 3, 1, 2).float() / 255  # (n, c, h, w), channels last in memory
    return ((x - mean) / std).to(memory_format=torch.channels_last)  # gray is broadcast to three channels


def _at_scale(x: Tensor, share: float) -> Tensor:
    """Images (n, 3, h, w), resized to a share of their size."""
    if share == 1:
        return x
    size = [round(share * side) for side in x.shape[2:]]
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def _check_scales(spec: FeatureSpec) -> None:
    if not spec.scales or min(spec.scales) * spec.image_size < 1:
        raise InvalidInput(f"scales={spec.scales} was given; name at least one share of the image size, 1.0 for all")
    if len(spec.scales) > 1 and max(spec.layers) >= SCALE_STEP:
        raise InvalidInput(f"layers={spec.layers} was given; with several scales they must be below {SCALE_STEP}")
    if _fixed_size(spec) and set(spec.scales) != {1}:
        raise InvalidInput(
            f"{spec.backbone} takes images of one size, and scales={spec.scales} was given; leave them at (1.0,), or "
            "take a CNN"
        )


def untrained(spec: FeatureSpec) -> nn.Module:
    """The same network with random weights, to be trained: float32 (n, 3, h, w) -> a list of the layers, in order."""
    network = timm.create_model(
        spec.backbone,
        pretrained=False,
        features_only=True,
        out_indices=_in_order(spec),
        **_size_argument(spec),
        **_location_argument(spec),
    )
    _cut(network)
    return network


@lru_cache(maxsize=64)
def feature_shapes(spec: FeatureSpec) -> dict[int, tuple[int, int, int]]:
    """Key -> (c, h, w) of an image's features, without weights, images or computing."""
    shapes = {}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = untrained(spec).eval()
        for s, share in enumerate(spec.scales):
            side = round(share * spec.image_size)
            layers = network(torch.empty(1, 3, side, side))
            shapes |= {
                layer + SCALE_STEP * s: tuple(y.shape[1:]) for layer, y in zip(_in_order(spec), layers, strict=True)
            }
    return shapes


def _cut(network: nn.Module) -> None:
    """Remove the blocks behind the last layer asked for, which timm leaves in EfficientNets and MobileNets and runs."""
    if not hasattr(network, "_stage_out_idx"):
        return  # timm has cut it already
    modules = [layer["module"].split(".") for layer in network.feature_info.get_dicts()]
    last = max((int(module[1]) for module in modules if module[0] == "blocks"), default=-1)
    network.blocks = network.blocks[: last + 1]


@asks_hub_once
def _network(spec: FeatureSpec) -> nn.Module:
    """The part of the model up to the last layer asked for, with its weights, in inference mode."""
    local = _local_weights(spec)
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)  # warns of the head's weights, which we cut off
    try:
        network = timm.create_model(
            spec.backbone,
            pretrained=True,
            # Without a class to tell, timm loads strictly; else it would leave what the file lacks random, in silence.
            pretrained_cfg_overlay={} if local is None else {"state_dict": local, "num_classes": 0},
            features_only=True,  # a CNN is cut after the last stage; a transformer runs forward_intermediates
            out_indices=_in_order(spec),
            **_size_argument(spec),
            **_location_argument(spec),
        )
    except TypeError as error:
        if spec.location == "bottleneck":
            raise
        raise InvalidInput(
            f"{spec.backbone} has no location {spec.location!r}, which EfficientNets have; leave it at 'bottleneck'"
        ) from error
    except (IndexError, AssertionError) as error:
        raise InvalidInput(
            f"{spec.backbone} has no layers {spec.layers} at {spec.image_size} px ({error}); a CNN counts its stages "
            "from 0, a transformer its blocks, and takes an image size that its patches divide"
        ) from error
    except Exception as error:  # the hub's clients each raise their own kind
        if local is not None:
            raise InvalidInput(f"the weights given do not fit {spec.backbone}: {error}") from error
        raise WeightsUnavailable(
            f"the pretrained weights of {spec.backbone} could not be downloaded "
            f"({type(error).__name__}). Three ways out: connect this machine to the model hub once (timm then keeps "
            "the file); pass weights=PATH of a .safetensors or .pth file; or use the backbone that needs no hub, "
            f"{OFFLINE_BACKBONE}{_package_hint(spec.backbone)}"
        ) from error
    _check_loaded(network, local, spec)
    _cut(network)
    return network.eval().requires_grad_(False)


def _package_hint(backbone: str) -> str:
    return f" (the weights of {backbone} are in the package {PACKAGES[backbone]}, too)" if backbone in PACKAGES else ""


def _in_order(spec: FeatureSpec) -> tuple[int, ...]:
    """The layers as the network gives them: from the first to the last and each once, however they were asked for."""
    return tuple(sorted(set(spec.layers)))


def _location_argument(spec: FeatureSpec) -> dict[str, object]:
    """timm's argument for the spec's location, which only EfficientNets know; none for the usual location."""
    return {} if spec.location == "bottleneck" else {"feature_location": spec.location}


def _size_argument(spec: FeatureSpec) -> dict[str, object]:
    """timm's argument for the image size, for transformers that are built for one; none for CNNs, which take any."""
    return {"img_size": spec.image_size} if _fixed_size(spec) else {}


def _fixed_size(spec: FeatureSpec) -> bool:
    cfg = timm.get_pretrained_cfg(spec.backbone)
    return bool(cfg and cfg.fixed_input_size)


def _local_weights(spec: FeatureSpec) -> dict[str, Tensor] | None:
    """The state dict on this machine, or None when timm has to fetch it."""
    if spec.weights is not None:
        return _without_head(_read_weights(weights_file(spec.weights)), spec.backbone)
    file = packaged_weights(spec.backbone)
    if file is None:
        return None
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model(spec.backbone).state_dict().keys()
    return dict(zip(names, loaded.values(), strict=True))  # the same tensors in the same order under other names


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file. Raises InvalidInput for a file that holds none."""
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)  # tensors only: no code of a file is run
        tensors = loaded.get("state_dict", loaded)
        if tensors and all(isinstance(value, Tensor) for value in tensors.values()):
            return tensors
        found = "something else"
    except Exception as error:  # safetensors, pickle and zip each raise their own kinds
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    raise InvalidInput(
        f"{path} holds no state dict ({found}); save one with torch.save(model.state_dict(), 'x.pth') or "
        "safetensors.torch.save_file(model.state_dict(), 'x.safetensors')"
    )


def _without_head(tensors: dict[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """The tensors without the classifier's, so that a file may be for any number of classes, or none."""
    cfg = timm.get_pretrained_cfg(backbone)
    named = (cfg.classifier if cfg else None) or ()
    heads = tuple(f"{head}." for head in ((named,) if isinstance(named, str) else named))
    return {name: value for name, value in tensors.items() if not name.startswith(heads)}


def _check_loaded(network: nn.Module, local: dict[str, Tensor] | None, spec: FeatureSpec) -> None:
    """Raises InvalidInput for local weights that lack tensors of the network.

    timm does not load a cut EfficientNet strictly, so that a layer without weights would stay random unnoticed.
    """
    if local is None or isinstance(network, nn.ModuleDict) or hasattr(network, "model"):
        return  # loaded whole and strictly before it was wrapped
    missing = network.state_dict().keys() - local.keys()
    if missing:
        raise InvalidInput(
            f"the weights given for {spec.backbone} lack {len(missing)} tensors (first: {min(missing)}); "
            "they must be a state dict of this timm model"
        )


def _normalisation(spec: FeatureSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if spec.weights is None and packaged_weights(spec.backbone) is not None:
        return (127 / 255,) * 3, (128 / 255,) * 3  # what these weights were trained with
    cfg = timm.get_pretrained_cfg(spec.backbone)
    return (cfg.mean, cfg.std) if cfg else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _fold_batch_norms(network: nn.Module, size: int) -> nn.Module:
    """The same network with each batch norm folded into the convolution before it: a third faster on a CPU.

    Modules are taken to be registered in the order in which they are applied. So the result is compared with the
    unfolded network on random input, and the unfolded one is given where they differ.
    """
    folded = copy.deepcopy(network)
    _fold_children(folded)
    probe = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pairs = zip(network(probe), folded(probe), strict=True)
        same = all((a - b).abs().max() <= _FOLD_TOLERANCE * a.abs().max() for a, b in pairs)
    return folded if same else network


def _fold_children(module: nn.Module) -> None:
    before: nn.Module | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            scale = child.weight / torch.sqrt(child.running_var + child.eps)
            bias = before.bias if before.bias is not None else torch.zeros_like(child.bias)
            before.weight = nn.Parameter(before.weight * scale.view(-1, 1, 1, 1), requires_grad=False)
            before.bias = nn.Parameter((bias - child.running_mean) * scale + child.bias, requires_grad=False)
            setattr(module, name, getattr(child, "act", nn.Identity()))  # timm's norm carries its activation
        else:
            _fold_children(child)
        before = child
