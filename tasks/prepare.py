"""Decode and resize each image of a category once; no later step opens an image file again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from al_models.errors import InvalidInput
from al_models.parts.images import (
    WHOLE,
    Decoded,
    decode,
    header_of,
    highest_value,
    learned_white,
    light,
    perceptual_hash,
    resize,
)
from storage.errors import MaskError, NotInStore
from storage.files import read_image
from storage.listing import inside
from storage.masks import read_turned_mask
from storage.samples import Sample, from_parquet, parse_box
from storage.stacks import Stack
from storage.store import Draft, Store
from storage.tables import read_table, write_table
from tasks.core.earlier import Earlier, earlier, remember
from tasks.core.handles import Category, Prepared
from tasks.core.progress import Progress
from tasks.core.steps import code_fingerprint, run_step, step, step_key

logger = logging.getLogger(__name__)

CHUNK = 16
SHARD = 64
"""Images written at once: a shard that is written in parts is rewritten each time."""

_Seen = tuple[dict[str, Any], np.ndarray]
"""Facts of a sample, and its pixels (h, w, c)."""
OF_THE_IMAGE = {
    "readable": "bool",
    "problem": "string",
    "width": "Int64",
    "height": "Int64",
    "format": "string",
    "mode": "string",
    "bit_depth": "Int64",
    "n_channels": "Int64",
    "brightness": "Float64",
    "contrast": "Float64",
    "sharpness": "Float64",
    "perceptual_hash": "string",
    "constant": "boolean",
    "note": "string",
    "orientation": "Int64",
    "highest": "Float64",
    "beyond": "Float64",
    "white": "Float64",
}
"""What follows from an image's content, and from the range of its category, alone."""
COLUMNS = {
    "id": "string",
    "key": "string",
    "path": "string",
    "part": "string",
    "split": "string",
    "label": "string",
    "defect_type": "string",
    **OF_THE_IMAGE,
    "mask_state": "string",
    "mask_problem": "string",
    "mask_width": "Int64",
    "mask_height": "Int64",
    "mask_fraction": "Float64",
    "mask_border": "Float64",
    "mask_orientation": "Int64",
}
"""Columns of `facts.parquet`. The orientations are EXIF's, 1 where there is none, and `mask_border` is the share of
the image's outermost pixels that its mask marks. Of files with more than 8 bits a channel, `highest` is the largest
value, `white` the end of the range that was learned, and `beyond` the share of values above it. Brightness, contrast
and sharpness are `al_models.parts.images.light` of the resized image."""


@step("prepare", "prepare {category.dataset}/{category.category}")
def prepare(category: Category, image_size: int, white: float | None = None) -> Prepared:
    """Keep the category's images as uint8 squares, and what was seen while decoding them.

    The output holds a Zarr array `images` (n, size, size, c) with a row a listed sample, c = 1 where all images are
    gray and 3 otherwise, the rows of unreadable files zero; and `facts.parquet` with one row a sample (`COLUMNS`).
    Where good images to learn from have more than 8 bits a channel, the range of values that becomes 0..255 is learned
    from them (`learned_white`), unless `white` gives its end, as a night does for a model that was made before; the
    manifest has it as `white`.

    What an earlier output has of the images is not decoded again: its rows come first and stay where they are.
    Raises DatasetError when a file has changed since it was listed, OutsideRoot when its path leaves the root,
    InvalidInput for a size below 1.
    """
    if image_size < 1:
        raise InvalidInput(f"image size {image_size} is not a side in pixels; give at least 1, such as 256")
    store = Store(category.store)
    key = images_series(category, image_size, fingerprint=category.fingerprint, **_of_range(white))
    run_step(store, key, partial(_prepare, store, category, image_size, white))
    return Prepared(category, image_size, key)


def images_series(category: Category, image_size: int, **of: Any) -> str:
    """The name of the series of outputs whose rows are equal for equal images."""
    code = code_fingerprint(__name__)
    return step_key("images", category.dataset, category.category, image_size=image_size, code=code, **of)


def _of_range(white: float | None) -> dict[str, float]:
    return {} if white is None else {"white": white}


def white_of(store: Store, images: str) -> float | None:
    """The end of the range that prepared images were scaled from; None for 8 bits, and where they are not there."""
    output = store.find(images)
    return None if output is None else output.meta.get("white")


def pixels_series(prepared: Prepared) -> str:
    """The name of the series of what reads equal pixels of equal images: of images with one range."""
    store = Store(prepared.category.store)
    return images_series(prepared.category, prepared.image_size, **_of_range(white_of(store, prepared.images)))


