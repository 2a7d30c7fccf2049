"""Bad input, one kind a test: the reason is recorded, and the rest of the category or data set goes on."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

from storage.errors import DatasetError, OutsideRoot
from storage.samples import Sample, fingerprint, from_parquet, to_parquet
from storage.store import Store
from tasks.core.handles import Category
from tasks.ingest import Ingested, ingest
from tasks.prepare import prepare
from tasks.validate import CategoryStopped, findings, validate

SIZE = 32


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (SIZE, SIZE), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def save_mask(path: Path, *, size: int = SIZE, value: int = 255) -> Path:
    values = np.zeros((size, size), np.uint8)
    values[: size // 2] = value
    return save(path, values)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound category `part`: four training images, a good and two bent test images with masks."""
    folder = tmp_path / "data"
    for i in range(4):
        save(folder / f"part/train/good/{i}.png", noise(i))
    save(folder / "part/test/good/0.png", noise(10))
    for i in range(2):
        save(folder / f"part/test/bent/{i}.png", noise(20 + i))
        save_mask(folder / f"part/ground_truth/bent/{i}_mask.png")
    return folder


def find(root: Path, categories: list[str] | None = None) -> Ingested:
    return ingest.fn(str(root.parent / "store"), "mvtec_ad", str(root), categories)


def judge(root: Path, category: str = "part") -> dict[str, Any]:
    """The verdict on a category, which goes on: the manifest, `found` (severity -> path -> reasons) and `set_aside`."""
    (found,) = find(root, [category]).categories
    store = Store(found.store)
    verdict = validate.fn(prepare.fn(found, 16)).verdict
    told: dict[str, dict[str, str]] = {"reject": {}, "warn": {}, "stop": {}}
    for row in findings(store, verdict).itertuples():
        before = told[row.severity].get(row.path)
        told[row.severity][row.path] = row.reason if before is None else f"{before}; {row.reason}"
    aside = {entry["path"]: entry["reason"] for entry in store.get(found.catalogue).meta["set_aside"]}
    return {**store.get(verdict).meta, "found": told, "set_aside": aside}


def broken_rules(verdict: dict[str, Any]) -> dict[str, int]:
    return {e["name"]: e["unexpected"] for e in verdict["expectations"] if not e["success"]}


def accepted_samples(root: Path) -> dict[str, Sample]:
    (found,) = find(root, ["part"]).categories
    store = Store(found.store)
    verdict = store.get(validate.fn(prepare.fn(found, 16)).verdict)
    return {s.path: s for s in from_parquet(store.read_bytes(f"{verdict.folder}/samples.parquet"))}


def test_a_truncated_png_is_rejected(root):
    file = root / "part/train/good/1.png"
    file.write_bytes(file.read_bytes()[:500])
    verdict = judge(root)
    assert list(verdict["found"]["reject"]) == ["part/train/good/1.png"]
    assert "cut short" in verdict["found"]["reject"]["part/train/good/1.png"]
    assert broken_rules(verdict) == {"readable": 1}
    assert verdict["accepted"] == 6


def test_the_row_of_an_unreadable_image_stays_zero(root):
    (root / "part/train/good/1.png").write_bytes(b"\x89PNG")
    (found,) = find(root).categories
    store = Store(found.store)
    artifact = store.get(prepare.fn(found, 16).images)
    images = zarr.open_array(store.zarr_store(f"{artifact.folder}/images"), mode="r")[:]
    paths = [s.path for s in from_parquet(store.read_bytes(f"{store.get(found.catalogue).folder}/samples.parquet"))]
    assert [path for path, image in zip(paths, images, strict=True) if not image.any()] == ["part/train/good/1.png"]


def test_a_text_file_named_png_is_rejected(root):
    (root / "part/test/bent/0.png").write_text("no image")
    verdict = judge(root)
    assert "not an image" in verdict["found"]["reject"]["part/test/bent/0.png"]
    assert verdict["accepted"] == 6


def test_two_empty_files_are_unreadable_and_not_copies(root):
    for i in range(2):
        (root / f"part/train/good/{i}.png").write_bytes(b"")
    verdict = judge(root)
    assert broken_rules(verdict) == {"readable": 2}
    assert all("same content" not in reason for reason in verdict["found"]["reject"].values())


