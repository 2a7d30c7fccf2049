"""What every step shares: names that change with what matters and with nothing else, work done once, and retries."""

from __future__ import annotations

import errno
import importlib
import json
import mmap
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from al_models.errors import InvalidInput, WeightsUnavailable
from storage.errors import NotInStore
from storage.store import Draft, Store
from tasks import steps
from tasks.steps import code_fingerprint, measured, retry_passing, run_step, step_key

# the name of code

BLOCK = '''"""Blocks."""

FACTOR = 2


def double(x):
    """Twice."""
    return FACTOR * x  # why: because
'''
METHOD = '''"""A method."""

from al_models.parts_of_test.block import double


class Method:
    """Doubles."""

    def fit(self, x):
        return double(x)
'''
STEP = "from al_models import registry\nfrom al_models.method_of_test import Method\n"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A step module, a method it imports and a block that the method imports, in a package of their own."""
    package = tmp_path / "al_models"
    (package / "parts_of_test").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts_of_test" / "__init__.py").write_text("")
    (package / "registry.py").write_text("METHODS = {'a': 1}\n")
    (package / "parts_of_test" / "block.py").write_text(BLOCK)
    (package / "method_of_test.py").write_text(METHOD)
    (tmp_path / "step_of_test.py").write_text(STEP)
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "al_models"}
    for name in ours:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "al_models"]:
        del sys.modules[name]
    sys.modules.update(ours)


def name_of(module: str) -> str:
    """Its name as a new process would find it."""

    def forget() -> None:
        code_fingerprint.cache_clear()
        steps._code.cache_clear()

    forget()
    importlib.invalidate_caches()
    found = code_fingerprint(module)
    forget()
    return found


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("parts_of_test/block.py", "FACTOR = 2", "FACTOR = 3", True),
        ("method_of_test.py", "return double(x)", "return double(x) + 1", True),
        ("../step_of_test.py", "import Method\n", "import Method\n\nrun = Method().fit\n", True),
        ("parts_of_test/block.py", "  # why: because", "", False),
        ("parts_of_test/block.py", '"""Twice."""', '"""Two times, as one says."""', False),
        ("parts_of_test/block.py", '"""Blocks."""\n', "", False),
        ("method_of_test.py", "\n\nclass", "\n\n\n\nclass", False),
        ("registry.py", "'a': 1", "'a': 1, 'b': 2", False),
    ],
    ids=["block", "method", "step", "comment", "docstring", "no docstring", "blank lines", "registry"],
)
def test_code_is_named_by_what_it_does(code: Path, file: str, old: str, new: str, changes: bool) -> None:
    before = name_of("step_of_test")
    edit(code / "al_models" / file, old, new)
    assert (name_of("step_of_test") != before) is changes


def test_code_is_named_without_being_imported(code: Path) -> None:
    name_of("step_of_test")
    assert [name for name in sys.modules if "_of_test" in name] == []


def test_a_method_is_not_named_by_its_siblings() -> None:
    padim, patchcore = (code_fingerprint("tasks.fit", f"al_models.embedding.{name}") for name in ("padim", "patchcore"))
    assert padim != patchcore
    assert padim == code_fingerprint("tasks.fit", "al_models.embedding.padim")


def test_a_docstring_alone_is_no_different_from_an_empty_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []
    for body in ('"""Nothing yet."""', "..."):
        (tmp_path / "empty_of_test.py").write_text(f"class Empty:\n    {body}\n")
        names.append(name_of("empty_of_test"))
    assert names[0] == names[1]


# the name of an output


def test_equal_inputs_give_equal_keys_in_any_order() -> None:
    key = step_key("models", "mvtec_ad", "grid", method="padim", params={"a": 1, "b": [1, 2]}, seed=0)
    assert key == step_key("models", "mvtec_ad", "grid", seed=0, params={"b": (1, 2), "a": 1}, method="padim")
    assert key == "models/mvtec_ad/grid/5b355e1c7838f9d3"  # on every machine, in every version


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": "0"}, {"params": {"a": 2}}, {"more": None}])
def test_any_other_input_gives_another_key(change: dict[str, object]) -> None:
    inputs = {"params": {"a": 1}, "seed": 0}
    assert step_key("models", "d", "c", **inputs) != step_key("models", "d", "c", **{**inputs, **change})


# work done once


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_an_output_is_made_once(store: Store) -> None:
    calls: list[str] = []

    def work(draft: Draft) -> dict[str, object]:
        calls.append(draft.folder)
        store.write_bytes(f"{draft.folder}/x", b"1")
        return {"ids": ["a"]}

    made, found = run_step(store, "models/d/c/1", work), run_step(store, "models/d/c/1", work)
    assert len(calls) == 1
    assert made == found
    assert made.folder == calls[0]
    assert made.meta["ids"] == ["a"]
    assert store.read_bytes(f"{found.folder}/x") == b"1"


def test_work_that_fails_leaves_nothing_and_is_done_again(store: Store) -> None:
    def work(draft: Draft) -> dict[str, object]:
        store.write_bytes(f"{draft.folder}/x", b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_step(store, "models/d/c/1", work)
    assert store.list("") == []
    assert run_step(store, "models/d/c/1", lambda draft: {"ids": []}).meta["ids"] == []


def test_seconds_and_memory_are_those_of_the_work(store: Store) -> None:
    def work(draft: Draft) -> dict[str, object]:
        # Straight from the system: the allocator may still hold memory that an earlier test has freed.
        block = np.frombuffer(mmap.mmap(-1, 64 * 2**20), dtype=np.uint8)
        block[:] = 1
        time.sleep(0.2)
        return {"sum": int(block[::4096].sum())}

    with measured() as idle:
        pass
    meta = run_step(store, "models/d/c/1", work).meta
    assert 0.2 <= meta["seconds"] < 5
    assert meta["peak_memory_mb"] >= idle.peak_memory_mb + 50
    json.dumps(meta, allow_nan=False)


# what is tried again


class Ended:
    """Prefect's state of a task that raised."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def result(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (NotInStore("not complete"), False),
        (WeightsUnavailable("three ways out"), False),
        (InvalidInput("given, expected, fix"), False),
        (ValueError("a bug"), False),
        (MemoryError("no room"), False),
        (None, False),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'errno', '')}" if not isinstance(value, bool) else "",
)
def test_only_a_passing_fault_is_tried_again(error: BaseException | None, again: bool) -> None:
    assert retry_passing(None, None, Ended(error)) is again
