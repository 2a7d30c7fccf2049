"""The losses of a training: on the page, as a picture, and from the fit to the record."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from al_models.checks import check_images
from al_models.generative.fastflow import Fastflow
from storage.records import RunRecord
from tasks.fit import _LOOKS, _losses
from tasks.report.benchmark.training import loss_picture, losses_of
from tasks.report.page import environment


def record(*losses):
    return RunRecord("d", "c", "m", {}, 0, "cell", "done", losses=[list(look) for look in losses])


def test_a_fit_tells_its_losses_in_plain_numbers():
    detector = Fastflow(**{"image_size": 128, **Fastflow.quick, "epochs": 3, "batch_size": 6})
    assert _losses(detector) == []
    found = _losses(detector.fit(check_images(128).train))
    assert [step for step, _, _ in found] == [1, 2, 3]
    assert all(isinstance(loss, float) and held is None for _, loss, held in found)


def test_a_fit_tells_the_losses_of_its_turns():
    detector = Fastflow()
    detector.curve_ = np.float32([[5, 4, np.nan], [10, 3, np.nan]])
    detector.critic_losses_, detector.encoder_losses_ = np.float32([1, np.nan]), np.float32([3, 2])
    assert list(detector.turn_losses()) == ["critic", "encoder"]
    assert _losses(detector) == [[5, 4.0, None, 1.0, 3.0], [10, 3.0, None, None, 2.0]]


@pytest.mark.parametrize("looks", [1, _LOOKS, _LOOKS + 1, 5 * _LOOKS + 3])
def test_a_long_training_is_told_in_few_points_with_its_last(looks):
    detector = Fastflow()
    detector.curve_ = np.array([[step, 1 / step, 2 / step] for step in range(1, looks + 1)], np.float32)
    found = _losses(detector)
    assert min(looks, _LOOKS // 2) <= len(found) <= _LOOKS + 1
    assert (found[0][0], found[-1][0]) == (1, looks)


def test_nothing_is_drawn_where_nothing_was_trained():
    assert losses_of(record()) is None


def test_the_chart_has_a_line_for_what_was_learned_and_one_for_what_was_held_out():
    chart = environment().from_string("{% import 'charts.html.j2' as charts %}{{ charts.losses(t) }}")
    both = chart.render(t=losses_of(record((5, 4.0, 5.0), (10, 2.0, 3.0))))
    assert both.count("<path") == 2
    assert "training, from 4 to 2; held out, from 5 to 3" in both
    alone = chart.render(t=losses_of(record((5, 4.0, None), (10, 4.0, None))))
    assert alone.count("<path") == 1


def test_turns_have_lines_of_their_own_where_they_take_part():
    """A generator and its discriminator, then an encoder."""
    looks = [(5, 4.0, None, 3.0, 1.0, None), (10, 3.0, None, 2.0, 1.0, None), (15, 7.0, None, None, None, 7.0)]
    told = replace(record(*looks), turns=["generator", "discriminator", "encoder"])
    losses = losses_of(told)
    assert {name: len(points) for name, points in losses.lines.items()} == {
        "training": 3,
        "generator": 2,
        "discriminator": 2,
        "encoder": 1,
    }
    assert losses.lines["encoder"] == [(15.0, 7.0)]
    assert len({losses.colour(name) for name in losses.lines}) == 4
    chart = environment().from_string("{% import 'charts.html.j2' as charts %}{{ charts.losses(t) }}")
    assert len(set(re.findall(r'class="line (turn\d)"', chart.render(t=losses)))) == 4
    assert loss_picture(losses).size == (480, 220)


@pytest.mark.parametrize("scale", [1e-7, 0.1, 1.0, 1e6])
def test_labels_of_the_loss_fit_beside_their_axis(scale):
    chart = environment().from_string("{% import 'charts.html.j2' as charts %}{{ charts.losses(t) }}")
    page = chart.render(t=losses_of(record((5, 7.5034 * scale, None), (10, -4.5341 * scale, None))))
    labels = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', page)
    assert len(labels) == 3
    assert max(len(label) for label in labels) <= 7
    (named,) = re.findall(r">loss(?:, in ([^<]*))?<", page)
    assert float(labels[2]) * float(named or 1) == pytest.approx(7.5034 * scale, rel=1e-3)


@pytest.mark.parametrize("losses", [[(5, 4.0, None)], [(5, 4.0, 5.0), (10, 1.0, 2.0)]])
def test_the_picture_shows_the_lines(losses):
    pixels = np.asarray(loss_picture(losses_of(record(*losses))))
    assert (pixels == (31, 95, 191)).all(2)[30:].any()
    assert (pixels == (192, 57, 43)).all(2)[30:].any() == (losses[0][2] is not None)
