"""The contract of a detector, as small checks named as sentences.

A check takes a function that makes a fresh detector and a few small images, and raises AssertionError when the sentence
is not true. The project's tests cross `CHECKS` with the registry; `check_detector` runs them all on one method, also on
a class that stands in no registry.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from functools import lru_cache, partial

import numpy as np
import safetensors.numpy
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import binom, spearmanr
from torch.optim.optimizer import register_optimizer_step_post_hook

from al_models.detector import FLOAT16_MAX, Detector
from al_models.errors import InvalidInput, ModelsError, NotFitted
from al_models.parts import backbone
from al_models.parts.frame import RIM, peaks_at_rim
from al_models.parts.offsets import Offset
from al_models.parts.sources import MemorySource
from al_models.registry import detector_class
from al_models.types import ImageBatch, ImageSource, Prediction, Runtime

SIZE = 128
"""Side of the images, in pixels, unless the detector's `quick` parameters name another."""
TOLERANCE = 1e-3
"""How far apart two equal results may lie, relative to the largest value: batches are summed in another order."""

SAME_ORDER = 0.99999
"""Spearman's rank correlation from which on an order is the same but for rounding."""

Make = Callable[[], Detector]


@dataclass(frozen=True)
class CheckImages:
    """Images to learn from and to judge, all of one texture; read-only."""

    train: np.ndarray
    """uint8 (n, h, w, 3), good."""
    good: np.ndarray
    """uint8 (n, h, w, 3), good and not among the training images."""
    anomalous: np.ndarray
    """uint8 (n, h, w, 3), each with a square of strong noise."""
    masks: np.ndarray
    """bool (n, h, w), the squares."""

    @property
    def test(self) -> np.ndarray:
        """The good images, then the anomalous ones."""
        return np.concatenate([self.good, self.anomalous])


Check = Callable[[Make, CheckImages], None]


