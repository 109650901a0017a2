"""Runs the application on uvicorn, and stops it within seconds.

A stop (SIGTERM, SIGINT) refuses new connections, ends event streams, lets requests in flight
finish, and returns: the exit status of a server that was asked to stop is 0.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cache_service.api.connections import limited_protocol
from cache_service.api.http.log import set_up_logs
from cache_service.api.http.service import Service
from cache_service.api.http.settings import ServeConfig
from cache_service.errors import ConfigError

GRACE_SECONDS = 4
"""For requests in flight after a stop; with everything else, the process ends within 5 s."""

OTHER_OPEN_FILES = 512
"""Open files besides connections: mapped shards, libraries, pipes."""

log = logging.getLogger("kdcache.server")


def run(app: FastAPI, config: ServeConfig, *, announce: Callable[[str, int], None]) -> None:
    """Serve until a signal says to stop, then return.

    Args:
        app: of `create_app`.
        config: the address.
        announce: called with host and port once connections are accepted.

    Raises:
        ConfigError: the address cannot be bound.
    """
    set_up_logs()
    allow_open_files(app.state.service.limits.max_connections)
    make_server(app, announce=announce).run([listen(config.host, config.port)])
    leave_stuck_threads()


def make_server(
    app: FastAPI,
    *,
    announce: Callable[[str, int], None],
    stop_s: int = GRACE_SECONDS,
) -> Server:
    """Create the server of an application; see `run`. `app.state.service` is its service."""
    service: Service = app.state.service
    limits = service.limits
    config = uvicorn.Config(
        app,
        http=limited_protocol(limits, service.metrics.count_refusal),
        loop="uvloop",  # it keeps a reference to unsent bytes, where asyncio's loop copies them
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=1024,
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=stop_s,
    )
    return Server(config, service, announce)


class Server(uvicorn.Server):
    """uvicorn's server with an announcement, a stop event, and an exit without a signal."""

    def __init__(
        self, config: uvicorn.Config, service: Service, announce: Callable[[str, int], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Announce the address once connections are accepted; port 0 has become a real one."""
        await super().startup(sockets)
        # Everything that exists now stays: the collector need not look at it for every request.
        gc.collect()
        gc.freeze()
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._announce(host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End streams and waits first, then do what uvicorn does."""
        self._service.stopping.set()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Stop gracefully on the first signal, at once on the second one."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals while serving.

        uvicorn raises them again afterwards, and the process would end by a signal.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Port 0 takes a free one.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except OSError:
            opened.close()
            raise
    except OSError as failure:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {failure.strerror or failure}.",
            hint="Stop the process that listens there, or give another --port (0 takes a free "
            "one).",
        ) from failure
    return opened


def url_of(host: str, port: int) -> str:
    """`http://127.0.0.1:8000`, with brackets around an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reachable(host: str) -> str:
    """An address by which other machines reach a server that listens on `host`.

    For 0.0.0.0 and `::` it is that of the network interface which leads to other machines, or this
    machine's name without one. Other addresses are returned as they are.
    """
    if host not in ("0.0.0.0", "::"):  # noqa: S104  compared, not bound
        return host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Chooses the interface; a datagram socket sends nothing when it is connected. The address
        # belongs to a block that is reserved for documentation.
        probe.connect(("2001:db8::1" if ":" in host else "192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()


def allow_open_files(connections: int) -> None:
    """Raise this process's limit of open files to what its connections may need, if allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHER_OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def leave_stuck_threads(wait_seconds: float = 0.3) -> None:
    """End this process at once if a thread still reads: the interpreter would wait for it."""
    deadline = time.monotonic() + wait_seconds
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(deadline - time.monotonic(), 0))
        if thread.is_alive():
            log.warning("stopped while a thread was reading storage")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
