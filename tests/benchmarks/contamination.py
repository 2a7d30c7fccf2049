"""Real defects hidden among the training images: how many are suspected, and how many good images with them.

    python tests/benchmarks/contamination.py mvtec_ad DATA grid [--limit 5] [--draws 10] [--alternatives]

Prints the good training set as it is, then that set with 1, 3 and 10 of the category's defective test images in it,
drawn anew each time, of any defect type and of each. `recall`: planted images suspected; `at it`: of these, whose place
lies within a patch of the mask; `false`: good images suspected, mean over the draws. Features and layer are those of
the step `suspect`. `--alternatives` does the same with other ways to compare.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from scipy.ndimage import binary_dilation

from al_models.parts import contamination
from al_models.parts.contamination import Unlikeness, layer_to_compare, robust_deviations, unlikeness
from al_models.parts.gaussian import PositionGaussians, mahalanobis, whitening
from al_models.types import FeatureSpec, ImageBatch, ImageSource
from storage.masks import read_mask
from storage.samples import Sample
from storage.store import Store
from tasks.core.stored import StoredSource, accepted_samples
from tasks.extract import extract
from tasks.ingest import ingest
from tasks.prepare import prepare
from tasks.validate import validate

Compare = Callable[["Images"], Unlikeness]


@dataclass
class Images(ImageSource):
    """Samples and their features, in memory so that a draw costs no reading."""

    samples: Sequence[Sample]
    features: torch.Tensor  # (n, c, h, w)
    batch_size: int = 16

    @property
    def ids(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(sample.id for sample in self.samples)

    @property
    def parts(self) -> list[str]:
        """What each image shows."""
        return [sample.part or sample.id for sample in self.samples]

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """The only layer is called 0."""
        return ImageBatch(tuple(self.ids[row] for row in rows), None, {0: self.features[list(rows)]})

    def only(self, rows: Sequence[int]) -> Images:
        """Some of them."""
        return Images([self.samples[row] for row in rows], self.features[list(rows)])


def main() -> None:
    """Prepare, then plant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("root", type=Path)
    parser.add_argument("category")
    parser.add_argument("--limit", type=float, default=5.0)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--alternatives", action="store_true")
    given = parser.parse_args()
    images, masks = load(given)
    print(f"{given.dataset}/{given.category}, suspected above {given.limit:g} robust deviations")
    methods = {"suspect": compare} | (ALTERNATIVES if given.alternatives else {})
    for name, method in methods.items():
        table(name, method, images, masks, given.limit, given.draws)


def load(given: argparse.Namespace) -> tuple[Images, dict[str, np.ndarray]]:
    """All accepted images, and by id where a defect is: bool (h, w), grown by a patch."""
    with tempfile.TemporaryDirectory() as folder:
        category = ingest.fn(folder, given.dataset, str(given.root), [given.category]).categories[0]
        spec = FeatureSpec()
        validated = validate.fn(prepare.fn(category, spec.image_size))
        key, store = extract.fn(validated, spec), Store(folder)
        layer = layer_to_compare({int(i): s for i, s in store.get(key).meta["shapes"].items()}, spec.image_size)
        samples = accepted_samples(validated)
        source = StoredSource(
            validated, [s.id for s in samples], spec=FeatureSpec(layers=(layer,)), features=key, images=False
        )
        features = torch.cat([batch.features[layer] for batch in source])
        folders = store.get(category.catalogue).meta["folders"]
        masks = {s.id: read_mask(Path(category.root), s, folders) for s in samples if s.mask is not None}
    patch = 1 / features.shape[-1]
    return Images(samples, features), {name: grown(mask, patch) for name, mask in masks.items()}


def grown(mask: np.ndarray, by: float) -> np.ndarray:
    """The mask with a margin, as a share of its sides."""
    return binary_dilation(mask, np.ones([2 * round(by * side) + 1 for side in mask.shape], bool))