def _prepare(store: Store, category: Category, image_size: int, white: float | None, draft: Draft) -> dict[str, Any]:
    catalogue = store.get(category.catalogue)
    samples = from_parquet(store.read_bytes(f"{catalogue.folder}/samples.parquet"))
    root, folders = Path(category.root), catalogue.meta["folders"]
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes without the interpreter's lock
        headers = list(pool.map(lambda sample: header_of(inside(root, sample.path, folders)), samples))
        channels = 3 if any(header and not header.gray for header in headers) else 1
        shape = (image_size, image_size, channels)
        series = images_series(category, image_size)
        if white is None:
            good = [s for s, h in zip(samples, headers, strict=True) if h and h.deep and s.split != "test"]
            white = _learned(pool, store, series, root, folders, good)
        before = _before(store, series, channels, white)
        base = before.known if before is not None and before.known.stays() else None
        stay = {} if before is None or base is None else before.facts
        written = [sample for sample in samples if sample.id not in stay]
        blocks = _blocks(pool, partial(_look, root, folders, shape, before, white), written)
        new = iter(_write(store, f"{draft.folder}/images", (len(written), *shape), blocks, category.name))
        known = pool.map(partial(_known, root, folders, stay), [sample for sample in samples if sample.id in stay])
        facts = [next(known if sample.id in stay else new) for sample in samples]
    table = pd.DataFrame(facts, columns=list(COLUMNS)).astype(COLUMNS)
    write_table(store, f"{draft.folder}/facts.parquet", table)
    logger.info("%s: %d images prepared at %d px", category.name, len(samples), image_size)
    remember(store, series, draft.key)
    ids = [sample.id for sample in written]
    if base is not None:
        return {**base.followed_by(draft.folder, ids), "channels": channels, "white": white, "reused": base.images}
    reused = 0 if before is None else sum(name in before.facts for name in ids)
    return {"ids": ids, "channels": channels, "white": white, "reused": reused}


def _learned(
    pool: ThreadPoolExecutor, store: Store, series: str, root: Path, folders: Sequence[str], good: Sequence[Sample]
) -> float | None:
    """The end of the range of good images with more than 8 bits; images that were decoded before are not decoded
    again."""
    if not good:
        return None
    known = earlier(store, series)
    seen: dict[str, float] = {}
    with suppress(NotInStore, KeyError):
        if known is not None:
            table = read_table(store, f"{known.output.folder}/facts.parquet", ["id", "highest"]).dropna()
            seen = dict(zip(table["id"], table["highest"].astype(float), strict=True))
    new = [sample for sample in good if sample.id not in seen]
    values = pool.map(lambda sample: highest_value(read_image(root, sample, folders)), new)
    before = [seen[sample.id] for sample in good if sample.id in seen]
    return learned_white([*before, *(value for value in values if value is not None)])


def _write(
    store: Store, key: str, shape: tuple[int, int, int, int], blocks: Iterator[list[_Seen]], name: str
) -> list[dict[str, Any]]:
    """Keep the pixels of these samples, if there are any; their facts."""
    facts: list[dict[str, Any]] = []
    if not shape[0]:
        return facts
    images, progress = store.create_array(key, shape, "uint8", chunk=CHUNK, shard=SHARD), Progress(f"decode {name}")
    for block in blocks:
        images[len(facts) : len(facts) + len(block)] = np.stack([pixels for _, pixels in block])  # (n, h, w, c)
        facts += [row for row, _ in block]
        progress("", len(facts), shape[0])
    return facts


