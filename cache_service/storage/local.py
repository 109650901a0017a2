"""Objects as files of one folder.

A write goes to a temporary file beside its target's root, is fsynced, and is then renamed (or, to
create, hard-linked, which fails where the name is taken); the folder is fsynced last. No local Zarr
writer fsyncs by itself, so a commit written through one could outlive the rows that it names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError, OutOfSpaceError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

SCRATCH = ".scratch"
"""Folder of temporary files and reservations. Empty, and removed, when nobody writes."""


class LocalStorage:
    """See `cache_service.storage.Storage`."""

    def __init__(self, root: str) -> None:
        self.url = root
        self._root = Path(root)
        self._held: dict[str, int] = {}
        self._durable_folders: set[Path] = set()

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as problem:
            raise _refused(problem, "read", self._path(key)) from problem

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) for each range, or None where there is no object."""
        try:
            with self._path(key).open("rb") as file:
                handle = file.fileno()
                return [os.pread(handle, stop - start, start) for start, stop in ranges]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as problem:
            raise _refused(problem, "read", self._path(key)) from problem

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None where there is none."""
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put(self, key: str, content: bytes) -> None:
        """Write the object, replacing one that is there."""
        target = self._path(key)
        temporary = self._write_temporary(content, target)
        temporary.replace(target)
        _fsync_folder(target.parent)

    def create(self, key: str, content: bytes) -> bool:
        """Write the object unless there is one."""
        target = self._path(key)
        if target.exists():
            return False
        temporary = self._write_temporary(content, target)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_folder(target.parent)
        return True

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        target = self._path(key)
        target.unlink(missing_ok=True)
        if target.parent.is_dir():
            _fsync_folder(target.parent)

    def list(self, prefix: str) -> list[str]:
        """Keys below the prefix, sorted."""
        folder = self._root / prefix
        if not folder.is_dir():
            return []
        files = (path for path in folder.rglob("*") if path.is_file())
        keys = (path.relative_to(self._root).as_posix() for path in files)
        return sorted(key for key in keys if not key.startswith(f"{SCRATCH}/"))

    def map(self, key: str) -> NDArray[np.uint8] | None:
        """The object as a read-only memory map, or None where it is absent or empty."""
        try:
            return np.memmap(self._path(key), np.uint8, mode="r")
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def begin(self, name: str) -> bool:
        """Reserve by a lock on a file: the kernel gives it back when the holder dies."""
        path = self._scratch() / f"{name}.lock"
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        # The last holder unlinks its file: a lock on an unlinked file would exclude nobody.
        if not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino:
            os.close(handle)
            return False
        self._held[name] = handle
        return True

    def end(self, name: str) -> None:
        """Give a reservation back."""
        handle = self._held.pop(name)
        (self._root / SCRATCH / f"{name}.lock").unlink(missing_ok=True)
        os.close(handle)

    def sweep(self) -> None:
        """Remove temporary files and locks of processes that are gone, and the empty folder."""
        folder = self._root / SCRATCH
        if not folder.is_dir():
            return
        for path in folder.glob("*.tmp"):
            host, _, rest = path.name.partition("~")
            # Another host's writer may be alive; its leftovers are for a sweep on that host.
            if host == socket.gethostname() and not _alive(int(rest.partition("~")[0])):
                path.unlink(missing_ok=True)
        for path in folder.glob("*.lock"):
            if self.begin(path.stem):
                self.end(path.stem)
        with contextlib.suppress(OSError):
            folder.rmdir()

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
            raise ConfigError(f"{key!r} is not a key.")
        return self._root / key

    def _scratch(self) -> Path:
        folder = self._root / SCRATCH
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise _refused(problem, "make", folder) from problem
        return folder

    def _write_temporary(self, content: bytes, target: Path) -> Path:
        owner = f"{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"
        temporary = self._scratch() / f"{owner}.tmp"
        try:
            self._make_folder(target.parent)
            try:
                _write_durably(temporary, content)
            except FileNotFoundError:  # another builder swept the empty folder away just now
                self._scratch()
                _write_durably(temporary, content)
        except OSError as problem:
            temporary.unlink(missing_ok=True)
            raise _refused(problem, "write", target) from problem
        except BaseException:  # Ctrl-C must not leave the temporary file behind either
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _make_folder(self, folder: Path) -> None:
        """Make a folder durable: each new level is an entry in the level above, fsynced there."""
        if folder in self._durable_folders:
            return
        missing = [level for level in (folder, *folder.parents) if not level.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for level in missing:
            _fsync_folder(level.parent)
        self._durable_folders.add(folder)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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


def _refused(problem: OSError, verb: str, path: Path) -> OutOfSpaceError | StorageError:
    if problem.errno in _FULL:
        return OutOfSpaceError(
            f"no space left to {verb} {path} ({problem.strerror}); what is committed stays good.",
            hint="Free some space and run the same command again: it resumes.",
        )
    return StorageError(f"cannot {verb} {path}: {problem.strerror}.")
