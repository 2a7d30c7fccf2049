"""The contract of the store, on a local folder, in memory and on an S3 server: whole values, whole outputs, or none."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from storage.errors import Damaged, NotInStore, NotStorable, StoreTooNew
from storage.store import ABANDONED_AFTER_S, FORMAT, Store

PATIENCE_S = 30


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store of each kind."""
    if request.param == "local":
        url = str(tmp_path / "store")
    elif request.param == "memory":
        url = f"memory://{tmp_path.name}"
    else:
        url = f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    made = Store(url)
    yield made
    made.delete("")


def elsewhere(store: Store) -> Store:
    """The same place as another process sees it: nothing this one remembers is shared."""
    return Store(store.url, {"listings_expiry_time": 3600})  # other options, so fsspec makes another file system


def seen_while(change: Callable[[], object], look: Callable[[], Any], seconds: float) -> set[Any]:
    """All that a reader saw while something kept changing; it goes on until it has seen a change."""
    look()  # the first look also connects
    end = time.monotonic() + seconds

    def watch() -> set[Any]:
        seen = set()
        while time.monotonic() < end or (len(seen) == 1 and time.monotonic() < end + PATIENCE_S):
            seen.add(look())
        return seen

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        while not watching.done():
            change()
        return watching.result()


def put_output(store: Store, key: str, tag: str, files: int = 3) -> None:
    """An output whose files all say who wrote them."""
    with store.draft(key) as draft:
        for i in range(files):
            store.write_bytes(f"{draft.folder}/{i}.bin", tag.encode() * 1000)
        draft.commit({"tag": tag})


def begin_and_fail(store: Store, key: str, error: type[BaseException] = ValueError) -> None:
    """A writer that fails half-way."""
    with store.draft(key) as draft:
        store.write_bytes(f"{draft.folder}/x/y", b"1")
        array = zarr.create_array(
            store=store.zarr_store(f"{draft.folder}/z"), shape=(4, 2), chunks=(1, 2), dtype="uint8"
        )
        array[:] = 1
        assert len(elsewhere(store).list(draft.folder)) == 6
        raise error("why")


