"""The application of the service for uvicorn's own command, whose answers name their process."""

from __future__ import annotations

import os
from typing import Any

from cache_service.api.app import create_app
from cache_service.api.http.settings import ServeConfig


def make_app() -> Any:
    """Serve the root that KD_CACHE_ROOT names."""
    app = create_app(ServeConfig.model_validate({"root": os.environ["KD_CACHE_ROOT"]}))

    async def named(scope: Any, receive: Any, send: Any) -> None:
        async def with_pid(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"x-process", str(os.getpid()).encode())]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, with_pid)

    return named
