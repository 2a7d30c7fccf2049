"""Patches cloned without a seam: inside, the gradients are the patch's; at its border, the colours are the image's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.fft import dstn, idstn
from scipy.sparse import csc_array
from scipy.sparse.linalg import splu

from al_models.errors import InvalidInput
from al_models.parts.defects.canvas import Interval, blob, checked, chosen

Gradients = Literal["patch", "mixed"]
_TRIES = 5
_SHOWS = 10.0
"""Largest difference in grey levels from which a patch is seen."""


def poisson_blend(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    donors: Sequence[np.ndarray] | np.ndarray | None = None,
    side: Interval = (0.1, 0.4),
    zoom: Interval = (0.7, 1.3),
    patches: int = 3,
    gradients: Gradients = "patch",
    outline: Literal["rectangle", "blob"] = "rectangle",
) -> tuple[np.ndarray, np.ndarray]:
    """Clone patches of another image, or of the image itself, without a seam.

    `donors` are uint8 of any size, one is chosen for each patch. `side` is the height, and the width, of a patch as a
    share of the image's; it is scaled by `zoom`, drawn from a normal distribution around 1 (standard deviation 0.5).
    After the first patch each of up to `patches` follows by the toss of a coin. With `mixed` gradients the stronger of
    the patch's and the image's counts. A patch that cannot be seen, such as white on white, is drawn anew a few times;
    on an image without any texture none can be.

    Raises InvalidInput. Source: Schlüter et al. 2022, Natural Synthetic Anomalies, arXiv:2109.15222, without its
    choice of the object; Pérez et al. 2003, Poisson image editing.
    """
    h, w = checked(image).shape[:2]
    result, mask = image.astype(np.float64), np.zeros((h, w), bool)
    for number in range(patches):
        if number and rng.random() < 0.5:
            continue
        for _ in range(_TRIES):
            donor = chosen(donors, rng)
            source = image if donor is None else checked(donor, "donor")
            size = [int(np.clip(round(rng.uniform(*side) * length), 4, length - 2)) for length in (h, w)]
            patch = _cut(source, [n + 2 for n in size], float(np.clip(rng.normal(1, 0.5), *zoom)), rng)
            inside = _outline(size, outline, rng)
            top, left = (int(rng.integers(length - room - 1)) for length, room in zip((h, w), size, strict=True))
            place = np.s_[top : top + size[0] + 2, left : left + size[1] + 2]  # with a border of one pixel
            blended = seamless(result[place], patch, inside, gradients)
            if np.abs(blended - result[place]).max() >= _SHOWS:
                break
        result[place] = np.clip(blended, 0, 255)
        mask[place][1:-1, 1:-1] |= inside
    changed = image.copy()
    changed[mask] = np.rint(result[mask]).astype(np.uint8)
    return changed, mask


def seamless(window: np.ndarray, patch: np.ndarray, inside: np.ndarray, gradients: Gradients = "patch") -> np.ndarray:
    """The window with the patch cloned into it; float64 (p + 2, q + 2, 3), as window and patch.

    `inside` (p, q) bool says which pixels are new, not counting a border of one pixel. There the discrete Laplacian is
    the divergence of the chosen gradients, elsewhere the window stays: solved exactly, on a full rectangle by the fast
    sine transform, else by a sparse factorization. Not clipped. Raises InvalidInput for other gradients.
    """
    if gradients not in ("patch", "mixed"):
        raise InvalidInput(f"the gradients are {gradients!r}; give 'patch' or 'mixed'")
    down, right = np.diff(patch, axis=0)[:, 1:-1], np.diff(patch, axis=1)[1:-1]
    here_down, here_right = np.diff(window, axis=0)[:, 1:-1], np.diff(window, axis=1)[1:-1]
    if gradients == "mixed":
        down = np.where(np.abs(here_down) > np.abs(down), here_down, down)
        right = np.where(np.abs(here_right) > np.abs(right), here_right, right)
    # The change from the window is zero on the border, so that its Laplacian is what is missing.
    missing = np.diff(down - here_down, axis=0) + np.diff(right - here_right, axis=1)  # (p, q, 3)
    result = window.astype(np.float64)
    result[1:-1, 1:-1] += _by_sines(missing) if inside.all() else _by_elimination(missing, inside)
    return result


def _by_sines(laplacian: np.ndarray) -> np.ndarray:
    """What has this Laplacian (p, q, 3) and is zero around the rectangle."""
    p, q = laplacian.shape[:2]
    rows, columns = (2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1)) - 2 for n in (p, q))
    spectrum = dstn(laplacian, type=1, axes=(0, 1)) / (rows[:, None] + columns)[..., None]
    return np.asarray(idstn(spectrum, type=1, axes=(0, 1)))


def _by_elimination(laplacian: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """What has this Laplacian (p, q, 3) inside and is zero elsewhere."""
    n = int(inside.sum())
    number = np.full((inside.shape[0] + 1, inside.shape[1] + 1), -1)
    number[:-1, :-1][inside] = np.arange(n)
    pairs = [
        np.column_stack([ends.ravel() for ends in (number[:-1, :-1], following)])
        for following in (number[1:, :-1], number[:-1, 1:])
    ]
    linked = np.concatenate(pairs)
    linked = linked[(linked >= 0).all(axis=1)]  # (e, 2): neighbours that are both inside
    i, j = np.concatenate([linked, linked[:, ::-1], np.repeat(np.arange(n)[:, None], 2, axis=1)]).T
    matrix = csc_array((np.where(i == j, -4.0, 1.0), (i, j)), shape=(n, n))
    result = np.zeros_like(laplacian)
    result[inside] = splu(matrix, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(laplacian[inside])
    return result


def _outline(size: Sequence[int], outline: str, rng: np.random.Generator) -> np.ndarray:
    if outline == "rectangle":
        return np.ones(size, bool)
    if outline == "blob":
        middle = (np.array(size) - 1) / 2
        return blob((size[0], size[1]), middle, np.array(size) / 2, 0.4, rng) >= 0
    raise InvalidInput(f"the outline is {outline!r}; give 'rectangle' or 'blob'")


def _cut(source: np.ndarray, size: Sequence[int], factor: float, rng: np.random.Generator) -> np.ndarray:
    """A random rectangle of the source, enlarged by the factor to this size; float64 (p, q, 3), bilinear."""
    result = source
    for axis, length in enumerate(size):
        room = source.shape[axis]
        span = min((length - 1) / factor, room - 1)
        places = rng.uniform(0, room - 1 - span) + np.linspace(0, span, length)
        low = np.minimum(places.astype(int), room - 2)
        share = (places - low).reshape([-1 if i == axis else 1 for i in range(3)])
        result = (1 - share) * result.take(low, axis) + share * result.take(low + 1, axis)
    return result
