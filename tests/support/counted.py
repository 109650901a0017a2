"""An HTTP proxy on loopback that counts what a bucket is asked for; it may be slow, or be down.

Requests are passed on byte by byte, so their signatures hold. One instance counts the requests of
all processes that are told its address.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from support.proxy import in_thread

PIECE = 1 << 16

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class CountedRequest(NamedTuple):
    """One request: its method, its path and query, and how many bytes its answer says it has."""

    method: str
    target: str
    num_bytes: int


class CountingProxy:
    """Forwards connections to a port of this machine.

    Attributes:
        port: that it listens on.
        asked: the requests that were answered, in order.
        latency_s: before each answer.
        is_down: connections are closed at once, old ones too.
    """

    def __init__(self, target: int, latency_s: float) -> None:
        self.port = 0
        self.asked: list[CountedRequest] = []
        self.latency_s = latency_s
        self.is_down = False
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The endpoint to put into AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self.port}"

    def by_kind(self) -> Counter[str]:
        """How many requests of each kind there were; LIST is a GET of keys."""
        return Counter("LIST" if "list-type" in r.target else r.method for r in self.asked)

    def num_bytes(self, part: str = "/c/") -> int:
        """Bytes of the answers to GETs of objects whose key has this part: of arrays, as it is."""
        return sum(r.num_bytes for r in self.asked if r.method == "GET" and part in r.target)

    async def run(self, ready: threading.Event, done: asyncio.Event) -> None:
        """Serve until `done` is set."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await done.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, ours: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        server: asyncio.StreamWriter | None = None
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not self.is_down:
                head = await ours.readuntil(b"\r\n\r\n")
                body = await ours.readexactly(_length(head) or 0)
                if self.is_down:
                    break
                if server is None:
                    theirs, server = await asyncio.open_connection("127.0.0.1", self._target)
                server.write(head + body)
                method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
                await self._answer(method, target, theirs, client)
        for writer in filter(None, (client, server)):
            writer.transport.abort()

    async def _answer(
        self, method: str, target: str, theirs: asyncio.StreamReader, client: asyncio.StreamWriter
    ) -> None:
        head = await theirs.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):  # goes on with the body, which was sent already
            head = await theirs.readuntil(b"\r\n\r\n")
        await asyncio.sleep(self.latency_s)
        has_body = method != "HEAD" and head.split()[1] not in (b"204", b"304")
        left = _length(head) if has_body else 0
        self.asked.append(CountedRequest(method, target, left or 0))  # before the client goes on
        client.write(head)
        if left is None:
            await _pass_chunks(theirs, client)
            return
        while left:
            piece = await theirs.read(min(left, PIECE))
            if not piece:
                raise ConnectionResetError
            client.write(piece)
            await client.drain()
            left -= len(piece)


async def _pass_chunks(theirs: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
    size = -1
    while size:
        line = await theirs.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        client.write(line + await theirs.readexactly(size + 2))
        await client.drain()


def _length(head: bytes) -> int | None:
    found = _LENGTH.search(head)
    return None if found is None else int(found[1])


@contextmanager
def counted(target: int, *, latency_s: float = 0.0) -> Iterator[CountingProxy]:
    """A proxy in a thread, in front of a port of this machine."""
    proxy = CountingProxy(target, latency_s)
    with in_thread(proxy.run):
        yield proxy
