"""Masks drawn from LabelMe's and COCO's JSON: laws of area and partition, and what hostile files come to."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import polygons
from storage.errors import MaskError
from storage.masks import decode_mask
from storage.polygons import draw_polygons

Point = tuple[float, float]
WIDTH, HEIGHT = 13, 9

eighths = st.integers(-24, 160).map(lambda n: n / 8)  # exact in binary, so that moving a shape rounds nothing
points = st.tuples(eighths, eighths)


def labelme(*shapes: tuple[str | None, list[Any]], width: Any = WIDTH, height: Any = HEIGHT) -> bytes:
    rows = [{"label": "dent", "points": xy, "shape_type": kind} for kind, xy in shapes]
    return json.dumps({"version": "5.5.0", "shapes": rows, "imageWidth": width, "imageHeight": height}).encode()


def coco(*segmentations: Any, width: int = WIDTH, height: int = HEIGHT, name: str = "a.png") -> bytes:
    images = [
        {"id": 7, "file_name": name, "width": width, "height": height},
        {"id": 8, "file_name": "clean.png", "width": 5, "height": 4},
    ]
    rows = [{"id": i, "image_id": 7, "category_id": 1, "segmentation": s} for i, s in enumerate(segmentations)]
    return json.dumps({"images": images, "annotations": rows, "categories": []}).encode()


def drawn(*shapes: tuple[str | None, list[Any]], width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    return draw_polygons(labelme(*shapes, width=width, height=height), "labelme")


def inside(outline: list[Point], x: float, y: float) -> bool:
    """Even-odd rule for one point, edge by edge."""
    odd = False
    for (x0, y0), (x1, y1) in zip(outline, outline[1:] + outline[:1], strict=True):
        if (x0 > x) != (x1 > x) and y > y0 + (x - x0) * (y1 - y0) / (x1 - x0):
            odd = not odd
    return odd


@given(st.integers(0, WIDTH), st.integers(0, WIDTH), st.integers(0, HEIGHT), st.integers(0, HEIGHT))
@settings(max_examples=60, derandomize=True)
def test_a_rectangle_between_whole_numbers_covers_width_times_height_pixels(x0, x1, y0, y1):
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[min(y0, y1) : max(y0, y1), min(x0, x1) : max(x0, x1)] = True
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    for kind, outline in (("rectangle", [(x0, y0), (x1, y1)]), ("rectangle", corners), ("polygon", corners)):
        np.testing.assert_array_equal(drawn((kind, outline)), expected)
    flat = [[number for point in corners for number in point]]
    np.testing.assert_array_equal(draw_polygons(coco(flat), "coco", "a.png"), expected)


# Odd sixteenths in y keep centres off the edges' ends, where either side would do.
@given(st.lists(st.tuples(eighths, eighths.map(lambda y: y + 1 / 16)), min_size=3, max_size=7))
@settings(max_examples=100, derandomize=True)
def test_a_pixel_is_covered_when_its_centre_is_inside(outline):
    mask = drawn(("polygon", outline))
    for row in range(HEIGHT):
        for column in range(WIDTH):
            x, y = column + 0.5, row + 0.5
            if all(abs(_distance(a, b, x, y)) > 1e-6 for a, b in zip(outline, outline[1:] + outline[:1], strict=True)):
                assert mask[row, column] == inside(outline, x, y)


def _distance(a: Point, b: Point, x: float, y: float) -> float:
    """Vertical distance of a point from an edge; far when the edge does not pass below or above it."""
    if (a[0] > x) == (b[0] > x):
        return math.inf
    return y - (a[1] + (x - a[0]) * (b[1] - a[1]) / (b[0] - a[0]))


@given(points, points, points, points)
@settings(max_examples=100, derandomize=True)
def test_two_triangles_on_either_side_of_an_edge_share_no_pixel_and_leave_none(a, b, c, d):
    """By the even-odd rule the outline a b c d is what exactly one of the triangles covers, whatever they look like."""
    one, other = drawn(("polygon", [a, b, c])), drawn(("polygon", [c, d, a]))
    np.testing.assert_array_equal(one ^ other, drawn(("polygon", [a, b, c, d])))
    np.testing.assert_array_equal(one | other, drawn(("polygon", [a, b, c]), (None, [c, d, a])))


@given(st.lists(points, min_size=3, max_size=6), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=60, derandomize=True)
def test_a_shape_moves_with_its_points(outline, right, down):
    moved = drawn(("polygon", [(x + right, y + down) for x, y in outline]), width=WIDTH + 5, height=HEIGHT + 5)
    still = drawn(("polygon", outline), width=WIDTH + 5, height=HEIGHT + 5)
    np.testing.assert_array_equal(moved[down:, right:], still[: HEIGHT + 5 - down, : WIDTH + 5 - right])


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.booleans())
@settings(max_examples=60, derandomize=True)
def test_run_lengths_come_back(runs, as_union):
    """Run-length code as COCO's `rleEncode` writes it: down the columns, beginning with what is not marked."""
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask = np.zeros(WIDTH * HEIGHT, bool)
    mask[: len(flat)] = flat[: len(mask)]
    mask = mask.reshape(WIDTH, HEIGHT).T
    changes = np.flatnonzero(np.diff(mask.T.ravel().astype(int), prepend=0))
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    code = {"size": [HEIGHT, WIDTH], "counts": counts}
    shapes = [code, [[0, 0, 2, 0, 2, 1, 0, 1]]] if as_union else [code]
    if as_union:
        mask = mask.copy()
        mask[0, :2] = True
    np.testing.assert_array_equal(draw_polygons(coco(*shapes), "coco", "a.png"), mask)


