"""Every method of the registry keeps the detector's contract. Adding a method needs no edit here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch

from al_models import METHODS
from al_models.checks import CHECKS, check_detector, check_images, quick_detector
from al_models.detector import Detector
from al_models.parts.maps import to_maps
from al_models.registry import detector_class
from al_models.types import FeatureSpec, Prediction, Runtime, Traits

_HIGHER = "higher_is_more_anomalous"
_RIM = "good_textures_score_highest_anywhere"
_PLACE = "maps_lie_where_the_images_do"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("contrario", _RIM): "learns from the image alone, in which what the padding reaches is rare; 8 pixels are cut off",
    ("draem", _PLACE): "a U-Net of few steps answers for itself, and it sees the image where it is",
    (
        "gaussian_finetune",
        _RIM,
    ): "a Gaussian fits the images it learned at every position alike: they tell no level",
    ("ganomaly", _HIGHER): "its score is of two codes, which networks of few steps bring together for noise, too",
    ("mkd", _PLACE): "a cloner of two epochs answers for itself, and it sees the image where it is",
    ("mlf_sc", _PLACE): "cuts border positions off and repeats the nearest inner ones, which move with the backbone",
    ("mlf_sc", _RIM): "cuts border positions off and repeats the nearest inner ones, which are then the whole rim",
    ("ocsvm", _PLACE): "of six images, all that is new is equally far outside: its map is flat",
    ("somad", _RIM): "has few units for the patches of the rim, and their covariances are of few patches",
    ("spade", _RIM): "a training image is its own nearest neighbour: they tell no level",
    ("stpm", _PLACE): "a student of few steps answers for itself, and it sees the image where it is",
    ("uninformed_students", _PLACE): "students of few steps answer for themselves, and they see the image where it is",
}
"""(method, check) -> why the sentence is not true of this method; strict, so that it goes when it becomes true."""


def cell(method, check):
    reason = EXCEPTIONS.get((method, check.__name__))
    marks = [pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)] if reason else []
    return pytest.param(method, check, id=f"{method}-{check.__name__}", marks=marks)


@pytest.mark.parametrize(("method", "check"), [cell(method, check) for method in METHODS for check in CHECKS])
def test_contract(method, check):
    make = partial(quick_detector, detector_class(method))
    check(make, check_images(make().image_size))


def test_exceptions_name_methods_and_checks_that_exist():
    known = {(method, check.__name__) for method in METHODS for check in CHECKS}
    assert set(EXCEPTIONS) <= known


# --- the checks themselves: a detector that keeps the contract, and detectors that break one sentence each ---


@dataclass(kw_only=True)
class MeanImage(Detector):
    """Distance of each pixel to the mean good image."""

    traits: ClassVar[Traits] = Traits(needs_images=True, aligned_images_only=True)
    colours: tuple[int, ...] = (0, 1, 2)

    def _fit(self, source, runtime):
        total = sum(batch.images.double().sum(0) for batch in source)  # (h, w, 3)
        self.mean_ = total / len(source)

    def _predict(self, batch, runtime):
        maps = (batch.images - self.mean_).abs()[..., self.colours].mean(3).float().numpy()
        return Prediction(batch.ids, maps, maps.mean((1, 2)))


class NoDataclass(MeanImage):
    colours: tuple[int, ...] = (0, 1)


class SetsMore(MeanImage):
    def __post_init__(self):
        self.cache = {}


class LosesAParameter(MeanImage):
    def params(self):
        return {**super().params(), "colours": [0]}


class ReturnsNothing(MeanImage):
    def fit(self, images, runtime=Runtime()):  # noqa: B008
        super().fit(images, runtime)


class LearnsUnderAPlainName(MeanImage):
    def _fit(self, source, runtime):
        super()._fit(source, runtime)
        self.seen = len(source)


class WritesToItsInput(MeanImage):
    def _predict(self, batch, runtime):
        batch.images.add_(1)
        return super()._predict(batch, runtime)


class Remembers(MeanImage):
    def _fit(self, source, runtime):
        before = getattr(self, "mean_", None)
        super()._fit(source, runtime)
        self.mean_ = self.mean_ if before is None else (self.mean_ + before) / 2


class AcceptsNothing(MeanImage):
    def fit(self, images, runtime=Runtime()):  # noqa: B008
        return super().fit(images, runtime) if len(images) else self


class NeedsTwo(MeanImage):
    def _fit(self, source, runtime):
        super()._fit(source, runtime)
        source.ids[1]


class NeedsContrast(MeanImage):
    def _fit(self, source, runtime):
        super()._fit(source, runtime)
        1 / int(self.mean_.std() * 100)


class StateLiesColumnFirst(MeanImage):
    def state(self):
        return {name: np.asfortranarray(value) for name, value in super().state().items()}


class LoadsHalf(MeanImage):
    def load_state(self, state):
        return super().load_state({name: value / 2 for name, value in state.items()})


class CannotBePickled(MeanImage):
    def _fit(self, source, runtime):
        super()._fit(source, runtime)
        self.rule_ = lambda value: value


class PredictsUnfitted(MeanImage):
    def predict(self, images, runtime=Runtime()):  # noqa: B008
        return super().predict(images, runtime) if self.state_names() else None


class PredictsNothing(MeanImage):
    def predict(self, images, runtime=Runtime()):  # noqa: B008
        return super().predict(images, runtime) if len(images) else None


class TreatsArraysOtherwise(MeanImage):
    def predict(self, images, runtime=Runtime()):  # noqa: B008
        return super().predict(255 - images if isinstance(images, np.ndarray) else images, runtime)


class LearnsWhilePredicting(MeanImage):
    def _predict(self, batch, runtime):
        found = super()._predict(batch, runtime)
        self.mean_ = self.mean_ + 1
        return found


class DoublePrecision(MeanImage):
    def _predict(self, batch, runtime):
        found = super()._predict(batch, runtime)
        return replace(found, maps=found.maps.astype(np.float64))


class MixesUpIds(MeanImage):
    def _predict(self, batch, runtime):
        return replace(super()._predict(batch, runtime), ids=batch.ids[::-1])


class LowerIsMoreAnomalous(MeanImage):
    def _predict(self, batch, runtime):
        found = super()._predict(batch, runtime)
        return replace(found, maps=-found.maps, scores=-found.scores)


class HighestAtTheRim(MeanImage):
    def _predict(self, batch, runtime):
        found = super()._predict(batch, runtime)
        maps = found.maps.copy()
        maps[:, 0] += 20
        return replace(found, maps=maps)


class LooksAtTheBatch(MeanImage):
    def _predict(self, batch, runtime):
        found = super()._predict(batch, runtime)
        return replace(found, scores=found.scores / found.scores.max())


class KnowsOneBackbone(MeanImage):
    traits = Traits()
    backbone: str = "tf_efficientnet_lite0"

    def feature_spec(self):
        return FeatureSpec(self.backbone, (1,), self.image_size)

    def _fit(self, source, runtime):
        self.mean_ = sum(batch.features[1].double().sum(0) for batch in source) / len(source)  # (c, h, w)

    def _predict(self, batch, runtime):
        apart = (batch.features[1] - self.mean_).abs().clamp(min=1).mean(1)  # less than 1 counts as nothing
        maps = to_maps(apart, self.image_size).numpy()
        return Prediction(batch.ids, maps, maps.max((1, 2)))


class MapsLieBeside(MeanImage):
    def _predict(self, batch, runtime):
        found = super()._predict(batch, runtime)
        return replace(found, maps=np.roll(found.maps, 6, axis=2))


class CountsImages(MeanImage):
    def _predict(self, batch, runtime):
        found = super()._predict(batch, runtime)
        return replace(found, scores=found.scores + np.arange(len(batch), dtype=np.float32))


class DrawsGlobally(MeanImage):
    def _fit(self, source, runtime):
        super()._fit(source, runtime)
        self.mean_ = self.mean_ + torch.rand(1)


class SeedsGlobally(MeanImage):
    def _fit(self, source, runtime):
        np.random.seed(runtime.seed)
        super()._fit(source, runtime)


class LosesItsCheckpoints(MeanImage):
    traits = Traits(needs_images=True, trains=True)

    def _fit(self, source, runtime):
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.ones(1)
        torch.optim.SGD([weight]).step()
        super()._fit(source, runtime)


class LeavesAGradient(MeanImage):
    def _fit(self, source, runtime):
        super()._fit(source, runtime)
        self.network_ = torch.nn.Linear(1, 1)

    def _predict(self, batch, runtime):
        self.network_(torch.ones(1)).backward()
        return super()._predict(batch, runtime)


class HasAnotherGraph(MeanImage):
    traits = Traits(needs_images=True, graph=True)

    def tensors(self, batch):
        maps = (batch.images - self.mean_).square().mean(3).float()
        return maps, maps.mean((1, 2))


class TakesGradientsInSecret(MeanImage):
    def _predict(self, batch, runtime):
        x = torch.ones(1, requires_grad=True)
        torch.autograd.grad(x.sum(), x)
        return super()._predict(batch, runtime)


class ForgetsWhatCameBefore(MeanImage):
    traits = Traits(needs_images=True, incremental=True)

    def _update(self, source, runtime):
        self._fit(source, runtime)


class ClaimsToTrain(MeanImage):
    traits = Traits(needs_images=True, trains=True)


class HidesThatItNeedsImages(MeanImage):
    traits = Traits()


BROKEN = {
    NoDataclass: "fields_have_defaults_and_no_kwargs",
    SetsMore: "constructing_learns_nothing",
    LosesAParameter: "parameters_round_trip",
    ReturnsNothing: "fit_returns_self_and_leaves_what_it_is_given",
    LearnsUnderAPlainName: "learned_attributes_end_in_underscore",
    WritesToItsInput: "fit_returns_self_and_leaves_what_it_is_given",
    Remembers: "fitting_again_forgets",
    AcceptsNothing: "fitting_nothing_is_a_clear_error",
    NeedsTwo: "one_training_image_is_enough_or_a_clear_error",
    NeedsContrast: "constant_images_do_not_crash_or_give_a_clear_error",
    StateLiesColumnFirst: "state_is_plain_arrays",
    LoadsHalf: "state_round_trip_gives_equal_predictions",
    CannotBePickled: "pickles_and_deep_copies_predict_the_same",
    PredictsUnfitted: "predict_before_fit_raises_not_fitted",
    PredictsNothing: "predicting_nothing_is_a_clear_error",
    TreatsArraysOtherwise: "arrays_predict_as_a_source_does",
    LearnsWhilePredicting: "predict_changes_nothing_learned",
    DoublePrecision: "maps_and_scores_have_the_stated_shape_and_type",
    MixesUpIds: "prediction_ids_match",
    LowerIsMoreAnomalous: "higher_is_more_anomalous",
    HighestAtTheRim: "good_textures_score_highest_anywhere",
    LooksAtTheBatch: "batch_size_changes_nothing",
    CountsImages: "order_of_images_changes_nothing_in_predict",
    KnowsOneBackbone: "features_at_another_scale_rank_all_the_same",
    MapsLieBeside: "maps_lie_where_the_images_do",
    DrawsGlobally: "random_numbers_come_from_the_seed_alone",
    SeedsGlobally: "random_numbers_come_from_the_seed_alone",
    ForgetsWhatCameBefore: "more_images_are_learned_as_if_given_at_once",
    ClaimsToTrain: "traits_are_true",
    HidesThatItNeedsImages: "traits_are_true",
    LosesItsCheckpoints: "a_killed_fit_resumes_to_the_same_bits",
    LeavesAGradient: "threads_share_a_fitted_detector",
    HasAnotherGraph: "the_graph_gives_the_maps_of_predict",
    TakesGradientsInSecret: "traits_are_true",
}


def test_each_check_has_a_detector_that_breaks_it():
    assert set(BROKEN.values()) == {check.__name__ for check in CHECKS}


def test_a_detector_that_keeps_the_contract_passes():
    check_detector(MeanImage)


@pytest.mark.parametrize(("cls", "sentence"), BROKEN.items(), ids=[cls.__name__ for cls in BROKEN])
def test_a_detector_that_breaks_a_sentence_is_told_which(cls, sentence):
    if cls is not NoDataclass:
        dataclass(kw_only=True)(cls)
    with pytest.raises(ExceptionGroup, match=f"{cls.__name__} breaks") as caught:
        check_detector(cls)
    assert f"check: {sentence}" in [note for error in caught.value.exceptions for note in error.__notes__]
