"""The registry: versions whole or not at all, aliases switched in one write, and nothing in use ever removed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import models
from storage.errors import Conflict, Damaged, InUse, NotInStore, NotStorable, StorageError, StoreTooNew
from storage.models import CARD, Registry
from storage.models.aliases import Aliases
from storage.models.versions import FORMAT, STATE, Calibration, Features, Lineage, ModelVersion
from storage.records import RunRecord, write_record
from storage.store import ABANDONED_AFTER_S, Store

GRID = "mvtec_ad/grid"
WHY = {"who": "anna", "why": "better on the line"}


def made(seed: int = 0, name: str = GRID) -> ModelVersion:
    """A version as a run would give it; seeds tell runs apart."""
    dataset, category = name.split("/")
    outputs = {step: f"{step}s/{name}/{seed}" for step in ("model", "calibration", "evaluation")}
    return ModelVersion(
        dataset=dataset,
        category=category,
        method="padim",
        params={"channels": 100, "layers": [1, 2, 3]},
        seed=seed,
        calibration=Calibration(rate=0.05, images=20, image=1 / 3, pixel=0.7, realised={"miss_rate": 0.25}),
        features=Features({"backbone": "lite0", "layers": [1, 2, 3]}, "weights-1"),
        lineage=Lineage(["a", "b"], ["c"], f"records/{name}/padim/{seed}.json", outputs),
        metrics={"image_auroc": 0.9},
        intervals={"image_auroc": {"low": 0.8, "high": None, "note": "few"}},
        versions={"torch": "2.9.0"},
    )


def put(registry: Registry, seed: int = 0, name: str = GRID, size: int = 10) -> ModelVersion:
    """A version in the registry whose state says which run it is of."""
    return registry.add(made(seed, name), {STATE: bytes([seed % 256]) * size}, lambda version: f"# {version.label}")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """An empty one in memory."""
    store = Store(f"memory://{tmp_path.name}")
    yield Registry(store)
    store.delete("")


@pytest.fixture(params=["local", "memory", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """An empty one of each kind of store."""
    urls = {"local": lambda: str(tmp_path / "store"), "memory": lambda: f"memory://{tmp_path.name}"}
    urls["s3"] = lambda: f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    store = Store(urls[request.param]())
    yield Registry(store)
    store.delete("")


# versions


def test_a_version_comes_back_as_added(anywhere: Registry) -> None:
    registry = anywhere
    added = put(registry, 7)
    assert (added.label, added.key, added.number) == (f"{GRID}@1", f"registry/{GRID}/1", 1)
    assert replace(added, number=0, files={}, created="") == made(7)
    assert registry.get(GRID, 1) == added == registry.resolve(f"{GRID}@1")
    assert registry.read(added, STATE) == b"\x07" * 10
    assert registry.read(added, CARD) == f"# {GRID}@1".encode()
    assert registry.aliases(GRID) == Aliases()


def test_numbers_count_up_and_are_never_given_again(registry: Registry) -> None:
    assert [put(registry, seed).number for seed in range(3)] == [1, 2, 3]
    registry.delete(GRID, 3)
    assert put(registry, 4).number == 4
    assert registry.numbers(GRID) == [1, 2, 4]
    assert put(registry, 5, "mvtec_ad/tile").number == 1
    assert registry.names() == [GRID, "mvtec_ad/tile"]


def test_writers_at_once_share_no_number_and_lose_no_version(anywhere: Registry) -> None:
    registry = anywhere
    with ThreadPoolExecutor(3) as pool:
        added = list(pool.map(lambda seed: put(registry, seed), range(6)))
    assert len({version.number for version in added}) == 6
    assert sorted(version.seed for version in registry.versions(GRID)) == list(range(6))
    for version in added:
        assert registry.get(GRID, version.number) == version
        assert registry.read(version, STATE) == bytes([version.seed]) * 10


def test_two_that_see_each_other_both_withdraw_and_try_again(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    rival = f"registry/{GRID}/1/claims/rival"
    registry.store.write_bytes(rival, b"claimed")
    monkeypatch.setattr(Registry, "_below", lambda *_: [] if not waits else [(1, "claims/rival")])
    monkeypatch.setattr(time, "sleep", waits.append)
    assert registry._claim(GRID) == 2
    assert len(waits) == 1
    assert registry.store.list(f"registry/{GRID}/1") == [rival]


def test_a_model_that_so_many_write_that_none_gets_a_number(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(Store, "list", lambda store, prefix: [f"{prefix}/others"])
    with pytest.raises(Conflict, match="got no version number in 50 attempts"):
        registry._claim(GRID)


# names


@pytest.mark.parametrize(
    ("text", "number"),
    [(GRID, 2), (f"{GRID}@champion", 2), (f"{GRID}@previous", 1), (f"{GRID}@challenger", 3), (f"{GRID}@1", 1)],
)
def test_a_name_resolves(text: str, number: int, registry: Registry) -> None:
    one, two, three = (put(registry, seed) for seed in range(3))
    for version in (one, two):
        registry.promote(version, **WHY)
    registry.challenge(three, **WHY)
    assert registry.resolve(text).number == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mvtec_ad/gird", "no model 'mvtec_ad/gird' in the registry of .*; did you mean mvtec_ad/grid?"),
        ("mvtec_ad/gird@2", "no model 'mvtec_ad/gird'"),
        (f"{GRID}@4", "mvtec_ad/grid@4 is not in the registry of .*; versions of mvtec_ad/grid: 1, 2"),
        (f"{GRID}@champoin", "names no version of mvtec_ad/grid; give one of champion, challenger, previous, 1, 2"),
        (GRID, "mvtec_ad/grid has no champion; its versions are 1, 2: name one, or promote one"),
        (f"{GRID}@", "names no version of"),
        ("", "no model ''"),
        ("../grid", "no model"),
    ],
)
def test_a_name_that_means_nothing_is_told_with_what_is_there(text: str, message: str, registry: Registry) -> None:
    put(registry, 0)
    put(registry, 1)
    with pytest.raises(NotInStore, match=message):
        registry.resolve(text)


def test_an_empty_registry_says_so(registry: Registry) -> None:
    with pytest.raises(NotInStore, match="there is none yet: register a finished run"):
        registry.resolve(GRID)
    assert (registry.names(), registry.numbers(GRID), registry.versions(GRID)) == ([], [], [])


def test_a_category_may_have_an_at_in_its_name(registry: Registry) -> None:
    version = put(registry, 0, "folder/line@3")
    registry.promote(version, **WHY)
    assert registry.resolve("folder/line@3") == registry.resolve("folder/line@3@1") == version


# aliases


def test_the_champion_becomes_the_previous_one(anywhere: Registry) -> None:
    registry = anywhere
    one, two = put(registry, 1), put(registry, 2)
    assert registry.promote(one, **WHY).points == {"champion": 1}
    assert registry.challenge(two, **WHY).points == {"champion": 1, "challenger": 2}
    after = registry.promote(two, who="ben", why="finds dents")
    assert after.points == {"champion": 2, "previous": 1}
    assert after == registry.aliases(GRID)
    changes = [(s.revision, s.change, s.who, s.why) for s in after.history]
    assert changes == [
        (1, "promote", *WHY.values()),
        (2, "challenge", *WHY.values()),
        (3, "promote", "ben", "finds dents"),
    ]
    assert [after.of(1), after.of(2), after.had(2), after.had(3)] == [["previous"], ["champion"], True, False]


def test_a_challenger_stays_when_another_is_promoted(registry: Registry) -> None:
    one, two = put(registry, 1), put(registry, 2)
    registry.challenge(one, **WHY)
    assert registry.promote(two, **WHY).points == {"champion": 2, "challenger": 1}


def test_promoting_or_challenging_the_champion_changes_nothing(registry: Registry) -> None:
    one, two = put(registry, 1), put(registry, 2)
    registry.promote(one, **WHY)
    before = registry.promote(two, **WHY)
    assert registry.promote(two, **WHY) == registry.challenge(two, **WHY) == before == registry.aliases(GRID)


def test_a_second_rollback_takes_the_first_back(registry: Registry) -> None:
    one, two = put(registry, 1), put(registry, 2)
    registry.promote(one, **WHY)
    with pytest.raises(NotInStore, match="has no previous"):
        registry.rollback(GRID, **WHY)
    registry.promote(two, **WHY)
    assert registry.rollback(GRID, **WHY).points == {"champion": 1, "previous": 2}
    again = registry.rollback(GRID, **WHY)
    assert again.points == {"champion": 2, "previous": 1}
    assert [switch.change for switch in again.history] == ["promote", "promote", "rollback", "rollback"]


def test_the_history_is_bounded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.models.aliases.HISTORY", 5)
    one, two = put(registry, 1), put(registry, 2)
    registry.promote(one, **WHY)
    registry.promote(two, **WHY)
    for _ in range(5):
        after = registry.rollback(GRID, **WHY)
    assert [switch.revision for switch in after.history] == [3, 4, 5, 6, 7]


def test_a_promotion_decided_on_older_aliases_is_refused(registry: Registry) -> None:
    one, two, three = (put(registry, seed) for seed in range(3))
    seen = registry.promote(one, **WHY)
    registry.promote(two, **WHY)
    with pytest.raises(Conflict, match="decided on revision 1 of the aliases, which are at 2; look again"):
        registry.promote(three, **WHY, revision=seen.revision)
    assert registry.promote(three, **WHY, revision=2).points == {"champion": 3, "previous": 2}


@pytest.mark.parametrize("when", ["before our write", "after it"])
def test_of_two_who_switch_at_once_the_loser_is_told(
    when: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = (put(registry, seed) for seed in range(3))
    old = registry.promote(one, **WHY)
    verify, write = Registry.get, Store.write_json
    rivals = iter(
        [{"format": FORMAT, "revision": old.revision + 1, "aliases": {"champion": three.number}, "history": []}]
    )

    def rival_writes() -> None:
        for value in rivals:
            write(registry.store, f"registry/{GRID}/aliases.json", value)

    def get(*args: Any) -> ModelVersion:
        if when == "before our write":  # while the version to promote is being verified
            rival_writes()
        return verify(*args)

    def write_json(*args: Any) -> None:
        write(*args)
        rival_writes()  # which were decided on the same aliases

    monkeypatch.setattr(Registry, "get", get)
    monkeypatch.setattr(Store, "write_json", write_json)
    with pytest.raises(Conflict, match="look again"):
        registry.promote(two, **WHY)
    assert registry.aliases(GRID).points == {"champion": 3}


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"format": FORMAT + 1}, StoreTooNew, "has format 2, this version reads up to 1; update the program"),
        ({"format": FORMAT}, Damaged, "is no file of aliases .*; restore it from a copy, or delete it"),
        ([], Damaged, "is no file of aliases"),
        ({"format": 1, "revision": 1, "aliases": {"champion": "x"}, "history": []}, Damaged, "is no file of aliases"),
    ],
)
def test_aliases_that_cannot_be_read_are_named(
    value: Any, error: type[Exception], message: str, registry: Registry
) -> None:
    put(registry)
    registry.store.write_json(f"registry/{GRID}/aliases.json", value)
    for action in (registry.resolve, registry.aliases, lambda name: registry.collect(name, 1)):
        with pytest.raises(error, match=message):
            action(GRID)
    assert registry.numbers(GRID) == [1]


# faults: every write fails in turn


class Broken(OSError):
    """The store fails."""


def fail_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """The n-th change of the store from now on fails, and so do all after it: as when the disk is full."""
    left = [nth]

    def failing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Broken("no space left")
            return method(*args, **options)

        return call

    for name in ("write_bytes", "delete"):
        monkeypatch.setattr(Store, name, failing(getattr(Store, name)))


def write_failures(action: Callable[[], object], most: int = 20) -> Iterator[bool]:
    """Whether the action ended well when its first write fails, its second, ... until none is left to fail."""
    for nth in range(most):
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, nth)
            try:
                action()
                ended = True
            except Broken:
                ended = False
        yield ended
        if ended:
            return
    pytest.fail(f"more than {most} writes")


@pytest.mark.parametrize("change", ["promote", "rollback", "challenge"])
def test_a_switch_that_a_failing_store_interrupts_is_old_or_new(change: str, registry: Registry) -> None:
    one, two, three = (put(registry, seed) for seed in range(3))
    registry.promote(one, **WHY)
    old = registry.promote(two, **WHY)
    action = {
        "promote": lambda: registry.promote(three, **WHY),
        "rollback": lambda: registry.rollback(GRID, **WHY),
        "challenge": lambda: registry.challenge(three, **WHY),
    }[change]
    ends = []
    for ended in write_failures(action):
        ends.append(ended)
        assert (registry.aliases(GRID) == old) is not ended
    assert ends == [False, True]  # one write: it happens or does not


def test_an_addition_that_a_failing_store_interrupts_is_never_seen(registry: Registry) -> None:
    first = put(registry, 0)
    ends = []
    for ended in write_failures(lambda: put(registry, 1)):
        ends.append(ended)
        assert [version.seed for version in registry.versions(GRID)] == ([0, 1] if ended else [0])
        assert len(registry.numbers(GRID)) == len(registry.versions(GRID))
    assert ends == [False] * 5 + [True]  # claim, state, version, card, manifest
    assert registry.get(GRID, 1) == first


def test_a_deletion_that_a_failing_store_interrupts_leaves_all_or_none(registry: Registry) -> None:
    put(registry, 0)
    version = put(registry, 1)
    for ended in write_failures(lambda: registry.delete(GRID, 2) if 2 in registry.numbers(GRID) else None):
        if 2 in registry.numbers(GRID):
            assert not ended
            assert registry.read(registry.get(GRID, 2), STATE) == b"\x01" * 10
    assert registry.numbers(GRID) == [1]
    with pytest.raises(NotInStore, match="versions of mvtec_ad/grid: 1"):
        registry.read(version, STATE)


# damage


def files_of(registry: Registry, number: int) -> list[str]:
    return [key for key in registry.store.list(f"registry/{GRID}/{number}") if "/claims/" not in key]


def test_every_file_is_checked_byte_by_byte(registry: Registry) -> None:
    version = put(registry)
    for key in files_of(registry, 1):
        data = registry.store.read_bytes(key)
        for at in range(0, len(data), max(1, len(data) // 97)):  # of the texts about a hundred bytes each
            registry.store.write_bytes(key, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with suppress(Damaged, StoreTooNew):
                found = registry.get(GRID, 1)
                files = [registry.read(found, file) for file in (STATE, CARD)]
                assert (found, files) == (version, [b"\0" * 10, f"# {GRID}@1".encode()])
                assert key.endswith("manifest.json")  # white space between its words
        registry.store.write_bytes(key, data)
    assert registry.get(GRID, 1) == version


@pytest.mark.parametrize("damage", ["change", "shorten", "remove"])
def test_a_version_with_a_damaged_state_is_not_promoted(damage: str, registry: Registry) -> None:
    version = put(registry)
    key = next(key for key in files_of(registry, 1) if key.endswith(STATE))
    if damage == "remove":
        registry.store.delete(key)
    else:
        registry.store.write_bytes(key, b"\0" * 9 + b"\1" if damage == "change" else b"\0" * 9)
    message = f"{STATE} of registry/{GRID}/1 (is not in|has changed: its SHA-256 is .* was written; restore it)"
    with pytest.raises(Damaged, match=message):
        registry.promote(version, **WHY)
    assert registry.aliases(GRID) == Aliases()
    assert registry.versions(GRID) == [version]


def test_a_version_in_the_place_of_another_is_damaged(registry: Registry) -> None:
    put(registry, 0)
    put(registry, 1)
    one = registry.store.read_json(f"registry/{GRID}/1/manifest.json")
    registry.store.write_json(f"registry/{GRID}/2/manifest.json", one)
    with pytest.raises(Damaged, match="what is kept as mvtec_ad/grid@2 says that it is mvtec_ad/grid@1"):
        registry.get(GRID, 2)
    assert [version.number for version in registry.versions(GRID)] == [1]
    assert registry.numbers(GRID) == [1, 2]
    registry.delete(GRID, 2)  # a damaged one can be removed
    assert registry.numbers(GRID) == [1]


def test_a_version_of_a_later_format_is_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("storage.models.versions.FORMAT", FORMAT + 1)
        put(registry)
    with pytest.raises(StoreTooNew, match="mvtec_ad/grid@1 has format 2, this version reads up to 1; update"):
        registry.get(GRID, 1)


def test_a_field_of_a_later_program_of_the_same_format_is_left_out(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = models.version_bytes
    with monkeypatch.context() as patch:
        more = {"carbon_g": 1.0}
        patch.setattr(models, "version_bytes", lambda version: json.dumps(json.loads(write(version)) | more).encode())
        added = put(registry)
    assert registry.get(GRID, 1) == added


def test_a_version_that_json_cannot_hold_is_refused_and_not_kept(registry: Registry) -> None:
    with pytest.raises(NotStorable, match=r"mvtec_ad/grid@1 cannot be written: metrics\.pro is nan"):
        registry.add(replace(made(), metrics={"pro": float("nan")}), {}, lambda _: "")
    assert registry.numbers(GRID) == []


# removing


def test_what_an_alias_points_to_is_not_deleted(anywhere: Registry) -> None:
    registry = anywhere
    one, two, three = (put(registry, seed) for seed in range(3))
    registry.promote(one, **WHY)
    registry.promote(two, **WHY)
    registry.challenge(three, **WHY)
    for number, alias in ((1, "previous"), (2, "champion"), (3, "challenger")):
        with pytest.raises(InUse, match=f"mvtec_ad/grid@{number} is {alias}; promote another version, then delete it"):
            registry.delete(GRID, number)
    with pytest.raises(NotInStore, match="mvtec_ad/grid@4 is not in the registry"):
        registry.delete(GRID, 4)
    assert registry.numbers(GRID) == [1, 2, 3]
    registry.promote(put(registry, 4), **WHY)
    registry.delete(GRID, 1)
    assert registry.numbers(GRID) == [2, 3, 4]


@pytest.mark.parametrize("first", ["the deletion", "the switch"])
def test_of_a_deletion_and_a_switch_at_once_one_gives_way(
    first: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = put(registry, 1), put(registry, 2)
    registry.promote(one, **WHY)
    write, delete = models.write_aliases, Store.delete
    if first == "the deletion":  # it ends after the version was verified, before the aliases are written

        def write_aliases(*args: Any) -> None:
            monkeypatch.setattr(models, "write_aliases", write)
            registry.delete(GRID, 2)
            write(*args)

        monkeypatch.setattr(models, "write_aliases", write_aliases)
        with pytest.raises(Conflict, match="mvtec_ad/grid@2 was removed at the same time; the aliases are what they"):
            registry.promote(two, **WHY)
        assert registry.aliases(GRID).points == {"champion": 1}
    else:  # the aliases are written after they were looked at, before the version is gone

        def delete_manifest(*args: Any) -> None:
            monkeypatch.setattr(Store, "delete", delete)
            registry.promote(two, **WHY)
            delete(*args)

        monkeypatch.setattr(Store, "delete", delete_manifest)
        with pytest.raises(InUse, match="mvtec_ad/grid@2 is champion"):
            registry.delete(GRID, 2)
        assert registry.resolve(GRID) == two
        assert registry.read(two, STATE) == b"\x02" * 10


def test_a_deleted_version_leaves_nothing_but_its_number(registry: Registry) -> None:
    put(registry)
    registry.delete(GRID, 1)
    assert [key.split("/")[4] for key in registry.store.list("registry")] == ["claims"]


def record(seed: int, **keys: str) -> RunRecord:
    return RunRecord("mvtec_ad", "grid", "padim", {}, seed, str(seed), "done", keys=keys)


@settings(max_examples=60, deadline=None)
@given(
    versions=st.integers(1, 7),
    promoted=st.lists(st.integers(1, 7), max_size=4),
    challenged=st.lists(st.integers(1, 7), max_size=2),
    runs=st.sets(st.integers(1, 7), max_size=3),
    judged_by=st.sets(st.integers(1, 7), max_size=2),
    keep=st.integers(1, 4),
)
def test_nothing_that_is_in_use_is_collected(
    versions: int, promoted: list[int], challenged: list[int], runs: set[int], judged_by: set[int], keep: int
) -> None:
    registry = Registry(Store("memory://collected"))
    registry.store.delete("")
    added = {version.number: version for version in (put(registry, seed) for seed in range(versions))}
    for number in promoted:
        if number in added:
            registry.promote(added[number], **WHY)
    for number in challenged:
        if number in added:
            registry.challenge(added[number], **WHY)
    for number in runs:  # the run that a version came from is still the last of its cell
        write_record(registry.store, record(number, model=f"models/{GRID}/{number - 1}", maps="maps/other"))
    for number in judged_by:
        write_record(registry.store, record(100 + number, version=f"registry/{GRID}/{number}"))
    aliases = registry.aliases(GRID)
    in_use = {*aliases.points.values(), *runs, *judged_by, *sorted(added)[-keep:]} & added.keys()
    done = registry.collect(GRID, keep)
    assert registry.versions(GRID) == [added[number] for number in sorted(in_use)]
    assert done.removed == sorted(added.keys() - in_use)
    assert sorted(done.kept) == sorted(in_use)
    assert registry.aliases(GRID) == aliases
    for number in in_use:
        assert registry.read(added[number], STATE) == bytes([number - 1]) * 10


def test_a_collection_says_why_it_kept_what_it_kept(registry: Registry) -> None:
    one, *_ = [put(registry, seed) for seed in range(4)]
    registry.promote(one, **WHY)
    write_record(registry.store, record(0, model=f"models/{GRID}/1"))
    done = registry.collect(GRID, 1)
    assert done.removed == [3]
    assert done.kept == {1: "champion", 2: "a run record points to it", 4: "one of the newest 1"}
    with pytest.raises(ValueError, match="keep=0 was given"):
        registry.collect(GRID, 0)


def test_nothing_is_collected_where_a_record_or_a_version_cannot_be_read(registry: Registry) -> None:
    put(registry, 0)
    put(registry, 1)
    state = registry.store.get(f"registry/{GRID}/1").folder
    registry.store.write_bytes(f"{state}/version.json", b"{}")
    assert "cannot be read, so nobody knows what points to it" in registry.collect(GRID, 1).kept[1]
    registry.store.write_json(f"registry/{GRID}/1/manifest.json", {})
    assert "cannot be read, so nobody knows what points to it" in registry.collect(GRID, 1).kept[1]
    registry.store.write_bytes("records/mvtec_ad/grid/padim/0.json", b"{")
    put(registry, 2)
    with pytest.raises(Damaged, match=r"records/mvtec_ad/grid/padim/0\.json"):
        registry.collect(GRID, 1)
    assert registry.numbers(GRID) == [1, 2, 3]


def test_what_an_interrupted_writer_left_is_collected_a_week_later(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = f"registry/{GRID}/1/{int(time.time())}-0123abcd/{STATE}"
    registry.store.write_bytes(begun, b"half")
    put(registry)
    registry.collect(GRID, 1)
    assert begun in registry.store.list("registry")  # its writer may be at it
    later = time.time() + ABANDONED_AFTER_S + 60
    monkeypatch.setattr(time, "time", lambda: later)
    registry.collect(GRID, 1)
    assert begun not in registry.store.list("registry")
    assert registry.numbers(GRID) == [2]
    assert registry.read(registry.get(GRID, 2), STATE)


# export


def test_an_exported_version_is_all_that_was_kept(registry: Registry, tmp_path: Path) -> None:
    version = put(registry, 3)
    registry.export(version, tmp_path / "out" / "grid")
    folder = tmp_path / "out" / "grid"
    assert sorted(path.name for path in folder.iterdir()) == [CARD, STATE, "version.json"]
    assert (folder / STATE).read_bytes() == b"\3" * 10
    assert json.loads((folder / "version.json").read_text())["files"] == version.files
    assert list((tmp_path / "out").iterdir()) == [folder]


@pytest.mark.parametrize("place", ["folder", "file", "below a file"])
def test_an_export_overwrites_nothing(place: str, registry: Registry, tmp_path: Path) -> None:
    version = put(registry)
    target = tmp_path / "there"
    if place == "folder":
        target.mkdir()
        (target / "mine").touch()
    else:
        target.touch()
        target = target / "x" if place == "below a file" else target
    with pytest.raises(StorageError, match=r"is there already; give a new folder|cannot be written: .*Not a dir"):
        registry.export(version, target)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_damaged_version_is_not_exported(registry: Registry, tmp_path: Path) -> None:
    version = put(registry)
    registry.store.write_bytes(f"{registry.store.get(f'registry/{GRID}/1').folder}/{STATE}", b"x")
    with pytest.raises(Damaged):
        registry.export(version, tmp_path / "out")
    assert not (tmp_path / "out").exists()
