"""Small pictures of prepared images, inside the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

from storage.errors import StorageError
from storage.stacks import Stack
from storage.store import Store
from tasks.core.heat import OUTLINE, data_url

_QUALITY = 72


class Thumbnails:
    """Pictures of a category's prepared images, which are the squares that the methods see."""

    def __init__(self, store: Store, images: str, keys: Sequence[str], without: Iterable[str] = ()) -> None:
        """`keys`: of the samples, in the order of the images; `without`: those whose file could not be read."""
        nothing = set(without)
        self._rows = {key: row for row, key in enumerate(keys) if key not in nothing}
        self._images, self.missing = _open(store, images)
        """Why there are no pictures at all, or None."""

    def of(self, key: str, side: int, mark: tuple[float, float] | None = None) -> str | None:
        """The image as a data URI, `side` pixels at most; None where there is none.

        `mark`: centre of a ring around what is pointed out, as fractions of the width and the height.
        """
        if self._images is None or key not in self._rows:
            return None
        try:
            pixels = self._images.read([self._rows[key]])[0]  # (h, w, c)
        # zarr's codecs raise RuntimeError for bytes that do not decompress
        except (StorageError, OSError, LookupError, ValueError, RuntimeError) as error:
            self.missing = f"the stored images could not be read ({error})"
            return None
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        return data_url(picture if mark is None else _ringed(picture, mark), _QUALITY)


def _open(store: Store, images: str) -> tuple[Stack | None, str | None]:
    try:
        return Stack.open(store, store.get(images), "images"), None
    except (StorageError, OSError, ValueError, RuntimeError) as error:
        return None, f"the prepared images are not there ({error})"


def _ringed(picture: Image.Image, mark: tuple[float, float]) -> Image.Image:
    """A bright ring on a dark one, so that it stands out on any ground."""
    ringed = picture.convert("RGB")
    x, y, radius = mark[0] * picture.width, mark[1] * picture.height, max(6.0, 0.1 * max(picture.size))
    draw = ImageDraw.Draw(ringed)
    for grown, colour, width in ((2, (0, 0, 0), 5), (1, OUTLINE, 2)):
        box = (x - radius - grown, y - radius - grown, x + radius + grown, y + radius + grown)
        draw.ellipse(box, outline=colour, width=width)
    return ringed
