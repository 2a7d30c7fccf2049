"""The registry: fitted models kept as numbered versions, and the aliases that say which one is in use.

    registry/<data set>/<category>/aliases.json               champion, challenger, previous; replaced in one write
    registry/<data set>/<category>/<number>/manifest.json     names the folder beside it, when all of it is there
    registry/<data set>/<category>/<number>/<draft>/          version.json, MODEL_CARD.md, and what its files hold
    registry/<data set>/<category>/<number>/claims/           who took the number

A version is a copy: outputs of the pipeline may go, and it still loads.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from storage.errors import Conflict, Damaged, InUse, NotInStore, StoreTooNew, nearest
from storage.models.aliases import ALIASES, Aliases, crowned, read_aliases, write_aliases
from storage.models.versions import ROOT, ModelVersion, version_bytes, version_from, version_key
from storage.records import read_records
from storage.store import Artifact, Store
from storage.whole import new_folder

CARD = "MODEL_CARD.md"
_VERSION = "version.json"
TEXTS = (_VERSION, CARD)
"""What every version has beside its arrays."""
_CLAIMS = "claims"
_TRIES = 50
_FIX = "restore it from a copy, or delete the version and register a run again"


@dataclass(frozen=True)
class Collected:
    """What a garbage collection did to the versions of a model."""

    removed: list[int]
    kept: dict[int, str]
    """Version number -> why it was kept."""


@dataclass(frozen=True)
class Registry:
    """The versions in a store. A model's name is `data set/category`."""

    store: Store

    def names(self) -> list[str]:
        """The models that have a version, sorted."""
        pattern = re.compile(rf"{ROOT}/(.+)/\d+/manifest\.json")
        return sorted({match[1] for key in self.store.list(ROOT) if (match := pattern.fullmatch(key))})

    def numbers(self, name: str) -> list[int]:
        """The numbers of a model's versions, rising; only whole versions count."""
        return sorted(number for number, rest in self._below(name) if rest == "manifest.json")

    def versions(self, name: str) -> list[ModelVersion]:
        """A model's versions that can be read, the newest last; `numbers` has the damaged ones, too."""
        readable = []
        for number in self.numbers(name):
            with suppress(Damaged, StoreTooNew):
                readable.append(self.get(name, number))
        return readable

    def get(self, name: str, number: int) -> ModelVersion:
        """A version. Raises NotInStore, Damaged for one whose bytes have changed, StoreTooNew for a later format."""
        return version_from(self._text(name, number, _VERSION), f"{name}@{number}")

    def read(self, version: ModelVersion, file: str) -> bytes:
        """The bytes of one of the version's `files` or TEXTS, which are those that were written. Raises Damaged."""
        if file in TEXTS:
            return self._text(version.name, version.number, file)
        return self._checked(self._whole(version.name, version.number), file, version.files[file])

    def resolve(self, text: str) -> ModelVersion:
        """The version meant by `mvtec_ad/grid` (its champion), `mvtec_ad/grid@3` or `mvtec_ad/grid@previous`.

        Raises NotInStore, with the nearest names, for one that is not there.
        """
        return self.get(*self.locate(text))

    def locate(self, text: str) -> tuple[str, int]:
        """Name and number of the version meant, which may be damaged. Raises NotInStore."""
        names = self.names()
        name, _, which = (text, "", "champion") if "@" not in text or text in names else text.rpartition("@")
        if name not in names:
            hint = nearest(name, names) if names else "there is none yet: register a finished run"
            raise NotInStore(f"no model {name!r} in the registry of {self.store.url}; {hint}")
        known = self.numbers(name)
        if which.isdecimal():
            if int(which) not in known:
                raise self._missing(name, int(which))
            return name, int(which)
        numbers = ", ".join(map(str, known))
        if which not in ALIASES:
            raise NotInStore(f"{text} names no version of {name}; give one of {', '.join(ALIASES)}, {numbers}")
        number = self.aliases(name).points.get(which)
        if number is None:
            raise NotInStore(f"{name} has no {which}; its versions are {numbers}: name one, or promote one")
        if number not in known:
            raise Damaged(f"the {which} of {name} is version {number}, which is gone; promote one of {numbers}")
        return name, number

    def aliases(self, name: str) -> Aliases:
        """Which versions are champion, challenger and previous, and who switched them. Raises Damaged, StoreTooNew."""
        return read_aliases(self.store, _aliases_key(name))

    def add(
        self, version: ModelVersion, files: Mapping[str, bytes], card: Callable[[ModelVersion], str]
    ) -> ModelVersion:
        """Keep a version under the next number, with its arrays and the card that is written of it; it has no alias."""
        number, created = self._claim(version.name), datetime.now(UTC).isoformat(timespec="seconds")
        sums = {file: _sum(data) for file, data in files.items()}
        version = replace(version, number=number, created=created, files=sums)
        texts = {_VERSION: version_bytes(version), CARD: card(version).encode()}
        with self.store.draft(version_key(version.name, number)) as draft:
            for file, data in (*files.items(), *texts.items()):
                self.store.write_bytes(f"{draft.folder}/{file}", data)
            draft.commit({"sha256": {file: _sum(data) for file, data in texts.items()}})
        return version

    def challenge(self, version: ModelVersion, *, who: str, why: str) -> Aliases:
        """Make a version the challenger, unless it is the champion. Raises as `promote`."""
        before = self.aliases(version.name)
        if before.points.get("champion") == version.number:
            return before
        after = before.switched(before.points | {"challenger": version.number}, "challenge", who, why)
        return self._switch(version.name, version.number, before, after)

    def promote(self, version: ModelVersion, *, who: str, why: str, revision: int | None = None) -> Aliases:
        """Make a version the champion, and the champion the previous one; nothing when it is champion already.

        `revision` of the aliases that the decision was made on; None: the present ones. Raises Conflict when they have
        changed since, Damaged for a version that could not be loaded.
        """
        before = self.aliases(version.name)
        if revision is not None and revision != before.revision:
            raise Conflict(
                f"the promotion of {version.label} was decided on revision {revision} of the aliases, which are at "
                f"{before.revision}; look again, then decide"
            )
        if before.points.get("champion") == version.number:
            return before
        after = before.switched(crowned(before.points, version.number), "promote", who, why)
        return self._switch(version.name, version.number, before, after)

    def rollback(self, name: str, *, who: str, why: str) -> Aliases:
        """Make the previous version the champion again, and the champion the previous one: a second rollback takes the
        first back. Raises NotInStore when there is no previous version, else as `promote`."""
        before = self.aliases(name)
        name, number = self.locate(f"{name}@previous")
        after = before.switched(crowned(before.points, number), "rollback", who, why)
        return self._switch(name, number, before, after)

    def delete(self, name: str, number: int) -> None:
        """Remove a version, damaged or not; its number is not given again. Raises InUse when an alias points to it."""
        if number not in self.numbers(name):
            raise self._missing(name, number)
        self._check_unused(name, number)
        key = version_key(name, number)
        manifest = self.store.read_bytes(f"{key}/manifest.json")
        self.store.delete(f"{key}/manifest.json")  # from here on nobody sees it
        try:
            self._check_unused(name, number)
        except InUse:  # since a moment ago
            self.store.write_bytes(f"{key}/manifest.json", manifest)
            raise
        for folder in {rest.split("/")[0] for n, rest in self._below(name) if n == number} - {_CLAIMS}:
            self.store.delete(f"{key}/{folder}")

    def collect(self, name: str, keep: int) -> Collected:
        """Remove all but the newest versions, those with an alias, and those that a run record points to: to the
        version, or to the outputs of the run that it came from. What interrupted writers left a week ago goes, too.

        Raises Damaged, and removes nothing, when a record or the aliases cannot be read: they might point to any. An
        alias that is moved meanwhile to a version that was to go keeps it, and InUse is raised.
        """
        if keep < 1:
            raise ValueError(f"keep={keep} was given; the newest version is always kept: give at least 1")
        pointed = {key for record in read_records(self.store) for key in record.keys.values()}
        aliases, numbers, removed = self.aliases(name), self.numbers(name), []
        kept = {number: f"one of the newest {keep}" for number in numbers[-keep:]}
        for number in numbers[:-keep]:
            reason = self._why_kept(name, number, aliases, pointed)
            if reason is None:
                self.delete(name, number)
                removed.append(number)
            else:
                kept[number] = reason
        for number in {number for number, _ in self._below(name)} - set(numbers):
            self.store.sweep(version_key(name, number))
        return Collected(removed, dict(sorted(kept.items())))

    def export(self, version: ModelVersion, folder: str | Path) -> None:
        """Copy a version's files into a new folder, whole or not at all. Raises InUse for a folder that holds
        something, NotStorable for one that cannot be written, Damaged."""
        files = {file: self.read(version, file) for file in (*version.files, *TEXTS)}
        with new_folder(folder) as aside:
            for file, data in files.items():
                (aside / file).write_bytes(data)

    def _claim(self, name: str) -> int:
        """The next number of a model, which nobody else has or ever had.

        Object stores cannot create a key only if it is not there. So each writer first leaves a claim under the number
        and then looks: who sees no other claim has it. Of two writers the later to look sees both claims, hence never
        do both have it; where both see both, both withdraw and try again a moment later. A claim stays for ever, also
        when its version is deleted or was never finished: numbers may be missing, and none means two models.
        """
        for attempt in range(_TRIES):
            number = max((number for number, _ in self._below(name)), default=0) + 1
            claims = f"{version_key(name, number)}/{_CLAIMS}"
            mine = f"{claims}/{uuid.uuid4().hex}"
            self.store.write_bytes(mine, b"claimed")
            if self.store.list(claims) == [mine]:
                return number
            self.store.delete(mine)
            time.sleep(secrets.randbelow(1000) / 1000 * min(2.0, 0.02 * 2**attempt))
        raise Conflict(f"{name} got no version number in {_TRIES} attempts, so many add versions; try again later")

    def _switch(self, name: str, number: int, before: Aliases, after: Aliases) -> Aliases:
        """Write the aliases after a switch to this version, which must be whole then and there."""
        version, key = self.get(name, number), _aliases_key(name)
        for file in version.files:  # nothing may be in use that cannot be loaded
            self.read(version, file)
        write_aliases(self.store, key, before, after)
        if number not in self.numbers(name):  # `delete` looks at the aliases last, so one of the two notices the other
            write_aliases(self.store, key, after, after.switched(before.points, "undo", "al", f"{number} was removed"))
            raise Conflict(f"{version.label} was removed at the same time; the aliases are what they were")
        return after

    def _check_unused(self, name: str, number: int) -> None:
        aliases = self.aliases(name).of(number)
        if aliases:
            raise InUse(f"{name}@{number} is {' and '.join(aliases)}; promote another version, then delete it")

    def _why_kept(self, name: str, number: int, aliases: Aliases, pointed: set[str]) -> str | None:
        """The reason why a version that is not among the newest must stay, or None."""
        if aliases.of(number):
            return " and ".join(aliases.of(number))
        try:
            outputs = self.get(name, number).lineage.outputs.values()
        except (Damaged, StoreTooNew) as error:
            return f"cannot be read, so nobody knows what points to it ({error})"
        return None if pointed.isdisjoint({version_key(name, number), *outputs}) else "a run record points to it"

    def _below(self, name: str) -> list[tuple[int, str]]:
        """(number, key within its folder) of everything kept under a model's numbers."""
        pattern = re.compile(rf"{re.escape(f'{ROOT}/{name}')}/(\d+)/(.+)")
        return [(int(m[1]), m[2]) for key in self.store.list(f"{ROOT}/{name}") if (m := pattern.fullmatch(key))]

    def _missing(self, name: str, number: int) -> NotInStore:
        known = ", ".join(map(str, self.numbers(name))) or "none"
        return NotInStore(f"{name}@{number} is not in the registry of {self.store.url}; versions of {name}: {known}")

    def _whole(self, name: str, number: int) -> Artifact:
        version = self.store.find(version_key(name, number))
        if version is None:
            raise self._missing(name, number)
        return version

    def _text(self, name: str, number: int, file: str) -> bytes:
        """A file whose sum is in the manifest; those of the others are in `version.json`."""
        version = self._whole(name, number)
        try:
            wanted = str(version.meta["sha256"][file])
        except (KeyError, TypeError) as error:
            raise Damaged(f"the manifest of {name}@{number} has no sum of {file}; {_FIX}") from error
        return self._checked(version, file, wanted)

    def _checked(self, version: Artifact, file: str, wanted: str) -> bytes:
        try:
            data = self.store.read_bytes(f"{version.folder}/{file}")
        except NotInStore as error:
            raise Damaged(f"{file} of {version.key} is not in {self.store.url}; {_FIX}") from error
        if _sum(data) != wanted:
            sums = f"its SHA-256 is {_sum(data)[:12]}..., and {wanted[:12]}... was written"
            raise Damaged(f"{file} of {version.key} has changed: {sums}; {_FIX}")
        return data


def _aliases_key(name: str) -> str:
    return f"{ROOT}/{name}/aliases.json"


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
