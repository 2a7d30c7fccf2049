"""The demo's data set: real textures, synthetic defects with exact masks, in the folder layout of MVTec AD.

The textures are brick, grass and gravel of scikit-image (512 x 512 grey, CC0), files of the installed package, so that
nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from al_models.errors import InvalidInput
from al_models.parts.defects import MIN_SIDE, Defect, cut_paste, perlin_composite, scratch, stain
from storage.errors import DatasetError
from storage.whole import made_anew
from tasks.core.steps import code_fingerprint


@dataclass(frozen=True)
class Texture:
    """How to make pictures of one of the textures."""

    quarter_turns: bool
    """Whether it is still the same kind of texture when turned by 90 degrees."""
    foreign: str | None
    """The texture that pasted patches are cut from; None: its own."""


# Grass cut from grass, and gravel from gravel, leaves no trace that a person could find: there the patch is foreign.
CATEGORIES: Mapping[str, Texture] = MappingProxyType(
    {
        "brick": Texture(quarter_turns=False, foreign=None),
        "grass": Texture(quarter_turns=True, foreign="gravel"),
        "gravel": Texture(quarter_turns=True, foreign="grass"),
    }
)

DEFECT_TYPES = ("cut_paste", "perlin_composite", "scratch", "stain")

_MAX_SIDE = 256
_RECORD = "demo.json"


def make_demo_data(
    root: Path,
    *,
    seed: int = 0,
    train: int = 40,
    validation: int = 20,
    good: int = 12,
    defects_per_type: int = 5,
    size: int = 256,
) -> list[str]:
    """Build the demo data under `root`, or find it there, and return its categories.

    `train`, `validation` and `good` are the good images a category to learn from, to calibrate on (20 support a
    false-reject rate of 5 %) and to test with, `defects_per_type` the defective ones of each kind, `size` the side of
    all images and masks in pixels, 32 to 256. Images are RGB, masks 0 or 255.

    Every image is a random window, 80 to 100 % of half the texture's side wide, resized to `size`, flipped (grass and
    gravel also turned by 90 degrees), with gain within 10 % and offset within 8 grey levels. Training windows lie in
    two quarters of the texture, one diagonal, and all others in the other two: no pixel of a test image was seen in
    training, and calibration sees what testing will.

    Equal parameters give equal bytes. The folder appears whole or not at all; `demo.json` in it states the parameters,
    and a folder made with other parameters is replaced. Raises InvalidInput for impossible numbers and DatasetError
    when `root` holds something else.
    """
    numbers = {"train": train, "validation": validation, "good": good, "defects_per_type": defects_per_type}
    numbers |= {"size": size, "seed": seed}
    _check(numbers)
    root = Path(root).expanduser().resolve()
    wanted = {**numbers, "code": code_fingerprint(__name__), "source": "scikit-image textures (CC0)"}
    if not _is_whole(root, wanted):
        _refuse_foreign(root)
        with made_anew(root, partial(_is_whole, root, wanted)) as new:
            _write(new, wanted)
    return list(CATEGORIES)


def _check(numbers: Mapping[str, int]) -> None:
    allowed = {"train": (1, None), "size": (MIN_SIDE, _MAX_SIDE)}
    for name, value in numbers.items():
        low, high = allowed.get(name, (0, None))
        if value < low or (high is not None and value > high):
            expected = f"{low} to {high}" if high else f"at least {low}"
            raise InvalidInput(f"demo data with {name}={value}; expected {expected}: change {name}")


def _is_whole(root: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the folder was made with these parameters and no image has gone since."""
    record = _read_record(root)
    if record is None or {**wanted, "files": record.get("files")} != record:
        return False
    return sum(1 for _ in root.rglob("*.png")) >= record["files"]


