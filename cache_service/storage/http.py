"""A cache on a server, object by object, through its `zarr/` route. Reading only.

Which shards are recorded comes from the manifest, because HTTP has no listing. Rows for training
come faster through `cache_service.remote`; this is what `info`, `verify` and the metadata use.
"""

from __future__ import annotations

import json
import re
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
from cache_service.storage.http_client import PATIENCE, HttpClient, Patience
from cache_service.storage.http_exchange import Answer, Question
from cache_service.storage.keys import check_key, check_prefix

COMMITS = "commits/"
MAX_DOCUMENT_BYTES = 32 << 20
"""Of a metadata document. A manifest of 4 million shards has about that."""

_INSIDE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_BEYOND = re.compile(r"bytes \*/(\d{1,18})", re.ASCII)


class _Part(NamedTuple):
    """Bytes of an object, and how many it has in all."""

    content: bytes
    total: int


Keys: TypeAlias = list[str]


class HttpStorage:
    """See `cache_service.storage.Storage`."""

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        self.client = HttpClient(url, patience)
        self.url = self.client.url
        self.fingerprint: str | None = None
        """Of the cache that this must stay; the first manifest says it where nobody did before."""

    def get(self, key: str, *, wait_s: float = 0.0) -> bytes | None:
        """The object, or None where there is none; of a cache that is queued, within `wait_s`."""

        def read(answer: Answer) -> bytes | None:
            return None if answer.status == 404 else _whole(answer, f"{self.url}/{key}")

        limit = MAX_DOCUMENT_BYTES if key.endswith(".json") else MAX_PIECE_BYTES + 64
        try:
            question = Question("GET", _target(key), limit=limit)
            return self.client.ask(question, read, passes=(404,), wait_s=wait_s)
        except RowsNotBuiltError:
            # Of a shard's rows a server says "not yet"; whether there is a commit is a question.
            if key.startswith(COMMITS):
                return None
            raise

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) for each range, or None where there is no object."""
        found: list[bytes] = []
        for run in _runs(ranges):
            start, stop = run[0][0], run[-1][1]
            part = self._get_range(key, start, stop)
            if part is None:
                return None
            found += [part.content[first - start : last - start] for first, last in run]
        return found

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None where there is none."""
        # Not HEAD: an error that comes without a body says no more than its status.
        found = self._get_range(key, 0, 1)
        return None if found is None else found.total

    def list(self, prefix: str) -> list[str]:
        """Keys of the commits, sorted.

        Raises:
            UnsupportedError: any other prefix: a server lists nothing else.
        """
        if check_prefix(prefix) != COMMITS:
            raise UnsupportedError(f"{self.url} lists the keys below {COMMITS} only.")
        return sorted(self.client.ask(Question("GET", "", limit=MAX_DOCUMENT_BYTES), self._keys))

    def map(self, key: str) -> NDArray[np.uint8] | None:  # noqa: ARG002  one signature for all
        """What a server sends cannot be mapped."""
        return None

    def put(self, key: str, content: bytes) -> None:  # noqa: ARG002  one signature for all
        """Refused, as every change is."""
        self._refuse(key)

    def create(self, key: str, content: bytes) -> bool:  # noqa: ARG002  one signature for all
        """Refused, as every change is."""
        self._refuse(key)

    def delete(self, key: str) -> None:
        """Refused, as every change is."""
        self._refuse(key)

    def begin(self, name: str) -> bool:
        """Refused, as every change is."""
        self._refuse(name)

    def end(self, name: str) -> None:
        """Nothing was reserved."""

    def sweep(self) -> None:
        """Nothing was written."""

    def _get_range(self, key: str, start: int, stop: int) -> _Part | None:
        def read(answer: Answer) -> _Part | None:
            if answer.status == 404:
                return None
            stated = answer.headers.get("content-range", "")
            beyond = _BEYOND.fullmatch(stated)
            if answer.status == 416 and beyond is not None:
                return _Part(b"", int(beyond[1]))
            inside = _INSIDE.fullmatch(stated)
            first, last, total = map(int, inside.groups()) if inside else (0, -1, 0)
            size = last + 1 - first
            if answer.status != 206 or first != start or size != min(stop, total) - start:
                raise CorruptError(
                    f"{self.url}/{key} was asked for bytes {start} to {stop - 1}; the server "
                    f"answers {stated[:60]!r} with status {answer.status}."
                )
            if size != len(answer.body):
                raise CorruptError(f"{self.url}/{key} came with another length than it says.")
            return _Part(_whole(answer, f"{self.url}/{key}"), total)

        headers = {"Range": f"bytes={start}-{stop - 1}"}
        question = Question("GET", _target(key), headers, limit=stop - start)
        return self.client.ask(question, read, passes=(404, 416))

    def _keys(self, answer: Answer) -> Keys:
        """Commit keys of a manifest, each number of it checked."""
        content = _whole(answer, self.url)
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

    def _refuse(self, key: str) -> NoReturn:
        raise UnsupportedError(
            f"{self.url}/{key} cannot be written: a cache is only read over HTTP.",
            hint="Run this on the server, with the cache's path there.",
        )


def _target(key: str) -> str:
    return f"/zarr/{quote(check_key(key))}"


def _whole(answer: Answer, what: str) -> bytes:
    """The body, held against its checksum where the server sends one."""
    content = answer.body
    checksum = answer.headers.get(CHECKSUM_HEADER)
    if checksum is not None and checksum != checksum_of(content):
        raise CorruptError(f"{what} was damaged on the way: its CRC-32C is not {checksum[:8]}.")
    return content


def _commit_keys(seed: str, shards: Any) -> list[str]:
    number = int(seed)
    if str(number) != seed or not 0 <= number < MAX_SEED or not isinstance(shards, list):
        raise ValueError("seed")
    if not all(type(shard) is int and 0 <= shard < 2**31 for shard in shards):
        raise ValueError("shard")
    return [commit_key(number, shard) for shard in shards]


def _runs(ranges: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Ranges that follow one another, together: they are one request."""
    runs: list[list[tuple[int, int]]] = []
    for start, stop in ranges:
        if runs and runs[-1][-1][1] == start:
            runs[-1].append((start, stop))
        else:
            runs.append([(start, stop)])
    return runs