class _Before:
    """Images that were decoded before, and what was seen of them."""

    def __init__(self, store: Store, known: Earlier) -> None:
        self.known, stack = known, Stack.open(store, known.output, "images")
        table = read_table(store, f"{known.output.folder}/facts.parquet")
        self.facts = table.drop_duplicates("id").set_index("id")[list(OF_THE_IMAGE)].to_dict("index")
        n, chunk = stack.shape[0], stack.chunk
        self._chunk = lru_cache(8)(lambda place: stack.read(range(place * chunk, min(n, (place + 1) * chunk))))
        self._size = chunk

    def pixels(self, image_id: str) -> np.ndarray:
        """(h, w, c)."""
        row = self.known.rows[image_id]
        return self._chunk(row // self._size)[row % self._size]


def _before(store: Store, series: str, channels: int, white: float | None) -> _Before | None:
    known = earlier(store, series)
    with suppress(NotInStore):  # images that are gone are decoded again
        if known and (known.output.meta["channels"], known.output.meta.get("white")) == (channels, white):
            return _Before(store, known)
    return None


def _blocks(pool: ThreadPoolExecutor, look: partial[_Seen], samples: Sequence[Sample]) -> Iterator[list[_Seen]]:
    """The facts and pixels of the samples, a shard at a time; the next shard is decoded while this one is written."""
    pending: Iterator[_Seen] = iter(())
    for start in range(0, len(samples) + SHARD, SHARD):
        following = pool.map(look, samples[start : start + SHARD])
        if start:
            yield list(pending)
        pending = following


def _look(
    root: Path,
    folders: Sequence[str],
    shape: tuple[int, int, int],
    before: _Before | None,
    white: float | None,
    sample: Sample,
) -> _Seen:
    """The facts of one sample and its resized pixels (h, w, c), which are zero for an unreadable file."""
    if before is not None and sample.id in before.facts:
        return _known(root, folders, before.facts, sample), before.pixels(sample.id)
    row = {**_listed(root, folders, sample), "readable": True}
    pixels = np.zeros(shape, dtype=np.uint8)  # (h, w, c)
    data = read_image(root, sample, folders)
    try:
        decoded = _cut(decode(data, white), sample.box)
    except InvalidInput as error:
        return {**row, "readable": False, "problem": str(error)}, pixels
    small = resize(decoded.pixels, shape[0])
    pixels[:] = small if small.ndim == 3 else small[..., None]
    deep = decoded.highest is not None
    seen = {**_describe(decoded, small), "white": (white or WHOLE) if deep else None}
    return {**row, **seen}, pixels


def _known(root: Path, folders: Sequence[str], facts: Mapping[str, dict[str, Any]], sample: Sample) -> dict[str, Any]:
    """The facts of a sample that was decoded before."""
    return _listed(root, folders, sample) | facts[sample.id]


def _listed(root: Path, folders: Sequence[str], sample: Sample) -> dict[str, Any]:
    """The facts that do not follow from an image's content."""
    return {
        "id": sample.id,
        "key": sample.key,
        "path": sample.path,
        "part": sample.part,
        "split": sample.split,
        "label": sample.label,
        "defect_type": sample.defect_type,
        **_look_at_mask(root, folders, sample),
    }


def _cut(decoded: Decoded, box: str | None) -> Decoded:
    """The sample's part of its file."""
    if box is None:
        return decoded
    x, y, width, height = parse_box(box)
    if x + width > decoded.width or y + height > decoded.height:
        raise InvalidInput(f"its box {box} reaches beyond the file's {decoded.width}x{decoded.height} px")
    return replace(decoded, pixels=decoded.pixels[y : y + height, x : x + width], width=width, height=height)


def _describe(decoded: Decoded, small: np.ndarray) -> dict[str, Any]:
    # A constant image stays constant when it is resized, so most images need no look at every pixel.
    constant = np.ptp(small, axis=(0, 1)).max() == 0 and np.ptp(decoded.pixels, axis=(0, 1)).max() == 0
    return {
        "width": decoded.width,
        "height": decoded.height,
        "format": decoded.format,
        "mode": decoded.mode,
        "bit_depth": decoded.bit_depth,
        "n_channels": decoded.n_channels,
        **light(small),
        "perceptual_hash": perceptual_hash(small).hex(),
        "constant": bool(constant),
        "note": decoded.note,
        "orientation": decoded.orientation,
        # At least that of 8 bits, as when a range is learned: a dark image of whole numbers shows no fractions.
        "highest": decoded.highest if decoded.highest is None or decoded.mode == "F" else max(255.0, decoded.highest),
        "beyond": None if decoded.highest is None else decoded.beyond,
    }


def _look_at_mask(root: Path, folders: Sequence[str], sample: Sample) -> dict[str, Any]:
    if sample.mask is None:
        return {"mask_state": sample.mask_state}
    try:
        mask, turned = read_turned_mask(root, sample, folders)
    except MaskError as error:
        return {"mask_state": "unreadable", "mask_problem": str(error)}
    height, width = mask.shape
    return {
        "mask_state": sample.mask_state,
        "mask_width": width,
        "mask_height": height,
        "mask_fraction": float(mask.mean()),
        "mask_border": float(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean()),
        "mask_orientation": turned,
    }
