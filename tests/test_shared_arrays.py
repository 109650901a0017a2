from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache_service import shared_arrays
from cache_service.datasets.path_list import PathList
from cache_service.errors import OutOfSpaceError, StorageError, WorkersError
from cache_service.shared_arrays import GrowingArray, computed_once, share

LARGE = np.arange(shared_arrays.SHARED_FROM // 8 + 1)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A temporary folder of the test; what it leaves is found there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(shared_arrays.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_arrays, "_folders", {})
    return tmp_path


def run(program, **variables):
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | variables,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def send_back(array, queue):
    queue.put((np.asarray(array).sum(), str(array._file)))


def test_a_large_array_is_mapped_by_a_child_process_and_not_copied_to_it(temporary):
    shared = share(LARGE)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=send_back, args=(shared, queue))
    child.start()
    assert queue.get(timeout=60) == (LARGE.sum(), str(shared._file))
    child.join()
    assert shared._file.is_relative_to(temporary)


def test_elsewhere_its_content_is_sent():
    copy = pickle.loads(pickle.dumps(share(LARGE)))
    assert type(copy) is np.ndarray
    assert np.array_equal(copy, LARGE)


def test_a_shared_array_is_read_only_and_gives_plain_arrays():
    shared = share(LARGE)
    with pytest.raises(ValueError, match="read-only"):
        shared.sort()
    assert type(shared[[3, 5]]) is np.ndarray
    assert shared[[3, 5]].tolist() == [3, 5]
    assert share(shared) is shared


def test_a_small_array_needs_no_file(temporary):
    small = np.arange(10)
    assert share(small) is small
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("pieces", [0, 1, 3, 40])
def test_an_array_grows_by_pieces_into_a_file(pieces):
    growing = GrowingArray(np.int64)
    for piece in range(pieces):
        growing.append(np.arange(10_000, dtype=np.int32) + piece)
    expected = [value + piece for piece in range(pieces) for value in range(10_000)]
    assert growing.finish().tolist() == expected


def test_the_file_goes_with_its_array(temporary):
    shared = share(LARGE)
    file, part = shared._file, shared[5:8]
    del shared
    assert part.tolist() == [5, 6, 7]
    assert file.exists()
    del part
    assert not file.exists()


def test_paths_are_joined_as_they_always_were(monkeypatch):
    names = [f"class {number % 7}/{number}-\udcff.png" for number in range(1000)]
    expected = b"\0".join(map(os.fsencode, names))
    for group in (1, 3, 1000):
        monkeypatch.setattr("cache_service.datasets.path_list.GROUP", group)
        paths = PathList(names)
        assert paths.joined.tobytes() == expected
        assert [paths[sample] for sample in (0, 1, 999)] == [
            os.fsencode(names[sample]) for sample in (0, 1, 999)
        ]
        assert paths.select([5, 2]).joined.tobytes() == b"\0".join(
            os.fsencode(names[sample]) for sample in (5, 2)
        )
    assert not PathList()


COMPUTE = """
import numpy as np, time
from cache_service.shared_arrays import computed_once
def make():
    print("computed")
    time.sleep(0.5)
    return [np.arange(5), np.ones(3, np.float32)]
found = computed_once("numbers", make)
assert found[0].tolist() == [0, 1, 2, 3, 4] and found[1].dtype == np.float32
assert not found[0].flags.writeable
"""


def test_several_processes_compute_an_array_once():
    command = [sys.executable, "-c", COMPUTE]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sum(output.count(b"computed") for output in outputs) == 1


def test_the_oldest_entries_are_removed_and_computed_again():
    computed = []

    def entry(number):
        return computed_once(f"entry-{number}", lambda: [computed.append(number), LARGE][1:])[0]

    kept = [entry(number) for number in range(shared_arrays.KEPT + 2)]
    entries = [path for path in shared_arrays._common_folder().iterdir() if path.is_dir()]
    assert len(entries) == shared_arrays.KEPT
    assert np.array_equal(kept[0], LARGE)  # the mapping stays
    entry(shared_arrays.KEPT + 1)
    entry(0)
    assert computed == [*range(shared_arrays.KEPT + 2), 0]


