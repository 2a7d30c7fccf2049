"""What every step shares: names made of content, work skipped when its output exists, seconds and memory measured."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import psutil

from storage.store import Artifact, Draft, Store
from tasks.core.limits import ending

if TYPE_CHECKING:
    from prefect import Task

P, R = ParamSpec("P"), TypeVar("R")

GPU = "gpu"
"""Tag of the steps that a GPU makes faster: on a cluster that has some, they wait for one."""
_SAMPLE_EVERY_S = 0.02
_ROOT = Path(__file__).parents[2]
_ROOMS = ("al_models", "storage", "tasks")
_TABLES = {"al_models.registry": "METHODS", "storage.datasets": "DATASETS"}
"""They name every method and every reader: one more would rename the outputs of all."""
NOT_IN_NAMES = {
    "storage.download": "what it has fetched is listed and hashed like any other file",
    "storage.records": "a record is written again wherever it differs from the one that is kept",
    "tasks.core.limits": "it ends what hangs; whether it shrinks a batch depends on the machine, which no name has",
    "tasks.core.progress": "it says how far a step is",
    "tasks.core.steps": "it names, measures and repeats what others compute",
}
"""Modules that run in a step and cannot change what it makes, and why. What only they import is in no name, either."""
_NOT_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EFBIG}


@dataclass
class Measured:
    """Cost of a block, up to now while it runs."""

    started: float = field(default_factory=time.perf_counter)
    peak_memory_mb: float = 0.0

    def as_meta(self) -> dict[str, float]:
        """The cost, for a manifest."""
        seconds = time.perf_counter() - self.started
        return {"seconds": round(seconds, 3), "peak_memory_mb": round(self.peak_memory_mb, 1)}

    def with_parts(self, parts: Mapping[str, Any]) -> dict[str, float]:
        """The cost, for the manifest of an output whose parts cost something before."""
        own = self.as_meta()
        return {
            "seconds": round(own["seconds"] + parts.get("seconds", 0), 3),
            "peak_memory_mb": max(own["peak_memory_mb"], parts.get("peak_memory_mb", 0)),
        }


@contextmanager
def measured() -> Iterator[Measured]:
    """Measure a block: wall seconds, and the largest resident memory of this process meanwhile."""
    result, process, stop = Measured(), psutil.Process(), threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_EVERY_S):
            result.peak_memory_mb = max(result.peak_memory_mb, process.memory_info().rss / 2**20)

    result.peak_memory_mb = process.memory_info().rss / 2**20
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield result
    finally:
        stop.set()
        sampler.join()


class NotMadeYet(LookupError):
    """An output that would have to be computed, where steps only look."""

    def __init__(self, key: str) -> None:
        """The output's key."""
        super().__init__(key)
        self.key = key


_only_look: ContextVar[bool] = ContextVar("_only_look", default=False)


@contextmanager
def only_looking() -> Iterator[None]:
    """A block in which a step that would compute raises NotMadeYet instead: how a plan learns what is there."""
    token = _only_look.set(True)
    try:
        yield
    finally:
        _only_look.reset(token)


def run_step(store: Store, key: str, work: Callable[[Draft], dict[str, Any]]) -> Artifact:
    """The output under `key`: found, or made by `work`, which writes into the draft and returns what to say of it.

    Raises NotMadeYet within `only_looking`."""
    made = store.find(key)
    if made is not None:
        return made
    if _only_look.get():
        raise NotMadeYet(key)
    with ending(store, key), measured() as cost, store.draft(key) as draft:
        meta = work(draft)
        return draft.commit({**meta, **cost.with_parts(meta), "process": f"{socket.gethostname()}:{os.getpid()}"})


def step_key(step: str, dataset: str, category: str, **inputs: Any) -> str:
    """`step/dataset/category/hash of the inputs`; equal inputs, equal key, on every machine."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    return f"{step}/{dataset}/{category}/{digest}"


def retry_passing(task: Any, task_run: Any, state: Any) -> bool:
    """Whether Prefect tries a task again (its `retry_condition_fn`): after a passing fault (I/O), never after a bug or
    a full disk."""
    try:
        state.result()
    except OSError as error:
        return error.errno is not None and error.errno not in _NOT_PASSING
    except Exception:
        return False
    return False


def step(name: str, run_name: str, *, gpu: bool = False) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A decorator: the function as a Prefect task, whose runs are shown as `run_name`, with a GPU where there is one,
    and which is tried twice more after a passing fault. Prefect's cache, which sees no change of code, is not asked."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    return task(
        name=name,
        task_run_name=run_name,
        tags=[GPU] if gpu else None,
        cache_policy=NO_CACHE,
        retries=2,
        retry_delay_seconds=1,
        retry_condition_fn=retry_passing,
    )


@cache
def code_fingerprint(*parts: str) -> str:
    """Name of the code that makes an output: of these modules (or `module:Class`) and all of ours that they import,
    without those `NOT_IN_NAMES`. Comments and docstrings do not count. Raises ModuleNotFoundError for others.

    What a step looks up in a table by name, as a method or the reader of a data set, it names here itself.
    """
    digests = {module: _read(module).digest for module in modules_behind(*parts)}
    return hashlib.sha256(json.dumps([parts, digests], sort_keys=True).encode()).hexdigest()[:16]


def modules_behind(*parts: str) -> set[str]:
    """The modules that `code_fingerprint` reads for these."""
    todo = [part.partition(":")[0] for part in parts]
    for module in todo:
        if _file(module) is None:
            rooms = ", ".join(_ROOMS)
            raise ModuleNotFoundError(f"no module {module} in {rooms}: an output is named by the code of one there")
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        if module not in seen and module not in NOT_IN_NAMES:
            seen.add(module)
            todo += _read(module).imports
    return seen


@dataclass(frozen=True)
class _Code:
    """What a name has to know of a module."""

    digest: str
    """Digest of its syntax tree without docstrings."""
    imports: tuple[str, ...]
    """Modules of ours that it imports, anywhere in it. A package that is only passed on the way to one is none of them:
    ours do nothing when they are imported."""


@cache
def _read(module: str) -> _Code:
    """The code of a module, read once a process: steps and methods share most of theirs."""
    file = _file(module)
    assert file is not None
    tree = ast.parse(file.read_bytes())
    tree.body = [statement for statement in tree.body if not _defines(statement, _TABLES.get(module))]
    words: list[str] = []
    imports: list[str] = []
    todo: list[Any] = [tree]
    while todo:  # one pass, in half of the time of `ast.dump` and `ast.walk`
        node = todo.pop()
        if isinstance(node, ast.AST):
            words.append(type(node).__name__)
            todo += [getattr(node, name, None) for name in node._fields]
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports += _imported(node, module, file)
        elif isinstance(node, list):
            kept = [one for one in node if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
            words.append(str(len(kept)))
            todo += kept
        else:
            words.append(repr(node))
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
    return _Code(digest, tuple(name for name in imports if name.split(".")[0] in _ROOMS and _file(name)))


def _file(module: str) -> Path | None:
    """The file of a module, or None for a name within a module. It is looked for, not imported: importing is what takes
    the time."""
    place = _ROOT.joinpath(*module.split("."))
    return next((file for file in (place / "__init__.py", Path(f"{place}.py")) if file.is_file()), None)


def _imported(node: ast.Import | ast.ImportFrom, module: str, file: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    source = resolve_name("." * node.level + (node.module or ""), package)
    return [source, *(f"{source}.{alias.name}" for alias in node.names)]


def _defines(statement: ast.stmt, table: str | None) -> bool:
    target = getattr(statement, "target", None)
    return isinstance(target, ast.Name) and target.id == table