def writers_of(store: Store, key: str) -> set[str]:
    """Whom the manifest and the files of an output name: one writer when the output is whole."""
    found = store.get(key)
    files = [store.read_bytes(f"{found.folder}/{i}.bin").decode() for i in range(3)]
    return {found.meta["tag"]} | {text[: len(text) // 1000] if len(text) % 1000 == 0 else text for text in files}


# values


@pytest.mark.parametrize("data", [b"", b"\x00\xff", np.random.default_rng(0).bytes(1 << 20)], ids=["0", "2", "1 MiB"])
def test_bytes_come_back_as_written(store: Store, data: bytes) -> None:
    store.write_bytes("models/a b/ü.bin", data)
    assert store.read_bytes("models/a b/ü.bin") == data


def test_json_comes_back_as_written(store: Store) -> None:
    value = {"text": "Kratzer ü", "number": 0.1, "none": None, "list": [1, [2.5, True]], "empty": {}}
    store.write_json("a/b.json", value)
    assert store.read_json("a/b.json") == value


def test_a_value_is_replaced(store: Store) -> None:
    store.write_json("a.json", {"long": "x" * 1000})
    store.write_json("a.json", 1)
    assert store.read_json("a.json") == 1
    assert store.list("") == ["a.json"]


@pytest.mark.parametrize("key", ["nothing", "nothing/at/all", "folder", "folder/file/below"])
def test_a_key_that_is_not_there_is_not_in_store(store: Store, key: str) -> None:
    store.write_bytes("folder/file", b"1")
    with pytest.raises(NotInStore, match=f"{key} is not in {store.url}"):
        store.read_bytes(key)
    assert store.find(key) is None


@pytest.mark.parametrize("key", ["/etc/passwd", "..", "../other", "a/../../other", "a/..", ".", "a//b", "a/./b", "a/"])
def test_a_key_that_leaves_the_store_is_refused(store: Store, key: str) -> None:
    neighbour = Store(f"{store.url}-neighbour")
    neighbour.write_bytes("other", b"mine")
    for action in (store.read_bytes, store.list, store.delete, store.zarr_store, lambda k: store.write_bytes(k, b"2")):
        with pytest.raises(NotInStore, match="is not a key"):
            action(key)
    with pytest.raises(NotInStore, match="is not a key"), store.draft(key) as draft:
        store.write_bytes(f"{draft.folder}/a", b"3")
    assert neighbour.read_bytes("other") == b"mine"
    neighbour.delete("")


@pytest.mark.parametrize("data", [b'{"half": ', b"", b"\xff\xfe\xfd\x80"], ids=["cut", "empty", "no text"])
def test_damaged_json_says_so(store: Store, data: bytes) -> None:
    store.write_bytes("a.json", data)
    with pytest.raises(Damaged, match=r"a\.json in .* is not JSON .*; delete it and run again"):
        store.read_json("a.json")


@pytest.mark.parametrize("manifest", [[], "text", {"meta": {}}, {"folder": "a/1-12345678"}])
def test_a_damaged_manifest_says_so(store: Store, manifest: Any) -> None:
    store.write_json("a/manifest.json", manifest)
    with pytest.raises(Damaged, match=r"a/manifest\.json in .* is no manifest; delete it and run again"):
        store.find("a")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1.0, {"b": float("nan")}]}, r"a\.1\.b is nan"),
        (float("inf"), "the value is inf"),
        ({"n": np.float32(1)}, "float32 is not JSON serializable"),
    ],
)
def test_what_json_cannot_hold_is_refused_and_the_old_value_stays(store: Store, value: Any, where: str) -> None:
    store.write_json("a.json", "old")
    with pytest.raises(NotStorable, match=rf"a\.json cannot be written: .*{where}.*; give finite numbers"):
        store.write_json("a.json", value)
    assert store.read_json("a.json") == "old"


def test_a_reader_sees_whole_values_while_a_writer_replaces_them(store: Store) -> None:
    values = [bytes([i]) * size for i, size in enumerate((300_000, 10, 200_000))]
    upcoming = itertools.cycle(values)
    store.write_bytes("a", values[0])
    seen = seen_while(lambda: store.write_bytes("a", next(upcoming)), lambda: elsewhere(store).read_bytes("a"), 0.5)
    assert len(seen) > 1
    assert seen <= set(values)


def test_a_large_s3_object_is_not_read_in_parts_of_two_values(bucket: str, tmp_path: Path) -> None:
    store = Store(f"{bucket}/{tmp_path.name}", {"default_block_size": 1024})  # so that 8 KiB are large
    values = [bytes([i]) * 8192 for i in range(4)]
    upcoming = itertools.cycle(values)
    store.write_bytes("a", values[0])
    seen = seen_while(lambda: store.write_bytes("a", next(upcoming)), lambda: store.read_bytes("a"), 2)
    assert len(seen) > 1
    assert seen <= set(values)


# listing and deleting


def test_a_list_holds_what_lies_below_a_folder_and_no_sibling(store: Store) -> None:
    for key in ("records/b/2.json", "records/a.json", "records2/c.json", "record/d.json"):
        store.write_json(key, 0)
    assert store.list("records") == ["records/a.json", "records/b/2.json"]
    assert store.list("") == ["record/d.json", "records/a.json", "records/b/2.json", "records2/c.json"]
    assert store.list("rec") == []


def test_a_list_leaves_out_files_being_written(store: Store) -> None:
    store.write_bytes("records/a.json", b"1")
    store.write_bytes("records/a.json.0123456789abcdef.partial", b"")
    assert store.list("records") == ["records/a.json"]


