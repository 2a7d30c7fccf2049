"""Epochs out of a source: every image once an epoch, the same order again, whether or not all fit in memory."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from al_models.parts.epochs import BLOCK, Epochs, collected
from al_models.types import ImageBatch, ImageSource


class Counted(ImageSource):
    """Images and features that tell their row; notes what was read together."""

    batch_size = 5

    def __init__(self, n):
        self.ids, self.reads = tuple(f"image {row}" for row in range(n)), []

    def read(self, rows):
        self.reads.append(list(rows))
        at = torch.tensor(list(rows))
        images = at.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3)
        return ImageBatch(
            tuple(self.ids[r] for r in rows), images, {2: at.half().view(-1, 1, 1, 1).expand(-1, 4, 1, 1)}
        )


BYTES = 2 * 2 * 3 + 4 * 2
"""Of one such image."""


def rows_of(batch):
    found = batch.images[:, 0, 0, 0].tolist()
    assert found == batch.features[2][:, 3, 0, 0].int().tolist()
    assert [f"image {row}" for row in found] == list(batch.ids)
    return found


@given(n=st.integers(1, 60), batch_size=st.integers(1, 20), room=st.integers(1, 80), seed=st.integers(0, 3))
def test_each_epoch_has_each_row_once_in_batches_of_nearly_one_size(n, batch_size, room, seed):
    rows = list(range(0, 2 * n, 2))
    with Epochs(Counted(2 * n), rows, batch_size, seed, in_memory=room * BYTES) as epochs:
        batches = [rows_of(epochs.batch(step)) for step in range(3 * len(epochs))]
    for epoch in range(3):
        mine = batches[epoch * len(epochs) : (epoch + 1) * len(epochs)]
        assert sorted(row for batch in mine for row in batch) == rows
        assert max(map(len, mine)) <= batch_size
    if epochs.whole:
        assert max(map(len, batches)) - min(map(len, batches)) <= 1


@pytest.mark.parametrize("in_memory", [10**6, 20 * BYTES])
def test_a_step_depends_on_nothing_before_it(in_memory):
    with Epochs(Counted(50), range(50), 7, 3, in_memory) as epochs:
        whole = [rows_of(epochs.batch(step)) for step in range(2 * len(epochs))]
    with Epochs(Counted(50), range(50), 7, 3, in_memory) as again:
        for step in (len(again) + 2, 1):
            assert rows_of(again.batch(step)) == whole[step]
    assert whole[: len(epochs)] != whole[len(epochs) :]


def test_what_fits_is_read_once():
    source = Counted(20)
    with Epochs(source, range(20), 4, 0) as epochs:
        for step in range(4 * len(epochs)):
            epochs.batch(step)
    assert sorted(row for rows in source.reads[1:] for row in rows) == list(range(20))


def test_what_does_not_fit_is_read_in_blocks_of_neighbours():
    source = Counted(64)
    with Epochs(source, range(64), 8, 0, in_memory=32 * BYTES) as epochs:
        for step in range(len(epochs)):
            epochs.batch(step)
    flat = [row for rows in source.reads[1:] for row in rows][:64]
    assert sorted(flat) == list(range(64))
    assert flat != list(range(64))
    for start in range(0, 64, BLOCK):
        assert flat[start : start + BLOCK] == list(range(flat[start], flat[start] + BLOCK))


def test_a_failed_read_is_heard_of():
    class Broken(Counted):
        def read(self, rows):
            if len(rows) > 1:
                raise OSError("the disk is gone")
            return super().read(rows)

    with Epochs(Broken(9), range(9), 3, 0) as epochs, pytest.raises(OSError, match="the disk is gone"):
        epochs.batch(0)


def test_rows_are_collected_in_the_order_asked():
    assert rows_of(collected(Counted(30), [7, 3, 29, 0, 11, 2, 5])) == [7, 3, 29, 0, 11, 2, 5]


# what is prepared ahead


def drawn(batch, generators):
    """Row and a random number for each image."""
    return list(zip(rows_of(batch), (float(generator.random()) for generator in generators), strict=True))


@pytest.mark.parametrize("in_memory", [10**6, 20 * BYTES])
def test_what_is_prepared_depends_on_seed_epoch_and_image_alone(in_memory):
    with Epochs(Counted(50), range(50), 7, 3, in_memory, drawn) as epochs:
        whole = [epochs.batch(step) for step in range(2 * len(epochs))]
        n = len(epochs)
    with Epochs(Counted(50), range(50), 7, 3, in_memory, drawn) as again:
        for step in (n + 2, 1, n + 1):
            assert again.batch(step) == whole[step]
    with Epochs(Counted(50), range(50), 5, 3, in_memory, drawn) as smaller:
        first = {row: number for step in range(len(smaller)) for row, number in smaller.batch(step)}
    assert first == {row: number for batch in whole[:n] for row, number in batch}
    second = {row: number for batch in whole[n:] for row, number in batch}
    assert first.keys() == second.keys()
    assert all(first[row] != second[row] for row in first), "another epoch draws anew"


def test_the_next_batch_is_prepared_before_it_is_asked_for():
    made, second = [], threading.Event()

    def prepare(batch, generators):
        made.append(rows_of(batch))
        if len(made) == 2:
            second.set()

    with Epochs(Counted(12), range(12), 4, 0, prepare=prepare) as epochs:
        epochs.batch(0)
        assert second.wait(10)


def test_a_failed_preparation_is_heard_of():
    def prepare(batch, generators):
        raise ValueError("no texture to blend with")

    with Epochs(Counted(9), range(9), 3, 0, prepare=prepare) as epochs, pytest.raises(ValueError, match="no texture"):
        epochs.batch(0)
