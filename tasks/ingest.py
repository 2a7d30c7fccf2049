"""List a data set: one catalogue a category, named by the content of its files.

Content names are kept by place, size, times of change and inode, so that only new and changed files are read again.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.datasets import DATASETS, list_samples
from storage.errors import NotInStore
from storage.files import Hashes
from storage.listing import Listing, SetAside
from storage.samples import Sample, content_hash, fingerprint, to_parquet
from storage.store import Store
from tasks.core.handles import Category
from tasks.core.progress import Progress
from tasks.core.steps import code_fingerprint, measured, step, step_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ingested:
    """What was found in a data set."""

    categories: list[Category]
    """Those with good images to learn from, sorted."""
    problems: dict[str, str]
    """The others: category -> why nothing can be learned in it."""


@step("ingest", "ingest {dataset}")
def ingest(
    store_url: str,
    dataset: str,
    root: str,
    categories: list[str] | None = None,
    options: dict[str, Any] | None = None,
    rehash: bool = False,
) -> Ingested:
    """List and hash the images of a data set, and keep one catalogue a category.

    `options` are those of the data set's reader; `rehash`: trust no size and no time. Raises DatasetError for an
    unknown data set, category, option or layout, OutsideRoot for a category name that leaves the root. A category
    without training images is a problem of its own; the others go on.
    """
    store, progress = Store(store_url), Progress(f"hash {dataset}")
    with measured() as cost:
        hashes = Hashes() if rehash else _kept_hashes(store, root)
        listing = list_samples(
            dataset, root, categories, options, hashes=hashes, progress=lambda done, of: progress("", done, of)
        )
        if hashes.hashed:
            store.write_bytes(_hashes_key(root), hashes.to_parquet())
    logger.info("%s: %d files read and hashed, the others known", dataset, hashes.hashed)
    seconds = cost.as_meta()["seconds"] / max(1, len(listing.samples))
    names = sorted({sample.category for sample in listing.samples} - set(listing.problems))
    listed = [_catalogue(store, listing, dataset, name, options or {}, seconds, cost.peak_memory_mb) for name in names]
    for name, reason in listing.problems.items():
        logger.warning("%s/%s cannot be used: %s", dataset, name, reason)
    return Ingested(listed, listing.problems)


def _hashes_key(root: str) -> str:
    """The key of a folder's table of hashes, which names files by where they lie and by the same code."""
    known_by = f"{code_fingerprint('storage.files')} {Path(root).resolve()}"
    return f"hashes/{content_hash(known_by.encode())}.parquet"


def _kept_hashes(store: Store, root: str) -> Hashes:
    try:
        return Hashes.from_parquet(store.read_bytes(_hashes_key(root)))
    except NotInStore:
        return Hashes()
    except (KeyError, TypeError, ValueError) as error:  # Arrow's own errors are ValueErrors
        logger.warning("the table of known files is damaged and made anew (%s)", error)
        return Hashes()


def _catalogue(
    store: Store,
    listing: Listing,
    dataset: str,
    name: str,
    options: dict[str, Any],
    seconds_per_image: float,
    peak_memory_mb: float,
) -> Category:
    """Write the category's catalogue, unless it is there."""
    samples = [sample for sample in listing.samples if sample.category == name]
    aside = [entry for entry in listing.set_aside if entry.category == name]
    content = fingerprint(samples)
    # The files set aside are part of the key: they change what is reported though not what is learned.
    key = step_key(
        "catalogues",
        dataset,
        name,
        fingerprint=content,
        set_aside=_rows(aside),
        folders=list(listing.folders),
        notes=listing.notes.get(name),
        options=options,
        code=code_fingerprint(__name__, DATASETS[dataset]),
    )
    if store.find(key) is None:
        with store.draft(key) as draft:
            store.write_bytes(f"{draft.folder}/samples.parquet", to_parquet(samples))
            draft.commit(
                {
                    "counts": _counts(samples),
                    "set_aside": _rows(aside),
                    "folders": list(listing.folders),
                    "notes": listing.notes.get(name),
                    "options": options,
                    "seconds": round(seconds_per_image * len(samples), 3),
                    "peak_memory_mb": round(peak_memory_mb, 1),
                }
            )
    logger.info("%s/%s: %d images listed, %d files set aside", dataset, name, len(samples), len(aside))
    return Category(store.url, dataset, name, str(listing.root), key, content)


def _rows(aside: list[SetAside]) -> list[dict[str, Any]]:
    return [
        {"path": entry.path, "reason": entry.reason} | ({} if entry.files == 1 else {"files": entry.files})
        for entry in aside
    ]


def _counts(samples: list[Sample]) -> dict[str, int]:
    """Numbers of images by use, such as `test_anomalous`; `without_mask` are anomalous images whose mask is unknown."""
    counts = Counter(sample.split if sample.split != "test" else f"test_{sample.label}" for sample in samples)
    without = sum(sample.label == "anomalous" and sample.mask is None for sample in samples)
    return {**dict(sorted(counts.items())), "without_mask": without}