def test_a_16_bit_image_among_8_bit_ones_is_rejected(root):
    save(root / "part/train/good/1.png", noise(1).astype(np.uint16) * 257)
    verdict = judge(root)
    assert "16 bits a channel, while" in verdict["found"]["reject"]["part/train/good/1.png"]
    assert broken_rules(verdict)["usual_bit_depth"] == 1
    assert verdict["warned"] == 0  # the scaling of a rejected image is no news


def test_a_category_of_16_bit_images_is_accepted_with_a_warning(root):
    for file in (root / "part").glob("t*/*/*.png"):
        save(file, np.asarray(Image.open(file)).astype(np.uint16) * 257)
    verdict = judge(root)
    assert verdict["rejected"] == 0
    assert verdict["warned"] == 7
    assert all("1/257" in reason for reason in verdict["found"]["warn"].values())


def test_an_opaque_rgba_image_is_accepted_with_a_warning_and_a_transparent_one_rejected(root):
    rgba = noise(50, SIZE, SIZE, 4)
    save(root / "part/train/good/1.png", rgba)
    rgba = noise(51, SIZE, SIZE, 4)
    rgba[..., 3] = 255
    save(root / "part/train/good/2.png", rgba)
    verdict = judge(root)
    assert "transparent" in verdict["found"]["reject"]["part/train/good/1.png"]
    warning = verdict["found"]["warn"]["part/train/good/2.png"]
    assert "alpha channel is opaque" in warning
    assert "3 channels, while the category's training images are gray" in warning
    assert verdict["accepted"] == 6


