"""Three tiny real caches, a server of their pages, and a browser."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from support.browser import chromium
from support.builds import record_toy
from support.caches import make_spec, open_writer, write_shard
from support.page_service import PageService

from cache_service.api.http.auth import AuthMiddleware
from cache_service.api.http.problems import add_problem_handlers
from cache_service.api.http.settings import TokenConfig
from cache_service.api.page import routes, sign_in
from cache_service.api.page.rendering import Pages

DATASET = {"name": "support.toys:patches", "args": {"num_samples": 96}}


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """`plain` is complete, `mixed` mixes its views, `partial` has 3 shards of 16."""
    folder = tmp_path_factory.mktemp("caches")
    record_toy(str(folder / "plain"), scales=[1, 2, 4])
    record_toy(str(folder / "mixed"), augment={"ops": MIXED, "size": 16}, seeds="0:1")
    writer = open_writer(str(folder / "partial"), make_spec(), num_seeds=4)
    for seed, shard in ((0, 0), (0, 1), (2, 3)):
        write_shard(writer, seed, shard)
    return folder


MIXED = [{"op": "pad_crop"}, {"op": "mixup", "alpha": 1.0, "prob": 1.0}]


@contextmanager
def serving(pages: Pages, tokens: tuple[TokenConfig, ...] = ()) -> Iterator[str]:
    """The pages on a port of their own."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        app.state.service = SimpleNamespace(
            stopping=asyncio.Event(), config=SimpleNamespace(tokens=tokens)
        )
        app.state.pages = pages
        yield

    app = FastAPI(lifespan=lifespan)
    app.include_router(routes.router)
    app.include_router(sign_in.router)
    app.add_middleware(
        AuthMiddleware,
        tokens=tokens,
        login=lambda request: sign_in.sign_in_form(pages, request),
    )
    add_problem_handlers(app)
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    (port,) = {s.getsockname()[1] for each in server.servers for s in each.sockets}
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        app.state.service.stopping.set()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def page_service(root) -> PageService:
    return PageService(root, (DATASET,))


@pytest.fixture(scope="session")
def pages(page_service) -> Iterator[Pages]:
    """They wait long, because the first image imports torch."""
    made = page_service.pages(wait_s=60.0)
    yield made
    made.close()


@pytest.fixture(scope="session")
def serve_pages():
    """A function that serves pages of a test's own."""
    return serving


@pytest.fixture(scope="session")
def server(pages) -> Iterator[str]:
    with serving(pages) as base:
        yield base


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of a module, because its event loop would be in the way of other tests of this thread."""
    with chromium() as found:
        yield found
