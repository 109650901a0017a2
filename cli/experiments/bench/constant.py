"""What the service is measured against: FastAPI routes that return constants.

`python -m cli.experiments.bench.constant BYTES ...` serves that many bytes at /0, /1, ... on
uvicorn as the service runs, but without the guard, logs, checks and reading.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from fastapi import FastAPI, Response


def constant_app(sizes: list[int]) -> FastAPI:
    """One route for each size."""
    app = FastAPI(telemetry={"tracing": False, "metrics": False, "logs": False})
    for number, size in enumerate(sizes):
        app.get(f"/{number}")(_route(b"x" * size))
    return app


def _route(body: bytes) -> Callable[[], Coroutine[Any, Any, Response]]:
    async def constant() -> Response:
        return Response(body, media_type="application/octet-stream")

    return constant


class _Announcing(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        sys.stdout.write(json.dumps({"url": f"http://127.0.0.1:{port}"}) + "\n")
        sys.stdout.flush()


def main(sizes: list[int]) -> None:
    """Serve until a signal comes."""
    config = uvicorn.Config(
        constant_app(sizes), port=0, http="httptools", ws="none", log_config=None, access_log=False
    )
    _Announcing(config).run()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