def test_a_mask_of_another_size_rejects_its_image(root):
    save_mask(root / "part/ground_truth/bent/1_mask.png", size=SIZE // 2)
    verdict = judge(root)
    assert "its mask has 16x16 px, the image 32x32" in verdict["found"]["reject"]["part/test/bent/1.png"]
    assert verdict["accepted"] == 6


@pytest.mark.parametrize("value", [0, 100])
def test_a_mask_that_marks_nothing_on_a_defect_is_taken_for_unknown(root, value):
    save_mask(root / "part/ground_truth/bent/1_mask.png", value=value)
    verdict = judge(root)
    assert verdict["rejected"] == 0
    told = verdict["found"]["warn"]["part/test/bent/1.png"]
    assert ("areas of gray 100" if value else "marks no pixel") in told
    assert "mask_rule = nonzero" in told
    kept = accepted_samples(root)
    assert kept["part/test/bent/1.png"].mask_state == "unknown"
    assert kept["part/test/bent/0.png"].mask_state == "file"
    assert verdict["fingerprint"] == fingerprint(kept.values())


def test_an_anomalous_image_without_mask_is_kept_and_noted(root):
    (root / "part/ground_truth/bent/1_mask.png").unlink()
    verdict = judge(root)
    assert verdict["rejected"] == 0
    assert list(verdict["found"]["warn"]) == ["part/test/bent/1.png"]
    assert "there is no mask for it" in verdict["found"]["warn"]["part/test/bent/1.png"]
    assert verdict["accepted"] == 7


def test_an_unreadable_mask_is_taken_for_unknown(root):
    (root / "part/ground_truth/bent/1_mask.png").write_text("no mask")
    verdict = judge(root)
    assert verdict["rejected"] == 0
    assert "its mask cannot be read: no image" in verdict["found"]["warn"]["part/test/bent/1.png"]
    assert accepted_samples(root)["part/test/bent/1.png"].mask is None


def test_the_same_image_in_train_and_test_leaves_train(root):
    save(root / "part/train/good/1.png", noise(20))
    save(root / "part/validation/good/v.png", noise(2))
    verdict = judge(root)
    found = verdict["found"]["reject"]
    assert list(found) == ["part/train/good/1.png", "part/train/good/2.png"]
    assert "same content as part/test/bent/0.png" in found["part/train/good/1.png"]
    assert "same content as part/validation/good/v.png" in found["part/train/good/2.png"]
    assert broken_rules(verdict) == {"unique_across_splits": 2}


def test_copies_within_a_split_are_rejected_but_for_the_first(root):
    for i in (1, 3):
        save(root / f"part/train/good/{i}.png", noise(0))
    save(root / "part/test/good/9.png", noise(10))
    verdict = judge(root)
    found = verdict["found"]["reject"]
    assert list(found) == ["part/test/good/9.png", "part/train/good/1.png", "part/train/good/3.png"]
    assert "same content as part/train/good/0.png, which is kept" in found["part/train/good/3.png"]
    assert verdict["accepted"] == 5


def test_the_same_content_with_two_labels_in_test_is_rejected_twice(root):
    save(root / "part/test/good/1.png", noise(21))
    verdict = judge(root)
    found = verdict["found"]["reject"]
    assert list(found) == ["part/test/bent/1.png", "part/test/good/1.png"]
    assert "part/test/good/1.png (good) has the same content" in found["part/test/bent/1.png"]
    assert "part/test/bent/1.png (anomalous) has the same content" in found["part/test/good/1.png"]


def test_a_constant_image_is_rejected(root):
    save(root / "part/train/good/1.png", np.full((SIZE, SIZE), 90, np.uint8))
    nearly = np.full((SIZE, SIZE), 90, np.uint8)
    nearly[3, 3] = 93  # lost when it is resized to 16 px, but the image is not constant
    save(root / "part/train/good/2.png", nearly)
    verdict = judge(root)
    assert list(verdict["found"]["reject"]) == ["part/train/good/1.png"]
    assert "same value" in verdict["found"]["reject"]["part/train/good/1.png"]


def test_a_tiny_image_is_rejected_and_an_unusual_size_noted(root):
    save(root / "part/train/good/1.png", noise(1, 15, 40))
    save(root / "part/train/good/2.png", noise(2, 40, 48))
    verdict = judge(root)
    assert "40x15 px; at least 16" in verdict["found"]["reject"]["part/train/good/1.png"]
    assert list(verdict["found"]["warn"]) == ["part/train/good/2.png"]
    reason = verdict["found"]["warn"]["part/train/good/2.png"]
    assert "48x40 px, while the category's training images have 32x32" in reason


def test_sizes_that_vary_throughout_are_noted_once(root):
    for i in range(4):
        save(root / f"part/train/good/{i}.png", noise(i, 32, 40 + i))
    verdict = judge(root)
    assert verdict["rejected"] == 0
    assert list(verdict["found"]["warn"]) == [""]  # about the whole category
    assert "images have 5 sizes; each was resized to 16x16" in verdict["found"]["warn"][""]
    assert verdict["warned"] == 0


def test_several_reasons_are_all_told(root):
    save(root / "part/train/good/1.png", np.zeros((8, 8), np.uint8))
    reason = judge(root)["found"]["reject"]["part/train/good/1.png"]
    assert "at least 16" in reason
    assert "same value" in reason


def test_many_rejected_images_are_all_named(root):
    for i in range(300):
        (root / f"part/train/good/bad{i:03}.png").write_text(f"text {i}")
    verdict = judge(root)
    assert verdict["rejected"] == broken_rules(verdict)["readable"] == 300
    assert verdict["accepted"] == 7


def test_an_empty_category_is_a_problem_and_the_others_go_on(root):
    (root / "void").mkdir()
    (root / "half/train/good").mkdir(parents=True)
    save(root / "half/test/good/0.png", noise(1))
    found = find(root)
    assert [c.category for c in found.categories] == ["part"]
    assert set(found.problems) == {"half", "void"}
    assert "half/train/good holds no image to learn from" in found.problems["half"]
    assert judge(root)["accepted"] == 7


def test_a_category_without_any_listed_image_stops(root):
    store = Store(str(root.parent / "store"))
    with store.draft("catalogues/x/void/0") as draft:
        store.write_bytes(f"{draft.folder}/samples.parquet", to_parquet([]))
        draft.commit({"set_aside": [], "folders": ["."]})
    category = Category(store.url, "x", "void", str(root), "catalogues/x/void/0", "0")
    with pytest.raises(CategoryStopped, match="x/void: no image is listed"):
        validate.fn(prepare.fn(category, 16))


def test_a_category_with_one_image_stops_after_its_verdict_is_kept(root):
    save(root / "lone/train/good/0.png", noise(1))
    save(root / "lone/test/good/0.png", noise(2))
    found = {c.category: c for c in find(root).categories}
    prepared = prepare.fn(found["lone"], 16)
    messages = []
    for _ in range(2):  # made, then read back
        with pytest.raises(
            CategoryStopped, match="mvtec_ad/lone: 1 of 1 training images accepted, at least 2"
        ) as error:
            validate.fn(prepared)
        messages.append(str(pickle.loads(pickle.dumps(error.value))))
    assert messages[0] == messages[1]
    store = Store(found["lone"].store)
    (manifest,) = [key for key in store.list("verdicts") if key.endswith("manifest.json")]
    verdict = store.read_json(manifest)["meta"]
    assert "at least 2" in verdict["stop"]
    assert broken_rules(verdict) == {"enough_training_images": 0}
    assert judge(root)["accepted"] == 7


def test_a_category_whose_training_images_are_all_bad_stops(root):
    for i in range(4):
        (root / f"part/train/good/{i}.png").write_text(f"text {i}")
    with pytest.raises(CategoryStopped, match="0 of 4 training images accepted"):
        judge(root)


def test_a_link_out_of_the_root_is_set_aside(root):
    secret = save(root.parent / "secret.png", noise(70))
    save(root.parent / "masks/0_mask.png", noise(71))
    (root / "part/train/good/9.png").symlink_to(secret)
    (root / "part/train/good/8.png").symlink_to(root / "nowhere.png")
    (root / "part/train/good/7.png").symlink_to(root / "part/train/good/7.png")
    (root / "part/ground_truth/bent/1_mask.png").unlink()
    (root / "part/ground_truth/bent/1_mask.png").symlink_to(root.parent / "masks/0_mask.png")
    verdict = judge(root)
    found = verdict["set_aside"]
    assert set(found) == {f"part/train/good/{i}.png" for i in (7, 8, 9)} | {"part/ground_truth/bent/1_mask.png"}
    assert "outside of the data set" in found["part/train/good/9.png"]
    assert "broken link" in found["part/train/good/8.png"]
    assert list(verdict["found"]["warn"]) == ["part/test/bent/1.png"]
    assert verdict["accepted"] == 7


def test_a_link_within_the_root_is_followed(root):
    (root / "shared").mkdir()
    file = root / "part/train/good/1.png"
    file.rename(root / "shared/1.png")
    file.symlink_to(root / "shared/1.png")
    verdict = judge(root)
    assert verdict["warned"] == 0
    assert verdict["accepted"] == 7


def test_a_category_that_is_a_link_out_of_the_root_is_a_problem(root):
    save(root.parent / "elsewhere/train/good/0.png", noise(1))
    (root / "linked").symlink_to(root.parent / "elsewhere")
    found = find(root)
    assert [c.category for c in found.categories] == ["part"]
    assert "outside of the data set" in found.problems["linked"]


@pytest.mark.parametrize("name", ["..", "../data/part", "part/../../secret", "/etc", "..\\part"])
def test_a_category_name_that_leaves_the_root_is_refused(root, name):
    with pytest.raises(OutsideRoot, match=r"leaves the root; give the name of a folder in it: part"):
        find(root, [name])


def test_an_unknown_category_is_refused_with_the_nearest(root):
    with pytest.raises(DatasetError, match="unknown category 'prat'; did you mean part"):
        find(root, ["part", "prat"])


def test_a_file_that_may_not_be_read_is_set_aside(root, monkeypatch):
    read = Path.read_bytes

    def guarded(path: Path) -> bytes:  # file modes do not hold for root, as whom tests may run
        if path.as_posix().endswith(("train/good/1.png", "bent/0_mask.png")):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    verdict = judge(root)
    found = verdict["set_aside"]
    assert set(found) == {"part/train/good/1.png", "part/ground_truth/bent/0_mask.png"}
    assert all("permissions" in reason for reason in found.values())
    assert list(verdict["found"]["warn"]) == ["part/test/bent/0.png"]
    assert verdict["accepted"] == 6


def test_a_set_aside_file_changes_what_is_told_but_not_what_is_learned(root):
    before = find(root).categories[0]
    first = validate.fn(prepare.fn(before, 16))
    save_mask(root / "part/ground_truth/bent/77_mask.png")
    after = find(root).categories[0]
    second = validate.fn(prepare.fn(after, 16))
    assert (before.fingerprint, first.fingerprint) == (after.fingerprint, second.fingerprint)
    assert second.prepared.images == first.prepared.images
    assert list(judge(root)["set_aside"]) == ["part/ground_truth/bent/77_mask.png"]


def test_a_jpeg_named_png_is_read_as_what_it_is(root):
    buffer = io.BytesIO()
    Image.fromarray(noise(5)).save(buffer, "JPEG")
    (root / "part/train/good/1.png").write_bytes(buffer.getvalue())
    assert judge(root)["accepted"] == 7
