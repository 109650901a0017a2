"""Objects of an S3-compatible bucket (also GCS and Azure), through obstore.

Credentials and the endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...),
never from a URL or a config file. The client is opened on first use, and never pickled: a pickled
one holds the secret. A process that was forked after a first use is refused: obstore's threads do
not survive the fork, so its requests would hang, and (measured) so would the parent's next one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import from_url

from cache_service.errors import StorageError
from cache_service.storage import check_key, check_prefix

log = logging.getLogger("kdcache.storage")

_STARTED_IN: list[int] = []
"""The process that started obstore's threads: empty before the first use of any client."""


class ObjectStorage:
    """See `cache_service.storage.Storage`.

    Args:
        url: of the objects.
        name: what errors call it; a service says no address. Its log has the reason of an error.
    """

    has_locks = False

    def __init__(self, url: str, name: str | None = None) -> None:
        self.url = name or url
        self._address = url
        self._store: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the client: it is opened again where it is needed."""
        return {"url": self.url, "_address": self._address, "_store": None}

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        with self._errors("read", key):
            try:
                return bytes(obstore.get(self._client(), check_key(key)).bytes())
            except (NotFoundError, FileNotFoundError):
                return None

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) for each range, or None where there is no object."""
        starts, ends = [start for start, _ in ranges], [stop for _, stop in ranges]
        with self._errors("read", key):
            try:
                found = obstore.get_ranges(self._client(), check_key(key), starts=starts, ends=ends)
            except (NotFoundError, FileNotFoundError):
                return None
            return [bytes(piece) for piece in found]

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None where there is none."""
        with self._errors("look at", key):
            try:
                return int(obstore.head(self._client(), check_key(key))["size"])
            except (NotFoundError, FileNotFoundError):
                return None

    def put(self, key: str, content: bytes) -> None:
        """Write the object, replacing one that is there. S3 shows it whole or not at all."""
        with self._errors("write", key):
            obstore.put(self._client(), check_key(key), content)

    def create(self, key: str, content: bytes) -> bool:
        """Write the object unless there is one (`If-None-Match: *`)."""
        with self._errors("write", key):
            try:
                obstore.put(
                    self._client(), check_key(key), content, mode="create", use_multipart=False
                )
            except (AlreadyExistsError, FileExistsError):
                return False
            return True

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        with self._errors("delete", key):
            try:
                obstore.delete(self._client(), check_key(key))
            except (NotFoundError, FileNotFoundError):
                return

    def list(self, prefix: str) -> list[str]:
        """Keys below the prefix, sorted."""
        with self._errors("list", prefix):
            pages = obstore.list(self._client(), prefix=check_prefix(prefix) or None)
            return sorted(str(entry["path"]) for page in pages for entry in page)

    def folders(self) -> tuple[str, ...]:
        """First parts of the keys that have more than one, sorted."""
        with self._errors("list", ""):
            found = obstore.list_with_delimiter(self._client())
            return tuple(sorted(str(each).rstrip("/") for each in found["common_prefixes"]))

    def map(self, key: str) -> NDArray[np.uint8] | None:  # noqa: ARG002  one signature for all
        """Objects of a bucket cannot be mapped."""
        return None

    def forget(self, keys: Sequence[str]) -> bool:  # noqa: ARG002  one signature for all
        """False: there are no copies."""
        return False

    def begin(self, name: str) -> bool:  # noqa: ARG002  one signature for all
        """No reservations: two builders of one shard write the same bytes."""
        return True

    def end(self, name: str) -> None:
        """Nothing was reserved."""

    def sweep(self) -> None:
        """Nothing is left behind: an unfinished upload is not an object."""

    def _client(self) -> Any:
        process = os.getpid()
        if not _STARTED_IN:
            _STARTED_IN.append(process)
        if _STARTED_IN[0] != process:
            raise StorageError(
                f"{self.url} was asked for in a process forked after its parent had used S3: the "
                "request would hang.",
                hint='Start loader workers with multiprocessing_context="forkserver".',
            )
        if self._store is None:
            # The default of 10 retries waits 10.7 s for a server that is down; 3 wait under 1 s.
            self._store = from_url(self._address, retry_config={"max_retries": 3})
        return self._store

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as problem:
            first_line = str(problem).strip().split("\n")[0][:300]
            if self.url != self._address:
                log.warning("cannot %s %s/%s: %s", verb, self._address, key, first_line)
                raise StorageError(f"cannot {verb} {self.url}/{key}.") from problem
            raise StorageError(
                f"cannot {verb} {self.url}/{key}: {first_line}",
                hint="Check the address and the credentials in the environment.",
            ) from problem
