"""Large read-only arrays that the processes of a command share, as files of one temporary folder.

The paths and labels of ImageNet-21k take 650 MB and an order of its samples 57 MB. Every loader
worker, builder and rank needs them. They are written to files once and mapped, so that a computer
has them in memory once, and a worker process receives a file name.

The folder lies in TMPDIR. Child processes find it by an environment variable. Its owner, the
process that made it, removes it at its end. A process that is killed cannot; its folder is removed
by the next one that makes a folder, because a lock tells it that the owner is gone.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing.util
import os
import shutil
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

from cache_service.errors import OutOfSpaceError, WorkersError
from cache_service.human_format import human_bytes

SHARED_FROM = 1 << 20
"""Bytes from which an array lies in a file. Smaller ones are sent to workers in no time."""

KEPT = 8
"""Computed entries that are kept: 450 MB of orders of ImageNet-21k. Those in use stay mapped."""

PREFIX = "kd-cache-"
VARIABLE = "KD_CACHE_SHARED_ARRAYS"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_folder_lock = threading.Lock()


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
                    self._file = (_folder() / f"{uuid.uuid4().hex}.bin").open("xb")
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
        folder = _folder()
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


def _folder() -> Path:
    """The folder of this process or of the one that started it; a new one where there is none."""
    with _folder_lock:
        known = os.environ.get(VARIABLE)
        if known is None or not os.access(known, os.W_OK | os.X_OK):
            known = os.environ[VARIABLE] = str(_make_folder())
        return Path(known)


def _make_folder() -> Path:
    with _refusing(0):
        parent = Path(tempfile.gettempdir())
        _sweep(parent)
        while True:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            owner = os.open(folder / "owner", os.O_CREAT | os.O_RDWR, 0o600)
            with suppress(OSError):
                fcntl.flock(owner, fcntl.LOCK_EX)
            if folder.is_dir():  # no other process swept it before it was locked
                break
            os.close(owner)
    # Also runs at the end of a process of multiprocessing, where atexit does not; not in a fork.
    multiprocessing.util.Finalize(
        None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-100
    )
    return folder  # and leave `owner` open: closing it would give up the lock


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
        if problem.errno not in _FULL and num_bytes:
            raise
        raise OutOfSpaceError(
            f"{tempfile.tempdir or 'TMPDIR'} has no room for {human_bytes(num_bytes)} that the "
            f"processes of this command share ({problem.strerror}).",
            hint="Set TMPDIR to a folder on a disk with more room.",
        ) from problem
