"""Masks in the forms in which data sets publish them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage.errors import DatasetError, MaskError
from storage.files import Hashes, with_hashes
from storage.listing import Listing
from storage.masks import decode_mask, read_mask
from storage.samples import Sample

VALUES = np.array([[0, 1, 127, 128, 255]], np.uint8)


def png(values: np.ndarray | Image.Image) -> bytes:
    buffer = io.BytesIO()
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(buffer, "PNG")
    return buffer.getvalue()


def palette(indices: np.ndarray) -> Image.Image:
    """Index 1 is black, so that only the index tells it from the background."""
    image = Image.new("P", indices.shape[::-1])
    image.putpalette([0, 0, 0, 0, 0, 0, 255, 0, 0] + [0] * 759)
    image.putdata(indices.flatten().tolist())
    return image


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("auto", VALUES, [[0, 0, 0, 1, 1]]),
        ("auto", np.array([[0, 1]], np.uint8), [[0, 1]]),
        ("auto", np.array([[0, 2]], np.uint8), [[0, 0]]),
        ("auto", VALUES.astype(np.uint16) * 257, [[0, 0, 0, 1, 1]]),
        ("auto", np.zeros((2, 2), np.uint8), [[0, 0], [0, 0]]),
        ("nonzero", VALUES, [[0, 1, 1, 1, 1]]),
        ("nonzero", np.stack([VALUES * 0, VALUES * 0, VALUES], axis=2), [[0, 1, 1, 1, 1]]),
        ("above:127", VALUES, [[0, 0, 0, 1, 1]]),
        ("above:300", np.array([[0, 300, 301]], np.uint16), [[0, 0, 1]]),
        ("values:1,255", VALUES, [[0, 1, 0, 0, 1]]),
        ("below:128", VALUES, [[1, 1, 1, 0, 0]]),
    ],
)
def test_what_counts_as_anomalous(rule: str, values: np.ndarray, expected: list[list[int]]) -> None:
    found = decode_mask(png(values), rule)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, np.array(expected, bool))


def test_a_palette_counts_by_its_index_and_not_by_its_colour() -> None:
    image = palette(np.array([[0, 1, 2]], np.uint8))
    np.testing.assert_array_equal(decode_mask(png(image), "nonzero"), [[False, True, True]])
    np.testing.assert_array_equal(decode_mask(png(image), "values:1"), [[False, True, False]])


def test_what_alpha_hides_is_no_mark() -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[..., 3] = 255  # opaque black everywhere
    pixels[0, 2, :3] = 9
    np.testing.assert_array_equal(decode_mask(png(pixels), "nonzero"), [[False, False, True]])


def two_halves(gray: int, rest: int = 255) -> np.ndarray:
    """A square whose left half is gray."""
    values = np.zeros((48, 48), np.uint8)
    values[10:22, 10:22] = rest
    values[10:22, 10:16] = gray
    return values


def apart(gray: int) -> np.ndarray:
    """A white square, and a thin gray line elsewhere."""
    values = np.zeros((48, 48), np.uint8)
    values[30:40, 30:40] = 255
    values[5, 5:20] = gray
    return values


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


COLOURS = Image.fromarray(np.where(two_halves(1, 2) == 1, 1, two_halves(1, 2) * 1).astype(np.uint8), "P")
COLOURS.putpalette([0, 0, 0, 128, 0, 0, 255, 255, 255] + [0] * 759)  # red and white, as VOC draws them


@pytest.mark.parametrize(
    "data",
    [
        png(two_halves(100)),
        png(two_halves(1)),  # a class beside one that is to be ignored
        png(two_halves(85, 170)),
        png(two_halves(100).astype(np.uint16) * 257),
        png(apart(100)),
        png(apart(3)),
        png(two_halves(100, 100) | apart(255)),
        png(255 - two_halves(155)),  # inverted, too
        png(np.where(two_halves(0) > 0, 255, 50).astype(np.uint8)),  # on a ground that is not black
        png(COLOURS),
        saved(Image.fromarray(two_halves(100)), "BMP"),
        saved(Image.fromarray(two_halves(100)).resize((192, 192)), "JPEG", quality=90),
        saved(Image.fromarray(apart(100)).resize((192, 192)), "WEBP"),
    ],
)
def test_areas_of_darker_gray_leave_open_what_is_marked(data: bytes) -> None:
    with pytest.raises(MaskError, match=r"areas of gray .*mask_rule = nonzero"):
        decode_mask(data)
    assert decode_mask(data, "nonzero").any()


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("JPEG", {}), ("WEBP", {})])
@pytest.mark.parametrize("side", [24, 48, 200, 401])
def test_soft_edges_and_traces_of_compression_are_no_areas(side: int, form: str, options: dict[str, int]) -> None:
    drawn = np.zeros((96, 96), np.uint8)
    drawn[10:40, 20:33] = 255
    drawn[70:73, 30:90] = 255
    drawn[np.hypot(*(np.indices((96, 96)) - 55)) < 9] = 255
    image = Image.fromarray(drawn).resize((side, side), Image.Resampling.BILINEAR)
    found = decode_mask(saved(image, form, **options))
    assert np.mean(found != (np.asarray(image) > 127)) < 0.02


def layered(colour: np.ndarray, alpha: np.ndarray, mode: str = "RGBA") -> bytes:
    layers = [Image.fromarray(colour)] * (1 if mode == "LA" else 3) + [Image.fromarray(alpha)]
    return png(Image.merge(mode, layers))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_layer_of_another_shape_leaves_open_what_is_marked(mode: str) -> None:
    square, white = two_halves(255), np.full((48, 48), 255, np.uint8)
    for same in (layered(square, square, mode), layered(square, white, mode)):
        np.testing.assert_array_equal(decode_mask(same), square > 0)
    for colour, alpha in ((white, square), (white * 0, square), (square, apart(255)), (white * 0, 255 - square)):
        data = layered(colour, alpha, mode)
        with pytest.raises(MaskError, match="mask_rule = alpha"):
            decode_mask(data)
        np.testing.assert_array_equal(decode_mask(data, "alpha"), alpha > 0)
        np.testing.assert_array_equal(decode_mask(data, "above:127"), colour > 0)
    with pytest.raises(MaskError, match="no alpha layer"):
        decode_mask(png(square), "alpha")


def test_a_mask_of_one_bit_is_marked_by_every_rule() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[False, True]])).save(buffer, "PNG")
    for rule in ("auto", "nonzero", "above:127", "values:1"):
        np.testing.assert_array_equal(decode_mask(buffer.getvalue(), rule), [[False, True]])


@pytest.mark.parametrize("data", [b"no mask", b"", png(np.zeros((64, 64), np.uint8))[:60]])
def test_what_is_no_mask_is_refused(data: bytes) -> None:
    with pytest.raises(MaskError, match="export the mask again"):
        decode_mask(data, "nonzero")


@pytest.mark.parametrize("rule", ["nonsense", "above:", "above:x", "values:", "values:1,x"])
def test_a_rule_that_makes_no_sense_is_refused(rule: str) -> None:
    with pytest.raises(DatasetError, match="mask rule"):
        decode_mask(png(VALUES), rule)


def listed(root: Path, **fields: str) -> Sample:
    sample = Sample("", "a.png", "toy", "toy", "test", "anomalous", "bent", **fields)  # type: ignore[arg-type]
    (found,) = with_hashes(Listing(root, samples=[sample]), Hashes()).samples
    return found


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(values))


def test_a_folder_of_masks_is_their_union_and_any_change_in_it_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.zeros((2, 3), np.uint8))
    write(tmp_path / "gt/000.png", np.array([[9, 0, 0], [0, 0, 0]], np.uint8))
    write(tmp_path / "gt/001.png", np.array([[0, 0, 0], [0, 0, 7]], np.uint8))
    sample = listed(tmp_path, mask="gt", mask_rule="nonzero")
    np.testing.assert_array_equal(read_mask(tmp_path, sample), [[True, False, False], [False, False, True]])
    for change in (
        lambda: write(tmp_path / "gt/001.png", np.zeros((2, 3), np.uint8)),
        lambda: write(tmp_path / "gt/002.png", np.zeros((2, 3), np.uint8)),
        lambda: (tmp_path / "gt/000.png").rename(tmp_path / "gt/003.png"),
    ):
        sample = listed(tmp_path, mask="gt", mask_rule="nonzero")
        change()
        with pytest.raises(DatasetError, match=r"gt .* has changed since it was listed"):
            read_mask(tmp_path, sample)


def test_masks_of_two_sizes_are_no_union(tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.zeros((2, 3), np.uint8))
    write(tmp_path / "gt/000.png", np.ones((2, 3), np.uint8))
    write(tmp_path / "gt/001.png", np.ones((3, 3), np.uint8))
    with pytest.raises(MaskError, match="different sizes"):
        read_mask(tmp_path, listed(tmp_path, mask="gt"))


def test_a_box_cuts_its_mask(tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.zeros((4, 6), np.uint8))
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    write(tmp_path / "m.png", values)
    sample = listed(tmp_path, mask="m.png", mask_rule="above:12", box="2,1,3,2")
    np.testing.assert_array_equal(read_mask(tmp_path, sample), values[1:3, 2:5] > 12)
    whole = listed(tmp_path, mask="m.png", mask_rule="above:12")
    assert sample.id != whole.id
    assert (sample.key, whole.key) == ("a.png[2,1,3,2]", "a.png")
