"""Runs the application on uvicorn behind the guard, and stops it within seconds.

A stop (SIGTERM, SIGINT) refuses new connections, tells event streams to end, lets requests in
flight finish, and returns: the exit status of a server that was stopped as asked is 0.
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
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from cache_service.api.guard import GuardLimits, guarded
from cache_service.api.http.log import set_up_logs
from cache_service.api.http.settings import ServeConfig
from cache_service.errors import ConfigError

GRACE_SECONDS = 4
"""For requests in flight after a stop; with the rest of it, the process ends within 5 s."""

FILES_BESIDE_CONNECTIONS = 512
"""Open files that are no connections: mapped shards, libraries, pipes."""

log = logging.getLogger("kdcache.server")


def run(app: FastAPI, config: ServeConfig, *, announce: Callable[[str, int], None]) -> None:
    """Serve until a signal says to stop, then return.

    Args:
        app: of `create_app`; its `state.service` has the metrics and the stop event.
        config: address and limits.
        announce: is told host and port, once connections are taken.

    Raises:
        ConfigError: the address cannot be bound.
    """
    set_up_logs()
    allow_open_files(config.limits.max_connections)
    server = make_server(app, config, announce=announce)
    server.run([listen(config.host, config.port)])
    leave_stuck_threads()


def make_server(
    app: FastAPI, config: ServeConfig, *, announce: Callable[[str, int], None]
) -> Server:
    """A server of an application, bounded as its configuration says; see `run`."""
    limits, service = config.limits, app.state.service
    guard = GuardLimits(
        header_seconds=limits.header_timeout_s,
        header_bytes=limits.max_header_bytes,
        send_seconds=limits.send_timeout_s,
        connections=limits.max_connections,
        on_refusal=service.metrics.count_refusal,
    )
    return Server(
        uvicorn_config(app, guard, keep_alive_s=limits.keep_alive_s),
        announce=announce,
        stopping=lambda: service.stopping,
    )


class Stopping(Protocol):
    """An event that ends streams and waits: asyncio's, as seen by the server."""

    def set(self) -> None:
        """Say that the server stops."""


class Server(uvicorn.Server):
    """uvicorn's server, with our announcement, our event, and an exit that is no crash."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        announce: Callable[[str, int], None],
        stopping: Callable[[], Stopping],
    ) -> None:
        super().__init__(config)
        self._announce = announce
        self._stopping = stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Announce the address when connections are taken: the real port where 0 was asked for."""
        await super().startup(sockets)
        # What is there now stays: the collector need not look at it again for every request.
        gc.collect()
        gc.freeze()
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._announce(host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell what waits that it must end; then as uvicorn does."""
        self._stopping().set()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The first signal asks to stop, a second one stops."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals while serving. uvicorn raises them again afterwards: a crash to some."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in taken}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one.

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
            f"{host}:{port} cannot be listened on: {failure.strerror or failure}.",
            hint="Stop what listens there, or give another --port (0 takes a free one).",
        ) from failure
    return opened


def url_of(host: str, port: int) -> str:
    """`http://127.0.0.1:8000`, with brackets around an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_config(
    app: Callable[..., object],
    guard: GuardLimits,
    *,
    keep_alive_s: int,
    stop_s: int = GRACE_SECONDS,
) -> uvicorn.Config:
    """uvicorn as this service wants it: our guard, our logs, nothing said of its version."""
    return uvicorn.Config(
        app,
        http=guarded(guard),
        loop="uvloop",  # it holds on to what it has yet to send, where asyncio's copies it
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=1024,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=stop_s,
    )


def allow_open_files(connections: int) -> None:
    """Raise this process's limit of open files to what its connections may need, if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + FILES_BESIDE_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def leave_stuck_threads(wait_seconds: float = 0.3) -> None:
    """End this process now where a thread still reads: the interpreter would wait for it."""
    until = time.monotonic() + wait_seconds
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(until - time.monotonic(), 0))
        if thread.is_alive():
            log.warning("stopped while storage was being read")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
