"""The morning page: what last night decided about each model and why, and how the nights before went.

It shows every model of the store, whichever run its night was part of: runs that share a report's folder write the same
page, and none takes the others' models off it.
"""

from __future__ import annotations

import base64
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from storage.errors import Damaged
from storage.held import HeldImage, picture_of, read_held
from storage.nights import Decision, decision_keys, read_decision
from storage.store import Store
from storage.whole import write_whole
from tasks.compare.tables import DECIDING, METRICS
from tasks.report.nights.trends import Trend, trends_of
from tasks.report.page import environment

PAGE = "nights.html"
_MOST, _FEWEST = 60, 7
"""Latest nights of a model that the page shows."""
_PICTURES = 60
"""Held images of a model that are shown, some 15 kB each; the others are named."""
_IN_ALL = 600
"""Nights on the page, from which on each model has fewer: reading and drawing one takes about a millisecond."""


@dataclass(frozen=True)
class Held:
    """An image that waits for a person's word."""

    image: HeldImage
    picture: str | None
    """The image and its map for an `src`; None where there is none, or where the page has enough."""

    @property
    def command(self) -> str:
        """The words that follow `al nights release` and `al nights refuse`."""
        return f"{shlex.quote(self.image.path)} --model {shlex.quote(self.image.model)}"


@dataclass(frozen=True)
class Model:
    """A model's nights, the latest first."""

    name: str
    nights: list[Decision]
    held: list[Held] = field(default_factory=list)
    """Images that wait for a person's word."""

    @property
    def last(self) -> Decision:
        """Last night."""
        return self.nights[0]

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """(metric, its name for people) that any of the nights has."""
        return [(m, METRICS.get(m, m)) for m in DECIDING if any(m in night.metrics for night in self.nights)]

    @cached_property
    def trends(self) -> list[Trend]:
        """The charts of its nights."""
        return trends_of(self.nights[::-1], self.metrics)


def nights_report(store_url: str, folder: str) -> str:
    """Write the page about all models that the store has decisions on, those of the latest night first; its path.

    A file that is no decision becomes a sentence: it must not cost the others their page.
    """
    store, models, damaged = Store(store_url), list[Model](), list[str]()
    keys = decision_keys(store)
    most = max(_FEWEST, min(_MOST, _IN_ALL // max(1, len(keys))))
    for name, its in keys.items():
        nights = []
        for key in its[: -most - 1 : -1]:
            try:
                nights.append(read_decision(store, key))
            except Damaged as error:
                damaged.append(str(error))
        if nights:
            models.append(Model(name, nights, _held(store, name, nights[0], damaged)))
    models.sort(key=lambda model: model.last.night, reverse=True)  # of one night, by name
    page = Path(folder).resolve() / PAGE
    write_whole(page, environment().get_template("nights/nights.html.j2").render(models=models, damaged=damaged))
    return str(page)


def _held(store: Store, name: str, last: Decision, damaged: list[str]) -> list[Held]:
    """The images that last night held and nobody has decided about since."""
    try:
        images = [image for image in read_held(store, name) if image.id in last.held and image.state == "held"]
    except Damaged as error:
        damaged.append(str(error))
        return []
    return [Held(image, _url(store, image) if n < _PICTURES else None) for n, image in enumerate(images)]


def _url(store: Store, image: HeldImage) -> str | None:
    data = picture_of(store, image)
    return data and "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
