"""Training batches out of an image source, epoch after epoch, that hardly ever wait for the store.

Images that fit in memory together are read once. Otherwise a window of images is read at a time, the next one in the
background while the last is learned from. A window is made of random blocks of neighbouring images, since a store reads
those together. An epoch's order depends on the seed and its number alone, so that a resumed training sees the same
batches as an undisturbed one. Where a method prepares batches on the CPU, such as synthetic defects, threads do so
ahead of the device.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from al_models.types import ImageBatch, ImageSource

IN_MEMORY = 2 * 2**30
"""Bytes of images and features that are kept in memory."""
BLOCK = 8
"""Neighbouring images that are read together: a chunk of the stored features."""
AHEAD = 4
"""Batches that are prepared ahead."""

Prepare = Callable[[ImageBatch, Sequence[np.random.Generator]], Any]
"""(batch on the CPU, a random generator for each of its images) -> the data that a step learns from."""


class Epochs:
    """Batches of the chosen rows, each row once an epoch, in an order of its own. Use as a context manager."""

    def __init__(
        self,
        source: ImageSource,
        rows: Sequence[int],
        batch_size: int,
        seed: int,
        in_memory: int = IN_MEMORY,
        prepare: Prepare | None = None,
    ) -> None:
        """`prepare` is applied to each batch by threads, ahead of the step that takes it. The generator of an image
        depends on the seed, the epoch and the image's id alone, whatever the batch and whichever step was the first."""
        self.source, self.rows, self.batch_size, self.seed = source, list(rows), batch_size, seed
        self.prepare, self._prepared = prepare, dict[int, Future[Any]]()
        self.waited_s = 0.0
        """Seconds in which the training had to wait for images, features, or prepared batches."""
        fit = max(1, in_memory // _size(source.read(self.rows[:1])))
        self.whole = fit >= len(self.rows)
        self._window = len(self.rows) if self.whole else max(BLOCK, fit // 2)  # the next one needs its room, too
        self._reader, self._makers = ThreadPoolExecutor(1), ThreadPoolExecutor(2)
        self._held: dict[tuple[int, int], Future[ImageBatch]] = {}
        self._steps = [
            (window, part)
            for window in range(-(-len(self.rows) // self._window))
            for part in range(-(-self._length(window) // batch_size))
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._makers.shutdown(cancel_futures=True)
        self._reader.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        """Number of batches an epoch; they hold `batch_size` images or fewer, so that all are of nearly one size."""
        return len(self._steps)

    def batch(self, step: int) -> Any:
        """The batch of this step, counted through all epochs, on the CPU: an ImageBatch, or the result of `prepare`."""
        if self.prepare is None:
            return self._raw(step)
        wanted = range(step, step + AHEAD)
        self._prepared = {n: self._prepared.get(n) or self._made(n) for n in wanted}
        start = time.monotonic()
        made = self._prepared.pop(step).result()
        self.waited_s += time.monotonic() - start
        return made

    def _made(self, step: int) -> Future[Any]:
        batch, epoch = self._raw(step), step // len(self)
        assert self.prepare is not None
        return self._makers.submit(self.prepare, batch, numpy_generators(batch.ids, self.seed, epoch))

    def _raw(self, step: int) -> ImageBatch:
        epoch, index = divmod(step, len(self))
        window, part = self._steps[index]
        held = self._read(epoch, window)
        n = len(held)
        order = _shuffled(n, self.seed, epoch, window + 1)
        parts = -(-n // self.batch_size)
        return _chosen(held, order[part * n // parts : (part + 1) * n // parts])

    def _read(self, epoch: int, window: int) -> ImageBatch:
        """The images of a window; the reading of the next window is started."""
        if self.whole:
            epoch = 0  # one window holds all, whatever the epoch
        last = self._length(window + 1) == 0
        following = (epoch + 1, 0) if last else (epoch, window + 1)
        wanted = [(epoch, window)] if self.whole else [(epoch, window), following]
        self._held = {key: self._held.get(key) or self._reader.submit(self._load, *key) for key in wanted}
        start = time.monotonic()
        found = self._held[epoch, window].result()
        self.waited_s += time.monotonic() - start
        return found

    def _length(self, window: int) -> int:
        return max(0, min(self._window, len(self.rows) - window * self._window))

    def _load(self, epoch: int, window: int) -> ImageBatch:
        if self.whole:
            return collected(self.source, self.rows)
        blocks = [self.rows[i : i + BLOCK] for i in range(0, len(self.rows), BLOCK)]
        order = [row for block in _shuffled(len(blocks), self.seed, epoch, 0).tolist() for row in blocks[block]]
        return collected(self.source, order[window * self._window :][: self._window])


def collected(source: ImageSource, rows: Sequence[int]) -> ImageBatch:
    """All these rows as one batch, read `source.batch_size` at a time."""
    whole: ImageBatch | None = None
    start = 0
    for part in source.batches(rows):
        if whole is None:
            whole = _empty_like(part, len(rows))
        if part.images is not None and whole.images is not None:
            whole.images[start : start + len(part)] = part.images
        for layer, values in part.features.items():
            whole.features[layer][start : start + len(part)] = values
        start += len(part)
    assert whole is not None
    return replace(whole, ids=tuple(source.ids[row] for row in rows))


def numpy_generators(ids: Sequence[str], *seeds: int) -> list[np.random.Generator]:
    """A generator for each image, which depends on the seeds and its id alone."""
    return [np.random.default_rng([*seeds, zlib.crc32(name.encode())]) for name in ids]


def moved(batch: Any, device: str) -> Any:
    """On a device: an ImageBatch, its features in float32, or what is prepared of one, by its own `to`."""
    if not isinstance(batch, ImageBatch):
        return batch.to(device)
    images = None if batch.images is None else batch.images.to(device, non_blocking=True)
    return ImageBatch(
        batch.ids, images, {k: v.to(device, non_blocking=True).float() for k, v in batch.features.items()}
    )


def _shuffled(n: int, *seeds: int) -> Tensor:
    """A permutation of n that depends on the seeds alone."""
    seed = 0
    for value in seeds:
        seed = (seed * 1_000_003 + value) % 2**63
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _chosen(batch: ImageBatch, places: Tensor) -> ImageBatch:
    images = None if batch.images is None else batch.images[places]
    features = {layer: values[places] for layer, values in batch.features.items()}
    return ImageBatch(tuple(batch.ids[place] for place in places.tolist()), images, features)


def _empty_like(part: ImageBatch, n: int) -> ImageBatch:
    images = None if part.images is None else part.images.new_empty((n, *part.images.shape[1:]))
    features = {layer: values.new_empty((n, *values.shape[1:])) for layer, values in part.features.items()}
    return ImageBatch((), images, features)


def _size(batch: ImageBatch) -> int:
    """Bytes of the images and features of a batch."""
    tensors = [*batch.features.values(), *([] if batch.images is None else [batch.images])]
    return sum(t.numel() * t.element_size() for t in tensors)
