"""The application: parts, routes, and what stands around them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

import anyio.to_thread
from fastapi import FastAPI

from cache_service.api import caches, health, listing, lookup, rows, zarr_keys
from cache_service.api.auth import AuthMiddleware, Tokens
from cache_service.api.batch import Batch
from cache_service.api.bodies import BodyLimitMiddleware
from cache_service.api.builds import routes as builds_routes
from cache_service.api.builds.follow import BuildFollow, end_with
from cache_service.api.builds.supervisor import Builds
from cache_service.api.catalog import Catalog
from cache_service.api.config import ServeConfig
from cache_service.api.follow import PollingFollow
from cache_service.api.hosts import LoopbackHostMiddleware
from cache_service.api.lane import LookupLane
from cache_service.api.limits import Gate, GateMiddleware
from cache_service.api.live import Live
from cache_service.api.logs import log_requests
from cache_service.api.metrics import Metrics
from cache_service.api.observe import ObserveMiddleware
from cache_service.api.openapi import describe
from cache_service.api.page.mount import add_pages
from cache_service.api.problems import add_problem_handlers
from cache_service.api.service import Service
from cache_service.api.session import sign_in_form


def create_app(config: ServeConfig) -> FastAPI:
    """The application of a configuration, ready to be served.

    Raises:
        ConfigError: the root is not one that can be served.
    """
    service = _make_service(config)
    app = FastAPI(
        title="kd-cache",
        version=version("kd-cache"),
        docs_url=None,  # that page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
        lifespan=_lifespan,
    )
    app.state.service = service
    # Routes are tried in this order, and to try one takes time.
    for part in (rows, lookup, health, caches, zarr_keys, listing, builds_routes):
        app.include_router(part.router)
    pages = add_pages(app, service)
    add_problem_handlers(app)
    describe(app)
    # The last one added is the outermost: everything is seen, refused requests too.
    app.add_middleware(LookupLane)
    app.add_middleware(BodyLimitMiddleware, max_bytes=config.limits.max_body_bytes)
    app.add_middleware(GateMiddleware, gate=service.gate)
    app.add_middleware(
        AuthMiddleware, tokens=Tokens(config.tokens), login=partial(sign_in_form, pages)
    )
    if not config.tokens:
        app.add_middleware(LoopbackHostMiddleware)
    app.add_middleware(ObserveMiddleware, observers=(service.batch.observe,))
    return app


def _make_service(config: ServeConfig) -> Service:
    limits = config.limits
    catalog = Catalog(config.root, open_shards=limits.open_shards)
    gate = Gate(
        max_in_flight=limits.max_inflight,
        max_event_streams=limits.max_streams,
        reading_threads=limits.threads,
        max_held_bytes=limits.max_answer_bytes,
    )
    metrics, live = Metrics(), Live()
    metrics.watch(gate)
    stopping = asyncio.Event()
    patient = PollingFollow(catalog, stopping)
    builds = None
    if config.builds is not None:
        builds = Builds(config.root, config.builds, registry=metrics.registry)
    return Service(
        config=config,
        catalog=catalog,
        follow=BuildFollow(builds, patient) if builds is not None else patient,
        gate=gate,
        metrics=metrics,
        live=live,
        batch=Batch((metrics.observe, live.observe, log_requests)),
        builds=builds,
        stopping=stopping,
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    if service.builds is not None:
        await anyio.to_thread.run_sync(service.builds.start)
    ending = asyncio.create_task(end_with(service.builds, service.stopping))
    try:
        yield
    finally:
        service.batch.flush()
        service.stopping.set()
        await ending
        await anyio.to_thread.run_sync(app.state.pages.close)
        if service.builds is not None:
            await anyio.to_thread.run_sync(service.builds.stop)
