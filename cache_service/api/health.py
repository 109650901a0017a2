"""Is the service alive, is it ready, and what does it count."""

from __future__ import annotations

import anyio
import anyio.to_thread
from fastapi import APIRouter
from fastapi.responses import Response

from cache_service.api.metrics import MEDIA_TYPE
from cache_service.api.problems import responses
from cache_service.api.service import TheService
from cache_service.errors import KdCacheError, StorageError
from cache_service.format.frozen import Frozen

router = APIRouter(tags=["operations"])

READY_S = 2.0
"""A root that cannot be listed in this time cannot be read from either."""


class Health(Frozen):
    """`status` is `ok`, or `ready`."""

    status: str


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers. Touches nothing."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=Health, responses=responses(503))
async def readyz(service: TheService) -> Health:
    """The root can be listed."""
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
    return Health(status="ready")


@router.get("/metrics", response_class=Response, responses=responses())
async def metrics(service: TheService) -> Response:
    """Figures in Prometheus' text format."""
    service.batch.flush()
    return Response(service.metrics.render(), media_type=MEDIA_TYPE)
