"""Rows from the service and from a bucket, beside plain transfers of the same bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache_service.format.shard import CRC_BYTES
from cache_service.remote.source import open_source
from cache_service.rows.reader import Cache, open_cache
from cache_service.storage import Storage, open_storage
from cli.experiments.bench.formats import ALL_ARRAYS, LOGITS, Opened, cache_rows
from cli.experiments.bench.http import KD_CACHE, serving

PLAIN_SOCKET = "plain socket, as many bytes"
PLAIN_REQUESTS = "plain requests for the bytes"

_REQUEST_BYTES = 8


@contextlib.contextmanager
def over_http(cache: Path) -> Iterator[dict[str, Opened]]:
    """The rows through `kd-cache serve` on loopback; first a socket that sends as many bytes."""
    local = open_cache(str(cache))
    row_bytes = local.layout.by_name["logits"].row_bytes
    serve = [*KD_CACHE, "serve", str(cache.parent), "--port", "0", "--json"]
    with serving(serve) as server, _socket() as plain:
        url = f"http://127.0.0.1:{server.port}/v1/caches/{cache.name}"
        yield {
            PLAIN_SOCKET: Opened(
                lambda start, stop: plain.receive((stop - start) * row_bytes),
                lambda rows_B: plain.receive(len(rows_B) * row_bytes),
            ),
            LOGITS: cache_rows(open_source(url), ("logits",)),
            ALL_ARRAYS: cache_rows(open_source(url), None),
        }


class _Socket:
    """The client's end: asks for a number of bytes, and receives them into new memory."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def receive(self, num_bytes: int) -> NDArray[np.uint8]:
        self._connection.sendall(num_bytes.to_bytes(_REQUEST_BYTES, "little"))
        received = np.empty(num_bytes, np.uint8)
        left = received.data
        while left:
            left = left[self._connection.recv_into(left) :]
        return received


@contextlib.contextmanager
def _socket() -> Iterator[_Socket]:
    """A connection to a thread that sends as many zero bytes as it is asked for."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as connection,
    ):
        server, _ = listening.accept()
        sender = threading.Thread(target=_send, args=(server,))
        sender.start()
        try:
            yield _Socket(connection)
        finally:
            connection.shutdown(socket.SHUT_RDWR)
            sender.join()


def _send(connection: socket.socket) -> None:
    zeros = b""
    with connection:
        while len(request := connection.recv(_REQUEST_BYTES, socket.MSG_WAITALL)) == _REQUEST_BYTES:
            num_bytes = int.from_bytes(request, "little")
            if num_bytes > len(zeros):
                zeros = bytes(num_bytes)
            connection.sendall(memoryview(zeros)[:num_bytes])


@contextlib.contextmanager
def over_s3(cache: Path, url: str) -> Iterator[dict[str, Opened]]:
    """The rows in a bucket, below a new prefix that is removed at the end; plain requests first."""
    local = open_storage(str(cache))
    bucket = open_storage(f"{url.rstrip('/')}/kd-cache-bench-{uuid.uuid4().hex}")
    keys = [key for key in local.list("") if not key.startswith(".")]
    try:
        for key in keys:
            bucket.put(key, local.get(key) or b"")
        rows = open_cache(bucket.url)
        yield {
            PLAIN_REQUESTS: _plain_requests(bucket, rows),
            LOGITS: cache_rows(rows, ("logits",)),
        }
    finally:
        for key in keys:
            bucket.delete(key)


def _plain_requests(bucket: Storage, cache: Cache) -> Opened:
    """A request for each chunk in order, and one for scattered rows; nothing is looked at."""
    layout, array = cache.spec.layout, cache.layout.by_name["logits"]
    stride = layout.chunk_rows * array.row_bytes + CRC_BYTES
    fetched: list[tuple[str, int]] = []

    def key(row: int) -> str:
        return cache.layout.object_key("logits", 0, row // layout.shard_rows)

    def offset(row: int) -> int:
        chunk, inside = divmod(row % layout.shard_rows, layout.chunk_rows)
        return chunk * stride + inside * array.row_bytes

    def in_order(start: int, stop: int) -> None:
        for first in range(start - start % layout.chunk_rows, stop, layout.chunk_rows):
            place = key(first), offset(first)
            if place not in fetched:
                bucket.get_ranges(place[0], [(place[1], place[1] + stride)])
                fetched[:] = [place]

    def at_random(rows_B: NDArray[np.int64]) -> None:
        by_key: dict[str, list[tuple[int, int]]] = {}
        for row in rows_B.tolist():
            begin = offset(row)
            by_key.setdefault(key(row), []).append((begin, begin + array.row_bytes))
        for name, ranges in by_key.items():
            bucket.get_ranges(name, ranges)

    return Opened(in_order, at_random)