def test_a_child_keeps_nothing_when_it_ends(temporary):
    process = multiprocessing.get_context("spawn").Process(
        target=computed_once, args=("numbers", make_large)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not list(temporary.iterdir())


def make_large():
    return [LARGE]


KILLED = """
import numpy as np, os, signal
from cache_service.shared_arrays import computed_once, share
computed_once("numbers", lambda: [np.arange(3)])
kept = share(np.arange(1_000_000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_not_taken(temporary):
    with pytest.raises(subprocess.CalledProcessError) as killed:
        run(KILLED)
    assert killed.value.returncode == -signal.SIGKILL
    (left,) = temporary.glob("*/owner")
    assert "computed" in run(COMPUTE)  # it computes again: half of a file may have been written
    mine = share(LARGE)
    assert not left.exists()
    run(KILLED.split("os.kill", maxsplit=1)[0])  # another process sweeps, too
    assert mine._file.exists()


@pytest.mark.parametrize("program", [COMPUTE, KILLED.split("os.kill", maxsplit=1)[0]])
def test_folders_are_removed_at_the_end(temporary, program):
    run(program)
    assert not list(temporary.iterdir())


def test_the_common_folder_lives_as_long_as_one_of_its_users(temporary):
    computed_once("numbers", lambda: [np.arange(5), np.ones(3, np.float32)])
    assert "computed" not in run(COMPUTE)
    assert shared_arrays._common_folder().is_dir()


def test_a_folder_of_another_user_is_not_trusted(temporary, monkeypatch):
    (temporary / f"{shared_arrays.PREFIX}12345").mkdir()
    monkeypatch.setattr(shared_arrays.os, "getuid", lambda: 12345)
    assert shared_arrays._common_folder().name != f"{shared_arrays.PREFIX}12345"


def test_a_link_in_place_of_the_common_folder_is_not_followed(temporary):
    precious = temporary / "data" / "images"
    precious.mkdir(parents=True)
    (temporary / f"kd-cache-{os.getuid()}").symlink_to(precious.parent)
    (array,) = computed_once("order", lambda: [LARGE])
    np.testing.assert_array_equal(array, LARGE)
    assert precious.is_dir()
    assert list(precious.parent.iterdir()) == [precious]


def test_a_folder_that_cannot_be_made_is_said(temporary, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shared_arrays.tempfile, "mkdtemp", refuse)
    with pytest.raises(StorageError, match=r"cannot make a folder in .* \(Permission denied\)"):
        share(LARGE)


def test_a_fork_does_not_remove_what_its_parent_uses(temporary):
    shared = [share(LARGE)]
    child = multiprocessing.get_context("fork").Process(target=shared.clear)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert shared[0]._file.exists()


def test_a_folder_that_is_gone_is_made_again(temporary):
    computed_once("numbers", lambda: [LARGE])
    for folder in temporary.iterdir():
        shutil.rmtree(folder)
    assert np.array_equal(computed_once("numbers", lambda: [LARGE])[0], LARGE)


def test_a_child_whose_parent_has_gone_says_so(tmp_path):
    with pytest.raises(WorkersError, match=r"x\.bin is gone"):
        shared_arrays._map(tmp_path / "x.bin", "<i8", (3,))


def test_a_full_temporary_folder_is_refused_by_name(monkeypatch, temporary):
    def full(*_arguments, **_settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    shared_arrays._common_folder()
    monkeypatch.setattr(shared_arrays.np, "save", full)
    with pytest.raises(OutOfSpaceError, match=rf"{temporary} has no room for 1\.0 MB.*TMPDIR"):
        computed_once("numbers", lambda: [LARGE])
    assert not list(Path(shared_arrays._common_folder()).glob("*.tmp"))
