"""Where images lie in a folder, said in patterns: the vocabulary of `layout.toml` (see `storage.datasets.folder`)."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from storage.errors import DatasetError, OutsideRoot
from storage.listing import unknown
from storage.masks import RULES
from storage.readers import check_draw, check_option
from storage.samples import Label, Split
from storage.text import read_text


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where in a folder which images lie: the keys of layout.toml. Patterns are one text or a list of texts."""

    train: tuple[str, ...]
    """Good images to learn from; the only key that must be there."""
    validation: tuple[str, ...] = ()
    """Good images to calibrate on."""
    test_good: tuple[str, ...] = ()
    """Good images to judge."""
    test: tuple[str, ...] = ()
    """Anomalous images; good ones where {defect_type} reads `good`, or the mask says so."""
    inspect: tuple[str, ...] = ()
    """Images to judge of which nothing is known."""
    mask: tuple[str, ...] = ()
    """Where an image's mask lies: the first of these that exists."""
    mask_rule: str = "auto"
    """What in it counts as anomalous (`storage.masks`); a COCO file is asked for the image's path, or for what
    `coco:{name}` says."""
    good: tuple[str, ...] | None = None
    """Words for {defect_type} that mean good images beside `good`. When left out, images of a kind that may mean so
    (ok, normal, 0) are unknown."""
    links_to: tuple[str, ...] = ()
    """Folders outside of the root that links in it may lead to."""
    category: str | None = None
    """Name of the product where no pattern has {category}; otherwise the root's."""
    good_by_mask: bool = False
    """An image of train, validation or test is good if its mask is empty."""
    good_without_mask: bool = False
    """An image of train, validation or test is good if it has no mask."""
    test_share: float = 0.0
    """Share of the good parts (images, where no {part} is named) of train to be judged instead, without test_good."""
    seed: int = 0
    """Seed of the draw; another seed draws others."""


ROLES: dict[str, tuple[Split, Label]] = {
    "train": ("train", "good"),
    "validation": ("validation", "good"),
    "test_good": ("test", "good"),
    "test": ("test", "anomalous"),
    "inspect": ("test", "unknown"),
}
_NAMES = ("category", "defect_type", "part", "id")
_NAMES_OF_FILE = ("parent", "stem", "suffix", "name")


def read_toml(file: Path) -> dict[str, Any]:
    """The keys and values of a layout file. Raises DatasetError for one that cannot be read."""
    try:
        return tomllib.loads(read_text(file))
    except OSError as error:
        raise DatasetError(f"layout {str(file)!r} cannot be read ({error}); give the path of a TOML file") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file} is no TOML file: {error}") from error


def checked_layout(table: Mapping[str, Any]) -> Layout:
    """The layout of these keys and values. Raises DatasetError or OutsideRoot for what makes no sense."""
    known = {f.name: f.default for f in fields(Layout)}
    for key in table:
        if key not in known:
            raise unknown("key of a layout", key, known)
    if not table.get("train"):
        raise DatasetError("a layout needs the key train: where the good images to learn from lie, such as good/*.png")
    layout = Layout(**{key: _value(key, value, known[key]) for key, value in table.items()})
    check_draw("test_share", layout.test_share, layout.seed, zero=True)
    if layout.test_share and layout.test_good:
        raise DatasetError("test_share draws the good images to judge, and test_good names them; leave one of them out")
    if (layout.good_by_mask or layout.good_without_mask) and not layout.mask:
        raise DatasetError("good_by_mask and good_without_mask need the key mask: where an image's mask lies")
    check_name(layout.category)
    _check_names(layout)
    rule = layout.mask_rule.partition(":")[0]
    check_mask_rule(rule)
    if rule not in ("labelme", "coco") and any(path.lower().endswith(".json") for path in layout.mask):
        raise DatasetError(f"the mask is a JSON file, but mask_rule is {layout.mask_rule}; say labelme or coco")
    return layout


def check_name(category: Any) -> None:
    """Raises DatasetError for what cannot be the name of a category."""
    allowed = category is None or (isinstance(category, str) and re.fullmatch(r"[^/\\]+", category) is not None)
    check_option("category", category, allowed, "a name without slashes")


