"""The demo data: its layout, its laws, and what a cut or repeated run does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from al_models.errors import InvalidInput
from storage.errors import DatasetError
from tasks.demo_data import CATEGORIES, DEFECT_TYPES, make_demo_data

SMALL = {"train": 3, "validation": 1, "good": 2, "defects_per_type": 2, "size": 64}
ROOT_OF_CODE = Path(__file__).parents[1]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def contents(root: Path) -> dict[str, str]:
    """Relative path -> hash of every file below."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo_data(root, **SMALL) == ["brick", "grass", "gravel"]
    return root


def test_the_layout_is_that_of_mvtec_ad(demo: Path) -> None:
    expected = {"demo.json"}
    for category in ("brick", "grass", "gravel"):
        expected |= {f"{category}/train/good/00{i}.png" for i in range(3)}
        expected |= {f"{category}/validation/good/000.png"}
        expected |= {f"{category}/test/good/00{i}.png" for i in range(2)}
        for kind in ("cut_paste", "perlin_composite", "scratch", "stain"):
            expected |= {f"{category}/test/{kind}/00{i}.png" for i in range(2)}
            expected |= {f"{category}/ground_truth/{kind}/00{i}_mask.png" for i in range(2)}
    assert set(contents(demo)) == expected
    assert json.loads((demo / "demo.json").read_text())["files"] == len(expected) - 1
    assert [path.name for path in demo.parent.iterdir()] == ["data"]


def test_images_are_rgb_and_masks_are_black_and_white(demo: Path) -> None:
    for path in demo.rglob("*.png"):
        array = pixels(path)
        if "ground_truth" in path.parts:
            assert array.shape == (64, 64)
            assert set(np.unique(array)) == {0, 255}
            assert 0.002 < (array > 0).mean() < 0.4
        else:
            assert array.shape == (64, 64, 3)
            assert array.std() > 10


def test_no_two_images_are_alike(demo: Path) -> None:
    images = {path: digest for path, digest in contents(demo).items() if "ground_truth" not in path}
    assert len(set(images.values())) == len(images)


def test_the_mask_is_where_the_image_departs_from_its_texture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CATEGORIES:
        monkeypatch.setattr(f"skimage.data.{name}", lambda: np.full((512, 512), 120, np.uint8))
    make_demo_data(tmp_path / "demo", **SMALL)
    for category in CATEGORIES:
        for kind in DEFECT_TYPES:
            image = pixels(tmp_path / "demo" / category / "test" / kind / "000.png").astype(int)
            mask = pixels(tmp_path / "demo" / category / "ground_truth" / kind / "000_mask.png") > 0
            assert np.ptp(image[~mask], axis=0).max() == 0
            assert (image[mask] != image[~mask][0]).any()


def test_training_and_test_windows_share_no_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarters = np.array([[60, 200], [200, 60]], np.uint8).repeat(256, axis=0).repeat(256, axis=1)  # (512, 512)
    for name in CATEGORIES:
        monkeypatch.setattr(f"skimage.data.{name}", lambda: quarters)
    make_demo_data(tmp_path / "demo", train=20, validation=9, good=20, defects_per_type=0, size=32)
    for category in CATEGORIES:
        train = [pixels(path) for path in (tmp_path / "demo" / category / "train").rglob("*.png")]
        test = [pixels(path) for path in (tmp_path / "demo" / category / "test").rglob("*.png")]
        assert len(train) == len(test) == 20
        assert np.max(train) < 90
        assert np.min(test) > 150
        validation = [pixels(path) for path in (tmp_path / "demo" / category / "validation").rglob("*.png")]
        assert len(validation) == 9
        assert np.min(validation) > 150


def test_bricks_are_never_laid_on_their_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stripes = np.tile(np.repeat(np.array([40, 200], np.uint8), 16), (512, 16))  # vertical, (512, 512)
    for name in CATEGORIES:
        monkeypatch.setattr(f"skimage.data.{name}", lambda: stripes)
    make_demo_data(tmp_path / "demo", train=16, good=0, defects_per_type=0, size=64)
    lying = {
        category: [
            np.ptp(pixels(path)[:, 32, 0].astype(int)) > 50 for path in (tmp_path / "demo" / category).rglob("*.png")
        ]
        for category in CATEGORIES
    }
    assert not any(lying["brick"])
    assert any(lying["grass"])
    assert not all(lying["grass"])


