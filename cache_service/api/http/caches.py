"""The list of caches, and the manifest of one cache, with which clients open it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cache_service.api.http.catalog import Catalog
from cache_service.api.http.problems import responses
from cache_service.api.http.rows import entity_tag, matches
from cache_service.api.http.service import TheService
from cache_service.config import Frozen
from cache_service.errors import KdCacheError
from cache_service.format.canonical import canonical_json
from cache_service.format.spec import FORMAT_VERSION

router = APIRouter(tags=["caches"])


class SeedCounts(Frozen):
    """Number of seeds of a cache: recorded completely, and planned."""

    complete: int
    planned: int


class CacheLine(Frozen):
    """One cache of a list. If it cannot be opened, `error` is set and nothing else is.

    Attributes:
        bytes: of the rows recorded so far, uncompressed.
    """

    name: str
    error: str | None = None
    fingerprint: str | None = None
    dataset: str | None = None
    num_samples: int | None = None
    teacher: str | None = None
    codec: str | None = None
    seeds: SeedCounts | None = None
    rows: int | None = None
    bytes: int | None = None


class CacheList(Frozen):
    """The caches by name."""

    caches: tuple[CacheLine, ...]


class ArrayLine(Frozen):
    """One array of a cache: the type and shape of a row."""

    name: str
    dtype: str
    row_shape: tuple[int, ...]


class Manifest(Frozen):
    """Everything that a client needs to open a cache.

    Attributes:
        format: version of the stored form.
        spec: the identity of the cache; `fingerprint` is its hash.
        versions: of the libraries that rendered its views.
        num_seeds: planned; every seed is smaller.
        num_shards: per seed.
        commits: recorded shards by seed.
        arrays: of a row.
    """

    name: str
    fingerprint: str
    format: int
    spec: dict[str, Any]
    versions: dict[str, str]
    num_seeds: int
    num_shards: int
    commits: dict[str, list[int]]
    arrays: tuple[ArrayLine, ...]


@router.get("/v1/caches", response_model=CacheList, responses=responses(503))
async def listed(request: Request, service: TheService) -> CacheList:
    """The caches of this service."""

    def read() -> CacheList:
        catalog = service.catalog
        return CacheList(caches=tuple(_line(catalog, name) for name in catalog.names()))

    return await service.limiter.read(request, read)


def _line(catalog: Catalog, name: str) -> CacheLine:
    try:
        opened = catalog.open(name)
        commits, planned = opened.commits(), opened.cache.num_seeds()
    except KdCacheError as error:
        return CacheLine(name=name, error=error.message)
    spec = opened.cache.spec
    ranges = [spec.shard_range(shard) for shards in commits.values() for shard in shards]
    rows = sum(stop - start for start, stop in ranges)
    complete = sum(len(shards) == spec.num_shards for shards in commits.values())
    return CacheLine(
        name=name,
        fingerprint=opened.cache.fingerprint,
        dataset=f"{spec.dataset.name} {spec.dataset.split}",
        num_samples=spec.dataset.num_samples,
        teacher=spec.teacher.model,
        codec=spec.codec.kind,
        seeds=SeedCounts(complete=complete, planned=planned),
        rows=rows,
        bytes=rows * opened.cache.layout.row_bytes,
    )


@router.get(
    "/v1/caches/{name}",
    response_class=Response,
    responses={
        200: {"model": Manifest},
        304: {"description": "Not Modified"},
        **responses(404, 503),
    },
)
async def manifest(request: Request, service: TheService, name: str) -> Response:
    """What one cache holds now. It grows while a build runs."""

    def read() -> bytes:
        cache = service.catalog.open(name).cache
        document = Manifest(
            name=name,
            fingerprint=cache.fingerprint,
            format=FORMAT_VERSION,
            spec=cache.spec.model_dump(mode="json"),
            versions=cache.versions,
            num_seeds=cache.num_seeds(),
            num_shards=cache.spec.num_shards,
            commits={str(seed): shards for seed, shards in cache.commits().items()},
            arrays=tuple(
                ArrayLine(name=array.name, dtype=array.dtype, row_shape=array.row_shape)
                for array in cache.layout.arrays
            ),
        )
        return canonical_json(document.model_dump(mode="json"))

    body = await service.limiter.read(request, read)
    etag = entity_tag(body.decode())
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if matches(request, etag):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")
