"""Loaded into Dask workers (`--preload`): faults where they hurt most, when an output is written but not finished.

AL_FAULTS: `output[:method]=fault`, separated by commas; the faults: `kill` (SIGKILL, once), `hang` and `eat` (memory,
to the limit), each time. AL_FAULTS_SEEN: the folder that says what has happened.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import tasks.core.limits
from storage.store import Artifact, Draft

_FAULTS = dict(item.split("=") for item in os.environ["AL_FAULTS"].split(","))
_SEEN = Path(os.environ["AL_FAULTS_SEEN"])
_commit = Draft.commit


def _kill(name: str) -> None:
    try:
        (_SEEN / name).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(name: str) -> None:
    (_SEEN / f"{name} {os.getpid()}").touch()
    time.sleep(600)


def _eat(name: str) -> None:
    (_SEEN / f"{name} {os.getpid()}").touch()
    eaten = []
    while True:
        eaten.append(bytearray(os.urandom(2**20) * 64))
        time.sleep(0.02)


def _faulty(self: Draft, meta: dict[str, Any]) -> Artifact:
    output = self.key.split("/")[0]
    for name in (output, f"{output}:{meta.get('method')}"):
        if name in _FAULTS:
            {"kill": _kill, "hang": _hang, "eat": _eat}[_FAULTS[name]](name)
    return _commit(self, meta)


def dask_setup(worker: Any) -> None:
    """Dask calls it in each worker."""
    tasks.core.limits._GRACE_S = 1.0
    Draft.commit = _faulty  # type: ignore[method-assign]