def _read_record(root: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((root / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _refuse_foreign(root: Path) -> None:
    if not root.exists() or (root / _RECORD).is_file() or (root.is_dir() and not any(root.iterdir())):
        return
    raise DatasetError(
        f"{root} holds something else than demo data (it has no {_RECORD}) and is left as it is; "
        "give a folder that is new or empty"
    )


def _write(root: Path, wanted: Mapping[str, Any]) -> None:
    files = 0
    for category in CATEGORIES:
        for path, pixels in _category(category, wanted):
            target = root / category / path
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target, compress_level=3)  # a third of the default's time, and no larger
            files += 1
    (root / _RECORD).write_text(json.dumps({**wanted, "files": files}, indent=1, sort_keys=True), encoding="utf-8")


def _category(category: str, numbers: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Relative path and pixels of every image and mask of a category, one in memory at once."""
    learned, unseen = _quarters(category)
    shoot = partial(_shoot, size=numbers["size"], quarter_turns=CATEGORIES[category].quarter_turns)
    draw = partial(_generator, numbers["seed"], list(CATEGORIES).index(category))
    for i in range(numbers["train"]):
        yield f"train/good/{i:03d}.png", shoot(learned, draw(0, i))
    for i in range(numbers["validation"]):
        yield f"validation/good/{i:03d}.png", shoot(unseen, draw(len(DEFECT_TYPES) + 2, i))
    for i in range(numbers["good"]):
        yield f"test/good/{i:03d}.png", shoot(unseen, draw(1, i))
    for kind, (name, defect) in enumerate(_defects(category, numbers["size"]).items()):
        for i in range(numbers["defects_per_type"]):
            rng = draw(2 + kind, i)
            image, mask = defect(shoot(unseen, rng), rng)
            yield f"test/{name}/{i:03d}.png", image
            yield f"ground_truth/{name}/{i:03d}_mask.png", mask.astype(np.uint8) * 255


def _defects(category: str, size: int) -> dict[str, Defect]:
    """Folder name -> defect, tuned to be found by an attentive person but not all at a glance."""
    foreign = CATEGORIES[category].foreign
    donor = None if foreign is None else _shoot(_quarters(foreign)[1], _generator(0), size=size, quarter_turns=False)
    # A few large cells make one or two spots, as a real defect would, instead of specks all over the image.
    spots = partial(perlin_composite, cells=(2, 4), opacity=(0.5, 1.0))
    patch = partial(cut_paste, donor=donor, area=(0.015, 0.08))
    # Thinner or fainter lines are lost among blades and stones.
    line = partial(scratch, length=(0.35, 0.9), width=(5.0, 10.0), contrast=(50.0, 110.0))
    return dict(zip(DEFECT_TYPES, (patch, spots, line, stain), strict=True))


def _generator(*names: int) -> np.random.Generator:
    """The random generator of one image, so that asking for more images leaves the first ones as they were."""
    return np.random.default_rng(names)


Quarters = tuple[np.ndarray, np.ndarray]
"""Two quarters of a texture on a diagonal; uint8 (256, 256) each."""


def _quarters(category: str) -> tuple[Quarters, Quarters]:
    """The quarters to learn from and the unseen ones; the two diagonals are more alike than two halves would be."""
    from skimage import data  # slow to import, and not needed when the data is there

    loaders: dict[str, Callable[[], np.ndarray]] = {"brick": data.brick, "grass": data.grass, "gravel": data.gravel}
    texture = loaders[category]()
    middle = len(texture) // 2
    top, bottom = texture[:middle], texture[middle:]
    return (top[:, :middle], bottom[:, middle:]), (top[:, middle:], bottom[:, :middle])


def _shoot(quarters: Quarters, rng: np.random.Generator, *, size: int, quarter_turns: bool) -> np.ndarray:
    """One picture of a texture, uint8 (size, size, 3), as a camera with slightly varying place and light would take."""
    quarter = quarters[rng.integers(2)]
    h, w = quarter.shape
    side = rng.uniform(0.8, 1.0) * w
    top, left = rng.uniform(0, h - side), rng.uniform(0, w - side)
    window = (left, top, left + side, top + side)
    image = np.asarray(Image.fromarray(quarter).resize((size, size), Image.Resampling.BICUBIC, box=window))
    image = np.rot90(image, rng.integers(4) if quarter_turns else 2 * rng.integers(2))
    image = image[:, ::-1] if rng.integers(2) else image
    light = image * rng.uniform(0.9, 1.1) + rng.uniform(-8, 8)
    return np.repeat(np.rint(np.clip(light, 0, 255)).astype(np.uint8)[..., None], 3, axis=2)
