"""The client of a measurement: a process of its own that does little but wait.

Each connection sends its next request as soon as it has the whole response. Bodies are received and
not looked at, so that the server is what is measured.
"""

from __future__ import annotations

import base64
import re
import selectors
import socket
import time
from itertools import cycle
from typing import Any

from cache_service.processes import ParentConnection

BUFFER_BYTES = 1 << 20
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class _Connection:
    """One connection: sends a request, receives the response, and measures the time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_at = 0.0
        self._head = b""
        self._left = -1
        self.num_bytes = 0

    def send(self, request: bytes) -> None:
        self._head, self._left = b"", -1
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self, buffer: memoryview) -> bool:
        """Receive what has come. Returns whether the response is complete."""
        count = self.socket.recv_into(buffer)
        if not count:
            raise ConnectionError("the server closed a connection within a response")
        self.num_bytes += count
        if self._left >= 0:
            self._left -= count
        else:
            self._head += bytes(buffer[:count])
            self._measure_head()
        return self._left == 0

    def _measure_head(self) -> None:
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._head[: end + 2])
        if not self._head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 206")) or length is None:
            raise ConnectionError(f"the server responded {self._head[:200]!r}")
        self._left = int(length[1]) - (len(self._head) - end - 4)


def measure(port: int, requests: list[bytes], concurrency: int, count: int) -> dict[str, Any]:
    """Send `count` requests over so many connections: seconds, latencies in order, bytes."""
    connections = [_Connection(port) for _ in range(concurrency)]
    chosen = cycle(requests)
    try:
        _run(connections, chosen, concurrency)  # the first response of each is not timed
        before = sum(each.num_bytes for each in connections)
        begun = time.perf_counter()
        latencies = _run(connections, chosen, count)
        seconds = time.perf_counter() - begun
        num_bytes = sum(each.num_bytes for each in connections) - before
    finally:
        for each in connections:
            each.socket.close()
    return {"seconds": seconds, "latencies": latencies, "num_bytes": num_bytes}


def _run(connections: list[_Connection], chosen: cycle[bytes], count: int) -> list[float]:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    latencies: list[float] = []
    with selectors.DefaultSelector() as selector:
        active = connections[:count]
        for each in active:
            selector.register(each.socket, selectors.EVENT_READ, each)
            each.send(next(chosen))
        num_sent = len(active)
        while len(latencies) < count:
            for key, _ in selector.select(60):
                each = key.data
                if not each.receive(buffer):
                    continue
                latencies.append(time.perf_counter() - each.sent_at)
                if num_sent < count:
                    each.send(next(chosen))
                    num_sent += 1
    return latencies


def main() -> None:
    """Measure what the parent asks for, until it closes its end."""
    parent = ParentConnection()
    for message in parent.messages():
        requests = [base64.b64decode(each) for each in message["requests"]]
        parent.send(measure(message["port"], requests, message["concurrency"], message["count"]))


if __name__ == "__main__":
    main()
