"""A real server of a folder of caches: in a thread of this process, or as `kd-cache serve`."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import urllib3

from cache_service.api.app import create_app
from cache_service.api.http.auth import token_sha256
from cache_service.api.http.service import Service
from cache_service.api.http.settings import ServeConfig, ServiceLimits
from cache_service.api.server import listen, make_server, url_of

READ_TOKEN, BUILD_TOKEN = "read-" + "r" * 38, "build-" + "b" * 37

TOKENS = [
    {"name": "reader", "sha256": token_sha256(READ_TOKEN), "scopes": ["read"]},
    {"name": "builder", "sha256": token_sha256(BUILD_TOKEN), "scopes": ["read", "build"]},
]
"""What a configuration lists where the two tokens above are to be known."""

KD_CACHE = "from cli.main import run; run()"

STARTS_S = 60.0


class Serving(NamedTuple):
    """A server that runs: `url` without a slash at its end."""

    url: str
    service: Service | None = None
    process: subprocess.Popen[str] | None = None

    def cache_url(self, name: str) -> str:
        return f"{self.url}/v1/caches/{name}"

    def ask(
        self, method: str, path: str, *, token: str | None = None, **kwargs: Any
    ) -> urllib3.BaseHTTPResponse:
        """One request, no retries, no redirects; the body is in `.data`."""
        headers = {**kwargs.pop("headers", {})}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        with urllib3.PoolManager(retries=False) as pool:
            return pool.request(
                method, self.url + path, headers=headers, redirect=False, timeout=30, **kwargs
            )


@contextlib.contextmanager
def serving(
    root: str | Path, *, limits: ServiceLimits | None = None, **config: Any
) -> Iterator[Serving]:
    """A server of a root in a thread, on a free port of loopback; stopped at the end.

    Args:
        root: folder of caches.
        limits: instead of those of the service.
        config: other keys of `ServeConfig`, as in its YAML file.
    """
    settings = ServeConfig.model_validate({"root": str(root), "port": 0, **config})
    app = create_app(settings, limits)
    ready: queue.Queue[str] = queue.Queue()
    server = make_server(app, announce=lambda host, port: ready.put(url_of(host, port)))
    sockets = [listen("127.0.0.1", 0)]
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    try:
        yield Serving(ready.get(timeout=STARTS_S), service=app.state.service)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"


@contextlib.contextmanager
def serving_process(
    root: str | Path, *, log: Path, port: int = 0, env: dict[str, str] | None = None, **config: Any
) -> Iterator[Serving]:
    """`kd-cache serve` in a process of its own, which the test may kill; stderr goes to `log`."""
    file = log.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    command = [sys.executable, "-c", KD_CACHE, "serve", str(root), "--json"]
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--config", str(file)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Serving(json.loads(line)["url"], process=process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
