"""Synthetic defects with exact masks, for methods that learn from them and for the demo data.

Each defect takes an image and a generator and gives `(image, mask)`: uint8 (h, w, 3) and bool (h, w). The mask is
exactly the set of pixels that may differ from the given image; it is never empty, and nothing changes outside of it.
The given image is never written to, and every random choice comes from the generator: an equal seed, an equal defect.
Lengths in pixels are meant for a shorter side of 256 and grow with the image. Defects that take other images (`donor`,
`donors`, `texture`, `textures`) make do with the image itself. `parts/draw.py` draws them into batches.

Shape letters: h x w pixels of the image, n pixels of the mask, p x q cells of the noise or pixels of a patch, s samples
along a line, k superpixels or corners.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from al_models.parts.defects.canvas import MIN_SIDE, Defect, Fill, Interval
from al_models.parts.defects.composite import draem_composite, perlin_composite
from al_models.parts.defects.drawing import hole, scratch, stain
from al_models.parts.defects.paste import cut_paste, scar
from al_models.parts.defects.perlin import perlin_noise
from al_models.parts.defects.poisson import poisson_blend, seamless
from al_models.parts.defects.regions import (
    disjoint_grid_masks,
    grid_mask,
    noise,
    random_erase,
    random_region,
    strips,
)
from al_models.parts.defects.superpixel import superpixel, superpixels
from al_models.parts.defects.textures import generated_texture, texture_bank
from al_models.parts.defects.warp import warp

__all__ = [
    "DEFECTS",
    "MIN_SIDE",
    "Defect",
    "Fill",
    "Interval",
    "cut_paste",
    "disjoint_grid_masks",
    "draem_composite",
    "generated_texture",
    "grid_mask",
    "hole",
    "noise",
    "perlin_composite",
    "perlin_noise",
    "poisson_blend",
    "random_erase",
    "random_region",
    "scar",
    "scratch",
    "seamless",
    "stain",
    "strips",
    "superpixel",
    "superpixels",
    "texture_bank",
    "warp",
]

DEFECTS: Mapping[str, Defect] = MappingProxyType(
    {
        "cut_paste": cut_paste,
        "draem_composite": draem_composite,
        "grid_mask": grid_mask,
        "hole": hole,
        "noise": noise,
        "perlin_composite": perlin_composite,
        "poisson_blend": poisson_blend,
        "random_erase": random_erase,
        "random_region": random_region,
        "scar": scar,
        "scratch": scratch,
        "stain": stain,
        "strips": strips,
        "superpixel": superpixel,
        "warp": warp,
    }
)
"""Every defect by its name, callable as `(image, rng)`."""
