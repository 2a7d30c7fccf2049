"""What is known of a model version: all but its arrays, in one small JSON file that reads without this program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from storage.errors import Damaged, StoreTooNew
from storage.store import json_bytes

FORMAT = 1
"""Format of versions and aliases."""
ROOT = "registry"
STATE = "state.safetensors"
"""File of a version: what the detector learned, as plain arrays."""
HELD_OUT = "held_out.safetensors"
"""File of a version: `scores` and `map_maxima` float64 [n] of the held-out good images, and of all their map values
`pixel_keys` uint16 [m], `pixel_shares` and `pixel_maxima` int64 [m], from which other maps get p-values."""

REFERENCE = "reference.safetensors"
"""File of a version: what its images look like as a whole, which new ones are compared with: a scope and, of the
held-out images, a value each of `score`, `features`, `brightness`, `contrast` and `sharpness`."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds set on held-out good images alone, and what they promise."""

    rate: float
    """Share of good parts that may be rejected, as asked."""
    images: int
    """Held-out good images."""
    image: float | None
    """Reject when the score is higher; None when there were too few held-out images for the rate."""
    pixel: float | None
    """At most `rate` of the good images show any pixel above it; None as above."""
    note: str | None = None
    """Why there is no threshold."""
    realised: dict[str, Any] = field(default_factory=dict)
    """What the image threshold did to the labelled test images: `false_reject_rate` and `miss_rate`, and of each the
    95 % interval, `..._interval`."""


@dataclass(frozen=True)
class Features:
    """The frozen features that a detector reads."""

    spec: dict[str, Any]
    """Backbone, layers, image size and the rest of what was asked for."""
    weights: str
    """Content name of the backbone's weights."""


@dataclass(frozen=True)
class Lineage:
    """Where a version came from."""

    fitted_on: list[str]
    """Content names of the images it learned from."""
    held_out: list[str]
    """Content names of the good images its thresholds were set on."""
    record: str
    """Key of the record of the run it came from."""
    outputs: dict[str, str]
    """Keys of the outputs of that run which were copied, by step; they may be gone by now."""
    parent: int | None = None
    """The champion when it was added; None when there was none."""
    updated_from: str | None = None
    """Key of the earlier model that learned the new images on top; None: all images were learned at once."""
    root: str = ""
    """Folder that its images lay in; empty in versions that do not know."""


@dataclass(frozen=True)
class ModelVersion:
    """A fitted model, whole: nothing outside of its folder is needed to use it but the backbone's weights."""

    dataset: str
    category: str
    method: str
    params: dict[str, Any]
    """Every hyperparameter, the defaults included."""
    seed: int
    calibration: Calibration
    features: Features | None
    """None for a method that works on images alone."""
    lineage: Lineage
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the run it came from, on test images that set nothing; fractions in 0..1."""
    intervals: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metric -> `low` and `high` of its 95 % interval over images, both None where they cannot tell, and a `note`."""
    counts: dict[str, int] = field(default_factory=dict)
    """Images of the run by use."""
    facts: dict[str, float] = field(default_factory=dict)
    """Figures about what was learned."""
    warnings: list[str] = field(default_factory=list)
    """What speaks against this method on these images, in sentences."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Content names of the data, the code, and the outputs of the run."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and the libraries that results depend on."""
    hardware: str = ""
    white: float | None = None
    """Value that becomes 255 in images of more than 8 bits a channel, learned from the good ones; None: they had 8."""
    number: int = 0
    """Counts up within a data set's category and is never given twice; 0 before the registry has given one."""
    files: dict[str, str] = field(default_factory=dict)
    """File of arrays -> its SHA-256."""
    created: str = ""
    """UTC time, ISO 8601."""

    @property
    def name(self) -> str:
        """Name of the model that this is a version of: `mvtec_ad/grid`."""
        return f"{self.dataset}/{self.category}"

    @property
    def key(self) -> str:
        """Where it lies in a store. While a run record has this among its `keys`, the version is not collected."""
        return version_key(self.name, self.number)

    @property
    def label(self) -> str:
        """`mvtec_ad/grid@3`."""
        return f"{self.name}@{self.number}"


def version_key(name: str, number: int) -> str:
    """Where a version of a model lies in a store."""
    return f"{ROOT}/{name}/{number}"


def version_bytes(version: ModelVersion) -> bytes:
    """The version as JSON. Raises NotStorable for values that JSON cannot hold."""
    return json_bytes(version.label, asdict(version) | {"format": FORMAT})


def version_from(data: bytes, label: str) -> ModelVersion:
    """The version that `version_bytes` wrote, which must have this label.

    Raises StoreTooNew for a later format, and Damaged for bytes that are no version or that of another label.
    """
    try:
        values = json.loads(data)
        check_format(values["format"], label)
        known = {f.name: values[f.name] for f in fields(ModelVersion) if f.name in values}
        known["calibration"] = Calibration(**_known(Calibration, values["calibration"]))
        known["features"] = values["features"] and Features(**_known(Features, values["features"]))
        known["lineage"] = Lineage(**_known(Lineage, values["lineage"]))
        version = ModelVersion(**known)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"what is kept as {label} is no model version ({error}); restore it from a copy") from error
    if version.label != label:
        raise Damaged(f"what is kept as {label} says that it is {version.label}; restore it from a copy")
    return version


def check_format(given: Any, what: str) -> None:
    """Raises StoreTooNew for a format that a later version of this program wrote."""
    if not isinstance(given, int) or given > FORMAT:
        raise StoreTooNew(f"{what} has format {given}, this version reads up to {FORMAT}; update the program")


def _known(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What this version of the program knows of; a field that was added within a format may be left out."""
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}
