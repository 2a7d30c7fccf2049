"""Methods by name, and the way in for people without a pipeline."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
from annotated_types import Interval, Len, MultipleOf
from PIL import Image

from al_models import METHODS, create
from al_models.checks import check_images, quick_detector
from al_models.detector import Detector
from al_models.errors import InvalidInput, UnknownName
from al_models.parameters import declared, words
from al_models.registry import detector_class

FAMILIES = {"reconstruction", "generative", "embedding", "self_supervised", "one_class"}


@pytest.mark.parametrize("method", METHODS)
def test_each_row_is_found_where_it_says(method):
    row, cls = METHODS[method], detector_class(method)
    assert issubclass(cls, Detector)
    assert row.family in FAMILIES
    assert row.target.startswith(f"{row.family}.")
    assert cls.__doc__
    assert "arXiv" in row.paper or "doi" in row.paper


def test_rows_are_sorted():
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_create_gives_the_defaults_and_takes_any_parameter_back(method):
    detector = create(method)
    assert detector == detector_class(method)()
    assert create(method, **detector.params()) == detector
    assert create(method, image_size=288).image_size == 288
    assert set(detector.params()) == {field.name for field in fields(detector)}


def test_lists_become_tuples_so_that_equal_parameters_are_equal():
    assert create("padim", layers=[1, 2]) == create("padim", layers=(1, 2))


@pytest.mark.parametrize("name", ["patchcor", "PatchCore", "patch_core"])
def test_an_unknown_method_names_the_nearest(name):
    with pytest.raises(UnknownName, match="did you mean patchcore") as caught:
        create(name)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_name_like_no_other_lists_all():
    with pytest.raises(UnknownName, match=", ".join(METHODS)):
        create("zzzz")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean coreset_ratio"):
        create("patchcore", coreset_ration=0.1)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("padim", {"image_size": "64"}, "padim was given image_size = '64', where a whole number of at least 1 is exp"),
        ("padim", {"image_size": "64"}, "(leave it out for 256; numbers stand without quotes)"),
        ("padim", {"image_size": 0}, "image_size = 0, where a whole number of at least 1 is expected (leave it out"),
        ("padim", {"image_size": 64.0}, "image_size = 64.0, where a whole number"),
        ("padim", {"image_size": True}, "image_size = True, where a whole number"),
        ("padim", {"sigma": math.nan}, "sigma = nan, where a finite number"),
        ("padim", {"sigma": math.inf}, "sigma = inf, where a finite number"),
        ("padim", {"weights": 3}, "weights = 3, where a text is expected (or leave it out)"),
        ("dfr", {"layers": 2}, "layers = 2, where a list of 1 or more whole numbers of at least 0 is expected"),
        ("dfr", {"layers": []}, "layers = [], where a list of 1 or more"),
        ("dfr", {"layers": [1, "2"]}, "layers = [1, '2'], where a list of 1 or more"),
        ("dfr", {"epochs": 0, "max_minutes": 0}, "epochs = 0, where a whole number of at least 1 is expected"),
        ("dfr", {"epochs": 0, "max_minutes": 0}, "; and max_minutes = 0, where a finite number above 0 is expected"),
        (
            "stpm",
            {"learning_rate": 0},
            "learning_rate = 0, where a finite number above 0",
        ),  # of the base, declared anew
        ("somad", {"units": [8]}, "units = [8], where a list of 2 whole numbers"),
        ("somad", {"shrink": 1}, "shrink = 1, where true or false is expected"),
        ("differnet", {"location": "top"}, "location = 'top', where 'bottleneck' or 'expansion' is expected"),
    ],
)
def test_a_value_of_another_type_or_out_of_bounds_is_refused_with_what_is_right(method, params, message):
    with pytest.raises(InvalidInput) as caught:
        create(method, **params)
    assert message in str(caught.value)


REFUSED = {
    "ae_ssim": [{"image_size": 127}],
    "cflow": [{"condition": 6}, {"step_positions": 0}],
    "contrario": [
        *({"training_share": 1.5}, {"tail_share": 0.0}, {"tail": "chi"}, {"sizes": (2,)}, {"sizes": ()}),
        *({"border": -1}, {"components": 0}),
    ],
    "cs_flow": [{"layers": (2, 3)}, {"blocks": 0}],
    "dfr": [{"variance": 0.0}, {"variance": 1.0}, {"latent": 0}, {"region": 0}, {"frame": 0.5}],
    "differnet": [{"blocks": 0}, {"rotations": 0}, {"transforms": 0}],
    "fastflow": [{"flow_steps": 0}, {"hidden_ratio": 0.0}],
    "favae": [{"width": 0}, {"latent": 0}],
    "fyd": [{"reach": -0.1}, {"reach": 0.5}, {"epsilon": 0.0}, {"channels": 0}],
    "gaussian_finetune": [{"epsilon": 0.0}, {"epsilon": math.nan}],
    "mkd": [{"width": 0}, {"value_weight": -1.0}],
    "mlf_sc": [
        *({"atoms": 0}, {"channels": 0}, {"alpha": 0.0}, {"nonzeros": 6}, {"patch": 11}, {"stride": 3}),
        {"border": 13},
    ],
    "mlir": [{"latent": 0}, {"width": 0}],
    "mpad": [{"prototypes": 0}, {"latent": 0}, {"width": 0}, {"decay": 1.0}],
    "ocsvm": [
        *({"nu": 0.0}, {"nu": 1.0}, {"gamma": -1.0}, {"epsilon": 0.0}, {"exact_patches": 0}, {"centres": 0}),
        {"epochs": -1},
    ],
    "padim": [{"channels": "abc"}],
    "se_svdd": [{"width": 0}, {"dimensions": 0}],
    "soe": [{"dimensions": 0}, {"epsilon": 0.0}],
    "somad": [
        *({"channels": 0}, {"units": (0, 3)}, {"units": (3,)}, {"epochs": (-1, 2)}, {"neighbours": 0}),
        {"epsilon": 0.0},
    ],
    "uninformed_students": [
        *({"receptive_fields": (17, 16)}, {"receptive_fields": ()}, {"stride": 3}, {"teacher": "resnet"}),
        *({"students": 0}, {"image_size": 32}),
    ],
    "utrad": [{"dim": 20}, {"dim": 0}, {"heads": 3}, {"depth": 0}, {"tokens": 1}],
    "vt_adl": [{"patch": 0}, {"patch": 30}, {"patch": 256}, {"heads": 3}, {"gaussians": 0}],
}
"""Method -> parameters out of their bounds, or that do not go with its defaults."""


@pytest.mark.parametrize(
    ("method", "params"),
    [pytest.param(m, bad, id=f"{m}-{bad}") for m, many in REFUSED.items() for bad in many],
)
def test_bad_parameters_are_refused_before_anything_is_read(method, params):
    """By `create`, and by the fit of a detector made from its class; what was given is named."""
    (name,) = params
    with pytest.raises(InvalidInput, match=rf"{method}.*\b{name} ?= ?"):
        create(method, **params)
    cls = detector_class(method)
    with pytest.raises(InvalidInput, match=rf"{cls.__name__}.*\b{name} ?= ?"):
        cls(**params).fit(["no such file.png"])


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("padim", {"sigma": 4, "image_size": np.int64(64), "layers": (1, 2)}),
        ("dfr", {"max_minutes": 5, "patience": None, "layers": np.array([1, 2]).tolist()}),
        ("somad", {"units": [8, 8]}),
    ],
)
def test_a_whole_number_passes_for_any_and_a_list_for_a_tuple(method, params):
    detector = create(method, **params)
    assert all(getattr(detector, name) == (tuple(v) if isinstance(v, list) else v) for name, v in params.items())


@pytest.mark.parametrize("method", METHODS)
def test_each_parameter_is_told_in_words(method):
    """Name, default, what is allowed and what it means, its own before those of its bases."""
    cls = detector_class(method)
    told = declared(cls)
    assert {one.name: one.default for one in told} == cls().params()
    assert [one.name for one in told if not one.meaning or not one.allowed] == []


def test_a_parameter_is_told_as_its_nearest_class_declares_it():
    told = {one.name: one for one in declared(detector_class("uninformed_students"))}
    assert told["stride"].allowed == "1 or 2 or 4 or 8"
    assert told["crop"].allowed == "a whole number of at least 1, or none"
    assert told["patience"].default == 100
    assert told["epochs"].meaning == "Epochs of training, at most."


def test_bounds_of_other_kinds_are_told_too():
    bounded = Annotated[tuple[Annotated[int, Interval(ge=1, lt=9), MultipleOf(2)], ...], Len(1, 3)] | None
    assert words(bounded) == (
        "a list of 1 or more whole numbers of at least 1 and below 9 and that 2 divides with 3 or fewer"
    )


def test_the_registry_imports_neither_methods_nor_torch():
    code = (
        "import sys, al_models; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'timm', 'pydantic')][:3])"
    )
    root = str(Path(__file__).parents[1])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout.strip() == "[]"


# --- create(...).fit(...).predict(...) ---


@pytest.fixture(scope="module")
def fitted():
    detector = create("patchcore", image_size=128, coreset_ratio=0.02)
    return detector.fit(check_images(128).train)


@pytest.fixture
def files(tmp_path):
    """One image as three files: colour, larger, and gray; one more with a defect."""
    images = check_images(128)
    pictures = {
        "plain.png": Image.fromarray(images.good[0]),
        "large.png": Image.fromarray(images.good[0]).resize((300, 200)),
        "gray.png": Image.fromarray(images.good[0]).convert("L"),
        "bad.png": Image.fromarray(images.anomalous[0]),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    return [tmp_path / name for name in pictures]


def test_paths_of_mixed_sizes_gray_and_colour(fitted, files):
    found = fitted.predict(files)
    assert found.maps.shape == (4, 128, 128)
    assert found.ids == tuple(str(file) for file in files)
    assert int(found.scores.argmax()) == 3
    again = fitted.predict([str(file) for file in files])
    np.testing.assert_array_equal(found.maps, again.maps)


def test_paths_and_arrays_of_mixed_sizes_give_the_same(fitted, files):
    arrays = [np.asarray(Image.open(file)) for file in files]
    assert len({array.shape for array in arrays}) == 3
    np.testing.assert_array_equal(fitted.predict(files).maps, fitted.predict(arrays).maps)


def test_fit_takes_paths(files, fitted):
    learned = create("patchcore", image_size=128, coreset_ratio=0.05).fit(files[:3])
    assert learned.predict(files).scores.argmax() == 3


def test_a_gray_image_is_its_three_channel_copy(fitted):
    gray = check_images(128).good[0, :, :, 0]
    one, three = (fitted.predict([image]).maps for image in (gray, np.repeat(gray[..., None], 3, axis=2)))
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 64, 64, 3)), "float64"),
        (np.zeros((64, 64, 3), np.uint8), r"\(64, 64, 3\)"),
        ("image.png", "image.png"),
        ([3], "int"),
        ([np.zeros((64, 64, 4), np.uint8)], "4"),
        (np.zeros((0, 64, 64, 3), np.uint8), "no image"),
        ([], "no image"),
    ],
    ids=["floats", "one array", "one path", "numbers", "four channels", "empty array", "empty list"],
)
def test_anything_else_is_refused_by_fit_and_predict(images, message, fitted):
    with pytest.raises(InvalidInput, match=message):
        create("patchcore").fit(images)
    with pytest.raises(InvalidInput, match=message):
        fitted.predict(images)


def test_a_method_learns_the_same_from_equal_images_given_twice():
    detector = quick_detector(detector_class("padim"))
    train = check_images(128).train
    first, second = detector.fit(train).state(), detector.fit(list(train)).state()
    assert all(np.array_equal(first[name], second[name]) for name in first)
