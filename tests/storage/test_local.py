"""A folder as storage: who reserves, what is left behind, and what a full disk does."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from pathlib import Path

import pytest
from support import holders
from support.disks import small_disk

from cache_service.errors import OutOfSpaceError, StorageError
from cache_service.storage import local
from cache_service.storage.local import SCRATCH, LocalStorage

WAIT_S = 30


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def storage(root):
    return LocalStorage(str(root))


def leftovers(root: Path) -> list[str]:
    return sorted(path.name for path in (root / SCRATCH).glob("*"))


def no_locks(_handle, _how):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def killed(process, said):
    """Wait for a process that was killed or kills itself."""
    process.join(WAIT_S)
    assert process.exitcode == -9
    said.close()


# --- reservations ----------------------------------------------------------------------------


def test_a_reservation_excludes_others_until_it_is_given_back(root):
    first, second = LocalStorage(str(root)), LocalStorage(str(root))
    assert first.begin("0-1") is True
    assert second.begin("0-1") is False
    assert first.begin("0-1") is False, "not even the holder has it twice"
    assert second.begin("0-2") is True
    first.end("0-1")
    assert second.begin("0-1") is True


def test_a_reservation_ends_when_its_process_is_killed(storage, root):
    process, said = holders.start(holders.hold, str(root), "0-1")
    assert said.recv() is True
    assert storage.begin("0-1") is False
    process.kill()
    killed(process, said)
    assert storage.begin("0-1") is True


def test_a_reservation_ends_with_its_builder_though_a_forked_worker_lives_on(storage, root):
    process, said = holders.start(holders.hold_with_a_worker, str(root), "0-1")
    reserved, worker = said.recv()
    assert reserved is True
    try:
        assert storage.begin("0-1") is False
        process.kill()
        killed(process, said)
        os.kill(worker, 0)  # still there
        assert storage.begin("0-1") is True
    finally:
        os.kill(worker, 9)


def test_reserving_and_sweeping_from_many_threads_never_gives_one_piece_to_two(root):
    holders_now, worst = [], []

    def work() -> None:
        storage = LocalStorage(str(root))
        for _ in range(60):
            if storage.begin("0-0"):
                holders_now.append(1)
                worst.append(len(holders_now))
                holders_now.pop()
                storage.end("0-0")
            storage.sweep()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(worst) == {1}
    assert leftovers(root) == []


# --- what is left behind ---------------------------------------------------------------------


def test_a_sweep_removes_what_a_killed_writer_left_and_nothing_else(storage, root):
    process, said = holders.start(holders.die_while_writing, str(root), "rows")
    killed(process, said)
    (dead,) = leftovers(root)
    alive = f"{socket.gethostname()}~{os.getpid()}~0.tmp"
    elsewhere = f"another-host~{process.pid}~0.tmp"
    for name in (alive, elsewhere, "somebody's notes"):
        (root / SCRATCH / name).write_bytes(b"")
    held = LocalStorage(str(root))
    assert held.begin("0-7")

    storage.sweep()

    assert dead not in leftovers(root)
    assert leftovers(root) == sorted([alive, elsewhere, "somebody's notes", "0-7.lock"])
    assert storage.list("") == ["rows"]
    assert storage.get("rows") == b"whole"
    assert LocalStorage(str(root)).begin("0-7") is False, "a sweep must not end a reservation"


def test_a_sweep_leaves_the_file_of_a_living_writer_with_another_view_of_processes(storage, root):
    storage.put("before", b"")
    process, said = holders.start(holders.write_slowly, str(root), "rows")
    assert said.recv() == "written"
    (written,) = leftovers(root)
    assert f"~{1 << 22}~" in written
    storage.sweep()
    assert leftovers(root) == [written]
    said.send("go on")
    assert said.recv() == "put"
    assert storage.get("rows") == b"rows"
    process.join(WAIT_S)
    said.close()


def test_the_same_file_is_swept_when_its_writer_is_killed(storage, root):
    storage.put("before", b"")
    process, said = holders.start(holders.write_slowly, str(root), "rows")
    assert said.recv() == "written"
    process.kill()
    killed(process, said)
    assert len(leftovers(root)) == 1
    storage.sweep()
    assert leftovers(root) == []


def test_nothing_is_swept_where_no_lock_tells_the_living_from_the_dead(storage, root, monkeypatch):
    process, said = holders.start(holders.die_while_writing, str(root), "rows")
    killed(process, said)
    (dead,) = leftovers(root)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    storage.sweep()
    assert leftovers(root) == [dead]
    storage.put("rows", b"others")
    assert storage.get("rows") == b"others"


def test_writing_beside_sweepers_who_see_no_living_process_never_fails(root, monkeypatch):
    monkeypatch.setattr(local, "_alive", lambda _process: False)
    stop = threading.Event()

    def sweep() -> None:
        storage = LocalStorage(str(root))
        while not stop.is_set():
            storage.sweep()

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for each in sweepers:
        each.start()
    try:
        storage = LocalStorage(str(root))
        for number in range(60):
            storage.put("rows", b"%d" % number)
            assert storage.create(f"commits/{number}", b"")
    finally:
        stop.set()
        for each in sweepers:
            each.join()
    assert storage.get("rows") == b"59"
    assert len(storage.list("commits/")) == 60


def test_a_sweep_removes_the_empty_folder_and_writing_makes_it_again(storage, root):
    storage.put("key", b"1")
    assert (root / SCRATCH).is_dir()
    storage.sweep()
    assert [path.name for path in root.iterdir()] == ["key"]
    storage.put("key", b"2")
    assert storage.begin("0-0")
    storage.sweep()
    assert leftovers(root) == ["0-0.lock"]


def test_an_interrupted_write_leaves_no_temporary_file(storage, root, monkeypatch):
    def interrupt(_handle):
        raise KeyboardInterrupt

    storage.put("before", b"good")
    monkeypatch.setattr(os, "fsync", interrupt)
    for write in (storage.put, storage.create):
        with pytest.raises(KeyboardInterrupt):
            write("key", b"rows")
    assert leftovers(root) == []
    assert storage.list("") == ["before"]


# --- full disks ------------------------------------------------------------------------------


def test_a_writer_forgets_the_folders_of_finished_shards(storage, monkeypatch):
    monkeypatch.setattr(local, "MAX_FOLDERS", 8)
    for shard in range(20):
        storage.put(f"logits/c/0/{shard}/0", b"row")
    assert len(storage._durable_folders) <= 8
    assert len(storage.list("")) == 20


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        storage = LocalStorage(str(disk / "root"))
        storage.put("before", b"good")
        for write in (storage.put, storage.create):
            with pytest.raises(OutOfSpaceError, match=r"no space left to write .*rows") as refusal:
                write("rows", bytes(2 << 20))
            assert refusal.value.exit_code == 4
            assert "it resumes" in refusal.value.hint
        assert leftovers(disk / "root") == []
        assert storage.list("") == ["before"]
        assert storage.get("before") == b"good"


def test_a_disk_without_room_for_another_name_is_full_too(tmp_path):
    with small_disk(tmp_path / "disk", "1m,nr_inodes=12") as disk:
        storage = LocalStorage(str(disk / "root"))
        with pytest.raises(OutOfSpaceError, match="no space left"):  # noqa: PT012  at one of 20
            for number in range(20):
                storage.put(f"folder{number}/rows", b"rows")
        with pytest.raises(OutOfSpaceError, match="no space left"):  # noqa: PT012  at one of 20
            for number in range(20):
                storage.begin(f"0-{number}")
        assert not any(name.endswith(".tmp") for name in leftovers(disk / "root"))


def test_a_limit_on_file_sizes_is_told_like_a_full_disk(root):
    process, said = holders.start(holders.write_under_a_size_limit, str(root), 50_000)
    refusals, left, keys = said.recv()
    process.join(WAIT_S)
    assert process.exitcode == 0
    assert [type(refusal) for refusal in refusals] == [OutOfSpaceError, OutOfSpaceError]
    assert left == []
    assert keys == ["before", "rows"], "once there is room, the same write goes through"


# --- what is refused otherwise ---------------------------------------------------------------


def test_a_file_in_the_place_of_a_folder_is_refused_in_one_line(storage, root):
    storage.put("logits", b"a file")
    with pytest.raises(StorageError, match=r"cannot write .*logits/c/0"):
        storage.put("logits/c/0", b"rows")
    assert leftovers(root) == []


def test_a_folder_in_the_place_of_an_object_is_refused_in_one_line(storage, root):
    storage.put("logits/c/0", b"rows")
    with pytest.raises(StorageError, match=r"cannot write .*logits"):
        storage.put("logits", b"a file")
    assert storage.create("logits", b"a file") is False
    with pytest.raises(StorageError, match=r"cannot delete .*logits"):
        storage.delete("logits")
    assert leftovers(root) == []


def test_a_key_too_long_for_the_file_system_is_refused_in_one_line(storage):
    storage.put("before", b"")
    key = "x" * 300
    for use in (storage.get, storage.size, storage.delete, lambda key: storage.put(key, b"")):
        with pytest.raises(StorageError, match="File name too long"):
            use(key)


def test_a_pipe_is_not_an_object_and_nobody_waits_for_it(storage, root):
    root.mkdir()
    os.mkfifo(root / "zarr.json")
    assert storage.get("zarr.json") is None
    assert storage.get_ranges("zarr.json", [(0, 1)]) is None
    assert storage.map("zarr.json") is None
    assert storage.list("") == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_in_one_line(storage, root):
    root.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        storage.put("key", b"rows")


def test_a_mapped_object_is_read_only_and_equal_to_the_file(storage):
    storage.put("rows", bytes(range(100)))
    mapped = storage.map("rows")
    assert mapped.tobytes() == bytes(range(100))
    assert not mapped.flags.writeable
    storage.put("empty", b"")
    assert storage.map("empty") is None
