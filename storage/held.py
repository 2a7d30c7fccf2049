"""New images that a night rejected as good, and what people said of them: one JSON file an image and model.

held/<data set>/<category>/<id>.json      `HeldImage`; a night writes it once, a person's word is added to it
held/<data set>/<category>/<id>.jpg       the image and, beside it, the map of what speaks against it
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Literal, get_args

from storage.errors import Damaged, StorageError
from storage.store import Store

Word = Literal["released", "refused"]
"""Released: it is good, and learned. Refused: it is never learned, and not asked about again."""
_ROOT = "held"
_WORDS: tuple[Word, ...] = get_args(Word)
_NAMED = 8
"""Images that a message names, at most."""


class NotHeld(StorageError, ValueError):
    """A name that means no held image, or more than one."""


@dataclass(frozen=True)
class Said:
    """A person's word on an image."""

    word: Word
    who: str
    when: str
    """UTC time, ISO 8601."""


@dataclass(frozen=True)
class HeldImage:
    """An image that was delivered as good, and rejected or in doubtful company."""

    model: str
    """`data set/category`."""
    id: str
    """Content name."""
    path: str
    """Path of the file below the folder, with its box where the image is a part of it."""
    folder: str
    """Root of the data set."""
    since: str
    """When it was rejected: UTC time, ISO 8601."""
    score: float
    limit: float
    """The score above which an image is rejected."""
    version: int | None = None
    """The version that rejected it; None: it was compared with the other images, in robust deviations."""
    many: bool = False
    """Whether it came with more rejected images than chance lets a threshold's promise produce: then all that came are
    held, also those that are not rejected."""
    said: list[Said] = field(default_factory=list)
    """The words that persons said, of which the last counts."""

    @property
    def state(self) -> Literal["held", "released", "refused"]:
        """The last word said of it, or `held`."""
        return self.said[-1].word if self.said else "held"

    @property
    def why(self) -> str:
        """The reason why it is held, in a few words."""
        if self.version is None:
            return (
                f"{self.score:.1f} robust deviations more unlike the others than usual, up to {self.limit:g} expected"
            )
        threshold = f"the threshold {self.limit:.4g} of version {self.version}"
        if self.score > self.limit:
            return f"score {self.score:.4g}, above {threshold}"
        return f"score {self.score:.4g}, not above {threshold}, but it came with too many that are"


def write_held(store: Store, image: HeldImage, picture: bytes | None = None) -> None:
    """Keep a held image's facts, with a JPEG of it where there is one."""
    if picture is not None:
        store.write_bytes(_key(image, "jpg"), picture)
    store.write_json(_key(image, "json"), asdict(image))


def picture_of(store: Store, image: HeldImage) -> bytes | None:
    """The JPEG of a held image; None where there is none, or not any more."""
    try:
        return store.read_bytes(_key(image, "jpg"))
    except (StorageError, OSError):
        return None


def read_held(store: Store, model: str | None = None) -> list[HeldImage]:
    """The held images of a model, or of all models, the oldest first. Raises Damaged for a file that is none."""
    keys = store.list(_ROOT if model is None else f"{_ROOT}/{model}")
    images = [_read(store, key) for key in keys if key.endswith(".json")]
    return sorted(images, key=lambda one: (one.model, one.since, one.path))


def _read(store: Store, key: str) -> HeldImage:
    known, values = {f.name for f in fields(HeldImage)}, store.read_json(key)
    try:
        said = [Said(**one) for one in values["said"]]
        if any(one.word not in _WORDS for one in said):
            raise ValueError(f"a word other than {' and '.join(_WORDS)}")
        return HeldImage(**{name: value for name, value in values.items() if name in known} | {"said": said})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"{key} is no held image ({error}); delete the file, and the image is asked about again"
        ) from error


def say(store: Store, images: Iterable[HeldImage], word: Word, who: str) -> list[HeldImage]:
    """Add a person's word to each image; the images with it."""
    now, done = datetime.now(UTC).isoformat(timespec="seconds"), []
    for image in images:
        if image.state != word:  # to say it twice says nothing new
            image = replace(image, said=[*image.said, Said(word, who, now)])
            write_held(store, image)
        done.append(image)
    return done


def meant(images: Sequence[HeldImage], names: Sequence[str]) -> list[HeldImage]:
    """The image that each name means: a file's name, a path or its end, or the beginning of a content name; a pattern
    (`*.png`) means all that match it of those that nobody has decided about.

    Raises NotHeld for a name that means none, images of two models, or several of one.
    """
    named = [one for name in names for one in (_matching(images, name) if "*" in name else [_the_one(images, name)])]
    return list({(one.model, one.id): one for one in named}.values())


def _matching(images: Sequence[HeldImage], pattern: str) -> list[HeldImage]:
    matching = [one for one in images if one.state == "held" and fnmatchcase(f"/{one.path}", f"*/{pattern}")]
    models = sorted({one.model for one in matching})
    if len(models) > 1:
        raise NotHeld(f"images of {' and '.join(models)} match {pattern!r}; say which with --model {models[0]}")
    if not matching:
        raise NotHeld(f"no held image matches {pattern!r}; {_listed(images)}")
    return matching


def _the_one(images: Sequence[HeldImage], name: str) -> HeldImage:
    matching = [one for one in images if _is_meant(one, name)]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise NotHeld(f"no image {name!r} is held; {_listed(images)}")
    models = sorted({one.model for one in matching})
    if len(models) > 1:
        raise NotHeld(f"images named {name!r} are held for {' and '.join(models)}; say which with --model {models[0]}")
    several = ", ".join(f"{one.path} ({one.id[:12]})" for one in matching[:_NAMED])
    raise NotHeld(
        f"{name!r} means {len(matching)} images held for {models[0]}: {several}; give more of the path, or the id"
    )


def _is_meant(image: HeldImage, name: str) -> bool:
    whole = f"{image.folder.rstrip('/')}/{image.path}"
    given = name.replace("\\", "/").removeprefix("./")
    return whole == given or whole.endswith(f"/{given}") or (len(given) >= 8 and image.id.startswith(given))


def _listed(images: Sequence[HeldImage]) -> str:
    names = [one.path for one in images if one.state == "held"] or [one.path for one in images]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"those that are: {', '.join(names[:_NAMED])}{more}" if names else "none is"


def _key(image: HeldImage, ending: str) -> str:
    return f"{_ROOT}/{image.model}/{image.id}.{ending}"
