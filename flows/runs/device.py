"""The device as a parameter of a flow."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

_WORDS = r"auto|cpu|cuda(:\d+)?"


def _known(device: str) -> str:
    if re.fullmatch(_WORDS, device) is None:
        raise PydanticCustomError("device", "expected is auto, cpu, cuda or cuda:N, such as cuda:1")
    return device


Device = Annotated[str, AfterValidator(_known), Field(json_schema_extra={"pattern": f"^({_WORDS})$"})]
"""`auto` is a GPU where there is one."""
