"""The small records that travel between steps: names and keys, never arrays."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Category:
    """A category whose images are listed and hashed."""

    store: str
    """URL of the store."""
    dataset: str
    category: str
    root: str
    """Folder the catalogue's paths are relative to."""
    catalogue: str
    """Key of the listing (Parquet of `storage.samples.Sample`)."""
    fingerprint: str
    """Content name of everything listed."""

    @property
    def name(self) -> str:
        """`dataset/category`."""
        return f"{self.dataset}/{self.category}"


@dataclass(frozen=True)
class Prepared:
    """A category decoded and resized once."""

    category: Category
    image_size: int
    images: str
    """Key of the uint8 images and of what was seen while decoding."""


@dataclass(frozen=True)
class Validated:
    """A category with a verdict on every image."""

    prepared: Prepared
    verdict: str
    """Key of the verdicts."""
    fingerprint: str
    """Content name of the accepted images: what later outputs are named by."""
    suspects: str | None = None
    """Key of what was seen of the training images when they were compared with each other; None: they were not."""
    screened: str | None = None
    """Key of what was seen of a night's new images before anything learned from them; None: there were none."""

    @property
    def category(self) -> Category:
        """The category judged."""
        return self.prepared.category

    @property
    def name(self) -> str:
        """`dataset/category`."""
        return self.category.name


@dataclass(frozen=True)
class Cell:
    """One (data set, category, method, seed) of a sweep."""

    dataset: str
    category: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)
    """The parameters that differ from the method's defaults."""
    seed: int = 0
    device: str = "auto"
    """`auto`: a GPU where there is one."""
    false_reject_rate: float = 0.05
    """Share of good parts that the calibrated threshold may reject."""
    train_share: float = 1.0
    """Share of the images to learn from that is learned from: less only in the first rungs of a search."""
    update: bool = False
    """Go on from what was learned before, where the method can: a night's. Otherwise all is learned at once, so that a
    benchmark's figures do not depend on what was in the store."""

    @property
    def name(self) -> str:
        """For people: `patchcore mvtec_ad/grid seed 0`."""
        return f"{self.method} {self.dataset}/{self.category} seed {self.seed}"

    @property
    def id(self) -> str:
        """Name of the cell across versions of data and code."""
        parts: list[Any] = [self.dataset, self.category, self.method, self.params, self.seed]
        parts += [] if self.train_share == 1 else [self.train_share]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
