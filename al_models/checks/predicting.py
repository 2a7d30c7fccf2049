"""What predict gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from scipy.stats import binom

from al_models.checks.harness import (
    Check,
    CheckImages,
    Make,
    assert_close,
    assert_same,
    assert_stated,
    brief,
    fitted_on,
    predicted,
    source_of,
    textures,
)
from al_models.graph import Graph
from al_models.parts.frame import RIM, peaks_at_rim
from al_models.types import Prediction

TEXTURES = 24
"""Good images whose highest places are looked at."""


def maps_and_scores_have_the_stated_shape_and_type(make: Make, images: CheckImages) -> None:
    """Maps are float32 (n, size, size), scores float32 (n,), all finite and within float16's range."""
    assert_stated(fitted_on(make, images), images.test)


def prediction_ids_match(make: Make, images: CheckImages) -> None:
    """Each prediction carries the id of its image, in the order given, over batches."""
    fitted = fitted_on(make, images)
    source = source_of(fitted, images.test, batch_size=2)
    found = fitted.predict(source).ids
    assert found == source.ids, f"predicted for {found}, given {source.ids}"


def arrays_predict_as_a_source_does(make: Make, images: CheckImages) -> None:
    """Plain arrays give what a source gives, up to the half precision that features are stored in."""
    fitted = fitted_on(make, images)
    found = fitted.predict(images.test)
    assert len(found.ids) == len(images.test), f"{len(images.test)} images gave {len(found.ids)} predictions"
    assert_close(predicted(fitted, images.test), found, "for arrays instead of a source", tolerance=0.02)


def higher_is_more_anomalous(make: Make, images: CheckImages) -> None:
    """A pasted square of noise stands out in the map, and in the score over the median good image."""
    fitted = fitted_on(make, images)
    good, bad = predicted(fitted, images.good), predicted(fitted, images.anomalous)
    for row, (values, mask, score) in enumerate(zip(bad.maps, images.masks, bad.scores, strict=True)):
        inside, outside = float(values[mask].mean()), float(values[~mask].mean())
        assert inside > outside, f"anomalous image {row}: {inside:.4g} on the defect, {outside:.4g} elsewhere"
        median = float(np.median(good.scores))
        assert score > median, f"anomalous image {row} scores {score:.4g}, the median good image {median:.4g}"


def good_textures_score_highest_anywhere(make: Make, images: CheckImages) -> None:
    """The maxima of good textures lie at the rim no more often than chance lets twice its share of the area bring."""
    fitted = fitted_on(make, images)
    good = textures(TEXTURES, fitted.image_size, np.random.default_rng(1))
    peaks, area = peaks_at_rim(predicted(fitted, good).maps).sum(), 1 - (1 - 2 * RIM) ** 2
    most = binom.ppf(0.99, TEXTURES, 2 * area)
    assert peaks <= most, f"{peaks} of {TEXTURES} good images have their maximum at the rim; {most:.0f} are allowed"


def batch_size_changes_nothing(make: Make, images: CheckImages) -> None:
    """Images read one by one, or all at once, give the same in fit and in predict, up to rounding."""
    make = brief(make)
    whole, single = fitted_on(make, images), make()
    single.fit(source_of(single, images.train, batch_size=1))
    expected = predicted(whole, images.test)
    assert_close(expected, whole.predict(source_of(whole, images.test, batch_size=1)), "predicted one by one")
    if whole.traits.deterministic:
        assert_close(expected, predicted(single, images.test), "fitted one by one")


def order_of_images_changes_nothing_in_predict(make: Make, images: CheckImages) -> None:
    """An image's prediction does not depend on its neighbours."""
    fitted = fitted_on(make, images)
    forwards, backwards = predicted(fitted, images.test), predicted(fitted, images.test[::-1])
    turned = Prediction(backwards.ids[::-1], backwards.maps[::-1], backwards.scores[::-1])
    assert_close(forwards, turned, "in reverse order")


def threads_share_a_fitted_detector(make: Make, images: CheckImages) -> None:
    """Two threads that judge with one detector get what each would get alone; no gradient is left on its weights."""
    shared = fitted_on(make, images)
    alone = [predicted(shared, part) for part in (images.good, images.anomalous)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(partial(predicted, shared), (images.good, images.anomalous)))
    for one, other in zip(alone, found, strict=True):
        assert_same(one, other, "beside another thread")
    weights = getattr(shared, "network_", torch.nn.Module()).named_parameters()
    written = [name for name, weight in weights if weight.grad is not None]
    assert not written, f"predicting left gradients on {written}; use torch.autograd.grad, which writes to nothing"


def the_graph_gives_the_maps_of_predict(make: Make, images: CheckImages) -> None:
    """A detector with the trait `graph` is one module from images to maps and scores; another says why it is none."""
    fitted = fitted_on(make, images)
    if not fitted.traits.graph:
        assert fitted.no_graph(), "no trait `graph`, and no reason why"
        return
    expected = predicted(fitted, images.test)
    with torch.no_grad():
        maps, scores, _ = Graph(fitted, expected.scores)(torch.from_numpy(images.test))
    assert_close(expected, Prediction(expected.ids, maps.numpy(), scores.numpy()), "as a graph")


CHECKS: list[Check] = [
    maps_and_scores_have_the_stated_shape_and_type,
    prediction_ids_match,
    arrays_predict_as_a_source_does,
    higher_is_more_anomalous,
    good_textures_score_highest_anywhere,
    batch_size_changes_nothing,
    order_of_images_changes_nothing_in_predict,
    threads_share_a_fitted_detector,
    the_graph_gives_the_maps_of_predict,
]
