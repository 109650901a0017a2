"""Large read-only arrays that the processes of a computer share, as files in TMPDIR.

The paths and labels of ImageNet-21k take 650 MB and an order of its samples 57 MB. Every loader
worker, builder and rank needs them. They are written to files once and mapped, so that a computer
has them in memory once.

There are two kinds of folders. What a process sends to its children by name lies in a folder of
its own, which it removes at its end. A process that is killed cannot; its folder is removed by the
next one that makes a folder, because a lock tells it that the owner is gone. What is a function of
its name lies in one folder of the user: the first process empties it and the last one removes it,
which locks tell, too.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing.util
import os
import shutil
import stat
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cache_service.errors import OutOfSpaceError, StorageError, WorkersError
from cache_service.human_format import human_bytes

SHARED_FROM = 1 << 20
"""Bytes from which an array lies in a file. Smaller ones are sent to workers in no time."""

KEPT = 8
"""Computed entries that are kept: of ImageNet-21k 450 MB, or 2 GB with repeats. Those in use stay
mapped."""

PREFIX = "kd-cache-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_lock = threading.Lock()
_folders: dict[tuple[str, int], Path] = {}
"""Folders by their kind and the process that made or entered them: a fork has its own."""


class SharedArray(np.ndarray[Any, np.dtype[Any]]):
    """A mapped file. Sent to a child process of this computer, it is mapped there; anywhere else,
    such as to a machine of a cluster, its content is sent. What it is indexed by is a plain array.
    """

    _file: Path | None = None

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[key]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._file is not None and get_spawning_popen() is not None:
            return _map, (self._file, self.dtype.str, self.shape)
        return np.asarray(self).__reduce_ex__(protocol)


class GrowingArray:
    """A one-dimensional array that is appended to; it lies in a file as soon as it is large."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._pieces: list[NDArray[Any]] = []
        self._file: IO[bytes] | None = None
        self._bytes = 0

    def append(self, values: NDArray[Any]) -> None:
        """Append values, which are converted to the type of the array.

        Raises:
            OutOfSpaceError: the temporary folder is full.
        """
        self._pieces.append(np.array(values, self._dtype))
        self._bytes += self._pieces[-1].nbytes
        if self._file is not None or self._bytes >= SHARED_FROM:
            with _refusing(self._bytes):
                if self._file is None:
                    self._file = (_own_folder() / f"{uuid.uuid4().hex}.bin").open("xb")
                for piece in self._pieces:
                    self._file.write(piece.tobytes())
            self._pieces = []

    def finish(self) -> NDArray[Any]:
        """Return the whole array, read-only.

        Raises:
            OutOfSpaceError: the temporary folder is full.
        """
        if self._file is None:
            whole = np.concatenate([np.empty(0, self._dtype), *self._pieces])
            whole.flags.writeable = False
            return whole
        with _refusing(self._bytes), self._file as file:
            file.flush()
        path = Path(file.name)
        shared = _map(path, self._dtype.str, (self._bytes // self._dtype.itemsize,))
        weakref.finalize(shared, _remove, path, os.getpid())  # and of all its views
        return shared


def share(array: NDArray[Any]) -> NDArray[Any]:
    """A one-dimensional array in a file, if it is large and not in one already.

    Raises:
        OutOfSpaceError: the temporary folder is full.
    """
    if array.nbytes < SHARED_FROM or isinstance(array, SharedArray):
        return array
    growing = GrowingArray(array.dtype)
    growing.append(array)
    return growing.finish()


def computed_once(name: str, make: Callable[[], Sequence[NDArray[Any]]]) -> list[NDArray[Any]]:
    """Arrays that one process computes and all others map, read-only.

    Args:
        name: of the arrays, which are a function of it.
        make: computes them.

    Raises:
        OutOfSpaceError: the temporary folder is full.
    """
    while True:
        folder = _common_folder()
        with suppress(FileNotFoundError):  # nobody has computed them, or they were removed just now
            return _load(folder / name)
        with suppress(FileNotFoundError), _locked(folder / f"{name}.lock"):
            if not (folder / name).is_dir():
                _save(folder, name, make())


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> SharedArray:
    try:
        array = np.memmap(path, dtype, "r", shape=shape).view(SharedArray)
    except FileNotFoundError as error:
        raise WorkersError(
            f"{path} is gone, in which the process that started this one keeps its dataset.",
            hint="Run the same command again.",
        ) from error
    array._file = path  # noqa: SLF001  a class of this module
    return array


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of it
        path.unlink(missing_ok=True)


def _load(entry: Path) -> list[NDArray[Any]]:
    return [np.asarray(np.load(file, mmap_mode="r")) for file in sorted(entry.iterdir())]


def _save(folder: Path, name: str, arrays: Sequence[NDArray[Any]]) -> None:
    """Write an entry, then remove the oldest ones above KEPT. Both happen by one renaming."""
    temporary = folder / f"{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        with _refusing(sum(array.nbytes for array in arrays)):
            for number, array in enumerate(arrays):
                with (temporary / f"{number}.npy").open("wb") as file:
                    np.save(file, array)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    temporary.rename(folder / name)
    entries = [path for path in folder.iterdir() if path.is_dir() and path.suffix != ".tmp"]
    for old in sorted(entries, key=_age)[KEPT:]:
        gone = folder / f"{uuid.uuid4().hex}.tmp"
        with suppress(FileNotFoundError):  # another process removed it
            old.rename(gone)
            shutil.rmtree(gone)


def _age(path: Path) -> float:
    """Sorts the newest first, and what another process removed last."""
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        with suppress(OSError):  # a file system without locks: several compute the same
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _own_folder() -> Path:
    """The folder of this process."""
    return _known("own", _make_own)


def _common_folder() -> Path:
    """The folder of this user's processes."""
    return _known("common", _enter_common)


def _known(kind: str, make: Callable[[Path], Path]) -> Path:
    with _lock:
        known = _folders.get((kind, os.getpid()))
        if known is None or not known.is_dir():
            with _refusing(0):
                known = _folders[kind, os.getpid()] = make(Path(tempfile.gettempdir()))
        return known


def _make_own(parent: Path) -> Path:
    _sweep(parent)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        owner = os.open(folder / "owner", os.O_CREAT | os.O_RDWR, 0o600)
        with suppress(OSError):
            fcntl.flock(owner, fcntl.LOCK_EX)
        if folder.is_dir():  # no other process swept it before it was locked
            break
        os.close(owner)
    _at_end(shutil.rmtree, folder, ignore_errors=True)
    return folder  # and leave `owner` open: closing it would give up the lock


def _enter_common(parent: Path) -> Path:
    folder = parent / f"{PREFIX}{os.getuid()}"
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        try:
            facts = folder.lstat()
            if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
                return _make_own(parent)  # another user took the name, or it is a link
            users = os.open(folder / "users", os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:  # another process removed it just now
            continue
        try:
            _empty_if_alone(folder, users)
            fcntl.flock(users, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
            os.close(users)
            return _make_own(parent)
        with suppress(FileNotFoundError):
            if (folder / "users").stat().st_ino == os.fstat(users).st_ino:
                break  # no other process removed it before it was locked
        os.close(users)
    _at_end(_leave, folder, users)
    return folder


def _empty_if_alone(folder: Path, users: int) -> None:
    """Remove what killed processes left: a computer that lost power may have half of a file."""
    with suppress(BlockingIOError):
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left)


def _leave(folder: Path, users: int) -> None:
    with suppress(OSError):  # others use it
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def _at_end(do: Callable[..., object], *arguments: Any, **settings: Any) -> None:
    """Also at the end of a process of multiprocessing, where atexit does nothing; not in a fork."""
    multiprocessing.util.Finalize(None, do, arguments, settings, exitpriority=-100)


def _sweep(parent: Path) -> None:
    """Remove folders of processes that were killed."""
    for owner in parent.glob(f"{PREFIX}*/owner"):
        with suppress(OSError), owner.open("rb+") as file:  # another user's, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)


@contextmanager
def _refusing(num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        folder = tempfile.tempdir or "TMPDIR"
        if problem.errno not in _FULL:
            if num_bytes:
                raise
            raise StorageError(
                f"cannot make a folder in {folder} ({problem.strerror}), which the processes of "
                "this command would share.",
                hint="Set TMPDIR to a folder that you may write to.",
            ) from problem
        raise OutOfSpaceError(
            f"{folder} has no room for {human_bytes(num_bytes)} that the "
            f"processes of this command share ({problem.strerror}).",
            hint="Set TMPDIR to a folder on a disk with more room.",
        ) from problem
