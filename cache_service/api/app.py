"""The application: assembles the service, its routes, its middleware, builds and pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

import anyio.to_thread
from fastapi import FastAPI

from cache_service.api.builds import routes as build_routes
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http import caches, rows, zarr
from cache_service.api.http import service as operations
from cache_service.api.http.auth import AuthMiddleware
from cache_service.api.http.catalog import Catalog
from cache_service.api.http.direct import DirectRoutes
from cache_service.api.http.limits import (
    BodyLimitMiddleware,
    ConcurrencyLimiter,
    ConcurrencyLimitMiddleware,
)
from cache_service.api.http.log import RequestLogMiddleware, log_request
from cache_service.api.http.metrics import Metrics, RecentTraffic
from cache_service.api.http.prefix import PrefixMiddleware
from cache_service.api.http.problems import add_problem_handlers, describe
from cache_service.api.http.service import Service, head_routes
from cache_service.api.http.settings import ServeConfig, ServiceLimits
from cache_service.api.http.waiting import ShardWaiter
from cache_service.api.page import routes as page_routes
from cache_service.api.page import sign_in
from cache_service.api.page.rendering import Pages


def create_app(config: ServeConfig, limits: ServiceLimits | None = None) -> FastAPI:
    """Create the application of a configuration.

    Args:
        config: of the serve file.
        limits: for tests; by default those of the configuration, and the constants.

    Raises:
        ConfigError: the root cannot be served.
    """
    limits = limits or ServiceLimits(**config.limits.model_dump())
    metrics, stopping = Metrics(), asyncio.Event()
    catalog = Catalog(config.root, open_shards=limits.open_shards)
    builds = None
    if config.builds is not None:
        builds = Builds(config.root, config.builds, registry=metrics.registry)
        builds.check()
        catalog.place = builds.place
        builds.spec_of = catalog.spec_of
    service = Service(
        config=config,
        limits=limits,
        catalog=catalog,
        waiter=ShardWaiter(catalog, stopping, limits),
        limiter=ConcurrencyLimiter(limits),
        metrics=metrics,
        traffic=RecentTraffic(),
        stopping=stopping,
    )
    if builds is not None:
        service.out_of_space_since = builds.out_of_space_since
    metrics.watch(service.limiter)
    metrics.add_gauge(
        "kdcache_damaged_caches", "Caches in which reading found damage.", catalog.damage.count
    )
    pages = Pages(service, builds)
    app = _empty_app()
    app.state.service, app.state.builds, app.state.pages = service, builds, pages
    # Routes are matched in this order, one by one: the busiest first.
    rooms = (rows, operations, caches, zarr, build_routes, page_routes, sign_in)
    routers = [room.router for room in rooms]
    for router in (*routers, head_routes(routers)):
        app.include_router(router)
    add_problem_handlers(app)
    describe(app)
    _add_middleware(app, service, pages)
    return app


def _empty_app() -> FastAPI:
    return FastAPI(
        title="kd-cache",
        version=version("kd-cache"),
        docs_url=None,  # FastAPI's page loads scripts from another server
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


def _add_middleware(app: FastAPI, service: Service, pages: Pages) -> None:
    # What is added last is the outermost: refused requests are logged and counted, too.
    config = service.config
    app.add_middleware(DirectRoutes)
    app.add_middleware(BodyLimitMiddleware, max_bytes=service.limits.max_body_bytes)
    app.add_middleware(ConcurrencyLimitMiddleware, limiter=service.limiter)
    login = partial(sign_in.sign_in_form, pages)
    app.add_middleware(AuthMiddleware, tokens=config.tokens, login=login)
    if config.prefix or config.trust_proxy:
        app.add_middleware(PrefixMiddleware, prefix=config.prefix, trusts_proxy=config.trust_proxy)
    observers = (service.metrics.observe, service.traffic.observe, log_request)
    app.add_middleware(RequestLogMiddleware, observers=observers)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    builds: Builds | None = app.state.builds
    stopping = service.stopping
    if builds is not None:
        await anyio.to_thread.run_sync(builds.start)
        service.waiter.prioritize = builds.queue.prioritize
    ending = asyncio.create_task(_stop_workers_early(builds, stopping))
    try:
        yield
    finally:
        stopping.set()
        await ending
        await anyio.to_thread.run_sync(app.state.pages.close)
        if builds is not None:
            await anyio.to_thread.run_sync(builds.stop)


async def _stop_workers_early(builds: Builds | None, stopping: asyncio.Event) -> None:
    """Let the build workers end while the last requests are answered, and not after them."""
    await stopping.wait()
    if builds is not None:
        builds.begin_to_stop()