# Computed from the learned quarters of the textures alone: their mean, and the standard deviation of windows averaged
# by 3 x 3 to 4 x 4 pixels, as happens when 205 to 256 pixels become 64.
@pytest.mark.parametrize(
    ("category", "mean", "deviation"), [("brick", 111.2, 23.6), ("grass", 118.7, 29.3), ("gravel", 127.4, 32.6)]
)
def test_the_pictures_look_like_their_textures(
    tmp_path_factory: pytest.TempPathFactory, category: str, mean: float, deviation: float
) -> None:
    root = tmp_path_factory.getbasetemp() / "textures"
    make_demo_data(root, train=24, good=0, defects_per_type=0, size=64)
    images = np.stack([pixels(path) for path in sorted((root / category / "train" / "good").iterdir())])
    assert images.mean() == pytest.approx(mean, abs=5)  # three standard errors of the varying light
    assert images.std(axis=(1, 2, 3)).mean() == pytest.approx(deviation, rel=0.08)


def test_equal_parameters_give_equal_bytes_and_another_seed_others(demo: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(demo)
    make_demo_data(tmp_path / "other", seed=1, **SMALL)
    other = contents(tmp_path / "other")
    assert not any(other[path] == digest for path, digest in contents(demo).items())


def test_asking_for_more_leaves_the_first_images_as_they_were(demo: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "more", train=4, validation=2, good=3, defects_per_type=3, size=64)
    more = contents(tmp_path / "more")
    assert all(more[path] == digest for path, digest in contents(demo).items() if path != "demo.json")


def test_a_complete_folder_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_demo_data(tmp_path / "demo", **SMALL)
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: pytest.fail("an image was written again"))
    assert make_demo_data(tmp_path / "demo", **SMALL) == list(CATEGORIES)


def test_other_parameters_or_a_missing_file_make_it_anew(demo: Path, tmp_path: Path) -> None:
    root = tmp_path / "demo"
    make_demo_data(root, train=1, good=1, defects_per_type=1, size=32)
    make_demo_data(root, **SMALL)
    assert contents(root) == contents(demo)
    (root / "brick" / "test" / "good" / "001.png").unlink()
    make_demo_data(root, **SMALL)
    assert contents(root) == contents(demo)
    (root / "demo.json").write_text("[]")
    make_demo_data(root, **SMALL)
    assert contents(root) == contents(demo)


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, save = [], Image.Image.save

    def full_disk(self: Image.Image, path: Path, compress_level: int) -> None:
        if len(written) == 7:
            raise OSError(28, "No space left on device")
        written.append(path)
        save(self, path, compress_level=compress_level)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_demo_data(tmp_path / "demo", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_not_taken_for_whole_and_the_next_one_completes_it(demo: Path, tmp_path: Path) -> None:
    root = tmp_path / "demo"
    killed = f"""
import os, pathlib
from PIL import Image
from tasks.demo_data import make_demo_data
save, written = Image.Image.save, []
def save_until_killed(self, path, compress_level):
    save(self, path, compress_level=compress_level)
    written.append(path)
    if len(written) == 9:
        os._exit(9)
Image.Image.save = save_until_killed
make_demo_data(pathlib.Path({str(root)!r}), **{SMALL!r})
"""
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT_OF_CODE, check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    make_demo_data(root, **SMALL)
    assert contents(root) == contents(demo)
    assert left.exists()  # it is young: it might have been another process still at work

    (root / "demo.json").write_text("{}")
    os.utime(left, (time.time() - 7200, time.time() - 7200))
    make_demo_data(root, **SMALL)
    assert list(tmp_path.iterdir()) == [root]


def test_a_folder_that_is_not_ours_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(DatasetError, match="holds something else than demo data"):
        make_demo_data(tmp_path, **SMALL)
    assert contents(tmp_path) == {"holiday.jpg": hashlib.sha256(b"precious").hexdigest()}
    with pytest.raises(DatasetError, match="give a folder that is new or empty"):
        make_demo_data(tmp_path / "holiday.jpg", **SMALL)


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "a" / "b"):
        make_demo_data(root, train=1, validation=0, good=0, defects_per_type=0, size=32)
        assert len(list(root.rglob("*.png"))) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("train", 0), ("good", -1), ("defects_per_type", -1), ("size", 31), ("size", 257), ("seed", -1)]
)
def test_impossible_numbers_are_refused(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(InvalidInput, match=f"{name}={value}; expected .*: change {name}"):
        make_demo_data(tmp_path / "demo", **{**SMALL, name: value})
    assert list(tmp_path.iterdir()) == []
