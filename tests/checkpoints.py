"""What tests of killed trainings share: checkpoints that are counted, and the error that ends a fit."""

from __future__ import annotations

import uuid

from storage.store import Store
from tasks.core.stored import StoredCheckpoints


class Killed(Exception):
    pass


class Kept:
    """The checkpoints of a fit as the pipeline stores them, counted."""

    def __init__(self):
        self.stored = StoredCheckpoints(Store(f"memory://{uuid.uuid4().hex}"), "checkpoints/toy.safetensors")
        self.saves = 0

    def load(self):
        return self.stored.load()

    def save(self, state):
        self.stored.save(state)
        self.saves += 1