def texts_of(key: str, value: Any) -> tuple[str, ...]:
    """A text, a number, or several texts, as texts. Raises DatasetError for anything else."""
    texts = value if isinstance(value, list | tuple) else [str(value) if type(value) is int else value]
    allowed = all(isinstance(text, str) and text for text in texts)
    check_option(key, value, allowed, "a name such as 'ok', or a list of names")
    return tuple(map(str, texts))


def check_mask_rule(rule: str) -> None:
    """Raises DatasetError, with the nearest names, for a rule that `storage.masks` does not know."""
    known = [name.partition(":")[0] for name in RULES]
    if rule.partition(":")[0] not in known:
        raise unknown("mask_rule", rule.partition(":")[0], known)


def _value(key: str, value: Any, default: Any) -> Any:
    """A value in the type of its key."""
    if key in ("good", "links_to"):
        return texts_of(key, value)
    if key in ROLES or key == "mask":
        texts = [value] if isinstance(value, str) else value
        allowed = isinstance(texts, list | tuple) and all(isinstance(text, str) and text for text in texts)
        check_option(key, value, allowed, "a text such as 'good/*.png', or a list of texts")
        return tuple(_within(key, text) for text in texts)
    kind: tuple[type, ...] = {bool: (bool,), float: (float, int), int: (int,)}.get(type(default), (str,))
    check_option(key, value, type(value) in kind, " or ".join(k.__name__ for k in kind))
    return value


def _within(key: str, text: str) -> str:
    """The pattern, if it does not lead out of the root."""
    if "\\" in text:
        raise DatasetError(f"{key} {text!r} has a backslash; write / between folders")
    if text.startswith("/") or re.match("[A-Za-z]:", text) or (".." in text.split("/") and key != "mask"):
        raise OutsideRoot(f"{key} {text!r} leaves the root; a pattern begins with a folder in the root")
    return text.removeprefix("./")


def _check_names(layout: Layout) -> None:
    """Every name in a mask's path is known of every image that needs a mask; the category, of all images or none."""
    patterns = {
        role: [(text, pattern_regex(role, text).groupindex) for text in getattr(layout, role)] for role in ROLES
    }
    with_category = {text: "category" in names for role in ROLES for text, names in patterns[role]}
    if layout.category is not None and any(with_category.values()):
        raise DatasetError(f"category is {layout.category!r}, but a pattern has {{category}}, too; leave one out")
    if len(set(with_category.values())) > 1:
        without = [text for text, has in with_category.items() if not has]
        raise DatasetError(f"{without[0]!r} lacks {{category}}, which other patterns have; put it into all or none")
    for text in (*layout.mask, layout.mask_rule):
        for name in placeholders("mask", text):
            if name not in _NAMES + _NAMES_OF_FILE:
                raise unknown("name in a mask's path", name, _NAMES + _NAMES_OF_FILE)
            for role in masked_roles(layout):
                for pattern, names in patterns[role]:
                    if name not in (*names, *_NAMES_OF_FILE, "category"):
                        raise DatasetError(f"{text!r} needs {{{name}}}, which {role} {pattern!r} does not have")


def masked_roles(layout: Layout) -> tuple[str, ...]:
    """The patterns whose images need their masks."""
    by_mask = layout.good_by_mask or layout.good_without_mask
    return ("train", "validation", "test") if by_mask else ("test",)


def placeholders(key: str, text: str) -> list[str]:
    """The names in braces. Raises DatasetError for a brace without its other half."""
    if re.search(r"[{}]", re.sub(r"\{\w*\}", "", text)):
        raise DatasetError(f"{key} {text!r} has a brace without its other half, or an odd name in braces")
    return re.findall(r"\{(\w*)\}", text)


def pattern_regex(role: str, pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression for paths relative to the root."""
    for name in placeholders(role, pattern):
        if name not in _NAMES:
            raise unknown(f"name in {role} {pattern!r}:", name, _NAMES)
    parts = pattern.split("/")
    texts, seen = "", set[str]()
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            texts += ".+" if last else "(?:[^/]+/)*"
            continue
        for token in re.split(r"(\*|\?|\{\w+\})", part):
            name = token.strip("{}")
            if token.startswith("{"):
                texts += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"
                seen.add(name)
            else:
                texts += {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
        texts += "" if last else "/"
    return re.compile(texts, re.DOTALL)