def test_a_circle_covers_the_centres_within_its_radius():
    mask = drawn(("circle", [(6.0, 4.25), (6.0, 7.75)]))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    np.testing.assert_array_equal(mask, (x - 6) ** 2 + (y - 4.25) ** 2 < 3.5**2)
    beyond = drawn(("circle", [(0.0, 0.0), (100.0, 0.0)]))
    assert beyond.all()


def test_a_shape_beyond_the_image_is_cut_off_and_one_outside_of_it_draws_nothing():
    assert drawn(("polygon", [(-1e8, -1e8), (1e8, -1e8), (1e8, 1e8), (-1e8, 1e8)])).all()
    assert not drawn(("rectangle", [(WIDTH + 1, 0), (WIDTH + 5, 5)]), ("circle", [(-9, -9), (-9, -5)])).any()


def test_the_mask_rules_reach_it():
    square = ("polygon", [(1, 1), (4, 1), (4, 3), (1, 3)])
    assert decode_mask(labelme(square), "labelme").sum() == 6
    assert decode_mask(coco([[1, 1, 4, 1, 4, 3, 1, 3]]), "coco:a.png").sum() == 6
    mask = decode_mask(labelme(square), "labelme")
    assert (mask.shape, mask.dtype) == ((HEIGHT, WIDTH), bool)
    assert mask.flags.c_contiguous


def test_an_image_without_shapes_has_an_empty_mask_and_one_that_coco_does_not_know_has_none():
    assert not drawn().any()
    clean = draw_polygons(coco([[1, 1, 4, 1, 4, 3]]), "coco", "clean.png")
    assert (clean.shape, clean.any()) == ((4, 5), False)
    with pytest.raises(MaskError, match=r"0 images are named 'b\.png', one was expected; .* knows 2, such as 'a\.png'"):
        draw_polygons(coco(), "coco", "b.png")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("a.png", "gear/bad/a.png"),
        ("bad/a.png", "gear/bad/a.png"),
        ("./bad\\a.png", "gear/bad/a.png"),
        ("/mnt/x/gear/bad/a.png", "gear/bad/a.png"),
        ("gear/bad/a.png", "a.png"),
    ],
)
def test_coco_images_are_found_by_the_end_of_their_path(name, asked):
    assert draw_polygons(coco([[1, 1, 4, 1, 4, 3, 1, 3]], name=name), "coco", asked).sum() == 6


