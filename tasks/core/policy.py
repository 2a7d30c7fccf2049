"""What is expected of a data set's images and what follows when it does not hold: part of a run file (`[validation]`).

It imports neither Prefect nor Great Expectations, so that a command that only reads a run file starts fast.
"""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Severity = Literal["reject", "warn", "stop", "off"]

DEFAULTS: dict[str, Severity] = {
    "not_empty": "stop",
    "readable": "reject",
    "usual_format": "warn",
    "large_enough": "reject",
    "not_constant": "reject",
    "usual_size": "warn",
    "usual_channels": "warn",
    "usual_bit_depth": "reject",
    "usual_range": "reject",
    "in_range": "warn",
    "one_label": "reject",
    "unique_in_split": "reject",
    "unique_across_splits": "reject",
    "one_split_per_part": "reject",
    "near_unique_in_split": "warn",
    "near_unique_across_splits": "warn",
    "label_known": "warn",
    "mask_size": "reject",
    "mask_known": "warn",
    "mask_not_empty": "warn",
    "mask_not_full": "warn",
    "mask_not_inverted": "warn",
    "mask_upright": "warn",
    "usual_brightness": "warn",
    "usual_contrast": "warn",
    "usual_sharpness": "warn",
    "nothing_changed": "warn",
    "published_counts": "warn",
    "enough_training_images": "stop",
    "suspected_defect": "warn",
}
"""Rule -> what follows when it is broken. All but the last are asked by `tasks.validate`."""

_POSSIBLE: dict[str, tuple[tuple[Severity, ...], str]] = {
    "not_empty": (("stop",), "without images there is nothing to do"),
    "readable": (("reject", "stop"), "an image that cannot be decoded has no pixels"),
    "one_label": (("reject", "stop"), "results are named by content, and one content cannot be both"),
    "unique_in_split": (("reject", "stop"), "results are named by content, so it counts once"),
    "mask_size": (("reject", "warn", "stop"), "a mask of another size says nothing about the image's pixels"),
    "published_counts": (("warn", "stop", "off"), "it is about the category, not about an image"),
    "enough_training_images": (("stop",), "the number is `min_training_images`"),
    "suspected_defect": (("reject", "warn", "off"), "it is asked when the others are through"),
}
"""Rules that cannot have every severity, and why."""


class Policy(BaseModel):
    """The rules' severities and numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: dict[str, Severity] = Field(
        default_factory=dict,
        description="What follows when a rule is broken, where it is not the default: `reject` sets the image aside, "
        "`warn` says so, `stop` gives the category up, `off` does not ask. Defaults: "
        + ", ".join(f"{name} {severity}" for name, severity in DEFAULTS.items()),
    )
    min_side: int = Field(16, ge=1, description="Pixels that an image needs on its shorter side")
    min_training_images: int = Field(2, ge=1, description="Good training images that a category needs")
    near_duplicate_bits: int = Field(
        20,
        ge=0,
        le=64,
        description="Bits of 256 that may differ between the perceptual hashes of nearly the same picture; fewer "
        "where all images of a category look alike",
    )
    outlier_deviations: float = Field(
        5.0,
        gt=0,
        description="Robust deviations from the median at which a training image's brightness, contrast or "
        "sharpness is unusual",
    )
    suspect_deviations: float = Field(
        5.0,
        gt=0,
        description="Robust deviations at which a training image is so unlike the others that a defect is suspected",
    )

    @field_validator("rules")
    @classmethod
    def _known(cls, rules: dict[str, Severity]) -> dict[str, Severity]:
        for name, severity in rules.items():
            if name not in DEFAULTS:
                near = difflib.get_close_matches(name, DEFAULTS, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(DEFAULTS)}"
                raise ValueError(f"unknown rule {name!r}; {hint}")
            possible, why = _POSSIBLE.get(name, ((severity,), ""))
            if severity not in possible:
                raise ValueError(f"rule {name} cannot be {severity!r}: {why}; possible: {', '.join(possible)}")
        return rules

    def severity(self, rule: str) -> Severity:
        """The severity of a broken rule."""
        return self.rules.get(rule, DEFAULTS[rule])


DEFAULT_POLICY = Policy()