@lru_cache(maxsize=4)
def check_images(size: int = SIZE, seed: int = 0) -> CheckImages:
    """Six training images, three good and two anomalous ones of a faint, cloudy texture."""
    rng = np.random.default_rng(seed)
    texture = _texture(11, size, rng)
    anomalous, masks = texture[9:].copy(), np.zeros((2, size, size), bool)
    side = size // 4
    for image, mask, (y, x) in zip(anomalous, masks, ((side, side), (size // 2, size // 3)), strict=True):
        mask[y : y + side, x : x + side] = True
        image[mask] = rng.integers(0, 256, (side * side, 3), dtype=np.uint8)
    images = CheckImages(texture[:6], texture[6:9], anomalous, masks)
    for array in (images.train, images.good, images.anomalous, images.masks):
        array.flags.writeable = False
    return images


def quick_detector(cls: type[Detector]) -> Detector:
    """A detector that fits small images in seconds: its `quick` parameters, at the size of the check's images."""
    return cls(**{"image_size": SIZE, **cls.quick})


def check_detector(detector: str | type[Detector]) -> None:
    """Run all checks on a method, given by its name in the registry or by its class.

    Raises ExceptionGroup with every check that failed, each with the check's name as a note.
    """
    make = partial(quick_detector, detector_class(detector) if isinstance(detector, str) else detector)
    failed = []
    for check in CHECKS:
        try:
            check(make, check_images(make().image_size))
        except Exception as error:
            error.add_note(f"check: {check.__name__}")
            failed.append(error)
    if failed:
        raise ExceptionGroup(f"{type(make()).__name__} breaks {len(failed)} of {len(CHECKS)} checks", failed)


# --- construction and parameters ---


def constructing_learns_nothing(make: Make, images: CheckImages) -> None:
    """A new detector holds its fields, with the values given, and nothing else."""
    detector = make()
    extra = sorted(set(vars(detector)) - {field.name for field in fields(detector)})
    assert not extra, f"construction set {extra}, which are no fields; set them in fit, ending in '_'"
    for name, value in detector.quick.items():
        found = getattr(detector, name)
        assert found == value, f"{name}={value!r} was stored as {found!r}; convert it in fit"


def fields_have_defaults_and_no_kwargs(make: Make, images: CheckImages) -> None:
    """The constructor takes keywords only, each with an immutable default, so that a misspelt one cannot pass."""
    cls = type(make())
    assert "__dataclass_fields__" in vars(cls), f"{cls.__name__} lacks @dataclass(kw_only=True): its fields are ignored"
    for field in fields(cls):
        assert field.default is not MISSING, f"{field.name} has no plain default; give the paper's value"
        hash(field.default)  # a mutable default would be shared between detectors
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{parameter} is not keyword-only"


def parameters_round_trip(make: Make, images: CheckImages) -> None:
    """`params()` survives JSON, and makes an equal detector."""
    detector = make()
    text = json.dumps(detector.params(), allow_nan=False)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()}
    again = type(detector)(**values)
    assert again == detector, f"{detector} became {again} by way of its params()"


# --- fit and what it learns ---


def fit_returns_self(make: Make, images: CheckImages) -> None:
    """`fit` gives the detector back and leaves its parameters alone."""
    detector = _brief(make)()
    before = detector.params()
    assert detector.fit(_source(detector, images.train)) is detector, "fit returned something other than self"
    assert detector.params() == before, f"fit changed the parameters {before} to {detector.params()}"


def learned_attributes_end_in_underscore(make: Make, images: CheckImages) -> None:
    """What fit sets ends in `_`, and there is some; what begins with `_` follows from it."""
    detector = _fitted(make, images)
    new = {name for name in vars(detector) if not name.startswith("_")} - {field.name for field in fields(detector)}
    assert detector.state_names(), "fit set no attribute that ends in '_'"
    assert new == set(detector.state_names()), f"fit set {sorted(new - set(detector.state_names()))}; end them in '_'"


def fit_does_not_change_its_input(make: Make, images: CheckImages) -> None:
    """Neither fit nor predict writes to the images or features they are given."""
    detector = _brief(make)()
    train, test = _source(detector, images.train), _source(detector, images.test)
    before = copy.deepcopy((train.tensors, test.tensors))
    detector.fit(train).predict(test)
    for old, new in zip(before, (train.tensors, test.tensors), strict=True):
        for name, value in old.items():
            assert torch.equal(value, new[name]), f"the {name} given were written to"


def fitting_again_forgets(make: Make, images: CheckImages) -> None:
    """A second fit gives what a first one gives: nothing of the one before stays."""
    make = _brief(make)
    once = _fitted(make, images)
    twice = make()
    twice.fit(_source(twice, images.good)).fit(_source(twice, images.train))
    assert once.state_names() == twice.state_names()
    if once.traits.deterministic:
        _assert_same(_predict(once, images.test), _predict(twice, images.test), "after a second fit")


def fitting_nothing_is_a_clear_error(make: Make, images: CheckImages) -> None:
    """No image to learn from raises InvalidInput."""
    with _raises(InvalidInput, "fit without an image"):
        make().fit(images.train[:0])


def one_training_image_is_enough_or_a_clear_error(make: Make, images: CheckImages) -> None:
    """One image is learned from, or refused with a ModelsError."""
    with _clear_error_allowed():
        detector = _brief(make)()
        _assert_stated(detector.fit(_source(detector, images.train[:1])), images.test)


def constant_images_do_not_crash_or_give_a_clear_error(make: Make, images: CheckImages) -> None:
    """Images without any contrast are worked on, or refused with a ModelsError."""
    with _clear_error_allowed():
        detector = _brief(make)()
        flat = np.full_like(images.train, 128)
        _assert_stated(detector.fit(_source(detector, flat)), np.concatenate([flat[:1], images.test]))


# --- state ---


def state_is_plain_arrays(make: Make, images: CheckImages) -> None:
    """`state()` holds numeric numpy arrays, named after learned attributes (`bank_`, `network_.conv.weight`)."""
    detector = _fitted(make, images)
    for name, value in detector.state().items():
        assert isinstance(value, np.ndarray), f"{name} is a {type(value).__name__}"
        assert value.dtype.kind in "biuf", f"{name} is of dtype {value.dtype}, which no plain file holds"
        assert value.flags.c_contiguous, f"{name} is not C-contiguous; safetensors would shuffle it without a word"
        assert name.partition(".")[0] in detector.state_names(), f"{name} is not named after a learned attribute"


def state_round_trip_gives_equal_predictions(make: Make, images: CheckImages) -> None:
    """A fresh detector with the state, by way of safetensors bytes, predicts the same bits and has the same state."""
    fitted = _fitted(make, images)
    state = fitted.state()
    loaded = make().load_state(safetensors.numpy.load(safetensors.numpy.save(state)))
    _assert_same(_predict(fitted, images.test), _predict(loaded, images.test), "after a state round trip")
    again = loaded.state()
    assert again.keys() == state.keys(), f"the state's names changed: {sorted(again.keys() ^ state.keys())}"
    assert all(_equal(value, again[name]) for name, value in state.items()), "the state's values changed"


def pickles_and_deep_copies_predict_the_same(make: Make, images: CheckImages) -> None:
    """A fitted detector crosses a process border, and a copy of it is whole."""
    fitted = _fitted(make, images)
    expected = _predict(fitted, images.test)
    _assert_same(expected, _predict(pickle.loads(pickle.dumps(fitted)), images.test), "after pickling")
    _assert_same(expected, _predict(copy.deepcopy(fitted), images.test), "after a deep copy")


def predict_before_fit_raises_not_fitted(make: Make, images: CheckImages) -> None:
    """`predict` and `state` raise NotFitted before anything was learned."""
    with _raises(NotFitted, "predict before fit"):
        make().predict(images.good)
    with _raises(NotFitted, "state before fit"):
        make().state()


def predicting_nothing_is_a_clear_error(make: Make, images: CheckImages) -> None:
    """No image to judge raises InvalidInput."""
    fitted = _fitted(make, images)
    with _raises(InvalidInput, "predict without an image"):
        fitted.predict(images.test[:0])


def predict_changes_nothing_learned(make: Make, images: CheckImages) -> None:
    """Predicting leaves the state as it was, so that it may be saved before or after."""
    fitted = _fitted(make, images)
    before = copy.deepcopy(fitted.state())
    _predict(fitted, images.test)
    after = fitted.state()
    assert before.keys() == after.keys(), f"predict added or removed {sorted(before.keys() ^ after.keys())}"
    changed = [name for name, value in before.items() if not _equal(value, after[name])]
    assert not changed, f"predict changed {changed}"


# --- predictions ---


def maps_and_scores_have_the_stated_shape_and_type(make: Make, images: CheckImages) -> None:
    """Maps are float32 (n, size, size), scores float32 (n,), all finite and within float16's range."""
    _assert_stated(_fitted(make, images), images.test)


def prediction_ids_match(make: Make, images: CheckImages) -> None:
    """Each prediction carries the id of its image, in the order given, over batches."""
    fitted = _fitted(make, images)
    source = _source(fitted, images.test, batch_size=2)
    found = fitted.predict(source).ids
    assert found == source.ids, f"predicted for {found}, given {source.ids}"


def arrays_predict_as_a_source_does(make: Make, images: CheckImages) -> None:
    """Plain arrays give what a source gives, up to the half precision that features are stored in."""
    fitted = _fitted(make, images)
    found = fitted.predict(images.test)
    assert len(found.ids) == len(images.test), f"{len(images.test)} images gave {len(found.ids)} predictions"
    _assert_close(_predict(fitted, images.test), found, "for arrays instead of a source", tolerance=0.02)


def higher_is_more_anomalous(make: Make, images: CheckImages) -> None:
    """A pasted square of noise stands out in the map, and in the score over the median good image."""
    fitted = _fitted(make, images)
    good, bad = _predict(fitted, images.good), _predict(fitted, images.anomalous)
    for row, (values, mask, score) in enumerate(zip(bad.maps, images.masks, bad.scores, strict=True)):
        inside, outside = float(values[mask].mean()), float(values[~mask].mean())
        assert inside > outside, f"anomalous image {row}: {inside:.4g} on the defect, {outside:.4g} elsewhere"
        median = float(np.median(good.scores))
        assert score > median, f"anomalous image {row} scores {score:.4g}, the median good image {median:.4g}"


def good_textures_score_highest_anywhere(make: Make, images: CheckImages) -> None:
    """The maxima of good textures lie at the rim no more often than chance lets twice its share of the area bring."""
    fitted = _fitted(make, images)
    good = _texture(_TEXTURES, fitted.image_size, np.random.default_rng(1))
    peaks, area = peaks_at_rim(_predict(fitted, good).maps).sum(), 1 - (1 - 2 * RIM) ** 2
    most = binom.ppf(0.99, _TEXTURES, 2 * area)
    assert peaks <= most, f"{peaks} of {_TEXTURES} good images have their maximum at the rim; {most:.0f} are allowed"


def batch_size_changes_nothing(make: Make, images: CheckImages) -> None:
    """Images read one by one, or all at once, give the same in fit and in predict, up to rounding."""
    make = _brief(make)
    whole, single = _fitted(make, images), make()
    single.fit(_source(single, images.train, batch_size=1))
    expected = _predict(whole, images.test)
    _assert_close(expected, whole.predict(_source(whole, images.test, batch_size=1)), "predicted one by one")
    if whole.traits.deterministic:
        _assert_close(expected, _predict(single, images.test), "fitted one by one")


def order_of_images_changes_nothing_in_predict(make: Make, images: CheckImages) -> None:
    """An image's prediction does not depend on its neighbours."""
    fitted = _fitted(make, images)
    forwards, backwards = _predict(fitted, images.test), _predict(fitted, images.test[::-1])
    turned = Prediction(backwards.ids[::-1], backwards.maps[::-1], backwards.scores[::-1])
    _assert_close(forwards, turned, "in reverse order")


def features_at_another_scale_rank_all_the_same(make: Make, images: CheckImages) -> None:
    """Features sixteen times as large or as small, as another backbone gives them, leave pixels and images in order.

    A power of two, so that what depends on the scale shows, and rounding does not.
    """
    if "backbone" not in {field.name for field in fields(make())}:
        return
    small, large = (_at_scale(_brief(make), images, factor) for factor in (1 / 16, 16.0))
    for what, x, y in (("pixels", small.maps, large.maps), ("images", small.scores, large.scores)):
        same = spearmanr(x.ravel(), y.ravel()).statistic
        assert same > SAME_ORDER, f"features 256 times as large rank the {what} otherwise (Spearman {same:.6f})"


def maps_lie_where_the_images_do(make: Make, images: CheckImages) -> None:
    """A bright square has its map where it lies, and a backbone whose cells lie further beside it hardly moves it."""
    off = _off_the_square(_fitted(make, images))
    if "backbone" in make().params():
        with _backbones(_Beside):
            beside = make()
            off = _off_the_square(beside.fit(_source(beside, images.train))) - off
    down, right = off.tolist()
    assert np.abs(off).max() <= _OFF, f"a square's map is {down:.1f} px further down and {right:.1f} px further right"


# --- randomness ---


def equal_seed_equal_result(make: Make, images: CheckImages) -> None:
    """The runtime's seed alone decides: equal seeds give equal bits whatever the global generators were left at."""
    make = _brief(make)
    if not make().traits.deterministic:
        return
    results = []
    for elsewhere in (1, 2):
        with _global_generators_at(elsewhere):
            fitted = make().fit(_source(make(), images.train), Runtime(seed=5))
            results.append(_predict(fitted, images.test, Runtime(seed=5)))
    _assert_same(*results, "with the same seed")


def other_runs_leave_the_global_random_state_untouched(make: Make, images: CheckImages) -> None:
    """Fit and predict neither seed nor draw from the generators of torch, numpy and random."""
    make = _brief(make)
    for _ in range(3):  # a thread of another library may draw meanwhile; it does not do so each time
        with _global_generators_at(3):
            before = _global_state()
            _predict(make().fit(_source(make(), images.train)), images.test)
            if before == _global_state():
                return
    raise AssertionError("a global generator was moved; draw from one seeded with runtime.seed")


# --- traits ---


def more_images_are_learned_as_if_given_at_once(make: Make, images: CheckImages) -> None:
    """A saved model that takes in more images is the model of all of them, or says that it cannot."""
    make = _brief(make)
    half = len(images.train) // 2
    first, whole = make().fit(_source(make(), images.train[:half])), _fitted(make, images)
    if not whole.traits.incremental:
        with _raises(InvalidInput, "partial_fit of a method that is not incremental"):
            first.partial_fit(_source(first, images.train[half:]))
        return
    more = make().load_state(first.state()).partial_fit(_source(first, images.train[half:]))
    _assert_close(_predict(whole, images.test), _predict(more, images.test), "learned in two parts")
    _predict(first, images.test)  # what a prediction has cached must not outlive what is learned
    first.partial_fit(_source(first, images.train[half:]))
    _assert_close(_predict(whole, images.test), _predict(first, images.test), "learned more after a prediction")


def traits_are_true(make: Make, images: CheckImages) -> None:
    """What is said to be read is read, training is said, and a user of synthetic defects says so."""
    make = _brief(make)
    detector = make()
    with _counted_optimiser_steps() as steps:
        detector.fit(_source(detector, images.train))  # this source gives images only where the traits ask for them
    said = detector.traits.trains
    assert bool(steps) == said, f"fit took {len(steps)} optimiser steps, but traits.trains={said}"
    if detector.traits.needs_images:
        assert _fails_without(make, images, "images"), "traits.needs_images, but fit and predict do without images"
    if detector.feature_spec() is not None:
        assert _fails_without(make, images, "features"), "a feature_spec, but fit and predict do without features"
    imported = {getattr(value, "__module__", None) for value in vars(sys.modules[type(detector).__module__]).values()}
    if "al_models.parts.defects" in imported:
        assert detector.traits.uses_synthetic_defects, "imports al_models.parts.defects, but the trait denies it"


CHECKS: list[Check] = [
    constructing_learns_nothing,
    fields_have_defaults_and_no_kwargs,
    parameters_round_trip,
    fit_returns_self,
    learned_attributes_end_in_underscore,
    fit_does_not_change_its_input,
    fitting_again_forgets,
    fitting_nothing_is_a_clear_error,
    one_training_image_is_enough_or_a_clear_error,
    constant_images_do_not_crash_or_give_a_clear_error,
    state_is_plain_arrays,
    state_round_trip_gives_equal_predictions,
    pickles_and_deep_copies_predict_the_same,
    predict_before_fit_raises_not_fitted,
    predicting_nothing_is_a_clear_error,
    predict_changes_nothing_learned,
    maps_and_scores_have_the_stated_shape_and_type,
    prediction_ids_match,
    arrays_predict_as_a_source_does,
    higher_is_more_anomalous,
    good_textures_score_highest_anywhere,
    batch_size_changes_nothing,
    order_of_images_changes_nothing_in_predict,
    features_at_another_scale_rank_all_the_same,
    maps_lie_where_the_images_do,
    equal_seed_equal_result,
    other_runs_leave_the_global_random_state_untouched,
    more_images_are_learned_as_if_given_at_once,
    traits_are_true,
]
"""Every check, in the order a new method is best mended in."""


# --- what the checks share ---


class StatedSource(ImageSource):
    """Hands out what a detector's traits and feature spec ask for, features in half precision, and nothing else."""

    def __init__(self, detector: Detector, images: np.ndarray, batch_size: int = 16, without: str = "") -> None:
        """Compute the features of uint8 (n, h, w, 3); `without` is "images" or "features" to withhold them."""
        batch = _read(detector, images)
        self.ids, self.batch_size, self.layers = batch.ids, batch_size, tuple(batch.features)
        self.offsets = MemorySource(images[:0], detector, Runtime()).offsets
        self.tensors: dict[str | int, torch.Tensor] = {}
        if detector.traits.needs_images and without != "images":
            self.tensors["images"] = batch.images.clone()
        if without != "features":
            self.tensors |= {layer: value.half().clone() for layer, value in batch.features.items()}

    def read(self, rows: Sequence[int]) -> ImageBatch:
        """The images and features of these rows."""
        rows = list(rows)
        part = {name: value if rows == list(range(len(self))) else value[rows] for name, value in self.tensors.items()}
        return ImageBatch(tuple(self.ids[row] for row in rows), part.pop("images", None), part)


def _source(detector: Detector, images: np.ndarray, batch_size: int = 16, without: str = "") -> StatedSource:
    return StatedSource(detector, images, batch_size, without)


def _brief(make: Make) -> Make:
    """Makes detectors that train two epochs: enough for a sentence about how a fit behaves, not what it learns."""
    trained = {field.name for field in fields(make())} & {"epochs", "teacher_epochs"}
    fewer = {name: min(2, getattr(make(), name)) for name in trained if isinstance(getattr(make(), name), int)}
    return partial(_replaced, make, fewer) if fewer else make


def _replaced(make: Make, params: dict[str, int]) -> Detector:
    return replace(make(), **params)  # type: ignore[arg-type]


def _fitted(make: Make, images: CheckImages) -> Detector:
    """A detector fitted on the training images, the caller's own: most checks begin with one, so it is fitted once."""
    detector = make()
    key = type(detector), repr(detector), images.train.tobytes()
    if key not in _fits:
        if len(_fits) > 1:  # a method's own and its brief fit: methods come one after the other
            _fits.clear()
        _fits[key] = detector.fit(_source(detector, images.train))
    return copy.deepcopy(_fits[key])


_fits: dict[tuple[object, ...], Detector] = {}


def _read(detector: Detector, images: np.ndarray) -> ImageBatch:
    """All of the images as this detector reads them, for reading only; the features of each set are computed once."""
    key = detector.feature_spec(), detector.image_size, images.shape, images.tobytes()
    if key not in _reads:
        if len(_reads) >= _READS:
            _reads.clear()
        whole = MemorySource(images, detector, Runtime())
        _reads[key] = whole.read(range(len(whole)))
    return _reads[key]


_reads: dict[tuple[object, ...], ImageBatch] = {}
_READS = 16
_TEXTURES = 24
_SQUARES = 16
_BESIDE = 16
_OFF = 2.0


def _predict(detector: Detector, images: np.ndarray, runtime: Runtime = Runtime()) -> Prediction:  # noqa: B008 (frozen)
    return detector.predict(_source(detector, images), runtime)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")  # the curve of a training may lack held-out losses


def _assert_stated(detector: Detector, images: np.ndarray) -> None:
    found = _predict(detector, images)
    n, size = len(images), detector.image_size
    assert isinstance(found, Prediction), f"predict gave a {type(found).__name__}"
    for what, values, shape in (("maps", found.maps, (n, size, size)), ("scores", found.scores, (n,))):
        assert isinstance(values, np.ndarray), f"{what} are a {type(values).__name__}"
        assert values.dtype == np.float32, f"{what} are {values.dtype}, not float32"
        assert values.shape == shape, f"{what} are of shape {values.shape}, not {shape}"
        assert np.isfinite(values).all(), f"{what} are not all finite"
        assert np.abs(values).max() <= FLOAT16_MAX, f"{what} reach {np.abs(values).max():.4g}, beyond float16"


def _assert_same(a: Prediction, b: Prediction, when: str) -> None:
    for what, x, y in (("maps", a.maps, b.maps), ("scores", a.scores, b.scores)):
        assert np.array_equal(x, y), f"{what} differ by up to {np.abs(x - y).max():.3g} {when}"


def _assert_close(a: Prediction, b: Prediction, when: str, tolerance: float = TOLERANCE) -> None:
    for what, x, y in (("maps", a.maps, b.maps), ("scores", a.scores, b.scores)):
        apart = np.abs(x - y).max() / max(np.abs(x).max(), 1e-12)
        assert apart <= tolerance, f"{what} differ by {apart:.3g} of their largest value {when}; {tolerance} is allowed"


def _at_scale(make: Make, images: CheckImages, factor: float) -> Prediction:
    """What a detector predicts that learned where the backbone gives `factor` times its features."""
    detector = make()
    train, test = (_source(detector, part) for part in (images.train, images.test))
    for source in (train, test):
        source.tensors |= {layer: factor * source.tensors[layer].float() for layer in source.layers}
    with _backbones(partial(_Times, factor=factor)):
        return detector.fit(train).predict(test)


def _off_the_square(fitted: Detector) -> np.ndarray:
    """How far below and right of bright squares the squared change of the map has its centre, in pixels: (2,)."""
    rng, size, side = np.random.default_rng(2), fitted.image_size, fitted.image_size // 8
    good = _texture(_SQUARES, size, rng)
    bad, even = good.copy(), np.stack([rng.permutation(_SQUARES) for _ in range(2)], axis=1)
    corners = size * 3 // 8 - side // 2 + even * (size // 4) // _SQUARES  # all places within a cell alike
    for image, (y, x) in zip(bad, corners, strict=True):
        image[y : y + side, x : x + side] = 255
    change = np.square(_predict(fitted, bad).maps - _predict(fitted, good).maps, dtype=np.float64)
    places, total = np.arange(size) + 0.5, change.sum((1, 2))
    centres = np.stack([change.sum(2) @ places / total, change.sum(1) @ places / total], axis=1)
    return (centres - corners - side / 2).mean(0)


@contextmanager
def _backbones(altered: Callable[[torch.nn.Module], torch.nn.Module]) -> Iterator[None]:
    """Backbones have an altered network, also those that are built already: to build one takes a second."""
    built, reads, measure, measured = backbone.Backbone, dict(_reads), vars(backbone.Backbone)["offsets"], {}

    def offsets(self: backbone.Backbone) -> Mapping[int, Offset]:
        if self.spec not in measured:
            measured[self.spec] = measure.func(self)
        return measured[self.spec]

    _reads.clear()
    built.network = property(
        lambda self: altered(vars(self)["network"]), lambda self, of: vars(self).update(network=of)
    )
    built.offsets = property(offsets)
    try:
        yield
    finally:
        del built.network
        built.offsets = measure
        _reads.clear()
        _reads.update(reads)


class _Beside(torch.nn.Module):
    """Sees images `_BESIDE` pixels further down and right; what leaves them comes in again at the other side."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(self.network(x.roll((_BESIDE, _BESIDE), (2, 3))))


class _Times(torch.nn.Module):
    def __init__(self, network: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.factor * y for y in self.network(x)]


@contextmanager
def _raises(expected: type[Exception], what: str) -> Iterator[None]:
    message = None
    try:
        yield
    except expected as error:
        message = str(error)
    assert message is not None, f"{what} raised nothing; {expected.__name__} was expected"
    assert message, f"{what} raised {expected.__name__} without a message"


@contextmanager
def _clear_error_allowed() -> Iterator[None]:
    message = "none"
    try:
        yield
    except ModelsError as error:
        message = str(error)
    assert message, "the error has no message"


def _fails_without(make: Make, images: CheckImages, what: str) -> bool:
    detector = make()
    try:
        detector.fit(_source(detector, images.train, without=what))
        detector.predict(_source(detector, images.test, without=what))
    except Exception:
        return True
    return False


@contextmanager
def _counted_optimiser_steps() -> Iterator[list[None]]:
    steps: list[None] = []
    hook = register_optimizer_step_post_hook(lambda optimiser, inputs, options: steps.append(None))
    try:
        yield steps
    finally:
        hook.remove()


def _global_state() -> tuple[bytes, str, object]:
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state(legacy=False)), random.getstate()


@contextmanager
def _global_generators_at(seed: int) -> Iterator[None]:
    """The generators of torch, numpy and random as this seed leaves them; as they were before, afterwards."""
    before = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
    np.random.set_state(before[0])
    random.setstate(before[1])


def _texture(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Clouds of a few pixels on a warm gray: uint8 (n, size, size, 3)."""
    clouds = gaussian_filter(rng.standard_normal((n, size, size)), sigma=(0, 2, 2), mode="wrap")
    gray = 128 + 8 * clouds / clouds.std()
    return np.clip(gray[..., None] + np.array([8.0, 0.0, -8.0]), 0, 255).astype(np.uint8)
