"""Pieces kept on the disk: fewer questions, never a wrong row, never more bytes than allowed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.ordered import QUICK, epoch_in_batches, same

from cache_service.errors import RowsNotBuiltError
from cache_service.remote.cache import open_remote
from cache_service.storage.disk import DiskCache


def open_kept(origin, folder, max_bytes=10**9):
    return open_remote(origin.url("c"), disk=DiskCache(str(folder), max_bytes), retries=QUICK)


def pieces(folder):
    return sorted(Path(folder).glob("*.rows"))


def test_a_piece_for_which_there_is_no_room_removes_none_of_the_others(tmp_path, monkeypatch):
    disk = DiskCache(str(tmp_path), 10**6)
    disk.put(disk.key_of("small"), b"s" * 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2000))
    disk.put(disk.key_of("large"), b"l" * 10**4)
    assert len(pieces(tmp_path)) == 1


def test_a_second_epoch_asks_the_server_for_no_row(origin, local, tmp_path):
    for size in (7, 50, 300):
        cache = open_kept(origin, tmp_path / "disk")
        assert same(epoch_in_batches(cache, 0, size), local.read(0, 0, 300))
    asked = origin.targets("/rows")
    assert len(asked) == len(set(asked)) == len(pieces(tmp_path / "disk")) == 5  # one a shard


def test_torn_and_changed_pieces_are_asked_for_again(origin, local, tmp_path):
    epoch_in_batches(open_kept(origin, tmp_path), 0, 50)
    files = pieces(tmp_path)
    for number, path in enumerate(files):
        content = bytearray(path.read_bytes())
        if number == 0:
            content = content[: len(content) // 2]
        elif number == 1:
            content = bytearray()
        elif number == 2:
            content = files[3].read_bytes()
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)
    asked = len(origin.targets("/rows"))
    assert same(epoch_in_batches(open_kept(origin, tmp_path), 0, 50), local.read(0, 0, 300))
    assert len(origin.targets("/rows")) == asked + 5
    assert same(epoch_in_batches(open_kept(origin, tmp_path), 0, 50), local.read(0, 0, 300))
    assert len(origin.targets("/rows")) == asked + 5


def test_the_least_recently_used_pieces_make_room(tmp_path):
    disk = DiskCache(str(tmp_path), 2500)
    (tmp_path / "mine.txt").write_bytes(bytes(5000))  # not ours: not counted, not removed
    keys = [DiskCache.key_of(number) for number in range(4)]
    for number, key in enumerate(keys[:2]):
        disk.put(key, bytes(1000))
        os.utime(tmp_path / f"{key}.rows", (number + 1, number + 1))
    disk.get(keys[0])
    disk.put(keys[2], bytes(1000))
    assert [disk.get(key) is not None for key in keys] == [True, False, True, False]
    disk.put(keys[3], bytes(5000))
    assert [disk.get(key) is not None for key in keys] == [True, False, True, False]
    (tmp_path / f"{keys[1]}.tmp").write_bytes(bytes(2000))  # of a process that was killed
    disk.put(keys[3], bytes(100))
    assert [disk.get(key) is not None for key in keys] == [True, False, True, True]
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name[0] != ".") == [
        ".rows",
        ".rows",
        ".rows",
        ".txt",
    ]


def test_a_small_disk_cache_still_gives_every_row(origin, local, tmp_path):
    bound = 60_000
    cache = open_kept(origin, tmp_path, bound)
    for seed in (0, 1, 0):
        assert same(epoch_in_batches(cache, seed, 20), local.read(seed, 0, 300))
        assert sum(path.stat().st_size for path in pieces(tmp_path)) <= bound
    assert pieces(tmp_path)


def test_a_disk_that_refuses_is_done_without(origin, local, tmp_path, caplog, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = open_kept(origin, tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert same(epoch_in_batches(cache, 0, 20), local.read(0, 0, 300))
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert pieces(tmp_path) == []
    (tmp_path / "file").touch()
    cache = open_kept(origin, tmp_path / "file")
    assert same(epoch_in_batches(cache, 1, 20), local.read(1, 0, 300))


def test_workers_share_what_one_of_them_fetched(origin, local, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    with processes.Pool(3) as pool:
        cache = open_kept(origin, tmp_path)
        found = pool.map(_epoch, [(cache, 0), (cache, 0), (cache, 0), (cache, 1)], chunksize=1)
    wanted = [_digest(local.read(seed, 0, 300)) for seed in (0, 0, 0, 1)]
    assert found == wanted
    asked = origin.targets("/rows")
    assert len(asked) == len(set(asked)) == 10


def test_rows_that_are_not_recorded_are_not_kept(origin, tmp_path):
    cache = open_kept(origin, tmp_path)
    with pytest.raises(RowsNotBuiltError, match="of seed 7 are not recorded"):
        cache.read(7, 0, 5)
    assert pieces(tmp_path) == []


def _epoch(task):
    cache, seed = task
    return _digest(epoch_in_batches(cache, seed, 30))


def _digest(rows):
    return json.dumps({name: values.tobytes().hex() for name, values in rows.items()})
