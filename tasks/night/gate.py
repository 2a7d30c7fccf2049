"""What a new model has to keep to be put into use: part of a night's run file (`[gate]`). It imports no Prefect."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

METRICS = ("pro", "pixel_auroc", "image_auroc")
"""What decides unless the gate names a metric: the first that both models have."""


class Gate(BaseModel):
    """A challenger that keeps all of it becomes champion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str | None = Field(
        None, description=f"Must not be certainly lower; when left out, the first of {', '.join(METRICS)} there is"
    )
    slower: float = Field(
        1.5, gt=0, description="Times the champion's seconds of prediction, at most; the two are measured in turns"
    )
    larger: float = Field(1.5, gt=0, description="Times the champion's memory of prediction, at most")
    alpha: float = Field(
        0.01, gt=0, lt=1, description="Chance that more rejects than promised, or drift, are seen where there are none"
    )
    rejected: Literal["hold", "learn"] = Field(
        "hold",
        description="New images that the champion rejects: `hold` them, neither learned nor forgotten, until a person "
        "says what they are (`al nights release`, `al nights refuse`); or `learn` them as good",
    )
