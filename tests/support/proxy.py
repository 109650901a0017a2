"""A TCP proxy that spoils what comes back: late, slow, cut short, broken off, or with a wrong bit.

One fault per connection, taken in turn from a list that repeats. The client's bytes are left alone.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import cycle
from typing import Any, NamedTuple

PIECE = 1 << 14


class Fault(NamedTuple):
    """What happens to the answers of one connection. Byte numbers count from its first one.

    Attributes:
        latency_s: before every answer.
        bytes_per_s: bandwidth; 0 is unbounded.
        reset_at: after so many bytes the connection is reset.
        close_at: after so many bytes it is closed, as by a server that thinks it is done.
        flip_at: the byte of which one bit is flipped.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    reset_at: int | None = None
    close_at: int | None = None
    flip_at: int | None = None


class Proxy:
    """Listens on a port of its own and forwards to `target`."""

    def __init__(
        self, target: int, faults: Sequence[Fault], tls: ssl.SSLContext | None = None
    ) -> None:
        self.target = target
        self._tls = tls
        self.port = 0
        self.connections = 0
        self._faults = cycle(faults)
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def run(self, ready: threading.Event, done: asyncio.Event) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await done.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.01)  # aborted transports say goodbye

    def _accept(self, ours: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(client)
        self._tasks.append(asyncio.create_task(self._serve(ours, client, next(self._faults))))

    async def _serve(
        self, ours: asyncio.StreamReader, client: asyncio.StreamWriter, fault: Fault
    ) -> None:
        with suppress(OSError), closing(client):
            theirs, server = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.append(server)
            up = asyncio.create_task(_pump(ours, server))
            self._tasks.append(up)
            try:
                await _spoil(theirs, client, fault)
            finally:
                up.cancel()
                server.close()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await source.read(PIECE):
            target.write(piece)
            await target.drain()


async def _spoil(source: asyncio.StreamReader, client: asyncio.StreamWriter, fault: Fault) -> None:
    sent, is_first = 0, True
    while piece := bytearray(await source.read(PIECE)):
        if is_first:
            await asyncio.sleep(fault.latency_s)
        is_first = len(piece) < PIECE
        if fault.bytes_per_s:
            await asyncio.sleep(len(piece) / fault.bytes_per_s)
        if fault.flip_at is not None and sent <= fault.flip_at < sent + len(piece):
            piece[fault.flip_at - sent] ^= 0x10
        ends = [at for at in (fault.reset_at, fault.close_at) if at is not None]
        keep = min([len(piece), *(at - sent for at in ends)])
        client.write(piece[:keep])
        await client.drain()
        sent += keep
        if sent == fault.reset_at:
            client.transport.abort()
        if sent in ends:
            return


@contextmanager
def proxied(
    target: int, faults: Sequence[Fault], tls: ssl.SSLContext | None = None
) -> Iterator[Proxy]:
    """A proxy in a thread, in front of a port of this machine; it may speak TLS to its clients."""
    proxy = Proxy(target, faults, tls)
    with in_thread(proxy.run):
        yield proxy


@contextmanager
def in_thread(
    run: Callable[[threading.Event, asyncio.Event], Coroutine[Any, Any, None]],
) -> Iterator[None]:
    """Run a server in a thread, from when it sets the first event until the second one is set."""
    ready = threading.Event()
    loop, done = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(ready, done),))
    thread.start()
    ready.wait(5)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()
