"""The client of a measurement: a process of its own that does little but wait.

Run as `python -m cli.experiments.bench.load`: one JSON order a line on stdin, one JSON answer a
line on stdout. Each connection asks again as soon as it has its answer. Bodies are received and
not looked at, so that the server is what is measured.
"""

from __future__ import annotations

import base64
import json
import re
import selectors
import socket
import sys
import time
from itertools import cycle
from typing import Any

BUFFER_BYTES = 1 << 20
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class _Connection:
    """One connection: sends a request, receives its answer, knows how long that took."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.asked = 0.0
        self._head = b""
        self._left = -1
        self.num_bytes = 0

    def ask(self, request: bytes) -> None:
        self._head, self._left = b"", -1
        self.asked = time.perf_counter()
        self.socket.sendall(request)

    def take(self, buffer: memoryview) -> bool:
        """Receive what is there; whether the answer is complete."""
        count = self.socket.recv_into(buffer)
        if not count:
            raise ConnectionError("the server closed a connection within an answer")
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
        if not self._head.startswith(b"HTTP/1.1 200") or length is None:
            raise ConnectionError(f"the server answered {self._head[:200]!r}")
        self._left = int(length[1]) - (len(self._head) - end - 4)


def measure(port: int, requests: list[bytes], concurrency: int, count: int) -> dict[str, Any]:
    """Ask `count` times over so many connections: seconds, latencies in order, bytes."""
    connections = [_Connection(port) for _ in range(concurrency)]
    chosen = cycle(requests)
    try:
        _run(connections, chosen, concurrency)  # the first answer of each is not timed
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
        asking = connections[:count]
        for each in asking:
            selector.register(each.socket, selectors.EVENT_READ, each)
            each.ask(next(chosen))
        asked = len(asking)
        while len(latencies) < count:
            for key, _ in selector.select(60):
                each = key.data
                if not each.take(buffer):
                    continue
                latencies.append(time.perf_counter() - each.asked)
                if asked < count:
                    each.ask(next(chosen))
                    asked += 1
    return latencies


def main() -> None:
    """Answer orders until stdin ends."""
    for line in sys.stdin:
        order = json.loads(line)
        requests = [base64.b64decode(each) for each in order["requests"]]
        measured = measure(order["port"], requests, order["concurrency"], order["count"])
        sys.stdout.write(json.dumps(measured) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
