"""Defects drawn into batches: half of the images by default, each by its own generator, the clean ones beside them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch

from al_models.errors import InvalidInput
from al_models.parts.defects import draem_composite, hole, scratch, texture_bank
from al_models.parts.draw import Draw, Drawn
from al_models.types import ImageBatch

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 48, 48, 3), dtype=np.uint8))


def drawn(draw: Draw, rows: Sequence[int]) -> Drawn:
    """What is drawn into these images, each with a generator of its own."""
    batch = ImageBatch(tuple(str(row) for row in rows), IMAGES[list(rows)])
    return draw(batch, [np.random.default_rng([7, row]) for row in rows])


def test_the_mask_is_where_an_image_differs_from_the_clean_one() -> None:
    made = drawn(Draw([scratch, hole]), range(40))
    assert torch.equal(made.clean, IMAGES)
    changed = (made.images != made.clean).any(-1)
    assert not changed[made.masks == 0].any()
    assert torch.equal(made.has_defect, made.masks.flatten(1).any(1))
    assert 10 <= int(made.has_defect.sum()) <= 30


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 40)])
def test_a_share_of_the_images_gets_a_defect(share: float, expected: int) -> None:
    assert int(drawn(Draw([scratch], share=share), range(40)).has_defect.sum()) == expected


def test_what_is_drawn_does_not_depend_on_the_batch() -> None:
    draw = Draw([partial(draem_composite, textures=texture_bank(4, (48, 48), 0)), hole])
    whole, alone = drawn(draw, range(8)), [drawn(draw, [row]) for row in range(8)]
    assert torch.equal(whole.images, torch.cat([one.images for one in alone]))
    assert torch.equal(whole.masks, torch.cat([one.masks for one in alone]))


def test_what_changes_every_image_counts_as_clean() -> None:
    made = drawn(Draw([scratch], share=0.0, augment=lambda image, rng: image[::-1].copy()), range(3))
    assert torch.equal(made.clean, IMAGES[:3].flip(1))
    assert torch.equal(made.images, made.clean)


@pytest.mark.parametrize(("defects", "share"), [([], 0.5), ([scratch], 1.5), ([scratch], -0.1)])
def test_no_defects_and_no_share_are_refused(defects: list[object], share: float) -> None:
    with pytest.raises(InvalidInput, match="give at least one, and a share of 0 to 1"):
        Draw(defects, share=share)  # type: ignore[arg-type]


def test_a_batch_without_images_is_refused() -> None:
    with pytest.raises(InvalidInput, match="needs_images"):
        Draw([scratch])(ImageBatch(("a",)), [np.random.default_rng(0)])
