"""What can go wrong in the mathematics: each error says what was given, what was expected and how to fix it.

Every error takes one message, so that it pickles and crosses a process border whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModelsError(Exception):
    """Anything `al_models` refuses."""


class UnknownName(ModelsError, KeyError):
    """A method, backbone or option that does not exist; the message lists the nearest names that do."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0])


class InvalidInput(ModelsError, ValueError):
    """Images, features or parameters a detector cannot work with."""


class NotFitted(ModelsError, RuntimeError):
    """`predict` or `state` before `fit` or `load_state`."""


class ExportFailed(ModelsError, RuntimeError):
    """A model that cannot be written in another format, or whose file does not compute what the model does."""


class MissingPackage(ModelsError, ImportError):
    """An optional dependency that is not installed."""


class WeightsUnavailable(ModelsError, OSError):
    """Pretrained weights that are neither on this machine nor reachable."""


def unknown(kind: str, given: object, known: Iterable[str]) -> UnknownName:
    """An `UnknownName` that names the nearest known names, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return UnknownName(f"unknown {kind} {given!r}; {hint}")
