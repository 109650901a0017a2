"""A small application behind the real server, connection limits, concurrency limits and logs.

`python -m support.toyservice JSON` serves until SIGTERM. Its lookups sleep as long as they are told
to, as slow storage would, so that what is tested here is the service around them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from cache_service.api.http.limits import ConcurrencyLimiter, ConcurrencyLimitMiddleware
from cache_service.api.http.log import RequestLogMiddleware, log_request, set_up_logs
from cache_service.api.http.metrics import MEDIA_TYPE, Metrics, RecentTraffic
from cache_service.api.http.settings import ServiceLimits
from cache_service.api.server import (
    allow_open_files,
    leave_stuck_threads,
    listen,
    make_server,
)

SETTINGS: dict[str, Any] = {
    "header_seconds": 5.0,
    "header_bytes": 32_768,
    "send_seconds": 30.0,
    "connections": 1000,
    "in_flight": 64,
    "streams": 16,
    "threads": 8,
    "held_bytes": 256 << 20,
    "body_bytes": 1_000_000,
    "keep_alive": 5,
    "stop": 4,
}


def limits_of(settings: dict[str, Any]) -> ServiceLimits:
    return ServiceLimits(
        header_timeout_s=settings["header_seconds"],
        max_header_bytes=settings["header_bytes"],
        send_timeout_s=settings["send_seconds"],
        max_connections=settings["connections"],
        keep_alive_s=settings["keep_alive"],
        max_inflight=settings["in_flight"],
        max_streams=settings["streams"],
        threads=settings["threads"],
        max_answer_bytes=settings["held_bytes"],
    )


def toy_app(settings: dict[str, Any]) -> FastAPI:
    limits = limits_of(settings)
    limiter = ConcurrencyLimiter(limits)
    metrics, traffic = Metrics(), RecentTraffic()
    metrics.watch(limiter)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        sys.stderr.write("lifespan ended\n")

    app = FastAPI(lifespan=lifespan, max_body_size=settings["body_bytes"])
    app.state.service = SimpleNamespace(metrics=metrics, stopping=asyncio.Event(), limits=limits)
    app.add_middleware(ConcurrencyLimitMiddleware, limiter=limiter)
    app.add_middleware(
        RequestLogMiddleware, observers=(metrics.observe, traffic.observe, log_request)
    )
    _add_routes(app, limiter, metrics)
    return app


def _add_routes(app: FastAPI, limiter: ConcurrencyLimiter, metrics: Metrics) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def show() -> Response:
        return Response(metrics.render(), media_type=MEDIA_TYPE)

    @app.get("/v1/lookup/{name}")
    async def lookup(name: str, request: Request, seconds: float = 0.0, size: int = 2) -> Response:
        def read() -> bytes:
            time.sleep(seconds)
            return b"x" * size

        return Response(await limiter.read(request, read))

    @app.post("/v1/body")
    async def body(request: Request) -> dict[str, int]:
        return {"size": len(await request.body())}

    @app.get("/v1/crash")
    async def crash() -> None:
        raise RuntimeError(os.environ.get("AWS_SECRET_ACCESS_KEY", "crash"))

    @app.get("/v1/events")
    async def events(request: Request) -> StreamingResponse:
        async def stream() -> AsyncIterator[bytes]:
            yield b"event: hello\ndata: {}\n\n"
            await request.app.state.service.stopping.wait()

        return StreamingResponse(stream(), media_type="text/event-stream")


def main(settings: dict[str, Any]) -> None:
    set_up_logs()
    app = toy_app(settings)
    allow_open_files(settings["connections"])

    def announce(_host: str, port: int) -> None:
        sys.stdout.write(f"{port}\n")
        sys.stdout.flush()

    server = make_server(app, announce=announce, stop_s=settings["stop"])
    server.run([listen("127.0.0.1", 0)])
    leave_stuck_threads()


class Toy(NamedTuple):
    process: subprocess.Popen[str]
    port: int
    log: Path

    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def num_files(self) -> int:
        return int(psutil.Process(self.process.pid).num_fds())

    def logged(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def toy_service(folder: Path, **settings: Any) -> Iterator[Toy]:
    """A running toy; killed at the end if the test has not stopped it."""
    log = folder / "toy.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "support.toyservice", json.dumps(SETTINGS | settings)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        toy = Toy(process, int(line) if line else 0, log)
        assert toy.port, toy.logged()
        yield toy
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