def test_delete_removes_a_file_or_a_folder_and_no_sibling(store: Store) -> None:
    for key in ("records/a", "records/b/c", "records2/a", "one", "other"):
        store.write_bytes(key, b"1")
    store.delete("records")
    store.delete("one")
    store.delete("nothing/there")
    assert store.list("") == ["other", "records2/a"]


def test_names_with_pattern_characters_are_only_names(store: Store) -> None:
    for key in ("part[1]/x/a", "part1/x/a", "star*/a", "starry/a", "what?/a", "whatever/a"):
        store.write_bytes(key, b"1")
    assert store.list("part[1]") == ["part[1]/x/a"]
    for key in ("part[1]/x", "star*", "what?", "none*"):
        store.delete(key)
    assert store.list("") == ["part1/x/a", "starry/a", "whatever/a"]


def test_what_another_process_writes_after_a_look_is_seen(store: Store) -> None:
    store.write_bytes("a/x", b"1")
    assert store.list("a") == ["a/x"]
    with store.draft("a"):  # looks for what is abandoned
        pass
    put_output(elsewhere(store), "a", "late")
    assert writers_of(store, "a") == {"late"}
    assert len(store.list("a")) == 5
    elsewhere(store).write_bytes("a/1-0123abcd/abandoned", b"2")
    with store.draft("a"):
        pass
    assert len(store.list("a")) == 5
    elsewhere(store).write_bytes("a/y", b"3")
    store.delete("a")
    assert elsewhere(store).list("a") == []


# outputs


def test_an_output_is_invisible_until_it_is_committed(store: Store) -> None:
    with store.draft("maps/a") as draft:
        store.write_bytes(f"{draft.folder}/x", b"1")
        assert elsewhere(store).find("maps/a") is None
        with pytest.raises(NotInStore, match=r"maps/a is not complete in .*; run the step that makes it"):
            store.get("maps/a")
        made = draft.commit({"ids": ["a", "b"], "seconds": 0.5})
    assert elsewhere(store).get("maps/a") == made
    assert made.meta == {"ids": ["a", "b"], "seconds": 0.5}
    assert store.read_bytes(f"{made.folder}/x") == b"1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_draft_that_ends_in_an_error_is_removed(store: Store, error: type[BaseException]) -> None:
    with pytest.raises(error, match="why"):
        begin_and_fail(store, "maps/a", error)
    assert store.find("maps/a") is None
    assert store.list("") == []


def test_a_draft_that_is_not_committed_is_removed(store: Store) -> None:
    with store.draft("maps/a") as draft:
        store.write_bytes(f"{draft.folder}/x", b"1")
    assert store.list("") == []


def test_a_failed_second_writer_leaves_the_first_output(store: Store) -> None:
    put_output(store, "a", "first")
    with pytest.raises(ValueError, match="why"):
        begin_and_fail(store, "a")
    assert writers_of(store, "a") == {"first"}
    assert len(store.list("a")) == 4


def test_the_later_of_two_writers_wins_and_the_other_stays_readable(store: Store) -> None:
    with store.draft("a") as one, store.draft("a") as two:
        assert one.folder != two.folder
        for draft, tag in ((one, b"one"), (two, b"two")):
            store.write_bytes(f"{draft.folder}/x", tag)
        opened = one.commit({"tag": "one"})
        two.commit({"tag": "two"})
    found = store.get("a")
    assert found.meta["tag"] == "two"
    assert store.read_bytes(f"{found.folder}/x") == b"two"
    assert store.read_bytes(f"{opened.folder}/x") == b"one"  # someone may be in the middle of reading it


def test_a_reader_gets_one_whole_output_while_two_write_it(store: Store) -> None:
    put_output(store, "a", "none")

    def write_twice() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda tag: put_output(elsewhere(store), "a", tag), ["one", "two"]))

    seen = seen_while(write_twice, lambda: frozenset(writers_of(store, "a")), 1)
    assert len(seen) > 1
    assert {len(writers) for writers in seen} == {1}


