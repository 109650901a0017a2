"""Objects as files of one folder.

A write goes to a temporary file beside its target's root, is fsynced, and is then renamed (or, to
create, hard-linked, which fails where the name is taken); the folder is fsynced last. No local Zarr
writer fsyncs by itself, so a commit written through one could outlive the rows that it names.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import OutOfSpaceError, StorageError
from cache_service.storage import check_key, check_prefix

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

SCRATCH = ".scratch"
"""Folder of temporary files and reservations. Empty, and removed, when nobody writes."""

MAX_FOLDERS = 512
"""Folders known to be durable: those of 80 shards. Forgetting one costs an fsync."""

_LOCKS: set[int] = set()
"""Handles of this process's reservations and temporary files. A lock lives as long as any copy of
its handle, so a forked loader worker that outlives its builder would keep it: at birth it closes
its copies."""


def _forget_locks() -> None:
    for handle in _LOCKS:
        os.close(handle)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_forget_locks)


class LocalStorage:
    """See `cache_service.storage.Storage`."""

    def __init__(self, root: str) -> None:
        self.url = root
        self.has_locks = True
        self._root = Path(root)
        self._held: dict[str, int] = {}
        self._durable_folders: set[Path] = set()

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        path = self._path(key)
        with _refusing("read", path), suppress(FileNotFoundError):
            if path.is_file():
                return path.read_bytes()
        return None

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) for each range, or None where there is no object."""
        path = self._path(key)
        with _refusing("read", path), suppress(FileNotFoundError):
            if path.is_file():
                with path.open("rb") as file:
                    handle = file.fileno()
                    return [os.pread(handle, stop - start, start) for start, stop in ranges]
        return None

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None where there is none."""
        path = self._path(key)
        with _refusing("look at", path), suppress(FileNotFoundError, NotADirectoryError):
            found = path.stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        return None

    def put(self, key: str, content: bytes) -> None:
        """Write the object, replacing one that is there."""
        target = self._path(key)
        with self._temporary(content, target) as temporary, _refusing("write", target):
            temporary.replace(target)
            _fsync_folder(target.parent)

    def create(self, key: str, content: bytes) -> bool:
        """Write the object unless there is one."""
        target = self._path(key)
        with _refusing("write", target):
            if target.exists():
                return False
        with (
            self._temporary(content, target) as temporary,
            _refusing("write", target),
            suppress(FileExistsError),
        ):
            os.link(temporary, target)
            _fsync_folder(target.parent)
            return True
        return False

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        target = self._path(key)
        with _refusing("delete", target), suppress(FileNotFoundError, NotADirectoryError):
            target.unlink()
            _fsync_folder(target.parent)

    def list(self, prefix: str) -> list[str]:
        """Keys below the prefix, sorted."""
        # os.walk, because it does not mind folders that others remove meanwhile.
        walk = os.walk(self._root / check_prefix(prefix))
        files = (Path(folder, name) for folder, _, names in walk for name in names)
        keys = (path.relative_to(self._root).as_posix() for path in files if path.is_file())
        return sorted(key for key in keys if not key.startswith(f"{SCRATCH}/"))

    def map(self, key: str) -> NDArray[np.uint8] | None:
        """The object as a read-only memory map, or None where it is absent or empty."""
        path = self._path(key)
        with suppress(OSError, ValueError):
            if path.is_file():
                return np.memmap(path, np.uint8, mode="r")
        return None

    def forget(self, keys: Sequence[str]) -> bool:  # noqa: ARG002  one signature for all
        """False: there are no copies."""
        return False

    def begin(self, name: str) -> bool:
        """Reserve by a lock on a file: the kernel gives it back when the holder dies."""
        handle = self._open_lock(name)
        path = self._root / SCRATCH / f"{name}.lock"
        locked = _lock(handle)
        if locked is False:
            os.close(handle)
            return False
        # A file system without locks: every builder may do the work. Wasted, never wrong.
        self.has_locks = locked is True
        # The last holder unlinks its file: a lock on an unlinked file would exclude nobody.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                self._held[name] = handle
                _LOCKS.add(handle)
                return True
        os.close(handle)
        return False

    def end(self, name: str) -> None:
        """Give a reservation back."""
        handle = self._held.pop(name)
        _LOCKS.discard(handle)
        (self._root / SCRATCH / f"{name}.lock").unlink(missing_ok=True)
        os.close(handle)

    def sweep(self) -> None:
        """Remove temporary files and locks of processes that are gone, and the empty folder."""
        folder = self._root / SCRATCH
        with suppress(FileNotFoundError):  # another builder sweeps, too
            for path in sorted(folder.iterdir()):
                self._sweep_one(path)
        with suppress(OSError):
            folder.rmdir()

    def _sweep_one(self, path: Path) -> None:
        if path.suffix == ".lock" and self.begin(path.stem):
            self.end(path.stem)
        host, _, rest = path.name.partition("~")
        process = rest.partition("~")[0]
        # Another host's writer may be alive; its leftovers are for a sweep on that host.
        if host == socket.gethostname() and process.isdigit() and not _alive(int(process)):
            _remove_unless_locked(path)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _scratch(self) -> Path:
        folder = self._root / SCRATCH
        with _refusing("make", folder):
            self._make_folder(self._root)
            with suppress(FileExistsError):
                folder.mkdir()
        return folder

    def _open_lock(self, name: str) -> int:
        path = self._scratch() / f"{name}.lock"
        with _refusing("write", path):
            while True:
                try:
                    return os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
                except FileNotFoundError:  # another builder swept the empty folder away just now
                    self._scratch()

    @contextmanager
    def _temporary(self, content: bytes, target: Path) -> Iterator[Path]:
        """A durable file with the content, which is removed, under whatever name, in the end.

        It is locked, so that no sweep takes it: a process number says nothing where another
        container with the same host name sweeps.
        """
        with _refusing("write", target):
            self._make_folder(target.parent)
        handle, temporary = self._open_temporary(target)
        try:
            with _refusing("write", target):
                _write_durably(handle, content)
            yield temporary
        finally:  # Ctrl-C must not leave the temporary file behind either
            temporary.unlink(missing_ok=True)
            _LOCKS.discard(handle)
            os.close(handle)

    def _open_temporary(self, target: Path) -> tuple[int, Path]:
        """An empty file and its handle, locked where there are locks."""
        while True:
            owner = f"{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"
            temporary = self._scratch() / f"{owner}.tmp"
            with _refusing("write", target):
                try:
                    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                except FileNotFoundError:  # another builder swept the empty folder away
                    continue
            _LOCKS.add(handle)
            if _lock(handle) is not False and temporary.exists():
                return handle, temporary
            _LOCKS.discard(handle)  # a sweep came between the two calls
            os.close(handle)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder durable: each level is an entry in the level above, fsynced there.

        Below the root also where it exists: whoever made it may have died before the fsync.
        """
        if folder in self._durable_folders:
            return
        if self._root in folder.parents or not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            _fsync_folder(folder.parent)
        if len(self._durable_folders) >= MAX_FOLDERS:
            self._durable_folders.clear()  # a builder does not come back to a finished shard
        self._durable_folders.add(folder)


def _write_durably(handle: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]
    os.fsync(handle)


def _remove_unless_locked(path: Path) -> None:
    """Remove a temporary file whose writer is gone, as its lock tells. Nothing where none works."""
    with suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDWR)  # NFS locks no file that is open for reading only
        try:
            if _lock(handle):
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the file is locked now, by this handle; None where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _refusing(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        if problem.errno in _FULL:
            raise OutOfSpaceError(
                f"no space left to {verb} {path} ({problem.strerror}); what is committed stays "
                "good.",
                hint="Free some space and run the same command again: it resumes.",
            ) from problem
        raise StorageError(f"cannot {verb} {path}: {problem.strerror}.") from problem
