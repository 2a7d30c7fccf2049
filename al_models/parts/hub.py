"""The model hub, asked once: where nobody answers, what is on this machine counts at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import timm

from al_models.parts.weights import packaged_weights
from al_models.types import FeatureSpec

_WITHIN_S = 5.0
_Network = TypeVar("_Network")


def asks_hub_once(build: Callable[[FeatureSpec], _Network]) -> Callable[[FeatureSpec], _Network]:
    """`build`; but where no hub answers, the hub's client takes the files that it kept, without a minute of retries."""

    @wraps(build)
    def built(spec: FeatureSpec) -> _Network:
        cfg = timm.get_pretrained_cfg(spec.backbone)
        local = spec.weights is not None or packaged_weights(spec.backbone) is not None
        if local or not (cfg and cfg.hf_hub_id) or _answers():
            return build(spec)
        from huggingface_hub import constants

        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
        try:
            return build(spec)
        finally:
            constants.HF_HUB_OFFLINE = before

    return built


def _answers() -> bool:
    import httpx
    from huggingface_hub import constants

    try:
        httpx.head(constants.ENDPOINT, timeout=_WITHIN_S)
    except (httpx.HTTPError, OSError):
        return False
    return True