def test_what_writers_left_a_week_ago_is_swept_and_nothing_else(store: Store) -> None:
    now = int(time.time())
    abandoned, fresh, kept = (f"{now - ABANDONED_AFTER_S + s}-0123abc{i}" for i, s in enumerate((-60, 60, -9999)))
    others = ["2019-parts", "0-0", "images", f"{now - 2 * ABANDONED_AFTER_S}"]  # not the names of drafts
    for folder in (abandoned, fresh, kept, *others):
        store.write_bytes(f"a/{folder}/x", b"1")
    store.write_bytes(f"b/{abandoned}/x", b"1")
    store.write_json("a/manifest.json", {"folder": f"a/{kept}", "meta": {}})
    with store.draft("a"):
        pass
    expected = sorted([f"a/{folder}/x" for folder in (fresh, kept, *others)] + ["a/manifest.json"])
    assert store.list("a") == expected
    assert store.list("b") == [f"b/{abandoned}/x"]  # swept by b's next writer


# arrays


def test_an_array_comes_back_as_written_by_several_threads(store: Store) -> None:
    values = np.random.default_rng(1).normal(size=(7, 4, 3)).astype(np.float16)
    values[1] = 0  # an all-zero chunk is a value, not a gap
    with store.draft("features/a") as draft:
        made = store.create_array(f"{draft.folder}/layer1", values.shape, "float16", chunk=1, shard=2)

        def write(start: int) -> None:
            made[start : start + 2] = values[start : start + 2]

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(write, range(0, 7, 2)))
        draft.commit({})
    other = pickle.loads(pickle.dumps(store))
    found = zarr.open_array(other.zarr_store(f"{other.get('features/a').folder}/layer1"), mode="r")
    assert found.shards == (2, 4, 3)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found[:], values)
    np.testing.assert_array_equal(found.oindex[[5, 1]], values[[5, 1]])


def test_an_array_that_is_not_there_is_not_found(store: Store) -> None:
    store.write_bytes("a/b", b"1")
    with pytest.raises(FileNotFoundError):
        zarr.open_array(store.zarr_store("a/layer1"), mode="r")
    assert store.list("") == ["a/b"]


# the store itself


def test_a_new_store_is_marked_and_known_again(store: Store) -> None:
    store.check_format()
    store.check_format()
    assert store.read_json("store.json") == {"format": FORMAT}


@pytest.mark.parametrize("mark", [{"format": FORMAT + 1}, {"format": "2.0"}, {}, []])
def test_a_store_of_a_newer_version_is_refused_and_left_alone(store: Store, mark: Any) -> None:
    store.write_json("store.json", mark)
    with pytest.raises(StoreTooNew, match=f"reads up to {FORMAT}; update the program, or give another store"):
        store.check_format()
    assert store.read_json("store.json") == mark


def test_a_store_pickles(store: Store) -> None:
    store.write_bytes("a", b"1")  # so that whatever it keeps open is open
    other = pickle.loads(pickle.dumps(store))
    assert other == store
    assert other.read_bytes("a") == b"1"


def test_eight_threads_share_a_store(store: Store) -> None:
    fresh = {"listings_expiry_time": 8}  # so that they also race to connect
    start = threading.Barrier(8)

    def work(i: int) -> list[bytes]:
        mine = Store(store.url, fresh)
        start.wait()
        for n in range(5):
            mine.write_bytes(f"{i}/{n}", f"{i} {n}".encode())
        return [mine.read_bytes(key) for key in mine.list(str(i))]

    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(work, range(8)))
    assert read == [[f"{i} {n}".encode() for n in range(5)] for i in range(8)]


def test_a_relative_folder_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("here")
    store.write_bytes("a", b"1")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")  # as a worker's may be
    assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"1"
    assert Store(store.url) == store


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Store("~/store").write_bytes("a", b"1")
    assert (tmp_path / "store/a").read_bytes() == b"1"


def test_only_a_folder_is_local(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).is_local
    assert Store(tmp_path.as_uri()).is_local
    assert not Store("memory://a").is_local
