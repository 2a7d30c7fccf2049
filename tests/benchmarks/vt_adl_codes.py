"""What VT-ADL's codes say of defects, and what its density makes of them: why it stays behind on textures.

    python tests/benchmarks/vt_adl_codes.py mvtec_ad=DATA/grid [NAME=VALUE ...]

Trains the detector (ten epochs at 128 px, unless the parameters say otherwise), freezes its codes, and judges patches
(8 x 8 an image) in several ways, each by pixel AUROC and PRO of maps that are smoothed as the detector's: by the true
share of the defect in each patch; by the detector's negative log-likelihood; by one Gaussian over all codes; by the
directions of the codes that vary least; and by a density that is trained anew on these codes as they are and whitened.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from features import Category, add
from torch import Tensor
from torch.nn import functional as F
from trained import Stored, value_of

from al_models import Runtime
from al_models.embedding.vt_adl import Density, VisionTransformer, VtAdl, mixture_nll
from al_models.metrics import PixelCounts
from al_models.parts.maps import to_maps
from storage.masks import read_mask
from tasks.split import fit_and_calibration

DEFAULTS = {"image_size": 128, "patch": 16, "learning_rate": 1e-3, "epochs": 10}
LEAST = 68
"""Directions that vary least, of 128."""
STEPS, BATCH, NOISE = 500, 96, 0.2
"""Of a density's training on frozen codes."""


def main() -> None:
    """Measure and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATASET=FOLDER")
    parser.add_argument("params", nargs="*", metavar="NAME=VALUE")
    given = parser.parse_args()
    dataset, _, root = given.data.partition("=")
    params = {name: value_of(text) for name, _, text in (item.partition("=") for item in given.params)}
    detector, category = VtAdl(**{**DEFAULTS, **params}), Category.of(dataset, root)
    names = [sample.id for sample in category.samples]
    learned, _ = fit_and_calibration([replace(s, mask=None) for s in category.samples], 0)
    images = category.images(detector.image_size)
    train = [names.index(name) for name in learned]
    test = [place for place, sample in enumerate(category.samples) if sample.split == "test"]
    detector.fit(Stored(images, {}, train, names), Runtime(seed=0))
    say = _judge(category, test, detector)
    say("true share of the defect", _share(category, test, detector))
    with torch.no_grad():
        known, new = (_codes(detector.network_, images, rows) for rows in (train, test))
        say("the detector", mixture_nll(new, *detector.network_.density(new)))
    mean, values, directions = _axes(known)
    apart = (new - mean) @ directions
    share = [float(values[-first:].sum() / values.sum()) for first in (1, 20)]
    print(f"of their variance {share[0]:.0%} in one direction, {share[1]:.0%} in 20")
    say("one Gaussian", (apart.square() / (values + 1e-3)).sum(-1))
    say(f"the {LEAST} directions that vary least", (apart.square() / (values + 1e-3))[..., :LEAST].sum(-1))
    say("a density on these codes", _density(known, new, detector.gaussians))
    white = (values + 1e-3).rsqrt()
    say("a density on them, whitened", _density((known - mean) @ directions * white, apart * white, detector.gaussians))


def _judge(category: Category, test: list[int], detector: VtAdl) -> Callable[[str, Tensor], None]:
    def say(what: str, patches: Tensor) -> None:
        side = detector.image_size // detector.patch
        maps = to_maps(patches.reshape(-1, side, side).float(), 256, detector.sigma)
        maps = (maps - maps.amin()) / (maps.amax() - maps.amin())
        counts = PixelCounts()
        for place, values in zip(test, maps.numpy(), strict=True):
            add(counts, category, category.samples[place], values)
        found = counts.metrics()
        print(f"{what:38} {100 * found['pixel_auroc']:.1f} / {100 * found['pro']:.1f}", flush=True)

    return say


def _share(category: Category, test: list[int], detector: VtAdl) -> Tensor:
    side = detector.image_size // detector.patch
    shares = torch.zeros(len(test), side, side)
    for share, place in zip(shares, test, strict=True):
        sample = category.samples[place]
        if sample.mask is not None:
            mask = torch.from_numpy(read_mask(category.root, sample, category.folders)).float()
            share.copy_(F.adaptive_avg_pool2d(mask[None], side)[0])
    return shares


def _codes(network: VisionTransformer, images: Tensor, rows: list[int]) -> Tensor:
    """(n, t, d)."""
    unit = images[rows].permute(0, 3, 1, 2).float() / 255
    return torch.cat([network.encoder(part) for part in unit.split(16)])


def _axes(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, and variance and direction of each principal axis, the least first."""
    flat = codes.flatten(0, 1)
    centred = flat - flat.mean(0)
    return flat.mean(0), *torch.linalg.eigh(centred.T @ centred / len(flat))


def _density(known: Tensor, new: Tensor, gaussians: int) -> Tensor:
    """NLL (n, t) by a density that has learned the known codes."""
    torch.manual_seed(0)
    density, flat = Density(known.shape[-1], gaussians), known.flatten(0, 1)
    optimizer = torch.optim.Adam(density.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(STEPS):
        codes = flat[torch.randint(len(flat), (BATCH,))]
        codes = codes + NOISE * torch.randn_like(codes)
        loss = mixture_nll(codes, *density(codes)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return torch.cat([mixture_nll(part, *density(part)) for part in new.split(16)])


if __name__ == "__main__":
    main()