def table(name: str, method: Compare, images: Images, masks: dict[str, np.ndarray], limit: float, draws: int) -> None:
    """One way to compare, a line a way to plant."""
    rng = np.random.default_rng(0)
    good = [row for row, sample in enumerate(images.samples) if sample.split == "train"]
    bad = [row for row, sample in enumerate(images.samples) if sample.label == "anomalous"]
    types = sorted({images.samples[row].defect_type for row in bad})
    of_type = {kind: [row for row in bad if images.samples[row].defect_type == kind] for kind in types}
    plans: dict[str, list[list[int]]] = {f"{k} of any": [draw(rng, bad, k) for _ in range(draws)] for k in (1, 3, 10)}
    for kind, rows in of_type.items():
        plans[f"1 of {kind}"] = [draw(rng, rows, 1) for _ in range(draws)]
        plans[f"10 of {kind}"] = [draw(rng, rows, 10) for _ in range(min(3, draws))]

    start = time.perf_counter()
    deviations = method(images.only(good)).deviations
    seconds, highest = time.perf_counter() - start, " ".join(f"{d:.1f}" for d in np.sort(deviations)[::-1][:8])
    print(
        f"\n{name}: {len(good)} good images in {seconds:.2f} s, {(deviations > limit).sum()} suspected; {highest} ..."
    )
    print(f"{'planted':28}{'recall %':>10}{'at it %':>10}{'false':>8}")
    for plan, planted in plans.items():
        found: list[bool] = []
        at_it: list[bool] = []
        false = 0
        for rows in planted:
            seen = method(images.only([*good, *rows]))
            above = seen.deviations > limit
            false += int(above[: len(good)].sum())
            found += above[len(good) :].tolist()
            at_it += [
                points_at(masks.get(images.samples[row].id), *seen.places[i])
                for i, row in enumerate(rows, start=len(good))
                if above[i]
            ]
        hits = f"{100 * np.mean(at_it):10.0f}" if at_it else f"{'-':>10}"
        print(f"{plan:28}{100 * np.mean(found):10.0f}{hits}{false / len(planted):8.1f}", flush=True)


def draw(rng: np.random.Generator, rows: Sequence[int], count: int) -> list[int]:
    """Some of the rows."""
    return [int(row) for row in rng.choice(rows, min(count, len(rows)), replace=False)]


def points_at(mask: np.ndarray | None, x: float, y: float) -> bool:
    """Whether a place is marked."""
    return mask is not None and bool(mask[int(y * mask.shape[0]), int(x * mask.shape[1])])


def compare(images: Images) -> Unlikeness:
    """As the step does."""
    return unlikeness(images, 0, images.parts)


def absolute(images: Images) -> Unlikeness:
    """Distances as they are, wherever in the image."""
    plain = lambda self, distances: distances.median().expand(distances.shape[1:])  # noqa: E731
    with mock.patch.object(contamination._Bank, "typical", plain):
        return unlikeness(images, 0, images.parts)


def local_density(images: Images) -> Unlikeness:
    """Distances divided by the mean distance of the 3 bank patches found to their own 3 (as SoftPatch's LOF)."""
    patches = images.features.float().flatten(2).mT  # (n, p, c)
    n, p = patches.shape[:2]
    rng, each = np.random.default_rng(0), max(1, 4096 // n)
    bank = torch.cat([patches[i, rng.choice(p, min(p, each), replace=False)] for i in range(n)])
    names = {part: number for number, part in enumerate(dict.fromkeys(images.parts))}
    owner = torch.tensor([names[part] for part in images.parts])
    owners = owner.repeat_interleave(len(bank) // n)

    def nearest(queries: torch.Tensor, mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        distances = torch.cdist(queries, bank).masked_fill_(owners == mine, torch.inf)
        found = distances.topk(3, 1, largest=False)
        return found.values.mean(1), found.indices

    density = torch.cat([nearest(bank[owners == k], k)[0] for k in owner.unique()])
    density = density[torch.cat([(owners == k).nonzero()[:, 0] for k in owner.unique()]).argsort()]
    maps = []
    for i in range(n):
        distances, rows = nearest(patches[i], owner[i])
        maps.append(distances / density[rows].mean(1))
    return summed(torch.stack(maps), images)


def gaussians(images: Images) -> Unlikeness:
    """A Gaussian a position (60 channels, as PaDiM) of the other folds, of 5; parts are in one fold."""
    kept = torch.randperm(images.features.shape[1], generator=torch.Generator().manual_seed(0))[:60]
    x = images.features[:, kept].float().flatten(2).permute(2, 0, 1)  # (p, n, c)
    names = {part: number for number, part in enumerate(sorted(set(images.parts)))}
    fold = torch.tensor([names[part] % 5 for part in images.parts])
    maps = torch.empty(x.shape[:2])  # (p, n)
    for k in range(5):
        others = PositionGaussians(len(x), len(kept))
        others.update(x[:, fold != k])
        maps[:, fold == k] = mahalanobis(x[:, fold == k], others.mean, whitening(others.count, others.scatter, 0.01))
    return summed(maps.T, images)


def summed(maps: torch.Tensor, images: Images) -> Unlikeness:
    """The step's scores of other maps (n, p), 1 = typical."""
    grid = images.features.shape[2:]
    found = [contamination._summary(one.reshape(grid)) for one in maps / maps.median()]
    scores = np.array([score for score, _ in found])
    places = np.array([place for _, place in found])
    return Unlikeness(scores, robust_deviations(scores), places, maps.reshape(-1, *grid).numpy().astype(np.float16))


ALTERNATIVES: dict[str, Compare] = {
    "absolute distance": absolute,
    "distance to local density": local_density,
    "Gaussian a position": gaussians,
}


if __name__ == "__main__":
    main()
