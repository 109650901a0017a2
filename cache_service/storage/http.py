"""Reads a cache on a server object by object, through its `zarr/` route.

The list of recorded shards comes from the manifest, because HTTP has no listing. Training reads
rows faster through `cache_service.remote`; `info`, `verify` and the metadata use this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import (
    CorruptError,
    RowsNotBuiltError,
    SpecMismatchError,
    UnsupportedError,
)
from cache_service.format.commit import commit_key
from cache_service.format.frame import CHECKSUM_HEADER, checksum_of
from cache_service.format.layout import MAX_PIECE_BYTES
from cache_service.format.seeds import MAX_SEED
from cache_service.storage import check_key, check_prefix
from cache_service.storage.http_client import HttpClient, Request, Response
from cache_service.storage.retries import DEFAULT_RETRIES, RetryPolicy

COMMITS = "commits/"
MAX_DOCUMENT_BYTES = 32 << 20
"""Largest metadata document: about the size of a manifest of 4 million shards."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_UNSATISFIED_RANGE = re.compile(r"bytes \*/(\d{1,18})", re.ASCII)


class _Part(NamedTuple):
    """Some bytes of an object, and the size of the whole object."""

    content: bytes
    total: int


Keys: TypeAlias = list[str]


class HttpStorage:
    """Implements `cache_service.storage.Storage`; every write is refused."""

    has_locks = False

    def __init__(self, url: str, retries: RetryPolicy = DEFAULT_RETRIES) -> None:
        self.client = HttpClient(url, retries)
        self.url = self.client.url
        self.fingerprint: str | None = None
        """Fingerprint that the cache must keep. If unset, the first manifest sets it."""

    def get(self, key: str, *, wait_s: float = 0.0) -> bytes | None:
        """The object, or None if there is none. Waits up to `wait_s` for a cache in the queue."""

        def parse(response: Response) -> bytes | None:
            return None if response.status == 404 else _whole(response, f"{self.url}/{key}")

        limit = MAX_DOCUMENT_BYTES if key.endswith(".json") else MAX_PIECE_BYTES + 64
        try:
            request = Request("GET", self._target(key), limit=limit)
            return self.client.send(request, parse, accept=(404,), wait_s=wait_s)
        except RowsNotBuiltError:
            # The server's answer for objects of a shard. An absent commit is not an error.
            if key.startswith(COMMITS):
                return None
            raise

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) for each range, or None if there is no object."""
        found: list[bytes] = []
        for run in _runs(ranges):
            start, stop = run[0][0], run[-1][1]
            part = self._get_range(key, start, stop)
            if part is None:
                return None
            found += [part.content[first - start : last - start] for first, last in run]
        return found

    def size(self, key: str) -> int | None:
        """The size of the object in bytes, or None if there is none."""
        # Not HEAD: its errors have no body, which would explain them.
        found = self._get_range(key, 0, 1)
        return None if found is None else found.total

    def list(self, prefix: str) -> list[str]:
        """Keys of the commits, sorted.

        Raises:
            UnsupportedError: any other prefix, because a server lists nothing else.
        """
        if check_prefix(prefix) != COMMITS:
            raise UnsupportedError(f"{self.url} lists the keys below {COMMITS} only.")
        return sorted(self.client.send(Request("GET", "", limit=MAX_DOCUMENT_BYTES), self._keys))

    def map(self, key: str) -> NDArray[np.uint8] | None:  # noqa: ARG002  one signature for all
        """None: a response cannot be mapped."""
        return None

    def forget(self, keys: Sequence[str]) -> bool:  # noqa: ARG002  one signature for all
        """False: there are no copies."""
        return False

    def put(self, key: str, content: bytes) -> None:  # noqa: ARG002  one signature for all
        """Raises UnsupportedError, as every write does."""
        self._refuse(key)

    def create(self, key: str, content: bytes) -> bool:  # noqa: ARG002  one signature for all
        """Raises UnsupportedError, as every write does."""
        self._refuse(key)

    def delete(self, key: str) -> None:
        """Raises UnsupportedError, as every write does."""
        self._refuse(key)

    def begin(self, name: str) -> bool:
        """Raises UnsupportedError, as every write does."""
        self._refuse(name)

    def end(self, name: str) -> None:
        """Does nothing: there are no reservations."""

    def sweep(self) -> None:
        """Does nothing: nothing is written here."""

    def _get_range(self, key: str, start: int, stop: int) -> _Part | None:
        def parse(response: Response) -> _Part | None:
            if response.status == 404:
                return None
            stated = response.headers.get("content-range", "")
            unsatisfied = _UNSATISFIED_RANGE.fullmatch(stated)
            if response.status == 416 and unsatisfied is not None:
                return _Part(b"", int(unsatisfied[1]))
            matched = _CONTENT_RANGE.fullmatch(stated)
            first, last, total = map(int, matched.groups()) if matched else (0, -1, 0)
            size = last + 1 - first
            if response.status != 206 or first != start or size != min(stop, total) - start:
                raise CorruptError(
                    f"bytes {start} to {stop - 1} of {self.url}/{key} were requested; the server "
                    f"answers {stated[:60]!r} with status {response.status}."
                )
            if size != len(response.body):
                raise CorruptError(f"{self.url}/{key} has another length than its header states.")
            return _Part(_whole(response, f"{self.url}/{key}"), total)

        headers = {"Range": f"bytes={start}-{stop - 1}"}
        request = Request("GET", self._target(key), headers, limit=stop - start)
        return self.client.send(request, parse, accept=(404, 416))

    def _keys(self, response: Response) -> Keys:
        """Commit keys in a manifest, with every number checked."""
        content = _whole(response, self.url)
        try:
            manifest = json.loads(content)
            fingerprint = manifest["fingerprint"]
            keys = [key for item in manifest["commits"].items() for key in _commit_keys(*item)]
            if not isinstance(fingerprint, str) or len(set(keys)) != len(keys):
                raise ValueError("fingerprint, commits")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise CorruptError(
                f"{self.url} does not answer with the manifest of a cache."
            ) from problem
        if self.fingerprint not in (None, fingerprint):
            raise SpecMismatchError(
                f"{self.url} had fingerprint {self.fingerprint} when it was opened and has "
                f"{fingerprint[:64]} now: the server holds another cache under this name.",
                hint="Serve each cache under a name of its own.",
            )
        self.fingerprint = fingerprint
        return keys

    def _target(self, key: str) -> str:
        """Path of an object. With the fingerprint, proxies may keep it and never send another's."""
        target = f"/zarr/{quote(check_key(key))}"
        return target if self.fingerprint is None else f"{target}?fingerprint={self.fingerprint}"

    def _refuse(self, key: str) -> NoReturn:
        raise UnsupportedError(
            f"{self.url}/{key} cannot be written: HTTP access to a cache is read-only.",
            hint="Run this command on the server, with the path of the cache there.",
        )


def _whole(response: Response, what: str) -> bytes:
    """The body, checked against its checksum if the server sends one."""
    content = response.body
    checksum = response.headers.get(CHECKSUM_HEADER)
    if checksum is not None and checksum != checksum_of(content):
        raise CorruptError(f"{what} was damaged in transit: its CRC-32C is not {checksum[:8]}.")
    return content


def _commit_keys(seed: str, shards: Any) -> list[str]:
    number = int(seed)
    if str(number) != seed or not 0 <= number < MAX_SEED or not isinstance(shards, list):
        raise ValueError("seed")
    if not all(type(shard) is int and 0 <= shard < 2**31 for shard in shards):
        raise ValueError("shard")
    return [commit_key(number, shard) for shard in shards]


def _runs(ranges: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Groups adjacent ranges: each group becomes one request."""
    runs: list[list[tuple[int, int]]] = []
    for start, stop in ranges:
        if runs and runs[-1][-1][1] == start:
            runs[-1].append((start, stop))
        else:
            runs.append([(start, stop)])
    return runs
