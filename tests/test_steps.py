"""What every step shares: names that change with what matters and with nothing else, work done once, and retries."""

from __future__ import annotations

import errno
import json
import mmap
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prefect.cache_policies import NO_CACHE

from al_models.errors import InvalidInput, WeightsUnavailable
from storage.errors import NotInStore
from storage.store import Draft, Store
from tasks.core import steps
from tasks.core.steps import code_fingerprint, measured, retry_passing, run_step, step, step_key

# the name of code

FILES = {
    "al_models/registry.py": "METHODS: dict[str, int] = {'a': 1}\n\n\ndef create(name):\n    return METHODS[name]\n",
    "al_models/parts/__init__.py": "",
    "al_models/parts/block.py": '''"""Blocks."""

FACTOR = 2


def double(x):
    """Twice."""
    return FACTOR * x  # why: because
''',
    "al_models/method.py": '''"""A method."""

from al_models.parts.block import double


class Method:
    """Doubles."""

    def fit(self, x):
        return double(x)
''',
    "al_models/other.py": "OTHER = 1\n",
    "storage/masks.py": "THRESHOLD = 127\n",
    "storage/shapes/__init__.py": "from storage.shapes.area import area\n",
    "storage/shapes/area.py": "def area(mask):\n    return mask.sum()\n",
    "storage/store.py": "CHUNK = 16\n",
    "storage/records.py": "FORMAT = 1\n",
    "tasks/near.py": "NEAR = 1\n",
    "tasks/core/steps.py": "from storage.store import CHUNK\n",
    "tasks/step.py": """from al_models.registry import create
from storage import masks
from storage.records import FORMAT
from storage.shapes import area
from tasks.core.steps import CHUNK

from .near import NEAR


def run(x):
    from storage.late import LATE

    return LATE
""",
    "storage/late.py": "LATE = 1\n",
    "flows/order.py": "from tasks.step import run\n",
}


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Rooms of their own, with a step, a method, and what they import."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(steps, "_ROOT", tmp_path)
    yield tmp_path
    forget()


def forget() -> None:
    code_fingerprint.cache_clear()
    steps._read.cache_clear()


def name_of(*parts: str) -> str:
    """Its name as a new process would find it."""
    forget()
    return code_fingerprint(*(parts or ("tasks.step", "al_models.method:Method")))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("al_models/parts/block.py", "FACTOR = 2", "FACTOR = 3", True),
        ("al_models/method.py", "return double(x)", "return double(x) + 1", True),
        ("tasks/step.py", "return LATE", "return -LATE", True),
        ("storage/masks.py", "127", "200", True),
        ("storage/shapes/__init__.py", "import area", "import area as area", True),
        ("storage/shapes/area.py", "mask", "mark", True),
        ("storage/late.py", "1", "2", True),
        ("tasks/near.py", "1", "2", True),
        ("al_models/registry.py", "METHODS[name]", "METHODS[name] + 1", True),
        ("al_models/registry.py", "'a': 1", "'a': 1, 'b': 2", False),
        ("al_models/other.py", "1", "2", False),
        ("storage/records.py", "1", "2", False),
        ("tasks/core/steps.py", "import CHUNK", "import CHUNK as SIZE", False),
        ("storage/store.py", "16", "32", False),
        ("flows/order.py", "run", "walk", False),
        ("al_models/parts/block.py", "  # why: because", "", False),
        ("al_models/parts/block.py", '"""Twice."""', '"""Two times, as one says."""', False),
        ("al_models/parts/block.py", '"""Blocks."""\n', "", False),
        ("al_models/method.py", "\n\nclass", "\n\n\n\nclass", False),
    ],
    ids=[
        "block",
        "method",
        "step",
        "module from a package",
        "package that passes on",
        "passed on by a package",
        "import in a function",
        "relative import",
        "registry",
        "a row of the registry",
        "another method",
        "not in names",
        "skipping",
        "only imported by skipping",
        "flow",
        "comment",
        "docstring",
        "no docstring",
        "blank lines",
    ],
)
def test_code_is_named_by_what_it_does(code: Path, file: str, old: str, new: str, changes: bool) -> None:
    before = name_of()
    edit(code / file, old, new)
    assert (name_of() != before) is changes


def test_code_is_named_by_the_class_that_a_method_is(code: Path) -> None:
    assert name_of("al_models.method:Method") != name_of("al_models.method:Double") != name_of("al_models.method")


def test_code_that_is_not_there_has_no_name(code: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"no module tasks\.stop in al_models, storage, tasks"):
        name_of("tasks.stop")


def test_code_is_named_without_being_imported(code: Path) -> None:
    before = set(sys.modules)
    name_of()
    assert set(sys.modules) == before


def test_a_docstring_alone_is_no_different_from_an_empty_body(code: Path) -> None:
    names = []
    for body in ('"""Nothing yet."""', "..."):
        (code / "tasks" / "empty.py").write_text(f"class Empty:\n    {body}\n")
        names.append(name_of("tasks.empty"))
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


def test_a_step_is_a_task_that_is_tried_again_and_never_taken_from_prefects_cache() -> None:
    for gpu, tags in ((False, set()), (True, {"gpu"})):
        task = step("halve", "halve {number}", gpu=gpu)(lambda number: number / 2)
        assert (task.name, task.task_run_name, task.tags) == ("halve", "halve {number}", tags)
        assert (task.retries, task.retry_delay_seconds, task.retry_condition_fn) == (2, 1, retry_passing)
        assert task.cache_policy == NO_CACHE
        assert task.fn(4) == 2


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
