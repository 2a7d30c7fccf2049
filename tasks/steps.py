"""What every step shares: names made of content, work skipped when its output exists, seconds and memory measured."""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib.util
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
from pathlib import Path
from typing import Any

import psutil

from storage.store import Artifact, Draft, Store
from tasks.limits import ending

GPU = "gpu"
"""Tag of the steps that a GPU makes faster: on a cluster that has some, they wait for one."""
_SAMPLE_EVERY_S = 0.02
_NOT_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EFBIG}


@dataclass
class Measured:
    """Cost of a block, up to now while it runs."""

    started: float = field(default_factory=time.perf_counter)
    peak_memory_mb: float = 0.0

    def as_meta(self) -> dict[str, float]:
        """For a manifest."""
        seconds = time.perf_counter() - self.started
        return {"seconds": round(seconds, 3), "peak_memory_mb": round(self.peak_memory_mb, 1)}

    def with_parts(self, parts: Mapping[str, Any]) -> dict[str, float]:
        """For the manifest of an output whose parts cost something before."""
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
    """Inside, a step that would compute raises NotMadeYet instead: how a plan learns what is there."""
    token = _only_look.set(True)
    try:
        yield
    finally:
        _only_look.reset(token)


def run_step(store: Store, key: str, work: Callable[[Draft], dict[str, Any]]) -> Artifact:
    """The output under `key`: found, or made by `work`, which writes into the draft and returns what to say of it.

    Raises NotMadeYet within `only_looking`."""
    found = store.find(key)
    if found is not None:
        return found
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
    """Prefect's `retry_condition_fn`: again after a passing fault (I/O), never after a bug or a full disk."""
    try:
        state.result()
    except OSError as error:
        return error.errno is not None and error.errno not in _NOT_PASSING
    except Exception:
        return False
    return False


@cache
def code_fingerprint(*modules: str) -> str:
    """Name of the code of these modules and of all of `al_models` they import; comments and docstrings do not count."""
    seen: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        # The registry names every method, so following it would tie each method's outputs to all others.
        if name in seen or name in ("al_models", "al_models.registry"):
            continue
        code = _code(name)
        if code is not None:
            seen[name], imported = code
            todo += imported
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _code(module: str) -> tuple[str, list[str]] | None:
    """A module's code without comments and docstrings, and what it imports of `al_models`; None where it has no file.

    Read once a process: methods and steps share most of theirs.
    """
    source = _source(module)
    if source is None:
        return None
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported = [found for found in _imports(tree) if found.split(".")[0] == "al_models"]
    return ast.dump(_without_docstrings(tree)), imported


def _source(module: str) -> Path | None:
    """Looked for among the files: `find_spec` of `package.module.name` would import the module, and torchvision and
    sympy with it, only for us to learn that the name is none."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    if not rest:
        return Path(spec.origin)
    place = Path(spec.origin).parent.joinpath(*rest)
    return next((file for file in (place / "__init__.py", Path(f"{place}.py")) if file.is_file()), None)


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                stmt for stmt in body if not (isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Constant))
            ]
    return tree
