"""Storages that watch or limit a real one."""

from __future__ import annotations

from pathlib import Path

from cache_service.storage.local import LocalStorage


class RecordingStorage(LocalStorage):
    """A folder that remembers what was done to it, in order: (operation, key, content)."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.operations: list[tuple[str, str, bytes]] = []

    def put(self, key: str, content: bytes) -> None:
        super().put(key, content)
        self.operations.append(("put", key, content))

    def create(self, key: str, content: bytes) -> bool:
        done = super().create(key, content)
        if done:
            self.operations.append(("create", key, content))
        return done

    def delete(self, key: str) -> None:
        super().delete(key)
        self.operations.append(("delete", key, b""))


def replay(operations: list[tuple[str, str, bytes]], root: Path) -> None:
    """Do the same to an empty folder, without fsync: the state that a crash would leave."""
    root.mkdir(parents=True, exist_ok=True)
    for operation, key, content in operations:
        path = root / key
        if operation == "delete":
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if operation == "put" or not path.exists():
            path.write_bytes(content)


class FetchingStorage(LocalStorage):
    """A folder that cannot be mapped, so that everything is read as from a bucket."""

    def map(self, key: str) -> None:
        return None
