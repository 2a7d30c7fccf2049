"""How a training went: its losses as a chart for the page, and as a picture for the Prefect UI."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

from storage.records import RunRecord

_COLOURS = ((31, 95, 191), (192, 57, 43), (47, 125, 80), (150, 90, 180), (200, 130, 20))
"""Of the lines in turn: training, held out, and each turn of the training."""
_WIDTH, _HEIGHT, _LEFT, _MARGIN = 480, 220, 64, 24


@dataclass(frozen=True)
class Losses:
    """The lines of one training and the frame they fit in."""

    lines: dict[str, list[tuple[float, float]]]
    """`training`, where images were held out `held out`, and each turn of several: (step, loss)."""
    steps: float
    low: float
    high: float

    def place(self, name: str) -> int:
        """Which of the colours a line has; that of held-out images is kept free where there are none."""
        names = ["training", "held out", *(name for name in self.lines if name not in ("training", "held out"))]
        return names.index(name) % len(_COLOURS)

    def colour(self, name: str) -> tuple[int, int, int]:
        """Red, green and blue of a line."""
        return _COLOURS[self.place(name)]

    @property
    def unit(self) -> float:
        """A power of ten in which the losses are short numbers: 1 where they are as they stand."""
        largest = max(abs(self.low), abs(self.high))
        return 1.0 if 0.01 <= largest < 10_000 else 10.0 ** math.floor(math.log10(largest))


def losses_of(record: RunRecord) -> Losses | None:
    """The lines of a cell's training; None where nothing was trained."""
    lines = {
        name: [(float(look[0] or 0), value) for look in record.losses if (value := look[place]) is not None]
        for place, name in enumerate(("training", "held out", *record.turns), start=1)
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    values = [value for points in lines.values() for _, value in points]
    low, high = min(values), max(values)
    return Losses(lines, max(x for points in lines.values() for x, _ in points), low, high if high > low else low + 1)


def loss_picture(losses: Losses) -> Image.Image:
    """The lines, their highest and lowest loss and the last step."""
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    inner = _WIDTH - _LEFT - _MARGIN, _HEIGHT - 2 * _MARGIN
    draw.rectangle([_LEFT, _MARGIN, _LEFT + inner[0], _MARGIN + inner[1]], outline=(200, 200, 200))
    draw.text((4, _MARGIN - 5), f"{losses.high:.4g}", fill="black")
    draw.text((4, _MARGIN + inner[1] - 6), f"{losses.low:.4g}", fill="black")
    draw.text((_LEFT + inner[0] - 60, _HEIGHT - 16), f"step {losses.steps:.0f}", fill="black")
    for row, (name, points) in enumerate(losses.lines.items()):
        colour = losses.colour(name)
        draw.text((_LEFT + 6 + 90 * row, 6), name, fill=colour)
        places = [
            (
                _LEFT + inner[0] * step / losses.steps,
                _MARGIN + inner[1] * (losses.high - loss) / (losses.high - losses.low),
            )
            for step, loss in points
        ]
        if len(places) > 1:
            draw.line(places, fill=colour, width=2)
        else:
            draw.ellipse([places[0][0] - 2, places[0][1] - 2, places[0][0] + 2, places[0][1] + 2], fill=colour)
    return picture
