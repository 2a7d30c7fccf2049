"""Methods judged without a test image: held-out good images, and the same with synthetic defects in them.

    python tests/benchmarks/synthetic.py DATASET=FOLDER[,DATASET=FOLDER...] METHOD[,METHOD...] [NAME=VALUE ...]
        [--keep FOLDER] [--seed 0]

What a default, a rule or a remedy is chosen by, so that no test image has a say. Each held-out image gets one small and
faint defect of each kind, half of them with their centre in the frame of 16 pixels along the rim. `calm` as a DATASET
is made here: a disc of a rough texture on a flat, dark ground. Beside the three figures, over all defects: image AUROC
of those inside and of those in the frame, and the share of good images whose maximum lies in the frame. `--keep`: where
features are kept between runs.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from features import Category, extracted
from skimage import data as textures
from trained import Stored, _class, value_of

from al_models import Runtime
from al_models.metrics import PixelCounts, image_metrics
from al_models.parts.defects import cut_paste, perlin_composite, scar, scratch, stain
from tasks.core.split import fit_and_calibration

SIZE = 256
FRAME = 16
FAINT = {
    "cut_paste": partial(cut_paste, area=(0.003, 0.02)),
    "scar": partial(scar, length=(8, 20), width=(2, 6)),
    "perlin_composite": partial(perlin_composite, opacity=(0.1, 0.5), cells=(4, 8, 16), threshold=0.75),
    "scratch": partial(scratch, length=(0.1, 0.3), width=(2, 4), contrast=(10, 40)),
    "stain": partial(stain, radius=(0.02, 0.06), contrast=(10, 40)),
}


def main() -> None:
    """Measure and print a line for each data set and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATASET=FOLDER[,...]")
    parser.add_argument("methods", metavar="METHOD[,METHOD...]")
    parser.add_argument("params", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_intermixed_args()
    params = {name: value_of(text) for name, _, text in (item.partition("=") for item in given.params)}
    for dataset, _, root in (item.partition("=") for item in given.data.split(",")):
        for name in given.methods.split(","):
            cls = _class(name)
            known = {field.name for field in fields(cls)}
            detector = cls(**{key: value for key, value in params.items() if key in known})
            print(f"{dataset} {Path(root).name} {name}: {judged(dataset, root, detector, given)}", flush=True)


def judged(dataset: str, root: str, detector, given) -> str:
    """Fit on good images, judge held-out ones and their defects."""
    size = detector.image_size
    train, good, bad, masks, framed = made(dataset, root, size)
    spec = detector.feature_spec()
    images = torch.cat([train, good, bad])
    features = kept(images, spec, given.keep) if spec else {}
    names = [str(i) for i in range(len(images))]
    n, m = len(train), len(good)
    shown = images if detector.traits.needs_images else None
    start = time.perf_counter()
    detector.fit(Stored(shown, features, range(n), names, spec), Runtime(seed=given.seed))
    seconds = time.perf_counter() - start
    found = detector.predict(Stored(shown, features, range(n, len(images)), names), Runtime(seed=given.seed))
    return figures(found.maps, found.scores, m, masks, framed) + f"; fit {seconds:.0f} s"


def figures(maps: np.ndarray, scores: np.ndarray, m: int, masks: np.ndarray, framed: np.ndarray) -> str:
    """Of the maps of m good images and then of those with defects."""
    counts = PixelCounts()
    for i, values in enumerate(maps):
        counts.add(str(i), values, masks[i - m] if i >= m else None, masks.shape[1:])
    labels = np.arange(len(scores)) >= m
    whole = image_metrics(scores, labels) | counts.metrics()
    ranks = [np.concatenate([~labels[:m], chosen]) for chosen in (~framed, framed)]
    inside, rim = (image_metrics(scores[keep], labels[keep])["image_auroc"] for keep in ranks)
    peaks = maps[:m].reshape(m, -1).argmax(1)
    y, x = peaks // maps.shape[2], peaks % maps.shape[2]
    edge = FRAME * maps.shape[1] / SIZE
    at_rim = np.mean([min(a, b) < edge or max(a, b) >= maps.shape[1] - edge for a, b in zip(y, x, strict=True)])
    three = " / ".join(f"{100 * whole[name]:.1f}" for name in ("image_auroc", "pixel_auroc", "pro"))
    return f"{three}; inside {100 * inside:.1f}, rim {100 * rim:.1f}; maxima in the frame {100 * at_rim:.0f} %"


def made(dataset: str, root: str, size: int):
    """Training images, held-out ones, those with defects, their masks, and which defects lie in the frame."""
    images = calm(size) if dataset == "calm" else None
    if images is None:
        category = Category.of(dataset, root)
        learn, held = fit_and_calibration([replace(s, mask=None) for s in category.samples], 0)
        row = {sample.id: place for place, sample in enumerate(category.samples)}
        whole = category.images(size)
        images = whole[[row[i] for i in learn]], whole[[row[i] for i in held]]
    train, good = images
    bad, masks, framed = [], [], []
    for i, image in enumerate(good.numpy()):
        for kind, defect in enumerate(FAINT.values()):
            rim = (i + kind) % 2 == 1
            changed, mask = placed(image, defect, np.random.default_rng([i, kind]), rim=rim)
            bad.append(changed)
            masks.append(mask)
            framed.append(rim)
    return train, good, torch.from_numpy(np.stack(bad)), np.stack(masks), np.array(framed)


def placed(image: np.ndarray, defect, rng: np.random.Generator, *, rim: bool):
    """The image with a defect whose centre lies in the frame, or inside of it: it is drawn until it does."""
    edge = FRAME * len(image) / SIZE
    for _ in range(10_000):
        # Defects keep away from the rim by themselves: the image is turned around its edges, changed, and turned back.
        shift = tuple(int(v) for v in rng.integers(0, len(image), 2))
        changed, mask = defect(image, rng) if not rim else _turned(image, defect, shift, rng)
        y, x = np.nonzero(mask)
        centre = y.mean(), x.mean()
        in_frame = min(centre) < edge or max(centre) >= len(image) - edge
        spread = max(np.ptp(y), np.ptp(x)) < len(image) / 2  # not cut in two by the turn
        if in_frame == rim and (spread or not rim):
            return changed, mask
    raise AssertionError("no defect fell where it should")


def _turned(image, defect, shift, rng):
    changed, mask = defect(np.roll(image, shift, (0, 1)), rng)
    back = tuple(-v for v in shift)
    return np.roll(changed, back, (0, 1)), np.roll(mask, back, (0, 1))


def calm(size: int, n: int = 189, held: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    """A disc of random gravel on a flat, dark ground with a camera's noise."""
    rng = np.random.default_rng(0)
    gravel = np.asarray(textures.gravel())
    y, x = np.mgrid[:size, :size] - size / 2
    disc = np.clip(size * 0.3 - np.hypot(y, x), 0, 1)
    found = []
    for _ in range(n + held):
        top, left = rng.integers(0, gravel.shape[0] - size, 2)
        texture = gravel[top : top + size, left : left + size]
        image = disc * texture + (1 - disc) * 25 + rng.normal(0, 1, (size, size))
        found.append(np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, 2))
    stacked = torch.from_numpy(np.stack(found))
    return stacked[:n], stacked[n:]


def kept(images: torch.Tensor, spec, folder: Path | None) -> dict[int, torch.Tensor]:
    """Features of the images, from the folder if they are there."""
    if folder is None:
        return extracted(images, spec)[0]
    name = hashlib.sha256(images.numpy().tobytes() + repr(spec).encode()).hexdigest()[:16]
    file = folder / f"{name}.pt"
    if not file.exists():
        torch.save(extracted(images, spec)[0], file)
    return torch.load(file, mmap=True)


if __name__ == "__main__":
    main()
