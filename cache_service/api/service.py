"""What the routes of one application share, and how a route gets at it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from fastapi import Depends, Request

from cache_service.api.batch import Batch
from cache_service.api.builds.supervisor import Builds
from cache_service.api.catalog import Catalog
from cache_service.api.config import ServeConfig
from cache_service.api.follow import Follow
from cache_service.api.limits import Gate
from cache_service.api.live import Live
from cache_service.api.metrics import Metrics


@dataclass
class Service:
    """One service, from start to stop.

    Attributes:
        catalog: the caches below the root.
        follow: awaits shards of a running build.
        gate: bounds what runs at a time, and reads on threads.
        metrics: for Prometheus.
        live: rates and latencies for the page.
        batch: tells metrics, page and logs of requests.
        builds: the queue; None where the configuration has none.
        probes: limiter of the thread that lists the root for `/readyz`.
        waiting: requests that await a running build.
        stopping: set when the server stops: streams and waits end.
    """

    config: ServeConfig
    catalog: Catalog
    follow: Follow
    gate: Gate
    metrics: Metrics
    live: Live
    batch: Batch
    builds: Builds | None
    stopping: asyncio.Event
    probes: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))
    waiting: int = 0

    def __post_init__(self) -> None:
        """A cache that is queued is not one that does not exist: who awaits it is told so."""
        if self.builds is not None:
            self.catalog.is_expected = self.builds.expects


async def service_of(request: Request) -> Service:
    """The service behind a request."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]
"""The parameter of a route that needs it."""
