"""Every data set by name. A data set is one file: its facts (`DATASET`) and its reader.

    list_samples(dataset, root, categories, *, <options of this layout>) -> Listing

A reader lists; hashing, decoding and judging come after it and are the same for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from storage.download import unfinished
from storage.errors import DatasetError
from storage.files import Hashes, Progress, with_hashes
from storage.listing import Dataset, Listing, unknown

DATASETS: dict[str, str] = {
    "btad": "storage.datasets.btad",
    "demo": "storage.datasets.demo",
    "fabric": "storage.datasets.fabric",
    "folder": "storage.datasets.folder",
    "kolektorsdd": "storage.datasets.kolektorsdd",
    "kolektorsdd2": "storage.datasets.kolektorsdd2",
    "mpdd": "storage.datasets.mpdd",
    "mt_defect": "storage.datasets.mt_defect",
    "mvtec_3d_ad": "storage.datasets.mvtec_3d_ad",
    "mvtec_ad": "storage.datasets.mvtec_ad",
    "mvtec_ad_2": "storage.datasets.mvtec_ad_2",
    "mvtec_loco_ad": "storage.datasets.mvtec_loco_ad",
    "nanotwice": "storage.datasets.nanotwice",
    "real_iad": "storage.datasets.real_iad",
    "rsdds": "storage.datasets.rsdds",
    "textured": "storage.datasets.textured",
    "visa": "storage.datasets.visa",
}
"""Name -> module, sorted."""


def about(dataset: str) -> Dataset:
    """The facts about a data set. Raises DatasetError for an unknown name."""
    facts: Dataset = _module(dataset).DATASET
    return facts


def options_of(dataset: str) -> dict[str, Any]:
    """The options of a data set's reader and their defaults."""
    parameters = inspect.signature(_module(dataset).list_samples).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def published_counts(dataset: str, category: str, options: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of images as published, for a category read with these options; none where they are not known."""
    if dataset not in DATASETS:
        return {}
    facts, usual = about(dataset), options_of(dataset)
    if any(options.get(name, usual[name]) != usual[name] for name in facts.counts_depend_on):
        return {}
    return dict(facts.counts.get(category, {}))


def check_options(dataset: str, options: Mapping[str, Any]) -> None:
    """Raises DatasetError, with the nearest names, for an option that the data set's reader does not have."""
    known = options_of(dataset)
    for name in options:
        if not known:
            raise DatasetError(f"{dataset} was given the option {name!r}, but takes none; leave it out")
        if name not in known:
            raise unknown(f"option of {dataset}", name, known)


def list_samples(
    dataset: str,
    root: str | Path,
    categories: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    hashes: Hashes | None = None,
    progress: Progress | None = None,
) -> Listing:
    """The images of a data set with their content names; all categories unless some are named.

    `hashes` spares files known by size and time from being read. Raises DatasetError for an unknown data set, category
    or option and for a folder in another layout, OutsideRoot for a category name that leaves the root.
    """
    check_options(dataset, options or {})
    if unfinished(Path(root)):
        raise DatasetError(f"{root} holds half of a download; run `al ingest {dataset} --root {root} --download` again")
    listing: Listing = _module(dataset).list_samples(dataset, Path(root), categories, **(options or {}))
    return with_hashes(listing, hashes or Hashes(), progress)


def _module(dataset: str) -> ModuleType:
    if dataset not in DATASETS:
        raise unknown("data set", dataset, DATASETS)
    return import_module(DATASETS[dataset])