@pytest.mark.parametrize(("name", "asked"), [("good/a.png", "bad/a.png"), ("xa.png", "a.png"), ("a.png", "xa.png")])
def test_coco_images_of_another_path_are_not_taken(name, asked):
    with pytest.raises(MaskError, match="0 images are named"):
        draw_polygons(coco(name=name), "coco", asked)


def test_two_coco_images_of_one_name_are_told_apart_by_their_path_only():
    rows = [{"id": i, "file_name": f"{where}/0.png", "width": 4, "height": 4} for i, where in enumerate("ab")]
    shape = {"id": 0, "image_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
    data = json.dumps({"images": rows, "annotations": [shape]}).encode()
    assert not draw_polygons(data, "coco", "root/a/0.png").any()
    assert draw_polygons(data, "coco", "root/b/0.png").all()
    with pytest.raises(MaskError, match="2 images are named"):
        draw_polygons(data, "coco", "0.png")


SQUARE = [[1, 1], [4, 1], [4, 3], [1, 3]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe\xfd", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"shapes": ' + b"9" * 5000 + b"}", "no JSON"),
        (b"[]", "no list of shapes|no imageWidth"),
        (b"3", "no imageWidth"),
        (labelme(width=None), "no imageWidth"),
        (labelme(width=-3), "no imageWidth"),
        (labelme(width="13"), "no imageWidth"),
        (labelme(width=math.nan), "no imageWidth"),
        (labelme(width=10**6, height=10**6), "too large"),
        (labelme(width=10**300, height=1), "too large"),
        (json.dumps({"imageWidth": 4, "imageHeight": 4}).encode(), "no list of shapes"),
        (json.dumps({"imageWidth": 4, "imageHeight": 4, "shapes": [3]}).encode(), "no list of shapes"),
        (json.dumps({"imageWidth": 4, "imageHeight": 4, "shapes": [{}]}).encode(), "shape 0"),
        (labelme(("polygon", [[1, 1], [4, 1]])), "of 2 points"),
        (labelme(("circle", SQUARE)), "'circle' of 4 points"),
        (labelme(("line", [[1, 1], [4, 1]])), "'line' of 2 points"),
        (labelme(("mask", [[1, 1], [4, 1]])), "'mask' of 2 points"),
        (labelme((["polygon"], SQUARE)), "of 4 points"),  # type: ignore[arg-type]
        (labelme(("polygon", [[1, 1], [4, math.nan], [4, 3]])), "no finite number"),
        (labelme(("polygon", [[1, 1], [4, math.inf], [4, 3]])), "no finite number"),
        (labelme(("polygon", [[1, 1], [4, 1e300], [4, 3]])), "far outside"),
        (labelme(("polygon", [[1, 1], [4, 10**400], [4, 3]])), "no numbers"),
        (labelme(("polygon", [[1, 1], [4, None], [4, 3]])), "no finite number"),
        (labelme(("polygon", [[1, 1], [4], [4, 3]])), "no numbers"),
        (labelme(("polygon", [[1, 1], [4, "x"], [4, 3]])), "no numbers"),
        (labelme(("polygon", [1, 1, 4, 1, 4, 3])), r"expected points as \[\[x, y\]"),
        (labelme(("polygon", [])), "expected points"),
        (b'{"imageWidth": 4, "imageHeight": 4, "shapes": [{"points": ' + b"[" * 200 + b"]" * 200 + b"}]}", "shape 0"),
    ],
)
def test_a_labelme_file_that_makes_no_sense_is_a_mask_error(data, reason):
    with pytest.raises(MaskError, match=reason):
        draw_polygons(data, "labelme")


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": "0g05b08J4M"}, "compressed run-length code"),
        ({"size": [HEIGHT, WIDTH], "counts": [3, 2]}, "do not make up an image of 13x9"),
        ({"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT]}, "do not make up"),
        ({"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT + 4, -4]}, "nor counts"),
        ({"size": [HEIGHT, WIDTH], "counts": [10**30]}, "nor counts"),
        ({"size": [HEIGHT, WIDTH], "counts": [1.5]}, "nor counts"),
        ({}, "nor counts"),
        ([], "no segmentation"),
        (None, "no segmentation"),
        ("x", "no segmentation"),
        ([[1, 1, 4, 1]], "expected points as"),
        ([[1, 1, 4, 1, 4]], "expected points as"),
        ([1, 1, 4, 1, 4, 3], "expected points as"),
        ([[1, 1, 4, math.nan, 4, 3]], "no finite number"),
    ],
)
def test_a_coco_shape_that_cannot_be_drawn_is_a_mask_error(segmentation, reason):
    with pytest.raises(MaskError, match=reason):
        draw_polygons(coco(segmentation), "coco", "a.png")


@pytest.mark.parametrize(
    ("images", "annotations", "reason"),
    [
        ({}, [], "no list of images"),
        ([{"id": 1}], [], "needs a file_name"),
        ([{"file_name": "a.png"}], [], "needs a file_name and an id"),
        ([{"file_name": "a.png", "id": []}], [], "needs a file_name and an id"),
        ([{"file_name": n, "id": 1, "width": 1, "height": 1} for n in "ab"], [], "id of its own"),
        ([{"file_name": "a.png", "id": 1}], [], "no width and height"),
        ([{"file_name": "a.png", "id": 1, "width": 10**5, "height": 10**5}], [], "too large"),
        ([], None, "no list of annotations"),
        ([], [{"image_id": {}}], "no image_id"),
    ],
)
def test_a_coco_file_that_makes_no_sense_is_a_mask_error(images, annotations, reason):
    with pytest.raises(MaskError, match=reason):
        draw_polygons(json.dumps({"images": images, "annotations": annotations}).encode(), "coco", "a.png")


def test_files_and_outlines_beyond_the_limits_are_refused_before_they_take_memory(monkeypatch):
    many = b"[" + b"[]," * 3_000_000 + b"[]]"
    zigzag = [(x, y) for i in range(60_000) for x, y in ((0, i % 7), (9000, i % 5))]
    outline = labelme(("polygon", zigzag), width=9000, height=9000)
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(MaskError, match="too large"):
            draw_polygons(many, "labelme")
        with pytest.raises(MaskError, match="more than 5000000 columns"):
            draw_polygons(outline, "labelme")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500 * 2**20  # the canvas of 81 million pixels, and no more
    assert time.perf_counter() - started < 30
    monkeypatch.setattr(polygons, "_MAX_BYTES", 50)
    with pytest.raises(MaskError, match="too large"):
        draw_polygons(labelme(), "labelme")
    monkeypatch.setattr(polygons, "_MAX_RUNS", 26)
    monkeypatch.setattr(polygons, "_MAX_BYTES", 10**6)
    wide = ("polygon", [(0, 0), (WIDTH, 0), (WIDTH, 2), (0, 2)])
    assert drawn(wide).sum() == 2 * WIDTH
    with pytest.raises(MaskError, match="more than 26 columns"):
        drawn(wide, wide, wide)


def test_many_images_share_one_parsed_file(monkeypatch):
    parsed = []
    loads = json.loads
    monkeypatch.setattr(polygons.json, "loads", lambda data: parsed.append(1) or loads(data))
    names = [f"{i}.png" for i in range(20)]
    images = [{"id": i, "file_name": name, "width": 8, "height": 8} for i, name in enumerate(names)]
    rows = [{"id": i, "image_id": i, "segmentation": [[0, 0, i % 9, 0, i % 9, 8, 0, 8]]} for i in range(20)]
    text = json.dumps({"images": images, "annotations": rows})
    for i, name in enumerate(names):
        assert draw_polygons(text.encode(), "coco", name).sum() == 8 * (i % 9)
    assert len(parsed) == 1
