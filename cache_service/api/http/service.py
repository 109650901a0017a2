"""What the routes of one application share, and the routes that say how the service is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from cache_service.api.http.catalog import Catalog
from cache_service.api.http.limits import ConcurrencyLimiter
from cache_service.api.http.metrics import MEDIA_TYPE, Metrics, RecentTraffic
from cache_service.api.http.problems import responses
from cache_service.api.http.settings import ServeConfig, ServiceLimits
from cache_service.api.http.waiting import ShardWaiter
from cache_service.config import Frozen
from cache_service.errors import KdCacheError, StorageError

router = APIRouter(tags=["operations"])

READY_S = 2.0
"""A root that cannot be listed within this time counts as not ready, seconds."""


@dataclass
class Service:
    """One service, from start to stop.

    Attributes:
        limits: those of the configuration, and the constants beside them.
        catalog: the caches below the root.
        waiter: waits for shards that are being recorded.
        limiter: limits what runs at a time, and runs reads on threads.
        metrics: for Prometheus.
        traffic: rates and latencies for the page.
        stopping: set when the server stops: streams and waits end.
        probes: limiter of the thread that lists the root for `/readyz`.
        out_of_space_since: Unix time since when builds lack space; None if they do not.
    """

    config: ServeConfig
    limits: ServiceLimits
    catalog: Catalog
    waiter: ShardWaiter
    limiter: ConcurrencyLimiter
    metrics: Metrics
    traffic: RecentTraffic
    stopping: asyncio.Event
    probes: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    out_of_space_since: Callable[[], float | None] = lambda: None


async def service_of(request: Request) -> Service:
    """Return the service of a request."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]
"""Type of a route's parameter that takes the service."""


def head_routes(routers: Iterable[APIRouter]) -> APIRouter:
    """Routes that answer HEAD wherever these routers answer GET (RFC 9110, section 9.3.2).

    The server leaves out their bodies. A stream has to end by itself, before its first event.
    """
    heads = APIRouter(include_in_schema=False)
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
                heads.add_api_route(
                    route.path,
                    route.endpoint,
                    methods=["HEAD"],
                    response_class=route.response_class,
                    response_model=route.response_model,
                    response_model_exclude_none=route.response_model_exclude_none,
                )
    return heads


class Health(Frozen):
    """`status` is `ok`, or `ready`."""

    status: str


class Readiness(Frozen):
    """How ready the service is.

    Attributes:
        status: `ready`; or `out_of_space` if builds cannot go on, while recorded rows are served.
        since: when the first write failed for lack of space, ISO 8601.
    """

    status: str
    since: str | None = None


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers. Touches nothing."""
    return Health(status="ok")


@router.get(
    "/readyz",
    response_model=Readiness,
    response_model_exclude_none=True,
    responses=responses(503),
)
async def readyz(service: TheService) -> Readiness:
    """The root can be listed. Says if builds are out of space."""
    if service.stopping.is_set():
        raise StorageError("the service is stopping.")
    try:
        with anyio.fail_after(READY_S):
            await anyio.to_thread.run_sync(
                service.catalog.check, limiter=service.probes, abandon_on_cancel=True
            )
    except TimeoutError:
        raise StorageError(f"the root was not listed within {READY_S:g} s.") from None
    except (KdCacheError, OSError) as problem:
        raise StorageError("the root cannot be listed.") from problem
    since_s = service.out_of_space_since()
    if since_s is None:
        return Readiness(status="ready")
    # Not 503: a full disk ends builds, and students still read what is recorded.
    since = datetime.fromtimestamp(since_s, UTC).isoformat(timespec="seconds")
    return Readiness(status="out_of_space", since=since)


@router.get("/metrics", response_class=Response, responses=responses())
async def metrics(service: TheService) -> Response:
    """Figures in Prometheus' text format."""
    return Response(service.metrics.render(), media_type=MEDIA_TYPE)
