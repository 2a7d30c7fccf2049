"""The store when things break: a full disk, killed processes, many writers, errors while cleaning up."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from storage.records import RunRecord, read_records, write_record
from storage.store import ABANDONED_AFTER_S, Store

SPAWN = multiprocessing.get_context("spawn")
PATIENCE_S = 60


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def files(store: Store) -> list[str]:
    """Every file on the disk, those being written too."""
    root = Path(store.url)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def start(work: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """Another process doing this."""
    process = SPAWN.Process(target=work, args=args)
    process.start()
    return process


def finish(*processes: multiprocessing.process.BaseProcess) -> None:
    """Wait until they have ended well."""
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def kill(process: multiprocessing.process.BaseProcess) -> None:
    """What `kill -9` or the kernel out of memory does."""
    process.kill()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL


# full disk: a limit on the size of files fails a write in the middle, as a full disk does, and needs no privilege


def _fill_the_disk(bytes_left: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the signal ends the process before the error is seen
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _replace_on_full_disk(store: Store) -> None:
    _fill_the_disk(10_000)
    with pytest.raises(OSError, match="File too large") as caught:
        store.write_bytes("models/a", b"new" * 100_000)
    assert caught.value.errno == errno.EFBIG
    store.write_bytes("models/b", b"small")


def _write_array_on_full_disk(store: Store) -> None:
    _fill_the_disk(10_000)
    with pytest.raises(OSError, match="File too large"), store.draft("maps/a") as draft:
        _write_array(store, draft.folder)


def _write_array(store: Store, folder: str) -> None:
    store.write_bytes(f"{folder}/small", b"1")
    noise = np.random.default_rng(0).integers(0, 256, (4, 100, 100), dtype=np.uint8)  # does not compress
    array = zarr.create_array(
        store=store.zarr_store(f"{folder}/x"), shape=noise.shape, chunks=(2, 100, 100), dtype="uint8"
    )
    array[:] = noise


def test_a_full_disk_leaves_the_old_value_and_no_litter(store: Store) -> None:
    store.write_bytes("models/a", b"old")
    finish(start(_replace_on_full_disk, store))
    assert store.read_bytes("models/a") == b"old"
    assert files(store) == ["models/a", "models/b"]


def test_a_full_disk_leaves_no_half_written_output(store: Store) -> None:
    finish(start(_write_array_on_full_disk, store))
    assert store.find("maps/a") is None
    assert files(store) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_last_moment_leaves_the_old_value(
    store: Store, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_json("a.json", "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left") as caught:
            store.write_json("a.json", "new")
    assert caught.value.errno == errno.ENOSPC
    assert store.read_json("a.json") == "old"
    assert files(store) == ["a.json"]


def test_a_full_disk_at_the_commit_leaves_no_output(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"), store.draft("a") as draft:
        _commit_on_full_disk(draft, patch)
    assert store.find("a") is None
    assert files(store) == []


def _commit_on_full_disk(draft: Any, patch: pytest.MonkeyPatch) -> None:
    draft.store.write_bytes(f"{draft.folder}/x", b"1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "replace", full)
    draft.commit({})


# killed processes


def _write_half_an_output(store: Store, half: Connection) -> None:
    with store.draft("maps/a") as draft:
        _write_array(store, draft.folder)
        half.send(draft.folder)
        time.sleep(PATIENCE_S)
        draft.commit({"tag": "never"})


def test_what_a_killed_writer_left_is_not_read_and_stops_nobody(store: Store) -> None:
    here, there = SPAWN.Pipe()
    process = start(_write_half_an_output, store, there)
    assert here.poll(PATIENCE_S)
    folder = here.recv()
    kill(process)
    assert [key for key in files(store) if not key.startswith(f"{folder}/")] == []
    assert f"{folder}/small" in files(store)  # it was killed in the middle, not before
    assert store.find("maps/a") is None

    with store.draft("maps/a") as draft:
        store.write_bytes(f"{draft.folder}/small", b"2")
        draft.commit({"tag": "next"})
    found = store.get("maps/a")
    assert found.meta == {"tag": "next"}
    assert store.list(found.folder) == [f"{found.folder}/small"]


def test_what_a_killed_writer_left_is_swept_a_week_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = SPAWN.Pipe()
    process = start(_write_half_an_output, store, there)
    assert here.poll(PATIENCE_S)
    kill(process)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + ABANDONED_AFTER_S + PATIENCE_S)
    with store.draft("maps/a"):
        pass
    assert files(store) == []


def _replace_for_ever(store: Store, running: Connection) -> None:
    for i in range(1_000_000):
        store.write_json("a.json", [i] * 20_000)
        running.send(i)


@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.015])
def test_a_value_whose_writer_is_killed_is_old_or_new(store: Store, delay_s: float) -> None:
    here, there = SPAWN.Pipe(duplex=False)
    process = start(_replace_for_ever, store, there)
    assert here.poll(PATIENCE_S)
    time.sleep(delay_s)
    kill(process)
    value = store.read_json("a.json")
    assert len(value) == 20_000
    assert len(set(value)) == 1
    assert store.list("") == ["a.json"]  # a file that was being written may lie there, unseen


# many writers


def record(writer: int, i: int) -> RunRecord:
    cell = f"{writer:02}{i:04}"
    return RunRecord("d", "c", "m", {"n": i}, seed=writer, cell=cell, status="done", metrics={"image_auroc": i / 1000})


def _write_records(store: Store, writer: int, shared: int) -> None:
    for i in range(60):
        write_record(store, record(writer, i))
        write_record(store, record(99, i % shared))


def test_two_processes_write_records_while_another_reads_them(store: Store) -> None:
    before = [record(0, i) for i in range(20)]
    for old in before:
        write_record(store, old)
    processes = [start(_write_records, store, writer, 5) for writer in (1, 2)]
    looks = 0
    while any(process.is_alive() for process in processes):
        assert list(read_records(store))[:20] == before
        looks += 1
    finish(*processes)
    assert looks > 1
    expected = before + [record(writer, i) for writer in (1, 2) for i in range(60)] + [record(99, i) for i in range(5)]
    assert list(read_records(store)) == expected
    assert len(files(store)) == len(expected)


def _write_outputs(store: Store, tag: str) -> None:
    for i in range(15):
        with store.draft("maps/a") as draft:
            for name in ("x", "y"):
                store.write_bytes(f"{draft.folder}/{name}", f"{tag}{i}".encode() * 5000)
            draft.commit({"tag": f"{tag}{i}"})


def test_two_processes_write_one_output_and_a_reader_gets_a_whole_one(store: Store) -> None:
    processes = [start(_write_outputs, store, tag) for tag in ("one", "two")]
    seen = set()
    while any(process.is_alive() for process in processes):
        found = store.find("maps/a")
        if found is not None:
            wanted = found.meta["tag"].encode() * 5000
            assert [store.read_bytes(f"{found.folder}/{name}") == wanted for name in ("x", "y")] == [True, True]
            seen.add(found.meta["tag"])
    finish(*processes)
    assert len(seen) > 1


# cleaning up


def test_an_error_while_removing_a_draft_does_not_hide_the_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(Exception):
        """As boto's: no OSError."""

    def delete(*_: object) -> None:
        raise Unreachable

    monkeypatch.setattr(Store, "delete", delete)
    with pytest.raises(ValueError, match="why"), store.draft("a"):
        raise ValueError("why")


def test_litter_that_cannot_be_removed_stops_no_writer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_bytes("a/1-0123abcd/x", b"1")

    def delete(*_: object) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(Store, "delete", delete)
    with store.draft("a") as draft:
        draft.commit({"tag": "next"})
    assert store.get("a").meta == {"tag": "next"}
