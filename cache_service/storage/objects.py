"""Objects of an S3-compatible bucket (also GCS and Azure), through obstore.

Credentials and the endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...),
never from a URL or a config file. The client is opened on first use, and never pickled: a pickled
one holds the secret. A process that was forked after a first use is refused: obstore's threads do
not survive the fork, so its requests would hang, and (measured) so would the parent's next one.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import from_url

from cache_service import interrupts
from cache_service.errors import StorageError
from cache_service.storage import check_key, check_prefix, retries
from cache_service.storage.retries import DEFAULT_RETRIES, RetryPolicy

T = TypeVar("T")

log = logging.getLogger("kdcache.storage")

_PASSING = re.compile(r"after \d+ retries|HTTP error")
"""Matches obstore's message for failures that may pass: connections, 429 and 5xx. Its exception
class is the same for a request that is refused."""

_STARTED_IN: list[int] = []
"""The process that started obstore's threads: empty before the first use of any client."""


class ObjectStorage:
    """See `cache_service.storage.Storage`.

    Args:
        url: of the objects.
        name: what errors call it; a service says no address. Its log has the reason of an error.
        retries: how long requests are repeated while the bucket does not answer.
    """

    has_locks = False

    def __init__(
        self, url: str, name: str | None = None, retries: RetryPolicy = DEFAULT_RETRIES
    ) -> None:
        self.url = name or url
        self._address = url
        self._retries = retries
        self._has_answered = False
        self._outage_is_logged = False
        self._store: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the client: it is opened again where it is needed."""
        return self.__dict__ | {"_store": None}

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        return self._ask(
            "read", key, lambda client: bytes(obstore.get(client, check_key(key)).bytes())
        )

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) for each range, or None where there is no object."""
        starts, ends = [start for start, _ in ranges], [stop for _, stop in ranges]
        found = self._ask(
            "read",
            key,
            lambda client: obstore.get_ranges(client, check_key(key), starts=starts, ends=ends),
        )
        return None if found is None else [bytes(piece) for piece in found]

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None where there is none."""
        return self._ask(
            "look at", key, lambda client: int(obstore.head(client, check_key(key))["size"])
        )

    def put(self, key: str, content: bytes) -> None:
        """Write the object, replacing one that is there. S3 shows it whole or not at all."""
        if self._ask("write", key, lambda client: obstore.put(client, check_key(key), content)):
            return
        raise StorageError(f"cannot write {self.url}/{key}: there is no such bucket.")

    def create(self, key: str, content: bytes) -> bool:
        """Write the object unless there is one (`If-None-Match: *`).

        False, too, where an answer was lost on the way and the object is this call's own.
        """

        def write(client: Any) -> bool:
            try:
                obstore.put(client, check_key(key), content, mode="create", use_multipart=False)
            except (AlreadyExistsError, FileExistsError):
                return False
            return True

        created = self._ask("write", key, write)
        if created is None:
            raise StorageError(f"cannot write {self.url}/{key}: there is no such bucket.")
        return created

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        self._ask("delete", key, lambda client: obstore.delete(client, check_key(key)))

    def list(self, prefix: str) -> list[str]:
        """Keys below the prefix, sorted."""

        def keys(client: Any) -> list[str]:
            pages = obstore.list(client, prefix=check_prefix(prefix) or None)
            return sorted(str(entry["path"]) for page in pages for entry in page)

        return self._ask("list", prefix, keys) or []

    def folders(self) -> tuple[str, ...]:
        """First parts of the keys that have more than one, sorted."""
        found = self._ask("list", "", obstore.list_with_delimiter)
        prefixes = found["common_prefixes"] if found is not None else ()
        return tuple(sorted(str(each).rstrip("/") for each in prefixes))

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
            # obstore's own retries take 0.1 s, or under 1 s where `_ask` does not repeat. Those of
            # `_ask` are logged and can be interrupted.
            tries = 1 if self._retries.total_s else 3
            self._store = from_url(self._address, retry_config={"max_retries": tries})
        return self._store

    def _ask(self, verb: str, key: str, request: Callable[[Any], T]) -> T | None:
        """What the request returns, or None for what does not exist; asked again in an outage.

        Raises:
            StorageError: refused, or no answer within the time of the retries.
            StoppedWaitingError: Ctrl-C or SIGTERM came during an outage.
        """
        began, failures = time.monotonic(), 0
        while True:
            try:
                answer = request(self._client())
            except (NotFoundError, FileNotFoundError):
                answer = None
            except (BaseError, OSError) as problem:
                failures += 1
                pause_s = self._pause_s(verb, key, problem, began, failures)
                interrupts.pause(pause_s)
                continue
            self._has_answered, self._outage_is_logged = True, False
            return answer

    def _pause_s(
        self, verb: str, key: str, problem: Exception, began: float, failures: int
    ) -> float:
        """Time until the request should be tried again. Raises the error if it should not."""
        error = self._error(verb, key, problem)
        now, pause_s = time.monotonic(), self._retries.pause_s(failures)
        end = began + (self._retries.total_s if self._has_answered else self._retries.first_s)
        if not _PASSING.search(str(problem)) or now + pause_s > end:
            raise error from problem
        if not self._outage_is_logged and now + pause_s - began >= retries.WARN_AFTER_S:
            self._outage_is_logged = True
            log.warning("%s Retrying for %.0f s more.", error.message, end - now)
        return pause_s

    def _error(self, verb: str, key: str, problem: Exception) -> StorageError:
        first_line = str(problem).strip().split("\n")[0][:300]
        if self.url != self._address:
            log.warning("cannot %s %s/%s: %s", verb, self._address, key, first_line)
            return StorageError(f"cannot {verb} {self.url}/{key}.")
        return StorageError(
            f"cannot {verb} {self.url}/{key}: {first_line}",
            hint="Check the address and the credentials in the environment.",
        )
