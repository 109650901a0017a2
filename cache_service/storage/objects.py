"""Objects of an S3-compatible bucket (also GCS and Azure), through obstore.

Credentials and the endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...),
never from a URL or a config file. The client is opened on first use and again in a new process:
a Rust client that was used before a fork hangs in the child, and a pickled one holds the secret.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import from_url

from cache_service.errors import StorageError


class ObjectStorage:
    """See `cache_service.storage.Storage`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._store: Any = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the client: it is opened again where it is needed."""
        return {"url": self.url, "_store": None, "_process": 0}

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        with self._errors("read", key):
            try:
                return bytes(obstore.get(self._client(), key).bytes())
            except (NotFoundError, FileNotFoundError):
                return None

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) for each range, or None where there is no object."""
        starts, ends = [start for start, _ in ranges], [stop for _, stop in ranges]
        with self._errors("read", key):
            try:
                found = obstore.get_ranges(self._client(), key, starts=starts, ends=ends)
            except (NotFoundError, FileNotFoundError):
                return None
            return [bytes(piece) for piece in found]

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None where there is none."""
        with self._errors("look at", key):
            try:
                return int(obstore.head(self._client(), key)["size"])
            except (NotFoundError, FileNotFoundError):
                return None

    def put(self, key: str, content: bytes) -> None:
        """Write the object, replacing one that is there. S3 shows it whole or not at all."""
        with self._errors("write", key):
            obstore.put(self._client(), key, content)

    def create(self, key: str, content: bytes) -> bool:
        """Write the object unless there is one (`If-None-Match: *`)."""
        with self._errors("write", key):
            try:
                obstore.put(self._client(), key, content, mode="create", use_multipart=False)
            except (AlreadyExistsError, FileExistsError):
                return False
            return True

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        with self._errors("delete", key):
            try:
                obstore.delete(self._client(), key)
            except (NotFoundError, FileNotFoundError):
                return

    def list(self, prefix: str) -> list[str]:
        """Keys below the prefix, sorted."""
        with self._errors("list", prefix):
            pages = obstore.list(self._client(), prefix=prefix or None)
            return sorted(str(entry["path"]) for page in pages for entry in page)

    def map(self, key: str) -> NDArray[np.uint8] | None:  # noqa: ARG002  one signature for all
        """Objects of a bucket cannot be mapped."""
        return None

    def begin(self, name: str) -> bool:  # noqa: ARG002  one signature for all
        """No reservations: two builders of one shard write the same bytes."""
        return True

    def end(self, name: str) -> None:
        """Nothing was reserved."""

    def sweep(self) -> None:
        """Nothing is left behind: an unfinished upload is not an object."""

    def _client(self) -> Any:
        if self._store is None or self._process != os.getpid():
            # The default of 10 retries waits 10.7 s for a server that is down; 3 wait under 1 s.
            self._store = from_url(self.url, retry_config={"max_retries": 3})
            self._process = os.getpid()
        return self._store

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as problem:
            first_line = str(problem).strip().split("\n")[0][:300]
            raise StorageError(
                f"cannot {verb} {self.url}/{key}: {first_line}",
                hint="Check the address and the credentials in the environment.",
            ) from problem
