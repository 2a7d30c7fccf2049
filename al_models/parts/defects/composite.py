"""Defects that blend another texture in where Perlin noise is high."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from al_models.errors import InvalidInput
from al_models.parts.defects.canvas import Interval, blend, checked, chosen
from al_models.parts.defects.perlin import perlin_noise
from al_models.parts.defects.textures import augmented, flipped_and_shifted, made_texture, turned


def perlin_composite(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    texture: np.ndarray | None = None,
    cells: Sequence[int] = (1, 2, 4, 8, 16, 32),
    threshold: float = 0.5,
    opacity: Interval = (0.1, 1.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Blend another texture in where Perlin noise exceeds a threshold.

    `texture` is uint8, at least as large as the image (a random crop is used); without it one is made from the image
    itself. `cells` are the numbers of noise cells a side to choose from, height and width apart; cells of less than
    four pixels are left out. `opacity` is the weight of the texture, the paper's beta. Unlike in the paper's code the
    noise is not turned (`draem_composite` turns it), and where it stays below the threshold its highest parts count:
    there is always a defect.

    Raises InvalidInput. Source: Zavrtanik et al. 2021, DRAEM, arXiv:2108.07610, simulated anomaly generation.
    """
    h, w = checked(image).shape[:2]
    source = made_texture(image, rng) if texture is None else _crop(texture, (h, w), rng)
    noise = _noise((h, w), cells, rng)  # (h, w)
    mask = noise >= min(threshold, 0.8 * noise.max())
    return blend(image, mask, np.full(int(mask.sum()), rng.uniform(*opacity)), source[mask]), mask


def draem_composite(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    textures: Sequence[np.ndarray] | np.ndarray | None = None,
    cells: Sequence[int] = (1, 2, 4, 8, 16, 32),
    threshold: float = 0.5,
    opacity: Interval = (0.2, 1.0),
    turn: float = 90.0,
    augmentations: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Blend an augmented texture in where turned Perlin noise exceeds a threshold, as DRAEM's authors do.

    `textures` are uint8 (h, w, 3), each at least as large as the image; one is chosen and a random crop of it used
    (`texture_bank` makes some). Without them the image itself serves, flipped and shifted. `turn` is the largest turn
    of the noise to either side in degrees; what is turned in from outside is zero. `opacity` is the weight of the
    texture: the authors draw the weight of the image from U(0, 0.8). `augmentations` of the ten of their code change
    the texture; they are described at `augmented`. Where the noise stays below the threshold, its highest parts count.

    Raises InvalidInput. Source: Zavrtanik et al. 2021, DRAEM, arXiv:2108.07610, and data_loader.py of its authors.
    """
    h, w = checked(image).shape[:2]
    given = chosen(textures, rng)
    source = flipped_and_shifted(image, rng) if given is None else _crop(given, (h, w), rng)
    noise = turned(_noise((h, w), cells, rng), rng.uniform(-turn, turn))  # (h, w)
    mask = noise >= min(threshold, 0.8 * noise.max())
    return blend(
        image, mask, np.full(int(mask.sum()), rng.uniform(*opacity)), augmented(source, mask, augmentations, rng)
    ), mask


def _noise(shape: tuple[int, int], cells: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Perlin noise (h, w) of a random number of cells a side, height and width apart."""
    usable = [n for n in cells if n * 4 <= min(shape)] or [1]
    return perlin_noise(shape, (int(rng.choice(usable)), int(rng.choice(usable))), rng)


def _crop(texture: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    free = [have - need for have, need in zip(checked(texture, "texture").shape, shape, strict=False)]
    if min(free) < 0:
        raise InvalidInput(
            f"the texture is {texture.shape[0]} x {texture.shape[1]} pixels and the image {shape[0]} x {shape[1]}; "
            "give a texture at least as large as the image, or resize it"
        )
    top, left = (int(rng.integers(room + 1)) for room in free)
    return texture[top : top + shape[0], left : left + shape[1]]
